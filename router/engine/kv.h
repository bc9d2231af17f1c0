/* Where KV lives (model section 10): one page of KN_PAGE_TOKENS tokens holds the compressed rows and indexer
 * keys of all layers; one slot per running sequence holds what does not grow: raw windows and compressor
 * states of all layers. Where a page ends, less than a slot is enough to go on from, besides the pages before
 * it: the windows and what the next compressed rows overlap with; that is what is kept for later sequences.
 * Pure arithmetic on the geometry; allocator, planner and metrics all use it. Thread: any. */
#pragma once
#include "common/model/geometry.h"
#include "kernels/kn.h"

/* The closed formulas, from how many layers of each ratio there are. */
typedef struct rt_kv_sizes {
    uint64_t row_bytes; /* what KN_PAGE_TOKENS tokens of context leave behind: row_bytes / KN_PAGE_TOKENS per
                           token, exactly */
    uint64_t window_bytes; /* raw windows of one sequence */
    uint64_t state_bytes;  /* compressor states of one sequence */
    uint64_t page_bytes;   /* row_bytes as allocated: a multiple of 64 */
    uint64_t slot_bytes;   /* window_bytes + state_bytes likewise */
    uint64_t kept_bytes;   /* to go on from a page's end, likewise */
} rt_kv_sizes;

/* draft_max: tokens guessed ahead at most, 0 without speculation. Each costs a spare entry in every ring and
 * compressor state (kn.h, taking rows back), and the drafter a ring of its own. */
void rt_kv_sizes_get(const md_geometry *geometry, uint32_t draft_max, rt_kv_sizes *sizes_out);
/* Pages that hold n_token tokens of one sequence. */
uint32_t rt_kv_seq_pages(uint64_t n_token);
/* What one sequence of n_token tokens takes from the allocator: its pages and its slot. */
uint64_t rt_kv_seq_bytes(const rt_kv_sizes *sizes, uint64_t n_token);

/* Memory as it was given, in pieces. */
typedef struct rt_kv_budget {
    uint64_t kv_bytes;     /* for pages */
    uint64_t prefix_bytes; /* for states to go on from; 0: none is kept */
    uint32_t slot_max;
} rt_kv_budget;
/* States that fit into prefix_bytes, at most one a page; pages that fit into kv_bytes, or as many as slot_max
 * and the states of the longest sequences can use. CM_E_CONFIG: not even one. */
CM_MUST_CHECK cm_status rt_kv_count(const md_geometry *geometry, const rt_kv_sizes *sizes,
                                    const rt_kv_budget *budget, uint32_t *n_page_out, uint32_t *n_state_out,
                                    cm_error *err);

/* Where a layer's part of a kept state stands; all by position, oldest first. */
typedef struct rt_kv_kept {
    uint64_t raw;         /* [window] stored rows */
    uint64_t main, index; /* ratio 4: kv, then score, float [4][width] each */
} rt_kv_kept;

typedef struct rt_kv_layout {
    kn_kv_layout layer[MD_LAYER_MAX]; /* of every block; the MTP block's only with draft_max */
    rt_kv_kept kept[MD_LAYER_MAX];
    uint32_t n_layer;
    uint32_t draft_max;
    uint64_t page_bytes, slot_bytes, kept_bytes; /* those of rt_kv_sizes */
} rt_kv_layout;

void rt_kv_layout_build(const md_geometry *geometry, uint32_t draft_max, rt_kv_layout *layout_out);
