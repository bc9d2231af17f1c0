/* The coordinator's machine: joins, changes of epoch, deaths at every phase, and a long random walk. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "tests/unit/co_fake.h"
#include "common/base/rng.h"

static uint64_t g_seed;

typedef struct walk {
    uint64_t key, counter;
} walk;

static uint32_t walk_below(walk *w, uint32_t n)
{
    return cm_rng_at(w->key, w->counter++, 0).word[0] % n;
}

/* ---- joining ---- */

static void join_in_any_order(void **state)
{
    (void)state;
    static const uint32_t sizes[] = {1, 2, 3, 5, 7};
    for (uint32_t round = 0; round < 40; round++) {
        walk w = {g_seed + round, 0};
        fake_cluster f;
        uint32_t n_workers = sizes[round % 5], left[5] = {0, 0, 2, 2, n_workers}; /* by role */
        fake_init(&f, 1 + walk_below(&w, n_workers));
        while (left[CO_ROLE_GATEWAY] + left[CO_ROLE_ROUTER] + left[CO_ROLE_WORKER] > 0) {
            uint32_t role = CO_ROLE_GATEWAY + walk_below(&w, 3);
            if (left[role] > 0) {
                left[role]--;
                fake_hello(&f, fake_spawn(&f, (Baleen__Control__V1__Role)role));
            }
            for (uint32_t n = walk_below(&w, 12); n > 0; n--) {
                fake_write(&f);
                fake_read(&f, &f.peers[walk_below(&w, 12)]);
            }
        }
        fake_settle(&f);
        fake_check_whole(&f);
        const pr_placement *place = co_core_epoch(f.core)->placement;
        assert_int_equal(place->n_rank, n_workers);
        for (uint32_t r = 0; r < n_workers; r++) { /* even: totals differ by one at most */
            uint32_t floor = FAKE_LAYERS * FAKE_EXPERTS / n_workers, n = pr_placement_count(place, r);
            assert_true(n == floor || n == floor + 1);
        }
        fake_fini(&f);
    }
}

static void waits_for_workers_min(void **state)
{
    (void)state;
    fake_cluster f;
    char change[256];
    fake_init(&f, 3);
    fake_spawn(&f, CO_ROLE_WORKER);
    fake_spawn(&f, CO_ROLE_ROUTER);
    fake_spawn(&f, CO_ROLE_WORKER);
    fake_settle(&f);
    assert_null(co_core_epoch(f.core));
    assert_true(co_core_change(f.core, change));
    assert_string_equal(change, "waiting for workers: 2 of 3 are there");
    fake_spawn(&f, CO_ROLE_WORKER);
    fake_settle(&f);
    fake_check_whole(&f);
    assert_int_equal(f.n_changes, 1);
    fake_kill(&f, fake_nth(&f, CO_ROLE_WORKER, 0)); /* the minimum is for the start only */
    fake_pass(&f, 400);
    fake_settle(&f);
    fake_check_whole(&f);
    assert_int_equal(f.n_changes, 2);
    fake_fini(&f);
}

static void other_checkpoint_is_refused(void **state)
{
    (void)state;
    static const struct {
        const char *fingerprint;
        uint32_t n_layer, protocol;
        Baleen__Control__V1__Role role;
        const char *needles[3];
    } cases[] = {
        {"xyz", FAKE_LAYERS, 1, CO_ROLE_WORKER, {"fingerprint", "xyz", "abc"}},
        {"xyz", FAKE_LAYERS, 1, CO_ROLE_GATEWAY, {"fingerprint", "xyz", "abc"}},
        {"abc", FAKE_LAYERS + 1, 1, CO_ROLE_ROUTER, {"n_layer", "4 there", "3"}},
        {"abc", FAKE_LAYERS, 9, CO_ROLE_WORKER, {"protocol", "9 there", "1 here"}},
        {"", FAKE_LAYERS, 1, CO_ROLE_WORKER, {"no model", "''", "3 layers"}},
        {"a\nb", FAKE_LAYERS, 1, CO_ROLE_WORKER, {"control characters", "fingerprint", ""}},
        {"abc", FAKE_LAYERS, 1, CO_ROLE_COORDINATOR, {"role 1", "cannot", "member"}},
    };
    fake_cluster f;
    fake_start(&f, 2);
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        fake_peer *p = fake_spawn(&f, cases[i].role);
        p->fingerprint = cases[i].fingerprint;
        p->n_layer = cases[i].n_layer;
        p->protocol = cases[i].protocol;
        fake_settle(&f);
        assert_true(p->refused_final);
        for (size_t k = 0; k < 3; k++) {
            if (strstr(p->refused, cases[i].needles[k]) == NULL) {
                fail_msg("'%s' does not say %s", p->refused, cases[i].needles[k]);
            }
        }
        assert_int_equal(f.n_changes, 0);
    }
    fake_fini(&f);
}

/* Its address would be of no use to the others. */
static void other_transport_is_refused(void **state)
{
    (void)state;
    static const Baleen__Control__V1__Role roles[] = {CO_ROLE_WORKER, CO_ROLE_ROUTER, CO_ROLE_GATEWAY};
    fake_cluster f;
    fake_start(&f, 2);
    for (size_t i = 0; i < sizeof(roles) / sizeof(roles[0]); i++) {
        fake_peer *p = fake_spawn(&f, roles[i]);
        p->net = "shm";
        fake_settle(&f);
        assert_true(p->refused_final);
        assert_non_null(strstr(p->refused, "--net shm there, the cluster's is ucx"));
        assert_int_equal(f.n_changes, 0);
    }
    fake_fini(&f);
}

static void early_gateway_of_another_checkpoint(void **state)
{
    (void)state;
    fake_cluster f;
    fake_init(&f, 1);
    fake_peer *wrong = fake_spawn(&f, CO_ROLE_GATEWAY);
    wrong->fingerprint = "xyz";
    fake_peer *silent = fake_spawn(&f, CO_ROLE_GATEWAY);
    silent->fingerprint = "";
    fake_settle(&f);
    assert_false(wrong->refused_final);
    fake_spawn(&f, CO_ROLE_WORKER);
    fake_settle(&f);
    assert_true(wrong->refused_final);
    fake_check_whole(&f);
    fake_fini(&f);
}

static void too_many_members(void **state)
{
    (void)state;
    fake_cluster f;
    fake_init(&f, 1);
    for (uint32_t i = 0; i < 32; i++) {
        fake_spawn(&f, i % 8 == 0 ? CO_ROLE_WORKER : CO_ROLE_ROUTER);
    }
    fake_settle(&f);
    fake_check_whole(&f);
    fake_peer *p = fake_spawn(&f, CO_ROLE_ROUTER);
    fake_hello(&f, p);
    assert_int_equal(p->session, 0);
    assert_false(p->refused_final);
    assert_non_null(strstr(p->refused, "32 members"));
    fake_kill(&f, fake_nth(&f, CO_ROLE_ROUTER, 0));
    fake_pass(&f, 300);
    fake_settle(&f);
    assert_true(p->welcomed);
    fake_fini(&f);
}

static void hello_must_come_first_and_once(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 1);
    fake_peer *p = fake_spawn(&f, CO_ROLE_ROUTER);
    p->session = ++f.next_session;
    fake_leave(&f, p);
    assert_int_equal(p->session, 0);
    assert_non_null(strstr(p->refused, "Hello"));
    fake_fini(&f);
}

/* ---- coming back ---- */

static void reconnect_keeps_id_and_epoch(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 3);
    for (uint32_t i = 0; i < 5; i++) {
        fake_peer *p = &f.peers[i];
        uint32_t id = p->id;
        fake_disconnect(&f, p);
        assert_int_equal(fake_state(&f, p), CO_MEMBER_SUSPECT);
        fake_pass(&f, 200);
        fake_settle(&f);
        assert_int_equal(p->id, id);
    }
    fake_check_whole(&f);
    assert_int_equal(f.n_changes, 0);

    fake_peer *p = &f.peers[0]; /* a second session before the first is known to be lost */
    uint32_t id = p->id;
    uint64_t old = p->session;
    fake_hello(&f, p);
    fake_settle(&f);
    assert_true(p->session != old && p->id == id);
    fake_check_whole(&f);
    fake_fini(&f);
}

static void new_incarnation_gets_a_new_id(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 2);
    fake_peer *p = &f.peers[0];
    uint32_t id = p->id;
    fake_disconnect(&f, p);
    p->incarnation = ++f.next_incarnation; /* the process started again and remembers its old id */
    p->epoch = p->prepared = 0;
    fake_settle(&f);
    assert_true(p->id > id);
    fake_pass(&f, 400); /* the old one dies */
    fake_settle(&f);
    fake_check_whole(&f);
    fake_fini(&f);
}

static void a_foreign_past_is_ignored_a_future_refused(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 1);
    fake_peer *p = fake_spawn(&f, CO_ROLE_WORKER);
    p->id = 1;
    p->cluster = 1234; /* another cluster's member 1 with its epoch 99 */
    p->epoch = 99;
    fake_settle(&f);
    assert_true(p->id > 1);
    fake_check_whole(&f);

    p = fake_spawn(&f, CO_ROLE_WORKER);
    p->id = 50;
    p->cluster = f.cluster;
    p->epoch = 99;
    fake_settle(&f);
    assert_true(p->refused_final);
    assert_non_null(strstr(p->refused, "older"));
    fake_fini(&f);
}

/* ---- death ---- */

static void silence_ends_a_lease(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 2);
    fake_peer *p = &f.peers[0];
    p->hung = true;
    fake_pass(&f, 3000);
    assert_true(p->session != 0);
    fake_pass(&f, 500);
    assert_int_equal(p->session, 0);
    p->alive = false;
    fake_settle(&f);
    fake_check_whole(&f);
    assert_int_equal(f.n_changes, 1);
    assert_int_equal(co_core_n_lost(f.core), 1);
    fake_fini(&f);
}

static void own_sleep_kills_nobody(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 2);
    f.now_ms += 60000;
    fake_pass(&f, 100);
    assert_int_equal(co_core_n_lost(f.core), 0);
    fake_check_whole(&f);
    fake_fini(&f);
}

static void grace_and_reports(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 3);
    fake_peer *router = fake_nth(&f, CO_ROLE_ROUTER, 0), *first = &f.peers[0], *second = &f.peers[1];

    fake_kill(&f, first);
    fake_pass(&f, 299);
    assert_int_equal(co_core_n_lost(f.core), 0);
    fake_pass(&f, 1);
    assert_int_equal(co_core_n_lost(f.core), 1);

    fake_report(&f, router, second->id, CM_E_RESET); /* connected: suspect only */
    assert_int_equal(fake_state(&f, second), CO_MEMBER_SUSPECT);
    assert_int_equal(co_core_n_lost(f.core), 1);
    fake_kill(&f, second); /* two witnesses: no grace */
    assert_int_equal(co_core_n_lost(f.core), 2);

    fake_peer *third = &f.peers[2];
    fake_disconnect(&f, third);
    assert_int_equal(co_core_n_lost(f.core), 2);
    fake_report(&f, third, router->id, CM_E_RESET); /* no session: not heard */
    fake_report(&f, router, third->id, CM_E_RESET);
    assert_int_equal(co_core_n_lost(f.core), 3);
    fake_settle(&f); /* it lives and comes back as a new member */
    fake_check_whole(&f);
    fake_fini(&f);
}

typedef void (*phase_fn)(fake_cluster *f);

static void until_numbering(fake_cluster *f)
{
    while (f->n_stores == 0 || co_core_n_members(f->core) < 5) {
        fake_hello(f, &f->peers[4]);
        fake_write(f);
    }
}
static void until_preparing(fake_cluster *f)
{
    until_numbering(f);
    assert_true(fake_settle_until(f, &f->peers[0], CO_OUT_PREPARE));
}
static void until_storing(fake_cluster *f)
{
    until_preparing(f);
    for (uint32_t i = 0; i < FAKE_PEERS; i++) {
        while (fake_read(f, &f->peers[i])) {
        }
    }
    assert_int_equal(f->n_stores, 1);
    assert_non_null(f->stores[0].epoch);
}
static void until_committing(fake_cluster *f)
{
    until_storing(f);
    fake_write(f);
    assert_int_equal(f->peers[0].mail[0].kind, CO_OUT_COMMIT);
}
static void until_publishing(fake_cluster *f)
{
    until_committing(f);
    for (uint32_t i = 0; i < FAKE_PEERS; i++) {
        if (f->peers[i].used && f->peers[i].role == CO_ROLE_WORKER) {
            while (fake_read(f, &f->peers[i])) {
            }
        }
    }
    assert_int_equal(fake_nth(f, CO_ROLE_ROUTER, 0)->mail[0].kind, CO_OUT_COMMIT);
}

static const struct {
    phase_fn reach;
    bool aborts; /* a death in this phase undoes the change */
} phases[] = {
    {until_numbering, true},   {until_preparing, true},   {until_storing, false},
    {until_committing, false}, {until_publishing, false},
};

/* peers: 0 1 2 workers, 3 router, 4 the worker that joins and so begins the change */
static void begin_change(fake_cluster *f)
{
    fake_init(f, 3);
    for (uint32_t i = 0; i < 3; i++) {
        fake_spawn(f, CO_ROLE_WORKER);
    }
    fake_spawn(f, CO_ROLE_ROUTER);
    fake_settle(f);
    fake_check_whole(f);
    f->n_changes = 0;
    fake_spawn(f, CO_ROLE_WORKER);
}

static void death_at_every_phase(void **state)
{
    (void)state;
    for (uint32_t phase = 0; phase < 5; phase++) {
        for (uint32_t victim = 0; victim < 5; victim++) {
            for (uint32_t how = 0; how < 4; how++) { /* death, silence, short loss of the session, leave */
                fake_cluster f;
                begin_change(&f);
                phases[phase].reach(&f);
                uint64_t before = f.number_max;
                fake_peer *p = &f.peers[victim];
                if (how == 0) {
                    fake_kill(&f, p);
                    fake_pass(&f, 300);
                } else if (how == 1) {
                    p->hung = true;
                    fake_pass(&f, 3500);
                    p->hung = false;
                } else if (how == 2) {
                    fake_disconnect(&f, p);
                    fake_pass(&f, 100);
                } else if (p->welcomed) {
                    fake_leave(&f, p);
                }
                if (how == 0) {
                    assert_int_equal(phases[phase].aborts,
                                     co_core_epoch(f.core)->number == before && phase < 2);
                }
                fake_settle(&f);
                fake_pass(&f, 3500);
                fake_settle(&f);
                fake_check_whole(&f);
                fake_fini(&f);
            }
        }
    }
}

static void restart_at_every_phase(void **state)
{
    (void)state;
    for (uint32_t phase = 0; phase < 5; phase++) {
        for (uint32_t victim = 0; victim < 6; victim++) { /* who dies with the coordinator; 5: nobody */
            fake_cluster f;
            begin_change(&f);
            phases[phase].reach(&f);
            uint64_t before = f.number_max;
            uint32_t ids[4] = {f.peers[0].id, f.peers[1].id, f.peers[2].id, f.peers[3].id};
            fake_restart(&f);
            if (victim < 5) {
                f.peers[victim].alive = false;
            }
            fake_settle(&f);
            fake_pass(&f, 3500);
            fake_settle(&f);
            fake_check_whole(&f);
            assert_true(co_core_epoch(f.core)->number >= before);
            for (uint32_t i = 0; i < 4; i++) {
                assert_true(i == victim || f.peers[i].id == ids[i]);
            }
            fake_fini(&f);
        }
    }
}

static void restart_at_rest_changes_nothing(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 3);
    uint64_t number = co_core_epoch(f.core)->number;
    fake_restart(&f);
    fake_settle(&f);
    fake_check_whole(&f);
    assert_int_equal(co_core_epoch(f.core)->number, number);
    assert_int_equal(f.n_changes, 0);
    fake_fini(&f);
}

/* Members of the log have time to find a coordinator that was started again; one that died meanwhile is given
 * up sooner when a peer says so. */
static void restart_waits_for_the_absent(void **state)
{
    (void)state;
    for (uint32_t reported = 0; reported < 2; reported++) {
        fake_cluster f;
        fake_start(&f, 3);
        f.options.recall_ms = 3000;
        fake_peer *dead = &f.peers[2], *router = &f.peers[3];
        assert_int_equal(dead->role, CO_ROLE_WORKER);
        assert_int_equal(router->role, CO_ROLE_ROUTER);
        uint64_t number = co_core_epoch(f.core)->number;
        uint32_t id = dead->id;
        fake_restart(&f);
        dead->alive = false;
        fake_settle(&f);
        if (reported != 0) {
            fake_report(&f, router, id, CM_E_RESET);
        }
        fake_pass(&f, 1400);
        fake_settle(&f);
        assert_int_equal(co_core_epoch(f.core)->number, number); /* may only be late */
        fake_pass(&f, 200);
        fake_settle(&f);
        assert_int_equal(co_core_epoch(f.core)->number > number, reported != 0);
        if (reported == 0) {
            fake_pass(&f, 2200);
            fake_pass(&f, 2000);
            fake_settle(&f);
            assert_int_equal(co_core_epoch(f.core)->number, number); /* 5.8 of 6 s */
            fake_pass(&f, 300);
            fake_settle(&f);
        }
        fake_check_whole(&f);
        assert_null(co_epoch_find(co_core_epoch(f.core), id));
        fake_fini(&f);
    }
}

/* ---- aborts, failures ---- */

static void abort_changes_nothing(void **state)
{
    (void)state;
    for (uint32_t phase = 0; phase < 2; phase++) {
        fake_cluster f;
        begin_change(&f);
        fake_snapshot before = fake_snapshot_take(&f);
        uint32_t n_commits = f.n_commits;
        phases[phase].reach(&f);
        fake_kill(&f, &f.peers[4]);
        fake_pass(&f, 300);
        for (uint32_t i = 0; i < 4; i++) {
            while (fake_read(&f, &f.peers[i])) {
            }
            assert_int_equal(f.peers[i].open_prepare, 0);
        }
        fake_snapshot after = fake_snapshot_take(&f);
        fake_snapshot_compare(&before, &after);
        assert_int_equal(f.n_commits, n_commits);
        uint32_t n_prepares = f.n_prepares; /* nothing is tried again: the members are those of the epoch */
        while (fake_write(&f)) {
        }
        assert_int_equal(f.n_prepares, n_prepares);
        fake_check_whole(&f);
        fake_fini(&f);
    }
}

static void failed_prepare(void **state)
{
    (void)state;
    fake_cluster f;
    begin_change(&f);
    f.peers[4].fails_prepare = true;
    fake_hello(&f, &f.peers[4]);
    fake_settle(&f);
    assert_int_equal(f.n_changes, 0);
    assert_int_equal(f.peers[4].session, 0);
    assert_false(f.peers[4].refused_final);
    assert_non_null(strstr(f.peers[4].refused, "disk on fire"));

    fake_hello(&f, &f.peers[4]); /* at once again: not before a lease is over */
    fake_settle(&f);
    assert_int_equal(f.peers[4].session, 0);
    assert_non_null(strstr(f.peers[4].refused, "again in"));
    f.peers[4].alive = false;
    fake_check_whole(&f);
    f.peers[4].alive = true;

    fake_pass(&f, 3000);
    f.peers[4].fails_prepare = false;
    fake_settle(&f);
    fake_check_whole(&f);
    assert_int_equal(f.n_changes, 1);
    fake_fini(&f);
}

static void log_that_cannot_be_written(void **state)
{
    (void)state;
    for (uint32_t phase = 0; phase <= 2; phase += 2) { /* its number, its epoch */
        fake_cluster f;
        char change[256];
        begin_change(&f);
        phases[phase].reach(&f);
        f.store_fails = true;
        fake_write(&f);
        assert_int_equal(f.n_changes, 0);
        assert_true(co_core_change(f.core, change));
        assert_string_equal(change, "disk full");
        fake_pass(&f, 2500);
        assert_int_equal(f.n_stores, 0); /* not hammered */
        f.store_fails = false;
        fake_pass(&f, 500);
        fake_settle(&f);
        fake_check_whole(&f);
        assert_int_equal(f.n_changes, 1);

        f.store_fails = true; /* nobody is welcome whose id could be given twice */
        fake_peer *p = fake_spawn(&f, CO_ROLE_ROUTER);
        fake_hello(&f, p);
        fake_write(&f);
        assert_int_equal(p->session, 0);
        assert_non_null(strstr(p->refused, "disk full"));
        fake_fini(&f);
    }
}

/* The log may have an epoch although its writing failed: whoever prepared it keeps it. */
static void epoch_that_may_be_in_the_log(void **state)
{
    (void)state;
    fake_cluster f;
    begin_change(&f);
    until_storing(&f);
    uint64_t number = f.peers[4].open_prepare;
    uint32_t n_aborts = f.n_aborts;
    for (uint32_t i = 0; i < 3; i++) {
        f.store_fails = true;
        assert_true(fake_write(&f));
        f.store_fails = false;
        assert_int_equal(f.n_aborts, n_aborts);
        fake_pass(&f, 3500);
        assert_int_equal(f.n_stores, 1); /* the same again */
    }
    fake_settle(&f);
    fake_check_whole(&f);
    assert_int_equal(f.epoch->number, number);
    fake_fini(&f);
}

/* Who joins cannot beat before its Welcome, and that waits for the log. */
static void slow_log_loses_nobody(void **state)
{
    (void)state;
    fake_cluster f;
    fake_init(&f, 1);
    fake_peer *p = fake_spawn(&f, CO_ROLE_WORKER);
    fake_hello(&f, p);
    fake_pass(&f, 20000);
    assert_true(fake_write(&f));
    assert_true(p->given);
    fake_settle(&f);
    fake_check_whole(&f);
    assert_int_equal(co_core_n_lost(f.core), 0);
    fake_fini(&f);
}

static void who_never_switches_is_given_up(void **state)
{
    (void)state;
    for (uint32_t victim = 0; victim <= 3; victim += 3) { /* a worker, the router */
        fake_cluster f;
        begin_change(&f);
        until_committing(&f);
        fake_peer *p = &f.peers[victim];
        uint32_t lost = p->id;
        for (uint32_t i = 0; i < 100; i++) { /* it heartbeats, but does not read */
            for (uint32_t k = 0; k < 5; k++) {
                while (k != victim && fake_read(&f, &f.peers[k])) {
                }
            }
            fake_write(&f);
            fake_pass(&f, 500);
        }
        assert_int_equal(p->session, 0);
        assert_null(co_epoch_find(co_core_epoch(f.core), lost));
        fake_settle(&f);
        fake_check_whole(&f);
        fake_fini(&f);
    }
}

/* ---- leaving, capacity ---- */

static void leave_waits_for_the_next_epoch(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 3);
    fake_peer *p = &f.peers[1];
    uint32_t id = p->id;
    fake_leave(&f, p);
    assert_int_equal(fake_state(&f, p), CO_MEMBER_LEAVING);
    fake_peer *router = fake_nth(&f, CO_ROLE_ROUTER, 0);
    assert_true(fake_settle_until(&f, router, CO_OUT_COMMIT));
    assert_true(p->session != 0); /* the router may still ask it */
    fake_settle(&f);
    assert_true(p->finished);
    assert_null(co_epoch_find(co_core_epoch(f.core), id));
    fake_check_whole(&f);
    assert_int_equal(co_core_n_lost(f.core), 0);
    fake_fini(&f);
}

static void all_may_leave(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 2);
    fake_leave(&f, &f.peers[0]);
    fake_leave(&f, &f.peers[1]);
    fake_settle(&f);
    assert_false(f.peers[0].finished && f.peers[1].finished); /* a router may still ask */
    for (uint32_t i = 2; i < 4; i++) {
        fake_leave(&f, &f.peers[i]);
    }
    fake_settle(&f);
    for (uint32_t i = 0; i < 4; i++) {
        assert_true(f.peers[i].finished);
    }
    assert_int_equal(co_core_n_members(f.core), 0);
    fake_fini(&f);
}

static void too_small_for_the_experts(void **state)
{
    (void)state;
    fake_cluster f;
    char change[256];
    fake_init(&f, 1);
    for (uint32_t i = 0; i < 3; i++) {
        fake_spawn(&f, CO_ROLE_WORKER)->capacity = 10; /* 24 are needed */
    }
    fake_spawn(&f, CO_ROLE_ROUTER);
    fake_settle(&f);
    fake_check_whole(&f);
    uint64_t number = co_core_epoch(f.core)->number;

    fake_kill(&f, &f.peers[0]);
    fake_pass(&f, 300);
    uint32_t n_warnings = f.n_warnings;
    fake_pass(&f, 5000);
    fake_settle(&f);
    assert_int_equal(f.n_warnings, n_warnings); /* said once */
    assert_int_equal(co_core_epoch(f.core)->number, number);
    assert_true(co_core_change(f.core, change));
    assert_non_null(strstr(change, "20"));
    assert_non_null(strstr(change, "24"));

    fake_spawn(&f, CO_ROLE_WORKER);
    fake_settle(&f);
    fake_check_whole(&f);
    assert_false(co_core_change(f.core, change));
    fake_fini(&f);
}

static void experts_stay_where_they_were(void **state)
{
    (void)state;
    fake_cluster f;
    fake_start(&f, 3);
    pr_placement *before = pr_placement_clone(co_core_epoch(f.core)->placement);
    fake_restart(&f);
    fake_settle(&f);
    fake_peer *router = fake_spawn(&f, CO_ROLE_ROUTER);
    fake_settle(&f);
    fake_check_whole(&f);
    assert_true(router->welcomed);
    const pr_placement *after = co_core_epoch(f.core)->placement;
    assert_memory_equal(after->owner, before->owner, sizeof(uint16_t) * FAKE_LAYERS * FAKE_EXPERTS);
    assert_memory_equal(after->rank_member, before->rank_member, sizeof(uint32_t) * 3);
    pr_placement_free(before);
    fake_fini(&f);
}

/* ---- anything at all ---- */

static void walk_step(fake_cluster *f, walk *w)
{
    fake_peer *live[FAKE_PEERS];
    uint32_t n_live = 0;
    for (uint32_t i = 0; i < FAKE_PEERS; i++) {
        if (f->peers[i].used && f->peers[i].alive && !f->peers[i].finished) {
            live[n_live++] = &f->peers[i];
        }
    }
    fake_peer *p = n_live > 0 ? live[walk_below(w, n_live)] : &f->peers[0];
    bool talks = p->used && p->alive && !p->hung && p->session != 0 && p->welcomed;
    uint32_t dice = walk_below(w, 3000);
    if (dice < 1500) {
        uint32_t first = walk_below(w, FAKE_PEERS);
        for (uint32_t i = 0; i < FAKE_PEERS && !fake_read(f, &f->peers[(first + i) % FAKE_PEERS]); i++) {
        }
    } else if (dice < 2000) {
        fake_write(f);
    } else if (dice < 2400) {
        fake_pass(f, 1 + walk_below(w, 60));
    } else if (dice < 2900) {
        if (p->used && p->alive && !p->finished && p->session == 0) {
            p->fails_prepare = p->role == CO_ROLE_WORKER && walk_below(w, 20) == 0;
            fake_hello(f, p);
        }
    } else if (dice < 2940) {
        if (n_live < 14) {
            fake_peer *fresh = fake_spawn(f, (Baleen__Control__V1__Role)(CO_ROLE_GATEWAY + walk_below(w, 3)));
            fresh->capacity = 8 + walk_below(w, 30);
            fake_hello(f, fresh);
        }
    } else if (dice < 2946) {
        if (p->used && p->alive) {
            fake_kill(f, p);
        }
    } else if (dice < 2958) {
        if (p->used && p->session != 0) {
            fake_disconnect(f, p);
        }
    } else if (dice < 2970) {
        p->hung = p->used && !p->hung && walk_below(w, 3) == 0;
    } else if (dice < 2976) {
        if (talks && p->role == CO_ROLE_ROUTER && walk_below(w, 2) == 0) {
            fake_load(f, p, fake_skewed);
            fake_rebalance(f, 1 + walk_below(w, 4));
        } else if (talks && walk_below(w, 2) == 0) {
            fake_leave(f, p);
        } else {
            fake_drain(f, 1 + walk_below(w, f->id_max + 1));
        }
    } else if (dice < 2984) {
        if (talks) {
            fake_report(f, p, 1 + walk_below(w, f->id_max + 1), walk_below(w, 4) == 0 ? CM_OK : CM_E_RESET);
        }
    } else if (dice < 2990) {
        f->store_fails = !f->store_fails && walk_below(w, 4) == 0;
    } else if (dice < 2994) {
        fake_restart(f);
    } else if (dice < 2997) {
        f->now_ms += 10000; /* the coordinator's process slept */
        fake_pass(f, 1);
    }
}

static bool any_cut_off(const fake_cluster *f)
{
    for (uint32_t i = 0; i < co_core_n_members(f->core); i++) {
        co_member_view view;
        co_core_member(f->core, i, &view);
        if (view.state == CO_MEMBER_CUT_OFF) {
            return true;
        }
    }
    return false;
}

static void random_walk(void **state)
{
    (void)state;
    uint32_t n_changes = 0, n_aborts = 0, n_ids = 0;
    for (uint32_t round = 0; round < 20; round++) {
        walk w = {g_seed ^ (round * 0x9e3779b97f4a7c15u), 0};
        fake_cluster f;
        fake_init(&f, 1 + walk_below(&w, 3));
        for (uint32_t i = 0; i < 10000; i++) {
            walk_step(&f, &w);
        }
        /* Faults stop: what lives must come together. */
        f.store_fails = false;
        for (uint32_t i = 0; i < FAKE_PEERS; i++) {
            f.peers[i].hung = f.peers[i].fails_prepare = false;
        }
        for (uint32_t i = 0; i < 3; i++) {
            fake_spawn(&f, CO_ROLE_WORKER);
        }
        for (uint32_t i = 0; i < 100; i++) {
            fake_settle(&f);
            fake_pass(&f, 500);
        }
        for (uint32_t i = 0; i < 3600 && any_cut_off(&f);
             i++) { /* they are tried again, at the latest in an hour */
            fake_pass(&f, 1000);
        }
        fake_settle(&f);
        fake_check_whole(&f);
        n_changes += f.n_changes;
        n_aborts += f.n_aborts;
        n_ids += f.id_max;
        fake_fini(&f);
    }
    printf("  %u epochs, %u aborts, %u ids\n", n_changes, n_aborts, n_ids);
    assert_true(n_changes > 60 && n_aborts > 20); /* it has been somewhere */
}

int main(int argc, char **argv)
{
    g_seed = argc > 1 ? strtoull(argv[1], NULL, 0) : cm_random_u64();
    printf("seed %llu\n", (unsigned long long)g_seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(join_in_any_order),
        cmocka_unit_test(waits_for_workers_min),
        cmocka_unit_test(other_checkpoint_is_refused),
        cmocka_unit_test(other_transport_is_refused),
        cmocka_unit_test(early_gateway_of_another_checkpoint),
        cmocka_unit_test(too_many_members),
        cmocka_unit_test(hello_must_come_first_and_once),
        cmocka_unit_test(reconnect_keeps_id_and_epoch),
        cmocka_unit_test(new_incarnation_gets_a_new_id),
        cmocka_unit_test(a_foreign_past_is_ignored_a_future_refused),
        cmocka_unit_test(silence_ends_a_lease),
        cmocka_unit_test(own_sleep_kills_nobody),
        cmocka_unit_test(grace_and_reports),
        cmocka_unit_test(death_at_every_phase),
        cmocka_unit_test(restart_at_every_phase),
        cmocka_unit_test(restart_at_rest_changes_nothing),
        cmocka_unit_test(restart_waits_for_the_absent),
        cmocka_unit_test(abort_changes_nothing),
        cmocka_unit_test(failed_prepare),
        cmocka_unit_test(log_that_cannot_be_written),
        cmocka_unit_test(epoch_that_may_be_in_the_log),
        cmocka_unit_test(slow_log_loses_nobody),
        cmocka_unit_test(who_never_switches_is_given_up),
        cmocka_unit_test(leave_waits_for_the_next_epoch),
        cmocka_unit_test(all_may_leave),
        cmocka_unit_test(too_small_for_the_experts),
        cmocka_unit_test(experts_stay_where_they_were),
        cmocka_unit_test(random_walk),
    };
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    printf("seed %llu\n", (unsigned long long)g_seed);
    return rc;
}
