#include "router/engine/exchange_core.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

enum {
    XCORE_RECONNECT_MS = 200, /* between attempts to reach a worker of the epoch */
    XCORE_REPORT_MS = 2000,   /* a loss that lasts is told again: the coordinator may be another one by now */
    XCORE_RETRY_MS = 20,      /* a refused or lost part is planned again after so long, or at a link's news */
    XCORE_CACHED_BYTES = 16 << 20, /* results of a layer that may still be in a cache when they are summed */
};

/* One worker of the epoch in force. */
typedef struct xcore_link {
    uint32_t member_id;
    const char *address; /* the epoch's */
    void *handle;        /* NULL: not connected */
    bool up;
    bool leaving;          /* its handle is to be ended */
    bool tell;             /* told_status is to be reported */
    cm_status told_status; /* CM_OK: it is not known as lost */
    bool told_again;
    uint64_t tell_again_ms;
    uint64_t retry_at_ms;
} xcore_link;

typedef enum xcore_part_state { PART_OPEN, PART_DONE, PART_FAILED } xcore_part_state;

/* One frame of the round under way; same index as in the plan. */
typedef struct xcore_part {
    xcore_part_state state;
    uint32_t n_done; /* its first slots, answered */
    uint64_t deadline_ms;
} xcore_part;

typedef enum xcore_phase {
    XCORE_REST,     /* no layer */
    XCORE_PLANNING, /* between rounds: epochs may change */
    XCORE_BLOCKED,  /* the same, but not before retry_at_ms or news of a link */
    XCORE_DRAINING, /* frames of an earlier round still stand in the staging memory */
    XCORE_SENDING,
    XCORE_WAITING, /* for answers */
    XCORE_OVER,    /* DONE is still to be said */
} xcore_phase;

/* One layer of one micro-batch under way. */
typedef struct xcore_flight {
    rt_plan *plan;
    uint8_t *wanted; /* [row_max * topk] slots without a result */
    xcore_part *parts;
    uint32_t n_part;
    uint32_t first_exchange; /* number of part 0 of the round; the others follow */
    uint32_t n_sending;      /* frames that have not left */

    xcore_phase phase;
    rt_xcore_layer layer;
    uint32_t n_wanted;
    uint32_t at;         /* sending: next part */
    uint64_t staged;     /* sending: bytes before it */
    bool sending, again; /* a SEND is out; the next one repeats it */
    bool full;           /* there was no room: wait first */
    bool news, progress;
    uint32_t expert;                  /* the first without a row, when the layer is given up */
    uint64_t retry_at_ms, give_up_ms; /* give_up_ms 0: not stuck */
    cm_status status;                 /* of the layer, with XCORE_OVER */
} xcore_flight;

struct rt_xcore {
    rt_xcore_options options;
    xcore_flight flights[RT_FLIGHTS];
    uint64_t *avoid; /* bit per rank: no link up */
    uint32_t next_exchange;

    pc_epoch *offered; /* NULL: none waits */
    uint32_t offered_self;
    xcore_link *offered_links; /* as many as the offered epoch has ranks */

    pc_epoch *epoch; /* in force; NULL before the first */
    uint32_t self;
    bool adopted;      /* RT_XACT_ADOPTED is to be said */
    xcore_link *links; /* [n_link], rank order */
    uint32_t n_link;
    xcore_link *old_links; /* of the epoch before; those with a handle are to be ended */
    uint32_t n_old;

    bool stopping;
    uint64_t n_retries;
};

rt_xcore *rt_xcore_create(const rt_xcore_options *options)
{
    const rt_plan_limits *limits = &options->limits;
    rt_xcore *x = cm_alloc(sizeof(*x));
    x->options = *options;
    x->avoid = cm_alloc(PR_RANK_MAX / 8);
    for (uint32_t i = 0; i < RT_FLIGHTS; i++) {
        xcore_flight *f = &x->flights[i];
        f->plan = rt_plan_create(limits);
        f->wanted = cm_alloc((uint64_t)limits->row_max * limits->topk);
        f->parts = cm_alloc(sizeof(xcore_part) * f->plan->part_max);
    }
    return x;
}

void rt_xcore_destroy(rt_xcore *x)
{
    pc_epoch_release(x->offered);
    pc_epoch_release(x->epoch);
    for (uint32_t i = 0; i < RT_FLIGHTS; i++) {
        rt_plan_destroy(x->flights[i].plan);
        cm_free(x->flights[i].wanted);
        cm_free(x->flights[i].parts);
    }
    cm_free(x->avoid);
    cm_free(x->offered_links);
    cm_free(x->links);
    cm_free(x->old_links);
    cm_free(x);
}

static uint32_t xcore_blocks(const rt_xcore *x)
{
    return x->options.limits.d / 128 + (x->options.limits.d % 128 != 0);
}

static uint64_t xcore_flight_bytes(const rt_xcore *x)
{
    const rt_plan_limits *limits = &x->options.limits;
    uint64_t row_bytes = (uint64_t)limits->d + xcore_blocks(x) + sizeof(pr_slot);
    uint64_t n = (uint64_t)limits->row_max * limits->topk * row_bytes +
                 (uint64_t)x->flights[0].plan->part_max * 3 * 64;
    return (n + 63) / 64 * 64;
}

uint64_t rt_xcore_staging_bytes(const rt_xcore *x)
{
    return RT_FLIGHTS * xcore_flight_bytes(x);
}

/* ---- epochs ---- */

static xcore_link *xcore_links_of(const pc_epoch *epoch)
{
    const pr_placement *p = epoch->placement;
    uint32_t n = p != NULL ? p->n_rank : 0;
    xcore_link *links = cm_alloc(sizeof(*links) * n);
    for (uint32_t r = 0; r < n; r++) {
        const struct pc_epoch_member *member = pc_epoch_member_find(epoch, p->rank_member[r]);
        links[r].member_id = p->rank_member[r];
        links[r].address = member != NULL ? member->data_address : "";
    }
    return links;
}

void rt_xcore_offer(rt_xcore *x, pc_epoch *epoch, uint32_t self)
{
    pc_epoch *before = x->offered;
    cm_free(x->offered_links);
    x->offered = pc_epoch_hold(epoch);
    x->offered_self = self;
    x->offered_links = xcore_links_of(epoch);
    pc_epoch_release(before);
}

static xcore_link *xcore_find_member(xcore_link *links, uint32_t n, uint32_t member_id)
{
    for (uint32_t i = 0; i < n; i++) {
        if (links[i].member_id == member_id) {
            return &links[i];
        }
    }
    return NULL;
}

/* Something about links has changed: a layer that is stuck may be planned again. */
static void xcore_tell_news(rt_xcore *x)
{
    for (uint32_t i = 0; i < RT_FLIGHTS; i++) {
        x->flights[i].news = true;
    }
}

/* Takes over the links of workers that stay; those that left are ended. */
static void xcore_adopt(rt_xcore *x)
{
    const pr_placement *p = x->offered->placement;
    uint32_t n = p != NULL ? p->n_rank : 0;
    /* under another name every link must greet anew, and another cluster's ids mean other workers */
    bool same = x->epoch != NULL && x->epoch->cluster == x->offered->cluster && x->self == x->offered_self;
    for (uint32_t r = 0; r < n && same; r++) {
        xcore_link *link = &x->offered_links[r];
        xcore_link *old = xcore_find_member(x->links, x->n_link, link->member_id);
        if (old != NULL) {
            const char *address = link->address;
            *link = *old;
            link->address = address;
            old->handle = NULL;
            old->tell = false;
        }
    }
    cm_free(x->old_links);
    x->old_links = x->links;
    x->n_old = x->n_link;
    pc_epoch_release(x->epoch);
    x->links = x->offered_links;
    x->n_link = n;
    x->epoch = x->offered;
    x->self = x->offered_self;
    x->offered = NULL;
    x->offered_links = NULL;
    x->adopted = true;
    xcore_tell_news(x);
}

static bool xcore_between_rounds(const rt_xcore *x)
{
    bool between = true;
    for (uint32_t i = 0; i < RT_FLIGHTS; i++) {
        xcore_phase phase = x->flights[i].phase;
        between &= phase == XCORE_REST || phase == XCORE_PLANNING || phase == XCORE_BLOCKED;
    }
    return between;
}

/* ---- links ---- */

static void xcore_tell_lost(xcore_link *link, uint64_t now_ms, cm_status status)
{
    bool again = link->told_status != CM_OK;
    if (!again || now_ms >= link->tell_again_ms) {
        link->tell = true;
        link->told_again = again;
        link->told_status = status;
        link->tell_again_ms = now_ms + XCORE_REPORT_MS;
    }
}

/* The link is no longer to be counted on: what it owed is planned again. */
static void xcore_lose(rt_xcore *x, uint64_t now_ms, uint32_t rank, cm_status status)
{
    xcore_link *link = &x->links[rank];
    link->up = false;
    xcore_tell_lost(link, now_ms, status);
    link->retry_at_ms = now_ms + XCORE_RECONNECT_MS;
    xcore_tell_news(x);
    for (uint32_t k = 0; k < RT_FLIGHTS; k++) {
        xcore_flight *f = &x->flights[k];
        for (uint32_t i = 0; i < f->n_part; i++) {
            if (f->plan->parts[i].rank == rank && f->parts[i].state == PART_OPEN) {
                f->parts[i].state = PART_FAILED;
            }
        }
    }
}

static bool xcore_end_link(xcore_link *links, uint32_t n, bool all, rt_xact *act_out)
{
    for (uint32_t r = 0; r < n; r++) {
        if (links[r].handle != NULL && (all || links[r].leaving)) {
            *act_out = (rt_xact){.kind = RT_XACT_DISCONNECT, .rank = r, .handle = links[r].handle};
            links[r].handle = NULL;
            links[r].leaving = false;
            return true;
        }
    }
    return false;
}

bool rt_xcore_chore(rt_xcore *x, uint64_t now_ms, rt_xact *act_out)
{
    /* links of the epoch before are ended before there can be a third one */
    if (xcore_end_link(x->old_links, x->n_old, true, act_out)) {
        return true;
    }
    x->n_old = 0;
    if (x->offered != NULL && xcore_between_rounds(x)) {
        xcore_adopt(x);
    }
    if (x->adopted) {
        x->adopted = false;
        *act_out = (rt_xact){.kind = RT_XACT_ADOPTED};
        return true;
    }
    if (xcore_end_link(x->old_links, x->n_old, true, act_out) ||
        xcore_end_link(x->links, x->n_link, false, act_out)) {
        return true;
    }
    for (uint32_t r = 0; r < x->n_link; r++) {
        xcore_link *link = &x->links[r];
        if (link->tell) {
            link->tell = false;
            *act_out = (rt_xact){
                .kind = RT_XACT_REPORT, .rank = r, .status = link->told_status, .again = link->told_again};
            return true;
        }
        if (link->handle == NULL && now_ms >= link->retry_at_ms) {
            *act_out = (rt_xact){.kind = RT_XACT_CONNECT, .rank = r};
            return true;
        }
    }
    return false;
}

uint64_t rt_xcore_chore_ms(const rt_xcore *x)
{
    uint64_t at_ms = UINT64_MAX;
    for (uint32_t r = 0; r < x->n_link; r++) {
        if (x->links[r].handle == NULL && x->links[r].retry_at_ms < at_ms) {
            at_ms = x->links[r].retry_at_ms;
        }
    }
    return at_ms;
}

void rt_xcore_connecting(rt_xcore *x, uint64_t now_ms, uint32_t rank, void *handle)
{
    CM_ASSERT(rank < x->n_link && x->links[rank].handle == NULL);
    x->links[rank].handle = handle;
    x->links[rank].retry_at_ms = now_ms + XCORE_RECONNECT_MS;
    if (handle == NULL) {
        xcore_tell_lost(&x->links[rank], now_ms, CM_E_UNREACHABLE);
    }
}

static uint32_t xcore_find_handle(const rt_xcore *x, const void *handle)
{
    uint32_t r = 0;
    while (r < x->n_link && x->links[r].handle != handle) {
        r++;
    }
    return r;
}

void rt_xcore_up(rt_xcore *x, const void *handle)
{
    uint32_t r = xcore_find_handle(x, handle);
    if (r < x->n_link && !x->links[r].leaving) {
        xcore_link *link = &x->links[r];
        link->up = true;
        link->tell = link->told_status != CM_OK;
        link->told_status = CM_OK;
        link->told_again = false;
        xcore_tell_news(x);
    }
}

void rt_xcore_down(rt_xcore *x, uint64_t now_ms, const void *handle, cm_status status)
{
    uint32_t r = xcore_find_handle(x, handle);
    if (r < x->n_link) {
        x->links[r].handle = NULL;
        if (x->links[r].leaving) {
            x->links[r].leaving = false; /* it went by itself before it was ended; the loss is known */
        } else {
            xcore_lose(x, now_ms, r, status);
        }
        return;
    }
    xcore_link *old = NULL;
    for (uint32_t i = 0; i < x->n_old; i++) {
        old = x->old_links[i].handle == handle ? &x->old_links[i] : old;
    }
    if (old != NULL) {
        old->handle = NULL;
    }
}

uint32_t rt_xcore_n_link(const rt_xcore *x)
{
    return x->n_link;
}

rt_xlink rt_xcore_link(const rt_xcore *x, uint32_t rank)
{
    CM_ASSERT(rank < x->n_link);
    const xcore_link *link = &x->links[rank];
    return (rt_xlink){link->member_id, link->address, link->handle, link->up};
}

bool rt_xcore_ready(const rt_xcore *x)
{
    bool all_up = x->n_link > 0;
    for (uint32_t r = 0; r < x->n_link; r++) {
        all_up &= x->links[r].up;
    }
    return all_up;
}

const pc_epoch *rt_xcore_epoch(const rt_xcore *x)
{
    return x->epoch;
}

uint32_t rt_xcore_self(const rt_xcore *x)
{
    return x->self;
}

/* ---- frames ---- */

static const xcore_flight *xcore_flight_at(const rt_xcore *x, uint32_t flight)
{
    CM_ASSERT(flight < RT_FLIGHTS);
    return &x->flights[flight];
}

static uint64_t xcore_payload_bytes(const rt_xcore *x, const rt_part *part)
{
    return pr_dispatch_bytes(part->n_slot, part->n_row, x->options.limits.d, xcore_blocks(x));
}

uint64_t rt_xcore_payload_bytes(const rt_xcore *x, uint32_t flight, uint32_t i)
{
    return xcore_payload_bytes(x, &xcore_flight_at(x, flight)->plan->parts[i]);
}

void rt_xcore_pack(const rt_xcore *x, uint32_t flight, uint32_t i, pr_dispatch *header_out, uint8_t *payload)
{
    const xcore_flight *f = xcore_flight_at(x, flight);
    const rt_part *part = &f->plan->parts[i];
    uint32_t d = x->options.limits.d, n_block = xcore_blocks(x);
    *header_out = (pr_dispatch){
        .head = {.version = PR_FRAME_VERSION,
                 .dtype = PR_DTYPE_E4M3,
                 .router = x->self,
                 .cluster = x->epoch->cluster,
                 .epoch = x->epoch->number,
                 .step = f->layer.step,
                 .layer = f->layer.layer,
                 .exchange = f->first_exchange + i},
        .d = d,
        .n_row = part->n_row,
        .n_slot = part->n_slot,
        .row_blocks = n_block,
        .flight = flight,
    };
    uint8_t *codes = payload + pr_dispatch_codes_at(part->n_slot);
    uint8_t *scales = payload + pr_dispatch_scales_at(part->n_slot, part->n_row, d);
    memcpy(payload, f->plan->slots + part->slot0, sizeof(pr_slot) * part->n_slot);
    for (uint32_t k = 0; k < part->n_row; k++) {
        uint32_t row = f->plan->rows[part->row0 + k];
        memcpy(codes + (size_t)k * d, f->layer.codes + (size_t)row * d, d);
        memcpy(scales + (size_t)k * n_block, f->layer.scales + (size_t)row * n_block, n_block);
    }
}

/* The open part that a frame answers; NULL if none: an answer to an earlier round, or nonsense. */
static xcore_flight *xcore_part_of(rt_xcore *x, const pr_frame_head *head, const void *handle,
                                   uint32_t *part_out)
{
    xcore_flight *f = x->flights;
    while (f < x->flights + RT_FLIGHTS && head->exchange - f->first_exchange >= f->n_part) {
        f++;
    }
    uint32_t i = f < x->flights + RT_FLIGHTS ? head->exchange - f->first_exchange : 0;
    if (f == x->flights + RT_FLIGHTS || f->parts[i].state != PART_OPEN ||
        x->links[f->plan->parts[i].rank].handle != handle || head->step != f->layer.step ||
        head->layer != f->layer.layer || head->cluster != x->epoch->cluster ||
        head->epoch != x->epoch->number) {
        return NULL;
    }
    *part_out = i;
    return f;
}

static void xcore_take_results(rt_xcore *x, xcore_flight *f, uint32_t i, const uint16_t *rows,
                               uint32_t n_slot)
{
    const rt_part *part = &f->plan->parts[i];
    uint32_t d = x->options.limits.d, slot0 = part->slot0 + f->parts[i].n_done;
    size_t row_bytes = sizeof(uint16_t) * d;
    bool cached = f->layer.n_row * x->options.limits.topk * row_bytes <= XCORE_CACHED_BYTES;
    for (uint32_t s = 0; s < n_slot; s++) {
        uint32_t target = f->plan->targets[slot0 + s];
        uint16_t *to = f->layer.results + (size_t)target * d;
        if (cached) {
            memcpy(to, rows + (size_t)s * d, row_bytes);
        } else {
            cm_copy_past_caches(to, rows + (size_t)s * d, row_bytes);
        }
        f->wanted[target] = 0;
    }
    f->n_wanted -= n_slot;
    f->parts[i].n_done += n_slot;
    f->parts[i].state = f->parts[i].n_done == part->n_slot ? PART_DONE : PART_OPEN;
    f->progress = true;
}

cm_status rt_xcore_combine(rt_xcore *x, const void *handle, const void *header, uint32_t header_bytes,
                           const void *payload, uint64_t payload_bytes, cm_error *err)
{
    const pr_combine *frame = header;
    uint32_t i = 0;
    CM_TRY(pr_combine_check(header, header_bytes, payload_bytes, x->options.limits.d, err));
    xcore_flight *f = xcore_part_of(x, &frame->head, handle, &i);
    if (f == NULL || frame->n_slot == 0 || frame->slot0 != f->parts[i].n_done ||
        frame->n_slot > f->plan->parts[i].n_slot - frame->slot0) {
        return cm_error_set(err, CM_E_PROTOCOL, "exchange", "it answers nothing that is open");
    }
    xcore_take_results(x, f, i, payload, frame->n_slot);
    return CM_OK;
}

cm_status rt_xcore_refuse(rt_xcore *x, const void *handle, const void *header, uint32_t header_bytes,
                          cm_error *err)
{
    const pr_refuse *frame = header;
    uint32_t i = 0;
    xcore_flight *f = header_bytes == sizeof(*frame) ? xcore_part_of(x, &frame->head, handle, &i) : NULL;
    if (f == NULL) {
        return cm_error_set(err, CM_E_PROTOCOL, "exchange", "it answers nothing that is open");
    }
    f->parts[i].state = PART_FAILED;
    return CM_OK;
}

/* ---- one layer: rounds of frames until every slot has its row ---- */

void rt_xcore_begin(rt_xcore *x, uint32_t flight, const rt_xcore_layer *layer)
{
    CM_ASSERT(flight < RT_FLIGHTS && x->flights[flight].phase == XCORE_REST);
    xcore_flight *f = &x->flights[flight];
    f->layer = *layer;
    f->n_wanted = layer->n_row * x->options.limits.topk;
    memset(f->wanted, 1, f->n_wanted);
    f->give_up_ms = 0;
    f->expert = 0;
    f->phase = XCORE_PLANNING;
}

void rt_xcore_drop(rt_xcore *x, uint32_t flight)
{
    CM_ASSERT(flight < RT_FLIGHTS && !x->flights[flight].sending);
    x->flights[flight].n_part = 0;
    x->flights[flight].phase = XCORE_REST;
}

void rt_xcore_stop(rt_xcore *x)
{
    x->stopping = true;
}

static void flight_finish(xcore_flight *f, cm_status status)
{
    f->status = status;
    f->n_part = 0;
    f->phase = XCORE_OVER;
}

static cm_status flight_plan(rt_xcore *x, xcore_flight *f)
{
    if (x->epoch == NULL || x->epoch->placement == NULL) {
        return CM_E_NO_OWNER;
    }
    bool all_up = true, all_wanted = f->n_wanted == f->layer.n_row * x->options.limits.topk;
    memset(x->avoid, 0, PR_RANK_MAX / 8);
    for (uint32_t r = 0; r < x->n_link; r++) {
        if (!x->links[r].up) {
            x->avoid[r / 64] |= 1ull << (r % 64);
            all_up = false;
        }
    }
    return rt_plan_build(f->plan, &x->options.limits, x->epoch->placement, f->layer.layer, f->layer.experts,
                         f->layer.weights, f->layer.n_row, all_wanted ? NULL : f->wanted,
                         all_up ? NULL : x->avoid, &f->expert);
}

static rt_xact xcore_wait(uint64_t until_ms)
{
    return (rt_xact){.kind = RT_XACT_WAIT, .until_ms = until_ms};
}

/* false, here and below: the state has changed, look again. */
static bool flight_begin_round(rt_xcore *x, xcore_flight *f, uint64_t now_ms, rt_xact *act_out)
{
    if (f->n_wanted == 0) {
        flight_finish(f, CM_OK);
        return false;
    }
    if (x->offered != NULL) { /* the epoch first: by a chore, which may have to wait for the other flight */
        *act_out = xcore_wait(xcore_between_rounds(x) ? now_ms : UINT64_MAX);
        return true;
    }
    f->news = false;
    if (flight_plan(x, f) != CM_OK) {
        f->n_part = 0;
        f->phase = XCORE_WAITING; /* for nobody: the round is over at once */
        return false;
    }
    f->n_part = f->plan->n_part;
    f->first_exchange = x->next_exchange;
    x->next_exchange += f->n_part;
    for (uint32_t i = 0; i < f->n_part; i++) {
        f->parts[i] = (xcore_part){.state = PART_FAILED};
    }
    f->at = 0;
    f->staged = (uint64_t)(f - x->flights) * xcore_flight_bytes(x);
    f->again = f->full = false;
    f->phase = XCORE_DRAINING;
    return false;
}

static bool flight_settled(const xcore_flight *f)
{
    for (uint32_t i = 0; i < f->n_part; i++) {
        if (f->parts[i].state == PART_OPEN) {
            return false;
        }
    }
    return true;
}

static void flight_expire(rt_xcore *x, xcore_flight *f, uint64_t now_ms)
{
    for (uint32_t i = 0; i < f->n_part; i++) {
        uint32_t rank = f->plan->parts[i].rank;
        if (f->parts[i].state == PART_OPEN && now_ms >= f->parts[i].deadline_ms) {
            x->links[rank].leaving = true;
            xcore_lose(x, now_ms, rank, CM_E_DEADLINE);
        }
    }
}

/* A round ended and slots are left: wait for news, but not for ever. Results that came push the end away. */
static void flight_block(rt_xcore *x, xcore_flight *f, uint64_t now_ms)
{
    if (f->give_up_ms == 0 || f->progress) {
        f->progress = false;
        f->give_up_ms = now_ms + x->options.wait_ms;
        x->n_retries++;
    }
    f->retry_at_ms = now_ms + XCORE_RETRY_MS;
    f->phase = XCORE_BLOCKED;
}

static bool flight_send(rt_xcore *x, xcore_flight *f, uint64_t now_ms, rt_xact *act_out)
{
    if (f->at == f->n_part) {
        f->phase = XCORE_WAITING;
        return false;
    }
    const rt_part *part = &f->plan->parts[f->at];
    const xcore_link *link = &x->links[part->rank];
    if (link->handle == NULL || !link->up) { /* lost since it was planned for */
        f->staged += xcore_payload_bytes(x, part);
        f->at++;
        f->again = f->full = false;
        return false;
    }
    if (f->full) {
        f->full = false;
        *act_out = xcore_wait(now_ms + XCORE_RETRY_MS);
        return true;
    }
    if (!f->again) {
        f->parts[f->at].deadline_ms = now_ms + x->options.answer_ms;
    }
    f->sending = true;
    *act_out = (rt_xact){.kind = RT_XACT_SEND,
                         .part = f->at,
                         .rank = part->rank,
                         .handle = link->handle,
                         .staged_at = f->staged,
                         .again = f->again};
    return true;
}

void rt_xcore_sent(rt_xcore *x, cm_status status)
{
    xcore_flight *f = x->flights;
    while (f < x->flights + RT_FLIGHTS && !f->sending) {
        f++;
    }
    CM_ASSERT(f < x->flights + RT_FLIGHTS && f->phase == XCORE_SENDING);
    f->sending = false;
    f->again = f->full = status == CM_AGAIN;
    if (status == CM_AGAIN) {
        return;
    }
    f->parts[f->at].state = status == CM_OK ? PART_OPEN : PART_FAILED;
    f->n_sending += status == CM_OK;
    f->staged += xcore_payload_bytes(x, &f->plan->parts[f->at++]);
}

void rt_xcore_left(rt_xcore *x, uint32_t flight)
{
    CM_ASSERT(flight < RT_FLIGHTS && x->flights[flight].n_sending > 0);
    x->flights[flight].n_sending--;
}

static bool flight_await(rt_xcore *x, xcore_flight *f, uint64_t now_ms, rt_xact *act_out)
{
    flight_expire(x, f, now_ms);
    if (flight_settled(f)) {
        if (f->n_wanted == 0) {
            flight_finish(f, CM_OK);
        } else {
            flight_block(x, f, now_ms);
        }
        return false;
    }
    if (x->stopping) {
        flight_finish(f, CM_E_CANCELLED);
        return false;
    }
    uint64_t until_ms = UINT64_MAX;
    for (uint32_t i = 0; i < f->n_part; i++) {
        if (f->parts[i].state == PART_OPEN && f->parts[i].deadline_ms < until_ms) {
            until_ms = f->parts[i].deadline_ms;
        }
    }
    *act_out = xcore_wait(until_ms);
    return true;
}

/* Nobody whom it could be asked of has computed it. */
static void flight_give_up(xcore_flight *f)
{
    uint32_t i = 0;
    while (!f->wanted[i]) {
        i++;
    }
    f->expert = (uint32_t)f->layer.experts[i];
    flight_finish(f, CM_E_NO_OWNER);
}

static bool flight_unblock(rt_xcore *x, xcore_flight *f, uint64_t now_ms, rt_xact *act_out)
{
    if (x->stopping) {
        flight_finish(f, CM_E_CANCELLED);
    } else if (now_ms >= f->give_up_ms) {
        flight_give_up(f);
    } else if (f->news || now_ms >= f->retry_at_ms) {
        f->phase = XCORE_PLANNING;
    } else {
        *act_out = xcore_wait(f->retry_at_ms < f->give_up_ms ? f->retry_at_ms : f->give_up_ms);
        return true;
    }
    return false;
}

static rt_xact flight_next(rt_xcore *x, xcore_flight *f, uint64_t now_ms)
{
    rt_xact act;
    for (;;) {
        bool said = false;
        switch (f->phase) {
        case XCORE_REST:
            return xcore_wait(UINT64_MAX);
        case XCORE_PLANNING:
            said = flight_begin_round(x, f, now_ms, &act);
            break;
        case XCORE_BLOCKED:
            said = flight_unblock(x, f, now_ms, &act);
            break;
        case XCORE_DRAINING:
            if (f->n_sending > 0) {
                return xcore_wait(now_ms + XCORE_RETRY_MS);
            }
            f->phase = XCORE_SENDING;
            break;
        case XCORE_SENDING:
            said = flight_send(x, f, now_ms, &act);
            break;
        case XCORE_WAITING:
            said = flight_await(x, f, now_ms, &act);
            break;
        case XCORE_OVER:
            f->phase = XCORE_REST;
            return (rt_xact){.kind = RT_XACT_DONE, .status = f->status, .expert = f->expert};
        }
        if (said) {
            return act;
        }
    }
}

rt_xact rt_xcore_next(rt_xcore *x, uint64_t now_ms)
{
    uint64_t until_ms = UINT64_MAX;
    for (uint32_t i = 0; i < RT_FLIGHTS; i++) {
        rt_xact act = flight_next(x, &x->flights[i], now_ms);
        act.flight = i;
        if (act.kind != RT_XACT_WAIT) {
            return act;
        }
        until_ms = act.until_ms < until_ms ? act.until_ms : until_ms;
    }
    return xcore_wait(until_ms);
}

uint64_t rt_xcore_n_retries(const rt_xcore *x)
{
    return x->n_retries;
}

uint32_t rt_xcore_n_open(const rt_xcore *x)
{
    uint32_t n = 0;
    for (uint32_t k = 0; k < RT_FLIGHTS; k++) {
        const xcore_flight *f = &x->flights[k];
        n += f->n_sending;
        for (uint32_t i = 0; i < f->n_part; i++) {
            n += f->parts[i].state == PART_OPEN;
        }
    }
    return n;
}
