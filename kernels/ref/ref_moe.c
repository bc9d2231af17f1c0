#include <math.h>

#include "common/base/assert.h"
#include "kernels/ref/ref_private.h"

/* ---- gate ---- */

static void gate_row(ref_stream *s, const kn_gate *g, const uint16_t *x, const int64_t *table_row,
                     int32_t *experts, float *weights)
{
    float *a = s->gate_score, *biased = a + g->n_expert;
    const float *bias = kn_host(g->bias);
    ref_sum sum = {0};
    double total;
    for (uint32_t e = 0; e < g->n_expert; e++) {
        a[e] = kn_sqrt_softplus((float)ref_dot_bf16(x, &g->weight, e));
        biased[e] = bias != NULL ? a[e] + bias[e] : a[e];
    }
    if (table_row == NULL) {
        kn_topk(biased, g->n_expert, g->topk, experts);
    }
    for (uint32_t i = 0; i < g->topk; i++) {
        if (table_row != NULL) {
            experts[i] = (int32_t)table_row[i];
        }
        ref_add(&sum, a[experts[i]]);
    }
    total = fmax(ref_total(sum), 1e-20);
    for (uint32_t i = 0; i < g->topk; i++) {
        weights[i] = (float)(a[experts[i]] / total * g->route_scale);
    }
}

static void ref_gate(kn_stream *s, const kn_gate *g, kn_ptr x, kn_ptr ids, uint32_t n, kn_ptr experts_out,
                     kn_ptr weights_out)
{
    const int64_t *table = kn_host(g->tid2eid);
    for (uint32_t r = 0; r < n; r++) {
        const int64_t *row =
            table != NULL ? table + (uint64_t)((const uint32_t *)kn_host(ids))[r] * g->topk : NULL;
        gate_row((ref_stream *)s, g, (const uint16_t *)kn_host(x) + (uint64_t)r * g->weight.n_in, row,
                 (int32_t *)kn_host(experts_out) + (uint64_t)r * g->topk,
                 (float *)kn_host(weights_out) + (uint64_t)r * g->topk);
    }
}

/* ---- experts ---- */

/* weight is multiplied only where there is one: the shared expert's h is not touched by a factor of one. */
static uint16_t swiglu_value(uint16_t g_in, uint16_t u_in, const float *weight, float limit)
{
    double g = kn_bf16_decode(g_in), u = kn_bf16_decode(u_in), h;
    g = g > limit ? limit : g;
    u = u > limit ? limit : u < -limit ? -limit : u;
    h = g / (1.0 + kn_exp(-g)) * u;
    return kn_bf16_from_f64(weight != NULL ? *weight * h : h);
}

static void ref_swiglu(kn_stream *s, kn_ptr g, kn_ptr u, kn_ptr weight, uint32_t n, uint32_t inner,
                       float limit, kn_ptr h_out)
{
    const float *w = kn_host(weight);
    (void)s;
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t i = 0; i < inner; i++) {
            uint64_t at = (uint64_t)r * inner + i;
            ((uint16_t *)kn_host(h_out))[at] =
                swiglu_value(((const uint16_t *)kn_host(g))[at], ((const uint16_t *)kn_host(u))[at],
                             w != NULL ? &w[r] : NULL, limit);
        }
    }
}

static void expert_row(ref_stream *s, const kn_expert *e, const uint8_t *codes, const uint8_t *scales,
                       float weight, float limit, uint16_t *y_out)
{
    uint32_t inner = e->w1.n_out;
    uint16_t *h = s->inner;
    uint8_t *h_codes = (uint8_t *)(h + inner), *h_scales = h_codes + inner;
    for (uint32_t i = 0; i < inner; i++) {
        h[i] = swiglu_value(ref_dot_q8(codes, scales, &e->w1, i), ref_dot_q8(codes, scales, &e->w3, i),
                            &weight, limit);
    }
    ref_quant_fp8(h, inner, KN_ACT_BLOCK, h_codes, h_scales);
    for (uint32_t o = 0; o < e->w2.n_out; o++) {
        y_out[o] = ref_dot_q8(h_codes, h_scales, &e->w2, o);
    }
}

static void ref_experts(kn_stream *s, const kn_expert_group *groups, uint32_t n_group,
                        const kn_expert_item *items, kn_q8 x, float limit, kn_ptr y_out)
{
    for (uint32_t g = 0; g < n_group; g++) {
        const kn_expert *e = groups[g].expert;
        uint64_t d = e->w1.n_in, n_scale = kn_blocks(e->w1.n_in, KN_ACT_BLOCK);
        for (uint32_t i = groups[g].item0; i < groups[g].item0 + groups[g].n_item; i++) {
            expert_row((ref_stream *)s, e, (const uint8_t *)kn_host(x.codes) + items[i].row * d,
                       (const uint8_t *)kn_host(x.scales) + items[i].row * n_scale, items[i].weight, limit,
                       (uint16_t *)kn_host(y_out) + items[i].out * (uint64_t)e->w2.n_out);
        }
    }
}

/* ---- combine ---- */

static void ref_combine(kn_stream *s, kn_ptr y_in, kn_ptr experts_in, kn_ptr shared_in, uint32_t n,
                        uint32_t topk, uint32_t d, kn_ptr out_in)
{
    (void)s;
    CM_ASSERT(topk <= KN_TOPK_MAX);
    for (uint32_t r = 0; r < n; r++) {
        const uint16_t *y = (const uint16_t *)kn_host(y_in) + (uint64_t)r * topk * d;
        const int32_t *experts = (const int32_t *)kn_host(experts_in) + (uint64_t)r * topk;
        uint32_t order[KN_TOPK_MAX];
        for (uint32_t i = 0; i < topk; i++) {
            uint32_t at = i;
            for (; at > 0 && experts[order[at - 1]] > experts[i]; at--) {
                order[at] = order[at - 1];
            }
            order[at] = i;
        }
        for (uint32_t i = 0; i < d; i++) {
            float acc = 0;
            for (uint32_t k = 0; k < topk; k++) {
                acc += kn_bf16_decode(y[(uint64_t)order[k] * d + i]);
            }
            acc += kn_bf16_decode(((const uint16_t *)kn_host(shared_in))[(uint64_t)r * d + i]);
            ((uint16_t *)kn_host(out_in))[(uint64_t)r * d + i] = kn_bf16_encode(acc);
        }
    }
}

const kn_moe_ops kn_ref_moe = {
    .slice_rows = 64,
    .gate = ref_gate,
    .swiglu = ref_swiglu,
    .experts = ref_experts,
    .combine = ref_combine,
};
