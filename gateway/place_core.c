#include "gateway/place_core.h"

#include <xxhash.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/base/rng.h"

enum { BACKOFF_MIN_MS = 100, BACKOFF_DOUBLINGS = 4, DEATHS_SUSPECT = 2 };
/* What a computed prompt is worth: so many sequences more than at the idlest router, and a part of those. */
enum { MORE_MIN = 2, MORE_PART = 4 };

struct gw_place_router {
    TAILQ_ENTRY(gw_place_router) link;
    uint64_t number, name;
    bool up;
    gw_place_standing standing;
    uint64_t n_sequences; /* as it said last */
    uint64_t n_asked;     /* by us since */
    uint32_t n_unanswered;
    uint32_t n_tried;    /* of those here, on trial */
    uint64_t trial_ms;   /* the newest trial here is waited for no longer */
    uint32_t n_refused;  /* in a row */
    uint64_t backoff_ms; /* no reopen before */
    uint64_t hold_ms;    /* down: its streams wait until then */
    uint64_t left_ms;    /* when it left the epoch */
    uint64_t leaver_ms;  /* OUT: nobody here moves on before */
    gw_spot_list here;   /* ASKED and RUNNING */
    gw_spot_list lost;
    TAILQ_HEAD(, gw_spot) copies; /* that are here for nobody */
};

void gw_place_init(gw_place *place, const gw_place_limits *limits)
{
    CM_ASSERT(limits->opens_max > 0);
    *place = (gw_place){.limits = *limits, .give_up_ms = UINT64_MAX, .changed = true};
    TAILQ_INIT(&place->routers);
    TAILQ_INIT(&place->waiting);
    TAILQ_INIT(&place->failed);
}

/* ---- routers ---- */

static gw_place_router *router_find(const gw_place *place, uint64_t number)
{
    gw_place_router *router;
    TAILQ_FOREACH (router, &place->routers, link) {
        if (router->number == number) {
            return router;
        }
    }
    return NULL;
}

static gw_place_router *router_of(gw_place *place, uint64_t number)
{
    gw_place_router *router = router_find(place, number);
    CM_ASSERT(number != 0);
    if (router == NULL) {
        router = cm_alloc(sizeof(*router));
        router->number = router->name = number;
        TAILQ_INIT(&router->here);
        TAILQ_INIT(&router->lost);
        TAILQ_INIT(&router->copies);
        TAILQ_INSERT_TAIL(&place->routers, router, link);
    }
    return router;
}

static void router_free(gw_place *place, gw_place_router *router)
{
    gw_spot *spot;
    CM_ASSERT(TAILQ_EMPTY(&router->here) && TAILQ_EMPTY(&router->lost));
    TAILQ_FOREACH (spot, &router->copies, copy_link) {
        spot->copy = 0;
        place->n_copied--;
    }
    TAILQ_REMOVE(&place->routers, router, link);
    cm_free(router);
}

void gw_place_fini(gw_place *place)
{
    CM_ASSERT(TAILQ_EMPTY(&place->waiting) && TAILQ_EMPTY(&place->failed) && place->n_copied == 0);
    while (!TAILQ_EMPTY(&place->routers)) {
        router_free(place, TAILQ_FIRST(&place->routers));
    }
}

static void router_rest(gw_place *place, uint64_t now_ms, gw_place_router *router)
{
    uint64_t wait_ms = (uint64_t)BACKOFF_MIN_MS << router->n_refused;
    double jitter = cm_rng_uniform(place->limits.seed, place->n_drawn++, 0);
    router->backoff_ms = now_ms + wait_ms + (uint64_t)(jitter * (double)wait_ms);
    router->n_refused += router->n_refused < BACKOFF_DOUBLINGS;
}

static bool router_takes(const gw_place *place, const gw_place_router *router, uint64_t now_ms)
{
    return router->up && router->standing == GW_PLACE_MEMBER && now_ms >= router->backoff_ms &&
           router->n_unanswered < place->limits.opens_max;
}

/* ---- where a spot is ---- */

static void spot_answered(gw_spot *spot)
{
    if (spot->counted) {
        CM_ASSERT(spot->router->n_unanswered > 0);
        spot->router->n_unanswered--;
        spot->counted = false;
    }
}

static bool spot_is_suspect(const gw_place *place, const gw_spot *spot)
{
    return place->limits.deaths_max > 0 && spot->n_deaths >= DEATHS_SUSPECT;
}

static void spot_end_trial(gw_spot *spot)
{
    if (spot->tried) {
        CM_ASSERT(spot->router->n_tried > 0);
        spot->router->n_tried--;
        spot->tried = false;
    }
}

static void spot_drop_copy(gw_place *place, gw_spot *spot)
{
    if (spot->copy != 0) {
        TAILQ_REMOVE(&router_find(place, spot->copy)->copies, spot, copy_link);
        spot->copy = 0;
        place->n_copied--;
    }
}

/* There is room for one: a copy that is forgotten for a newer one goes in its router's time. */
static void spot_leave_copy(gw_place *place, gw_spot *spot, uint64_t number)
{
    gw_place_router *router = router_find(place, number);
    spot_drop_copy(place, spot);
    if (router != NULL) {
        spot->copy = number;
        place->n_copied++;
        TAILQ_INSERT_TAIL(&router->copies, spot, copy_link);
    }
}

/* Out of the list of its state. */
static void spot_leave(gw_place *place, gw_spot *spot)
{
    switch (spot->state) {
    case GW_SPOT_NONE:
        break;
    case GW_SPOT_WAITING:
        place->next = place->next == spot ? TAILQ_NEXT(spot, link) : place->next;
        TAILQ_REMOVE(&place->waiting, spot, link);
        break;
    case GW_SPOT_ASKED:
    case GW_SPOT_RUNNING:
        spot_answered(spot);
        spot_end_trial(spot);
        TAILQ_REMOVE(&spot->router->here, spot, link);
        break;
    case GW_SPOT_LOST:
        TAILQ_REMOVE(&spot->router->lost, spot, link);
        break;
    case GW_SPOT_FAILED:
        TAILQ_REMOVE(&place->failed, spot, link);
        break;
    }
    spot->state = GW_SPOT_NONE;
    spot->router = NULL;
}

static void spot_fail(gw_place *place, gw_spot *spot, cm_status status)
{
    spot_leave(place, spot);
    spot->status = status;
    spot->state = GW_SPOT_FAILED;
    TAILQ_INSERT_TAIL(&place->failed, spot, link);
}

/* From now on the time runs after which it is given up; what it has been waiting already counts. */
static void spot_stall(gw_place *place, uint64_t now_ms, gw_spot *spot)
{
    if (spot->stalled_ms == UINT64_MAX) {
        spot->stalled_ms = now_ms;
    }
    uint64_t give_up_ms = spot->stalled_ms + place->limits.reopen_ms;
    place->give_up_ms = give_up_ms < place->give_up_ms ? give_up_ms : place->give_up_ms;
}

/* first: before all others, for what only changes its way of asking. */
static void spot_wait(gw_place *place, uint64_t now_ms, gw_spot *spot, bool first)
{
    spot_leave(place, spot);
    if (spot->left == 0) { /* it may go back to its copy */
        spot->left = spot->copy;
        spot_drop_copy(place, spot);
    }
    spot_stall(place, now_ms, spot);
    spot->state = GW_SPOT_WAITING;
    if (first) {
        TAILQ_INSERT_HEAD(&place->waiting, spot, link);
    } else {
        TAILQ_INSERT_TAIL(&place->waiting, spot, link);
        place->next = place->next == NULL ? spot : place->next; /* not seen yet */
    }
}

/* Its router has it no more, or cannot be asked whether it has. */
static void spot_lose(gw_place *place, uint64_t now_ms, gw_spot *spot)
{
    gw_place_router *router = spot->router;
    if (spot->state == GW_SPOT_RUNNING) {
        spot->stalled_ms =
            UINT64_MAX; /* it had a router until now, though perhaps only a place in its queue */
    }
    spot_leave(place, spot);
    if (spot->left != 0 && spot->left != router->number) {
        spot_leave_copy(place, spot, spot->left);
    }
    spot->left = router->number;
    if (spot->once) {
        spot_fail(place, spot, CM_E_RESET);
        return;
    }
    spot_stall(place, now_ms, spot);
    spot->state = GW_SPOT_LOST;
    spot->router = router;
    TAILQ_INSERT_TAIL(&router->lost, spot, link);
}

static bool spot_is_condemned(const gw_place *place, const gw_spot *spot)
{
    return place->limits.deaths_max > 0 && spot->n_deaths >= place->limits.deaths_max;
}

/* It has died, as far as anybody here can tell; a life ends but once. */
static void router_give_away(gw_place *place, uint64_t now_ms, gw_place_router *router)
{
    gw_spot *spot;
    while ((spot = TAILQ_FIRST(&router->lost)) != NULL) {
        spot->n_deaths += spot->died != router->number;
        spot->died = router->number;
        if (spot_is_condemned(place, spot)) {
            spot_fail(place, spot, CM_E_RESET);
        } else {
            spot_wait(place, now_ms, spot, false);
        }
    }
}

/* ---- what happens to routers ---- */

void gw_place_name(gw_place *place, uint64_t number, uint64_t name)
{
    router_of(place, number)->name = name;
}

void gw_place_up(gw_place *place, uint64_t number)
{
    place->changed = true;
    gw_place_router *router = router_of(place, number);
    CM_ASSERT(!router->up);
    router->up = true;
    router->n_sequences = router->n_asked = router->backoff_ms = 0;
    router->n_refused = 0;
}

void gw_place_down(gw_place *place, uint64_t now_ms, uint64_t number)
{
    place->changed = true;
    gw_place_router *router = router_of(place, number);
    router->up = false;
    router->hold_ms = now_ms + place->limits.rebind_ms;
    while (!TAILQ_EMPTY(&router->here)) {
        spot_lose(place, now_ms, TAILQ_FIRST(&router->here));
    }
    CM_ASSERT(router->n_unanswered == 0);
}

void gw_place_unreachable(gw_place *place, uint64_t number)
{
    place->changed = true;
    router_of(place, number)->hold_ms = 0;
}

void gw_place_stands(gw_place *place, uint64_t now_ms, uint64_t number, gw_place_standing standing)
{
    place->changed = true;
    gw_place_router *router = router_of(place, number);
    router->standing = standing;
    router->left_ms = now_ms;
    router->leaver_ms = 0;
}

void gw_place_gone(gw_place *place, uint64_t now_ms, uint64_t number)
{
    gw_place_router *router = router_of(place, number);
    gw_place_down(place, now_ms, number);
    router_give_away(place, now_ms, router);
    router_free(place, router);
}

void gw_place_load(gw_place *place, uint64_t number, uint64_t n_sequences)
{
    place->changed = true;
    gw_place_router *router = router_of(place, number);
    router->n_sequences = n_sequences;
    router->n_asked = 0;
}

bool gw_place_hosts(const gw_place *place, uint64_t number)
{
    const gw_place_router *router = router_find(place, number);
    return router != NULL && !TAILQ_EMPTY(&router->here);
}

/* ---- what happens to streams ---- */

/* Another could take it now. */
static bool any_takes(const gw_place *place, uint64_t now_ms)
{
    const gw_place_router *router;
    TAILQ_FOREACH (router, &place->routers, link) {
        if (router->up && router->standing == GW_PLACE_MEMBER && now_ms >= router->backoff_ms) {
            return true;
        }
    }
    return false;
}

static bool any_up(const gw_place *place)
{
    const gw_place_router *router;
    TAILQ_FOREACH (router, &place->routers, link) {
        if (router->up) {
            return true;
        }
    }
    return false;
}

/* There is one that may take it, now or once it is linked. */
static bool any_member(const gw_place *place)
{
    const gw_place_router *router;
    TAILQ_FOREACH (router, &place->routers, link) {
        if (router->standing == GW_PLACE_MEMBER) {
            return true;
        }
    }
    return false;
}

/* Judged by no router yet. */
static bool spot_is_fresh(const gw_spot *spot)
{
    return !spot->accepted && spot->status == CM_OK;
}

void gw_place_begin(gw_place *place, uint64_t now_ms, gw_spot *spot, uint64_t number)
{
    CM_ASSERT(spot->state == GW_SPOT_NONE);
    spot->stalled_ms = UINT64_MAX;
    spot->left = number;
    const gw_spot *first = TAILQ_FIRST(&place->waiting);
    if (first != NULL && !spot_is_fresh(first) && any_up(place) && !any_takes(place, now_ms)) {
        spot_fail(place, spot, CM_E_CAPACITY); /* older ones wait for room already */
    } else {
        spot_wait(place, now_ms, spot, false);
    }
}

/* The router that was taken for dead has it still. */
static void spot_take_death_back(const gw_place *place, gw_spot *spot)
{
    if (spot->resuming && spot->died == spot->router->number) {
        spot->died = 0;
        spot->n_deaths--;
        if (!spot_is_suspect(place, spot)) {
            spot_end_trial(spot);
        }
    }
}

void gw_place_word(gw_place *place, uint64_t now_ms, gw_spot *spot, bool tokens)
{
    place->changed = place->changed || spot->state == GW_SPOT_ASKED || spot->tried;
    if (spot->state == GW_SPOT_ASKED) {
        spot_answered(spot);
        spot->state = GW_SPOT_RUNNING;
        spot->accepted = true;
        spot->told_ms = now_ms;
        spot->router->n_refused = 0;
        spot_take_death_back(place, spot);
        if (spot->left != 0 && spot->left != spot->router->number) {
            spot_leave_copy(place, spot, spot->left);
        }
        spot->left = 0;
    }
    if (tokens) {
        spot->told_ms = now_ms;
        spot->n_deaths = 0;
        spot->died = 0;
        spot_end_trial(spot);
        /* words of a router that it is to leave: no place yet, but no standstill either */
        spot->stalled_ms = spot->state == GW_SPOT_RUNNING ? UINT64_MAX : now_ms;
    }
}

static bool may_be_retried(cm_status status)
{
    return status == CM_E_CAPACITY || status == CM_E_UNAVAILABLE || cm_status_scope(status) == CM_SCOPE_PEER;
}

bool gw_place_refused(gw_place *place, uint64_t now_ms, gw_spot *spot, cm_status status)
{
    place->changed = true;
    if (spot->state == GW_SPOT_WAITING) {
        return true; /* it has moved on from a router that left */
    }
    CM_ASSERT(spot->state == GW_SPOT_ASKED || spot->state == GW_SPOT_RUNNING);
    gw_place_router *router = spot->router;
    bool resuming = spot->state == GW_SPOT_ASKED && spot->resuming;
    spot_leave(place, spot);
    if (status == CM_E_REFUSED && !spot->once) {
        /* Its doors are closed for good and the epoch that says so is still on its way: that is nothing about
         * the stream, which is as new as before to the others. */
        router->standing = router->standing == GW_PLACE_MEMBER ? GW_PLACE_DRAINING : router->standing;
        if (spot->accepted || any_member(place)) {
            spot_wait(place, now_ms, spot, true);
            return true;
        }
    }
    spot->status = status;
    if (resuming && status == CM_E_NOT_FOUND) {
        spot->left = 0;
        spot_wait(place, now_ms, spot, true);
        return true;
    }
    /* The router has it from before we lost its link: it can be taken over there. */
    bool exists = status == CM_E_EXISTS && !resuming;
    if (!spot->once && (exists || may_be_retried(status))) {
        router_rest(place, now_ms, router);
        if (exists || spot->accepted || any_takes(place, now_ms)) {
            if (exists && spot->left != 0 && spot->left != router->number) {
                spot_leave_copy(place, spot, spot->left);
            }
            spot->left = exists ? router->number : spot->left;
            spot_wait(place, now_ms, spot, false);
            return true;
        }
    }
    return false;
}

uint32_t gw_place_end(gw_place *place, gw_spot *spot, uint64_t routers_out[GW_PLACE_COPIES])
{
    place->changed = true;
    const uint64_t numbers[GW_PLACE_COPIES] = {spot->left, spot->copy};
    uint32_t n = 0;
    for (uint32_t i = 0; i < GW_PLACE_COPIES; i++) {
        const gw_place_router *router = numbers[i] != 0 ? router_find(place, numbers[i]) : NULL;
        if (router != NULL && router->up && router != spot->router) {
            routers_out[n++] = numbers[i];
        }
    }
    spot_leave(place, spot);
    spot_drop_copy(place, spot);
    spot->left = 0;
    return n;
}

/* ---- what to do ---- */

/* While another one is on trial it may be that one's turn to be cleared or to fall; but that may bring
 * nothing for ever. */
static void place_note_trials(gw_place *place, uint64_t now_ms)
{
    const gw_place_router *router;
    uint64_t tried_ms = now_ms < place->trial_ms ? now_ms : place->trial_ms;
    place->tried_ms = tried_ms > place->tried_ms ? tried_ms : place->tried_ms;
    place->trial_ms = 0;
    TAILQ_FOREACH (router, &place->routers, link) {
        if (router->n_tried > 0 && router->trial_ms > place->trial_ms) {
            place->trial_ms = router->trial_ms;
        }
    }
}

/* Streams that wait in vain. What is left says when to look again. */
static void place_expire(gw_place *place, uint64_t now_ms, gw_spot_list *list)
{
    for (gw_spot *spot = TAILQ_FIRST(list), *next; spot != NULL; spot = next) {
        next = TAILQ_NEXT(spot, link);
        place->n_looks++;
        if (list == &place->waiting && spot_is_suspect(place, spot) && spot->stalled_ms < place->tried_ms) {
            spot->stalled_ms = place->tried_ms;
        }
        if (now_ms >= spot->stalled_ms + place->limits.reopen_ms) {
            spot_fail(place, spot, spot->status);
        } else {
            spot_stall(place, now_ms, spot);
        }
    }
}

static void place_expire_all(gw_place *place, uint64_t now_ms)
{
    if (now_ms < place->give_up_ms) {
        return;
    }
    place->give_up_ms = UINT64_MAX;
    place_expire(place, now_ms, &place->waiting);
    gw_place_router *router;
    TAILQ_FOREACH (router, &place->routers, link) {
        place_expire(place, now_ms, &router->lost);
    }
}

static uint64_t leaver_due(const gw_place *place, const gw_place_router *router, const gw_spot *spot)
{
    uint64_t from_ms = spot->told_ms > router->left_ms ? spot->told_ms : router->left_ms;
    return from_ms + place->limits.leave_ms;
}

/* A router that left with its links still up finishes what it has; one that was thrown out cannot. */
static void router_check_leaver(gw_place *place, uint64_t now_ms, gw_place_router *router)
{
    uint64_t leaver_ms = UINT64_MAX;
    if (now_ms < router->leaver_ms) {
        return;
    }
    for (gw_spot *spot = TAILQ_FIRST(&router->here), *next; spot != NULL; spot = next) {
        uint64_t due_ms = leaver_due(place, router, spot);
        next = TAILQ_NEXT(spot, link);
        place->n_looks++;
        if (now_ms >= due_ms) {
            place->changed = true;
            spot_wait(place, now_ms, spot, false);
        } else if (due_ms < leaver_ms) {
            leaver_ms = due_ms;
        }
    }
    router->leaver_ms = leaver_ms;
}

static void routers_check(gw_place *place, uint64_t now_ms)
{
    gw_place_router *router;
    TAILQ_FOREACH (router, &place->routers, link) {
        if (!router->up && now_ms >= router->hold_ms) {
            router_give_away(place, now_ms, router);
        }
        if (router->standing == GW_PLACE_OUT) {
            router_check_leaver(place, now_ms, router);
        }
    }
}

static void spot_ask(gw_place *place, uint64_t now_ms, gw_spot *spot, gw_place_router *router, bool resume,
                     gw_place_action *action_out)
{
    spot_leave(place, spot);
    spot->state = GW_SPOT_ASKED;
    spot->router = router;
    spot->resuming = resume;
    spot->counted = true;
    spot->told_ms = now_ms;
    router->leaver_ms = 0;
    router->n_unanswered++;
    if (spot_is_suspect(place, spot)) {
        spot->tried = true;
        router->n_tried++;
        router->trial_ms = place->trial_ms = now_ms + place->limits.reopen_ms;
    }
    router->n_asked += !resume;
    TAILQ_INSERT_TAIL(&router->here, spot, link);
    *action_out = (gw_place_action){
        .act = resume ? GW_PLACE_RESUME : GW_PLACE_OPEN, .spot = spot, .router = router->number};
}

static bool next_failed(gw_place *place, gw_place_action *action_out)
{
    gw_spot *spot = TAILQ_FIRST(&place->failed);
    if (spot == NULL) {
        return false;
    }
    *action_out =
        (gw_place_action){.act = spot_is_condemned(place, spot) ? GW_PLACE_CONDEMN : GW_PLACE_GIVE_UP,
                          .spot = spot,
                          .status = spot->status};
    spot_leave(place, spot);
    return true;
}

/* One that is down may come back. */
static bool next_copy(gw_place *place, gw_place_action *action_out)
{
    gw_place_router *router;
    TAILQ_FOREACH (router, &place->routers, link) {
        gw_spot *spot = router->up ? TAILQ_FIRST(&router->copies) : NULL;
        if (spot != NULL) {
            place->n_looks++;
            spot_drop_copy(place, spot);
            *action_out = (gw_place_action){.act = GW_PLACE_FORGET, .spot = spot, .router = router->number};
            return true;
        }
    }
    return false;
}

static bool next_back(gw_place *place, uint64_t now_ms, gw_place_action *action_out)
{
    gw_place_router *router;
    TAILQ_FOREACH (router, &place->routers, link) {
        gw_spot *spot = TAILQ_FIRST(&router->lost);
        if (spot != NULL && router->up && router->n_unanswered < place->limits.opens_max) {
            spot_ask(place, now_ms, spot, router, true, action_out);
            return true;
        }
    }
    return false;
}

static uint64_t router_load(const gw_place_router *router)
{
    return router->n_sequences + router->n_asked;
}

/* The one with the fewest sequences, the earliest among equals. fresh: a client's new stream is asked for at
 * once, wherever there is a router; whether it is too much is the router's to say. */
static gw_place_router *pick_idlest(const gw_place *place, uint64_t now_ms, bool fresh)
{
    gw_place_router *router, *best = NULL;
    bool best_takes = false;
    TAILQ_FOREACH (router, &place->routers, link) {
        bool takes = router_takes(place, router, now_ms);
        if (!router->up || router->standing != GW_PLACE_MEMBER || !(takes || fresh) ||
            (best_takes && !takes)) {
            continue;
        }
        if (best == NULL || (takes && !best_takes) || router_load(router) < router_load(best)) {
            best = router;
            best_takes = takes;
        }
    }
    return best;
}

/* Of two routers an affinity prefers the one with the higher rank. */
static uint64_t router_rank(const gw_place_router *router, uint64_t affinity)
{
    const uint64_t pair[2] = {affinity, router->name};
    return XXH3_64bits(pair, sizeof(pair));
}

/* The one that its affinity prefers of those with hardly more to do than the idlest. */
static gw_place_router *pick(const gw_place *place, uint64_t now_ms, const gw_spot *spot)
{
    gw_place_router *router, *best = pick_idlest(place, now_ms, spot_is_fresh(spot));
    if (best == NULL || spot->affinity == 0 || !router_takes(place, best, now_ms)) {
        return best;
    }
    uint64_t most = router_load(best) + router_load(best) / MORE_PART + MORE_MIN;
    TAILQ_FOREACH (router, &place->routers, link) {
        if (router_takes(place, router, now_ms) && router_load(router) <= most &&
            router_rank(router, spot->affinity) > router_rank(best, spot->affinity)) {
            best = router;
        }
    }
    return best;
}

/* For one that is tried apart. */
static gw_place_router *pick_apart(const gw_place *place, uint64_t now_ms)
{
    gw_place_router *router, *best = NULL;
    TAILQ_FOREACH (router, &place->routers, link) {
        if (router_takes(place, router, now_ms) && router->n_tried == 0 &&
            (best == NULL || router_load(router) < router_load(best))) {
            best = router;
        }
    }
    return best;
}

static void place_look_anew(gw_place *place, uint64_t now_ms)
{
    const gw_place_router *router;
    place->next = TAILQ_FIRST(&place->waiting);
    place->full = place->changed = false;
    place->look_ms = UINT64_MAX;
    TAILQ_FOREACH (router, &place->routers, link) {
        if (router->backoff_ms > now_ms && router->backoff_ms < place->look_ms) {
            place->look_ms = router->backoff_ms;
        }
    }
}

static bool next_waiting(gw_place *place, uint64_t now_ms, gw_place_action *action_out)
{
    if (place->changed || now_ms >= place->look_ms) {
        place_look_anew(place, now_ms);
    }
    while (place->next != NULL) {
        gw_spot *spot = place->next;
        place->next = TAILQ_NEXT(spot, link);
        place->n_looks++;
        gw_place_router *router = spot->left != 0 ? router_find(place, spot->left) : NULL;
        bool resume = router != NULL && router->up && now_ms >= router->backoff_ms;
        bool suspect = spot_is_suspect(place, spot);
        if (resume && (router->n_unanswered >= place->limits.opens_max || (suspect && router->n_tried > 0))) {
            continue;
        }
        if (!resume && suspect) {
            router = pick_apart(place, now_ms); /* none: it holds up nobody */
        } else if (!resume) {
            router = place->full ? NULL : pick(place, now_ms, spot);
            place->full = router == NULL;
        }
        if (router != NULL) {
            spot_ask(place, now_ms, spot, router, resume, action_out);
            return true;
        }
    }
    return false;
}

bool gw_place_next(gw_place *place, uint64_t now_ms, gw_place_action *action_out)
{
    place_note_trials(place, now_ms);
    routers_check(place, now_ms);
    place_expire_all(place, now_ms);
    return next_failed(place, action_out) || next_copy(place, action_out) ||
           next_back(place, now_ms, action_out) || next_waiting(place, now_ms, action_out);
}

static uint64_t router_due(const gw_place *place, uint64_t now_ms, const gw_place_router *router)
{
    uint64_t due_ms = UINT64_MAX;
    if (!router->up && !TAILQ_EMPTY(&router->lost)) {
        due_ms = router->hold_ms;
    }
    if (router->up && !TAILQ_EMPTY(&place->waiting) && router->backoff_ms > now_ms) {
        due_ms =
            router->backoff_ms; /* one that takes no new streams may have one that waits to go on there */
    }
    const gw_spot *spot;
    if (router->standing == GW_PLACE_OUT) {
        TAILQ_FOREACH (spot, &router->here, link) {
            uint64_t at_ms = leaver_due(place, router, spot);
            due_ms = at_ms < due_ms ? at_ms : due_ms;
        }
    }
    return due_ms;
}

uint64_t gw_place_due(const gw_place *place, uint64_t now_ms)
{
    uint64_t due_ms = place->give_up_ms;
    const gw_place_router *router;
    TAILQ_FOREACH (router, &place->routers, link) {
        uint64_t at_ms = router_due(place, now_ms, router);
        due_ms = at_ms < due_ms ? at_ms : due_ms;
    }
    return due_ms;
}
