/* Slow or blocking work off the loop thread: a bounded queue in front of a few threads. A job runs on a job
 * thread and then hands its result back itself (pc_loop_post); jobs are FIFO, one owner at a time. Thread:
 * submit from any; create and destroy from the owner. */
#pragma once
#include <stdint.h>

#include "common/base/status.h"

typedef struct cm_jobs cm_jobs;
typedef void (*cm_job_fn)(void *arg);

cm_jobs *cm_jobs_create(const char *name, uint32_t n_threads, uint32_t n_queued_max);
/* Runs what is queued, then joins the threads. */
void cm_jobs_destroy(cm_jobs *jobs);
/* arg is given to fn, which must free or return it. CM_E_CAPACITY when the queue is full. */
CM_MUST_CHECK cm_status cm_jobs_submit(cm_jobs *jobs, cm_job_fn fn, void *arg);
