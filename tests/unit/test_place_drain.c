/* Where streams go when a router refuses them because it is being drained and the gateway has not heard. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "gateway/place_core.h"

enum { FIRST = 1, SECOND = 2, REOPEN_MS = 5000 };

static gw_place g_place;
static uint64_t g_now_ms;

static int setup(void **state)
{
    (void)state;
    static const gw_place_limits limits = {
        .reopen_ms = REOPEN_MS, .rebind_ms = 300, .leave_ms = 1000, .opens_max = 4, .seed = 1};
    gw_place_init(&g_place, &limits);
    g_now_ms = 1000;
    gw_place_up(&g_place, FIRST);
    gw_place_up(&g_place, SECOND);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    gw_place_fini(&g_place);
    return 0;
}

static void end(gw_spot *spot)
{
    uint64_t routers[GW_PLACE_COPIES];
    (void)gw_place_end(&g_place, spot, routers);
}

static void expect_open(const gw_spot *spot, uint64_t router)
{
    gw_place_action action;
    assert_true(gw_place_next(&g_place, g_now_ms, &action));
    assert_int_equal(action.act, GW_PLACE_OPEN);
    assert_ptr_equal(action.spot, spot);
    assert_int_equal(action.router, router);
    assert_false(gw_place_next(&g_place, g_now_ms, &action));
}

/* The router said that it is full: it gets no reopened streams for a while. */
static void fill(uint64_t router)
{
    gw_spot spot = {0};
    uint64_t other = router == FIRST ? SECOND : FIRST;
    gw_place_load(&g_place, other, 10);
    gw_place_begin(&g_place, g_now_ms, &spot, 0);
    expect_open(&spot, router);
    bool again = gw_place_refused(&g_place, g_now_ms, &spot, CM_E_CAPACITY);
    assert_true(again); /* the other one is asked */
    end(&spot);
    gw_place_load(&g_place, other, 0);
}

/* A client's new stream is asked for at the other one at once, also if that was full a moment ago. */
static void a_new_stream(void **state)
{
    (void)state;
    gw_spot spot = {0}, more = {0};
    fill(SECOND);
    gw_place_begin(&g_place, g_now_ms, &spot, 0);
    expect_open(&spot, FIRST);
    assert_true(gw_place_refused(&g_place, g_now_ms, &spot, CM_E_REFUSED));
    expect_open(&spot, SECOND);
    gw_place_word(&g_place, g_now_ms, &spot, true);
    gw_place_load(&g_place, SECOND, 100);
    gw_place_begin(&g_place, g_now_ms, &more, 0); /* the draining one is not asked again */
    expect_open(&more, SECOND);
    assert_false(gw_place_refused(&g_place, g_now_ms, &more, CM_E_CAPACITY)); /* that is the answer */
    end(&more);
    end(&spot);
}

/* It waits for one that is a member and not linked at the moment. */
static void the_other_is_not_linked(void **state)
{
    (void)state;
    gw_spot spot = {0};
    gw_place_action action;
    gw_place_down(&g_place, g_now_ms, SECOND);
    gw_place_begin(&g_place, g_now_ms, &spot, 0);
    expect_open(&spot, FIRST);
    assert_true(gw_place_refused(&g_place, g_now_ms, &spot, CM_E_REFUSED));
    assert_false(gw_place_next(&g_place, g_now_ms, &action));
    g_now_ms += 500;
    gw_place_up(&g_place, SECOND);
    expect_open(&spot, SECOND);
    end(&spot);
}

/* All are being drained: each is asked once. */
static void no_other(void **state)
{
    (void)state;
    gw_spot spot = {0};
    gw_place_begin(&g_place, g_now_ms, &spot, 0);
    expect_open(&spot, FIRST);
    assert_true(gw_place_refused(&g_place, g_now_ms, &spot, CM_E_REFUSED));
    expect_open(&spot, SECOND);
    assert_false(gw_place_refused(&g_place, g_now_ms, &spot, CM_E_REFUSED));
    end(&spot);
    gw_place_gone(&g_place, g_now_ms, SECOND); /* one that was started again is another */
    gw_place_up(&g_place, SECOND + 1);
    gw_place_begin(&g_place, g_now_ms, &spot, 0);
    expect_open(&spot, SECOND + 1);
    end(&spot);
}

/* One with tokens waits for room elsewhere, as long as it may. */
static void an_old_stream(void **state)
{
    (void)state;
    gw_spot spot = {0};
    gw_place_action action;
    gw_place_stands(&g_place, g_now_ms, FIRST, GW_PLACE_MEMBER);
    gw_place_begin(&g_place, g_now_ms, &spot, 0);
    expect_open(&spot, FIRST);
    gw_place_word(&g_place, g_now_ms, &spot, true);
    gw_place_gone(&g_place, g_now_ms, FIRST);
    expect_open(&spot, SECOND);
    assert_true(gw_place_refused(&g_place, g_now_ms, &spot, CM_E_REFUSED));
    assert_false(gw_place_next(&g_place, g_now_ms, &action));
    g_now_ms += REOPEN_MS - 1;
    assert_false(gw_place_next(&g_place, g_now_ms, &action));
    gw_place_up(&g_place, SECOND + 1);
    expect_open(&spot, SECOND + 1);
    end(&spot);
}

#define TEST(name_) cmocka_unit_test_setup_teardown(name_, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {TEST(a_new_stream), TEST(the_other_is_not_linked), TEST(no_other),
                                       TEST(an_old_stream)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
