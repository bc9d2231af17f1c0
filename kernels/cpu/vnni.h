/* Quantized products in exact integers, for CPUs with 8-bit dot products (VNNI) and byte permutation (VBMI)
 * over 512 bits: what the files of this path share.
 *
 * An E4M3 value is an integer x in units of 2^-9 with |x| <= 229376, and a multiple of 8 unless |x| < 64. So
 *     x = 8 (256 d1 + d0) + r,   d1, d0 and r signed bytes, r zero but for few small values,
 * and two products of bytes do what three would; the third is computed only where a block has an r.
 *
 * Weights are read where they stand: pieces of 16 rows are transposed into columns of dwords, so that a lane
 * is an output, one dword of digits multiplies all 16, and nothing is ever summed across lanes. */
#pragma once
#include <immintrin.h>

#include "kernels/cpu/chunk.h"

enum {
    VNNI_OUTS = 16, /* outputs of a tile: lanes of a vector */
    VNNI_GROUP = 8, /* rows multiplied together */
    VNNI_GROUPS_MAX = CPU_Q8_ROWS / VNNI_GROUP,
    VNNI_TILES = 4, /* tiles that share one reading of many rows of input */
    FP4_TILES = 2,  /* of E2M1 weights that stand side by side */
    FP4_OUTS = FP4_TILES * VNNI_OUTS,
    FP8_TILES = 2, /* of E4M3 weights that are multiplied together */
    FP8_OUTS = FP8_TILES * VNNI_OUTS,
};

/* What is left of a NaN in bf16, by where it came from; a code's sign is added. */
enum { VNNI_NAN_CODE = 0x7ff0, VNNI_NAN_SCALE = 0x7fc0 };

/* Digits of all codes. NaN has zeros: its rows are overwritten (vnni_put). */
typedef struct vnni_digits {
    int8_t d1[256], d0[256], r[256];
} vnni_digits;
extern const vnni_digits KN_FN(kn_vnni_digits);

/* The scratch of a tile begins with what each row gives that holds a NaN, 0 if it has none; the rest is the
 * format's. */
enum { VNNI_HEAD_BYTES = 2 * CPU_Q8_ROWS };
static inline uint16_t *vnni_poison(const cpu_q8_tile *t)
{
    return t->x;
}

static inline __m512i vnni_look_up(const int8_t *table, __m512i codes)
{
    __m512i plus = _mm512_permutex2var_epi8(_mm512_loadu_si512(table), codes, _mm512_loadu_si512(table + 64));
    __m512i minus =
        _mm512_permutex2var_epi8(_mm512_loadu_si512(table + 128), codes, _mm512_loadu_si512(table + 192));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), plus, minus);
}

/* Bytes at .. at + 63 of a row that ends before n; zeros from there on. */
static inline __m512i vnni_load_row(const uint8_t *row, uint32_t at, uint32_t n)
{
    uint32_t left = n - at;
    return _mm512_maskz_loadu_epi8(left >= 64 ? ~0ull : (1ull << left) - 1, row + at);
}

/* Sum of the eight dwords of each half. */
static inline int32_t vnni_half_sum(__m512i v, int half)
{
    return _mm512_mask_reduce_add_epi32(half == 0 ? 0x00ff : 0xff00, v);
}

/* The rows of a tile of outputs; past the matrix the last row stands in. */
typedef struct vnni_rows {
    const uint8_t *row[VNNI_OUTS];
} vnni_rows;

static inline vnni_rows vnni_rows_at(const void *data, uint64_t row_bytes, uint32_t o, uint32_t n_out)
{
    vnni_rows rows;
    for (uint32_t i = 0; i < VNNI_OUTS; i++) {
        rows.row[i] = (const uint8_t *)data + (o + i < n_out ? o + i : n_out - 1) * row_bytes;
    }
    return rows;
}

/* columns_out[j] = dword j of the 64 bytes at `at` of each row, zeros past n_bytes, the length of a row. */
void KN_FN(kn_vnni_columns)(const vnni_rows *rows, uint32_t at, uint32_t n_bytes, __m512i columns_out[16]);

/* Sums of one group and one tile of outputs, in the order 0 1 4 5 8 9 12 13 2 3 6 7 10 11 14 15. */
typedef double vnni_sums[VNNI_GROUP][VNNI_OUTS];
static inline uint32_t vnni_sum_at(uint32_t output)
{
    return output % 4 / 2 * 8 + output / 4 * 2 + output % 2;
}

/* Such sums as bf16, in the order of their outputs, each rounded as kn_bf16_from_f64 does. */
static inline __m256i vnni_bf16_of(__m512d first, __m512d second)
{
    const __m512i in_turn = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0); /* pairs of floats */
    __m512 x = _mm512_castpd_ps(
        _mm512_permutex2var_pd(_mm512_castps_pd(_mm512_castps256_ps512(_mm512_cvtpd_ps(first))), in_turn,
                               _mm512_castps_pd(_mm512_castps256_ps512(_mm512_cvtpd_ps(second)))));
    __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    __m512i up = _mm512_add_epi32(_mm512_set1_epi32(0x7fff), _mm512_and_si512(high, _mm512_set1_epi32(1)));
    __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, high, _mm512_set1_epi32(0x40)));
}

/* Rounds the sums of all groups into outputs o .. o + 15. A row with a NaN code or scale gives the first one
 * it holds; otherwise nan[i], unless 0, is what output o + i is. */
void KN_FN(kn_vnni_put)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t o, vnni_sums *acc,
                        const uint16_t nan[VNNI_OUTS]);

/* The files of one weight format each. x: the tile's scratch; outputs in pairs of
 * tiles begin .. end - 1. */
void KN_FN(kn_fp4_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k);
void KN_FN(kn_fp4_part)(const cpu_q8_tile *tile, const kn_matrix *w, uint32_t begin, uint32_t end);
void KN_FN(kn_vnni_fp8_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k);
void KN_FN(kn_vnni_fp8_part)(const cpu_q8_tile *tile, const kn_matrix *w, uint32_t begin, uint32_t end);
/* The stored matrix in the order of the products, into that many bytes. */
uint64_t KN_FN(kn_fp4_bytes)(const kn_matrix *w);
void KN_FN(kn_fp4_prepare)(const kn_matrix *w, void *out);
uint64_t KN_FN(kn_vnni_fp8_bytes)(const kn_matrix *w);
void KN_FN(kn_vnni_fp8_prepare)(const kn_matrix *w, void *out);
