#include <errno.h>
#include <string.h>
#include <sys/mman.h>

#include "common/base/assert.h"
#include "common/net/net_private.h"

cm_status net_buffers_init(net_buffers *buffers, uint32_t n, uint64_t n_bytes, cm_error *err)
{
    uint64_t stride = (n_bytes + 63) / 64 * 64;
    CM_ASSERT(n > 0 && n_bytes > 0 && stride <= UINT64_MAX / 2 / n);
    void *base =
        mmap(NULL, stride * n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        return cm_error_set(err, CM_E_MEMORY, "message_bytes_max",
                            "no address space for %u receive buffers of %llu bytes: %s", n,
                            (unsigned long long)n_bytes, strerror(errno));
    }
    *buffers = (net_buffers){.base = base, .stride = stride, .map_bytes = stride * n, .n = n, .n_free = n};
    buffers->free_stack = cm_alloc(sizeof(uint32_t) * n);
    for (uint32_t i = 0; i < n; i++) {
        buffers->free_stack[i] = n - 1 - i;
    }
    return CM_OK;
}

void net_buffers_fini(net_buffers *buffers)
{
    if (buffers->base != NULL) {
        munmap(buffers->base, buffers->map_bytes);
    }
    cm_free(buffers->free_stack);
    *buffers = (net_buffers){0};
}

void *net_buffers_get(net_buffers *buffers)
{
    CM_ASSERT(buffers->n_free > 0);
    return buffers->base + buffers->stride * buffers->free_stack[--buffers->n_free];
}

void net_buffers_put(net_buffers *buffers, void *buffer)
{
    uint64_t offset = (uint64_t)((uint8_t *)buffer - buffers->base);
    CM_ASSERT(offset < buffers->map_bytes && offset % buffers->stride == 0 && buffers->n_free < buffers->n);
    buffers->free_stack[buffers->n_free++] = (uint32_t)(offset / buffers->stride);
}
