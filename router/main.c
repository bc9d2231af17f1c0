#include "router/router.h"

#include "common/base/log.h"

typedef struct router_main {
    pc_loop *loop;
    rt_router *router;
    int code;
} router_main;

static void main_finished(void *ctx, int code)
{
    router_main *m = ctx;
    m->code = code;
    pc_loop_stop(m->loop);
}

static void main_terminate(void *arg)
{
    rt_router_drain(((router_main *)arg)->router);
}

int main(int argc, char **argv)
{
    static rt_config config;
    router_main m = {0};
    cm_error err = {0};
    int code = pc_process_begin(&rt_config_table, &config, &config.process, argc, argv, "router");
    if (code >= 0) {
        return code;
    }
    if (pc_loop_create(&m.loop) != CM_OK) {
        return 1;
    }
    if (pc_process_find_coordinator(&rt_config_table, &config, config.coordinator, &err) != CM_OK ||
        rt_router_create(m.loop, &config, main_finished, &m, &m.router, &err) != CM_OK) {
        cm_error_log("%s", err.text);
        m.code = 1;
    } else {
        pc_process_on_terminate(m.loop, main_terminate, &m);
        pc_process_ready(&config.process,
                         (const char *const[]){"address", rt_router_address(m.router), NULL});
        pc_loop_run(m.loop);
        rt_router_destroy(m.router);
    }
    pc_loop_destroy(m.loop);
    cm_cfg_free(&rt_config_table, &config);
    return m.code;
}
