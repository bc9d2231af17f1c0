#include "tools/bench/bench_cluster.h"

#include <dirent.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "tools/baleen/beside.h"
#include "tools/bench/bench_room.h"

enum { BENCH_WAIT_MS = 240000 /* of every wait: longer means that something is broken */ };

extern char **environ;

struct bench_cluster {
    const bench_cluster_options *options;
    pc_loop *loop;
    up_config up;
    cluster_options cluster_options;
    cluster *cluster;
    run_folder folder;
    cm_bytes run; /* folder */
    char *bin_dir, *store_dir, *model_dir;
    char **env;
    pc_timer *late;
    bench_until_fn until;
    void *until_ctx;
    bool ready, ended, is_late;
};

/* ---- waiting ---- */

static void bench_turn(void *arg)
{
    bench_cluster *c = arg;
    if (c->until != NULL && (c->ended || c->until(c->until_ctx))) {
        pc_loop_stop(c->loop);
    }
}

static void bench_late(void *arg)
{
    bench_cluster *c = arg;
    c->is_late = true;
    pc_loop_stop(c->loop);
}

cm_status bench_cluster_wait(bench_cluster *c, bench_until_fn fn, void *ctx, const char *what, cm_error *err)
{
    c->until = fn;
    c->until_ctx = ctx;
    c->is_late = false;
    pc_timer_set(c->late, BENCH_WAIT_MS);
    pc_loop_run(c->loop);
    pc_timer_clear(c->late);
    c->until = NULL;
    if (c->is_late) {
        return cm_error_set(err, CM_E_DEADLINE, NULL, "waited in vain for %s; the logs are in %s", what,
                            c->folder.path);
    }
    return c->ended ? cm_error_set(err, CM_E_UNAVAILABLE, NULL, "the cluster ended; the logs are in %s",
                                   c->folder.path)
                    : CM_OK;
}

static bool is_ready(void *ctx)
{
    return ((bench_cluster *)ctx)->ready;
}

static bool is_ended(void *ctx)
{
    return ((bench_cluster *)ctx)->ended;
}

/* ---- the cluster ---- */

static void on_ready(void *ctx)
{
    ((bench_cluster *)ctx)->ready = true;
}

static void on_changed(void *ctx)
{
    (void)ctx;
}

static void on_ended(void *ctx, int code)
{
    bench_cluster *c = ctx;
    (void)code;
    c->ended = true;
    pc_loop_stop(c->loop);
}

/* What is set for servers in this environment is another cluster's. */
static void bench_set_env(bench_cluster *c)
{
    size_t n = 0, kept = 0;
    while (environ[n] != NULL) {
        n++;
    }
    c->env = cm_alloc(sizeof(*c->env) * (n + c->options->n_env + 1));
    for (size_t i = 0; i < n; i++) {
        if (strncmp(environ[i], "BALEEN_", 7) != 0) {
            c->env[kept++] = cm_strdup(environ[i]);
        }
    }
    for (size_t i = 0; i < c->options->n_env; i++) {
        c->env[kept++] = cm_strdup(c->options->env[i]);
    }
}

static void bench_set_options(bench_cluster *c)
{
    const bench_cluster_options *o = c->options;
    c->up = (up_config){.model = c->model_dir,
                        .scripted_model = (char *)(uintptr_t)o->scripted_model,
                        .http = "127.0.0.1:0",
                        .grpc = "127.0.0.1:0",
                        .device = "cpu",
                        .net = "shm",
                        .log_level = "warn",
                        .failpoints = (char *)(uintptr_t)o->failpoints,
                        .tls = "",
                        .workers = o->workers,
                        .routers = 1,
                        .threads = o->threads,
                        .ready_ms = BENCH_WAIT_MS / 2,
                        .drain_ms = 5000,
                        .no_restart = true};
    c->cluster_options = (cluster_options){.config = &c->up,
                                           .run_dir = c->folder.path,
                                           .store_dir = c->store_dir,
                                           .bin_dir = c->bin_dir,
                                           .model_dir = c->model_dir,
                                           .model_name = "bench",
                                           .tls_dir = "",
                                           .env = c->env,
                                           .ready = on_ready,
                                           .changed = on_changed,
                                           .ended = on_ended,
                                           .ctx = c};
}

cm_status bench_cluster_start(const bench_cluster_options *options, bench_cluster **out, cm_error *err)
{
    char real[PATH_MAX];
    bench_cluster *c = cm_alloc(sizeof(*c));
    *c = (bench_cluster){.options = options, .folder = {.lock = -1}};
    *out = c;
    cm_bytes_init(&c->run, 0);
    cm_bytes_printf(&c->run, "%s/%s", bench_room(), BENCH_RUN_FOLDER); /* one cluster after another */
    if (pc_loop_create(&c->loop) != CM_OK) {
        return cm_error_set(err, CM_E_IO, NULL, "no event loop");
    }
    c->late = pc_timer_create(c->loop, bench_late, c);
    pc_loop_before_sleep(c->loop, bench_turn, c);
    if (realpath(options->model, real) == NULL) {
        return cm_error_set(err, CM_E_NOT_FOUND, "model", "no folder %s: give one with --model DIR",
                            options->model);
    }
    c->model_dir = cm_strdup(real);
    CM_TRY(beside_programs(&c->bin_dir, err));
    CM_TRY(run_folder_open(cm_bytes_text(&c->run), &c->folder, err));
    CM_TRY(run_folder_empty(&c->folder, "store", &c->store_dir, err));
    bench_set_env(c);
    bench_set_options(c);
    CM_TRY(cluster_create(c->loop, &c->cluster_options, &c->cluster, err));
    return bench_cluster_wait(c, is_ready, c, "the cluster to be ready", err);
}

void bench_cluster_stop(bench_cluster *c)
{
    cm_error err = {0};
    if (c == NULL) {
        return;
    }
    if (c->cluster != NULL) {
        cluster_drain(c->cluster);
        while (!c->ended && bench_cluster_wait(c, is_ended, c, "the cluster to end", &err) == CM_E_DEADLINE) {
            cluster_kill(c->cluster);
        }
        cluster_destroy(c->cluster);
    }
    run_folder_close(&c->folder);
    cm_bytes_fini(&c->run);
    for (size_t i = 0; c->env != NULL && c->env[i] != NULL; i++) {
        cm_free(c->env[i]);
    }
    cm_free(c->env);
    cm_free(c->model_dir);
    cm_free(c->store_dir);
    cm_free(c->bin_dir);
    if (c->loop != NULL) {
        pc_timer_destroy(c->late);
        pc_loop_destroy(c->loop);
    }
    cm_free(c);
}

pc_loop *bench_cluster_loop(const bench_cluster *c)
{
    return c->loop;
}

cluster *bench_cluster_processes(const bench_cluster *c)
{
    return c->cluster;
}

/* ---- /proc ---- */

static bool read_file(const char *path, char *out, size_t cap)
{
    FILE *file = fopen(path, "re");
    size_t n = file != NULL ? fread(out, 1, cap - 1, file) : 0;
    out[n] = '\0';
    if (file != NULL) {
        fclose(file);
    }
    return n > 0;
}

/* schedstat counts nanoseconds, where stat has ticks of 10 ms; it is each thread's own. */
double bench_process_cpu_s(int pid)
{
    char path[128], text[128];
    double sum_ns = 0;
    struct dirent *entry;
    snprintf(path, sizeof(path), "/proc/%d/task", pid);
    DIR *tasks = opendir(path);
    while (tasks != NULL && (entry = readdir(tasks)) != NULL) {
        unsigned long long ns;
        snprintf(path, sizeof(path), "/proc/%d/task/%.20s/schedstat", pid, entry->d_name);
        if (entry->d_name[0] != '.' && read_file(path, text, sizeof(text)) &&
            sscanf(text, "%llu", &ns) == 1) {
            sum_ns += (double)ns;
        }
    }
    if (tasks != NULL) {
        closedir(tasks);
    }
    return 1e-9 * sum_ns;
}

uint64_t bench_process_rss(int pid)
{
    char path[64], text[4096];
    unsigned long long kb = 0;
    snprintf(path, sizeof(path), "/proc/%d/status", pid);
    const char *at = read_file(path, text, sizeof(text)) ? strstr(text, "VmRSS:") : NULL;
    return at != NULL && sscanf(at, "VmRSS: %llu", &kb) == 1 ? kb * 1024 : 0;
}
