/* Where streams go when a router refuses them because it is being drained and the gateway has not heard. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "tests/unit/place_rig.h"

enum { FIRST = 1, SECOND = 2 };

static int setup(void **state)
{
    (void)state;
    p_begin(4, 0);
    gw_place_up(&P.place, FIRST);
    gw_place_up(&P.place, SECOND);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    p_end();
    return 0;
}

static void end(gw_spot *spot)
{
    uint64_t routers[GW_PLACE_COPIES];
    (void)gw_place_end(&P.place, spot, routers);
}

static void expect_open(const gw_spot *spot, uint64_t router)
{
    p_expect(GW_PLACE_OPEN, spot, router);
    p_expect_rest();
}

/* The router said that it is full: it gets no reopened streams for a while. */
static void fill(uint64_t router)
{
    gw_spot spot = {0};
    uint64_t other = router == FIRST ? SECOND : FIRST;
    gw_place_load(&P.place, other, 10);
    p_ask(&spot);
    expect_open(&spot, router);
    bool again = gw_place_refused(&P.place, P.now_ms, &spot, CM_E_CAPACITY);
    assert_true(again); /* the other one is asked */
    end(&spot);
    gw_place_load(&P.place, other, 0);
}

/* A client's new stream is asked for at the other one at once, also if that was full a moment ago. */
static void a_new_stream(void **state)
{
    (void)state;
    gw_spot spot = {0}, more = {0};
    fill(SECOND);
    p_ask(&spot);
    expect_open(&spot, FIRST);
    assert_true(gw_place_refused(&P.place, P.now_ms, &spot, CM_E_REFUSED));
    expect_open(&spot, SECOND);
    p_word(&spot, true);
    gw_place_load(&P.place, SECOND, 100);
    p_ask(&more); /* the draining one is not asked again */
    expect_open(&more, SECOND);
    assert_false(gw_place_refused(&P.place, P.now_ms, &more, CM_E_CAPACITY)); /* that is the answer */
    end(&more);
    end(&spot);
}

/* It waits for one that is a member and not linked at the moment. */
static void the_other_is_not_linked(void **state)
{
    (void)state;
    gw_spot spot = {0};
    gw_place_down(&P.place, P.now_ms, SECOND);
    p_ask(&spot);
    expect_open(&spot, FIRST);
    assert_true(gw_place_refused(&P.place, P.now_ms, &spot, CM_E_REFUSED));
    p_expect_rest();
    P.now_ms += 500;
    gw_place_up(&P.place, SECOND);
    expect_open(&spot, SECOND);
    end(&spot);
}

/* All are being drained: each is asked once. */
static void no_other(void **state)
{
    (void)state;
    gw_spot spot = {0};
    p_ask(&spot);
    expect_open(&spot, FIRST);
    assert_true(gw_place_refused(&P.place, P.now_ms, &spot, CM_E_REFUSED));
    expect_open(&spot, SECOND);
    assert_false(gw_place_refused(&P.place, P.now_ms, &spot, CM_E_REFUSED));
    end(&spot);
    gw_place_gone(&P.place, P.now_ms, SECOND); /* one that was started again is another */
    gw_place_up(&P.place, SECOND + 1);
    p_ask(&spot);
    expect_open(&spot, SECOND + 1);
    end(&spot);
}

/* One with tokens waits for room elsewhere, as long as it may. */
static void an_old_stream(void **state)
{
    (void)state;
    gw_spot spot = {0};
    gw_place_stands(&P.place, P.now_ms, FIRST, GW_PLACE_MEMBER);
    p_ask(&spot);
    expect_open(&spot, FIRST);
    p_word(&spot, true);
    gw_place_gone(&P.place, P.now_ms, FIRST);
    expect_open(&spot, SECOND);
    assert_true(gw_place_refused(&P.place, P.now_ms, &spot, CM_E_REFUSED));
    p_expect_rest();
    P.now_ms += P_REOPEN_MS - 1;
    p_expect_rest();
    gw_place_up(&P.place, SECOND + 1);
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
