#include "gateway/anthropic_body.h"

#include <stdio.h>
#include <string.h>

#include "common/model/chat.h"

const gw_surface_field gw_anthropic_fields[] = {
    {"stream", "stream", true},
    {"stream_options", "stream_options", true},
    {"max_tokens", "max_tokens", true},
    {"min_tokens", "min_tokens", true},
    {"ignore_eos", "ignore_eos", true},
    {"temperature", "temperature", true},
    {"top_p", "top_p", true},
    {"top_k", "top_k", true},
    {"min_p", "min_p", true},
    {"seed", "seed", true},
    {"presence_penalty", "presence_penalty", true},
    {"frequency_penalty", "frequency_penalty", true},
    {"repetition_penalty", "repetition_penalty", true},
    {"logit_bias", "logit_bias", true},
    {"stop", "stop_sequences", true},
    {"stop_token_ids", "stop_token_ids", true},
    {"reasoning_effort", "output_config.effort", false},
    {"response_format", "output_config.format", false},
    {NULL, NULL, false},
};

static bool absent(const json_t *value)
{
    return value == NULL || json_is_null(value);
}

static bool is_type(const json_t *object, const char *type)
{
    const char *own = json_string_value(json_object_get(object, "type"));
    return own != NULL && strcmp(own, type) == 0;
}

static cm_status refuse(gw_error *error, const char *param, const char *what)
{
    gw_error_set(error, GW_CAUSE_INVALID, param, "%s %s", param, what);
    return CM_E_INVALID;
}

/* ---- what the chat encoder would find too, but under another index ---- */

static cm_status check_text(const json_t *block, const char *where, gw_error *error)
{
    const char *type = json_string_value(json_object_get(block, "type"));
    if (type == NULL) {
        return refuse(error, where, "must be an object with a type");
    }
    if (strcmp(type, "text") == 0 && !json_is_string(json_object_get(block, "text"))) {
        return refuse(error, where, "is a text block without text");
    }
    return CM_OK;
}

/* A string or a list of blocks; what a tool gave may be nothing at all. */
static cm_status check_content(const json_t *content, const char *where, bool optional, gw_error *error)
{
    char at[96];
    size_t i;
    json_t *block;
    if (!json_is_string(content) && !json_is_array(content) && !(optional && absent(content))) {
        return refuse(error, where, "must be a string or a list of blocks");
    }
    json_array_foreach(content, i, block)
    {
        snprintf(at, sizeof(at), "%.70s[%zu]", where, i);
        CM_TRY(check_text(block, at, error));
    }
    return CM_OK;
}

/* What the system says is text. */
static cm_status check_system(const json_t *content, const char *where, bool optional, gw_error *error)
{
    char at[96];
    size_t i;
    json_t *block;
    CM_TRY(check_content(content, where, optional, error));
    json_array_foreach(content, i, block)
    {
        if (!is_type(block, "text")) {
            snprintf(at, sizeof(at), "%.70s[%zu]", where, i);
            return refuse(error, at, "is no text block: this is a text-only model");
        }
    }
    return CM_OK;
}

static cm_status check_block(const json_t *block, size_t i, size_t k, gw_error *error)
{
    char at[96];
    const json_t *input = json_object_get(block, "input");
    if (is_type(block, "tool_result")) {
        snprintf(at, sizeof(at), "messages[%zu].content[%zu].content", i, k);
        return check_content(json_object_get(block, "content"), at, true, error);
    }
    if (is_type(block, "tool_use") && !absent(input) && !json_is_object(input) && !json_is_string(input)) {
        snprintf(at, sizeof(at), "messages[%zu].content[%zu].input", i, k);
        return refuse(error, at, "must be an object");
    }
    return CM_OK;
}

static cm_status check_message(const json_t *message, size_t i, gw_error *error)
{
    char at[96];
    const char *role = json_string_value(json_object_get(message, "role"));
    const json_t *content = json_object_get(message, "content");
    size_t k;
    json_t *block;
    snprintf(at, sizeof(at), "messages[%zu].content", i);
    if (role != NULL && strcmp(role, "system") == 0) {
        return check_system(content, at, false, error);
    }
    CM_TRY(check_content(content, at, false, error));
    json_array_foreach(content, k, block)
    {
        CM_TRY(check_block(block, i, k, error));
    }
    return CM_OK;
}

static cm_status check_shape(const json_t *given, gw_error *error)
{
    const json_t *messages = json_object_get(given, "messages"), *tools = json_object_get(given, "tools");
    size_t i;
    json_t *message;
    if (json_array_size(messages) == 0) {
        return refuse(error, "messages", "must be a list of at least one message");
    }
    if (!absent(tools) && !json_is_array(tools)) {
        return refuse(error, "tools", "must be a list");
    }
    json_array_foreach(messages, i, message)
    {
        CM_TRY(check_message(message, i, error));
    }
    return check_system(json_object_get(given, "system"), "system", true, error);
}

/* ---- fields that need turning around ---- */

/* Clients name the models they were written for: all of them are the one served here. */
static void put_model(const json_t *given, json_t *body)
{
    json_t *model = json_object_get(given, "model");
    const char *name = json_string_value(model);
    if (!absent(model) && (name == NULL || strncmp(name, "claude", 6) != 0)) {
        json_object_set(body, "model", model);
    }
}

static cm_status put_tool_choice(const json_t *given, json_t *body, gw_error *error)
{
    const json_t *choice = json_object_get(given, "tool_choice");
    const char *type = json_string_value(json_object_get(choice, "type"));
    const json_t *name = json_object_get(choice, "name");
    if (absent(choice)) {
        return CM_OK;
    }
    if (json_is_true(json_object_get(choice, "disable_parallel_tool_use"))) {
        json_object_set_new(body, "parallel_tool_calls", json_false());
    }
    if (type != NULL && (strcmp(type, "auto") == 0 || strcmp(type, "none") == 0)) {
        json_object_set_new(body, "tool_choice", json_string(type));
    } else if (type != NULL && strcmp(type, "any") == 0) {
        json_object_set_new(body, "tool_choice", json_string("required"));
    } else if (type != NULL && strcmp(type, "tool") == 0 && json_is_string(name)) {
        json_object_set_new(body, "tool_choice",
                            json_pack("{s:s, s:{s:O}}", "type", "function", "function", "name", name));
    } else {
        return refuse(error, "tool_choice", "must have a type of auto, any or none, or of tool with a name");
    }
    return CM_OK;
}

static void put_user(const json_t *given, json_t *body)
{
    json_t *user = json_object_get(json_object_get(given, "metadata"), "user_id");
    if (json_is_string(user)) {
        json_object_set(body, "user_id", user);
    }
}

cm_status gw_anthropic_count_body(const json_t *given, json_t **body_out, gw_error *error_out)
{
    json_t *body;
    cm_error err = {0};
    CM_TRY(check_shape(given, error_out));
    cm_status status = md_chat_body_convert(MD_SURFACE_ANTHROPIC, given, &body, &err);
    if (status != CM_OK) {
        gw_error_set(error_out, GW_CAUSE_INVALID, err.field, "%s", err.text);
        return status;
    }
    status = put_tool_choice(given, body, error_out);
    if (status != CM_OK) {
        json_decref(body);
        return status;
    }
    put_model(given, body);
    put_user(given, body);
    gw_surface_copy(gw_anthropic_fields, given, body);
    *body_out = body;
    return CM_OK;
}

cm_status gw_anthropic_body(const json_t *given, json_t **body_out, gw_error *error_out)
{
    if (absent(json_object_get(given, "max_tokens"))) {
        return refuse(error_out, "max_tokens", "is missing: how many tokens may be generated");
    }
    return gw_anthropic_count_body(given, body_out, error_out);
}
