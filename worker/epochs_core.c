#include "worker/epochs_core.h"

#include <string.h>

/* ---- whose frames are taken ---- */

static void serve_drop(wk_serve *serve, uint32_t i)
{
    pc_epoch_release(serve->epochs[i]);
    serve->epochs[i] = NULL;
}

void wk_serve_fini(wk_serve *serve)
{
    for (uint32_t i = 0; i < WK_EPOCHS; i++) {
        serve_drop(serve, i);
    }
}

/* Of a member that is in that cluster now: another cluster counts from the start. */
static bool epoch_is_before(const pc_epoch *epoch, uint64_t cluster, uint64_t number)
{
    return epoch->cluster != cluster || epoch->number < number;
}

/* A free place, else that of the oldest. */
static uint32_t serve_place(const wk_serve *serve, uint64_t cluster)
{
    uint32_t at = 0;
    for (uint32_t i = 0; i < WK_EPOCHS; i++) {
        if (serve->epochs[i] == NULL) {
            return i;
        }
        if (serve->epochs[at]->cluster == cluster &&
            epoch_is_before(serve->epochs[i], cluster, serve->epochs[at]->number)) {
            at = i;
        }
    }
    return at;
}

void wk_serve_commit(wk_serve *serve, pc_epoch *epoch, uint32_t self)
{
    uint32_t i = serve_place(serve, epoch->cluster);
    serve_drop(serve, i);
    serve->epochs[i] = pc_epoch_hold(epoch);
    serve->ranks[i] = epoch->placement != NULL ? pr_placement_rank_of(epoch->placement, self) : 0;
    serve->newest = epoch->number;
    serve->cluster = epoch->cluster;
}

void wk_serve_retire(wk_serve *serve, uint64_t oldest)
{
    for (uint32_t i = 0; i < WK_EPOCHS; i++) {
        if (oldest > 0 && serve->epochs[i] != NULL &&
            epoch_is_before(serve->epochs[i], serve->cluster, oldest)) {
            serve_drop(serve, i);
        }
    }
}

static uint32_t serve_find(const wk_serve *serve, const pr_frame_head *head)
{
    uint32_t i = 0;
    while (i < WK_EPOCHS && (serve->epochs[i] == NULL || serve->epochs[i]->number != head->epoch ||
                             serve->epochs[i]->cluster != head->cluster)) {
        i++;
    }
    return i;
}

cm_status wk_serve_check(const wk_serve *serve, uint32_t router, const void *header, uint32_t header_bytes,
                         const void *payload, uint64_t payload_bytes,
                         bool (*is_held)(const void *ctx, uint32_t layer, uint32_t expert), const void *ctx,
                         uint32_t *expert_out, cm_error *err)
{
    const pr_dispatch *frame = header;
    const pr_slot *slots = payload;
    CM_TRY(pr_dispatch_check(header, header_bytes, payload, payload_bytes, serve->d, serve->n_layer,
                             serve->n_expert, err));
    if (frame->head.router != router) {
        return cm_error_set(err, CM_E_PROTOCOL, "router", "it names router %u", frame->head.router);
    }
    if (frame->n_slot > serve->row_max) {
        return cm_error_set(err, CM_E_PROTOCOL, "n_slot",
                            "%u slots, at most %u: is frame_bytes the same on all?", frame->n_slot,
                            serve->row_max);
    }
    uint32_t at = serve_find(serve, &frame->head);
    if (at == WK_EPOCHS) {
        return cm_error_set(err, CM_E_STALE, "epoch", "not an epoch in use");
    }
    const pr_placement *placement = serve->epochs[at]->placement;
    for (uint32_t i = 0; i < frame->n_slot; i++) {
        uint32_t layer = frame->head.layer, expert = slots[i].expert;
        if (placement == NULL || !pr_placement_owns(placement, layer, expert, serve->ranks[at]) ||
            !is_held(ctx, layer, expert)) {
            *expert_out = expert;
            return cm_error_set(err, CM_E_NO_OWNER, "expert", "an expert that is not ours in its epoch");
        }
    }
    return CM_OK;
}

/* ---- what must be held ---- */

static void hold_forget_prepared(wk_hold *hold)
{
    pc_epoch_release(hold->prepared);
    hold->prepared = NULL;
}

static void hold_forget_oldest(wk_hold *hold)
{
    pc_epoch_release(hold->known[0]);
    hold->n_known--;
    memmove(hold->known, hold->known + 1, sizeof(hold->known[0]) * hold->n_known);
}

void wk_hold_fini(wk_hold *hold)
{
    hold_forget_prepared(hold);
    while (hold->n_known > 0) {
        hold_forget_oldest(hold);
    }
}

void wk_hold_prepare(wk_hold *hold, pc_epoch *epoch)
{
    pc_epoch *before = hold->prepared;
    hold->prepared = pc_epoch_hold(epoch);
    pc_epoch_release(before);
}

bool wk_hold_abort(wk_hold *hold, uint64_t number)
{
    if (hold->prepared == NULL || hold->prepared->number != number) {
        return false;
    }
    hold_forget_prepared(hold);
    return true;
}

void wk_hold_commit(wk_hold *hold, pc_epoch *epoch)
{
    if (hold->n_known == WK_EPOCHS) {
        hold_forget_oldest(hold);
    }
    hold->known[hold->n_known++] = pc_epoch_hold(epoch);
    if (hold->prepared != NULL && epoch_is_before(hold->prepared, epoch->cluster, epoch->number + 1)) {
        hold_forget_prepared(hold);
    }
}

void wk_hold_retire(wk_hold *hold, uint64_t oldest)
{
    while (hold->n_known > 0 &&
           epoch_is_before(hold->known[0], hold->known[hold->n_known - 1]->cluster, oldest)) {
        hold_forget_oldest(hold);
    }
}

uint32_t wk_hold_list(const wk_hold *hold, uint32_t self, const pr_placement *placements_out[WK_EPOCHS + 1],
                      uint32_t ranks_out[WK_EPOCHS + 1])
{
    uint32_t n = 0;
    for (uint32_t i = 0; i <= hold->n_known; i++) {
        const pc_epoch *epoch = i < hold->n_known ? hold->known[i] : hold->prepared;
        if (epoch != NULL && epoch->placement != NULL) {
            placements_out[n] = epoch->placement;
            ranks_out[n++] = pr_placement_rank_of(epoch->placement, self);
        }
    }
    return n;
}
