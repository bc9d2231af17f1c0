/* Quantized products in exact integers, for CPUs that have 256-bit integers and no 8-bit dot products: what
 * the files of these paths share.
 *
 * An E4M3 value is an integer x in units of 2^-9 with |x| <= 229376, and a multiple of 8 unless |x| < 64. So
 *     x = 8 v + r,   v of 16 bits, |v| <= 28672, and r a signed byte, zero but for few small values;
 * what r adds is computed input by input, only where there are any.
 *
 * A lane is an output: weights stand in columns of dwords, 16 outputs side by side in two registers, a dword
 * of inputs is broadcast, and nothing is ever summed across lanes. */
#pragma once
#include <immintrin.h>

#include "kernels/cpu/chunk.h"

enum {
    AVX2_OUTS = 16, /* outputs of a tile */
    AVX2_HALF = 8,  /* of them in a register */
    AVX2_GROUP = 4, /* rows multiplied together */
};

/* What is left of a NaN in bf16, by where it came from; a code's sign is added. */
enum { AVX2_NAN_CODE = 0x7ff0, AVX2_NAN_SCALE = 0x7fc0 };

/* The scratch of a tile begins with what each row gives that holds a NaN, 0 if it has none; the rest is the
 * format's. */
enum { AVX2_HEAD_BYTES = 2 * CPU_Q8_ROWS };
static inline uint16_t *avx2_poison(const cpu_q8_tile *t)
{
    return t->x;
}

/* Sums of one row. */
typedef double avx2_sums[AVX2_OUTS];

/* An E4M3 code in units of 2^-9; NaN as zero. */
static inline int32_t avx2_units(uint8_t code)
{
    int32_t exponent = code >> 3 & 15, m = code & 7;
    int32_t units = exponent == 0 ? m : (8 + m) << (exponent - 1);
    units = (code & 127) == 127 ? 0 : units;
    return (code & 128) != 0 ? -units : units;
}

/* Four bytes at x in every lane. */
INLINED __m256i avx2_broadcast(const void *x)
{
    int32_t dword;
    memcpy(&dword, x, 4);
    return _mm256_set1_epi32(dword);
}

/* acc + x, in this order and no other: the compiler would gather additions, and run out of registers. */
INLINED __m256i avx2_plus16(__m256i acc, __m256i x)
{
    acc = _mm256_add_epi16(acc, x);
    __asm__("" : "+x"(acc));
    return acc;
}

INLINED __m256i avx2_plus32(__m256i acc, __m256i x)
{
    acc = _mm256_add_epi32(acc, x);
    __asm__("" : "+x"(acc));
    return acc;
}

/* Bytes at .. at + 31 of a row that ends before n; zeros from there on. */
static inline __m256i avx2_load_row(const uint8_t *row, uint32_t at, uint32_t n)
{
    uint8_t bytes[32] = {0};
    if (at + 32 <= n) {
        return _mm256_loadu_si256((const __m256i *)(const void *)(row + at));
    }
    if (at < n) {
        memcpy(bytes, row + at, n - at);
    }
    return _mm256_loadu_si256((const __m256i *)(const void *)bytes);
}

/* The rows of a tile of outputs; past the matrix the last row stands in. */
typedef struct avx2_rows {
    const uint8_t *row[AVX2_OUTS];
} avx2_rows;

static inline avx2_rows avx2_rows_at(const void *data, uint64_t row_bytes, uint32_t o, uint32_t n_out)
{
    avx2_rows rows;
    for (uint32_t i = 0; i < AVX2_OUTS; i++) {
        rows.row[i] = (const uint8_t *)data + (o + i < n_out ? o + i : n_out - 1) * row_bytes;
    }
    return rows;
}

/* columns_out[j] = dword j of the 32 bytes at `at` of each row, zeros past n_bytes, the length of a row. */
void KN_FN(kn_avx2_columns)(const avx2_rows *rows, uint32_t at, uint32_t n_bytes, __m256i (*columns_out)[2]);

/* Rounds the sums of row r into outputs o .. o + 15. A row with a NaN code or scale gives the first one it
 * holds; otherwise nan[i], unless 0, is what output o + i is. */
void KN_FN(kn_avx2_put)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t o, uint32_t r, const double *sums,
                        const uint16_t nan[AVX2_OUTS]);

/* The files of one weight format each; outputs in tiles begin .. end - 1. */
void KN_FN(kn_avx2_fp4_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k);
void KN_FN(kn_avx2_fp4_part)(const cpu_q8_tile *tile, const kn_matrix *w, uint32_t begin, uint32_t end);
void KN_FN(kn_avx2_fp8_load)(kn_team *team, const cpu_q8_tile *tile, uint32_t k);
void KN_FN(kn_avx2_fp8_part)(const cpu_q8_tile *tile, const kn_matrix *w, uint32_t begin, uint32_t end);
/* The stored matrix in the order of the products, into that many bytes. */
uint64_t KN_FN(kn_avx2_fp4_bytes)(const kn_matrix *w);
void KN_FN(kn_avx2_fp4_prepare)(const kn_matrix *w, void *out);
uint64_t KN_FN(kn_avx2_fp8_bytes)(const kn_matrix *w);
void KN_FN(kn_avx2_fp8_prepare)(const kn_matrix *w, void *out);
