#include "router/engine/kv.h"

#include "common/base/assert.h"

enum { KV_ALIGN = 64 }; /* slots start aligned for the float states, pages for whole cache lines */

static uint64_t kv_round_up(uint64_t n_bytes)
{
    return (n_bytes + KV_ALIGN - 1) / KV_ALIGN * KV_ALIGN;
}

/* ---- closed formulas ---- */

static uint32_t kv_layers_of(const md_geometry *g, uint32_t ratio)
{
    uint32_t n = 0;
    for (uint32_t l = 0; l < g->n_layer; l++) {
        n += g->ratio[l] == ratio;
    }
    return n;
}

static uint32_t kv_layers(const md_geometry *g, uint32_t draft_max)
{
    return draft_max == 0 ? g->n_layer : md_block_count(g);
}

void rt_kv_sizes_get(const md_geometry *g, uint32_t draft_max, rt_kv_sizes *sizes_out)
{
    uint64_t row = kn_kv_row_bytes(g->head_dim, g->rope_dim), key = kn_index_row_bytes(g->index_dim);
    uint64_t n4 = kv_layers_of(g, 4), n128 = kv_layers_of(g, 128);
    rt_kv_sizes sizes = {
        .row_bytes = n4 * (KN_PAGE_TOKENS / 4) * (row + key) + n128 * (KN_PAGE_TOKENS / 128) * row,
        .window_bytes = (uint64_t)kv_layers(g, draft_max) * (g->window + draft_max) * row,
        .state_bytes = n4 * (kn_compress_state_bytes(4, g->head_dim, draft_max) +
                             kn_compress_state_bytes(4, g->index_dim, draft_max)) +
                       n128 * kn_compress_state_bytes(128, g->head_dim, draft_max),
    };
    uint64_t kept = (uint64_t)kv_layers(g, draft_max) * g->window * row +
                    n4 * kn_compress_overlap_bytes(4, g->head_dim) +
                    n4 * kn_compress_overlap_bytes(4, g->index_dim);
    sizes.kept_bytes = kv_round_up(kept);
    sizes.page_bytes = kv_round_up(sizes.row_bytes);
    sizes.slot_bytes = kv_round_up(sizes.window_bytes + sizes.state_bytes);
    *sizes_out = sizes;
}

uint32_t rt_kv_seq_pages(uint64_t n_token)
{
    return (uint32_t)(n_token / KN_PAGE_TOKENS + (n_token % KN_PAGE_TOKENS != 0));
}

uint64_t rt_kv_seq_bytes(const rt_kv_sizes *sizes, uint64_t n_token)
{
    return rt_kv_seq_pages(n_token) * sizes->page_bytes + sizes->slot_bytes;
}

static uint64_t u64_min(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

cm_status rt_kv_count(const md_geometry *geometry, const rt_kv_sizes *sizes, const rt_kv_budget *budget,
                      uint32_t *n_page_out, uint32_t *n_state_out, cm_error *err)
{
    /* a model of windows only needs pages in name */
    uint64_t page_bytes = sizes->page_bytes != 0 ? sizes->page_bytes : 1;
    uint64_t n_page = budget->kv_bytes / page_bytes, n_state = budget->prefix_bytes / sizes->kept_bytes;
    if (n_page == 0) {
        return cm_error_set(err, CM_E_CONFIG, "kv_bytes", "kv_bytes %llu is less than one page of %llu bytes",
                            (unsigned long long)budget->kv_bytes, (unsigned long long)page_bytes);
    }
    if (n_state == 0 && budget->prefix_bytes > 0) {
        return cm_error_set(err, CM_E_CONFIG, "prefix_bytes",
                            "prefix_bytes %llu is less than the %llu bytes that one sequence leaves to go on "
                            "from: give more, or 0 to compute every prompt from its beginning",
                            (unsigned long long)budget->prefix_bytes, (unsigned long long)sizes->kept_bytes);
    }
    n_state = u64_min(n_state, n_page);
    n_page = u64_min(n_page, rt_kv_seq_pages(geometry->context) * (budget->slot_max + n_state));
    *n_page_out = (uint32_t)u64_min(n_page, UINT32_MAX - 1);
    *n_state_out = (uint32_t)u64_min(n_state, n_page);
    return CM_OK;
}

/* ---- layout ---- */

void rt_kv_layout_build(const md_geometry *geometry, uint32_t draft_max, rt_kv_layout *layout_out)
{
    uint64_t page = 0, slot = 0, kept = 0;
    rt_kv_sizes sizes;
    rt_kv_sizes_get(geometry, draft_max, &sizes);
    layout_out->n_layer = kv_layers(geometry, draft_max);
    layout_out->draft_max = draft_max;
    for (uint32_t l = 0; l < layout_out->n_layer; l++) {
        uint32_t ratio = geometry->ratio[l];
        kn_kv_layout *layer = &layout_out->layer[l];
        *layer = (kn_kv_layout){.ratio = ratio,
                                .ring = geometry->window + draft_max,
                                .row_bytes = kn_kv_row_bytes(geometry->head_dim, geometry->rope_dim)};
        layer->slot_raw = slot;
        slot += (uint64_t)layer->ring * layer->row_bytes;
        layout_out->kept[l].raw = kept;
        kept += (uint64_t)geometry->window * layer->row_bytes;
        if (ratio == 0) {
            continue;
        }
        layer->page_rows = page;
        page += (uint64_t)(KN_PAGE_TOKENS / ratio) * layer->row_bytes;
        layer->slot_main = slot;
        slot += kn_compress_state_bytes(ratio, geometry->head_dim, draft_max);
        if (ratio == 4) {
            layer->index_bytes = kn_index_row_bytes(geometry->index_dim);
            layer->page_index = page;
            page += (uint64_t)(KN_PAGE_TOKENS / ratio) * layer->index_bytes;
            layer->slot_index = slot;
            slot += kn_compress_state_bytes(ratio, geometry->index_dim, draft_max);
            layout_out->kept[l].main = kept;
            kept += kn_compress_overlap_bytes(ratio, geometry->head_dim);
            layout_out->kept[l].index = kept;
            kept += kn_compress_overlap_bytes(ratio, geometry->index_dim);
        }
    }
    CM_ASSERT_MSG(page == sizes.row_bytes && slot == sizes.window_bytes + sizes.state_bytes,
                  "layers take %llu and %llu bytes, the formula says %llu and %llu", (unsigned long long)page,
                  (unsigned long long)slot, (unsigned long long)sizes.row_bytes,
                  (unsigned long long)(sizes.window_bytes + sizes.state_bytes));
    CM_ASSERT(kv_round_up(kept) == sizes.kept_bytes);
    layout_out->kept_bytes = sizes.kept_bytes;
    layout_out->page_bytes = sizes.page_bytes;
    layout_out->slot_bytes = sizes.slot_bytes;
}
