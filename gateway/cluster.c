/* The cluster for people who look at it: what this gateway hears anyway, and the load of the experts, which
 * it asks the coordinator for while somebody asks for it. */
#include <string.h>

#include "common/base/clock.h"
#include "common/base/mem.h"
#include "gateway/gateway_private.h"

enum { LOAD_EVERY_MS = 2000 }; /* routers count no faster */

/* ---- load ---- */

void gw_cluster_load_take(gw_gateway *gateway, const Baleen__Control__V1__ClusterLoad *message)
{
    gw_expert_load *load = &gateway->load;
    if (message->level.len != (uint64_t)message->n_layer * message->n_expert || message->level.len == 0) {
        return; /* shown is what came before */
    }
    load->n_layer = message->n_layer;
    load->n_expert = message->n_expert;
    load->level = cm_realloc(load->level, message->level.len);
    memcpy(load->level, message->level.data, message->level.len);
}

void gw_cluster_load_free(gw_gateway *gateway)
{
    cm_free(gateway->load.level);
    gateway->load = (gw_expert_load){0};
}

/* What is asked for now is there when the page asks again. */
static void load_refresh(gw_gateway *gateway)
{
    uint64_t now_ms = cm_now_ms();
    if (gateway->load.asked_ms == 0 || now_ms - gateway->load.asked_ms >= LOAD_EVERY_MS) {
        gateway->load.asked_ms = now_ms;
        pc_member_wish_load(gateway->member);
    }
}

/* ---- members ---- */

static json_t *counters_json(const cm_stat_value *values, uint32_t n)
{
    static const char prefix[] = "baleen_";
    json_t *counters = json_object();
    for (uint32_t i = 0; i < n; i++) {
        if (values[i].stat < CM_STAT_COUNT) { /* a newer member may have others */
            const char *name = cm_stat_name((cm_stat)values[i].stat);
            name += strncmp(name, prefix, sizeof(prefix) - 1) == 0 ? sizeof(prefix) - 1 : 0;
            json_object_set_new(counters, name, json_integer(values[i].value));
        }
    }
    return counters;
}

static json_t *own_json(const gw_gateway *gateway)
{
    cm_stat_value values[CM_STAT_COUNT];
    uint32_t n = cm_stats_snapshot('G', values);
    return json_pack("{s:I, s:s, s:s, s:I, s:b, s:o}", "id", (json_int_t)gateway->member_id, "role",
                     "gateway", "state", gateway->draining ? "leaving" : "ready", "epoch",
                     (json_int_t)(gateway->epoch != NULL ? gateway->epoch->number : 0), "answers_you", 1,
                     "counters", counters_json(values, n));
}

static json_t *member_json(const gw_member_stats *stats)
{
    return json_pack("{s:I, s:s%, s:s, s:I, s:o}", "id", (json_int_t)stats->id, "role", stats->label,
                     strcspn(stats->label, "-"), "state", stats->state, "epoch", (json_int_t)stats->epoch,
                     "counters", counters_json(stats->values, stats->n_values));
}

json_t *gw_cluster_json(gw_gateway *gateway)
{
    const char *reason = gw_ready_reason(gateway);
    gw_routers_load load = gw_routers_get_load(gateway->routers);
    json_t *members = json_array();
    json_array_append_new(members, own_json(gateway));
    for (uint32_t i = 0; i < gateway->n_stats; i++) {
        json_array_append_new(members, member_json(&gateway->stats[i]));
    }
    return json_pack("{s:s, s:s, s:I, s:b, s:s?, s:b, s:b, s:I, s:I, s:I, s:o}", "version", BALEEN_VERSION,
                     "model", gateway->model, "context", (json_int_t)gateway->geometry.context, "ready",
                     reason == NULL, "reason", reason, "coordinator", pc_member_connected(gateway->member),
                     "changing", gateway->changing, "epoch",
                     (json_int_t)(gateway->epoch != NULL ? gateway->epoch->number : 0), "running",
                     (json_int_t)load.running, "waiting", (json_int_t)load.waiting, "members", members);
}

/* ---- experts ---- */

static json_t *base64_json(const uint8_t *data, size_t n)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *text = cm_alloc((n + 2) / 3 * 4 + 1), *at = text;
    for (size_t i = 0; i < n; i += 3) {
        uint32_t bits = (uint32_t)data[i] << 16 | (i + 1 < n ? (uint32_t)data[i + 1] << 8 : 0) |
                        (i + 2 < n ? (uint32_t)data[i + 2] : 0);
        *at++ = digits[bits >> 18];
        *at++ = digits[bits >> 12 & 63];
        *at++ = i + 1 < n ? digits[bits >> 6 & 63] : '=';
        *at++ = i + 2 < n ? digits[bits & 63] : '=';
    }
    json_t *value = json_stringn(text, (size_t)(at - text));
    cm_free(text);
    return value;
}

/* ranks: member ids; copies: owners of each pair, one byte; owners: two bytes each (low first), in that
 * order. */
static json_t *placement_json(const pr_placement *place)
{
    uint32_t n_pair = place->n_layer * place->n_expert;
    uint8_t *copies = cm_alloc(n_pair), *owners = cm_alloc((size_t)place->first[n_pair] * 2);
    size_t n_bytes = 0;
    json_t *ranks = json_array();
    for (uint32_t i = 0; i < n_pair; i++) {
        uint32_t n = place->first[i + 1] - place->first[i];
        copies[i] = (uint8_t)(n < UINT8_MAX ? n : UINT8_MAX);
        for (uint32_t k = 0; k < copies[i]; k++) {
            uint16_t owner = place->owner[place->first[i] + k];
            owners[n_bytes++] = (uint8_t)(owner & 255);
            owners[n_bytes++] = (uint8_t)(owner >> 8);
        }
    }
    for (uint32_t i = 0; i < place->n_rank; i++) {
        json_array_append_new(ranks, json_integer(place->rank_member[i]));
    }
    json_t *value = json_pack("{s:o, s:o, s:o}", "ranks", ranks, "copies", base64_json(copies, n_pair),
                              "owners", base64_json(owners, n_bytes));
    cm_free(copies);
    cm_free(owners);
    return value;
}

json_t *gw_cluster_experts_json(gw_gateway *gateway, uint64_t known_epoch)
{
    const gw_expert_load *load = &gateway->load;
    const pr_placement *place = gateway->epoch != NULL ? gateway->epoch->placement : NULL;
    load_refresh(gateway);
    json_t *value = json_pack("{s:I, s:I, s:I}", "epoch",
                              (json_int_t)(gateway->epoch != NULL ? gateway->epoch->number : 0), "layers",
                              (json_int_t)(place != NULL ? place->n_layer : 0), "experts",
                              (json_int_t)(place != NULL ? place->n_expert : 0));
    if (place != NULL && load->level != NULL && load->n_layer == place->n_layer &&
        load->n_expert == place->n_expert) {
        json_object_set_new(value, "load", base64_json(load->level, (size_t)load->n_layer * load->n_expert));
    }
    if (place != NULL && gateway->epoch->number != known_epoch) {
        json_object_set_new(value, "placement", placement_json(place));
    }
    return value;
}
