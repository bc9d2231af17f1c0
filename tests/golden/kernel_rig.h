/* A kernel device and stream with buffers that are all freed together, for tests. Thread: one. */
#pragma once
#include "kernels/kn.h"

typedef struct rig {
    kn_device *device;
    kn_stream *stream;
    kn_ptr held[256];
    uint32_t n_held;
} rig;

void rig_open(rig *r, const char *backend, const char *isa, uint32_t n_threads, const kn_limits *limits);
/* Frees the buffers, keeps the device. */
void rig_reset(rig *r);
void rig_close(rig *r);
kn_ptr rig_new(rig *r, uint64_t n_bytes); /* zeroed */
kn_ptr rig_up(rig *r, const void *from, uint64_t n_bytes);
void rig_down(rig *r, void *to, kn_ptr from, uint64_t n_bytes); /* after all that was queued */
