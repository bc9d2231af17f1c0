/* The scripted model: which text of a prompt is said, that a token follows from prompt and position alone,
 * how it ends, and that slots do not mix. With the tokenizer of models/nano. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "common/base/bytes.h"
#include "common/model/chat.h"
#include "common/model/tokenizer.h"
#include "router/script.h"

enum { SLOTS = 4, LOG_MAX = 4096 };

static md_tokenizer *g_tokenizer;

static rt_script *create(void)
{
    rt_script *script;
    cm_error err = {0};
    rt_script_options options = {.dir = NANO, .row_max = 64, .slot_max = SLOTS, .kv_bytes = 1 << 30};
    if (rt_script_create(&options, &script, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    return script;
}

static uint32_t eos(void)
{
    return md_tokenizer_control(g_tokenizer, MD_CTL_EOS);
}

static const rt_sampler g_plain = {.n_stop = 0};

/* The token after a log of which the first n_prompt are the prompt. */
static uint32_t say(rt_script *script, uint32_t slot, const md_ids *log, uint32_t n_prompt,
                    const rt_sampler *sampler, uint32_t stop_wait, rt_logprobs *logprobs)
{
    rt_step_seg segs[2] = {{.slot = (slot + 1) % SLOTS, .n_row = 3}, /* a prompt that goes on */
                           {.slot = slot,
                            .pos0 = (uint32_t)log->n - 1,
                            .n_row = 1,
                            .sample = true,
                            .sampler = sampler,
                            .stop_wait = stop_wait,
                            .log = log->id,
                            .n_prompt = n_prompt,
                            .logprobs = logprobs}};
    rt_step step = {.number = 1, .n_seg = 2, .n_row = 4, .n_sample = 1, .segs = segs};
    rt_step_result result = {.n_token = 99};
    assert_int_equal(rt_script_step(script, &step, &result), CM_OK);
    assert_int_equal(result.n_token, 1);
    assert_int_equal(result.n_draft, 0);
    return result.tokens[0];
}

/* Everything up to the end of sequence; appended to log. */
static void run(rt_script *script, uint32_t slot, md_ids *log, md_ids *said)
{
    uint32_t n_prompt = (uint32_t)log->n, token;
    md_ids_init(said);
    while ((token = say(script, slot, log, n_prompt, &g_plain, 0, NULL)) != eos()) {
        md_ids_push(log, token);
        md_ids_push(said, token);
        assert_true(log->n < LOG_MAX);
    }
}

static void assert_says(md_ids *prompt, const char *text)
{
    md_ids said, want;
    rt_script *script = create();
    md_ids_init(&want);
    md_tokenizer_encode(g_tokenizer, text, strlen(text), MD_TEXT_CONTROL, &want);
    run(script, 1, prompt, &said);
    if (said.n != want.n || (want.n > 0 && memcmp(said.id, want.id, sizeof(uint32_t) * want.n) != 0)) {
        fail_msg("%zu tokens instead of %zu for '%s'", said.n, want.n, text);
    }
    md_ids_fini(&said);
    md_ids_fini(&want);
    md_ids_fini(prompt);
    rt_script_destroy(script);
}

static md_ids chat(const char *json)
{
    md_ids ids;
    json_t *messages;
    md_chat_options options;
    cm_error err = {0};
    json_error_t why;
    json_t *body = json_loads(json, 0, &why);
    if (body == NULL) {
        fail_msg("%s in %s", why.text, json);
    }
    md_ids_init(&ids);
    assert_int_equal(md_chat_from_request(body, MD_PROFILE_G, &messages, &options, &err), CM_OK);
    if (md_chat_encode(g_tokenizer, messages, &options, &ids, NULL, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
    json_decref(messages);
    json_decref(body);
    return ids;
}

static md_ids raw(const char *text)
{
    md_ids ids;
    md_ids_init(&ids);
    md_raw_encode(g_tokenizer, text, strlen(text), &ids);
    return ids;
}

#define CALL                                                                                                 \
    "{\"role\": \"assistant\", \"reasoning_content\": \"r\", \"tool_calls\": [{\"id\": \"a\", \"type\": "    \
    "\"function\", \"function\": {\"name\": \"f\", \"arguments\": \"{}\"}}, {\"id\": \"b\", \"type\": "      \
    "\"function\", \"function\": {\"name\": \"f\", \"arguments\": \"{}\"}}]}"
#define TOOLS ", \"tools\": [{\"type\": \"function\", \"function\": {\"name\": \"f\"}}]}"

static void the_last_message_is_said(void **state)
{
    static const struct {
        const char *body, *says;
    } cases[] = {
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"Hello w\\u00f6rld\"}]}", "Hello w\xc3\xb6rld"},
        {"{\"messages\": [{\"role\": \"system\", \"content\": \"S\"}, {\"role\": \"user\", \"content\": "
         "\"a\"}, "
         "{\"role\": \"assistant\", \"content\": \"b\"}, {\"role\": \"user\", \"content\": \"c d\"}], "
         "\"thinking\": {\"type\": \"disabled\"}}",
         "c d"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"\"}]}", ""},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"one\"}, {\"role\": \"user\", \"content\": "
         "\"two\"}]}",
         "one\n\ntwo"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}, " CALL
         ", {\"role\": \"tool\", \"tool_call_id\": \"a\", \"content\": \"first\"}, {\"role\": \"tool\", "
         "\"tool_call_id\": \"b\", \"content\": \"sec\\n\\nond\"}]" TOOLS,
         "sec\n\nond"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}, " CALL
         ", {\"role\": \"tool\", \"tool_call_id\": \"a\", \"content\": \"first\"}, {\"role\": \"user\", "
         "\"content\": \"and?\"}]" TOOLS,
         "and?"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"go\"}, {\"role\": \"assistant\", \"content\": "
         "\"Sure: \", \"prefix\": true}]}",
         "go"},
        {"{\"messages\": [{\"role\": \"user\", \"content\": \"not a result</tool_result>\"}]}",
         "not a result</tool_result>"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        md_ids prompt = chat(cases[i].body);
        assert_says(&prompt, cases[i].says);
    }
}

/* The same characters are text in the prompt and control ids in the answer. */
static void control_spellings_act(void **state)
{
    static const char text[] = "t</think>x\n\n<\xef\xbd\x9c"
                               "DSML\xef\xbd\x9ctool_calls>\n</\xef\xbd\x9c"
                               "DSML\xef\xbd\x9ctool_calls>";
    json_t *body = json_pack("{s:[{s:s, s:s}]}", "messages", "role", "user", "content", text);
    char *json = json_dumps(body, 0);
    md_ids prompt = chat(json), said, log = chat(json);
    rt_script *script = create();
    (void)state;
    assert_says(&prompt, text);
    run(script, 0, &log, &said);
    uint32_t n_dsml = 0, n_think = 0;
    for (size_t i = 0; i < said.n; i++) {
        n_dsml += said.id[i] == md_tokenizer_control(g_tokenizer, MD_CTL_DSML);
        n_think += said.id[i] == md_tokenizer_control(g_tokenizer, MD_CTL_THINK_END);
    }
    assert_int_equal(n_dsml, 2);
    assert_int_equal(n_think, 1);
    md_ids_fini(&said);
    md_ids_fini(&log);
    rt_script_destroy(script);
    free(json);
    json_decref(body);
}

static void raw_prompts_are_their_own_script(void **state)
{
    md_ids prompt = raw("once upon a time");
    (void)state;
    assert_says(&prompt, "once upon a time");
    md_ids_init(&prompt);
    md_fim_encode(g_tokenizer, "before", 6, "after", 5, &prompt, NULL);
    assert_says(&prompt, "before");
    prompt = raw("");
    assert_int_equal(prompt.n, 1);
    assert_says(&prompt, "");
    prompt = raw("x<\xef\xbd\x9cUser\xef\xbd\x9c>y<\xef\xbd\x9c"
                 "Assistant\xef\xbd\x9c></think>z");
    assert_says(&prompt, "y");
}

/* Resumed in another slot of another router after any number of tokens it goes on as it would have. */
static void position_decides(void **state)
{
    md_ids log =
        chat("{\"messages\": [{\"role\": \"user\", \"content\": \"The capital of France is Paris.\"}]}");
    uint32_t n_prompt = (uint32_t)log.n;
    md_ids said,
        other =
            chat("{\"messages\": [{\"role\": \"user\", \"content\": \"The capital of France is Paris.\"}]}");
    other.id[other.n - 4] = other.id[other.n - 5]; /* as long, and another */
    rt_script *script = create();
    (void)state;
    run(script, 0, &log, &said);
    assert_true(said.n > 4);
    for (uint32_t i = 0; i <= said.n; i++) {
        rt_script *fresh = create();
        md_ids part = {.id = log.id, .n = n_prompt + i};
        uint32_t want = i < said.n ? said.id[i] : eos();
        assert_int_equal(say(fresh, 3, &part, n_prompt, &g_plain, 0, NULL), want);
        say(script, 2, &other, (uint32_t)other.n, &g_plain, 0, NULL); /* slots are reused at any time */
        assert_int_equal(say(script, 2, &part, n_prompt, &g_plain, 0, NULL), want);
        rt_script_destroy(fresh);
    }
    md_ids_fini(&said);
    md_ids_fini(&log);
    md_ids_fini(&other);
    rt_script_destroy(script);
}

static void ends_and_samplers(void **state)
{
    md_ids prompt = chat("{\"messages\": [{\"role\": \"user\", \"content\": \"\"}]}");
    rt_script *script = create();
    rt_logprobs logprobs = {0};
    uint32_t blank;
    md_ids ids;
    (void)state;
    md_ids_init(&ids);
    md_tokenizer_encode(g_tokenizer, " ", 1, MD_TEXT_PLAIN, &ids);
    blank = ids.id[0];
    rt_sampler sampler = {.n_stop = 2, .stop = {eos(), blank}, .logprobs = true, .n_top = 3};
    uint32_t n = (uint32_t)prompt.n;
    assert_int_equal(say(script, 0, &prompt, n, &sampler, 0, NULL), eos());
    assert_int_equal(say(script, 0, &prompt, n, &sampler, 1, NULL), blank + 1); /* neither may be drawn */
    sampler.n_stop = 1;
    assert_int_equal(say(script, 0, &prompt, n, &sampler, 1, &logprobs), blank);
    assert_true(logprobs.token == 0 && logprobs.n_top == 3);
    assert_int_equal(logprobs.top_id[0], blank);
    assert_true(logprobs.top[0] == 0 && isinf(logprobs.top[1]) && isinf(logprobs.top[2]));
    assert_true(logprobs.top_id[1] < logprobs.top_id[2] && logprobs.top_id[1] != blank);
    assert_int_equal(say(script, 0, &prompt, n, &sampler, 0, &logprobs), eos());
    assert_true(logprobs.top_id[1] == 0 &&
                logprobs.top_id[2] == 2); /* 1, the token itself, is not repeated */
    for (uint32_t i = 0; i < 3; i++) {
        md_ids_push(&prompt, eos()); /* ignore_eos */
        assert_int_equal(say(script, 0, &prompt, n, &g_plain, 0, NULL), eos());
    }
    md_ids_fini(&ids);
    md_ids_fini(&prompt);
    rt_script_destroy(script);
}

static void bad_folders_are_refused(void **state)
{
    rt_script *script;
    cm_error err = {0};
    rt_script_options options = {.dir = "/nonexistent", .row_max = 64, .slot_max = 4, .kv_bytes = 1 << 30};
    (void)state;
    assert_true(rt_script_create(&options, &script, &err) != CM_OK && err.text[0] != 0);
    options.dir = NANO;
    options.kv_bytes = 1;
    assert_int_equal(rt_script_create(&options, &script, &err), CM_E_CONFIG);
    assert_string_equal(err.field, "kv_bytes");
}

int main(void)
{
    cm_error err = {0};
    if (md_tokenizer_open(NANO "/tokenizer.json", 0, &g_tokenizer, &err) != CM_OK) {
        fprintf(stderr, "%s\n", err.text);
        return 1;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_last_message_is_said),
        cmocka_unit_test(control_spellings_act),
        cmocka_unit_test(raw_prompts_are_their_own_script),
        cmocka_unit_test(position_decides),
        cmocka_unit_test(ends_and_samplers),
        cmocka_unit_test(bad_folders_are_refused),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    md_tokenizer_close(g_tokenizer);
    return failed;
}
