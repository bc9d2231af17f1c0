/* What the servers' mains share: options, the ready line, the two signals. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/proc/process.h"

typedef struct t_config {
    pc_process_config common;
} t_config;

static const cm_cfg_field g_fields[] = {PC_PROCESS_FIELDS(t_config, common)};
static const cm_cfg_table g_table = {"baleen-t", "a test", "", g_fields,
                                     sizeof(g_fields) / sizeof(g_fields[0])};

static int begin(t_config *config, char *flag)
{
    char *argv[] = {(char[]){"baleen-t"}, flag, NULL};
    memset(config, 0, sizeof(*config));
    return pc_process_begin(&g_table, config, &config->common, flag != NULL ? 2 : 1, argv, "t");
}

static void test_begin(void **state)
{
    t_config config;
    (void)state;
    assert_int_equal(begin(&config, NULL), -1);
    assert_string_equal(config.common.log_level, "info");
    cm_cfg_free(&g_table, &config);
    assert_int_equal(begin(&config, (char[]){"--log-level=loud"}), 2);
    assert_int_equal(begin(&config, (char[]){"--nothing"}), 2);
    assert_int_equal(begin(&config, (char[]){"--failpoints=nothing:1"}), 2);
    assert_int_equal(begin(&config, (char[]){"--version"}), 0);
}

static void test_ready_line(void **state)
{
    static const char *const pairs[] = {"http", "127.0.0.1:80", "odd", "a\"b\\c\n", NULL};
    pc_process_config common = {0};
    int fds[2];
    char line[256] = "", want[256];
    (void)state;
    pc_process_ready(&common, pairs); /* nobody asked */
    assert_int_equal(pipe(fds), 0);
    common.ready_fd = (uint64_t)fds[1];
    pc_process_ready(&common, pairs);
    snprintf(want, sizeof(want), "{\"pid\":%ld,\"http\":\"127.0.0.1:80\",\"odd\":\"a\\\"b\\\\c\\u000a\"}\n",
             (long)getpid());
    assert_int_equal(read(fds[0], line, sizeof(line) - 1), strlen(want));
    assert_string_equal(line, want);
    assert_int_equal(read(fds[0], line, 1), 0); /* and closed */
    close(fds[0]);
}

static int g_n_terminate;

static void terminate(void *arg)
{
    g_n_terminate++;
    pc_loop_stop(arg);
}

/* In a process of its own: the second signal ends it. */
static int terminated_twice(int first, int second)
{
    pc_loop *loop;
    if (pc_loop_create(&loop) != CM_OK) {
        return 1;
    }
    pc_process_on_terminate(loop, terminate, loop);
    raise(SIGPIPE);
    raise(first);
    pc_loop_run(loop);
    if (g_n_terminate != 1) {
        return 2;
    }
    raise(second); /* no loop is running now */
    return 3;
}

static void test_second_signal_ends_at_once(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        int status = 0;
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            _exit(terminated_twice(i == 0 ? SIGTERM : SIGINT, SIGINT));
        }
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFEXITED(status));
        assert_int_equal(WEXITSTATUS(status), 130);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_begin),
        cmocka_unit_test(test_ready_line),
        cmocka_unit_test(test_second_signal_ends_at_once),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
