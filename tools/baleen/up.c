/* baleen up: a whole cluster on this machine, in the foreground. */
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <unistd.h>

#include "common/base/bytes.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/model/geometry.h"
#include "tools/baleen/beside.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/cluster.h"
#include "tools/baleen/launcher.h"
#include "tools/baleen/run_folder.h"
#include "tools/baleen/verbs.h"

extern char **environ;

static const cm_cfg_field g_fields[] = {
    {"workers", "3", "processes that hold experts", CM_CFG_UINT(up_config, workers, 1, 256)},
    {"routers", "1", "processes that run sequences", CM_CFG_UINT(up_config, routers, 1, 64)},
    {"model", "", "folder of the checkpoint; the model nano when none is given",
     CM_CFG_STRING(up_config, model)},
    {"scripted_model", "",
     "for tests of clients: a name; no model runs and no workers: every answer is the text of the last user "
     "or tool message, control spellings recognised",
     CM_CFG_STRING(up_config, scripted_model)},
    {"http", "127.0.0.1:0", "address of the HTTP interface; port 0 takes a free one",
     CM_CFG_STRING(up_config, http)},
    {"grpc", "127.0.0.1:0", "address of the gRPC interface; port 0 takes a free one",
     CM_CFG_STRING(up_config, grpc)},
    {"run", "", "folder for logs and cluster.json; a fresh one in $TMPDIR or /tmp when none is given",
     CM_CFG_STRING(up_config, run)},
    {"name", "", "name of the model for clients; the name of its folder when none is given",
     CM_CFG_STRING(up_config, name)},
    {"device", "cpu", "what computes", CM_CFG_CHOICE(up_config, device, "cpu|ref")},
    {"net", "shm",
     "how rows and token ids travel: shm, memory of this machine, for processes of one user; ucx, TCP, for a "
     "cluster that processes of other machines or users are to join",
     CM_CFG_CHOICE(up_config, net, "shm|ucx")},
    {"threads", "1", "compute threads of each router and worker", CM_CFG_UINT(up_config, threads, 1, 1024)},
    {"tls", "",
     "folder of certificates, made by baleen certs: the coordinator's channel gets mutual TLS; plain when "
     "none is given",
     CM_CFG_STRING(up_config, tls)},
    {"log_level", "info", "least severe lines in the logs",
     CM_CFG_CHOICE(up_config, log_level, "error|warn|info|debug")},
    {"ready_ms", "60s", "how long the cluster may take to serve",
     CM_CFG_MS(up_config, ready_ms, 100, 86400000)},
    {"drain_ms", "30s", "how long running requests may take to finish when asked to stop",
     CM_CFG_MS(up_config, drain_ms, 0, 3600000)},
    {"no_restart", "off",
     "a process that fails stays away; else it is started again, as a unit file would do",
     CM_CFG_BOOL(up_config, no_restart)},
    {"failpoints", "", "tests only: name:odds,.. of failpoints to arm in every process",
     CM_CFG_STRING(up_config, failpoints)},
    {"seed", "0", "tests only: seed of armed failpoints", CM_CFG_UINT(up_config, seed, 0, UINT64_MAX)},
};

static const cm_cfg_table g_table = {
    .program = "baleen up",
    .summary = "runs a whole cluster on this machine until Ctrl-C; other options of the servers: from the "
               "environment",
    .operands = "",
    .fields = g_fields,
    .n_fields = sizeof(g_fields) / sizeof(g_fields[0]),
};

typedef struct up {
    up_config config;
    pc_loop *loop;
    run_folder folder;
    cluster *cluster;
    launcher *launcher; /* while the cluster serves */
    pc_tls *tls;        /* the launcher's; NULL: plain */
    cluster_options options;
    char *bin_dir, *model_dir, *store_dir, *tls_dir;
    char **env;
    bool interrupted;
    int code;
} up;

/* ---- what the children get ---- */

/* Our own options go to them as flags, if at all; the other variables are theirs. */
static bool env_is_ours(const char *variable)
{
    static const char prefix[] = "BALEEN_";
    const char *name = variable + sizeof(prefix) - 1;
    if (strncmp(variable, prefix, sizeof(prefix) - 1) != 0) {
        return false;
    }
    for (size_t i = 0; i < g_table.n_fields; i++) {
        size_t n = strlen(g_fields[i].name);
        if (strncasecmp(name, g_fields[i].name, n) == 0 && name[n] == '=') {
            return true;
        }
    }
    return false;
}

static char **env_for_children(void)
{
    size_t n = 0, kept = 0;
    while (environ[n] != NULL) {
        n++;
    }
    char **env = cm_alloc(sizeof(*env) * (n + 1));
    for (size_t i = 0; i < n; i++) {
        if (!env_is_ours(environ[i])) {
            env[kept++] = environ[i];
        }
    }
    return env;
}

static cm_status find_model(up *self, cm_error *err)
{
    md_geometry geometry;
    char real[PATH_MAX];
    if (self->config.model[0] == '\0') {
        CM_TRY(beside_model("nano", &self->model_dir, err));
    } else if (realpath(self->config.model, real) == NULL) {
        return cm_error_set(err, CM_E_NOT_FOUND, "model",
                            "no model in %s: %s; give its folder with --model DIR", self->config.model,
                            strerror(errno));
    } else {
        self->model_dir = cm_strdup(real);
    }
    return md_geometry_load(self->model_dir, &geometry, err); /* rather now than from every process' log */
}

static cm_status find_certs(up *self, cm_error *err)
{
    char real[PATH_MAX] = "";
    if (self->config.tls[0] != '\0' && realpath(self->config.tls, real) == NULL) {
        return cm_error_set(err, CM_E_NOT_FOUND, "tls",
                            "no certificates in %s: %s; make them with 'baleen certs %s'", self->config.tls,
                            strerror(errno), self->config.tls);
    }
    self->tls_dir = cm_strdup(real);
    return real[0] != '\0' ? cli_open_certs(real, &self->tls, err) : CM_OK;
}

/* ---- the cluster's words ---- */

static void up_publish(up *self)
{
    cm_error err = {0};
    cm_bytes json;
    cm_bytes_init(&json, 0);
    cluster_describe(self->cluster, &json);
    if (run_folder_publish(&self->folder, cm_bytes_text(&json), &err) != CM_OK) {
        cli_complain(&g_table, CLI_FAILED, "%s", err.text); /* the cluster serves all the same */
    }
    cm_bytes_fini(&json);
}

static uint32_t up_pids(void *ctx, uint32_t *pids_out, uint32_t n_max)
{
    return cluster_worker_pids(((up *)ctx)->cluster, pids_out, n_max);
}

static void up_order(void *ctx, uint32_t n_workers)
{
    cluster_scale(((up *)ctx)->cluster, n_workers);
}

static void up_ready(void *ctx)
{
    up *self = ctx;
    cm_bytes list;
    self->launcher = launcher_create(self->loop, cluster_coordinator(self->cluster), self->tls,
                                     &(launcher_events){.pids = up_pids, .order = up_order, .ctx = self});
    up_publish(self); /* before the line: who reads it may look */
    cm_bytes_init(&list, 0);
    cluster_list(self->cluster, &list);
    printf("baleen is ready: %s://%s grpc %s model %s processes %s\n", cluster_scheme(self->cluster),
           cluster_http(self->cluster), cluster_grpc(self->cluster), self->options.model_name,
           cm_bytes_text(&list));
    fflush(stdout);
    cm_bytes_fini(&list);
}

static void up_changed(void *ctx)
{
    up *self = ctx;
    up_publish(self);
    launcher_changed(self->launcher);
}

static void up_ended(void *ctx, int code)
{
    up *self = ctx;
    self->code = code;
    pc_loop_stop(self->loop);
}

/* A supervisor may ask twice and means the same. */
static void up_terminate(void *arg)
{
    cluster_drain(((up *)arg)->cluster);
}

/* A person who presses Ctrl-C again does not want to wait. */
static void up_interrupt(void *arg)
{
    up *self = arg;
    if (self->interrupted) {
        cluster_kill(self->cluster);
    } else {
        self->interrupted = true;
        cluster_drain(self->cluster);
    }
}

static void up_watch_signals(up *self)
{
    struct sigaction ignore = {.sa_handler = SIG_IGN};
    sigemptyset(&ignore.sa_mask);
    sigaction(SIGPIPE, &ignore, NULL); /* who reads our lines may go away before the cluster does */
    pc_loop_on_signal(self->loop, SIGTERM, up_terminate, self);
    pc_loop_on_signal(self->loop, SIGINT, up_interrupt, self);
}

/* ---- life ---- */

static const char *up_model_name(const up *self)
{
    if (self->config.scripted_model[0] != '\0') {
        return self->config.scripted_model;
    }
    return self->config.name[0] != '\0' ? self->config.name : strrchr(self->model_dir, '/') + 1;
}

static cm_status up_run(up *self, cm_error *err)
{
    self->options = (cluster_options){
        .config = &self->config,
        .run_dir = self->folder.path,
        .store_dir = self->store_dir,
        .bin_dir = self->bin_dir,
        .model_dir = self->model_dir,
        .model_name = up_model_name(self),
        .tls_dir = self->tls_dir,
        .env = self->env,
        .ready = up_ready,
        .changed = up_changed,
        .ended = up_ended,
        .ctx = self,
    };
    fprintf(stderr, "baleen up: run folder %s (logs, cluster.json)\n", self->folder.path);
    CM_TRY(cluster_create(self->loop, &self->options, &self->cluster, err));
    up_watch_signals(self);
    pc_loop_run(self->loop);
    launcher_destroy(self->launcher);
    cluster_destroy(self->cluster);
    return CM_OK;
}

/* A coordinator that is started again must know its cluster. Unless the user keeps the log elsewhere it lies
 * in the run folder and begins anew with each cluster. */
static cm_status find_store(up *self, cm_error *err)
{
    const char *elsewhere = cm_env_get("BALEEN_STORE");
    if (elsewhere != NULL && elsewhere[0] != '\0') {
        self->store_dir = cm_strdup("");
        return CM_OK;
    }
    return run_folder_empty(&self->folder, "store", &self->store_dir, err);
}

static cm_status up_prepare(up *self, cm_error *err)
{
    CM_TRY(beside_programs(&self->bin_dir, err));
    CM_TRY(find_model(self, err));
    CM_TRY(find_certs(self, err));
    self->env = env_for_children();
    if (pc_loop_create(&self->loop) != CM_OK) {
        return cm_error_set(err, CM_E_IO, NULL, "no event loop");
    }
    return run_folder_open(self->config.run, &self->folder, err);
}

int verb_up(int argc, char **argv)
{
    up self = {.code = CLI_OK};
    cm_error err = {0};
    /* variables that we do not know are the servers' */
    cm_log_setup(&(cm_log_options){.level = CM_LOG_ERROR, .fd = STDERR_FILENO});
    int code = cli_begin(&g_table, &self.config, argc, argv, NULL, 0, NULL);
    if (code >= 0) {
        return code;
    }
    cm_status status = up_prepare(&self, &err);
    if (status == CM_OK) {
        status = find_store(&self, &err);
        if (status == CM_OK) {
            status = up_run(&self, &err);
        }
        run_folder_close(&self.folder);
    }
    code = status == CM_OK ? self.code : cli_fail(&g_table, &err);
    if (self.loop != NULL) {
        pc_loop_destroy(self.loop);
    }
    cm_free(self.env);
    cm_free(self.model_dir);
    cm_free(self.tls_dir);
    pc_tls_close(self.tls);
    cm_free(self.bin_dir);
    cm_free(self.store_dir);
    cm_cfg_free(&g_table, &self.config);
    return code;
}
