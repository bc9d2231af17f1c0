/* cpu.dense: the dense operations of V4-Pro one by one, at 1 and 4 rows against the read bandwidth, at 32 and
 * 512 against the arithmetic of the machine. Weights far larger than the caches, in the device's order where
 * it has one, as a router holds them. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "kernels/kn_math.h"
#include "tools/bench/bench.h"
#include "tools/baleen/cli.h"

enum { DENSE_SEED = 17, DENSE_ROWS = 4, DENSE_ROWS_MAX = 512, DENSE_GROUPS = 16, DENSE_CHECKED = 2 };
static const uint32_t DENSE_N[DENSE_ROWS] = {1, 4, 32, DENSE_ROWS_MAX};

typedef enum dense_kind { DENSE_Q8, DENSE_GROUPED, DENSE_BF16 } dense_kind;

typedef struct dense_op {
    const char *name;
    dense_kind kind;
    uint32_t n_out, n_in;
} dense_op;

static const dense_op DENSE_OPS[] = {
    {"linear_q8 65536 x 1536, as wq_b", DENSE_Q8, 65536, 1536},
    {"linear_q8 7168 x 16384, as wo_b", DENSE_Q8, 7168, 16384},
    {"linear_grouped 16 x 1024 x 4096, as wo_a", DENSE_GROUPED, 16384, 4096},
    {"linear_bf16 8192 x 7168, as compressors and head", DENSE_BF16, 8192, 7168},
};
enum { N_DENSE = sizeof(DENSE_OPS) / sizeof(DENSE_OPS[0]) };

typedef struct dense_case {
    bench_samples seconds[DENSE_ROWS], floor[DENSE_ROWS], of_fma[DENSE_ROWS];
} dense_case;

/* One operation's operands. */
typedef struct dense_set {
    const dense_op *op;
    kn_matrix stored, used;
    kn_ptr prepared, x, y;
    kn_q8 q;
    uint64_t bytes;        /* of the stored weights */
    uint64_t x_row, y_row; /* values in a row */
} dense_set;

/* ---- data ---- */

static double random_normal(uint64_t key, uint64_t i)
{
    cm_rng_block b = cm_rng_at(DENSE_SEED, i, key);
    double sum = 0;
    for (int k = 0; k < 4; k++) {
        sum += (double)b.word[k] / 2147483648.0 - 1;
    }
    return sum;
}

/* The first million values are drawn, the others are theirs again, shifted. */
static void fill_weights(const dense_op *op, uint8_t *out, uint64_t n)
{
    enum { DRAWN = 1000003 };
    uint32_t item = op->kind == DENSE_BF16 ? 2 : 1;
    for (uint64_t i = 0; i < n && i < DRAWN; i++) {
        double v = random_normal(1, i);
        uint16_t half = kn_bf16_encode((float)(0.02 * v));
        uint8_t code = kn_e4m3_encode((float)(130 * v));
        memcpy(out + i * item, item == 2 ? (const void *)&half : (const void *)&code, item);
    }
    for (uint64_t at = DRAWN; at < n; at += DRAWN) {
        memcpy(out + at * item, out, (n - at < DRAWN ? n - at : DRAWN) * item);
    }
}

static kn_ptr host_new(uint64_t n_bytes)
{
    return (kn_ptr){(uintptr_t)cm_alloc_aligned(n_bytes)};
}

static void host_free(kn_ptr p)
{
    cm_free((void *)(uintptr_t)p.addr);
}

/* Rows like a normed activation: about normal, every 97th value four times as large. */
static void fill_rows(dense_set *s, bench_path *path)
{
    uint16_t *x = (uint16_t *)(uintptr_t)s->x.addr;
    for (uint64_t i = 0; i < DENSE_ROWS_MAX * s->x_row; i++) {
        x[i] = kn_bf16_encode((float)((i % 97 == 0 ? 4 : 1) * random_normal(2, i % 100003)));
    }
    if (s->op->kind == DENSE_Q8) {
        kn_dense(path->device)->quant_act(path->stream, s->x, DENSE_ROWS_MAX, s->op->n_in, s->q);
    }
}

static bool set_open(dense_set *s, const dense_op *op, bench_path *path)
{
    uint64_t n = (uint64_t)op->n_out * op->n_in, n_scale = n / (KN_ACT_BLOCK * KN_ACT_BLOCK), copy;
    bool bf16 = op->kind == DENSE_BF16;
    *s = (dense_set){.op = op,
                     .bytes = bf16 ? 2 * n : n + n_scale,
                     .x_row = (op->kind == DENSE_GROUPED ? DENSE_GROUPS : 1) * (uint64_t)op->n_in,
                     .y_row = op->n_out};
    s->stored = (kn_matrix){.data = host_new(s->bytes),
                            .scale = host_new(n_scale),
                            .n_out = op->n_out,
                            .n_in = op->n_in,
                            .dtype = bf16 ? KN_BF16 : KN_E4M3,
                            .scale_dtype = KN_E8M0};
    fill_weights(op, (uint8_t *)(uintptr_t)s->stored.data.addr, n);
    for (uint64_t i = 0; i < n_scale; i++) {
        ((uint8_t *)(uintptr_t)s->stored.scale.addr)[i] = (uint8_t)(113 + i % 4);
    }
    s->x = host_new(2 * DENSE_ROWS_MAX * s->x_row);
    s->y = host_new(4 * DENSE_ROWS_MAX * s->y_row);
    s->q = (kn_q8){host_new(DENSE_ROWS_MAX * s->x_row), host_new(DENSE_ROWS_MAX * s->x_row / KN_ACT_BLOCK)};
    fill_rows(s, path);
    s->used = s->stored;
    copy = kn_prepared_bytes(path->device, &s->stored);
    if (copy > 0) {
        if (kn_mem_alloc(path->device, copy, &s->prepared) != CM_OK) {
            return false;
        }
        kn_prepare(path->device, &s->used, s->prepared);
    }
    return true;
}

static void set_close(dense_set *s, bench_path *path)
{
    kn_mem_free(path->device, s->prepared);
    host_free(s->stored.data);
    host_free(s->stored.scale);
    host_free(s->x);
    host_free(s->y);
    host_free(s->q.codes);
    host_free(s->q.scales);
}

/* ---- runs ---- */

static void compute(const dense_set *s, const bench_path *path, const kn_matrix *w, uint32_t n)
{
    const kn_dense_ops *ops = kn_dense(path->device);
    switch (s->op->kind) {
    case DENSE_Q8:
        ops->linear_q8(path->stream, s->q, w, n, s->y);
        break;
    case DENSE_GROUPED:
        ops->linear_grouped(path->stream, s->x, w, DENSE_GROUPS, n, s->y);
        break;
    default:
        ops->linear_bf16(path->stream, s->x, w, n, KN_F32, s->y);
        break;
    }
}

/* Whether a few rows give what the oracle gives, from outputs that were poisoned before. */
static bool check_set(const dense_set *s, const bench_path *path, const bench_path *ref)
{
    uint64_t n_bytes = (s->op->kind == DENSE_BF16 ? 4u : 2u) * DENSE_CHECKED * s->y_row;
    void *want = cm_alloc(n_bytes), *y = (void *)(uintptr_t)s->y.addr;
    bool same;
    cli_progress("checking %s against the oracle", s->op->name);
    compute(s, ref, &s->stored, DENSE_CHECKED);
    memcpy(want, y, n_bytes);
    memset(y, 0xff, n_bytes);
    compute(s, path, &s->used, DENSE_CHECKED);
    same = memcmp(want, y, n_bytes) == 0;
    cm_free(want);
    cli_progress_clear();
    if (!same) {
        fprintf(stderr, "%s does not give the oracle's values: not timed\n", s->op->name);
    }
    return same;
}

static void measure(const bench_config *config, const dense_set *s, const bench_path *path, bench_team *team,
                    dense_case *c)
{
    const void *weights =
        (const void *)(uintptr_t)(s->prepared.addr != 0 ? s->prepared : s->stored.data).addr;
    uint64_t whole = s->bytes / 4096 * 4096;
    double macs = (double)s->op->n_out * s->op->n_in;
    for (uint32_t round = 0; round < config->rounds; round++) {
        for (uint32_t i = 0; i < DENSE_ROWS; i++) {
            double start = bench_now(config), read, peak = 0, seconds;
            cli_progress("%s: round %u of %u, %u rows", s->op->name, round + 1, (unsigned)config->rounds,
                         DENSE_N[i]);
            bench_read(team, weights, whole);
            read = (bench_now(config) - start) / (double)whole * (double)s->bytes;
            start = bench_now(config);
            if (bench_fma_macs() > 0) {
                bench_fma(team);
                peak = (double)config->threads * (double)bench_fma_macs() / (bench_now(config) - start);
            }
            start = bench_now(config);
            compute(s, path, &s->used, DENSE_N[i]);
            seconds = bench_now(config) - start;
            bench_add(&c->seconds[i], seconds);
            bench_add(&c->floor[i], seconds / read);
            bench_add(&c->of_fma[i], peak > 0 ? macs * DENSE_N[i] / seconds / peak : 0);
        }
    }
    cli_progress_clear();
}

static void report_set(const dense_set *s, const dense_case *c, json_t *report)
{
    double macs = (double)s->op->n_out * s->op->n_in;
    for (uint32_t i = 0; i < DENSE_ROWS; i++) {
        bench_summary t = bench_summarize(&c->seconds[i]), f = bench_summarize(&c->floor[i]),
                      p = bench_summarize(&c->of_fma[i]);
        double bytes = (double)s->bytes;
        printf("%-50s %4u %9.3f %7.2f %7.1f  %6.2f (%.2f .. %.2f)  %.2f\n", i == 0 ? s->op->name : "",
               DENSE_N[i], 1e3 * t.median, bytes / t.median / 1e9, macs * DENSE_N[i] / t.median / 1e9,
               f.median, f.min, f.max, p.median);
        json_array_append_new(json_object_get(report, "results"),
                              json_pack("{s:s, s:i, s:o, s:o, s:o}", "operation", s->op->name, "rows",
                                        (int)DENSE_N[i], "seconds", bench_summary_json(t), "time_over_floor",
                                        bench_summary_json(f), "of_fma", bench_summary_json(p)));
    }
}

static bool run_op(const bench_config *config, const dense_op *op, bench_path *path, const bench_path *ref,
                   bench_team *team, json_t *report)
{
    dense_case c = {0};
    dense_set s;
    bool ok = set_open(&s, op, path) && check_set(&s, path, ref);
    if (ok) {
        measure(config, &s, path, team, &c);
        report_set(&s, &c, report);
    }
    set_close(&s, path);
    return ok;
}

static int dense_run(const bench *b, const bench_config *config)
{
    kn_limits limits = {.n_row = DENSE_ROWS_MAX,
                        .n_in = 28672,
                        .n_inner = 128,
                        .n_head = 1,
                        .head_dim = 64,
                        .n_key = 1,
                        .n_expert = 1};
    bench_path paths[BENCH_PATHS_MAX] = {0}, ref;
    uint32_t n_path = bench_open_paths(config, &limits, paths);
    json_t *report;
    bool ok = n_path > 0;
    if (!ok) {
        return CLI_FAILED;
    }
    ref = bench_open_ref(&limits);
    report = bench_begin(b, config);
    for (uint32_t p = 0; p < n_path && ok; p++) {
        bench_team *team = bench_team_create((uint32_t)config->threads);
        printf("path %s\n%-50s %4s %9s %7s %7s  %-22s  %s\n", kn_device_isa(paths[p].device), "operation",
               "rows", "ms", "GB/s", "GMAC/s", "time / (bytes / bw)", "of float32 peak");
        for (uint32_t i = 0; i < N_DENSE && ok; i++) {
            ok = run_op(config, &DENSE_OPS[i], &paths[p], &ref, team, report);
        }
        bench_team_destroy(team);
    }
    bench_end(report);
    bench_close_paths(&ref, 1);
    bench_close_paths(paths, n_path);
    return ok ? CLI_OK : CLI_FAILED;
}

const bench bench_dense = {
    "cpu.dense", "dense products of V4-Pro for 1 to 512 rows, against the read bandwidth and the arithmetic",
    dense_run};
