/* Inside common/net: the layer's objects, its own messages, and what back-ends share. */
#pragma once
#include <pthread.h>
#include <stdatomic.h>
#include <sys/queue.h>

#include "common/base/mem.h"
#include "common/net/net.h"

/* ---- the layer's own messages: fixed little-endian headers, no payload ---- */

enum {
    NET_TYPE_HELLO = NET_TYPE_INTERNAL, /* net_hello; first on every link, from both sides */
    NET_TYPE_REFUSAL,                   /* net_refusal; instead of a link */
    NET_TYPE_HEARTBEAT,                 /* net_heartbeat; by time, and early to let the peer send on */
    NET_TYPE_GOODBYE,                   /* no header; the sender closes */
    NET_TYPE_KEYS,                      /* net_keys_note; on links that check keys: the keys the sender has */
};
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "wire structs are copied as they are");

enum { NET_HELLO_MAGIC = 0x54454e42 }; /* "BNET" */

typedef struct net_hello {
    uint32_t magic;
    uint32_t protocol; /* these two keep their place in every version */
    uint64_t cluster;
    uint32_t role, member;
    uint32_t sends_max; /* both sides go by the smaller one */
    uint32_t keyed;     /* 1: messages are checked by keys; both sides must agree */
    uint64_t nonce[2];  /* drawn for this link; 0 when not keyed, as are the ids */
    uint32_t key_ids[NET_KEYS_MAX];
} net_hello;
_Static_assert(sizeof(net_hello) == 64, "net_hello is a wire struct");

typedef enum net_refuse_reason {
    NET_REFUSE_GREETING = 1, /* cannot be read */
    NET_REFUSE_PROTOCOL = 2,
    NET_REFUSE_CLUSTER = 3,
    NET_REFUSE_KEYED = 4,
} net_refuse_reason;

typedef struct net_refusal {
    uint32_t reason;   /* net_refuse_reason */
    uint32_t protocol; /* of the refusing side, as is the cluster */
    uint64_t cluster;
} net_refusal;
_Static_assert(sizeof(net_refusal) == 16, "net_refusal is a wire struct");

typedef struct net_heartbeat {
    uint64_t n_taken; /* messages taken on this link so far */
} net_heartbeat;
_Static_assert(sizeof(net_heartbeat) == 8, "net_heartbeat is a wire struct");

typedef struct net_keys_note {
    uint32_t ids[NET_KEYS_MAX]; /* 0: none */
} net_keys_note;
_Static_assert(sizeof(net_keys_note) == 16, "net_keys_note is a wire struct");

enum {
    NET_TAG_BYTES = 16,
    NET_NOTE_BYTES_MAX =
        sizeof(net_keys_note), /* header of one of the layer's own, hello and refusal aside */
    NET_KEYS_NOTES_MAX = 3,    /* lists of keys on their way at once, per link */
};

/* In front of every header but a hello's and a refusal's; its size keeps the user's header aligned. */
typedef struct net_prefix {
    uint64_t seq; /* 1, 2, ... per link and direction, the user's messages and the layer's own each for
                     themselves: a gap in the user's is a broken back-end or peer */
    uint32_t key; /* id of the key of the tag; 0: none */
    uint32_t zero;
    uint8_t tag[NET_TAG_BYTES];
} net_prefix;
_Static_assert(sizeof(net_prefix) == 32, "net_prefix is a wire struct");
_Static_assert(sizeof(net_prefix) + NET_HEADER_MAX == NET_WIRE_HEADER_MAX, "a back-end carries both");

/* ---- the layer's objects ---- */

typedef enum net_peer_state {
    NET_PEER_GREETING, /* our hello is out or about to be */
    NET_PEER_UP,
    NET_PEER_REFUSING, /* their hello did not fit; our refusal is given time to arrive */
    NET_PEER_ENDING,   /* waits for its sends, then tells DOWN */
    NET_PEER_DOWN,     /* DOWN is queued */
    NET_PEER_DEAD,     /* told or disconnected; memory is reused from the next poll on */
} net_peer_state;

typedef struct net_sending {
    TAILQ_ENTRY(net_sending) entry; /* of peer->sends or peer->notes while peer is not NULL */
    net_peer *peer;                 /* NULL once disconnected */
    void *cookie;
    uint64_t deadline_ms;
    uint64_t seq;
    uint16_t type;
    bool completed; /* by the back-end; waits for the peer to take older ones */
} net_sending;
TAILQ_HEAD(net_sending_list, net_sending);

/* A key of the object as this link uses it. */
typedef struct net_link_key {
    uint32_t id;
    struct evp_mac_ctx_st *tx, *rx; /* EVP_MAC_CTX, keyed */
} net_link_key;

struct net_peer {
    net *net;
    net_backend_link *link; /* NULL once the back-end has forgotten it or was told to */
    void *user;
    net_identity identity;
    char address[NET_ADDRESS_BYTES];
    net_peer_state state;
    cm_status end_status; /* from ENDING on */
    bool was_up;
    bool hello_due;        /* hello not sent yet */
    bool tell_due;         /* a heartbeat should go before its time */
    bool heartbeat_on_way; /* one at a time: a stuck link gathers no heartbeats */
    bool in_due;           /* of net->due */
    uint32_t window;       /* sends_max of this link */
    uint32_t n_slots;      /* user sends whose SENT was not handed out */
    uint64_t n_sent;       /* seq of the newest */
    uint64_t n_sent_taken; /* as told by the peer */
    uint64_t n_taken;      /* seq of the newest received */
    uint64_t n_taken_told;
    uint64_t n_notes_sent, n_notes_taken; /* the same of the layer's own */
    /* keyed links; up once each side has heard a message under a key of its own */
    bool greeted;      /* their hello was heard: the next four are valid */
    bool proven;       /* they have a key of ours */
    bool proof_sent;   /* our list went out under a key */
    bool keys_due;     /* our list should go out */
    net_identity told; /* ours, in our hello */
    uint64_t nonce[2], their_nonce[2];
    uint32_t their_ids[NET_KEYS_MAX];
    net_link_key link_keys[NET_KEYS_MAX]; /* of the object's keys, in their order */
    uint32_t n_link_keys;
    uint32_t n_keys_on_way;
    uint64_t heard_ms;                    /* anything from the peer; its start before that */
    uint64_t beat_ms;                     /* our last heartbeat; the start before that */
    uint64_t refused_ms;                  /* when REFUSING began */
    struct net_sending_list sends, notes; /* the user's, oldest first; the layer's own */
    TAILQ_ENTRY(net_peer) entry;          /* of net->live or net->dead */
    TAILQ_ENTRY(net_peer) due_entry;
};
TAILQ_HEAD(net_peer_list, net_peer);

typedef struct net_queued {
    net_event event;
    net_sending *sending; /* SENT: goes back to its pool when handed out */
} net_queued;

typedef struct net_key {
    uint64_t cluster, generation;
    uint64_t end_ms; /* retired: gone then; UINT64_MAX: in force */
    uint32_t id;
    uint8_t bytes[NET_KEY_BYTES];
} net_key;

typedef struct net_keys {
    net_key key[NET_KEYS_MAX]; /* oldest first */
    uint32_t n;
    uint64_t expire_ms; /* the first end_ms */
    uint64_t n_refused, refused_log_ms;
    _Atomic bool news;    /* for the owner: something below is new */
    pthread_mutex_t lock; /* protects the rest */
    net_key added[NET_KEYS_MAX];
    uint32_t n_added;
    uint64_t cluster, retire_before; /* of the newest key; its generations below that are retired */
} net_keys;

struct net {
    net_options options;
    net_keys keys;
    const net_ops *ops;
    void *backend;
    net_identity identity;
    cm_pool peers, sends, notes;
    struct net_peer_list live, dead, due;
    uint32_t n_live;
    net_queued *events; /* ring; sized so that it cannot overflow */
    uint32_t events_cap, i_event, n_events;
    uint64_t now_ms;   /* of the poll in progress */
    uint64_t timer_ms; /* no timer is due before it; UINT64_MAX = none */
    uint32_t n_in_flight;
    uint32_t n_vain, n_rest; /* net_poll_awake: looks in vain in a row; calls that do not look again */
};

/* net.c */
void net_event_push(net *n, const net_event *event, net_sending *sending);
void net_timer_at(net *n, uint64_t at_ms);

/* net_keys.c */
void net_keys_init(net *n);
void net_keys_fini(net *n);
void net_keys_step(net *n); /* takes what was added and retired, drops what has ended, tells the links */
void net_key_ids(const net *n, uint32_t ids_out[NET_KEYS_MAX]);
void net_link_keys_follow(
    net_peer *peer); /* derives what the object has and the link has not; forgets the others */
void net_link_keys_free(net_peer *peer);
const net_link_key *net_peer_sender(const net_peer *peer); /* the newest that both have; NULL: none */
/* Fills key and tag; prefix is zero but for seq. */
void net_seal(const net_peer *peer, const net_message *message, uint64_t payload_bytes, net_prefix *prefix);
/* NULL: good, or links are not keyed. Otherwise why not, in words; then prefix_out may say anything. */
const char *net_unseal(const net_peer *peer, const net_event *message, net_prefix *prefix_out);
void net_refuse(net_peer *peer, uint16_t type, const char *why); /* counts, logs; the link goes on */

/* net_peer.c: one link's life */
net_peer *net_peer_create(net *n, net_backend_link *link, const char *address); /* NULL: peers_max */
void net_peer_destroy(net_peer *peer);
/* Takes the link down: its sends complete with status, then NET_EV_DOWN tells it. orderly: nothing was lost.
 */
void net_peer_end(net_peer *peer, cm_status status, bool orderly);
/* Sends what is due (hello, heartbeat); true when nothing is left. */
bool net_peer_speak(net_peer *peer);
void net_peer_goodbye(net_peer *peer);
/* A hello or refusal, the two that nothing vouches for. */
void net_peer_heard_greeting(net_peer *peer, const net_event *message);
/* A list of keys that nothing vouches for. true: taken, as it may be before there is a key in common. */
bool net_peer_heard_unproven(net_peer *peer, const net_event *message, const net_prefix *prefix);
/* One of the layer's other messages; it is the peer's. */
void net_peer_heard(net_peer *peer, const net_event *message, const net_prefix *prefix);
/* The object's keys are others than before. */
void net_peer_keys_changed(net_peer *peer);
void net_peer_taken(net_peer *peer); /* counts one received user message */
/* Judges silence and deadlines, sends a heartbeat if it is time; the next time to look goes to net_timer_at.
 */
void net_peer_tick(net_peer *peer);
/* The back-end let go of a sending. */
void net_sending_done(net *n, net_sending *sending, cm_status status);
/* Queues SENT and forgets the sending; the last one of an ending peer brings DOWN. */
void net_sending_tell(net_sending *sending, cm_status status);

/* net_registry.c; CM_E_CONFIG: unknown, CM_E_DEVICE: its module cannot be had */
CM_MUST_CHECK cm_status net_ops_find(const char *name, const net_ops **ops_out, cm_error *err);
extern const net_ops net_ucx_ops;
extern const net_ops net_local_ops;
extern const net_ops net_shm_ops;

/* ---- net_buffers.c: payload buffers of a back-end ----
 * n buffers of n_bytes, 64-byte aligned, in one anonymous mapping: a page costs memory from its first use on
 * only, and the last returned buffer is the first taken, so that few pages are ever touched. Thread: the
 * owner's. */
typedef struct net_buffers {
    uint8_t *base;
    uint64_t stride, map_bytes;
    uint32_t n, n_free;
    uint32_t *free_stack;
} net_buffers;
CM_MUST_CHECK cm_status net_buffers_init(net_buffers *buffers, uint32_t n, uint64_t n_bytes, cm_error *err);
void net_buffers_fini(net_buffers *buffers);
void *net_buffers_get(net_buffers *buffers); /* asserts that one is free */
void net_buffers_put(net_buffers *buffers, void *buffer);

/* ---- net_address.c: "host:port" and back, for back-ends over IP ---- */
struct sockaddr_in;
/* names: host may be a name (asks the resolver); otherwise numeric only. CM_E_INVALID with the reason,
 * CM_E_UNSUPPORTED: IPv6. */
CM_MUST_CHECK cm_status net_address_parse(const char *text, bool names, struct sockaddr_in *address_out,
                                          cm_error *err);
void net_address_format(const struct sockaddr_in *address, char text_out[NET_ADDRESS_BYTES]);
/* Replaces a wildcard host by the first address of this machine that others can reach, else loopback. */
void net_address_reachable(struct sockaddr_in *address);
