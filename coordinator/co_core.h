/* The coordinator's decisions as a pure machine: (state, now, inbox) -> outbox. Who is a member, what the
 * next epoch is and how it comes into force. No I/O, no clock, no randomness: its owner decodes words, writes
 * the log, sends and closes as the outbox says. Equal inputs give equal outputs, bit by bit.
 *
 *   rest -> numbering -> preparing -> storing -> committing -> publishing -> rest
 *           the number   workers      the log    workers       routers and
 *           is reserved  load         has it     switch        gateways switch, then workers may retire the
 * old one
 *
 * Until "storing" a death, a leave or a failed load aborts the change and nothing has happened but a number
 * is spent. From "storing" on it is finished with those that live, and the next change follows.
 *
 * Used by coordinator.c and by the simulator. Thread: one at a time. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/log.h"
#include "common/base/stats.h"
#include "coordinator/drains.h"
#include "coordinator/epoch.h"

typedef struct co_core co_core;

typedef struct co_core_options {
    uint32_t workers_min;    /* workers the first placement waits for */
    uint32_t members_max;    /* of all roles; at most PR_RANK_MAX */
    uint64_t lease_ms;       /* a member silent for longer is dead */
    uint64_t grace_ms;       /* time to reconnect after a lost session */
    uint64_t cut_ms;         /* a router and a worker may be unable to reach one another; 0 = for ever */
    uint64_t recall_ms;      /* after a start, on top of the lease: for the members of the log to find us */
    uint64_t rebalance_ms;   /* between rounds of rebalancing by load; 0 = only when asked */
    uint32_t moves_max;      /* experts that one of them makes workers load; at least 1 */
    const char *fingerprint; /* of the checkpoint; "" = the first worker's or router's. Copied */
} co_core_options;

/* What the log knew when the coordinator started. */
typedef struct co_core_past {
    uint64_t cluster;        /* not 0 */
    uint32_t next_member_id; /* at least 1 */
    uint64_t next_number;    /* at least 1 */
    co_drains drains;        /* members whose drain has not come to its end */
    co_epoch *epoch;         /* last one written; NULL: none. Held */
} co_core_past;

typedef enum co_in_kind {
    CO_IN_WORD,      /* session, word */
    CO_IN_CLOSED,    /* session: it is over, no word of it follows */
    CO_IN_STORED,    /* ticket, status, text: how a CO_OUT_STORE went */
    CO_IN_DRAIN,     /* ticket, member_id: an operator wants it to leave */
    CO_IN_REBALANCE, /* ticket, n_moves (0: as the options say): an operator wants experts moved by load */
} co_in_kind;

typedef struct co_in {
    co_in_kind kind;
    uint64_t session; /* the owner's name for one session; not 0, never used twice */
    const Baleen__Control__V1__MemberMessage *word; /* borrowed for the step */
    uint64_t ticket;                                /* of operators' wishes: not 0, theirs alone */
    uint32_t member_id, n_moves;
    cm_status status;
    const char *text;
} co_in;

typedef enum co_out_kind {
    CO_OUT_WELCOME, /* session, member_id */
    CO_OUT_REFUSED, /* session, status, text, final: send it, then end the session */
    CO_OUT_PREPARE, /* session, epoch */
    CO_OUT_ABORT,   /* session, number */
    CO_OUT_COMMIT,  /* session, epoch */
    CO_OUT_RETIRE,  /* session, number */
    CO_OUT_DRAIN,   /* session */
    CO_OUT_CLOSE,   /* session, status (CM_OK: a good end), text */
    CO_OUT_STORE,   /* ticket, member_id and number (the next free ones), drains, epoch (may be NULL): make it
                       durable,   in order, and answer with CO_IN_STORED */
    CO_OUT_ANSWER,  /* ticket, status, text: what became of an operator's wish */
    CO_OUT_NOTE,    /* level, text: for the log */
} co_out_kind;

typedef struct co_out {
    co_out_kind kind;
    uint64_t session, number, ticket;
    uint32_t member_id;
    co_epoch *epoch;         /* borrowed until the next step; hold it to keep it */
    const co_drains *drains; /* likewise */
    cm_status status;
    bool final;
    cm_log_level level;
    char text[416];
} co_out;

co_core *co_core_create(const co_core_options *options, const co_core_past *past, uint64_t now_ms);
void co_core_destroy(co_core *core);

/* Takes the inbox, lets time pass, decides. The outbox is valid until the next step. To be called at least
 * every lease_ms / 2, with n_in 0 when nothing came: a longer gap means that this process slept, and the
 * members are not blamed for silence it could not hear. */
void co_core_step(co_core *core, uint64_t now_ms, const co_in *in, uint32_t n_in);
const co_out *co_core_outbox(const co_core *core, uint32_t *n_out);
/* When time alone will change something; UINT64_MAX = never. */
uint64_t co_core_wake_ms(const co_core *core);

/* ---- what can be seen from outside ---- */

typedef enum co_member_state {
    CO_MEMBER_JOINING,   /* known, in no epoch yet */
    CO_MEMBER_PREPARING, /* loads for the epoch being prepared */
    CO_MEMBER_READY,     /* in the epoch in force */
    CO_MEMBER_SUSPECT,   /* session lost or reported by a peer */
    CO_MEMBER_CUT_OFF,   /* a worker left out because routers cannot reach it */
    CO_MEMBER_LEAVING,   /* wants or is asked to go: others take over, or it finishes what runs */
} co_member_state;
const char *co_member_state_name(co_member_state state);

typedef struct co_member_view {
    const co_peer *self;
    co_member_state state;
    uint64_t session;  /* 0: none now */
    uint64_t epoch;    /* in force there, 0 = none */
    uint64_t heard_ms; /* on the clock of the steps */
    const cm_stat_value *stats;
    uint32_t n_stats;
} co_member_view;

uint32_t co_core_n_members(const co_core *core);
/* In ascending order of id. */
void co_core_member(const co_core *core, uint32_t i, co_member_view *view_out);
const co_epoch *co_core_epoch(const co_core *core); /* in force; NULL before the first */
uint64_t co_core_cluster(const co_core *core);
const char *co_core_fingerprint(const co_core *core); /* "" while unknown */
/* [n_layer * n_expert] recent rows, as the placement in force counts pairs; NULL while nothing was heard. */
const uint64_t *co_core_load(const co_core *core);
uint64_t co_core_expert_bytes(const co_core *core); /* of all experts together; 0 while unknown */
uint64_t co_core_n_lost(const co_core *core);       /* members that died, ever */
/* What is being changed or why it cannot be, in words; false at rest. */
bool co_core_change(const co_core *core, char text_out[256]);
