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
    return j->s->index_score + (uint64_t)i * j->s->limits.n_index_row;
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
        for (uint32_t k = 0; k < n; k++) {
            keys[k] = first + (uint64_t)k * l->index_bytes;
        }
        KN_FN(kn_cpu_index_score)(&j->scan, keys, n, scores_of(j, 0) + at, j->s->limits.n_index_row);
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

static void pick_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const index_job *j = arg;
    (void)i_thread;
    for (uint32_t i = begin; i < end; i++) {
        uint32_t row = j->row0 + i;
        pick_best(scores_of(j, i), visible_of(j, row), j->topk, j->picks + (uint64_t)row * j->topk);
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
