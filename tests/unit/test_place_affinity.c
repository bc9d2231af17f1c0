/* Which router a new stream goes to: where prompts that begin like its own were computed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "gateway/place_core.h"

enum { NOW_MS = 1000 };

static void begin(gw_place *place)
{
    gw_place_limits limits = {
        .reopen_ms = 60000, .rebind_ms = 300, .leave_ms = 5000, .opens_max = 4, .deaths_max = 3, .seed = 1};
    gw_place_init(place, &limits);
}

/* Where a new stream is sent, and gone again. */
static uint64_t sent_to(gw_place *place, uint64_t affinity)
{
    gw_place_action action;
    gw_spot spot = {.affinity = affinity};
    uint64_t copies[GW_PLACE_COPIES];
    gw_place_begin(place, NOW_MS, &spot, 0);
    assert_true(gw_place_next(place, NOW_MS, &action));
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
    begin(place);
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
    gw_place_down(&place, NOW_MS, 3);
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
    begin(&other);
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
        cmocka_unit_test(who_begin_alike_go_together),
        cmocka_unit_test(gateways_agree),
        cmocka_unit_test(the_busy_are_spared),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
