/* The peer of ep.latency: active messages of 8 bytes between this process and one it starts, through UCX
 * alone with the transports it chooses itself, both ends spinning. Thread: main. */
#pragma once
#include "common/base/status.h"

typedef struct bench_ucx bench_ucx;

/* Only forks; what opens UCX in this process may come after it. */
CM_MUST_CHECK cm_status bench_ucx_open(bench_ucx **ucx_out, cm_error *err);
void bench_ucx_close(bench_ucx *ucx);
/* Half the median round trip. Between two calls the other process sleeps. */
double bench_ucx_one_way_us(bench_ucx *ucx);
