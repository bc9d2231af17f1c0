/* What the keywords of a schema are, and what can be told of a schema without compiling it. */
#include <string.h>

#include "common/grammar/schema_private.h"

enum { RESOLVE_DEPTH_MAX = 16 };

typedef enum keyword_kind {
    KEYWORD_SAYS, /* supported */
    KEYWORD_NOTE, /* an annotation: says nothing about which values satisfy */
    KEYWORD_NOT,  /* says something that cannot be honoured */
} keyword_kind;

typedef struct keyword {
    const char *name;
    keyword_kind kind;
    uint32_t types; /* it speaks about; 0: all or none */
} keyword;

static const keyword KEYWORDS[] = {
    {"type", KEYWORD_SAYS, 0},
    {"enum", KEYWORD_SAYS, 0},
    {"const", KEYWORD_SAYS, 0},
    {"anyOf", KEYWORD_SAYS, 0},
    {"oneOf", KEYWORD_SAYS, 0},
    {"allOf", KEYWORD_SAYS, 0},
    {"$ref", KEYWORD_SAYS, 0},
    {"properties", KEYWORD_SAYS, SC_OBJECT},
    {"required", KEYWORD_SAYS, SC_OBJECT},
    {"additionalProperties", KEYWORD_SAYS, SC_OBJECT},
    {"items", KEYWORD_SAYS, SC_ARRAY},
    {"prefixItems", KEYWORD_SAYS, SC_ARRAY},
    {"minItems", KEYWORD_SAYS, SC_ARRAY},
    {"maxItems", KEYWORD_SAYS, SC_ARRAY},
    {"pattern", KEYWORD_SAYS, SC_STRING},
    {"minLength", KEYWORD_SAYS, SC_STRING},
    {"maxLength", KEYWORD_SAYS, SC_STRING},
    {"format", KEYWORD_SAYS, 0}, /* of anything but a string it is an annotation */
    {"minimum", KEYWORD_SAYS, SC_NUMBER},
    {"maximum", KEYWORD_SAYS, SC_NUMBER},
    {"exclusiveMinimum", KEYWORD_SAYS, SC_NUMBER},
    {"exclusiveMaximum", KEYWORD_SAYS, SC_NUMBER},
    {"multipleOf", KEYWORD_SAYS, SC_NUMBER},
    {"$defs", KEYWORD_NOTE, 0},
    {"definitions", KEYWORD_NOTE, 0},
    {"title", KEYWORD_NOTE, 0},
    {"description", KEYWORD_NOTE, 0},
    {"default", KEYWORD_NOTE, 0},
    {"example", KEYWORD_NOTE, 0},
    {"examples", KEYWORD_NOTE, 0},
    {"deprecated", KEYWORD_NOTE, 0},
    {"readOnly", KEYWORD_NOTE, 0},
    {"writeOnly", KEYWORD_NOTE, 0},
    {"discriminator", KEYWORD_NOTE, 0},
    {"contentEncoding", KEYWORD_NOTE, 0},
    {"contentMediaType", KEYWORD_NOTE, 0},
    {"$schema", KEYWORD_NOTE, 0},
    {"$id", KEYWORD_NOTE, 0},
    {"$comment", KEYWORD_NOTE, 0},
    {"not", KEYWORD_NOT, 0},
    {"if", KEYWORD_NOT, 0},
    {"then", KEYWORD_NOT, 0},
    {"else", KEYWORD_NOT, 0},
    {"patternProperties", KEYWORD_NOT, SC_OBJECT},
    {"propertyNames", KEYWORD_NOT, SC_OBJECT},
    {"minProperties", KEYWORD_NOT, SC_OBJECT},
    {"maxProperties", KEYWORD_NOT, SC_OBJECT},
    {"dependentRequired", KEYWORD_NOT, SC_OBJECT},
    {"dependentSchemas", KEYWORD_NOT, SC_OBJECT},
    {"dependencies", KEYWORD_NOT, SC_OBJECT},
    {"unevaluatedProperties", KEYWORD_NOT, SC_OBJECT},
    {"unevaluatedItems", KEYWORD_NOT, SC_ARRAY},
    {"additionalItems", KEYWORD_NOT, SC_ARRAY},
    {"contains", KEYWORD_NOT, SC_ARRAY},
    {"minContains", KEYWORD_NOT, SC_ARRAY},
    {"maxContains", KEYWORD_NOT, SC_ARRAY},
    {"uniqueItems", KEYWORD_NOT, SC_ARRAY},
    {"$anchor", KEYWORD_NOT, 0},
    {"$dynamicRef", KEYWORD_NOT, 0},
    {"$dynamicAnchor", KEYWORD_NOT, 0},
    {"$recursiveRef", KEYWORD_NOT, 0},
};

static const keyword *keyword_find(const char *name)
{
    static const keyword extension = {"x-", KEYWORD_NOTE, 0};
    for (size_t i = 0; i < sizeof(KEYWORDS) / sizeof(KEYWORDS[0]); i++) {
        if (strcmp(KEYWORDS[i].name, name) == 0) {
            return &KEYWORDS[i];
        }
    }
    return strncmp(name, "x-", 2) == 0 ? &extension : NULL;
}

/* A keyword that we cannot honour, with the value that says nothing. */
static bool is_neutral(const char *name, const json_t *value)
{
    if (strcmp(name, "uniqueItems") == 0) {
        return json_is_false(value);
    }
    if (strcmp(name, "minProperties") == 0 || strcmp(name, "minContains") == 0) {
        return json_is_integer(value) && json_integer_value(value) == 0;
    }
    return strncmp(name, "unevaluated", 11) == 0 && json_is_true(value);
}

bool sc_check_keywords(gm_build *b, const json_t *schema, const char *path)
{
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)schema, name, value)
    {
        const keyword *k = keyword_find(name);
        if (k == NULL) {
            gm_build_fail(b, CM_E_INVALID, path,
                          "%.64s is no keyword of JSON schema known here: leave it out", name);
            return false;
        }
        if (k->kind == KEYWORD_NOT && !is_neutral(name, value)) {
            gm_build_fail(b, CM_E_UNSUPPORTED, path,
                          "%s is not supported: leave it out and say it in the prompt", name);
            return false;
        }
    }
    return true;
}

const char *sc_other_keyword(const json_t *schema, const char *const *these)
{
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)schema, name, value)
    {
        const keyword *k = keyword_find(name);
        bool listed = false;
        for (size_t i = 0; these[i] != NULL; i++) {
            listed |= strcmp(these[i], name) == 0;
        }
        if (k != NULL && k->kind == KEYWORD_SAYS && !listed) {
            return name;
        }
    }
    return NULL;
}

/* ---- types ---- */

uint32_t sc_type_of(const json_t *value)
{
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return SC_OBJECT;
    case JSON_ARRAY:
        return SC_ARRAY;
    case JSON_STRING:
        return SC_STRING;
    case JSON_INTEGER:
        return SC_INTEGER;
    case JSON_REAL:
        return SC_FRACTION;
    case JSON_NULL:
        return SC_NULL;
    default:
        return SC_BOOL;
    }
}

static uint32_t type_named(const char *name)
{
    static const struct {
        const char *name;
        uint32_t types;
    } names[] = {{"null", SC_NULL},     {"boolean", SC_BOOL},  {"integer", SC_INTEGER}, {"number", SC_NUMBER},
                 {"string", SC_STRING}, {"object", SC_OBJECT}, {"array", SC_ARRAY}};
    for (size_t i = 0; name != NULL && i < sizeof(names) / sizeof(names[0]); i++) {
        if (strcmp(names[i].name, name) == 0) {
            return names[i].types;
        }
    }
    return 0;
}

/* Without a type: what its keywords speak about, everything when they speak about nothing. */
static uint32_t types_spoken_of(const json_t *schema)
{
    uint32_t types = 0;
    const char *name;
    json_t *value;
    json_object_foreach((json_t *)(uintptr_t)schema, name, value)
    {
        const keyword *k = keyword_find(name);
        types |= k != NULL && k->kind == KEYWORD_SAYS ? k->types : 0;
        types |= strcmp(name, "format") == 0 ? SC_STRING : 0;
    }
    return types != 0 ? types : SC_ALL;
}

static uint32_t types_of_list(const json_t *list, const json_t *root, uint32_t depth);

static uint32_t types_at(const json_t *schema, const json_t *root, uint32_t depth)
{
    const json_t *at;
    size_t i;
    uint32_t types = 0;
    if (depth > RESOLVE_DEPTH_MAX || !json_is_object(schema)) {
        return json_is_false(schema) ? 0 : SC_ALL;
    }
    if ((at = json_object_get(schema, "$ref")) != NULL) {
        const json_t *target = sc_resolve(root, json_string_value(at));
        return target != NULL ? types_at(target, root, depth + 1) : SC_ALL;
    }
    if ((at = json_object_get(schema, "const")) != NULL) {
        types = sc_type_of(at);
    } else if ((at = json_object_get(schema, "enum")) != NULL) {
        for (i = 0; i < json_array_size(at); i++) {
            types |= sc_type_of(json_array_get(at, i));
        }
    } else if ((at = json_object_get(schema, "anyOf")) != NULL ||
               (at = json_object_get(schema, "oneOf")) != NULL ||
               (at = json_object_get(schema, "allOf")) != NULL) {
        types = types_of_list(at, root, depth + 1);
    } else {
        types = SC_ALL;
    }
    const json_t *type = json_object_get(schema, "type");
    if (json_is_string(type)) {
        return types & type_named(json_string_value(type));
    }
    if (json_is_array(type)) {
        uint32_t any = 0;
        for (i = 0; i < json_array_size(type); i++) {
            any |= type_named(json_string_value(json_array_get(type, i)));
        }
        return types & any;
    }
    return types & types_spoken_of(schema);
}

static uint32_t types_of_list(const json_t *list, const json_t *root, uint32_t depth)
{
    uint32_t types = 0;
    for (size_t i = 0; i < json_array_size(list); i++) {
        types |= types_at(json_array_get(list, i), root, depth);
    }
    return types;
}

uint32_t sc_types(const json_t *schema, const json_t *root)
{
    return types_at(schema, root, 0);
}

/* ---- references ---- */

/* A segment of a JSON pointer; false: it is too long or badly escaped. */
static bool pointer_segment(const char *text, size_t n, char *out, size_t n_out)
{
    size_t at = 0;
    for (size_t i = 0; i < n; i++) {
        char c = text[i];
        if (c == '~' && i + 1 < n && (text[i + 1] == '0' || text[i + 1] == '1')) {
            c = text[++i] == '0' ? '~' : '/';
        }
        if (c == '%' || at + 1 >= n_out) {
            return false; /* percent escapes belong to URIs: nobody writes them here */
        }
        out[at++] = c;
    }
    out[at] = '\0';
    return true;
}

const json_t *sc_resolve(const json_t *root, const char *reference)
{
    char key[512];
    const json_t *at = root;
    if (reference == NULL || reference[0] != '#') {
        return NULL;
    }
    for (const char *p = reference + 1; at != NULL && *p != '\0';) {
        size_t n = strcspn(p + 1, "/");
        if (*p != '/' || !pointer_segment(p + 1, n, key, sizeof(key))) {
            return NULL;
        }
        at =
            json_is_array(at) ? json_array_get(at, (size_t)strtoul(key, NULL, 10)) : json_object_get(at, key);
        p += 1 + n;
    }
    return at;
}

/* ---- what excludes each other ---- */

static const json_t *follow(const json_t *schema, const json_t *root)
{
    for (uint32_t i = 0; i < RESOLVE_DEPTH_MAX && json_object_get(schema, "$ref") != NULL; i++) {
        schema = sc_resolve(root, json_string_value(json_object_get(schema, "$ref")));
    }
    return schema;
}

/* The only values there are: an enum or one const. A new reference, NULL: there may be others. */
static json_t *values_of(const json_t *schema)
{
    json_t *one = json_object_get(schema, "const"), *many = json_object_get(schema, "enum");
    return one != NULL ? json_pack("[O]", one) : json_incref(many);
}

static bool values_disjoint(const json_t *a, const json_t *b)
{
    json_t *of_a = values_of(a), *of_b = values_of(b);
    bool disjoint = of_a != NULL && of_b != NULL;
    for (size_t i = 0; disjoint && i < json_array_size(of_a); i++) {
        for (size_t k = 0; disjoint && k < json_array_size(of_b); k++) {
            disjoint = !json_equal(json_array_get(of_a, i), json_array_get(of_b, k));
        }
    }
    json_decref(of_a);
    json_decref(of_b);
    return disjoint;
}

static bool is_required(const json_t *schema, const char *name)
{
    const json_t *list = json_object_get(schema, "required");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *one = json_string_value(json_array_get(list, i));
        if (one != NULL && strcmp(one, name) == 0) {
            return true;
        }
    }
    return false;
}

/* Both demand a property that cannot have the same value. */
static bool told_apart_by_a_property(const json_t *a, const json_t *b, const json_t *root)
{
    const char *name;
    json_t *of_a;
    json_object_foreach(json_object_get(a, "properties"), name, of_a)
    {
        const json_t *of_b = json_object_get(json_object_get(b, "properties"), name);
        if (of_b != NULL && is_required(a, name) && is_required(b, name) &&
            values_disjoint(follow(of_a, root), follow(of_b, root))) {
            return true;
        }
    }
    return false;
}

bool sc_disjoint(const json_t *a, const json_t *b, const json_t *root)
{
    uint32_t shared = sc_types(a, root) & sc_types(b, root);
    a = follow(a, root);
    b = follow(b, root);
    return shared == 0 || values_disjoint(a, b) ||
           (shared == SC_OBJECT && told_apart_by_a_property(a, b, root));
}
