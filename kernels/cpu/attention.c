#include <math.h>

#include "common/base/assert.h"
#include "kernels/cpu/isa.h"

static const kn_seg *segment_of(const kn_batch *b, uint32_t row)
{
    const kn_seg *segs = kn_host(b->segs);
    uint32_t low = 0, high = b->n_seg; /* the last segment that starts at or before row */
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (segs[middle].row0 <= row) {
            low = middle;
        } else {
            high = middle;
        }
    }
    return &segs[low];
}

/* ---- attention ---- */

typedef struct attn_job {
    cpu_stream *s;
    const kn_batch *b;
    const kn_attn *a;
    const uint16_t *q;
    const uint8_t *chunk_rows;
    const int32_t *picks; /* NULL without */
    uint16_t *o;
    uint32_t n_block;          /* head blocks of a row */
    uint64_t dim, score_width; /* rounded up to KN_LANES */
} attn_job;

/* Stored rows of every key of row r in the order of summation; returns how many. */
static uint32_t list_keys(const attn_job *j, uint32_t r, const uint8_t **row_out)
{
    const kn_seg *seg = segment_of(j->b, r);
    const kn_kv_layout *l = &j->a->layout;
    uint32_t p = seg->pos0 + (r - seg->row0), n = 0;
    for (uint32_t at = kn_raw_first(p, j->a->window); at <= p; at++) {
        row_out[n++] = kn_raw_row(seg, j->a, j->chunk_rows, at);
    }
    if (l->ratio == 4) {
        const int32_t *picks = j->picks + (uint64_t)r * j->a->topk;
        for (uint32_t i = 0; i < j->a->topk && picks[i] >= 0; i++) {
            row_out[n++] = kn_page_row(j->b, seg, l->page_rows, l->ratio, l->row_bytes, (uint32_t)picks[i]);
        }
    } else if (l->ratio != 0) {
        for (uint32_t i = 0; i < (p + 1) / l->ratio; i++) {
            row_out[n++] = kn_page_row(j->b, seg, l->page_rows, l->ratio, l->row_bytes, i);
        }
    }
    CM_ASSERT_MSG(n <= j->s->limits.n_key, "keys %u limit %u", n, j->s->limits.n_key);
    return n;
}

/* Turns scores into weights exp(score - max), zero up to a multiple of KN_LANES; returns the denominator. */
static double soften(double *score, uint32_t n, double sink)
{
    double top = sink, lane[KN_LANES] = {0};
    uint32_t padded = cpu_round_up(n, KN_LANES);
    for (uint32_t i = 0; i < n; i++) {
        top = score[i] > top ? score[i] : top;
    }
    for (uint32_t i = 0; i < n; i++) {
        score[i] = kn_exp(score[i] - top);
    }
    for (uint32_t i = n; i < padded; i++) {
        score[i] = 0;
    }
    for (uint32_t i = 0; i < padded; i += KN_LANES) {
        for (uint32_t l = 0; l < KN_LANES; l++) {
            lane[l] += score[i + l];
        }
    }
    return kn_fold_lanes(lane) + kn_exp(sink - top);
}

/* o += weight * key; the product is rounded before the sum. */
static void add_weighted(double *o, const double *key, double weight, uint64_t dim)
{
    for (uint64_t i = 0; i < dim; i++) {
        o[i] += weight * key[i];
    }
}

/* Heads head0 .. head0 + n_head - 1 of one row. */
static void attend(const attn_job *j, const cpu_attn_scratch *t, uint32_t r, uint32_t head0, uint32_t n_head)
{
    const kn_attn *a = j->a;
    uint32_t n_key = list_keys(j, r, t->row);
    uint64_t at = ((uint64_t)r * a->n_head + head0) * a->dim;
    const float *sink = (const float *)kn_host(a->sink) + head0;
    double scale = 1.0 / sqrt(a->dim), den[CPU_HEADS];
    for (uint32_t h = 0; h < n_head; h++) {
        for (uint32_t i = 0; i < a->dim; i++) {
            t->q[h * j->dim + i] = kn_bf16_decode(j->q[at + (uint64_t)h * a->dim + i]);
        }
        memset(t->q + h * j->dim + a->dim, 0, (j->dim - a->dim) * sizeof(double));
    }
    memset(t->o, 0, n_head * j->dim * sizeof(double));
    memset(t->key, 0, j->dim * sizeof(double));
    for (uint32_t k = 0; k < n_key; k++) {
        KN_FN(kn_cpu_kv_unpack)(t->row[k], a->dim, a->rope, t->key);
        for (uint32_t h = 0; h < n_head; h++) {
            double lane[KN_LANES] = {0};
            kn_lanes_add(lane, t->q + h * j->dim, t->key, (uint32_t)j->dim);
            t->score[h * j->score_width + k] = kn_fold_lanes(lane) * scale;
        }
    }
    for (uint32_t h = 0; h < n_head; h++) {
        den[h] = soften(t->score + h * j->score_width, n_key, sink[h]);
    }
    for (uint32_t k = 0; k < n_key; k++) {
        KN_FN(kn_cpu_kv_unpack)(t->row[k], a->dim, a->rope, t->key);
        for (uint32_t h = 0; h < n_head; h++) {
            add_weighted(t->o + h * j->dim, t->key, t->score[h * j->score_width + k], j->dim);
        }
    }
    for (uint32_t h = 0; h < n_head; h++) {
        for (uint32_t i = 0; i < a->dim; i++) {
            j->o[at + (uint64_t)h * a->dim + i] = kn_bf16_from_f64(t->o[h * j->dim + i] / den[h]);
        }
    }
}

static void attention_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const attn_job *j = arg;
    for (uint32_t unit = begin; unit < end; unit++) {
        uint32_t head0 = unit % j->n_block * CPU_HEADS, left = j->a->n_head - head0;
        attend(j, &j->s->attn[i_thread], unit / j->n_block, head0, left < CPU_HEADS ? left : CPU_HEADS);
    }
}

static void op_attention(kn_stream *base, const kn_batch *b, const kn_attn *a, kn_ptr q, kn_ptr chunk_rows,
                         kn_ptr picks, kn_ptr o_out)
{
    cpu_stream *s = (cpu_stream *)base;
    attn_job job = {.s = s,
                    .b = b,
                    .a = a,
                    .q = kn_host(q),
                    .chunk_rows = kn_host(chunk_rows),
                    .picks = kn_host(picks),
                    .o = kn_host(o_out),
                    .n_block = kn_blocks(a->n_head, CPU_HEADS),
                    .dim = cpu_round_up(a->dim, KN_LANES),
                    .score_width = cpu_round_up(s->limits.n_key, KN_LANES)};
    CM_ASSERT_MSG(a->dim <= s->limits.head_dim, "dim %u limit %u", a->dim, s->limits.head_dim);
    kn_team_run(s->team, b->n_row * job.n_block, (uint64_t)a->window * a->dim * CPU_HEADS, attention_part,
                &job);
}

static void op_raw_commit(kn_stream *s, const kn_batch *b, const kn_attn *a, kn_ptr chunk_rows)
{
    const kn_seg *segs = kn_host(b->segs);
    uint64_t row_bytes = a->layout.row_bytes;
    (void)s;
    for (uint32_t g = 0; g < b->n_seg; g++) {
        const kn_seg *seg = &segs[g];
        uint8_t *raw = (uint8_t *)kn_host(seg->slot) + a->layout.slot_raw;
        for (uint32_t r = kn_raw_first(seg->n_row - 1, a->layout.ring); r < seg->n_row; r++) {
            memcpy(raw + (seg->pos0 + r) % a->layout.ring * row_bytes,
                   (const uint8_t *)kn_host(chunk_rows) + (seg->row0 + r) * row_bytes, row_bytes);
        }
    }
}

/* ---- rows of a batch ---- */

typedef struct rows_job {
    const uint16_t *x;
    uint16_t *x_inout;
    uint8_t *rows;
    const float *inv_freq;
    const uint32_t *pos;
    float *cs;
    uint32_t heads, dim, rope;
    bool inverse;
} rows_job;

static void rope_table_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const rows_job *j = arg;
    (void)i_thread;
    for (uint32_t r = begin; r < end; r++) {
        KN_FN(kn_cpu_angles)(j->inv_freq, j->rope / 2, j->pos[r], j->cs + (uint64_t)r * j->rope);
    }
}

static void op_rope_table(kn_stream *s, kn_ptr inv_freq, uint32_t half, kn_ptr pos, uint32_t n, kn_ptr cs_out)
{
    rows_job job = {
        .inv_freq = kn_host(inv_freq), .pos = kn_host(pos), .cs = kn_host(cs_out), .rope = 2 * half};
    kn_team_run(((cpu_stream *)s)->team, n, 100ull * half, rope_table_part, &job);
}

static void rope_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const rows_job *j = arg;
    (void)i_thread;
    for (uint64_t r = begin; r < end; r++) {
        for (uint32_t h = 0; h < j->heads; h++) {
            KN_FN(kn_cpu_rotate)
            (j->x_inout + (r * j->heads + h + 1) * j->dim - j->rope, j->rope / 2, j->cs + r * j->rope,
             j->inverse);
        }
    }
}

static void op_rope(kn_stream *s, kn_ptr x, uint32_t n, uint32_t heads, uint32_t dim, uint32_t half,
                    kn_ptr cs, bool inverse)
{
    rows_job job = {.x_inout = kn_host(x),
                    .cs = kn_host(cs),
                    .heads = heads,
                    .dim = dim,
                    .rope = 2 * half,
                    .inverse = inverse};
    kn_team_run(((cpu_stream *)s)->team, n, 8ull * heads * half, rope_part, &job);
}

static void kv_pack_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const rows_job *j = arg;
    (void)i_thread;
    for (uint64_t r = begin; r < end; r++) {
        KN_FN(kn_cpu_kv_pack)
        (j->x + r * j->dim, j->dim, j->rope, j->rows + r * kn_kv_row_bytes(j->dim, j->rope));
    }
}

static void op_kv_pack(kn_stream *s, kn_ptr kv, uint32_t n, uint32_t dim, uint32_t rope, kn_ptr rows_out)
{
    rows_job job = {.x = kn_host(kv), .rows = kn_host(rows_out), .dim = dim, .rope = rope};
    kn_team_run(((cpu_stream *)s)->team, n, 4ull * dim, kv_pack_part, &job);
}

static void index_pack_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const rows_job *j = arg;
    (void)i_thread;
    for (uint64_t r = (uint64_t)begin * j->heads; r < (uint64_t)end * j->heads; r++) {
        KN_FN(kn_cpu_index_pack)(j->x + r * j->dim, j->dim, j->rows + r * kn_index_row_bytes(j->dim));
    }
}

static void op_index_pack(kn_stream *s, kn_ptr x, uint32_t n, uint32_t heads, uint32_t dim, kn_ptr rows_out)
{
    rows_job job = {.x = kn_host(x), .rows = kn_host(rows_out), .heads = heads, .dim = dim};
    kn_team_run(((cpu_stream *)s)->team, n, 10ull * heads * dim, index_pack_part, &job);
}

const kn_attn_ops KN_FN(kn_cpu_attn) = {
    .rope_table = op_rope_table,
    .rope = op_rope,
    .kv_pack = op_kv_pack,
    .index_pack = op_index_pack,
    .compress = KN_FN(kn_cpu_compress),
    .compress_commit = KN_FN(kn_cpu_compress_commit),
    .index_topk = KN_FN(kn_cpu_index_topk),
    .attention = op_attention,
    .raw_commit = op_raw_commit,
};
