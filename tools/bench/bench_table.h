/* The end of `baleen bench all`: one table of all benchmarks, their ratios and gates (gates.def), and the
 * same as a line of JSON. Thread: main. */
#pragma once
#include <jansson.h>
#include <stdint.h>

#include "common/base/status.h"
#include "tools/bench/bench.h"

enum { BENCH_GATE_ROUNDS = 7 /* gates are meant for medians of so many */ };

typedef enum bench_ending { BENCH_OK, BENCH_FAILED, BENCH_SKIPPED } bench_ending;

/* What became of one benchmark. */
typedef struct bench_result {
    const char *name;
    bench_ending ending;
    double seconds;
    cm_error reason; /* of one that was skipped */
    json_t *report;  /* what bench_end printed; NULL: nothing */
} bench_result;

void bench_table_print(const bench_result *results, uint32_t n, uint64_t rounds);
