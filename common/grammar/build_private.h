/* A grammar being put together, and what becomes of it. A construct is emitted between two states: it adds
 * edges out of `from`, edges into `to` and states of its own, nothing else, so constructs can be put side by
 * side (alternatives) or end to end (sequences) without asking each other. Errors stick: after the first one
 * nothing is added, and gm_build_finish returns it. */
#pragma once
#include "common/base/bytes.h"
#include "common/grammar/grammar.h"
#include "common/model/tokenizer.h"

#define GM_INF UINT32_MAX

typedef enum gm_edge_kind {
    GM_EDGE_BYTE,    /* lo .. hi */
    GM_EDGE_EMPTY,   /* nothing is read */
    GM_EDGE_CALL,    /* rule, min .. max times (GM_INF: any number of times) */
    GM_EDGE_CONTROL, /* the control token lo (md_control) */
} gm_edge_kind;

typedef struct gm_edge {
    uint32_t from, to;
    uint8_t kind, lo, hi;
    uint32_t rule, min, max;
} gm_edge;

typedef struct gm_rule {
    uint32_t start, accept;
    char *path; /* where in the source; owned */
} gm_rule;

struct gm_grammar {
    gm_edge *edges;  /* [n_edge] by their state */
    uint32_t *first; /* [n_state + 1] first edge of each state */
    uint16_t *need;  /* [n_state] calls inside calls that it takes at least to get to the end of its rule */
    uint8_t *accept; /* [n_state] the end of a rule */
    gm_rule *rules;  /* [n_rule]; 0 is the whole text; paths are gone */
    uint32_t n_edge, n_state, n_rule;
    uint8_t class_of[256];   /* bytes that no edge tells apart */
    uint8_t class_byte[256]; /* [n_class] one of each */
    uint32_t n_class;
};

typedef struct gm_build {
    gm_edge *edges;
    gm_rule *rules;
    uint32_t n_edge, edge_cap, n_state, n_rule, rule_cap;
    cm_status status; /* the first error */
    cm_error *err;
    /* rules that many share, made when first asked for; 0: not yet */
    uint32_t rule_space, rule_char[2], rule_digit, rule_value, rule_object;
} gm_build;

void gm_build_init(gm_build *b, cm_error *err);
/* Consumes b. */
CM_MUST_CHECK cm_status gm_build_finish(gm_build *b, gm_grammar **grammar_out);
/* path: where in the source, NULL: nowhere. */
void gm_build_fail(gm_build *b, cm_status status, const char *path, const char *fmt, ...) CM_PRINTF(4, 5);

uint32_t gm_state_new(gm_build *b);
uint32_t gm_rule_new(gm_build *b, const char *path); /* its start and accept are states without edges */
void gm_byte(gm_build *b, uint32_t from, uint32_t to, uint8_t lo, uint8_t hi);
void gm_empty(gm_build *b, uint32_t from, uint32_t to);
void gm_call(gm_build *b, uint32_t from, uint32_t to, uint32_t rule, uint32_t min, uint32_t max);
void gm_control(gm_build *b, uint32_t from, uint32_t to, md_control control);
void gm_bytes_of(gm_build *b, uint32_t from, uint32_t to, const char *bytes, size_t n);
void gm_text(gm_build *b, uint32_t from, uint32_t to, const char *text);
/* One of n texts, as a tree; sorts the list. */
typedef struct gm_word {
    const char *bytes;
    size_t n;
} gm_word;
void gm_words(gm_build *b, uint32_t from, uint32_t to, gm_word *words, size_t n);

/* ---- characters (chars.c) ---- */

/* How a character stands in the text: as it is, or inside a JSON string. */
typedef enum gm_spelling { GM_RAW, GM_JSON } gm_spelling;
/* Ranges of code points, in order, apart from each other; surrogates are never in. */
typedef struct gm_range {
    uint32_t lo, hi;
} gm_range;
enum { GM_RANGES_MAX = 512 };
typedef struct gm_set {
    gm_range range[GM_RANGES_MAX];
    uint32_t n;
    bool overflow; /* a range did not fit */
} gm_set;
void gm_set_add(gm_set *set, uint32_t lo, uint32_t hi);
void gm_set_join(gm_set *set, const gm_set *other);
void gm_set_negate(gm_set *set);
/* One character of the set. */
void gm_char(gm_build *b, uint32_t from, uint32_t to, const gm_set *set, gm_spelling spelling);
/* A rule of one character whatever it is; in JSON also as \u and its code. */
uint32_t gm_any_char_rule(gm_build *b, gm_spelling spelling);
/* text, without quotes, as JSON writes it. */
void gm_json_escape(const char *text, size_t n, cm_bytes *out);

/* ---- regular expressions (regex.c) ----
 * search: the text may have more before and after (a JSON schema's pattern), else it is matched whole. */
void gm_regex(gm_build *b, uint32_t from, uint32_t to, const char *pattern, size_t n, gm_spelling spelling,
              bool search, const char *path);

/* ---- JSON (json.c) ---- */
void gm_json_space(gm_build *b, uint32_t from, uint32_t to); /* where a line may break */
uint32_t gm_json_value_rule(gm_build *b);                    /* any value */
uint32_t gm_json_object_rule(gm_build *b);                   /* any object */
/* `"`, characters min .. max times, `"`; without quotes when raw. */
void gm_any_string(gm_build *b, uint32_t from, uint32_t to, gm_spelling spelling, uint32_t min, uint32_t max);
/* A list: `[`, then n_prefix rules one after the other, then rest again and again (GM_NO_RULE: nothing more),
 * min .. max items in all, `]`. */
#define GM_NO_RULE UINT32_MAX
typedef struct gm_list {
    const uint32_t *prefix;
    uint32_t n_prefix, rest, min, max;
} gm_list;
void gm_json_list(gm_build *b, uint32_t from, uint32_t to, const gm_list *list, const char *path);
/* An object: members in this order, each a rule for `"key": value`; then extra ones again and again. */
typedef struct gm_member {
    uint32_t rule;
    bool required;
} gm_member;
void gm_json_members(gm_build *b, uint32_t from, uint32_t to, const gm_member *members, uint32_t n,
                     uint32_t extra);
/* `"key": ` with key escaped, then the rule. */
uint32_t gm_json_member_rule(gm_build *b, const char *key, size_t n_key, uint32_t value, const char *path);

/* ---- numbers (number.c) ---- */
typedef struct gm_bounds {
    bool has_min, has_max, open_min, open_max; /* open: the bound itself is outside */
    double min, max;
} gm_bounds;
void gm_number(gm_build *b, uint32_t from, uint32_t to, const gm_bounds *bounds, const char *path);
/* multiple: 0 or what it must be a multiple of. */
void gm_integer(gm_build *b, uint32_t from, uint32_t to, const gm_bounds *bounds, int64_t multiple,
                const char *path);

/* ---- sources ---- */
void gm_schema_text(gm_build *b, uint32_t from, uint32_t to, const char *source, size_t n); /* schema.c */
void gm_choice_text(gm_build *b, uint32_t from, uint32_t to, const char *source, size_t n); /* grammar.c */
void gm_tools_text(gm_build *b, uint32_t from, uint32_t to, const char *source, size_t n);  /* tools.c */
