#include <stdio.h>

#include "common/base/log.h"
#include "coordinator/co_config.h"
#include "coordinator/coordinator.h"

typedef struct co_main {
    pc_loop *loop;
    co_coordinator *coordinator;
} co_main;

static void main_stopped(void *arg)
{
    pc_loop_stop(((co_main *)arg)->loop);
}

static void main_terminate(void *arg)
{
    co_main *self = arg;
    cm_info("stops; the members go on without");
    co_coordinator_stop(self->coordinator, main_stopped, self);
}

int main(int argc, char **argv)
{
    co_config config = {0};
    co_main self = {0};
    cm_error err = {0};
    int code = pc_process_begin(&co_config_table, &config, &config.process, argc, argv, "coordinator");
    if (code >= 0) {
        return code;
    }
    code = 1;
    if (pc_loop_create(&self.loop) != CM_OK) {
        fprintf(stderr, "baleen-coordinator: no event loop\n");
        goto out_config;
    }
    if (co_coordinator_create(self.loop, &config, &self.coordinator, &err) != CM_OK) {
        fprintf(stderr, "baleen-coordinator: %s\n", err.text);
        goto out_loop;
    }
    cm_info("listens on %s", co_coordinator_address(self.coordinator));
    pc_process_on_terminate(self.loop, main_terminate, &self);
    pc_process_ready(&config.process,
                     (const char *const[]){"address", co_coordinator_address(self.coordinator), NULL});
    pc_loop_run(self.loop);
    co_coordinator_destroy(self.coordinator);
    code = 0;

out_loop:
    pc_loop_destroy(self.loop);
out_config:
    cm_cfg_free(&co_config_table, &config);
    return code;
}
