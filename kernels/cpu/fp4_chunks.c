#include "kernels/cpu/fp4_chunks.h"

enum { FP4_AHEAD = 8 }; /* chunks */

/* ---- from the stored form ---- */

static __m512i scales_at(const vnni_rows *rows, uint32_t b0, uint32_t n_block)
{
    uint8_t bytes[VNNI_OUTS][FP4_CHUNK_BLOCKS];
    uint32_t n = n_block - b0 < FP4_CHUNK_BLOCKS ? n_block - b0 : FP4_CHUNK_BLOCKS;
    for (uint32_t i = 0; i < VNNI_OUTS; i++) {
        if (n == FP4_CHUNK_BLOCKS) {
            memcpy(bytes[i], rows->row[i] + b0, FP4_CHUNK_BLOCKS);
        } else {
            memset(bytes[i], rows->row[i][n_block - 1], FP4_CHUNK_BLOCKS);
            memcpy(bytes[i], rows->row[i] + b0, n);
        }
    }
    return _mm512_loadu_si512(bytes);
}

/* So many rows at once are more than the machine notices that it should read ahead. */
static void prefetch_rows(const vnni_rows *rows, uint32_t at)
{
    for (uint32_t i = 0; i < VNNI_OUTS; i++) {
        _mm_prefetch((const char *)rows->row[i] + at, _MM_HINT_T0);
    }
}

void KN_FN(kn_fp4_read_chunk)(const kn_matrix *w, uint32_t o, uint32_t c, fp4_chunk *chunk_out)
{
    uint32_t row_bytes = w->n_in / 2, n_block = kn_blocks(w->n_in, KN_FP4_BLOCK);
    for (uint32_t k = 0; k < FP4_TILES; k++, o += VNNI_OUTS) {
        vnni_rows codes = vnni_rows_at(kn_host(w->data), row_bytes, o, w->n_out);
        vnni_rows scales = vnni_rows_at(kn_host(w->scale), n_block, o, w->n_out);
        __m512i columns[FP4_CHUNK_BYTES / 4];
        prefetch_rows(&codes, (c + FP4_AHEAD) * FP4_CHUNK_BYTES);
        KN_FN(kn_vnni_columns)(&codes, c * FP4_CHUNK_BYTES, row_bytes, columns);
        for (uint32_t i = 0; i < FP4_CHUNK_BYTES / 4; i++) {
            chunk_out->columns[i][k] = columns[i];
        }
        chunk_out->scales[k] = scales_at(&scales, c * FP4_CHUNK_BLOCKS, n_block);
    }
}

/* ---- preparing ---- */

uint64_t KN_FN(kn_fp4_bytes)(const kn_matrix *w)
{
    return (uint64_t)kn_blocks(w->n_out, FP4_OUTS) * kn_blocks(w->n_in, CPU_CHUNK) * sizeof(fp4_chunk);
}

void KN_FN(kn_fp4_prepare)(const kn_matrix *w, void *out)
{
    fp4_chunk *chunk = out;
    for (uint32_t o = 0; o < w->n_out; o += FP4_OUTS) {
        for (uint32_t c = 0; c < kn_blocks(w->n_in, CPU_CHUNK); c++, chunk++) {
            KN_FN(kn_fp4_read_chunk)(w, o, c, chunk);
        }
    }
}
