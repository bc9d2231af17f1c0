/* The back-end table and what the CPU back-ends share. For this folder only. */
#pragma once
#include <stddef.h>
#include <string.h>

#include "kernels/kn.h"
#include "kernels/numa.h"

enum {
    KN_DIM_MAX = 1024, /* head dim and indexer dim: rows of this size stand on the stack */
    KN_TOPK_MAX = 32,  /* experts of one row */
};

typedef struct kn_backend {
    uint32_t version; /* KN_VERSION; another one is refused */
    const char *name;
    cm_status (*open)(const kn_device_options *options, kn_device **device_out, cm_error *err);
    void (*close)(kn_device *device);
    cm_status (*stream_open)(kn_device *device, const kn_limits *limits, kn_stream **stream_out);
    void (*stream_close)(kn_stream *stream);
    cm_status (*stream_sync)(kn_stream *stream);
    cm_status (*mem_alloc)(kn_device *device, uint64_t n_bytes, kn_ptr *ptr_out);
    void (*mem_free)(kn_device *device, kn_ptr ptr);
    cm_status (*mem_place)(kn_device *device, const void *host, uint64_t n_bytes, kn_ptr *ptr_out);
    void *(*mem_host)(kn_device *device, kn_ptr ptr);
    uint64_t (*prepared_bytes)(const kn_device *device, const kn_matrix *w);
    void (*prepare)(const kn_device *device, const kn_matrix *w, kn_ptr at); /* only where there are bytes */
    void (*copy_to_device)(kn_stream *stream, kn_ptr to, const void *from, uint64_t n_bytes);
    void (*copy_to_host)(kn_stream *stream, void *to, kn_ptr from, uint64_t n_bytes);
    void (*copy)(kn_stream *stream, kn_ptr to, kn_ptr from, uint64_t n_bytes);
} kn_backend;

/* First member of every back-end's own device. */
struct kn_device {
    const kn_backend *backend;
    const char *isa;
    const kn_dense_ops *dense;
    const kn_attn_ops *attn;
    const kn_moe_ops *moe;
    kn_numa *numa; /* whose nodes host memory is spread over; NULL: it stays where it is touched first */
};

/* First member of every back-end's own stream. */
struct kn_stream {
    kn_device *device;
};

extern const kn_backend kn_backend_cpu, kn_backend_ref;

/* ---- shared by the back-ends whose device memory is the host's (host.c) ---- */

cm_status kn_host_alloc(kn_device *device, uint64_t n_bytes, kn_ptr *ptr_out);
void kn_host_free(kn_device *device, kn_ptr ptr);
cm_status kn_host_place(kn_device *device, const void *host, uint64_t n_bytes, kn_ptr *ptr_out);
void *kn_host_view(kn_device *device, kn_ptr ptr);
uint64_t kn_host_prepared_bytes(const kn_device *device, const kn_matrix *w); /* 0 */
void kn_host_copy_to_device(kn_stream *stream, kn_ptr to, const void *from, uint64_t n_bytes);
void kn_host_copy_to_host(kn_stream *stream, void *to, kn_ptr from, uint64_t n_bytes);
void kn_host_copy(kn_stream *stream, kn_ptr to, kn_ptr from, uint64_t n_bytes);
/* Operations are done when their call returns. */
cm_status kn_host_sync(kn_stream *stream);
/* Limits a host stream can serve; our callers take them from a checked model geometry. */
void kn_host_check_limits(const kn_limits *limits);

static inline void *kn_host(kn_ptr p)
{
    return (void *)(uintptr_t)p.addr;
}

/* Elements of a matrix or of its scales: a mapped file promises no alignment. */
static inline float kn_f32_at(const void *data, uint64_t i)
{
    float v;
    memcpy(&v, (const uint8_t *)data + i * sizeof(v), sizeof(v));
    return v;
}

static inline uint16_t kn_u16_at(const void *data, uint64_t i)
{
    uint16_t v;
    memcpy(&v, (const uint8_t *)data + i * sizeof(v), sizeof(v));
    return v;
}

/* Keys of one query at position p, in the order they are summed: raw rows from raw0 on, then compressed rows.
 */
static inline uint32_t kn_raw_first(uint32_t p, uint32_t window)
{
    return p + 1 > window ? p + 1 - window : 0;
}

/* Compressed row j of a sequence inside its pages; offset is where the rows start in a page. */
static inline uint8_t *kn_page_row(const kn_batch *b, const kn_seg *seg, uint64_t offset, uint32_t ratio,
                                   uint32_t row_bytes, uint32_t j)
{
    const uint32_t *pages = (const uint32_t *)kn_host(b->pages) + seg->page0;
    uint32_t per_page = KN_PAGE_TOKENS / ratio;
    uint8_t *page = (uint8_t *)kn_host(b->page_pool) + pages[j / per_page] * b->page_bytes;
    return page + offset + (uint64_t)(j % per_page) * row_bytes;
}

/* The raw row of position p: from the batch's own rows, or from the sequence's window. */
static inline const uint8_t *kn_raw_row(const kn_seg *seg, const kn_attn *a, const uint8_t *chunk_rows,
                                        uint32_t p)
{
    uint64_t row_bytes = a->layout.row_bytes;
    if (p >= seg->pos0) {
        return chunk_rows + (seg->row0 + (p - seg->pos0)) * row_bytes;
    }
    return (const uint8_t *)kn_host(seg->slot) + a->layout.slot_raw + (p % a->layout.ring) * row_bytes;
}
