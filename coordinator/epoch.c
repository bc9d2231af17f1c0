#include "coordinator/epoch.h"

#include "common/base/assert.h"
#include "proto/pack.h"

enum { EPOCH_ARENA_CHUNK_BYTES = 16 << 10, EPOCH_ARENA_BYTES_MAX = 256 << 20 };

static cm_status epoch_check(const co_epoch *epoch, cm_error *err)
{
    const Baleen__Control__V1__Epoch *message = epoch->message;
    if (message->number == 0 || message->placement == NULL) {
        return cm_error_set(err, CM_E_CORRUPT, "epoch", "epoch %llu %s", (unsigned long long)message->number,
                            message->placement == NULL ? "without placement" : "is never published");
    }
    for (size_t i = 1; i < message->n_members; i++) {
        if (message->members[i - 1]->id >= message->members[i]->id) {
            return cm_error_set(err, CM_E_CORRUPT, "epoch.members", "member %u after member %u",
                                message->members[i]->id, message->members[i - 1]->id);
        }
    }
    for (uint32_t r = 0; r < epoch->placement->n_rank; r++) {
        const co_peer *peer = co_epoch_find(epoch, epoch->placement->rank_member[r]);
        if (peer == NULL || peer->role != CO_ROLE_WORKER) {
            return cm_error_set(err, CM_E_CORRUPT, "epoch.placement",
                                "rank %u is member %u, which is no worker of epoch %llu", r,
                                epoch->placement->rank_member[r], (unsigned long long)message->number);
        }
    }
    return CM_OK;
}

cm_status co_epoch_unpack(const void *data, size_t n_bytes, co_epoch **epoch_out, cm_error *err)
{
    co_epoch *epoch = cm_alloc(sizeof(*epoch));
    epoch->refs = 1;
    cm_arena_init(&epoch->arena, "epoch", EPOCH_ARENA_CHUNK_BYTES, EPOCH_ARENA_BYTES_MAX);
    cm_bytes_init(&epoch->packed, 0);
    cm_bytes_append(&epoch->packed, data, n_bytes);

    cm_status status = pr_unpack(&baleen__control__v1__epoch__descriptor, data, n_bytes, &epoch->arena,
                                 (ProtobufCMessage **)&epoch->message);
    if (status != CM_OK) {
        status = cm_error_set(err, CM_E_CORRUPT, "epoch", "%zu bytes that are no epoch", n_bytes);
        goto err_release;
    }
    epoch->number = epoch->message->number;
    if (epoch->message->placement != NULL &&
        pr_placement_unpack(epoch->message->placement, &epoch->placement, err) != CM_OK) {
        status = CM_E_CORRUPT;
        goto err_release;
    }
    status = epoch_check(epoch, err);
    if (status != CM_OK) {
        goto err_release;
    }
    *epoch_out = epoch;
    return CM_OK;

err_release:
    co_epoch_release(epoch);
    return status;
}

co_epoch *co_epoch_create(uint64_t number, uint64_t cluster, co_peer **members, uint32_t n_members,
                          const pr_placement *placement)
{
    Baleen__Control__V1__Placement place;
    pr_placement_pack(placement, &place);
    Baleen__Control__V1__Epoch message = BALEEN__CONTROL__V1__EPOCH__INIT;
    message.number = number;
    message.cluster = cluster;
    message.members = members;
    message.n_members = n_members;
    message.placement = &place;

    /* Through its own bytes: what is stored, what is sent and what is held can never differ. */
    cm_bytes packed;
    cm_bytes_init(&packed, 0);
    pr_pack(&message.base, &packed);
    co_epoch *epoch = NULL;
    cm_error err = {0};
    cm_status status = co_epoch_unpack(packed.data, packed.len, &epoch, &err);
    CM_ASSERT_MSG(status == CM_OK, "epoch %llu: %s", (unsigned long long)number, err.text);
    cm_bytes_fini(&packed);
    pr_placement_message_free(&place);
    return epoch;
}

co_epoch *co_epoch_hold(co_epoch *epoch)
{
    epoch->refs++;
    return epoch;
}

void co_epoch_release(co_epoch *epoch)
{
    if (epoch == NULL || --epoch->refs > 0) {
        return;
    }
    pr_placement_free(epoch->placement);
    cm_bytes_fini(&epoch->packed);
    cm_arena_fini(&epoch->arena);
    cm_free(epoch);
}

const co_peer *co_epoch_find(const co_epoch *epoch, uint32_t id)
{
    size_t low = 0, high = epoch->message->n_members;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const co_peer *peer = epoch->message->members[middle];
        if (peer->id == id) {
            return peer;
        }
        if (peer->id < id) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return NULL;
}

uint32_t co_epoch_count(const co_epoch *epoch, Baleen__Control__V1__Role role)
{
    uint32_t n = 0;
    for (size_t i = 0; i < epoch->message->n_members; i++) {
        n += epoch->message->members[i]->role == role;
    }
    return n;
}
