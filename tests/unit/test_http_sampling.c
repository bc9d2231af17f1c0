/* Sampling over HTTP: what a body's fields come to at the router, log-probabilities, several answers to one
 * request. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/stats.h"
#include "tests/unit/gateway_rig.h"

static bool no_streams(void *arg)
{
    (void)arg;
    return cm_stat_get(CM_STAT_ledger_streams) == 0;
}

/* Every filter arrives at the router; what is off is not said. */
static void filters(void **state)
{
    (void)state;
    int status;
    rig_ready();
    rig_reply("a");
    json_t *reply = rig_ask(
        "POST", CHAT,
        "{" NO_THINKING
        "," USER("x") ",\"top_k\":5,\"min_p\":0.25,\"repetition_penalty\":1.5,"
                      "\"frequency_penalty\":-0.5,\"presence_penalty\":0.75,\"logit_bias\":{\"12\":-100}}",
        &status);
    assert_int_equal(status, 200);
    assert_true(json_is_null(rig_at(reply, "choices.0.logprobs")));
    json_decref(reply);
    const Baleen__Engine__V1__SamplerParams *s = &R.sampler;
    assert_true(s->has_top_k && s->top_k == 5 && s->has_min_p && s->min_p > 0.24f && s->min_p < 0.26f);
    assert_true(s->has_repetition_penalty && s->repetition_penalty > 1.49f && s->repetition_penalty < 1.51f);
    assert_true(s->has_frequency_penalty && s->frequency_penalty > -0.51f && s->frequency_penalty < -0.49f);
    assert_true(s->has_presence_penalty && s->presence_penalty > 0.74f && s->presence_penalty < 0.76f);
    assert_true(R.n_bias == 1 && R.bias_id[0] == 12 && R.bias[0] < -99);
    assert_false(s->has_top_logprobs);
    reply = rig_ask("POST", CHAT, "{" USER("x") ",\"top_k\":-1,\"repetition_penalty\":1}", &status);
    json_decref(reply);
    assert_false(s->has_top_k || s->has_min_p || s->has_repetition_penalty || s->has_frequency_penalty ||
                 s->has_presence_penalty || R.n_bias > 0);
}

static void log_probabilities(void **state)
{
    (void)state;
    int status;
    rig_ready();
    rig_reply("hm|ok so");
    json_t *reply = rig_ask("POST", CHAT, "{" USER("x") ",\"logprobs\":true,\"top_logprobs\":3}", &status);
    assert_int_equal(status, 200);
    assert_true(R.sampler.has_top_logprobs && R.sampler.top_logprobs == 3);
    const json_t *content = rig_at(reply, "choices.0.logprobs.content");
    const json_t *reasoning = rig_at(reply, "choices.0.logprobs.reasoning_content");
    assert_int_equal(json_array_size(content) + json_array_size(reasoning),
                     R.n_reply - 1); /* </think> is in neither */
    cm_bytes text;
    cm_bytes_init(&text, 0);
    for (size_t i = 0; i < json_array_size(content); i++) {
        cm_bytes_append_text(&text, rig_text_at(json_array_get(content, i), "token"));
    }
    assert_string_equal(cm_bytes_text(&text), "ok so");
    cm_bytes_fini(&text);
    assert_true(json_number_value(rig_at(content, "0.logprob")) < -0.4);
    assert_int_equal(json_array_size(rig_at(content, "0.top_logprobs")), 3);
    assert_true(json_number_value(rig_at(content, "0.top_logprobs.1.logprob")) < -1.9);
    assert_true(json_number_value(rig_at(content, "0.top_logprobs.2.logprob")) <
                -9998); /* JSON has no infinity */
    json_decref(reply);
    reply = rig_ask("POST", "/v1/completions", "{\"prompt\":\"a\",\"logprobs\":0,\"max_tokens\":2}", &status);
    assert_int_equal(json_array_size(rig_at(reply, "choices.0.logprobs.tokens")), 2);
    assert_int_equal(json_object_size(rig_at(reply, "choices.0.logprobs.top_logprobs.0")),
                     1); /* the chosen one alone */
    json_decref(reply);
}

/* ---- several answers to one request ---- */

static void choices_whole(void **state)
{
    (void)state;
    int status;
    rig_ready();
    rig_reply("same");
    json_t *reply = rig_ask("POST", CHAT, "{\"n\":3,\"seed\":5," NO_THINKING "," USER("x") "}", &status);
    assert_int_equal(status, 200);
    assert_int_equal(R.n_opens, 3);
    uint32_t n_own = 0;
    for (uint32_t i = 0; i < 3; i++) {
        char path[64];
        snprintf(path, sizeof(path), "choices.%u.index", i);
        assert_int_equal(rig_int_at(reply, path), i);
        snprintf(path, sizeof(path), "choices.%u.message.content", i);
        assert_string_equal(rig_text_at(reply, path), "same");
        n_own += R.opened[i].seed == 5; /* the client's is for the first */
        assert_true(R.opened[i].seed != R.opened[(i + 1) % 3].seed);
    }
    assert_int_equal(n_own, 1);
    assert_int_equal(json_array_size(rig_at(reply, "choices")), 3);
    assert_int_equal(rig_int_at(reply, "usage.completion_tokens"), 3 * R.n_reply);
    assert_int_equal(rig_int_at(reply, "usage.prompt_tokens"), R.prompt.n);
    json_decref(reply);
}

/* Speaks about choice 0 (the one with the client's seed) or 1. */
static void say_of(uint32_t choice, uint64_t seed, uint32_t offset, uint32_t n,
                   Baleen__Engine__V1__SeqEnd end)
{
    R.stream = R.opened[(R.opened[0].seed == seed) == (choice == 0) ? 0 : 1].stream;
    rig_tokens(offset, R.reply + offset, n, end);
}

static void choices_stream(void **state)
{
    (void)state;
    rig_ready();
    R.mode = RIG_MUTE;
    rig_reply("one two three");
    rig_client *client = rig_open("POST", CHAT, "Connection: close\r\n",
                                  "{\"stream\":true,\"n\":2,\"seed\":9," NO_THINKING "," USER("x") "}");
    rig_wait_opens(2);
    say_of(1, 9, 0, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    say_of(1, 9, 0, 1, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    say_of(0, 9, 0, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    rig_wait_text(client, "one");
    say_of(0, 9, 0, 2, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    rig_wait_text(client, "\"index\":0,\"delta\":{\"content\"");
    say_of(0, 9, 2, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP);
    say_of(1, 9, 1, R.n_reply - 1, BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP);
    rig_wait_closed(client);
    cm_bytes body;
    cm_bytes_init(&body, 0);
    rig_body(client, &body);
    assert_non_null(strstr(cm_bytes_text(&body), "\"index\":1,\"delta\":{\"content\":\"one\"}"));
    cm_bytes text[2];
    uint32_t n_finish = 0, n_usage = 0;
    bool done = false;
    cm_bytes_init(&text[0], 0);
    cm_bytes_init(&text[1], 0);
    for (char *line = strtok((char *)body.data, "\n"); line != NULL; line = strtok(NULL, "\n")) {
        json_t *chunk = json_loads(line + 6, 0, NULL);
        int64_t index = rig_int_at(chunk, "choices.0.index");
        const char *content = json_string_value(rig_at(chunk, "choices.0.delta.content"));
        done = strcmp(line, "data: [DONE]") == 0;
        if (content != NULL) {
            cm_bytes_append_text(&text[index], content);
        }
        n_finish += json_is_string(rig_at(chunk, "choices.0.finish_reason"));
        n_usage += json_is_object(rig_at(chunk, "usage"));
        json_decref(chunk);
    }
    assert_true(done && n_finish == 2 && n_usage == 1);
    assert_string_equal(cm_bytes_text(&text[1]), "one two three");
    assert_int_equal(strncmp(cm_bytes_text(&text[0]), "one", 3), 0);
    cm_bytes_fini(&text[0]);
    cm_bytes_fini(&text[1]);
    cm_bytes_fini(&body);
    rig_close(client);
}

/* One that is refused before all were accepted is still a status, and the other one is cancelled. */
static void choice_refused(void **state)
{
    (void)state;
    rig_ready();
    R.mode = RIG_MUTE;
    R.refuse_status = CM_E_CAPACITY;
    rig_reply("one");
    rig_client *client = rig_open("POST", CHAT, "Connection: close\r\n",
                                  "{\"stream\":true,\"n\":2,\"seed\":9," NO_THINKING "," USER("x") "}");
    rig_wait_opens(2);
    say_of(0, 9, 0, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    say_of(0, 9, 0, 1, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    uint64_t other = R.stream;
    say_of(1, 9, 0, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED);
    rig_wait_closed(client);
    assert_int_equal(rig_status(client), 429);
    rig_wait_cancels(1);
    assert_int_equal(R.cancelled, other);
    rig_until(no_streams, NULL);
    rig_close(client);

    client = rig_open("POST", CHAT, "", "{\"stream\":true,\"n\":2," USER("x") "}");
    rig_wait_opens(4);
    rig_close(client); /* gone before any word: both end */
    rig_wait_cancels(3);
    rig_until(no_streams, NULL);
}

/* One that fails later is the last thing said: what the others have to say in the same moment is not told. */
static void choice_fails(void **state)
{
    (void)state;
    rig_ready();
    R.mode = RIG_HOLD;
    R.refuse_status = CM_E_IO;
    rig_reply("one two");
    rig_client *client = rig_open("POST", CHAT, "Connection: close\r\n",
                                  "{\"stream\":true,\"n\":2,\"seed\":9," NO_THINKING "," USER("x") "}");
    rig_wait_text(client, "\"index\":1");
    say_of(1, 9, 0, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED);
    say_of(0, 9, 0, 1, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    rig_wait_closed(client);
    cm_bytes body;
    cm_bytes_init(&body, 0);
    rig_body(client, &body);
    assert_non_null(strstr(cm_bytes_text(&body), "{\"error\":"));
    assert_null(strstr(cm_bytes_text(&body), "one"));
    assert_null(strstr(cm_bytes_text(&body), "[DONE]"));
    cm_bytes_fini(&body);
    rig_wait_cancels(1);
    rig_until(no_streams, NULL);
    rig_close(client);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
    const struct CMUnitTest tests[] = {
        TEST(filters),        TEST(log_probabilities), TEST(choices_whole),
        TEST(choices_stream), TEST(choice_refused),    TEST(choice_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
