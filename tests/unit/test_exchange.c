/* The exchange of a router over scripted workers: every slot gets its own expert's row whatever happens on
 * the way: stale epochs, a worker that dies, one that is silent, nonsense answers. The fake worker answers a
 * slot with its expert's number. */
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/base/stats.h"
#include "proto/messages.h"
#include "router/engine/exchange.h"

enum { D = 128, ROWS = 40, TOPK = 3, LAYERS = 2, EXPERTS = 12, CLUSTER = 99, SELF = 50 };

typedef enum habit { HONEST, STALE_UNTIL_2, DIES, MUTE, NONSENSE_FIRST } habit;

enum { ANSWERS_MAX = 4096 };

typedef struct fake {
    void *answers[ANSWERS_MAX]; /* payloads on their way; NULL: free */
    net *n;
    pthread_t thread;
    char address[NET_ADDRESS_BYTES];
    habit habit;
    _Atomic bool stop;
    _Atomic uint32_t n_asked;
} fake;

static void fake_refuse(fake *w, const net_event *event)
{
    const pr_dispatch *frame = event->header;
    pr_refuse header = {.head = frame->head, .status = CM_E_STALE, .epoch = 2};
    net_message message = {
        .type = PR_MSG_REFUSE, .header = &header, .header_bytes = sizeof(header), .deadline_ms = 10000};
    assert_int_equal(net_send(event->peer, &message), CM_OK);
    (void)w;
}

static void *fake_keep(fake *w, void *payload)
{
    for (uint32_t i = 0; i < ANSWERS_MAX; i++) {
        if (w->answers[i] == NULL) {
            w->answers[i] = payload;
            return &w->answers[i];
        }
    }
    fail_msg("more than %d answers on their way", ANSWERS_MAX);
    return NULL;
}

static void fake_drop(void **answer)
{
    cm_free(*answer);
    *answer = NULL;
}

static void fake_answer(fake *w, const net_event *event, bool nonsense)
{
    const pr_dispatch *frame = event->header;
    const pr_slot *slots = event->payload;
    uint32_t n = frame->n_slot - (nonsense ? 1 : 0);
    uint16_t *rows = cm_alloc(2ull * frame->n_slot * D);
    for (uint32_t i = 0; i < frame->n_slot; i++) {
        uint8_t first =
            ((const uint8_t *)event->payload)[pr_dispatch_codes_at(frame->n_slot) + slots[i].row * D];
        for (uint32_t k = 0; k < D; k++) {
            rows[i * D + k] = (uint16_t)(slots[i].expert * 256 + first); /* expert and row */
        }
    }
    pr_combine header = {.head = frame->head, .d = D, .slot0 = nonsense ? 1 : 0, .n_slot = n};
    header.head.dtype = PR_DTYPE_BF16;
    net_message message = {.type = PR_MSG_COMBINE,
                           .header = &header,
                           .header_bytes = sizeof(header),
                           .iov = {{rows, 2ull * n * D}},
                           .n_iov = 1,
                           .deadline_ms = 10000,
                           .cookie = fake_keep(w, rows)};
    assert_int_equal(net_send(event->peer, &message), CM_OK);
}

static void fake_on_dispatch(fake *w, const net_event *event)
{
    const pr_dispatch *frame = event->header;
    uint32_t n_asked = atomic_fetch_add(&w->n_asked, 1);
    if (frame->head.router != net_peer_identity(event->peer)->member) {
        fake_refuse(w, event); /* as a worker does with a frame in another's name */
    } else if (w->habit == DIES) {
        atomic_store(&w->stop, true);
    } else if (w->habit == STALE_UNTIL_2 && frame->head.epoch < 2) {
        fake_refuse(w, event);
    } else if (w->habit != MUTE) {
        if (w->habit == NONSENSE_FIRST && n_asked == 0) {
            fake_answer(w, event, true); /* too few slots: dropped; the right one follows */
        }
        fake_answer(w, event, false);
    }
}

static void *fake_run(void *arg)
{
    fake *w = arg;
    net_event events[16];
    while (!atomic_load(&w->stop)) {
        uint32_t n = net_poll(w->n, events, 16);
        for (uint32_t i = 0; i < n; i++) {
            if (events[i].kind == NET_EV_MESSAGE) {
                if (events[i].type == PR_MSG_DISPATCH) {
                    fake_on_dispatch(w, &events[i]);
                }
                net_release(w->n, &events[i]);
            } else if (events[i].kind == NET_EV_SENT && events[i].cookie != NULL) {
                fake_drop(events[i].cookie);
            }
        }
        if (n == 0 && net_arm(w->n)) {
            struct pollfd fd = {.fd = net_fd(w->n), .events = POLLIN};
            poll(&fd, 1, 20);
        }
    }
    net_close(w->n);
    for (uint32_t i = 0; i < ANSWERS_MAX; i++) {
        fake_drop(&w->answers[i]); /* closing tells no more about them */
    }
    return NULL;
}

static const char *g_backend = "local";

static void options_for(net_options *options)
{
    net_options_defaults(options);
    options->backend = g_backend;
    options->message_bytes_max = 16384; /* so that a round is many frames */
    options->silence_ms = 60000;
}

static void fake_start(fake *w, habit how)
{
    char name[64];
    cm_error err = {0};
    net_options options;
    options_for(&options);
    memset(w, 0, sizeof(*w));
    w->habit = how;
    snprintf(name, sizeof(name), "t_exchange-%016llx", (unsigned long long)cm_random_u64());
    assert_int_equal(net_open(&options, &w->n, &err), CM_OK);
    assert_int_equal(net_listen(w->n, name, w->address, &err), CM_OK);
    net_set_identity(w->n, &(net_identity){CLUSTER, BALEEN__CONTROL__V1__ROLE__ROLE_WORKER, 0});
    pthread_create(&w->thread, NULL, fake_run, w);
}

static void fake_stop(fake *w)
{
    atomic_store(&w->stop, true);
    pthread_join(w->thread, NULL);
}

/* members 1 .. n at the fakes' addresses */
static pc_epoch *make_epoch(uint64_t number, fake *const *fakes, const uint32_t *ids, uint32_t n)
{
    static const uint64_t capacity[4] = {UINT64_MAX, UINT64_MAX, UINT64_MAX, UINT64_MAX};
    cm_error err;
    pc_epoch *epoch = cm_alloc(sizeof(*epoch));
    epoch->refs = 1;
    epoch->number = number;
    epoch->cluster = CLUSTER;
    epoch->n_member = n;
    epoch->members = cm_alloc(sizeof(*epoch->members) * n);
    for (uint32_t i = 0; i < n; i++) {
        epoch->members[i].id = ids[i];
        epoch->members[i].role = BALEEN__CONTROL__V1__ROLE__ROLE_WORKER;
        epoch->members[i].data_address = cm_strdup(fakes[i]->address);
    }
    assert_int_equal(pr_placement_plan(LAYERS, EXPERTS, ids, n, capacity, NULL, &epoch->placement, &err),
                     CM_OK);
    return epoch;
}

static _Atomic uint32_t g_lost;
static rt_exchange *g_exchange;
static pc_epoch *g_on_lost; /* the epoch that a coordinator would publish then */

static void on_lost(void *ctx, uint32_t member_id, cm_status status)
{
    (void)ctx;
    (void)member_id;
    if (status == CM_OK) {
        return; /* it is up again */
    }
    if (atomic_fetch_add(&g_lost, 1) == 0 && g_on_lost != NULL) {
        rt_exchange_offer_epoch(g_exchange, g_on_lost, SELF);
    }
}

static void exchange_open(uint32_t answer_ms, uint32_t wait_ms)
{
    cm_error err = {0};
    net_options options;
    rt_exchange_options x = {.limits = {.row_max = ROWS, .topk = TOPK, .d = D, .frame_bytes_max = 16384},
                             .n_layer = LAYERS,
                             .n_expert = EXPERTS,
                             .answer_ms = answer_ms,
                             .wait_ms = wait_ms,
                             .peer_lost = on_lost};
    options_for(&options);
    assert_int_equal(net_open(&options, &x.rows, &err), CM_OK);
    assert_int_equal(rt_exchange_create(&x, &g_exchange, &err), CM_OK);
    atomic_store(&g_lost, 0);
    g_on_lost = NULL;
}

static uint32_t g_n_flight = 1; /* the rows of a layer go in so many */

/* Begins all flights, then waits for each. */
static cm_status exchange_fly(const rt_xcore_layer *all)
{
    uint32_t n_row = ROWS / g_n_flight;
    cm_status status = CM_OK;
    for (uint32_t i = 0; i < g_n_flight; i++) {
        rt_xcore_layer part = *all;
        part.n_row = n_row;
        part.experts += i * n_row * TOPK;
        part.weights += i * n_row * TOPK;
        part.codes += i * n_row * D;
        part.scales += i * n_row;
        part.results += i * n_row * TOPK * D;
        rt_exchange_begin(g_exchange, i, &part);
    }
    for (uint32_t i = 0; i < g_n_flight && status == CM_OK; i++) {
        rt_exchange_poll(g_exchange);
        status = rt_exchange_finish(g_exchange, i);
    }
    if (status != CM_OK) {
        rt_exchange_drop(g_exchange);
    }
    return status;
}

static cm_status exchange_run(uint32_t layer)
{
    static uint8_t codes[ROWS * D], scales[ROWS];
    static int32_t experts[ROWS * TOPK];
    static float weights[ROWS * TOPK];
    static uint16_t results[ROWS * TOPK * D];
    for (uint32_t r = 0; r < ROWS; r++) {
        memset(codes + r * D, (int)r, D);
        for (uint32_t k = 0; k < TOPK; k++) {
            experts[r * TOPK + k] = (int32_t)((r * 5 + k * 4) % EXPERTS);
            weights[r * TOPK + k] = 1;
        }
    }
    memset(results, 0xee, sizeof(results));
    cm_mem_guard_begin("an exchange");
    cm_status status = exchange_fly(&(rt_xcore_layer){.step = 1,
                                                      .layer = layer,
                                                      .n_row = ROWS,
                                                      .experts = experts,
                                                      .weights = weights,
                                                      .codes = codes,
                                                      .scales = scales,
                                                      .results = results});
    cm_mem_guard_end();
    if (status == CM_OK) {
        for (uint32_t i = 0; i < ROWS * TOPK; i++) {
            for (uint32_t k = 0; k < D; k++) {
                assert_int_equal(results[i * D + k], experts[i] * 256 + (int32_t)(i / TOPK));
            }
        }
    }
    return status;
}

static void test_plain(void **state)
{
    fake a, b;
    fake_start(&a, HONEST);
    fake_start(&b, NONSENSE_FIRST);
    exchange_open(10000, 10000);
    pc_epoch *epoch = make_epoch(1, (fake *const[]){&a, &b}, (const uint32_t[]){1, 2}, 2);
    rt_exchange_offer_epoch(g_exchange, epoch, SELF);
    for (uint32_t i = 0; i < 20; i++) {
        assert_int_equal(exchange_run(i % LAYERS), CM_OK);
    }
    assert_int_equal(atomic_load(&g_lost), 0);
    uint32_t n_picks = 0; /* counted once, however often a frame had to be sent */
    for (uint32_t i = 0; i < LAYERS * EXPERTS; i++) {
        n_picks += rt_exchange_picks(g_exchange, i / EXPERTS, i % EXPERTS);
    }
    assert_int_equal(n_picks, 20 * ROWS * TOPK);
    rt_exchange_destroy(g_exchange);
    pc_epoch_release(epoch);
    fake_stop(&a);
    fake_stop(&b);
    (void)state;
}

/* A router that came back under another member id: its links must say so. */
static void test_other_name(void **state)
{
    fake a;
    fake_start(&a, HONEST);
    exchange_open(10000, 5000);
    pc_epoch *first = make_epoch(1, (fake *const[]){&a}, (const uint32_t[]){1}, 1);
    pc_epoch *second = make_epoch(2, (fake *const[]){&a}, (const uint32_t[]){1}, 1);
    rt_exchange_offer_epoch(g_exchange, first, SELF);
    assert_int_equal(exchange_run(0), CM_OK);
    rt_exchange_offer_epoch(g_exchange, second, SELF + 1);
    assert_int_equal(exchange_run(1), CM_OK);
    rt_exchange_destroy(g_exchange);
    pc_epoch_release(first);
    pc_epoch_release(second);
    fake_stop(&a);
    (void)state;
}

typedef struct publisher {
    pc_epoch *epoch;
    fake *seen; /* publish once it was asked */
} publisher;

static void *publish(void *arg)
{
    publisher *p = arg;
    while (atomic_load(&p->seen->n_asked) == 0) {
        sched_yield();
    }
    rt_exchange_offer_epoch(g_exchange, p->epoch, SELF);
    return NULL;
}

static void test_stale(void **state)
{
    fake a;
    pthread_t thread;
    fake_start(&a, STALE_UNTIL_2);
    exchange_open(10000, 10000);
    pc_epoch *old = make_epoch(1, (fake *const[]){&a}, (const uint32_t[]){1}, 1);
    publisher p = {make_epoch(2, (fake *const[]){&a}, (const uint32_t[]){1}, 1), &a};
    rt_exchange_offer_epoch(g_exchange, old, SELF);
    pthread_create(&thread, NULL, publish, &p);
    assert_int_equal(exchange_run(0), CM_OK);
    pthread_join(thread, NULL);
    assert_true(atomic_load(&a.n_asked) > 1);
    rt_exchange_destroy(g_exchange);
    pc_epoch_release(old);
    pc_epoch_release(p.epoch);
    fake_stop(&a);
    (void)state;
}

/* A worker dies with our rows, or says nothing: the epoch without it finishes the layer, with the rows we
 * kept. */
static void lose_one(habit how, uint32_t answer_ms)
{
    fake a, b;
    fake_start(&a, HONEST);
    fake_start(&b, how);
    exchange_open(answer_ms, 20000);
    pc_epoch *both = make_epoch(1, (fake *const[]){&a, &b}, (const uint32_t[]){1, 2}, 2);
    pc_epoch *one = make_epoch(2, (fake *const[]){&a}, (const uint32_t[]){1}, 1);
    g_on_lost = one;
    rt_exchange_offer_epoch(g_exchange, both, SELF);
    assert_int_equal(exchange_run(0), CM_OK);
    assert_true(atomic_load(&g_lost) >= 1);
    assert_int_equal(exchange_run(1), CM_OK);
    rt_exchange_destroy(g_exchange);
    pc_epoch_release(both);
    pc_epoch_release(one);
    fake_stop(&a);
    fake_stop(&b);
}

static void test_death(void **state)
{
    lose_one(DIES, 10000);
    (void)state;
}

static void test_silence(void **state)
{
    lose_one(MUTE, 200);
    (void)state;
}

static void test_gives_up(void **state)
{
    exchange_open(10000, 100);
    assert_int_equal(exchange_run(0), CM_E_NO_OWNER); /* no epoch at all */
    assert_string_equal(rt_exchange_why(g_exchange), "no worker has joined yet");
    fake a;
    fake_start(&a, DIES);
    pc_epoch *epoch = make_epoch(1, (fake *const[]){&a}, (const uint32_t[]){1}, 1);
    rt_exchange_offer_epoch(g_exchange, epoch, SELF);
    assert_int_equal(exchange_run(0), CM_E_NO_OWNER); /* nobody else has its experts */
    assert_non_null(strstr(rt_exchange_why(g_exchange), "of layer 0 for 100 ms: worker 1 is unreachable"));
    rt_exchange_stop(g_exchange);
    assert_int_equal(exchange_run(0), CM_E_CANCELLED);
    rt_exchange_destroy(g_exchange);
    pc_epoch_release(epoch);
    fake_stop(&a);
    (void)state;
}

static int two_flights(void **state)
{
    (void)state;
    g_n_flight = 2;
    return 0;
}

static int two_in_place(void **state)
{
    g_backend = "shm"; /* frames are built where the worker reads them */
    return two_flights(state);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_plain),   cmocka_unit_test(test_other_name),
                                       cmocka_unit_test(test_stale),   cmocka_unit_test(test_death),
                                       cmocka_unit_test(test_silence), cmocka_unit_test(test_gives_up)};
    int n_failed = cmocka_run_group_tests_name("one flight", tests, NULL, NULL);
    n_failed += cmocka_run_group_tests_name("two flights", tests, two_flights, NULL);
    return n_failed + cmocka_run_group_tests_name("two flights in place", tests, two_in_place, NULL);
}
