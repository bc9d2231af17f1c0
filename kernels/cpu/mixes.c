/* Coefficients of hyper-connections, as many rows at a time as a register has lanes; each lane goes the way
 * of kn_hc_coefficients, step by step. Bound: the divisions, 2 hc^2 a row and round. */
#include "kernels/cpu/wide.h"

typedef kn_vd mix_matrix[KN_HC_MAX][KN_HC_MAX];

static kn_vd sigmoids(kn_vd x)
{
    return 1.0 / (1.0 + kn_vd_exp(-x));
}

/* Mix i of the rows. */
static kn_vd mixes_at(const kn_hc_mixes *mixes, uint32_t i)
{
    kn_vd x;
    for (int r = 0; r < KN_VD_WIDTH; r++) {
        x[r] = mixes[r][i];
    }
    return x;
}

static inline __attribute__((always_inline)) void softmax_rows(mix_matrix c, const uint32_t hc, double eps)
{
    for (uint32_t j = 0; j < hc; j++) {
        kn_vd top = c[j][0], sum = {0};
        for (uint32_t k = 1; k < hc; k++) {
            top = kn_vd_at_least(top, c[j][k]);
        }
        for (uint32_t k = 0; k < hc; k++) {
            c[j][k] = kn_vd_exp(c[j][k] - top);
            sum += c[j][k];
        }
        for (uint32_t k = 0; k < hc; k++) {
            c[j][k] = c[j][k] / sum + eps;
        }
    }
}

static inline __attribute__((always_inline)) void normalize_rows(mix_matrix c, const uint32_t hc, double eps)
{
    for (uint32_t j = 0; j < hc; j++) {
        kn_vd sum = {0};
        for (uint32_t k = 0; k < hc; k++) {
            sum += c[j][k];
        }
        for (uint32_t k = 0; k < hc; k++) {
            c[j][k] /= sum + eps;
        }
    }
}

static inline __attribute__((always_inline)) void normalize_columns(mix_matrix c, const uint32_t hc,
                                                                    double eps)
{
    for (uint32_t k = 0; k < hc; k++) {
        kn_vd sum = {0};
        for (uint32_t j = 0; j < hc; j++) {
            sum += c[j][k];
        }
        for (uint32_t j = 0; j < hc; j++) {
            c[j][k] /= sum + eps;
        }
    }
}

/* hc a constant in each copy: small matrices stay in registers. */
static inline __attribute__((always_inline)) void balance(mix_matrix c, const uint32_t hc, uint32_t rounds,
                                                          double eps)
{
    softmax_rows(c, hc, eps);
    normalize_columns(c, hc, eps);
    for (uint32_t round = 1; round < rounds; round++) {
        normalize_rows(c, hc, eps);
        normalize_columns(c, hc, eps);
    }
}

static void put(kn_vd x, float *out, uint32_t stride)
{
    for (uint32_t r = 0; r < KN_VD_WIDTH; r++) {
        out[r * stride] = (float)x[r];
    }
}

void KN_FN(kn_cpu_hc_coefficients)(const kn_hc *p, const kn_hc_mixes *mixes, float (*pre_out)[KN_HC_MAX],
                                   float *post_out, float *comb_out)
{
    const float *base = kn_host(p->base), *scale = kn_host(p->scale);
    uint32_t hc = p->hc;
    mix_matrix c;
    for (uint32_t j = 0; j < hc; j++) {
        put(sigmoids(mixes_at(mixes, j) * scale[0] + base[j]) + p->hc_eps, pre_out[0] + j, KN_HC_MAX);
        put(2.0 * sigmoids(mixes_at(mixes, hc + j) * scale[1] + base[hc + j]), post_out + j, hc);
        for (uint32_t k = 0; k < hc; k++) {
            uint32_t i = 2 * hc + j * hc + k;
            c[j][k] = mixes_at(mixes, i) * scale[2] + base[i];
        }
    }
    if (hc == 4) { /* the released models' */
        balance(c, 4, p->sinkhorn_iters, p->hc_eps);
    } else {
        balance(c, hc, p->sinkhorn_iters, p->hc_eps);
    }
    for (uint32_t i = 0; i < hc * hc; i++) {
        put(c[i / hc][i % hc], comb_out + i, hc * hc);
    }
}
