/* Every path of the cpu back-end against the oracle, bit for bit: random values, sizes that are multiples of
 * nothing, one to three threads, and every batch cut into calls in other ways. Then the arithmetic of
 * kn_math.h against libm. Usage: t_kernels [seed] */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "kernels/kn_math.h"
#include "tests/golden/kernel_rig.h"
#include "tests/unit/kernel_random.h"

static void keep(rig *r, cm_bytes *out, kn_ptr at, uint64_t n)
{
    void *copy = cm_alloc(n);
    rig_down(r, copy, at, n);
    cm_bytes_append(out, copy, n);
    cm_free(copy);
}

/* ---- cutting a batch ----
 * cut 0: all rows in one call; cut k: calls of k rows, the last one shorter. */

static uint32_t next_cut(uint32_t cut, uint32_t at, uint32_t n)
{
    return cut == 0 || n - at < cut ? n - at : cut;
}

/* ---- scenarios: each appends all its outputs ---- */

typedef void (*scenario_fn)(rig *r, uint32_t cut, cm_bytes *out);

static void do_rows(rig *r, uint32_t cut, cm_bytes *out)
{
    const kn_dense_ops *ops = kn_dense(r->device);
    uint32_t n = 13, d = random_between(1, 30, 400), hc = random_between(2, 1, 5), vocab = 57, ids[13], b;
    kn_matrix table = random_matrix(r, 3, vocab, d, KN_BF16, KN_NONE);
    kn_ptr x = random_bf16(r, 4, n * d), w = random_bf16(r, 5, d), wide = rig_new(r, n * hc * d * 2), y,
           ids_at;
    kn_ptr normed = rig_new(r, n * d * 2), plain = rig_new(r, n * d * 2), logits = random_f32(r, 6, n * 61),
           best;
    kn_q8 q = {rig_new(r, n * d), rig_new(r, n * kn_blocks(d, KN_ACT_BLOCK))};
    for (uint32_t i = 0; i < n; i++) {
        ids[i] = random_u32(7, i) % vocab;
        ((float *)kn_mem_host(r->device, logits))[i * 61 + 40] = 4000; /* equal maxima */
        ((float *)kn_mem_host(r->device, logits))[i * 61 + 60 - i] = 4000;
    }
    ids_at = rig_up(r, ids, sizeof(ids));
    best = rig_new(r, n * 4);
    for (uint32_t at = 0; at < n; at += b) {
        kn_q8 q_at = {kn_at(q.codes, at * d), kn_at(q.scales, at * kn_blocks(d, KN_ACT_BLOCK))};
        b = next_cut(cut, at, n);
        ops->embed(r->stream, &table, kn_at(ids_at, at * 4), b, hc, kn_at(wide, at * hc * d * 2));
        ops->rmsnorm(r->stream, kn_at(x, at * d * 2), w, b, d, 1e-6f, kn_at(normed, at * d * 2));
        ops->rmsnorm(r->stream, kn_at(x, at * d * 2), (kn_ptr){0}, b, d, 1e-6f, kn_at(plain, at * d * 2));
        ops->quant_act(r->stream, kn_at(x, at * d * 2), b, d, q_at);
        ops->argmax(r->stream, kn_at(logits, at * 61 * 4), b, 61, kn_at(best, at * 4));
    }
    y = normed;
    keep(r, out, wide, n * hc * d * 2);
    keep(r, out, y, n * d * 2);
    keep(r, out, plain, n * d * 2);
    keep(r, out, q.codes, n * d);
    keep(r, out, q.scales, n * kn_blocks(d, KN_ACT_BLOCK));
    keep(r, out, best, n * 4);
}

static void hc_of(rig *r, uint32_t cut, uint32_t n, uint32_t hc, uint32_t d, cm_bytes *out)
{
    const kn_dense_ops *ops = kn_dense(r->device);
    uint32_t n_mix = (2 + hc) * hc, b;
    uint64_t row = (uint64_t)hc * d;
    kn_hc p = {.fn = random_f32(r, 22, n_mix * row),
               .base = random_f32(r, 23, n_mix),
               .scale = random_f32(r, 24, 3),
               .d = d,
               .hc = hc,
               .sinkhorn_iters = 20,
               .norm_eps = 1e-6f,
               .hc_eps = 1e-6f};
    kn_ptr x = random_bf16(r, 25, n * row), y = random_bf16(r, 26, (uint64_t)n * d),
           pre = rig_new(r, n * d * 2);
    kn_ptr post = rig_new(r, n * hc * 4), comb = rig_new(r, n * hc * hc * 4), head = rig_new(r, n * d * 2);
    for (uint32_t at = 0; at < n; at += b) {
        kn_ptr xa = kn_at(x, at * row * 2), post_at = kn_at(post, at * hc * 4),
               comb_at = kn_at(comb, at * hc * hc * 4);
        b = next_cut(cut, at, n);
        ops->hc_pre(r->stream, &p, xa, b, kn_at(pre, at * d * 2), post_at, comb_at);
        ops->hc_head(r->stream, &p, xa, b, kn_at(head, at * d * 2));
        ops->hc_post(r->stream, d, hc, kn_at(y, at * d * 2), xa, post_at, comb_at, b, xa);
    }
    keep(r, out, pre, n * d * 2);
    keep(r, out, post, n * hc * 4);
    keep(r, out, comb, n * hc * hc * 4);
    keep(r, out, head, n * d * 2);
    keep(r, out, x, n * row * 2);
}

static void do_hc(rig *r, uint32_t cut, cm_bytes *out)
{
    hc_of(r, cut, 11, 3, random_between(20, 20, 300), out);
    hc_of(r, cut, 11, 4, random_between(27, 1025, 1200), out); /* more than a piece of a row */
    hc_of(r, cut, 45, 4, random_between(28, 20, 60), out);     /* more rows than share a reading of weights */
}

static void do_linear(rig *r, uint32_t cut, cm_bytes *out)
{
    static const kn_dtype forms[][2] = {
        {KN_E4M3, KN_E8M0}, {KN_E4M3, KN_F32}, {KN_E2M1, KN_E8M0}, {KN_BF16, KN_F32}, {KN_BF16, KN_BF16}};
    const kn_dense_ops *ops = kn_dense(r->device);
    for (uint32_t f = 0; f < 5; f++) {
        uint32_t n = random_between(40 + f, 9, 20), k = 2 * random_between(50 + f, 10, 300), b;
        uint32_t o = random_between(60 + f, 3, 290), item = forms[f][1] == KN_F32 ? 4 : 2;
        bool quantized = forms[f][0] != KN_BF16;
        kn_matrix w = random_matrix(r, 70 + f, o, k, forms[f][0], forms[f][1]);
        kn_ptr x = random_bf16(r, 80 + f, n * k), y = rig_new(r, n * o * 4);
        kn_q8 q = random_q8(r, 90 + f, n, k);
        if (quantized && cut % 2 == 1) {
            w = prepared(r, w);
        }
        for (uint32_t at = 0; at < n; at += b) {
            kn_q8 q_at = {kn_at(q.codes, at * k), kn_at(q.scales, at * kn_blocks(k, KN_ACT_BLOCK))};
            b = next_cut(cut, at, n);
            if (quantized) {
                ops->linear_q8(r->stream, q_at, &w, b, kn_at(y, at * o * 2));
            } else {
                ops->linear_bf16(r->stream, kn_at(x, at * k * 2), &w, b, forms[f][1],
                                 kn_at(y, at * o * item));
            }
        }
        keep(r, out, y, n * o * (quantized ? 2 : item));
    }
}

/* What codes a case of do_q8_edges has. */
typedef enum edge {
    EDGE_ANY,
    EDGE_LARGEST,
    EDGE_TINY,
    EDGE_FEW_TINY,
    EDGE_TINY_INPUT, /* and no small weight beside it */
    EDGE_NAN_ROW,
    EDGE_NAN_WEIGHT,
    EDGE_N
} edge;

static uint8_t edge_code(edge kind, uint64_t key, uint64_t i)
{
    uint32_t u = random_u32(key, i), sign = u >> 24 & 0x80, any = u >> 8;
    switch (kind) {
    case EDGE_LARGEST:
        return (uint8_t)(sign | 0x7e);
    case EDGE_TINY:
        return (uint8_t)(sign | any % 8);
    case EDGE_FEW_TINY:
    case EDGE_TINY_INPUT:
        return (uint8_t)(sign | (u % 200 == 0 ? any % 32 : 64 + any % 60));
    default:
        return (uint8_t)(sign | any % 0x7f);
    }
}

/* Scales at both ends of their range, codes at the ends of theirs, few values that are small, NaN in one row;
 * every number of rows from 1 to 40 and sizes that end anywhere in a block. */
static void do_q8_edges(rig *r, uint32_t cut, cm_bytes *out)
{
    for (uint32_t f = 0; f < 3 * EDGE_N; f++) {
        edge kind = f / 3;
        kn_dtype dtype = f % 3 == 0 ? KN_E2M1 : KN_E4M3, scale = f % 3 == 2 ? KN_F32 : KN_E8M0;
        uint32_t n = random_between(600 + f, 1, 40), k = 2 * random_between(620 + f, 1, 210), b;
        uint32_t o = random_between(640 + f, 1, 70), n_block = kn_blocks(k, KN_ACT_BLOCK);
        kn_matrix w = random_matrix(r, 660 + f, o, k, dtype, scale);
        kn_q8 q = random_q8(r, 680 + f, n, k);
        kn_ptr y = rig_new(r, (uint64_t)n * o * 2);
        uint8_t *codes = kn_mem_host(r->device, q.codes), *scales = kn_mem_host(r->device, q.scales);
        for (uint64_t i = 0; i < (uint64_t)n * k; i++) {
            codes[i] = edge_code(kind, 700 + f, i);
        }
        for (uint64_t i = 0; i < (uint64_t)n * n_block; i++) {
            scales[i] = random_u32(720 + f, i) % 3 == 0 ? 254 : random_u32(720 + f, i) % 3 == 1 ? 0 : 127;
        }
        for (uint64_t i = 0; dtype == KN_E4M3 && i < (uint64_t)o * k; i++) {
            ((uint8_t *)kn_mem_host(r->device, w.data))[i] =
                edge_code(kind == EDGE_TINY_INPUT ? EDGE_LARGEST : kind, 740 + f, i);
        }
        if (kind == EDGE_NAN_ROW) {
            codes[(n / 2) * (uint64_t)k + k - 1] = f % 2 ? 0x7f : 0xff;
            scales[(uint64_t)n * n_block - 1] = n > 2 ? 255 : 1;
        } else if (kind == EDGE_NAN_WEIGHT && scale == KN_E8M0) {
            *(uint8_t *)kn_mem_host(r->device, w.scale) = 255;
        } else if (kind == EDGE_NAN_WEIGHT) {
            ((uint8_t *)kn_mem_host(r->device, w.data))[(uint64_t)o * k - 1] = 0xff;
        }
        if (cut % 2 == 1) {
            w = prepared(r, w);
        }
        for (uint32_t at = 0; at < n; at += b) {
            b = next_cut(cut, at, n);
            kn_dense(r->device)->linear_q8(
                r->stream, (kn_q8){kn_at(q.codes, (uint64_t)at * k), kn_at(q.scales, (uint64_t)at * n_block)},
                &w, b, kn_at(y, (uint64_t)at * o * 2));
        }
        keep(r, out, y, (uint64_t)n * o * 2);
    }
}

/* More rows than any tile of a path takes, against each other number of them. */
static void do_q8_many(rig *r, uint32_t cut, cm_bytes *out)
{
    enum { N = 150, K = 288, O = 83 };
    for (uint32_t f = 0; f < 2; f++) {
        kn_matrix w = random_matrix(r, 760 + f, O, K, f == 0 ? KN_E2M1 : KN_E4M3, KN_E8M0);
        kn_q8 q = random_q8(r, 762 + f, N, K);
        kn_ptr y = rig_new(r, N * O * 2);
        uint32_t step = cut == 0 ? N : 9 * cut, b;
        if (cut % 2 == 1) {
            w = prepared(r, w);
        }
        for (uint32_t at = 0; at < N; at += b) {
            b = next_cut(step, at, N);
            kn_dense(r->device)->linear_q8(
                r->stream, (kn_q8){kn_at(q.codes, at * K), kn_at(q.scales, at * kn_blocks(K, KN_ACT_BLOCK))},
                &w, b, kn_at(y, at * O * 2));
        }
        keep(r, out, y, N * O * 2);
    }
}

/* Sums that are zero but for rounding: the second half of every row undoes the first, over many magnitudes.
 * What is left of them is the order of summation itself. */
static void do_cancelling(rig *r, uint32_t cut, cm_bytes *out)
{
    enum { N = 10, K = 1024, O = 9 };
    const kn_dense_ops *ops = kn_dense(r->device);
    kn_matrix wide = random_matrix(r, 110, O, K, KN_BF16, KN_NONE),
              fp8 = random_matrix(r, 112, O, K, KN_E4M3, KN_F32);
    kn_ptr x = random_bf16(r, 113, N * K), y = rig_new(r, N * O * 4), y8 = rig_new(r, N * O * 2);
    kn_q8 q = random_q8(r, 114, N, K);
    uint16_t *x_host = kn_mem_host(r->device, x), *w_host = kn_mem_host(r->device, wide.data);
    uint8_t *codes = kn_mem_host(r->device, q.codes), *scales = kn_mem_host(r->device, q.scales);
    uint8_t *w_codes = kn_mem_host(r->device, fp8.data);
    float *w_scales = kn_mem_host(r->device, fp8.scale);
    uint32_t b;
    for (uint32_t i = 0; i < N * K; i++) {
        bool second = i % K >= K / 2;
        uint32_t other = i / K * K + (i + 5) % (K / 2); /* in another lane */
        x_host[i] = second ? x_host[other]
                           : (uint16_t)(x_host[i] & 0x807f) | (uint16_t)((90 + random_u32(115, i) % 70) << 7);
        codes[i] = second ? codes[i - K / 2] : codes[i];
        scales[i / 128] = second ? scales[(i - K / 2) / 128] : scales[i / 128];
    }
    for (uint32_t i = 0; i < O * K; i++) {
        bool second = i % K >= K / 2;
        w_host[i] = second ? w_host[i / K * K + (i + 5) % (K / 2)] ^ 0x8000 : w_host[i];
        w_codes[i] = second ? w_codes[i - K / 2] ^ 0x80 : w_codes[i];
    }
    for (uint32_t i = 0; i < K / 256; i++) {
        w_scales[i] *= ldexpf(1, (int)(random_u32(116, i) % 40));
        w_scales[K / 256 + i] = w_scales[i];
    }
    for (uint32_t at = 0; at < N; at += b) {
        b = next_cut(cut, at, N);
        ops->linear_bf16(r->stream, kn_at(x, at * K * 2), &wide, b, KN_F32, kn_at(y, at * O * 4));
        ops->linear_q8(r->stream, (kn_q8){kn_at(q.codes, at * K), kn_at(q.scales, at * K / 128)}, &fp8, b,
                       kn_at(y8, at * O * 2));
    }
    keep(r, out, y, N * O * 4);
    keep(r, out, y8, N * O * 2);
}

static void do_grouped(rig *r, uint32_t cut, cm_bytes *out)
{
    for (uint32_t f = 0; f < 2; f++) {
        uint32_t n = 10, k = random_between(100 + f, 20, 300), groups = 3,
                 per = random_between(102 + f, 5, 90), b;
        kn_matrix w = random_matrix(r, 104 + f, groups * per, k, KN_E4M3, f == 0 ? KN_E8M0 : KN_F32);
        kn_ptr x = random_bf16(r, 106, n * groups * k), y = rig_new(r, n * groups * per * 2);
        if (cut % 2 == 1) {
            w = prepared(r, w);
        }
        for (uint32_t at = 0; at < n; at += b) {
            b = next_cut(cut, at, n);
            kn_dense(r->device)->linear_grouped(r->stream, kn_at(x, at * groups * k * 2), &w, groups, b,
                                                kn_at(y, at * groups * per * 2));
        }
        keep(r, out, y, n * groups * per * 2);
    }
}

/* Both ways of the grouped projection, in one call from 1 to 70 rows and by parts: what its fast way may
 * keep, and what it has to compute again. */
static void do_grouped_edges(rig *r, uint32_t cut, cm_bytes *out)
{
    for (uint32_t f = 0; f < 2 * WIDE_N; f++) {
        wide_kind kind = f / 2;
        uint32_t n = random_between(820 + f, 1, f % 2 == 0 ? 6 : 70), groups = 2, b;
        uint32_t k = kind == WIDE_CANCEL ? 256 : random_between(840 + f, 20, 420);
        uint32_t per = random_between(860 + f, 5, 70), n_block = kn_blocks(k, KN_ACT_BLOCK);
        kn_matrix w = random_matrix(r, 880 + f, groups * per, k, KN_E4M3, KN_E8M0);
        kn_ptr x = rig_new(r, 2ull * n * groups * k), y = rig_new(r, 2ull * n * groups * per);
        uint16_t *inputs = kn_mem_host(r->device, x);
        uint8_t *codes = kn_mem_host(r->device, w.data), *scales = kn_mem_host(r->device, w.scale);
        for (uint32_t i = 0; i < n * groups * k; i++) {
            inputs[i] = wide_input(kind, 900 + f, i, k);
        }
        for (uint32_t i = 0; i < groups * per * k; i++) {
            codes[i] = kind == WIDE_TINY_CODE ? edge_code(EDGE_TINY, 920 + f, i) : codes[i];
        }
        if (kind == WIDE_NAN_CODE) {
            codes[groups * per * k / 2] = f % 2 == 0 ? 0x7f : 0xff;
        }
        for (uint32_t i = 0; kind == WIDE_CANCEL && i < n * groups * k; i++) {
            inputs[i] = i % k < k / 2 ? inputs[i] : inputs[i - k / 2];
        }
        for (uint32_t i = 0; kind == WIDE_CANCEL && i < groups * per * k; i++) {
            codes[i] = i % k < k / 2 ? codes[i] : codes[i - k / 2] ^ 0x80;
        }
        for (uint32_t i = 0; i < kn_blocks(groups * per, KN_ACT_BLOCK) * n_block; i++) {
            scales[i] = kind == WIDE_SCALES   ? (uint8_t)(i % 2 == 0 ? 1 : 250)
                        : kind == WIDE_CANCEL ? 120
                                              : scales[i];
        }
        if (cut % 2 == 1) {
            w = prepared(r, w);
        }
        for (uint32_t at = 0; at < n; at += b) {
            b = next_cut(cut, at, n);
            kn_dense(r->device)->linear_grouped(r->stream, kn_at(x, 2ull * at * groups * k), &w, groups, b,
                                                kn_at(y, 2ull * at * groups * per));
        }
        keep(r, out, y, 2ull * n * groups * per);
    }
}

/* Every number of rows and many of outputs, rows of weights that end anywhere, for both kinds of outputs. */
static void do_lanes(rig *r, uint32_t cut, cm_bytes *out)
{
    for (uint32_t n = 1; n <= 17; n++) {
        uint32_t k = n % 3 == 0 ? 16 * random_between(940 + n, 1, 80) : random_between(940 + n, 1, 1300), b;
        uint32_t o = random_between(960 + n, 1, 150), item = n % 2 == 0 ? 4 : 2;
        kn_matrix w = random_matrix(r, 980 + n, o, k, KN_BF16, KN_NONE);
        kn_ptr x = random_bf16(r, 1000 + n, (uint64_t)n * k), y = rig_new(r, 4ull * n * o);
        for (uint32_t at = 0; at < n; at += b) {
            b = next_cut(cut, at, n);
            kn_dense(r->device)->linear_bf16(r->stream, kn_at(x, 2ull * at * k), &w, b,
                                             item == 4 ? KN_F32 : KN_BF16, kn_at(y, (uint64_t)at * o * item));
        }
        keep(r, out, y, (uint64_t)n * o * item);
    }
}

static void do_gate(rig *r, uint32_t cut, cm_bytes *out)
{
    for (uint32_t hash = 0; hash < 2; hash++) {
        uint32_t n = 14, d = random_between(120, 20, 300), n_expert = random_between(121, 7, 40), topk = 6, b,
                 ids[14];
        kn_gate g = {.weight = random_matrix(r, 122, n_expert, d, KN_BF16, KN_NONE),
                     .n_expert = n_expert,
                     .topk = topk,
                     .route_scale = 2.5f};
        kn_ptr x = random_bf16(r, 123, n * d), experts = rig_new(r, n * topk * 4),
               weights = rig_new(r, n * topk * 4);
        kn_ptr ids_at;
        int64_t table[9 * 6];
        for (uint32_t i = 0; i < 9 * topk; i++) {
            table[i] = (i / topk + i % topk) % n_expert;
        }
        for (uint32_t i = 0; i < n; i++) {
            ids[i] = random_u32(124, i) % 9;
        }
        ids_at = rig_up(r, ids, sizeof(ids));
        g.tid2eid = hash ? rig_up(r, table, sizeof(table)) : (kn_ptr){0};
        g.bias = hash ? (kn_ptr){0} : random_f32(r, 125, n_expert);
        for (uint32_t at = 0; at < n; at += b) {
            b = next_cut(cut, at, n);
            kn_moe(r->device)->gate(r->stream, &g, kn_at(x, at * d * 2), kn_at(ids_at, at * 4), b,
                                    kn_at(experts, at * topk * 4), kn_at(weights, at * topk * 4));
        }
        keep(r, out, experts, n * topk * 4);
        keep(r, out, weights, n * topk * 4);
    }
}

static kn_expert random_expert(rig *r, uint64_t key, uint32_t d, uint32_t inner, kn_dtype dtype,
                               kn_dtype scale)
{
    return (kn_expert){random_matrix(r, key, inner, d, dtype, scale),
                       random_matrix(r, key + 1, inner, d, dtype, scale),
                       random_matrix(r, key + 2, d, inner, dtype, scale)};
}

static void do_experts(rig *r, uint32_t cut, cm_bytes *out)
{
    static const kn_dtype forms[][2] = {{KN_E2M1, KN_E8M0}, {KN_E4M3, KN_E8M0}, {KN_E4M3, KN_F32}};
    for (uint32_t f = 0; f < 3; f++) {
        enum { N = 12, N_ITEM = 2 * N };
        uint32_t d = 2 * random_between(140 + f, 10, 150), inner = 2 * random_between(143 + f, 10, 150), b;
        kn_expert experts[2] = {random_expert(r, 150 + 10 * f, d, inner, forms[f][0], forms[f][1]),
                                random_expert(r, 155 + 10 * f, d, inner, forms[f][0], forms[f][1])};
        kn_q8 x = random_q8(r, 180 + f, N, d);
        kn_expert_item items[N_ITEM];
        kn_ptr y = rig_new(r, N_ITEM * d * 2);
        if (cut % 2 == 1) {
            experts[0] = (kn_expert){prepared(r, experts[0].w1), prepared(r, experts[0].w3),
                                     prepared(r, experts[0].w2)};
        }
        for (uint32_t i = 0; i < N_ITEM; i++) {
            items[i] = (kn_expert_item){
                .row = (i * 7) % N, .out = N_ITEM - 1 - i, .weight = fabsf(random_value(190 + f, i))};
        }
        for (uint32_t at = 0; at < N; at += b) {
            kn_expert_group groups[2];
            b = next_cut(cut, at, N);
            groups[0] = (kn_expert_group){&experts[0], at, b};
            groups[1] = (kn_expert_group){&experts[1], N + at, b};
            kn_moe(r->device)->experts(r->stream, groups, 2, items, x, 7.0f, y);
        }
        keep(r, out, y, N_ITEM * d * 2);
    }
}

static void do_swiglu_combine(rig *r, uint32_t cut, cm_bytes *out)
{
    enum { N = 12, TOPK = 6 };
    const kn_moe_ops *ops = kn_moe(r->device);
    uint32_t d = random_between(200, 10, 300), b;
    kn_ptr g = random_bf16(r, 201, N * d), u = random_bf16(r, 202, N * d), w = random_f32(r, 203, N);
    kn_ptr h = rig_new(r, N * d * 2), plain = rig_new(r, N * d * 2), y = random_bf16(r, 204, N * TOPK * d);
    kn_ptr shared = random_bf16(r, 205, N * d), sum = rig_new(r, N * d * 2), experts;
    int32_t ids[N * TOPK];
    for (uint32_t i = 0; i < N * TOPK; i++) {
        ids[i] = (int32_t)((i * 5 + i / TOPK * 3) % 31);
    }
    experts = rig_up(r, ids, sizeof(ids));
    for (uint32_t at = 0; at < N; at += b) {
        uint64_t row = at * d * 2;
        b = next_cut(cut, at, N);
        ops->swiglu(r->stream, kn_at(g, row), kn_at(u, row), kn_at(w, at * 4), b, d, 10.0f, kn_at(h, row));
        ops->swiglu(r->stream, kn_at(g, row), kn_at(u, row), (kn_ptr){0}, b, d, 10.0f, kn_at(plain, row));
        ops->combine(r->stream, kn_at(y, TOPK * row), kn_at(experts, at * TOPK * 4), kn_at(shared, row), b,
                     TOPK, d, kn_at(sum, row));
    }
    keep(r, out, h, N * d * 2);
    keep(r, out, plain, N * d * 2);
    keep(r, out, sum, N * d * 2);
}

/* Every bf16 as a gate's logit, but for infinities and NaN, which a product with ones and zeros would spread;
 * and every one as an expert's g, with a few u and weights. */
static void do_all_values(rig *r, uint32_t cut, cm_bytes *out)
{
    enum { D = 32, TOPK = D, N = 65536 / D, ABOVE = 0x7f80 };
    uint16_t *x = cm_alloc(2 * N * D), one[D * D] = {0}, *u = cm_alloc(2 * N * D);
    float *w = cm_alloc(sizeof(float) * N);
    for (uint32_t i = 0; i < N * D; i++) {
        x[i] = (uint16_t)i;
        u[i] = kn_bf16_encode(10 *
                              random_value(210, i % 1000)); /* two NaNs: which is left is nobody's promise */
        w[i / D] = random_value(211, i / D);
    }
    for (uint32_t i = 0; i < D; i++) {
        one[i * D + i] = 0x3f80;
    }
    kn_ptr g_at = rig_up(r, x, 2 * N * D), u_at = rig_up(r, u, 2 * N * D), w_at = rig_up(r, w, 4 * N);
    for (uint32_t i = 0; i < N * D; i++) {
        x[i] = (i & 0x7fff) < ABOVE ? (uint16_t)i : 0;
    }
    kn_ptr x_at = rig_up(r, x, 2 * N * D), h = rig_new(r, 2 * N * D);
    kn_ptr experts = rig_new(r, 4 * N * TOPK), weights = rig_new(r, 4 * N * TOPK);
    kn_gate gate = {.weight = {.data = rig_up(r, one, sizeof(one)), .n_out = D, .n_in = D, .dtype = KN_BF16},
                    .n_expert = D,
                    .topk = TOPK,
                    .route_scale = 1};
    for (uint32_t at = 0, b; at < N; at += b) {
        b = N - at < 16 + cut ? N - at : 16 + cut;
        kn_moe(r->device)->gate(r->stream, &gate, kn_at(x_at, 2ull * at * D), (kn_ptr){0}, b,
                                kn_at(experts, 4ull * at * TOPK), kn_at(weights, 4ull * at * TOPK));
        kn_moe(r->device)->swiglu(r->stream, kn_at(g_at, 2ull * at * D), kn_at(u_at, 2ull * at * D),
                                  kn_at(w_at, 4ull * at), b, D, 10.0f, kn_at(h, 2ull * at * D));
    }
    keep(r, out, experts, 4 * N * TOPK);
    keep(r, out, weights, 4 * N * TOPK);
    keep(r, out, h, 2 * N * D);
    cm_free(w);
    cm_free(u);
    cm_free(x);
}

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

static const kn_limits LIMITS = {.n_row = 1024,
                                 .n_in = 6144,
                                 .n_inner = 320,
                                 .n_head = HEADS,
                                 .head_dim = 96,
                                 .n_key = 256,
                                 .n_index_row = 3001,
                                 .n_expert = 40};

static void compare_paths(scenario_fn scenario)
{
    static const struct {
        uint32_t n_threads, cut;
    } ways[] = {{1, 0}, {1, 1}, {2, 3}, {3, 8}, {3, 0}};
    cm_bytes want;
    rig r;
    cm_bytes_init(&want, 0);
    rig_open(&r, "ref", NULL, 1, &LIMITS);
    scenario(&r, 0, &want);
    rig_close(&r);
    for (uint32_t i_isa = 0; kn_cpu_isa_at(i_isa) != NULL; i_isa++) {
        for (size_t i = 0; i < sizeof(ways) / sizeof(ways[0]); i++) {
            cm_bytes got;
            cm_bytes_init(&got, 0);
            rig_open(&r, "cpu", kn_cpu_isa_at(i_isa), ways[i].n_threads, &LIMITS);
            scenario(&r, ways[i].cut, &got);
            assert_int_equal(got.len, want.len);
            for (size_t k = 0; k < want.len; k++) {
                if (got.data[k] != want.data[k]) {
                    fail_msg("%s, %u threads, cut %u, seed %llu: byte %zu of %zu differs from ref",
                             kn_device_isa(r.device), ways[i].n_threads, ways[i].cut,
                             (unsigned long long)random_seed, k, want.len);
                }
            }
            cm_bytes_fini(&got);
            rig_close(&r);
        }
    }
    cm_bytes_fini(&want);
}

/* The oracle too gives the same for other cuts. */
static void compare_ref_cuts(scenario_fn scenario)
{
    cm_bytes want, got;
    rig r;
    cm_bytes_init(&want, 0);
    cm_bytes_init(&got, 0);
    rig_open(&r, "ref", NULL, 1, &LIMITS);
    scenario(&r, 0, &want);
    rig_reset(&r);
    scenario(&r, 3, &got);
    rig_close(&r);
    assert_int_equal(got.len, want.len);
    assert_memory_equal(got.data, want.data, want.len);
    cm_bytes_fini(&want);
    cm_bytes_fini(&got);
}

#define PATH_TEST(name)                                                                                      \
    static void test_##name(void **state)                                                                    \
    {                                                                                                        \
        (void)state;                                                                                         \
        compare_paths(do_##name);                                                                            \
    }
PATH_TEST(rows)
PATH_TEST(hc)
PATH_TEST(linear)
PATH_TEST(q8_edges)
PATH_TEST(q8_many)
PATH_TEST(cancelling)
PATH_TEST(grouped)
PATH_TEST(grouped_edges)
PATH_TEST(lanes)
PATH_TEST(gate)
PATH_TEST(experts)
PATH_TEST(swiglu_combine)
PATH_TEST(all_values)
PATH_TEST(layer_window)
PATH_TEST(layer_4)
PATH_TEST(layer_128)
PATH_TEST(index_ties)

static void test_ref_cuts(void **state)
{
    (void)state;
    compare_ref_cuts(do_layer_4);
    compare_ref_cuts(do_layer_128);
}

/* ---- opening ---- */

static void test_open_refuses(void **state)
{
    kn_device *device = NULL;
    cm_error err;
    (void)state;
    assert_int_equal(kn_device_open(&(kn_device_options){.backend = "abacus", .n_threads = 1}, &device, &err),
                     CM_E_CONFIG);
    assert_non_null(strstr(err.text, "cpu"));
    assert_int_equal(kn_device_open(&(kn_device_options){.isa = "mmx", .n_threads = 1}, &device, &err),
                     CM_E_CONFIG);
    assert_non_null(strstr(err.text, "portable"));
    assert_int_equal(kn_device_open(&(kn_device_options){.n_threads = 0}, &device, &err), CM_E_CONFIG);
    assert_null(device);
}

static void test_open_chooses(void **state)
{
    kn_device *device;
    const char *best = NULL;
    kn_ptr p;
    (void)state;
    for (uint32_t i = 0; kn_cpu_isa_at(i) != NULL; i++) {
        best = kn_cpu_isa_at(i);
    }
    assert_int_equal(kn_device_open(&(kn_device_options){.n_threads = 2}, &device, NULL), CM_OK);
    assert_string_equal(kn_device_name(device), "cpu");
    assert_string_equal(kn_device_isa(device), best);
    assert_int_equal(kn_mem_alloc(device, UINT64_MAX, &p), CM_E_MEMORY);
    assert_int_equal(kn_mem_alloc(device, 100, &p), CM_OK);
    assert_int_equal(p.addr % 64, 0);
    kn_mem_free(device, p);
    kn_device_close(device);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_open_refuses),  cmocka_unit_test(test_open_chooses),
        cmocka_unit_test(test_rows),          cmocka_unit_test(test_hc),
        cmocka_unit_test(test_linear),        cmocka_unit_test(test_cancelling),
        cmocka_unit_test(test_q8_edges),      cmocka_unit_test(test_q8_many),
        cmocka_unit_test(test_grouped),       cmocka_unit_test(test_gate),
        cmocka_unit_test(test_experts),       cmocka_unit_test(test_swiglu_combine),
        cmocka_unit_test(test_all_values),    cmocka_unit_test(test_layer_window),
        cmocka_unit_test(test_layer_4),       cmocka_unit_test(test_layer_128),
        cmocka_unit_test(test_index_ties),    cmocka_unit_test(test_ref_cuts),
        cmocka_unit_test(test_grouped_edges), cmocka_unit_test(test_lanes),
    };
    if (argc > 1) {
        random_seed = strtoull(argv[1], NULL, 0);
    }
    print_message("seed %llu\n", (unsigned long long)random_seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
