/* What clients are told when something is wrong: each cause through every interface, against the tables that
 * their packages know. A real gateway; the router and the coordinator are scripts (gateway_rig). */
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/stats.h"
#include "gateway/key_file.h"
#include "proto/baleen_v1.pb-c.h"
#include "proto/kserve.pb-c.h"
#include "proto/pack.h"
#include "proto/vllm_engine.pb-c.h"
#include "tests/support/temp_folder.h"
#include "tests/unit/gateway_rig.h"
#include "tests/unit/grpc_client.h"

/* ---- what is asked: the same question in every interface's words ---- */

typedef struct question {
    const char *model, *temperature, *text;
    bool broken; /* it is no JSON */
} question;

typedef enum shape { SHAPE_OPENAI, SHAPE_ANTHROPIC, SHAPE_KSERVE } shape;

typedef struct http_surface {
    shape shape;
    const char *path, *body; /* %1$s model, %2$s temperature, %3$s text */
} http_surface;

#define MESSAGES "\"messages\":[{\"role\":\"user\",\"content\":\"%3$s\"}]"
static const http_surface HTTP[] = {
    {SHAPE_OPENAI, "/v1/chat/completions", "{\"model\":\"%1$s\",\"temperature\":%2$s," MESSAGES "}"},
    {SHAPE_OPENAI, "/v1/completions", "{\"model\":\"%1$s\",\"temperature\":%2$s,\"prompt\":\"%3$s\"}"},
    {SHAPE_OPENAI, "/v1/responses", "{\"model\":\"%1$s\",\"temperature\":%2$s,\"input\":\"%3$s\"}"},
    {SHAPE_ANTHROPIC, "/v1/messages",
     "{\"model\":\"%1$s\",\"max_tokens\":8,\"temperature\":%2$s," MESSAGES "}"},
    {SHAPE_KSERVE, "/v2/models/%1$s/generate",
     "{\"text_input\":\"%3$s\",\"parameters\":{\"temperature\":%2$s}}"},
    {SHAPE_KSERVE, "/v2/models/%1$s/infer",
     "{\"inputs\":[{\"name\":\"text_input\",\"datatype\":\"BYTES\",\"shape\":[1],\"data\":[\"%3$s\"]},"
     "{\"name\":\"sampling_parameters\",\"datatype\":\"BYTES\",\"shape\":[1],"
     "\"data\":[\"{\\\"temperature\\\":%2$s}\"]}]}"},
};

/* One argument of each, whatever the format takes. */
static char *fill(const char *format, const question *q)
{
    cm_bytes out;
    cm_bytes_init(&out, 0);
    for (const char *at = format; *at != 0; at++) {
        if (at[0] == '%' && at[2] == '$') {
            cm_bytes_append_text(&out, at[1] == '1' ? q->model : at[1] == '2' ? q->temperature : q->text);
            at += 3;
        } else {
            cm_bytes_append(&out, at, 1);
        }
    }
    char *text = cm_strdup(cm_bytes_text(&out));
    cm_bytes_fini(&out);
    return text;
}

typedef struct grpc_surface {
    const char *path, *field; /* temperature's name in the details */
    void (*pack)(const question *q, cm_bytes *out);
    bool says_json, says_model;
} grpc_surface;

static void pack_chat(const question *q, cm_bytes *out)
{
    Baleen__V1__Message message = BALEEN__V1__MESSAGE__INIT, *messages[] = {&message};
    Baleen__V1__Sampling sampling = BALEEN__V1__SAMPLING__INIT;
    Baleen__V1__ChatRequest request = BALEEN__V1__CHAT_REQUEST__INIT;
    message.role = BALEEN__V1__ROLE__ROLE_USER;
    message.content = (char *)(uintptr_t)q->text;
    sampling.has_temperature = true;
    sampling.temperature = q->temperature[0] == '9' ? 9 : 1;
    request.model = (char *)(uintptr_t)q->model;
    request.n_messages = 1;
    request.messages = messages;
    request.sampling = &sampling;
    pr_pack(&request.base, out);
}

static void pack_chat_json(const question *q, cm_bytes *out)
{
    Baleen__V1__ChatJsonRequest request = BALEEN__V1__CHAT_JSON_REQUEST__INIT;
    char *body = fill(HTTP[0].body, q);
    request.body = (ProtobufCBinaryData){.data = (uint8_t *)body, .len = strlen(body) - (q->broken ? 1 : 0)};
    pr_pack(&request.base, out);
    cm_free(body);
}

static void pack_generate(const question *q, cm_bytes *out)
{
    Baleen__V1__Sampling sampling = BALEEN__V1__SAMPLING__INIT;
    Baleen__V1__GenerateRequest request = BALEEN__V1__GENERATE_REQUEST__INIT;
    sampling.has_temperature = true;
    sampling.temperature = q->temperature[0] == '9' ? 9 : 1;
    request.model = (char *)(uintptr_t)q->model;
    request.prompt_case = BALEEN__V1__GENERATE_REQUEST__PROMPT_TEXT;
    request.text = (char *)(uintptr_t)q->text;
    request.sampling = &sampling;
    pr_pack(&request.base, out);
}

static void pack_vllm(const question *q, cm_bytes *out)
{
    Vllm__Grpc__Engine__SamplingParams sampling = VLLM__GRPC__ENGINE__SAMPLING_PARAMS__INIT;
    Vllm__Grpc__Engine__GenerateRequest request = VLLM__GRPC__ENGINE__GENERATE_REQUEST__INIT;
    sampling.has_temperature = true;
    sampling.temperature = q->temperature[0] == '9' ? 9 : 1;
    request.input_case = VLLM__GRPC__ENGINE__GENERATE_REQUEST__INPUT_TEXT;
    request.text = (char *)(uintptr_t)q->text;
    request.sampling_params = &sampling;
    pr_pack(&request.base, out);
}

static void pack_infer(const question *q, cm_bytes *out)
{
    static int64_t one[] = {1};
    Inference__ModelInferRequest request = INFERENCE__MODEL_INFER_REQUEST__INIT;
    Inference__ModelInferRequest__InferInputTensor inputs[2], *list[] = {&inputs[0], &inputs[1]};
    Inference__InferTensorContents contents[2];
    char *sampling = fill("{\"temperature\":%2$s}", q);
    const char *text[] = {q->text, sampling};
    ProtobufCBinaryData bytes[2];
    for (int i = 0; i < 2; i++) {
        inference__model_infer_request__infer_input_tensor__init(&inputs[i]);
        inference__infer_tensor_contents__init(&contents[i]);
        bytes[i] = (ProtobufCBinaryData){.data = (uint8_t *)(uintptr_t)text[i],
                                         .len = strlen(text[i]) - (i == 1 && q->broken ? 1 : 0)};
        contents[i].n_bytes_contents = 1;
        contents[i].bytes_contents = &bytes[i];
        inputs[i].name = i == 0 ? "text_input" : "sampling_parameters";
        inputs[i].datatype = "BYTES";
        inputs[i].n_shape = 1;
        inputs[i].shape = one;
        inputs[i].contents = &contents[i];
    }
    request.model_name = (char *)(uintptr_t)q->model;
    request.n_inputs = 2;
    request.inputs = list;
    pr_pack(&request.base, out);
    cm_free(sampling);
}

static const grpc_surface GRPC[] = {
    {"/baleen.v1.Inference/Chat", "sampling.temperature", pack_chat, false, true},
    {"/baleen.v1.Inference/ChatJson", "temperature", pack_chat_json, true, true},
    {"/baleen.v1.Inference/Generate", "sampling.temperature", pack_generate, false, true},
    {"/vllm.grpc.engine.VllmEngine/Generate", "sampling_params.temperature", pack_vllm, false, false},
    {"/inference.GRPCInferenceService/ModelInfer", "sampling_parameters.temperature", pack_infer, true, true},
};

/* ---- what is expected ---- */

typedef struct row {
    const char *name;
    question question;                       /* NULL fields: nothing special */
    void (*options)(void), (*arrange)(void); /* before the gateway is made; when it serves. NULL: nothing */
    int http;
    const char *type, *code, *param; /* of OpenAI's shape; param NULL: none; "*": any */
    int anthropic_http;
    const char *anthropic_type;
    pc_code grpc;
    uint32_t retry_ms;
    bool final; /* clients that try again by themselves must not */
} row;

static char g_folder[T_FOLDER_MAX], g_path[T_FOLDER_MAX + 16], *g_long;
static rig_client *g_held;
static cm_arena g_arena;

static void with_keys(void)
{
    json_t *root = json_pack("{s:s, s:[]}", "salt", "01000000000000000000000000000000", "tenants");
    assert_int_equal(json_dump_file(root, g_path, 0), 0);
    json_decref(root);
    rig_set("key_file", g_path);
}

static void one_at_once(void)
{
    rig_set("streams_max", "1");
}

static void hold_one(void)
{
    R.mode = RIG_HOLD;
    g_held = rig_open("POST", CHAT, "", "{\"stream\":true," USER("x") "}");
    rig_wait_opens(1);
}

static void drained(void *arg)
{
    (void)arg;
}

static void drain_and_hold(void)
{
    hold_one();
    gw_gateway_drain(R.gateway, drained, NULL);
}

#define REFUSES(name_, status_)                                                                              \
    static void name_(void)                                                                                  \
    {                                                                                                        \
        R.mode = RIG_REFUSE;                                                                                 \
        R.refuse_status = status_;                                                                           \
    }
REFUSES(router_is_full, CM_E_CAPACITY)
REFUSES(router_is_late, CM_E_DEADLINE)
REFUSES(router_is_down, CM_E_UNAVAILABLE)
REFUSES(expert_is_lost, CM_E_NO_OWNER)
REFUSES(device_fails, CM_E_DEVICE)
REFUSES(operator_ends_it, CM_E_CANCELLED)

static void nothing_placed(void)
{
    rig_commit(2, true, false);
}

#define INVALID     400, "invalid_request_error", "invalid_request_error"
#define A_INVALID   400, "invalid_request_error", PC_CODE_INVALID_ARGUMENT
#define OVERLOADED  529, "overloaded_error"
#define UNAVAILABLE 503, "service_unavailable_error", "unavailable", NULL, OVERLOADED, PC_CODE_UNAVAILABLE

static const row ROWS[] = {
    {"no JSON", {.broken = true}, NULL, NULL, INVALID, NULL, A_INVALID, 0, false},
    {"a field out of range", {.temperature = "9"}, NULL, NULL, INVALID, "temperature", A_INVALID, 0, false},
    {"a prompt beyond the context",
     {.text = ""},
     NULL,
     NULL,
     400,
     "invalid_request_error",
     "context_length_exceeded",
     "*",
     A_INVALID,
     0,
     false},
    {"no key",
     {0},
     with_keys,
     NULL,
     401,
     "authentication_error",
     "invalid_request_error",
     NULL,
     401,
     "authentication_error",
     PC_CODE_UNAUTHENTICATED,
     0,
     false},
    {"another model",
     {.model = "gpt-4"},
     NULL,
     NULL,
     404,
     "invalid_request_error",
     "model_not_found",
     "model",
     404,
     "not_found_error",
     PC_CODE_NOT_FOUND,
     0,
     false},
    {"too many at once",
     {0},
     one_at_once,
     hold_one,
     429,
     "rate_limit_error",
     "rate_limit_exceeded",
     NULL,
     OVERLOADED,
     PC_CODE_RESOURCE_EXHAUSTED,
     1000,
     false},
    {"a full router",
     {0},
     NULL,
     router_is_full,
     429,
     "rate_limit_error",
     "rate_limit_exceeded",
     NULL,
     OVERLOADED,
     PC_CODE_RESOURCE_EXHAUSTED,
     1000,
     false},
    {"no time left",
     {0},
     NULL,
     router_is_late,
     504,
     "timeout_error",
     "deadline_exceeded",
     NULL,
     504,
     "timeout_error",
     PC_CODE_DEADLINE_EXCEEDED,
     0,
     false},
    {"a router that cannot", {0}, NULL, router_is_down, UNAVAILABLE, 1000, false},
    {"a lost expert", {0}, NULL, expert_is_lost, UNAVAILABLE, 1000, false},
    {"a draining gateway", {0}, NULL, drain_and_hold, UNAVAILABLE, 1000, false},
    {"no weights", {0}, NULL, nothing_placed, UNAVAILABLE, 1000, false},
    {"a broken device",
     {0},
     NULL,
     device_fails,
     500,
     "server_error",
     "internal_error",
     NULL,
     500,
     "api_error",
     PC_CODE_INTERNAL,
     0,
     false},
    {"ended by an operator",
     {0},
     NULL,
     operator_ends_it,
     409,
     "server_error",
     "aborted",
     NULL,
     409,
     "api_error",
     PC_CODE_ABORTED,
     0,
     true},
};
enum { N_ROWS = sizeof(ROWS) / sizeof(ROWS[0]) };

#define CHECK(that_, ...)                                                                                    \
    if (!(that_)) {                                                                                          \
        print_error("%s, %s: ", r->name, where);                                                             \
        fail_msg(__VA_ARGS__);                                                                               \
    }

static question question_of(const row *r)
{
    return (question){.model = r->question.model != NULL ? r->question.model : "nano",
                      .temperature = r->question.temperature != NULL ? r->question.temperature : "1",
                      .text = r->question.text != NULL ? g_long : "hello",
                      .broken = r->question.broken};
}

static void check_headers(const row *r, const char *where, const rig_client *asker)
{
    char seconds[16], ms[16];
    snprintf(seconds, sizeof(seconds), "%u", (r->retry_ms + 999) / 1000);
    snprintf(ms, sizeof(ms), "%u", r->retry_ms);
    bool retry = r->retry_ms > 0;
    CHECK(rig_header_is(asker, "Content-Type", "application/json"), "it is no JSON");
    CHECK(rig_header_is(asker, "retry-after", retry ? seconds : NULL) == retry, "retry-after");
    CHECK(rig_header_is(asker, "retry-after-ms", retry ? ms : NULL) == retry, "retry-after-ms");
    CHECK(rig_header_is(asker, "x-should-retry",
                        retry      ? "true"
                        : r->final ? "false"
                                   : NULL) == (retry || r->final),
          "x-should-retry");
    CHECK(rig_header_is(asker, "WWW-Authenticate", "Bearer") == (r->http == 401), "WWW-Authenticate");
    CHECK(rig_header_is(asker, "x-request-id", NULL) && rig_header_is(asker, "request-id", NULL), "no id");
}

static void check_openai(const row *r, const char *where, const json_t *body)
{
    const char *param = r->param != NULL ? r->param : "(none)";
    CHECK(strcmp(rig_text_at(body, "error.type"), r->type) == 0, "type %s", rig_text_at(body, "error.type"));
    CHECK(strcmp(rig_text_at(body, "error.code"), r->code) == 0, "code %s", rig_text_at(body, "error.code"));
    CHECK(strcmp(param, "*") == 0 || strcmp(rig_text_at(body, "error.param"), param) == 0, "param %s",
          rig_text_at(body, "error.param"));
    CHECK(rig_at(body, "error.param") != NULL, "no param, not even null");
    CHECK(strlen(rig_text_at(body, "error.message")) > 10, "no sentence");
}

static void check_anthropic(const row *r, const char *where, const json_t *body, const rig_client *asker)
{
    const char *message = rig_text_at(body, "error.message");
    unsigned tokens, most;
    CHECK(strcmp(rig_text_at(body, "type"), "error") == 0, "type %s", rig_text_at(body, "type"));
    CHECK(strcmp(rig_text_at(body, "error.type"), r->anthropic_type) == 0, "error.type %s",
          rig_text_at(body, "error.type"));
    CHECK(rig_header_is(asker, "request-id", rig_text_at(body, "request_id")), "another id");
    if (strcmp(r->code, "context_length_exceeded") == 0) {
        CHECK(sscanf(message, "prompt is too long: %u tokens > %u maximum", &tokens, &most) == 2 &&
                  tokens > most,
              "message %s", message);
    }
}

static void check_http(const row *r, const http_surface *surface)
{
    question q = question_of(r);
    char *path = fill(surface->path, &q), *body = fill(surface->body, &q);
    const char *where = path;
    body[strlen(body) - (q.broken ? 1 : 0)] = 0;
    rig_client *asker = rig_open("POST", path, "Connection: close\r\n", body);
    rig_wait_closed(asker);
    int status = surface->shape == SHAPE_ANTHROPIC ? r->anthropic_http : r->http;
    CHECK(rig_status(asker) == status, "status %d: %s", rig_status(asker), cm_bytes_text(&asker->in));
    check_headers(r, where, asker);
    cm_bytes text;
    cm_bytes_init(&text, 0);
    rig_body(asker, &text);
    json_t *reply = json_loadb(cm_bytes_text(&text), text.len, 0, NULL);
    if (surface->shape == SHAPE_OPENAI) {
        check_openai(r, where, reply);
    } else if (surface->shape == SHAPE_ANTHROPIC) {
        check_anthropic(r, where, reply, asker);
    } else {
        CHECK(strlen(rig_text_at(reply, "error")) > 10 && json_object_size(reply) == 1, "%s",
              cm_bytes_text(&text));
    }
    json_decref(reply);
    cm_bytes_fini(&text);
    rig_close(asker);
    cm_free(path);
    cm_free(body);
}

static void check_details(const row *r, const char *where, const grpc_surface *surface, const plain *p)
{
    Google__Rpc__RetryInfo *retry = plain_detail(p, &google__rpc__retry_info__descriptor, &g_arena);
    Google__Rpc__BadRequest *bad = plain_detail(p, &google__rpc__bad_request__descriptor, &g_arena);
    char ms[16] = "";
    if (r->retry_ms > 0 || r->final) {
        snprintf(ms, sizeof(ms), "%d", r->final ? -1 : (int)r->retry_ms);
    }
    CHECK(strcmp(p->retry, ms) == 0, "pushback '%s'", p->retry);
    CHECK((retry != NULL) == (r->retry_ms > 0), "RetryInfo");
    if (retry != NULL) {
        CHECK(retry->retry_delay->seconds * 1000 + retry->retry_delay->nanos / 1000000 == r->retry_ms,
              "RetryInfo %lld s", (long long)retry->retry_delay->seconds);
    }
    if (r->question.temperature != NULL) {
        CHECK(bad != NULL && strcmp(bad->field_violations[0]->field, surface->field) == 0, "field %s",
              bad != NULL ? bad->field_violations[0]->field : "(none)");
    }
}

static void check_grpc(const row *r, const grpc_surface *surface)
{
    const char *where = surface->path;
    question q = question_of(r);
    cm_bytes packed;
    plain p;
    if ((q.broken && !surface->says_json) || (r->question.model != NULL && !surface->says_model)) {
        return;
    }
    cm_bytes_init(&packed, 0);
    surface->pack(&q, &packed);
    plain_run(&p, R.loop, gw_gateway_grpc(R.gateway), surface->path, cm_bytes_text(&packed), packed.len);
    bool aborts = r->final && surface->pack == pack_vllm; /* its protocol has a word for that */
    CHECK(p.code == (aborts ? PC_CODE_OK : (int)r->grpc), "code %d: %s", p.code, p.text);
    CHECK(p.n_messages == (aborts ? 1 : 0), "%u messages", p.n_messages);
    if (!aborts && r->arrange != drain_and_hold) { /* its port is closed already: no calls run there */
        check_details(r, where, surface, &p);
    }
    plain_fini(&p);
    cm_bytes_fini(&packed);
    cm_arena_reset(&g_arena);
}

static bool sees_epoch(void *arg)
{
    (void)arg;
    return R.epoch_committed == 2;
}

static void run_row(const row *r)
{
    rig_begin();
    rig_set("grpc", "127.0.0.1:0");
    if (r->options != NULL) {
        r->options();
    }
    rig_ready();
    if (r->arrange != NULL) {
        r->arrange();
    }
    if (r->arrange == nothing_placed) {
        rig_until(sees_epoch, NULL);
    }
    for (size_t i = 0; i < sizeof(HTTP) / sizeof(HTTP[0]); i++) {
        check_http(r, &HTTP[i]);
    }
    for (size_t i = 0; i < sizeof(GRPC) / sizeof(GRPC[0]); i++) {
        check_grpc(r, &GRPC[i]);
    }
    if (g_held != NULL) {
        rig_close(g_held);
        g_held = NULL;
    }
    rig_end();
}

static void every_row_of_every_interface(void **state)
{
    (void)state;
    for (size_t i = 0; i < N_ROWS; i++) {
        run_row(&ROWS[i]);
    }
}

/* ---- what belongs to one kind of interface ---- */

static void paths_and_methods(void **state)
{
    (void)state;
    static const struct {
        const char *method, *path, *headers;
        int status;
        const char *text, *allow;
    } asks[] = {
        {"POST", "/v1/nothing", "", 404, "\"type\":\"invalid_request_error\"", NULL},
        {"POST", "/v1/messages/nothing", "", 404, "\"type\":\"not_found_error\"", NULL},
        {"GET", "/v1/nothing", "anthropic-version: 2023-06-01\r\n", 404, "\"type\":\"not_found_error\"",
         NULL},
        {"GET", "/v2/models/none", "", 404, "{\"error\":\"", NULL},
        {"GET", "/v1/models/none", "", 404, "\"code\":\"model_not_found\"", NULL},
        {"GET", "/v1/chat/completions", "", 405, "\"type\":\"invalid_request_error\"", "POST, OPTIONS"},
        {"PUT", "/v1/responses", "", 405, "\"type\":\"invalid_request_error\"", "POST, OPTIONS"},
        {"GET", "/v1/messages", "", 405, "{\"type\":\"error\"", "POST, OPTIONS"},
        {"DELETE", "/v2/models/nano/infer", "", 405, "{\"error\":\"", "GET, HEAD, POST, OPTIONS"},
    };
    rig_begin();
    rig_ready();
    for (size_t i = 0; i < sizeof(asks) / sizeof(asks[0]); i++) {
        char headers[128];
        snprintf(headers, sizeof(headers), "Connection: close\r\n%s", asks[i].headers);
        rig_client *asker = rig_open(asks[i].method, asks[i].path, headers, NULL);
        rig_wait_closed(asker);
        if (rig_status(asker) != asks[i].status || strstr(cm_bytes_text(&asker->in), asks[i].text) == NULL ||
            rig_header_is(asker, "Allow", asks[i].allow) != (asks[i].allow != NULL)) {
            fail_msg("%s %s: %s", asks[i].method, asks[i].path, cm_bytes_text(&asker->in));
        }
        rig_close(asker);
    }
    rig_end();
}

/* The status was sent before it went wrong: each interface has its own last word, and none of them is that
 * all went well. */
static void streams_that_fail(void **state)
{
    (void)state;
    static const struct {
        const char *path, *body, *last, *never;
    } asks[] = {
        {"/v1/chat/completions", "{\"stream\":true," USER("x") "}",
         "\ndata: {\"error\":{\"message\":", "[DONE]"},
        {"/v1/completions", "{\"stream\":true,\"prompt\":\"x\"}",
         "\ndata: {\"error\":{\"message\":", "[DONE]"},
        {"/v1/messages", "{\"stream\":true,\"max_tokens\":8," USER("x") "}",
         "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"api_error\"", "message_stop"},
        {"/v1/responses", "{\"stream\":true,\"input\":\"x\"}",
         "event: response.failed\ndata: {\"type\":\"response.failed\"", "response.completed"},
        {"/v2/models/nano/generate_stream", "{\"text_input\":\"x\"}", "data: {\"error\":\"", "[DONE]"},
    };
    rig_begin();
    rig_ready();
    R.mode = RIG_HOLD;
    R.refuse_status = CM_E_DEVICE;
    for (uint32_t i = 0; i < sizeof(asks) / sizeof(asks[0]); i++) {
        rig_client *asker = rig_open("POST", asks[i].path, "Connection: close\r\n", asks[i].body);
        rig_wait_text(asker, "HTTP/1.1 200");
        rig_tokens(0, NULL, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED);
        rig_wait_closed(asker);
        const char *text = cm_bytes_text(&asker->in);
        if (strstr(text, asks[i].last) == NULL || strstr(text, asks[i].never) != NULL) {
            fail_msg("%s: %s", asks[i].path, text);
        }
        rig_close(asker);
    }
    rig_end();
}

static int begin(void **state)
{
    (void)state;
    enum { WORDS = 20000 };
    cm_bytes text;
    t_folder_make(g_folder, "errors");
    snprintf(g_path, sizeof(g_path), "%s/keys.json", g_folder);
    cm_bytes_init(&text, 0);
    for (int i = 0; i < WORDS; i++) {
        cm_bytes_append_text(&text, "one ");
    }
    g_long = cm_strdup(cm_bytes_text(&text));
    cm_bytes_fini(&text);
    cm_arena_init(&g_arena, "test", 64 << 10, 64 << 20);
    return 0;
}

static int finish(void **state)
{
    (void)state;
    cm_free(g_long);
    cm_arena_fini(&g_arena);
    t_folder_remove(g_folder);
    return 0;
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(every_row_of_every_interface, begin, finish),
        cmocka_unit_test(paths_and_methods),
        cmocka_unit_test(streams_that_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
