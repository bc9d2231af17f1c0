/* Which back-ends exist. The only file that knows their names. */
#include <string.h>

#include "common/base/assert.h"
#include "kernels/kn_private.h"

static const kn_backend *const BACKENDS[] = {&kn_backend_cpu, &kn_backend_ref};
enum { N_BACKEND = sizeof(BACKENDS) / sizeof(BACKENDS[0]) };

cm_status kn_device_open(const kn_device_options *options, kn_device **device_out, cm_error *err)
{
    const char *name = options->backend != NULL ? options->backend : BACKENDS[0]->name;
    for (uint32_t i = 0; i < N_BACKEND; i++) {
        if (strcmp(BACKENDS[i]->name, name) == 0) {
            return BACKENDS[i]->open(options, device_out, err);
        }
    }
    return cm_error_set(err, CM_E_CONFIG, "backend",
                        "there is no kernel back-end \"%s\"; there are %s and %s", name, BACKENDS[0]->name,
                        BACKENDS[1]->name);
}

void kn_device_close(kn_device *device)
{
    if (device != NULL) {
        device->backend->close(device);
    }
}

const char *kn_device_name(const kn_device *device)
{
    return device->backend->name;
}

const char *kn_device_isa(const kn_device *device)
{
    return device->isa;
}

cm_status kn_stream_open(kn_device *device, const kn_limits *limits, kn_stream **stream_out)
{
    return device->backend->stream_open(device, limits, stream_out);
}

void kn_stream_close(kn_stream *stream)
{
    if (stream != NULL) {
        stream->device->backend->stream_close(stream);
    }
}

cm_status kn_stream_sync(kn_stream *stream)
{
    return stream->device->backend->stream_sync(stream);
}

cm_status kn_mem_alloc(kn_device *device, uint64_t n_bytes, kn_ptr *ptr_out)
{
    return device->backend->mem_alloc(device, n_bytes, ptr_out);
}

void kn_mem_free(kn_device *device, kn_ptr ptr)
{
    device->backend->mem_free(device, ptr);
}

cm_status kn_mem_place(kn_device *device, const void *host, uint64_t n_bytes, kn_ptr *ptr_out)
{
    return device->backend->mem_place(device, host, n_bytes, ptr_out);
}

void *kn_mem_host(kn_device *device, kn_ptr ptr)
{
    return device->backend->mem_host(device, ptr);
}

uint64_t kn_prepared_bytes(const kn_device *device, const kn_matrix *w)
{
    return device->backend->prepared_bytes(device, w);
}

void kn_prepare(kn_device *device, kn_matrix *w, kn_ptr at)
{
    CM_ASSERT(!w->prepared && kn_prepared_bytes(device, w) > 0);
    device->backend->prepare(device, w, at);
    w->data = at;
    w->prepared = true;
}

void kn_copy_to_device(kn_stream *stream, kn_ptr to, const void *from, uint64_t n_bytes)
{
    stream->device->backend->copy_to_device(stream, to, from, n_bytes);
}

void kn_copy_to_host(kn_stream *stream, void *to, kn_ptr from, uint64_t n_bytes)
{
    stream->device->backend->copy_to_host(stream, to, from, n_bytes);
}

void kn_copy(kn_stream *stream, kn_ptr to, kn_ptr from, uint64_t n_bytes)
{
    stream->device->backend->copy(stream, to, from, n_bytes);
}

const kn_dense_ops *kn_dense(const kn_device *device)
{
    return device->dense;
}

const kn_attn_ops *kn_attention(const kn_device *device)
{
    return device->attn;
}

const kn_moe_ops *kn_moe(const kn_device *device)
{
    return device->moe;
}
