/* Scalar arithmetic every back-end shares: the storage formats, and functions whose bits must not depend on
 * the CPU. exp, log, sin and cos are written here from their series because libm picks other instructions on
 * other CPUs and then differs in the last bit. Callers compile with -ffp-contract=off. Thread: any. Owns
 * nothing. */
#pragma once
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

static inline uint32_t kn_f32_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof(u));
    return u;
}

static inline float kn_f32_from_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof(x));
    return x;
}

static inline double kn_f64_from_bits(uint64_t u)
{
    double x;
    memcpy(&x, &u, sizeof(x));
    return x;
}

/* ---- formats ---- */

static inline float kn_bf16_decode(uint16_t b)
{
    return kn_f32_from_bits((uint32_t)b << 16);
}

/* The conversions below choose by masks where C would choose by `?:`: the compiler turns the latter into
 * branches and then cannot make vector code of a loop around them. */
static inline uint32_t kn_mask_if(bool condition)
{
    return 0u - (uint32_t)condition;
}

/* Nearest, ties to even; NaN stays NaN. */
static inline uint16_t kn_bf16_encode(float x)
{
    uint32_t u = kn_f32_bits(x), nan = kn_mask_if((u & 0x7fffffffu) > 0x7f800000u);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return (uint16_t)((rounded & ~nan) | (((u >> 16) | 0x40u) & nan));
}

/* An operation's double result on its way to a bf16 tensor: float32 first, then bf16 (class D). */
static inline uint16_t kn_bf16_from_f64(double x)
{
    return kn_bf16_encode((float)x);
}

/* OCP e4m3fn: bias 7, largest 448, 0x7F and 0xFF are NaN. */
static inline float kn_e4m3_decode(uint8_t code)
{
    uint32_t mag = code & 0x7fu, sign = (uint32_t)(code & 0x80u) << 24;
    /* Below 2^-6 there is no leading one: it is put in and subtracted again. */
    uint32_t tiny = kn_mask_if(mag < 8u), nan = kn_mask_if(mag == 0x7fu);
    float with_one = kn_f32_from_bits(((mag | (tiny & 8u)) << 20) + (120u << 23));
    float value = with_one - kn_f32_from_bits(tiny & (121u << 23));
    return kn_f32_from_bits(kn_f32_bits(value) | sign | (nan & 0x7fc00000u));
}

/* Clamps to +-448, then nearest, ties to even; -0 keeps its sign; NaN gives 0x7F or 0xFF. */
static inline uint8_t kn_e4m3_encode(float x)
{
    uint32_t u = kn_f32_bits(x), sign = (u >> 24) & 0x80u, mag = u & 0x7fffffffu;
    uint32_t capped = mag < 0x43e00000u ? mag : 0x43e00000u;
    uint32_t normal = ((capped + 0x7ffffu + ((capped >> 20) & 1u)) >> 20) - (120u << 3);
    /* Below 2^-6 codes are multiples of 2^-9, the unit in the last place of 2^14. */
    uint32_t tiny = kn_f32_bits(kn_f32_from_bits(capped) + 16384.0f) - 0x46800000u;
    uint32_t is_tiny = kn_mask_if(capped < 0x3c800000u), nan = kn_mask_if(mag > 0x7f800000u);
    return (uint8_t)((tiny & is_tiny) | (normal & ~is_tiny) | sign | (nan & 0x7fu));
}

/* e2m1 codes 0..7 are 0 0.5 1 1.5 2 3 4 6, bit 3 is the sign. Twice the value is a small integer. */
static inline int8_t kn_e2m1_doubled(uint8_t code)
{
    int8_t m = (int8_t)(code & 7), sign = (int8_t) - ((code >> 3) & 1);
    int8_t over4 = (int8_t)(m > 4 ? m - 4 : 0), over6 = (int8_t)(m > 6 ? 2 : 0);
    return (int8_t)(((m + over4 + over6) ^ sign) - sign);
}

static inline float kn_e2m1_decode(uint8_t code)
{
    float magnitude = 0.5f * (float)kn_e2m1_doubled(code & 7);
    return (code & 8) ? -magnitude : magnitude;
}

/* Clamps to +-6, then nearest, ties to the even code; -0 keeps its sign. */
static inline uint8_t kn_e2m1_encode(float x)
{
    float a = x < 0 ? -x : x;
    uint32_t code = (uint32_t)(a > 0.25f) + (uint32_t)(a >= 0.75f) + (uint32_t)(a > 1.25f) +
                    (uint32_t)(a >= 1.75f) + (uint32_t)(a > 2.5f) + (uint32_t)(a >= 3.5f) +
                    (uint32_t)(a > 5.0f);
    return (uint8_t)(code | ((kn_f32_bits(x) >> 28) & 8u));
}

/* 2^(byte - 127); byte 0 is the subnormal 2^-127, byte 255 is NaN (refused when a checkpoint is read). */
static inline float kn_e8m0_decode(uint8_t byte)
{
    uint32_t bits = byte == 0 ? 0x00400000u : (uint32_t)byte << 23;
    return kn_f32_from_bits(byte == 255 ? 0x7fc00000u : bits);
}

/* ceil(log2 t) of a positive normal t, by its bits. */
static inline int32_t kn_exponent_up(float t)
{
    uint32_t u = kn_f32_bits(t);
    return (int32_t)(u >> 23) - 127 + ((u & 0x7fffffu) != 0);
}

/* Exponent e of the scale 2^e of a block whose largest magnitude is amax. */
static inline int32_t kn_scale_exponent_fp8(float amax)
{
    float floored = amax > 1e-4f ? amax : 1e-4f;
    return kn_exponent_up(floored * (1.0f / 448.0f));
}

static inline int32_t kn_scale_exponent_fp4(float amax)
{
    const float least = 6.0f * 0x1p-126f;
    float floored = amax > least ? amax : least;
    return kn_exponent_up(floored * (1.0f / 6.0f));
}

/* 2^e for -126 <= e <= 127. */
static inline float kn_exp2i(int32_t e)
{
    return kn_f32_from_bits((uint32_t)(e + 127) << 23);
}

/* ---- functions ---- */

/* e^x within 1 ulp; 0 below the smallest subnormal, infinity above the largest double. Written without
 * branches so that a loop over it becomes vector code with the same bits. */
static inline double kn_exp(double x)
{
    /* x = k ln2 + r, |r| <= ln2 / 2. The high part of ln2 has 32 bits, so k times it is exact. */
    const double shift = 0x1.8p52, ln2_hi = 0x1.62e42feep-1, ln2_lo = 0x1.a39ef35793c76p-33;
    double low = x < -750.0 ? -750.0 : x;
    double bounded = low > 720.0 ? 720.0 : low;
    double t = bounded * 0x1.71547652b82fep+0 + shift;
    double k = t - shift;
    double r = (bounded - k * ln2_hi) - k * ln2_lo;
    double q = 1.0 / 6227020800.0;
    uint64_t bits, half, rest;
    q = q * r + 1.0 / 479001600.0;
    q = q * r + 1.0 / 39916800.0;
    q = q * r + 1.0 / 3628800.0;
    q = q * r + 1.0 / 362880.0;
    q = q * r + 1.0 / 40320.0;
    q = q * r + 1.0 / 5040.0;
    q = q * r + 1.0 / 720.0;
    q = q * r + 1.0 / 120.0;
    q = q * r + 1.0 / 24.0;
    q = q * r + 1.0 / 6.0;
    q = q * r + 0.5;
    q = 1.0 + (r + r * r * q);
    /* 2^k in two factors: k reaches past the exponents a double can hold. k + 2048 is positive. */
    memcpy(&bits, &t, sizeof(bits));
    bits = (bits + 2048u) & 0xfffu;
    half = bits >> 1;
    rest = bits - half;
    return q * kn_f64_from_bits((half + 1023u - 1024u) << 52) *
           kn_f64_from_bits((rest + 1023u - 1024u) << 52);
}

static inline double kn_sigmoid(double x)
{
    return 1.0 / (1.0 + kn_exp(-x));
}

/* ln(1 + x) within 2 ulp, x > -1. */
double kn_log1p(double x);
/* ln x within 2 ulp, x > 0 and normal. */
double kn_log(double x);
/* Within 1 ulp for |x| <= 1.1e6 rad (position 2^20 at one rad a position); beyond 2^21 it is our bug. */
double kn_sin(double x);
double kn_cos(double x);

/* Walsh-Hadamard transform of v [n] in place, Sylvester order, unscaled; n a power of two. By butterflies:
 * the order of additions is fixed by n. */
static inline void kn_hadamard(double *v, uint32_t n)
{
    for (uint32_t h = 1; h < n; h *= 2) {
        for (uint32_t base = 0; base < n; base += 2 * h) {
            for (uint32_t i = base; i < base + h; i++) {
                double a = v[i], b = v[i + h];
                v[i] = a + b;
                v[i + h] = a - b;
            }
        }
    }
}

/* sqrt(softplus(z)), the gate's activation; accurate for very negative z too. */
float kn_sqrt_softplus(float z);

/* Manifold-constrained hyper-connections: coefficients of one site from its mixes.
 *   m [(2 + hc) * hc] double: scaled dot products; base likewise, scale [3]
 *   pre_out, post_out [hc], comb_out [hc source][hc destination]; hc <= KN_HC_MAX */
enum { KN_HC_MAX = 8 };
void kn_hc_coefficients(const double *m, const float *base, const float *scale, uint32_t hc,
                        uint32_t sinkhorn_iters, float hc_eps, float *pre_out, float *post_out,
                        float *comb_out);
/* The head's variant: one scale, pre only, m [hc]. */
void kn_hc_head_coefficients(const double *m, const float *base, const float *scale, uint32_t hc,
                             float hc_eps, float *pre_out);

/* Frequencies of a rotation of dim values: inv_freq_out [dim / 2]. Without yarn factor, original, beta_fast
 * and beta_slow are not read. */
void kn_rope_inv_freq(double theta, uint32_t dim, double factor, double original, double beta_fast,
                      double beta_slow, bool yarn, float *inv_freq_out);

/* Indexes of the k largest of score [n] in descending order, the lower index first among equals (-0 equals 0;
 * NaNs equal one another and are less than all numbers); k <= n, picks_out [k]. O(n log k). */
void kn_topk(const float *score, uint32_t n, uint32_t k, int32_t *picks_out);
