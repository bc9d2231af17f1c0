/* Work on one row: quantization, norm, rotation and the stored forms of KV and indexer rows. */
#include <math.h>

#include "common/base/assert.h"
#include "kernels/cpu/chunk.h"
#include "kernels/cpu/wide.h"

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

/* Lane sum of squares; squares of bf16 values are exact. */
static double sum_squares(const uint16_t *x, uint32_t d)
{
    kn_vd acc[KN_LANE_VECTORS] = {0};
    double lane[KN_LANES];
    uint32_t whole = d / KN_LANES * KN_LANES;
    for (uint32_t i = 0; i < whole; i += KN_LANES) {
        for (uint32_t v = 0; v < KN_LANE_VECTORS; v += 2) {
            kn_wide at = kn_wide_from_bf16(x + i + v * KN_VD_WIDTH);
            acc[v] = kn_vd_add_exact_product(at.half[0], at.half[0], acc[v]);
            acc[v + 1] = kn_vd_add_exact_product(at.half[1], at.half[1], acc[v + 1]);
        }
    }
    for (int v = 0; v < KN_LANE_VECTORS; v++) {
        kn_vd_store(lane + v * KN_VD_WIDTH, acc[v]);
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
    uint32_t i = 0;
    for (; i + KN_WIDE <= d; i += KN_WIDE) {
        kn_wide y = kn_wide_from_bf16(x + i), by = {{kn_vd_all(1), kn_vd_all(1)}};
        if (w != NULL) {
            by = kn_wide_from_bf16(w + i);
        }
        y.half[0] = by.half[0] * (y.half[0] * r);
        y.half[1] = by.half[1] * (y.half[1] * r);
        kn_wide_to_bf16(y, y_out + i);
    }
    for (; i < d; i++) {
        y_out[i] = kn_bf16_from_f64((w != NULL ? kn_bf16_decode(w[i]) : 1) * (kn_bf16_decode(x[i]) * r));
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

#if defined(__AVX512F__)
/* Pairs a, b side by side: a c - b s and b c + a s; the products are exact. */
static inline void rotate_wide(uint16_t *x, const float *cs, kn_vd sign)
{
    kn_wide ab = kn_wide_from_bf16(x), turn = kn_wide_from_f32(_mm512_loadu_ps(cs));
    for (int h = 0; h < 2; h++) {
        kn_vd c = _mm512_movedup_pd(turn.half[h]), s = _mm512_permute_pd(turn.half[h], 0xff);
        ab.half[h] = _mm512_fmaddsub_pd(ab.half[h], c, _mm512_permute_pd(ab.half[h], 0x55) * (s * sign));
    }
    kn_wide_to_bf16(ab, x);
}
#endif

void KN_FN(kn_cpu_rotate)(uint16_t *x, uint32_t half, const float *cs, bool inverse)
{
    double sign = inverse ? -1.0 : 1.0;
    uint32_t i = 0;
#if defined(__AVX512F__)
    for (; 2 * i + KN_WIDE <= 2 * half; i += KN_WIDE / 2) {
        rotate_wide(x + 2 * i, cs + 2 * i, kn_vd_all(sign));
    }
#endif
    for (; i < half; i++) {
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
enum { PLAIN_SCALE_MAX = 245 };

/* Codes without NaN of a scale that 2^8 does not drive out of range: a code moved into place is a half float
 * of 2^-8 times its value, subnormals too. */
static inline void unpack_32(const uint8_t *codes, __m512 by, double *x_out)
{
    __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    __m512i half = _mm512_and_si512(_mm512_slli_epi16(wide, 7), _mm512_set1_epi16((int16_t)0xbf80));
    __m512 x = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(half)), by);
    __m512 y = _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)), by);
    _mm512_storeu_pd(x_out, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    _mm512_storeu_pd(x_out + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
    _mm512_storeu_pd(x_out + 16, _mm512_cvtps_pd(_mm512_castps512_ps256(y)));
    _mm512_storeu_pd(x_out + 24, _mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1)));
}

/* Whole blocks; false, with nothing that counts written, where a code is NaN or a scale too large. */
static bool unpack_plain(const uint8_t *codes, const uint8_t *scales, uint32_t n, double *x_out)
{
    const __m512i nan = _mm512_set1_epi8(0x7f);
    __mmask64 odd = 0;
    uint8_t most = 0;
    for (uint32_t at = 0; at < n; at += KN_KV_BLOCK, scales++) {
        __m512 by = _mm512_set1_ps(256 * kn_e8m0_decode(*scales));
        most = *scales > most ? *scales : most;
        odd |= _mm512_cmpeq_epi8_mask(_mm512_and_si512(_mm512_loadu_si512(codes + at), nan), nan);
        unpack_32(codes + at, by, x_out + at);
        unpack_32(codes + at + 32, by, x_out + at + 32);
    }
    return odd == 0 && most <= PLAIN_SCALE_MAX;
}
#else
static bool unpack_plain(const uint8_t *codes, const uint8_t *scales, uint32_t n, double *x_out)
{
    (void)codes;
    (void)scales;
    (void)x_out;
    return n == 0;
}
#endif

static void unpack_bf16(const uint8_t *from, uint32_t n, double *x_out)
{
    enum { STEP = 16 };
    uint16_t part[STEP];
    for (; n >= STEP; n -= STEP, from += sizeof(part), x_out += STEP) {
        memcpy(part, from, sizeof(part));
        for (uint32_t i = 0; i < STEP; i++) {
            x_out[i] = kn_bf16_decode(part[i]);
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        x_out[i] = kn_bf16_decode(kn_u16_at(from, i));
    }
}

void KN_FN(kn_cpu_kv_unpack)(const uint8_t *row, uint32_t dim, uint32_t rope, double *x_out)
{
    uint32_t nope = dim - rope, whole = nope / KN_KV_BLOCK * KN_KV_BLOCK;
    const uint8_t *scales = row + nope + 2 * rope;
    uint32_t at = unpack_plain(row, scales, whole, x_out) ? whole : 0;
    for (; at < nope; at += KN_KV_BLOCK) {
        uint32_t n = nope - at < KN_KV_BLOCK ? nope - at : KN_KV_BLOCK;
        unpack_codes(row + at, n, kn_e8m0_decode(scales[at / KN_KV_BLOCK]), x_out + at);
    }
    unpack_bf16(row + nope, rope, x_out + nope);
}

/* ---- indexer rows ---- */

#if defined(__AVX512F__)
/* Butterflies of 8, 16, 32 ... registers, two steps in one pass over them. */
INLINED void butterflies(kn_vd *v, uint32_t n)
{
    uint32_t h = 1;
    for (; 4 * h <= n; h *= 4) {
        for (uint32_t base = 0; base < n; base += 4 * h) {
            for (uint32_t i = base; i < base + h; i++) {
                kn_vd a = v[i] + v[i + h], b = v[i] - v[i + h];
                kn_vd c = v[i + 2 * h] + v[i + 3 * h], d = v[i + 2 * h] - v[i + 3 * h];
                v[i] = a + c;
                v[i + h] = b + d;
                v[i + 2 * h] = a - c;
                v[i + 3 * h] = b - d;
            }
        }
    }
    for (uint32_t i = 0; 2 * h == n && i < h; i++) {
        kn_vd a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
    }
}

/* The three steps inside a register: each value plus, or its negative plus, that of its partner. */
static inline kn_vd butterflies_inside(kn_vd v)
{
    const kn_vd one = {1, -1, 1, -1, 1, -1, 1, -1}, two = {1, 1, -1, -1, 1, 1, -1, -1},
                four = {1, 1, 1, 1, -1, -1, -1, -1};
    v = _mm512_fmadd_pd(v, one, _mm512_permute_pd(v, 0x55));
    v = _mm512_fmadd_pd(v, two, _mm512_permutex_pd(v, 0x4e));
    return _mm512_fmadd_pd(v, four, _mm512_shuffle_f64x2(v, v, 0x4e));
}

/* kn_hadamard of whole kn_wides, times norm. */
INLINED void hadamard_wide(const uint16_t *x, uint32_t dim, double norm, uint16_t *y_out)
{
    kn_vd v[KN_DIM_MAX / KN_VD_WIDTH];
    for (uint32_t i = 0; i < dim; i += KN_WIDE) {
        kn_wide at = kn_wide_from_bf16(x + i);
        v[i / KN_VD_WIDTH] = butterflies_inside(at.half[0]);
        v[i / KN_VD_WIDTH + 1] = butterflies_inside(at.half[1]);
    }
    butterflies(v, dim / KN_VD_WIDTH);
    for (uint32_t i = 0; i < dim; i += KN_WIDE) {
        kn_wide at = {{v[i / KN_VD_WIDTH] * norm, v[i / KN_VD_WIDTH + 1] * norm}};
        kn_wide_to_bf16(at, y_out + i);
    }
}
#endif

static void hadamard(const uint16_t *x, uint32_t dim, uint16_t *y_out)
{
    double v[KN_DIM_MAX], norm = 1.0 / sqrt(dim);
    CM_ASSERT_MSG(dim <= KN_DIM_MAX && (dim & (dim - 1)) == 0, "dim %u", dim);
#if defined(__AVX512F__)
    if (dim == 128) { /* the model's, its loops unrolled */
        hadamard_wide(x, 128, norm, y_out);
        return;
    }
    if (dim >= KN_WIDE) {
        hadamard_wide(x, dim, norm, y_out);
        return;
    }
#endif
    for (uint32_t i = 0; i < dim; i++) {
        v[i] = kn_bf16_decode(x[i]);
    }
    kn_hadamard(v, dim);
    for (uint32_t i = 0; i < dim; i++) {
        y_out[i] = kn_bf16_from_f64(v[i] * norm);
    }
}

/* Codes of n values, two to a byte; returns the scale's. */
static uint8_t pack_block(const uint16_t *y, uint32_t n, uint8_t *codes_out)
{
    uint8_t code[KN_FP4_BLOCK];
    int32_t e = kn_scale_exponent_fp4(largest(y, n));
    float inverse = kn_exp2i(-e);
    for (uint32_t i = 0; i < n; i++) {
        code[i] = kn_e2m1_encode(kn_bf16_decode(y[i]) * inverse);
    }
    for (uint32_t i = 0; i < n / 2; i++) {
        codes_out[i] = (uint8_t)(code[2 * i] | code[2 * i + 1] << 4);
    }
    return (uint8_t)(e + 127);
}

#if defined(__AVX512F__)
/* Bits of the bf16 values from which on a magnitude over its scale has code 1, 2 ... 7: a tie goes to the
 * even code. */
static const int16_t CODE_FROM[] = {0x3e81, 0x3f40, 0x3fa1, 0x3fe0, 0x4021, 0x4060, 0x40a1};
enum { PLAIN_EXPONENT_MAX = 100 };

/* Largest of 32 unsigned values. */
static inline uint16_t largest_of(__m512i x)
{
    __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(x), _mm512_extracti64x4_epi64(x, 1));
    __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return (uint16_t)~_mm_cvtsi128_si32(_mm_minpos_epu16(~eight));
}

/* pack_block of a whole block. In bf16 a division by 2^e is a subtraction from the exponent, as long as no
 * value that counts is subnormal, infinite or NaN. */
static inline uint8_t pack_whole(const uint16_t *y, uint8_t *codes_out)
{
    __m512i x = _mm512_loadu_si512(y), mag = _mm512_and_si512(x, _mm512_set1_epi16(0x7fff));
    int32_t e = kn_scale_exponent_fp4(kn_bf16_decode(largest_of(mag)));
    if (e > PLAIN_EXPONENT_MAX || e < -PLAIN_EXPONENT_MAX) {
        return pack_block(y, KN_FP4_BLOCK, codes_out);
    }
    __m512i code = _mm512_and_si512(_mm512_srli_epi16(x, 12), _mm512_set1_epi16(8));
    mag = _mm512_sub_epi16(mag, _mm512_set1_epi16((int16_t)(128 * e)));
    for (uint32_t i = 0; i < sizeof(CODE_FROM) / sizeof(CODE_FROM[0]); i++) {
        __mmask32 more = _mm512_cmpge_epi16_mask(mag, _mm512_set1_epi16(CODE_FROM[i]));
        code = _mm512_mask_sub_epi16(code, more, code, _mm512_set1_epi16(-1));
    }
    code = _mm512_or_si512(code, _mm512_srli_epi32(code, 12));
    _mm_storeu_si128((__m128i *)codes_out, _mm512_cvtepi32_epi8(code));
    return (uint8_t)(e + 127);
}
#else
static inline uint8_t pack_whole(const uint16_t *y, uint8_t *codes_out)
{
    return pack_block(y, KN_FP4_BLOCK, codes_out);
}
#endif

void KN_FN(kn_cpu_index_pack)(const uint16_t *x, uint32_t dim, uint8_t *row_out)
{
    uint16_t y[KN_DIM_MAX];
    uint32_t b = 0, at = 0;
    hadamard(x, dim, y);
    for (; at + KN_FP4_BLOCK <= dim; b++, at += KN_FP4_BLOCK) {
        row_out[dim / 2 + b] = pack_whole(y + at, row_out + at / 2);
    }
    if (at < dim) {
        row_out[dim / 2 + b] = pack_block(y + at, dim - at, row_out + at / 2);
    }
}
