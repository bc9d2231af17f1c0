#include "coordinator/writer.h"

#include "common/base/jobs.h"
#include "common/base/mem.h"

struct co_writer {
    pc_loop *loop;
    cm_jobs *jobs;
    co_store *store; /* touched by the job thread only, until it is joined */
    co_writer_fn fn; /* NULL once destroyed: results on the way are dropped */
    void *ctx;
    uint32_t n_pending; /* results not yet back; the last of a destroyed writer frees it */
};

typedef struct writer_job {
    co_writer *writer;
    uint64_t ticket, next_number;
    uint32_t next_member_id;
    co_epoch *epoch;
    cm_status status;
    cm_error err;
} writer_job;

static void writer_release(co_writer *writer)
{
    if (writer->fn == NULL && writer->n_pending == 0) {
        cm_free(writer);
    }
}

static void writer_done(void *arg)
{
    writer_job *job = arg;
    co_writer *writer = job->writer;
    if (writer->fn != NULL) {
        writer->fn(writer->ctx, job->ticket, job->status, job->err.text);
    }
    co_epoch_release(job->epoch);
    cm_free(job);
    writer->n_pending--;
    writer_release(writer);
}

static void writer_write(void *arg)
{
    writer_job *job = arg;
    job->status =
        co_store_write(job->writer->store, job->next_member_id, job->next_number, job->epoch, &job->err);
    pc_loop_post_new(job->writer->loop, writer_done, job);
}

co_writer *co_writer_create(pc_loop *loop, co_store *store, uint32_t n_queued_max, co_writer_fn fn, void *ctx)
{
    co_writer *writer = cm_alloc(sizeof(*writer));
    *writer = (co_writer){.loop = loop, .store = store, .fn = fn, .ctx = ctx};
    writer->jobs = cm_jobs_create("log", 1, n_queued_max);
    return writer;
}

void co_writer_destroy(co_writer *writer)
{
    cm_jobs_destroy(writer->jobs);
    co_store_close(writer->store);
    writer->fn = NULL;
    writer_release(writer);
}

cm_status co_writer_submit(co_writer *writer, uint64_t ticket, uint32_t next_member_id, uint64_t next_number,
                           co_epoch *epoch)
{
    writer_job *job = cm_alloc(sizeof(*job));
    *job = (writer_job){
        .writer = writer, .ticket = ticket, .next_member_id = next_member_id, .next_number = next_number};
    job->epoch = epoch != NULL ? co_epoch_hold(epoch) : NULL;
    writer->n_pending++;
    cm_status status = cm_jobs_submit(writer->jobs, writer_write, job);
    if (status != CM_OK) {
        writer->n_pending--;
        co_epoch_release(job->epoch);
        cm_free(job);
    }
    return status;
}
