#include "router/engine/batch.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

void rt_batch_init(rt_batch *b, uint32_t slot_max, uint32_t row_max, uint32_t page_max)
{
    *b = (rt_batch){.slot_max = slot_max, .row_max = row_max, .page_max = page_max};
    b->segs = cm_alloc(sizeof(kn_seg) * slot_max);
    b->cut = cm_alloc(sizeof(kn_seg) * (slot_max + 1));
    b->ids = cm_alloc(sizeof(uint32_t) * row_max);
    b->pos = cm_alloc(sizeof(uint32_t) * row_max);
    b->pages = cm_alloc(sizeof(uint32_t) * page_max);
}

void rt_batch_fini(rt_batch *b)
{
    cm_free(b->segs);
    cm_free(b->cut);
    cm_free(b->ids);
    cm_free(b->pos);
    cm_free(b->pages);
    *b = (rt_batch){0};
}

void rt_batch_fill(rt_batch *b, const rt_step *step, kn_ptr slots, uint64_t slot_bytes)
{
    uint32_t row = 0, page = 0;
    CM_ASSERT_MSG(step->n_row > 0 && step->n_row <= b->row_max && step->n_seg <= b->slot_max,
                  "step of %u rows and %u sequences", step->n_row, step->n_seg);
    for (uint32_t i = 0; i < step->n_seg; i++) {
        const rt_step_seg *seg = &step->segs[i];
        CM_ASSERT(seg->slot < b->slot_max && page + seg->n_page <= b->page_max);
        b->segs[i] = (kn_seg){.row0 = row,
                              .n_row = seg->n_row,
                              .pos0 = seg->pos0,
                              .page0 = page,
                              .slot = kn_at(slots, seg->slot * slot_bytes)};
        for (uint32_t k = 0; k < seg->n_row; k++, row++) {
            b->ids[row] = seg->tokens[k];
            b->pos[row] = seg->pos0 + k;
        }
        memcpy(b->pages + page, seg->pages, sizeof(uint32_t) * seg->n_page);
        page += seg->n_page;
    }
    CM_ASSERT(row == step->n_row);
    b->n_seg = step->n_seg;
    b->n_row = row;
    b->n_page = page;
}

/* Rows row0 .. end - 1 become a part. */
static void batch_add_part(rt_batch *b, uint32_t row0, uint32_t end)
{
    uint32_t seg0 = b->n_part > 0 ? b->parts[0].n_seg : 0, n = seg0, pos_end = 0;
    for (uint32_t i = 0; i < b->n_seg; i++) {
        kn_seg seg = b->segs[i];
        uint32_t from = seg.row0 > row0 ? seg.row0 : row0,
                 to = seg.row0 + seg.n_row < end ? seg.row0 + seg.n_row : end;
        if (from < to) {
            seg.pos0 += from - seg.row0;
            seg.row0 = from - row0;
            seg.n_row = to - from;
            b->cut[n++] = seg;
            pos_end = seg.pos0 + seg.n_row > pos_end ? seg.pos0 + seg.n_row : pos_end;
        }
    }
    b->parts[b->n_part++] = (rt_batch_part){row0, end - row0, seg0, n - seg0, pos_end};
}

void rt_batch_cut(rt_batch *b, uint32_t n_part, rt_cut_fn fn, void *ctx)
{
    b->n_part = 0;
    if (n_part == 1) {
        batch_add_part(b, 0, b->n_row);
        return;
    }
    uint32_t row =
        fn != NULL ? fn(ctx, b->segs, b->n_seg, b->n_row) : rt_micro_cut(b->segs, b->n_seg, b->n_row);
    CM_ASSERT_MSG(n_part == 2 && row > 0 && row < b->n_row, "%u parts, cut at %u of %u", n_part, row,
                  b->n_row);
    batch_add_part(b, 0, row);
    batch_add_part(b, row, b->n_row);
}
