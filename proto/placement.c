#include "proto/placement.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

static pr_placement *placement_create(uint32_t n_layer, uint32_t n_expert, uint32_t n_rank, uint32_t n_owner)
{
    pr_placement *p = cm_alloc(sizeof(*p));
    p->n_layer = n_layer;
    p->n_expert = n_expert;
    p->n_rank = n_rank;
    p->rank_member = cm_alloc(sizeof(uint32_t) * n_rank);
    p->first = cm_alloc(sizeof(uint32_t) * ((size_t)n_layer * n_expert + 1));
    p->owner = cm_alloc(sizeof(uint16_t) * n_owner);
    return p;
}

void pr_placement_free(pr_placement *p)
{
    if (p != NULL) {
        cm_free(p->rank_member);
        cm_free(p->first);
        cm_free(p->owner);
        cm_free(p);
    }
}

static uint32_t placement_pairs(const pr_placement *p)
{
    return p->n_layer * p->n_expert;
}

pr_placement *pr_placement_clone(const pr_placement *p)
{
    uint32_t n_pair = placement_pairs(p), n_owner = p->first[n_pair];
    pr_placement *copy = placement_create(p->n_layer, p->n_expert, p->n_rank, n_owner);
    memcpy(copy->rank_member, p->rank_member, sizeof(uint32_t) * p->n_rank);
    memcpy(copy->first, p->first, sizeof(uint32_t) * (n_pair + 1));
    memcpy(copy->owner, p->owner, sizeof(uint16_t) * n_owner);
    return copy;
}

bool pr_placement_owns(const pr_placement *p, uint32_t layer, uint32_t expert, uint32_t rank)
{
    uint32_t n;
    const uint16_t *owners = pr_placement_owners(p, layer, expert, &n);
    for (uint32_t i = 0; i < n; i++) {
        if (owners[i] == rank) {
            return true;
        }
    }
    return false;
}

uint32_t pr_placement_rank_of(const pr_placement *p, uint32_t member_id)
{
    uint32_t rank = 0;
    while (rank < p->n_rank && p->rank_member[rank] != member_id) {
        rank++;
    }
    return rank;
}

uint32_t pr_placement_count(const pr_placement *p, uint32_t rank)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < p->first[placement_pairs(p)]; i++) {
        n += p->owner[i] == rank;
    }
    return n;
}

/* ---- planning ----
 * Per layer every rank gets a quota of floor or ceil(n_expert / n_rank), the extra ones turning with the
 * layer, cut by capacity and handed on to ranks with room. Experts stay where they were while that rank's
 * quota lasts; the others go, in ascending order, to the ranks with quota left. */

typedef struct placement_planner {
    uint32_t n_layer, n_expert, n_rank;
    uint64_t *room;   /* [n_rank] pairs each rank can still take in this and later layers */
    uint32_t *quota;  /* [n_rank] of the layer being planned */
    uint32_t *before; /* [n_rank of the old placement] -> new rank, n_rank if gone */
} placement_planner;

static void planner_set_quotas(placement_planner *planner, uint32_t layer)
{
    uint32_t n_rank = planner->n_rank, left = planner->n_expert;
    memset(planner->quota, 0, sizeof(uint32_t) * n_rank);
    while (left > 0) {
        uint32_t n_open = 0, given = 0;
        for (uint32_t r = 0; r < n_rank; r++) {
            n_open += planner->quota[r] < planner->room[r];
        }
        CM_ASSERT(n_open > 0); /* the sum of capacities was checked */
        uint32_t share = left / n_open, extra = left % n_open;
        uint32_t offset = (uint32_t)((uint64_t)layer * (planner->n_expert % n_rank) % n_rank);
        for (uint32_t k = 0; k < n_rank; k++) {
            uint32_t r = (k + offset) % n_rank;
            if (planner->quota[r] >= planner->room[r]) {
                continue;
            }
            uint64_t want = share + (extra > 0 ? 1u : 0u), can = planner->room[r] - planner->quota[r];
            uint32_t take = (uint32_t)(want < can ? want : can);
            extra -= extra > 0 && take == want;
            planner->quota[r] += take;
            given += take;
        }
        left -= given;
    }
    for (uint32_t r = 0; r < n_rank; r++) {
        planner->room[r] -= planner->quota[r];
    }
}

static void planner_place_layer(placement_planner *planner, uint32_t layer, const pr_placement *before,
                                uint16_t *owner)
{
    for (uint32_t e = 0; e < planner->n_expert; e++) {
        owner[e] = UINT16_MAX;
        if (before == NULL) {
            continue;
        }
        uint32_t n_old;
        const uint16_t *old = pr_placement_owners(before, layer, e, &n_old);
        for (uint32_t i = 0; i < n_old && owner[e] == UINT16_MAX; i++) {
            uint32_t rank = planner->before[old[i]];
            if (rank < planner->n_rank && planner->quota[rank] > 0) {
                owner[e] = (uint16_t)rank;
                planner->quota[rank]--;
            }
        }
    }
    uint32_t rank = 0;
    for (uint32_t e = 0; e < planner->n_expert; e++) {
        if (owner[e] == UINT16_MAX) {
            while (planner->quota[rank] == 0) {
                rank++;
            }
            owner[e] = (uint16_t)rank;
            planner->quota[rank]--;
        }
    }
}

cm_status pr_placement_plan(uint32_t n_layer, uint32_t n_expert, const uint32_t *rank_member, uint32_t n_rank,
                            const uint64_t *capacity, const pr_placement *before,
                            pr_placement **placement_out, cm_error *err)
{
    uint64_t need = (uint64_t)n_layer * n_expert, sum = 0;
    for (uint32_t r = 0; r < n_rank; r++) {
        sum += capacity[r] < need ? capacity[r] : need;
    }
    if (n_rank == 0 || n_rank > PR_RANK_MAX || sum < need) {
        return cm_error_set(err, CM_E_CAPACITY, "workers",
                            "%u workers can hold %llu experts, the model has %llu: add workers or memory",
                            n_rank, (unsigned long long)sum, (unsigned long long)need);
    }
    placement_planner planner = {.n_layer = n_layer, .n_expert = n_expert, .n_rank = n_rank};
    planner.room = cm_alloc(sizeof(uint64_t) * n_rank);
    planner.quota = cm_alloc(sizeof(uint32_t) * n_rank);
    memcpy(planner.room, capacity, sizeof(uint64_t) * n_rank);

    pr_placement *p = placement_create(n_layer, n_expert, n_rank, (uint32_t)need);
    memcpy(p->rank_member, rank_member, sizeof(uint32_t) * n_rank);
    for (uint32_t i = 0; i <= need; i++) {
        p->first[i] = i;
    }
    if (before != NULL) {
        planner.before = cm_alloc(sizeof(uint32_t) * before->n_rank);
        for (uint32_t r = 0; r < before->n_rank; r++) {
            planner.before[r] = pr_placement_rank_of(p, before->rank_member[r]);
        }
    }
    for (uint32_t layer = 0; layer < n_layer; layer++) {
        planner_set_quotas(&planner, layer);
        planner_place_layer(&planner, layer, before, p->owner + (size_t)layer * n_expert);
    }
    cm_free(planner.room);
    cm_free(planner.quota);
    cm_free(planner.before);
    *placement_out = p;
    return CM_OK;
}

/* ---- the message ---- */

void pr_placement_pack(const pr_placement *p, Baleen__Control__V1__Placement *message)
{
    uint32_t n_pair = placement_pairs(p), n_owner = p->first[n_pair];
    baleen__control__v1__placement__init(message);
    message->n_layer = p->n_layer;
    message->n_expert = p->n_expert;
    message->rank_member = p->rank_member;
    message->n_rank_member = p->n_rank;
    message->first = p->first;
    message->n_first = n_pair + 1;
    message->n_owner = n_owner;
    message->owner = cm_alloc(sizeof(uint32_t) * n_owner); /* the value keeps 16 bits, the message 32 */
    for (uint32_t i = 0; i < n_owner; i++) {
        message->owner[i] = p->owner[i];
    }
}

void pr_placement_message_free(Baleen__Control__V1__Placement *message)
{
    cm_free(message->owner);
    message->owner = NULL;
}

cm_status pr_placement_unpack(const Baleen__Control__V1__Placement *message, pr_placement **placement_out,
                              cm_error *err)
{
    uint64_t n_pair = (uint64_t)message->n_layer * message->n_expert;
    if (n_pair == 0 || n_pair > 1u << 24 || message->n_first != n_pair + 1 || message->n_rank_member == 0 ||
        message->n_rank_member > PR_RANK_MAX) {
        return cm_error_set(err, CM_E_PROTOCOL, "placement",
                            "placement of %u layers, %u experts, %zu ranks with %zu entries",
                            message->n_layer, message->n_expert, message->n_rank_member, message->n_first);
    }
    for (size_t i = 0; i < n_pair; i++) {
        if (message->first[i] > message->first[i + 1]) {
            return cm_error_set(err, CM_E_PROTOCOL, "placement.first", "entry %zu goes down", i);
        }
    }
    if (message->first[0] != 0 || message->first[n_pair] != message->n_owner) {
        return cm_error_set(err, CM_E_PROTOCOL, "placement.first", "covers %u of %zu owners",
                            message->first[n_pair], message->n_owner);
    }
    for (size_t i = 0; i < message->n_owner; i++) {
        if (message->owner[i] >= message->n_rank_member) {
            return cm_error_set(err, CM_E_PROTOCOL, "placement.owner", "rank %u of %zu", message->owner[i],
                                message->n_rank_member);
        }
    }
    pr_placement *p = placement_create(message->n_layer, message->n_expert, (uint32_t)message->n_rank_member,
                                       (uint32_t)message->n_owner);
    memcpy(p->rank_member, message->rank_member, sizeof(uint32_t) * p->n_rank);
    memcpy(p->first, message->first, sizeof(uint32_t) * (n_pair + 1));
    for (size_t i = 0; i < message->n_owner; i++) {
        p->owner[i] = (uint16_t)message->owner[i];
    }
    *placement_out = p;
    return CM_OK;
}
