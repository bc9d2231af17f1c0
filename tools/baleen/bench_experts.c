/* Experts: cpu.fp4_gemv and cpu.fp8_gemv, few rows against the read bandwidth; cpu.moe_prefill, many against
 * the arithmetic. One fills a set of experts far larger than the caches, the other stays with a few. */
#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "kernels/kn_math.h"
#include "tools/baleen/bench.h"
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
    bench_samples seconds[BENCH_PATHS_MAX], ratio[BENCH_PATHS_MAX];
} expert_case;

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

/* ---- cpu.fp4_gemv ---- */

static void gemv_report(const expert_set *set, const expert_case *cases, uint32_t n_case,
                        const bench_path *paths, uint32_t n_path, const bench_samples *bandwidth,
                        json_t *report)
{
    double bytes = (double)set->expert_bytes * set->n;
    bench_summary bw = bench_summarize(bandwidth);
    printf("%u experts %u x %u, %.2f GB; read bandwidth of the run %.1f GB/s (%.1f .. %.1f)\n", set->n,
           (unsigned)set->config->inner, (unsigned)set->config->d, bytes / 1e9, bw.median, bw.min, bw.max);
    printf("%-11s %-8s %4s  %7s  %7s  %s\n", "path", "weights", "rows", "GB/s", "GMAC/s",
           "time / (bytes / bandwidth)");
    json_object_set_new(report, "read_gb_s", bench_summary_json(bw));
    for (uint32_t p = 0; p < n_path; p++) {
        for (uint32_t c = 0; c < n_case; c++) {
            const char *isa = kn_device_isa(paths[p].device);
            const char *weights = paths[p].prepared.addr != 0 ? "prepared" : "stored";
            bench_summary t = bench_summarize(&cases[c].seconds[p]), r = bench_summarize(&cases[c].ratio[p]);
            double macs = 3.0 * (double)set->config->d * (double)set->config->inner * set->n * cases[c].n_row;
            printf("%-11s %-8s %4u  %7.2f  %7.1f  %.2f (%.2f .. %.2f)\n", isa, weights, cases[c].n_row,
                   bytes / t.median / 1e9, macs / t.median / 1e9, r.median, r.min, r.max);
            json_array_append_new(json_object_get(report, "results"),
                                  json_pack("{s:s, s:s, s:i, s:o, s:o}", "path", isa, "weights", weights,
                                            "rows", (int)cases[c].n_row, "seconds", bench_summary_json(t),
                                            "time_over_floor", bench_summary_json(r)));
        }
    }
}

static void gemv_rounds(expert_set *set, expert_case *cases, uint32_t n_case, bench_path *paths,
                        uint32_t n_path, bench_samples *bandwidth)
{
    bench_team *team = bench_team_create((uint32_t)set->config->threads);
    double bytes = (double)set->expert_bytes * set->n;
    for (uint32_t round = 0; round < set->config->rounds; round++) {
        for (uint32_t c = 0; c < n_case; c++) {
            for (uint32_t p = 0; p < n_path; p++) {
                double start = bench_now(set->config), read, seconds;
                cli_progress("round %u of %u, %u rows", round + 1, (unsigned)set->config->rounds,
                             cases[c].n_row);
                bench_read(team, set->weights, set->all_bytes);
                read = bench_now(set->config) - start;
                seconds = time_case(set, &paths[p], cases[c].n_row);
                bench_add(&cases[c].seconds[p], seconds);
                bench_add(&cases[c].ratio[p], seconds / (read * bytes / (double)set->all_bytes));
                if (c == 0 && p == 0) {
                    bench_add(bandwidth, (double)set->all_bytes / read / 1e9);
                }
            }
        }
    }
    cli_progress_clear();
    bench_team_destroy(team);
}

static int gemv_run(const bench *b, const bench_config *config, kn_dtype dtype)
{
    static const uint32_t rows[] = {1, 2, 4, 8};
    enum { N_CASE = 4 };
    expert_case *cases = cm_alloc(N_CASE * sizeof(*cases));
    kn_limits limits = limits_for(config, 8);
    bench_path paths[BENCH_PATHS_MAX] = {0};
    bench_samples bandwidth = {0};
    expert_set set;
    uint32_t n_path = bench_open_paths(config, &limits, paths);
    int code = CLI_FAILED;
    if (n_path > 0) {
        set_open(&set, config, dtype, config->weight_bytes, 8, &paths[0]);
        n_path = prepare_paths(&set, paths, n_path);
        if (check_paths(&set, paths, n_path, &limits)) {
            json_t *report = bench_begin(b, config);
            for (uint32_t c = 0; c < N_CASE; c++) {
                cases[c].n_row = rows[c];
            }
            gemv_rounds(&set, cases, N_CASE, paths, n_path, &bandwidth);
            gemv_report(&set, cases, N_CASE, paths, n_path, &bandwidth, report);
            bench_end(report);
            code = CLI_OK;
        }
        forget_prepared(paths, n_path);
        set_close(&set);
        bench_close_paths(paths, n_path);
    }
    cm_free(cases);
    return code;
}

static int fp4_run(const bench *b, const bench_config *config)
{
    return gemv_run(b, config, KN_E2M1);
}

static int fp8_run(const bench *b, const bench_config *config)
{
    return gemv_run(b, config, KN_E4M3);
}

const bench bench_fp4_gemv = {"cpu.fp4_gemv",
                              "routed FP4 experts for 1 to 8 rows, against the read bandwidth", fp4_run};
const bench bench_fp8_gemv = {
    "cpu.fp8_gemv", "the same matrices in FP8, as of the dense part, against the read bandwidth", fp8_run};

/* ---- cpu.moe_prefill ---- */

typedef struct peaks {
    bench_samples fma, vnni; /* multiplications a second */
} peaks;

static void take_peaks(const bench_config *config, bench_team *team, peaks *p)
{
    double start = bench_now(config), all = (double)config->threads;
    if (bench_fma_macs() > 0) {
        bench_fma(team);
        bench_add(&p->fma, all * (double)bench_fma_macs() / (bench_now(config) - start));
    }
    start = bench_now(config);
    if (bench_has_vnni()) {
        bench_vnni(team);
        bench_add(&p->vnni, all * (double)bench_vnni_macs() / (bench_now(config) - start));
    }
}

static double newest_of(const bench_samples *s)
{
    return s->n > 0 ? s->value[s->n - 1] : 0;
}

/* Of the ratios the one to float32 is kept with the samples: every machine has it. */
static void prefill_rounds(expert_set *set, expert_case *cases, uint32_t n_case, bench_path *paths,
                           uint32_t n_path, peaks *peak)
{
    bench_team *team = bench_team_create((uint32_t)set->config->threads);
    double macs = 3.0 * (double)set->config->d * (double)set->config->inner * set->n;
    for (uint32_t round = 0; round < set->config->rounds; round++) {
        take_peaks(set->config, team, peak);
        for (uint32_t c = 0; c < n_case; c++) {
            for (uint32_t p = 0; p < n_path; p++) {
                double seconds;
                cli_progress("round %u of %u, %u rows", round + 1, (unsigned)set->config->rounds,
                             cases[c].n_row);
                seconds = time_case(set, &paths[p], cases[c].n_row);
                bench_add(&cases[c].seconds[p], seconds);
                bench_add(&cases[c].ratio[p], macs * cases[c].n_row / seconds / newest_of(&peak->fma));
            }
        }
    }
    cli_progress_clear();
    bench_team_destroy(team);
}

static void prefill_report(const expert_set *set, const expert_case *cases, uint32_t n_case,
                           const bench_path *paths, uint32_t n_path, const peaks *peak, json_t *report)
{
    double macs = 3.0 * (double)set->config->d * (double)set->config->inner * set->n;
    bench_summary fma = bench_summarize(&peak->fma);
    double vnni = peak->vnni.n > 0 ? bench_summarize(&peak->vnni).median : 0;
    printf("peaks of the run, GMAC/s: float32 multiply-add %.0f, vpdpbusd %.0f\n", fma.median / 1e9,
           vnni / 1e9);
    printf("%-11s %-8s %4s  %7s  %-22s  %s\n", "path", "weights", "rows", "GMAC/s", "of the float32 peak",
           "of vpdpbusd");
    json_object_set_new(report, "fma_mac_s", json_real(fma.median));
    json_object_set_new(report, "vnni_mac_s", json_real(vnni));
    for (uint32_t p = 0; p < n_path; p++) {
        for (uint32_t c = 0; c < n_case; c++) {
            const char *isa = kn_device_isa(paths[p].device);
            const char *weights = paths[p].prepared.addr != 0 ? "prepared" : "stored";
            bench_summary t = bench_summarize(&cases[c].seconds[p]), r = bench_summarize(&cases[c].ratio[p]);
            double rate = macs * cases[c].n_row / t.median;
            printf("%-11s %-8s %4u  %7.1f  %.3f (%.3f .. %.3f)   %.3f\n", isa, weights, cases[c].n_row,
                   rate / 1e9, r.median, r.min, r.max, vnni > 0 ? rate / vnni : 0);
            json_array_append_new(json_object_get(report, "results"),
                                  json_pack("{s:s, s:s, s:i, s:o, s:o, s:f}", "path", isa, "weights", weights,
                                            "rows", (int)cases[c].n_row, "seconds", bench_summary_json(t),
                                            "of_fma", bench_summary_json(r), "of_vnni",
                                            vnni > 0 ? rate / vnni : 0.0));
        }
    }
}

static int prefill_run(const bench *b, const bench_config *config)
{
    static const uint32_t rows[] = {32, 128, 512};
    enum { N_CASE = 3, MOST = 512 };
    expert_case *cases = cm_alloc(N_CASE * sizeof(*cases));
    kn_limits limits = limits_for(config, MOST);
    bench_path paths[BENCH_PATHS_MAX] = {0};
    peaks peak = {0};
    expert_set set;
    uint32_t n_path = bench_fma_macs() > 0 ? bench_open_paths(config, &limits, paths) : 0;
    int code = CLI_FAILED;
    if (n_path > 0) {
        set_open(&set, config, KN_E2M1, 0, MOST, &paths[0]); /* one expert */
        n_path = prepare_paths(&set, paths, n_path);
        if (check_paths(&set, paths, n_path, &limits)) {
            json_t *report = bench_begin(b, config);
            for (uint32_t c = 0; c < N_CASE; c++) {
                cases[c].n_row = rows[c];
            }
            prefill_rounds(&set, cases, N_CASE, paths, n_path, &peak);
            prefill_report(&set, cases, N_CASE, paths, n_path, &peak, report);
            bench_end(report);
            code = CLI_OK;
        }
        forget_prepared(paths, n_path);
        set_close(&set);
        bench_close_paths(paths, n_path);
    }
    cm_free(cases);
    return code;
}

const bench bench_moe_prefill = {"cpu.moe_prefill",
                                 "routed FP4 experts for many rows, against the arithmetic of the machine",
                                 prefill_run};
