/* Which router computes which stream: what is left behind, and who waits for whom. The rest is t_reopen's. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "gateway/place_core.h"

enum { A = 1, B = 2 };

static uint64_t g_now_ms;

static void begin(gw_place *place, uint32_t opens_max)
{
    gw_place_limits limits = {
        .reopen_ms = 60000, .rebind_ms = 300, .leave_ms = 5000, .opens_max = opens_max, .seed = 1};
    g_now_ms = 1000;
    gw_place_init(place, &limits);
}

static void expect_act(gw_place *place, gw_place_act act, const gw_spot *spot, uint64_t router)
{
    gw_place_action action;
    assert_true(gw_place_next(place, g_now_ms, &action));
    assert_int_equal(action.act, act);
    assert_ptr_equal(action.spot, spot);
    assert_int_equal(action.router, router);
}

static void expect_rest(gw_place *place)
{
    gw_place_action action;
    assert_false(gw_place_next(place, g_now_ms, &action));
}

static void expect_end(gw_place *place, gw_spot *spot, uint64_t router)
{
    uint64_t routers[GW_PLACE_COPIES];
    uint32_t n = gw_place_end(place, spot, routers);
    assert_int_equal(n, router != 0);
    if (n > 0) {
        assert_int_equal(routers[0], router);
    }
}

/* Runs at A, its link is lost and A is not reached: asked for at B. */
static void move_to_b(gw_place *place, gw_spot *spot)
{
    gw_place_up(place, A);
    gw_place_begin(place, g_now_ms, spot, 0);
    expect_act(place, GW_PLACE_OPEN, spot, A);
    gw_place_word(place, g_now_ms, spot, true);
    gw_place_up(place, B);
    gw_place_down(place, g_now_ms, A);
    gw_place_unreachable(place, A);
    expect_act(place, GW_PLACE_OPEN, spot, B);
}

static void a_copy_is_forgotten(void **state)
{
    gw_place place;
    gw_spot spot = {0};
    (void)state;
    begin(&place, 4);
    move_to_b(&place, &spot);
    gw_place_word(&place, g_now_ms, &spot, false);
    expect_rest(&place); /* A may come back */
    gw_place_up(&place, A);
    expect_act(&place, GW_PLACE_FORGET, &spot, A);
    expect_rest(&place);
    expect_end(&place, &spot, 0);
    gw_place_fini(&place);
}

/* Its client goes away before B has answered: A computes it for nobody. */
static void who_ends_leaves_a_copy(void **state)
{
    gw_place place;
    gw_spot spot = {0};
    (void)state;
    begin(&place, 4);
    move_to_b(&place, &spot);
    gw_place_up(&place, A);
    expect_end(&place, &spot, A);
    expect_rest(&place);
    gw_place_fini(&place);
}

/* B accepts and ends it in one frame, before anybody asked what to do. */
static void who_ends_at_once_leaves_a_copy(void **state)
{
    gw_place place;
    gw_spot spot = {0};
    (void)state;
    begin(&place, 4);
    move_to_b(&place, &spot);
    gw_place_up(&place, A);
    gw_place_word(&place, g_now_ms, &spot, true);
    expect_end(&place, &spot, A);
    gw_place_fini(&place);
}

static void who_is_not_linked_is_not_told(void **state)
{
    gw_place place;
    gw_spot spot = {0};
    (void)state;
    begin(&place, 4);
    move_to_b(&place, &spot);
    expect_end(&place, &spot, 0);
    gw_place_fini(&place);
}

/* B is lost as well: the copy at A still has to go once the stream runs elsewhere. */
static void a_copy_outlives_the_next_loss(void **state)
{
    gw_place place;
    gw_spot spot = {0};
    (void)state;
    begin(&place, 4);
    move_to_b(&place, &spot);
    gw_place_word(&place, g_now_ms, &spot, true);
    gw_place_down(&place, g_now_ms, B);
    expect_rest(&place); /* B may be back in a moment */
    gw_place_up(&place, B);
    expect_act(&place, GW_PLACE_RESUME, &spot, B);
    gw_place_word(&place, g_now_ms, &spot, true);
    gw_place_up(&place, A);
    expect_act(&place, GW_PLACE_FORGET, &spot, A);
    expect_end(&place, &spot, 0);
    gw_place_fini(&place);
}

/* A has it already and rests for saying so; meanwhile A is to be drained: it is still where the stream goes
 * on. */
static void a_rest_ends_also_at_who_is_drained(void **state)
{
    gw_place place;
    gw_spot spot = {0};
    (void)state;
    begin(&place, 4);
    gw_place_up(&place, A);
    gw_place_begin(&place, g_now_ms, &spot, 0);
    expect_act(&place, GW_PLACE_OPEN, &spot, A);
    assert_true(gw_place_refused(&place, g_now_ms, &spot, CM_E_EXISTS));
    gw_place_stands(&place, g_now_ms, A, GW_PLACE_DRAINING);
    expect_rest(&place);
    uint64_t due_ms = gw_place_due(&place, g_now_ms);
    assert_in_range(due_ms, g_now_ms + 1, g_now_ms + 1000);
    g_now_ms = due_ms;
    expect_act(&place, GW_PLACE_RESUME, &spot, A);
    expect_end(&place, &spot, 0);
    gw_place_fini(&place);
}

/* B fails it: A has it still, and it goes on there. */
static void a_copy_is_gone_back_to(void **state)
{
    gw_place place;
    gw_spot spot = {0};
    (void)state;
    begin(&place, 4);
    move_to_b(&place, &spot);
    gw_place_word(&place, g_now_ms, &spot, true);
    expect_rest(&place);
    assert_true(gw_place_refused(&place, g_now_ms, &spot, CM_E_UNAVAILABLE));
    gw_place_up(&place, A);
    expect_act(&place, GW_PLACE_RESUME, &spot, A);
    expect_end(&place, &spot, 0);
    gw_place_fini(&place);
}

/* Many clients come back for streams at A, whose answers take their time: others go to B meanwhile. */
static void a_turn_at_one_router_holds_up_nobody(void **state)
{
    gw_place place;
    gw_spot first = {0}, second = {0}, third = {0};
    (void)state;
    begin(&place, 1);
    gw_place_up(&place, A);
    gw_place_up(&place, B);
    gw_place_begin(&place, g_now_ms, &first, A);
    gw_place_begin(&place, g_now_ms, &second, A);
    gw_place_begin(&place, g_now_ms, &third, 0);
    expect_act(&place, GW_PLACE_RESUME, &first, A);
    expect_act(&place, GW_PLACE_OPEN, &third, B);
    expect_rest(&place);
    gw_place_word(&place, g_now_ms, &first, true);
    expect_act(&place, GW_PLACE_RESUME, &second, A);
    expect_end(&place, &first, 0);
    expect_end(&place, &second, 0);
    expect_end(&place, &third, 0);
    gw_place_fini(&place);
}

/* No router takes the first; the second has one that has it. */
static void a_queue_holds_up_no_resume(void **state)
{
    gw_place place;
    gw_spot first = {0}, second = {0}, third = {0};
    (void)state;
    begin(&place, 1);
    gw_place_begin(&place, g_now_ms, &first, 0);
    gw_place_begin(&place, g_now_ms, &second, A);
    gw_place_begin(&place, g_now_ms, &third, 0);
    gw_place_stands(&place, g_now_ms, A, GW_PLACE_DRAINING);
    gw_place_up(&place, A);
    expect_act(&place, GW_PLACE_RESUME, &second, A);
    expect_rest(&place);
    gw_place_up(&place, B);
    expect_act(&place, GW_PLACE_OPEN, &first, B); /* first come, first served */
    expect_act(&place, GW_PLACE_OPEN, &third, B);
    expect_end(&place, &first, 0);
    expect_end(&place, &second, 0);
    expect_end(&place, &third, 0);
    gw_place_fini(&place);
}

/* ---- affinity ---- */

/* Where a new stream is sent, and gone again. */
static uint64_t sent_to(gw_place *place, uint64_t affinity)
{
    gw_place_action action;
    gw_spot spot = {.affinity = affinity};
    uint64_t copies[GW_PLACE_COPIES];
    gw_place_begin(place, g_now_ms, &spot, 0);
    assert_true(gw_place_next(place, g_now_ms, &action));
    assert_int_equal(action.act, GW_PLACE_OPEN);
    gw_place_end(place, &spot, copies);
    return action.router;
}

static void idle(gw_place *place, uint32_t n_router)
{
    for (uint64_t r = 1; r <= n_router; r++) {
        gw_place_load(place, r, 10);
    }
}

static void routers_up(gw_place *place, uint32_t n_router)
{
    begin(place, 4);
    for (uint64_t r = 1; r <= n_router; r++) {
        gw_place_name(place, r, 100 + r);
        gw_place_up(place, r);
    }
    idle(place, n_router);
}

/* Streams of one affinity go to one router, others elsewhere, all routers have their share; who is gone takes
 * only its own along. */
static void who_begin_alike_go_together(void **state)
{
    enum { ROUTERS = 4, STREAMS = 400 };
    gw_place place;
    uint64_t first[STREAMS + 1];
    uint32_t share[ROUTERS + 1] = {0};
    (void)state;
    routers_up(&place, ROUTERS);
    for (uint64_t a = 1; a <= STREAMS; a++) {
        idle(&place, ROUTERS);
        first[a] = sent_to(&place, a);
        share[first[a]]++;
        assert_int_equal(sent_to(&place, a), first[a]);
    }
    for (uint32_t r = 1; r <= ROUTERS; r++) {
        assert_in_range(share[r], STREAMS / ROUTERS / 2, STREAMS / ROUTERS * 2);
    }
    gw_place_down(&place, g_now_ms, 3);
    for (uint64_t a = 1; a <= STREAMS; a++) {
        idle(&place, ROUTERS);
        uint64_t now = sent_to(&place, a);
        assert_true(now == first[a] || first[a] == 3);
        assert_int_not_equal(now, 3);
    }
    gw_place_fini(&place);
}

/* Gateways hear of routers in other orders; names are what they have in common. */
static void gateways_agree(void **state)
{
    gw_place one, other;
    (void)state;
    routers_up(&one, 3);
    begin(&other, 4);
    for (uint64_t r = 1; r <= 3; r++) {
        gw_place_name(&other, r, 104 - r);
        gw_place_up(&other, r);
    }
    for (uint64_t a = 1; a <= 50; a++) {
        idle(&one, 3);
        idle(&other, 3);
        assert_int_equal(sent_to(&one, a), 4 - sent_to(&other, a));
    }
    gw_place_fini(&one);
    gw_place_fini(&other);
}

/* A router that has much more to do than the idlest is nobody's choice; without an affinity it is the idlest.
 */
static void the_busy_are_spared(void **state)
{
    gw_place place;
    (void)state;
    routers_up(&place, 2);
    for (uint64_t a = 1; a <= 50; a++) {
        idle(&place, 2);
        uint64_t chosen = sent_to(&place, a), other = 3 - chosen;
        gw_place_load(&place, chosen, 14); /* 10 + 10 / 4 + 2 */
        gw_place_load(&place, other, 10);
        assert_int_equal(sent_to(&place, a), chosen);
        gw_place_load(&place, chosen, 15);
        gw_place_load(&place, other, 10);
        assert_int_equal(sent_to(&place, a), other);
        gw_place_load(&place, chosen, 11);
        gw_place_load(&place, other, 10);
        assert_int_equal(sent_to(&place, 0), other);
    }
    gw_place_fini(&place);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_copy_is_forgotten),
        cmocka_unit_test(who_ends_leaves_a_copy),
        cmocka_unit_test(who_ends_at_once_leaves_a_copy),
        cmocka_unit_test(who_is_not_linked_is_not_told),
        cmocka_unit_test(a_copy_outlives_the_next_loss),
        cmocka_unit_test(a_rest_ends_also_at_who_is_drained),
        cmocka_unit_test(a_copy_is_gone_back_to),
        cmocka_unit_test(a_turn_at_one_router_holds_up_nobody),
        cmocka_unit_test(a_queue_holds_up_no_resume),
        cmocka_unit_test(who_begin_alike_go_together),
        cmocka_unit_test(gateways_agree),
        cmocka_unit_test(the_busy_are_spared),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
