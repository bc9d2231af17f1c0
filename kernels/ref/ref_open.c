#include <string.h>

#include "common/base/mem.h"
#include "kernels/ref/ref_private.h"

static cm_status ref_open(const kn_device_options *options, kn_device **device_out, cm_error *err)
{
    kn_device *device;
    if (options->isa != NULL && strcmp(options->isa, "auto") != 0 && strcmp(options->isa, "portable") != 0) {
        return cm_error_set(err, CM_E_CONFIG, "isa", "the ref back-end has no path \"%s\", only portable",
                            options->isa);
    }
    device = cm_alloc(sizeof(*device));
    *device = (kn_device){.backend = &kn_backend_ref,
                          .isa = "portable",
                          .dense = &kn_ref_dense,
                          .attn = &kn_ref_attn,
                          .moe = &kn_ref_moe};
    *device_out = device;
    return CM_OK;
}

static void ref_close(kn_device *device)
{
    cm_free(device);
}

static void ref_stream_close(kn_stream *base)
{
    ref_stream *s = (ref_stream *)base;
    cm_free(s->inner);
    cm_free(s->gate_score);
    cm_free(s->index_score);
    cm_free(s->score);
    cm_free(s);
}

static cm_status ref_stream_open(kn_device *device, const kn_limits *limits, kn_stream **stream_out)
{
    ref_stream *s = cm_alloc(sizeof(*s));
    kn_host_check_limits(limits);
    s->base.device = device;
    s->score = cm_try_alloc((size_t)limits->n_key * sizeof(double) + 1);
    s->index_score = cm_try_alloc((size_t)limits->n_index_row * sizeof(float) + 1);
    s->gate_score = cm_try_alloc((size_t)limits->n_expert * 2 * sizeof(float) + 1);
    s->inner = cm_try_alloc((size_t)limits->n_inner * 2 * sizeof(uint16_t) + 1);
    if (s->score == NULL || s->index_score == NULL || s->gate_score == NULL || s->inner == NULL) {
        ref_stream_close(&s->base);
        return CM_E_MEMORY;
    }
    *stream_out = &s->base;
    return CM_OK;
}

const kn_backend kn_backend_ref = {
    .version = KN_VERSION,
    .name = "ref",
    .open = ref_open,
    .close = ref_close,
    .stream_open = ref_stream_open,
    .stream_close = ref_stream_close,
    .stream_sync = kn_host_sync,
    .mem_alloc = kn_host_alloc,
    .mem_free = kn_host_free,
    .mem_place = kn_host_place,
    .mem_host = kn_host_view,
    .prepared_bytes = kn_host_prepared_bytes,
    .copy_to_device = kn_host_copy_to_device,
    .copy_to_host = kn_host_copy_to_host,
    .copy = kn_host_copy,
};
