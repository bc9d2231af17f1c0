#include "gateway/constraint.h"

#include <string.h>

#include "common/base/mem.h"

static bool absent(const json_t *value)
{
    return value == NULL || json_is_null(value);
}

static cm_status refuse(gw_error *error, const char *param, const char *what)
{
    gw_error_set(error, GW_CAUSE_INVALID, param, "%s %s", param, what);
    return CM_E_INVALID;
}

static void constraint_set(gw_constraint *c, gm_kind kind, const char *source, size_t n, const char *param)
{
    c->kind = kind;
    c->source = cm_alloc(n + 1);
    c->n_source = n;
    memcpy(c->source, source, n);
    c->param = param;
}

/* value as text, keys in their order, numbers to the last digit. */
static void constraint_set_json(gw_constraint *c, gm_kind kind, const json_t *value, const char *param)
{
    const size_t flags = JSON_COMPACT | JSON_ENCODE_ANY | JSON_REAL_PRECISION(17);
    size_t n = json_dumpb(value, NULL, 0, flags);
    char *text = cm_alloc(n + 1);
    json_dumpb(value, text, n, flags);
    constraint_set(c, kind, text, n, param);
    cm_free(text);
}

void gw_constraint_copy(const gw_constraint *c, gw_constraint *copy_out)
{
    *copy_out = (gw_constraint){0};
    if (c->kind != 0) {
        constraint_set(copy_out, c->kind, c->source, c->n_source, c->param);
    }
}

void gw_constraint_free(gw_constraint *c)
{
    cm_free(c->source);
    *c = (gw_constraint){0};
}

/* ---- one way to say it each ---- */

static cm_status set_schema(gw_constraint *c, const json_t *schema, const char *param, gw_error *error)
{
    if (json_is_string(schema)) { /* vLLM takes a schema as text, too */
        constraint_set(c, GM_JSON_SCHEMA, json_string_value(schema), json_string_length(schema), param);
        return CM_OK;
    }
    if (!json_is_object(schema) && !json_is_boolean(schema)) {
        return refuse(error, param, "must be a JSON schema");
    }
    constraint_set_json(c, GM_JSON_SCHEMA, schema, param);
    return CM_OK;
}

static cm_status set_regex(gw_constraint *c, const json_t *regex, const char *param, gw_error *error)
{
    if (!json_is_string(regex)) {
        return refuse(error, param, "must be a string");
    }
    constraint_set(c, GM_REGEX, json_string_value(regex), json_string_length(regex), param);
    return CM_OK;
}

static cm_status set_choice(gw_constraint *c, const json_t *choice, const char *param, gw_error *error)
{
    if (!json_is_array(choice)) {
        return refuse(error, param, "must be a list of strings");
    }
    constraint_set_json(c, GM_CHOICE, choice, param);
    return CM_OK;
}

static cm_status set_any_object(gw_constraint *c, const json_t *wanted, const char *param, gw_error *error)
{
    if (!json_is_boolean(wanted)) {
        return refuse(error, param, "must be true or false");
    }
    if (json_is_true(wanted)) {
        constraint_set(c, GM_JSON_OBJECT, "", 0, param);
    }
    return CM_OK;
}

static cm_status set_unsupported(gw_constraint *c, const json_t *value, const char *param, gw_error *error)
{
    (void)c;
    (void)value;
    gw_error_set(error, GW_CAUSE_UNSUPPORTED, param,
                 "%s is not supported: use a JSON schema or a regular expression", param);
    return CM_E_UNSUPPORTED;
}

static const struct {
    const char *outer, *name; /* outer NULL: a field of the body itself */
    const char *param;
    cm_status (*set)(gw_constraint *c, const json_t *value, const char *param, gw_error *error);
} WAYS[] = {
    {"structured_outputs", "json", "structured_outputs.json", set_schema},
    {"structured_outputs", "regex", "structured_outputs.regex", set_regex},
    {"structured_outputs", "choice", "structured_outputs.choice", set_choice},
    {"structured_outputs", "json_object", "structured_outputs.json_object", set_any_object},
    {"structured_outputs", "grammar", "structured_outputs.grammar", set_unsupported},
    {"structured_outputs", "structural_tag", "structured_outputs.structural_tag", set_unsupported},
    {NULL, "guided_json", "guided_json", set_schema},
    {NULL, "guided_regex", "guided_regex", set_regex},
    {NULL, "guided_choice", "guided_choice", set_choice},
    {NULL, "guided_grammar", "guided_grammar", set_unsupported},
};

static cm_status read_format(const json_t *format, gw_constraint *c, gw_error *error)
{
    const char *type = json_string_value(json_object_get(format, "type"));
    const json_t *schema = json_object_get(json_object_get(format, "json_schema"), "schema");
    if (absent(format) || (type != NULL && strcmp(type, "text") == 0)) {
        return CM_OK;
    }
    if (type != NULL && strcmp(type, "json_object") == 0) {
        return set_any_object(c, json_true(), "response_format", error);
    }
    if (type == NULL || strcmp(type, "json_schema") != 0) {
        return refuse(error, "response_format", "must have a type of text, json_object or json_schema");
    }
    if (absent(schema)) {
        return refuse(error, "response_format.json_schema", "has no schema");
    }
    return set_schema(c, schema, "response_format.json_schema", error);
}

/* ---- tools ---- */

static bool is_strict(const json_t *function)
{
    return json_is_true(json_object_get(function, "strict"));
}

/* What the grammar is told of a tool. free: its arguments are not held against its schema. */
static json_t *tool_of(const json_t *function, bool free_arguments)
{
    json_t *parameters = json_object_get(function, "parameters");
    json_t *tool = json_pack("{s:O?}", "name", json_object_get(function, "name"));
    if (free_arguments) {
        json_object_set_new(tool, "parameters", json_pack("{s:s}", "type", "object"));
    } else if (!absent(parameters)) {
        json_object_set(tool, "parameters", parameters);
    }
    return tool;
}

/* The tools that may be called; name NULL: all. */
static json_t *tools_of(const json_t *body, const char *name, bool strict_only, bool *any_strict_out)
{
    json_t *list = json_array(), *tool;
    size_t i;
    *any_strict_out = false;
    json_array_foreach(json_object_get(body, "tools"), i, tool)
    {
        const json_t *function = json_object_get(tool, "function");
        const char *its = json_string_value(json_object_get(function, "name"));
        if (name == NULL || (its != NULL && strcmp(its, name) == 0)) {
            *any_strict_out |= is_strict(function);
            json_array_append_new(list, tool_of(function, strict_only && !is_strict(function)));
        }
    }
    return list;
}

/* The name of {"type":"function","function":{"name"}}; NULL: it names nobody. */
static const char *choice_name(const json_t *choice)
{
    return json_string_value(json_object_get(json_object_get(choice, "function"), "name"));
}

cm_status gw_constraint_for_tools(const json_t *body, const json_t *format, gw_constraint *c, gw_error *error)
{
    const json_t *choice = json_object_get(body, "tool_choice"),
                 *parallel = json_object_get(body, "parallel_tool_calls");
    const char *word = json_string_value(choice), *name = choice_name(choice);
    bool forced = (word != NULL && strcmp(word, "required") == 0) || json_is_object(choice), any_strict;
    if (json_is_object(choice) && name == NULL) {
        return refuse(error, "tool_choice",
                      "must be none, auto, required or an object that names a function");
    }
    json_t *tools = tools_of(body, name, !forced, &any_strict);
    cm_status status = CM_OK;
    if (json_array_size(tools) == 0 && forced) {
        status = refuse(error, "tool_choice", "demands a tool that the request does not have");
    } else if (json_array_size(tools) > 0 && (forced || any_strict || format != NULL)) {
        json_t *source = json_pack("{s:O}", "tools", tools);
        if (name != NULL || json_is_false(parallel)) {
            json_object_set_new(source, "calls_max", json_integer(1));
        }
        if (!forced && format != NULL) {
            json_object_set(source, "schema", (json_t *)(uintptr_t)format);
        } else if (!forced) {
            json_object_set_new(source, "text", json_true());
        }
        constraint_set_json(c, GM_TOOLS, source, "tools");
        json_decref(source);
    }
    json_decref(tools);
    return status;
}

/* ---- all ---- */

/* The format is wanted and tools may be called: either comes. */
static cm_status join_tools(const json_t *body, gw_constraint *c, gw_error *error)
{
    gw_constraint format = *c;
    json_t *schema = NULL;
    if (format.kind == GM_JSON_SCHEMA) {
        schema = json_loadb(format.source, format.n_source, JSON_DECODE_ANY, NULL);
    } else if (format.kind == GM_JSON_OBJECT) {
        schema = json_pack("{s:s}", "type", "object");
    } else if (format.kind != 0) {
        return refuse(error, format.param, "cannot be demanded together with tools");
    }
    *c = (gw_constraint){0};
    cm_status status = format.kind != 0 && schema == NULL
                           ? refuse(error, format.param, "must be a JSON schema")
                           : gw_constraint_for_tools(body, schema, c, error);
    json_decref(schema);
    gw_constraint_free(&format);
    return status;
}

static bool continues_prefix(const json_t *body)
{
    const json_t *messages = json_object_get(body, "messages");
    size_t n = json_array_size(messages);
    return n > 0 && json_is_true(json_object_get(json_array_get(messages, n - 1), "prefix"));
}

static cm_status read_all(const json_t *body, bool tools, gw_constraint *c, gw_error *error)
{
    gw_constraint more = {0};
    cm_status status = read_format(json_object_get(body, "response_format"), c, error);
    for (size_t i = 0; i < sizeof(WAYS) / sizeof(WAYS[0]) && status == CM_OK; i++) {
        const json_t *outer = WAYS[i].outer != NULL ? json_object_get(body, WAYS[i].outer) : body;
        const json_t *value = json_object_get(outer, WAYS[i].name);
        if (absent(value)) {
            continue;
        }
        status = WAYS[i].set(&more, value, WAYS[i].param, error);
        if (status == CM_OK && more.kind != 0 && c->kind != 0) {
            gw_error_set(error, GW_CAUSE_INVALID, more.param, "%s and %s cannot both be demanded", c->param,
                         more.param);
            status = CM_E_INVALID;
        } else if (status == CM_OK && more.kind != 0) {
            *c = more;
            more = (gw_constraint){0};
        }
    }
    gw_constraint_free(&more);
    if (status == CM_OK && tools) {
        status = join_tools(body, c, error);
    }
    if (status == CM_OK && c->kind != 0 && continues_prefix(body)) {
        status = refuse(error, c->param, "cannot be demanded of an answer whose beginning is given");
    }
    return status;
}

cm_status gw_constraint_read(const json_t *body, bool tools, gw_constraint *constraint_out,
                             gw_error *error_out)
{
    gw_constraint c = {0};
    cm_status status = read_all(body, tools, &c, error_out);
    if (status != CM_OK) {
        gw_constraint_free(&c);
        return status;
    }
    *constraint_out = c;
    return CM_OK;
}

cm_status gw_constraint_check(const gw_constraint *c, gw_error *error_out)
{
    gm_grammar *grammar;
    cm_error err = {0};
    if (c->kind == 0) {
        return CM_OK;
    }
    cm_status status = gm_compile(c->kind, c->source, c->n_source, &grammar, &err);
    if (status == CM_OK) {
        gm_grammar_destroy(grammar);
        return CM_OK;
    }
    gw_error_set(error_out, status == CM_E_UNSUPPORTED ? GW_CAUSE_UNSUPPORTED : GW_CAUSE_INVALID, c->param,
                 "%s%s%s: %s", c->param, err.field[0] != '\0' ? " at " : "", err.field, err.text);
    return status;
}
