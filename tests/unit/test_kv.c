/* KV capacity: what the layout takes is what the closed formula says, on every geometry, and the formula
 * gives the released models' published numbers (model section 10). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "router/engine/kv.h"

static void geometry_open(const char *path, md_geometry *geometry_out)
{
    static char text[1 << 16];
    cm_error err = {0};
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    size_t n = fread(text, 1, sizeof(text), file);
    fclose(file);
    if (md_geometry_parse(text, n, geometry_out, &err) != CM_OK) {
        fail_msg("%s: %s", path, err.text);
    }
}

static void geometry_released(const char *name, md_geometry *geometry_out)
{
    char path[512];
    snprintf(path, sizeof(path), "%s/%s_config.json", UNIT_TEST_DATA, name);
    geometry_open(path, geometry_out);
}

/* ---- the layout against the formula ---- */

typedef struct piece {
    uint64_t at, n_bytes;
} piece;

typedef struct pieces {
    piece list[4 * MD_LAYER_MAX];
    uint32_t n;
} pieces;

static void pieces_add(pieces *p, uint64_t at, uint64_t n_bytes)
{
    p->list[p->n++] = (piece){at, n_bytes};
}

static int piece_order(const void *a, const void *b)
{
    uint64_t x = ((const piece *)a)->at, y = ((const piece *)b)->at;
    return (x > y) - (x < y);
}

/* Every byte up to n_bytes belongs to exactly one piece. */
static void assert_tiled(pieces *p, uint64_t n_bytes)
{
    uint64_t at = 0;
    qsort(p->list, p->n, sizeof(piece), piece_order);
    for (uint32_t i = 0; i < p->n; i++) {
        assert_int_equal(p->list[i].at, at);
        at += p->list[i].n_bytes;
    }
    assert_int_equal(at, n_bytes);
}

static void check_layout_ahead(const char *path, uint32_t draft_max)
{
    static rt_kv_layout layout;
    static pieces page, slot;
    md_geometry g;
    rt_kv_sizes sizes;
    geometry_open(path, &g);
    rt_kv_layout_build(&g, draft_max, &layout);
    rt_kv_sizes_get(&g, draft_max, &sizes);
    page.n = slot.n = 0;
    for (uint32_t l = 0; l < layout.n_layer; l++) {
        const kn_kv_layout *layer = &layout.layer[l];
        assert_int_equal(layer->ratio, g.ratio[l]);
        pieces_add(&slot, layer->slot_raw, (uint64_t)(g.window + draft_max) * layer->row_bytes);
        if (layer->ratio != 0) {
            pieces_add(&page, layer->page_rows, (uint64_t)KN_PAGE_TOKENS / layer->ratio * layer->row_bytes);
            pieces_add(&slot, layer->slot_main, kn_compress_state_bytes(layer->ratio, g.head_dim, draft_max));
        }
        if (layer->ratio == 4) {
            pieces_add(&page, layer->page_index,
                       (uint64_t)KN_PAGE_TOKENS / layer->ratio * layer->index_bytes);
            pieces_add(&slot, layer->slot_index,
                       kn_compress_state_bytes(layer->ratio, g.index_dim, draft_max));
        }
    }
    assert_tiled(&page, sizes.row_bytes);
    assert_tiled(&slot, sizes.window_bytes + sizes.state_bytes);
    assert_int_equal(layout.page_bytes, sizes.page_bytes);
    assert_int_equal(layout.slot_bytes, sizes.slot_bytes);
    assert_true(sizes.page_bytes % 64 == 0 && sizes.page_bytes - sizes.row_bytes < 64);
    assert_true(sizes.slot_bytes % 64 == 0 && sizes.slot_bytes - sizes.window_bytes - sizes.state_bytes < 64);
}

static void check_layout(const char *path)
{
    md_geometry g;
    static rt_kv_layout layout;
    check_layout_ahead(path, 0);
    check_layout_ahead(path, 3);
    geometry_open(path, &g);
    rt_kv_layout_build(&g, 3, &layout);
    assert_int_equal(layout.n_layer, md_block_count(&g));
}

static void test_layout(void **state)
{
    (void)state;
    check_layout(BALEEN_TEST_DATA "/model/tiny-pro/ckpt/config.json");
    check_layout(BALEEN_TEST_DATA "/model/tiny-flash/ckpt/config.json");
    check_layout(BALEEN_TEST_DATA "/model/tiny-base/ckpt/config.json");
    check_layout(BALEEN_TEST_DATA "/model/tiny-odd/ckpt/config.json");
    check_layout(BALEEN_NANO "/config.json");
    check_layout(UNIT_TEST_DATA "/pro_config.json");
    check_layout(UNIT_TEST_DATA "/flash_config.json");
}

static void test_sequence(void **state)
{
    (void)state;
    const rt_kv_sizes sizes = {.page_bytes = 640, .slot_bytes = 128};
    assert_int_equal(rt_kv_seq_pages(0), 0);
    assert_int_equal(rt_kv_seq_pages(1), 1);
    assert_int_equal(rt_kv_seq_pages(128), 1);
    assert_int_equal(rt_kv_seq_pages(129), 2);
    assert_int_equal(rt_kv_seq_pages(1048576), 8192);
    assert_int_equal(rt_kv_seq_bytes(&sizes, 1), 640 + 128);
    assert_int_equal(rt_kv_seq_bytes(&sizes, 257), 3 * 640 + 128);
}

/* Memory in, pages and states out. */
static void test_count(void **state)
{
    (void)state;
    md_geometry g = {.context = 1000}; /* 8 pages */
    const rt_kv_sizes sizes = {.page_bytes = 640, .slot_bytes = 1280, .kept_bytes = 128};
    rt_kv_budget budget = {.kv_bytes = 64000, .slot_max = 3};
    uint32_t n_page = 7, n_state = 7;
    cm_error err;
    assert_int_equal(rt_kv_count(&g, &sizes, &budget, &n_page, &n_state, &err), CM_OK);
    assert_int_equal(n_page, 24); /* nothing is kept: as many as sequences can use */
    assert_int_equal(n_state, 0);
    budget.prefix_bytes = 127;
    assert_int_equal(rt_kv_count(&g, &sizes, &budget, &n_page, &n_state, &err), CM_E_CONFIG);
    assert_string_equal(err.field, "prefix_bytes");
    budget.prefix_bytes = 128 * 2 + 127;
    assert_int_equal(rt_kv_count(&g, &sizes, &budget, &n_page, &n_state, &err), CM_OK);
    assert_int_equal(n_page, 40); /* and as many as can stand before a state */
    assert_int_equal(n_state, 2);
    budget.prefix_bytes = 1 << 20;
    assert_int_equal(rt_kv_count(&g, &sizes, &budget, &n_page, &n_state, &err), CM_OK);
    assert_int_equal(n_page, 100); /* all that there is memory for, and one state for each */
    assert_int_equal(n_state, 100);
    budget.kv_bytes = 639;
    assert_int_equal(rt_kv_count(&g, &sizes, &budget, &n_page, &n_state, &err), CM_E_CONFIG);
    assert_string_equal(err.field, "kv_bytes");
}

/* ---- published numbers ---- */

static void assert_printed(double value, const char *format, const char *expected)
{
    char text[32];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    snprintf(text, sizeof(text), format, value);
#pragma GCC diagnostic pop
    assert_string_equal(text, expected);
}

#define MIB(bytes) ((double)(bytes) / (1 << 20))
#define GIB(bytes) ((double)(bytes) / (1 << 30))

/* The totals published for a context are rows and raw windows, without the compressor states. */
static double context_gib(const rt_kv_sizes *sizes, uint64_t n_token)
{
    return GIB(n_token * sizes->row_bytes / KN_PAGE_TOKENS + sizes->window_bytes);
}

static void test_pro(void **state)
{
    (void)state;
    md_geometry g;
    rt_kv_sizes sizes;
    geometry_released("pro", &g);
    rt_kv_sizes_get(&g, 0, &sizes);
    assert_int_equal(kn_kv_row_bytes(g.head_dim, g.rope_dim), 584);
    assert_int_equal(kn_index_row_bytes(g.index_dim), 68);
    assert_int_equal(sizes.row_bytes, 644024); /* 5031.4375 * 128 */
    assert_printed((double)sizes.row_bytes / KN_PAGE_TOKENS, "%.1f", "5031.4");
    assert_printed(MIB(sizes.window_bytes), "%.2f", "4.35");
    assert_printed(MIB(sizes.state_bytes), "%.2f", "17.84");
    assert_printed(MIB(sizes.kept_bytes), "%.2f", "5.52");
    assert_printed(context_gib(&sizes, 1 << 20), "%.3f", "4.918");
    assert_printed(context_gib(&sizes, 1 << 17), "%.3f", "0.618");
}

static void test_flash(void **state)
{
    (void)state;
    md_geometry g;
    rt_kv_sizes sizes;
    geometry_released("flash", &g);
    rt_kv_sizes_get(&g, 0, &sizes);
    assert_int_equal(sizes.row_bytes, 449824);                                   /* 3514.25 * 128 */
    assert_printed((double)sizes.row_bytes / KN_PAGE_TOKENS, "%.2f", "3514.25"); /* published as 3514.3 */
    assert_printed(MIB(sizes.window_bytes), "%.2f", "3.07");
    assert_printed(MIB(sizes.state_bytes), "%.2f", "11.64");
    assert_printed(context_gib(&sizes, 1 << 20), "%.3f", "3.435");
    assert_printed(context_gib(&sizes, 1 << 17), "%.3f", "0.432");
}

/* One layer alone: what a ratio costs. */
static void test_one_layer(void **state)
{
    (void)state;
    md_geometry g;
    rt_kv_sizes sizes;
    geometry_released("pro", &g);
    g.n_layer = 1;
    g.ratio[0] = 4;
    rt_kv_sizes_get(&g, 0, &sizes);
    assert_int_equal(sizes.row_bytes, 163 * KN_PAGE_TOKENS);
    assert_int_equal(kn_compress_state_bytes(4, g.head_dim, 0), 65536);
    assert_int_equal(kn_compress_state_bytes(4, g.index_dim, 0), 16384);
    assert_int_equal(sizes.state_bytes, 65536 + 16384);
    g.ratio[0] = 128;
    rt_kv_sizes_get(&g, 0, &sizes);
    assert_printed((double)sizes.row_bytes / KN_PAGE_TOKENS, "%.2f", "4.56");
    assert_int_equal(sizes.state_bytes, 524288);
    g.ratio[0] = 0;
    rt_kv_sizes_get(&g, 0, &sizes);
    assert_int_equal(sizes.row_bytes, 0);
    assert_int_equal(sizes.state_bytes, 0);
    assert_int_equal(sizes.window_bytes, 128 * 584);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_layout), cmocka_unit_test(test_sequence),
                                       cmocka_unit_test(test_count),  cmocka_unit_test(test_pro),
                                       cmocka_unit_test(test_flash),  cmocka_unit_test(test_one_layer)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
