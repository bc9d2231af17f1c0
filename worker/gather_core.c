#include "worker/gather_core.h"

#include "common/base/assert.h"
#include "common/base/mem.h"

typedef struct gather_router {
    uint32_t id; /* 0: free */
    bool active;
    uint64_t last_us;
    uint32_t n_waiting;
} gather_router;

typedef struct gather_frame {
    uint32_t router; /* index */
    uint32_t layer, n_row;
    uint64_t arrived_us;
    void *frame;
} gather_frame;

struct wk_gather {
    wk_gather_limits limits;
    gather_router *routers;
    gather_frame *frames; /* [n_frame] in order of arrival */
    uint32_t n_frame;
    uint32_t window_us;
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

cm_status wk_gather_arrived(wk_gather *g, uint64_t now_us, uint32_t router, uint32_t layer, uint32_t n_row,
                            void *frame)
{
    CM_ASSERT(router != 0);
    uint32_t i = gather_find_router(g, router);
    if (i == g->limits.router_max) {
        i = gather_find_router(g, 0);
    }
    if (i == g->limits.router_max || g->n_frame == g->limits.frame_max) {
        return CM_E_CAPACITY;
    }
    gather_router *r = &g->routers[i];
    r->id = router;
    r->active = true;
    r->last_us = now_us;
    r->n_waiting++;
    g->frames[g->n_frame++] = (gather_frame){i, layer, n_row, now_us, frame};
    return CM_OK;
}

void wk_gather_idle(wk_gather *g, uint32_t router)
{
    uint32_t i = gather_find_router(g, router);
    if (i < g->limits.router_max) {
        g->routers[i].active = false;
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

/* Takes the oldest frame's layer out. The lag of its last other router teaches the window. */
static uint32_t gather_take_layer(wk_gather *g, void **frames_out, uint32_t frames_max)
{
    uint32_t layer = g->frames[0].layer, n = 0, n_row = 0, first_router = g->frames[0].router;
    uint64_t first_us = g->frames[0].arrived_us, lag_us = 0;
    for (uint32_t i = 0; i < g->n_frame && n < frames_max;) {
        gather_frame *frame = &g->frames[i];
        if (frame->layer != layer) {
            i++;
            continue;
        }
        if (n > 0 && n_row + frame->n_row > g->limits.row_max) {
            break;
        }
        if (frame->router != first_router) {
            lag_us = frame->arrived_us - first_us;
        }
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
    return n;
}

uint32_t wk_gather_next(wk_gather *g, uint64_t now_us, void **frames_out, uint32_t frames_max,
                        uint64_t *wait_us_out)
{
    if (g->n_frame == 0) {
        *wait_us_out = UINT64_MAX;
        return 0;
    }
    uint64_t due_us = g->frames[0].arrived_us + g->window_us;
    if (now_us < due_us && gather_may_wait(g, now_us)) {
        *wait_us_out = due_us - now_us;
        return 0;
    }
    *wait_us_out = 0;
    return gather_take_layer(g, frames_out, frames_max);
}

uint32_t wk_gather_waiting(const wk_gather *g)
{
    return g->n_frame;
}
