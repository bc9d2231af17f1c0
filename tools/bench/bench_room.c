#include "tools/bench/bench_room.h"

#include <errno.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "common/base/bytes.h"
#include "common/base/config.h"
#include "common/base/mem.h"
#include "tools/baleen/cli.h"

enum { ROOM_REST_S = 20, /* for what the process started, to end after it */ ROOM_DEPTH = 16 };

static struct {
    char *path;
    const char *kept; /* beginning of the paths that stay */
    sigset_t watched, before;
} g_room;

cm_status bench_room_open(cm_error *err)
{
    const char *temp = cm_env_get("TMPDIR");
    cm_bytes path;
    cm_bytes_init(&path, 0);
    cm_bytes_printf(&path, "%s/baleen-bench-XXXXXX", temp != NULL && temp[0] != '\0' ? temp : "/tmp");
    if (mkdtemp((char *)path.data) == NULL) {
        cm_status status = cm_error_set(err, CM_E_IO, "", "%s: %s", cm_bytes_text(&path), strerror(errno));
        cm_bytes_fini(&path);
        return status;
    }
    g_room.path = cm_strdup(cm_bytes_text(&path));
    cm_bytes_fini(&path);
    sigemptyset(&g_room.watched);
    sigaddset(&g_room.watched, SIGCHLD);
    sigaddset(&g_room.watched, SIGINT);
    sigaddset(&g_room.watched, SIGTERM);
    sigprocmask(SIG_BLOCK, &g_room.watched, &g_room.before);
    prctl(PR_SET_CHILD_SUBREAPER, 1); /* what a benchmark leaves behind becomes ours to wait for */
    return CM_OK;
}

static int remove_one(const char *path, const struct stat *info, int kind, struct FTW *at)
{
    (void)info;
    (void)kind;
    (void)at;
    if (g_room.kept == NULL || strncmp(path, g_room.kept, strlen(g_room.kept)) != 0) {
        (void)remove(path);
    }
    return 0;
}

void bench_room_close(const char *kept)
{
    cm_bytes path;
    cm_bytes_init(&path, 0);
    cm_bytes_printf(&path, "%s/%s", g_room.path, kept != NULL ? kept : "");
    g_room.kept = kept != NULL ? cm_bytes_text(&path) : NULL;
    (void)nftw(g_room.path, remove_one, ROOM_DEPTH, FTW_DEPTH | FTW_PHYS);
    if (access(g_room.path, F_OK) == 0) {
        fprintf(stderr, "baleen bench: what it left is in %s\n", g_room.path);
    }
    cm_bytes_fini(&path);
    cm_free(g_room.path);
    sigprocmask(SIG_SETMASK, &g_room.before, NULL);
}

const char *bench_room(void)
{
    return g_room.path;
}

/* Takes in whoever has ended; whether pid is among them. */
static bool reap(pid_t pid, int *status_out)
{
    int status;
    bool found = false;
    for (pid_t one; (one = waitpid(-1, &status, WNOHANG)) > 0;) {
        if (one == pid) {
            *status_out = status;
            found = true;
        }
    }
    return found;
}

static bool none_left(void)
{
    return waitpid(-1, NULL, WNOHANG) < 0 && errno == ECHILD;
}

/* Whatever the process started is told to end by its end. */
static void wait_for_rest(pid_t pid)
{
    struct timespec limit = {.tv_sec = ROOM_REST_S};
    int status;
    while (!none_left()) {
        if (sigtimedwait(&g_room.watched, NULL, &limit) < 0 && errno == EAGAIN) {
            fprintf(stderr, "baleen bench: processes that it started have not ended\n");
            return;
        }
        (void)reap(pid, &status);
    }
}

bench_outcome bench_room_run(int (*fn)(void *ctx), void *ctx, int *code_out)
{
    int status = 0;
    bool interrupted = false;
    pid_t parent = getpid();
    fflush(NULL);
    pid_t pid = fork();
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGTERM);
        sigprocmask(SIG_SETMASK, &g_room.before, NULL);
        *code_out = getppid() == parent ? fn(ctx) : CLI_FAILED;
        return BENCH_CHILD;
    }
    if (pid < 0) {
        fprintf(stderr, "baleen bench: no new process: %s\n", strerror(errno));
        *code_out = CLI_FAILED;
        return BENCH_ENDED;
    }
    while (!reap(pid, &status)) {
        int signal = sigwaitinfo(&g_room.watched, NULL);
        if (signal == SIGINT || signal == SIGTERM) {
            interrupted = true;
            kill(pid, SIGTERM);
        }
    }
    wait_for_rest(pid);
    if (WIFSIGNALED(status) && !interrupted) {
        fprintf(stderr, "baleen bench: killed by signal %d (%s)\n", WTERMSIG(status),
                strsignal(WTERMSIG(status)));
    }
    *code_out = WIFEXITED(status) ? WEXITSTATUS(status) : CLI_FAILED;
    return interrupted ? BENCH_INTERRUPTED : BENCH_ENDED;
}
