/* Keeps warm what we would take over if another worker died: reads those experts ahead, from time to time
 * again, at a bounded rate and within our memory for experts. Who takes over what follows from the epoch
 * alone (pr_placement_heirs). Thread: the loop's; reading happens on the job thread that loads. */
#pragma once
#include "common/base/jobs.h"
#include "common/proc/loop.h"
#include "common/proc/member.h"
#include "worker/shard.h"

typedef struct wk_warm wk_warm;

typedef struct wk_warm_options {
    pc_loop *loop;
    cm_jobs *jobs;   /* kept; destroyed before the warm */
    wk_shard *shard; /* kept */
    uint64_t expert_bytes;
    uint64_t bytes_per_s; /* not 0 */
} wk_warm_options;

wk_warm *wk_warm_create(const wk_warm_options *options);
/* An epoch is in force; self: our member id in it. */
void wk_warm_follow(wk_warm *warm, pc_epoch *epoch, uint32_t self);
void wk_warm_destroy(wk_warm *warm); /* NULL is fine */
