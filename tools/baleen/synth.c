/* baleen synth: writes a checkpoint of random weights. */
#include <stdio.h>

#include "common/model/checkpoint.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/verbs.h"
#include "tools/bench/synthetic.h"

typedef struct synth_config {
    uint64_t seed;
} synth_config;

static const cm_cfg_field g_fields[] = {
    {"seed", "1", "of the weights: the same seed and config.json give the same bytes",
     CM_CFG_UINT(synth_config, seed, 0, UINT64_MAX)},
};

static const cm_cfg_table g_table = {
    .program = "baleen synth",
    .summary = "writes a checkpoint of random weights to DIR, shaped by the config.json in MODEL; with a "
               "tokenizer of single bytes",
    .operands = "MODEL DIR",
    .fields = g_fields,
    .n_fields = sizeof(g_fields) / sizeof(g_fields[0]),
};

static cm_status synth_run(const synth_config *config, const char *model, const char *dir, cm_error *err)
{
    cm_bytes text;
    md_geometry g;
    uint64_t n_tensors, n_bytes;
    char size[32];
    CM_TRY(synthetic_config(model, &text, err));
    cm_status status = synthetic_write(cm_bytes_text(&text), dir, config->seed, err);
    if (status == CM_OK) {
        status = md_geometry_parse(cm_bytes_text(&text), text.len, &g, err);
    }
    cm_bytes_fini(&text);
    CM_TRY(status);
    md_expect_totals(&g, &n_tensors, &n_bytes);
    cli_format_bytes(n_bytes, size);
    printf("%s: %llu tensors, %s\n", dir, (unsigned long long)n_tensors, size);
    return CM_OK;
}

int verb_synth(int argc, char **argv)
{
    synth_config config = {0};
    const char *operands[2];
    size_t n_operands;
    cm_error err = {0};
    int code = cli_begin(&g_table, &config, argc, argv, operands, 2, &n_operands);
    if (code >= 0) {
        return code;
    }
    if (n_operands != 2) {
        code = cli_complain(&g_table, CLI_USAGE,
                            "which config.json, and where to? usage: baleen synth MODEL DIR");
    } else {
        code =
            synth_run(&config, operands[0], operands[1], &err) == CM_OK ? CLI_OK : cli_fail(&g_table, &err);
    }
    cm_cfg_free(&g_table, &config);
    return code;
}
