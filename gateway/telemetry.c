#include "gateway/telemetry.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

enum { BOUNDS_MAX = 24 };

static const double FIRST_TOKEN_S[] = {0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
                                       1,     2.5,   5,    7.5,  10,   20,   40,   80,  160,  640, 2560};
static const double TOKEN_S[] = {0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
                                 0.75, 1,     2.5,  5,     7.5, 10,   20,  40,  80};
static const double REQUEST_S[] = {0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                   30,  40,  50,  60, 120, 240, 480, 960, 1920, 7680};
static const double TOKENS[] = {1,    2,    5,     10,    20,    50,     100,    200,    500,    1000,
                                2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000};

#define BOUNDS(list_) (list_), sizeof(list_) / sizeof((list_)[0])
static const struct {
    const char *vllm, *sglang; /* NULL: it has no such series */
    const char *help;
    const double *bounds;
    size_t n_bounds;
} SERIES[GW_SERIES_COUNT] = {
    [GW_SERIES_FIRST_TOKEN] = {"time_to_first_token_seconds", "time_to_first_token_seconds",
                               "receipt of a request to its first token", BOUNDS(FIRST_TOKEN_S)},
    [GW_SERIES_INTER_TOKEN] = {"inter_token_latency_seconds", "inter_token_latency_seconds",
                               "between two tokens of an answer", BOUNDS(TOKEN_S)},
    [GW_SERIES_REQUEST] = {"e2e_request_latency_seconds", "e2e_request_latency_seconds",
                           "receipt of a request to the end of its answer", BOUNDS(REQUEST_S)},
    [GW_SERIES_QUEUE] = {"request_queue_time_seconds", "queue_time_seconds",
                         "receipt of a request until it was given to a router", BOUNDS(REQUEST_S)},
    [GW_SERIES_PROMPT_TOKENS] = {"request_prompt_tokens", NULL, "prompt tokens of a request", BOUNDS(TOKENS)},
    [GW_SERIES_OUTPUT_TOKENS] = {"request_generation_tokens", NULL, "generated tokens of a request",
                                 BOUNDS(TOKENS)},
};

typedef struct histogram {
    uint64_t bucket[BOUNDS_MAX + 1];
    uint64_t n;
    double sum;
} histogram;

struct gw_telemetry {
    histogram series[GW_SERIES_COUNT];
    uint64_t ended[GW_ENDING_COUNT];
    uint64_t used[GW_TELEMETRY_TENANTS_MAX + 1][GW_USED_COUNT]; /* by the tenant's index; the last: others */
};

gw_telemetry *gw_telemetry_create(void)
{
    for (uint32_t i = 0; i < GW_SERIES_COUNT; i++) {
        CM_ASSERT(SERIES[i].n_bounds <= BOUNDS_MAX);
    }
    return cm_alloc(sizeof(gw_telemetry));
}

void gw_telemetry_destroy(gw_telemetry *telemetry)
{
    cm_free(telemetry);
}

void gw_telemetry_observe(gw_telemetry *telemetry, gw_series series, double value, uint32_t times)
{
    histogram *h = &telemetry->series[series];
    size_t i = 0;
    while (i < SERIES[series].n_bounds && value > SERIES[series].bounds[i]) {
        i++;
    }
    h->bucket[i] += times;
    h->n += times;
    h->sum += value * times;
}

void gw_telemetry_ended(gw_telemetry *telemetry, gw_ending ending)
{
    telemetry->ended[ending]++;
}

static uint32_t slot_of(const gw_tenant *tenant)
{
    gw_tenant_state state;
    gw_tenant_get(tenant, &state);
    return state.index < GW_TELEMETRY_TENANTS_MAX ? state.index : GW_TELEMETRY_TENANTS_MAX;
}

void gw_telemetry_used(gw_telemetry *telemetry, const gw_tenant *tenant, gw_usage_of what, uint64_t n)
{
    telemetry->used[slot_of(tenant)][what] += n;
}

/* ---- text ---- */

/* Where a line goes: labels are what all of one family have. */
typedef struct page {
    cm_bytes *out;
    const char *family;
    cm_bytes labels;
} page;

static void put_label(cm_bytes *out, const char *name, const char *value)
{
    cm_bytes_printf(out, "%s%s=\"", out->len > 0 ? "," : "", name);
    for (; *value != 0; value++) {
        if (*value == '\\' || *value == '"') {
            cm_bytes_append(out, "\\", 1);
        }
        cm_bytes_append_text(out, *value == '\n' ? "\\n" : (char[]){*value, 0});
    }
    cm_bytes_append_text(out, "\"");
}

static void put_head(page *p, const char *name, const char *type, const char *help)
{
    cm_bytes_printf(p->out, "# HELP %s:%s %s\n# TYPE %s:%s %s\n", p->family, name, help, p->family, name,
                    type);
}

static void put_number(page *p, const char *name, const char *type, const char *help, double value)
{
    put_head(p, name, type, help);
    cm_bytes_printf(p->out, "%s:%s{%s} %.15g\n", p->family, name, cm_bytes_text(&p->labels), value);
}

static void put_histogram(page *p, const char *name, gw_series series, const histogram *h)
{
    const char *labels = cm_bytes_text(&p->labels);
    uint64_t sum = 0;
    put_head(p, name, "histogram", SERIES[series].help);
    for (size_t i = 0; i < SERIES[series].n_bounds; i++) {
        sum += h->bucket[i];
        cm_bytes_printf(p->out, "%s:%s_bucket{%s,le=\"%.15g\"} %llu\n", p->family, name, labels,
                        SERIES[series].bounds[i], (unsigned long long)sum);
    }
    cm_bytes_printf(p->out, "%s:%s_bucket{%s,le=\"+Inf\"} %llu\n%s:%s_sum{%s} %.15g\n%s:%s_count{%s} %llu\n",
                    p->family, name, labels, (unsigned long long)h->n, p->family, name, labels, h->sum,
                    p->family, name, labels, (unsigned long long)h->n);
}

static void put_endings(page *p, const gw_telemetry *t)
{
    static const char *const words[] = {"stop", "length", "abort", "error"};
    put_head(p, "request_success_total", "counter", "requests that ended, by what ended them");
    for (uint32_t i = 0; i < GW_ENDING_COUNT; i++) {
        cm_bytes_printf(p->out, "vllm:request_success_total{%s,finished_reason=\"%s\"} %llu\n",
                        cm_bytes_text(&p->labels), words[i], (unsigned long long)t->ended[i]);
    }
}

static uint64_t used_by_all(const gw_telemetry *t, gw_usage_of what)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i <= GW_TELEMETRY_TENANTS_MAX; i++) {
        sum += t->used[i][what];
    }
    return sum;
}

static void put_vllm(page *p, const gw_telemetry *t, const gw_telemetry_now *now)
{
    put_number(p, "num_requests_running", "gauge", "answers that are being generated", now->running);
    put_number(p, "num_requests_waiting", "gauge", "answers that wait for their turn", now->waiting);
    put_number(p, "kv_cache_usage_perc", "gauge", "KV pages in use, 1 is all", now->kv_used);
    put_number(p, "prompt_tokens_total", "counter", "prompt tokens",
               (double)used_by_all(t, GW_USED_PROMPT_TOKENS));
    put_number(p, "generation_tokens_total", "counter", "generated tokens",
               (double)used_by_all(t, GW_USED_OUTPUT_TOKENS));
    put_number(p, "num_preemptions_total", "counter", "sequences that gave their pages back",
               (double)now->preemptions);
    put_number(p, "prefix_cache_queries_total", "counter", "prompt tokens looked for among kept ones",
               (double)now->prefix_queries);
    put_number(p, "prefix_cache_hits_total", "counter", "prompt tokens that were found and not computed",
               (double)now->prefix_hits);
    put_number(p, "spec_decode_num_drafts_total", "counter", "rows with guesses behind them",
               (double)now->drafts);
    put_number(p, "spec_decode_num_draft_tokens_total", "counter", "guesses that were checked",
               (double)now->draft_tokens);
    put_number(p, "spec_decode_num_accepted_tokens_total", "counter", "guesses that were right",
               (double)now->accepted_tokens);
    put_endings(p, t);
}

static void put_sglang(page *p, const gw_telemetry *t, const gw_telemetry_now *now)
{
    put_number(p, "num_running_reqs", "gauge", "answers that are being generated", now->running);
    put_number(p, "num_queue_reqs", "gauge", "answers that wait for their turn", now->waiting);
    put_number(p, "token_usage", "gauge", "KV pages in use, 1 is all", now->kv_used);
    put_number(p, "prompt_tokens_total", "counter", "prompt tokens",
               (double)used_by_all(t, GW_USED_PROMPT_TOKENS));
    put_number(p, "generation_tokens_total", "counter", "generated tokens",
               (double)used_by_all(t, GW_USED_OUTPUT_TOKENS));
    put_number(p, "num_requests_total", "counter", "requests", (double)used_by_all(t, GW_USED_REQUESTS));
    put_number(p, "num_aborted_requests_total", "counter", "requests that were cancelled",
               (double)t->ended[GW_ENDING_ABORT]);
}

static void put_family(const gw_telemetry *t, const gw_telemetry_now *now, bool vllm, cm_bytes *out)
{
    page p = {.out = out, .family = vllm ? "vllm" : "sglang"};
    cm_bytes_init(&p.labels, 0);
    put_label(&p.labels, "model_name", now->model);
    put_label(&p.labels, vllm ? "engine" : "engine_type", vllm ? "0" : "unified");
    if (vllm) {
        put_vllm(&p, t, now);
    } else {
        put_sglang(&p, t, now);
    }
    for (uint32_t i = 0; i < GW_SERIES_COUNT; i++) {
        const char *name = vllm ? SERIES[i].vllm : SERIES[i].sglang;
        if (name != NULL) {
            put_histogram(&p, name, (gw_series)i, &t->series[i]);
        }
    }
    cm_bytes_fini(&p.labels);
}

/* ---- tenants ---- */

static void tenant_line(const char *metric, const char *name, uint64_t value, cm_bytes *out)
{
    cm_bytes_printf(out, "%s{tenant=\"%s\"} %llu\n", metric, name, (unsigned long long)value);
}

static void put_used(const gw_telemetry *t, const gw_turns *turns, const char *metric, gw_usage_of what,
                     cm_bytes *out)
{
    const gw_tenant *tenant = NULL;
    cm_bytes_printf(out, "# HELP %s by tenant\n# TYPE %s counter\n", metric, metric);
    while ((tenant = gw_turns_next_tenant(turns, tenant)) != NULL &&
           slot_of(tenant) < GW_TELEMETRY_TENANTS_MAX) {
        tenant_line(metric, gw_tenant_name(tenant), t->used[slot_of(tenant)][what], out);
    }
    if (tenant != NULL) {
        tenant_line(metric, "(others)", t->used[GW_TELEMETRY_TENANTS_MAX][what], out);
    }
}

static void put_held(const gw_turns *turns, const char *metric, bool running, cm_bytes *out)
{
    const gw_tenant *tenant = NULL;
    uint64_t others = 0;
    cm_bytes_printf(out, "# HELP %s answers, by tenant\n# TYPE %s gauge\n", metric, metric);
    while ((tenant = gw_turns_next_tenant(turns, tenant)) != NULL) {
        gw_tenant_state state;
        gw_tenant_get(tenant, &state);
        uint32_t n = running ? state.n_running : state.n_waiting;
        if (state.index < GW_TELEMETRY_TENANTS_MAX) {
            tenant_line(metric, state.name, n, out);
        } else {
            others += n;
        }
    }
    if (turns->n_tenant > GW_TELEMETRY_TENANTS_MAX) {
        tenant_line(metric, "(others)", others, out);
    }
}

void gw_telemetry_render(const gw_telemetry *telemetry, const gw_turns *turns, const gw_telemetry_now *now,
                         cm_bytes *out)
{
    static const char *const names[] = {"baleen_tenant_requests_total", "baleen_tenant_refused_total",
                                        "baleen_tenant_prompt_tokens_total",
                                        "baleen_tenant_generated_tokens_total"};
    put_family(telemetry, now, true, out);
    put_family(telemetry, now, false, out);
    for (uint32_t i = 0; i < GW_USED_COUNT; i++) {
        put_used(telemetry, turns, names[i], (gw_usage_of)i, out);
    }
    put_held(turns, "baleen_tenant_running", true, out);
    put_held(turns, "baleen_tenant_waiting", false, out);
}
