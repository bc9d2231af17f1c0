#include "worker/gather_core.h"

#include "common/base/assert.h"
#include "common/base/mem.h"

enum {
    GATHER_FADE = 32,   /* groups after which what was learned of one has faded to a third */
    GATHER_LEAST = 2,   /* a group less saves at least such a part of one */
    GATHER_SPREAD = 64, /* variance of rows, by the square of their mean, that a line can be drawn through */
    GATHER_BLIND = 24, /* times that nobody saw when a router came back, until it is waited for to find out */
    GATHER_ODD = 4,    /* times what was to be expected: what took longer says no more than that */
};

/* One of the layers that a router has under way at once. */
typedef struct gather_flight {
    uint32_t layer;       /* of its newest frame */
    bool computing;       /* the group given out has a frame of it */
    uint64_t answered_us; /* it has been answered and has not come back; 0: else */
    uint64_t return_us;   /* from an answer to its next frame, as learned; 0: not yet */
    uint32_t n_blind;     /* times in a row that it was back at some time unknown */
    bool guessed;         /* return_us is */
} gather_flight;

typedef struct gather_router {
    uint32_t id; /* 0: free */
    bool active;
    uint64_t last_us;
    uint32_t n_waiting;
    gather_flight flights[PR_FLIGHTS_MAX];
} gather_router;

typedef struct gather_frame {
    uint32_t router; /* index */
    uint32_t flight, layer, n_row;
    uint64_t arrived_us;
    void *frame;
} gather_frame;

/* Fading means of groups' rows and times, for the line through them. */
typedef struct gather_cost {
    uint32_t n; /* groups, up to GATHER_FADE */
    double rows, us, rows2, rows_us;
} gather_cost;

struct wk_gather {
    wk_gather_limits limits;
    gather_router *routers;
    gather_frame *frames; /* [n_frame] in order of arrival */
    uint32_t n_frame;
    uint32_t window_us;
    uint64_t taken_us; /* when the newest group was given out */
    bool blind; /* nobody has looked for frames since: one that comes may have been there for a while */
    uint32_t taken_rows;
    gather_cost cost;
    uint64_t cost_us;  /* of a group, as learned; 0: not yet */
    uint64_t saves_us; /* of that what does not grow with its rows: what a group less saves */
    uint32_t n_layer;  /* seen so far */
};

wk_gather *wk_gather_create(const wk_gather_limits *limits)
{
    wk_gather *g = cm_alloc(sizeof(*g));
    g->limits = *limits;
    g->routers = cm_alloc(sizeof(gather_router) * limits->router_max);
    g->frames = cm_alloc(sizeof(gather_frame) * limits->frame_max);
    g->window_us = limits->window_max_us / 4;
    return g;
}

void wk_gather_destroy(wk_gather *g)
{
    CM_ASSERT_MSG(g->n_frame == 0, "%u frames were not taken out", g->n_frame);
    cm_free(g->routers);
    cm_free(g->frames);
    cm_free(g);
}

static uint32_t gather_find_router(const wk_gather *g, uint32_t id)
{
    uint32_t i = 0;
    while (i < g->limits.router_max && g->routers[i].id != id) {
        i++;
    }
    return i;
}

/* Never 0, which is for what is not known. */
static uint64_t gather_learn(const wk_gather *g, uint64_t known_us, uint64_t seen_us)
{
    uint64_t odd_us = GATHER_ODD * (known_us > g->cost_us ? known_us : g->cost_us);
    seen_us = seen_us < odd_us ? seen_us : odd_us;
    uint64_t next_us = known_us == 0 ? seen_us : (3 * known_us + seen_us) / 4;
    return next_us > 0 ? next_us : 1;
}

/* A frame that came while a group was computed came at any time since: to believe that it came when it was
 * seen would make each router as slow as the groups of the others, and keep them apart for good. After many
 * such, and at first, the middle is guessed: that costs one wait at most, and then
 * it is known again. */
static void gather_learn_return(const wk_gather *g, gather_flight *r, uint64_t now_us)
{
    uint64_t took_us = now_us - r->answered_us, least_us = took_us;
    if (g->blind) {
        least_us = g->taken_us > r->answered_us ? g->taken_us - r->answered_us : 0;
    }
    r->answered_us = 0;
    if (least_us == took_us) {
        r->return_us = gather_learn(g, r->guessed ? 0 : r->return_us, took_us);
        r->n_blind = 0;
        r->guessed = false;
    } else if (++r->n_blind == GATHER_BLIND || r->return_us == 0) {
        r->return_us = 1 + (least_us + took_us) / 2;
        r->n_blind = 0;
        r->guessed = true;
    } else {
        r->return_us = r->return_us < least_us ? least_us : r->return_us > took_us ? took_us : r->return_us;
    }
}

cm_status wk_gather_arrived(wk_gather *g, uint64_t now_us, uint32_t router, uint32_t flight, uint32_t layer,
                            uint32_t n_row, void *frame)
{
    CM_ASSERT(router != 0 && flight < PR_FLIGHTS_MAX);
    uint32_t i = gather_find_router(g, router);
    if (i == g->limits.router_max) {
        i = gather_find_router(g, 0);
    }
    if (i == g->limits.router_max || g->n_frame == g->limits.frame_max) {
        return CM_E_CAPACITY;
    }
    gather_router *r = &g->routers[i];
    gather_flight *f = &r->flights[flight];
    if (f->answered_us != 0) {
        gather_learn_return(g, f, now_us);
    }
    f->layer = layer;
    g->n_layer = layer >= g->n_layer ? layer + 1 : g->n_layer;
    r->id = router;
    r->active = true;
    r->last_us = now_us;
    r->n_waiting++;
    g->frames[g->n_frame++] = (gather_frame){i, flight, layer, n_row, now_us, frame};
    return CM_OK;
}

void wk_gather_idle(wk_gather *g, uint32_t router)
{
    uint32_t i = gather_find_router(g, router);
    if (i < g->limits.router_max) {
        g->routers[i].active = false;
        for (uint32_t k = 0; k < PR_FLIGHTS_MAX; k++) {
            g->routers[i].flights[k].answered_us = 0; /* what it rests is not how soon it comes back */
        }
    }
}

static void gather_fade(const gather_cost *c, double *mean, double seen)
{
    *mean += (seen - *mean) / c->n;
}

/* One group during which this process did not run, or its disk was read, is not what groups cost. */
static double gather_plausible(const gather_cost *c, double rows, double us)
{
    double most = GATHER_ODD * c->us * (rows > c->rows ? rows / c->rows : 1);
    return c->n > 0 && us > most ? most : us;
}

/* The part of a group's time that its rows do not explain is the experts' weights. Groups of one size only
 * say nothing about that: then what was known stays, and at first all of it counts. */
static void gather_learn_cost(wk_gather *g, double rows, double us)
{
    gather_cost *c = &g->cost;
    us = gather_plausible(c, rows, us);
    c->n += c->n < GATHER_FADE;
    gather_fade(c, &c->rows, rows);
    gather_fade(c, &c->us, us);
    gather_fade(c, &c->rows2, rows * rows);
    gather_fade(c, &c->rows_us, rows * us);
    double spread = c->rows2 - c->rows * c->rows;
    g->cost_us = 1 + (uint64_t)c->us;
    if (c->n == 1) {
        g->saves_us = g->cost_us;
    } else if (spread > c->rows * c->rows / GATHER_SPREAD) {
        double fixed = c->us - (c->rows_us - c->rows * c->us) / spread * c->rows;
        double least =
            c->us / GATHER_LEAST; /* to be wrong about that costs little, to read weights again much */
        g->saves_us = fixed <= least ? (uint64_t)least : fixed >= c->us ? g->cost_us : (uint64_t)fixed;
    }
    g->saves_us = g->saves_us < g->cost_us ? g->saves_us : g->cost_us;
}

void wk_gather_computed(wk_gather *g, uint64_t now_us)
{
    gather_learn_cost(g, g->taken_rows, (double)(now_us - g->taken_us));
    for (uint32_t i = 0; i < g->limits.router_max * PR_FLIGHTS_MAX; i++) {
        gather_router *r = &g->routers[i / PR_FLIGHTS_MAX];
        gather_flight *f = &r->flights[i % PR_FLIGHTS_MAX];
        if (f->computing) {
            f->computing = false;
            f->answered_us = r->active ? now_us : 0;
        }
    }
}

static void *gather_take(wk_gather *g, uint32_t at)
{
    void *frame = g->frames[at].frame;
    g->routers[g->frames[at].router].n_waiting--;
    g->n_frame--;
    for (uint32_t i = at; i < g->n_frame; i++) {
        g->frames[i] = g->frames[i + 1];
    }
    return frame;
}

void *wk_gather_gone(wk_gather *g, uint32_t router)
{
    uint32_t i = gather_find_router(g, router);
    if (i == g->limits.router_max) {
        return NULL;
    }
    for (uint32_t f = 0; f < g->n_frame; f++) {
        if (g->frames[f].router == i) {
            return gather_take(g, f);
        }
    }
    g->routers[i] = (gather_router){0};
    return NULL;
}

/* Somebody who may still send has no frame here. */
static bool gather_may_wait(const wk_gather *g, uint64_t now_us)
{
    for (uint32_t i = 0; i < g->limits.router_max; i++) {
        const gather_router *r = &g->routers[i];
        if (r->id != 0 && r->active && r->n_waiting == 0 && now_us - r->last_us < g->limits.window_max_us) {
            return true;
        }
    }
    return false;
}

/* ---- who is behind ---- */

/* When a router is back at the latest that is likely to be back within the time of a group, and with which
 * layer; 0: none that is. Of two flights the one that is expected first. */
static uint64_t gather_due_back(const wk_gather *g, const gather_router *r, uint64_t now_us,
                                uint32_t *layer_out)
{
    uint64_t soonest_us = UINT64_MAX, due_us = 0;
    if (r->id == 0 || !r->active || r->n_waiting > 0) {
        return 0;
    }
    for (uint32_t i = 0; i < PR_FLIGHTS_MAX; i++) {
        const gather_flight *f = &r->flights[i];
        uint64_t late_us = f->return_us / 2 < g->saves_us ? f->return_us / 2 : g->saves_us;
        uint64_t likely_us = f->answered_us + f->return_us, latest_us = likely_us + late_us + 1;
        if (f->answered_us != 0 && f->return_us != 0 && likely_us < soonest_us && now_us < latest_us &&
            likely_us < now_us + g->saves_us) {
            soonest_us = likely_us;
            due_us = latest_us;
            *layer_out = (f->layer + 1) % g->n_layer;
        }
    }
    return due_us;
}

/* The layer that a router waits with or will come back with; false: it is not to be reckoned with. */
static bool gather_place(const wk_gather *g, uint32_t router, uint64_t now_us, uint32_t *layer_out)
{
    const gather_router *r = &g->routers[router];
    for (uint32_t f = 0; f < g->n_frame && r->n_waiting > 0; f++) {
        if (g->frames[f].router == router) {
            *layer_out = g->frames[f].layer;
            return true;
        }
    }
    return gather_due_back(g, r, now_us, layer_out) != 0;
}

/* Steps of one layer from another one up, around the end of a pass. */
static uint32_t gather_ahead(const wk_gather *g, uint32_t from, uint32_t to)
{
    return (to + g->n_layer - from) % g->n_layer;
}

/* How far the next router before this layer is: the last of all has the widest gap before it. */
static uint32_t gather_gap_before(const wk_gather *g, uint64_t now_us, uint32_t layer)
{
    uint32_t gap = g->n_layer, at;
    for (uint32_t i = 0; i < g->limits.router_max; i++) {
        if (gather_place(g, i, now_us, &at) && at != layer && gather_ahead(g, at, layer) < gap) {
            gap = gather_ahead(g, at, layer);
        }
    }
    return gap;
}

static uint32_t gather_last_layer(const wk_gather *g, uint64_t now_us)
{
    uint32_t last = g->frames[0].layer, widest = 0, at;
    for (uint32_t i = 0; i < g->limits.router_max; i++) {
        if (!gather_place(g, i, now_us, &at)) {
            continue;
        }
        uint32_t gap = gather_gap_before(g, now_us, at);
        if (gap > widest || (gap == widest && at == g->frames[0].layer)) {
            widest = gap;
            last = at;
        }
    }
    return last;
}

/* Until when to wait for routers that will be back with this layer; now_us: for none. */
static uint64_t gather_wait_for(const wk_gather *g, uint64_t now_us, uint32_t layer)
{
    uint64_t until_us = now_us;
    uint32_t back = 0;
    for (uint32_t i = 0; i < g->limits.router_max; i++) {
        uint64_t back_us = gather_due_back(g, &g->routers[i], now_us, &back);
        if (back_us > until_us && back == layer) {
            until_us = back_us;
        }
    }
    return until_us;
}

/* ---- groups ---- */

/* Takes a layer's frames out. The lag of its last other router teaches the window. */
static uint32_t gather_take_layer(wk_gather *g, uint32_t layer, void **frames_out, uint32_t frames_max)
{
    uint32_t n = 0, n_row = 0, first_router = 0;
    uint64_t first_us = 0, lag_us = 0;
    for (uint32_t i = 0; i < g->n_frame && n < frames_max;) {
        gather_frame *frame = &g->frames[i];
        if (frame->layer != layer) {
            i++;
            continue;
        }
        if (n > 0 && n_row + frame->n_row > g->limits.row_max) {
            break;
        }
        if (n == 0) {
            first_router = frame->router;
            first_us = frame->arrived_us;
        } else if (frame->router != first_router) {
            lag_us = frame->arrived_us - first_us;
        }
        g->routers[frame->router].flights[frame->flight].computing = true;
        n_row += frame->n_row;
        frames_out[n++] = gather_take(g, i);
    }
    uint64_t aim_us = lag_us != 0 ? lag_us * 2 : g->window_us / 2;
    /* never to nothing: a window of zero could not learn that waiting pays again */
    uint64_t least_us = g->limits.window_max_us / 16;
    aim_us = aim_us < least_us                  ? least_us
             : aim_us < g->limits.window_max_us ? aim_us
                                                : g->limits.window_max_us;
    g->window_us = (uint32_t)((g->window_us * 7ull + aim_us) / 8);
    g->taken_rows = n_row;
    return n;
}

/* A frame that waits for those behind it has waited long enough. */
static bool gather_held_too_long(const wk_gather *g, uint64_t now_us)
{
    uint64_t pass_us = g->n_layer * g->cost_us,
             most_us = pass_us < g->limits.hold_max_us ? pass_us : g->limits.hold_max_us;
    return now_us - g->frames[0].arrived_us >= most_us;
}

uint32_t wk_gather_next(wk_gather *g, uint64_t now_us, void **frames_out, uint32_t frames_max,
                        uint64_t *wait_us_out)
{
    if (g->n_frame == 0) {
        *wait_us_out = UINT64_MAX;
        return 0;
    }
    uint32_t layer = g->frames[0].layer;
    uint64_t due_us = g->frames[0].arrived_us + g->window_us;
    if (g->cost_us != 0 && !gather_held_too_long(g, now_us)) {
        layer = gather_last_layer(g, now_us);
        uint64_t back_us = gather_wait_for(g, now_us, layer), most_us = now_us + g->limits.hold_max_us;
        back_us = back_us < most_us ? back_us : most_us;
        if (back_us > now_us && g->limits.window_max_us > 0) {
            *wait_us_out = back_us - now_us;
            return 0;
        }
    }
    if (now_us < due_us && gather_may_wait(g, now_us)) {
        *wait_us_out = due_us - now_us;
        return 0;
    }
    *wait_us_out = 0;
    g->taken_us = now_us;
    g->blind = true;
    return gather_take_layer(g, layer, frames_out, frames_max);
}

void wk_gather_looked(wk_gather *g)
{
    g->blind = false;
}

uint32_t wk_gather_waiting(const wk_gather *g)
{
    return g->n_frame;
}
