/* Products by lane sums in registers of 256 bits: weights are decoded into registers and used for a few rows
 * of a tile at once. A lane keeps its order, element i after element i - 16; which outputs and rows are
 * computed together changes nothing.
 *
 * Bound: for a row or two the conversions to double, near the read bandwidth (BF16); from four rows on the
 * multiply-adds, one for each four weights and row. */
#include "common/base/assert.h"
#include "kernels/cpu/chunk.h"

enum {
    LANES_ROWS = 3,     /* whose sums fit the registers */
    LANES_STEP = 512,   /* inputs for which the rows of a tile stay in the first cache */
    LANES_OUTS = 32,    /* outputs between two of these steps */
    LANES_AHEAD = 2048, /* bytes of a weight row that are asked for before they are needed */
    LANES_VECTORS = KN_LANES / 4,
};

typedef struct lanes_job {
    const cpu_tile *tile;
    const kn_matrix *w;
    uint32_t out0, item;
} lanes_job;

/* 16 weights; the first `item` bytes of one say what it is: 2 BF16, 4 F32. */
INLINED void decode_16(const uint8_t *at, const uint32_t item, __m256d w_out[LANES_VECTORS])
{
    if (item == 2) { /* behind 16 zero bits a BF16 is a float */
        __m256i w = _mm256_loadu_si256((const __m256i *)(const void *)at), zero = _mm256_setzero_si256();
        __m256 even = _mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, w)),
               odd = _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, w));
        w_out[0] = _mm256_cvtps_pd(_mm256_castps256_ps128(even));
        w_out[1] = _mm256_cvtps_pd(_mm256_castps256_ps128(odd));
        w_out[2] = _mm256_cvtps_pd(_mm256_extractf128_ps(even, 1));
        w_out[3] = _mm256_cvtps_pd(_mm256_extractf128_ps(odd, 1));
        return;
    }
    for (uint32_t v = 0; v < LANES_VECTORS; v++) {
        w_out[v] = _mm256_cvtps_pd(_mm_loadu_ps((const float *)(const void *)(at + v * 16)));
    }
}

typedef double lanes_sum[KN_LANES];

/* Inputs 0 .. n - 1, n a multiple of KN_LANES, of n_out outputs from `rows` and n_row rows from x into
 * sums [n_out][CPU_TILE]. */
INLINED void add_inputs(const uint8_t *const *rows, const double *x, uint64_t stride, uint32_t n,
                        lanes_sum (*sums)[CPU_TILE], const uint32_t item, const uint32_t n_out,
                        const uint32_t n_row)
{
    __m256d acc[2][LANES_ROWS][LANES_VECTORS];
    for (uint32_t k = 0; k < n_out * n_row * LANES_VECTORS; k++) {
        uint32_t j = k / LANES_VECTORS / n_row, r = k / LANES_VECTORS % n_row, v = k % LANES_VECTORS;
        acc[j][r][v] = _mm256_loadu_pd(sums[j][r] + 4 * v);
    }
    for (uint32_t i = 0; i < n; i += KN_LANES) {
        for (uint32_t j = 0; j < n_out; j++) {
            __m256d w[LANES_VECTORS];
            decode_16(rows[j] + (uint64_t)i * item, item, w);
            for (uint32_t r = 0; r < n_row; r++) {
                for (uint32_t v = 0; v < LANES_VECTORS; v++) {
                    acc[j][r][v] =
                        _mm256_fmadd_pd(_mm256_loadu_pd(x + r * stride + i + 4 * v), w[v], acc[j][r][v]);
                }
            }
            if (i % (64 / item) == 0) {
                _mm_prefetch((const char *)rows[j] + (uint64_t)i * item + LANES_AHEAD, _MM_HINT_T0);
            }
        }
    }
    for (uint32_t k = 0; k < n_out * n_row * LANES_VECTORS; k++) {
        uint32_t j = k / LANES_VECTORS / n_row, r = k / LANES_VECTORS % n_row, v = k % LANES_VECTORS;
        _mm256_storeu_pd(sums[j][r] + 4 * v, acc[j][r][v]);
    }
}

/* ---- by numbers of rows and outputs ---- */

typedef void (*add_fn)(const uint8_t *const *rows, const double *x, uint64_t stride, uint32_t n,
                       lanes_sum (*sums)[CPU_TILE]);

#define ADD(item_, outs_, rows_)                                                                             \
    static void add_##item_##_##outs_##_##rows_(const uint8_t *const *rows, const double *x,                 \
                                                uint64_t stride, uint32_t n, lanes_sum(*sums)[CPU_TILE])     \
    {                                                                                                        \
        add_inputs(rows, x, stride, n, sums, item_, outs_, rows_);                                           \
    }
#define ADD_ITEM(item_) ADD(item_, 2, 1) ADD(item_, 1, 1) ADD(item_, 1, 2) ADD(item_, 1, 3)
ADD_ITEM(2)
ADD_ITEM(4)

/* One output and 1 .. LANES_ROWS rows; two outputs and one row. */
typedef struct lanes_ways {
    add_fn one[LANES_ROWS], two;
} lanes_ways;
static const lanes_ways WAYS_2 = {{add_2_1_1, add_2_1_2, add_2_1_3}, add_2_2_1},
                        WAYS_4 = {{add_4_1_1, add_4_1_2, add_4_1_3}, add_4_2_1};

/* The rows of the tile, a few at a time. */
static void add_rows(const lanes_job *job, const uint8_t *const *rows, const double *x, uint32_t n,
                     lanes_sum (*sums)[CPU_TILE], uint32_t n_out)
{
    const lanes_ways *ways = job->item == 2 ? &WAYS_2 : &WAYS_4;
    const cpu_tile *t = job->tile;
    if (n_out == 2) {
        ways->two(rows, x, t->stride, n, sums);
        return;
    }
    for (uint32_t r = 0; r < t->n; r += LANES_ROWS) {
        uint32_t n_row = t->n - r < LANES_ROWS ? t->n - r : LANES_ROWS;
        ways->one[n_row - 1](rows, x + r * t->stride, t->stride, n, (lanes_sum(*)[CPU_TILE])(sums[0] + r));
    }
}

/* Inputs begin .. end - 1 of n outputs from o on. The last ones of a row, if they are no whole KN_LANES, are
 * filled up with zeros, as the inputs of a tile are. */
static void add_piece(const lanes_job *job, uint32_t o, uint32_t n, uint32_t begin, uint32_t end,
                      lanes_sum (*sums)[CPU_TILE])
{
    uint32_t whole = (end - begin) / KN_LANES * KN_LANES, rest = end - begin - whole;
    uint8_t spare[2][KN_LANES * sizeof(float)] = {0};
    const uint8_t *rows[2], *tails[2];
    for (uint32_t j = 0; j < n; j++) {
        rows[j] = (const uint8_t *)kn_host(job->w->data) +
                  ((uint64_t)(job->out0 + o + j) * job->w->n_in + begin) * job->item;
        memcpy(spare[j], rows[j] + (uint64_t)whole * job->item, rest * job->item);
        tails[j] = spare[j];
    }
    add_rows(job, rows, job->tile->x + begin, whole, sums, n);
    if (rest > 0) {
        add_rows(job, tails, job->tile->x + begin + whole, KN_LANES, sums, n);
    }
}

static void lanes_outs(const lanes_job *job, uint32_t o, uint32_t n_out)
{
    const cpu_tile *t = job->tile;
    uint32_t n_in = job->w->n_in, n;
    /* One row of weights after another is read fastest; many rows of inputs should be read only once. */
    uint32_t step = t->n <= LANES_ROWS ? n_in : LANES_STEP;
    lanes_sum sums[LANES_OUTS][CPU_TILE];
    memset(sums, 0, n_out * sizeof(sums[0]));
    for (uint32_t at = 0; at < n_in; at += step) {
        for (uint32_t i = 0; i < n_out; i += n) {
            n = t->n == 1 && n_out - i >= 2 ? 2 : 1;
            add_piece(job, o + i, n, at, n_in - at < step ? n_in : at + step, sums + i);
        }
    }
    for (uint32_t r = 0; r < t->n; r++) {
        for (uint32_t i = 0; i < n_out; i++) {
            put_sum(t, r, o + i, kn_fold_lanes(sums[i][r]));
        }
    }
}

static void lanes_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    (void)i_thread;
    for (uint32_t o = begin; o < end; o += LANES_OUTS) {
        lanes_outs(arg, o, end - o < LANES_OUTS ? end - o : LANES_OUTS);
    }
}

void KN_FN(kn_cpu_product_lanes256)(kn_team *team, const cpu_tile *tile, const kn_matrix *w, uint32_t out0,
                                    uint32_t n_out)
{
    lanes_job job = {.tile = tile, .w = w, .out0 = out0, .item = w->dtype == KN_BF16 ? 2 : 4};
    CM_ASSERT(w->dtype == KN_BF16 || w->dtype == KN_F32);
    kn_team_run(team, n_out, (uint64_t)w->n_in * tile->n, lanes_part, &job);
}
