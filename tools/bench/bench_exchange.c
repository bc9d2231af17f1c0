/* The exchange of rows between a router and workers in processes of their own, through the product's code,
 * with an echo for the experts: ep.exchange and ep.latency. */
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/base/clock.h"
#include "common/base/mem.h"
#include "tools/bench/bench.h"
#include "tools/bench/bench_ucx.h"
#include "tools/baleen/cli.h"
#include "tools/bench/ep_rig.h"

enum {
    N_EXPERT = 384,
    TOPK = 6,
    INNER = 32,
    RUNS_MAX = 16,
    COPY_BYTES = 32 << 20,
    BLOCK_MS = 25, /* of one size in one round */
};

static const uint32_t g_sizes[] = {1, 4, 16, 64, 128, 256};
enum { N_SIZE = sizeof(g_sizes) / sizeof(g_sizes[0]) };

/* One transport with one number of ranks. */
typedef struct exchange_run {
    char backend[16];
    uint32_t n_rank;
    ep_rig *rig;
    rt_exchange *exchange;
    uint64_t step;
    double us[N_SIZE];
    bench_samples floor[N_SIZE], peer[N_SIZE], time[N_SIZE];
} exchange_run;

static int complain(const char *what, const cm_error *err)
{
    fprintf(stderr, "%s: %s\n", what, err->text);
    return CLI_FAILED;
}

/* ---- ceilings ---- */

/* Bytes a second that one core copies, from memory to memory. */
static double copy_rate(uint8_t *from, uint8_t *to)
{
    double best = 0;
    for (int i = 0; i < 3; i++) {
        uint64_t t = cm_now_ns();
        memcpy(to, from, COPY_BYTES);
        __asm__ volatile("" : : "r"(to) : "memory");
        double rate = COPY_BYTES / (1e-9 * (double)(cm_now_ns() - t));
        best = rate > best ? rate : best;
    }
    return best;
}

static bool alltoallv_path(char out[PATH_MAX])
{
    ssize_t n = readlink("/proc/self/exe", out, PATH_MAX - 32);
    char *slash = n > 0 ? memrchr(out, '/', (size_t)n) : NULL;
    if (slash == NULL) {
        return false;
    }
    snprintf(slash, 32, "/baleen-alltoallv");
    return access(out, X_OK) == 0;
}

/* us_out[N_SIZE] of MPI_Alltoallv with the run's bytes; false: there is no Open MPI. */
static bool alltoallv(const exchange_run *run, const ep_rows *rows, double us_out[N_SIZE])
{
    char program[PATH_MAX], command[16384];
    if (!alltoallv_path(program)) {
        return false;
    }
    int at = snprintf(
        command, sizeof(command),
        "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 mpirun --oversubscribe -n %u %s %d",
        run->n_rank, program, BLOCK_MS);
    for (uint32_t i = 0; i < N_SIZE; i++) {
        uint64_t out[EP_RANKS_MAX], back[EP_RANKS_MAX];
        ep_rows_bytes(&rows[i], ep_rig_placement(run->rig), 0, out, back);
        for (uint32_t r = 0; r + 1 < run->n_rank; r++) {
            at += snprintf(command + at, sizeof(command) - (size_t)at, "%c%llu:%llu", r == 0 ? ' ' : ',',
                           (unsigned long long)out[r], (unsigned long long)back[r]);
        }
    }
    FILE *pipe = popen(command, "re");
    bool ok = pipe != NULL;
    for (uint32_t i = 0; i < N_SIZE && ok; i++) {
        ok = fscanf(pipe, "%lf", &us_out[i]) == 1;
    }
    return pipe != NULL && pclose(pipe) == 0 && ok;
}

/* ---- one block ---- */

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median microseconds of exchanges during block_ms; negative: it failed. */
static double time_exchange(exchange_run *run, ep_rows *rows, uint32_t block_ms)
{
    static double times[100000];
    uint32_t n = 0;
    uint64_t until_ms = cm_now_ms() + block_ms;
    do {
        uint64_t t = cm_now_ns();
        if (ep_rows_run(rows, run->exchange, ++run->step, 0) != CM_OK) {
            return -1;
        }
        times[n++] = 1e-3 * (double)(cm_now_ns() - t);
    } while ((n < 3 || cm_now_ms() < until_ms) && n < sizeof(times) / sizeof(times[0]));
    qsort(times, n, sizeof(times[0]), by_value);
    return times[n / 2];
}

/* Right before it is timed. */
static bool check_echo(exchange_run *run, ep_rows *rows)
{
    ep_rows_poison(rows);
    bool ok = ep_rows_run(rows, run->exchange, ++run->step, 0) == CM_OK && ep_rows_echoed(rows);
    if (!ok) {
        fprintf(stderr, "%s, %u ranks, %u rows: the rows that came back are not the echo\n", run->backend,
                run->n_rank, rows->n_row);
    }
    return ok;
}

static bool run_round(exchange_run *run, ep_rows *rows, double copy_bytes_s)
{
    double peer_us[N_SIZE];
    for (uint32_t i = 0; i < N_SIZE; i++) {
        uint64_t out[EP_RANKS_MAX], back[EP_RANKS_MAX], bytes = 0;
        if (!check_echo(run, &rows[i])) {
            return false;
        }
        run->us[i] = time_exchange(run, &rows[i], BLOCK_MS);
        ep_rows_bytes(&rows[i], ep_rig_placement(run->rig), 0, out, back);
        for (uint32_t r = 0; r + 1 < run->n_rank; r++) {
            bytes += out[r] + back[r];
        }
        bench_add(&run->time[i], run->us[i]);
        bench_add(&run->floor[i], 1e-6 * run->us[i] / ((double)bytes / copy_bytes_s));
    }
    rt_exchange_announce_idle(run->exchange, run->step);
    if (alltoallv(run, rows, peer_us)) {
        for (uint32_t i = 0; i < N_SIZE; i++) {
            bench_add(&run->peer[i], peer_us[i] / run->us[i]);
        }
    }
    return true;
}

/* ---- ep.exchange ---- */

/* What forks must come before what opens a transport in this process or starts threads here. */
static bool runs_open(exchange_run *runs, uint32_t n, const bench_config *config, uint32_t row_max)
{
    cm_error err = {0};
    bool ok = true;
    for (uint32_t pass = 0; pass < 2; pass++) {
        for (uint32_t i = 0; i < n && ok; i++) {
            ep_options options = {.shape = {(uint32_t)config->d, INNER, 1, N_EXPERT, TOPK},
                                  .backend = runs[i].backend,
                                  .keyed = config->keyed,
                                  .echo = true,
                                  .n_worker = runs[i].n_rank - 1,
                                  .window_us = 200};
            bool inside = strcmp(runs[i].backend, "local") == 0;
            ok = inside != (pass == 1) || ep_rig_create(&options, &runs[i].rig, &err) == CM_OK;
        }
    }
    for (uint32_t i = 0; i < n && ok; i++) {
        ok = ep_rig_router(runs[i].rig, 1, row_max, TOPK, &runs[i].exchange, &err) == CM_OK;
    }
    return ok || complain("bench", &err) == CLI_OK;
}

static void run_close(exchange_run *run)
{
    if (run->exchange != NULL) {
        rt_exchange_destroy(run->exchange);
    }
    if (run->rig != NULL) {
        ep_rig_destroy(run->rig);
    }
}

static void run_print(const exchange_run *run, json_t *results)
{
    for (uint32_t i = 0; i < N_SIZE; i++) {
        bench_summary us = bench_summarize(&run->time[i]), floor = bench_summarize(&run->floor[i]);
        printf("%-6s %5u %5u  %9.1f us  %6.2f (%.2f .. %.2f)", run->backend, run->n_rank, g_sizes[i],
               us.median, floor.median, floor.min, floor.max);
        json_t *row = json_pack("{s:s, s:i, s:i, s:o, s:o}", "net", run->backend, "ranks", (int)run->n_rank,
                                "rows", (int)g_sizes[i], "us", bench_summary_json(us), "of_copy_floor",
                                bench_summary_json(floor));
        if (run->peer[i].n > 0) {
            bench_summary peer = bench_summarize(&run->peer[i]);
            printf("  %6.2f (%.2f .. %.2f)", peer.median, peer.min, peer.max);
            json_object_set_new(row, "times_alltoallv", bench_summary_json(peer));
        }
        printf("\n");
        json_array_append_new(results, row);
    }
}

static bool measure_all(exchange_run *runs, uint32_t n, const bench_config *config, ep_rows *rows)
{
    bool ok = true;
    uint8_t *from = cm_alloc_aligned(COPY_BYTES), *to = cm_alloc_aligned(COPY_BYTES);
    memset(from, 1, COPY_BYTES); /* pages of its own */
    for (uint32_t round = 0; round < config->rounds && ok; round++) {
        for (uint32_t i = 0; i < n && ok; i++) {
            ok = run_round(&runs[i], rows, copy_rate(from, to));
        }
    }
    cm_free(from);
    cm_free(to);
    return ok;
}

/* A run for each number of ranks and each transport; how many, 0 after having complained. */
static uint32_t list_runs(const bench_config *config, exchange_run runs_out[RUNS_MAX])
{
    uint32_t n = 0;
    bool ok = true;
    char *words = cm_strdup(config->processes), *rest = words;
    for (char *word = strsep(&rest, ","); word != NULL && ok; word = strsep(&rest, ",")) {
        int n_rank = atoi(word);
        char *names = cm_strdup(config->net), *left = names;
        for (char *name = strsep(&left, ","); name != NULL && ok; name = strsep(&left, ",")) {
            ok = n_rank >= 2 && n_rank <= EP_RANKS_MAX && n < RUNS_MAX;
            if (ok) {
                snprintf(runs_out[n].backend, sizeof(runs_out[n].backend), "%s", name);
                runs_out[n++].n_rank = (uint32_t)n_rank;
            }
        }
        cm_free(names);
    }
    cm_free(words);
    if (!ok) {
        fprintf(stderr, "processes: '%s' are no numbers from 2 to %d, or too many with so many transports\n",
                config->processes, EP_RANKS_MAX);
    }
    return ok ? n : 0;
}

static int exchange_main(const bench *b, const bench_config *config)
{
    ep_rows rows[N_SIZE];
    exchange_run *runs = cm_alloc(sizeof(*runs) * RUNS_MAX);
    bench_config wall = *config;
    wall.threads = 2; /* several processes: nothing but the wall clock */
    json_t *report = bench_begin(b, &wall);
    json_object_set_new(report, "keyed", json_boolean(config->keyed));
    for (uint32_t i = 0; i < N_SIZE; i++) {
        ep_rows_init(&rows[i], g_sizes[i], TOPK, (uint32_t)config->d, N_EXPERT, 7 + i);
    }
    uint32_t n = list_runs(config, runs);
    bool ok = n > 0 && runs_open(runs, n, config, g_sizes[N_SIZE - 1]) && measure_all(runs, n, config, rows);
    if (ok) {
        printf("one router, top-%d of %d, d %u, messages %s\n\n%-6s %5s %5s  %12s  %s  %s\n", TOPK, N_EXPERT,
               (unsigned)config->d, config->keyed ? "keyed" : "plain", "net", "ranks", "rows", "exchange",
               "of the copy floor", "times as fast as MPI_Alltoallv");
    }
    for (uint32_t i = 0; i < n; i++) {
        if (ok) {
            run_print(&runs[i], json_object_get(report, "results"));
        }
        run_close(&runs[i]);
    }
    for (uint32_t i = 0; i < N_SIZE; i++) {
        ep_rows_fini(&rows[i]);
    }
    cm_free(runs);
    bench_end(report);
    return ok ? CLI_OK : CLI_FAILED;
}

const bench bench_ep_exchange = {"ep.exchange",
                                 "a router's rows to workers and back, against a plain copy of the bytes and "
                                 "MPI_Alltoallv",
                                 exchange_main};

/* ---- ep.latency ---- */

static const uint32_t g_slots[] = {1, TOPK};
enum { N_SLOT = 2 };

typedef struct latency_run {
    exchange_run run;
    rt_exchange *exchanges[N_SLOT];
    bench_samples us[N_SLOT], ratio[N_SLOT];
} latency_run;

static bool latency_open(latency_run *runs, uint32_t n, const bench_config *config)
{
    cm_error err = {0};
    exchange_run heads[RUNS_MAX];
    for (uint32_t i = 0; i < n; i++) {
        heads[i] = runs[i].run;
    }
    bool ok = runs_open(heads, n, config, 1);
    for (uint32_t i = 0; i < n; i++) {
        runs[i].run = heads[i];
        for (uint32_t k = 0; k < N_SLOT && ok; k++) {
            ok = ep_rig_router(heads[i].rig, 2 + k, 1, g_slots[k], &runs[i].exchanges[k], &err) == CM_OK ||
                 complain(heads[i].backend, &err) == CLI_OK;
        }
        if (ok) {
            rt_exchange_destroy(heads[i].exchange); /* the worker is not to wait for it */
            runs[i].run.exchange = NULL;
        }
    }
    return ok;
}

static bool latency_round(latency_run *l, ep_rows *rows, double ucx_us)
{
    for (uint32_t k = 0; k < N_SLOT; k++) {
        l->run.exchange = l->exchanges[k];
        if (!check_echo(&l->run, &rows[k])) {
            return false;
        }
        double us = time_exchange(&l->run, &rows[k], 2 * BLOCK_MS);
        rt_exchange_announce_idle(l->run.exchange, l->run.step);
        rt_exchange_idle(l->run.exchange, 1);
        bench_add(&l->us[k], us);
        bench_add(&l->ratio[k], us / (2 * ucx_us));
    }
    l->run.exchange = NULL;
    return true;
}

static void latency_print(const latency_run *l, json_t *results)
{
    for (uint32_t k = 0; k < N_SLOT; k++) {
        bench_summary us = bench_summarize(&l->us[k]), ratio = bench_summarize(&l->ratio[k]);
        printf("%-6s %5u  %8.2f us (%.2f .. %.2f)  %7.1f (%.1f .. %.1f)\n", l->run.backend, g_slots[k],
               us.median, us.min, us.max, ratio.median, ratio.min, ratio.max);
        json_array_append_new(results, json_pack("{s:s, s:i, s:o, s:o}", "net", l->run.backend, "slots",
                                                 (int)g_slots[k], "us", bench_summary_json(us),
                                                 "of_two_ucx_messages", bench_summary_json(ratio)));
    }
}

static bool latency_measure(latency_run *runs, uint32_t n, const bench_config *config, bench_ucx *peer,
                            json_t *report)
{
    ep_rows rows[N_SLOT];
    bench_samples ucx = {0};
    bool ok = true;
    for (uint32_t k = 0; k < N_SLOT; k++) {
        ep_rows_init(&rows[k], 1, g_slots[k], (uint32_t)config->d, N_EXPERT, 7);
    }
    for (uint32_t round = 0; round < config->rounds && ok; round++) {
        double ucx_us = bench_ucx_one_way_us(peer);
        bench_add(&ucx, ucx_us);
        for (uint32_t i = 0; i < n && ok; i++) {
            ok = latency_round(&runs[i], rows, ucx_us);
        }
    }
    for (uint32_t k = 0; k < N_SLOT; k++) {
        ep_rows_fini(&rows[k]);
    }
    bench_summary one_way = bench_summarize(&ucx);
    printf(
        "UCX, 8 bytes one way between two processes, shared memory, both spinning: %.3f us (%.3f .. %.3f)\n\n"
        "%-6s %5s  %s  %s\n",
        one_way.median, one_way.min, one_way.max, "net", "slots", "round trip of one row",
        "of two such messages");
    json_object_set_new(report, "ucx_one_way_us", bench_summary_json(one_way));
    return ok;
}

static int latency_main(const bench *b, const bench_config *config)
{
    latency_run *runs = cm_alloc(sizeof(*runs) * RUNS_MAX);
    exchange_run *heads = cm_alloc(sizeof(*heads) * RUNS_MAX);
    bench_config two = *config;
    cm_error err = {0};
    bench_ucx *peer = NULL;
    two.threads = 2; /* several processes: nothing but the wall clock */
    two.processes = (char[]){"2"};
    json_t *report = bench_begin(b, &two);
    uint32_t n = list_runs(&two, heads);
    for (uint32_t i = 0; i < n; i++) {
        runs[i].run = heads[i];
    }
    bool ok = n > 0 && (bench_ucx_open(&peer, &err) == CM_OK || complain("ucx", &err) == CLI_OK) &&
              latency_open(runs, n, &two) && latency_measure(runs, n, &two, peer, report);
    for (uint32_t i = 0; i < n; i++) {
        if (ok) {
            latency_print(&runs[i], json_object_get(report, "results"));
        }
        for (uint32_t k = 0; k < N_SLOT; k++) {
            if (runs[i].exchanges[k] != NULL) {
                rt_exchange_destroy(runs[i].exchanges[k]);
            }
        }
        run_close(&runs[i].run);
    }
    if (peer != NULL) {
        bench_ucx_close(peer);
    }
    cm_free(heads);
    cm_free(runs);
    bench_end(report);
    return ok ? CLI_OK : CLI_FAILED;
}

const bench bench_ep_latency = {
    "ep.latency", "one row to one worker and back, against two 8-byte messages of UCX", latency_main};
