/* The transport layer over both back-ends: one list of cases, run for each. */
#include <poll.h>
#include <stdio.h>
#include <string.h>

#include "common/base/rng.h"
#include "common/base/stats.h"
#include "common/net/net_private.h"
#include "tests/unit/net_sides.h"

static void test_up(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    int64_t n_lost = cm_stat_get(CM_STAT_net_peers_lost);
    int64_t n_before = cm_stat_get(CM_STAT_net_peers);
    net_test t = pair_open(backend, &options, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    assert_string_equal(net_backend(a->n), backend->name);
    assert_int_equal(cm_stat_get(CM_STAT_net_peers), n_before + 2);
    const net_identity *seen = net_peer_identity(a->peer);
    assert_true(seen->cluster == 7 && seen->role == 2 && seen->member == 102);
    seen = net_peer_identity(b->peer);
    assert_true(seen->cluster == 7 && seen->role == 1 && seen->member == 101);
    assert_string_equal(net_peer_address(b->peer), t.address);
    assert_true(strlen(net_peer_address(a->peer)) > 0);
    assert_null(net_peer_user(a->peer));
    net_peer_set_user(a->peer, &t);
    assert_ptr_equal(net_peer_user(a->peer), &t);
    /* the other goes in order: seen at once, and not counted as a loss */
    net_disconnect(b->peer);
    WAIT(&t, a->n_down == 1);
    assert_int_equal(a->down_status, CM_E_RESET);
    assert_int_equal(cm_stat_get(CM_STAT_net_peers_lost), n_lost);
    pair_close(&t);
}

static void test_sizes(void **state)
{
    const backend_case *backend = *state;
    static const uint64_t sizes[] = {
        0, 1, 63, 8 << 10, 14 << 10, (64 << 10) - 300, (64 << 10) - 1, 64 << 10, 1 << 20};
    static const uint32_t headers[] = {0, 1, 7, 24, 255, 256};
    net_options options = small_options(backend);
    net_test t = pair_open(backend, &options, &options);
    for (uint32_t i_side = 0; i_side < 2; i_side++) {
        side *from = &t.sides[i_side], *to = &t.sides[1 - i_side];
        to->hold = true;
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            for (uint32_t n_iov = sizes[i] == 0 ? 0 : 1; n_iov <= NET_IOV_MAX; n_iov++) {
                for (size_t h = 0; h < sizeof(headers) / sizeof(headers[0]); h++) {
                    net_message message = {.type = (uint16_t)(0xFEFF - h),
                                           .header = g_source + 17,
                                           .header_bytes = headers[h],
                                           .n_iov = n_iov,
                                           .deadline_ms = DEADLINE_MS,
                                           .cookie = &message};
                    uint64_t offset = 3 + i * 5 + h, at = offset;
                    for (uint32_t k = 0; k < n_iov; k++) {
                        uint64_t piece = k + 1 < n_iov ? sizes[i] / n_iov : offset + sizes[i] - at;
                        message.iov[k] = (net_iov){g_source + at, piece};
                        at += piece;
                    }
                    uint32_t n_before = from->n_sent;
                    assert_int_equal(net_send(from->peer, &message), CM_OK);
                    assert_int_equal(net_in_flight(from->n), 1);
                    WAIT(&t, to->n_held == 1 && from->n_sent == n_before + 1);
                    const net_event *event = &to->held[0];
                    assert_int_equal(event->type, message.type);
                    assert_int_equal(event->header_bytes, headers[h]);
                    assert_memory_equal(event->header, g_source + 17, headers[h]);
                    assert_int_equal(event->payload_bytes, sizes[i]);
                    assert_memory_equal(event->payload, g_source + offset, sizes[i]);
                    assert_int_equal(net_in_flight(to->n), 1);
                    side_release(to);
                }
            }
        }
        to->hold = false;
        assert_int_equal(from->n_failed, 0);
    }
    pair_close(&t);
}

static void test_order(void **state)
{
    const backend_case *backend = *state;
    enum { N = 1000 };
    uint64_t seed = cm_random_u64();
    print_message("seed %llu\n", (unsigned long long)seed);
    net_options options = small_options(backend);
    net_test t = pair_open(backend, &options, &options);
    uint32_t n_next[2] = {0, 0};
    int64_t sent_before = cm_stat_get(CM_STAT_net_sent_bytes),
            got_before = cm_stat_get(CM_STAT_net_received_bytes);
    while (t.sides[0].n_messages < N || t.sides[1].n_messages < N) {
        for (uint32_t i = 0; i < 2; i++) {
            cm_status status = CM_OK;
            while (n_next[i] < N && status == CM_OK) {
                cm_rng_block r = cm_rng_at(seed, n_next[i], i);
                /* mostly small, some that are announced first: they must not be overtaken */
                uint64_t n_bytes = r.word[0] % 4 != 0 ? r.word[1] % 9000 : r.word[1] % 200000;
                status = send_piece(&t.sides[i], n_next[i], r.word[2] % 1000000, n_bytes, 1 + r.word[3] % 4,
                                    DEADLINE_MS);
                n_next[i] += status == CM_OK;
            }
            assert_true(status == CM_OK || status == CM_AGAIN);
        }
        turn(&t);
        assert_int_equal(t.sides[0].n_down + t.sides[1].n_down, 0);
    }
    WAIT(&t, t.sides[0].n_sent == N && t.sides[1].n_sent == N);
    assert_int_equal(t.sides[0].n_checked, N);
    assert_int_equal(t.sides[1].n_checked, N);
    assert_int_equal(t.sides[0].n_failed + t.sides[1].n_failed, 0);
    /* heartbeats are counted as received only: at least what was sent has come */
    assert_true(cm_stat_get(CM_STAT_net_received_bytes) - got_before >=
                cm_stat_get(CM_STAT_net_sent_bytes) - sent_before);
    pair_close(&t);
}

static void test_sends_max(void **state)
{
    const backend_case *backend = *state;
    net_options wide = small_options(backend), narrow = wide;
    wide.sends_max = 32;
    narrow.sends_max = 4; /* the smaller one rules on both sides */
    net_test t = pair_open(backend, &narrow, &wide);
    for (uint32_t i_side = 0; i_side < 2; i_side++) {
        side *from = &t.sides[i_side], *to = &t.sides[1 - i_side];
        for (uint32_t round = 0; round < 5; round++) {
            for (uint32_t i = 0; i < 4; i++) {
                assert_int_equal(send_piece(from, round * 4 + i, i, 100, 1, DEADLINE_MS), CM_OK);
            }
            assert_int_equal(send_piece(from, 0, 0, 100, 1, DEADLINE_MS), CM_AGAIN);
            assert_int_equal(net_in_flight(from->n), 4);
            WAIT(&t, to->n_messages == round * 4 + 4 && from->n_sent == round * 4 + 4);
        }
    }
    pair_close(&t);
}

/* Payloads built in place among others, and rooms that are not used; released in any order. */
static void test_room(void **state)
{
    const backend_case *backend = *state;
    enum { N = 1500 };
    uint64_t seed = cm_random_u64();
    net_options options = small_options(backend);
    net_test t = pair_open(backend, &options, &options);
    side *to = &t.sides[0], *from = &t.sides[1];
    to->hold = true;
    print_message("seed %llu\n", (unsigned long long)seed);
    assert_true((net_room(from->peer, 1000) != NULL) == (strcmp(backend->name, "shm") == 0));
    uint32_t n_next = 0;
    for (uint32_t k = 0; to->n_messages < N || to->n_held > 0; k++) {
        cm_rng_block r = cm_rng_at(seed, k, 0);
        uint64_t n_bytes = r.word[0] % 3 == 0 ? r.word[1] % 900000 : r.word[1] % 90000,
                 at = r.word[2] % 1000000;
        cm_status status = CM_AGAIN;
        if (r.word[3] % 4 == 0) {
            (void)net_room(from->peer, n_bytes);
        }
        if (n_next < N) {
            status = r.word[3] % 3 == 0 ? send_piece(from, n_next, at, n_bytes, 2, DEADLINE_MS)
                                        : send_built(from, n_next, at, n_bytes);
        }
        n_next += status == CM_OK;
        if (r.word[3] % 2 == 0 || status == CM_AGAIN) {
            turn(&t);
        }
        while (to->n_held > 0 && (to->n_held > r.word[0] % 16 || n_next == N)) {
            side_release_one(to, r.word[2] % to->n_held);
        }
    }
    assert_int_equal(to->n_checked, N);
    pair_close(&t);
}

/* One that is kept for long does not keep the memory of those before it. */
static void test_newest_held(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.message_bytes_max = 4096;
    net_test t = pair_open(backend, &options, &options);
    side *to = &t.sides[0], *from = &t.sides[1];
    to->hold = true;
    for (uint32_t i = 0; i < 7; i++) {
        assert_int_equal(send_piece(from, i, 100 * i, 4096, 1, DEADLINE_MS), CM_OK);
        WAIT(&t, to->n_messages == i + 1);
        for (uint32_t k = 0; i == 3 && k < 3; k++) {
            side_release_one(to, k == 0 ? 0 : 1); /* the newest is the first now */
        }
    }
    side_release_one(to, 0);
    pair_close(&t);
}

/* A receiver that looks at nothing for a while: what comes to more messages than it can be told at once waits
 * with the sender, and none takes the place of another. */
static void test_many_untaken(void **state)
{
    const backend_case *backend = *state;
    enum { N = 800 };
    net_options options = small_options(backend);
    options.sends_max = 600;
    options.silence_ms = 60000;
    net_test t = pair_open(backend, &options, &options);
    side *to = &t.sides[0], *from = &t.sides[1];
    to->frozen = true;
    for (uint32_t n_next = 0; n_next < N;) {
        cm_status status = send_piece(from, n_next, n_next, 100, 1, DEADLINE_MS);
        n_next += status == CM_OK;
        if (status != CM_OK) {
            assert_int_equal(status, CM_AGAIN);
            assert_true(n_next >= options.sends_max);
            side_poll(from);
        }
    }
    to->frozen = false;
    WAIT(&t, to->n_checked == N && from->n_sent == N);
    assert_int_equal(from->n_failed, 0);
    pair_close(&t);
}

static void test_one_send(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.sends_max = 1;
    options.receives_max = 1;
    net_test t = pair_open(backend, &options, &options);
    for (uint32_t i = 0; i < 50; i++) {
        assert_int_equal(send_piece(&t.sides[1], i, i, i * 4000, 1, DEADLINE_MS), CM_OK);
        WAIT(&t, t.sides[1].n_sent == i + 1);
    }
    WAIT(&t, t.sides[0].n_messages == 50);
    pair_close(&t);
}

static void test_receives_max(void **state)
{
    const backend_case *backend = *state;
    enum { N = 60, ROOM = 2, WINDOW = 8 };
    net_options receiver = small_options(backend), sender = receiver;
    receiver.receives_max = ROOM;
    receiver.heartbeat_ms = sender.heartbeat_ms = 50;
    receiver.silence_ms = sender.silence_ms = 1500;
    sender.sends_max = receiver.sends_max = WINDOW;
    net_test t = pair_open(backend, &receiver, &sender);
    side *to = &t.sides[0], *from = &t.sides[1];
    to->hold = true;
    uint32_t n_next = 0;
    /* longer than silence_ms: the link must live on its heartbeats, which pass what waits */
    for (uint64_t until_ms = cm_now_ms() + 2 * receiver.silence_ms; cm_now_ms() < until_ms;) {
        while (n_next < N &&
               send_piece(from, n_next, n_next, n_next % 3 == 2 ? 150000 : 5000, 2, DEADLINE_MS) == CM_OK) {
            n_next++;
        }
        turn(&t);
        assert_int_equal(to->n_down + from->n_down, 0);
        assert_true(to->n_messages <= ROOM);
    }
    assert_int_equal(to->n_messages, ROOM);
    assert_true(n_next <= ROOM + WINDOW + WINDOW / 2);
    assert_true(n_next >= WINDOW);
    /* a slow one that releases two at a time: nothing is lost */
    while (to->n_messages < N) {
        while (n_next < N &&
               send_piece(from, n_next, n_next, n_next % 3 == 2 ? 150000 : 5000, 2, DEADLINE_MS) == CM_OK) {
            n_next++;
        }
        turn(&t);
        assert_true(to->n_held <= ROOM);
        if (to->n_held == ROOM) {
            side_release(to);
        }
    }
    assert_int_equal(to->n_checked, N);
    pair_close(&t);
}

static void test_foreign_cluster(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 0x1111, 1);
    side_listen(&t, a);
    side *b = side_open(&t, &options, 0x2222, 2);
    int64_t n_lost = cm_stat_get(CM_STAT_net_peers_lost);
    side_connect(&t, b);
    WAIT(&t, a->n_down == 1 && b->n_down == 1);
    assert_int_equal(a->n_up + b->n_up, 0);
    assert_int_equal(a->down_status, CM_E_REFUSED);
    assert_int_equal(b->down_status, CM_E_REFUSED);
    assert_true(log_has("cluster 0000000000002222 there, 0000000000001111 here"));
    assert_true(log_has("cluster 0000000000001111 there, 0000000000002222 here"));
    assert_int_equal(cm_stat_get(CM_STAT_net_peers_lost), n_lost); /* never was a link */
    /* cluster 0 is no wildcard */
    net_set_identity(b->n, &(net_identity){.cluster = 0});
    side_connect(&t, b);
    WAIT(&t, a->n_down == 2 && b->n_down == 2);
    assert_int_equal(b->down_status, CM_E_REFUSED);
    /* the same objects go on with those who fit */
    net_set_identity(b->n, &(net_identity){.cluster = 0x1111});
    side_connect(&t, b);
    WAIT(&t, a->n_up == 1 && b->n_up == 1);
    pair_close(&t);
}

/* A table over another that changes one thing. */
static const net_ops *g_inner;
static uint32_t g_hello_protocol, g_hello_bytes, g_n_progress;

static cm_status send_other_hello(void *backend, net_backend_link *link, const net_message *message,
                                  void *send_cookie)
{
    net_message changed = *message;
    net_hello hello = {0};
    if (message->type == NET_TYPE_HELLO) {
        memcpy(&hello, message->header, sizeof(hello));
        hello.protocol = g_hello_protocol;
        changed.header = &hello;
        changed.header_bytes = g_hello_bytes;
    }
    return g_inner->send(backend, link, &changed, send_cookie);
}

static void test_other_protocol(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    g_inner = table_of(backend->name);
    net_ops ops = *g_inner;
    ops.send = send_other_hello;
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    side_listen(&t, a);
    side *b = side_open_ops(&t, &ops, &options, 7, 2);
    static const uint32_t protocols[] = {NET_PROTOCOL + 41, NET_PROTOCOL + 41, NET_PROTOCOL};
    static const uint32_t bytes[] = {sizeof(net_hello), 8,
                                     12}; /* a later version may say less; this one may not */
    for (uint32_t i = 0; i < 3; i++) {
        g_hello_protocol = protocols[i];
        g_hello_bytes = bytes[i];
        side_connect(&t, b);
        WAIT(&t, a->n_down == i + 1 && b->n_down == i + 1);
        assert_int_equal(a->n_up, 0);
        assert_int_equal(a->down_status, CM_E_REFUSED);
        assert_int_equal(b->down_status, CM_E_REFUSED);
        b->n_up = 0; /* it had no reason to refuse, and may have come up for a moment */
    }
    assert_true(log_has("protocol 43 there, 2 here"));
    pair_close(&t);
}

static void test_oversize(void **state)
{
    const backend_case *backend = *state;
    static const uint64_t maxima[] = {4096, 100000};
    for (uint32_t i = 0; i < 2; i++) {
        net_options big = small_options(backend), small = big;
        small.message_bytes_max = maxima[i];
        int64_t n_lost = cm_stat_get(CM_STAT_net_peers_lost);
        net_test t = pair_open(backend, &small, &big);
        side *a = &t.sides[0], *b = &t.sides[1];
        assert_int_equal(send_piece(b, 0, 0, maxima[i], 1, DEADLINE_MS), CM_OK);
        WAIT(&t, a->n_messages == 1);
        assert_int_equal(send_piece(b, 1, 0, maxima[i] + 1, 1, DEADLINE_MS), CM_OK);
        WAIT(&t, a->n_down == 1 && b->n_down == 1);
        assert_int_equal(a->down_status, CM_E_PROTOCOL);
        assert_int_equal(a->n_messages, 1);
        assert_int_equal(b->n_sent, 2);
        assert_true(cm_stat_get(CM_STAT_net_peers_lost) > n_lost);
        pair_close(&t);
    }
}

static void test_disconnect_sending(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = pair_open(backend, &options, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    for (uint32_t i = 0; i < 6; i++) {
        assert_int_equal(send_piece(b, i, 0, i % 2 == 0 ? 1 << 20 : 3000, 2, DEADLINE_MS), CM_OK);
    }
    net_disconnect(b->peer);
    WAIT(&t, b->n_sent == 6 && a->n_down == 1);
    assert_int_equal(b->n_failed, 6);
    assert_int_equal(b->failed_status, CM_E_CANCELLED);
    assert_int_equal(b->n_down, 0);
    assert_int_equal(net_in_flight(b->n), 0);
    assert_int_equal(net_next_timer_ms(b->n), UINT32_MAX);
    /* messages that were queued for the user go back with the link */
    side_connect(&t, b);
    WAIT(&t, a->n_up == 2 && b->n_up == 2);
    a->n_messages = 0;
    assert_int_equal(send_piece(b, 0, 0, 1000, 1, DEADLINE_MS), CM_OK);
    assert_int_equal(send_piece(b, 1, 0, 1000, 1, DEADLINE_MS), CM_OK);
    net_event event;
    b->frozen = true;
    uint64_t until_ms = cm_now_ms() + WAIT_MS;
    while (a->n_messages == 0 && cm_now_ms() < until_ms) {
        /* one event at a time leaves the second one waiting */
        if (net_poll(a->n, &event, 1) == 1) {
            side_event(a, &event);
        } else if (net_arm(a->n)) {
            poll(&(struct pollfd){.fd = net_fd(a->n), .events = POLLIN}, 1, 500);
        }
        (void)side_poll(b);
    }
    assert_int_equal(a->n_messages, 1);
    net_disconnect(a->peer);
    b->frozen = false;
    WAIT(&t, b->n_down == 1);
    pair_close(&t);
}

/* A release alone lets the next waiting message through: nobody else needs to stir. */
static void test_release_wakes(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.heartbeat_ms = 100000;
    options.silence_ms = 600000;
    options.receives_max = 1;
    net_test t = pair_open(backend, &options, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    a->hold = true;
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(send_piece(b, i, i, 100, 1, DEADLINE_MS), CM_OK);
    }
    WAIT(&t, a->n_messages == 1);
    uint64_t until_ms = cm_now_ms() + WAIT_MS;
    while (side_poll(b) != 0 || side_poll(a) != 0 || !net_arm(a->n)) {
        assert_true(cm_now_ms() < until_ms);
    }
    b->frozen = true;
    for (uint32_t i = 1; i < 3; i++) {
        side_release(a);
        assert_false(net_arm(a->n));
        WAIT(&t, a->n_messages == i + 1);
    }
    b->frozen = false;
    side_release(a);
    pair_close(&t);
}

/* The receiver leaves while payloads are on their way to it: their receives must come back to it. */
static void test_disconnect_receiving(void **state)
{
    const backend_case *backend = *state;
    enum { ROOM = 2 };
    net_options options = small_options(backend);
    options.receives_max = ROOM;
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    side_listen(&t, a);
    side *b = side_open(&t, &options, 7, 2);
    for (uint32_t round = 0; round < 4; round++) {
        side_connect(&t, b);
        WAIT(&t, a->n_up == round + 1 && b->n_up == round + 1);
        a->n_messages = 0;
        a->hold = true;
        for (uint32_t i = 0; i < ROOM; i++) {
            assert_int_equal(send_piece(b, i, i, 1 << 20, 1, DEADLINE_MS), CM_OK);
        }
        if (round == 3) {
            WAIT(&t, a->n_held == ROOM); /* all receives are there */
            continue;
        }
        /* the announcements are in, the payloads need the other's help */
        struct pollfd fd = {.fd = net_fd(a->n), .events = POLLIN};
        while (side_poll(a) != 0 || !net_arm(a->n)) {
        }
        poll(&fd, 1, 100); /* nothing may come: a local payload was copied at once */
        (void)side_poll(a);
        side_release(a);
        net_disconnect(a->peer);
        WAIT(&t, b->n_down == round + 1);
    }
    pair_close(&t);
}

static void test_peer_close(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = pair_open(backend, &options, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    assert_int_equal(send_piece(b, 0, 0, 1 << 20, 1, DEADLINE_MS), CM_OK);
    side_close(a); /* never took it */
    WAIT(&t, b->n_down == 1);
    assert_int_equal(b->n_sent, 1);
    assert_int_equal(b->n_failed, backend->copies ? 0 : 1);
    assert_int_equal(b->failed_status, backend->copies ? CM_OK : CM_E_RESET);
    assert_int_equal(b->down_status, CM_E_RESET);
    pair_close(&t);
}

static void test_send_after_loss(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = pair_open(backend, &options, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    side_close(a);
    uint32_t n_accepted = 0;
    cm_status status = CM_OK;
    /* one event at a time: the loss is known to the layer before the user has its event */
    uint64_t until_ms = cm_now_ms() + WAIT_MS;
    while (b->n_down == 0 && cm_now_ms() < until_ms) {
        status = send_piece(b, n_accepted, 0, 10, 1, DEADLINE_MS);
        n_accepted += status == CM_OK;
        assert_true(status == CM_OK || status == CM_AGAIN || status == CM_E_RESET);
        turn(&t);
    }
    WAIT(&t, b->n_sent == n_accepted);
    pair_close(&t);
}

static void test_silence(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    side_listen(&t, a);
    options.heartbeat_ms = 50;
    options.silence_ms = 300;
    side *b = side_open(&t, &options, 7, 2);
    side_connect(&t, b);
    WAIT(&t, a->n_up == 1 && b->n_up == 1);
    a->frozen = true;
    WAIT(&t, b->n_down == 1);
    assert_int_equal(b->down_status, CM_E_SILENT);
    a->frozen = false;
    WAIT(&t, a->n_down == 1);
    pair_close(&t);
}

/* Somebody who accepts and never greets. */
static void test_no_greeting(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    side_listen(&t, a);
    options.heartbeat_ms = 50;
    options.silence_ms = 300;
    side *b = side_open(&t, &options, 7, 2);
    a->frozen = true;
    side_connect(&t, b);
    WAIT(&t, b->n_down == 1);
    assert_int_equal(b->n_up, 0);
    assert_int_equal(b->down_status, CM_E_UNREACHABLE);
    a->frozen = false;
    side_close(b);
    pair_close(&t);
}

static void test_deadline(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.silence_ms = 600000;
    net_test t = pair_open(backend, &options, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    a->frozen = true;
    /* half a window is reported before the peer took it, where the payload is free */
    uint32_t n_free = backend->copies ? options.sends_max / 2 : 0, n = n_free + 3;
    for (uint32_t i = 0; i < n; i++) {
        assert_int_equal(send_piece(b, i, 0, 1 << 20, 3, i == n_free + 1 ? 200 : 600000), CM_OK);
    }
    WAIT(&t, b->n_down == 1);
    assert_int_equal(b->down_status, CM_E_DEADLINE);
    assert_int_equal(b->n_sent, n);
    assert_int_equal(b->n_failed, 3);
    assert_int_equal(b->failed_status, CM_E_DEADLINE);
    a->frozen = false;
    WAIT(&t, a->n_down == 1);
    pair_close(&t);
}

static void test_sleep(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.heartbeat_ms = 100000;
    options.silence_ms = 600000;
    net_test t = pair_open(backend, &options, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    for (uint32_t i = 0; i < 20; i++) {
        uint64_t until_ms = cm_now_ms() + WAIT_MS;
        /* to sleep: nothing to poll and the descriptor is quiet */
        struct pollfd fd = {.fd = net_fd(a->n), .events = POLLIN};
        while (!(side_poll(a) == 0 && net_arm(a->n))) {
            assert_true(cm_now_ms() < until_ms);
        }
        assert_true(net_next_timer_ms(a->n) > 0);
        assert_int_equal(send_piece(b, i, 0, i % 2 == 0 ? 100 : 300000, 1, DEADLINE_MS), CM_OK);
        assert_false(net_arm(b->n) &&
                     strcmp(backend->name, "ucx") == 0); /* a fresh send wants one poll first */
        (void)side_poll(b);
        assert_int_equal(poll(&fd, 1, WAIT_MS), 1);
        WAIT(&t, a->n_messages == i + 1 && b->n_sent == i + 1);
    }
    pair_close(&t);
}

static bool progress_counted(void *backend)
{
    bool did = g_inner->progress(backend);
    g_n_progress += did;
    return did;
}

/* At rest an object wakes for heartbeats and for nothing else: what it does is bounded by how many there
 * were. */
static void test_idle(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.heartbeat_ms = 50;
    g_inner = table_of(backend->name);
    net_ops ops = *g_inner;
    ops.progress = progress_counted;
    net_test t = {.backend = backend};
    side *a = side_open_ops(&t, &ops, &options, 7, 1);
    side_listen(&t, a);
    side *b = side_open(&t, &options, 7, 2);
    side_connect(&t, b);
    WAIT(&t, a->n_up == 1 && b->n_up == 1);
    uint64_t start_ms = cm_now_ms();
    g_n_progress = 0;
    uint32_t n_turns = 0;
    while (cm_now_ms() < start_ms + 1000) {
        turn(&t);
        n_turns++;
    }
    uint32_t n_beats = (uint32_t)(cm_now_ms() - start_ms) / options.heartbeat_ms + 1;
    assert_true(n_turns <= 20 * n_beats);
    assert_true(g_n_progress <= 10 * n_beats);
    assert_true(g_n_progress > 0); /* heartbeats did come */
    assert_int_equal(a->n_down, 0);
    pair_close(&t);
}

static void test_peers_max(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    options.peers_max = 1;
    side *a = side_open(&t, &options, 7, 1);
    side_listen(&t, a);
    options.peers_max = 2;
    side *b = side_open(&t, &options, 7, 2);
    side *c = side_open(&t, &options, 7, 3);
    side_connect(&t, b);
    WAIT(&t, a->n_up == 1 && b->n_up == 1);
    side_connect(&t, c);
    WAIT(&t, c->n_down == 1);
    assert_int_equal(c->down_status, CM_E_REFUSED);
    assert_int_equal(c->n_up, 0);
    cm_error err;
    net_peer *peer;
    assert_int_equal(net_connect(a->n, t.address, &peer, &err), CM_E_CAPACITY);
    /* room again */
    net_disconnect(b->peer);
    WAIT(&t, a->n_down == 1);
    side_connect(&t, c);
    WAIT(&t, a->n_up == 2 && c->n_up == 1);
    pair_close(&t);
}

static void test_addresses(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    side_listen(&t, a);
    side *b = side_open(&t, &options, 7, 2);
    cm_error err = {0};
    char bound[NET_ADDRESS_BYTES];
    if (!backend->listens_anywhere) {
        assert_int_equal(net_listen(b->n, t.address, bound, &err), CM_E_EXISTS);
        assert_non_null(strstr(err.text, t.address));
    }
    for (uint32_t i = 0; i < 4 && backend->unreadable[i] != NULL; i++) {
        net_peer *peer;
        assert_int_equal(net_connect(b->n, backend->unreadable[i], &peer, &err), CM_E_INVALID);
        if (!backend->listens_anywhere) {
            assert_int_equal(net_listen(b->n, backend->unreadable[i], bound, &err), CM_E_INVALID);
        }
    }
    pair_close(&t);
}

static void test_nobody(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    if (backend->nobody == NULL) {
        side *gone = side_open(&t, &options, 7, 1);
        side_listen(&t, gone);
        side_close(gone);
    } else {
        snprintf(t.address, sizeof(t.address), "%s", backend->nobody);
    }
    side_connect(&t, a);
    WAIT(&t, a->n_down == 1);
    assert_int_equal(a->n_up, 0);
    assert_int_equal(a->down_status, CM_E_UNREACHABLE);
    pair_close(&t);
}

static void test_reconnect(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.peers_max = 1;
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    side_listen(&t, a);
    side *b = side_open(&t, &options, 7, 2);
    for (uint32_t i = 0; i < 40; i++) {
        side_connect(&t, b);
        WAIT(&t, a->n_up == i + 1 && b->n_up == i + 1);
        a->n_messages = 0;
        assert_int_equal(send_piece(b, 0, i, 70000, 1, DEADLINE_MS), CM_OK);
        WAIT(&t, a->n_messages == 1);
        net_disconnect(i % 2 == 0 ? b->peer : a->peer);
        WAIT(&t, a->n_down + b->n_down == i + 1);
    }
    pair_close(&t);
}

static void test_unreleased(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = pair_open(backend, &options, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    a->hold = true;
    assert_int_equal(send_piece(b, 0, 0, 1000, 1, DEADLINE_MS), CM_OK);
    assert_int_equal(send_piece(b, 1, 0, 100000, 1, DEADLINE_MS), CM_OK);
    WAIT(&t, a->n_held == 2);
    /* messages outlive their link */
    side_close(b);
    WAIT(&t, a->n_down == 1);
    assert_memory_equal(a->held[1].payload, g_source, 100000);
    net_release(a->n, &a->held[1]);
    assert_int_equal(net_in_flight(a->n), 1);
    a->n_held = 0; /* forgotten */
    side_close(a);
    assert_true(log_has("receives: object"));
}

static void test_options(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net *n;
    cm_error err;
    options.silence_ms = options.heartbeat_ms;
    assert_int_equal(net_open(&options, &n, &err), CM_E_CONFIG);
    options = small_options(backend);
    options.receives_max = 0;
    assert_int_equal(net_open(&options, &n, &err), CM_E_CONFIG);
    options = small_options(backend);
    options.backend = "pigeon";
    assert_int_equal(net_open(&options, &n, &err), CM_E_CONFIG);
    assert_non_null(strstr(err.text, "pigeon"));
}

/* with and without keys: nothing else changes */
#define EACH_TAKING_BACK(test_)                                                                              \
    BOTH(test_), ONE(shm, test_), ONE(ucx_keyed, test_), ONE(local_keyed, test_), ONE(shm_keyed, test_)
#if BALEEN_MPI /* this process is a world of one */
#define EACH(test_) EACH_TAKING_BACK(test_), ONE(mpi, test_)
#else
#define EACH(test_) EACH_TAKING_BACK(test_)
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        EACH(test_up),
        EACH(test_sizes),
        EACH(test_order),
        EACH(test_sends_max),
        EACH(test_one_send),
        EACH(test_room),
        EACH(test_newest_held),
        ONE(shm, test_many_untaken),
        EACH(test_receives_max),
        EACH(test_foreign_cluster),
        EACH(test_other_protocol),
        EACH(test_oversize),
        EACH(test_disconnect_sending),
        EACH(test_release_wakes),
        EACH(test_disconnect_receiving),
        EACH(test_peer_close),
        EACH(test_send_after_loss),
        EACH(test_silence),
        EACH(test_no_greeting),
        EACH_TAKING_BACK(test_deadline), /* a send over MPI stays begun */
        EACH(test_sleep),
        EACH_TAKING_BACK(test_idle), /* MPI has to be looked at */
        EACH(test_peers_max),
        EACH(test_addresses),
        EACH(test_nobody),
        EACH(test_reconnect),
        EACH(test_unreleased),
        EACH(test_options),
    };
    sides_init();
    int n_failed = cmocka_run_group_tests(tests, NULL, NULL);
    sides_fini();
    return n_failed;
}
