#include "gateway/tenant_core.h"

#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

enum {
    QUANTUM_TOKENS = 64,  /* of weight 1 and one round */
    RESERVE_PART = 8,     /* of the room, for those below their share */
    CROWDED_PERCENT = 75, /* of all turns; beyond it nobody gets more than a share of them */
    OUTPUT_FIRST = 256,   /* expected of an answer before any was seen */
    OUTPUT_PART = 8,      /* what a new answer changes in that */
    QUEUE_DEFAULT = 256,
    RETRY_MS = 1000, /* when a queue is full: it is not known when it will not be */
};

/* What may be used up in a minute, refilled all the time. Below zero: it was used before it was there. */
typedef struct bucket {
    uint64_t per_minute; /* 0: no limit */
    double level;
    uint64_t at_ms;
} bucket;

struct gw_tenant {
    TAILQ_ENTRY(gw_tenant) link;
    char name[GW_TENANT_NAME_MAX + 1];
    uint32_t index;
    bool in_force;
    gw_tenant_limits limits;
    gw_turn_list queue;
    uint32_t n_held, n_waiting, n_running;
    int64_t deficit;
    uint64_t output_mean; /* tokens of its answers; 0: none has ended yet */
    bucket requests, tokens;
};

/* ---- buckets ---- */

static void bucket_set(bucket *b, uint64_t per_minute)
{
    double most = (double)per_minute;
    if (b->per_minute == 0 || b->level > most) {
        b->level = most;
    }
    b->per_minute = per_minute;
}

static void bucket_fill(bucket *b, uint64_t now_ms)
{
    double most = (double)b->per_minute;
    b->level += (double)(now_ms - b->at_ms) * most / 60000.0;
    b->level = b->level < most ? b->level : most;
    b->at_ms = now_ms;
}

/* 0: least is there. */
static uint32_t bucket_wait_ms(const bucket *b, double least)
{
    if (b->per_minute == 0 || b->level >= least) {
        return 0;
    }
    double ms = (least - b->level) * 60000.0 / (double)b->per_minute;
    uint32_t whole = ms < 3600000.0 ? (uint32_t)ms : 3600000u;
    return whole < ms ? whole + 1 : whole;
}

static void bucket_take(bucket *b, int64_t n)
{
    if (b->per_minute > 0) {
        b->level -= (double)n;
    }
}

/* ---- tenants ---- */

void gw_tenant_limits_defaults(gw_tenant_limits *limits)
{
    *limits = (gw_tenant_limits){.weight = 1, .queue_max = QUEUE_DEFAULT};
}

void gw_turns_init(gw_turns *turns, uint32_t held_max)
{
    *turns =
        (gw_turns){.n_gateway = 1, .held_max = held_max, .due_ms = UINT64_MAX, .output_mean = OUTPUT_FIRST};
    TAILQ_INIT(&turns->tenants);
}

void gw_turns_fini(gw_turns *turns)
{
    gw_tenant *tenant;
    CM_ASSERT(turns->n_held == 0);
    while ((tenant = TAILQ_FIRST(&turns->tenants)) != NULL) {
        TAILQ_REMOVE(&turns->tenants, tenant, link);
        cm_free(tenant);
    }
}

void gw_turns_set_room(gw_turns *turns, uint32_t room, uint32_t ahead)
{
    CM_ASSERT(ahead <= room);
    turns->room = room;
    turns->ahead = ahead;
}

/* Ours of a limit; 0 stays 0, which is none. */
static uint64_t part_of(const gw_turns *turns, uint64_t limit)
{
    return limit / turns->n_gateway + (limit % turns->n_gateway != 0);
}

static void set_buckets(const gw_turns *turns, gw_tenant *tenant)
{
    bucket_set(&tenant->requests, part_of(turns, tenant->limits.requests_per_minute));
    bucket_set(&tenant->tokens, part_of(turns, tenant->limits.tokens_per_minute));
}

void gw_turns_set_gateways(gw_turns *turns, uint64_t now_ms, uint32_t n)
{
    gw_tenant *tenant;
    CM_ASSERT(n > 0);
    turns->n_gateway = n;
    TAILQ_FOREACH (tenant, &turns->tenants, link) {
        bucket_fill(&tenant->requests, now_ms);
        bucket_fill(&tenant->tokens, now_ms);
        set_buckets(turns, tenant);
    }
}

void gw_tenant_change(gw_turns *turns, gw_tenant *tenant, bool in_force, const gw_tenant_limits *limits)
{
    CM_ASSERT(limits->weight >= 1 && limits->weight <= GW_WEIGHT_MAX);
    if (tenant->in_force) {
        turns->n_in_force--;
        turns->weights -= tenant->limits.weight;
    }
    tenant->in_force = in_force;
    tenant->limits = *limits;
    if (in_force) {
        turns->n_in_force++;
        turns->weights += limits->weight;
    }
    set_buckets(turns, tenant);
}

gw_tenant *gw_turns_add_tenant(gw_turns *turns, const char *name, const gw_tenant_limits *limits)
{
    gw_tenant *tenant = cm_alloc(sizeof(*tenant));
    CM_ASSERT(strlen(name) <= GW_TENANT_NAME_MAX && gw_turns_find_tenant(turns, name) == NULL);
    snprintf(tenant->name, sizeof(tenant->name), "%s", name);
    tenant->index = turns->n_tenant++;
    TAILQ_INIT(&tenant->queue);
    TAILQ_INSERT_TAIL(&turns->tenants, tenant, link);
    gw_tenant_change(turns, tenant, true, limits);
    return tenant;
}

gw_tenant *gw_turns_find_tenant(const gw_turns *turns, const char *name)
{
    gw_tenant *tenant;
    TAILQ_FOREACH (tenant, &turns->tenants, link) {
        if (strcmp(tenant->name, name) == 0) {
            return tenant;
        }
    }
    return NULL;
}

gw_tenant *gw_turns_next_tenant(const gw_turns *turns, const gw_tenant *tenant)
{
    return tenant == NULL ? TAILQ_FIRST(&turns->tenants) : TAILQ_NEXT(tenant, link);
}

void gw_tenant_get(const gw_tenant *tenant, gw_tenant_state *out)
{
    *out = (gw_tenant_state){.name = tenant->name,
                             .index = tenant->index,
                             .in_force = tenant->in_force,
                             .limits = tenant->limits,
                             .n_held = tenant->n_held,
                             .n_waiting = tenant->n_waiting,
                             .n_running = tenant->n_running,
                             .deficit = tenant->deficit};
}

const char *gw_tenant_name(const gw_tenant *tenant)
{
    return tenant->name;
}

/* ---- who is let in ---- */

/* n of total is less than the tenant's part of it. */
static bool below_share(const gw_turns *turns, const gw_tenant *tenant, uint32_t n, uint32_t total)
{
    return (uint64_t)n * turns->weights < (uint64_t)total * tenant->limits.weight;
}

static cm_status refuse(gw_turn_no *no_out, gw_turn_refusal why, uint64_t limit, uint32_t retry_ms)
{
    *no_out = (gw_turn_no){.why = why, .limit = limit, .retry_ms = retry_ms};
    return CM_E_CAPACITY;
}

/* How many more could run at once. */
static uint32_t slots_left(const gw_turns *turns, const gw_tenant *tenant)
{
    uint32_t room = turns->room > turns->n_running ? turns->room - turns->n_running : 0;
    uint64_t most = part_of(turns, tenant->limits.running_max);
    if (most == 0) {
        return room;
    }
    uint64_t own = most > tenant->n_running ? most - tenant->n_running : 0;
    return own < room ? (uint32_t)own : room;
}

static cm_status check_queues(const gw_turns *turns, const gw_tenant *tenant, gw_turn_no *no_out)
{
    uint32_t mine = tenant->n_held + tenant->n_waiting + tenant->n_running;
    bool crowded = (uint64_t)turns->n_held * 100 >= (uint64_t)turns->held_max * CROWDED_PERCENT;
    if (turns->n_held >= turns->held_max || (crowded && !below_share(turns, tenant, mine, turns->held_max))) {
        return refuse(no_out, GW_TURN_FULL, turns->held_max, RETRY_MS);
    }
    uint64_t queue_max = part_of(turns, tenant->limits.queue_max);
    if ((uint64_t)tenant->n_held + tenant->n_waiting >= queue_max + slots_left(turns, tenant)) {
        return refuse(no_out, GW_TURN_QUEUE_FULL, queue_max, RETRY_MS);
    }
    return CM_OK;
}

cm_status gw_turns_admit(gw_turns *turns, uint64_t now_ms, gw_tenant *tenant, bool first, gw_turn *turn,
                         gw_turn_no *no_out)
{
    CM_ASSERT(turn->state == GW_TURN_NONE);
    CM_TRY(check_queues(turns, tenant, no_out));
    bucket_fill(&tenant->requests, now_ms);
    bucket_fill(&tenant->tokens, now_ms);
    uint32_t wait_ms = first ? bucket_wait_ms(&tenant->requests, 1) : 0;
    if (wait_ms > 0) {
        return refuse(no_out, GW_TURN_MANY_REQUESTS, tenant->requests.per_minute, wait_ms);
    }
    wait_ms = bucket_wait_ms(&tenant->tokens, 1);
    if (wait_ms > 0) {
        return refuse(no_out, GW_TURN_MANY_TOKENS, tenant->tokens.per_minute, wait_ms);
    }
    bucket_take(&tenant->requests, first ? 1 : 0);
    turn->state = GW_TURN_HELD;
    turn->tenant = tenant;
    tenant->n_held++;
    turns->n_held++;
    return CM_OK;
}

/* ---- a turn's life ---- */

static uint64_t expected_cost(const gw_turns *turns, const gw_turn *turn)
{
    uint64_t own = turn->tenant->output_mean, mean = own > 0 ? own : turns->output_mean;
    return turn->n_prompt + (mean < turn->tokens_max ? mean : turn->tokens_max);
}

void gw_turns_wait(gw_turns *turns, uint64_t now_ms, gw_turn *turn, uint32_t n_prompt, uint32_t tokens_max,
                   uint64_t deadline_ms)
{
    gw_tenant *tenant = turn->tenant;
    CM_ASSERT(turn->state == GW_TURN_HELD);
    turn->state = GW_TURN_WAITING;
    turn->n_prompt = n_prompt;
    turn->tokens_max = tokens_max;
    turn->reserved = expected_cost(turns, turn);
    turn->deadline_ms = deadline_ms;
    bucket_fill(&tenant->tokens, now_ms);
    bucket_take(&tenant->tokens, (int64_t)turn->reserved);
    turns->n_crowded += tenant->n_waiting == 0;
    TAILQ_INSERT_TAIL(&tenant->queue, turn, link);
    tenant->n_held--;
    tenant->n_waiting++;
    turns->due_ms = deadline_ms < turns->due_ms ? deadline_ms : turns->due_ms;
}

static void turn_run(gw_turns *turns, gw_turn *turn)
{
    turn->state = GW_TURN_RUNNING;
    turn->tenant->n_running++;
    turns->n_running++;
}

void gw_turns_go_on(gw_turns *turns, gw_turn *turn)
{
    CM_ASSERT(turn->state == GW_TURN_HELD);
    turn->free = true;
    turn->tenant->n_held--;
    turn_run(turns, turn);
}

static void turn_unqueue(gw_turn *turn)
{
    TAILQ_REMOVE(&turn->tenant->queue, turn, link);
    turn->tenant->n_waiting--;
}

/* Credit is for what waits: nobody saves it up. */
static void forget_credit(gw_tenant *tenant)
{
    bool idle = tenant->n_waiting == 0 && tenant->n_running == 0;
    if (idle || (tenant->n_waiting == 0 && tenant->deficit > 0)) {
        tenant->deficit = 0;
    }
}

static uint64_t mean_with(uint64_t mean, uint32_t n_output)
{
    int64_t moved = (int64_t)mean + ((int64_t)n_output - (int64_t)mean) / OUTPUT_PART;
    return moved > 1 ? (uint64_t)moved : 1;
}

/* What it was charged with becomes what it has cost. Tokens come back only if nobody has begun to wait since:
 * they were bought when those did not compete, and would be turns ahead of them. */
static void correct(gw_turns *turns, gw_turn *turn, uint32_t n_output)
{
    gw_tenant *tenant = turn->tenant;
    int64_t spent = (int64_t)turn->n_prompt + n_output, back = (int64_t)turn->cost - spent;
    if (back < 0 || turn->n_crowded == turns->n_crowded) {
        tenant->deficit += back;
    }
    bucket_take(&tenant->tokens, spent - (int64_t)turn->reserved);
    turns->output_mean = mean_with(turns->output_mean, n_output);
    tenant->output_mean =
        tenant->output_mean > 0 ? mean_with(tenant->output_mean, n_output) : turns->output_mean;
}

void gw_turns_end(gw_turns *turns, uint64_t now_ms, gw_turn *turn, uint32_t n_output)
{
    gw_tenant *tenant = turn->tenant;
    if (turn->state == GW_TURN_NONE) {
        return;
    }
    bucket_fill(&tenant->tokens, now_ms);
    if (turn->state == GW_TURN_HELD) {
        tenant->n_held--;
    } else if (turn->state == GW_TURN_WAITING) {
        turn_unqueue(turn);
        bucket_take(&tenant->tokens, -(int64_t)turn->reserved);
    } else {
        tenant->n_running--;
        turns->n_running--;
        if (!turn->free) {
            correct(turns, turn, n_output);
        }
    }
    turns->n_held--;
    turn->state = GW_TURN_NONE;
    forget_credit(tenant);
}

/* ---- whose turn it is ---- */

static bool may_run(const gw_turns *turns, const gw_tenant *tenant)
{
    uint32_t part = (turns->room - turns->ahead) / RESERVE_PART;
    uint32_t reserve = turns->n_in_force > 1 && part > 0 ? part + turns->ahead : 0;
    uint64_t most = part_of(turns, tenant->limits.running_max);
    bool limited = most > 0 && tenant->n_running >= most;
    return tenant->n_waiting > 0 && !limited &&
           (turns->n_running < turns->room - reserve ||
            below_share(turns, tenant, tenant->n_running, turns->room));
}

static int64_t quantum(const gw_tenant *tenant)
{
    return (int64_t)QUANTUM_TOKENS * tenant->limits.weight;
}

/* Rounds until its first one can be paid. */
static int64_t rounds_of(const gw_turns *turns, const gw_tenant *tenant)
{
    int64_t missing = (int64_t)expected_cost(turns, TAILQ_FIRST(&tenant->queue)) - tenant->deficit;
    return missing > 0 ? (missing + quantum(tenant) - 1) / quantum(tenant) : 0;
}

static gw_tenant *after(const gw_turns *turns, const gw_tenant *tenant)
{
    gw_tenant *next = tenant != NULL ? TAILQ_NEXT(tenant, link) : NULL;
    return next != NULL ? next : TAILQ_FIRST(&turns->tenants);
}

/* Who can be paid after the fewest rounds; of equals the one that comes first after the last turn's. */
static gw_tenant *choose(const gw_turns *turns, int64_t *rounds_out)
{
    gw_tenant *best = NULL, *first = after(turns, turns->at);
    gw_tenant *tenant = first;
    while (tenant != NULL) {
        int64_t rounds = may_run(turns, tenant) ? rounds_of(turns, tenant) : INT64_MAX;
        if (rounds < (best != NULL ? *rounds_out : INT64_MAX)) {
            best = tenant;
            *rounds_out = rounds;
        }
        tenant = after(turns, tenant);
        if (tenant == first) {
            break;
        }
    }
    return best;
}

static gw_turn *start_next(gw_turns *turns)
{
    gw_tenant *tenant;
    int64_t rounds = 0;
    gw_tenant *best = turns->n_running < turns->room ? choose(turns, &rounds) : NULL;
    if (best == NULL) {
        return NULL;
    }
    TAILQ_FOREACH (tenant, &turns->tenants, link) {
        if (rounds > 0 && may_run(turns, tenant)) {
            tenant->deficit += rounds * quantum(tenant);
        }
    }
    gw_turn *turn = TAILQ_FIRST(&best->queue);
    turns->at = best;
    turn->cost = expected_cost(turns, turn);
    turn->n_crowded = turns->n_crowded;
    best->deficit -= (int64_t)turn->cost;
    turn_unqueue(turn);
    turn_run(turns, turn);
    forget_credit(best);
    return turn;
}

/* due_ms is exact afterwards. */
static gw_turn *find_late(gw_turns *turns, uint64_t now_ms)
{
    gw_tenant *tenant;
    gw_turn *turn;
    if (now_ms < turns->due_ms) {
        return NULL;
    }
    turns->due_ms = UINT64_MAX;
    TAILQ_FOREACH (tenant, &turns->tenants, link) {
        TAILQ_FOREACH (turn, &tenant->queue, link) {
            turns->due_ms = turn->deadline_ms < turns->due_ms ? turn->deadline_ms : turns->due_ms;
            if (turn->deadline_ms <= now_ms) {
                return turn;
            }
        }
    }
    return NULL;
}

gw_turn *gw_turns_next(gw_turns *turns, uint64_t now_ms, cm_status *status_out)
{
    gw_turn *late = find_late(turns, now_ms);
    *status_out = late != NULL ? CM_E_DEADLINE : CM_OK;
    return late != NULL ? late : start_next(turns);
}

uint64_t gw_turns_due(const gw_turns *turns)
{
    return turns->due_ms;
}
