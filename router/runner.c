#include "router/runner.h"

#include <pthread.h>
#include <stdbool.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/failpoint.h"
#include "common/base/mem.h"
#include "common/base/stats.h"

enum { RUNNER_SLOW_MS = 20 }; /* of failpoint router_step_slow */

struct rt_runner {
    rt_runner_options options;
    pthread_t thread;
    pc_task finished;
    rt_step_result *results;
    bool running; /* loop thread: a step is out */

    pthread_mutex_t lock; /* protects the rest */
    const rt_step *step;  /* to do; NULL: none */
    cm_status status;     /* of the last step */
    uint64_t took_ns;     /* likewise */
    bool rest, stopping;
};

static void runner_finished(void *arg)
{
    rt_runner *runner = arg;
    pthread_mutex_lock(&runner->lock);
    cm_status status = runner->status;
    uint64_t took_ns = runner->took_ns;
    bool stopping = runner->stopping;
    pthread_mutex_unlock(&runner->lock);
    runner->running = false;
    if (!stopping) {
        runner->options.done(runner->options.ctx, status, took_ns, runner->results);
    }
}

static void runner_compute(rt_runner *runner, const rt_step *step)
{
    uint64_t start_ns = cm_now_ns();
    if (cm_failpoint_fires(CM_FAILPOINT_router_step_slow)) {
        uint64_t until_ms = cm_now_ms() + RUNNER_SLOW_MS;
        while (cm_now_ms() < until_ms) {
            rt_exchange_idle(runner->options.exchange, RUNNER_SLOW_MS);
        }
    }
    cm_status status = runner->options.step(runner->options.ctx, step, runner->results);
    cm_stat_add(CM_STAT_steps, 1);
    cm_stat_add(CM_STAT_step_rows, step->n_row);
    uint64_t took_ns = cm_now_ns() - start_ns;
    cm_stat_observe(CM_STAT_step_seconds, (double)took_ns * 1e-9);
    pthread_mutex_lock(&runner->lock);
    runner->status = status;
    runner->took_ns = took_ns;
    pthread_mutex_unlock(&runner->lock);
    pc_loop_post(runner->options.loop, &runner->finished);
}

static void *runner_thread(void *arg)
{
    rt_runner *runner = arg;
    rt_exchange *exchange = runner->options.exchange;
    uint64_t last_step = 0;
    for (;;) {
        pthread_mutex_lock(&runner->lock);
        const rt_step *step = runner->step;
        bool rest = runner->rest, stopping = runner->stopping;
        runner->step = NULL;
        runner->rest = false;
        pthread_mutex_unlock(&runner->lock);
        if (stopping) {
            return NULL;
        }
        if (step != NULL) {
            last_step = step->number;
            runner_compute(runner, step);
            continue;
        }
        if (rest) {
            rt_exchange_announce_idle(exchange, last_step);
        }
        rt_exchange_idle(exchange, UINT32_MAX);
    }
}

rt_runner *rt_runner_create(const rt_runner_options *options)
{
    rt_runner *runner = cm_alloc(sizeof(*runner));
    runner->options = *options;
    runner->finished = (pc_task){.fn = runner_finished, .arg = runner};
    runner->results = cm_alloc(sizeof(rt_step_result) * options->sample_max);
    pthread_mutex_init(&runner->lock, NULL);
    int rc = pthread_create(&runner->thread, NULL, runner_thread, runner);
    CM_ASSERT_MSG(rc == 0, "compute thread: error %d", rc);
    return runner;
}

void rt_runner_destroy(rt_runner *runner)
{
    pthread_mutex_lock(&runner->lock);
    runner->stopping = true;
    pthread_mutex_unlock(&runner->lock);
    rt_exchange_stop(runner->options.exchange);
    pthread_join(runner->thread, NULL);
    pc_loop_unpost(runner->options.loop, &runner->finished);
    pthread_mutex_destroy(&runner->lock);
    cm_free(runner->results);
    cm_free(runner);
}

void rt_runner_start(rt_runner *runner, const rt_step *step)
{
    CM_ASSERT(!runner->running);
    runner->running = true;
    pthread_mutex_lock(&runner->lock);
    runner->step = step;
    pthread_mutex_unlock(&runner->lock);
    rt_exchange_wake(runner->options.exchange);
}

void rt_runner_rest(rt_runner *runner)
{
    pthread_mutex_lock(&runner->lock);
    runner->rest = true;
    pthread_mutex_unlock(&runner->lock);
    rt_exchange_wake(runner->options.exchange);
}
