/* baleen bench: the verb, and the frame of its benchmarks. */
#include "tools/bench/bench.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/base/bytes.h"
#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/model/geometry.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/verbs.h"
#include "tools/bench/bench_cluster.h"
#include "tools/bench/bench_needs.h"
#include "tools/bench/bench_room.h"
#include "tools/bench/bench_table.h"
#include "tools/bench/synthetic.h"

typedef struct bench_entry {
    const bench *bench;
    uint32_t needs, disk_mb;
    double prepare_s, round_s;
} bench_entry;

static const bench_entry BENCHES[] = {
#define BENCH(id, ...) {&bench_##id, __VA_ARGS__},
#include "tools/bench/benches.def"
#undef BENCH
};
enum {
    N_BENCH = sizeof(BENCHES) / sizeof(BENCHES[0]),
    BENCH_ROUNDS = 7,
    BENCH_SEVERAL_ROUNDS = 3,
    BENCH_SMALL_SEED = 1,
};

static const char BENCH_ALL[] = "all";

static const cm_cfg_field g_fields[] = {
    {"threads", "1", "threads of the kernels; more than one is timed by the wall clock",
     CM_CFG_UINT(bench_config, threads, 1, 1024)},
    {"rounds", "0", "rounds; what is reported is their median; 0: 7, and 3 of each of several",
     CM_CFG_UINT(bench_config, rounds, 0, BENCH_ROUNDS_MAX)},
    {"isa", "auto",
     "paths to measure in turn, comma separated: auto, or names that the refusal of a wrong one lists",
     CM_CFG_STRING(bench_config, isa)},
    {"weight_bytes", "1100m", "weights to cycle through, far more than the caches hold",
     CM_CFG_BYTES(bench_config, weight_bytes, 1 << 20, 1ull << 40)},
    {"d", "7168", "model width", CM_CFG_UINT(bench_config, d, 128, 1 << 16)},
    {"inner", "3072", "inner width of an expert", CM_CFG_UINT(bench_config, inner, 128, 1 << 16)},
    {"streams", "1000", "serve.stream: answers streamed at once",
     CM_CFG_UINT(bench_config, streams, 1, 16384)},
    {"stream_tokens", "256", "serve.stream: tokens of each",
     CM_CFG_UINT(bench_config, stream_tokens, 8, 4096)},
    {"batch", "256", "host.step: sequences that decode", CM_CFG_UINT(bench_config, batch, 1, 4096)},
    {"ranks", "16", "host.step: workers", CM_CFG_UINT(bench_config, ranks, 1, 256)},
    {"layers", "61", "host.step: layers", CM_CFG_UINT(bench_config, layers, 1, 1024)},
    {"paced", "on",
     "serve.stream: a step takes 20 ms, as a model's would; off: as fast as the script goes, so that a write "
     "may carry several events",
     CM_CFG_BOOL(bench_config, paced)},
    {"net", "ucx,shm,local", "ep: transports to measure in turn, comma separated: ucx, shm, local",
     CM_CFG_STRING(bench_config, net)},
    {"processes", "2,4,8", "ep.exchange: processes, one of them the router; comma separated",
     CM_CFG_STRING(bench_config, processes)},
    {"keyed", "on", "ep: messages carry tags, as they do between the processes of a cluster",
     CM_CFG_BOOL(bench_config, keyed)},
    {"model", "",
     "folder with a checkpoint; of serve.stream with a config.json and a tokenizer.json. Without: random "
     "weights for the geometry bench-s, made for the run, and the model nano where sizes do not matter",
     CM_CFG_STRING(bench_config, model)},
    {"workers", "0", "serve.model: workers of the cluster, 0: 1; serve.workers: of the largest one, 0: 8",
     CM_CFG_UINT(bench_config, workers, 0, 64)},
    {"batches", "1,8,32", "serve.model: streams at once in each measurement of decode, comma separated",
     CM_CFG_STRING(bench_config, batches)},
    {"steps", "24", "serve.model: steps of decode in each measurement",
     CM_CFG_UINT(bench_config, steps, 1, 4096)},
    {"prompt", "512", "serve.model: letters of the prompt; with the tokenizer of baleen synth as many tokens",
     CM_CFG_UINT(bench_config, prompt, 1, 65536)},
    {"context", "8192", "step.context: tokens of the longest sequence, a power of two",
     CM_CFG_UINT(bench_config, context, 1024, 1 << 20)},
    {"svg", "", "serve.model, serve.workers, step.context: file to draw a chart into",
     CM_CFG_STRING(bench_config, svg)},
    {"peer", "",
     "serve.model, cpu.fp4_gemv, cpu.moe_prefill: shell command run in every round that prints peer=NAME "
     "case=decode_b8 value=TOKENS_S lines, or case=rows_8 value=GMAC_S",
     CM_CFG_STRING(bench_config, peer)},
};

static const cm_cfg_table g_table = {
    .program = "baleen bench",
    .summary =
        "measures kernels on synthetic weights, and a gateway with scripted answers, against ceilings "
        "taken in the same run; several, or all, end with one table of their ratios and gates; without a "
        "name: lists them",
    .operands = "[NAME ..|all]",
    .fields = g_fields,
    .n_fields = sizeof(g_fields) / sizeof(g_fields[0]),
};

/* ---- samples ---- */

void bench_add(bench_samples *samples, double value)
{
    samples->value[samples->n++] = value;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

bench_summary bench_summarize(const bench_samples *samples)
{
    bench_samples sorted = *samples;
    qsort(sorted.value, sorted.n, sizeof(sorted.value[0]), by_value);
    return (bench_summary){sorted.value[sorted.n / 2], sorted.value[0], sorted.value[sorted.n - 1]};
}

json_t *bench_summary_json(bench_summary s)
{
    return json_pack("{s:f, s:f, s:f}", "median", s.median, "min", s.min, "max", s.max);
}

/* ---- one run ---- */

double bench_now(const bench_config *config)
{
    return 1e-9 * (double)(config->threads == 1 ? cm_thread_cpu_ns() : cm_now_ns());
}

static void cpu_model(char *out, size_t cap)
{
    char line[256];
    FILE *file = fopen("/proc/cpuinfo", "re");
    snprintf(out, cap, "unknown CPU");
    while (file != NULL && fgets(line, sizeof(line), file) != NULL) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, "model name", 10) == 0 && colon != NULL) {
            snprintf(out, cap, "%.*s", (int)strcspn(colon + 2, "\n"), colon + 2);
            break;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
}

json_t *bench_begin(const bench *b, const bench_config *config)
{
    char cpu[128];
    const char *clock = config->threads == 1 ? "thread CPU time" : "wall time";
    cpu_model(cpu, sizeof(cpu));
    printf("%s: %s\n%s, %u thread%s, %s, %u rounds, median (least .. most)\n\n", b->name, b->doc, cpu,
           (unsigned)config->threads, config->threads == 1 ? "" : "s", clock, (unsigned)config->rounds);
    return json_pack("{s:s, s:s, s:s, s:I, s:s, s:I, s:I, s:I, s:[]}", "bench", b->name, "version",
                     BALEEN_VERSION, "cpu", cpu, "threads", (json_int_t)config->threads, "clock", clock,
                     "rounds", (json_int_t)config->rounds, "d", (json_int_t)config->d, "inner",
                     (json_int_t)config->inner, "results");
}

static void report_path(cm_bytes *path)
{
    cm_bytes_init(path, 0);
    cm_bytes_printf(path, "%s/report.json", bench_room());
}

/* For the process that runs all of them. */
static void write_report(const cm_bytes *text)
{
    cm_bytes path;
    report_path(&path);
    FILE *file = fopen(cm_bytes_text(&path), "we");
    if (file != NULL) {
        (void)fwrite(text->data, 1, text->len,
                     file); /* cut short it is no JSON, and counts as not measured */
        fclose(file);
    }
    cm_bytes_fini(&path);
}

/* What the benchmark that ran last has reported; NULL: nothing. */
static json_t *take_report(void)
{
    cm_bytes path;
    report_path(&path);
    json_t *report = json_load_file(cm_bytes_text(&path), 0, NULL);
    (void)remove(cm_bytes_text(&path));
    cm_bytes_fini(&path);
    return report;
}

void bench_end(json_t *report)
{
    cm_bytes text;
    cm_bytes_init(&text, 0);
    cli_append_json(&text, report, JSON_COMPACT | JSON_REAL_PRECISION(5));
    printf("\n%.*s\n\n", (int)text.len, (const char *)text.data);
    write_report(&text);
    cm_bytes_fini(&text);
    json_decref(report);
}

/* ---- paths ---- */

static bool open_path(const kn_device_options *options, const kn_limits *limits, bench_path *path_out)
{
    cm_error err = {0};
    if (kn_device_open(options, &path_out->device, &err) != CM_OK) {
        cli_fail(&g_table, &err);
        return false;
    }
    if (kn_stream_open(path_out->device, limits, &path_out->stream) != CM_OK) {
        kn_device_close(path_out->device);
        cli_complain(&g_table, CLI_FAILED, "no memory for the scratch of path %s", options->isa);
        return false;
    }
    return true;
}

uint32_t bench_open_paths(const bench_config *config, const kn_limits *limits,
                          bench_path paths_out[BENCH_PATHS_MAX])
{
    uint32_t n = 0;
    char *names = cm_strdup(config->isa), *rest = names;
    for (char *name = strsep(&rest, ","); name != NULL && n < BENCH_PATHS_MAX / 2;
         name = strsep(&rest, ",")) {
        kn_device_options options = {.isa = name, .n_threads = (uint32_t)config->threads};
        if (!open_path(&options, limits, &paths_out[n])) {
            bench_close_paths(paths_out, n);
            n = 0;
            break;
        }
        n++;
    }
    cm_free(names);
    return n;
}

void bench_close_paths(bench_path *paths, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        if (paths[i].prepared.addr == 0) {
            kn_stream_close(paths[i].stream);
            kn_device_close(paths[i].device);
        }
    }
}

bench_path bench_open_ref(const kn_limits *limits)
{
    bench_path ref = {0};
    bool ok = open_path(&(kn_device_options){.backend = "ref", .n_threads = 1}, limits, &ref);
    return ok ? ref : (bench_path){0};
}

/* ---- the verb ---- */

static int list(void)
{
    for (uint32_t i = 0; i < N_BENCH; i++) {
        printf("  %-18s %s\n", BENCHES[i].bench->name, BENCHES[i].bench->doc);
    }
    return CLI_OK;
}

/* One run of the verb. */
typedef struct bench_job {
    bench_config config;
    const bench_entry *entry; /* to run next; NULL: to make the model of random weights */
    bench_models models;
    cm_bytes small; /* folder of random weights */
    bool small_made;
    const bench_entry *chosen[N_BENCH];
    bench_result results[N_BENCH]; /* of the chosen ones, when they are several */
    uint32_t n;
} bench_job;

static int job_make_small(bench_job *job)
{
    cm_bytes text;
    cm_error err = {0};
    cm_status status = synthetic_config(job->models.shape, &text, &err);
    if (status == CM_OK) {
        status = synthetic_write(cm_bytes_text(&text), cm_bytes_text(&job->small), BENCH_SMALL_SEED, &err);
        cm_bytes_fini(&text);
    }
    return status == CM_OK ? CLI_OK : cli_fail(&g_table, &err);
}

/* In a process of its own. */
static int job_run(void *ctx)
{
    bench_job *job = ctx;
    bench_config config = job->config;
    if (job->entry == NULL) {
        return job_make_small(job);
    }
    if (config.model[0] == '\0' && (job->entry->needs & (BENCH_NANO | BENCH_SMALL))) {
        config.model = job->entry->needs & BENCH_NANO ? job->models.nano : (char *)job->small.data;
    }
    return job->entry->bench->run(job->entry->bench, &config);
}

/* Makes what the benchmark needs and runs it. */
static bench_outcome job_run_one(bench_job *job, const bench_entry *entry, int *code_out)
{
    if ((entry->needs & BENCH_SMALL) && job->config.model[0] == '\0' && !job->small_made) {
        job->entry = NULL;
        bench_outcome end = bench_room_run(job_run, job, code_out);
        job->small_made = end == BENCH_ENDED && *code_out == CLI_OK;
        if (!job->small_made) {
            return end;
        }
    }
    job->entry = entry;
    return bench_room_run(job_run, job, code_out);
}

static cm_status job_check(bench_job *job, const bench_entry *entry, cm_error *err)
{
    return bench_needs_check(entry->needs, entry->disk_mb, &job->config, bench_room(), &job->models, err);
}

/* ---- several ---- */

/* Says at once, not after an hour, what cannot be run and why. */
static void plan_all(bench_job *job)
{
    for (uint32_t i = 0; i < job->n; i++) {
        bench_result *r = &job->results[i];
        r->name = job->chosen[i]->bench->name;
        if (job_check(job, job->chosen[i], &r->reason) != CM_OK) {
            r->ending = BENCH_SKIPPED;
            fprintf(stderr, "baleen bench: %s will be skipped: %s\n", r->name, r->reason.text);
        }
    }
}

static double expected_s(const bench_job *job, uint32_t i)
{
    const bench_entry *entry = job->chosen[i];
    return job->results[i].ending == BENCH_SKIPPED
               ? 0
               : entry->prepare_s + (double)job->config.rounds * entry->round_s;
}

/* i is next; the time left goes by how long the others took against what was expected of them. */
static void say_progress(const bench_job *job, uint32_t i)
{
    double expected = 0, took = 0, left = 0;
    for (uint32_t k = 0; k < job->n; k++) {
        *(k < i ? &expected : &left) += expected_s(job, k);
        took += job->results[k].seconds;
    }
    left *= i > 0 && expected > 0 ? took / expected : 1;
    fprintf(stderr, "baleen bench: %u of %u, %s; about %.0f %s left\n", i + 1, job->n, job->results[i].name,
            left < 90 ? left : left / 60, left < 90 ? "s" : "min");
}

/* The one that fails is told of, and the others run all the same. */
static bench_outcome run_all(bench_job *job, int *code_out)
{
    plan_all(job);
    *code_out = CLI_OK;
    for (uint32_t i = 0; i < job->n; i++) {
        bench_result *r = &job->results[i];
        if (r->ending == BENCH_SKIPPED) {
            continue;
        }
        int code;
        uint64_t start_ns = cm_now_ns();
        say_progress(job, i);
        bench_outcome end = job_run_one(job, job->chosen[i], &code);
        if (end != BENCH_ENDED) {
            *code_out = code;
            return end;
        }
        r->seconds = 1e-9 * (double)(cm_now_ns() - start_ns);
        r->ending = code == CLI_OK ? BENCH_OK : BENCH_FAILED;
        r->report = take_report();
        *code_out = code != CLI_OK ? CLI_FAILED : *code_out;
    }
    bench_table_print(job->results, job->n, job->config.rounds);
    return BENCH_ENDED;
}

static bench_outcome run_one(bench_job *job, const bench_entry *entry, int *code_out)
{
    cm_error err = {0};
    if (job_check(job, entry, &err) != CM_OK) {
        *code_out = cli_fail(&g_table, &err);
        return BENCH_ENDED;
    }
    return job_run_one(job, entry, code_out);
}

static int run_in_room(bench_job *job)
{
    cm_error err = {0};
    int code = CLI_OK;
    if (bench_room_open(&err) != CM_OK) {
        return cli_fail(&g_table, &err);
    }
    cm_bytes_init(&job->small, 0);
    cm_bytes_printf(&job->small, "%s/bench-s", bench_room());
    bench_outcome end = job->n > 1 ? run_all(job, &code) : run_one(job, job->chosen[0], &code);
    cm_bytes_fini(&job->small);
    bench_models_free(&job->models);
    for (uint32_t i = 0; i < job->n; i++) {
        json_decref(job->results[i].report);
    }
    if (end != BENCH_CHILD) {
        bench_room_close(end == BENCH_ENDED && code != CLI_OK ? BENCH_RUN_FOLDER : NULL); /* logs */
    }
    return end == BENCH_INTERRUPTED ? CLI_FAILED : code;
}

/* A model that cannot be read is said now, not by each that wants it. */
static cm_status check_model(const bench_config *config, cm_error *err)
{
    md_geometry geometry;
    return config->model[0] != '\0' ? md_geometry_load(config->model, &geometry, err) : CM_OK;
}

static bool is_named(const char *name, const bench_entry *entry)
{
    return strcmp(name, BENCH_ALL) == 0 || strcmp(name, entry->bench->name) == 0;
}

/* In the order of the list, each once. Returns a name that is none, or NULL. */
static const char *choose(bench_job *job, const char **names, size_t n_name)
{
    for (size_t k = 0; k < n_name; k++) {
        uint32_t i = 0;
        while (i < N_BENCH && !is_named(names[k], &BENCHES[i])) {
            i++;
        }
        if (i == N_BENCH) {
            return names[k];
        }
    }
    for (uint32_t i = 0; i < N_BENCH; i++) {
        bool wanted = false;
        for (size_t k = 0; k < n_name; k++) {
            wanted |= is_named(names[k], &BENCHES[i]);
        }
        if (wanted) {
            job->chosen[job->n++] = &BENCHES[i];
        }
    }
    return NULL;
}

static int run_named(bench_job *job, const char **names, size_t n_name)
{
    cm_error err = {0};
    const char *wrong = choose(job, names, n_name);
    if (wrong != NULL) {
        return cli_complain(&g_table, CLI_USAGE, "there is no benchmark '%s'; baleen bench lists them",
                            wrong);
    }
    if (job->n > 1 && job->config.svg[0] != '\0') {
        return cli_complain(&g_table, CLI_USAGE, "--svg names the file of one chart: give it with one name");
    }
    if (check_model(&job->config, &err) != CM_OK) {
        return cli_fail(&g_table, &err);
    }
    if (job->config.rounds == 0) {
        job->config.rounds = job->n > 1 ? BENCH_SEVERAL_ROUNDS : BENCH_ROUNDS;
    }
    return run_in_room(job);
}

int verb_bench(int argc, char **argv)
{
    bench_job job = {0};
    const char *names[N_BENCH];
    size_t n_name;
    cm_log_setup(
        &(cm_log_options){.level = CM_LOG_ERROR, .fd = STDERR_FILENO}); /* links are lost on purpose */
    int code = cli_begin(&g_table, &job.config, argc, argv, names, N_BENCH, &n_name);
    if (code >= 0) {
        return code;
    }
    code = n_name == 0 ? list() : run_named(&job, names, n_name);
    cm_cfg_free(&g_table, &job.config);
    return code;
}
