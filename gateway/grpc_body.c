/* Typed requests to the JSON bodies of the HTTP surface, so that every field is checked in one place. Here
 * only what a body cannot say is refused: unknown enum values, fields that another role has, numbers that
 * JSON has not. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "gateway/grpc_private.h"

enum { USER_ID_BYTES_MAX = 512 };

static cm_status refuse(gw_error *error, const char *field, const char *what)
{
    gw_error_set(error, GW_CAUSE_INVALID, field, "%s %s", field, what);
    return CM_E_INVALID;
}

/* The request's strings have been checked, so a JSON string can be made of each. text NULL: the field is
 * absent. */
static void put_string(json_t *object, const char *key, const char *text)
{
    if (text != NULL) {
        json_object_set_new(object, key, json_string(text));
    }
}

static void put_bool(json_t *object, const char *key, bool has, bool value)
{
    if (has) {
        json_object_set_new(object, key, json_boolean(value));
    }
}

static void put_integer(json_t *object, const char *key, bool has, int64_t value)
{
    if (has) {
        json_object_set_new(object, key, json_integer(value));
    }
}

/* ---- sampling ---- */

static cm_status put_numbers(json_t *body, const Baleen__V1__Sampling *s, gw_error *error)
{
    const struct {
        const char *key;
        bool has;
        float value;
    } numbers[] = {
        {"temperature", s->has_temperature, s->temperature},
        {"top_p", s->has_top_p, s->top_p},
        {"min_p", s->has_min_p, s->min_p},
        {"presence_penalty", s->has_presence_penalty, s->presence_penalty},
        {"frequency_penalty", s->has_frequency_penalty, s->frequency_penalty},
        {"repetition_penalty", s->has_repetition_penalty, s->repetition_penalty},
    };
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        if (numbers[i].has && !isfinite(numbers[i].value)) {
            char field[64];
            snprintf(field, sizeof(field), "sampling.%s", numbers[i].key);
            return refuse(error, field, "must be a finite number");
        }
        if (numbers[i].has) {
            json_object_set_new(body, numbers[i].key, json_real((double)numbers[i].value));
        }
    }
    return CM_OK;
}

cm_status gw_grpc_check_prompt(const gw_grpc_call *call, size_t n_ids, gw_error *error_out)
{
    gw_info info;
    gw_gateway_info(call->grpc->gateway, &info);
    if (n_ids < info.context) {
        return CM_OK;
    }
    gw_error_too_long(error_out, "prompt", n_ids, info.context);
    return CM_E_TOO_LONG;
}

void gw_grpc_put_ids(json_t *body, const char *field, const uint32_t *ids, size_t n_ids)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n_ids; i++) {
        json_array_append_new(list, json_integer(ids[i]));
    }
    json_object_set_new(body, field, list);
}

void gw_grpc_put_stops(json_t *body, char *const *stop, size_t n_stop, const uint32_t *ids, size_t n_ids)
{
    if (n_stop > 0) {
        json_t *list = json_array();
        for (size_t i = 0; i < n_stop && i <= GW_STOP_MAX; i++) {
            json_array_append_new(list, json_string(stop[i]));
        }
        json_object_set_new(body, "stop", list);
    }
    if (n_ids > 0) {
        gw_grpc_put_ids(body, "stop_token_ids", ids, n_ids <= GW_STOP_IDS_MAX ? n_ids : GW_STOP_IDS_MAX + 1);
    }
}

static cm_status put_logit_bias(json_t *body, const Baleen__V1__Sampling *s, gw_error *error)
{
    if (s->n_logit_bias == 0) {
        return CM_OK;
    }
    json_t *map = json_object();
    json_object_set_new(body, "logit_bias", map);
    for (size_t i = 0; i < s->n_logit_bias; i++) {
        char id[16], field[64];
        if (!isfinite(s->logit_bias[i]->bias)) {
            snprintf(field, sizeof(field), "sampling.logit_bias[%zu].bias", i);
            return refuse(error, field, "must be a finite number");
        }
        snprintf(id, sizeof(id), "%u", s->logit_bias[i]->token_id);
        json_object_set_new(map, id, json_real((double)s->logit_bias[i]->bias));
    }
    return CM_OK;
}

cm_status gw_grpc_put_schema(json_t *body, const char *field, const char *text, gw_error *error_out)
{
    json_t *schema = json_loads(text, JSON_ALLOW_NUL, NULL);
    if (!json_is_object(schema)) {
        json_decref(schema);
        return refuse(error_out, field, "must be the text of a JSON object");
    }
    json_object_set_new(body, "response_format",
                        json_pack("{s:s, s:{s:s, s:o}}", "type", "json_schema", "json_schema", "name",
                                  "response", "schema", schema));
    return CM_OK;
}

static json_t *string_list(char *const *texts, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; i < n; i++) {
        json_array_append_new(list, json_string(texts[i]));
    }
    return list;
}

static cm_status put_constraint(json_t *body, const Baleen__V1__Sampling *s, gw_error *error)
{
    switch (s->constraint_case) {
    case BALEEN__V1__SAMPLING__CONSTRAINT_JSON_OBJECT:
        if (s->json_object) {
            json_object_set_new(body, "response_format", json_pack("{s:s}", "type", "json_object"));
        }
        return CM_OK;
    case BALEEN__V1__SAMPLING__CONSTRAINT_JSON_SCHEMA:
        return gw_grpc_put_schema(body, "sampling.json_schema", s->json_schema, error);
    case BALEEN__V1__SAMPLING__CONSTRAINT_REGEX:
        json_object_set_new(body, "structured_outputs", json_pack("{s:s}", "regex", s->regex));
        return CM_OK;
    case BALEEN__V1__SAMPLING__CONSTRAINT_CHOICE:
        json_object_set_new(body, "structured_outputs",
                            json_pack("{s:o}", "choice", string_list(s->choice->text, s->choice->n_text)));
        return CM_OK;
    case BALEEN__V1__SAMPLING__CONSTRAINT_GRAMMAR:
        gw_error_set(error, GW_CAUSE_UNSUPPORTED, "sampling.grammar",
                     "sampling.grammar is not supported: use json_schema or regex");
        return CM_E_UNSUPPORTED;
    default:
        return CM_OK;
    }
}

static cm_status put_sampling(json_t *body, const Baleen__V1__Sampling *s, bool chat, gw_error *error)
{
    if (s == NULL) {
        return CM_OK;
    }
    put_integer(body, "max_tokens", s->has_max_tokens, s->max_tokens);
    put_integer(body, "min_tokens", s->has_min_tokens, s->min_tokens);
    put_integer(body, "top_k", s->has_top_k, s->top_k);
    put_integer(body, "seed", s->has_seed, s->seed);
    put_bool(body, "ignore_eos", s->has_ignore_eos, s->ignore_eos);
    put_bool(body, "include_stop_str_in_output", s->has_include_stop, s->include_stop);
    if (chat) {
        put_bool(body, "logprobs", s->has_top_logprobs, true);
        put_integer(body, "top_logprobs", s->has_top_logprobs, s->top_logprobs);
    } else {
        put_integer(body, "logprobs", s->has_top_logprobs, s->top_logprobs);
    }
    gw_grpc_put_stops(body, s->stop, s->n_stop, s->stop_token_ids, s->n_stop_token_ids);
    CM_TRY(put_numbers(body, s, error));
    CM_TRY(put_logit_bias(body, s, error));
    return put_constraint(body, s, error);
}

cm_status gw_grpc_put_routing(json_t *body, const Baleen__V1__Routing *routing, gw_error *error_out)
{
    if (routing == NULL) {
        return CM_OK;
    }
    if (routing->user_id != NULL && strlen(routing->user_id) > USER_ID_BYTES_MAX) {
        return refuse(error_out, "routing.user_id", "must have at most 512 bytes");
    }
    put_string(body, "user_id", routing->user_id);
    put_integer(body, "priority", routing->has_priority, routing->priority);
    return CM_OK;
}

/* ---- messages ---- */

static const char *role_word(Baleen__V1__Role role)
{
    switch (role) {
    case BALEEN__V1__ROLE__ROLE_SYSTEM:
        return "system";
    case BALEEN__V1__ROLE__ROLE_DEVELOPER:
        return "developer";
    case BALEEN__V1__ROLE__ROLE_USER:
        return "user";
    case BALEEN__V1__ROLE__ROLE_ASSISTANT:
        return "assistant";
    case BALEEN__V1__ROLE__ROLE_TOOL:
        return "tool";
    case BALEEN__V1__ROLE__ROLE_LATEST_REMINDER:
        return "latest_reminder";
    default:
        return NULL;
    }
}

static json_t *call_json(const Baleen__V1__ToolCall *call)
{
    json_t *json = json_pack("{s:s, s:{s:s, s:s}}", "type", "function", "function", "name", call->name,
                             "arguments", call->arguments != NULL ? call->arguments : "{}");
    put_string(json, "id", call->id);
    return json;
}

/* The first field that only another role may have; NULL if there is none. */
static const char *foreign_field(const Baleen__V1__Message *m)
{
    bool assistant = m->role == BALEEN__V1__ROLE__ROLE_ASSISTANT;
    if (!assistant && m->reasoning_content != NULL) {
        return "reasoning_content";
    }
    if (!assistant && m->n_tool_calls > 0) {
        return "tool_calls";
    }
    if (!assistant && m->has_prefix && m->prefix) {
        return "prefix";
    }
    if (m->role != BALEEN__V1__ROLE__ROLE_TOOL && m->tool_call_id != NULL) {
        return "tool_call_id";
    }
    return m->role != BALEEN__V1__ROLE__ROLE_USER && m->task != NULL ? "task" : NULL;
}

static cm_status check_message(const Baleen__V1__Message *m, size_t i, gw_error *error)
{
    char field[64];
    if (role_word(m->role) == NULL) {
        snprintf(field, sizeof(field), "messages[%zu].role", i);
        return refuse(error, field, "is not a role of this interface");
    }
    if (foreign_field(m) != NULL) {
        snprintf(field, sizeof(field), "messages[%zu].%s", i, foreign_field(m));
        return refuse(error, field, "does not belong to a message of this role");
    }
    return CM_OK;
}

static json_t *message_json(const Baleen__V1__Message *m)
{
    json_t *json = json_object();
    put_string(json, "role", role_word(m->role));
    put_string(json, "content", m->content);
    put_string(json, "reasoning_content", m->reasoning_content);
    put_string(json, "tool_call_id", m->tool_call_id);
    put_string(json, "task", m->task);
    put_bool(json, "prefix", m->has_prefix, m->prefix);
    if (m->n_tool_calls > 0) {
        json_t *calls = json_array();
        for (size_t i = 0; i < m->n_tool_calls; i++) {
            json_array_append_new(calls, call_json(m->tool_calls[i]));
        }
        json_object_set_new(json, "tool_calls", calls);
    }
    return json;
}

static cm_status put_messages(json_t *body, const Baleen__V1__ChatRequest *request, gw_error *error)
{
    json_t *list = json_array();
    json_object_set_new(body, "messages", list);
    for (size_t i = 0; i < request->n_messages; i++) {
        CM_TRY(check_message(request->messages[i], i, error));
        json_array_append_new(list, message_json(request->messages[i]));
    }
    return CM_OK;
}

/* ---- tools ---- */

static cm_status put_tool(json_t *list, const Baleen__V1__Tool *tool, size_t i, gw_error *error)
{
    json_t *function = json_object();
    json_array_append_new(list, json_pack("{s:s, s:o}", "type", "function", "function", function));
    put_string(function, "name", tool->name);
    put_string(function, "description", tool->description);
    if (tool->parameters_json != NULL) {
        json_t *parameters = json_loads(tool->parameters_json, JSON_ALLOW_NUL, NULL);
        if (!json_is_object(parameters)) {
            char field[64];
            snprintf(field, sizeof(field), "tools[%zu].parameters_json", i);
            json_decref(parameters);
            return refuse(error, field, "must be the text of a JSON object");
        }
        json_object_set_new(function, "parameters", parameters);
    }
    put_bool(function, "strict", tool->has_strict, tool->strict);
    return CM_OK;
}

static cm_status put_tools(json_t *body, const Baleen__V1__ChatRequest *request, gw_error *error)
{
    if (request->n_tools == 0) {
        return CM_OK;
    }
    json_t *list = json_array();
    json_object_set_new(body, "tools", list);
    for (size_t i = 0; i < request->n_tools; i++) {
        CM_TRY(put_tool(list, request->tools[i], i, error));
    }
    return CM_OK;
}

static cm_status put_tool_mode(json_t *body, const Baleen__V1__ChatRequest *request, gw_error *error)
{
    if (!request->has_tool_mode) {
        return CM_OK;
    }
    switch (request->tool_mode) {
    case BALEEN__V1__TOOL_MODE__TOOL_AUTO:
        put_string(body, "tool_choice", "auto");
        return CM_OK;
    case BALEEN__V1__TOOL_MODE__TOOL_NONE:
        put_string(body, "tool_choice", "none");
        return CM_OK;
    case BALEEN__V1__TOOL_MODE__TOOL_REQUIRED:
        put_string(body, "tool_choice", "required");
        return CM_OK;
    case BALEEN__V1__TOOL_MODE__TOOL_NAMED:
        if (request->tool_name == NULL) {
            return refuse(error, "tool_name", "is needed with TOOL_NAMED");
        }
        json_object_set_new(
            body, "tool_choice",
            json_pack("{s:s, s:{s:s}}", "type", "function", "function", "name", request->tool_name));
        return CM_OK;
    default:
        return refuse(error, "tool_mode", "has a value that this interface does not know");
    }
}

/* ---- thinking ---- */

static cm_status put_thinking(json_t *body, const Baleen__V1__ChatRequest *request, gw_error *error)
{
    static const char *const words[] = {
        [BALEEN__V1__THINKING__THINKING_ENABLED] = "enabled",
        [BALEEN__V1__THINKING__THINKING_DISABLED] = "disabled",
    };
    uint32_t thinking = request->has_thinking ? (uint32_t)request->thinking : 0;
    if (thinking >= sizeof(words) / sizeof(words[0])) {
        return refuse(error, "thinking", "has a value that this interface does not know");
    }
    if (words[thinking] != NULL) {
        json_object_set_new(body, "thinking", json_pack("{s:s}", "type", words[thinking]));
    }
    return CM_OK;
}

static cm_status put_effort(json_t *body, const Baleen__V1__ChatRequest *request, gw_error *error)
{
    static const char *const words[] = {
        [BALEEN__V1__EFFORT__EFFORT_NONE] = "none", [BALEEN__V1__EFFORT__EFFORT_MINIMAL] = "minimal",
        [BALEEN__V1__EFFORT__EFFORT_LOW] = "low",   [BALEEN__V1__EFFORT__EFFORT_MEDIUM] = "medium",
        [BALEEN__V1__EFFORT__EFFORT_HIGH] = "high", [BALEEN__V1__EFFORT__EFFORT_XHIGH] = "xhigh",
        [BALEEN__V1__EFFORT__EFFORT_MAX] = "max",   [BALEEN__V1__EFFORT__EFFORT_ULTRA] = "ultra",
    };
    uint32_t effort = request->has_effort ? (uint32_t)request->effort : 0;
    if (effort >= sizeof(words) / sizeof(words[0])) {
        return refuse(error, "effort", "has a value that this interface does not know");
    }
    put_string(body, "reasoning_effort", words[effort]);
    return CM_OK;
}

/* ---- whole bodies ---- */

static cm_status fill_chat(json_t *body, const Baleen__V1__ChatRequest *request, gw_error *error)
{
    put_string(body, "model", request->model);
    put_bool(body, "parallel_tool_calls", request->has_parallel_tool_calls, request->parallel_tool_calls);
    if (request->has_drop_thinking) {
        json_object_set_new(body, "chat_template_kwargs",
                            json_pack("{s:b}", "drop_thinking", request->drop_thinking));
    }
    CM_TRY(put_messages(body, request, error));
    CM_TRY(put_tools(body, request, error));
    CM_TRY(put_tool_mode(body, request, error));
    CM_TRY(put_thinking(body, request, error));
    CM_TRY(put_effort(body, request, error));
    CM_TRY(put_sampling(body, request->sampling, true, error));
    return gw_grpc_put_routing(body, request->routing, error);
}

cm_status gw_grpc_chat_body(const Baleen__V1__ChatRequest *request, json_t **body_out, gw_error *error_out)
{
    json_t *body = json_object();
    cm_status status = fill_chat(body, request, error_out);
    if (status != CM_OK) {
        json_decref(body);
        return status;
    }
    *body_out = body;
    return CM_OK;
}

static cm_status fill_generate(json_t *body, const Baleen__V1__GenerateRequest *request, gw_error *error)
{
    put_string(body, "model", request->model);
    if (request->prompt_case == BALEEN__V1__GENERATE_REQUEST__PROMPT_TEXT) {
        put_string(body, "prompt", request->text);
    } else if (request->prompt_case == BALEEN__V1__GENERATE_REQUEST__PROMPT_TOKENS) {
        gw_grpc_put_ids(body, "prompt", request->tokens->ids, request->tokens->n_ids);
    } else {
        return refuse(error, "prompt", "is missing: set text or tokens");
    }
    CM_TRY(put_sampling(body, request->sampling, false, error));
    return gw_grpc_put_routing(body, request->routing, error);
}

cm_status gw_grpc_generate_body(const Baleen__V1__GenerateRequest *request, json_t **body_out,
                                gw_error *error_out)
{
    json_t *body = json_object();
    cm_status status = fill_generate(body, request, error_out);
    if (status != CM_OK) {
        json_decref(body);
        return status;
    }
    *body_out = body;
    return CM_OK;
}
