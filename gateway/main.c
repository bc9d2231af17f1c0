/* baleen-gateway. */
#include <stdio.h>

#include "common/base/log.h"
#include "gateway/gateway.h"

typedef struct gateway_process {
    pc_loop *loop;
    gw_gateway *gateway;
    int exit_code;
} gateway_process;

static void drained(void *arg)
{
    gateway_process *process = arg;
    pc_loop_stop(process->loop);
}

static void terminate(void *arg)
{
    gateway_process *process = arg;
    gw_gateway_drain(process->gateway, drained, process);
}

static void leave(void *ctx, cm_status status)
{
    gateway_process *process = ctx;
    process->exit_code = status == CM_OK ? 0 : 1;
    terminate(process);
}

static int serve(gw_config *config)
{
    gateway_process process = {0};
    cm_error err = {0};
    if (pc_loop_create(&process.loop) != CM_OK) {
        cm_error_log("no event loop");
        return 1;
    }
    cm_status status = pc_process_find_coordinator(&gw_config_table, config, config->coordinator, &err);
    if (status == CM_OK) {
        status = gw_gateway_create(process.loop, config, leave, &process, &process.gateway, &err);
    }
    if (status != CM_OK) {
        cm_error_log("%s: %s", err.field, err.text);
        pc_loop_destroy(process.loop);
        return status == CM_E_CONFIG ? 2 : 1;
    }
    pc_process_on_terminate(process.loop, terminate, &process);
    const char *const pairs[] = {"http",   gw_gateway_http(process.gateway),
                                 "grpc",   gw_gateway_grpc(process.gateway),
                                 "scheme", config->serve_cert[0] != 0 ? "https" : "http",
                                 NULL};
    pc_process_ready(&config->process, pairs);
    cm_info("%s %s grpc %s", pairs[5], pairs[1], pairs[3]);
    pc_loop_run(process.loop);
    gw_gateway_destroy(process.gateway);
    pc_loop_destroy(process.loop);
    return process.exit_code;
}

int main(int argc, char **argv)
{
    gw_config config = {0};
    int code = pc_process_begin(&gw_config_table, &config, &config.process, argc, argv, "gateway");
    if (code < 0) {
        code = serve(&config);
    }
    cm_cfg_free(&gw_config_table, &config);
    return code;
}
