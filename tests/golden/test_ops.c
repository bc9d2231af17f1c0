/* Every case of data/ops on every back-end and every path this machine has. Each case must compare each of
 * its outputs; a case nobody knows is a failure. With --table: the worst error of each
 * output against its tolerance. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "kernels/kn_math.h"
#include "tests/golden/error_table.h"
#include "tests/golden/ops_case.h"

#define OPS BALEEN_TEST_DATA "/ops/"

/* ---- gate ---- */

static void case_sqrtsoftplus(op_case *c)
{
    const fx_tensor *z = op_in(c, "z");
    float a[64];
    for (uint64_t i = 0; i < z->n_item; i++) {
        a[i] = kn_sqrt_softplus(((const float *)z->data)[i]);
    }
    op_check(c, "a", a);
}

/* Seventh best biased score subtracted from the sixth. */
static void check_margin(op_case *c, const float *z, uint32_t n, uint32_t n_expert)
{
    const float *bias = op_in(c, "g.gate.bias")->data;
    float margin[16], biased[64];
    for (uint32_t r = 0; r < n; r++) {
        int32_t best[7];
        for (uint32_t e = 0; e < n_expert; e++) {
            biased[e] = kn_sqrt_softplus(z[r * n_expert + e]) + bias[e];
        }
        kn_topk(biased, n_expert, 7, best);
        margin[r] = biased[best[5]] - biased[best[6]];
    }
    op_check(c, "margin", margin);
}

static void case_gate(op_case *c)
{
    enum { TOPK = 6, N_MAX = 12 };
    const json_t *outputs = json_object_get(c->json, "outputs");
    uint32_t n = (uint32_t)op_in(c, "x")->dim[0], ids[N_MAX] = {0};
    bool hash = strncmp(c->name, "hash", 4) == 0;
    kn_gate g = {
        .weight = op_matrix(c, "g.gate"), .topk = TOPK, .route_scale = (float)op_attr(c, "route_scale")};
    kn_ptr x = op_up(c, "x"), experts_at = rig_new(c->rig, n * TOPK * 4),
           weights = rig_new(c->rig, n * TOPK * 4);
    kn_ptr z = rig_new(c->rig, (uint64_t)n * g.weight.n_out * 4);
    float z_host[N_MAX * 16];
    int32_t experts[N_MAX * TOPK];
    int64_t experts64[N_MAX * TOPK];
    g.n_expert = g.weight.n_out;
    if (hash) {
        g.tid2eid = op_up(c, "g.gate.tid2eid");
        for (uint32_t i = 0; i < n; i++) {
            ids[i] = (uint32_t)((const int64_t *)op_in(c, "ids")->data)[i];
        }
    } else {
        g.bias = op_up(c, "g.gate.bias");
    }
    kn_moe(c->rig->device)
        ->gate(c->rig->stream, &g, x, rig_up(c->rig, ids, sizeof(ids)), n, experts_at, weights);
    rig_down(c->rig, experts, experts_at, n * TOPK * 4);
    for (uint32_t i = 0; i < n * TOPK; i++) {
        experts64[i] = experts[i];
    }
    op_check(c, "experts", experts64);
    op_check_at(c, "weights", weights);
    op_dense(c)->linear_bf16(c->rig->stream, x, &g.weight, n, KN_F32, z);
    if (json_object_get(outputs, "z") != NULL) {
        op_check_at(c, "z", z);
    }
    if (json_object_get(outputs, "margin") != NULL) {
        rig_down(c->rig, z_host, z, (uint64_t)n * g.n_expert * 4);
        check_margin(c, z_host, n, g.n_expert);
    }
}

/* ---- experts ---- */

static void case_expert(op_case *c)
{
    enum { N_MAX = 8 };
    kn_stream *s = c->rig->stream;
    kn_expert e = {op_matrix(c, "e.w1"), op_matrix(c, "e.w3"), op_matrix(c, "e.w2")};
    uint32_t n = (uint32_t)op_in(c, "x")->dim[0], d = e.w1.n_in, inner = e.w1.n_out;
    float limit = (float)op_attr(c, "swiglu_limit");
    kn_q8 x = op_quantized(c, op_up(c, "x"), n, d);
    kn_expert_item items[N_MAX];
    kn_expert_group groups[2] = {{&e, 0, n - 1}, {&e, n - 1, 1}};
    kn_ptr y = rig_new(c->rig, 2ull * n * d), g = rig_new(c->rig, 2ull * n * inner), u, h;
    for (uint32_t i = 0; i < n; i++) {
        items[i] = (kn_expert_item){
            .row = n - 1 - i, .out = n - 1 - i, .weight = ((const float *)op_in(c, "wt")->data)[n - 1 - i]};
    }
    kn_moe(c->rig->device)->experts(s, groups, 2, items, x, limit, y);
    op_check_at(c, "y", y);
    u = rig_new(c->rig, 2ull * n * inner);
    h = rig_new(c->rig, 2ull * n * inner);
    op_dense(c)->linear_q8(s, x, &e.w1, n, g);
    op_dense(c)->linear_q8(s, x, &e.w3, n, u);
    kn_moe(c->rig->device)->swiglu(s, g, u, (kn_ptr){0}, n, inner, limit, h);
    op_dense(c)->linear_q8(s, op_quantized(c, h, n, inner), &e.w2, n, y);
    op_check_at(c, "y_shared_form", y);
}

static void case_swiglu(op_case *c)
{
    float weight = (float)op_attr(c, "wt");
    uint32_t inner = (uint32_t)op_in(c, "g")->n_item;
    kn_ptr h = rig_new(c->rig, 2ull * inner);
    kn_moe(c->rig->device)
        ->swiglu(c->rig->stream, op_up(c, "g"), op_up(c, "u"), rig_up(c->rig, &weight, 4), 1, inner,
                 (float)op_attr(c, "swiglu_limit"), h);
    op_check_at(c, "h", h);
}

/* The float32 sum does not leave the operation; without a shared part its bf16 form does. */
static void case_combine(op_case *c)
{
    enum { N = 6, TOPK = 6, D = 40 };
    const kn_moe_ops *ops = kn_moe(c->rig->device);
    const float *acc = fx_get(c->file, "%s.out.acc", c->name)->data;
    int32_t experts[N * TOPK];
    uint16_t plain[N * D];
    kn_ptr y = op_up(c, "y"), out = rig_new(c->rig, sizeof(plain)), at;
    for (uint32_t i = 0; i < N * TOPK; i++) {
        experts[i] = (int32_t)((const int64_t *)op_in(c, "experts")->data)[i];
    }
    at = rig_up(c->rig, experts, sizeof(experts));
    ops->combine(c->rig->stream, y, at, op_up(c, "shared"), N, TOPK, D, out);
    op_check_at(c, "out", out);
    ops->combine(c->rig->stream, y, at, rig_new(c->rig, sizeof(plain)), N, TOPK, D, out);
    rig_down(c->rig, plain, out, sizeof(plain));
    uint32_t n_wrong = 0;
    for (uint32_t i = 0; i < N * D; i++) {
        n_wrong += plain[i] != kn_bf16_encode(acc[i]);
    }
    error_table_note(c->group, "routed acc", NULL, n_wrong, 0);
    assert_int_equal(n_wrong, 0);
    c->n_checked++; /* acc */
}

/* ---- the list ---- */

/* A case belongs to the first row whose group is equal and whose name is a prefix of its name. */
static const struct {
    const char *group, *name;
    void (*run)(op_case *c);
} HANDLERS[] = {
    {"formats", "e4m3_decode", op_case_decode},
    {"formats", "e2m1_decode", op_case_decode},
    {"formats", "e8m0_decode", op_case_decode},
    {"formats", "e4m3_encode", op_case_encode},
    {"formats", "e2m1_encode", op_case_encode},
    {"formats", "bf16_round", op_case_bf16_round},
    {"formats", "fp4_dequant", op_case_dequant},
    {"formats", "fp8_dequant", op_case_dequant},
    {"quant", "scale_exponent", op_case_scale_exponent},
    {"quant", "act128", op_case_quant_act},
    {"quant", "kv64", op_case_quant_kv},
    {"quant", "fp4sim", op_case_fp4sim},
    {"quant", "kv_row", op_case_kv_row},
    {"quant", "hadamard128", op_case_hadamard},
    {"norm", "head_q", op_case_head_q},
    {"norm", "", op_case_norm},
    {"rope", "", op_case_rope},
    {"mhc", "coefficients", op_case_coefficients},
    {"mhc", "site", op_case_mhc_site},
    {"linear", "fp", op_case_linear_q8},
    {"linear", "bf16", op_case_linear_bf16},
    {"linear", "head", op_case_head},
    {"linear", "o_proj", op_case_o_proj},
    {"attention", "", op_case_attention},
    {"compressor", "", op_case_compressor},
    {"indexer", "scores", op_case_index_scores},
    {"indexer", "topk", op_case_topk},
    {"gate", "sqrtsoftplus", case_sqrtsoftplus},
    {"gate", "", case_gate},
    {"expert", "swiglu", case_swiglu},
    {"expert", "", case_expert},
    {"combine", "", case_combine},
};

enum { N_CASE = 66, N_PATH_MAX = 8 };

static void run_case(void **state)
{
    op_case *c = *state;
    bool is_ref = strcmp(kn_device_name(c->rig->device), "ref") == 0;
    error_table_path(is_ref ? "ref" : kn_device_isa(c->rig->device));
    for (size_t i = 0; i < sizeof(HANDLERS) / sizeof(HANDLERS[0]); i++) {
        if (strcmp(HANDLERS[i].group, c->group) == 0 &&
            strncmp(HANDLERS[i].name, c->name, strlen(HANDLERS[i].name)) == 0) {
            c->n_checked = 0;
            HANDLERS[i].run(c);
            rig_reset(c->rig);
            assert_int_equal(c->n_checked, json_object_size(json_object_get(c->json, "outputs")));
            return;
        }
    }
    fail_msg("no test for %s/%s", c->group, c->name);
}

/* Tests of one device, named after it; returns how many cases were added. */
static uint32_t add_cases(const json_t *ops, fx_file **files, rig *r, struct CMUnitTest *tests,
                          op_case *cases)
{
    const char *group;
    const json_t *list, *entry;
    uint32_t n = 0, i_file = 0;
    size_t i;
    json_object_foreach((json_t *)(uintptr_t)ops, group, list)
    {
        json_array_foreach(list, i, entry)
        {
            char name[160];
            assert_true(n < N_CASE);
            cases[n] = (op_case){.group = group,
                                 .name = json_string_value(json_object_get(entry, "case")),
                                 .json = entry,
                                 .file = files[i_file],
                                 .rig = r};
            snprintf(name, sizeof(name), "%s %s %s/%s", kn_device_name(r->device), kn_device_isa(r->device),
                     group, cases[n].name);
            tests[n] = (struct CMUnitTest){
                .name = cm_strdup(name), .test_func = run_case, .initial_state = &cases[n]};
            n++;
        }
        i_file++;
    }
    return n;
}

int main(int argc, char **argv)
{
    static struct CMUnitTest tests[N_PATH_MAX * N_CASE];
    static op_case cases[N_PATH_MAX * N_CASE];
    static rig rigs[N_PATH_MAX];
    const kn_limits limits = {.n_row = 512,
                              .n_in = 1024,
                              .n_inner = 512,
                              .n_head = 4,
                              .head_dim = 512,
                              .n_key = 512,
                              .n_index_row = 64,
                              .n_expert = 16};
    json_t *index = fx_json(OPS "index.json");
    const json_t *ops = json_object_get(index, "ops");
    fx_file *files[16];
    uint32_t n_file = 0, n_rig = 0, n = 0;
    const char *group;
    json_t *list;
    bool table = argc > 1 && strcmp(argv[1], "--table") == 0;
    int failed;
    if (table) {
        error_table_begin();
    }
    json_object_foreach((json_t *)(uintptr_t)ops, group, list)
    {
        char path[512];
        snprintf(path, sizeof(path), OPS "%s.safetensors", group);
        files[n_file++] = fx_open(path);
    }
    rig_open(&rigs[n_rig++], "ref", NULL, 1, &limits);
    for (uint32_t i = 0; kn_cpu_isa_at(i) != NULL; i++) {
        rig_open(&rigs[n_rig++], "cpu", kn_cpu_isa_at(i), 2, &limits);
    }
    for (uint32_t i = 0; i < n_rig; i++) {
        uint32_t added = add_cases(ops, files, &rigs[i], tests + n, cases + n);
        assert_int_equal(added, N_CASE);
        n += added;
    }
    failed = _cmocka_run_group_tests("ops", tests, n, NULL, NULL);
    if (table && !error_table_print()) {
        failed = 1;
    }
    for (uint32_t i = 0; i < n; i++) {
        cm_free((void *)(uintptr_t)tests[i].name);
    }
    for (uint32_t i = 0; i < n_rig; i++) {
        rig_close(&rigs[i]);
    }
    for (uint32_t i = 0; i < n_file; i++) {
        fx_close(files[i]);
    }
    json_decref(index);
    return failed;
}
