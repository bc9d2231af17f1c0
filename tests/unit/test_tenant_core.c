/* Turns of tenants: limits, order, shares, and a random run that checks what must always hold. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/rng.h"
#include "gateway/tenant_core.h"

enum { TURNS = 4096, TENANTS = 5, STEPS = 60000, COST_MAX = 1500 };

typedef struct asked {
    gw_turn turn; /* first: what the machine gives back */
    uint64_t serial;
    uint32_t n_output, left;
} asked;

static gw_turns g_turns;
static asked g_asked[TURNS];
static uint64_t g_now = 1000, g_drawn, g_seed;

static uint32_t draw(uint32_t below)
{
    return (uint32_t)(cm_rng_uniform(g_seed, g_drawn++, 0) * below);
}

static gw_tenant_limits limits_of(uint32_t weight)
{
    gw_tenant_limits limits;
    gw_tenant_limits_defaults(&limits);
    limits.weight = weight;
    limits.queue_max = TURNS;
    return limits;
}

static int begin(void **state)
{
    (void)state;
    memset(g_asked, 0, sizeof(g_asked));
    gw_turns_init(&g_turns, TURNS);
    gw_turns_set_room(&g_turns, 4, 0);
    return 0;
}

static void end(asked *a)
{
    gw_turns_end(&g_turns, g_now, &a->turn, a->n_output);
}

static int finish(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < TURNS; i++) {
        end(&g_asked[i]);
    }
    gw_turns_fini(&g_turns);
    return 0;
}

static gw_tenant *add(const char *name, uint32_t weight)
{
    gw_tenant_limits limits = limits_of(weight);
    return gw_turns_add_tenant(&g_turns, name, &limits);
}

static cm_status admit(gw_tenant *tenant, asked *a, gw_turn_no *no)
{
    return gw_turns_admit(&g_turns, g_now, tenant, true, &a->turn, no);
}

/* Admitted and waiting. */
static asked *put(gw_tenant *tenant, uint32_t i, uint32_t n_prompt, uint32_t tokens_max)
{
    gw_turn_no no;
    assert_int_equal(admit(tenant, &g_asked[i], &no), CM_OK);
    gw_turns_wait(&g_turns, g_now, &g_asked[i].turn, n_prompt, tokens_max, UINT64_MAX);
    return &g_asked[i];
}

static asked *next(void)
{
    cm_status status;
    asked *a = (asked *)gw_turns_next(&g_turns, g_now, &status);
    assert_true(a == NULL || status == CM_OK);
    return a;
}

static void starts(asked *a)
{
    assert_ptr_equal(next(), a);
}

static gw_tenant_state state_of(const gw_tenant *tenant)
{
    gw_tenant_state state;
    gw_tenant_get(tenant, &state);
    return state;
}

static void room_for_all(void **state)
{
    (void)state;
    gw_tenant *a = add("a", 1);
    for (uint32_t i = 0; i < 4; i++) {
        starts(put(a, i, 100, 10)); /* nobody waits while there is room */
    }
    put(a, 4, 100, 10);
    assert_null(next());
    end(&g_asked[2]);
    assert_ptr_equal(next(), &g_asked[4]);
    assert_null(next());
    assert_int_equal(state_of(a).n_running, 4);
}

static void one_at_a_time(void **state)
{
    (void)state;
    gw_tenant *a = add("a", 1), *b = add("b", 1);
    gw_tenant_limits limits = limits_of(1);
    limits.running_max = 1;
    limits.queue_max = 2;
    gw_tenant_change(&g_turns, a, true, &limits);
    gw_turn_no no;
    for (uint32_t i = 0; i < 3; i++) {
        put(a, i, 10, 10);
    }
    assert_int_equal(admit(a, &g_asked[3], &no), CM_E_CAPACITY); /* one may run, two may wait */
    assert_int_equal(no.why, GW_TURN_QUEUE_FULL);
    assert_int_equal(no.limit, 2);
    assert_true(no.retry_ms > 0);
    assert_ptr_equal(next(), &g_asked[0]);
    assert_null(next());
    starts(put(b, 9, 10, 10)); /* the other is not held up by it */
    end(&g_asked[1]);          /* goes away while it waits */
    end(&g_asked[0]);
    assert_ptr_equal(next(), &g_asked[2]);
}

static void rates(void **state)
{
    (void)state;
    gw_tenant *a = add("a", 1);
    gw_tenant_limits limits = limits_of(1);
    gw_turn_no no;
    limits.requests_per_minute = 3;
    gw_tenant_change(&g_turns, a, true, &limits);
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(admit(a, &g_asked[i], &no), CM_OK);
    }
    assert_int_equal(admit(a, &g_asked[3], &no), CM_E_CAPACITY);
    assert_int_equal(no.why, GW_TURN_MANY_REQUESTS);
    assert_in_range(no.retry_ms, 19000, 20001); /* three a minute */
    assert_int_equal(gw_turns_admit(&g_turns, g_now, a, false, &g_asked[4].turn, &no),
                     CM_OK); /* a choice more */
    g_now += no.retry_ms;
    assert_int_equal(admit(a, &g_asked[3], &no), CM_OK);
    assert_int_equal(admit(a, &g_asked[5], &no), CM_E_CAPACITY);
}

/* A request may use more than is left; the next one waits for what it took. What it did not use comes back.
 */
static void token_rates(void **state)
{
    (void)state;
    gw_tenant *a = add("a", 1);
    gw_tenant_limits limits = limits_of(1);
    gw_turn_no no;
    limits.tokens_per_minute = 600;
    gw_tenant_change(&g_turns, a, true, &limits);
    put(a, 0, 1000, 200);
    assert_ptr_equal(next(), &g_asked[0]);
    assert_int_equal(admit(a, &g_asked[1], &no), CM_E_CAPACITY);
    assert_int_equal(no.why, GW_TURN_MANY_TOKENS);
    assert_in_range(no.retry_ms, 60000, 60200); /* 600 below zero and one */
    g_asked[0].n_output = 0;
    end(&g_asked[0]);
    assert_int_equal(admit(a, &g_asked[1], &no), CM_E_CAPACITY);
    assert_in_range(no.retry_ms, 40000, 40200); /* 200 came back */
    g_now += no.retry_ms;
    assert_int_equal(admit(a, &g_asked[1], &no), CM_OK);
}

static void deadlines(void **state)
{
    (void)state;
    gw_tenant *a = add("a", 1);
    gw_turn_no no;
    cm_status status;
    gw_turns_set_room(&g_turns, 0, 0);
    const uint64_t at[] = {500, UINT64_MAX - g_now, 300};
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(admit(a, &g_asked[i], &no), CM_OK);
        gw_turns_wait(&g_turns, g_now, &g_asked[i].turn, 1, 1, g_now + at[i]);
    }
    assert_null(next());
    assert_int_equal(gw_turns_due(&g_turns), g_now + 300);
    g_now += 300;
    assert_ptr_equal(gw_turns_next(&g_turns, g_now, &status), &g_asked[2].turn);
    assert_int_equal(status, CM_E_DEADLINE);
    end(&g_asked[2]);
    assert_null(next());
    assert_int_equal(gw_turns_due(&g_turns), g_now + 200);
    end(&g_asked[0]);
    g_now += 1000;
    assert_null(next());
    assert_int_equal(gw_turns_due(&g_turns), UINT64_MAX);
}

/* A flood does not fill the machine, nor the room. */
static void flood(void **state)
{
    (void)state;
    gw_tenant *a = add("a", 1), *b = add("b", 1);
    gw_turn_no no;
    uint32_t n = 0, n_run = 0;
    gw_turns_set_room(&g_turns, 64, 0);
    while (n < TURNS && admit(a, &g_asked[n], &no) == CM_OK) {
        gw_turns_wait(&g_turns, g_now, &g_asked[n].turn, 10, 10, UINT64_MAX);
        n++;
    }
    assert_int_equal(no.why, GW_TURN_FULL);
    assert_int_equal(n, TURNS * 3 / 4);
    while (next() != NULL) {
        n_run++;
    }
    assert_int_equal(n_run, 56);
    for (uint32_t i = 0; i < 8; i++) {
        starts(put(b, n + i, 10, 10)); /* at once, beside the flood */
    }
    put(b, n + 8, 10, 10);
    assert_null(next());
    end(&g_asked[0]);
    assert_int_equal(state_of(b).n_running, 8);
    assert_ptr_equal(next(), &g_asked[n + 8]); /* below its share: before the flood's next */
}

static void alone_in_the_room(void **state)
{
    (void)state;
    gw_tenant *a = add("a", 1), *b = add("b", 1);
    gw_tenant_limits limits = limits_of(1);
    uint32_t n_run = 0;
    gw_turns_set_room(&g_turns, 64, 0);
    gw_tenant_change(&g_turns, b, false, &limits); /* taken out of the file: nothing is kept for it */
    for (uint32_t i = 0; i < 100; i++) {
        put(a, i, 10, 10);
    }
    while (next() != NULL) {
        n_run++;
    }
    assert_int_equal(n_run, 64);
}

/* What an answer did not use is credit for what waits, and for nothing else. */
static void credit_is_not_saved(void **state)
{
    (void)state;
    gw_tenant *a = add("a", 1);
    starts(put(a, 0, 10, 200));
    starts(put(a, 1, 10, 200));
    end(&g_asked[0]);
    assert_int_equal(state_of(a).deficit, 0);
    g_asked[1].n_output = 700;
    end(&g_asked[1]);
    assert_int_equal(state_of(a).deficit, 0);
}

/* Answers are shorter than anybody expects, and one tenant was here first: the other's turns come between its
 * own, not behind what it was given back for those. */
static void a_newcomer(void **state)
{
    (void)state;
    gw_tenant *noisy = add("noisy", 1), *quiet = add("quiet", 1);
    uint32_t n_before = 0;
    gw_turns_set_room(&g_turns, 1, 0);
    for (uint32_t i = 0; i < 40; i++) {
        put(noisy, i, 11, 8192)->n_output = 7;
    }
    starts(&g_asked[0]);
    put(quiet, 100, 11, 8192)->n_output = 7;
    put(quiet, 101, 11, 8192)->n_output = 7;
    for (uint32_t n = 0; n < 2; n_before++) {
        for (uint32_t i = 0; i < 102; i++) {
            if (g_asked[i].turn.state == GW_TURN_RUNNING) {
                end(&g_asked[i]);
            }
        }
        asked *a = next();
        n += a->turn.tenant == quiet;
    }
    assert_in_range(n_before, 2, 6);
}

/* All have always something waiting: tokens come in the ratio of the weights, whatever the requests' sizes.
 */
static void shares(void **state)
{
    (void)state;
    static const uint32_t weights[] = {1, 2, 5};
    static const uint32_t sizes[] = {1400, 90, 400}; /* most of a prompt */
    gw_tenant *tenant[3];
    uint64_t spent[3] = {0}, serial = 0;
    uint32_t waiting[3] = {0};
    char name[] = "a";
    for (uint32_t t = 0; t < 3; t++, name[0]++) {
        tenant[t] = add(name, weights[t]);
    }
    gw_turns_set_room(&g_turns, 7, 0); /* too small for a part of it to be kept */
    for (uint32_t step = 0; step < STEPS; step++) {
        for (uint32_t t = 0; t < 3; t++) {
            waiting[t] = state_of(tenant[t]).n_waiting;
            for (uint32_t i = 0; waiting[t] < 3 && i < TURNS; i++) {
                if (g_asked[i].turn.state == GW_TURN_NONE) {
                    asked *a = put(tenant[t], i, 1 + draw(sizes[t]), 1 + draw(300));
                    a->n_output = draw(300); /* not what was expected */
                    a->left = 1 + draw(20);
                    a->serial = serial++;
                    waiting[t]++;
                }
            }
        }
        while (next() != NULL) {
        }
        for (uint32_t i = 0; i < TURNS && serial > 0; i++) {
            asked *a = &g_asked[i];
            if (a->turn.state == GW_TURN_RUNNING && --a->left == 0) {
                spent[a->turn.tenant == tenant[0]   ? 0
                      : a->turn.tenant == tenant[1] ? 1
                                                    : 2] += a->turn.n_prompt + a->n_output;
                end(a);
            }
            if (i > 64) {
                break; /* there are never so many */
            }
        }
    }
    double unit = (double)spent[0] / weights[0];
    print_message("tokens per weight: %.0f %.0f %.0f\n", unit, (double)spent[1] / weights[1],
                  (double)spent[2] / weights[2]);
    for (uint32_t t = 1; t < 3; t++) {
        double off = (double)spent[t] / weights[t] - unit;
        assert_true((off < 0 ? -off : off) <
                    10.0 * COST_MAX); /* what can be running, not a part of the sum */
    }
}

/* ---- anything in any order ---- */

static void check_always(gw_tenant *const tenant[TENANTS], uint32_t room)
{
    uint32_t n_held = 0, n_running = 0, seen[3][TENANTS] = {{0}};
    for (uint32_t i = 0; i < 256; i++) {
        for (uint32_t t = 0; t < TENANTS; t++) {
            bool his = g_asked[i].turn.state != GW_TURN_NONE && g_asked[i].turn.tenant == tenant[t];
            seen[0][t] += his && g_asked[i].turn.state == GW_TURN_HELD;
            seen[1][t] += his && g_asked[i].turn.state == GW_TURN_WAITING;
            seen[2][t] += his && g_asked[i].turn.state == GW_TURN_RUNNING;
        }
    }
    for (uint32_t t = 0; t < TENANTS; t++) {
        gw_tenant_state s = state_of(tenant[t]);
        assert_int_equal(s.n_held, seen[0][t]);
        assert_int_equal(s.n_waiting, seen[1][t]);
        assert_int_equal(s.n_running, seen[2][t]);
        assert_true(s.limits.running_max == 0 || s.n_running <= s.limits.running_max);
        n_held += s.n_held + s.n_waiting + s.n_running;
        n_running += s.n_running;
        bool limited = s.limits.running_max > 0 && s.n_running == s.limits.running_max;
        assert_true(s.n_waiting == 0 || limited || g_turns.n_running >= room - room / 8); /* no idle room */
    }
    assert_int_equal(n_held, g_turns.n_held);
    assert_int_equal(n_running, g_turns.n_running);
}

static void start_all(uint64_t last[TENANTS], gw_tenant *const tenant[TENANTS], uint32_t room)
{
    asked *a;
    while ((a = next()) != NULL) {
        assert_true(g_turns.n_running <= room);
        for (uint32_t t = 0; t < TENANTS; t++) {
            if (a->turn.tenant == tenant[t]) {
                assert_true(a->serial > last[t]); /* first come, first served */
                last[t] = a->serial;
            }
        }
    }
}

static void anything(void **state)
{
    (void)state;
    gw_tenant *tenant[TENANTS];
    uint64_t last[TENANTS] = {0}, serial = 1, n_ran = 0;
    uint32_t room = 16;
    char name[] = "a";
    g_seed = getenv("SEED") != NULL ? strtoull(getenv("SEED"), NULL, 0) : cm_random_u64();
    print_message("SEED=%llu\n", (unsigned long long)g_seed);
    for (uint32_t t = 0; t < TENANTS; t++, name[0]++) {
        tenant[t] = add(name, 1 + draw(9));
        gw_tenant_limits limits = limits_of(1 + draw(9));
        limits.running_max = t < 2 ? 1 + draw(6) : 0;
        limits.queue_max = 40;
        gw_tenant_change(&g_turns, tenant[t], true, &limits);
    }
    gw_turns_set_room(&g_turns, room, 0);
    for (uint32_t step = 0; step < STEPS; step++) {
        asked *a = &g_asked[draw(256)];
        gw_turn_no no;
        g_now += draw(3);
        if (a->turn.state == GW_TURN_NONE) {
            *a = (asked){.n_output = draw(500)};
            (void)admit(tenant[draw(TENANTS)], a, &no);
        } else if (a->turn.state == GW_TURN_HELD && draw(10) > 0) {
            a->serial = serial++;
            gw_turns_wait(&g_turns, g_now, &a->turn, draw(COST_MAX), 1 + draw(500), UINT64_MAX);
        } else if (a->turn.state != GW_TURN_WAITING || draw(20) == 0) {
            n_ran += a->turn.state == GW_TURN_RUNNING;
            end(a);
        }
        start_all(last, tenant, room);
        check_always(tenant, room);
    }
    assert_true(n_ran > STEPS / 100);
}

/* Whoever waits is served within a bound that its own cost and the others' weights give. */
static void nobody_starves(void **state)
{
    (void)state;
    gw_tenant *small = add("small", 1), *big = add("big", 9);
    uint32_t n_before = 0;
    gw_turns_set_room(&g_turns, 1, 0);
    for (uint32_t i = 0; i < 2000; i++) {
        put(big, i, 100, 1)->n_output = 1;
    }
    assert_non_null(next());
    put(small, TURNS - 1, 5000, 1)->n_output = 1;
    for (;; n_before++) {
        for (uint32_t i = 0; i < TURNS; i++) {
            if (g_asked[i].turn.state == GW_TURN_RUNNING) {
                end(&g_asked[i]);
            }
        }
        if (next() == &g_asked[TURNS - 1]) {
            break;
        }
        assert_true(n_before < 1999);
    }
    /* 5001 tokens at weight 1 are worth 45009 at weight 9: 445 of its requests */
    assert_in_range(n_before, 430, 460);
}

enum { SHARERS = 3, SHARER_TURNS = 512 };

/* One gateway of several: a machine of its own with the same tenant. */
typedef struct sharer {
    gw_turns turns;
    gw_tenant *tenant;
    asked asked[SHARER_TURNS];
    uint32_t n_asked;
} sharer;

static void sharer_open(sharer *s, uint32_t n_gateway)
{
    gw_tenant_limits limits = limits_of(1);
    limits.running_max = 10;
    limits.requests_per_minute = 62;
    limits.queue_max = 1000;
    memset(s, 0, sizeof(*s));
    gw_turns_init(&s->turns, SHARER_TURNS);
    gw_turns_set_room(&s->turns, SHARER_TURNS, 0);
    s->tenant = gw_turns_add_tenant(&s->turns, "a", &limits);
    gw_turns_set_gateways(&s->turns, g_now, n_gateway);
}

/* As many as are let in now; all wait, and those that may begin do. */
static uint32_t sharer_fill(sharer *s)
{
    gw_turn_no no;
    cm_status status;
    uint32_t n = 0;
    while (gw_turns_admit(&s->turns, g_now, s->tenant, true, &s->asked[s->n_asked].turn, &no) == CM_OK) {
        gw_turns_wait(&s->turns, g_now, &s->asked[s->n_asked++].turn, 1, 1, UINT64_MAX);
        n++;
    }
    assert_int_equal(no.why, GW_TURN_MANY_REQUESTS);
    while (gw_turns_next(&s->turns, g_now, &status) != NULL) {
    }
    return n;
}

static void sharer_close(sharer *s)
{
    for (uint32_t i = 0; i < s->n_asked; i++) {
        gw_turns_end(&s->turns, g_now, &s->asked[i].turn, 1);
    }
    gw_turns_fini(&s->turns);
}

/* Together they grant what one would, but for rounding; who remains grants all of it. */
static void gateways_share(void **state)
{
    (void)state;
    static sharer s[SHARERS];
    for (uint32_t n = 1; n <= SHARERS; n++) {
        uint32_t n_requests = 0, n_running = 0;
        for (uint32_t i = 0; i < n; i++) {
            sharer_open(&s[i], n);
            n_requests += sharer_fill(&s[i]);
            n_running += s[i].turns.n_running;
        }
        assert_in_range(n_requests, 62, 62 + n - 1);
        assert_in_range(n_running, 10, 10 + n - 1);
        for (uint32_t i = 1; i < n; i++) {
            sharer_close(&s[i]);
        }
        gw_turns_set_gateways(&s[0].turns, g_now, 1);
        g_now += 60000;
        assert_int_equal(sharer_fill(&s[0]), 62);
        assert_int_equal(s[0].turns.n_running, 10);
        sharer_close(&s[0]);
    }
}

/* One that is no longer alone has at once no more than its part left, and refills at its part's rate. */
static void another_gateway_comes(void **state)
{
    (void)state;
    static sharer s;
    gw_turn_no no;
    sharer_open(&s, 1);
    gw_turns_set_gateways(&s.turns, g_now, 2);
    assert_int_equal(sharer_fill(&s), 31);
    assert_int_equal(s.turns.n_running, 5);
    g_now += 30000;
    assert_int_equal(sharer_fill(&s), 15);
    assert_int_equal(gw_turns_admit(&s.turns, g_now, s.tenant, true, &s.asked[s.n_asked].turn, &no),
                     CM_E_CAPACITY);
    assert_int_equal(no.limit, 31);
    sharer_close(&s);
}

int main(void)
{
#define TEST(fn) cmocka_unit_test_setup_teardown(fn, begin, finish)
    const struct CMUnitTest tests[] = {
        TEST(room_for_all),
        TEST(one_at_a_time),
        TEST(rates),
        TEST(token_rates),
        TEST(deadlines),
        TEST(flood),
        TEST(alone_in_the_room),
        TEST(shares),
        TEST(nobody_starves),
        TEST(a_newcomer),
        TEST(credit_is_not_saved),
        TEST(anything),
        cmocka_unit_test(gateways_share),
        cmocka_unit_test(another_gateway_comes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
