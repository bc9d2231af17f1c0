#include "tests/unit/surface_sink.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "gateway/parts.h"

enum { PARTS_MAX = 8 };

/* Every occurrence of id in text, of the same request and part, becomes "#part". */
static void tag(cm_bytes *text, uint32_t part)
{
    char id[GW_PART_ID_BYTES], name[8];
    cm_bytes out;
    gw_part_id("", "r1", part, id);
    snprintf(name, sizeof(name), "#%u", part);
    cm_bytes_init(&out, 0);
    const char *from = cm_bytes_text(text), *at;
    while ((at = strstr(from, id)) != NULL) {
        cm_bytes_append(&out, from, (size_t)(at - from));
        cm_bytes_append_text(&out, name);
        from = at + strlen(id);
    }
    cm_bytes_append_text(&out, from);
    cm_bytes_fini(text);
    *text = out;
}

static void keep_object(void *ctx, uint32_t choice, const char *json, size_t n_bytes, bool last)
{
    sink *s = ctx;
    assert_int_equal(choice, 0);
    assert_true(s->n < SINK_OBJECTS_MAX);
    assert_false(s->last); /* nothing comes after the last */
    assert_null(memchr(json, '\n', n_bytes));
    cm_bytes *object = &s->object[s->n++];
    cm_bytes_init(object, 0);
    cm_bytes_append(object, json, n_bytes);
    for (uint32_t i = 0; i < PARTS_MAX; i++) {
        tag(object, i);
    }
    s->last = last;
}

void sink_open(sink *s, const gw_surface *surface, const char *given)
{
    json_t *body = json_loads(given, 0, NULL);
    assert_non_null(body);
    *s = (sink){.surface = surface};
    s->writer = surface->writer.create(body, "fp_0", keep_object, s);
    json_decref(body);
}

void sink_close(sink *s)
{
    s->surface->writer.destroy(s->writer);
    for (uint32_t i = 0; i < s->n; i++) {
        cm_bytes_fini(&s->object[i]);
    }
}

static const gw_stream_events *events_of(const sink *s, void **ctx_out)
{
    *ctx_out = s->surface->writer.choice(s->writer, 0);
    return s->surface->writer.events();
}

void sink_start(sink *s)
{
    void *ctx;
    gw_start event = {
        .request_id = "r1", .model = "m", .created_s = 5, .prompt_tokens = 4, .cached_tokens = 1};
    events_of(s, &ctx)->started(ctx, &event);
}

void sink_piece(sink *s, md_piece_kind kind, uint32_t call, const char *text)
{
    void *ctx;
    md_piece event = {.kind = kind, .call = call, .text = text, .n_bytes = strlen(text)};
    events_of(s, &ctx)->piece(ctx, &event);
}

void sink_logprobs(sink *s, md_piece_kind kind, const char *text, float logprob)
{
    void *ctx;
    gw_logprob top = {.id = 9, .logprob = -0.5f, .bytes = (const uint8_t *)"z", .n_bytes = 1};
    gw_logprobs event = {
        .token = {.id = 8, .logprob = logprob, .bytes = (const uint8_t *)text, .n_bytes = strlen(text)},
        .top = &top,
        .n_top = 1,
        .kind = kind};
    events_of(s, &ctx)->logprobs(ctx, &event);
}

void sink_finish(sink *s, gw_reason reason, const char *stop, const md_parser *parser)
{
    void *ctx;
    gw_finish event = {
        .reason = reason,
        .stop_string = stop,
        .stop_id = -1,
        .parser = parser,
        .usage = {.prompt_tokens = 4, .cached_tokens = 1, .completion_tokens = 3, .reasoning_tokens = 2}};
    events_of(s, &ctx)->finished(ctx, &event);
}

static void expect_object(const sink *s, const cm_bytes *object, const char *wanted)
{
    json_t *value = json_loadb(cm_bytes_text(object), object->len, 0, NULL);
    assert_string_equal(cm_bytes_text(object), wanted);
    assert_non_null(value);
    const char *type = json_string_value(json_object_get(value, "type"));
    if (s->surface->named_events && type != NULL) {
        assert_int_equal(strncmp(cm_bytes_text(object), "{\"type\":\"", 9), 0);
        assert_int_equal(strncmp(cm_bytes_text(object) + 9, type, strlen(type)), 0);
    }
    json_decref(value);
}

void sink_expect(sink *s, const char *const *objects, uint32_t n)
{
    for (uint32_t i = 0; i < n && i < s->n; i++) {
        expect_object(s, &s->object[i], objects[i]);
    }
    assert_int_equal(s->n, n);
    assert_true(s->last);
    for (uint32_t i = 0; i < s->n; i++) {
        cm_bytes_fini(&s->object[i]);
    }
    s->n = 0;
    s->last = false;
}

void sink_expect_text(cm_bytes *text, const char *wanted)
{
    for (uint32_t i = 0; i < PARTS_MAX; i++) {
        tag(text, i);
    }
    assert_string_equal(cm_bytes_text(text), wanted);
    cm_bytes_fini(text);
}
