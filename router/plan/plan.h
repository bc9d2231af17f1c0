/* Dispatch plan for one MoE layer of one step: which rows go to which rank, which slots each rank computes,
 * and how that is cut into frames. Pure arithmetic on memory taken at create. Thread: any, one plan at a
 * time. */
#pragma once
#include <stdint.h>

#include "common/base/status.h"
#include "proto/frames.h"
#include "proto/placement.h"

/* One frame to one rank. Rows of a part are distinct rows of the batch, ascending; one copy of a row per part
 * however many of its experts the rank owns. Slots are ordered by (expert, row),
 * as a worker computes them. */
typedef struct rt_part {
    uint32_t rank;
    uint32_t row0, n_row;   /* into plan->rows */
    uint32_t slot0, n_slot; /* into plan->slots and plan->targets */
} rt_part;

typedef struct rt_plan {
    uint32_t n_part, n_row, n_slot;
    rt_part *parts;
    uint32_t *rows;    /* batch row of each frame row */
    pr_slot *slots;    /* as they travel; row counts inside its part */
    uint32_t *targets; /* batch row * topk + slot: where the slot's result belongs */
    /* bounds, fixed at create */
    uint32_t part_max, slot_max;
} rt_plan;

typedef struct rt_plan_limits {
    uint32_t row_max; /* rows of a batch */
    uint32_t topk;
    uint32_t d;
    uint64_t frame_bytes_max; /* payload of a dispatch or a combine frame */
} rt_plan_limits;

rt_plan *rt_plan_create(const rt_plan_limits *limits);
void rt_plan_destroy(rt_plan *plan);

/* Groups slots of the batch by owning rank. Only slots with wanted[i] != 0 are planned (i = row * topk +
 * slot; NULL: all): a retry plans what is still missing. experts int32 [n_row][topk], weights float
 * [n_row][topk]. Of several owners that are not in `avoid` (bit per rank; NULL: none) one with the fewest
 * slots of the plan is taken: which one never changes a result. CM_E_NO_OWNER: *expert_out has no owner
 * outside avoid; the plan is unusable, the caller waits for another epoch. */
CM_MUST_CHECK cm_status rt_plan_build(rt_plan *plan, const rt_plan_limits *limits,
                                      const pr_placement *placement, uint32_t layer, const int32_t *experts,
                                      const float *weights, uint32_t n_row, const uint8_t *wanted,
                                      const uint64_t *avoid, uint32_t *expert_out);
