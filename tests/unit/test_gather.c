/* The gathering machine of a worker: nobody waits longer than the window, nobody idle or gone is waited for,
 * and every frame comes out exactly once. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

#include "common/base/rng.h"
#include "worker/gather_core.h"

enum { ROUTERS = 4, FRAMES = 8, ROWS = 100, WINDOW_US = 1000, LAYERS = 6 };

static const wk_gather_limits g_limits = {.router_max = ROUTERS,
                                          .frame_max = FRAMES,
                                          .row_max = ROWS,
                                          .window_max_us = WINDOW_US,
                                          .hold_max_us = 1000000};
static int g_frames[4096];

static uint32_t next(wk_gather *g, uint64_t now, void **out, uint64_t *wait)
{
    return wk_gather_next(g, now, out, FRAMES, wait);
}

static void test_alone_at_once(void **state)
{
    void *out[FRAMES];
    uint64_t wait;
    wk_gather *g = wk_gather_create(&g_limits);
    assert_int_equal(next(g, 0, out, &wait), 0);
    assert_true(wait == UINT64_MAX);
    assert_int_equal(wk_gather_arrived(g, 10, 1, 0, 3, 5, &g_frames[0]), CM_OK);
    assert_int_equal(next(g, 10, out, &wait), 1);
    assert_ptr_equal(out[0], &g_frames[0]);
    wk_gather_destroy(g);
    (void)state;
}

static void test_waits_for_the_active(void **state)
{
    void *out[FRAMES];
    uint64_t wait;
    wk_gather *g = wk_gather_create(&g_limits);
    assert_int_equal(wk_gather_arrived(g, 0, 1, 0, 0, 5, &g_frames[0]), CM_OK);
    assert_int_equal(wk_gather_arrived(g, 0, 2, 0, 0, 5, &g_frames[1]), CM_OK);
    assert_int_equal(next(g, 0, out, &wait), 2);
    /* both are active: the first frame of the next layer waits for the other router, but not for ever */
    assert_int_equal(wk_gather_arrived(g, 100, 1, 0, 1, 5, &g_frames[2]), CM_OK);
    assert_int_equal(next(g, 100, out, &wait), 0);
    assert_true(wait > 0 && wait <= WINDOW_US);
    assert_int_equal(wk_gather_arrived(g, 110, 2, 0, 1, 5, &g_frames[3]), CM_OK);
    assert_int_equal(next(g, 110, out, &wait), 2);
    assert_int_equal(wk_gather_arrived(g, 200, 1, 0, 2, 5, &g_frames[4]), CM_OK);
    assert_int_equal(next(g, 200, out, &wait), 0);
    assert_int_equal(next(g, 200 + wait, out, &wait), 1);
    wk_gather_destroy(g);
    (void)state;
}

static void test_idle_and_gone_are_not_waited_for(void **state)
{
    void *out[FRAMES];
    uint64_t wait;
    wk_gather *g = wk_gather_create(&g_limits);
    assert_int_equal(wk_gather_arrived(g, 0, 1, 0, 0, 5, &g_frames[0]), CM_OK);
    assert_int_equal(wk_gather_arrived(g, 0, 2, 0, 0, 5, &g_frames[1]), CM_OK);
    assert_int_equal(next(g, 0, out, &wait), 2);
    wk_gather_idle(g, 2);
    assert_int_equal(wk_gather_arrived(g, 10, 1, 0, 1, 5, &g_frames[2]), CM_OK);
    assert_int_equal(next(g, 10, out, &wait), 1);
    assert_int_equal(wk_gather_arrived(g, 20, 2, 0, 2, 5, &g_frames[3]), CM_OK); /* active again */
    assert_ptr_equal(wk_gather_gone(g, 2), &g_frames[3]);
    assert_null(wk_gather_gone(g, 2));
    assert_int_equal(wk_gather_arrived(g, 30, 1, 0, 2, 5, &g_frames[4]), CM_OK);
    assert_int_equal(next(g, 30, out, &wait), 1);
    wk_gather_destroy(g);
    (void)state;
}

static void test_bounds(void **state)
{
    void *out[FRAMES];
    uint64_t wait;
    wk_gather *g = wk_gather_create(&g_limits);
    for (int i = 0; i < FRAMES; i++) {
        assert_int_equal(wk_gather_arrived(g, 0, 1, 0, 0, 60, &g_frames[i]), CM_OK);
    }
    assert_int_equal(wk_gather_arrived(g, 0, 1, 0, 0, 1, &g_frames[FRAMES]), CM_E_CAPACITY);
    for (int i = 0; i < FRAMES; i++) {
        assert_int_equal(next(g, 0, out, &wait), 1); /* two of 60 rows would pass 100 */
        assert_ptr_equal(out[0], &g_frames[i]);
    }
    for (uint32_t r = 2; r <= ROUTERS; r++) {
        assert_int_equal(wk_gather_arrived(g, 0, r, 0, 0, 1, &g_frames[r]), CM_OK);
    }
    assert_int_equal(wk_gather_arrived(g, 0, ROUTERS + 1, 0, 0, 1, &g_frames[9]), CM_E_CAPACITY);
    assert_int_equal(next(g, WINDOW_US, out, &wait), ROUTERS - 1);
    wk_gather_destroy(g);
    (void)state;
}

/* Random comings and goings: each frame comes out once, groups are of one layer, no frame waits past the
 * window. */
static void test_random(void **state)
{
    uint64_t seed = cm_random_u64(), now = 0;
    uint32_t layer_of[4096], router_of[4096], came_out[4096] = {0}, n = 0;
    uint64_t arrived[4096];
    print_message("seed %llu\n", (unsigned long long)seed);
    wk_gather *g = wk_gather_create(&g_limits);
    for (uint64_t i = 0; i < 20000 && n < 4000; i++) {
        cm_rng_block draw = cm_rng_at(seed, i, 0);
        uint32_t router = 1 + draw.word[0] % ROUTERS;
        now += draw.word[1] % 200;
        if (draw.word[2] % 10 < 5) {
            layer_of[n] = draw.word[3] % LAYERS;
            router_of[n] = router;
            arrived[n] = now;
            g_frames[n] = (int)n;
            n += wk_gather_arrived(g, now, router, 0, layer_of[n], 1 + draw.word[3] % 40, &g_frames[n]) ==
                 CM_OK;
        } else if (draw.word[2] % 10 == 5) {
            wk_gather_idle(g, router);
        } else if (draw.word[2] % 100 == 6) {
            int *frame;
            while ((frame = wk_gather_gone(g, router)) != NULL) {
                assert_int_equal(router_of[*frame], router);
                came_out[*frame]++;
            }
        }
        void *out[FRAMES];
        uint64_t wait;
        uint32_t got = wk_gather_next(g, now, out, FRAMES, &wait);
        for (uint32_t k = 0; k < got; k++) {
            int id = *(int *)out[k];
            assert_int_equal(layer_of[id], layer_of[*(int *)out[0]]);
            came_out[id]++;
        }
        if (got == 0 && wk_gather_waiting(g) > 0) {
            assert_true(wait <= WINDOW_US);
            for (uint32_t k = 0; k < n; k++) {
                assert_true(came_out[k] == 1 || now - arrived[k] < WINDOW_US + FRAMES * 200);
            }
        }
    }
    void *out[FRAMES];
    uint64_t wait;
    while (wk_gather_waiting(g) > 0) {
        uint32_t got = wk_gather_next(g, now += WINDOW_US, out, FRAMES, &wait);
        for (uint32_t k = 0; k < got; k++) {
            came_out[*(int *)out[k]]++;
        }
    }
    for (uint32_t k = 0; k < n; k++) {
        assert_int_equal(came_out[k], 1);
    }
    wk_gather_destroy(g);
    (void)state;
}

/* ---- in step ---- */

enum { COST_US = 2500, THINK_US = 400, STEPS = 60 };

typedef struct walker {
    uint64_t comes_us; /* with its next frame; UINT64_MAX: it waits for an answer */
    uint32_t layer, n_steps, think_us;
} walker;

/* Routers that begin out of step, walking through layers until the first has made its steps; how many groups
 * a layer of its steps took, in hundredths, in the second half. blind: a worker looks for frames between
 * groups only. */
static uint32_t walk(walker *w, uint32_t n, bool blind, uint64_t seed)
{
    wk_gather *g = wk_gather_create(&g_limits);
    uint64_t now = 0, free_us = 0, wait = 0, draw = 0;
    uint32_t n_group = 0, from_group = 0;
    bool computing = false;
    void *out[FRAMES];
    uint32_t n_out = 0;
    while (w[0].n_steps < STEPS) {
        if (computing && now >= free_us) {
            computing = false;
            wk_gather_computed(g, now);
            for (uint32_t k = 0; k < n_out; k++) {
                walker *back = out[k];
                back->layer = (back->layer + 1) % LAYERS;
                back->n_steps += back->layer == 0;
                back->comes_us = now + back->think_us * (90 + cm_rng_at(seed, draw++, 0).word[0] % 21) / 100;
            }
            from_group = w[0].n_steps < STEPS / 2 ? n_group : from_group;
        }
        for (uint32_t i = 0; i < n && !(computing && blind); i++) {
            if (w[i].comes_us <= now) {
                w[i].comes_us = UINT64_MAX;
                assert_int_equal(wk_gather_arrived(g, now, 1 + i, 0, w[i].layer, 5, &w[i]), CM_OK);
            }
        }
        if (!computing && now > free_us) {
            wk_gather_looked(g);
        }
        if (!computing && (n_out = wk_gather_next(g, now, out, FRAMES, &wait)) > 0) {
            computing = true;
            free_us = now + COST_US;
            n_group++;
        }
        now += 10;
    }
    for (uint32_t i = 0; i < n; i++) {
        while (wk_gather_gone(g, 1 + i) != NULL) {
        }
    }
    wk_gather_destroy(g);
    return 100 * (n_group - from_group) / (STEPS / 2 * LAYERS);
}

/* However many routers there are and wherever they begin, a layer is computed once for all of them. */
static void test_in_step(void **state)
{
    uint64_t seed = cm_random_u64();
    (void)state;
    print_message("seed %llu\n", (unsigned long long)seed);
    for (uint64_t round = 0; round < 50; round++) {
        for (uint32_t n = 1; n <= ROUTERS; n++) {
            walker w[ROUTERS];
            for (uint32_t i = 0; i < n; i++) {
                cm_rng_block r = cm_rng_at(seed, round, i);
                w[i] = (walker){
                    .comes_us = r.word[0] % 20000, .layer = r.word[1] % LAYERS, .think_us = THINK_US};
            }
            uint32_t hundredths = walk(w, n, round % 2 == 0, seed + round);
            if (hundredths > 115) {
                fail_msg("round %llu: %u routers took %u hundredths of a group for a layer",
                         (unsigned long long)round, n, hundredths);
            }
        }
    }
}

/* Router 2 has a frame, router 1 is just answered and would be back with the same layer after away_us: is it
 * waited for? */
static bool waits_for_one_away(uint32_t away_us, uint32_t row_us)
{
    void *out[FRAMES];
    uint64_t wait = 0, now = 0;
    wk_gather *g = wk_gather_create(&g_limits);
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        uint32_t n_row = 5 + 10 * (layer % 2);
        assert_int_equal(wk_gather_arrived(g, now, 1, 0, layer, n_row, &g_frames[0]), CM_OK);
        assert_int_equal(next(g, now, out, &wait), 1);
        if (layer == LAYERS - 1) {
            assert_int_equal(wk_gather_arrived(g, now + 10, 2, 0, 0, 5, &g_frames[1]), CM_OK);
        }
        wk_gather_computed(g, now += row_us != 0 ? n_row * row_us : COST_US);
        wk_gather_looked(g);
        now += layer < LAYERS - 1 ? away_us : 0;
    }
    bool waits = next(g, now, out, &wait) == 0;
    if (waits) {
        assert_true(wait > away_us && wait < 2 * away_us);
        assert_int_equal(next(g, now + wait, out, &wait), 1); /* it did not come: no longer */
    }
    wk_gather_computed(g, now + 2 * COST_US);
    wk_gather_destroy(g);
    return waits;
}

/* A router with two flights, the second three layers ahead: what is known of one says nothing of the other.
 */
static void test_flights_are_apart(void **state)
{
    void *out[FRAMES];
    uint64_t wait = 0, now = 0;
    wk_gather *g = wk_gather_create(&g_limits);
    (void)state;
    for (uint32_t layer = 0; layer < 4 * LAYERS; layer++) {
        for (uint32_t flight = 0; flight < 2;
             flight++) { /* while one is computed the other is at its router */
            assert_int_equal(wk_gather_arrived(g, now, 1, flight, (layer + 3 * flight) % LAYERS,
                                               5 + 10 * (layer % 2), &g_frames[flight]),
                             CM_OK);
            assert_int_equal(next(g, now, out, &wait), 1);
            if (layer == 4 * LAYERS - 1 && flight == 1) { /* a layer ahead of where the first comes back */
                assert_int_equal(wk_gather_arrived(g, now + 10, 2, 0, 1, 5, &g_frames[2]), CM_OK);
            }
            wk_gather_computed(g, now += COST_US);
            wk_gather_looked(g);
        }
        now += layer < 4 * LAYERS - 1 ? THINK_US : 0;
    }
    assert_int_equal(next(g, now, out, &wait), 0);
    assert_true(wait > THINK_US + COST_US / 2 && wait < COST_US); /* it returns after a group and THINK_US */
    assert_int_equal(wk_gather_arrived(g, now + THINK_US, 1, 0, 0, 5, &g_frames[0]), CM_OK);
    assert_int_equal(next(g, now + THINK_US, out, &wait), 1); /* the one behind */
    assert_ptr_equal(out[0], &g_frames[0]);
    wk_gather_computed(g, now + THINK_US + COST_US);
    assert_ptr_equal(wk_gather_gone(g, 2), &g_frames[2]);
    wk_gather_destroy(g);
}

/* One that takes longer than a group from an answer to its next frame is not waited for: it costs more than
 * it saves. */
static void test_waits_while_it_saves(void **state)
{
    (void)state;
    assert_true(waits_for_one_away(THINK_US, 0));
    assert_true(waits_for_one_away(3 * COST_US / 4, 0));
    assert_false(waits_for_one_away(3 * COST_US, 0));
    /* groups that cost what their rows cost, and as much as those above: one less saves little */
    assert_false(waits_for_one_away(3 * COST_US / 4, COST_US / 10));
}

/* One group during which the worker did not run does not make it wait a hundred groups for routers that are
 * far away. */
static void test_odd_groups_are_forgotten(void **state)
{
    void *out[FRAMES];
    uint64_t wait = 0, now = 0;
    wk_gather *g = wk_gather_create(&g_limits);
    (void)state;
    for (uint32_t i = 0; i < 40; i++) {
        assert_int_equal(wk_gather_arrived(g, now, 1, 0, i % LAYERS, 5 + 10 * (i % 2), &g_frames[0]), CM_OK);
        assert_int_equal(next(g, now, out, &wait), 1);
        wk_gather_computed(g, now += i == 20 ? 1000 * COST_US : COST_US);
        wk_gather_looked(g);
        now += 4 * COST_US; /* longer than a group */
    }
    assert_int_equal(wk_gather_arrived(g, now, 1, 0, 40 % LAYERS, 5, &g_frames[0]), CM_OK);
    assert_int_equal(next(g, now, out, &wait), 1);
    assert_int_equal(wk_gather_arrived(g, now, 2, 0, 41 % LAYERS, 5, &g_frames[1]), CM_OK);
    wk_gather_computed(g, now + COST_US);
    wk_gather_looked(g);
    assert_int_equal(next(g, now + COST_US, out, &wait), 1); /* and not held for router 1 */
    wk_gather_computed(g, now + 2 * COST_US);
    wk_gather_destroy(g);
}

/* However long groups take, a frame is not held for longer than its router may wait. */
static void test_hold_is_bounded(void **state)
{
    void *out[FRAMES];
    uint64_t wait = 0, now = 0, cost_us = 3 * g_limits.hold_max_us;
    wk_gather *g = wk_gather_create(&g_limits);
    (void)state;
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        assert_int_equal(wk_gather_arrived(g, now, 1, 0, layer, 5, &g_frames[0]), CM_OK);
        assert_int_equal(next(g, now, out, &wait), 1);
        wk_gather_computed(g, now += cost_us);
        wk_gather_looked(g);
        now += layer < LAYERS - 1 ? cost_us / 2 : 0;
    }
    assert_int_equal(wk_gather_arrived(g, now, 2, 0, 0, 5, &g_frames[1]), CM_OK);
    assert_int_equal(next(g, now, out, &wait), 0); /* router 1 would be worth it */
    assert_true(wait > 0 && wait <= g_limits.hold_max_us);
    assert_int_equal(next(g, now + g_limits.hold_max_us, out, &wait), 1);
    wk_gather_computed(g, now + cost_us);
    wk_gather_destroy(g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_in_step),
        cmocka_unit_test(test_waits_while_it_saves),
        cmocka_unit_test(test_flights_are_apart),
        cmocka_unit_test(test_odd_groups_are_forgotten),
        cmocka_unit_test(test_hold_is_bounded),
        cmocka_unit_test(test_alone_at_once),
        cmocka_unit_test(test_waits_for_the_active),
        cmocka_unit_test(test_idle_and_gone_are_not_waited_for),
        cmocka_unit_test(test_bounds),
        cmocka_unit_test(test_random),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
