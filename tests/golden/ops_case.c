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

/* ---- inputs and outputs of a case ---- */

const fx_tensor *op_in(const op_case *c, const char *name)
{
    return fx_get(c->file, "%s.in.%s", c->name, name);
}

kn_ptr op_up(op_case *c, const char *name)
{
    const fx_tensor *t = op_in(c, name);
    return rig_up(c->rig, t->data, t->n_bytes);
}

double op_attr(const op_case *c, const char *name)
{
    return json_number_value(json_object_get(json_object_get(c->json, "attrs"), name));
}

void op_check(op_case *c, const char *name, const void *got)
{
    const json_t *output = json_object_get(json_object_get(c->json, "outputs"), name);
    fx_bound bound;
    char what[128];
    assert_non_null(output);
    bound = fx_bound_read(output, "D");
    snprintf(what, sizeof(what), "%s %s", c->name, name);
    fx_compare(c->group, what, fx_get(c->file, "%s.out.%s", c->name, name), got, &bound);
    c->n_checked++;
}

/* Compares what stands in device memory. */
void op_check_at(op_case *c, const char *name, kn_ptr at)
{
    const fx_tensor *golden = fx_get(c->file, "%s.out.%s", c->name, name);
    void *got = cm_alloc(golden->n_bytes);
    rig_down(c->rig, got, at, golden->n_bytes);
    op_check(c, name, got);
    cm_free(got);
}

kn_dtype op_dtype(const fx_tensor *t)
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

kn_matrix op_matrix(op_case *c, const char *name)
{
    const fx_tensor *w = fx_get(c->file, "%s.in.%s.weight", c->name, name);
    char scale_name[128];
    const fx_tensor *scale;
    kn_matrix m = {
        .data = rig_up(c->rig, w->data, w->n_bytes), .dtype = op_dtype(w), .n_out = (uint32_t)w->dim[0]};
    m.n_in = (uint32_t)w->dim[1] * (m.dtype == KN_E2M1 ? 2 : 1);
    snprintf(scale_name, sizeof(scale_name), "%s.in.%s.scale", c->name, name);
    scale = fx_find(c->file, scale_name);
    if (scale != NULL) {
        m.scale = rig_up(c->rig, scale->data, scale->n_bytes);
        m.scale_dtype = op_dtype(scale);
    }
    return m;
}

kn_q8 op_quantized(op_case *c, kn_ptr x, uint32_t n, uint32_t k)
{
    kn_q8 q = {rig_new(c->rig, (uint64_t)n * k), rig_new(c->rig, (uint64_t)n * kn_blocks(k, KN_ACT_BLOCK))};
    kn_dense(c->rig->device)->quant_act(c->rig->stream, x, n, k, q);
    return q;
}

const kn_dense_ops *op_dense(const op_case *c)
{
    return kn_dense(c->rig->device);
}

/* ---- stored rows ---- */

void op_unpack_kv(const uint8_t *row, uint32_t dim, uint32_t rope, uint16_t *x_out)
{
    uint32_t nope = dim - rope;
    for (uint32_t i = 0; i < nope; i++) {
        x_out[i] =
            kn_bf16_encode(kn_e4m3_decode(row[i]) * kn_e8m0_decode(row[nope + 2 * rope + i / KN_KV_BLOCK]));
    }
    memcpy(x_out + nope, row + nope, 2 * rope);
}

void op_unpack_index(const uint8_t *row, uint32_t dim, uint16_t *x_out)
{
    for (uint32_t i = 0; i < dim; i++) {
        x_out[i] = kn_bf16_encode(kn_e2m1_decode(row[i / 2] >> (i % 2 * 4) & 15) *
                                  kn_e8m0_decode(row[dim / 2 + i / KN_FP4_BLOCK]));
    }
}

void op_quant_fp4(const uint16_t *x, uint32_t k, uint8_t *codes_out, int64_t *exponents_out)
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

/* ---- rotation ---- */

void op_inv_freq(const op_case *c, float *inv_freq_out)
{
    const json_t *attrs = json_object_get(c->json, "attrs"), *yarn = json_object_get(attrs, "yarn");
    kn_rope_inv_freq(op_attr(c, "theta"), 64, json_number_value(json_object_get(yarn, "factor")),
                     json_number_value(json_object_get(yarn, "original")),
                     json_number_value(json_object_get(yarn, "beta_fast")),
                     json_number_value(json_object_get(yarn, "beta_slow")), json_is_object(yarn),
                     inv_freq_out);
}
