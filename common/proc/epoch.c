#include <stdatomic.h>
#include <stdlib.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/proc/member.h"

enum { EPOCH_MEMBERS_MAX = 65536 };

pc_epoch *pc_epoch_hold(pc_epoch *epoch)
{
    uint32_t before = atomic_fetch_add_explicit(&epoch->refs, 1, memory_order_relaxed);
    CM_ASSERT_MSG(before > 0, "epoch %llu was freed", (unsigned long long)epoch->number);
    return epoch;
}

void pc_epoch_release(pc_epoch *epoch)
{
    if (epoch == NULL || atomic_fetch_sub_explicit(&epoch->refs, 1, memory_order_acq_rel) > 1) {
        return;
    }
    for (uint32_t i = 0; i < epoch->n_member; i++) {
        cm_free(epoch->members[i].data_address);
    }
    pr_placement_free(epoch->placement);
    cm_free(epoch->members);
    cm_free(epoch);
}

static int epoch_member_order(const void *a, const void *b)
{
    uint32_t x = ((const struct pc_epoch_member *)a)->id, y = ((const struct pc_epoch_member *)b)->id;
    return x < y ? -1 : x > y;
}

const struct pc_epoch_member *pc_epoch_member_find(const pc_epoch *epoch, uint32_t id)
{
    struct pc_epoch_member key = {.id = id};
    return epoch->n_member == 0
               ? NULL
               : bsearch(&key, epoch->members, epoch->n_member, sizeof(key), epoch_member_order);
}

/* Engines look the placement's workers up in the epoch without a thought; here is where we think. */
static cm_status epoch_check(const pc_epoch *epoch, cm_error *err)
{
    unsigned long long number = epoch->number;
    if (number == 0) {
        return cm_error_set(err, CM_E_PROTOCOL, "number", "epoch 0 cannot be published");
    }
    for (uint32_t i = 0; i < epoch->n_member; i++) {
        if (epoch->members[i].id == 0 || (i > 0 && epoch->members[i].id == epoch->members[i - 1].id)) {
            return cm_error_set(err, CM_E_PROTOCOL, "members", "epoch %llu has member %u %s", number,
                                epoch->members[i].id, epoch->members[i].id == 0 ? "" : "twice");
        }
    }
    for (uint32_t r = 0; epoch->placement != NULL && r < epoch->placement->n_rank; r++) {
        const struct pc_epoch_member *member = pc_epoch_member_find(epoch, epoch->placement->rank_member[r]);
        if (member == NULL || member->role != BALEEN__CONTROL__V1__ROLE__ROLE_WORKER) {
            return cm_error_set(err, CM_E_PROTOCOL, "placement",
                                "epoch %llu places experts on member %u, which is no worker of it", number,
                                epoch->placement->rank_member[r]);
        }
    }
    return CM_OK;
}

cm_status pc_epoch_unpack(const Baleen__Control__V1__Epoch *message, pc_epoch **epoch_out, cm_error *err)
{
    if (message->n_members > EPOCH_MEMBERS_MAX) {
        return cm_error_set(err, CM_E_PROTOCOL, "members", "an epoch of %zu members", message->n_members);
    }
    pc_epoch *epoch = cm_alloc(sizeof(*epoch));
    epoch->refs = 1;
    epoch->number = message->number;
    epoch->cluster = message->cluster;
    epoch->n_member = (uint32_t)message->n_members;
    epoch->members = cm_alloc(sizeof(*epoch->members) * epoch->n_member);
    for (uint32_t i = 0; i < epoch->n_member; i++) {
        const Baleen__Control__V1__Member *from = message->members[i];
        epoch->members[i] = (struct pc_epoch_member){
            .id = from->id,
            .role = (uint32_t)from->role,
            .incarnation = from->incarnation,
            .data_address = cm_strdup(from->data_address != NULL ? from->data_address : ""),
            .draining = from->has_draining && from->draining,
            .expert_bytes_max = from->has_expert_bytes_max ? from->expert_bytes_max : 0,
        };
    }
    if (epoch->n_member > 0) {
        qsort(epoch->members, epoch->n_member, sizeof(*epoch->members), epoch_member_order);
    }
    cm_status status = CM_OK;
    if (message->placement != NULL) {
        status = pr_placement_unpack(message->placement, &epoch->placement, err);
    }
    if (status == CM_OK) {
        status = epoch_check(epoch, err);
    }
    if (status != CM_OK) {
        pc_epoch_release(epoch);
        return status;
    }
    *epoch_out = epoch;
    return CM_OK;
}
