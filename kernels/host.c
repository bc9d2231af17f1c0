#include <string.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "kernels/kn_math.h"
#include "kernels/kn_private.h"

enum { LARGE = 4 << 20 }; /* bytes from which on a block asks for huge pages */

/* A block keeps what freeing it takes just below the address it hands out. */
enum { ALIGN = 64 };
typedef struct host_head {
    uint8_t *block;
    uint64_t huge_bytes; /* 0: of cm_try_alloc, which aligns for any scalar only */
} host_head;

cm_status kn_host_alloc(kn_device *device, uint64_t n_bytes, kn_ptr *ptr_out)
{
    host_head head = {0};
    if (n_bytes > SIZE_MAX - 2 * ALIGN) {
        return CM_E_MEMORY;
    }
    if (n_bytes >= LARGE) {
        head.huge_bytes = n_bytes + ALIGN;
        head.block = cm_huge_alloc((size_t)head.huge_bytes);
        if (head.block != NULL && device->numa != NULL) { /* no page of it has been touched yet */
            uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
            kn_numa_spread(device->numa, head.block, (size_t)(head.huge_bytes / page * page));
        }
    } else {
        head.block = cm_try_alloc((size_t)n_bytes + 2 * ALIGN);
    }
    if (head.block == NULL) {
        return CM_E_MEMORY;
    }
    _Static_assert(sizeof(head) <= ALIGN, "the head fits what alignment leaves at least");
    uintptr_t at = ((uintptr_t)head.block + sizeof(head) + ALIGN - 1) / ALIGN * ALIGN;
    memcpy((uint8_t *)at - sizeof(head), &head, sizeof(head));
    *ptr_out = (kn_ptr){at};
    return CM_OK;
}

void kn_host_free(kn_device *device, kn_ptr ptr)
{
    host_head head;
    (void)device;
    if (ptr.addr == 0) {
        return;
    }
    memcpy(&head, (uint8_t *)kn_host(ptr) - sizeof(head), sizeof(head));
    if (head.huge_bytes != 0) {
        cm_huge_free(head.block, (size_t)head.huge_bytes);
    } else {
        cm_free(head.block);
    }
}

cm_status kn_host_place(kn_device *device, const void *host, uint64_t n_bytes, kn_ptr *ptr_out)
{
    (void)device;
    (void)n_bytes;
    *ptr_out = (kn_ptr){(uintptr_t)host};
    return CM_OK;
}

uint64_t kn_host_prepared_bytes(const kn_device *device, const kn_matrix *w)
{
    (void)device;
    (void)w;
    return 0;
}

void *kn_host_view(kn_device *device, kn_ptr ptr)
{
    (void)device;
    return kn_host(ptr);
}

void kn_host_copy_to_device(kn_stream *stream, kn_ptr to, const void *from, uint64_t n_bytes)
{
    (void)stream;
    if (n_bytes > 0) {
        memcpy(kn_host(to), from, (size_t)n_bytes);
    }
}

void kn_host_copy_to_host(kn_stream *stream, void *to, kn_ptr from, uint64_t n_bytes)
{
    (void)stream;
    if (n_bytes > 0) {
        memcpy(to, kn_host(from), (size_t)n_bytes);
    }
}

cm_status kn_host_sync(kn_stream *stream)
{
    (void)stream;
    return CM_OK;
}

void kn_host_check_limits(const kn_limits *limits)
{
    CM_ASSERT_MSG(limits->head_dim <= KN_DIM_MAX, "head dim %u max %u", limits->head_dim, KN_DIM_MAX);
}

void kn_host_copy(kn_stream *stream, kn_ptr to, kn_ptr from, uint64_t n_bytes)
{
    (void)stream;
    if (n_bytes > 0) {
        memcpy(kn_host(to), kn_host(from), (size_t)n_bytes);
    }
}
