/* Input: a config.json. */
#include "common/model/checkpoint.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    md_geometry geometry;
    cm_error err = {0};
    uint64_t n_tensors, n_bytes;
    if (md_geometry_parse((const char *)data, size, &geometry, &err) != CM_OK) {
        CM_ASSERT(err.text[0] != '\0' && err.field[0] != '\0');
        return 0;
    }
    CM_ASSERT(geometry.n_layer <= MD_LAYER_MAX && geometry.topk <= geometry.n_expert);
    md_expect_totals(&geometry, &n_tensors,
                     &n_bytes); /* the closed list is arithmetic on sizes that were accepted */
    CM_ASSERT(n_tensors > geometry.n_layer && n_bytes > n_tensors);
    return 0;
}
