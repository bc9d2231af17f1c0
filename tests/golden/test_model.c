/* The engine against the four golden models: every layer's sub-blocks from golden inputs, and every prompt's
 * logits and greedy tokens from its ids, within the fixtures' class D tolerances. Run with the path as
 * argument, "ref" or a cpu path; none = the best cpu path; --table [PATH]: on every path (or that one), and
 * then the worst errors against their tolerances. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "router/engine/engine_private.h"
#include "tests/golden/error_table.h"
#include "tests/golden/fixture.h"
#include "tools/baleen/solo.h"

static const char *const g_models[] = {"tiny-pro", "tiny-flash", "tiny-base", "tiny-odd"};
static const char *g_device = "cpu", *g_isa = "auto";

enum { LAYER_ROWS = 270, SLOTS = 2 };

static float bf16_value(uint16_t bits)
{
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof(value));
    return value;
}

static solo *open_model(const char *model)
{
    char path[512];
    solo *s = NULL;
    cm_error err = {0};
    solo_options options;
    solo_options_defaults(&options);
    snprintf(path, sizeof(path), "%s/model/%s/ckpt", BALEEN_TEST_DATA, model);
    options.model = path;
    options.n_worker = 2;
    options.device = g_device;
    options.isa = g_isa;
    options.row_max = LAYER_ROWS;
    options.slot_max = SLOTS;
    if (solo_create(&options, &s, &err) != CM_OK) {
        fail_msg("%s: %s", model, err.text);
    }
    return s;
}

/* ---- sub-blocks ---- */

typedef struct worst {
    const char *model;
    double ratio; /* of the error to its tolerance */
    char where[64];
} worst;

static void worst_note(worst *w, const char *output, uint32_t layer, const char *measure, double error,
                       double tolerance)
{
    char where[48];
    snprintf(where, sizeof(where), "layer %u %s", layer, measure);
    error_table_note(w->model, output, where, error, tolerance);
    if (error / tolerance > w->ratio) {
        w->ratio = error / tolerance;
        snprintf(w->where, sizeof(w->where), "layer %u %s", layer, output);
    }
}

/* What must be equal: n_wrong items are not. */
static void check_equal(const char *model, const char *output, const char *where, uint64_t n_wrong)
{
    error_table_note(model, output, where, (double)n_wrong, 0);
    if (n_wrong > 0) {
        fail_msg("%s %s, %s: %llu differ", model, output, where, (unsigned long long)n_wrong);
    }
}

/* got and golden BF16 [n_row][width]. */
static void compare_rows(const json_t *tol, const char *output, uint32_t layer, const uint16_t *got,
                         const uint16_t *golden, uint64_t n_row, uint64_t width, worst *w)
{
    const json_t *bound = json_object_get(json_object_get(tol, output), "D");
    double max_abs = 0, sum_diff = 0, sum_gold = 0, worst_row = 0;
    assert_non_null(bound);
    for (uint64_t r = 0; r < n_row; r++) {
        double row_diff = 0, row_gold = 0;
        for (uint64_t i = 0; i < width; i++) {
            double g = (double)bf16_value(golden[r * width + i]),
                   d = (double)bf16_value(got[r * width + i]) - g;
            max_abs = fabs(d) > max_abs ? fabs(d) : max_abs;
            row_diff += d * d;
            row_gold += g * g;
        }
        sum_diff += row_diff;
        sum_gold += row_gold;
        double rel = row_gold > 0 ? sqrt(row_diff / row_gold) : row_diff;
        worst_row = rel > worst_row ? rel : worst_row;
    }
    double rel_rms = sum_gold > 0 ? sqrt(sum_diff / sum_gold) : sum_diff;
    double most_abs = json_number_value(json_object_get(bound, "max_abs"));
    double most_rel = json_number_value(json_object_get(bound, "rel_rms"));
    double most_row = json_number_value(json_object_get(bound, "row_rel_rms"));
    worst_note(w, output, layer, "max_abs", max_abs, most_abs);
    worst_note(w, output, layer, "rel_rms", rel_rms, most_rel);
    worst_note(w, output, layer, "row_rel_rms", worst_row, most_row);
    if (!(max_abs <= most_abs && rel_rms <= most_rel && worst_row <= most_row)) {
        fail_msg("layer %u %s: max_abs %g of %g, rel_rms %g of %g, worst row %g of %g", layer, output,
                 max_abs, most_abs, rel_rms, most_rel, worst_row, most_row);
    }
}

typedef struct layer_case {
    solo *s;
    rt_engine *e;
    const fx_file *file;
    const json_t *tol;
    uint32_t layer, n; /* positions chosen */
    const int64_t *ids, *pos;
    worst *w;
} layer_case;

static void *host(layer_case *c, kn_ptr p)
{
    return kn_mem_host(c->e->device, p);
}

static const void *golden(layer_case *c, const char *name)
{
    return fx_get(c->file, "l%u.%s", c->layer, name)->data;
}

/* The chosen positions as rows of one made-up step: enough for everything but attention. */
static void begin_rows(layer_case *c, rt_step_seg *seg, rt_step *step, uint32_t *tokens, uint32_t n,
                       const int64_t *pos)
{
    static const uint32_t pages[4] = {0, 1, 2, 3};
    for (uint32_t i = 0; i < n; i++) {
        tokens[i] = (uint32_t)c->ids[pos != NULL ? pos[i] : (int64_t)i];
    }
    *seg =
        (rt_step_seg){.n_row = n, .tokens = tokens, .pages = pages, .n_page = kn_blocks(n, KN_PAGE_TOKENS)};
    *step = (rt_step){.number = 1, .n_seg = 1, .n_row = n, .segs = seg};
    rt_step_begin(c->e, step);
}

/* As sets: the fixture's order is by score, ours by row. */
static void check_picks(layer_case *c)
{
    const int64_t *picks = golden(c, "index_picks");
    uint32_t topk = c->e->geometry->index_topk, n_wrong = 0;
    char where[32];
    for (uint32_t i = 0; i < c->n; i++) {
        const int32_t *got = (int32_t *)host(c, c->e->buf.picks) + (size_t)c->pos[i] * topk;
        for (uint32_t k = 0; k < topk; k++) {
            bool found = false;
            for (uint32_t j = 0; j < topk; j++) {
                found |= got[j] == (int32_t)picks[(size_t)i * topk + k];
            }
            n_wrong += !found;
        }
    }
    snprintf(where, sizeof(where), "layer %u", c->layer);
    check_equal(c->w->model, "index picks", where, n_wrong);
}

/* What the gate chose, and with which weights. */
static void check_gate(layer_case *c)
{
    const uint8_t *experts = golden(c, "experts");
    const float *weights = golden(c, "weights");
    uint32_t n_wrong = 0;
    double worst_off = 0;
    char where[32];
    for (uint32_t i = 0; i < c->n * c->e->geometry->topk; i++) {
        double off =
            fabs((double)c->e->host_route[i] - (double)weights[i]) / fmax(1, fabs((double)weights[i]));
        n_wrong += c->e->host_experts[i] != experts[i];
        worst_off = off <= worst_off ? worst_off : off;
    }
    snprintf(where, sizeof(where), "layer %u", c->layer);
    error_table_note(c->w->model, "gate weights", where, worst_off, 1e-6);
    assert_true(worst_off <= 1e-6);
    check_equal(c->w->model, "gate picks", where, n_wrong);
}

static void check_attention(layer_case *c)
{
    static uint32_t tokens[LAYER_ROWS];
    static uint16_t chosen[LAYER_ROWS * 4096];
    rt_step_seg seg;
    rt_step step;
    const md_geometry *g = c->e->geometry;
    begin_rows(c, &seg, &step, tokens, LAYER_ROWS, NULL);
    memcpy(host(c, c->e->buf.in), golden(c, "attn_in_all"), 2ull * LAYER_ROWS * g->d);
    rt_layer_attention(c->e, &c->e->micros[0], c->layer);
    assert_int_equal(kn_stream_sync(c->e->stream), CM_OK);
    for (uint32_t i = 0; i < c->n; i++) {
        memcpy(chosen + (size_t)i * g->d, (uint16_t *)host(c, c->e->buf.out) + (size_t)c->pos[i] * g->d,
               2ull * g->d);
    }
    compare_rows(c->tol, "attn_out", c->layer, chosen, golden(c, "attn_out"), c->n, g->d, c->w);
    if (g->ratio[c->layer] == 4) {
        check_picks(c);
    }
}

static void check_sites(layer_case *c)
{
    static uint32_t tokens[LAYER_ROWS];
    rt_step_seg seg;
    rt_step step;
    rt_engine *e = c->e;
    rt_buffers *b = &e->buf;
    const md_geometry *g = e->geometry;
    const rt_layer *w = &e->weights.layers[c->layer];
    uint64_t row = 2ull * g->d, streams = row * g->hc;
    static uint16_t chosen[LAYER_ROWS * 4096];
    begin_rows(c, &seg, &step, tokens, c->n, c->pos);

    memcpy(host(c, b->x), golden(c, "X_in"), streams * c->n);
    e->dense->hc_pre(e->stream, &w->hc_attn, b->x, c->n, b->in, b->post, b->comb);
    e->dense->rmsnorm(e->stream, b->in, w->attn_norm, c->n, g->d, g->norm_eps, b->in);
    const uint16_t *all = golden(c, "attn_in_all");
    for (uint32_t i = 0; i < c->n; i++) {
        memcpy(chosen + (size_t)i * g->d, all + (size_t)c->pos[i] * g->d, row);
    }
    compare_rows(c->tol, "attn_in", c->layer, host(c, b->in), chosen, c->n, g->d, c->w);
    memcpy(host(c, b->out), golden(c, "attn_out"), row * c->n);
    e->dense->hc_post(e->stream, g->d, g->hc, b->out, b->x, b->post, b->comb, c->n, b->x);
    compare_rows(c->tol, "X_mid", c->layer, host(c, b->x), golden(c, "X_mid"), c->n, (uint64_t)g->d * g->hc,
                 c->w);

    memcpy(host(c, b->x), golden(c, "X_mid"), streams * c->n);
    e->dense->hc_pre(e->stream, &w->hc_ffn, b->x, c->n, b->in, b->post, b->comb);
    e->dense->rmsnorm(e->stream, b->in, w->ffn_norm, c->n, g->d, g->norm_eps, b->in);
    compare_rows(c->tol, "ffn_in", c->layer, host(c, b->in), golden(c, "ffn_in"), c->n, g->d, c->w);
    memcpy(host(c, b->in), golden(c, "ffn_in"), row * c->n);
    assert_int_equal(rt_layer_moe_begin(e, &e->micros[0], c->layer), CM_OK);
    assert_int_equal(rt_layer_moe_finish(e, &e->micros[0]), CM_OK);
    compare_rows(c->tol, "ffn_out", c->layer, host(c, b->out), golden(c, "ffn_out"), c->n, g->d, c->w);
    check_gate(c);
    memcpy(host(c, b->out), golden(c, "ffn_out"), row * c->n);
    e->dense->hc_post(e->stream, g->d, g->hc, b->out, b->x, b->post, b->comb, c->n, b->x);
    compare_rows(c->tol, "X_out", c->layer, host(c, b->x), golden(c, "X_out"), c->n, (uint64_t)g->d * g->hc,
                 c->w);
}

static void test_layers(void **state)
{
    for (uint32_t m = 0; m < sizeof(g_models) / sizeof(g_models[0]); m++) {
        char path[512];
        worst w = {.model = g_models[m]};
        solo *s = open_model(g_models[m]);
        snprintf(path, sizeof(path), "%s/model/%s/layers.safetensors", BALEEN_TEST_DATA, g_models[m]);
        fx_file *file = fx_open(path);
        snprintf(path, sizeof(path), "%s/model/%s/layers.json", BALEEN_TEST_DATA, g_models[m]);
        json_t *list = fx_json(path);
        for (uint32_t l = 0; l < solo_geometry(s)->n_layer; l++) {
            const fx_tensor *pos = fx_get(file, "l%u.pos", l);
            layer_case c = {.s = s,
                            .e = solo_engine(s),
                            .file = file,
                            .tol = json_object_get(json_array_get(list, l), "tol"),
                            .layer = l,
                            .n = (uint32_t)pos->dim[0],
                            .ids = fx_get(file, "ids")->data,
                            .pos = pos->data,
                            .w = &w};
            check_attention(&c);
            check_sites(&c);
        }
        print_message("%-10s layers: worst error %.3f of its tolerance (%s)\n", g_models[m], w.ratio,
                      w.where);
        json_decref(list);
        fx_close(file);
        solo_destroy(s);
    }
    (void)state;
}

/* ---- prompts ---- */

static uint32_t read_ids(const json_t *list, uint32_t *ids)
{
    size_t i;
    json_t *id;
    json_array_foreach(list, i, id)
    {
        ids[i] = (uint32_t)json_integer_value(id);
    }
    return (uint32_t)json_array_size(list);
}

static uint16_t g_streams[8][8 * 8 * 1024]; /* per layer: BF16 [5][hc][d] of the last prompt of five tokens */
static void tap_streams(void *ctx, uint32_t layer, rt_tap_point point, const rt_step *step, uint32_t row0,
                        const void *data, uint64_t row_bytes, uint32_t n_row)
{
    (void)ctx;
    if (point == RT_TAP_STREAMS_OUT && layer < 8) {
        memcpy((uint8_t *)g_streams[layer] + (step->segs[0].pos0 + row0) * row_bytes, data,
               row_bytes * n_row);
    }
}

/* Rows whose logits the fixture has run one by one, what is before them in one go: chunks of any size give
 * the same. */
static double check_prompt(const char *model, solo *s, const json_t *prompt, const fx_file *file,
                           uint32_t index, double max_abs)
{
    static uint32_t ids[1024];
    uint32_t greedy[32], token = 0, vocab = solo_geometry(s)->vocab,
                         n = read_ids(json_object_get(prompt, "prompt_ids"), ids);
    uint32_t first = (uint32_t)json_integer_value(json_object_get(prompt, "logits_first_position"));
    const fx_tensor *logits = fx_get(file, "p%u.logits", index);
    double worst_abs = 0;
    uint32_t n_wrong = 0;
    char where[32];
    snprintf(where, sizeof(where), "prompt %u", index);
    assert_int_equal(logits->dim[0], n - first);
    for (uint32_t at = 0; at < first; at += LAYER_ROWS) {
        uint32_t rows = first - at < LAYER_ROWS ? first - at : LAYER_ROWS;
        assert_int_equal(solo_step(s, 0, at, ids + at, rows, false, &token), CM_OK);
    }
    for (uint32_t p = first; p < n; p++) {
        assert_int_equal(solo_step(s, 0, p, ids + p, 1, true, &token), CM_OK);
        const float *got = rt_engine_logits(solo_engine(s)),
                    *want = (const float *)logits->data + (size_t)(p - first) * vocab;
        for (uint32_t v = 0; v < vocab; v++) {
            double d = fabs((double)got[v] - (double)want[v]);
            worst_abs = d <= worst_abs ? worst_abs : d;
            if (!(d <= max_abs)) {
                error_table_note(model, "logits", where, d, max_abs);
                fail_msg("prompt %u position %u token %u: logit %.9g, golden %.9g", index, p, v,
                         (double)got[v], (double)want[v]);
            }
        }
    }
    error_table_note(model, "logits", where, worst_abs, max_abs);
    const json_t *want_greedy = json_object_get(prompt, "greedy");
    for (uint32_t i = 0; i < 32; i++) {
        greedy[i] = token;
        n_wrong += token != (uint32_t)json_integer_value(json_array_get(want_greedy, i));
        assert_int_equal(solo_step(s, 0, n + i, &greedy[i], 1, true, &token), CM_OK);
    }
    check_equal(model, "greedy tokens", where, n_wrong);
    return worst_abs;
}

static void check_streams(const char *model, solo *s, const fx_file *file)
{
    const uint16_t *streams = fx_get(file, "p3.streams")->data;
    const md_geometry *g = solo_geometry(s);
    uint64_t n = 5ull * g->hc * g->d, n_wrong = 0;
    for (uint32_t l = 0; l < g->n_layer; l++) {
        for (uint64_t i = 0; i < n; i++) {
            n_wrong += g_streams[l][i] != streams[l * n + i];
        }
    }
    check_equal(model, "streams of all layers", "prompt 3", n_wrong);
}

static void test_prompts(void **state)
{
    for (uint32_t m = 0; m < sizeof(g_models) / sizeof(g_models[0]); m++) {
        char path[512];
        double worst_abs = 0;
        solo *s = open_model(g_models[m]);
        snprintf(path, sizeof(path), "%s/model/%s/logits.safetensors", BALEEN_TEST_DATA, g_models[m]);
        fx_file *file = fx_open(path);
        snprintf(path, sizeof(path), "%s/model/%s/prompts.json", BALEEN_TEST_DATA, g_models[m]);
        json_t *json = fx_json(path), *prompt;
        double max_abs =
            json_number_value(json_object_get(json_object_get(json_object_get(json, "tol"), "D"), "max_abs"));
        size_t i;
        assert_true(max_abs > 0);
        json_array_foreach(json_object_get(json, "prompts"), i, prompt)
        {
            bool five = json_array_size(json_object_get(prompt, "prompt_ids")) == 5;
            rt_engine_set_tap(solo_engine(s), five ? tap_streams : NULL, NULL);
            double d = check_prompt(g_models[m], s, prompt, file, (uint32_t)i, max_abs);
            worst_abs = d > worst_abs ? d : worst_abs;
            if (five) {
                check_streams(g_models[m], s, file);
            }
        }
        print_message("%-10s %zu prompts: worst logit error %g of %g, greedy equal\n", g_models[m], i,
                      worst_abs, max_abs);
        json_decref(json);
        fx_close(file);
        solo_destroy(s);
    }
    (void)state;
}

static int run_path(const char *path)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_layers), cmocka_unit_test(test_prompts)};
    bool is_ref = strcmp(path, "ref") == 0;
    g_device = is_ref ? "ref" : "cpu";
    g_isa = is_ref ? "auto" : path;
    error_table_path(path);
    return cmocka_run_group_tests(tests, NULL, NULL);
}

static int run_table(const char *only)
{
    int failed = 0;
    error_table_begin();
    if (only != NULL) {
        failed = run_path(only);
    } else {
        failed = run_path("ref");
        for (uint32_t i = 0; kn_cpu_isa_at(i) != NULL; i++) {
            failed += run_path(kn_cpu_isa_at(i));
        }
    }
    return error_table_print() ? failed : 1;
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--table") == 0) {
        return run_table(argc > 2 ? argv[2] : NULL);
    }
    return run_path(argc > 1 ? argv[1] : "auto");
}
