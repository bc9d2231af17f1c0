/* Work on one row: quantization, norm, rotation and the stored forms of KV and indexer rows. */
#include <math.h>

#include "common/base/assert.h"
#include "kernels/cpu/isa.h"

/* Largest magnitude; as integers bf16 magnitudes have the same order. */
static float largest(const uint16_t *x, uint32_t n)
{
    uint16_t top = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint16_t a = x[i] & 0x7fffu;
        top = a > top ? a : top;
    }
    return kn_bf16_decode(top);
}

void KN_FN(kn_cpu_quant_fp8)(const uint16_t *x, uint32_t k, uint32_t block, uint8_t *codes_out,
                             uint8_t *scales_out)
{
    for (uint32_t b = 0, at = 0; at < k; b++, at += block) {
        uint32_t n = k - at < block ? k - at : block;
        int32_t e = kn_scale_exponent_fp8(largest(x + at, n));
        float inverse = kn_exp2i(-e);
        for (uint32_t i = at; i < at + n; i++) {
            codes_out[i] = kn_e4m3_encode(kn_bf16_decode(x[i]) * inverse);
        }
        scales_out[b] = (uint8_t)(e + 127);
    }
}

/* Lane sum of squares. */
static double sum_squares(const uint16_t *x, uint32_t d)
{
    double lane[KN_LANES] = {0};
    uint32_t whole = d / KN_LANES * KN_LANES;
    for (uint32_t i = 0; i < whole; i += KN_LANES) {
        for (int l = 0; l < KN_LANES; l++) {
            double v = kn_bf16_decode(x[i + (uint32_t)l]);
            lane[l] += v * v;
        }
    }
    for (uint32_t i = whole; i < d; i++) {
        double v = kn_bf16_decode(x[i]);
        lane[i - whole] += v * v;
    }
    return kn_fold_lanes(lane);
}

void KN_FN(kn_cpu_rmsnorm)(const uint16_t *x, const uint16_t *w, uint32_t d, float eps, uint16_t *y_out)
{
    double r = 1.0 / sqrt(sum_squares(x, d) / d + eps);
    if (w == NULL) {
        for (uint32_t i = 0; i < d; i++) {
            y_out[i] = kn_bf16_from_f64(kn_bf16_decode(x[i]) * r);
        }
        return;
    }
    for (uint32_t i = 0; i < d; i++) {
        y_out[i] = kn_bf16_from_f64(kn_bf16_decode(w[i]) * (kn_bf16_decode(x[i]) * r));
    }
}

void KN_FN(kn_cpu_angles)(const float *inv_freq, uint32_t half, uint32_t pos, float *cs_out)
{
    for (uint32_t i = 0; i < half; i++) {
        double angle = (float)pos * inv_freq[i];
        cs_out[2 * i] = (float)kn_cos(angle);
        cs_out[2 * i + 1] = (float)kn_sin(angle);
    }
}

void KN_FN(kn_cpu_rotate)(uint16_t *x, uint32_t half, const float *cs, bool inverse)
{
    double sign = inverse ? -1.0 : 1.0;
    for (uint32_t i = 0; i < half; i++) {
        double a = kn_bf16_decode(x[2 * i]), b = kn_bf16_decode(x[2 * i + 1]);
        double c = cs[2 * i], s = sign * cs[2 * i + 1];
        x[2 * i] = kn_bf16_from_f64(a * c - b * s);
        x[2 * i + 1] = kn_bf16_from_f64(a * s + b * c);
    }
}

/* ---- KV rows ---- */

void KN_FN(kn_cpu_kv_pack)(const uint16_t *x, uint32_t dim, uint32_t rope, uint8_t *row_out)
{
    uint32_t nope = dim - rope, used = nope + 2 * rope + kn_blocks(nope, KN_KV_BLOCK);
    KN_FN(kn_cpu_quant_fp8)(x, nope, KN_KV_BLOCK, row_out, row_out + nope + 2 * rope);
    memcpy(row_out + nope, x + nope, rope * sizeof(*x));
    memset(row_out + used, 0, kn_kv_row_bytes(dim, rope) - used);
}

static void unpack_codes(const uint8_t *codes, uint32_t n, float scale, double *x_out)
{
    for (uint32_t i = 0; i < n; i++) {
        x_out[i] = kn_e4m3_decode(codes[i]) * scale;
    }
}

#if defined(__AVX512F__)
/* A block of KN_KV_BLOCK codes without NaN, of a scale that 2^8 does not drive out of range: a code moved
 * into place is a half float of 2^-8 times its value, subnormals too. */
static void unpack_block(const uint8_t *codes, float scale, double *x_out)
{
    const __m512 by = _mm512_set1_ps(256 * scale);
    for (uint32_t i = 0; i < KN_KV_BLOCK; i += 32) {
        __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)(codes + i)));
        __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16((int16_t)0xbf80));
        __m512 x = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), by);
        __m512 y = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), by);
        _mm512_storeu_pd(x_out + i, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
        _mm512_storeu_pd(x_out + i + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
        _mm512_storeu_pd(x_out + i + 16, _mm512_cvtps_pd(_mm512_castps512_ps256(y)));
        _mm512_storeu_pd(x_out + i + 24, _mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1)));
    }
}

static bool is_plain(const uint8_t *codes, uint8_t scale)
{
    __m512i magnitude = _mm512_and_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8(0x7f));
    return scale < 246 && _mm512_cmpeq_epi8_mask(magnitude, _mm512_set1_epi8(0x7f)) == 0;
}
#endif

void KN_FN(kn_cpu_kv_unpack)(const uint8_t *row, uint32_t dim, uint32_t rope, double *x_out)
{
    uint32_t nope = dim - rope;
    uint16_t wide[KN_DIM_MAX];
    const uint8_t *scales = row + nope + 2 * rope;
    for (uint32_t at = 0; at < nope; at += KN_KV_BLOCK) {
        uint32_t n = nope - at < KN_KV_BLOCK ? nope - at : KN_KV_BLOCK;
        float scale = kn_e8m0_decode(scales[at / KN_KV_BLOCK]);
#if defined(__AVX512F__)
        if (n == KN_KV_BLOCK && is_plain(row + at, scales[at / KN_KV_BLOCK])) {
            unpack_block(row + at, scale, x_out + at);
            continue;
        }
#endif
        unpack_codes(row + at, n, scale, x_out + at);
    }
    memcpy(wide, row + nope, rope * sizeof(*wide));
    for (uint32_t i = 0; i < rope; i++) {
        x_out[nope + i] = kn_bf16_decode(wide[i]);
    }
}

/* ---- indexer rows ---- */

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

void KN_FN(kn_cpu_index_pack)(const uint16_t *x, uint32_t dim, uint8_t *row_out)
{
    uint16_t y[KN_DIM_MAX];
    uint8_t code[KN_FP4_BLOCK];
    hadamard(x, dim, y);
    for (uint32_t b = 0, at = 0; at < dim; b++, at += KN_FP4_BLOCK) {
        uint32_t n = dim - at < KN_FP4_BLOCK ? dim - at : KN_FP4_BLOCK;
        int32_t e = kn_scale_exponent_fp4(largest(y + at, n));
        float inverse = kn_exp2i(-e);
        for (uint32_t i = 0; i < n; i++) {
            code[i] = kn_e2m1_encode(kn_bf16_decode(y[at + i]) * inverse);
        }
        for (uint32_t i = 0; i < n / 2; i++) {
            row_out[at / 2 + i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
        }
        row_out[dim / 2 + b] = (uint8_t)(e + 127);
    }
}
