/* The compressor: softmax pooling of a window's kv over its scores, per dim. */
#include "common/base/assert.h"
#include "kernels/cpu/wide.h"

enum { TERM_MAX = KN_PAGE_TOKENS + 8 };

typedef struct compress_job {
    const kn_batch *b;
    const kn_compress *c;
    const float *kv;
    float *score;
} compress_job;

typedef struct window_term {
    const float *kv, *score; /* [dim] */
} window_term;

/* Term of position p, columns from `column` on: from the batch, or from the state for what came before it. */
static window_term term_at(const compress_job *j, const kn_seg *seg, uint32_t p, uint32_t column)
{
    const kn_compress *c = j->c;
    uint64_t width = kn_compress_width(c->ratio, c->dim), at;
    uint32_t span = c->span;
    if (p >= seg->pos0) {
        at = (seg->row0 + (p - seg->pos0)) * width + column;
        return (window_term){j->kv + at, j->score + at};
    }
    at = p % span * width + column;
    const float *state = (const float *)((const uint8_t *)kn_host(seg->slot) + c->slot_state);
    return (window_term){state + at, state + span * width + at};
}

/* Terms of the window that ends at position last, in position order; returns how many. */
static uint32_t list_terms(const compress_job *j, const kn_seg *seg, uint32_t last, window_term *term_out)
{
    uint32_t ratio = j->c->ratio, first = last + 1 - ratio, n = 0;
    if (ratio == 4 && first >= 4) {
        for (uint32_t p = first - 4; p < first; p++) {
            term_out[n++] = term_at(j, seg, p, 0);
        }
    }
    for (uint32_t p = first; p <= last; p++) {
        term_out[n++] = term_at(j, seg, p, ratio == 4 ? j->c->dim : 0);
    }
    return n;
}

static kn_wide load_floats(const float *x)
{
    kn_vf v;
    memcpy(&v, x, sizeof(v));
    return kn_wide_from_f32(v);
}

/* KN_WIDE dims from column at on. */
static void pool_wide(const window_term *term, uint32_t n, uint32_t at, uint16_t *row_out)
{
    kn_wide top = load_floats(term[0].score + at), den = {0}, sum = {0};
    for (uint32_t t = 1; t < n; t++) {
        kn_wide v = load_floats(term[t].score + at);
        for (int h = 0; h < 2; h++) {
            top.half[h] = kn_vd_at_least(top.half[h], v.half[h]);
        }
    }
    for (uint32_t t = 0; t < n; t++) {
        kn_wide v = load_floats(term[t].score + at), kv = load_floats(term[t].kv + at);
        for (int h = 0; h < 2; h++) {
            kn_vd e = kn_vd_exp(v.half[h] - top.half[h]);
            den.half[h] += e;
            sum.half[h] += e * kv.half[h];
        }
    }
    for (int h = 0; h < 2; h++) {
        sum.half[h] /= den.half[h];
    }
    kn_wide_to_bf16(sum, row_out + at);
}

static uint16_t pool_one(const window_term *term, uint32_t n, uint32_t at)
{
    double top = term[0].score[at], den = 0, sum = 0;
    for (uint32_t t = 1; t < n; t++) {
        top = term[t].score[at] > top ? term[t].score[at] : top;
    }
    for (uint32_t t = 0; t < n; t++) {
        double e = kn_exp(term[t].score[at] - top);
        den += e;
        sum += e * term[t].kv[at];
    }
    return kn_bf16_from_f64(sum / den);
}

static void pool(const window_term *term, uint32_t n, uint32_t dim, uint16_t *row_out)
{
    uint32_t at = 0;
    for (; at + KN_WIDE <= dim; at += KN_WIDE) {
        pool_wide(term, n, at, row_out);
    }
    for (; at < dim; at++) {
        row_out[at] = pool_one(term, n, at);
    }
}

static void emit_row(const compress_job *j, const kn_seg *seg, uint32_t last)
{
    const kn_compress *c = j->c;
    window_term term[TERM_MAX];
    uint16_t row[KN_DIM_MAX];
    float cs[KN_DIM_MAX];
    uint8_t *stored = kn_page_row(j->b, seg, c->page_rows, c->ratio, c->row_bytes, last / c->ratio);
    pool(term, list_terms(j, seg, last, term), c->dim, row);
    KN_FN(kn_cpu_rmsnorm)(row, kn_host(c->norm), c->dim, c->eps, row);
    KN_FN(kn_cpu_angles)(kn_host(c->inv_freq), c->rope / 2, last + 1 - c->ratio, cs);
    KN_FN(kn_cpu_rotate)(row + c->dim - c->rope, c->rope / 2, cs, false);
    if (c->index) {
        KN_FN(kn_cpu_index_pack)(row, c->dim, stored);
    } else {
        KN_FN(kn_cpu_kv_pack)(row, c->dim, c->rope, stored);
    }
}

/* Item i is the i-th row that the batch completes, over all segments in order. */
static void emit_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const compress_job *j = arg;
    const kn_seg *segs = kn_host(j->b->segs);
    uint32_t ratio = j->c->ratio, i = 0;
    (void)i_thread;
    for (uint32_t g = 0; g < j->b->n_seg && i < end; g++) {
        uint32_t first = segs[g].pos0 / ratio, n = (segs[g].pos0 + segs[g].n_row) / ratio - first;
        for (uint32_t k = 0; k < n; k++, i++) {
            if (i >= begin && i < end) {
                emit_row(j, &segs[g], (first + k + 1) * ratio - 1);
            }
        }
    }
}

static void add_ape(const compress_job *j)
{
    const kn_seg *segs = kn_host(j->b->segs);
    uint64_t width = kn_compress_width(j->c->ratio, j->c->dim);
    for (uint32_t g = 0; g < j->b->n_seg; g++) {
        for (uint32_t r = 0; r < segs[g].n_row; r++) {
            const float *ape = (const float *)kn_host(j->c->ape) + (segs[g].pos0 + r) % j->c->ratio * width;
            float *score = j->score + (segs[g].row0 + r) * width;
            for (uint64_t i = 0; i < width; i++) {
                score[i] += ape[i];
            }
        }
    }
}

void KN_FN(kn_cpu_compress)(kn_stream *s, const kn_batch *b, const kn_compress *c, kn_ptr kv, kn_ptr score)
{
    compress_job job = {.b = b, .c = c, .kv = kn_host(kv), .score = kn_host(score)};
    const kn_seg *segs = kn_host(b->segs);
    uint32_t n = 0;
    CM_ASSERT_MSG(c->dim <= KN_DIM_MAX && c->ratio <= KN_PAGE_TOKENS, "dim %u ratio %u", c->dim, c->ratio);
    add_ape(&job);
    for (uint32_t g = 0; g < b->n_seg; g++) {
        n += (segs[g].pos0 + segs[g].n_row) / c->ratio - segs[g].pos0 / c->ratio;
    }
    kn_team_run(((cpu_stream *)s)->team, n, 30ull * c->dim * (c->ratio + 8), emit_part, &job);
}

void KN_FN(kn_cpu_compress_commit)(kn_stream *s, const kn_batch *b, const kn_compress *c, kn_ptr kv,
                                   kn_ptr score)
{
    const kn_seg *segs = kn_host(b->segs);
    uint64_t width = kn_compress_width(c->ratio, c->dim);
    uint32_t span = c->span;
    (void)s;
    for (uint32_t g = 0; g < b->n_seg; g++) {
        const kn_seg *seg = &segs[g];
        float *state = (float *)((uint8_t *)kn_host(seg->slot) + c->slot_state);
        for (uint32_t r = seg->n_row > span ? seg->n_row - span : 0; r < seg->n_row; r++) {
            uint64_t to = (seg->pos0 + r) % span * width, from = (seg->row0 + r) * width;
            memcpy(state + to, (const float *)kn_host(kv) + from, width * sizeof(float));
            memcpy(state + span * width + to, (const float *)kn_host(score) + from, width * sizeof(float));
        }
    }
}
