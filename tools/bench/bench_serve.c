/* serve.stream: what one gateway pays for the answers it streams. A cluster with scripted answers is started
 * (so the router costs little), loaded with streams that all run at once, and its gateway's processor time is
 * divided by the tokens it told; beside it, in the same round, a bare send() loop with events of the same
 * size. Then memory per stream, and how soon a client that goes away is counted. */
#include <event2/buffer.h>
#include <event2/http.h>
#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/bytes.h"
#include "common/base/clock.h"
#include "common/base/mem.h"
#include "tools/bench/bare_send.h"
#include "tools/bench/bench.h"
#include "tools/bench/bench_cluster.h"
#include "tools/baleen/cli.h"

enum {
    SERVE_TICK_MS = 20,
    SERVE_WAIT_MS = 120000, /* for what /metrics must say in the end */
    SERVE_DROPS = 20,       /* clients that go away */
    SERVE_SENDS = 20,       /* of the bare loop, on each connection */
    SERVE_VARIABLES = 8,
};

typedef struct serve {
    const bench_config *config;
    bench_cluster *cluster;
    char variables[SERVE_VARIABLES][64];
    const char *env[SERVE_VARIABLES];
    bench_cluster_options options;
    struct evhttp_connection *http; /* for /metrics */
    stream_load *load;
    pc_timer *tick;
    uint64_t rss, rss_quiet, rss_most; /* of the gateway: before the first stream, with all open and quiet,
                                          and while all talked */
    double all_drop_s;                 /* all clients go away at once */
    uint32_t n_at_once;                /* streams that talked at one time, at most */
    double counted;                    /* baleen_requests_aborted_total; < 0: not answered yet */
} serve;

static int gateway_pid(const serve *s)
{
    return cluster_gateway_pid(bench_cluster_processes(s->cluster));
}

/* ---- waiting ---- */

static void serve_tick(void *arg)
{
    serve *s = arg;
    if (s->load != NULL) {
        stream_load_counts counts = stream_load_get(s->load);
        s->n_at_once = counts.n_talking > s->n_at_once ? counts.n_talking : s->n_at_once;
        uint64_t rss = bench_process_rss(gateway_pid(s));
        s->rss_most = rss > s->rss_most ? rss : s->rss_most;
    }
    pc_timer_set(s->tick, SERVE_TICK_MS);
}

static cm_status wait_until(serve *s, bench_until_fn until, const char *what, cm_error *err)
{
    return bench_cluster_wait(s->cluster, until, s, what, err);
}

static bool all_answered(void *ctx)
{
    const serve *s = ctx;
    stream_load_counts counts = stream_load_get(s->load);
    return counts.n_done + counts.n_failed == s->config->streams;
}

static bool one_talks(void *ctx)
{
    const serve *s = ctx;
    return stream_load_get(s->load).n_talking > 0 || stream_load_get(s->load).n_failed > 0;
}

static bool all_talk(void *ctx)
{
    const serve *s = ctx;
    stream_load_counts counts = stream_load_get(s->load);
    return counts.n_talking + counts.n_done + counts.n_failed == s->config->streams;
}

static bool is_counted(void *ctx)
{
    return ((const serve *)ctx)->counted >= 0;
}

/* ---- the cluster ---- */

/* Bounds of the servers that would be in the way. */
static void serve_set_env(serve *s)
{
    unsigned long long most = s->config->streams + 16;
    static const char *const names[] = {"STREAMS_MAX", "CONNECTIONS_MAX", "SEQUENCES_MAX", "QUEUE_MAX",
                                        "ROWS_MAX"};
    enum { N_NAMES = sizeof(names) / sizeof(names[0]) };
    for (size_t i = 0; i < N_NAMES; i++) {
        snprintf(s->variables[i], sizeof(s->variables[i]), "BALEEN_%s=%llu", names[i],
                 i + 1 == N_NAMES ? 4 * most : most);
        s->env[i] = s->variables[i];
    }
    s->options.env = s->env;
    s->options.n_env = N_NAMES;
}

static cm_status serve_start(serve *s, cm_error *err)
{
    s->options = (bench_cluster_options){.model = s->config->model,
                                         .scripted_model = "bench",
                                         .failpoints = s->config->paced ? "router_step_slow:10000" : "",
                                         .workers = 1, /* none is started: a script has no experts */
                                         .threads = 1};
    serve_set_env(s);
    CM_TRY(bench_cluster_start(&s->options, &s->cluster, err));
    int port = 0;
    const char *colon = strrchr(cluster_http(bench_cluster_processes(s->cluster)), ':');
    s->http = colon != NULL && sscanf(colon + 1, "%d", &port) == 1
                  ? evhttp_connection_base_new(pc_loop_base(bench_cluster_loop(s->cluster)), NULL,
                                               "127.0.0.1", (uint16_t)port)
                  : NULL;
    return s->http != NULL ? CM_OK : cm_error_set(err, CM_E_IO, NULL, "no connection to the gateway");
}

static void serve_stop(serve *s)
{
    if (s->http != NULL) {
        evhttp_connection_free(s->http);
    }
    stream_load_end(s->load);
    s->load = NULL;
    if (s->tick != NULL) {
        pc_timer_destroy(s->tick);
    }
    bench_cluster_stop(s->cluster);
}

/* ---- what is measured ---- */

static void write_body(const bench_config *config, bool endless, cm_bytes *body)
{
    cm_bytes_printf(body,
                    "{\"model\":\"bench\",\"stream\":true,\"thinking\":{\"type\":\"disabled\"},"
                    "\"ignore_eos\":%s,\"max_tokens\":%llu,\"messages\":[{\"role\":\"user\",\"content\":\"",
                    endless ? "true" : "false",
                    endless ? 8192ull : (unsigned long long)config->stream_tokens);
    for (uint64_t i = 0; i < (endless ? 8 : config->stream_tokens); i++) {
        cm_bytes_append_text(body, i == 0 ? "word" : " word");
    }
    cm_bytes_append_text(body, "\"}]}");
}

/* An answer of so many words, at least as many tokens, of which so many are told. */
static void write_answer(void *ctx, uint32_t i, cm_bytes *body)
{
    (void)i;
    write_body(((const serve *)ctx)->config, false, body);
}

static void write_endless(void *ctx, uint32_t i, cm_bytes *body)
{
    (void)i;
    write_body(((const serve *)ctx)->config, true, body);
}

static cm_status begin_load(serve *s, uint32_t n, bool endless, cm_error *err)
{
    stream_load_options options = {.loop = bench_cluster_loop(s->cluster),
                                   .address = cluster_http(bench_cluster_processes(s->cluster)),
                                   .n = n,
                                   .write_body = endless ? write_endless : write_answer,
                                   .ctx = s};
    return stream_load_begin(&options, &s->load, err);
}

typedef struct serve_round {
    double cpu_s, wall_s; /* per token */
    uint32_t event_bytes;
} serve_round;

static cm_status measure_streams(serve *s, serve_round *round_out, cm_error *err)
{
    double tokens = (double)s->config->streams * (double)s->config->stream_tokens;
    double cpu_s = bench_process_cpu_s(gateway_pid(s));
    uint64_t start_ns = cm_now_ns();
    CM_TRY(begin_load(s, (uint32_t)s->config->streams, false, err));
    CM_TRY(wait_until(s, all_answered, "all streams to end", err));
    uint64_t end_ns = cm_now_ns();
    stream_load_counts counts = stream_load_get(s->load);
    round_out->cpu_s = (bench_process_cpu_s(gateway_pid(s)) - cpu_s) / tokens;
    round_out->wall_s = (double)(end_ns - start_ns) * 1e-9 / tokens;
    round_out->event_bytes = (uint32_t)((double)counts.n_bytes / tokens);
    stream_load_end(s->load);
    s->load = NULL;
    return counts.n_failed == 0 ? CM_OK
                                : cm_error_set(err, CM_E_IO, NULL, "%u of %u streams failed", counts.n_failed,
                                               (unsigned)s->config->streams);
}

static void metrics_answered(struct evhttp_request *request, void *arg)
{
    static const char name[] = "\nbaleen_requests_aborted_total{";
    serve *s = arg;
    s->counted = 0;
    if (request == NULL) {
        return;
    }
    struct evbuffer *body = evhttp_request_get_input_buffer(request);
    evbuffer_add(body, "", 1);
    const char *at = strstr((const char *)evbuffer_pullup(body, -1), name);
    at = at != NULL ? strstr(at, "} ") : NULL;
    s->counted = at != NULL ? strtod(at + 2, NULL) : 0;
}

/* Requests that the gateway has counted as aborted. */
static cm_status count_aborted(serve *s, double *n_out, cm_error *err)
{
    struct evhttp_request *request = evhttp_request_new(metrics_answered, s);
    evhttp_add_header(evhttp_request_get_output_headers(request), "Host", "bench");
    s->counted = -1;
    if (evhttp_make_request(s->http, request, EVHTTP_REQ_GET, "/metrics") != 0) {
        return cm_error_set(err, CM_E_IO, NULL, "no connection to the gateway");
    }
    CM_TRY(wait_until(s, is_counted, "/metrics", err));
    *n_out = s->counted;
    return CM_OK;
}

/* From start_ns until that many requests were counted as aborted. */
static cm_status wait_for_aborted(serve *s, double n, uint64_t start_ns, double *seconds_out, cm_error *err)
{
    double now;
    do {
        CM_TRY(count_aborted(s, &now, err));
    } while (now < n && cm_now_ns() - start_ns < SERVE_WAIT_MS * 1000000ull);
    *seconds_out = (double)(cm_now_ns() - start_ns) * 1e-9;
    return CM_OK;
}

/* Streams that are open and have nothing to say: their tokens have no text. Then all of their clients leave.
 */
static cm_status measure_quiet(serve *s, cm_error *err)
{
    double before;
    CM_TRY(begin_load(s, (uint32_t)s->config->streams, true, err));
    CM_TRY(wait_until(s, all_talk, "all streams to begin", err));
    s->rss_quiet = bench_process_rss(gateway_pid(s));
    if (stream_load_get(s->load).n_talking != s->config->streams) {
        return cm_error_set(err, CM_E_IO, NULL, "only %u of %u streams were open at once",
                            stream_load_get(s->load).n_talking, (unsigned)s->config->streams);
    }
    CM_TRY(count_aborted(s, &before, err));
    uint64_t start_ns = cm_now_ns();
    stream_load_end(s->load);
    s->load = NULL;
    return wait_for_aborted(s, before + (double)s->config->streams, start_ns, &s->all_drop_s, err);
}

/* From the client's close to a /metrics that has counted it. */
static cm_status measure_drop(serve *s, double *seconds_out, cm_error *err)
{
    double before;
    CM_TRY(begin_load(s, 1, true, err));
    CM_TRY(wait_until(s, one_talks, "a stream to begin", err));
    CM_TRY(count_aborted(s, &before, err));
    uint64_t start_ns = cm_now_ns();
    if (!stream_load_drop(s->load)) {
        return cm_error_set(err, CM_E_IO, NULL, "a stream that should run had ended");
    }
    stream_load_end(s->load);
    s->load = NULL;
    return wait_for_aborted(s, before + 1, start_ns, seconds_out, err);
}

/* ---- the report ---- */

typedef struct serve_samples {
    bench_samples cpu, bare, ratio, rate, drop;
    uint32_t event_bytes;
} serve_samples;

static cm_status take_rounds(serve *s, serve_samples *out, cm_error *err)
{
    bare_send *bare;
    if (s->config->paced) { /* else the first have ended before the last begin */
        CM_TRY(measure_quiet(s, err));
    }
    CM_TRY(bare_send_open(bench_cluster_loop(s->cluster), (uint32_t)s->config->streams, &bare, err));
    cm_status status = CM_OK;
    for (uint32_t round = 0; round < s->config->rounds && status == CM_OK; round++) {
        serve_round r = {0};
        cli_progress("round %u of %u", round + 1, (unsigned)s->config->rounds);
        status = measure_streams(s, &r, err);
        if (status == CM_OK) {
            double send_s = bare_send_measure(bare, r.event_bytes, SERVE_SENDS);
            bench_add(&out->cpu, r.cpu_s);
            bench_add(&out->bare, send_s);
            bench_add(&out->ratio, r.cpu_s / send_s);
            bench_add(&out->rate, 1 / r.wall_s);
            out->event_bytes = r.event_bytes;
        }
    }
    bare_send_close(bare);
    for (uint32_t i = 0; i < SERVE_DROPS && status == CM_OK; i++) {
        double seconds = 0;
        cli_progress("client %u of %u goes away", i + 1, (unsigned)SERVE_DROPS);
        status = measure_drop(s, &seconds, err);
        bench_add(&out->drop, seconds);
    }
    cli_progress_clear();
    return status;
}

static void print_row(json_t *report, const char *key, const char *what, const bench_samples *samples,
                      double scale, const char *unit)
{
    bench_summary v = bench_summarize(samples);
    printf("%-52s %8.3g %-9s (%.3g .. %.3g)\n", what, v.median * scale, unit, v.min * scale, v.max * scale);
    json_object_set_new(report, key, bench_summary_json(v));
}

static void print_quiet(const serve *s, json_t *report)
{
    double per_stream = (double)(s->rss_quiet - s->rss) / (double)s->config->streams;
    printf("%-52s %8.3g KB        (%.1f MB before the first)\n", "gateway's memory for a quiet stream",
           per_stream / 1e3, (double)s->rss / 1e6);
    printf("%-52s %8.3g ms\n", "all of their clients at once were counted after", s->all_drop_s * 1e3);
    json_object_set_new(report, "stream_bytes", json_real(per_stream));
    json_object_set_new(report, "all_drop_s", json_real(s->all_drop_s));
}

static void print_report(const serve *s, const serve_samples *samples, json_t *report)
{
    double loaded = (double)(s->rss_most - s->rss) / (double)s->config->streams;
    printf("%u streams talked at once, %llu tokens each, %u bytes an event, %s\n", s->n_at_once,
           (unsigned long long)s->config->stream_tokens, samples->event_bytes,
           s->config->paced ? "a token of each every 20 ms" : "as fast as it goes");
    print_row(report, "gateway_cpu_s", "gateway's processor time for a token", &samples->cpu, 1e6, "us");
    print_row(report, "bare_send_s", "a bare send() of as many bytes", &samples->bare, 1e6, "us");
    print_row(report, "of_bare_send", "ratio", &samples->ratio, 1, "");
    print_row(report, "tokens_s", "tokens through this gateway, all processes here", &samples->rate, 1e-3,
              "k/s");
    printf("%-52s %8.3g KB        (what clients have not read yet included)\n",
           "gateway's memory for a stream under this load, most", loaded / 1e3);
    print_row(report, "drop_s", "a client that went away was counted after", &samples->drop, 1e3, "ms");
    json_object_set_new(report, "streams", json_integer((json_int_t)s->config->streams));
    json_object_set_new(report, "paced", json_boolean(s->config->paced));
    json_object_set_new(report, "streams_at_once", json_integer(s->n_at_once));
    json_object_set_new(report, "loaded_stream_bytes", json_real(loaded));
    json_object_set_new(report, "event_bytes", json_integer(samples->event_bytes));
    if (s->config->paced) {
        print_quiet(s, report);
    }
}

static cm_status serve_measure(serve *s, const bench *b, cm_error *err)
{
    serve_samples samples = {0};
    CM_TRY(serve_start(s, err));
    s->rss = bench_process_rss(gateway_pid(s));
    s->tick = pc_timer_create(bench_cluster_loop(s->cluster), serve_tick, s);
    pc_timer_set(s->tick, SERVE_TICK_MS);
    json_t *report = bench_begin(b, s->config);
    cm_status status = take_rounds(s, &samples, err);
    if (status != CM_OK) {
        json_decref(report);
        return status;
    }
    print_report(s, &samples, report);
    bench_end(report);
    return CM_OK;
}

static int serve_run(const bench *b, const bench_config *config)
{
    serve s = {.config = config};
    cm_error err = {0};
    cm_status status = serve_measure(&s, b, &err);
    serve_stop(&s);
    if (status != CM_OK) {
        fprintf(stderr, "baleen bench: %s\n", err.text);
    }
    return status == CM_OK ? CLI_OK : CLI_FAILED;
}

const bench bench_serve_stream = {
    "serve.stream", "a gateway that streams scripted answers, against a bare send() loop", serve_run};
