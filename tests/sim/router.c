/* A router's process: session, scheduler, layers through the exchange's machine, KV pages, links to gateways
 * and what is kept for them, as router/gateways.c calls keep_core. The step is the engine's: attention
 * through the pages, gate, experts, the next layer, at the end a token.
 */
#include <string.h>

#include "common/base/assert.h"
#include "proto/engine.pb-c.h"
#include "proto/messages.h"
#include "proto/pack.h"
#include "router/engine/exchange_core.h"
#include "router/keep_core.h"
#include "tests/sim/sim.h"

enum { ROUTER_GATEWAYS = 8, ROUTER_TELL_MAX = 64, ROUTER_DOORS_MS = 100, ROUTER_DRAIN_MS = 6000 };

/* One step under way: rows of all segments, layer by layer. */
typedef struct pass {
    bool busy;
    rt_step step;
    uint32_t layer;
    bool exchanging;
    uint64_t compute_until_us;
    uint64_t *hidden; /* [row_max] */
    uint8_t *codes, *scales;
    int32_t *experts;
    float *weights;
    uint16_t *results;
    rt_step_result *tokens; /* [slot_max] */
} pass;

/* An answer to SeqFind. */
typedef struct router_found {
    TAILQ_ENTRY(router_found) link;
    cm_bytes packed;
} router_found;

typedef struct gateway_link {
    sim_end *end; /* NULL: free */
    rt_keep_owner owner;
    TAILQ_HEAD(, router_found) found; /* not sent yet */
} gateway_link;

typedef struct router {
    sim_member member;
    sim *world; /* for words that come from inside of the scheduler */
    const sim_proc *proc;
    rt_sched *sched;
    rt_keep *keep;
    rt_xcore *exchange;
    uint8_t *staging;
    uint64_t *kv; /* [page_max][page_tokens][n_layer] */
    pass pass;
    bool resting; /* workers were told that nothing comes */
    gateway_link gateways[ROUTER_GATEWAYS];
    sim_watched watched[SIM_REQUESTS_MAX];
    cm_arena arena;
    cm_bytes packed;
    bool leaving;                                    /* asked to go */
    uint64_t leave_until_us;                         /* then it goes with what it has */
    bool draining;                                   /* no new sequences: ends with the last one */
    uint32_t load[SIM_LAYERS_MAX * SIM_EXPERTS_MAX]; /* rows per expert, not told yet */
    uint64_t load_at_us;
    sim_followed followed;
    sim_asked asked[SIM_ASKED_MAX]; /* by exchange */
} router;

#define ROUTER_STAGED ((void *)1) /* cookie of frames that stand in staging */

/* ---- words to gateways ---- */

static void router_word(void *ctx, const rt_word *word)
{
    router *r = ctx;
    if (word->end == RT_END_FAILED) {
        sim_check_kept_excuse(r->watched, word->key.stream);
    } else if (word->end != RT_GOING_ON) {
        sim_check_kept_ended(r->world, r->watched, word->key.stream);
    }
    rt_keep_word(r->keep, sim_ms(r->world), word);
}

static void router_fill(rt_kept *kept, uint32_t n, Baleen__Engine__V1__SeqTokens *seq)
{
    bool ends = !kept->live && kept->n_told + n >= kept->n_id;
    baleen__engine__v1__seq_tokens__init(seq);
    seq->stream = kept->stream;
    seq->has_offset = seq->has_end = true;
    seq->offset = kept->n_told;
    seq->n_id = n;
    seq->id = n > 0 ? kept->ids + kept->n_told : NULL;
    seq->end = !ends            ? BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON
               : kept->finished ? BALEEN__ENGINE__V1__SEQ_END__SEQ_FINISHED
                                : (Baleen__Engine__V1__SeqEnd)kept->end;
    seq->has_stop_id = ends && kept->end == RT_END_STOP;
    seq->stop_id = kept->stop_id;
    seq->has_status = ends && kept->end == RT_END_FAILED;
    seq->status = kept->status;
    seq->text = ends ? kept->text : NULL;
}

/* One frame of what waits: whole sequences in their order, the last one as far as there is room. */
static cm_status router_tell_step(sim *s, router *r, gateway_link *link)
{
    Baleen__Engine__V1__StepTokens message = BALEEN__ENGINE__V1__STEP_TOKENS__INIT;
    Baleen__Engine__V1__SeqTokens seqs[ROUTER_TELL_MAX], *pointers[ROUTER_TELL_MAX];
    rt_kept *parts[ROUTER_TELL_MAX], *kept;
    rt_sched_ledger ledger;
    uint32_t room = s->shape.tell_max, n = 0;
    TAILQ_FOREACH (kept, &link->owner.untold, untold_link) {
        uint32_t n_untold = kept->n_id > kept->n_told ? kept->n_id - kept->n_told : 0;
        router_fill(kept, n_untold < room ? n_untold : room, &seqs[n]);
        parts[n] = kept;
        pointers[n] = &seqs[n];
        room -= seqs[n].n_id > 0 ? (uint32_t)seqs[n].n_id : 1;
        n++;
        if (room == 0) {
            break;
        }
    }
    rt_sched_ledger_get(r->sched, &ledger);
    message.step = r->pass.step.number;
    message.has_running = message.has_waiting = true;
    message.running = ledger.n_running;
    message.waiting = ledger.n_waiting;
    message.n_seq = n;
    message.seq = pointers;
    cm_bytes_clear(&r->packed);
    pr_pack(&message.base, &r->packed);
    CM_TRY(sim_send(s, link->end, PR_MSG_STEP_TOKENS, NULL, 0, r->packed.data, r->packed.len, NULL));
    for (uint32_t i = 0; i < n; i++) {
        rt_keep_told(r->keep, sim_ms(s), parts[i], (uint32_t)seqs[i].n_id);
    }
    return CM_OK;
}

static cm_status router_tell_found(sim *s, gateway_link *link)
{
    router_found *found = TAILQ_FIRST(&link->found);
    CM_TRY(sim_send(s, link->end, PR_MSG_SEQ_FOUND, NULL, 0, found->packed.data, found->packed.len, NULL));
    TAILQ_REMOVE(&link->found, found, link);
    cm_bytes_fini(&found->packed);
    cm_free(found);
    return CM_OK;
}

static void router_flush(sim *s, router *r)
{
    for (uint32_t g = 0; g < ROUTER_GATEWAYS; g++) {
        gateway_link *link = &r->gateways[g];
        cm_status status = link->end != NULL ? CM_OK : CM_E_RESET;
        while (status == CM_OK && !TAILQ_EMPTY(&link->found)) {
            status = router_tell_found(s, link);
        }
        while (status == CM_OK && !TAILQ_EMPTY(&link->owner.untold)) {
            status = router_tell_step(s, r, link);
        }
    }
}

static bool router_all_told(const router *r)
{
    for (uint32_t g = 0; g < ROUTER_GATEWAYS; g++) {
        const gateway_link *link = &r->gateways[g];
        if (link->end != NULL && (!TAILQ_EMPTY(&link->owner.untold) || link->end->n_out > 0)) {
            return false;
        }
    }
    return true;
}

static gateway_link *router_gateway(router *r, const sim_end *end)
{
    for (uint32_t i = 0; i < ROUTER_GATEWAYS; i++) {
        if (r->gateways[i].end == end) {
            return &r->gateways[i];
        }
    }
    return NULL;
}

static void router_lose(router *r, uint64_t now_ms, gateway_link *link)
{
    router_found *found;
    rt_keep_owner_lost(r->keep, now_ms, &link->owner);
    while ((found = TAILQ_FIRST(&link->found)) != NULL) {
        TAILQ_REMOVE(&link->found, found, link);
        cm_bytes_fini(&found->packed);
        cm_free(found);
    }
    link->end = NULL;
}

/* ---- what gateways say ---- */

static rt_keep_key router_key(const Baleen__Engine__V1__SeqKey *from)
{
    rt_keep_key key = {.choice = from->choice, .birth = from->birth};
    CM_ASSERT(from->id.len == RT_KEEP_ID_BYTES);
    memcpy(key.id, from->id.data, RT_KEEP_ID_BYTES);
    return key;
}

static void router_on_open(sim *s, router *r, gateway_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqOpen *open = message;
    const Baleen__Engine__V1__SamplerParams *from = open->sampler;
    rt_keep_key key = router_key(open->key);
    rt_seq_request request = {
        .key = {0, open->stream},
        .prompt = open->prompt,
        .n_prompt = (uint32_t)open->n_prompt,
        .emitted = open->emitted,
        .n_emitted = (uint32_t)open->n_emitted,
        .sampler = {.seed = from->seed,
                    .top_p = 1,
                    .tokens_max = from->tokens_max,
                    .tokens_min = from->tokens_min,
                    .n_stop = (uint32_t)from->n_stop_id},
        .deadline_ms = open->has_deadline_ms ? sim_ms(s) + open->deadline_ms : UINT64_MAX,
    };
    for (size_t i = 0; i < from->n_stop_id; i++) {
        request.sampler.stop[i] = from->stop_id[i];
    }
    rt_keep_offer offer = {.key = &key,
                           .term = open->term,
                           .resume = open->resume.data,
                           .n_resume = open->has_resume ? open->resume.len : 0};
    rt_keep_open(r->keep, sim_ms(s), &link->owner, &request, &offer);
}

/* The sequence that a gateway calls so; 0: none. */
static uint64_t router_number(const gateway_link *link, uint64_t stream)
{
    const rt_kept *kept;
    TAILQ_FOREACH (kept, &link->owner.kept, owner_link) {
        if (kept->stream == stream) {
            return kept->number;
        }
    }
    return 0;
}

static void router_on_cancel(sim *s, router *r, gateway_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqCancel *cancel = message;
    for (size_t i = 0; i < cancel->n_stream; i++) {
        sim_check_kept_excuse(r->watched, router_number(link, cancel->stream[i]));
        rt_keep_cancel(r->keep, &link->owner, cancel->stream[i]);
    }
    for (size_t i = 0; i < cancel->n_finished; i++) {
        sim_check_kept_ended(s, r->watched, router_number(link, cancel->finished[i]));
        rt_keep_finish(r->keep, sim_ms(s), &link->owner, cancel->finished[i]);
    }
    for (size_t i = 0; i < cancel->n_copy; i++) {
        rt_keep_key key = router_key(cancel->copy[i]);
        const rt_kept *kept;
        if (rt_keep_find(r->keep, key.id, &kept, 1) == 1 && kept->key.birth == key.birth &&
            kept->owner == NULL) {
            sim_check_kept_excuse(r->watched, kept->number);
        }
        rt_keep_cancel_copy(r->keep, &key);
    }
}

static void router_on_detach(sim *s, router *r, gateway_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqDetach *detach = message;
    for (size_t i = 0; i < detach->n_stream; i++) {
        rt_keep_detach(r->keep, sim_ms(s), &link->owner, detach->stream[i]);
    }
}

static void router_on_resume(sim *s, router *r, gateway_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqResume *resume = message;
    rt_keep_key key = router_key(resume->key);
    rt_keep_offer offer = {.key = &key, .term = resume->term};
    (void)s;
    rt_keep_resume(r->keep, &link->owner, resume->stream, &offer, resume->from);
}

static void router_on_find(sim *s, router *r, gateway_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqFind *find = message;
    Baleen__Engine__V1__SeqKey key = BALEEN__ENGINE__V1__SEQ_KEY__INIT, *keys = &key;
    Baleen__Engine__V1__SeqFound found = BALEEN__ENGINE__V1__SEQ_FOUND__INIT;
    const rt_kept *kept;
    (void)s;
    found.ask = find->ask;
    if (rt_keep_find(r->keep, find->id.data, &kept, 1) == 1) {
        key.id = (ProtobufCBinaryData){.len = RT_KEEP_ID_BYTES, .data = (uint8_t *)(uintptr_t)kept->key.id};
        key.birth = kept->key.birth;
        found.key = &keys;
        found.n_key = 1;
        found.has_resume = kept->resume != NULL;
        found.resume = (ProtobufCBinaryData){.len = kept->n_resume, .data = kept->resume};
        found.has_term = true;
        found.term = kept->term;
    }
    router_found *answer = cm_alloc(sizeof(*answer));
    cm_bytes_init(&answer->packed, 0);
    pr_pack(&found.base, &answer->packed);
    TAILQ_INSERT_TAIL(&link->found, answer, link);
}

static void router_heard(sim *s, router *r, gateway_link *link, const sim_message *m)
{
    static const struct {
        pr_message type;
        const ProtobufCMessageDescriptor *descriptor;
        void (*fn)(sim *, router *, gateway_link *, const void *);
    } handlers[] = {
        {PR_MSG_SEQ_OPEN, &baleen__engine__v1__seq_open__descriptor, router_on_open},
        {PR_MSG_SEQ_CANCEL, &baleen__engine__v1__seq_cancel__descriptor, router_on_cancel},
        {PR_MSG_SEQ_DETACH, &baleen__engine__v1__seq_detach__descriptor, router_on_detach},
        {PR_MSG_SEQ_FIND, &baleen__engine__v1__seq_find__descriptor, router_on_find},
        {PR_MSG_SEQ_RESUME, &baleen__engine__v1__seq_resume__descriptor, router_on_resume},
    };
    for (size_t i = 0; i < sizeof(handlers) / sizeof(handlers[0]); i++) {
        ProtobufCMessage *message;
        if (handlers[i].type != (pr_message)m->type) {
            continue;
        }
        cm_arena_reset(&r->arena);
        if (pr_unpack(handlers[i].descriptor, m->data, m->n_bytes, &r->arena, &message) != CM_OK) {
            sim_fail(s, "a %s cannot be read", handlers[i].descriptor->short_name);
        }
        handlers[i].fn(s, r, link, message);
        sim_check_kept(s, r->proc, r->keep, r->watched);
    }
}

/* ---- a step ---- */

static uint64_t *router_kv(sim *s, router *r, const rt_step_seg *seg, uint32_t position, uint32_t layer)
{
    uint32_t per_page = s->shape.page_tokens;
    if (position / per_page >= seg->n_page || seg->pages[position / per_page] >= s->shape.page_max) {
        sim_fail(s, "position %u has no page", position);
    }
    size_t row = (size_t)seg->pages[position / per_page] * per_page + position % per_page;
    return &r->kv[row * s->shape.n_layer + layer];
}

/* Attention and gate of all rows; then their experts are asked. */
static void pass_begin_layer(sim *s, router *r)
{
    pass *p = &r->pass;
    uint32_t row = 0, topk = s->shape.topk;
    for (uint32_t i = 0; i < p->step.n_seg; i++) {
        const rt_step_seg *seg = &p->step.segs[i];
        for (uint32_t k = 0; k < seg->n_row; k++, row++) {
            uint32_t position = seg->pos0 + k;
            uint64_t before = position > 0 ? *router_kv(s, r, seg, position - 1, p->layer) : 0;
            sim_expert_choice choice;
            p->hidden[row] =
                sim_model_attend(p->hidden[row], before, p->layer, router_kv(s, r, seg, position, p->layer));
            sim_model_row(p->hidden[row], p->codes + (size_t)row * SIM_D, p->scales + row);
            sim_model_gate(&s->shape, p->hidden[row], p->layer, &choice);
            for (uint32_t e = 0; e < topk; e++) {
                r->load[p->layer * s->shape.n_expert + (uint32_t)choice.expert[e]]++;
            }
            memcpy(p->experts + (size_t)row * topk, choice.expert, sizeof(int32_t) * topk);
            memcpy(p->weights + (size_t)row * topk, choice.weight, sizeof(float) * topk);
        }
    }
    memset(p->results, 0, sizeof(uint16_t) * p->step.n_row * topk * SIM_D);
    p->exchanging = true;
    s->counts.exchanges++;
    rt_xcore_begin(r->exchange, &(rt_xcore_layer){.step = p->step.number,
                                                  .layer = p->layer,
                                                  .n_row = p->step.n_row,
                                                  .experts = p->experts,
                                                  .weights = p->weights,
                                                  .codes = p->codes,
                                                  .scales = p->scales,
                                                  .results = p->results});
}

static void pass_begin(sim *s, router *r)
{
    pass *p = &r->pass;
    uint32_t row = 0;
    for (uint32_t i = 0; i < p->step.n_seg; i++) {
        for (uint32_t k = 0; k < p->step.segs[i].n_row; k++) {
            p->hidden[row++] = sim_model_embed(p->step.segs[i].tokens[k]);
        }
    }
    p->busy = true;
    p->layer = 0;
    p->exchanging = false;
    p->compute_until_us = s->now_us + sim_between(s, SIM_TIMES, 20, 400);
    s->counts.steps++;
}

/* Tokens as an engine draws them: one after another while the guess before was right; then guesses, seldom
 * right ones, of what follows. first: the segment's row in the step. */
static void pass_draw(sim *s, const pass *p, const rt_step_seg *seg, uint32_t first, rt_step_result *out)
{
    const uint32_t *guesses = seg->tokens + seg->n_row - seg->n_draft;
    *out = (rt_step_result){.n_draft = seg->draft_want};
    do {
        uint32_t i = out->n_token++, row = seg->n_row - seg->n_draft - 1 + i;
        out->tokens[i] = sim_model_token(p->hidden[first + row], seg->sampler->seed, seg->pos0 + row + 1,
                                         seg->sampler, seg->stop_wait <= i);
    } while (out->n_token <= seg->n_draft && guesses[out->n_token - 1] == out->tokens[out->n_token - 1]);
    for (uint32_t i = 0; i < out->n_draft; i++) {
        out->drafts[i] = sim_below(s, SIM_TIMES, SIM_VOCAB);
    }
}

static void pass_end(sim *s, router *r)
{
    pass *p = &r->pass;
    uint32_t row = 0, n = 0;
    for (uint32_t i = 0; i < p->step.n_seg; i++) {
        const rt_step_seg *seg = &p->step.segs[i];
        if (seg->sample) {
            pass_draw(s, p, seg, row, &p->tokens[n++]);
        }
        row += seg->n_row;
    }
    p->busy = false;
    rt_sched_complete(r->sched, sim_ms(s), 0, p->tokens, router_word, r);
}

static void pass_layer_done(sim *s, sim_proc *proc, cm_status status, uint32_t expert)
{
    router *r = proc->state;
    pass *p = &r->pass;
    p->exchanging = false;
    if (status != CM_OK) {
        sim_trace(s, proc, "step %llu failed: layer %u expert %u: %s", (unsigned long long)p->step.number,
                  p->layer, expert, cm_status_text(status));
        p->busy = false;
        rt_sched_fail_step(r->sched, sim_ms(s), CM_E_UNAVAILABLE, "experts are not available", router_word,
                           r);
        return;
    }
    for (uint32_t row = 0; row < p->step.n_row; row++) {
        p->hidden[row] = sim_model_combine(p->hidden[row], p->results + (size_t)row * s->shape.topk * SIM_D,
                                           s->shape.topk);
    }
    p->compute_until_us = s->now_us + sim_between(s, SIM_TIMES, 20, 400);
    if (++p->layer == s->shape.n_layer) {
        pass_end(s, r);
    }
}

/* ---- the exchange's wishes ---- */

static void router_chores(sim *s, sim_proc *proc)
{
    router *r = proc->state;
    rt_xact act;
    while (rt_xcore_chore(r->exchange, sim_ms(s), &act)) {
        if (act.kind == RT_XACT_DISCONNECT) {
            sim_disconnect(s, act.handle);
        } else if (act.kind == RT_XACT_REPORT) {
            rt_xlink link = rt_xcore_link(r->exchange, act.rank);
            sim_trace(s, proc, "lost worker %u: %s", link.member_id, cm_status_text(act.status));
            pc_mcore_report(r->member.core, link.member_id, act.status);
            sim_member_act(s, proc, &r->member);
        } else if (act.kind == RT_XACT_CONNECT) {
            rt_xlink link = rt_xcore_link(r->exchange, act.rank);
            net_identity self = {rt_xcore_epoch(r->exchange)->cluster, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER,
                                 rt_xcore_self(r->exchange)};
            rt_xcore_connecting(r->exchange, sim_ms(s), act.rank,
                                sim_connect(s, proc, SIM_ROWS, link.address, &self));
        }
    }
}

static void router_send(sim *s, sim_proc *proc, const rt_xact *act)
{
    router *r = proc->state;
    pr_dispatch header;
    uint8_t *payload = r->staging + act->staged_at;
    rt_xcore_pack(r->exchange, act->part, &header, payload);
    cm_status status = sim_send(s, act->handle, PR_MSG_DISPATCH, &header, sizeof(header), payload,
                                rt_xcore_payload_bytes(r->exchange, act->part), ROUTER_STAGED);
    sim_trace(s, proc, "asks exchange %u of step %llu layer %u epoch %llu: %u slots of rank %u: %s",
              header.head.exchange, (unsigned long long)header.head.step, header.head.layer,
              (unsigned long long)header.head.epoch, header.n_slot, act->rank, cm_status_text(status));
    r->asked[header.head.exchange % SIM_ASKED_MAX] = (sim_asked){.end = act->handle, .head = header.head};
    rt_xcore_sent(r->exchange, status);
}

/* As far as the layer goes now; when it wants to be asked again. */
static uint64_t router_exchange(sim *s, sim_proc *proc)
{
    router *r = proc->state;
    for (;;) {
        rt_xact act = rt_xcore_next(r->exchange, sim_ms(s));
        if (act.kind == RT_XACT_SEND) {
            router_send(s, proc, &act);
        } else if (act.kind == RT_XACT_WAIT) {
            return act.until_ms == UINT64_MAX ? SIM_NEVER : act.until_ms * SIM_MS;
        } else if (act.kind == RT_XACT_DONE) {
            pass_layer_done(s, proc, act.status, act.expert);
            return s->now_us;
        }
    }
}

static void router_rest(sim *s, sim_proc *proc)
{
    router *r = proc->state;
    const pc_epoch *epoch = rt_xcore_epoch(r->exchange);
    r->resting = true;
    for (uint32_t rank = 0; rank < rt_xcore_n_link(r->exchange); rank++) {
        rt_xlink link = rt_xcore_link(r->exchange, rank);
        pr_idle header = {{.version = PR_FRAME_VERSION,
                           .router = rt_xcore_self(r->exchange),
                           .cluster = epoch->cluster,
                           .epoch = epoch->number,
                           .step = r->pass.step.number}};
        if (link.up) {
            cm_status status = sim_send(s, link.handle, PR_MSG_IDLE, &header, sizeof(header), NULL, 0, NULL);
            (void)status; /* a full queue means it is no news */
        }
    }
    (void)proc;
}

/* Begins or goes on with a step; when it wants to be woken. */
static uint64_t router_step(sim *s, sim_proc *proc)
{
    router *r = proc->state;
    pass *p = &r->pass;
    if (!p->busy && rt_sched_next(r->sched, sim_ms(s), &p->step)) {
        r->resting = false;
        pass_begin(s, r);
    }
    if (!p->busy) {
        if (!r->resting) {
            router_rest(s, proc);
        }
        uint64_t deadline_ms = rt_sched_next_deadline(r->sched);
        return deadline_ms == UINT64_MAX ? SIM_NEVER : deadline_ms * SIM_MS;
    }
    if (!p->exchanging) {
        if (s->now_us < p->compute_until_us) {
            return p->compute_until_us;
        }
        pass_begin_layer(s, r);
    }
    return router_exchange(s, proc);
}

static void router_tell_load(sim *s, router *r)
{
    Baleen__Control__V1__ExpertLoad load = BALEEN__CONTROL__V1__EXPERT_LOAD__INIT;
    Baleen__Control__V1__MemberMessage word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    if (s->now_us < r->load_at_us || !pc_mcore_connected(r->member.core) || r->member.end == NULL) {
        return;
    }
    r->load_at_us = s->now_us + s->shape.heartbeat_ms * SIM_MS;
    load.n_layer = s->shape.n_layer;
    load.n_expert = s->shape.n_expert;
    load.n_count = (size_t)s->shape.n_layer * s->shape.n_expert;
    load.count = r->load;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_EXPERT_LOAD;
    word.expert_load = &load;
    cm_bytes_clear(&r->packed);
    pr_pack(&word.base, &r->packed);
    if (sim_send(s, r->member.end, 0, NULL, 0, r->packed.data, r->packed.len, NULL) == CM_OK) {
        memset(r->load, 0, sizeof(r->load));
    }
}

/* ---- the process ---- */

static void router_finish(sim *s, void *arg, uint64_t tag)
{
    sim_proc *proc = arg;
    (void)tag;
    if (proc->alive) {
        sim_kill(s, proc, false);
    }
}

/* It asks to go; the coordinator lets gateways know first. */
static void router_leave(sim *s, sim_proc *proc)
{
    router *r = proc->state;
    if (!r->leaving) {
        sim_trace(s, proc, "wants to leave");
        r->leaving = true;
        r->leave_until_us = s->now_us + ROUTER_DRAIN_MS * SIM_MS;
        pc_mcore_leave(r->member.core);
    }
}

/* No gateway chooses us any more; what one opened before is on its way. */
static void router_close_doors(sim *s, void *arg, uint64_t tag)
{
    sim_proc *proc = arg;
    if (proc->alive && !sim_put_off(s, proc, router_close_doors, arg, tag)) {
        router *r = proc->state;
        r->draining = true;
        rt_sched_drain(r->sched);
        sim_go(s, proc);
    }
}

static void router_end_when_idle(sim *s, sim_proc *proc)
{
    router *r = proc->state;
    rt_sched_ledger ledger;
    rt_sched_ledger_get(r->sched, &ledger);
    bool alone = r->leaving && !pc_mcore_connected(r->member.core);
    bool idle = ledger.n_seq == 0 && !r->pass.busy && router_all_told(r);
    if (((r->draining || alone) && idle) || (r->leaving && s->now_us >= r->leave_until_us)) {
        sim_at(s, s->now_us, router_finish, proc, 0);
    }
}

static void router_news(sim *s, sim_proc *proc, const pc_mout *out)
{
    router *r = proc->state;
    if (out->kind == PC_MOUT_COMMIT) {
        sim_check_followed(s, proc, out->value, &r->followed);
        rt_xcore_offer(r->exchange, out->value, pc_mcore_id(r->member.core));
        pc_mcore_committed(r->member.core, out->value->number);
    } else if (out->kind == PC_MOUT_PREPARE) {
        pc_mcore_prepared(r->member.core, out->value->number, CM_OK, NULL);
    } else if (out->kind == PC_MOUT_DRAIN) {
        s->hosts[proc->host].leaving = true;
        router_leave(s, proc);
        sim_at(s, s->now_us + ROUTER_DOORS_MS * SIM_MS, router_close_doors, proc, 0);
    } else if (out->kind == PC_MOUT_REFUSED) {
        sim_at(s, s->now_us, router_finish, proc, 0);
    }
}

static void router_up(sim *s, sim_proc *proc, sim_end *end)
{
    router *r = proc->state;
    if (end->side == 0) {
        rt_xcore_up(r->exchange, end);
        return;
    }
    gateway_link *link = router_gateway(r, NULL);
    if (link == NULL) {
        sim_disconnect(s, end);
        return;
    }
    link->end = end;
    rt_keep_owner_init(r->keep, &link->owner);
    TAILQ_INIT(&link->found);
}

static void router_down(sim *s, sim_proc *proc, sim_end *end, cm_status status)
{
    router *r = proc->state;
    if (sim_member_down(s, proc, &r->member, end, status)) {
        return;
    }
    if (end->side == 0) {
        rt_xcore_down(r->exchange, sim_ms(s), end, status);
        return;
    }
    gateway_link *link = router_gateway(r, end);
    if (link != NULL) {
        router_lose(r, sim_ms(s), link);
    }
}

static void router_answer(sim *s, sim_proc *proc, sim_end *end, const sim_message *m)
{
    router *r = proc->state;
    cm_error err = {0};
    cm_status status =
        m->type == PR_MSG_COMBINE
            ? rt_xcore_combine(r->exchange, end, m->header, m->header_bytes, m->data, m->n_bytes, &err)
            : rt_xcore_refuse(r->exchange, end, m->header, m->header_bytes, &err);
    const pr_frame_head *head = (const pr_frame_head *)m->header;
    if (status == CM_OK) {
        sim_check_answer(s, proc, r->asked, end, head, r->pass.step.number, r->pass.layer,
                         rt_xcore_epoch(r->exchange)->number);
    }
    sim_trace(s, proc, "%s exchange %u: %s", m->type == PR_MSG_COMBINE ? "answer to" : "refusal of",
              head->exchange, status == CM_OK ? "taken" : err.text);
}

static void router_message(sim *s, sim_proc *proc, sim_end *end, const sim_message *m)
{
    router *r = proc->state;
    gateway_link *link = router_gateway(r, end);
    if (sim_member_message(s, proc, &r->member, end, m)) {
        return;
    }
    if (m->type == PR_MSG_COMBINE || m->type == PR_MSG_REFUSE) {
        router_answer(s, proc, end, m);
    } else if (link != NULL) {
        router_heard(s, r, link, m);
    }
}

static void router_sent(sim *s, sim_proc *proc, void *cookie)
{
    router *r = proc->state;
    (void)s;
    CM_ASSERT(cookie == ROUTER_STAGED);
    rt_xcore_left(r->exchange);
}

static void router_check(sim *s, const sim_proc *proc)
{
    const router *r = proc->state;
    rt_sched_ledger ledger;
    rt_keep_ledger kept;
    rt_sched_ledger_get(r->sched, &ledger);
    rt_keep_ledger_get(r->keep, &kept);
    if (ledger.n_slot > s->shape.slot_max || ledger.n_page > s->shape.page_max ||
        ledger.n_waiting > s->shape.queue_max + s->shape.slot_max) {
        sim_fail(s, "%s holds %u slots, %u pages, %u waiting", proc->name, ledger.n_slot, ledger.n_page,
                 ledger.n_waiting);
    }
    uint64_t n_log = kept.n_live; /* that may be over the bound: running or not told yet */
    for (uint32_t i = 0; i < ROUTER_GATEWAYS; i++) {
        n_log += r->gateways[i].end != NULL ? r->gateways[i].owner.n_untold : 0;
    }
    uint64_t logs_max = n_log * SIM_CONTEXT * sizeof(uint32_t);
    if (kept.n_ended > s->shape.kept_max || kept.n_bytes > s->shape.kept_bytes + logs_max ||
        kept.n_live > ledger.n_seq || (kept.n_live < ledger.n_seq && !r->pass.busy)) {
        sim_fail(s, "%s keeps %u running ones of %u, %u ended ones, %llu bytes", proc->name, kept.n_live,
                 ledger.n_seq, kept.n_ended, (unsigned long long)kept.n_bytes);
    }
}

static uint64_t router_pump(sim *s, sim_proc *proc)
{
    router *r = proc->state;
    uint64_t wake_us = sim_member_pump(s, proc, &r->member);
    router_chores(s, proc);
    uint64_t step_us = router_step(s, proc), chore_ms = rt_xcore_chore_ms(r->exchange);
    rt_sched_words(r->sched, router_word, r);
    sim_check_kept(s, proc, r->keep, r->watched);
    rt_keep_expire(r->keep, sim_ms(s));
    router_flush(s, r);
    router_tell_load(s, r);
    router_check(s, proc);
    sim_check_kept(s, proc, r->keep, r->watched);
    router_end_when_idle(s, proc);
    uint64_t due_ms = rt_keep_due(r->keep);
    wake_us = step_us < wake_us ? step_us : wake_us;
    wake_us = due_ms != UINT64_MAX && due_ms * SIM_MS < wake_us ? due_ms * SIM_MS : wake_us;
    wake_us = r->leaving && r->leave_until_us < wake_us ? r->leave_until_us : wake_us;
    return chore_ms != UINT64_MAX && chore_ms * SIM_MS < wake_us ? chore_ms * SIM_MS : wake_us;
}

static net_identity router_identity(const sim_proc *proc)
{
    const router *r = proc->state;
    return (net_identity){pc_mcore_cluster(r->member.core), BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER,
                          pc_mcore_id(r->member.core)};
}

static void router_no_word(void *ctx, const rt_word *word)
{
    (void)ctx;
    (void)word;
}

static void router_end(sim *s, sim_proc *proc)
{
    router *r = proc->state;
    pass *p = &r->pass;
    rt_sched_ledger ledger;
    rt_sched_ledger_get(r->sched, &ledger);
    s->counts.preempted += ledger.n_preempted;
    s->counts.retries += rt_xcore_n_retries(r->exchange);
    if (p->busy) {
        rt_sched_fail_step(r->sched, sim_ms(s), CM_E_CANCELLED, NULL, router_no_word, NULL);
    }
    for (uint32_t i = 0; i < ROUTER_GATEWAYS; i++) {
        if (r->gateways[i].end != NULL) {
            router_lose(r, sim_ms(s), &r->gateways[i]);
        }
    }
    rt_keep_destroy(r->keep);
    rt_sched_destroy(r->sched);
    rt_xcore_destroy(r->exchange);
    sim_member_fini(&r->member);
    cm_arena_fini(&r->arena);
    cm_bytes_fini(&r->packed);
    cm_free(r->staging);
    cm_free(r->kv);
    cm_free(p->hidden);
    cm_free(p->codes);
    cm_free(p->scales);
    cm_free(p->experts);
    cm_free(p->weights);
    cm_free(p->results);
    cm_free(p->tokens);
    cm_free(r);
}

static const sim_ops router_ops = {.up = router_up,
                                   .down = router_down,
                                   .message = router_message,
                                   .sent = router_sent,
                                   .pump = router_pump,
                                   .identity = router_identity,
                                   .end = router_end};

static void pass_init(const sim_shape *shape, pass *p)
{
    size_t n = shape->row_max, n_slot = n * shape->topk;
    p->hidden = cm_alloc(sizeof(uint64_t) * n);
    p->codes = cm_alloc(n * SIM_D);
    p->scales = cm_alloc(n);
    p->experts = cm_alloc(sizeof(int32_t) * n_slot);
    p->weights = cm_alloc(sizeof(float) * n_slot);
    p->results = cm_alloc(sizeof(uint16_t) * n_slot * SIM_D);
    p->tokens = cm_alloc(sizeof(rt_step_result) * shape->slot_max);
}

void sim_router_start(sim *s, sim_proc *proc)
{
    const sim_shape *shape = &s->shape;
    router *r = cm_alloc(sizeof(*r));
    proc->ops = &router_ops;
    proc->state = r;
    r->sched = rt_sched_create(&(rt_sched_limits){.slot_max = shape->slot_max,
                                                  .queue_max = shape->queue_max,
                                                  .row_max = shape->row_max,
                                                  .chunk_max = shape->chunk_max,
                                                  .page_max = shape->page_max,
                                                  .page_tokens = shape->page_tokens,
                                                  .context = SIM_CONTEXT,
                                                  .vocab = SIM_VOCAB,
                                                  .draft_max = shape->draft_max,
                                                  .draft_always = true});
    r->world = s;
    r->proc = proc;
    r->keep = rt_keep_create(&(rt_keep_limits){.live_max = shape->slot_max + shape->queue_max,
                                               .ended_max = shape->kept_max,
                                               .bytes_max = shape->kept_bytes,
                                               .grace_ms = shape->keep_ms},
                             r->sched);
    r->exchange = rt_xcore_create(&(rt_xcore_options){.limits = {.row_max = shape->row_max,
                                                                 .topk = shape->topk,
                                                                 .d = SIM_D,
                                                                 .frame_bytes_max = shape->frame_bytes},
                                                      .answer_ms = (uint32_t)shape->answer_ms,
                                                      .wait_ms = (uint32_t)shape->wait_ms});
    r->staging = cm_alloc_aligned(rt_xcore_staging_bytes(r->exchange));
    r->kv = cm_alloc(sizeof(uint64_t) * shape->page_max * shape->page_tokens * shape->n_layer);
    pass_init(shape, &r->pass);
    r->resting = true;
    cm_arena_init(&r->arena, "sim open", 16 << 10, 4 << 20);
    cm_bytes_init(&r->packed, 0);
    sim_member_init(s, proc, &r->member, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER, true, router_news);
    sim_member_act(s, proc, &r->member);
}

void sim_router_leave(sim *s, sim_proc *proc)
{
    router_leave(s, proc);
    sim_member_act(s, proc, &((router *)proc->state)->member);
    sim_go(s, proc);
}

void sim_router_ledger(const sim_proc *proc, char *text, size_t cap)
{
    const router *r = proc->state;
    rt_sched_ledger ledger;
    rt_sched_ledger_get(r->sched, &ledger);
    text[0] = 0;
    rt_keep_ledger kept;
    rt_keep_ledger_get(r->keep, &kept);
    if (ledger.n_seq + ledger.n_slot + ledger.n_page + rt_xcore_n_open(r->exchange) > 0) {
        snprintf(text, cap, "%u sequences, %u slots, %u pages, %u frames", ledger.n_seq, ledger.n_slot,
                 ledger.n_page, rt_xcore_n_open(r->exchange));
    } else if (kept.n_live + kept.n_orphan + kept.n_ended + kept.n_bytes > 0) {
        snprintf(text, cap, "%u running, %u nobody's, %u ended sequences, %llu bytes are kept", kept.n_live,
                 kept.n_orphan, kept.n_ended, (unsigned long long)kept.n_bytes);
    }
}
