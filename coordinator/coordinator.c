#include "coordinator/coordinator.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/map.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/base/stats.h"
#include "common/proc/addresses.h"
#include "common/proc/rpc_server.h"
#include "coordinator/admin.h"
#include "coordinator/answers.h"
#include "coordinator/co_core.h"
#include "coordinator/store.h"
#include "proto/messages.h"
#include "proto/pack.h"

enum {
    CO_REQUEST_BYTES_MAX = 1 << 20, /* the load of 61 x 384 experts has 115 KB at most */
    CO_QUEUE_BYTES_MAX = 32 << 20,  /* unsent; an epoch of the largest model has less than 1 MB */
    CO_ARENA_CHUNK_BYTES = 16 << 10,
    CO_ARENA_BYTES_MAX = 4 << 20,
    CO_STOP_MS = 1000,
    CO_RECALL_MS =
        3000, /* a member notices a silent coordinator in 3 s, an address that does not answer in 2 */
};

typedef struct co_session {
    uint64_t id;
    pc_call *call;
    bool finished; /* by us: what still arrives is not heard */
} co_session;

typedef struct co_pending {
    co_in in;
    char text[416];
} co_pending;

struct co_coordinator {
    pc_loop *loop;
    co_store *store;
    co_core *core; /* NULL while we are not the active one */
    co_core_options core_options;
    char *fingerprint; /* core_options points to it */
    co_role_now role;
    char active_address[PC_ADDRESS_BYTES], why[480]; /* not active: who is, "" = not known; what to say */
    co_coordinator_events events;
    void *events_ctx;
    co_admin *admin;
    pc_tls *tls; /* NULL: plain */
    pc_rpc_server *server;
    pc_timer *tick, *stats_timer, *stop_timer;
    char bound[128], host[256];
    co_peer self; /* own row in the status */
    uint64_t heartbeat_ms, lease_ms;
    uint8_t secret[CO_SECRET_BYTES]; /* of the epochs' keys, as the log has it; while we are active */

    cm_pool sessions;
    cm_map by_id; /* session id -> co_session */
    uint64_t next_session;
    cm_arena arena;  /* one word, unpacked */
    cm_bytes packed; /* one word, to send */

    /* What happens while the outbox is being delivered (a closed call, a refused write) waits for its end. */
    co_pending *pending;
    uint32_t n_pending, pending_cap;
    bool busy, stopping;
    uint32_t n_stopping; /* parts that have not ended yet */
    uint64_t n_lost;     /* of the core, already counted */
    pc_fn done;
    void *done_arg;
};

/* ---- what the machine asks for ---- */

static void session_finish(co_session *session, cm_status status, const char *text)
{
    if (!session->finished) {
        session->finished = true;
        pc_call_finish(session->call, status == CM_OK ? PC_CODE_OK : pc_code_of(status), text, NULL, 0, 0);
    }
}

static void coordinator_expect(co_coordinator *c, const co_in *in)
{
    if (c->n_pending == c->pending_cap) {
        c->pending_cap = c->pending_cap != 0 ? c->pending_cap * 2 : 16;
        c->pending = cm_realloc(c->pending, sizeof(co_pending) * c->pending_cap);
    }
    co_pending *pending = &c->pending[c->n_pending++];
    pending->in = *in;
    snprintf(pending->text, sizeof(pending->text), "%s", in->text != NULL ? in->text : "");
}

/* The key that goes out with a word: of the epoch it commits, or with a welcome of the epoch in force to
 * those who are in it. false: none. */
static bool deliver_key(const co_coordinator *c, const co_out *out, co_frame_key *key_out)
{
    const co_epoch *epoch = out->kind == CO_OUT_COMMIT    ? out->epoch
                            : out->kind == CO_OUT_WELCOME ? co_core_epoch(c->core)
                                                          : NULL;
    if (epoch == NULL || (out->kind == CO_OUT_WELCOME && co_epoch_find(epoch, out->member_id) == NULL)) {
        return false;
    }
    co_frame_key_derive(c->secret, co_core_cluster(c->core), epoch->number, key_out);
    return true;
}

static void deliver_word(co_coordinator *c, const co_out *out)
{
    co_frame_key key;
    co_session *session = cm_map_get(&c->by_id, out->session);
    if (session == NULL || session->finished) {
        return; /* the core will hear that it is closed */
    }
    cm_bytes_clear(&c->packed);
    bool keyed = deliver_key(c, out, &key);
    if (co_answer_word(out, co_core_cluster(c->core), (uint32_t)c->heartbeat_ms, (uint32_t)c->lease_ms,
                       keyed ? &key : NULL, &c->packed)) {
        cm_status status = pc_call_send(session->call, c->packed.data, c->packed.len);
        if (status != CM_OK) { /* it does not read: no member to rely on */
            cm_warn("session %llu of %s does not take its messages", (unsigned long long)session->id,
                    pc_call_peer(session->call));
            session_finish(session, CM_E_CAPACITY, "too many unread messages");
            return;
        }
    }
    if (out->kind == CO_OUT_CLOSE) {
        session_finish(session, out->status, out->text);
    } else if (out->kind == CO_OUT_REFUSED) {
        session_finish(session, CM_OK, ""); /* the word has said all */
    }
}

static void deliver_store(co_coordinator *c, const co_out *out)
{
    cm_status status =
        co_store_write(c->store, out->ticket, out->member_id, out->number, out->drains, out->epoch);
    if (status != CM_OK) {
        coordinator_expect(c, &(co_in){.kind = CO_IN_STORED,
                                       .ticket = out->ticket,
                                       .status = status,
                                       .text = "too many writes wait for the coordinator's store"});
    }
}

static void coordinator_deliver(co_coordinator *c)
{
    uint32_t n;
    const co_out *outs = co_core_outbox(c->core, &n);
    for (uint32_t i = 0; i < n; i++) {
        if (outs[i].kind == CO_OUT_NOTE) {
            cm_log_line(outs[i].level, "%s", outs[i].text);
        } else if (outs[i].kind == CO_OUT_STORE) {
            deliver_store(c, &outs[i]);
        } else if (outs[i].kind == CO_OUT_ANSWER) {
            co_admin_answer(c->admin, &outs[i]);
        } else {
            deliver_word(c, &outs[i]);
        }
    }
}

static void coordinator_settle(co_coordinator *c)
{
    const co_epoch *epoch = co_core_epoch(c->core);
    uint64_t number = epoch != NULL ? epoch->number : 0, n_lost = co_core_n_lost(c->core);
    if (cm_stat_get(CM_STAT_epoch) != (int64_t)number) {
        cm_stat_set(CM_STAT_epoch, (int64_t)number);
        cm_log_epoch(number);
    }
    cm_stat_set(CM_STAT_members, co_core_n_members(c->core));
    cm_stat_add(CM_STAT_members_lost, (int64_t)(n_lost - c->n_lost));
    c->n_lost = n_lost;

    uint64_t now_ms = cm_now_ms(), wake_ms = co_core_wake_ms(c->core);
    uint64_t after_ms = wake_ms > now_ms ? wake_ms - now_ms : 1;
    pc_timer_set(c->tick, after_ms < c->heartbeat_ms ? after_ms : c->heartbeat_ms);
}

/* in NULL: only time passes. */
static void coordinator_step(co_coordinator *c, const co_in *in)
{
    if (c->stopping || c->core == NULL || !co_store_is_active(c->store)) {
        return; /* nobody's business, or soon a newer coordinator's: the store will say so */
    }
    if (c->busy) {
        CM_ASSERT(in != NULL && in->kind != CO_IN_WORD); /* words come as events of their own */
        coordinator_expect(c, in);
        return;
    }
    c->busy = true;
    co_core_step(c->core, cm_now_ms(), in, in != NULL ? 1 : 0);
    coordinator_deliver(c);
    while (c->n_pending > 0) {
        co_pending first = c->pending[0];
        first.in.text = first.text;
        memmove(c->pending, c->pending + 1, sizeof(co_pending) * --c->n_pending);
        co_core_step(c->core, cm_now_ms(), &first.in, 1);
        coordinator_deliver(c);
    }
    c->busy = false;
    coordinator_settle(c);
}

static void coordinator_stored(void *ctx, uint64_t ticket, cm_status status, const char *text)
{
    coordinator_step(ctx, &(co_in){.kind = CO_IN_STORED, .ticket = ticket, .status = status, .text = text});
}

static void coordinator_tick(void *arg)
{
    coordinator_step(arg, NULL);
}

/* ---- sessions ---- */

static co_session *session_open(co_coordinator *c, pc_call *call)
{
    void *object;
    if (cm_pool_get(&c->sessions, &object) != CM_OK) {
        return NULL;
    }
    co_session *session = object;
    session->id = ++c->next_session;
    session->call = call;
    cm_status status = cm_map_put(&c->by_id, session->id, session);
    CM_ASSERT(status == CM_OK); /* as many places as the pool */
    pc_call_set_user(call, session);
    return session;
}

/* A member that came to the wrong one hears where to go. */
static void session_send_on(co_coordinator *c, pc_call *call)
{
    cm_bytes_clear(&c->packed);
    co_answer_send_on(c->active_address, c->why, &c->packed);
    cm_status status = pc_call_send(call, c->packed.data, c->packed.len);
    /* Not OK: to one that leaves that would mean it was let go. */
    pc_call_finish(call, status == CM_OK ? PC_CODE_UNAVAILABLE : pc_code_of(status), c->why, NULL, 0, 0);
}

/* A certificate is for one role: a worker's key that got away must not make a router. */
static bool session_role_fits(co_session *session, const Baleen__Control__V1__MemberMessage *word)
{
    const char *shown = pc_call_role(session->call);
    if (shown == NULL || word->word_case != BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HELLO ||
        strcmp(shown, pr_role_name(word->hello->self->role)) == 0) {
        return true;
    }
    char text[256];
    snprintf(text, sizeof(text),
             "it says it is a %s and shows a certificate of role %.60s: give --tls-cert and --tls-key of %s",
             pr_role_name(word->hello->self->role), shown, pr_role_name(word->hello->self->role));
    cm_warn("%s refused: %s", pc_call_peer(session->call), text);
    session->finished = true;
    pc_call_finish(session->call, PC_CODE_PERMISSION_DENIED, text, NULL, 0, 0);
    return false;
}

/* After the machine has heard the wish: it has ended the session of one that is no member. */
static void session_send_load(co_coordinator *c, co_session *session)
{
    cm_bytes_clear(&c->packed);
    if (!session->finished && c->core != NULL && co_answer_cluster_load(c->core, &c->packed) &&
        pc_call_send(session->call, c->packed.data, c->packed.len) != CM_OK) {
        session_finish(session, CM_E_CAPACITY, "too many unread messages");
    }
}

static void session_message(pc_call *call, const uint8_t *data, size_t n_bytes)
{
    co_coordinator *c = pc_call_ctx(call);
    co_session *session = pc_call_user(call);
    if (c->stopping || (session != NULL && session->finished)) {
        return;
    }
    if (c->core == NULL) {
        session_send_on(c, call);
        return;
    }
    if (session == NULL) {
        session = session_open(c, call);
    }
    if (session == NULL) {
        pc_call_finish(call, PC_CODE_RESOURCE_EXHAUSTED, "too many sessions", NULL, 0, 0);
        return;
    }
    Baleen__Control__V1__MemberMessage *word = NULL;
    cm_arena_reset(&c->arena);
    if (pr_unpack(&baleen__control__v1__member_message__descriptor, data, n_bytes, &c->arena,
                  (ProtobufCMessage **)&word) != CM_OK) {
        cm_warn("%s sent %zu bytes that are no member's message", pc_call_peer(call), n_bytes);
        session_finish(session, CM_E_INVALID, "not a MemberMessage");
        return;
    }
    if (!session_role_fits(session, word)) {
        return;
    }
    coordinator_step(c, &(co_in){.kind = CO_IN_WORD, .session = session->id, .word = word});
    if (word->word_case == BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_LOAD_WISH) {
        session_send_load(c, session);
    }
}

static void session_half_closed(pc_call *call)
{
    co_session *session = pc_call_user(call);
    if (session != NULL) {
        session_finish(session, CM_OK, "");
    } else {
        pc_call_finish(call, PC_CODE_INVALID_ARGUMENT, "a session begins with Hello", NULL, 0, 0);
    }
}

static void session_closed(pc_call *call, bool cancelled)
{
    (void)cancelled;
    co_coordinator *c = pc_call_ctx(call);
    co_session *session = pc_call_user(call);
    if (session != NULL) {
        uint64_t id = session->id;
        cm_map_remove(&c->by_id, id);
        cm_pool_put(&c->sessions, session);
        coordinator_step(c, &(co_in){.kind = CO_IN_CLOSED, .session = id});
    }
}

/* ---- counters for gateways, operators ---- */

static void coordinator_send_stats(void *arg)
{
    co_coordinator *c = arg;
    bool packed = false;
    if (c->core == NULL) {
        return; /* set again when we are active */
    }
    cm_bytes_clear(&c->packed);
    for (uint32_t i = 0; i < co_core_n_members(c->core); i++) {
        co_member_view view;
        co_core_member(c->core, i, &view);
        co_session *session = view.session != 0 ? cm_map_get(&c->by_id, view.session) : NULL;
        /* epoch 0: it may not have had its Welcome yet, and has no use for numbers before its first epoch. */
        if (view.self->role != CO_ROLE_GATEWAY || session == NULL || session->finished || view.epoch == 0) {
            continue;
        }
        if (!packed) {
            co_answer_cluster_stats(c->core, &c->packed);
            packed = true;
        }
        if (pc_call_send(session->call, c->packed.data, c->packed.len) != CM_OK) {
            session_finish(session, CM_E_CAPACITY, "too many unread messages");
        }
    }
    pc_timer_set(c->stats_timer, c->heartbeat_ms);
}

static void admin_message(pc_call *call, const uint8_t *data, size_t n_bytes)
{
    co_admin_message(((co_coordinator *)pc_call_ctx(call))->admin, call, data, n_bytes);
}

static void admin_half_closed(pc_call *call)
{
    pc_call_finish(call, PC_CODE_OK, "", NULL, 0, 0);
}

static void admin_closed(pc_call *call, bool cancelled)
{
    (void)cancelled;
    co_admin_closed(((co_coordinator *)pc_call_ctx(call))->admin, call);
}

static void admin_wish(void *ctx, const co_in *wish)
{
    coordinator_step(ctx, wish);
}

static const pc_method coordinator_methods[] = {
    {.path = "/baleen.control.v1.Control/Session",
     .message = session_message,
     .half_closed = session_half_closed,
     .closed = session_closed,
     .client_streams = true},
    {.path = CO_ADMIN_PATH "Status", .message = admin_message, .closed = admin_closed, .role = "admin"},
    {.path = CO_ADMIN_PATH "Drain", .message = admin_message, .closed = admin_closed, .role = "admin"},
    {.path = CO_ADMIN_PATH "Rebalance", .message = admin_message, .closed = admin_closed, .role = "admin"},
    {.path = CO_ADMIN_PATH "Scale", .message = admin_message, .closed = admin_closed, .role = "admin"},
    {.path = CO_ADMIN_PATH "Launch",
     .message = admin_message,
     .half_closed = admin_half_closed,
     .closed = admin_closed,
     .client_streams = true,
     .role = "admin"},
};

/* ---- life ---- */

static void coordinator_set_role(co_coordinator *c, co_role_now role)
{
    bool changed = c->role != role;
    c->role = role;
    if (changed && c->events.role != NULL) {
        c->events.role(c->events_ctx, role);
    }
}

static void coordinator_active(void *ctx, const co_store_past *past)
{
    co_coordinator *c = ctx;
    co_core_past core_past = {.cluster = past->cluster,
                              .next_member_id = past->next_member_id,
                              .next_number = past->next_number,
                              .drains = past->drains,
                              .epoch = past->epoch};
    CM_ASSERT(c->core == NULL);
    c->core = co_core_create(&c->core_options, &core_past, cm_now_ms());
    memcpy(c->secret, past->secret, sizeof(c->secret));
    c->n_lost = 0;
    c->active_address[0] = c->why[0] = 0;
    pc_timer_set(c->stats_timer, c->heartbeat_ms);
    coordinator_settle(c);
    coordinator_set_role(c, CO_ROLE_NOW_ACTIVE);
}

/* What was decided and not yet written is forgotten; whoever is active next goes on from the log. */
static void coordinator_step_down(co_coordinator *c)
{
    uint32_t at = 0;
    uint64_t id;
    void *session;
    CM_ASSERT(!c->busy);
    while (cm_map_next(&c->by_id, &at, &id, &session)) {
        session_finish(session, CM_E_UNAVAILABLE, "not the active coordinator any more");
    }
    co_admin_stop(c->admin);
    pc_timer_clear(c->tick);
    pc_timer_clear(c->stats_timer);
    co_core_destroy(c->core);
    c->core = NULL;
    explicit_bzero(c->secret, sizeof(c->secret));
    cm_stat_set(CM_STAT_members, 0);
    cm_stat_set(CM_STAT_epoch, 0);
    cm_log_epoch(0);
}

static void coordinator_standby(void *ctx, const char *address, const char *text)
{
    co_coordinator *c = ctx;
    snprintf(c->active_address, sizeof(c->active_address), "%s", address);
    snprintf(c->why, sizeof(c->why), "%s", text);
    if (c->stopping) {
        return;
    }
    if (c->core != NULL) {
        cm_warn("%s", text);
        coordinator_step_down(c);
    } else {
        cm_info("%s", text);
    }
    coordinator_set_role(c, CO_ROLE_NOW_STANDBY);
}

static void coordinator_failed(void *ctx, const cm_error *err)
{
    co_coordinator *c = ctx;
    cm_error_log("%s", err->text);
    if (c->events.failed != NULL) {
        c->events.failed(c->events_ctx, err);
    }
}

static cm_status coordinator_open_log(co_coordinator *c, const co_config *config, cm_error *err)
{
    static const co_store_events events = {.active = coordinator_active,
                                           .standby = coordinator_standby,
                                           .written = coordinator_stored,
                                           .failed = coordinator_failed};
    c->fingerprint = cm_strdup(config->fingerprint);
    c->core_options = (co_core_options){.workers_min = (uint32_t)config->workers_min,
                                        .members_max = (uint32_t)config->members_max,
                                        .lease_ms = config->lease_ms,
                                        .grace_ms = config->grace_ms,
                                        .cut_ms = config->cut_ms,
                                        .recall_ms = CO_RECALL_MS,
                                        .rebalance_ms = config->rebalance_ms,
                                        .moves_max = (uint32_t)config->rebalance_moves,
                                        .fingerprint = c->fingerprint};
    co_store_options options = {.url = config->store,
                                .address = c->bound,
                                .lease_ms = config->claim_ms,
                                .n_queued_max = c->core_options.members_max * 2};
    snprintf(c->why, sizeof(c->why), "the store has not said yet who is active");
    return co_store_open(c->loop, &options, &events, c, &c->store, err);
}

static cm_status coordinator_listen(co_coordinator *c, const co_config *config, cm_error *err)
{
    CM_TRY(pc_tls_open(&config->process.tls, config->address, "coordinator", &c->tls, err));
    uint32_t calls_max = (uint32_t)config->members_max * 2 + 16; /* old and new session of each, tools */
    pc_rpc_options options = {.address = config->address,
                              .request_bytes_max = CO_REQUEST_BYTES_MAX,
                              .calls_max = calls_max,
                              .queue_bytes_max = CO_QUEUE_BYTES_MAX,
                              .ctx = c,
                              .tls = c->tls};
    cm_pool_init(&c->sessions, "sessions", sizeof(co_session), calls_max);
    cm_map_init(&c->by_id, calls_max);
    c->admin = co_admin_create(&(co_admin_options){.core = &c->core,
                                                   .self = &c->self,
                                                   .active = c->active_address,
                                                   .why = c->why,
                                                   .calls_max = calls_max,
                                                   .wish = admin_wish,
                                                   .ctx = c});
    cm_status status = pc_rpc_server_create(c->loop, &options, coordinator_methods,
                                            sizeof(coordinator_methods) / sizeof(coordinator_methods[0]),
                                            &c->server, c->bound, err);
    if (status == CM_E_EXISTS) {
        cm_error_set(
            err, CM_E_EXISTS, "address",
            "address %s is taken: another coordinator? stop it, or give this one another address (--address)",
            config->address);
    }
    return status;
}

static void coordinator_name_self(co_coordinator *c)
{
    gethostname(c->host, sizeof(c->host) - 1);
    baleen__control__v1__member__init(&c->self);
    c->self.role = CO_ROLE_COORDINATOR;
    c->self.incarnation = cm_random_u64();
    c->self.has_pid = true;
    c->self.pid = (uint32_t)getpid();
    c->self.host = c->host;
    c->self.grpc_address = c->bound;
}

cm_status co_coordinator_create(pc_loop *loop, const co_config *config, co_coordinator **coordinator_out,
                                cm_error *err)
{
    if (config->lease_ms < 3 * config->heartbeat_ms) {
        return cm_error_set(err, CM_E_CONFIG, "lease_ms",
                            "lease_ms %llu is less than three heartbeats of %llu ms",
                            (unsigned long long)config->lease_ms, (unsigned long long)config->heartbeat_ms);
    }
    co_coordinator *c = cm_alloc(sizeof(*c));
    c->loop = loop;
    c->heartbeat_ms = config->heartbeat_ms;
    c->lease_ms = config->lease_ms;
    cm_arena_init(&c->arena, "coordinator word", CO_ARENA_CHUNK_BYTES, CO_ARENA_BYTES_MAX);
    cm_bytes_init(&c->packed, 0);
    c->tick = pc_timer_create(loop, coordinator_tick, c);
    c->stats_timer = pc_timer_create(loop, coordinator_send_stats, c);
    /* The others are told our address with the claim, so it must be known first. */
    cm_status status = coordinator_listen(c, config, err);
    if (status != CM_OK) {
        goto err_free;
    }
    coordinator_name_self(c);
    status = coordinator_open_log(c, config, err);
    if (status != CM_OK) {
        goto err_close;
    }
    *coordinator_out = c;
    return CM_OK;

err_close:
    pc_rpc_server_destroy(c->server);
    cm_free(c->fingerprint);
err_free:
    co_admin_destroy(c->admin);
    pc_tls_close(c->tls);
    cm_map_fini(&c->by_id);
    cm_pool_fini(&c->sessions);
    pc_timer_destroy(c->tick);
    pc_timer_destroy(c->stats_timer);
    cm_arena_fini(&c->arena);
    cm_bytes_fini(&c->packed);
    cm_free(c);
    return status;
}

const char *co_coordinator_address(const co_coordinator *coordinator)
{
    return coordinator->bound;
}

void co_coordinator_watch(co_coordinator *c, const co_coordinator_events *events, void *ctx)
{
    c->events = *events;
    c->events_ctx = ctx;
    if (c->role != CO_ROLE_NOW_UNKNOWN && events->role != NULL) {
        events->role(ctx, c->role);
    }
}

co_role_now co_coordinator_role(const co_coordinator *coordinator)
{
    return coordinator->role;
}

static void coordinator_stopped(void *arg)
{
    co_coordinator *c = arg;
    pc_fn done = c->done;
    pc_timer_clear(c->stop_timer);
    c->done = NULL; /* the timer comes here, and what it bounds */
    if (done != NULL) {
        done(c->done_arg);
    }
}

static void coordinator_part_stopped(void *arg)
{
    co_coordinator *c = arg;
    if (--c->n_stopping == 0) {
        coordinator_stopped(c);
    }
}

void co_coordinator_stop(co_coordinator *c, pc_fn done, void *arg)
{
    CM_ASSERT(!c->stopping);
    c->stopping = true;
    c->done = done;
    c->done_arg = arg;
    pc_timer_clear(c->tick);
    pc_timer_clear(c->stats_timer);
    c->stop_timer = pc_timer_create(c->loop, coordinator_stopped, c);
    pc_timer_set(c->stop_timer, CO_STOP_MS);
    uint32_t at = 0;
    uint64_t id;
    void *session;
    while (cm_map_next(&c->by_id, &at, &id, &session)) {
        session_finish(session, CM_E_UNAVAILABLE, "the coordinator stops; go on with the epoch in force");
    }
    co_admin_stop(c->admin);
    c->n_stopping = 2;
    co_store_stop(c->store, coordinator_part_stopped, c);
    pc_rpc_server_drain(c->server, coordinator_part_stopped, c);
}

void co_coordinator_destroy(co_coordinator *c)
{
    if (c == NULL) {
        return;
    }
    c->stopping = true; /* what the closing of the sessions brings is no news */
    pc_rpc_server_destroy(c->server);
    pc_tls_close(c->tls);
    co_admin_destroy(c->admin);
    pc_timer_destroy(c->tick);
    pc_timer_destroy(c->stats_timer);
    pc_timer_destroy(c->stop_timer);
    co_store_close(c->store);
    co_core_destroy(c->core);
    cm_map_fini(&c->by_id);
    cm_pool_fini(&c->sessions);
    cm_arena_fini(&c->arena);
    cm_bytes_fini(&c->packed);
    cm_free(c->fingerprint);
    cm_free(c->pending);
    explicit_bzero(c->secret, sizeof(c->secret));
    cm_free(c);
}
