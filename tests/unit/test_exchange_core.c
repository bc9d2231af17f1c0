/* The exchange's machine by itself: links, rounds, answers that count and answers that do not, an end to
 * waiting. Links are numbers; time is a number. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "router/engine/exchange_core.h"

enum { D = 128, ROWS = 4, TOPK = 2, LAYERS = 1, EXPERTS = 4, SELF = 50, ANSWER_MS = 100, WAIT_MS = 1000 };

typedef struct rig {
    rt_xcore *core;
    uint64_t now;
    uint8_t *staging, codes[ROWS * D], scales[ROWS];
    int32_t experts[ROWS * TOPK];
    float weights[ROWS * TOPK];
    uint16_t results[ROWS * TOPK * D];
    pr_dispatch sent[16]; /* frames of the layer, in order */
    uint64_t staged_at[16];
    uint32_t sent_rank[16], sent_flight[16], n_sent;
    uint32_t n_adopted, n_disconnect, n_report, reported;
    cm_status reported_status;
    bool reported_again;
} rig;

static pc_epoch *make_epoch(uint64_t number, const uint32_t *ids, uint32_t n)
{
    static const uint64_t capacity[4] = {UINT64_MAX, UINT64_MAX, UINT64_MAX, UINT64_MAX};
    cm_error err;
    pc_epoch *epoch = cm_alloc(sizeof(*epoch));
    epoch->refs = 1;
    epoch->number = number;
    epoch->cluster = 9;
    epoch->n_member = n;
    epoch->members = cm_alloc(sizeof(*epoch->members) * n);
    for (uint32_t i = 0; i < n; i++) {
        epoch->members[i].id = ids[i];
        epoch->members[i].data_address = cm_strdup("there");
    }
    assert_int_equal(pr_placement_plan(LAYERS, EXPERTS, ids, n, capacity, NULL, &epoch->placement, &err),
                     CM_OK);
    return epoch;
}

/* A link is named by its member and how often it was made. */
static void *handle_of(uint32_t member, uint32_t life)
{
    return (void *)(uintptr_t)(member * 100 + life);
}

static uint32_t g_life;

/* All chores; links that begin come up at once when up is set. */
static void chores(rig *r, bool up)
{
    rt_xact act;
    while (rt_xcore_chore(r->core, r->now, &act)) {
        r->n_adopted += act.kind == RT_XACT_ADOPTED;
        r->n_disconnect += act.kind == RT_XACT_DISCONNECT;
        if (act.kind == RT_XACT_REPORT) {
            r->n_report++;
            r->reported = rt_xcore_link(r->core, act.rank).member_id;
            r->reported_status = act.status;
            r->reported_again = act.again;
        } else if (act.kind == RT_XACT_CONNECT) {
            void *handle = handle_of(rt_xcore_link(r->core, act.rank).member_id, ++g_life);
            rt_xcore_connecting(r->core, r->now, act.rank, handle);
            if (up) {
                rt_xcore_up(r->core, handle);
            }
        }
    }
}

static void offer(rig *r, uint64_t number, const uint32_t *ids, uint32_t n)
{
    pc_epoch *epoch = make_epoch(number, ids, n);
    rt_xcore_offer(r->core, epoch, SELF);
    pc_epoch_release(epoch);
}

static void rig_init_with(rig *r, const rt_plan_limits *limits)
{
    memset(r, 0, sizeof(*r));
    r->now = 5000;
    r->core =
        rt_xcore_create(&(rt_xcore_options){.limits = *limits, .answer_ms = ANSWER_MS, .wait_ms = WAIT_MS});
    r->staging = cm_alloc_aligned(rt_xcore_staging_bytes(r->core));
    for (uint32_t i = 0; i < ROWS * TOPK; i++) {
        r->experts[i] = (int32_t)((i / TOPK + i % TOPK) % EXPERTS);
        r->weights[i] = 1;
    }
    const uint32_t ids[] = {1, 2};
    offer(r, 1, ids, 2);
    chores(r, true);
    assert_true(rt_xcore_ready(r->core));
}

static void rig_init(rig *r)
{
    rig_init_with(r, &(rt_plan_limits){.row_max = ROWS, .topk = TOPK, .d = D, .frame_bytes_max = 1 << 16});
}

static void rig_fini(rig *r)
{
    rt_xcore_destroy(r->core);
    cm_free(r->staging);
}

/* Rows row0 .. row0 + n_row - 1. */
static void begin_flight(rig *r, uint32_t flight, uint32_t row0, uint32_t n_row)
{
    rt_xcore_begin(r->core, flight,
                   &(rt_xcore_layer){.step = 7,
                                     .layer = 0,
                                     .n_row = n_row,
                                     .experts = r->experts + row0 * TOPK,
                                     .weights = r->weights + row0 * TOPK,
                                     .codes = r->codes + row0 * D,
                                     .scales = r->scales + row0,
                                     .results = r->results + row0 * TOPK * D});
}

static void begin(rig *r)
{
    memset(r->results, 0xee, sizeof(r->results));
    r->n_sent = 0;
    begin_flight(r, 0, 0, ROWS);
}

/* Sends what there is to send, then waits or is done. */
static rt_xact go(rig *r)
{
    for (;;) {
        chores(r, true);
        rt_xact act = rt_xcore_next(r->core, r->now);
        if (act.kind == RT_XACT_SEND) {
            r->sent_rank[r->n_sent] = act.rank;
            r->sent_flight[r->n_sent] = act.flight;
            r->staged_at[r->n_sent] = act.staged_at;
            rt_xcore_pack(r->core, act.flight, act.part, &r->sent[r->n_sent++], r->staging + act.staged_at);
            rt_xcore_sent(r->core, CM_OK);
        } else if (act.kind != RT_XACT_WAIT || act.until_ms > r->now) {
            return act;
        }
    }
}

static cm_status answer_slots(rig *r, uint32_t i, const void *handle, uint32_t slot0, uint32_t n_slot)
{
    static uint16_t rows[ROWS * TOPK * D];
    pr_combine header = {.head = r->sent[i].head, .d = D, .slot0 = slot0, .n_slot = n_slot};
    header.head.dtype = PR_DTYPE_BF16;
    memset(rows, (int)i + 1, sizeof(rows));
    return rt_xcore_combine(r->core, handle, &header, sizeof(header), rows, 2ull * header.n_slot * D, NULL);
}

static cm_status answer(rig *r, uint32_t i, const void *handle)
{
    return answer_slots(r, i, handle, 0, r->sent[i].n_slot);
}

static void *link_of(const rig *r, uint32_t rank)
{
    return rt_xcore_link(r->core, rank).handle;
}

static void left(rig *r, uint32_t n)
{
    while (n-- > 0) {
        rt_xcore_left(r->core, 0);
    }
}

static void all_written(const rig *r)
{
    for (uint32_t i = 0; i < ROWS * TOPK * D; i++) {
        assert_int_not_equal(r->results[i], 0xeeee);
    }
}

/* An answer in pieces counts piece by piece, in order; what came before its link was lost is not asked again.
 */
static void test_answer_in_pieces(void **state)
{
    rig r;
    (void)state;
    rig_init(&r);
    begin(&r);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    void *link = link_of(&r, 0);
    uint32_t n = r.sent[0].n_slot;
    assert_true(n > 3);
    assert_int_equal(answer_slots(&r, 0, link, 1, n - 1), CM_E_PROTOCOL); /* a hole */
    assert_int_equal(answer_slots(&r, 0, link, 0, 0), CM_E_PROTOCOL);
    assert_int_equal(answer_slots(&r, 0, link, 0, 2), CM_OK);
    assert_int_equal(answer_slots(&r, 0, link, 0, 2), CM_E_PROTOCOL);     /* twice */
    assert_int_equal(answer_slots(&r, 0, link, 2, n - 1), CM_E_PROTOCOL); /* beyond the end */
    assert_int_equal(answer_slots(&r, 0, link, 2, UINT32_MAX - 1), CM_E_PROTOCOL);
    assert_int_equal(answer(&r, 1, link_of(&r, 1)), CM_OK);
    left(&r, 2);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT); /* it is not over */
    assert_int_equal(answer_slots(&r, 0, link, 2, 1), CM_OK);
    rt_xcore_down(r.core, r.now, link, CM_E_RESET);
    uint32_t n_before = r.n_sent, n_again = 0;
    for (uint32_t i = 0; i < 50 && r.n_sent == n_before; i++) {
        r.now += 100;
        (void)go(&r);
    }
    for (uint32_t i = n_before; i < r.n_sent; i++) {
        n_again += r.sent[i].n_slot;
        assert_int_equal(answer(&r, i, link_of(&r, r.sent_rank[i])), CM_OK);
    }
    assert_int_equal(n_again, n - 3);
    left(&r, r.n_sent - n_before);
    rt_xact act = go(&r);
    assert_int_equal(act.kind, RT_XACT_DONE);
    assert_int_equal(act.status, CM_OK);
    all_written(&r);
    rig_fini(&r);
}

/* A layer whose results are more than caches hold: each slot has its row, and all of it. */
static void test_many_results(void **state)
{
    enum { MANY_D = 4096, N = (17 << 20) / (2 * TOPK * MANY_D), BLOCKS = MANY_D / 128 };
    rig r;
    (void)state;
    rig_init_with(&r,
                  &(rt_plan_limits){.row_max = N, .topk = TOPK, .d = MANY_D, .frame_bytes_max = 16 << 20});
    rt_xcore_layer layer = {.n_row = N};
    int32_t *experts = cm_alloc(sizeof(int32_t) * N * TOPK);
    layer.experts = experts;
    layer.weights = cm_alloc(sizeof(float) * N * TOPK);
    layer.codes = cm_alloc((size_t)N * MANY_D);
    layer.scales = cm_alloc((size_t)N * BLOCKS);
    layer.results = cm_alloc_aligned(2ull * N * TOPK * MANY_D);
    uint16_t *rows = cm_alloc(2ull * N * TOPK * MANY_D);
    uint8_t *seen = cm_alloc(N * TOPK);
    for (uint32_t i = 0; i < N * TOPK; i++) {
        experts[i] = (int32_t)((i / TOPK + i % TOPK) % EXPERTS);
    }
    rt_xcore_begin(r.core, 0, &layer);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    for (uint32_t i = 0, n_before = 0; i < r.n_sent; n_before += r.sent[i++].n_slot) {
        pr_combine header = {.head = r.sent[i].head, .d = MANY_D, .n_slot = r.sent[i].n_slot};
        header.head.dtype = PR_DTYPE_BF16;
        for (uint64_t k = 0; k < (uint64_t)header.n_slot * MANY_D; k++) {
            rows[k] = (uint16_t)(1 + n_before + k / MANY_D);
        }
        assert_int_equal(rt_xcore_combine(r.core, link_of(&r, r.sent_rank[i]), &header, sizeof(header), rows,
                                          2ull * header.n_slot * MANY_D, NULL),
                         CM_OK);
    }
    left(&r, r.n_sent);
    assert_int_equal(go(&r).kind, RT_XACT_DONE);
    for (uint32_t i = 0; i < N * TOPK; i++) {
        uint16_t which = layer.results[(size_t)i * MANY_D];
        assert_in_range(which, 1, N * TOPK);
        assert_int_equal(seen[which - 1]++, 0);
        for (uint32_t k = 1; k < MANY_D; k++) {
            assert_int_equal(layer.results[(size_t)i * MANY_D + k], which);
        }
    }
    cm_free(experts);
    cm_free((void *)(uintptr_t)layer.weights);
    cm_free((void *)(uintptr_t)layer.codes);
    cm_free((void *)(uintptr_t)layer.scales);
    cm_free(layer.results);
    cm_free(rows);
    cm_free(seen);
    rig_fini(&r);
}

static void test_only_what_is_open_counts(void **state)
{
    rig r;
    (void)state;
    rig_init(&r);
    begin(&r);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(r.n_sent, 2);
    assert_int_equal(answer(&r, 0, link_of(&r, 1)), CM_E_PROTOCOL); /* another worker's link */
    pr_dispatch good = r.sent[0];
    r.sent[0].head.exchange -= 1; /* an earlier round */
    assert_int_equal(answer(&r, 0, link_of(&r, 0)), CM_E_PROTOCOL);
    r.sent[0] = good;
    r.sent[0].head.epoch = 0;
    assert_int_equal(answer(&r, 0, link_of(&r, 0)), CM_E_PROTOCOL);
    r.sent[0] = good;
    r.sent[0].n_slot++;
    assert_int_equal(answer(&r, 0, link_of(&r, 0)), CM_E_PROTOCOL);
    r.sent[0] = good;
    assert_int_equal(answer(&r, 0, link_of(&r, 0)), CM_OK);
    assert_int_equal(answer(&r, 0, link_of(&r, 0)), CM_E_PROTOCOL); /* twice */
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(answer(&r, 1, link_of(&r, 1)), CM_OK);
    rt_xact done = go(&r);
    assert_int_equal(done.kind, RT_XACT_DONE);
    assert_int_equal(done.status, CM_OK);
    all_written(&r);
    left(&r, 2);
    assert_int_equal(rt_xcore_n_open(r.core), 0);
    rig_fini(&r);
}

static void test_a_lost_worker_is_planned_around(void **state)
{
    rig r;
    (void)state;
    rig_init(&r);
    begin(&r);
    go(&r);
    left(&r, 2);
    assert_int_equal(answer(&r, 0, link_of(&r, 0)), CM_OK);
    void *kept = link_of(&r, 0);
    rt_xcore_down(r.core, r.now, link_of(&r, 1), CM_E_RESET);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(r.n_report, 1);
    assert_int_equal(r.reported, 2);
    const uint32_t ids[] = {1};
    offer(&r, 2, ids, 1);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT); /* for the answer: what was lost was asked again at once */
    assert_int_equal(r.n_sent, 3);
    assert_int_equal(r.sent[2].head.epoch, 2);
    assert_int_equal(r.sent[2].n_slot, r.sent[1].n_slot); /* and nothing else */
    assert_ptr_equal(link_of(&r, 0), kept);
    assert_int_equal(answer(&r, 1, kept), CM_E_PROTOCOL);
    assert_int_equal(answer(&r, 2, kept), CM_OK);
    assert_int_equal(go(&r).status, CM_OK);
    all_written(&r);
    left(&r, 1);
    rig_fini(&r);
}

static void test_silence_costs_the_link(void **state)
{
    rig r;
    (void)state;
    rig_init(&r);
    begin(&r);
    rt_xact wait = go(&r);
    left(&r, 2);
    assert_int_equal(wait.until_ms, r.now + ANSWER_MS);
    assert_int_equal(answer(&r, 1, link_of(&r, 1)), CM_OK);
    r.now += ANSWER_MS;
    go(&r); /* notices */
    chores(&r, false);
    assert_int_equal(r.n_disconnect, 1);
    assert_int_equal(r.n_report, 1);
    assert_int_equal(r.reported, 1);
    assert_int_equal(r.reported_status, CM_E_DEADLINE);
    r.now += 200; /* it is tried again and comes back */
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(r.n_sent, 3);
    assert_int_equal(r.sent_rank[2], 0);
    assert_int_equal(answer(&r, 2, link_of(&r, 0)), CM_OK);
    assert_int_equal(go(&r).status, CM_OK);
    left(&r, 1);
    rig_fini(&r);
}

static void test_a_full_link_is_asked_again(void **state)
{
    rig r;
    (void)state;
    rig_init(&r);
    begin(&r);
    rt_xact first = rt_xcore_next(r.core, r.now);
    assert_int_equal(first.kind, RT_XACT_SEND);
    assert_false(first.again);
    rt_xcore_sent(r.core, CM_AGAIN);
    assert_int_equal(rt_xcore_next(r.core, r.now).kind, RT_XACT_WAIT);
    rt_xact second = rt_xcore_next(r.core, r.now);
    assert_int_equal(second.kind, RT_XACT_SEND);
    assert_true(second.again);
    assert_int_equal(second.part, first.part);
    assert_int_equal(second.staged_at, first.staged_at);
    rt_xcore_sent(r.core, CM_E_RESET); /* and then it is gone: not open, not leaving */
    rt_xcore_down(r.core, r.now, link_of(&r, 0), CM_E_RESET);
    go(&r);
    assert_int_equal(rt_xcore_n_open(r.core), 2); /* the other: unanswered, and leaving */
    left(&r, 1);
    rt_xcore_stop(r.core);
    assert_int_equal(go(&r).status, CM_E_CANCELLED);
    rig_fini(&r);
}

static void test_memory_is_not_used_while_frames_leave(void **state)
{
    rig r;
    (void)state;
    rig_init(&r);
    begin(&r);
    go(&r);
    assert_int_equal(answer(&r, 0, link_of(&r, 0)), CM_OK);
    assert_int_equal(answer(&r, 1, link_of(&r, 1)), CM_OK);
    assert_int_equal(go(&r).kind, RT_XACT_DONE); /* answered before it was known that they left */
    begin(&r);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(r.n_sent, 0);
    left(&r, 1);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(r.n_sent, 0);
    left(&r, 1);
    go(&r);
    assert_int_equal(r.n_sent, 2);
    left(&r, 2);
    rig_fini(&r);
}

static void test_waiting_has_an_end(void **state)
{
    rig r;
    (void)state;
    rig_init(&r);
    begin(&r);
    go(&r);
    left(&r, 2);
    assert_int_equal(answer(&r, 0, link_of(&r, 0)), CM_OK);
    pr_refuse refusal = {.head = r.sent[1].head, .status = CM_E_STALE, .epoch = 2};
    assert_int_equal(rt_xcore_refuse(r.core, link_of(&r, 1), &refusal, sizeof(refusal), NULL), CM_OK);
    uint64_t since = r.now;
    rt_xact act;
    while ((act = go(&r)).kind == RT_XACT_WAIT) {
        assert_true(act.until_ms > r.now);
        r.now = act.until_ms;
        uint32_t last = r.n_sent - 1;
        if (last > 1 || rt_xcore_n_open(r.core) > 0) { /* asked again, refused again */
            refusal.head = r.sent[last].head;
            cm_status status = rt_xcore_refuse(r.core, link_of(&r, 1), &refusal, sizeof(refusal), NULL);
            r.n_sent = status == CM_OK ? last : r.n_sent;
            left(&r, status == CM_OK ? 1 : 0);
        }
    }
    assert_int_equal(act.kind, RT_XACT_DONE);
    assert_int_equal(act.status, CM_E_NO_OWNER);
    assert_in_range(r.now - since, WAIT_MS, WAIT_MS + ANSWER_MS + 50);
    assert_int_equal(rt_xcore_n_retries(r.core), 1);
    rig_fini(&r);
}

/* The coordinator hears of a lost link, hears again now and then that it still is, and hears of its end. */
static void test_a_cut_is_told_until_it_is_over(void **state)
{
    rig r;
    uint32_t n_attempt = 0;
    (void)state;
    rig_init(&r);
    uint64_t since = r.now;
    rt_xcore_down(r.core, r.now, link_of(&r, 1), CM_E_SILENT);
    chores(&r, false);
    assert_int_equal(r.n_report, 1);
    assert_int_equal(r.reported, 2);
    assert_int_equal(r.reported_status, CM_E_SILENT);
    assert_false(r.reported_again);
    for (; r.n_report < 3; r.now += 50) {
        assert_true(r.now < since + 10000);
        chores(&r, false);
        if (rt_xcore_link(r.core, 1).handle != NULL) {
            rt_xcore_down(r.core, r.now, link_of(&r, 1), CM_E_UNREACHABLE);
            n_attempt++;
        }
    }
    assert_true(r.reported_again);
    assert_int_equal(r.reported_status, CM_E_UNREACHABLE);
    assert_true(n_attempt > 10); /* not one report for each */
    rt_xact act;
    while (rt_xcore_chore(r.core, r.now, &act)) {
        assert_int_equal(act.kind, RT_XACT_CONNECT);
        rt_xcore_connecting(r.core, r.now, act.rank, NULL); /* what cannot even begin is no other thing */
    }
    r.now += 2000;
    chores(&r, true);
    assert_int_equal(r.n_report, 4);
    assert_int_equal(r.reported, 2);
    assert_int_equal(r.reported_status, CM_OK);
    chores(&r, true);
    assert_int_equal(r.n_report, 4);
    rig_fini(&r);
}

static void test_another_name_greets_anew(void **state)
{
    rig r;
    (void)state;
    rig_init(&r);
    const uint32_t ids[] = {1, 2};
    offer(&r, 2, ids, 2);
    chores(&r, true);
    assert_int_equal(r.n_disconnect, 0);
    pc_epoch *epoch = make_epoch(3, ids, 2);
    rt_xcore_offer(r.core, epoch, SELF + 1);
    pc_epoch_release(epoch);
    chores(&r, false);
    assert_int_equal(r.n_adopted, 3);
    assert_int_equal(r.n_disconnect, 2);
    assert_int_equal(rt_xcore_self(r.core), SELF + 1);
    assert_false(rt_xcore_ready(r.core));
    rig_fini(&r);
}

/* ---- two flights ---- */

/* Both halves of the rows, all frames sent. */
static void begin_two(rig *r)
{
    memset(r->results, 0xee, sizeof(r->results));
    r->n_sent = 0;
    begin_flight(r, 0, 0, ROWS / 2);
    assert_int_equal(go(r).kind, RT_XACT_WAIT);
    begin_flight(r, 1, ROWS / 2, ROWS / 2);
    assert_int_equal(go(r).kind, RT_XACT_WAIT);
    assert_int_equal(r->n_sent, 4);
}

static void left_two(rig *r, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        rt_xcore_left(r->core, 0);
        rt_xcore_left(r->core, 1);
    }
}

static cm_status answer_own(rig *r, uint32_t i)
{
    return answer(r, i, link_of(r, r->sent_rank[i]));
}

static void test_two_flights_keep_apart(void **state)
{
    rig r;
    (void)state;
    rig_init(&r);
    begin_two(&r);
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(r.sent_flight[i], i / 2);
        assert_int_equal(r.sent[i].flight, i / 2); /* the worker is told */
        for (uint32_t k = 0; k < i; k++) {         /* nobody's memory is another's */
            assert_int_not_equal(r.sent[i].head.exchange, r.sent[k].head.exchange);
            assert_true(r.staged_at[i] > r.staged_at[k]);
        }
    }
    assert_int_equal(answer_own(&r, 3), CM_OK);
    assert_int_equal(answer_own(&r, 2), CM_OK); /* the second is done first */
    rt_xact done = go(&r);
    assert_int_equal(done.kind, RT_XACT_DONE);
    assert_int_equal(done.flight, 1);
    assert_int_equal(done.status, CM_OK);
    for (uint32_t i = 0; i < ROWS * TOPK * D; i++) { /* its rows, and no others */
        assert_int_equal(r.results[i] != 0xeeee, i >= ROWS / 2 * TOPK * D);
    }
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(answer_own(&r, 0), CM_OK);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT); /* not before all its slots have come */
    assert_int_equal(answer_own(&r, 1), CM_OK);
    done = go(&r);
    assert_int_equal(done.kind, RT_XACT_DONE);
    assert_int_equal(done.flight, 0);
    all_written(&r);
    left_two(&r, 2);
    assert_int_equal(rt_xcore_n_open(r.core), 0);
    rig_fini(&r);
}

static void test_a_lost_link_fails_both_flights(void **state)
{
    rig r;
    (void)state;
    rig_init(&r);
    begin_two(&r);
    left_two(&r, 2);
    uint32_t n_lost = 0;
    for (uint32_t i = 0; i < 4; i++) {
        n_lost += r.sent[i].n_slot * (r.sent_rank[i] == 1);
        assert_int_equal(r.sent_rank[i] == 0 ? answer_own(&r, i) : CM_OK, CM_OK);
    }
    const uint32_t ids[] = {1};
    rt_xcore_down(r.core, r.now, link_of(&r, 1), CM_E_RESET);
    offer(&r, 2, ids, 1);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(r.n_sent, 6); /* each asks again for what it lost */
    assert_int_equal(r.sent[4].n_slot + r.sent[5].n_slot, n_lost);
    assert_int_not_equal(r.sent_flight[4], r.sent_flight[5]);
    assert_int_equal(answer_own(&r, 4), CM_OK);
    assert_int_equal(go(&r).kind, RT_XACT_DONE);
    assert_int_equal(answer_own(&r, 5), CM_OK);
    assert_int_equal(go(&r).kind, RT_XACT_DONE);
    all_written(&r);
    left_two(&r, 1);
    rig_fini(&r);
}

/* Rounds under way end on the epoch they began with; no new one begins before the next epoch is in force. */
static void test_an_epoch_waits_for_both_flights(void **state)
{
    rig r;
    (void)state;
    rig_init(&r);
    begin_two(&r);
    left_two(&r, 2);
    const uint32_t ids[] = {2, 1};
    offer(&r, 2, ids, 2);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(r.n_adopted, 1);
    assert_int_equal(answer_own(&r, 0), CM_OK);
    assert_int_equal(answer_own(&r, 1), CM_OK);
    assert_int_equal(go(&r).kind, RT_XACT_DONE);
    begin_flight(&r, 0, 0, ROWS / 2); /* the next layer of the first micro-batch */
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(r.n_sent, 4); /* held back */
    assert_int_equal(r.n_adopted, 1);
    assert_int_equal(answer_own(&r, 2), CM_OK);
    assert_int_equal(answer_own(&r, 3), CM_OK);
    rt_xact act = go(&r);
    assert_int_equal(act.kind, RT_XACT_DONE);
    assert_int_equal(act.flight, 1);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(r.n_adopted, 2);
    assert_int_equal(r.n_sent, 6);
    assert_int_equal(r.sent[4].head.epoch, 2);
    assert_int_equal(answer_own(&r, 4), CM_OK);
    assert_int_equal(answer_own(&r, 5), CM_OK);
    assert_int_equal(go(&r).status, CM_OK);
    all_written(&r);
    left(&r, 2);
    rig_fini(&r);
}

static void test_a_dropped_flight_hears_nothing(void **state)
{
    rig r;
    (void)state;
    rig_init(&r);
    begin_two(&r);
    rt_xcore_drop(r.core, 0);
    rt_xcore_drop(r.core, 1);
    assert_int_equal(answer_own(&r, 0), CM_E_PROTOCOL);
    assert_int_equal(answer_own(&r, 3), CM_E_PROTOCOL);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(rt_xcore_n_open(r.core), 4); /* leaving */
    r.n_sent = 0;
    begin_flight(&r, 1, 0, ROWS / 2);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(r.n_sent, 0); /* its memory is not free */
    left_two(&r, 2);
    assert_int_equal(go(&r).kind, RT_XACT_WAIT);
    assert_int_equal(r.n_sent, 2);
    rt_xcore_drop(r.core, 1);
    rt_xcore_left(r.core, 1);
    rt_xcore_left(r.core, 1);
    assert_int_equal(rt_xcore_n_open(r.core), 0);
    rig_fini(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_answer_in_pieces),
        cmocka_unit_test(test_many_results),
        cmocka_unit_test(test_only_what_is_open_counts),
        cmocka_unit_test(test_a_lost_worker_is_planned_around),
        cmocka_unit_test(test_silence_costs_the_link),
        cmocka_unit_test(test_a_full_link_is_asked_again),
        cmocka_unit_test(test_memory_is_not_used_while_frames_leave),
        cmocka_unit_test(test_waiting_has_an_end),
        cmocka_unit_test(test_a_cut_is_told_until_it_is_over),
        cmocka_unit_test(test_another_name_greets_anew),
        cmocka_unit_test(test_two_flights_keep_apart),
        cmocka_unit_test(test_a_lost_link_fails_both_flights),
        cmocka_unit_test(test_an_epoch_waits_for_both_flights),
        cmocka_unit_test(test_a_dropped_flight_hears_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
