/* When to compute which layer: expert weights should be read once for the rows of all routers that want the
 * same layer, but nobody waits for one that is idle, slow or gone. A pure machine: frames arrive, time is an
 * argument, the answer is "this layer now" or "not before T".
 *
 * The first frame of a layer opens a window. The layer is due when every router that is active (it sent a
 * frame since it last said it was idle, and its last frame is younger than the window's maximum) has a frame
 * waiting, for this layer or another, or when the window has passed. The window adapts between a sixteenth of
 * window_max_us and all of it: it grows towards the lag at which other routers' frames for the same layer
 * really came, and shrinks when waiting brought nobody.
 *
 * That alone leaves routers out of step that once are: each finds the others' frames being computed. So the
 * machine learns how long a group takes, how much of that is the same however few its rows (the weights), and
 * how long each router takes from an answer to its next frame of the same flight, which is of the layer
 * behind it. It lets the routers that are ahead wait for those behind them in the order of the layers, as
 * long as each wait for a frame to come is shorter than what a group less saves. Once together they stay
 * together. A frame is held so for hold_max_us, or for as many groups as there are layers, at most.
 *
 * None of it ever changes results. Thread: the compute thread's. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"
#include "proto/frames.h"

typedef struct wk_gather wk_gather;

typedef struct wk_gather_limits {
    uint32_t router_max;    /* routers known at once */
    uint32_t frame_max;     /* frames waiting; more are refused */
    uint32_t row_max;       /* rows of one group */
    uint32_t window_max_us; /* 0: nobody is waited for */
    uint64_t hold_max_us;   /* far less than what a router waits for its answer */
} wk_gather_limits;

wk_gather *wk_gather_create(const wk_gather_limits *limits);
void wk_gather_destroy(wk_gather *gather);

/* A frame with n_row rows for layer, of a flight below PR_FLIGHTS_MAX; frame is the caller's, kept until it
 * comes out of wk_gather_next or wk_gather_gone. CM_E_CAPACITY: frame_max, or a router too many; the caller
 * refuses the frame. */
CM_MUST_CHECK cm_status wk_gather_arrived(wk_gather *gather, uint64_t now_us, uint32_t router,
                                          uint32_t flight, uint32_t layer, uint32_t n_row, void *frame);
void wk_gather_idle(wk_gather *gather, uint32_t router);
/* The group that wk_gather_next gave out has been computed and answered. */
void wk_gather_computed(wk_gather *gather, uint64_t now_us);
/* The router's link is gone: its frames come out, one per call, until NULL. */
void *wk_gather_gone(wk_gather *gather, uint32_t router);
/* The next group: up to frames_max frames of one layer, oldest first, at most row_max rows together (one
 * frame may be larger). 0 with *wait_us_out = time until a layer is due (UINT64_MAX: no frame waits). */
uint32_t wk_gather_next(wk_gather *gather, uint64_t now_us, void **frames_out, uint32_t frames_max,
                        uint64_t *wait_us_out);
/* All frames that have come were told, and those to come will be at once; until the next group is given out,
 * while which is computed they may be told later than they came. */
void wk_gather_looked(wk_gather *gather);
uint32_t wk_gather_waiting(const wk_gather *gather);
