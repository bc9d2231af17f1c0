/* The worker process as a library: engine on a compute thread, membership on the loop, loads on a job thread.
 * A worker and a router may share a process, each with its own. Thread: the loop's. */
#pragma once
#include "common/base/config.h"
#include "common/proc/loop.h"
#include "common/proc/process.h"

typedef struct wk_config {
    char *coordinator, *address, *model, *device, *cpu_isa, *numa_node, *net;
    uint64_t threads, rows_max, routers_max, window_us, answer_ms, frame_bytes, expert_bytes_max, silence_ms,
        drain_ms, warm_bytes_s;
    pc_process_config process;
} wk_config;
extern const cm_cfg_table wk_config_table;

typedef struct wk_worker wk_worker;

/* config is kept. finished runs when the worker has ended by itself (refused by the coordinator): exit code
 * in *code. */
CM_MUST_CHECK cm_status wk_worker_create(pc_loop *loop, const wk_config *config,
                                         void (*finished)(void *ctx, int code), void *ctx,
                                         wk_worker **worker_out, cm_error *err);
const char *wk_worker_address(const wk_worker *worker);
/* Tells the coordinator that we want to leave and serves on; finished(ctx, 0) follows when no epoch in use
 * needs us, when the coordinator is gone, or after drain_ms. */
void wk_worker_drain(wk_worker *worker);
void wk_worker_destroy(wk_worker *worker);
