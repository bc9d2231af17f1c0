#include <string.h>

#include "common/base/assert.h"
#include "proto/messages.h"
#include "proto/pack.h"
#include "tests/sim/router.h"

enum { GATEWAYS_TELL_MAX = 64 };

/* ---- words to gateways ---- */

void sim_gateways_word(void *ctx, const rt_word *word)
{
    sim_router *r = ctx;
    if (word->end == RT_END_FAILED) {
        sim_check_kept_excuse(r->watched, word->key.stream);
    } else if (word->end != RT_GOING_ON) {
        sim_check_kept_ended(r->world, r->watched, word->key.stream);
    }
    rt_keep_word(r->keep, sim_ms(r->world), word);
}

static void gateways_fill(rt_kept *kept, uint32_t n, Baleen__Engine__V1__SeqTokens *seq)
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
static cm_status gateways_tell_step(sim *s, sim_router *r, sim_gw_link *link)
{
    Baleen__Engine__V1__StepTokens message = BALEEN__ENGINE__V1__STEP_TOKENS__INIT;
    Baleen__Engine__V1__SeqTokens seqs[GATEWAYS_TELL_MAX], *pointers[GATEWAYS_TELL_MAX];
    rt_kept *parts[GATEWAYS_TELL_MAX], *kept;
    rt_sched_ledger ledger;
    uint32_t room = s->shape.tell_max, n = 0;
    TAILQ_FOREACH (kept, &link->owner.untold, untold_link) {
        uint32_t n_untold = kept->n_id > kept->n_told ? kept->n_id - kept->n_told : 0;
        gateways_fill(kept, n_untold < room ? n_untold : room, &seqs[n]);
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

static cm_status gateways_tell_found(sim *s, sim_gw_link *link)
{
    sim_gw_found *found = TAILQ_FIRST(&link->found);
    CM_TRY(sim_send(s, link->end, PR_MSG_SEQ_FOUND, NULL, 0, found->packed.data, found->packed.len, NULL));
    TAILQ_REMOVE(&link->found, found, link);
    cm_bytes_fini(&found->packed);
    cm_free(found);
    return CM_OK;
}

void sim_gateways_flush(sim *s, sim_router *r)
{
    for (uint32_t g = 0; g < SIM_ROUTER_GATEWAYS; g++) {
        sim_gw_link *link = &r->gateways[g];
        cm_status status = link->end != NULL ? CM_OK : CM_E_RESET;
        while (status == CM_OK && !TAILQ_EMPTY(&link->found)) {
            status = gateways_tell_found(s, link);
        }
        while (status == CM_OK && !TAILQ_EMPTY(&link->owner.untold)) {
            status = gateways_tell_step(s, r, link);
        }
    }
}

bool sim_gateways_all_told(const sim_router *r)
{
    for (uint32_t g = 0; g < SIM_ROUTER_GATEWAYS; g++) {
        const sim_gw_link *link = &r->gateways[g];
        if (link->end != NULL && (!TAILQ_EMPTY(&link->owner.untold) || link->end->n_out > 0)) {
            return false;
        }
    }
    return true;
}

sim_gw_link *sim_gateways_find(sim_router *r, const sim_end *end)
{
    for (uint32_t i = 0; i < SIM_ROUTER_GATEWAYS; i++) {
        if (r->gateways[i].end == end) {
            return &r->gateways[i];
        }
    }
    return NULL;
}

void sim_gateways_lose(sim_router *r, uint64_t now_ms, sim_gw_link *link)
{
    sim_gw_found *found;
    rt_keep_owner_lost(r->keep, now_ms, &link->owner);
    while ((found = TAILQ_FIRST(&link->found)) != NULL) {
        TAILQ_REMOVE(&link->found, found, link);
        cm_bytes_fini(&found->packed);
        cm_free(found);
    }
    link->end = NULL;
}

/* ---- what gateways say ---- */

static rt_keep_key gateways_key(const Baleen__Engine__V1__SeqKey *from)
{
    rt_keep_key key = {.choice = from->choice, .birth = from->birth};
    CM_ASSERT(from->id.len == RT_KEEP_ID_BYTES);
    memcpy(key.id, from->id.data, RT_KEEP_ID_BYTES);
    return key;
}

static void gateways_on_open(sim *s, sim_router *r, sim_gw_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqOpen *open = message;
    const Baleen__Engine__V1__SamplerParams *from = open->sampler;
    rt_keep_key key = gateways_key(open->key);
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
static uint64_t gateways_number(const sim_gw_link *link, uint64_t stream)
{
    const rt_kept *kept;
    TAILQ_FOREACH (kept, &link->owner.kept, owner_link) {
        if (kept->stream == stream) {
            return kept->number;
        }
    }
    return 0;
}

static void gateways_on_cancel(sim *s, sim_router *r, sim_gw_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqCancel *cancel = message;
    for (size_t i = 0; i < cancel->n_stream; i++) {
        sim_check_kept_excuse(r->watched, gateways_number(link, cancel->stream[i]));
        rt_keep_cancel(r->keep, &link->owner, cancel->stream[i]);
    }
    for (size_t i = 0; i < cancel->n_finished; i++) {
        sim_check_kept_ended(s, r->watched, gateways_number(link, cancel->finished[i]));
        rt_keep_finish(r->keep, sim_ms(s), &link->owner, cancel->finished[i]);
    }
    for (size_t i = 0; i < cancel->n_copy; i++) {
        rt_keep_key key = gateways_key(cancel->copy[i]);
        const rt_kept *kept;
        if (rt_keep_find(r->keep, key.id, &kept, 1) == 1 && kept->key.birth == key.birth &&
            kept->owner == NULL) {
            sim_check_kept_excuse(r->watched, kept->number);
        }
        rt_keep_cancel_copy(r->keep, &key);
    }
}

static void gateways_on_detach(sim *s, sim_router *r, sim_gw_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqDetach *detach = message;
    for (size_t i = 0; i < detach->n_stream; i++) {
        rt_keep_detach(r->keep, sim_ms(s), &link->owner, detach->stream[i]);
    }
}

static void gateways_on_resume(sim *s, sim_router *r, sim_gw_link *link, const void *message)
{
    const Baleen__Engine__V1__SeqResume *resume = message;
    rt_keep_key key = gateways_key(resume->key);
    rt_keep_offer offer = {.key = &key, .term = resume->term};
    (void)s;
    rt_keep_resume(r->keep, &link->owner, resume->stream, &offer, resume->from);
}

static void gateways_on_find(sim *s, sim_router *r, sim_gw_link *link, const void *message)
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
    sim_gw_found *answer = cm_alloc(sizeof(*answer));
    cm_bytes_init(&answer->packed, 0);
    pr_pack(&found.base, &answer->packed);
    TAILQ_INSERT_TAIL(&link->found, answer, link);
}

static void gateways_on_forget(sim *s, sim_router *r, sim_gw_link *link, const void *message)
{
    (void)link;
    (void)message;
    rt_sched_forget(r->sched);
    r->n_forgets++;
    s->counts.forgets++;
}

void sim_gateways_heard(sim *s, sim_router *r, sim_gw_link *link, const sim_message *m)
{
    static const struct {
        pr_message type;
        const ProtobufCMessageDescriptor *descriptor;
        void (*fn)(sim *, sim_router *, sim_gw_link *, const void *);
    } handlers[] = {
        {PR_MSG_SEQ_OPEN, &baleen__engine__v1__seq_open__descriptor, gateways_on_open},
        {PR_MSG_SEQ_CANCEL, &baleen__engine__v1__seq_cancel__descriptor, gateways_on_cancel},
        {PR_MSG_SEQ_DETACH, &baleen__engine__v1__seq_detach__descriptor, gateways_on_detach},
        {PR_MSG_SEQ_FIND, &baleen__engine__v1__seq_find__descriptor, gateways_on_find},
        {PR_MSG_SEQ_RESUME, &baleen__engine__v1__seq_resume__descriptor, gateways_on_resume},
        {PR_MSG_PREFIX_FORGET, &baleen__engine__v1__prefix_forget__descriptor, gateways_on_forget},
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
