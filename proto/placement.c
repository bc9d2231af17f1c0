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

pr_placement *pr_placement_none(void)
{
    return placement_create(0, 0, 0, 0);
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

pr_placement *pr_placement_build(uint32_t n_layer, uint32_t n_expert, const uint32_t *rank_member,
                                 uint32_t n_rank, const uint16_t *owners, const uint8_t *n_owner,
                                 uint32_t stride)
{
    uint32_t n_pair = n_layer * n_expert, n_all = 0;
    for (uint32_t i = 0; i < n_pair; i++) {
        CM_ASSERT(n_owner[i] <= stride);
        n_all += n_owner[i];
    }
    pr_placement *p = placement_create(n_layer, n_expert, n_rank, n_all);
    memcpy(p->rank_member, rank_member, sizeof(uint32_t) * n_rank);
    for (uint32_t i = 0; i < n_pair; i++) {
        memcpy(p->owner + p->first[i], owners + (size_t)i * stride, sizeof(uint16_t) * n_owner[i]);
        p->first[i + 1] = p->first[i] + n_owner[i];
    }
    return p;
}

/* ---- planning ---- */

typedef struct placement_planner {
    uint32_t n_layer, n_expert, n_rank;
    const uint64_t *capacity;   /* [n_rank] */
    const pr_placement *before; /* may be NULL */
    uint32_t *rank_now;         /* [before->n_rank] -> new rank, n_rank if gone */
    uint64_t *room;             /* [n_rank] pairs each rank can still take */
    uint64_t *spare;            /* [n_rank] pairs each can load while it still holds all it had before */
    uint32_t *count;            /* [n_rank] of the layer being planned: its quota, or what it has */
    uint16_t *owners;           /* [pair][PR_COPIES_MAX] the result */
    uint8_t *n_owner;           /* [pair] */
} placement_planner;

static void planner_own(placement_planner *planner, uint32_t pair, uint32_t rank)
{
    planner->owners[(size_t)pair * PR_COPIES_MAX + planner->n_owner[pair]++] = (uint16_t)rank;
}

static bool planner_owns(const placement_planner *planner, uint32_t pair, uint32_t rank)
{
    for (uint32_t i = 0; i < planner->n_owner[pair]; i++) {
        if (planner->owners[(size_t)pair * PR_COPIES_MAX + i] == rank) {
            return true;
        }
    }
    return false;
}

/* Owners before of the pair, as they are called now; those that are gone are left out. */
static uint32_t planner_live(const placement_planner *planner, uint32_t pair,
                             uint32_t live_out[PR_COPIES_MAX])
{
    const pr_placement *before = planner->before;
    uint32_t n = 0;
    for (uint32_t i = before->first[pair]; i < before->first[pair + 1] && n < PR_COPIES_MAX; i++) {
        uint32_t rank = planner->rank_now[before->owner[i]];
        if (rank < planner->n_rank) {
            live_out[n++] = rank;
        }
    }
    return n;
}

/* ---- planning when only few have gone ---- */

/* Every copy where it is (copies 1: only one of each expert); n_orphan_out: experts without any. false: some
 * rank has not the room. */
static bool planner_keep(placement_planner *planner, uint32_t copies, uint64_t *n_orphan_out)
{
    uint32_t live[PR_COPIES_MAX];
    uint64_t n_orphan = 0, n_free = 0;
    memset(planner->n_owner, 0, (size_t)planner->n_layer * planner->n_expert);
    memcpy(planner->room, planner->capacity, sizeof(uint64_t) * planner->n_rank);
    for (uint32_t pair = 0; pair < planner->n_layer * planner->n_expert; pair++) {
        uint32_t n = planner_live(planner, pair, live);
        for (uint32_t i = 0; i < n && i < copies; i++) {
            if (planner->room[live[i]]-- == 0) {
                return false;
            }
            planner_own(planner, pair, live[i]);
        }
        n_orphan += n == 0;
    }
    for (uint32_t r = 0; r < planner->n_rank; r++) {
        n_free += planner->room[r] < n_orphan ? planner->room[r] : n_orphan;
    }
    *n_orphan_out = n_orphan;
    return n_free >= n_orphan;
}

/* Of those with room the rank with the fewest copies in the layer, then with the most room, then in turn. */
static uint32_t planner_heir(const placement_planner *planner, uint32_t layer)
{
    uint32_t best = planner->n_rank;
    for (uint32_t k = 0; k < planner->n_rank; k++) {
        uint32_t r = (k + layer) % planner->n_rank;
        if (planner->room[r] == 0) {
            continue;
        }
        if (best == planner->n_rank || planner->count[r] < planner->count[best] ||
            (planner->count[r] == planner->count[best] && planner->room[r] > planner->room[best])) {
            best = r;
        }
    }
    return best;
}

static void planner_adopt_layer(placement_planner *planner, uint32_t layer)
{
    uint32_t first = layer * planner->n_expert, last = first + planner->n_expert;
    memset(planner->count, 0, sizeof(uint32_t) * planner->n_rank);
    for (uint32_t pair = first; pair < last; pair++) {
        for (uint32_t i = 0; i < planner->n_owner[pair]; i++) {
            planner->count[planner->owners[(size_t)pair * PR_COPIES_MAX + i]]++;
        }
    }
    for (uint32_t pair = first; pair < last; pair++) {
        if (planner->n_owner[pair] == 0) {
            uint32_t rank = planner_heir(planner, layer);
            CM_ASSERT(rank < planner->n_rank); /* the room was counted */
            planner_own(planner, pair, rank);
            planner->count[rank]++;
            planner->room[rank]--;
        }
    }
}

static bool planner_all_known(const placement_planner *planner)
{
    uint32_t n = 0;
    for (uint32_t r = 0; planner->before != NULL && r < planner->before->n_rank; r++) {
        n += planner->rank_now[r] < planner->n_rank;
    }
    return planner->before != NULL && n == planner->n_rank;
}

/* false: not possible, plan anew. */
static bool planner_adopt(placement_planner *planner)
{
    uint64_t n_orphan;
    if (!planner_all_known(planner) ||
        (!planner_keep(planner, PR_COPIES_MAX, &n_orphan) && !planner_keep(planner, 1, &n_orphan))) {
        return false;
    }
    for (uint32_t layer = 0; n_orphan > 0 && layer < planner->n_layer; layer++) {
        planner_adopt_layer(planner, layer);
    }
    return true;
}

/* ---- planning anew ----
 * Per layer every rank gets a quota of floor or ceil(n_expert / n_rank), the extra ones turning with the
 * layer, cut by capacity and handed on to ranks with room. Experts stay where they were while that rank's
 * quota lasts; the others go, in ascending order, to the ranks with quota left. */

static void planner_set_quotas(placement_planner *planner, uint32_t layer)
{
    uint32_t n_rank = planner->n_rank, left = planner->n_expert;
    uint32_t *quota = planner->count;
    memset(quota, 0, sizeof(uint32_t) * n_rank);
    while (left > 0) {
        uint32_t n_open = 0, given = 0;
        for (uint32_t r = 0; r < n_rank; r++) {
            n_open += quota[r] < planner->room[r];
        }
        CM_ASSERT(n_open > 0); /* the sum of capacities was checked */
        uint32_t share = left / n_open, extra = left % n_open;
        uint32_t offset = (uint32_t)((uint64_t)layer * (planner->n_expert % n_rank) % n_rank);
        for (uint32_t k = 0; k < n_rank; k++) {
            uint32_t r = (k + offset) % n_rank;
            if (quota[r] >= planner->room[r]) {
                continue;
            }
            uint64_t want = share + (extra > 0 ? 1u : 0u), can = planner->room[r] - quota[r];
            uint32_t take = (uint32_t)(want < can ? want : can);
            extra -= extra > 0 && take == want;
            quota[r] += take;
            given += take;
        }
        left -= given;
    }
    for (uint32_t r = 0; r < n_rank; r++) {
        planner->room[r] -= quota[r];
    }
}

static uint32_t planner_next(const placement_planner *planner, bool spare)
{
    uint32_t rank = 0;
    while (rank < planner->n_rank && (planner->count[rank] == 0 || (spare && planner->spare[rank] == 0))) {
        rank++;
    }
    return rank;
}

/* A rank with room beyond its quota: one that has the expert already, else the one that can load the most;
 * n_rank: none. */
static uint32_t planner_beyond(const placement_planner *planner, uint32_t pair)
{
    uint32_t live[PR_COPIES_MAX], best = planner->n_rank;
    uint32_t n = planner->before != NULL ? planner_live(planner, pair, live) : 0;
    for (uint32_t i = 0; i < n; i++) {
        if (planner->room[live[i]] > 0) {
            return live[i];
        }
    }
    for (uint32_t r = 0; r < planner->n_rank; r++) {
        if (planner->room[r] > 0 && planner->spare[r] > 0 &&
            (best == planner->n_rank || planner->spare[r] > planner->spare[best])) {
            best = r;
        }
    }
    return best;
}

static bool planner_had(const placement_planner *planner, uint32_t pair, uint32_t rank)
{
    uint32_t live[PR_COPIES_MAX];
    uint32_t n = planner->before != NULL ? planner_live(planner, pair, live) : 0;
    for (uint32_t i = 0; i < n; i++) {
        if (live[i] == rank) {
            return true;
        }
    }
    return false;
}

/* Who gets an expert that cannot stay by the quotas. What a rank had before it still holds while it loads:
 * one that would be over its capacity with both gets none, as long as another way is left. */
static void planner_move(placement_planner *planner, uint32_t pair)
{
    uint32_t rank = planner_next(planner, true);
    bool beyond = rank == planner->n_rank;
    if (beyond) {
        rank = planner_beyond(planner, pair);
    }
    if (rank == planner->n_rank) {
        rank = planner_next(planner, false);
        beyond = false;
    }
    planner_own(planner, pair, rank);
    planner->count[rank] -= !beyond;
    planner->room[rank] -= beyond;
    planner->spare[rank] -= planner->spare[rank] > 0 && !planner_had(planner, pair, rank);
}

static void planner_place_layer(placement_planner *planner, uint32_t layer)
{
    uint32_t first = layer * planner->n_expert, last = first + planner->n_expert;
    uint32_t live[PR_COPIES_MAX], *quota = planner->count;
    for (uint32_t pair = first; planner->before != NULL && pair < last; pair++) {
        uint32_t n = planner_live(planner, pair, live);
        for (uint32_t i = 0; i < n && planner->n_owner[pair] == 0; i++) {
            if (quota[live[i]] > 0) {
                planner_own(planner, pair, live[i]);
                quota[live[i]]--;
            }
        }
    }
    for (uint32_t pair = first; pair < last; pair++) {
        if (planner->n_owner[pair] == 0) {
            planner_move(planner, pair);
        }
    }
    for (uint32_t r = 0; r < planner->n_rank; r++) {
        planner->room[r] += quota[r]; /* of what stayed elsewhere */
    }
}

/* Copies that are there already cost nothing but their room. */
static void planner_keep_copies(placement_planner *planner)
{
    uint32_t live[PR_COPIES_MAX];
    for (uint32_t pair = 0; pair < planner->n_layer * planner->n_expert; pair++) {
        uint32_t n = planner_live(planner, pair, live);
        for (uint32_t i = 0; n > 1 && i < n && planner->n_owner[pair] < n; i++) {
            if (planner->room[live[i]] > 0 && !planner_owns(planner, pair, live[i])) {
                planner_own(planner, pair, live[i]);
                planner->room[live[i]]--;
            }
        }
    }
}

static void planner_count_spare(placement_planner *planner)
{
    memcpy(planner->spare, planner->capacity, sizeof(uint64_t) * planner->n_rank);
    for (uint32_t old = 0; planner->before != NULL && old < planner->before->n_rank; old++) {
        uint32_t rank = planner->rank_now[old];
        if (rank < planner->n_rank) {
            uint64_t n = pr_placement_count(planner->before, old);
            planner->spare[rank] -= n < planner->spare[rank] ? n : planner->spare[rank];
        }
    }
}

static void planner_spread(placement_planner *planner)
{
    memset(planner->n_owner, 0, (size_t)planner->n_layer * planner->n_expert);
    memcpy(planner->room, planner->capacity, sizeof(uint64_t) * planner->n_rank);
    planner_count_spare(planner);
    for (uint32_t layer = 0; layer < planner->n_layer; layer++) {
        planner_set_quotas(planner, layer);
        planner_place_layer(planner, layer);
    }
    if (planner->before != NULL) {
        planner_keep_copies(planner);
    }
}

static void planner_name_ranks(placement_planner *planner, const uint32_t *rank_member)
{
    const pr_placement *before = planner->before;
    for (uint32_t old = 0; old < before->n_rank; old++) {
        uint32_t rank = 0;
        while (rank < planner->n_rank && rank_member[rank] != before->rank_member[old]) {
            rank++;
        }
        planner->rank_now[old] = rank;
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
    placement_planner planner = {
        .n_layer = n_layer, .n_expert = n_expert, .n_rank = n_rank, .capacity = capacity, .before = before};
    planner.room = cm_alloc(sizeof(uint64_t) * n_rank);
    planner.spare = cm_alloc(sizeof(uint64_t) * n_rank);
    planner.count = cm_alloc(sizeof(uint32_t) * n_rank);
    planner.owners = cm_alloc(sizeof(uint16_t) * PR_COPIES_MAX * need);
    planner.n_owner = cm_alloc(need);
    if (before != NULL) {
        planner.rank_now = cm_alloc(sizeof(uint32_t) * before->n_rank);
        planner_name_ranks(&planner, rank_member);
    }
    if (!planner_adopt(&planner)) {
        planner_spread(&planner);
    }
    *placement_out = pr_placement_build(n_layer, n_expert, rank_member, n_rank, planner.owners,
                                        planner.n_owner, PR_COPIES_MAX);
    cm_free(planner.room);
    cm_free(planner.spare);
    cm_free(planner.count);
    cm_free(planner.owners);
    cm_free(planner.n_owner);
    cm_free(planner.rank_now);
    return CM_OK;
}

/* ---- who would take over ---- */

void pr_placement_heirs(const pr_placement *p, const uint64_t *capacity, uint32_t rank, uint8_t *takes_out)
{
    uint32_t *left = cm_alloc(sizeof(uint32_t) * p->n_rank);
    uint64_t *room = cm_alloc(sizeof(uint64_t) * p->n_rank);
    memset(takes_out, 0, placement_pairs(p));
    for (uint32_t gone = 0; gone < p->n_rank; gone++) {
        pr_placement *after;
        uint32_t n = 0;
        for (uint32_t r = 0; r < p->n_rank; r++) {
            if (r != gone) {
                left[n] = p->rank_member[r];
                room[n++] = capacity[r];
            }
        }
        if (gone == rank ||
            pr_placement_plan(p->n_layer, p->n_expert, left, n, room, p, &after, NULL) != CM_OK) {
            continue; /* without that one the others are too small: nobody takes over */
        }
        uint32_t now = pr_placement_rank_of(after, p->rank_member[rank]);
        for (uint32_t i = 0; i < placement_pairs(p); i++) {
            takes_out[i] |= pr_placement_owns(after, i / p->n_expert, i % p->n_expert, now) &&
                            !pr_placement_owns(p, i / p->n_expert, i % p->n_expert, rank);
        }
        pr_placement_free(after);
    }
    cm_free(left);
    cm_free(room);
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
    bool none = message->n_layer == 0 && message->n_expert == 0 && message->n_rank_member == 0;
    if ((n_pair == 0 && !none) || n_pair > 1u << 24 || message->n_first != n_pair + 1 ||
        (message->n_rank_member == 0 && !none) || message->n_rank_member > PR_RANK_MAX) {
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
    if (!none) {
        memcpy(p->rank_member, message->rank_member, sizeof(uint32_t) * p->n_rank);
    }
    memcpy(p->first, message->first, sizeof(uint32_t) * (n_pair + 1));
    for (size_t i = 0; i < message->n_owner; i++) {
        p->owner[i] = (uint16_t)message->owner[i];
    }
    *placement_out = p;
    return CM_OK;
}
