/* The file on a thread of its own: a disk that hangs must not stop heartbeats from being heard. */
#include "common/base/jobs.h"
#include "common/base/mem.h"
#include "coordinator/sqlite_log.h"

typedef struct sqlite_store {
    co_store base;
    pc_loop *loop;
    cm_jobs *jobs;
    co_sqlite *log; /* touched by the job thread only, until it is joined */
    co_store_events events;
    void *ctx;
    bool closed;        /* results on the way are dropped */
    uint32_t n_pending; /* results not yet back; the last of a closed store frees it */
} sqlite_store;

typedef struct sqlite_job {
    sqlite_store *store;
    uint64_t ticket, next_number;
    uint32_t next_member_id;
    co_drains drains;
    co_epoch *epoch;
    cm_status status;
    cm_error err;
} sqlite_job;

static void sqlite_release(sqlite_store *store)
{
    if (store->closed && store->n_pending == 0) {
        cm_free(store);
    }
}

static void sqlite_done(void *arg)
{
    sqlite_job *job = arg;
    sqlite_store *store = job->store;
    if (!store->closed) {
        store->events.written(store->ctx, job->ticket, job->status, job->err.text);
    }
    co_epoch_release(job->epoch);
    cm_free(job);
    store->n_pending--;
    sqlite_release(store);
}

static void sqlite_run(void *arg)
{
    sqlite_job *job = arg;
    job->status = co_sqlite_write(job->store->log, job->next_member_id, job->next_number, &job->drains,
                                  job->epoch, &job->err);
    pc_loop_post_new(job->store->loop, sqlite_done, job);
}

static cm_status sqlite_open(pc_loop *loop, const co_store_options *options, const co_store_events *events,
                             void *ctx, co_store **store_out, cm_error *err)
{
    co_sqlite *log = NULL;
    co_store_past past;
    CM_TRY(co_sqlite_open(options->url, &log, &past, err));
    sqlite_store *store = cm_alloc(sizeof(*store));
    *store = (sqlite_store){
        .base.ops = &co_store_sqlite_ops, .loop = loop, .log = log, .events = *events, .ctx = ctx};
    store->jobs = cm_jobs_create("log", 1, options->n_queued_max);
    *store_out = &store->base;
    store->events.active(ctx, &past);
    co_epoch_release(past.epoch);
    return CM_OK;
}

static bool sqlite_is_active(const co_store *base)
{
    (void)base;
    return true; /* the file is locked */
}

static cm_status sqlite_write(co_store *base, uint64_t ticket, uint32_t next_member_id, uint64_t next_number,
                              const co_drains *drains, co_epoch *epoch)
{
    sqlite_store *store = (sqlite_store *)base;
    sqlite_job *job = cm_alloc(sizeof(*job));
    *job = (sqlite_job){.store = store,
                        .ticket = ticket,
                        .next_member_id = next_member_id,
                        .next_number = next_number,
                        .drains = *drains};
    job->epoch = epoch != NULL ? co_epoch_hold(epoch) : NULL;
    store->n_pending++;
    cm_status status = cm_jobs_submit(store->jobs, sqlite_run, job);
    if (status != CM_OK) {
        store->n_pending--;
        co_epoch_release(job->epoch);
        cm_free(job);
    }
    return status;
}

static void sqlite_stop(co_store *base, pc_fn done, void *arg)
{
    (void)base;
    done(arg); /* the lock ends with the process */
}

static void sqlite_close(co_store *base)
{
    sqlite_store *store = (sqlite_store *)base;
    cm_jobs_destroy(store->jobs);
    co_sqlite_close(store->log);
    store->closed = true;
    sqlite_release(store);
}

const co_store_ops co_store_sqlite_ops = {.scheme = "",
                                          .open = sqlite_open,
                                          .is_active = sqlite_is_active,
                                          .write = sqlite_write,
                                          .stop = sqlite_stop,
                                          .close = sqlite_close};
