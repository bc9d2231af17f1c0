/* Responses (api section 3): one response object, or the events that make it up. Every part of an answer is
 * an item; an item is ended before the next begins. */
#include <string.h>

#include "common/base/mem.h"
#include "gateway/json_text.h"
#include "gateway/openai_logprobs.h"
#include "gateway/parts.h"
#include "gateway/request.h"
#include "gateway/responses_body.h"

/* What an output item has besides its text. */
typedef struct response_item {
    gw_responses_tool tool; /* what a call's item calls; looked for once, not at each piece */
    cm_bytes logprobs;      /* of a message, when asked for: of all its tokens so far */
} response_item;

typedef struct gw_responses {
    bool stream;
    bool seals; /* reasoning goes out sealed, too */
    gw_emit_fn emit;
    void *ctx;
    cm_bytes out;  /* the object being written */
    json_t *tools; /* the request's, and of it no more: it may be long */
    cm_bytes echo; /* of the request: the response object's other fields, and its end */
    uint32_t n_events;

    char *id, *model;
    int64_t created_s;
    gw_parts parts;      /* output items */
    response_item *item; /* [parts.n] owned */
    cm_bytes logprobs;   /* of tokens whose text has not come yet */
} gw_responses;

/* What becomes of a response or of an item. */
typedef enum outcome { GOING_ON, COMPLETED, INCOMPLETE, FAILED } outcome;
static const char *const STATUS[] = {
    [GOING_ON] = "in_progress", [COMPLETED] = "completed", [INCOMPLETE] = "incomplete", [FAILED] = "failed"};

/* A response has these, whether the client sent them or not. */
static json_t *make_echo(const json_t *given)
{
    static const char fields[] =
        "{\"object\":\"response\",\"background\":false,\"instructions\":null,\"max_output_tokens\":null,"
        "\"max_tool_calls\":null,\"metadata\":{},\"parallel_tool_calls\":true,\"previous_response_id\":null,"
        "\"prompt_cache_key\":null,\"reasoning\":{\"effort\":null,\"summary\":null},"
        "\"safety_identifier\":null,\"service_tier\":\"default\",\"store\":false,\"temperature\":1.0,"
        "\"text\":{\"format\":{\"type\":\"text\"}},\"tool_choice\":\"auto\",\"tools\":[],\"top_logprobs\":0,"
        "\"top_p\":1.0,\"truncation\":\"disabled\",\"user\":null}";
    static const char *const ours[] = {"object", "background", "service_tier", "store", "truncation"};
    json_t *echo = json_loads(fields, 0, NULL), *known = json_copy(echo);
    const char *name;
    json_t *value;
    for (size_t i = 0; i < sizeof(ours) / sizeof(ours[0]); i++) {
        json_object_del(known, ours[i]);
    }
    json_object_foreach(known, name, value)
    {
        json_t *theirs = json_object_get(given, name);
        if (theirs != NULL && !json_is_null(theirs)) {
            json_object_set(echo, name, theirs);
        }
    }
    json_decref(known);
    return echo;
}

static int append_json(const char *text, size_t n, void *out)
{
    cm_bytes_append(out, text, n);
    return 0;
}

static void dump_echo(const json_t *given, cm_bytes *out)
{
    json_t *echo = make_echo(given);
    json_dump_callback(echo, append_json, out, JSON_COMPACT | JSON_REAL_PRECISION(15));
    cm_bytes_consume(out, 1);
    json_decref(echo);
}

static void *responses_create(const json_t *given, const char *fingerprint, gw_emit_fn emit, void *ctx)
{
    gw_responses *writer = cm_alloc(sizeof(*writer));
    (void)fingerprint;
    *writer = (gw_responses){.stream = gw_request_streams(given),
                             .seals = gw_responses_includes(given, "reasoning.encrypted_content"),
                             .emit = emit,
                             .ctx = ctx,
                             .tools = json_incref(json_object_get(given, "tools"))};
    cm_bytes_init(&writer->out, 0);
    cm_bytes_init(&writer->echo, 0);
    cm_bytes_init(&writer->logprobs, 0);
    dump_echo(given, &writer->echo);
    return writer;
}

static void responses_destroy(void *ctx)
{
    gw_responses *writer = ctx;
    for (uint32_t i = 0; i < writer->parts.n; i++) {
        cm_bytes_fini(&writer->item[i].logprobs);
    }
    cm_free(writer->item);
    gw_parts_fini(&writer->parts);
    cm_bytes_fini(&writer->logprobs);
    cm_bytes_fini(&writer->out);
    json_decref(writer->tools);
    cm_bytes_fini(&writer->echo);
    cm_free(writer->id);
    cm_free(writer->model);
    cm_free(writer);
}

static void *responses_choice(void *writer, uint32_t choice)
{
    (void)choice; /* there is one */
    return writer;
}

/* ---- items ---- */

static void put_text(cm_bytes *out, const char *text)
{
    gw_json_string(out, text, strlen(text));
}

static void put_bytes(cm_bytes *out, const cm_bytes *bytes)
{
    gw_json_string(out, cm_bytes_text(bytes), bytes->len);
}

/* The newest part's item. A tool that the client does not have goes by the name that the model gave it. */
static void add_item(gw_responses *writer)
{
    uint32_t n = writer->parts.n;
    const gw_part *part = &writer->parts.part[n - 1];
    response_item item = {.tool.name = NULL};
    if (part->kind == MD_PIECE_CALL &&
        !gw_responses_find_tool(writer->tools, cm_bytes_text(&part->name), &item.tool)) {
        item.tool.name = cm_bytes_text(&part->name);
    }
    cm_bytes_init(&item.logprobs, 0);
    writer->item = cm_realloc(writer->item, n * sizeof(*writer->item));
    writer->item[n - 1] = item;
}

static void put_item_id(const gw_responses *writer, uint32_t item, cm_bytes *out)
{
    const gw_part *part = &writer->parts.part[item];
    const char *prefix = part->kind == MD_PIECE_REASONING    ? "rs_"
                         : part->kind == MD_PIECE_CONTENT    ? "msg_"
                         : writer->item[item].tool.is_custom ? "ctc_"
                                                             : "fc_";
    char id[GW_PART_ID_BYTES];
    gw_part_id(prefix, writer->id, item, id);
    put_text(out, id);
}

/* The text of a custom call: what the model gave as its one argument, else all that it wrote. */
static void put_custom_input(const gw_part *part, cm_bytes *out)
{
    json_t *object = json_loadb(cm_bytes_text(&part->text), part->text.len, JSON_ALLOW_NUL, NULL);
    const json_t *input = json_object_get(object, "input");
    if (json_is_string(input)) {
        gw_json_string(out, json_string_value(input), json_string_length(input));
    } else {
        put_bytes(out, &part->text);
    }
    json_decref(object);
}

static void put_call(const gw_responses *writer, uint32_t item, bool with_text, cm_bytes *out)
{
    const gw_part *part = &writer->parts.part[item];
    gw_responses_tool tool = writer->item[item].tool;
    char id[GW_PART_ID_BYTES];
    gw_part_id("call_", writer->id, item, id);
    cm_bytes_printf(out, ",\"call_id\":\"%s\",\"name\":", id);
    put_text(out, tool.name);
    if (tool.name_space != NULL) {
        cm_bytes_append_text(out, ",\"namespace\":");
        put_text(out, tool.name_space);
    }
    cm_bytes_append_text(out, tool.is_custom ? ",\"input\":" : ",\"arguments\":");
    if (!with_text) {
        cm_bytes_append_text(out, "\"\"");
    } else if (tool.is_custom) {
        put_custom_input(part, out);
    } else {
        put_bytes(out, &part->text);
    }
}

static void put_logprobs(const cm_bytes *logprobs, cm_bytes *out)
{
    cm_bytes_append_text(out, ",\"logprobs\":[");
    cm_bytes_append(out, cm_bytes_text(logprobs), logprobs->len);
    cm_bytes_append_text(out, "]");
}

/* An item's part of content; with_text: else it has just begun. */
static void put_content_part(const gw_responses *writer, uint32_t item, bool with_text, cm_bytes *out)
{
    const gw_part *part = &writer->parts.part[item];
    bool reasoning = part->kind == MD_PIECE_REASONING;
    cm_bytes_append_text(out, reasoning ? "{\"type\":\"reasoning_text\",\"text\":"
                                        : "{\"type\":\"output_text\",\"text\":");
    if (with_text) {
        put_bytes(out, &part->text);
    } else {
        cm_bytes_append_text(out, "\"\"");
    }
    if (!reasoning) {
        cm_bytes_append_text(out, ",\"annotations\":[]");
        put_logprobs(&writer->item[item].logprobs, out);
    }
    cm_bytes_append_text(out, "}");
}

static void put_content(const gw_responses *writer, uint32_t item, bool with_text, cm_bytes *out)
{
    const gw_part *part = &writer->parts.part[item];
    bool reasoning = part->kind == MD_PIECE_REASONING;
    cm_bytes_append_text(out, reasoning ? ",\"summary\":[],\"content\":["
                                        : ",\"role\":\"assistant\",\"content\":[");
    if (with_text) {
        put_content_part(writer, item, true, out);
    }
    cm_bytes_append_text(out, "]");
    if (reasoning && writer->seals && with_text) {
        cm_bytes_append_text(out, ",\"encrypted_content\":\"");
        gw_responses_seal(&part->text, out);
        cm_bytes_append_text(out, "\"");
    }
}

static const char *item_type(const gw_responses *writer, uint32_t item)
{
    const gw_part *part = &writer->parts.part[item];
    return part->kind == MD_PIECE_REASONING    ? "reasoning"
           : part->kind == MD_PIECE_CONTENT    ? "message"
           : writer->item[item].tool.is_custom ? "custom_tool_call"
                                               : "function_call";
}

/* with_text: what it has so far; else nothing, as it begins. */
static void put_item(const gw_responses *writer, uint32_t item, outcome status, bool with_text, cm_bytes *out)
{
    const gw_part *part = &writer->parts.part[item];
    cm_bytes_append_text(out, "{\"id\":");
    put_item_id(writer, item, out);
    cm_bytes_printf(out, ",\"type\":\"%s\",\"status\":\"%s\"", item_type(writer, item), STATUS[status]);
    if (part->kind == MD_PIECE_CALL) {
        put_call(writer, item, with_text, out);
    } else {
        put_content(writer, item, with_text, out);
    }
    cm_bytes_append_text(out, "}");
}

/* ---- the response object ---- */

static void put_usage(const gw_usage *usage, cm_bytes *out)
{
    if (usage == NULL) {
        cm_bytes_append_text(out, "null");
        return;
    }
    cm_bytes_printf(out,
                    "{\"input_tokens\":%u,\"input_tokens_details\":{\"cached_tokens\":%u},"
                    "\"output_tokens\":%u,\"output_tokens_details\":{\"reasoning_tokens\":%u},"
                    "\"total_tokens\":%llu}",
                    usage->prompt_tokens, usage->cached_tokens, usage->completion_tokens,
                    usage->reasoning_tokens,
                    (unsigned long long)usage->prompt_tokens + usage->completion_tokens);
}

static void put_error(const gw_error *error, cm_bytes *out)
{
    if (error == NULL) {
        cm_bytes_append_text(out, "null");
        return;
    }
    cm_bytes_printf(out, "{\"code\":\"%s\",\"message\":", gw_error_code(error));
    put_text(out, error->message);
    cm_bytes_append_text(out, "}");
}

/* The last item shares the response's fate; one before it was ended. */
static void put_output(const gw_responses *writer, outcome status, cm_bytes *out)
{
    outcome of_last = status == COMPLETED ? COMPLETED : INCOMPLETE;
    for (uint32_t i = 0; i < writer->parts.n && status != GOING_ON; i++) {
        cm_bytes_append_text(out, i > 0 ? "," : "");
        put_item(writer, i, i + 1 == writer->parts.n ? of_last : COMPLETED, true, out);
    }
}

static void put_response(const gw_responses *writer, outcome status, const gw_usage *usage,
                         const gw_error *error, cm_bytes *out)
{
    cm_bytes_append_text(out, "{\"id\":");
    put_text(out, writer->id);
    cm_bytes_printf(out, ",\"created_at\":%lld,\"status\":\"%s\",\"model\":", (long long)writer->created_s,
                    STATUS[status]);
    put_text(out, writer->model);
    cm_bytes_append_text(out, ",\"output\":[");
    put_output(writer, status, out);
    cm_bytes_append_text(out, "],\"usage\":");
    put_usage(usage, out);
    cm_bytes_append_text(out, ",\"error\":");
    put_error(error, out);
    cm_bytes_printf(out, ",\"incomplete_details\":%s,",
                    status == INCOMPLETE ? "{\"reason\":\"max_output_tokens\"}" : "null");
    cm_bytes_append(out, writer->echo.data, writer->echo.len);
}

/* ---- events ---- */

static void begin(gw_responses *writer, const char *type)
{
    cm_bytes_clear(&writer->out);
    cm_bytes_printf(&writer->out, "{\"type\":\"response.%s\",\"sequence_number\":%u", type,
                    writer->n_events++);
}

static void emit(gw_responses *writer, bool last)
{
    cm_bytes_append_text(&writer->out, "}");
    writer->emit(writer->ctx, 0, cm_bytes_text(&writer->out), writer->out.len, last);
}

static void emit_response(gw_responses *writer, const char *type, outcome status, const gw_usage *usage)
{
    begin(writer, type);
    cm_bytes_append_text(&writer->out, ",\"response\":");
    put_response(writer, status, usage, NULL, &writer->out);
    emit(writer, status != GOING_ON);
}

static uint32_t last_item(const gw_responses *writer)
{
    return writer->parts.n - 1;
}

/* An event about an item or, with content, about its one part of content. */
static void begin_about(gw_responses *writer, const char *type, uint32_t item, bool content)
{
    begin(writer, type);
    cm_bytes_append_text(&writer->out, ",\"item_id\":");
    put_item_id(writer, item, &writer->out);
    cm_bytes_printf(&writer->out, ",\"output_index\":%u%s", item, content ? ",\"content_index\":0" : "");
}

static void emit_item(gw_responses *writer, const char *type, uint32_t item, outcome status)
{
    begin(writer, type);
    cm_bytes_printf(&writer->out, ",\"output_index\":%u,\"item\":", item);
    put_item(writer, item, status, status != GOING_ON, &writer->out);
    emit(writer, false);
}

static void emit_part(gw_responses *writer, const char *type, uint32_t item, bool with_text)
{
    begin_about(writer, type, item, true);
    cm_bytes_append_text(&writer->out, ",\"part\":");
    put_content_part(writer, item, with_text, &writer->out);
    emit(writer, false);
}

static void open_item(gw_responses *writer)
{
    uint32_t item = last_item(writer);
    emit_item(writer, "output_item.added", item, GOING_ON);
    if (writer->parts.part[item].kind != MD_PIECE_CALL) {
        emit_part(writer, "content_part.added", item, false);
    }
}

static void emit_delta(gw_responses *writer, const md_piece *piece)
{
    const char *type = piece->kind == MD_PIECE_REASONING ? "reasoning_text.delta"
                       : piece->kind == MD_PIECE_CONTENT ? "output_text.delta"
                                                         : "function_call_arguments.delta";
    begin_about(writer, type, last_item(writer), piece->kind != MD_PIECE_ARGS);
    cm_bytes_append_text(&writer->out, ",\"delta\":");
    gw_json_string(&writer->out, piece->text, piece->n_bytes);
    if (piece->kind == MD_PIECE_CONTENT) {
        put_logprobs(&writer->logprobs, &writer->out);
    }
    emit(writer, false);
}

static void close_text(gw_responses *writer, uint32_t item)
{
    const gw_part *part = &writer->parts.part[item];
    bool reasoning = part->kind == MD_PIECE_REASONING;
    begin_about(writer, reasoning ? "reasoning_text.done" : "output_text.done", item, true);
    cm_bytes_append_text(&writer->out, ",\"text\":");
    put_bytes(&writer->out, &part->text);
    if (!reasoning) {
        put_logprobs(&writer->item[item].logprobs, &writer->out);
    }
    emit(writer, false);
    emit_part(writer, "content_part.done", item, true);
}

static void close_function(gw_responses *writer, uint32_t item)
{
    const gw_part *part = &writer->parts.part[item];
    begin_about(writer, "function_call_arguments.done", item, false);
    cm_bytes_append_text(&writer->out, ",\"name\":");
    put_text(&writer->out, writer->item[item].tool.name);
    cm_bytes_append_text(&writer->out, ",\"arguments\":");
    put_bytes(&writer->out, &part->text);
    emit(writer, false);
}

/* Its text is known when all of its arguments are. */
static void close_custom(gw_responses *writer, uint32_t item)
{
    static const char *const events[][2] = {{"custom_tool_call_input.delta", ",\"delta\":"},
                                            {"custom_tool_call_input.done", ",\"input\":"}};
    for (size_t i = 0; i < 2; i++) {
        begin_about(writer, events[i][0], item, false);
        cm_bytes_append_text(&writer->out, events[i][1]);
        put_custom_input(&writer->parts.part[item], &writer->out);
        emit(writer, false);
    }
}

static void close_item(gw_responses *writer, uint32_t item, outcome status)
{
    const gw_part *part = &writer->parts.part[item];
    if (part->kind != MD_PIECE_CALL) {
        close_text(writer, item);
    } else if (writer->item[item].tool.is_custom) {
        close_custom(writer, item);
    } else {
        close_function(writer, item);
    }
    emit_item(writer, "output_item.done", item, status);
}

static void responses_begin(void *ctx, const char *request_id, const char *model, int64_t created_s)
{
    gw_responses *writer = ctx;
    writer->id = cm_strdup(request_id);
    writer->model = cm_strdup(model);
    writer->created_s = created_s;
    if (writer->stream) {
        emit_response(writer, "created", GOING_ON, NULL);
        emit_response(writer, "in_progress", GOING_ON, NULL);
    }
}

static void responses_started(void *ctx, const gw_start *start)
{
    const gw_responses *writer = ctx;
    if (writer->id == NULL) {
        responses_begin(ctx, start->request_id, start->model, start->created_s);
    }
}

/* Reasoning has no place for them. */
static void responses_logprobs(void *ctx, const gw_logprobs *logprobs)
{
    gw_responses *writer = ctx;
    if (logprobs->kind != MD_PIECE_REASONING) {
        cm_bytes_append_text(&writer->logprobs, writer->logprobs.len > 0 ? "," : "");
        gw_openai_logprobs_object(logprobs, &writer->logprobs);
    }
}

/* Those of a message's text become its own; those of a call's are nobody's. */
static void take_logprobs(gw_responses *writer, const md_piece *piece)
{
    cm_bytes *of_item = &writer->item[last_item(writer)].logprobs;
    if (piece->kind == MD_PIECE_CONTENT && writer->logprobs.len > 0) {
        cm_bytes_append_text(of_item, of_item->len > 0 ? "," : "");
        cm_bytes_append(of_item, writer->logprobs.data, writer->logprobs.len);
    }
}

/* What its client hears of a piece. */
static void tell_piece(gw_responses *writer, const md_piece *piece, bool fresh)
{
    if (fresh && writer->parts.n > 1) {
        close_item(writer, last_item(writer) - 1, COMPLETED);
    }
    if (fresh) {
        open_item(writer);
    }
    bool waits = writer->item[last_item(writer)].tool.is_custom;
    if (piece->kind != MD_PIECE_CALL && !waits) {
        emit_delta(writer, piece);
    }
}

static void responses_piece(void *ctx, const md_piece *piece)
{
    gw_responses *writer = ctx;
    bool fresh = gw_parts_add(&writer->parts, piece);
    if (fresh) {
        add_item(writer);
    }
    if (writer->stream) {
        tell_piece(writer, piece, fresh);
    }
    take_logprobs(writer, piece);
    cm_bytes_clear(&writer->logprobs);
}

static void responses_finished(void *ctx, const gw_finish *finish)
{
    gw_responses *writer = ctx;
    outcome status = finish->reason == GW_REASON_LENGTH ? INCOMPLETE : COMPLETED;
    if (!writer->stream) {
        gw_parts_mend(&writer->parts, finish->parser);
        cm_bytes_clear(&writer->out);
        put_response(writer, status, &finish->usage, NULL, &writer->out);
        writer->emit(writer->ctx, 0, cm_bytes_text(&writer->out), writer->out.len, true);
        return;
    }
    if (writer->parts.n > 0) {
        close_item(writer, last_item(writer), status);
    }
    emit_response(writer, STATUS[status], status, &finish->usage);
}

static const gw_stream_events *responses_events(void)
{
    static const gw_stream_events events = {
        .started = responses_started,
        .piece = responses_piece,
        .logprobs = responses_logprobs,
        .finished = responses_finished,
    };
    return &events;
}

/* It takes no number of its own: how many there are depends on the clock. */
static void responses_keep_alive(const void *ctx, cm_bytes *out)
{
    const gw_responses *writer = ctx;
    cm_bytes_printf(
        out, "{\"type\":\"response.in_progress\",\"sequence_number\":%u,\"response\":", writer->n_events - 1);
    put_response(writer, GOING_ON, NULL, NULL, out);
    cm_bytes_append_text(out, "}");
}

static void responses_failure(const void *ctx, const gw_error *error, cm_bytes *out)
{
    const gw_responses *writer = ctx;
    if (!writer->stream) {
        gw_openai_error(error, out);
        return;
    }
    cm_bytes_printf(out,
                    "{\"type\":\"response.failed\",\"sequence_number\":%u,\"response\":", writer->n_events);
    put_response(writer, FAILED, NULL, error, out);
    cm_bytes_append_text(out, "}");
}

static void responses_error(const gw_error *error, const char *request_id, cm_bytes *out)
{
    (void)request_id;
    gw_openai_error(error, out);
}

const gw_surface gw_surface_responses = {
    .name = "http responses",
    .kind = GW_ASK_CHAT,
    .id_prefix = "resp_",
    .named_events = true,
    .fields = gw_responses_fields,
    .body = gw_responses_body,
    .error = responses_error,
    .writer = {.create = responses_create,
               .destroy = responses_destroy,
               .choice = responses_choice,
               .events = responses_events,
               .begin = responses_begin,
               .keep_alive = responses_keep_alive,
               .failure = responses_failure},
};
