/* Where a benchmark runs: in a process of its own, with a folder for whatever it writes, so that nothing of
 * it is left on the machine however it ends: done, failed, crashed or by Ctrl-C. Thread: main, before it has
 * started any other. */
#pragma once
#include "common/base/status.h"

/* In $TMPDIR or /tmp. */
CM_MUST_CHECK cm_status bench_room_open(cm_error *err);
/* Removes the folder with all that is in it, but what begins with this name, if not NULL: then it says where
 * that is. For the process that opened. */
void bench_room_close(const char *kept);
/* The folder; exists from open to close. */
const char *bench_room(void);

typedef enum bench_outcome {
    BENCH_ENDED,       /* with *code_out */
    BENCH_INTERRUPTED, /* SIGINT or SIGTERM */
    BENCH_CHILD,       /* this is the new process: fn has run, it should end with *code_out */
} bench_outcome;

/* Runs fn in a new process and waits until it and all processes that it left behind have ended. */
bench_outcome bench_room_run(int (*fn)(void *ctx), void *ctx, int *code_out);
