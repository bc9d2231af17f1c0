/* step.context: what a step costs as its sequence grows. A router's engine and a worker's in one process, the
 * same objects as in a cluster: one sequence is filled in chunks of 128 rows to each power of two, there some
 * steps of one row are timed, and the chunks on the way. The limit is reading the step's weights and what its
 * attention reads of the KV cache. Processor time of both engines together with one thread, else wall time.
 */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/clock.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "tools/bench/bench.h"
#include "tools/bench/bench_bytes.h"
#include "tools/bench/bench_cluster.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/solo.h"
#include "tools/bench/svg.h"

enum { CONTEXT_CHUNK = 128, CONTEXT_FIRST = 1024, CONTEXT_MAX = 16, CONTEXT_READ_BYTES = 256 << 20 };

typedef struct context_point {
    uint32_t at;
    bench_samples step_s, read_rate; /* of one row; bytes a second */
    double chunk_s;                  /* of a row, in the chunks before */
} context_point;

typedef struct context_run {
    const bench_config *config;
    solo *engine;
    bench_team *team;
    void *read_from;
    uint32_t *tokens; /* [CONTEXT_CHUNK] */
    uint64_t n_drawn;
    uint32_t pos;
    context_point points[CONTEXT_MAX];
    uint32_t n_point;
} context_run;

static double now_s(const context_run *c)
{
    return c->config->threads == 1 ? bench_process_cpu_s(getpid()) : 1e-9 * (double)cm_now_ns();
}

static const uint32_t *draw_tokens(context_run *c, uint32_t n)
{
    uint32_t vocab = solo_geometry(c->engine)->vocab;
    for (uint32_t i = 0; i < n; i++) {
        c->tokens[i] = 2 + cm_rng_at(1, c->n_drawn++, 0).word[0] % (vocab - 2);
    }
    return c->tokens;
}

static cm_status run_rows(context_run *c, uint32_t n, bool sample, cm_error *err)
{
    uint32_t token;
    cm_status status = solo_step(c->engine, 0, c->pos, draw_tokens(c, n), n, sample, &token);
    c->pos += n;
    return status == CM_OK
               ? CM_OK
               : cm_error_set(err, status, NULL, "a step at %u: %s", c->pos, cm_status_text(status));
}

static cm_status fill_to(context_run *c, uint32_t to, double *row_s_out, cm_error *err)
{
    uint32_t from = c->pos;
    double start_s = now_s(c);
    while (c->pos < to) {
        uint32_t n = to - c->pos < CONTEXT_CHUNK ? to - c->pos : CONTEXT_CHUNK;
        cli_progress("context %u", c->pos);
        CM_TRY(run_rows(c, n, false, err));
    }
    *row_s_out = (now_s(c) - start_s) / (to - from);
    return CM_OK;
}

/* The first step of a round comes after reading other memory, as in a service something always does. */
static cm_status measure_point(context_run *c, context_point *p, cm_error *err)
{
    for (uint32_t round = 0; round < c->config->rounds; round++) {
        double start_s = now_s(c);
        bench_read(c->team, c->read_from, CONTEXT_READ_BYTES);
        double read_s = now_s(c);
        for (uint32_t i = 0; i < c->config->steps; i++) {
            CM_TRY(run_rows(c, 1, true, err));
        }
        bench_add(&p->step_s, (now_s(c) - read_s) / (double)c->config->steps);
        bench_add(&p->read_rate, CONTEXT_READ_BYTES / (read_s - start_s));
    }
    return CM_OK;
}

static cm_status context_open(context_run *c, cm_error *err)
{
    md_geometry g;
    solo_options options;
    CM_TRY(md_geometry_load(c->config->model, &g, err));
    uint64_t most = c->config->context + c->config->rounds * c->config->steps * CONTEXT_MAX + CONTEXT_CHUNK;
    if (most > g.context) {
        return cm_error_set(err, CM_E_CONFIG, "context", "--context %llu: the model has %u with the steps",
                            (unsigned long long)c->config->context, g.context);
    }
    solo_options_defaults(&options);
    options.model = c->config->model;
    options.n_threads = (uint32_t)c->config->threads;
    options.row_max = CONTEXT_CHUNK;
    options.kv_bytes = 2ull * bench_kv_bytes(&g, (uint32_t)most) + (64 << 20);
    c->tokens = cm_alloc(sizeof(uint32_t) * CONTEXT_CHUNK);
    c->read_from = bench_read_alloc(CONTEXT_READ_BYTES);
    c->team = bench_team_create((uint32_t)c->config->threads);
    bench_read(c->team, c->read_from, CONTEXT_READ_BYTES); /* the first pass over new memory is slower */
    return solo_create(&options, &c->engine, err);
}

/* ---- the report ---- */

static void print_point(const context_run *c, const context_point *p, svg_chart *chart, json_t *results)
{
    const md_geometry *g = solo_geometry(c->engine);
    bench_summary step = bench_summarize(&p->step_s), read = bench_summarize(&p->read_rate);
    double n_bytes = bench_step_bytes(g, 1) + bench_kv_read_bytes(g, p->at), limit_s = n_bytes / read.median;
    bench_samples over = {0};
    for (uint32_t i = 0; i < p->step_s.n; i++) {
        bench_add(&over, p->step_s.value[i] * p->read_rate.value[i] / n_bytes);
    }
    bench_summary ratio = bench_summarize(&over);
    printf("%8u %9.2f ms (%.2f .. %.2f) %9.2f ms %7.2f %12.2f ms\n", p->at, step.median * 1e3, step.min * 1e3,
           step.max * 1e3, limit_s * 1e3, ratio.median, p->chunk_s * 1e3);
    json_array_append_new(results,
                          json_pack("{s:I, s:o, s:f, s:f, s:o}", "context", (json_int_t)p->at, "step_s",
                                    bench_summary_json(step), "limit_s", limit_s, "prefill_row_s", p->chunk_s,
                                    "over_limit", bench_summary_json(ratio)));
    svg_point at = {.x = p->at, .y = 1e3 * step.median, .low = 1e3 * step.min, .high = 1e3 * step.max};
    chart->series[0].points[chart->series[0].n++] = at;
    at = (svg_point){.x = p->at, .y = 1e3 * limit_s};
    chart->series[1].points[chart->series[1].n++] = at;
    at = (svg_point){.x = p->at, .y = 1e3 * p->chunk_s};
    chart->series[2].points[chart->series[2].n++] = at;
}

static cm_status context_report(context_run *c, const bench *b, cm_error *err)
{
    svg_chart chart = {.title = "A step by the length of its sequence",
                       .x_label = "tokens before the step",
                       .y_label = c->config->threads == 1 ? "ms of processor time" : "ms on the wall",
                       .n_rounds = (uint32_t)c->config->rounds,
                       .series = {{.name = "decode, one row"},
                                  {.name = "its reading alone", .dashed = true},
                                  {.name = "prefill, each row of 128"}},
                       .n = 3};
    json_t *report = bench_begin(b, c->config);
    printf("%s, one sequence, one worker\n%8s %-28s %-12s %-7s %s\n", c->config->model, "context",
           "a decode step", "limit", "times", "a row of prefill");
    for (uint32_t i = 0; i < c->n_point; i++) {
        print_point(c, &c->points[i], &chart, json_object_get(report, "results"));
    }
    bench_end(report);
    return c->config->svg[0] != '\0' ? svg_write(&chart, c->config->svg, err) : CM_OK;
}

static cm_status context_measure(context_run *c, const bench *b, cm_error *err)
{
    CM_TRY(context_open(c, err));
    for (uint64_t at = CONTEXT_FIRST; at <= c->config->context && c->n_point < CONTEXT_MAX; at *= 2) {
        context_point *p = &c->points[c->n_point++];
        p->at = (uint32_t)at;
        CM_TRY(fill_to(c, p->at, &p->chunk_s, err));
        CM_TRY(measure_point(c, p, err));
    }
    cli_progress_clear();
    return context_report(c, b, err);
}

static int context_run_bench(const bench *b, const bench_config *config)
{
    context_run c = {.config = config};
    cm_error err = {0};
    cm_status status = context_measure(&c, b, &err);
    if (c.engine != NULL) {
        solo_destroy(c.engine);
    }
    if (c.team != NULL) {
        bench_team_destroy(c.team);
    }
    bench_read_free(c.read_from, CONTEXT_READ_BYTES);
    cm_free(c.tokens);
    if (status != CM_OK) {
        fprintf(stderr, "baleen bench: %s\n", err.text);
    }
    return status == CM_OK ? CLI_OK : CLI_FAILED;
}

const bench bench_step_context = {"step.context",
                                  "a decode step as its sequence grows, against reading its weights and KV",
                                  context_run_bench};
