#include <math.h>
#include <string.h>

#include "common/base/assert.h"
#include "kernels/ref/ref_private.h"

/* ---- products ---- */

/* Weight (o, i) without its scale. */
static double code_at(const kn_matrix *w, uint32_t o, uint32_t i)
{
    const uint8_t *data = kn_host(w->data);
    if (w->dtype == KN_E2M1) {
        uint8_t pair = data[(uint64_t)o * (w->n_in / 2) + i / 2];
        return kn_e2m1_decode(i % 2 == 0 ? pair & 15 : pair >> 4);
    }
    return kn_e4m3_decode(data[(uint64_t)o * w->n_in + i]);
}

static uint32_t scale_width(const kn_matrix *w)
{
    return w->dtype == KN_E2M1 ? KN_FP4_BLOCK : KN_ACT_BLOCK;
}

/* Scale of block b of row o. */
static double scale_at(const kn_matrix *w, uint32_t o, uint32_t b)
{
    uint64_t row = w->dtype == KN_E2M1 ? o : o / KN_ACT_BLOCK;
    uint64_t i = row * kn_blocks(w->n_in, scale_width(w)) + b;
    if (w->scale_dtype == KN_F32) {
        return kn_f32_at(kn_host(w->scale), i);
    }
    return kn_e8m0_decode(((const uint8_t *)kn_host(w->scale))[i]);
}

uint16_t ref_dot_q8(const uint8_t *codes, const uint8_t *scales, const kn_matrix *w, uint32_t o)
{
    uint32_t width = scale_width(w);
    double acc = 0;
    CM_ASSERT(!w->prepared);
    for (uint32_t b = 0; b < kn_blocks(w->n_in, width); b++) {
        double sum = 0;
        for (uint32_t i = b * width; i < w->n_in && i < (b + 1) * width; i++) {
            sum += kn_e4m3_decode(codes[i]) * code_at(w, o, i);
        }
        acc += sum * (kn_e8m0_decode(scales[b * width / KN_ACT_BLOCK]) * scale_at(w, o, b));
    }
    return kn_bf16_from_f64(acc);
}

double ref_dot_bf16(const uint16_t *x, const kn_matrix *w, uint32_t o)
{
    const uint8_t *row = (const uint8_t *)kn_host(w->data) + (uint64_t)o * w->n_in * sizeof(uint16_t);
    ref_sum sum = {0};
    for (uint32_t i = 0; i < w->n_in; i++) {
        ref_add(&sum, (double)kn_bf16_decode(x[i]) * kn_bf16_decode(kn_u16_at(row, i)));
    }
    return ref_total(sum);
}

static void ref_add_streams(kn_stream *s, kn_ptr e_in, uint32_t n, uint32_t hc, uint32_t d, kn_ptr x_io)
{
    const uint16_t *e = kn_host(e_in);
    uint16_t *x = kn_host(x_io);
    (void)s;
    for (uint64_t i = 0; i < (uint64_t)n * hc * d; i++) {
        uint64_t row = i / ((uint64_t)hc * d);
        double sum = (double)kn_bf16_decode(e[row * d + i % d]) + (double)kn_bf16_decode(x[i]);
        x[i] = kn_bf16_from_f64(sum);
    }
}

static void ref_linear_q8(kn_stream *s, kn_q8 x, const kn_matrix *w, uint32_t n, kn_ptr y_out)
{
    const uint8_t *codes = kn_host(x.codes), *scales = kn_host(x.scales);
    uint16_t *y = kn_host(y_out);
    (void)s;
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t o = 0; o < w->n_out; o++) {
            y[(uint64_t)r * w->n_out + o] = ref_dot_q8(
                codes + (uint64_t)r * w->n_in, scales + (uint64_t)r * kn_blocks(w->n_in, KN_ACT_BLOCK), w, o);
        }
    }
}

static void ref_linear_bf16(kn_stream *s, kn_ptr x_in, const kn_matrix *w, uint32_t n, kn_dtype y_dtype,
                            kn_ptr y_out)
{
    const uint16_t *x = kn_host(x_in);
    (void)s;
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t o = 0; o < w->n_out; o++) {
            uint64_t at = (uint64_t)r * w->n_out + o;
            double sum = ref_dot_bf16(x + (uint64_t)r * w->n_in, w, o);
            if (y_dtype == KN_F32) {
                ((float *)kn_host(y_out))[at] = (float)sum;
            } else {
                ((uint16_t *)kn_host(y_out))[at] = kn_bf16_from_f64(sum);
            }
        }
    }
}

static void ref_linear_grouped(kn_stream *s, kn_ptr x_in, const kn_matrix *w, uint32_t groups, uint32_t n,
                               kn_ptr y_out)
{
    const uint16_t *x = kn_host(x_in);
    uint16_t *y = kn_host(y_out);
    uint32_t per_group = w->n_out / groups;
    (void)s;
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t o = 0; o < w->n_out; o++) {
            const uint16_t *xr = x + ((uint64_t)r * groups + o / per_group) * w->n_in;
            ref_sum sum = {0};
            for (uint32_t i = 0; i < w->n_in; i++) {
                double weight = code_at(w, o, i) * scale_at(w, o, i / KN_ACT_BLOCK);
                ref_add(&sum, (double)kn_bf16_decode(xr[i]) * kn_bf16_decode(kn_bf16_from_f64(weight)));
            }
            y[(uint64_t)r * w->n_out + o] = kn_bf16_from_f64(ref_total(sum));
        }
    }
}

/* ---- rows ---- */

static void ref_embed(kn_stream *s, const kn_matrix *table, kn_ptr ids_in, uint32_t n, uint32_t hc,
                      kn_ptr x_out)
{
    const uint32_t *ids = kn_host(ids_in);
    const uint8_t *rows = kn_host(table->data);
    uint16_t *x = kn_host(x_out);
    uint32_t d = table->n_in;
    (void)s;
    for (uint32_t r = 0; r < n; r++) {
        CM_ASSERT_MSG(ids[r] < table->n_out, "token %u of %u", ids[r], table->n_out);
        for (uint32_t j = 0; j < hc; j++) {
            memcpy(x + ((uint64_t)r * hc + j) * d, rows + (uint64_t)ids[r] * d * sizeof(*x), d * sizeof(*x));
        }
    }
}

void ref_rmsnorm_row(const uint16_t *x, const uint16_t *w, uint32_t d, float eps, uint16_t *y_out)
{
    ref_sum squares = {0};
    double r;
    for (uint32_t i = 0; i < d; i++) {
        double v = kn_bf16_decode(x[i]);
        ref_add(&squares, v * v);
    }
    r = 1.0 / sqrt(ref_total(squares) / d + eps);
    for (uint32_t i = 0; i < d; i++) {
        double v = kn_bf16_decode(x[i]) * r;
        y_out[i] = kn_bf16_from_f64(w != NULL ? kn_bf16_decode(w[i]) * v : v);
    }
}

static void ref_rmsnorm(kn_stream *s, kn_ptr x, kn_ptr w, uint32_t n, uint32_t d, float eps, kn_ptr y_out)
{
    (void)s;
    for (uint32_t r = 0; r < n; r++) {
        ref_rmsnorm_row((const uint16_t *)kn_host(x) + (uint64_t)r * d, kn_host(w), d, eps,
                        (uint16_t *)kn_host(y_out) + (uint64_t)r * d);
    }
}

void ref_quant_fp8(const uint16_t *x, uint32_t k, uint32_t block, uint8_t *codes_out, uint8_t *scales_out)
{
    for (uint32_t b = 0; b < kn_blocks(k, block); b++) {
        uint32_t end = (b + 1) * block < k ? (b + 1) * block : k;
        float amax = 0;
        int32_t e;
        for (uint32_t i = b * block; i < end; i++) {
            amax = fmaxf(amax, fabsf(kn_bf16_decode(x[i])));
        }
        e = kn_scale_exponent_fp8(amax);
        for (uint32_t i = b * block; i < end; i++) {
            codes_out[i] = kn_e4m3_encode(kn_bf16_decode(x[i]) * kn_exp2i(-e));
        }
        scales_out[b] = (uint8_t)(e + 127);
    }
}

static void ref_quant_act(kn_stream *s, kn_ptr x, uint32_t n, uint32_t k, kn_q8 q_out)
{
    (void)s;
    for (uint32_t r = 0; r < n; r++) {
        ref_quant_fp8((const uint16_t *)kn_host(x) + (uint64_t)r * k, k, KN_ACT_BLOCK,
                      (uint8_t *)kn_host(q_out.codes) + (uint64_t)r * k,
                      (uint8_t *)kn_host(q_out.scales) + (uint64_t)r * kn_blocks(k, KN_ACT_BLOCK));
    }
}

static void ref_argmax(kn_stream *s, kn_ptr logits, uint32_t n, uint32_t vocab, kn_ptr ids_out)
{
    (void)s;
    for (uint32_t r = 0; r < n; r++) {
        const float *row = (const float *)kn_host(logits) + (uint64_t)r * vocab;
        uint32_t best = 0;
        for (uint32_t i = 1; i < vocab; i++) {
            best = row[i] > row[best] ? i : best;
        }
        ((uint32_t *)kn_host(ids_out))[r] = best;
    }
}

/* ---- hyper-connections ---- */

/* m[k] = (v . fn[k]) * rsqrt(mean(v^2) + eps) over all streams of one row. */
static void hc_mixes(const kn_hc *p, const uint16_t *x, uint32_t n_mix, double *m_out)
{
    const float *fn = kn_host(p->fn);
    uint32_t width = p->hc * p->d;
    ref_sum squares = {0};
    double s;
    for (uint32_t i = 0; i < width; i++) {
        double v = kn_bf16_decode(x[i]);
        ref_add(&squares, v * v);
    }
    s = 1.0 / sqrt(ref_total(squares) / width + p->norm_eps);
    for (uint32_t k = 0; k < n_mix; k++) {
        ref_sum dot = {0};
        for (uint32_t i = 0; i < width; i++) {
            ref_add(&dot, (double)kn_bf16_decode(x[i]) * fn[(uint64_t)k * width + i]);
        }
        m_out[k] = ref_total(dot) * s;
    }
}

/* x = bf16(sum_j pre[j] X[j]) */
static void hc_collapse(const kn_hc *p, const uint16_t *x, const float *pre, uint16_t *x_out)
{
    for (uint32_t i = 0; i < p->d; i++) {
        double sum = 0;
        for (uint32_t j = 0; j < p->hc; j++) {
            sum += (double)pre[j] * kn_bf16_decode(x[(uint64_t)j * p->d + i]);
        }
        x_out[i] = kn_bf16_from_f64(sum);
    }
}

static void ref_hc_pre(kn_stream *s, const kn_hc *p, kn_ptr x_in, uint32_t n, kn_ptr x_out, kn_ptr post_out,
                       kn_ptr comb_out)
{
    const uint16_t *x = kn_host(x_in);
    uint32_t hc = p->hc;
    double m[(2 + KN_HC_MAX) * KN_HC_MAX];
    float pre[KN_HC_MAX];
    (void)s;
    CM_ASSERT(hc <= KN_HC_MAX);
    for (uint32_t r = 0; r < n; r++) {
        const uint16_t *xr = x + (uint64_t)r * hc * p->d;
        hc_mixes(p, xr, (2 + hc) * hc, m);
        kn_hc_coefficients(m, kn_host(p->base), kn_host(p->scale), hc, p->sinkhorn_iters, p->hc_eps, pre,
                           (float *)kn_host(post_out) + (uint64_t)r * hc,
                           (float *)kn_host(comb_out) + (uint64_t)r * hc * hc);
        hc_collapse(p, xr, pre, (uint16_t *)kn_host(x_out) + (uint64_t)r * p->d);
    }
}

static void ref_hc_head(kn_stream *s, const kn_hc *p, kn_ptr x_in, uint32_t n, kn_ptr x_out)
{
    const uint16_t *x = kn_host(x_in);
    double m[KN_HC_MAX];
    float pre[KN_HC_MAX];
    (void)s;
    CM_ASSERT(p->hc <= KN_HC_MAX);
    for (uint32_t r = 0; r < n; r++) {
        const uint16_t *xr = x + (uint64_t)r * p->hc * p->d;
        hc_mixes(p, xr, p->hc, m);
        kn_hc_head_coefficients(m, kn_host(p->base), kn_host(p->scale), p->hc, p->hc_eps, pre);
        hc_collapse(p, xr, pre, (uint16_t *)kn_host(x_out) + (uint64_t)r * p->d);
    }
}

static void ref_hc_post(kn_stream *s, uint32_t d, uint32_t hc, kn_ptr y_in, kn_ptr x_in, kn_ptr post_in,
                        kn_ptr comb_in, uint32_t n, kn_ptr x_out)
{
    (void)s;
    CM_ASSERT(hc <= KN_HC_MAX);
    for (uint32_t r = 0; r < n; r++) {
        const uint16_t *y = (const uint16_t *)kn_host(y_in) + (uint64_t)r * d;
        const uint16_t *x = (const uint16_t *)kn_host(x_in) + (uint64_t)r * hc * d;
        const float *post = (const float *)kn_host(post_in) + (uint64_t)r * hc;
        const float *comb = (const float *)kn_host(comb_in) + (uint64_t)r * hc * hc;
        uint16_t *out = (uint16_t *)kn_host(x_out) + (uint64_t)r * hc * d;
        for (uint32_t i = 0; i < d; i++) {
            double from[KN_HC_MAX]; /* x_out may be x */
            for (uint32_t j = 0; j < hc; j++) {
                from[j] = kn_bf16_decode(x[(uint64_t)j * d + i]);
            }
            for (uint32_t k = 0; k < hc; k++) {
                double sum = (double)post[k] * kn_bf16_decode(y[i]);
                for (uint32_t j = 0; j < hc; j++) {
                    sum += comb[j * hc + k] * from[j];
                }
                out[(uint64_t)k * d + i] = kn_bf16_from_f64(sum);
            }
        }
    }
}

const kn_dense_ops kn_ref_dense = {
    .embed = ref_embed,
    .add_streams = ref_add_streams,
    .hc_pre = ref_hc_pre,
    .hc_post = ref_hc_post,
    .hc_head = ref_hc_head,
    .rmsnorm = ref_rmsnorm,
    .quant_act = ref_quant_act,
    .linear_q8 = ref_linear_q8,
    .linear_bf16 = ref_linear_bf16,
    .linear_grouped = ref_linear_grouped,
    .argmax = ref_argmax,
};
