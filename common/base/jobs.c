#include "common/base/jobs.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

typedef struct job {
    cm_job_fn fn;
    void *arg;
} job;

struct cm_jobs {
    pthread_mutex_t lock; /* protects ring, head, n_queued and stopping */
    pthread_cond_t wake;
    job *ring;
    uint32_t head, n_queued, n_max;
    bool stopping;
    uint32_t n_threads;
    pthread_t *threads;
};

static void *jobs_thread(void *arg)
{
    cm_jobs *jobs = arg;
    pthread_mutex_lock(&jobs->lock);
    for (;;) {
        while (jobs->n_queued == 0 && !jobs->stopping) {
            pthread_cond_wait(&jobs->wake, &jobs->lock);
        }
        if (jobs->n_queued == 0) {
            break;
        }
        job next = jobs->ring[jobs->head];
        jobs->head = (jobs->head + 1) % jobs->n_max;
        jobs->n_queued--;
        pthread_mutex_unlock(&jobs->lock);
        next.fn(next.arg);
        pthread_mutex_lock(&jobs->lock);
    }
    pthread_mutex_unlock(&jobs->lock);
    return NULL;
}

cm_jobs *cm_jobs_create(const char *name, uint32_t n_threads, uint32_t n_queued_max)
{
    cm_jobs *jobs = cm_alloc(sizeof(*jobs));
    CM_ASSERT(n_threads > 0 && n_queued_max > 0);
    jobs->ring = cm_alloc(sizeof(job) * n_queued_max);
    jobs->n_max = n_queued_max;
    jobs->n_threads = n_threads;
    jobs->threads = cm_alloc(sizeof(pthread_t) * n_threads);
    pthread_mutex_init(&jobs->lock, NULL);
    pthread_cond_init(&jobs->wake, NULL);
    sigset_t all, old;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* signals belong to the loop thread */
    for (uint32_t i = 0; i < n_threads; i++) {
        int rc = pthread_create(&jobs->threads[i], NULL, jobs_thread, jobs);
        CM_ASSERT_MSG(rc == 0, "thread %u of %s: error %d", i, name, rc);
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    return jobs;
}

void cm_jobs_destroy(cm_jobs *jobs)
{
    pthread_mutex_lock(&jobs->lock);
    jobs->stopping = true;
    pthread_cond_broadcast(&jobs->wake);
    pthread_mutex_unlock(&jobs->lock);
    for (uint32_t i = 0; i < jobs->n_threads; i++) {
        pthread_join(jobs->threads[i], NULL);
    }
    pthread_mutex_destroy(&jobs->lock);
    pthread_cond_destroy(&jobs->wake);
    cm_free(jobs->ring);
    cm_free(jobs->threads);
    cm_free(jobs);
}

cm_status cm_jobs_submit(cm_jobs *jobs, cm_job_fn fn, void *arg)
{
    cm_status status = CM_E_CAPACITY;
    pthread_mutex_lock(&jobs->lock);
    CM_ASSERT(!jobs->stopping);
    if (jobs->n_queued < jobs->n_max) {
        jobs->ring[(jobs->head + jobs->n_queued) % jobs->n_max] = (job){fn, arg};
        jobs->n_queued++;
        pthread_cond_signal(&jobs->wake);
        status = CM_OK;
    }
    pthread_mutex_unlock(&jobs->lock);
    return status;
}
