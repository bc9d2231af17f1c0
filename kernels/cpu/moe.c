#include <math.h>

#include "common/base/assert.h"
#include "kernels/cpu/wide.h"

/* ---- gate ---- */

typedef struct gate_job {
    cpu_stream *s;
    const kn_gate *g;
    const uint32_t *ids;
    int32_t *experts;
    float *weights;
} gate_job;

/* kn_sqrt_softplus of each. */
static kn_vd sqrt_softplus(kn_vd z)
{
    return kn_vd_sqrt(kn_vd_choose((kn_vq)(z > 20.0), z, kn_vd_log1p(kn_vd_exp(z))));
}

static void activate(float *a, uint32_t n)
{
    uint32_t e = 0;
    for (; e + KN_WIDE <= n; e += KN_WIDE) {
        kn_vf z;
        memcpy(&z, a + e, sizeof(z));
        kn_wide wide = kn_wide_from_f32(z);
        wide.half[0] = sqrt_softplus(wide.half[0]);
        wide.half[1] = sqrt_softplus(wide.half[1]);
        z = kn_wide_to_f32(wide);
        memcpy(a + e, &z, sizeof(z));
    }
    for (; e < n; e++) {
        a[e] = kn_sqrt_softplus(a[e]);
    }
}

/* Logits are in s->gate; they become activations in place. */
static void gate_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const gate_job *j = arg;
    const kn_gate *g = j->g;
    const float *bias = kn_host(g->bias);
    const int64_t *table = kn_host(g->tid2eid);
    float *biased = j->s->biased + (uint64_t)i_thread * j->s->limits.n_expert;
    for (uint64_t r = begin; r < end; r++) {
        float *a = j->s->gate + r * g->n_expert;
        int32_t *experts = j->experts + r * g->topk;
        double lane[KN_LANES] = {0}, total;
        activate(a, g->n_expert);
        for (uint32_t e = 0; e < g->n_expert; e++) {
            biased[e] = bias != NULL ? a[e] + bias[e] : a[e];
        }
        if (table == NULL) {
            kn_topk(biased, g->n_expert, g->topk, experts);
        }
        for (uint32_t i = 0; i < g->topk; i++) {
            if (table != NULL) {
                experts[i] = (int32_t)table[(uint64_t)j->ids[r] * g->topk + i];
            }
            lane[i % KN_LANES] += a[experts[i]];
        }
        total = fmax(kn_fold_lanes(lane), 1e-20);
        for (uint32_t i = 0; i < g->topk; i++) {
            j->weights[r * g->topk + i] = (float)(a[experts[i]] / total * g->route_scale);
        }
    }
}

static void op_gate(kn_stream *base, const kn_gate *g, kn_ptr x, kn_ptr ids, uint32_t n, kn_ptr experts_out,
                    kn_ptr weights_out)
{
    cpu_stream *s = (cpu_stream *)base;
    gate_job job = {.s = s,
                    .g = g,
                    .ids = kn_host(ids),
                    .experts = kn_host(experts_out),
                    .weights = kn_host(weights_out)};
    CM_ASSERT_MSG(n <= s->limits.n_row && g->n_expert <= s->limits.n_expert, "rows %u experts %u", n,
                  g->n_expert);
    kn_dense(base->device)->linear_bf16(base, x, &g->weight, n, KN_F32, (kn_ptr){(uintptr_t)s->gate});
    kn_team_run(s->team, n, 50ull * g->n_expert, gate_part, &job);
}

/* ---- experts ---- */

static double swiglu_value(uint16_t g_in, uint16_t u_in, const float *weight, float limit)
{
    float gate = kn_bf16_decode(g_in), value = kn_bf16_decode(u_in);
    double g = gate > limit ? limit : gate, h;
    value = value > limit ? limit : value;
    h = g / (1.0 + kn_exp(-g)) * (value < -limit ? -limit : value);
    return weight != NULL ? *weight * h : h;
}

/* h = bf16([weight *] silu(min(g, limit)) * clamp(u, limit)); no weight: NULL. */
static void swiglu_row(const uint16_t *g_in, const uint16_t *u_in, const float *weight, uint32_t n,
                       float limit, uint16_t *h_out)
{
    const kn_vd most = kn_vd_all(limit), least = kn_vd_all(-limit);
    const kn_vd by = kn_vd_all(weight != NULL ? *weight : 1.0f);
    uint32_t at = 0;
    for (; at + KN_WIDE <= n; at += KN_WIDE) {
        kn_wide g = kn_wide_from_bf16(g_in + at), u = kn_wide_from_bf16(u_in + at), h;
        for (int i = 0; i < 2; i++) {
            kn_vd gate = kn_vd_at_most(g.half[i], most);
            kn_vd value = kn_vd_at_least(kn_vd_at_most(u.half[i], most), least);
            h.half[i] = by * (gate / (1.0 + kn_vd_exp(-gate)) * value);
        }
        kn_wide_to_bf16(h, h_out + at);
    }
    for (; at < n; at++) {
        h_out[at] = kn_bf16_from_f64(swiglu_value(g_in[at], u_in[at], weight, limit));
    }
}

typedef struct swiglu_job {
    const uint16_t *g, *u;
    const float *weight;
    uint16_t *h;
    uint32_t inner;
    float limit;
} swiglu_job;

static void swiglu_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const swiglu_job *j = arg;
    (void)i_thread;
    for (uint64_t r = begin; r < end; r++) {
        swiglu_row(j->g + r * j->inner, j->u + r * j->inner, j->weight != NULL ? &j->weight[r] : NULL,
                   j->inner, j->limit, j->h + r * j->inner);
    }
}

static void op_swiglu(kn_stream *base, kn_ptr g, kn_ptr u, kn_ptr weight, uint32_t n, uint32_t inner,
                      float limit, kn_ptr h_out)
{
    swiglu_job job = {.g = kn_host(g),
                      .u = kn_host(u),
                      .weight = kn_host(weight),
                      .h = kn_host(h_out),
                      .inner = inner,
                      .limit = limit};
    kn_team_run(((cpu_stream *)base)->team, n, 30ull * inner, swiglu_part, &job);
}

/* From g and u of the tile to quantized h. */
typedef struct expert_job {
    cpu_stream *s;
    const kn_expert *e;
    const kn_expert_item *items;
    float limit;
} expert_job;

static void expert_inner_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const expert_job *j = arg;
    cpu_stream *s = j->s;
    uint64_t inner = j->e->w1.n_out;
    uint16_t *g = s->inner, *u = g + CPU_Q8_ROWS * inner, *h = u + CPU_Q8_ROWS * inner;
    (void)i_thread;
    for (uint32_t r = begin; r < end; r++) {
        swiglu_row(g + r * inner, u + r * inner, &j->items[r].weight, (uint32_t)inner, j->limit,
                   h + r * inner);
        KN_FN(kn_cpu_quant_fp8)
        (h + r * inner, (uint32_t)inner, KN_ACT_BLOCK, s->codes + r * inner,
         s->scales + r * kn_blocks((uint32_t)inner, KN_ACT_BLOCK));
    }
}

static void expert_tile(cpu_stream *s, const kn_expert *e, const kn_expert_item *items, uint32_t n, kn_q8 x,
                        float limit, uint16_t *y_out)
{
    uint32_t k = e->w1.n_in, n_scale = kn_blocks(k, KN_ACT_BLOCK), inner = e->w1.n_out;
    cpu_q8_tile up = {.x = s->x_tile, .n = n}, down = {.x = s->h_tile, .n = n};
    expert_job job = {.s = s, .e = e, .items = items, .limit = limit};
    for (uint32_t r = 0; r < n; r++) {
        uint64_t row = items[r].row;
        up.codes[r] = (const uint8_t *)kn_host(x.codes) + row * k;
        up.scales[r] = (const uint8_t *)kn_host(x.scales) + row * n_scale;
        up.y[r] = s->inner + (uint64_t)r * inner;
        down.codes[r] = s->codes + (uint64_t)r * inner;
        down.scales[r] = s->scales + (uint64_t)r * kn_blocks(inner, KN_ACT_BLOCK);
        down.y[r] = y_out + (uint64_t)items[r].out * e->w2.n_out;
    }
    KN_FN(kn_cpu_q8_load)(s->team, &up, k, e->w1.dtype);
    KN_FN(kn_cpu_q8_product)(s->team, &up, &e->w1);
    for (uint32_t r = 0; r < n; r++) {
        up.y[r] += (uint64_t)CPU_Q8_ROWS * inner;
    }
    KN_FN(kn_cpu_q8_product)(s->team, &up, &e->w3);
    kn_team_run(s->team, n, 40ull * inner, expert_inner_part, &job);
    KN_FN(kn_cpu_q8_load)(s->team, &down, inner, e->w2.dtype);
    KN_FN(kn_cpu_q8_product)(s->team, &down, &e->w2);
}

static void op_experts(kn_stream *base, const kn_expert_group *groups, uint32_t n_group,
                       const kn_expert_item *items, kn_q8 x, float limit, kn_ptr y_out)
{
    cpu_stream *s = (cpu_stream *)base;
    for (uint32_t g = 0; g < n_group; g++) {
        const kn_expert *e = groups[g].expert;
        uint32_t end = groups[g].item0 + groups[g].n_item;
        CM_ASSERT_MSG(e->w1.n_in <= s->limits.n_in && e->w1.n_out <= s->limits.n_inner &&
                          e->w1.dtype == e->w3.dtype,
                      "n_in %u inner %u", e->w1.n_in, e->w1.n_out);
        for (uint32_t i = groups[g].item0; i < end; i += CPU_Q8_ROWS) {
            expert_tile(s, e, items + i, end - i < CPU_Q8_ROWS ? end - i : CPU_Q8_ROWS, x, limit,
                        kn_host(y_out));
        }
    }
}

/* ---- combine ---- */

enum { COMBINE_VECTORS = 4 }; /* sums in registers while a row's slots pass */

typedef struct combine_job {
    const uint16_t *y, *shared;
    const int32_t *experts;
    uint16_t *out;
    uint32_t topk, d;
} combine_job;

static void sort_slots(const int32_t *experts, uint32_t topk, uint32_t *order_out)
{
    for (uint32_t i = 0; i < topk; i++) {
        uint32_t at = i;
        for (; at > 0 && experts[order_out[at - 1]] > experts[i]; at--) {
            order_out[at] = order_out[at - 1];
        }
        order_out[at] = i;
    }
}

/* n_vector registers of values at `at` of row r, slots in the given order. */
static inline __attribute__((always_inline)) void combine_wide(const combine_job *j, const uint32_t *order,
                                                               uint64_t r, uint32_t at,
                                                               const uint32_t n_vector)
{
    kn_vf acc[COMBINE_VECTORS] = {0};
    for (uint32_t k = 0; k < j->topk; k++) {
        const uint16_t *y = j->y + (r * j->topk + order[k]) * j->d + at;
        for (uint32_t v = 0; v < n_vector; v++) {
            acc[v] += kn_vf_from_bf16(y + v * KN_WIDE);
        }
    }
    for (uint32_t v = 0; v < n_vector; v++) {
        uint64_t i = r * j->d + at + v * KN_WIDE;
        kn_vf_to_bf16(acc[v] + kn_vf_from_bf16(j->shared + i), j->out + i);
    }
}

static void combine_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const combine_job *j = arg;
    uint32_t order[KN_TOPK_MAX];
    (void)i_thread;
    for (uint64_t r = begin; r < end; r++) {
        uint32_t at = 0;
        sort_slots(j->experts + r * j->topk, j->topk, order);
        for (; at + COMBINE_VECTORS * KN_WIDE <= j->d; at += COMBINE_VECTORS * KN_WIDE) {
            combine_wide(j, order, r, at, COMBINE_VECTORS);
        }
        for (; at + KN_WIDE <= j->d; at += KN_WIDE) {
            combine_wide(j, order, r, at, 1);
        }
        for (; at < j->d; at++) {
            float acc = 0;
            for (uint32_t k = 0; k < j->topk; k++) {
                acc += kn_bf16_decode(j->y[(r * j->topk + order[k]) * j->d + at]);
            }
            j->out[r * j->d + at] = kn_bf16_encode(acc + kn_bf16_decode(j->shared[r * j->d + at]));
        }
    }
}

static void op_combine(kn_stream *base, kn_ptr y, kn_ptr experts, kn_ptr shared, uint32_t n, uint32_t topk,
                       uint32_t d, kn_ptr out)
{
    combine_job job = {.y = kn_host(y),
                       .shared = kn_host(shared),
                       .experts = kn_host(experts),
                       .out = kn_host(out),
                       .topk = topk,
                       .d = d};
    CM_ASSERT(topk <= KN_TOPK_MAX);
    kn_team_run(((cpu_stream *)base)->team, n, (uint64_t)topk * d, combine_part, &job);
}

const kn_moe_ops KN_FN(kn_cpu_moe) = {
    .slice_rows = 64, /* no tile of the faster paths is cut */
    .gate = op_gate,
    .swiglu = op_swiglu,
    .experts = op_experts,
    .combine = op_combine,
};
