/* A cluster that a benchmark starts for itself, with the client's side of the loop: started and waited for,
 * loaded, measured from outside through /proc, drained. Used by serve.stream and serve.model. Thread: the
 * main thread's; between the calls nothing runs here. */
#pragma once
#include "tools/baleen/cluster.h"
#include "tools/baleen/run_folder.h"
#include "tools/bench/stream_load.h"

#define BENCH_RUN_FOLDER "run" /* in the benchmark's room: logs of the cluster */

typedef struct bench_cluster bench_cluster;

typedef struct bench_cluster_options {
    const char *model;          /* folder */
    const char *scripted_model; /* "" for a real one */
    const char *failpoints;
    uint32_t workers, threads;
    const char *const *env; /* [n_env] "BALEEN_NAME=VALUE": bounds of the servers that would be in the way */
    uint32_t n_env;
} bench_cluster_options;

/* Ready when it returns: /ready says so. options and what they point to are kept. On failure out is still to
 * be stopped. */
CM_MUST_CHECK cm_status bench_cluster_start(const bench_cluster_options *options, bench_cluster **out,
                                            cm_error *err);
/* Drains it; NULL is fine. */
void bench_cluster_stop(bench_cluster *c);

/* Runs the loop until fn says so, which is asked after every turn. CM_E_DEADLINE when that takes minutes,
 * CM_E_UNAVAILABLE when the cluster ended. */
typedef bool (*bench_until_fn)(void *ctx);
CM_MUST_CHECK cm_status bench_cluster_wait(bench_cluster *c, bench_until_fn fn, void *ctx, const char *what,
                                           cm_error *err);

pc_loop *bench_cluster_loop(const bench_cluster *c);
cluster *bench_cluster_processes(const bench_cluster *c);

/* ---- of one process, from /proc; 0 when it is gone ---- */

double bench_process_cpu_s(int pid); /* of all its threads */
uint64_t bench_process_rss(int pid); /* bytes */
