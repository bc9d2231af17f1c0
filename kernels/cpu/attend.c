/* Attention of a batch. A unit is one row and a group of its heads; its keys come in blocks that are decoded
 * once for all heads of the group, twice in all: for the scores, and for the weighted values. Both are tiles
 * of [heads][keys] and [heads][dims] held in registers, vectors along the dims, as the lane sums want it.
 * Bound: the double multiply-adds, n_key * n_head * dim each for scores and for values; a value's product is
 * rounded before its sum, so it takes a multiplication and an addition. */
#include <assert.h>
#include <math.h>

#include "common/base/assert.h"
#include "kernels/cpu/chunk.h"

/* Keys of a score tile and dim vectors of a value tile, so that sums and operands fill the registers. */
enum {
    TILE_HEADS = CPU_HEADS_TILE,
#if defined(__AVX512F__)
    TILE_KEYS = 6,
    TILE_VECTORS = 4,
#elif defined(__AVX2__)
    TILE_KEYS = 3,
    TILE_VECTORS = 2,
#else
    TILE_KEYS = 2,
    TILE_VECTORS = 2,
#endif
    TILE_DIMS = TILE_VECTORS * KN_VD_WIDTH,
    AHEAD = 8, /* rows prefetched before the one that is decoded */
};
static_assert(CPU_KEYS % TILE_KEYS == 0 && CPU_DIM_PAD % TILE_DIMS == 0, "tiles fit the scratch");

typedef struct attn_job {
    cpu_stream *s;
    const kn_batch *b;
    const kn_attn *a;
    const uint16_t *q;
    const uint8_t *chunk_rows;
    const int32_t *picks; /* NULL without */
    uint16_t *o;
    uint32_t group, n_group;         /* heads of a unit; units of a row */
    uint32_t dim;                    /* rounded up to CPU_DIM_PAD */
    uint64_t row_width, score_width; /* of the scratch */
} attn_job;

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

/* Rows stand anywhere in the pool: no prefetcher of the machine's can guess the next one. */
static void prefetch_row(const uint8_t *row, uint32_t n_bytes)
{
    for (uint32_t at = 0; at < n_bytes; at += 64) {
        __builtin_prefetch(row + at);
    }
}

/* Decodes n keys, and zeros up to a whole tile. */
static void load_keys(const attn_job *j, const cpu_attn_scratch *t, uint32_t key0, uint32_t n)
{
    for (uint32_t k = 0; k < n; k++) {
        prefetch_row(t->row[key0 + k + (k + AHEAD < n ? AHEAD : 0)], j->a->layout.row_bytes);
        KN_FN(kn_cpu_kv_unpack)(t->row[key0 + k], j->a->dim, j->a->rope, t->key + k * j->row_width);
    }
    for (uint32_t k = n; k < cpu_round_up(n, TILE_KEYS); k++) {
        memset(t->key + k * j->row_width, 0, j->dim * sizeof(double));
    }
}

/* ---- scores ---- */

/* Vector v of the lane sums of every head and key of a tile. */
INLINED void add_lanes(const double *q, const double *key, uint64_t row_width, uint32_t dim, uint32_t v,
                       kn_vd sum_out[TILE_HEADS][TILE_KEYS])
{
    kn_vd sum[TILE_HEADS][TILE_KEYS] = {0};
    for (uint32_t i = v * KN_VD_WIDTH; i < dim; i += KN_LANES) {
        kn_vd k[TILE_KEYS];
        for (int n = 0; n < TILE_KEYS; n++) {
            k[n] = kn_vd_load(key + (uint64_t)n * row_width + i);
        }
        for (int h = 0; h < TILE_HEADS; h++) {
            kn_vd x = kn_vd_load(q + (uint64_t)h * row_width + i);
            for (int n = 0; n < TILE_KEYS; n++) {
                sum[h][n] = kn_vd_add_exact_product(x, k[n], sum[h][n]);
            }
        }
    }
    memcpy(sum_out, sum, sizeof(sum));
}

static void score_tile(const attn_job *j, const double *q, const double *key, double scale, double *score)
{
    kn_vd part[KN_LANE_VECTORS][TILE_HEADS][TILE_KEYS];
    for (uint32_t v = 0; v < KN_LANE_VECTORS; v++) {
        add_lanes(q, key, j->row_width, j->dim, v, part[v]);
    }
    for (uint32_t h = 0; h < TILE_HEADS; h++) {
        for (uint32_t n = 0; n < TILE_KEYS; n++) {
            for (uint32_t s = KN_LANE_VECTORS / 2; s >= 1; s /= 2) {
                for (uint32_t v = 0; v < s; v++) {
                    part[v][h][n] += part[v + s][h][n];
                }
            }
            score[h * j->score_width + n] = kn_vd_fold(part[0][h][n]) * scale;
        }
    }
}

/* Scores of all keys for heads_padded heads. A tile's keys stay in the first cache while the heads pass. */
static void score_keys(const attn_job *j, const cpu_attn_scratch *t, uint32_t n_key, uint32_t heads_padded)
{
    double scale = 1.0 / sqrt(j->a->dim);
    for (uint32_t key0 = 0; key0 < n_key; key0 += CPU_KEYS) {
        uint32_t n = n_key - key0 < CPU_KEYS ? n_key - key0 : CPU_KEYS;
        load_keys(j, t, key0, n);
        for (uint32_t k = 0; k < n; k += TILE_KEYS) {
            for (uint32_t h = 0; h < heads_padded; h += TILE_HEADS) {
                score_tile(j, t->rows + h * j->row_width, t->key + k * j->row_width, scale,
                           t->score + h * j->score_width + key0 + k);
            }
        }
    }
}

/* The largest of score [n] and sink. */
static double largest(const double *score, uint32_t n, double sink)
{
    double top[KN_LANES], most = sink;
    uint32_t whole = n / KN_LANES * KN_LANES;
    for (int l = 0; l < KN_LANES; l++) {
        top[l] = sink;
    }
    for (uint32_t i = 0; i < whole; i += KN_LANES) {
        for (uint32_t l = 0; l < KN_LANES; l++) {
            top[l] = score[i + l] > top[l] ? score[i + l] : top[l];
        }
    }
    for (uint32_t i = whole; i < n; i++) {
        most = score[i] > most ? score[i] : most;
    }
    for (int l = 0; l < KN_LANES; l++) {
        most = top[l] > most ? top[l] : most;
    }
    return most;
}

/* Turns scores into weights exp(score - max); returns the denominator. */
static double soften(double *score, uint32_t n, double sink)
{
    double top = largest(score, n, sink), lane[KN_LANES] = {0};
    uint32_t whole = n / KN_LANES * KN_LANES;
    for (uint32_t i = 0; i < n; i++) {
        score[i] = kn_exp(score[i] - top);
    }
    for (uint32_t i = 0; i < whole; i += KN_LANES) {
        for (uint32_t l = 0; l < KN_LANES; l++) {
            lane[l] += score[i + l];
        }
    }
    for (uint32_t i = whole; i < n; i++) {
        lane[i - whole] += score[i];
    }
    return kn_fold_lanes(lane) + kn_exp(sink - top);
}

/* ---- values ---- */

/* o[h] += weight[h][k] * key[k], keys ascending, TILE_DIMS dims; the product is rounded before the sum. o is
 * not read where these keys are the first. */
INLINED void add_values(const attn_job *j, const double *key, uint32_t n_key, bool first,
                        const double *weight, double *o)
{
    kn_vd sum[TILE_HEADS][TILE_VECTORS] = {0};
    if (!first) {
        for (int h = 0; h < TILE_HEADS; h++) {
            for (int d = 0; d < TILE_VECTORS; d++) {
                sum[h][d] = kn_vd_load(o + (uint64_t)h * j->row_width + d * KN_VD_WIDTH);
            }
        }
    }
    for (uint32_t k = 0; k < n_key; k++) {
        kn_vd v[TILE_VECTORS];
        for (int d = 0; d < TILE_VECTORS; d++) {
            v[d] = kn_vd_load(key + k * j->row_width + d * KN_VD_WIDTH);
        }
        for (int h = 0; h < TILE_HEADS; h++) {
            double w = weight[(uint64_t)h * j->score_width + k];
            for (int d = 0; d < TILE_VECTORS; d++) {
                sum[h][d] += w * v[d];
            }
        }
    }
    for (int h = 0; h < TILE_HEADS; h++) {
        for (int d = 0; d < TILE_VECTORS; d++) {
            kn_vd_store(o + (uint64_t)h * j->row_width + d * KN_VD_WIDTH, sum[h][d]);
        }
    }
}

/* A tile's dims of a block of keys stay in the first cache while the heads pass. */
static void weigh_keys(const attn_job *j, const cpu_attn_scratch *t, uint32_t n_key, uint32_t heads_padded)
{
    for (uint32_t key0 = 0; key0 < n_key; key0 += CPU_KEYS) {
        uint32_t n = n_key - key0 < CPU_KEYS ? n_key - key0 : CPU_KEYS;
        load_keys(j, t, key0, n);
        for (uint32_t d = 0; d < j->dim; d += TILE_DIMS) {
            for (uint32_t h = 0; h < heads_padded; h += TILE_HEADS) {
                add_values(j, t->key + d, n, key0 == 0, t->score + h * j->score_width + key0,
                           t->rows + h * j->row_width + d);
            }
        }
    }
}

/* ---- rows ---- */

/* Queries of n_head heads; zeros past them, and past the dims of queries and keys. */
static void load_queries(const attn_job *j, const cpu_attn_scratch *t, const uint16_t *q, uint32_t n_head,
                         uint32_t heads_padded)
{
    uint32_t dim = j->a->dim, rest = j->dim - dim;
    for (uint32_t h = 0; h < n_head; h++) {
        double *row = t->rows + h * j->row_width;
        for (uint32_t i = 0; i < dim; i++) {
            row[i] = kn_bf16_decode(q[(uint64_t)h * dim + i]);
        }
        memset(row + dim, 0, rest * sizeof(double));
    }
    for (uint32_t h = n_head; h < heads_padded; h++) {
        memset(t->rows + h * j->row_width, 0, j->dim * sizeof(double));
    }
    for (uint32_t k = 0; k < CPU_KEYS; k++) {
        memset(t->key + k * j->row_width + dim, 0, rest * sizeof(double));
    }
}

/* bf16(o / den), in two loops that the compiler makes vector code of. */
static void write_row(const double *o, double den, uint32_t dim, uint16_t *out)
{
    float row[KN_DIM_MAX];
    for (uint32_t i = 0; i < dim; i++) {
        row[i] = (float)(o[i] / den);
    }
    for (uint32_t i = 0; i < dim; i++) {
        out[i] = kn_bf16_encode(row[i]);
    }
}

/* Heads head0 .. head0 + n_head - 1 of row r. */
static void attend(const attn_job *j, const cpu_attn_scratch *t, uint32_t r, uint32_t head0, uint32_t n_head)
{
    uint32_t n_key = list_keys(j, r, t->row), heads_padded = cpu_round_up(n_head, TILE_HEADS),
             dim = j->a->dim;
    uint64_t at = ((uint64_t)r * j->a->n_head + head0) * dim;
    const float *sink = (const float *)kn_host(j->a->sink) + head0;
    double den[CPU_HEADS];
    load_queries(j, t, j->q + at, n_head, heads_padded);
    score_keys(j, t, n_key, heads_padded);
    for (uint32_t h = 0; h < n_head; h++) {
        den[h] = soften(t->score + h * j->score_width, n_key, sink[h]);
    }
    weigh_keys(j, t, n_key, heads_padded);
    for (uint32_t h = 0; h < n_head; h++) {
        write_row(t->rows + h * j->row_width, den[h], dim, j->o + at + (uint64_t)h * dim);
    }
}

static void attention_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const attn_job *j = arg;
    for (uint32_t unit = begin; unit < end; unit++) {
        uint32_t head0 = unit % j->n_group * j->group, left = j->a->n_head - head0;
        attend(j, &j->s->attn[i_thread], unit / j->n_group, head0, left < j->group ? left : j->group);
    }
}

/* Many heads share one decoding of the keys, but every thread shall have something to do. */
static uint32_t heads_of_unit(const kn_attn *a, uint32_t n_row, uint32_t n_threads)
{
    uint64_t share = (uint64_t)n_row * a->n_head / (2ull * n_threads);
    if (share >= CPU_HEADS) {
        return CPU_HEADS;
    }
    return share < CPU_HEADS_TILE ? CPU_HEADS_TILE : (uint32_t)share / CPU_HEADS_TILE * CPU_HEADS_TILE;
}

void KN_FN(kn_cpu_attention)(kn_stream *base, const kn_batch *b, const kn_attn *a, kn_ptr q,
                             kn_ptr chunk_rows, kn_ptr picks, kn_ptr o_out)
{
    cpu_stream *s = (cpu_stream *)base;
    uint32_t group = heads_of_unit(a, b->n_row, kn_team_size(s->team));
    attn_job job = {.s = s,
                    .b = b,
                    .a = a,
                    .q = kn_host(q),
                    .chunk_rows = kn_host(chunk_rows),
                    .picks = kn_host(picks),
                    .o = kn_host(o_out),
                    .group = group,
                    .n_group = kn_blocks(a->n_head, group),
                    .dim = cpu_round_up(a->dim, CPU_DIM_PAD),
                    .row_width = cpu_attn_row_width(s->limits.head_dim),
                    .score_width = cpu_round_up(s->limits.n_key, CPU_KEYS)};
    CM_ASSERT_MSG(a->dim <= s->limits.head_dim, "dim %u limit %u", a->dim, s->limits.head_dim);
    kn_team_run(s->team, b->n_row * job.n_group, (uint64_t)a->window * a->dim * group, attention_part, &job);
}
