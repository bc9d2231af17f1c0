/* Rows of a batch: rotation, stored forms, raw windows; and the table of the attention operations. */
#include "kernels/cpu/isa.h"

static void op_raw_commit(kn_stream *s, const kn_batch *b, const kn_attn *a, kn_ptr chunk_rows)
{
    const kn_seg *segs = kn_host(b->segs);
    uint64_t row_bytes = a->layout.row_bytes;
    (void)s;
    for (uint32_t g = 0; g < b->n_seg; g++) {
        const kn_seg *seg = &segs[g];
        uint8_t *raw = (uint8_t *)kn_host(seg->slot) + a->layout.slot_raw;
        for (uint32_t r = kn_raw_first(seg->n_row - 1, a->layout.ring); r < seg->n_row; r++) {
            memcpy(raw + (seg->pos0 + r) % a->layout.ring * row_bytes,
                   (const uint8_t *)kn_host(chunk_rows) + (seg->row0 + r) * row_bytes, row_bytes);
        }
    }
}

/* ---- rows of a batch ---- */

typedef struct rows_job {
    const uint16_t *x;
    uint16_t *x_inout;
    uint8_t *rows;
    const float *inv_freq;
    const uint32_t *pos;
    float *cs;
    uint32_t heads, dim, rope;
    bool inverse;
} rows_job;

static void rope_table_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const rows_job *j = arg;
    (void)i_thread;
    for (uint32_t r = begin; r < end; r++) {
        KN_FN(kn_cpu_angles)(j->inv_freq, j->rope / 2, j->pos[r], j->cs + (uint64_t)r * j->rope);
    }
}

static void op_rope_table(kn_stream *s, kn_ptr inv_freq, uint32_t half, kn_ptr pos, uint32_t n, kn_ptr cs_out)
{
    rows_job job = {
        .inv_freq = kn_host(inv_freq), .pos = kn_host(pos), .cs = kn_host(cs_out), .rope = 2 * half};
    kn_team_run(((cpu_stream *)s)->team, n, 100ull * half, rope_table_part, &job);
}

static void rope_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const rows_job *j = arg;
    (void)i_thread;
    for (uint64_t r = begin; r < end; r++) {
        for (uint32_t h = 0; h < j->heads; h++) {
            KN_FN(kn_cpu_rotate)
            (j->x_inout + (r * j->heads + h + 1) * j->dim - j->rope, j->rope / 2, j->cs + r * j->rope,
             j->inverse);
        }
    }
}

static void op_rope(kn_stream *s, kn_ptr x, uint32_t n, uint32_t heads, uint32_t dim, uint32_t half,
                    kn_ptr cs, bool inverse)
{
    rows_job job = {.x_inout = kn_host(x),
                    .cs = kn_host(cs),
                    .heads = heads,
                    .dim = dim,
                    .rope = 2 * half,
                    .inverse = inverse};
    kn_team_run(((cpu_stream *)s)->team, n, 8ull * heads * half, rope_part, &job);
}

static void kv_pack_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const rows_job *j = arg;
    (void)i_thread;
    for (uint64_t r = begin; r < end; r++) {
        KN_FN(kn_cpu_kv_pack)
        (j->x + r * j->dim, j->dim, j->rope, j->rows + r * kn_kv_row_bytes(j->dim, j->rope));
    }
}

static void op_kv_pack(kn_stream *s, kn_ptr kv, uint32_t n, uint32_t dim, uint32_t rope, kn_ptr rows_out)
{
    rows_job job = {.x = kn_host(kv), .rows = kn_host(rows_out), .dim = dim, .rope = rope};
    kn_team_run(((cpu_stream *)s)->team, n, 4ull * dim, kv_pack_part, &job);
}

static void index_pack_part(void *arg, uint32_t begin, uint32_t end, uint32_t i_thread)
{
    const rows_job *j = arg;
    (void)i_thread;
    for (uint64_t r = (uint64_t)begin * j->heads; r < (uint64_t)end * j->heads; r++) {
        KN_FN(kn_cpu_index_pack)(j->x + r * j->dim, j->dim, j->rows + r * kn_index_row_bytes(j->dim));
    }
}

static void op_index_pack(kn_stream *s, kn_ptr x, uint32_t n, uint32_t heads, uint32_t dim, kn_ptr rows_out)
{
    rows_job job = {.x = kn_host(x), .rows = kn_host(rows_out), .heads = heads, .dim = dim};
    kn_team_run(((cpu_stream *)s)->team, n, 10ull * heads * dim, index_pack_part, &job);
}

const kn_attn_ops KN_FN(kn_cpu_attn) = {
    .rope_table = op_rope_table,
    .rope = op_rope,
    .kv_pack = op_kv_pack,
    .index_pack = op_index_pack,
    .compress = KN_FN(kn_cpu_compress),
    .compress_commit = KN_FN(kn_cpu_compress_commit),
    .index_topk = KN_FN(kn_cpu_index_topk),
    .attention = KN_FN(kn_cpu_attention),
    .raw_commit = op_raw_commit,
};
