/* baleen plan: what fits where, and what a step would take, before anything is bought or moved. */
#include <stdio.h>

#include "tools/baleen/cli.h"
#include "tools/baleen/plan_core.h"
#include "tools/baleen/verbs.h"

typedef struct plan_config {
    uint64_t workers, routers, expert_bytes_max, kv_bytes, drafts_max, context;
    char *read, *compute, *link;
} plan_config;

static const cm_cfg_field g_fields[] = {
    {"workers", "0", "workers; 0 = as few as expert_bytes_max allows",
     CM_CFG_UINT(plan_config, workers, 0, 65536)},
    {"expert_bytes_max", "64g", "memory for experts of one worker, its option of that name",
     CM_CFG_BYTES(plan_config, expert_bytes_max, 1, UINT64_MAX)},
    {"routers", "1", "routers", CM_CFG_UINT(plan_config, routers, 1, 65536)},
    {"kv_bytes", "32g", "memory for KV pages of one router, its option of that name",
     CM_CFG_BYTES(plan_config, kv_bytes, 1, UINT64_MAX)},
    {"drafts_max", "2", "tokens guessed ahead, the routers' option of that name; steps are reckoned without",
     CM_CFG_UINT(plan_config, drafts_max, 0, 8)},
    {"context", "8192", "tokens of each sequence", CM_CFG_UINT(plan_config, context, 1, UINT32_MAX)},
    {"read", "200", "GB/s that one worker, or one router, reads from its memory",
     CM_CFG_STRING(plan_config, read)},
    {"compute", "0", "TFLOP/s of one worker, or one router; 0 = arithmetic is left out",
     CM_CFG_STRING(plan_config, compute)},
    {"link", "0", "GB/s of one router's link, one direction; 0 = links are left out",
     CM_CFG_STRING(plan_config, link)},
};

static const cm_cfg_table g_table = {
    .program = "baleen plan",
    .summary =
        "reckons from a config.json what workers and routers hold and what a step of decoding would take; "
        "nothing is measured, and what is not memory, arithmetic or links costs nothing",
    .operands = "DIR",
    .fields = g_fields,
    .n_fields = sizeof(g_fields) / sizeof(g_fields[0]),
};

static const char *bytes_text(uint64_t n_bytes, char out[32])
{
    cli_format_bytes(n_bytes, out);
    return out;
}

static void print_model(const plan_model *m)
{
    char all[32], expert[32], experts[32], router[32];
    const md_geometry *g = &m->geometry;
    printf("model      %u layers of %u experts (%u chosen), %s in %llu tensors\n", g->n_layer, g->n_expert,
           g->topk, bytes_text(m->bytes, all), (unsigned long long)m->tensors);
    printf("           routed experts %s (one: %s), the rest %s\n", bytes_text(m->experts_bytes, experts),
           bytes_text(m->expert_bytes, expert), bytes_text(m->router_bytes, router));
}

static void print_workers(const plan_model *m, const plan_config *config, uint32_t n_worker)
{
    char most[32], max[32];
    uint64_t n = plan_worker_experts(m, n_worker);
    uint32_t fewest = plan_workers_min(m, config->expert_bytes_max);
    printf("workers    %u, each up to %llu experts: %s of %s\n", n_worker, (unsigned long long)n,
           bytes_text(n * m->expert_bytes, most), bytes_text(config->expert_bytes_max, max));
    if (n_worker < fewest) {
        printf("           TOO FEW: %u would hold all experts\n", fewest);
    } else {
        printf("           %u may be lost before an expert has nowhere to be\n", n_worker - fewest);
    }
}

static void print_routers(const plan_model *m, const plan_config *config)
{
    char weights[32], pages[32], page[32], slot[32];
    uint64_t n = plan_sequences(m, config->kv_bytes, config->context);
    printf("routers    %llu, each weights %s and KV %s\n", (unsigned long long)config->routers,
           bytes_text(m->router_bytes, weights), bytes_text(config->kv_bytes, pages));
    printf("           a sequence takes %s and %s for each 128 tokens: %llu of %llu tokens fit into a "
           "router%s\n",
           bytes_text(m->kv_slot_bytes, slot), bytes_text(m->kv_page_bytes, page), (unsigned long long)n,
           (unsigned long long)config->context, n == 0 ? ": TOO LITTLE" : "");
}

static void print_steps(const plan_model *m, const plan_cluster *c, bool with_links)
{
    printf("\na step of decoding at %u tokens of context, ms:\n", c->context);
    printf("%10s %12s %8s %8s %10s %8s %9s %9s %12s %12s\n", "sequences", "experts hit", "dense", "experts",
           "attention", "links", "hidden", "in turn", "tokens/s", "of one");
    printf("%10s %12s %8s %8s %10s %8s %9s %9s %12s %12s\n", "a router", "a layer", "", "", "", "", "", "",
           "hidden", "sequence");
    for (uint32_t n_row = 1; n_row <= 256; n_row *= 4) {
        plan_step s;
        char links[16] = "-";
        plan_step_of(m, c, n_row, &s);
        if (with_links) {
            (void)snprintf(links, sizeof(links), "%.2f", s.link_s * 1e3);
        }
        printf("%10u %12.1f %8.2f %8.2f %10.2f %8s %9.2f %9.2f %12.0f %12.1f\n", n_row, s.hit,
               s.dense_s * 1e3, s.experts_s * 1e3, s.attention_s * 1e3, links, s.over_s * 1e3,
               s.serial_s * 1e3, n_row * c->n_router / s.over_s, 1 / s.over_s);
    }
    printf("\nUniform routing, no speculation; dense and experts one after the other. hidden: links cost "
           "only what is\n"
           "longer than all else; in turn: nothing is hidden.\n");
}

static cm_status parse_speeds(const plan_config *config, plan_cluster *cluster, cm_error *err)
{
    CM_TRY(cli_parse_double("read", config->read, 1e-3, 1e6, &cluster->read_bytes_s, err));
    CM_TRY(cli_parse_double("compute", config->compute, 0, 1e6, &cluster->flops_s, err));
    CM_TRY(cli_parse_double("link", config->link, 0, 1e6, &cluster->link_bytes_s, err));
    cluster->read_bytes_s *= 1e9;
    cluster->flops_s *= 1e12;
    cluster->link_bytes_s *= 1e9;
    return CM_OK;
}

static cm_status plan_print(const plan_config *config, const char *dir, cm_error *err)
{
    plan_cluster cluster = {.n_router = (uint32_t)config->routers, .context = (uint32_t)config->context};
    md_geometry geometry;
    plan_model model;
    CM_TRY(parse_speeds(config, &cluster, err));
    CM_TRY(md_geometry_load(dir, &geometry, err));
    if (config->context > geometry.context) {
        return cm_error_set(err, CM_E_CONFIG, "context", "this model's context is %u tokens",
                            geometry.context);
    }
    plan_model_of(&geometry, (uint32_t)config->drafts_max, &model);
    cluster.n_worker =
        config->workers != 0 ? (uint32_t)config->workers : plan_workers_min(&model, config->expert_bytes_max);
    if (cluster.n_worker == 0) {
        return cm_error_set(err, CM_E_CONFIG, "expert_bytes_max", "one expert takes %llu bytes",
                            (unsigned long long)model.expert_bytes);
    }
    print_model(&model);
    print_workers(&model, config, cluster.n_worker);
    print_routers(&model, config);
    print_steps(&model, &cluster, cluster.link_bytes_s > 0);
    return CM_OK;
}

int verb_plan(int argc, char **argv)
{
    plan_config config;
    const char *dir = NULL;
    size_t n = 0;
    cm_error err = {0};
    int code = cli_begin(&g_table, &config, argc, argv, &dir, 1, &n);
    if (code >= 0) {
        return code;
    }
    if (n == 0) {
        code = cli_complain(&g_table, CLI_USAGE, "name the folder of a config.json");
    } else {
        code = plan_print(&config, dir, &err) == CM_OK ? CLI_OK : cli_fail(&g_table, &err);
    }
    cm_cfg_free(&g_table, &config);
    return code;
}
