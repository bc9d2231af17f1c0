/* host.step: what the router does on the host for one decode step, by parts, against the time of the step on
 * the device. Scheduler, block tables, routing tables of every layer and token frames are the router's own
 * code, between a gateway and workers that need no time: rows are short, because copying whole ones is the
 * device's work, and the wire carries nothing. Beside the table, not in its sum: row copies and sampling as
 * this CPU does them, and the hand-over to the compute thread. */
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "proto/control.pb-c.h"
#include "proto/engine.pb-c.h"
#include "proto/messages.h"
#include "proto/pack.h"
#include "router/engine/batch.h"
#include "router/engine/exchange.h"
#include "router/engine/sample.h"
#include "router/gateways.h"
#include "router/runner.h"
#include "tools/bench/bench.h"
#include "tools/bench/bench_wire.h"
#include "tools/baleen/cli.h"

enum {
    HOST_TOPK = 6,
    HOST_EXPERTS = 384,
    HOST_VOCAB = 129280,
    HOST_D = 2,              /* of rows in the table */
    HOST_CONTEXT_MIN = 1024, /* prompts: evenly between the two */
    HOST_CONTEXT_MAX = 8192,
    HOST_ROOM = 8192,    /* tokens of each answer */
    HOST_PREFILL = 8192, /* rows of a step before the measured ones */
    HOST_STEPS = 20,     /* of a round */
    HOST_COPY_LAYERS = 4,
    HOST_SAMPLED = 8, /* rows sampled in a round */
    HOST_SELF = 1,
    HOST_SEED = 20,
    HOST_WAIT_MS = 60000,
};

typedef enum host_part {
    PART_SCHED,
    PART_TABLES,
    PART_PLAN,
    PART_EXCHANGE,
    PART_WORDS,
    PART_FRAMES,
    N_PART
} host_part;
static const char *const HOST_PARTS[N_PART] = {
    "scheduler: rows and pages",  "ids, positions, block tables",
    "routing tables, all layers", "frames to and from workers, all layers",
    "scheduler: results, logs",   "token frames to gateways"};

typedef struct host_routes {
    int32_t *experts; /* [layers][batch][HOST_TOPK] */
    float *weights;
} host_routes;

typedef struct host {
    const bench_config *config;
    rt_sched *sched;
    rt_batch batch;
    rt_gateways *gateways;
    pc_loop *loop;
    net *n; /* the gateway's side */
    pc_netpump *pump;
    net_peer *peer;
    bool up;
    uint32_t n_sending;
    uint64_t n_told; /* tokens that the gateway was told */
    cm_arena arena;
    bench_wire wire;
    pc_epoch *epoch;
    rt_exchange *exchange, *whole; /* of short rows and of whole ones */
    uint8_t *codes, *scales;
    uint16_t *results;
    rt_step_result *tokens;
    rt_plan *plan;
    uint64_t now_ms;
    double part_s[N_PART];
} host;

/* ---- the floor: /bytes and flops of a step at V4-Pro's sizes on one H200, EP over `ranks` ---- */

static double host_floor_s(double batch, double ranks)
{
    const double bw = 4.3e12, fp8 = 1.5e15, bf16 = 790e12, layers = 61, experts = 384, topk = 6;
    double hit = experts / ranks * (1 - pow(1 - topk / experts, batch * ranks));
    double moe = fmax(hit * 35.09e6 / bw, batch * topk * 2 * 66.06e6 / fp8);
    double dense = fmax(24.96e9 / layers / bw, batch * 2 * 23.4e9 / layers / fp8);
    double attention = batch * (10.6e9 / bf16 + 1.0e9 / fp8); /* 8K of context */
    double streams = batch * 2 * layers * 3 * 4 * 7168 * 2 / bw;
    return layers * (moe + dense) + attention + streams + 1.85e9 / bw;
}

/* ---- a gateway ---- */

static void host_nothing(void *arg)
{
    (void)arg;
}

static void host_told(host *h, const net_event *event)
{
    Baleen__Engine__V1__StepTokens *step;
    cm_arena_reset(&h->arena);
    cm_status status = pr_unpack(&baleen__engine__v1__step_tokens__descriptor, event->payload,
                                 event->payload_bytes, &h->arena, (ProtobufCMessage **)&step);
    CM_ASSERT(status == CM_OK);
    for (size_t i = 0; i < step->n_seq; i++) {
        h->n_told += step->seq[i]->n_id;
        CM_ASSERT(step->seq[i]->end == BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    }
}

static void host_on_event(void *ctx, const net_event *event)
{
    host *h = ctx;
    h->up |= event->kind == NET_EV_UP;
    if (event->kind == NET_EV_SENT) {
        h->n_sending--;
        cm_bytes_fini(event->cookie);
        cm_free(event->cookie);
    } else if (event->kind == NET_EV_MESSAGE) {
        host_told(h, event);
        net_release(h->n, event);
    }
    pc_loop_stop(h->loop);
}

static void host_open_sequence(host *h, uint32_t i)
{
    uint32_t n =
        HOST_CONTEXT_MIN + (uint32_t)((uint64_t)i * (HOST_CONTEXT_MAX - HOST_CONTEXT_MIN) / h->config->batch);
    uint32_t *prompt = cm_alloc(sizeof(uint32_t) * n);
    for (uint32_t k = 0; k < n; k++) {
        prompt[k] = cm_rng_at(HOST_SEED, i, k).word[0] % HOST_VOCAB;
    }
    Baleen__Engine__V1__SamplerParams sampler = BALEEN__ENGINE__V1__SAMPLER_PARAMS__INIT;
    Baleen__Engine__V1__SeqOpen open = BALEEN__ENGINE__V1__SEQ_OPEN__INIT;
    sampler.tokens_max = HOST_ROOM;
    open.stream = i + 1;
    open.prompt = prompt;
    open.n_prompt = n;
    open.sampler = &sampler;
    cm_bytes *packed = cm_alloc(sizeof(*packed));
    pr_pack(&open.base, packed);
    net_message message = {.type = PR_MSG_SEQ_OPEN,
                           .iov = {{packed->data, packed->len}},
                           .n_iov = 1,
                           .deadline_ms = HOST_WAIT_MS,
                           .cookie = packed};
    while (net_send(h->peer, &message) == CM_AGAIN) {
        pc_netpump_kick(h->pump);
        pc_loop_run(h->loop);
    }
    h->n_sending++;
    cm_free(prompt);
}

static void host_flush(void *arg)
{
    host *h = arg;
    if (h->gateways != NULL) {
        rt_gateways_flush(h->gateways, 0);
    }
}

static cm_status host_open_gateway(host *h, cm_error *err)
{
    char bound[NET_ADDRESS_BYTES], name[64];
    net *server;
    net_options options;
    net_options_defaults(&options);
    options.backend = "local";
    options.message_bytes_max = 1 << 20;
    snprintf(name, sizeof(name), "host-%016llx", (unsigned long long)cm_random_u64());
    CM_TRY(pc_loop_create(&h->loop));
    CM_TRY(net_open(&options, &server, err));
    CM_TRY(net_listen(server, name, bound, err));
    rt_gateways_options gateways = {.gateway_max = 64,
                                    .runnable = (uint32_t)h->config->batch,
                                    .keep = {.live_max = (uint32_t)h->config->batch * 2,
                                             .ended_max = 16,
                                             .bytes_max = 1 << 20,
                                             .grace_ms = 1000}};
    h->gateways = rt_gateways_create(h->loop, server, h->sched, &gateways, host_nothing, h);
    rt_gateways_identify(h->gateways,
                         &(net_identity){BENCH_WIRE_CLUSTER, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER, 1});
    pc_loop_before_sleep(h->loop, host_flush, h);
    CM_TRY(net_open(&options, &h->n, err));
    net_set_identity(h->n, &(net_identity){BENCH_WIRE_CLUSTER, BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY, 2});
    h->pump = pc_netpump_create(h->loop, h->n, host_on_event, h);
    cm_arena_init(&h->arena, "token frames", 1 << 16, 1 << 26);
    CM_TRY(net_connect(h->n, bound, &h->peer, err));
    pc_netpump_kick(h->pump);
    while (!h->up) {
        pc_loop_run(h->loop);
    }
    return CM_OK;
}

/* ---- workers ---- */

static rt_plan_limits host_limits(const host *h, uint32_t d)
{
    return (rt_plan_limits){
        .row_max = (uint32_t)h->config->batch, .topk = HOST_TOPK, .d = d, .frame_bytes_max = 64 << 20};
}

static cm_status host_open_exchange(host *h, uint32_t d, rt_exchange **exchange_out, cm_error *err)
{
    net_options options;
    rt_exchange_options x = {.limits = host_limits(h, d),
                             .n_layer = (uint32_t)h->config->layers,
                             .n_expert = HOST_EXPERTS,
                             .answer_ms = HOST_WAIT_MS,
                             .wait_ms = HOST_WAIT_MS};
    net_options_defaults(&options);
    options.peers_max = (uint32_t)h->config->ranks;
    options.message_bytes_max = x.limits.frame_bytes_max;
    options.silence_ms = 600000; /* these workers say nothing unasked */
    bench_wire_use(&h->wire);
    CM_TRY(net_open_ops(&bench_wire_ops, &options, &x.rows, err));
    CM_TRY(rt_exchange_create(&x, exchange_out, err));
    rt_exchange_offer_epoch(*exchange_out, h->epoch, HOST_SELF);
    while (!rt_exchange_ready(*exchange_out)) {
        rt_exchange_idle(*exchange_out, 1);
    }
    return CM_OK;
}

/* Distinct experts for each row; popular: the k-th expert (of an order of its own for each layer) is asked
 * for in proportion to 1 / (k + 10). */
static host_routes host_draw_routes(const bench_config *config, bool popular)
{
    static double upto[HOST_EXPERTS];
    uint64_t n = config->layers * config->batch;
    host_routes r = {.experts = cm_alloc(sizeof(int32_t) * n * HOST_TOPK),
                     .weights = cm_alloc(sizeof(float) * n * HOST_TOPK)};
    for (uint32_t e = 0; e < HOST_EXPERTS; e++) {
        upto[e] = (e > 0 ? upto[e - 1] : 0) + (popular ? 1.0 / (e + 10) : 1.0);
    }
    for (uint64_t row = 0, draw = 0; row < n; row++) {
        int32_t *experts = r.experts + row * HOST_TOPK;
        for (uint32_t k = 0; k < HOST_TOPK;) {
            double x = cm_rng_uniform(HOST_SEED + 1, draw++, 0) * upto[HOST_EXPERTS - 1];
            uint32_t e = 0;
            while (e + 1 < HOST_EXPERTS && upto[e] <= x) {
                e++;
            }
            experts[k] = (int32_t)((e * 131 + row / config->batch * 17) % HOST_EXPERTS);
            bool again = false;
            for (uint32_t i = 0; i < k; i++) {
                again |= experts[i] == experts[k];
            }
            r.weights[row * HOST_TOPK + k] = 0.1f + (float)(draw % 97) * 0.01f;
            k += !again;
        }
    }
    return r;
}

static void host_route(host *h, rt_exchange *exchange, const host_routes *routes, uint32_t layer)
{
    size_t at = (size_t)layer * h->config->batch * HOST_TOPK;
    rt_exchange_begin(exchange, 0,
                      &(rt_xcore_layer){.step = 1,
                                        .layer = layer,
                                        .n_row = (uint32_t)h->config->batch,
                                        .experts = routes->experts + at,
                                        .weights = routes->weights + at,
                                        .codes = h->codes,
                                        .scales = h->scales,
                                        .results = h->results});
    cm_status status = rt_exchange_finish(exchange, 0);
    CM_ASSERT(status == CM_OK);
}

/* The same tables once more by themselves: the exchange makes them inside. */
static double host_plan_s(host *h, const host_routes *routes)
{
    rt_plan_limits limits = host_limits(h, HOST_D);
    double start = bench_now(h->config);
    for (uint32_t l = 0; l < h->config->layers; l++) {
        size_t at = (size_t)l * h->config->batch * HOST_TOPK;
        uint32_t expert;
        cm_status status =
            rt_plan_build(h->plan, &limits, h->epoch->placement, l, routes->experts + at,
                          routes->weights + at, (uint32_t)h->config->batch, NULL, NULL, &expert);
        CM_ASSERT(status == CM_OK);
    }
    return bench_now(h->config) - start;
}

/* Every slot of a layer was answered. */
static bool host_check_routes(host *h, const host_routes *routes)
{
    size_t n = h->config->batch * HOST_TOPK * HOST_D;
    bool good = true;
    h->wire.values = true;
    memset(h->results, 0xee, 2 * n);
    host_route(h, h->exchange, routes, 0);
    for (size_t i = 0; i < n; i++) {
        good &= h->results[i] != 0xeeee;
    }
    h->wire.values = false;
    return good;
}

/* ---- steps ---- */

static void host_lap(host *h, host_part part, double *at)
{
    double now = bench_now(h->config);
    h->part_s[part] += now - *at;
    *at = now;
}

/* As router_before_sleep and rt_engine_step have it. */
static uint32_t host_step(host *h, const host_routes *routes)
{
    rt_step step;
    double at = bench_now(h->config);
    bool any = rt_sched_next(h->sched, h->now_ms, &step);
    CM_ASSERT(any);
    host_lap(h, PART_SCHED, &at);
    rt_batch_fill(&h->batch, &step, (kn_ptr){4096}, 4 << 20);
    rt_batch_cut(&h->batch, 1, NULL, NULL);
    host_lap(h, PART_TABLES, &at);
    for (uint32_t l = 0; routes != NULL && l < h->config->layers; l++) {
        host_route(h, h->exchange, routes, l);
    }
    host_lap(h, PART_EXCHANGE, &at);
    for (uint32_t i = 0; i < step.n_sample; i++) {
        h->tokens[i].n_token = 1;
        h->tokens[i].tokens[0] = cm_rng_at(HOST_SEED + 2, step.number, i).word[0] % HOST_VOCAB;
    }
    at = bench_now(h->config);
    rt_sched_complete(h->sched, h->now_ms, 1000000, h->tokens, rt_gateways_word, h->gateways);
    host_lap(h, PART_WORDS, &at);
    rt_gateways_flush(h->gateways, step.number);
    host_lap(h, PART_FRAMES, &at);
    uint32_t n_token = step.n_sample;
    for (uint64_t goal = h->n_told + n_token; h->n_told < goal;) {
        pc_loop_run(h->loop);
    }
    return n_token;
}

static cm_status host_prefill(host *h)
{
    for (uint32_t i = 0; i < h->config->batch; i++) {
        host_open_sequence(h, i);
    }
    rt_sched_ledger ledger;
    do { /* all have arrived */
        pc_netpump_kick(h->pump);
        pc_loop_run(h->loop);
        rt_sched_ledger_get(h->sched, &ledger);
    } while (ledger.n_seq < h->config->batch || h->n_sending > 0);
    while (host_step(h, NULL) < h->config->batch) {
    }
    return CM_OK;
}

/* ---- beside the table ---- */

typedef struct host_beside {
    float *logits; /* [vocab] */
    rt_sample_scratch *scratch;
} host_beside;

/* A likely few and a long tail. */
static void host_draw_logits(float *logits)
{
    for (uint32_t i = 0; i < HOST_VOCAB; i++) {
        uint32_t rank = i * 7919u % HOST_VOCAB;
        logits[i] = (float)(12 - 1.2 * log(1 + rank) + cm_rng_uniform(HOST_SEED + 3, i, 0));
    }
}

static double host_sample_s(const host *h, const host_beside *b, const rt_sampler *sampler)
{
    double start = bench_now(h->config);
    for (uint32_t i = 0; i < HOST_SAMPLED; i++) {
        rt_step_seg seg = {.pos0 = 1000 + i, .n_row = 1, .sampler = sampler};
        (void)rt_sample(b->scratch, b->logits, &seg, 0);
    }
    return (bench_now(h->config) - start) / HOST_SAMPLED * (double)h->config->batch;
}

static double host_copy_s(host *h, const host_routes *routes)
{
    double start = bench_now(h->config);
    for (uint32_t l = 0; l < HOST_COPY_LAYERS; l++) {
        host_route(h, h->whole, routes, l % (uint32_t)h->config->layers);
    }
    return (bench_now(h->config) - start) / HOST_COPY_LAYERS * (double)h->config->layers;
}

static cm_status host_no_step(void *ctx, const rt_step *step, rt_step_result *results_out)
{
    (void)ctx;
    (void)step;
    (void)results_out;
    return CM_OK;
}

static void host_handed(void *ctx, cm_status status, uint64_t took_ns, const rt_step_result *results)
{
    host *h = ctx;
    (void)status;
    (void)took_ns;
    (void)results;
    pc_loop_stop(h->loop);
}

/* Wall time: two threads. */
static double host_hand_over_s(host *h, rt_runner *runner)
{
    rt_step step = {.number = 1};
    uint64_t start_ns = cm_now_ns();
    for (uint32_t i = 0; i < HOST_STEPS; i++) {
        rt_runner_start(runner, &step);
        pc_loop_run(h->loop);
    }
    return 1e-9 * (double)(cm_now_ns() - start_ns) / HOST_STEPS;
}

/* ---- the run ---- */

typedef struct host_samples {
    bench_samples part[N_PART], popular, sum, ratio, greedy, drawn, copy, hand_over;
} host_samples;

static void host_round(host *h, const host_routes routes[2], const host_beside *beside, rt_runner *runner,
                       host_samples *out)
{
    static const rt_sampler greedy = {.top_p = 1}, drawn = {.temperature = 0.8f, .top_p = 0.95f, .seed = 5};
    double sum = 0, floor = host_floor_s((double)h->config->batch, (double)h->config->ranks);
    memset(h->part_s, 0, sizeof(h->part_s));
    for (uint32_t i = 0; i < HOST_STEPS; i++) {
        host_step(h, &routes[0]);
        double plan = host_plan_s(h, &routes[0]);
        h->part_s[PART_PLAN] += plan;
        h->part_s[PART_EXCHANGE] -= plan;
    }
    for (uint32_t p = 0; p < N_PART; p++) {
        bench_add(&out->part[p], h->part_s[p] / HOST_STEPS);
        sum += h->part_s[p] / HOST_STEPS;
    }
    bench_add(&out->sum, sum);
    bench_add(&out->ratio, sum / floor);
    h->part_s[PART_EXCHANGE] = 0;
    for (uint32_t i = 0; i < HOST_STEPS / 4; i++) {
        host_step(h, &routes[1]);
    }
    bench_add(&out->popular, h->part_s[PART_EXCHANGE] / (HOST_STEPS / 4));
    bench_add(&out->greedy, host_sample_s(h, beside, &greedy));
    bench_add(&out->drawn, host_sample_s(h, beside, &drawn));
    bench_add(&out->copy, host_copy_s(h, &routes[0]));
    bench_add(&out->hand_over, host_hand_over_s(h, runner));
}

static void host_row(json_t *report, const char *what, const bench_samples *samples, double floor_s)
{
    bench_summary s = bench_summarize(samples);
    printf("  %-46s %9.1f us (%8.1f .. %8.1f)  %7.3f %%\n", what, s.median * 1e6, s.min * 1e6, s.max * 1e6,
           100 * s.median / floor_s);
    json_array_append_new(json_object_get(report, "results"),
                          json_pack("{s:s, s:o, s:f}", "part", what, "seconds", bench_summary_json(s),
                                    "of_floor", s.median / floor_s));
}

static void host_tell(const bench *b, const host *h, const host_samples *samples)
{
    double floor = host_floor_s((double)h->config->batch, (double)h->config->ranks);
    json_t *report = bench_begin(b, h->config);
    printf("%u sequences of %d to %d tokens, %u workers, %u layers; the step on the device %.1f ms (at 128 "
           "sequences %.1f)\n\n",
           (unsigned)h->config->batch, HOST_CONTEXT_MIN, HOST_CONTEXT_MAX, (unsigned)h->config->ranks,
           (unsigned)h->config->layers, floor * 1e3, host_floor_s(128, (double)h->config->ranks) * 1e3);
    for (uint32_t p = 0; p < N_PART; p++) {
        host_row(report, HOST_PARTS[p], &samples->part[p], floor);
    }
    host_row(report, "sum", &samples->sum, floor);
    printf("\nnot in the sum:\n");
    host_row(report, "routing tables and frames, popular experts", &samples->popular, floor);
    host_row(report, "hand-over to the compute thread (wall)", &samples->hand_over, floor);
    host_row(report, "rows into frames and back, on this CPU", &samples->copy, floor);
    host_row(report, "sampling, greedy, on this CPU", &samples->greedy, floor);
    host_row(report, "sampling, temperature and top_p, on this CPU", &samples->drawn, floor);
    bench_summary ratio = bench_summarize(&samples->ratio);
    json_object_set_new(report, "floor_seconds", json_real(floor));
    json_object_set_new(report, "ratio", bench_summary_json(ratio));
    printf("\nratio %.4f (%.4f .. %.4f)\n", ratio.median, ratio.min, ratio.max);
    bench_end(report);
}

static cm_status host_create(host *h, cm_error *err)
{
    uint32_t batch = (uint32_t)h->config->batch;
    uint32_t n_page = batch * ((HOST_CONTEXT_MAX + HOST_ROOM) / KN_PAGE_TOKENS);
    uint64_t d = h->config->d > HOST_D ? h->config->d : HOST_D;
    rt_sched_limits limits = {.slot_max = batch,
                              .queue_max = batch,
                              .row_max = HOST_PREFILL > batch ? HOST_PREFILL : batch,
                              .chunk_max = HOST_PREFILL,
                              .page_max = n_page,
                              .page_tokens = KN_PAGE_TOKENS,
                              .context = HOST_CONTEXT_MAX + HOST_ROOM,
                              .vocab = HOST_VOCAB};
    h->sched = rt_sched_create(&limits);
    rt_batch_init(&h->batch, batch, limits.row_max, n_page);
    h->epoch = bench_wire_epoch((uint32_t)h->config->layers, HOST_EXPERTS, (uint32_t)h->config->ranks);
    h->codes = cm_alloc(batch * d);
    h->scales = cm_alloc(batch * kn_blocks((uint32_t)d, KN_ACT_BLOCK));
    h->results = cm_alloc(sizeof(uint16_t) * batch * HOST_TOPK * d);
    h->tokens = cm_alloc(sizeof(rt_step_result) * batch);
    rt_plan_limits plan = host_limits(h, HOST_D);
    h->plan = rt_plan_create(&plan);
    for (uint64_t i = 0; i < batch * d; i++) {
        h->codes[i] = (uint8_t)(i * 31);
    }
    CM_TRY(host_open_gateway(h, err));
    CM_TRY(host_open_exchange(h, HOST_D, &h->exchange, err));
    return host_open_exchange(h, (uint32_t)d, &h->whole, err);
}

static void host_destroy(host *h)
{
    rt_exchange_destroy(h->exchange);
    rt_exchange_destroy(h->whole);
    pc_netpump_destroy(h->pump);
    net_close(h->n);
    rt_gateways_destroy(h->gateways);
    h->gateways = NULL;
    pc_loop_destroy(h->loop);
    rt_sched_destroy(h->sched);
    rt_batch_fini(&h->batch);
    pc_epoch_release(h->epoch);
    cm_arena_fini(&h->arena);
    cm_free(h->codes);
    cm_free(h->scales);
    cm_free(h->results);
    cm_free(h->tokens);
    rt_plan_destroy(h->plan);
}

static int run(const bench *b, const bench_config *config)
{
    static host_samples samples;
    host h = {.config = config, .now_ms = cm_now_ms()};
    cm_error err = {0};
    rt_exchange *idle = NULL;
    if (host_create(&h, &err) != CM_OK || host_open_exchange(&h, HOST_D, &idle, &err) != CM_OK) {
        fprintf(stderr, "%s: %s\n", b->name, err.text);
        return CLI_FAILED;
    }
    host_routes routes[2] = {host_draw_routes(config, false), host_draw_routes(config, true)};
    host_beside beside = {.logits = cm_alloc(sizeof(float) * HOST_VOCAB),
                          .scratch = rt_sample_scratch_create(HOST_VOCAB)};
    host_draw_logits(beside.logits);
    rt_runner *runner = rt_runner_create(&(rt_runner_options){.loop = h.loop,
                                                              .exchange = idle,
                                                              .sample_max = 1,
                                                              .step = host_no_step,
                                                              .done = host_handed,
                                                              .ctx = &h});
    host_prefill(&h);
    bool good = host_check_routes(&h, &routes[0]);
    for (uint64_t i = 0; i < config->rounds && good; i++) {
        host_round(&h, routes, &beside, runner, &samples);
    }
    if (good) {
        host_tell(b, &h, &samples);
    }
    rt_runner_destroy(runner);
    rt_exchange_destroy(idle);
    for (uint32_t i = 0; i < 2; i++) {
        cm_free(routes[i].experts);
        cm_free(routes[i].weights);
    }
    cm_free(beside.logits);
    rt_sample_scratch_destroy(beside.scratch);
    host_destroy(&h);
    if (!good) {
        fprintf(stderr, "%s: slots were left without a row\n", b->name);
    }
    return good ? CLI_OK : CLI_FAILED;
}

const bench bench_host_step = {
    .name = "host.step",
    .doc = "the router's work on the host for a decode step, against the step's time on the device",
    .run = run,
};
