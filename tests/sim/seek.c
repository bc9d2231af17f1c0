/* A client comes back with the id of its stream: all routers are asked who has it, as gateway/seek.c asks. */
#include <string.h>

#include "common/base/assert.h"
#include "proto/messages.h"
#include "tests/sim/gateway.h"

enum { SEEK_MS = 3000 };

static void seek_free(sim_gateway *g, sim_gw_seek *seek)
{
    TAILQ_REMOVE(&g->seeks, seek, link);
    cm_free(seek);
}

static bool seek_is_heard(const sim_gw_seek *seek)
{
    return seek->request->state == SIM_OPEN && seek->request->visit == seek->visit;
}

static sim_gw_asked *seek_asked(sim_gw_seek *seek, uint64_t router)
{
    for (uint32_t i = 0; i < seek->n_asked; i++) {
        if (seek->asked[i].router == router) {
            return &seek->asked[i];
        }
    }
    return NULL;
}

static void seek_ask(sim *s, sim_gateway *g, sim_gw_seek *seek, sim_gw_router *router)
{
    Baleen__Engine__V1__SeqFind find = BALEEN__ENGINE__V1__SEQ_FIND__INIT;
    if (seek_asked(seek, router->number) == NULL) {
        CM_ASSERT(seek->n_asked < SIM_GW_ASKED_MAX);
        seek->asked[seek->n_asked++] = (sim_gw_asked){.router = router->number};
    }
    find.ask = seek->ask;
    find.id = (ProtobufCBinaryData){.len = SIM_ID_BYTES, .data = seek->request->key};
    sim_gw_say(s, g, router, PR_MSG_SEQ_FIND, &find.base);
}

void sim_seeks_linked(sim *s, sim_gateway *g, sim_gw_router *router)
{
    sim_gw_seek *seek;
    TAILQ_FOREACH (seek, &g->seeks, link) {
        seek_ask(s, g, seek, router);
    }
}

void sim_seeks_lost(sim_gateway *g, const sim_gw_router *router)
{
    sim_gw_seek *seek;
    TAILQ_FOREACH (seek, &g->seeks, link) {
        sim_gw_asked *asked = seek_asked(seek, router->number);
        if (asked != NULL) {
            asked->answered = false;
        }
    }
}

/* A router may have an older request of the same id: the newest client's counts. */
static void seek_take(sim *s, sim_gw_seek *seek, const sim_gw_router *router,
                      const Baleen__Engine__V1__SeqFound *found)
{
    sim_gw_asked *asked = seek_asked(seek, router->number);
    if (asked == NULL) {
        return;
    }
    asked->answered = true;
    if (found->n_key > 0 && found->has_resume && (!seek->found || found->term > seek->term)) {
        uint32_t id;
        memcpy(&id, found->resume.data, sizeof(id));
        if (found->resume.len != SIM_BLOB_BYTES || id != seek->request->id) {
            sim_fail(s, "request %u is told to go on as request %u", seek->request->id, id);
        }
        seek->found = true;
        seek->term = found->term;
        seek->birth = found->key[0]->birth;
    }
    for (size_t i = 0; i < found->n_key; i++) {
        if (seek->at == 0 || (seek->found && found->key[i]->birth == seek->birth)) {
            seek->at = router->number;
            seek->at_birth = found->key[i]->birth;
        }
    }
}

void sim_seeks_found(sim *s, sim_gateway *g, const sim_gw_router *router,
                     const Baleen__Engine__V1__SeqFound *found)
{
    sim_gw_seek *seek;
    TAILQ_FOREACH (seek, &g->seeks, link) {
        if (seek->ask == found->ask) {
            seek_take(s, seek, router, found);
            return;
        }
    }
}

static void seek_tell(sim *s, sim_proc *proc, const sim_gw_seek *seek, bool all)
{
    sim_request *request = seek->request;
    uint64_t now_us = sim_gw_wall_us(s, proc);
    if (!seek_is_heard(seek)) {
        return;
    }
    sim_trace(s, proc, "seeks request %u: %s", request->id,
              seek->found ? "found"
              : all       ? "nobody has it"
                          : "not all could be asked");
    if (!seek->found) {
        s->counts.not_found += all;
        sim_client_failed(s, request, all ? CM_E_NOT_FOUND : CM_E_UNAVAILABLE, "the stream was not found");
        return;
    }
    s->counts.resumed++;
    cm_status status =
        sim_stream_open(s, proc, request, seek->birth, now_us > seek->term ? now_us : seek->term + 1,
                        seek->at_birth == seek->birth ? seek->at : 0);
    if (status != CM_OK) {
        sim_client_failed(s, request, CM_E_UNAVAILABLE, "the stream was found and cannot be begun");
    }
}

/* Everybody has answered, or it was found and everybody who can be asked has, or it took too long. */
static bool seek_check(sim *s, sim_proc *proc, sim_gw_seek *seek)
{
    const sim_gateway *g = proc->state;
    const sim_gw_router *router;
    bool asked = true, all = g->followed.number != 0 && !TAILQ_EMPTY(&g->routers);
    TAILQ_FOREACH (router, &g->routers, link) {
        const sim_gw_asked *of = seek_asked(seek, router->number);
        bool answered = of != NULL && of->answered;
        asked = asked && (answered || !router->up);
        all = all && answered;
    }
    if (!all && !(seek->found && asked) && s->now_us < seek->until_us) {
        return false;
    }
    seek_tell(s, proc, seek, all);
    return true;
}

uint64_t sim_seeks_run(sim *s, sim_proc *proc)
{
    sim_gateway *g = proc->state;
    uint64_t wake_us = SIM_NEVER;
    sim_gw_seek *seek, *after;
    for (seek = TAILQ_FIRST(&g->seeks); seek != NULL; seek = after) {
        after = TAILQ_NEXT(seek, link);
        if (seek_check(s, proc, seek)) {
            seek_free(g, seek);
        } else if (seek->until_us < wake_us) {
            wake_us = seek->until_us;
        }
    }
    return wake_us;
}

void sim_seek_begin(sim *s, sim_gateway *g, sim_request *request)
{
    sim_gw_router *router;
    sim_gw_seek *seek = cm_alloc(sizeof(*seek));
    seek->request = request;
    seek->visit = request->visit;
    seek->ask = ++g->last_ask;
    seek->until_us = s->now_us + SEEK_MS * SIM_MS;
    TAILQ_INSERT_TAIL(&g->seeks, seek, link);
    TAILQ_FOREACH (router, &g->routers, link) {
        if (router->up) {
            seek_ask(s, g, seek, router);
        }
    }
}

bool sim_seek_cancel(sim_gateway *g, const sim_request *request)
{
    sim_gw_seek *seek;
    TAILQ_FOREACH (seek, &g->seeks, link) {
        if (seek->request == request && seek->visit == request->visit) {
            seek_free(g, seek);
            return true;
        }
    }
    return false;
}

void sim_seeks_fini(sim *s, sim_gateway *g)
{
    sim_gw_seek *seek;
    while ((seek = TAILQ_FIRST(&g->seeks)) != NULL) {
        sim_request *request = seek->request;
        bool heard = seek_is_heard(seek);
        seek_free(g, seek);
        if (heard) {
            sim_client_lost(s, request);
        }
    }
}
