#include <math.h>
#include <string.h>

#include "common/base/assert.h"
#include "kernels/ref/ref_private.h"

static const kn_seg *segment_at(const kn_batch *b, uint32_t i)
{
    return (const kn_seg *)kn_host(b->segs) + i;
}

/* ---- rows ---- */

static void ref_rope_table(kn_stream *s, kn_ptr inv_freq, uint32_t half, kn_ptr pos, uint32_t n,
                           kn_ptr cs_out)
{
    (void)s;
    for (uint32_t r = 0; r < n; r++) {
        ref_rope_angles(kn_host(inv_freq), half, ((const uint32_t *)kn_host(pos))[r],
                        (float *)kn_host(cs_out) + (uint64_t)r * half * 2);
    }
}

static void ref_rope(kn_stream *s, kn_ptr x_in, uint32_t n, uint32_t heads, uint32_t dim, uint32_t half,
                     kn_ptr cs, bool inverse)
{
    (void)s;
    for (uint32_t r = 0; r < n; r++) {
        for (uint32_t h = 0; h < heads; h++) {
            uint16_t *x = (uint16_t *)kn_host(x_in) + ((uint64_t)r * heads + h) * dim;
            ref_rope_row(x + dim - 2 * half, half, (const float *)kn_host(cs) + (uint64_t)r * half * 2,
                         inverse);
        }
    }
}

static void ref_kv_pack(kn_stream *s, kn_ptr kv, uint32_t n, uint32_t dim, uint32_t rope, kn_ptr rows_out)
{
    (void)s;
    for (uint32_t r = 0; r < n; r++) {
        ref_kv_pack_row((const uint16_t *)kn_host(kv) + (uint64_t)r * dim, dim, rope,
                        (uint8_t *)kn_host(rows_out) + (uint64_t)r * kn_kv_row_bytes(dim, rope));
    }
}

static void ref_index_pack(kn_stream *s, kn_ptr x, uint32_t n, uint32_t heads, uint32_t dim, kn_ptr rows_out)
{
    (void)s;
    for (uint64_t r = 0; r < (uint64_t)n * heads; r++) {
        ref_index_pack_row((const uint16_t *)kn_host(x) + r * dim, dim,
                           (uint8_t *)kn_host(rows_out) + r * kn_index_row_bytes(dim));
    }
}

/* ---- compressor ---- */

/* kv or score of position p, column i: from the batch, or from the state for what came before it. */
static double entry(const kn_seg *seg, const kn_compress *c, const float *batch_rows, uint32_t i_array,
                    uint32_t p, uint32_t i)
{
    uint64_t width = kn_compress_width(c->ratio, c->dim);
    uint32_t span = c->span;
    const float *state = (const float *)((const uint8_t *)kn_host(seg->slot) + c->slot_state);
    if (p >= seg->pos0) {
        return batch_rows[(seg->row0 + (p - seg->pos0)) * width + i];
    }
    return state[i_array * span * width + p % span * width + i];
}

/* Softmax over the window's terms for one dim; the window ends at position last. */
static double pooled(const kn_seg *seg, const kn_compress *c, const float *kv, const float *score,
                     uint32_t last, uint32_t i)
{
    double value[KN_PAGE_TOKENS + 8], weight[KN_PAGE_TOKENS + 8], top = -INFINITY, sum = 0, den = 0;
    uint32_t first = last + 1 - c->ratio, n = 0;
    if (c->ratio == 4 && first >= 4) {
        for (uint32_t p = first - 4; p < first; p++, n++) {
            value[n] = entry(seg, c, kv, 0, p, i);
            weight[n] = entry(seg, c, score, 1, p, i);
        }
    }
    for (uint32_t p = first; p <= last; p++, n++) {
        uint32_t column = c->ratio == 4 ? c->dim + i : i;
        value[n] = entry(seg, c, kv, 0, p, column);
        weight[n] = entry(seg, c, score, 1, p, column);
    }
    for (uint32_t t = 0; t < n; t++) {
        top = weight[t] > top ? weight[t] : top;
    }
    for (uint32_t t = 0; t < n; t++) {
        double e = kn_exp(weight[t] - top);
        den += e;
        sum += e * value[t];
    }
    return sum / den;
}

static void emit_row(const kn_batch *b, const kn_seg *seg, const kn_compress *c, const float *kv,
                     const float *score, uint32_t last)
{
    uint16_t row[KN_DIM_MAX];
    float cs[KN_DIM_MAX];
    uint8_t *stored = kn_page_row(b, seg, c->page_rows, c->ratio, c->row_bytes, last / c->ratio);
    for (uint32_t i = 0; i < c->dim; i++) {
        row[i] = kn_bf16_from_f64(pooled(seg, c, kv, score, last, i));
    }
    ref_rmsnorm_row(row, kn_host(c->norm), c->dim, c->eps, row);
    ref_rope_angles(kn_host(c->inv_freq), c->rope / 2, last + 1 - c->ratio, cs);
    ref_rope_row(row + c->dim - c->rope, c->rope / 2, cs, false);
    if (c->index) {
        ref_index_pack_row(row, c->dim, stored);
    } else {
        ref_kv_pack_row(row, c->dim, c->rope, stored);
    }
}

static void ref_compress(kn_stream *s, const kn_batch *b, const kn_compress *c, kn_ptr kv, kn_ptr score_in)
{
    const float *ape = kn_host(c->ape);
    float *score = kn_host(score_in);
    uint64_t width = kn_compress_width(c->ratio, c->dim);
    (void)s;
    CM_ASSERT(c->dim <= KN_DIM_MAX && c->ratio <= KN_PAGE_TOKENS);
    for (uint32_t g = 0; g < b->n_seg; g++) {
        const kn_seg *seg = segment_at(b, g);
        for (uint32_t r = 0; r < seg->n_row; r++) {
            for (uint32_t i = 0; i < width; i++) {
                score[(seg->row0 + r) * width + i] += ape[(seg->pos0 + r) % c->ratio * width + i];
            }
        }
        for (uint32_t p = seg->pos0; p < seg->pos0 + seg->n_row; p++) {
            if ((p + 1) % c->ratio == 0) {
                emit_row(b, seg, c, kn_host(kv), score, p);
            }
        }
    }
}

static void ref_compress_commit(kn_stream *s, const kn_batch *b, const kn_compress *c, kn_ptr kv,
                                kn_ptr score)
{
    uint64_t width = kn_compress_width(c->ratio, c->dim);
    uint32_t span = c->span;
    (void)s;
    for (uint32_t g = 0; g < b->n_seg; g++) {
        const kn_seg *seg = segment_at(b, g);
        float *state = (float *)((uint8_t *)kn_host(seg->slot) + c->slot_state);
        for (uint32_t r = 0; r < seg->n_row; r++) {
            uint64_t to = (seg->pos0 + r) % span * width, from = (seg->row0 + r) * width;
            memcpy(state + to, (const float *)kn_host(kv) + from, width * sizeof(float));
            memcpy(state + span * width + to, (const float *)kn_host(score) + from, width * sizeof(float));
        }
    }
}

/* ---- indexer ---- */

/* Exact sums inside an FP4 block, blocks ascending: as a quantized product. */
static double index_dot(const uint8_t *q, const uint8_t *k, uint32_t dim)
{
    double acc = 0;
    for (uint32_t b = 0; b < kn_blocks(dim, KN_FP4_BLOCK); b++) {
        double sum = 0;
        for (uint32_t i = b * KN_FP4_BLOCK; i < dim && i < (b + 1) * KN_FP4_BLOCK; i++) {
            uint32_t shift = i % 2 * 4;
            sum += kn_e2m1_decode(q[i / 2] >> shift & 15) * kn_e2m1_decode(k[i / 2] >> shift & 15);
        }
        acc += sum * ((double)kn_e8m0_decode(q[dim / 2 + b]) * kn_e8m0_decode(k[dim / 2 + b]));
    }
    return acc;
}

static float index_score(const uint8_t *q, const uint16_t *w, const uint8_t *k, uint32_t heads, uint32_t dim)
{
    float factor = (float)(1.0 / sqrt((double)dim * heads));
    ref_sum sum = {0};
    for (uint32_t h = 0; h < heads; h++) {
        double dot = index_dot(q + (uint64_t)h * kn_index_row_bytes(dim), k, dim);
        ref_add(&sum, (dot > 0 ? dot : 0) * (kn_bf16_decode(w[h]) * factor));
    }
    return (float)ref_total(sum);
}

/* Ascending; small, or made of a heap's order: insertion is enough for an oracle. */
static void sort_picks(int32_t *picks, uint32_t n)
{
    for (uint32_t i = 1; i < n; i++) {
        int32_t moved = picks[i];
        uint32_t at = i;
        for (; at > 0 && picks[at - 1] > moved; at--) {
            picks[at] = picks[at - 1];
        }
        picks[at] = moved;
    }
}

static void ref_index_topk(kn_stream *s, const kn_batch *b, const kn_kv_layout *layout, uint32_t heads,
                           uint32_t dim, uint32_t topk, kn_ptr iq, kn_ptr w, kn_ptr picks_out)
{
    float *score = ((ref_stream *)s)->index_score;
    uint64_t q_bytes = (uint64_t)heads * kn_index_row_bytes(dim);
    for (uint32_t g = 0; g < b->n_seg; g++) {
        const kn_seg *seg = segment_at(b, g);
        for (uint32_t r = seg->row0; r < seg->row0 + seg->n_row; r++) {
            uint32_t visible = (seg->pos0 + (r - seg->row0) + 1) / layout->ratio;
            uint32_t n = visible < topk ? visible : topk;
            int32_t *picks = (int32_t *)kn_host(picks_out) + (uint64_t)r * topk;
            for (uint32_t j = 0; j < visible; j++) {
                score[j] = index_score(
                    (const uint8_t *)kn_host(iq) + r * q_bytes,
                    (const uint16_t *)kn_host(w) + (uint64_t)r * heads,
                    kn_page_row(b, seg, layout->page_index, layout->ratio, layout->index_bytes, j), heads,
                    dim);
            }
            kn_topk(score, visible, n, picks);
            sort_picks(picks, n);
            for (uint32_t i = n; i < topk; i++) {
                picks[i] = -1;
            }
        }
    }
}

/* ---- attention ---- */

/* Key i of the query at position p, or NULL past the last one. */
static const uint8_t *key_at(const kn_batch *b, const kn_seg *seg, const kn_attn *a,
                             const uint8_t *chunk_rows, const int32_t *picks, uint32_t p, uint32_t i)
{
    const kn_kv_layout *l = &a->layout;
    uint32_t raw0 = kn_raw_first(p, a->window), n_raw = p + 1 - raw0;
    uint32_t j;
    if (i < n_raw) {
        return kn_raw_row(seg, a, chunk_rows, raw0 + i);
    }
    j = i - n_raw;
    if (l->ratio == 0) {
        return NULL;
    }
    if (l->ratio == 4) {
        if (j >= a->topk || picks[j] < 0) {
            return NULL;
        }
        j = (uint32_t)picks[j];
    } else if (j >= (p + 1) / l->ratio) {
        return NULL;
    }
    return kn_page_row(b, seg, l->page_rows, l->ratio, l->row_bytes, j);
}

static void attend(const kn_batch *b, const kn_seg *seg, const kn_attn *a, const uint8_t *chunk_rows,
                   const int32_t *picks, uint32_t p, uint32_t h, const uint16_t *q, double *score,
                   uint16_t *o_out)
{
    double sink = ((const float *)kn_host(a->sink))[h], scale = 1.0 / sqrt(a->dim), top = sink, den;
    double o[KN_DIM_MAX] = {0};
    ref_sum weights = {0};
    const uint8_t *key;
    for (uint32_t j = 0; (key = key_at(b, seg, a, chunk_rows, picks, p, j)) != NULL; j++) {
        ref_sum dot = {0};
        for (uint32_t i = 0; i < a->dim; i++) {
            ref_add(&dot, (double)kn_bf16_decode(q[i]) * ref_kv_value(key, a->dim, a->rope, i));
        }
        score[j] = ref_total(dot) * scale;
        top = score[j] > top ? score[j] : top;
    }
    for (uint32_t j = 0; (key = key_at(b, seg, a, chunk_rows, picks, p, j)) != NULL; j++) {
        double weight = kn_exp(score[j] - top);
        ref_add(&weights, weight);
        for (uint32_t i = 0; i < a->dim; i++) {
            o[i] += weight * ref_kv_value(key, a->dim, a->rope, i);
        }
    }
    den = ref_total(weights) + kn_exp(sink - top);
    for (uint32_t i = 0; i < a->dim; i++) {
        o_out[i] = kn_bf16_from_f64(o[i] / den);
    }
}

static void ref_attention(kn_stream *s, const kn_batch *b, const kn_attn *a, kn_ptr q, kn_ptr chunk_rows,
                          kn_ptr picks, kn_ptr o_out)
{
    CM_ASSERT(a->dim <= KN_DIM_MAX);
    for (uint32_t g = 0; g < b->n_seg; g++) {
        const kn_seg *seg = segment_at(b, g);
        for (uint32_t r = seg->row0; r < seg->row0 + seg->n_row; r++) {
            const int32_t *row_picks =
                (const int32_t *)kn_host(picks) + (picks.addr != 0 ? (uint64_t)r * a->topk : 0);
            for (uint32_t h = 0; h < a->n_head; h++) {
                uint64_t at = ((uint64_t)r * a->n_head + h) * a->dim;
                attend(b, seg, a, kn_host(chunk_rows), row_picks, seg->pos0 + (r - seg->row0), h,
                       (const uint16_t *)kn_host(q) + at, ((ref_stream *)s)->score,
                       (uint16_t *)kn_host(o_out) + at);
            }
        }
    }
}

static void ref_raw_commit(kn_stream *s, const kn_batch *b, const kn_attn *a, kn_ptr chunk_rows)
{
    uint64_t row_bytes = a->layout.row_bytes;
    (void)s;
    for (uint32_t g = 0; g < b->n_seg; g++) {
        const kn_seg *seg = segment_at(b, g);
        uint8_t *raw = (uint8_t *)kn_host(seg->slot) + a->layout.slot_raw;
        for (uint32_t r = 0; r < seg->n_row; r++) {
            memcpy(raw + (seg->pos0 + r) % a->layout.ring * row_bytes,
                   (const uint8_t *)kn_host(chunk_rows) + (seg->row0 + r) * row_bytes, row_bytes);
        }
    }
}

const kn_attn_ops kn_ref_attn = {
    .rope_table = ref_rope_table,
    .rope = ref_rope,
    .kv_pack = ref_kv_pack,
    .index_pack = ref_index_pack,
    .compress = ref_compress,
    .compress_commit = ref_compress_commit,
    .index_topk = ref_index_topk,
    .attention = ref_attention,
    .raw_commit = ref_raw_commit,
};
