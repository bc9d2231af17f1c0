/* The router process as a library: scheduler and links to gateways on the loop, engine on a compute thread,
 * membership. Thread: the loop's. */
#pragma once
#include "common/base/config.h"
#include "common/proc/loop.h"
#include "common/proc/process.h"

typedef struct rt_config {
    char *coordinator, *address, *model, *scripted_model, *device, *cpu_isa, *numa_node, *net;
    uint64_t threads, rows_max, chunk_max, step_ms, sequences_max, queue_max, drafts_max, micro_batches,
        kv_bytes, prefix_bytes, answer_ms, wait_ms, silence_ms, frame_bytes, gateways_max, gateway_grace_ms,
        kept_max, kept_bytes, drain_ms;
    pc_process_config process;
} rt_config;
extern const cm_cfg_table rt_config_table;

typedef struct rt_router rt_router;

/* config is kept. finished runs when the router has ended by itself: drained (0) or refused by the
 * coordinator (1). */
CM_MUST_CHECK cm_status rt_router_create(pc_loop *loop, const rt_config *config,
                                         void (*finished)(void *ctx, int code), void *ctx,
                                         rt_router **router_out, cm_error *err);
const char *rt_router_address(const rt_router *router);
/* Tells the coordinator that we want to leave; when no gateway chooses us any more the running sequences are
 * finished (all within drain_ms), then finished(ctx, 0). */
void rt_router_drain(rt_router *router);
void rt_router_destroy(rt_router *router);
