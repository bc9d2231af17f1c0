#include "gateway/responses_body.h"

#include <openssl/evp.h>
#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/model/chat.h"
#include "gateway/request.h"

#define SEAL "bl1."

const gw_surface_field gw_responses_fields[] = {
    {"stream", "stream", true},
    {"stream_options", "stream_options", true},
    {"model", "model", true},
    {"max_tokens", "max_output_tokens", true},
    {"min_tokens", "min_tokens", true},
    {"ignore_eos", "ignore_eos", true},
    {"temperature", "temperature", true},
    {"top_p", "top_p", true},
    {"top_k", "top_k", true},
    {"min_p", "min_p", true},
    {"seed", "seed", true},
    {"stop", "stop", true},
    {"stop_token_ids", "stop_token_ids", true},
    {"presence_penalty", "presence_penalty", true},
    {"frequency_penalty", "frequency_penalty", true},
    {"repetition_penalty", "repetition_penalty", true},
    {"logit_bias", "logit_bias", true},
    {"parallel_tool_calls", "parallel_tool_calls", true},
    {"user", "user", true},
    {"safety_identifier", "safety_identifier", true},
    {"prompt_cache_key", "prompt_cache_key", true},
    {"cache_salt", "cache_salt", true},
    {"chat_template_kwargs", "chat_template_kwargs", true},
    {"messages", "input", false},
    {"reasoning_effort", "reasoning.effort", false},
    {"response_format", "text.format", false},
    {NULL, NULL, false},
};

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

static cm_status refuse(gw_error *error, const char *param, const char *what)
{
    gw_error_set(error, GW_CAUSE_INVALID, param, "%s %s", param, what);
    return CM_E_INVALID;
}

bool gw_responses_includes(const json_t *given, const char *what)
{
    const json_t *include = json_object_get(given, "include");
    for (size_t i = 0; i < json_array_size(include); i++) {
        const char *word = json_string_value(json_array_get(include, i));
        if (word != NULL && strcmp(word, what) == 0) {
            return true;
        }
    }
    return false;
}

/* ---- sealed reasoning: nothing is secret in it, it only goes and comes as one word ---- */

void gw_responses_seal(const cm_bytes *reasoning, cm_bytes *out)
{
    size_t n = 4 * ((reasoning->len + 2) / 3);
    unsigned char *text = cm_alloc(n + 1);
    EVP_EncodeBlock(text, reasoning->data, (int)reasoning->len);
    cm_bytes_append_text(out, SEAL);
    cm_bytes_append(out, text, n);
    cm_free(text);
}

/* A new reference; NULL: it is not ours. */
static json_t *unseal(const json_t *sealed)
{
    const char *text = json_string_value(sealed);
    if (text == NULL || strncmp(text, SEAL, strlen(SEAL)) != 0) {
        return NULL;
    }
    text += strlen(SEAL);
    size_t n = strlen(text);
    unsigned char *plain = cm_alloc(n + 1);
    int n_plain = EVP_DecodeBlock(plain, (const unsigned char *)text, (int)n);
    for (size_t i = n; i > 0 && n_plain > 0 && text[i - 1] == '='; i--) {
        n_plain--; /* what padding stands for is no byte */
    }
    json_t *value = n_plain > 0 ? json_stringn((const char *)plain, (size_t)n_plain) : NULL;
    cm_free(plain);
    return value;
}

/* ---- tools: all as functions ---- */

/* What is declared but runs elsewhere: this server has none of it. */
static bool is_hosted(const json_t *tool)
{
    return strncmp(type_of(tool), "web_search", 10) == 0;
}

static json_t *shown_name(const char *name_space, const json_t *name)
{
    return name_space != NULL ? json_sprintf("%s__%s", name_space, json_string_value(name))
                              : json_incref((json_t *)(uintptr_t)name);
}

/* The grammar of its text is all that says what it takes. */
static json_t *custom_description(const json_t *tool)
{
    const char *text = json_string_value(json_object_get(tool, "description"));
    const json_t *format = json_object_get(tool, "format");
    const char *grammar = json_string_value(json_object_get(format, "definition"));
    const char *syntax = json_string_value(json_object_get(format, "syntax"));
    if (grammar == NULL) {
        return json_string(text != NULL ? text : "");
    }
    return json_sprintf("%s%sThe input must match this %s grammar:\n%s", text != NULL ? text : "",
                        text != NULL ? "\n\n" : "", syntax != NULL ? syntax : "", grammar);
}

static json_t *custom_function(const json_t *tool)
{
    return json_pack("{s:s, s:O, s:o, s:{s:s, s:{s:{s:s}}, s:[s]}}", "type", "function", "name",
                     json_object_get(tool, "name"), "description", custom_description(tool), "parameters",
                     "type", "object", "properties", "input", "type", "string", "required", "input");
}

static cm_status add_tool(json_t *functions, json_t *tool, const char *name_space, size_t i, gw_error *error)
{
    const json_t *name = json_object_get(tool, "name");
    char at[40];
    snprintf(at, sizeof(at), "tools[%zu]", i);
    if (is_hosted(tool)) {
        return CM_OK;
    }
    if (!is_type(tool, "function") && !is_type(tool, "custom")) {
        gw_error_set(error, GW_CAUSE_UNSUPPORTED, at,
                     "%s is of type '%.40s': function and custom are supported", at, type_of(tool));
        return CM_E_UNSUPPORTED;
    }
    if (!json_is_string(name)) {
        return refuse(error, at, "needs a name");
    }
    json_t *function = is_type(tool, "custom") ? custom_function(tool) : json_copy(tool);
    json_object_set_new(function, "name", shown_name(name_space, name));
    json_array_append_new(functions, function);
    return CM_OK;
}

static cm_status add_group(json_t *functions, const json_t *group, size_t i, gw_error *error)
{
    const char *name = json_string_value(json_object_get(group, "name"));
    json_t *tool;
    size_t k;
    char at[40];
    snprintf(at, sizeof(at), "tools[%zu]", i);
    if (name == NULL) {
        return refuse(error, at, "needs a name");
    }
    json_array_foreach(json_object_get(group, "tools"), k, tool)
    {
        CM_TRY(add_tool(functions, tool, name, i, error));
    }
    return CM_OK;
}

static cm_status put_tools(const json_t *given, json_t *plain, gw_error *error)
{
    const json_t *tools = json_object_get(given, "tools");
    json_t *functions = json_array(), *tool;
    size_t i;
    json_object_set_new(plain, "tools", functions);
    if (!absent(tools) && !json_is_array(tools)) {
        return refuse(error, "tools", "must be a list");
    }
    json_array_foreach(tools, i, tool)
    {
        CM_TRY(is_type(tool, "namespace") ? add_group(functions, tool, i, error)
                                          : add_tool(functions, tool, NULL, i, error));
    }
    return CM_OK;
}

static bool tool_is(const json_t *tool, const char *name_space, const char *shown,
                    gw_responses_tool *tool_out)
{
    const json_t *name = json_object_get(tool, "name");
    if (!json_is_string(name)) {
        return false;
    }
    json_t *as_shown = shown_name(name_space, name);
    bool is = strcmp(json_string_value(as_shown), shown) == 0;
    json_decref(as_shown);
    if (is) {
        *tool_out = (gw_responses_tool){
            .name = json_string_value(name), .name_space = name_space, .is_custom = is_type(tool, "custom")};
    }
    return is;
}

bool gw_responses_find_tool(const json_t *tools, const char *shown, gw_responses_tool *tool_out)
{
    for (size_t i = 0; i < json_array_size(tools); i++) {
        const json_t *tool = json_array_get(tools, i), *group = json_object_get(tool, "tools");
        const char *name_space = json_string_value(json_object_get(tool, "name"));
        if (!is_type(tool, "namespace")) {
            if (tool_is(tool, NULL, shown, tool_out)) {
                return true;
            }
            continue;
        }
        for (size_t k = 0; name_space != NULL && k < json_array_size(group); k++) {
            if (tool_is(json_array_get(group, k), name_space, shown, tool_out)) {
                return true;
            }
        }
    }
    return false;
}

static cm_status put_tool_choice(const json_t *given, json_t *body, gw_error *error)
{
    json_t *choice = json_object_get(given, "tool_choice");
    if (absent(choice) || json_is_string(choice)) {
        if (!absent(choice)) {
            json_object_set(body, "tool_choice", choice);
        }
        return CM_OK;
    }
    const json_t *mode = json_object_get(choice, "mode"), *name = json_object_get(choice, "name");
    if (is_type(choice, "allowed_tools") && json_is_string(mode)) {
        json_object_set(body, "tool_choice", (json_t *)(uintptr_t)mode);
    } else if ((is_type(choice, "function") || is_type(choice, "custom")) && json_is_string(name)) {
        json_object_set_new(body, "tool_choice",
                            json_pack("{s:s, s:{s:O}}", "type", "function", "function", "name", name));
    } else {
        return refuse(error, "tool_choice",
                      "must be none, auto, required or an object that names a function");
    }
    return CM_OK;
}

/* ---- input: calls of all kinds as calls of functions ---- */

/* of_tool: what a tool gave may be of any type, the model is told which. */
static cm_status check_part(const json_t *part, const char *where, bool of_tool, gw_error *error)
{
    const char *type = json_string_value(json_object_get(part, "type"));
    bool is_text = type != NULL && (strcmp(type, "input_text") == 0 || strcmp(type, "output_text") == 0 ||
                                    strcmp(type, "text") == 0);
    if (type == NULL) {
        return refuse(error, where, "must be an object with a type");
    }
    if (is_text && !json_is_string(json_object_get(part, "text"))) {
        return refuse(error, where, "is a text part without text");
    }
    if (!is_text && !of_tool) {
        gw_error_set(error, GW_CAUSE_INVALID, where, "%s is of type '%.40s': this is a text-only model",
                     where, type);
        return CM_E_INVALID;
    }
    return CM_OK;
}

static cm_status check_content(const json_t *content, const char *where, bool of_tool, gw_error *error)
{
    char at[96];
    size_t i;
    json_t *part;
    if (!json_is_string(content) && !json_is_array(content)) {
        return refuse(error, where, "must be a string or a list of parts");
    }
    json_array_foreach(content, i, part)
    {
        snprintf(at, sizeof(at), "%.70s[%zu]", where, i);
        CM_TRY(check_part(part, at, of_tool, error));
    }
    return CM_OK;
}

static bool is_message(const json_t *item)
{
    return (is_type(item, "message") || json_object_get(item, "type") == NULL) &&
           json_object_get(item, "role") != NULL;
}

static bool is_output(const json_t *item)
{
    return is_type(item, "function_call_output") || is_type(item, "custom_tool_call_output");
}

static cm_status check_role(const json_t *item, size_t i, gw_error *error)
{
    static const char *const roles[] = {"user", "assistant", "system", "developer"};
    const char *role = json_string_value(json_object_get(item, "role"));
    char at[48];
    for (size_t k = 0; k < 4 && role != NULL; k++) {
        if (strcmp(role, roles[k]) == 0) {
            return CM_OK;
        }
    }
    snprintf(at, sizeof(at), "input[%zu].role", i);
    return refuse(error, at, "must be user, assistant, system or developer");
}

static cm_status check_call(const json_t *item, const char *where, gw_error *error)
{
    const json_t *arguments = json_object_get(item, "arguments");
    if (!json_is_string(json_object_get(item, "name"))) {
        return refuse(error, where, "is a call without a name");
    }
    if (!absent(arguments) && !json_is_string(arguments) && !json_is_object(arguments)) {
        return refuse(error, where, "is a call whose arguments are no string");
    }
    return CM_OK;
}

/* All that the chat encoder would find too, but under the index of a message: items that are none, and
 * instructions that are one, make it another. */
static cm_status check_item(const json_t *item, size_t i, gw_error *error)
{
    char at[48];
    snprintf(at, sizeof(at), "input[%zu]", i);
    if (!json_is_object(item)) {
        return refuse(error, at, "must be an object");
    }
    if (is_message(item)) {
        CM_TRY(check_role(item, i, error));
        snprintf(at, sizeof(at), "input[%zu].content", i);
        return check_content(json_object_get(item, "content"), at, false, error);
    }
    if (is_output(item)) {
        snprintf(at, sizeof(at), "input[%zu].output", i);
        return check_content(json_object_get(item, "output"), at, true, error);
    }
    if (is_type(item, "function_call") || is_type(item, "custom_tool_call")) {
        return check_call(item, at, error);
    }
    if (!is_type(item, "reasoning") && !is_hosted(item)) {
        gw_error_set(error, GW_CAUSE_INVALID, at, "%s is of type '%.40s', which is unknown here", at,
                     type_of(item));
        return CM_E_INVALID;
    }
    return CM_OK;
}

/* {"input": text}, as the model wrote it. */
static json_t *custom_arguments(const json_t *item)
{
    cm_bytes text;
    json_t *object = json_pack("{s:O?}", "input", json_object_get(item, "input"));
    cm_bytes_init(&text, 0);
    md_json_dumps(object, &text);
    json_t *value = json_stringn(cm_bytes_text(&text), text.len);
    cm_bytes_fini(&text);
    json_decref(object);
    return value;
}

/* Reasoning without its text has it sealed, if it is ours. */
static void open_reasoning(json_t *item)
{
    if (json_array_size(json_object_get(item, "content")) > 0) {
        return;
    }
    json_t *text = unseal(json_object_get(item, "encrypted_content"));
    if (text != NULL) {
        json_object_set_new(item, "content",
                            json_pack("[{s:s, s:o}]", "type", "reasoning_text", "text", text));
    }
}

/* item: a copy of the client's. */
static void plain_item(json_t *item)
{
    const char *name_space = json_string_value(json_object_get(item, "namespace"));
    json_t *name = json_object_get(item, "name");
    if (is_type(item, "custom_tool_call")) {
        json_object_set_new(item, "arguments", custom_arguments(item));
        json_object_set_new(item, "type", json_string("function_call"));
    } else if (is_type(item, "custom_tool_call_output")) {
        json_object_set_new(item, "type", json_string("function_call_output"));
    } else if (is_type(item, "reasoning")) {
        open_reasoning(item);
    }
    if (is_type(item, "function_call") && name_space != NULL && json_is_string(name)) {
        json_object_set_new(item, "name", shown_name(name_space, name));
    }
}

static cm_status put_input(const json_t *given, json_t *plain, gw_error *error)
{
    json_t *input = json_object_get(given, "input"), *item;
    size_t i;
    if (!json_is_array(input)) {
        json_object_set(plain, "input", input);
        return json_is_string(input) ? CM_OK : refuse(error, "input", "must be a string or a list of items");
    }
    json_t *items = json_array();
    json_object_set_new(plain, "input", items);
    json_array_foreach(input, i, item)
    {
        CM_TRY(check_item(item, i, error));
        if (!is_hosted(item)) {
            json_t *copy = json_copy(item);
            plain_item(copy);
            json_array_append_new(items, copy);
        }
    }
    return json_array_size(items) > 0 ? CM_OK : refuse(error, "input", "must have at least one item");
}

/* ---- the whole ---- */

/* What needs a memory of earlier answers: there is none here. */
static cm_status check_stateless(const json_t *given, gw_error *error)
{
    static const char *const fields[] = {"previous_response_id", "conversation", "prompt"};
    for (size_t i = 0; i < sizeof(fields) / sizeof(fields[0]); i++) {
        if (!absent(json_object_get(given, fields[i]))) {
            gw_error_set(error, GW_CAUSE_UNSUPPORTED, fields[i],
                         "%s is not supported: nothing is stored here, send all of the input", fields[i]);
            return CM_E_UNSUPPORTED;
        }
    }
    if (json_is_true(json_object_get(given, "background"))) {
        gw_error_set(error, GW_CAUSE_UNSUPPORTED, "background",
                     "background is not supported: the answer comes with the request");
        return CM_E_UNSUPPORTED;
    }
    return CM_OK;
}

static void put_format(const json_t *given, json_t *body)
{
    const json_t *format = json_object_get(json_object_get(given, "text"), "format");
    if (is_type(format, "json_schema")) {
        json_t *schema = json_copy((json_t *)(uintptr_t)format);
        json_object_del(schema, "type");
        json_object_set_new(body, "response_format",
                            json_pack("{s:s, s:o}", "type", "json_schema", "json_schema", schema));
    } else if (!absent(format)) {
        json_object_set(body, "response_format", (json_t *)(uintptr_t)format);
    }
}

/* Of its tokens' alternatives a client hears when it includes log-probabilities; alone the number asks for
 * nothing. */
static cm_status put_logprobs(const json_t *given, json_t *body, gw_error *error)
{
    json_t *n_top = json_object_get(given, "top_logprobs");
    if (!absent(n_top) && (!json_is_integer(n_top) || json_integer_value(n_top) < 0 ||
                           json_integer_value(n_top) > GW_TOP_LOGPROBS_MAX)) {
        return refuse(error, "top_logprobs", "must be an integer from 0 to 20");
    }
    if (gw_responses_includes(given, "message.output_text.logprobs")) {
        json_object_set_new(body, "logprobs", json_true());
        json_object_set(body, "top_logprobs", n_top);
    }
    return CM_OK;
}

/* given with every tool and every call a function's. */
static cm_status make_plain(const json_t *given, json_t *plain, gw_error *error)
{
    const json_t *instructions = json_object_get(given, "instructions");
    const json_t *include = json_object_get(given, "include");
    CM_TRY(check_stateless(given, error));
    if (!absent(include) && !json_is_array(include)) {
        return refuse(error, "include", "must be a list");
    }
    if (!absent(instructions) && !json_is_string(instructions)) {
        return refuse(error, "instructions", "must be a string");
    }
    CM_TRY(put_tools(given, plain, error));
    return put_input(given, plain, error);
}

static cm_status convert(const json_t *given, json_t *plain, json_t **body_out, gw_error *error)
{
    cm_error err = {0};
    json_t *body;
    cm_status status = md_chat_body_convert(MD_SURFACE_RESPONSES, plain, &body, &err);
    if (status != CM_OK) {
        gw_error_set(error, GW_CAUSE_INVALID, err.field, "%s", err.text);
        return status;
    }
    gw_surface_copy(gw_responses_fields, given, body);
    put_format(given, body);
    status = put_tool_choice(given, body, error);
    status = status == CM_OK ? put_logprobs(given, body, error) : status;
    if (status != CM_OK) {
        json_decref(body);
        return status;
    }
    *body_out = body;
    return CM_OK;
}

cm_status gw_responses_body(const json_t *given, json_t **body_out, gw_error *error_out)
{
    json_t *plain = json_copy((json_t *)(uintptr_t)given);
    cm_status status = make_plain(given, plain, error_out);
    if (status == CM_OK) {
        status = convert(given, plain, body_out, error_out);
    }
    json_decref(plain);
    return status;
}
