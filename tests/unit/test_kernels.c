/* Every path of the cpu back-end against the oracle, bit for bit, one operation at a time (the order of a
 * layer's step is t_layers'): random values, sizes that are multiples of nothing, one to three threads, and
 * every batch cut into calls in other ways. Then the opening of a device. Usage: t_kernels [seed] */
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
#include "kernels/kn_math.h"
#include "tests/golden/kernel_rig.h"
#include "tests/unit/kernel_paths.h"
#include "tests/unit/kernel_random.h"

/* ---- scenarios: each appends all its outputs ---- */

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
    enum { N = 70, K = 2304, O = 9 }; /* more rows than a tile and inputs than a step of any path */
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

/* Numbers of rows up to more than a path takes at once and many of outputs, rows of weights that end
 * anywhere, for both kinds of outputs. */
static void do_lanes(rig *r, uint32_t cut, cm_bytes *out)
{
    enum { EVERY = 17, MOST = 70 };
    for (uint32_t n = 1; n <= MOST; n += n < EVERY ? 1 : MOST - EVERY) {
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

/* ---- ref against every path ---- */

PATH_TEST(rows, SMALL_DIMS)
PATH_TEST(hc, SMALL_DIMS)
PATH_TEST(linear, SMALL_DIMS)
PATH_TEST(q8_edges, SMALL_DIMS)
PATH_TEST(q8_many, SMALL_DIMS)
PATH_TEST(cancelling, SMALL_DIMS)
PATH_TEST(grouped, SMALL_DIMS)
PATH_TEST(grouped_edges, SMALL_DIMS)
PATH_TEST(lanes, SMALL_DIMS)
PATH_TEST(gate, SMALL_DIMS)
PATH_TEST(experts, SMALL_DIMS)
PATH_TEST(swiglu_combine, SMALL_DIMS)
PATH_TEST(all_values, SMALL_DIMS)

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
        cmocka_unit_test(test_open_refuses), cmocka_unit_test(test_open_chooses),
        cmocka_unit_test(test_rows),         cmocka_unit_test(test_hc),
        cmocka_unit_test(test_linear),       cmocka_unit_test(test_cancelling),
        cmocka_unit_test(test_q8_edges),     cmocka_unit_test(test_q8_many),
        cmocka_unit_test(test_grouped),      cmocka_unit_test(test_gate),
        cmocka_unit_test(test_experts),      cmocka_unit_test(test_swiglu_combine),
        cmocka_unit_test(test_all_values),   cmocka_unit_test(test_grouped_edges),
        cmocka_unit_test(test_lanes),
    };
    if (argc > 1) {
        random_seed = strtoull(argv[1], NULL, 0);
    }
    print_message("seed %llu\n", (unsigned long long)random_seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
