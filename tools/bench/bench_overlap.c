/* step.overlap: how much of the time that rows spend on the wire is hidden behind computing, with one
 * micro-batch a step and with two. A router's engine computes one step of prompt rows over and over; its
 * workers need no time, but a wire of bench_wire.h lies between, made so slow that a whole step's rows spend
 * a part of the time on it that computing alone takes. Every round measures computing alone, the wire alone,
 * and both together, for both; all by the wall clock: overlap = (t_compute + t_wire - t_together) /
 * min(t_compute, t_wire) The logits must be the same bits in all of them. */
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "router/engine/engine.h"
#include "tools/bench/bench.h"
#include "tools/bench/bench_wire.h"
#include "tools/baleen/cli.h"

enum {
    OVERLAP_SEQS = 4,
    OVERLAP_ROWS = 256, /* of a step */
    OVERLAP_SEED = 21,
    OVERLAP_LATENCY_NS = 20000,
    OVERLAP_WAIT_MS = 60000,
    OVERLAP_SHARES = 3,
};
static const double OVERLAP_SHARE[OVERLAP_SHARES] = {0.25, 0.5, 1}; /* wire over computing */

typedef struct overlap {
    const bench_config *config;
    md_checkpoint *checkpoint;
    const md_geometry *geometry;
    pc_epoch *epoch;
    bench_wire wire;
    rt_engine *engines[2]; /* of one and of two micro-batches */
    rt_step step;
    rt_step_seg segs[OVERLAP_SEQS];
    uint32_t *tokens, *pages;
    rt_sampler sampler;
    float *logits; /* [OVERLAP_SEQS][vocab] of the first step ever */
    bool differs;
    /* for the wire alone */
    int32_t *experts;
    float *weights;
    uint8_t *codes, *scales;
    uint16_t *results;
} overlap;

/* Of one share. */
typedef struct overlap_samples {
    bench_samples wire, compute[2], together[2], hidden[2], gain;
} overlap_samples;

static cm_status overlap_open_engine(overlap *o, uint32_t n_micro, rt_engine **engine_out, cm_error *err)
{
    rt_engine_options options = {
        .checkpoint = o->checkpoint,
        .device = {.backend = "cpu", .isa = "auto", .n_threads = (uint32_t)o->config->threads},
        .rows_ops = &bench_wire_ops,
        .row_max = OVERLAP_ROWS,
        .slot_max = OVERLAP_SEQS,
        .kv_bytes = 1 << 28,
        .answer_ms = OVERLAP_WAIT_MS,
        .wait_ms = OVERLAP_WAIT_MS,
        .micro_batches = n_micro};
    net_options_defaults(&options.rows);
    options.rows.message_bytes_max = 4 << 20;
    options.rows.silence_ms = 600000; /* these workers say nothing unasked */
    bench_wire_use(&o->wire);
    CM_TRY(rt_engine_create(&options, engine_out, err));
    rt_exchange *exchange = rt_engine_exchange(*engine_out);
    rt_exchange_offer_epoch(exchange, o->epoch, 1);
    while (!rt_exchange_ready(exchange)) {
        rt_exchange_idle(exchange, 1);
    }
    return CM_OK;
}

/* ---- what is measured ---- */

static double overlap_now(void)
{
    return 1e-9 * (double)cm_now_ns();
}

/* A step with one or two micro-batches on the wire as it is now. */
static double overlap_step_s(overlap *o, uint32_t i_engine)
{
    rt_step_result results[OVERLAP_SEQS];
    double start = overlap_now();
    cm_status status = rt_engine_step(o->engines[i_engine], &o->step, results);
    double s = overlap_now() - start;
    size_t n_bytes = sizeof(float) * OVERLAP_SEQS * o->geometry->vocab;
    CM_ASSERT(status == CM_OK);
    o->differs |= memcmp(o->logits, rt_engine_logits(o->engines[i_engine]), n_bytes) != 0;
    return s;
}

/* The same amount of rows, layer after layer, with nothing to compute. */
static double overlap_wire_s(overlap *o)
{
    rt_exchange *exchange = rt_engine_exchange(o->engines[0]);
    double start = overlap_now();
    for (uint32_t l = 0; l < o->geometry->n_layer; l++) {
        rt_exchange_begin(exchange, 0,
                          &(rt_xcore_layer){.step = 1,
                                            .layer = l,
                                            .n_row = OVERLAP_ROWS,
                                            .experts = o->experts,
                                            .weights = o->weights,
                                            .codes = o->codes,
                                            .scales = o->scales,
                                            .results = o->results});
        cm_status status = rt_exchange_finish(exchange, 0);
        CM_ASSERT(status == CM_OK);
    }
    return overlap_now() - start;
}

static double min_d(double a, double b)
{
    return a < b ? a : b;
}

static void overlap_round(overlap *o, overlap_samples samples[OVERLAP_SHARES])
{
    double compute[2], together[2];
    o->wire.bytes_s = 0;
    o->wire.latency_ns = 0;
    for (uint32_t i = 0; i < 2; i++) {
        compute[i] = overlap_step_s(o, i);
    }
    uint64_t before = o->wire.out_bytes + o->wire.back_bytes;
    overlap_wire_s(o);
    double n_bytes = (double)(o->wire.out_bytes + o->wire.back_bytes - before);
    o->wire.latency_ns = OVERLAP_LATENCY_NS;
    for (uint32_t k = 0; k < OVERLAP_SHARES; k++) {
        overlap_samples *s = &samples[k];
        o->wire.bytes_s = n_bytes / (OVERLAP_SHARE[k] * compute[0]);
        double wire = overlap_wire_s(o);
        bench_add(&s->wire, wire);
        for (uint32_t i = 0; i < 2; i++) {
            together[i] = overlap_step_s(o, i);
            bench_add(&s->compute[i], compute[i]);
            bench_add(&s->together[i], together[i]);
            bench_add(&s->hidden[i], (compute[i] + wire - together[i]) / min_d(compute[i], wire));
        }
        bench_add(&s->gain, together[0] / together[1]);
    }
}

/* ---- telling ---- */

static void overlap_tell(const bench *b, const overlap *o, const overlap_samples samples[OVERLAP_SHARES])
{
    json_t *report = bench_begin(b, o->config);
    printf("%d prompt rows of %d sequences, %u layers, %u workers; all times by the wall clock, ms\n\n",
           OVERLAP_ROWS, OVERLAP_SEQS, o->geometry->n_layer, (unsigned)o->config->ranks);
    printf("  %6s %12s %8s %8s %10s %8s %8s\n", "wire", "micro-batches", "compute", "wire", "together",
           "overlap", "faster");
    for (uint32_t k = 0; k < OVERLAP_SHARES; k++) {
        bench_summary wire = bench_summarize(&samples[k].wire), gain = bench_summarize(&samples[k].gain);
        for (uint32_t i = 0; i < 2; i++) {
            bench_summary compute = bench_summarize(&samples[k].compute[i]),
                          together = bench_summarize(&samples[k].together[i]),
                          hidden = bench_summarize(&samples[k].hidden[i]);
            printf("  %6.2f %12u %9.2f %8.2f %10.2f %8.2f (%.2f .. %.2f)", OVERLAP_SHARE[k], i + 1,
                   compute.median * 1e3, wire.median * 1e3, together.median * 1e3, hidden.median, hidden.min,
                   hidden.max);
            printf(i == 0 ? "\n" : " %.2f (%.2f .. %.2f)\n", gain.median, gain.min, gain.max);
            json_array_append_new(json_object_get(report, "results"),
                                  json_pack("{s:f, s:i, s:f, s:f, s:f, s:o}", "share", OVERLAP_SHARE[k],
                                            "micro_batches", (int)i + 1, "compute_seconds", compute.median,
                                            "wire_seconds", wire.median, "together_seconds", together.median,
                                            "overlap", bench_summary_json(hidden)));
        }
        json_array_append_new(
            json_object_get(report, "results"),
            json_pack("{s:f, s:o}", "share", OVERLAP_SHARE[k], "two_faster", bench_summary_json(gain)));
    }
    bench_end(report);
}

/* ---- the run ---- */

static void overlap_fill(overlap *o)
{
    const md_geometry *g = o->geometry;
    uint32_t n = OVERLAP_ROWS, each = OVERLAP_ROWS / OVERLAP_SEQS;
    o->tokens = cm_alloc(sizeof(uint32_t) * n);
    o->pages = cm_alloc(sizeof(uint32_t) * OVERLAP_SEQS);
    o->experts = cm_alloc(sizeof(int32_t) * n * g->topk);
    o->weights = cm_alloc(sizeof(float) * n * g->topk);
    o->codes = cm_alloc((uint64_t)n * g->d);
    o->scales = cm_alloc((uint64_t)n * kn_blocks(g->d, KN_ACT_BLOCK));
    o->results = cm_alloc(2ull * n * g->topk * g->d);
    o->logits = cm_alloc(sizeof(float) * OVERLAP_SEQS * g->vocab);
    o->sampler = (rt_sampler){.top_p = 1, .tokens_max = 1};
    for (uint32_t r = 0; r < n; r++) {
        o->tokens[r] = cm_rng_at(OVERLAP_SEED, r, 0).word[0] % g->vocab;
        for (uint32_t k = 0; k < g->topk; k++) { /* distinct */
            o->experts[r * g->topk + k] = (int32_t)((r * 7 + k * (g->n_expert / g->topk)) % g->n_expert);
            o->weights[r * g->topk + k] = 1;
        }
    }
    for (uint32_t i = 0; i < OVERLAP_SEQS; i++) {
        o->pages[i] = i;
        o->segs[i] = (rt_step_seg){.slot = i,
                                   .n_row = each,
                                   .tokens = o->tokens + i * each,
                                   .pages = &o->pages[i],
                                   .n_page = 1,
                                   .sample = true,
                                   .sampler = &o->sampler,
                                   .log = o->tokens + i * each};
    }
    o->step =
        (rt_step){.number = 1, .n_seg = OVERLAP_SEQS, .n_row = n, .n_sample = OVERLAP_SEQS, .segs = o->segs};
}

static cm_status overlap_create(overlap *o, cm_error *err)
{
    CM_TRY(md_checkpoint_open(o->config->model, &o->checkpoint, NULL, NULL, err));
    o->geometry = md_checkpoint_geometry(o->checkpoint);
    o->epoch =
        bench_wire_epoch(md_block_count(o->geometry), o->geometry->n_expert, (uint32_t)o->config->ranks);
    o->wire.values = true;
    overlap_fill(o);
    CM_TRY(overlap_open_engine(o, 1, &o->engines[0], err));
    CM_TRY(overlap_open_engine(o, 2, &o->engines[1], err));
    rt_step_result results[OVERLAP_SEQS];
    CM_TRY(rt_engine_step(o->engines[0], &o->step, results));
    memcpy(o->logits, rt_engine_logits(o->engines[0]), sizeof(float) * OVERLAP_SEQS * o->geometry->vocab);
    return CM_OK;
}

static void overlap_destroy(overlap *o)
{
    for (uint32_t i = 0; i < 2; i++) {
        if (o->engines[i] != NULL) {
            rt_engine_destroy(o->engines[i]);
        }
    }
    pc_epoch_release(o->epoch);
    if (o->checkpoint != NULL) {
        md_checkpoint_close(o->checkpoint);
    }
    cm_free(o->tokens);
    cm_free(o->pages);
    cm_free(o->experts);
    cm_free(o->weights);
    cm_free(o->codes);
    cm_free(o->scales);
    cm_free(o->results);
    cm_free(o->logits);
}

static int run(const bench *b, const bench_config *config)
{
    static overlap_samples samples[OVERLAP_SHARES];
    overlap o = {.config = config};
    cm_error err = {0};
    int code = CLI_OK;
    if (overlap_create(&o, &err) != CM_OK) {
        fprintf(stderr, "%s: %s\n", b->name, err.text);
        code = CLI_FAILED;
    }
    for (uint64_t i = 0; i < config->rounds && code == CLI_OK; i++) {
        overlap_round(&o, samples);
        if (o.differs) {
            fprintf(stderr, "%s: other bits with two micro-batches\n", b->name);
            code = CLI_FAILED;
        }
    }
    if (code == CLI_OK) {
        overlap_tell(b, &o, samples);
    }
    overlap_destroy(&o);
    return code;
}

const bench bench_step_overlap = {
    .name = "step.overlap",
    .doc = "how much of the wire's time is hidden behind computing, with one and with two micro-batches",
    .run = run,
};
