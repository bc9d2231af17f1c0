#include "coordinator/balance_core.h"

#include <math.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

/* The largest of a layer's loads is a bad guide: when two ranks share it no single move makes it smaller. So
 * a layer's cost is the 16-norm of its ranks' loads, close to the largest and smaller with every step in the
 * right direction: taken with multiplications and square roots only, which give the same bits everywhere. */

/* Room that a rank must have to take an expert for good: an exchange passes through the last place, so that a
 * full cluster can still be balanced. */
enum { BALANCE_ROOM = 2 };
#define BALANCE_GAIN                                                                                         \
    0.005 /* of a layer's cost, for each expert that has to be loaded; less is not worth it */

#define BALANCE_WORTH 0.002 /* of the imbalance; an epoch that brings less is not made */

typedef enum action_kind { ACTION_NONE, ACTION_MOVE, ACTION_SWAP, ACTION_COPY } action_kind;

/* On the most loaded rank of a layer: expert goes to `to`, is exchanged for `other` there, or copied there.
 */
typedef struct action {
    action_kind kind;
    uint32_t expert, from, to, other;
    double gain; /* of the layer's cost, for each load */
} action;

typedef struct balance {
    const pr_placement *now;
    uint32_t n_expert, n_rank;
    uint16_t *owners; /* [pair][PR_COPIES_MAX] */
    uint8_t *n_owner; /* [pair] */
    uint64_t *room;   /* [n_rank] further pairs it can load */
    double *share;    /* [pair] load of one copy */
    double *load;     /* [n_layer][n_rank] */
    double *mean;     /* [n_layer] of a rank; 0: the layer has no load */
    action *best;     /* [n_layer]; gain < 0: to be looked for again */
} balance;

/* ---- sums ---- */

static double power16(double x)
{
    x *= x;
    x *= x;
    x *= x;
    return x * x;
}

static double root16(double x)
{
    return sqrt(sqrt(sqrt(sqrt(x))));
}

static const uint16_t *pair_owners(const balance *b, uint32_t pair)
{
    return b->owners + (size_t)pair * PR_COPIES_MAX;
}

static bool pair_owns(const balance *b, uint32_t pair, uint32_t rank)
{
    const uint16_t *owners = pair_owners(b, pair);
    for (uint32_t i = 0; i < b->n_owner[pair]; i++) {
        if (owners[i] == rank) {
            return true;
        }
    }
    return false;
}

static void layer_sum(balance *b, uint32_t layer, const uint64_t *load)
{
    double *sums = b->load + (size_t)layer * b->n_rank, total = 0;
    memset(sums, 0, sizeof(double) * b->n_rank);
    for (uint32_t e = 0; e < b->n_expert; e++) {
        uint32_t pair = layer * b->n_expert + e;
        b->share[pair] = (double)load[pair] / b->n_owner[pair];
        for (uint32_t i = 0; i < b->n_owner[pair]; i++) {
            sums[pair_owners(b, pair)[i]] += b->share[pair];
        }
        total += (double)load[pair];
    }
    b->mean[layer] = total / b->n_rank;
    b->best[layer].gain = -1;
}

static double layer_max(const balance *b, uint32_t layer, uint32_t *rank_out)
{
    const double *sums = b->load + (size_t)layer * b->n_rank;
    uint32_t top = 0;
    for (uint32_t r = 1; r < b->n_rank; r++) {
        top = sums[r] > sums[top] ? r : top;
    }
    *rank_out = top;
    return sums[top];
}

static double balance_ratio(const balance *b)
{
    double most = 0, mean = 0;
    uint32_t rank;
    for (uint32_t layer = 0; layer < b->now->n_layer; layer++) {
        most += layer_max(b, layer, &rank);
        mean += b->mean[layer];
    }
    return mean > 0 ? most / mean : 1;
}

/* ---- what may be done in a layer ---- */

/* The layer's sum of powers, in means, and what it becomes when some loads change. */
typedef struct layer_cost {
    const double *load;
    double mean, powers;
} layer_cost;

static double cost_change(const layer_cost *cost, uint32_t rank, double by)
{
    double is = cost->load[rank] / cost->mean, will = (cost->load[rank] + by) / cost->mean;
    return power16(will > 0 ? will : 0) - power16(is);
}

static double cost_gain(const layer_cost *cost, double change, uint32_t n_loads)
{
    double powers = cost->powers + change;
    return (root16(cost->powers) - root16(powers > 0 ? powers : 0)) * cost->mean / n_loads;
}

static void take_better(action *best, action_kind kind, uint32_t expert, uint32_t from, uint32_t to,
                        uint32_t other, double gain)
{
    if (gain > best->gain) {
        *best = (action){kind, expert, from, to, other, gain};
    }
}

static void try_move(const balance *b, uint32_t layer, const layer_cost *cost, uint32_t e, uint32_t from,
                     uint32_t to, action *best)
{
    if (b->room[to] < BALANCE_ROOM) {
        return;
    }
    double share = b->share[layer * b->n_expert + e];
    double change = cost_change(cost, from, -share) + cost_change(cost, to, share);
    take_better(best, ACTION_MOVE, e, from, to, 0, cost_gain(cost, change, 1));
}

static void try_copy(const balance *b, uint32_t layer, const layer_cost *cost, uint32_t e, uint32_t from,
                     uint32_t to, action *best)
{
    uint32_t pair = layer * b->n_expert + e, n = b->n_owner[pair];
    if (n == PR_COPIES_MAX || b->room[to] < BALANCE_ROOM) {
        return;
    }
    double share = b->share[pair], less = share * n / (n + 1), change = cost_change(cost, to, less);
    for (uint32_t i = 0; i < n; i++) {
        change += cost_change(cost, pair_owners(b, pair)[i], less - share);
    }
    take_better(best, ACTION_COPY, e, from, to, 0, cost_gain(cost, change, 1));
}

static void try_swaps(const balance *b, uint32_t layer, const layer_cost *cost, uint32_t e, uint32_t from,
                      uint32_t to, action *best)
{
    uint32_t first = layer * b->n_expert, other = b->n_expert;
    double lowest = 0, share = b->share[first + e];
    for (uint32_t f = 0; f < b->n_expert; f++) {
        double by = share - b->share[first + f];
        if (f == e || by <= 0 || !pair_owns(b, first + f, to) || pair_owns(b, first + f, from)) {
            continue;
        }
        double change = cost_change(cost, from, -by) + cost_change(cost, to, by);
        if (change < lowest) {
            lowest = change;
            other = f;
        }
    }
    if (other < b->n_expert) {
        take_better(best, ACTION_SWAP, e, from, to, other, cost_gain(cost, lowest, 2));
    }
}

static action layer_best(const balance *b, uint32_t layer)
{
    action best = {.kind = ACTION_NONE, .gain = 0};
    layer_cost cost = {.load = b->load + (size_t)layer * b->n_rank, .mean = b->mean[layer]};
    uint32_t from;
    if (cost.mean <= 0) {
        return best;
    }
    layer_max(b, layer, &from);
    for (uint32_t r = 0; r < b->n_rank; r++) {
        cost.powers += power16(cost.load[r] / cost.mean);
    }
    best.gain = root16(cost.powers) * cost.mean * BALANCE_GAIN;
    for (uint32_t e = 0; e < b->n_expert; e++) {
        uint32_t pair = layer * b->n_expert + e;
        if (b->share[pair] <= 0 || !pair_owns(b, pair, from)) {
            continue;
        }
        for (uint32_t to = 0; to < b->n_rank; to++) {
            if (b->room[to] == 0 || cost.load[to] >= cost.load[from] || pair_owns(b, pair, to)) {
                continue;
            }
            try_move(b, layer, &cost, e, from, to, &best);
            try_copy(b, layer, &cost, e, from, to, &best);
            if (b->room[from] > 0) {
                try_swaps(b, layer, &cost, e, from, to, &best);
            }
        }
    }
    return best;
}

/* ---- doing it ---- */

/* Does the rank hold it now: then its place is taken until the epoch in force is gone, whatever comes. */
static bool pair_held(const balance *b, uint32_t pair, uint32_t rank)
{
    return pr_placement_owns(b->now, pair / b->n_expert, pair % b->n_expert, rank);
}

static void pair_drop(balance *b, uint32_t pair, uint32_t rank, uint32_t *n_loads)
{
    uint16_t *owners = b->owners + (size_t)pair * PR_COPIES_MAX;
    uint32_t i = 0;
    while (owners[i] != rank) {
        i++;
    }
    memmove(owners + i, owners + i + 1, sizeof(owners[0]) * (b->n_owner[pair] - i - 1));
    b->n_owner[pair]--;
    if (!pair_held(b, pair, rank)) { /* came a moment ago and moves on */
        b->room[rank]++;
        (*n_loads)--;
    }
}

static void pair_add(balance *b, uint32_t pair, uint32_t rank, uint32_t *n_loads)
{
    b->owners[(size_t)pair * PR_COPIES_MAX + b->n_owner[pair]++] = (uint16_t)rank;
    if (!pair_held(b, pair, rank)) {
        b->room[rank]--;
        (*n_loads)++;
    }
}

static void balance_act(balance *b, uint32_t layer, const action *a, uint32_t *n_loads)
{
    uint32_t first = layer * b->n_expert;
    if (a->kind != ACTION_COPY) {
        pair_drop(b, first + a->expert, a->from, n_loads);
    }
    pair_add(b, first + a->expert, a->to, n_loads);
    if (a->kind == ACTION_SWAP) {
        pair_drop(b, first + a->other, a->to, n_loads);
        pair_add(b, first + a->other, a->from, n_loads);
    }
}

/* Whether the copy on owner k can be missed: without it no rank of the layer comes near its largest load. */
static bool copy_is_idle(const balance *b, uint32_t pair, uint32_t k, double load, double bound)
{
    const double *sums = b->load + (size_t)(pair / b->n_expert) * b->n_rank;
    uint32_t n = b->n_owner[pair];
    double more = load / (n - 1) - b->share[pair];
    for (uint32_t i = 0; i < n; i++) {
        if (i != k && sums[pair_owners(b, pair)[i]] + more > bound) {
            return false;
        }
    }
    return true;
}

/* Where room is short, copies of experts that are not hot any more give it back, in time for the round after
 * this. */
static void balance_drop_idle(balance *b, const uint64_t *load)
{
    for (uint32_t pair = 0; pair < b->now->n_layer * b->n_expert; pair++) {
        uint32_t layer = pair / b->n_expert, top, none = 0;
        double bound = 0.8 * layer_max(b, layer, &top);
        for (uint32_t k = 0; b->n_owner[pair] > 1 && k < b->n_owner[pair];) {
            uint32_t rank = pair_owners(b, pair)[k];
            if (b->room[rank] < BALANCE_ROOM && copy_is_idle(b, pair, k, (double)load[pair], bound)) {
                pair_drop(b, pair, rank, &none);
                layer_sum(b, layer, load);
            } else {
                k++;
            }
        }
    }
}

/* A rank that is full since an action was found cannot take it any more. */
static bool action_possible(const balance *b, const action *a)
{
    static const uint64_t rooms[] = {
        [ACTION_MOVE] = BALANCE_ROOM, [ACTION_SWAP] = 1, [ACTION_COPY] = BALANCE_ROOM};
    return a->gain >= 0 && (a->kind == ACTION_NONE || (b->room[a->to] >= rooms[a->kind] &&
                                                       (a->kind != ACTION_SWAP || b->room[a->from] > 0)));
}

/* The best action of all layers that takes at most n_max loads; n_layer when there is none. */
static uint32_t balance_choose(balance *b, uint32_t n_max)
{
    uint32_t chosen = b->now->n_layer;
    for (uint32_t layer = 0; layer < b->now->n_layer; layer++) {
        action *a = &b->best[layer];
        if (!action_possible(b, a)) {
            *a = layer_best(b, layer);
        }
        bool fits = a->kind != ACTION_NONE && (a->kind == ACTION_SWAP ? 2u : 1u) <= n_max;
        if (fits && (chosen == b->now->n_layer || a->gain > b->best[chosen].gain)) {
            chosen = layer;
        }
    }
    return chosen;
}

/* ---- the whole ---- */

static void balance_init(balance *b, const pr_placement *now, const uint64_t *load)
{
    uint32_t n_pair = now->n_layer * now->n_expert;
    *b = (balance){.now = now, .n_expert = now->n_expert, .n_rank = now->n_rank};
    b->owners = cm_alloc(sizeof(uint16_t) * PR_COPIES_MAX * n_pair);
    b->n_owner = cm_alloc(n_pair);
    b->room = cm_alloc(sizeof(uint64_t) * now->n_rank);
    b->share = cm_alloc(sizeof(double) * n_pair);
    b->load = cm_alloc(sizeof(double) * now->n_layer * now->n_rank);
    b->mean = cm_alloc(sizeof(double) * now->n_layer);
    b->best = cm_alloc(sizeof(action) * now->n_layer);
    for (uint32_t pair = 0; pair < n_pair; pair++) {
        uint32_t n;
        const uint16_t *owners = pr_placement_owners(now, pair / now->n_expert, pair % now->n_expert, &n);
        CM_ASSERT(n > 0);
        b->n_owner[pair] = (uint8_t)(n < PR_COPIES_MAX ? n : PR_COPIES_MAX);
        memcpy(b->owners + (size_t)pair * PR_COPIES_MAX, owners, sizeof(uint16_t) * b->n_owner[pair]);
    }
    for (uint32_t layer = 0; layer < now->n_layer; layer++) {
        layer_sum(b, layer, load);
    }
}

static void balance_fini(balance *b)
{
    cm_free(b->owners);
    cm_free(b->n_owner);
    cm_free(b->room);
    cm_free(b->share);
    cm_free(b->load);
    cm_free(b->mean);
    cm_free(b->best);
}

double co_balance_imbalance(const pr_placement *place, const uint64_t *load)
{
    balance b;
    balance_init(&b, place, load);
    double ratio = balance_ratio(&b);
    balance_fini(&b);
    return ratio;
}

static void balance_set_rooms(balance *b, const uint64_t *capacity)
{
    for (uint32_t r = 0; r < b->n_rank; r++) {
        uint32_t n = pr_placement_count(b->now, r);
        b->room[r] = capacity[r] > n ? capacity[r] - n : 0;
    }
}

static uint32_t balance_copies(const balance *b)
{
    uint32_t n = 0;
    for (uint32_t pair = 0; pair < b->now->n_layer * b->n_expert; pair++) {
        n += b->n_owner[pair];
    }
    return n;
}

pr_placement *co_balance_plan(const pr_placement *now, const uint64_t *load, const uint64_t *capacity,
                              uint32_t moves_max, co_balance_report *report_out)
{
    balance b;
    co_balance_report report = {0};
    balance_init(&b, now, load);
    balance_set_rooms(&b, capacity);
    report.before = balance_ratio(&b);
    uint32_t n_before = balance_copies(&b);
    balance_drop_idle(&b, load);
    bool drops = balance_copies(&b) < n_before; /* makes room for the round after this one */
    uint32_t layer;
    while ((layer = balance_choose(&b, moves_max - report.n_moves)) < now->n_layer) {
        action a = b.best[layer];
        balance_act(&b, layer, &a, &report.n_moves);
        layer_sum(&b, layer, load);
    }
    report.after = balance_ratio(&b);
    report.n_dropped = n_before + report.n_moves - balance_copies(&b);
    *report_out = report;
    pr_placement *next = NULL;
    if (drops || report.before - report.after >= BALANCE_WORTH * report.before) {
        next = pr_placement_build(now->n_layer, now->n_expert, now->rank_member, now->n_rank, b.owners,
                                  b.n_owner, PR_COPIES_MAX);
    }
    balance_fini(&b);
    return next;
}
