#include "common/net/net.h"

#include <sched.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/stats.h"
#include "common/net/net_private.h"

/* A poll ends after so many turns even if the back-end has more: the caller's other work comes around. */
enum { NET_POLL_TURNS = 256 };
/* net_poll_awake: about what it costs to sleep and be woken, and how rare looks in vain become: one of 64
 * calls. */
enum { NET_AWAKE_US = 50, NET_VAIN_MAX = 6, NET_LOOKS_ALONE = 64 };
/* The layer's own messages of one link: hello, heartbeat, refusal, goodbye, lists of keys. */
enum { NET_NOTES_PER_PEER = 4 + NET_KEYS_NOTES_MAX };

void net_options_defaults(net_options *options)
{
    *options = (net_options){
        .backend = "ucx",
        .peers_max = 64,
        .sends_max = 32,
        .receives_max = 256,
        .message_bytes_max = 32u << 20,
        .heartbeat_ms = 1000,
        .silence_ms = 3000,
    };
}

/* ---- events ----
 * A ring between what upcalls report and what net_poll hands out. Its size is the sum of what pools and
 * receives_max allow, so a full ring is our bug. */

void net_event_push(net *n, const net_event *event, net_sending *sending)
{
    CM_ASSERT_MSG(n->n_events < n->events_cap, "event ring of %u full", n->events_cap);
    n->events[(n->i_event + n->n_events) % n->events_cap] = (net_queued){*event, sending};
    n->n_events++;
}

/* Takes the oldest event and does what belongs to handing it out. */
static void net_event_pop(net *n, net_event *event_out)
{
    net_queued *queued = &n->events[n->i_event];
    n->i_event = (n->i_event + 1) % n->events_cap;
    n->n_events--;
    *event_out = queued->event;

    net_peer *peer = queued->event.peer;
    if (queued->sending != NULL) {
        if (peer != NULL) {
            peer->n_slots--;
        }
        n->n_in_flight--;
        cm_pool_put(&n->sends, queued->sending);
    }
    if (queued->event.kind == NET_EV_DOWN) {
        net_peer_destroy(peer);
    }
}

/* What is queued for a peer that is being disconnected: messages are given back, its sends are told without
 * it. */
static void net_events_forget(net *n, const net_peer *peer)
{
    uint32_t n_events = n->n_events;
    n->n_events = 0;
    for (uint32_t i = 0; i < n_events; i++) {
        net_queued queued = n->events[(n->i_event + i) % n->events_cap];
        if (queued.event.peer == peer) {
            if (queued.event.kind == NET_EV_MESSAGE) {
                net_release(n, &queued.event);
            }
            if (queued.event.kind != NET_EV_SENT) {
                continue;
            }
            queued.event.peer = NULL;
        }
        net_event_push(n, &queued.event, queued.sending); /* never beyond i: the ring is compacted in place */
    }
}

/* ---- upcalls of the back-end ---- */

static void *net_on_accepted(void *ctx, net_backend_link *link, const char *address)
{
    net *n = ctx;
    net_peer *peer = net_peer_create(n, link, address);
    if (peer == NULL) {
        cm_warn("link from %s refused: %u of %u links are taken", address, n->n_live, n->options.peers_max);
    }
    return peer;
}

static void net_drop(net *n, const net_event *message)
{
    if (message->type < NET_TYPE_INTERNAL) {
        n->ops->release(n->backend, message->receive);
    }
}

/* Without keys the link is one that the back-end vouches for: what is wrong came from the peer. */
static void net_reject(net_peer *peer, uint16_t type, const char *why)
{
    if (peer->net->options.keyed) {
        net_refuse(peer, type, why);
        return;
    }
    cm_warn("peer %s broke the protocol: message of type %u: %s", peer->address, type, why);
    net_peer_end(peer, CM_E_PROTOCOL, false);
}

/* A user's message that is the peer's: in order, or the link is broken. */
static void net_take(net_peer *peer, const net_event *message, const net_prefix *prefix)
{
    net *n = peer->net;
    if (peer->state != NET_PEER_UP || prefix->seq != peer->n_taken + 1) {
        cm_warn("peer %s broke the protocol: message %llu of type %u came %s, %llu was expected",
                peer->address, (unsigned long long)prefix->seq, message->type,
                peer->state == NET_PEER_UP ? "out of order" : "before the greeting",
                (unsigned long long)peer->n_taken + 1);
        net_drop(n, message);
        net_peer_end(peer, CM_E_PROTOCOL, false);
        return;
    }
    net_peer_taken(peer);
    net_event event = *message;
    event.kind = NET_EV_MESSAGE;
    event.status = CM_OK;
    event.peer = peer;
    event.header = (const uint8_t *)message->header + sizeof(*prefix);
    event.header_bytes = message->header_bytes - (uint32_t)sizeof(*prefix);
    event.cookie = NULL;
    n->n_in_flight++;
    net_event_push(n, &event, NULL);
}

static void net_on_received(void *ctx, void *peer_arg, const net_event *message)
{
    net *n = ctx;
    net_peer *peer = peer_arg;
    cm_stat_add(CM_STAT_net_received_bytes, (int64_t)(message->header_bytes + message->payload_bytes));
    CM_ASSERT(peer->state < NET_PEER_ENDING); /* the back-end was told or told us itself */
    if (message->type == NET_TYPE_HELLO || message->type == NET_TYPE_REFUSAL) {
        net_peer_heard_greeting(peer, message);
        return;
    }
    if (peer->state == NET_PEER_REFUSING) {
        net_drop(n, message); /* sent before our refusal got there */
        return;
    }
    net_prefix prefix = {0};
    const char *why_not = net_unseal(peer, message, &prefix);
    if (why_not != NULL && message->type == NET_TYPE_KEYS &&
        net_peer_heard_unproven(peer, message, &prefix)) {
        return;
    }
    if (why_not != NULL) {
        net_drop(n, message);
        net_reject(peer, message->type, why_not);
        return;
    }
    peer->heard_ms = n->now_ms;
    if (message->type >= NET_TYPE_INTERNAL) {
        net_peer_heard(peer, message, &prefix);
    } else {
        net_take(peer, message, &prefix);
    }
}

static void net_on_sent(void *ctx, void *peer_arg, void *send_cookie, cm_status status)
{
    (void)peer_arg; /* may have been disconnected meanwhile: the sending knows */
    net_sending_done(ctx, send_cookie, status);
}

static void net_on_down(void *ctx, void *peer_arg, cm_status status)
{
    (void)ctx;
    net_peer *peer = peer_arg;
    peer->link = NULL;
    bool orderly = status == CM_OK;
    if (!orderly && peer->state < NET_PEER_ENDING) {
        cm_warn("link to %s lost: %s", peer->address, cm_status_text(status));
    }
    net_peer_end(peer, orderly ? CM_E_RESET : status, orderly);
}

static const net_upcalls g_upcalls = {
    .accepted = net_on_accepted,
    .received = net_on_received,
    .sent = net_on_sent,
    .down = net_on_down,
};

/* ---- open and close ---- */

static cm_status net_options_check(const net_options *options, cm_error *err)
{
    if (options->peers_max == 0 || options->sends_max == 0 || options->receives_max == 0 ||
        options->message_bytes_max == 0 || options->heartbeat_ms == 0) {
        return cm_error_set(err, CM_E_CONFIG, "net", "an option of the transport that must be positive is 0");
    }
    if (options->silence_ms <= options->heartbeat_ms) {
        return cm_error_set(err, CM_E_CONFIG, "silence_ms",
                            "silence of %u ms is not above the heartbeat of %u ms", options->silence_ms,
                            options->heartbeat_ms);
    }
    return CM_OK;
}

cm_status net_open(const net_options *options, net **net_out, cm_error *err)
{
    const net_ops *ops;
    CM_TRY(net_ops_find(options->backend, &ops, err));
    return net_open_ops(ops, options, net_out, err);
}

cm_status net_open_ops(const net_ops *ops, const net_options *options, net **net_out, cm_error *err)
{
    CM_ASSERT_MSG(ops->version == NET_PROTOCOL, "table %s has version %u", ops->name, ops->version);
    CM_TRY(net_options_check(options, err));

    /* peers that are told or disconnected keep their memory until the next poll: twice as many as links */
    uint32_t n_peers = options->peers_max * 2;
    uint32_t n_sends = options->peers_max * options->sends_max;
    net *n = cm_alloc(sizeof(*n));
    *n = (net){.options = *options, .ops = ops, .timer_ms = UINT64_MAX, .now_ms = cm_now_ms()};
    TAILQ_INIT(&n->live);
    TAILQ_INIT(&n->dead);
    TAILQ_INIT(&n->due);
    cm_pool_init(&n->peers, "net peers", sizeof(net_peer), n_peers);
    cm_pool_init(&n->sends, "net sends", sizeof(net_sending), n_sends);
    cm_pool_init(&n->notes, "net notes", sizeof(net_sending), n_peers * NET_NOTES_PER_PEER);
    n->events_cap = n_sends + options->receives_max + 2 * n_peers;
    n->events = cm_alloc(sizeof(net_queued) * n->events_cap);
    net_keys_init(n);

    cm_status status = ops->open(&n->options, &g_upcalls, n, &n->backend, err);
    if (status != CM_OK) {
        goto err_free;
    }
    *net_out = n;
    return CM_OK;

err_free:
    net_keys_fini(n);
    cm_free(n->events);
    cm_pool_fini(&n->notes);
    cm_pool_fini(&n->sends);
    cm_pool_fini(&n->peers);
    cm_free(n);
    return status;
}

/* Sendings nobody will be told about any more. */
static void net_pool_clear(cm_pool *pool)
{
    for (uint32_t i = 0; i < pool->n_max; i++) {
        void *object = cm_pool_at(pool, i);
        if (object != NULL) {
            cm_pool_put(pool, object);
        }
    }
    cm_pool_fini(pool);
}

void net_close(net *n)
{
    net_event event;
    while (n->n_events > 0) {
        net_event_pop(n, &event);
        if (event.kind == NET_EV_MESSAGE) {
            net_release(n, &event);
        }
    }
    while (!TAILQ_EMPTY(&n->live)) {
        net_disconnect(TAILQ_FIRST(&n->live));
    }
    n->ops->close(n->backend);
    net_keys_fini(n);
    cm_free(n->events);
    net_pool_clear(&n->notes);
    net_pool_clear(&n->sends);
    net_pool_clear(&n->peers);
    cm_free(n);
}

void net_set_identity(net *n, const net_identity *identity)
{
    n->identity = *identity;
}

const char *net_backend(const net *n)
{
    return n->ops->name;
}

/* ---- links ---- */

cm_status net_listen(net *n, const char *address, char bound_out[NET_ADDRESS_BYTES], cm_error *err)
{
    return n->ops->listen(n->backend, address, bound_out, err);
}

cm_status net_connect(net *n, const char *address, net_peer **peer_out, cm_error *err)
{
    n->now_ms = cm_now_ms();
    net_peer *peer = net_peer_create(n, NULL, address);
    if (peer == NULL) {
        return cm_error_set(err, CM_E_CAPACITY, "address", "no link to '%s': %u of %u are taken", address,
                            n->n_live, n->options.peers_max);
    }
    cm_status status = n->ops->connect(n->backend, address, peer, &peer->link, err);
    if (status != CM_OK) {
        net_peer_destroy(peer);
        return status;
    }
    *peer_out = peer;
    return CM_OK;
}

void net_disconnect(net_peer *peer)
{
    net *n = peer->net;
    if (peer->state == NET_PEER_DEAD) {
        return; /* told NET_EV_DOWN in the batch being handled */
    }
    net_peer_goodbye(peer);
    if (peer->state != NET_PEER_DOWN) {
        net_peer_end(peer, CM_E_CANCELLED, true);
    }
    net_events_forget(n, peer);
    net_sending *sending;
    TAILQ_FOREACH (sending, &peer->sends, entry) {
        sending->peer = NULL; /* still with the back-end; told as cancelled when it lets go */
    }
    TAILQ_INIT(&peer->sends);
    net_peer_destroy(peer);
}

void net_peer_set_user(net_peer *peer, void *user)
{
    peer->user = user;
}

void *net_peer_user(const net_peer *peer)
{
    return peer->user;
}

const net_identity *net_peer_identity(const net_peer *peer)
{
    return &peer->identity;
}

const char *net_peer_address(const net_peer *peer)
{
    return peer->address;
}

/* ---- messages ---- */

static uint64_t net_message_bytes(const net_message *message)
{
    uint64_t n_bytes = 0;
    for (uint32_t i = 0; i < message->n_iov; i++) {
        n_bytes += message->iov[i].n_bytes;
    }
    return n_bytes;
}

cm_status net_send(net_peer *peer, const net_message *message)
{
    net *n = peer->net;
    uint64_t payload_bytes = net_message_bytes(message);
    CM_ASSERT_MSG(message->type < NET_TYPE_INTERNAL && message->header_bytes <= NET_HEADER_MAX &&
                      message->n_iov <= NET_IOV_MAX && message->deadline_ms > 0,
                  "type %u header %u bytes, %u iov, deadline %u ms", message->type, message->header_bytes,
                  message->n_iov, message->deadline_ms);
    CM_ASSERT_MSG(payload_bytes <= n->options.message_bytes_max, "message of %llu bytes, %llu are allowed",
                  (unsigned long long)payload_bytes, (unsigned long long)n->options.message_bytes_max);
    if (peer->state >= NET_PEER_ENDING) {
        return CM_E_RESET;
    }
    CM_ASSERT_MSG(peer->state == NET_PEER_UP, "send to %s before it is up", peer->address);

    net_sending *sending;
    if (peer->n_slots == peer->window || cm_pool_get(&n->sends, (void **)&sending) != CM_OK) {
        return CM_AGAIN;
    }
    uint64_t now_ms = cm_now_ms();
    *sending = (net_sending){.peer = peer,
                             .cookie = message->cookie,
                             .deadline_ms = now_ms + message->deadline_ms,
                             .seq = peer->n_sent + 1,
                             .type = message->type};
    struct {
        net_prefix prefix;
        uint8_t user[NET_HEADER_MAX];
    } header;
    header.prefix = (net_prefix){.seq = sending->seq};
    net_seal(peer, message, payload_bytes, &header.prefix);
    if (message->header_bytes > 0) {
        memcpy(header.user, message->header, message->header_bytes);
    }
    net_message wire = *message;
    wire.header = &header;
    wire.header_bytes = (uint32_t)sizeof(net_prefix) + message->header_bytes;

    cm_status status = n->ops->send(n->backend, peer->link, &wire, sending);
    if (status != CM_OK) {
        cm_pool_put(&n->sends, sending);
        return status;
    }
    TAILQ_INSERT_TAIL(&peer->sends, sending, entry);
    peer->n_sent++;
    peer->n_slots++;
    n->n_in_flight++;
    net_timer_at(n, sending->deadline_ms);
    cm_stat_add(CM_STAT_net_sent_bytes, (int64_t)(wire.header_bytes + payload_bytes));
    return CM_OK;
}

void *net_room(net_peer *peer, uint64_t n_bytes)
{
    net *n = peer->net;
    CM_ASSERT(n_bytes <= n->options.message_bytes_max);
    if (peer->state != NET_PEER_UP || peer->n_slots == peer->window || n->sends.n_used == n->sends.n_max) {
        return NULL;
    }
    return n->ops->room != NULL ? n->ops->room(n->backend, peer->link, n_bytes) : NULL;
}

void net_release(net *n, const net_event *event)
{
    CM_ASSERT(event->kind == NET_EV_MESSAGE && n->n_in_flight > 0);
    n->n_in_flight--;
    n->ops->release(n->backend, event->receive);
}

/* ---- progress ---- */

void net_timer_at(net *n, uint64_t at_ms)
{
    n->timer_ms = at_ms < n->timer_ms ? at_ms : n->timer_ms;
}

/* Memory of peers told or disconnected before this poll. */
static void net_reap(net *n)
{
    while (!TAILQ_EMPTY(&n->dead)) {
        net_peer *peer = TAILQ_FIRST(&n->dead);
        TAILQ_REMOVE(&n->dead, peer, entry);
        cm_pool_put(&n->peers, peer);
    }
}

static void net_speak(net *n)
{
    net_peer *peer = TAILQ_FIRST(&n->due);
    while (peer != NULL) {
        net_peer *next = TAILQ_NEXT(peer, due_entry);
        if (net_peer_speak(peer)) {
            TAILQ_REMOVE(&n->due, peer, due_entry);
            peer->in_due = false;
        }
        peer = next;
    }
}

static void net_tick(net *n)
{
    n->timer_ms = UINT64_MAX;
    net_timer_at(n, n->keys.expire_ms);
    net_peer *peer;
    TAILQ_FOREACH (peer, &n->live, entry) {
        net_peer_tick(peer);
    }
}

uint32_t net_poll(net *n, net_event *events_out, uint32_t events_max)
{
    n->now_ms = cm_now_ms();
    net_reap(n);
    if (atomic_load(&n->keys.news) || n->now_ms >= n->keys.expire_ms) {
        net_keys_step(n);
    }
    bool more = true;
    for (uint32_t turn = 0; turn < NET_POLL_TURNS && more && n->n_events < events_max; turn++) {
        more = n->ops->progress(n->backend);
    }
    net_speak(n);
    /* nobody is called silent while what they said may still be unread */
    if (!more && n->now_ms >= n->timer_ms) {
        net_tick(n);
        net_speak(n);
    }
    uint32_t n_out = 0;
    while (n_out < events_max && n->n_events > 0) {
        net_event_pop(n, &events_out[n_out++]);
    }
    return n_out;
}

/* A look in vain is repeated after 1, 3, 7 ... calls only. After the first ones the core is offered to others
 * between looks, who may be whom we wait for: where there are more processes than cores, looking would else
 * keep the answer from being made. */
uint32_t net_poll_awake(net *n, net_event *events_out, uint32_t events_max, uint64_t at_most_us)
{
    uint32_t n_out = net_poll(n, events_out, events_max);
    if (n_out > 0 || at_most_us == 0) {
        return n_out;
    }
    if (n->n_rest > 0) {
        n->n_rest--;
        return 0;
    }
    uint64_t until_ns = cm_now_ns() + 1000 * (at_most_us < NET_AWAKE_US ? at_most_us : NET_AWAKE_US);
    for (uint32_t look = 0; n_out == 0 && cm_now_ns() < until_ns; look++) {
        if (look >= NET_LOOKS_ALONE) {
            sched_yield();
        }
        n_out = net_poll(n, events_out, events_max);
    }
    n->n_vain = n_out > 0 ? 0 : n->n_vain < NET_VAIN_MAX ? n->n_vain + 1 : NET_VAIN_MAX;
    n->n_rest = (1u << n->n_vain) - 1;
    return n_out;
}

int net_fd(const net *n)
{
    return n->ops->fd(n->backend);
}

bool net_arm(net *n)
{
    return n->n_events == 0 && !atomic_load(&n->keys.news) && cm_now_ms() < n->timer_ms &&
           n->ops->arm(n->backend);
}

uint32_t net_next_timer_ms(const net *n)
{
    if (n->timer_ms == UINT64_MAX) {
        return UINT32_MAX;
    }
    uint64_t now_ms = cm_now_ms();
    uint64_t wait_ms = n->timer_ms > now_ms ? n->timer_ms - now_ms : 0;
    return wait_ms < UINT32_MAX ? (uint32_t)wait_ms : UINT32_MAX - 1;
}

uint32_t net_in_flight(const net *n)
{
    return n->n_in_flight;
}
