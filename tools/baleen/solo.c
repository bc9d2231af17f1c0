#include "tools/baleen/solo.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "worker/engine.h"

enum { SOLO_ROUTER_ID = 1, SOLO_WORKER_ID = 2, SOLO_LINK_MS = 30000, SOLO_FRAME_BYTES = 4 << 20 };

typedef struct solo_worker {
    wk_engine *engine;
    pthread_t thread;
    char address[NET_ADDRESS_BYTES];
} solo_worker;

struct solo {
    solo_options options;
    md_checkpoint *checkpoint;
    rt_engine *engine;
    pc_epoch *epoch;
    solo_worker *workers;
    uint32_t n_started;
    uint64_t n_steps;
    uint32_t *pages; /* [slot_max][pages of the longest sequence], fixed shares of the pool */
    uint32_t n_page_slot;
};

void solo_options_defaults(solo_options *options)
{
    *options = (solo_options){.model = "",
                              .n_worker = 1,
                              .transport = "local",
                              .device = "cpu",
                              .isa = "auto",
                              .n_threads = 1,
                              .row_max = 256,
                              .slot_max = 1,
                              .kv_bytes = 1ull << 30,
                              .micro_batches = 1};
}

static void *solo_worker_thread(void *arg)
{
    wk_engine_run(arg);
    return NULL;
}

static cm_status solo_start_worker(solo *s, uint32_t i, cm_error *err)
{
    solo_worker *worker = &s->workers[i];
    char name[64];
    snprintf(name, sizeof(name), "solo-%016llx-%u", (unsigned long long)cm_random_u64(), i);
    wk_engine_options options = {
        .checkpoint = s->checkpoint,
        .device = {.backend = s->options.device, .isa = s->options.isa, .n_threads = s->options.n_threads},
        .address = strcmp(s->options.transport, "local") == 0 ? name : "127.0.0.1:0",
        .row_max = 4096,
        .frame_max = 8,
        .router_max = 4,
        .window_max_us = 200,
        .answer_ms = 600000,
    };
    net_options_defaults(&options.rows);
    options.rows.backend = s->options.transport;
    options.rows.message_bytes_max = SOLO_FRAME_BYTES;
    options.rows.silence_ms = 600000; /* threads of one process die together */
    CM_TRY(wk_engine_create(&options, &worker->engine, worker->address, err));
    s->n_started++;
    int rc = pthread_create(&worker->thread, NULL, solo_worker_thread, worker->engine);
    CM_ASSERT_MSG(rc == 0, "thread of worker %u: error %d", i, rc);
    return CM_OK;
}

static cm_status solo_publish_epoch(solo *s, cm_error *err)
{
    const md_geometry *g = md_checkpoint_geometry(s->checkpoint);
    uint32_t n = s->options.n_worker;
    uint32_t *members = cm_alloc(sizeof(uint32_t) * n);
    uint64_t *capacity = cm_alloc(sizeof(uint64_t) * n);
    pc_epoch *epoch = cm_alloc(sizeof(*epoch));
    epoch->refs = 1;
    epoch->number = 1;
    epoch->cluster = cm_random_u64();
    epoch->n_member = n;
    epoch->members = cm_alloc(sizeof(*epoch->members) * n);
    s->epoch = epoch;
    for (uint32_t i = 0; i < n; i++) {
        members[i] = SOLO_WORKER_ID + i;
        capacity[i] = UINT64_MAX;
        epoch->members[i].id = members[i];
        epoch->members[i].role = BALEEN__CONTROL__V1__ROLE__ROLE_WORKER;
        epoch->members[i].data_address = cm_strdup(s->workers[i].address);
    }
    cm_status status =
        pr_placement_plan(md_block_count(g), g->n_expert, members, n, capacity, NULL, &epoch->placement, err);
    for (uint32_t i = 0; i < n && status == CM_OK; i++) {
        status = wk_shard_load(wk_engine_shard(s->workers[i].engine), epoch->placement, i, err);
        if (status == CM_OK) {
            wk_engine_commit(s->workers[i].engine, epoch, members[i]);
        }
    }
    cm_free(members);
    cm_free(capacity);
    return status;
}

static cm_status solo_create_router(solo *s, cm_error *err)
{
    rt_engine_options options = {
        .checkpoint = s->checkpoint,
        .device = {.backend = s->options.device, .isa = s->options.isa, .n_threads = s->options.n_threads},
        .row_max = s->options.row_max,
        .slot_max = s->options.slot_max,
        .kv_bytes = s->options.kv_bytes,
        .draft_max = s->options.draft_max,
        .micro_batches = s->options.micro_batches,
        .answer_ms = 600000,
        .wait_ms = SOLO_LINK_MS,
    };
    rt_sched_limits limits;
    net_options_defaults(&options.rows);
    options.rows.backend = s->options.transport;
    options.rows.message_bytes_max = SOLO_FRAME_BYTES;
    options.rows.silence_ms = 600000;
    CM_TRY(rt_engine_create(&options, &s->engine, err));
    rt_engine_sched_limits(s->engine, &limits);
    s->n_page_slot = limits.page_max / s->options.slot_max;
    s->pages = cm_alloc(sizeof(uint32_t) * limits.page_max);
    for (uint32_t i = 0; i < limits.page_max; i++) {
        s->pages[i] = i;
    }
    return CM_OK;
}

static cm_status solo_link(solo *s, cm_error *err)
{
    rt_exchange *exchange = rt_engine_exchange(s->engine);
    uint64_t give_up_ms = cm_now_ms() + SOLO_LINK_MS;
    rt_exchange_offer_epoch(exchange, s->epoch, SOLO_ROUTER_ID);
    while (!rt_exchange_ready(exchange)) {
        rt_exchange_idle(exchange, 10);
        if (cm_now_ms() >= give_up_ms) {
            return cm_error_set(err, CM_E_UNREACHABLE, "transport",
                                "the workers' links did not come up in %d ms", SOLO_LINK_MS);
        }
    }
    return CM_OK;
}

cm_status solo_create(const solo_options *options, solo **solo_out, cm_error *err)
{
    solo *s = cm_alloc(sizeof(*s));
    s->options = *options;
    s->workers = cm_alloc(sizeof(solo_worker) * options->n_worker);
    cm_status status = md_checkpoint_open(options->model, &s->checkpoint, NULL, NULL, err);
    if (status == CM_OK) {
        status = solo_create_router(s, err);
    }
    for (uint32_t i = 0; i < options->n_worker && status == CM_OK; i++) {
        status = solo_start_worker(s, i, err);
    }
    if (status == CM_OK) {
        status = solo_publish_epoch(s, err);
    }
    if (status == CM_OK) {
        status = solo_link(s, err);
    }
    if (status != CM_OK) {
        solo_destroy(s);
        return status;
    }
    *solo_out = s;
    return CM_OK;
}

void solo_destroy(solo *s)
{
    if (s->engine != NULL) {
        rt_engine_destroy(s->engine);
    }
    for (uint32_t i = 0; i < s->n_started; i++) {
        wk_engine_stop(s->workers[i].engine);
        pthread_join(s->workers[i].thread, NULL);
        wk_engine_destroy(s->workers[i].engine);
    }
    pc_epoch_release(s->epoch);
    if (s->checkpoint != NULL) {
        md_checkpoint_close(s->checkpoint);
    }
    cm_free(s->pages);
    cm_free(s->workers);
    cm_free(s);
}

rt_engine *solo_engine(solo *s)
{
    return s->engine;
}

const md_geometry *solo_geometry(const solo *s)
{
    return md_checkpoint_geometry(s->checkpoint);
}

const uint32_t *solo_pages(const solo *s, uint32_t slot, uint32_t *n_out)
{
    *n_out = s->n_page_slot;
    return s->pages + (size_t)slot * s->n_page_slot;
}

cm_status solo_step(solo *s, uint32_t slot, uint32_t pos0, const uint32_t *tokens, uint32_t n_row,
                    bool sample, uint32_t *token_out)
{
    static const rt_sampler greedy = {.temperature = 0, .top_p = 1};
    rt_step_seg seg = {
        .slot = slot,
        .pos0 = pos0,
        .n_row = n_row,
        .tokens = tokens,
        .pages = s->pages + (size_t)slot * s->n_page_slot,
        .n_page = kn_blocks(pos0 + n_row, KN_PAGE_TOKENS),
        .sample = sample,
        .sampler = &greedy,
    };
    rt_step step = {
        .number = ++s->n_steps, .n_seg = 1, .n_row = n_row, .n_sample = sample ? 1 : 0, .segs = &seg};
    CM_ASSERT_MSG(seg.n_page <= s->n_page_slot, "position %u needs %u pages of %u", pos0 + n_row, seg.n_page,
                  s->n_page_slot);
    rt_step_result result;
    CM_TRY(rt_engine_step(s->engine, &step, &result));
    if (sample) {
        *token_out = result.tokens[0];
    }
    return CM_OK;
}

cm_status solo_greedy(solo *s, uint32_t slot, const uint32_t *prompt, uint32_t n_prompt, uint32_t chunk,
                      uint32_t n_greedy, uint32_t *greedy_out, float *last_logits)
{
    uint32_t token = 0;
    for (uint32_t at = 0; at < n_prompt; at += chunk) {
        uint32_t n = n_prompt - at < chunk ? n_prompt - at : chunk;
        CM_TRY(solo_step(s, slot, at, prompt + at, n, at + n == n_prompt, &token));
    }
    if (last_logits != NULL) {
        memcpy(last_logits, rt_engine_logits(s->engine), sizeof(float) * solo_geometry(s)->vocab);
    }
    for (uint32_t i = 0; i < n_greedy; i++) {
        greedy_out[i] = token;
        if (i + 1 < n_greedy) {
            CM_TRY(solo_step(s, slot, n_prompt + i, &greedy_out[i], 1, true, &token));
        }
    }
    return CM_OK;
}
