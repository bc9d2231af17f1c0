/* Child processes of `baleen up`: started without a shell, output into a log, a pipe for the ready line. They
 * are in process groups of their own, so that a terminal's Ctrl-C reaches only us and the order of the drain
 * is ours; they get SIGTERM when the thread that started them ends in any way. Thread: main. */
#pragma once
#include <stdbool.h>
#include <stdio.h>
#include <sys/types.h>

#include "common/base/status.h"

enum { SPAWN_ARGS_MAX = 32 };

/* The words of a command. */
typedef struct spawn_args {
    char *argv[SPAWN_ARGS_MAX + 1]; /* owned, NULL at the end */
    int n;
} spawn_args;
void spawn_args_add(spawn_args *args, const char *fmt, ...) CM_PRINTF(2, 3);
void spawn_args_fini(spawn_args *args);

/* argv[0] is the program's path. "--ready-fd" is added. env: NULL-terminated. again: the log goes on, else it
 * is begun anew. ready_fd_out: the pipe's reading end, non-blocking, the caller's to close. */
CM_MUST_CHECK cm_status spawn_start(spawn_args *args, char *const *env, const char *log_path, bool again,
                                    pid_t *pid_out, int *ready_fd_out, cm_error *err);

/* "ended with exit status 1", "was killed by signal 9 (Killed)" from waitpid's status. */
void spawn_describe_end(int wait_status, char out[96]);
/* The last lines of a log, indented. */
void spawn_show_log_tail(const char *log_path, FILE *to);
