/* Where KV lives (model section 10): one page of KN_PAGE_TOKENS tokens holds the compressed rows and indexer keys of all
 * layers; one slot per running sequence holds what does not grow: raw windows and compressor states of all layers.
 * Pure arithmetic on the geometry; allocator, planner and metrics all use it. Thread: any. */
#pragma once
#include "common/model/geometry.h"
#include "kernels/kn.h"

typedef struct rt_kv_layout {
    kn_kv_layout layer[MD_LAYER_MAX];
    uint64_t page_bytes, slot_bytes;
} rt_kv_layout;

void rt_kv_layout_build(const md_geometry *geometry, rt_kv_layout *layout_out);
