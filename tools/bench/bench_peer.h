/* Other programs that a benchmark runs in turn with itself: a shell command that prints lines of
 *
 *   peer=NAME case=decode_b8_1t value=88.6 unit=tok/s ...
 *   peer=NAME skipped=REASON to the end of the line
 *
 * of which name, case (up to what follows its number) and value are kept. Thread: main. */
#pragma once
#include "tools/bench/bench.h"

typedef struct bench_peers bench_peers;

/* command is kept. */
bench_peers *bench_peers_create(const char *command);
void bench_peers_destroy(bench_peers *peers); /* NULL is fine */
/* Runs the command once. CM_E_IO when it cannot be run, fails or says nothing of that form. */
CM_MUST_CHECK cm_status bench_peers_run(bench_peers *peers, cm_error *err);

uint32_t bench_peers_count(const bench_peers *peers);
const char *bench_peers_name(const bench_peers *peers, uint32_t i);
/* Why it was not run; "": it was. */
const char *bench_peers_skipped(const bench_peers *peers, uint32_t i);
/* One sample per run; NULL: it said nothing of that case. "decode_b8" is not "decode_b80". */
const bench_samples *bench_peers_case(const bench_peers *peers, uint32_t i, const char *name);
