#include "router/engine/exchange_core.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

enum {
    XCORE_RECONNECT_MS = 200, /* between attempts to reach a worker of the epoch */
    XCORE_REPORT_MS = 2000,   /* a loss that lasts is told again: the coordinator may be another one by now */
    XCORE_RETRY_MS = 20,      /* a refused or lost part is planned again after so long, or at a link's news */
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

struct rt_xcore {
    rt_xcore_options options;
    rt_plan *plan;
    uint8_t *wanted; /* [row_max * topk] slots without a result */
    uint64_t *avoid; /* bit per rank: no link up */
    xcore_part *parts;
    uint32_t n_part;
    uint32_t first_exchange; /* number of part 0 of the round; the others follow */
    uint32_t next_exchange;
    uint32_t n_sending; /* frames that have not left */

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

    xcore_phase phase;
    rt_xcore_layer layer;
    uint32_t n_wanted;
    uint32_t at;         /* sending: next part */
    uint64_t staged;     /* sending: bytes before it */
    bool sending, again; /* a SEND is out; the next one repeats it */
    bool full;           /* there was no room: wait first */
    bool overlap_done, news, progress, stopping;
    uint32_t expert;                  /* the first without a row, when the layer is given up */
    uint64_t retry_at_ms, give_up_ms; /* give_up_ms 0: not stuck */
    uint64_t n_retries;
    cm_status status; /* of the layer, with XCORE_OVER */
};

rt_xcore *rt_xcore_create(const rt_xcore_options *options)
{
    const rt_plan_limits *limits = &options->limits;
    rt_xcore *x = cm_alloc(sizeof(*x));
    x->options = *options;
    x->plan = rt_plan_create(limits);
    x->wanted = cm_alloc((uint64_t)limits->row_max * limits->topk);
    x->avoid = cm_alloc(PR_RANK_MAX / 8);
    x->parts = cm_alloc(sizeof(xcore_part) * x->plan->part_max);
    return x;
}

void rt_xcore_destroy(rt_xcore *x)
{
    pc_epoch_release(x->offered);
    pc_epoch_release(x->epoch);
    rt_plan_destroy(x->plan);
    cm_free(x->wanted);
    cm_free(x->avoid);
    cm_free(x->parts);
    cm_free(x->offered_links);
    cm_free(x->links);
    cm_free(x->old_links);
    cm_free(x);
}

static uint32_t xcore_blocks(const rt_xcore *x)
{
    return x->options.limits.d / 128 + (x->options.limits.d % 128 != 0);
}

uint64_t rt_xcore_staging_bytes(const rt_xcore *x)
{
    const rt_plan_limits *limits = &x->options.limits;
    uint64_t row_bytes = (uint64_t)limits->d + xcore_blocks(x) + sizeof(pr_slot);
    return (uint64_t)limits->row_max * limits->topk * row_bytes + (uint64_t)x->plan->part_max * 3 * 64;
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
    x->news = true;
}

static bool xcore_between_rounds(const rt_xcore *x)
{
    return x->phase == XCORE_REST || x->phase == XCORE_PLANNING || x->phase == XCORE_BLOCKED;
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
    x->news = true;
    for (uint32_t i = 0; i < x->n_part; i++) {
        if (x->plan->parts[i].rank == rank && x->parts[i].state == PART_OPEN) {
            x->parts[i].state = PART_FAILED;
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
        x->news = true;
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

uint64_t rt_xcore_payload_bytes(const rt_xcore *x, uint32_t i)
{
    const rt_part *part = &x->plan->parts[i];
    return pr_dispatch_bytes(part->n_slot, part->n_row, x->options.limits.d, xcore_blocks(x));
}

void rt_xcore_pack(const rt_xcore *x, uint32_t i, pr_dispatch *header_out, uint8_t *payload)
{
    const rt_part *part = &x->plan->parts[i];
    uint32_t d = x->options.limits.d, n_block = xcore_blocks(x);
    *header_out = (pr_dispatch){
        .head = {.version = PR_FRAME_VERSION,
                 .dtype = PR_DTYPE_E4M3,
                 .router = x->self,
                 .cluster = x->epoch->cluster,
                 .epoch = x->epoch->number,
                 .step = x->layer.step,
                 .layer = x->layer.layer,
                 .exchange = x->first_exchange + i},
        .d = d,
        .n_row = part->n_row,
        .n_slot = part->n_slot,
        .row_blocks = n_block,
    };
    uint8_t *codes = payload + pr_dispatch_codes_at(part->n_slot);
    uint8_t *scales = payload + pr_dispatch_scales_at(part->n_slot, part->n_row, d);
    memcpy(payload, x->plan->slots + part->slot0, sizeof(pr_slot) * part->n_slot);
    for (uint32_t k = 0; k < part->n_row; k++) {
        uint32_t row = x->plan->rows[part->row0 + k];
        memcpy(codes + (size_t)k * d, x->layer.codes + (size_t)row * d, d);
        memcpy(scales + (size_t)k * n_block, x->layer.scales + (size_t)row * n_block, n_block);
    }
}

/* The round's part a frame answers, n_part if none: an answer to an earlier round, or nonsense. */
static uint32_t xcore_part_of(const rt_xcore *x, const pr_frame_head *head, const void *handle)
{
    uint32_t i = head->exchange - x->first_exchange;
    if (i >= x->n_part || x->parts[i].state != PART_OPEN ||
        x->links[x->plan->parts[i].rank].handle != handle || head->step != x->layer.step ||
        head->layer != x->layer.layer || head->cluster != x->epoch->cluster ||
        head->epoch != x->epoch->number) {
        return x->n_part;
    }
    return i;
}

static void xcore_take_results(rt_xcore *x, uint32_t i, const uint16_t *rows)
{
    const rt_part *part = &x->plan->parts[i];
    uint32_t d = x->options.limits.d;
    for (uint32_t s = 0; s < part->n_slot; s++) {
        uint32_t target = x->plan->targets[part->slot0 + s];
        memcpy(x->layer.results + (size_t)target * d, rows + (size_t)s * d, sizeof(uint16_t) * d);
        x->wanted[target] = 0;
    }
    x->n_wanted -= part->n_slot;
    x->parts[i].state = PART_DONE;
    x->progress = true;
}

cm_status rt_xcore_combine(rt_xcore *x, const void *handle, const void *header, uint32_t header_bytes,
                           const void *payload, uint64_t payload_bytes, cm_error *err)
{
    const pr_combine *frame = header;
    CM_TRY(pr_combine_check(header, header_bytes, payload_bytes, x->options.limits.d, err));
    uint32_t i = xcore_part_of(x, &frame->head, handle);
    if (i == x->n_part || frame->n_slot != x->plan->parts[i].n_slot) {
        return cm_error_set(err, CM_E_PROTOCOL, "exchange", "it answers nothing that is open");
    }
    xcore_take_results(x, i, payload);
    return CM_OK;
}

cm_status rt_xcore_refuse(rt_xcore *x, const void *handle, const void *header, uint32_t header_bytes,
                          cm_error *err)
{
    const pr_refuse *frame = header;
    uint32_t i = header_bytes == sizeof(*frame) ? xcore_part_of(x, &frame->head, handle) : x->n_part;
    if (i == x->n_part) {
        return cm_error_set(err, CM_E_PROTOCOL, "exchange", "it answers nothing that is open");
    }
    x->parts[i].state = PART_FAILED;
    return CM_OK;
}

/* ---- one layer: rounds of frames until every slot has its row ---- */

void rt_xcore_begin(rt_xcore *x, const rt_xcore_layer *layer)
{
    CM_ASSERT(x->phase == XCORE_REST);
    x->layer = *layer;
    x->n_wanted = layer->n_row * x->options.limits.topk;
    memset(x->wanted, 1, x->n_wanted);
    x->overlap_done = false;
    x->give_up_ms = 0;
    x->expert = 0;
    x->phase = XCORE_PLANNING;
}

void rt_xcore_stop(rt_xcore *x)
{
    x->stopping = true;
}

static void xcore_finish(rt_xcore *x, cm_status status)
{
    x->status = status;
    x->n_part = 0;
    x->phase = XCORE_OVER;
}

static cm_status xcore_plan(rt_xcore *x)
{
    if (x->epoch == NULL || x->epoch->placement == NULL) {
        return CM_E_NO_OWNER;
    }
    memset(x->avoid, 0, PR_RANK_MAX / 8);
    for (uint32_t r = 0; r < x->n_link; r++) {
        if (!x->links[r].up) {
            x->avoid[r / 64] |= 1ull << (r % 64);
        }
    }
    return rt_plan_build(x->plan, &x->options.limits, x->epoch->placement, x->layer.layer, x->layer.experts,
                         x->layer.weights, x->layer.n_row, x->wanted, x->avoid, &x->expert);
}

static void xcore_begin_round(rt_xcore *x)
{
    if (x->n_wanted == 0) {
        xcore_finish(x, CM_OK);
        return;
    }
    x->news = false;
    if (xcore_plan(x) != CM_OK) {
        x->n_part = 0;
        x->phase = XCORE_WAITING; /* for nobody: the round is over at once */
        return;
    }
    x->n_part = x->plan->n_part;
    x->first_exchange = x->next_exchange;
    x->next_exchange += x->n_part;
    for (uint32_t i = 0; i < x->n_part; i++) {
        x->parts[i] = (xcore_part){.state = PART_FAILED};
    }
    x->at = 0;
    x->staged = 0;
    x->sending = x->again = x->full = false;
    x->phase = XCORE_DRAINING;
}

static bool xcore_settled(const rt_xcore *x)
{
    for (uint32_t i = 0; i < x->n_part; i++) {
        if (x->parts[i].state == PART_OPEN) {
            return false;
        }
    }
    return true;
}

static void xcore_expire(rt_xcore *x, uint64_t now_ms)
{
    for (uint32_t i = 0; i < x->n_part; i++) {
        uint32_t rank = x->plan->parts[i].rank;
        if (x->parts[i].state == PART_OPEN && now_ms >= x->parts[i].deadline_ms) {
            x->links[rank].leaving = true;
            xcore_lose(x, now_ms, rank, CM_E_DEADLINE);
        }
    }
}

/* A round ended and slots are left: wait for news, but not for ever. Results that came push the end away. */
static void xcore_block(rt_xcore *x, uint64_t now_ms)
{
    if (x->give_up_ms == 0 || x->progress) {
        x->progress = false;
        x->give_up_ms = now_ms + x->options.wait_ms;
        x->n_retries++;
    }
    x->retry_at_ms = now_ms + XCORE_RETRY_MS;
    x->phase = XCORE_BLOCKED;
}

static rt_xact xcore_wait(uint64_t until_ms)
{
    return (rt_xact){.kind = RT_XACT_WAIT, .until_ms = until_ms};
}

/* false: the state has changed, look again. */
static bool xcore_send(rt_xcore *x, uint64_t now_ms, rt_xact *act_out)
{
    if (x->at == x->n_part) {
        x->phase = XCORE_WAITING;
        if (x->overlap_done) {
            return false;
        }
        x->overlap_done = true;
        *act_out = (rt_xact){.kind = RT_XACT_OVERLAP};
        return true;
    }
    const xcore_link *link = &x->links[x->plan->parts[x->at].rank];
    if (link->handle == NULL || !link->up) { /* lost since it was planned for */
        x->staged += rt_xcore_payload_bytes(x, x->at++);
        x->again = x->full = false;
        return false;
    }
    if (x->full) {
        x->full = false;
        *act_out = xcore_wait(now_ms + XCORE_RETRY_MS);
        return true;
    }
    if (!x->again) {
        x->parts[x->at].deadline_ms = now_ms + x->options.answer_ms;
    }
    x->sending = true;
    *act_out = (rt_xact){.kind = RT_XACT_SEND,
                         .part = x->at,
                         .rank = x->plan->parts[x->at].rank,
                         .handle = link->handle,
                         .staged_at = x->staged,
                         .again = x->again};
    return true;
}

void rt_xcore_sent(rt_xcore *x, cm_status status)
{
    CM_ASSERT(x->phase == XCORE_SENDING && x->sending);
    x->sending = false;
    x->again = x->full = status == CM_AGAIN;
    if (status == CM_AGAIN) {
        return;
    }
    x->parts[x->at].state = status == CM_OK ? PART_OPEN : PART_FAILED;
    x->n_sending += status == CM_OK;
    x->staged += rt_xcore_payload_bytes(x, x->at++);
}

void rt_xcore_left(rt_xcore *x)
{
    CM_ASSERT(x->n_sending > 0);
    x->n_sending--;
}

/* false: the state has changed, look again. */
static bool xcore_await(rt_xcore *x, uint64_t now_ms, rt_xact *act_out)
{
    xcore_expire(x, now_ms);
    if (xcore_settled(x)) {
        if (x->n_wanted == 0) {
            xcore_finish(x, CM_OK);
        } else {
            xcore_block(x, now_ms);
        }
        return false;
    }
    if (x->stopping) {
        xcore_finish(x, CM_E_CANCELLED);
        return false;
    }
    uint64_t until_ms = UINT64_MAX;
    for (uint32_t i = 0; i < x->n_part; i++) {
        if (x->parts[i].state == PART_OPEN && x->parts[i].deadline_ms < until_ms) {
            until_ms = x->parts[i].deadline_ms;
        }
    }
    *act_out = xcore_wait(until_ms);
    return true;
}

/* Nobody whom it could be asked of has computed it. */
static void xcore_give_up(rt_xcore *x)
{
    uint32_t i = 0;
    while (!x->wanted[i]) {
        i++;
    }
    x->expert = (uint32_t)x->layer.experts[i];
    xcore_finish(x, CM_E_NO_OWNER);
}

static bool xcore_unblock(rt_xcore *x, uint64_t now_ms, rt_xact *act_out)
{
    if (x->stopping) {
        xcore_finish(x, CM_E_CANCELLED);
    } else if (now_ms >= x->give_up_ms) {
        xcore_give_up(x);
    } else if (x->news || now_ms >= x->retry_at_ms) {
        x->phase = XCORE_PLANNING;
    } else {
        *act_out = xcore_wait(x->retry_at_ms < x->give_up_ms ? x->retry_at_ms : x->give_up_ms);
        return true;
    }
    return false;
}

rt_xact rt_xcore_next(rt_xcore *x, uint64_t now_ms)
{
    rt_xact act;
    for (;;) {
        bool said = false;
        switch (x->phase) {
        case XCORE_REST:
            return xcore_wait(UINT64_MAX);
        case XCORE_PLANNING:
            xcore_begin_round(x);
            break;
        case XCORE_BLOCKED:
            said = xcore_unblock(x, now_ms, &act);
            break;
        case XCORE_DRAINING:
            if (x->n_sending > 0) {
                return xcore_wait(now_ms + XCORE_RETRY_MS);
            }
            x->phase = XCORE_SENDING;
            break;
        case XCORE_SENDING:
            said = xcore_send(x, now_ms, &act);
            break;
        case XCORE_WAITING:
            said = xcore_await(x, now_ms, &act);
            break;
        case XCORE_OVER:
            x->phase = XCORE_REST;
            return (rt_xact){.kind = RT_XACT_DONE, .status = x->status, .expert = x->expert};
        }
        if (said) {
            return act;
        }
    }
}

uint64_t rt_xcore_n_retries(const rt_xcore *x)
{
    return x->n_retries;
}

uint32_t rt_xcore_n_open(const rt_xcore *x)
{
    uint32_t n = x->n_sending;
    for (uint32_t i = 0; i < x->n_part; i++) {
        n += x->parts[i].state == PART_OPEN;
    }
    return n;
}
