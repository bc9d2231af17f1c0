#include "kernels/cpu/team.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

enum {
    SPIN_MAX = 2000, /* polls before sleeping: some tens of microseconds, the gap between two operations */
    WORTH_WAKING = 1 << 16,
};

typedef struct worker {
    kn_team *team;
    pthread_t thread;
    uint32_t i_thread;
} worker;

struct kn_team {
    uint32_t n_threads;
    worker *workers; /* [n_threads - 1] */

    /* The job: written by the owner before `generation` goes up, read by workers after they saw it go up. */
    kn_team_fn fn;
    void *arg;
    uint32_t n;
    bool stop;

    atomic_uint generation; /* goes up by one for each job, under the lock */
    atomic_uint n_busy;     /* workers that have not finished the job */

    pthread_mutex_t lock; /* for the two conditions; guards n_sleeping and owner_sleeps */
    pthread_cond_t started, finished;
    uint32_t n_sleeping;
    bool owner_sleeps;
};

static void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void do_part(kn_team *team, uint32_t i_thread)
{
    uint32_t begin = (uint32_t)((uint64_t)team->n * i_thread / team->n_threads);
    uint32_t end = (uint32_t)((uint64_t)team->n * (i_thread + 1) / team->n_threads);
    if (begin < end) {
        team->fn(team->arg, begin, end, i_thread);
    }
}

/* Waits for a job after number `seen`; returns its number. */
static unsigned await_job(kn_team *team, unsigned seen)
{
    unsigned now;
    for (int i = 0; i < SPIN_MAX; i++) {
        now = atomic_load_explicit(&team->generation, memory_order_acquire);
        if (now != seen) {
            return now;
        }
        pause_briefly();
    }
    pthread_mutex_lock(&team->lock);
    team->n_sleeping++;
    while ((now = atomic_load_explicit(&team->generation, memory_order_acquire)) == seen) {
        pthread_cond_wait(&team->started, &team->lock);
    }
    team->n_sleeping--;
    pthread_mutex_unlock(&team->lock);
    return now;
}

static void *worker_main(void *arg)
{
    worker *w = arg;
    kn_team *team = w->team;
    unsigned seen = 0;
    for (;;) {
        seen = await_job(team, seen);
        if (team->stop) {
            return NULL;
        }
        do_part(team, w->i_thread);
        if (atomic_fetch_sub_explicit(&team->n_busy, 1, memory_order_acq_rel) == 1) {
            pthread_mutex_lock(&team->lock);
            if (team->owner_sleeps) {
                pthread_cond_signal(&team->finished);
            }
            pthread_mutex_unlock(&team->lock);
        }
    }
}

static void start_job(kn_team *team)
{
    pthread_mutex_lock(&team->lock);
    atomic_fetch_add_explicit(&team->generation, 1, memory_order_release);
    if (team->n_sleeping > 0) {
        pthread_cond_broadcast(&team->started);
    }
    pthread_mutex_unlock(&team->lock);
}

static void await_workers(kn_team *team)
{
    for (int i = 0; i < SPIN_MAX; i++) {
        if (atomic_load_explicit(&team->n_busy, memory_order_acquire) == 0) {
            return;
        }
        pause_briefly();
    }
    pthread_mutex_lock(&team->lock);
    team->owner_sleeps = true;
    while (atomic_load_explicit(&team->n_busy, memory_order_acquire) != 0) {
        pthread_cond_wait(&team->finished, &team->lock);
    }
    team->owner_sleeps = false;
    pthread_mutex_unlock(&team->lock);
}

kn_team *kn_team_create(uint32_t n_threads)
{
    kn_team *team = cm_alloc(sizeof(*team));
    CM_ASSERT(n_threads >= 1);
    team->n_threads = n_threads;
    team->workers = cm_alloc((n_threads - 1) * sizeof(*team->workers));
    pthread_mutex_init(&team->lock, NULL);
    pthread_cond_init(&team->started, NULL);
    pthread_cond_init(&team->finished, NULL);
    for (uint32_t i = 0; i + 1 < n_threads; i++) {
        worker *w = &team->workers[i];
        int rc;
        *w = (worker){.team = team, .i_thread = i + 1};
        rc = pthread_create(&w->thread, NULL, worker_main, w);
        CM_ASSERT_MSG(rc == 0, "thread %u of %u could not be started, error %d", i + 1, n_threads, rc);
    }
    return team;
}

void kn_team_destroy(kn_team *team)
{
    team->stop = true;
    start_job(team);
    for (uint32_t i = 0; i + 1 < team->n_threads; i++) {
        pthread_join(team->workers[i].thread, NULL);
    }
    pthread_cond_destroy(&team->finished);
    pthread_cond_destroy(&team->started);
    pthread_mutex_destroy(&team->lock);
    cm_free(team->workers);
    cm_free(team);
}

uint32_t kn_team_size(const kn_team *team)
{
    return team->n_threads;
}

void kn_team_run(kn_team *team, uint32_t n, uint64_t item_cost, kn_team_fn fn, void *arg)
{
    if (team->n_threads == 1 || n <= 1 || n * item_cost < WORTH_WAKING) {
        if (n > 0) {
            fn(arg, 0, n, 0);
        }
        return;
    }
    team->fn = fn;
    team->arg = arg;
    team->n = n;
    atomic_store_explicit(&team->n_busy, team->n_threads - 1, memory_order_relaxed);
    start_job(team);
    do_part(team, 0);
    await_workers(team);
}
