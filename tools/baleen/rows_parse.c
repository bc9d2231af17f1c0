#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "tools/baleen/rows.h"

/* ---- results ---- */

void row_result_fini(row_result *result)
{
    cm_bytes_fini(&result->reasoning);
    cm_bytes_fini(&result->content);
    for (uint32_t i = 0; i < result->n_calls; i++) {
        cm_bytes_fini(&result->calls[i].name);
        cm_bytes_fini(&result->calls[i].args);
    }
    cm_free(result->calls);
    *result = (row_result){0};
}

static void result_call(row_result *result, const md_piece *piece)
{
    CM_ASSERT(piece->call == result->n_calls);
    result->calls = cm_realloc(result->calls, sizeof(row_call) * (result->n_calls + 1));
    row_call *call = &result->calls[result->n_calls++];
    cm_bytes_init(&call->name, 0);
    cm_bytes_init(&call->args, 0);
    cm_bytes_append(&call->name, piece->text, piece->n_bytes);
}

void row_collect(void *into, const md_piece *piece)
{
    row_result *result = into;
    switch (piece->kind) {
    case MD_PIECE_REASONING:
        cm_bytes_append(&result->reasoning, piece->text, piece->n_bytes);
        break;
    case MD_PIECE_CONTENT:
        cm_bytes_append(&result->content, piece->text, piece->n_bytes);
        break;
    case MD_PIECE_CALL:
        result_call(result, piece);
        break;
    case MD_PIECE_ARGS:
        CM_ASSERT(piece->call + 1 == result->n_calls);
        cm_bytes_append(&result->calls[piece->call].args, piece->text, piece->n_bytes);
        break;
    }
}

/* ---- rows ---- */

static cm_status row_flag(const json_t *row, const char *key, bool *flag_out, cm_error *err)
{
    const json_t *value = json_object_get(row, key);
    if (value != NULL && !json_is_boolean(value)) {
        return cm_error_set(err, CM_E_INVALID, key, "%s must be true or false", key);
    }
    *flag_out = json_is_true(value);
    return CM_OK;
}

static cm_status check_stop(const json_t *stop, cm_error *err)
{
    size_t i;
    json_t *value;
    if (stop != NULL && !json_is_array(stop)) {
        return cm_error_set(err, CM_E_INVALID, "stop", "stop must be a list of strings");
    }
    json_array_foreach(stop, i, value)
    {
        if (!json_is_string(value)) {
            return cm_error_set(err, CM_E_INVALID, "stop", "stop[%zu] is not a string", i);
        }
    }
    return CM_OK;
}

cm_status row_parser(const json_t *row, md_parser **parser_out, cm_error *err)
{
    const char *start = json_string_value(json_object_get(row, "start"));
    const json_t *stop = json_object_get(row, "stop");
    md_parser_options options = {.n_stop = json_array_size(stop)};
    if (start == NULL || (strcmp(start, "reasoning") != 0 && strcmp(start, "content") != 0)) {
        return cm_error_set(err, CM_E_INVALID, "start", "start must be reasoning or content");
    }
    options.start_in_reasoning = strcmp(start, "reasoning") == 0;
    CM_TRY(row_flag(row, "tools", &options.tools, err));
    CM_TRY(row_flag(row, "prefix", &options.continues_prefix, err));
    CM_TRY(check_stop(stop, err));
    const char **stops = cm_alloc(sizeof(char *) * options.n_stop);
    for (size_t i = 0; i < options.n_stop; i++) {
        stops[i] = json_string_value(json_array_get(stop, i));
    }
    options.stop = stops;
    *parser_out = md_parser_create(&options);
    cm_free(stops);
    return CM_OK;
}

const char *row_finish_reason(const json_t *row, const md_parser *parser)
{
    const char *engine = json_string_value(json_object_get(row, "engine"));
    if (engine != NULL && strcmp(engine, "length") == 0) {
        return "length";
    }
    return md_parser_calls(parser) > 0 ? "tool_calls" : "stop";
}

static json_t *bytes_json(const cm_bytes *bytes)
{
    return json_stringn(cm_bytes_text(bytes), bytes->len);
}

static json_t *call_json(const row_call *call, const md_parser *parser, uint32_t i)
{
    size_t n;
    const char *arguments = md_parser_call_args(parser, i, &n);
    json_t *object =
        json_pack("{s:o, s:o}", "name", bytes_json(&call->name), "arguments", json_stringn(arguments, n));
    if (n != call->args.len || memcmp(arguments, cm_bytes_text(&call->args), n) != 0) {
        json_object_set_new(object, "stream_arguments", bytes_json(&call->args));
    }
    return object;
}

static json_t *result_json(const json_t *row, const row_result *result, const md_parser *parser)
{
    json_t *calls = json_array();
    CM_ASSERT(md_parser_calls(parser) == result->n_calls);
    for (uint32_t i = 0; i < result->n_calls; i++) {
        json_array_append_new(calls, call_json(&result->calls[i], parser, i));
    }
    json_t *answer = json_pack("{s:o, s:o, s:o, s:s}", "reasoning_content", bytes_json(&result->reasoning),
                               "content", bytes_json(&result->content), "tool_calls", calls, "finish_reason",
                               row_finish_reason(row, parser));
    const char *stop = md_parser_stop_match(parser);
    if (stop != NULL) {
        json_object_set_new(answer, "stop", json_string(stop));
    }
    return answer;
}

cm_status row_parse(const json_t *row, size_t first_bytes, size_t step_bytes, json_t **answer_out,
                    cm_error *err)
{
    const json_t *value = json_object_get(row, "text");
    const char *text = json_string_value(value);
    size_t n = json_string_length(value);
    row_result result = {0};
    md_parser *parser;
    if (text == NULL) {
        return cm_error_set(err, CM_E_INVALID, "text", "text must be a string");
    }
    CM_TRY(row_parser(row, &parser, err));
    for (size_t at = 0, piece = first_bytes; at < n; at += piece, piece = step_bytes) {
        piece = piece < n - at ? piece : n - at;
        md_parser_push_text(parser, text + at, piece, row_collect, &result);
    }
    md_parser_finish(parser, row_collect, &result);
    *answer_out = result_json(row, &result, parser);
    md_parser_destroy(parser);
    row_result_fini(&result);
    return CM_OK;
}
