#include "tools/baleen/spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/base/mem.h"

enum { SPAWN_READY_FD = 3, SPAWN_EXIT_NO_EXEC = 127, SPAWN_TAIL_BYTES = 4096, SPAWN_TAIL_LINES = 12 };

void spawn_args_add(spawn_args *args, const char *fmt, ...)
{
    char *word;
    va_list list;
    va_start(list, fmt);
    int n = vsnprintf(NULL, 0, fmt, list);
    va_end(list);
    CM_ASSERT(args->n < SPAWN_ARGS_MAX && n >= 0);
    word = cm_alloc((size_t)n + 1);
    va_start(list, fmt);
    vsnprintf(word, (size_t)n + 1, fmt, list);
    va_end(list);
    args->argv[args->n++] = word;
}

void spawn_args_fini(spawn_args *args)
{
    for (int i = 0; i < args->n; i++) {
        cm_free(args->argv[i]);
    }
    *args = (spawn_args){.n = 0};
}

/* ---- in the child: only what is allowed between fork and exec ---- */

_Noreturn static void child_give_up(const char *program)
{
    const char *reason = strerrordesc_np(errno);
    /* stderr is the log by now, which the parent shows */
    ssize_t n = write(STDERR_FILENO, program, strlen(program));
    n += write(STDERR_FILENO, ": ", 2);
    n += reason != NULL ? write(STDERR_FILENO, reason, strlen(reason)) : 0;
    n += write(STDERR_FILENO, "\n", 1);
    (void)n;
    _exit(SPAWN_EXIT_NO_EXEC);
}

/* The caught signals of the parent's loop must not run its handlers here: all are blocked until they are
 * gone. */
static void child_reset_signals(void)
{
    static const int caught[] = {SIGTERM, SIGINT, SIGCHLD, SIGPIPE};
    struct sigaction plain = {.sa_handler = SIG_DFL};
    sigset_t none;
    sigemptyset(&plain.sa_mask);
    for (size_t i = 0; i < sizeof(caught) / sizeof(caught[0]); i++) {
        sigaction(caught[i], &plain, NULL);
    }
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

_Noreturn static void child_exec(char *const *argv, char *const *env, int null_fd, int log_fd, int ready_fd,
                                 pid_t parent)
{
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) {
        _exit(SPAWN_EXIT_NO_EXEC); /* it ended before we asked to be told */
    }
    setpgid(0, 0);
    if (dup2(null_fd, STDIN_FILENO) < 0 || dup2(log_fd, STDOUT_FILENO) < 0 ||
        dup2(log_fd, STDERR_FILENO) < 0) {
        _exit(SPAWN_EXIT_NO_EXEC);
    }
    if (ready_fd == SPAWN_READY_FD ? fcntl(ready_fd, F_SETFD, 0) < 0 : dup2(ready_fd, SPAWN_READY_FD) < 0) {
        child_give_up(argv[0]);
    }
    child_reset_signals();
    execve(argv[0], argv, env);
    child_give_up(argv[0]);
}

/* ---- in the parent ---- */

static pid_t spawn_fork(char *const *argv, char *const *env, int null_fd, int log_fd, int ready_fd)
{
    sigset_t all, before;
    pid_t parent = getpid();
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, &before);
    pid_t pid = fork();
    if (pid == 0) {
        child_exec(argv, env, null_fd, log_fd, ready_fd, parent);
    }
    int saved = errno;
    sigprocmask(SIG_SETMASK, &before, NULL);
    errno = saved;
    return pid;
}

cm_status spawn_start(spawn_args *args, char *const *env, const char *log_path, bool again, pid_t *pid_out,
                      int *ready_fd_out, cm_error *err)
{
    int pipe_fd[2], null_fd, log_fd;
    cm_status status = CM_OK;
    null_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    if (null_fd < 0) {
        return cm_error_set(err, CM_E_IO, NULL, "/dev/null: %s", strerror(errno));
    }
    log_fd = open(log_path, O_WRONLY | O_CREAT | (again ? 0 : O_TRUNC) | O_APPEND | O_CLOEXEC, 0666);
    if (log_fd < 0) {
        status = cm_error_set(err, CM_E_IO, NULL, "%s: %s", log_path, strerror(errno));
        goto out_null;
    }
    if (pipe2(pipe_fd, O_CLOEXEC) != 0) {
        status = cm_error_set(err, CM_E_IO, NULL, "no pipe: %s", strerror(errno));
        goto out_log;
    }
    fcntl(pipe_fd[0], F_SETFL, O_NONBLOCK);
    spawn_args_add(args, "--ready-fd=%d", SPAWN_READY_FD);
    pid_t pid = spawn_fork(args->argv, env, null_fd, log_fd, pipe_fd[1]);
    close(pipe_fd[1]);
    if (pid < 0) {
        status = cm_error_set(err, CM_E_IO, NULL, "%s: no new process: %s", args->argv[0], strerror(errno));
        close(pipe_fd[0]);
        goto out_log;
    }
    *pid_out = pid;
    *ready_fd_out = pipe_fd[0];

out_log:
    close(log_fd);
out_null:
    close(null_fd);
    return status;
}

void spawn_describe_end(int wait_status, char out[96])
{
    if (WIFSIGNALED(wait_status)) {
        int number = WTERMSIG(wait_status);
        const char *name = sigdescr_np(number);
        snprintf(out, 96, "was killed by signal %d (%s)", number, name != NULL ? name : "unknown");
    } else {
        snprintf(out, 96, "ended with exit status %d", WEXITSTATUS(wait_status));
    }
}

void spawn_show_log_tail(const char *log_path, FILE *to)
{
    char text[SPAWN_TAIL_BYTES + 1];
    FILE *file = fopen(log_path, "re");
    if (file == NULL) {
        return;
    }
    if (fseek(file, 0, SEEK_END) == 0 && ftell(file) > SPAWN_TAIL_BYTES) {
        fseek(file, -SPAWN_TAIL_BYTES, SEEK_END);
    } else {
        rewind(file);
    }
    size_t n = fread(text, 1, SPAWN_TAIL_BYTES, file);
    fclose(file);
    while (n > 0 && text[n - 1] == '\n') {
        n--;
    }
    text[n] = '\0';
    size_t at = n;
    for (int lines = 0; at > 0 && (text[at - 1] != '\n' || ++lines < SPAWN_TAIL_LINES);) {
        at--;
    }
    for (char *rest = text + at, *line; (line = strsep(&rest, "\n")) != NULL;) {
        fprintf(to, "    %s\n", line);
    }
}
