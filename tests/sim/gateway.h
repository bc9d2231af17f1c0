/* The inside of the simulated gateway: shared by gateway.c (links, frames, clients) and reopen.c (what
 * happens to a stream whose router is gone). Thread: one. */
#pragma once
#include "gateway/stream_core.h"
#include "tests/sim/sim.h"

enum { SIM_GATEWAY_ROUTERS = 16 };

typedef struct sim_gw_router {
    uint32_t member; /* 0: free */
    char address[16];
    sim_end *end; /* NULL: waiting for the next try */
    bool up;
    uint64_t retry_at_us;
    uint32_t n_open; /* streams of ours there */
} sim_gw_router;

typedef struct sim_gw_stream {
    TAILQ_ENTRY(sim_gw_stream) link;
    sim_request *request;
    gw_core core;
    uint64_t number;       /* at the router; a new one with every opening */
    sim_gw_router *router; /* NULL: has none */
    uint64_t homeless_us;  /* with router NULL: since when */
    uint64_t deadline_us;
} sim_gw_stream;

typedef struct sim_gateway {
    sim_member member;
    sim_gw_router routers[SIM_GATEWAY_ROUTERS];
    TAILQ_HEAD(, sim_gw_stream) streams;
    uint64_t next_number;
    sim_followed followed;
    bool placed; /* an epoch with a placement is in force */
    cm_arena arena;
    cm_bytes packed;
} sim_gateway;

/* gateway.c */
sim_gw_router *sim_gateway_pick(sim_gateway *g);
void sim_gateway_send_open(sim *s, sim_gateway *g, sim_gw_stream *stream);
void sim_gateway_leave_router(sim *s, sim_gateway *g, sim_gw_stream *stream, bool tell);
/* The client is told by name; the stream is gone. */
void sim_gateway_fail(sim *s, sim_gateway *g, sim_gw_stream *stream, cm_status status, const char *text);

/* ---- reopen.c: the seam ----
 * What the gateway's own core for reopening will decide: the prompt and all that was emitted go to another
 * router, under a new number, so that words of the first one are nobody's. */

/* Opens the stream wherever a router is linked; else it waits. */
void sim_reopen_place(sim *s, sim_gateway *g, sim_gw_stream *stream);
/* Its router is gone, with all it knew. */
void sim_reopen_lost(sim *s, sim_gateway *g, sim_gw_stream *stream);
/* Its router said what cannot be. */
void sim_reopen_refused(sim *s, sim_gateway *g, sim_gw_stream *stream);
/* Time: places those who wait, gives up those who waited too long. When to be called again. */
uint64_t sim_reopen_tick(sim *s, sim_gateway *g);
