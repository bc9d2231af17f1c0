/* The two sites of a layer (model sections 3 to 6), as sequences of operations. Arithmetic is in kernels; the
 * order here is the model's: raw row, compressors, indexer, then attention over all of them. */
#include "router/engine/engine_private.h"

#include "common/base/assert.h"

/* ---- attention ---- */

static void layer_query(rt_engine *e, const rt_micro *m, const rt_layer *w)
{
    const md_geometry *g = e->geometry;
    const rt_buffers *b = &m->buf;
    uint32_t n = m->batch.n_row;
    kn_ptr cs = w->attn.layout.ratio == 0 ? b->cs_window : b->cs_compress;
    e->dense->linear_q8(e->stream, b->q8, &w->wq_a, n, b->qr);
    e->dense->rmsnorm(e->stream, b->qr, w->q_norm, n, g->q_rank, g->norm_eps, b->qr);
    e->dense->quant_act(e->stream, b->qr, n, g->q_rank, b->q8_low);
    e->dense->linear_q8(e->stream, b->q8_low, &w->wq_b, n, b->q);
    e->dense->rmsnorm(e->stream, b->q, (kn_ptr){0}, n * g->n_head, g->head_dim, g->norm_eps, b->q);
    e->attn->rope(e->stream, b->q, n, g->n_head, g->head_dim, g->rope_dim / 2, cs, false);
}

static void layer_raw_row(rt_engine *e, const rt_micro *m, const rt_layer *w)
{
    const md_geometry *g = e->geometry;
    const rt_buffers *b = &m->buf;
    uint32_t n = m->batch.n_row;
    kn_ptr cs = w->attn.layout.ratio == 0 ? b->cs_window : b->cs_compress;
    e->dense->linear_q8(e->stream, b->q8, &w->wkv, n, b->kv);
    e->dense->rmsnorm(e->stream, b->kv, w->kv_norm, n, g->head_dim, g->norm_eps, b->kv);
    e->attn->rope(e->stream, b->kv, n, 1, g->head_dim, g->rope_dim / 2, cs, false);
    e->attn->kv_pack(e->stream, b->kv, n, g->head_dim, g->rope_dim, b->rows);
}

static void layer_compress(rt_engine *e, const rt_micro *m, const rt_compressor *c, kn_ptr kv, kn_ptr score)
{
    uint32_t n = m->batch.n_row;
    e->dense->linear_bf16(e->stream, m->buf.in, &c->wkv, n, KN_F32, kv);
    e->dense->linear_bf16(e->stream, m->buf.in, &c->wgate, n, KN_F32, score);
    e->attn->compress(e->stream, &m->batch, &c->kn, kv, score);
}

static void layer_index_query(rt_engine *e, const rt_micro *m, const rt_layer *w)
{
    const md_geometry *g = e->geometry;
    const rt_buffers *b = &m->buf;
    uint32_t n = m->batch.n_row;
    e->dense->linear_q8(e->stream, b->q8_low, &w->index_wq_b, n, b->iq);
    e->attn->rope(e->stream, b->iq, n, g->index_head, g->index_dim, g->rope_dim / 2, b->cs_compress, false);
    e->attn->index_pack(e->stream, b->iq, n, g->index_head, g->index_dim, b->iq_rows);
    e->dense->linear_bf16(e->stream, b->in, &w->index_weights, n, KN_BF16, b->iw);
}

/* Until some row sees more keys than it may pick, nobody reads a query. */
static void layer_index(rt_engine *e, const rt_micro *m, const rt_layer *w)
{
    const md_geometry *g = e->geometry;
    const rt_buffers *b = &m->buf;
    if (m->pos_end / w->attn.layout.ratio > g->index_topk) {
        layer_index_query(e, m, w);
    }
    e->attn->index_topk(e->stream, &m->batch, &w->attn.layout, g->index_head, g->index_dim, g->index_topk,
                        b->iq_rows, b->iw, b->picks);
}

void rt_layer_attention(rt_engine *e, const rt_micro *m, uint32_t layer)
{
    const md_geometry *g = e->geometry;
    const rt_layer *w = &e->weights.layers[layer];
    const rt_buffers *b = &m->buf;
    uint32_t n = m->batch.n_row, ratio = w->attn.layout.ratio;
    kn_ptr cs = ratio == 0 ? b->cs_window : b->cs_compress;

    e->dense->quant_act(e->stream, b->in, n, g->d, b->q8);
    layer_query(e, m, w);
    layer_raw_row(e, m, w);
    if (ratio == 4) {
        layer_compress(e, m, &w->index, b->ikv,
                       b->iscore); /* also when every row will be picked: later queries need the keys */
        layer_index(e, m, w);
        rt_tap_at(e, m, layer, RT_TAP_PICKS, b->picks, 4ull * g->index_topk);
    }
    if (ratio != 0) {
        layer_compress(e, m, &w->main, b->ckv, b->cscore);
    }
    rt_exchange_poll(e->exchange);
    e->attn->attention(e->stream, &m->batch, &w->attn, b->q, b->rows, ratio == 4 ? b->picks : (kn_ptr){0},
                       b->o);
    e->attn->rope(e->stream, b->o, n, g->n_head, g->head_dim, g->rope_dim / 2, cs, true);
    rt_exchange_poll(e->exchange);
    e->dense->linear_grouped(e->stream, b->o, &w->wo_a, g->o_groups, n, b->t);
    e->dense->quant_act(e->stream, b->t, n, g->o_groups * g->o_rank, b->q8);
    e->dense->linear_q8(e->stream, b->q8, &w->wo_b, n, b->out);

    rt_states_save(e, m, layer);
    e->attn->raw_commit(e->stream, &m->batch, &w->attn, b->rows);
    if (ratio == 4) {
        e->attn->compress_commit(e->stream, &m->batch, &w->index.kn, b->ikv, b->iscore);
    }
    if (ratio != 0) {
        e->attn->compress_commit(e->stream, &m->batch, &w->main.kn, b->ckv, b->cscore);
    }
}

/* ---- mixture of experts ---- */

void rt_layer_shared(rt_engine *e, const rt_micro *m, const rt_layer *w)
{
    const md_geometry *g = e->geometry;
    const rt_buffers *b = &m->buf;
    uint32_t n = m->batch.n_row;
    e->dense->linear_q8(e->stream, b->q8, &w->shared_w1, n, b->g);
    e->dense->linear_q8(e->stream, b->q8, &w->shared_w3, n, b->u);
    rt_exchange_poll(e->exchange);
    e->moe->swiglu(e->stream, b->g, b->u, (kn_ptr){0}, n, g->inner, g->swiglu_limit, b->h);
    e->dense->quant_act(e->stream, b->h, n, g->inner, b->q8_h);
    e->dense->linear_q8(e->stream, b->q8_h, &w->shared_w2, n, b->shared);
}

static uint32_t layer_flight(const rt_engine *e, const rt_micro *m)
{
    return (uint32_t)(m - e->micros);
}

cm_status rt_layer_moe_begin(rt_engine *e, const rt_micro *m, uint32_t layer)
{
    const md_geometry *g = e->geometry;
    const rt_layer *w = &e->weights.layers[layer];
    const rt_buffers *b = &m->buf;
    uint32_t n = m->batch.n_row;

    e->moe->gate(e->stream, &w->gate, b->in, b->ids, n, b->experts, b->route);
    e->dense->quant_act(e->stream, b->in, n, g->d, b->q8);
    kn_copy_to_host(e->stream, m->host_experts, b->experts, 4ull * n * g->topk);
    kn_copy_to_host(e->stream, m->host_route, b->route, 4ull * n * g->topk);
    CM_TRY(kn_stream_sync(e->stream));
    rt_tap_at(e, m, layer, RT_TAP_EXPERTS, b->experts, 4ull * g->topk);
    rt_tap_at(e, m, layer, RT_TAP_ROUTE, b->route, 4ull * g->topk);

    rt_exchange_begin(e->exchange, layer_flight(e, m),
                      &(rt_xcore_layer){
                          .step = e->n_pass,
                          .layer = layer,
                          .n_row = n,
                          .experts = m->host_experts,
                          .weights = m->host_route,
                          .codes = kn_mem_host(e->device, b->q8.codes),
                          .scales = kn_mem_host(e->device, b->q8.scales),
                          .results = kn_mem_host(e->device, b->slots),
                      });
    rt_layer_shared(e, m, w);
    return CM_OK;
}

cm_status rt_layer_moe_finish(rt_engine *e, const rt_micro *m)
{
    const md_geometry *g = e->geometry;
    const rt_buffers *b = &m->buf;
    CM_TRY(rt_exchange_finish(e->exchange, layer_flight(e, m)));
    e->moe->combine(e->stream, b->slots, b->experts, b->shared, m->batch.n_row, g->topk, g->d, b->out);
    return CM_OK;
}
