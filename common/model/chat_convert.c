/* Bodies of the Anthropic Messages and the OpenAI Responses interface to the body of a chat request: only
 * what the prompt depends on. */
#include <stdio.h>
#include <string.h>

#include "common/model/chat_private.h"

static bool absent(const json_t *value)
{
    return value == NULL || json_is_null(value);
}

static const char *type_of(const json_t *object)
{
    const char *type = json_string_value(json_object_get(object, "type"));
    return type != NULL ? type : "";
}

static bool is_type(const json_t *object, const char *type)
{
    return strcmp(type_of(object), type) == 0;
}

static void set_shared(json_t *to, const char *key, json_t *value)
{
    if (!absent(value)) {
        json_object_set(to, key, value);
    }
}

static json_t *add_message(json_t *messages, const char *role)
{
    json_t *message = json_pack("{s:s}", "role", role);
    json_array_append_new(messages, message);
    return message;
}

/* key of message += separator (if something is there) + text. */
static void append_text(json_t *message, const char *key, const char *separator, const json_t *text)
{
    const json_t *before = json_object_get(message, key);
    cm_bytes joined;
    cm_bytes_init(&joined, 0);
    if (before != NULL) {
        cm_bytes_append(&joined, json_string_value(before), json_string_length(before));
        cm_bytes_append_text(&joined, separator);
    }
    cm_bytes_append(&joined, json_string_value(text), json_string_length(text));
    json_object_set_new(message, key, json_stringn(cm_bytes_text(&joined), joined.len));
    cm_bytes_fini(&joined);
}

static void add_call(json_t *message, json_t *id, json_t *name, json_t *arguments)
{
    json_t *calls = json_object_get(message, "tool_calls");
    if (calls == NULL) {
        calls = json_array();
        json_object_set_new(message, "tool_calls", calls);
    }
    json_t *function = json_object(), *call = json_pack("{s:s}", "type", "function");
    set_shared(call, "id", id);
    json_object_set(function, "name", name);
    set_shared(function, "arguments", arguments);
    json_object_set_new(call, "function", function);
    json_array_append_new(calls, call);
}

/* ---- Anthropic Messages ---- */

static cm_status user_block(json_t *messages, json_t *block, size_t i, cm_error *err)
{
    if (is_type(block, "text")) {
        set_shared(add_message(messages, "user"), "content", json_object_get(block, "text"));
        return CM_OK;
    }
    if (is_type(block, "tool_result")) {
        json_t *message = add_message(messages, "tool");
        set_shared(message, "tool_call_id", json_object_get(block, "tool_use_id"));
        set_shared(message, "content", json_object_get(block, "content"));
        return CM_OK;
    }
    return cm_error_set(err, CM_E_INVALID, "messages",
                        "messages[%zu].content has a block of type %.40s: this is a "
                        "text-only model",
                        i, type_of(block));
}

static cm_status assistant_block(json_t *message, json_t *block, size_t i, cm_error *err)
{
    if (is_type(block, "text") && json_is_string(json_object_get(block, "text"))) {
        append_text(message, "content", "\n\n", json_object_get(block, "text"));
        return CM_OK;
    }
    if (is_type(block, "thinking") && json_is_string(json_object_get(block, "thinking"))) {
        append_text(message, "reasoning_content", "", json_object_get(block, "thinking"));
        return CM_OK;
    }
    if (is_type(block, "redacted_thinking")) {
        return CM_OK; /* sealed for its author: nothing we could show the model */
    }
    if (is_type(block, "tool_use") && json_is_string(json_object_get(block, "name"))) {
        add_call(message, json_object_get(block, "id"), json_object_get(block, "name"),
                 json_object_get(block, "input"));
        return CM_OK;
    }
    return cm_error_set(err, CM_E_INVALID, "messages",
                        "messages[%zu].content has a block of type %.40s that is "
                        "unknown or not complete",
                        i, type_of(block));
}

static cm_status anthropic_message(json_t *messages, const json_t *from, size_t i, cm_error *err)
{
    const char *role = json_string_value(json_object_get(from, "role"));
    json_t *content = json_object_get(from, "content");
    if (role == NULL || (!json_is_string(content) && !json_is_array(content))) {
        return cm_error_set(err, CM_E_INVALID, "messages", "messages[%zu] needs a role and content", i);
    }
    bool assistant = strcmp(role, "assistant") == 0, system = strcmp(role, "system") == 0;
    if (!assistant && !system && strcmp(role, "user") != 0 && strcmp(role, "ctx") != 0 &&
        strcmp(role, "msg") != 0) {
        return cm_error_set(err, CM_E_INVALID, "messages", "messages[%zu].role must be user or assistant", i);
    }
    if (json_is_string(content) || system) {
        json_t *message = add_message(messages, assistant ? "assistant" : system ? "system" : "user");
        set_shared(message, "content", content);
        return CM_OK;
    }
    json_t *message = assistant ? add_message(messages, "assistant") : NULL, *block;
    size_t k;
    json_array_foreach(content, k, block)
    {
        CM_TRY(assistant ? assistant_block(message, block, i, err) : user_block(messages, block, i, err));
    }
    return CM_OK;
}

static cm_status anthropic_tools(json_t *to, const json_t *body, cm_error *err)
{
    const json_t *tools = json_object_get(body, "tools");
    if (absent(tools)) {
        return CM_OK;
    }
    json_t *functions = json_array(), *tool;
    json_object_set_new(to, "tools", functions);
    size_t i;
    json_array_foreach(tools, i, tool)
    {
        json_t *function = json_object();
        json_array_append_new(functions, json_pack("{s:s, s:o}", "type", "function", "function", function));
        if (!json_is_string(json_object_get(tool, "name")) || absent(json_object_get(tool, "input_schema"))) {
            return cm_error_set(err, CM_E_INVALID, "tools", "tools[%zu] needs a name and an input_schema", i);
        }
        set_shared(function, "name", json_object_get(tool, "name"));
        set_shared(function, "description", json_object_get(tool, "description"));
        set_shared(function, "parameters", json_object_get(tool, "input_schema"));
    }
    return CM_OK;
}

static void anthropic_options(json_t *to, const json_t *body)
{
    const json_t *thinking = json_object_get(body, "thinking");
    const json_t *output = json_object_get(body, "output_config");
    const json_t *format = json_object_get(output, "format");
    if (!absent(thinking)) {
        /* "adaptive" leaves it to the model: that is thinking on */
        json_object_set_new(
            to, "thinking",
            json_pack("{s:s}", "type", is_type(thinking, "disabled") ? "disabled" : "enabled"));
    }
    set_shared(to, "reasoning_effort", json_object_get(output, "effort"));
    if (is_type(json_object_get(body, "tool_choice"), "none")) {
        json_object_set_new(to, "tool_choice", json_string("none"));
    }
    if (is_type(format, "json_schema")) {
        json_object_set_new(to, "response_format",
                            json_pack("{s:s, s:{s:O?}}", "type", "json_schema", "json_schema", "schema",
                                      json_object_get(format, "schema")));
    }
}

/* Fills to with the chat body. */
static cm_status anthropic_body(json_t *to, const json_t *body, cm_error *err)
{
    json_t *messages = json_array(), *message;
    json_object_set_new(to, "messages", messages);
    json_t *system = json_object_get(body, "system");
    if (!absent(system)) {
        set_shared(add_message(messages, "system"), "content", system);
    }
    size_t i;
    json_array_foreach(json_object_get(body, "messages"), i, message)
    {
        CM_TRY(anthropic_message(messages, message, i, err));
    }
    /* an assistant at the end is to be continued there */
    message = json_array_get(messages, json_array_size(messages) - 1);
    if (message != NULL && md_message_role(message) == MD_ROLE_ASSISTANT) {
        json_object_set_new(message, "prefix", json_true());
    }
    anthropic_options(to, body);
    return anthropic_tools(to, body, err);
}

/* ---- OpenAI Responses ---- */

/* Parts of a Responses message to parts of a chat message. */
static json_t *chat_parts(const json_t *content)
{
    json_t *parts = json_array(), *part;
    size_t i;
    json_array_foreach(content, i, part)
    {
        json_t *copy = json_copy(part);
        if (is_type(part, "input_text") || is_type(part, "output_text")) {
            json_object_set_new(copy, "type", json_string("text"));
        }
        json_array_append_new(parts, copy);
    }
    return parts;
}

static void set_content(json_t *message, json_t *content)
{
    if (json_is_array(content)) {
        json_object_set_new(message, "content", chat_parts(content));
    } else {
        set_shared(message, "content", content);
    }
}

/* What a reasoning item says: its own text, else its summary. */
static void read_reasoning(json_t *pending, const json_t *item)
{
    const json_t *texts = json_object_get(item, "content");
    if (json_array_size(texts) == 0) {
        texts = json_object_get(item, "summary");
    }
    size_t i;
    json_t *part;
    json_array_foreach(texts, i, part)
    {
        if (json_is_string(json_object_get(part, "text"))) {
            append_text(pending, "reasoning_content", "\n\n", json_object_get(part, "text"));
        }
    }
}

/* Reasoning belongs to the assistant's message that follows it. */
static void attach_reasoning(json_t *message, json_t *pending)
{
    set_shared(message, "reasoning_content", json_object_get(pending, "reasoning_content"));
    json_object_clear(pending);
}

/* A call joins the assistant message right before it. */
static void function_call(json_t *messages, json_t *pending, json_t *item)
{
    json_t *last = json_array_get(messages, json_array_size(messages) - 1);
    bool joins = last != NULL && md_message_role(last) == MD_ROLE_ASSISTANT && json_object_size(pending) == 0;
    if (!joins) {
        last = add_message(messages, "assistant");
        attach_reasoning(last, pending);
    }
    add_call(last, json_object_get(item, "call_id"), json_object_get(item, "name"),
             json_object_get(item, "arguments"));
}

static cm_status responses_item(json_t *messages, json_t *pending, json_t *item, size_t i, cm_error *err)
{
    const char *type = type_of(item), *role = json_string_value(json_object_get(item, "role"));
    if ((type[0] == 0 || strcmp(type, "message") == 0) && role != NULL) {
        json_t *message = add_message(messages, role);
        set_content(message, json_object_get(item, "content"));
        if (strcmp(role, "assistant") == 0) {
            attach_reasoning(message, pending);
        } else if (strcmp(role, "user") == 0) {
            json_object_clear(pending); /* the turn was cut off: what it thought is not the next one's */
        }
    } else if (strcmp(type, "reasoning") == 0) {
        read_reasoning(pending, item);
    } else if (strcmp(type, "function_call") == 0 && json_is_string(json_object_get(item, "name"))) {
        function_call(messages, pending, item);
    } else if (strcmp(type, "function_call_output") == 0) {
        json_t *message = add_message(messages, "tool");
        set_shared(message, "tool_call_id", json_object_get(item, "call_id"));
        set_content(message, json_object_get(item, "output"));
    } else {
        return cm_error_set(err, CM_E_INVALID, "input", "input[%zu] of type %.40s is unknown or not complete",
                            i, type);
    }
    return CM_OK;
}

static cm_status responses_input(json_t *messages, const json_t *input, cm_error *err)
{
    if (json_is_string(input)) {
        json_object_set(add_message(messages, "user"), "content", (json_t *)input);
        return CM_OK;
    }
    json_t *pending = json_object(), *item;
    cm_status status = CM_OK;
    size_t i;
    json_array_foreach(input, i, item)
    {
        status = responses_item(messages, pending, item, i, err);
        if (status != CM_OK) {
            break;
        }
    }
    json_decref(pending);
    return status;
}

/* Tools are shown with their keys as given, less the type. */
static cm_status responses_tools(json_t *to, const json_t *body, cm_error *err)
{
    const json_t *tools = json_object_get(body, "tools");
    if (absent(tools)) {
        return CM_OK;
    }
    json_t *functions = json_array(), *tool;
    json_object_set_new(to, "tools", functions);
    size_t i;
    json_array_foreach(tools, i, tool)
    {
        if (!is_type(tool, "function")) {
            return cm_error_set(err, CM_E_INVALID, "tools",
                                "tools[%zu] is of type %.40s, only function is supported", i, type_of(tool));
        }
        json_t *function = json_copy(tool);
        json_object_del(function, "type");
        json_array_append_new(functions, json_pack("{s:s, s:o}", "type", "function", "function", function));
    }
    return CM_OK;
}

static cm_status responses_body(json_t *to, const json_t *body, cm_error *err)
{
    json_t *messages = json_array();
    json_object_set_new(to, "messages", messages);
    json_t *instructions = json_object_get(body, "instructions");
    const json_t *format = json_object_get(json_object_get(body, "text"), "format");
    if (!absent(instructions)) {
        json_object_set(add_message(messages, "system"), "content", instructions);
    }
    CM_TRY(responses_input(messages, json_object_get(body, "input"), err));
    set_shared(to, "thinking", json_object_get(body, "thinking"));
    set_shared(to, "reasoning_effort", json_object_get(json_object_get(body, "reasoning"), "effort"));
    set_shared(to, "tool_choice", json_object_get(body, "tool_choice"));
    if (is_type(format, "json_schema")) {
        json_object_set_new(to, "response_format",
                            json_pack("{s:s, s:{s:O?}}", "type", "json_schema", "json_schema", "schema",
                                      json_object_get(format, "schema")));
    }
    return responses_tools(to, body, err);
}

/* ---- both ---- */

cm_status md_chat_body_convert(md_surface surface, const json_t *body, json_t **body_out, cm_error *err)
{
    json_t *to = json_object();
    cm_status status =
        surface == MD_SURFACE_ANTHROPIC ? anthropic_body(to, body, err) : responses_body(to, body, err);
    if (status != CM_OK) {
        json_decref(to);
        return status;
    }
    *body_out = to;
    return CM_OK;
}
