#include "tests/golden/kernel_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

void rig_open(rig *r, const char *backend, const char *isa, uint32_t n_threads, const kn_limits *limits)
{
    kn_device_options options = {.backend = backend, .isa = isa, .n_threads = n_threads};
    *r = (rig){0};
    assert_int_equal(kn_device_open(&options, &r->device, NULL), CM_OK);
    assert_int_equal(kn_stream_open(r->device, limits, &r->stream), CM_OK);
}

void rig_reset(rig *r)
{
    while (r->n_held > 0) {
        kn_mem_free(r->device, r->held[--r->n_held]);
    }
}

void rig_close(rig *r)
{
    rig_reset(r);
    kn_stream_close(r->stream);
    kn_device_close(r->device);
}

kn_ptr rig_new(rig *r, uint64_t n_bytes)
{
    kn_ptr p;
    assert_true(r->n_held < sizeof(r->held) / sizeof(r->held[0]));
    assert_int_equal(kn_mem_alloc(r->device, n_bytes, &p), CM_OK);
    r->held[r->n_held++] = p;
    return p;
}

kn_ptr rig_up(rig *r, const void *from, uint64_t n_bytes)
{
    kn_ptr p = rig_new(r, n_bytes);
    kn_copy_to_device(r->stream, p, from, n_bytes);
    return p;
}

void rig_down(rig *r, void *to, kn_ptr from, uint64_t n_bytes)
{
    kn_copy_to_host(r->stream, to, from, n_bytes);
    assert_int_equal(kn_stream_sync(r->stream), CM_OK);
}
