/* Numbered pages: each is taken once, and again when it was put back; misuse ends by an assertion. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cmocka.h>

#include "router/sched/pages.h"
#include "tests/support/dies.h"

static void t_put_twice(void)
{
    rt_pages pages;
    uint32_t page;
    rt_pages_init(&pages, "test", 3);
    (void)rt_pages_take(&pages, &page);
    rt_pages_put(&pages, page);
    rt_pages_put(&pages, page);
}

static void t_put_stranger(void)
{
    rt_pages pages;
    rt_pages_init(&pages, "test", 3);
    rt_pages_put(&pages, 3);
}

static void t_fini_early(void)
{
    rt_pages pages;
    uint32_t page;
    rt_pages_init(&pages, "test", 3);
    (void)rt_pages_take(&pages, &page);
    rt_pages_fini(&pages);
}

static void test_pages(void **state)
{
    (void)state;
    rt_pages pages;
    uint32_t page, seen = 0;
    rt_pages_init(&pages, "test", 3);
    for (int i = 0; i < 3; i++) {
        assert_true(rt_pages_take(&pages, &page));
        seen |= 1u << page;
    }
    assert_int_equal(seen, 7);
    assert_false(rt_pages_take(&pages, &page));
    rt_pages_put(&pages, 1);
    assert_true(rt_pages_take(&pages, &page));
    assert_int_equal(page, 1);
    for (uint32_t i = 0; i < 3; i++) {
        rt_pages_put(&pages, i);
    }
    rt_pages_fini(&pages);
    t_dies(t_put_twice);
    t_dies(t_put_stranger);
    t_dies(t_fini_early);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_pages)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
