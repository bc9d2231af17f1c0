/* Strings of a schema: lengths, patterns, formats, and keys that are none of the named ones. */
#include <string.h>

#include "common/base/mem.h"
#include "common/grammar/schema_private.h"

#define DAYS_                                                                                                \
    "[12]\\d{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\\d|30)|"         \
    "02-(?:0[1-9]|1\\d|2[0-8]))"
#define CLOCK_  "(?:[01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(?:\\.\\d{1,6})?(?:Z|[+-](?:[01]\\d|2[0-3]):[0-5]\\d)"
#define LABEL_  "[a-z0-9](?:[a-z0-9-]{0,20}[a-z0-9])?"
#define HOST_   LABEL_ "(?:\\." LABEL_ "){0,4}"
#define OCTET_  "(?:25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)"
#define H16_    "[0-9a-f]{1,4}"
#define NUMBER_ "\\d{1,4}"
#define TIMES_                                                                                               \
    "T(?:" NUMBER_ "H(?:" NUMBER_ "M)?(?:" NUMBER_ "S)?|" NUMBER_ "M(?:" NUMBER_ "S)?|" NUMBER_ "S)"
#define DAYSPAN_                                                                                             \
    "(?:" NUMBER_ "Y(?:" NUMBER_ "M(?:" NUMBER_ "D)?)?|" NUMBER_ "M(?:" NUMBER_ "D)?|" NUMBER_ "D)"
#define IPV6_AFTER_(before_, after_) "|(?:" H16_ ":){1," before_ "}(?::" H16_ "){1," after_ "}"

/* What is written is of the format; not everything of the format can be written. */
static const struct {
    const char *name, *pattern;
} FORMATS[] = {
    {"date", DAYS_},
    {"time", CLOCK_},
    {"date-time", DAYS_ "T" CLOCK_},
    {"duration", "P(?:" NUMBER_ "W|" DAYSPAN_ "(?:" TIMES_ ")?|" TIMES_ ")"},
    {"email", "[a-z0-9_+-]{1,32}(?:\\.[a-z0-9_+-]{1,32}){0,2}@" LABEL_ "(?:\\." LABEL_ "){1,3}"},
    {"hostname", HOST_},
    {"ipv4", OCTET_ "(?:\\." OCTET_ "){3}"},
    {"ipv6", "(?:" H16_ ":){7}" H16_ "|(?:" H16_ ":){1,7}:|:(?:(?::" H16_ "){1,7}|:)" IPV6_AFTER_("6", "1")
                 IPV6_AFTER_("5", "2") IPV6_AFTER_("4", "3") IPV6_AFTER_("3", "4") IPV6_AFTER_("2", "5")},
    {"uuid", "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"},
    {"uri", "https?://" HOST_ "(?::\\d{1,4})?(?:/[A-Za-z0-9._~-]{0,40}){0,8}(?:\\?[A-Za-z0-9._~=&-]{0,80})?"},
};

static void put_quoted(gm_build *b, uint32_t from, uint32_t to, const char *pattern, size_t n, bool search,
                       gm_spelling spelling, const char *path)
{
    uint32_t begin = from, end = to;
    if (spelling == GM_JSON) {
        begin = gm_state_new(b);
        end = gm_state_new(b);
        gm_byte(b, from, begin, '"', '"');
        gm_byte(b, end, to, '"', '"');
    }
    gm_regex(b, begin, end, pattern, n, spelling, search, path);
}

static void put_format(gm_build *b, uint32_t from, uint32_t to, const char *name, gm_spelling spelling,
                       const char *path)
{
    for (size_t i = 0; i < sizeof(FORMATS) / sizeof(FORMATS[0]); i++) {
        if (strcmp(FORMATS[i].name, name) == 0) {
            put_quoted(b, from, to, FORMATS[i].pattern, strlen(FORMATS[i].pattern), false, spelling, path);
            return;
        }
    }
    gm_build_fail(
        b, CM_E_UNSUPPORTED, path,
        "format %.32s is not supported: date-time, time, date, duration, email, hostname, ipv4, ipv6, "
        "uuid and uri are",
        name);
}

static uint32_t read_length(gm_build *b, const json_t *schema, const char *name, uint32_t absent,
                            const char *path)
{
    const json_t *value = json_object_get(schema, name);
    if (value == NULL) {
        return absent;
    }
    if (!json_is_integer(value) || json_integer_value(value) < 0 || json_integer_value(value) >= GM_INF) {
        gm_build_fail(b, CM_E_INVALID, path, "%s must be an integer from 0", name);
        return absent;
    }
    return (uint32_t)json_integer_value(value);
}

void sc_string(gm_build *b, const json_t *schema, uint32_t from, uint32_t to, gm_spelling spelling,
               const char *path)
{
    const json_t *pattern = json_object_get(schema, "pattern"), *format = json_object_get(schema, "format");
    uint32_t min = read_length(b, schema, "minLength", 0, path);
    uint32_t max = read_length(b, schema, "maxLength", GM_INF, path);
    bool lengths = min > 0 || max != GM_INF;
    if ((pattern != NULL && !json_is_string(pattern)) || (format != NULL && !json_is_string(format))) {
        gm_build_fail(b, CM_E_INVALID, path, "pattern and format must be strings");
    } else if ((pattern != NULL) + (format != NULL) + lengths > 1) {
        gm_build_fail(
            b, CM_E_UNSUPPORTED, path,
            "only one of pattern, format and lengths is supported at a time: put the lengths into the "
            "pattern");
    } else if (pattern != NULL) {
        put_quoted(b, from, to, json_string_value(pattern), json_string_length(pattern), true, spelling,
                   path);
    } else if (format != NULL) {
        put_format(b, from, to, json_string_value(format), spelling, path);
    } else {
        gm_any_string(b, from, to, spelling, min, max);
    }
}

/* ---- keys that are none of the properties ----
 * A tree of the properties' names by characters: where a key leaves the tree, anything may follow; in the
 * tree it may end only where no name does. Such keys have no escapes, by which a name could be spelled again.
 */

typedef struct key_node {
    uint32_t code, child, next; /* 0: none; node 0 is the root */
    uint32_t state;
    bool is_name;
} key_node;

typedef struct key_tree {
    key_node *nodes;
    uint32_t n, cap;
} key_tree;

static uint32_t key_child(key_tree *tree, uint32_t parent, uint32_t code)
{
    for (uint32_t i = tree->nodes[parent].child; i != 0; i = tree->nodes[i].next) {
        if (tree->nodes[i].code == code) {
            return i;
        }
    }
    if (tree->n == tree->cap) {
        tree->cap *= 2;
        tree->nodes = cm_realloc(tree->nodes, sizeof(key_node) * tree->cap);
    }
    tree->nodes[tree->n] = (key_node){.code = code, .next = tree->nodes[parent].child};
    tree->nodes[parent].child = tree->n;
    return tree->n++;
}

/* text is UTF-8: jansson has checked it. */
static uint32_t next_code(const char **text)
{
    uint8_t lead = (uint8_t) * (*text)++;
    uint32_t n = lead < 0x80   ? 0
                 : lead < 0xe0 ? 1
                 : lead < 0xf0 ? 2
                               : 3,
             code = n == 0 ? lead : lead & (0x3fu >> n);
    for (; n > 0; n--) {
        code = code << 6 | ((uint8_t) * (*text)++ & 0x3f);
    }
    return code;
}

static void key_add(key_tree *tree, const char *name)
{
    uint32_t at = 0;
    while (*name != '\0') {
        at = key_child(tree, at, next_code(&name));
    }
    tree->nodes[at].is_name = true;
}

static void plain_set(gm_set *set)
{
    *set = (gm_set){0};
    gm_set_add(set, 0x20, '"' - 1);
    gm_set_add(set, '"' + 1, '\\' - 1);
    gm_set_add(set, '\\' + 1, 0x10ffff);
}

static void key_node_put(gm_build *b, const key_tree *tree, uint32_t at, uint32_t away, uint32_t end)
{
    gm_set named = {0}, one;
    for (uint32_t i = tree->nodes[at].child; i != 0; i = tree->nodes[i].next) {
        one = (gm_set){0};
        gm_set_add(&one, tree->nodes[i].code, tree->nodes[i].code);
        gm_char(b, tree->nodes[at].state, tree->nodes[i].state, &one, GM_RAW);
        gm_set_join(&named, &one);
    }
    gm_set_add(&named, 0, 0x1f);
    gm_set_add(&named, '"', '"');
    gm_set_add(&named, '\\', '\\');
    if (named.overflow) {
        gm_build_fail(b, CM_E_TOO_LONG, NULL, "too many properties beside additionalProperties");
    }
    gm_set_negate(&named);
    gm_char(b, tree->nodes[at].state, away, &named, GM_RAW);
    if (!tree->nodes[at].is_name) {
        gm_byte(b, tree->nodes[at].state, end, '"', '"');
    }
}

void sc_other_key(gm_build *b, uint32_t from, uint32_t to, const json_t *properties, const char *path)
{
    key_tree tree = {.nodes = cm_alloc(sizeof(key_node) * 64), .n = 1, .cap = 64};
    uint32_t away = gm_state_new(b), begin = gm_state_new(b), rule = gm_rule_new(b, path);
    const char *name;
    json_t *value;
    gm_set plain;
    plain_set(&plain);
    gm_char(b, b->rules[rule].start, b->rules[rule].accept, &plain, GM_RAW);
    json_object_foreach((json_t *)(uintptr_t)properties, name, value)
    {
        key_add(&tree, name);
    }
    gm_byte(b, from, begin, '"', '"');
    for (uint32_t i = 0; i < tree.n; i++) {
        tree.nodes[i].state = i > 0 ? gm_state_new(b) : begin;
    }
    for (uint32_t i = 0; i < tree.n && b->status == CM_OK; i++) {
        key_node_put(b, &tree, i, away, to);
    }
    uint32_t end = gm_state_new(b);
    gm_call(b, away, end, rule, 0, GM_INF);
    gm_byte(b, end, to, '"', '"');
    cm_free(tree.nodes);
}
