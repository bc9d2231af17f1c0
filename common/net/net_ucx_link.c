#include <string.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/net/net_ucx_private.h"

/* How long a link told goodbye waits for the peer to leave first, at most. */
enum { UCX_FAREWELL_MS = 100 };

/* ---- links ---- */

net_backend_link *ucx_link_create(ucx_net *u, void *peer)
{
    net_backend_link *link;
    if (cm_pool_get(&u->links, (void **)&link) != CM_OK) {
        return NULL;
    }
    link->net = u;
    link->peer = peer;
    TAILQ_INIT(&link->arrivals);
    TAILQ_INSERT_TAIL(&u->all, link, entry);
    return link;
}

void ucx_link_free(net_backend_link *link)
{
    ucx_net *u = link->net;
    TAILQ_REMOVE(&u->all, link, entry);
    cm_pool_put(&u->links, link);
}

/* Comes from inside ucp_worker_progress or from closing: nothing is done here but to note it. */
static void ucx_on_error(void *arg, ucp_ep_h ep, ucs_status_t status)
{
    (void)ep;
    ucx_link_fail(arg, ucx_status(status));
}

void ucx_link_start(net_backend_link *link, const struct sockaddr_in *address, ucp_conn_request_h request)
{
    ucx_net *u = link->net;
    ucp_ep_params_t params = {
        .field_mask = UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE | UCP_EP_PARAM_FIELD_ERR_HANDLER,
        .err_mode = UCP_ERR_HANDLING_MODE_PEER,
        .err_handler = {.cb = ucx_on_error, .arg = link},
    };
    if (address != NULL) {
        params.field_mask |= UCP_EP_PARAM_FIELD_FLAGS | UCP_EP_PARAM_FIELD_SOCK_ADDR;
        params.flags = UCP_EP_PARAMS_FLAGS_CLIENT_SERVER;
        params.sockaddr.addr = (const struct sockaddr *)address;
        params.sockaddr.addrlen = sizeof(*address);
    } else {
        params.field_mask |= UCP_EP_PARAM_FIELD_CONN_REQUEST;
        params.conn_request = request;
    }
    u->dirty = true;
    ucs_status_t status = ucp_ep_create(u->worker, &params, &link->ep);
    if (status != UCS_OK) {
        cm_warn("no endpoint: %s", ucs_status_string(status));
        link->ep = NULL;
        ucx_link_fail(link, ucx_status(status));
        return;
    }
    cm_status put = cm_map_put(&u->eps, (uintptr_t)link->ep, link);
    CM_ASSERT_MSG(put == CM_OK, "endpoint map: %s", cm_status_name(put));
}

static void ucx_link_closing(net_backend_link *link, cm_status status)
{
    if (!link->closing) {
        link->closing = true;
        link->end_status = status;
        link->net->n_closing++;
        link->net->dirty = true;
    }
}

void ucx_link_fail(net_backend_link *link, cm_status status)
{
    ucx_link_closing(link, status);
    link->broken = true;
}

/* A goodbye must not be overtaken by the news that its connection was closed, which travels apart from the
 * data: the link lingers until the peer leaves, for a moment. It does not linger when sends must be called
 * back. */
void ucx_disconnect(void *backend, net_backend_link *link)
{
    (void)backend;
    link->peer = NULL;
    link->farewell_ms = cm_now_ms() + UCX_FAREWELL_MS;
    ucx_link_closing(link, CM_E_CANCELLED);
}

static bool ucx_link_lingers(const net_backend_link *link)
{
    return link->said_goodbye && !link->broken && link->n_sends == 0 && cm_now_ms() < link->farewell_ms;
}

static void ucx_arrival_give_back(ucx_net *u, ucx_arrival *arrival)
{
    if (arrival->buffer != NULL) {
        net_buffers_put(&u->buffers, arrival->buffer);
    }
    if (arrival->desc != NULL) {
        ucp_am_data_release(u->worker, arrival->desc);
    }
    if (arrival->type < NET_TYPE_INTERNAL && arrival->state != UCX_ARRIVAL_WAITING) {
        CM_ASSERT(u->n_receives > 0);
        u->n_receives--;
        u->look = true;
    }
    cm_pool_put(&u->arrivals, arrival);
}

/* What had arrived and was not delivered goes down with the link; what is being fetched follows when UCX is
 * done. After the endpoint is gone: before, giving back an announcement would tell the sender that we took
 * its message. */
static void ucx_link_drop_arrivals(net_backend_link *link)
{
    ucx_net *u = link->net;
    while (!TAILQ_EMPTY(&link->arrivals)) {
        ucx_arrival *arrival = TAILQ_FIRST(&link->arrivals);
        TAILQ_REMOVE(&link->arrivals, arrival, entry);
        if (arrival->state == UCX_ARRIVAL_FETCHING) {
            arrival->dropped = true;
        } else {
            ucx_arrival_give_back(u, arrival);
        }
    }
    link->n_arrivals = 0;
    if (link->in_waiting) {
        TAILQ_REMOVE(&u->waiting, link, waiting_entry);
        link->in_waiting = false;
    }
}

static void ucx_link_begin_close(net_backend_link *link)
{
    link->close_begun = true;
    if (link->ep == NULL) {
        return;
    }
    (void)cm_map_remove(&link->net->eps, (uintptr_t)link->ep);
    /* not graceful: a flush to a dead or stopped peer would never end */
    ucp_request_param_t param = {.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS, .flags = UCP_EP_CLOSE_FLAG_FORCE};
    ucs_status_ptr_t request = ucp_ep_close_nbx(link->ep, &param);
    link->close_request = UCS_PTR_IS_PTR(request) ? request : NULL;
    if (UCS_PTR_IS_ERR(request)) {
        cm_warn("endpoint close: %s", ucs_status_string(UCS_PTR_STATUS(request)));
    }
}

bool ucx_link_close_step(net_backend_link *link)
{
    ucx_net *u = link->net;
    bool did = false;
    if (!link->close_begun) {
        if (ucx_link_lingers(link)) {
            return false;
        }
        ucx_link_begin_close(link);
        did = true;
    }
    if (link->close_request != NULL) {
        if (ucp_request_check_status(link->close_request) == UCS_INPROGRESS) {
            return did;
        }
        ucp_request_free(link->close_request);
        link->close_request = NULL;
        did = true;
    }
    ucx_link_drop_arrivals(link);
    if (link->n_sends > 0) {
        return did;
    }
    if (link->peer != NULL) {
        void *peer = link->peer;
        link->peer = NULL;
        u->upcalls->down(u->ctx, peer, link->end_status);
        did = true;
    }
    if (link->n_fetches > 0) {
        return did;
    }
    u->n_closing--;
    ucx_link_free(link);
    return true;
}

/* ---- sending ---- */

static void ucx_on_send_done(void *request, ucs_status_t status, void *user_data)
{
    ucx_send *send = user_data;
    send->status =
        status == UCS_OK ? CM_OK : CM_E_RESET; /* UCX says cancelled for what a loss took with it */
    STAILQ_INSERT_TAIL(&send->link->net->done, send, entry);
    ucp_request_free(request);
}

bool ucx_report_sent(ucx_net *u)
{
    bool did = false;
    while (!STAILQ_EMPTY(&u->done)) {
        ucx_send *send = STAILQ_FIRST(&u->done);
        STAILQ_REMOVE_HEAD(&u->done, entry);
        net_backend_link *link = send->link;
        link->n_sends--;
        if (send->status != CM_OK) {
            ucx_link_fail(link, CM_E_RESET); /* usually it is closing already, hence the failure */
        }
        u->upcalls->sent(u->ctx, link->peer, send->cookie, send->status);
        cm_pool_put(&u->sends, send);
        did = true;
    }
    return did;
}

/* Fills the UCX description of the payload and returns the number of its pieces; empty ones are left out. */
static size_t ucx_send_iov(ucx_send *send, const net_message *message)
{
    size_t n = 0;
    for (uint32_t i = 0; i < message->n_iov; i++) {
        if (message->iov[i].n_bytes > 0) {
            send->iov[n].buffer = (void *)(uintptr_t)message->iov[i].data; /* UCX only reads it */
            send->iov[n].length = message->iov[i].n_bytes;
            n++;
        }
    }
    return n;
}

cm_status ucx_send_message(void *backend, net_backend_link *link, const net_message *message,
                           void *send_cookie)
{
    ucx_net *u = backend;
    ucx_send *send;
    CM_ASSERT(message->header_bytes <= NET_WIRE_HEADER_MAX);
    if (link->closing) {
        return CM_E_RESET;
    }
    if (cm_pool_get(&u->sends, (void **)&send) != CM_OK) {
        return CM_AGAIN;
    }
    send->link = link;
    send->cookie = send_cookie;
    link->said_goodbye = message->type == NET_TYPE_GOODBYE;
    ucx_prefix prefix = {.type = message->type};
    memcpy(send->header, &prefix, sizeof(prefix));
    if (message->header_bytes > 0) {
        memcpy(send->header + sizeof(prefix), message->header, message->header_bytes);
    }
    size_t n_iov = ucx_send_iov(send, message);
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                        UCP_OP_ATTR_FIELD_DATATYPE | UCP_OP_ATTR_FIELD_FLAGS,
        .cb.send = ucx_on_send_done,
        .user_data = send,
        .datatype = n_iov > 1 ? ucp_dt_make_iov() : ucp_dt_make_contig(1),
        .flags = UCP_AM_SEND_FLAG_REPLY, /* so that the receiver learns which of its links this is */
    };
    const void *buffer = n_iov > 1 ? (const void *)send->iov : n_iov == 1 ? send->iov[0].buffer : NULL;
    size_t count = n_iov > 1 ? n_iov : n_iov == 1 ? send->iov[0].length : 0;
    u->dirty = true;
    ucs_status_ptr_t request = ucp_am_send_nbx(link->ep, 0, send->header,
                                               sizeof(prefix) + message->header_bytes, buffer, count, &param);
    if (UCS_PTR_IS_ERR(request)) {
        cm_pool_put(&u->sends, send);
        ucx_link_fail(link, CM_E_RESET);
        return CM_E_RESET;
    }
    link->n_sends++;
    if (request == NULL) {
        send->status = CM_OK;
        STAILQ_INSERT_TAIL(&u->done, send, entry);
    }
    return CM_OK;
}

/* ---- receiving ---- */

static bool ucx_check_message(const net_backend_link *link, uint16_t type, size_t header_length,
                              uint64_t payload_bytes)
{
    const ucx_net *u = link->net;
    bool internal = type >= NET_TYPE_INTERNAL;
    if (header_length < sizeof(ucx_prefix) || header_length > UCX_HEADER_MAX ||
        (internal && payload_bytes > 0)) {
        cm_warn("peer broke the protocol: type %u, header of %zu bytes, payload of %llu", type, header_length,
                (unsigned long long)payload_bytes);
        return false;
    }
    if (payload_bytes > u->options->message_bytes_max) {
        cm_warn("peer broke the protocol: message of %llu bytes, %llu are allowed",
                (unsigned long long)payload_bytes, (unsigned long long)u->options->message_bytes_max);
        return false;
    }
    /* the layer lets one and a half windows wait at most */
    if (link->n_arrivals >= 2 * u->options->sends_max + UCX_NOTES_MAX) {
        cm_warn("peer broke the protocol: %u messages wait, windows are %u", link->n_arrivals,
                u->options->sends_max);
        return false;
    }
    return true;
}

/* Queues what came. Returns UCS_INPROGRESS when data stays with us until ucp_am_data_release or the fetch. */
ucs_status_t ucx_on_message(void *arg, const void *header, size_t header_length, void *data, size_t length,
                            const ucp_am_recv_param_t *param)
{
    ucx_net *u = arg;
    net_backend_link *link = (param->recv_attr & UCP_AM_RECV_ATTR_FIELD_REPLY_EP) != 0
                                 ? cm_map_get(&u->eps, (uintptr_t)param->reply_ep)
                                 : NULL;
    /* an error goes back to the sender of an announced message; others have no answer */
    bool announced = (param->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0;
    ucs_status_t no = announced ? UCS_ERR_CANCELED : UCS_OK;
    if (link == NULL || link->closing) {
        return no; /* the rest of a link that is gone */
    }
    ucx_prefix prefix = {0};
    if (header_length >= sizeof(prefix)) {
        memcpy(&prefix, header, sizeof(prefix));
    }
    ucx_arrival *arrival;
    if (!ucx_check_message(link, prefix.type, header_length, length)) {
        ucx_link_fail(link, CM_E_PROTOCOL);
        return no;
    }
    cm_status status = cm_pool_get(&u->arrivals, (void **)&arrival);
    CM_ASSERT_MSG(status == CM_OK, "%u arrivals in use, the links' bounds allow fewer", u->arrivals.n_used);
    arrival->link = link;
    arrival->type = prefix.type;
    arrival->header_bytes = (uint32_t)(header_length - sizeof(prefix));
    memcpy(arrival->header, (const uint8_t *)header + sizeof(prefix), arrival->header_bytes);
    arrival->payload_bytes = length;
    arrival->announced = announced;
    arrival->desc = length > 0 ? data : NULL;
    TAILQ_INSERT_TAIL(&link->arrivals, arrival, entry);
    link->n_arrivals++;
    if (!link->in_waiting) {
        link->in_waiting = true;
        TAILQ_INSERT_TAIL(&u->waiting, link, waiting_entry);
    }
    u->look = true;
    return arrival->desc != NULL ? UCS_INPROGRESS : UCS_OK;
}

static void ucx_on_fetched(void *request, ucs_status_t status, size_t length, void *user_data)
{
    ucx_arrival *arrival = user_data;
    net_backend_link *link = arrival->link;
    ucx_net *u = link->net;
    (void)length;
    if (request != NULL) {
        ucp_request_free(request);
    }
    link->n_fetches--;
    u->look = true;
    if (arrival->dropped) {
        ucx_arrival_give_back(u, arrival);
        return;
    }
    arrival->state = UCX_ARRIVAL_READY;
    if (status != UCS_OK) {
        ucx_link_fail(link, ucx_status(status)); /* a closing link delivers nothing more */
    }
}

static void ucx_fetch(ucx_arrival *arrival)
{
    net_backend_link *link = arrival->link;
    ucx_net *u = link->net;
    void *desc = arrival->desc;
    arrival->buffer = net_buffers_get(&u->buffers);
    arrival->desc = NULL; /* UCX's again */
    arrival->state = UCX_ARRIVAL_FETCHING;
    link->n_fetches++;
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_DATATYPE,
        .cb.recv_am = ucx_on_fetched,
        .user_data = arrival,
        .datatype = ucp_dt_make_contig(1),
    };
    ucs_status_ptr_t request =
        ucp_am_recv_data_nbx(u->worker, desc, arrival->buffer, arrival->payload_bytes, &param);
    if (!UCS_PTR_IS_PTR(request)) {
        ucx_on_fetched(NULL, UCS_PTR_RAW_STATUS(request), arrival->payload_bytes, arrival);
    }
}

/* Gives receives to waiting messages in order, as far as they reach. Fetches run side by side. */
static void ucx_take(net_backend_link *link)
{
    ucx_net *u = link->net;
    ucx_arrival *arrival;
    TAILQ_FOREACH (arrival, &link->arrivals, entry) {
        if (arrival->type >= NET_TYPE_INTERNAL || arrival->state != UCX_ARRIVAL_WAITING) {
            continue;
        }
        if (u->n_receives == u->options->receives_max) {
            return;
        }
        u->n_receives++;
        arrival->state = UCX_ARRIVAL_READY;
        if (arrival->announced) {
            ucx_fetch(arrival);
        }
    }
}

static void ucx_deliver(net_backend_link *link, ucx_arrival *arrival)
{
    ucx_net *u = link->net;
    TAILQ_REMOVE(&link->arrivals, arrival, entry);
    link->n_arrivals--;
    net_event event = {
        .type = arrival->type, .header = arrival->header, .header_bytes = arrival->header_bytes};
    if (arrival->type >= NET_TYPE_INTERNAL) {
        u->upcalls->received(u->ctx, link->peer, &event);
        ucx_arrival_give_back(u, arrival);
        return;
    }
    arrival->state = UCX_ARRIVAL_DELIVERED;
    event.payload = arrival->announced ? arrival->buffer : arrival->desc;
    if (event.payload == NULL) {
        event.payload = u->buffers.base; /* nobody reads it: no payload */
    }
    CM_ASSERT_MSG((uintptr_t)event.payload % 64 == 0, "payload at %p",
                  event.payload); /* asked of the worker */
    event.payload_bytes = arrival->payload_bytes;
    event.receive = arrival;
    u->upcalls->received(u->ctx, link->peer, &event);
}

/* true: something was delivered. */
static bool ucx_take_link(net_backend_link *link)
{
    bool did = false;
    ucx_take(link);
    ucx_arrival *arrival = TAILQ_FIRST(&link->arrivals);
    while (arrival != NULL && !link->closing &&
           (arrival->state == UCX_ARRIVAL_READY || arrival->type >= NET_TYPE_INTERNAL)) {
        ucx_deliver(link, arrival);
        did = true;
        arrival = TAILQ_FIRST(&link->arrivals);
    }
    /* behind a message that has to wait, the layer's own go ahead: heartbeats must be heard */
    while (arrival != NULL && !link->closing) {
        ucx_arrival *next = TAILQ_NEXT(arrival, entry);
        if (arrival->type >= NET_TYPE_INTERNAL) {
            ucx_deliver(link, arrival);
            did = true;
        }
        arrival = next;
    }
    return did;
}

bool ucx_take_all(ucx_net *u)
{
    if (!u->look) {
        return false;
    }
    u->look = false;
    bool did = false;
    net_backend_link *link = TAILQ_FIRST(&u->waiting), *last = TAILQ_LAST(&u->waiting, ucx_link_list);
    while (link != NULL) {
        net_backend_link *next = link != last ? TAILQ_NEXT(link, waiting_entry) : NULL;
        if (!link->closing) {
            did = ucx_take_link(link) || did;
        }
        /* to the end of the queue: the next free receive is another link's */
        TAILQ_REMOVE(&u->waiting, link, waiting_entry);
        link->in_waiting = !TAILQ_EMPTY(&link->arrivals);
        if (link->in_waiting) {
            TAILQ_INSERT_TAIL(&u->waiting, link, waiting_entry);
        }
        link = next;
    }
    return did;
}

void ucx_release(void *backend, void *receive)
{
    ucx_net *u = backend;
    ucx_arrival *arrival = receive;
    CM_ASSERT(arrival->state == UCX_ARRIVAL_DELIVERED);
    ucx_arrival_give_back(u, arrival);
    u->dirty = true;
}
