/* Streams over the deaths of routers, links and gateways, with the real machines of both sides: every token
 * once and in order whatever happens, every stream finished when things are well again, nothing left at the
 * end.
 * --seed N repeats a run. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/unit/reopen_world.h"

enum { RUNS = 60, TURNS = 1500, HEALED_TURNS = 20000, CANCELS = 100000 };

static uint64_t g_seed = 1;

typedef struct totals {
    uint64_t finished, reopened, resumed, copies, taken_over, found, not_found, refused;
} totals;

static void fault(w_world *world)
{
    static void (*const faults[])(w_world *) = {
        w_cut, w_cut, w_router_dies, w_router_starts, w_router_starts, w_router_leaves, w_gateway_dies};
    faults[t_below(&world->rng, sizeof(faults) / sizeof(faults[0]))](world);
}

static bool odds(w_world *world, uint32_t of)
{
    return t_below(&world->rng, of) == 0;
}

/* Those that are away come back until nobody waits. */
static void heal_and_finish(w_world *world)
{
    w_heal(world);
    for (uint32_t i = 0; !w_at_rest(world); i++) {
        assert_in_range(i, 0, HEALED_TURNS);
        w_turn(world);
        w_client_returns(world);
    }
    w_check_zero(world);
}

static void run(uint64_t seed, totals *sum)
{
    w_world *world = malloc(sizeof(*world));
    w_init(world, seed);
    uint32_t fault_odds = t_between(&world->rng, 10, 100);
    for (uint32_t i = 0; i < TURNS; i++) {
        w_turn(world);
        if (odds(world, 3)) {
            w_client_comes(world);
        }
        if (odds(world, 30)) {
            w_client_cancels(world);
        }
        if (odds(world, 20)) {
            w_client_leaves(world);
        }
        if (odds(world, 10)) {
            w_client_returns(world);
        }
        if (odds(world, fault_odds)) {
            fault(world);
        }
    }
    heal_and_finish(world);
    w_fini(world);
    sum->finished += world->n_finished;
    sum->reopened += world->n_reopened;
    sum->resumed += world->n_resumed;
    sum->copies += world->n_copies;
    sum->taken_over += world->n_taken_over;
    sum->found += world->n_found;
    sum->not_found += world->n_not_found;
    sum->refused += world->n_refused;
    free(world);
}

static void no_token_lost(void **state)
{
    totals sum = {0};
    (void)state;
    for (uint64_t i = 0; i < RUNS; i++) {
        run(g_seed * 1000 + i, &sum);
    }
    print_message("%llu finished, %llu reopened, %llu resumed, %llu copies forgotten, %llu taken over; %llu "
                  "clients came "
                  "back, %llu in vain; %llu refused\n",
                  (unsigned long long)sum.finished, (unsigned long long)sum.reopened,
                  (unsigned long long)sum.resumed, (unsigned long long)sum.copies,
                  (unsigned long long)sum.taken_over, (unsigned long long)sum.found,
                  (unsigned long long)sum.not_found, (unsigned long long)sum.refused);
    assert_true(sum.finished > 1000 && sum.reopened > 500 && sum.resumed > 500 && sum.copies > 20);
    assert_true(sum.taken_over > 20 && sum.found > 500 && sum.not_found > 20 && sum.refused > 100);
}

/* In every state: waiting for a router, asked for, running, its router lost, its gateway dead, left for
 * later. */
static void many_cancels(void **state)
{
    (void)state;
    w_world *world = malloc(sizeof(*world));
    w_init(world, g_seed);
    while (world->n_cancels < CANCELS) {
        w_turn(world);
        for (uint32_t i = 0; i < 3; i++) {
            w_client_comes(world);
        }
        for (uint32_t i = t_below(&world->rng, 5); i > 0; i--) {
            w_client_cancels(world);
        }
        for (uint32_t i = t_below(&world->rng, 4); i > 0; i--) {
            w_client_leaves(world);
            w_client_returns(world);
        }
        if (odds(world, 20)) {
            fault(world);
        }
    }
    const uint64_t *in = world->n_cancels_in;
    print_message("cancelled: %llu waiting, %llu asked, %llu running, %llu lost, %llu away\n",
                  (unsigned long long)in[GW_SPOT_WAITING], (unsigned long long)in[GW_SPOT_ASKED],
                  (unsigned long long)in[GW_SPOT_RUNNING], (unsigned long long)in[GW_SPOT_LOST],
                  (unsigned long long)world->n_cancels_away);
    assert_true(in[GW_SPOT_WAITING] > 1000 && in[GW_SPOT_ASKED] > 1000 && in[GW_SPOT_RUNNING] > 1000);
    assert_true(in[GW_SPOT_LOST] > 100 && world->n_cancels_away > 1000);
    heal_and_finish(world);
    w_fini(world);
    free(world);
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--seed") == 0) {
        g_seed = strtoull(argv[2], NULL, 10);
    }
    printf("seed %llu\n", (unsigned long long)g_seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_token_lost),
        cmocka_unit_test(many_cancels),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
