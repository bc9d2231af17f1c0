#include "router/gateways.h"

#include <string.h>
#include <sys/queue.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "proto/engine.pb-c.h"
#include "proto/messages.h"
#include "proto/pack.h"
#include "kernels/kn.h"
#include "router/engine/constraint.h"

enum {
    GATEWAYS_SEND_MS = 10000,          /* a gateway that does not take a frame for so long is dropped */
    GATEWAYS_FRAME_WORDS = 1024,       /* tokens of one frame: with all their logprobs they fit a message */
    GATEWAYS_UNTOLD_MAX = 1 << 16,     /* answers that wait for one gateway; more and it is dropped */
    GATEWAYS_FOUND_BYTES = 64 << 20,   /* likewise, of answers to SeqFind */
    GATEWAYS_MESSAGE_BYTES = 64 << 20, /* unpacked message: a prompt of the longest context fits */
    GATEWAYS_CHOICES_MAX = 128,        /* of one request */
};

static_assert((int)PR_PAGE_TOKENS == (int)KN_PAGE_TOKENS, "gateways choose routers by the first page");

/* A packed frame. */
typedef struct gateway_frame {
    TAILQ_ENTRY(gateway_frame) link;
    uint16_t type;
    cm_bytes packed;
} gateway_frame;
TAILQ_HEAD(gateway_frames, gateway_frame);

typedef struct gateway_link {
    net_peer *peer; /* NULL: free */
    rt_keep_owner owner;
    struct gateway_frames found; /* answers to SeqFind: wait for a place on the link */
    uint64_t found_bytes;
} gateway_link;

/* A sequence's part of a frame. */
typedef struct gateway_part {
    rt_kept *kept;
    uint32_t n; /* tokens */
} gateway_part;

/* A SeqOpen whose constraint is being compiled. */
typedef struct gateway_waiting {
    TAILQ_ENTRY(gateway_waiting) link;
    rt_gateways *gateways;
    gateway_link *from; /* NULL: nobody waits for it any more */
    uint64_t stream;
    uint8_t *packed; /* [n_packed] the message */
    size_t n_packed;
} gateway_waiting;

struct rt_gateways {
    net *n;
    pc_netpump *pump;
    rt_keep *keep;
    pc_timer *timer; /* of what is kept for a while */
    pc_fn changed;
    void *ctx;
    gateway_link *links;
    uint32_t n_link, runnable;
    gateway_part parts[GATEWAYS_FRAME_WORDS]; /* of the frame being made */
    uint32_t n_part;
    rt_sched *sched;
    rt_constraints *constraints;
    TAILQ_HEAD(, gateway_waiting) waiting;
    cm_arena arena;               /* of the message being read or packed */
    struct gateway_frames frames; /* on their way */
};

/* ---- frames out ---- */

static void frames_free(struct gateway_frames *frames, gateway_frame *frame)
{
    TAILQ_REMOVE(frames, frame, link);
    cm_bytes_fini(&frame->packed);
    cm_free(frame);
}

/* stream NULL: all of the link's. */
static void waiting_forget(rt_gateways *g, const gateway_link *link, const uint64_t *stream)
{
    gateway_waiting *waiting;
    TAILQ_FOREACH (waiting, &g->waiting, link) {
        if (waiting->from == link && (stream == NULL || waiting->stream == *stream)) {
            waiting->from = NULL;
        }
    }
}

static void waiting_free(gateway_waiting *waiting)
{
    TAILQ_REMOVE(&waiting->gateways->waiting, waiting, link);
    cm_free(waiting->packed);
    cm_free(waiting);
}

static void gateways_drop(rt_gateways *g, gateway_link *link)
{
    waiting_forget(g, link, NULL);
    rt_keep_owner_lost(g->keep, cm_now_ms(), &link->owner);
    link->peer = NULL;
    while (!TAILQ_EMPTY(&link->found)) {
        frames_free(&link->found, TAILQ_FIRST(&link->found));
    }
    link->found_bytes = 0;
    g->changed(g->ctx);
}

void rt_gateways_word(void *gateways, const rt_word *word)
{
    rt_gateways *g = gateways;
    rt_keep_word(g->keep, cm_now_ms(), word);
}

static uint32_t kept_untold(const rt_kept *kept)
{
    return kept->n_id > kept->n_told ? kept->n_id - kept->n_told : 0;
}

/* The next frame's parts: whole sequences in their order, the last one as far as there is room. */
static void gateways_choose_parts(rt_gateways *g, const gateway_link *link)
{
    uint32_t room = GATEWAYS_FRAME_WORDS;
    rt_kept *kept;
    g->n_part = 0;
    TAILQ_FOREACH (kept, &link->owner.untold, untold_link) {
        uint32_t n = kept_untold(kept) < room ? kept_untold(kept) : room;
        g->parts[g->n_part++] = (gateway_part){kept, n};
        room -= n > 0 ? n : 1;
        if (room == 0) {
            return;
        }
    }
}

/* Borrows the lists of logprobs. */
static void gateways_fill_logprobs(rt_gateways *g, const gateway_part *part,
                                   Baleen__Engine__V1__SeqTokens *seq)
{
    const rt_kept *kept = part->kept;
    Baleen__Engine__V1__TokenLogprobs *out = cm_arena_take(&g->arena, sizeof(*out) * part->n);
    seq->n_logprobs = part->n;
    seq->logprobs = cm_arena_take(&g->arena, sizeof(void *) * part->n);
    for (uint32_t i = 0; i < part->n; i++) {
        size_t at = kept->n_told + i;
        baleen__engine__v1__token_logprobs__init(&out[i]);
        out[i].token = kept->token_logprob[at];
        out[i].n_top_id = out[i].n_top = kept->n_top_told;
        out[i].top_id = kept->top_id + at * kept->n_top;
        out[i].top = kept->top + at * kept->n_top;
        seq->logprobs[i] = &out[i];
    }
}

static Baleen__Engine__V1__SeqEnd kept_end(const rt_kept *kept)
{
    return kept->finished ? BALEEN__ENGINE__V1__SEQ_END__SEQ_FINISHED : (Baleen__Engine__V1__SeqEnd)kept->end;
}

static void gateways_fill_seq(rt_gateways *g, const gateway_part *part, Baleen__Engine__V1__SeqTokens *seq)
{
    const rt_kept *kept = part->kept;
    bool ends = !kept->live && part->n == kept_untold(kept);
    baleen__engine__v1__seq_tokens__init(seq);
    seq->stream = kept->stream;
    seq->has_offset = true;
    seq->offset = kept->n_told;
    seq->n_id = part->n;
    seq->id = part->n > 0 ? kept->ids + kept->n_told : NULL;
    seq->has_cached = kept->n_cached > 0;
    seq->cached = kept->n_cached;
    if (kept->logprobs && part->n > 0) {
        gateways_fill_logprobs(g, part, seq);
    }
    seq->has_end = true;
    seq->end = ends ? kept_end(kept) : BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON;
    seq->has_stop_id = ends && kept->end == RT_END_STOP;
    seq->stop_id = kept->stop_id;
    seq->has_status = ends && kept->end == RT_END_FAILED;
    seq->status = kept->status;
    seq->text = ends ? kept->text : NULL;
}

/* Everything but the arrays of the message stands in the arena; the caller packs at once. */
static void gateways_fill(rt_gateways *g, uint64_t step, Baleen__Engine__V1__StepTokens *message)
{
    rt_sched_ledger ledger;
    rt_sched_ledger_get(g->sched, &ledger);
    baleen__engine__v1__step_tokens__init(message);
    message->step = step;
    message->has_running = message->has_waiting = message->has_pages_free = true;
    message->running = ledger.n_running;
    message->has_runnable = true;
    message->runnable = g->runnable;
    message->waiting = ledger.n_waiting;
    message->pages_free = ledger.page_max - ledger.n_page;
    message->n_seq = g->n_part;
    message->seq = cm_arena_take(&g->arena, sizeof(void *) * g->n_part);
    Baleen__Engine__V1__SeqTokens *seqs = cm_arena_take(&g->arena, sizeof(*seqs) * g->n_part);
    for (uint32_t i = 0; i < g->n_part; i++) {
        gateways_fill_seq(g, &g->parts[i], &seqs[i]);
        message->seq[i] = &seqs[i];
    }
}

static gateway_frame *frame_make(uint16_t type, const ProtobufCMessage *message)
{
    gateway_frame *frame = cm_alloc(sizeof(*frame));
    frame->type = type;
    pr_pack(message, &frame->packed);
    return frame;
}

/* On its way with CM_OK, else still the caller's. */
static cm_status gateways_send_frame(rt_gateways *g, gateway_link *link, gateway_frame *frame)
{
    net_message out = {.type = frame->type,
                       .iov = {{frame->packed.data, frame->packed.len}},
                       .n_iov = 1,
                       .deadline_ms = GATEWAYS_SEND_MS,
                       .cookie = frame};
    CM_TRY(net_send(link->peer, &out));
    TAILQ_INSERT_TAIL(&g->frames, frame, link);
    pc_netpump_kick(g->pump);
    return CM_OK;
}

/* One frame of what waits. CM_AGAIN, CM_E_RESET: it still waits. */
static cm_status gateways_send_words(rt_gateways *g, gateway_link *link, uint64_t step)
{
    Baleen__Engine__V1__StepTokens message;
    cm_arena_reset(&g->arena);
    gateways_choose_parts(g, link);
    gateways_fill(g, step, &message);
    gateway_frame *frame = frame_make(PR_MSG_STEP_TOKENS, &message.base);
    cm_status status = gateways_send_frame(g, link, frame);
    if (status != CM_OK) {
        cm_bytes_fini(&frame->packed);
        cm_free(frame);
        return status;
    }
    uint64_t now = cm_now_ms();
    for (uint32_t i = 0; i < g->n_part; i++) {
        rt_keep_told(g->keep, now, g->parts[i].kept, g->parts[i].n);
    }
    return CM_OK;
}

static cm_status gateways_send_found(rt_gateways *g, gateway_link *link)
{
    gateway_frame *frame = TAILQ_FIRST(&link->found);
    TAILQ_REMOVE(&link->found, frame, link);
    uint64_t n_bytes = frame->packed.len;
    cm_status status = gateways_send_frame(g, link, frame);
    if (status != CM_OK) {
        TAILQ_INSERT_HEAD(&link->found, frame, link);
        return status;
    }
    link->found_bytes -= n_bytes;
    return CM_OK;
}

static void gateways_send(rt_gateways *g, gateway_link *link, uint64_t step)
{
    cm_status status = CM_OK;
    while (status == CM_OK && !TAILQ_EMPTY(&link->found)) {
        status = gateways_send_found(g, link);
    }
    while (status == CM_OK && !TAILQ_EMPTY(&link->owner.untold)) {
        status = gateways_send_words(g, link, step);
    }
    if (status == CM_AGAIN &&
        (link->owner.n_untold > GATEWAYS_UNTOLD_MAX || link->found_bytes > GATEWAYS_FOUND_BYTES)) {
        cm_warn("gateway %s does not take its answers: %u wait; link dropped", net_peer_address(link->peer),
                link->owner.n_untold);
        net_disconnect(link->peer);
        gateways_drop(g, link);
    } /* else: they go with the next flush, or the link's end is about to be told */
}

void rt_gateways_flush(rt_gateways *g, uint64_t step)
{
    uint64_t now = cm_now_ms();
    rt_keep_expire(g->keep, now);
    for (uint32_t i = 0; i < g->n_link; i++) {
        if (g->links[i].peer != NULL) {
            gateways_send(g, &g->links[i], step);
        }
    }
    uint64_t due = rt_keep_due(g->keep);
    if (due != UINT64_MAX) {
        pc_timer_set(g->timer, due > now ? due - now : 1);
    }
}

bool rt_gateways_all_told(const rt_gateways *g)
{
    for (uint32_t i = 0; i < g->n_link; i++) {
        if (g->links[i].peer != NULL && !TAILQ_EMPTY(&g->links[i].owner.untold)) {
            return false;
        }
    }
    return TAILQ_EMPTY(&g->frames) && TAILQ_EMPTY(&g->waiting);
}

void rt_gateways_ledger(const rt_gateways *g, rt_keep_ledger *ledger_out)
{
    rt_keep_ledger_get(g->keep, ledger_out);
}

/* ---- messages in ---- */

/* The biases stand in the arena. */
static cm_status gateways_read_bias(rt_gateways *g, const Baleen__Engine__V1__SamplerParams *in,
                                    rt_sampler *out, cm_error *err)
{
    if (in->n_bias_id != in->n_bias || in->n_bias > RT_BIAS_MAX) {
        return cm_error_set(err, CM_E_INVALID, "bias", "%zu biases for %zu ids, at most %d", in->n_bias,
                            in->n_bias_id, RT_BIAS_MAX);
    }
    rt_bias *bias = cm_arena_take(&g->arena, sizeof(*bias) * in->n_bias);
    for (size_t i = 0; i < in->n_bias; i++) {
        bias[i] = (rt_bias){in->bias_id[i], in->bias[i]};
    }
    out->bias = bias;
    out->n_bias = (uint32_t)in->n_bias;
    return CM_OK;
}

static cm_status gateways_read_sampler(rt_gateways *g, const Baleen__Engine__V1__SamplerParams *in,
                                       rt_sampler *out, cm_error *err)
{
    *out = (rt_sampler){.seed = in->seed,
                        .temperature = in->has_temperature ? in->temperature : 1.0f,
                        .top_p = in->has_top_p ? in->top_p : 1.0f,
                        .top_k = in->top_k,
                        .min_p = in->min_p,
                        .repetition_penalty = in->repetition_penalty,
                        .frequency_penalty = in->frequency_penalty,
                        .presence_penalty = in->presence_penalty,
                        .logprobs = in->has_top_logprobs,
                        .n_top = in->top_logprobs,
                        .tokens_max = in->tokens_max,
                        .tokens_min = in->has_tokens_min ? in->tokens_min : 0,
                        .n_stop = (uint32_t)in->n_stop_id};
    if (in->n_stop_id > RT_STOP_MAX) {
        return cm_error_set(err, CM_E_INVALID, "stop_id", "%zu stop ids, at most %d", in->n_stop_id,
                            RT_STOP_MAX);
    }
    if (in->n_stop_id > 0) {
        memcpy(out->stop, in->stop_id, sizeof(uint32_t) * in->n_stop_id);
    }
    return gateways_read_bias(g, in, out, err);
}

/* NULL: it is none; the link is gone then. */
static void *gateways_read(rt_gateways *g, gateway_link *link, const ProtobufCMessageDescriptor *descriptor,
                           const net_event *event)
{
    ProtobufCMessage *message;
    if (pr_unpack(descriptor, event->payload, event->payload_bytes, &g->arena, &message) == CM_OK) {
        return message;
    }
    cm_warn("gateway %s sent a broken %s of %llu bytes", net_peer_address(event->peer),
            descriptor->short_name, (unsigned long long)event->payload_bytes);
    net_disconnect(event->peer);
    gateways_drop(g, link);
    return NULL;
}

/* false: it is none of ours. */
static bool gateways_read_id(const ProtobufCBinaryData *id, uint8_t out[RT_KEEP_ID_BYTES])
{
    if (id->len != RT_KEEP_ID_BYTES) {
        return false;
    }
    memcpy(out, id->data, RT_KEEP_ID_BYTES);
    return true;
}

static bool gateways_read_key(const Baleen__Engine__V1__SeqKey *in, rt_keep_key *out)
{
    *out = (rt_keep_key){.choice = in->choice, .birth = in->birth};
    return gateways_read_id(&in->id, out->id);
}

/* What it may be logged with: of the form that gateways check. */
static const char *gateways_trace(const Baleen__Engine__V1__SeqOpen *open)
{
    const char *text = open->traceparent;
    bool ok = text != NULL && strlen(text) == 55 && strspn(text, "0123456789abcdef-") == 55;
    return ok ? text : "-";
}

/* machine: of the constraint, given; NULL when there is none. */
static void gateways_open(rt_gateways *g, gateway_link *link, const Baleen__Engine__V1__SeqOpen *open,
                          gm_machine *machine)
{
    cm_error err = {0};
    rt_keep_key key;
    uint64_t now = cm_now_ms();
    rt_seq_request request = {
        .key = {0, open->stream},
        .prompt = open->prompt,
        .n_prompt = (uint32_t)open->n_prompt,
        .emitted = open->emitted,
        .n_emitted = (uint32_t)open->n_emitted,
        .deadline_ms = open->has_deadline_ms ? now + open->deadline_ms : UINT64_MAX,
    };
    bool keyed = open->key != NULL && gateways_read_key(open->key, &key);
    cm_status status = gateways_read_sampler(g, open->sampler, &request.sampler, &err);
    if (status == CM_OK && open->resume.len > PR_RESUME_BYTES_MAX) {
        status = cm_error_set(&err, CM_E_INVALID, "resume", "%zu bytes to resume by, at most %d",
                              open->resume.len, PR_RESUME_BYTES_MAX);
    }
    if (status == CM_OK && open->has_salt && open->salt.len != RT_SALT_BYTES) {
        status = cm_error_set(&err, CM_E_INVALID, "salt", "a salt of %zu bytes, not %d", open->salt.len,
                              RT_SALT_BYTES);
    }
    cm_debug("gateway %u stream %llu: %zu prompt tokens, %zu generated before, trace %s: %s",
             net_peer_identity(link->peer)->member, (unsigned long long)open->stream, open->n_prompt,
             open->n_emitted, gateways_trace(open), status == CM_OK ? "taken" : err.text);
    if (status != CM_OK) {
        if (machine != NULL) {
            gm_machine_release(machine);
        }
        rt_keep_refuse(g->keep, &link->owner, open->stream, status, err.text);
        return;
    }
    if (machine != NULL) {
        request.constraint = rt_constraint_create(machine, open->constraint->after_thinking);
    }
    if (open->has_salt) {
        memcpy(request.salt, open->salt.data, RT_SALT_BYTES);
    }
    rt_keep_offer offer = {.key = keyed ? &key : NULL,
                           .term = open->term,
                           .resume = open->resume.data,
                           .n_resume = open->has_resume ? open->resume.len : 0};
    rt_keep_open(g->keep, now, &link->owner, &request, &offer);
}

/* Its constraint is compiled, or cannot be. */
static void gateways_on_constraint(void *ctx, gm_machine *machine, const cm_error *err)
{
    gateway_waiting *waiting = ctx;
    rt_gateways *g = waiting->gateways;
    gateway_link *link = waiting->from;
    ProtobufCMessage *message;
    if (link == NULL && machine != NULL) {
        gm_machine_release(machine);
    } else if (link != NULL && machine == NULL) {
        rt_keep_refuse(g->keep, &link->owner, waiting->stream, err->status, err->text);
    } else if (link != NULL) {
        cm_arena_reset(&g->arena);
        cm_status status = pr_unpack(&baleen__engine__v1__seq_open__descriptor, waiting->packed,
                                     waiting->n_packed, &g->arena, &message);
        CM_ASSERT(status == CM_OK); /* as it did before */
        gateways_open(g, link, (const Baleen__Engine__V1__SeqOpen *)message, machine);
    }
    waiting_free(waiting);
    g->changed(g->ctx);
}

static void gateways_on_open(rt_gateways *g, gateway_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqOpen *open = message;
    gm_machine *machine = NULL;
    cm_error err = {0};
    if (open->constraint == NULL) {
        gateways_open(g, link, open, NULL);
        return;
    }
    gateway_waiting *waiting = cm_alloc(sizeof(*waiting));
    *waiting = (gateway_waiting){.gateways = g, .from = link, .stream = open->stream};
    TAILQ_INSERT_TAIL(&g->waiting, waiting, link);
    const ProtobufCBinaryData *source = &open->constraint->source;
    cm_status status =
        g->constraints == NULL
            ? cm_error_set(&err, CM_E_UNSUPPORTED, "constraint", "this router takes no constraints")
            : rt_constraints_get(g->constraints, open->constraint->kind, source->data, source->len,
                                 gateways_on_constraint, waiting, &machine, &err);
    if (status == CM_AGAIN) {
        waiting->n_packed = protobuf_c_message_get_packed_size(&open->base);
        waiting->packed = cm_alloc(waiting->n_packed);
        protobuf_c_message_pack(&open->base, waiting->packed);
        return;
    }
    waiting_free(waiting);
    if (status == CM_OK) {
        gateways_open(g, link, open, machine);
    } else {
        rt_keep_refuse(g->keep, &link->owner, open->stream, status, err.text);
    }
}

static void gateways_on_cancel(rt_gateways *g, gateway_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqCancel *cancel = message;
    rt_keep_key key;
    for (size_t i = 0; i < cancel->n_stream; i++) {
        waiting_forget(g, link, &cancel->stream[i]);
        rt_keep_cancel(g->keep, &link->owner, cancel->stream[i]);
    }
    for (size_t i = 0; i < cancel->n_finished; i++) {
        waiting_forget(g, link, &cancel->finished[i]);
        rt_keep_finish(g->keep, cm_now_ms(), &link->owner, cancel->finished[i]);
    }
    for (size_t i = 0; i < cancel->n_copy; i++) {
        if (gateways_read_key(cancel->copy[i], &key)) {
            rt_keep_cancel_copy(g->keep, &key);
        }
    }
}

static void gateways_on_detach(rt_gateways *g, gateway_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqDetach *detach = message;
    for (size_t i = 0; i < detach->n_stream; i++) {
        waiting_forget(g, link, &detach->stream[i]); /* nobody could resume it yet: it is opened anew */
        rt_keep_detach(g->keep, cm_now_ms(), &link->owner, detach->stream[i]);
    }
}

static void gateways_on_resume(rt_gateways *g, gateway_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqResume *resume = message;
    rt_keep_key key;
    if (gateways_read_key(resume->key, &key)) {
        rt_keep_offer offer = {.key = &key, .term = resume->term};
        rt_keep_resume(g->keep, &link->owner, resume->stream, &offer, resume->from);
    } else {
        rt_keep_refuse(g->keep, &link->owner, resume->stream, CM_E_NOT_FOUND, "there is no such key");
    }
}

static void gateways_put_found(const rt_kept *kept, Baleen__Engine__V1__SeqKey *key,
                               Baleen__Engine__V1__SeqFound *found)
{
    baleen__engine__v1__seq_key__init(key);
    key->id = (ProtobufCBinaryData){.len = RT_KEEP_ID_BYTES, .data = (uint8_t *)(uintptr_t)kept->key.id};
    key->choice = kept->key.choice;
    key->birth = kept->key.birth;
    if (kept->resume != NULL) {
        found->has_resume = true;
        found->resume = (ProtobufCBinaryData){.len = kept->n_resume, .data = kept->resume};
    }
    found->has_term = true;
    found->term = kept->term > found->term ? kept->term : found->term;
}

static void gateways_on_find(rt_gateways *g, gateway_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqFind *find = message;
    const rt_kept *kept[GATEWAYS_CHOICES_MAX];
    Baleen__Engine__V1__SeqKey keys[GATEWAYS_CHOICES_MAX], *list[GATEWAYS_CHOICES_MAX];
    Baleen__Engine__V1__SeqFound found = BALEEN__ENGINE__V1__SEQ_FOUND__INIT;
    uint8_t id[RT_KEEP_ID_BYTES];
    uint32_t n = gateways_read_id(&find->id, id) ? rt_keep_find(g->keep, id, kept, GATEWAYS_CHOICES_MAX) : 0;
    for (uint32_t i = 0; i < n; i++) {
        gateways_put_found(kept[i], &keys[i], &found);
        list[i] = &keys[i];
    }
    found.ask = find->ask;
    found.key = list;
    found.n_key = n;
    gateway_frame *frame = frame_make(PR_MSG_SEQ_FOUND, &found.base);
    TAILQ_INSERT_TAIL(&link->found, frame, link);
    link->found_bytes += frame->packed.len;
}

static void gateways_on_forget(rt_gateways *g, gateway_link *link, const void *message)
{
    (void)message;
    cm_info("gateway link %s: kept prompts are forgotten", net_peer_address(link->peer));
    rt_sched_forget(g->sched);
}

static void gateways_on_message(rt_gateways *g, gateway_link *link, const net_event *event)
{
    static const struct {
        pr_message type;
        const ProtobufCMessageDescriptor *descriptor;
        void (*fn)(rt_gateways *, gateway_link *, const void *);
    } handlers[] = {
        {PR_MSG_SEQ_OPEN, &baleen__engine__v1__seq_open__descriptor, gateways_on_open},
        {PR_MSG_SEQ_CANCEL, &baleen__engine__v1__seq_cancel__descriptor, gateways_on_cancel},
        {PR_MSG_SEQ_DETACH, &baleen__engine__v1__seq_detach__descriptor, gateways_on_detach},
        {PR_MSG_SEQ_FIND, &baleen__engine__v1__seq_find__descriptor, gateways_on_find},
        {PR_MSG_SEQ_RESUME, &baleen__engine__v1__seq_resume__descriptor, gateways_on_resume},
        {PR_MSG_PREFIX_FORGET, &baleen__engine__v1__prefix_forget__descriptor, gateways_on_forget},
    };
    for (size_t i = 0; i < sizeof(handlers) / sizeof(handlers[0]); i++) {
        if (handlers[i].type == (pr_message)event->type) {
            const void *message = gateways_read(g, link, handlers[i].descriptor, event);
            if (message != NULL) {
                handlers[i].fn(g, link, message);
            }
            return;
        }
    }
    cm_warn("gateway link %s sent a %s message, not one for a router", net_peer_address(event->peer),
            pr_message_name(event->type));
}

static void gateways_on_up(rt_gateways *g, net_peer *peer)
{
    for (uint32_t i = 0; i < g->n_link; i++) {
        if (g->links[i].peer == NULL) {
            g->links[i].peer = peer;
            rt_keep_owner_init(g->keep, &g->links[i].owner);
            TAILQ_INIT(&g->links[i].found);
            net_peer_set_user(peer, &g->links[i]);
            cm_info("gateway %u linked from %s", net_peer_identity(peer)->member, net_peer_address(peer));
            return;
        }
    }
    cm_warn("gateway %s refused: %u are linked", net_peer_address(peer), g->n_link);
    net_disconnect(peer);
}

static void gateways_on_event(void *ctx, const net_event *event)
{
    rt_gateways *g = ctx;
    gateway_link *link = event->peer != NULL ? net_peer_user(event->peer) : NULL;
    if (link != NULL && link->peer != event->peer) {
        link = NULL; /* told before we dropped the link: its place may be another's by now */
    }
    switch (event->kind) {
    case NET_EV_UP:
        gateways_on_up(g, event->peer);
        break;
    case NET_EV_DOWN:
        if (link != NULL) {
            cm_info("gateway link %s down: %s", net_peer_address(event->peer), cm_status_text(event->status));
            gateways_drop(g, link);
        }
        break;
    case NET_EV_SENT:
        frames_free(&g->frames, event->cookie);
        break;
    case NET_EV_MESSAGE:
        cm_arena_reset(&g->arena);
        if (link != NULL) {
            gateways_on_message(g, link, event);
        }
        net_release(g->n, event);
        g->changed(g->ctx);
        break;
    }
}

rt_gateways *rt_gateways_create(pc_loop *loop, net *n, rt_sched *sched, const rt_gateways_options *options,
                                pc_fn changed, void *ctx)
{
    rt_gateways *g = cm_alloc(sizeof(*g));
    TAILQ_INIT(&g->frames);
    TAILQ_INIT(&g->waiting);
    g->constraints = options->constraints;
    g->n = n;
    g->sched = sched;
    g->keep = rt_keep_create(&options->keep, sched);
    g->timer = pc_timer_create(loop, changed, ctx);
    g->changed = changed;
    g->ctx = ctx;
    g->n_link = options->gateway_max;
    g->runnable = options->runnable;
    g->links = cm_alloc(sizeof(gateway_link) * g->n_link);
    cm_arena_init(&g->arena, "gateway messages", 1 << 20, GATEWAYS_MESSAGE_BYTES);
    g->pump = pc_netpump_create(loop, n, gateways_on_event, g);
    return g;
}

void rt_gateways_identify(rt_gateways *g, const net_identity *identity)
{
    net_set_identity(g->n, identity);
}

void rt_gateways_frame_key(rt_gateways *g, uint64_t cluster, uint64_t epoch, const uint8_t *key)
{
    net_key_add(g->n, cluster, epoch, key);
    pc_netpump_kick(g->pump);
}

void rt_gateways_retire_keys(rt_gateways *g, uint64_t oldest)
{
    net_key_retire(g->n, oldest);
    pc_netpump_kick(g->pump);
}

void rt_gateways_destroy(rt_gateways *g)
{
    pc_netpump_destroy(g->pump);
    net_close(g->n);
    while (!TAILQ_EMPTY(&g->frames)) {
        frames_free(&g->frames, TAILQ_FIRST(&g->frames)); /* closing tells no more about them */
    }
    for (uint32_t i = 0; i < g->n_link; i++) {
        if (g->links[i].peer != NULL) {
            gateways_drop(g, &g->links[i]);
        }
    }
    while (!TAILQ_EMPTY(&g->waiting)) {
        waiting_free(TAILQ_FIRST(&g->waiting));
    }
    rt_keep_destroy(g->keep);
    pc_timer_destroy(g->timer);
    cm_free(g->links);
    cm_arena_fini(&g->arena);
    cm_free(g);
}
