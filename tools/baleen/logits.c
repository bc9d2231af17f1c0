/* baleen logits: the engines' answer to given token ids, in a file that any other implementation can be held
 * against. */
#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/solo.h"
#include "tools/baleen/verbs.h"

enum { LOGITS_GREEDY = 32 };

typedef struct logits_config {
    char *model, *prompts, *out, *transport, *device, *cpu_isa;
    uint64_t workers, chunk, threads, kv_bytes;
} logits_config;

static const cm_cfg_field g_fields[] = {
    {"model", "", "folder of the checkpoint", CM_CFG_STRING(logits_config, model)},
    {"prompts", "", "file with a JSON list of {\"name\", \"prompt_ids\"}",
     CM_CFG_STRING(logits_config, prompts)},
    {"out", "",
     "file that gets a JSON list of {\"name\", \"prompt_ids\", \"logits\" of the last position, \"greedy\": "
     "32 ids}",
     CM_CFG_STRING(logits_config, out)},
    {"workers", "1", "expert ranks the layers are spread over", CM_CFG_UINT(logits_config, workers, 1, 32)},
    {"transport", "local", "how rows travel between the ranks",
     CM_CFG_CHOICE(logits_config, transport, "local|ucx")},
    {"device", "cpu", "what computes", CM_CFG_CHOICE(logits_config, device, "cpu|ref")},
    {"cpu_isa", "auto", "force a CPU path: portable, avx2, avx512", CM_CFG_STRING(logits_config, cpu_isa)},
    {"chunk", "128", "prompt rows of one step", CM_CFG_UINT(logits_config, chunk, 1, 256)},
    {"threads", "1", "compute threads of each rank", CM_CFG_UINT(logits_config, threads, 1, 1024)},
    {"kv_bytes", "1g", "memory for KV pages", CM_CFG_BYTES(logits_config, kv_bytes, 1, UINT64_MAX)},
};

static const cm_cfg_table g_table = {
    .program = "baleen logits",
    .summary =
        "logits and greedy tokens of given token ids; the result depends on nothing but checkpoint and ids",
    .operands = "",
    .fields = g_fields,
    .n_fields = sizeof(g_fields) / sizeof(g_fields[0]),
};

typedef struct logits_run {
    const logits_config *config;
    json_t *prompts;
    solo *engine;
    float *logits; /* [vocab] */
    FILE *out;
} logits_run;

/* ---- prompts ---- */

static cm_status prompt_check(const json_t *prompt, size_t i, const md_geometry *g, cm_error *err)
{
    const char *name = json_string_value(json_object_get(prompt, "name"));
    const json_t *ids = json_object_get(prompt, "prompt_ids");
    size_t n = json_array_size(ids);
    if (name == NULL) {
        return cm_error_set(err, CM_E_INVALID, "prompts", "prompt %zu of the file has no \"name\"", i);
    }
    if (n == 0) {
        return cm_error_set(err, CM_E_INVALID, name, "prompt '%.80s' has no ids in \"prompt_ids\"", name);
    }
    if (n + LOGITS_GREEDY > g->context) {
        return cm_error_set(err, CM_E_TOO_LONG, name,
                            "prompt '%.80s' has %zu ids; with %d more the context of %u is too short", name,
                            n, LOGITS_GREEDY, g->context);
    }
    for (size_t k = 0; k < n; k++) {
        const json_t *id = json_array_get(ids, k);
        if (!json_is_integer(id)) {
            return cm_error_set(err, CM_E_INVALID, name, "prompt '%.80s': id %zu of it is no whole number",
                                name, k);
        }
        json_int_t value = json_integer_value(id);
        if (value < 0 || value >= (json_int_t)g->vocab) {
            return cm_error_set(err, CM_E_INVALID, name, "prompt '%.80s': id %lld is outside 0..%u", name,
                                (long long)value, g->vocab - 1);
        }
    }
    return CM_OK;
}

static cm_status prompts_load(const char *path, const md_geometry *g, json_t **prompts_out, cm_error *err)
{
    json_error_t wrong;
    json_t *prompts = json_load_file(path, JSON_REJECT_DUPLICATES, &wrong);
    cm_status status = CM_OK;
    if (prompts == NULL) {
        return cm_error_set(err, CM_E_INVALID, "prompts", "%s is no JSON, line %d: %s", path, wrong.line,
                            wrong.text);
    }
    if (!json_is_array(prompts)) {
        status = cm_error_set(err, CM_E_INVALID, "prompts", "%s is not a JSON list", path);
    }
    for (size_t i = 0; i < json_array_size(prompts) && status == CM_OK; i++) {
        status = prompt_check(json_array_get(prompts, i), i, g, err);
    }
    if (status != CM_OK) {
        json_decref(prompts);
        return status;
    }
    *prompts_out = prompts;
    return CM_OK;
}

/* ---- one prompt ---- */

static void append_ids(cm_bytes *text, const uint32_t *ids, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        cm_bytes_printf(text, "%s%u", i > 0 ? "," : "", ids[i]);
    }
}

/* Nine digits give every float back exactly, so equal logits are equal bytes and nothing else is. */
static cm_status append_logits(const logits_run *run, const char *name, cm_bytes *text, cm_error *err)
{
    uint32_t vocab = solo_geometry(run->engine)->vocab;
    for (uint32_t i = 0; i < vocab; i++) {
        if (!isfinite(run->logits[i])) {
            return cm_error_set(err, CM_E_CORRUPT, name, "prompt '%.80s': the logit of id %u is %g", name, i,
                                (double)run->logits[i]);
        }
        cm_bytes_printf(text, "%s%.9g", i > 0 ? "," : "", (double)run->logits[i]);
    }
    return CM_OK;
}

static cm_status prompt_render(logits_run *run, const json_t *prompt, const uint32_t *ids, uint32_t n_ids,
                               cm_bytes *text, cm_error *err)
{
    uint32_t greedy[LOGITS_GREEDY];
    const json_t *name = json_object_get(prompt, "name");
    cm_status status = solo_greedy(run->engine, 0, ids, n_ids, (uint32_t)run->config->chunk, LOGITS_GREEDY,
                                   greedy, run->logits);
    if (status != CM_OK) {
        return cm_error_set(err, status, json_string_value(name), "prompt '%.80s': %s",
                            json_string_value(name), cm_status_text(status));
    }
    cm_bytes_append_text(text, "{\"name\":");
    cli_append_json(text, name, JSON_ENCODE_ANY);
    cm_bytes_append_text(text, ",\"prompt_ids\":[");
    append_ids(text, ids, n_ids);
    cm_bytes_append_text(text, "],\"logits\":[");
    CM_TRY(append_logits(run, json_string_value(name), text, err));
    cm_bytes_append_text(text, "],\"greedy\":[");
    append_ids(text, greedy, LOGITS_GREEDY);
    cm_bytes_append_text(text, "]}");
    return CM_OK;
}

static cm_status prompt_run(logits_run *run, const json_t *prompt, cm_bytes *text, cm_error *err)
{
    const json_t *list = json_object_get(prompt, "prompt_ids");
    uint32_t n_ids = (uint32_t)json_array_size(list);
    uint32_t *ids = cm_alloc(sizeof(*ids) * n_ids);
    for (uint32_t i = 0; i < n_ids; i++) {
        ids[i] = (uint32_t)json_integer_value(json_array_get(list, i));
    }
    cm_status status = prompt_render(run, prompt, ids, n_ids, text, err);
    cm_free(ids);
    return status;
}

/* ---- all of them ---- */

/* After the engine is there: its pages are what a prompt must fit into. */
static cm_status prompts_fit(const logits_run *run, cm_error *err)
{
    rt_sched_limits limits;
    rt_engine_sched_limits(solo_engine(run->engine), &limits);
    uint64_t n_max = (uint64_t)limits.page_max * limits.page_tokens;
    for (size_t i = 0; i < json_array_size(run->prompts); i++) {
        const json_t *prompt = json_array_get(run->prompts, i);
        size_t n = json_array_size(json_object_get(prompt, "prompt_ids"));
        if (n + LOGITS_GREEDY > n_max) {
            const char *name = json_string_value(json_object_get(prompt, "name"));
            return cm_error_set(
                err, CM_E_TOO_LONG, name,
                "prompt '%.80s' has %zu ids; with %d more they need more than --kv-bytes %llu", name, n,
                LOGITS_GREEDY, (unsigned long long)run->config->kv_bytes);
        }
    }
    return CM_OK;
}

static cm_status logits_write(logits_run *run, cm_error *err)
{
    cm_bytes text;
    cm_status status = CM_OK;
    size_t n = json_array_size(run->prompts);
    cm_bytes_init(&text, 0);
    for (size_t i = 0; i < n && status == CM_OK; i++) {
        const json_t *prompt = json_array_get(run->prompts, i);
        cli_progress("prompt %zu of %zu: %s, %zu ids", i + 1, n,
                     json_string_value(json_object_get(prompt, "name")),
                     json_array_size(json_object_get(prompt, "prompt_ids")));
        cm_bytes_append_text(&text, i == 0 ? "[\n" : ",\n");
        status = prompt_run(run, prompt, &text, err);
        if (status == CM_OK && fwrite(text.data, 1, text.len, run->out) != text.len) {
            status = cm_error_set(err, CM_E_IO, "out", "%s: %s", run->config->out, strerror(errno));
        }
        cm_bytes_clear(&text);
    }
    cm_bytes_fini(&text);
    if (status == CM_OK && (fputs(n == 0 ? "[]\n" : "\n]\n", run->out) < 0 || fflush(run->out) != 0)) {
        status = cm_error_set(err, CM_E_IO, "out", "%s: %s", run->config->out, strerror(errno));
    }
    cli_progress_clear();
    return status;
}

static cm_status logits_engine(logits_run *run, cm_error *err)
{
    const logits_config *config = run->config;
    solo_options options;
    solo_options_defaults(&options);
    options.model = config->model;
    options.n_worker = (uint32_t)config->workers;
    options.transport = config->transport;
    options.device = config->device;
    options.isa = config->cpu_isa;
    options.n_threads = (uint32_t)config->threads;
    options.row_max = (uint32_t)config->chunk;
    options.kv_bytes = config->kv_bytes;
    cli_progress("loading %s", config->model);
    CM_TRY(solo_create(&options, &run->engine, err));
    run->logits = cm_alloc(sizeof(float) * solo_geometry(run->engine)->vocab);
    return prompts_fit(run, err);
}

static cm_status logits_run_all(logits_run *run, cm_error *err)
{
    const logits_config *config = run->config;
    md_geometry geometry;
    if (config->model[0] == '\0' || config->prompts[0] == '\0' || config->out[0] == '\0') {
        return cm_error_set(err, CM_E_CONFIG, NULL, "--model DIR, --prompts FILE and --out FILE are needed");
    }
    /* what a person may have got wrong comes before what takes long */
    CM_TRY(md_geometry_load(config->model, &geometry, err));
    CM_TRY(prompts_load(config->prompts, &geometry, &run->prompts, err));
    run->out = fopen(config->out, "we");
    if (run->out == NULL) {
        return cm_error_set(err, CM_E_IO, "out", "%s: %s", config->out, strerror(errno));
    }
    CM_TRY(logits_engine(run, err));
    return logits_write(run, err);
}

int verb_logits(int argc, char **argv)
{
    logits_config config = {0};
    cm_error err = {0};
    logits_run run = {.config = &config};
    int code = cli_begin(&g_table, &config, argc, argv, NULL, 0, NULL);
    if (code >= 0) {
        return code;
    }
    cm_status status = logits_run_all(&run, &err);
    if (run.engine != NULL) {
        solo_destroy(run.engine);
    }
    if (run.out != NULL && fclose(run.out) != 0 && status == CM_OK) {
        status = cm_error_set(&err, CM_E_IO, "out", "%s: %s", config.out, strerror(errno));
    }
    json_decref(run.prompts);
    cm_free(run.logits);
    code = status == CM_OK ? CLI_OK : cli_fail(&g_table, &err);
    cm_cfg_free(&g_table, &config);
    return code;
}
