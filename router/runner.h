/* The compute thread of a router: one step at a time from the loop, its result back as a loop event; between
 * steps it keeps the links to workers alive. Thread: create, destroy and start from the loop. */
#pragma once
#include "common/proc/loop.h"
#include "router/engine/exchange.h"
#include "router/sched/sched_core.h"

typedef struct rt_runner rt_runner;
/* What computes a step, as rt_engine_step (compute thread). */
typedef cm_status (*rt_runner_step_fn)(void *ctx, const rt_step *step, rt_step_result *results_out);
/* The step given to rt_runner_start is done (loop thread). results: as rt_engine_step; valid until the next
 * start. */
typedef void (*rt_runner_done_fn)(void *ctx, cm_status status, uint64_t took_ns,
                                  const rt_step_result *results);

typedef struct rt_runner_options {
    pc_loop *loop;
    rt_exchange *exchange; /* kept: between steps its links live on this thread */
    uint32_t sample_max;   /* results of one step */
    rt_runner_step_fn step;
    rt_runner_done_fn done;
    void *ctx; /* of both */
} rt_runner_options;

rt_runner *rt_runner_create(const rt_runner_options *options);
/* Ends the step under way (CM_E_CANCELLED), joins the thread. done is not called any more. */
void rt_runner_destroy(rt_runner *runner);
/* step is borrowed until done. One at a time. */
void rt_runner_start(rt_runner *runner, const rt_step *step);
/* No step will come for a while: workers need not wait for us. */
void rt_runner_rest(rt_runner *runner);
