/* chat.completion, chat.completion.chunk and text_completion objects (api sections 1.2, 1.3, 2). */
#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "gateway/json_text.h"
#include "gateway/request.h"

enum { CALL_ID_CHARS = 24 };

/* A tool call of an object that is not streamed. */
typedef struct openai_call {
    char id[40];
    cm_bytes name, arguments;
} openai_call;

struct gw_openai {
    gw_ask_kind kind;
    bool stream, include_usage;
    char *fingerprint;
    gw_openai_emit_fn emit;
    void *ctx;
    cm_bytes out; /* the object being written */

    char *id, *model; /* from started */
    int64_t created_s;
    bool thinking;

    cm_bytes content, reasoning; /* not streamed: so far */
    openai_call *calls;
    uint32_t n_calls;
};

gw_openai *gw_openai_create(gw_ask_kind kind, const json_t *body, const char *fingerprint,
                            gw_openai_emit_fn emit, void *ctx)
{
    gw_openai *writer = cm_alloc(sizeof(*writer));
    *writer = (gw_openai){.kind = kind,
                          .stream = gw_request_streams(body),
                          .include_usage = gw_request_wants_usage(body),
                          .fingerprint = cm_strdup(fingerprint),
                          .emit = emit,
                          .ctx = ctx};
    cm_bytes_init(&writer->out, 0);
    cm_bytes_init(&writer->content, 0);
    cm_bytes_init(&writer->reasoning, 0);
    return writer;
}

void gw_openai_destroy(gw_openai *writer)
{
    for (uint32_t i = 0; i < writer->n_calls; i++) {
        cm_bytes_fini(&writer->calls[i].name);
        cm_bytes_fini(&writer->calls[i].arguments);
    }
    cm_free(writer->calls);
    cm_bytes_fini(&writer->content);
    cm_bytes_fini(&writer->reasoning);
    cm_bytes_fini(&writer->out);
    cm_free(writer->id);
    cm_free(writer->model);
    cm_free(writer->fingerprint);
    cm_free(writer);
}

/* ---- pieces of an object ---- */

static void put(gw_openai *writer, const char *text)
{
    cm_bytes_append_text(&writer->out, text);
}

static void put_string(gw_openai *writer, const char *text, size_t n)
{
    gw_json_string(&writer->out, text, n);
}

static void put_bytes(gw_openai *writer, const cm_bytes *bytes)
{
    gw_json_string(&writer->out, cm_bytes_text(bytes), bytes->len);
}

/* Everything up to and with "choices":[ */
static void begin_object(gw_openai *writer)
{
    const char *object = writer->kind == GW_ASK_COMPLETE ? "text_completion"
                         : writer->stream                ? "chat.completion.chunk"
                                                         : "chat.completion";
    cm_bytes_clear(&writer->out);
    put(writer, "{\"id\":");
    put_string(writer, writer->id, strlen(writer->id));
    cm_bytes_printf(&writer->out, ",\"object\":\"%s\",\"created\":%lld,\"model\":", object,
                    (long long)writer->created_s);
    put_string(writer, writer->model, strlen(writer->model));
    put(writer, ",\"system_fingerprint\":");
    put_string(writer, writer->fingerprint, strlen(writer->fingerprint));
    put(writer, ",\"choices\":[");
}

static void put_usage(gw_openai *writer, const gw_usage *usage)
{
    if (usage == NULL) {
        put(writer, "null");
        return;
    }
    cm_bytes_printf(&writer->out,
                    "{\"prompt_tokens\":%u,\"completion_tokens\":%u,\"total_tokens\":%llu,"
                    "\"prompt_tokens_details\":{\"cached_tokens\":%u},"
                    "\"completion_tokens_details\":{\"reasoning_tokens\":%u},"
                    "\"prompt_cache_hit_tokens\":%u,\"prompt_cache_miss_tokens\":%u}",
                    usage->prompt_tokens, usage->completion_tokens,
                    (unsigned long long)usage->prompt_tokens + usage->completion_tokens, usage->cached_tokens,
                    usage->reasoning_tokens, usage->cached_tokens,
                    usage->prompt_tokens - usage->cached_tokens);
}

static void end_object(gw_openai *writer, const gw_usage *usage, bool last)
{
    put(writer, "],\"usage\":");
    put_usage(writer, usage);
    put(writer, "}");
    writer->emit(writer->ctx, cm_bytes_text(&writer->out), writer->out.len, last);
}

static const char *reason_word(gw_reason reason)
{
    switch (reason) {
    case GW_REASON_STOP:
        return "stop";
    case GW_REASON_LENGTH:
        return "length";
    case GW_REASON_TOOL_CALLS:
        return "tool_calls";
    }
    return "stop";
}

static void put_finish_reason(gw_openai *writer, const gw_finish *finish)
{
    if (finish == NULL) {
        put(writer, "null");
    } else {
        cm_bytes_printf(&writer->out, "\"%s\"", reason_word(finish->reason));
    }
}

/* ---- streamed ---- */

static void begin_delta(gw_openai *writer)
{
    begin_object(writer);
    put(writer, writer->kind == GW_ASK_CHAT ? "{\"index\":0,\"delta\":{" : "{\"text\":");
}

static void end_delta(gw_openai *writer, const gw_finish *finish, const gw_usage *usage, bool last)
{
    put(writer, writer->kind == GW_ASK_CHAT ? "},\"logprobs\":null,\"finish_reason\":"
                                            : ",\"index\":0,\"logprobs\":null,\"finish_reason\":");
    put_finish_reason(writer, finish);
    put(writer, "}");
    end_object(writer, usage, last);
}

static void make_call_id(uint32_t call, char id_out[40])
{
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    uint8_t bytes[CALL_ID_CHARS];
    cm_random_bytes(bytes, sizeof(bytes));
    int n = snprintf(id_out, 40, "call_%02u_", call % 100);
    for (int i = 0; i < CALL_ID_CHARS; i++) {
        id_out[n + i] = letters[bytes[i] % (sizeof(letters) - 1)];
    }
    id_out[n + CALL_ID_CHARS] = 0;
}

static void delta_call(gw_openai *writer, const md_piece *piece)
{
    char id[40];
    make_call_id(piece->call, id);
    cm_bytes_printf(
        &writer->out,
        "\"tool_calls\":[{\"index\":%u,\"id\":\"%s\",\"type\":\"function\",\"function\":{\"name\":",
        piece->call, id);
    put_string(writer, piece->text, piece->n_bytes);
    put(writer, ",\"arguments\":\"\"}}]");
}

static void delta_arguments(gw_openai *writer, const md_piece *piece)
{
    cm_bytes_printf(&writer->out, "\"tool_calls\":[{\"index\":%u,\"function\":{\"arguments\":", piece->call);
    put_string(writer, piece->text, piece->n_bytes);
    put(writer, "}}]");
}

static void emit_piece(gw_openai *writer, const md_piece *piece)
{
    begin_delta(writer);
    if (writer->kind == GW_ASK_COMPLETE) {
        put_string(writer, piece->text, piece->n_bytes);
    } else if (piece->kind == MD_PIECE_CALL) {
        delta_call(writer, piece);
    } else if (piece->kind == MD_PIECE_ARGS) {
        delta_arguments(writer, piece);
    } else {
        put(writer, piece->kind == MD_PIECE_CONTENT ? "\"content\":" : "\"reasoning_content\":");
        put_string(writer, piece->text, piece->n_bytes);
    }
    end_delta(writer, NULL, NULL, false);
}

static void emit_role(gw_openai *writer)
{
    begin_delta(writer);
    put(writer, writer->thinking ? "\"role\":\"assistant\",\"content\":null,\"reasoning_content\":\"\""
                                 : "\"role\":\"assistant\",\"content\":\"\",\"reasoning_content\":null");
    end_delta(writer, NULL, NULL, false);
}

/* Usage comes in a chunk of its own when it was asked for, else on the last one. */
static void emit_finish(gw_openai *writer, const gw_finish *finish)
{
    begin_delta(writer);
    put(writer, writer->kind == GW_ASK_COMPLETE ? "\"\"" : "");
    end_delta(writer, finish, writer->include_usage ? NULL : &finish->usage, !writer->include_usage);
    if (writer->include_usage) {
        begin_object(writer);
        end_object(writer, &finish->usage, true);
    }
}

/* ---- in one piece ---- */

static openai_call *collect_call(gw_openai *writer, uint32_t call)
{
    while (writer->n_calls <= call) {
        writer->calls = cm_realloc(writer->calls, (writer->n_calls + 1) * sizeof(*writer->calls));
        openai_call *fresh = &writer->calls[writer->n_calls];
        make_call_id(writer->n_calls, fresh->id);
        cm_bytes_init(&fresh->name, 0);
        cm_bytes_init(&fresh->arguments, 0);
        writer->n_calls++;
    }
    return &writer->calls[call];
}

static void collect_piece(gw_openai *writer, const md_piece *piece)
{
    cm_bytes *to = piece->kind == MD_PIECE_CONTENT     ? &writer->content
                   : piece->kind == MD_PIECE_REASONING ? &writer->reasoning
                   : piece->kind == MD_PIECE_CALL      ? &collect_call(writer, piece->call)->name
                                                       : &collect_call(writer, piece->call)->arguments;
    cm_bytes_append(to, piece->text, piece->n_bytes);
}

static void put_calls(gw_openai *writer)
{
    for (uint32_t i = 0; i < writer->n_calls; i++) {
        const openai_call *call = &writer->calls[i];
        cm_bytes_printf(&writer->out,
                        "%s{\"index\":%u,\"id\":\"%s\",\"type\":\"function\",\"function\":{\"name\":",
                        i == 0 ? ",\"tool_calls\":[" : ",", i, call->id);
        put_bytes(writer, &call->name);
        put(writer, ",\"arguments\":");
        put_bytes(writer, &call->arguments);
        put(writer, "}}");
    }
    put(writer, writer->n_calls > 0 ? "]" : "");
}

static void emit_whole(gw_openai *writer, const gw_finish *finish)
{
    begin_object(writer);
    if (writer->kind == GW_ASK_COMPLETE) {
        put(writer, "{\"text\":");
        put_bytes(writer, &writer->content);
        put(writer, ",\"index\":0");
    } else {
        put(writer, "{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":");
        put_bytes(writer, &writer->content);
        if (writer->thinking) {
            put(writer, ",\"reasoning_content\":");
            put_bytes(writer, &writer->reasoning);
        }
        put_calls(writer);
        put(writer, "}");
    }
    put(writer, ",\"logprobs\":null,\"finish_reason\":");
    put_finish_reason(writer, finish);
    put(writer, "}");
    end_object(writer, &finish->usage, true);
}

/* ---- events ---- */

static void openai_started(void *ctx, const gw_start *start)
{
    gw_openai *writer = ctx;
    writer->id = cm_strdup(start->request_id);
    writer->model = cm_strdup(start->model);
    writer->created_s = start->created_s;
    writer->thinking = start->thinking;
    if (writer->stream && writer->kind == GW_ASK_CHAT) {
        emit_role(writer);
    }
}

static void openai_piece(void *ctx, const md_piece *piece)
{
    gw_openai *writer = ctx;
    if (writer->stream) {
        emit_piece(writer, piece);
    } else {
        collect_piece(writer, piece);
    }
}

static void openai_tokens(void *ctx, uint64_t offset, const uint32_t *ids, uint32_t n)
{
    (void)ctx;
    (void)offset;
    (void)ids;
    (void)n;
}

static void openai_flush(void *ctx)
{
    (void)ctx;
}

static void openai_finished(void *ctx, const gw_finish *finish)
{
    gw_openai *writer = ctx;
    if (writer->stream) {
        emit_finish(writer, finish);
    } else {
        emit_whole(writer, finish);
    }
}

static void openai_failed(void *ctx, const gw_error *error)
{
    (void)ctx;
    (void)error;
}

const gw_stream_events *gw_openai_events(void)
{
    static const gw_stream_events events = {
        .started = openai_started,
        .piece = openai_piece,
        .tokens = openai_tokens,
        .flush = openai_flush,
        .finished = openai_finished,
        .failed = openai_failed,
    };
    return &events;
}
