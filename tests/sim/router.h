/* The inside of the simulated router: the real scheduler, exchange and keep machines.
 *
 *   router.c     the process: session, steps through the layers, links to workers
 *   gateways.c   links to gateways and what is kept for them, as router/gateways.c calls keep_core
 *
 * Thread: one. */
#pragma once
#include "proto/engine.pb-c.h"
#include "router/engine/exchange_core.h"
#include "router/keep_core.h"
#include "tests/sim/sim.h"

enum { SIM_ROUTER_GATEWAYS = 8 };

/* One step under way: rows of all segments, layer by layer. */
typedef struct sim_pass {
    bool busy;
    rt_step step;
    uint32_t layer;
    bool exchanging;
    uint32_t n_flying; /* flights of the layer that are not done */
    uint64_t compute_until_us;
    uint64_t *hidden; /* [row_max] */
    uint8_t *codes, *scales;
    int32_t *experts;
    float *weights;
    uint16_t *results;
    rt_step_result *tokens; /* [slot_max] */
} sim_pass;

/* An answer to SeqFind. */
typedef struct sim_gw_found {
    TAILQ_ENTRY(sim_gw_found) link;
    cm_bytes packed;
} sim_gw_found;

typedef struct sim_gw_link {
    sim_end *end; /* NULL: free */
    rt_keep_owner owner;
    TAILQ_HEAD(, sim_gw_found) found; /* not sent yet */
} sim_gw_link;

typedef struct sim_router {
    sim_member member;
    sim *world; /* for words that come from inside of the scheduler */
    const sim_proc *proc;
    rt_sched *sched;
    rt_keep *keep;
    rt_xcore *exchange;
    uint8_t *staging;
    uint64_t
        *states; /* [state_max] the last layer's value at the position before; what else a slot would be */
    uint64_t *written;  /* [state_max] n_forgets when the state was written */
    uint64_t n_forgets; /* times that what ended sequences left was to be forgotten */
    uint64_t *kv;       /* [page_max][page_tokens][n_layer] */
    sim_pass pass;
    bool resting; /* workers were told that nothing comes */
    sim_gw_link gateways[SIM_ROUTER_GATEWAYS];
    sim_watched watched[SIM_REQUESTS_MAX];
    cm_arena arena;
    cm_bytes packed;
    bool leaving;                                    /* asked to go */
    uint64_t leave_until_us;                         /* then it goes with what it has */
    bool draining;                                   /* no new sequences: ends with the last one */
    uint32_t load[SIM_LAYERS_MAX * SIM_EXPERTS_MAX]; /* rows per expert, not told yet */
    uint64_t load_at_us;
    sim_followed followed;
    sim_asked asked[SIM_ASKED_MAX]; /* by exchange */
} sim_router;

/* gateways.c */
void sim_gateways_word(void *router, const rt_word *word); /* rt_word_fn */
void sim_gateways_flush(sim *s, sim_router *r);            /* as much as the links take */
bool sim_gateways_all_told(const sim_router *r);
sim_gw_link *sim_gateways_find(sim_router *r, const sim_end *end); /* end NULL: a free one */
void sim_gateways_lose(sim_router *r, uint64_t now_ms, sim_gw_link *link);
void sim_gateways_heard(sim *s, sim_router *r, sim_gw_link *link, const sim_message *m);
