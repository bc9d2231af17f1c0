/* Inside the ucx back-end: its object, its links, its messages.
 *
 * One UCX context, worker and event fd per object. Every message is one active message: header = ucx_prefix
 * and the layer's header, data = payload. Up to 64 KiB payloads come with the message and stay where UCX put
 * them; larger ones are announced, and fetched into a buffer of ours once a receive is free. Both wait in
 * arrival order per link. */
#pragma once
#include <netinet/in.h>
#include <ucp/api/ucp.h>

#include "common/base/map.h"
#include "common/net/net_private.h"

typedef struct ucx_net ucx_net;

typedef struct ucx_prefix {
    uint16_t type;
    uint16_t zero16;
    uint32_t zero32;
} ucx_prefix;
_Static_assert(sizeof(ucx_prefix) == 8, "ucx_prefix is a wire struct");

enum { UCX_HEADER_MAX = sizeof(ucx_prefix) + NET_WIRE_HEADER_MAX };
/* The layer's own messages on their way or waiting, per link. */
enum { UCX_NOTES_MAX = 8 };

typedef struct ucx_send {
    STAILQ_ENTRY(ucx_send) entry; /* of ucx_net.done */
    net_backend_link *link;
    void *cookie;
    cm_status status;
    ucp_dt_iov_t iov[NET_IOV_MAX]; /* this and the header must stay until UCX is done */
    uint8_t header[UCX_HEADER_MAX];
} ucx_send;
STAILQ_HEAD(ucx_send_list, ucx_send);

typedef enum ucx_arrival_state {
    UCX_ARRIVAL_WAITING,  /* for a receive; or one of the layer's own */
    UCX_ARRIVAL_FETCHING, /* announced payload on its way into buffer */
    UCX_ARRIVAL_READY,
    UCX_ARRIVAL_DELIVERED, /* out of the link's queue, the layer's until release */
} ucx_arrival_state;

typedef struct ucx_arrival {
    TAILQ_ENTRY(ucx_arrival) entry; /* of link->arrivals */
    net_backend_link *link;
    ucx_arrival_state state;
    bool announced; /* desc has no data yet */
    bool dropped;   /* its link closes: give it back when fetched */
    uint16_t type;
    uint32_t header_bytes;
    uint64_t payload_bytes;
    void *desc;   /* UCX's: data, or the announcement; NULL when empty or handed back */
    void *buffer; /* ours, for announced ones */
    uint8_t header[NET_WIRE_HEADER_MAX] __attribute__((aligned(8)));
} ucx_arrival;
TAILQ_HEAD(ucx_arrival_list, ucx_arrival);

struct net_backend_link {
    TAILQ_ENTRY(net_backend_link) entry;         /* of ucx_net.links */
    TAILQ_ENTRY(net_backend_link) waiting_entry; /* of ucx_net.waiting */
    ucx_net *net;
    void *peer; /* NULL: disconnected by the layer, no upcall but sent */
    ucp_ep_h ep;
    bool closing, close_begun;
    bool broken;       /* UCX or a peer said so; else the layer disconnected */
    bool said_goodbye; /* the layer did: the peer may answer by leaving until farewell_ms */
    uint64_t farewell_ms;
    bool in_waiting;
    cm_status end_status;
    ucs_status_ptr_t close_request; /* NULL when there is none or it is over */
    uint32_t n_sends, n_fetches;    /* UCX still works on them */
    uint32_t n_arrivals;            /* in the queue */
    struct ucx_arrival_list arrivals;
};
TAILQ_HEAD(ucx_link_list, net_backend_link);

struct ucx_net {
    const net_options *options;
    const net_upcalls *upcalls;
    void *ctx;
    ucp_context_h context;
    ucp_worker_h worker;
    ucp_listener_h listener; /* NULL: does not listen */
    int fd;
    cm_map eps; /* ucp_ep_h -> link */
    cm_pool links, sends, arrivals;
    net_buffers buffers;
    uint32_t n_receives;               /* of receives_max: taken and not released */
    struct ucx_link_list all, waiting; /* waiting: those with arrivals, next in turn first */
    uint32_t n_closing;                /* links of all that the next progress must look at */
    struct ucx_send_list done;
    ucp_conn_request_h *requests; /* strangers to be accepted, peers_max at most */
    uint32_t n_requests;
    bool look;  /* waiting may go on: an arrival, a finished fetch or a release */
    bool dirty; /* something was started since the last progress: not yet safe to sleep */
};

/* net_ucx.c */
cm_status ucx_status(ucs_status_t status);

/* net_ucx_link.c */
net_backend_link *ucx_link_create(ucx_net *u, void *peer); /* NULL: all in use */
/* Gives the link its endpoint; on failure the link is closing. Exactly one of address and request. */
void ucx_link_start(net_backend_link *link, const struct sockaddr_in *address, ucp_conn_request_h request);
void ucx_link_free(net_backend_link *link); /* one that was never started */
/* The next progress closes it and reports it down. */
void ucx_link_fail(net_backend_link *link, cm_status status);
/* A step towards being forgotten; true when something happened. */
bool ucx_link_close_step(net_backend_link *link);

ucs_status_t ucx_on_message(void *arg, const void *header, size_t header_length, void *data, size_t length,
                            const ucp_am_recv_param_t *param);
bool ucx_take_all(ucx_net *u); /* hands arrivals to the layer, as far as receives reach */
bool ucx_report_sent(ucx_net *u);

void ucx_disconnect(void *backend, net_backend_link *link);
cm_status ucx_send_message(void *backend, net_backend_link *link, const net_message *message,
                           void *send_cookie);
void ucx_release(void *backend, void *receive);
