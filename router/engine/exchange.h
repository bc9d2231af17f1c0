/* Rows to experts and back: one MoE layer of one micro-batch of a step. Plans slots by the placement in
 * force, sends one copy of a row per rank, collects one result row per slot, and goes on over losses: what a
 * dead, silent or stale worker did not answer is planned again on the placement of a newer epoch (or on
 * another owner at once). An expert is never skipped.
 *
 *   rt_exchange_begin -> { compute something else ; rt_exchange_poll }* -> rt_exchange_finish
 *
 * Two flights may be under way at once, one for each micro-batch: while one's rows fly, the other's are
 * computed. Whatever is called, both go on. Thread: the compute thread's but for the calls marked "any". */
#pragma once
#include "common/net/net.h"
#include "common/proc/member.h"
#include "router/engine/exchange_core.h"

typedef struct rt_exchange rt_exchange;

typedef struct rt_exchange_options {
    net *rows; /* owned by the exchange from now on */
    rt_plan_limits limits;
    uint32_t n_layer, n_expert;
    uint32_t answer_ms; /* a worker that has not answered a frame by then is dropped */
    uint32_t wait_ms;   /* how long a layer waits for an epoch in which every expert has an owner */
    /* A worker's link was lost, or is up again (CM_OK): tell the coordinator. Compute thread. May be NULL. */
    void (*peer_lost)(void *ctx, uint32_t member_id, cm_status status);
    void *ctx;
} rt_exchange_options;

CM_MUST_CHECK cm_status rt_exchange_create(const rt_exchange_options *options, rt_exchange **exchange_out,
                                           cm_error *err);
void rt_exchange_destroy(rt_exchange *exchange);

/* Any thread: the epoch to switch to at the next chance. Held by the exchange. self: our member id. */
void rt_exchange_offer_epoch(rt_exchange *exchange, pc_epoch *epoch, uint32_t self);
/* Any thread, for keyed rows: see net_key_add and net_key_retire. */
void rt_exchange_frame_key(rt_exchange *exchange, uint64_t cluster, uint64_t epoch, const uint8_t *key);
void rt_exchange_retire_keys(rt_exchange *exchange, uint64_t oldest);
/* Any thread: ends a sleep of rt_exchange_idle. */
void rt_exchange_wake(rt_exchange *exchange);

/* Sends what can be sent at once. flight: below RT_FLIGHTS and at rest. What layer names is borrowed until
 * rt_exchange_finish or rt_exchange_drop. */
void rt_exchange_begin(rt_exchange *exchange, uint32_t flight, const rt_xcore_layer *layer);
/* Between long operations: heartbeats go out, answers come in, what can be sent is sent, although nobody
 * waits. */
void rt_exchange_poll(rt_exchange *exchange);
/* Waits for the flight's rows. CM_E_NO_OWNER: wait_ms passed without an epoch in which every expert has a
 * live owner. CM_E_CANCELLED: the exchange was told to stop. */
CM_MUST_CHECK cm_status rt_exchange_finish(rt_exchange *exchange, uint32_t flight);
/* The step has failed: its flights end at once, whatever is still on its way. */
void rt_exchange_drop(rt_exchange *exchange);
/* Nanoseconds that rt_exchange_finish has waited, ever. */
uint64_t rt_exchange_waited_ns(const rt_exchange *exchange);

/* After CM_E_NO_OWNER: which expert, and what is with the workers that have it. Compute thread, or whoever
 * hears from it before the next step. */
const char *rt_exchange_why(const rt_exchange *exchange);

/* Tells all workers that nothing will come for a while, so that they do not wait for us. */
void rt_exchange_announce_idle(rt_exchange *exchange, uint64_t step);
/* Between steps: keeps links alive and follows epochs; sleeps until something happens, rt_exchange_wake, or
 * sleep_ms. */
void rt_exchange_idle(rt_exchange *exchange, uint32_t sleep_ms);
/* Any thread: rows asked of (layer, expert) since the start, modulo 2^32. */
uint32_t rt_exchange_picks(const rt_exchange *exchange, uint32_t layer, uint32_t expert);
/* Any thread: rt_exchange_finish ends soon with CM_E_CANCELLED; for shutdown. */
void rt_exchange_stop(rt_exchange *exchange);
bool rt_exchange_ready(const rt_exchange *exchange); /* a placement is in force and its workers are linked */
