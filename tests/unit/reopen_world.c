#include "tests/unit/reopen_world.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"

enum { W_GRACE_MS = 3000, W_REOPEN_MS = 1 << 30, W_REOPENS_MAX = 3 };

/* ---- links ---- */

static w_link *link_up(w_world *world, uint32_t g, uint32_t r)
{
    for (uint32_t i = 0; i < W_LINKS; i++) {
        if (world->links[g][r][i].gateway_up) {
            return &world->links[g][r][i];
        }
    }
    return NULL;
}

static void messages_free(w_messages *messages)
{
    w_message *message;
    while ((message = STAILQ_FIRST(messages)) != NULL) {
        STAILQ_REMOVE_HEAD(messages, next);
        cm_free(message);
    }
}

static void link_break(w_link *link)
{
    link->broken = true;
    messages_free(&link->to_router);
    messages_free(&link->to_gateway);
}

static void say(w_link *link, w_messages *to, const w_message *message)
{
    if (!link->broken) {
        w_message *copy = cm_alloc(sizeof(*copy));
        *copy = *message;
        STAILQ_INSERT_TAIL(to, copy, next);
    }
}

/* ---- routers ---- */

static void router_start(w_world *world, w_router *router)
{
    router->alive = true;
    router->in_flight = false;
    router->number = ++world->n_lives;
    t_engine_init(&router->engine, &world->limits);
    router->engine.right_percent = world->right_percent;
    router->keep = rt_keep_create(&world->keep_limits, router->engine.sched);
}

static void router_notices(w_world *world, w_router *router, w_link *link)
{
    rt_keep_owner_lost(router->keep, world->now_ms, &link->owner);
    link->router_up = false;
}

static void router_stop(w_world *world, uint32_t r)
{
    w_router *router = &world->routers[r];
    for (uint32_t g = 0; g < W_GATEWAYS; g++) {
        for (uint32_t i = 0; i < W_LINKS; i++) {
            w_link *link = &world->links[g][r][i];
            if (link->router_up) {
                router_notices(world, router, link);
                link_break(link);
            }
        }
    }
    rt_keep_destroy(router->keep);
    t_engine_fini(&router->engine);
    router->alive = false;
}

static void router_hears(w_world *world, w_router *router, w_link *link, const w_message *m)
{
    rt_keep *keep = router->keep;
    switch (m->kind) {
    case W_OPEN: {
        rt_seq_request request = {.key = {0, m->stream},
                                  .prompt = m->ids,
                                  .n_prompt = m->n_prompt,
                                  .emitted = m->ids + m->n_prompt,
                                  .n_emitted = m->n_id - m->n_prompt,
                                  .sampler = m->sampler,
                                  .deadline_ms = UINT64_MAX};
        rt_keep_offer offer = {.key = &m->key, .term = m->term, .resume = "body", .n_resume = 4};
        rt_keep_open(keep, world->now_ms, &link->owner, &request, &offer);
        break;
    }
    case W_RESUME: {
        rt_keep_offer offer = {.key = &m->key, .term = m->term};
        rt_keep_resume(keep, &link->owner, m->stream, &offer, m->from);
        break;
    }
    case W_CANCEL:
        rt_keep_cancel(keep, &link->owner, m->stream);
        break;
    case W_FINISH:
        rt_keep_finish(keep, world->now_ms, &link->owner, m->stream);
        break;
    case W_COPY:
        rt_keep_cancel_copy(keep, &m->key);
        break;
    case W_DETACH:
        rt_keep_detach(keep, world->now_ms, &link->owner, m->stream);
        break;
    case W_TOKENS:
        fail();
    }
}

/* Some of what it has to tell, a part of each at a time. */
static void router_tells(w_world *world, w_router *router, w_link *link)
{
    rt_kept *kept;
    while ((kept = TAILQ_FIRST(&link->owner.untold)) != NULL && t_below(&world->rng, 4) > 0) {
        uint32_t n_all = kept->n_id > kept->n_told ? kept->n_id - kept->n_told : 0;
        uint32_t n = t_between(&world->rng, 0, n_all);
        bool ends = !kept->live && n == n_all;
        w_message message = {.kind = W_TOKENS,
                             .stream = kept->stream,
                             .from = kept->n_told,
                             .n_id = n,
                             .end = !ends            ? RT_GOING_ON
                                    : kept->finished ? (rt_seq_end)BALEEN__ENGINE__V1__SEQ_END__SEQ_FINISHED
                                                     : kept->end,
                             .stop_id = kept->stop_id,
                             .status = kept->status};
        if (n > 0) {
            memcpy(message.ids, kept->ids + kept->n_told, n * sizeof(uint32_t));
        }
        say(link, &link->to_gateway, &message);
        rt_keep_told(router->keep, world->now_ms, kept, n);
    }
}

typedef struct words {
    rt_word list[W_WORDS_MAX];
    uint32_t n;
} words;

/* The scheduler is watched for allocations: logs grow afterwards. */
static void word_note(void *ctx, const rt_word *word)
{
    words *w = ctx;
    assert_true(w->n < W_WORDS_MAX);
    w->list[w->n++] = *word;
}

static void router_step(w_world *world, w_router *router)
{
    words w = {.n = 0};
    if (!router->in_flight) {
        router->in_flight = t_begin(&router->engine, world->now_ms);
        rt_sched_words(router->engine.sched, word_note, &w);
    } else {
        router->in_flight = false;
        if (t_below(&world->rng, 200) == 0) {
            rt_sched_fail_step(router->engine.sched, world->now_ms, CM_E_UNAVAILABLE, NULL, word_note, &w);
        } else {
            t_complete(&router->engine, world->now_ms, word_note, &w);
        }
    }
    for (uint32_t i = 0; i < w.n; i++) {
        rt_keep_word(router->keep, world->now_ms, &w.list[i]);
    }
    rt_keep_expire(router->keep, world->now_ms);
}

/* ---- streams ---- */

static void stream_free(w_stream *stream)
{
    assert_int_equal(stream->spot.state, GW_SPOT_NONE);
    if (stream->client != NULL) {
        stream->client->stream = NULL;
    }
    gw_core_fini(&stream->core);
    *stream = (w_stream){0};
}

static uint32_t router_of(const w_world *world, uint64_t number);

static void forget_copy(w_world *world, const w_stream *stream, uint64_t number)
{
    uint32_t r = router_of(world, number);
    w_link *link = r < W_ROUTERS ? link_up(world, stream->gateway, r) : NULL;
    w_message copy = {.kind = W_COPY, .key = stream->key};
    world->n_copies++;
    if (link != NULL) {
        say(link, &link->to_router, &copy);
    }
}

static void stream_leave(w_world *world, w_stream *stream, int kind)
{
    if (stream->link != NULL && stream->core.state != GW_CORE_ENDED) {
        w_message message = {.stream = stream->number};
        message.kind = kind;
        say(stream->link, &stream->link->to_router, &message);
    }
    stream->link = NULL;
    uint64_t copies[GW_PLACE_COPIES];
    uint32_t n = gw_place_end(&world->gateways[stream->gateway].place, &stream->spot, copies);
    for (uint32_t i = 0; i < n && kind != W_DETACH; i++) {
        forget_copy(world, stream, copies[i]);
    }
}

static void client_done(w_stream *stream)
{
    if (stream->client != NULL) {
        stream->client->state = W_IDLE;
    }
}

static void stream_end(w_world *world, w_stream *stream)
{
    client_done(stream);
    stream_leave(world, stream, W_CANCEL);
    stream_free(stream);
}

/* number: of a router that has it already; 0: a new one. NULL: too many. */
static w_stream *stream_begin(w_world *world, uint32_t g, w_client *client, const rt_keep_key *key,
                              uint64_t number)
{
    for (uint32_t i = 0; i < W_STREAMS; i++) {
        w_stream *stream = &world->streams[i];
        if (stream->used) {
            continue;
        }
        md_ids prompt;
        md_ids_init(&prompt);
        for (uint32_t k = 0; k < client->n_prompt; k++) {
            md_ids_push(&prompt, client->prompt[k]);
        }
        *stream = (w_stream){.used = true, .gateway = g, .client = client, .key = *key};
        stream->sampler = client->sampler;
        stream->enough = client->enough;
        stream->term = ++world->n_terms;
        gw_core_init(&stream->core, &prompt, client->sampler.tokens_max, T_VOCAB, false);
        client->stream = stream;
        client->state = W_WAITS;
        gw_place_begin(&world->gateways[g].place, world->now_ms, &stream->spot, number);
        return stream;
    }
    return NULL;
}

static w_stream *stream_find(w_world *world, uint32_t g, const w_link *link, uint64_t number)
{
    for (uint32_t i = 0; i < W_STREAMS; i++) {
        w_stream *stream = &world->streams[i];
        if (stream->used && stream->gateway == g && stream->link == link && stream->number == number) {
            return stream;
        }
    }
    return NULL;
}

/* Nothing reaches a client but its own tokens, each once and in order. */
static void client_hears(w_client *client, const gw_core_news *news)
{
    for (uint32_t i = 0; i < news->n_id; i++) {
        uint64_t at = news->offset + i;
        assert_in_range(at, 0, client->answer.n - 1);
        assert_int_equal(news->id[i], client->answer.tokens[at]);
        assert_in_range(at, 0, client->n_told); /* no gap; told before: another gateway tells it again */
        client->n_told = at == client->n_told ? client->n_told + 1 : client->n_told;
    }
}

static void stream_ends(w_world *world, w_stream *stream, const w_message *m)
{
    if (m->end != RT_END_FAILED) {
        if (stream->client != NULL) {
            assert_int_equal(m->end, stream->client->answer.end);
            assert_int_equal(stream->client->n_told, stream->client->answer.n);
            assert_int_equal(m->stop_id, stream->client->answer.stop_id);
            world->n_finished++;
        }
        stream_end(world, stream);
        return;
    }
    gw_place *place = &world->gateways[stream->gateway].place;
    if (gw_place_refused(place, world->now_ms, &stream->spot, m->status)) {
        stream->link = NULL;
        gw_core_reopen(&stream->core);
        return;
    }
    if (m->status == CM_E_CANCELLED) {
        assert_null(stream->client); /* it was resumed elsewhere: by its client */
        world->n_taken_over++;
    } else {
        assert_true(m->status == CM_E_CAPACITY || m->status == CM_E_UNAVAILABLE);
        assert_false(stream->spot.accepted); /* only a new one may be refused */
        world->n_refused++;
    }
    stream_end(world, stream);
}

/* Its client has all it wants, which routers do not know. */
static void stream_finish(w_world *world, w_stream *stream)
{
    world->n_finished += stream->client != NULL;
    client_done(stream);
    stream_leave(world, stream, W_FINISH);
    stream_free(stream);
}

static void gateway_hears(w_world *world, uint32_t g, const w_link *link, w_message *m)
{
    gw_core_news news;
    cm_error err = {0};
    w_stream *stream = stream_find(world, g, link, m->stream);
    if (stream == NULL) {
        return;
    }
    Baleen__Engine__V1__SeqTokens frame = BALEEN__ENGINE__V1__SEQ_TOKENS__INIT;
    frame.stream = m->stream;
    frame.has_offset = true;
    frame.offset = m->from;
    frame.id = m->ids;
    frame.n_id = m->n_id;
    frame.end = (Baleen__Engine__V1__SeqEnd)m->end;
    if (gw_core_take(&stream->core, &frame, &news, &err) != CM_OK) {
        fail_msg("%s: %s", err.field, err.text);
    }
    if (m->end != RT_END_FAILED) {
        gw_place_word(&world->gateways[g].place, world->now_ms, &stream->spot, news.n_id > 0);
    }
    if (stream->client != NULL) {
        client_hears(stream->client, &news);
    }
    if (stream->enough > 0 && stream->core.emitted.n >= stream->enough) {
        stream_finish(world, stream);
        return;
    }
    if (m->end != RT_GOING_ON) {
        stream_ends(world, stream, m);
    }
}

/* ---- gateways ---- */

static void gateway_start(w_world *world, w_gateway *gateway)
{
    gw_place_limits limits = {.reopen_ms = W_REOPEN_MS,
                              .rebind_ms = 30,
                              .leave_ms = 500,
                              .opens_max = W_REOPENS_MAX,
                              .seed = world->rng.key};
    *gateway = (w_gateway){.last_number = gateway->last_number};
    gw_place_init(&gateway->place, &limits);
}

static void gateway_notices(w_world *world, uint32_t g, uint32_t r, w_link *link)
{
    link->gateway_up = false;
    link_break(link);
    gw_place_down(&world->gateways[g].place, world->now_ms, world->gateways[g].known[r]);
    for (uint32_t i = 0; i < W_STREAMS; i++) {
        if (world->streams[i].used && world->streams[i].link == link) {
            world->streams[i].link = NULL;
        }
    }
}

static void gateway_connect(w_world *world, uint32_t g, uint32_t r)
{
    w_gateway *gateway = &world->gateways[g];
    w_router *router = &world->routers[r];
    if (link_up(world, g, r) != NULL) {
        return;
    }
    if (gateway->known[r] != 0 && gateway->known[r] != router->number) { /* an epoch says so */
        gw_place_gone(&gateway->place, world->now_ms, gateway->known[r]);
        gateway->known[r] = 0;
    }
    gateway->known[r] = router->number;
    for (uint32_t i = 0; i < W_LINKS && router->alive && !world->apart[g][r]; i++) {
        w_link *link = &world->links[g][r][i];
        if (!link->router_up && !link->gateway_up) {
            *link = (w_link){.gateway_up = true, .router_up = true};
            STAILQ_INIT(&link->to_router);
            STAILQ_INIT(&link->to_gateway);
            rt_keep_owner_init(router->keep, &link->owner);
            gw_place_up(&gateway->place, router->number);
            return;
        }
    }
    gw_place_unreachable(&gateway->place, router->number);
}

static uint32_t router_of(const w_world *world, uint64_t number)
{
    for (uint32_t r = 0; r < W_ROUTERS; r++) {
        if (world->routers[r].number == number) {
            return r;
        }
    }
    return W_ROUTERS;
}

static void stream_ask(w_world *world, w_stream *stream, uint64_t router, bool resume)
{
    w_gateway *gateway = &world->gateways[stream->gateway];
    uint32_t r = router_of(world, router);
    w_message message = {.kind = resume ? W_RESUME : W_OPEN, .key = stream->key};
    const gw_core *core = &stream->core;
    if (stream->link != NULL) { /* a router that left */
        w_message cancel = {.kind = W_CANCEL, .stream = stream->number};
        say(stream->link, &stream->link->to_router, &cancel);
    }
    stream->link = r < W_ROUTERS ? link_up(world, stream->gateway, r) : NULL;
    stream->number = ++gateway->last_number;
    if (stream->link == NULL) {
        return; /* that life is over: its end is about to be noticed */
    }
    message.stream = stream->number;
    message.from = core->emitted.n;
    message.n_prompt = (uint32_t)core->prompt.n;
    message.n_id = (uint32_t)(core->prompt.n + core->emitted.n);
    memcpy(message.ids, core->prompt.id, core->prompt.n * sizeof(uint32_t));
    if (core->emitted.n > 0) {
        memcpy(message.ids + core->prompt.n, core->emitted.id, core->emitted.n * sizeof(uint32_t));
    }
    message.sampler = stream->sampler;
    message.term = stream->term;
    say(stream->link, &stream->link->to_router, &message);
    world->n_reopened += !resume && stream->spot.accepted;
    world->n_resumed += resume;
}

/* Few unanswered reopens at a router, however many streams look for one. */
static void check_pace(const w_world *world, uint32_t g)
{
    for (uint32_t r = 0; r < W_ROUTERS; r++) {
        const w_link *links = world->links[g][r];
        uint32_t n = 0;
        for (uint32_t i = 0; i < W_STREAMS; i++) {
            const w_stream *stream = &world->streams[i];
            n += stream->used && stream->gateway == g && stream->spot.state == GW_SPOT_ASKED &&
                 stream->spot.accepted && stream->link >= links && stream->link < links + W_LINKS;
        }
        assert_in_range(n, 0, W_REOPENS_MAX);
    }
}

static void gateway_place(w_world *world, uint32_t g)
{
    w_gateway *gateway = &world->gateways[g];
    gw_place_action action;
    while (gw_place_next(&gateway->place, world->now_ms, &action)) {
        w_stream *stream = (w_stream *)((char *)action.spot - offsetof(w_stream, spot));
        switch (action.act) {
        case GW_PLACE_OPEN:
        case GW_PLACE_RESUME:
            stream_ask(world, stream, action.router, action.act == GW_PLACE_RESUME);
            break;
        case GW_PLACE_FORGET:
            forget_copy(world, stream, action.router);
            break;
        case GW_PLACE_GIVE_UP: /* only a new one, when all are full */
            assert_int_equal(action.status, CM_E_CAPACITY);
            assert_false(stream->spot.accepted);
            world->n_refused++;
            stream_end(world, stream);
            break;
        case GW_PLACE_CONDEMN:
            fail_msg("none of these ends its routers");
            break;
        }
    }
    check_pace(world, g);
    uint64_t due_ms = gw_place_due(&gateway->place, world->now_ms);
    assert_true(due_ms > world->now_ms); /* it would be asked for ever */
}

/* ---- the whole ---- */

void w_init(w_world *world, uint64_t seed)
{
    *world = (w_world){.rng = {seed, 0}, .now_ms = 1000};
    t_rng *rng = &world->rng;
    world->limits = t_limits();
    world->limits.slot_max = t_between(rng, 1, 6);
    world->limits.queue_max = t_between(rng, 1, 12);
    world->limits.draft_max = t_below(rng, RT_DRAFT_MAX + 1);
    world->limits.draft_always = true;
    world->right_percent = t_between(rng, 0, 100);
    world->keep_limits = (rt_keep_limits){.live_max = world->limits.slot_max + world->limits.queue_max,
                                          .ended_max = t_between(rng, 0, 20),
                                          .bytes_max = t_between(rng, 0, 20000),
                                          .grace_ms = W_GRACE_MS};
    for (uint32_t r = 0; r < W_ROUTERS; r++) {
        router_start(world, &world->routers[r]);
    }
    for (uint32_t g = 0; g < W_GATEWAYS; g++) {
        gateway_start(world, &world->gateways[g]);
    }
}

void w_fini(w_world *world)
{
    for (uint32_t r = 0; r < W_ROUTERS; r++) {
        router_stop(world, r);
    }
    for (uint32_t g = 0; g < W_GATEWAYS; g++) {
        for (uint32_t r = 0; r < W_ROUTERS; r++) {
            w_link *link = link_up(world, g, r);
            if (link != NULL) {
                gateway_notices(world, g, r, link);
            }
        }
        gw_place_fini(&world->gateways[g].place);
    }
}

static void link_turn(w_world *world, uint32_t g, uint32_t r, w_link *link)
{
    w_router *router = &world->routers[r];
    w_message *m;
    while (t_below(&world->rng, 4) > 0 && (m = STAILQ_FIRST(&link->to_router)) != NULL) {
        STAILQ_REMOVE_HEAD(&link->to_router, next);
        router_hears(world, router, link, m);
        cm_free(m);
    }
    if (link->router_up) {
        router_tells(world, router, link);
    }
    while (t_below(&world->rng, 4) > 0 && (m = STAILQ_FIRST(&link->to_gateway)) != NULL) {
        STAILQ_REMOVE_HEAD(&link->to_gateway, next);
        gateway_hears(world, g, link, m);
        cm_free(m);
    }
    if (link->broken && link->gateway_up && t_below(&world->rng, 8) == 0) {
        gateway_notices(world, g, r, link);
    }
    if (link->broken && link->router_up && t_below(&world->rng, 8) == 0) {
        router_notices(world, router, link);
    }
}

void w_turn(w_world *world)
{
    world->now_ms += t_below(&world->rng, 12);
    for (uint32_t r = 0; r < W_ROUTERS; r++) {
        if (world->routers[r].alive) {
            router_step(world, &world->routers[r]);
        }
    }
    for (uint32_t g = 0; g < W_GATEWAYS; g++) {
        for (uint32_t r = 0; r < W_ROUTERS; r++) {
            for (uint32_t i = 0; i < W_LINKS; i++) {
                w_link *link = &world->links[g][r][i];
                if (link->gateway_up || link->router_up) {
                    link_turn(world, g, r, link);
                }
            }
            if (t_below(&world->rng, 10) == 0) {
                gateway_connect(world, g, r);
            }
        }
        gateway_place(world, g);
    }
}

/* ---- clients ---- */

static w_client *client_pick(w_world *world, int state)
{
    uint32_t first = t_below(&world->rng, W_CLIENTS);
    for (uint32_t i = 0; i < W_CLIENTS; i++) {
        w_client *client = &world->clients[(first + i) % W_CLIENTS];
        if ((int)client->state == state) {
            return client;
        }
    }
    return NULL;
}

static rt_keep_key make_key(w_world *world, uint64_t id)
{
    rt_keep_key key = {.birth = ++world->n_ids};
    memcpy(key.id, &id, sizeof(id));
    return key;
}

static void client_asks(w_world *world, w_client *client)
{
    rt_keep_key key = make_key(world, client->id);
    (void)stream_begin(world, t_below(&world->rng, W_GATEWAYS), client, &key, 0);
}

void w_client_comes(w_world *world)
{
    t_rng *rng = &world->rng;
    w_client *client = client_pick(world, W_IDLE);
    if (client == NULL) {
        return;
    }
    *client = (w_client){.id = ++world->n_ids, .n_prompt = t_between(rng, 1, 20)};
    for (uint32_t i = 0; i < client->n_prompt; i++) {
        client->prompt[i] = t_below(rng, T_VOCAB);
    }
    client->sampler = (rt_sampler){.seed = t_below(rng, 1000),
                                   .top_p = 1,
                                   .tokens_max = t_between(rng, 1, 40),
                                   .n_stop = t_below(rng, 2),
                                   .stop = {t_below(rng, T_VOCAB)}};
    t_alone(client->prompt, client->n_prompt, &client->sampler, &client->answer);
    if (t_below(rng, 4) == 0 && client->answer.n > 0) {
        client->enough = t_between(rng, 1, client->answer.n);
    }
    client_asks(world, client);
}

void w_client_cancels(w_world *world)
{
    w_client *client = &world->clients[t_below(&world->rng, W_CLIENTS)];
    if (client->state == W_WAITS) {
        world->n_cancels++;
        world->n_cancels_in[client->stream->spot.state]++;
        stream_end(world, client->stream);
    } else if (client->state == W_AWAY) {
        world->n_cancels++;
        world->n_cancels_away++; /* it never comes back */
        client->state = W_IDLE;
    }
}

void w_client_leaves(w_world *world)
{
    w_client *client = client_pick(world, W_WAITS);
    if (client != NULL) {
        w_stream *stream = client->stream;
        client->state = W_AWAY;
        stream_leave(world, stream, W_DETACH);
        stream_free(stream);
    }
}

/* Which router has it? All that are linked are asked; of a life that is over nobody knows yet. */
static uint64_t client_finds(w_world *world, uint32_t g, const w_client *client, rt_keep_key *key_out)
{
    rt_keep_key wanted = {0};
    memcpy(wanted.id, &client->id, sizeof(client->id));
    for (uint32_t r = 0; r < W_ROUTERS; r++) {
        const w_link *link = link_up(world, g, r);
        const rt_kept *kept[4];
        if (link != NULL && !link->broken && rt_keep_find(world->routers[r].keep, wanted.id, kept, 4) > 0) {
            *key_out = kept[0]->key;
            return world->routers[r].number;
        }
    }
    return 0;
}

void w_client_returns(w_world *world)
{
    bool away = t_below(&world->rng, 4) > 0;
    w_client *client = client_pick(world, away ? W_AWAY : W_WAITS);
    uint32_t g = t_below(&world->rng, W_GATEWAYS);
    rt_keep_key key;
    if (client == NULL) {
        return;
    }
    uint64_t number = client_finds(world, g, client, &key);
    if (number != 0) {
        world->n_found++;
        if (client->stream != NULL) {
            client->stream->client = NULL; /* its gateway does not know yet */
        }
        client->stream = NULL;
        (void)stream_begin(world, g, client, &key, number);
    } else if (away) {
        world->n_not_found++; /* asks again from the start */
        client->n_told = 0;
        client_asks(world, client);
    }
}

/* ---- faults ---- */

void w_cut(w_world *world)
{
    uint32_t g = t_below(&world->rng, W_GATEWAYS), r = t_below(&world->rng, W_ROUTERS);
    w_link *link = link_up(world, g, r);
    world->apart[g][r] = t_below(&world->rng, 2) == 0;
    if (link != NULL) {
        link_break(link);
    }
}

void w_router_dies(w_world *world)
{
    uint32_t r = t_below(&world->rng, W_ROUTERS);
    if (world->routers[r].alive) {
        router_stop(world, r);
    }
}

void w_router_starts(w_world *world)
{
    uint32_t r = t_below(&world->rng, W_ROUTERS);
    if (!world->routers[r].alive) {
        router_start(world, &world->routers[r]);
    }
}

void w_router_leaves(w_world *world)
{
    uint32_t r = t_below(&world->rng, W_ROUTERS);
    gw_place_standing standing = (gw_place_standing)t_below(&world->rng, 3);
    for (uint32_t g = 0; g < W_GATEWAYS; g++) {
        uint64_t known = world->gateways[g].known[r];
        if (known != 0 && known == world->routers[r].number) {
            gw_place_stands(&world->gateways[g].place, world->now_ms, known, standing);
        }
    }
}

void w_gateway_dies(w_world *world)
{
    uint32_t g = t_below(&world->rng, W_GATEWAYS);
    for (uint32_t i = 0; i < W_STREAMS; i++) {
        w_stream *stream = &world->streams[i];
        if (stream->used && stream->gateway == g) {
            if (stream->client != NULL) {
                stream->client->state = W_AWAY;
            }
            stream->link = NULL; /* nobody is told */
            stream_leave(world, stream, W_CANCEL);
            stream_free(stream);
        }
    }
    for (uint32_t r = 0; r < W_ROUTERS; r++) {
        w_link *link = link_up(world, g, r);
        if (link != NULL) {
            link->gateway_up = false;
            link_break(link);
        }
    }
    for (uint32_t r = 0; r < W_ROUTERS; r++) {
        if (world->gateways[g].known[r] != 0) {
            gw_place_gone(&world->gateways[g].place, world->now_ms, world->gateways[g].known[r]);
        }
    }
    gw_place_fini(&world->gateways[g].place);
    gateway_start(world, &world->gateways[g]);
}

void w_heal(w_world *world)
{
    memset(world->apart, 0, sizeof(world->apart));
    for (uint32_t r = 0; r < W_ROUTERS; r++) {
        if (!world->routers[r].alive) {
            router_start(world, &world->routers[r]);
        }
        for (uint32_t g = 0; g < W_GATEWAYS; g++) {
            if (world->gateways[g].known[r] == world->routers[r].number) {
                gw_place_stands(&world->gateways[g].place, world->now_ms, world->routers[r].number,
                                GW_PLACE_MEMBER);
            }
        }
    }
}

bool w_at_rest(const w_world *world)
{
    for (uint32_t i = 0; i < W_CLIENTS; i++) {
        if (world->clients[i].state != W_IDLE) {
            return false;
        }
    }
    for (uint32_t i = 0; i < W_STREAMS; i++) {
        if (world->streams[i].used) {
            return false;
        }
    }
    return true;
}

void w_check_zero(w_world *world)
{
    rt_keep_ledger kept;
    for (uint32_t i = 0; i < 200; i++) { /* cancels reach routers, ends of links are noticed */
        w_turn(world);
    }
    world->now_ms += W_GRACE_MS;
    for (uint32_t i = 0; i < 50; i++) {
        w_turn(world);
    }
    for (uint32_t r = 0; r < W_ROUTERS; r++) {
        rt_keep_ledger_get(world->routers[r].keep, &kept);
        assert_int_equal(kept.n_live, 0);
        assert_int_equal(kept.n_orphan, 0);
        assert_int_equal(kept.n_ended, 0);
        assert_int_equal(kept.n_bytes, 0);
        assert_false(world->routers[r].in_flight);
        t_ledger_is_zero(world->routers[r].engine.sched);
    }
    for (uint32_t g = 0; g < W_GATEWAYS; g++) {
        assert_true(TAILQ_EMPTY(&world->gateways[g].place.waiting));
        assert_int_equal(world->gateways[g].place.n_copied, 0);
    }
}
