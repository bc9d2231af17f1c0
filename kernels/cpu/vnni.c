#include "kernels/cpu/vnni.h"

#include "common/base/assert.h"

/* ---- digits of the codes ---- */

/* In units of 2^-9; NaN as zero. */
#define MAGNITUDE(c)                                                                                         \
    (((c)&127) == 127 ? 0 : ((c)&127) < 8 ? ((c)&7) : (8 + ((c)&7)) << ((((c)&127) >> 3) - 1))
#define UNITS(c)   ((c) < 128 ? MAGNITUDE(c) : -MAGNITUDE(c))
#define REST(c)    (UNITS(c) % 8 == 0 ? 0 : UNITS(c))
#define EIGHTHS(c) ((UNITS(c) - REST(c)) / 8)
#define DIGIT1(c)  ((EIGHTHS(c) + 128 + (1 << 16)) / 256 - 256)
#define DIGIT0(c)  (EIGHTHS(c) - 256 * DIGIT1(c))
#define X4(f, c)   f(c), f((c) + 1), f((c) + 2), f((c) + 3)
#define X16(f, c)  X4(f, c), X4(f, (c) + 4), X4(f, (c) + 8), X4(f, (c) + 12)
#define X64(f, c)  X16(f, c), X16(f, (c) + 16), X16(f, (c) + 32), X16(f, (c) + 48)
#define X256(f)    X64(f, 0), X64(f, 64), X64(f, 128), X64(f, 192)

const vnni_digits KN_FN(kn_vnni_digits) = {
    .d1 = {X256(DIGIT1)},
    .d0 = {X256(DIGIT0)},
    .r = {X256(REST)},
};

/* ---- columns ---- */

/* v[i] dword j to v[j] dword i. */
static inline void transpose(__m512i v[16])
{
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) { /* a: of two rows, dwords 0 1 and 2 3 of each quarter, taken in turn */
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* b[i + j]: of four rows, dword j of each quarter */
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) { /* quarters q of b[j], b[4 + j], .. make column 4 q + j */
        __m512i even01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88),
                odd01 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        __m512i even23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88),
                odd23 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        v[j] = _mm512_shuffle_i32x4(even01, even23, 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
        v[4 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0x88);
        v[12 + j] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
    }
}

void KN_FN(kn_vnni_columns)(const vnni_rows *rows, uint32_t at, uint32_t n_bytes, __m512i columns_out[16])
{
    __m512i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        v[i] = vnni_load_row(rows->row[i], at, n_bytes);
    }
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        columns_out[i] = v[i];
    }
}

/* ---- NaN ---- */

static uint16_t poison_of(const uint8_t *codes, const uint8_t *scales, uint32_t k)
{
    const __m512i magnitude = _mm512_set1_epi8(127);
    for (uint32_t at = 0; at < k; at += 64) {
        __m512i v = vnni_load_row(codes, at, k);
        uint64_t nan = _mm512_cmpeq_epi8_mask(_mm512_and_si512(v, magnitude), magnitude);
        if (nan != 0) {
            return (uint16_t)(VNNI_NAN_CODE | (codes[at + (uint32_t)__builtin_ctzll(nan)] & 0x80) << 8);
        }
        if (scales[at / KN_ACT_BLOCK] == 255 && (at % KN_ACT_BLOCK == 64 || k - at <= 64)) {
            return VNNI_NAN_SCALE;
        }
    }
    return 0;
}

typedef struct poison_job {
    const cpu_q8_tile *tile;
    uint32_t k;
} poison_job;

static void poison_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const poison_job *j = arg;
    (void)i_thread;
    for (uint32_t r = begin; r < end; r++) {
        vnni_poison(j->tile)[r] = poison_of(j->tile->codes[r], j->tile->scales[r], j->k);
    }
}

/* ---- the path's products ---- */

void KN_FN(kn_vnni_put)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t o, vnni_sums *acc,
                        const uint16_t nan[VNNI_OUTS])
{
    uint32_t n_out = w->n_out - o < VNNI_OUTS ? w->n_out - o : VNNI_OUTS;
    __mmask16 there = (__mmask16)((1u << n_out) - 1);
    __m256i nans = _mm256_loadu_si256((const __m256i *)(const void *)nan);
    __mmask16 is_nan = _mm256_test_epi16_mask(nans, nans);
    for (uint32_t r = 0; r < t->n; r++) {
        const double *sum = acc[r / VNNI_GROUP][r % VNNI_GROUP];
        uint16_t poison = vnni_poison(t)[r];
        __m256i y = vnni_bf16_of(_mm512_loadu_pd(sum), _mm512_loadu_pd(sum + 8));
        y = _mm256_mask_mov_epi16(y, is_nan, nans);
        y = poison != 0 ? _mm256_set1_epi16((int16_t)poison) : y;
        _mm256_mask_storeu_epi16(t->y[r] + o, there, y);
    }
}

void KN_FN(kn_cpu_q8_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k, kn_dtype w)
{
    poison_job job = {.tile = tile, .k = k};
    kn_team_run(team, tile->n, k / 8, poison_part, &job);
    if (w == KN_E2M1) {
        KN_FN(kn_fp4_load)(team, tile, k);
    } else {
        KN_FN(kn_vnni_fp8_load)(team, tile, k);
    }
}

typedef struct product_job {
    const cpu_q8_tile *tile;
    const kn_matrix *w;
} product_job;

static void product_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const product_job *j = arg;
    (void)i_thread;
    if (j->w->dtype == KN_E2M1) {
        KN_FN(kn_fp4_part)(j->tile, j->w, begin, end);
    } else {
        KN_FN(kn_vnni_fp8_part)(j->tile, j->w, begin, end);
    }
}

void KN_FN(kn_cpu_q8_product)(kn_team *team, const cpu_q8_tile *tile, const kn_matrix *w)
{
    product_job job = {.tile = tile, .w = w};
    CM_ASSERT(w->dtype == KN_E4M3 || (w->dtype == KN_E2M1 && w->n_in % 2 == 0));
    kn_team_run(team, kn_blocks(w->n_out, w->dtype == KN_E2M1 ? FP4_OUTS : FP8_OUTS),
                (uint64_t)w->n_in * tile->n, product_part, &job);
}

/* ---- preparing ---- */

static uint64_t prepared_bytes(const kn_matrix *w)
{
    return w->dtype == KN_E2M1   ? KN_FN(kn_fp4_bytes)(w)
           : w->dtype == KN_E4M3 ? KN_FN(kn_vnni_fp8_bytes)(w)
                                 : 0;
}

static void prepare(const kn_matrix *w, void *out)
{
    if (w->dtype == KN_E2M1) {
        KN_FN(kn_fp4_prepare)(w, out);
    } else {
        KN_FN(kn_vnni_fp8_prepare)(w, out);
    }
}

const cpu_prepare_ops KN_FN(kn_cpu_prepare) = {.bytes = prepared_bytes, .prepare = prepare};
