/* The loop of a process: one libevent base on one thread that owns all mutable state; other threads post to
 * it. After each turn of events the before-sleep hooks run once, so that ten events cause one recomputation.
 * Thread: the loop's, but for pc_loop_post and pc_loop_stop (any). */
#pragma once
#include <event2/event.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"

typedef struct pc_loop pc_loop;
typedef void (*pc_fn)(void *arg);

CM_MUST_CHECK cm_status pc_loop_create(pc_loop **loop_out);
void pc_loop_destroy(pc_loop *loop); /* runs what is still posted */
/* Runs until pc_loop_stop; a stop that came before ends it at once. May be run again. */
void pc_loop_run(pc_loop *loop);
void pc_loop_stop(pc_loop *loop);
struct event_base *pc_loop_base(pc_loop *loop);

/* Work handed to the loop thread. The task is embedded in its owner and must live until fn runs; nothing is
 * allocated. A task that is already posted is not posted twice. */
typedef struct pc_task {
    pc_fn fn;
    void *arg;
    struct pc_task *next;
    bool posted; /* protected by the loop's lock */
} pc_task;
void pc_loop_post(pc_loop *loop, pc_task *task);
/* Takes a task back that has not run yet, for owners that go away; nobody may post it any more. Thread: the
 * loop's. */
void pc_loop_unpost(pc_loop *loop, pc_task *task);
/* For one-off results of job threads: allocates. */
void pc_loop_post_new(pc_loop *loop, pc_fn fn, void *arg);

/* Called after the events of a turn, before the loop may sleep; at most 8 hooks. */
void pc_loop_before_sleep(pc_loop *loop, pc_fn fn, void *arg);
/* SIGTERM, SIGINT, SIGCHLD, ... as events. */
void pc_loop_on_signal(pc_loop *loop, int signal_number, pc_fn fn, void *arg);

typedef struct pc_timer pc_timer;
pc_timer *pc_timer_create(pc_loop *loop, pc_fn fn, void *arg);
void pc_timer_destroy(pc_timer *timer);                /* NULL is fine */
void pc_timer_set(pc_timer *timer, uint64_t after_ms); /* replaces an earlier setting */
void pc_timer_clear(pc_timer *timer);

/* ---- a net object on the loop ----
 * Polls it when its fd or its timer says so and hands out every event; fn must release messages (now or
 * later). */
#include "common/net/net.h"
typedef struct pc_netpump pc_netpump;
typedef void (*pc_net_fn)(void *ctx, const net_event *event);
pc_netpump *pc_netpump_create(pc_loop *loop, net *n, pc_net_fn fn, void *ctx);
void pc_netpump_destroy(pc_netpump *pump);
/* After sends outside of an event of this pump: progress soon. */
void pc_netpump_kick(pc_netpump *pump);
