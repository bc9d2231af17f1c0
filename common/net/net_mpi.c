/* Links over Open MPI's point-to-point messages. An object has a port, which gives it two tags of its own:
 * one for users' messages, one for notes (the layer's own, and ours about links), so that notes pass while
 * the user's wait for a receive. Every message begins with a fixed block, behind which the payload stands
 * aligned.
 *
 * MPI has nothing to sleep on and does not tell of a dead peer: the descriptor is a timer that is set shorter
 * the busier the object is, and loss is found by the layer's heartbeats alone. A send that was begun cannot
 * be taken back: a link's memory goes, and its end is told, when its last send is done. So what comes for a
 * port that is closed is taken and thrown away, at the end of the process too, until all have come to theirs.
 */

#include <errno.h>
#include <mpi.h>
#include <stdio.h>
#include <string.h>
#include <sys/timerfd.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/net/net_mpi_world.h"
#include "common/net/net_private.h"

enum {
    MPI_NOTES_MAX = 8,            /* of the layer on their way, per link */
    MPI_WORDS_MAX = 4,            /* of ours about one link */
    MPI_TURN_MAX = 64,            /* messages taken before others have their turn */
    MPI_SLEEP_MIN_NS = 20 * 1000, /* between looks while something happens */
    MPI_SLEEP_MAX_NS = 1000 * 1000,
    MPI_CLOSE_MS = 1000, /* for sends to leave, when the object closes */
};

typedef enum mpi_word {
    MPI_WORD_MESSAGE,
    MPI_WORD_CONNECT,
    MPI_WORD_ACCEPT,
    MPI_WORD_REFUSE,
    MPI_WORD_CLOSE,
} mpi_word;

/* In front of every payload. Links are named by the object that has them; 0 is none. */
typedef struct mpi_block {
    uint16_t word; /* mpi_word */
    uint16_t type;
    uint32_t header_bytes;
    uint64_t payload_bytes;
    uint32_t from_port, from_link, to_link, zero;
    uint8_t header[NET_WIRE_HEADER_MAX];
} mpi_block;
_Static_assert(sizeof(mpi_block) == 320 && sizeof(mpi_block) % 64 == 0, "the payload behind it is aligned");

struct net_backend_link {
    TAILQ_ENTRY(net_backend_link) entry; /* of live or gone */
    void *peer;
    int rank;
    uint32_t port, id, their_id; /* their_id 0: they have not answered yet */
    uint32_t n_sends;            /* on their way */
    bool gone;                   /* disconnected; freed with its last send */
    bool nobody;                 /* there is no such port here */
};
TAILQ_HEAD(mpi_link_list, net_backend_link);

typedef struct mpi_send {
    net_backend_link *link; /* NULL: a word of ours */
    void *cookie;
    mpi_block block; /* stays until MPI is done */
} mpi_send;

typedef struct mpi_arrival {
    TAILQ_ENTRY(mpi_arrival) entry; /* of its source's */
    mpi_block *block;               /* a buffer: block, then payload */
    int rank;
    bool done, failed;
} mpi_arrival;
TAILQ_HEAD(mpi_arrival_list, mpi_arrival);

/* Messages of one rank, in the order it sent them; a large one may be complete later than a small one behind
 * it. */
typedef struct mpi_source {
    TAILQ_ENTRY(mpi_source) entry;
    struct mpi_arrival_list arrivals;
} mpi_source;
TAILQ_HEAD(mpi_source_list, mpi_source);

/* What MPI works on; [n] in the order begun. */
typedef struct mpi_requests {
    MPI_Request *request;
    void **owner;
    MPI_Status *status;
    int *index, n;
} mpi_requests;

typedef struct mpi_net {
    const net_options *options;
    const net_upcalls *upcalls;
    void *ctx;
    uint32_t port;
    cm_pool links, sends, arrivals;
    net_buffers buffers;
    mpi_requests sending, fetching;
    mpi_source *sources; /* [world] */
    struct mpi_source_list active;
    struct mpi_link_list live, gone;
    int fd;
    uint64_t sleep_ns;
    bool look; /* something may be done without a word from MPI */
} mpi_net;

/* ---- requests ---- */

static void requests_init(mpi_requests *r, uint32_t n_max)
{
    *r = (mpi_requests){.request = cm_alloc(sizeof(MPI_Request) * n_max),
                        .owner = cm_alloc(sizeof(void *) * n_max),
                        .status = cm_alloc(sizeof(MPI_Status) * n_max),
                        .index = cm_alloc(sizeof(int) * n_max)};
}

static void requests_fini(mpi_requests *r)
{
    cm_free(r->request);
    cm_free((void *)r->owner);
    cm_free(r->status);
    cm_free(r->index);
}

/* How many are done: their owners stand in owner[index[i]], their ends in status[i]. */
static int requests_test(mpi_requests *r)
{
    int n_done = 0;
    if (r->n > 0) {
        mpi_world_lock();
        int code = MPI_Testsome(r->n, r->request, &n_done, r->index, r->status);
        mpi_world_unlock();
        CM_ASSERT_MSG(code == MPI_SUCCESS || code == MPI_ERR_IN_STATUS, "MPI_Testsome: code %d", code);
        for (int i = 0; i < n_done && code == MPI_SUCCESS; i++) {
            r->status[i].MPI_ERROR = MPI_SUCCESS; /* only set when one failed */
        }
    }
    return n_done;
}

/* Those that are done leave the arrays; the others keep their order. */
static void requests_compact(mpi_requests *r)
{
    int n = 0;
    for (int i = 0; i < r->n; i++) {
        if (r->request[i] != MPI_REQUEST_NULL) {
            r->request[n] = r->request[i];
            r->owner[n++] = r->owner[i];
        }
    }
    r->n = n;
}

/* ---- links ---- */

enum { LINK_INDEX_BITS = 12 }; /* of an id: where in the pool; above it a number that tells its users apart */

static net_backend_link *link_create(mpi_net *mn, void *peer, int rank, uint32_t port)
{
    net_backend_link *link;
    if (cm_pool_get(&mn->links, (void **)&link) != CM_OK) {
        return NULL;
    }
    uint32_t number = mpi_world_number();
    uint32_t index = cm_pool_index(&mn->links, link) + 1;
    *link =
        (net_backend_link){.peer = peer, .rank = rank, .port = port, .id = number << LINK_INDEX_BITS | index};
    TAILQ_INSERT_TAIL(&mn->live, link, entry);
    return link;
}

/* NULL: it is gone, or was never theirs. */
static net_backend_link *link_find(const mpi_net *mn, uint32_t id, int rank, uint32_t port)
{
    uint32_t index = id & ((1u << LINK_INDEX_BITS) - 1);
    net_backend_link *link = index > 0 ? cm_pool_at(&mn->links, index - 1) : NULL;
    return link != NULL && link->id == id && !link->gone && link->rank == rank && link->port == port ? link
                                                                                                     : NULL;
}

static void link_reap(mpi_net *mn)
{
    net_backend_link *next;
    for (net_backend_link *link = TAILQ_FIRST(&mn->gone); link != NULL; link = next) {
        next = TAILQ_NEXT(link, entry);
        if (link->n_sends == 0) {
            TAILQ_REMOVE(&mn->gone, link, entry);
            cm_pool_put(&mn->links, link);
        }
    }
}

/* ---- sending ---- */

static int tag_of(uint32_t port, bool note)
{
    return (int)(port * 2 + note);
}

/* The send's block and the pieces behind it, as they lie. */
static int send_begin(const mpi_send *send, const net_message *message, int rank, int tag,
                      MPI_Request *request)
{
    int lengths[1 + NET_IOV_MAX] = {sizeof(send->block)}, n = 1;
    MPI_Aint places[1 + NET_IOV_MAX];
    MPI_Datatype type;
    MPI_Get_address(&send->block, &places[0]);
    for (uint32_t i = 0; message != NULL && i < message->n_iov; i++) {
        if (message->iov[i].n_bytes > 0) {
            lengths[n] = (int)message->iov[i].n_bytes;
            MPI_Get_address(message->iov[i].data, &places[n++]);
        }
    }
    if (n == 1) {
        return MPI_Isend(&send->block, sizeof(send->block), MPI_BYTE, rank, tag, MPI_COMM_WORLD, request);
    }
    MPI_Type_create_hindexed(n, lengths, places, MPI_BYTE, &type);
    MPI_Type_commit(&type);
    int code = MPI_Isend(MPI_BOTTOM, 1, type, rank, tag, MPI_COMM_WORLD, request);
    MPI_Type_free(&type); /* once the send is done */
    return code;
}

static cm_status send_start(mpi_net *mn, mpi_send *send, const net_message *message, int rank, int tag)
{
    int i = mn->sending.n;
    mpi_world_lock();
    int code = send_begin(send, message, rank, tag, &mn->sending.request[i]);
    mpi_world_unlock();
    if (code != MPI_SUCCESS) {
        cm_pool_put(&mn->sends, send);
        return CM_E_RESET;
    }
    mn->sending.owner[i] = send;
    mn->sending.n++;
    mn->look = true;
    return CM_OK;
}

/* A word about a link. A lost one costs the other side its silence. */
static void say(mpi_net *mn, mpi_word word, int rank, uint32_t port, uint32_t from_link, uint32_t to_link)
{
    mpi_send *send;
    if (cm_pool_get(&mn->sends, (void **)&send) != CM_OK) {
        return;
    }
    send->block = (mpi_block){
        .word = (uint16_t)word, .from_port = mn->port, .from_link = from_link, .to_link = to_link};
    cm_status status = send_start(mn, send, NULL, rank, tag_of(port, true));
    (void)status;
}

static cm_status mpi_send_message(void *backend, net_backend_link *link, const net_message *message,
                                  void *send_cookie)
{
    mpi_net *mn = backend;
    mpi_send *send;
    CM_ASSERT(!link->gone && message->header_bytes <= NET_WIRE_HEADER_MAX);
    if (link->nobody) {
        return CM_E_RESET;
    }
    if (link->their_id == 0 || cm_pool_get(&mn->sends, (void **)&send) != CM_OK) {
        return CM_AGAIN;
    }
    *send = (mpi_send){.link = link,
                       .cookie = send_cookie,
                       .block = {.word = MPI_WORD_MESSAGE,
                                 .type = message->type,
                                 .header_bytes = message->header_bytes,
                                 .from_port = mn->port,
                                 .from_link = link->id,
                                 .to_link = link->their_id}};
    for (uint32_t i = 0; i < message->n_iov; i++) {
        send->block.payload_bytes += message->iov[i].n_bytes;
    }
    if (message->header_bytes > 0) {
        memcpy(send->block.header, message->header, message->header_bytes);
    }
    CM_TRY(send_start(mn, send, message, link->rank, tag_of(link->port, message->type >= NET_TYPE_INTERNAL)));
    link->n_sends++;
    return CM_OK;
}

static bool report_sent(mpi_net *mn)
{
    int n = requests_test(&mn->sending);
    for (int i = 0; i < n; i++) {
        mpi_send *send = mn->sending.owner[mn->sending.index[i]];
        bool failed = mn->sending.status[i].MPI_ERROR != MPI_SUCCESS;
        if (send->link != NULL) {
            send->link->n_sends--;
            mn->upcalls->sent(mn->ctx, NULL, send->cookie,
                              send->link->gone ? CM_E_CANCELLED
                              : failed         ? CM_E_RESET
                                               : CM_OK);
        }
        cm_pool_put(&mn->sends, send);
    }
    requests_compact(&mn->sending);
    return n > 0;
}

/* ---- link ends ---- */

static void link_drop(mpi_net *mn, net_backend_link *link)
{
    link->gone = true;
    TAILQ_REMOVE(&mn->live, link, entry);
    TAILQ_INSERT_TAIL(&mn->gone, link, entry);
    mn->look = true;
}

static void mpi_disconnect(void *backend, net_backend_link *link)
{
    mpi_net *mn = backend;
    CM_ASSERT(!link->gone);
    if (link->their_id != 0) {
        say(mn, MPI_WORD_CLOSE, link->rank, link->port, link->id, link->their_id);
    }
    link_drop(mn, link);
}

/* By the other side, or for its fault. What is still on its way is told after it: the layer knows it by its
 * cookie alone. */
static void link_down(mpi_net *mn, net_backend_link *link, cm_status status)
{
    void *peer = link->peer;
    link_drop(mn, link);
    mn->upcalls->down(mn->ctx, peer, status);
}

static cm_status mpi_connect(void *backend, const char *address, void *peer, net_backend_link **link_out,
                             cm_error *err)
{
    mpi_net *mn = backend;
    int rank, n = 0;
    unsigned port;
    if (sscanf(address, "mpi:%d:%u%n", &rank, &port, &n) != 2 || address[n] != '\0' || rank < 0 ||
        rank >= mpi_world_size() || port >= MPI_PORTS_MAX) {
        return cm_error_set(err, CM_E_INVALID, "address",
                            "'%s' is not mpi:RANK:PORT of a world of %d ranks: do all members use net mpi?",
                            address, mpi_world_size());
    }
    net_backend_link *link = link_create(mn, peer, rank, port);
    if (link == NULL) {
        return cm_error_set(err, CM_E_CAPACITY, "address", "no link to '%s': all %u are in use or closing",
                            address, mn->links.n_max);
    }
    link->nobody = rank == mpi_world_rank() && !mpi_world_listens(port);
    if (!link->nobody) {
        say(mn, MPI_WORD_CONNECT, rank, port, link->id, 0);
    }
    mn->look = true;
    *link_out = link;
    return CM_OK;
}

/* ---- receiving ---- */

static void on_connect(mpi_net *mn, const mpi_block *block, int rank)
{
    char address[NET_ADDRESS_BYTES];
    net_backend_link *link =
        mpi_world_listens(mn->port) ? link_create(mn, NULL, rank, block->from_port) : NULL;
    snprintf(address, sizeof(address), "mpi:%d:%u", rank, block->from_port);
    if (link != NULL) {
        link->their_id = block->from_link;
        link->peer = mn->upcalls->accepted(mn->ctx, link, address);
    }
    if (link == NULL || link->peer == NULL) {
        if (link != NULL) {
            link_drop(mn, link);
        }
        say(mn, MPI_WORD_REFUSE, rank, block->from_port, 0, block->from_link);
        return;
    }
    say(mn, MPI_WORD_ACCEPT, rank, block->from_port, link->id, link->their_id);
}

static void on_note(mpi_net *mn, const mpi_block *block, int rank)
{
    if (block->word == MPI_WORD_CONNECT) {
        on_connect(mn, block, rank);
        return;
    }
    net_backend_link *link = link_find(mn, block->to_link, rank, block->from_port);
    if (link == NULL) {
        if (block->word == MPI_WORD_ACCEPT) { /* we went before they came */
            say(mn, MPI_WORD_CLOSE, rank, block->from_port, 0, block->from_link);
        }
        return;
    }
    switch ((mpi_word)block->word) {
    case MPI_WORD_ACCEPT:
        link->their_id = block->from_link;
        break;
    case MPI_WORD_REFUSE:
        link_down(mn, link, CM_E_REFUSED);
        break;
    case MPI_WORD_CLOSE:
        link_down(mn, link, CM_OK);
        break;
    case MPI_WORD_MESSAGE:
        mn->upcalls->received(
            mn->ctx, link->peer,
            &(net_event){.type = block->type, .header = block->header, .header_bytes = block->header_bytes});
        break;
    case MPI_WORD_CONNECT:
        break; /* above */
    }
}

static bool block_is_whole(const mpi_block *block, uint64_t n_bytes)
{
    return n_bytes >= sizeof(*block) && block->header_bytes <= sizeof(block->header) &&
           block->payload_bytes == n_bytes - sizeof(*block) && block->from_port < MPI_PORTS_MAX;
}

static bool take_note(mpi_net *mn)
{
    mpi_block block __attribute__((aligned(8)));
    int found = 0, n = 0;
    MPI_Message message;
    MPI_Status status = {0};
    mpi_world_lock();
    MPI_Improbe(MPI_ANY_SOURCE, tag_of(mn->port, true), MPI_COMM_WORLD, &found, &message, &status);
    if (found) {
        MPI_Get_count(&status, MPI_BYTE, &n);
        MPI_Mrecv(&block, sizeof(block), MPI_BYTE, &message, MPI_STATUS_IGNORE); /* small: it is here */
    }
    mpi_world_unlock();
    if (found && block_is_whole(&block, (uint64_t)n)) {
        on_note(mn, &block, status.MPI_SOURCE);
    }
    return found;
}

/* Begins to take in the next of the users' messages, if there is one and a receive for it. */
static bool fetch(mpi_net *mn)
{
    mpi_arrival *arrival;
    int found = 0, i = mn->fetching.n;
    MPI_Message message;
    MPI_Status status;
    if (cm_pool_get(&mn->arrivals, (void **)&arrival) != CM_OK) {
        return false; /* until one is released */
    }
    arrival->block = net_buffers_get(&mn->buffers);
    mpi_world_lock();
    MPI_Improbe(MPI_ANY_SOURCE, tag_of(mn->port, false), MPI_COMM_WORLD, &found, &message, &status);
    if (found) {
        MPI_Imrecv(arrival->block, (int)(sizeof(mpi_block) + mn->options->message_bytes_max), MPI_BYTE,
                   &message, &mn->fetching.request[i]);
    }
    mpi_world_unlock();
    if (!found) {
        net_buffers_put(&mn->buffers, arrival->block);
        cm_pool_put(&mn->arrivals, arrival);
        return false;
    }
    arrival->rank = status.MPI_SOURCE;
    mn->fetching.owner[i] = arrival;
    mn->fetching.n++;
    mpi_source *source = &mn->sources[arrival->rank];
    if (TAILQ_EMPTY(&source->arrivals)) {
        TAILQ_INSERT_TAIL(&mn->active, source, entry);
    }
    TAILQ_INSERT_TAIL(&source->arrivals, arrival, entry);
    return true;
}

static bool note_fetched(mpi_net *mn)
{
    int n = requests_test(&mn->fetching);
    for (int i = 0; i < n; i++) {
        mpi_arrival *arrival = mn->fetching.owner[mn->fetching.index[i]];
        int n_bytes = 0;
        MPI_Get_count(&mn->fetching.status[i], MPI_BYTE, &n_bytes);
        arrival->done = true;
        arrival->failed = mn->fetching.status[i].MPI_ERROR != MPI_SUCCESS; /* it did not fit */
        if (!arrival->failed && !block_is_whole(arrival->block, (uint64_t)n_bytes)) {
            arrival->block->to_link = 0; /* nobody's */
        }
    }
    requests_compact(&mn->fetching);
    return n > 0;
}

static void mpi_release(void *backend, void *receive)
{
    mpi_net *mn = backend;
    mpi_arrival *arrival = receive;
    net_buffers_put(&mn->buffers, arrival->block);
    cm_pool_put(&mn->arrivals, arrival);
    mn->look = true;
}

static void deliver(mpi_net *mn, mpi_arrival *arrival)
{
    const mpi_block *block = arrival->block;
    net_backend_link *link = link_find(mn, block->to_link, arrival->rank, block->from_port);
    if (link != NULL && arrival->failed) {
        cm_warn("peer mpi:%d:%u broke the protocol: message of %llu bytes, %llu are allowed", arrival->rank,
                block->from_port, (unsigned long long)block->payload_bytes,
                (unsigned long long)mn->options->message_bytes_max);
        say(mn, MPI_WORD_CLOSE, link->rank, link->port, link->id, link->their_id);
        link_down(mn, link, CM_E_PROTOCOL);
    } else if (link != NULL) {
        mn->upcalls->received(mn->ctx, link->peer,
                              &(net_event){.type = block->type,
                                           .header = block->header,
                                           .header_bytes = block->header_bytes,
                                           .payload = block + 1,
                                           .payload_bytes = block->payload_bytes,
                                           .receive = arrival});
        return;
    }
    mpi_release(mn, arrival);
}

static void deliver_all(mpi_net *mn)
{
    mpi_source *next;
    for (mpi_source *source = TAILQ_FIRST(&mn->active); source != NULL; source = next) {
        mpi_arrival *arrival;
        next = TAILQ_NEXT(source, entry);
        while ((arrival = TAILQ_FIRST(&source->arrivals)) != NULL && arrival->done) {
            TAILQ_REMOVE(&source->arrivals, arrival, entry);
            deliver(mn, arrival);
        }
        if (TAILQ_EMPTY(&source->arrivals)) {
            TAILQ_REMOVE(&mn->active, source, entry);
        }
    }
}

/* ---- progress and sleep ---- */

static void end_links_to_nobody(mpi_net *mn)
{
    net_backend_link *next;
    for (net_backend_link *link = TAILQ_FIRST(&mn->live); link != NULL; link = next) {
        next = TAILQ_NEXT(link, entry);
        if (link->nobody) {
            link_down(mn, link, CM_E_UNREACHABLE);
        }
    }
}

static bool mpi_progress(void *backend)
{
    mpi_net *mn = backend;
    bool busy = report_sent(mn), looked = mn->look;
    mn->look = false;
    for (uint32_t i = 0; i < MPI_TURN_MAX && take_note(mn); i++) {
        busy = true;
    }
    for (uint32_t i = 0; i < MPI_TURN_MAX && fetch(mn); i++) {
        busy = true;
    }
    busy |= note_fetched(mn);
    deliver_all(mn);
    if (looked) {
        end_links_to_nobody(mn);
    }
    link_reap(mn);
    mpi_world_discard();
    if (busy) {
        mn->sleep_ns = MPI_SLEEP_MIN_NS;
    }
    return busy || mn->look;
}

static int mpi_fd(const void *backend)
{
    return ((const mpi_net *)backend)->fd;
}

/* A peer is not heard before the timer ends: the longer nothing came, the longer it may take. */
static bool mpi_arm(void *backend)
{
    mpi_net *mn = backend;
    uint64_t ended;
    if (mn->look) {
        return false;
    }
    ssize_t got = read(mn->fd, &ended, sizeof(ended));
    (void)got; /* it had not ended */
    struct itimerspec when = {.it_value = {.tv_nsec = (long)mn->sleep_ns}};
    CM_ASSERT(timerfd_settime(mn->fd, 0, &when, NULL) == 0);
    mn->sleep_ns = mn->sleep_ns * 2 < MPI_SLEEP_MAX_NS ? mn->sleep_ns * 2 : MPI_SLEEP_MAX_NS;
    return true;
}

/* ---- open, listen, close ---- */

static cm_status mpi_open(const net_options *options, const net_upcalls *upcalls, void *ctx,
                          void **backend_out, cm_error *err)
{
    uint32_t n_links = 2 * options->peers_max; /* those just disconnected count until their sends are done */
    uint32_t n_sends = n_links * (options->sends_max + MPI_NOTES_MAX + MPI_WORDS_MAX);
    if (n_links >= 1u << LINK_INDEX_BITS || options->message_bytes_max > INT32_MAX - sizeof(mpi_block)) {
        return cm_error_set(err, CM_E_CONFIG, "net",
                            "over MPI there are at most %u links and messages of 2 GB",
                            (1u << LINK_INDEX_BITS) / 2 - 1);
    }
    mpi_net *mn = cm_alloc(sizeof(*mn));
    *mn = (mpi_net){.options = options, .upcalls = upcalls, .ctx = ctx, .sleep_ns = MPI_SLEEP_MIN_NS};
    cm_status status = mpi_world_take_port(&mn->port, err);
    if (status != CM_OK) {
        goto err_free;
    }
    status = net_buffers_init(&mn->buffers, options->receives_max,
                              sizeof(mpi_block) + options->message_bytes_max, err);
    if (status != CM_OK) {
        goto err_port;
    }
    mn->fd = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    if (mn->fd < 0) {
        status = cm_error_set(err, CM_E_DEVICE, "net", "no timerfd: %s", strerror(errno));
        goto err_buffers;
    }
    cm_pool_init(&mn->links, "mpi links", sizeof(net_backend_link), n_links);
    cm_pool_init(&mn->sends, "mpi sends", sizeof(mpi_send), n_sends);
    cm_pool_init(&mn->arrivals, "mpi receives", sizeof(mpi_arrival), options->receives_max);
    requests_init(&mn->sending,
                  2 * n_sends); /* what is done leaves after all have been told, who may send again */
    requests_init(&mn->fetching, options->receives_max);
    mn->sources = cm_alloc(sizeof(mpi_source) * (uint32_t)mpi_world_size());
    for (int i = 0; i < mpi_world_size(); i++) {
        TAILQ_INIT(&mn->sources[i].arrivals);
    }
    TAILQ_INIT(&mn->active);
    TAILQ_INIT(&mn->live);
    TAILQ_INIT(&mn->gone);
    *backend_out = mn;
    return CM_OK;

err_buffers:
    net_buffers_fini(&mn->buffers);
err_port:
    mpi_world_free_port(mn->port);
err_free:
    cm_free(mn);
    return status;
}

static cm_status mpi_listen(void *backend, const char *address, char bound_out[NET_ADDRESS_BYTES],
                            cm_error *err)
{
    mpi_net *mn = backend;
    (void)address; /* of the host, for back-ends over IP: a rank is reached by its number */
    (void)err;
    mpi_world_listen(mn->port);
    snprintf(bound_out, NET_ADDRESS_BYTES, "mpi:%d:%u", mpi_world_rank(), mn->port);
    return CM_OK;
}

/* What MPI has done with; nobody is told. */
static void close_step(mpi_net *mn)
{
    int n = requests_test(&mn->sending);
    for (int i = 0; i < n; i++) {
        mpi_send *send = mn->sending.owner[mn->sending.index[i]];
        if (send->link != NULL) {
            send->link->n_sends--;
        }
        cm_pool_put(&mn->sends, send);
    }
    requests_compact(&mn->sending);
    (void)note_fetched(mn);
    link_reap(mn);
}

/* Messages that came and were not delivered. */
static void close_sources(mpi_net *mn)
{
    mpi_source *source;
    TAILQ_FOREACH (source, &mn->active, entry) {
        mpi_arrival *arrival;
        while ((arrival = TAILQ_FIRST(&source->arrivals)) != NULL) {
            TAILQ_REMOVE(&source->arrivals, arrival, entry);
            mpi_release(mn, arrival);
        }
    }
}

static void mpi_close(void *backend)
{
    mpi_net *mn = backend;
    uint64_t give_up_ms = cm_now_ms() + MPI_CLOSE_MS;
    while (!TAILQ_EMPTY(&mn->live)) {
        mpi_disconnect(mn, TAILQ_FIRST(&mn->live));
    }
    do {
        close_step(mn);
    } while (mn->sending.n + mn->fetching.n > 0 && cm_now_ms() < give_up_ms);
    mpi_world_free_port(mn->port);
    close(mn->fd);
    if (mn->sending.n + mn->fetching.n > 0) {
        cm_warn("%d messages over MPI were not taken: their memory stays", mn->sending.n + mn->fetching.n);
        return; /* MPI may still write to it */
    }
    close_sources(mn);
    cm_pool_fini(&mn->arrivals);
    cm_pool_fini(&mn->sends);
    cm_pool_fini(&mn->links);
    requests_fini(&mn->sending);
    requests_fini(&mn->fetching);
    net_buffers_fini(&mn->buffers);
    cm_free(mn->sources);
    cm_free(mn);
}

static const net_ops g_mpi_ops = {
    .version = NET_PROTOCOL,
    .name = "mpi",
    .open = mpi_open,
    .close = mpi_close,
    .listen = mpi_listen,
    .connect = mpi_connect,
    .disconnect = mpi_disconnect,
    .send = mpi_send_message,
    .progress = mpi_progress,
    .release = mpi_release,
    .fd = mpi_fd,
    .arm = mpi_arm,
};

extern const net_mpi_module baleen_mpi_module;
const net_mpi_module baleen_mpi_module = {NET_PROTOCOL, &g_mpi_ops, mpi_world_share};
