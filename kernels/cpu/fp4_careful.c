#include "kernels/cpu/fp4_chunks.h"

/* Doubled weights of block b, and what a doubled one counts for, by output. */
typedef struct careful_block {
    float weights[KN_FP4_BLOCK][VNNI_OUTS];
    double scale[VNNI_OUTS];
} careful_block;

static void decode_block(const fp4_chunk *chunk, uint32_t k, uint32_t b, careful_block *out)
{
    const uint8_t *scales = (const uint8_t *)&chunk->scales[k];
    for (uint32_t i = 0; i < KN_FP4_BLOCK; i++) {
        const uint8_t *column = (const uint8_t *)&chunk->columns[b * FP4_BLOCK_STEPS + i / FP4_STEP][k];
        for (uint32_t o = 0; o < VNNI_OUTS; o++) {
            uint8_t pair = column[o * (FP4_STEP / 2) + i % FP4_STEP / 2];
            out->weights[i][o] = kn_e2m1_decode(i % 2 == 0 ? pair & 15 : pair >> 4);
        }
    }
    for (uint32_t o = 0; o < VNNI_OUTS; o++) {
        out->scale[o] = kn_e8m0_decode(scales[o * FP4_CHUNK_BLOCKS + b]);
    }
}

static void add_block(const careful_block *block, const uint8_t *codes, uint32_t n, double x_scale,
                      double *acc)
{
    double sum[VNNI_OUTS] = {0};
    for (uint32_t i = 0; i < n; i++) {
        double x = kn_e4m3_decode(codes[i]);
        for (uint32_t o = 0; o < VNNI_OUTS; o++) {
            sum[o] += x * block->weights[i][o];
        }
    }
    for (uint32_t o = 0; o < VNNI_OUTS; o++) {
        acc[vnni_sum_at(o)] += sum[o] * (x_scale * block->scale[o]);
    }
}

void KN_FN(kn_fp4_careful)(const cpu_q8_tile *t, const kn_matrix *w, uint32_t i_pair, uint32_t k,
                           uint32_t row0, uint32_t n, double (*acc)[VNNI_OUTS], uint16_t nan[VNNI_OUTS])
{
    memset(acc, 0, n * sizeof(acc[0]));
    for (uint32_t b = 0; b < kn_blocks(w->n_in, KN_FP4_BLOCK); b++) {
        uint32_t at = b * KN_FP4_BLOCK, len = w->n_in - at < KN_FP4_BLOCK ? w->n_in - at : KN_FP4_BLOCK;
        fp4_chunk buffer;
        const fp4_chunk *chunk = fp4_chunk_at(w, i_pair, b / FP4_CHUNK_BLOCKS, &buffer);
        careful_block block;
        fp4_find_nans(chunk->scales[k], nan);
        decode_block(chunk, k, b % FP4_CHUNK_BLOCKS, &block);
        for (uint32_t r = 0; r < n; r++) {
            add_block(&block, t->codes[row0 + r] + at, len,
                      kn_e8m0_decode(t->scales[row0 + r][at / KN_ACT_BLOCK]), acc[r]);
        }
    }
}
