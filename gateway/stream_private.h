/* One client's generation. stream.c opens and ends it, stream_events.c turns frames into events. Thread: the
 * loop's. */
#pragma once
#include "gateway/gateway_private.h"
#include "gateway/stream_core.h"
#include "gateway/visit.h"

struct gw_stream {
    TAILQ_ENTRY(gw_stream) link;
    gw_gateway *gateway;
    uint64_t serial;   /* counts streams */
    gw_origin *origin; /* held */
    gw_visit *visit;   /* held; NULL: the probe's */
    gw_tenant *tenant; /* likewise */
    gw_turn turn;      /* among all tenants' */
    uint32_t choice;
    uint64_t at; /* the router that has it already when it begins; 0: none */
    gw_request request;
    gw_stream_events events;
    void *ctx;
    bool want_ids, probe;
    bool keep_special; /* a raw completion's special tokens are text; the parser drops them else */

    gw_encode *encode; /* its prompt is being encoded; else NULL */
    gw_spot spot;      /* which router it is at, or waits for */
    gw_router *router; /* it was asked for there, as number; else NULL. Another time, another number: late
                          words of an earlier one find nobody */
    uint64_t number;
    uint8_t salt[GW_KEY_BYTES]; /* of whose prompts it may reuse the computed beginning */
    bool has_core, thinking, ending;
    bool has_enough; /* a second call began, and one was asked for: the answer ends before it */
    gw_core core;
    md_parser *parser;
    pc_timer *deadline; /* NULL when none */
    uint64_t deadline_at_ms;
    uint64_t received_ns, accepted_ns, first_ns, last_ns; /* 0: not yet; of tokens: the first, the last */
    gw_usage usage;                                       /* so far; without times until the end */

    /* An event's handler may cancel the stream: it is then over at once, and freed when nobody holds it any
     * more. */
    bool over;
    uint32_t n_holds;
};

void gw_stream_hold(gw_stream *stream);
void gw_stream_release(gw_stream *stream);
/* Tells the router, unless it has said its last word. */
void gw_stream_leave_router(gw_stream *stream);
/* It failed there, or what it said cannot be. true: it is asked for again. */
bool gw_stream_try_again(gw_stream *stream, cm_status status);
void gw_stream_finish(gw_stream *stream, gw_reason reason, int64_t stop_id);
void gw_stream_fail(gw_stream *stream, const gw_error *error);
