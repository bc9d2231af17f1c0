/* A layer's attention on every path of the cpu back-end against the oracle, bit for bit: three sequences
 * through all operations in the order of a step, their prompts cut into steps in other ways; and the
 * indexer's choice where scores are equal. One operation at a time is t_kernels'. Usage: t_layers [seed] */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "kernels/kn_math.h"
#include "tests/golden/kernel_rig.h"
#include "tests/unit/kernel_paths.h"
#include "tests/unit/kernel_random.h"

/* ---- attention: three sequences through one layer, all operations in the order of a step ---- */

enum {
    N_SEQ = 3,
    SEQ_PAGES = 6, /* so a sequence has at most 768 tokens */
    DIM = 94,      /* nope 70: a whole KV block and a short one */
    ROPE = 24,
    HEADS = 11,
    WINDOW = 37,
    AHEAD = 3,
    INDEX_DIM = 64,
    INDEX_HEADS = 5,
    TOPK = 19,
};

typedef struct layer {
    kn_attn a;
    kn_compress main, index;
    kn_batch b;
    kn_ptr slots[N_SEQ], pages, inv_freq;
    uint64_t slot_bytes;
    uint32_t length[N_SEQ], done[N_SEQ], page0[N_SEQ];
} layer;

static layer layer_open(rig *r, uint32_t ratio)
{
    layer l = {0};
    kn_kv_layout *kv = &l.a.layout;
    uint32_t list[N_SEQ * SEQ_PAGES], per_page = ratio != 0 ? KN_PAGE_TOKENS / ratio : 0;
    float inv_freq[ROPE / 2];
    kn_rope_inv_freq(160000, ROPE, 16, 256, 32, 1, true, inv_freq);
    l.inv_freq = rig_up(r, inv_freq, sizeof(inv_freq));
    *kv = (kn_kv_layout){.ratio = ratio,
                         .ring = WINDOW + AHEAD,
                         .row_bytes = kn_kv_row_bytes(DIM, ROPE),
                         .index_bytes = kn_index_row_bytes(INDEX_DIM),
                         .page_rows = 24,
                         .slot_raw = 8};
    kv->page_index = kv->page_rows + (uint64_t)per_page * kv->row_bytes;
    kv->slot_main = kv->slot_raw + kv->ring * kv->row_bytes;
    kv->slot_index = kv->slot_main + (ratio != 0 ? kn_compress_state_bytes(ratio, DIM, AHEAD) : 0);
    l.slot_bytes = kv->slot_index + (ratio != 0 ? kn_compress_state_bytes(ratio, INDEX_DIM, AHEAD) : 0);
    l.b.page_bytes = (kv->page_index + (uint64_t)per_page * kv->index_bytes + 7) / 8 * 8;
    l.b.page_pool = rig_new(r, N_SEQ * SEQ_PAGES * l.b.page_bytes);
    for (uint32_t i = 0; i < N_SEQ * SEQ_PAGES; i++) {
        list[i] = (i * 5 + 3) % (N_SEQ * SEQ_PAGES);
    }
    l.b.pages = rig_up(r, list, sizeof(list));
    l.a.sink = random_f32(r, 300, HEADS);
    l.a.n_head = HEADS;
    l.a.dim = DIM;
    l.a.rope = ROPE;
    l.a.window = WINDOW;
    l.a.topk = TOPK;
    if (ratio != 0) {
        l.main = (kn_compress){.ape = random_f32(r, 301, ratio * kn_compress_width(ratio, DIM)),
                               .norm = random_bf16(r, 302, DIM),
                               .inv_freq = l.inv_freq,
                               .ratio = ratio,
                               .dim = DIM,
                               .rope = ROPE,
                               .span = kn_compress_span(ratio, AHEAD),
                               .eps = 1e-6f,
                               .page_rows = kv->page_rows,
                               .slot_state = kv->slot_main,
                               .row_bytes = kv->row_bytes};
        l.index = (kn_compress){.ape = random_f32(r, 303, ratio * kn_compress_width(ratio, INDEX_DIM)),
                                .norm = random_bf16(r, 304, INDEX_DIM),
                                .inv_freq = l.inv_freq,
                                .ratio = ratio,
                                .dim = INDEX_DIM,
                                .rope = ROPE,
                                .span = kn_compress_span(ratio, AHEAD),
                                .eps = 1e-6f,
                                .index = true,
                                .page_rows = kv->page_index,
                                .slot_state = kv->slot_index,
                                .row_bytes = kv->index_bytes};
    }
    for (uint32_t i = 0; i < N_SEQ; i++) {
        l.slots[i] = rig_new(r, l.slot_bytes);
        l.page0[i] = i * SEQ_PAGES;
        l.length[i] = random_between(310 + i, 90, 300);
    }
    return l;
}

/* Values of tokens at .. of a sequence: the same whatever batch they come in. */
static void fill_bf16(rig *r, kn_ptr to, uint64_t key, uint64_t at, uint64_t n)
{
    uint16_t *x = kn_mem_host(r->device, to);
    for (uint64_t i = 0; i < n; i++) {
        x[i] = kn_bf16_encode(random_value(key, at + i));
    }
}

static void fill_f32(rig *r, kn_ptr to, uint64_t key, uint64_t at, uint64_t n)
{
    float *x = kn_mem_host(r->device, to);
    for (uint64_t i = 0; i < n; i++) {
        x[i] = random_value(key, at + i);
    }
}

typedef struct step_rows {
    kn_ptr pos, q, kv, iq, iw, main_kv, main_score, index_kv, index_score;
} step_rows;

static void fill_rows(rig *r, const layer *l, step_rows *s, uint32_t row, uint32_t i_seq, uint32_t at,
                      uint32_t n)
{
    uint64_t key = 400 + 20 * i_seq, main = kn_compress_width(l->a.layout.ratio, DIM);
    uint64_t index = kn_compress_width(l->a.layout.ratio, INDEX_DIM);
    for (uint32_t i = 0; i < n; i++) {
        ((uint32_t *)kn_mem_host(r->device, s->pos))[row + i] = at + i;
    }
    fill_bf16(r, kn_at(s->q, row * 2ull * HEADS * DIM), key, at * (uint64_t)HEADS * DIM,
              n * (uint64_t)HEADS * DIM);
    fill_bf16(r, kn_at(s->kv, row * 2ull * DIM), key + 1, at * DIM, n * DIM);
    fill_bf16(r, kn_at(s->iq, row * 2ull * INDEX_HEADS * INDEX_DIM), key + 2, at * INDEX_HEADS * INDEX_DIM,
              n * INDEX_HEADS * INDEX_DIM);
    fill_bf16(r, kn_at(s->iw, row * 2ull * INDEX_HEADS), key + 3, at * INDEX_HEADS, n * INDEX_HEADS);
    if (l->a.layout.ratio != 0) {
        fill_f32(r, kn_at(s->main_kv, row * 4 * main), key + 4, at * main, n * main);
        fill_f32(r, kn_at(s->main_score, row * 4 * main), key + 5, at * main, n * main);
        fill_f32(r, kn_at(s->index_kv, row * 4 * index), key + 6, at * index, n * index);
        fill_f32(r, kn_at(s->index_score, row * 4 * index), key + 7, at * index, n * index);
    }
}

static void step_compress(rig *r, const layer *l, step_rows *s, bool commit)
{
    const kn_attn_ops *ops = kn_attention(r->device);
    if (l->a.layout.ratio == 0) {
        return;
    }
    if (commit) {
        ops->compress_commit(r->stream, &l->b, &l->main, s->main_kv, s->main_score);
        ops->compress_commit(r->stream, &l->b, &l->index, s->index_kv, s->index_score);
    } else {
        ops->compress(r->stream, &l->b, &l->index, s->index_kv, s->index_score);
        ops->compress(r->stream, &l->b, &l->main, s->main_kv, s->main_score);
    }
}

/* One step with up to `chunk` rows of every sequence; o of token t of sequence i goes to o_out[i] at t. */
static bool layer_step(rig *r, layer *l, uint32_t chunk, uint16_t *const *o_out, int32_t *const *picks_out)
{
    const kn_attn_ops *ops = kn_attention(r->device);
    uint32_t n_held = r->n_held, seq_of[N_SEQ], ratio = l->a.layout.ratio, half = ROPE / 2;
    uint64_t n_max = (uint64_t)N_SEQ * (chunk == 0 ? 300 : chunk), n;
    uint64_t main = ratio != 0 ? kn_compress_width(ratio, DIM) : 0, o_row = HEADS * DIM;
    uint64_t index = ratio != 0 ? kn_compress_width(ratio, INDEX_DIM) : 0;
    kn_seg segs[N_SEQ];
    step_rows s = {rig_new(r, n_max * 4),
                   rig_new(r, n_max * 2 * o_row),
                   rig_new(r, n_max * 2 * DIM),
                   rig_new(r, n_max * 2 * INDEX_HEADS * INDEX_DIM),
                   rig_new(r, n_max * 2 * INDEX_HEADS),
                   rig_new(r, n_max * 4 * main),
                   rig_new(r, n_max * 4 * main),
                   rig_new(r, n_max * 4 * index),
                   rig_new(r, n_max * 4 * index)};
    kn_ptr cs = rig_new(r, n_max * half * 8), rows = rig_new(r, n_max * l->a.layout.row_bytes);
    kn_ptr iq = rig_new(r, n_max * INDEX_HEADS * kn_index_row_bytes(INDEX_DIM));
    kn_ptr picks = rig_new(r, n_max * TOPK * 4), o = rig_new(r, n_max * 2 * o_row);
    l->b.n_seg = l->b.n_row = 0;
    for (uint32_t i = 0; i < N_SEQ; i++) {
        uint32_t count = next_cut(chunk, l->done[i], l->length[i]);
        if (count > 0) {
            fill_rows(r, l, &s, l->b.n_row, i, l->done[i], count);
            seq_of[l->b.n_seg] = i;
            segs[l->b.n_seg++] = (kn_seg){.row0 = l->b.n_row,
                                          .n_row = count,
                                          .pos0 = l->done[i],
                                          .page0 = l->page0[i],
                                          .slot = l->slots[i]};
            l->b.n_row += count;
        }
    }
    n = l->b.n_row;
    l->b.segs = rig_up(r, segs, sizeof(segs));
    l->b.pos = s.pos;
    if (n > 0) {
        ops->rope_table(r->stream, l->inv_freq, half, s.pos, (uint32_t)n, cs);
        ops->rope(r->stream, s.q, (uint32_t)n, HEADS, DIM, half, cs, false);
        ops->rope(r->stream, s.kv, (uint32_t)n, 1, DIM, half, cs, false);
        ops->rope(r->stream, s.iq, (uint32_t)n, INDEX_HEADS, INDEX_DIM, half, cs, true);
        ops->kv_pack(r->stream, s.kv, (uint32_t)n, DIM, ROPE, rows);
        ops->index_pack(r->stream, s.iq, (uint32_t)n, INDEX_HEADS, INDEX_DIM, iq);
        step_compress(r, l, &s, false);
        if (ratio == 4) {
            ops->index_topk(r->stream, &l->b, &l->a.layout, INDEX_HEADS, INDEX_DIM, TOPK, iq, s.iw, picks);
        }
        ops->attention(r->stream, &l->b, &l->a, s.q, rows, ratio == 4 ? picks : (kn_ptr){0}, o);
        ops->raw_commit(r->stream, &l->b, &l->a, rows);
        step_compress(r, l, &s, true);
    }
    for (uint32_t g = 0; g < l->b.n_seg; g++) {
        uint32_t i = seq_of[g], row0 = segs[g].row0;
        rig_down(r, o_out[i] + l->done[i] * o_row, kn_at(o, row0 * 2 * o_row), segs[g].n_row * 2 * o_row);
        rig_down(r, picks_out[i] + (uint64_t)l->done[i] * TOPK, kn_at(picks, row0 * 4ull * TOPK),
                 segs[g].n_row * 4ull * TOPK);
        l->done[i] += segs[g].n_row;
    }
    while (r->n_held > n_held) {
        kn_mem_free(r->device, r->held[--r->n_held]);
    }
    return n > 0;
}

static void do_layer(rig *r, uint32_t ratio, uint32_t cut, cm_bytes *out)
{
    layer l = layer_open(r, ratio);
    uint16_t *o[N_SEQ];
    int32_t *picks[N_SEQ];
    for (uint32_t i = 0; i < N_SEQ; i++) {
        o[i] = cm_alloc(2ull * l.length[i] * HEADS * DIM);
        picks[i] = cm_alloc(4ull * l.length[i] * TOPK);
    }
    while (layer_step(r, &l, cut * 7, o, picks)) {
    }
    for (uint32_t i = 0; i < N_SEQ; i++) {
        cm_bytes_append(out, o[i], 2ull * l.length[i] * HEADS * DIM);
        cm_bytes_append(out, picks[i], 4ull * l.length[i] * TOPK);
        keep(r, out, l.slots[i], l.slot_bytes);
        cm_free(o[i]);
        cm_free(picks[i]);
    }
    keep(r, out, l.b.page_pool, N_SEQ * SEQ_PAGES * l.b.page_bytes);
}

static void do_layer_window(rig *r, uint32_t cut, cm_bytes *out)
{
    do_layer(r, 0, cut, out);
}

static void do_layer_4(rig *r, uint32_t cut, cm_bytes *out)
{
    do_layer(r, 4, cut, out);
}

static void do_layer_128(rig *r, uint32_t cut, cm_bytes *out)
{
    do_layer(r, 128, cut, out);
}

/* Many rows, scores from few values: ties everywhere, every pick by the tie rule. One row has NaNs among its
 * scores, one nothing else, two nothing else but of both signs, by which of its lanes had one first. */
static void do_index_ties(rig *r, uint32_t cut, cm_bytes *out)
{
    enum { N = 5, ROWS = 3001, KS = 4 };
    static const uint32_t topk[KS] = {1, 64, 1024, 3000};
    uint32_t row_bytes = kn_index_row_bytes(INDEX_DIM), n_page = kn_blocks(ROWS, 32), list[100], b;
    uint8_t *pool = cm_alloc(n_page * 32ull * row_bytes), queries[N * INDEX_HEADS * 34] = {0};
    kn_kv_layout layout = {.ratio = 4, .index_bytes = row_bytes};
    kn_seg segs[N];
    kn_batch batch = {.n_seg = N, .n_row = N, .page_bytes = 32ull * row_bytes};
    kn_ptr picks = rig_new(r, N * 3000 * 4), w = random_bf16(r, 500, N * INDEX_HEADS), iq;
    uint16_t *weights = kn_mem_host(r->device, w);
    assert_int_equal(row_bytes, 34);
    weights[INDEX_HEADS] = 0x7f80; /* scores of row 1 are infinite, or NaN where this head has 0 */
    weights[2 * INDEX_HEADS] = 0xffc0;
    weights[3 * INDEX_HEADS] = weights[4 * INDEX_HEADS + 1] = 0x7f80;
    weights[3 * INDEX_HEADS + 1] = weights[4 * INDEX_HEADS] = 0x7fc0;
    for (uint32_t i = 0; i < n_page * 32; i++) {
        memset(pool + i * row_bytes, 0, row_bytes);
        pool[i * row_bytes + random_u32(501, i) % 3] = (uint8_t)(random_u32(502, i) % 3);
        memset(pool + i * row_bytes + INDEX_DIM / 2, 127, 2);
    }
    for (uint32_t i = 0; i < N * INDEX_HEADS; i++) {
        memset(queries + i * row_bytes, 0x2a, 3);
        memset(queries + i * row_bytes + INDEX_DIM / 2, 126, 2);
    }
    for (uint32_t i = 0; i < n_page; i++) {
        list[i] = n_page - 1 - i;
    }
    for (uint32_t i = 0; i < N; i++) {
        segs[i] = (kn_seg){.row0 = i, .n_row = 1, .pos0 = 4 * (ROWS - i) - 1};
    }
    batch.segs = rig_up(r, segs, sizeof(segs));
    batch.pages = rig_up(r, list, n_page * 4);
    batch.page_pool = rig_up(r, pool, n_page * 32ull * row_bytes);
    iq = rig_up(r, queries, sizeof(queries));
    for (uint32_t k = 0; k < KS; k++) {
        for (uint32_t at = 0; at < N; at += b) {
            kn_batch part = batch;
            b = next_cut(cut, at, N);
            part.segs = kn_at(batch.segs, at * sizeof(kn_seg));
            part.n_seg = part.n_row = b;
            kn_attention(r->device)->index_topk(r->stream, &part, &layout, INDEX_HEADS, INDEX_DIM, topk[k],
                                                iq, w, picks);
        }
        keep(r, out, picks, N * 4ull * topk[k]);
    }
    cm_free(pool);
}

/* ---- ref against every path ---- */

PATH_TEST(layer_window, SMALL_DIMS)
PATH_TEST(layer_4, SMALL_DIMS)
PATH_TEST(layer_128, SMALL_DIMS)
PATH_TEST(index_ties, SMALL_DIMS)

static void test_ref_cuts(void **state)
{
    (void)state;
    compare_ref_cuts(do_layer_4, &SMALL_DIMS);
    compare_ref_cuts(do_layer_128, &SMALL_DIMS);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layer_window), cmocka_unit_test(test_layer_4),
        cmocka_unit_test(test_layer_128),    cmocka_unit_test(test_index_ties),
        cmocka_unit_test(test_ref_cuts),
    };
    if (argc > 1) {
        random_seed = strtoull(argv[1], NULL, 0);
    }
    print_message("seed %llu\n", (unsigned long long)random_seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
