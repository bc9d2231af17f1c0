/* baleen drain, scale, rebalance: what operators ask of a running cluster. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/mem.h"
#include "common/proc/loop.h"
#include "proto/pack.h"
#include "tools/baleen/admin.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/verbs.h"

enum { OPERATE_ARENA_BYTES = 16 << 10, OPERATE_STATUS_BYTES = 64 << 20, OPERATE_POLL_MS = 100 };

typedef struct operate_config {
    admin_target target;
    uint64_t wait_ms, moves;
} operate_config;

static cm_status parse_number(const char *what, const char *text, uint32_t *number_out, cm_error *err)
{
    char *end;
    errno = 0;
    unsigned long number = strtoul(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || errno != 0 || number > UINT32_MAX) {
        return cm_error_set(err, CM_E_CONFIG, NULL, "'%s' is no %s", text, what);
    }
    *number_out = (uint32_t)number;
    return CM_OK;
}

/* A wish that the coordinator answers with Done when it has come true. Prints what it says. */
static cm_status wish(const operate_config *config, const char *method, const ProtobufCMessage *request,
                      cm_error *err)
{
    admin_service service;
    cm_bytes packed;
    cm_arena arena;
    Baleen__Control__V1__Done *done;
    CM_TRY(admin_find(&config->target, &service, err));
    cm_bytes_init(&packed, 0);
    cm_arena_init(&arena, "answer", OPERATE_ARENA_BYTES, OPERATE_ARENA_BYTES);
    cm_status status = admin_ask(&service, method, request, config->wait_ms, &packed, err);
    if (status == CM_OK) {
        bool told = pr_unpack(&baleen__control__v1__done__descriptor, packed.data, packed.len, &arena,
                              (ProtobufCMessage **)&done) == CM_OK;
        printf("%s\n", told && done->text != NULL ? done->text : "done");
    }
    cm_arena_fini(&arena);
    cm_bytes_fini(&packed);
    admin_close(&service);
    return status;
}

/* ---- drain ---- */

static const cm_cfg_field g_drain_fields[] = {
    ADMIN_TARGET_FIELDS(operate_config, target),
    {"wait_ms", "10m", "how long to wait for its end; the drain goes on all the same",
     CM_CFG_MS(operate_config, wait_ms, 1, 86400000)},
};

static const cm_cfg_table g_drain_table = {
    .program = "baleen drain",
    .summary =
        "lets a member (id: see baleen status) finish what it does and leave: a worker when the others have "
        "loaded its experts, a router or gateway when its streams have ended",
    .operands = "ID",
    .fields = g_drain_fields,
    .n_fields = sizeof(g_drain_fields) / sizeof(g_drain_fields[0]),
};

static cm_status drain(const operate_config *config, const char *id, cm_error *err)
{
    Baleen__Control__V1__DrainRequest request = BALEEN__CONTROL__V1__DRAIN_REQUEST__INIT;
    CM_TRY(parse_number("member id", id, &request.member_id, err));
    return wish(config, "Drain", &request.base, err);
}

int verb_drain(int argc, char **argv)
{
    operate_config config = {0};
    cm_error err = {0};
    const char *id;
    size_t n;
    int code = cli_begin(&g_drain_table, &config, argc, argv, &id, 1, &n);
    if (code >= 0) {
        return code;
    }
    if (n == 0) {
        code = cli_complain(&g_drain_table, CLI_USAGE, "which member? baleen status lists their ids");
    } else {
        code = drain(&config, id, &err) == CM_OK ? CLI_OK : cli_fail(&g_drain_table, &err);
    }
    cm_cfg_free(&g_drain_table, &config);
    return code;
}

/* ---- scale ---- */

static const cm_cfg_field g_scale_fields[] = {
    ADMIN_TARGET_FIELDS(operate_config, target),
    {"wait_ms", "10m", "how long to wait until so many serve; the change goes on all the same",
     CM_CFG_MS(operate_config, wait_ms, 1, 86400000)},
};

static const cm_cfg_table g_scale_table = {
    .program = "baleen scale",
    .summary = "has N workers serve: baleen up starts those that are missing, or lets some leave",
    .operands = "N",
    .fields = g_scale_fields,
    .n_fields = sizeof(g_scale_fields) / sizeof(g_scale_fields[0]),
};

/* Workers that are in force; all of them are when the whole cluster is at rest. */
static uint32_t count_serving(const Baleen__Control__V1__StatusReply *reply, bool *at_rest_out)
{
    uint32_t n = 0;
    *at_rest_out = reply->change == NULL;
    for (size_t i = 0; i < reply->n_members; i++) {
        const Baleen__Control__V1__MemberStatus *row = reply->members[i];
        bool serves = row->epoch == reply->epoch && strcmp(row->state, "ready") == 0;
        *at_rest_out &= serves;
        n += serves && row->member->role == BALEEN__CONTROL__V1__ROLE__ROLE_WORKER;
    }
    return n;
}

typedef struct scale_watch {
    pc_loop *loop;
    pc_timer *timer;
    admin_service service;
    uint32_t n_workers;
    uint64_t until_ms, epoch; /* epoch: last one told */
    cm_status status;
    cm_error err;
} scale_watch;

/* false: not yet. */
static bool scale_look(scale_watch *watch)
{
    cm_arena arena;
    Baleen__Control__V1__StatusReply *reply;
    bool done = false;
    cm_arena_init(&arena, "status", OPERATE_ARENA_BYTES, OPERATE_STATUS_BYTES);
    watch->status = admin_status(&watch->service, false, &arena, &reply, &watch->err);
    if (watch->status == CM_OK) { /* else it may be back soon */
        bool at_rest;
        uint32_t n = count_serving(reply, &at_rest);
        done = at_rest && n == watch->n_workers;
        if (reply->epoch != watch->epoch || done) {
            watch->epoch = reply->epoch;
            fprintf(stderr, "epoch %llu: %u of %u workers serve\n", (unsigned long long)reply->epoch, n,
                    watch->n_workers);
        }
        watch->status = CM_E_DEADLINE;
        cm_error_set(&watch->err, CM_E_DEADLINE, NULL, "%u of %u workers serve%s%s; the change goes on", n,
                     watch->n_workers, reply->change != NULL ? "; being changed: " : "",
                     reply->change != NULL ? reply->change : "");
        if (done) {
            watch->status = CM_OK;
            admin_print_table(reply);
        }
    }
    cm_arena_fini(&arena);
    return done;
}

static void scale_tick(void *arg)
{
    scale_watch *watch = arg;
    if (scale_look(watch) || cm_now_ms() >= watch->until_ms) {
        pc_loop_stop(watch->loop);
        return;
    }
    pc_timer_set(watch->timer, OPERATE_POLL_MS);
}

static cm_status scale_wait(scale_watch *watch, cm_error *err)
{
    if (pc_loop_create(&watch->loop) != CM_OK) {
        return cm_error_set(err, CM_E_IO, NULL, "no event loop");
    }
    watch->timer = pc_timer_create(watch->loop, scale_tick, watch);
    pc_timer_set(watch->timer, 0);
    pc_loop_run(watch->loop);
    pc_timer_destroy(watch->timer);
    pc_loop_destroy(watch->loop);
    *err = watch->err;
    return watch->status;
}

static cm_status scale(const operate_config *config, const char *n, cm_error *err)
{
    Baleen__Control__V1__ScaleRequest request = BALEEN__CONTROL__V1__SCALE_REQUEST__INIT;
    scale_watch watch = {.until_ms = cm_now_ms() + config->wait_ms};
    cm_bytes packed;
    CM_TRY(parse_number("number of workers", n, &request.n_workers, err));
    CM_TRY(admin_find(&config->target, &watch.service, err));
    cm_bytes_init(&packed, 0);
    cm_status status = admin_ask(&watch.service, "Scale", &request.base, config->wait_ms, &packed, err);
    cm_bytes_fini(&packed);
    if (status == CM_OK) {
        watch.n_workers = request.n_workers;
        status = scale_wait(&watch, err);
    }
    admin_close(&watch.service);
    return status;
}

int verb_scale(int argc, char **argv)
{
    operate_config config = {0};
    cm_error err = {0};
    const char *number;
    size_t n;
    int code = cli_begin(&g_scale_table, &config, argc, argv, &number, 1, &n);
    if (code >= 0) {
        return code;
    }
    if (n == 0) {
        code = cli_complain(&g_scale_table, CLI_USAGE, "how many workers?");
    } else {
        code = scale(&config, number, &err) == CM_OK ? CLI_OK : cli_fail(&g_scale_table, &err);
    }
    cm_cfg_free(&g_scale_table, &config);
    return code;
}

/* ---- rebalance ---- */

static const cm_cfg_field g_rebalance_fields[] = {
    ADMIN_TARGET_FIELDS(operate_config, target),
    {"moves", "0", "experts that workers load at most; 0 = the coordinator's rebalance_moves",
     CM_CFG_UINT(operate_config, moves, 0, 1u << 20)},
    {"wait_ms", "10m", "how long to wait until the next epoch is in force; it comes all the same",
     CM_CFG_MS(operate_config, wait_ms, 1, 86400000)},
};

static const cm_cfg_table g_rebalance_table = {
    .program = "baleen rebalance",
    .summary = "one round of moving and copying experts by the load of the last minutes, so that no worker "
               "is waited "
               "for longer than need be",
    .operands = "",
    .fields = g_rebalance_fields,
    .n_fields = sizeof(g_rebalance_fields) / sizeof(g_rebalance_fields[0]),
};

int verb_rebalance(int argc, char **argv)
{
    operate_config config = {0};
    cm_error err = {0};
    Baleen__Control__V1__RebalanceRequest request = BALEEN__CONTROL__V1__REBALANCE_REQUEST__INIT;
    int code = cli_begin(&g_rebalance_table, &config, argc, argv, NULL, 0, NULL);
    if (code >= 0) {
        return code;
    }
    request.has_moves_max = true;
    request.moves_max = (uint32_t)config.moves;
    code = wish(&config, "Rebalance", &request.base, &err) == CM_OK ? CLI_OK
                                                                    : cli_fail(&g_rebalance_table, &err);
    cm_cfg_free(&g_rebalance_table, &config);
    return code;
}
