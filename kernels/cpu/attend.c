/* Attention of a batch. A unit is a group of heads of one row or, where a row's heads are few, all heads of
 * several rows that follow one another: those share most of their window and all compressed rows. The unit's
 * keys come in blocks that are decoded once for all its heads, twice in all: for the scores, and for the
 * weighted values. Both are tiles of [heads][keys] and [heads][dims] held in registers, vectors along the
 * dims, as the lane sums want it. Bound: the double multiply-adds, n_key * n_head * dim each for scores and
 * for values; a value's product is rounded before its sum, so it takes a multiplication and an addition. */
#include <assert.h>
#include <math.h>

#include "common/base/assert.h"
#include "kernels/cpu/chunk.h"
#include "kernels/cpu/wide.h"

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
    uint32_t group, n_group;         /* heads of a unit; units of a row, or */
    uint32_t rows;                   /* rows of a unit */
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

/* Keys begin .. end - 1 of a unit are keys begin - shift .. of a row. */
typedef struct key_range {
    uint32_t begin, end, shift;
} key_range;

/* Rows of a unit: those of one segment that follow one another. */
typedef struct attn_unit {
    const kn_seg *seg;
    uint32_t row0, n_row;
    uint32_t head0, n_head,
        heads_padded; /* of each row; row i has those from i * heads_padded of the scratch */
    uint32_t n_key;
    key_range range[CPU_HEADS / TILE_HEADS][2]; /* of each row, ascending; the second may be empty */
} attn_unit;

static uint32_t position_of(const kn_seg *seg, uint32_t r)
{
    return seg->pos0 + (r - seg->row0);
}

static const int32_t *picks_of(const attn_job *j, uint32_t r)
{
    return j->picks + (uint64_t)r * j->a->topk;
}

/* Compressed rows of row r; any_out: whether they are picked ones, not the first of the sequence. */
static uint32_t count_compressed(const attn_job *j, const kn_seg *seg, uint32_t r, bool *any_out)
{
    uint32_t n = 0;
    *any_out = false;
    if (j->a->layout.ratio != 4) {
        return j->a->layout.ratio == 0 ? 0 : (position_of(seg, r) + 1) / j->a->layout.ratio;
    }
    for (const int32_t *pick = picks_of(j, r); n < j->a->topk && pick[n] >= 0; n++) {
        *any_out |= pick[n] != (int32_t)n;
    }
    return n;
}

/* Enters row i of the unit: n_raw window rows of all come first, then compressed ones, of which it has n. */
static void set_ranges(const attn_job *j, attn_unit *u, uint32_t i, uint32_t raw0, uint32_t n_raw, uint32_t n)
{
    uint32_t p = position_of(u->seg, u->row0 + i), begin = kn_raw_first(p, j->a->window) - raw0,
             end = p + 1 - raw0;
    CM_ASSERT_MSG(end - begin + n <= j->s->limits.n_key, "keys %u limit %u", end - begin + n,
                  j->s->limits.n_key);
    u->range[i][0] = (key_range){begin, end, begin};
    u->range[i][1] = (key_range){n_raw, n_raw + n, n_raw - (end - begin)};
    if (end == n_raw) { /* nothing between them: no tile has to be done for either */
        u->range[i][0].end = n_raw + n;
        u->range[i][1].end = n_raw;
    }
}

/* Stored rows of the unit's keys in the order of summation, and which of them are whose. */
static void list_keys(const attn_job *j, attn_unit *u, const uint8_t **row_out)
{
    const kn_kv_layout *l = &j->a->layout;
    uint32_t raw0 = kn_raw_first(position_of(u->seg, u->row0), j->a->window), most = 0, n = 0;
    uint32_t raw_end = position_of(u->seg, u->row0 + u->n_row - 1) + 1;
    bool any = false;
    for (uint32_t i = 0; i < u->n_row; i++) {
        uint32_t n_compressed = count_compressed(j, u->seg, u->row0 + i, &any);
        set_ranges(j, u, i, raw0, raw_end - raw0, n_compressed);
        most = n_compressed > most ? n_compressed : most;
    }
    for (uint32_t at = raw0; at < raw_end; at++) {
        row_out[n++] = kn_raw_row(u->seg, j->a, j->chunk_rows, at);
    }
    for (uint32_t i = 0; i < most; i++) {
        uint32_t row = any ? (uint32_t)picks_of(j, u->row0)[i] : i;
        row_out[n++] = kn_page_row(j->b, u->seg, l->page_rows, l->ratio, l->row_bytes, row);
    }
    u->n_key = n;
}

/* How many rows from r on, up to end, may be one unit: those of a segment, as long as their compressed rows
 * are the first of the sequence. */
static uint32_t rows_alike(const attn_job *j, const kn_seg *seg, uint32_t r, uint32_t end)
{
    uint32_t last = seg->row0 + seg->n_row < end ? seg->row0 + seg->n_row : end, n = 0;
    for (bool any = false; r + n < last && !any;) {
        count_compressed(j, seg, r + n, &any);
        n += !any;
    }
    return n > 0 ? n : 1;
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

typedef kn_vd score_sums[TILE_HEADS][TILE_KEYS];

/* Keys begin .. end - 1 of a tile, for one row: scores at begin on. */
typedef struct tile_part {
    uint32_t begin, end;
    double *score; /* of the tile's first head and key, if that were the row's */
} tile_part;

#if defined(__AVX512F__)
/* The contract's fold of the lanes of TILE_KEYS sums, lanes l and l + 8 added already: total n in element n.
 */
static inline __m512d fold_keys(const __m512d s[TILE_KEYS])
{
    __m512d four[3], two, rest;
    for (int i = 0; i < 3; i++) { /* keys i and i + 3, as 2 x 4 lanes */
        __m512d x = s[2 * i], y = s[2 * i + 1];
        four[i] = _mm512_add_pd(_mm512_shuffle_f64x2(x, y, 0x44), _mm512_shuffle_f64x2(x, y, 0xee));
    }
    two = _mm512_add_pd(_mm512_shuffle_f64x2(four[0], four[1], 0x88),
                        _mm512_shuffle_f64x2(four[0], four[1], 0xdd));
    rest = _mm512_add_pd(_mm512_shuffle_f64x2(four[2], four[2], 0x88),
                         _mm512_shuffle_f64x2(four[2], four[2], 0xdd));
    /* two has keys 0 to 3, rest has keys 4, 5, 4, 5 */
    return _mm512_permutexvar_pd(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 0, 0),
                                 _mm512_add_pd(_mm512_unpacklo_pd(two, rest), _mm512_unpackhi_pd(two, rest)));
}
static_assert(TILE_KEYS == 6 && KN_LANE_VECTORS == 2, "as the fold has it");

INLINED void write_scores(const attn_job *j, score_sums part[KN_LANE_VECTORS], double scale, tile_part p)
{
    __mmask8 wanted = (__mmask8)((1u << p.end) - (1u << p.begin));
    for (uint32_t h = 0; h < TILE_HEADS; h++) {
        kn_vd sum[TILE_KEYS];
        for (uint32_t n = 0; n < TILE_KEYS; n++) {
            sum[n] = part[0][h][n] + part[1][h][n];
        }
        _mm512_mask_storeu_pd(p.score + h * j->score_width, wanted, fold_keys(sum) * scale);
    }
}
#else
INLINED void write_scores(const attn_job *j, score_sums part[KN_LANE_VECTORS], double scale, tile_part p)
{
    for (uint32_t h = 0; h < TILE_HEADS; h++) {
        for (uint32_t n = p.begin; n < p.end; n++) {
            for (uint32_t s = KN_LANE_VECTORS / 2; s >= 1; s /= 2) {
                for (uint32_t v = 0; v < s; v++) {
                    part[v][h][n] += part[v + s][h][n];
                }
            }
            p.score[h * j->score_width + n] = kn_vd_fold(part[0][h][n]) * scale;
        }
    }
}
#endif

static void score_tile(const attn_job *j, const double *q, const double *key, double scale, tile_part p)
{
    score_sums part[KN_LANE_VECTORS];
    for (uint32_t v = 0; v < KN_LANE_VECTORS; v++) {
        add_lanes(q, key, j->row_width, j->dim, v, part[v]);
    }
    write_scores(j, part, scale, p);
}

/* Scores of what a tile of keys, n from `first` of the unit on, has of a row's range. */
static void score_range(const attn_job *j, const cpu_attn_scratch *t, const attn_unit *u, uint32_t i,
                        key_range range, const double *key, uint32_t first, uint32_t n)
{
    uint32_t begin = range.begin > first ? range.begin - first : 0,
             end = range.end < first + n ? range.end - first : n;
    if (range.begin >= first + n || range.end <= first + begin) {
        return;
    }
    for (uint32_t h = i * u->heads_padded; h < (i + 1) * u->heads_padded; h += TILE_HEADS) {
        double *score = t->score + h * j->score_width + first - range.shift;
        score_tile(j, t->rows + h * j->row_width, key, 1.0 / sqrt(j->a->dim), (tile_part){begin, end, score});
    }
}

/* Scores of all keys. A tile's keys stay in the first cache while the heads pass. */
static void score_keys(const attn_job *j, const cpu_attn_scratch *t, const attn_unit *u)
{
    for (uint32_t key0 = 0; key0 < u->n_key; key0 += CPU_KEYS) {
        uint32_t n = u->n_key - key0 < CPU_KEYS ? u->n_key - key0 : CPU_KEYS;
        load_keys(j, t, key0, n);
        for (uint32_t k = 0; k < n; k += TILE_KEYS) {
            const double *key = t->key + k * j->row_width;
            uint32_t len = n - k < TILE_KEYS ? n - k : TILE_KEYS;
            for (uint32_t i = 0; i < u->n_row; i++) {
                score_range(j, t, u, i, u->range[i][0], key, key0 + k, len);
                score_range(j, t, u, i, u->range[i][1], key, key0 + k, len);
            }
        }
    }
}

/* The largest of score [n] and sink. */
static double largest(const double *score, uint32_t n, double sink)
{
    double top[KN_LANES], most = sink;
    uint32_t whole = n / KN_LANES * KN_LANES;
    kn_vd v[KN_LANE_VECTORS];
    for (int l = 0; l < KN_LANE_VECTORS; l++) {
        v[l] = kn_vd_all(sink);
    }
    for (uint32_t i = 0; i < whole; i += KN_LANES) {
        for (uint32_t l = 0; l < KN_LANE_VECTORS; l++) {
            v[l] = kn_vd_at_least(v[l], kn_vd_load(score + i + l * KN_VD_WIDTH));
        }
    }
    memcpy(top, v, sizeof(top));
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
    double top = largest(score, n, sink), lane[KN_LANES];
    uint32_t whole = n / KN_LANES * KN_LANES;
    kn_vd sum[KN_LANE_VECTORS] = {0};
    for (uint32_t i = 0; i < whole; i += KN_LANES) {
        for (uint32_t l = 0; l < KN_LANE_VECTORS; l++) {
            double *at = score + i + l * KN_VD_WIDTH;
            kn_vd weight = kn_vd_exp(kn_vd_load(at) - top);
            kn_vd_store(at, weight);
            sum[l] += weight;
        }
    }
    memcpy(lane, sum, sizeof(lane));
    for (uint32_t i = whole; i < n; i++) {
        score[i] = kn_exp(score[i] - top);
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

/* A tile's dims of what a block of keys, n from `first` of the unit on, has of a row's range. */
static void weigh_range(const attn_job *j, const cpu_attn_scratch *t, const attn_unit *u, uint32_t i,
                        key_range range, uint32_t first, uint32_t n, uint32_t d)
{
    uint32_t begin = range.begin > first ? range.begin : first,
             end = range.end < first + n ? range.end : first + n;
    if (begin >= end) {
        return;
    }
    for (uint32_t h = i * u->heads_padded; h < (i + 1) * u->heads_padded; h += TILE_HEADS) {
        add_values(j, t->key + (begin - first) * j->row_width + d, end - begin, begin == range.shift,
                   t->score + h * j->score_width + begin - range.shift, t->rows + h * j->row_width + d);
    }
}

/* A tile's dims of a block of keys stay in the first cache while the heads pass. */
static void weigh_keys(const attn_job *j, const cpu_attn_scratch *t, const attn_unit *u)
{
    for (uint32_t key0 = 0; key0 < u->n_key; key0 += CPU_KEYS) {
        uint32_t n = u->n_key - key0 < CPU_KEYS ? u->n_key - key0 : CPU_KEYS;
        load_keys(j, t, key0, n);
        for (uint32_t d = 0; d < j->dim; d += TILE_DIMS) {
            for (uint32_t i = 0; i < u->n_row; i++) {
                weigh_range(j, t, u, i, u->range[i][0], key0, n, d);
                weigh_range(j, t, u, i, u->range[i][1], key0, n, d);
            }
        }
    }
}

/* ---- rows ---- */

static void load_query(const attn_job *j, const uint16_t *q, double *row)
{
    uint32_t i = 0;
    for (; i + KN_WIDE <= j->a->dim; i += KN_WIDE) {
        kn_wide x = kn_wide_from_bf16(q + i);
        kn_vd_store(row + i, x.half[0]);
        kn_vd_store(row + i + KN_VD_WIDTH, x.half[1]);
    }
    for (; i < j->a->dim; i++) {
        row[i] = kn_bf16_decode(q[i]);
    }
    memset(row + j->a->dim, 0, (j->dim - j->a->dim) * sizeof(*row));
}

static const uint16_t *query_of(const attn_job *j, const attn_unit *u, uint32_t i, uint32_t h)
{
    return j->q + ((uint64_t)(u->row0 + i) * j->a->n_head + u->head0 + h) * j->a->dim;
}

/* Queries of all rows and heads; zeros past them, and past the dims of queries and keys. */
static void load_queries(const attn_job *j, const cpu_attn_scratch *t, const attn_unit *u)
{
    for (uint32_t i = 0; i < u->n_row; i++) {
        double *rows = t->rows + i * u->heads_padded * j->row_width;
        for (uint32_t h = 0; h < u->n_head; h++) {
            load_query(j, query_of(j, u, i, h), rows + h * j->row_width);
        }
        for (uint32_t h = u->n_head; h < u->heads_padded; h++) {
            memset(rows + h * j->row_width, 0, j->dim * sizeof(double));
        }
    }
    for (uint32_t k = 0; k < CPU_KEYS; k++) {
        memset(t->key + k * j->row_width + j->a->dim, 0, (j->dim - j->a->dim) * sizeof(double));
    }
}

/* bf16(o / den) */
static void write_row(const double *o, double den, uint32_t dim, uint16_t *out)
{
    uint32_t i = 0;
    for (; i + KN_WIDE <= dim; i += KN_WIDE) {
        kn_wide x = {{kn_vd_load(o + i) / den, kn_vd_load(o + i + KN_VD_WIDTH) / den}};
        kn_wide_to_bf16(x, out + i);
    }
    for (; i < dim; i++) {
        out[i] = kn_bf16_from_f64(o[i] / den);
    }
}

static void attend(const attn_job *j, const cpu_attn_scratch *t, attn_unit *u)
{
    const float *sink = (const float *)kn_host(j->a->sink) + u->head0;
    double den[CPU_HEADS];
    list_keys(j, u, t->row);
    load_queries(j, t, u);
    score_keys(j, t, u);
    for (uint32_t i = 0; i < u->n_row; i++) {
        const key_range *range = u->range[i], *last = range[1].end > range[1].begin ? range + 1 : range;
        for (uint32_t h = 0, at = i * u->heads_padded; h < u->n_head; h++, at++) {
            den[at] = soften(t->score + at * j->score_width, last->end - last->shift, sink[h]);
        }
    }
    weigh_keys(j, t, u);
    for (uint32_t i = 0; i < u->n_row; i++) {
        for (uint32_t h = 0, at = i * u->heads_padded; h < u->n_head; h++, at++) {
            write_row(t->rows + at * j->row_width, den[at], j->a->dim, j->o + (query_of(j, u, i, h) - j->q));
        }
    }
}

/* A group of heads of one row, or of `rows` rows from row0 on, as many at a time as share their keys. */
static void attention_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const attn_job *j = arg;
    for (uint32_t unit = begin; unit < end; unit++) {
        uint32_t head0 = unit % j->n_group * j->group, left = j->a->n_head - head0;
        uint32_t row = unit / j->n_group * j->rows, last = row + j->rows;
        last = last < j->b->n_row ? last : j->b->n_row;
        attn_unit u = {.head0 = head0, .n_head = left < j->group ? left : j->group};
        u.heads_padded = cpu_round_up(u.n_head, TILE_HEADS);
        for (; row < last; row += u.n_row) {
            u.seg = segment_of(j->b, row);
            u.row0 = row;
            u.n_row = rows_alike(j, u.seg, row, last);
            attend(j, &j->s->attn[i_thread], &u);
        }
    }
}

/* Many heads share one decoding of the keys, but every thread shall have something to do. */
static uint32_t heads_of_unit(const kn_attn *a, uint32_t n_row, uint32_t n_threads)
{
    uint64_t share = (uint64_t)n_row * a->n_head / (n_threads > 1 ? 2ull * n_threads : 1);
    if (share >= CPU_HEADS) {
        return CPU_HEADS;
    }
    return share < CPU_HEADS_TILE ? CPU_HEADS_TILE : (uint32_t)share / CPU_HEADS_TILE * CPU_HEADS_TILE;
}

void KN_FN(kn_cpu_attention)(kn_stream *base, const kn_batch *b, const kn_attn *a, kn_ptr q,
                             kn_ptr chunk_rows, kn_ptr picks, kn_ptr o_out)
{
    cpu_stream *s = (cpu_stream *)base;
    uint32_t most = heads_of_unit(a, b->n_row, kn_team_size(s->team)),
             group = a->n_head < most ? a->n_head : most, rows = most / cpu_round_up(group, CPU_HEADS_TILE);
    attn_job job = {.s = s,
                    .b = b,
                    .a = a,
                    .q = kn_host(q),
                    .chunk_rows = kn_host(chunk_rows),
                    .picks = kn_host(picks),
                    .o = kn_host(o_out),
                    .group = group,
                    .n_group = kn_blocks(a->n_head, group),
                    .rows = rows,
                    .dim = cpu_round_up(a->dim, CPU_DIM_PAD),
                    .row_width = cpu_attn_row_width(s->limits.head_dim),
                    .score_width = cpu_round_up(s->limits.n_key, CPU_KEYS)};
    CM_ASSERT_MSG(a->dim <= s->limits.head_dim, "dim %u limit %u", a->dim, s->limits.head_dim);
    kn_team_run(s->team, kn_blocks(b->n_row, rows) * job.n_group, (uint64_t)a->window * a->dim * group * rows,
                attention_part, &job);
}
