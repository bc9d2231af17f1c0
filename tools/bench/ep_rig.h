/* Routers' exchanges and workers' engines as they are, without the rest of a cluster: what the ep benchmarks
 * time. The workers are processes of their own (threads where the transport stays inside one); their links,
 * frames, gathering and copies are the product's, only the experts' kernel may be an echo that writes the row
 * it got as every slot's result. Thread: main. */
#pragma once
#include <sys/types.h>

#include "common/net/net.h"
#include "router/engine/exchange.h"
#include "tools/bench/ep_checkpoint.h"

enum { EP_RANKS_MAX = 64 };

typedef struct ep_options {
    ep_shape shape;
    const char *backend; /* ucx, shm, local */
    bool keyed;
    bool echo; /* else the experts are computed */
    uint32_t n_worker;
    uint32_t window_us;
} ep_options;

typedef struct ep_rig ep_rig;

/* Workers are up and loaded; no router yet. Before any router: it forks. */
CM_MUST_CHECK cm_status ep_rig_create(const ep_options *options, ep_rig **rig_out, cm_error *err);
void ep_rig_destroy(ep_rig *rig);
/* A router's exchange, linked to all workers. topk may be less than the shape's. id: its member id, >= 1. In
 * any process forked since. */
CM_MUST_CHECK cm_status ep_rig_router(const ep_rig *rig, uint32_t id, uint32_t row_max, uint32_t topk,
                                      rt_exchange **exchange_out, cm_error *err);
const pr_placement *ep_rig_placement(const ep_rig *rig);
uint64_t ep_rig_expert_bytes(const ep_rig *rig); /* of one expert */

typedef struct ep_counts {
    int64_t rows, batches, expert_bytes;
} ep_counts;
/* Of all workers since they were started. */
CM_MUST_CHECK cm_status ep_rig_counts(const ep_rig *rig, ep_counts *counts_out, cm_error *err);

/* ---- rows for one exchange ---- */

typedef struct ep_rows {
    uint32_t n_row, topk, d;
    int32_t *experts;
    float *weights;
    uint8_t *codes, *scales;
    uint16_t *results;
    uint64_t n_slot_max;
} ep_rows;

/* Experts of each row are distinct and uniform over n_expert, from seed. */
void ep_rows_init(ep_rows *rows, uint32_t n_row, uint32_t topk, uint32_t d, uint32_t n_expert, uint64_t seed);
void ep_rows_fini(ep_rows *rows);
CM_MUST_CHECK cm_status ep_rows_run(ep_rows *rows, rt_exchange *exchange, uint64_t step, uint32_t layer);
void ep_rows_poison(ep_rows *rows);
/* Every slot has the echo of its row. */
bool ep_rows_echoed(const ep_rows *rows);
/* What an exchange of them must move: bytes to and from each rank (codes and scales once a row and rank; BF16
 * each slot). */
void ep_rows_bytes(const ep_rows *rows, const pr_placement *placement, uint32_t layer,
                   uint64_t out_bytes[EP_RANKS_MAX], uint64_t back_bytes[EP_RANKS_MAX]);
