/* The expert engine of a worker as a library: takes dispatch frames from routers, gathers those of one layer,
 * computes them on one device, answers with one row per slot. Keeps no state of any sequence. Used by the
 * worker process, by `baleen logits`, and by tests. Thread: wk_engine_run is the compute thread and owns the
 * net object, the device and all memory of the path; the other calls may come from any thread. */
#pragma once
#include "common/model/checkpoint.h"
#include "common/net/net.h"
#include "common/proc/member.h"
#include "kernels/kn.h"
#include "worker/shard.h"

typedef struct wk_engine wk_engine;

typedef struct wk_engine_options {
    const md_checkpoint *checkpoint; /* kept */
    kn_device_options device;
    kn_device *opened;   /* used instead, given; NULL: device says which one to open */
    net_options rows;    /* message_bytes_max bounds a frame */
    const char *address; /* to listen on */
    uint32_t row_max;    /* slots computed together */
    uint32_t frame_max;  /* frames waiting or being answered */
    uint32_t router_max;
    uint32_t window_max_us; /* longest wait for other routers' rows of a layer */
    uint32_t answer_ms;     /* an answer that did not leave by then costs the link */
} wk_engine_options;

/* Opens device and net and listens. bound_out: the address routers connect to. */
CM_MUST_CHECK cm_status wk_engine_create(const wk_engine_options *options, wk_engine **engine_out,
                                         char bound_out[NET_ADDRESS_BYTES], cm_error *err);
void wk_engine_destroy(wk_engine *engine); /* after wk_engine_run returned */
wk_shard *wk_engine_shard(wk_engine *engine);

/* Serves until wk_engine_stop. */
void wk_engine_run(wk_engine *engine);
void wk_engine_stop(wk_engine *engine);

/* Frames of this epoch are served from now on. Its experts are loaded. self: our member id. */
void wk_engine_commit(wk_engine *engine, pc_epoch *epoch, uint32_t self);
/* For a keyed net: see net_key_add. */
void wk_engine_frame_key(wk_engine *engine, uint64_t cluster, uint64_t epoch, const uint8_t *key);
/* The compute thread looks again at what it was told, and at what may be freed. */
void wk_engine_wake(wk_engine *engine);
/* Frames of epochs before `oldest` are refused from now on, and their keys end. */
void wk_engine_retire(wk_engine *engine, uint64_t oldest);
