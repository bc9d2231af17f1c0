#include "tools/baleen/cluster.h"

#include <errno.h>
#include <jansson.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/mem.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/ready_probe.h"
#include "tools/baleen/spawn.h"

enum {
    CLUSTER_TICK_MS = 50,
    CLUSTER_KILL_MS = 5000,     /* beyond what a process was told it may take */
    CLUSTER_AGAIN_MIN_MS = 200, /* before a process that failed is started again; doubled each time */
    CLUSTER_AGAIN_MAX_MS = 10000,
    CLUSTER_STEADY_MS = 5000, /* one that ran for so long has its failures forgotten */
    CLUSTER_READY_LINE_MAX = 4096,
    CLUSTER_ADDRESS_BYTES = 128,
};

typedef enum cluster_role {
    CLUSTER_COORDINATOR,
    CLUSTER_ROUTER,
    CLUSTER_WORKER,
    CLUSTER_GATEWAY,
    CLUSTER_ROLES,
} cluster_role;

static const char *const g_role_names[CLUSTER_ROLES] = {"coordinator", "router", "worker", "gateway"};

/* Requests end first; workers last, who then have nobody to wait for. */
static const cluster_role g_drain_order[CLUSTER_ROLES] = {CLUSTER_GATEWAY, CLUSTER_ROUTER,
                                                          CLUSTER_COORDINATOR, CLUSTER_WORKER};

typedef enum cluster_state { CLUSTER_STARTING, CLUSTER_READY, CLUSTER_DRAINING, CLUSTER_ENDED } cluster_state;

typedef struct cluster_child {
    cluster *cluster;
    cluster_role role;
    uint32_t index;
    char name[32]; /* "worker-0"; of its log too */
    pid_t pid;     /* 0: not running */
    bool leaving;  /* asked to: it is not counted on any more */
    bool over;     /* ended in order, or for good: not started again */
    uint64_t start_ms;
    uint64_t again_ms; /* pause before it is started again */
    pc_timer *again;
    int ready_fd; /* -1: closed */
    struct event *ready_event;
    cm_bytes ready_line; /* so far */
    bool listens;
    char address[CLUSTER_ADDRESS_BYTES]; /* "" for gateways, which have two */
} cluster_child;

struct cluster {
    pc_loop *loop;
    const cluster_options *options;
    cluster_state state;
    cluster_child **children; /* the coordinator first */
    uint32_t n_children;
    char http[CLUSTER_ADDRESS_BYTES], grpc[CLUSTER_ADDRESS_BYTES];
    bool secured; /* both speak TLS */
    ready_probe *probe;
    pc_timer *tick, *kill_timer;
    uint64_t begin_ms;
    bool watch_ends; /* once stopped, every process must end in order: it was ready, and nobody is in a hurry
                      */
    uint32_t drain_stage; /* in g_drain_order */
    int code;
};

/* ---- words to the person ---- */

static void cluster_say(const char *fmt, ...) CM_PRINTF(1, 2);
static void cluster_say(const char *fmt, ...)
{
    va_list args;
    cli_progress_clear();
    fputs("baleen up: ", stderr);
    va_start(args, fmt);
    vfprintf(stderr, fmt, args);
    va_end(args);
    fputc('\n', stderr);
}

static void cluster_fail(cluster *self, const char *fmt, ...) CM_PRINTF(2, 3);
static void cluster_fail(cluster *self, const char *fmt, ...)
{
    char text[1024];
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    cluster_say("%s", text);
    self->code = CLI_FAILED;
    cluster_drain(self);
}

/* ---- small questions ---- */

static void child_log_path(const cluster_child *child, cm_bytes *path_out)
{
    cm_bytes_init(path_out, 0);
    cm_bytes_printf(path_out, "%s/%s.log", child->cluster->options->run_dir, child->name);
}

static uint32_t cluster_count(const cluster *self, cluster_role role, bool only_listening)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < self->n_children; i++) {
        const cluster_child *child = self->children[i];
        n += child->role == role && child->pid != 0 && (child->listens || !only_listening);
    }
    return n;
}

/* A script has no experts to hold. */
static uint64_t cluster_workers(const cluster *self)
{
    const up_config *config = self->options->config;
    return config->scripted_model[0] != '\0' ? 0 : config->workers;
}

/* Those that run or will run again. */
static uint32_t cluster_count_alive(const cluster *self, cluster_role role)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < self->n_children; i++) {
        n += self->children[i]->role == role && !self->children[i]->over && !self->children[i]->leaving;
    }
    return n;
}

static bool cluster_all_listen(const cluster *self)
{
    for (uint32_t i = 0; i < self->n_children; i++) {
        if (!self->children[i]->listens) {
            return false;
        }
    }
    return true;
}

/* ---- starting ---- */

static void args_for_role(const cluster *self, const cluster_child *child, spawn_args *args)
{
    const cluster_options *options = self->options;
    const up_config *config = options->config;
    spawn_args_add(args, "%s/baleen-%s", options->bin_dir, g_role_names[child->role]);
    spawn_args_add(args, "--log-level=%s", config->log_level);
    spawn_args_add(args, "--failpoints=%s", config->failpoints);
    spawn_args_add(args, "--seed=%llu", (unsigned long long)config->seed);
    if (options->tls_dir[0] != '\0') {
        spawn_args_add(args, "--tls-ca=%s/ca.crt", options->tls_dir);
        spawn_args_add(args, "--tls-cert=%s/%s.crt", options->tls_dir, g_role_names[child->role]);
        spawn_args_add(args, "--tls-key=%s/%s.key", options->tls_dir, g_role_names[child->role]);
    }
    if (child->role == CLUSTER_COORDINATOR) {
        spawn_args_add(args, "--workers-min=%llu", (unsigned long long)config->workers);
        if (options->store_dir[0] != '\0') {
            spawn_args_add(args, "--store=%s", options->store_dir);
        }
        if (child->address[0] != '\0') {
            spawn_args_add(args, "--address=%s", child->address); /* where the others look for it */
        }
        return;
    }
    spawn_args_add(args, "--coordinator=%s", self->children[0]->address);
    spawn_args_add(args, "--model=%s", options->model_dir);
    spawn_args_add(args, "--net=%s", config->net);
    if (child->role != CLUSTER_WORKER) {
        spawn_args_add(args, "--scripted-model=%s", config->scripted_model);
    }
    if (child->role == CLUSTER_GATEWAY) {
        spawn_args_add(args, "--http=%s", self->http[0] != '\0' ? self->http : config->http);
        spawn_args_add(args, "--grpc=%s", self->grpc[0] != '\0' ? self->grpc : config->grpc);
        spawn_args_add(args, "--model-name=%s", options->model_name);
    } else {
        spawn_args_add(args, "--device=%s", config->device);
        spawn_args_add(args, "--threads=%llu", (unsigned long long)config->threads);
    }
    if (child->role != CLUSTER_WORKER) {
        spawn_args_add(args, "--drain-ms=%llu", (unsigned long long)config->drain_ms);
    }
}

static void child_readable(evutil_socket_t fd, short what, void *arg);

static cm_status child_start(cluster_child *child, cm_error *err)
{
    cluster *self = child->cluster;
    spawn_args args = {.n = 0};
    cm_bytes log_path;
    args_for_role(self, child, &args);
    child_log_path(child, &log_path);
    cm_status status = spawn_start(&args, self->options->env, cm_bytes_text(&log_path), child->start_ms != 0,
                                   &child->pid, &child->ready_fd, err);
    child->start_ms = cm_now_ms();
    child->listens = false;
    cm_bytes_clear(&child->ready_line);
    cm_bytes_fini(&log_path);
    spawn_args_fini(&args);
    if (status == CM_OK) {
        child->ready_event =
            event_new(pc_loop_base(self->loop), child->ready_fd, EV_READ | EV_PERSIST, child_readable, child);
        CM_ASSERT(child->ready_event != NULL && event_add(child->ready_event, NULL) == 0);
    }
    return status;
}

static void child_stop_reading(cluster_child *child)
{
    if (child->ready_event != NULL) {
        event_free(child->ready_event);
        child->ready_event = NULL;
        close(child->ready_fd);
        child->ready_fd = -1;
    }
}

static void cluster_start_others(cluster *self)
{
    cm_error err = {0};
    for (uint32_t i = 1; i < self->n_children; i++) {
        if (child_start(self->children[i], &err) != CM_OK) {
            cluster_fail(self, "%s", err.text);
            return;
        }
    }
}

/* ---- the ready line ---- */

static bool address_from(const json_t *line, const char *key, char out[CLUSTER_ADDRESS_BYTES])
{
    const char *address = json_string_value(json_object_get(line, key));
    if (address == NULL || address[0] == 0 || strlen(address) >= CLUSTER_ADDRESS_BYTES) {
        return false;
    }
    snprintf(out, CLUSTER_ADDRESS_BYTES, "%s", address);
    return true;
}

static void child_heard(cluster_child *child)
{
    cluster *self = child->cluster;
    json_t *line = json_loadb((const char *)child->ready_line.data, child->ready_line.len, 0, NULL);
    bool gateway = child->role == CLUSTER_GATEWAY;
    bool ok = gateway ? address_from(line, "http", self->http) && address_from(line, "grpc", self->grpc)
                      : address_from(line, "address", child->address);
    const char *scheme = json_string_value(json_object_get(line, "scheme"));
    self->secured = gateway ? scheme != NULL && strcmp(scheme, "https") == 0 : self->secured;
    json_decref(line);
    child_stop_reading(child);
    if (!ok) {
        cluster_fail(self, "%s does not say where it listens: %s", child->name,
                     cm_bytes_text(&child->ready_line));
        return;
    }
    child->listens = true;
    if (self->state == CLUSTER_READY) {
        self->options->changed(self->options->ctx);
    }
    if (self->state != CLUSTER_STARTING) {
        return;
    }
    if (child->role == CLUSTER_COORDINATOR) {
        cluster_start_others(self);
    } else if (gateway) {
        self->probe = ready_probe_create(self->loop, self->http, self->secured);
    }
}

static void child_readable(evutil_socket_t fd, short what, void *arg)
{
    cluster_child *child = arg;
    char chunk[512];
    (void)what;
    ssize_t n = read((int)fd, chunk, sizeof(chunk));
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    if (n <= 0) {
        child_stop_reading(child); /* it ends without a word: SIGCHLD tells the rest */
        return;
    }
    cm_bytes_append(&child->ready_line, chunk, (size_t)n);
    if (memchr(chunk, '\n', (size_t)n) != NULL || child->ready_line.overflow) {
        child_heard(child);
    }
}

/* ---- waiting until it serves ---- */

static void cluster_draw(const cluster *self)
{
    const up_config *config = self->options->config;
    cli_progress("starting: coordinator %u/1, routers %u/%llu, workers %u/%llu, gateway %u/1, %.1f s: %s",
                 cluster_count(self, CLUSTER_COORDINATOR, true), cluster_count(self, CLUSTER_ROUTER, true),
                 (unsigned long long)config->routers, cluster_count(self, CLUSTER_WORKER, true),
                 (unsigned long long)cluster_workers(self), cluster_count(self, CLUSTER_GATEWAY, true),
                 (double)(cm_now_ms() - self->begin_ms) / 1e3,
                 self->probe != NULL ? ready_probe_reason(self->probe) : "processes start");
}

static void cluster_ticked(void *arg)
{
    cluster *self = arg;
    uint64_t ready_ms = self->options->config->ready_ms;
    if (self->probe != NULL && ready_probe_ok(self->probe) && cluster_all_listen(self)) {
        cli_progress_clear();
        ready_probe_destroy(self->probe);
        self->probe = NULL;
        self->state = CLUSTER_READY;
        self->watch_ends = true;
        self->options->ready(self->options->ctx);
        return;
    }
    if (cm_now_ms() - self->begin_ms > ready_ms) {
        cluster_fail(self, "the cluster is not ready after %llu ms: %s; the logs are in %s",
                     (unsigned long long)ready_ms,
                     self->probe != NULL ? ready_probe_reason(self->probe) : "not all processes listen",
                     self->options->run_dir);
        return;
    }
    if (self->probe != NULL) {
        ready_probe_ask(self->probe);
    }
    cluster_draw(self);
    pc_timer_set(self->tick, CLUSTER_TICK_MS);
}

/* ---- ends ---- */

/* Before the cluster was ready: whoever started it wants to know now. */
static void child_lost_early(cluster_child *child, const char *how, pid_t pid)
{
    cm_bytes log_path;
    child_log_path(child, &log_path);
    cluster_say("%s (process %d) %s before the cluster was ready; the end of its log %s:", child->name,
                (int)pid, how, cm_bytes_text(&log_path));
    spawn_show_log_tail(cm_bytes_text(&log_path), stderr);
    cm_bytes_fini(&log_path);
    child->cluster->code = CLI_FAILED;
    cluster_drain(child->cluster);
}

/* It will not come again: the others may or may not do without. */
static void child_over(cluster_child *child)
{
    cluster *self = child->cluster;
    child->over = true;
    uint32_t n_left = cluster_count_alive(self, child->role);
    if (n_left == 0 && child->role != CLUSTER_WORKER) {
        cluster_fail(self, "no %s is left: the others are stopped", g_role_names[child->role]);
        return;
    }
    cluster_say("the cluster goes on with %u %s%s", n_left, g_role_names[child->role],
                n_left == 1 ? "" : "s");
    self->options->changed(self->options->ctx);
}

/* A process that fails at once would otherwise keep the machine busy with starting it. */
static void child_again_later(cluster_child *child)
{
    if (child->start_ms + CLUSTER_STEADY_MS <= cm_now_ms() || child->again_ms == 0) {
        child->again_ms = CLUSTER_AGAIN_MIN_MS;
    } else {
        child->again_ms =
            child->again_ms * 2 < CLUSTER_AGAIN_MAX_MS ? child->again_ms * 2 : CLUSTER_AGAIN_MAX_MS;
    }
    pc_timer_set(child->again, child->again_ms);
}

static void child_again(void *arg)
{
    cluster_child *child = arg;
    cluster *self = child->cluster;
    cm_error err = {0};
    if (self->state != CLUSTER_READY) {
        return;
    }
    if (child_start(child, &err) != CM_OK) {
        cluster_say("%s", err.text);
        child_again_later(child);
        return;
    }
    cluster_say("%s is started again as process %d", child->name, (int)child->pid);
    self->options->changed(self->options->ctx);
}

/* A process of the running cluster ended. In order means that it was asked to, by whomever. */
static void child_lost(cluster_child *child, const char *how, bool in_order, pid_t pid)
{
    cluster *self = child->cluster;
    bool again = !in_order && !child->leaving && !self->options->config->no_restart;
    cluster_say("%s (process %d) %s; its log is %s/%s.log", child->name, (int)pid, how,
                self->options->run_dir, child->name);
    if (!again) {
        child_over(child);
        return;
    }
    child_again_later(child);
    cluster_say("%s is started again in %.1f s", child->name, (double)child->again_ms / 1e3);
    self->options->changed(self->options->ctx);
}

static void child_ended(cluster_child *child, int wait_status)
{
    cluster *self = child->cluster;
    pid_t pid = child->pid;
    char how[96];
    child->pid = 0;
    child_stop_reading(child);
    spawn_describe_end(wait_status, how);
    if (self->state == CLUSTER_STARTING) {
        child_lost_early(child, how, pid);
    } else if (self->state == CLUSTER_READY) {
        child_lost(child, how, WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == 0, pid);
    } else if (self->watch_ends && (!WIFEXITED(wait_status) || WEXITSTATUS(wait_status) != 0)) {
        self->code = CLI_FAILED;
        cluster_say("%s (process %d) %s while it was stopped; its log is %s/%s.log", child->name, (int)pid,
                    how, self->options->run_dir, child->name);
    }
}

/* ---- the drain ---- */

static void stage_signal(cluster *self, int number)
{
    for (uint32_t i = 0; i < self->n_children; i++) {
        cluster_child *child = self->children[i];
        if (child->role == g_drain_order[self->drain_stage] && child->pid != 0) {
            if (number == SIGKILL) {
                cluster_say("%s (process %d) does not end and is killed", child->name, (int)child->pid);
            }
            kill(child->pid, number);
        }
    }
}

/* Goes to the first stage in which somebody runs. */
static void cluster_next_stage(cluster *self)
{
    while (self->drain_stage < CLUSTER_ROLES &&
           cluster_count(self, g_drain_order[self->drain_stage], false) == 0) {
        self->drain_stage++;
    }
    if (self->drain_stage == CLUSTER_ROLES) {
        pc_timer_clear(self->kill_timer);
        self->state = CLUSTER_ENDED;
        cli_progress_clear();
        self->options->ended(self->options->ctx, self->code);
        return;
    }
    cli_progress("stopping: %s", g_role_names[g_drain_order[self->drain_stage]]);
    stage_signal(self, SIGTERM);
    pc_timer_set(self->kill_timer, self->options->config->drain_ms + CLUSTER_KILL_MS);
}

static void cluster_kill_due(void *arg)
{
    stage_signal(arg, SIGKILL);
}

void cluster_drain(cluster *self)
{
    if (self->state == CLUSTER_DRAINING || self->state == CLUSTER_ENDED) {
        return;
    }
    self->state = CLUSTER_DRAINING;
    pc_timer_clear(self->tick);
    cluster_next_stage(self);
}

void cluster_kill(cluster *self)
{
    cluster_drain(self);
    self->watch_ends = false;
    self->code = CLI_FAILED;
    cluster_say("kills what still runs");
    for (uint32_t i = 0; i < self->n_children; i++) {
        if (self->children[i]->pid != 0) {
            kill(self->children[i]->pid, SIGKILL);
        }
    }
}

/* One SIGCHLD may stand for several ends. */
static void cluster_reap(void *arg)
{
    cluster *self = arg;
    for (uint32_t i = 0; i < self->n_children; i++) {
        cluster_child *child = self->children[i];
        int wait_status;
        if (child->pid != 0 && waitpid(child->pid, &wait_status, WNOHANG) == child->pid) {
            child_ended(child, wait_status);
        }
    }
    if (self->state == CLUSTER_DRAINING &&
        cluster_count(self, g_drain_order[self->drain_stage], false) == 0) {
        cluster_next_stage(self);
    }
}

/* ---- life ---- */

static void cluster_add(cluster *self, cluster_role role, uint32_t index, bool numbered)
{
    cluster_child *child = cm_alloc(sizeof(*child));
    *child = (cluster_child){.cluster = self, .role = role, .index = index, .ready_fd = -1};
    child->again = pc_timer_create(self->loop, child_again, child);
    self->children = cm_realloc(self->children, sizeof(*self->children) * (self->n_children + 1));
    self->children[self->n_children++] = child;
    cm_bytes_init(&child->ready_line, CLUSTER_READY_LINE_MAX);
    if (numbered) {
        snprintf(child->name, sizeof(child->name), "%s-%u", g_role_names[role], index);
    } else {
        snprintf(child->name, sizeof(child->name), "%s", g_role_names[role]);
    }
}

/* ---- more and fewer workers ---- */

static void cluster_start_worker(cluster *self)
{
    cm_error err = {0};
    uint32_t index = 0;
    cluster_child *child = NULL;
    for (uint32_t i = 0; i < self->n_children;
         i++) { /* one that is over gives its name and log to the new one */
        if (self->children[i]->role == CLUSTER_WORKER) {
            child = child == NULL && self->children[i]->over ? self->children[i] : child;
            index++;
        }
    }
    if (child == NULL) {
        cluster_add(self, CLUSTER_WORKER, index, true);
        child = self->children[self->n_children - 1];
    }
    child->over = child->leaving = false;
    child->again_ms = 0;
    if (child_start(child, &err) != CM_OK) {
        cluster_say("%s", err.text);
        child_again_later(child);
        return;
    }
    cluster_say("%s is started as process %d", child->name, (int)child->pid);
}

static void cluster_stop_worker(cluster *self)
{
    for (uint32_t i = self->n_children; i-- > 0;) {
        cluster_child *child = self->children[i];
        if (child->role != CLUSTER_WORKER || child->over || child->leaving) {
            continue;
        }
        if (child->pid != 0) {
            cluster_say("%s (process %d) is asked to leave", child->name, (int)child->pid);
            child->leaving = true;
            kill(child->pid, SIGTERM);
        } else { /* it waits to be started again */
            pc_timer_clear(child->again);
            child->over = true;
        }
        return;
    }
}

void cluster_scale(cluster *self, uint32_t n_workers)
{
    if (self->state != CLUSTER_READY) {
        return;
    }
    uint32_t n = cluster_count_alive(self, CLUSTER_WORKER);
    for (; n < n_workers; n++) {
        cluster_start_worker(self);
    }
    for (; n > n_workers; n--) {
        cluster_stop_worker(self);
    }
    self->options->changed(self->options->ctx);
}

cm_status cluster_create(pc_loop *loop, const cluster_options *options, cluster **cluster_out, cm_error *err)
{
    const up_config *config = options->config;
    cluster *self = cm_alloc(sizeof(*self));
    self->loop = loop;
    self->options = options;
    self->begin_ms = cm_now_ms();
    self->tick = pc_timer_create(loop, cluster_ticked, self);
    self->kill_timer = pc_timer_create(loop, cluster_kill_due, self);
    cluster_add(self, CLUSTER_COORDINATOR, 0, false);
    for (uint32_t i = 0; i < config->routers; i++) {
        cluster_add(self, CLUSTER_ROUTER, i, true);
    }
    for (uint32_t i = 0; i < cluster_workers(self); i++) {
        cluster_add(self, CLUSTER_WORKER, i, true);
    }
    cluster_add(self, CLUSTER_GATEWAY, 0, false);
    pc_loop_on_signal(loop, SIGCHLD, cluster_reap, self);
    cm_status status = child_start(self->children[0], err);
    if (status != CM_OK) {
        cluster_destroy(self);
        return status;
    }
    pc_timer_set(self->tick, CLUSTER_TICK_MS);
    *cluster_out = self;
    return CM_OK;
}

void cluster_destroy(cluster *self)
{
    for (uint32_t i = 0; i < self->n_children; i++) {
        CM_ASSERT_MSG(self->children[i]->pid == 0, "%s still runs", self->children[i]->name);
        child_stop_reading(self->children[i]);
        cm_bytes_fini(&self->children[i]->ready_line);
        pc_timer_destroy(self->children[i]->again);
        cm_free(self->children[i]);
    }
    ready_probe_destroy(self->probe);
    pc_timer_destroy(self->tick);
    pc_timer_destroy(self->kill_timer);
    cm_free(self->children);
    cm_free(self);
}

/* ---- what others want to know ---- */

const char *cluster_scheme(const cluster *self)
{
    return self->secured ? "https" : "http";
}

const char *cluster_http(const cluster *self)
{
    return self->http;
}

const char *cluster_grpc(const cluster *self)
{
    return self->grpc;
}

const char *cluster_coordinator(const cluster *self)
{
    return self->children[0]->address;
}

uint32_t cluster_worker_pids(const cluster *self, uint32_t *pids_out, uint32_t n_max)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < self->n_children && n < n_max; i++) {
        const cluster_child *child = self->children[i];
        if (child->role == CLUSTER_WORKER && child->pid != 0) {
            pids_out[n++] = (uint32_t)child->pid;
        }
    }
    return n;
}

uint32_t cluster_serving_pids(const cluster *self, uint32_t *pids_out, uint32_t n_max)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < self->n_children && n < n_max; i++) {
        const cluster_child *child = self->children[i];
        if (child->role != CLUSTER_COORDINATOR && child->pid != 0) {
            pids_out[n++] = (uint32_t)child->pid;
        }
    }
    return n;
}

int cluster_gateway_pid(const cluster *self)
{
    for (uint32_t i = 0; i < self->n_children; i++) {
        if (self->children[i]->role == CLUSTER_GATEWAY) {
            return (int)self->children[i]->pid;
        }
    }
    return 0;
}

void cluster_describe(const cluster *self, cm_bytes *json)
{
    json_t *processes = json_array();
    for (uint32_t i = 0; i < self->n_children; i++) {
        const cluster_child *child = self->children[i];
        if (child->pid == 0) {
            continue;
        }
        json_t *row = json_pack("{s:s, s:i, s:s, s:i}", "role", g_role_names[child->role], "id",
                                (int)child->index, "name", child->name, "pid", (int)child->pid);
        if (child->address[0] != '\0') {
            json_object_set_new(row, "address", json_string(child->address));
        }
        json_array_append_new(processes, row);
    }
    json_t *all = json_pack("{s:s, s:s, s:s, s:s, s:s, s:i, s:o}", "http", self->http, "grpc", self->grpc,
                            "coordinator", self->children[0]->address, "net", self->options->config->net,
                            "model", self->options->model_name, "pid", (int)getpid(), "processes", processes);
    if (self->options->tls_dir[0] != '\0') {
        json_object_set_new(all, "tls", json_string(self->options->tls_dir));
    }
    cli_append_json(json, all, JSON_INDENT(2));
    json_decref(all);
}

void cluster_list(const cluster *self, cm_bytes *text)
{
    for (uint32_t i = 0; i < self->n_children; i++) {
        cm_bytes_printf(text, "%s%s %d", i > 0 ? ", " : "", self->children[i]->name,
                        (int)self->children[i]->pid);
    }
}
