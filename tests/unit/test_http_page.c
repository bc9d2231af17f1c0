/* What the gateway shows to people: the page, the cluster in JSON; and the end of a stream that its reader
 * has enough of. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/stats.h"
#include "tests/unit/gateway_rig.h"

static void page_for_browsers(void **state)
{
    (void)state;
    static const struct {
        const char *method, *accept, *type;
        bool page;
    } cases[] = {
        {"GET", "Accept: text/html,application/xhtml+xml,*/*;q=0.8\r\n", "text/html; charset=utf-8", true},
        {"HEAD", "Accept: text/html\r\n", "text/html; charset=utf-8", false},
        {"GET", "Accept: */*\r\n", "text/plain; charset=utf-8", false},
        {"GET", "", "text/plain; charset=utf-8", false},
    };
    rig_ready();
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char headers[128];
        snprintf(headers, sizeof(headers), "Connection: close\r\n%s", cases[i].accept);
        rig_client *client = rig_open(cases[i].method, "/", headers, NULL);
        rig_wait_closed(client);
        assert_int_equal(rig_status(client), 200);
        assert_true(rig_header_is(client, "Content-Type", cases[i].type));
        assert_true(rig_header_is(client, "Vary", "Accept"));
        assert_int_equal(rig_header_is(client, "Content-Security-Policy", NULL), cases[i].type[5] == 'h');
        assert_int_equal(strstr(cm_bytes_text(&client->in), "<!doctype html>") != NULL, cases[i].page);
        assert_null(strstr(cm_bytes_text(&client->in), "unsafe"));
        rig_close(client);
    }
}

static json_t *ask_until(const char *path, const char *key)
{
    json_t *reply;
    int status;
    while (rig_at(reply = rig_ask("GET", path, NULL, &status), key) == NULL) {
        assert_int_equal(status, 200);
        json_decref(reply);
    }
    return reply;
}

static void cluster_members(void **state)
{
    (void)state;
    rig_ready();
    rig_cluster_stats();
    json_t *reply = ask_until("/v1/cluster", "members.1.id");
    assert_string_equal(rig_text_at(reply, "model"), "nano");
    assert_true(json_is_true(rig_at(reply, "ready")) && json_is_null(rig_at(reply, "reason")));
    assert_true(json_is_true(rig_at(reply, "coordinator")) && json_is_true(rig_at(reply, "changing")));
    assert_int_equal(rig_int_at(reply, "epoch"), 1);
    assert_int_equal(json_array_size(rig_at(reply, "members")), 2);
    assert_string_equal(rig_text_at(reply, "members.0.role"), "gateway");
    assert_int_equal(rig_int_at(reply, "members.0.id"), RIG_GATEWAY);
    assert_string_equal(rig_text_at(reply, "members.0.state"), "ready");
    assert_int_equal(rig_int_at(reply, "members.0.counters.streams"), 0);
    assert_string_equal(rig_text_at(reply, "members.1.role"), "router");
    assert_int_equal(rig_int_at(reply, "members.1.id"), RIG_ROUTER);
    assert_string_equal(rig_text_at(reply, "members.1.state"), "leaving");
    assert_int_equal(rig_int_at(reply, "members.1.epoch"), 1);
    assert_int_equal(rig_int_at(reply, "members.1.counters.steps_total"), 4321);
    char *text = json_dumps(reply, 0);
    assert_null(strstr(text, "127.0.0.1")); /* where things are is nobody's business here */
    assert_null(strstr(text, "rig-router"));
    free(text);
    json_decref(reply);
}

static void cluster_experts(void **state)
{
    (void)state;
    int status;
    rig_ready();
    assert_int_equal(R.n_load_wishes, 0); /* nobody has looked */
    json_t *reply = ask_until("/v1/cluster/experts", "load");
    assert_string_equal(rig_text_at(reply, "load"), "GQ=="); /* 25 */
    assert_int_equal(rig_int_at(reply, "layers"), 1);
    assert_int_equal(rig_int_at(reply, "experts"), 1);
    assert_int_equal(rig_int_at(reply, "placement.ranks.0"), RIG_WORKER);
    assert_string_equal(rig_text_at(reply, "placement.copies"), "AQ==");
    assert_string_equal(rig_text_at(reply, "placement.owners"), "AAA=");
    json_decref(reply);
    reply = rig_ask("GET", "/v1/cluster/experts?epoch=1", NULL, &status);
    assert_null(rig_at(reply, "placement")); /* the page has it */
    assert_non_null(rig_at(reply, "load"));
    json_decref(reply);
    reply = rig_ask("GET", "/v1/cluster/experts?epoch=x", NULL, &status);
    assert_non_null(rig_at(reply, "placement"));
    json_decref(reply);
}

/* Not even the rest of what a client could come back for goes on. */
static void client_has_enough(void **state)
{
    (void)state;
    int status;
    char path[240];
    rig_ready();
    R.mode = RIG_HOLD;
    rig_client *client =
        rig_open("POST", CHAT, "", "{\"stream\":true,\"stream_options\":{\"resumable\":true}," USER("x") "}");
    rig_wait_text(client, "\ndata: ");
    const char *id = strstr(cm_bytes_text(&client->in), "\nid: ") + 5;
    snprintf(path, sizeof(path), "/v1/streams/%.*s", (int)strcspn(id, ":"), id);
    json_t *reply = rig_ask("DELETE", path, NULL, &status);
    assert_int_equal(status, 200);
    assert_true(json_is_true(rig_at(reply, "deleted")));
    json_decref(reply);
    rig_wait_cancels(1);
    assert_int_equal(R.n_detached, 0);
    rig_wait_text(client, "\r\n0\r\n\r\n"); /* an end, but no [DONE] */
    assert_null(strstr(cm_bytes_text(&client->in), "[DONE]"));
    assert_int_equal(cm_stat_get(CM_STAT_ledger_streams), 0);
    reply = rig_ask("DELETE", path, NULL, &status);
    assert_int_equal(status, 404);
    assert_string_equal(rig_text_at(reply, "error.code"), "stream_not_found");
    json_decref(reply);
    rig_close(client);

    client = rig_open("POST", path, "Connection: close\r\n", "{}");
    rig_wait_closed(client);
    assert_int_equal(rig_status(client), 405);
    assert_true(rig_header_is(client, "Allow", "GET, HEAD, DELETE, OPTIONS"));
    rig_close(client);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
    const struct CMUnitTest tests[] = {
        TEST(page_for_browsers),
        TEST(cluster_members),
        TEST(cluster_experts),
        TEST(client_has_enough),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
