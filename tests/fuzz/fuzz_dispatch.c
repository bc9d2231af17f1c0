/* Input: which of some models (1 byte), a frame's header, its payload. What is accepted may be used unseen.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "proto/frames.h"
#include "tests/fuzz/fuzz.h"

enum { LAYERS = 4, EXPERTS = 8 };

static void use(const pr_dispatch *frame, const uint8_t *payload, uint64_t n_payload)
{
    const pr_slot *slots = (const pr_slot *)payload;
    uint64_t before = 0;
    for (uint32_t i = 0; i < frame->n_slot; i++) {
        uint64_t place = (uint64_t)slots[i].expert << 32 | slots[i].row;
        CM_ASSERT(place >= before && slots[i].row < frame->n_row && slots[i].expert < EXPERTS);
        CM_ASSERT(isfinite(slots[i].weight));
        before = place;
    }
    uint64_t scales_at = pr_dispatch_scales_at(frame->n_slot, frame->n_row, frame->d);
    CM_ASSERT(frame->head.layer < LAYERS && frame->flight < PR_FLIGHTS_MAX);
    CM_ASSERT(pr_dispatch_codes_at(frame->n_slot) + (uint64_t)frame->n_row * frame->d <= n_payload);
    CM_ASSERT(scales_at + (uint64_t)frame->n_row * frame->row_blocks <= n_payload);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const uint32_t d_of[] = {1, 64, 128, 130, 7168, UINT32_MAX};
    if (size == 0) {
        return 0;
    }
    uint32_t d = d_of[data[0] % (sizeof(d_of) / sizeof(d_of[0]))];
    size_t n_header = size - 1 < sizeof(pr_dispatch) ? size - 1 : sizeof(pr_dispatch);
    size_t n_payload = size - 1 - n_header;
    uint8_t *header = malloc(n_header), *payload = malloc(n_payload); /* exact: one byte too far is seen */
    cm_error err = {0};
    memcpy(header, data + 1, n_header);
    memcpy(payload, data + 1 + n_header, n_payload);
    if (pr_dispatch_check(header, (uint32_t)n_header, payload, n_payload, d, LAYERS, EXPERTS, &err) ==
        CM_OK) {
        use((const pr_dispatch *)header, payload, n_payload);
    } else {
        CM_ASSERT(err.text[0] != '\0' && err.field[0] != '\0');
    }
    free(header);
    free(payload);
    return 0;
}
