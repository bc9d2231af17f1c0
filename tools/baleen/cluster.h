/* A cluster of processes on this machine: started in order, supervised, drained in order. Used by `baleen
 * up`. Coordinator first; when it listens, everything else; ready when every process listens and the
 * gateway's /ready says so. From then on a process that fails is started again, at its old addresses, after a
 * pause that grows while it fails; one that ends in order (it was drained) stays away. Speaks to the person
 * on stderr. Thread: the loop's. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/bytes.h"
#include "common/base/status.h"
#include "common/proc/loop.h"

typedef struct cluster cluster;

typedef struct up_config {
    char *model, *scripted_model, *http, *grpc, *run, *name, *device, *net, *log_level, *failpoints, *tls;
    uint64_t workers, routers, threads, seed, ready_ms, drain_ms;
    bool no_restart;
} up_config;

typedef struct cluster_options {
    const up_config *config;
    const char *run_dir;    /* logs go there */
    const char *store_dir;  /* of the coordinator's log; "" leaves it to the environment */
    const char *bin_dir;    /* of the servers' programs */
    const char *model_dir;  /* absolute */
    const char *model_name; /* what clients ask for */
    const char *tls_dir;    /* absolute, of the certificates; "" = plain */
    char *const *env;       /* of the children */
    void (*ready)(void *ctx);
    void (*changed)(void *ctx); /* while ready: a process is gone, or has come, and the cluster goes on */
    void (*ended)(void *ctx,
                  int code); /* no process is left; exit code. Not before cluster_create has returned */
    void *ctx;
} cluster_options;

/* options and what they point to are kept. An error when the first process cannot be started. */
CM_MUST_CHECK cm_status cluster_create(pc_loop *loop, const cluster_options *options, cluster **cluster_out,
                                       cm_error *err);
/* Gateway, routers, coordinator, workers: each is asked, given drain_ms and a little more, then killed. ended
 * follows, with code 0 when all of them left in order. A second call changes nothing. */
void cluster_drain(cluster *self);
/* For people in a hurry: kills what still runs. ended follows, with code 1. */
void cluster_kill(cluster *self);
/* While ready: so many workers shall run. Missing ones are started; of too many the youngest are asked to
 * leave, which they do when the others have their experts. */
void cluster_scale(cluster *self, uint32_t n_workers);
/* After ended. */
void cluster_destroy(cluster *self);

/* ---- when ready ---- */

const char *cluster_scheme(const cluster *self); /* of cluster_http: "http" or "https" */
const char *cluster_http(const cluster *self);
const char *cluster_grpc(const cluster *self);
const char *cluster_coordinator(const cluster *self);
/* Process ids of the workers; how many there are, at most n_max. */
uint32_t cluster_worker_pids(const cluster *self, uint32_t *pids_out, uint32_t n_max);
/* Of all that serve: routers, workers, gateway. */
uint32_t cluster_serving_pids(const cluster *self, uint32_t *pids_out, uint32_t n_max);
int cluster_gateway_pid(const cluster *self); /* 0: it does not run */
/* Appends what goes into cluster.json: addresses, model, the processes that live. */
void cluster_describe(const cluster *self, cm_bytes *json);
/* Appends "coordinator 123, router-0 124, ...". */
void cluster_list(const cluster *self, cm_bytes *text);
