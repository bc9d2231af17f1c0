/* Into how many micro-batches, and where: cuts at sequences, two only where they turn out faster. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "router/engine/batch.h"

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

/* ---- the rows of a step, and of its parts ---- */

static uint32_t cut_at(void *ctx, const kn_seg *segs, uint32_t n_seg, uint32_t n_row)
{
    (void)segs;
    (void)n_seg;
    (void)n_row;
    return *(const uint32_t *)ctx;
}

/* Every row is in one part, once, with its id, position, sequence and pages. */
static void test_parts_hold_all_rows(void **state)
{
    enum { SEGS = 3, ROWS = 9 };
    static const uint32_t n_rows[SEGS] = {1, 5, 3}, pos0[SEGS] = {300, 126, 0}, slots[SEGS] = {2, 0, 1};
    static const uint32_t tokens[ROWS] = {9, 8, 7, 6, 5, 4, 3, 2, 1}, pages[4] = {40, 41, 42, 43};
    rt_step_seg segs[SEGS];
    rt_batch b;
    (void)state;
    rt_batch_init(&b, SEGS, ROWS, 8);
    for (uint32_t i = 0, row = 0; i < SEGS; row += n_rows[i++]) {
        uint32_t n_page = (pos0[i] + n_rows[i] + 127) / 128;
        segs[i] = (rt_step_seg){.slot = slots[i],
                                .pos0 = pos0[i],
                                .n_row = n_rows[i],
                                .tokens = tokens + row,
                                .pages = pages + i,
                                .n_page = n_page};
    }
    rt_batch_fill(&b, &(rt_step){.n_seg = SEGS, .n_row = ROWS, .segs = segs}, (kn_ptr){1000}, 10);
    assert_int_equal(b.n_page, 3 + 2 + 1);
    for (uint32_t cut = 1; cut < ROWS; cut++) {
        rt_batch_cut(&b, 2, cut_at, &cut);
        uint32_t row = 0;
        for (uint32_t p = 0; p < 2; p++) {
            const rt_batch_part *part = &b.parts[p];
            assert_int_equal(part->row0, p == 0 ? 0 : cut);
            assert_int_equal(part->n_row, p == 0 ? cut : ROWS - cut);
            assert_int_equal(part->pos_end, p == 0 ? 301 : cut < 6 ? 131 : 3);
            for (uint32_t i = part->seg0; i < part->seg0 + part->n_seg; i++) {
                const kn_seg *seg = &b.cut[i];
                uint32_t whose = 0;
                while (b.segs[whose].row0 + b.segs[whose].n_row <= row) {
                    whose++;
                }
                assert_int_equal(seg->row0, row - part->row0);
                assert_int_equal(seg->slot.addr, 1000 + 10 * slots[whose]);
                assert_int_equal(b.pages[seg->page0], pages[whose]);
                for (uint32_t k = 0; k < seg->n_row; k++, row++) {
                    assert_int_equal(b.ids[row], tokens[row]);
                    assert_int_equal(b.pos[row], seg->pos0 + k);
                }
            }
        }
        assert_int_equal(row, ROWS);
    }
    rt_batch_cut(&b, 1, NULL, NULL);
    assert_int_equal(b.n_part, 1);
    assert_memory_equal(b.cut, b.segs, sizeof(kn_seg) * SEGS);
    rt_batch_fini(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_cuts_between_sequences),
                                       cmocka_unit_test(test_what_pays_stays),
                                       cmocka_unit_test(test_what_does_not_pay_costs_little),
                                       cmocka_unit_test(test_never_where_nobody_waits),
                                       cmocka_unit_test(test_as_asked_for),
                                       cmocka_unit_test(test_parts_hold_all_rows)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
