/* Who has the streams of a request? All routers of the epoch are asked, those that are not linked yet as soon
 * as they are; it is over when everybody has answered, or when it was found and everybody who can be asked
 * has, or after a while. */
#include <string.h>

#include "common/base/log.h"
#include "common/base/mem.h"
#include "gateway/gateway_private.h"
#include "gateway/request.h"

enum { SEEK_MS = 3000 };

typedef struct seek_router {
    uint64_t number;
    bool answered; /* on the link that is up */
} seek_router;

struct gw_seek {
    TAILQ_ENTRY(gw_seek) link;
    gw_gateway *gateway;
    char *id;
    uint8_t key[GW_KEY_BYTES];
    uint64_t ask;
    gw_seek_fn fn;
    void *ctx;
    pc_timer *timer;
    pc_task task; /* looks whether it is over */
    bool expired;
    seek_router *routers; /* [n_router] that were asked */
    uint32_t n_router;

    json_t *resume; /* of the newest that was found; NULL: none yet */
    uint64_t term, birth;
    uint64_t at[GW_CHOICES_MAX], at_birth[GW_CHOICES_MAX]; /* routers and requests, by choice */
};

static void seek_free(gw_seek *seek)
{
    TAILQ_REMOVE(&seek->gateway->seeks, seek, link);
    pc_loop_unpost(seek->gateway->loop, &seek->task);
    pc_timer_destroy(seek->timer);
    json_decref(seek->resume);
    cm_free(seek->routers);
    cm_free(seek->id);
    cm_free(seek);
}

void gw_seek_cancel(gw_seek *seek)
{
    seek_free(seek);
}

/* ---- asking ---- */

static seek_router *seek_find(gw_seek *seek, uint64_t number)
{
    for (uint32_t i = 0; i < seek->n_router; i++) {
        if (seek->routers[i].number == number) {
            return &seek->routers[i];
        }
    }
    return NULL;
}

static void seek_ask(gw_seek *seek, gw_router *router)
{
    Baleen__Engine__V1__SeqFind find = BALEEN__ENGINE__V1__SEQ_FIND__INIT;
    if (seek_find(seek, gw_router_number(router)) == NULL) {
        seek->routers = cm_realloc(seek->routers, sizeof(seek_router) * (seek->n_router + 1));
        seek->routers[seek->n_router++] = (seek_router){.number = gw_router_number(router)};
    }
    find.ask = seek->ask;
    find.id = (ProtobufCBinaryData){.len = GW_KEY_BYTES, .data = seek->key};
    gw_router_find(router, &find);
}

void gw_seeks_linked(gw_gateway *gateway, gw_router *router)
{
    gw_seek *seek;
    TAILQ_FOREACH (seek, &gateway->seeks, link) {
        seek_ask(seek, router);
    }
}

void gw_seeks_changed(gw_gateway *gateway)
{
    gw_seek *seek;
    TAILQ_FOREACH (seek, &gateway->seeks, link) {
        pc_loop_post(gateway->loop, &seek->task);
    }
}

void gw_seeks_lost(gw_gateway *gateway, gw_router *router)
{
    gw_seek *seek;
    TAILQ_FOREACH (seek, &gateway->seeks, link) {
        seek_router *asked = seek_find(seek, gw_router_number(router));
        if (asked != NULL) {
            asked->answered = false;
        }
    }
    gw_seeks_changed(gateway);
}

/* ---- answers ---- */

/* A router may have an older request of the same id: the newest client's counts. */
static void seek_take_resume(gw_seek *seek, const Baleen__Engine__V1__SeqFound *found)
{
    json_t *resume = json_loadb((const char *)found->resume.data, found->resume.len, JSON_ALLOW_NUL, NULL);
    if (resume == NULL || (seek->resume != NULL && found->term <= seek->term)) {
        json_decref(resume);
        return;
    }
    json_decref(seek->resume);
    seek->resume = resume;
    seek->term = found->term;
    seek->birth = found->key[0]->birth;
}

static void seek_take(gw_seek *seek, gw_router *router, const Baleen__Engine__V1__SeqFound *found)
{
    seek_router *asked = seek_find(seek, gw_router_number(router));
    if (asked == NULL) {
        return;
    }
    asked->answered = true;
    if (found->has_resume && found->n_key > 0) {
        seek_take_resume(seek, found);
    }
    for (size_t i = 0; i < found->n_key; i++) {
        uint32_t choice = found->key[i]->choice;
        bool newest = seek->resume != NULL && found->key[i]->birth == seek->birth;
        if (choice < GW_CHOICES_MAX && (seek->at[choice] == 0 || newest)) {
            seek->at[choice] = gw_router_number(router);
            seek->at_birth[choice] = found->key[i]->birth;
        }
    }
}

void gw_seeks_found(void *ctx, gw_router *router, const Baleen__Engine__V1__SeqFound *found)
{
    gw_gateway *gateway = ctx;
    gw_seek *seek;
    TAILQ_FOREACH (seek, &gateway->seeks, link) {
        if (seek->ask == found->ask) {
            seek_take(seek, router, found);
            pc_loop_post(gateway->loop, &seek->task);
            return;
        }
    }
}

/* ---- the end ---- */

static void seek_tell_found(gw_seek *seek)
{
    gw_error error;
    gw_origin *origin = gw_origin_read(seek->resume, seek->term);
    const json_t *body = json_object_get(seek->resume, "body");
    if (origin == NULL || strcmp(gw_origin_id(origin), seek->id) != 0) {
        cm_error_log("stream %s: what a router keeps of it cannot be read", seek->id);
        gw_error_set(&error, GW_CAUSE_NO_STREAM, NULL,
                     "the stream '%.140s' was begun by another version of this server: ask again", seek->id);
        seek->fn(seek->ctx, NULL, &error);
        gw_origin_release(origin);
        return;
    }
    for (uint32_t i = 0; i < GW_CHOICES_MAX; i++) {
        seek->at[i] = seek->at_birth[i] == gw_origin_birth(origin) ? seek->at[i] : 0;
    }
    gw_found found = {.origin = origin,
                      .surface = json_string_value(json_object_get(seek->resume, "surface")),
                      .body = body,
                      .options = json_object_get(seek->resume, "options"),
                      .router = seek->at,
                      .n_router = gw_request_choices(body)};
    cm_stat_add(CM_STAT_streams_resumed, 1);
    seek->fn(seek->ctx, &found, NULL);
    gw_origin_release(origin);
}

static void seek_tell_nothing(gw_seek *seek, bool all)
{
    gw_error error;
    if (all) {
        gw_error_set(&error, GW_CAUSE_NO_STREAM, NULL,
                     "the stream '%.140s' is unknown, or ended too long ago: ask again from the start",
                     seek->id);
    } else {
        gw_error_set(
            &error, GW_CAUSE_UNAVAILABLE, NULL,
            "the stream '%.140s' was not found, but not every router could be asked; please try again",
            seek->id);
        error.retry_ms = GW_RETRY_MS;
    }
    seek->fn(seek->ctx, NULL, &error);
}

static void seek_check(void *arg)
{
    gw_seek *seek = arg;
    gw_router *router = NULL;
    bool asked = true, all = seek->gateway->epoch != NULL;
    uint32_t n = 0;
    while ((router = gw_routers_next(seek->gateway->routers, router)) != NULL) {
        const seek_router *of = seek_find(seek, gw_router_number(router));
        bool answered = of != NULL && of->answered;
        asked = asked && (answered || !gw_router_is_up(router));
        all = all && answered;
        n++;
    }
    all = all && n > 0;
    if (!all && !(seek->resume != NULL && asked) && !seek->expired) {
        return;
    }
    if (seek->resume != NULL) {
        seek_tell_found(seek);
    } else {
        seek_tell_nothing(seek, all);
    }
    seek_free(seek);
}

static void seek_expired(void *arg)
{
    gw_seek *seek = arg;
    seek->expired = true;
    seek_check(seek);
}

gw_seek *gw_seek_begin(gw_gateway *gateway, const gw_tenant *tenant, const char *id, gw_seek_fn fn, void *ctx)
{
    gw_seek *seek = cm_alloc(sizeof(*seek));
    gw_router *router = NULL;
    *seek = (gw_seek){.gateway = gateway,
                      .id = cm_strdup(id),
                      .ask = ++gateway->last_ask,
                      .fn = fn,
                      .ctx = ctx,
                      .timer = pc_timer_create(gateway->loop, seek_expired, seek),
                      .task = {.fn = seek_check, .arg = seek}};
    gw_origin_hash(tenant, id, seek->key);
    TAILQ_INSERT_TAIL(&gateway->seeks, seek, link);
    while ((router = gw_routers_next(gateway->routers, router)) != NULL) {
        if (gw_router_is_up(router)) {
            seek_ask(seek, router);
        }
    }
    pc_timer_set(seek->timer, SEEK_MS);
    return seek;
}
