/* Products by lane sums in registers of 512 bits: weights are decoded into registers and used for all rows of
 * a tile at once. A lane keeps its order, element i after element i - 16; which outputs and rows are computed
 * together changes nothing.
 *
 * Bound: for a row or two the memory (BF16: two bytes for a multiply-add of eight that a core does twice a
 * cycle); from four rows on the multiply-adds. */
#include "common/base/assert.h"
#include "kernels/cpu/chunk.h"

enum {
    LANES_ROWS = 6,          /* most rows of a tile: their sums of two outputs fill the registers */
    LANES_TILES = 3,         /* with more tiles weights are decoded once for all (products_many512.c) */
    LANES_STEP = 512,        /* inputs for which the rows of a tile stay in the first cache */
    LANES_OUTS = 24,         /* outputs between two of these steps, at most, and */
    LANES_BYTES = 256 << 10, /* of weights that stay in the second cache while all tiles pass */
    LANES_HALF = KN_LANES / 2,
    LANES_AHEAD = 2048, /* bytes of a weight row that are asked for before they are needed */
};

typedef struct lanes_job {
    const cpu_tile *tiles;
    uint32_t n_tile;
    const kn_matrix *w;
    uint32_t out0, item;
} lanes_job;

typedef double lanes_sum[KN_LANES];

/* Inputs at .. at + n - 1, n a multiple of KN_LANES, of n_out outputs from `rows` and n_row rows from x into
 * sums. */
INLINED void add_inputs(const uint8_t *const *rows, const double *x, uint64_t stride, uint32_t n,
                        lanes_sum (*sums)[LANES_ROWS], const uint32_t item, const uint32_t n_out,
                        const uint32_t n_row)
{
    __m512d acc[2][CPU_OUTS][LANES_ROWS];
#pragma GCC unroll 32
    for (uint32_t i = 0; i < n_out * n_row; i++) {
        acc[0][i / n_row][i % n_row] = _mm512_loadu_pd(sums[i / n_row][i % n_row]);
        acc[1][i / n_row][i % n_row] = _mm512_loadu_pd(sums[i / n_row][i % n_row] + LANES_HALF);
    }
    for (uint32_t i = 0; i < n; i += KN_LANES) {
#pragma GCC unroll 2
        for (uint32_t half = 0; half < 2; half++) {
            __m512d w[CPU_OUTS];
            uint64_t at = i + half * LANES_HALF;
#pragma GCC unroll 4
            for (uint32_t j = 0; j < n_out; j++) {
                w[j] = decode_8(rows[j] + at * item, item);
            }
#pragma GCC unroll 8
            for (uint32_t r = 0; r < n_row; r++) {
                __m512d from = _mm512_loadu_pd(x + r * stride + at);
                __asm__("" : "+v"(from)); /* once for all outputs */
#pragma GCC unroll 4
                for (uint32_t j = 0; j < n_out; j++) {
                    acc[half][j][r] = _mm512_fmadd_pd(from, w[j], acc[half][j][r]);
                }
            }
        }
        for (uint32_t j = 0; j < n_out && i % (64 / item) == 0; j++) {
            _mm_prefetch((const char *)rows[j] + (uint64_t)i * item + LANES_AHEAD, _MM_HINT_T1);
        }
    }
#pragma GCC unroll 32
    for (uint32_t i = 0; i < n_out * n_row; i++) {
        _mm512_storeu_pd(sums[i / n_row][i % n_row], acc[0][i / n_row][i % n_row]);
        _mm512_storeu_pd(sums[i / n_row][i % n_row] + LANES_HALF, acc[1][i / n_row][i % n_row]);
    }
}

/* ---- by numbers of rows and outputs ---- */

typedef void (*add_fn)(const uint8_t *const *rows, const double *x, uint64_t stride, uint32_t n,
                       lanes_sum (*sums)[LANES_ROWS]);

#define ADD(item_, outs_, rows_)                                                                             \
    static void add_##item_##_##outs_##_##rows_(const uint8_t *const *rows, const double *x,                 \
                                                uint64_t stride, uint32_t n, lanes_sum(*sums)[LANES_ROWS])   \
    {                                                                                                        \
        add_inputs(rows, x, stride, n, sums, item_, outs_, rows_);                                           \
    }
#define ADD_ITEM(item_)                                                                                      \
    ADD(item_, 4, 1)                                                                                         \
    ADD(item_, 4, 2)                                                                                         \
    ADD(item_, 4, 3)                                                                                         \
    ADD(item_, 3, 4)                                                                                         \
    ADD(item_, 2, 5)                                                                                         \
    ADD(item_, 2, 6)                                                                                         \
    ADD(item_, 1, 1)                                                                                         \
    ADD(item_, 1, 2)                                                                                         \
    ADD(item_, 1, 3)                                                                                         \
    ADD(item_, 1, 4)                                                                                         \
    ADD(item_, 1, 5)                                                                                         \
    ADD(item_, 1, 6)
ADD_ITEM(2)
ADD_ITEM(4)

/* How many outputs go together, and their function; [rows - 1], for one output alone second. */
typedef struct lanes_way {
    uint32_t n_out;
    add_fn many, one;
} lanes_way;

#define WAYS(item_)                                                                                          \
    {                                                                                                        \
        {4, add_##item_##_4_1, add_##item_##_1_1}, {4, add_##item_##_4_2, add_##item_##_1_2},                \
            {4, add_##item_##_4_3, add_##item_##_1_3}, {3, add_##item_##_3_4, add_##item_##_1_4},            \
            {2, add_##item_##_2_5, add_##item_##_1_5}, {2, add_##item_##_2_6, add_##item_##_1_6},            \
    }
static const lanes_way LANES_WAYS[2][LANES_ROWS] = {WAYS(2), WAYS(4)};

/* Inputs begin .. end - 1 of n outputs from o on. The last ones of a row, if they are no whole KN_LANES, are
 * filled up with zeros, as the inputs of a tile are. */
static void add_piece(const lanes_job *job, const cpu_tile *t, uint32_t o, uint32_t n, uint32_t begin,
                      uint32_t end, lanes_sum (*sums)[LANES_ROWS])
{
    const lanes_way *way = &LANES_WAYS[job->item == 4][t->n - 1];
    add_fn add = n == way->n_out ? way->many : way->one;
    uint32_t whole = (end - begin) / KN_LANES * KN_LANES, rest = end - begin - whole;
    uint8_t spare[CPU_OUTS][KN_LANES * sizeof(float)] = {0};
    const uint8_t *rows[CPU_OUTS], *tails[CPU_OUTS];
    for (uint32_t j = 0; j < n; j++) {
        rows[j] = (const uint8_t *)kn_host(job->w->data) +
                  ((uint64_t)(job->out0 + o + j) * job->w->n_in + begin) * job->item;
        memcpy(spare[j], rows[j] + (uint64_t)whole * job->item, rest * job->item);
        tails[j] = spare[j];
    }
    add(rows, t->x + begin, t->stride, whole, sums);
    if (rest > 0) {
        add(tails, t->x + begin + whole, t->stride, KN_LANES, sums);
    }
}

static void lanes_outs(const lanes_job *job, const cpu_tile *t, uint32_t o, uint32_t n_out)
{
    uint32_t together = LANES_WAYS[0][t->n - 1].n_out, n_in = job->w->n_in, n;
    /* One row of weights after another is read fastest; many rows of inputs should be read only once. */
    uint32_t step = job->n_tile == 1 && t->n <= CPU_LANE_ROWS ? n_in : LANES_STEP;
    lanes_sum sums[LANES_OUTS][LANES_ROWS];
    memset(sums, 0, n_out * sizeof(sums[0]));
    for (uint32_t at = 0; at < n_in; at += step) {
        for (uint32_t i = 0; i < n_out; i += n) {
            n = n_out - i < together ? 1 : together;
            add_piece(job, t, o + i, n, at, n_in - at < step ? n_in : at + step, sums + i);
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
    const lanes_job *job = arg;
    uint32_t fit = LANES_BYTES / (job->w->n_in * job->item), most = fit < CPU_OUTS ? CPU_OUTS : fit;
    (void)i_thread;
    most = most > LANES_OUTS ? LANES_OUTS : most;
    for (uint32_t o = begin; o < end; o += most) {
        for (uint32_t i = 0; i < job->n_tile; i++) {
            lanes_outs(job, &job->tiles[i], o, end - o < most ? end - o : most);
        }
    }
}

/* Rows first .. first + n - 1 of a tile. */
static cpu_tile rows_of(const cpu_tile *t, uint32_t first, uint32_t n)
{
    cpu_tile part = {.x = t->x + first * t->stride, .stride = t->stride, .n = n};
    for (uint32_t r = 0; r < n; r++) {
        part.y[r] = t->y[first + r];
        part.y32[r] = t->y32[first + r];
        part.y64[r] = t->y64[first + r];
    }
    return part;
}

void KN_FN(kn_cpu_product_lanes512)(kn_team *team, const cpu_tile *tiles, uint32_t n_tile, const kn_matrix *w,
                                    uint32_t out0, uint32_t n_out)
{
    cpu_tile halves[2];
    lanes_job job = {
        .tiles = tiles, .n_tile = n_tile, .w = w, .out0 = out0, .item = w->dtype == KN_BF16 ? 2 : 4};
    uint64_t n_row = (uint64_t)n_tile * tiles[0].n;
    CM_ASSERT(w->dtype == KN_BF16 || w->dtype == KN_F32);
    if (n_tile > LANES_TILES) {
        KN_FN(kn_cpu_product_many512)(team, tiles, n_tile, w, out0, n_out);
        return;
    }
    if (tiles[0].n > LANES_ROWS) {
        CM_ASSERT(n_tile == 1);
        halves[0] = rows_of(tiles, 0, CPU_LANE_ROWS);
        halves[1] = rows_of(tiles, CPU_LANE_ROWS, tiles[0].n - CPU_LANE_ROWS);
        job.tiles = halves;
        job.n_tile = 2;
    }
    kn_team_run(team, n_out, w->n_in * n_row, lanes_part, &job);
}
