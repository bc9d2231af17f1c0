/* Every case of data/ops on every back-end and every path this machine has. Each case must compare each of
 * its outputs; a case nobody knows is a failure. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "kernels/kn_math.h"
#include "tests/golden/fixture.h"
#include "tests/golden/kernel_rig.h"

#define OPS BALEEN_TEST_DATA "/ops/"

static const float EPS = 1e-6f;

typedef struct op_case {
    const char *group, *name;
    const json_t *json;
    fx_file *file;
    rig *rig;
    uint32_t n_checked;
} op_case;

/* ---- inputs and outputs of a case ---- */

static const fx_tensor *in(const op_case *c, const char *name)
{
    return fx_get(c->file, "%s.in.%s", c->name, name);
}

static kn_ptr up(op_case *c, const char *name)
{
    const fx_tensor *t = in(c, name);
    return rig_up(c->rig, t->data, t->n_bytes);
}

static double attr(const op_case *c, const char *name)
{
    return json_number_value(json_object_get(json_object_get(c->json, "attrs"), name));
}

static void check(op_case *c, const char *name, const void *got)
{
    const json_t *output = json_object_get(json_object_get(c->json, "outputs"), name);
    fx_bound bound;
    char what[128];
    assert_non_null(output);
    bound = fx_bound_read(output, "D");
    snprintf(what, sizeof(what), "%s/%s %s", c->group, c->name, name);
    fx_compare(what, fx_get(c->file, "%s.out.%s", c->name, name), got, &bound);
    c->n_checked++;
}

/* Compares what stands in device memory. */
static void check_at(op_case *c, const char *name, kn_ptr at)
{
    const fx_tensor *golden = fx_get(c->file, "%s.out.%s", c->name, name);
    void *got = cm_alloc(golden->n_bytes);
    rig_down(c->rig, got, at, golden->n_bytes);
    check(c, name, got);
    cm_free(got);
}

static kn_dtype dtype_of(const fx_tensor *t)
{
    static const struct {
        const char *name;
        kn_dtype dtype;
    } names[] = {
        {"F32", KN_F32}, {"BF16", KN_BF16}, {"F8_E4M3", KN_E4M3}, {"I8", KN_E2M1}, {"F8_E8M0", KN_E8M0}};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (strcmp(t->dtype, names[i].name) == 0) {
            return names[i].dtype;
        }
    }
    fail_msg("%s: no weight has dtype %s", t->name, t->dtype);
    return KN_NONE;
}

static kn_matrix matrix(op_case *c, const char *name)
{
    const fx_tensor *w = fx_get(c->file, "%s.in.%s.weight", c->name, name);
    char scale_name[128];
    const fx_tensor *scale;
    kn_matrix m = {
        .data = rig_up(c->rig, w->data, w->n_bytes), .dtype = dtype_of(w), .n_out = (uint32_t)w->dim[0]};
    m.n_in = (uint32_t)w->dim[1] * (m.dtype == KN_E2M1 ? 2 : 1);
    snprintf(scale_name, sizeof(scale_name), "%s.in.%s.scale", c->name, name);
    scale = fx_find(c->file, scale_name);
    if (scale != NULL) {
        m.scale = rig_up(c->rig, scale->data, scale->n_bytes);
        m.scale_dtype = dtype_of(scale);
    }
    return m;
}

static kn_q8 quantized(op_case *c, kn_ptr x, uint32_t n, uint32_t k)
{
    kn_q8 q = {rig_new(c->rig, (uint64_t)n * k), rig_new(c->rig, (uint64_t)n * kn_blocks(k, KN_ACT_BLOCK))};
    kn_dense(c->rig->device)->quant_act(c->rig->stream, x, n, k, q);
    return q;
}

static const kn_dense_ops *dense(const op_case *c)
{
    return kn_dense(c->rig->device);
}

/* ---- formats ---- */

static void case_decode(op_case *c)
{
    const uint8_t *code = in(c, "code")->data;
    float value[256];
    for (uint32_t i = 0; i < in(c, "code")->n_item; i++) {
        value[i] = strcmp(c->name, "e4m3_decode") == 0   ? kn_e4m3_decode(code[i])
                   : strcmp(c->name, "e2m1_decode") == 0 ? kn_e2m1_decode(code[i])
                                                         : kn_e8m0_decode(code[i]);
    }
    check(c, "value", value);
}

static void case_encode(op_case *c)
{
    const fx_tensor *x = in(c, "x");
    uint8_t *code = cm_alloc(x->n_item);
    float *value = cm_alloc(x->n_item * sizeof(*value));
    bool e4m3 = strcmp(c->name, "e4m3_encode") == 0;
    for (uint64_t i = 0; i < x->n_item; i++) {
        float v = ((const float *)x->data)[i];
        code[i] = e4m3 ? kn_e4m3_encode(v) : kn_e2m1_encode(v);
        value[i] = e4m3 ? kn_e4m3_decode(code[i]) : kn_e2m1_decode(code[i]);
    }
    check(c, "code", code);
    check(c, "value", value);
    cm_free(value);
    cm_free(code);
}

static void case_bf16_round(op_case *c)
{
    const fx_tensor *x = in(c, "x");
    uint16_t *y = cm_alloc(x->n_item * sizeof(*y));
    for (uint64_t i = 0; i < x->n_item; i++) {
        y[i] = kn_bf16_encode(((const float *)x->data)[i]);
    }
    check(c, "y", y);
    cm_free(y);
}

static void case_dequant(op_case *c)
{
    const fx_tensor *w = in(c, "w.weight"), *scale = in(c, "w.scale");
    const uint8_t *codes = w->data;
    bool fp4 = dtype_of(w) == KN_E2M1;
    uint64_t n_in = w->dim[1] * (fp4 ? 2 : 1), width = fp4 ? KN_FP4_BLOCK : KN_ACT_BLOCK;
    float *value = cm_alloc(w->dim[0] * n_in * sizeof(*value));
    for (uint64_t o = 0; o < w->dim[0]; o++) {
        for (uint64_t i = 0; i < n_in; i++) {
            uint64_t at = (fp4 ? o : o / KN_ACT_BLOCK) * scale->dim[1] + i / width;
            float s = dtype_of(scale) == KN_F32 ? ((const float *)scale->data)[at]
                                                : kn_e8m0_decode(((const uint8_t *)scale->data)[at]);
            float code = fp4 ? kn_e2m1_decode(codes[(o * n_in + i) / 2] >> (i % 2 * 4) & 15)
                             : kn_e4m3_decode(codes[o * n_in + i]);
            value[o * n_in + i] = code * s;
        }
    }
    check(c, "w", value);
    cm_free(value);
}

/* ---- quantization ---- */

static void case_scale_exponent(op_case *c)
{
    const fx_tensor *amax = in(c, "amax");
    int64_t fp8[256], fp4[256];
    assert_true(amax->n_item <= 256);
    for (uint64_t i = 0; i < amax->n_item; i++) {
        fp8[i] = kn_scale_exponent_fp8(((const float *)amax->data)[i]);
        fp4[i] = kn_scale_exponent_fp4(((const float *)amax->data)[i]);
    }
    check(c, "fp8", fp8);
    check(c, "fp4", fp4);
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
    check(c, "code", codes);
    check(c, "exponent", exponent);
    check(c, "y", y);
    cm_free(y);
    cm_free(exponent);
}

static void case_quant_act(op_case *c)
{
    const fx_tensor *x = in(c, "x");
    uint32_t n = (uint32_t)x->dim[0], k = (uint32_t)x->dim[1];
    kn_q8 q = quantized(c, up(c, "x"), n, k);
    uint8_t codes[6 * 384], scales[6 * 3];
    assert_true(x->n_item <= sizeof(codes));
    rig_down(c->rig, codes, q.codes, x->n_item);
    rig_down(c->rig, scales, q.scales, n * kn_blocks(k, KN_ACT_BLOCK));
    check_quantized(c, codes, scales, n, k, KN_ACT_BLOCK);
}

/* The nope part of a KV row. */
static void case_quant_kv(op_case *c)
{
    enum { N = 6, K = 448 };
    uint32_t row_bytes = kn_kv_row_bytes(K, 0);
    kn_ptr rows = rig_new(c->rig, N * row_bytes);
    uint8_t *stored = cm_alloc(N * row_bytes), codes[N * K], scales[N * K / KN_KV_BLOCK];
    kn_attention(c->rig->device)->kv_pack(c->rig->stream, up(c, "x"), N, K, 0, rows);
    rig_down(c->rig, stored, rows, N * row_bytes);
    for (uint32_t r = 0; r < N; r++) {
        memcpy(codes + r * K, stored + r * row_bytes, K);
        memcpy(scales + r * K / KN_KV_BLOCK, stored + r * row_bytes + K, K / KN_KV_BLOCK);
    }
    check_quantized(c, codes, scales, N, K, KN_KV_BLOCK);
    cm_free(stored);
}

static void quant_fp4(const uint16_t *x, uint32_t k, uint8_t *codes_out, int64_t *exponents_out)
{
    for (uint32_t b = 0; b < k / KN_FP4_BLOCK; b++) {
        float amax = 0;
        for (uint32_t i = b * KN_FP4_BLOCK; i < (b + 1) * KN_FP4_BLOCK; i++) {
            amax = fmaxf(amax, fabsf(kn_bf16_decode(x[i])));
        }
        exponents_out[b] = kn_scale_exponent_fp4(amax);
        for (uint32_t i = b * KN_FP4_BLOCK; i < (b + 1) * KN_FP4_BLOCK; i++) {
            codes_out[i] = kn_e2m1_encode(kn_bf16_decode(x[i]) * kn_exp2i((int32_t)-exponents_out[b]));
        }
    }
}

static void case_fp4sim(op_case *c)
{
    enum { N = 6, K = 128, B = K / KN_FP4_BLOCK };
    uint8_t codes[N * K];
    int64_t exponents[N * B];
    uint16_t y[N * K];
    for (uint32_t r = 0; r < N; r++) {
        quant_fp4((const uint16_t *)in(c, "x")->data + r * K, K, codes + r * K, exponents + r * B);
    }
    for (uint32_t i = 0; i < N * K; i++) {
        y[i] = kn_bf16_encode(kn_e2m1_decode(codes[i]) * kn_exp2i((int32_t)exponents[i / KN_FP4_BLOCK]));
    }
    check(c, "code", codes);
    check(c, "exponent", exponents);
    check(c, "y", y);
}

static void unpack_kv(const uint8_t *row, uint32_t dim, uint32_t rope, uint16_t *x_out)
{
    uint32_t nope = dim - rope;
    for (uint32_t i = 0; i < nope; i++) {
        x_out[i] =
            kn_bf16_encode(kn_e4m3_decode(row[i]) * kn_e8m0_decode(row[nope + 2 * rope + i / KN_KV_BLOCK]));
    }
    memcpy(x_out + nope, row + nope, 2 * rope);
}

static void unpack_index(const uint8_t *row, uint32_t dim, uint16_t *x_out)
{
    for (uint32_t i = 0; i < dim; i++) {
        x_out[i] = kn_bf16_encode(kn_e2m1_decode(row[i / 2] >> (i % 2 * 4) & 15) *
                                  kn_e8m0_decode(row[dim / 2 + i / KN_FP4_BLOCK]));
    }
}

static void case_kv_row(op_case *c)
{
    enum { N = 4, DIM = 512, ROPE = 64 };
    uint32_t row_bytes = kn_kv_row_bytes(DIM, ROPE);
    kn_ptr rows = rig_new(c->rig, N * row_bytes);
    uint8_t stored[N * 584];
    uint16_t x[N * DIM];
    assert_int_equal(row_bytes, 584);
    kn_attention(c->rig->device)->kv_pack(c->rig->stream, up(c, "row"), N, DIM, ROPE, rows);
    rig_down(c->rig, stored, rows, sizeof(stored));
    for (uint32_t r = 0; r < N; r++) {
        unpack_kv(stored + r * row_bytes, DIM, ROPE, x + r * DIM);
    }
    check(c, "row", x);
}

static void case_hadamard(op_case *c)
{
    enum { N = 8, DIM = 128 };
    const uint16_t *x = in(c, "x")->data;
    uint32_t row_bytes = kn_index_row_bytes(DIM);
    kn_ptr rows = rig_new(c->rig, N * row_bytes);
    uint8_t stored[N * 68];
    uint16_t y[N * DIM], sim[N * DIM];
    assert_int_equal(row_bytes, 68);
    kn_attention(c->rig->device)->index_pack(c->rig->stream, up(c, "x"), N / 2, 2, DIM, rows);
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
        unpack_index(stored + r * row_bytes, DIM, sim + r * DIM);
    }
    check(c, "y", y);
    check(c, "sim", sim);
}

/* ---- norm, rope, mhc ---- */

static void case_norm(op_case *c)
{
    const fx_tensor *x = in(c, "x");
    kn_ptr y = rig_new(c->rig, x->n_bytes);
    dense(c)->rmsnorm(c->rig->stream, up(c, "x"), up(c, "w"), (uint32_t)x->dim[0], (uint32_t)x->dim[1], EPS,
                      y);
    check_at(c, "y", y);
}

static void case_head_q(op_case *c)
{
    const fx_tensor *q = in(c, "q");
    kn_ptr y = up(c, "q");
    dense(c)->rmsnorm(c->rig->stream, y, (kn_ptr){0}, (uint32_t)(q->dim[0] * q->dim[1]), (uint32_t)q->dim[2],
                      EPS, y);
    check_at(c, "q", y);
}

static void inv_freq_of(const op_case *c, float *inv_freq_out)
{
    const json_t *attrs = json_object_get(c->json, "attrs"), *yarn = json_object_get(attrs, "yarn");
    kn_rope_inv_freq(attr(c, "theta"), 64, json_number_value(json_object_get(yarn, "factor")),
                     json_number_value(json_object_get(yarn, "original")),
                     json_number_value(json_object_get(yarn, "beta_fast")),
                     json_number_value(json_object_get(yarn, "beta_slow")), json_is_object(yarn),
                     inv_freq_out);
}

static void case_rope(op_case *c)
{
    enum { N = 10, HALF = 32 };
    const kn_attn_ops *ops = kn_attention(c->rig->device);
    kn_stream *s = c->rig->stream;
    const int64_t *pos64 = in(c, "pos")->data;
    uint32_t pos[N];
    float inv_freq[HALF], cs[N][HALF][2], cosine[N][HALF], sine[N][HALF];
    kn_ptr table = rig_new(c->rig, sizeof(cs)), x;
    inv_freq_of(c, inv_freq);
    check(c, "inv_freq", inv_freq);
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
    check(c, "cos", cosine);
    check(c, "sin", sine);
    x = up(c, "x");
    ops->rope(s, x, N, 1, 512, HALF, table, false);
    check_at(c, "y", x);
    x = up(c, "x");
    ops->rope(s, x, N, 1, 512, HALF, table, true);
    check_at(c, "y_inverse", x);
    x = up(c, "k");
    ops->rope(s, x, N, 1, 128, HALF, table, false);
    check_at(c, "k", x);
}

static void case_coefficients(op_case *c)
{
    enum { N = 7, HC = 4, MIX = 24 };
    const float *m = in(c, "m")->data;
    float pre[N][HC], post[N][HC], comb[N][HC * HC];
    for (uint32_t r = 0; r < N; r++) {
        double wide[MIX];
        for (uint32_t i = 0; i < MIX; i++) {
            wide[i] = m[r * MIX + i];
        }
        kn_hc_coefficients(wide, in(c, "base")->data, in(c, "scale")->data, HC, 20, EPS, pre[r], post[r],
                           comb[r]);
    }
    check(c, "pre", pre);
    check(c, "post", post);
    check(c, "comb", comb);
}

static void case_mhc_site(op_case *c)
{
    const fx_tensor *x_in = in(c, "X");
    uint32_t n = (uint32_t)x_in->dim[0], hc = (uint32_t)x_in->dim[1], d = (uint32_t)x_in->dim[2];
    kn_ptr x = up(c, "X"), out = rig_new(c->rig, n * d * 2ull);
    kn_ptr post = rig_new(c->rig, n * hc * 4ull), comb = rig_new(c->rig, n * hc * hc * 4ull);
    kn_hc p = {.fn = up(c, "p_fn"),
               .base = up(c, "p_base"),
               .scale = up(c, "p_scale"),
               .d = d,
               .hc = hc,
               .sinkhorn_iters = 20,
               .norm_eps = EPS,
               .hc_eps = EPS};
    kn_hc head = p;
    dense(c)->hc_pre(c->rig->stream, &p, x, n, out, post, comb);
    check_at(c, "x", out);
    check_at(c, "post", post);
    check_at(c, "comb", comb);
    head.fn = up(c, "hc_head_fn");
    head.base = up(c, "hc_head_base");
    head.scale = up(c, "hc_head_scale");
    dense(c)->hc_head(c->rig->stream, &head, x, n, out);
    check_at(c, "head", out);
    dense(c)->hc_post(c->rig->stream, d, hc, up(c, "y"), x, post, comb, n, x);
    check_at(c, "Xnew", x);
}

/* ---- linear ---- */

static void case_linear_q8(op_case *c)
{
    uint32_t n = (uint32_t)in(c, "x")->dim[0];
    kn_matrix w = matrix(c, "w");
    kn_ptr y = rig_new(c->rig, (uint64_t)n * w.n_out * 2);
    dense(c)->linear_q8(c->rig->stream, quantized(c, up(c, "x"), n, w.n_in), &w, n, y);
    check_at(c, "y", y);
}

static void case_linear_bf16(op_case *c)
{
    uint32_t n = (uint32_t)in(c, "x")->dim[0];
    kn_matrix w = matrix(c, "w");
    kn_ptr x = up(c, "x"), y = rig_new(c->rig, (uint64_t)n * w.n_out * 4);
    dense(c)->linear_bf16(c->rig->stream, x, &w, n, KN_BF16, y);
    check_at(c, "y", y);
    dense(c)->linear_bf16(c->rig->stream, x, &w, n, KN_F32, y);
    check_at(c, "y32", y);
}

static void case_head(op_case *c)
{
    uint32_t n = (uint32_t)in(c, "x")->dim[0], ids[6];
    kn_matrix w = matrix(c, "w");
    kn_ptr logits = rig_new(c->rig, (uint64_t)n * w.n_out * 4), best = rig_new(c->rig, sizeof(ids));
    int64_t ids64[6];
    dense(c)->linear_bf16(c->rig->stream, up(c, "x"), &w, n, KN_F32, logits);
    check_at(c, "logits", logits);
    dense(c)->argmax(c->rig->stream, logits, n, w.n_out, best);
    rig_down(c->rig, ids, best, sizeof(ids));
    for (uint32_t i = 0; i < 6; i++) {
        ids64[i] = ids[i];
    }
    check(c, "argmax", ids64);
}

static void case_o_proj(op_case *c)
{
    uint32_t n = (uint32_t)in(c, "o")->dim[0];
    kn_matrix a = matrix(c, "wo_a"), b = matrix(c, "wo_b");
    kn_ptr t = rig_new(c->rig, (uint64_t)n * a.n_out * 2), y = rig_new(c->rig, (uint64_t)n * b.n_out * 2);
    dense(c)->linear_grouped(c->rig->stream, up(c, "o"), &a, (uint32_t)attr(c, "groups"), n, t);
    dense(c)->linear_q8(c->rig->stream, quantized(c, t, n, a.n_out), &b, n, y);
    check_at(c, "y", y);
}

/* ---- attention ---- */

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
    kn_attn a = {.layout = {.ratio = 0, .row_bytes = (uint32_t)row_bytes},
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
    check_at(c, "o", o);
    cm_free(host);
}

static void case_attention(op_case *c)
{
    uint32_t n = (uint32_t)attr(c, "keys");
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
    uint32_t ratio = (uint32_t)attr(c, "ratio"), dim = (uint32_t)attr(c, "dim"),
             n = (uint32_t)in(c, "x")->dim[0];
    uint32_t n_page = kn_blocks(n, KN_PAGE_TOKENS), list[8];
    float inv_freq[32];
    compressor_run run = {.n_token = n, .width = kn_compress_width(ratio, dim)};
    kn_ptr freq;
    inv_freq_of(c, inv_freq);
    freq = rig_up(c->rig, inv_freq, sizeof(inv_freq));
    run.c = (kn_compress){.ape = up(c, "c.ape"),
                          .norm = up(c, "c.norm.weight"),
                          .inv_freq = freq,
                          .ratio = ratio,
                          .dim = dim,
                          .rope = 64,
                          .eps = EPS,
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
    run.state_bytes = kn_compress_state_bytes(ratio, dim);
    run.slot = rig_new(c->rig, run.c.slot_state + run.state_bytes);
    return run;
}

/* Products of tokens first .. first + n - 1, then compress and commit them as one batch. */
static void compressor_feed(op_case *c, const compressor_run *run, uint32_t first, uint32_t n)
{
    const kn_attn_ops *ops = kn_attention(c->rig->device);
    kn_matrix wkv = matrix(c, "c.wkv"), wgate = matrix(c, "c.wgate");
    kn_ptr x =
        rig_up(c->rig, (const uint16_t *)in(c, "x")->data + (uint64_t)first * wkv.n_in, 2ull * n * wkv.n_in);
    kn_ptr kv = rig_new(c->rig, 4ull * n * run->width), score = rig_new(c->rig, 4ull * n * run->width);
    kn_seg seg = {.row0 = 0, .n_row = n, .pos0 = first, .page0 = 0, .slot = run->slot};
    kn_batch b = {.segs = rig_up(c->rig, &seg, sizeof(seg)),
                  .pages = run->pages,
                  .page_pool = run->pool,
                  .page_bytes = run->page_bytes,
                  .n_seg = 1,
                  .n_row = n};
    dense(c)->linear_bf16(c->rig->stream, x, &wkv, n, KN_F32, kv);
    dense(c)->linear_bf16(c->rig->stream, x, &wgate, n, KN_F32, score);
    ops->compress(c->rig->stream, &b, &run->c, kv, score);
    ops->compress_commit(c->rig->stream, &b, &run->c, kv, score);
    assert_int_equal(kn_stream_sync(c->rig->stream), CM_OK);
}

static void compressor_check(op_case *c, const compressor_run *run)
{
    uint32_t ratio = run->c.ratio, dim = run->c.dim, n_row = run->n_token / ratio, cut = n_row * ratio;
    uint32_t span = kn_compress_span(ratio), width = run->width, n_tail = run->n_token - cut;
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
            unpack_index(row, dim, rows + (uint64_t)j * dim);
        } else {
            unpack_kv(row, dim, 64, rows + (uint64_t)j * dim);
        }
    }
    check(c, "rows", rows);
    for (uint32_t i_array = 0; i_array < 2; i_array++) {
        const float *entries = state + (uint64_t)i_array * span * width;
        for (uint32_t i = 0; i < n_tail; i++) {
            memcpy(part + (uint64_t)i * width, entries + (uint64_t)((cut + i) % span) * width, 4ull * width);
        }
        check(c, i_array == 0 ? "tail_kv" : "tail_score", part);
        if (ratio == 4) { /* the last whole window's half that feeds the next row */
            for (uint32_t i = 0; i < 4; i++) {
                memcpy(part + (uint64_t)i * dim, entries + (uint64_t)((cut - 4 + i) % span) * width,
                       4ull * dim);
            }
            check(c, i_array == 0 ? "overlap_kv" : "overlap_score", part);
        }
    }
    cm_free(part);
    cm_free(state);
    cm_free(rows);
    cm_free(pool);
}

static void case_compressor(op_case *c)
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
    quant_fp4(x, dim, codes, exponents);
    for (uint32_t i = 0; i < dim / 2; i++) {
        row_out[i] = (uint8_t)(codes[2 * i] | codes[2 * i + 1] << 4);
    }
    for (uint32_t i = 0; i < dim / KN_FP4_BLOCK; i++) {
        row_out[dim / 2 + i] = (uint8_t)(exponents[i] + 127);
    }
    unpack_index(row_out, dim, back);
    for (uint32_t i = 0; i < dim; i++) {
        assert_true(kn_bf16_decode(back[i]) == kn_bf16_decode(x[i]));
    }
}

/* Scores do not leave the operation, but for every k the k best picks must be those of the golden scores:
 * that fixes their whole order, ties included. */
static void case_index_scores(op_case *c)
{
    enum { N = 5, HEADS = 4, DIM = 128, ROWS = 40, PER_PAGE = 32 };
    const fx_tensor *golden = fx_get(c->file, "%s.out.score", c->name);
    const uint16_t *iq = in(c, "iq")->data, *ik = in(c, "ik")->data;
    uint32_t row_bytes = kn_index_row_bytes(DIM), list[2] = {1, 0};
    uint8_t queries[N * HEADS * 68], pool[2 * PER_PAGE * 68] = {0};
    kn_kv_layout layout = {.ratio = 4, .index_bytes = row_bytes, .page_index = 0};
    kn_seg segs[N];
    kn_batch b = {.n_seg = N, .n_row = N, .page_bytes = PER_PAGE * row_bytes};
    kn_matrix weights = matrix(c, "weights_proj");
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
    dense(c)->linear_bf16(c->rig->stream, up(c, "x"), &weights, N, KN_BF16, w);
    rig_down(c->rig, w16, w, sizeof(w16));
    for (uint32_t i = 0; i < N * HEADS; i++) {
        w32[i] = kn_bf16_decode(w16[i]) * (float)(1.0 / sqrt(DIM * HEADS));
    }
    check(c, "w", w32);
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

static void case_topk(op_case *c)
{
    const fx_tensor *score = in(c, "score");
    uint32_t n = (uint32_t)score->dim[1], k = (uint32_t)attr(c, "topk");
    int64_t picks[5 * 12];
    for (uint32_t r = 0; r < 5; r++) {
        int32_t best[12];
        kn_topk((const float *)score->data + r * n, n, k, best);
        for (uint32_t i = 0; i < k; i++) {
            picks[r * k + i] = best[i];
        }
    }
    check(c, "picks", picks);
}

/* ---- gate ---- */

static void case_sqrtsoftplus(op_case *c)
{
    const fx_tensor *z = in(c, "z");
    float a[64];
    for (uint64_t i = 0; i < z->n_item; i++) {
        a[i] = kn_sqrt_softplus(((const float *)z->data)[i]);
    }
    check(c, "a", a);
}

/* Seventh best biased score subtracted from the sixth. */
static void check_margin(op_case *c, const float *z, uint32_t n, uint32_t n_expert)
{
    const float *bias = in(c, "g.gate.bias")->data;
    float margin[16], biased[64];
    for (uint32_t r = 0; r < n; r++) {
        int32_t best[7];
        for (uint32_t e = 0; e < n_expert; e++) {
            biased[e] = kn_sqrt_softplus(z[r * n_expert + e]) + bias[e];
        }
        kn_topk(biased, n_expert, 7, best);
        margin[r] = biased[best[5]] - biased[best[6]];
    }
    check(c, "margin", margin);
}

static void case_gate(op_case *c)
{
    enum { TOPK = 6, N_MAX = 12 };
    const json_t *outputs = json_object_get(c->json, "outputs");
    uint32_t n = (uint32_t)in(c, "x")->dim[0], ids[N_MAX] = {0};
    bool hash = strncmp(c->name, "hash", 4) == 0;
    kn_gate g = {.weight = matrix(c, "g.gate"), .topk = TOPK, .route_scale = (float)attr(c, "route_scale")};
    kn_ptr x = up(c, "x"), experts_at = rig_new(c->rig, n * TOPK * 4),
           weights = rig_new(c->rig, n * TOPK * 4);
    kn_ptr z = rig_new(c->rig, (uint64_t)n * g.weight.n_out * 4);
    float z_host[N_MAX * 16];
    int32_t experts[N_MAX * TOPK];
    int64_t experts64[N_MAX * TOPK];
    g.n_expert = g.weight.n_out;
    if (hash) {
        g.tid2eid = up(c, "g.gate.tid2eid");
        for (uint32_t i = 0; i < n; i++) {
            ids[i] = (uint32_t)((const int64_t *)in(c, "ids")->data)[i];
        }
    } else {
        g.bias = up(c, "g.gate.bias");
    }
    kn_moe(c->rig->device)
        ->gate(c->rig->stream, &g, x, rig_up(c->rig, ids, sizeof(ids)), n, experts_at, weights);
    rig_down(c->rig, experts, experts_at, n * TOPK * 4);
    for (uint32_t i = 0; i < n * TOPK; i++) {
        experts64[i] = experts[i];
    }
    check(c, "experts", experts64);
    check_at(c, "weights", weights);
    dense(c)->linear_bf16(c->rig->stream, x, &g.weight, n, KN_F32, z);
    if (json_object_get(outputs, "z") != NULL) {
        check_at(c, "z", z);
    }
    if (json_object_get(outputs, "margin") != NULL) {
        rig_down(c->rig, z_host, z, (uint64_t)n * g.n_expert * 4);
        check_margin(c, z_host, n, g.n_expert);
    }
}

/* ---- experts ---- */

static void case_expert(op_case *c)
{
    enum { N_MAX = 8 };
    kn_stream *s = c->rig->stream;
    kn_expert e = {matrix(c, "e.w1"), matrix(c, "e.w3"), matrix(c, "e.w2")};
    uint32_t n = (uint32_t)in(c, "x")->dim[0], d = e.w1.n_in, inner = e.w1.n_out;
    float limit = (float)attr(c, "swiglu_limit");
    kn_q8 x = quantized(c, up(c, "x"), n, d);
    kn_expert_item items[N_MAX];
    kn_expert_group groups[2] = {{&e, 0, n - 1}, {&e, n - 1, 1}};
    kn_ptr y = rig_new(c->rig, 2ull * n * d), g = rig_new(c->rig, 2ull * n * inner), u, h;
    for (uint32_t i = 0; i < n; i++) {
        items[i] = (kn_expert_item){
            .row = n - 1 - i, .out = n - 1 - i, .weight = ((const float *)in(c, "wt")->data)[n - 1 - i]};
    }
    kn_moe(c->rig->device)->experts(s, groups, 2, items, x, limit, y);
    check_at(c, "y", y);
    u = rig_new(c->rig, 2ull * n * inner);
    h = rig_new(c->rig, 2ull * n * inner);
    dense(c)->linear_q8(s, x, &e.w1, n, g);
    dense(c)->linear_q8(s, x, &e.w3, n, u);
    kn_moe(c->rig->device)->swiglu(s, g, u, (kn_ptr){0}, n, inner, limit, h);
    dense(c)->linear_q8(s, quantized(c, h, n, inner), &e.w2, n, y);
    check_at(c, "y_shared_form", y);
}

static void case_swiglu(op_case *c)
{
    float weight = (float)attr(c, "wt");
    uint32_t inner = (uint32_t)in(c, "g")->n_item;
    kn_ptr h = rig_new(c->rig, 2ull * inner);
    kn_moe(c->rig->device)
        ->swiglu(c->rig->stream, up(c, "g"), up(c, "u"), rig_up(c->rig, &weight, 4), 1, inner,
                 (float)attr(c, "swiglu_limit"), h);
    check_at(c, "h", h);
}

/* The float32 sum does not leave the operation; without a shared part its bf16 form does. */
static void case_combine(op_case *c)
{
    enum { N = 6, TOPK = 6, D = 40 };
    const kn_moe_ops *ops = kn_moe(c->rig->device);
    const float *acc = fx_get(c->file, "%s.out.acc", c->name)->data;
    int32_t experts[N * TOPK];
    uint16_t plain[N * D];
    kn_ptr y = up(c, "y"), out = rig_new(c->rig, sizeof(plain)), at;
    for (uint32_t i = 0; i < N * TOPK; i++) {
        experts[i] = (int32_t)((const int64_t *)in(c, "experts")->data)[i];
    }
    at = rig_up(c->rig, experts, sizeof(experts));
    ops->combine(c->rig->stream, y, at, up(c, "shared"), N, TOPK, D, out);
    check_at(c, "out", out);
    ops->combine(c->rig->stream, y, at, rig_new(c->rig, sizeof(plain)), N, TOPK, D, out);
    rig_down(c->rig, plain, out, sizeof(plain));
    for (uint32_t i = 0; i < N * D; i++) {
        assert_int_equal(plain[i], kn_bf16_encode(acc[i]));
    }
    c->n_checked++; /* acc */
}

/* ---- the list ---- */

/* A case belongs to the first row whose group is equal and whose name is a prefix of its name. */
static const struct {
    const char *group, *name;
    void (*run)(op_case *c);
} HANDLERS[] = {
    {"formats", "e4m3_decode", case_decode},
    {"formats", "e2m1_decode", case_decode},
    {"formats", "e8m0_decode", case_decode},
    {"formats", "e4m3_encode", case_encode},
    {"formats", "e2m1_encode", case_encode},
    {"formats", "bf16_round", case_bf16_round},
    {"formats", "fp4_dequant", case_dequant},
    {"formats", "fp8_dequant", case_dequant},
    {"quant", "scale_exponent", case_scale_exponent},
    {"quant", "act128", case_quant_act},
    {"quant", "kv64", case_quant_kv},
    {"quant", "fp4sim", case_fp4sim},
    {"quant", "kv_row", case_kv_row},
    {"quant", "hadamard128", case_hadamard},
    {"norm", "head_q", case_head_q},
    {"norm", "", case_norm},
    {"rope", "", case_rope},
    {"mhc", "coefficients", case_coefficients},
    {"mhc", "site", case_mhc_site},
    {"linear", "fp", case_linear_q8},
    {"linear", "bf16", case_linear_bf16},
    {"linear", "head", case_head},
    {"linear", "o_proj", case_o_proj},
    {"attention", "", case_attention},
    {"compressor", "", case_compressor},
    {"indexer", "scores", case_index_scores},
    {"indexer", "topk", case_topk},
    {"gate", "sqrtsoftplus", case_sqrtsoftplus},
    {"gate", "", case_gate},
    {"expert", "swiglu", case_swiglu},
    {"expert", "", case_expert},
    {"combine", "", case_combine},
};

enum { N_CASE = 66, N_PATH_MAX = 8 };

static void run_case(void **state)
{
    op_case *c = *state;
    for (size_t i = 0; i < sizeof(HANDLERS) / sizeof(HANDLERS[0]); i++) {
        if (strcmp(HANDLERS[i].group, c->group) == 0 &&
            strncmp(HANDLERS[i].name, c->name, strlen(HANDLERS[i].name)) == 0) {
            c->n_checked = 0;
            HANDLERS[i].run(c);
            rig_reset(c->rig);
            assert_int_equal(c->n_checked, json_object_size(json_object_get(c->json, "outputs")));
            return;
        }
    }
    fail_msg("no test for %s/%s", c->group, c->name);
}

/* Tests of one device, named after it; returns how many cases were added. */
static uint32_t add_cases(const json_t *ops, fx_file **files, rig *r, struct CMUnitTest *tests,
                          op_case *cases)
{
    const char *group;
    const json_t *list, *entry;
    uint32_t n = 0, i_file = 0;
    size_t i;
    json_object_foreach((json_t *)(uintptr_t)ops, group, list)
    {
        json_array_foreach(list, i, entry)
        {
            char name[160];
            assert_true(n < N_CASE);
            cases[n] = (op_case){.group = group,
                                 .name = json_string_value(json_object_get(entry, "case")),
                                 .json = entry,
                                 .file = files[i_file],
                                 .rig = r};
            snprintf(name, sizeof(name), "%s %s %s/%s", kn_device_name(r->device), kn_device_isa(r->device),
                     group, cases[n].name);
            tests[n] = (struct CMUnitTest){
                .name = cm_strdup(name), .test_func = run_case, .initial_state = &cases[n]};
            n++;
        }
        i_file++;
    }
    return n;
}

int main(void)
{
    static struct CMUnitTest tests[N_PATH_MAX * N_CASE];
    static op_case cases[N_PATH_MAX * N_CASE];
    static rig rigs[N_PATH_MAX];
    const kn_limits limits = {.n_row = 512,
                              .n_in = 1024,
                              .n_inner = 512,
                              .n_head = 4,
                              .head_dim = 512,
                              .n_key = 512,
                              .n_index_row = 64,
                              .n_expert = 16};
    json_t *index = fx_json(OPS "index.json");
    const json_t *ops = json_object_get(index, "ops");
    fx_file *files[16];
    uint32_t n_file = 0, n_rig = 0, n = 0;
    const char *group;
    json_t *list;
    int failed;
    json_object_foreach((json_t *)(uintptr_t)ops, group, list)
    {
        char path[512];
        snprintf(path, sizeof(path), OPS "%s.safetensors", group);
        files[n_file++] = fx_open(path);
    }
    rig_open(&rigs[n_rig++], "ref", NULL, 1, &limits);
    for (uint32_t i = 0; kn_cpu_isa_at(i) != NULL; i++) {
        rig_open(&rigs[n_rig++], "cpu", kn_cpu_isa_at(i), 2, &limits);
    }
    for (uint32_t i = 0; i < n_rig; i++) {
        uint32_t added = add_cases(ops, files, &rigs[i], tests + n, cases + n);
        assert_int_equal(added, N_CASE);
        n += added;
    }
    failed = _cmocka_run_group_tests("ops", tests, n, NULL, NULL);
    for (uint32_t i = 0; i < n; i++) {
        cm_free((void *)(uintptr_t)tests[i].name);
    }
    for (uint32_t i = 0; i < n_rig; i++) {
        rig_close(&rigs[i]);
    }
    for (uint32_t i = 0; i < n_file; i++) {
        fx_close(files[i]);
    }
    json_decref(index);
    return failed;
}
