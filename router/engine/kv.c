#include "router/engine/kv.h"

void rt_kv_layout_build(const md_geometry *geometry, rt_kv_layout *layout_out)
{
    uint64_t page = 0, slot = 0;
    for (uint32_t l = 0; l < geometry->n_layer; l++) {
        uint32_t ratio = geometry->ratio[l];
        kn_kv_layout *layer = &layout_out->layer[l];
        *layer = (kn_kv_layout){.ratio = ratio, .row_bytes = kn_kv_row_bytes(geometry->head_dim, geometry->rope_dim)};
        layer->slot_raw = slot;
        slot += (uint64_t)geometry->window * layer->row_bytes;
        if (ratio == 0) {
            continue;
        }
        layer->page_rows = page;
        page += (uint64_t)(KN_PAGE_TOKENS / ratio) * layer->row_bytes;
        layer->slot_main = slot;
        slot += kn_compress_state_bytes(ratio, geometry->head_dim);
        if (ratio == 4) {
            layer->index_bytes = kn_index_row_bytes(geometry->index_dim);
            layer->page_index = page;
            page += (uint64_t)(KN_PAGE_TOKENS / ratio) * layer->index_bytes;
            layer->slot_index = slot;
            slot += kn_compress_state_bytes(ratio, geometry->index_dim);
        }
    }
    /* rows of a page are 8-byte multiples in sum; slots start aligned for the float states */
    layout_out->page_bytes = (page + 63) / 64 * 64;
    layout_out->slot_bytes = (slot + 63) / 64 * 64;
}
