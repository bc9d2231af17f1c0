/* Gateways and routers without processes: the machines that place streams and log their tokens on one side,
 * the scheduler and what is kept for gateways on the other, links that break between them, clients that come,
 * go and come back, all driven by one seed. Every token that reaches a client is compared with the sequence
 * computed alone. Failures are cmocka's. */
#pragma once
#include "gateway/place_core.h"
#include "gateway/stream_core.h"
#include "router/keep_core.h"
#include "tests/unit/sched_engine.h"

enum { W_ROUTERS = 3, W_GATEWAYS = 2, W_CLIENTS = 48, W_STREAMS = 160, W_WORDS_MAX = 64 };

/* One message on a link. */
typedef struct w_message {
    STAILQ_ENTRY(w_message) next;
    enum { W_OPEN, W_RESUME, W_CANCEL, W_FINISH, W_COPY, W_DETACH, W_TOKENS } kind;
    uint64_t stream;
    rt_keep_key key;
    uint64_t term;
    uint64_t from; /* also: offset of ids[0] */
    uint32_t n_prompt, n_id, ids[T_CONTEXT_MAX];
    rt_sampler sampler;
    rt_seq_end end;
    uint32_t stop_id;
    cm_status status;
} w_message;
typedef STAILQ_HEAD(w_messages, w_message) w_messages;

/* A link lives twice: each side notices its end at its own time. */
typedef struct w_link {
    bool gateway_up, router_up;
    bool broken; /* nothing passes any more */
    w_messages to_router, to_gateway;
    rt_keep_owner owner;
} w_link;
enum { W_LINKS = 4 }; /* of one pair at once: old ones whose end was not noticed yet */

typedef struct w_router {
    bool alive;
    uint64_t number; /* of its life */
    t_engine engine;
    rt_keep *keep;
    bool in_flight;
} w_router;

typedef struct w_client w_client;
typedef struct w_stream {
    bool used;
    uint32_t gateway;
    w_client *client; /* NULL: it has gone elsewhere */
    gw_spot spot;
    gw_core core;
    rt_keep_key key;
    rt_sampler sampler;
    uint32_t enough; /* its client's; it may have gone elsewhere */
    uint64_t term;
    w_link *link; /* where it was asked for; NULL: nowhere */
    uint64_t number;
} w_stream;

typedef struct w_gateway {
    gw_place place;
    uint64_t known[W_ROUTERS]; /* numbers that its place has heard of; 0: none */
    uint64_t last_number;
} w_gateway;

struct w_client {
    enum { W_IDLE, W_WAITS, W_AWAY } state;
    uint32_t n_prompt, prompt[T_CONTEXT_MAX];
    rt_sampler sampler;
    t_answer answer;
    uint32_t enough; /* so many tokens are: the rest is not asked for; 0: all of them */
    uint32_t n_told;
    uint64_t id;
    w_stream *stream;
};

typedef struct w_world {
    t_rng rng;
    uint64_t now_ms;
    rt_sched_limits limits;
    uint32_t right_percent; /* of the routers' guesses: one step gives a sequence several tokens */
    rt_keep_limits keep_limits;
    w_router routers[W_ROUTERS];
    w_gateway gateways[W_GATEWAYS];
    bool apart[W_GATEWAYS][W_ROUTERS];
    w_link links[W_GATEWAYS][W_ROUTERS][W_LINKS];
    w_client clients[W_CLIENTS];
    w_stream streams[W_STREAMS];
    uint64_t n_ids, n_lives, n_terms;
    /* what there was */
    uint64_t n_finished, n_refused, n_reopened, n_resumed, n_copies, n_taken_over, n_found, n_not_found;
    uint64_t n_cancels, n_cancels_in[GW_SPOT_FAILED + 1], n_cancels_away;
} w_world;

void w_init(w_world *world, uint64_t seed);
void w_fini(w_world *world); /* everything is at rest */

/* One turn of everything: messages pass, steps are computed, streams are placed, links tried again. */
void w_turn(w_world *world);

/* What clients do. */
void w_client_comes(w_world *world);
void w_client_cancels(w_world *world);
void w_client_leaves(w_world *world);  /* and may come back */
void w_client_returns(w_world *world); /* to any gateway, also while the one it had thinks it is there */

/* What happens to them. */
void w_cut(w_world *world);
void w_router_dies(w_world *world);
void w_router_starts(w_world *world);
void w_router_leaves(w_world *world); /* the epoch, or is back */
void w_gateway_dies(w_world *world);
void w_heal(w_world *world); /* everybody lives and hears everybody */

bool w_at_rest(const w_world *world); /* no client waits */
/* Time passes until what was kept has been dropped; then every ledger is zero. */
void w_check_zero(w_world *world);
