#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/log.h"
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

static bool peer_note(net_peer *peer, uint16_t type, const void *header, uint32_t header_bytes)
{
    net *n = peer->net;
    net_sending *note;
    if (peer->link == NULL || cm_pool_get(&n->notes, (void **)&note) != CM_OK) {
        return false;
    }
    *note = (net_sending){.peer = peer, .type = type};
    net_message message = {.type = type, .header = header, .header_bytes = header_bytes, .deadline_ms = 1};
    if (n->ops->send(n->backend, peer->link, &message, note) != CM_OK) {
        cm_pool_put(&n->notes, note); /* a broken link reports itself in the next progress */
        return false;
    }
    TAILQ_INSERT_TAIL(&peer->notes, note, entry);
    return true;
}

static bool peer_speak_hello(net_peer *peer)
{
    const net_identity *id = &peer->net->identity;
    net_hello hello = {
        .magic = NET_HELLO_MAGIC,
        .protocol = NET_PROTOCOL,
        .cluster = id->cluster,
        .role = id->role,
        .member = id->member,
        .sends_max = peer->net->options.sends_max,
    };
    return peer_note(peer, NET_TYPE_HELLO, &hello, sizeof(hello));
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
    if (!peer->hello_due && peer->tell_due && peer->state == NET_PEER_UP) {
        peer->tell_due = !peer_speak_heartbeat(peer);
    }
    return !peer->hello_due && !peer->tell_due;
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
    return hello->cluster != peer->net->identity.cluster ? NET_REFUSE_CLUSTER : 0;
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
    default:
        cm_warn("link %s refused by %s: greeting cannot be read, reason %u", peer->address, who, reason);
        break;
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
        peer_log_refused(peer, "us", reason, hello.protocol, hello.cluster);
        (void)net_peer_speak(
            peer); /* a hello still due goes first: the other side then knows our numbers too */
        net_refusal refusal = {.reason = reason, .protocol = NET_PROTOCOL, .cluster = n->identity.cluster};
        peer->state = NET_PEER_REFUSING;
        peer->refused_ms = n->now_ms;
        net_timer_at(n, n->now_ms + n->options.silence_ms);
        if (!peer_note(peer, NET_TYPE_REFUSAL, &refusal, sizeof(refusal))) {
            net_peer_end(peer, CM_E_REFUSED, true);
        }
        return;
    }
    (void)net_peer_speak(peer); /* our hello leaves before the user's first message */
    if (peer->hello_due) {
        net_peer_end(peer, CM_E_RESET, false);
        return;
    }
    peer->identity = (net_identity){.cluster = hello.cluster, .role = hello.role, .member = hello.member};
    peer->window = hello.sends_max < n->options.sends_max ? hello.sends_max : n->options.sends_max;
    peer->state = NET_PEER_UP;
    peer->was_up = true;
    net_timer_at(n, n->now_ms + n->options.heartbeat_ms);
    cm_stat_add(CM_STAT_net_peers, 1);
    cm_debug("link %s up, role %u member %u", peer->address, hello.role, hello.member);
    net_event event = {.kind = NET_EV_UP, .peer = peer};
    net_event_push(n, &event, NULL);
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
    return (int32_t)(sending->seq - peer->n_sent_taken) <= (int32_t)(peer->window / 2);
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
    uint32_t n_new = heartbeat.n_taken - peer->n_sent_taken;
    if (n_new > peer->n_sent - peer->n_sent_taken) {
        cm_warn("peer %s broke the protocol: took %u messages of %u", peer->address, heartbeat.n_taken,
                peer->n_sent);
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

void net_peer_heard(net_peer *peer, const net_event *message)
{
    if (message->type == NET_TYPE_REFUSAL) {
        peer_heard_refusal(peer, message);
    } else if (peer->state == NET_PEER_REFUSING) {
        return; /* only the peer's own verdict matters now */
    } else if (message->type == NET_TYPE_HELLO && peer->state == NET_PEER_GREETING) {
        peer_heard_hello(peer, message);
    } else if (message->type == NET_TYPE_HEARTBEAT && peer->state == NET_PEER_UP) {
        peer_heard_heartbeat(peer, message);
    } else if (message->type == NET_TYPE_GOODBYE && peer->state == NET_PEER_UP) {
        cm_debug("link %s ended by the peer's goodbye", peer->address);
        net_peer_end(peer, CM_E_RESET, true);
    } else {
        cm_warn("peer %s broke the protocol: type %04x in state %d", peer->address, message->type,
                (int)peer->state);
        net_peer_end(peer, CM_E_PROTOCOL, false);
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
            cm_warn("link %s given up: message %u of type %u %s %llu ms past its deadline, %u of %u taken by "
                    "the peer",
                    peer->address, sending->seq, sending->type, sending->completed ? "not taken" : "not away",
                    (unsigned long long)(n->now_ms - sending->deadline_ms), peer->n_sent_taken, peer->n_sent);
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
                peer->state == NET_PEER_GREETING ? ", no greeting" : "");
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
