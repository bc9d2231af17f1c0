/* What clients send over HTTP, and say of it: its type, its packing. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <zlib.h>

#include <cmocka.h>

#include "tests/unit/gateway_rig.h"

enum { PACKED_MAX = 64 * 1024, BODY_MAX = 100000 };

static const char QUESTION[] = "{" NO_THINKING "," USER("hello") "}";

static int status_of(const char *path, const char *headers, const void *body, size_t n, const char *text)
{
    cm_bytes head;
    cm_bytes_init(&head, 0);
    cm_bytes_printf(&head,
                    "POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%sContent-Length: %zu\r\n\r\n", path,
                    headers, n);
    rig_client *client = rig_open_raw(cm_bytes_text(&head));
    bufferevent_write(client->bev, body, n);
    rig_wait_closed(client);
    int status = rig_status(client);
    if (strstr(cm_bytes_text(&client->in), text) == NULL) {
        fail_msg("%s%s", headers, cm_bytes_text(&client->in));
    }
    rig_close(client);
    cm_bytes_fini(&head);
    return status;
}

static int ask(const char *headers, const void *body, size_t n, const char *text)
{
    return status_of(CHAT, headers, body, n, text);
}

static void types(void **state)
{
    (void)state;
    static const struct {
        const char *type;
        bool ok;
    } types[] = {
        {"application/json", true},
        {"application/json; charset=utf-8", true},
        {"Application/JSON;charset=UTF-8", true},
        {"application/vnd.api+json", true},
        {"application/x-www-form-urlencoded", true}, /* curl -d */
        {"", true},
        {"text/plain;charset=UTF-8", false},
        {"multipart/form-data; boundary=x", false},
        {"application/octet-stream", false},
        {"application/jsonp", false},
        {"xml/application/json", false},
        {"+json", false},
    };
    rig_ready();
    rig_reply("ok");
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        char header[96];
        snprintf(header, sizeof(header), "Content-Type: %s\r\n", types[i].type);
        int status = ask(header, QUESTION, strlen(QUESTION), types[i].ok ? "ok" : "unsupported_media_type");
        if (status != (types[i].ok ? 200 : 415)) {
            fail_msg("%s: %d", types[i].type, status);
        }
    }
    assert_int_equal(ask("", QUESTION, strlen(QUESTION), "ok"), 200);
    assert_int_equal(status_of("/v1/messages", "Content-Type: text/plain\r\n", "{}", 2,
                               "\"type\":\"invalid_request_error\",\"message\":"),
                     415);
    assert_int_equal(status_of("/tokenize", "Content-Type: text/plain\r\n", "{}", 2, "Content-Type"), 415);
    assert_int_equal(
        status_of("/v2/models/nano/infer", "Content-Type: text/plain\r\n", "{}", 2, "{\"error\""), 415);
}

static size_t gzip(const void *data, size_t n, uint8_t out[PACKED_MAX])
{
    z_stream z = {
        .next_in = (Bytef *)(uintptr_t)data, .avail_in = (uInt)n, .next_out = out, .avail_out = PACKED_MAX};
    assert_int_equal(deflateInit2(&z, 9, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
    assert_int_equal(deflate(&z, Z_FINISH), Z_STREAM_END);
    deflateEnd(&z);
    return PACKED_MAX - z.avail_out;
}

#define PACKED "Content-Type: application/json\r\nContent-Encoding: gzip\r\n"

static void packed(void **state)
{
    (void)state;
    static uint8_t data[PACKED_MAX];
    rig_ready();
    rig_reply("ok");
    size_t n = gzip(QUESTION, strlen(QUESTION), data);
    assert_int_equal(ask(PACKED, data, n, "ok"), 200);
    assert_int_equal(ask("Content-Encoding: identity\r\n", QUESTION, strlen(QUESTION), "ok"), 200);
    uint32_t n_opens = R.n_opens;
    assert_int_equal(ask(PACKED, data, n - 1, "not whole gzip data"), 400);
    assert_int_equal(ask(PACKED, data, 0, "not whole gzip data"), 400);
    assert_int_equal(ask(PACKED, QUESTION, strlen(QUESTION), "not whole gzip data"), 400);
    data[n] = 'x'; /* behind the end */
    assert_int_equal(ask(PACKED, data, n + 1, "not whole gzip data"), 400);
    data[n - 5] ^= 1; /* its checksum */
    assert_int_equal(ask(PACKED, data, n, "not whole gzip data"), 400);
    n = gzip("[1,", 3, data);
    assert_int_equal(ask(PACKED, data, n, "not valid JSON"), 400);
    assert_int_equal(ask("Content-Encoding: br\r\n", QUESTION, strlen(QUESTION), "gzip is understood"), 415);
    assert_int_equal(
        ask("Content-Encoding: gzip, gzip\r\n", QUESTION, strlen(QUESTION), "gzip is understood"), 415);
    assert_int_equal(R.n_opens, n_opens);
}

/* A body of few bytes that holds many. */
static void packed_too_much(void **state)
{
    (void)state;
    enum { BOMB = 16 << 20 };
    static uint8_t data[PACKED_MAX];
    char limit[16];
    snprintf(limit, sizeof(limit), "%d", BODY_MAX);
    rig_set("request_bytes_max", limit);
    rig_ready();
    rig_reply("ok");
    char *body = cm_alloc(BOMB);
    memset(body, ' ', BOMB);
    memcpy(body, QUESTION, strlen(QUESTION));
    size_t n = gzip(body, BODY_MAX, data);
    assert_int_equal(ask(PACKED, data, n, "ok"), 200);
    n = gzip(body, BODY_MAX + 1, data);
    assert_int_equal(ask(PACKED, data, n, "has more than 100000 bytes"), 413);
    n = gzip(body, BOMB, data);
    assert_in_range(n, 1, BODY_MAX / 2);
    assert_int_equal(ask(PACKED, data, n, "has more than 100000 bytes"), 413);
    cm_free(body);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, rig_setup, rig_teardown)
    const struct CMUnitTest tests[] = {TEST(types), TEST(packed), TEST(packed_too_much)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
