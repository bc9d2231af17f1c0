/* The coordinator's machine: members that leave, experts that move by load, and every mishap at every step.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "coordinator/balance_core.h"
#include "tests/unit/co_fake.h"

/* ---- leaving ---- */

/* A router is first marked, then told to finish when no gateway can choose it, and gone when it has finished.
 */
static void a_router_leaves_in_two_epochs(void **state)
{
    (void)state;
    for (uint32_t by_operator = 0; by_operator < 2; by_operator++) {
        fake_cluster f;
        fake_start(&f, 2);
        fake_spawn(&f, CO_ROLE_ROUTER);
        fake_spawn(&f, CO_ROLE_GATEWAY);
        fake_settle(&f);
        fake_peer *p = fake_nth(&f, CO_ROLE_ROUTER, 0), *gateway = fake_nth(&f, CO_ROLE_GATEWAY, 1);
        uint64_t before = co_core_epoch(f.core)->number;
        uint32_t id = p->id, ticket = 0;
        if (by_operator) {
            ticket = fake_drain(&f, id);
        } else {
            fake_leave(&f, p);
        }
        assert_int_equal(fake_state(&f, p), CO_MEMBER_LEAVING);
        assert_true(fake_settle_until(&f, gateway, CO_OUT_COMMIT));
        for (uint32_t i = 0; i < FAKE_PEERS; i++) { /* all but one gateway have heard */
            while (&f.peers[i] != gateway && fake_read(&f, &f.peers[i])) {
            }
        }
        assert_true(co_epoch_find(co_core_epoch(f.core), id)->draining);
        assert_int_equal(co_core_epoch(f.core)->number, before + 1);
        assert_false(p->told_drain);
        assert_true(fake_read(&f, gateway));
        assert_true(p->told_drain);
        assert_non_null(co_epoch_find(co_core_epoch(f.core), id)); /* it still gets epochs */
        assert_true(ticket == 0 || !f.answers[ticket].given);
        fake_settle(&f);
        assert_true(p->finished);
        assert_null(co_epoch_find(co_core_epoch(f.core), id));
        assert_true(ticket == 0 || (f.answers[ticket].given && f.answers[ticket].status == CM_OK));
        fake_check_whole(&f);
        assert_int_equal(co_core_n_lost(f.core), 0);
        fake_fini(&f);
    }
}

static void an_operator_drains_a_worker(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 3);
    fake_peer *p = &f.peers[1], *router = fake_nth(&f, CO_ROLE_ROUTER, 0);
    uint32_t id = p->id, ticket = fake_drain(&f, id);
    assert_true(fake_settle_until(&f, router, CO_OUT_COMMIT));
    assert_false(p->told_drain || f.answers[ticket].given); /* the router may still ask it */
    fake_settle(&f);
    assert_true(p->told_drain && p->finished);
    assert_true(f.answers[ticket].given && f.answers[ticket].status == CM_OK);
    fake_check_whole(&f);
    assert_int_equal(f.n_changes, 1);
    fake_fini(&f);
}

static void drains_that_cannot_be(void **state)
{
    (void)state;
    fake_cluster f;
    fake_init(&f, 1);
    fake_spawn(&f, CO_ROLE_WORKER)->capacity = 20; /* 24 are needed */
    fake_spawn(&f, CO_ROLE_WORKER)->capacity = 20;
    fake_spawn(&f, CO_ROLE_ROUTER);
    fake_spawn(&f, CO_ROLE_ROUTER);
    fake_spawn(&f, CO_ROLE_GATEWAY);
    fake_settle(&f);
    uint64_t number = co_core_epoch(f.core)->number;
    const struct {
        uint32_t id;
        cm_status status;
        const char *needle;
    } rows[] = {
        {99, CM_E_NOT_FOUND, "no member 99"},
        {f.peers[0].id, CM_E_CAPACITY,
         "hold 20 of the 24 experts, 40 bytes are missing (member 2 holds 20): add"},
        {f.peers[4].id, CM_E_CAPACITY, "only one of its role"},
        {f.peers[2].id, CM_OK, "member"}, /* one of two routers may go */
        {f.peers[3].id, CM_E_CAPACITY, "only one of its role"},
        {f.peers[2].id, CM_E_EXISTS, "leaving already"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        uint32_t ticket = fake_drain(&f, rows[i].id);
        assert_int_equal(f.answers[ticket].given, rows[i].status != CM_OK);
        if (rows[i].status != CM_OK) {
            assert_int_equal(f.answers[ticket].status, rows[i].status);
            assert_non_null(strstr(f.answers[ticket].text, rows[i].needle));
        }
    }
    assert_int_equal(co_core_epoch(f.core)->number, number);
    fake_settle(&f);
    assert_int_equal(f.answers[4].status, CM_OK);
    fake_check_whole(&f);
    fake_fini(&f);
}

/* Three workers that hold 12 each of 24 experts: any two are enough. */
static void start_tight(fake_cluster *f)
{
    fake_init(f, 3);
    for (uint32_t i = 0; i < 3; i++) {
        fake_spawn(f, CO_ROLE_WORKER)->capacity = 12;
    }
    fake_spawn(f, CO_ROLE_ROUTER);
    fake_spawn(f, CO_ROLE_GATEWAY);
    fake_settle(f);
    fake_check_whole(f);
}

/* A worker dies while another one is drained: at every step of the drain the cluster ends whole. Until the
 * drained one has been let go it is taken back, and the operator hears so. */
static void a_death_takes_the_drained_one_back(void **state)
{
    (void)state;
    uint32_t n_back = 0, n_gone = 0;
    for (uint32_t at = 0, done = 0; !done; at++) {
        fake_cluster f;
        start_tight(&f);
        fake_peer *p = &f.peers[0], *victim = &f.peers[1];
        uint32_t id = p->id, ticket = fake_drain(&f, id);
        for (uint32_t i = 0; i < at && !done; i++) {
            done = !fake_move(&f);
        }
        fake_kill(&f, victim);
        fake_pass(&f, 1000);
        fake_settle(&f);
        assert_true(f.answers[ticket].given);
        if (f.answers[ticket].status == CM_OK) {
            n_gone++;
            assert_true(p->finished);
            fake_spawn(&f, CO_ROLE_WORKER)->capacity = 12; /* it went before: another one is needed */
            fake_settle(&f);
        } else {
            n_back++;
            assert_int_equal(f.answers[ticket].status, CM_E_CAPACITY);
            assert_non_null(strstr(f.answers[ticket].text, "taken back: without it"));
            assert_non_null(
                strstr(f.answers[ticket].text, "hold 12 of the 24 experts, 120 bytes are missing"));
            assert_false(p->told_drain);
            assert_non_null(co_epoch_find(co_core_epoch(f.core), id));
            assert_int_equal(f.drains.n, 0);
            fake_restart(&f); /* and nobody remembers the drain */
            fake_settle(&f);
        }
        fake_check_whole(&f);
        fake_fini(&f);
    }
    printf("  taken back %u times, gone %u times\n", n_back, n_gone);
    assert_true(n_back > 3 && n_gone > 0);
}

/* It would not help, or it goes by its own wish: nothing is overruled. */
static void nobody_is_taken_back_in_vain(void **state)
{
    (void)state;
    for (uint32_t own = 0; own < 2; own++) {
        fake_cluster f;
        char change[256];
        start_tight(&f);
        fake_peer *p = &f.peers[0];
        uint32_t ticket = 0;
        if (own) {
            fake_leave(&f, p);
            fake_kill(&f, &f.peers[1]);
        } else {
            ticket = fake_drain(&f, p->id);
            fake_kill(&f, &f.peers[1]);
            fake_kill(&f, &f.peers[2]);
        }
        fake_pass(&f, 1000);
        fake_settle(&f);
        assert_int_equal(fake_state(&f, p), CO_MEMBER_LEAVING);
        assert_true(ticket == 0 || !f.answers[ticket].given);
        assert_true(co_core_change(f.core, change));
        fake_fini(&f);
    }
}

/* The coordinator goes at any moment of a drain: the next one goes on with it. */
static void a_drain_outlives_the_coordinator(void **state)
{
    (void)state;
    static const Baleen__Control__V1__Role roles[] = {CO_ROLE_WORKER, CO_ROLE_ROUTER};
    uint32_t n_done = 0, n_moves = 0;
    for (uint32_t role = 0; role < 2; role++) {
        for (uint32_t at = 0, done = 0; !done; at++) {
            fake_cluster f;
            fake_start(&f, 3);
            fake_spawn(&f, CO_ROLE_ROUTER);
            fake_settle(&f);
            fake_peer *p = fake_nth(&f, roles[role], 1);
            uint32_t id = p->id, incarnation = (uint32_t)p->incarnation;
            fake_drain(&f, id);
            assert_true(fake_write(&f)); /* else nobody knows of it */
            for (uint32_t i = 0; i < at && !done; i++) {
                done = !fake_move(&f);
            }
            fake_restart(&f);
            fake_settle(&f);
            fake_pass(&f, 5000);
            fake_settle(&f);
            assert_true(p->told_drain && p->finished && p->incarnation == incarnation);
            assert_null(co_epoch_find(co_core_epoch(f.core), id));
            fake_check_whole(&f);
            n_done++;
            n_moves += at;
            fake_fini(&f);
        }
    }
    printf("  %u restarts, %u moves\n", n_done, n_moves);
    assert_true(n_done > 10);
}

/* Ids whose members went while no coordinator could write it down are in nobody's way. */
static void drains_of_the_gone_are_forgotten(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 3);
    for (uint32_t i = 0; i < CO_DRAINS_MAX; i++) {
        f.drains.id[f.drains.n++] = 1000 + i;
    }
    fake_restart(&f);
    fake_settle(&f);
    fake_check_whole(&f);
    uint32_t id = f.peers[1].id, ticket = fake_drain(&f, id);
    assert_true(fake_write(&f));
    assert_int_equal(f.drains.n, 1);
    assert_int_equal(f.drains.id[0], id);
    fake_settle(&f);
    assert_int_equal(f.answers[ticket].status, CM_OK);
    fake_spawn(&f, CO_ROLE_WORKER); /* what is written next is without it */
    fake_settle(&f);
    assert_int_equal(f.drains.n, 0);
    fake_check_whole(&f);
    fake_fini(&f);
}

/* ---- experts by load ---- */

static void a_round_of_rebalancing(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 3);
    uint32_t ticket = fake_rebalance(&f, 0);
    assert_true(f.answers[ticket].given && f.answers[ticket].status == CM_OK);
    assert_non_null(strstr(f.answers[ticket].text, "no load"));

    fake_load(&f, fake_nth(&f, CO_ROLE_ROUTER, 0), fake_skewed);
    uint64_t number = co_core_epoch(f.core)->number;
    pr_placement *before = pr_placement_clone(co_core_epoch(f.core)->placement);
    ticket = fake_rebalance(&f, 3);
    assert_false(f.answers[ticket].given);
    uint32_t second = fake_rebalance(&f, 3);
    assert_int_equal(f.answers[second].status, CM_E_EXISTS);
    fake_settle(&f);
    fake_check_whole(&f);
    const pr_placement *after = co_core_epoch(f.core)->placement;
    assert_int_equal(co_core_epoch(f.core)->number, number + 1);
    assert_int_equal(f.answers[ticket].status, CM_OK);
    uint32_t n_loads = 0;
    for (uint32_t i = 0; i < FAKE_LAYERS * FAKE_EXPERTS; i++) {
        for (uint32_t r = 0; r < 3; r++) {
            n_loads += pr_placement_owns(after, i / FAKE_EXPERTS, i % FAKE_EXPERTS, r) &&
                       !pr_placement_owns(before, i / FAKE_EXPERTS, i % FAKE_EXPERTS, r);
        }
    }
    assert_in_range(n_loads, 1, 3);
    assert_true(co_balance_imbalance(after, co_core_load(f.core)) <
                co_balance_imbalance(before, co_core_load(f.core)));
    pr_placement_free(before);

    number = co_core_epoch(f.core)->number; /* members that come back change nothing of it */
    fake_restart(&f);
    fake_settle(&f);
    fake_check_whole(&f);
    assert_int_equal(co_core_epoch(f.core)->number, number);
    fake_fini(&f);
}

static void load_fades_and_rounds_come_by_themselves(void **state)
{
    (void)state;
    fake_cluster f;
    fake_init(&f, 2);
    co_core_destroy(f.core);
    f.options.rebalance_ms = 5000;
    co_core_past past = {.cluster = 77, .next_member_id = 1, .next_number = 1};
    f.core = co_core_create(&f.options, &past, f.now_ms);
    for (uint32_t i = 0; i < 3; i++) {
        fake_spawn(&f, i < 2 ? CO_ROLE_WORKER : CO_ROLE_ROUTER);
    }
    fake_settle(&f);
    fake_pass(&f, 6000);
    fake_settle(&f);
    fake_check_whole(&f);
    uint64_t number = co_core_epoch(f.core)->number; /* nothing to go by yet */
    fake_load(&f, &f.peers[2], fake_skewed);
    fake_pass(&f, 5000);
    fake_settle(&f);
    fake_check_whole(&f);
    assert_true(co_core_epoch(f.core)->number > number);
    assert_int_equal(co_core_load(f.core)[0], 900);
    fake_pass(&f, 60000);
    fake_settle(&f);
    assert_int_equal(co_core_load(f.core)[0], 450);
    fake_fini(&f);
}

/* While the members are not those of the epoch there is something else to do first. */
static void no_round_while_workers_are_missing(void **state)
{
    (void)state;
    fake_cluster f;
    fake_init(&f, 3);
    co_core_destroy(f.core);
    f.options.rebalance_ms = 1000;
    co_core_past past = {.cluster = 77, .next_member_id = 1, .next_number = 1};
    f.core = co_core_create(&f.options, &past, f.now_ms);
    for (uint32_t i = 0; i < 4; i++) {
        fake_spawn(&f, i < 3 ? CO_ROLE_WORKER : CO_ROLE_ROUTER)->capacity = 11; /* 24 are needed */
    }
    fake_settle(&f);
    fake_check_whole(&f);
    fake_kill(&f, &f.peers[0]);
    fake_pass(&f, 300);
    fake_settle(&f);
    fake_load(&f, &f.peers[3], fake_skewed);
    uint64_t number = co_core_epoch(f.core)->number;
    fake_pass(&f, 5000);
    fake_settle(&f);
    assert_int_equal(co_core_epoch(f.core)->number, number);
    uint32_t ticket = fake_rebalance(&f, 1);
    assert_int_equal(f.answers[ticket].status, CM_E_UNAVAILABLE);
    assert_non_null(strstr(f.answers[ticket].text, "22 of the 24 experts"));
    fake_spawn(&f, CO_ROLE_WORKER);
    fake_settle(&f);
    fake_check_whole(&f);
    fake_fini(&f);
}

typedef enum change_kind { CHANGE_JOIN, CHANGE_DRAIN, CHANGE_DEATH, CHANGE_BALANCE, CHANGES } change_kind;
typedef enum mishap {
    MISHAP_KILL,
    MISHAP_HANG,
    MISHAP_FAIL,
    MISHAP_BLINK,
    MISHAP_RESTART, /* of the coordinator, and the worker dies meanwhile */
    MISHAPS
} mishap;

/* peers: 0 1 2 workers, 3 router, 4 gateway; 5 the worker that joins. Returns a ticket or 0. */
static uint32_t change_start(fake_cluster *f, change_kind kind)
{
    fake_init(f, 3);
    f->options.members_max = 32;
    for (uint32_t i = 0; i < 5; i++) {
        fake_spawn(f, i < 3 ? CO_ROLE_WORKER : i == 3 ? CO_ROLE_ROUTER : CO_ROLE_GATEWAY);
    }
    fake_settle(f);
    fake_check_whole(f);
    fake_load(f, &f->peers[3], fake_skewed);
    switch (kind) {
    case CHANGE_JOIN:
        fake_hello(f, fake_spawn(f, CO_ROLE_WORKER));
        return 0;
    case CHANGE_DRAIN:
        return fake_drain(f, f->peers[1].id);
    case CHANGE_DEATH:
        fake_kill(f, &f->peers[1]);
        fake_pass(f, 300);
        return 0;
    default:
        return fake_rebalance(f, 4);
    }
}

/* What befalls a worker in the middle of a change; the rest of the change and of its life follow. */
static void mishap_happens(fake_cluster *f, fake_peer *p, mishap what)
{
    if (what == MISHAP_KILL) {
        fake_kill(f, p);
        fake_pass(f, 300);
    } else if (what == MISHAP_HANG) {
        p->hung = true;
        fake_pass(f, 3500);
        p->hung = false;
    } else if (what == MISHAP_BLINK) {
        fake_disconnect(f, p);
        fake_pass(f, 100);
    } else if (what == MISHAP_RESTART) {
        p->alive = false;
        fake_restart(f);
    }
}

/* Every kind of change, at every single step of it, with each worker failing in every way: the epoch in force
 * is always whole (the fake cluster checks each word), at the end all is, and whoever asked is told. */
static void any_mishap_at_any_step(void **state)
{
    (void)state;
    uint32_t n_steps = 0, n_undone = 0;
    for (change_kind kind = 0; kind < CHANGES; kind++) {
        for (uint32_t victim = 0; victim < 6; victim = victim == 2 ? 5 : victim + 1) {
            for (mishap what = 0; what < MISHAPS; what++) {
                bool more = true;
                for (uint32_t step = 0; more; step++) {
                    fake_cluster f;
                    uint32_t ticket = change_start(&f, kind);
                    fake_peer *p = &f.peers[victim];
                    uint64_t before = co_core_epoch(f.core)->number;
                    if (!p->used || !p->alive) {
                        fake_fini(&f);
                        break;
                    }
                    p->fails_prepare = what == MISHAP_FAIL;
                    for (uint32_t k = 0; k < step && more; k++) {
                        more = fake_move(&f);
                    }
                    if (p->session != 0) {
                        mishap_happens(&f, p, what);
                    }
                    for (uint32_t k = 0; k < 200 && fake_move(&f); k++) {
                    }
                    n_undone += co_core_epoch(f.core)->number == before;
                    p->fails_prepare = false;
                    fake_settle(&f);
                    fake_pass(&f, 3500);
                    fake_settle(&f);
                    fake_check_whole(&f);
                    /* a restart ends the operator's call itself */
                    assert_true(ticket == 0 || what == MISHAP_RESTART || f.answers[ticket].given);
                    fake_fini(&f);
                    n_steps++;
                }
            }
        }
    }
    printf("  %u runs, %u with the change undone\n", n_steps, n_undone);
    assert_true(n_steps > 300 && n_undone > 10);
}

/* A worker that cannot load what balance would give it serves on with what it has. */
static void a_failed_round_costs_nobody_his_place(void **state)
{
    (void)state;
    for (uint32_t victim = 0; victim < 3; victim++) {
        fake_cluster f;
        change_start(&f, CHANGE_JOIN);
        fake_settle(&f);
        fake_check_whole(&f);
        fake_snapshot before = fake_snapshot_take(&f);
        f.peers[victim].fails_prepare = true;
        uint64_t session = f.peers[victim].session;
        uint32_t ticket = fake_rebalance(&f, 8), n_commits = f.n_commits;
        fake_settle(&f);
        assert_true(f.answers[ticket].given);
        assert_int_equal(f.answers[ticket].status, CM_E_UNAVAILABLE);
        assert_non_null(strstr(f.answers[ticket].text, "disk on fire"));
        assert_int_equal(f.peers[victim].session, session);
        assert_int_equal(f.n_commits, n_commits);
        fake_snapshot after = fake_snapshot_take(&f);
        fake_snapshot_compare(&before, &after);
        fake_check_whole(&f);
        f.peers[victim].fails_prepare = false;
        ticket = fake_rebalance(&f, 8);
        fake_settle(&f);
        assert_int_equal(f.answers[ticket].status, CM_OK);
        fake_check_whole(&f);
        fake_fini(&f);
    }
}

/* Routers that answer from a script: nothing is placed, no worker is waited for, none can join, and what has
 * experts does not mix with what has none. */
static void a_model_without_experts_needs_no_workers(void **state)
{
    (void)state;
    fake_cluster f;
    fake_init(&f, 3);
    fake_peer *router = fake_spawn(&f, CO_ROLE_ROUTER);
    router->n_layer = 0;
    fake_spawn(&f, CO_ROLE_GATEWAY);
    fake_settle(&f);
    fake_check_whole(&f);
    assert_int_equal(co_core_epoch(f.core)->placement->n_rank, 0);
    assert_int_equal(co_core_epoch(f.core)->message->n_members, 2);

    const Baleen__Control__V1__Role roles[] = {CO_ROLE_WORKER, CO_ROLE_ROUTER};
    for (uint32_t i = 0; i < 2; i++) {
        fake_peer *other = fake_spawn(&f, roles[i]);
        fake_settle(&f);
        assert_true(other->refused_final);
        assert_non_null(strstr(other->refused, "n_layer 3 there, the cluster's is 0"));
    }
    fake_peer *worker = fake_spawn(&f, CO_ROLE_WORKER); /* a worker must have experts */
    worker->n_layer = 0;
    fake_settle(&f);
    assert_true(worker->refused_final);

    fake_restart(&f); /* the log has an epoch without a placement of anything */
    fake_settle(&f);
    fake_check_whole(&f);
    router = fake_spawn(&f, CO_ROLE_ROUTER);
    router->n_layer = 0;
    fake_settle(&f);
    fake_check_whole(&f);
    assert_int_equal(co_core_epoch(f.core)->message->n_members, 3);
    fake_fini(&f);

    fake_start(&f, 2);
    router = fake_spawn(&f, CO_ROLE_ROUTER);
    router->n_layer = 0;
    fake_settle(&f);
    assert_true(router->refused_final);
    assert_non_null(strstr(router->refused, "n_layer 0 there, the cluster's is 3"));
    fake_fini(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_model_without_experts_needs_no_workers),
        cmocka_unit_test(a_router_leaves_in_two_epochs),
        cmocka_unit_test(an_operator_drains_a_worker),
        cmocka_unit_test(drains_that_cannot_be),
        cmocka_unit_test(a_death_takes_the_drained_one_back),
        cmocka_unit_test(nobody_is_taken_back_in_vain),
        cmocka_unit_test(a_drain_outlives_the_coordinator),
        cmocka_unit_test(drains_of_the_gone_are_forgotten),
        cmocka_unit_test(a_round_of_rebalancing),
        cmocka_unit_test(load_fades_and_rounds_come_by_themselves),
        cmocka_unit_test(no_round_while_workers_are_missing),
        cmocka_unit_test(any_mishap_at_any_step),
        cmocka_unit_test(a_failed_round_costs_nobody_his_place),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
