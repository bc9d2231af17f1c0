/* A stream that ends its routers is refused after a few of them; those that were there with it are not. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/unit/place_rig.h"

enum { DEATHS_MAX = 3, A = 1, B = 2, C = 3, D = 4 };

static int setup(void **state)
{
    (void)state;
    p_begin(32, DEATHS_MAX);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    p_end();
    return 0;
}

/* It is gone for good: its process ended. */
static void die(uint64_t router)
{
    gw_place_down(&P.place, P.now_ms, router);
    gw_place_gone(&P.place, P.now_ms, router);
}

static void opens_at(gw_spot *spot, uint64_t router)
{
    p_expect(GW_PLACE_OPEN, spot, router);
    p_word(spot, false);
}

static void refused_after_three(void **state)
{
    (void)state;
    gw_spot spot = {0};
    p_ask(&spot);
    for (uint64_t router = A; router < A + DEATHS_MAX; router++) {
        gw_place_up(&P.place, router);
        opens_at(&spot, router);
        die(router);
    }
    gw_place_up(&P.place, D);
    p_expect(GW_PLACE_CONDEMN, &spot, 0);
    p_expect_rest();
    p_expect_end(&spot, 0);
}

/* Not even accepted: what ends a router may be the word that opens it. */
static void refused_unaccepted(void **state)
{
    (void)state;
    gw_spot spot = {0};
    p_ask(&spot);
    for (uint64_t router = A; router < A + DEATHS_MAX; router++) {
        gw_place_up(&P.place, router);
        p_expect(GW_PLACE_OPEN, &spot, router);
        die(router);
    }
    p_expect(GW_PLACE_CONDEMN, &spot, 0);
    p_expect_end(&spot, 0);
}

/* A token between two deaths: it is not what they died of. */
static void a_token_clears(void **state)
{
    (void)state;
    gw_spot spot = {0};
    p_ask(&spot);
    for (uint64_t router = A; router < A + 4 * DEATHS_MAX; router++) {
        gw_place_up(&P.place, router);
        opens_at(&spot, router);
        if (router % 2 == 0) {
            p_word(&spot, true);
        }
        die(router);
    }
    gw_place_up(&P.place, 100);
    opens_at(&spot, 100);
    p_expect_end(&spot, 0);
}

/* Its link breaks and comes back, again and again: nobody died. */
static void a_lost_link_is_no_death(void **state)
{
    (void)state;
    gw_spot spot = {0};
    p_ask(&spot);
    gw_place_up(&P.place, A);
    opens_at(&spot, A);
    for (uint32_t i = 0; i < 2 * DEATHS_MAX; i++) {
        gw_place_down(&P.place, P.now_ms, A);
        p_expect_rest();
        gw_place_up(&P.place, A);
        p_expect(GW_PLACE_RESUME, &spot, A);
        p_word(&spot, false);
    }
    p_expect_end(&spot, 0);
}

/* It is away for so long that it is taken for dead, and has the stream when it is back: nobody died. */
static void a_long_lost_link_is_no_death(void **state)
{
    (void)state;
    gw_spot spot = {0};
    p_ask(&spot);
    gw_place_up(&P.place, A);
    opens_at(&spot, A);
    for (uint32_t i = 0; i < 2 * DEATHS_MAX; i++) {
        gw_place_down(&P.place, P.now_ms, A);
        if (i % 2 == 0) {
            P.now_ms += 1000;
        } else {
            gw_place_unreachable(&P.place, A);
        }
        p_expect_rest();
        gw_place_up(&P.place, A);
        p_expect(GW_PLACE_RESUME, &spot, A);
        if (i % 3 == 0) { /* gone again before it says so: still the same life */
            continue;
        }
        p_word(&spot, false);
    }
    assert_int_equal(spot.n_deaths, 0);
    for (uint64_t router = B; router < B + DEATHS_MAX - 1; router++) { /* those did die */
        die(router - 1);
        gw_place_up(&P.place, router);
        opens_at(&spot, router);
    }
    die(B + DEATHS_MAX - 2);
    p_expect(GW_PLACE_CONDEMN, &spot, 0);
    p_expect_end(&spot, 0);
}

/* From the second death on they are tried one at a router, however many wait; who has a token is let be. */
static void suspects_are_tried_apart(void **state)
{
    (void)state;
    gw_spot one = {0}, two = {0}, three = {0}, fresh = {0};
    gw_spot *all[] = {&one, &two, &three};
    for (uint32_t i = 0; i < 3; i++) {
        p_ask(all[i]);
    }
    for (uint64_t router = A; router <= B; router++) {
        gw_place_up(&P.place, router);
        for (uint32_t i = 0; i < 3; i++) {
            opens_at(all[i], router);
        }
        die(router);
    }
    gw_place_up(&P.place, C);
    opens_at(&one, C);
    p_expect_rest(); /* the others wait */
    p_ask(&fresh);
    opens_at(&fresh, C); /* held up by nobody */
    gw_place_up(&P.place, D);
    opens_at(&two, D);
    p_expect_rest();
    p_word(&two, true); /* cleared: the next one is tried there, and not where the first still is */
    opens_at(&three, D);
    die(C);
    p_expect(GW_PLACE_CONDEMN, &one, 0);
    p_expect_end(&one, 0);
    p_expect(GW_PLACE_OPEN, &fresh, D);
    p_word(&three, true);
    p_expect_rest();
    p_expect_end(&two, 0);
    p_expect_end(&three, 0);
    p_expect_end(&fresh, 0);
}

/* Also where they were before, if that router is back after all. */
static void suspects_go_back_one_by_one(void **state)
{
    (void)state;
    gw_spot one = {0}, two = {0};
    gw_place_up(&P.place, A);
    p_ask(&one);
    p_ask(&two);
    opens_at(&one, A);
    opens_at(&two, A);
    gw_place_down(&P.place, P.now_ms, A);
    gw_place_unreachable(&P.place, A);
    gw_place_up(&P.place, B);
    p_expect(GW_PLACE_OPEN, &one, B);
    p_expect(GW_PLACE_OPEN, &two, B);
    gw_place_down(&P.place, P.now_ms, B);
    gw_place_unreachable(&P.place, B);
    p_expect_rest();
    gw_place_up(&P.place, B);
    p_expect(GW_PLACE_RESUME, &one, B);
    p_expect_rest();
    assert_true(gw_place_refused(&P.place, P.now_ms, &one, CM_E_NOT_FOUND)); /* that word never came there */
    p_expect(GW_PLACE_OPEN, &one, B);
    p_expect_rest();
    p_word(&one, true);
    p_expect(GW_PLACE_RESUME, &two, B);
    p_word(&two, false); /* B has not died, and one death makes no suspect */
    assert_int_equal(two.n_deaths, 1);
    assert_false(two.tried);
    p_expect_rest();
    p_expect_end(&one, 0);
    p_expect_end(&two, 0);
}

/* Both were there when A and B died. */
static void two_suspects(gw_spot *one, gw_spot *two)
{
    p_ask(one);
    p_ask(two);
    for (uint64_t router = A; router <= B; router++) {
        gw_place_up(&P.place, router);
        opens_at(one, router);
        opens_at(two, router);
        die(router);
    }
}

/* Who waits for its trial is not given up meanwhile; the time runs when nobody is on trial. */
static void waiting_for_a_trial(void **state)
{
    (void)state;
    gw_spot one = {0}, two = {0};
    two_suspects(&one, &two);
    gw_place_up(&P.place, C);
    opens_at(&one, C);
    p_expect_rest();
    P.now_ms += P_REOPEN_MS - 1;
    p_expect_rest();
    gw_place_stands(&P.place, P.now_ms, C, GW_PLACE_DRAINING);
    p_expect_end(&one, 0); /* its client has enough: the other has no router */
    p_expect_rest();
    P.now_ms += P_REOPEN_MS - 1;
    p_expect_rest();
    assert_int_equal(gw_place_due(&P.place, P.now_ms), P.now_ms + 1);
    P.now_ms += 1;
    p_expect(GW_PLACE_GIVE_UP, &two, 0);
    p_expect_end(&two, 0);
}

/* A trial that brings nothing is waited for so long and no longer. */
static void waiting_for_an_endless_trial(void **state)
{
    (void)state;
    gw_spot one = {0}, two = {0};
    two_suspects(&one, &two);
    gw_place_up(&P.place, C);
    opens_at(&one, C);
    for (uint32_t i = 0; i < 4; i++) {
        p_expect_rest();
        assert_true(gw_place_due(&P.place, P.now_ms) > P.now_ms);
        P.now_ms += P_REOPEN_MS / 2;
    }
    p_expect(GW_PLACE_GIVE_UP, &two, 0);
    p_expect_end(&two, 0);
    p_expect_rest();
    p_expect_end(&one, 0);
}

/* ---- one guilty among many, on a cluster of one router that is started again each time ---- */

enum { STREAMS = 40 };

typedef struct crowd {
    gw_spot spots[STREAMS];
    const gw_spot *guilty;
    uint32_t n_told; /* that ended, well or not */
} crowd;

/* Opens whatever may be opened; true: the guilty one is among it. */
static bool crowd_open(crowd *c)
{
    gw_place_action action;
    bool dies = false;
    while (gw_place_next(&P.place, P.now_ms, &action)) {
        if (action.act == GW_PLACE_CONDEMN) {
            assert_ptr_equal(action.spot, c->guilty);
            p_expect_end(action.spot, 0);
            c->n_told++;
        } else {
            assert_int_equal(action.act, GW_PLACE_OPEN);
            p_word(action.spot, false);
            dies = dies || action.spot == c->guilty;
        }
    }
    return dies;
}

static void crowd_answer(crowd *c)
{
    for (uint32_t i = 0; i < STREAMS; i++) {
        if (c->spots[i].state == GW_SPOT_RUNNING) {
            p_word(&c->spots[i], true);
            p_expect_end(&c->spots[i], 0);
            c->n_told++;
        }
    }
}

static void the_guilty_one_is_found(void **state)
{
    (void)state;
    static crowd c;
    for (uint32_t guilty = 0; guilty < STREAMS; guilty += 13) {
        uint64_t router = A;
        c = (crowd){.guilty = &c.spots[guilty]};
        gw_place_up(&P.place, router);
        for (uint32_t i = 0; i < STREAMS; i++) {
            p_ask(&c.spots[i]);
        }
        while (c.n_told < STREAMS) {
            if (!crowd_open(&c)) {
                crowd_answer(&c);
                continue;
            }
            die(router++);
            assert_in_range(router - A, 1, DEATHS_MAX);
            gw_place_up(&P.place, router);
        }
        assert_int_equal(router - A, DEATHS_MAX);
        die(router);
    }
}

#define TEST(name_) cmocka_unit_test_setup_teardown(name_, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(refused_after_three),
        TEST(refused_unaccepted),
        TEST(a_token_clears),
        TEST(a_lost_link_is_no_death),
        TEST(suspects_are_tried_apart),
        TEST(waiting_for_a_trial),
        TEST(the_guilty_one_is_found),
        TEST(suspects_go_back_one_by_one),
        TEST(waiting_for_an_endless_trial),
        TEST(a_long_lost_link_is_no_death),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
