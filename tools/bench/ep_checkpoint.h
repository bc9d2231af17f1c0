/* A checkpoint of zeros for the exchange benchmarks: files of holes whose headers are complete, so that the
 * engines open and load it like any other, at the widths of the real models and with experts so small that
 * nothing of the time goes into them. Thread: any. */
#pragma once
#include <stdint.h>

#include "common/base/status.h"

typedef struct ep_shape {
    uint32_t d, inner, n_layer, n_expert, topk;
} ep_shape;

/* Into folder, which exists and is empty. */
CM_MUST_CHECK cm_status ep_checkpoint_write(const char *folder, const ep_shape *shape, cm_error *err);
/* Those files and the folder; what is not there is not missed. */
void ep_checkpoint_remove(const char *folder);
