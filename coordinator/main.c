#include <stdio.h>

#include "common/base/log.h"
#include "coordinator/co_config.h"
#include "coordinator/coordinator.h"

typedef struct co_main {
    pc_loop *loop;
    co_config config;
    co_coordinator *coordinator;
    bool ready, stopping;
    int code;
} co_main;

static void main_stopped(void *arg)
{
    pc_loop_stop(((co_main *)arg)->loop);
}

static void main_stop(co_main *self)
{
    if (!self->stopping) {
        self->stopping = true;
        co_coordinator_stop(self->coordinator, main_stopped, self);
    }
}

static void main_terminate(void *arg)
{
    cm_info("stops; the members go on without");
    main_stop(arg);
}

/* Ready means that it is known who is active: a launcher that waits for it has a cluster. */
static void main_role(void *ctx, co_role_now now)
{
    co_main *self = ctx;
    const char *role = now == CO_ROLE_NOW_ACTIVE ? "active" : "standby";
    cm_info("is the %s coordinator", role);
    if (!self->ready) {
        self->ready = true;
        pc_process_ready(
            &self->config.process,
            (const char *const[]){"address", co_coordinator_address(self->coordinator), "role", role, NULL});
    }
}

static void main_failed(void *ctx, const cm_error *err)
{
    co_main *self = ctx;
    fprintf(stderr, "baleen-coordinator: %s\n", err->text);
    self->code = 1;
    main_stop(self);
}

int main(int argc, char **argv)
{
    static const co_coordinator_events events = {.role = main_role, .failed = main_failed};
    co_main self = {0};
    cm_error err = {0};
    int code =
        pc_process_begin(&co_config_table, &self.config, &self.config.process, argc, argv, "coordinator");
    if (code >= 0) {
        return code;
    }
    code = 1;
    if (pc_loop_create(&self.loop) != CM_OK) {
        fprintf(stderr, "baleen-coordinator: no event loop\n");
        goto out_config;
    }
    if (co_coordinator_create(self.loop, &self.config, &self.coordinator, &err) != CM_OK) {
        fprintf(stderr, "baleen-coordinator: %s\n", err.text);
        goto out_loop;
    }
    cm_info("listens on %s", co_coordinator_address(self.coordinator));
    if (self.config.mpi && pc_process_tell_address(co_coordinator_address(self.coordinator), &err) != CM_OK) {
        fprintf(stderr, "baleen-coordinator: %s\n", err.text);
        goto out_coordinator;
    }
    pc_process_on_terminate(self.loop, main_terminate, &self);
    co_coordinator_watch(self.coordinator, &events, &self);
    pc_loop_run(self.loop);
    code = self.code;

out_coordinator:
    co_coordinator_destroy(self.coordinator);
out_loop:
    pc_loop_destroy(self.loop);
out_config:
    cm_cfg_free(&co_config_table, &self.config);
    return code;
}
