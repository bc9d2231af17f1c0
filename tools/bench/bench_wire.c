#include "tools/bench/bench_wire.h"

#include <errno.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/queue.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/mem.h"
#include "proto/frames.h"
#include "proto/messages.h"

enum {
    WIRE_FRAMES = 4096,
    WIRE_NOTES = 256,
    WIRE_PATTERN = 1 << 16,
    WIRE_PREFIX = NET_WIRE_HEADER_MAX - NET_HEADER_MAX, /* the layer's own, in front of every header */
};

struct net_backend_link {
    LIST_ENTRY(net_backend_link) entry;
    void *peer;
};

/* A dispatch frame on its way out and its answer on its way back. */
typedef struct wire_frame {
    TAILQ_ENTRY(wire_frame) entry;
    net_backend_link *link;
    void *cookie;
    bool left;
    uint64_t left_ns, due_ns;
    uint64_t n_bytes; /* of the answer's payload */
    void *payload;
    struct {
        uint8_t prefix[WIRE_PREFIX];
        pr_combine combine;
    } header;
} wire_frame;
TAILQ_HEAD(wire_frames, wire_frame);

/* One of the layer's own, to be reported as sent. It comes back as it is: a greeting makes the link, and how
 * many answers the router has taken is how many frames the worker has taken at least. In the same way an
 * answer has the prefix of its frame: there is one answer to each, in order. */
typedef struct wire_note {
    TAILQ_ENTRY(wire_note) entry;
    net_backend_link *link;
    void *cookie;
    uint16_t type;
    uint32_t n_bytes;
    uint8_t header[NET_WIRE_HEADER_MAX] __attribute__((aligned(8)));
} wire_note;

typedef struct wire_net {
    bench_wire *wire;
    const net_options *options;
    const net_upcalls *upcalls;
    void *ctx;
    int fd;
    LIST_HEAD(, net_backend_link) links;
    cm_pool link_pool, frame_pool, note_pool;
    TAILQ_HEAD(, wire_note) notes;
    struct wire_frames frames;        /* in the order in which they leave and are answered */
    uint64_t out_free_ns, in_free_ns; /* when the wire is free */
    uint16_t pattern[WIRE_PATTERN];   /* BF16 */
    void *nothing;                    /* zeros, as long as a message */
    uint32_t n_held;                  /* answers not released; receives_max at most */
} wire_net;

static bench_wire *g_wire;

void bench_wire_use(bench_wire *wire)
{
    g_wire = wire;
}

/* ---- life ---- */

static cm_status wire_open(const net_options *options, const net_upcalls *upcalls, void *ctx,
                           void **backend_out, cm_error *err)
{
    wire_net *w = cm_alloc(sizeof(*w));
    *w = (wire_net){.wire = g_wire, .options = options, .upcalls = upcalls, .ctx = ctx};
    w->fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (w->fd < 0) {
        cm_free(w);
        return cm_error_set(err, CM_E_DEVICE, "", "eventfd: %s", strerror(errno));
    }
    cm_pool_init(&w->link_pool, "wire links", sizeof(net_backend_link), options->peers_max);
    cm_pool_init(&w->frame_pool, "wire frames", sizeof(wire_frame), WIRE_FRAMES);
    cm_pool_init(&w->note_pool, "wire notes", sizeof(wire_note), WIRE_NOTES);
    LIST_INIT(&w->links);
    TAILQ_INIT(&w->notes);
    TAILQ_INIT(&w->frames);
    w->nothing = cm_alloc(options->message_bytes_max);
    for (uint32_t i = 0; i < WIRE_PATTERN; i++) { /* plus and minus 2^-6 .. 2^-4 */
        uint32_t x = i * 2654435761u;
        w->pattern[i] = (uint16_t)((x & 0x8000) | (0x3c80 + (x >> 16 & 0xff)));
    }
    *backend_out = w;
    return CM_OK;
}

static void wire_frame_free(wire_net *w, wire_frame *frame)
{
    if (frame->payload != w->nothing) {
        cm_free(frame->payload);
    }
    cm_pool_put(&w->frame_pool, frame);
}

static void wire_close(void *backend)
{
    wire_net *w = backend;
    while (!TAILQ_EMPTY(&w->frames)) {
        wire_frame *frame = TAILQ_FIRST(&w->frames);
        TAILQ_REMOVE(&w->frames, frame, entry);
        wire_frame_free(w, frame);
    }
    while (!TAILQ_EMPTY(&w->notes)) {
        wire_note *note = TAILQ_FIRST(&w->notes);
        TAILQ_REMOVE(&w->notes, note, entry);
        cm_pool_put(&w->note_pool, note);
    }
    while (!LIST_EMPTY(&w->links)) {
        net_backend_link *link = LIST_FIRST(&w->links);
        LIST_REMOVE(link, entry);
        cm_pool_put(&w->link_pool, link);
    }
    cm_pool_fini(&w->link_pool);
    cm_pool_fini(&w->frame_pool);
    cm_pool_fini(&w->note_pool);
    cm_free(w->nothing);
    close(w->fd);
    cm_free(w);
}

static cm_status wire_listen(void *backend, const char *address, char bound_out[NET_ADDRESS_BYTES],
                             cm_error *err)
{
    (void)backend;
    (void)bound_out;
    return cm_error_set(err, CM_E_UNSUPPORTED, "address", "nobody can connect to %s: this wire has one end",
                        address);
}

static cm_status wire_connect(void *backend, const char *address, void *peer, net_backend_link **link_out,
                              cm_error *err)
{
    wire_net *w = backend;
    void *object;
    (void)address;
    cm_status status = cm_pool_get(&w->link_pool, &object);
    CM_ASSERT(status == CM_OK);
    (void)err;
    net_backend_link *link = object;
    link->peer = peer;
    LIST_INSERT_HEAD(&w->links, link, entry);
    *link_out = link;
    return CM_OK;
}

/* Its frames are told as sent all the same, by the next progress. */
static void wire_disconnect(void *backend, net_backend_link *link)
{
    (void)backend;
    link->peer = NULL;
}

/* ---- out ---- */

/* The worker's rows: which expert, and what of the row, decide. */
static void wire_compute(const wire_net *w, const pr_dispatch *frame, const uint8_t *payload, uint16_t *rows)
{
    const pr_slot *slots = (const pr_slot *)(const void *)payload;
    const uint8_t *codes = payload + pr_dispatch_codes_at(frame->n_slot);
    for (uint32_t i = 0; i < frame->n_slot; i++) {
        const uint8_t *row = codes + (size_t)slots[i].row * frame->d;
        uint32_t at = (slots[i].expert * 7919 + row[0] * 31 + row[frame->d / 2]) % (WIRE_PATTERN - frame->d);
        memcpy(rows + (size_t)i * frame->d, w->pattern + at, 2ull * frame->d);
    }
}

static uint64_t wire_take_ns(const wire_net *w, uint64_t n_bytes)
{
    return w->wire->bytes_s > 0 ? (uint64_t)(1e9 * (double)n_bytes / w->wire->bytes_s) : 0;
}

static uint64_t u64_max(uint64_t a, uint64_t b)
{
    return a > b ? a : b;
}

static cm_status wire_send_frame(wire_net *w, net_backend_link *link, const net_message *message,
                                 void *cookie)
{
    const pr_dispatch *dispatch = (const void *)((const uint8_t *)message->header + WIRE_PREFIX);
    void *object;
    CM_ASSERT(message->type == PR_MSG_DISPATCH && message->n_iov == 1 && dispatch->d < WIRE_PATTERN);
    if (cm_pool_get(&w->frame_pool, &object) != CM_OK) {
        return CM_AGAIN;
    }
    wire_frame *frame = object;
    frame->link = link;
    frame->cookie = cookie;
    frame->header.combine =
        (pr_combine){.head = dispatch->head, .d = dispatch->d, .n_slot = dispatch->n_slot};
    frame->header.combine.head.dtype = PR_DTYPE_BF16;
    frame->n_bytes = 2ull * dispatch->n_slot * dispatch->d;
    memcpy(frame->header.prefix, message->header, WIRE_PREFIX);
    frame->payload = w->nothing;
    if (w->wire->values) {
        int guard = cm_mem_guard_pause(); /* a worker's memory */
        frame->payload = cm_alloc(frame->n_bytes);
        cm_mem_guard_resume(guard);
        wire_compute(w, dispatch, message->iov[0].data, frame->payload);
    }
    uint64_t now = cm_now_ns(), out = message->iov[0].n_bytes + message->header_bytes;
    w->out_free_ns = frame->left_ns = u64_max(now, w->out_free_ns) + wire_take_ns(w, out);
    w->in_free_ns =
        u64_max(frame->left_ns + w->wire->latency_ns, w->in_free_ns) + wire_take_ns(w, frame->n_bytes);
    frame->due_ns = w->in_free_ns + w->wire->latency_ns;
    TAILQ_INSERT_TAIL(&w->frames, frame, entry);
    w->wire->n_frame++;
    w->wire->out_bytes += out;
    w->wire->back_bytes += frame->n_bytes;
    return CM_OK;
}

static cm_status wire_send(void *backend, net_backend_link *link, const net_message *message, void *cookie)
{
    wire_net *w = backend;
    void *object;
    if (message->type < NET_TYPE_INTERNAL) {
        return wire_send_frame(w, link, message, cookie);
    }
    if (cm_pool_get(&w->note_pool, &object) != CM_OK) {
        return CM_AGAIN;
    }
    wire_note *note = object;
    note->link = link;
    note->cookie = cookie;
    note->type = message->type;
    note->n_bytes = message->header_bytes;
    memcpy(note->header, message->header, message->header_bytes);
    TAILQ_INSERT_TAIL(&w->notes, note, entry);
    return CM_OK;
}

/* ---- back ---- */

static bool wire_serve_notes(wire_net *w)
{
    bool any = !TAILQ_EMPTY(&w->notes);
    while (!TAILQ_EMPTY(&w->notes)) {
        wire_note *note = TAILQ_FIRST(&w->notes);
        TAILQ_REMOVE(&w->notes, note, entry);
        w->upcalls->sent(w->ctx, note->link->peer, note->cookie, CM_OK);
        if (note->link->peer != NULL) {
            net_event event = {.type = note->type, .header = note->header, .header_bytes = note->n_bytes};
            w->upcalls->received(w->ctx, note->link->peer, &event);
        }
        cm_pool_put(&w->note_pool, note);
    }
    return any;
}

static void wire_deliver(wire_net *w, wire_frame *frame)
{
    net_backend_link *link = frame->link;
    TAILQ_REMOVE(&w->frames, frame, entry);
    if (link->peer == NULL) {
        wire_frame_free(w, frame);
        return;
    }
    net_event event = {.type = PR_MSG_COMBINE,
                       .header = &frame->header,
                       .header_bytes = sizeof(frame->header),
                       .payload = frame->payload,
                       .payload_bytes = frame->n_bytes,
                       .receive = frame};
    w->n_held++;
    w->upcalls->received(w->ctx, link->peer, &event);
}

static bool wire_progress(void *backend)
{
    wire_net *w = backend;
    bool any = wire_serve_notes(w);
    wire_frame *frame = TAILQ_FIRST(&w->frames), *next;
    uint64_t now = frame != NULL ? cm_now_ns() : 0;
    for (; frame != NULL && now >= frame->left_ns; frame = next) {
        next = TAILQ_NEXT(frame, entry);
        if (!frame->left) {
            frame->left = any = true;
            w->upcalls->sent(w->ctx, frame->link->peer, frame->cookie, CM_OK);
        }
        if (now >= frame->due_ns && w->n_held < w->options->receives_max) {
            any = true;
            wire_deliver(w, frame);
        }
    }
    return any;
}

static void wire_release(void *backend, void *receive)
{
    wire_net *w = backend;
    w->n_held--;
    wire_frame_free(w, receive);
}

static int wire_fd(const void *backend)
{
    return ((const wire_net *)backend)->fd;
}

/* While a frame is on its way there is no sleep: nothing would end it in time. */
static bool wire_arm(void *backend)
{
    wire_net *w = backend;
    return TAILQ_EMPTY(&w->notes) && TAILQ_EMPTY(&w->frames);
}

const net_ops bench_wire_ops = {
    .version = NET_PROTOCOL,
    .name = "wire",
    .open = wire_open,
    .close = wire_close,
    .listen = wire_listen,
    .connect = wire_connect,
    .disconnect = wire_disconnect,
    .send = wire_send,
    .progress = wire_progress,
    .release = wire_release,
    .fd = wire_fd,
    .arm = wire_arm,
};

pc_epoch *bench_wire_epoch(uint32_t n_layer, uint32_t n_expert, uint32_t n_rank)
{
    uint32_t *members = cm_alloc(sizeof(uint32_t) * n_rank);
    uint64_t *capacity = cm_alloc(sizeof(uint64_t) * n_rank);
    cm_error err = {0};
    pc_epoch *epoch = cm_alloc(sizeof(*epoch));
    epoch->refs = 1;
    epoch->number = 1;
    epoch->cluster = BENCH_WIRE_CLUSTER;
    epoch->n_member = n_rank;
    epoch->members = cm_alloc(sizeof(*epoch->members) * n_rank);
    for (uint32_t i = 0; i < n_rank; i++) {
        members[i] = epoch->members[i].id = i + 2;
        capacity[i] = UINT64_MAX;
        epoch->members[i].data_address = cm_strdup("wire");
    }
    cm_status status =
        pr_placement_plan(n_layer, n_expert, members, n_rank, capacity, NULL, &epoch->placement, &err);
    CM_ASSERT(status == CM_OK);
    cm_free(members);
    cm_free(capacity);
    return epoch;
}
