/* Answers as they come, to clients that do not read them, or late. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/base/stats.h"
#include "tests/unit/gateway_rig.h"

static bool no_streams(void *arg)
{
    (void)arg;
    return cm_stat_get(CM_STAT_ledger_streams) == 0;
}

/* Nothing is read, much is written: the stream is cancelled and the connection ends. */
static void slow_reader(void **state)
{
    (void)state;
    char name[2001];
    memset(name, 'n', 2000); /* it is in every chunk, so that few tokens are many bytes */
    name[2000] = 0;
    rig_set("model_name", name);
    rig_set("slow_reader_bytes", "65536");
    rig_ready();
    rig_reply("x");
    R.mode = RIG_FLOOD;
    rig_client *client =
        rig_open("POST", "/v1/completions", "", "{\"stream\":true,\"prompt\":\"a\",\"max_tokens\":16000}");
    bufferevent_disable(client->bev, EV_READ);
    rig_wait_cancels(1);
    assert_int_equal(R.cancelled, R.stream);
    assert_true(R.sent < 16000);
    assert_int_equal(cm_stat_get(CM_STAT_ledger_streams), 0);
    bufferevent_enable(client->bev, EV_READ);
    rig_wait_closed(client);
    assert_null(strstr(cm_bytes_text(&client->in), "[DONE]"));
    rig_close(client);
}

/* A client that reads nothing until all was said gets every byte of it: what the socket took at once, in the
 * middle of a chunk too, and what waited. */
static void late_reader(void **state)
{
    (void)state;
    enum { NAME_BYTES = 60000, N_TOKENS = 256 }; /* together more than sockets hold */
    char *name = cm_alloc(NAME_BYTES + 1);
    memset(name, 'n', NAME_BYTES);
    rig_set("model_name", name);
    rig_set("slow_reader_bytes", "1g");
    rig_ready();
    R.mode = RIG_HOLD;
    rig_client *client = rig_open("POST", CHAT, "Connection: close\r\n", "{\"stream\":true," USER("x") "}");
    rig_wait_text(client, "assistant"); /* its status was read: from now on it goes straight to the socket */
    bufferevent_disable(client->bev, EV_READ);
    for (uint32_t i = 0; i < N_TOKENS; i++) {
        rig_reply(i == 0 ? "|" : (char[]){(char)('a' + i % 8), 0});
        assert_int_equal(R.n_reply, 1);
        rig_tokens(i, R.reply, 1, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    }
    rig_tokens(N_TOKENS, NULL, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP);
    rig_until(no_streams, NULL);
    assert_true(client->in.len < 2 * NAME_BYTES);
    bufferevent_enable(client->bev, EV_READ);
    rig_wait_closed(client);
    cm_bytes body;
    cm_bytes_init(&body, 0);
    rig_body(client, &body);
    const char *at = cm_bytes_text(&body);
    for (uint32_t i = 1; i < N_TOKENS; i++) {
        char delta[32];
        snprintf(delta, sizeof(delta), "{\"content\":\"%c\"}", (char)('a' + i % 8));
        const char *next = strstr(at, "{\"content\":\"");
        assert_non_null(next);
        assert_int_equal(strncmp(next, delta, strlen(delta)), 0);
        at = next + strlen(delta);
    }
    assert_null(strstr(at, "{\"content\":\""));
    assert_non_null(strstr(at, "data: [DONE]\n\n"));
    cm_bytes_fini(&body);
    rig_close(client);
    cm_free(name);
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN); /* as every process of ours does: clients go away */
#define TEST(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
    const struct CMUnitTest tests[] = {TEST(slow_reader), TEST(late_reader)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
