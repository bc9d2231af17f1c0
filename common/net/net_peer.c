#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/log.h"
#include "common/base/rng.h"
#include "common/base/stats.h"
#include "common/net/net_private.h"

/* ---- life ---- */

static void peer_due(net_peer *peer)
{
    if (!peer->in_due) {
        peer->in_due = true;
        TAILQ_INSERT_TAIL(&peer->net->due, peer, due_entry);
    }
}

net_peer *net_peer_create(net *n, net_backend_link *link, const char *address)
{
    net_peer *peer;
    if (n->n_live == n->options.peers_max || cm_pool_get(&n->peers, (void **)&peer) != CM_OK) {
        return NULL;
    }
    peer->net = n;
    peer->link = link;
    peer->heard_ms = peer->beat_ms = n->now_ms;
    peer->hello_due = true;
    if (n->options.keyed) {
        cm_random_bytes(peer->nonce, sizeof(peer->nonce));
    }
    snprintf(peer->address, sizeof(peer->address), "%s", address);
    TAILQ_INIT(&peer->sends);
    TAILQ_INIT(&peer->notes);
    TAILQ_INSERT_TAIL(&n->live, peer, entry);
    n->n_live++;
    /* the hello waits for the next poll: an accepted link can send only after the upcall that made this peer
     */
    peer_due(peer);
    net_timer_at(n, n->now_ms);
    return peer;
}

void net_peer_destroy(net_peer *peer)
{
    net *n = peer->net;
    CM_ASSERT(TAILQ_EMPTY(&peer->sends));
    net_sending *note;
    TAILQ_FOREACH (note, &peer->notes, entry) {
        note->peer = NULL;
    }
    if (peer->in_due) {
        TAILQ_REMOVE(&n->due, peer, due_entry);
    }
    net_link_keys_free(peer);
    peer->state = NET_PEER_DEAD;
    TAILQ_REMOVE(&n->live, peer, entry);
    TAILQ_INSERT_TAIL(&n->dead, peer, entry);
    n->n_live--;
    if (n->n_live == 0) {
        n->timer_ms = UINT64_MAX;
    }
}

static void peer_down_if_done(net_peer *peer)
{
    if (peer->state == NET_PEER_ENDING && TAILQ_EMPTY(&peer->sends)) {
        peer->state = NET_PEER_DOWN;
        net_event event = {.kind = NET_EV_DOWN, .status = peer->end_status, .peer = peer};
        net_event_push(peer->net, &event, NULL);
    }
}

void net_peer_end(net_peer *peer, cm_status status, bool orderly)
{
    net *n = peer->net;
    if (peer->state < NET_PEER_ENDING) {
        if (peer->state == NET_PEER_REFUSING) {
            status = CM_E_REFUSED; /* however the link ended, that is why */
        } else if (peer->state == NET_PEER_GREETING && (status == CM_E_RESET || status == CM_E_SILENT)) {
            status = CM_E_UNREACHABLE;
        }
        peer->state = NET_PEER_ENDING;
        peer->end_status = status;
        if (peer->was_up) {
            cm_stat_add(CM_STAT_net_peers, -1);
            cm_stat_add(CM_STAT_net_peers_lost, orderly ? 0 : 1);
        }
    }
    if (peer->link != NULL) {
        net_backend_link *link = peer->link;
        peer->link = NULL;
        n->ops->disconnect(n->backend, link);
    }
    /* what the back-end let go of but the peer did not take */
    net_sending *sending = TAILQ_FIRST(&peer->sends);
    while (sending != NULL) {
        net_sending *next = TAILQ_NEXT(sending, entry);
        if (sending->completed) {
            net_sending_tell(sending, peer->end_status);
        }
        sending = next;
    }
    peer_down_if_done(peer);
}

/* ---- the layer's own messages ---- */

static bool peer_send_note(net_peer *peer, const net_message *message)
{
    net *n = peer->net;
    net_sending *note;
    if (peer->link == NULL || cm_pool_get(&n->notes, (void **)&note) != CM_OK) {
        return false;
    }
    *note = (net_sending){.peer = peer, .type = message->type};
    if (n->ops->send(n->backend, peer->link, message, note) != CM_OK) {
        cm_pool_put(&n->notes, note); /* a broken link reports itself in the next progress */
        return false;
    }
    TAILQ_INSERT_TAIL(&peer->notes, note, entry);
    return true;
}

/* Hello and refusal: before there are keys, and to be read by other versions. */
static bool peer_greet(net_peer *peer, uint16_t type, const void *header, uint32_t header_bytes)
{
    net_message message = {.type = type, .header = header, .header_bytes = header_bytes, .deadline_ms = 1};
    return peer_send_note(peer, &message);
}

static bool peer_note(net_peer *peer, uint16_t type, const void *header, uint32_t header_bytes)
{
    struct {
        net_prefix prefix;
        uint8_t body[NET_NOTE_BYTES_MAX];
    } wire = {.prefix = {.seq = peer->n_notes_sent + 1}};
    CM_ASSERT(header_bytes <= sizeof(wire.body));
    net_message message = {.type = type, .header = header, .header_bytes = header_bytes, .deadline_ms = 1};
    net_seal(peer, &message, 0, &wire.prefix);
    if (header_bytes > 0) {
        memcpy(wire.body, header, header_bytes);
    }
    message.header = &wire;
    message.header_bytes = (uint32_t)sizeof(wire.prefix) + header_bytes;
    if (!peer_send_note(peer, &message)) {
        return false;
    }
    peer->n_notes_sent++;
    return true;
}

static bool peer_speak_hello(net_peer *peer)
{
    const net *n = peer->net;
    peer->told = n->identity;
    net_hello hello = {
        .magic = NET_HELLO_MAGIC,
        .protocol = NET_PROTOCOL,
        .cluster = peer->told.cluster,
        .role = peer->told.role,
        .member = peer->told.member,
        .sends_max = n->options.sends_max,
        .keyed = n->options.keyed,
    };
    memcpy(hello.nonce, peer->nonce, sizeof(hello.nonce));
    net_key_ids(n, hello.key_ids);
    return peer_greet(peer, NET_TYPE_HELLO, &hello, sizeof(hello));
}

/* The list of our keys. Under a key it shows that we have it. */
static bool peer_speak_keys(net_peer *peer)
{
    net_keys_note note;
    bool sealed = net_peer_sender(peer) != NULL;
    net_key_ids(peer->net, note.ids);
    if (peer->n_keys_on_way == NET_KEYS_NOTES_MAX || !peer_note(peer, NET_TYPE_KEYS, &note, sizeof(note))) {
        return false;
    }
    peer->n_keys_on_way++;
    peer->proof_sent |= sealed;
    return true;
}

static bool peer_speak_heartbeat(net_peer *peer)
{
    net_heartbeat heartbeat = {.n_taken = peer->n_taken};
    if (peer->heartbeat_on_way || !peer_note(peer, NET_TYPE_HEARTBEAT, &heartbeat, sizeof(heartbeat))) {
        return false;
    }
    peer->heartbeat_on_way = true;
    peer->beat_ms = peer->net->now_ms;
    peer->n_taken_told = peer->n_taken;
    return true;
}

bool net_peer_speak(net_peer *peer)
{
    if (peer->link == NULL) {
        return true;
    }
    if (peer->hello_due) {
        peer->hello_due = !peer_speak_hello(peer);
    }
    if (!peer->hello_due && peer->keys_due) {
        peer->keys_due = !peer_speak_keys(peer);
    }
    if (!peer->hello_due && peer->tell_due && peer->state == NET_PEER_UP) {
        peer->tell_due = !peer_speak_heartbeat(peer);
    }
    return !peer->hello_due && !peer->keys_due && !peer->tell_due;
}

void net_peer_goodbye(net_peer *peer)
{
    if (peer->state == NET_PEER_UP) {
        (void)peer_note(peer, NET_TYPE_GOODBYE, NULL, 0); /* the end of the link says the same, less kindly */
    }
}

/* ---- greeting ---- */

static net_refuse_reason peer_judge_hello(const net_peer *peer, const net_hello *hello, uint32_t hello_bytes)
{
    if (hello_bytes < 8 || hello->magic != NET_HELLO_MAGIC) {
        return NET_REFUSE_GREETING;
    }
    if (hello->protocol != NET_PROTOCOL) {
        return NET_REFUSE_PROTOCOL;
    }
    if (hello_bytes != sizeof(*hello) || hello->sends_max == 0) {
        return NET_REFUSE_GREETING;
    }
    if (hello->cluster != peer->net->identity.cluster) {
        return NET_REFUSE_CLUSTER;
    }
    if (hello->keyed != (peer->net->options.keyed ? 1 : 0)) {
        return NET_REFUSE_KEYED;
    }
    /* our own words thrown back at us would be under our own keys */
    bool mirrored = hello->keyed && memcmp(hello->nonce, peer->nonce, sizeof(peer->nonce)) == 0;
    return mirrored ? NET_REFUSE_GREETING : 0;
}

static void peer_log_refused(const net_peer *peer, const char *who, uint32_t reason, uint32_t protocol,
                             uint64_t cluster)
{
    const net *n = peer->net;
    switch (reason) {
    case NET_REFUSE_PROTOCOL:
        cm_warn("link %s refused by %s: protocol %u there, %u here", peer->address, who, protocol,
                NET_PROTOCOL);
        break;
    case NET_REFUSE_CLUSTER:
        cm_warn("link %s refused by %s: cluster %016llx there, %016llx here", peer->address, who,
                (unsigned long long)cluster, (unsigned long long)n->identity.cluster);
        break;
    case NET_REFUSE_KEYED:
        cm_warn("link %s refused by %s: one side checks messages by keys and the other does not",
                peer->address, who);
        break;
    default:
        cm_warn("link %s refused by %s: greeting cannot be read, reason %u", peer->address, who, reason);
        break;
    }
}

static void peer_refuse_hello(net_peer *peer, net_refuse_reason reason, const net_hello *hello)
{
    net *n = peer->net;
    peer_log_refused(peer, "us", reason, hello->protocol, hello->cluster);
    (void)net_peer_speak(peer); /* a hello still due goes first: the other side then knows our numbers too */
    net_refusal refusal = {.reason = reason, .protocol = NET_PROTOCOL, .cluster = n->identity.cluster};
    peer->state = NET_PEER_REFUSING;
    peer->refused_ms = n->now_ms;
    net_timer_at(n, n->now_ms + n->options.silence_ms);
    if (!peer_greet(peer, NET_TYPE_REFUSAL, &refusal, sizeof(refusal))) {
        net_peer_end(peer, CM_E_REFUSED, true);
    }
}

static void peer_up(net_peer *peer)
{
    net *n = peer->net;
    peer->state = NET_PEER_UP;
    peer->was_up = true;
    net_timer_at(n, n->now_ms + n->options.heartbeat_ms);
    cm_stat_add(CM_STAT_net_peers, 1);
    cm_debug("link %s up, role %u member %u", peer->address, peer->identity.role, peer->identity.member);
    net_event event = {.kind = NET_EV_UP, .peer = peer};
    net_event_push(n, &event, NULL);
}

/* The list goes out under a key as soon as there is one in common, and before the user's first message. */
static void peer_prove(net_peer *peer)
{
    if (net_peer_sender(peer) == NULL) {
        return; /* one of us has not heard of the other's keys yet */
    }
    peer->keys_due |= !peer->proof_sent;
    (void)net_peer_speak(peer);
    if (!peer->proof_sent) {
        net_peer_end(peer, CM_E_RESET, false);
    } else if (peer->proven) {
        peer_up(peer);
    }
}

static void peer_heard_hello(net_peer *peer, const net_event *message)
{
    net *n = peer->net;
    net_hello hello = {0};
    uint32_t n_bytes =
        message->header_bytes < sizeof(hello) ? message->header_bytes : (uint32_t)sizeof(hello);
    memcpy(&hello, message->header, n_bytes);
    net_refuse_reason reason = peer_judge_hello(peer, &hello, message->header_bytes);
    if (reason != 0) {
        peer_refuse_hello(peer, reason, &hello);
        return;
    }
    (void)net_peer_speak(peer); /* our hello leaves before the user's first message */
    if (peer->hello_due) {
        net_peer_end(peer, CM_E_RESET, false);
        return;
    }
    peer->heard_ms = n->now_ms;
    peer->identity = (net_identity){.cluster = hello.cluster, .role = hello.role, .member = hello.member};
    peer->window = hello.sends_max < n->options.sends_max ? hello.sends_max : n->options.sends_max;
    peer->greeted = true;
    if (!n->options.keyed) {
        peer_up(peer);
        return;
    }
    memcpy(peer->their_nonce, hello.nonce, sizeof(peer->their_nonce));
    memcpy(peer->their_ids, hello.key_ids, sizeof(peer->their_ids));
    net_link_keys_follow(peer);
    peer_prove(peer);
}

static void peer_heard_refusal(net_peer *peer, const net_event *message)
{
    net_refusal refusal = {0};
    if (message->header_bytes == sizeof(refusal)) {
        memcpy(&refusal, message->header, sizeof(refusal));
    }
    peer_log_refused(peer, "the peer", refusal.reason, refusal.protocol, refusal.cluster);
    net_peer_end(peer, CM_E_REFUSED, true);
}

/* ---- lists of keys ---- */

/* Up and without a key in common: one of us missed what all others heard. */
static void peer_end_keyless(net_peer *peer)
{
    cm_warn("link %s ended: member %u has none of our keys", peer->address, peer->identity.member);
    net_peer_end(peer, CM_E_STALE, false);
}

static bool peer_take_ids(net_peer *peer, const void *note, uint32_t note_bytes)
{
    if (note_bytes != sizeof(peer->their_ids)) {
        return false;
    }
    memcpy(peer->their_ids, note, note_bytes);
    return true;
}

/* It can make us choose among keys we have, and no more: a forged one costs the link at most. */
bool net_peer_heard_unproven(net_peer *peer, const net_event *message, const net_prefix *prefix)
{
    if (prefix->key != 0 || peer->state != NET_PEER_GREETING || peer->proven || !peer->greeted ||
        message->header_bytes < sizeof(*prefix) ||
        !peer_take_ids(peer, (const uint8_t *)message->header + sizeof(*prefix),
                       message->header_bytes - (uint32_t)sizeof(*prefix))) {
        return false;
    }
    peer_prove(peer);
    return true;
}

static void peer_heard_keys(net_peer *peer, const net_event *note)
{
    if (!peer_take_ids(peer, note->header, note->header_bytes)) {
        cm_warn("peer %s broke the protocol: list of keys of %u bytes", peer->address, note->header_bytes);
        net_peer_end(peer, CM_E_PROTOCOL, false);
    } else if (peer->state == NET_PEER_GREETING) {
        peer->proven = true;
        peer_prove(peer);
    } else if (net_peer_sender(peer) == NULL) {
        peer_end_keyless(peer);
    }
}

void net_peer_keys_changed(net_peer *peer)
{
    if (peer->state > NET_PEER_UP) {
        return;
    }
    peer->keys_due = true;
    peer_due(peer);
    net_timer_at(peer->net, peer->net->now_ms);
    if (!peer->greeted) {
        return;
    }
    net_link_keys_follow(peer);
    if (peer->state == NET_PEER_GREETING) {
        peer_prove(peer);
    } else if (net_peer_sender(peer) == NULL) {
        peer_end_keyless(peer);
    }
}

/* ---- flow of user messages ----
 * A send is reported once the back-end let go of it and fewer than half a window of older ones wait to be
 * taken by the peer's layer, so a receiver that is slow to release meets at most one and a half windows. The
 * receiver tells its count every half window and with each heartbeat. */

void net_peer_taken(net_peer *peer)
{
    uint32_t tell_after = peer->window / 2 > 0 ? peer->window / 2 : 1;
    peer->n_taken++;
    if (peer->n_taken - peer->n_taken_told >= tell_after) {
        peer->tell_due = true;
        peer_due(peer);
    }
}

static bool peer_may_tell(const net_peer *peer, const net_sending *sending)
{
    return (int64_t)(sending->seq - peer->n_sent_taken) <= (int64_t)(peer->window / 2);
}

static void peer_heard_heartbeat(net_peer *peer, const net_event *message)
{
    net_heartbeat heartbeat;
    if (message->header_bytes != sizeof(heartbeat)) {
        cm_warn("peer %s broke the protocol: heartbeat of %u bytes", peer->address, message->header_bytes);
        net_peer_end(peer, CM_E_PROTOCOL, false);
        return;
    }
    memcpy(&heartbeat, message->header, sizeof(heartbeat));
    uint64_t n_new = heartbeat.n_taken - peer->n_sent_taken;
    if (n_new > peer->n_sent - peer->n_sent_taken) {
        cm_warn("peer %s broke the protocol: took %llu messages of %llu", peer->address,
                (unsigned long long)heartbeat.n_taken, (unsigned long long)peer->n_sent);
        net_peer_end(peer, CM_E_PROTOCOL, false);
        return;
    }
    peer->n_sent_taken = heartbeat.n_taken;
    net_sending *sending = TAILQ_FIRST(&peer->sends);
    while (sending != NULL && peer_may_tell(peer, sending)) {
        net_sending *next = TAILQ_NEXT(sending, entry);
        if (sending->completed) {
            net_sending_tell(sending, CM_OK);
        }
        sending = next;
    }
}

void net_sending_tell(net_sending *sending, cm_status status)
{
    net_peer *peer = sending->peer;
    TAILQ_REMOVE(&peer->sends, sending, entry);
    net_event event = {.kind = NET_EV_SENT, .status = status, .peer = peer, .cookie = sending->cookie};
    net_event_push(peer->net, &event, sending);
}

static void note_done(net_sending *note)
{
    net_peer *peer = note->peer;
    if (note->type == NET_TYPE_HEARTBEAT) {
        peer->heartbeat_on_way = false;
    } else if (note->type == NET_TYPE_KEYS) {
        peer->n_keys_on_way--;
    }
    TAILQ_REMOVE(&peer->notes, note, entry);
}

void net_sending_done(net *n, net_sending *sending, cm_status status)
{
    net_peer *peer = sending->peer;
    if (sending->type >= NET_TYPE_INTERNAL) {
        if (peer != NULL) {
            note_done(sending);
        }
        cm_pool_put(&n->notes, sending);
        return;
    }
    if (peer == NULL) {
        net_event event = {.kind = NET_EV_SENT, .status = CM_E_CANCELLED, .cookie = sending->cookie};
        net_event_push(n, &event, sending);
        return;
    }
    if (peer->state >= NET_PEER_ENDING) {
        net_sending_tell(sending, status == CM_OK ? CM_OK : peer->end_status);
        peer_down_if_done(peer);
        return;
    }
    sending->completed = true;
    if (status != CM_OK || peer_may_tell(peer, sending)) {
        net_sending_tell(sending, status); /* after a failure the back-end takes the link down */
    }
}

/* ---- the layer's own messages, received ---- */

static void peer_broke_protocol(net_peer *peer, uint16_t type)
{
    cm_warn("peer %s broke the protocol: type %04x in state %d", peer->address, type, (int)peer->state);
    net_peer_end(peer, CM_E_PROTOCOL, false);
}

void net_peer_heard_greeting(net_peer *peer, const net_event *message)
{
    if (peer->net->options.keyed && (peer->proven || (message->type == NET_TYPE_HELLO && peer->greeted))) {
        net_refuse(peer, message->type, "there was a greeting before"); /* nothing vouches for this one */
    } else if (message->type == NET_TYPE_REFUSAL) {
        peer_heard_refusal(peer, message);
    } else if (peer->state == NET_PEER_GREETING) {
        peer_heard_hello(peer, message);
    } else if (peer->state != NET_PEER_REFUSING) { /* then only the peer's own verdict matters */
        peer_broke_protocol(peer, message->type);
    }
}

void net_peer_heard(net_peer *peer, const net_event *message, const net_prefix *prefix)
{
    net_event note = *message;
    note.header = (const uint8_t *)message->header + sizeof(*prefix);
    note.header_bytes -= (uint32_t)sizeof(*prefix);
    peer->n_notes_taken = prefix->seq;
    if (message->type == NET_TYPE_KEYS && peer->net->options.keyed) {
        peer_heard_keys(peer, &note);
    } else if (message->type == NET_TYPE_HEARTBEAT && peer->state == NET_PEER_UP) {
        peer_heard_heartbeat(peer, &note);
    } else if (message->type == NET_TYPE_GOODBYE && peer->state == NET_PEER_UP) {
        cm_debug("link %s ended by the peer's goodbye", peer->address);
        net_peer_end(peer, CM_E_RESET, true);
    } else {
        peer_broke_protocol(peer, message->type);
    }
}

/* ---- time ---- */

/* true: a message was not away in time and the link is ending. */
static bool peer_deadline_passed(net_peer *peer)
{
    net *n = peer->net;
    const net_sending *sending;
    TAILQ_FOREACH (sending, &peer->sends, entry) {
        if (n->now_ms >= sending->deadline_ms) {
            cm_warn(
                "link %s given up: message %llu of type %u %s %llu ms past its deadline, %llu of %llu taken "
                "by the peer",
                peer->address, (unsigned long long)sending->seq, sending->type,
                sending->completed ? "not taken" : "not away",
                (unsigned long long)(n->now_ms - sending->deadline_ms),
                (unsigned long long)peer->n_sent_taken, (unsigned long long)peer->n_sent);
            net_peer_end(peer, CM_E_DEADLINE, false);
            return true;
        }
        net_timer_at(n, sending->deadline_ms);
    }
    return false;
}

void net_peer_tick(net_peer *peer)
{
    net *n = peer->net;
    const net_options *options = &n->options;
    if (peer->state >= NET_PEER_ENDING) {
        return;
    }
    if (peer->state == NET_PEER_REFUSING) {
        uint64_t until_ms = peer->refused_ms + options->silence_ms;
        if (n->now_ms >= until_ms) {
            net_peer_end(peer, CM_E_REFUSED, true);
        } else {
            net_timer_at(n, until_ms);
        }
        return;
    }
    if (n->now_ms >= peer->heard_ms + options->silence_ms) {
        cm_warn("link %s given up: nothing heard for %llu ms%s", peer->address,
                (unsigned long long)(n->now_ms - peer->heard_ms),
                peer->state != NET_PEER_GREETING ? ""
                : peer->greeted                  ? ", no key in common"
                                                 : ", no greeting");
        net_peer_end(peer, CM_E_SILENT, false);
        return;
    }
    net_timer_at(n, peer->heard_ms + options->silence_ms);
    if (peer->state != NET_PEER_UP || peer_deadline_passed(peer)) {
        return;
    }
    if (n->now_ms >= peer->beat_ms + options->heartbeat_ms) {
        (void)peer_speak_heartbeat(
            peer); /* not while one is stuck: silence or the deadline judges such a link */
        net_timer_at(n, n->now_ms + options->heartbeat_ms);
    } else {
        net_timer_at(n, peer->beat_ms + options->heartbeat_ms);
    }
}
