/* JSON without a schema, and the shapes that schemas fill. */
#include "common/grammar/build_private.h"

enum { INDENT_MAX = 32 };

static uint32_t rule_end(const gm_build *b, uint32_t rule)
{
    return b->rules[rule].accept;
}

static uint32_t rule_begin(const gm_build *b, uint32_t rule)
{
    return b->rules[rule].start;
}

/* At most one space. */
static void small_space(gm_build *b, uint32_t from, uint32_t to)
{
    gm_empty(b, from, to);
    gm_byte(b, from, to, ' ', ' ');
}

void gm_json_space(gm_build *b, uint32_t from, uint32_t to)
{
    uint32_t line = gm_state_new(b);
    if (b->rule_space == 0) {
        b->rule_space = gm_rule_new(b, NULL);
        gm_byte(b, rule_begin(b, b->rule_space), rule_end(b, b->rule_space), ' ', ' ');
    }
    small_space(b, from, to);
    gm_byte(b, from, line, '\n', '\n');
    gm_call(b, line, to, b->rule_space, 0, INDENT_MAX);
}

void gm_any_string(gm_build *b, uint32_t from, uint32_t to, gm_spelling spelling, uint32_t min, uint32_t max)
{
    uint32_t rule = gm_any_char_rule(b, spelling);
    if (spelling == GM_RAW) {
        gm_call(b, from, to, rule, min, max);
        return;
    }
    uint32_t begin = gm_state_new(b), end = gm_state_new(b);
    gm_byte(b, from, begin, '"', '"');
    gm_call(b, begin, end, rule, min, max);
    gm_byte(b, end, to, '"', '"');
}

/* ---- lists ---- */

/* `,` and the item. */
static uint32_t next_item_rule(gm_build *b, uint32_t item, const char *path)
{
    uint32_t rule = gm_rule_new(b, path), comma = gm_state_new(b), at = gm_state_new(b);
    gm_byte(b, rule_begin(b, rule), comma, ',', ',');
    gm_json_space(b, comma, at);
    gm_call(b, at, rule_end(b, rule), item, 1, 1);
    return rule;
}

void gm_json_list(gm_build *b, uint32_t from, uint32_t to, const gm_list *list, const char *path)
{
    uint32_t open = gm_state_new(b), at = gm_state_new(b), end = gm_state_new(b), n = 0;
    gm_byte(b, from, open, '[', '[');
    gm_byte(b, end, to, ']', ']');
    if (list->min == 0) {
        gm_byte(b, open, to, ']', ']');
    }
    gm_json_space(b, open, at);
    for (; n < list->n_prefix && n < list->max && b->status == CM_OK; n++) {
        uint32_t rule = n > 0 ? next_item_rule(b, list->prefix[n], path) : list->prefix[n];
        uint32_t next = gm_state_new(b);
        gm_call(b, at, next, rule, 1, 1);
        at = next;
        if (n + 1 >= list->min) {
            gm_json_space(b, at, end);
        }
    }
    if (list->rest == GM_NO_RULE || n >= list->max) {
        return; /* a minimum that is not reached leaves no way to the end */
    }
    if (n == 0) {
        uint32_t next = gm_state_new(b);
        gm_call(b, at, next, list->rest, 1, 1);
        at = next;
        n = 1;
    }
    uint32_t more = next_item_rule(b, list->rest, path), last = gm_state_new(b);
    uint32_t min = list->min > n ? list->min - n : 0;
    gm_call(b, at, last, more, min, list->max == GM_INF ? GM_INF : list->max - n);
    gm_json_space(b, last, end);
}

/* ---- objects ---- */

uint32_t gm_json_member_rule(gm_build *b, const char *key, size_t n_key, uint32_t value, const char *path)
{
    uint32_t rule = gm_rule_new(b, path), colon = gm_state_new(b), at = gm_state_new(b);
    cm_bytes text;
    cm_bytes_init(&text, 0);
    cm_bytes_append(&text, "\"", 1);
    gm_json_escape(key, n_key, &text);
    cm_bytes_append(&text, "\":", 2);
    gm_bytes_of(b, rule_begin(b, rule), colon, cm_bytes_text(&text), text.len);
    cm_bytes_fini(&text);
    small_space(b, colon, at);
    gm_call(b, at, rule_end(b, rule), value, 1, 1);
    return rule;
}

/* `bare`: no member was written yet; `comma`: some were. Writes one from either into `next`. */
static void put_member(gm_build *b, uint32_t bare, uint32_t comma, uint32_t next, uint32_t rule)
{
    uint32_t sign = gm_state_new(b), at = gm_state_new(b);
    gm_call(b, bare, next, rule, 1, 1);
    gm_byte(b, comma, sign, ',', ',');
    gm_json_space(b, sign, at);
    gm_call(b, at, next, rule, 1, 1);
}

void gm_json_members(gm_build *b, uint32_t from, uint32_t to, const gm_member *members, uint32_t n,
                     uint32_t extra)
{
    uint32_t open = gm_state_new(b), bare = gm_state_new(b), comma = gm_state_new(b), end = gm_state_new(b);
    bool required = false;
    gm_byte(b, from, open, '{', '{');
    gm_json_space(b, open, bare);
    for (uint32_t i = 0; i < n && b->status == CM_OK; i++) {
        uint32_t next_bare = gm_state_new(b), next_comma = gm_state_new(b);
        put_member(b, bare, comma, next_comma, members[i].rule);
        if (!members[i].required) {
            gm_empty(b, bare, next_bare);
            gm_empty(b, comma, next_comma);
        }
        required |= members[i].required;
        bare = next_bare;
        comma = next_comma;
    }
    if (extra != GM_NO_RULE) {
        uint32_t last = gm_state_new(b);
        put_member(b, bare, comma, last, extra);
        gm_empty(b, last, comma);
    }
    gm_json_space(b, comma, end);
    gm_byte(b, end, to, '}', '}');
    if (!required) {
        gm_byte(b, open, to, '}', '}');
    }
}

/* ---- any value ---- */

uint32_t gm_json_object_rule(gm_build *b)
{
    if (b->rule_object == 0) {
        uint32_t rule = b->rule_object = gm_rule_new(b, NULL), value = gm_json_value_rule(b);
        uint32_t member = gm_rule_new(b, NULL), colon = gm_state_new(b), at = gm_state_new(b);
        gm_any_string(b, rule_begin(b, member), colon, GM_JSON, 0, GM_INF);
        uint32_t behind = gm_state_new(b);
        gm_byte(b, colon, behind, ':', ':');
        small_space(b, behind, at);
        gm_call(b, at, rule_end(b, member), value, 1, 1);
        gm_json_members(b, rule_begin(b, rule), rule_end(b, rule), NULL, 0, member);
    }
    return b->rule_object;
}

uint32_t gm_json_value_rule(gm_build *b)
{
    if (b->rule_value == 0) {
        uint32_t rule = b->rule_value = gm_rule_new(b, NULL), from = rule_begin(b, rule),
                 to = rule_end(b, rule);
        gm_bounds none = {0};
        gm_list list = {.rest = rule, .max = GM_INF};
        gm_text(b, from, to, "null");
        gm_text(b, from, to, "true");
        gm_text(b, from, to, "false");
        gm_number(b, from, to, &none, NULL);
        gm_any_string(b, from, to, GM_JSON, 0, GM_INF);
        gm_json_list(b, from, to, &list, NULL);
        gm_call(b, from, to, gm_json_object_rule(b), 1, 1);
    }
    return b->rule_value;
}
