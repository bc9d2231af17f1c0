#include "router/engine/engine.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "router/engine/engine_private.h"

static uint32_t engine_keys_max(const md_geometry *g)
{
    uint32_t most = 0;
    for (uint32_t l = 0; l < g->n_layer; l++) {
        uint32_t rows = g->ratio[l] == 0 ? 0 : g->context / g->ratio[l];
        uint32_t seen = g->ratio[l] == 4 && rows > g->index_topk ? g->index_topk : rows;
        most = seen > most ? seen : most;
    }
    return g->window + most;
}

static uint32_t u32_max(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

uint32_t rt_out_max(const rt_engine *e)
{
    uint64_t n = (uint64_t)e->options.slot_max * (e->draft_max + 1);
    return n < e->options.row_max ? (uint32_t)n : e->options.row_max;
}

static void engine_kn_limits(const rt_engine *e, kn_limits *limits_out)
{
    const md_geometry *g = e->geometry;
    uint32_t group_in = g->n_head / g->o_groups * g->head_dim;
    *limits_out = (kn_limits){
        .n_row = e->options.row_max,
        .n_in = u32_max(u32_max(g->hc * g->d, g->o_groups * g->o_rank),
                        u32_max(group_in, u32_max(g->q_rank, g->inner))),
        .n_inner = g->inner,
        .n_head = g->n_head,
        .head_dim = g->head_dim,
        .n_key = engine_keys_max(g),
        .n_index_row = g->index_head != 0 ? g->context / 4 : 0,
        .n_expert = g->n_expert,
    };
}

static cm_status engine_size_kv(rt_engine *e, cm_error *err)
{
    rt_kv_sizes sizes;
    rt_kv_layout_build(e->geometry, e->draft_max, &e->kv);
    rt_kv_sizes_get(e->geometry, e->draft_max, &sizes);
    rt_kv_budget budget = {.kv_bytes = e->options.kv_bytes,
                           .prefix_bytes = e->options.prefix_bytes,
                           .slot_max = e->options.slot_max};
    CM_TRY(rt_kv_count(e->geometry, &sizes, &budget, &e->n_page, &e->n_state, err));
    /* sequences that share a page each list it */
    uint32_t n_seg = e->options.slot_max < e->options.row_max ? e->options.slot_max : e->options.row_max;
    e->page_list_max = e->n_state == 0 ? e->n_page : rt_kv_seq_pages(e->geometry->context) * n_seg;
    return CM_OK;
}

static cm_status engine_open_exchange(rt_engine *e, cm_error *err)
{
    const md_geometry *g = e->geometry;
    net *rows;
    uint64_t row = pr_dispatch_bytes(g->topk, 1, g->d, kn_blocks(g->d, KN_ACT_BLOCK)),
             answer = 2ull * g->topk * g->d;
    uint64_t least = row > answer ? row : answer;
    if (e->options.rows.message_bytes_max < least) {
        return cm_error_set(err, CM_E_CONFIG, "frame_bytes",
                            "frame_bytes %llu cannot hold one row of this model: %llu needed",
                            (unsigned long long)e->options.rows.message_bytes_max, (unsigned long long)least);
    }
    if (e->options.rows_ops != NULL) {
        CM_TRY(net_open_ops(e->options.rows_ops, &e->options.rows, &rows, err));
    } else {
        CM_TRY(net_open(&e->options.rows, &rows, err));
    }
    rt_exchange_options options = {
        .rows = rows,
        .limits = {.row_max = e->options.row_max,
                   .topk = g->topk,
                   .d = g->d,
                   .frame_bytes_max = e->options.rows.message_bytes_max},
        .n_layer = md_block_count(g),
        .n_expert = g->n_expert,
        .answer_ms = e->options.answer_ms,
        .wait_ms = e->options.wait_ms,
        .peer_lost = e->options.peer_lost,
        .ctx = e->options.ctx,
    };
    cm_status status = rt_exchange_create(&options, &e->exchange, err);
    if (status != CM_OK) {
        net_close(rows);
    }
    return status;
}

static void engine_log_sizes(const rt_engine *e)
{
    rt_kv_sizes kv;
    rt_kv_sizes_get(e->geometry, e->draft_max, &kv);
    cm_info("device %s path %s, dense weights %llu MB, %u KV pages of %llu bytes, %u sequence slots of %llu "
            "bytes",
            kn_device_name(e->device), kn_device_isa(e->device),
            (unsigned long long)(e->weights.n_bytes >> 20), e->n_page, (unsigned long long)kv.page_bytes,
            e->options.slot_max, (unsigned long long)kv.slot_bytes);
    cm_mem_resident r = cm_mem_resident_now();
    cm_info("memory: %llu MB of our own, %llu MB of it in huge pages, %llu MB of mapped files",
            (unsigned long long)(r.own_bytes >> 20), (unsigned long long)(r.huge_bytes >> 20),
            (unsigned long long)(r.file_bytes >> 20));
    cm_info("%u states of %llu bytes to go on from", e->n_state, (unsigned long long)kv.kept_bytes);
    cm_info("a token of context takes %.2f bytes, a sequence of %u tokens %u pages and %.2f MB with its slot",
            (double)kv.row_bytes / KN_PAGE_TOKENS, e->geometry->context,
            rt_kv_seq_pages(e->geometry->context),
            (double)rt_kv_seq_bytes(&kv, e->geometry->context) / 1048576.0);
}

cm_status rt_engine_create(const rt_engine_options *options, rt_engine **engine_out, cm_error *err)
{
    kn_limits limits;
    rt_engine *e = cm_alloc(sizeof(*e));
    e->options = *options;
    e->geometry = md_checkpoint_geometry(options->checkpoint);
    const md_geometry *g = e->geometry;
    e->draft_max = g->drafter == MD_DRAFTER_MTP ? options->draft_max : 0;
    cm_status status = kn_device_open(&options->device, &e->device, err);
    if (status != CM_OK) {
        goto err_free;
    }
    engine_kn_limits(e, &limits);
    status = kn_stream_open(e->device, &limits, &e->stream);
    if (status != CM_OK) {
        cm_error_set(err, status, "rows_max", "no memory for scratch of %u rows", limits.n_row);
        goto err_device;
    }
    status = engine_size_kv(e, err);
    if (status == CM_OK) {
        status = rt_weights_open(options->checkpoint, &e->kv, e->device, e->stream, options->device.n_threads,
                                 &e->weights, err);
    }
    if (status != CM_OK) {
        goto err_stream;
    }
    status = rt_buffers_create(e, err);
    if (status != CM_OK) {
        goto err_weights;
    }
    status = engine_open_exchange(e, err);
    if (status != CM_OK) {
        goto err_buffers;
    }
    e->dense = kn_dense(e->device);
    e->attn = kn_attention(e->device);
    e->moe = kn_moe(e->device);
    e->scratch = rt_sample_scratch_create(g->vocab);
    e->masks = rt_masks_create(rt_out_max(e), g->vocab);
    rt_batch_init(&e->host, options->slot_max, options->row_max, e->page_list_max);
    e->host_experts = cm_alloc(sizeof(int32_t) * options->row_max * g->topk);
    e->host_route = cm_alloc(sizeof(float) * options->row_max * g->topk);
    e->host_logits = cm_alloc(sizeof(float) * (size_t)rt_out_max(e) * g->vocab);
    e->host_last = cm_alloc(sizeof(uint32_t) * options->slot_max);
    rt_micro_core_init(&e->micro_core, options->micro_batches);
    engine_log_sizes(e);
    *engine_out = e;
    return CM_OK;

err_buffers:
    rt_buffers_destroy(e);
err_weights:
    rt_weights_close(&e->weights);
err_stream:
    kn_stream_close(e->stream);
err_device:
    kn_device_close(e->device);
err_free:
    cm_free(e);
    return status;
}

void rt_engine_destroy(rt_engine *e)
{
    rt_exchange_destroy(e->exchange);
    rt_buffers_destroy(e);
    rt_weights_close(&e->weights);
    kn_stream_close(e->stream);
    kn_device_close(e->device);
    rt_sample_scratch_destroy(e->scratch);
    rt_masks_destroy(e->masks);
    rt_batch_fini(&e->host);
    cm_free(e->host_experts);
    cm_free(e->host_route);
    cm_free(e->host_logits);
    cm_free(e->host_last);
    cm_free(e);
}

void rt_engine_sched_limits(const rt_engine *e, rt_sched_limits *limits_out)
{
    *limits_out = (rt_sched_limits){
        .slot_max = e->options.slot_max,
        .row_max = e->options.row_max,
        .page_max = e->n_page,
        .page_tokens = KN_PAGE_TOKENS,
        .state_max = e->n_state,
        .context = e->geometry->context,
        .vocab = e->geometry->vocab,
        .draft_max = e->draft_max,
    };
}

const rt_kv_layout *rt_engine_kv(const rt_engine *e)
{
    return &e->kv;
}

rt_exchange *rt_engine_exchange(rt_engine *e)
{
    return e->exchange;
}

void rt_engine_set_tap(rt_engine *e, rt_tap_fn tap, void *ctx)
{
    e->tap = tap;
    e->tap_ctx = ctx;
}

void rt_engine_set_cut(rt_engine *e, rt_cut_fn cut, void *ctx)
{
    e->cut = cut;
    e->cut_ctx = ctx;
}

const float *rt_engine_logits(const rt_engine *e)
{
    return e->host_logits;
}

void rt_tap_at(rt_engine *e, const rt_micro *m, uint32_t layer, rt_tap_point point, kn_ptr data,
               uint64_t row_bytes)
{
    if (__builtin_expect(e->tap != NULL, 0) &&
        layer < e->geometry->n_layer) { /* a guess is no state of the model's */
        cm_status status = kn_stream_sync(e->stream);
        CM_ASSERT(status == CM_OK);
        e->tap(e->tap_ctx, layer, point, e->step, m->row0, kn_mem_host(e->device, data), row_bytes,
               m->batch.n_row);
    }
}

/* ---- the step ---- */

static void engine_place_micro(rt_engine *e, const rt_batch_part *part, rt_micro *m)
{
    rt_buffers_from(e, part->row0, &m->buf);
    m->row0 = part->row0;
    m->pos_end = part->pos_end;
    m->batch = (kn_batch){.segs = kn_at(e->buf.segs, sizeof(kn_seg) * part->seg0),
                          .pages = e->buf.pages,
                          .pos = m->buf.pos,
                          .page_pool = e->page_pool,
                          .page_bytes = e->kv.page_bytes,
                          .n_seg = part->n_seg,
                          .n_row = part->n_row};
    m->host_experts = e->host_experts + (size_t)part->row0 * e->geometry->topk;
    m->host_route = e->host_route + (size_t)part->row0 * e->geometry->topk;
}

void rt_place_rows(rt_engine *e, uint32_t n_micro)
{
    rt_buffers *b = &e->buf;
    rt_batch *host = &e->host;
    uint32_t n_row = host->n_row;
    e->n_pass++;
    e->n_save = 0;
    rt_batch_cut(host, n_micro, e->cut, e->cut_ctx);
    for (uint32_t i = 0; i < n_micro; i++) {
        engine_place_micro(e, &host->parts[i], &e->micros[i]);
    }
    const rt_batch_part *last = &host->parts[n_micro - 1];
    kn_copy_to_device(e->stream, b->ids, host->ids, 4ull * n_row);
    kn_copy_to_device(e->stream, b->pos, host->pos, 4ull * n_row);
    kn_copy_to_device(e->stream, b->segs, host->cut, sizeof(kn_seg) * (last->seg0 + last->n_seg));
    kn_copy_to_device(e->stream, b->pages, host->pages, 4ull * host->n_page);
    e->attn->rope_table(e->stream, e->weights.inv_freq_window, e->geometry->rope_dim / 2, b->pos, n_row,
                        b->cs_window);
    e->attn->rope_table(e->stream, e->weights.inv_freq_compress, e->geometry->rope_dim / 2, b->pos, n_row,
                        b->cs_compress);
}

void rt_step_begin(rt_engine *e, const rt_step *step)
{
    e->step = step;
    rt_batch_fill(&e->host, step, e->slot_pool, e->kv.slot_bytes);
    rt_place_rows(e, rt_micro_core_count(&e->micro_core, step->n_row));
    rt_states_load(e, step);
}

static cm_status engine_block_begin(rt_engine *e, const rt_micro *m, uint32_t layer)
{
    const md_geometry *g = e->geometry;
    const rt_layer *w = &e->weights.layers[layer];
    const rt_buffers *b = &m->buf;
    uint32_t n = m->batch.n_row;
    uint64_t row_bytes = 2ull * g->d, stream_bytes = row_bytes * g->hc;

    rt_tap_at(e, m, layer, RT_TAP_STREAMS_IN, b->x, stream_bytes);
    e->dense->hc_pre(e->stream, &w->hc_attn, b->x, n, b->in, b->post, b->comb);
    e->dense->rmsnorm(e->stream, b->in, w->attn_norm, n, g->d, g->norm_eps, b->in);
    rt_tap_at(e, m, layer, RT_TAP_ATTN_IN, b->in, row_bytes);
    rt_layer_attention(e, m, layer);
    rt_tap_at(e, m, layer, RT_TAP_ATTN_OUT, b->out, row_bytes);
    e->dense->hc_post(e->stream, g->d, g->hc, b->out, b->x, b->post, b->comb, n, b->x);
    rt_tap_at(e, m, layer, RT_TAP_STREAMS_MID, b->x, stream_bytes);

    e->dense->hc_pre(e->stream, &w->hc_ffn, b->x, n, b->in, b->post, b->comb);
    e->dense->rmsnorm(e->stream, b->in, w->ffn_norm, n, g->d, g->norm_eps, b->in);
    rt_tap_at(e, m, layer, RT_TAP_FFN_IN, b->in, row_bytes);
    return rt_layer_moe_begin(e, m, layer);
}

static cm_status engine_block_finish(rt_engine *e, const rt_micro *m, uint32_t layer)
{
    const md_geometry *g = e->geometry;
    const rt_buffers *b = &m->buf;
    uint64_t row_bytes = 2ull * g->d;
    CM_TRY(rt_layer_moe_finish(e, m));
    rt_tap_at(e, m, layer, RT_TAP_FFN_OUT, b->out, row_bytes);
    e->dense->hc_post(e->stream, g->d, g->hc, b->out, b->x, b->post, b->comb, m->batch.n_row, b->x);
    rt_tap_at(e, m, layer, RT_TAP_STREAMS_OUT, b->x, row_bytes * g->hc);
    return CM_OK;
}

/* One micro-batch after another through every layer: those of a sequence that is cut keep its order, and
 * while one's rows fly the other's are computed. */
cm_status rt_blocks(rt_engine *e, uint32_t first, uint32_t end)
{
    cm_status status = CM_OK;
    for (uint32_t l = first; l <= end && status == CM_OK; l++) {
        for (uint32_t i = 0; i < e->host.n_part && status == CM_OK; i++) {
            const rt_micro *m = &e->micros[i];
            status = l > first ? engine_block_finish(e, m, l - 1) : CM_OK;
            if (status == CM_OK && l < end) {
                status = engine_block_begin(e, m, l);
            }
        }
    }
    if (status != CM_OK) {
        rt_exchange_drop(e->exchange);
    }
    return status;
}

cm_status rt_logits(rt_engine *e, kn_ptr norm, uint32_t n)
{
    const md_geometry *g = e->geometry;
    rt_buffers *b = &e->buf;
    CM_ASSERT_MSG(n <= rt_out_max(e), "%u rows give a token, %u at most", n, rt_out_max(e));
    e->dense->rmsnorm(e->stream, b->last, norm, n, g->d, g->norm_eps, b->last);
    e->dense->linear_bf16(e->stream, b->last, &e->weights.head, n, KN_F32, b->logits);
    kn_copy_to_host(e->stream, e->host_logits, b->logits, 4ull * n * g->vocab);
    return kn_stream_sync(e->stream);
}

/* Logits of the rows that give tokens: of every segment with sample the last one and those of its guesses. */
static cm_status engine_head(rt_engine *e, const rt_step *step)
{
    const md_geometry *g = e->geometry;
    rt_buffers *b = &e->buf;
    uint32_t n = 0;
    for (uint32_t i = 0; i < step->n_seg; i++) {
        const rt_step_seg *seg = &step->segs[i];
        if (seg->sample) {
            uint32_t n_out = seg->n_draft + 1;
            uint64_t row = e->host.segs[i].row0 + seg->n_row - n_out;
            e->dense->hc_head(e->stream, &e->weights.hc_head, kn_at(b->x, 2 * row * g->hc * g->d), n_out,
                              kn_at(b->last, 2ull * n * g->d));
            n += n_out;
        }
    }
    return n > 0 ? rt_logits(e, e->weights.norm, n) : kn_stream_sync(e->stream);
}

/* One token after another, as long as the guess before it was right. */
static void engine_sample_seg(rt_engine *e, const rt_step_seg *seg, const float *logits, rt_step_result *out)
{
    const uint32_t *guesses = seg->tokens + seg->n_row - seg->n_draft;
    out->n_draft = 0;
    out->n_token = 0;
    do {
        uint32_t i = out->n_token;
        out->tokens[i] = rt_sample(e->scratch, logits + (size_t)i * e->geometry->vocab, seg, i);
        out->n_token = i + 1;
    } while (out->n_token <= seg->n_draft && guesses[out->n_token - 1] == out->tokens[out->n_token - 1]);
}

static void engine_sample(rt_engine *e, const rt_step *step, rt_step_result *results_out)
{
    uint32_t n = 0, n_row = 0;
    for (uint32_t i = 0; i < step->n_seg; i++) {
        const rt_step_seg *seg = &step->segs[i];
        if (seg->sample) {
            engine_sample_seg(e, seg, e->host_logits + (size_t)n_row * e->geometry->vocab, &results_out[n++]);
            n_row += seg->n_draft + 1;
        }
    }
    CM_ASSERT(n == step->n_sample);
    if (e->tap != NULL) {
        e->tap(e->tap_ctx, e->geometry->n_layer, RT_TAP_LOGITS, step, 0, e->host_logits,
               4ull * e->geometry->vocab, n_row);
    }
}

static cm_status engine_compute(rt_engine *e, const rt_step *step, rt_step_result *results_out)
{
    rt_masks_begin(e->masks, step);
    rt_step_begin(e, step);
    e->dense->embed(e->stream, &e->weights.embed, e->buf.ids, step->n_row, e->geometry->hc, e->buf.x);
    cm_status status = rt_blocks(e, 0, e->geometry->n_layer);
    if (status == CM_OK) {
        status = engine_head(e, step);
    }
    rt_masks_wait(e->masks);
    if (status == CM_OK) {
        engine_sample(e, step, results_out);
        status = e->draft_max > 0 ? rt_draft(e, results_out) : CM_OK;
    }
    return status;
}

cm_status rt_engine_step(rt_engine *e, const rt_step *step, rt_step_result *results_out)
{
    uint64_t start_ns = cm_now_ns(), waited_ns = rt_exchange_waited_ns(e->exchange);
    uint32_t n_micro = rt_micro_core_count(&e->micro_core, step->n_row);
    cm_mem_guard_begin("a step");
    cm_status status = engine_compute(e, step, results_out);
    cm_mem_guard_end();
    if (status == CM_OK) {
        rt_micro_core_observe(&e->micro_core, step->n_row, n_micro, cm_now_ns() - start_ns,
                              rt_exchange_waited_ns(e->exchange) - waited_ns);
    }
    return status;
}
