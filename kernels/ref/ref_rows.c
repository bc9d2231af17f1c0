/* Rotation and the stored forms of KV and indexer rows. */
#include <math.h>
#include <string.h>

#include "common/base/assert.h"
#include "kernels/ref/ref_private.h"

void ref_rope_angles(const float *inv_freq, uint32_t half, uint32_t pos, float *cs_out)
{
    for (uint32_t i = 0; i < half; i++) {
        float angle = (float)pos * inv_freq[i];
        cs_out[2 * i] = (float)kn_cos(angle);
        cs_out[2 * i + 1] = (float)kn_sin(angle);
    }
}

void ref_rope_row(uint16_t *x, uint32_t half, const float *cs, bool inverse)
{
    for (uint32_t i = 0; i < half; i++) {
        double a = kn_bf16_decode(x[2 * i]), b = kn_bf16_decode(x[2 * i + 1]);
        double c = cs[2 * i], s = inverse ? -cs[2 * i + 1] : cs[2 * i + 1];
        x[2 * i] = kn_bf16_from_f64(a * c - b * s);
        x[2 * i + 1] = kn_bf16_from_f64(a * s + b * c);
    }
}

void ref_kv_pack_row(const uint16_t *x, uint32_t dim, uint32_t rope, uint8_t *row_out)
{
    uint32_t nope = dim - rope;
    memset(row_out, 0, kn_kv_row_bytes(dim, rope));
    ref_quant_fp8(x, nope, KN_KV_BLOCK, row_out, row_out + nope + 2 * rope);
    memcpy(row_out + nope, x + nope, rope * sizeof(*x));
}

float ref_kv_value(const uint8_t *row, uint32_t dim, uint32_t rope, uint32_t i)
{
    uint32_t nope = dim - rope;
    if (i < nope) {
        return kn_e4m3_decode(row[i]) * kn_e8m0_decode(row[nope + 2 * rope + i / KN_KV_BLOCK]);
    }
    return kn_bf16_decode(kn_u16_at(row + nope, i - nope));
}

/* Rotated by the orthonormal transform, bf16. */
static void hadamard(const uint16_t *x, uint32_t dim, uint16_t *y_out)
{
    double v[KN_DIM_MAX], norm = 1.0 / sqrt(dim);
    CM_ASSERT_MSG(dim <= KN_DIM_MAX && (dim & (dim - 1)) == 0, "dim %u", dim);
    for (uint32_t i = 0; i < dim; i++) {
        v[i] = kn_bf16_decode(x[i]);
    }
    kn_hadamard(v, dim);
    for (uint32_t i = 0; i < dim; i++) {
        y_out[i] = kn_bf16_from_f64(v[i] * norm);
    }
}

void ref_index_pack_row(const uint16_t *x, uint32_t dim, uint8_t *row_out)
{
    uint16_t y[KN_DIM_MAX];
    hadamard(x, dim, y);
    memset(row_out, 0, kn_index_row_bytes(dim));
    for (uint32_t b = 0; b < kn_blocks(dim, KN_FP4_BLOCK); b++) {
        uint32_t end = (b + 1) * KN_FP4_BLOCK < dim ? (b + 1) * KN_FP4_BLOCK : dim;
        float amax = 0;
        int32_t e;
        for (uint32_t i = b * KN_FP4_BLOCK; i < end; i++) {
            amax = fmaxf(amax, fabsf(kn_bf16_decode(y[i])));
        }
        e = kn_scale_exponent_fp4(amax);
        for (uint32_t i = b * KN_FP4_BLOCK; i < end; i++) {
            uint32_t code = kn_e2m1_encode(kn_bf16_decode(y[i]) * kn_exp2i(-e));
            row_out[i / 2] = (uint8_t)(row_out[i / 2] | code << (i % 2 * 4));
        }
        row_out[dim / 2 + b] = (uint8_t)(e + 127);
    }
}
