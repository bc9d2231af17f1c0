#include "proto/frames.h"

#include <math.h>

static cm_status frame_head_check(const pr_frame_head *head, uint16_t dtype, cm_error *err)
{
    if (head->version != PR_FRAME_VERSION) {
        return cm_error_set(err, CM_E_PROTOCOL, "version", "frame version %u, this program speaks %u",
                            head->version, PR_FRAME_VERSION);
    }
    if (head->dtype != dtype) {
        return cm_error_set(err, CM_E_PROTOCOL, "dtype", "rows of dtype %u, expected %u", head->dtype, dtype);
    }
    return CM_OK;
}

static cm_status dispatch_slots_check(const pr_slot *slots, uint32_t n_slot, uint32_t n_row,
                                      uint32_t n_expert, cm_error *err)
{
    uint64_t place_before = 0;
    for (uint32_t i = 0; i < n_slot; i++) {
        uint64_t place = (uint64_t)slots[i].expert << 32 | slots[i].row;
        if (slots[i].row >= n_row || place < place_before) {
            return cm_error_set(err, CM_E_PROTOCOL, "row",
                                "slot %u names row %u of %u for expert %u, out of order or range", i,
                                slots[i].row, n_row, slots[i].expert);
        }
        if (slots[i].expert >= n_expert) {
            return cm_error_set(err, CM_E_PROTOCOL, "expert", "slot %u names expert %u of %u", i,
                                slots[i].expert, n_expert);
        }
        if (!isfinite(slots[i].weight)) {
            return cm_error_set(err, CM_E_PROTOCOL, "weight", "slot %u has a weight that is no number", i);
        }
        place_before = place;
    }
    return CM_OK;
}

cm_status pr_dispatch_check(const void *header, uint32_t header_bytes, const void *payload,
                            uint64_t payload_bytes, uint32_t d, uint32_t n_layer, uint32_t n_expert,
                            cm_error *err)
{
    const pr_dispatch *frame = header;
    if (header_bytes != sizeof(*frame)) {
        return cm_error_set(err, CM_E_PROTOCOL, "header", "dispatch header of %u bytes, expected %zu",
                            header_bytes, sizeof(*frame));
    }
    CM_TRY(frame_head_check(&frame->head, PR_DTYPE_E4M3, err));
    if (frame->d != d || frame->row_blocks != d / 128 + (d % 128 != 0)) {
        return cm_error_set(err, CM_E_PROTOCOL, "d", "rows of %u values and %u scales, the model has %u",
                            frame->d, frame->row_blocks, d);
    }
    if (frame->head.layer >= n_layer) {
        return cm_error_set(err, CM_E_PROTOCOL, "layer", "layer %u of %u", frame->head.layer, n_layer);
    }
    if (frame->flight >= PR_FLIGHTS_MAX) {
        return cm_error_set(err, CM_E_PROTOCOL, "flight", "flight %u of %u", frame->flight, PR_FLIGHTS_MAX);
    }
    if (frame->n_row >
        frame->n_slot) { /* a row without a slot has no business here, and buffers count slots */
        return cm_error_set(err, CM_E_PROTOCOL, "n_row", "%u rows for %u slots", frame->n_row, frame->n_slot);
    }
    if (frame->n_row == 0 || frame->n_slot == 0 ||
        pr_dispatch_bytes(frame->n_slot, frame->n_row, d, frame->row_blocks) != payload_bytes) {
        return cm_error_set(err, CM_E_PROTOCOL, "n_row", "%u rows and %u slots do not make %llu bytes",
                            frame->n_row, frame->n_slot, (unsigned long long)payload_bytes);
    }
    return dispatch_slots_check(payload, frame->n_slot, frame->n_row, n_expert, err);
}

cm_status pr_combine_check(const void *header, uint32_t header_bytes, uint64_t payload_bytes, uint32_t d,
                           cm_error *err)
{
    const pr_combine *frame = header;
    if (header_bytes != sizeof(*frame)) {
        return cm_error_set(err, CM_E_PROTOCOL, "header", "combine header of %u bytes, expected %zu",
                            header_bytes, sizeof(*frame));
    }
    CM_TRY(frame_head_check(&frame->head, PR_DTYPE_BF16, err));
    if (frame->d != d || (uint64_t)frame->n_slot * d * 2 != payload_bytes) {
        return cm_error_set(err, CM_E_PROTOCOL, "n_slot", "%u slots of %u values do not make %llu bytes",
                            frame->n_slot, frame->d, (unsigned long long)payload_bytes);
    }
    return CM_OK;
}
