#include "tests/unit/place_rig.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

place_rig P;

void p_begin(uint32_t opens_max, uint32_t deaths_max)
{
    gw_place_limits limits = {.reopen_ms = P_REOPEN_MS,
                              .rebind_ms = 300,
                              .leave_ms = 5000,
                              .opens_max = opens_max,
                              .deaths_max = deaths_max,
                              .seed = 1};
    P.now_ms = 1000;
    gw_place_init(&P.place, &limits);
}

void p_end(void)
{
    gw_place_fini(&P.place);
}

void p_ask(gw_spot *spot)
{
    gw_place_begin(&P.place, P.now_ms, spot, 0);
}

void p_word(gw_spot *spot, bool tokens)
{
    gw_place_word(&P.place, P.now_ms, spot, tokens);
}

void p_expect(gw_place_act act, const gw_spot *spot, uint64_t router)
{
    gw_place_action action;
    assert_true(gw_place_next(&P.place, P.now_ms, &action));
    assert_int_equal(action.act, act);
    assert_ptr_equal(action.spot, spot);
    assert_int_equal(action.router, router);
}

void p_expect_rest(void)
{
    gw_place_action action;
    assert_false(gw_place_next(&P.place, P.now_ms, &action));
}

void p_expect_end(gw_spot *spot, uint64_t router)
{
    uint64_t routers[GW_PLACE_COPIES];
    uint32_t n = gw_place_end(&P.place, spot, routers);
    assert_int_equal(n, router != 0);
    if (n > 0) {
        assert_int_equal(routers[0], router);
    }
}
