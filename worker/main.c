#include "worker/worker.h"

#include "common/base/log.h"

typedef struct worker_main {
    pc_loop *loop;
    wk_worker *worker;
    int code;
} worker_main;

static void main_finished(void *ctx, int code)
{
    worker_main *m = ctx;
    m->code = code;
    pc_loop_stop(m->loop);
}

static void main_terminate(void *arg)
{
    wk_worker_drain(((worker_main *)arg)->worker);
}

int main(int argc, char **argv)
{
    static wk_config config;
    worker_main m = {0};
    cm_error err = {0};
    int code = pc_process_begin(&wk_config_table, &config, &config.process, argc, argv, "worker");
    if (code >= 0) {
        return code;
    }
    if (pc_loop_create(&m.loop) != CM_OK) {
        return 1;
    }
    if (pc_process_find_coordinator(&wk_config_table, &config, config.coordinator, &err) != CM_OK ||
        wk_worker_create(m.loop, &config, main_finished, &m, &m.worker, &err) != CM_OK) {
        cm_error_log("%s", err.text);
        m.code = 1;
    } else {
        pc_process_on_terminate(m.loop, main_terminate, &m);
        pc_process_ready(&config.process,
                         (const char *const[]){"address", wk_worker_address(m.worker), NULL});
        pc_loop_run(m.loop);
        wk_worker_destroy(m.worker);
    }
    pc_loop_destroy(m.loop);
    cm_cfg_free(&wk_config_table, &config);
    return m.code;
}
