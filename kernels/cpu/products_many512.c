/* Products by lane sums for many rows, in registers of 512 bits. The weights of a few outputs are decoded to
 * double once and meet all rows from the first cache. The 16 lanes of a sum are two registers that know
 * nothing of each other, so a pass takes one half of them: MANY_OUTS outputs and MANY_ROWS rows fill the
 * registers with sums, and ten loads serve 24 multiply-adds. A lane keeps its order, element i after element
 * i - 16; what is computed together changes nothing.
 *
 * Bound: the multiply-adds, eight lanes twice a cycle. */
#include "common/base/assert.h"
#include "kernels/cpu/chunk.h"

enum {
    MANY_ROWS = CPU_LANE_ROWS, /* rows and */
    MANY_OUTS = 6,             /* outputs whose half sums fill the registers */
    MANY_STEP = 512,           /* inputs for which half of the weights fills half of the first cache */
    MANY_GROUPS = 4,           /* MANY_OUTS that share one reading of the rows into the second */
    MANY_TILES = CPU_LANE_TILES,
    MANY_LINE = 64,
    HALF = KN_LANES / 2,
};

typedef struct many_job {
    const cpu_tile *tiles;
    uint32_t n_tile;
    const kn_matrix *w;
    uint32_t out0, item; /* bytes of a weight: 2 BF16, 4 F32 */
} many_job;

/* Weights of a pass: eight of every KN_LANES inputs. */
typedef double many_weights[MANY_STEP / KN_LANES][MANY_OUTS][HALF];
/* Sums of one tile. */
typedef double many_half[MANY_OUTS][MANY_ROWS][HALF];
typedef many_half many_sums[2];

/* ---- weights ---- */

/* One half of n weights becomes that of output j; the last KN_LANES are filled up with zeros. */
INLINED void decode_row(const uint8_t *row, uint32_t n, uint32_t half, many_weights out, uint32_t j,
                        const uint32_t item)
{
    uint32_t whole = n / KN_LANES, rest = n % KN_LANES, skip = half * HALF;
    const uint8_t *at = row + skip * item;
    for (uint32_t i = 0; i < whole; i++, at += KN_LANES * item) {
        _mm512_store_pd(out[i][j], decode_8(at, item));
    }
    if (rest > 0) {
        uint8_t spare[KN_LANES * sizeof(float)] = {0};
        memcpy(spare, row + (uint64_t)whole * KN_LANES * item, rest * item);
        _mm512_store_pd(out[whole][j], decode_8(spare + skip * item, item));
    }
}

/* The same inputs of the next outputs, wanted when all rows have met these. */
INLINED void ask_for_next(const many_job *job, const uint8_t *row, uint32_t n)
{
    const uint8_t *next = row + (uint64_t)MANY_OUTS * job->w->n_in * job->item;
    for (uint32_t i = 0; i < n * job->item; i += MANY_LINE) {
        _mm_prefetch((const char *)next + i, _MM_HINT_T1);
    }
}

/* Inputs at .. at + n - 1 of n_out outputs from o on; the last one stands for those that are not there. */
APART void decode_rows(const many_job *job, uint32_t o, uint32_t n_out, uint32_t at, uint32_t n,
                       uint32_t half, many_weights out)
{
    for (uint32_t j = 0; j < MANY_OUTS; j++) {
        uint64_t row = job->out0 + o + (j < n_out ? j : n_out - 1);
        const uint8_t *from = (const uint8_t *)kn_host(job->w->data) + (row * job->w->n_in + at) * job->item;
        if (half == 0) {
            ask_for_next(job, from, n);
        }
        if (job->item == 2) {
            decode_row(from, n, half, out, j, 2);
        } else {
            decode_row(from, n, half, out, j, 4);
        }
    }
}

/* ---- sums ---- */

/* Half of the lanes over n times KN_LANES inputs. Sums stay in registers only if their loops are unrolled
 * early.
 */
APART void add_inputs(const double *w, const double *x, uint64_t stride, uint32_t n, bool first,
                      many_half sums)
{
    __m512d acc[MANY_OUTS][MANY_ROWS];
#pragma GCC unroll 24
    for (uint32_t i = 0; i < MANY_OUTS * MANY_ROWS; i++) {
        acc[i / MANY_ROWS][i % MANY_ROWS] =
            first ? _mm512_setzero_pd() : _mm512_load_pd(sums[i / MANY_ROWS][i % MANY_ROWS]);
    }
    for (; n > 0; n--, w += MANY_OUTS * HALF, x += KN_LANES) {
        __m512d from[MANY_ROWS];
#pragma GCC unroll 4
        for (uint32_t r = 0; r < MANY_ROWS; r++) {
            from[r] = _mm512_load_pd(x + r * stride);
        }
#pragma GCC unroll 6
        for (uint32_t j = 0; j < MANY_OUTS; j++) {
            __m512d weight = _mm512_load_pd(w + j * HALF);
#pragma GCC unroll 4
            for (uint32_t r = 0; r < MANY_ROWS; r++) {
                acc[j][r] = _mm512_fmadd_pd(from[r], weight, acc[j][r]);
            }
        }
    }
#pragma GCC unroll 24
    for (uint32_t i = 0; i < MANY_OUTS * MANY_ROWS; i++) {
        _mm512_store_pd(sums[i / MANY_ROWS][i % MANY_ROWS], acc[i / MANY_ROWS][i % MANY_ROWS]);
    }
}

/* The contract's fold. Lanes l and l + 4 of a and b, then l and l + 2, then l and l + 1: in the end
 * eight sums, the first four in the even places. */
INLINED __m512d fold_4(__m512d a, __m512d b)
{
    return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x44), _mm512_shuffle_f64x2(a, b, 0xee));
}

INLINED __m512d fold_2(__m512d a, __m512d b)
{
    return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
}

INLINED __m512d fold_1(__m512d a, __m512d b)
{
    return _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
}

/* Lanes l and l + 8, then the others, of outputs j and j + 1. */
INLINED void fold_pair(many_sums sums, uint32_t j, double folded_out[MANY_ROWS][2])
{
    __m512d lane[2 * MANY_ROWS];
#pragma GCC unroll 8
    for (uint32_t i = 0; i < 2 * MANY_ROWS; i++) {
        uint32_t out = j + i / MANY_ROWS, r = i % MANY_ROWS;
        lane[i] = _mm512_add_pd(_mm512_load_pd(sums[0][out][r]), _mm512_load_pd(sums[1][out][r]));
    }
    _mm512_store_pd(folded_out[0], fold_1(fold_2(fold_4(lane[0], lane[1]), fold_4(lane[2], lane[3])),
                                          fold_2(fold_4(lane[4], lane[5]), fold_4(lane[6], lane[7]))));
}

static void put_sums(const cpu_tile *t, uint32_t o, uint32_t n_out, many_sums sums)
{
    _Alignas(64) double folded[MANY_OUTS / 2][MANY_ROWS][2];
    for (uint32_t j = 0; j < MANY_OUTS / 2; j++) {
        fold_pair(sums, 2 * j, folded[j]);
    }
    for (uint32_t r = 0; r < t->n; r++) {
        for (uint32_t j = 0; j < n_out; j++) {
            put_sum(t, r, o + j, folded[j / 2][r][j % 2]);
        }
    }
}

/* ---- the product ---- */

/* Inputs at .. at + n - 1 of n_out outputs from o on, n_out at most MANY_OUTS, for all rows. */
static void many_piece(const many_job *job, uint32_t o, uint32_t n_out, uint32_t at, uint32_t n,
                       many_weights weights, many_sums *sums)
{
    for (uint32_t half = 0; half < 2; half++) {
        decode_rows(job, o, n_out, at, n, half, weights);
        for (uint32_t i = 0; i < job->n_tile; i++) {
            const cpu_tile *t = &job->tiles[i];
            add_inputs(weights[0][0], t->x + at + half * HALF, t->stride, kn_blocks(n, KN_LANES), at == 0,
                       sums[i][half]);
        }
    }
    for (uint32_t i = 0; i < job->n_tile && at + n == job->w->n_in; i++) {
        put_sums(&job->tiles[i], o, n_out, sums[i]);
    }
}

static void many_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const many_job *job = arg;
    uint32_t n_in = job->w->n_in;
    _Alignas(64) many_weights weights;
    _Alignas(64) many_sums sums[MANY_GROUPS][MANY_TILES];
    (void)i_thread;
    for (uint32_t o = begin; o < end; o += MANY_GROUPS * MANY_OUTS) {
        for (uint32_t at = 0; at < n_in; at += MANY_STEP) {
            uint32_t n = n_in - at < MANY_STEP ? n_in - at : MANY_STEP;
            for (uint32_t g = 0; g < MANY_GROUPS && o + g * MANY_OUTS < end; g++) {
                uint32_t from = o + g * MANY_OUTS, n_out = end - from < MANY_OUTS ? end - from : MANY_OUTS;
                many_piece(job, from, n_out, at, n, weights, sums[n_in <= MANY_STEP ? 0 : g]);
            }
        }
    }
}

void KN_FN(kn_cpu_product_many512)(kn_team *team, const cpu_tile *tiles, uint32_t n_tile, const kn_matrix *w,
                                   uint32_t out0, uint32_t n_out)
{
    many_job job = {
        .tiles = tiles, .n_tile = n_tile, .w = w, .out0 = out0, .item = w->dtype == KN_BF16 ? 2 : 4};
    CM_ASSERT_MSG(n_tile <= MANY_TILES && tiles[0].n <= MANY_ROWS, "tiles %u of %u rows", n_tile, tiles[0].n);
    kn_team_run(team, n_out, (uint64_t)w->n_in * n_tile * MANY_ROWS, many_part, &job);
}
