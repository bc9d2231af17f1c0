/* The inside of the simulated gateway: the real place and stream machines, called as gateway/'s routers.c,
 * stream.c and seek.c call them.
 *
 *   gateway.c   the process, its links to routers
 *   streams.c   streams: where they are, what routers and clients say about them
 *   seek.c      who has the stream of a client that comes back?
 *
 * Thread: one. */
#pragma once
#include "gateway/place_core.h"
#include "gateway/stream_core.h"
#include "proto/engine.pb-c.h"
#include "tests/sim/sim.h"

typedef struct sim_gw_router {
    TAILQ_ENTRY(sim_gw_router) link;
    uint64_t number;
    uint32_t member;
    uint64_t incarnation;
    char address[16];
    sim_end *end; /* NULL: waiting for the next try */
    bool up, stays;
    gw_place_standing standing;
    uint64_t retry_at_us, retry_ms;
} sim_gw_router;

typedef struct sim_gw_stream {
    TAILQ_ENTRY(sim_gw_stream) link;
    sim_request *request;
    uint64_t visit; /* of the client; another one now: it has gone elsewhere, and we were not told */
    gw_spot spot;
    gw_core core;
    uint8_t id[SIM_ID_BYTES];
    uint64_t birth, term;
    uint64_t number;       /* at the router; a new one with every asking */
    sim_gw_router *router; /* NULL: has none */
    uint32_t n_told;       /* tokens that its client had when it came */
    uint64_t deadline_us;
} sim_gw_stream;

typedef struct sim_gw_asked {
    uint64_t router;
    bool answered; /* on the link that is up */
} sim_gw_asked;
enum { SIM_GW_ASKED_MAX = 64 };

typedef struct sim_gw_seek {
    TAILQ_ENTRY(sim_gw_seek) link;
    sim_request *request;
    uint64_t visit, ask, until_us;
    sim_gw_asked asked[SIM_GW_ASKED_MAX];
    uint32_t n_asked;
    bool found; /* what another gateway needs to go on */
    uint64_t term, birth;
    uint64_t at, at_birth; /* the router, and which request it has; 0: none */
} sim_gw_seek;

typedef struct sim_gateway {
    sim_member member;
    TAILQ_HEAD(, sim_gw_router) routers; /* in the order they came */
    TAILQ_HEAD(, sim_gw_stream) streams;
    TAILQ_HEAD(, sim_gw_seek) seeks;
    gw_place place;
    uint64_t n_numbers; /* given to routers */
    uint64_t last_number, last_ask;
    sim_followed followed;
    bool placed; /* an epoch with a placement is in force */
    cm_arena arena;
    cm_bytes packed;
} sim_gateway;

/* gateway.c */
sim_gw_router *sim_gw_router_get(const sim_gateway *g, uint64_t number); /* NULL: gone */
uint32_t sim_gw_n_linked(const sim_gateway *g);                          /* that take new streams */
/* To one that is not linked: nothing happens. */
void sim_gw_say(sim *s, sim_gateway *g, sim_gw_router *router, uint16_t type,
                const ProtobufCMessage *message);
/* Ends the links of those that have left and are not needed; true if there was one. */
bool sim_gw_drop_leavers(sim *s, sim_proc *proc);

/* streams.c */
void sim_streams_lost(sim *s, sim_gateway *g, const sim_gw_router *router);
void sim_streams_tokens(sim *s, sim_proc *proc, const sim_gw_router *router,
                        const Baleen__Engine__V1__SeqTokens *seq);
/* Does what the place machine says; when to be called again. */
uint64_t sim_streams_run(sim *s, sim_proc *proc);
/* at: the router that has it; 0: a new one. CM_OK, or why not. */
CM_MUST_CHECK cm_status sim_stream_open(sim *s, sim_proc *proc, sim_request *request, uint64_t birth,
                                        uint64_t term, uint64_t at);
void sim_streams_fini(sim *s, sim_gateway *g);
uint64_t sim_gw_wall_us(const sim *s, const sim_proc *proc); /* no two hosts' clocks agree */

/* seek.c */
void sim_seeks_linked(sim *s, sim_gateway *g, sim_gw_router *router);
void sim_seeks_lost(sim_gateway *g, const sim_gw_router *router);
void sim_seeks_found(sim *s, sim_gateway *g, const sim_gw_router *router,
                     const Baleen__Engine__V1__SeqFound *found);
uint64_t sim_seeks_run(sim *s, sim_proc *proc); /* ends those that are over; when to be called again */
void sim_seek_begin(sim *s, sim_gateway *g, sim_request *request);
bool sim_seek_cancel(sim_gateway *g, const sim_request *request); /* false: there is none */
void sim_seeks_fini(sim *s, sim_gateway *g);
