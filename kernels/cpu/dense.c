#include <assert.h>
#include <math.h>

#include "common/base/assert.h"
#include "kernels/cpu/chunk.h"
#include "kernels/cpu/wide.h"

static kn_team *team_of(kn_stream *s)
{
    return ((cpu_stream *)s)->team;
}

/* ---- products ---- */

static void op_linear_q8(kn_stream *s, kn_q8 x, const kn_matrix *w, uint32_t n, kn_ptr y_out)
{
    cpu_stream *c = (cpu_stream *)s;
    uint32_t k = w->n_in, n_scale = kn_blocks(k, KN_ACT_BLOCK);
    CM_ASSERT_MSG(k <= c->limits.n_in, "n_in %u limit %u", k, c->limits.n_in);
    for (uint32_t r0 = 0; r0 < n; r0 += CPU_Q8_ROWS) {
        cpu_q8_tile tile = {.x = c->x_tile, .n = n - r0 < CPU_Q8_ROWS ? n - r0 : CPU_Q8_ROWS};
        for (uint32_t r = 0; r < tile.n; r++) {
            uint64_t row = r0 + r;
            tile.codes[r] = (const uint8_t *)kn_host(x.codes) + row * k;
            tile.scales[r] = (const uint8_t *)kn_host(x.scales) + row * n_scale;
            tile.y[r] = (uint16_t *)kn_host(y_out) + row * w->n_out;
        }
        KN_FN(kn_cpu_q8_load)(c->team, &tile, k, w->dtype);
        KN_FN(kn_cpu_q8_product)(c->team, &tile, w);
    }
}

/* A cache line more than the inputs, so that the same ones of several rows do not meet in one set. */
static uint32_t bf16_stride(uint32_t k)
{
    return cpu_round_up(k, CPU_CHUNK) + 8;
}

/* Rows row0 .. row0 + n - 1 of x, n at most CPU_TILE, into scratch, and where their outputs go. */
static cpu_tile bf16_tile(const uint16_t *x, const kn_matrix *w, uint32_t row0, uint32_t n, kn_dtype y_dtype,
                          void *y_out, double *scratch)
{
    uint32_t k = w->n_in, stride = bf16_stride(k);
    cpu_tile tile = {.x = scratch, .stride = stride, .n = n};
    for (uint32_t r = 0; r < n; r++) {
        uint64_t row = row0 + r;
        KN_FN(kn_cpu_widen_bf16)(x + row * k, k, scratch + (uint64_t)r * stride);
        if (y_dtype == KN_F32) {
            tile.y32[r] = (float *)y_out + row * w->n_out;
        } else {
            tile.y[r] = (uint16_t *)y_out + row * w->n_out;
        }
    }
    return tile;
}

static void op_linear_bf16(kn_stream *s, kn_ptr x, const kn_matrix *w, uint32_t n, kn_dtype y_dtype,
                           kn_ptr y_out)
{
    cpu_stream *c = (cpu_stream *)s;
    uint64_t stride = bf16_stride(w->n_in);
    uint32_t rows = n > CPU_TILE ? CPU_LANE_ROWS : CPU_TILE;
    static_assert(CPU_LANE_TILES * CPU_LANE_ROWS * (CPU_CHUNK + 8) * sizeof(double) <=
                      CPU_X_BYTES * CPU_CHUNK,
                  "scratch");
    CM_ASSERT_MSG(w->n_in <= c->limits.n_in, "n_in %u limit %u", w->n_in, c->limits.n_in);
    for (uint32_t r0 = 0; r0 < n;) {
        cpu_tile tiles[CPU_LANE_TILES];
        uint32_t n_tile = 0;
        for (; n_tile < CPU_LANE_TILES && r0 < n; n_tile++, r0 += rows) {
            tiles[n_tile] = bf16_tile(kn_host(x), w, r0, n - r0 < rows ? n - r0 : rows, y_dtype,
                                      kn_host(y_out), (double *)c->x_tile + n_tile * rows * stride);
        }
#if defined(__AVX512F__)
        KN_FN(kn_cpu_product_lanes512)(c->team, tiles, n_tile, w, 0, w->n_out);
#else
        KN_FN(kn_cpu_product_lanes)(c->team, tiles, w, 0, w->n_out);
#endif
    }
}

static void op_linear_grouped(kn_stream *s, kn_ptr x, const kn_matrix *w, uint32_t groups, uint32_t n,
                              kn_ptr y_out)
{
    cpu_stream *c = (cpu_stream *)s;
    uint32_t k = w->n_in, per_group = w->n_out / groups;
    CM_ASSERT_MSG(k <= c->limits.n_in, "n_in %u limit %u", k, c->limits.n_in);
    for (uint32_t g = 0; g < groups; g++) {
        cpu_rows rows = {.x = (const uint16_t *)kn_host(x) + (uint64_t)g * k,
                         .y = (uint16_t *)kn_host(y_out) + (uint64_t)g * per_group,
                         .x_stride = (uint64_t)groups * k,
                         .y_stride = w->n_out,
                         .n = n,
                         .out0 = g * per_group,
                         .n_out = per_group};
        KN_FN(kn_cpu_scaled_product)(c->team, c->x_tile, &rows, w);
    }
}

/* ---- rows ---- */

static void op_embed(kn_stream *s, const kn_matrix *table, kn_ptr ids_in, uint32_t n, uint32_t hc,
                     kn_ptr x_out)
{
    const uint32_t *ids = kn_host(ids_in);
    uint64_t d = table->n_in;
    (void)s;
    for (uint32_t r = 0; r < n; r++) {
        CM_ASSERT_MSG(ids[r] < table->n_out, "token %u of %u", ids[r], table->n_out);
        for (uint32_t j = 0; j < hc; j++) {
            memcpy((uint16_t *)kn_host(x_out) + ((uint64_t)r * hc + j) * d,
                   (const uint8_t *)kn_host(table->data) + ids[r] * d * sizeof(uint16_t),
                   d * sizeof(uint16_t));
        }
    }
}

static void op_add_streams(kn_stream *s, kn_ptr e_in, uint32_t n, uint32_t hc, uint32_t d, kn_ptr x_io)
{
    (void)s;
    for (uint64_t r = 0; r < n; r++) {
        const uint16_t *e = (const uint16_t *)kn_host(e_in) + r * d;
        uint16_t *x = (uint16_t *)kn_host(x_io) + r * hc * d;
        for (uint64_t i = 0; i < (uint64_t)hc * d; i++) {
            x[i] = kn_bf16_from_f64((double)kn_bf16_decode(e[i % d]) + (double)kn_bf16_decode(x[i]));
        }
    }
}

typedef struct norm_job {
    const uint16_t *x, *w;
    uint16_t *y;
    uint32_t d;
    float eps;
} norm_job;

static void norm_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const norm_job *j = arg;
    (void)i_thread;
    for (uint64_t r = begin; r < end; r++) {
        KN_FN(kn_cpu_rmsnorm)(j->x + r * j->d, j->w, j->d, j->eps, j->y + r * j->d);
    }
}

static void op_rmsnorm(kn_stream *s, kn_ptr x, kn_ptr w, uint32_t n, uint32_t d, float eps, kn_ptr y_out)
{
    norm_job job = {.x = kn_host(x), .w = kn_host(w), .y = kn_host(y_out), .d = d, .eps = eps};
    kn_team_run(team_of(s), n, 2ull * d, norm_part, &job);
}

typedef struct quant_job {
    const uint16_t *x;
    uint8_t *codes, *scales;
    uint32_t k;
} quant_job;

static void quant_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const quant_job *j = arg;
    (void)i_thread;
    for (uint64_t r = begin; r < end; r++) {
        KN_FN(kn_cpu_quant_fp8)
        (j->x + r * j->k, j->k, KN_ACT_BLOCK, j->codes + r * j->k,
         j->scales + r * kn_blocks(j->k, KN_ACT_BLOCK));
    }
}

static void op_quant_act(kn_stream *s, kn_ptr x, uint32_t n, uint32_t k, kn_q8 q_out)
{
    quant_job job = {.x = kn_host(x), .codes = kn_host(q_out.codes), .scales = kn_host(q_out.scales), .k = k};
    kn_team_run(team_of(s), n, k, quant_part, &job);
}

typedef struct argmax_job {
    const float *logits;
    uint32_t *ids;
    uint32_t vocab;
} argmax_job;

static uint32_t argmax_row(const float *row, uint32_t n)
{
    float lane[KN_LANES], top;
    uint32_t whole = n / KN_LANES * KN_LANES;
    for (int l = 0; l < KN_LANES; l++) {
        lane[l] = row[0];
    }
    for (uint32_t i = 0; i < whole; i += KN_LANES) {
        for (int l = 0; l < KN_LANES; l++) {
            float v = row[i + (uint32_t)l];
            lane[l] = v > lane[l] ? v : lane[l];
        }
    }
    top = lane[0];
    for (int l = 1; l < KN_LANES; l++) {
        top = lane[l] > top ? lane[l] : top;
    }
    for (uint32_t i = whole; i < n; i++) {
        top = row[i] > top ? row[i] : top;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (row[i] == top) {
            return i;
        }
    }
    return 0; /* row[0] is NaN */
}

static void argmax_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const argmax_job *j = arg;
    (void)i_thread;
    for (uint64_t r = begin; r < end; r++) {
        j->ids[r] = argmax_row(j->logits + r * j->vocab, j->vocab);
    }
}

static void op_argmax(kn_stream *s, kn_ptr logits, uint32_t n, uint32_t vocab, kn_ptr ids_out)
{
    argmax_job job = {.logits = kn_host(logits), .ids = kn_host(ids_out), .vocab = vocab};
    kn_team_run(team_of(s), n, vocab, argmax_part, &job);
}

/* ---- hyper-connections ---- */

/* Work on a row that has no sums over it is cut in pieces, so that a team shares even one row. */
enum { HC_PIECE = 1024 };

/* Rows that share one reading of the mixing weights, when there are many, and of what tiles they consist. */
#if defined(__AVX512F__)
enum { HC_ROWS = 32, HC_TILE = CPU_LANE_ROWS };
#else
enum { HC_ROWS = CPU_TILE, HC_TILE = CPU_TILE };
#endif

typedef struct hc_job {
    const kn_hc *p;
    const double *wide; /* [rows][stride], the values of the streams */
    uint64_t stride;
    kn_hc_mixes mix[HC_ROWS];
    float pre[HC_ROWS][KN_HC_MAX];
    uint32_t n_row, n_mix;
    uint16_t *x_out;
    float *post, *comb; /* both NULL: the head's variant */
} hc_job;

/* Values at .. at + n - 1 of row r. The weights were float32 and the values bf16, so products are exact. */
static void collapse_values(const hc_job *job, uint32_t r, uint32_t at, uint32_t n, uint16_t *x_out)
{
    const double *x = job->wide + r * job->stride + at;
    uint32_t hc = job->p->hc, d = job->p->d, i = 0;
    for (; i + KN_WIDE <= n; i += KN_WIDE) {
        kn_wide sum = {0};
        for (uint32_t j = 0; j < hc; j++) {
            kn_vd weight = kn_vd_all(job->pre[r][j]);
            for (int h = 0; h < 2; h++) {
                kn_vd v = kn_vd_load(x + (uint64_t)j * d + i + (uint32_t)h * KN_VD_WIDTH);
                sum.half[h] = kn_vd_add_exact_product(weight, v, sum.half[h]);
            }
        }
        kn_wide_to_bf16(sum, x_out + i);
    }
    for (; i < n; i++) {
        double sum = 0;
        for (uint32_t j = 0; j < hc; j++) {
            sum += (double)job->pre[r][j] * x[(uint64_t)j * d + i];
        }
        x_out[i] = kn_bf16_from_f64(sum);
    }
}

/* x = bf16(sum_j pre[j] X[j]), piece i % pieces of row i / pieces. */
static void collapse_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const hc_job *job = arg;
    uint32_t d = job->p->d, n_piece = kn_blocks(d, HC_PIECE);
    (void)i_thread;
    for (uint32_t item = begin; item < end; item++) {
        uint32_t r = item / n_piece, from = item % n_piece * HC_PIECE;
        collapse_values(job, r, from, d - from < HC_PIECE ? d - from : HC_PIECE,
                        job->x_out + (uint64_t)r * d + from);
    }
}

/* Multiplies the mixes of row r by 1 / rms. */
static void scale_mixes(hc_job *j, uint32_t r)
{
    uint32_t width = j->p->hc * j->p->d;
    const double *wide = j->wide + r * j->stride;
    double lane[KN_LANES] = {0}, s;
    kn_lanes_add(lane, wide, wide, cpu_round_up(width, CPU_CHUNK));
    s = 1.0 / sqrt(kn_fold_lanes(lane) / width + j->p->norm_eps);
    for (uint32_t k = 0; k < j->n_mix; k++) {
        j->mix[r][k] *= s;
    }
}

static void row_coefficients(hc_job *j, uint32_t r)
{
    const float *base = kn_host(j->p->base), *scale = kn_host(j->p->scale);
    uint32_t hc = j->p->hc;
    if (j->post == NULL) {
        kn_hc_head_coefficients(j->mix[r], base, scale, hc, j->p->hc_eps, j->pre[r]);
    } else {
        kn_hc_coefficients(j->mix[r], base, scale, hc, j->p->sinkhorn_iters, j->p->hc_eps, j->pre[r],
                           j->post + (uint64_t)r * hc, j->comb + (uint64_t)r * hc * hc);
    }
}

/* KN_VD_WIDTH rows are an item, the last perhaps of fewer. */
static void coefficients_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    hc_job *j = arg;
    uint32_t hc = j->p->hc;
    (void)i_thread;
    for (uint32_t item = begin; item < end; item++) {
        uint32_t r0 = item * KN_VD_WIDTH, n = j->n_row - r0 < KN_VD_WIDTH ? j->n_row - r0 : KN_VD_WIDTH;
        for (uint32_t r = r0; r < r0 + n; r++) {
            scale_mixes(j, r);
        }
        if (n == KN_VD_WIDTH && j->post != NULL) {
            KN_FN(kn_cpu_hc_coefficients)
            (j->p, j->mix + r0, j->pre + r0, j->post + (uint64_t)r0 * hc, j->comb + (uint64_t)r0 * hc * hc);
            continue;
        }
        for (uint32_t r = r0; r < r0 + n; r++) {
            row_coefficients(j, r);
        }
    }
}

/* The job's rows from x on, widened into scratch, and their products with the mixing weights. */
static void mix_rows(cpu_stream *c, hc_job *job, const uint16_t *x, uint32_t rows)
{
    uint32_t width = job->p->hc * job->p->d, n_tile = kn_blocks(job->n_row, rows);
    kn_matrix fn = {.data = job->p->fn, .n_out = job->n_mix, .n_in = width, .dtype = KN_F32};
    cpu_tile tiles[HC_ROWS / HC_TILE];
    for (uint32_t i = 0; i < n_tile; i++) {
        uint32_t r0 = i * rows;
        double *wide = (double *)c->x_tile + r0 * job->stride;
        tiles[i] = (cpu_tile){
            .x = wide, .stride = job->stride, .n = job->n_row - r0 < rows ? job->n_row - r0 : rows};
        for (uint32_t r = 0; r < tiles[i].n; r++) {
            KN_FN(kn_cpu_widen_bf16)(x + (uint64_t)(r0 + r) * width, width, wide + r * job->stride);
            tiles[i].y64[r] = job->mix[r0 + r];
        }
    }
#if defined(__AVX512F__)
    KN_FN(kn_cpu_product_lanes512)(c->team, tiles, n_tile, &fn, 0, job->n_mix);
#else
    KN_FN(kn_cpu_product_lanes)(c->team, tiles, &fn, 0, job->n_mix);
#endif
}

/* post and comb NULL: the head's variant. */
static void hc_run(cpu_stream *c, const kn_hc *p, const uint16_t *x, uint32_t n, uint32_t n_mix,
                   uint16_t *x_out, float *post, float *comb)
{
    uint32_t width = p->hc * p->d, rows = n > CPU_TILE ? HC_TILE : CPU_TILE;
    CM_ASSERT_MSG(p->hc <= KN_HC_MAX && width <= c->limits.n_in, "hc %u width %u limit %u", p->hc, width,
                  c->limits.n_in);
    for (uint32_t r0 = 0; r0 < n; r0 += HC_ROWS) {
        hc_job job = {.p = p,
                      .wide = c->x_tile,
                      .stride = bf16_stride(width),
                      .n_row = n - r0 < HC_ROWS ? n - r0 : HC_ROWS,
                      .n_mix = n_mix,
                      .x_out = x_out + (uint64_t)r0 * p->d,
                      .post = post != NULL ? post + (uint64_t)r0 * p->hc : NULL,
                      .comb = comb != NULL ? comb + (uint64_t)r0 * p->hc * p->hc : NULL};
        mix_rows(c, &job, x + (uint64_t)r0 * width, rows);
        kn_team_run(c->team, kn_blocks(job.n_row, KN_VD_WIDTH), 3ull * width * KN_VD_WIDTH, coefficients_part,
                    &job);
        kn_team_run(c->team, job.n_row * kn_blocks(p->d, HC_PIECE), (uint64_t)HC_PIECE * p->hc, collapse_part,
                    &job);
    }
}

static void op_hc_pre(kn_stream *s, const kn_hc *p, kn_ptr x, uint32_t n, kn_ptr x_out, kn_ptr post_out,
                      kn_ptr comb_out)
{
    hc_run((cpu_stream *)s, p, kn_host(x), n, (2 + p->hc) * p->hc, kn_host(x_out), kn_host(post_out),
           kn_host(comb_out));
}

static void op_hc_head(kn_stream *s, const kn_hc *p, kn_ptr x, uint32_t n, kn_ptr x_out)
{
    hc_run((cpu_stream *)s, p, kn_host(x), n, p->hc, kn_host(x_out), NULL, NULL);
}

typedef struct hc_post_job {
    const uint16_t *x, *y;
    const float *post, *comb;
    uint16_t *out;
    uint32_t d, hc;
} hc_post_job;

/* Of one row: post[k], then comb[..][k]. */
typedef double post_weights[KN_HC_MAX][1 + KN_HC_MAX];

/* Values at .. at + KN_WIDE - 1 of all streams of row r. Weights were float32 and values bf16, so products
 * are exact. All streams are read before one is written: out may be x. */
INLINED void post_wide(const hc_post_job *j, post_weights weights, uint64_t r, uint32_t at, const uint32_t hc)
{
    kn_wide y = kn_wide_from_bf16(j->y + r * j->d + at), from[KN_HC_MAX];
    for (uint32_t m = 0; m < hc; m++) {
        from[m] = kn_wide_from_bf16(j->x + (r * hc + m) * j->d + at);
    }
    for (uint32_t k = 0; k < hc; k++) {
        kn_wide sum = {{y.half[0] * weights[k][0], y.half[1] * weights[k][0]}};
        for (uint32_t m = 0; m < hc; m++) {
            kn_vd weight = kn_vd_all(weights[k][1 + m]);
            sum.half[0] = kn_vd_add_exact_product(weight, from[m].half[0], sum.half[0]);
            sum.half[1] = kn_vd_add_exact_product(weight, from[m].half[1], sum.half[1]);
        }
        kn_wide_to_bf16(sum, j->out + (r * hc + k) * j->d + at);
    }
}

static void post_value(const hc_post_job *j, post_weights weights, uint64_t r, uint32_t at)
{
    double from[KN_HC_MAX], y = kn_bf16_decode(j->y[r * j->d + at]);
    for (uint32_t m = 0; m < j->hc; m++) {
        from[m] = kn_bf16_decode(j->x[(r * j->hc + m) * j->d + at]);
    }
    for (uint32_t k = 0; k < j->hc; k++) {
        double sum = y * weights[k][0];
        for (uint32_t m = 0; m < j->hc; m++) {
            sum += weights[k][1 + m] * from[m];
        }
        j->out[(r * j->hc + k) * j->d + at] = kn_bf16_from_f64(sum);
    }
}

/* Values at .. to - 1 of row r. */
static void post_values(const hc_post_job *j, uint64_t r, uint32_t at, uint32_t to)
{
    uint32_t hc = j->hc;
    post_weights weights;
    for (uint32_t k = 0; k < hc; k++) {
        weights[k][0] = j->post[r * hc + k];
        for (uint32_t m = 0; m < hc; m++) {
            weights[k][1 + m] = j->comb[(r * hc + m) * hc + k];
        }
    }
    for (; hc == 4 && at + KN_WIDE <= to; at += KN_WIDE) { /* the released models': streams in registers */
        post_wide(j, weights, r, at, 4);
    }
    for (; at + KN_WIDE <= to; at += KN_WIDE) {
        post_wide(j, weights, r, at, hc);
    }
    for (; at < to; at++) {
        post_value(j, weights, r, at);
    }
}

/* Piece i % pieces of row i / pieces. */
static void hc_post_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const hc_post_job *j = arg;
    uint32_t n_piece = kn_blocks(j->d, HC_PIECE);
    (void)i_thread;
    for (uint32_t item = begin; item < end; item++) {
        uint32_t from = item % n_piece * HC_PIECE;
        post_values(j, item / n_piece, from, j->d - from < HC_PIECE ? j->d : from + HC_PIECE);
    }
}

static void op_hc_post(kn_stream *s, uint32_t d, uint32_t hc, kn_ptr y, kn_ptr x, kn_ptr post, kn_ptr comb,
                       uint32_t n, kn_ptr x_out)
{
    hc_post_job job = {.x = kn_host(x),
                       .y = kn_host(y),
                       .post = kn_host(post),
                       .comb = kn_host(comb),
                       .out = kn_host(x_out),
                       .d = d,
                       .hc = hc};
    CM_ASSERT(hc <= KN_HC_MAX);
    kn_team_run(team_of(s), n * kn_blocks(d, HC_PIECE), (uint64_t)HC_PIECE * hc * hc, hc_post_part, &job);
}

const kn_dense_ops KN_FN(kn_cpu_dense) = {
    .embed = op_embed,
    .add_streams = op_add_streams,
    .hc_pre = op_hc_pre,
    .hc_post = op_hc_post,
    .hc_head = op_hc_head,
    .rmsnorm = op_rmsnorm,
    .quant_act = op_quant_act,
    .linear_q8 = op_linear_q8,
    .linear_bf16 = op_linear_bf16,
    .linear_grouped = op_linear_grouped,
    .argmax = op_argmax,
};
