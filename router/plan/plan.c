#include "router/plan/plan.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

enum { PLAN_UNWANTED = UINT16_MAX, PLAN_ANY = UINT16_MAX - 1 };
/* A part is ordered by halves of its experts' numbers; a short one by insertion. */
enum {
    PLAN_DIGIT_BITS = 6,
    PLAN_DIGITS = 1 << PLAN_DIGIT_BITS,
    PLAN_EXPERTS_MAX = PLAN_DIGITS * PLAN_DIGITS
};
enum { PLAN_FEW = 24 };

/* Of a rank whose frame is made in one go. */
typedef struct plan_rank {
    uint32_t slot0, n_row;
    uint32_t next; /* 1 + the newest row of the batch that has a slot here */
} plan_rank;

/* What the caller sees and, behind it, the work space of a build. */
typedef struct plan_memory {
    rt_plan plan;
    uint16_t *slot_rank; /* [slot_max] of each slot of the batch; PLAN_UNWANTED: none, PLAN_ANY: not yet */
    uint32_t at[PR_RANK_MAX];             /* where the rank's next slot goes; after scattering, its end */
    uint32_t expert_at[PLAN_EXPERTS_MAX]; /* slots of an expert with one owner; where its next slot goes */
    plan_rank ranks[PR_RANK_MAX];
    pr_slot *slots; /* [slot_max] of a part that is being ordered, half way */
    uint32_t *targets;
} plan_memory;

/* What is planned, as given. */
typedef struct plan_task {
    const rt_plan_limits *limits;
    const pr_placement *placement;
    const int32_t *experts;
    const float *weights;
    const uint32_t *first; /* of the layer: placement->first */
    uint32_t n_row;
    const uint8_t *wanted;
    const uint64_t *avoid;
} plan_task;

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
    memory->slots = cm_alloc(sizeof(pr_slot) * plan->slot_max);
    memory->targets = cm_alloc(sizeof(uint32_t) * plan->slot_max);
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
    cm_free(memory->slots);
    cm_free(memory->targets);
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

/* Slots with several owners, when those without a choice are counted. */
static cm_status plan_choose_any(plan_memory *memory, const plan_task *t, uint32_t *expert_out)
{
    uint32_t n_slot = t->n_row * t->limits->topk;
    for (uint32_t i = 0; i < n_slot; i++) {
        if (memory->slot_rank[i] != PLAN_ANY) {
            continue;
        }
        const uint32_t *first = t->first + t->experts[i];
        uint16_t rank = plan_least_loaded(memory, t->placement->owner + first[0], first[1] - first[0],
                                          t->avoid, t->weights[i]);
        if (rank == PLAN_UNWANTED) {
            *expert_out = (uint32_t)t->experts[i];
            return CM_E_NO_OWNER;
        }
        memory->slot_rank[i] = rank;
        memory->at[rank]++;
    }
    return CM_OK;
}

/* Chooses a rank for every wanted slot and counts them per rank: first where there is no choice, then where
 * there is. A layer of a large step has thousands of slots and there are dozens of layers: the loops over
 * slots here and below divide nothing and call nothing. */
static cm_status plan_choose(plan_memory *memory, const plan_task *t, uint32_t *n_any_out,
                             uint32_t *expert_out)
{
    uint32_t n_slot = t->n_row * t->limits->topk, n_expert = t->placement->n_expert, n_any = 0;
    uint32_t *at = memory->at;
    memset(at, 0, sizeof(at[0]) * t->placement->n_rank);
    memset(memory->expert_at, 0, sizeof(memory->expert_at[0]) * n_expert);
    for (uint32_t i = 0; i < n_slot; i++) {
        uint32_t expert = (uint32_t)t->experts[i];
        if (t->wanted != NULL && !t->wanted[i]) {
            memory->slot_rank[i] = PLAN_UNWANTED;
            continue;
        }
        CM_ASSERT_MSG(expert < n_expert, "slot %u: expert %d of %u", i, t->experts[i], n_expert);
        uint32_t first = t->first[expert], n_owner = t->first[expert + 1] - first;
        if (n_owner > 1) {
            memory->slot_rank[i] = PLAN_ANY;
            n_any++;
            continue;
        }
        if (n_owner == 0 || !plan_may_ask(t->avoid, t->placement->owner[first])) {
            *expert_out = expert;
            return CM_E_NO_OWNER;
        }
        uint16_t rank = t->placement->owner[first];
        memory->slot_rank[i] = rank;
        memory->expert_at[expert]++;
        at[rank]++;
    }
    *n_any_out = n_any;
    return n_any > 0 ? plan_choose_any(memory, t, expert_out) : CM_OK;
}

static rt_part *plan_part_add(rt_plan *plan, uint32_t rank, uint32_t slot0)
{
    CM_ASSERT_MSG(plan->n_part < plan->part_max, "%u parts", plan->part_max);
    rt_part *part = &plan->parts[plan->n_part++];
    *part = (rt_part){.rank = rank, .row0 = plan->n_row, .slot0 = slot0};
    return part;
}

/* ---- at once: every expert has one owner, and a rank's slots are surely one frame ---- */

static bool plan_is_plain(const plan_memory *memory, const plan_task *t, uint32_t n_any)
{
    for (uint32_t rank = 0; rank < t->placement->n_rank; rank++) {
        uint32_t n = memory->at[rank];
        if (n > 0 && !plan_fits(t->limits, n, n)) { /* a row has at least one slot */
            return false;
        }
    }
    return n_any == 0;
}

/* Where the slots of each rank and, within it, of each expert begin. */
static void plan_begin_ranks(plan_memory *memory, const plan_task *t)
{
    uint32_t n_before = 0, *at = memory->at;
    for (uint32_t rank = 0; rank < t->placement->n_rank; rank++) {
        memory->ranks[rank] = (plan_rank){.slot0 = n_before};
        n_before += at[rank];
        at[rank] = memory->ranks[rank].slot0;
    }
    for (uint32_t e = 0; e < t->placement->n_expert; e++) {
        uint32_t n = memory->expert_at[e];
        if (n > 0) {
            uint32_t *rank_at = &at[t->placement->owner[t->first[e]]];
            memory->expert_at[e] = *rank_at;
            *rank_at += n;
        }
    }
    memory->plan.n_slot = n_before;
}

/* Slots to their places, in the batch's order; rows are counted on the way, a rank's from its first slot on.
 * Whether a slot begins a row is a coin's throw to a branch predictor: there is none. */
static void plan_put_slots(plan_memory *memory, const plan_task *t)
{
    uint32_t topk = t->limits->topk, *targets = memory->plan.targets, *rows = memory->plan.rows;
    pr_slot *slots = memory->plan.slots;
    for (uint32_t row = 0, i = 0; row < t->n_row; row++) {
        for (uint32_t k = 0; k < topk; k++, i++) {
            if (memory->slot_rank[i] == PLAN_UNWANTED) {
                continue;
            }
            uint32_t expert = (uint32_t)t->experts[i], to = memory->expert_at[expert]++;
            plan_rank *rank = &memory->ranks[memory->slot_rank[i]];
            rank->n_row += rank->next != row + 1;
            rank->next = row + 1;
            rows[rank->slot0 + rank->n_row - 1] = row;
            targets[to] = i;
            slots[to] = (pr_slot){rank->n_row - 1, expert, t->weights[i]};
        }
    }
}

static void plan_build_plain(plan_memory *memory, const plan_task *t)
{
    rt_plan *plan = &memory->plan;
    plan_begin_ranks(memory, t);
    plan_put_slots(memory, t);
    for (uint32_t i = 0; i < t->placement->n_rank; i++) {
        const plan_rank *rank = &memory->ranks[i];
        if (rank->n_row > 0) {
            rt_part *part = plan_part_add(plan, i, rank->slot0);
            part->n_slot = memory->at[i] - rank->slot0;
            part->n_row = rank->n_row;
            memmove(plan->rows + plan->n_row, plan->rows + rank->slot0, sizeof(uint32_t) * rank->n_row);
            plan->n_row += rank->n_row;
        }
    }
}

/* ---- else: by rank, cut into frames, each ordered by expert ---- */

/* Sorts the slots of the batch by rank into plan->targets and plan->slots; within a rank they stay ordered by
 * (row, slot) until rows are counted. Rows are the batch's as yet. */
static void plan_scatter(plan_memory *memory, const plan_task *t)
{
    uint32_t n_before = 0, topk = t->limits->topk;
    uint32_t *at = memory->at, *targets = memory->plan.targets;
    pr_slot *slots = memory->plan.slots;
    for (uint32_t rank = 0; rank < t->placement->n_rank; rank++) {
        uint32_t n = at[rank];
        at[rank] = n_before;
        n_before += n;
    }
    for (uint32_t row = 0, i = 0; row < t->n_row; row++) {
        for (uint32_t k = 0; k < topk; k++, i++) {
            uint16_t rank = memory->slot_rank[i];
            if (rank != PLAN_UNWANTED) {
                uint32_t to = at[rank]++;
                targets[to] = i;
                slots[to] = (pr_slot){row, (uint32_t)t->experts[i], t->weights[i]};
            }
        }
    }
    memory->plan.n_slot = n_before;
}

/* One rank's slots, slot0 .. end - 1, as one frame. */
static void plan_put_whole(rt_plan *plan, uint32_t rank, uint32_t slot0, uint32_t end)
{
    rt_part *part = plan_part_add(plan, rank, slot0);
    pr_slot *slots = plan->slots;
    uint32_t *rows = plan->rows + plan->n_row, n_row = 1, row = slots[slot0].row;
    for (uint32_t i = slot0; i < end; i++) {
        n_row += slots[i].row != row;
        row = slots[i].row;
        rows[n_row - 1] = row;
        slots[i].row = n_row - 1;
    }
    plan->n_row += n_row;
    part->n_row = n_row;
    part->n_slot = end - slot0;
}

/* Cuts one rank's slots, slot0 .. end - 1, into frames. A row's slots stay together. */
static void plan_cut(rt_plan *plan, const rt_plan_limits *limits, uint32_t rank, uint32_t slot0, uint32_t end)
{
    pr_slot *slots = plan->slots;
    rt_part *part = NULL;
    for (uint32_t i = slot0; i < end;) {
        uint32_t row = slots[i].row, n = 1;
        while (i + n < end && slots[i + n].row == row) {
            n++;
        }
        if (part == NULL || !plan_fits(limits, part->n_slot + n, part->n_row + 1)) {
            part = plan_part_add(plan, rank, i);
        }
        part->n_slot += n;
        for (; n > 0; n--, i++) {
            slots[i].row = part->n_row;
        }
        plan->rows[plan->n_row++] = row;
        part->n_row++;
    }
}

/* ---- by expert ---- */

static void plan_order_few(pr_slot *slots, uint32_t *targets, uint32_t n)
{
    for (uint32_t i = 1; i < n; i++) {
        pr_slot slot = slots[i];
        uint32_t target = targets[i], at = i;
        for (; at > 0 && slots[at - 1].expert > slot.expert; at--) {
            slots[at] = slots[at - 1];
            targets[at] = targets[at - 1];
        }
        slots[at] = slot;
        targets[at] = target;
    }
}

/* Keeps the order of slots whose experts agree in this half. */
static void plan_order_half(const pr_slot *slots, const uint32_t *targets, uint32_t n, uint32_t shift,
                            pr_slot *slots_out, uint32_t *targets_out)
{
    uint32_t at[PLAN_DIGITS] = {0}, n_before = 0;
    for (uint32_t i = 0; i < n; i++) {
        at[slots[i].expert >> shift & (PLAN_DIGITS - 1)]++;
    }
    for (uint32_t k = 0; k < PLAN_DIGITS; k++) {
        uint32_t n_here = at[k];
        at[k] = n_before;
        n_before += n_here;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t to = at[slots[i].expert >> shift & (PLAN_DIGITS - 1)]++;
        slots_out[to] = slots[i];
        targets_out[to] = targets[i];
    }
}

/* From (row, slot) to (expert, row). */
static void plan_order(const plan_memory *memory, const rt_part *part)
{
    pr_slot *slots = memory->plan.slots + part->slot0;
    uint32_t *targets = memory->plan.targets + part->slot0, n = part->n_slot;
    if (n <= PLAN_FEW) {
        plan_order_few(slots, targets, n);
        return;
    }
    plan_order_half(slots, targets, n, 0, memory->slots, memory->targets);
    plan_order_half(memory->slots, memory->targets, n, PLAN_DIGIT_BITS, slots, targets);
}

static void plan_build_frames(plan_memory *memory, const plan_task *t)
{
    rt_plan *plan = &memory->plan;
    plan_scatter(memory, t);
    for (uint32_t rank = 0, slot0 = 0; rank < t->placement->n_rank; rank++) {
        uint32_t end = memory->at[rank], n = end - slot0;
        if (n > 0 && plan_fits(t->limits, n, n)) { /* surely: a row has at least one slot */
            plan_put_whole(plan, rank, slot0, end);
        } else {
            plan_cut(plan, t->limits, rank, slot0, end);
        }
        slot0 = end;
    }
    for (uint32_t i = 0; i < plan->n_part; i++) {
        plan_order(memory, &plan->parts[i]);
    }
}

cm_status rt_plan_build(rt_plan *plan, const rt_plan_limits *limits, const pr_placement *placement,
                        uint32_t layer, const int32_t *experts, const float *weights, uint32_t n_row,
                        const uint8_t *wanted, const uint64_t *avoid, uint32_t *expert_out)
{
    plan_memory *memory = (plan_memory *)plan;
    CM_ASSERT_MSG(n_row <= limits->row_max && (uint64_t)n_row * limits->topk <= plan->slot_max,
                  "%u rows of %u, %u slots", n_row, limits->row_max, plan->slot_max);
    CM_ASSERT_MSG(layer < placement->n_layer && placement->n_rank <= PR_RANK_MAX &&
                      placement->n_expert <= PLAN_EXPERTS_MAX,
                  "layer %u of %u, %u ranks, %u experts", layer, placement->n_layer, placement->n_rank,
                  placement->n_expert);
    plan_task task = {.limits = limits,
                      .placement = placement,
                      .experts = experts,
                      .weights = weights,
                      .first = placement->first + (size_t)layer * placement->n_expert,
                      .n_row = n_row,
                      .wanted = wanted,
                      .avoid = avoid};
    plan->n_part = plan->n_row = plan->n_slot = 0;
    uint32_t n_any;
    CM_TRY(plan_choose(memory, &task, &n_any, expert_out));
    if (plan_is_plain(memory, &task, n_any)) {
        plan_build_plain(memory, &task);
    } else {
        plan_build_frames(memory, &task);
    }
    return CM_OK;
}
