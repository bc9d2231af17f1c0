#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "kernels/kn_math.h"
#include "kernels/kn_private.h"

enum { LARGE = 4 << 20 }; /* bytes from which on a block asks for huge pages */

/* cm_try_alloc aligns for any scalar only, so a block keeps its own start just below the address it hands
 * out. */
enum { ALIGN = 64 };

cm_status kn_host_alloc(kn_device *device, uint64_t n_bytes, kn_ptr *ptr_out)
{
    uint8_t *block;
    uintptr_t at;
    if (n_bytes > SIZE_MAX - 2 * ALIGN) {
        return CM_E_MEMORY;
    }
    block = cm_try_alloc((size_t)n_bytes + 2 * ALIGN);
    if (block == NULL) {
        return CM_E_MEMORY;
    }
    at = ((uintptr_t)block + 2 * ALIGN - 1) / ALIGN * ALIGN;
    if (n_bytes >= LARGE) { /* of such a block no page has been touched yet */
        uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (at + page - 1) / page * page;
        size_t n_whole = (at + n_bytes - first) / page * page;
        (void)madvise((void *)first, n_whole, MADV_HUGEPAGE); /* a wish, no more */
        if (device->numa != NULL) {
            kn_numa_spread(device->numa, (void *)first, n_whole);
        }
    }
    memcpy((uint8_t *)at - sizeof(block), &block, sizeof(block));
    *ptr_out = (kn_ptr){at};
    return CM_OK;
}

void kn_host_free(kn_device *device, kn_ptr ptr)
{
    uint8_t *block;
    (void)device;
    if (ptr.addr == 0) {
        return;
    }
    memcpy(&block, (uint8_t *)kn_host(ptr) - sizeof(block), sizeof(block));
    cm_free(block);
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
