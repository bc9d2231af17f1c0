/* Clients that come back over HTTP: from the last event they have on, the same events as if nothing had
 * happened. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/stats.h"
#include "tests/unit/gateway_rig.h"

#define GOING_ON BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON
#define STOP     BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP
#define ASK      "{\"stream\":true," NO_THINKING "," USER("x")
#define KEEPING  ",\"stream_options\":{\"include_usage\":true,\"resumable\":true}}"

enum { EVENTS_MAX = 64 };

typedef struct events {
    uint32_t n;
    char id[EVENTS_MAX][200]; /* "" when it has none */
    char data[EVENTS_MAX][2000];
} events;

static void read_events(const rig_client *client, events *out)
{
    cm_bytes body;
    memset(out, 0, sizeof(*out));
    cm_bytes_init(&body, 0);
    rig_body(client, &body);
    cm_bytes_append(&body, "", 1);
    for (char *line = strtok((char *)body.data, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        assert_in_range(out->n, 0, EVENTS_MAX - 1);
        if (strncmp(line, "id: ", 4) == 0) {
            snprintf(out->id[out->n], sizeof(out->id[0]), "%s", line + 4);
        } else if (strncmp(line, "data: ", 6) == 0) {
            snprintf(out->data[out->n++], sizeof(out->data[0]), "%s", line + 6);
        }
    }
    cm_bytes_fini(&body);
}

static bool has_detached(void *arg)
{
    return R.n_detached == *(uint32_t *)arg;
}

static void wait_detached(uint32_t n)
{
    rig_until(has_detached, &n);
}

static bool has_resumed(void *arg)
{
    return R.n_resumes >= *(uint32_t *)arg;
}

static void wait_resumes(uint32_t n)
{
    rig_until(has_resumed, &n);
}

/* The whole answer in one go, for comparison. The id differs, and with it every event: it is replaced by the
 * same number of x. */
static void same_but_ids(events *e)
{
    for (uint32_t i = 0; i < e->n; i++) {
        for (char *at = strstr(e->data[i], "chatcmpl-"); at != NULL; at = strstr(at, "chatcmpl-")) {
            memset(at, 'x', strlen("chatcmpl-") + 32);
        }
        char *created = strstr(e->data[i], "\"created\":");
        if (created != NULL) {
            memset(created + 10, '0', 10);
        }
    }
}

static void whole_answer(events *out)
{
    R.mode = RIG_ANSWER;
    rig_client *client = rig_open("POST", CHAT, "Connection: close\r\n", ASK KEEPING);
    rig_wait_closed(client);
    read_events(client, out);
    rig_close(client);
}

static rig_client *come_back(const char *method, const char *path, const char *last_id)
{
    char headers[300];
    snprintf(headers, sizeof(headers), "Connection: close\r\nLast-Event-ID: %s\r\n", last_id);
    return rig_open(method, path, headers, strcmp(method, "POST") == 0 ? "{}" : NULL);
}

/* However far it had come: the rest follows, nothing twice, nothing left out. */
static void from_every_event(void **state)
{
    (void)state;
    static events whole, first, rest;
    rig_ready();
    rig_reply("one two");
    whole_answer(&whole);
    assert_string_equal(whole.data[whole.n - 1], "[DONE]");
    same_but_ids(&whole);
    uint32_t n_detached = 0, n_resumes = 0;
    for (uint32_t at = 1; at <= whole.n; at++) {
        R.mode = RIG_HOLD;
        R.keeps = true;
        R.n_found = 1;
        rig_client *client = rig_open("POST", CHAT, "Connection: close\r\n", ASK KEEPING);
        rig_wait_text(client, "assistant");
        uint64_t birth = R.birth, term = R.term;
        rig_tokens(0, R.reply, 1, GOING_ON);
        rig_wait_text(client, ":2\n");
        read_events(client, &first);
        rig_close(client);
        wait_detached(++n_detached);
        char last[240];
        snprintf(last, sizeof(last), "%.*s:%u", (int)strcspn(first.id[0], ":"), first.id[0], at);

        client = come_back(at % 2 == 0 ? "POST" : "GET", at % 2 == 0 ? CHAT : "/v1/streams/x", last);
        if (at % 2 != 0) { /* the path must name the same stream */
            rig_wait_closed(client);
            assert_int_equal(rig_status(client), 400);
            rig_close(client);
            char path[240];
            snprintf(path, sizeof(path), "/v1/streams/%.*s", (int)strcspn(first.id[0], ":"), first.id[0]);
            client = come_back("GET", path, last);
        }
        wait_resumes(++n_resumes);
        assert_true(R.birth == birth && R.term > term);
        assert_int_equal(R.resume_from, 0); /* told again from the first token on */
        rig_tokens(0, R.reply, R.n_reply, STOP);
        rig_wait_closed(client);
        assert_int_equal(rig_status(client), 200);
        read_events(client, &rest);
        assert_int_equal(rest.n, whole.n - at);
        same_but_ids(&rest);
        for (uint32_t i = 0; i < rest.n; i++) {
            assert_string_equal(rest.data[i], whole.data[at + i]);
            assert_string_equal(strrchr(rest.id[i], ':'), strrchr(whole.id[at + i], ':'));
            assert_memory_equal(rest.id[i], first.id[0], strcspn(first.id[0], ":"));
        }
        rig_close(client);
    }
    assert_int_equal(cm_stat_get(CM_STAT_ledger_streams), 0);
}

/* Without resumable, a client that goes away ends its request; the answer of a gateway that died is kept all
 * the same. */
static void disconnect_cancels(void **state)
{
    (void)state;
    rig_ready();
    R.mode = RIG_HOLD;
    rig_client *client = rig_open("POST", CHAT, "", ASK "}");
    rig_wait_text(client, "assistant");
    assert_true(strstr(R.resume, "\"messages\"") != NULL);
    rig_close(client);
    rig_wait_cancels(1);
    assert_int_equal(R.n_detached, 0);
}

/* Who was told no event yet has no id to come back with: nobody computes it any more. */
static void no_id_no_return(void **state)
{
    (void)state;
    rig_ready();
    R.mode = RIG_MUTE;
    rig_client *client = rig_open("POST", CHAT, "", ASK KEEPING);
    rig_wait_opens(1);
    rig_close(client);
    rig_wait_cancels(1);
    assert_int_equal(R.n_detached, 0);
    assert_int_equal(cm_stat_get(CM_STAT_ledger_streams), 0);
}

/* Who came back has the id, though nothing was told on this connection yet. */
static void gone_again(void **state)
{
    (void)state;
    static events got;
    rig_ready();
    rig_reply("one two");
    R.mode = RIG_HOLD;
    R.keeps = true;
    R.n_found = 1;
    rig_client *client = rig_open("POST", CHAT, "Connection: close\r\n", ASK KEEPING);
    rig_wait_text(client, "assistant");
    read_events(client, &got);
    rig_close(client);
    wait_detached(1);
    client = come_back("POST", CHAT, got.id[got.n - 1]);
    wait_resumes(1);
    rig_close(client);
    wait_detached(2);
    assert_int_equal(R.n_cancels, 0);
}

/* Before the stream's id is known there is the request's, which its client chose. */
static void ended_by_the_request_id(void **state)
{
    (void)state;
    int status;
    rig_ready();
    for (uint32_t i = 0; i < 2; i++) {
        R.mode = i == 0 ? RIG_MUTE : RIG_HOLD;
        rig_client *client = rig_open("POST", CHAT, "X-Request-Id: mine-1\r\n", ASK KEEPING);
        rig_wait_opens(i + 1);
        if (i == 1) {
            rig_wait_text(client, "assistant");
        }
        json_t *reply = rig_ask("DELETE", "/v1/streams/mine-2", NULL, &status);
        assert_int_equal(status, 404);
        json_decref(reply);
        reply = rig_ask("DELETE", "/v1/streams/mine-1", NULL, &status);
        assert_int_equal(status, 200);
        json_decref(reply);
        rig_wait_cancels(i + 1);
        rig_close(client);
        assert_int_equal(R.n_detached, 0);
        assert_int_equal(cm_stat_get(CM_STAT_ledger_streams), 0);
    }
}

static void refused(void **state)
{
    (void)state;
    static const struct {
        const char *method, *path, *last;
        int status;
        const char *word;
    } rows[] = {
        {"GET", "/v1/streams/chatcmpl-0", "chatcmpl-0:3", 404, "stream_not_found"},
        {"POST", CHAT, "chatcmpl-0:3", 404, "ask again from the start"},
        {"POST", "/v1/completions", "other:0", 404, "stream_not_found"},
        {"GET", "/v1/streams/chatcmpl-0", "chatcmpl-1:3", 400, "of the stream in the path"},
        {"POST", CHAT, "3", 400, "Last-Event-ID"},
        {"POST", CHAT, "chatcmpl-0:", 400, "Last-Event-ID"},
        {"POST", CHAT, "chatcmpl-0:-1", 400, "Last-Event-ID"},
        {"POST", CHAT, "chatcmpl-0:1.", 400, "Last-Event-ID"},
        {"POST", CHAT, "chatcmpl-0:1x", 400, "Last-Event-ID"},
        {"POST", CHAT, "chatcmpl-0:99999999999", 400, "Last-Event-ID"},
        {"HEAD", "/v1/streams/chatcmpl-0", "chatcmpl-0:3", 405, ""},
    };
    rig_ready();
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        rig_client *client = come_back(rows[i].method, rows[i].path, rows[i].last);
        rig_wait_closed(client);
        assert_int_equal(rig_status(client), rows[i].status);
        assert_non_null(strstr(cm_bytes_text(&client->in), rows[i].word));
        rig_close(client);
    }
    assert_int_equal(R.n_finds, 3);

    /* one of another surface, and one with other answers than the client counts */
    R.n_found = 1;
    snprintf(R.resume, sizeof(R.resume),
             "{\"surface\":\"grpc chat\",\"id\":\"mine\",\"created\":1,\"seed\":\"1\","
             "\"birth\":\"1\",\"body\":{}}");
    rig_client *client = come_back("GET", "/v1/streams/mine", "mine:1");
    rig_wait_closed(client);
    assert_int_equal(rig_status(client), 404);
    rig_close(client);
    snprintf(R.resume, sizeof(R.resume),
             "{\"surface\":\"http chat\",\"id\":\"mine\",\"created\":1,\"seed\":\"1\","
             "\"birth\":\"1\",\"body\":{}}");
    client = come_back("GET", "/v1/streams/mine", "mine:1.2");
    rig_wait_closed(client);
    assert_int_equal(rig_status(client), 400);
    rig_close(client);
    snprintf(R.resume, sizeof(R.resume), "no JSON");
    client = come_back("GET", "/v1/streams/mine", "mine:1");
    rig_wait_closed(client);
    assert_int_equal(rig_status(client), 404);
    rig_close(client);
    assert_int_equal(R.n_resumes, 0);
}

/* No router is there yet, as after a restart: the client is not told that its stream is unknown. */
static void before_routers(void **state)
{
    (void)state;
    rig_gateway();
    rig_client *client = come_back("GET", "/v1/streams/mine", "mine:1");
    R.n_found = 0;
    rig_commit(1, true, true);
    rig_wait_closed(client); /* asked as soon as it is linked */
    assert_int_equal(rig_status(client), 404);
    assert_int_equal(R.n_finds, 1);
    rig_close(client);
    client = come_back("GET", "/v1/streams/mine", "mine:1");
    rig_close(client); /* gone before the answer */
    rig_deaf();
    client = come_back("GET", "/v1/streams/mine", "mine:1");
    rig_wait_closed(client);
    assert_int_equal(rig_status(client), 503);
    assert_true(rig_header_is(client, "retry-after", NULL));
    rig_close(client);
}

static void say(uint64_t stream, uint64_t offset, uint32_t n, Baleen__Engine__V1__SeqEnd end)
{
    R.stream = stream;
    rig_tokens(offset, R.reply + offset, n, end);
}

/* Two answers: the second had finished, the first not. Its finish, told again, is not the last one, which
 * carries the usage; and the first's comes last though its tokens come first. */
static void two_answers(void **state)
{
    (void)state;
    static events first, rest;
    rig_set("encode_threads", "1"); /* choices reach the router in their order */
    rig_ready();
    rig_reply("one two");
    R.mode = RIG_HOLD;
    R.keeps = true;
    R.n_found = 2;
    rig_client *client = rig_open("POST", CHAT, "Connection: close\r\n",
                                  "{\"stream\":true,\"n\":2,\"seed\":9," NO_THINKING
                                  "," USER("x") ",\"stream_options\":{\"resumable\":true}}");
    rig_wait_opens(2);
    rig_wait_text(client, ":1.1\n");
    say(R.opened[1].stream, 0, R.n_reply, STOP);
    say(R.opened[0].stream, 0, 1, GOING_ON);
    rig_wait_text(client, ":2.");
    read_events(client, &first);
    rig_close(client);
    wait_detached(1); /* the second has ended */

    client = come_back("POST", CHAT, first.id[first.n - 1]);
    wait_resumes(2);
    say(R.resumed[0], 0, R.n_reply, STOP);
    say(R.resumed[1], 0, R.n_reply, STOP);
    rig_wait_closed(client);
    read_events(client, &rest);
    assert_non_null(strstr(first.data[first.n - 1], "\"index\":0"));
    for (uint32_t i = 0; i + 1 < rest.n; i++) {
        bool last = i + 2 == rest.n;
        assert_non_null(strstr(rest.data[i], "\"index\":0"));
        assert_int_equal(strstr(rest.data[i], "\"usage\":null") != NULL, !last);
        assert_int_equal(strstr(rest.data[i], "\"finish_reason\":\"stop\"") != NULL, last);
    }
    assert_non_null(strstr(rest.data[rest.n - 2], "\"usage\":{\"prompt_tokens\""));
    assert_string_equal(rest.data[rest.n - 1], "[DONE]");
    rig_close(client);
}

/* One of two is nowhere any more: it is computed anew, from the same seed. */
static void one_of_two_is_gone(void **state)
{
    (void)state;
    static events first, rest;
    rig_set("encode_threads", "1"); /* choices reach the router in their order */
    rig_ready();
    rig_reply("one two");
    R.mode = RIG_HOLD;
    R.keeps = true;
    R.n_found = 1;
    rig_client *client = rig_open("POST", CHAT, "Connection: close\r\n",
                                  "{\"stream\":true,\"n\":2," NO_THINKING "," USER("x") KEEPING);
    rig_wait_opens(2);
    rig_wait_text(client, ":1.1\n");
    read_events(client, &first);
    rig_close(client);
    wait_detached(2);
    R.mode = RIG_ANSWER;
    client = come_back("POST", CHAT, first.id[first.n - 1]);
    wait_resumes(1);
    rig_wait_opens(3);
    assert_true(R.opened[2].seed == R.opened[1].seed && R.opened[2].seed != R.opened[0].seed);
    say(R.resumed[0], 0, R.n_reply, STOP);
    rig_wait_closed(client);
    read_events(client, &rest);
    assert_string_equal(rest.data[rest.n - 1], "[DONE]");
    rig_close(client);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
    const struct CMUnitTest tests[] = {
        TEST(from_every_event),        TEST(disconnect_cancels),
        TEST(no_id_no_return),         TEST(gone_again),
        TEST(ended_by_the_request_id), TEST(refused),
        TEST(before_routers),          TEST(two_answers),
        TEST(one_of_two_is_gone),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
