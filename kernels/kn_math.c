#include "kernels/kn_math.h"

#include <math.h>

#include "common/base/assert.h"

static const double LN2_HI = 0x1.62e42feep-1; /* 32 bits, so that k * LN2_HI is exact */
static const double LN2_LO = 0x1.a39ef35793c76p-33;

/* ---- logarithms ---- */

/* Splits u = 2^k m with m in [sqrt(1/2), sqrt(2)); returns m. */
static double split_exponent(double u, int32_t *k_out)
{
    uint64_t bits;
    int32_t k;
    double m;
    memcpy(&bits, &u, sizeof(bits));
    k = (int32_t)(bits >> 52) - 1023;
    m = kn_f64_from_bits((bits & 0xfffffffffffffu) | 0x3ff0000000000000u);
    if (m >= 0x1.6a09e667f3bcdp+0) {
        m *= 0.5;
        k += 1;
    }
    *k_out = k;
    return m;
}

/* k ln2 + ln(1 + f) + c, by ln(1+f) = 2 atanh(s), s = f / (2 + f), arranged so that f itself is never
 * rounded. */
static double log_parts(int32_t k, double f, double c)
{
    double s = f / (2.0 + f), z = s * s, half = 0.5 * f * f, series = 0;
    for (int n = 27; n >= 3; n -= 2) {
        series = z * (series + 2.0 / n);
    }
    if (k == 0) {
        return f - (half - (s * (half + series) + c));
    }
    return k * LN2_HI - ((half - (s * (half + series) + (k * LN2_LO + c))) - f);
}

double kn_log(double x)
{
    int32_t k;
    double m = split_exponent(x, &k);
    return log_parts(k, m - 1.0, 0);
}

double kn_log1p(double x)
{
    double u = 1.0 + x, lost, m;
    int32_t k;
    if (x > -0.29 && x < 0.41) {
        return log_parts(0, x, 0);
    }
    if (!(u < 0x1p1023)) {
        return u; /* infinity or NaN */
    }
    lost = x >= 1.0 ? 1.0 - (u - x) : x - (u - 1.0); /* what rounding 1 + x lost */
    m = split_exponent(u, &k);
    return log_parts(k, m - 1.0, lost / u);
}

/* ---- sine and cosine ---- */

typedef struct angle {
    double high, low; /* high + low = x - n pi/2, |high| <= pi/4 */
    uint32_t quadrant;
} angle;

/* pi/2 in three parts; the first two have 33 bits, so n times them is exact for n < 2^20. */
static angle reduce_angle(double x)
{
    const double p1 = 0x1.921fb544p+0, p2 = 0x1.0b4611a6p-34, p3 = 0x1.3198a2e037073p-69;
    const double shift = 0x1.8p52;
    double n = (x * 0x1.45f306dc9c883p-1 + shift) - shift;
    double t = x - n * p1;
    double product = n * p2;
    double r = t - product;
    double back = t - r;
    double lost = (t - (r + back)) + (back - product); /* exact: r + lost = t - product */
    double rest = n * p3 - lost;
    angle a;
    CM_ASSERT(x > -0x1p21 && x < 0x1p21);
    a.high = r - rest;
    a.low = (r - a.high) - rest;
    a.quadrant = (uint32_t)((int32_t)n & 3);
    return a;
}

static double sin_near_zero(double x, double low)
{
    static const double coefficient[] = {
        1.0 / 355687428096000.0, -1.0 / 1307674368000.0, 1.0 / 6227020800.0, -1.0 / 39916800.0,
        1.0 / 362880.0,          -1.0 / 5040.0,          1.0 / 120.0,
    };
    double z = x * x, v = z * x, r = 0;
    for (uint32_t i = 0; i < sizeof(coefficient) / sizeof(coefficient[0]); i++) {
        r = r * z + coefficient[i];
    }
    return x - ((z * (0.5 * low - v * r) - low) + v * (1.0 / 6.0));
}

static double cos_near_zero(double x, double low)
{
    static const double coefficient[] = {
        -1.0 / 6402373705728000.0, 1.0 / 20922789888000.0, -1.0 / 87178291200.0, 1.0 / 479001600.0,
        -1.0 / 3628800.0,          1.0 / 40320.0,          -1.0 / 720.0,         1.0 / 24.0,
    };
    double z = x * x, half = 0.5 * z, w = 1.0 - half, r = 0;
    for (uint32_t i = 0; i < sizeof(coefficient) / sizeof(coefficient[0]); i++) {
        r = r * z + coefficient[i];
    }
    return w + (((1.0 - w) - half) + (z * z * r - x * low));
}

static double sin_of(angle a, uint32_t quadrant)
{
    double value = (quadrant & 1u) ? cos_near_zero(a.high, a.low) : sin_near_zero(a.high, a.low);
    return (quadrant & 2u) ? -value : value;
}

double kn_sin(double x)
{
    angle a = reduce_angle(x);
    return sin_of(a, a.quadrant);
}

double kn_cos(double x)
{
    angle a = reduce_angle(x);
    return sin_of(a, a.quadrant + 1u);
}

/* ---- model functions ---- */

float kn_sqrt_softplus(float z)
{
    double softplus = z > 20.0f ? (double)z : kn_log1p(kn_exp((double)z));
    return (float)sqrt(softplus);
}

static void normalize_rows(double c[KN_HC_MAX][KN_HC_MAX], uint32_t hc, double eps)
{
    for (uint32_t j = 0; j < hc; j++) {
        double sum = 0;
        for (uint32_t k = 0; k < hc; k++) {
            sum += c[j][k];
        }
        for (uint32_t k = 0; k < hc; k++) {
            c[j][k] /= sum + eps;
        }
    }
}

static void normalize_columns(double c[KN_HC_MAX][KN_HC_MAX], uint32_t hc, double eps)
{
    for (uint32_t k = 0; k < hc; k++) {
        double sum = 0;
        for (uint32_t j = 0; j < hc; j++) {
            sum += c[j][k];
        }
        for (uint32_t j = 0; j < hc; j++) {
            c[j][k] /= sum + eps;
        }
    }
}

/* Softmax of each row, plus eps. */
static void softmax_rows(double c[KN_HC_MAX][KN_HC_MAX], uint32_t hc, double eps)
{
    for (uint32_t j = 0; j < hc; j++) {
        double top = c[j][0], sum = 0;
        for (uint32_t k = 1; k < hc; k++) {
            top = c[j][k] > top ? c[j][k] : top;
        }
        for (uint32_t k = 0; k < hc; k++) {
            c[j][k] = kn_exp(c[j][k] - top);
            sum += c[j][k];
        }
        for (uint32_t k = 0; k < hc; k++) {
            c[j][k] = c[j][k] / sum + eps;
        }
    }
}

void kn_hc_coefficients(const double *m, const float *base, const float *scale, uint32_t hc,
                        uint32_t sinkhorn_iters, float hc_eps, float *pre_out, float *post_out,
                        float *comb_out)
{
    double c[KN_HC_MAX][KN_HC_MAX];
    CM_ASSERT(hc >= 1 && hc <= KN_HC_MAX);
    for (uint32_t j = 0; j < hc; j++) {
        pre_out[j] = (float)(kn_sigmoid(m[j] * scale[0] + base[j]) + hc_eps);
        post_out[j] = (float)(2.0 * kn_sigmoid(m[hc + j] * scale[1] + base[hc + j]));
        for (uint32_t k = 0; k < hc; k++) {
            uint32_t i = 2 * hc + j * hc + k;
            c[j][k] = m[i] * scale[2] + base[i];
        }
    }
    /* The softmax stands for the first row step; columns come last in every round. */
    softmax_rows(c, hc, hc_eps);
    normalize_columns(c, hc, hc_eps);
    for (uint32_t round = 1; round < sinkhorn_iters; round++) {
        normalize_rows(c, hc, hc_eps);
        normalize_columns(c, hc, hc_eps);
    }
    for (uint32_t j = 0; j < hc; j++) {
        for (uint32_t k = 0; k < hc; k++) {
            comb_out[j * hc + k] = (float)c[j][k];
        }
    }
}

void kn_hc_head_coefficients(const double *m, const float *base, const float *scale, uint32_t hc,
                             float hc_eps, float *pre_out)
{
    for (uint32_t j = 0; j < hc; j++) {
        pre_out[j] = (float)(kn_sigmoid(m[j] * scale[0] + base[j]) + hc_eps);
    }
}

/* Index at which a frequency turns `turns` times over the original length. */
static double yarn_dim(double theta, uint32_t dim, double original, double turns)
{
    const double two_pi = 0x1.921fb54442d18p+2;
    return dim * kn_log(original / (turns * two_pi)) / (2.0 * kn_log(theta));
}

void kn_rope_inv_freq(double theta, uint32_t dim, double factor, double original, double beta_fast,
                      double beta_slow, bool yarn, float *inv_freq_out)
{
    double low = 0, high = 0;
    float span;
    if (yarn) {
        low = fmax(floor(yarn_dim(theta, dim, original, beta_fast)), 0);
        high = fmin(ceil(yarn_dim(theta, dim, original, beta_slow)), dim - 1.0);
    }
    span = high > low ? (float)(high - low) : 0.001f;
    for (uint32_t i = 0; i < dim / 2; i++) {
        float power = (float)kn_exp(2.0 * i / dim * kn_log(theta));
        float inv = 1.0f / power;
        if (yarn) {
            float ramp = ((float)i - (float)low) / span;
            float smooth = 1.0f - (ramp < 0 ? 0.0f : ramp > 1 ? 1.0f : ramp);
            inv = (inv / (float)factor) * (1.0f - smooth) + inv * smooth;
        }
        inv_freq_out[i] = inv;
    }
}

/* ---- top-k ---- */

/* Whether a stands after b in descending order; NaNs, whatever their bits, behind all numbers. */
static bool after(const float *score, int32_t a, int32_t b)
{
    bool a_nan = isnan(score[a]), b_nan = isnan(score[b]);
    if (a_nan || b_nan) {
        return a_nan && b_nan ? a > b : a_nan;
    }
    return score[a] < score[b] || (score[a] == score[b] && a > b);
}

/* Heap with the last in order at its root. */
static void sift_down(const float *score, int32_t *heap, uint32_t n, uint32_t at)
{
    for (;;) {
        uint32_t child = 2 * at + 1;
        int32_t moved = heap[at];
        if (child >= n) {
            return;
        }
        if (child + 1 < n && after(score, heap[child + 1], heap[child])) {
            child++;
        }
        if (!after(score, heap[child], moved)) {
            return;
        }
        heap[at] = heap[child];
        heap[child] = moved;
        at = child;
    }
}

void kn_topk(const float *score, uint32_t n, uint32_t k, int32_t *picks_out)
{
    CM_ASSERT_MSG(k <= n, "k %u n %u", k, n);
    if (k == 0) {
        return;
    }
    for (uint32_t i = 0; i < k; i++) {
        picks_out[i] = (int32_t)i;
    }
    for (uint32_t i = k / 2; i-- > 0;) {
        sift_down(score, picks_out, k, i);
    }
    for (uint32_t i = k; i < n; i++) {
        if (after(score, picks_out[0], (int32_t)i)) {
            picks_out[0] = (int32_t)i;
            sift_down(score, picks_out, k, 0);
        }
    }
    for (uint32_t left = k; left > 1; left--) {
        int32_t last = picks_out[0];
        picks_out[0] = picks_out[left - 1];
        picks_out[left - 1] = last;
        sift_down(score, picks_out, left - 1, 0);
    }
}
