#include "worker/worker.h"

#include <pthread.h>
#include <string.h>
#include <sys/queue.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/jobs.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/proc/addresses.h"
#include "common/proc/member.h"
#include "worker/engine.h"
#include "worker/epochs_core.h"
#include "worker/warm.h"

enum {
    WORKER_DRAIN_TICK_MS = 50, /* between looks whether the coordinator is still there */
    WORKER_ALONE_MS = 5000,    /* for one to come back that lets us go in order */
    WORKER_SENDS_MAX = 256,    /* messages of answers on their way on a link: two full groups in pieces */
};

/* A load on the job thread; its result comes back as a loop event. */
typedef struct worker_load {
    LIST_ENTRY(worker_load) link;
    wk_worker *worker; /* NULL: it ended before the result came back */
    pc_epoch *epoch;
    uint32_t rank;
    cm_status status;
    cm_error err;
} worker_load;

struct wk_worker {
    pc_loop *loop;
    const wk_config *config;
    void (*finished)(void *ctx, int code);
    void *ctx;
    md_checkpoint *checkpoint;
    wk_engine *engine;
    pthread_t thread;
    cm_jobs *jobs;
    pc_tls *tls;   /* NULL: plain */
    wk_warm *warm; /* NULL: nothing is read ahead */
    pc_member *member;
    pc_timer *drain_timer;
    char address[NET_ADDRESS_BYTES];
    char fingerprint[33];
    uint32_t self;
    wk_hold hold;                   /* epochs whose experts we hold */
    LIST_HEAD(, worker_load) loads; /* on the job thread or on their way back */
    bool draining;
    uint64_t drain_until_ms, alone_until_ms;
};

static void *worker_thread(void *arg)
{
    wk_engine_run(arg);
    return NULL;
}

/* ---- epochs ---- */

static void worker_keep_experts(wk_worker *w)
{
    const pr_placement *placements[WK_EPOCHS + 1];
    uint32_t ranks[WK_EPOCHS + 1];
    uint32_t n = wk_hold_list(&w->hold, w->self, placements, ranks);
    wk_shard_keep(wk_engine_shard(w->engine), placements, ranks, n);
    wk_engine_wake(w->engine); /* it frees what was let go */
}

static void worker_loaded(void *arg)
{
    worker_load *load = arg;
    wk_worker *w = load->worker;
    if (w != NULL) {
        LIST_REMOVE(load, link);
        if (w->hold.prepared == load->epoch) {
            pc_member_prepared(w->member, load->epoch->number, load->status, load->err.text);
        } else {
            worker_keep_experts(w); /* aborted meanwhile: what was loaded since is nobody's */
        }
    }
    if (load->status != CM_OK) {
        cm_error_log("epoch %llu cannot be prepared: %s", (unsigned long long)load->epoch->number,
                     load->err.text);
    }
    pc_epoch_release(load->epoch);
    cm_free(load);
}

static void worker_load_job(void *arg)
{
    worker_load *load = arg;
    wk_shard *shard = wk_engine_shard(load->worker->engine);
    load->status = CM_OK;
    if (load->epoch->placement != NULL && load->rank < load->epoch->placement->n_rank) {
        load->status = wk_shard_load(shard, load->epoch->placement, load->rank, &load->err);
    }
    pc_loop_post_new(load->worker->loop, worker_loaded, load);
}

static void worker_on_welcome(void *ctx, uint32_t member_id, uint64_t cluster)
{
    wk_worker *w = ctx;
    w->self = member_id;
    cm_info("joined cluster %016llx as member %u", (unsigned long long)cluster, member_id);
}

static void worker_on_frame_key(void *ctx, uint64_t cluster, uint64_t epoch, const uint8_t *key)
{
    wk_engine_frame_key(((wk_worker *)ctx)->engine, cluster, epoch, key);
}

static void worker_on_prepare(void *ctx, pc_epoch *epoch)
{
    wk_worker *w = ctx;
    worker_load *load = cm_alloc(sizeof(*load));
    wk_hold_prepare(&w->hold, epoch);
    load->worker = w;
    load->epoch = pc_epoch_hold(epoch);
    load->rank = epoch->placement != NULL ? pr_placement_rank_of(epoch->placement, w->self) : 0;
    if (cm_jobs_submit(w->jobs, worker_load_job, load) != CM_OK) {
        pc_member_prepared(w->member, epoch->number, CM_E_CAPACITY, "earlier loads are still running");
        pc_epoch_release(load->epoch);
        cm_free(load);
        return;
    }
    LIST_INSERT_HEAD(&w->loads, load, link);
}

static void worker_on_abort(void *ctx, uint64_t epoch)
{
    wk_worker *w = ctx;
    if (wk_hold_abort(&w->hold, epoch)) {
        worker_keep_experts(w);
    }
}

static void worker_on_commit(void *ctx, pc_epoch *epoch)
{
    wk_worker *w = ctx;
    wk_hold_commit(&w->hold, epoch);
    wk_engine_commit(w->engine, epoch, w->self);
    pc_member_committed(w->member, epoch->number);
    if (w->warm != NULL) {
        wk_warm_follow(w->warm, epoch, w->self);
    }
}

static void worker_on_retire(void *ctx, uint64_t oldest)
{
    wk_worker *w = ctx;
    wk_hold_retire(&w->hold, oldest);
    wk_engine_retire(w->engine, oldest);
    worker_keep_experts(w);
}

/* No epoch in use needs us. */
static void worker_on_drain(void *ctx)
{
    wk_worker *w = ctx;
    pc_member_leave(w->member); /* the end of the session is for good */
    w->finished(w->ctx, 0);
}

static void worker_on_refused(void *ctx, cm_status status, const char *text)
{
    wk_worker *w = ctx;
    cm_error_log("the coordinator refused us: %s: %s", cm_status_text(status), text);
    w->finished(w->ctx, 1);
}

static const pc_member_events g_member_events = {
    .welcome = worker_on_welcome,
    .frame_key = worker_on_frame_key,
    .prepare = worker_on_prepare,
    .abort = worker_on_abort,
    .commit = worker_on_commit,
    .retire = worker_on_retire,
    .drain = worker_on_drain,
    .refused = worker_on_refused,
};

/* ---- life ---- */

static uint64_t worker_expert_bytes_max(const wk_config *config)
{
    if (config->expert_bytes_max != 0) {
        return config->expert_bytes_max;
    }
    return (uint64_t)sysconf(_SC_PHYS_PAGES) / 4 * 3 * (uint64_t)sysconf(_SC_PAGESIZE);
}

/* Frames that may wait or be computed together: one of each layer that a router has under way, which is all
 * as long as a router's rows for one of several workers fit a frame, and those of a long prompt, until they
 * make a whole group. What comes beyond waits in its link, where the gathering cannot see it: it would read
 * weights once more than it had to, and nothing else. The number of workers does not matter. */
static uint32_t worker_frame_max(const wk_worker *w)
{
    const wk_config *config = w->config;
    uint64_t row_bytes = 2ull * md_checkpoint_geometry(w->checkpoint)->d;
    uint64_t frame_rows = config->frame_bytes > row_bytes ? config->frame_bytes / row_bytes : 1;
    return (uint32_t)(PR_FLIGHTS_MAX * config->routers_max + config->rows_max / frame_rows + 1);
}

static cm_status worker_create_engine(wk_worker *w, cm_error *err)
{
    const wk_config *config = w->config;
    wk_engine_options options = {
        .checkpoint = w->checkpoint,
        .device = {.backend = config->device,
                   .isa = config->cpu_isa,
                   .n_threads = (uint32_t)config->threads,
                   .numa_node = config->numa_node},
        .address = config->address,
        .row_max = (uint32_t)config->rows_max,
        .frame_max = worker_frame_max(w),
        .router_max = (uint32_t)config->routers_max,
        .window_max_us = (uint32_t)config->window_us,
        .answer_ms = (uint32_t)config->answer_ms,
    };
    net_options_defaults(&options.rows);
    options.rows.backend = config->net;
    options.rows.keyed = true;
    options.rows.message_bytes_max = config->frame_bytes;
    options.rows.peers_max = (uint32_t)config->routers_max;
    options.rows.receives_max = options.frame_max;
    options.rows.silence_ms = (uint32_t)config->silence_ms;
    options.rows.sends_max = WORKER_SENDS_MAX;
    return wk_engine_create(&options, &w->engine, w->address, err);
}

static void worker_begin_warm(wk_worker *w)
{
    if (w->config->warm_bytes_s != 0) {
        w->warm = wk_warm_create(&(wk_warm_options){
            .loop = w->loop,
            .jobs = w->jobs,
            .shard = wk_engine_shard(w->engine),
            .expert_bytes = md_expert_bytes(md_checkpoint_geometry(w->checkpoint)),
            .bytes_per_s = w->config->warm_bytes_s,
        });
    }
}

static void worker_join(wk_worker *w)
{
    const md_geometry *g = md_checkpoint_geometry(w->checkpoint);
    pc_member_options options = {
        .coordinator = w->config->coordinator,
        .tls = w->tls,
        .role = BALEEN__CONTROL__V1__ROLE__ROLE_WORKER,
        .data_address = w->address,
        .net = w->config->net,
        .fingerprint = w->fingerprint,
        .expert_bytes_max = worker_expert_bytes_max(w->config),
        .n_layer = md_block_count(g),
        .n_expert = g->n_expert,
        .expert_bytes = md_expert_bytes(g),
    };
    w->member = pc_member_create(w->loop, &options, &g_member_events, w);
}

cm_status wk_worker_create(pc_loop *loop, const wk_config *config, void (*finished)(void *ctx, int code),
                           void *ctx, wk_worker **worker_out, cm_error *err)
{
    if (config->model[0] == '\0' || config->coordinator[0] == '\0') {
        return cm_error_set(err, CM_E_CONFIG, "model",
                            "a worker needs --model DIR and --coordinator HOST:PORT");
    }
    pc_addresses coordinators;
    CM_TRY(pc_addresses_parse("coordinator", config->coordinator, &coordinators, err));
    wk_worker *w = cm_alloc(sizeof(*w));
    LIST_INIT(&w->loads);
    w->loop = loop;
    w->config = config;
    w->finished = finished;
    w->ctx = ctx;
    cm_status status = pc_tls_open(&config->process.tls, config->coordinator, "worker", &w->tls, err);
    if (status != CM_OK) {
        goto err_free;
    }
    status = md_checkpoint_open(config->model, &w->checkpoint, NULL, NULL, err);
    if (status != CM_OK) {
        goto err_tls;
    }
    status = md_checkpoint_fingerprint(w->checkpoint, w->fingerprint, err);
    if (status == CM_OK) {
        status = worker_create_engine(w, err);
    }
    if (status != CM_OK) {
        goto err_checkpoint;
    }
    w->jobs = cm_jobs_create("expert loads", 1, 4);
    worker_begin_warm(w);
    int rc = pthread_create(&w->thread, NULL, worker_thread, w->engine);
    CM_ASSERT_MSG(rc == 0, "compute thread: error %d", rc);
    worker_join(w);
    *worker_out = w;
    return CM_OK;

err_checkpoint:
    md_checkpoint_close(w->checkpoint);
err_tls:
    pc_tls_close(w->tls);
err_free:
    cm_free(w);
    return status;
}

const char *wk_worker_address(const wk_worker *w)
{
    return w->address;
}

static void worker_drain_tick(void *arg)
{
    wk_worker *w = arg;
    uint64_t now_ms = cm_now_ms();
    bool connected = pc_member_connected(w->member);
    if (connected) {
        w->alone_until_ms = now_ms + WORKER_ALONE_MS;
    }
    if (now_ms < w->alone_until_ms && now_ms < w->drain_until_ms) {
        pc_timer_set(w->drain_timer, WORKER_DRAIN_TICK_MS);
        return;
    }
    if (connected) {
        cm_warn("leaves although the others cannot do without us yet: %llu ms have passed",
                (unsigned long long)w->config->drain_ms);
    } else {
        cm_warn("leaves on its own: the coordinator is gone");
    }
    w->finished(w->ctx, 0);
}

void wk_worker_drain(wk_worker *w)
{
    if (w->draining) {
        return;
    }
    w->draining = true;
    if (!pc_member_connected(w->member) || w->hold.n_known == 0) {
        w->finished(w->ctx, 0);
        return;
    }
    pc_member_leave(w->member);
    w->drain_until_ms = cm_now_ms() + w->config->drain_ms;
    w->drain_timer = pc_timer_create(w->loop, worker_drain_tick, w);
    pc_timer_set(w->drain_timer, WORKER_DRAIN_TICK_MS);
}

void wk_worker_destroy(wk_worker *w)
{
    pc_timer_destroy(w->drain_timer);
    pc_member_destroy(w->member);
    wk_engine_stop(w->engine);
    pthread_join(w->thread, NULL);
    wk_shard_stop(wk_engine_shard(w->engine));
    cm_jobs_destroy(w->jobs);
    wk_warm_destroy(w->warm);
    worker_load *load;
    LIST_FOREACH (load, &w->loads, link) {
        load->worker = NULL;
    }
    wk_engine_destroy(w->engine);
    wk_hold_fini(&w->hold);
    md_checkpoint_close(w->checkpoint);
    pc_tls_close(w->tls);
    cm_free(w);
}
