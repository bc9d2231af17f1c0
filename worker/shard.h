/* A worker's experts: (layer, expert) -> weights, read from the checkpoint's mapping in their stored formats,
 * or copies in the order the device reads best, of the same size. Which ones are held follows the epochs this
 * worker knows: an expert is loaded (read through and checked) when an epoch that gives it to us is prepared,
 * and let go when the last such epoch is retired. Thread: load on a job thread, one at a time; the rest on
 * the loop; the compute thread reads experts only of epochs that were handed to it after their load. */
#pragma once
#include "common/model/checkpoint.h"
#include "kernels/kn.h"
#include "proto/placement.h"

typedef struct wk_shard wk_shard;

/* n_threads: so many read and lay out experts together until a load has been complete once. */
CM_MUST_CHECK cm_status wk_shard_create(const md_checkpoint *checkpoint, kn_device *device,
                                        uint32_t n_threads, wk_shard **shard_out);
void wk_shard_destroy(wk_shard *shard);

/* Reads and checks every expert of `rank` that is not held yet. CM_E_CORRUPT names the tensor. Progress goes
 * to the log. */
CM_MUST_CHECK cm_status wk_shard_load(wk_shard *shard, const pr_placement *placement, uint32_t rank,
                                      cm_error *err);
/* Reads and checks an expert that is not ours, so that a later load finds it in the page cache and checked.
 * Thread: as load. */
CM_MUST_CHECK cm_status wk_shard_warm(wk_shard *shard, uint32_t layer, uint32_t expert, cm_error *err);
/* Lets go of every expert that none of the placements gives to us. rank[i] is our rank in placements[i]. */
void wk_shard_keep(wk_shard *shard, const pr_placement *const *placements, const uint32_t *ranks, uint32_t n);
/* Weights of an expert that was held when its frame came in. They stay where they are even if it has been let
 * go since: a frame that was accepted is computed. Thread: the compute thread's. */
const kn_expert *wk_shard_weights(const wk_shard *shard, uint32_t layer, uint32_t expert);
/* Frees copies of experts that were let go. Thread: the compute thread's, when no accepted frame waits. */
void wk_shard_release(wk_shard *shard);
/* Ends a load under way with CM_E_CANCELLED, and every later one; for shutdown. Any thread. */
void wk_shard_stop(wk_shard *shard);
/* NULL when not held. */
const kn_expert *wk_shard_expert(const wk_shard *shard, uint32_t layer, uint32_t expert);
uint32_t wk_shard_count(const wk_shard *shard); /* experts held */
