/* One epoch as an immutable value: the message members get, the bytes the log keeps and the placement in it.
 * Shared by counting within the loop thread; other threads may read one that the loop thread holds for them.
 */
#pragma once
#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/base/status.h"
#include "proto/control.pb-c.h"
#include "proto/placement.h"

#define CO_ROLE_COORDINATOR BALEEN__CONTROL__V1__ROLE__ROLE_COORDINATOR
#define CO_ROLE_GATEWAY     BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY
#define CO_ROLE_ROUTER      BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER
#define CO_ROLE_WORKER      BALEEN__CONTROL__V1__ROLE__ROLE_WORKER

typedef Baleen__Control__V1__Member co_peer; /* what members know of one another */

typedef struct co_epoch {
    uint32_t refs;
    uint64_t number;
    Baleen__Control__V1__Epoch *message; /* members in ascending order of id; lives in arena */
    pr_placement *placement;
    cm_bytes packed; /* the message as bytes */
    cm_arena arena;
} co_epoch;

/* From packed bytes (copied). CM_E_CORRUPT: not an epoch, or one that contradicts itself; err says how. */
CM_MUST_CHECK cm_status co_epoch_unpack(const void *data, size_t n_bytes, co_epoch **epoch_out,
                                        cm_error *err);
/* members: borrowed for the call, ids ascending. */
co_epoch *co_epoch_create(uint64_t number, uint64_t cluster, co_peer **members, uint32_t n_members,
                          const pr_placement *placement);
co_epoch *co_epoch_hold(co_epoch *epoch);
void co_epoch_release(co_epoch *epoch); /* NULL is fine */

const co_peer *co_epoch_find(const co_epoch *epoch, uint32_t id); /* NULL when absent */
uint32_t co_epoch_count(const co_epoch *epoch, Baleen__Control__V1__Role role);
