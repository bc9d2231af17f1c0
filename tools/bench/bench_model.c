/* serve.model and serve.workers: tokens a second of a whole cluster, from the client's side: gateway, one
 * router, the workers, as `baleen up` starts them. Decode at several batches, beside what reading a step's
 * weights once would allow; prefill, beside what float32 multiply-adds would; with --peer, both beside other
 * programs that run the same in turn.
 *
 * A figure is the difference of two loads, one of few tokens and one of more, so that opening streams and
 * ending them count for nothing. With one thread it is tokens by processor time of all of the cluster's
 * processes but the coordinator; the time on the wall stands beside it. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/bytes.h"
#include "common/base/clock.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/model/tokenizer.h"
#include "tools/bench/bench.h"
#include "tools/bench/bench_bytes.h"
#include "tools/bench/bench_cluster.h"
#include "tools/bench/bench_peer.h"
#include "tools/baleen/cli.h"
#include "tools/bench/svg.h"

enum {
    MODEL_CASES = 8,    /* batches, and prefill after them */
    MODEL_FIRST = 4,    /* tokens of the short load */
    MODEL_LETTERS = 16, /* a short prompt; tokens where every byte is one */
    MODEL_PIDS = 64,
    MODEL_READ_BYTES = 256 << 20,
    MODEL_WORKERS = 8, /* of the largest cluster of serve.workers */
};

typedef struct model_case {
    char name[24];                            /* what a peer calls it: decode_b8, prefill_p512 */
    uint32_t batch;                           /* 0: prefill */
    double n_bytes;                           /* of decode: weights that one step reads */
    double n_macs;                            /* of prefill: multiplications by weights for a token */
    bench_samples cpu, wall, limit, of_limit; /* tokens a second; limit: by n_bytes or n_macs alone */
} model_case;

typedef struct model_run {
    const bench_config *config;
    bench_cluster *cluster;
    stream_load *load;
    uint32_t n_stream, n_token, n_letter; /* of the load under way */
    uint64_t n_drawn;
    md_tokenizer *tokenizer;
    md_ids prompt; /* of the load under way */
    model_case cases[MODEL_CASES];
    uint32_t n_case;
    bench_peers *peers;
    void *read_from;
    bench_team *team;
    char sequences[48];
    const char *env[1];
    bench_cluster_options options;
    md_geometry geometry;
} model_run;

/* ---- a load ---- */

/* Random letters: no two prompts begin alike, so nothing of them is kept from another one. */
static void write_body(void *ctx, uint32_t i, cm_bytes *body)
{
    model_run *m = ctx;
    cm_bytes_printf(
        body,
        "{\"model\":\"bench\",\"stream\":true,\"thinking\":{\"type\":\"disabled\"},\"ignore_eos\":true,"
        "\"seed\":%u,\"max_tokens\":%u,\"messages\":[{\"role\":\"user\",\"content\":\"",
        i, m->n_token);
    size_t at = body->len;
    for (uint32_t k = 0; k < m->n_letter; k++) {
        char letter = (char)('a' + cm_rng_at(1, m->n_drawn++, 0).word[0] % 26);
        cm_bytes_append(body, &letter, 1);
    }
    md_tokenizer_encode(m->tokenizer, cm_bytes_text(body) + at, m->n_letter, MD_TEXT_PLAIN, &m->prompt);
    cm_bytes_append_text(body, "\"}]}");
}

static bool all_answered(void *ctx)
{
    const model_run *m = ctx;
    stream_load_counts counts = stream_load_get(m->load);
    return counts.n_done + counts.n_failed == m->n_stream;
}

static double cluster_cpu_s(const model_run *m)
{
    uint32_t pids[MODEL_PIDS];
    uint32_t n = cluster_serving_pids(bench_cluster_processes(m->cluster), pids, MODEL_PIDS);
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        sum += bench_process_cpu_s((int)pids[i]);
    }
    return sum;
}

typedef struct model_times {
    double cpu_s, wall_s;
    size_t n_prompt; /* tokens of all its prompts' letters */
} model_times;

/* What its figures go by. */
static const bench_samples *model_rate(const model_run *m, const model_case *c)
{
    return m->config->threads == 1 ? &c->cpu : &c->wall;
}

static cm_status run_load(model_run *m, uint32_t n_stream, uint32_t n_token, uint32_t n_letter,
                          model_times *out, cm_error *err)
{
    stream_load_options options = {.loop = bench_cluster_loop(m->cluster),
                                   .address = cluster_http(bench_cluster_processes(m->cluster)),
                                   .n = n_stream,
                                   .write_body = write_body,
                                   .ctx = m};
    m->n_stream = n_stream;
    m->n_token = n_token;
    m->n_letter = n_letter;
    m->prompt.n = 0;
    double cpu_s = cluster_cpu_s(m);
    uint64_t start_ns = cm_now_ns();
    CM_TRY(stream_load_begin(&options, &m->load, err));
    cm_status status = bench_cluster_wait(m->cluster, all_answered, m, "all streams to end", err);
    out->wall_s = 1e-9 * (double)(cm_now_ns() - start_ns);
    out->cpu_s = cluster_cpu_s(m) - cpu_s;
    out->n_prompt = m->prompt.n;
    uint32_t n_failed = stream_load_get(m->load).n_failed;
    stream_load_end(m->load);
    m->load = NULL;
    CM_TRY(status);
    return n_failed == 0 ? CM_OK
                         : cm_error_set(err, CM_E_IO, NULL, "%u of %u streams failed", n_failed, n_stream);
}

/* ---- a round ---- */

typedef struct model_limits {
    double bytes_s, macs_s;
} model_limits;

static model_limits probe_limits(const model_run *m)
{
    double start_s = bench_now(m->config);
    bench_read(m->team, m->read_from, MODEL_READ_BYTES);
    double read_s = bench_now(m->config);
    bench_fma(m->team);
    double end_s = bench_now(m->config);
    return (model_limits){.bytes_s = MODEL_READ_BYTES / (read_s - start_s),
                          .macs_s = (double)bench_fma_macs() * (double)m->config->threads / (end_s - read_s)};
}

static cm_status measure_case(model_run *m, model_case *c, model_limits limits, cm_error *err)
{
    model_times few, more;
    uint32_t steps = (uint32_t)m->config->steps, prompt = (uint32_t)m->config->prompt;
    bool decode = c->batch != 0;
    uint32_t n = decode ? c->batch : 1, first = decode ? MODEL_FIRST : 1;
    CM_TRY(run_load(m, n, first, MODEL_LETTERS, &few, err));
    CM_TRY(run_load(m, n, first + (decode ? steps : 0), MODEL_LETTERS + (decode ? 0 : prompt), &more, err));
    double n_token = decode ? (double)n * steps : (double)more.n_prompt - (double)few.n_prompt;
    double limit = decode ? n * limits.bytes_s / c->n_bytes : limits.macs_s / c->n_macs;
    bench_add(&c->cpu, n_token / (more.cpu_s - few.cpu_s));
    bench_add(&c->wall, n_token / (more.wall_s - few.wall_s));
    bench_add(&c->limit, limit);
    bench_add(&c->of_limit, model_rate(m, c)->value[c->cpu.n - 1] / limit);
    return CM_OK;
}

static cm_status take_round(model_run *m, cm_error *err)
{
    model_limits limits = probe_limits(m);
    for (uint32_t i = 0; i < m->n_case; i++) {
        CM_TRY(measure_case(m, &m->cases[i], limits, err));
    }
    return m->peers != NULL ? bench_peers_run(m->peers, err) : CM_OK;
}

/* ---- the report ---- */

static void print_peers(const model_run *m, const model_case *c, json_t *row)
{
    const bench_samples *ours = model_rate(m, c);
    json_t *list = json_array();
    for (uint32_t i = 0; m->peers != NULL && i < bench_peers_count(m->peers); i++) {
        const bench_samples *theirs = bench_peers_case(m->peers, i, c->name);
        bench_samples ratio = {0};
        for (uint32_t r = 0; theirs != NULL && r < theirs->n && r < ours->n; r++) {
            bench_add(&ratio, ours->value[r] / theirs->value[r]);
        }
        if (ratio.n > 0) {
            bench_summary rate = bench_summarize(theirs), over = bench_summarize(&ratio);
            printf("%14s %-16s %8.1f tok/s, of it %14.2f (%.2f .. %.2f)\n", "", bench_peers_name(m->peers, i),
                   rate.median, over.median, over.min, over.max);
            json_array_append_new(list, json_pack("{s:s, s:o, s:o}", "peer", bench_peers_name(m->peers, i),
                                                  "tokens_s", bench_summary_json(rate), "ratio",
                                                  bench_summary_json(over)));
        }
    }
    json_object_set_new(row, "peers", list);
}

static void print_heading(const model_run *m)
{
    printf("%s, %u worker%s, %u steps; tokens a second\n%-14s %-24s %-24s %8s  %s\n", m->config->model,
           (unsigned)m->config->workers, m->config->workers == 1 ? "" : "s", (unsigned)m->config->steps, "",
           "by processor time", "on the wall", "limit", "of it");
}

static void print_case(const model_run *m, const model_case *c, json_t *results)
{
    bench_summary cpu = bench_summarize(&c->cpu), wall = bench_summarize(&c->wall),
                  limit = bench_summarize(&c->limit), ratio = bench_summarize(&c->of_limit);
    printf("%-14s %8.1f (%.1f .. %.1f)  %8.1f (%.1f .. %.1f)  %8.0f  %5.2f (%.2f .. %.2f)\n", c->name,
           cpu.median, cpu.min, cpu.max, wall.median, wall.min, wall.max, limit.median, ratio.median,
           ratio.min, ratio.max);
    json_t *row = json_pack("{s:s, s:I, s:I, s:f, s:f, s:o, s:o, s:o, s:o}", "case", c->name, "workers",
                            (json_int_t)m->config->workers, "batch", (json_int_t)c->batch, "step_bytes",
                            c->n_bytes, "token_macs", c->n_macs, "cpu_tokens_s", bench_summary_json(cpu),
                            "wall_tokens_s", bench_summary_json(wall), "limit_tokens_s",
                            bench_summary_json(limit), "of_limit", bench_summary_json(ratio));
    print_peers(m, c, row);
    json_array_append_new(results, row);
}

/* ---- all ---- */

static cm_status list_cases(model_run *m, cm_error *err)
{
    char *names = cm_strdup(m->config->batches), *rest = names;
    cm_status status = CM_OK;
    uint32_t most = 1;
    for (char *word = strsep(&rest, ","); word != NULL && status == CM_OK; word = strsep(&rest, ",")) {
        char *end;
        unsigned long batch = strtoul(word, &end, 10);
        if (*end != '\0' || batch < 1 || batch > 4096 || m->n_case == MODEL_CASES - 1) {
            status = cm_error_set(err, CM_E_CONFIG, "batches",
                                  "--batches %s: at most %d numbers from 1 to 4096, comma separated",
                                  m->config->batches, MODEL_CASES - 1);
            break;
        }
        model_case *c = &m->cases[m->n_case++];
        c->batch = (uint32_t)batch;
        c->n_bytes = bench_step_bytes(&m->geometry, c->batch);
        snprintf(c->name, sizeof(c->name), "decode_b%u", c->batch);
        most = c->batch > most ? c->batch : most;
    }
    cm_free(names);
    model_case *prefill = &m->cases[m->n_case++];
    snprintf(prefill->name, sizeof(prefill->name), "prefill_p%u", (unsigned)m->config->prompt);
    prefill->n_macs = bench_token_macs(&m->geometry);
    snprintf(m->sequences, sizeof(m->sequences), "BALEEN_SEQUENCES_MAX=%u", most);
    return status;
}

static cm_status open_tokenizer(model_run *m, cm_error *err)
{
    cm_bytes path;
    cm_bytes_init(&path, 0);
    cm_bytes_printf(&path, "%s/tokenizer.json", m->config->model);
    cm_status status = md_tokenizer_open(cm_bytes_text(&path), m->geometry.vocab, &m->tokenizer, err);
    cm_bytes_fini(&path);
    md_ids_init(&m->prompt);
    return status;
}

static cm_status model_prepare(model_run *m, cm_error *err)
{
    CM_TRY(md_geometry_load(m->config->model, &m->geometry, err));
    CM_TRY(list_cases(m, err));
    CM_TRY(open_tokenizer(m, err));
    if (m->config->peer[0] != '\0') {
        m->peers = bench_peers_create(m->config->peer);
    }
    m->read_from = bench_read_alloc(MODEL_READ_BYTES);
    if (m->read_from == NULL) {
        return cm_error_set(err, CM_E_MEMORY, NULL, "no memory to read from");
    }
    m->team = bench_team_create((uint32_t)m->config->threads);
    (void)probe_limits(m); /* the first pass over new memory is slower */
    m->env[0] = m->sequences;
    m->options = (bench_cluster_options){.model = m->config->model,
                                         .scripted_model = "",
                                         .failpoints = "",
                                         .workers = (uint32_t)m->config->workers,
                                         .threads = (uint32_t)m->config->threads,
                                         .env = m->env,
                                         .n_env = 1};
    cli_progress("starting a cluster");
    return bench_cluster_start(&m->options, &m->cluster, err);
}

static cm_status take_rounds(model_run *m, cm_error *err)
{
    model_times warm;
    CM_TRY(model_prepare(m, err));
    uint32_t most = 1;
    for (uint32_t i = 0; i < m->n_case; i++) {
        most = m->cases[i].batch > most ? m->cases[i].batch : most;
    }
    /* memory that the first streams would be the first to touch */
    CM_TRY(run_load(m, most, MODEL_FIRST, MODEL_LETTERS, &warm, err));
    for (uint32_t round = 0; round < m->config->rounds; round++) {
        cli_progress("%u worker%s, round %u of %u", (unsigned)m->config->workers,
                     m->config->workers == 1 ? "" : "s", round + 1, (unsigned)m->config->rounds);
        CM_TRY(take_round(m, err));
    }
    cli_progress_clear();
    return CM_OK;
}

static void model_close(model_run *m)
{
    stream_load_end(m->load);
    bench_cluster_stop(m->cluster);
    if (m->team != NULL) {
        bench_team_destroy(m->team);
    }
    bench_read_free(m->read_from, MODEL_READ_BYTES);
    if (m->tokenizer != NULL) {
        md_tokenizer_close(m->tokenizer);
        md_ids_fini(&m->prompt);
    }
    bench_peers_destroy(m->peers);
}

static int model_end(cm_status status, const cm_error *err)
{
    if (status != CM_OK) {
        fprintf(stderr, "baleen bench: %s\n", err->text);
    }
    return status == CM_OK ? CLI_OK : CLI_FAILED;
}

/* ---- serve.model ---- */

static void add_point(svg_series *series, double x, const bench_samples *samples)
{
    bench_summary y = bench_summarize(samples);
    series->points[series->n++] = (svg_point){.x = x, .y = y.median, .low = y.min, .high = y.max};
}

/* The decode cases by their batch. */
static cm_status draw_batches(const model_run *m, cm_error *err)
{
    bool by_cpu = m->config->threads == 1; /* what the limit goes by comes first */
    svg_chart chart = {.title = "Decode by batch",
                       .x_label = "sequences in a step",
                       .y_label = "tokens a second",
                       .log_y = true,
                       .n_rounds = (uint32_t)m->config->rounds,
                       .series[1] = {.name = "reading weights alone", .dashed = true},
                       .n = 3};
    svg_series *cpu = &chart.series[by_cpu ? 0 : 2], *wall = &chart.series[by_cpu ? 2 : 0];
    uint32_t n_peer = m->peers != NULL ? bench_peers_count(m->peers) : 0;
    snprintf(cpu->name, sizeof(cpu->name), "by processor time");
    snprintf(wall->name, sizeof(wall->name), "on the wall");
    for (uint32_t p = 0; p < n_peer && chart.n < SVG_SERIES_MAX; p++) {
        snprintf(chart.series[chart.n++].name, sizeof(chart.series[0].name), "%.25s",
                 bench_peers_name(m->peers, p));
    }
    for (uint32_t i = 0; i < m->n_case && m->cases[i].batch != 0; i++) {
        const model_case *c = &m->cases[i];
        add_point(cpu, c->batch, &c->cpu);
        add_point(wall, c->batch, &c->wall);
        add_point(&chart.series[1], c->batch, &c->limit);
        for (uint32_t p = 3; p < chart.n; p++) {
            const bench_samples *theirs = bench_peers_case(m->peers, p - 3, c->name);
            if (theirs != NULL) {
                add_point(&chart.series[p], c->batch, theirs);
            }
        }
    }
    return svg_write(&chart, m->config->svg, err);
}

static int model_run_bench(const bench *b, const bench_config *config)
{
    bench_config of_some = *config;
    model_run m = {.config = &of_some};
    cm_error err = {0};
    of_some.workers = config->workers != 0 ? config->workers : 1;
    cm_status status = take_rounds(&m, &err);
    if (status == CM_OK) {
        json_t *report = bench_begin(b, config);
        print_heading(&m);
        for (uint32_t i = 0; i < m.n_case; i++) {
            print_case(&m, &m.cases[i], json_object_get(report, "results"));
        }
        bench_end(report);
        status = config->svg[0] != '\0' ? draw_batches(&m, &err) : CM_OK;
    }
    model_close(&m);
    return model_end(status, &err);
}

const bench bench_serve_model = {
    "serve.model",
    "a whole cluster: decode and prefill, against what weights and arithmetic allow, and peers",
    model_run_bench};

/* ---- serve.workers ---- */

/* One cluster after another; the cases of all have the same places. */
static cm_status measure_workers(const bench_config *config, svg_chart *chart, json_t *report, cm_error *err)
{
    model_run m = {.config = config};
    cm_status status = take_rounds(&m, err);
    if (status == CM_OK) {
        print_heading(&m);
    }
    for (uint32_t i = 0; i < m.n_case && status == CM_OK; i++) {
        const model_case *c = &m.cases[i];
        print_case(&m, c, json_object_get(report, "results"));
        if (c->batch != 0 && 2 * i + 1 < SVG_SERIES_MAX) {
            svg_series *rate = &chart->series[2 * i], *limit = rate + 1;
            snprintf(rate->name, sizeof(rate->name), "batch %u", c->batch);
            snprintf(limit->name, sizeof(limit->name), "reading weights alone");
            limit->dashed = true;
            add_point(rate, (double)config->workers, model_rate(&m, c));
            add_point(limit, (double)config->workers, &c->limit);
            chart->n = 2 * i + 2;
        }
    }
    model_close(&m);
    return status;
}

static int workers_run_bench(const bench *b, const bench_config *config)
{
    svg_chart chart = {.title = "Decode by workers on one machine",
                       .x_label = "workers",
                       .y_label =
                           config->threads == 1 ? "tokens a second of processor time" : "tokens a second",
                       .n_rounds = (uint32_t)config->rounds,
                       .log_y = true};
    cm_error err = {0};
    cm_status status = CM_OK;
    uint64_t most = config->workers != 0 ? config->workers : MODEL_WORKERS;
    json_t *report = bench_begin(b, config);
    for (uint64_t n = 1; n <= most && status == CM_OK; n *= 2) {
        bench_config of_n = *config;
        of_n.workers = n;
        status = measure_workers(&of_n, &chart, report, &err);
    }
    bench_end(report);
    if (status == CM_OK && config->svg[0] != '\0') {
        status = svg_write(&chart, config->svg, &err);
    }
    return model_end(status, &err);
}

const bench bench_serve_workers = {"serve.workers",
                                   "serve.model with 1, 2, 4 .. --workers workers, one cluster after another",
                                   workers_run_bench};
