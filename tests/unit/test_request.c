/* Every field of the bodies: a good value, a wrong type, a value out of range, and what cannot be honoured.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "gateway/request.h"

enum { VOCAB = 1000, GOOD = -1 };

#define MESSAGES "\"messages\":[{\"role\":\"user\",\"content\":\"hi\"}]"

/* What a body with one more field comes to. */
typedef struct field_case {
    gw_ask_kind kind;
    const char *field; /* JSON members */
    int cause;         /* GOOD or a gw_cause */
    const char *param; /* the field that is blamed */
} field_case;

#define CHAT_GOOD(field)                                                                                     \
    {                                                                                                        \
        GW_ASK_CHAT, field, GOOD, ""                                                                         \
    }
#define CHAT_BAD(field, param)                                                                               \
    {                                                                                                        \
        GW_ASK_CHAT, field, GW_CAUSE_INVALID, param                                                          \
    }
#define CHAT_NO(field, param)                                                                                \
    {                                                                                                        \
        GW_ASK_CHAT, field, GW_CAUSE_UNSUPPORTED, param                                                      \
    }
#define TEXT_GOOD(field)                                                                                     \
    {                                                                                                        \
        GW_ASK_COMPLETE, field, GOOD, ""                                                                     \
    }
#define TEXT_BAD(field, param)                                                                               \
    {                                                                                                        \
        GW_ASK_COMPLETE, field, GW_CAUSE_INVALID, param                                                      \
    }
#define TEXT_NO(field, param)                                                                                \
    {                                                                                                        \
        GW_ASK_COMPLETE, field, GW_CAUSE_UNSUPPORTED, param                                                  \
    }

#define SIXTEEN                                                                                              \
    "\"a\",\"b\",\"c\",\"d\",\"e\",\"f\",\"g\",\"h\",\"i\",\"j\",\"k\",\"l\",\"m\",\"n\",\"o\",\"p\""

static const field_case CASES[] = {
    CHAT_GOOD("\"model\":\"m\""),
    CHAT_BAD("\"model\":1", "model"),
    CHAT_GOOD("\"no_such_field\":{\"a\":[1]}"),
    CHAT_GOOD("\"stream\":true"),
    CHAT_GOOD("\"user_id\":\"\""),
    CHAT_BAD("\"user_id\":1", "user_id"),
    CHAT_BAD("\"user\":[]", "user"),
    CHAT_BAD("\"safety_identifier\":true", "safety_identifier"),
    CHAT_BAD("\"prompt_cache_key\":{}", "prompt_cache_key"),
    CHAT_BAD("\"cache_salt\":0", "cache_salt"),
    CHAT_BAD("\"cache_salt\":\"a\\u0000b\"", "cache_salt"),
    TEXT_GOOD("\"cache_salt\":\"a\""),
    CHAT_BAD("\"stream\":\"yes\"", "stream"),
    CHAT_BAD("\"stream\":1", "stream"),
    CHAT_GOOD("\"stream\":null"),
    CHAT_GOOD("\"stream_options\":{\"include_usage\":true}"),
    CHAT_BAD("\"stream_options\":true", "stream_options"),
    CHAT_BAD("\"stream_options\":{\"include_usage\":1}", "stream_options.include_usage"),
    CHAT_GOOD("\"max_tokens\":1"),
    CHAT_BAD("\"max_tokens\":0", "max_tokens"),
    CHAT_BAD("\"max_tokens\":-3", "max_tokens"),
    CHAT_BAD("\"max_tokens\":1.5", "max_tokens"),
    CHAT_BAD("\"max_tokens\":\"10\"", "max_tokens"),
    CHAT_BAD("\"max_tokens\":4294967296", "max_tokens"),
    CHAT_GOOD("\"max_completion_tokens\":1"),
    CHAT_BAD("\"max_completion_tokens\":0", "max_completion_tokens"),
    CHAT_BAD("\"max_completion_tokens\":true", "max_completion_tokens"),
    CHAT_GOOD("\"min_tokens\":0"),
    CHAT_BAD("\"min_tokens\":-1", "min_tokens"),
    CHAT_BAD("\"min_tokens\":\"a\"", "min_tokens"),
    CHAT_BAD("\"min_tokens\":11,\"max_tokens\":10", "min_tokens"),
    CHAT_GOOD("\"temperature\":0"),
    CHAT_GOOD("\"temperature\":2"),
    CHAT_GOOD("\"temperature\":0.7"),
    CHAT_BAD("\"temperature\":-0.1", "temperature"),
    CHAT_BAD("\"temperature\":2.01", "temperature"),
    CHAT_BAD("\"temperature\":\"hot\"", "temperature"),
    CHAT_GOOD("\"top_p\":1"),
    CHAT_GOOD("\"top_p\":0.01"),
    CHAT_BAD("\"top_p\":0", "top_p"),
    CHAT_BAD("\"top_p\":1.1", "top_p"),
    CHAT_BAD("\"top_p\":[]", "top_p"),
    CHAT_GOOD("\"seed\":-9223372036854775808"),
    CHAT_GOOD("\"seed\":9223372036854775807"),
    CHAT_BAD("\"seed\":1.0", "seed"),
    CHAT_BAD("\"seed\":\"1\"", "seed"),
    CHAT_GOOD("\"stop\":\"x\""),
    CHAT_GOOD("\"stop\":\"\""),
    CHAT_GOOD("\"stop\":[]"),
    CHAT_GOOD("\"stop\":[" SIXTEEN "]"),
    CHAT_BAD("\"stop\":[" SIXTEEN ",\"q\"]", "stop"),
    CHAT_BAD("\"stop\":1", "stop"),
    CHAT_BAD("\"stop\":[1]", "stop"),
    CHAT_BAD("\"stop\":\"a\\u0000b\"", "stop"),
    CHAT_GOOD("\"stop_token_ids\":[0,999]"),
    CHAT_BAD("\"stop_token_ids\":[1000]", "stop_token_ids"),
    CHAT_BAD("\"stop_token_ids\":[-1]", "stop_token_ids"),
    CHAT_BAD("\"stop_token_ids\":[\"1\"]", "stop_token_ids"),
    CHAT_BAD("\"stop_token_ids\":1", "stop_token_ids"),
    CHAT_GOOD("\"ignore_eos\":true"),
    CHAT_BAD("\"ignore_eos\":0", "ignore_eos"),
    CHAT_GOOD("\"include_stop_str_in_output\":true"),
    CHAT_BAD("\"include_stop_str_in_output\":0", "include_stop_str_in_output"),
    CHAT_GOOD("\"skip_special_tokens\":false"),
    CHAT_BAD("\"skip_special_tokens\":\"no\"", "skip_special_tokens"),
    CHAT_GOOD("\"thinking\":{\"type\":\"enabled\"}"),
    CHAT_BAD("\"thinking\":true", "thinking"),
    CHAT_GOOD("\"reasoning_effort\":\"high\""),
    CHAT_BAD("\"reasoning_effort\":3", "reasoning_effort"),
    CHAT_GOOD("\"chat_template_kwargs\":{}"),
    CHAT_BAD("\"chat_template_kwargs\":[]", "chat_template_kwargs"),
    CHAT_GOOD("\"n\":1"),
    CHAT_GOOD("\"n\":2"),
    CHAT_BAD("\"n\":129", "n"),
    CHAT_BAD("\"n\":0", "n"),
    CHAT_BAD("\"n\":\"1\"", "n"),
    CHAT_GOOD("\"presence_penalty\":0"),
    CHAT_GOOD("\"presence_penalty\":0.5"),
    CHAT_BAD("\"presence_penalty\":3", "presence_penalty"),
    CHAT_BAD("\"presence_penalty\":\"\"", "presence_penalty"),
    CHAT_GOOD("\"frequency_penalty\":0.0"),
    CHAT_GOOD("\"frequency_penalty\":-2"),
    CHAT_BAD("\"frequency_penalty\":-2.5", "frequency_penalty"),
    CHAT_GOOD("\"repetition_penalty\":1"),
    CHAT_GOOD("\"repetition_penalty\":2"),
    CHAT_BAD("\"repetition_penalty\":0", "repetition_penalty"),
    CHAT_BAD("\"repetition_penalty\":2.1", "repetition_penalty"),
    CHAT_GOOD("\"top_k\":-1"),
    CHAT_GOOD("\"top_k\":0"),
    CHAT_GOOD("\"top_k\":40"),
    CHAT_BAD("\"top_k\":-2", "top_k"),
    CHAT_BAD("\"top_k\":1.0", "top_k"),
    CHAT_GOOD("\"min_p\":0"),
    CHAT_GOOD("\"min_p\":0.1"),
    CHAT_BAD("\"min_p\":1.1", "min_p"),
    CHAT_GOOD("\"logit_bias\":{}"),
    CHAT_GOOD("\"logit_bias\":{\"1\":5,\"0\":-100,\"999\":100}"),
    CHAT_BAD("\"logit_bias\":[]", "logit_bias"),
    CHAT_BAD("\"logit_bias\":{\"1000\":5}", "logit_bias"),
    CHAT_BAD("\"logit_bias\":{\"-1\":5}", "logit_bias"),
    CHAT_BAD("\"logit_bias\":{\"01\":5}", "logit_bias"),
    CHAT_BAD("\"logit_bias\":{\"\":5}", "logit_bias"),
    CHAT_BAD("\"logit_bias\":{\"word\":5}", "logit_bias"),
    CHAT_BAD("\"logit_bias\":{\"4294967297\":5}", "logit_bias"),
    CHAT_BAD("\"logit_bias\":{\"1\":100.5}", "logit_bias"),
    CHAT_BAD("\"logit_bias\":{\"1\":\"5\"}", "logit_bias"),
    CHAT_GOOD("\"logprobs\":false"),
    CHAT_GOOD("\"logprobs\":true"),
    CHAT_BAD("\"logprobs\":1", "logprobs"),
    CHAT_GOOD("\"top_logprobs\":0"),
    CHAT_GOOD("\"logprobs\":true,\"top_logprobs\":20"),
    CHAT_BAD("\"top_logprobs\":5", "top_logprobs"),
    CHAT_BAD("\"logprobs\":false,\"top_logprobs\":5", "top_logprobs"),
    CHAT_BAD("\"top_logprobs\":21", "top_logprobs"),
    CHAT_NO("\"prompt_logprobs\":1", "prompt_logprobs"),
    CHAT_GOOD("\"response_format\":{\"type\":\"text\"}"),
    CHAT_GOOD("\"response_format\":{\"type\":\"json_object\"}"),
    CHAT_GOOD("\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"schema\":{}}}"),
    CHAT_BAD("\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{}}",
             "response_format.json_schema"),
    CHAT_BAD("\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"schema\":1}}",
             "response_format.json_schema"),
    CHAT_GOOD("\"guided_json\":{\"type\":\"null\"}"),
    CHAT_GOOD("\"guided_json\":\"{}\""),
    CHAT_BAD("\"guided_json\":3", "guided_json"),
    CHAT_GOOD("\"guided_regex\":\"a+\""),
    CHAT_BAD("\"guided_regex\":{}", "guided_regex"),
    CHAT_GOOD("\"guided_choice\":[\"a\"]"),
    CHAT_BAD("\"guided_choice\":\"a\"", "guided_choice"),
    CHAT_NO("\"guided_grammar\":\"root ::= x\"", "guided_grammar"),
    CHAT_GOOD("\"structured_outputs\":{}"),
    CHAT_GOOD("\"structured_outputs\":{\"json_object\":false},\"guided_regex\":\"a\""),
    CHAT_BAD("\"structured_outputs\":{\"json_object\":1}", "structured_outputs.json_object"),
    CHAT_BAD("\"structured_outputs\":{\"regex\":\"a\",\"choice\":[\"a\"]}", "structured_outputs.choice"),
    CHAT_BAD("\"guided_regex\":\"a\",\"response_format\":{\"type\":\"json_object\"}", "guided_regex"),
    CHAT_NO("\"structured_outputs\":{\"structural_tag\":\"x\"}", "structured_outputs.structural_tag"),
    TEXT_GOOD("\"guided_choice\":[\"a\"]"),
    CHAT_BAD("\"response_format\":{\"type\":\"xml\"}", "response_format"),
    CHAT_BAD("\"response_format\":{}", "response_format"),
    CHAT_BAD("\"response_format\":\"text\"", "response_format"),
    CHAT_GOOD("\"tools\":[]"),
    CHAT_GOOD("\"tools\":[{\"type\":\"function\"}]"),
    CHAT_BAD("\"tools\":{}", "tools"),
    CHAT_NO("\"functions\":[{}]", "functions"),
    CHAT_GOOD("\"tool_choice\":\"auto\""),
    CHAT_GOOD("\"tool_choice\":\"none\""),
    CHAT_BAD("\"tool_choice\":\"required\"", "tool_choice"), /* there is none */
    CHAT_BAD("\"tool_choice\":{\"type\":\"function\"}", "tool_choice"),
    CHAT_GOOD(
        "\"tool_choice\":\"required\",\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}]"),
    CHAT_BAD("\"tool_choice\":\"maybe\"", "tool_choice"),
    CHAT_BAD("\"tool_choice\":1", "tool_choice"),
    CHAT_GOOD("\"parallel_tool_calls\":false"),
    CHAT_BAD("\"parallel_tool_calls\":1", "parallel_tool_calls"),
    CHAT_GOOD("\"user\":\"u\",\"metadata\":{},\"store\":true,\"service_tier\":\"auto\""),
    TEXT_GOOD("\"best_of\":1"),
    TEXT_NO("\"best_of\":2", "best_of"),
    TEXT_BAD("\"best_of\":0", "best_of"),
    TEXT_GOOD("\"echo\":false"),
    TEXT_NO("\"echo\":true", "echo"),
    TEXT_BAD("\"echo\":\"\"", "echo"),
    TEXT_GOOD("\"logprobs\":false"),
    TEXT_GOOD("\"logprobs\":0"),
    TEXT_GOOD("\"logprobs\":20"),
    TEXT_BAD("\"logprobs\":21", "logprobs"),
    TEXT_BAD("\"logprobs\":true", "logprobs"),
    TEXT_BAD("\"logprobs\":-1", "logprobs"),
    TEXT_BAD("\"logprobs\":\"1\"", "logprobs"),
    TEXT_GOOD("\"suffix\":\"\""),
    TEXT_BAD("\"suffix\":1", "suffix"),
    TEXT_GOOD("\"tools\":[{}]"), /* a chat field: unknown here */
};

static void check_outcome(cm_status status, const gw_error *error, const field_case *c, const char *body)
{
    if (c->cause == GOOD) {
        if (status != CM_OK) {
            fail_msg("%s: refused: %s", body, error->message);
        }
        return;
    }
    if (status == CM_OK || (int)error->cause != c->cause || strcmp(error->param, c->param) != 0) {
        fail_msg("%s: status %d cause %d param '%s', wanted cause %d param '%s'", body, status,
                 (int)error->cause, error->param, c->cause, c->param);
    }
    assert_non_null(strstr(error->message, c->param)); /* the sentence names the field */
}

static void every_field(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(CASES) / sizeof(CASES[0]); i++) {
        const field_case *c = &CASES[i];
        char text[512];
        snprintf(text, sizeof(text), "{%s,%s}", c->kind == GW_ASK_CHAT ? MESSAGES : "\"prompt\":\"hi\"",
                 c->field);
        json_t *body = json_loads(text, JSON_ALLOW_NUL, NULL);
        assert_non_null(body);
        gw_request request;
        gw_error error = {0};
        cm_status status = gw_request_parse(c->kind, body, VOCAB, &request, &error);
        check_outcome(status, &error, c, text);
        if (status == CM_OK) {
            gw_request_free(&request);
        }
        json_decref(body);
    }
}

/* Calls may come when there are tools and tool_choice does not forbid them, whichever field stands first. */
static void which_calls(void **state)
{
    (void)state;
    static const struct {
        const char *fields;
        bool tools, one_call;
    } cases[] = {
        {"\"tools\":[]", false, false},
        {"\"tools\":[{}]", true, false},
        {"\"tools\":[{}],\"tool_choice\":\"auto\",\"parallel_tool_calls\":true", true, false},
        {"\"tool_choice\":\"none\",\"tools\":[{}]", false, false},
        {"\"tools\":[{}],\"parallel_tool_calls\":false", true, true},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        char text[512];
        gw_request request;
        gw_error error = {0};
        snprintf(text, sizeof(text), "{%s,%s}", MESSAGES, cases[i].fields);
        json_t *body = json_loads(text, 0, NULL);
        assert_int_equal(gw_request_parse(GW_ASK_CHAT, body, VOCAB, &request, &error), CM_OK);
        assert_int_equal(request.tools, cases[i].tools);
        assert_int_equal(request.one_call, cases[i].one_call);
        gw_request_free(&request);
        json_decref(body);
    }
}

/* Whole bodies: what must be there, and the shapes of a prompt. */
static void whole_bodies(void **state)
{
    (void)state;
    static const field_case bodies[] = {
        CHAT_BAD("{}", "messages"),
        CHAT_BAD("{\"messages\":[]}", "messages"),
        CHAT_BAD("{\"messages\":null}", "messages"),
        CHAT_BAD("{\"messages\":\"hi\"}", "messages"),
        CHAT_BAD("[]", ""),
        CHAT_GOOD("{" MESSAGES "}"),
        TEXT_BAD("{}", "prompt"),
        TEXT_BAD("{\"prompt\":null}", "prompt"),
        TEXT_BAD("{\"prompt\":1}", "prompt"),
        TEXT_BAD("{\"prompt\":[]}", "prompt"),
        TEXT_BAD("{\"prompt\":[1,\"a\"]}", "prompt"),
        TEXT_BAD("{\"prompt\":[1000]}", "prompt"),
        TEXT_BAD("{\"prompt\":[[]]}", "prompt"),
        TEXT_GOOD("{\"prompt\":\"\"}"),
        TEXT_GOOD("{\"prompt\":[1,2]}"),
        TEXT_GOOD("{\"prompt\":[\"a\"]}"),
        TEXT_GOOD("{\"prompt\":[[1,2]]}"),
        TEXT_NO("{\"prompt\":[\"a\",\"b\"]}", "prompt"),
        TEXT_NO("{\"prompt\":[[1],[2]]}", "prompt"),
        TEXT_BAD("{\"prompt\":[1],\"suffix\":\"x\"}", "suffix"),
    };
    for (size_t i = 0; i < sizeof(bodies) / sizeof(bodies[0]); i++) {
        json_t *body = json_loads(bodies[i].field, 0, NULL);
        assert_non_null(body);
        gw_request request;
        gw_error error = {0};
        cm_status status = gw_request_parse(bodies[i].kind, body, VOCAB, &request, &error);
        check_outcome(status, &error, &bodies[i], bodies[i].field);
        if (status == CM_OK) {
            gw_request_free(&request);
        }
        json_decref(body);
    }
}

static void values_arrive(void **state)
{
    (void)state;
    json_t *body =
        json_loads("{" MESSAGES ",\"stream\":true,\"stream_options\":{\"include_usage\":true},"
                   "\"max_completion_tokens\":7,\"max_tokens\":9,\"min_tokens\":3,\"temperature\":0.5,"
                   "\"top_p\":0.25,\"seed\":-5,\"stop\":[\"x\",\"\",\"yz\"],\"stop_token_ids\":[4,5],"
                   "\"ignore_eos\":true,\"skip_special_tokens\":false,\"include_stop_str_in_output\":true,"
                   "\"top_k\":12,\"min_p\":0.125,\"presence_penalty\":-1.5,\"frequency_penalty\":0.5,"
                   "\"repetition_penalty\":1.25,\"logit_bias\":{\"7\":-2.5,\"999\":100},\"logprobs\":true,"
                   "\"top_logprobs\":3,\"n\":4}",
                   0, NULL);
    gw_request r;
    gw_error error;
    assert_int_equal(gw_request_parse(GW_ASK_CHAT, body, VOCAB, &r, &error), CM_OK);
    assert_true(r.stream && r.include_usage && r.ignore_eos && r.keep_special && r.include_stop &&
                r.has_seed);
    assert_int_equal(r.tokens_max, 7); /* the newer name wins */
    assert_int_equal(r.tokens_min, 3);
    assert_true(r.temperature > 0.49 && r.temperature < 0.51 && r.top_p > 0.24 && r.top_p < 0.26);
    assert_int_equal(r.seed, -5);
    assert_int_equal(r.n_stop, 2);
    assert_string_equal(r.stop[1], "yz");
    assert_int_equal(r.n_stop_id, 2);
    assert_int_equal(r.stop_id[1], 5);
    assert_int_equal(r.top_k, 12);
    assert_true(r.min_p > 0.124 && r.min_p < 0.126 && r.presence_penalty < -1.49 &&
                r.presence_penalty > -1.51);
    assert_true(r.frequency_penalty > 0.49 && r.frequency_penalty < 0.51);
    assert_true(r.repetition_penalty > 1.24 && r.repetition_penalty < 1.26);
    assert_int_equal(r.n_bias, 2);
    uint32_t first = r.bias_id[0] == 7 ? 0 : 1; /* an object has no order */
    assert_true(r.bias_id[first] == 7 && r.bias_id[1 - first] == 999);
    assert_true(r.bias[first] > -2.6f && r.bias[first] < -2.4f && r.bias[1 - first] > 99);
    assert_true(r.logprobs && r.n_top == 3 && r.n_choice == 4);
    assert_true(gw_request_streams(body) && gw_request_wants_usage(body));
    assert_true(gw_request_wants_logprobs(GW_ASK_CHAT, body) && gw_request_choices(body) == 4);
    gw_request_free(&r);
    json_decref(body);

    body = json_loads("{\"prompt\":[3,1],\"model\":null,\"logprobs\":0,\"top_k\":1000}", 0, NULL);
    assert_int_equal(gw_request_parse(GW_ASK_COMPLETE, body, VOCAB, &r, &error), CM_OK);
    assert_false(r.stream || r.include_usage || r.ignore_eos || r.keep_special || r.has_seed);
    assert_true(r.temperature > 0.99 && r.top_p > 0.99 && r.tokens_max == 0 && r.prompt == NULL &&
                r.suffix == NULL);
    assert_true(r.logprobs && r.n_top == 0 && gw_request_wants_logprobs(GW_ASK_COMPLETE, body));
    assert_true(r.n_choice == 1 && gw_request_choices(body) == 1);
    assert_int_equal(r.top_k, 0); /* all of the vocabulary is no limit */
    assert_true(r.repetition_penalty > 0.99 && r.repetition_penalty < 1.01 && r.n_bias == 0);
    assert_int_equal(r.prompt_ids.n, 2);
    assert_int_equal(r.prompt_ids.id[0], 3);
    gw_request_free(&r);
    json_decref(body);
}

static void budget(void **state)
{
    (void)state;
    gw_request r = {.kind = GW_ASK_CHAT};
    gw_error error = {0};
    uint32_t n = 0;
    assert_int_equal(gw_request_budget(&r, false, 10, 1u << 20, &n, &error), CM_OK);
    assert_int_equal(n, 8192);
    assert_int_equal(gw_request_budget(&r, true, 10, 1u << 20, &n, &error), CM_OK);
    assert_int_equal(n, 65536);
    assert_int_equal(gw_request_budget(&r, true, 10, 100, &n, &error), CM_OK);
    assert_int_equal(n, 90);
    r.tokens_max = 10;
    assert_int_equal(gw_request_budget(&r, false, 99, 100, &n, &error), CM_OK);
    assert_int_equal(n, 1); /* one token still fits behind the prompt */
    assert_int_equal(gw_request_budget(&r, false, 100, 100, &n, &error), CM_E_TOO_LONG);
    assert_int_equal(error.cause, GW_CAUSE_CONTEXT);
    assert_string_equal(gw_error_code(&error), "context_length_exceeded");
    assert_string_equal(error.param, "messages");
}

static char *salt_of(const char *fields)
{
    char text[256], *salt = NULL;
    gw_request r;
    gw_error error;
    snprintf(text, sizeof(text), "{" MESSAGES "%s%s}", fields[0] != 0 ? "," : "", fields);
    json_t *body = json_loads(text, 0, NULL);
    assert_int_equal(gw_request_parse(GW_ASK_CHAT, body, VOCAB, &r, &error), CM_OK);
    salt = r.salt != NULL ? cm_strdup(r.salt) : NULL;
    gw_request_free(&r);
    json_decref(body);
    return salt;
}

/* Who asks is told apart by every field, and by which field it is; what else is asked makes no difference. */
static void salts(void **state)
{
    static const char *const fields[] = {"\"user_id\":\"a\"",
                                         "\"user_id\":\"b\"",
                                         "\"user_id\":\"\"",
                                         "\"user\":\"a\"",
                                         "\"safety_identifier\":\"a\"",
                                         "\"prompt_cache_key\":\"a\"",
                                         "\"cache_salt\":\"a\"",
                                         "\"user_id\":\"a\",\"cache_salt\":\"a\"",
                                         "\"user_id\":\"a\\ncache_salt 1 a\""};
    enum { N = sizeof(fields) / sizeof(fields[0]) };
    char *salt[N];
    (void)state;
    assert_null(salt_of(""));
    assert_null(salt_of("\"temperature\":0,\"seed\":4"));
    for (uint32_t i = 0; i < N; i++) {
        salt[i] = salt_of(fields[i]);
        for (uint32_t k = 0; k < i; k++) {
            assert_string_not_equal(salt[i], salt[k]);
        }
    }
    for (uint32_t i = 0; i < N; i++) {
        cm_free(salt[i]);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_field),   cmocka_unit_test(which_calls), cmocka_unit_test(whole_bodies),
        cmocka_unit_test(values_arrive), cmocka_unit_test(budget),      cmocka_unit_test(salts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
