/* The indexer: scores of every visible key for one query at a time, and the best of them.
 * Codes are doubled into small integers and summed in 16 bits: 32 products of at most 144 fit. Heads stand
 * side by side, so that a key's value meets all of them at once and no sum across a vector is needed. */
#include <math.h>

#include "common/base/assert.h"
#include "kernels/cpu/isa.h"

enum { HEAD_MAX = 256 };

typedef struct index_job {
    cpu_stream *s;
    const kn_batch *b;
    const kn_seg *seg;
    const kn_kv_layout *layout;
    uint32_t heads, width, dim; /* width: heads rounded up to CPU_INDEX_PAD */
    float weight[HEAD_MAX];
} index_job;

/* Query rows [heads] of stored form -> codes [dim][width] and scales [blocks][width], zero past heads. */
static void spread_query(const index_job *j, const uint8_t *rows)
{
    uint32_t n_block = kn_blocks(j->dim, KN_FP4_BLOCK), row_bytes = kn_index_row_bytes(j->dim);
    memset(j->s->index_q, 0, (uint64_t)j->dim * j->width * sizeof(int16_t));
    memset(j->s->index_scale, 0, (uint64_t)n_block * j->width * sizeof(double));
    for (uint32_t h = 0; h < j->heads; h++) {
        const uint8_t *row = rows + (uint64_t)h * row_bytes;
        for (uint32_t i = 0; i < j->dim; i++) {
            uint8_t code = row[i / 2] >> (i % 2 * 4) & 15;
            j->s->index_q[(uint64_t)i * j->width + h] = kn_e2m1_doubled(code);
        }
        for (uint32_t b = 0; b < n_block; b++) {
            j->s->index_scale[(uint64_t)b * j->width + h] = kn_e8m0_decode(row[j->dim / 2 + b]);
        }
    }
}

/* Adds the block's dot products of KN_VS_WIDTH heads: dot[h] += (q . k) * (scale_q * scale_k). */
static void add_block(const int16_t *q, uint32_t width, const int16_t *key, uint32_t n, const double *scale,
                      double key_scale, double *dot)
{
    int16_t sums[KN_VS_WIDTH];
    kn_vs acc = {0};
    for (uint32_t i = 0; i < n; i++) {
        kn_vs v;
        memcpy(&v, q + (uint64_t)i * width, sizeof(v));
        acc += v * key[i];
    }
    memcpy(sums, &acc, sizeof(sums));
    for (uint32_t h = 0; h < KN_VS_WIDTH; h++) {
        dot[h] += 0.25 * sums[h] * (scale[h] * key_scale); /* both factors were doubled */
    }
}

static float score_key(const index_job *j, const uint8_t *stored)
{
    int16_t key[KN_DIM_MAX];
    double dot[HEAD_MAX] = {0}, lane[KN_LANES] = {0};
    for (uint32_t i = 0; i < j->dim / 2; i++) {
        key[2 * i] = kn_e2m1_doubled(stored[i] & 15);
        key[2 * i + 1] = kn_e2m1_doubled(stored[i] >> 4);
    }
    for (uint32_t b = 0, at = 0; at < j->dim; b++, at += KN_FP4_BLOCK) {
        uint32_t n = j->dim - at < KN_FP4_BLOCK ? j->dim - at : KN_FP4_BLOCK;
        double key_scale = kn_e8m0_decode(stored[j->dim / 2 + b]);
        for (uint32_t h = 0; h < j->width; h += KN_VS_WIDTH) {
            add_block(j->s->index_q + (uint64_t)at * j->width + h, j->width, key + at, n,
                      j->s->index_scale + (uint64_t)b * j->width + h, key_scale, dot + h);
        }
    }
    for (uint32_t h = 0; h < j->width; h += KN_LANES) {
        for (uint32_t l = 0; l < KN_LANES; l++) {
            double positive = dot[h + l] > 0 ? dot[h + l] : 0;
            lane[l] += positive * j->weight[h + l];
        }
    }
    return (float)kn_fold_lanes(lane);
}

static void score_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const index_job *j = arg;
    const kn_kv_layout *l = j->layout;
    (void)i_thread;
    for (uint32_t k = begin; k < end; k++) {
        j->s->index_score[k] =
            score_key(j, kn_page_row(j->b, j->seg, l->page_index, l->ratio, l->index_bytes, k));
    }
}

/* Order of floats as order of unsigned integers; -0 becomes 0. */
static uint32_t sortable(float x)
{
    uint32_t u = kn_f32_bits(x + 0.0f);
    return (u & 0x80000000u) ? ~u : u | 0x80000000u;
}

/* The k-th largest of score [n], 1 <= k <= n, as sortable bits; n_above_out: how many are larger. Three
 * passes of 11, 11 and 10 bits, each counting the scores that share the bits found so far. */
static uint32_t kth_largest(const float *score, uint32_t n, uint32_t k, uint32_t *n_above_out)
{
    static const uint32_t shift[] = {21, 10, 0}, bits[] = {11, 11, 10};
    uint32_t found = 0, mask = 0, above = 0;
    for (int pass = 0; pass < 3; pass++) {
        uint32_t count[1 << 11] = {0}, digit = (1u << bits[pass]) - 1;
        for (uint32_t i = 0; i < n; i++) {
            uint32_t u = sortable(score[i]);
            count[u >> shift[pass] & digit] += (u & mask) == found;
        }
        while (above + count[digit] < k) {
            above += count[digit--];
        }
        found |= digit << shift[pass];
        mask |= ((1u << bits[pass]) - 1) << shift[pass];
    }
    *n_above_out = above;
    return found;
}

/* The k best of score [n] in ascending index; among equals of the last place the lower ones. */
static void pick_best(const float *score, uint32_t n, uint32_t k, int32_t *picks_out)
{
    uint32_t n_above, n_equal, n_pick = 0;
    uint32_t last = kth_largest(score, n, k, &n_above);
    n_equal = k - n_above;
    for (uint32_t i = 0; n_pick < k; i++) {
        uint32_t u = sortable(score[i]);
        if (u > last || (u == last && n_equal > 0)) {
            n_equal -= u == last;
            picks_out[n_pick++] = (int32_t)i;
        }
    }
}

static void pick_row(index_job *j, uint32_t visible, uint32_t topk, const uint8_t *q, const uint16_t *w,
                     int32_t *picks)
{
    uint32_t n = visible < topk ? visible : topk;
    if (visible <= topk) {
        for (uint32_t i = 0; i < n; i++) {
            picks[i] = (int32_t)i;
        }
    } else {
        float factor = (float)(1.0 / sqrt((double)j->dim * j->heads));
        CM_ASSERT_MSG(visible <= j->s->limits.n_index_row, "rows %u limit %u", visible,
                      j->s->limits.n_index_row);
        for (uint32_t h = 0; h < j->width; h++) {
            j->weight[h] = h < j->heads ? kn_bf16_decode(w[h]) * factor : 0;
        }
        spread_query(j, q);
        kn_team_run(j->s->team, visible, (uint64_t)j->width * j->dim / 8, score_part, j);
        pick_best(j->s->index_score, visible, n, picks);
    }
    for (uint32_t i = n; i < topk; i++) {
        picks[i] = -1;
    }
}

void KN_FN(kn_cpu_index_topk)(kn_stream *base, const kn_batch *b, const kn_kv_layout *layout, uint32_t heads,
                              uint32_t dim, uint32_t topk, kn_ptr iq, kn_ptr w, kn_ptr picks_out)
{
    index_job job = {.s = (cpu_stream *)base,
                     .b = b,
                     .layout = layout,
                     .heads = heads,
                     .width = cpu_round_up(heads, CPU_INDEX_PAD),
                     .dim = dim};
    const kn_seg *segs = kn_host(b->segs);
    CM_ASSERT_MSG(job.width <= HEAD_MAX && (uint64_t)job.width * dim <= CPU_INDEX_MAX && dim <= KN_DIM_MAX,
                  "heads %u dim %u", heads, dim);
    for (uint32_t g = 0; g < b->n_seg; g++) {
        job.seg = &segs[g];
        for (uint32_t r = segs[g].row0; r < segs[g].row0 + segs[g].n_row; r++) {
            pick_row(&job, (segs[g].pos0 + (r - segs[g].row0) + 1) / layout->ratio, topk,
                     (const uint8_t *)kn_host(iq) + (uint64_t)r * heads * kn_index_row_bytes(dim),
                     (const uint16_t *)kn_host(w) + (uint64_t)r * heads,
                     (int32_t *)kn_host(picks_out) + (uint64_t)r * topk);
        }
    }
}
