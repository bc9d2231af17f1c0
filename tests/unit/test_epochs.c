/* What epochs mean to a worker: whose frames it computes, which experts it keeps. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "worker/epochs_core.h"

enum { D = 128, LAYERS = 2, EXPERTS = 6, ROUTER = 30, CLUSTER = 9 };

static pc_epoch *make_epoch(uint64_t number, uint64_t cluster, const uint32_t *ids, uint32_t n)
{
    static const uint64_t capacity[4] = {UINT64_MAX, UINT64_MAX, UINT64_MAX, UINT64_MAX};
    cm_error err;
    pc_epoch *epoch = cm_alloc(sizeof(*epoch));
    epoch->refs = 1;
    epoch->number = number;
    epoch->cluster = cluster;
    assert_int_equal(pr_placement_plan(LAYERS, EXPERTS, ids, n, capacity, NULL, &epoch->placement, &err),
                     CM_OK);
    return epoch;
}

static bool holds(const void *ctx, uint32_t layer, uint32_t expert)
{
    const bool *held = ctx;
    return held[layer * EXPERTS + expert];
}

typedef struct frame {
    pr_dispatch header;
    _Alignas(64) uint8_t payload[512];
    size_t n_bytes;
} frame;

static frame make_frame(uint64_t epoch, uint32_t expert)
{
    frame f = {.header = {.head = {.version = PR_FRAME_VERSION,
                                   .dtype = PR_DTYPE_E4M3,
                                   .router = ROUTER,
                                   .cluster = CLUSTER,
                                   .epoch = epoch},
                          .d = D,
                          .n_row = 1,
                          .n_slot = 1,
                          .row_blocks = 1}};
    f.n_bytes = pr_dispatch_bytes(1, 1, D, 1);
    memcpy(f.payload, &(pr_slot){.row = 0, .expert = expert, .weight = 1}, sizeof(pr_slot));
    return f;
}

static cm_status check(const wk_serve *serve, const frame *f, const bool *held)
{
    uint32_t expert = 0;
    return wk_serve_check(serve, ROUTER, &f->header, sizeof(f->header), f->payload, f->n_bytes, holds, held,
                          &expert, NULL);
}

/* An expert of layer 0 that the rank owns, or one that it does not. */
static uint32_t expert_of(const pc_epoch *epoch, uint32_t rank, bool owned)
{
    uint32_t e = 0;
    while (pr_placement_owns(epoch->placement, 0, e, rank) != owned) {
        e++;
    }
    return e;
}

static void test_whose_frames_are_taken(void **state)
{
    const uint32_t ids[] = {1, 2};
    wk_serve serve = {.d = D, .n_layer = LAYERS, .n_expert = EXPERTS, .row_max = 8};
    pc_epoch *epoch = make_epoch(4, CLUSTER, ids, 2), *next = make_epoch(5, CLUSTER, ids, 2);
    bool held[LAYERS * EXPERTS];
    (void)state;
    memset(held, true, sizeof(held));
    uint32_t ours = expert_of(epoch, 1, true);
    frame f = make_frame(4, ours);
    assert_int_equal(check(&serve, &f, held), CM_E_STALE);
    wk_serve_commit(&serve, epoch, 2);
    assert_int_equal(check(&serve, &f, held), CM_OK);
    held[ours] = false;
    assert_int_equal(check(&serve, &f, held), CM_E_NO_OWNER);
    held[ours] = true;
    frame other = make_frame(4, expert_of(epoch, 1, false));
    assert_int_equal(check(&serve, &other, held), CM_E_NO_OWNER);
    other = f;
    other.header.head.cluster++;
    assert_int_equal(check(&serve, &other, held), CM_E_STALE);
    other = f;
    other.header.head.router++;
    assert_int_equal(check(&serve, &other, held), CM_E_PROTOCOL);

    wk_serve_commit(&serve, next, 2); /* both are served until the first is retired */
    frame g = make_frame(5, ours);
    assert_int_equal(check(&serve, &f, held), CM_OK);
    assert_int_equal(check(&serve, &g, held), CM_OK);
    wk_serve_retire(&serve, 5);
    assert_int_equal(check(&serve, &f, held), CM_E_STALE);
    assert_int_equal(check(&serve, &g, held), CM_OK);
    wk_serve_fini(&serve);
    pc_epoch_release(epoch);
    pc_epoch_release(next);
}

/* More epochs than places: the oldest goes. */
static void test_the_oldest_goes(void **state)
{
    const uint32_t ids[] = {1};
    wk_serve serve = {.d = D, .n_layer = LAYERS, .n_expert = EXPERTS, .row_max = 8};
    bool held[LAYERS * EXPERTS];
    (void)state;
    memset(held, true, sizeof(held));
    for (uint64_t number = 1; number <= WK_EPOCHS + 1; number++) {
        pc_epoch *epoch = make_epoch(number, CLUSTER, ids, 1);
        wk_serve_commit(&serve, epoch, 1);
        pc_epoch_release(epoch);
    }
    frame first = make_frame(1, 0), second = make_frame(2, 0);
    assert_int_equal(check(&serve, &first, held), CM_E_STALE);
    assert_int_equal(check(&serve, &second, held), CM_OK);
    assert_int_equal(serve.newest, WK_EPOCHS + 1);
    wk_serve_fini(&serve);
}

static bool kept(const wk_hold *hold, const pc_epoch *epoch)
{
    const pr_placement *placements[WK_EPOCHS + 1];
    uint32_t ranks[WK_EPOCHS + 1], n = wk_hold_list(hold, 1, placements, ranks);
    for (uint32_t i = 0; i < n; i++) {
        if (placements[i] == epoch->placement) {
            return true;
        }
    }
    return false;
}

static void test_what_is_kept(void **state)
{
    const uint32_t ids[] = {1, 2};
    wk_hold hold = {0};
    pc_epoch *epochs[8];
    (void)state;
    for (uint32_t i = 1; i < 8; i++) {
        epochs[i] = make_epoch(i, CLUSTER, ids, 2);
    }
    wk_hold_prepare(&hold, epochs[1]);
    assert_true(kept(&hold, epochs[1]));
    assert_false(wk_hold_abort(&hold, 2));
    wk_hold_commit(&hold, epochs[1]);
    wk_hold_prepare(&hold, epochs[2]);
    assert_true(kept(&hold, epochs[1]) && kept(&hold, epochs[2]));
    assert_true(wk_hold_abort(&hold, 2));
    assert_true(kept(&hold, epochs[1]) && !kept(&hold, epochs[2]));
    wk_hold_prepare(&hold, epochs[3]);
    wk_hold_commit(&hold, epochs[3]);
    wk_hold_retire(&hold, 3);
    assert_true(!kept(&hold, epochs[1]) && kept(&hold, epochs[3]));
    wk_hold_retire(&hold,
                   7); /* left out since: nobody asks for any of it, and what comes next needs the room */
    assert_false(kept(&hold, epochs[3]));
    wk_hold_commit(&hold, epochs[3]);
    for (uint32_t i = 4; i < 8; i++) {
        wk_hold_commit(&hold, epochs[i]);
    }
    assert_true(!kept(&hold, epochs[3]) && kept(&hold, epochs[4]));
    wk_hold_fini(&hold);
    for (uint32_t i = 1; i < 8; i++) {
        pc_epoch_release(epochs[i]);
    }
}

/* A coordinator without its log begins a cluster that counts from 1: what is held of the one before must not
 * outlive its newer epochs. */
static void test_another_cluster_counts_anew(void **state)
{
    const uint32_t ids[] = {1};
    wk_serve serve = {.d = D, .n_layer = LAYERS, .n_expert = EXPERTS, .row_max = 8};
    wk_hold hold = {0};
    pc_epoch *before[WK_EPOCHS], *after[3];
    bool held[LAYERS * EXPERTS];
    (void)state;
    memset(held, true, sizeof(held));
    for (uint32_t i = 0; i < WK_EPOCHS; i++) {
        before[i] = make_epoch(50 + i, CLUSTER + 1, ids, 1);
        wk_serve_commit(&serve, before[i], 1);
        wk_hold_commit(&hold, before[i]);
    }
    pc_epoch *prepared = make_epoch(60, CLUSTER + 1, ids, 1);
    wk_hold_prepare(&hold, prepared);
    for (uint32_t i = 0; i < 3; i++) {
        after[i] = make_epoch(1 + i, CLUSTER, ids, 1);
        wk_serve_commit(&serve, after[i], 1);
        wk_hold_commit(&hold, after[i]);
        assert_false(kept(&hold, prepared)); /* nobody will commit it */
    }
    for (uint32_t i = 0; i < 3; i++) {
        frame f = make_frame(1 + i, 0);
        assert_int_equal(check(&serve, &f, held), CM_OK);
    }
    frame f = make_frame(53, 0);
    f.header.head.cluster = CLUSTER + 1;
    wk_serve_retire(&serve, 0);
    assert_int_equal(check(&serve, &f, held), CM_OK); /* its routers have not heard of us yet */
    wk_serve_retire(&serve, 2);
    wk_hold_retire(&hold, 2);
    assert_int_equal(check(&serve, &f, held), CM_E_STALE);
    f = make_frame(2, 0);
    assert_int_equal(check(&serve, &f, held), CM_OK);
    assert_false(kept(&hold, before[WK_EPOCHS - 1]) || kept(&hold, after[0]));
    assert_true(kept(&hold, after[1]) && kept(&hold, after[2]));
    wk_serve_fini(&serve);
    wk_hold_fini(&hold);
    pc_epoch_release(prepared);
    for (uint32_t i = 0; i < WK_EPOCHS; i++) {
        pc_epoch_release(before[i]);
    }
    for (uint32_t i = 0; i < 3; i++) {
        pc_epoch_release(after[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whose_frames_are_taken),
        cmocka_unit_test(test_the_oldest_goes),
        cmocka_unit_test(test_what_is_kept),
        cmocka_unit_test(test_another_cluster_counts_anew),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
