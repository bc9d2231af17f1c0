/* Dispatch plans against a plain reading of their contract, over random placements. --seed N repeats a random
 * run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "router/plan/plan.h"

static uint64_t g_seed = 1;

typedef struct t_rng {
    uint64_t key, n;
} t_rng;

static uint32_t t_below(t_rng *rng, uint32_t n)
{
    return cm_rng_at(rng->key, rng->n++, 0).word[0] % n;
}

static uint32_t t_between(t_rng *rng, uint32_t low, uint32_t high)
{
    return low + t_below(rng, high - low + 1);
}

/* One batch and what it is planned with; arrays owned. */
typedef struct t_case {
    rt_plan_limits limits;
    pr_placement placement;
    uint32_t layer, n_row;
    int32_t *experts;
    float *weights;
    uint8_t *wanted; /* NULL: all */
    uint64_t *avoid; /* NULL: none */
} t_case;

/* Every expert with 1 .. replica_max different owners. */
static void t_placement_init(pr_placement *p, t_rng *rng, uint32_t n_layer, uint32_t n_expert,
                             uint32_t n_rank, uint32_t replica_max)
{
    *p = (pr_placement){.n_layer = n_layer, .n_expert = n_expert, .n_rank = n_rank};
    p->rank_member = calloc(n_rank, sizeof(uint32_t));
    p->first = calloc((size_t)n_layer * n_expert + 1, sizeof(uint32_t));
    p->owner = calloc((size_t)n_layer * n_expert * replica_max, sizeof(uint16_t));
    for (uint32_t i = 0; i < n_layer * n_expert; i++) {
        uint32_t n_owner = t_between(rng, 1, replica_max), start = t_below(rng, n_rank);
        for (uint32_t k = 0; k < n_owner; k++) {
            p->owner[p->first[i] + k] = (uint16_t)((start + k) % n_rank);
        }
        p->first[i + 1] = p->first[i] + n_owner;
    }
}

/* topk different experts for every row. */
static void t_batch_init(t_case *c, t_rng *rng, uint32_t n_row)
{
    uint32_t topk = c->limits.topk, n_expert = c->placement.n_expert;
    c->n_row = n_row;
    c->experts = calloc((size_t)n_row * topk + 1, sizeof(int32_t));
    c->weights = calloc((size_t)n_row * topk + 1, sizeof(float));
    for (uint32_t i = 0; i < n_row * topk; i++) {
        uint32_t e = t_below(rng, n_expert);
        for (uint32_t k = i / topk * topk; k < i; k++) {
            if (c->experts[k] == (int32_t)e) {
                e = (e + 1) % n_expert;
                k = i / topk * topk - 1;
            }
        }
        c->experts[i] = (int32_t)e;
        c->weights[i] = (float)t_below(rng, 1000) / 512.0f;
    }
}

static void t_case_fini(t_case *c)
{
    free(c->placement.rank_member);
    free(c->placement.first);
    free(c->placement.owner);
    free(c->experts);
    free(c->weights);
    free(c->wanted);
    free(c->avoid);
}

static uint32_t t_row_blocks(const t_case *c)
{
    return (c->limits.d + 127) / 128;
}

static bool t_avoided(const t_case *c, uint32_t rank)
{
    return c->avoid != NULL && (c->avoid[rank / 64] >> (rank % 64) & 1) != 0;
}

/* An owner of the slot's expert that need not be avoided. */
static bool t_may_ask(const t_case *c, uint32_t target, uint32_t rank)
{
    return pr_placement_owns(&c->placement, c->layer, (uint32_t)c->experts[target], rank) &&
           !t_avoided(c, rank);
}

static void t_part_check(const t_case *c, const rt_plan *plan, const rt_part *part, uint8_t *seen)
{
    const rt_plan_limits *limits = &c->limits;
    const uint32_t *rows = plan->rows + part->row0;
    const pr_slot *slots = plan->slots + part->slot0;
    uint8_t *has_slot = calloc(part->n_row, 1);
    assert_true(part->n_row > 0 && part->n_slot >= part->n_row);
    assert_in_range(part->rank, 0, c->placement.n_rank - 1);
    uint64_t bytes = pr_dispatch_bytes(part->n_slot, part->n_row, limits->d, t_row_blocks(c));
    assert_true(bytes <= limits->frame_bytes_max);
    assert_true((uint64_t)part->n_slot * limits->d * 2 <= limits->frame_bytes_max);
    for (uint32_t i = 0; i < part->n_row; i++) {
        assert_in_range(rows[i], 0, c->n_row - 1);
        assert_true(i == 0 || rows[i] > rows[i - 1]); /* distinct, ascending */
    }
    for (uint32_t i = 0; i < part->n_slot; i++) {
        uint32_t target = plan->targets[part->slot0 + i];
        assert_in_range(target, 0, c->n_row * limits->topk - 1);
        assert_int_equal(seen[target], 0);
        seen[target] = 1;
        assert_true(i == 0 || slots[i].expert > slots[i - 1].expert ||
                    (slots[i].expert == slots[i - 1].expert && slots[i].row > slots[i - 1].row));
        assert_in_range(slots[i].row, 0, part->n_row - 1);
        has_slot[slots[i].row] = 1;
        assert_int_equal(rows[slots[i].row], target / limits->topk);
        assert_int_equal(slots[i].expert, c->experts[target]);
        assert_true(slots[i].weight == c->weights[target]);
        assert_true(t_may_ask(c, target, part->rank));
    }
    for (uint32_t i = 0; i < part->n_row; i++) {
        assert_int_equal(has_slot[i], 1);
    }
    free(has_slot);
}

/* A receiver finds nothing to refuse in the frame made of the part. */
static void t_part_is_a_frame(const t_case *c, const rt_plan *plan, const rt_part *part)
{
    pr_dispatch header = {
        .head = {.version = PR_FRAME_VERSION, .dtype = PR_DTYPE_E4M3, .layer = c->layer},
        .d = c->limits.d,
        .n_row = part->n_row,
        .n_slot = part->n_slot,
        .row_blocks = t_row_blocks(c),
    };
    uint64_t bytes = pr_dispatch_bytes(part->n_slot, part->n_row, c->limits.d, header.row_blocks);
    cm_error err;
    cm_status status = pr_dispatch_check(&header, sizeof(header), plan->slots + part->slot0, bytes,
                                         c->limits.d, c->placement.n_layer, c->placement.n_expert, &err);
    if (status != CM_OK) {
        fail_msg("%s", err.text);
    }
}

static void t_plan_check(const t_case *c, const rt_plan *plan)
{
    uint32_t n_slot = c->n_row * c->limits.topk, row0 = 0, slot0 = 0;
    uint8_t *seen = calloc(n_slot + 1, 1);
    assert_in_range(plan->n_part, 0, plan->part_max);
    for (uint32_t i = 0; i < plan->n_part; i++) {
        const rt_part *part = &plan->parts[i];
        assert_int_equal(part->row0, row0);
        assert_int_equal(part->slot0, slot0);
        row0 += part->n_row;
        slot0 += part->n_slot;
        t_part_check(c, plan, part, seen);
        t_part_is_a_frame(c, plan, part);
        if (i > 0 &&
            part[-1].rank == part->rank) { /* a row is in one part to a rank: cuts are between rows */
            assert_true(plan->rows[part->row0] > plan->rows[part->row0 - 1]);
        } else {
            assert_true(i == 0 || part->rank > part[-1].rank);
        }
    }
    assert_int_equal(plan->n_row, row0);
    assert_int_equal(plan->n_slot, slot0);
    for (uint32_t i = 0; i < n_slot; i++) {
        assert_int_equal(seen[i],
                         c->wanted == NULL || c->wanted[i] != 0); /* each wanted slot once, no other */
    }
    free(seen);
}

/* Frames are only cut where the next row would not have fitted. */
static void t_plan_is_tight(const t_case *c, const rt_plan *plan)
{
    for (uint32_t i = 0; i + 1 < plan->n_part; i++) {
        const rt_part *part = &plan->parts[i], *next = part + 1;
        if (next->rank != part->rank) {
            continue;
        }
        uint32_t n = 0;
        for (uint32_t k = 0; k < next->n_slot; k++) {
            n += plan->slots[next->slot0 + k].row == 0;
        }
        uint64_t bytes = pr_dispatch_bytes(part->n_slot + n, part->n_row + 1, c->limits.d, t_row_blocks(c));
        uint64_t back = (uint64_t)(part->n_slot + n) * c->limits.d * 2;
        assert_true(bytes > c->limits.frame_bytes_max || back > c->limits.frame_bytes_max);
    }
}

static cm_status t_build(const t_case *c, rt_plan *plan, uint32_t *expert_out)
{
    cm_mem_guard_begin("rt_plan_build");
    cm_status status = rt_plan_build(plan, &c->limits, &c->placement, c->layer, c->experts, c->weights,
                                     c->n_row, c->wanted, c->avoid, expert_out);
    cm_mem_guard_end();
    return status;
}

static void t_random_case(t_case *c, t_rng *rng)
{
    uint32_t n_rank = t_between(rng, 1, 7), n_expert = t_between(rng, 8, 40), n_layer = t_between(rng, 1, 3);
    *c = (t_case){.limits = {.row_max = t_between(rng, 1, 50),
                             .topk = t_between(rng, 1, 8),
                             .d = 32 * t_between(rng, 1, 12)}};
    uint64_t slots_of_a_row = (uint64_t)c->limits.topk * c->limits.d * 2;
    uint64_t row = pr_dispatch_bytes(c->limits.topk, 1, c->limits.d, t_row_blocks(c));
    uint64_t least = row > slots_of_a_row ? row : slots_of_a_row;
    c->limits.frame_bytes_max = least + t_below(rng, (uint32_t)least * 8); /* mostly several frames a rank */
    t_placement_init(&c->placement, rng, n_layer, n_expert, n_rank, t_between(rng, 1, n_rank));
    c->layer = t_below(rng, n_layer);
    t_batch_init(c, rng, t_between(rng, 0, c->limits.row_max));
    if (t_below(rng, 2) == 0) {
        c->wanted = calloc((size_t)c->n_row * c->limits.topk + 1, 1);
        for (uint32_t i = 0; i < c->n_row * c->limits.topk; i++) {
            c->wanted[i] = (uint8_t)(t_below(rng, 3) * 127);
        }
    }
    if (t_below(rng, 3) == 0) {
        c->avoid = calloc(1, sizeof(uint64_t));
        c->avoid[0] = t_below(rng, 1u << n_rank);
    }
}

static void test_random_plans(void **state)
{
    (void)state;
    t_rng rng = {g_seed, 0};
    uint32_t n_cut = 0, n_refused = 0;
    for (uint32_t i = 0; i < 3000; i++) {
        t_case c;
        t_random_case(&c, &rng);
        rt_plan *plan = rt_plan_create(&c.limits);
        uint32_t expert = UINT32_MAX;
        cm_status status = t_build(&c, plan, &expert);
        bool owned = true;
        for (uint32_t k = 0; k < c.n_row * c.limits.topk; k++) {
            bool orphan = c.wanted == NULL || c.wanted[k];
            for (uint32_t r = 0; r < c.placement.n_rank; r++) {
                orphan = orphan && !t_may_ask(&c, k, r);
            }
            owned = owned && !orphan;
        }
        if (owned) {
            assert_int_equal(status, CM_OK);
            t_plan_check(&c, plan);
            t_plan_is_tight(&c, plan);
            n_cut += plan->n_part > c.placement.n_rank;
        } else {
            assert_int_equal(status, CM_E_NO_OWNER);
            n_refused++;
            uint32_t n_owner;
            const uint16_t *owners = pr_placement_owners(&c.placement, c.layer, expert, &n_owner);
            for (uint32_t k = 0; k < n_owner; k++) {
                assert_true(t_avoided(&c, owners[k]));
            }
        }
        rt_plan_destroy(plan);
        t_case_fini(&c);
    }
    print_message("%u plans with several frames to a rank, %u without an owner\n", n_cut, n_refused);
    assert_true(n_cut > 100 && n_refused > 100);
}

/* One plan object serves many batches: nothing of the last one is left. */
static void test_plan_is_used_again(void **state)
{
    (void)state;
    t_rng rng = {g_seed, 1u << 30};
    t_case c = {.limits = {.row_max = 40, .topk = 4, .d = 64, .frame_bytes_max = 4096}};
    t_placement_init(&c.placement, &rng, 2, 16, 5, 2);
    rt_plan *plan = rt_plan_create(&c.limits), *fresh = rt_plan_create(&c.limits);
    for (uint32_t i = 0; i < 50; i++) {
        uint32_t expert;
        t_batch_init(&c, &rng, t_between(&rng, 0, 40));
        c.layer = i % 2;
        assert_int_equal(t_build(&c, plan, &expert), CM_OK);
        t_plan_check(&c, plan);
        free(c.experts);
        free(c.weights);
    }
    t_batch_init(&c, &rng, 40);
    uint32_t expert;
    assert_int_equal(t_build(&c, plan, &expert), CM_OK);
    assert_int_equal(t_build(&c, fresh, &expert), CM_OK);
    assert_int_equal(plan->n_part, fresh->n_part);
    assert_memory_equal(plan->parts, fresh->parts, sizeof(rt_part) * plan->n_part);
    assert_memory_equal(plan->slots, fresh->slots, sizeof(pr_slot) * plan->n_slot);
    assert_memory_equal(plan->targets, fresh->targets, sizeof(uint32_t) * plan->n_slot);
    rt_plan_destroy(plan);
    rt_plan_destroy(fresh);
    t_case_fini(&c);
}

/* Only owners, those to avoid left out, down to none. */
static void test_avoid(void **state)
{
    (void)state;
    uint32_t member[] = {10, 11, 12}, first[] = {0, 3, 4}, expert = 0;
    uint16_t owner[] = {2, 0, 1, 1};
    int32_t experts[] = {0, 1};
    float weights[] = {0.5f, 0.25f};
    uint64_t avoid = 0;
    rt_plan_limits limits = {.row_max = 2, .topk = 1, .d = 128, .frame_bytes_max = 1 << 20};
    pr_placement p = {
        .n_layer = 1, .n_expert = 2, .n_rank = 3, .rank_member = member, .first = first, .owner = owner};
    rt_plan *plan = rt_plan_create(&limits);
    static const struct {
        uint64_t avoid;
        cm_status status;
        uint32_t ranks, expert;   /* bits of those that may be asked for expert 0; the one without an owner */
    } rows[] = {{0, CM_OK, 5, 0}, /* rank 1 has the other slot */
                {4, CM_OK, 1, 0},
                {5, CM_OK, 2, 0},
                {2, CM_E_NO_OWNER, 0, 1},
                {7, CM_E_NO_OWNER, 0, 1}};
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        avoid = rows[i].avoid;
        expert = 99;
        cm_status status = rt_plan_build(plan, &limits, &p, 0, experts, weights, 2, NULL, &avoid, &expert);
        assert_int_equal(status, rows[i].status);
        if (status != CM_OK) {
            assert_int_equal(expert, rows[i].expert);
            continue;
        }
        assert_int_equal(plan->n_slot, 2);
        for (uint32_t k = 0; k < plan->n_part; k++) {
            const rt_part *part = &plan->parts[k];
            for (uint32_t s = 0; s < part->n_slot; s++) {
                uint32_t may = plan->slots[part->slot0 + s].expert == 0 ? rows[i].ranks : 2;
                assert_true(may >> part->rank & 1);
            }
        }
    }
    rt_plan_destroy(plan);
}

/* Copies of an expert share its slots, and take less where their rank has others to compute. */
static void test_copies_share(void **state)
{
    (void)state;
    enum { ROWS = 60 };
    uint32_t member[] = {10, 11, 12}, first[] = {0, 3, 4}, expert, n_one = 0;
    uint16_t owner[] = {2, 0, 1, 1};
    int32_t experts[ROWS];
    float weights[ROWS];
    rt_plan_limits limits = {.row_max = ROWS, .topk = 1, .d = 128, .frame_bytes_max = 1 << 20};
    pr_placement p = {
        .n_layer = 1, .n_expert = 2, .n_rank = 3, .rank_member = member, .first = first, .owner = owner};
    rt_plan *plan = rt_plan_create(&limits);
    for (uint32_t i = 0; i < ROWS; i++) {
        experts[i] =
            i >= 50; /* 50 rows for the expert with three owners, 10 for the one that only rank 1 has */
        weights[i] = (float)(i % 7) / 16;
    }
    assert_int_equal(rt_plan_build(plan, &limits, &p, 0, experts, weights, ROWS, NULL, NULL, &expert), CM_OK);
    assert_int_equal(plan->n_part, 3);
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(plan->parts[i].n_slot, 20);
    }
    /* one row at a time: none of the owners is forgotten */
    uint32_t asked = 0;
    for (uint32_t i = 0; i < 50; i++) {
        weights[0] = 0.001f * (float)(i + 1);
        assert_int_equal(rt_plan_build(plan, &limits, &p, 0, experts, weights, 1, NULL, NULL, &expert),
                         CM_OK);
        asked |= 1u << plan->parts[0].rank;
        n_one += plan->parts[0].rank == 1;
    }
    assert_int_equal(asked, 7);
    assert_in_range(n_one, 5, 35);
    rt_plan_destroy(plan);
}

static void test_nothing_wanted(void **state)
{
    (void)state;
    t_rng rng = {g_seed, 1u << 29};
    t_case c = {.limits = {.row_max = 4, .topk = 2, .d = 64, .frame_bytes_max = 4096}};
    uint32_t expert;
    t_placement_init(&c.placement, &rng, 1, 8, 2, 1);
    t_batch_init(&c, &rng, 4);
    c.wanted = calloc(8, 1);
    rt_plan *plan = rt_plan_create(&c.limits);
    assert_int_equal(t_build(&c, plan, &expert), CM_OK);
    assert_int_equal(plan->n_part, 0);
    assert_int_equal(plan->n_row, 0);
    assert_int_equal(plan->n_slot, 0);
    rt_plan_destroy(plan);
    t_case_fini(&c);
}

/* The size of the largest model: 384 experts, 6 of them for each of 4096 rows of 7168 values, frames of 8
 * MiB. */
static void test_large(void **state)
{
    (void)state;
    t_rng rng = {g_seed, 1u << 28};
    t_case c = {.limits = {.row_max = 4096, .topk = 6, .d = 7168, .frame_bytes_max = 8u << 20}};
    uint32_t expert, capacity_sum = 0, member[7];
    uint64_t capacity[7];
    pr_placement *placement;
    cm_error err;
    for (uint32_t i = 0; i < 7; i++) {
        member[i] = 100 + i;
        capacity[i] = 4000;
        capacity_sum += 4000;
    }
    assert_in_range(capacity_sum, 61 * 384, UINT32_MAX);
    assert_int_equal(pr_placement_plan(61, 384, member, 7, capacity, NULL, &placement, &err), CM_OK);
    c.placement = *placement;
    c.layer = 60;
    t_batch_init(&c, &rng, 4096);
    rt_plan *plan = rt_plan_create(&c.limits);
    assert_in_range(plan->part_max, 7, 2000); /* memory of a plan stays small */
    assert_int_equal(t_build(&c, plan, &expert), CM_OK);
    assert_int_equal(plan->n_slot, 4096 * 6);
    t_plan_check(&c, plan);
    t_plan_is_tight(&c, plan);
    rt_plan_destroy(plan);
    c.placement = (pr_placement){0};
    t_case_fini(&c);
    pr_placement_free(placement);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--seed") == 0) {
        g_seed = strtoull(argv[2], NULL, 10);
    }
    printf("seed %llu\n", (unsigned long long)g_seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_random_plans),   cmocka_unit_test(test_plan_is_used_again),
        cmocka_unit_test(test_avoid),          cmocka_unit_test(test_copies_share),
        cmocka_unit_test(test_nothing_wanted), cmocka_unit_test(test_large),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
