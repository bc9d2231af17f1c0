/* ep.routers: whether expert weights are read once for the rows of all routers. One worker computes real
 * experts; routers in processes of their own go through the layers of step after step, with a time between
 * two layers as their dense part would take it on a device of its own. */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/base/clock.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "tools/bench/bench.h"
#include "tools/baleen/cli.h"
#include "tools/bench/ep_rig.h"

enum {
    ROUTERS_MAX = 4,
    ROWS = 6, /* of each router's step: each expert of a layer once, a few twice */
    THINK_US = 400,
    RUN_MS = 1500,
    WARM_STEPS = 4,
};

static const ep_shape g_shape = {.d = 1024, .inner = 512, .n_layer = 8, .n_expert = 32, .topk = 6};
static const uint32_t g_routers[] = {1, 2, 4};
enum { N_CASE = sizeof(g_routers) / sizeof(g_routers[0]) };

/* How long the routers' dense parts take; those of one kind differ by their jitter only. */
typedef enum pace { PACE_ALIKE, PACE_UNLIKE, N_PACE } pace;
static const char *const g_paces[N_PACE] = {"alike", "unlike"};

typedef struct router_process {
    pid_t pid;
    int go, done;
} router_process;

/* The dense part, on another device: this machine's cores are free meanwhile. A tenth more or less each time.
 */
static void think(uint32_t us, uint64_t seed, uint64_t n)
{
    double scale = 0.9 + 0.2 * cm_rng_uniform(seed, n, 0);
    struct timespec at_most = {.tv_nsec = (long)(1000.0 * us * scale)};
    ppoll(NULL, 0, &at_most, NULL);
}

/* Steps until until_ms; how many. */
static uint64_t run_steps(rt_exchange *x, ep_rows *rows, uint32_t id, uint32_t think_us, uint64_t until_ms,
                          uint64_t n_min)
{
    static uint64_t step;
    uint64_t n = 0;
    for (; n < n_min || cm_now_ms() < until_ms; n++) {
        step++;
        for (uint32_t layer = 0; layer < g_shape.n_layer; layer++) {
            think(think_us, id, step * g_shape.n_layer + layer);
            if (ep_rows_run(rows, x, step, layer) != CM_OK) {
                return 0;
            }
        }
    }
    return n;
}

_Noreturn static void router_main(const ep_rig *rig, uint32_t id, uint32_t think_us, int go, int done)
{
    rt_exchange *x;
    ep_rows rows;
    cm_error err = {0};
    char word;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    ep_rows_init(&rows, ROWS, g_shape.topk, g_shape.d, g_shape.n_expert, id);
    for (uint32_t i = 0; i < ROWS * g_shape.topk; i++) {
        rows.experts[i] = (int32_t)((i + id) % g_shape.n_expert);
    }
    if (ep_rig_router(rig, id, ROWS, g_shape.topk, &x, &err) == CM_OK && write(done, "r", 1) == 1 &&
        read(go, &word, 1) == 1) {
        (void)run_steps(x, &rows, id, think_us, 0, WARM_STEPS);
        bool ok = write(done, "w", 1) == 1;
        uint64_t n = run_steps(x, &rows, id, think_us, cm_now_ms() + RUN_MS, 1);
        ok = ok && write(done, &n, sizeof(n)) == sizeof(n);
        ok = ok && read(go, &word, 1) == 1; /* its link stays: an end is no part of the measurement */
        rt_exchange_destroy(x);             /* the worker hears a goodbye */
    } else {
        fprintf(stderr, "router %u: %s\n", id, err.text);
    }
    for (;;) {
        raise(SIGKILL);
    }
}

static bool router_start(router_process *r, const ep_rig *rig, uint32_t id, uint32_t think_us)
{
    int go[2], done[2];
    if (pipe(go) != 0 || pipe(done) != 0) {
        return false;
    }
    fflush(NULL);
    r->pid = fork();
    if (r->pid == 0) {
        close(go[1]);
        close(done[0]);
        router_main(rig, id, think_us, go[0], done[1]);
    }
    close(go[0]);
    close(done[1]);
    r->go = go[1];
    r->done = done[0];
    return r->pid > 0;
}

static void router_end(const router_process *r)
{
    if (r->pid > 0) {
        if (write(r->go, "e", 1) != 1) {
            kill(r->pid, SIGKILL);
        }
        waitpid(r->pid, NULL, 0);
        close(r->go);
        close(r->done);
    }
}

static bool all_say(const router_process *routers, uint32_t n, void *out, size_t n_bytes)
{
    bool ok = true;
    for (uint32_t i = 0; i < n; i++) {
        ok = ok && read(routers[i].done, (uint8_t *)out + i * n_bytes, n_bytes) == (ssize_t)n_bytes;
    }
    return ok;
}

typedef struct routers_result {
    double reads;         /* of all experts of a layer, for each step and layer of the fastest router */
    double bytes_per_row; /* and slot */
    double steps_s;       /* of all routers */
} routers_result;

static bool run_case(ep_rig *rig, uint32_t n, pace p, routers_result *out)
{
    router_process routers[ROUTERS_MAX] = {0};
    uint64_t steps[ROUTERS_MAX] = {0}, most = 0, sum = 0;
    char words[ROUTERS_MAX];
    ep_counts before = {0}, after = {0};
    cm_error err = {0};
    bool ok = true;
    for (uint32_t i = 0; i < n && ok; i++) {
        ok = router_start(&routers[i], rig, 1 + i, p == PACE_UNLIKE ? THINK_US * (2 + i) / 2 : THINK_US);
    }
    ok = ok && all_say(routers, n, words, 1);
    for (uint32_t i = 0; i < n && ok; i++) {
        ok = write(routers[i].go, "g", 1) == 1;
    }
    ok = ok && all_say(routers, n, words, 1) && ep_rig_counts(rig, &before, &err) == CM_OK;
    ok = ok && all_say(routers, n, steps, sizeof(steps[0])) && ep_rig_counts(rig, &after, &err) == CM_OK;
    for (uint32_t i = 0; i < n; i++) {
        router_end(&routers[i]);
        most = steps[i] > most ? steps[i] : most;
        sum += steps[i];
    }
    double bytes = (double)(after.expert_bytes - before.expert_bytes);
    double layer_bytes = (double)ep_rig_expert_bytes(rig) * g_shape.n_expert;
    *out = (routers_result){bytes / layer_bytes / (double)(most * g_shape.n_layer),
                            bytes / (double)(after.rows - before.rows), 1000.0 / RUN_MS * (double)sum};
    return ok && most > 0;
}

typedef struct routers_samples {
    bench_samples reads, bytes, steps;
} routers_samples;

static void case_print(uint32_t n, pace p, const routers_samples *s, json_t *results)
{
    bench_summary reads = bench_summarize(&s->reads), bytes = bench_summarize(&s->bytes),
                  steps = bench_summarize(&s->steps);
    printf("%-7s %7u  %5.2f (%.2f .. %.2f)  %12.0f  %10.1f\n", g_paces[p], n, reads.median, reads.min,
           reads.max, bytes.median, steps.median);
    json_array_append_new(results,
                          json_pack("{s:s, s:i, s:o, s:o, s:o}", "pace", g_paces[p], "routers", (int)n,
                                    "reads", bench_summary_json(reads), "bytes_per_row",
                                    bench_summary_json(bytes), "steps_s", bench_summary_json(steps)));
}

static int routers_main(const bench *b, const bench_config *config)
{
    static routers_samples samples[N_PACE][N_CASE];
    bench_config wall = *config;
    cm_error err = {0};
    ep_rig *rig = NULL;
    wall.threads = 2; /* several processes: nothing but the wall clock */
    json_t *report = bench_begin(b, &wall);
    ep_options options = {.shape = g_shape, .backend = "shm", .n_worker = 1, .window_us = 200};
    bool ok = ep_rig_create(&options, &rig, &err) == CM_OK;
    memset(samples, 0, sizeof(samples));
    for (uint32_t round = 0; round < config->rounds && ok; round++) {
        for (uint32_t k = 0; k < N_PACE * N_CASE && ok; k++) {
            routers_result r;
            routers_samples *s = &samples[k / N_CASE][k % N_CASE];
            ok = run_case(rig, g_routers[k % N_CASE], (pace)(k / N_CASE), &r);
            bench_add(&s->reads, r.reads);
            bench_add(&s->bytes, r.bytes_per_row);
            bench_add(&s->steps, r.steps_s);
        }
    }
    if (ok) {
        printf("%u rows a router, top-%u of %u experts, %u us of dense part between layers (unlike: more for "
               "each)\n\n"
               "%-7s %7s  %s  %s  %s\n",
               ROWS, g_shape.topk, g_shape.n_expert, THINK_US, "pace", "routers",
               "reads of a layer's experts", "bytes a row", "steps a second");
    }
    for (uint32_t k = 0; k < N_PACE * N_CASE && ok; k++) {
        case_print(g_routers[k % N_CASE], (pace)(k / N_CASE), &samples[k / N_CASE][k % N_CASE],
                   json_object_get(report, "results"));
    }
    if (!ok) {
        fprintf(stderr, "%s: %s\n", b->name, err.text);
    }
    if (rig != NULL) {
        ep_rig_destroy(rig);
    }
    bench_end(report);
    return ok ? CLI_OK : CLI_FAILED;
}

const bench bench_ep_routers = {
    "ep.routers", "expert weights read for each step, by one worker, for 1, 2 and 4 routers", routers_main};
