/* Attention, compressor, indexer: what reads a sequence's state. */
#include "tests/golden/ops_case.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <cmocka.h>

#include "common/base/mem.h"
#include "kernels/kn_math.h"

/* ---- attention ---- */

enum { OP_AHEAD = 3 }; /* spare entries, as speculation wants them */

/* Keys as raw rows of bf16 only (rope = dim), the last one in the batch, the others in the window. */
static void attend_window(op_case *c, uint32_t n, uint32_t pos, uint32_t window)
{
    enum { HEADS = 3, DIM = 512 };
    const kn_attn_ops *ops = kn_attention(c->rig->device);
    kn_stream *s = c->rig->stream;
    uint64_t row_bytes = kn_kv_row_bytes(DIM, DIM);
    const fx_tensor *keys = fx_get(c->file, "n1.in.K"), *sink = fx_get(c->file, "n1.in.sink");
    const fx_tensor *q = fx_get(c->file, "%s.in.q", strcmp(c->name, "sharp") == 0 ? "sharp" : "n1");
    kn_seg seg = {.row0 = 0, .n_row = 1, .pos0 = pos, .slot = rig_new(c->rig, window * row_bytes)};
    kn_attn a = {.layout = {.ratio = 0, .ring = window, .row_bytes = (uint32_t)row_bytes},
                 .sink = rig_up(c->rig, sink->data, sink->n_bytes),
                 .n_head = HEADS,
                 .dim = DIM,
                 .rope = DIM,
                 .window = window};
    kn_batch b = {.segs = rig_up(c->rig, &seg, sizeof(seg)),
                  .pos = rig_up(c->rig, &pos, sizeof(pos)),
                  .n_seg = 1,
                  .n_row = 1};
    kn_ptr rows = rig_new(c->rig, n * row_bytes), o = rig_new(c->rig, HEADS * DIM * 2);
    uint8_t *host = cm_alloc(n * row_bytes);
    ops->kv_pack(s, rig_up(c->rig, keys->data, keys->n_bytes), n, DIM, DIM, rows);
    rig_down(c->rig, host, rows, n * row_bytes);
    for (uint32_t i = 0; i + 1 < n; i++) {
        kn_copy_to_device(s, kn_at(seg.slot, (pos + 1 - n + i) % window * row_bytes), host + i * row_bytes,
                          row_bytes);
    }
    ops->attention(s, &b, &a, rig_up(c->rig, q->data, q->n_bytes), kn_at(rows, (n - 1) * row_bytes),
                   (kn_ptr){0}, o);
    op_check_at(c, "o", o);
    cm_free(host);
}

void op_case_attention(op_case *c)
{
    uint32_t n = (uint32_t)op_attr(c, "keys");
    attend_window(c, n, n - 1, 256); /* all there is */
    attend_window(c, n, 4 * n, n);   /* a full window, far from the start */
    c->n_checked = 1;
}

/* ---- compressor ---- */

typedef struct compressor_run {
    kn_compress c;
    kn_ptr slot, pages, pool, kv, score;
    uint64_t page_bytes, state_bytes, pool_bytes;
    uint32_t n_token, width;
} compressor_run;

static compressor_run compressor_prepare(op_case *c)
{
    uint32_t ratio = (uint32_t)op_attr(c, "ratio"), dim = (uint32_t)op_attr(c, "dim"),
             n = (uint32_t)op_in(c, "x")->dim[0];
    uint32_t n_page = kn_blocks(n, KN_PAGE_TOKENS), list[8];
    float inv_freq[32];
    compressor_run run = {.n_token = n, .width = kn_compress_width(ratio, dim)};
    kn_ptr freq;
    op_inv_freq(c, inv_freq);
    freq = rig_up(c->rig, inv_freq, sizeof(inv_freq));
    run.c = (kn_compress){.ape = op_up(c, "c.ape"),
                          .norm = op_up(c, "c.norm.weight"),
                          .inv_freq = freq,
                          .ratio = ratio,
                          .dim = dim,
                          .rope = 64,
                          .span = kn_compress_span(ratio, OP_AHEAD),
                          .eps = OP_EPS,
                          .index = strncmp(c->name, "index", 5) == 0,
                          .page_rows = 40,
                          .slot_state = 64};
    run.c.row_bytes = run.c.index ? kn_index_row_bytes(dim) : kn_kv_row_bytes(dim, 64);
    run.page_bytes = run.c.page_rows + (uint64_t)KN_PAGE_TOKENS / ratio * run.c.row_bytes;
    run.pool_bytes = run.page_bytes * n_page;
    run.pool = rig_new(c->rig, run.pool_bytes);
    for (uint32_t i = 0; i < n_page; i++) {
        list[i] = n_page - 1 - i;
    }
    run.pages = rig_up(c->rig, list, sizeof(list));
    run.state_bytes = kn_compress_state_bytes(ratio, dim, OP_AHEAD);
    run.slot = rig_new(c->rig, run.c.slot_state + run.state_bytes);
    return run;
}

/* Products of tokens first .. first + n - 1, then compress and commit them as one batch. */
static void compressor_feed(op_case *c, const compressor_run *run, uint32_t first, uint32_t n)
{
    const kn_attn_ops *ops = kn_attention(c->rig->device);
    kn_matrix wkv = op_matrix(c, "c.wkv"), wgate = op_matrix(c, "c.wgate");
    kn_ptr x = rig_up(c->rig, (const uint16_t *)op_in(c, "x")->data + (uint64_t)first * wkv.n_in,
                      2ull * n * wkv.n_in);
    kn_ptr kv = rig_new(c->rig, 4ull * n * run->width), score = rig_new(c->rig, 4ull * n * run->width);
    kn_seg seg = {.row0 = 0, .n_row = n, .pos0 = first, .page0 = 0, .slot = run->slot};
    kn_batch b = {.segs = rig_up(c->rig, &seg, sizeof(seg)),
                  .pages = run->pages,
                  .page_pool = run->pool,
                  .page_bytes = run->page_bytes,
                  .n_seg = 1,
                  .n_row = n};
    op_dense(c)->linear_bf16(c->rig->stream, x, &wkv, n, KN_F32, kv);
    op_dense(c)->linear_bf16(c->rig->stream, x, &wgate, n, KN_F32, score);
    ops->compress(c->rig->stream, &b, &run->c, kv, score);
    ops->compress_commit(c->rig->stream, &b, &run->c, kv, score);
    assert_int_equal(kn_stream_sync(c->rig->stream), CM_OK);
}

static void compressor_check(op_case *c, const compressor_run *run)
{
    uint32_t ratio = run->c.ratio, dim = run->c.dim, n_row = run->n_token / ratio, cut = n_row * ratio;
    uint32_t span = kn_compress_span(ratio, OP_AHEAD), width = run->width, n_tail = run->n_token - cut;
    uint8_t *pool = cm_alloc(run->pool_bytes);
    uint16_t *rows = cm_alloc(2ull * n_row * dim);
    float *state = cm_alloc(run->state_bytes), *part = cm_alloc(4ull * 8 * width);
    uint32_t n_page = kn_blocks(run->n_token, KN_PAGE_TOKENS);
    rig_down(c->rig, pool, run->pool, run->pool_bytes);
    rig_down(c->rig, state, kn_at(run->slot, run->c.slot_state), run->state_bytes);
    for (uint32_t j = 0; j < n_row; j++) {
        uint32_t page = n_page - 1 - j * ratio / KN_PAGE_TOKENS;
        const uint8_t *row = pool + page * run->page_bytes + run->c.page_rows +
                             (uint64_t)(j % (KN_PAGE_TOKENS / ratio)) * run->c.row_bytes;
        if (run->c.index) {
            op_unpack_index(row, dim, rows + (uint64_t)j * dim);
        } else {
            op_unpack_kv(row, dim, 64, rows + (uint64_t)j * dim);
        }
    }
    op_check(c, "rows", rows);
    for (uint32_t i_array = 0; i_array < 2; i_array++) {
        const float *entries = state + (uint64_t)i_array * span * width;
        for (uint32_t i = 0; i < n_tail; i++) {
            memcpy(part + (uint64_t)i * width, entries + (uint64_t)((cut + i) % span) * width, 4ull * width);
        }
        op_check(c, i_array == 0 ? "tail_kv" : "tail_score", part);
        if (ratio == 4) { /* the last whole window's half that feeds the next row */
            for (uint32_t i = 0; i < 4; i++) {
                memcpy(part + (uint64_t)i * dim, entries + (uint64_t)((cut - 4 + i) % span) * width,
                       4ull * dim);
            }
            op_check(c, i_array == 0 ? "overlap_kv" : "overlap_score", part);
        }
    }
    cm_free(part);
    cm_free(state);
    cm_free(rows);
    cm_free(pool);
}

void op_case_compressor(op_case *c)
{
    static const uint32_t chunks[3][8] = {{1}, {1000}, {3, 5, 1, 2, 130, 7, 4, 60}};
    uint8_t *first = NULL;
    for (uint32_t mode = 0; mode < 3; mode++) {
        compressor_run run = compressor_prepare(c);
        uint64_t n_bytes = run.pool_bytes + run.state_bytes;
        uint8_t *all = cm_alloc(n_bytes);
        uint32_t n_held = c->rig->n_held, i = 0;
        for (uint32_t at = 0; at < run.n_token; i++) {
            uint32_t n = chunks[mode][mode == 2 ? i % 8 : 0];
            n = n < run.n_token - at ? n : run.n_token - at;
            compressor_feed(c, &run, at, n);
            at += n;
            while (c->rig->n_held > n_held) {
                kn_mem_free(c->rig->device, c->rig->held[--c->rig->n_held]);
            }
        }
        c->n_checked = 0;
        compressor_check(c, &run);
        rig_down(c->rig, all, run.pool, run.pool_bytes);
        rig_down(c->rig, all + run.pool_bytes, kn_at(run.slot, run.c.slot_state), run.state_bytes);
        if (first == NULL) {
            first = all;
        } else {
            assert_memory_equal(first, all, n_bytes);
            cm_free(all);
        }
    }
    cm_free(first);
}

/* ---- indexer ---- */

/* A row that is FP4 already -> its stored form. */
static void store_index_row(const uint16_t *x, uint32_t dim, uint8_t *row_out)
{
    uint8_t codes[128];
    int64_t exponents[4];
    uint16_t back[128];
    op_quant_fp4(x, dim, codes, exponents);
    for (uint32_t i = 0; i < dim / 2; i++) {
        row_out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    }
    for (uint32_t i = 0; i < dim / KN_FP4_BLOCK; i++) {
        row_out[dim / 2 + i] = (uint8_t)(exponents[i] + 127);
    }
    op_unpack_index(row_out, dim, back);
    for (uint32_t i = 0; i < dim; i++) {
        assert_true(kn_bf16_decode(back[i]) == kn_bf16_decode(x[i]));
    }
}

/* Scores do not leave the operation, but for every k the k best picks must be those of the golden scores:
 * that fixes their whole order, ties included. */
void op_case_index_scores(op_case *c)
{
    enum { N = 5, HEADS = 4, DIM = 128, ROWS = 40, PER_PAGE = 32 };
    const fx_tensor *golden = fx_get(c->file, "%s.out.score", c->name);
    const uint16_t *iq = op_in(c, "iq")->data, *ik = op_in(c, "ik")->data;
    uint32_t row_bytes = kn_index_row_bytes(DIM), list[2] = {1, 0};
    uint8_t queries[N * HEADS * 68], pool[2 * PER_PAGE * 68] = {0};
    kn_kv_layout layout = {.ratio = 4, .index_bytes = row_bytes, .page_index = 0};
    kn_seg segs[N];
    kn_batch b = {.n_seg = N, .n_row = N, .page_bytes = PER_PAGE * row_bytes};
    kn_matrix weights = op_matrix(c, "weights_proj");
    kn_ptr w = rig_new(c->rig, N * HEADS * 2), iq_rows, picks_at = rig_new(c->rig, N * ROWS * 4);
    uint16_t w16[N * HEADS];
    float w32[N * HEADS];
    for (uint32_t i = 0; i < N * HEADS; i++) {
        store_index_row(iq + i * DIM, DIM, queries + i * row_bytes);
    }
    for (uint32_t i = 0; i < ROWS; i++) {
        store_index_row(ik + i * DIM, DIM, pool + (list[i / PER_PAGE] * PER_PAGE + i % PER_PAGE) * row_bytes);
    }
    for (uint32_t i = 0; i < N; i++) {
        segs[i] = (kn_seg){.row0 = i, .n_row = 1, .pos0 = 4 * ROWS - 1};
    }
    b.segs = rig_up(c->rig, segs, sizeof(segs));
    b.pages = rig_up(c->rig, list, sizeof(list));
    b.page_pool = rig_up(c->rig, pool, sizeof(pool));
    iq_rows = rig_up(c->rig, queries, sizeof(queries));
    op_dense(c)->linear_bf16(c->rig->stream, op_up(c, "x"), &weights, N, KN_BF16, w);
    rig_down(c->rig, w16, w, sizeof(w16));
    for (uint32_t i = 0; i < N * HEADS; i++) {
        w32[i] = kn_bf16_decode(w16[i]) * (float)(1.0 / sqrt(DIM * HEADS));
    }
    op_check(c, "w", w32);
    for (uint32_t k = 1; k <= ROWS; k++) {
        int32_t picks[N * ROWS];
        kn_attention(c->rig->device)
            ->index_topk(c->rig->stream, &b, &layout, HEADS, DIM, k, iq_rows, w, picks_at);
        rig_down(c->rig, picks, picks_at, N * k * 4);
        for (uint32_t r = 0; r < N; r++) {
            int32_t best[ROWS];
            bool chosen[ROWS] = {false};
            kn_topk((const float *)golden->data + r * ROWS, ROWS, k, best);
            for (uint32_t i = 0; i < k; i++) {
                chosen[best[i]] = true;
            }
            for (uint32_t i = 0; i < k; i++) {
                assert_true(chosen[picks[r * k + i]]);
                assert_true(i == 0 || picks[r * k + i] > picks[r * k + i - 1]);
            }
        }
    }
    c->n_checked++; /* score */
    for (uint32_t r = 0; r < N; r++) {
        const int64_t *want = (const int64_t *)fx_get(c->file, "%s.out.picks", c->name)->data + r * 8;
        int32_t best[8];
        kn_topk((const float *)golden->data + r * ROWS, ROWS, 8, best);
        for (uint32_t i = 0; i < 8; i++) {
            assert_int_equal(best[i], want[i]);
        }
    }
    c->n_checked++; /* picks */
}

void op_case_topk(op_case *c)
{
    const fx_tensor *score = op_in(c, "score");
    uint32_t n = (uint32_t)score->dim[1], k = (uint32_t)op_attr(c, "topk");
    int64_t picks[5 * 12];
    for (uint32_t r = 0; r < 5; r++) {
        int32_t best[12];
        kn_topk((const float *)score->data + r * n, n, k, best);
        for (uint32_t i = 0; i < k; i++) {
            picks[r * k + i] = best[i];
        }
    }
    op_check(c, "picks", picks);
}
