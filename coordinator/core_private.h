/* State of the coordinator's machine, shared by co_core.c (time, sessions, outbox), join_core.c (who may be a
 * member), leave_core.c (who goes), cut_core.c (who cannot be reached) and change_core.c (epochs). */
#pragma once
#include "coordinator/balance_core.h"
#include "coordinator/co_core.h"

/* A member that lives but has not switched to a committed epoch after so many leases is given up. */
enum { CO_COMMIT_LEASES = 10 };
/* Load fades: what was asked for a few minutes ago says little. */
enum { CO_LOAD_HALF_MS = 60000 };
/* Workers that failed to prepare and are kept out for a lease, so that they cannot spoil change after change.
 */
enum { CO_FAILED_MAX = 16 };

typedef enum co_phase {
    CO_PHASE_REST,
    CO_PHASE_NUMBERING,
    CO_PHASE_PREPARING,
    CO_PHASE_STORING,
    CO_PHASE_COMMITTING, /* epoch in force = the new one from here on */
    CO_PHASE_PUBLISHING,
} co_phase;

typedef struct co_member {
    co_peer self; /* strings owned */
    char *fingerprint;
    uint64_t session; /* 0: lost, or not yet back after a restart */
    uint64_t ticket;  /* the log must hold its id before it is welcome; 0 = welcomed */
    uint64_t heard_ms;
    uint64_t dead_ms; /* with session 0: when it counts as dead */
    uint64_t suspect_until_ms;
    uint64_t epoch;                                  /* in force there */
    uint64_t prepared;                               /* last number it answered Prepared for */
    uint64_t told_prepare, told_commit, told_retire; /* numbers sent in this session */
    bool recalled;                                   /* from the log, not back yet */
    bool leaving;                                    /* by its own wish or an operator's */
    bool drained;                                    /* leaving by an operator's wish: its id is in drains */
    bool told_drain;                                 /* in this session */
    bool blind;     /* a router that misses more than half of the workers; as of the step */
    bool cut_off;   /* a worker left out because routers cannot reach it */
    bool cut_noted; /* that it should be and cannot */
    uint64_t cut_until_ms, cut_hold_ms; /* when it is tried again; how long that was; 0 = never left out */
    bool cut_drained;                   /* a worker for whose sake a router was drained */
    uint64_t cut_drained_ms;            /* when, the last time */
    uint64_t drain_ticket;              /* of the operator who waits for its end; 0 = none */
    bool removed;                       /* goes at the end of the step; nothing finds it any more */
    uint32_t n_stats;
    cm_stat_value stats[CM_STAT_COUNT];
} co_member;

/* A router has said that it cannot reach a worker. */
typedef struct co_cut {
    uint32_t router, worker; /* member ids */
    uint64_t since_ms;
} co_cut;

struct co_core {
    uint32_t workers_min, members_max;
    uint64_t lease_ms, grace_ms, recall_ms, cut_ms;
    uint64_t now_ms;

    uint64_t cluster;
    uint32_t next_member_id;
    uint64_t next_number, next_ticket;
    co_drains drains; /* goes into the log with every write */

    char *fingerprint;          /* "" while unknown */
    bool knows_model;           /* the first worker or router has come; the next two lines are its */
    uint32_t n_layer, n_expert; /* 0: a model without experts */
    uint64_t expert_bytes;

    co_member *members; /* [members_max], ascending ids */
    uint32_t n_members;
    uint64_t n_lost;
    struct {
        uint64_t incarnation, until_ms;
    } failed[CO_FAILED_MAX]; /* ring; the oldest is forgotten */
    uint32_t n_failed;       /* ever */

    co_cut *cuts; /* [n_cuts] at most one of a router and a worker */
    uint32_t n_cuts, cuts_cap;
    bool blind, blind_noted; /* no router sees the workers; that it was said */
    uint64_t blind_ms;       /* since when */

    co_phase phase;
    co_epoch *epoch;      /* in force; NULL before the first */
    co_epoch *proposal;   /* numbering, preparing, storing */
    uint64_t ticket;      /* numbering, storing: of the write that is waited for */
    uint64_t deadline_ms; /* committing, publishing */
    bool dirty;           /* the wanted members may differ from the epoch's */
    uint64_t retry_ms;    /* no change before it: the log could not be written */
    char blocked[256];    /* why no epoch can be made; "" */

    uint64_t *load;        /* [n_layer * n_expert] rows, halved every CO_LOAD_HALF_MS; NULL until the first */
    uint64_t load_half_ms; /* when they are halved next */
    uint32_t balance_moves;                     /* wanted at the next rest; 0 = nothing */
    uint64_t balance_every_ms, balance_next_ms; /* by itself; every 0 = never */
    uint32_t balance_moves_max;
    uint64_t balance_ticket;          /* of the operator who waits for it; 0 = none */
    bool balancing;                   /* the proposal moves experts and nothing else */
    co_balance_report balance_report; /* of the proposal */

    co_out *outs;
    uint32_t n_outs, outs_cap;
    co_epoch **dropped; /* epochs an entry of the outbox may still point to */
    uint32_t n_dropped, dropped_cap;
};

/* ---- co_core.c ---- */
co_out *co_core_emit(co_core *core, co_out_kind kind, uint64_t session);
void co_core_note(co_core *core, cm_log_level level, const char *fmt, ...) CM_PRINTF(3, 4);
void co_core_refuse(co_core *core, uint64_t session, cm_status status, bool final, const char *text);
uint64_t co_core_store(co_core *core, co_epoch *epoch);  /* the ticket */
void co_core_drop_epoch(co_core *core, co_epoch *epoch); /* releases it when the outbox is gone */
co_member *co_core_find(co_core *core, uint32_t id);     /* NULL when absent */
/* Ends its session (if any) with status and text and forgets it. */
void co_core_remove(co_core *core, co_member *member, cm_status status, const char *text);
static inline bool co_member_is_in(const co_member *member)
{
    return !member->removed && member->ticket == 0;
}
/* Belongs into the next epoch. A worker that leaves or cannot be reached hands its experts over; a router or
 * gateway that leaves needs epochs until it has finished what runs. */
static inline bool co_member_is_wanted(const co_member *member)
{
    return co_member_is_in(member) &&
           !((member->leaving || member->cut_off) && member->self.role == CO_ROLE_WORKER);
}
uint32_t co_core_count(const co_core *core, Baleen__Control__V1__Role role); /* wanted ones */
void co_core_answer(co_core *core, uint64_t ticket, cm_status status, const char *fmt, ...) CM_PRINTF(4, 5);

/* ---- join_core.c ---- */
void co_core_hello(co_core *core, uint64_t session, const Baleen__Control__V1__Hello *hello);
void co_core_join_stored(co_core *core, const co_in *in);
/* A member as the log's last epoch knew it: away, may come back. */
void co_core_recall(co_core *core, const co_peer *peer);
void co_member_fini(co_member *member);

/* ---- leave_core.c ---- */
void co_core_leaving(co_core *core, co_member *member);
void co_core_drain(co_core *core, const co_in *in);
void co_core_drain_member(co_core *core, co_member *member);
void co_core_begin_leaving(co_core *core, co_member *member);
/* Whether the other workers can hold all experts. leaver NULL: those that stay. */
CM_MUST_CHECK cm_status co_core_check_room(const co_core *core, const co_member *leaver, cm_error *err);
/* Those that stay cannot hold all experts: workers that were to go serve on as far as that helps. false: it
 * would not. */
bool co_core_take_back(co_core *core);
/* Nothing in force or on the way needs them any more: workers are let go. */
void co_core_release_leavers(co_core *core);
/* No epoch without them can be made. A worker stays while a router may still ask it. */
void co_core_release_blocked(co_core *core);
/* Routers that no gateway chooses any more, and gateways, may finish. */
void co_core_tell_drains(co_core *core);

/* ---- cut_core.c ---- */
/* status: CM_OK = it has it again. */
void co_core_cut_report(co_core *core, const co_member *router, const co_member *worker, cm_status status);
/* What the member said, and what was said of it. */
void co_core_cuts_forget(co_core *core, uint32_t id);
/* Time passes: a router may have to go, or a worker, or one may come back. */
void co_core_cuts(co_core *core);
void co_core_end_cut(co_core *core, co_member *worker, const char *why);
uint64_t co_core_cuts_wake_ms(const co_core *core);

/* ---- load_core.c ---- */
void co_core_take_load(co_core *core, const co_member *from, const Baleen__Control__V1__ExpertLoad *load);
/* Time passes: the load fades, a round of balancing may be due. */
void co_core_load_time(co_core *core);
void co_core_rebalance(co_core *core, const co_in *in);
/* The next placement if one is wanted and worth it, else NULL and whoever asked is answered. */
pr_placement *co_core_balanced(co_core *core);
/* The change it was wanted for has come to its end. */
void co_core_balance_done(co_core *core, cm_status status, const char *text);
/* Memory of the ranks of a placement in force, in experts; freed by the caller. */
uint64_t *co_core_capacity(const co_core *core, const pr_placement *place);

/* ---- change_core.c ---- */
void co_core_advance(co_core *core);
void co_core_change_stored(co_core *core, const co_in *in);
void co_core_prepared(co_core *core, co_member *member, const Baleen__Control__V1__Prepared *prepared);
