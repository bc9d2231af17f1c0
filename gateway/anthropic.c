/* Messages of the Anthropic surface (api section 4): one message object, or the events that make it up. */
#include <string.h>

#include "common/base/mem.h"
#include "gateway/anthropic_body.h"
#include "gateway/json_text.h"
#include "gateway/parts.h"
#include "gateway/request.h"
#include "gateway/surface.h"

typedef struct gw_anthropic {
    bool stream;
    uint32_t tokens_max; /* asked for */
    gw_emit_fn emit;
    void *ctx;
    cm_bytes out; /* the object being written */
    char *id, *model;
    gw_parts parts; /* content blocks */
} gw_anthropic;

static void *anthropic_create(const json_t *given, const char *fingerprint, gw_emit_fn emit, void *ctx)
{
    gw_anthropic *writer = cm_alloc(sizeof(*writer));
    (void)fingerprint;
    *writer = (gw_anthropic){.stream = gw_request_streams(given),
                             .tokens_max = (uint32_t)json_integer_value(json_object_get(given, "max_tokens")),
                             .emit = emit,
                             .ctx = ctx};
    cm_bytes_init(&writer->out, 0);
    return writer;
}

static void anthropic_destroy(void *ctx)
{
    gw_anthropic *writer = ctx;
    gw_parts_fini(&writer->parts);
    cm_bytes_fini(&writer->out);
    cm_free(writer->id);
    cm_free(writer->model);
    cm_free(writer);
}

static void *anthropic_choice(void *writer, uint32_t choice)
{
    (void)choice; /* there is one */
    return writer;
}

/* ---- pieces of an object ---- */

static void put(gw_anthropic *writer, const char *text)
{
    cm_bytes_append_text(&writer->out, text);
}

static void put_string(gw_anthropic *writer, const char *text)
{
    gw_json_string(&writer->out, text, strlen(text));
}

static void put_bytes(gw_anthropic *writer, const cm_bytes *bytes)
{
    gw_json_string(&writer->out, cm_bytes_text(bytes), bytes->len);
}

static void begin(gw_anthropic *writer, const char *type)
{
    cm_bytes_clear(&writer->out);
    cm_bytes_printf(&writer->out, "{\"type\":\"%s\"", type);
}

static void emit(gw_anthropic *writer, bool last)
{
    put(writer, "}");
    writer->emit(writer->ctx, 0, cm_bytes_text(&writer->out), writer->out.len, last);
}

static uint32_t block_index(const gw_anthropic *writer)
{
    return writer->parts.n - 1;
}

static void put_id(gw_anthropic *writer, const char *prefix, uint32_t block)
{
    char id[GW_PART_ID_BYTES];
    gw_part_id(prefix, writer->id, block, id);
    put_string(writer, id);
}

/* What is in the cache was not paid for as input: the two add up to the prompt. */
static void put_usage(gw_anthropic *writer, const gw_usage *usage)
{
    cm_bytes_printf(&writer->out,
                    "\"usage\":{\"input_tokens\":%u,\"cache_creation_input_tokens\":0,"
                    "\"cache_read_input_tokens\":%u,\"output_tokens\":%u,"
                    "\"output_tokens_details\":{\"thinking_tokens\":%u}}",
                    usage->prompt_tokens - usage->cached_tokens, usage->cached_tokens,
                    usage->completion_tokens, usage->reasoning_tokens);
}

static const char *stop_reason(const gw_anthropic *writer, const gw_finish *finish)
{
    switch (finish->reason) {
    case GW_REASON_TOOL_CALLS:
        return "tool_use";
    case GW_REASON_LENGTH:
        return finish->usage.completion_tokens < writer->tokens_max ? "model_context_window_exceeded"
                                                                    : "max_tokens";
    case GW_REASON_STOP:
        break;
    }
    return finish->stop_string != NULL ? "stop_sequence" : "end_turn";
}

static void put_stop(gw_anthropic *writer, const gw_finish *finish)
{
    cm_bytes_printf(&writer->out, "\"stop_reason\":\"%s\",\"stop_sequence\":", stop_reason(writer, finish));
    if (finish->stop_string != NULL) {
        put_string(writer, finish->stop_string);
    } else {
        put(writer, "null");
    }
}

/* "type":"message" and what is known of it from the start */
static void put_message_head(gw_anthropic *writer)
{
    put(writer, "\"id\":");
    put_string(writer, writer->id);
    put(writer, ",\"role\":\"assistant\",\"model\":");
    put_string(writer, writer->model);
}

/* ---- streamed ---- */

static void emit_message_start(gw_anthropic *writer, const gw_start *start)
{
    begin(writer, "message_start");
    put(writer, ",\"message\":{\"type\":\"message\",");
    put_message_head(writer);
    put(writer, ",\"content\":[],\"stop_reason\":null,\"stop_sequence\":null,");
    put_usage(writer,
              &(gw_usage){.prompt_tokens = start->prompt_tokens, .cached_tokens = start->cached_tokens});
    put(writer, "}");
    emit(writer, false);
    begin(writer, "ping");
    emit(writer, false);
}

static void emit_block_start(gw_anthropic *writer, const gw_part *part)
{
    begin(writer, "content_block_start");
    cm_bytes_printf(&writer->out, ",\"index\":%u,\"content_block\":", block_index(writer));
    if (part->kind == MD_PIECE_REASONING) {
        put(writer, "{\"type\":\"thinking\",\"thinking\":\"\",\"signature\":\"\"}");
    } else if (part->kind == MD_PIECE_CONTENT) {
        put(writer, "{\"type\":\"text\",\"text\":\"\"}");
    } else {
        put(writer, "{\"type\":\"tool_use\",\"id\":");
        put_id(writer, "toolu_", block_index(writer));
        put(writer, ",\"name\":");
        put_bytes(writer, &part->name);
        put(writer, ",\"input\":{}}");
    }
    emit(writer, false);
}

static void begin_delta(gw_anthropic *writer, uint32_t block, const char *type, const char *key)
{
    begin(writer, "content_block_delta");
    cm_bytes_printf(&writer->out, ",\"index\":%u,\"delta\":{\"type\":\"%s\",\"%s\":", block, type, key);
}

static void emit_delta(gw_anthropic *writer, const md_piece *piece)
{
    static const char *const words[][2] = {
        [MD_PIECE_REASONING] = {"thinking_delta", "thinking"},
        [MD_PIECE_CONTENT] = {"text_delta", "text"},
        [MD_PIECE_ARGS] = {"input_json_delta", "partial_json"},
    };
    begin_delta(writer, block_index(writer), words[piece->kind][0], words[piece->kind][1]);
    gw_json_string(&writer->out, piece->text, piece->n_bytes);
    put(writer, "}");
    emit(writer, false);
}

/* Clients give a signature back with the thinking, and nothing more: it only must not be empty. */
static void emit_block_stop(gw_anthropic *writer, uint32_t block)
{
    if (writer->parts.part[block].kind == MD_PIECE_REASONING) {
        begin_delta(writer, block, "signature_delta", "signature");
        put_id(writer, "", block);
        put(writer, "}");
        emit(writer, false);
    }
    begin(writer, "content_block_stop");
    cm_bytes_printf(&writer->out, ",\"index\":%u", block);
    emit(writer, false);
}

static void emit_message_end(gw_anthropic *writer, const gw_finish *finish)
{
    if (writer->parts.n > 0) {
        emit_block_stop(writer, block_index(writer));
    }
    begin(writer, "message_delta");
    put(writer, ",\"delta\":{");
    put_stop(writer, finish);
    put(writer, "},");
    put_usage(writer, &finish->usage);
    emit(writer, false);
    begin(writer, "message_stop");
    emit(writer, true);
}

/* ---- in one piece ---- */

/* An object in any case: arguments that were cut off are what the prompt would show of them, too. */
static void put_input(gw_anthropic *writer, const cm_bytes *arguments)
{
    json_t *input = json_loadb(cm_bytes_text(arguments), arguments->len, JSON_ALLOW_NUL, NULL);
    if (json_is_object(input)) {
        cm_bytes_append(&writer->out, arguments->data, arguments->len);
    } else if (arguments->len == 0) {
        put(writer, "{}");
    } else {
        put(writer, "{\"arguments\":");
        put_bytes(writer, arguments);
        put(writer, "}");
    }
    json_decref(input);
}

static void put_block(gw_anthropic *writer, uint32_t block)
{
    const gw_part *part = &writer->parts.part[block];
    if (part->kind == MD_PIECE_REASONING) {
        put(writer, "{\"type\":\"thinking\",\"thinking\":");
        put_bytes(writer, &part->text);
        put(writer, ",\"signature\":");
        put_id(writer, "", block);
    } else if (part->kind == MD_PIECE_CONTENT) {
        put(writer, "{\"type\":\"text\",\"text\":");
        put_bytes(writer, &part->text);
    } else {
        put(writer, "{\"type\":\"tool_use\",\"id\":");
        put_id(writer, "toolu_", block);
        put(writer, ",\"name\":");
        put_bytes(writer, &part->name);
        put(writer, ",\"input\":");
        put_input(writer, &part->text);
    }
    put(writer, "}");
}

static void emit_whole(gw_anthropic *writer, const gw_finish *finish)
{
    begin(writer, "message");
    put(writer, ",");
    put_message_head(writer);
    put(writer, ",\"content\":[");
    for (uint32_t i = 0; i < writer->parts.n; i++) {
        put(writer, i > 0 ? "," : "");
        put_block(writer, i);
    }
    put(writer, "],");
    put_stop(writer, finish);
    put(writer, ",");
    put_usage(writer, &finish->usage);
    emit(writer, true);
}

/* ---- events ---- */

static void anthropic_started(void *ctx, const gw_start *start)
{
    gw_anthropic *writer = ctx;
    writer->id = cm_strdup(start->request_id);
    writer->model = cm_strdup(start->model);
    if (writer->stream) {
        emit_message_start(writer, start);
    }
}

/* Blocks do not overlap: one is ended before the next begins. */
static void anthropic_piece(void *ctx, const md_piece *piece)
{
    gw_anthropic *writer = ctx;
    bool fresh = gw_parts_add(&writer->parts, piece);
    if (!writer->stream) {
        return;
    }
    if (fresh && writer->parts.n > 1) {
        emit_block_stop(writer, block_index(writer) - 1);
    }
    if (fresh) {
        emit_block_start(writer, &writer->parts.part[block_index(writer)]);
    }
    if (piece->kind != MD_PIECE_CALL) {
        emit_delta(writer, piece);
    }
}

static void anthropic_finished(void *ctx, const gw_finish *finish)
{
    gw_anthropic *writer = ctx;
    if (writer->stream) {
        emit_message_end(writer, finish);
    } else {
        gw_parts_mend(&writer->parts, finish->parser);
        emit_whole(writer, finish);
    }
}

static const gw_stream_events *anthropic_events(void)
{
    static const gw_stream_events events = {
        .started = anthropic_started,
        .piece = anthropic_piece,
        .finished = anthropic_finished,
    };
    return &events;
}

static void anthropic_keep_alive(const void *writer, cm_bytes *out)
{
    (void)writer;
    cm_bytes_append_text(out, "{\"type\":\"ping\"}");
}

const gw_surface gw_surface_messages = {
    .name = "http messages",
    .kind = GW_ASK_CHAT,
    .id_prefix = "msg_",
    .named_events = true,
    .fields = gw_anthropic_fields,
    .body = gw_anthropic_body,
    .error = gw_anthropic_error,
    .writer = {.create = anthropic_create,
               .destroy = anthropic_destroy,
               .choice = anthropic_choice,
               .events = anthropic_events,
               .keep_alive = anthropic_keep_alive},
};
