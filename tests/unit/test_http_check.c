/* GET /health_generate: one token for all who ask, and when it counts as well. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/stats.h"
#include "tests/unit/gateway_rig.h"

static bool no_streams(void *arg)
{
    (void)arg;
    return cm_stat_get(CM_STAT_ledger_streams) == 0;
}

static bool is_probed(void *arg)
{
    return R.n_probes == *(const uint32_t *)arg;
}

static rig_client *ask_check(void)
{
    return rig_open("GET", "/health_generate", "Connection: close\r\n", NULL);
}

static void check_says(rig_client *client, int status, const char *words)
{
    rig_wait_closed(client);
    assert_int_equal(rig_status(client), status);
    assert_non_null(strstr(cm_bytes_text(&client->in), words));
    rig_close(client);
}

/* One token for all who ask meanwhile, also when one of them goes; what is well stays so for a while. */
static void health_generate_is_shared(void **state)
{
    (void)state;
    uint32_t second = 2;
    rig_ready(); /* the first */
    R.probe_waits = true;
    rig_client *client[3] = {ask_check(), ask_check(), ask_check()};
    rig_until(is_probed, &second);
    rig_close(client[1]);
    rig_client *late = ask_check();
    json_decref(rig_ask("GET", "/load", NULL, &(int){0})); /* behind it: it waits, too */
    rig_probe_say(true);
    check_says(client[0], 200, "\"status\":\"ok\"");
    check_says(client[2], 200, "\"seconds\":");
    check_says(late, 200, "\"status\":\"ok\"");
    check_says(ask_check(), 200, "\"status\":\"ok\"");
    assert_int_equal(R.n_probes, 2);
}

static void health_generate_fails(void **state)
{
    (void)state;
    uint32_t fourth = 4;
    rig_ready();
    R.probe_fails = true;
    R.refuse_status = CM_E_UNAVAILABLE;
    check_says(ask_check(), 503, "\"status\":\"failed\"");
    check_says(ask_check(), 503, "\"reason\":");
    assert_int_equal(R.n_probes, 3); /* a failure does not stay */

    R.probe_waits = true; /* full, but others get their tokens */
    R.mode = RIG_HOLD;
    rig_reply("abc");
    rig_client *other = rig_open("POST", CHAT, "", "{\"stream\":true," USER("x") "}");
    rig_wait_opens(1);
    rig_client *client = ask_check();
    rig_until(is_probed, &fourth);
    rig_tokens(0, R.reply, 1, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    rig_wait_text(other, "reasoning_content\":\"a");
    rig_probe_say(false);
    check_says(client, 200, "\"status\":\"ok\"");
    rig_close(other);
    rig_until(no_streams, NULL);
}

static void health_generate_without_a_router(void **state)
{
    (void)state;
    rig_ready();
    rig_deaf();
    rig_client *client = rig_open("GET", "/ready", "Connection: close\r\n", NULL);
    rig_wait_closed(client);
    rig_close(client);
    check_says(ask_check(), 503, "no router linked");
}

/* Who waits for it when the gateway ends is answered, and nothing is left. */
static void health_generate_at_the_end(void **state)
{
    (void)state;
    uint32_t second = 2;
    rig_ready();
    R.probe_waits = true;
    rig_client *client = ask_check();
    rig_until(is_probed, &second);
    rig_close(client); /* memory is the sanitizers' to look at */
    client = ask_check();
    json_decref(rig_ask("GET", "/load", NULL, &(int){0}));
    rig_close(client);
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN); /* as every process of ours does: clients go away */
#define TEST(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
    const struct CMUnitTest tests[] = {
        TEST(health_generate_is_shared),
        TEST(health_generate_fails),
        TEST(health_generate_without_a_router),
        TEST(health_generate_at_the_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
