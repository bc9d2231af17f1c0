/* What the host prepares of a step for the device: ids, positions, segments and the page lists (block tables)
 * of all its rows, and the segments once more as its micro-batches have them. Pure arithmetic on memory taken
 * at init; O(rows + segments + pages). Used by the engine. A value. Thread: any, one at a time. */
#pragma once
#include "kernels/kn.h"
#include "router/engine/micro_core.h"
#include "router/sched/sched_core.h"

/* Where a step is cut in two, as rt_micro_cut. */
typedef uint32_t (*rt_cut_fn)(void *ctx, const kn_seg *segs, uint32_t n_seg, uint32_t n_row);

typedef struct rt_batch_part {
    uint32_t row0, n_row; /* of the step's */
    uint32_t seg0, n_seg; /* of cut */
    uint32_t pos_end;     /* all its rows' positions are below */
} rt_batch_part;

typedef struct rt_batch {
    uint32_t n_seg, n_row, n_page, n_part;
    kn_seg *segs;        /* [slot_max] of the step */
    kn_seg *cut;         /* [slot_max + 1] of its parts, rows counted from each part's first */
    uint32_t *ids, *pos; /* [row_max] */
    uint32_t *pages;     /* [page_max] */
    rt_batch_part parts[RT_MICRO_MAX];
    uint32_t slot_max, row_max, page_max;
} rt_batch;

void rt_batch_init(rt_batch *batch, uint32_t slot_max, uint32_t row_max, uint32_t page_max);
void rt_batch_fini(rt_batch *batch);
/* All but cut and parts, from a step. Slot i of the sequences' state is at slots + i * slot_bytes. */
void rt_batch_fill(rt_batch *batch, const rt_step *step, kn_ptr slots, uint64_t slot_bytes);
/* cut and parts: n_part is 1, or 2 with at least two rows. fn NULL: rt_micro_cut. */
void rt_batch_cut(rt_batch *batch, uint32_t n_part, rt_cut_fn fn, void *ctx);
