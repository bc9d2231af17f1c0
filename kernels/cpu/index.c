/* The indexer: scores of every visible key for the queries, a few at a time, and the best of them. */
#include "kernels/cpu/index.h"

#include <math.h>

#include "common/base/assert.h"

typedef struct index_job {
    cpu_stream *s;
    const kn_batch *b;
    const kn_seg *seg;
    const kn_kv_layout *layout;
    uint32_t topk, row0; /* the first query's row */
    int32_t *picks;      /* of row 0 */
    cpu_index_scan scan;
} index_job;

static uint32_t visible_of(const index_job *j, uint32_t row)
{
    return (j->seg->pos0 + (row - j->seg->row0) + 1) / j->layout->ratio;
}

static float *scores_of(const index_job *j, uint32_t i)
{
    return j->s->index_score + i * cpu_index_width(j->s->limits.n_index_row);
}

/* Pages stand anywhere in the pool: no prefetcher of the machine's can guess the next one. */
static void prefetch_page(const index_job *j, uint32_t key, uint32_t n)
{
    const kn_kv_layout *l = j->layout;
    const uint8_t *at = kn_page_row(j->b, j->seg, l->page_index, l->ratio, l->index_bytes, key);
    for (uint64_t i = 0; i < (uint64_t)n * l->index_bytes; i += 64) {
        __builtin_prefetch(at + i);
    }
}

static void score_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const index_job *j = arg;
    const kn_kv_layout *l = j->layout;
    const uint8_t *keys[KN_PAGE_TOKENS];
    uint32_t per_page = KN_PAGE_TOKENS / l->ratio, n;
    (void)i_thread;
    for (uint32_t at = begin; at < end; at += n) { /* a page at a time: its keys lie together */
        const uint8_t *first = kn_page_row(j->b, j->seg, l->page_index, l->ratio, l->index_bytes, at);
        n = per_page - at % per_page;
        n = end - at < n ? end - at : n;
        if (end - at - n >= per_page) {
            prefetch_page(j, at + n, per_page);
        }
        for (uint32_t k = 0; k < n; k++) {
            keys[k] = first + (uint64_t)k * l->index_bytes;
        }
        KN_FN(kn_cpu_index_score)
        (&j->scan, keys, n, scores_of(j, 0) + at, cpu_index_width(j->s->limits.n_index_row));
    }
}

/* Order of floats as order of unsigned integers; -0 becomes 0, and every NaN the least of all, as kn_topk has
 * it: which sign a NaN gets depends on the instructions that made it. */
static uint32_t sortable(float x)
{
    uint32_t u = kn_f32_bits(x + 0.0f);
    uint32_t order = (u & 0x80000000u) ? ~u : u | 0x80000000u;
    return x == x ? order : 0;
}

/* Puts sortable bits in the place of scores. */
static uint32_t *make_sortable(float *score, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        uint32_t u = sortable(score[i]);
        memcpy(&score[i], &u, sizeof(u));
    }
    return (uint32_t *)(void *)score;
}

enum { DIGIT_BITS = 11, DIGITS = 1 << DIGIT_BITS, TABLES = 4 };

/* Moves *digit_inout, a digit's largest value at first, to the one that the k-th largest has, and returns how
 * many have a larger one, those of above among them. */
static uint32_t find_digit(const uint32_t *count, uint32_t above, uint32_t k, uint32_t *digit_inout)
{
    while (above + count[*digit_inout] < k) {
        above += count[(*digit_inout)--];
    }
    return above;
}

/* How many of u [n] have each upper digit. Equal ones follow one another often, so they are counted in turns
 * in tables of their own: adding to what was just stored has to wait. */
static void count_upper(const uint32_t *u, uint32_t n, uint32_t *count_out)
{
    enum { SHIFT = 32 - DIGIT_BITS };
    uint32_t count[TABLES][DIGITS] = {{0}}, i = 0;
    for (; i + TABLES <= n; i += TABLES) {
        for (uint32_t t = 0; t < TABLES; t++) {
            count[t][u[i + t] >> SHIFT]++;
        }
    }
    for (; i < n; i++) {
        count[0][u[i] >> SHIFT]++;
    }
    for (uint32_t d = 0; d < DIGITS; d++) {
        count_out[d] = count[0][d] + count[1][d] + count[2][d] + count[3][d];
    }
}

/* Keeps of u [n] those >= least, in their order, and where they stood; returns how many. Without branches:
 * which ones are kept nobody can guess. */
static uint32_t keep_upper(uint32_t *u, uint32_t n, uint32_t least, uint32_t *index_out)
{
    uint32_t n_kept = 0, i = 0;
#if defined(__AVX512F__)
    const __m512i step = _mm512_set1_epi32(16), limit = _mm512_set1_epi32((int32_t)least);
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (; i + 16 <= n; i += 16) { /* what is written past the kept ones has been read, or is not used */
        __m512i x = _mm512_loadu_si512(u + i);
        __mmask16 kept = _mm512_cmpge_epu32_mask(x, limit);
        _mm512_storeu_si512(u + n_kept, _mm512_maskz_compress_epi32(kept, x));
        _mm512_storeu_si512(index_out + n_kept, _mm512_maskz_compress_epi32(kept, index));
        n_kept += (uint32_t)__builtin_popcount(kn_lanes_of(kept));
        index = _mm512_add_epi32(index, step);
    }
#endif
    for (; i < n; i++) {
        uint32_t x = u[i];
        u[n_kept] = x;
        index_out[n_kept] = i;
        n_kept += x >= least;
    }
    return n_kept;
}

/* The k-th largest of u [n], which is known to have the given upper digit; n_above: how many have a larger
 * one. Returns how many are larger than it. */
static uint32_t kth_of_kept(const uint32_t *u, uint32_t n, uint32_t k, uint32_t n_above, uint32_t upper,
                            uint32_t *kth_out)
{
    static const uint32_t shifts[] = {10, 0}, bits[] = {11, 10};
    uint32_t count[DIGITS], digit, found = upper, known = 32 - DIGIT_BITS, above = n_above;
    for (int pass = 0; pass < 2; pass++) {
        uint32_t most = (1u << bits[pass]) - 1;
        memset(count, 0, sizeof(count));
        for (uint32_t i = 0; i < n; i++) {
            count[u[i] >> shifts[pass] & most] += u[i] >> known == found;
        }
        digit = most;
        above = find_digit(count, above, k, &digit);
        found = found << bits[pass] | digit;
        known = shifts[pass];
    }
    *kth_out = found;
    return above;
}

/* The k best of score [n], k <= n, in ascending index; among equals of the last place the lower ones. By the
 * bits of the k-th: 11 of them counted among all, 11 and 10 among those that may be picked then. Changes
 * score; spare [n + 16]. */
static void pick_best(float *score, uint32_t n, uint32_t k, uint32_t *spare, int32_t *picks_out)
{
    uint32_t *u = make_sortable(score, n), count[DIGITS], upper = DIGITS - 1, n_above, n_equal, last,
             n_pick = 0;
    count_upper(u, n, count);
    n_above = find_digit(count, 0, k, &upper);
    n = keep_upper(u, n, upper << (32 - DIGIT_BITS), spare);
    n_equal = k - kth_of_kept(u, n, k, n_above, upper, &last);
    for (uint32_t i = 0; n_pick < k; i++) {
        uint32_t equal = (u[i] == last) & (n_equal > 0);
        picks_out[n_pick] = (int32_t)spare[i];
        n_pick += (u[i] > last) | equal;
        n_equal -= equal;
    }
}

static void pick_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const index_job *j = arg;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        uint32_t row = j->row0 + i;
        uint32_t *spare = j->s->index_spare + i * cpu_index_width(j->s->limits.n_index_row);
        pick_best(scores_of(j, i), visible_of(j, row), j->topk, spare, j->picks + (uint64_t)row * j->topk);
    }
}

/* Picks of scan.n_row rows from row0 on, which see more than topk keys each. */
static void pick_rows(index_job *j, const uint8_t *iq, const uint16_t *w)
{
    cpu_index_scan *scan = &j->scan;
    uint32_t most = visible_of(j, j->row0 + scan->n_row - 1);
    CM_ASSERT_MSG(most <= j->s->limits.n_index_row, "rows %u limit %u", most, j->s->limits.n_index_row);
    for (uint32_t i = 0; i < scan->n_row; i++) {
        uint64_t head = (uint64_t)(j->row0 + i) * scan->heads;
        KN_FN(kn_cpu_index_load)(scan, iq + head * kn_index_row_bytes(scan->dim), w + head, &scan->query[i]);
    }
    kn_team_run(j->s->team, most, (uint64_t)scan->n_row * scan->width * scan->dim / 8, score_part, j);
    kn_team_run(j->s->team, scan->n_row, 8ull * most, pick_part, j);
}

/* Row that sees no more keys than it may pick. */
static void pick_all(const index_job *j, uint32_t row)
{
    uint32_t n = visible_of(j, row);
    for (uint32_t i = 0; i < j->topk; i++) {
        j->picks[(uint64_t)row * j->topk + i] = i < n ? (int32_t)i : -1;
    }
}

static void pick_segment(index_job *j, const uint8_t *iq, const uint16_t *w)
{
    uint32_t row = j->seg->row0, end = row + j->seg->n_row;
    for (; row < end && visible_of(j, row) <= j->topk; row++) {
        pick_all(j, row);
    }
    for (; row < end; row += CPU_INDEX_ROWS) {
        j->row0 = row;
        j->scan.n_row = end - row < CPU_INDEX_ROWS ? end - row : CPU_INDEX_ROWS;
        pick_rows(j, iq, w);
    }
}

void KN_FN(kn_cpu_index_topk)(kn_stream *base, const kn_batch *b, const kn_kv_layout *layout, uint32_t heads,
                              uint32_t dim, uint32_t topk, kn_ptr iq, kn_ptr w, kn_ptr picks_out)
{
    cpu_stream *s = (cpu_stream *)base;
    index_job job = {.s = s, .b = b, .layout = layout, .topk = topk, .picks = kn_host(picks_out)};
    uint32_t width = cpu_round_up(heads, CPU_INDEX_PAD);
    const kn_seg *segs = kn_host(b->segs);
    CM_ASSERT_MSG(width <= CPU_INDEX_HEADS && (uint64_t)width * dim <= CPU_INDEX_MAX && dim <= KN_DIM_MAX,
                  "heads %u dim %u", heads, dim);
    job.scan.heads = heads;
    job.scan.dim = dim;
    job.scan.width = width;
    job.scan.factor = (float)(1.0 / sqrt((double)dim * heads));
    for (uint32_t i = 0; i < CPU_INDEX_ROWS; i++) {
        job.scan.query[i].codes = s->index_q + i * 2ull * CPU_INDEX_MAX;
        job.scan.query[i].scale = s->index_scale + (uint64_t)i * (CPU_INDEX_MAX / KN_FP4_BLOCK);
    }
    for (uint32_t g = 0; g < b->n_seg; g++) {
        job.seg = &segs[g];
        pick_segment(&job, kn_host(iq), kn_host(w));
    }
}
