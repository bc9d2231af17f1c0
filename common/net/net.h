/* Links between processes for rows and token ids: a small table of back-ends (ucx, shm, mpi, local; tests add
 * a simulated one) under one layer that adds what every back-end needs alike: the greeting that tells
 * strangers apart, heartbeats, a deadline on every message, bounds on everything queued. Nothing here blocks.
 *
 *   net_open -> net_identity -> net_listen / net_connect -> { net_poll -> events ; net_send }* -> net_close
 *
 * A link is up after both greetings arrived (same protocol version, same cluster), on objects that are keyed
 * once both ends have a key in common and have shown it. Messages on a link arrive
 * whole, once and in the order they were sent, or the link goes down; a link that went down never comes back
 * (connect again). A peer is down by transport error (milliseconds), by silence (silence_ms without a message
 * or heartbeat), by a message not taken before its deadline, or by its own goodbye. Thread: a net object and
 * its peers belong to one thread for life. The local back-end may link objects of two threads. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/status.h"

typedef struct net net;
typedef struct net_peer net_peer;

enum {
    NET_ADDRESS_BYTES = 128,
    NET_HEADER_MAX = 256,                      /* bytes of a message's header */
    NET_WIRE_HEADER_MAX = NET_HEADER_MAX + 32, /* what a back-end carries: the layer's own 32 bytes first */
    NET_IOV_MAX = 4,
    NET_PROTOCOL = 2,
    NET_KEY_BYTES = 32,
    NET_KEYS_MAX = 4,           /* of one object at once */
    NET_TYPE_INTERNAL = 0xFF00, /* message types from here up belong to this layer */
};

typedef struct net_options {
    const char *backend;   /* "ucx", "shm", "mpi", "local"; a test's own table by net_open_ops */
    uint32_t peers_max;    /* links at once; more are refused */
    uint32_t sends_max;    /* messages on their way per link (the smaller of both sides'); then CM_AGAIN */
    uint32_t receives_max; /* received messages not yet released, all links; then senders wait */
    uint64_t message_bytes_max; /* payload of one message; more is a protocol error */
    uint32_t heartbeat_ms; /* between heartbeats: also under traffic, which may wait at a slow receiver */
    uint32_t silence_ms;   /* a peer unheard for so long is down; > heartbeat_ms */
    bool keyed; /* messages are checked by keys (net_key_add); both ends of a link alike. Without it whoever
                   reaches the address is believed: inside one process */
} net_options;
void net_options_defaults(net_options *options);

/* Who we are, told in the greeting. cluster 0 accepts and is accepted by nobody but cluster 0. */
typedef struct net_identity {
    uint64_t cluster;
    uint32_t role;   /* Role of the control messages; the net layer only carries it */
    uint32_t member; /* member id given by the coordinator */
} net_identity;

/* CM_E_CONFIG: unknown back-end. CM_E_DEVICE: it cannot start here (err says why). */
CM_MUST_CHECK cm_status net_open(const net_options *options, net **net_out, cm_error *err);
/* Ends all links at once (peers see a goodbye or an error), releases everything; unreleased receives are
 * logged. */
void net_close(net *n);
void net_set_identity(net *n, const net_identity *identity);
const char *net_backend(const net *n);

/* ---- keys ----
 * Whoever has a key may speak for anybody who has it; the owner hands the same ones to all members and a new
 * one to those that stay. A message with a wrong tag, under a key that is not held, of another link or one
 * that came before is refused: counted, logged, without effect on anything else (shm: the kernel keeps others
 * off a link, and a key is asked for once, when it comes up). Links greet and wait without a key for
 * silence_ms, so both ends may hear of one in any order. Messages are not encrypted. Thread: any; the owner's
 * thread has to be woken. */
/* generation: of a cluster's keys, ascending (its epochs). Known ones are ignored. Beyond NET_KEYS_MAX the
 * oldest is forgotten. */
void net_key_add(net *n, uint64_t cluster, uint64_t generation, const uint8_t key[NET_KEY_BYTES]);
/* Generations below oldest end, silence_ms from now: what is on its way still arrives. A link whose peer has
 * no later key goes down then. */
void net_key_retire(net *n, uint64_t oldest);

/* ucx: "host:port", IPv4, port 0 = any free one; host may be a name (looked up: may block, start-up only).
 * shm: a name unique on this machine, links are for processes of one user; what ends in ":0" is any free
 * name. mpi: any text, a rank is reached by its number. local: a name unique in this process. Once per
 * object. bound_out: the address others can connect to; for a wildcard host this machine's first outside
 * address. CM_E_EXISTS when it is taken, CM_E_INVALID when it cannot be read, CM_E_UNSUPPORTED: IPv6. */
CM_MUST_CHECK cm_status net_listen(net *n, const char *address, char bound_out[NET_ADDRESS_BYTES],
                                   cm_error *err);
/* Begins to connect; NET_EV_UP or NET_EV_DOWN follows. Sending before UP is our bug. ucx: the host is
 * numeric, so that nothing is looked up. CM_E_INVALID: address cannot be read; CM_E_UNSUPPORTED: IPv6;
 * CM_E_CAPACITY: peers_max. */
CM_MUST_CHECK cm_status net_connect(net *n, const char *address, net_peer **peer_out, cm_error *err);
/* Ends a link; its sends complete with CM_E_CANCELLED (event.peer NULL); no NET_EV_DOWN follows; peer is
 * invalid after the call, events of it that net_poll handed out before excepted. */
void net_disconnect(net_peer *peer);

void net_peer_set_user(net_peer *peer, void *user);
void *net_peer_user(const net_peer *peer);
const net_identity *net_peer_identity(const net_peer *peer); /* valid once up */
const char *net_peer_address(const net_peer *peer);          /* for logs */

typedef struct net_iov {
    const void *data;
    uint64_t n_bytes;
} net_iov;

typedef struct net_message {
    uint16_t type;      /* of proto's tables; the net layer does not look at it */
    const void *header; /* copied */
    uint32_t header_bytes;
    net_iov iov[NET_IOV_MAX]; /* payload pieces, kept until NET_EV_SENT */
    uint32_t n_iov;
    uint32_t deadline_ms; /* must have left by then or the link goes down; > 0 */
    void *cookie;         /* comes back in NET_EV_SENT */
} net_message;

/* CM_OK: NET_EV_SENT with the cookie follows, exactly once, whatever happens to the link (unless net_close).
 * CM_OK there means the payload is ours again; at most sends_max / 2 messages of a link were so reported and
 * not yet taken by the peer's layer, later ones wait for it: that bounds what piles up at a slow receiver.
 * CM_AGAIN: sends_max are on their way, a NET_EV_SENT will come. CM_E_RESET: the link is down (its event is
 * waiting or was delivered). */
CM_MUST_CHECK cm_status net_send(net_peer *peer, const net_message *message);

/* Memory of the transport to build the next payload to this peer in, 64-byte aligned; NULL: there is none, or
 * no room now. If the next message to the peer has this as its only piece, with n_bytes or fewer, nothing is
 * copied and net_send does not say CM_AGAIN. Nobody reads it before; not sending is fine. Valid until then or
 * until net_poll. */
void *net_room(net_peer *peer, uint64_t n_bytes);

typedef enum net_event_kind {
    NET_EV_UP,   /* peer: link is up (ours or accepted) */
    NET_EV_DOWN, /* peer, status: link is down; the last event of a peer, after it is handled peer is invalid.
                  * Also for an accepted link that never came up (its user is NULL). A goodbye is CM_E_RESET.
                  */
    NET_EV_MESSAGE, /* peer, type, header, payload; release with net_release */
    NET_EV_SENT,    /* cookie, status (CM_OK, or why not) */
} net_event_kind;

typedef struct net_event {
    net_event_kind kind;
    cm_status status;
    net_peer *peer;
    uint16_t type;
    const void *header; /* 8-byte aligned */
    uint32_t header_bytes;
    const void *payload; /* 64-byte aligned, contiguous */
    uint64_t payload_bytes;
    void *cookie;
    void *receive; /* for net_release */
} net_event;

/* Progress; up to events_max events. Never blocks. Call until it returns 0 before sleeping. */
uint32_t net_poll(net *n, net_event *events_out, uint32_t events_max);
/* The same, but looks again for some microseconds, at_most_us of them, before it says 0: an answer that comes
 * soon is then not slept for. Only as long as that has paid lately, so that one who waits long, or whose peer
 * needs this very core, loses little. */
uint32_t net_poll_awake(net *n, net_event *events_out, uint32_t events_max, uint64_t at_most_us);
/* Gives back the memory of a NET_EV_MESSAGE; header and payload are invalid after it. May be called later,
 * from the same thread, also after the peer is gone. */
void net_release(net *n, const net_event *event);

/* Sleeping: readable when there is something to poll. */
int net_fd(const net *n);
/* true: nothing is pending, sleep on net_fd is safe until net_next_timer_ms from now. false: poll again
 * first. */
bool net_arm(net *n);
/* Milliseconds until net_poll must run again for heartbeats and deadlines; UINT32_MAX = no need. */
uint32_t net_next_timer_ms(const net *n);

/* Frames held: messages sent and not yet completed plus received and not yet released. Zero at rest. */
uint32_t net_in_flight(const net *n);

/* ---- the table a back-end fills ----
 * One object per net; the layer above owns peers and calls from its one thread. Handles are the back-end's
 * own. */
typedef struct net_backend_link net_backend_link; /* the back-end's side of one link */

/* What a back-end tells the layer above, during progress only (never from inside send or connect). */
typedef struct net_upcalls {
    /* A stranger connected: the layer answers with its peer, or NULL to refuse (then the back-end drops the
     * link). */
    void *(*accepted)(void *ctx, net_backend_link *link, const char *address);
    /* A whole message, type and header first: the layer keeps it until it calls release. Types from
     * NET_TYPE_INTERNAL up have no payload, need no receive (receive NULL, header valid during the call only)
     * and are delivered also while receives_max are held; they may then overtake. */
    void (*received)(void *ctx, void *peer, const net_event *message);
    /* A failure is followed by down. peer is NULL or stale after disconnect. */
    void (*sent)(void *ctx, void *peer, void *send_cookie, cm_status status);
    /* The link is gone; the back-end has forgotten it after this call. All its sends were completed before.
     * CM_OK: the peer ended it in order. */
    void (*down)(void *ctx, void *peer, cm_status status);
} net_upcalls;

typedef struct net_ops {
    uint32_t version; /* NET_PROTOCOL */
    const char *name;
    bool vouches; /* nobody but processes of our own user can put a message on a link: once the peer has shown
                     a key, its messages need no tags. Both ends have the same table */
    cm_status (*open)(const net_options *options, const net_upcalls *upcalls, void *ctx, void **backend_out,
                      cm_error *err);
    void (*close)(void *backend);
    cm_status (*listen)(void *backend, const char *address, char bound_out[NET_ADDRESS_BYTES], cm_error *err);
    cm_status (*connect)(void *backend, const char *address, void *peer, net_backend_link **link_out,
                         cm_error *err);
    void (*disconnect)(void *backend,
                       net_backend_link *link); /* at once; no upcall for it afterwards but sent */
    /* Copies the header (NET_WIRE_HEADER_MAX at most) and the iov list, keeps the payload until sent. */
    cm_status (*send)(void *backend, net_backend_link *link, const net_message *message, void *send_cookie);
    void *(*room)(void *backend, net_backend_link *link,
                  uint64_t n_bytes); /* see net_room; NULL: it copies */
    bool (*progress)(void *backend); /* true: something happened, call again */
    void (*release)(void *backend, void *receive);
    int (*fd)(const void *backend);
    bool (*arm)(void *backend);
} net_ops;

/* The seam for the simulator: the same layer over a table of a test. */
CM_MUST_CHECK cm_status net_open_ops(const net_ops *ops, const net_options *options, net **net_out,
                                     cm_error *err);
