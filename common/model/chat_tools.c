#include <string.h>

#include "common/model/chat_private.h"
#include "common/model/json_private.h"

static const char TOOLS_BEFORE[] =
    "## Tools\n\nYou have access to a set of tools to help answer the user's question. You can invoke tools "
    "by writing "
    "a \"<｜DSML｜tool_calls>\" block like the following:\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke "
    "name=\"$TOOL_NAME\">\n<｜DSML｜parameter name=\"$PARAMETER_NAME\" "
    "string=\"true|false\">$PARAMETER_VALUE</｜DSML｜parameter>\n...\n</｜DSML｜invoke>\n<｜DSML｜invoke "
    "name=\"$TOOL_NAME2\">\n...\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>\n\nString parameters should be "
    "specified as "
    "is and set `string=\"true\"`. For all other types (numbers, booleans, arrays, objects), pass the value "
    "in JSON "
    "format and set `string=\"false\"`.\n\nIf thinking_mode is enabled (triggered by <think>), you MUST "
    "output your "
    "complete reasoning inside <think>...</think> BEFORE any tool calls or final response.\n\nOtherwise, "
    "output "
    "directly after </think> with tool calls or final response.\n\n### Available Tool Schemas\n\n";
static const char TOOLS_AFTER[] =
    "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n";
static const char FORMAT_BEFORE[] =
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n";

static void write_string(md_prompt *prompt, const json_t *text)
{
    md_prompt_text(prompt, json_string_value(text), json_string_length(text));
}

static void write_json(md_prompt *prompt, const json_t *value)
{
    cm_bytes text;
    cm_bytes_init(&text, 0);
    md_json_dumps(value, &text);
    md_prompt_text(prompt, cm_bytes_text(&text), text.len);
    cm_bytes_fini(&text);
}

void md_tools_write(md_prompt *prompt, const json_t *tools)
{
    md_prompt_template(prompt, TOOLS_BEFORE);
    size_t i;
    json_t *tool;
    json_array_foreach(tools, i, tool)
    {
        md_prompt_template(prompt, i > 0 ? "\n" : "");
        write_json(prompt, json_object_get(tool, "function"));
    }
    md_prompt_template(prompt, TOOLS_AFTER);
}

void md_response_format_write(md_prompt *prompt, const json_t *schema)
{
    md_prompt_template(prompt, FORMAT_BEFORE);
    write_json(prompt, schema);
}

/* ---- calls in an assistant message ---- */

static void write_parameter(md_prompt *prompt, const char *key, size_t n_key, bool string, const char *text,
                            size_t n)
{
    md_prompt_template(prompt, "<｜DSML｜parameter name=\"");
    md_prompt_text(prompt, key, n_key);
    md_prompt_template(prompt, string ? "\" string=\"true\">" : "\" string=\"false\">");
    md_prompt_text(prompt, text, n);
    md_prompt_template(prompt, "</｜DSML｜parameter>");
}

static void write_parameters(md_prompt *prompt, const json_t *arguments)
{
    const char *key, *separator = "";
    size_t n_key, n;
    json_t *value;
    cm_bytes text;
    cm_bytes_init(&text, 0);
    json_object_keylen_foreach((json_t *)arguments, key, n_key, value)
    {
        md_prompt_template(prompt, separator);
        separator = "\n";
        const char *string = md_json_string(value, &n);
        if (string != NULL) {
            write_parameter(prompt, key, n_key, true, string, n);
        } else {
            cm_bytes_clear(&text);
            md_json_dumps_read(value, &text);
            write_parameter(prompt, key, n_key, false, cm_bytes_text(&text), text.len);
        }
    }
    cm_bytes_fini(&text);
}

/* The object in a text; one that is encoded twice (a JSON string holding it) is unwrapped. NULL if there is
 * none. */
static json_t *read_arguments(const char *text, size_t n)
{
    json_t *value = md_json_read(text, n);
    size_t n_inner;
    const char *inner = md_json_string(value, &n_inner);
    if (inner != NULL) {
        json_t *unwrapped = md_json_read(inner, n_inner);
        json_decref(value);
        value = unwrapped;
    }
    if (!json_is_object(value)) {
        json_decref(value);
        return NULL;
    }
    return value;
}

static void write_arguments(md_prompt *prompt, const json_t *arguments)
{
    if (arguments == NULL || json_is_null(arguments)) {
        return;
    }
    const char *text = json_string_value(arguments);
    size_t n = json_string_length(arguments);
    cm_bytes dumped;
    cm_bytes_init(&dumped, 0);
    if (text == NULL) {
        md_json_dumps(arguments, &dumped);
        text = cm_bytes_text(&dumped);
        n = dumped.len;
    }
    json_t *object = read_arguments(text, n);
    if (object != NULL) {
        write_parameters(prompt, object);
    } else {
        write_parameter(prompt, "arguments", strlen("arguments"), true, text, n);
    }
    json_decref(object);
    cm_bytes_fini(&dumped);
}

void md_tool_calls_write(md_prompt *prompt, const json_t *tool_calls)
{
    if (json_array_size(tool_calls) == 0) {
        return;
    }
    md_prompt_template(prompt, "\n\n<｜DSML｜tool_calls>\n");
    size_t i;
    json_t *call;
    json_array_foreach(tool_calls, i, call)
    {
        const json_t *function = json_object_get(call, "function");
        md_prompt_template(prompt, i > 0 ? "\n<｜DSML｜invoke name=\"" : "<｜DSML｜invoke name=\"");
        write_string(prompt, json_object_get(function, "name"));
        md_prompt_template(prompt, "\">\n");
        write_arguments(prompt, json_object_get(function, "arguments"));
        md_prompt_template(prompt, "\n</｜DSML｜invoke>");
    }
    md_prompt_template(prompt, "\n</｜DSML｜tool_calls>");
}

/* ---- content ---- */

void md_content_write(md_prompt *prompt, const json_t *content)
{
    if (json_is_string(content)) {
        write_string(prompt, content);
        return;
    }
    size_t i;
    json_t *part;
    json_array_foreach(content, i, part)
    {
        const char *type = json_string_value(json_object_get(part, "type"));
        md_prompt_template(prompt, i > 0 ? "\n\n" : "");
        if (strcmp(type, "text") == 0) {
            write_string(prompt, json_object_get(part, "text"));
        } else {
            md_prompt_text(prompt, "[Unsupported ", strlen("[Unsupported "));
            md_prompt_text(prompt, type, strlen(type));
            md_prompt_text(prompt, "]", 1);
        }
    }
}
