/* Tool calls as encoding sections 6.2 and 8.1 have them: the marker of the block's tags is a control token,
 * so no text can end a value by chance. Strings stand as they are, everything else as JSON. */
#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/grammar/schema_private.h"

enum { TOOLS_MAX = 128, CALLS_MAX = 128, NAME_BYTES = 128, KEY_BYTES = 64, PATH_BYTES = 96 };

/* `<` or `</`, the marker, then the rest of a tag. */
static void put_tag(gm_build *b, uint32_t from, uint32_t to, const char *before, const char *after)
{
    uint32_t open = gm_state_new(b), marked = gm_state_new(b);
    gm_text(b, from, open, before);
    gm_control(b, open, marked, MD_CTL_DSML);
    gm_text(b, marked, to, after);
}

/* ` string="true">` and the text, or ` string="false">` and JSON; then the end tag. */
static void put_value(sc_compiler *c, uint32_t from, uint32_t to, const json_t *schema, const json_t *root,
                      const char *path)
{
    gm_build *b = c->b;
    uint32_t raw = gm_state_new(b), json = gm_state_new(b), end = gm_state_new(b);
    sc_want text = {SC_STRING, GM_RAW}, other = {SC_ALL & ~(uint32_t)SC_STRING, GM_JSON};
    gm_text(b, from, raw, " string=\"true\">");
    gm_text(b, from, json, " string=\"false\">");
    gm_call(b, raw, end, sc_rule(c, schema, root, text, path), 1, 1);
    gm_call(b, json, end, sc_rule(c, schema, root, other, path), 1, 1);
    put_tag(b, end, to, "</", "parameter>");
}

/* Of a tool that describes no parameters but takes some: any name. */
static uint32_t free_parameter_rule(sc_compiler *c, const json_t *schema, const json_t *root,
                                    const char *path)
{
    gm_build *b = c->b;
    static const char pattern[] = "[A-Za-z0-9_.$-]{1,64}\"";
    uint32_t rule = gm_rule_new(b, path), name = gm_state_new(b), value = gm_state_new(b);
    put_tag(b, b->rules[rule].start, name, "<", "parameter name=\"");
    gm_regex(b, name, value, pattern, sizeof(pattern) - 1, GM_RAW, false, path);
    put_value(c, value, b->rules[rule].accept, schema, root, path);
    return rule;
}

static uint32_t parameter_rule(sc_compiler *c, const char *key, const json_t *schema, const json_t *root,
                               const char *path)
{
    gm_build *b = c->b;
    char tag[KEY_BYTES + 64];
    uint32_t rule = gm_rule_new(b, path), value = gm_state_new(b);
    if (strlen(key) > KEY_BYTES || strpbrk(key, "\"\n") != NULL) {
        gm_build_fail(b, CM_E_INVALID, path,
                      "a parameter's name must have at most %d bytes and no quotation mark", KEY_BYTES);
        return rule;
    }
    snprintf(tag, sizeof(tag), "parameter name=\"%s\"", key);
    put_tag(b, b->rules[rule].start, value, "<", tag);
    put_value(c, value, b->rules[rule].accept, schema, root, path);
    return rule;
}

static bool is_required(const json_t *parameters, const char *key)
{
    const json_t *list = json_object_get(parameters, "required");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        if (name != NULL && strcmp(name, key) == 0) {
            return true;
        }
    }
    return false;
}

/* Parameters in their order, a line break between two; none at all is an empty line, `from` being at its
 * beginning. Ends before the line break behind the last. */
static void put_parameters(sc_compiler *c, uint32_t from, uint32_t to, const json_t *parameters,
                           const char *path)
{
    gm_build *b = c->b;
    const json_t *additional = json_object_get(parameters, "additionalProperties");
    uint32_t bare = gm_state_new(b), line = gm_state_new(b);
    const char *key;
    json_t *schema;
    bool described = json_object_size(json_object_get(parameters, "properties")) > 0;
    gm_empty(b, from, bare);
    json_object_foreach(json_object_get(parameters, "properties"), key, schema)
    {
        char below[PATH_BYTES];
        uint32_t next_bare = gm_state_new(b), next_line = gm_state_new(b), at = gm_state_new(b);
        snprintf(below, sizeof(below), "%.24s/properties/%.56s", path, key);
        uint32_t rule = parameter_rule(c, key, schema, parameters, below);
        gm_call(b, bare, next_line, rule, 1, 1);
        gm_byte(b, line, at, '\n', '\n');
        gm_call(b, at, next_line, rule, 1, 1);
        if (!is_required(parameters, key)) {
            gm_empty(b, bare, next_bare);
            gm_empty(b, line, next_line);
        }
        bare = next_bare;
        line = next_line;
    }
    if (described ? additional != NULL && !json_is_false(additional)
                  : !json_is_false(additional) && json_object_get(parameters, "properties") == NULL) {
        const json_t *schema_of_more = json_is_object(additional) ? additional : json_true();
        uint32_t rule = free_parameter_rule(c, schema_of_more, parameters, path), at = gm_state_new(b);
        uint32_t last = gm_state_new(b);
        gm_call(b, bare, last, rule, 1, 1);
        gm_byte(b, line, at, '\n', '\n');
        gm_call(b, at, last, rule, 1, 1);
        gm_empty(b, last, line);
    }
    gm_empty(b, bare, to);
    gm_empty(b, line, to);
}

static bool check_parameters(gm_build *b, const json_t *parameters, const char *path)
{
    static const char *const these[] = {"type", "properties", "required", "additionalProperties", NULL};
    const json_t *properties = json_object_get(parameters, "properties");
    if (!json_is_object(parameters) || (properties != NULL && !json_is_object(properties)) ||
        (sc_types(parameters, parameters) & SC_OBJECT) == 0) {
        gm_build_fail(b, CM_E_INVALID, path, "parameters must be a schema of an object");
        return false;
    }
    if (!sc_check_keywords(b, parameters, path)) {
        return false;
    }
    const char *other = sc_other_keyword(parameters, these);
    if (other != NULL) {
        gm_build_fail(b, CM_E_UNSUPPORTED, path, "%s is not supported in the parameters of a tool", other);
    }
    return other == NULL;
}

static void put_call(sc_compiler *c, uint32_t from, uint32_t to, const json_t *tool, size_t i)
{
    gm_build *b = c->b;
    char path[PATH_BYTES], tag[NAME_BYTES + 64];
    json_t *none = json_pack("{s:s, s:{}}", "type", "object", "properties");
    const json_t *parameters = json_object_get(tool, "parameters");
    const char *name = json_string_value(json_object_get(tool, "name"));
    uint32_t open = gm_state_new(b), end = gm_state_new(b);
    snprintf(path, sizeof(path), "/tools/%zu/parameters", i);
    if (name == NULL || name[0] == '\0' || strlen(name) > NAME_BYTES || strpbrk(name, "\"\n") != NULL) {
        gm_build_fail(b, CM_E_INVALID, path, "a tool's name must have 1 to %d bytes and no quotation mark",
                      NAME_BYTES);
    } else if (parameters == NULL || json_is_null(parameters) || check_parameters(b, parameters, path)) {
        bool some = parameters != NULL && !json_is_null(parameters);
        snprintf(tag, sizeof(tag), "invoke name=\"%s\">\n", name);
        put_tag(b, from, open, "<", tag);
        put_parameters(c, open, end, some ? parameters : none, path);
        put_tag(b, end, to, "\n</", "invoke>");
    }
    json_decref(none);
}

static void put_block(sc_compiler *c, uint32_t from, uint32_t to, const json_t *tools, uint32_t calls_max)
{
    gm_build *b = c->b;
    uint32_t call = gm_rule_new(b, "/tools"), more = gm_rule_new(b, "/tools");
    uint32_t first = gm_state_new(b), line = gm_state_new(b), behind = gm_state_new(b), end = gm_state_new(b);
    for (size_t i = 0; i < json_array_size(tools); i++) {
        put_call(c, b->rules[call].start, b->rules[call].accept, json_array_get(tools, i), i);
    }
    gm_byte(b, b->rules[more].start, line, '\n', '\n');
    gm_call(b, line, b->rules[more].accept, call, 1, 1);
    put_tag(b, from, first, "\n\n<", "tool_calls>\n");
    gm_call(b, first, behind, call, 1, 1);
    gm_call(b, behind, end, more, 0, calls_max - 1);
    put_tag(b, end, to, "\n</", "tool_calls>");
}

static void put_source(gm_build *b, uint32_t from, uint32_t to, const json_t *source, size_t n)
{
    const json_t *tools = json_object_get(source, "tools"), *calls = json_object_get(source, "calls_max");
    json_int_t calls_max = calls != NULL ? json_integer_value(calls) : CALLS_MAX;
    size_t n_tool = json_array_size(tools);
    if (n_tool == 0 || n_tool > TOOLS_MAX || calls_max < 1 || calls_max > CALLS_MAX) {
        gm_build_fail(b, CM_E_INVALID, "/tools", "there must be 1 to %d tools and 1 to %d calls", TOOLS_MAX,
                      CALLS_MAX);
        return;
    }
    sc_compiler c;
    sc_init(&c, b, 3 * n); /* each schema may be wanted whole, as text, and without text */
    uint32_t begin = from;
    if (json_is_true(json_object_get(source, "text"))) {
        begin = gm_state_new(b);
        gm_call(b, from, begin, gm_any_char_rule(b, GM_RAW), 0, GM_INF);
        gm_empty(b, begin, to);
    } else if (json_object_get(source, "schema") != NULL) {
        sc_want all = {SC_ALL, GM_JSON};
        const json_t *schema = json_object_get(source, "schema");
        gm_call(b, from, to, sc_rule(&c, schema, schema, all, "/schema"), 1, 1);
    }
    put_block(&c, begin, to, tools, (uint32_t)calls_max);
    sc_fill(&c);
    sc_fini(&c);
}

void gm_tools_text(gm_build *b, uint32_t from, uint32_t to, const char *source, size_t n)
{
    json_error_t error;
    json_t *json = json_loadb(source, n, JSON_REJECT_DUPLICATES, &error);
    if (!json_is_object(json)) {
        gm_build_fail(b, CM_E_INVALID, NULL, "it is no JSON object: line %d: %s", error.line, error.text);
    } else {
        put_source(b, from, to, json, n);
    }
    json_decref(json);
}
