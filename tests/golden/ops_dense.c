/* Formats, quantization, norm, rotation, hyper-connections, products. */
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

/* ---- formats ---- */

void op_case_decode(op_case *c)
{
    const uint8_t *code = op_in(c, "code")->data;
    float value[256];
    for (uint32_t i = 0; i < op_in(c, "code")->n_item; i++) {
        value[i] = strcmp(c->name, "e4m3_decode") == 0   ? kn_e4m3_decode(code[i])
                   : strcmp(c->name, "e2m1_decode") == 0 ? kn_e2m1_decode(code[i])
                                                         : kn_e8m0_decode(code[i]);
    }
    op_check(c, "value", value);
}

void op_case_encode(op_case *c)
{
    const fx_tensor *x = op_in(c, "x");
    uint8_t *code = cm_alloc(x->n_item);
    float *value = cm_alloc(x->n_item * sizeof(*value));
    bool e4m3 = strcmp(c->name, "e4m3_encode") == 0;
    for (uint64_t i = 0; i < x->n_item; i++) {
        float v = ((const float *)x->data)[i];
        code[i] = e4m3 ? kn_e4m3_encode(v) : kn_e2m1_encode(v);
        value[i] = e4m3 ? kn_e4m3_decode(code[i]) : kn_e2m1_decode(code[i]);
    }
    op_check(c, "code", code);
    op_check(c, "value", value);
    cm_free(value);
    cm_free(code);
}

void op_case_bf16_round(op_case *c)
{
    const fx_tensor *x = op_in(c, "x");
    uint16_t *y = cm_alloc(x->n_item * sizeof(*y));
    for (uint64_t i = 0; i < x->n_item; i++) {
        y[i] = kn_bf16_encode(((const float *)x->data)[i]);
    }
    op_check(c, "y", y);
    cm_free(y);
}

void op_case_dequant(op_case *c)
{
    const fx_tensor *w = op_in(c, "w.weight"), *scale = op_in(c, "w.scale");
    const uint8_t *codes = w->data;
    bool fp4 = op_dtype(w) == KN_E2M1;
    uint64_t n_in = w->dim[1] * (fp4 ? 2 : 1), width = fp4 ? KN_FP4_BLOCK : KN_ACT_BLOCK;
    float *value = cm_alloc(w->dim[0] * n_in * sizeof(*value));
    for (uint64_t o = 0; o < w->dim[0]; o++) {
        for (uint64_t i = 0; i < n_in; i++) {
            uint64_t at = (fp4 ? o : o / KN_ACT_BLOCK) * scale->dim[1] + i / width;
            float s = op_dtype(scale) == KN_F32 ? ((const float *)scale->data)[at]
                                                : kn_e8m0_decode(((const uint8_t *)scale->data)[at]);
            float code = fp4 ? kn_e2m1_decode(codes[(o * n_in + i) / 2] >> (i % 2 * 4) & 15)
                             : kn_e4m3_decode(codes[o * n_in + i]);
            value[o * n_in + i] = code * s;
        }
    }
    op_check(c, "w", value);
    cm_free(value);
}

/* ---- quantization ---- */

void op_case_scale_exponent(op_case *c)
{
    const fx_tensor *amax = op_in(c, "amax");
    int64_t fp8[256], fp4[256];
    assert_true(amax->n_item <= 256);
    for (uint64_t i = 0; i < amax->n_item; i++) {
        fp8[i] = kn_scale_exponent_fp8(((const float *)amax->data)[i]);
        fp4[i] = kn_scale_exponent_fp4(((const float *)amax->data)[i]);
    }
    op_check(c, "fp8", fp8);
    op_check(c, "fp4", fp4);
}

/* codes [n][k] and scale bytes [n][ceil(k / block)] against code, exponent and y. */
static void check_quantized(op_case *c, const uint8_t *codes, const uint8_t *scales, uint32_t n, uint32_t k,
                            uint32_t block)
{
    uint32_t n_block = kn_blocks(k, block);
    int64_t *exponent = cm_alloc(n * n_block * sizeof(*exponent));
    uint16_t *y = cm_alloc(n * k * sizeof(*y));
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t b = 0; b < n_block; b++) {
            exponent[r * n_block + b] = scales[r * n_block + b] - 127;
        }
        for (uint32_t i = 0; i < k; i++) {
            y[r * k + i] = kn_bf16_encode(kn_e4m3_decode(codes[r * k + i]) *
                                          kn_e8m0_decode(scales[r * n_block + i / block]));
        }
    }
    op_check(c, "code", codes);
    op_check(c, "exponent", exponent);
    op_check(c, "y", y);
    cm_free(y);
    cm_free(exponent);
}

void op_case_quant_act(op_case *c)
{
    const fx_tensor *x = op_in(c, "x");
    uint32_t n = (uint32_t)x->dim[0], k = (uint32_t)x->dim[1];
    kn_q8 q = op_quantized(c, op_up(c, "x"), n, k);
    uint8_t codes[6 * 384], scales[6 * 3];
    assert_true(x->n_item <= sizeof(codes));
    rig_down(c->rig, codes, q.codes, x->n_item);
    rig_down(c->rig, scales, q.scales, n * kn_blocks(k, KN_ACT_BLOCK));
    check_quantized(c, codes, scales, n, k, KN_ACT_BLOCK);
}

/* The nope part of a KV row. */
void op_case_quant_kv(op_case *c)
{
    enum { N = 6, K = 448 };
    uint32_t row_bytes = kn_kv_row_bytes(K, 0);
    kn_ptr rows = rig_new(c->rig, N * row_bytes);
    uint8_t *stored = cm_alloc(N * row_bytes), codes[N * K], scales[N * K / KN_KV_BLOCK];
    kn_attention(c->rig->device)->kv_pack(c->rig->stream, op_up(c, "x"), N, K, 0, rows);
    rig_down(c->rig, stored, rows, N * row_bytes);
    for (uint32_t r = 0; r < N; r++) {
        memcpy(codes + r * K, stored + r * row_bytes, K);
        memcpy(scales + r * K / KN_KV_BLOCK, stored + r * row_bytes + K, K / KN_KV_BLOCK);
    }
    check_quantized(c, codes, scales, N, K, KN_KV_BLOCK);
    cm_free(stored);
}

void op_case_fp4sim(op_case *c)
{
    enum { N = 6, K = 128, B = K / KN_FP4_BLOCK };
    uint8_t codes[N * K];
    int64_t exponents[N * B];
    uint16_t y[N * K];
    for (uint32_t r = 0; r < N; r++) {
        op_quant_fp4((const uint16_t *)op_in(c, "x")->data + r * K, K, codes + r * K, exponents + r * B);
    }
    for (uint32_t i = 0; i < N * K; i++) {
        y[i] = kn_bf16_encode(kn_e2m1_decode(codes[i]) * kn_exp2i((int32_t)exponents[i / KN_FP4_BLOCK]));
    }
    op_check(c, "code", codes);
    op_check(c, "exponent", exponents);
    op_check(c, "y", y);
}

void op_case_kv_row(op_case *c)
{
    enum { N = 4, DIM = 512, ROPE = 64 };
    uint32_t row_bytes = kn_kv_row_bytes(DIM, ROPE);
    kn_ptr rows = rig_new(c->rig, N * row_bytes);
    uint8_t stored[N * 584];
    uint16_t x[N * DIM];
    assert_int_equal(row_bytes, 584);
    kn_attention(c->rig->device)->kv_pack(c->rig->stream, op_up(c, "row"), N, DIM, ROPE, rows);
    rig_down(c->rig, stored, rows, sizeof(stored));
    for (uint32_t r = 0; r < N; r++) {
        op_unpack_kv(stored + r * row_bytes, DIM, ROPE, x + r * DIM);
    }
    op_check(c, "row", x);
}

void op_case_hadamard(op_case *c)
{
    enum { N = 8, DIM = 128 };
    const uint16_t *x = op_in(c, "x")->data;
    uint32_t row_bytes = kn_index_row_bytes(DIM);
    kn_ptr rows = rig_new(c->rig, N * row_bytes);
    uint8_t stored[N * 68];
    uint16_t y[N * DIM], sim[N * DIM];
    assert_int_equal(row_bytes, 68);
    kn_attention(c->rig->device)->index_pack(c->rig->stream, op_up(c, "x"), N / 2, 2, DIM, rows);
    rig_down(c->rig, stored, rows, sizeof(stored));
    for (uint32_t r = 0; r < N; r++) {
        double v[DIM];
        for (uint32_t i = 0; i < DIM; i++) {
            v[i] = kn_bf16_decode(x[r * DIM + i]);
        }
        kn_hadamard(v, DIM);
        for (uint32_t i = 0; i < DIM; i++) {
            y[r * DIM + i] = kn_bf16_from_f64(v[i] / sqrt(DIM));
        }
        op_unpack_index(stored + r * row_bytes, DIM, sim + r * DIM);
    }
    op_check(c, "y", y);
    op_check(c, "sim", sim);
}

/* ---- norm, rope, mhc ---- */

void op_case_norm(op_case *c)
{
    const fx_tensor *x = op_in(c, "x");
    kn_ptr y = rig_new(c->rig, x->n_bytes);
    op_dense(c)->rmsnorm(c->rig->stream, op_up(c, "x"), op_up(c, "w"), (uint32_t)x->dim[0],
                         (uint32_t)x->dim[1], OP_EPS, y);
    op_check_at(c, "y", y);
}

void op_case_head_q(op_case *c)
{
    const fx_tensor *q = op_in(c, "q");
    kn_ptr y = op_up(c, "q");
    op_dense(c)->rmsnorm(c->rig->stream, y, (kn_ptr){0}, (uint32_t)(q->dim[0] * q->dim[1]),
                         (uint32_t)q->dim[2], OP_EPS, y);
    op_check_at(c, "q", y);
}

void op_case_rope(op_case *c)
{
    enum { N = 10, HALF = 32 };
    const kn_attn_ops *ops = kn_attention(c->rig->device);
    kn_stream *s = c->rig->stream;
    const int64_t *pos64 = op_in(c, "pos")->data;
    uint32_t pos[N];
    float inv_freq[HALF], cs[N][HALF][2], cosine[N][HALF], sine[N][HALF];
    kn_ptr table = rig_new(c->rig, sizeof(cs)), x;
    op_inv_freq(c, inv_freq);
    op_check(c, "inv_freq", inv_freq);
    for (uint32_t r = 0; r < N; r++) {
        pos[r] = (uint32_t)pos64[r];
    }
    ops->rope_table(s, rig_up(c->rig, inv_freq, sizeof(inv_freq)), HALF, rig_up(c->rig, pos, sizeof(pos)), N,
                    table);
    rig_down(c->rig, cs, table, sizeof(cs));
    for (uint32_t r = 0; r < N; r++) {
        for (uint32_t i = 0; i < HALF; i++) {
            cosine[r][i] = cs[r][i][0];
            sine[r][i] = cs[r][i][1];
        }
    }
    op_check(c, "cos", cosine);
    op_check(c, "sin", sine);
    x = op_up(c, "x");
    ops->rope(s, x, N, 1, 512, HALF, table, false);
    op_check_at(c, "y", x);
    x = op_up(c, "x");
    ops->rope(s, x, N, 1, 512, HALF, table, true);
    op_check_at(c, "y_inverse", x);
    x = op_up(c, "k");
    ops->rope(s, x, N, 1, 128, HALF, table, false);
    op_check_at(c, "k", x);
}

void op_case_coefficients(op_case *c)
{
    enum { N = 7, HC = 4, MIX = 24 };
    const float *m = op_in(c, "m")->data;
    float pre[N][HC], post[N][HC], comb[N][HC * HC];
    for (uint32_t r = 0; r < N; r++) {
        double wide[MIX];
        for (uint32_t i = 0; i < MIX; i++) {
            wide[i] = m[r * MIX + i];
        }
        kn_hc_coefficients(wide, op_in(c, "base")->data, op_in(c, "scale")->data, HC, 20, OP_EPS, pre[r],
                           post[r], comb[r]);
    }
    op_check(c, "pre", pre);
    op_check(c, "post", post);
    op_check(c, "comb", comb);
}

void op_case_mhc_site(op_case *c)
{
    const fx_tensor *x_in = op_in(c, "X");
    uint32_t n = (uint32_t)x_in->dim[0], hc = (uint32_t)x_in->dim[1], d = (uint32_t)x_in->dim[2];
    kn_ptr x = op_up(c, "X"), out = rig_new(c->rig, n * d * 2ull);
    kn_ptr post = rig_new(c->rig, n * hc * 4ull), comb = rig_new(c->rig, n * hc * hc * 4ull);
    kn_hc p = {.fn = op_up(c, "p_fn"),
               .base = op_up(c, "p_base"),
               .scale = op_up(c, "p_scale"),
               .d = d,
               .hc = hc,
               .sinkhorn_iters = 20,
               .norm_eps = OP_EPS,
               .hc_eps = OP_EPS};
    kn_hc head = p;
    op_dense(c)->hc_pre(c->rig->stream, &p, x, n, out, post, comb);
    op_check_at(c, "x", out);
    op_check_at(c, "post", post);
    op_check_at(c, "comb", comb);
    head.fn = op_up(c, "hc_head_fn");
    head.base = op_up(c, "hc_head_base");
    head.scale = op_up(c, "hc_head_scale");
    op_dense(c)->hc_head(c->rig->stream, &head, x, n, out);
    op_check_at(c, "head", out);
    op_dense(c)->hc_post(c->rig->stream, d, hc, op_up(c, "y"), x, post, comb, n, x);
    op_check_at(c, "Xnew", x);
}

/* ---- linear ---- */

void op_case_linear_q8(op_case *c)
{
    uint32_t n = (uint32_t)op_in(c, "x")->dim[0];
    kn_matrix w = op_matrix(c, "w");
    kn_ptr y = rig_new(c->rig, (uint64_t)n * w.n_out * 2);
    op_dense(c)->linear_q8(c->rig->stream, op_quantized(c, op_up(c, "x"), n, w.n_in), &w, n, y);
    op_check_at(c, "y", y);
}

void op_case_linear_bf16(op_case *c)
{
    uint32_t n = (uint32_t)op_in(c, "x")->dim[0];
    kn_matrix w = op_matrix(c, "w");
    kn_ptr x = op_up(c, "x"), y = rig_new(c->rig, (uint64_t)n * w.n_out * 4);
    op_dense(c)->linear_bf16(c->rig->stream, x, &w, n, KN_BF16, y);
    op_check_at(c, "y", y);
    op_dense(c)->linear_bf16(c->rig->stream, x, &w, n, KN_F32, y);
    op_check_at(c, "y32", y);
}

void op_case_head(op_case *c)
{
    uint32_t n = (uint32_t)op_in(c, "x")->dim[0], ids[6];
    kn_matrix w = op_matrix(c, "w");
    kn_ptr logits = rig_new(c->rig, (uint64_t)n * w.n_out * 4), best = rig_new(c->rig, sizeof(ids));
    int64_t ids64[6];
    op_dense(c)->linear_bf16(c->rig->stream, op_up(c, "x"), &w, n, KN_F32, logits);
    op_check_at(c, "logits", logits);
    op_dense(c)->argmax(c->rig->stream, logits, n, w.n_out, best);
    rig_down(c->rig, ids, best, sizeof(ids));
    for (uint32_t i = 0; i < 6; i++) {
        ids64[i] = ids[i];
    }
    op_check(c, "argmax", ids64);
}

void op_case_o_proj(op_case *c)
{
    uint32_t n = (uint32_t)op_in(c, "o")->dim[0];
    kn_matrix a = op_matrix(c, "wo_a"), b = op_matrix(c, "wo_b");
    kn_ptr t = rig_new(c->rig, (uint64_t)n * a.n_out * 2), y = rig_new(c->rig, (uint64_t)n * b.n_out * 2);
    op_dense(c)->linear_grouped(c->rig->stream, op_up(c, "o"), &a, (uint32_t)op_attr(c, "groups"), n, t);
    op_dense(c)->linear_q8(c->rig->stream, op_quantized(c, t, n, a.n_out), &b, n, y);
    op_check_at(c, "y", y);
}
