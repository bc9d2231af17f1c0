#include "tests/unit/grammar_rig.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/base/rng.h"

static const char *const PIECES[] = {
    "{\"",
    "\":",
    "\": ",
    "\", \"",
    ", ",
    "}}",
    "]}",
    "true",
    "tru",
    "e}",
    "null",
    "fal",
    "se",
    "[[",
    "]]",
    "12",
    "123",
    "000",
    "-1",
    ".5",
    "0.",
    "e+",
    "  ",
    "\n  ",
    "\n\n",
    "ab",
    "abc",
    "aa",
    "aaaa",
    "foo",
    "bar",
    "a\"",
    "\"a",
    "name",
    "na",
    "\xc3\xa9",
    "\xe4\xb8",
    "\xb8\xad",
    "\xf0\x9f\x98",
    "\x80\"",
    "\\n",
    "\\u",
    "\\\"",
    "00e9",
    "d83d",
    "parameter",
    " name=\"",
    "string=\"",
    "true\">",
    "false\">",
    "invoke",
    "tool_calls>",
    "\n<",
    "</",
    ">\n",
    "2024-",
    "-01",
    "T12:",
    ":30",
    "Z\"",
    "yes",
    "aaaaaaaaaaaaaaaa",
    "    ",
    "\"}",
    "\"]",
    "[]",
    "{}",
    ",\"",
    ":",
    "x",
    "e",
    "é中",
    "\"x\"",
};
enum { N_PIECE = sizeof(PIECES) / sizeof(PIECES[0]) };

uint32_t rig_n_id(void)
{
    return RIG_PIECES + N_PIECE;
}

const uint8_t *rig_bytes(void *ctx, uint32_t id, size_t *n_out)
{
    static uint8_t bytes[256];
    (void)ctx;
    if (id < 256) {
        bytes[id] = (uint8_t)id;
        *n_out = 1;
        return &bytes[id];
    }
    if (id < RIG_PIECES) {
        return NULL;
    }
    *n_out = strlen(PIECES[id - RIG_PIECES]);
    return (const uint8_t *)PIECES[id - RIG_PIECES];
}

gm_vocab *rig_vocab(void)
{
    static gm_vocab *vocab;
    gm_vocab_source source = {
        .n_id = rig_n_id(), .bytes = rig_bytes, .eos = RIG_EOS, .think_end = RIG_THINK_END, .dsml = RIG_DSML};
    if (vocab == NULL) {
        cm_status status = gm_vocab_create(&source, &vocab, NULL);
        CM_ASSERT(status == CM_OK);
    }
    return vocab;
}

gm_machine *rig_machine(gm_kind kind, const char *source)
{
    gm_grammar *grammar;
    cm_error err = {0};
    cm_status status = gm_compile(kind, source, strlen(source), &grammar, &err);
    CM_ASSERT_MSG(status == CM_OK, "%s: %s at %s", source, err.text, err.field);
    return gm_machine_create(grammar, rig_vocab());
}

gm_state rig_run(gm_machine *machine, const char *text)
{
    gm_state at = gm_begin(machine, false);
    for (; *text != '\0' && at != GM_DEAD; text++) {
        gm_state next = gm_advance(machine, at, *text == '^' ? RIG_DSML : (uint32_t)(uint8_t)*text);
        gm_state_release(machine, at);
        at = next;
    }
    return at;
}

bool rig_accepts(gm_machine *machine, const char *text)
{
    gm_state at = rig_run(machine, text);
    bool accepts = at != GM_DEAD && gm_is_complete(machine, at);
    gm_state_release(machine, at);
    return accepts;
}

/* ---- random sources ---- */

typedef struct maker {
    uint64_t seed, n;
    cm_bytes text;
    uint32_t depth;
} maker;

static uint32_t pick(maker *m, uint32_t n)
{
    return (uint32_t)(cm_rng_uniform(m->seed, m->n++, 7) * n);
}

static void put_schema(maker *m);

static void put_string(maker *m)
{
    static const char *const patterns[] = {"^[a-z]{2,5}$", "^(foo|bar)+$", "\\\\d{3}-\\\\d{2}", "^[^x]*$",
                                           "a.b"};
    static const char *const formats[] = {"date", "time", "date-time", "duration", "email",
                                          "ipv4", "ipv6", "uuid",      "uri"};
    switch (pick(m, 4)) {
    case 0:
        cm_bytes_printf(&m->text, "{\"type\":\"string\",\"pattern\":\"%s\"}", patterns[pick(m, 5)]);
        break;
    case 1:
        cm_bytes_printf(&m->text, "{\"type\":\"string\",\"format\":\"%s\"}", formats[pick(m, 9)]);
        break;
    case 2:
        cm_bytes_printf(&m->text, "{\"type\":\"string\",\"minLength\":%u,\"maxLength\":%u}", pick(m, 4),
                        4 + pick(m, 500));
        break;
    default:
        cm_bytes_append_text(&m->text, "{\"type\":\"string\"}");
        break;
    }
}

static void put_number(maker *m)
{
    int32_t lo = (int32_t)pick(m, 2000) - 1000;
    switch (pick(m, 5)) {
    case 0:
        cm_bytes_printf(&m->text, "{\"type\":\"integer\",\"minimum\":%d,\"maximum\":%d}", lo,
                        lo + (int32_t)pick(m, 3000));
        break;
    case 1:
        cm_bytes_printf(&m->text, "{\"type\":\"number\",\"minimum\":%d.%u,\"exclusiveMaximum\":%u.5}", lo,
                        pick(m, 100), 1001 + pick(m, 100));
        break;
    case 2:
        cm_bytes_printf(&m->text, "{\"type\":\"integer\",\"multipleOf\":%u}", 1 + pick(m, 50));
        break;
    default:
        cm_bytes_printf(&m->text, "{\"type\":\"%s\"}", pick(m, 2) ? "number" : "integer");
        break;
    }
}

static void put_object(maker *m)
{
    uint32_t n = pick(m, 5);
    cm_bytes_append_text(&m->text, "{\"type\":\"object\",\"properties\":{");
    for (uint32_t i = 0; i < n; i++) {
        cm_bytes_printf(&m->text, "%s\"%c%s\":", i > 0 ? "," : "", 'a' + (char)i, i % 2 ? "ame" : "é");
        put_schema(m);
    }
    cm_bytes_append_text(&m->text, "},\"required\":[");
    for (uint32_t i = 0, k = 0; i < n; i++) {
        if (pick(m, 2)) {
            cm_bytes_printf(&m->text, "%s\"%c%s\"", k++ > 0 ? "," : "", 'a' + (char)i, i % 2 ? "ame" : "é");
        }
    }
    cm_bytes_printf(&m->text, "]%s}", pick(m, 4) ? ",\"additionalProperties\":false" : "");
}

static void put_list(maker *m, const char *before, uint32_t n, const char *after)
{
    cm_bytes_append_text(&m->text, before);
    for (uint32_t i = 0; i < n; i++) {
        cm_bytes_append_text(&m->text, i > 0 ? "," : "");
        put_schema(m);
    }
    cm_bytes_append_text(&m->text, after);
}

static void put_schema(maker *m)
{
    uint32_t what = pick(m, m->depth >= 3 ? 5 : 9);
    m->depth++;
    switch (what) {
    case 0:
        put_string(m);
        break;
    case 1:
        put_number(m);
        break;
    case 2:
        cm_bytes_append_text(&m->text, "{\"enum\":[\"x\",\"xy\",1,null,true,{\"a\":[1.5]}]}");
        break;
    case 3:
        cm_bytes_printf(&m->text, "{\"type\":[\"boolean\",\"null\"]}");
        break;
    case 4:
        cm_bytes_append_text(&m->text, m->depth > 1 ? "{\"$ref\":\"#/$defs/t\"}" : "{\"const\":\"c\"}");
        break;
    case 5:
        put_list(m, "{\"anyOf\":[", 1 + pick(m, 3), "]}");
        break;
    case 6:
        put_list(m, "{\"type\":\"array\",\"items\":", 1, "");
        cm_bytes_printf(&m->text, ",\"minItems\":%u,\"maxItems\":%u}", pick(m, 3), 3 + pick(m, 3));
        break;
    case 7:
        put_list(m, "{\"type\":\"array\",\"prefixItems\":[", 1 + pick(m, 3), "]}");
        break;
    default:
        put_object(m);
        break;
    }
    m->depth--;
}

char *rig_random_schema(uint64_t seed)
{
    maker m = {.seed = seed};
    cm_bytes_init(&m.text, 0);
    cm_bytes_append_text(&m.text, "{\"type\":\"object\",\"properties\":{\"r\":");
    put_schema(&m);
    cm_bytes_append_text(&m.text, ",\"s\":");
    put_schema(&m);
    cm_bytes_append_text(
        &m.text,
        "},\"required\":[\"r\"],\"$defs\":{\"t\":{\"type\":\"object\",\"properties\":{\"v\":{\"type\":"
        "\"integer\"},\"n\":{\"anyOf\":[{\"$ref\":\"#/$defs/t\"},{\"type\":\"null\"}]}},\"required\":"
        "[\"v\",\"n\"]}}}");
    return (char *)m.text.data;
}

static void put_regex(maker *m)
{
    static const char *const atoms[] = {"a",   "b",   "ab",  ".", "[a-c]", "[^a]",
                                        "\\d", "\\w", "\\s", "é", "\\.",   "x"};
    static const char *const repeats[] = {"", "", "", "*", "+", "?", "{2}", "{0,3}", "{2,40}", "{1,}"};
    uint32_t n = 1 + pick(m, 4);
    m->depth++;
    for (uint32_t i = 0; i < n; i++) {
        if (m->depth < 4 && pick(m, 3) == 0) {
            cm_bytes_append_text(&m->text, "(");
            put_regex(m);
            cm_bytes_append_text(&m->text, "|");
            put_regex(m);
            cm_bytes_append_text(&m->text, ")");
        } else {
            cm_bytes_append_text(&m->text, atoms[pick(m, 12)]);
        }
        cm_bytes_append_text(&m->text, repeats[pick(m, 10)]);
    }
    m->depth--;
}

char *rig_random_regex(uint64_t seed)
{
    maker m = {.seed = seed};
    cm_bytes_init(&m.text, 0);
    put_regex(&m);
    return (char *)m.text.data;
}
