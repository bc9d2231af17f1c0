/* Links inside one process. Two objects share a channel with a mailbox for each direction; a message waits in
 * its sender's memory until the receiver has room and copies it, so nothing queues beyond the senders' own
 * limits.
 *
 * Locks, in this order: registry (names) -> bell (an object's accept queue and wake-up flags);
 * channel (mailboxes and both ends) -> bell. The bell is last everywhere; no upcall is made under a lock. */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/log.h"
#include "common/net/net_private.h"

/* Messages taken from one link before the next has its turn. */
enum { LOCAL_TURN_MAX = 64 };
/* The layer's own messages on their way, per link. */
enum { LOCAL_NOTES_MAX = 8 };

typedef struct local_net local_net;
typedef struct local_channel local_channel;

typedef struct local_send {
    TAILQ_ENTRY(local_send) entry;
    void *cookie;
    cm_status status; /* once in done */
    uint16_t type;
    uint32_t header_bytes, n_iov;
    net_iov iov[NET_IOV_MAX];
    uint64_t payload_bytes;
    uint8_t header[NET_WIRE_HEADER_MAX];
} local_send;
TAILQ_HEAD(local_send_list, local_send);

typedef struct local_end {
    local_net *net; /* whom to ring; NULL before it accepted and once closed */
    bool closed;
    struct local_send_list urgent; /* to this end: the layer's own messages */
    struct local_send_list inbox;  /* to this end: the user's */
    struct local_send_list done;   /* sent by this end and dealt with */
} local_end;

struct local_channel {
    pthread_mutex_t lock;              /* protects all below and, while queued here, the sends */
    uint32_t n_refs;                   /* ends not closed */
    bool refused;                      /* the accepting end closed before it was a link */
    local_end end[2];                  /* 0 connected, 1 accepted */
    STAILQ_ENTRY(local_channel) entry; /* of the listener's accept queue, under its bell */
    char address[NET_ADDRESS_BYTES];
};
STAILQ_HEAD(local_channel_list, local_channel);

struct net_backend_link {
    TAILQ_ENTRY(net_backend_link) entry;
    void *peer;
    local_channel *channel; /* NULL: nobody listens at that name */
    uint32_t i_end;
    bool gone; /* disconnected; freed when the progress in progress no longer needs it */
};
TAILQ_HEAD(local_link_list, net_backend_link);

typedef struct local_receive {
    void *buffer;
    uint8_t header[NET_WIRE_HEADER_MAX] __attribute__((aligned(8)));
} local_receive;

struct local_net {
    const net_options *options;
    const net_upcalls *upcalls;
    void *ctx;
    char name[NET_ADDRESS_BYTES]; /* listened at; "" = not */
    LIST_ENTRY(local_net) listening;
    cm_pool links, sends, receives;
    net_buffers buffers;
    struct local_link_list live, gone;
    struct local_send_list cancelled; /* of disconnected links: to be reported */
    bool starved;                     /* a message waits for a receive */

    pthread_mutex_t bell; /* protects the rest */
    bool rung;            /* something may have come */
    bool armed;           /* the owner sleeps on fd or is about to */
    bool signalled;       /* fd is readable */
    int fd;
    struct local_channel_list accepts;
    uint32_t n_accepts;
};

static pthread_mutex_t g_registry_lock =
    PTHREAD_MUTEX_INITIALIZER; /* protects g_listeners and the names in it */
static LIST_HEAD(, local_net) g_listeners = LIST_HEAD_INITIALIZER(g_listeners);

/* ---- wake-up ---- */

static void local_ring_locked(local_net *ln)
{
    ln->rung = true;
    if (ln->armed && !ln->signalled) {
        uint64_t one = 1;
        ln->signalled = write(ln->fd, &one, sizeof(one)) == (ssize_t)sizeof(one);
        CM_ASSERT(ln->signalled);
    }
    ln->armed = false;
}

static void local_ring(local_net *ln)
{
    pthread_mutex_lock(&ln->bell);
    local_ring_locked(ln);
    pthread_mutex_unlock(&ln->bell);
}

/* true if the bell was rung since the last time; hands out the accept queue. */
static bool local_hear(local_net *ln, struct local_channel_list *accepts_out)
{
    STAILQ_INIT(accepts_out);
    pthread_mutex_lock(&ln->bell);
    bool rung = ln->rung;
    ln->rung = ln->armed = false;
    if (ln->signalled) {
        uint64_t count;
        ln->signalled = read(ln->fd, &count, sizeof(count)) != (ssize_t)sizeof(count);
        CM_ASSERT(!ln->signalled);
    }
    STAILQ_CONCAT(accepts_out, &ln->accepts);
    ln->n_accepts = 0;
    pthread_mutex_unlock(&ln->bell);
    return rung;
}

static bool local_arm(void *backend)
{
    local_net *ln = backend;
    pthread_mutex_lock(&ln->bell);
    ln->armed = !ln->rung;
    bool armed = ln->armed;
    pthread_mutex_unlock(&ln->bell);
    return armed;
}

static int local_fd(const void *backend)
{
    return ((const local_net *)backend)->fd;
}

/* ---- channels ---- */

static local_channel *local_channel_create(local_net *connector, const char *address)
{
    local_channel *channel = cm_alloc(sizeof(*channel));
    pthread_mutex_init(&channel->lock, NULL);
    channel->n_refs = 2;
    channel->end[0].net = connector;
    snprintf(channel->address, sizeof(channel->address), "%s", address);
    for (int i = 0; i < 2; i++) {
        TAILQ_INIT(&channel->end[i].urgent);
        TAILQ_INIT(&channel->end[i].inbox);
        TAILQ_INIT(&channel->end[i].done);
    }
    return channel;
}

/* The receiving end has dealt with a send: back to its owner's done list. */
static void local_send_finish(local_end *sender, struct local_send_list *from, local_send *send,
                              cm_status status)
{
    TAILQ_REMOVE(from, send, entry);
    send->status = status;
    TAILQ_INSERT_TAIL(&sender->done, send, entry);
}

static void local_finish_all(local_end *sender, struct local_send_list *from, cm_status status)
{
    while (!TAILQ_EMPTY(from)) {
        local_send_finish(sender, from, TAILQ_FIRST(from), status);
    }
}

/* Closes one end and lets go of the channel. Whatever this end sent and the other did not take is its own
 * again and goes to mine_out; what it did not take goes back to the other as lost. After this, nothing of
 * either owner's memory is in the other's hands. */
static void local_channel_close(local_channel *channel, uint32_t i_end, bool refused,
                                struct local_send_list *mine_out)
{
    local_end *mine = &channel->end[i_end], *other = &channel->end[1 - i_end];
    pthread_mutex_lock(&channel->lock);
    mine->net = NULL;
    mine->closed = true;
    channel->refused = refused;
    local_finish_all(mine, &other->urgent, CM_E_RESET);
    local_finish_all(mine, &other->inbox, CM_E_RESET);
    TAILQ_CONCAT(mine_out, &mine->done, entry);
    local_finish_all(other, &mine->urgent, CM_E_RESET);
    local_finish_all(other, &mine->inbox, CM_E_RESET);
    if (other->net != NULL) {
        local_ring(other->net);
    }
    bool last = --channel->n_refs == 0;
    pthread_mutex_unlock(&channel->lock);
    if (last) {
        pthread_mutex_destroy(&channel->lock);
        cm_free(channel);
    }
}

/* ---- links ---- */

static net_backend_link *local_link_create(local_net *ln, void *peer, local_channel *channel, uint32_t i_end)
{
    net_backend_link *link;
    if (cm_pool_get(&ln->links, (void **)&link) != CM_OK) {
        return NULL;
    }
    *link = (net_backend_link){.peer = peer, .channel = channel, .i_end = i_end};
    TAILQ_INSERT_TAIL(&ln->live, link, entry);
    return link;
}

/* Also safe from inside an upcall: the memory waits in gone for the end of the progress. */
static void local_disconnect(void *backend, net_backend_link *link)
{
    local_net *ln = backend;
    CM_ASSERT(!link->gone);
    if (link->channel != NULL) {
        local_channel_close(link->channel, link->i_end, false, &ln->cancelled);
    }
    link->gone = true;
    TAILQ_REMOVE(&ln->live, link, entry);
    TAILQ_INSERT_TAIL(&ln->gone, link, entry);
    local_ring(ln);
}

static void local_report(local_net *ln, struct local_send_list *done)
{
    while (!TAILQ_EMPTY(done)) {
        local_send *send = TAILQ_FIRST(done);
        TAILQ_REMOVE(done, send, entry);
        ln->upcalls->sent(ln->ctx, NULL, send->cookie, send->status);
        cm_pool_put(&ln->sends, send);
    }
}

static void local_link_down(local_net *ln, net_backend_link *link, cm_status status)
{
    void *peer = link->peer;
    local_disconnect(ln, link);
    local_report(ln, &ln->cancelled); /* its sends first, as promised */
    ln->upcalls->down(ln->ctx, peer, status);
}

/* Puts a new channel into a listener's accept queue, or refuses it there and then. Under the registry lock.
 */
static void local_offer(local_net *listener, local_channel *channel)
{
    pthread_mutex_lock(&listener->bell);
    bool room = listener->n_accepts < listener->options->peers_max;
    if (room) {
        STAILQ_INSERT_TAIL(&listener->accepts, channel, entry);
        listener->n_accepts++;
        local_ring_locked(listener);
    }
    pthread_mutex_unlock(&listener->bell);
    if (!room) {
        struct local_send_list none = TAILQ_HEAD_INITIALIZER(none);
        local_channel_close(channel, 1, true, &none);
    }
}

static cm_status local_connect(void *backend, const char *address, void *peer, net_backend_link **link_out,
                               cm_error *err)
{
    local_net *ln = backend;
    size_t n = strlen(address);
    if (n == 0 || n >= NET_ADDRESS_BYTES) {
        return cm_error_set(err, CM_E_INVALID, "address", "a local name has 1 to %d bytes, '%s' has %zu",
                            NET_ADDRESS_BYTES - 1, address, n);
    }
    net_backend_link *link = local_link_create(ln, peer, NULL, 0);
    if (link == NULL) {
        return cm_error_set(err, CM_E_CAPACITY, "address", "no link to '%s': all %u are in use or closing",
                            address, ln->links.n_max);
    }
    pthread_mutex_lock(&g_registry_lock);
    local_net *it;
    LIST_FOREACH (it, &g_listeners, listening) {
        if (strcmp(it->name, address) == 0) {
            link->channel = local_channel_create(ln, address);
            local_offer(it, link->channel);
            break;
        }
    }
    pthread_mutex_unlock(&g_registry_lock);
    local_ring(ln);
    *link_out = link;
    return CM_OK;
}

static void local_accept(local_net *ln, local_channel *channel)
{
    pthread_mutex_lock(&channel->lock);
    channel->end[1].net = ln;
    pthread_mutex_unlock(&channel->lock);
    net_backend_link *link = local_link_create(ln, NULL, channel, 1);
    void *peer = link != NULL ? ln->upcalls->accepted(ln->ctx, link, channel->address) : NULL;
    if (peer != NULL) {
        link->peer = peer;
        return;
    }
    if (link != NULL) {
        TAILQ_REMOVE(&ln->live, link, entry);
        cm_pool_put(&ln->links, link);
    }
    struct local_send_list none = TAILQ_HEAD_INITIALIZER(none);
    local_channel_close(channel, 1, true, &none);
}

/* ---- messages ---- */

static cm_status local_send_message(void *backend, net_backend_link *link, const net_message *message,
                                    void *send_cookie)
{
    local_net *ln = backend;
    local_send *send;
    CM_ASSERT(!link->gone && message->header_bytes <= NET_WIRE_HEADER_MAX);
    if (link->channel == NULL) {
        return CM_E_RESET;
    }
    if (cm_pool_get(&ln->sends, (void **)&send) != CM_OK) {
        return CM_AGAIN;
    }
    send->cookie = send_cookie;
    send->type = message->type;
    send->header_bytes = message->header_bytes;
    if (message->header_bytes > 0) {
        memcpy(send->header, message->header, message->header_bytes);
    }
    send->n_iov = message->n_iov;
    for (uint32_t i = 0; i < message->n_iov; i++) {
        send->iov[i] = message->iov[i];
        send->payload_bytes += message->iov[i].n_bytes;
    }

    local_channel *channel = link->channel;
    local_end *other = &channel->end[1 - link->i_end];
    pthread_mutex_lock(&channel->lock);
    bool open = !other->closed;
    if (open) {
        if (message->type >= NET_TYPE_INTERNAL) {
            TAILQ_INSERT_TAIL(&other->urgent, send, entry);
        } else {
            TAILQ_INSERT_TAIL(&other->inbox, send, entry);
        }
        if (other->net != NULL) { /* an end still in the accept queue looks when it is taken from there */
            local_ring(other->net);
        }
    }
    pthread_mutex_unlock(&channel->lock);
    if (!open) {
        cm_pool_put(&ln->sends, send);
        return CM_E_RESET;
    }
    return CM_OK;
}

/* One message as it comes out of a mailbox. */
typedef struct local_taken {
    net_event event;
    uint8_t header[NET_WIRE_HEADER_MAX] __attribute__((aligned(8)));
} local_taken;

static bool local_take_urgent(net_backend_link *link, local_taken *taken_out)
{
    local_channel *channel = link->channel;
    local_end *mine = &channel->end[link->i_end], *other = &channel->end[1 - link->i_end];
    pthread_mutex_lock(&channel->lock);
    local_send *send = TAILQ_FIRST(&mine->urgent);
    if (send != NULL) {
        taken_out->event =
            (net_event){.type = send->type, .header = taken_out->header, .header_bytes = send->header_bytes};
        memcpy(taken_out->header, send->header, send->header_bytes);
        local_send_finish(other, &mine->urgent, send, CM_OK);
        local_ring(other->net);
    }
    pthread_mutex_unlock(&channel->lock);
    return send != NULL;
}

/* CM_OK: a message was copied into receive; CM_AGAIN: there is none; CM_E_PROTOCOL: it is too big. */
static cm_status local_take(local_net *ln, net_backend_link *link, local_receive *receive,
                            net_event *event_out)
{
    local_channel *channel = link->channel;
    local_end *mine = &channel->end[link->i_end], *other = &channel->end[1 - link->i_end];
    cm_status status = CM_AGAIN;
    pthread_mutex_lock(&channel->lock);
    local_send *send = TAILQ_FIRST(&mine->inbox);
    if (send == NULL) {
        goto out_unlock;
    }
    if (send->payload_bytes > ln->options->message_bytes_max) {
        cm_warn("peer %s broke the protocol: message of %llu bytes, %llu are allowed", channel->address,
                (unsigned long long)send->payload_bytes, (unsigned long long)ln->options->message_bytes_max);
        status = CM_E_PROTOCOL;
        goto out_unlock;
    }
    *event_out = (net_event){.type = send->type,
                             .header = receive->header,
                             .header_bytes = send->header_bytes,
                             .payload = receive->buffer,
                             .payload_bytes = send->payload_bytes,
                             .receive = receive};
    memcpy(receive->header, send->header, send->header_bytes);
    /* copied under the lock: the sender may take its memory back only under it */
    uint8_t *to = receive->buffer;
    for (uint32_t i = 0; i < send->n_iov; i++) {
        if (send->iov[i].n_bytes > 0) {
            memcpy(to, send->iov[i].data, send->iov[i].n_bytes);
            to += send->iov[i].n_bytes;
        }
    }
    local_send_finish(other, &mine->inbox, send, CM_OK);
    local_ring(other->net);
    status = CM_OK;
out_unlock:
    pthread_mutex_unlock(&channel->lock);
    return status;
}

static void local_release(void *backend, void *receive_arg)
{
    local_net *ln = backend;
    local_receive *receive = receive_arg;
    net_buffers_put(&ln->buffers, receive->buffer);
    cm_pool_put(&ln->receives, receive);
    if (ln->starved) {
        ln->starved = false;
        local_ring(ln);
    }
}

static void local_serve_inbox(local_net *ln, net_backend_link *link)
{
    for (uint32_t i = 0; i < LOCAL_TURN_MAX && !link->gone; i++) {
        local_receive *receive;
        net_event event;
        if (cm_pool_get(&ln->receives, (void **)&receive) != CM_OK) {
            ln->starved = true;
            return;
        }
        receive->buffer = net_buffers_get(&ln->buffers);
        cm_status status = local_take(ln, link, receive, &event);
        if (status != CM_OK) {
            net_buffers_put(&ln->buffers, receive->buffer);
            cm_pool_put(&ln->receives, receive);
            if (status == CM_E_PROTOCOL) {
                local_link_down(ln, link, CM_E_PROTOCOL);
            }
            return;
        }
        ln->upcalls->received(ln->ctx, link->peer, &event);
    }
    local_ring(ln); /* the turn is over, not the mailbox */
}

static void local_serve_done(local_net *ln, net_backend_link *link)
{
    struct local_send_list done = TAILQ_HEAD_INITIALIZER(done);
    pthread_mutex_lock(&link->channel->lock);
    TAILQ_CONCAT(&done, &link->channel->end[link->i_end].done, entry);
    pthread_mutex_unlock(&link->channel->lock);
    local_report(ln, &done);
}

static void local_serve(local_net *ln, net_backend_link *link)
{
    if (link->channel == NULL) {
        local_link_down(ln, link, CM_E_UNREACHABLE);
        return;
    }
    local_taken taken;
    while (!link->gone && local_take_urgent(link, &taken)) {
        ln->upcalls->received(ln->ctx, link->peer, &taken.event);
    }
    if (!link->gone) {
        local_serve_inbox(ln, link);
    }
    if (!link->gone) {
        pthread_mutex_lock(&link->channel->lock);
        bool refused = link->channel->refused;
        bool closed = link->channel->end[1 - link->i_end].closed;
        pthread_mutex_unlock(&link->channel->lock);
        local_serve_done(ln, link);
        if (closed && !link->gone) {
            local_link_down(ln, link, refused ? CM_E_REFUSED : CM_OK);
        }
    }
}

static void local_reap(local_net *ln)
{
    while (!TAILQ_EMPTY(&ln->gone)) {
        net_backend_link *link = TAILQ_FIRST(&ln->gone);
        TAILQ_REMOVE(&ln->gone, link, entry);
        cm_pool_put(&ln->links, link);
    }
}

static bool local_progress(void *backend)
{
    local_net *ln = backend;
    struct local_channel_list accepts;
    if (!local_hear(ln, &accepts)) {
        return false;
    }
    while (!STAILQ_EMPTY(&accepts)) {
        local_channel *channel = STAILQ_FIRST(&accepts);
        STAILQ_REMOVE_HEAD(&accepts, entry);
        local_accept(ln, channel);
    }
    net_backend_link *link = TAILQ_FIRST(&ln->live);
    while (link != NULL) {
        net_backend_link *next = TAILQ_NEXT(link, entry);
        local_serve(ln, link);
        link = next;
    }
    local_report(ln, &ln->cancelled);
    local_reap(ln);
    return true;
}

/* ---- open, listen, close ---- */

static cm_status local_open(const net_options *options, const net_upcalls *upcalls, void *ctx,
                            void **backend_out, cm_error *err)
{
    local_net *ln = cm_alloc(sizeof(*ln));
    *ln = (local_net){.options = options, .upcalls = upcalls, .ctx = ctx};
    cm_status status = net_buffers_init(&ln->buffers, options->receives_max, options->message_bytes_max, err);
    if (status != CM_OK) {
        goto err_free;
    }
    ln->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (ln->fd < 0) {
        status = cm_error_set(err, CM_E_DEVICE, "backend", "no eventfd: %s", strerror(errno));
        goto err_buffers;
    }
    uint32_t n_links = 2 * options->peers_max; /* those just disconnected count until the next progress */
    cm_pool_init(&ln->links, "local links", sizeof(net_backend_link), n_links);
    cm_pool_init(&ln->sends, "local sends", sizeof(local_send),
                 n_links * (options->sends_max + LOCAL_NOTES_MAX));
    cm_pool_init(&ln->receives, "local receives", sizeof(local_receive), options->receives_max);
    TAILQ_INIT(&ln->live);
    TAILQ_INIT(&ln->gone);
    TAILQ_INIT(&ln->cancelled);
    STAILQ_INIT(&ln->accepts);
    pthread_mutex_init(&ln->bell, NULL);
    *backend_out = ln;
    return CM_OK;

err_buffers:
    net_buffers_fini(&ln->buffers);
err_free:
    cm_free(ln);
    return status;
}

static cm_status local_listen(void *backend, const char *address, char bound_out[NET_ADDRESS_BYTES],
                              cm_error *err)
{
    local_net *ln = backend;
    size_t n = strlen(address);
    CM_ASSERT(ln->name[0] == 0);
    if (n == 0 || n >= NET_ADDRESS_BYTES) {
        return cm_error_set(err, CM_E_INVALID, "address", "a local name has 1 to %d bytes, '%s' has %zu",
                            NET_ADDRESS_BYTES - 1, address, n);
    }
    cm_status status = CM_OK;
    pthread_mutex_lock(&g_registry_lock);
    const local_net *it;
    LIST_FOREACH (it, &g_listeners, listening) {
        if (strcmp(it->name, address) == 0) {
            status = cm_error_set(err, CM_E_EXISTS, "address", "local name '%s' is taken", address);
            goto out_unlock;
        }
    }
    memcpy(ln->name, address, n + 1);
    memcpy(bound_out, address, n + 1);
    LIST_INSERT_HEAD(&g_listeners, ln, listening);
out_unlock:
    pthread_mutex_unlock(&g_registry_lock);
    return status;
}

static void local_close(void *backend)
{
    local_net *ln = backend;
    if (ln->name[0] != 0) {
        pthread_mutex_lock(&g_registry_lock);
        LIST_REMOVE(ln, listening);
        pthread_mutex_unlock(&g_registry_lock);
    }
    /* nobody can find this object any more: the accept queue no longer grows */
    struct local_channel_list accepts;
    (void)local_hear(ln, &accepts);
    while (!STAILQ_EMPTY(&accepts)) {
        local_channel *channel = STAILQ_FIRST(&accepts);
        STAILQ_REMOVE_HEAD(&accepts, entry);
        local_channel_close(channel, 1, true, &ln->cancelled);
    }
    while (!TAILQ_EMPTY(&ln->live)) {
        local_disconnect(ln, TAILQ_FIRST(&ln->live));
    }
    local_reap(ln);
    while (!TAILQ_EMPTY(&ln->cancelled)) {
        local_send *send = TAILQ_FIRST(&ln->cancelled);
        TAILQ_REMOVE(&ln->cancelled, send, entry);
        cm_pool_put(&ln->sends, send);
    }
    pthread_mutex_destroy(&ln->bell);
    close(ln->fd);
    cm_pool_fini(&ln->receives);
    cm_pool_fini(&ln->sends);
    cm_pool_fini(&ln->links);
    net_buffers_fini(&ln->buffers);
    cm_free(ln);
}

const net_ops net_local_ops = {
    .version = NET_PROTOCOL,
    .name = "local",
    .open = local_open,
    .close = local_close,
    .listen = local_listen,
    .connect = local_connect,
    .disconnect = local_disconnect,
    .send = local_send_message,
    .progress = local_progress,
    .release = local_release,
    .fd = local_fd,
    .arm = local_arm,
};
