/* E2M1 weights as the exact products over 512 bits read them: chunks of CPU_CHUNK inputs of FP4_OUTS outputs,
 * two tiles of 16, in the order in which they are used. A dword of a column is eight inputs of one output.
 * Prepared weights are such chunks, [pair of tiles][chunk]; stored ones are turned into them one at a time.
 */
#pragma once
#include "kernels/cpu/vnni.h"

enum {
    FP4_STEP = 8, /* inputs in a dword of weights: even ones low nibbles, odd ones high */
    FP4_BLOCK_STEPS = KN_FP4_BLOCK / FP4_STEP,
    FP4_CHUNK_BLOCKS = CPU_CHUNK / KN_FP4_BLOCK,
    FP4_CHUNK_BYTES = CPU_CHUNK / 2, /* of each row */
    FP4_UNIT_BITS = 10, /* sums count units of 2^-10: 2^-9 by the input, 2^-1 by the doubled weight */
};

/* Zero past the inputs; scales there are those of the last block, so that they do not widen the range of any.
 * Past the outputs the last one is repeated. */
typedef struct fp4_chunk {
    __m512i columns[FP4_CHUNK_BYTES / 4][FP4_TILES];
    __m512i scales[FP4_TILES]; /* [output][block of the chunk] */
} fp4_chunk;

/* Chunk c of the stored outputs o .. o + FP4_OUTS - 1. */
void KN_FN(kn_fp4_read_chunk)(const kn_matrix *w, uint32_t o, uint32_t c, fp4_chunk *chunk_out);

/* The chunk of a prepared pair of tiles, or a copy of a stored one's in buffer. */
static inline const fp4_chunk *fp4_chunk_at(const kn_matrix *w, uint32_t i_pair, uint32_t c,
                                            fp4_chunk *buffer)
{
    if (w->prepared) {
        return (const fp4_chunk *)kn_host(w->data) + (uint64_t)i_pair * kn_blocks(w->n_in, CPU_CHUNK) + c;
    }
    KN_FN(kn_fp4_read_chunk)(w, i_pair * FP4_OUTS, c, buffer);
    return buffer;
}

/* Notes outputs whose scales hold the byte of NaN. */
static inline void fp4_find_nans(__m512i scales, uint16_t nan[VNNI_OUTS])
{
    uint64_t found = _mm512_cmpeq_epi8_mask(scales, _mm512_set1_epi8(-1));
    for (; found != 0; found &= found - 1) {
        nan[__builtin_ctzll(found) / FP4_CHUNK_BLOCKS] = VNNI_NAN_SCALE;
    }
}

/* The scale bytes of block b % 4 where doubles have their exponents, for the outputs that unpacking the low
 * (0) or high (2) dwords of every four brings: 0 1 4 5 8 9 .. or 2 3 6 7 10 11 .. */
INLINED __m512i fp4_scale_exponents(__m512i scales, uint32_t b, int high)
{
    const __m512i byte = _mm512_set_epi64(52, 48, 36, 32, 20, 16, 4, 0);
    __m512i from = _mm512_add_epi64(byte, _mm512_set1_epi64(4 * high + (int)(b % 4)));
    __m512i byte6 = _mm512_maskz_permutexvar_epi8(0x4040404040404040, _mm512_slli_epi64(from, 48), scales);
    return _mm512_slli_epi64(byte6, 4);
}

/* The contract to the letter, for what a fast path cannot promise to be exact: sums of rows row0 .. row0 + n
 * - 1 and tile k of a pair, block after block in double. Bound: double multiply-adds, eight for each weight
 * and row in a 512-bit register. */
void KN_FN(kn_fp4_careful)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t i_pair, uint32_t k,
                           uint32_t row0, uint32_t n, double (*acc)[VNNI_OUTS], uint16_t nan[VNNI_OUTS]);
