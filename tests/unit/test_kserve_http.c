/* KServe's REST twin, as clients see it; the router and the coordinator are scripts (gateway_rig). */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>
#include <zlib.h>

#include "common/base/stats.h"
#include "tests/unit/gateway_rig.h"

#define MODEL "/v2/models/nano"

static bool no_streams(void *arg)
{
    (void)arg;
    return cm_stat_get(CM_STAT_ledger_streams) == 0;
}

static void what_there_is(void **state)
{
    (void)state;
    int status;
    rig_gateway();
    json_t *reply = rig_ask("GET", "/v2/health/live", NULL, &status);
    assert_int_equal(status, 200);
    json_decref(reply);
    reply = rig_ask("GET", "/v2/health/ready", NULL, &status);
    assert_int_equal(status, 503);
    json_decref(reply);
    rig_serve();
    reply = rig_ask("GET", "/v2/health/ready", NULL, &status);
    assert_int_equal(status, 200);
    json_decref(reply);
    reply = rig_ask("GET", "/v2", NULL, &status);
    assert_string_equal(rig_text_at(reply, "name"), "baleen");
    json_decref(reply);
    reply = rig_ask("GET", "/v2/models/na%6Eo/", NULL, &status);
    assert_int_equal(status, 200);
    assert_string_equal(rig_text_at(reply, "name"), "nano");
    assert_string_equal(rig_text_at(reply, "inputs.1.name"), "input_ids");
    assert_string_equal(rig_text_at(reply, "inputs.1.datatype"), "INT32");
    assert_int_equal(rig_int_at(reply, "inputs.1.shape.0"), -1);
    assert_string_equal(rig_text_at(reply, "outputs.0.name"), "text_output");
    json_decref(reply);
    reply = rig_ask("GET", MODEL "/versions/1/ready", NULL, &status);
    assert_int_equal(status, 200);
    json_decref(reply);
}

static void unknown_paths(void **state)
{
    (void)state;
    static const char *const gets[] = {"/v2/models/none",   "/v2/models/none/ready",
                                       MODEL "/versions/2", MODEL "/versions/2/ready",
                                       MODEL "/stats",      "/v2/health"};
    int status;
    rig_ready();
    for (size_t i = 0; i < sizeof(gets) / sizeof(gets[0]); i++) {
        json_t *reply = rig_ask("GET", gets[i], NULL, &status);
        if (status != 404) {
            fail_msg("%s: %d", gets[i], status);
        }
        assert_true(json_is_string(rig_at(reply, "error")));
        json_decref(reply);
    }
    json_t *reply = rig_ask("POST", "/v2/models/none/generate", "{\"text_input\":\"x\"}", &status);
    assert_int_equal(status, 404);
    json_decref(reply);
    reply = rig_ask("POST", MODEL "/load", "{}", &status);
    assert_int_equal(status, 404);
    json_decref(reply);
}

/* The prompt comes first, as Triton has it, unless it is excluded. */
static void generate(void **state)
{
    (void)state;
    int status;
    rig_ready();
    rig_reply(" you.");
    json_t *reply = rig_ask("POST", MODEL "/generate",
                            "{\"text_input\":\"Hi\",\"id\":\"42\",\"parameters\":{\"stream\":false,"
                            "\"temperature\":0.5,\"max_tokens\":9}}",
                            &status);
    assert_int_equal(status, 200);
    assert_string_equal(rig_text_at(reply, "text_output"), "Hi you.");
    assert_string_equal(rig_text_at(reply, "model_name"), "nano");
    assert_string_equal(rig_text_at(reply, "id"), "42");
    assert_true(R.sampler.temperature > 0.49f && R.sampler.temperature < 0.51f);
    assert_int_equal(R.sampler.tokens_max, 9);
    json_decref(reply);
    reply = rig_ask("POST", MODEL "/versions/1/generate",
                    "{\"text_input\":\"Hi\",\"exclude_input_in_output\":true}", &status);
    assert_string_equal(rig_text_at(reply, "text_output"), " you.");
    assert_string_equal(rig_text_at(reply, "id"), "(none)");
    json_decref(reply);
    reply = rig_ask("POST", MODEL "/generate",
                    "{\"input_ids\":[5,6],\"sampling_parameters\":\"{\\\"seed\\\":3}\"}", &status);
    assert_string_equal(rig_text_at(reply, "text_output"), " you.");
    assert_int_equal(R.prompt.n, 2);
    assert_int_equal(R.prompt.id[1], 6);
    json_decref(reply);
}

/* Of a chat the reasoning is left out. */
static void generate_chat(void **state)
{
    (void)state;
    int status;
    rig_ready();
    rig_reply("hm|Paris.");
    json_t *reply = rig_ask("POST", MODEL "/generate", "{" USER("Capital of France?") "}", &status);
    assert_int_equal(status, 200);
    assert_string_equal(rig_text_at(reply, "text_output"), "Paris.");
    json_decref(reply);
}

static void generate_stream(void **state)
{
    (void)state;
    rig_ready();
    rig_reply("one two");
    rig_client *client = rig_open("POST", MODEL "/generate_stream", "Connection: close\r\n",
                                  "{\"text_input\":\"count:\",\"parameters\":{\"stream\":true}}");
    rig_wait_closed(client);
    assert_int_equal(rig_status(client), 200);
    assert_true(rig_header_is(client, "Content-Type", "text/event-stream; charset=utf-8"));
    cm_bytes body, text;
    cm_bytes_init(&body, 0);
    cm_bytes_init(&text, 0);
    rig_body(client, &body);
    assert_null(strstr(cm_bytes_text(&body), "[DONE]"));
    uint32_t n_events = 0, n_final = 0;
    for (const char *at = cm_bytes_text(&body); (at = strstr(at, "data: ")) != NULL; n_events++) {
        at += 6;
        json_t *event = json_loadb(at, strcspn(at, "\n"), 0, NULL);
        assert_non_null(event);
        assert_string_equal(rig_text_at(event, "model_name"), "nano");
        cm_bytes_append_text(&text, rig_text_at(event, "text_output"));
        assert_int_equal(n_final, 0); /* none comes behind the final one */
        n_final += json_is_true(rig_at(event, "triton_final_response"));
        json_decref(event);
    }
    assert_string_equal(cm_bytes_text(&text), "one two");
    assert_true(n_events > 2);
    assert_int_equal(n_final, 1);
    cm_bytes_fini(&text);
    cm_bytes_fini(&body);
    rig_close(client);
}

/* A client that asks for events but not for pieces gets one with everything. */
static void generate_stream_whole(void **state)
{
    (void)state;
    rig_ready();
    rig_reply("one two");
    rig_client *client = rig_open("POST", MODEL "/generate_stream", "Connection: close\r\n",
                                  "{\"text_input\":\"count:\",\"stream\":false}");
    rig_wait_closed(client);
    const char *first = strstr(cm_bytes_text(&client->in), "data: ");
    assert_non_null(first);
    assert_non_null(strstr(first, "\"text_output\":\"count:one two\",\"triton_final_response\":true"));
    assert_null(strstr(first + 6, "data: "));
    rig_close(client);
}

static void disconnect(void **state)
{
    (void)state;
    rig_ready();
    R.mode = RIG_HOLD;
    rig_client *client = rig_open("POST", MODEL "/generate_stream", "", "{\"text_input\":\"x\"}");
    rig_wait_opens(1);
    rig_close(client);
    rig_wait_cancels(1);
    rig_until(no_streams, NULL);
}

/* ---- infer ---- */

static void infer(void **state)
{
    (void)state;
    int status;
    rig_ready();
    rig_reply(" you.");
    json_t *reply =
        rig_ask("POST", MODEL "/infer",
                "{\"id\":\"7\",\"inputs\":[{\"name\":\"text_input\",\"shape\":[1,1],\"datatype\":"
                "\"BYTES\",\"data\":[[\"Hi\"]]},{\"name\":\"exclude_input_in_output\",\"shape\":[1],"
                "\"datatype\":\"BOOL\",\"data\":[true]}],\"outputs\":[{\"name\":\"text_output\"}]}",
                &status);
    assert_int_equal(status, 200);
    assert_string_equal(rig_text_at(reply, "id"), "7");
    assert_string_equal(rig_text_at(reply, "outputs.0.name"), "text_output");
    assert_string_equal(rig_text_at(reply, "outputs.0.datatype"), "BYTES");
    assert_int_equal(rig_int_at(reply, "outputs.0.shape.0"), 1);
    assert_string_equal(rig_text_at(reply, "outputs.0.data.0"), " you.");
    json_decref(reply);
}

static const char json[] = "{\"inputs\":[{\"name\":\"input_ids\",\"shape\":[2],\"datatype\":\"INT32\","
                           "\"parameters\":{\"binary_data_size\":8}},{\"name\":\"sampling_parameters\","
                           "\"shape\":[1],\"datatype\":\"BYTES\",\"parameters\":{\"binary_data_size\":16}}]}";
static const char tensors[] = "\5\0\0\0\6\0\0\0\14\0\0\0{\"top_k\": 3}";

enum { BINARY_MAX = 1024 };

/* The JSON and the tensors behind it; how many bytes. */
static size_t binary_body(uint8_t out[BINARY_MAX])
{
    memcpy(out, json, sizeof(json) - 1);
    memcpy(out + sizeof(json) - 1, tensors, sizeof(tensors) - 1);
    return sizeof(json) - 1 + sizeof(tensors) - 1;
}

static void infer_bytes(const char *headers, const void *body, size_t n, size_t n_json, const char *answer)
{
    cm_bytes head;
    cm_bytes_init(&head, 0);
    cm_bytes_printf(&head,
                    "POST " MODEL "/infer HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                    "%sInference-Header-Content-Length: %zu\r\nContent-Length: %zu\r\n\r\n",
                    headers, n_json, n);
    rig_client *client = rig_open_raw(cm_bytes_text(&head));
    bufferevent_write(client->bev, body, n);
    rig_wait_closed(client);
    if (strstr(cm_bytes_text(&client->in), answer) == NULL) {
        fail_msg("%s", cm_bytes_text(&client->in));
    }
    assert_int_equal(rig_status(client), answer[0] == '[' ? 200 : 400);
    rig_close(client);
    cm_bytes_fini(&head);
}

static void expect_binary_read(void)
{
    assert_int_equal(R.prompt.n, 2);
    assert_int_equal(R.prompt.id[0], 5);
    assert_int_equal(R.prompt.id[1], 6);
    assert_int_equal(R.sampler.top_k, 3);
}

/* Tensors in raw form behind the JSON. */
static void infer_binary(void **state)
{
    (void)state;
    uint8_t body[BINARY_MAX];
    size_t n = binary_body(body);
    rig_ready();
    rig_reply("ok");
    infer_bytes("", body, n, sizeof(json) - 1, "[\"ok\"]");
    expect_binary_read();
    infer_bytes("", body, n - 1, sizeof(json) - 1, "binary_data_size");
    infer_bytes("", body, n, n + 1, "Inference-Header-Content-Length");
}

static size_t gzip(const void *data, size_t n, uint8_t out[BINARY_MAX])
{
    z_stream z = {
        .next_in = (Bytef *)(uintptr_t)data, .avail_in = (uInt)n, .next_out = out, .avail_out = BINARY_MAX};
    assert_int_equal(deflateInit2(&z, 9, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    deflateEnd(&z);
    return BINARY_MAX - z.avail_out;
}

/* Packed as one, as tritonclient does; the length of the JSON is that before. */
static void infer_binary_packed(void **state)
{
    (void)state;
    static const char encoding[] = "Content-Encoding: gzip\r\n";
    uint8_t body[BINARY_MAX], data[BINARY_MAX];
    size_t n = binary_body(body), n_packed = gzip(body, n, data);
    rig_ready();
    rig_reply("ok");
    infer_bytes(encoding, data, n_packed, sizeof(json) - 1, "[\"ok\"]");
    expect_binary_read();
    infer_bytes(encoding, data, n_packed, n + 1, "Inference-Header-Content-Length");
    infer_bytes(encoding, data, n_packed - 1, sizeof(json) - 1, "not whole gzip data");
    infer_bytes(encoding, body, n, sizeof(json) - 1, "not whole gzip data");
}

static void expect_refused(const char *action, const char *body, const char *what)
{
    char path[64];
    int status;
    snprintf(path, sizeof(path), MODEL "/%s", action);
    json_t *reply = rig_ask("POST", path, body, &status);
    assert_int_equal(status, 400);
    const char *message = rig_text_at(reply, "error");
    if (strstr(message, what) == NULL) {
        fail_msg("%s: %s", body, message);
    }
    json_decref(reply);
}

#define TENSOR(name_, rest_) "{\"inputs\":[{\"name\":\"" name_ "\"," rest_ "}]}"

static void refused(void **state)
{
    (void)state;
    rig_ready();
    expect_refused("generate", "{", "JSON");
    expect_refused("generate", "[]", "object");
    expect_refused("generate", "{}", "text_input");
    expect_refused("generate", "{\"text_input\":5}", "text_input");
    expect_refused("generate", "{\"text_input\":\"x\",\"messages\":[]}", "text_input");
    expect_refused("generate", "{\"text_input\":\"x\",\"stream\":true}", "generate_stream");
    expect_refused("generate", "{\"text_input\":\"x\",\"parameters\":3}", "parameters");
    expect_refused("generate", "{\"text_input\":\"x\",\"parameters\":{\"temperature\":\"hot\"}}",
                   "temperature");
    expect_refused("generate", "{\"text_input\":\"x\",\"parameters\":{\"n\":2}}", "n must be 1");
    expect_refused("generate", "{\"text_input\":\"x\",\"parameters\":{\"prompt\":\"y\"}}", "prompt");
    expect_refused("generate", "{\"input_ids\":[-1]}", "text_input");
    expect_refused("generate", "{\"input_ids\":[1.5]}", "INT32");
    expect_refused("infer", "{}", "text_input");
    expect_refused("infer", "{\"inputs\":[5]}", "no input");
    expect_refused("infer", TENSOR("text", "\"datatype\":\"BYTES\",\"shape\":[1],\"data\":[\"x\"]"),
                   "no input");
    expect_refused("infer", TENSOR("text_input", "\"datatype\":\"FP32\",\"shape\":[1],\"data\":[\"x\"]"),
                   "BYTES");
    expect_refused("infer", TENSOR("text_input", "\"datatype\":\"BYTES\",\"data\":[\"x\"]"), "shape");
    expect_refused("infer", TENSOR("text_input", "\"datatype\":\"BYTES\",\"shape\":[2],\"data\":[\"x\"]"),
                   "shape");
    expect_refused("infer", TENSOR("text_input", "\"datatype\":\"BYTES\",\"shape\":[1],\"data\":[1]"),
                   "BYTES");
    expect_refused(
        "infer",
        TENSOR("text_input", "\"datatype\":\"BYTES\",\"shape\":[1],\"parameters\":{\"binary_data_size\":4}"),
        "binary_data_size");
    assert_int_equal(R.n_opens, 0);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(what_there_is),   TEST(unknown_paths),         TEST(generate),   TEST(generate_chat),
        TEST(generate_stream), TEST(generate_stream_whole), TEST(disconnect), TEST(infer),
        TEST(infer_binary),    TEST(infer_binary_packed),   TEST(refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
