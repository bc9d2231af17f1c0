/* Which router computes which stream: what is left behind, and who waits for whom. The rest is t_reopen's. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "tests/unit/place_rig.h"

enum { A = 1, B = 2 };

/* Runs at A, its link is lost and A is not reached: asked for at B. */
static void move_to_b(gw_spot *spot)
{
    gw_place_up(&P.place, A);
    p_ask(spot);
    p_expect(GW_PLACE_OPEN, spot, A);
    p_word(spot, true);
    gw_place_up(&P.place, B);
    gw_place_down(&P.place, P.now_ms, A);
    gw_place_unreachable(&P.place, A);
    p_expect(GW_PLACE_OPEN, spot, B);
}

static void a_copy_is_forgotten(void **state)
{
    gw_spot spot = {0};
    (void)state;
    p_begin(4, 0);
    move_to_b(&spot);
    p_word(&spot, false);
    p_expect_rest(); /* A may come back */
    gw_place_up(&P.place, A);
    p_expect(GW_PLACE_FORGET, &spot, A);
    p_expect_rest();
    p_expect_end(&spot, 0);
    p_end();
}

/* Its client goes away before B has answered: A computes it for nobody. */
static void who_ends_leaves_a_copy(void **state)
{
    gw_spot spot = {0};
    (void)state;
    p_begin(4, 0);
    move_to_b(&spot);
    gw_place_up(&P.place, A);
    p_expect_end(&spot, A);
    p_expect_rest();
    p_end();
}

/* B accepts and ends it in one frame, before anybody asked what to do. */
static void who_ends_at_once_leaves_a_copy(void **state)
{
    gw_spot spot = {0};
    (void)state;
    p_begin(4, 0);
    move_to_b(&spot);
    gw_place_up(&P.place, A);
    p_word(&spot, true);
    p_expect_end(&spot, A);
    p_end();
}

static void who_is_not_linked_is_not_told(void **state)
{
    gw_spot spot = {0};
    (void)state;
    p_begin(4, 0);
    move_to_b(&spot);
    p_expect_end(&spot, 0);
    p_end();
}

/* B is lost as well: the copy at A still has to go once the stream runs elsewhere. */
static void a_copy_outlives_the_next_loss(void **state)
{
    gw_spot spot = {0};
    (void)state;
    p_begin(4, 0);
    move_to_b(&spot);
    p_word(&spot, true);
    gw_place_down(&P.place, P.now_ms, B);
    p_expect_rest(); /* B may be back in a moment */
    gw_place_up(&P.place, B);
    p_expect(GW_PLACE_RESUME, &spot, B);
    p_word(&spot, true);
    gw_place_up(&P.place, A);
    p_expect(GW_PLACE_FORGET, &spot, A);
    p_expect_end(&spot, 0);
    p_end();
}

/* A has it already and rests for saying so; meanwhile A is to be drained: it is still where the stream goes
 * on. */
static void a_rest_ends_also_at_who_is_drained(void **state)
{
    gw_spot spot = {0};
    (void)state;
    p_begin(4, 0);
    gw_place_up(&P.place, A);
    p_ask(&spot);
    p_expect(GW_PLACE_OPEN, &spot, A);
    assert_true(gw_place_refused(&P.place, P.now_ms, &spot, CM_E_EXISTS));
    gw_place_stands(&P.place, P.now_ms, A, GW_PLACE_DRAINING);
    p_expect_rest();
    uint64_t due_ms = gw_place_due(&P.place, P.now_ms);
    assert_in_range(due_ms, P.now_ms + 1, P.now_ms + 1000);
    P.now_ms = due_ms;
    p_expect(GW_PLACE_RESUME, &spot, A);
    p_expect_end(&spot, 0);
    p_end();
}

/* B fails it: A has it still, and it goes on there. */
static void a_copy_is_gone_back_to(void **state)
{
    gw_spot spot = {0};
    (void)state;
    p_begin(4, 0);
    move_to_b(&spot);
    p_word(&spot, true);
    p_expect_rest();
    assert_true(gw_place_refused(&P.place, P.now_ms, &spot, CM_E_UNAVAILABLE));
    gw_place_up(&P.place, A);
    p_expect(GW_PLACE_RESUME, &spot, A);
    p_expect_end(&spot, 0);
    p_end();
}

/* Many clients come back for streams at A, whose answers take their time: others go to B meanwhile. */
static void a_turn_at_one_router_holds_up_nobody(void **state)
{
    gw_spot first = {0}, second = {0}, third = {0};
    (void)state;
    p_begin(1, 0);
    gw_place_up(&P.place, A);
    gw_place_up(&P.place, B);
    gw_place_begin(&P.place, P.now_ms, &first, A);
    gw_place_begin(&P.place, P.now_ms, &second, A);
    p_ask(&third);
    p_expect(GW_PLACE_RESUME, &first, A);
    p_expect(GW_PLACE_OPEN, &third, B);
    p_expect_rest();
    p_word(&first, true);
    p_expect(GW_PLACE_RESUME, &second, A);
    p_expect_end(&first, 0);
    p_expect_end(&second, 0);
    p_expect_end(&third, 0);
    p_end();
}

/* No router takes the first; the second has one that has it. */
static void a_queue_holds_up_no_resume(void **state)
{
    gw_spot first = {0}, second = {0}, third = {0};
    (void)state;
    p_begin(1, 0);
    p_ask(&first);
    gw_place_begin(&P.place, P.now_ms, &second, A);
    p_ask(&third);
    gw_place_stands(&P.place, P.now_ms, A, GW_PLACE_DRAINING);
    gw_place_up(&P.place, A);
    p_expect(GW_PLACE_RESUME, &second, A);
    p_expect_rest();
    gw_place_up(&P.place, B);
    p_expect(GW_PLACE_OPEN, &first, B); /* first come, first served */
    p_expect(GW_PLACE_OPEN, &third, B);
    p_expect_end(&first, 0);
    p_expect_end(&second, 0);
    p_expect_end(&third, 0);
    p_end();
}

/* ---- what it costs ---- */

enum { MANY = 3000, FEW = 8 };

/* All that is to be done; every stream that was asked for says something when words. */
static uint32_t do_all(bool words)
{
    static gw_spot *asked[MANY];
    gw_place_action action;
    uint32_t n = 0, n_asked = 0;
    while (gw_place_next(&P.place, P.now_ms, &action)) {
        n++;
        if (action.act == GW_PLACE_OPEN || action.act == GW_PLACE_RESUME) {
            asked[n_asked++] = action.spot;
        }
    }
    for (uint32_t i = 0; i < n_asked && words; i++) {
        p_word(asked[i], true);
    }
    return n;
}

/* Since the last call. */
static uint64_t looks(void)
{
    uint64_t n = P.place.n_looks;
    P.place.n_looks = 0;
    return n;
}

/* Thousands of streams lose their router, go to another, leave copies behind: each is looked at a few times.
 */
static void many_move(void **state)
{
    (void)state;
    static gw_spot spots[MANY];
    memset(spots, 0, sizeof(spots));
    p_begin(MANY, 0);
    gw_place_up(&P.place, A);
    for (uint32_t i = 0; i < MANY; i++) {
        p_ask(&spots[i]);
        assert_int_equal(do_all(true), 1);
    }
    assert_in_range(looks(), MANY, 2 * MANY);
    gw_place_up(&P.place, B);
    gw_place_down(&P.place, P.now_ms, A);
    gw_place_unreachable(&P.place, A);
    assert_int_equal(do_all(true), MANY);
    assert_in_range(looks(), MANY, 3 * MANY);
    p_expect_rest(); /* the copies at A cost nothing while it is away */
    assert_in_range(looks(), 0, FEW);
    gw_place_up(&P.place, A);
    assert_int_equal(do_all(true), MANY);
    assert_in_range(looks(), MANY, 3 * MANY);
    for (uint32_t i = 0; i < MANY; i++) {
        p_expect_end(&spots[i], 0);
    }
    p_end();
}

/* Thousands wait for their turns at one router; others that come and go do not look at them each time. */
static void many_wait(void **state)
{
    (void)state;
    static gw_spot spots[MANY], fresh[MANY];
    memset(spots, 0, sizeof(spots));
    memset(fresh, 0, sizeof(fresh));
    p_begin(FEW, 0);
    gw_place_up(&P.place, A);
    gw_place_stands(&P.place, P.now_ms, A, GW_PLACE_DRAINING);
    for (uint32_t i = 0; i < MANY; i++) {
        gw_place_begin(&P.place, P.now_ms, &spots[i], A);
    }
    assert_int_equal(do_all(false), FEW);
    (void)looks();
    gw_place_up(&P.place, B);
    p_expect_rest();
    (void)looks();
    for (uint32_t i = 0; i < FEW; i++) {
        p_ask(&fresh[i]);
        assert_int_equal(do_all(false), 1);
        P.now_ms++;
    }
    assert_in_range(looks(), FEW, 2 * FEW);
    for (uint32_t i = 0; i < MANY; i++) { /* tokens of those that run */
        if (spots[i].state == GW_SPOT_ASKED) {
            p_word(&spots[i], true);
        }
    }
    assert_int_equal(do_all(false), FEW);
    (void)looks();
    for (uint32_t i = 0; i < MANY; i++) {
        if (spots[i].state == GW_SPOT_RUNNING) {
            p_word(&spots[i], true);
            p_expect_rest();
        }
    }
    assert_in_range(looks(), 0, FEW);
    for (uint32_t i = 0; i < MANY; i++) {
        uint64_t routers[GW_PLACE_COPIES];
        (void)gw_place_end(&P.place, &spots[i], routers);
        (void)gw_place_end(&P.place, &fresh[i], routers);
    }
    p_end();
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
        cmocka_unit_test(many_move),
        cmocka_unit_test(many_wait),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
