/* How many rows a step has for prompts: from any machine's times to the rows that take as long as they may.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "router/sched/pace_core.h"

enum { GOAL = 500 * 1000 * 1000 };

/* Full steps of a machine that takes so long for a step and for each of its rows; the rows of the last. */
static uint32_t run(rt_pace_core *core, uint32_t n_step, uint64_t step_ns, uint64_t row_ns)
{
    uint32_t rows = core->rows;
    for (uint32_t i = 0; i < n_step; i++) {
        rows = core->rows;
        rt_pace_core_observe(core, rows, true, step_ns + rows * row_ns);
    }
    return rows;
}

static void test_finds_the_rows(void **state)
{
    static const struct {
        uint64_t step_ns, row_ns;
        uint32_t least, most;
    } machines[] = {
        {0, 2500000, 199, 201},         /* two cores */
        {20000000, 2500000, 191, 193},  /* of it the weights */
        {300000000, 500000, 395, 400},  /* most of it the weights */
        {67000000, 100000, 1024, 1024}, /* faster than there are rows */
        {67000000, 19000000, 32, 32},   /* slower than is worth it */
        {900000000, 1000, 32, 32},      /* nothing could be fast enough */
    };
    (void)state;
    for (uint32_t i = 0; i < sizeof(machines) / sizeof(machines[0]); i++) {
        rt_pace_core core;
        rt_pace_core_init(&core, GOAL, 1024);
        assert_int_equal(core.rows, RT_PACE_ROWS_FIRST);
        assert_in_range(run(&core, 40, machines[i].step_ns, machines[i].row_ns), machines[i].least,
                        machines[i].most);
    }
}

/* Steps that say nothing: in time but not full, of unknown time. */
static void test_says_nothing(void **state)
{
    rt_pace_core core;
    (void)state;
    rt_pace_core_init(&core, GOAL, 1024);
    rt_pace_core_observe(&core, 20, false, GOAL / 2);
    rt_pace_core_observe(&core, 20, true, 0);
    assert_int_equal(core.rows, RT_PACE_ROWS_FIRST);
    rt_pace_core_observe(&core, 20, false, GOAL * 4ull); /* but this one does */
    assert_int_equal(core.rows, RT_PACE_ROWS_FIRST / 2);
}

/* A step that waited for a worker costs one halving, and one step makes it good. */
static void test_odd_step(void **state)
{
    rt_pace_core core;
    (void)state;
    rt_pace_core_init(&core, GOAL, 1024);
    uint32_t rows = run(&core, 20, 0, 2500000);
    rt_pace_core_observe(&core, rows, true, 60ull * GOAL);
    assert_int_equal(core.rows, rows / 2);
    assert_in_range(run(&core, 2, 0, 2500000), rows - 1, rows + 1);
}

static void test_bounds(void **state)
{
    rt_pace_core core;
    (void)state;
    rt_pace_core_init(&core, 0, 1024); /* no goal: all there may be */
    assert_int_equal(core.rows, 1024);
    rt_pace_core_observe(&core, 1024, true, 1ull << 62);
    assert_int_equal(core.rows, 1024);
    rt_pace_core_init(&core, GOAL, 20); /* fewer than the floor */
    assert_int_equal(run(&core, 10, 0, GOAL), 20);
    assert_int_equal(run(&core, 10, 0, 1), 20);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_finds_the_rows),
        cmocka_unit_test(test_says_nothing),
        cmocka_unit_test(test_odd_step),
        cmocka_unit_test(test_bounds),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
