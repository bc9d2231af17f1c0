/* The shape of messages, held against encoding section 4 once, in front of everything that walks them. */
#include <stdio.h>
#include <string.h>

#include "common/model/chat_private.h"

static const char *const ROLE_NAME[MD_ROLE_COUNT] = {
    [MD_ROLE_SYSTEM] = "system",       [MD_ROLE_USER] = "user", [MD_ROLE_DEVELOPER] = "developer",
    [MD_ROLE_ASSISTANT] = "assistant", [MD_ROLE_TOOL] = "tool", [MD_ROLE_REMINDER] = "latest_reminder",
};

md_role md_message_role(const json_t *message)
{
    const char *name = json_string_value(json_object_get(message, "role"));
    md_role role = 0;
    while (name != NULL && role < MD_ROLE_COUNT && strcmp(name, ROLE_NAME[role]) != 0) {
        role++;
    }
    return name != NULL ? role : MD_ROLE_COUNT;
}

md_control md_task_control(const char *task)
{
    static const struct {
        const char *task;
        md_control control;
    } known[] = {
        {"action", MD_CTL_ACTION}, {"query", MD_CTL_QUERY}, {"authority", MD_CTL_AUTHORITY},
        {"domain", MD_CTL_DOMAIN}, {"title", MD_CTL_TITLE}, {"read_url", MD_CTL_READ_URL},
    };
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (strcmp(task, known[i].task) == 0) {
            return known[i].control;
        }
    }
    return MD_CTL_COUNT;
}

/* Fills err for messages[i].key. */
static cm_status refuse(cm_error *err, size_t i, const char *key, const char *why)
{
    char field[96];
    snprintf(field, sizeof(field), "messages[%zu]%s%s", i, key[0] != 0 ? "." : "", key);
    return cm_error_set(err, CM_E_INVALID, field, "%s %s", field, why);
}

static bool absent(const json_t *value)
{
    return value == NULL || json_is_null(value);
}

static cm_status check_part(const json_t *part, size_t i, md_role role, cm_error *err)
{
    const char *type = json_string_value(json_object_get(part, "type"));
    if (type == NULL) {
        return refuse(err, i, "content", "has a part without a type");
    }
    if (strcmp(type, "text") == 0) {
        return json_is_string(json_object_get(part, "text"))
                   ? CM_OK
                   : refuse(err, i, "content", "has a text part without text");
    }
    if (role != MD_ROLE_TOOL) {
        char why[128];
        snprintf(why, sizeof(why), "has a part of type %.40s: this is a text-only model", type);
        return refuse(err, i, "content", why);
    }
    return CM_OK;
}

static cm_status check_content(const json_t *message, size_t i, md_role role, cm_error *err)
{
    const json_t *content = json_object_get(message, "content");
    if (absent(content)) {
        bool may = role == MD_ROLE_SYSTEM || role == MD_ROLE_ASSISTANT || role == MD_ROLE_TOOL;
        return may ? CM_OK : refuse(err, i, "content", "is missing");
    }
    if (!json_is_string(content) && !json_is_array(content)) {
        return refuse(err, i, "content", "must be a string or a list of parts");
    }
    size_t k;
    json_t *part;
    json_array_foreach(content, k, part)
    {
        CM_TRY(check_part(part, i, role, err));
    }
    if (role == MD_ROLE_DEVELOPER && json_string_length(content) == 0 && json_array_size(content) == 0) {
        return refuse(err, i, "content", "is empty: an empty developer message has no rendering");
    }
    return CM_OK;
}

static cm_status check_tool_calls(const json_t *message, size_t i, cm_error *err)
{
    const json_t *calls = json_object_get(message, "tool_calls");
    if (absent(calls)) {
        return CM_OK;
    }
    if (!json_is_array(calls)) {
        return refuse(err, i, "tool_calls", "must be a list");
    }
    size_t k;
    json_t *call;
    json_array_foreach(calls, k, call)
    {
        const json_t *function = json_object_get(call, "function");
        const json_t *arguments = json_object_get(function, "arguments");
        if (!json_is_string(json_object_get(function, "name"))) {
            return refuse(err, i, "tool_calls", "has a call without function.name");
        }
        if (!absent(arguments) && !json_is_string(arguments) && !json_is_object(arguments)) {
            return refuse(err, i, "tool_calls", "has a call whose arguments are not a string");
        }
    }
    return CM_OK;
}

static cm_status check_tools(const json_t *message, size_t i, cm_error *err)
{
    const json_t *tools = json_object_get(message, "tools");
    if (!absent(tools) && !json_is_array(tools)) {
        return refuse(err, i, "tools", "must be a list");
    }
    size_t k;
    json_t *tool;
    json_array_foreach(tools, k, tool)
    {
        if (!json_is_object(json_object_get(tool, "function"))) {
            return refuse(err, i, "tools", "has a tool without a function object");
        }
    }
    return CM_OK;
}

static cm_status check_message(const json_t *message, size_t i, bool request, cm_error *err)
{
    if (!json_is_object(message)) {
        return refuse(err, i, "", "is not an object");
    }
    md_role role = md_message_role(message);
    if (role == MD_ROLE_COUNT) {
        return refuse(err, i, "role", "must be system, developer, user, assistant, tool or latest_reminder");
    }
    const json_t *reasoning = json_object_get(message, "reasoning_content");
    if (!absent(reasoning) && !json_is_string(reasoning)) {
        return refuse(err, i, "reasoning_content", "must be a string");
    }
    const json_t *task = json_object_get(message, "task");
    if (!absent(task) &&
        (!json_is_string(task) || md_task_control(json_string_value(task)) == MD_CTL_COUNT)) {
        return refuse(err, i, "task", "must be action, query, authority, domain, title or read_url");
    }
    bool system = request && role == MD_ROLE_DEVELOPER;
    CM_TRY(check_content(message, i, system ? MD_ROLE_SYSTEM : role, err));
    CM_TRY(check_tool_calls(message, i, err));
    return check_tools(message, i, err);
}

cm_status md_messages_check(const json_t *messages, bool request, cm_error *err)
{
    if (!json_is_array(messages) || json_array_size(messages) == 0) {
        return cm_error_set(err, CM_E_INVALID, "messages", "messages must be a list of at least one message");
    }
    size_t i;
    json_t *message;
    json_array_foreach(messages, i, message)
    {
        CM_TRY(check_message(message, i, request, err));
    }
    return CM_OK;
}
