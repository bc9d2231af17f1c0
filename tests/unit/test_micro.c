/* Into how many micro-batches, and where: cuts at sequences, two only where they turn out faster. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "router/engine/micro_core.h"

static uint32_t cut(const uint32_t *rows, uint32_t n)
{
    kn_seg segs[8];
    uint32_t row = 0;
    for (uint32_t i = 0; i < n; i++) {
        segs[i] = (kn_seg){.row0 = row, .n_row = rows[i]};
        row += rows[i];
    }
    return rt_micro_cut(segs, n, row);
}

static void test_cuts_between_sequences(void **state)
{
    (void)state;
    assert_int_equal(cut((const uint32_t[]){1, 1}, 2), 1);
    assert_int_equal(cut((const uint32_t[]){1, 1, 1}, 3), 1);
    assert_int_equal(cut((const uint32_t[]){30, 10, 25, 35}, 4), 40); /* 40 and 65: the nearer to 50 */
    assert_int_equal(cut((const uint32_t[]){1, 1, 98}, 3), 50);       /* none near: inside */
    assert_int_equal(cut((const uint32_t[]){128}, 1), 64);
    assert_int_equal(cut((const uint32_t[]){2}, 1), 1);
    assert_int_equal(cut((const uint32_t[]){75, 25}, 2), 75);
    assert_int_equal(cut((const uint32_t[]){76, 24}, 2), 50);
}

/* Steps of n rows that take one_ns or two_ns, whatever is asked for; how many of them were cut. */
static uint32_t run(rt_micro_core *core, uint32_t n_row, uint32_t n_step, uint64_t one_ns, uint64_t two_ns,
                    double wait)
{
    uint32_t n_two = 0;
    for (uint32_t i = 0; i < n_step; i++) {
        uint32_t n = rt_micro_core_count(core, n_row);
        uint64_t ns = n == 2 ? two_ns : one_ns;
        rt_micro_core_observe(core, n_row, n, ns, (uint64_t)(wait * (double)ns));
        n_two += n == 2;
    }
    return n_two;
}

static void test_what_pays_stays(void **state)
{
    rt_micro_core core;
    (void)state;
    rt_micro_core_init(&core, 0);
    run(&core, 256, 100, 1000000, 700000, 0.4);
    assert_int_equal(rt_micro_core_count(&core, 256), 2);
    assert_true(run(&core, 256, 1000, 1000000, 700000, 0.4) > 900);
    assert_int_equal(rt_micro_core_count(&core, 64), 1); /* which says nothing about fewer rows */
    run(&core, 256, 1000, 700000, 1000000, 0.4);         /* it no longer pays */
    assert_int_equal(rt_micro_core_count(&core, 256), 1);
}

static void test_what_does_not_pay_costs_little(void **state)
{
    rt_micro_core core;
    (void)state;
    rt_micro_core_init(&core, 0);
    uint32_t n_two = run(&core, 256, 10000, 1000000, 2000000, 0.4);
    assert_in_range(n_two, 4,
                    10000 * 4 / (4 * 2 * 32) + 8); /* trials of 4 that cost as much as 8, every 256 */
    rt_micro_core_init(&core, 0);
    n_two = run(&core, 256, 10000, 1000000, 990000, 0.4); /* no better by a margin */
    assert_in_range(n_two, 4, 10000 / 32 + 8);
}

static void test_never_where_nobody_waits(void **state)
{
    rt_micro_core core;
    (void)state;
    rt_micro_core_init(&core, 0);
    assert_int_equal(run(&core, 256, 1000, 1000000, 500000, 0.05), 0);
    assert_int_equal(run(&core, RT_MICRO_ROWS_MIN - 1, 1000, 1000000, 500000, 0.9), 0);
    assert_int_equal(run(&core, RT_MICRO_ROWS_MIN, 1000, 0, 0, 0), 0); /* no clock */
}

static void test_as_asked_for(void **state)
{
    rt_micro_core core;
    (void)state;
    rt_micro_core_init(&core, 2);
    assert_int_equal(rt_micro_core_count(&core, 1), 1);
    assert_int_equal(rt_micro_core_count(&core, 2), 2);
    assert_int_equal(run(&core, 300, 100, 1000000, 9000000, 0), 100);
    rt_micro_core_init(&core, 1);
    assert_int_equal(run(&core, 300, 100, 1000000, 1000, 1), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_cuts_between_sequences), cmocka_unit_test(test_what_pays_stays),
        cmocka_unit_test(test_what_does_not_pay_costs_little),
        cmocka_unit_test(test_never_where_nobody_waits), cmocka_unit_test(test_as_asked_for)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
