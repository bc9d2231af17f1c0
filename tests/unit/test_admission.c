/* The gateway over HTTP with a key file: who may ask, whose streams are whose, turns, the access log, what
 * clients are told while they wait and when they are refused. The router is a script (gateway_rig). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/base/log.h"
#include "common/base/stats.h"
#include "gateway/key_file.h"
#include "tests/support/temp_folder.h"
#include "tests/unit/gateway_rig.h"

#define TRACE  "4bf92f3577b34da6a3ce929d0e0e4736"
#define KEY_A  "Authorization: Bearer key-of-a\r\n"
#define KEY_B  "x-api-key: key-of-b\r\n"
#define KEY_OP "Authorization: Bearer key-of-operator\r\n"
#define CLOSE  "Connection: close\r\n"
#define STREAM "{\"stream\":true," NO_THINKING "," USER("x") "}"

static char g_folder[T_FOLDER_MAX], g_path[T_FOLDER_MAX + 16];
static cm_bytes g_log; /* all lines */

static void take_line(void *ctx, cm_log_level level, const char *text)
{
    (void)ctx;
    if (level <= CM_LOG_INFO) {
        cm_bytes_append_text(&g_log, text);
        cm_bytes_append_text(&g_log, "\n");
    }
}

static json_t *tenant(const char *name, const char *key, const char *limits)
{
    static const uint8_t salt[16] = {1};
    uint8_t hash[GW_KEY_HASH_BYTES];
    char text[2 * GW_KEY_HASH_BYTES + 1];
    gw_key_hash(salt, sizeof(salt), key, hash);
    gw_hex_write(hash, sizeof(hash), text);
    json_t *value = json_pack("{s:s, s:[{s:s}]}", "name", name, "keys", "hash", text);
    json_t *more = json_loads(limits, 0, NULL);
    assert_non_null(more);
    json_object_update(value, more);
    json_decref(more);
    return value;
}

static void write_keys(const char *limits_a, const char *limits_b)
{
    json_t *root = json_pack("{s:s, s:[o,o,o]}", "salt", "01000000000000000000000000000000", "tenants",
                             tenant("a", "key-of-a", limits_a), tenant("b", "key-of-b", limits_b),
                             tenant("operator", "key-of-operator", "{\"operator\":true}"));
    assert_int_equal(json_dump_file(root, g_path, 0), 0);
    json_decref(root);
    rig_set("key_file", g_path);
}

static int begin(void **state)
{
    t_folder_make(g_folder, "admission");
    snprintf(g_path, sizeof(g_path), "%s/keys.json", g_folder);
    cm_bytes_init(&g_log, 0);
    cm_log_handler(take_line, NULL);
    return rig_setup(state);
}

static int finish(void **state)
{
    int failed = rig_teardown(state);
    cm_log_handler(NULL, NULL);
    cm_bytes_fini(&g_log);
    t_folder_remove(g_folder);
    return failed;
}

static bool no_streams(void *arg)
{
    (void)arg;
    return cm_stat_get(CM_STAT_ledger_streams) == 0;
}

/* A whole answer with these headers; the client is the caller's to close. */
static rig_client *ask(const char *method, const char *path, const char *headers, const char *body)
{
    char all[512];
    snprintf(all, sizeof(all), CLOSE "%s", headers);
    rig_client *client = rig_open(method, path, all, body);
    rig_wait_closed(client);
    return client;
}

static int status_of(const char *method, const char *path, const char *headers, const char *body)
{
    rig_client *client = ask(method, path, headers, body);
    int status = rig_status(client);
    rig_close(client);
    return status;
}

/* ---- keys ---- */

static void who_may_ask(void **state)
{
    (void)state;
    write_keys("{}", "{}");
    rig_ready();
    rig_reply("ok");
    static const char *const closed[][2] = {
        {"POST", CHAT},           {"POST", "/v1/completions"}, {"POST", "/tokenize"},
        {"POST", "/detokenize"},  {"GET", "/v1/models"},       {"GET", "/v1/models/nano"},
        {"GET", "/v1/streams/x"}, {"GET", "/metrics"},         {"GET", "/version"}};
    static const char *const wrong[] = {"", "Authorization: Bearer key-of-c\r\n", "x-api-key: key-of-c\r\n",
                                        "Authorization: Basic a2V5LW9mLWE=\r\n"};
    for (size_t i = 0; i < sizeof(closed) / sizeof(closed[0]); i++) {
        for (size_t k = 0; k < sizeof(wrong) / sizeof(wrong[0]); k++) {
            bool post = closed[i][0][0] == 'P';
            rig_client *client = ask(closed[i][0], closed[i][1], wrong[k], post ? "{" USER("x") "}" : NULL);
            assert_int_equal(rig_status(client), 401);
            assert_true(rig_header_is(client, "WWW-Authenticate", "Bearer"));
            assert_false(rig_header_is(client, "retry-after", NULL));
            assert_non_null(strstr(cm_bytes_text(&client->in), "\"type\":\"authentication_error\""));
            assert_null(strstr(cm_bytes_text(&client->in), "key-of"));
            rig_close(client);
        }
    }
    assert_int_equal(R.n_opens, 0);
    assert_int_equal(status_of("GET", "/", "", NULL), 200);
    assert_int_equal(status_of("GET", "/health", "", NULL), 200);
    assert_int_equal(status_of("GET", "/ready", "", NULL), 200);
    assert_int_equal(status_of("OPTIONS", CHAT, "", NULL), 204); /* browsers ask without it */
    assert_int_equal(status_of("POST", CHAT, KEY_A, "{" USER("x") "}"), 200);
    assert_int_equal(status_of("POST", CHAT, KEY_B, "{" USER("x") "}"), 200);
    assert_int_equal(status_of("GET", "/v1/models", KEY_B, NULL), 200);
    assert_int_equal(status_of("GET", "/metrics", KEY_B, NULL), 403); /* it names the others */
    assert_int_equal(status_of("GET", "/metrics", KEY_OP, NULL), 200);
    assert_null(strstr(cm_bytes_text(&g_log), "key-of"));
}

static void open_metrics(void **state)
{
    (void)state;
    write_keys("{}", "{}");
    rig_set("metrics_open", "on");
    rig_ready();
    assert_int_equal(status_of("GET", "/metrics", "", NULL), 200);
}

static bool has_forgotten(void *arg)
{
    return R.n_forgets == *(const uint32_t *)arg;
}

/* What all tenants share is only an operator's to throw away. */
static void who_may_forget(void **state)
{
    (void)state;
    static const char *const paths[] = {"/reset_prefix_cache", "/flush_cache"};
    write_keys("{}", "{}");
    rig_ready();
    for (uint32_t i = 0; i < 2; i++) {
        assert_int_equal(status_of("POST", paths[i], "", ""), 401);
        assert_int_equal(status_of("POST", paths[i], KEY_A, ""), 403);
        assert_int_equal(status_of("GET", paths[i], KEY_OP, NULL), 405);
        assert_int_equal(R.n_forgets, i);
        rig_client *client = ask("POST", paths[i], KEY_OP, "");
        assert_int_equal(rig_status(client), 200);
        assert_non_null(strstr(cm_bytes_text(&client->in), "{\"routers\":1}"));
        rig_close(client);
        rig_until(has_forgotten, &(uint32_t){i + 1});
    }
}

/* A surface that forgets to say who asks gets nothing. */
static void nobody_asks(void **state)
{
    (void)state;
    static const gw_stream_events deaf = {0};
    gw_stream *stream;
    gw_error error;
    write_keys("{}", "{}");
    rig_ready();
    json_t *body = json_loads("{\"prompt\":\"x\"}", 0, NULL);
    gw_ask of = {.kind = GW_ASK_COMPLETE, .body = body, .deadline_ms = UINT64_MAX};
    assert_true(gw_stream_open(R.gateway, &of, &deaf, NULL, &stream, &error) != CM_OK);
    assert_int_equal(error.cause, GW_CAUSE_UNAUTHENTICATED);
    json_decref(body);
}

/* ---- whose is whose ---- */

static void streams_are_their_tenants(void **state)
{
    (void)state;
    gw_tenant *a, *b, *operator_of_all;
    gw_error error;
    write_keys("{}", "{}");
    rig_ready();
    R.mode = RIG_HOLD;
    rig_reply("ok");
    rig_client *client = rig_open("POST", CHAT, KEY_A CLOSE, STREAM);
    rig_wait_text(client, "chatcmpl-");
    char id[64] = "";
    sscanf(strstr(cm_bytes_text(&client->in), "chatcmpl-"), "%60[^\":]", id);

    assert_int_equal(gw_gateway_identify(R.gateway, NULL, "key-of-a", &a, &error), CM_OK);
    assert_int_equal(gw_gateway_identify(R.gateway, NULL, "key-of-b", &b, &error), CM_OK);
    assert_int_equal(gw_gateway_identify(R.gateway, NULL, "key-of-operator", &operator_of_all, &error),
                     CM_OK);
    assert_false(gw_stream_abort(R.gateway, b, id));
    assert_int_equal(gw_stream_abort_all(R.gateway, b), 0);

    /* another tenant asks its routers for something else by the same name */
    char path[128];
    snprintf(path, sizeof(path), "/v1/streams/%s", id);
    R.n_found = 1;
    R.keeps = true;
    assert_int_equal(status_of("GET", path, "", NULL), 401);
    assert_int_equal(R.n_finds, 0);
    rig_client *stranger = rig_open("GET", path, KEY_B CLOSE, NULL);
    rig_wait_closed(stranger);
    assert_int_equal(R.n_finds, 1);
    assert_int_equal(rig_status(stranger), 404); /* what was looked for is not what was opened */
    rig_close(stranger);
    rig_client *owner = rig_open("GET", path, KEY_A CLOSE, NULL);
    rig_wait_text(owner, "HTTP/1.1 200");
    rig_close(owner);

    assert_true(gw_stream_abort_all(R.gateway, operator_of_all) >= 1);
    rig_wait_closed(client);
    rig_close(client);
    rig_until(no_streams, NULL);
}

/* ---- turns ---- */

static void say(uint32_t n_opens, const char *text)
{
    rig_wait_opens(n_opens);
    rig_reply(text);
    rig_tokens(0, R.reply, R.n_reply, BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP);
}

/* While it waits the client hears of it, and what it gets in the end is whole. */
static void waiting_is_told(void **state)
{
    (void)state;
    write_keys("{\"running_max\":1}", "{}");
    rig_set("keep_alive_ms", "10");
    rig_ready();
    R.mode = RIG_HOLD;
    rig_client *first = rig_open("POST", CHAT, KEY_A CLOSE, STREAM);
    rig_wait_opens(1);
    rig_client *stream = rig_open("POST", CHAT, KEY_A CLOSE, STREAM);
    rig_wait_text(stream, ": keep-alive\n\n");
    assert_int_equal(rig_status(stream), 200);
    rig_client *whole = rig_open("POST", CHAT, KEY_A CLOSE, "{" NO_THINKING "," USER("x") "}");
    rig_wait_text(whole, "\r\n\r\n1\r\n\n");
    rig_client *other = rig_open("POST", CHAT, KEY_B CLOSE, STREAM);
    rig_wait_opens(2); /* the other tenant's, past them */
    assert_null(strstr(cm_bytes_text(&stream->in), "data:"));
    say(2, "b's");
    rig_wait_closed(other);
    assert_non_null(strstr(cm_bytes_text(&other->in), "[DONE]"));
    R.stream = R.opened[0].stream;
    say(2, "first");
    rig_wait_closed(first);
    say(3, "2");
    rig_wait_closed(stream);
    assert_non_null(strstr(cm_bytes_text(&stream->in), "\"content\":\"2\""));
    assert_non_null(strstr(cm_bytes_text(&stream->in), "[DONE]"));
    say(4, "third");
    rig_wait_closed(whole);
    cm_bytes body;
    cm_bytes_init(&body, 0);
    rig_body(whole, &body);
    json_t *reply = json_loads(cm_bytes_text(&body), 0, NULL);
    assert_string_equal(rig_text_at(reply, "choices.0.message.content"), "third");
    json_decref(reply);
    cm_bytes_fini(&body);
    rig_close(first);
    rig_close(stream);
    rig_close(whole);
    rig_close(other);
    rig_until(no_streams, NULL);
}

static void waiting_ends(void **state)
{
    (void)state;
    write_keys("{\"running_max\":1,\"queue_max\":2}", "{}");
    rig_set("queue_ms", "200");
    rig_ready();
    R.mode = RIG_HOLD;
    rig_client *first = rig_open("POST", CHAT, KEY_A CLOSE, STREAM);
    rig_wait_opens(1);
    rig_client *gone = rig_open("POST", CHAT, KEY_A CLOSE, STREAM);
    rig_client *late = ask("POST", CHAT, KEY_A, STREAM);
    assert_int_equal(rig_status(late), 429);
    assert_true(rig_header_is(late, "retry-after", "1"));
    assert_true(rig_header_is(late, "x-should-retry", "true"));
    assert_non_null(strstr(cm_bytes_text(&late->in), "has waited"));
    assert_int_equal(R.n_opens, 1); /* no router heard of it */
    rig_close(late);
    rig_close(gone);
    rig_close(first);
    rig_until(no_streams, NULL);
}

static void too_many(void **state)
{
    (void)state;
    write_keys("{\"running_max\":1,\"queue_max\":1}", "{\"requests_per_minute\":1}");
    rig_ready();
    R.mode = RIG_HOLD;
    rig_client *one = rig_open("POST", CHAT, KEY_A CLOSE, STREAM);
    rig_wait_opens(1);
    rig_client *two = rig_open("POST", CHAT, KEY_A CLOSE, "{\"stream\":true,\"n\":3," USER("x") "}");
    rig_wait_closed(two); /* three answers are more than may wait: none of them does */
    assert_int_equal(rig_status(two), 429);
    assert_non_null(strstr(cm_bytes_text(&two->in), "rate_limit_exceeded"));
    assert_non_null(strstr(cm_bytes_text(&two->in), "please try again in 1s"));
    assert_true(rig_header_is(two, "retry-after-ms", "1000"));
    rig_client *three = rig_open("POST", CHAT, KEY_A CLOSE, STREAM);

    R.mode = RIG_ANSWER;
    rig_reply("ok");
    assert_int_equal(status_of("POST", CHAT, KEY_B, STREAM), 200);
    rig_client *many = ask("POST", CHAT, KEY_B, STREAM);
    assert_int_equal(rig_status(many), 429);
    assert_true(rig_header_is(many, "retry-after", "60"));
    rig_close(many);

    rig_close(one);
    rig_wait_closed(three); /* its turn came when the first went away */
    assert_int_equal(rig_status(three), 200);
    rig_close(two);
    rig_close(three);
    rig_until(no_streams, NULL);
}

static bool is_committed(void *arg)
{
    return R.epoch_committed == *(const uint64_t *)arg;
}

/* Each of two gateways lets in its part; who is alone again all of it. */
static void two_gateways_share(void **state)
{
    (void)state;
    uint64_t second = 2, third = 3;
    write_keys("{\"requests_per_minute\":6}", "{}");
    rig_ready();
    rig_reply("ok");
    R.two_gateways = true;
    rig_commit(second, true, true);
    rig_until(is_committed, &second);
    for (uint32_t i = 0; i < 3; i++) {
        assert_int_equal(status_of("POST", CHAT, KEY_A, STREAM), 200);
    }
    rig_client *many = ask("POST", CHAT, KEY_A, STREAM);
    assert_int_equal(rig_status(many), 429);
    assert_non_null(strstr(cm_bytes_text(&many->in), "too many requests in a minute (3)"));
    rig_close(many);
    R.two_gateways = false;
    rig_commit(third, true, true);
    rig_until(is_committed, &third);
    many = ask("POST", CHAT, KEY_A, STREAM);
    assert_int_equal(rig_status(many), 429); /* what was used is used; it comes back twice as fast */
    assert_non_null(strstr(cm_bytes_text(&many->in), "too many requests in a minute (6)"));
    rig_close(many);
}

/* ---- what is written down ---- */

static const char *line_of(const char *what)
{
    static char line[1024];
    const char *at = strstr(cm_bytes_text(&g_log), what);
    if (at == NULL) {
        fail_msg("no '%s' in:\n%s", what, cm_bytes_text(&g_log));
    }
    while (at > cm_bytes_text(&g_log) && at[-1] != '\n') {
        at--;
    }
    snprintf(line, sizeof(line), "%.*s", (int)strcspn(at, "\n"), at);
    return line;
}

static uint32_t count_of(const char *what)
{
    uint32_t n = 0;
    for (const char *at = cm_bytes_text(&g_log); (at = strstr(at, what)) != NULL; at++) {
        n++;
    }
    return n;
}

static void lines(void **state)
{
    (void)state;
    write_keys("{}", "{}");
    rig_ready();
    rig_reply("ok");
    rig_client *client =
        ask("POST", CHAT, KEY_A "X-Request-Id: mine-1\r\ntraceparent: 00-" TRACE "-00f067aa0ba902b7-01\r\n",
            "{\"n\":2," NO_THINKING "," USER("a secret question") "}");
    assert_int_equal(rig_status(client), 200);
    assert_true(rig_header_is(client, "traceparent", "00-" TRACE "-00f067aa0ba902b7-01"));
    assert_string_equal(R.traceparent, "00-" TRACE "-00f067aa0ba902b7-01"); /* the router was told */
    rig_close(client);
    const char *line = line_of("id mine-1");
    char want[256];
    snprintf(want, sizeof(want),
             "tenant a surface /chat/completions status 200 end stop prompt %zu completion %u ", R.prompt.n,
             2 * R.n_reply);
    assert_non_null(strstr(line, want));
    assert_non_null(strstr(line, "trace " TRACE));
    assert_non_null(strstr(line, "queue_ms "));
    assert_non_null(strstr(line, "first_ms "));
    assert_int_equal(count_of("id mine-1"), 1);

    (void)status_of("POST", CHAT, "X-Request-Id: mine-2\r\n" KEY_B, "{\"temperature\":\"x\"," USER("x") "}");
    assert_non_null(strstr(line_of("id mine-2"),
                           "tenant b surface /chat/completions status 400 end invalid_request_error"));
    (void)status_of("POST", CHAT, "X-Request-Id: mine-3\r\n", "{" USER("x") "}");
    assert_non_null(strstr(line_of("id mine-3"), "tenant - surface /chat/completions status 401"));
    (void)status_of("GET", "/nothing", "X-Request-Id: mine-4\r\n", NULL);
    assert_non_null(strstr(line_of("id mine-4"), "tenant - surface - status 404"));
    (void)status_of("GET", "/health", "X-Request-Id: mine-5\r\n", NULL);
    assert_int_equal(count_of("id mine-5"), 0); /* as debug */

    R.mode = RIG_HOLD;
    client = rig_open("POST", CHAT, KEY_A "X-Request-Id: mine-6\r\n", STREAM);
    rig_wait_text(client, "assistant");
    rig_close(client);
    rig_until(no_streams, NULL);
    assert_non_null(strstr(line_of("id mine-6"), "status 200 end cancelled"));
    assert_null(strstr(cm_bytes_text(&g_log), "secret"));
    assert_null(strstr(cm_bytes_text(&g_log), "key-of"));
}

int main(void)
{
#define TEST(fn) cmocka_unit_test_setup_teardown(fn, begin, finish)
    const struct CMUnitTest tests[] = {
        TEST(who_may_ask),
        TEST(open_metrics),
        TEST(who_may_forget),
        TEST(nobody_asks),
        TEST(streams_are_their_tenants),
        TEST(waiting_is_told),
        TEST(waiting_ends),
        TEST(too_many),
        TEST(two_gateways_share),
        TEST(lines),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
