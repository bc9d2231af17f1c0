#include "tools/bench/ep_rig.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/base/stats.h"
#include "tools/bench/bench_room.h"
#include "tools/bench/ep_echo.h"
#include "worker/engine.h"

enum {
    EP_CLUSTER = 77,
    EP_FIRST_WORKER = 100,
    EP_FRAME_BYTES = 4 << 20,
    EP_FRAMES = 16,
    EP_LINK_MS = 30000,
    EP_SILENCE_MS = 600000
};

/* A worker: a process with a pipe each way, or a thread of ours. */
typedef struct ep_worker {
    wk_engine *engine; /* in the process that runs it */
    pthread_t thread;
    pid_t pid; /* 0: a thread */
    int ask, answer;
    char address[NET_ADDRESS_BYTES];
} ep_worker;

struct ep_rig {
    ep_options options;
    char folder[256];
    md_checkpoint *checkpoint;
    pc_epoch *epoch;
    ep_worker workers[EP_RANKS_MAX];
    uint32_t n_worker;
};

static void rig_net_options(const ep_rig *rig, net_options *options_out)
{
    net_options_defaults(options_out);
    options_out->backend = rig->options.backend;
    options_out->keyed = rig->options.keyed;
    options_out->message_bytes_max = EP_FRAME_BYTES;
    options_out->silence_ms = EP_SILENCE_MS; /* routers are not polled while others are measured */
}

static const uint8_t g_key[NET_KEY_BYTES] = {1, 2, 3};

/* ---- a worker ---- */

static void *worker_thread(void *arg)
{
    wk_engine_run(arg);
    return NULL;
}

static cm_status worker_open(ep_rig *rig, uint32_t i, cm_error *err)
{
    ep_worker *w = &rig->workers[i];
    char name[64];
    snprintf(name, sizeof(name), "ep-%016llx", (unsigned long long)cm_random_u64());
    wk_engine_options options = {
        .checkpoint = rig->checkpoint,
        .device = {.backend = "cpu", .isa = "auto", .n_threads = 1},
        .address = strcmp(rig->options.backend, "local") == 0 ? name : "127.0.0.1:0",
        .row_max = 4096,
        .frame_max = EP_FRAMES,
        .router_max = 16,
        .window_max_us = rig->options.window_us,
        .answer_ms = 10000,
    };
    if (rig->options.echo) {
        CM_TRY(ep_echo_open(rig->options.shape.d, &options.opened, err));
    }
    rig_net_options(rig, &options.rows);
    options.rows.receives_max = EP_FRAMES; /* as a worker's process sets them */
    options.rows.sends_max = 4 * EP_FRAMES;
    CM_TRY(wk_engine_create(&options, &w->engine, w->address, err));
    CM_TRY(wk_shard_load(wk_engine_shard(w->engine), rig->epoch->placement, i, err));
    if (rig->options.keyed) {
        wk_engine_frame_key(w->engine, EP_CLUSTER, 1, g_key);
    }
    wk_engine_commit(w->engine, rig->epoch, EP_FIRST_WORKER + i);
    int rc = pthread_create(&w->thread, NULL, worker_thread, w->engine);
    CM_ASSERT_MSG(rc == 0, "thread of worker %u: error %d", i, rc);
    return CM_OK;
}

static void worker_count(ep_counts *counts_out)
{
    counts_out->rows = cm_stat_get(CM_STAT_worker_rows);
    counts_out->batches = cm_stat_get(CM_STAT_worker_batches);
    counts_out->expert_bytes = cm_stat_get(CM_STAT_worker_expert_bytes);
}

/* The worker's process: tells its address, then answers questions until the pipe ends. */
_Noreturn static void worker_process(ep_rig *rig, uint32_t i, int ask, int answer)
{
    cm_error err = {0};
    ep_counts counts;
    char question;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (worker_open(rig, i, &err) == CM_OK) {
        bool ok = write(answer, rig->workers[i].address, NET_ADDRESS_BYTES) == NET_ADDRESS_BYTES;
        while (ok && read(ask, &question, 1) == 1) {
            worker_count(&counts);
            ok = write(answer, &counts, sizeof(counts)) == sizeof(counts);
        }
    } else {
        fprintf(stderr, "worker %u: %s\n", i, err.text);
    }
    for (;;) {
        raise(SIGKILL); /* nothing of it is to run on, atexit handlers neither */
    }
}

static cm_status worker_fork(ep_rig *rig, uint32_t i, cm_error *err)
{
    ep_worker *w = &rig->workers[i];
    int ask[2], answer[2];
    if (pipe(ask) != 0 || pipe(answer) != 0) {
        return cm_error_set(err, CM_E_IO, NULL, "no pipe: %s", strerror(errno));
    }
    fflush(NULL);
    w->pid = fork();
    if (w->pid == 0) {
        close(ask[1]);
        close(answer[0]);
        worker_process(rig, i, ask[0], answer[1]);
    }
    close(ask[0]);
    close(answer[1]);
    w->ask = ask[1];
    w->answer = answer[0];
    if (w->pid < 0) {
        return cm_error_set(err, CM_E_IO, NULL, "no new process: %s", strerror(errno));
    }
    return CM_OK;
}

static cm_status worker_await(ep_worker *w, void *out, size_t n_bytes, cm_error *err)
{
    for (size_t at = 0; at < n_bytes;) {
        ssize_t n = read(w->answer, (uint8_t *)out + at, n_bytes - at);
        if (n <= 0) {
            return cm_error_set(err, CM_E_IO, NULL, "a worker's process ended");
        }
        at += (size_t)n;
    }
    return CM_OK;
}

/* ---- the rig ---- */

static cm_status rig_epoch(ep_rig *rig, cm_error *err)
{
    uint32_t n = rig->options.n_worker, members[EP_RANKS_MAX];
    uint64_t capacity[EP_RANKS_MAX];
    const md_geometry *g = md_checkpoint_geometry(rig->checkpoint);
    pc_epoch *epoch = cm_alloc(sizeof(*epoch));
    rig->epoch = epoch;
    epoch->refs = 1;
    epoch->number = 1;
    epoch->cluster = EP_CLUSTER;
    epoch->n_member = n;
    epoch->members = cm_alloc(sizeof(*epoch->members) * n);
    for (uint32_t i = 0; i < n; i++) {
        members[i] = EP_FIRST_WORKER + i;
        capacity[i] = UINT64_MAX;
        epoch->members[i].id = members[i];
        epoch->members[i].role = BALEEN__CONTROL__V1__ROLE__ROLE_WORKER;
    }
    return pr_placement_plan(md_block_count(g), g->n_expert, members, n, capacity, NULL, &epoch->placement,
                             err);
}

static cm_status rig_start(ep_rig *rig, cm_error *err)
{
    bool inside = strcmp(rig->options.backend, "local") == 0;
    for (uint32_t i = 0; i < rig->options.n_worker; i++) {
        rig->n_worker = i + 1;
        CM_TRY(inside ? worker_open(rig, i, err) : worker_fork(rig, i, err));
    }
    for (uint32_t i = 0; i < rig->n_worker; i++) {
        ep_worker *w = &rig->workers[i];
        if (w->pid != 0) {
            CM_TRY(worker_await(w, w->address, NET_ADDRESS_BYTES, err));
        }
        rig->epoch->members[i].data_address = cm_strdup(w->address);
    }
    return CM_OK;
}

cm_status ep_rig_create(const ep_options *options, ep_rig **rig_out, cm_error *err)
{
    CM_ASSERT(options->n_worker <= EP_RANKS_MAX);
    ep_rig *rig = cm_alloc(sizeof(*rig));
    rig->options = *options;
    snprintf(rig->folder, sizeof(rig->folder), "%s/ep.XXXXXX", bench_room());
    if (mkdtemp(rig->folder) == NULL) {
        cm_status status = cm_error_set(err, CM_E_IO, NULL, "%s: %s", rig->folder, strerror(errno));
        cm_free(rig);
        return status;
    }
    cm_status status = ep_checkpoint_write(rig->folder, &options->shape, err);
    if (status == CM_OK) {
        status = md_checkpoint_open(rig->folder, &rig->checkpoint, NULL, NULL, err);
    }
    if (status == CM_OK) {
        status = rig_epoch(rig, err);
    }
    if (status == CM_OK) {
        status = rig_start(rig, err);
    }
    if (status != CM_OK) {
        ep_rig_destroy(rig);
        return status;
    }
    *rig_out = rig;
    return CM_OK;
}

void ep_rig_destroy(ep_rig *rig)
{
    for (uint32_t i = 0; i < rig->n_worker; i++) {
        ep_worker *w = &rig->workers[i];
        if (w->pid > 0) {
            kill(w->pid, SIGKILL);
            waitpid(w->pid, NULL, 0);
            close(w->ask);
            close(w->answer);
        } else if (w->engine != NULL) {
            wk_engine_stop(w->engine);
            pthread_join(w->thread, NULL);
            wk_engine_destroy(w->engine);
        }
    }
    pc_epoch_release(rig->epoch);
    if (rig->checkpoint != NULL) {
        md_checkpoint_close(rig->checkpoint);
    }
    ep_checkpoint_remove(rig->folder);
    cm_free(rig);
}

const pr_placement *ep_rig_placement(const ep_rig *rig)
{
    return rig->epoch->placement;
}

uint64_t ep_rig_expert_bytes(const ep_rig *rig)
{
    return md_expert_bytes(md_checkpoint_geometry(rig->checkpoint));
}

cm_status ep_rig_counts(const ep_rig *rig, ep_counts *counts_out, cm_error *err)
{
    ep_counts sum = {0}, one = {0};
    for (uint32_t i = 0; i < rig->n_worker; i++) {
        ep_worker w = rig->workers[i];
        if (w.pid == 0) {
            worker_count(counts_out); /* all threads count together */
            return CM_OK;
        }
        if (write(w.ask, "?", 1) != 1) {
            return cm_error_set(err, CM_E_IO, NULL, "a worker's process ended");
        }
        CM_TRY(worker_await(&w, &one, sizeof(one), err));
        sum.rows += one.rows;
        sum.batches += one.batches;
        sum.expert_bytes += one.expert_bytes;
    }
    *counts_out = sum;
    return CM_OK;
}

cm_status ep_rig_router(const ep_rig *rig, uint32_t id, uint32_t row_max, uint32_t topk,
                        rt_exchange **exchange_out, cm_error *err)
{
    const md_geometry *g = md_checkpoint_geometry(rig->checkpoint);
    net_options rows;
    rig_net_options(rig, &rows);
    rt_exchange_options options = {
        .limits = {.row_max = row_max, .topk = topk, .d = g->d, .frame_bytes_max = EP_FRAME_BYTES},
        .n_layer = md_block_count(g),
        .n_expert = g->n_expert,
        .answer_ms = 10000,
        .wait_ms = EP_LINK_MS,
    };
    rt_exchange *exchange;
    CM_TRY(net_open(&rows, &options.rows, err));
    CM_TRY(rt_exchange_create(&options, &exchange, err));
    if (rig->options.keyed) {
        rt_exchange_frame_key(exchange, EP_CLUSTER, 1, g_key);
    }
    rt_exchange_offer_epoch(exchange, rig->epoch, id);
    uint64_t give_up_ms = cm_now_ms() + EP_LINK_MS;
    while (!rt_exchange_ready(exchange)) {
        rt_exchange_idle(exchange, 10);
        if (cm_now_ms() > give_up_ms) {
            rt_exchange_destroy(exchange);
            return cm_error_set(err, CM_E_UNREACHABLE, NULL, "the workers' links did not come up");
        }
    }
    *exchange_out = exchange;
    return CM_OK;
}

/* ---- rows ---- */

static void rows_choose(ep_rows *r, uint32_t row, uint32_t n_expert, uint64_t seed)
{
    int32_t *chosen = r->experts + (size_t)row * r->topk;
    for (uint32_t k = 0, draw = 0; k < r->topk; draw++) {
        int32_t e = (int32_t)(cm_rng_at(seed, row, draw).word[0] % n_expert);
        bool taken = false;
        for (uint32_t i = 0; i < k; i++) {
            taken |= chosen[i] == e;
        }
        if (!taken) {
            chosen[k++] = e;
        }
    }
}

void ep_rows_init(ep_rows *r, uint32_t n_row, uint32_t topk, uint32_t d, uint32_t n_expert, uint64_t seed)
{
    size_t n_slot = (size_t)n_row * topk, n_block = kn_blocks(d, KN_ACT_BLOCK);
    *r = (ep_rows){.n_row = n_row, .topk = topk, .d = d};
    r->experts = cm_alloc(sizeof(r->experts[0]) * n_slot);
    r->weights = cm_alloc(sizeof(r->weights[0]) * n_slot);
    r->codes = cm_alloc_aligned((size_t)n_row * d);
    r->scales = cm_alloc_aligned(n_row * n_block);
    r->results = cm_alloc_aligned(sizeof(uint16_t) * n_slot * d);
    for (uint32_t row = 0; row < n_row; row++) {
        rows_choose(r, row, n_expert, seed);
    }
    for (size_t i = 0; i < n_slot; i++) {
        r->weights[i] = 0.5f;
    }
    for (size_t i = 0; i < (size_t)n_row * d; i += 4) {
        uint32_t word = cm_rng_at(seed + 1, i, 0).word[0] & 0x3f3f3f3f; /* no NaN among the codes */
        memcpy(r->codes + i, &word, sizeof(word));
    }
    memset(r->scales, 120, n_row * n_block);
}

void ep_rows_fini(ep_rows *r)
{
    cm_free(r->experts);
    cm_free(r->weights);
    cm_free(r->codes);
    cm_free(r->scales);
    cm_free(r->results);
}

cm_status ep_rows_run(ep_rows *r, rt_exchange *exchange, uint64_t step, uint32_t layer)
{
    rt_xcore_layer rows = {.step = step,
                           .layer = layer,
                           .n_row = r->n_row,
                           .experts = r->experts,
                           .weights = r->weights,
                           .codes = r->codes,
                           .scales = r->scales,
                           .results = r->results};
    rt_exchange_begin(exchange, 0, &rows);
    return rt_exchange_finish(exchange, 0);
}

void ep_rows_poison(ep_rows *r)
{
    memset(r->results, 0xee, sizeof(uint16_t) * r->n_row * r->topk * r->d);
}

bool ep_rows_echoed(const ep_rows *r)
{
    for (size_t i = 0; i < (size_t)r->n_row * r->topk; i++) {
        const uint8_t *row = r->codes + i / r->topk * r->d, *got = (const uint8_t *)(r->results + i * r->d);
        if (memcmp(got, row, r->d) != 0 || memcmp(got + r->d, row, r->d) != 0) {
            return false;
        }
    }
    return true;
}

void ep_rows_bytes(const ep_rows *r, const pr_placement *placement, uint32_t layer,
                   uint64_t out_bytes[EP_RANKS_MAX], uint64_t back_bytes[EP_RANKS_MAX])
{
    memset(out_bytes, 0, sizeof(out_bytes[0]) * EP_RANKS_MAX);
    memset(back_bytes, 0, sizeof(back_bytes[0]) * EP_RANKS_MAX);
    for (uint32_t row = 0; row < r->n_row; row++) {
        uint64_t seen = 0;
        for (uint32_t k = 0; k < r->topk; k++) {
            uint32_t n;
            uint16_t rank =
                pr_placement_owners(placement, layer, (uint32_t)r->experts[row * r->topk + k], &n)[0];
            out_bytes[rank] += (seen >> rank & 1) == 0 ? r->d + kn_blocks(r->d, KN_ACT_BLOCK) : 0;
            back_bytes[rank] += 2ull * r->d;
            seen |= 1ull << rank;
        }
    }
}
