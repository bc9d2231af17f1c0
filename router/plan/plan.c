#include "router/plan/plan.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

/* What the caller sees and, behind it, the work space of a build. */
typedef struct plan_memory {
    rt_plan plan;
    uint16_t *slot_rank;      /* [slot_max] of each slot of the batch; PLAN_UNWANTED: none */
    uint32_t at[PR_RANK_MAX]; /* where the rank's next slot goes; after scattering, its end */
} plan_memory;

enum { PLAN_UNWANTED = UINT16_MAX };

static bool plan_fits(const rt_plan_limits *limits, uint32_t n_slot, uint32_t n_row)
{
    uint32_t row_blocks = limits->d / 128 + (limits->d % 128 != 0);
    return pr_dispatch_bytes(n_slot, n_row, limits->d, row_blocks) <= limits->frame_bytes_max &&
           (uint64_t)n_slot * limits->d * 2 <= limits->frame_bytes_max;
}

/* A frame is closed when the next row does not fit, so all but the last to a rank hold at least as many rows
 * as fit with all their slots going to that rank. */
static uint32_t plan_part_max(const rt_plan_limits *limits, uint32_t slot_max)
{
    uint32_t n_row = 1;
    CM_ASSERT_MSG(plan_fits(limits, limits->topk, 1),
                  "a row of %u values with %u slots is over a frame of %llu bytes", limits->d, limits->topk,
                  (unsigned long long)limits->frame_bytes_max);
    while (n_row < limits->row_max && plan_fits(limits, (n_row + 1) * limits->topk, n_row + 1)) {
        n_row++;
    }
    uint32_t part_max = slot_max / n_row + PR_RANK_MAX;
    return part_max < slot_max ? part_max : slot_max;
}

rt_plan *rt_plan_create(const rt_plan_limits *limits)
{
    CM_ASSERT(limits->row_max > 0 && limits->topk > 0 && limits->d > 0);
    CM_ASSERT_MSG((uint64_t)limits->row_max * limits->topk < 1u << 30, "%u rows of %u slots", limits->row_max,
                  limits->topk);
    plan_memory *memory = cm_alloc(sizeof(*memory));
    rt_plan *plan = &memory->plan;
    plan->slot_max = limits->row_max * limits->topk;
    plan->part_max = plan_part_max(limits, plan->slot_max);
    plan->parts = cm_alloc(sizeof(rt_part) * plan->part_max);
    plan->rows = cm_alloc(sizeof(uint32_t) * plan->slot_max); /* a frame row has at least one slot */
    plan->slots = cm_alloc(sizeof(pr_slot) * plan->slot_max);
    plan->targets = cm_alloc(sizeof(uint32_t) * plan->slot_max);
    memory->slot_rank = cm_alloc(sizeof(uint16_t) * plan->slot_max);
    return plan;
}

void rt_plan_destroy(rt_plan *plan)
{
    plan_memory *memory = (plan_memory *)plan;
    cm_free(plan->parts);
    cm_free(plan->rows);
    cm_free(plan->slots);
    cm_free(plan->targets);
    cm_free(memory->slot_rank);
    cm_free(memory);
}

static bool plan_may_ask(const uint64_t *avoid, uint16_t rank)
{
    return avoid == NULL || (avoid[rank / 64] >> (rank % 64) & 1) == 0;
}

/* Of several owners the one with the fewest slots of the plan so far; among equals the slot's weight decides,
 * which differs from token to token, so that small batches do not all ask the same one. PLAN_UNWANTED when
 * nobody may be asked. */
static uint16_t plan_least_loaded(const plan_memory *memory, const uint16_t *owners, uint32_t n_owner,
                                  const uint64_t *avoid, float weight)
{
    uint32_t bits;
    uint16_t best = PLAN_UNWANTED;
    memcpy(&bits, &weight, sizeof(bits));
    for (uint32_t i = 0; i < n_owner; i++) {
        uint16_t rank = owners[(i + (bits ^ bits >> 16)) % n_owner];
        if (plan_may_ask(avoid, rank) && (best == PLAN_UNWANTED || memory->at[rank] < memory->at[best])) {
            best = rank;
        }
    }
    return best;
}

/* Chooses a rank for every wanted slot and counts them per rank: first where there is no choice, then where
 * there is.
 */
static cm_status plan_choose(plan_memory *memory, const pr_placement *placement, uint32_t layer,
                             const int32_t *experts, const float *weights, uint32_t n_slot,
                             const uint8_t *wanted, const uint64_t *avoid, uint32_t *expert_out)
{
    memset(memory->at, 0, sizeof(memory->at));
    for (uint32_t i = 0; i < n_slot; i++) {
        memory->slot_rank[i] = PLAN_UNWANTED;
    }
    for (uint32_t pass = 0; pass < 2; pass++) {
        for (uint32_t i = 0; i < n_slot; i++) {
            uint32_t n_owner;
            if (wanted != NULL && !wanted[i]) {
                continue;
            }
            CM_ASSERT_MSG(experts[i] >= 0 && (uint32_t)experts[i] < placement->n_expert,
                          "slot %u: expert %d of %u", i, experts[i], placement->n_expert);
            const uint16_t *owners = pr_placement_owners(placement, layer, (uint32_t)experts[i], &n_owner);
            if ((n_owner > 1) != (pass == 1)) {
                continue;
            }
            uint16_t rank = plan_least_loaded(memory, owners, n_owner, avoid, weights[i]);
            if (rank == PLAN_UNWANTED) {
                *expert_out = (uint32_t)experts[i];
                return CM_E_NO_OWNER;
            }
            memory->slot_rank[i] = rank;
            memory->at[rank]++;
        }
    }
    return CM_OK;
}

/* Sorts the slots of the batch by rank into plan->targets; within a rank they stay ordered by (row, slot). */
static void plan_scatter(plan_memory *memory, uint32_t n_rank, uint32_t n_slot)
{
    uint32_t n_before = 0;
    for (uint32_t rank = 0; rank < n_rank; rank++) {
        uint32_t n = memory->at[rank];
        memory->at[rank] = n_before;
        n_before += n;
    }
    for (uint32_t i = 0; i < n_slot; i++) {
        if (memory->slot_rank[i] != PLAN_UNWANTED) {
            memory->plan.targets[memory->at[memory->slot_rank[i]]++] = i;
        }
    }
    memory->plan.n_slot = n_before;
}

static rt_part *plan_part_add(rt_plan *plan, uint32_t rank, uint32_t slot0)
{
    CM_ASSERT_MSG(plan->n_part < plan->part_max, "%u parts", plan->part_max);
    rt_part *part = &plan->parts[plan->n_part++];
    *part = (rt_part){.rank = rank, .row0 = plan->n_row, .slot0 = slot0};
    return part;
}

/* Cuts one rank's slots, targets slot0 .. end - 1, into frames. A row's slots stay together. */
static void plan_cut(rt_plan *plan, const rt_plan_limits *limits, const int32_t *experts,
                     const float *weights, uint32_t rank, uint32_t slot0, uint32_t end)
{
    rt_part *part = NULL;
    for (uint32_t i = slot0; i < end;) {
        uint32_t row = plan->targets[i] / limits->topk, n = 1;
        while (i + n < end && plan->targets[i + n] / limits->topk == row) {
            n++;
        }
        if (part == NULL || !plan_fits(limits, part->n_slot + n, part->n_row + 1)) {
            part = plan_part_add(plan, rank, i);
        }
        for (uint32_t k = 0; k < n; k++, i++) {
            uint32_t target = plan->targets[i];
            plan->slots[i] = (pr_slot){part->n_row, (uint32_t)experts[target], weights[target]};
        }
        plan->rows[plan->n_row++] = row;
        part->n_row++;
        part->n_slot += n;
    }
}

cm_status rt_plan_build(rt_plan *plan, const rt_plan_limits *limits, const pr_placement *placement,
                        uint32_t layer, const int32_t *experts, const float *weights, uint32_t n_row,
                        const uint8_t *wanted, const uint64_t *avoid, uint32_t *expert_out)
{
    plan_memory *memory = (plan_memory *)plan;
    CM_ASSERT_MSG(n_row <= limits->row_max && (uint64_t)n_row * limits->topk <= plan->slot_max,
                  "%u rows of %u, %u slots", n_row, limits->row_max, plan->slot_max);
    CM_ASSERT_MSG(layer < placement->n_layer && placement->n_rank <= PR_RANK_MAX, "layer %u of %u, %u ranks",
                  layer, placement->n_layer, placement->n_rank);
    uint32_t n_slot = n_row * limits->topk;
    plan->n_part = plan->n_row = plan->n_slot = 0;
    CM_TRY(plan_choose(memory, placement, layer, experts, weights, n_slot, wanted, avoid, expert_out));
    plan_scatter(memory, placement->n_rank, n_slot);
    for (uint32_t rank = 0, slot0 = 0; rank < placement->n_rank; rank++) {
        plan_cut(plan, limits, experts, weights, rank, slot0, memory->at[rank]);
        slot0 = memory->at[rank];
    }
    return CM_OK;
}
