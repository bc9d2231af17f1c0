/* baleen status: what the coordinator knows. */
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/bytes.h"
#include "common/base/stats.h"
#include "tools/baleen/admin.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/verbs.h"

enum { STATUS_ARENA_CHUNK_BYTES = 64 << 10, STATUS_ARENA_BYTES_MAX = 256 << 20 };

typedef Baleen__Control__V1__StatusReply status_reply;
typedef Baleen__Control__V1__MemberStatus status_member;

typedef struct status_config {
    admin_target target;
    bool json, experts;
} status_config;

static const cm_cfg_field g_fields[] = {
    ADMIN_TARGET_FIELDS(status_config, target),
    {"experts", "off", "with every expert's owners and recent load", CM_CFG_BOOL(status_config, experts)},
    {"json", "off", "one JSON object in place of the table", CM_CFG_BOOL(status_config, json)},
};

static const cm_cfg_table g_table = {
    .program = "baleen status",
    .summary = "members of a cluster, its epoch, placement and load",
    .operands = "",
    .fields = g_fields,
    .n_fields = sizeof(g_fields) / sizeof(g_fields[0]),
};

static const char *role_name(Baleen__Control__V1__Role role)
{
    switch (role) {
    case BALEEN__CONTROL__V1__ROLE__ROLE_COORDINATOR:
        return "coordinator";
    case BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY:
        return "gateway";
    case BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER:
        return "router";
    case BALEEN__CONTROL__V1__ROLE__ROLE_WORKER:
        return "worker";
    default:
        return "unknown";
    }
}

static const char *or_empty(const char *text)
{
    return text != NULL ? text : "";
}

/* ---- table ---- */

static long long member_stat(const status_member *row, cm_stat stat)
{
    for (size_t i = 0; i < row->n_stats; i++) {
        if (row->stats[i]->stat == (uint32_t)stat) {
            return (long long)row->stats[i]->value;
        }
    }
    return 0;
}

/* What a role is busy with, in a few words. */
static void member_load(const status_member *row, char *out, size_t cap)
{
    switch (row->member->role) {
    case BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY:
        snprintf(out, cap, "%lld streams, %lld tokens so far", member_stat(row, CM_STAT_ledger_streams),
                 member_stat(row, CM_STAT_generated_tokens));
        break;
    case BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER:
        snprintf(out, cap, "%lld running, %lld waiting, %lld of %lld pages",
                 member_stat(row, CM_STAT_seq_running), member_stat(row, CM_STAT_seq_waiting),
                 member_stat(row, CM_STAT_ledger_kv_pages), member_stat(row, CM_STAT_kv_pages_total));
        break;
    case BALEEN__CONTROL__V1__ROLE__ROLE_WORKER:
        snprintf(out, cap, "%lld rows so far", member_stat(row, CM_STAT_worker_rows));
        break;
    default:
        snprintf(out, cap, "%lld members", member_stat(row, CM_STAT_members));
        break;
    }
}

/* Where others reach it: a gateway's is its HTTP one, the coordinator has nothing but gRPC. */
static const char *member_address(const Baleen__Control__V1__Member *member)
{
    const char *addresses[] = {member->http_address, member->data_address, member->grpc_address};
    for (size_t i = 0; i < sizeof(addresses) / sizeof(addresses[0]); i++) {
        if (addresses[i] != NULL && addresses[i][0] != '\0') {
            return addresses[i];
        }
    }
    return "";
}

void admin_print_table(const status_reply *reply)
{
    printf("cluster %016llx, epoch %llu, checkpoint %s\n", (unsigned long long)reply->cluster,
           (unsigned long long)reply->epoch,
           reply->fingerprint != NULL ? reply->fingerprint : "not known yet");
    if (reply->change != NULL) {
        printf("being changed: %s\n", reply->change);
    }
    if (reply->has_imbalance_permille) {
        printf("load: the busiest worker of a layer has %.2f of the mean\n", reply->imbalance_permille / 1e3);
    }
    printf("\n%-11s %4s %8s %-16s %-22s %-10s %5s %8s  %s\n", "role", "id", "pid", "host", "address", "state",
           "epoch", "experts", "load");
    for (size_t i = 0; i < reply->n_members; i++) {
        const status_member *row = reply->members[i];
        char load[128], experts[16] = "-";
        member_load(row, load, sizeof(load));
        if (row->has_n_expert) {
            snprintf(experts, sizeof(experts), "%u", row->n_expert);
        }
        printf("%-11s %4u %8u %-16s %-22s %-10s %5llu %8s  %s\n", role_name(row->member->role),
               row->member->id, row->member->pid, or_empty(row->member->host), member_address(row->member),
               row->state, (unsigned long long)row->epoch, experts, load);
    }
}

/* One line per expert: layer, expert, rows, owners. */
static void print_experts(const status_reply *reply)
{
    const Baleen__Control__V1__Placement *place = reply->placement;
    printf("\n%5s %6s %12s  %s\n", "layer", "expert", "recent rows", "workers");
    for (size_t i = 0; place != NULL && i + 1 < place->n_first; i++) {
        printf("%5zu %6zu %12llu ", i / place->n_expert, i % place->n_expert,
               i < reply->n_load ? (unsigned long long)reply->load[i] : 0ull);
        for (uint32_t k = place->first[i]; k < place->first[i + 1]; k++) {
            printf(" %u", place->rank_member[place->owner[k]]);
        }
        printf("\n");
    }
}

/* ---- JSON ---- */

static json_t *experts_json(const status_reply *reply)
{
    const Baleen__Control__V1__Placement *place = reply->placement;
    json_t *owners = json_array(), *load = json_array();
    for (size_t i = 0; i + 1 < place->n_first; i++) {
        json_t *ids = json_array();
        for (uint32_t k = place->first[i]; k < place->first[i + 1]; k++) {
            json_array_append_new(ids, json_integer(place->rank_member[place->owner[k]]));
        }
        json_array_append_new(owners, ids);
        json_array_append_new(load, json_integer(i < reply->n_load ? (json_int_t)reply->load[i] : 0));
    }
    return json_pack("{s:i, s:i, s:o, s:o}", "layers", (int)place->n_layer, "experts_of_a_layer",
                     (int)place->n_expert, "owners", owners, "load", load);
}

static void set_text(json_t *object, const char *key, const char *text)
{
    if (text != NULL && text[0] != '\0') {
        json_object_set_new(object, key, json_string(text));
    }
}

static json_t *member_json(const status_member *row)
{
    const Baleen__Control__V1__Member *member = row->member;
    json_t *stats = json_object();
    for (size_t i = 0; i < row->n_stats; i++) {
        if (row->stats[i]->stat < CM_STAT_COUNT) { /* others: of a newer process */
            json_object_set_new(stats, cm_stat_name((cm_stat)row->stats[i]->stat),
                                json_integer(row->stats[i]->value));
        }
    }
    json_t *object = json_pack("{s:s, s:I, s:I}", "role", role_name(member->role), "id",
                               (json_int_t)member->id, "pid", (json_int_t)member->pid);
    set_text(object, "host", member->host);
    set_text(object, "address", member_address(member));
    set_text(object, "grpc", member->grpc_address);
    json_object_set_new(object, "state", json_string(row->state));
    json_object_set_new(object, "epoch", json_integer((json_int_t)row->epoch));
    if (row->has_n_expert) {
        json_object_set_new(object, "experts", json_integer(row->n_expert));
    }
    if (row->has_heard_ms_ago) {
        json_object_set_new(object, "heard_ms_ago", json_integer((json_int_t)row->heard_ms_ago));
    }
    json_object_set_new(object, "stats", stats);
    return object;
}

static void print_json(const status_reply *reply)
{
    char cluster[17];
    json_t *members = json_array();
    for (size_t i = 0; i < reply->n_members; i++) {
        json_array_append_new(members, member_json(reply->members[i]));
    }
    snprintf(cluster, sizeof(cluster), "%016llx", (unsigned long long)reply->cluster);
    json_t *all = json_pack("{s:s, s:I}", "cluster", cluster, "epoch", (json_int_t)reply->epoch);
    set_text(all, "fingerprint", reply->fingerprint);
    set_text(all, "change", reply->change);
    if (reply->has_imbalance_permille) {
        json_object_set_new(all, "imbalance", json_real(reply->imbalance_permille / 1e3));
    }
    if (reply->placement != NULL) {
        json_object_set_new(all, "placement", experts_json(reply));
    }
    json_object_set_new(all, "members", members);
    json_dumpf(all, stdout, JSON_INDENT(2));
    printf("\n");
    json_decref(all);
}

/* ---- asking ---- */

static cm_status status_show(const status_config *config, cm_error *err)
{
    admin_service service;
    cm_arena arena;
    status_reply *reply;
    CM_TRY(admin_find(&config->target, &service, err));
    cm_arena_init(&arena, "status", STATUS_ARENA_CHUNK_BYTES, STATUS_ARENA_BYTES_MAX);
    cm_status status = admin_status(&service, config->experts, &arena, &reply, err);
    if (status == CM_OK && config->json) {
        print_json(reply);
    } else if (status == CM_OK) {
        admin_print_table(reply);
        if (config->experts) {
            print_experts(reply);
        }
    }
    cm_arena_fini(&arena);
    admin_close(&service);
    return status;
}

int verb_status(int argc, char **argv)
{
    status_config config = {0};
    cm_error err = {0};
    int code = cli_begin(&g_table, &config, argc, argv, NULL, 0, NULL);
    if (code >= 0) {
        return code;
    }
    code = status_show(&config, &err) == CM_OK ? CLI_OK : cli_fail(&g_table, &err);
    cm_cfg_free(&g_table, &config);
    return code;
}
