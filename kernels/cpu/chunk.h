/* Weights a chunk at a time: what the files of products share. */
#pragma once
#include "kernels/cpu/isa.h"

/* Decoding is never inlined: one call per chunk is nothing, and what the compiler merges across it costs
 * more. */
#define APART static __attribute__((noinline))
/* With many rows the inputs come from a farther cache than the decoded weights, so they are read once for
 * CPU_OUTS outputs; with few the weights are the traffic, and one row of them after another is read fastest.
 * The order of every sum is the same. The number of outputs, or of rows, is a constant
 * in each copy of what is INLINED. */
#define INLINED static inline __attribute__((always_inline))

static inline uint32_t outs_at_once(uint32_t n_row, uint32_t n_left)
{
    return n_row < CPU_TILE / 2 || n_left < CPU_OUTS ? 1 : CPU_OUTS;
}

/* Bytes of a chunk, from the matrix or, for a short last chunk, from a copy filled up with zeros. */
static inline const void *chunk_bytes(const void *row, uint32_t at_byte, uint32_t n_valid, uint32_t n_bytes,
                                      uint8_t *spare)
{
    const uint8_t *from = (const uint8_t *)row + at_byte;
    if (n_valid == n_bytes) {
        return from;
    }
    memset(spare, 0, n_bytes);
    memcpy(spare, from, n_valid);
    return spare;
}

static inline uint32_t chunk_len(uint32_t k, uint32_t at)
{
    return k - at < CPU_CHUNK ? k - at : CPU_CHUNK;
}

static inline double e4m3_scale(const kn_matrix *w, uint32_t o, uint32_t block)
{
    uint64_t at = (uint64_t)(o / KN_ACT_BLOCK) * kn_blocks(w->n_in, KN_ACT_BLOCK) + block;
    return w->scale_dtype == KN_F32 ? kn_f32_at(kn_host(w->scale), at)
                                    : kn_e8m0_decode(((const uint8_t *)kn_host(w->scale))[at]);
}

/* The sum of output o, counted from the first that is wanted, and row r. */
static inline void put_sum(const cpu_tile *t, uint32_t r, uint32_t o, double sum)
{
    if (t->y[r] != NULL) {
        t->y[r][o] = kn_bf16_from_f64(sum);
    } else if (t->y32[r] != NULL) {
        t->y32[r][o] = (float)sum;
    } else {
        t->y64[r][o] = sum;
    }
}

#if defined(__AVX512F__)
/* Eight weights of `item` bytes: 2 BF16, 4 F32. */
INLINED __m512d decode_8(const uint8_t *at, const uint32_t item)
{
    if (item == 2) {
        __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)at));
        return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16)));
    }
    return _mm512_cvtps_pd(_mm256_loadu_ps((const float *)(const void *)at));
}
#endif
