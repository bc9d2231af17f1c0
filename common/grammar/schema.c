/* JSON schema to rules. What is written satisfies the schema; where a schema allows more than can sensibly be
 * written, less is written: members come in the order of `properties`, a schema with `properties` has no
 * other members unless additionalProperties says so (as OpenAI's strict mode demands it), one with
 * prefixItems no other items unless items says so, one without a type has the types that its keywords speak
 * about. oneOf is anyOf whose alternatives can be seen to exclude each other; of allOf one schema alone is
 * supported. */
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/grammar/schema_private.h"
#include "common/model/chat.h"

enum { SCHEMAS_MAX = 100000, ONE_OF_MAX = 64, PATH_BYTES = 96, MEMBERS_MAX = 800 };

static const sc_want WANT_JSON = {SC_ALL, GM_JSON};

/* ---- rules of schemas ---- */

void sc_init(sc_compiler *c, gm_build *b, size_t n_source)
{
    *c = (sc_compiler){.b = b};
    cm_map_init(&c->rules, (uint32_t)(n_source / 2 + 16));
}

void sc_fini(sc_compiler *c)
{
    for (uint32_t i = 0; i < c->n_item; i++) {
        cm_free(c->items[i].path);
    }
    cm_free(c->items);
    cm_map_fini(&c->rules);
}

static sc_item *item_new(sc_compiler *c)
{
    if (c->n_item == c->cap) {
        c->cap = c->cap > 0 ? 2 * c->cap : 64;
        c->items = cm_realloc(c->items, sizeof(sc_item) * c->cap);
    }
    return &c->items[c->n_item++];
}

uint32_t sc_rule(sc_compiler *c, const json_t *schema, const json_t *root, sc_want want, const char *path)
{
    uint64_t key = (uint64_t)(uintptr_t)schema << 8 | want.types << 1 | want.spelling;
    uintptr_t known = (uintptr_t)cm_map_get(&c->rules, key);
    if (known != 0) {
        return c->items[known - 1].rule;
    }
    if (c->rules.n_used == c->rules.n_max || c->n_item == SCHEMAS_MAX) {
        gm_build_fail(c->b, CM_E_TOO_LONG, path, "more than %d schemas inside each other", SCHEMAS_MAX);
        return 0;
    }
    uint32_t rule = gm_rule_new(c->b, path);
    *item_new(c) =
        (sc_item){.schema = schema, .root = root, .want = want, .rule = rule, .path = cm_strdup(path)};
    cm_status status = cm_map_put(&c->rules, key, (void *)(uintptr_t)c->n_item);
    CM_ASSERT(status == CM_OK);
    return rule;
}

/* path/name, its beginning cut off when it is too long: the end says where. out may be path. */
static const char *path_to(char out[PATH_BYTES], const char *path, const char *name)
{
    cm_bytes whole;
    cm_bytes_init(&whole, 0);
    cm_bytes_printf(&whole, "%s/%s", path, name);
    size_t cut = whole.len >= PATH_BYTES ? whole.len - (PATH_BYTES - 4) : 0;
    snprintf(out, PATH_BYTES, "%s%.*s", cut > 0 ? "..." : "", PATH_BYTES - 4, cm_bytes_text(&whole) + cut);
    cm_bytes_fini(&whole);
    return out;
}

static const char *path_to_item(char out[PATH_BYTES], const char *path, const char *name, size_t i)
{
    char step[64];
    snprintf(step, sizeof(step), "%s/%zu", name, i);
    return path_to(out, path, step);
}

/* ---- one schema ---- */

/* The schema that is being filled in. */
typedef struct filling {
    sc_compiler *c;
    gm_build *b;
    const json_t *schema, *root;
    sc_want want;
    const char *path;
    uint32_t from, to;
} filling;

static const json_t *get(const filling *f, const char *name)
{
    return json_object_get(f->schema, name);
}

static void refuse(const filling *f, cm_status status, const char *what)
{
    gm_build_fail(f->b, status, f->path, "%s", what);
}

static uint32_t rule_of(const filling *f, const json_t *schema, const char *path)
{
    return sc_rule(f->c, schema, f->root, WANT_JSON, path);
}

/* The same kind of thing, of another schema that says all there is. */
static void fill_as(const filling *f, const json_t *schema, const char *path)
{
    gm_call(f->b, f->from, f->to, sc_rule(f->c, schema, f->root, f->want, path), 1, 1);
}

static bool stands_alone(const filling *f, const char *const *these)
{
    const char *other = sc_other_keyword(f->schema, these);
    if (other != NULL) {
        gm_build_fail(f->b, CM_E_UNSUPPORTED, f->path,
                      "%s beside %s is not supported: move it into the other schema", other, these[0]);
    }
    return other == NULL;
}

static void fill_reference(const filling *f)
{
    static const char *const these[] = {"$ref", NULL};
    const char *reference = json_string_value(get(f, "$ref"));
    const json_t *target = sc_resolve(f->root, reference);
    if (target == NULL) {
        gm_build_fail(f->b, CM_E_INVALID, f->path,
                      "$ref %.64s names nothing in this schema: it must be # or begin with #/",
                      reference != NULL ? reference : "is no string and");
    } else if (stands_alone(f, these)) {
        fill_as(f, target, reference + 1);
    }
}

/* Values written out. */
static void fill_values(const filling *f, const json_t *list)
{
    size_t n = json_array_size(list), n_word = 0;
    cm_bytes *texts = cm_alloc(sizeof(*texts) * (n + 1));
    gm_word *words = cm_alloc(sizeof(*words) * (n + 1));
    for (size_t i = 0; i < n; i++) {
        const json_t *value = json_array_get(list, i);
        if ((sc_type_of(value) & f->want.types) == 0) {
            continue;
        }
        cm_bytes_init(&texts[n_word], 0);
        if (f->want.spelling == GM_RAW) {
            cm_bytes_append(&texts[n_word], json_string_value(value), json_string_length(value));
        } else {
            md_json_dumps(value, &texts[n_word]);
        }
        words[n_word] = (gm_word){cm_bytes_text(&texts[n_word]), texts[n_word].len};
        n_word++;
    }
    gm_words(f->b, f->from, f->to, words, n_word);
    for (size_t i = 0; i < n_word; i++) {
        cm_bytes_fini(&texts[i]);
    }
    cm_free(texts);
    cm_free(words);
}

static void fill_enum(const filling *f)
{
    static const char *const of_enum[] = {"enum", "type", NULL}, *const of_const[] = {"const", "type", NULL};
    const json_t *one = get(f, "const"), *many = get(f, "enum");
    filling typed = *f;
    if (many != NULL && (!json_is_array(many) || json_array_size(many) == 0)) {
        refuse(f, CM_E_INVALID, "enum must be a list of at least one value");
        return;
    }
    if (!stands_alone(f, one != NULL ? of_const : of_enum)) {
        return;
    }
    typed.want.types &= sc_types(f->schema, f->root);
    json_t *list = one != NULL ? json_pack("[O]", one) : json_incref((json_t *)(uintptr_t)many);
    fill_values(&typed, list);
    json_decref(list);
}

static bool alternatives_disjoint(const filling *f, const json_t *list)
{
    size_t n = json_array_size(list);
    for (size_t i = 0; i < n; i++) {
        for (size_t k = i + 1; k < n; k++) {
            if (n > ONE_OF_MAX || !sc_disjoint(json_array_get(list, i), json_array_get(list, k), f->root)) {
                gm_build_fail(
                    f->b, CM_E_UNSUPPORTED, f->path,
                    "oneOf is supported where its alternatives exclude each other by their types or by a "
                    "required property with const, %zu and %zu do not: use anyOf",
                    i, k);
                return false;
            }
        }
    }
    return true;
}

/* A type beside the alternatives must be theirs already. */
static bool types_agree(const filling *f, const json_t *list)
{
    uint32_t types = get(f, "type") != NULL ? sc_types(f->schema, f->root) : SC_ALL, all = 0;
    for (size_t i = 0; i < json_array_size(list); i++) {
        all |= sc_types(json_array_get(list, i), f->root);
    }
    if ((all & ~types) != 0) {
        refuse(f, CM_E_UNSUPPORTED,
               "the type beside the alternatives is narrower than theirs: move it into them");
        return false;
    }
    return true;
}

static void fill_alternatives(const filling *f, const char *name, const json_t *list)
{
    const char *const these[] = {name, "type", NULL};
    char path[PATH_BYTES];
    size_t n = json_array_size(list);
    if (n == 0) {
        gm_build_fail(f->b, CM_E_INVALID, f->path, "%s must be a list of at least one schema", name);
        return;
    }
    if (!stands_alone(f, these) || !types_agree(f, list)) {
        return;
    }
    if (strcmp(name, "allOf") == 0 && n > 1) {
        refuse(f, CM_E_UNSUPPORTED, "allOf is supported with one schema only: write them as one");
        return;
    }
    if (strcmp(name, "oneOf") == 0 && !alternatives_disjoint(f, list)) {
        return;
    }
    for (size_t i = 0; i < n; i++) {
        fill_as(f, json_array_get(list, i), path_to_item(path, f->path, name, i));
    }
}

/* ---- numbers ---- */

static void read_bound(const filling *f, const char *closed, const char *open, bool least, gm_bounds *bounds)
{
    const json_t *is = get(f, closed), *beyond = get(f, open);
    bool has = is != NULL || beyond != NULL;
    if ((is != NULL && !json_is_number(is)) || (beyond != NULL && !json_is_number(beyond))) {
        gm_build_fail(f->b, CM_E_INVALID, f->path, "%s and %s must be numbers", closed, open);
        return;
    }
    double a = json_number_value(is), z = json_number_value(beyond);
    bool outer =
        is == NULL || (beyond != NULL && (least ? z >= a : z <= a)); /* the open one is the narrower */
    if (least) {
        bounds->has_min = has;
        bounds->open_min = has && outer;
        bounds->min = outer ? z : a;
    } else {
        bounds->has_max = has;
        bounds->open_max = has && outer;
        bounds->max = outer ? z : a;
    }
}

static void fill_number(const filling *f, uint32_t types)
{
    gm_bounds bounds = {0};
    const json_t *multiple = get(f, "multipleOf");
    double step = json_number_value(multiple);
    read_bound(f, "minimum", "exclusiveMinimum", true, &bounds);
    read_bound(f, "maximum", "exclusiveMaximum", false, &bounds);
    if (multiple != NULL && !(step >= 1 && step < 1e15 && (double)(int64_t)step >= step)) {
        refuse(f, CM_E_UNSUPPORTED, "multipleOf is supported for integers from 1 only");
    } else if ((types & SC_FRACTION) == 0 || multiple != NULL) {
        gm_integer(f->b, f->from, f->to, &bounds, (int64_t)step, f->path);
    } else {
        gm_number(f->b, f->from, f->to, &bounds, f->path);
    }
}

/* ---- lists ---- */

static uint32_t read_count(const filling *f, const char *name, uint32_t absent)
{
    const json_t *value = get(f, name);
    if (value == NULL) {
        return absent;
    }
    if (!json_is_integer(value) || json_integer_value(value) < 0 || json_integer_value(value) >= GM_INF) {
        gm_build_fail(f->b, CM_E_INVALID, f->path, "%s must be an integer from 0", name);
        return absent;
    }
    return (uint32_t)json_integer_value(value);
}

static void fill_array(const filling *f)
{
    const json_t *items = get(f, "items"), *prefix = get(f, "prefixItems");
    char path[PATH_BYTES];
    size_t n = json_array_size(prefix);
    gm_list list = {.rest = GM_NO_RULE,
                    .n_prefix = (uint32_t)n,
                    .min = read_count(f, "minItems", 0),
                    .max = read_count(f, "maxItems", GM_INF)};
    if (items != NULL && !json_is_object(items) && !json_is_boolean(items)) {
        refuse(f, CM_E_INVALID, "items must be a schema; lists of schemas are prefixItems");
        return;
    }
    if ((prefix != NULL && !json_is_array(prefix)) || list.min > list.max) {
        refuse(f, CM_E_INVALID, "prefixItems must be a list, and minItems not above maxItems");
        return;
    }
    uint32_t *rules = cm_alloc(sizeof(*rules) * (n + 1));
    for (size_t i = 0; i < n; i++) {
        rules[i] = rule_of(f, json_array_get(prefix, i), path_to_item(path, f->path, "prefixItems", i));
    }
    list.prefix = rules;
    if (items != NULL && !json_is_false(items)) {
        list.rest = rule_of(f, items, path_to(path, f->path, "items"));
    } else if (items == NULL && (prefix == NULL || list.min > n)) {
        list.rest = gm_json_value_rule(f->b);
    }
    gm_json_list(f->b, f->from, f->to, &list, f->path);
    cm_free(rules);
}

/* ---- objects ---- */

static bool is_required(const json_t *required, const char *name)
{
    size_t i;
    json_t *one;
    json_array_foreach(required, i, one)
    {
        if (json_is_string(one) && strcmp(json_string_value(one), name) == 0) {
            return true;
        }
    }
    return false;
}

static bool check_object(const filling *f)
{
    const json_t *properties = get(f, "properties"), *required = get(f, "required");
    const json_t *additional = get(f, "additionalProperties");
    size_t i;
    json_t *one;
    if ((properties != NULL && !json_is_object(properties)) ||
        (required != NULL && !json_is_array(required)) ||
        (additional != NULL && !json_is_object(additional) && !json_is_boolean(additional))) {
        refuse(f, CM_E_INVALID,
               "properties must be an object, required a list, additionalProperties a schema or a boolean");
        return false;
    }
    json_array_foreach(required, i, one)
    {
        if (!json_is_string(one)) {
            refuse(f, CM_E_INVALID, "required must be a list of names");
            return false;
        }
    }
    if (json_object_size(properties) + json_array_size(required) > MEMBERS_MAX) {
        gm_build_fail(f->b, CM_E_TOO_LONG, f->path, "more than %d properties of one object", MEMBERS_MAX);
        return false;
    }
    return true;
}

/* Names that are required and not described: any value, or what additionalProperties says. */
static uint32_t add_undescribed(const filling *f, const json_t *properties, uint32_t value,
                                gm_member *members, uint32_t n)
{
    size_t i;
    json_t *name;
    json_t *done = json_object();
    json_array_foreach(get(f, "required"), i, name)
    {
        const char *text = json_string_value(name);
        if (json_object_get(properties, text) != NULL || json_object_get(done, text) != NULL) {
            continue;
        }
        if (value == GM_NO_RULE) {
            gm_build_fail(f->b, CM_E_INVALID, f->path,
                          "required names %.64s, which is no property, and additionalProperties is false",
                          text);
            break;
        }
        json_object_set_new(done, text, json_true());
        members[n++] =
            (gm_member){gm_json_member_rule(f->b, text, strlen(text), value, f->path), .required = true};
    }
    json_decref(done);
    return n;
}

static uint32_t extra_member_rule(const filling *f, const json_t *properties, const json_t *described,
                                  uint32_t value)
{
    uint32_t rule = gm_rule_new(f->b, f->path), colon = gm_state_new(f->b), at = gm_state_new(f->b);
    uint32_t behind = gm_state_new(f->b);
    json_t *names = properties != NULL ? json_copy((json_t *)(uintptr_t)properties) : json_object();
    size_t i;
    json_t *name;
    json_array_foreach(described, i, name)
    {
        json_object_set_new(names, json_string_value(name), json_true());
    }
    if (json_object_size(names) > 0) {
        sc_other_key(f->b, f->b->rules[rule].start, colon, names, f->path);
    } else {
        gm_any_string(f->b, f->b->rules[rule].start, colon, GM_JSON, 0, GM_INF);
    }
    json_decref(names);
    gm_byte(f->b, colon, behind, ':', ':');
    gm_empty(f->b, behind, at);
    gm_byte(f->b, behind, at, ' ', ' ');
    gm_call(f->b, at, f->b->rules[rule].accept, value, 1, 1);
    return rule;
}

static void fill_object(const filling *f)
{
    const json_t *properties = get(f, "properties"), *required = get(f, "required");
    const json_t *additional = get(f, "additionalProperties");
    char path[PATH_BYTES];
    const char *name;
    json_t *schema;
    uint32_t n = 0;
    if (!check_object(f)) {
        return;
    }
    gm_member *members =
        cm_alloc(sizeof(*members) * (json_object_size(properties) + json_array_size(required) + 1));
    json_object_foreach((json_t *)(uintptr_t)properties, name, schema)
    {
        char below[PATH_BYTES];
        path_to(path, path_to(below, f->path, "properties"), name);
        uint32_t value = rule_of(f, schema, path);
        members[n++] = (gm_member){gm_json_member_rule(f->b, name, strlen(name), value, path),
                                   is_required(required, name)};
    }
    bool closed = json_is_false(additional), silent = additional == NULL;
    uint32_t value = closed ? GM_NO_RULE
                     : silent || json_is_true(additional)
                         ? gm_json_value_rule(f->b)
                         : rule_of(f, additional, path_to(path, f->path, "additionalProperties"));
    n = add_undescribed(f, properties, value, members, n);
    bool more = !closed && (!silent || properties == NULL);
    gm_json_members(f->b, f->from, f->to, members, n,
                    more ? extra_member_rule(f, properties, required, value) : GM_NO_RULE);
    cm_free(members);
}

/* ---- all ---- */

static bool check_types(const filling *f)
{
    const json_t *type = get(f, "type"), *one;
    size_t n = json_is_array(type) ? json_array_size(type) : 1;
    for (size_t i = 0; type != NULL && i < n; i++) {
        one = json_is_array(type) ? json_array_get(type, i) : type;
        json_t *probe = json_pack("{s:O}", "type", one);
        bool known = json_is_string(one) && sc_types(probe, probe) != 0;
        json_decref(probe);
        if (!known) {
            refuse(
                f, CM_E_INVALID,
                "type must be null, boolean, integer, number, string, object or array, or a list of those");
            return false;
        }
    }
    return true;
}

static void fill_types(const filling *f)
{
    uint32_t types = sc_types(f->schema, f->root) & f->want.types;
    if ((types & SC_NULL) != 0) {
        gm_text(f->b, f->from, f->to, "null");
    }
    if ((types & SC_BOOL) != 0) {
        gm_text(f->b, f->from, f->to, "true");
        gm_text(f->b, f->from, f->to, "false");
    }
    if ((types & SC_NUMBER) != 0) {
        fill_number(f, types);
    }
    if ((types & SC_STRING) != 0) {
        sc_string(f->b, f->schema, f->from, f->to, f->want.spelling, f->path);
    }
    if ((types & SC_ARRAY) != 0) {
        fill_array(f);
    }
    if ((types & SC_OBJECT) != 0) {
        fill_object(f);
    }
}

static void fill(const filling *f)
{
    static const char *const lists[] = {"anyOf", "oneOf", "allOf"};
    if (json_is_false(f->schema)) {
        return; /* nothing satisfies it */
    }
    if (!json_is_object(f->schema) && !json_is_true(f->schema)) {
        refuse(f, CM_E_INVALID, "a schema must be an object or a boolean");
        return;
    }
    if (json_is_object(f->schema) && (!sc_check_keywords(f->b, f->schema, f->path) || !check_types(f))) {
        return;
    }
    if (get(f, "$ref") != NULL) {
        fill_reference(f);
        return;
    }
    if (get(f, "enum") != NULL || get(f, "const") != NULL) {
        fill_enum(f);
        return;
    }
    for (size_t i = 0; i < 3; i++) {
        if (get(f, lists[i]) != NULL) {
            fill_alternatives(f, lists[i], get(f, lists[i]));
            return;
        }
    }
    fill_types(f);
}

void sc_fill(sc_compiler *c)
{
    while (c->n_done < c->n_item && c->b->status == CM_OK) {
        sc_item item = c->items[c->n_done++];
        filling f = {.c = c,
                     .b = c->b,
                     .schema = item.schema,
                     .root = item.root,
                     .want = item.want,
                     .path = item.path,
                     .from = c->b->rules[item.rule].start,
                     .to = c->b->rules[item.rule].accept};
        fill(&f);
    }
}

void gm_schema_text(gm_build *b, uint32_t from, uint32_t to, const char *source, size_t n)
{
    json_error_t error;
    sc_compiler c;
    json_t *schema = json_loadb(source, n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &error);
    if (schema == NULL) {
        gm_build_fail(b, CM_E_INVALID, NULL, "it is not JSON: line %d: %s", error.line, error.text);
        return;
    }
    sc_init(&c, b, n);
    gm_call(b, from, to, sc_rule(&c, schema, schema, WANT_JSON, ""), 1, 1);
    sc_fill(&c);
    sc_fini(&c);
    json_decref(schema);
}
