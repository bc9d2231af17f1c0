#include "worker/warm.h"

#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/stats.h"

enum {
    WARM_AGAIN_MS = 60000 /* after a whole pass: pages may have been evicted since */,
    WARM_BUSY_MS = 100
};

/* Work on the job thread: find what is to be read, or read one expert. One at a time. */
typedef struct warm_job {
    wk_warm *warm; /* NULL: it ended before the result came back */
    wk_warm_options options;
    pc_epoch *epoch;
    uint32_t self;
    bool finds;
    uint32_t *pairs, n_pairs; /* found */
    uint32_t pair;            /* to read */
    cm_status status;
    cm_error err;
} warm_job;

struct wk_warm {
    wk_warm_options options;
    pc_timer *timer;
    pc_epoch *epoch; /* NULL before the first */
    uint32_t self;
    bool found;      /* pairs are those of the epoch */
    uint32_t *pairs; /* what we would take over, ascending */
    uint32_t n_pairs, at;
    bool again; /* all were read once */
    warm_job *flight;
};

/* ---- on the job thread ---- */

static void warm_find(warm_job *job)
{
    const pr_placement *place = job->epoch->placement;
    uint32_t n_pair = place->n_layer * place->n_expert, rank = pr_placement_rank_of(place, job->self);
    if (rank == place->n_rank) {
        return; /* no worker of it (yet): nothing is ours to take over */
    }
    uint64_t *capacity = cm_alloc(sizeof(uint64_t) * place->n_rank);
    for (uint32_t r = 0; r < place->n_rank; r++) {
        const struct pc_epoch_member *member = pc_epoch_member_find(job->epoch, place->rank_member[r]);
        capacity[r] = member->expert_bytes_max / job->options.expert_bytes;
    }
    uint64_t held = pr_placement_count(place, rank);
    uint64_t n_max = capacity[rank] > held ? capacity[rank] - held : 0;
    uint8_t *takes = cm_alloc(n_pair);
    pr_placement_heirs(place, capacity, rank, takes);
    job->pairs = cm_alloc(sizeof(uint32_t) * n_pair);
    for (uint32_t i = 0; i < n_pair && job->n_pairs < n_max; i++) {
        if (takes[i]) {
            job->pairs[job->n_pairs++] = i;
        }
    }
    cm_free(takes);
    cm_free(capacity);
}

static void warm_done(void *arg);

static void warm_work(void *arg)
{
    warm_job *job = arg;
    uint32_t n_expert = job->epoch->placement->n_expert;
    job->status = CM_OK;
    if (job->finds) {
        warm_find(job);
    } else {
        job->status =
            wk_shard_warm(job->options.shard, job->pair / n_expert, job->pair % n_expert, &job->err);
    }
    pc_loop_post_new(job->options.loop, warm_done, job);
}

/* ---- on the loop ---- */

static void job_free(warm_job *job)
{
    pc_epoch_release(job->epoch);
    cm_free(job->pairs);
    cm_free(job);
}

static void warm_next(void *arg)
{
    wk_warm *warm = arg;
    if (warm->flight != NULL || warm->epoch == NULL || warm->epoch->placement == NULL) {
        return;
    }
    if (warm->found && warm->at == warm->n_pairs) {
        warm->at = 0;
        warm->again = true;
        pc_timer_set(warm->timer, WARM_AGAIN_MS);
        return;
    }
    warm_job *job = cm_alloc(sizeof(*job));
    *job = (warm_job){.warm = warm,
                      .options = warm->options,
                      .epoch = pc_epoch_hold(warm->epoch),
                      .self = warm->self,
                      .finds = !warm->found,
                      .pair = warm->found ? warm->pairs[warm->at] : 0};
    if (cm_jobs_submit(warm->options.jobs, warm_work, job) != CM_OK) {
        job_free(job);
        pc_timer_set(warm->timer, WARM_BUSY_MS); /* loads come first */
        return;
    }
    warm->flight = job;
}

static void warm_take(wk_warm *warm, warm_job *job)
{
    uint64_t pause_ms = 1000 * warm->options.expert_bytes / warm->options.bytes_per_s;
    if (job->finds) {
        cm_free(warm->pairs);
        warm->pairs = job->pairs;
        warm->n_pairs = job->n_pairs;
        job->pairs = NULL;
        warm->found = true;
        warm->again = false;
        warm->at = 0;
        cm_stat_set(CM_STAT_worker_warm, 0);
        pause_ms = 0;
    } else {
        if (job->status != CM_OK && job->status != CM_E_CANCELLED) {
            cm_warn("reading ahead: %s", job->err.text); /* the load, if it ever comes, will refuse it */
        }
        warm->at++;
        if (!warm->again) {
            cm_stat_set(CM_STAT_worker_warm, warm->at);
        }
    }
    pc_timer_set(warm->timer, pause_ms);
}

static void warm_done(void *arg)
{
    warm_job *job = arg;
    wk_warm *warm = job->warm;
    if (warm != NULL) {
        warm->flight = NULL;
        if (job->epoch == warm->epoch) {
            warm_take(warm, job);
        } else {
            warm_next(warm); /* another epoch has come meanwhile */
        }
    }
    job_free(job);
}

wk_warm *wk_warm_create(const wk_warm_options *options)
{
    wk_warm *warm = cm_alloc(sizeof(*warm));
    warm->options = *options;
    warm->timer = pc_timer_create(options->loop, warm_next, warm);
    return warm;
}

void wk_warm_follow(wk_warm *warm, pc_epoch *epoch, uint32_t self)
{
    pc_epoch_release(warm->epoch);
    warm->epoch = pc_epoch_hold(epoch);
    warm->self = self;
    warm->found = false;
    pc_timer_set(warm->timer, 0);
}

void wk_warm_destroy(wk_warm *warm)
{
    if (warm == NULL) {
        return;
    }
    if (warm->flight != NULL) {
        warm->flight->warm = NULL;
    }
    pc_timer_destroy(warm->timer);
    pc_epoch_release(warm->epoch);
    cm_free(warm->pairs);
    cm_free(warm);
}
