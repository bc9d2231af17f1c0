/* The decisions of a router's exchange with its workers, as a pure machine: which worker gets which rows of a
 * layer, what is outstanding, which answer counts, when a worker is given up, when a layer is planned again
 * on a newer epoch and when it cannot be computed at all. No I/O, no clock: its owner connects, sends and
 * tells what happened. Used by exchange.c over net and by the simulator.
 *
 *   rt_xcore_begin -> { rt_xcore_chore* ; rt_xcore_next -> SEND, WAIT ... } -> DONE
 *
 * Two flights, one for each micro-batch of a step, may be under way at once, each with a layer and rows of
 * its own; links and the epoch are common. An epoch comes into force when no flight is inside a round: while
 * one waits, no flight begins a round.
 *
 * A link is the owner's: the machine knows it by its handle and never looks into it. Memory: everything is
 * taken at create and when an epoch is offered; a layer allocates nothing. Thread: one at a time. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/proc/member.h"
#include "proto/frames.h"
#include "router/plan/plan.h"

typedef struct rt_xcore rt_xcore;

enum { RT_FLIGHTS = PR_FLIGHTS_MAX };

typedef struct rt_xcore_options {
    rt_plan_limits limits;
    uint32_t answer_ms; /* a worker that has not answered a frame by then is dropped */
    uint32_t wait_ms;   /* how long a layer waits for an epoch in which every expert has an owner */
} rt_xcore_options;

/* Arrays are borrowed until RT_XACT_DONE. */
typedef struct rt_xcore_layer {
    uint64_t step;
    uint32_t layer, n_row;
    const int32_t *experts; /* [n_row][topk] */
    const float *weights;   /* [n_row][topk] */
    const uint8_t *codes;   /* [n_row][d] the quantized rows */
    const uint8_t *scales;  /* [n_row][ceil(d/128)] */
    uint16_t *results;      /* BF16 [n_row][topk][d]; every slot is written */
} rt_xcore_layer;

typedef enum rt_xact_kind {
    /* of rt_xcore_chore */
    RT_XACT_ADOPTED, /* another epoch, or another member id of ours, is in force for links made from now on */
    RT_XACT_DISCONNECT, /* handle: end that link; it is forgotten here */
    RT_XACT_REPORT,  /* rank, status: its link was lost (again: and still is), or CM_OK: it is up once more */
    RT_XACT_CONNECT, /* rank: begin; answer with rt_xcore_connecting */
    /* of rt_xcore_next */
    RT_XACT_SEND, /* flight, part, staged_at, again: a frame; answer with rt_xcore_sent */
    RT_XACT_WAIT, /* until_ms: nothing to do for any flight before something comes in; now: a chore is due */
    RT_XACT_DONE, /* flight, status, and with CM_E_NO_OWNER expert, one that has no row; the layer is over */
} rt_xact_kind;

typedef struct rt_xact {
    rt_xact_kind kind;
    uint32_t flight, rank, part, expert;
    uint64_t staged_at; /* offset of the frame in memory of rt_xcore_staging_bytes */
    bool again;         /* the same frame as before, for which there was no room; the same loss as before */
    void *handle;
    uint64_t until_ms;
    cm_status status;
} rt_xact;

rt_xcore *rt_xcore_create(const rt_xcore_options *options);
void rt_xcore_destroy(rt_xcore *core);
uint64_t rt_xcore_staging_bytes(
    const rt_xcore *core); /* most bytes the frames of a round of each flight take together */

/* ---- epochs and links ---- */

/* The epoch to switch to between two rounds of both flights; held. self: our member id. */
void rt_xcore_offer(rt_xcore *core, pc_epoch *epoch, uint32_t self);
/* What is to be done about links; false: nothing. To be asked before rt_xcore_next, until it says so. */
bool rt_xcore_chore(rt_xcore *core, uint64_t now_ms, rt_xact *act_out);
/* handle NULL: it could not begin, is tried again later. */
void rt_xcore_connecting(rt_xcore *core, uint64_t now_ms, uint32_t rank, void *handle);
void rt_xcore_up(rt_xcore *core, const void *handle);
/* The link has ended by itself. Unknown handles are fine. */
void rt_xcore_down(rt_xcore *core, uint64_t now_ms, const void *handle, cm_status status);

typedef struct rt_xlink {
    uint32_t member_id;
    const char *address; /* "" when the epoch has none; the epoch's */
    void *handle;        /* NULL: not connected */
    bool up;
} rt_xlink;
uint32_t rt_xcore_n_link(const rt_xcore *core); /* ranks of the epoch in force */
rt_xlink rt_xcore_link(const rt_xcore *core, uint32_t rank);
bool rt_xcore_ready(const rt_xcore *core);            /* a placement is in force and its workers are linked */
const pc_epoch *rt_xcore_epoch(const rt_xcore *core); /* in force; NULL before the first */
uint32_t rt_xcore_self(const rt_xcore *core);
/* When a chore will be due although nothing comes in; UINT64_MAX = never. */
uint64_t rt_xcore_chore_ms(const rt_xcore *core);

/* ---- a layer ---- */

void rt_xcore_begin(rt_xcore *core, uint32_t flight, const rt_xcore_layer *layer);
rt_xact rt_xcore_next(rt_xcore *core, uint64_t now_ms);
/* The layer is no longer wanted: what it borrowed is free on return, answers to it count no more, no DONE
 * follows. A flight at rest stays so. */
void rt_xcore_drop(rt_xcore *core, uint32_t flight);
/* Waiting ends with CM_E_CANCELLED from now on. */
void rt_xcore_stop(rt_xcore *core);
/* How the RT_XACT_SEND went. CM_OK: rt_xcore_left follows when its memory is free again; CM_AGAIN: no room.
 */
void rt_xcore_sent(rt_xcore *core, cm_status status);
void rt_xcore_left(rt_xcore *core, uint32_t flight);
/* Header and payload of a part's frame; payload has rt_xcore_payload_bytes. */
uint64_t rt_xcore_payload_bytes(const rt_xcore *core, uint32_t flight, uint32_t part);
void rt_xcore_pack(const rt_xcore *core, uint32_t flight, uint32_t part, pr_dispatch *header_out,
                   uint8_t *payload);
/* A combine frame, as it came: its rows go to where they belong. CM_E_PROTOCOL: it is none, or it answers
 * nothing that is open (err says which); nothing has changed. */
CM_MUST_CHECK cm_status rt_xcore_combine(rt_xcore *core, const void *handle, const void *header,
                                         uint32_t header_bytes, const void *payload, uint64_t payload_bytes,
                                         cm_error *err);
CM_MUST_CHECK cm_status rt_xcore_refuse(rt_xcore *core, const void *handle, const void *header,
                                        uint32_t header_bytes, cm_error *err);
uint64_t rt_xcore_n_retries(const rt_xcore *core); /* times a layer got stuck, ever */
uint32_t rt_xcore_n_open(const rt_xcore *core);    /* frames unanswered or still leaving: zero at rest */
