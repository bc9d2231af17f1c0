/* Characters to bytes: ranges of code points as UTF-8, plainly or as a JSON string has them. */
#include <stdio.h>
#include <string.h>

#include "common/grammar/build_private.h"

enum { CODE_MAX = 0x10ffff, SURROGATE_LO = 0xd800, SURROGATE_HI = 0xdfff };

/* ---- sets ---- */

static void set_put(gm_set *set, uint32_t at, uint32_t n_gone, gm_range range)
{
    if (n_gone == 0 && set->n == GM_RANGES_MAX) {
        set->overflow = true;
        return;
    }
    memmove(&set->range[at + 1], &set->range[at + n_gone], sizeof(gm_range) * (set->n - at - n_gone));
    set->range[at] = range;
    set->n += 1 - n_gone;
}

static void set_add_part(gm_set *set, uint32_t lo, uint32_t hi)
{
    uint32_t at = 0, end;
    if (lo > hi) {
        return;
    }
    while (at < set->n && set->range[at].hi + 1 < lo) {
        at++;
    }
    for (end = at; end < set->n && set->range[end].lo <= hi + 1; end++) {
        lo = set->range[end].lo < lo ? set->range[end].lo : lo;
        hi = set->range[end].hi > hi ? set->range[end].hi : hi;
    }
    set_put(set, at, end - at, (gm_range){lo, hi});
}

void gm_set_add(gm_set *set, uint32_t lo, uint32_t hi)
{
    hi = hi > CODE_MAX ? CODE_MAX : hi;
    set_add_part(set, lo, hi < SURROGATE_LO ? hi : SURROGATE_LO - 1);
    set_add_part(set, lo > SURROGATE_HI ? lo : SURROGATE_HI + 1, hi);
}

void gm_set_join(gm_set *set, const gm_set *other)
{
    for (uint32_t i = 0; i < other->n; i++) {
        gm_set_add(set, other->range[i].lo, other->range[i].hi);
    }
    set->overflow |= other->overflow;
}

void gm_set_negate(gm_set *set)
{
    gm_set out = {.overflow = set->overflow};
    uint32_t next = 0;
    for (uint32_t i = 0; i < set->n; i++) {
        if (set->range[i].lo > next) {
            gm_set_add(&out, next, set->range[i].lo - 1);
        }
        next = set->range[i].hi + 1;
    }
    if (next <= CODE_MAX) {
        gm_set_add(&out, next, CODE_MAX);
    }
    *set = out;
}

/* ---- UTF-8 ---- */

static uint32_t utf8_of(uint32_t code, uint8_t out[4])
{
    if (code < 0x80) {
        out[0] = (uint8_t)code;
        return 1;
    }
    uint32_t n = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    static const uint8_t lead[] = {0, 0, 0xc0, 0xe0, 0xf0};
    for (uint32_t i = n; --i > 0; code >>= 6) {
        out[i] = (uint8_t)(0x80 | (code & 0x3f));
    }
    out[0] = (uint8_t)(lead[n] | code);
    return n;
}

/* lo and hi have n bytes each, and any bytes between theirs behind the first that differs: a chain of edges.
 */
static void emit_chain(gm_build *b, uint32_t from, uint32_t to, const uint8_t *lo, const uint8_t *hi,
                       uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        uint32_t next = i + 1 < n ? gm_state_new(b) : to;
        gm_byte(b, from, next, lo[i], hi[i]);
        from = next;
    }
}

/* Cuts lo .. hi until all numbers of a piece have equally many bytes and every byte's range is independent of
 * the others'. */
static void emit_range(gm_build *b, uint32_t from, uint32_t to, uint32_t lo, uint32_t hi)
{
    static const uint32_t ends[] = {0x7f, 0x7ff, 0xffff};
    uint8_t first[4], last[4];
    for (uint32_t i = 0; i < 3; i++) {
        if (lo <= ends[i] && hi > ends[i]) {
            emit_range(b, from, to, lo, ends[i]);
            emit_range(b, from, to, ends[i] + 1, hi);
            return;
        }
    }
    for (uint32_t bits = 6; bits <= 18 && hi >= 0x80; bits += 6) {
        uint32_t mask = (1u << bits) - 1;
        if ((lo & ~mask) == (hi & ~mask)) {
            continue;
        }
        if ((lo & mask) != 0) {
            emit_range(b, from, to, lo, lo | mask);
            emit_range(b, from, to, (lo | mask) + 1, hi);
            return;
        }
        if ((hi & mask) != mask) {
            emit_range(b, from, to, lo, (hi & ~mask) - 1);
            emit_range(b, from, to, hi & ~mask, hi);
            return;
        }
    }
    uint32_t n = utf8_of(lo, first);
    utf8_of(hi, last);
    emit_chain(b, from, to, first, last, n);
}

/* ---- JSON strings ---- */

static bool json_must_escape(uint32_t code)
{
    return code < 0x20 || code == '"' || code == '\\';
}

static uint32_t json_escape_of(uint32_t code, char out[8])
{
    static const char *const shorts = "\"\"\\\\\bb\ff\nn\rr\tt";
    for (uint32_t i = 0; shorts[i] != '\0'; i += 2) {
        if ((uint32_t)(uint8_t)shorts[i] == code) {
            return (uint32_t)snprintf(out, 8, "\\%c", shorts[i + 1]);
        }
    }
    return (uint32_t)snprintf(out, 8, "\\u%04x", code);
}

void gm_json_escape(const char *text, size_t n, cm_bytes *out)
{
    char escape[8];
    for (size_t i = 0; i < n; i++) {
        uint8_t byte = (uint8_t)text[i];
        if (json_must_escape(byte)) {
            cm_bytes_append(out, escape, json_escape_of(byte, escape));
        } else {
            cm_bytes_append(out, &byte, 1);
        }
    }
}

static void emit_json_range(gm_build *b, uint32_t from, uint32_t to, uint32_t lo, uint32_t hi)
{
    char escape[8];
    uint32_t plain = lo;
    for (uint32_t code = lo; code <= hi && code <= '\\'; code++) {
        if (!json_must_escape(code)) {
            continue;
        }
        if (plain < code) {
            emit_range(b, from, to, plain, code - 1);
        }
        gm_bytes_of(b, from, to, escape, json_escape_of(code, escape));
        plain = code + 1;
    }
    if (plain <= hi) {
        emit_range(b, from, to, plain, hi);
    }
}

void gm_char(gm_build *b, uint32_t from, uint32_t to, const gm_set *set, gm_spelling spelling)
{
    for (uint32_t i = 0; i < set->n && b->status == CM_OK; i++) {
        if (spelling == GM_JSON) {
            emit_json_range(b, from, to, set->range[i].lo, set->range[i].hi);
        } else {
            emit_range(b, from, to, set->range[i].lo, set->range[i].hi);
        }
    }
}

/* A hexadecimal digit between these two, either case. */
static void emit_hex(gm_build *b, uint32_t from, uint32_t to, uint32_t lo, uint32_t hi)
{
    if (lo < 10) {
        gm_byte(b, from, to, (uint8_t)('0' + lo), (uint8_t)('0' + (hi < 9 ? hi : 9)));
    }
    if (hi > 9) {
        uint32_t low = lo > 10 ? lo - 10 : 0;
        gm_byte(b, from, to, (uint8_t)('a' + low), (uint8_t)('a' + hi - 10));
        gm_byte(b, from, to, (uint8_t)('A' + low), (uint8_t)('A' + hi - 10));
    }
}

static void emit_hexes(gm_build *b, uint32_t from, uint32_t to, uint32_t n)
{
    while (n-- > 0) {
        uint32_t next = n > 0 ? gm_state_new(b) : to;
        emit_hex(b, from, next, 0, 15);
        from = next;
    }
}

/* Behind `\u`: four digits that are no half of a pair, or two halves. */
static void emit_unicode_escape(gm_build *b, uint32_t from, uint32_t to)
{
    uint32_t d = gm_state_new(b), other = gm_state_new(b), high = gm_state_new(b), rest = gm_state_new(b);
    emit_hex(b, from, other, 0, 12);
    emit_hex(b, from, other, 14, 15);
    emit_hexes(b, other, to, 3);
    emit_hex(b, from, d, 13, 13);
    emit_hex(b, d, rest, 0, 7);
    emit_hexes(b, rest, to, 2);
    emit_hex(b, d, high, 8, 11);
    uint32_t half = gm_state_new(b), low_d = gm_state_new(b), low = gm_state_new(b), last = gm_state_new(b);
    emit_hexes(b, high, half, 2);
    gm_text(b, half, low_d, "\\u");
    emit_hex(b, low_d, low, 13, 13);
    emit_hex(b, low, last, 12, 15);
    emit_hexes(b, last, to, 2);
}

static void emit_json_any(gm_build *b, uint32_t from, uint32_t to)
{
    gm_set set = {0};
    uint32_t escaped = gm_state_new(b), code = gm_state_new(b);
    gm_set_add(&set, 0x20, '"' - 1);
    gm_set_add(&set, '"' + 1, '\\' - 1);
    gm_set_add(&set, '\\' + 1, CODE_MAX);
    gm_char(b, from, to, &set, GM_RAW);
    gm_byte(b, from, escaped, '\\', '\\');
    for (const char *c = "\"\\/bfnrt"; *c != '\0'; c++) {
        gm_byte(b, escaped, to, (uint8_t)*c, (uint8_t)*c);
    }
    gm_byte(b, escaped, code, 'u', 'u');
    emit_unicode_escape(b, code, to);
}

uint32_t gm_any_char_rule(gm_build *b, gm_spelling spelling)
{
    if (b->rule_char[spelling] == 0) {
        uint32_t rule = b->rule_char[spelling] = gm_rule_new(b, NULL);
        uint32_t from = b->rules[rule].start, to = b->rules[rule].accept;
        gm_set all = {0};
        gm_set_add(&all, 0, CODE_MAX);
        if (spelling == GM_JSON) {
            emit_json_any(b, from, to);
        } else {
            gm_char(b, from, to, &all, GM_RAW);
        }
    }
    return b->rule_char[spelling];
}
