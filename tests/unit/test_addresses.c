/* Lists of addresses, and the order in which coordinators are tried. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "common/proc/addresses.h"

static void lists(void **state)
{
    (void)state;
    static const struct {
        const char *list;
        uint32_t n; /* 0: refused */
        const char *needle;
    } cases[] = {
        {"127.0.0.1:7000", 1, NULL},
        {"host-a.example:1,[::1]:2", 2, NULL},
        {"a:1,b:2,c:3,d:4,e:5,f:6,g:7,h:8", 8, NULL},
        {"a:1,b:2,c:3,d:4,e:5,f:6,g:7,h:8,i:9", 0, "more than 8"},
        {"", 0, "''"},
        {"a:1,", 0, "''"},
        {",a:1", 0, "''"},
        {"a", 0, "'a'"},
        {":1", 0, "':1'"},
        {"a:", 0, "'a:'"},
        {"a:b", 0, "'a:b'"},
        {"a:123456", 0, "'a:123456'"},
        {"a:1 ,b:2", 0, "'a:1 '"},
        {"a b:1", 0, "'a b:1'"},
        {"http://a:1", 0, "'http://a:1'"},
        {"a:65536", 0, "'a:65536'"},
        {"::1:7000", 0, "'::1:7000' in '::1:7000' is not HOST:PORT or [IPV6]:PORT"},
        {"[::1]", 0, "'[::1]'"},
        {"[]:1", 0, "'[]:1'"},
        {"[localhost]:1", 0, "'[localhost]:1'"},
        {"[::1:1", 0, "'[::1:1'"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        pc_addresses addresses = {0};
        cm_error err = {0};
        cm_status status = pc_addresses_parse("coordinator", cases[i].list, &addresses, &err);
        assert_int_equal(status, cases[i].n > 0 ? CM_OK : CM_E_CONFIG);
        assert_int_equal(addresses.n, cases[i].n);
        if (cases[i].needle != NULL && strstr(err.text, cases[i].needle) == NULL) {
            fail_msg("'%s' does not say %s", err.text, cases[i].needle);
        }
    }
    char longest[160];
    memset(longest, 'a', sizeof(longest));
    memcpy(longest + 150, ":1", 3);
    pc_addresses addresses;
    assert_int_equal(pc_addresses_parse("coordinator", longest, &addresses, NULL), CM_E_CONFIG);
}

static void hosts_and_ports(void **state)
{
    (void)state;
    static const struct {
        const char *address, *host;
        uint16_t port;
    } cases[] = {
        {"127.0.0.1:0", "127.0.0.1", 0},
        {"localhost:65535", "localhost", 65535},
        {"[::]:7000", "::", 7000},
        {"[fe80::1%eth0]:1", "fe80::1%eth0", 1},
        {"[::ffff:10.0.0.1]:80", "::ffff:10.0.0.1", 80},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char host[PC_ADDRESS_BYTES];
        uint16_t port;
        assert_true(pc_address_split(cases[i].address, host, &port));
        assert_string_equal(host, cases[i].host);
        assert_int_equal(port, cases[i].port);
    }
}

static pc_tour tour_of(const char *list)
{
    pc_addresses addresses;
    pc_tour tour;
    assert_int_equal(pc_addresses_parse("coordinator", list, &addresses, NULL), CM_OK);
    pc_tour_init(&tour, &addresses);
    return tour;
}

/* What happens: "next" or "wait", a try has failed; "lost", a session; "hint X"; and where we are then. */
static void walk(pc_tour *tour, const char *const *steps)
{
    for (; *steps != NULL; steps++) {
        if (strcmp(*steps, "lost") == 0) {
            pc_tour_lost(tour);
        } else if (strncmp(*steps, "hint ", 5) == 0) {
            pc_tour_hint(tour, *steps + 5);
        } else if (strcmp(*steps, "next") == 0) {
            assert_true(pc_tour_next(tour));
        } else if (strcmp(*steps, "wait") == 0) {
            assert_false(pc_tour_next(tour));
        } else {
            assert_string_equal(tour->at, *steps);
        }
    }
}

static void one_is_tried_again_and_again(void **state)
{
    (void)state;
    pc_tour tour = tour_of("a:1");
    walk(&tour, (const char *[]){"a:1", "wait", "a:1", "wait", "a:1", "lost", "a:1", "wait", "a:1", NULL});
}

static void all_are_tried_in_a_round(void **state)
{
    (void)state;
    pc_tour tour = tour_of("a:1,b:2,c:3");
    walk(&tour, (const char *[]){"a:1", "next", "b:2", "next", "c:3", "wait", "c:3", "next", "a:1", "next",
                                 "b:2", "wait", NULL});
}

static void a_hint_is_followed_once_a_round(void **state)
{
    (void)state;
    pc_tour tour = tour_of("a:1,b:2");
    walk(&tour, (const char *[]){"a:1", "hint b:2", "next", "b:2", "hint a:1", "wait", /* tried already */
                                 "hint x:9", "next", "x:9", "hint y:9", "next", "wait", NULL});
    tour = tour_of("a:1,b:2");
    walk(&tour, (const char *[]){"a:1", "next", "b:2", "hint a:1", "wait", NULL}); /* not twice in a round */
}

static void another_one_comes_first_after_a_loss(void **state)
{
    (void)state;
    pc_tour tour = tour_of("a:1,b:2");
    walk(&tour, (const char *[]){"a:1", "lost", "b:2", "hint a:1", "next", "a:1", "wait", NULL});
    tour = tour_of("a:1,b:2");
    walk(&tour, (const char *[]){"a:1", "hint x:9", "next", "x:9", "lost", "next", "wait", NULL});
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(lists),
        cmocka_unit_test(hosts_and_ports),
        cmocka_unit_test(one_is_tried_again_and_again),
        cmocka_unit_test(all_are_tried_in_a_round),
        cmocka_unit_test(a_hint_is_followed_once_a_round),
        cmocka_unit_test(another_one_comes_first_after_a_loss),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
