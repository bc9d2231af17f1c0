/* The indexer and attention of every cpu path against the oracle, bit for bit, where their fast paths part
 * from their slow ones: numbers of heads, dims and keys around every tile, scales that lie close together or
 * far apart, scores that are equal, negative, zero or -0, codes and scales that are NaN or out of range. One
 * and three threads, and every batch cut into calls in other ways. Usage: t_attention [seed] */
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

enum { N_ROW = 11, PAGE_ROWS = KN_PAGE_TOKENS / 4 };

static kn_ptr shuffled_pages(rig *r, uint32_t n)
{
    uint32_t list[64];
    assert_true(n <= 64);
    for (uint32_t i = 0; i < n; i++) {
        list[i] = n - 1 - i;
    }
    return rig_up(r, list, n * sizeof(list[0]));
}

/* ---- the indexer ---- */

/* How the scales of a row's blocks lie. */
typedef enum scales {
    SCALES_EQUAL,
    SCALES_NEAR,  /* as far apart as one integer sum of VNNI's allows */
    SCALES_PAST,  /* one step further, now and then */
    SCALES_NEAR2, /* as far apart as one integer sum of AVX2's allows */
    SCALES_PAST2, /* one step further, now and then */
    SCALES_FAR,   /* anywhere */
    SCALES_LEAST, /* the smallest: scores that are -0 as float32 */
    SCALES_NAN,   /* some */
    SCALES_N
} scales;

static uint8_t scale_byte(scales kind, uint64_t key, uint64_t i)
{
    uint32_t u = random_u32(key, i);
    switch (kind) {
    case SCALES_NEAR:
        return (uint8_t)(120 + u % 4);
    case SCALES_PAST:
        return (uint8_t)(120 + u % 4 + (u >> 8) % 16 / 15);
    case SCALES_NEAR2:
        return (uint8_t)(120 + u % 8);
    case SCALES_PAST2:
        return (uint8_t)(120 + u % 8 + (u >> 8) % 16 / 15);
    case SCALES_FAR:
        return (uint8_t)((u >> 8) % 3 == 0 ? u % 255 : 100 + u % 40);
    case SCALES_LEAST:
        return (uint8_t)(u % 2);
    case SCALES_NAN:
        return (uint8_t)(u % 40 == 0 ? 255 : 120 + u % 3);
    default:
        return 121;
    }
}

/* n stored rows of random codes. */
static kn_ptr random_index_rows(rig *r, uint64_t key, uint64_t n, uint32_t dim, scales kind)
{
    uint32_t row = kn_index_row_bytes(dim), n_scale = kn_blocks(dim, KN_FP4_BLOCK);
    kn_ptr rows = random_bytes(r, key, n * row, 0, 256);
    for (uint64_t i = 0; i < n; i++) {
        for (uint32_t b = 0; b < n_scale; b++) {
            ((uint8_t *)kn_mem_host(r->device, rows))[i * row + dim / 2 + b] =
                scale_byte(kind, key + 1, i * n_scale + b);
        }
    }
    return rows;
}

typedef enum weights { WEIGHTS_ANY, WEIGHTS_NEGATIVE, WEIGHTS_ZERO, WEIGHTS_N } weights;

static kn_ptr random_weights(rig *r, uint64_t key, uint64_t n, weights kind)
{
    kn_ptr w = random_bf16(r, key, n);
    uint16_t *x = kn_mem_host(r->device, w);
    for (uint64_t i = 0; i < n; i++) {
        x[i] = kind == WEIGHTS_NEGATIVE ? x[i] | 0x8000
               : kind == WEIGHTS_ZERO   ? (uint16_t)(i % 2 << 15)
                                        : x[i];
    }
    return w;
}

/* Picks of N_ROW rows that follow one another, the last of which sees `visible` keys. */
static void pick(rig *r, uint32_t cut, cm_bytes *out, uint32_t heads, uint32_t dim, uint32_t visible,
                 uint32_t topk, kn_ptr keys, kn_ptr iq, kn_ptr w)
{
    uint32_t row = kn_index_row_bytes(dim), n_page = kn_blocks(visible, PAGE_ROWS), b;
    uint32_t pos0 = 4 * visible - N_ROW;
    kn_kv_layout layout = {.ratio = 4, .index_bytes = row};
    kn_ptr picks = rig_new(r, 4ull * N_ROW * topk), pages = shuffled_pages(r, n_page);
    memset(kn_mem_host(r->device, picks), 0x55, 4ull * N_ROW * topk);
    for (uint32_t at = 0; at < N_ROW; at += b) {
        b = next_cut(cut, at, N_ROW);
        kn_seg seg = {.n_row = b, .pos0 = pos0 + at};
        kn_batch batch = {.segs = rig_up(r, &seg, sizeof(seg)),
                          .pages = pages,
                          .page_pool = keys,
                          .page_bytes = (uint64_t)PAGE_ROWS * row,
                          .n_seg = 1,
                          .n_row = b};
        kn_attention(r->device)->index_topk(r->stream, &batch, &layout, heads, dim, topk,
                                            kn_at(iq, (uint64_t)at * heads * row),
                                            kn_at(w, 2ull * at * heads), kn_at(picks, 4ull * at * topk));
    }
    keep(r, out, picks, 4ull * N_ROW * topk);
}

/* Heads and dims around the registers, keys around a tile and a page; from one pick to all but one. */
static void do_index(rig *r, uint32_t cut, cm_bytes *out)
{
    static const uint32_t shapes[][2] = {{64, 128}, {5, 64}, {70, 32}, {3, 256}, {17, 16}, {130, 128}};
    static const uint32_t visible[] = {4, 6, 32, 33, 199};
    for (uint32_t i = 0; i < 6 * 5; i++) {
        uint32_t heads = shapes[i / 5][0], dim = shapes[i / 5][1], n = visible[i % 5];
        scales of_keys = i % SCALES_N, of_queries = (i / SCALES_N + i) % SCALES_N;
        kn_ptr keys = random_index_rows(r, 1000 + 10 * i, kn_blocks(n, PAGE_ROWS) * PAGE_ROWS, dim, of_keys);
        kn_ptr iq = random_index_rows(r, 1003 + 10 * i, (uint64_t)N_ROW * heads, dim, of_queries);
        kn_ptr w = random_weights(r, 1006 + 10 * i, (uint64_t)N_ROW * heads, i % WEIGHTS_N);
        pick(r, cut, out, heads, dim, n, 1, keys, iq, w);
        pick(r, cut, out, heads, dim, n, n / 2, keys, iq, w);
        pick(r, cut, out, heads, dim, n, n - 1, keys, iq, w);
        pick(r, cut, out, heads, dim, n, n + 2, keys, iq, w);
        rig_reset(r);
    }
}

/* Every pair of kinds of scales, in the model's own shape. */
static void do_index_scales(rig *r, uint32_t cut, cm_bytes *out)
{
    enum { HEADS = 64, DIM = 128, N = 45 };
    for (uint32_t i = 0; i < SCALES_N * SCALES_N; i++) {
        kn_ptr keys = random_index_rows(r, 2000 + 10 * i, 2 * PAGE_ROWS, DIM, i % SCALES_N);
        kn_ptr iq =
            random_index_rows(r, 2003 + 10 * i, (uint64_t)N_ROW * HEADS, DIM, i / SCALES_N % SCALES_N);
        kn_ptr w = random_weights(r, 2006 + 10 * i, (uint64_t)N_ROW * HEADS, (i / SCALES_N + i) % WEIGHTS_N);
        pick(r, cut, out, HEADS, DIM, N, 1 + random_u32(2007, i) % (N - 1), keys, iq, w);
        rig_reset(r);
    }
}

/* Keys that are copies of a few, so that the last place is shared by many, near and far from one another;
 * among them keys whose scores differ in the last of the digits that the choice looks at. */
static void do_index_equal(rig *r, uint32_t cut, cm_bytes *out)
{
    enum { HEADS = 7, DIM = 32, N = 1500, ROW = DIM / 2 + 1 };
    for (uint32_t n_kind = 1; n_kind <= 40; n_kind += 13) {
        kn_ptr keys = random_index_rows(r, 3000, kn_blocks(N, PAGE_ROWS) * PAGE_ROWS, DIM, SCALES_NEAR);
        kn_ptr iq = random_index_rows(r, 3003, (uint64_t)N_ROW * HEADS, DIM, SCALES_NEAR);
        kn_ptr w = random_weights(r, 3006, (uint64_t)N_ROW * HEADS, WEIGHTS_ANY);
        uint8_t *row = kn_mem_host(r->device, keys);
        for (uint32_t i = n_kind; i < N; i++) {
            memcpy(row + (uint64_t)i * ROW, row + random_u32(3007, i) % n_kind * (uint64_t)ROW, ROW);
            row[(uint64_t)i * ROW] ^= n_kind == 40 && i % 5 == 0; /* one code, by its smallest step */
        }
        for (uint32_t topk = 1; topk < N; topk = 3 * topk + 1) {
            pick(r, cut, out, HEADS, DIM, N, topk, keys, iq, w);
        }
        rig_reset(r);
    }
}

/* ---- attention ---- */

typedef struct shape {
    uint32_t heads, dim, rope, window, topk;
} shape;

/* Stored rows; `odd`: a NaN code, scales beyond what the fast decoding takes. */
static kn_ptr random_kv_rows(rig *r, uint64_t key, uint64_t n, const shape *s, bool odd)
{
    uint32_t row = kn_kv_row_bytes(s->dim, s->rope), nope = s->dim - s->rope;
    uint32_t n_scale = kn_blocks(nope, KN_KV_BLOCK);
    kn_ptr rows = random_codes(r, key, n * row), wide = random_bf16(r, key + 1, n * s->rope + 1);
    uint8_t *x = kn_mem_host(r->device, rows);
    for (uint64_t i = 0; i < n; i++, x += row) {
        memcpy(x + nope, (const uint16_t *)kn_mem_host(r->device, wide) + i * s->rope, 2ull * s->rope);
        for (uint32_t b = 0; b < n_scale; b++) {
            x[nope + 2 * s->rope + b] = (uint8_t)(114 + random_u32(key + 2, i * n_scale + b) % 8);
        }
        if (odd && i % 3 == 0 && n_scale > 0) {
            x[nope + 2 * s->rope] = (uint8_t)(244 + i % 4); /* small codes: nothing may overflow */
            for (uint32_t k = 0; k < KN_KV_BLOCK && k < nope; k++) {
                x[k] &= 0x8f;
            }
        }
        if (odd && i == n / 2 && nope > 0) {
            x[nope - 1] = 0x7f;
        }
    }
    return rows;
}

/* N_ROW rows of one sequence, the last at position `last`; some window rows come from the slot, some from the
 * chunk. */
static void attend(rig *r, uint32_t cut, cm_bytes *out, const shape *s, uint32_t ratio, uint32_t last,
                   bool odd)
{
    uint32_t row = kn_kv_row_bytes(s->dim, s->rope), pos0 = last + 1 - N_ROW, b, key = 4000 + last;
    uint32_t per_page = ratio != 0 ? KN_PAGE_TOKENS / ratio : 0, n_page = last / KN_PAGE_TOKENS + 1;
    uint64_t q_row = 2ull * s->heads * s->dim;
    kn_attn a = {.layout = {.ratio = ratio, .ring = s->window + N_ROW, .row_bytes = row},
                 .sink = random_f32(r, key, s->heads),
                 .n_head = s->heads,
                 .dim = s->dim,
                 .rope = s->rope,
                 .window = s->window,
                 .topk = s->topk};
    kn_ptr slot = random_kv_rows(r, key + 1, a.layout.ring, s, odd),
           rows = random_kv_rows(r, key + 5, N_ROW, s, odd);
    kn_ptr pool = random_kv_rows(r, key + 9, (uint64_t)n_page * per_page + 1, s, odd);
    kn_ptr q = random_bf16(r, key + 13, N_ROW * q_row / 2), o = rig_new(r, N_ROW * q_row);
    kn_ptr picks = rig_new(r, 4ull * N_ROW * s->topk), pages = shuffled_pages(r, n_page);
    int32_t *list = kn_mem_host(r->device, picks);
    for (uint32_t i = 0; i < N_ROW; i++) {
        uint32_t visible = ratio == 4 ? (pos0 + i + 1) / 4 : 0, n = 0;
        for (uint32_t j = 0; j < visible && n < s->topk; j++) {
            if (visible - j <= s->topk - n || random_u32(key + 14, 1000 * i + j) % 3 == 0) {
                list[i * s->topk + n++] = (int32_t)j;
            }
        }
        for (; n < s->topk; n++) {
            list[i * s->topk + n] = -1;
        }
    }
    memset(kn_mem_host(r->device, o), 0x55, N_ROW * q_row);
    for (uint32_t at = 0; at < N_ROW; at += b) {
        b = next_cut(cut, at, N_ROW);
        kn_seg seg = {.n_row = b, .pos0 = pos0 + at, .slot = slot};
        kn_batch batch = {.segs = rig_up(r, &seg, sizeof(seg)),
                          .pages = pages,
                          .page_pool = pool,
                          .page_bytes = (uint64_t)per_page * row,
                          .n_seg = 1,
                          .n_row = b};
        kn_attention(r->device)->attention(
            r->stream, &batch, &a, kn_at(q, at * q_row), kn_at(rows, (uint64_t)at * row),
            ratio == 4 ? kn_at(picks, 4ull * at * s->topk) : (kn_ptr){0}, kn_at(o, at * q_row));
        kn_attention(r->device)->raw_commit(r->stream, &batch, &a, kn_at(rows, (uint64_t)at * row));
    }
    keep(r, out, o, N_ROW * q_row);
    rig_reset(r);
}

/* Heads around a tile and a unit, dims and rope around a block, keys from a few to some blocks of them. */
static void do_attention(rig *r, uint32_t cut, cm_bytes *out)
{
    static const shape shapes[] = {{9, 512, 64, 60, 45},
                                   {1, 80, 16, 5, 3},
                                   {67, 100, 20, 13, 7},
                                   {4, 64, 64, 48, 1},
                                   {130, 64, 8, 9, 40}};
    static const uint32_t last[] = {10, 12, 70, 163};
    for (uint32_t i = 0; i < 5 * 4; i++) {
        attend(r, cut, out, &shapes[i / 4], 4, last[i % 4], false);
        attend(r, cut, out, &shapes[i / 4], i % 2 == 0 ? 0 : 128, last[i % 4], false);
    }
}

static void do_attention_odd(rig *r, uint32_t cut, cm_bytes *out)
{
    attend(r, cut, out, &(shape){5, 512, 64, 60, 45}, 4, 163, true);
    attend(r, cut, out, &(shape){5, 148, 20, 30, 11}, 4, 99, true);
    attend(r, cut, out, &(shape){2, 90, 10, 7, 5}, 128, 170, true);
}

/* Rows of three sequences, pieces of them in one call: heads so few that rows share their keys, compressed
 * rows that are all picked, from the first position on and beyond the window. */
static void attend_sequences(rig *r, uint32_t cut, cm_bytes *out, const shape *s, uint32_t ratio, bool odd)
{
    enum { SEQUENCES = 3, PAGES = 2 };
    static const uint32_t n_row[SEQUENCES] = {4, 1, 6}, pos0[SEQUENCES] = {0, 37, 150};
    static const float sink[] = {0.5f, -1, 2, 0};
    uint32_t row = kn_kv_row_bytes(s->dim, s->rope), per_page = ratio != 0 ? KN_PAGE_TOKENS / ratio : 1, b;
    uint64_t key = 6000 + 100 * s->heads + ratio, q_row = 2ull * s->heads * s->dim;
    uint32_t ring = s->window + 2;
    kn_attn a = {.layout = {.ratio = ratio, .ring = ring, .row_bytes = row},
                 .sink = rig_up(r, sink, sizeof(sink)),
                 .n_head = s->heads,
                 .dim = s->dim,
                 .rope = s->rope,
                 .window = s->window,
                 .topk = s->topk};
    kn_ptr slots = random_kv_rows(r, key + 1, SEQUENCES * ring, s, odd),
           rows = random_kv_rows(r, key + 5, N_ROW, s, odd);
    kn_ptr pool = random_kv_rows(r, key + 9, SEQUENCES * PAGES * per_page, s, odd);
    kn_ptr q = random_bf16(r, key + 13, N_ROW * q_row / 2), o = rig_new(r, N_ROW * q_row);
    kn_ptr picks = rig_new(r, 4ull * N_ROW * s->topk), pages = shuffled_pages(r, SEQUENCES * PAGES);
    int32_t *list = kn_mem_host(r->device, picks);
    for (uint32_t g = 0, at = 0; g < SEQUENCES; at += n_row[g++]) {
        for (uint32_t i = 0; i < n_row[g] * s->topk; i++) {
            uint32_t visible = (pos0[g] + i / s->topk + 1) / 4, k = i % s->topk;
            list[at * s->topk + i] = k < visible ? (int32_t)k : -1;
        }
    }
    for (uint32_t at = 0; at < N_ROW; at += b) {
        kn_seg segs[SEQUENCES];
        uint32_t n_seg = 0;
        b = next_cut(cut, at, N_ROW);
        for (uint32_t g = 0, first = 0; g < SEQUENCES; first += n_row[g++]) {
            uint32_t from = first > at ? first : at,
                     to = first + n_row[g] < at + b ? first + n_row[g] : at + b;
            if (from < to) {
                segs[n_seg++] = (kn_seg){.row0 = from - at,
                                         .n_row = to - from,
                                         .pos0 = pos0[g] + from - first,
                                         .page0 = g * PAGES,
                                         .slot = kn_at(slots, (uint64_t)g * ring * row)};
            }
        }
        kn_batch batch = {.segs = rig_up(r, segs, n_seg * sizeof(segs[0])),
                          .pages = pages,
                          .page_pool = pool,
                          .page_bytes = (uint64_t)per_page * row,
                          .n_seg = n_seg,
                          .n_row = b};
        kn_attention(r->device)->attention(
            r->stream, &batch, &a, kn_at(q, at * q_row), kn_at(rows, (uint64_t)at * row),
            ratio == 4 ? kn_at(picks, 4ull * at * s->topk) : (kn_ptr){0}, kn_at(o, at * q_row));
        kn_attention(r->device)->raw_commit(r->stream, &batch, &a, kn_at(rows, (uint64_t)at * row));
    }
    keep(r, out, o, N_ROW * q_row);
    rig_reset(r);
}

static void do_attention_sequences(rig *r, uint32_t cut, cm_bytes *out)
{
    static const shape shapes[] = {{3, 100, 20, 9, 45}, {4, 128, 64, 60, 39}, {1, 64, 8, 2, 40}};
    for (uint32_t i = 0; i < 3 * 3; i++) {
        attend_sequences(r, cut, out, &shapes[i / 3], i % 3 == 0 ? 0 : i % 3 == 1 ? 4 : 128, i % 2 == 0);
    }
}

/* Sums that are zero but for rounding, so that what is left of them is their order: scores whose second half
 * of dims undoes the first in other lanes, then values whose second half of keys undoes the first (all scores
 * zero). No nope dims: everything is bf16, over many magnitudes. */
static void do_attention_cancelling(rig *r, uint32_t cut, cm_bytes *out)
{
    enum { HEADS = 9, DIM = 64, N = 40, STEP = 5 };
    uint32_t row = kn_kv_row_bytes(DIM, DIM);
    static const float sink[HEADS] = {1,     0.5f, 2,     0.75f, 1.5f,
                                      0.25f, 3,    1.25f, 0.1f}; /* weights that are not 1 */
    kn_attn a = {.layout = {.ring = N, .row_bytes = row},
                 .sink = rig_up(r, sink, sizeof(sink)),
                 .n_head = HEADS,
                 .dim = DIM,
                 .rope = DIM,
                 .window = N};
    kn_ptr rows = rig_new(r, N * row), q = random_bf16(r, 5000, N * HEADS * DIM);
    for (uint32_t undone = 0; undone < 2; undone++) {
        kn_ptr o = rig_new(r, 2ull * N * HEADS * DIM), slot = rig_new(r, N * row);
        uint16_t *x = kn_mem_host(r->device, rows), *y = kn_mem_host(r->device, q);
        uint32_t b;
        for (uint32_t i = 0; i < N * DIM; i++) {
            uint32_t k = i / DIM, d = i % DIM, u = random_u32(5001, i);
            uint32_t other = undone == 0 ? k * DIM + (d + STEP) % (DIM / 2) : (k * 7 + 3) % (N / 2) * DIM + d;
            bool second = undone == 0 ? d >= DIM / 2 : k >= N / 2;
            x[i] = second ? x[other] ^ 0x8000 : (uint16_t)((u & 0x807f) | (127 + (u >> 16) % 40) << 7);
        }
        for (uint32_t i = 0; i < N * HEADS * DIM; i++) {
            uint32_t d = i % DIM, h = i / DIM;
            y[i] = undone == 1 ? 0 : d >= DIM / 2 ? y[h * DIM + (d + STEP) % (DIM / 2)] : y[i];
            y[i] = undone == 0 && d < DIM / 2 ? (uint16_t)((y[i] & 0x807f) | (140 + (uint32_t)d % 7) << 7)
                                              : y[i];
        }
        for (uint32_t at = 0; at < N; at += b) {
            b = next_cut(cut, at, N);
            kn_seg seg = {.n_row = b, .pos0 = at, .slot = slot};
            kn_batch batch = {.segs = rig_up(r, &seg, sizeof(seg)), .n_seg = 1, .n_row = b};
            kn_ptr chunk = kn_at(rows, (uint64_t)at * row);
            kn_attention(r->device)->attention(r->stream, &batch, &a, kn_at(q, 2ull * at * HEADS * DIM),
                                               chunk, (kn_ptr){0}, kn_at(o, 2ull * at * HEADS * DIM));
            kn_attention(r->device)->raw_commit(r->stream, &batch, &a, chunk);
        }
        keep(r, out, o, 2ull * N * HEADS * DIM);
    }
    rig_reset(r);
}

/* ---- ref against every path ---- */

static const kn_limits LIMITS = {.n_row = 64,
                                 .n_in = 128,
                                 .n_inner = 128,
                                 .n_head = 130,
                                 .head_dim = 512,
                                 .n_key = 128,
                                 .n_index_row = 1500,
                                 .n_expert = 1};
PATH_TEST(index, LIMITS)
PATH_TEST(index_scales, LIMITS)
PATH_TEST(index_equal, LIMITS)
PATH_TEST(attention, LIMITS)
PATH_TEST(attention_odd, LIMITS)
PATH_TEST(attention_sequences, LIMITS)
PATH_TEST(attention_cancelling, LIMITS)

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_index),
        cmocka_unit_test(test_index_scales),
        cmocka_unit_test(test_index_equal),
        cmocka_unit_test(test_attention),
        cmocka_unit_test(test_attention_odd),
        cmocka_unit_test(test_attention_sequences),
        cmocka_unit_test(test_attention_cancelling),
    };
    if (argc > 1) {
        random_seed = strtoull(argv[1], NULL, 0);
    }
    print_message("seed %llu\n", (unsigned long long)random_seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
