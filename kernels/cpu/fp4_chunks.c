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

static void read_chunks(const kn_matrix *w, uint32_t o, uint32_t c0, uint32_t n_chunk, fp4_chunk *chunks_out)
{
    uint32_t row_bytes = w->n_in / 2, n_block = kn_blocks(w->n_in, KN_FP4_BLOCK);
    vnni_rows codes = vnni_rows_at(kn_host(w->data), row_bytes, o, w->n_out);
    vnni_rows scales = vnni_rows_at(kn_host(w->scale), n_block, o, w->n_out);
    for (uint32_t c = c0; c < c0 + n_chunk; c++, chunks_out++) {
        KN_FN(kn_vnni_columns)(&codes, c * FP4_CHUNK_BYTES, row_bytes, chunks_out->columns);
        chunks_out->scales = scales_at(&scales, c * FP4_CHUNK_BLOCKS, n_block);
    }
}

const fp4_chunk *KN_FN(kn_fp4_chunks_at)(const kn_matrix *w, uint32_t i_tile, uint32_t c0, uint32_t n_chunk,
                                         fp4_chunk *buffer)
{
    if (w->prepared) {
        return (const fp4_chunk *)kn_host(w->data) + (uint64_t)i_tile * kn_blocks(w->n_in, CPU_CHUNK) + c0;
    }
    read_chunks(w, i_tile * VNNI_OUTS, c0, n_chunk, buffer);
    return buffer;
}

void KN_FN(kn_fp4_find_nans)(const fp4_chunk *chunks, uint32_t n_chunk, uint16_t nan[VNNI_OUTS])
{
    uint64_t found = 0;
    for (uint32_t c = 0; c < n_chunk; c++) {
        found |= _mm512_cmpeq_epi8_mask(chunks[c].scales, _mm512_set1_epi8(-1));
    }
    for (; found != 0; found &= found - 1) {
        nan[__builtin_ctzll(found) / FP4_CHUNK_BLOCKS] = VNNI_NAN_SCALE;
    }
}

/* ---- preparing ---- */

uint64_t KN_FN(kn_fp4_bytes)(const kn_matrix *w)
{
    return (uint64_t)kn_blocks(w->n_out, VNNI_OUTS) * kn_blocks(w->n_in, CPU_CHUNK) * sizeof(fp4_chunk);
}

void KN_FN(kn_fp4_prepare)(const kn_matrix *w, void *out)
{
    uint32_t n_chunk = kn_blocks(w->n_in, CPU_CHUNK);
    fp4_chunk *chunks = out;
    for (uint32_t o = 0; o < w->n_out; o += VNNI_OUTS, chunks += n_chunk) {
        read_chunks(w, o, 0, n_chunk, chunks);
    }
}
