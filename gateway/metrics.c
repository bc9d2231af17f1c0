/* Counters of this process and of the members it hears of. */
#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "gateway/gateway_private.h"
#include "proto/messages.h"

static char role_letter(uint32_t role)
{
    return role <= BALEEN__CONTROL__V1__ROLE__ROLE_WORKER ? "\0CGRW"[role] : 0;
}

static void take_member(gw_member_stats *stats, const Baleen__Control__V1__MemberStats *member)
{
    stats->id = member->member_id;
    stats->epoch = member->epoch;
    snprintf(stats->label, sizeof(stats->label), "%s-%u", pr_role_name(member->role), member->member_id);
    snprintf(stats->state, sizeof(stats->state), "%s", member->state != NULL ? member->state : "");
    stats->values = cm_alloc(member->n_stats * sizeof(*stats->values));
    for (size_t i = 0; i < member->n_stats; i++) {
        stats->values[i] = (cm_stat_value){.stat = member->stats[i]->stat, .value = member->stats[i]->value};
    }
    stats->n_values = (uint32_t)member->n_stats;
}

void gw_member_stats_take(gw_gateway *gateway, const Baleen__Control__V1__ClusterStats *message)
{
    gw_member_stats_free(gateway);
    gateway->changing = message->changing;
    gateway->stats = cm_alloc(message->n_members * sizeof(*gateway->stats));
    for (size_t i = 0; i < message->n_members; i++) {
        const Baleen__Control__V1__MemberStats *member = message->members[i];
        char role = role_letter(member->role);
        bool us = member->role == BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY &&
                  member->member_id == gateway->member_id;
        if (role != 0 && !us) {
            gw_member_stats *stats = &gateway->stats[gateway->n_stats++];
            stats->role = role;
            take_member(stats, member);
        }
    }
}

void gw_member_stats_free(gw_gateway *gateway)
{
    for (uint32_t i = 0; i < gateway->n_stats; i++) {
        cm_free(gateway->stats[i].values);
    }
    cm_free(gateway->stats);
    gateway->stats = NULL;
    gateway->n_stats = 0;
}

int64_t gw_member_stats_sum(const gw_gateway *gateway, char role, cm_stat stat)
{
    int64_t sum = 0;
    for (uint32_t i = 0; i < gateway->n_stats; i++) {
        const gw_member_stats *stats = &gateway->stats[i];
        for (uint32_t k = 0; k < stats->n_values && stats->role == role; k++) {
            sum += stats->values[k].stat == (uint32_t)stat ? stats->values[k].value : 0;
        }
    }
    return sum;
}

uint32_t gw_member_stats_gateways(const gw_gateway *gateway)
{
    uint32_t n = 1;
    for (uint32_t i = 0; i < gateway->n_stats; i++) {
        n += gateway->stats[i].role == 'G';
    }
    return n;
}

static void render_clients(gw_gateway *gateway, cm_bytes *out)
{
    gw_info info;
    gw_gateway_info(gateway, &info);
    gw_telemetry_now now = {
        .model = gateway->model,
        .running = gateway->turns.n_running,
        .waiting = gateway->turns.n_held - gateway->turns.n_running,
        .kv_used = info.kv_used,
        .preemptions = gw_member_stats_sum(gateway, 'R', CM_STAT_preemptions),
        .prefix_queries = gw_member_stats_sum(gateway, 'R', CM_STAT_prefix_queries),
        .prefix_hits = gw_member_stats_sum(gateway, 'R', CM_STAT_prefix_hits),
        .drafts = gw_member_stats_sum(gateway, 'R', CM_STAT_drafts),
        .draft_tokens = gw_member_stats_sum(gateway, 'R', CM_STAT_draft_tokens),
        .accepted_tokens = gw_member_stats_sum(gateway, 'R', CM_STAT_accepted_tokens),
    };
    gw_telemetry_render(gateway->telemetry, &gateway->turns, &now, out);
}

void gw_metrics_render(gw_gateway *gateway, cm_bytes *out)
{
    char own[32];
    snprintf(own, sizeof(own), "gateway-%u", gateway->member_id);
    cm_stat_source *sources = cm_alloc((gateway->n_stats + 1) * sizeof(*sources));
    sources[0] = (cm_stat_source){.member = own, .role = 'G'};
    for (uint32_t i = 0; i < gateway->n_stats; i++) {
        const gw_member_stats *stats = &gateway->stats[i];
        sources[i + 1] = (cm_stat_source){.member = stats->label,
                                          .role = stats->role,
                                          .values = stats->values,
                                          .n_values = stats->n_values};
    }
    cm_stats_render(sources, gateway->n_stats + 1, out);
    cm_free(sources);
    render_clients(gateway, out);
}
