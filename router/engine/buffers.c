#include "common/base/mem.h"
#include "router/engine/engine_private.h"

/* Every buffer is one row here: what it is, and its bytes from the geometry. */
typedef struct buffer_row {
    kn_ptr *at;
    uint64_t n_bytes;
    uint64_t row_bytes; /* 0: not counted by rows of a step */
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
#define ROWS(ptr_, row_bytes_) rows[k++] = (buffer_row){&(ptr_), n * (row_bytes_), (row_bytes_)}
#define WHOLE(ptr_, bytes_)                                                                                  \
    rows[k++] = (buffer_row)                                                                                 \
    {                                                                                                        \
        &(ptr_), (bytes_), 0                                                                                 \
    }
    ROWS(b->ids, 4);
    ROWS(b->pos, 4);
    WHOLE(b->segs, sizeof(kn_seg) * (n_slot + 1));
    WHOLE(b->pages, 4ull * engine->page_list_max);
    ROWS(b->x, 2 * g->hc * g->d);
    ROWS(b->in, 2 * g->d);
    ROWS(b->out, 2 * g->d);
    ROWS(b->post, 4 * g->hc);
    ROWS(b->comb, 4 * g->hc * g->hc);
    ROWS(b->q8.codes, wide);
    ROWS(b->q8.scales, kn_blocks((uint32_t)wide, KN_ACT_BLOCK));
    ROWS(b->q8_low.codes, g->q_rank);
    ROWS(b->q8_low.scales, kn_blocks(g->q_rank, KN_ACT_BLOCK));
    ROWS(b->qr, 2 * g->q_rank);
    ROWS(b->q, 2 * g->n_head * g->head_dim);
    ROWS(b->kv, 2 * g->head_dim);
    ROWS(b->rows, row_bytes);
    ROWS(b->o, 2 * g->n_head * g->head_dim);
    ROWS(b->t, 2 * o_width);
    ROWS(b->ckv, 4 * 2 * g->head_dim);
    ROWS(b->cscore, 4 * 2 * g->head_dim);
    ROWS(b->ikv, 4 * 2 * g->index_dim);
    ROWS(b->iscore, 4 * 2 * g->index_dim);
    ROWS(b->iq, 2 * g->index_head * g->index_dim);
    ROWS(b->iq_rows, g->index_head * (g->index_dim != 0 ? kn_index_row_bytes(g->index_dim) : 0));
    ROWS(b->iw, 2 * g->index_head);
    ROWS(b->picks, 4 * g->index_topk);
    ROWS(b->cs_window, 4 * g->rope_dim);
    ROWS(b->cs_compress, 4 * g->rope_dim);
    ROWS(b->experts, 4 * g->topk);
    ROWS(b->route, 4 * g->topk);
    ROWS(b->g, 2 * g->inner);
    ROWS(b->u, 2 * g->inner);
    ROWS(b->h, 2 * g->inner);
    ROWS(b->q8_h.codes, g->inner);
    ROWS(b->q8_h.scales, kn_blocks(g->inner, KN_ACT_BLOCK));
    ROWS(b->shared, 2 * g->d);
    ROWS(b->slots, 2 * g->topk * g->d);
    WHOLE(b->last, 2ull * rt_out_max(engine) * g->d);
    WHOLE(b->logits, 4ull * rt_out_max(engine) * g->vocab);
    WHOLE(engine->slot_pool, n_slot * engine->kv.slot_bytes);
    WHOLE(engine->kept_pool, engine->n_state * engine->kv.kept_bytes);
    WHOLE(engine->page_pool, engine->n_page * engine->kv.page_bytes);
#undef ROWS
#undef WHOLE
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

void rt_buffers_from(rt_engine *engine, uint32_t row0, rt_buffers *buffers_out)
{
    buffer_row rows[BUFFER_ROWS];
    uint32_t n = buffer_table(engine, rows);
    const rt_buffers *all = &engine->buf;
    *buffers_out = *all;
    for (uint32_t i = 0; i < n; i++) {
        if (rows[i].row_bytes != 0) {
            ptrdiff_t at = rows[i].at - (const kn_ptr *)all;
            ((kn_ptr *)buffers_out)[at] = kn_at(*rows[i].at, row0 * rows[i].row_bytes);
        }
    }
}
