/* Regular expressions, as far as they are regular and every dialect a client may mean (Python's, ECMA's,
 * PCRE's) agrees: literals, `.`, [classes], \d \w \s \D \W \S, \t \n \r \f \v \0 \xHH \uHHHH \u{H} and
 * escaped punctuation, groups (named and (?:) too), |, * + ? {n} {n,} {n,m} and their lazy forms, ^ and $
 * where an alternative begins and ends. Where dialects differ about a class only what all of them hold to be
 * in it is in it (\w is ASCII). Refused by name: look-around, back-references, \b, \p, flags, possessive
 * repetition. */
#include <stdio.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/grammar/build_private.h"

enum {
    REGEX_GROUPS_MAX = 64,      /* inside each other */
    REGEX_REPEAT_MAX = 1000000, /* {n} */
    REGEX_CODE_MAX = 0x10ffff,
};
#define NONE UINT32_MAX

typedef enum node_kind {
    NODE_CHAR,   /* code */
    NODE_SET,    /* set */
    NODE_SEQ,    /* children one after the other */
    NODE_ALT,    /* one of the children */
    NODE_REPEAT, /* its child min .. max times */
    NODE_BEGIN,
    NODE_END,
} node_kind;

typedef struct node {
    node_kind kind;
    uint32_t child, next; /* NONE: no (more) */
    uint32_t code, min, max;
    gm_set *set; /* owned */
} node;

typedef struct regex {
    gm_build *b;
    const char *text, *path;
    size_t n, at;
    node *nodes;
    uint32_t n_node, cap, depth;
    gm_spelling spelling;
    bool search;
} regex;

static void fail(regex *x, cm_status status, const char *what)
{
    gm_build_fail(x->b, status, x->path, "regular expression, byte %zu: %s", x->at, what);
}

static bool ok(const regex *x)
{
    return x->b->status == CM_OK;
}

static uint32_t node_new(regex *x, node_kind kind)
{
    if (x->n_node == x->cap) {
        x->cap = x->cap > 0 ? 2 * x->cap : 64;
        x->nodes = cm_realloc(x->nodes, sizeof(node) * x->cap);
    }
    x->nodes[x->n_node] = (node){.kind = kind, .child = NONE, .next = NONE};
    return x->n_node++;
}

/* ---- reading ---- */

static int peek(const regex *x)
{
    return x->at < x->n ? (uint8_t)x->text[x->at] : -1;
}

static bool take(regex *x, const char *word)
{
    size_t n = strlen(word);
    if (x->n - x->at < n || memcmp(x->text + x->at, word, n) != 0) {
        return false;
    }
    x->at += n;
    return true;
}

/* The next character, decoded. */
static uint32_t take_code(regex *x)
{
    uint8_t lead = (uint8_t)x->text[x->at++];
    uint32_t n = lead < 0x80 ? 0 : lead >= 0xc2 && lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
    uint32_t code = n == 0 ? lead : lead & (0x3fu >> n);
    if ((lead >= 0x80 && lead < 0xc2) || lead > 0xf4 || x->n - x->at < n) {
        fail(x, CM_E_INVALID, "it is not UTF-8");
        return 0;
    }
    for (; n > 0; n--) {
        uint8_t byte = (uint8_t)x->text[x->at++];
        if ((byte & 0xc0) != 0x80) {
            fail(x, CM_E_INVALID, "it is not UTF-8");
            return 0;
        }
        code = code << 6 | (byte & 0x3f);
    }
    return code;
}

static uint32_t take_hex(regex *x, uint32_t n_min, uint32_t n_max)
{
    uint32_t code = 0, n = 0;
    for (; n < n_max && x->at < x->n; n++, x->at++) {
        uint8_t c = (uint8_t)(x->text[x->at] | 0x20);
        if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) {
            break;
        }
        code = code << 4 | (uint32_t)(c <= '9' ? c - '0' : c - 'a' + 10);
    }
    if (n < n_min || code > REGEX_CODE_MAX || (code >= 0xd800 && code <= 0xdfff)) {
        fail(x, CM_E_INVALID, "an escape that needs the hexadecimal digits of a character");
    }
    return code;
}

/* What is in the class in every dialect, or (wide) in any. */
static void add_class(gm_set *set, uint8_t letter, bool wide)
{
    static const uint16_t spaces[][2] = {{9, 13},          {32, 32},         {28, 31},
                                         {0x85, 0x85},     {0xa0, 0xa0},     {0x1680, 0x1680},
                                         {0x2000, 0x200a}, {0x2028, 0x2029}, {0x202f, 0x202f},
                                         {0x205f, 0x205f}, {0x3000, 0x3000}, {0xfeff, 0xfeff}};
    gm_set in = {0};
    bool negated = letter < 'a',
         most = wide != negated; /* the most that may be meant by the lower-case letter */
    uint8_t lower = (uint8_t)(letter | 0x20);
    if (lower == 's') {
        for (uint32_t i = 0; i < (most ? sizeof(spaces) / sizeof(spaces[0]) : 2u); i++) {
            gm_set_add(&in, spaces[i][0], spaces[i][1]);
        }
    } else {
        gm_set_add(&in, '0', '9');
        if (lower == 'w') {
            gm_set_add(&in, 'A', 'Z');
            gm_set_add(&in, '_', '_');
            gm_set_add(&in, 'a', 'z');
        }
        if (most) {
            gm_set_add(&in, 0x80, REGEX_CODE_MAX);
        }
    }
    if (negated) {
        gm_set_negate(&in);
    }
    gm_set_join(set, &in);
}

static bool is_class(int c)
{
    return c > 0 && strchr("dwsDWS", c) != NULL;
}

/* Behind a backslash, no class: one character. */
static uint32_t take_escape(regex *x)
{
    static const char *const controls = "t\tn\nr\rf\fv\va\ae\x1b";
    int c = peek(x);
    if (c < 0) {
        fail(x, CM_E_INVALID, "a backslash at the end");
        return 0;
    }
    for (uint32_t i = 0; controls[i] != '\0'; i += 2) {
        if (c == controls[i]) {
            x->at++;
            return (uint8_t)controls[i + 1];
        }
    }
    if (take(x, "x")) {
        return take_hex(x, 2, 2);
    }
    if (take(x, "u{")) {
        uint32_t code = take_hex(x, 1, 6);
        if (ok(x) && !take(x, "}")) {
            fail(x, CM_E_INVALID, "\\u{ without its }");
        }
        return code;
    }
    if (take(x, "u")) {
        return take_hex(x, 4, 4);
    }
    if (c == '0' && !(x->at + 1 < x->n && x->text[x->at + 1] >= '0' && x->text[x->at + 1] <= '9')) {
        x->at++;
        return 0;
    }
    if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) {
        fail(x, CM_E_UNSUPPORTED, "this escape is not supported (back-references, \\b and \\p are not)");
        return 0;
    }
    return take_code(x);
}

/* ---- [classes] ---- */

/* One end of a range, or a whole class: then *code_out is NONE. */
static void take_member(regex *x, gm_set *set, bool negated, uint32_t *code_out)
{
    *code_out = NONE;
    if (peek(x) != '\\') {
        *code_out = take_code(x);
        return;
    }
    x->at++;
    if (is_class(peek(x))) {
        add_class(set, (uint8_t)x->text[x->at++], negated);
    } else if (take(x, "b")) {
        *code_out = '\b';
    } else {
        *code_out = take_escape(x);
    }
}

static void take_members(regex *x, gm_set *set, bool negated)
{
    bool first = true;
    uint32_t lo, hi;
    while (ok(x) && (first || peek(x) != ']')) {
        if (peek(x) < 0) {
            fail(x, CM_E_INVALID, "[ without its ]");
            return;
        }
        if (peek(x) == '[' && x->at + 1 < x->n && strchr(":.=", x->text[x->at + 1]) != NULL) {
            fail(x, CM_E_UNSUPPORTED, "[: :] classes are not supported: write their characters");
            return;
        }
        take_member(x, set, negated, &lo);
        first = false;
        if (lo == NONE || !ok(x)) {
            continue;
        }
        hi = lo;
        if (peek(x) == '-' && x->at + 1 < x->n && x->text[x->at + 1] != ']') {
            x->at++;
            take_member(x, set, negated, &hi);
        }
        if (hi == NONE || hi < lo) {
            fail(x, CM_E_INVALID, "a range in [ ] whose end is not a character after its beginning");
            return;
        }
        gm_set_add(set, lo, hi);
    }
    x->at++;
}

static uint32_t parse_set(regex *x)
{
    uint32_t n = node_new(x, NODE_SET);
    gm_set *set = x->nodes[n].set = cm_alloc(sizeof(*set));
    bool negated = take(x, "^");
    if (peek(x) == ']') {
        fail(x, CM_E_UNSUPPORTED, "dialects differ about [] and []...]: write \\] in a class");
        return n;
    }
    take_members(x, set, negated);
    if (negated) {
        gm_set_negate(set);
    }
    if (set->overflow) {
        fail(x, CM_E_TOO_LONG, "a class of too many ranges");
    }
    return n;
}

/* ---- syntax ---- */

static uint32_t parse_alternatives(regex *x);

static uint32_t parse_group(regex *x)
{
    if (take(x, "?")) {
        bool named = take(x, "P<") || (peek(x) == '<' && x->at + 1 < x->n &&
                                       strchr("=!", x->text[x->at + 1]) == NULL && take(x, "<"));
        while (named && peek(x) >= 0 && peek(x) != '>') {
            x->at++;
        }
        if (!(named ? take(x, ">") : take(x, ":"))) {
            fail(x, CM_E_UNSUPPORTED, "look-around, flags and other (?...) are not supported");
            return node_new(x, NODE_SEQ);
        }
    }
    if (++x->depth > REGEX_GROUPS_MAX) {
        fail(x, CM_E_TOO_LONG, "more than 64 groups inside each other");
        return node_new(x, NODE_SEQ);
    }
    uint32_t n = parse_alternatives(x);
    x->depth--;
    if (ok(x) && !take(x, ")")) {
        fail(x, CM_E_INVALID, "( without its )");
    }
    return n;
}

static uint32_t parse_backslash(regex *x)
{
    if (is_class(peek(x))) {
        uint32_t n = node_new(x, NODE_SET);
        x->nodes[n].set = cm_alloc(sizeof(gm_set));
        add_class(x->nodes[n].set, (uint8_t)x->text[x->at++], false);
        return n;
    }
    if (take(x, "A")) {
        return node_new(x, NODE_BEGIN);
    }
    if (take(x, "Z") || take(x, "z")) {
        return node_new(x, NODE_END);
    }
    uint32_t code = take_escape(x), n = node_new(x, NODE_CHAR);
    x->nodes[n].code = code;
    return n;
}

static uint32_t parse_atom(regex *x)
{
    if (take(x, "(")) {
        return parse_group(x);
    }
    if (take(x, "[")) {
        return parse_set(x);
    }
    if (take(x, "\\")) {
        return parse_backslash(x);
    }
    if (take(x, "^")) {
        return node_new(x, NODE_BEGIN);
    }
    if (take(x, "$")) {
        return node_new(x, NODE_END);
    }
    if (take(x, ".")) {
        uint32_t n = node_new(x, NODE_SET);
        gm_set *set = x->nodes[n].set = cm_alloc(sizeof(*set));
        gm_set_add(set, '\n', '\n'); /* what some dialect holds to end a line */
        gm_set_add(set, '\r', '\r');
        gm_set_add(set, 0x2028, 0x2029);
        gm_set_negate(set);
        return n;
    }
    if (peek(x) == '*' || peek(x) == '+' || peek(x) == '?') {
        fail(x, CM_E_INVALID, "nothing to repeat");
        return node_new(x, NODE_SEQ);
    }
    uint32_t code = take_code(x), n = node_new(x, NODE_CHAR);
    x->nodes[n].code = code;
    return n;
}

static bool take_count(regex *x, uint32_t *count_out)
{
    uint64_t count = 0;
    size_t begin = x->at;
    while (peek(x) >= '0' && peek(x) <= '9') {
        count = count < REGEX_REPEAT_MAX ? count * 10 + (uint64_t)(peek(x) - '0') : count;
        x->at++;
    }
    *count_out = (uint32_t)count;
    return x->at > begin;
}

/* {n}, {n,}, {n,m}; anything else behind a brace is no repetition. */
static bool take_braces(regex *x, uint32_t *min_out, uint32_t *max_out)
{
    size_t begin = x->at;
    bool right = take(x, "{") && take_count(x, min_out);
    *max_out = *min_out;
    if (right && take(x, ",") && !take_count(x, max_out)) {
        *max_out = GM_INF;
    }
    right = right && take(x, "}");
    if (!right) {
        x->at = begin;
        return false;
    }
    if (*min_out > *max_out || *min_out > REGEX_REPEAT_MAX ||
        (*max_out > REGEX_REPEAT_MAX && *max_out != GM_INF)) {
        fail(x, CM_E_INVALID, "a repetition whose counts are out of order or above 1000000");
    }
    return true;
}

static bool take_repeat(regex *x, uint32_t *min_out, uint32_t *max_out)
{
    *min_out = 0;
    *max_out = GM_INF;
    if (take(x, "*")) {
        return true;
    }
    if (take(x, "+")) {
        *min_out = 1;
        return true;
    }
    if (take(x, "?")) {
        *max_out = 1;
        return true;
    }
    return peek(x) == '{' && take_braces(x, min_out, max_out);
}

static uint32_t parse_repeat(regex *x)
{
    uint32_t n = parse_atom(x), min, max;
    while (ok(x) && take_repeat(x, &min, &max)) {
        uint32_t repeat = node_new(x, NODE_REPEAT);
        x->nodes[repeat].child = n;
        x->nodes[repeat].min = min;
        x->nodes[repeat].max = max;
        n = repeat;
        take(x, "?"); /* lazy: the same texts */
        if (peek(x) == '+' || peek(x) == '*' || peek(x) == '?') {
            fail(x, CM_E_UNSUPPORTED, "a repetition of a repetition: put the inner one in a group");
        }
    }
    return n;
}

static uint32_t parse_sequence(regex *x)
{
    uint32_t seq = node_new(x, NODE_SEQ), last = NONE;
    while (ok(x) && peek(x) >= 0 && peek(x) != '|' && peek(x) != ')') {
        uint32_t n = parse_repeat(x);
        if (last == NONE) {
            x->nodes[seq].child = n;
        } else {
            x->nodes[last].next = n;
        }
        last = n;
    }
    return seq;
}

static uint32_t parse_alternatives(regex *x)
{
    uint32_t alt = node_new(x, NODE_ALT), last = parse_sequence(x);
    x->nodes[alt].child = last;
    while (ok(x) && take(x, "|")) {
        uint32_t n = parse_sequence(x);
        x->nodes[last].next = n;
        last = n;
    }
    return alt;
}

/* ---- emitting ---- */

static void emit(regex *x, uint32_t n, uint32_t from, uint32_t to);

static void emit_repeat(regex *x, const node *repeat, uint32_t from, uint32_t to)
{
    uint32_t child = repeat->child;
    if (repeat->max == GM_INF && repeat->min <= 1) {
        uint32_t begin = gm_state_new(x->b), end = gm_state_new(x->b);
        gm_empty(x->b, from, begin);
        emit(x, child, begin, end);
        gm_empty(x->b, end, begin);
        gm_empty(x->b, end, to);
        if (repeat->min == 0) {
            gm_empty(x->b, from, to);
        }
    } else if (repeat->max == 1) {
        emit(x, child, from, to);
        if (repeat->min == 0) {
            gm_empty(x->b, from, to);
        }
    } else {
        uint32_t min = repeat->min, max = repeat->max, rule = gm_rule_new(x->b, x->path);
        emit(x, child, x->b->rules[rule].start, x->b->rules[rule].accept);
        gm_call(x->b, from, to, rule, min, max);
    }
}

/* The children from first on, one after the other; end NONE or the child to stop before. */
static void emit_sequence(regex *x, uint32_t first, uint32_t end, uint32_t from, uint32_t to)
{
    for (uint32_t n = first; n != end && ok(x); n = x->nodes[n].next) {
        uint32_t next = gm_state_new(x->b);
        emit(x, n, from, next);
        from = next;
    }
    gm_empty(x->b, from, to);
}

static void emit_code(regex *x, uint32_t code, uint32_t from, uint32_t to)
{
    gm_set one = {0};
    gm_set_add(&one, code, code);
    gm_char(x->b, from, to, &one, x->spelling);
}

static void emit(regex *x, uint32_t n, uint32_t from, uint32_t to)
{
    const node *at = &x->nodes[n];
    if (!ok(x)) {
        return;
    }
    switch (at->kind) {
    case NODE_CHAR:
        emit_code(x, at->code, from, to);
        break;
    case NODE_SET:
        gm_char(x->b, from, to, at->set, x->spelling);
        break;
    case NODE_SEQ:
        emit_sequence(x, at->child, NONE, from, to);
        break;
    case NODE_ALT:
        for (uint32_t k = at->child; k != NONE; k = x->nodes[k].next) {
            emit(x, k, from, to);
        }
        break;
    case NODE_REPEAT:
        emit_repeat(x, at, from, to);
        break;
    case NODE_BEGIN:
    case NODE_END:
        fail(x, CM_E_UNSUPPORTED, "^ and $ are supported where an alternative begins and ends only");
        break;
    }
}

static void emit_anything(regex *x, uint32_t from, uint32_t to)
{
    gm_call(x->b, from, to, gm_any_char_rule(x->b, x->spelling), 0, GM_INF);
}

static void emit_top(regex *x, uint32_t n, uint32_t from, uint32_t to);

/* An alternative of the whole: what ^ and $ do not hold may lie within more text, when searched for. */
static void emit_top_sequence(regex *x, uint32_t seq, uint32_t from, uint32_t to)
{
    uint32_t first = x->nodes[seq].child, end = NONE;
    bool begins = false, ends = false;
    if (first != NONE && x->nodes[first].next == NONE && x->nodes[first].kind == NODE_ALT) {
        emit_top(x, first, from, to);
        return;
    }
    while (first != NONE && x->nodes[first].kind == NODE_BEGIN) {
        begins = true;
        first = x->nodes[first].next;
    }
    for (uint32_t n = first; n != NONE; n = x->nodes[n].next) {
        ends = x->nodes[n].kind == NODE_END;
        end = !ends ? NONE : end == NONE ? n : end;
    }
    if (x->search && !begins) {
        uint32_t next = gm_state_new(x->b);
        emit_anything(x, from, next);
        from = next;
    }
    uint32_t last = x->search && !ends ? gm_state_new(x->b) : to;
    emit_sequence(x, first, end, from, last);
    if (last != to) {
        emit_anything(x, last, to);
    }
}

static void emit_top(regex *x, uint32_t alt, uint32_t from, uint32_t to)
{
    for (uint32_t k = x->nodes[alt].child; k != NONE && ok(x); k = x->nodes[k].next) {
        emit_top_sequence(x, k, from, to);
    }
}

void gm_regex(gm_build *b, uint32_t from, uint32_t to, const char *pattern, size_t n, gm_spelling spelling,
              bool search, const char *path)
{
    regex x = {.b = b, .text = pattern, .path = path, .n = n, .spelling = spelling, .search = search};
    uint32_t root = parse_alternatives(&x);
    if (ok(&x) && x.at < n) {
        fail(&x, CM_E_INVALID, ") without its (");
    }
    if (ok(&x)) {
        emit_top(&x, root, from, to);
    }
    for (uint32_t i = 0; i < x.n_node; i++) {
        cm_free(x.nodes[i].set);
    }
    cm_free(x.nodes);
}
