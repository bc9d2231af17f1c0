/* Links between processes of one user on one machine. What an exchange of rows costs here is one copy by the
 * sender, or none if it built them where the receiver reads (net_room), and the receiver's misses; nothing of
 * it goes through the kernel while both are awake. */
#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/rng.h"
#include "common/net/net_shm_private.h"

enum {
    SHM_LOOK_TURNS = 128, /* turns between two looks at the sockets while the owner does not sleep */
    SHM_TURN_MAX = 64,    /* messages taken from one link before the next has its turn */
    SHM_EVENTS = 16,
    SHM_BACKLOG = 128,
    SHM_NOTES_OUT = 8, /* the layer's own sent and not yet reported, per link */
    SHM_CROWDED = 32,  /* messages in a row from our own core: both ends share it */
    SHM_OFF_MS = 250,  /* to keep off a core */
};

#define SHM_NAMES "baleen/" /* of abstract sockets; nothing of them lies in the file system */

typedef struct shm_net shm_net;

typedef struct shm_send {
    STAILQ_ENTRY(shm_send) entry; /* of link->waiting or of shm_net.done */
    void *cookie;
    cm_status status; /* once in done */
    net_message message;
    uint64_t payload_bytes;
    uint8_t header[NET_WIRE_HEADER_MAX];
} shm_send;
STAILQ_HEAD(shm_send_list, shm_send);

/* A receiver's side, apart from its link: messages outlive that. */
typedef struct shm_inflow {
    shm_rx rx;
    struct net_backend_link *link; /* NULL: gone */
} shm_inflow;

struct net_backend_link {
    TAILQ_ENTRY(net_backend_link) entry;
    shm_net *net;
    void *peer;    /* NULL: not accepted yet, or disconnected by the layer */
    int fd;        /* -1: nobody was there */
    int bell;      /* wakes the peer; -1: not given yet */
    bool accepted; /* by us: the layer is asked once the greeting is here */
    bool follows;  /* accepted: of two ends on one core the other one moves first */
    bool peer_gone;
    uint32_t n_crowded; /* messages in a row that were sent from our core */
    bool closing;       /* the next progress forgets it */
    cm_status end_status;
    char address[NET_ADDRESS_BYTES];
    shm_tx tx;
    shm_inflow *in;
    struct shm_send_list waiting; /* for room */
};
TAILQ_HEAD(shm_link_list, net_backend_link);

typedef struct shm_receive {
    shm_inflow *in;
    shm_slot *slot;
    uint8_t header[NET_WIRE_HEADER_MAX] __attribute__((aligned(8)));
} shm_receive;

struct shm_net {
    const net_options *options;
    const net_upcalls *upcalls;
    void *ctx;
    int epoll, listener; /* listener -1: does not listen */
    int bell; /* peers ring it to wake us. No byte over the socket: the kernel takes who sends one for about
                 to wait, and moves the receiver to the sender's core, which then is not about to wait at all
               */
    cm_pool links, inflows, sends, receives;
    struct shm_link_list all;
    struct shm_send_list done;
    uint32_t n_closing;
    uint32_t n_turn;
    uint32_t off_cpu;      /* left to a peer */
    uint64_t off_until_ms; /* 0: none is */
    bool armed;            /* segments say that we sleep, or will */
    bool dirty;            /* something was done since the last progress that it must look after */
};

static void fd_close(int fd)
{
    if (fd >= 0) {
        close(fd);
    }
}

/* ---- names ---- */

static cm_status shm_name(const char *address, struct sockaddr_un *name_out, socklen_t *n_out, cm_error *err)
{
    size_t n = strlen(address), prefix = sizeof(SHM_NAMES) - 1;
    if (n == 0 || n + prefix + 1 > sizeof(name_out->sun_path)) {
        return cm_error_set(err, CM_E_INVALID, "address",
                            "a name for shared memory has 1 to %zu bytes, '%s' has %zu",
                            sizeof(name_out->sun_path) - prefix - 1, address, n);
    }
    *name_out = (struct sockaddr_un){.sun_family = AF_UNIX};
    memcpy(name_out->sun_path + 1, SHM_NAMES, prefix);
    memcpy(name_out->sun_path + 1 + prefix, address, n);
    *n_out = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + prefix + n);
    return CM_OK;
}

/* ---- links ---- */

static void link_close(net_backend_link *link, cm_status status)
{
    if (!link->closing) {
        link->closing = true;
        link->end_status = status;
        link->net->n_closing++;
        link->net->dirty = true;
    }
}

static net_backend_link *link_create(shm_net *s, void *peer, const char *address)
{
    net_backend_link *link;
    if (cm_pool_get(&s->links, (void **)&link) != CM_OK) {
        return NULL;
    }
    cm_status status = cm_pool_get(&s->inflows, (void **)&link->in);
    CM_ASSERT(status == CM_OK); /* a receive each, beside the links */
    link->net = s;
    link->peer = peer;
    link->fd = link->bell = -1;
    link->in->link = link;
    snprintf(link->address, sizeof(link->address), "%s", address);
    STAILQ_INIT(&link->waiting);
    TAILQ_INSERT_TAIL(&s->all, link, entry);
    return link;
}

static void inflow_free_if_done(shm_net *s, shm_inflow *in)
{
    if (in->link == NULL && in->rx.n_held == 0) {
        shm_rx_close(&in->rx);
        cm_pool_put(&s->inflows, in);
    }
}

static void link_hang_up(net_backend_link *link)
{
    fd_close(link->fd); /* leaves the epoll with it */
    fd_close(link->bell);
    link->fd = link->bell = -1;
}

static void link_free(net_backend_link *link)
{
    shm_net *s = link->net;
    link_hang_up(link);
    shm_tx_close(&link->tx);
    link->in->link = NULL;
    inflow_free_if_done(s, link->in);
    TAILQ_REMOVE(&s->all, link, entry);
    cm_pool_put(&s->links, link);
}

/* The other side sleeps or waits, and is told so once. Its flag stays as long as we have no bell of it: that
 * rings when its greeting comes. One that cannot be rung any louder is heard. */
static void wake_if(const net_backend_link *link, _Atomic uint32_t *flag)
{
    uint64_t one = 1;
    if (link->bell >= 0 && atomic_load(flag) != 0 && atomic_exchange(flag, 0) != 0) {
        ssize_t n = write(link->bell, &one, sizeof(one));
        (void)n;
    }
}

static void send_finish(shm_net *s, shm_send *send, cm_status status)
{
    send->status = status;
    STAILQ_INSERT_TAIL(&s->done, send, entry);
    s->dirty = true;
}

static void link_cancel_waiting(net_backend_link *link, cm_status status)
{
    while (!STAILQ_EMPTY(&link->waiting)) {
        shm_send *send = STAILQ_FIRST(&link->waiting);
        STAILQ_REMOVE_HEAD(&link->waiting, entry);
        send_finish(link->net, send, status);
    }
}

/* What was sent is in the other's memory: it finds that, and then the end. */
static void shm_disconnect(void *backend, net_backend_link *link)
{
    (void)backend;
    link->peer = NULL;
    link_cancel_waiting(link, CM_E_CANCELLED);
    if (link->tx.segment != NULL) {
        atomic_store(&link->tx.segment->ended, 1);
    }
    link_hang_up(link);
    link_close(link, CM_E_CANCELLED);
}

/* ---- greeting ---- */

enum { GREETING_FDS = 2 }; /* segment, bell */

typedef union greeting_control {
    struct cmsghdr head;
    uint8_t space[CMSG_SPACE(GREETING_FDS * sizeof(int))];
} greeting_control;

static cm_status link_greet(net_backend_link *link)
{
    int fds[GREETING_FDS] = {-1, link->net->bell};
    CM_TRY(shm_tx_open(&link->tx, link->net->options->message_bytes_max, &fds[0]));
    shm_greeting greeting = {SHM_MAGIC, SHM_VERSION, link->tx.area_bytes};
    greeting_control control = {0};
    struct iovec iov = {&greeting, sizeof(greeting)};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    *head = (struct cmsghdr){
        .cmsg_len = CMSG_LEN(sizeof(fds)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
    memcpy(CMSG_DATA(head), fds, sizeof(fds));
    ssize_t n = sendmsg(link->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    close(fds[0]);
    return n == sizeof(greeting) ? CM_OK : CM_E_RESET;
}

static cm_status link_watch(net_backend_link *link)
{
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = link};
    return epoll_ctl(link->net->epoll, EPOLL_CTL_ADD, link->fd, &event) == 0 ? CM_OK : CM_E_DEVICE;
}

/* Their greeting with its descriptors. CM_AGAIN: nothing there yet. */
static cm_status link_hear(net_backend_link *link)
{
    shm_greeting greeting = {0};
    int fds[GREETING_FDS] = {-1, -1};
    greeting_control control = {0};
    struct iovec iov = {&greeting, sizeof(greeting)};
    struct msghdr message = {
        .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    ssize_t n = recvmsg(link->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return CM_AGAIN;
    }
    struct cmsghdr *head = n >= 0 ? CMSG_FIRSTHDR(&message) : NULL; /* even nothing can carry descriptors */
    if (head != NULL && head->cmsg_type == SCM_RIGHTS) {
        size_t n_bytes = head->cmsg_len - CMSG_LEN(0); /* there is room for so many and no more */
        memcpy(fds, CMSG_DATA(head), n_bytes < sizeof(fds) ? n_bytes : sizeof(fds));
    }
    cm_status status = n <= 0 ? CM_E_REFUSED : CM_E_PROTOCOL; /* it ended before it greeted */
    if (n == sizeof(greeting) && fds[1] >= 0 && greeting.magic == SHM_MAGIC &&
        greeting.version == SHM_VERSION) {
        status = shm_rx_open(&link->in->rx, fds[0], greeting.area_bytes);
        link->bell = fds[1];
        fds[1] = -1;
    }
    fd_close(fds[0]);
    fd_close(fds[1]);
    return status;
}

/* A stranger has greeted: the layer takes it or not. */
static cm_status link_accept(net_backend_link *link)
{
    shm_net *s = link->net;
    link->accepted = false;
    link->peer = s->upcalls->accepted(s->ctx, link, link->address);
    return link->peer != NULL ? link_greet(link)
                              : CM_E_REFUSED; /* refused: it hears the end and no greeting */
}

/* What the socket has: the greeting, the end. */
static void link_on_socket(net_backend_link *link)
{
    if (link->in->rx.segment == NULL) {
        cm_status status = link_hear(link);
        if (status == CM_OK && link->accepted) {
            status = link_accept(link);
        }
        if (status < 0) {
            link_close(link, status);
        }
        if (status != CM_OK) {
            return;
        }
        wake_if(link, &link->tx.segment->receiver_sleeps); /* over what it was sent before we had its bell */
    }
    char byte;
    ssize_t n = recv(link->fd, &byte, sizeof(byte), MSG_DONTWAIT);
    if (n >= 0 || (errno != EAGAIN && errno != EINTR)) { /* nobody says anything after the greeting */
        link->peer_gone = true;
        link_hang_up(link);
    }
}

/* ---- connect, listen, accept ---- */

/* The kernel says who is there: nobody but processes of our own user, who could do with our memory what they
 * want anyway. */
static bool peer_is_ours(int fd, struct ucred *who_out)
{
    socklen_t n = sizeof(*who_out);
    *who_out = (struct ucred){0};
    return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, who_out, &n) == 0 && who_out->uid == geteuid();
}

/* A name is free again when its process is gone, and anybody's then. */
static cm_status check_listener(int fd, const char *address)
{
    struct ucred who;
    if (peer_is_ours(fd, &who)) {
        return CM_OK;
    }
    cm_warn("'%s' is held by process %d of user %u: shared memory is for processes of one user", address,
            (int)who.pid, who.uid);
    return CM_E_REFUSED;
}

static cm_status shm_connect(void *backend, const char *address, void *peer, net_backend_link **link_out,
                             cm_error *err)
{
    shm_net *s = backend;
    struct sockaddr_un name;
    socklen_t n_name;
    CM_TRY(shm_name(address, &name, &n_name, err));
    net_backend_link *link = link_create(s, peer, address);
    if (link == NULL) {
        return cm_error_set(err, CM_E_CAPACITY, "address", "no link to '%s': all %u are in use or closing",
                            address, s->links.n_max);
    }
    link->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    cm_status status = CM_E_DEVICE;
    if (link->fd >= 0) {
        status = connect(link->fd, (struct sockaddr *)&name, n_name) == 0 ? check_listener(link->fd, address)
                                                                          : CM_E_UNREACHABLE;
    }
    if (status == CM_OK) {
        status = link_watch(link);
    }
    if (status == CM_OK) {
        status = link_greet(link);
    }
    if (status != CM_OK) {
        link_close(link, status);
    }
    *link_out = link;
    return CM_OK;
}

static cm_status shm_listen(void *backend, const char *address, char bound_out[NET_ADDRESS_BYTES],
                            cm_error *err)
{
    shm_net *s = backend;
    struct sockaddr_un name;
    socklen_t n_name;
    char own[NET_ADDRESS_BYTES];
    size_t n = strlen(address);
    CM_ASSERT(s->listener < 0);
    if (n >= 2 && strcmp(address + n - 2, ":0") == 0) { /* any free one */
        snprintf(own, sizeof(own), "shm-%016llx", (unsigned long long)cm_random_u64());
        address = own;
    }
    CM_TRY(shm_name(address, &name, &n_name, err));
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&name, n_name) != 0 || listen(fd, SHM_BACKLOG) != 0 ||
        epoll_ctl(s->epoll, EPOLL_CTL_ADD, fd, &event) != 0) {
        int error = errno;
        fd_close(fd);
        return cm_error_set(err, error == EADDRINUSE ? CM_E_EXISTS : CM_E_DEVICE, "address",
                            "cannot listen at '%s': %s", address,
                            error == EADDRINUSE ? "the name is taken" : strerror(error));
    }
    s->listener = fd;
    snprintf(bound_out, NET_ADDRESS_BYTES, "%s", address);
    return CM_OK;
}

static bool stranger_is_ours(int fd, char address_out[NET_ADDRESS_BYTES])
{
    struct ucred who;
    bool ours = peer_is_ours(fd, &who);
    snprintf(address_out, NET_ADDRESS_BYTES, "process %d", (int)who.pid);
    if (!ours) {
        cm_warn("link from process %d of user %u refused: shared memory is for processes of one user",
                (int)who.pid, who.uid);
    }
    return ours;
}

static void shm_accept_all(shm_net *s)
{
    int fd;
    while ((fd = accept4(s->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        char address[NET_ADDRESS_BYTES];
        net_backend_link *link = stranger_is_ours(fd, address) ? link_create(s, NULL, address) : NULL;
        if (link == NULL) {
            close(fd);
            continue;
        }
        link->fd = fd;
        link->accepted = link->follows = true;
        if (link_watch(link) != CM_OK) {
            link_close(link, CM_E_DEVICE);
        }
        link_on_socket(link); /* it has greeted already, as a rule */
    }
}

/* ---- messages ---- */

static cm_status shm_send_message(void *backend, net_backend_link *link, const net_message *message,
                                  void *send_cookie)
{
    shm_net *s = backend;
    shm_send *send;
    CM_ASSERT(message->header_bytes <= NET_WIRE_HEADER_MAX);
    if (link->closing || link->peer_gone || link->tx.segment == NULL) {
        return CM_E_RESET;
    }
    if (cm_pool_get(&s->sends, (void **)&send) != CM_OK) {
        return CM_AGAIN;
    }
    send->cookie = send_cookie;
    for (uint32_t i = 0; i < message->n_iov; i++) {
        send->payload_bytes += message->iov[i].n_bytes;
    }
    bool internal = message->type >= NET_TYPE_INTERNAL;
    cm_status status = internal || STAILQ_EMPTY(&link->waiting)
                           ? shm_tx_put(&link->tx, message, send->payload_bytes)
                           : CM_AGAIN;
    if (status == CM_OK) {
        wake_if(link, &link->tx.segment->receiver_sleeps);
        send_finish(s, send, CM_OK);
    } else if (internal) {
        cm_pool_put(&s->sends, send);
        return CM_AGAIN; /* the peer does not look at what it has */
    } else {
        send->message = *message;
        memcpy(send->header, message->header, message->header_bytes);
        send->message.header = send->header;
        STAILQ_INSERT_TAIL(&link->waiting, send, entry);
        s->dirty = true;
    }
    return CM_OK;
}

static void *shm_room(void *backend, net_backend_link *link, uint64_t n_bytes)
{
    const shm_net *s = backend;
    bool may = !link->closing && !link->peer_gone && link->tx.segment != NULL &&
               STAILQ_EMPTY(&link->waiting) && s->sends.n_used < s->sends.n_max;
    return may ? shm_tx_room(&link->tx, n_bytes) : NULL;
}

/* Those that waited, as far as there is room now. */
static bool link_send_on(net_backend_link *link)
{
    bool did = false;
    while (!STAILQ_EMPTY(&link->waiting)) {
        shm_send *send = STAILQ_FIRST(&link->waiting);
        if (shm_tx_put(&link->tx, &send->message, send->payload_bytes) != CM_OK) {
            break;
        }
        STAILQ_REMOVE_HEAD(&link->waiting, entry);
        send_finish(link->net, send, CM_OK);
        did = true;
    }
    if (did) {
        wake_if(link, &link->tx.segment->receiver_sleeps);
    }
    return did;
}

static bool shm_report_sent(shm_net *s)
{
    bool did = false;
    while (!STAILQ_EMPTY(&s->done)) {
        shm_send *send = STAILQ_FIRST(&s->done);
        STAILQ_REMOVE_HEAD(&s->done, entry);
        s->upcalls->sent(s->ctx, NULL, send->cookie, send->status);
        cm_pool_put(&s->sends, send);
        did = true;
    }
    return did;
}

static void slot_release(const net_backend_link *link, shm_slot *slot, shm_segment *segment)
{
    atomic_store(&slot->full, 0);
    if (link != NULL) {
        wake_if(link, &segment->sender_waits);
    }
}

static bool receives_left(const shm_net *s)
{
    return s->receives.n_used < s->receives.n_max;
}

/* In its turn among the messages, but ahead of those that wait for a receive: heartbeats must be heard. */
static bool link_take_note(net_backend_link *link)
{
    shm_net *s = link->net;
    shm_rx *rx = &link->in->rx;
    const shm_slot *slot = shm_rx_next(rx, true);
    uint8_t header[NET_WIRE_HEADER_MAX] __attribute__((aligned(8)));
    if (slot == NULL || (slot->n_before > rx->n_taken && receives_left(s))) {
        return false;
    }
    net_event event = {.type = slot->type, .header = header, .header_bytes = slot->header_bytes};
    if (event.type < NET_TYPE_INTERNAL || event.header_bytes > sizeof(header)) {
        cm_warn("peer %s broke the protocol: type %u, header of %u bytes", link->address, event.type,
                event.header_bytes);
        link_close(link, CM_E_PROTOCOL);
        return true;
    }
    memcpy(header, slot->header, event.header_bytes);
    slot_release(link, &rx->segment->notes[rx->n_notes++ % SHM_NOTES], rx->segment);
    s->upcalls->received(s->ctx, link->peer, &event);
    return true;
}

static bool link_check_message(const net_backend_link *link, const net_event *event, uint64_t at)
{
    uint64_t most = link->net->options->message_bytes_max, area = link->in->rx.area_bytes;
    if (event->payload_bytes > most) {
        cm_warn("peer %s broke the protocol: message of %llu bytes, %llu are allowed", link->address,
                (unsigned long long)event->payload_bytes, (unsigned long long)most);
        return false;
    }
    if (event->type >= NET_TYPE_INTERNAL || event->header_bytes > NET_WIRE_HEADER_MAX || at % SHM_LINE != 0 ||
        at > area || event->payload_bytes > area - at) {
        cm_warn("peer %s broke the protocol: message of type %u, header of %u bytes, payload of %llu at %llu",
                link->address, event->type, event->header_bytes, (unsigned long long)event->payload_bytes,
                (unsigned long long)at);
        return false;
    }
    return true;
}

/* ---- a core of its own ----
 * Two processes that mostly wait for each other look to the scheduler like one, the more so on a virtual
 * machine, whose idle cores it takes for busy: whoever is woken gets the core of the waker, both stay there,
 * and neither can look for messages while the other works. Whoever sees that keeps off this core for a while:
 * first the end that connected, then, if it is followed to its new core, the other one. */

static void keep_off(shm_net *s, uint32_t cpu)
{
    cpu_set_t may;
    if (cpu >= CPU_SETSIZE || sched_getaffinity(0, sizeof(may), &may) != 0 || CPU_COUNT(&may) < 2 ||
        !CPU_ISSET(cpu, &may)) {
        return;
    }
    CPU_CLR(cpu, &may);
    if (sched_setaffinity(0, sizeof(may), &may) == 0) {
        s->off_cpu = cpu;
        s->off_until_ms = cm_now_ms() + SHM_OFF_MS;
    }
}

static void keep_off_no_more(shm_net *s)
{
    cpu_set_t may;
    s->off_until_ms = 0;
    if (sched_getaffinity(0, sizeof(may), &may) == 0) {
        CPU_SET(s->off_cpu, &may);
        int rc = sched_setaffinity(0, sizeof(may), &may);
        (void)rc;
    }
}

static void link_keep_apart(net_backend_link *link, uint32_t sender_cpu)
{
    shm_net *s = link->net;
    link->n_crowded = sender_cpu == (uint32_t)sched_getcpu() ? link->n_crowded + 1 : 0;
    if (link->n_crowded >= (link->follows ? 2 : 1) * SHM_CROWDED && s->off_until_ms == 0) {
        link->n_crowded = 0;
        keep_off(s, sender_cpu);
    }
}

/* Reads each word of the slot once: they are another process'. */
static bool link_take_message(net_backend_link *link)
{
    shm_net *s = link->net;
    shm_rx *rx = &link->in->rx;
    shm_receive *receive;
    shm_slot *slot = shm_rx_next(rx, false);
    if (slot == NULL || slot->n_before > rx->n_notes ||
        cm_pool_get(&s->receives, (void **)&receive) != CM_OK) {
        return false;
    }
    uint64_t at = slot->at;
    *receive = (shm_receive){.in = link->in, .slot = slot};
    net_event event = {.type = slot->type,
                       .header = receive->header,
                       .header_bytes = slot->header_bytes,
                       .payload = shm_area(rx->segment) + at,
                       .payload_bytes = slot->payload_bytes,
                       .receive = receive};
    if (!link_check_message(link, &event, at)) {
        cm_pool_put(&s->receives, receive);
        link_close(link, CM_E_PROTOCOL);
        return true;
    }
    memcpy(receive->header, slot->header, event.header_bytes);
    link_keep_apart(link, slot->cpu);
    rx->n_taken++;
    rx->n_held++;
    s->upcalls->received(s->ctx, link->peer, &event);
    return true;
}

static bool link_serve(net_backend_link *link)
{
    const shm_rx *rx = &link->in->rx;
    bool did = !STAILQ_EMPTY(&link->waiting) && link_send_on(link);
    for (uint32_t i = 0; i < SHM_TURN_MAX && !link->closing; i++) {
        if (!link_take_note(link) && !link_take_message(link)) {
            break;
        }
        did = true;
    }
    /* all that it said before it went is heard first */
    if (link->peer_gone && !link->closing && shm_rx_next(rx, false) == NULL &&
        shm_rx_next(rx, true) == NULL) {
        bool orderly = rx->segment != NULL && atomic_load(&rx->segment->ended) != 0;
        link_close(link, orderly ? CM_OK : CM_E_RESET);
        did = true;
    }
    return did;
}

static void shm_release(void *backend, void *receive_arg)
{
    shm_net *s = backend;
    shm_receive *receive = receive_arg;
    shm_inflow *in = receive->in;
    slot_release(in->link, receive->slot, in->rx.segment);
    in->rx.n_held--;
    inflow_free_if_done(s, in);
    cm_pool_put(&s->receives, receive);
}

/* ---- progress and sleep ---- */

static bool shm_close_links(shm_net *s)
{
    net_backend_link *link = s->n_closing > 0 ? TAILQ_FIRST(&s->all) : NULL;
    bool did = false;
    while (link != NULL) {
        net_backend_link *next = TAILQ_NEXT(link, entry);
        if (link->closing) {
            link_cancel_waiting(link, CM_E_RESET);
            shm_report_sent(s); /* its sends first, as promised */
            void *peer = link->peer;
            link->peer = NULL;
            if (peer != NULL) {
                s->upcalls->down(s->ctx, peer, link->end_status);
            }
            next = TAILQ_NEXT(link, entry);
            link_free(link);
            s->n_closing--;
            did = true;
        }
        link = next;
    }
    return did;
}

static void shm_disarm(shm_net *s)
{
    net_backend_link *link;
    s->armed = false;
    TAILQ_FOREACH (link, &s->all, entry) {
        if (link->in->rx.segment != NULL) {
            atomic_store_explicit(&link->in->rx.segment->receiver_sleeps, 0, memory_order_relaxed);
        }
        if (link->tx.segment != NULL) {
            atomic_store_explicit(&link->tx.segment->sender_waits, 0, memory_order_relaxed);
        }
    }
}

static bool shm_look_at_sockets(shm_net *s)
{
    struct epoll_event events[SHM_EVENTS];
    int n = epoll_wait(s->epoll, events, SHM_EVENTS, 0);
    bool strangers = false;
    for (int i = 0; i < n; i++) {
        net_backend_link *link = events[i].data.ptr;
        if (link == NULL) {
            strangers = true;
        } else if (events[i].data.ptr == s) {
            uint64_t count;
            ssize_t got = read(s->bell, &count, sizeof(count));
            (void)got;
        } else if (!link->closing) {
            link_on_socket(link);
        }
    }
    if (strangers) {
        shm_accept_all(s);
    }
    return n > 0;
}

static bool shm_progress(void *backend)
{
    shm_net *s = backend;
    bool look = s->armed || s->n_turn++ % SHM_LOOK_TURNS == 0, did = false;
    s->dirty = false;
    if (s->armed) {
        shm_disarm(s);
    }
    if (look) {
        did = shm_look_at_sockets(s);
        if (s->off_until_ms != 0 && cm_now_ms() >= s->off_until_ms) {
            keep_off_no_more(s);
        }
    }
    did = shm_report_sent(s) || did;
    net_backend_link *link;
    TAILQ_FOREACH (link, &s->all, entry) {
        if (!link->closing && !link->accepted) {
            did = link_serve(link) || did;
        }
    }
    return shm_close_links(s) || did;
}

static int shm_fd(const void *backend)
{
    return ((const shm_net *)backend)->epoll;
}

/* Something to do on this link after it was said that we sleep. */
static bool link_stirs(const net_backend_link *link)
{
    const shm_rx *rx = &link->in->rx;
    return shm_rx_next(rx, true) != NULL || (receives_left(link->net) && shm_rx_next(rx, false) != NULL);
}

static bool shm_arm(void *backend)
{
    shm_net *s = backend;
    net_backend_link *link;
    if (s->dirty || !STAILQ_EMPTY(&s->done)) {
        return false;
    }
    s->armed = true;
    TAILQ_FOREACH (link, &s->all, entry) {
        if (link->in->rx.segment != NULL) {
            atomic_store(&link->in->rx.segment->receiver_sleeps, 1);
        }
        if (!STAILQ_EMPTY(&link->waiting)) {
            atomic_store(&link->tx.segment->sender_waits, 1);
        }
    }
    TAILQ_FOREACH (link, &s->all, entry) {
        if (link_stirs(link) || (!STAILQ_EMPTY(&link->waiting) && link_send_on(link))) {
            return false;
        }
    }
    return true;
}

/* ---- open and close ---- */

static cm_status shm_open_backend(const net_options *options, const net_upcalls *upcalls, void *ctx,
                                  void **backend_out, cm_error *err)
{
    shm_net *s = cm_alloc(sizeof(*s));
    *s = (shm_net){.options = options, .upcalls = upcalls, .ctx = ctx, .listener = -1};
    s->epoll = epoll_create1(EPOLL_CLOEXEC);
    s->bell = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = s};
    if (s->epoll < 0 || s->bell < 0 || epoll_ctl(s->epoll, EPOLL_CTL_ADD, s->bell, &event) != 0) {
        cm_status status =
            cm_error_set(err, CM_E_DEVICE, "backend", "no epoll or eventfd: %s", strerror(errno));
        fd_close(s->epoll);
        fd_close(s->bell);
        cm_free(s);
        return status;
    }
    uint32_t n_links = 2 * options->peers_max; /* closing ones and strangers that have not greeted */
    cm_pool_init(&s->links, "shm links", sizeof(net_backend_link), n_links);
    cm_pool_init(&s->inflows, "shm inflows", sizeof(shm_inflow), n_links + options->receives_max);
    cm_pool_init(&s->sends, "shm sends", sizeof(shm_send), n_links * (options->sends_max + SHM_NOTES_OUT));
    cm_pool_init(&s->receives, "shm receives", sizeof(shm_receive), options->receives_max);
    TAILQ_INIT(&s->all);
    STAILQ_INIT(&s->done);
    *backend_out = s;
    return CM_OK;
}

static void shm_close(void *backend)
{
    shm_net *s = backend;
    net_backend_link *link = TAILQ_FIRST(&s->all);
    while (link != NULL) {
        net_backend_link *next = TAILQ_NEXT(link, entry);
        link_cancel_waiting(link, CM_E_CANCELLED);
        if (link->tx.segment != NULL) {
            atomic_store(&link->tx.segment->ended, 1);
        }
        link_free(link);
        link = next;
    }
    while (!STAILQ_EMPTY(&s->done)) {
        shm_send *send = STAILQ_FIRST(&s->done);
        STAILQ_REMOVE_HEAD(&s->done, entry);
        cm_pool_put(&s->sends, send);
    }
    for (uint32_t i = 0; i < s->inflows.n_max;
         i++) { /* of what the user did not release: the pool lists that */
        shm_inflow *in = cm_pool_at(&s->inflows, i);
        if (in != NULL) {
            in->rx.n_held = 0;
            inflow_free_if_done(s, in);
        }
    }
    fd_close(s->listener);
    fd_close(s->bell);
    close(s->epoll);
    cm_pool_fini(&s->receives);
    cm_pool_fini(&s->sends);
    cm_pool_fini(&s->inflows);
    cm_pool_fini(&s->links);
    cm_free(s);
}

const net_ops net_shm_ops = {
    .version = NET_PROTOCOL,
    .name = "shm",
    .vouches = true,
    .open = shm_open_backend,
    .close = shm_close,
    .listen = shm_listen,
    .connect = shm_connect,
    .disconnect = shm_disconnect,
    .send = shm_send_message,
    .room = shm_room,
    .progress = shm_progress,
    .release = shm_release,
    .fd = shm_fd,
    .arm = shm_arm,
};
