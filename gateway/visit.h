/* One request of a client, from its headers at a port to the last byte of its answer: whose it is, which
 * trace it belongs to, what came of it. When its port ends it, it becomes one line of the log. Nothing in it
 * of what was asked or answered. Counted: held by its port and by each of its streams. Thread: the loop's. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "gateway/stream.h"
#include "gateway/tenant_core.h"

enum { GW_TRACEPARENT_BYTES = 56, GW_VISIT_ID_BYTES = 160 };

struct gw_visit {
    uint32_t refs;
    gw_tenant *tenant;                      /* NULL: it is not known whose */
    const char *surface;                    /* path of a route or a method, a literal */
    bool quiet;                             /* asked by machines all the time: logged as debug */
    char id[GW_VISIT_ID_BYTES];             /* that the client knows */
    char traceparent[GW_TRACEPARENT_BYTES]; /* W3C: the client's, or one made here */
    uint64_t began_ns;
    uint32_t prompt_tokens;
    uint64_t completion_tokens;      /* of all answers */
    double queue_ms, first_token_ms; /* of the slowest and of the quickest answer */
    bool has_first;
    const char *end; /* the last answer's reason, or an error's code; a literal; NULL: none yet */
};

/* id, traceparent: what the client sent; NULL or unusable: they are made. surface is kept. */
gw_visit *gw_visit_begin(const char *surface, const char *id, const char *traceparent);
gw_visit *gw_visit_hold(gw_visit *visit);
void gw_visit_release(gw_visit *visit);
/* One of its answers has ended: usage may be of one that never began. */
void gw_visit_answered(gw_visit *visit, const gw_usage *usage, const char *end);
/* By its port, whose reference this is. status: of HTTP or gRPC. */
void gw_visit_end(gw_visit *visit, int status);

/* version-traceid-parentid-flags, lower case, no zeros where ids are. */
bool gw_traceparent_is_valid(const char *text);
