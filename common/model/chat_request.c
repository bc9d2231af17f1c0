/* The body of an OpenAI chat request to the encoder's messages and options. */
#include <string.h>

#include "common/model/chat_private.h"

static bool absent(const json_t *value)
{
    return value == NULL || json_is_null(value);
}

/* ---- mode and effort (5.1) ---- */

/* thinking.type decides; without it chat_template_kwargs may; the default is on. */
static cm_status read_thinking(const json_t *body, const json_t *kwargs, bool *thinking_out, cm_error *err)
{
    const json_t *thinking = json_object_get(body, "thinking");
    *thinking_out = true;
    if (!absent(thinking)) {
        const char *type = json_string_value(json_object_get(thinking, "type"));
        if (type == NULL || (strcmp(type, "enabled") != 0 && strcmp(type, "disabled") != 0)) {
            return cm_error_set(err, CM_E_INVALID, "thinking.type",
                                "thinking.type must be enabled or disabled");
        }
        *thinking_out = strcmp(type, "enabled") == 0;
        return CM_OK;
    }
    static const char *const keys[] = {"thinking", "enable_thinking"};
    for (size_t i = 0; i < 2; i++) {
        const json_t *value = json_object_get(kwargs, keys[i]);
        if (!absent(value) && !json_is_boolean(value)) {
            return cm_error_set(err, CM_E_INVALID, "chat_template_kwargs",
                                "chat_template_kwargs.%s must be a boolean", keys[i]);
        }
        *thinking_out &= !json_is_false(value);
    }
    return CM_OK;
}

static cm_status read_options(const json_t *body, md_profile profile, md_chat_options *options_out,
                              cm_error *err)
{
    const json_t *kwargs = json_object_get(body, "chat_template_kwargs");
    const json_t *effort = json_object_get(body, "reasoning_effort");
    *options_out = (md_chat_options){.profile = profile};
    if (!absent(kwargs) && !json_is_object(kwargs)) {
        return cm_error_set(err, CM_E_INVALID, "chat_template_kwargs",
                            "chat_template_kwargs must be an object");
    }
    options_out->drop_thinking = !json_is_false(json_object_get(kwargs, "drop_thinking"));
    CM_TRY(read_thinking(body, kwargs, &options_out->thinking, err));
    if (absent(effort)) {
        effort = json_object_get(kwargs, "reasoning_effort");
    }
    const char *word = json_string_value(effort);
    if ((!absent(effort) && word == NULL) ||
        md_effort_map(profile, word, &options_out->thinking, &options_out->effort) != CM_OK) {
        return cm_error_set(
            err, CM_E_INVALID, "reasoning_effort",
            "unknown effort%s%.40s: reasoning_effort must be none, minimal, low, medium, high, xhigh, "
            "max or ultra",
            word != NULL ? " " : "", word != NULL ? word : "");
    }
    return CM_OK;
}

/* ---- tools and response format ---- */

static cm_status check_tools(const json_t *tools, cm_error *err)
{
    if (!absent(tools) && !json_is_array(tools)) {
        return cm_error_set(err, CM_E_INVALID, "tools", "tools must be a list");
    }
    size_t i;
    json_t *tool;
    json_array_foreach(tools, i, tool)
    {
        const char *type = json_string_value(json_object_get(tool, "type"));
        if (type == NULL || strcmp(type, "function") != 0 ||
            !json_is_string(json_object_get(json_object_get(tool, "function"), "name"))) {
            return cm_error_set(err, CM_E_INVALID, "tools",
                                "tools[%zu] must be of type function, with function.name", i);
        }
    }
    return CM_OK;
}

/* The tools that the prompt shows: none when tool_choice forbids calls. */
static cm_status read_tools(const json_t *body, json_t **tools_out, cm_error *err)
{
    json_t *tools = json_object_get(body, "tools");
    CM_TRY(check_tools(tools, err));
    const char *choice = json_string_value(json_object_get(body, "tool_choice"));
    bool none = choice != NULL && strcmp(choice, "none") == 0;
    *tools_out = json_array_size(tools) > 0 && !none ? tools : NULL;
    return CM_OK;
}

/* The schema that the prompt shows; NULL but for json_schema. */
static cm_status read_format(const json_t *body, json_t **schema_out, cm_error *err)
{
    const json_t *format = json_object_get(body, "response_format");
    *schema_out = NULL;
    if (absent(format)) {
        return CM_OK;
    }
    const char *type = json_string_value(json_object_get(format, "type"));
    if (type != NULL && (strcmp(type, "text") == 0 || strcmp(type, "json_object") == 0)) {
        return CM_OK;
    }
    if (type == NULL || strcmp(type, "json_schema") != 0) {
        return cm_error_set(err, CM_E_INVALID, "response_format.type",
                            "response_format.type must be text, json_object or json_schema");
    }
    *schema_out = json_object_get(json_object_get(format, "json_schema"), "schema");
    if (absent(*schema_out)) {
        return cm_error_set(err, CM_E_INVALID, "response_format.json_schema", "json_schema has no schema");
    }
    return CM_OK;
}

/* ---- messages ---- */

/* A copy of one message in the encoder's terms: a developer of an API request speaks as the system, reasoning
 * has one name, and only what the encoder itself knows of tools and formats is put on it later. */
static json_t *copy_message(const json_t *message)
{
    json_t *copy = json_copy((json_t *)message);
    const json_t *reasoning = json_object_get(message, "reasoning");
    if (md_message_role(message) == MD_ROLE_DEVELOPER) {
        json_object_set_new(copy, "role", json_string("system"));
    }
    if (absent(json_object_get(message, "reasoning_content")) && json_is_string(reasoning)) {
        json_object_set(copy, "reasoning_content", (json_t *)reasoning);
    }
    json_object_del(copy, "tools");
    json_object_del(copy, "response_format");
    json_object_del(copy, "wo_eos");
    return copy;
}

/* The last message asks for an answer, or is an assistant's to be continued. */
static cm_status check_last(const json_t *messages, cm_error *err)
{
    size_t n = json_array_size(messages), i;
    json_t *message;
    json_array_foreach(messages, i, message)
    {
        if (json_is_true(json_object_get(message, "prefix")) &&
            (i + 1 < n || md_message_role(message) != MD_ROLE_ASSISTANT)) {
            return cm_error_set(err, CM_E_INVALID, "messages",
                                "messages[%zu].prefix: only a last message of the "
                                "assistant can be a prefix",
                                i);
        }
    }
    message = json_array_get(messages, n - 1);
    if (md_message_role(message) == MD_ROLE_ASSISTANT && !json_is_true(json_object_get(message, "prefix"))) {
        return cm_error_set(err, CM_E_INVALID, "messages",
                            "last message is from the assistant and not a prefix");
    }
    return CM_OK;
}

static json_t *insert_system(json_t *messages)
{
    json_array_insert_new(messages, 0, json_pack("{s:s, s:s}", "role", "system", "content", ""));
    return json_array_get(messages, 0);
}

static json_t *first_system(json_t *messages)
{
    size_t i;
    json_t *message;
    json_array_foreach(messages, i, message)
    {
        if (md_message_role(message) == MD_ROLE_SYSTEM) {
            return message;
        }
    }
    return insert_system(messages);
}

static json_t *build_messages(const json_t *messages, json_t *tools, json_t *schema)
{
    json_t *built = json_array();
    size_t i;
    json_t *message;
    json_array_foreach(messages, i, message)
    {
        json_array_append_new(built, copy_message(message));
    }
    json_t *last = json_array_get(built, json_array_size(built) - 1);
    if (md_message_role(last) == MD_ROLE_ASSISTANT) {
        json_object_set_new(last, "wo_eos", json_true());
    }
    if (tools != NULL) {
        json_t *first = json_array_get(built, 0);
        first = md_message_role(first) == MD_ROLE_SYSTEM ? first : insert_system(built);
        json_object_set(first, "tools", tools);
    }
    if (schema != NULL) {
        json_object_set(first_system(built), "response_format", schema);
    }
    return built;
}

cm_status md_chat_from_request(const json_t *body, md_profile profile, json_t **messages_out,
                               md_chat_options *options_out, cm_error *err)
{
    const json_t *messages = json_object_get(body, "messages");
    json_t *tools, *schema;
    md_chat_options options;
    CM_TRY(md_messages_check(messages, true, err));
    CM_TRY(check_last(messages, err));
    CM_TRY(read_options(body, profile, &options, err));
    CM_TRY(read_tools(body, &tools, err));
    CM_TRY(read_format(body, &schema, err));
    *options_out = options;
    *messages_out = build_messages(messages, tools, schema);
    return CM_OK;
}
