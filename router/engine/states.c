/* What a sequence goes on from at a page's end, besides the pages before it (kv.h): copied out of the slot
 * and the rows of a step when it passes there, copied into a slot when another begins like it. A step's rows
 * may reach beyond the page's end; a layer's part is therefore taken before its rows are entered into the
 * slot: of positions before the step's rows from the slot, of the others from the rows. */
#include "common/base/assert.h"
#include "router/engine/engine_private.h"

/* Entries by position: in a slot at position % n_ring, in a step's rows, in a kept state. */
typedef struct state_part {
    uint64_t slot, kept; /* offsets */
    uint32_t n_ring, n_back;
    uint64_t entry_bytes;
    kn_ptr rows;
} state_part;

enum { STATE_PARTS = 5 };

/* kv and score of a compressor. */
static uint32_t state_compress(const rt_compressor *c, uint64_t kept, kn_ptr kv, kn_ptr score,
                               state_part *parts)
{
    uint64_t entry_bytes = sizeof(float) * kn_compress_width(c->kn.ratio, c->kn.dim);
    uint32_t n_back = kn_compress_overlap(c->kn.ratio);
    parts[0] = (state_part){.slot = c->kn.slot_state,
                            .kept = kept,
                            .n_ring = c->kn.span,
                            .n_back = n_back,
                            .entry_bytes = entry_bytes,
                            .rows = kv};
    parts[1] = parts[0];
    parts[1].slot += c->kn.span * entry_bytes;
    parts[1].kept += n_back * entry_bytes;
    parts[1].rows = score;
    return 2;
}

/* rows: those of buf. */
static uint32_t state_parts(const rt_engine *e, const rt_buffers *buf, uint32_t layer,
                            state_part parts[STATE_PARTS])
{
    const rt_layer *w = &e->weights.layers[layer];
    const rt_kv_kept *kept = &e->kv.kept[layer];
    const kn_kv_layout *layout = &w->attn.layout;
    uint32_t n = 0;
    parts[n++] = (state_part){.slot = layout->slot_raw,
                              .kept = kept->raw,
                              .n_ring = layout->ring,
                              .n_back = e->geometry->window,
                              .entry_bytes = layout->row_bytes,
                              .rows = buf->rows};
    if (layout->ratio == 4) {
        n += state_compress(&w->main, kept->main, buf->ckv, buf->cscore, parts + n);
        n += state_compress(&w->index, kept->index, buf->ikv, buf->iscore, parts + n);
    }
    return n;
}

static uint32_t state_first(const state_part *part, uint32_t pos)
{
    return pos > part->n_back ? pos - part->n_back : 0;
}

/* Positions first .. until - 1 between the ring and a row of entries. */
static void ring_copy(rt_engine *e, const state_part *part, kn_ptr ring, uint32_t first, uint32_t until,
                      kn_ptr row, bool into_ring)
{
    for (uint32_t pos = first, n; pos < until; pos += n) {
        uint32_t at = pos % part->n_ring;
        n = until - pos < part->n_ring - at ? until - pos : part->n_ring - at;
        kn_ptr in_ring = kn_at(ring, at * part->entry_bytes),
               in_row = kn_at(row, (pos - first) * part->entry_bytes);
        kn_copy(e->stream, into_ring ? in_ring : in_row, into_ring ? in_row : in_ring, n * part->entry_bytes);
    }
}

void rt_states_load(rt_engine *e, const rt_step *step)
{
    state_part parts[STATE_PARTS];
    for (uint32_t i = 0; i < step->n_load; i++) {
        const rt_step_state *load = &step->loads[i];
        kn_ptr kept = kn_at(e->kept_pool, load->state * e->kv.kept_bytes);
        CM_ASSERT_MSG(load->state < e->n_state && load->pos == step->segs[load->seg].pos0 &&
                          load->pos % KN_PAGE_TOKENS == 0,
                      "state %u of %u at position %u", load->state, e->n_state, load->pos);
        for (uint32_t l = 0; l < e->kv.n_layer; l++) {
            uint32_t n = state_parts(e, &e->buf, l, parts);
            for (uint32_t k = 0; k < n; k++) {
                ring_copy(e, &parts[k], kn_at(e->host.segs[load->seg].slot, parts[k].slot),
                          state_first(&parts[k], load->pos), load->pos, kn_at(kept, parts[k].kept), true);
            }
        }
    }
    e->n_save = step->n_save;
}

static void state_save_part(rt_engine *e, const state_part *part, const kn_seg *seg, uint32_t pos,
                            kn_ptr kept)
{
    uint32_t first = state_first(part, pos), middle = seg->pos0 > first ? seg->pos0 : first;
    ring_copy(e, part, kn_at(seg->slot, part->slot), first, middle, kept, false);
    uint64_t row = seg->row0 + (middle - seg->pos0);
    kn_copy(e->stream, kn_at(kept, (middle - first) * part->entry_bytes),
            kn_at(part->rows, row * part->entry_bytes), (pos - middle) * part->entry_bytes);
}

/* The micro-batch's piece of a segment that holds the row before pos; NULL: the other one has it. */
static const kn_seg *state_piece(const rt_engine *e, const rt_micro *m, const rt_step_state *save)
{
    const rt_batch_part *part = &e->host.parts[m - e->micros];
    for (uint32_t i = 0; i < part->n_seg; i++) {
        const kn_seg *piece = &e->host.cut[part->seg0 + i];
        if (piece->slot.addr == e->host.segs[save->seg].slot.addr && save->pos > piece->pos0 &&
            save->pos <= piece->pos0 + piece->n_row) {
            return piece;
        }
    }
    return NULL;
}

void rt_states_save(rt_engine *e, const rt_micro *m, uint32_t layer)
{
    state_part parts[STATE_PARTS];
    uint32_t n = e->n_save > 0 ? state_parts(e, &m->buf, layer, parts) : 0;
    for (uint32_t i = 0; i < e->n_save; i++) {
        const rt_step_state *save = &e->step->saves[i];
        const kn_seg *piece = state_piece(e, m, save);
        CM_ASSERT_MSG(save->state < e->n_state && save->pos % KN_PAGE_TOKENS == 0,
                      "state %u of %u at position %u", save->state, e->n_state, save->pos);
        for (uint32_t k = 0; k < n && piece != NULL; k++) {
            kn_ptr kept = kn_at(e->kept_pool, save->state * e->kv.kept_bytes + parts[k].kept);
            state_save_part(e, &parts[k], piece, save->pos, kept);
        }
    }
}
