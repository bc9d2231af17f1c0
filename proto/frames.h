/* Row frames between routers and workers: fixed little-endian headers, then arrays. A frame belongs to one
 * layer of one step of one router and to one epoch; workers refuse any other epoch than those they hold, and
 * anything whose sizes do not add up, with PR_MSG_REFUSE and a counter; nothing in a refused frame is used.
 *
 *   dispatch payload:  pr_slot [n_slot] | codes E4M3 [n_row][d] | scales E8M0 [n_row][ceil(d/128)]   (each
 * 64-aligned) combine payload:   BF16 [n_slot][d], in the order of the dispatch's slots
 *
 * An answer is one combine frame or several with ascending slots. Slots are in the order in which experts are
 * computed, so that the first can be on their way while the last are computed, and be put away meanwhile.
 *
 * Thread: any; values only. */
#pragma once
#include <stdint.h>

#include "common/base/status.h"

enum { PR_FRAME_VERSION = 3, PR_DTYPE_E4M3 = 1, PR_DTYPE_BF16 = 2 };
enum { PR_FLIGHTS_MAX = 2 }; /* layers that a router has under way at once, one for each micro-batch */

/* First in every frame header. */
typedef struct pr_frame_head {
    uint16_t version; /* PR_FRAME_VERSION */
    uint16_t dtype;   /* of the rows: PR_DTYPE_* */
    uint32_t router;  /* member id of the router it belongs to */
    uint64_t cluster;
    uint64_t epoch;
    uint64_t step; /* of that router; steps count up */
    uint32_t layer;
    uint32_t exchange; /* counts every dispatch of a router up, retries included: pairs request and answer */
} pr_frame_head;
_Static_assert(sizeof(pr_frame_head) == 40, "wire layout");

typedef struct pr_dispatch {
    pr_frame_head head;
    uint32_t d; /* values of a row */
    uint32_t n_row;
    uint32_t n_slot;
    uint32_t row_blocks; /* scales of a row */
    uint32_t flight;     /* below PR_FLIGHTS_MAX: its next frames are of the layers that follow */
    uint32_t zero;
} pr_dispatch;
_Static_assert(sizeof(pr_dispatch) == 64, "wire layout");

/* One chosen expert of one row; ordered by (expert, row). */
typedef struct pr_slot {
    uint32_t row;    /* row of this frame */
    uint32_t expert; /* of the frame's layer */
    float weight;
} pr_slot;
_Static_assert(sizeof(pr_slot) == 12, "wire layout");

typedef struct pr_combine {
    pr_frame_head head;
    uint32_t d;
    uint32_t slot0; /* of the dispatch, the first of this frame */
    uint32_t n_slot;
    uint32_t zero;
} pr_combine;
_Static_assert(sizeof(pr_combine) == 56, "wire layout");

/* Why a dispatch was not computed. head is the dispatch's own. */
typedef struct pr_refuse {
    pr_frame_head head;
    int32_t status;  /* cm_status: CM_E_STALE, CM_E_NO_OWNER, CM_E_PROTOCOL */
    uint32_t expert; /* with CM_E_NO_OWNER */
    uint64_t epoch;  /* newest the worker holds */
} pr_refuse;
_Static_assert(sizeof(pr_refuse) == 56, "wire layout");

/* A router has nothing to compute: do not wait for it. Any dispatch takes it back. */
typedef struct pr_idle {
    pr_frame_head head; /* layer, exchange unused */
} pr_idle;

static inline uint64_t pr_align64(uint64_t n)
{
    return (n + 63) / 64 * 64;
}
/* Offsets inside a dispatch payload. */
static inline uint64_t pr_dispatch_codes_at(uint32_t n_slot)
{
    return pr_align64((uint64_t)n_slot * sizeof(pr_slot));
}
static inline uint64_t pr_dispatch_scales_at(uint32_t n_slot, uint32_t n_row, uint32_t d)
{
    return pr_dispatch_codes_at(n_slot) + pr_align64((uint64_t)n_row * d);
}
static inline uint64_t pr_dispatch_bytes(uint32_t n_slot, uint32_t n_row, uint32_t d, uint32_t row_blocks)
{
    return pr_dispatch_scales_at(n_slot, n_row, d) + pr_align64((uint64_t)n_row * row_blocks);
}

/* Checks everything a receiver relies on: version, sizes against payload_bytes, d and expert range, slots
 * in range and ordered, finite weights. err names the field. CM_E_PROTOCOL. */
CM_MUST_CHECK cm_status pr_dispatch_check(const void *header, uint32_t header_bytes, const void *payload,
                                          uint64_t payload_bytes, uint32_t d, uint32_t n_layer,
                                          uint32_t n_expert, cm_error *err);
CM_MUST_CHECK cm_status pr_combine_check(const void *header, uint32_t header_bytes, uint64_t payload_bytes,
                                         uint32_t d, cm_error *err);
