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

enum {
    GATEWAYS_SEND_MS = 10000,          /* a gateway that does not take a frame for so long is dropped */
    GATEWAYS_FRAME_WORDS = 1024,       /* words of one frame: with all their logprobs they fit a message */
    GATEWAYS_WORDS_MAX = 1 << 16,      /* unsent words of one gateway; more and it is dropped */
    GATEWAYS_MESSAGE_BYTES = 64 << 20, /* unpacked message: a prompt of the longest context fits */
};

typedef struct gateway_link {
    uint64_t owner; /* key of its sequences */
    net_peer *peer; /* NULL: free */
    rt_word *words; /* not sent yet; their texts are ours */
    uint32_t n_word, cap_word;
    rt_logprobs *logprobs; /* of the words that have some, in their order */
    uint32_t n_logprobs, cap_logprobs;
} gateway_link;

/* A packed frame on its way. */
typedef struct gateway_frame {
    LIST_ENTRY(gateway_frame) link;
    cm_bytes packed;
} gateway_frame;

struct rt_gateways {
    net *n;
    pc_netpump *pump;
    rt_sched *sched;
    pc_fn changed;
    void *ctx;
    gateway_link *links;
    uint32_t n_link;
    uint64_t next_owner;
    cm_arena arena;                    /* of the message being read or packed */
    LIST_HEAD(, gateway_frame) frames; /* on their way */
};

/* ---- words out ---- */

static gateway_link *gateways_find(rt_gateways *g, uint64_t owner)
{
    for (uint32_t i = 0; i < g->n_link; i++) {
        if (g->links[i].peer != NULL && g->links[i].owner == owner) {
            return &g->links[i];
        }
    }
    return NULL;
}

/* The first n words and what belongs to them. */
static void gateways_forget_words(gateway_link *link, uint32_t n)
{
    uint32_t n_logprobs = 0;
    for (uint32_t i = 0; i < n; i++) {
        n_logprobs += link->words[i].logprobs != NULL;
        cm_free((char *)(uintptr_t)link->words[i].text);
    }
    link->n_word -= n;
    link->n_logprobs -= n_logprobs;
    if (link->n_word > 0) {
        memmove(link->words, link->words + n, sizeof(*link->words) * link->n_word);
    }
    if (link->n_logprobs > 0) {
        memmove(link->logprobs, link->logprobs + n_logprobs, sizeof(*link->logprobs) * link->n_logprobs);
    }
}

static void gateways_drop(rt_gateways *g, gateway_link *link)
{
    rt_sched_cancel_owner(g->sched, link->owner);
    link->peer = NULL;
    gateways_forget_words(link, link->n_word);
    g->changed(g->ctx);
}

static void gateways_add_word(gateway_link *link, const rt_word *word)
{
    if (link->n_word == link->cap_word) {
        link->cap_word = link->cap_word != 0 ? link->cap_word * 2 : 64;
        link->words = cm_realloc(link->words, sizeof(rt_word) * link->cap_word);
    }
    link->words[link->n_word] = *word;
    if (word->text != NULL) {
        link->words[link->n_word].text = cm_strdup(word->text);
    }
    link->n_word++;
    if (word->logprobs == NULL) {
        return;
    }
    if (link->n_logprobs == link->cap_logprobs) {
        link->cap_logprobs = link->cap_logprobs != 0 ? link->cap_logprobs * 2 : 64;
        link->logprobs = cm_realloc(link->logprobs, sizeof(rt_logprobs) * link->cap_logprobs);
    }
    link->logprobs[link->n_logprobs++] = *word->logprobs;
}

void rt_gateways_word(void *gateways, const rt_word *word)
{
    gateway_link *link = gateways_find(gateways, word->key.owner);
    if (link != NULL) {
        gateways_add_word(link, word);
    }
}

/* Borrows the lists of logprobs. */
static void gateways_fill_logprobs(rt_gateways *g, rt_logprobs *logprobs, Baleen__Engine__V1__SeqTokens *seq)
{
    Baleen__Engine__V1__TokenLogprobs *out = cm_arena_take(&g->arena, sizeof(*out));
    baleen__engine__v1__token_logprobs__init(out);
    out->token = logprobs->token;
    out->n_top_id = out->n_top = logprobs->n_top;
    out->top_id = logprobs->top_id;
    out->top = logprobs->top;
    seq->n_logprobs = 1;
    seq->logprobs = cm_arena_take(&g->arena, sizeof(void *));
    seq->logprobs[0] = out;
}

/* Everything but the arrays of the message stands in the arena; the caller packs at once. */
static void gateways_fill(rt_gateways *g, const gateway_link *link, uint32_t n_word, uint64_t step,
                          Baleen__Engine__V1__StepTokens *message)
{
    rt_sched_ledger ledger;
    rt_sched_ledger_get(g->sched, &ledger);
    baleen__engine__v1__step_tokens__init(message);
    message->step = step;
    message->has_running = message->has_waiting = message->has_pages_free = true;
    message->running = ledger.n_running;
    message->waiting = ledger.n_waiting;
    message->pages_free = ledger.page_max - ledger.n_page;
    message->n_seq = n_word;
    message->seq = cm_arena_take(&g->arena, sizeof(void *) * n_word);
    Baleen__Engine__V1__SeqTokens *seqs = cm_arena_take(&g->arena, sizeof(*seqs) * n_word);
    for (uint32_t i = 0, i_logprobs = 0; i < n_word; i++) {
        rt_word *word = &link->words[i];
        Baleen__Engine__V1__SeqTokens *seq = &seqs[i];
        baleen__engine__v1__seq_tokens__init(seq);
        message->seq[i] = seq;
        seq->stream = word->key.stream;
        seq->has_offset = true;
        seq->offset = word->offset;
        seq->n_id = word->has_token ? 1 : 0;
        seq->id = &word->token;
        if (word->logprobs != NULL) {
            gateways_fill_logprobs(g, &link->logprobs[i_logprobs++], seq);
        }
        seq->has_end = true;
        seq->end = (Baleen__Engine__V1__SeqEnd)word->end;
        seq->has_stop_id = word->end == RT_END_STOP;
        seq->stop_id = word->stop_id;
        seq->has_status = word->end == RT_END_FAILED;
        seq->status = word->status;
        seq->text = (char *)(uintptr_t)word->text; /* packing does not write */
    }
}

static void gateways_free_frame(gateway_frame *frame)
{
    LIST_REMOVE(frame, link);
    cm_bytes_fini(&frame->packed);
    cm_free(frame);
}

/* One frame of the words that wait. CM_AGAIN, CM_E_RESET: they still wait. */
static cm_status gateways_send_frame(rt_gateways *g, gateway_link *link, uint64_t step)
{
    Baleen__Engine__V1__StepTokens message;
    uint32_t n_word = link->n_word < GATEWAYS_FRAME_WORDS ? link->n_word : GATEWAYS_FRAME_WORDS;
    gateway_frame *frame = cm_alloc(sizeof(*frame));
    LIST_INSERT_HEAD(&g->frames, frame, link);
    cm_arena_reset(&g->arena);
    gateways_fill(g, link, n_word, step, &message);
    pr_pack(&message.base, &frame->packed);
    net_message out = {.type = PR_MSG_STEP_TOKENS,
                       .iov = {{frame->packed.data, frame->packed.len}},
                       .n_iov = 1,
                       .deadline_ms = GATEWAYS_SEND_MS,
                       .cookie = frame};
    cm_status status = net_send(link->peer, &out);
    if (status == CM_OK) {
        gateways_forget_words(link, n_word);
        pc_netpump_kick(g->pump);
    } else {
        gateways_free_frame(frame);
    }
    return status;
}

static void gateways_send(rt_gateways *g, gateway_link *link, uint64_t step)
{
    cm_status status = CM_OK;
    while (status == CM_OK && link->n_word > 0) {
        status = gateways_send_frame(g, link, step);
    }
    if (status == CM_AGAIN && link->n_word > GATEWAYS_WORDS_MAX) {
        cm_warn("gateway %s does not take its tokens: %u wait; link dropped", net_peer_address(link->peer),
                link->n_word);
        net_disconnect(link->peer);
        gateways_drop(g, link);
    } /* else: they go with the next flush, or the link's end is about to be told */
}

void rt_gateways_flush(rt_gateways *g, uint64_t step)
{
    for (uint32_t i = 0; i < g->n_link; i++) {
        if (g->links[i].peer != NULL && g->links[i].n_word > 0) {
            gateways_send(g, &g->links[i], step);
        }
    }
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

static void gateways_on_open(rt_gateways *g, gateway_link *link, const net_event *event)
{
    Baleen__Engine__V1__SeqOpen *open;
    cm_error err = {0};
    rt_word word = {.end = RT_GOING_ON};
    cm_status status = pr_unpack(&baleen__engine__v1__seq_open__descriptor, event->payload,
                                 event->payload_bytes, &g->arena, (ProtobufCMessage **)&open);
    if (status != CM_OK) {
        cm_warn("gateway %s sent a broken SeqOpen of %llu bytes", net_peer_address(event->peer),
                (unsigned long long)event->payload_bytes);
        net_disconnect(event->peer);
        gateways_drop(g, link);
        return;
    }
    uint64_t now = cm_now_ms();
    rt_seq_request request = {
        .key = {link->owner, open->stream},
        .prompt = open->prompt,
        .n_prompt = (uint32_t)open->n_prompt,
        .emitted = open->emitted,
        .n_emitted = (uint32_t)open->n_emitted,
        .deadline_ms = open->has_deadline_ms ? now + open->deadline_ms : UINT64_MAX,
    };
    status = gateways_read_sampler(g, open->sampler, &request.sampler, &err);
    if (status == CM_OK) {
        status = rt_sched_open(g->sched, now, &request, &err);
    }
    word.key = request.key;
    if (status != CM_OK) {
        word.end = RT_END_FAILED;
        word.status = status;
        word.text = err.text;
    }
    word.offset = request.n_emitted;
    gateways_add_word(link, &word);
}

static void gateways_on_cancel(rt_gateways *g, const gateway_link *link, const net_event *event)
{
    Baleen__Engine__V1__SeqCancel *cancel;
    if (pr_unpack(&baleen__engine__v1__seq_cancel__descriptor, event->payload, event->payload_bytes,
                  &g->arena, (ProtobufCMessage **)&cancel) == CM_OK) {
        for (size_t i = 0; i < cancel->n_stream; i++) {
            rt_sched_cancel(g->sched, (rt_seq_key){link->owner, cancel->stream[i]});
        }
    }
}

static void gateways_on_up(rt_gateways *g, net_peer *peer)
{
    for (uint32_t i = 0; i < g->n_link; i++) {
        if (g->links[i].peer == NULL) {
            g->links[i].peer = peer;
            g->links[i].owner = ++g->next_owner;
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
        gateways_free_frame(event->cookie);
        break;
    case NET_EV_MESSAGE:
        cm_arena_reset(&g->arena);
        if (link != NULL && event->type == PR_MSG_SEQ_OPEN) {
            gateways_on_open(g, link, event);
        } else if (link != NULL && event->type == PR_MSG_SEQ_CANCEL) {
            gateways_on_cancel(g, link, event);
        } else {
            cm_warn("gateway link %s sent a %s message, not one for a router", net_peer_address(event->peer),
                    pr_message_name(event->type));
        }
        net_release(g->n, event);
        g->changed(g->ctx);
        break;
    }
}

rt_gateways *rt_gateways_create(pc_loop *loop, net *n, rt_sched *sched, uint32_t gateway_max, pc_fn changed,
                                void *ctx)
{
    rt_gateways *g = cm_alloc(sizeof(*g));
    LIST_INIT(&g->frames);
    g->n = n;
    g->sched = sched;
    g->changed = changed;
    g->ctx = ctx;
    g->n_link = gateway_max;
    g->links = cm_alloc(sizeof(gateway_link) * gateway_max);
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
    while (!LIST_EMPTY(&g->frames)) {
        gateways_free_frame(LIST_FIRST(&g->frames)); /* closing tells no more about them */
    }
    for (uint32_t i = 0; i < g->n_link; i++) {
        gateways_forget_words(&g->links[i], g->links[i].n_word);
        cm_free(g->links[i].words);
        cm_free(g->links[i].logprobs);
    }
    cm_free(g->links);
    cm_arena_fini(&g->arena);
    cm_free(g);
}
