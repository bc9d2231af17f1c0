/* chat.completion, chat.completion.chunk and text_completion objects (api sections 1.2, 1.3, 2). */
#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "gateway/json_text.h"
#include "gateway/openai_logprobs.h"
#include "gateway/request.h"

enum { CALL_ID_CHARS = 24, CALL_ID_BYTES = 40 };

/* A tool call of an object that is not streamed. */
typedef struct openai_call {
    cm_bytes name, arguments;
} openai_call;

struct gw_openai_choice {
    gw_openai *writer;
    uint32_t index;
    bool thinking;
    cm_bytes head;               /* streamed: with which each of its objects begins; empty before the first */
    const gw_usage *now;         /* what it came to so far, while it is streamed; NULL: not known */
    gw_openai_logprobs logprobs; /* when asked for: not written yet */

    cm_bytes content, reasoning; /* not streamed: so far */
    openai_call *calls;
    uint32_t n_calls;
    gw_reason reason; /* not streamed: once finished */
};

struct gw_openai {
    gw_ask_kind kind;
    bool stream, include_usage, usage_always, wants_logprobs;
    char *fingerprint;
    gw_emit_fn emit;
    void *ctx;
    cm_bytes out; /* the object being written */

    char *id, *model; /* from the first that started; NULL before */
    int64_t created_s;

    gw_openai_choice *choices;
    uint32_t n_choice, n_finished;
    gw_usage usage; /* of those that have finished */
};

static void choice_init(gw_openai *writer, uint32_t index)
{
    gw_openai_choice *choice = &writer->choices[index];
    *choice = (gw_openai_choice){.writer = writer, .index = index};
    gw_openai_logprobs_init(&choice->logprobs, writer->kind);
    cm_bytes_init(&choice->head, 0);
    cm_bytes_init(&choice->content, 0);
    cm_bytes_init(&choice->reasoning, 0);
}

static void choice_fini(gw_openai_choice *choice)
{
    for (uint32_t i = 0; i < choice->n_calls; i++) {
        cm_bytes_fini(&choice->calls[i].name);
        cm_bytes_fini(&choice->calls[i].arguments);
    }
    cm_free(choice->calls);
    gw_openai_logprobs_fini(&choice->logprobs);
    cm_bytes_fini(&choice->head);
    cm_bytes_fini(&choice->content);
    cm_bytes_fini(&choice->reasoning);
}

gw_openai *gw_openai_create(gw_ask_kind kind, const json_t *body, const char *fingerprint, gw_emit_fn emit,
                            void *ctx)
{
    gw_openai *writer = cm_alloc(sizeof(*writer));
    *writer = (gw_openai){.kind = kind,
                          .stream = gw_request_streams(body),
                          .include_usage = gw_request_wants_usage(body),
                          .usage_always = gw_request_wants_usage_always(body),
                          .wants_logprobs = gw_request_wants_logprobs(kind, body),
                          .fingerprint = cm_strdup(fingerprint),
                          .emit = emit,
                          .ctx = ctx,
                          .n_choice = gw_request_choices(body)};
    cm_bytes_init(&writer->out, 0);
    writer->choices = cm_alloc(sizeof(*writer->choices) * writer->n_choice);
    for (uint32_t i = 0; i < writer->n_choice; i++) {
        choice_init(writer, i);
    }
    return writer;
}

void gw_openai_destroy(gw_openai *writer)
{
    for (uint32_t i = 0; i < writer->n_choice; i++) {
        choice_fini(&writer->choices[i]);
    }
    cm_free(writer->choices);
    cm_bytes_fini(&writer->out);
    cm_free(writer->id);
    cm_free(writer->model);
    cm_free(writer->fingerprint);
    cm_free(writer);
}

uint32_t gw_openai_choices(const gw_openai *writer)
{
    return writer->n_choice;
}

gw_openai_choice *gw_openai_choice_of(gw_openai *writer, uint32_t choice)
{
    CM_ASSERT(choice < writer->n_choice);
    return &writer->choices[choice];
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

static void end_object(gw_openai *writer, uint32_t choice, const gw_usage *usage, bool last)
{
    put(writer, "],\"usage\":");
    put_usage(writer, usage);
    put(writer, "}");
    writer->emit(writer->ctx, choice, cm_bytes_text(&writer->out), writer->out.len, last);
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

static void put_finish_reason(gw_openai *writer, const gw_reason *reason)
{
    if (reason == NULL) {
        put(writer, "null");
    } else {
        cm_bytes_printf(&writer->out, "\"%s\"", reason_word(*reason));
    }
}

/* From "logprobs" to the end of a choice. */
static void end_choice(gw_openai_choice *choice, const gw_reason *reason)
{
    gw_openai *writer = choice->writer;
    put(writer, ",\"logprobs\":");
    if (writer->wants_logprobs && (!writer->stream || choice->logprobs.n > 0)) {
        gw_openai_logprobs_put(&choice->logprobs, choice->thinking, &writer->out);
    } else {
        put(writer, "null");
    }
    put(writer, ",\"finish_reason\":");
    put_finish_reason(writer, reason);
    put(writer, "}");
}

/* ---- streamed ---- */

static void begin_delta(gw_openai_choice *choice)
{
    gw_openai *writer = choice->writer;
    if (choice->head.len > 0) {
        cm_bytes_clear(&writer->out);
        cm_bytes_append(&writer->out, choice->head.data, choice->head.len);
        return;
    }
    begin_object(writer);
    if (writer->kind == GW_ASK_CHAT) {
        cm_bytes_printf(&writer->out, "{\"index\":%u,\"delta\":{", choice->index);
    } else {
        put(writer, "{\"text\":");
    }
    cm_bytes_append(&choice->head, writer->out.data, writer->out.len);
}

static void end_delta(gw_openai_choice *choice, const gw_reason *reason, const gw_usage *usage, bool last)
{
    gw_openai *writer = choice->writer;
    if (writer->kind == GW_ASK_CHAT) {
        put(writer, "}");
    } else {
        cm_bytes_printf(&writer->out, ",\"index\":%u", choice->index);
    }
    end_choice(choice, reason);
    end_object(writer, choice->index, usage == NULL && writer->usage_always ? choice->now : usage, last);
}

/* From the request's id and the call's place alone: told again, a stream is byte for byte the same. */
static void make_call_id(const gw_openai_choice *choice, uint32_t call, char id_out[CALL_ID_BYTES])
{
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    uint64_t key = XXH3_64bits(choice->writer->id, strlen(choice->writer->id));
    int n = snprintf(id_out, CALL_ID_BYTES, "call_%02u_", call % 100);
    for (uint32_t i = 0; i < CALL_ID_CHARS; i++) {
        uint32_t draw = cm_rng_at(key, (uint64_t)choice->index << 32 | call, i).word[0];
        id_out[n++] = letters[draw % (sizeof(letters) - 1)];
    }
    id_out[n] = 0;
}

static void delta_call(const gw_openai_choice *choice, const md_piece *piece)
{
    gw_openai *writer = choice->writer;
    char id[CALL_ID_BYTES];
    make_call_id(choice, piece->call, id);
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

static void emit_piece(gw_openai_choice *choice, const md_piece *piece)
{
    gw_openai *writer = choice->writer;
    begin_delta(choice);
    if (writer->kind == GW_ASK_COMPLETE) {
        put_string(writer, piece->text, piece->n_bytes);
    } else if (piece->kind == MD_PIECE_CALL) {
        delta_call(choice, piece);
    } else if (piece->kind == MD_PIECE_ARGS) {
        delta_arguments(writer, piece);
    } else {
        put(writer, piece->kind == MD_PIECE_CONTENT ? "\"content\":" : "\"reasoning_content\":");
        put_string(writer, piece->text, piece->n_bytes);
    }
    end_delta(choice, NULL, NULL, false);
}

static void emit_role(gw_openai_choice *choice)
{
    begin_delta(choice);
    put(choice->writer, choice->thinking
                            ? "\"role\":\"assistant\",\"content\":null,\"reasoning_content\":\"\""
                            : "\"role\":\"assistant\",\"content\":\"\",\"reasoning_content\":null");
    end_delta(choice, NULL, NULL, false);
}

/* Usage comes in a chunk of its own when it was asked for, else on the last one. */
static void emit_finish(gw_openai_choice *choice, gw_reason reason)
{
    gw_openai *writer = choice->writer;
    bool last = writer->n_finished == writer->n_choice;
    begin_delta(choice);
    put(writer, writer->kind == GW_ASK_COMPLETE ? "\"\"" : "");
    end_delta(choice, &reason, last && !writer->include_usage ? &writer->usage : NULL,
              last && !writer->include_usage);
    if (last && writer->include_usage) {
        begin_object(writer);
        end_object(writer, 0, &writer->usage, true);
    }
}

/* ---- in one piece ---- */

static openai_call *collect_call(gw_openai_choice *choice, uint32_t call)
{
    while (choice->n_calls <= call) {
        choice->calls = cm_realloc(choice->calls, (choice->n_calls + 1) * sizeof(*choice->calls));
        openai_call *fresh = &choice->calls[choice->n_calls];
        cm_bytes_init(&fresh->name, 0);
        cm_bytes_init(&fresh->arguments, 0);
        choice->n_calls++;
    }
    return &choice->calls[call];
}

static void collect_piece(gw_openai_choice *choice, const md_piece *piece)
{
    cm_bytes *to = piece->kind == MD_PIECE_CONTENT     ? &choice->content
                   : piece->kind == MD_PIECE_REASONING ? &choice->reasoning
                   : piece->kind == MD_PIECE_CALL      ? &collect_call(choice, piece->call)->name
                                                       : &collect_call(choice, piece->call)->arguments;
    cm_bytes_append(to, piece->text, piece->n_bytes);
}

/* The parser knows better what arguments the whole answer has: a value that was flagged as JSON and is none
 * is a string. */
static void settle_arguments(gw_openai_choice *choice, const md_parser *parser)
{
    for (uint32_t i = 0; parser != NULL && i < choice->n_calls; i++) {
        size_t n;
        const char *arguments = md_parser_call_args(parser, i, &n);
        cm_bytes_clear(&choice->calls[i].arguments);
        cm_bytes_append(&choice->calls[i].arguments, arguments, n);
    }
}

static void put_calls(gw_openai_choice *choice)
{
    gw_openai *writer = choice->writer;
    for (uint32_t i = 0; i < choice->n_calls; i++) {
        const openai_call *call = &choice->calls[i];
        char id[CALL_ID_BYTES];
        make_call_id(choice, i, id);
        cm_bytes_printf(&writer->out,
                        "%s{\"index\":%u,\"id\":\"%s\",\"type\":\"function\",\"function\":{\"name\":",
                        i == 0 ? ",\"tool_calls\":[" : ",", i, id);
        put_bytes(writer, &call->name);
        put(writer, ",\"arguments\":");
        put_bytes(writer, &call->arguments);
        put(writer, "}}");
    }
    put(writer, choice->n_calls > 0 ? "]" : "");
}

static void put_whole(gw_openai_choice *choice)
{
    gw_openai *writer = choice->writer;
    if (writer->kind == GW_ASK_COMPLETE) {
        put(writer, "{\"text\":");
        put_bytes(writer, &choice->content);
        cm_bytes_printf(&writer->out, ",\"index\":%u", choice->index);
    } else {
        cm_bytes_printf(&writer->out,
                        "{\"index\":%u,\"message\":{\"role\":\"assistant\",\"content\":", choice->index);
        put_bytes(writer, &choice->content);
        if (choice->thinking ||
            choice->reasoning.len > 0) { /* it may begin to think though it was not asked to */
            put(writer, ",\"reasoning_content\":");
            put_bytes(writer, &choice->reasoning);
        }
        put_calls(choice);
        put(writer, "}");
    }
    end_choice(choice, &choice->reason);
}

static void emit_whole(gw_openai *writer)
{
    begin_object(writer);
    for (uint32_t i = 0; i < writer->n_choice; i++) {
        put(writer, i > 0 ? "," : "");
        put_whole(&writer->choices[i]);
    }
    end_object(writer, 0, &writer->usage, true);
}

/* ---- events ---- */

static void openai_started(void *ctx, const gw_start *start)
{
    gw_openai_choice *choice = ctx;
    gw_openai *writer = choice->writer;
    if (writer->id == NULL) {
        writer->id = cm_strdup(start->request_id);
        writer->model = cm_strdup(start->model);
        writer->created_s = start->created_s;
    }
    choice->thinking = start->thinking;
    choice->now = start->usage;
    if (writer->stream && writer->kind == GW_ASK_CHAT) {
        emit_role(choice);
    }
}

static void openai_piece(void *ctx, const md_piece *piece)
{
    gw_openai_choice *choice = ctx;
    if (choice->writer->stream) {
        emit_piece(choice, piece);
    } else {
        collect_piece(choice, piece);
    }
}

static void openai_logprobs(void *ctx, const gw_logprobs *logprobs)
{
    gw_openai_choice *choice = ctx;
    gw_openai_logprobs_add(&choice->logprobs, logprobs);
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

/* Every choice has the same prompt: what one of them computed was computed. */
static void add_usage(gw_openai *writer, const gw_usage *usage)
{
    bool fewest = writer->n_finished == 0 || usage->cached_tokens < writer->usage.cached_tokens;
    writer->usage.prompt_tokens = usage->prompt_tokens;
    writer->usage.cached_tokens = fewest ? usage->cached_tokens : writer->usage.cached_tokens;
    writer->usage.completion_tokens += usage->completion_tokens;
    writer->usage.reasoning_tokens += usage->reasoning_tokens;
}

static void openai_finished(void *ctx, const gw_finish *finish)
{
    gw_openai_choice *choice = ctx;
    gw_openai *writer = choice->writer;
    choice->reason = finish->reason;
    choice->now = &finish->usage;
    settle_arguments(choice, finish->parser);
    add_usage(writer, &finish->usage);
    writer->n_finished++;
    if (writer->stream) {
        emit_finish(choice, finish->reason);
    } else if (writer->n_finished == writer->n_choice) {
        emit_whole(writer);
    }
    choice->now = NULL;
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
        .logprobs = openai_logprobs,
        .flush = openai_flush,
        .finished = openai_finished,
        .failed = openai_failed,
    };
    return &events;
}
