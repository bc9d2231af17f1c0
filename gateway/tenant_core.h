/* Whose request may go to a router next, as a pure machine: tenants with limits, and for each of their
 * requests a turn. Turns wait in their tenant's queue, first come first served; between tenants the order is
 * deficit round robin by tokens: while several wait, each gets tokens (prompt and output) in the ratio of the
 * weights, whatever the number and size of their requests. What an answer will cost is expected from the
 * tenant's last ones and corrected when it has ended. While nobody else waits and there is room, a turn comes
 * at once.
 *
 * Of several gateways each grants its part of a tenant's limits: the limit by their number, rounded up, so
 * that together they grant it, and less to a tenant that asks only some of them.
 *
 * With several tenants an eighth of the room is kept for those that use less than their share of it, so that
 * a quiet tenant need not wait for the end of one of a flooding tenant's answers.
 *
 * Owns the tenants, which stay until the machine ends: requests and counters refer to them. No I/O, no clock,
 * no randomness. Thread: one at a time.
 *
 *   NONE -> HELD -> WAITING -> RUNNING ;  any -> NONE */
#pragma once
#include <stdbool.h>
#include <stdint.h>
#include <sys/queue.h>

#include "common/base/status.h"

enum { GW_TENANT_NAME_MAX = 64, GW_WEIGHT_MAX = 1000 };

typedef struct gw_tenant gw_tenant;

typedef struct gw_tenant_limits { /* of all gateways together */
    uint32_t weight;              /* 1..GW_WEIGHT_MAX */
    uint32_t running_max;         /* answers at routers at once; 0: as many as there is room for */
    uint32_t queue_max;           /* answers that wait for that */
    uint64_t requests_per_minute; /* up to a minute's worth at once; 0: any number */
    uint64_t tokens_per_minute;   /* likewise, prompt and output; the last request may go beyond it */
} gw_tenant_limits;
void gw_tenant_limits_defaults(gw_tenant_limits *limits);

typedef enum gw_turn_state {
    GW_TURN_NONE,
    GW_TURN_HELD,    /* let in; what it costs is not known yet */
    GW_TURN_WAITING, /* in its tenant's queue */
    GW_TURN_RUNNING,
} gw_turn_state;

/* One answer's turn; embedded in its owner, zeroed before gw_turns_admit. */
typedef struct gw_turn {
    TAILQ_ENTRY(gw_turn) link; /* WAITING */
    gw_turn_state state;
    gw_tenant *tenant;
    uint32_t n_prompt, tokens_max;
    uint64_t reserved;    /* tokens of the minute's; 0: none */
    uint64_t cost;        /* RUNNING: tokens it was charged with */
    uint64_t n_crowded;   /* of the machine, when it was */
    uint64_t deadline_ms; /* WAITING no longer than that */
    bool free;            /* charged by whoever began it: it only takes room */
} gw_turn;
typedef TAILQ_HEAD(gw_turn_list, gw_turn) gw_turn_list;

typedef struct gw_turns {
    TAILQ_HEAD(, gw_tenant) tenants; /* in the order they came */
    uint32_t n_tenant, n_in_force;
    uint32_t n_gateway;         /* that share the limits, this one too */
    uint64_t weights;           /* of those in force */
    uint32_t held_max;          /* turns that are not NONE */
    uint32_t room;              /* RUNNING ones */
    uint32_t ahead;             /* of these, that wait at routers */
    uint32_t n_held, n_running; /* not NONE; RUNNING */
    uint64_t due_ms;            /* no turn waits too long before */
    gw_tenant *at;              /* whose turn came last */
    uint64_t output_mean;       /* tokens of all tenants' answers */
    uint64_t n_crowded;         /* times that a tenant began to wait */
} gw_turns;

void gw_turns_init(gw_turns *turns, uint32_t held_max);
void gw_turns_fini(gw_turns *turns); /* all turns have ended */
/* RUNNING turns at once: routers can run so many less ahead. Fewer than now: nothing starts until enough have
 * ended. */
void gw_turns_set_room(gw_turns *turns, uint32_t room, uint32_t ahead);
/* Gateways between which the limits are shared; 1 in the beginning. */
void gw_turns_set_gateways(gw_turns *turns, uint64_t now_ms, uint32_t n);

/* ---- tenants ---- */
/* name is new. In force. */
gw_tenant *gw_turns_add_tenant(gw_turns *turns, const char *name, const gw_tenant_limits *limits);
/* in_force false: it gets no share any more, but what it has goes on. */
void gw_tenant_change(gw_turns *turns, gw_tenant *tenant, bool in_force, const gw_tenant_limits *limits);
gw_tenant *gw_turns_find_tenant(const gw_turns *turns, const char *name);        /* NULL: there is none */
gw_tenant *gw_turns_next_tenant(const gw_turns *turns, const gw_tenant *tenant); /* NULL begins and ends */

typedef struct gw_tenant_state {
    const char *name;
    uint32_t index; /* as they came: 0, 1, ... */
    bool in_force;
    gw_tenant_limits limits;
    uint32_t n_held, n_waiting, n_running; /* n_held: HELD ones */
    int64_t deficit;                       /* tokens it may still have in this round */
} gw_tenant_state;
void gw_tenant_get(const gw_tenant *tenant, gw_tenant_state *out);
const char *gw_tenant_name(const gw_tenant *tenant);

/* ---- turns ---- */
typedef enum gw_turn_refusal {
    GW_TURN_FULL,          /* of all tenants' turns */
    GW_TURN_QUEUE_FULL,    /* the tenant's queue */
    GW_TURN_MANY_REQUESTS, /* in this minute */
    GW_TURN_MANY_TOKENS,
} gw_turn_refusal;
typedef struct gw_turn_no {
    gw_turn_refusal why;
    uint64_t limit;    /* that was reached, or our part of it */
    uint32_t retry_ms; /* when to try again */
} gw_turn_no;
/* first: of the answers to one request; only that one counts as a request. CM_E_CAPACITY: refused. */
CM_MUST_CHECK cm_status gw_turns_admit(gw_turns *turns, uint64_t now_ms, gw_tenant *tenant, bool first,
                                       gw_turn *turn, gw_turn_no *no_out);
/* HELD to WAITING: it is known what it asks for. deadline_ms: UINT64_MAX = none. */
void gw_turns_wait(gw_turns *turns, uint64_t now_ms, gw_turn *turn, uint32_t n_prompt, uint32_t tokens_max,
                   uint64_t deadline_ms);
/* HELD to RUNNING, past all queues: a router is at it already. */
void gw_turns_go_on(gw_turns *turns, gw_turn *turn);
/* From whatever state. n_output: tokens that it has got. */
void gw_turns_end(gw_turns *turns, uint64_t now_ms, gw_turn *turn, uint32_t n_output);

/* The next turn that is now RUNNING (CM_OK), or whose deadline has passed and that the caller must end
 * (CM_E_DEADLINE). NULL: nothing more. Ask after any of the calls above, and when gw_turns_due says so. */
gw_turn *gw_turns_next(gw_turns *turns, uint64_t now_ms, cm_status *status_out);
/* After gw_turns_next gave NULL: when time alone makes something to do; UINT64_MAX: never. */
uint64_t gw_turns_due(const gw_turns *turns);
