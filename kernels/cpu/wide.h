/* As many bf16 values at a time as their doubles fill two registers: what the element-wise operations share.
 * Written with the compiler's own vectors, so the same C serves every instruction set; left to itself gcc 12
 * makes scalar code of the rounding to bf16 and of kn_exp. Every function gives the bits of its scalar twin
 * in kn_math.h.
 *
 * Thread: any. Owns nothing. */
#pragma once
#include "kernels/cpu/isa.h"

enum { KN_WIDE = 2 * KN_VD_WIDTH };

/* KN_WIDE floats, codes, integers */
typedef float kn_vf __attribute__((vector_size(KN_VECTOR_BYTES)));
typedef uint32_t kn_vu __attribute__((vector_size(KN_VECTOR_BYTES)));
typedef int32_t kn_vi __attribute__((vector_size(KN_VECTOR_BYTES)));
/* as many integers as a kn_vd has doubles */
typedef uint64_t kn_vq __attribute__((vector_size(KN_VECTOR_BYTES)));

typedef struct kn_wide {
    kn_vd half[2];
} kn_wide;

static inline kn_vd kn_vd_all(double x)
{
    return x - (kn_vd){0};
}

/* ---- between registers: what the compiler would take through memory or in halves ---- */

#if defined(__AVX512F__)
static inline kn_vu kn_vu_from_codes(const uint16_t *x)
{
    return (kn_vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)x));
}

static inline void kn_vu_to_codes(kn_vu x, uint16_t *out)
{
    _mm256_storeu_si256((__m256i *)(void *)out, _mm512_cvtepi32_epi16((__m512i)x));
}

static inline kn_wide kn_wide_from_f32(kn_vf x)
{
    return (kn_wide){
        {_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))}};
}

static inline kn_vf kn_wide_to_f32(kn_wide x)
{
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(x.half[0])), _mm512_cvtpd_ps(x.half[1]),
                              1);
}
#elif defined(__AVX2__)
static inline kn_vu kn_vu_from_codes(const uint16_t *x)
{
    return (kn_vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)x));
}

static inline void kn_vu_to_codes(kn_vu x, uint16_t *out)
{
    __m128i low = _mm256_castsi256_si128((__m256i)x), high = _mm256_extracti128_si256((__m256i)x, 1);
    _mm_storeu_si128((__m128i *)(void *)out, _mm_packus_epi32(low, high));
}

static inline kn_wide kn_wide_from_f32(kn_vf x)
{
    return (kn_wide){
        {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))}};
}

static inline kn_vf kn_wide_to_f32(kn_wide x)
{
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm256_cvtpd_ps(x.half[0])),
                                _mm256_cvtpd_ps(x.half[1]), 1);
}
#else
typedef uint16_t kn_vh __attribute__((vector_size(KN_VECTOR_BYTES / 2))); /* KN_WIDE of them */
typedef float kn_vf_half __attribute__((vector_size(KN_VECTOR_BYTES / 2)));

static inline kn_vu kn_vu_from_codes(const uint16_t *x)
{
    kn_vh codes;
    memcpy(&codes, x, sizeof(codes));
    return __builtin_convertvector(codes, kn_vu);
}

static inline void kn_vu_to_codes(kn_vu x, uint16_t *out)
{
    kn_vh codes = __builtin_convertvector(x, kn_vh);
    memcpy(out, &codes, sizeof(codes));
}

static inline kn_wide kn_wide_from_f32(kn_vf x)
{
    kn_vf_half half[2];
    memcpy(half, &x, sizeof(x));
    return (kn_wide){{__builtin_convertvector(half[0], kn_vd), __builtin_convertvector(half[1], kn_vd)}};
}

static inline kn_vf kn_wide_to_f32(kn_wide x)
{
    kn_vf_half half[2] = {__builtin_convertvector(x.half[0], kn_vf_half),
                          __builtin_convertvector(x.half[1], kn_vf_half)};
    kn_vf floats;
    memcpy(&floats, half, sizeof(floats));
    return floats;
}
#endif

/* ---- bf16 ---- */

static inline kn_vf kn_vf_from_bf16(const uint16_t *x)
{
    return (kn_vf)(kn_vu_from_codes(x) << 16);
}

/* kn_bf16_encode of each. */
static inline void kn_vf_to_bf16(kn_vf x, uint16_t *out)
{
    kn_vu u = (kn_vu)x;
    kn_vu nan = (kn_vu)((kn_vi)(u & 0x7fffffffu) > 0x7f800000);
    kn_vu rounded = u + (0x7fffu + ((u >> 16) & 1u));
    kn_vu_to_codes(((rounded & ~nan) | ((u | 0x400000u) & nan)) >> 16, out);
}

static inline kn_wide kn_wide_from_bf16(const uint16_t *x)
{
    return kn_wide_from_f32(kn_vf_from_bf16(x));
}

/* kn_bf16_from_f64 of each. */
static inline void kn_wide_to_bf16(kn_wide x, uint16_t *out)
{
    kn_vf_to_bf16(kn_wide_to_f32(x), out);
}

/* ---- choices ---- */

/* x < least ? least : x, also for NaN. */
static inline kn_vd kn_vd_at_least(kn_vd x, kn_vd least)
{
#if defined(__AVX512F__)
    return _mm512_max_pd(least, x);
#elif defined(__AVX2__)
    return _mm256_max_pd(least, x);
#else
    kn_vq below = (kn_vq)(x < least);
    return (kn_vd)(((kn_vq)least & below) | ((kn_vq)x & ~below));
#endif
}

/* x > most ? most : x, also for NaN. */
static inline kn_vd kn_vd_at_most(kn_vd x, kn_vd most)
{
#if defined(__AVX512F__)
    return _mm512_min_pd(most, x);
#elif defined(__AVX2__)
    return _mm256_min_pd(most, x);
#else
    kn_vq above = (kn_vq)(x > most);
    return (kn_vd)(((kn_vq)most & above) | ((kn_vq)x & ~above));
#endif
}

/* ---- functions ---- */

/* q 2^k, k = t - 0x1.8p52 whole, -1100 < k < 1100; rounded once. */
static inline kn_vd kn_vd_scale(kn_vd q, kn_vd k, kn_vd t)
{
#if defined(__AVX512F__)
    (void)t;
    return _mm512_scalef_pd(q, k);
#else
    kn_vq bits = ((kn_vq)t + 2048u) & 0xfffu, half = bits >> 1, rest = bits - half;
    (void)k;
    return q * (kn_vd)((half + (1023u - 1024u)) << 52) * (kn_vd)((rest + (1023u - 1024u)) << 52);
#endif
}

/* kn_exp of each, step by step. */
static inline kn_vd kn_vd_exp(kn_vd x)
{
    static const double coefficient[] = {1.0 / 479001600.0,
                                         1.0 / 39916800.0,
                                         1.0 / 3628800.0,
                                         1.0 / 362880.0,
                                         1.0 / 40320.0,
                                         1.0 / 5040.0,
                                         1.0 / 720.0,
                                         1.0 / 120.0,
                                         1.0 / 24.0,
                                         1.0 / 6.0,
                                         0.5};
    const double ln2_hi = 0x1.62e42feep-1, ln2_lo = 0x1.a39ef35793c76p-33;
    const kn_vd shift = kn_vd_all(0x1.8p52);
    kn_vd bounded = kn_vd_at_most(kn_vd_at_least(x, kn_vd_all(-750.0)), kn_vd_all(720.0));
    kn_vd t = bounded * 0x1.71547652b82fep+0 + shift;
    kn_vd k = t - shift;
    kn_vd r = (bounded - k * ln2_hi) - k * ln2_lo;
    kn_vd q = kn_vd_all(1.0 / 6227020800.0);
    for (uint32_t i = 0; i < sizeof(coefficient) / sizeof(coefficient[0]); i++) {
        q = q * r + coefficient[i];
    }
    return kn_vd_scale(1.0 + (r + r * r * q), k, t);
}

static inline kn_vd kn_vd_choose(kn_vq mask, kn_vd yes, kn_vd no)
{
    return (kn_vd)(((kn_vq)yes & mask) | ((kn_vq)no & ~mask));
}

static inline kn_vd kn_vd_sqrt(kn_vd x)
{
#if defined(__AVX512F__)
    return _mm512_sqrt_pd(x);
#elif defined(__AVX2__)
    return _mm256_sqrt_pd(x);
#else
    for (int l = 0; l < KN_VD_WIDTH; l++) {
        x[l] = __builtin_sqrt(x[l]);
    }
    return x;
#endif
}

/* kn_log1p of each, for x >= 0 or NaN: its cases side by side, and those of its parts, which for k = 0 are
 * one another's negatives. */
static inline kn_vd kn_vd_log1p(kn_vd x)
{
    const double ln2_hi = 0x1.62e42feep-1, ln2_lo = 0x1.a39ef35793c76p-33;
    const kn_vd shift = kn_vd_all(0x1p52);
    kn_vq is_small = (kn_vq)(x < 0.41);
    kn_vd u = 1.0 + x, m, k, f, c, s, z, half, series = {0}, value;
    kn_vd lost = kn_vd_choose((kn_vq)(x >= 1.0), 1.0 - (u - x), x - (u - 1.0));
    m = (kn_vd)(((kn_vq)u & 0xfffffffffffffu) | 0x3ff0000000000000u);
    kn_vq is_upper = (kn_vq)(m >= 0x1.6a09e667f3bcdp+0);
    m = kn_vd_choose(is_upper, m * 0.5, m);
    /* the exponent as the last bits of a double of that size; true is -1 */
    k = (kn_vd)((((kn_vq)u >> 52) - is_upper) | (kn_vq)shift) - (shift + 1023.0);
    k = kn_vd_choose(is_small, kn_vd_all(0), k);
    f = kn_vd_choose(is_small, x, m - 1.0);
    c = kn_vd_choose(is_small, kn_vd_all(0), lost / u);
    s = f / (2.0 + f);
    z = s * s;
    half = 0.5 * f * f;
    for (int n = 27; n >= 3; n -= 2) {
        series = z * (series + 2.0 / n);
    }
    value = k * ln2_hi - ((half - (s * (half + series) + (k * ln2_lo + c))) - f);
    return kn_vd_choose((kn_vq)(u < 0x1p1023), value, u);
}
