/* Links. Each direction is a queue whose head is delivered when its time has come; strays (what comes
 * twice or late) fly on their own. A link ends for one side when it disconnects, dies, hears nothing for
 * silence_ms, or gets the other's goodbye. */
#include <stdlib.h>
#include <string.h>

#include "common/base/assert.h"
#include "tests/sim/sim.h"

enum {
    WIRE_LATENCY_MAX_US = 400,
    WIRE_CONTROL_SILENCES = 3, /* how much longer a control session bears silence */
};

typedef enum flight_kind { FLIGHT_HELLO, FLIGHT_WELCOME, FLIGHT_DATA, FLIGHT_BEAT, FLIGHT_BYE } flight_kind;

/* A message on its way. */
typedef struct wire_flight {
    TAILQ_ENTRY(wire_flight) link;
    flight_kind kind;
    uint64_t ready_us;
    sim_end *to;
    sim_message message;
    net_identity identity;
    cm_status status;     /* of a goodbye */
    const void *borrowed; /* the sender's data, not to be touched before sent */
    void *cookie;         /* NULL: nobody waits to be told */
    bool counted;         /* in the sender's n_out */
} wire_flight;

typedef struct wire_queue {
    TAILQ_HEAD(, wire_flight) flights;
    uint64_t last_ready_us;
    bool armed;
} wire_queue;

struct sim_link {
    TAILQ_ENTRY(sim_link) link;
    sim_class class;
    sim_end ends[2];
    wire_queue queues[2]; /* to that end */
    char address[16];
};

sim_class sim_end_class(const sim_end *end)
{
    return end->link->class;
}

static sim_end *wire_other(const sim_end *end)
{
    return &end->link->ends[1 - end->side];
}

static void wire_free(wire_flight *flight)
{
    cm_free(flight->message.data);
    cm_free(flight);
}

/* ---- the sender's side of a message ---- */

typedef struct wire_receipt {
    sim_proc *proc;
    void *cookie;
} wire_receipt;

static void wire_tell_sent(sim *s, void *arg, uint64_t tag)
{
    wire_receipt *receipt = arg;
    if (!receipt->proc->alive || receipt->proc->paused_until_us == SIM_NEVER) {
        cm_free(receipt);
    } else if (!sim_put_off(s, receipt->proc, wire_tell_sent, arg, tag)) {
        receipt->proc->ops->sent(s, receipt->proc, receipt->cookie);
        sim_go(s, receipt->proc);
        cm_free(receipt);
    }
}

/* Its memory is the sender's again. */
static void wire_complete(sim *s, wire_flight *flight)
{
    sim_end *from = wire_other(flight->to);
    if (flight->counted) {
        flight->counted = false;
        from->n_out--;
    }
    if (flight->cookie == NULL || !from->proc->alive) {
        return;
    }
    if (memcmp(flight->borrowed, flight->message.data, flight->message.n_bytes) != 0) {
        sim_fail(s, "%s wrote into a frame on its way to %s", from->proc->name, flight->to->link->address);
    }
    wire_receipt *receipt = cm_alloc(sizeof(*receipt));
    *receipt = (wire_receipt){from->proc, flight->cookie};
    flight->cookie = NULL;
    sim_at(s, s->now_us, wire_tell_sent, receipt, 0);
}

/* All that this end sent and that has not arrived. */
static void wire_complete_all(sim *s, const sim_end *from)
{
    wire_flight *flight;
    TAILQ_FOREACH (flight, &from->link->queues[1 - from->side].flights, link) {
        wire_complete(s, flight);
    }
}

/* ---- queues ---- */

static void wire_deliver(sim *s, void *arg, uint64_t side);

static void wire_arm(sim *s, sim_link *link, uint32_t side, uint64_t at_us)
{
    wire_queue *queue = &link->queues[side];
    if (!queue->armed && at_us != SIM_NEVER) {
        queue->armed = true;
        sim_at(s, at_us > s->now_us ? at_us : s->now_us, wire_deliver, link, side);
    }
}

static uint64_t wire_latency(sim *s, const sim_proc *a, const sim_proc *b)
{
    uint64_t us = sim_between(s, SIM_WIRE, 20, WIRE_LATENCY_MAX_US);
    if (s->now_us < a->slow_until_us || (b != NULL && s->now_us < b->slow_until_us)) {
        us *= 200;
    }
    if (sim_strikes(s, SIM_FAULT_wire_delay)) {
        us += sim_between(s, SIM_WIRE, 1, 3000) * SIM_MS;
    }
    return us;
}

static wire_flight *wire_post(sim *s, sim_end *from, flight_kind kind)
{
    sim_end *to = wire_other(from);
    wire_queue *queue = &to->link->queues[to->side];
    wire_flight *flight = cm_alloc(sizeof(*flight));
    flight->kind = kind;
    flight->to = to;
    flight->ready_us = s->now_us + wire_latency(s, from->proc, to->proc);
    if (flight->ready_us < queue->last_ready_us) {
        flight->ready_us = queue->last_ready_us;
    }
    queue->last_ready_us = flight->ready_us;
    TAILQ_INSERT_TAIL(&queue->flights, flight, link);
    wire_arm(s, to->link, to->side, flight->ready_us);
    return flight;
}

static void wire_say_bye(sim *s, sim_end *from, cm_status status)
{
    wire_post(s, from, FLIGHT_BYE)->status = status;
}

/* The end knows nothing of the link from now on. */
static void wire_close(sim *s, sim_end *end)
{
    end->closed = true;
    end->up = false;
    wire_complete_all(s, end);
}

static void wire_down(sim *s, sim_end *end, cm_status status)
{
    bool known = end->side == 0 || end->up;
    wire_close(s, end);
    if (known && end->proc != NULL && end->proc->alive) {
        end->proc->ops->down(s, end->proc, end, status);
        sim_go(s, end->proc);
    }
}

/* ---- what arrives ---- */

static void wire_take_hello(sim *s, wire_flight *flight)
{
    sim_end *end = flight->to;
    sim_link *link = end->link;
    sim_proc *proc = end->proc;
    if (link->class != SIM_CONTROL) {
        net_identity identity = proc->ops->identity(proc);
        if (identity.cluster == 0 || identity.cluster != flight->identity.cluster) {
            wire_close(s, end);
            wire_say_bye(s, end, CM_E_REFUSED);
            return;
        }
        end->peer = flight->identity;
        wire_post(s, end, FLIGHT_WELCOME)->identity = identity;
    }
    end->up = true;
    proc->ops->up(s, proc, end);
    sim_go(s, proc);
}

static void wire_take(sim *s, wire_flight *flight)
{
    sim_end *end = flight->to;
    end->heard_us = s->now_us;
    switch (flight->kind) {
    case FLIGHT_HELLO:
        wire_take_hello(s, flight);
        break;
    case FLIGHT_WELCOME:
        end->up = true;
        end->peer = flight->identity;
        end->proc->ops->up(s, end->proc, end);
        sim_go(s, end->proc);
        break;
    case FLIGHT_DATA:
        if (end->up || end->link->class == SIM_CONTROL) {
            s->counts.messages++;
            end->proc->ops->message(s, end->proc, end, &flight->message);
            sim_go(s, end->proc);
        }
        break;
    case FLIGHT_BEAT:
        break;
    case FLIGHT_BYE:
        wire_down(s, end, flight->status);
        break;
    }
}

/* Nobody is there to take it. */
static void wire_bounce(sim *s, const wire_flight *flight)
{
    sim_end *end = flight->to;
    const sim_proc *proc = end->proc;
    if (flight->kind == FLIGHT_HELLO && (proc == NULL || !proc->dark)) {
        end->closed = true;
        wire_say_bye(s, end, CM_E_UNREACHABLE);
    }
}

/* When what lies between lets it through; now when nothing does. */
static uint64_t wire_open_us(const sim *s, const sim_end *to)
{
    const sim_proc *from = to->link->ends[1 - to->side].proc, *proc = to->proc;
    if (proc == NULL || from == NULL) {
        return s->now_us;
    }
    uint64_t at_us = s->hosts[from->host].cut_until_us[proc->host];
    if (proc->alive && proc->paused_until_us > at_us) {
        at_us = proc->paused_until_us;
    }
    return at_us > s->now_us ? at_us : s->now_us;
}

static void wire_arrive(sim *s, wire_flight *flight)
{
    sim_end *to = flight->to;
    wire_complete(s, flight);
    if (to->closed) {
        /* it is too late for it */
    } else if (to->proc == NULL || !to->proc->alive) {
        wire_bounce(s, flight);
    } else {
        wire_take(s, flight);
    }
    wire_free(flight);
}

static void wire_deliver(sim *s, void *arg, uint64_t side)
{
    sim_link *link = arg;
    wire_queue *queue = &link->queues[side];
    queue->armed = false;
    wire_flight *flight = TAILQ_FIRST(&queue->flights);
    if (flight == NULL) {
        return;
    }
    uint64_t open_us = wire_open_us(s, &link->ends[side]);
    if (flight->ready_us > s->now_us || open_us > s->now_us) {
        wire_arm(s, link, (uint32_t)side, flight->ready_us > open_us ? flight->ready_us : open_us);
        return;
    }
    TAILQ_REMOVE(&queue->flights, flight, link);
    flight->to = &link->ends[side];
    wire_arrive(s, flight);
    if (!TAILQ_EMPTY(&queue->flights)) {
        wire_arm(s, link, (uint32_t)side, TAILQ_FIRST(&queue->flights)->ready_us);
    }
}

static void wire_stray(sim *s, void *arg, uint64_t tag)
{
    wire_flight *flight = arg;
    uint64_t open_us = wire_open_us(s, flight->to);
    if (open_us == SIM_NEVER) {
        wire_complete(s, flight);
        wire_free(flight);
    } else if (open_us > s->now_us) {
        sim_at(s, open_us, wire_stray, flight, tag);
    } else {
        wire_arrive(s, flight);
    }
}

/* Lost, but the sender learns only that its memory is free. */
static void wire_vanish(sim *s, void *arg, uint64_t tag)
{
    (void)tag;
    wire_complete(s, arg);
    wire_free(arg);
}

/* ---- sending ---- */

static void flight_fill(wire_flight *flight, uint16_t type, const void *header, uint32_t header_bytes,
                        const void *data, size_t n_bytes)
{
    sim_message *message = &flight->message;
    CM_ASSERT(header_bytes <= NET_HEADER_MAX);
    message->type = type;
    message->header_bytes = header_bytes;
    if (header_bytes > 0) {
        memcpy(message->header, header, header_bytes);
    }
    message->n_bytes = n_bytes;
    message->data = cm_alloc_aligned(n_bytes + 1);
    if (n_bytes > 0) {
        memcpy(message->data, data, n_bytes);
    }
}

static void wire_again(sim *s, const wire_flight *flight)
{
    wire_flight *again = cm_alloc(sizeof(*again));
    const sim_message *m = &flight->message;
    again->kind = FLIGHT_DATA;
    again->to = flight->to;
    flight_fill(again, m->type, m->header, m->header_bytes, m->data, m->n_bytes);
    sim_at(s, flight->ready_us + sim_between(s, SIM_WIRE, 1, 500) * SIM_MS, wire_stray, again, 0);
}

/* A frame of rows may go astray: out of its queue, alone. */
static void wire_tempt(sim *s, wire_flight *flight)
{
    wire_queue *queue = &flight->to->link->queues[flight->to->side];
    if (sim_strikes(s, SIM_FAULT_rows_twice)) {
        wire_again(s, flight);
    }
    bool drop = sim_strikes(s, SIM_FAULT_rows_drop);
    if (drop || sim_strikes(s, SIM_FAULT_rows_overtaken)) {
        TAILQ_REMOVE(&queue->flights, flight, link);
        sim_at(s, flight->ready_us + sim_between(s, SIM_WIRE, 1, 200) * SIM_MS,
               drop ? wire_vanish : wire_stray, flight, 0);
    }
}

cm_status sim_send(sim *s, sim_end *end, uint16_t type, const void *header, uint32_t header_bytes,
                   const void *data, size_t n_bytes, void *cookie)
{
    sim_class class = end->link->class;
    if (end->closed) {
        return CM_E_RESET;
    }
    CM_ASSERT(end->up || class == SIM_CONTROL);
    /* Gateways and sessions queue what does not fit, workers have room for the answers to all they may hold:
     * no bound for these. */
    bool bounded = (class == SIM_ROWS && end->side == 0) || (class == SIM_TOKENS && end->side == 1);
    if (bounded && end->n_out >= s->shape.sends_max) {
        return CM_AGAIN;
    }
    wire_flight *flight = wire_post(s, end, FLIGHT_DATA);
    flight_fill(flight, type, header, header_bytes, data, n_bytes);
    flight->borrowed = data;
    flight->cookie = cookie;
    flight->counted = true;
    end->n_out++;
    if (class == SIM_ROWS) {
        wire_tempt(s, flight);
    } else if (class == SIM_TOKENS && end->side == 1 && sim_strikes(s, SIM_FAULT_tokens_twice)) {
        wire_again(s, flight);
    }
    return CM_OK;
}

/* ---- life of a link ---- */

static void wire_beat(sim *s, void *arg, uint64_t tag)
{
    sim_link *link = arg;
    uint64_t silence_us =
        s->shape.silence_ms * SIM_MS * (link->class == SIM_CONTROL ? WIRE_CONTROL_SILENCES : 1);
    for (uint32_t side = 0; side < 2; side++) {
        sim_end *end = &link->ends[side];
        if (end->closed || end->proc == NULL || !end->proc->alive || s->now_us < end->proc->paused_until_us) {
            continue;
        }
        if (s->now_us - end->heard_us > silence_us) {
            sim_trace(s, end->proc, "hears nothing from %s",
                      side == 0 ? link->address : link->ends[0].proc->name);
            wire_say_bye(s, end, CM_E_RESET);
            wire_down(s, end, CM_E_SILENT);
        } else {
            wire_post(s, end, FLIGHT_BEAT);
        }
    }
    if (!link->ends[0].closed || !link->ends[1].closed) {
        sim_at(s, s->now_us + silence_us / 3, wire_beat, link, tag);
    }
}

sim_end *sim_connect(sim *s, sim_proc *from, sim_class class, const char *address,
                     const net_identity *identity)
{
    sim_link *link = cm_alloc(sizeof(*link));
    TAILQ_INSERT_TAIL(&s->links, link, link);
    link->class = class;
    snprintf(link->address, sizeof(link->address), "%s", address);
    for (uint32_t side = 0; side < 2; side++) {
        TAILQ_INIT(&link->queues[side].flights);
        link->ends[side] = (sim_end){.link = link, .side = side, .heard_us = s->now_us};
        link->ends[side].number = s->next_event++; /* as good as any */
    }
    link->ends[0].proc = from;
    /* a coordinator has one address for all its lives, "c" and its host */
    link->ends[1].proc =
        class == SIM_CONTROL ? s->hosts[strtoul(address + 1, NULL, 10)].proc : sim_proc_named(s, address);
    wire_flight *hello = wire_post(s, &link->ends[0], FLIGHT_HELLO);
    if (identity != NULL) {
        hello->identity = *identity;
    }
    sim_at(s, s->now_us + s->shape.silence_ms * SIM_MS / 3, wire_beat, link, 0);
    return &link->ends[0];
}

void sim_disconnect(sim *s, sim_end *end)
{
    if (!end->closed) {
        wire_close(s, end);
        wire_say_bye(s, end, CM_E_RESET);
    }
}

void sim_break_links(sim *s, sim_proc *proc, bool silently)
{
    sim_link *link;
    TAILQ_FOREACH (link, &s->links, link) {
        for (uint32_t side = 0; side < 2; side++) {
            sim_end *end = &link->ends[side];
            if (end->proc == proc && !end->closed) {
                wire_close(s, end);
                if (!silently) {
                    wire_say_bye(s, end, CM_E_RESET);
                }
            }
        }
    }
}

void sim_break_one(sim *s)
{
    sim_link *link;
    uint32_t n = 0;
    TAILQ_FOREACH (link, &s->links, link) {
        n += !link->ends[0].closed && !link->ends[1].closed && link->ends[1].up;
    }
    if (n == 0) {
        return;
    }
    uint32_t at = sim_below(s, SIM_FAULTS, n);
    TAILQ_FOREACH (link, &s->links, link) {
        if (!link->ends[0].closed && !link->ends[1].closed && link->ends[1].up && at-- == 0) {
            sim_trace(s, link->ends[0].proc, "link to %s breaks", link->address);
            wire_say_bye(s, &link->ends[0], CM_E_RESET);
            wire_say_bye(s, &link->ends[1], CM_E_RESET);
            return;
        }
    }
}

void sim_wire_fini(sim *s)
{
    sim_link *link;
    for (uint32_t i = 0; i < s->n_event; i++) {
        if (s->heap[i].fn == wire_stray || s->heap[i].fn == wire_vanish) {
            wire_free(s->heap[i].arg);
        } else if (s->heap[i].fn == wire_tell_sent) {
            cm_free(s->heap[i].arg);
        }
    }
    while ((link = TAILQ_FIRST(&s->links)) != NULL) {
        TAILQ_REMOVE(&s->links, link, link);
        for (uint32_t side = 0; side < 2; side++) {
            wire_flight *flight;
            while ((flight = TAILQ_FIRST(&link->queues[side].flights)) != NULL) {
                TAILQ_REMOVE(&link->queues[side].flights, flight, link);
                wire_free(flight);
            }
        }
        cm_free(link);
    }
}
