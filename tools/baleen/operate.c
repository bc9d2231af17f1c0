/* baleen drain: what operators ask of a running cluster. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/mem.h"
#include "proto/pack.h"
#include "tools/baleen/admin.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/verbs.h"

enum { OPERATE_ARENA_BYTES = 16 << 10 };

typedef struct operate_config {
    admin_target target;
    uint64_t wait_ms;
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
    char address[128];
    cm_bytes packed;
    cm_arena arena;
    Baleen__Control__V1__Done *done;
    CM_TRY(admin_find(&config->target, address, err));
    cm_bytes_init(&packed, 0);
    cm_arena_init(&arena, "answer", OPERATE_ARENA_BYTES, OPERATE_ARENA_BYTES);
    cm_status status = admin_ask(address, method, request, config->wait_ms, &packed, err);
    if (status == CM_OK) {
        bool told = pr_unpack(&baleen__control__v1__done__descriptor, packed.data, packed.len, &arena,
                              (ProtobufCMessage **)&done) == CM_OK;
        printf("%s\n", told && done->text != NULL ? done->text : "done");
    }
    cm_arena_fini(&arena);
    cm_bytes_fini(&packed);
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
