#include "coordinator/admin.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/map.h"
#include "common/base/mem.h"
#include "coordinator/answers.h"
#include "coordinator/launcher.h"
#include "proto/pack.h"

enum { ADMIN_ARENA_CHUNK_BYTES = 4 << 10, ADMIN_ARENA_BYTES_MAX = 1 << 20 };

/* A wish that the machine has not answered yet. */
typedef struct admin_ask {
    uint64_t ticket;
    pc_call *call;
} admin_ask;

struct co_admin {
    co_admin_options options;
    cm_pool asks;
    cm_map by_ticket; /* -> admin_ask */
    uint64_t next_ticket;
    co_launcher *launcher;
    cm_arena arena; /* one request, unpacked */
    cm_bytes packed;
};

static void admin_wish(co_admin *admin, pc_call *call, co_in *in)
{
    admin_ask *ask;
    if (cm_pool_get(&admin->asks, (void **)&ask) != CM_OK) {
        pc_call_finish(call, PC_CODE_RESOURCE_EXHAUSTED, "too many wishes are open", NULL, 0, 0);
        return;
    }
    *ask = (admin_ask){.ticket = ++admin->next_ticket, .call = call};
    pc_call_set_user(call, ask);
    cm_status status = cm_map_put(&admin->by_ticket, ask->ticket, ask);
    CM_ASSERT(status == CM_OK); /* as large as the pool */
    in->ticket = ask->ticket;
    admin->options.wish(admin->options.ctx, in);
}

static void admin_done(co_admin *admin, pc_call *call, cm_status status, const char *text)
{
    if (status == CM_OK) {
        Baleen__Control__V1__Done done = BALEEN__CONTROL__V1__DONE__INIT;
        done.text = (char *)(uintptr_t)text; /* packing only reads */
        cm_bytes_clear(&admin->packed);
        pr_pack(&done.base, &admin->packed);
        status = pc_call_send(call, admin->packed.data, admin->packed.len);
    }
    pc_call_finish(call, pc_code_of(status), text, NULL, 0, 0);
}

static void admin_status(co_admin *admin, pc_call *call, const ProtobufCMessage *message)
{
    const Baleen__Control__V1__StatusRequest *request = (const Baleen__Control__V1__StatusRequest *)message;
    const co_core *core = *admin->options.core;
    cm_bytes_clear(&admin->packed);
    if (core != NULL) {
        co_answer_status(core, admin->options.self, cm_now_ms(), request->has_experts && request->experts,
                         &admin->packed);
    } else {
        co_answer_status_standby(admin->options.self, admin->options.active, admin->options.why,
                                 &admin->packed);
    }
    cm_status status = pc_call_send(call, admin->packed.data, admin->packed.len);
    pc_call_finish(call, pc_code_of(status), "", NULL, 0, 0);
}

static void admin_drain(co_admin *admin, pc_call *call, const ProtobufCMessage *message)
{
    const Baleen__Control__V1__DrainRequest *request = (const Baleen__Control__V1__DrainRequest *)message;
    admin_wish(admin, call, &(co_in){.kind = CO_IN_DRAIN, .member_id = request->member_id});
}

static void admin_rebalance(co_admin *admin, pc_call *call, const ProtobufCMessage *message)
{
    const Baleen__Control__V1__RebalanceRequest *request =
        (const Baleen__Control__V1__RebalanceRequest *)message;
    admin_wish(admin, call, &(co_in){.kind = CO_IN_REBALANCE, .n_moves = request->moves_max});
}

static void admin_scale(co_admin *admin, pc_call *call, const ProtobufCMessage *message)
{
    const Baleen__Control__V1__ScaleRequest *request = (const Baleen__Control__V1__ScaleRequest *)message;
    cm_error err = {0};
    cm_status status = CM_OK;
    if (request->n_workers == 0 || request->n_workers > PR_RANK_MAX) {
        status = cm_error_set(&err, CM_E_INVALID, "workers", "%u workers: give 1 to %d", request->n_workers,
                              PR_RANK_MAX);
    }
    if (status == CM_OK) {
        status = co_launcher_scale(admin->launcher, *admin->options.core, request->n_workers, &err);
    }
    admin_done(admin, call, status, err.text);
}

static void admin_launch(co_admin *admin, pc_call *call, const ProtobufCMessage *message)
{
    co_launcher_take(admin->launcher, call, (const Baleen__Control__V1__LauncherState *)message);
}

static const struct {
    const char *name;
    const ProtobufCMessageDescriptor *request;
    void (*take)(co_admin *admin, pc_call *call, const ProtobufCMessage *message);
} g_methods[] = {
    {"Status", &baleen__control__v1__status_request__descriptor, admin_status},
    {"Drain", &baleen__control__v1__drain_request__descriptor, admin_drain},
    {"Scale", &baleen__control__v1__scale_request__descriptor, admin_scale},
    {"Launch", &baleen__control__v1__launcher_state__descriptor, admin_launch},
    {"Rebalance", &baleen__control__v1__rebalance_request__descriptor, admin_rebalance},
};

void co_admin_message(co_admin *admin, pc_call *call, const uint8_t *data, size_t n_bytes)
{
    const char *name = pc_call_method(call)->path + strlen(CO_ADMIN_PATH);
    size_t i = 0;
    while (strcmp(g_methods[i].name, name) != 0) { /* the server knows no others */
        i++;
    }
    ProtobufCMessage *message = NULL;
    cm_arena_reset(&admin->arena);
    if (pr_unpack(g_methods[i].request, data, n_bytes, &admin->arena, &message) != CM_OK) {
        pc_call_finish(call, PC_CODE_INVALID_ARGUMENT, "not a request of this method", NULL, 0, 0);
        return;
    }
    if (*admin->options.core == NULL && g_methods[i].take != admin_status) {
        pc_call_finish(call, PC_CODE_UNAVAILABLE, admin->options.why, NULL, 0, 0);
        return;
    }
    g_methods[i].take(admin, call, message);
}

void co_admin_closed(co_admin *admin, pc_call *call)
{
    admin_ask *ask = pc_call_user(call);
    co_launcher_closed(admin->launcher, call);
    if (ask != NULL) {
        cm_map_remove(&admin->by_ticket, ask->ticket);
        cm_pool_put(&admin->asks, ask);
    }
}

void co_admin_answer(co_admin *admin, const co_out *out)
{
    admin_ask *ask = cm_map_get(&admin->by_ticket, out->ticket);
    if (ask == NULL) {
        return; /* whoever asked does not wait any more */
    }
    admin_done(admin, ask->call, out->status, out->text);
}

void co_admin_stop(co_admin *admin)
{
    uint32_t at = 0;
    uint64_t ticket;
    void *ask;
    while (cm_map_next(&admin->by_ticket, &at, &ticket, &ask)) {
        pc_call_finish(((admin_ask *)ask)->call, PC_CODE_UNAVAILABLE,
                       "this coordinator is not the active one any more", NULL, 0, 0);
    }
    co_launcher_stop(admin->launcher);
}

co_admin *co_admin_create(const co_admin_options *options)
{
    co_admin *admin = cm_alloc(sizeof(*admin));
    admin->options = *options;
    admin->launcher = co_launcher_create();
    cm_pool_init(&admin->asks, "wishes", sizeof(admin_ask), options->calls_max);
    cm_map_init(&admin->by_ticket, options->calls_max);
    cm_arena_init(&admin->arena, "admin request", ADMIN_ARENA_CHUNK_BYTES, ADMIN_ARENA_BYTES_MAX);
    cm_bytes_init(&admin->packed, 0);
    return admin;
}

void co_admin_destroy(co_admin *admin)
{
    if (admin == NULL) {
        return;
    }
    co_launcher_destroy(admin->launcher);
    cm_map_fini(&admin->by_ticket);
    cm_pool_fini(&admin->asks);
    cm_arena_fini(&admin->arena);
    cm_bytes_fini(&admin->packed);
    cm_free(admin);
}
