/* What epochs mean to a worker, as two small pure machines: which dispatch frames may be computed (wk_serve,
 * the compute thread's) and which experts must be held (wk_hold, the loop's). No I/O, no clock. Used by
 * engine.c and worker.c and by the simulator. Thread: one at a time each. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/proc/member.h"
#include "proto/frames.h"

enum { WK_EPOCHS = 4 }; /* in force, before it until retired, and slack for a slow retire */

/* ---- whose frames are taken ---- */

typedef struct wk_serve {
    uint32_t d, n_layer, n_expert; /* of the model */
    uint32_t row_max;              /* slots of one frame */
    pc_epoch *epochs[WK_EPOCHS];   /* held; NULL: free */
    uint32_t ranks[WK_EPOCHS];     /* ours in each */
    uint64_t newest,
        cluster; /* of the one committed last: others' epochs are older, whatever their numbers */
} wk_serve;

void wk_serve_fini(wk_serve *serve);
/* Frames of this epoch are served from now on; held. self: our member id. */
void wk_serve_commit(wk_serve *serve, pc_epoch *epoch, uint32_t self);
/* Frames of epochs before oldest, and of another cluster's than the newest, are refused from now on. 0: none
 * is retired. */
void wk_serve_retire(wk_serve *serve, uint64_t oldest);

/* A dispatch frame as it came, over a link of the router with that member id. CM_OK: it may be computed.
 * CM_E_PROTOCOL: malformed, or in another's name; CM_E_STALE: not of an epoch in use; CM_E_NO_OWNER:
 * *expert_out is not ours in its epoch, or not held. err says why. */
CM_MUST_CHECK cm_status wk_serve_check(const wk_serve *serve, uint32_t router, const void *header,
                                       uint32_t header_bytes, const void *payload, uint64_t payload_bytes,
                                       bool (*is_held)(const void *ctx, uint32_t layer, uint32_t expert),
                                       const void *ctx, uint32_t *expert_out, cm_error *err);

/* ---- what must be held ---- */

typedef struct wk_hold {
    pc_epoch *prepared;         /* loaded or loading, not yet in force */
    pc_epoch *known[WK_EPOCHS]; /* in force and not retired; newest last */
    uint32_t n_known;
} wk_hold;

void wk_hold_fini(wk_hold *hold);
/* The one prepared before is forgotten; its experts stay until the list is next acted on. */
void wk_hold_prepare(wk_hold *hold, pc_epoch *epoch);
/* false: it is not the one being prepared, nothing has changed. */
bool wk_hold_abort(wk_hold *hold, uint64_t number);
void wk_hold_commit(wk_hold *hold, pc_epoch *epoch);
void wk_hold_retire(wk_hold *hold, uint64_t oldest);
/* The placements whose experts are to be held, and our rank in each; how many. Borrowed. self: our member id.
 */
uint32_t wk_hold_list(const wk_hold *hold, uint32_t self, const pr_placement *placements_out[WK_EPOCHS + 1],
                      uint32_t ranks_out[WK_EPOCHS + 1]);
