/* What a benchmark needs that may be absent, so that it is said before anything runs. Thread: main. */
#pragma once
#include <stdint.h>

#include "tools/bench/bench.h"

/* Flags: of benches.def. */
enum { BENCH_NOTHING = 0, BENCH_NANO = 1u << 0, BENCH_SMALL = 1u << 1, BENCH_SERVERS = 1u << 2 };

/* Where the models are that stand in for --model. */
typedef struct bench_models {
    char *nano;  /* folder */
    char *shape; /* folder with the config.json of bench-s */
} bench_models;

/* CM_E_NOT_FOUND, CM_E_CAPACITY: something is missing; the sentence says what, and what to pass. room: a
 * folder that has to take `disk_mb`, and the random weights where they are wanted. Fills what it finds of
 * models; they are to be freed. */
CM_MUST_CHECK cm_status bench_needs_check(uint32_t needs, uint32_t disk_mb, const bench_config *config,
                                          const char *room, bench_models *models, cm_error *err);
void bench_models_free(bench_models *models);
