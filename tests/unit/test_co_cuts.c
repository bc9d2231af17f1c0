/* The coordinator's machine: routers and workers that live and cannot reach one another. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "tests/unit/co_fake.h"

enum { CUT_MS = 10000, HOLD_MS = 60000 }; /* of co_fake.c; of the machine */

static bool in_epoch(const fake_cluster *f, uint32_t id)
{
    return co_epoch_find(co_core_epoch(f->core), id) != NULL;
}

static void pass_and_settle(fake_cluster *f, uint64_t ms)
{
    fake_pass(f, ms);
    fake_settle(f);
}

/* Three workers, n routers, one gateway. */
static void start(fake_cluster *f, uint32_t n_routers)
{
    fake_start(f, 3);
    for (uint32_t i = 1; i < n_routers; i++) {
        fake_spawn(f, CO_ROLE_ROUTER);
    }
    fake_settle(f);
    fake_check_whole(f);
}

/* With one router the worker goes, comes back after a while, and goes for longer. */
static void one_router(void **state)
{
    (void)state;
    fake_cluster f;
    start(&f, 1);
    fake_peer *router = fake_nth(&f, CO_ROLE_ROUTER, 0), *worker = &f.peers[1];
    fake_report(&f, router, worker->id, CM_E_SILENT);
    uint32_t n_warnings = f.n_warnings;
    pass_and_settle(&f, CUT_MS - 100);
    fake_report(&f, router, worker->id, CM_E_UNREACHABLE); /* still; no news and no new begin */
    assert_int_equal(f.n_warnings, n_warnings);
    assert_true(in_epoch(&f, worker->id));
    assert_int_equal(fake_state(&f, worker), CO_MEMBER_SUSPECT);
    assert_true(co_core_wake_ms(f.core) <= f.now_ms + 100);
    uint32_t n_retires = f.n_retires;
    pass_and_settle(&f, 100);
    assert_false(in_epoch(&f, worker->id));
    assert_int_equal(f.n_retires, n_retires + 3); /* it too: what it holds would come on top of the next */
    assert_int_equal(fake_state(&f, worker), CO_MEMBER_CUT_OFF);
    assert_true(worker->alive && worker->session != 0 && !worker->told_drain);
    assert_int_equal(co_core_n_lost(f.core), 0);

    pass_and_settle(&f, HOLD_MS - 1000);
    assert_false(in_epoch(&f, worker->id));
    pass_and_settle(&f, 1000);
    fake_check_whole(&f); /* nobody complains any more */
    pass_and_settle(&f, 2 * CUT_MS);
    fake_check_whole(&f);

    fake_report(&f, router, worker->id, CM_E_UNREACHABLE);
    pass_and_settle(&f, CUT_MS);
    assert_false(in_epoch(&f, worker->id));
    pass_and_settle(&f, 2 * HOLD_MS - 1000);
    assert_false(in_epoch(&f, worker->id));
    pass_and_settle(&f, 1000);
    fake_check_whole(&f);
    pass_and_settle(&f, 2 * HOLD_MS); /* it was well for long enough */
    fake_report(&f, router, worker->id, CM_E_UNREACHABLE);
    pass_and_settle(&f, CUT_MS);
    pass_and_settle(&f, HOLD_MS);
    fake_check_whole(&f);
    fake_fini(&f);
}

/* What is over in time, or was said by somebody else's business, changes nothing. */
static void over_in_time(void **state)
{
    (void)state;
    fake_cluster f;
    start(&f, 1);
    fake_peer *router = fake_nth(&f, CO_ROLE_ROUTER, 0), *gateway = fake_nth(&f, CO_ROLE_GATEWAY, 0);
    uint64_t number = co_core_epoch(f.core)->number;
    for (uint32_t i = 0; i < 5; i++) {
        fake_report(&f, router, f.peers[1].id, CM_E_RESET);
        fake_pass(&f, CUT_MS - 500);
        fake_report(&f, router, f.peers[1].id, CM_OK);
        fake_pass(&f, 500);
    }
    fake_report(&f, router, f.peers[0].id, CM_OK); /* never lost */
    fake_report(&f, gateway, router->id, CM_E_RESET);
    fake_report(&f, gateway, f.peers[0].id, CM_E_RESET);
    fake_report(&f, &f.peers[0], f.peers[1].id, CM_E_RESET);
    pass_and_settle(&f, 3 * CUT_MS);
    fake_report(&f, router, f.peers[1].id, CM_E_RESET);
    fake_pass(&f, CUT_MS - 500);
    fake_disconnect(&f, router); /* it will say it anew */
    fake_settle(&f);
    pass_and_settle(&f, CUT_MS);
    assert_int_equal(co_core_epoch(f.core)->number, number);
    fake_check_whole(&f);
    fake_fini(&f);
}

/* The one that is alone with its complaint goes, and only it. */
static void the_odd_router(void **state)
{
    (void)state;
    fake_cluster f;
    start(&f, 3);
    fake_peer *odd = fake_nth(&f, CO_ROLE_ROUTER, 1);
    uint32_t id = odd->id;
    fake_report(&f, odd, f.peers[0].id, CM_E_SILENT);
    fake_report(&f, odd, f.peers[1].id, CM_E_SILENT);
    fake_pass(&f, CUT_MS);
    assert_int_equal(fake_state(&f, odd), CO_MEMBER_LEAVING);
    fake_settle(&f);
    assert_true(odd->told_drain && odd->finished);
    assert_false(in_epoch(&f, id));
    pass_and_settle(&f, 2 * CUT_MS);
    fake_check_whole(&f); /* all three workers */
    fake_fini(&f);
}

static void two_of_three_routers(void **state)
{
    (void)state;
    fake_cluster f;
    start(&f, 3);
    fake_peer *worker = &f.peers[2];
    fake_report(&f, fake_nth(&f, CO_ROLE_ROUTER, 0), worker->id, CM_E_SILENT);
    fake_report(&f, fake_nth(&f, CO_ROLE_ROUTER, 2), worker->id, CM_E_SILENT);
    pass_and_settle(&f, CUT_MS);
    assert_false(in_epoch(&f, worker->id));
    assert_int_equal(co_epoch_count(co_core_epoch(f.core), CO_ROLE_ROUTER), 3);
    fake_kill(&f, worker); /* as a new process it is taken at once */
    fake_spawn(&f, CO_ROLE_WORKER);
    pass_and_settle(&f, 1000);
    fake_check_whole(&f);
    fake_fini(&f);
}

/* Two routers never notice at the same moment. The first is not the odd one before the second's time is over.
 */
static void one_after_the_other(void **state)
{
    (void)state;
    fake_cluster f;
    start(&f, 2);
    fake_peer *first = fake_nth(&f, CO_ROLE_ROUTER, 0), *second = fake_nth(&f, CO_ROLE_ROUTER, 1);
    fake_peer *worker = &f.peers[0];
    fake_report(&f, first, worker->id, CM_E_SILENT);
    fake_pass(&f, 500);
    fake_report(&f, second, worker->id, CM_E_SILENT);
    pass_and_settle(&f, CUT_MS - 500);
    assert_int_not_equal(fake_state(&f, first), CO_MEMBER_LEAVING);
    assert_true(in_epoch(&f, worker->id));
    assert_true(co_core_wake_ms(f.core) <= f.now_ms + 500);
    pass_and_settle(&f, 500);
    assert_false(in_epoch(&f, worker->id));
    assert_int_equal(co_epoch_count(co_core_epoch(f.core), CO_ROLE_ROUTER), 2);
    assert_int_equal(fake_state(&f, first), CO_MEMBER_READY);
    assert_int_equal(fake_state(&f, second), CO_MEMBER_READY);
    fake_fini(&f);

    start(&f, 2);
    first = fake_nth(&f, CO_ROLE_ROUTER, 0), second = fake_nth(&f, CO_ROLE_ROUTER, 1);
    fake_report(&f, first, f.peers[0].id, CM_E_SILENT);
    fake_pass(&f, CUT_MS - 500);
    fake_report(&f, second, f.peers[0].id, CM_E_SILENT);
    fake_pass(&f, 1000);
    fake_report(&f, second, f.peers[0].id, CM_OK);
    assert_int_equal(fake_state(&f, first), CO_MEMBER_LEAVING); /* it was */
    pass_and_settle(&f, 2 * CUT_MS);
    fake_check_whole(&f);
    fake_fini(&f);
}

/* It would have to go, and the other one cannot hold all experts. */
static void no_room_without_it(void **state)
{
    (void)state;
    fake_cluster f;
    fake_init(&f, 2);
    fake_spawn(&f, CO_ROLE_WORKER)->capacity = 12; /* of 24 */
    fake_spawn(&f, CO_ROLE_WORKER)->capacity = 12;
    fake_spawn(&f, CO_ROLE_ROUTER);
    fake_spawn(&f, CO_ROLE_GATEWAY);
    fake_settle(&f);
    uint64_t number = co_core_epoch(f.core)->number;
    fake_report(&f, &f.peers[2], f.peers[0].id, CM_E_SILENT);
    uint32_t n_warnings = f.n_warnings;
    pass_and_settle(&f, 5 * CUT_MS);
    assert_int_equal(f.n_warnings, n_warnings + 1); /* said once */
    assert_int_equal(co_core_epoch(f.core)->number, number);
    fake_check_whole(&f);
    fake_peer *third = fake_spawn(&f, CO_ROLE_WORKER); /* with it, it can be spared */
    third->capacity = 12;
    pass_and_settle(&f, 1000);
    assert_true(in_epoch(&f, third->id));
    assert_false(in_epoch(&f, f.peers[0].id));
    assert_true(in_epoch(&f, f.peers[1].id));
    fake_fini(&f);
}

/* A worker that is left out is better than none. */
static void taken_back_when_it_is_needed(void **state)
{
    (void)state;
    fake_cluster f;
    fake_init(&f, 3);
    for (uint32_t i = 0; i < 3; i++) {
        fake_spawn(&f, CO_ROLE_WORKER)->capacity = 12;
    }
    fake_spawn(&f, CO_ROLE_ROUTER);
    fake_spawn(&f, CO_ROLE_GATEWAY);
    fake_settle(&f);
    fake_report(&f, &f.peers[3], f.peers[0].id, CM_E_SILENT);
    pass_and_settle(&f, CUT_MS);
    assert_false(in_epoch(&f, f.peers[0].id));
    fake_kill(&f, &f.peers[1]);
    pass_and_settle(&f, 1000);
    fake_check_whole(&f);
    assert_true(in_epoch(&f, f.peers[0].id));
    fake_fini(&f);
}

/* Out of an epoch for a while, its routers dropped their links to it and say of them neither that they are up
 * nor that they are lost: what they said before is no reason to leave it out. */
static void drained_and_taken_back(void **state)
{
    (void)state;
    fake_cluster f;
    fake_init(&f, 3);
    for (uint32_t i = 0; i < 3; i++) {
        fake_spawn(&f, CO_ROLE_WORKER)->capacity = 12;
    }
    fake_spawn(&f, CO_ROLE_ROUTER);
    fake_spawn(&f, CO_ROLE_GATEWAY);
    fake_settle(&f);
    uint32_t id = f.peers[0].id;
    fake_report(&f, &f.peers[3], id, CM_E_RESET); /* and it would be up again in a moment */
    fake_drain(&f, id);
    while (in_epoch(&f, id)) {
        assert_true(fake_move(&f));
    }
    fake_kill(&f, &f.peers[1]);
    pass_and_settle(&f, CUT_MS / 2);
    fake_check_whole(&f);
    assert_true(in_epoch(&f, id));
    fake_spawn(&f, CO_ROLE_WORKER)->capacity = 12; /* so that it could be left out */
    pass_and_settle(&f, 3 * CUT_MS);
    assert_true(in_epoch(&f, id));
    assert_int_equal(fake_state(&f, &f.peers[0]), CO_MEMBER_READY);
    fake_fini(&f);
}

/* ---- blind routers ---- */

static void report_all(fake_cluster *f, fake_peer *router, cm_status status)
{
    for (uint32_t i = 0; i < 3; i++) {
        fake_report(f, router, f->peers[i].id, status);
    }
}

/* A router that reaches nobody, and there is no other: leaving its workers out would help nobody. */
static void its_own_network(void **state)
{
    (void)state;
    fake_cluster f;
    start(&f, 1);
    fake_peer *router = fake_nth(&f, CO_ROLE_ROUTER, 0);
    uint64_t number = co_core_epoch(f.core)->number;
    for (uint32_t i = 0; i < 3; i++) {
        fake_report(&f, router, f.peers[i].id, CM_E_SILENT);
        fake_pass(&f, 1000); /* not all are missed at once */
    }
    uint32_t n_warnings = f.n_warnings;
    pass_and_settle(&f, 20 * CUT_MS);
    assert_int_equal(co_core_epoch(f.core)->number, number);
    assert_int_equal(f.n_warnings, n_warnings + 1); /* said once */
    fake_check_whole(&f);
    report_all(&f, router, CM_OK);
    pass_and_settle(&f, CUT_MS);
    fake_report(&f, router, f.peers[0].id, CM_E_SILENT); /* that may be the worker's */
    pass_and_settle(&f, CUT_MS);
    assert_false(in_epoch(&f, f.peers[0].id));
    fake_fini(&f);
}

/* The same, slowly: the first may be the worker's fault, but not all of them one after the other. */
static void one_by_one(void **state)
{
    (void)state;
    fake_cluster f;
    start(&f, 1);
    fake_peer *router = fake_nth(&f, CO_ROLE_ROUTER, 0);
    for (uint32_t i = 0; i < 3; i++) {
        fake_report(&f, router, f.peers[i].id, CM_E_SILENT);
        pass_and_settle(&f, CUT_MS);
    }
    assert_false(in_epoch(&f, f.peers[0].id));
    assert_true(in_epoch(&f, f.peers[1].id));
    assert_true(in_epoch(&f, f.peers[2].id));
    fake_fini(&f);
}

/* Half of the routers behind a switch that fails: they are many, and it is they who go. */
static void behind_a_switch(void **state)
{
    (void)state;
    fake_cluster f;
    start(&f, 4);
    uint32_t first = fake_nth(&f, CO_ROLE_ROUTER, 0)->id, second = fake_nth(&f, CO_ROLE_ROUTER, 1)->id;
    report_all(&f, fake_nth(&f, CO_ROLE_ROUTER, 0), CM_E_SILENT);
    fake_pass(&f, 500);
    report_all(&f, fake_nth(&f, CO_ROLE_ROUTER, 1), CM_E_SILENT);
    pass_and_settle(&f, 2 * CUT_MS);
    assert_false(in_epoch(&f, first));
    assert_false(in_epoch(&f, second));
    assert_int_equal(co_epoch_count(co_core_epoch(f.core), CO_ROLE_ROUTER), 2);
    assert_int_equal(co_epoch_count(co_core_epoch(f.core), CO_ROLE_WORKER), 3);
    fake_check_whole(&f);
    fake_fini(&f);
}

/* One of its links comes and goes, and the others stay away: it goes all the same, in its time. */
static void blind_with_a_flapping_link(void **state)
{
    (void)state;
    fake_cluster f;
    start(&f, 2);
    fake_peer *router = fake_nth(&f, CO_ROLE_ROUTER, 1);
    report_all(&f, router, CM_E_SILENT);
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_not_equal(fake_state(&f, router), CO_MEMBER_LEAVING);
        fake_pass(&f, CUT_MS / 4);
        fake_report(&f, router, f.peers[0].id, CM_OK);
        fake_report(&f, router, f.peers[0].id, CM_E_RESET);
    }
    fake_pass(&f, 1);
    assert_int_equal(fake_state(&f, router), CO_MEMBER_LEAVING);
    pass_and_settle(&f, CUT_MS);
    assert_int_equal(co_epoch_count(co_core_epoch(f.core), CO_ROLE_ROUTER), 1);
    fake_check_whole(&f);
    fake_fini(&f);
}

/* It sees again, link by link: what it does not reach yet gets its time from then on. */
static void sight_comes_back_by_and_by(void **state)
{
    (void)state;
    fake_cluster f;
    start(&f, 2);
    fake_peer *router = fake_nth(&f, CO_ROLE_ROUTER, 1);
    report_all(&f, router, CM_E_SILENT);
    fake_pass(&f, CUT_MS - 500);
    fake_report(&f, router, f.peers[0].id, CM_OK);
    fake_report(&f, router, f.peers[1].id, CM_OK);
    fake_pass(&f, CUT_MS - 500);
    fake_report(&f, router, f.peers[2].id, CM_OK);
    pass_and_settle(&f, CUT_MS);
    assert_int_equal(co_epoch_count(co_core_epoch(f.core), CO_ROLE_ROUTER), 2);
    fake_check_whole(&f);
    fake_fini(&f);
}

/* All of them behind it: nobody goes, and when it works again nothing has changed. */
static void all_behind_a_switch(void **state)
{
    (void)state;
    fake_cluster f;
    start(&f, 2);
    uint64_t number = co_core_epoch(f.core)->number;
    report_all(&f, fake_nth(&f, CO_ROLE_ROUTER, 0), CM_E_SILENT);
    fake_pass(&f, 1000);
    report_all(&f, fake_nth(&f, CO_ROLE_ROUTER, 1), CM_E_SILENT);
    pass_and_settle(&f, 5 * CUT_MS);
    assert_int_equal(co_core_epoch(f.core)->number, number);
    report_all(&f, fake_nth(&f, CO_ROLE_ROUTER, 0), CM_OK);
    report_all(&f, fake_nth(&f, CO_ROLE_ROUTER, 1), CM_OK);
    pass_and_settle(&f, 5 * CUT_MS);
    assert_int_equal(co_core_epoch(f.core)->number, number);
    fake_check_whole(&f);
    fake_fini(&f);
}

/* The odd router goes, is started again, and misses the same worker again: this time it is the worker's turn.
 */
static void not_drained_for_ever(void **state)
{
    (void)state;
    enum { HOUR_MS = 3600000 };
    fake_cluster f;
    start(&f, 3);
    uint32_t worker = f.peers[0].id;
    fake_peer *odd = fake_nth(&f, CO_ROLE_ROUTER, 1);
    fake_report(&f, odd, worker, CM_E_SILENT);
    pass_and_settle(&f, CUT_MS);
    assert_true(odd->finished && in_epoch(&f, worker));
    for (uint32_t i = 0; i < 3; i++) {
        odd = fake_spawn(&f, CO_ROLE_ROUTER);
        fake_settle(&f);
        fake_report(&f, odd, worker, CM_E_UNREACHABLE);
        pass_and_settle(&f, CUT_MS);
        bool long_ago = i == 2;
        assert_int_equal(odd->finished, long_ago);
        assert_int_equal(in_epoch(&f, worker), long_ago);
        pass_and_settle(&f, i == 1 ? HOUR_MS : 4 * HOLD_MS);
        assert_true(in_epoch(&f, worker)); /* tried again */
    }
    fake_check_whole(&f);
    fake_fini(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_router),
        cmocka_unit_test(over_in_time),
        cmocka_unit_test(the_odd_router),
        cmocka_unit_test(two_of_three_routers),
        cmocka_unit_test(no_room_without_it),
        cmocka_unit_test(taken_back_when_it_is_needed),
        cmocka_unit_test(one_after_the_other),
        cmocka_unit_test(drained_and_taken_back),
        cmocka_unit_test(its_own_network),
        cmocka_unit_test(one_by_one),
        cmocka_unit_test(behind_a_switch),
        cmocka_unit_test(all_behind_a_switch),
        cmocka_unit_test(not_drained_for_ever),
        cmocka_unit_test(blind_with_a_flapping_link),
        cmocka_unit_test(sight_comes_back_by_and_by),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
