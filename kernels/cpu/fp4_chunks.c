#include "kernels/cpu/fp4_chunks.h"

/* ---- from the stored form ---- */

static __m512i scales_at(const vnni_rows *rows, uint32_t b0, uint32_t n_block)
{
    uint8_t bytes[VNNI_OUTS][FP4_CHUNK_BLOCKS];
    for (uint32_t i = 0; i < VNNI_OUTS; i++) {
        for (uint32_t b = 0; b < FP4_CHUNK_BLOCKS; b++) {
            bytes[i][b] = rows->row[i][b0 + b < n_block ? b0 + b : n_block - 1];
        }
    }
    return _mm512_loadu_si512(bytes);
}

void KN_FN(kn_fp4_read_chunk)(const kn_matrix *w, uint32_t o, uint32_t c, fp4_chunk *chunk_out)
{
    uint32_t row_bytes = w->n_in / 2, n_block = kn_blocks(w->n_in, KN_FP4_BLOCK);
    for (uint32_t k = 0; k < FP4_TILES; k++, o += VNNI_OUTS) {
        vnni_rows codes = vnni_rows_at(kn_host(w->data), row_bytes, o, w->n_out);
        vnni_rows scales = vnni_rows_at(kn_host(w->scale), n_block, o, w->n_out);
        __m512i columns[FP4_CHUNK_BYTES / 4];
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
