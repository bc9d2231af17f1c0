#include "common/base/mem.h"
#include "router/engine/engine_private.h"

/* Every buffer is one row here: what it is, and its bytes from the geometry. */
typedef struct buffer_row {
    kn_ptr *at;
    uint64_t n_bytes;
} buffer_row;

enum { BUFFER_ROWS = 48 };

static uint64_t u64_max(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static uint32_t buffer_table(rt_engine *engine, buffer_row rows[BUFFER_ROWS])
{
    const md_geometry *g = engine->geometry;
    rt_buffers *b = &engine->buf;
    uint64_t n = engine->options.row_max, n_slot = engine->options.slot_max,
             o_width = (uint64_t)g->o_groups * g->o_rank;
    uint64_t wide = u64_max(g->d, o_width);
    uint32_t row_bytes = kn_kv_row_bytes(g->head_dim, g->rope_dim), k = 0;
#define BUFFER(ptr_, bytes_) rows[k++] = (buffer_row){&(ptr_), (bytes_)}
    BUFFER(b->ids, 4 * n);
    BUFFER(b->pos, 4 * n);
    BUFFER(b->segs, sizeof(kn_seg) * n_slot);
    BUFFER(b->pages, 4ull * engine->page_list_max);
    BUFFER(b->x, 2 * n * g->hc * g->d);
    BUFFER(b->in, 2 * n * g->d);
    BUFFER(b->out, 2 * n * g->d);
    BUFFER(b->post, 4 * n * g->hc);
    BUFFER(b->comb, 4 * n * g->hc * g->hc);
    BUFFER(b->q8.codes, n * wide);
    BUFFER(b->q8.scales, n * kn_blocks((uint32_t)wide, KN_ACT_BLOCK));
    BUFFER(b->q8_low.codes, n * g->q_rank);
    BUFFER(b->q8_low.scales, n * kn_blocks(g->q_rank, KN_ACT_BLOCK));
    BUFFER(b->qr, 2 * n * g->q_rank);
    BUFFER(b->q, 2 * n * g->n_head * g->head_dim);
    BUFFER(b->kv, 2 * n * g->head_dim);
    BUFFER(b->rows, n * row_bytes);
    BUFFER(b->o, 2 * n * g->n_head * g->head_dim);
    BUFFER(b->t, 2 * n * o_width);
    BUFFER(b->ckv, 4 * n * 2 * g->head_dim);
    BUFFER(b->cscore, 4 * n * 2 * g->head_dim);
    BUFFER(b->ikv, 4 * n * 2 * g->index_dim);
    BUFFER(b->iscore, 4 * n * 2 * g->index_dim);
    BUFFER(b->iq, 2 * n * g->index_head * g->index_dim);
    BUFFER(b->iq_rows, n * g->index_head * (g->index_dim != 0 ? kn_index_row_bytes(g->index_dim) : 0));
    BUFFER(b->iw, 2 * n * g->index_head);
    BUFFER(b->picks, 4 * n * g->index_topk);
    BUFFER(b->cs_window, 4 * n * g->rope_dim);
    BUFFER(b->cs_compress, 4 * n * g->rope_dim);
    BUFFER(b->experts, 4 * n * g->topk);
    BUFFER(b->route, 4 * n * g->topk);
    BUFFER(b->g, 2 * n * g->inner);
    BUFFER(b->u, 2 * n * g->inner);
    BUFFER(b->h, 2 * n * g->inner);
    BUFFER(b->q8_h.codes, n * g->inner);
    BUFFER(b->q8_h.scales, n * kn_blocks(g->inner, KN_ACT_BLOCK));
    BUFFER(b->shared, 2 * n * g->d);
    BUFFER(b->slots, 2 * n * g->topk * g->d);
    BUFFER(b->last, 2ull * rt_out_max(engine) * g->d);
    BUFFER(b->logits, 4ull * rt_out_max(engine) * g->vocab);
    BUFFER(engine->slot_pool, n_slot * engine->kv.slot_bytes);
    BUFFER(engine->kept_pool, engine->n_state * engine->kv.kept_bytes);
    BUFFER(engine->page_pool, engine->n_page * engine->kv.page_bytes);
#undef BUFFER
    return k;
}

cm_status rt_buffers_create(rt_engine *engine, cm_error *err)
{
    buffer_row rows[BUFFER_ROWS];
    uint32_t n = buffer_table(engine, rows);
    uint64_t total = 0;
    for (uint32_t i = 0; i < n; i++) {
        total += rows[i].n_bytes;
    }
    for (uint32_t i = 0; i < n; i++) {
        cm_status status = kn_mem_alloc(engine->device, rows[i].n_bytes, rows[i].at);
        if (status != CM_OK) {
            rt_buffers_destroy(engine);
            return cm_error_set(err, status, "rows_max",
                                "no device memory for %llu bytes of buffers: lower rows_max (%u), "
                                "sequences_max (%u), kv_bytes or prefix_bytes",
                                (unsigned long long)total, engine->options.row_max, engine->options.slot_max);
        }
    }
    return CM_OK;
}

void rt_buffers_destroy(rt_engine *engine)
{
    buffer_row rows[BUFFER_ROWS];
    uint32_t n = buffer_table(engine, rows);
    for (uint32_t i = 0; i < n; i++) {
        kn_mem_free(engine->device, *rows[i].at);
        *rows[i].at = (kn_ptr){0};
    }
}
