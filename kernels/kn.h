/* Kernels: one opaque device, one function per operation. The engine (router, worker) sees only this header;
 * which back-end answers (ref, cpu, later a CUDA module) is chosen once at start.
 *
 * Numerics (class D of the model's NUMERICS: double inside an operation, rounded once on the way out). Every
 * CPU back-end gives the same bits as ref, for any number of rows and threads, because each operation fixes
 * its order of summation by the tensor's shape alone:
 *   - a quantized product (linear_q8, experts, the dot products of index_topk): exact sums inside a scale
 * block (128 inputs for E4M3, 32 for E2M1), then acc += block_sum * (scale_x * scale_w) in double, blocks
 * ascending;
 *   - every other dot product or sum over a vector ("lane sum"): KN_LANES interleaved double accumulators,
 * element i into lane i % KN_LANES, i ascending; then lane[l] += lane[l + s] for s = 8, 4, 2, 1;
 *   - attention: scores by lane sums, maximum, exp, denominator by a lane sum over the keys in key order plus
 * the sink, weighted values added key by key; key order is raw rows by position, then compressed rows by
 * index;
 *   - a compressor's pooling: per dim, terms in position order one by one; hc sums over streams likewise;
 * Hadamard by butterflies;
 *   - exp, log1p, sin and cos are our own (kn_math.h): libm differs in the last bit from one CPU to another.
 * Products are never fused with sums (-ffp-contract=off), except where the product is exact in double anyway.
 *
 * Memory: kn_ptr is an address in the device's memory and never a host pointer. Operations are queued on a
 * stream and may run later; what they read and write must live until kn_stream_sync. Operations cannot fail
 * by themselves: wrong shapes are our bug (assertion), a device error is kept by the stream and returned by
 * kn_stream_sync. Thread: a stream belongs to one thread; a device may be shared by the streams of one
 * thread. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"

enum {
    KN_VERSION = 1,
    KN_LANES = 16,
    KN_ACT_BLOCK = 128,   /* inputs per activation scale, and edge of an E4M3 weight scale block */
    KN_FP4_BLOCK = 32,    /* inputs per E2M1 weight scale */
    KN_KV_BLOCK = 64,     /* dims per scale of a stored KV row */
    KN_PAGE_TOKENS = 128, /* source tokens of one KV page */
};

typedef struct kn_device kn_device;
typedef struct kn_stream kn_stream;
typedef struct kn_ptr {
    uint64_t addr; /* 0 = none */
} kn_ptr;

static inline kn_ptr kn_at(kn_ptr base, uint64_t offset_bytes)
{
    return (kn_ptr){base.addr + offset_bytes};
}

typedef enum kn_dtype { KN_NONE, KN_F32, KN_BF16, KN_E4M3, KN_E2M1, KN_E8M0, KN_I64 } kn_dtype;

/* A weight matrix [n_out][n_in] as it stands in the checkpoint, row-major; y = x W^T.
 *   KN_E4M3: one byte a value, scale [ceil(n_out/128)][ceil(n_in/128)] of scale_dtype E8M0 or F32
 *   KN_E2M1: two values a byte, low nibble first, scale [n_out][ceil(n_in/32)] E8M0
 *   KN_BF16, KN_F32: no scale
 * data and scale may stand at any address; every other tensor is aligned to its elements. */
typedef struct kn_matrix {
    kn_ptr data, scale;
    uint32_t n_out, n_in;
    kn_dtype dtype, scale_dtype;
    bool prepared; /* data is a copy in the device's own order (kn_prepare) */
} kn_matrix;

/* Rows quantized as NUMERICS "activation quantization": codes E4M3 [n][k], scales E8M0 bytes
 * [n][ceil(k/128)]. */
typedef struct kn_q8 {
    kn_ptr codes, scales;
} kn_q8;

static inline uint32_t kn_blocks(uint32_t n, uint32_t block)
{
    return n / block + (n % block != 0);
}

/* ---- devices and streams ---- */

typedef struct kn_device_options {
    const char *backend; /* "cpu" (default), "ref" */
    const char *isa;     /* cpu: "auto", or one of what kn_device_isa can say; forces a path */
    uint32_t n_threads;  /* cpu: size of the team, >= 1; the caller's thread is one of them */
    const char
        *numa_node; /* cpu: as kn_numa_open (kernels/numa.h); NULL: memory and threads are left alone */
} kn_device_options;

/* The largest shapes that will ever be asked of a stream: scratch is taken once, at kn_stream_open. */
typedef struct kn_limits {
    uint32_t n_row;   /* rows of a batch */
    uint32_t n_in;    /* widest input of any product, and hc * d */
    uint32_t n_inner; /* widest expert inner size */
    uint32_t n_head, head_dim;
    uint32_t n_key;       /* most keys one query attends: window + max(topk, compressed rows) */
    uint32_t n_index_row; /* most rows one indexer query scores; 0 without indexer */
    uint32_t n_expert;    /* most experts of one gate */
} kn_limits;

/* CM_E_CONFIG: unknown backend, isa or NUMA node, or one this machine lacks (err lists what there is). */
CM_MUST_CHECK cm_status kn_device_open(const kn_device_options *options, kn_device **device_out,
                                       cm_error *err);
void kn_device_close(kn_device *device);
const char *kn_device_name(const kn_device *device); /* "cpu", "ref" */
const char *kn_device_isa(
    const kn_device *device); /* path in use: one of kn_cpu_isa_at, or of ref "portable" */
/* Path names this build has and this machine can run, best last; NULL past the end. For tests of every path.
 */
const char *kn_cpu_isa_at(uint32_t i);

CM_MUST_CHECK cm_status kn_stream_open(kn_device *device, const kn_limits *limits, kn_stream **stream_out);
void kn_stream_close(kn_stream *stream);
/* Waits until all that was queued is done. CM_E_DEVICE: an operation failed; the stream is of no more use. */
CM_MUST_CHECK cm_status kn_stream_sync(kn_stream *stream);

/* ---- memory ---- */

/* 64-byte aligned, zeroed. CM_E_MEMORY when the device has no more. */
CM_MUST_CHECK cm_status kn_mem_alloc(kn_device *device, uint64_t n_bytes, kn_ptr *ptr_out);
void kn_mem_free(kn_device *device, kn_ptr ptr);
/* Makes host bytes (a mapping of the checkpoint, kept by the caller until close) readable by the device. The
 * cpu and ref back-ends use them where they are. */
CM_MUST_CHECK cm_status kn_mem_place(kn_device *device, const void *host, uint64_t n_bytes, kn_ptr *ptr_out);
/* Some devices read quantized weights faster in an order of their own. Bytes that such a copy of *w takes: 0
 * when w is best as it stands, else about the size of the stored form, a multiple of 64. */
uint64_t kn_prepared_bytes(const kn_device *device, const kn_matrix *w);
/* Writes the copy to `at`, 64-byte aligned memory of kn_mem_alloc that the caller keeps as long as it uses
 * *w, and makes *w stand for it: the values are the same, and every bit of linear_q8 and experts, the
 * operations that take it. Stored data and E2M1 scales are not read any more; E4M3 scales are. Done on
 * return; any thread. */
void kn_prepare(kn_device *device, kn_matrix *w, kn_ptr at);
/* Host view of device memory: NULL when the device's memory cannot be reached from the host. */
void *kn_mem_host(kn_device *device, kn_ptr ptr);
void kn_copy_to_device(kn_stream *stream, kn_ptr to, const void *from, uint64_t n_bytes);
void kn_copy_to_host(kn_stream *stream, void *to, kn_ptr from, uint64_t n_bytes); /* valid after sync */
void kn_copy(kn_stream *stream, kn_ptr to, kn_ptr from, uint64_t n_bytes);        /* they do not overlap */

/* ---- the batch of one step ----
 * Rows of all sequences stand one after another; a segment is one sequence's rows. */
typedef struct kn_seg {
    uint32_t row0, n_row; /* rows row0 .. row0 + n_row - 1 */
    uint32_t pos0;        /* position of the first of them; the others follow */
    uint32_t page0;       /* where its page list starts in kn_batch.pages */
    kn_ptr slot;          /* its fixed state: raw windows and compressor states of all layers */
} kn_seg;

typedef struct kn_batch {
    kn_ptr segs;      /* kn_seg [n_seg] */
    kn_ptr pages;     /* uint32 [n_page]: page numbers; entry page0 + i covers tokens 128 i .. 128 i + 127 */
    kn_ptr pos;       /* uint32 [n_row]: position of each row */
    kn_ptr page_pool; /* page p is at page_pool + p * page_bytes */
    uint64_t page_bytes;
    uint32_t n_seg, n_row;
} kn_batch;

/* Where a layer keeps what inside a page and inside a sequence's slot; all offsets in bytes. */
typedef struct kn_kv_layout {
    uint32_t ratio;                 /* 0, 4 or 128: source tokens per compressed row (0: none) */
    uint32_t ring;                  /* raw rows kept in the slot; at least the window */
    uint32_t row_bytes;             /* a stored KV row, kn_kv_row_bytes */
    uint32_t index_bytes;           /* a stored indexer key, kn_index_row_bytes; 0 without indexer */
    uint64_t page_rows;             /* in the page: [128/ratio] KV rows */
    uint64_t page_index;            /* in the page: [128/ratio] indexer keys */
    uint64_t slot_raw;              /* in the slot: [ring] KV rows, position p at p % ring */
    uint64_t slot_main, slot_index; /* in the slot: compressor states, kn_compress_state_bytes each */
} kn_kv_layout;

/* A stored KV row: (dim - rope) E4M3 codes, rope BF16 values, one E8M0 scale per 64 codes, padded to 8 bytes.
 */
static inline uint32_t kn_kv_row_bytes(uint32_t dim, uint32_t rope)
{
    uint32_t nope = dim - rope;
    return (nope + 2 * rope + kn_blocks(nope, KN_KV_BLOCK) + 7) / 8 * 8;
}

/* A stored indexer row (query head or key): dim/2 bytes of E2M1 pairs, low nibble first, then one E8M0
 * per 32. */
static inline uint32_t kn_index_row_bytes(uint32_t dim)
{
    return dim / 2 + kn_blocks(dim, KN_FP4_BLOCK);
}

/* Compressor state: two arrays float [span][width], kv then score; the entry of position p stands at p %
 * span. ratio 4 overlaps: the last 8 positions are read, width 2 * dim; any other ratio: the last ratio
 * positions, width = dim.
 *
 * Taking rows back (speculation): rows that were committed and turn out wrong need no undoing. The next batch
 * starts at the first wrong position and writes over them: rings, spans and page rows are addressed by
 * position, and nothing at or beyond a row's own position is ever read for it. All it takes is `ahead` spare
 * entries in ring and span, where at most `ahead` rows are taken back at once, so that wrong rows have not
 * driven out right ones. */
static inline uint32_t kn_compress_span(uint32_t ratio, uint32_t ahead)
{
    return (ratio == 4 ? 8 : ratio) + ahead;
}
static inline uint32_t kn_compress_width(uint32_t ratio, uint32_t dim)
{
    return ratio == 4 ? 2 * dim : dim;
}
/* Where a window of `ratio` positions ends, the state's entries of the last kn_compress_overlap positions are
 * all that is read again. */
static inline uint32_t kn_compress_overlap(uint32_t ratio)
{
    return ratio == 4 ? 4 : 0;
}
static inline uint64_t kn_compress_overlap_bytes(uint32_t ratio, uint32_t dim)
{
    return 2ull * sizeof(float) * kn_compress_overlap(ratio) * kn_compress_width(ratio, dim);
}
static inline uint64_t kn_compress_state_bytes(uint32_t ratio, uint32_t dim, uint32_t ahead)
{
    return 2ull * sizeof(float) * kn_compress_span(ratio, ahead) * kn_compress_width(ratio, dim);
}

/* ---- dense operations ---- */

/* Manifold-constrained hyper-connections of one site (model 2.2, 2.4): fn F32 [n_mix][hc * d], base F32
 * [n_mix], scale F32 [3] (site, n_mix = (2 + hc) * hc) or [1] (head, n_mix = hc). */
typedef struct kn_hc {
    kn_ptr fn, base, scale;
    uint32_t d, hc, sinkhorn_iters;
    float norm_eps, hc_eps;
} kn_hc;

typedef struct kn_dense_ops {
    /* X[r][j] = table[ids[r]] for j < hc.  table BF16 [vocab][d], ids uint32 [n], X BF16 [n][hc][d] */
    void (*embed)(kn_stream *s, const kn_matrix *table, kn_ptr ids, uint32_t n, uint32_t hc, kn_ptr x_out);
    /* X BF16 [n][hc][d] -> x BF16 [n][d], post F32 [n][hc], comb F32 [n][hc source][hc destination] */
    void (*hc_pre)(kn_stream *s, const kn_hc *p, kn_ptr x, uint32_t n, kn_ptr x_out, kn_ptr post_out,
                   kn_ptr comb_out);
    /* X'[k] = bf16(post[k] * y + sum_j comb[j][k] * X[j]); x_out may be x */
    void (*hc_post)(kn_stream *s, uint32_t d, uint32_t hc, kn_ptr y, kn_ptr x, kn_ptr post, kn_ptr comb,
                    uint32_t n, kn_ptr x_out);
    /* X[r][j] = bf16(e[r] + X[r][j]) for j < hc; e BF16 [n][d], X BF16 [n][hc][d] */
    void (*add_streams)(kn_stream *s, kn_ptr e, uint32_t n, uint32_t hc, uint32_t d, kn_ptr x);
    /* X BF16 [n][hc][d] -> x BF16 [n][d] */
    void (*hc_head)(kn_stream *s, const kn_hc *p, kn_ptr x, uint32_t n, kn_ptr x_out);
    /* y = bf16(w * x * rsqrt(mean(x^2) + eps)); x, y BF16 [n][d], w BF16 [d], or none (addr 0): no weight. y
     * may be x */
    void (*rmsnorm)(kn_stream *s, kn_ptr x, kn_ptr w, uint32_t n, uint32_t d, float eps, kn_ptr y_out);
    /* x BF16 [n][k] -> codes and scales (model 9.1) */
    void (*quant_act)(kn_stream *s, kn_ptr x, uint32_t n, uint32_t k, kn_q8 q_out);
    /* y BF16 [n][w->n_out]; w E4M3 or E2M1 */
    void (*linear_q8)(kn_stream *s, kn_q8 x, const kn_matrix *w, uint32_t n, kn_ptr y_out);
    /* x BF16 [n][w->n_in], w BF16; y [n][w->n_out] of y_dtype F32 or BF16 */
    void (*linear_bf16)(kn_stream *s, kn_ptr x, const kn_matrix *w, uint32_t n, kn_dtype y_dtype,
                        kn_ptr y_out);
    /* Grouped output projection wo_a: x BF16 [n][groups][w->n_in], w E4M3 [groups * per_group][n_in] taken as
     * bf16(code * scale); group g multiplies rows g * per_group ..; y BF16 [n][groups * per_group] */
    void (*linear_grouped)(kn_stream *s, kn_ptr x, const kn_matrix *w, uint32_t groups, uint32_t n,
                           kn_ptr y_out);
    /* ids_out[r] = index of the largest of logits[r], the lower on ties. logits F32 [n][vocab], ids uint32
     * [n] */
    void (*argmax)(kn_stream *s, kn_ptr logits, uint32_t n, uint32_t vocab, kn_ptr ids_out);
} kn_dense_ops;

/* ---- attention operations ---- */

/* One compressor (model section 4): main (dim = head dim, rows stored as KV rows) or indexer (rows rotated by
 * the Hadamard transform and stored as FP4). */
typedef struct kn_compress {
    kn_ptr ape;      /* F32 [ratio][width] */
    kn_ptr norm;     /* BF16 [dim] */
    kn_ptr inv_freq; /* F32 [rope / 2] */
    uint32_t ratio, dim, rope;
    uint32_t span; /* entries of its state: kn_compress_span */
    float eps;
    bool index;          /* false: main; true: indexer key */
    uint64_t page_rows;  /* where its rows stand in a page */
    uint64_t slot_state; /* where its state stands in a slot */
    uint32_t row_bytes;  /* of one stored row */
} kn_compress;

typedef struct kn_attn {
    kn_kv_layout layout;
    kn_ptr sink; /* F32 [n_head] */
    uint32_t n_head, dim, rope, window;
    uint32_t topk; /* picks per row where ratio is 4 */
} kn_attn;

typedef struct kn_attn_ops {
    /* cs_out[r][i] = {cos, sin}(float(pos[r]) * inv_freq[i]), F32 [n][half][2]; pos uint32 [n] */
    void (*rope_table)(kn_stream *s, kn_ptr inv_freq, uint32_t half, kn_ptr pos, uint32_t n, kn_ptr cs_out);
    /* Rotates the last 2 * half of dim values in place, x BF16 [n][heads][dim]; inverse: by the negative
     * angle. */
    void (*rope)(kn_stream *s, kn_ptr x, uint32_t n, uint32_t heads, uint32_t dim, uint32_t half, kn_ptr cs,
                 bool inverse);
    /* kv BF16 [n][dim] (normed, rotated) -> stored rows [n][kn_kv_row_bytes] */
    void (*kv_pack)(kn_stream *s, kn_ptr kv, uint32_t n, uint32_t dim, uint32_t rope, kn_ptr rows_out);
    /* x BF16 [n][heads][dim] -> Hadamard, FP4 -> stored rows [n][heads][kn_index_row_bytes] */
    void (*index_pack)(kn_stream *s, kn_ptr x, uint32_t n, uint32_t heads, uint32_t dim, kn_ptr rows_out);
    /* Adds ape to score in place, emits into the pages every row whose window ends inside this batch. Reads
     * states, does not change them. kv, score F32 [n_row][width]; score comes in as the gate product. */
    void (*compress)(kn_stream *s, const kn_batch *b, const kn_compress *c, kn_ptr kv, kn_ptr score);
    /* Enters the batch's kv and score (ape already in) into the states: after this the batch's rows are
     * history. */
    void (*compress_commit)(kn_stream *s, const kn_batch *b, const kn_compress *c, kn_ptr kv, kn_ptr score);
    /* For each row at position p: the min(topk, (p+1)/ratio) best of its visible indexer keys, ascending row
     * index, then -1. Score f32(sum_h relu(iq_h . ik_j) * w_h), w_h = f32(w * f32(dim^-0.5 * heads^-0.5)),
     * ties to the lower row. iq stored rows [n_row][heads][..], w BF16 [n_row][heads], of no matter for rows
     * that see no more keys than topk; picks int32 [n_row][topk] */
    void (*index_topk)(kn_stream *s, const kn_batch *b, const kn_kv_layout *layout, uint32_t heads,
                       uint32_t dim, uint32_t topk, kn_ptr iq, kn_ptr w, kn_ptr picks_out);
    /* o BF16 [n_row][n_head][dim] from q of the same shape (model 3.2, 3.3). Raw rows before the batch come
     * from the slots' windows, those of the batch from chunk_rows [n_row][row_bytes]; picks int32
     * [n_row][topk] where ratio is 4, else none. */
    void (*attention)(kn_stream *s, const kn_batch *b, const kn_attn *a, kn_ptr q, kn_ptr chunk_rows,
                      kn_ptr picks, kn_ptr o_out);
    /* Enters the batch's stored rows into the slots' raw windows. */
    void (*raw_commit)(kn_stream *s, const kn_batch *b, const kn_attn *a, kn_ptr chunk_rows);
} kn_attn_ops;

/* ---- mixture of experts ---- */

typedef struct kn_gate {
    kn_matrix weight; /* BF16 [n_expert][d] */
    kn_ptr bias;      /* F32 [n_expert]; none in hash layers */
    kn_ptr tid2eid;   /* int64 [vocab][topk]; none in score layers */
    uint32_t n_expert, topk;
    float route_scale;
} kn_gate;

typedef struct kn_expert {
    kn_matrix w1, w3, w2; /* gate [inner][d], up [inner][d], down [d][inner] */
} kn_expert;

/* Rows of one expert: entries item0 .. item0 + n_item - 1 of the item list. */
typedef struct kn_expert_group {
    const kn_expert *expert;
    uint32_t item0, n_item;
} kn_expert_group;

typedef struct kn_expert_item {
    uint32_t row; /* input row */
    uint32_t out; /* output row */
    float weight; /* route weight, applied before w2 */
} kn_expert_item;

typedef struct kn_moe_ops {
    /* Rows of one call of experts after which the caller should see to other things, as links that are to be
     * kept alive: in half a second at most on one slow thread. Which rows are computed together changes no
     * bit. 0: any number, all in one call is best. */
    uint32_t slice_rows;
    /* x BF16 [n][d], ids uint32 [n] (hash layers read them); experts int32 [n][topk] in descending biased
     * score or table order, weights F32 [n][topk] */
    void (*gate)(kn_stream *s, const kn_gate *g, kn_ptr x, kn_ptr ids, uint32_t n, kn_ptr experts_out,
                 kn_ptr weights_out);
    /* h = bf16([weight *] silu(min(g, limit)) * clamp(u, limit)); g, u, h BF16 [n][inner]; weight F32 [n] or
     * none */
    void (*swiglu)(kn_stream *s, kn_ptr g, kn_ptr u, kn_ptr weight, uint32_t n, uint32_t inner, float limit,
                   kn_ptr h_out);
    /* Routed experts: for each group and item y[out] = expert(x[row], weight). x quantized rows, y BF16
     * [..][d]. groups and items are host arrays, read before the call returns. */
    void (*experts)(kn_stream *s, const kn_expert_group *groups, uint32_t n_group,
                    const kn_expert_item *items, kn_q8 x, float limit, kn_ptr y_out);
    /* out = bf16(sum of slots in ascending expert id, one float addition each, + shared); y BF16
     * [n][topk][d], experts int32 [n][topk], shared, out BF16 [n][d] */
    void (*combine)(kn_stream *s, kn_ptr y, kn_ptr experts, kn_ptr shared, uint32_t n, uint32_t topk,
                    uint32_t d, kn_ptr out);
} kn_moe_ops;

const kn_dense_ops *kn_dense(const kn_device *device);
const kn_attn_ops *kn_attention(const kn_device *device);
const kn_moe_ops *kn_moe(const kn_device *device);
