/* Two processes of an mpirun line (over TCP: what is sent in large pieces needs both sides' hands). One is
 * stopped while it sends to an object that the other closes: the other's objects go on. */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/net/net.h"

enum { PAYLOAD_BYTES = 4 << 20, SENDS = 6, TURNS = 5000 };

typedef struct side {
    net *n;
    net_peer *peer;
    bool down;
    uint32_t n_messages, n_sent;
    pid_t said; /* in the last message */
} side;

static side side_open(void)
{
    side s = {0};
    cm_error err = {0};
    net_options options;
    net_options_defaults(&options);
    options.backend = "mpi";
    options.keyed = false;
    options.message_bytes_max = PAYLOAD_BYTES;
    options.silence_ms = 600000; /* the stopped one is to stay */
    assert_int_equal(net_open(&options, &s.n, &err), CM_OK);
    net_set_identity(s.n, &(net_identity){7, 1, 1});
    return s;
}

static void side_poll(side *s)
{
    net_event events[8];
    uint32_t n = net_poll(s->n, events, 8);
    for (uint32_t i = 0; i < n; i++) {
        switch (events[i].kind) {
        case NET_EV_UP:
            s->peer = events[i].peer;
            break;
        case NET_EV_DOWN:
            s->down = true;
            break;
        case NET_EV_SENT:
            s->n_sent++;
            break;
        case NET_EV_MESSAGE:
            s->n_messages++;
            memcpy(&s->said, events[i].header, sizeof(s->said));
            net_release(s->n, &events[i]);
            break;
        }
    }
}

static void say(side *s, const void *payload, uint64_t n_bytes)
{
    pid_t self = getpid();
    net_message message = {.type = 1,
                           .header = &self,
                           .header_bytes = sizeof(self),
                           .iov = {{payload, n_bytes}},
                           .n_iov = 1,
                           .deadline_ms = 600000};
    assert_int_equal(net_send(s->peer, &message), CM_OK);
}

static bool is_stopped(pid_t pid)
{
    char path[64], state = 0;
    snprintf(path, sizeof(path), "/proc/%d/stat", pid);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%*d %*s %c", &state), 1);
    fclose(file);
    return state == 'T';
}

static void the_one_that_is_stopped(void)
{
    cm_error err = {0};
    uint8_t *payload = cm_alloc(PAYLOAD_BYTES);
    side s = side_open();
    while (s.peer == NULL) { /* nobody there yet: again */
        net_peer *peer;
        s.down = false;
        assert_int_equal(net_connect(s.n, "mpi:0:0", &peer, &err), CM_OK);
        while (s.peer == NULL && !s.down) {
            side_poll(&s);
        }
    }
    say(&s, payload, 1);
    while (s.n_messages == 0) {
        side_poll(&s);
    }
    for (uint32_t i = 0; i < SENDS; i++) {
        say(&s, payload, PAYLOAD_BYTES);
        side_poll(&s);
    }
    raise(SIGSTOP);
    while (!s.down) {
        side_poll(&s);
    }
    net_close(s.n);
    cm_free(payload);
}

static void a_stopped_sender_stops_nobody(void **state)
{
    (void)state;
    if (strcmp(getenv("OMPI_COMM_WORLD_RANK"), "0") != 0) {
        the_one_that_is_stopped();
        return;
    }
    char bound[NET_ADDRESS_BYTES];
    cm_error err = {0};
    side closed = side_open(), other = side_open();
    assert_int_equal(net_listen(closed.n, "", bound, &err), CM_OK);
    assert_string_equal(bound, "mpi:0:0");
    while (closed.n_messages == 0) {
        side_poll(&closed);
    }
    pid_t pid = closed.said;
    say(&closed, "", 1);
    while (closed.n_sent == 0) {
        side_poll(&closed);
    }
    while (!is_stopped(pid)) {
        side_poll(&other);
    }
    net_close(closed.n);
    for (uint32_t i = 0; i < TURNS; i++) { /* each comes back, whatever it finds */
        side_poll(&other);
    }
    assert_true(is_stopped(pid));
    kill(pid, SIGCONT);
    net_close(other.n);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(a_stopped_sender_stops_nobody)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
