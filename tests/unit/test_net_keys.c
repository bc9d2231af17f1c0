/* Keys of messages, against somebody who can write into a link: side b's back-end is one that holds back,
 * changes and repeats what b's layer gives it. Whatever is refused must leave no trace but the counter. */
#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/rng.h"
#include "common/base/stats.h"
#include "common/net/net_private.h"
#include "tests/unit/net_sides.h"

enum { SHORT_SILENCE_MS = 400, CAUGHT_BYTES = 128 << 10 };

/* ---- the one in between ---- */

typedef struct caught {
    net_backend_link *link;
    net_message message; /* points to the copies below */
    void *cookie;
    uint8_t header[NET_WIRE_HEADER_MAX];
    uint8_t payload[CAUGHT_BYTES];
} caught;

static struct {
    const net_ops *inner;
    const net_upcalls *upcalls;
    void *ctx, *backend;
    uint16_t type;     /* of what is caught; 0: nothing */
    bool hold;         /* caught messages go no further until m_pass */
    uint32_t n_caught; /* so far; the last is in last */
    caught last, before;
} m;

static const char m_injected; /* cookie of what b's layer did not send */

static void *m_accepted(void *ctx, net_backend_link *link, const char *address)
{
    (void)ctx;
    return m.upcalls->accepted(m.ctx, link, address);
}

static void m_received(void *ctx, void *peer, const net_event *message)
{
    (void)ctx;
    m.upcalls->received(m.ctx, peer, message);
}

static void m_sent(void *ctx, void *peer, void *cookie, cm_status status)
{
    (void)ctx;
    if (cookie != &m_injected) {
        m.upcalls->sent(m.ctx, peer, cookie, status);
    }
}

static void m_down(void *ctx, void *peer, cm_status status)
{
    (void)ctx;
    m.upcalls->down(m.ctx, peer, status);
}

static const net_upcalls m_upcalls = {m_accepted, m_received, m_sent, m_down};

static cm_status m_open(const net_options *options, const net_upcalls *upcalls, void *ctx, void **backend_out,
                        cm_error *err)
{
    m.upcalls = upcalls;
    m.ctx = ctx;
    cm_status status = m.inner->open(options, &m_upcalls, NULL, backend_out, err);
    m.backend = *backend_out;
    return status;
}

static void m_catch(net_backend_link *link, const net_message *message, void *cookie)
{
    m.n_caught++;
    m.before = m.last;
    m.before.message.header = m.before.header;
    m.before.message.iov[0].data = m.before.payload;
    m.last = (caught){.link = link, .message = *message, .cookie = cookie};
    memcpy(m.last.header, message->header, message->header_bytes);
    m.last.message.header = m.last.header;
    uint64_t n = 0;
    for (uint32_t i = 0; i < message->n_iov; i++) {
        memcpy(m.last.payload + n, message->iov[i].data, message->iov[i].n_bytes);
        n += message->iov[i].n_bytes;
    }
    m.last.message.iov[0] = (net_iov){m.last.payload, n};
    m.last.message.n_iov = 1;
}

static cm_status m_send(void *backend, net_backend_link *link, const net_message *message, void *cookie)
{
    if (message->type == m.type) {
        m_catch(link, message, cookie);
        if (m.hold) {
            return CM_OK;
        }
    }
    return m.inner->send(backend, link, message, cookie);
}

/* What was held back goes on, unchanged. */
static void m_pass(void)
{
    assert_int_equal(m.inner->send(m.backend, m.last.link, &m.last.message, m.last.cookie), CM_OK);
}

/* Something else goes into a link. */
static void m_inject(net_backend_link *link, const net_message *message)
{
    assert_int_equal(m.inner->send(m.backend, link, message, (void *)(uintptr_t)&m_injected), CM_OK);
}

static void sides_between(net_test *t, const net_options *options)
{
    static net_ops ops;
    m.inner = table_of(t->backend->name);
    m.type = 0;
    m.hold = false;
    m.n_caught = 0;
    ops = *m.inner;
    ops.open = m_open;
    ops.send = m_send;
    side *a = side_open(t, options, 7, 1);
    side_listen(t, a);
    side *b = side_open_ops(t, &ops, options, 7, 2);
    side_connect(t, b);
    WAIT(t, a->n_up == 1 && b->n_up == 1);
}

/* ---- what is refused ---- */

static int64_t refused(void)
{
    return cm_stat_get(CM_STAT_net_refused);
}

static void assert_refused(net_test *t, net_backend_link *link, const net_message *message)
{
    int64_t before = refused();
    uint32_t n_messages = t->sides[0].n_messages;
    m_inject(link, message);
    /* a refusal is no event that would end a sleep */
    for (uint64_t until_ms = cm_now_ms() + WAIT_MS; refused() == before && cm_now_ms() < until_ms;) {
        (void)side_poll(&t->sides[0]);
        (void)side_poll(&t->sides[1]);
    }
    assert_int_equal(refused(), before + 1);
    assert_int_equal(t->sides[0].n_messages, n_messages);
    assert_int_equal(t->sides[0].n_down + t->sides[1].n_down, 0);
}

/* Changes one bit of the wire image: type, prefix, header or payload. */
static void flip(caught *c, uint64_t bit)
{
    uint64_t n_header = c->message.header_bytes * 8;
    if (bit < 15) {
        c->message.type ^= (uint16_t)(1u << bit);
    } else if (bit - 15 < n_header) {
        c->header[(bit - 15) / 8] ^= (uint8_t)(1u << (bit - 15) % 8);
    } else {
        c->payload[(bit - 15 - n_header) / 8] ^= (uint8_t)(1u << (bit - 15 - n_header) % 8);
    }
}

/* The zero word of the prefix is the one part nothing is read from. */
static bool bit_counts(uint64_t bit)
{
    return bit < 15 + 96 || bit >= 15 + 128;
}

static caught copy_of(const caught *from)
{
    caught c = *from;
    return c;
}

static void point(caught *c)
{
    c->message.header = c->header;
    c->message.iov[0].data = c->payload;
}

static void test_flipped(void **state)
{
    const backend_case *backend = *state;
    enum { N = 300 };
    uint64_t seed = cm_random_u64();
    print_message("seed %llu\n", (unsigned long long)seed);
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    sides_between(&t, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    static caught changed;
    for (uint32_t i = 0; i < 3; i++) {
        static const uint64_t sizes[] = {0, 5000, 100000};
        m.type = 1;
        m.hold = true;
        assert_int_equal(send_piece(b, i, i, sizes[i], sizes[i] == 0 ? 0 : 3, DEADLINE_MS), CM_OK);
        uint64_t n_bits = 15 + 8 * (m.last.message.header_bytes + sizes[i]);
        for (uint32_t k = 0; k < N; k++) {
            uint64_t bit = k < 60 ? k * 5 % n_bits : cm_rng_at(seed, k, i).word[0] % n_bits;
            if (bit_counts(bit)) {
                changed = copy_of(&m.last);
                point(&changed);
                flip(&changed, bit);
                assert_refused(&t, m.last.link, &changed.message);
            }
        }
        /* the real one, after all that */
        m_pass();
        m.hold = false;
        m.type = 0;
        WAIT(&t, a->n_messages == i + 1 && b->n_sent == i + 1);
        assert_int_equal(a->n_checked, i + 1);
    }
    assert_true(log_has("its tag is wrong"));
    pair_close(&t);
}

static void test_cut(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    sides_between(&t, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    static caught changed;
    m.type = 1;
    m.hold = true;
    assert_int_equal(send_piece(b, 0, 0, 9000, 2, DEADLINE_MS), CM_OK);
    static const struct {
        uint32_t header_less;
        int32_t payload_more;
    } cuts[] = {{0, -1}, {0, -9000}, {0, 1}, {1, 0}, {24, 0}, {24, 24}, {25, 0}, {56, 0}, {8, 8}};
    for (size_t i = 0; i < sizeof(cuts) / sizeof(cuts[0]); i++) {
        changed = copy_of(&m.last);
        point(&changed);
        changed.message.header_bytes -= cuts[i].header_less;
        changed.message.iov[0].n_bytes = (uint64_t)((int64_t)9000 + cuts[i].payload_more);
        assert_refused(&t, m.last.link, &changed.message);
    }
    m_pass();
    WAIT(&t, a->n_messages == 1 && a->n_checked == 1 && b->n_sent == 1);
    pair_close(&t);
}

static void test_replayed(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.heartbeat_ms = 100;
    net_test t = {.backend = backend};
    sides_between(&t, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    m.type = 1;
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(send_piece(b, i, i, 100 + i * 30000, 1, DEADLINE_MS), CM_OK);
        WAIT(&t, a->n_messages == i + 1);
        assert_refused(&t, m.last.link, &m.last.message);
        if (i > 0) {
            assert_refused(&t, m.before.link, &m.before.message);
        }
    }
    assert_true(log_has("it came before"));
    /* the layer's own: an old count of taken messages would let too many in */
    m.type = NET_TYPE_HEARTBEAT;
    m.n_caught = 0;
    WAIT(&t, m.n_caught >= 2);
    turn(&t);
    assert_refused(&t, m.before.link, &m.before.message);
    m.type = 0;
    assert_int_equal(send_piece(b, 4, 4, 100, 1, DEADLINE_MS), CM_OK);
    WAIT(&t, a->n_messages == 5);
    pair_close(&t);
}

/* Between the same two objects, under the same key. */
static void test_redirected(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    sides_between(&t, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    m.type = 1;
    assert_int_equal(send_piece(b, 0, 0, 100, 1, DEADLINE_MS), CM_OK);
    WAIT(&t, a->n_messages == 1);
    static caught first;
    first = copy_of(&m.last);
    point(&first);
    side_connect(&t, b);
    WAIT(&t, a->n_up == 2 && b->n_up == 2);
    m.hold = true;
    a->n_messages = 0;
    assert_int_equal(send_piece(b, 0, 0, 100, 1, DEADLINE_MS), CM_OK);
    assert_true(m.last.link != first.link);
    /* number 1 of the first link in place of number 1 of the second, and the other way round */
    assert_refused(&t, m.last.link, &first.message);
    assert_refused(&t, first.link, &m.last.message);
    m_pass();
    WAIT(&t, a->n_messages == 1);
    pair_close(&t);
}

/* The layer's words by somebody who has no key, and one that was cut out of the order. */
static void test_forged_notes(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    sides_between(&t, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    m.type = 1;
    assert_int_equal(send_piece(b, 0, 0, 10, 1, DEADLINE_MS), CM_OK);
    WAIT(&t, a->n_messages == 1);
    struct {
        net_prefix prefix;
        net_keys_note body;
    } note = {.prefix = {.seq = 100}};
    static const struct {
        uint16_t type;
        uint32_t bytes;
    } notes[] = {{NET_TYPE_GOODBYE, sizeof(net_prefix)},
                 {NET_TYPE_HEARTBEAT, sizeof(net_prefix) + 8},
                 {NET_TYPE_KEYS, sizeof(note)},
                 {NET_TYPE_KEYS, 3},
                 {NET_TYPE_KEYS + 9, 40},
                 {NET_TYPE_GOODBYE, 0}};
    for (size_t i = 0; i < sizeof(notes) / sizeof(notes[0]); i++) {
        net_message message = {
            .type = notes[i].type, .header = &note, .header_bytes = notes[i].bytes, .deadline_ms = 1};
        assert_refused(&t, m.last.link, &message);
    }
    net_refusal refusal = {.reason = NET_REFUSE_CLUSTER, .protocol = NET_PROTOCOL};
    net_message message = {
        .type = NET_TYPE_REFUSAL, .header = &refusal, .header_bytes = sizeof(refusal), .deadline_ms = 1};
    assert_refused(&t, m.last.link, &message);
    net_hello hello = {
        .magic = NET_HELLO_MAGIC, .protocol = NET_PROTOCOL, .cluster = 7, .sends_max = 1, .keyed = 1};
    message = (net_message){
        .type = NET_TYPE_HELLO, .header = &hello, .header_bytes = sizeof(hello), .deadline_ms = 1};
    assert_refused(&t, m.last.link, &message);
    assert_int_equal(send_piece(b, 1, 1, 10, 1, DEADLINE_MS), CM_OK);
    WAIT(&t, a->n_messages == 2);
    pair_close(&t);
}

/* One genuine message is lost: what follows is genuine too, so the link is broken and says so. */
static void test_lost(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    sides_between(&t, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    m.type = 1;
    m.hold = true;
    assert_int_equal(send_piece(b, 0, 0, 10, 1, DEADLINE_MS), CM_OK);
    m.hold = false;
    m.type = 0;
    assert_int_equal(send_piece(b, 1, 1, 10, 1, DEADLINE_MS), CM_OK);
    WAIT(&t, a->n_down == 1);
    assert_int_equal(a->down_status, CM_E_PROTOCOL);
    assert_int_equal(a->n_messages, 0);
    m.upcalls->sent(m.ctx, NULL, m.last.cookie, CM_E_RESET); /* the one in between lets go of it */
    WAIT(&t, b->n_down == 1);
    pair_close(&t);
}

/* ---- strangers ---- */

typedef enum stranger_kind { STRANGER_TALKS, STRANGER_MIRRORS } stranger_kind;

/* A back-end without a layer: knows the protocol and the cluster, has no key. */
typedef struct stranger {
    const net_ops *ops;
    void *backend;
    net_backend_link *link;
    stranger_kind kind;
    uint32_t n_heard;
    bool down;
} stranger;

static void stranger_say(stranger *s, uint16_t type, const void *header, uint32_t n)
{
    net_message message = {.type = type, .header = header, .header_bytes = n, .deadline_ms = 1};
    (void)!s->ops->send(s->backend, s->link, &message, NULL);
}

static void *stranger_accepted(void *ctx, net_backend_link *link, const char *address)
{
    (void)ctx;
    (void)link;
    (void)address;
    return NULL;
}

static void stranger_received(void *ctx, void *peer, const net_event *message)
{
    stranger *s = ctx;
    (void)peer;
    s->n_heard++;
    if (s->kind == STRANGER_MIRRORS) {
        stranger_say(s, message->type, message->header, message->header_bytes);
    }
    if (message->type < NET_TYPE_INTERNAL) {
        s->ops->release(s->backend, message->receive);
    }
}

static void stranger_sent(void *ctx, void *peer, void *cookie, cm_status status)
{
    (void)ctx;
    (void)peer;
    (void)cookie;
    (void)status;
}

static void stranger_down(void *ctx, void *peer, cm_status status)
{
    (void)peer;
    (void)status;
    ((stranger *)ctx)->down = true;
}

static const net_upcalls stranger_upcalls = {stranger_accepted, stranger_received, stranger_sent,
                                             stranger_down};

static void stranger_begin(stranger *s, const net_test *t, const net_options *options)
{
    cm_error err = {0};
    s->ops = table_of(t->backend->name);
    assert_int_equal(s->ops->open(options, &stranger_upcalls, s, &s->backend, &err), CM_OK);
    assert_int_equal(s->ops->connect(s->backend, t->address, s, &s->link, &err), CM_OK);
}

static void test_stranger(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.heartbeat_ms = 50;
    options.silence_ms = SHORT_SILENCE_MS;
    for (int kind = STRANGER_TALKS; kind <= STRANGER_MIRRORS; kind++) {
        net_test t = {.backend = backend};
        stranger s = {.kind = (stranger_kind)kind};
        side *a = side_open(&t, &options, 7, 1);
        side_listen(&t, a);
        stranger_begin(&s, &t, &options);
        if (kind == STRANGER_TALKS) {
            uint32_t id;
            (void)side_poll(a); /* takes its key */
            uint32_t ids[NET_KEYS_MAX];
            net_key_ids(a->n, ids);
            id = ids[0];
            assert_true(id != 0);
            net_hello hello = {.magic = NET_HELLO_MAGIC,
                               .protocol = NET_PROTOCOL,
                               .cluster = 7,
                               .role = 4,
                               .member = 3,
                               .sends_max = 8,
                               .keyed = 1,
                               .nonce = {1, 2},
                               .key_ids = {id}};
            stranger_say(&s, NET_TYPE_HELLO, &hello, sizeof(hello));
            struct {
                net_prefix prefix;
                net_keys_note body;
            } note = {.prefix = {.seq = 1, .key = id}, .body = {{id}}};
            stranger_say(&s, NET_TYPE_KEYS, &note,
                         sizeof(note)); /* says that it has the key, and shows nothing */
            note.prefix.key = 0;
            stranger_say(&s, NET_TYPE_KEYS, &note, sizeof(note));
            stranger_say(&s, 1, &note, sizeof(note));
        }
        int64_t before = refused();
        uint64_t until_ms = cm_now_ms() + WAIT_MS;
        while (a->n_down == 0 && cm_now_ms() < until_ms) {
            (void)s.ops->progress(s.backend);
            (void)side_poll(a);
        }
        assert_int_equal(a->n_down, 1);
        assert_int_equal(a->n_up, 0);
        assert_int_equal(a->n_messages, 0);
        assert_true(s.n_heard > 0);
        if (kind == STRANGER_TALKS) {
            assert_true(refused() >= before + 2); /* the list under a key, and the message */
            assert_int_equal(a->down_status, CM_E_UNREACHABLE);
            assert_true(log_has("no key in common"));
        } else {
            assert_int_equal(a->down_status, CM_E_REFUSED);
        }
        s.ops->close(s.backend);
        pair_close(&t);
    }
}

static void test_one_keyed(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend), open = options;
    open.keyed = false;
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1);
    side_listen(&t, a);
    side *b = side_open(&t, &open, 7, 2);
    side_connect(&t, b);
    WAIT(&t, a->n_down == 1 && b->n_down == 1);
    assert_int_equal(a->n_up + b->n_up, 0);
    assert_int_equal(b->down_status, CM_E_REFUSED);
    assert_true(log_has("one side checks messages by keys and the other does not"));
    pair_close(&t);
}

/* ---- keys that come and go ---- */

/* Without the key that sides begin with. */
static side *side_bare(net_test *t, const net_options *options, uint32_t role)
{
    side *s = &t->sides[t->n_sides];
    cm_error err = {0};
    *s = (side){0};
    assert_int_equal(net_open(options, &s->n, &err), CM_OK);
    net_set_identity(s->n, &(net_identity){.cluster = 7, .role = role, .member = role + 100});
    t->n_sides++;
    return s;
}

static void settle(net_test *t)
{
    uint64_t until_ms = cm_now_ms() + WAIT_MS;
    bool armed = false;
    while (!armed && cm_now_ms() < until_ms) {
        armed = side_poll(&t->sides[0]) == 0 && side_poll(&t->sides[1]) == 0 && net_arm(t->sides[0].n) &&
                net_arm(t->sides[1].n);
    }
}

/* Whoever hears of the key first, and whatever else they have: up once there is one in common, and not
 * before. */
static void test_pending(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.silence_ms = 600000;
    options.heartbeat_ms = 100000;
    static const struct {
        uint8_t have[2], give[2]; /* a's and b's, 0: none; give[0] first */
        bool b_first;
    } cases[] = {{{0, 0}, {1, 1}, false}, {{0, 0}, {1, 1}, true},  {{1, 0}, {0, 1}, true},
                 {{0, 1}, {1, 0}, false}, {{1, 2}, {2, 0}, false}, {{1, 2}, {0, 1}, true},
                 {{1, 2}, {3, 3}, false}, {{1, 2}, {3, 3}, true}};
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        net_test t = {.backend = backend};
        side *sides[] = {side_bare(&t, &options, 1), side_bare(&t, &options, 2)};
        for (uint32_t k = 0; k < 2; k++) {
            if (cases[i].have[k] != 0) {
                side_give_key(sides[k], cases[i].have[k]);
            }
        }
        side_listen(&t, sides[0]);
        side_connect(&t, sides[1]);
        settle(&t);
        for (uint32_t k = 0; k < 2; k++) {
            uint32_t who = cases[i].b_first ? 1 - k : k;
            assert_int_equal(sides[0]->n_up + sides[1]->n_up, 0);
            if (cases[i].give[who] != 0) {
                side_give_key(sides[who], cases[i].give[who]);
                if (k == 0 && cases[i].give[1 - who] != 0) {
                    settle(&t);
                }
            }
        }
        WAIT(&t, sides[0]->n_up == 1 && sides[1]->n_up == 1);
        assert_int_equal(send_piece(sides[0], 0, 0, 100, 1, DEADLINE_MS), CM_OK);
        assert_int_equal(send_piece(sides[1], 0, 0, 100, 1, DEADLINE_MS), CM_OK);
        WAIT(&t, sides[0]->n_messages == 1 && sides[1]->n_messages == 1);
        pair_close(&t);
    }
}

/* Nobody comes with the key: the link does not hang for ever, and the next one may come up. */
static void test_pending_in_vain(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.heartbeat_ms = 50;
    options.silence_ms = SHORT_SILENCE_MS;
    net_test t = {.backend = backend};
    side *a = side_open(&t, &options, 7, 1); /* key 1 */
    side_listen(&t, a);
    side *b = side_bare(&t, &options, 2);
    side_give_key(b, 2);
    side_connect(&t, b);
    WAIT(&t, a->n_down == 1 && b->n_down == 1);
    assert_int_equal(a->n_up + b->n_up, 0);
    assert_int_equal(b->down_status, CM_E_UNREACHABLE);
    side_give_key(b, 1);
    side_connect(&t, b);
    WAIT(&t, a->n_up == 1 && b->n_up == 1);
    pair_close(&t);
}

/* Generation after generation under traffic, heard of by the two at different times: nothing is lost, nothing
 * is refused. */
static void test_rolling(void **state)
{
    const backend_case *backend = *state;
    enum { GENERATIONS = 30, PER_GENERATION = 40 };
    uint64_t seed = cm_random_u64();
    print_message("seed %llu\n", (unsigned long long)seed);
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    sides_between(&t, &options);
    int64_t before = refused();
    uint32_t n_next[2] = {0, 0};
    for (uint8_t generation = 2; generation <= GENERATIONS; generation++) {
        bool a_first = cm_rng_at(seed, generation, 0).word[0] % 2 == 0;
        uint32_t until = n_next[0] + PER_GENERATION;
        for (uint32_t k = 0; t.sides[0].n_messages < until || t.sides[1].n_messages < until; k++) {
            if (k == 1 || k == 3) {
                side *s = &t.sides[(k == 1) == a_first ? 0 : 1];
                side_give_key(s, generation);
                net_key_retire(s->n, generation - 1u);
            }
            for (uint32_t i = 0; i < 2; i++) {
                while (n_next[i] < until && send_piece(&t.sides[i], n_next[i], n_next[i],
                                                       1 + n_next[i] % 7 * 12000, 2, DEADLINE_MS) == CM_OK) {
                    n_next[i]++;
                }
            }
            turn(&t);
            assert_int_equal(t.sides[0].n_down + t.sides[1].n_down, 0);
        }
    }
    assert_int_equal(refused(), before);
    assert_int_equal(t.sides[0].n_checked, t.sides[1].n_checked);
    pair_close(&t);
}

/* Once a key has ended, what was made under it is worth nothing, also to those who took it down in time. */
static void test_ended_key(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.heartbeat_ms = 50;
    options.silence_ms = SHORT_SILENCE_MS;
    net_test t = {.backend = backend};
    sides_between(&t, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    m.type = 1;
    m.hold = true;
    assert_int_equal(send_piece(b, 0, 0, 100, 1, DEADLINE_MS), CM_OK); /* under key 1 */
    side_give_key(a, 2);
    side_give_key(b, 2);
    settle(&t);
    static caught under_one;
    under_one = copy_of(&m.last);
    point(&under_one);
    net_key_retire(a->n, 2);
    uint32_t ids[NET_KEYS_MAX] = {0};
    WAIT(&t, (net_key_ids(a->n, ids), ids[1] == 0));
    assert_refused(&t, under_one.link, &under_one.message);
    assert_true(log_has("it is under a key that is not ours"));
    m.upcalls->sent(m.ctx, NULL, m.last.cookie, CM_E_RESET);
    m.type = 0;
    pair_close(&t);
}

/* A peer that misses the next key goes when the one it has ends: a member that was put out. */
static void test_put_out(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    options.heartbeat_ms = 50;
    options.silence_ms = SHORT_SILENCE_MS;
    net_test t = {.backend = backend};
    sides_between(&t, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    side_give_key(a, 2);
    WAIT(&t, a->n_messages == 0 && side_poll(a) == 0);
    assert_int_equal(send_piece(b, 0, 0, 100, 1, DEADLINE_MS), CM_OK); /* until then it is heard */
    WAIT(&t, a->n_messages == 1);
    net_key_retire(a->n, 2);
    WAIT(&t, a->n_down == 1 && b->n_down == 1);
    assert_int_equal(a->down_status, CM_E_STALE);
    assert_true(log_has("has none of our keys"));
    pair_close(&t);
}

/* Another cluster counts its generations from the start. */
static void test_other_cluster(void **state)
{
    const backend_case *backend = *state;
    uint8_t key[NET_KEY_BYTES] = {9};
    net_options options = small_options(backend);
    net_test t = {.backend = backend};
    sides_between(&t, &options);
    side *a = &t.sides[0], *b = &t.sides[1];
    for (uint32_t i = 0; i < 2; i++) {
        side_give_key(&t.sides[i], 200);
        net_key_retire(t.sides[i].n, 200);
        net_key_add(t.sides[i].n, 8, 1, key);
        net_set_identity(t.sides[i].n, &(net_identity){.cluster = 8, .role = i});
    }
    side_connect(&t, b);
    WAIT(&t, a->n_up == 2 && b->n_up == 2);
    assert_int_equal(send_piece(b, 0, 0, 100, 1, DEADLINE_MS), CM_OK);
    WAIT(&t, a->n_messages == 1);
    pair_close(&t);
}

/* ---- what it costs ---- */

static uint64_t g_n_alloc;

static void *counted_alloc(size_t n, const char *file, int line)
{
    (void)file;
    (void)line;
    __atomic_fetch_add(&g_n_alloc, 1, __ATOMIC_RELAXED);
    return malloc(n);
}

static void *counted_realloc(void *p, size_t n, const char *file, int line)
{
    (void)file;
    (void)line;
    __atomic_fetch_add(&g_n_alloc, 1, __ATOMIC_RELAXED);
    return realloc(p, n);
}

static void counted_free(void *p, const char *file, int line)
{
    (void)file;
    (void)line;
    free(p);
}

static void test_no_allocation(void **state)
{
    const backend_case *backend = *state;
    net_options options = small_options(backend);
    net_test t = pair_open(backend, &options, &options);
    assert_true(g_n_alloc > 0); /* the greeting derives keys */
    uint64_t before = g_n_alloc;
    for (uint32_t i = 0; i < 100; i++) {
        assert_int_equal(send_piece(&t.sides[1], i, i, 7392, 2, DEADLINE_MS), CM_OK);
        WAIT(&t, t.sides[0].n_messages == i + 1 && t.sides[1].n_sent == i + 1);
    }
    assert_int_equal(g_n_alloc, before);
    pair_close(&t);
}

#define TAGGED(test_) ONE(ucx_keyed, test_), ONE(local_keyed, test_)
/* shm: its messages have tags until a key was shown */
#define KEYED(test_) TAGGED(test_), ONE(shm_keyed, test_)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TAGGED(test_flipped),        TAGGED(test_cut),          TAGGED(test_replayed),
        TAGGED(test_redirected),     KEYED(test_forged_notes),  KEYED(test_lost),
        KEYED(test_stranger),        KEYED(test_one_keyed),     KEYED(test_pending),
        KEYED(test_pending_in_vain), KEYED(test_rolling),       TAGGED(test_ended_key),
        KEYED(test_put_out),         KEYED(test_other_cluster), KEYED(test_no_allocation),
    };
    if (CRYPTO_set_mem_functions(counted_alloc, counted_realloc, counted_free) != 1) {
        return 1;
    }
    sides_init();
    int n_failed = cmocka_run_group_tests(tests, NULL, NULL);
    sides_fini();
    return n_failed;
}
