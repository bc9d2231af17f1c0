/* Experts: cpu.fp4_gemv and cpu.fp8_gemv, few rows against the read bandwidth; cpu.moe_prefill, many against
 * the arithmetic. One fills a set of experts far larger than the caches, the other stays with a few. */
#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "kernels/kn_math.h"
#include "tools/bench/bench.h"
#include "tools/bench/bench_peer.h"
#include "tools/baleen/cli.h"

enum {
    EXPERTS_SEED = 7,
    EXPERTS_CASES_MAX = 8,
    EXPERTS_CHECKED = 2,      /* experts computed by the oracle too, which takes seconds */
    EXPERTS_CHECKED_ROWS = 3, /* of which row counts of the first two cases */
};
static const float EXPERTS_LIMIT = 10;

typedef struct expert_set {
    const bench_config *config;
    kn_dtype dtype;
    uint32_t n, n_row; /* experts; rows of x */
    uint64_t expert_bytes, all_bytes;
    uint8_t *weights; /* [n][expert_bytes] */
    kn_expert *experts;
    kn_q8 x;
    kn_ptr y; /* [n][n_row][d] */
    kn_expert_group *groups;
    kn_expert_item *items;
} expert_set;

typedef struct expert_case {
    uint32_t n_row;
    /* of_peak: of that of the instruction the path multiplies with; over_floor: time to that of reading;
     * over_limit: to the longer of reading and of as many products at that peak */
    bench_samples seconds[BENCH_PATHS_MAX], of_peak[BENCH_PATHS_MAX], over_floor[BENCH_PATHS_MAX],
        over_limit[BENCH_PATHS_MAX];
} expert_case;

/* Multiplications a second by each instruction that is some path's. */
typedef enum probe { PROBE_FMA, PROBE_MADD, PROBE_VNNI, PROBE_BF16, PROBE_N } probe;
typedef struct peaks {
    bench_samples of[PROBE_N];
} peaks;
static const char *const PROBE_NAMES[] = {"float32 multiply-add", "vpmaddwd + vpaddd", "vpdpbusd",
                                          "vdpbf16ps"};

/* ---- data ---- */

static uint64_t code_bytes(kn_dtype dtype, uint32_t n_out, uint32_t n_in)
{
    return (uint64_t)n_out * n_in / (dtype == KN_E2M1 ? 2 : 1);
}

static uint64_t scale_bytes(kn_dtype dtype, uint32_t n_out, uint32_t n_in)
{
    return dtype == KN_E2M1 ? (uint64_t)n_out * kn_blocks(n_in, KN_FP4_BLOCK)
                            : (uint64_t)kn_blocks(n_out, KN_ACT_BLOCK) * kn_blocks(n_in, KN_ACT_BLOCK);
}

/* The matrix at *at, which moves past it. */
static kn_matrix place_matrix(uint8_t **at, kn_dtype dtype, uint32_t n_out, uint32_t n_in)
{
    kn_ptr data = {(uintptr_t)*at};
    *at += code_bytes(dtype, n_out, n_in) + scale_bytes(dtype, n_out, n_in);
    return (kn_matrix){.data = data,
                       .scale = kn_at(data, code_bytes(dtype, n_out, n_in)),
                       .n_out = n_out,
                       .n_in = n_in,
                       .dtype = dtype,
                       .scale_dtype = KN_E8M0};
}

/* The i-th of the key's numbers, about normal. */
static double random_normal(uint64_t key, uint64_t i)
{
    cm_rng_block b = cm_rng_at(EXPERTS_SEED, i, key);
    double sum = 0;
    for (int k = 0; k < 4; k++) {
        sum += (double)b.word[k] / 2147483648.0 - 1;
    }
    return sum;
}

/* Codes of every kind (E2M1) or about normal with the largest at the end of the range (E4M3); scales of four
 * binades that make g and u of about size one. */
static void fill_matrix(const kn_matrix *m, uint64_t key)
{
    uint64_t n_code = code_bytes(m->dtype, m->n_out, m->n_in),
             n_scale = scale_bytes(m->dtype, m->n_out, m->n_in);
    uint8_t *codes = (uint8_t *)(uintptr_t)m->data.addr, *scales = (uint8_t *)(uintptr_t)m->scale.addr;
    for (uint64_t i = 0; i < n_code; i++) {
        codes[i] = m->dtype == KN_E2M1 ? (uint8_t)cm_rng_at(EXPERTS_SEED, i, key).word[0]
                                       : kn_e4m3_encode((float)(130 * random_normal(key, i)));
    }
    for (uint64_t i = 0; i < n_scale; i++) {
        scales[i] =
            (uint8_t)((m->dtype == KN_E2M1 ? 117 : 113) + cm_rng_at(EXPERTS_SEED, i, key + 10).word[0] % 4);
    }
}

/* Rows like a normed activation: about normal, every 97th value ten times as large. */
static void fill_rows(expert_set *set, bench_path *path)
{
    uint32_t d = (uint32_t)set->config->d, n = set->n_row;
    uint16_t *x = cm_alloc((uint64_t)n * d * sizeof(*x));
    for (uint64_t i = 0; i < (uint64_t)n * d; i++) {
        double sum = random_normal(99, i);
        x[i] = kn_bf16_encode((float)(i % 97 == 0 ? 10 * sum : sum));
    }
    kn_dense(path->device)->quant_act(path->stream, (kn_ptr){(uintptr_t)x}, n, d, set->x);
    cm_free(x);
}

/* The experts, each a copy of the first. */
static void set_fill(expert_set *set)
{
    uint32_t d = (uint32_t)set->config->d, inner = (uint32_t)set->config->inner;
    for (uint32_t e = 0; e < set->n; e++) {
        uint8_t *at = set->weights + e * set->expert_bytes;
        kn_expert *x = &set->experts[e];
        if (e > 0) {
            memcpy(at, set->weights, set->expert_bytes);
        }
        x->w1 = place_matrix(&at, set->dtype, inner, d);
        x->w3 = place_matrix(&at, set->dtype, inner, d);
        x->w2 = place_matrix(&at, set->dtype, d, inner);
        if (e == 0) {
            fill_matrix(&x->w1, 1);
            fill_matrix(&x->w3, 2);
            fill_matrix(&x->w2, 3);
        }
    }
}

static void set_open(expert_set *set, const bench_config *config, kn_dtype dtype, uint64_t weight_bytes,
                     uint32_t n_row, bench_path *path)
{
    uint32_t d = (uint32_t)config->d, inner = (uint32_t)config->inner;
    uint64_t up = code_bytes(dtype, inner, d) + scale_bytes(dtype, inner, d);
    uint64_t one = 2 * up + code_bytes(dtype, d, inner) + scale_bytes(dtype, d, inner);
    *set = (expert_set){.config = config, .dtype = dtype, .n_row = n_row, .expert_bytes = one};
    set->n = (uint32_t)(weight_bytes / one) + 1;
    set->all_bytes = (set->n * one + 4095) / 4096 * 4096;
    set->weights = cm_alloc_aligned(set->all_bytes);
    set->experts = cm_alloc(set->n * sizeof(*set->experts));
    set->groups = cm_alloc(set->n * sizeof(*set->groups));
    set->items = cm_alloc((uint64_t)set->n * n_row * sizeof(*set->items));
    set->y.addr = (uintptr_t)cm_alloc_aligned(2ull * set->n * n_row * d);
    set->x.codes.addr = (uintptr_t)cm_alloc_aligned((uint64_t)n_row * d);
    set->x.scales.addr = (uintptr_t)cm_alloc_aligned((uint64_t)n_row * kn_blocks(d, KN_ACT_BLOCK));
    cli_progress("making weights");
    set_fill(set);
    fill_rows(set, path);
}

/* Adds, for each path whose device has an order of its own, the same path with a copy in that order. */
static uint32_t prepare_paths(expert_set *set, bench_path *paths, uint32_t n_path)
{
    uint32_t n = n_path;
    for (uint32_t p = 0; p < n_path; p++) {
        kn_device *device = paths[p].device;
        const kn_expert *one = &set->experts[0];
        uint64_t up = kn_prepared_bytes(device, &one->w1), down = kn_prepared_bytes(device, &one->w2);
        paths[p].experts = set->experts;
        if (up == 0 || kn_mem_alloc(device, set->n * (2 * up + down), &paths[n].prepared) != CM_OK) {
            continue;
        }
        paths[n].device = device;
        paths[n].stream = paths[p].stream;
        paths[n].experts = cm_alloc(set->n * sizeof(kn_expert));
        for (uint32_t e = 0; e < set->n; e++) {
            kn_expert *x = &paths[n].experts[e];
            kn_ptr at = kn_at(paths[n].prepared, e * (2 * up + down));
            *x = set->experts[e];
            kn_prepare(device, &x->w1, at);
            kn_prepare(device, &x->w3, kn_at(at, up));
            kn_prepare(device, &x->w2, kn_at(at, 2 * up));
        }
        n++;
    }
    return n;
}

static void forget_prepared(bench_path *paths, uint32_t n_path)
{
    for (uint32_t p = 0; p < n_path; p++) {
        if (paths[p].prepared.addr != 0) {
            kn_mem_free(paths[p].device, paths[p].prepared);
            cm_free(paths[p].experts);
        }
    }
}

static void set_close(expert_set *set)
{
    cm_free(set->weights);
    cm_free(set->experts);
    cm_free(set->groups);
    cm_free(set->items);
    cm_free((void *)(uintptr_t)set->y.addr);
    cm_free((void *)(uintptr_t)set->x.codes.addr);
    cm_free((void *)(uintptr_t)set->x.scales.addr);
}

/* The first n_row rows through the first n experts. */
static void compute(expert_set *set, bench_path *path, uint32_t n, uint32_t n_row)
{
    for (uint32_t e = 0; e < n; e++) {
        set->groups[e] = (kn_expert_group){&path->experts[e], e * n_row, n_row};
        for (uint32_t r = 0; r < n_row; r++) {
            set->items[e * n_row + r] = (kn_expert_item){r, e * n_row + r, 0.25f + 0.125f * (float)(r % 8)};
        }
    }
    kn_moe(path->device)->experts(path->stream, set->groups, n, set->items, set->x, EXPERTS_LIMIT, set->y);
}

/* Whether every path gives what the oracle gives, from outputs that were poisoned before. */
static bool check_paths(expert_set *set, bench_path *paths, uint32_t n_path, const kn_limits *limits)
{
    uint64_t n_bytes = 2ull * EXPERTS_CHECKED * EXPERTS_CHECKED_ROWS * set->config->d;
    uint8_t *want = cm_alloc(n_bytes), *y = (uint8_t *)(uintptr_t)set->y.addr;
    bench_path ref = bench_open_ref(limits);
    uint32_t n = set->n < EXPERTS_CHECKED ? set->n : EXPERTS_CHECKED;
    bool same = true;
    ref.experts = set->experts;
    n_bytes = n_bytes / EXPERTS_CHECKED * n;
    cli_progress("checking against the oracle");
    compute(set, &ref, n, EXPERTS_CHECKED_ROWS);
    memcpy(want, y, n_bytes);
    for (uint32_t p = 0; p < n_path && same; p++) {
        memset(y, 0xff, n_bytes);
        compute(set, &paths[p], n, EXPERTS_CHECKED_ROWS);
        same = memcmp(want, y, n_bytes) == 0;
        if (!same) {
            fprintf(stderr, "path %s does not give the oracle's values: not timed\n",
                    kn_device_isa(paths[p].device));
        }
    }
    bench_close_paths(&ref, 1);
    cm_free(want);
    cli_progress_clear();
    return same;
}

static double time_case(expert_set *set, bench_path *path, uint32_t n_row)
{
    double start = bench_now(set->config);
    compute(set, path, set->n, n_row);
    return bench_now(set->config) - start;
}

/* Rows the largest case, or those of the check. */
static kn_limits limits_for(const bench_config *config, uint32_t n_row)
{
    uint32_t d = (uint32_t)config->d, inner = (uint32_t)config->inner;
    return (kn_limits){.n_row = n_row,
                       .n_in = d > inner ? d : inner,
                       .n_inner = inner,
                       .n_head = 1,
                       .head_dim = 64,
                       .n_key = 1,
                       .n_expert = 1};
}

/* ---- peaks and peers ---- */

static void take_peak(const bench_config *config, bench_team *team, void (*run)(bench_team *), uint64_t macs,
                      bench_samples *peak)
{
    double start = bench_now(config);
    run(team);
    bench_add(peak, (double)config->threads * (double)macs / (bench_now(config) - start));
}

static void take_peaks(const bench_config *config, bench_team *team, peaks *p)
{
    if (bench_fma_macs() > 0) {
        take_peak(config, team, bench_fma, bench_fma_macs(), &p->of[PROBE_FMA]);
    }
    if (bench_has_madd()) {
        take_peak(config, team, bench_madd, bench_madd_macs(), &p->of[PROBE_MADD]);
    }
    if (bench_has_vnni()) {
        take_peak(config, team, bench_vnni, bench_vnni_macs(), &p->of[PROBE_VNNI]);
    }
    if (bench_has_bf16()) {
        take_peak(config, team, bench_bf16, bench_bf16_macs(), &p->of[PROBE_BF16]);
    }
}

static probe probe_of(const bench_path *path)
{
    const char *isa = kn_device_isa(path->device);
    return strcmp(isa, "avx512bf16") == 0   ? PROBE_BF16
           : strcmp(isa, "avx512vnni") == 0 ? PROBE_VNNI
           : strcmp(isa, "portable") == 0   ? PROBE_FMA
                                            : PROBE_MADD;
}

static double newest_of(const bench_samples *s)
{
    return s->n > 0 ? s->value[s->n - 1] : 0;
}

static void say_peaks(const peaks *p, json_t *report)
{
    printf("peaks of the run, GMAC/s:");
    for (int i = 0; i < PROBE_N; i++) {
        if (p->of[i].n > 0) {
            bench_summary peak = bench_summarize(&p->of[i]);
            printf(" %s %.0f", PROBE_NAMES[i], peak.median / 1e9);
            json_object_set_new(report, PROBE_NAMES[i], bench_summary_json(peak));
        }
    }
    printf("\n");
}

/* How many times as fast as each peer the path is. */
static void say_peers(const bench_peers *peers, const expert_case *c, uint32_t i_path, double macs,
                      json_t *row)
{
    char name[16];
    snprintf(name, sizeof(name), "rows_%u", c->n_row);
    json_t *list = json_array();
    for (uint32_t i = 0; peers != NULL && i < bench_peers_count(peers); i++) {
        const bench_samples *theirs = bench_peers_case(peers, i, name);
        bench_samples ratio = {0};
        for (uint32_t r = 0; theirs != NULL && r < theirs->n; r++) {
            bench_add(&ratio, macs / c->seconds[i_path].value[r] / 1e9 / theirs->value[r]);
        }
        if (ratio.n > 0) {
            bench_summary over = bench_summarize(&ratio), rate = bench_summarize(theirs);
            printf("%27s times %s, which does %.1f: %.2f (%.2f .. %.2f)\n", "", bench_peers_name(peers, i),
                   rate.median, over.median, over.min, over.max);
            json_array_append_new(list,
                                  json_pack("{s:s, s:o, s:o}", "peer", bench_peers_name(peers, i), "gmac_s",
                                            bench_summary_json(rate), "ratio", bench_summary_json(over)));
        }
    }
    json_object_set_new(row, "peers", list);
}

/* ---- rounds ---- */

/* One benchmark's run. */
typedef struct expert_run {
    expert_set set;
    const bench_config *config;
    expert_case *cases;
    uint32_t n_case, n_path;
    bench_path paths[BENCH_PATHS_MAX];
    bench_samples bandwidth;
    peaks peak;
    bench_peers *peers; /* NULL: none */
} expert_run;

static double macs_of(const expert_run *run, const expert_case *c)
{
    return 3.0 * (double)run->config->d * (double)run->config->inner * run->set.n * c->n_row;
}

static void time_path(expert_run *run, bench_team *team, expert_case *c, uint32_t p, uint32_t round)
{
    expert_set *set = &run->set;
    double bytes = (double)set->expert_bytes * set->n, start = bench_now(run->config), read, seconds,
           products;
    cli_progress("round %u of %u, %u rows", round + 1, (unsigned)run->config->rounds, c->n_row);
    bench_read(team, set->weights, set->all_bytes);
    read = bench_now(run->config) - start;
    seconds = time_case(set, &run->paths[p], c->n_row);
    if (run->bandwidth.n <= round) {
        bench_add(&run->bandwidth, (double)set->all_bytes / read / 1e9);
    }
    bench_add(&c->seconds[p], seconds);
    read *= bytes / (double)set->all_bytes;
    products = macs_of(run, c) / newest_of(&run->peak.of[probe_of(&run->paths[p])]);
    bench_add(&c->over_floor[p], seconds / read);
    bench_add(&c->over_limit[p], seconds / (products > read ? products : read));
    bench_add(&c->of_peak[p], products / seconds);
}

static cm_status take_rounds(expert_run *run, cm_error *err)
{
    bench_team *team = bench_team_create((uint32_t)run->config->threads);
    cm_status status = CM_OK;
    for (uint32_t round = 0; round < run->config->rounds && status == CM_OK; round++) {
        take_peaks(run->config, team, &run->peak);
        for (uint32_t c = 0; c < run->n_case; c++) {
            for (uint32_t p = 0; p < run->n_path; p++) {
                time_path(run, team, &run->cases[c], p, round);
            }
        }
        status = run->peers != NULL ? bench_peers_run(run->peers, err) : CM_OK;
    }
    cli_progress_clear();
    bench_team_destroy(team);
    return status;
}

static void say_case(const expert_run *run, const expert_case *c, uint32_t p, json_t *report)
{
    const char *isa = kn_device_isa(run->paths[p].device);
    const char *weights = run->paths[p].prepared.addr != 0 ? "prepared" : "stored";
    bench_summary t = bench_summarize(&c->seconds[p]), floor = bench_summarize(&c->over_floor[p]),
                  peak = bench_summarize(&c->of_peak[p]), limit = bench_summarize(&c->over_limit[p]);
    json_t *row = json_pack("{s:s, s:s, s:i, s:o, s:o, s:o, s:o}", "path", isa, "weights", weights, "rows",
                            (int)c->n_row, "seconds", bench_summary_json(t), "time_over_floor",
                            bench_summary_json(floor), "time_over_limit", bench_summary_json(limit),
                            "of_peak", bench_summary_json(peak));
    printf("%-11s %-8s %4u  %7.2f  %7.1f  %6.2f (%.2f .. %.2f)  %6.2f (%.2f .. %.2f)  %.3f (%.3f .. %.3f)\n",
           isa, weights, c->n_row, (double)run->set.expert_bytes * run->set.n / t.median / 1e9,
           macs_of(run, c) / t.median / 1e9, floor.median, floor.min, floor.max, limit.median, limit.min,
           limit.max, peak.median, peak.min, peak.max);
    say_peers(run->peers, c, p, macs_of(run, c), row);
    json_array_append_new(json_object_get(report, "results"), row);
}

static void say_run(const expert_run *run, json_t *report)
{
    bench_summary bw = bench_summarize(&run->bandwidth);
    printf("%u experts %u x %u, %.2f GB; read bandwidth of the run %.1f GB/s (%.1f .. %.1f)\n", run->set.n,
           (unsigned)run->config->inner, (unsigned)run->config->d,
           (double)run->set.expert_bytes * run->set.n / 1e9, bw.median, bw.min, bw.max);
    json_object_set_new(report, "read_gb_s", bench_summary_json(bw));
    say_peaks(&run->peak, report);
    printf("%-11s %-8s %4s  %7s  %7s  %-22s  %-22s  %s\n", "path", "weights", "rows", "GB/s", "GMAC/s",
           "time / (bytes / bw.)", "time / max(that, peak)", "of its instruction's peak");
    for (uint32_t p = 0; p < run->n_path; p++) {
        for (uint32_t c = 0; c < run->n_case; c++) {
            say_case(run, &run->cases[c], p, report);
        }
    }
}

static int measure(const bench *b, expert_run *run)
{
    json_t *report = bench_begin(b, run->config);
    cm_error err = {0};
    run->peers = run->config->peer[0] != '\0' ? bench_peers_create(run->config->peer) : NULL;
    int code = take_rounds(run, &err) == CM_OK ? CLI_OK : CLI_FAILED;
    if (code == CLI_OK) {
        say_run(run, report);
        bench_end(report);
    } else {
        fprintf(stderr, "%s\n", err.text);
        json_decref(report);
    }
    bench_peers_destroy(run->peers);
    return code;
}

static int run_cases(const bench *b, const bench_config *config, kn_dtype dtype, uint64_t weight_bytes,
                     const uint32_t *rows, uint32_t n_case)
{
    uint32_t most = rows[n_case - 1];
    kn_limits limits = limits_for(config, most);
    expert_run *run = cm_alloc(sizeof(*run));
    uint32_t n_opened = bench_open_paths(config, &limits, run->paths);
    int code = CLI_FAILED;
    run->config = config;
    run->n_case = n_case;
    run->cases = cm_alloc(n_case * sizeof(*run->cases));
    for (uint32_t c = 0; c < n_case; c++) {
        run->cases[c].n_row = rows[c];
    }
    if (n_opened > 0) {
        set_open(&run->set, config, dtype, weight_bytes, most, &run->paths[0]);
        run->n_path = prepare_paths(&run->set, run->paths, n_opened);
        if (check_paths(&run->set, run->paths, run->n_path, &limits)) {
            code = measure(b, run);
        }
        forget_prepared(run->paths, run->n_path);
        set_close(&run->set);
        bench_close_paths(run->paths, run->n_path);
    }
    cm_free(run->cases);
    cm_free(run);
    return code;
}

/* ---- the benchmarks ---- */

static const uint32_t FEW_ROWS[] = {1, 2, 4, 8}, MANY_ROWS[] = {16, 32, 128, 512};

static int fp4_run(const bench *b, const bench_config *config)
{
    return run_cases(b, config, KN_E2M1, config->weight_bytes, FEW_ROWS, 4);
}

static int fp8_run(const bench *b, const bench_config *config)
{
    return run_cases(b, config, KN_E4M3, config->weight_bytes, FEW_ROWS, 4);
}

/* One expert. */
static int prefill_run(const bench *b, const bench_config *config)
{
    return run_cases(b, config, KN_E2M1, 0, MANY_ROWS, 4);
}

const bench bench_fp4_gemv = {"cpu.fp4_gemv",
                              "routed FP4 experts for 1 to 8 rows, against the read bandwidth", fp4_run};
const bench bench_fp8_gemv = {
    "cpu.fp8_gemv", "the same matrices in FP8, as of the dense part, against the read bandwidth", fp8_run};
const bench bench_moe_prefill = {"cpu.moe_prefill",
                                 "routed FP4 experts for many rows, against the arithmetic of the machine",
                                 prefill_run};
