/* A gateway's streams: the calls of gateway/stream.c and stream_events.c on the two machines, without text.
 */
#include <stddef.h>
#include <string.h>

#include "common/base/assert.h"
#include "proto/messages.h"
#include "tests/sim/gateway.h"

/* Its client is still there. */
static bool stream_is_heard(const sim_gw_stream *stream)
{
    return stream->request->state == SIM_OPEN && stream->request->visit == stream->visit;
}

static sim_gw_stream *stream_find(const sim_gateway *g, uint64_t number)
{
    sim_gw_stream *stream;
    TAILQ_FOREACH (stream, &g->streams, link) {
        if (stream->router != NULL && stream->number == number) {
            return stream;
        }
    }
    return NULL;
}

/* ---- words to routers ---- */

static void stream_key(const sim_gw_stream *stream, Baleen__Engine__V1__SeqKey *key)
{
    baleen__engine__v1__seq_key__init(key);
    key->id = (ProtobufCBinaryData){.len = SIM_ID_BYTES, .data = (uint8_t *)(uintptr_t)stream->id};
    key->birth = stream->birth;
}

static void say_open(sim *s, sim_gateway *g, sim_gw_stream *stream)
{
    const rt_sampler *from = &stream->request->sampler;
    Baleen__Engine__V1__SamplerParams sampler = BALEEN__ENGINE__V1__SAMPLER_PARAMS__INIT;
    Baleen__Engine__V1__SeqOpen open = BALEEN__ENGINE__V1__SEQ_OPEN__INIT;
    Baleen__Engine__V1__SeqKey key;
    uint32_t stop[SIM_STOPS_MAX];
    uint8_t blob[SIM_BLOB_BYTES] = {0};
    memcpy(stop, from->stop, sizeof(stop));
    memcpy(blob, &stream->request->id, sizeof(stream->request->id));
    sampler.seed = from->seed;
    sampler.tokens_max = from->tokens_max;
    sampler.has_tokens_min = true;
    sampler.tokens_min = from->tokens_min;
    sampler.n_stop_id = from->n_stop;
    sampler.stop_id = stop;
    stream_key(stream, &key);
    open.stream = stream->number;
    open.key = &key;
    open.has_term = true;
    open.term = stream->term;
    open.has_resume = stream->request->streamed;
    open.resume = (ProtobufCBinaryData){.len = sizeof(blob), .data = blob};
    open.prompt = stream->core.prompt.id;
    open.n_prompt = stream->core.prompt.n;
    open.emitted = stream->core.emitted.id;
    open.n_emitted = stream->core.emitted.n;
    open.sampler = &sampler;
    open.has_deadline_ms = stream->deadline_us != SIM_NEVER;
    open.deadline_ms = stream->deadline_us > s->now_us ? (stream->deadline_us - s->now_us) / SIM_MS : 0;
    sim_gw_say(s, g, stream->router, PR_MSG_SEQ_OPEN, &open.base);
}

static void say_resume(sim *s, sim_gateway *g, sim_gw_stream *stream)
{
    Baleen__Engine__V1__SeqKey key;
    Baleen__Engine__V1__SeqResume resume = BALEEN__ENGINE__V1__SEQ_RESUME__INIT;
    stream_key(stream, &key);
    resume.stream = stream->number;
    resume.key = &key;
    resume.from = stream->core.emitted.n;
    resume.term = stream->term;
    sim_gw_say(s, g, stream->router, PR_MSG_SEQ_RESUME, &resume.base);
}

static void say_forget(sim *s, sim_gateway *g, const sim_gw_stream *stream, uint64_t router)
{
    Baleen__Engine__V1__SeqKey key, *keys = &key;
    Baleen__Engine__V1__SeqCancel cancel = BALEEN__ENGINE__V1__SEQ_CANCEL__INIT;
    sim_gw_router *at = sim_gw_router_get(g, router);
    stream_key(stream, &key);
    cancel.copy = &keys;
    cancel.n_copy = 1;
    if (at != NULL) {
        sim_gw_say(s, g, at, PR_MSG_SEQ_CANCEL, &cancel.base);
    }
}

static void cancel_there(sim *s, sim_gateway *g, sim_gw_stream *stream)
{
    if (stream->router != NULL && stream->core.state != GW_CORE_ENDED) {
        Baleen__Engine__V1__SeqCancel cancel = BALEEN__ENGINE__V1__SEQ_CANCEL__INIT;
        cancel.stream = &stream->number;
        cancel.n_stream = 1;
        sim_gw_say(s, g, stream->router, PR_MSG_SEQ_CANCEL, &cancel.base);
    }
    stream->router = NULL;
}

static void finish_there(sim *s, sim_gateway *g, sim_gw_stream *stream)
{
    if (stream->router != NULL && stream->core.state != GW_CORE_ENDED) {
        Baleen__Engine__V1__SeqCancel cancel = BALEEN__ENGINE__V1__SEQ_CANCEL__INIT;
        cancel.finished = &stream->number;
        cancel.n_finished = 1;
        sim_gw_say(s, g, stream->router, PR_MSG_SEQ_CANCEL, &cancel.base);
    }
    stream->router = NULL;
}

static void detach_there(sim *s, sim_gateway *g, sim_gw_stream *stream)
{
    if (stream->router != NULL && stream->core.state != GW_CORE_ENDED) {
        Baleen__Engine__V1__SeqDetach detach = BALEEN__ENGINE__V1__SEQ_DETACH__INIT;
        detach.stream = &stream->number;
        detach.n_stream = 1;
        sim_gw_say(s, g, stream->router, PR_MSG_SEQ_DETACH, &detach.base);
    }
    stream->router = NULL;
}

/* ---- ends ---- */

/* What its router is to hear of it was said before. keep: its copies are for a client that comes back. */
static void stream_free(sim *s, sim_gateway *g, sim_gw_stream *stream, bool keep)
{
    uint64_t copies[GW_PLACE_COPIES];
    CM_ASSERT(stream->router == NULL);
    uint32_t n = gw_place_end(&g->place, &stream->spot, copies);
    for (uint32_t i = 0; i < n && !keep; i++) {
        s->counts.copies++;
        say_forget(s, g, stream, copies[i]);
    }
    TAILQ_REMOVE(&g->streams, stream, link);
    gw_core_fini(&stream->core);
    cm_free(stream);
}

static void stream_fail(sim *s, sim_gateway *g, sim_gw_stream *stream, cm_status status, const char *text)
{
    sim_request *request = stream->request;
    bool heard = stream_is_heard(stream);
    cancel_there(s, g, stream);
    stream_free(s, g, stream, false);
    if (heard) {
        sim_client_failed(s, request, status, text);
    }
}

static void stream_finish(sim *s, sim_gateway *g, sim_gw_stream *stream, rt_seq_end end)
{
    sim_request *request = stream->request;
    bool heard = stream_is_heard(stream);
    finish_there(s, g, stream);
    stream_free(s, g, stream, false);
    if (heard) {
        sim_client_end(s, request, end);
    }
}

/* ---- what the place machine says ---- */

/* A new number, so that no word of an earlier asking is taken for one of this. */
static void ask_at(sim *s, sim_gateway *g, sim_gw_stream *stream, uint64_t router)
{
    cancel_there(s, g, stream);
    stream->router = sim_gw_router_get(g, router);
    stream->number = ++g->last_number;
    CM_ASSERT(stream->router != NULL);
}

static void place_do(sim *s, sim_proc *proc, const gw_place_action *action)
{
    static const char *const names[] = {"opens", "resumes", "forgets the copy of", "gives up", "condemns"};
    sim_gateway *g = proc->state;
    sim_gw_stream *stream = (sim_gw_stream *)((char *)action->spot - offsetof(sim_gw_stream, spot));
    bool full = action->status == CM_E_CAPACITY && !stream->spot.accepted;
    sim_trace(s, proc, "%s request %u with %u tokens at router %llu", names[action->act], stream->request->id,
              (unsigned)stream->core.emitted.n, (unsigned long long)action->router);
    switch (action->act) {
    case GW_PLACE_OPEN:
        s->counts.reopened += stream->spot.accepted;
        ask_at(s, g, stream, action->router);
        say_open(s, g, stream);
        break;
    case GW_PLACE_RESUME:
        s->counts.rebound++;
        ask_at(s, g, stream, action->router);
        say_resume(s, g, stream);
        break;
    case GW_PLACE_FORGET:
        s->counts.copies++;
        say_forget(s, g, stream, action->router);
        break;
    case GW_PLACE_GIVE_UP:
        stream_fail(s, g, stream, full ? CM_E_CAPACITY : CM_E_UNAVAILABLE,
                    full ? "all routers are full" : "no router could go on");
        break;
    case GW_PLACE_CONDEMN:
        stream_fail(s, g, stream, CM_E_UNAVAILABLE, "routers died under it, one after the other");
        break;
    }
}

static uint64_t streams_expire(sim *s, sim_gateway *g)
{
    uint64_t wake_us = SIM_NEVER;
    sim_gw_stream *stream, *after;
    for (stream = TAILQ_FIRST(&g->streams); stream != NULL; stream = after) {
        after = TAILQ_NEXT(stream, link);
        if (s->now_us >= stream->deadline_us) {
            stream_fail(s, g, stream, CM_E_DEADLINE, "the deadline passed");
        } else if (stream->deadline_us < wake_us) {
            wake_us = stream->deadline_us;
        }
    }
    return wake_us;
}

uint64_t sim_streams_run(sim *s, sim_proc *proc)
{
    sim_gateway *g = proc->state;
    gw_place_action action;
    uint64_t wake_us = streams_expire(s, g);
    do {
        while (gw_place_next(&g->place, sim_ms(s), &action)) {
            place_do(s, proc, &action);
        }
    } while (sim_gw_drop_leavers(s, proc));
    uint64_t due_ms = gw_place_due(&g->place, sim_ms(s));
    uint64_t due_us = due_ms == UINT64_MAX ? SIM_NEVER : due_ms * SIM_MS;
    /* as production's timer: not at once, however early it says */
    due_us = due_us < s->now_us + SIM_MS ? s->now_us + SIM_MS : due_us;
    return due_us < wake_us ? due_us : wake_us;
}

void sim_streams_lost(sim *s, sim_gateway *g, const sim_gw_router *router)
{
    sim_gw_stream *stream;
    gw_place_down(&g->place, sim_ms(s), router->number);
    TAILQ_FOREACH (stream, &g->streams, link) {
        if (stream->router == router) {
            stream->router = NULL; /* there is nobody to tell */
        }
    }
}

/* ---- what routers say ---- */

static bool stream_try_again(sim *s, sim_gateway *g, sim_gw_stream *stream, cm_status status)
{
    if (!gw_place_refused(&g->place, sim_ms(s), &stream->spot, status)) {
        return false;
    }
    cancel_there(s, g, stream);
    gw_core_reopen(&stream->core);
    return true;
}

static void stream_refused(sim *s, sim_gateway *g, sim_gw_stream *stream, cm_status status, const char *text)
{
    bool peer = cm_status_scope(status) == CM_SCOPE_PEER;
    sim_trace(s, NULL, "request %u is refused: %s: %s", stream->request->id, cm_status_text(status), text);
    if (!stream_try_again(s, g, stream, status)) {
        stream_fail(s, g, stream, peer ? CM_E_UNAVAILABLE : status, text);
    }
}

/* false: the client has all it wants. */
static bool tell_token(sim *s, sim_gw_stream *stream, uint64_t offset, uint32_t id)
{
    sim_request *request = stream->request;
    if (offset >= request->n_want || request->want[offset] != id) {
        sim_fail(s, "request %u: token %llu is %u, undisturbed it is %d", request->id,
                 (unsigned long long)offset, id, offset < request->n_want ? (int)request->want[offset] : -1);
    }
    if (offset >= stream->n_told && stream_is_heard(stream)) {
        sim_client_tokens(s, request, offset, &id, 1);
    }
    return offset + 1 != request->finish_at;
}

static void stream_take(sim *s, sim_gateway *g, sim_gw_stream *stream,
                        const Baleen__Engine__V1__SeqTokens *frame)
{
    gw_core_news news;
    cm_error err = {0};
    if (gw_core_take(&stream->core, frame, &news, &err) != CM_OK) {
        stream_refused(s, g, stream, CM_E_PROTOCOL, err.text);
        return;
    }
    if (news.end != BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED) {
        gw_place_word(&g->place, sim_ms(s), &stream->spot, news.n_id > 0);
    }
    for (uint32_t i = 0; i < news.n_id; i++) {
        if (!tell_token(s, stream, news.offset + i, news.id[i])) {
            stream_finish(s, g, stream, RT_END_STOP);
            return;
        }
    }
    if (news.end == BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED) {
        stream_refused(s, g, stream, (cm_status)frame->status, frame->text != NULL ? frame->text : "");
    } else if (news.end != BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON) {
        stream_finish(s, g, stream, (rt_seq_end)news.end);
    }
}

void sim_streams_tokens(sim *s, sim_proc *proc, const sim_gw_router *router,
                        const Baleen__Engine__V1__SeqTokens *seq)
{
    sim_gateway *g = proc->state;
    sim_gw_stream *stream = stream_find(g, seq->stream);
    if (stream != NULL && stream->router == router) { /* else it ended or moved meanwhile */
        stream_take(s, g, stream, seq);
    }
}

/* ---- what clients ask ---- */

uint64_t sim_gw_wall_us(const sim *s, const sim_proc *proc)
{
    return s->now_us + s->hosts[proc->host].ahead_us;
}

static bool is_running(const sim_gateway *g, const sim_request *request)
{
    const sim_gw_stream *stream;
    TAILQ_FOREACH (stream, &g->streams, link) {
        if (memcmp(stream->id, request->key, SIM_ID_BYTES) == 0) {
            return true;
        }
    }
    return false;
}

cm_status sim_stream_open(sim *s, sim_proc *proc, sim_request *request, uint64_t birth, uint64_t term,
                          uint64_t at)
{
    sim_gateway *g = proc->state;
    if (at == 0 && is_running(g, request)) {
        return CM_E_EXISTS;
    }
    if (!g->placed || sim_gw_n_linked(g) == 0) {
        return CM_E_UNAVAILABLE;
    }
    sim_gw_stream *stream = cm_alloc(sizeof(*stream));
    md_ids prompt;
    md_ids_init(&prompt);
    for (uint32_t i = 0; i < request->n_prompt; i++) {
        md_ids_push(&prompt, request->prompt[i]);
    }
    stream->request = request;
    stream->visit = request->visit;
    stream->birth = birth;
    stream->term = term;
    stream->n_told = request->n_got;
    stream->deadline_us = request->deadline_us;
    memcpy(stream->id, request->key, SIM_ID_BYTES);
    gw_core_init(&stream->core, &prompt, request->sampler.tokens_max, SIM_VOCAB, false);
    TAILQ_INSERT_TAIL(&g->streams, stream, link);
    gw_place_begin(&g->place, sim_ms(s), &stream->spot, at);
    return CM_OK;
}

cm_status sim_gateway_open(sim *s, sim_proc *proc, sim_request *request)
{
    return sim_stream_open(s, proc, request, sim_draw(s, SIM_TIMES), sim_gw_wall_us(s, proc), 0);
}

void sim_gateway_resume(sim *s, sim_proc *proc, sim_request *request)
{
    sim_seek_begin(s, proc->state, request);
}

void sim_gateway_leave(sim *s, sim_proc *proc, const sim_request *request, bool comes_back)
{
    sim_gateway *g = proc->state;
    sim_gw_stream *stream;
    if (sim_seek_cancel(g, request)) {
        return;
    }
    TAILQ_FOREACH (stream, &g->streams, link) {
        if (stream->request == request && stream->visit == request->visit) {
            break;
        }
    }
    CM_ASSERT_MSG(stream != NULL, "request %u is not at %s", request->id, proc->name);
    if (comes_back) {
        detach_there(s, g, stream);
    } else {
        cancel_there(s, g, stream);
    }
    stream_free(s, g, stream, comes_back);
}

void sim_streams_fini(sim *s, sim_gateway *g)
{
    sim_gw_stream *stream;
    while ((stream = TAILQ_FIRST(&g->streams)) != NULL) {
        sim_request *request = stream->request;
        bool heard = stream_is_heard(stream);
        stream->router = NULL;
        stream_free(s, g, stream, true);
        if (heard) {
            sim_client_lost(s, request);
        }
    }
}
