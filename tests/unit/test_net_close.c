/* Closing a ucx object while the machine is short of processors: what is left of its links is ended, however
 * late the closing thread gets its turns, and nothing is reported as lost. */
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/base/clock.h"
#include "common/base/log.h"
#include "common/net/net.h"

enum {
    MESSAGE_BYTES = 8 << 20, /* announced, then fetched */
    MESSAGES = 6,
    ROUNDS = 8, /* how far the fetches are when the object is closed is chance */
    STALL_AFTER_US = 50000,
    STALL_MS = 300, /* longer than a peer is given to leave */
    WAIT_MS = 30000,
};

static uint8_t g_message[MESSAGE_BYTES];
static uint32_t g_complaints;

static void count_complaint(void *ctx, cm_log_level level, const char *text)
{
    (void)ctx;
    (void)level;
    g_complaints += strstr(text, "did not close") != NULL || strstr(text, "was not returned") != NULL;
}

static net *open_net(void)
{
    net *n;
    net_options options;
    net_options_defaults(&options);
    options.receives_max = 2; /* the others wait */
    cm_error err = {0};
    if (net_open(&options, &n, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    return n;
}

/* Sends all it has to whoever links, until it is killed. */
static void peer_serve(int to)
{
    net *n = open_net();
    net_event event;
    char bound[NET_ADDRESS_BYTES];
    net_message message = {
        .type = 5, .iov = {{g_message, MESSAGE_BYTES}}, .n_iov = 1, .deadline_ms = WAIT_MS};
    if (net_listen(n, "127.0.0.1:0", bound, NULL) != CM_OK || write(to, bound, sizeof(bound)) < 0) {
        _exit(1);
    }
    for (;;) {
        if (net_poll(n, &event, 1) == 1 && event.kind == NET_EV_UP) {
            for (uint32_t i = 0; i < MESSAGES; i++) {
                if (net_send(event.peer, &message) != CM_OK) {
                    _exit(1);
                }
            }
        }
        struct pollfd fd = {.fd = net_fd(n), .events = POLLIN};
        if (net_arm(n)) {
            poll(&fd, 1, 10);
        }
    }
}

static pid_t peer_start(char address_out[NET_ADDRESS_BYTES])
{
    int fds[2];
    assert_int_equal(pipe(fds), 0);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        peer_serve(fds[1]);
    }
    assert_int_equal(read(fds[0], address_out, NET_ADDRESS_BYTES), NET_ADDRESS_BYTES);
    close(fds[0]);
    close(fds[1]);
    return pid;
}

static void stand_still(int signal)
{
    (void)signal;
    poll(NULL, 0, STALL_MS);
}

/* Until so many turns after the link came up. */
static void run_turns(net *n, uint32_t n_turns)
{
    uint64_t give_up_ms = cm_now_ms() + WAIT_MS;
    net_event event;
    bool up = false;
    while (!up || n_turns-- > 0) {
        assert_true(cm_now_ms() < give_up_ms);
        if (net_poll(n, &event, 1) == 1) {
            up |= event.kind == NET_EV_UP;
            if (event.kind == NET_EV_MESSAGE) {
                net_release(n, &event);
            }
        }
    }
}

static void no_turns_while_closing(void **state)
{
    static const struct itimerval once = {.it_value = {.tv_usec = STALL_AFTER_US}}, never;
    (void)state;
    signal(SIGALRM, stand_still);
    for (uint32_t round = 0; round < ROUNDS; round++) {
        char address[NET_ADDRESS_BYTES];
        net_peer *peer;
        pid_t pid = peer_start(address);
        net *n = open_net();
        assert_int_equal(net_connect(n, address, &peer, NULL), CM_OK);
        run_turns(n, 1u << (2 * round));
        kill(pid, SIGSTOP); /* it will not leave by itself */
        g_complaints = 0;
        cm_log_handler(count_complaint, NULL);
        setitimer(ITIMER_REAL, &once, NULL);
        net_close(n);
        setitimer(ITIMER_REAL, &never, NULL);
        cm_log_handler(NULL, NULL);
        kill(pid, SIGKILL);
        waitpid(pid, NULL, 0);
        assert_int_equal(g_complaints, 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(no_turns_while_closing)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
