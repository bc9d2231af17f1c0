/* Grammars against tables of what they let through, masks against tokens tried one by one, and random walks
 * that must never stand still. */
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "tests/unit/grammar_rig.h"

enum { TEXTS_MAX = 14 };

typedef struct table_row {
    gm_kind kind;
    const char *source;
    const char *yes[TEXTS_MAX], *no[TEXTS_MAX];
} table_row;

#define S GM_JSON_SCHEMA
#define R GM_REGEX
static const table_row TABLE[] = {
    {S,
     "{\"type\":\"integer\"}",
     {"0", "-1", "123456789012345"},
     {"01", "1.0", "-0", "-", "1234567890123456", "\"1\"", ""}},
    {S,
     "{\"type\":\"integer\",\"minimum\":-5,\"maximum\":13}",
     {"-5", "-1", "0", "9", "10", "13"},
     {"-6", "14", "100", "-13"}},
    {S, "{\"type\":\"integer\",\"exclusiveMinimum\":3,\"exclusiveMaximum\":5}", {"4"}, {"3", "5", "-4"}},
    {S, "{\"type\":\"integer\",\"minimum\":2.5,\"maximum\":4.5}", {"3", "4"}, {"2", "5"}},
    {S,
     "{\"type\":\"integer\",\"minimum\":198,\"maximum\":1203}",
     {"198", "199", "200", "999", "1000", "1203"},
     {"197", "1204", "19", "2000"}},
    {S,
     "{\"type\":\"integer\",\"multipleOf\":7}",
     {"0", "7", "-14", "700", "999999999999994"},
     {"1", "-6", "71", "1000000000000001"}},
    {S,
     "{\"type\":\"integer\",\"multipleOf\":5,\"minimum\":12,\"maximum\":26}",
     {"15", "20", "25"},
     {"10", "30", "5", "12"}},
    {S,
     "{\"type\":\"integer\",\"multipleOf\":5,\"minimum\":-12,\"maximum\":-3}",
     {"-10", "-5"},
     {"-15", "0", "5"}},
    {S,
     "{\"type\":\"number\"}",
     {"0", "-0.5", "1e5", "1.5E-07", "12"},
     {".5", "1.", "1e", "+1", "1e123", "NaN"}},
    {S,
     "{\"type\":\"number\",\"minimum\":0.5,\"exclusiveMaximum\":10.25}",
     {"0.5", "0.50", "0.51", "1", "9.99", "10", "10.2", "10.24999"},
     {"0", "0.4", "0.49999", "10.25", "10.250", "10.3", "11", "-1", "1e0"}},
    {S,
     "{\"type\":\"number\",\"minimum\":-2.5,\"maximum\":-0.125}",
     {"-2.5", "-1", "-0.125", "-0.2"},
     {"-2.51", "-0.1", "0", "1", "-3"}},
    {S, "{\"type\":\"number\",\"exclusiveMinimum\":0}", {"0.1", "1", "0.001"}, {"0", "0.0", "-1", "-0"}},
    {S, "{\"type\":\"number\",\"exclusiveMaximum\":0}", {"-0.1", "-1"}, {"0", "-0", "-0.0", "1"}},
    {S,
     "{\"type\":\"number\",\"minimum\":1.25,\"maximum\":1.5}",
     {"1.25", "1.5", "1.3", "1.50"},
     {"1.24", "1.51", "1", "2"}},
    {S,
     "{\"type\":\"string\"}",
     {"\"\"", "\"a\\n\\u00e9\"", "\"\\ud83d\\ude00\"", "\"\xc3\xa9\""},
     {"\"", "a", "\"\n\"", "\"\\x\"", "\"\\ud83d\"", "\"\\ude00\"", "\"\xff\"", "\"\xc3\"",
      "\"\xed\xa0\x80\""}},
    {S,
     "{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}",
     {"\"ab\"", "\"\xc3\xa9\xc3\xa9\"", "\"a\\ud83d\\ude00b\""},
     {"\"a\"", "\"abcd\"", "\"\""}},
    {S, "{\"type\":\"string\",\"pattern\":\"b+\"}", {"\"b\"", "\"abbc\""}, {"\"a\"", "\"\""}},
    {S,
     "{\"type\":\"string\",\"pattern\":\"^a\\\\\\\\|^\\\"b$\"}",
     {"\"a\\\\\"", "\"a\\\\x\"", "\"\\\"b\""},
     {"\"a\"", "\"\\\"bx\"", "\"\\\"c\""}},
    {S,
     "{\"type\":\"string\",\"format\":\"date\"}",
     {"\"2024-02-28\"", "\"1999-12-31\""},
     {"\"2024-13-01\"", "\"2023-02-30\"", "\"2024-1-1\""}},
    {S,
     "{\"type\":\"string\",\"format\":\"date-time\"}",
     {"\"2024-02-28T23:59:59Z\"", "\"2024-02-28T00:00:00.5+01:30\""},
     {"\"2024-02-28\"", "\"2024-02-28T24:00:00Z\""}},
    {S, "{\"type\":\"string\",\"format\":\"time\"}", {"\"12:30:00Z\""}, {"\"12:60:00Z\"", "\"12:30\""}},
    {S,
     "{\"type\":\"string\",\"format\":\"duration\"}",
     {"\"P3W\"", "\"P1Y2M3D\"", "\"PT4H\"", "\"P1DT2M3S\""},
     {"\"P\"", "\"PT\"", "\"P1DT\"", "\"1D\""}},
    {S,
     "{\"type\":\"string\",\"format\":\"email\"}",
     {"\"a.b@ex-a.org\""},
     {"\"a@b\"", "\"@b.c\"", "\"a b@c.d\""}},
    {S,
     "{\"type\":\"string\",\"format\":\"hostname\"}",
     {"\"a\"", "\"ex-1.org\""},
     {"\"-a\"", "\"a-\"", "\"a..b\""}},
    {S,
     "{\"type\":\"string\",\"format\":\"ipv4\"}",
     {"\"0.10.199.255\""},
     {"\"256.1.1.1\"", "\"1.1.1\"", "\"01.1.1.1\""}},
    {S,
     "{\"type\":\"string\",\"format\":\"ipv6\"}",
     {"\"::\"", "\"::1\"", "\"1::\"", "\"1:2:3:4:5:6:7:8\"", "\"1::2:3\"", "\"1:2:3:4:5:6::7\""},
     {"\"1:2\"", "\":::\"", "\"1::2::3\"", "\"12345::\""}},
    {S,
     "{\"type\":\"string\",\"format\":\"uuid\"}",
     {"\"01234567-89ab-cdef-0123-456789abcdef\""},
     {"\"0123\""}},
    {S,
     "{\"enum\":[\"a\",\"ab\",1,null,{\"k\":[1.5,\"\\n\"]}]}",
     {"\"a\"", "\"ab\"", "1", "null", "{\"k\": [1.5, \"\\n\"]}"},
     {"\"abc\"", "a", "2"}},
    {S, "{\"type\":\"string\",\"enum\":[\"a\",1]}", {"\"a\""}, {"1"}},
    {S, "{\"const\":{\"a\":1}}", {"{\"a\": 1}"}, {"{}", "{\"a\":1}"}},
    {S, "{\"type\":[\"integer\",\"null\"]}", {"1", "null"}, {"true", "\"\""}},
    {S,
     "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"integer\"},\"b\":{\"type\":\"null\"}},"
     "\"required\":[\"b\"]}",
     {"{\"a\":1,\"b\":null}", "{\"b\": null}", "{\n    \"a\": 1,\n    \"b\": null\n}"},
     {"{}", "{\"a\":1}", "{\"b\":null,\"a\":1}", "{\"b\":null,}", "{,\"b\":null}", "{\"b\":null,\"c\":1}",
      "{\"a\":1 ,\"b\":null}", "{  \"b\":null}"}},
    {S, "{\"type\":\"object\",\"properties\":{}}", {"{}"}, {"{\"a\":1}"}},
    {S, "{\"type\":\"object\"}", {"{}", "{\"a\":{\"b\":[1,\"x\"]},\"a\":2}"}, {"[]", "{a:1}"}},
    {S,
     "{\"properties\":{\"ab\":{\"type\":\"null\"}},\"additionalProperties\":{\"type\":\"integer\"}}",
     {"{}", "{\"ab\":null,\"a\":1,\"abc\":2,\"\":3}", "{\"b\":1}"},
     {"{\"ab\":1}", "{\"x\":null}", "{\"ab\":null,\"ab\":1}", "{\"a\\u0062\":1}"}},
    {S,
     "{\"properties\":{\"a\":{}},\"required\":[\"a\",\"z\"]}",
     {"{\"a\":[],\"z\":1}"},
     {"{\"a\":1}", "{\"z\":1,\"a\":1}"}},
    {S,
     "{\"type\":\"array\",\"items\":{\"type\":\"boolean\"},\"minItems\":1,\"maxItems\":3}",
     {"[true]", "[true,false, true]", "[\n  true\n]"},
     {"[]", "[true,]", "[true,true,true,true]", "[1]"}},
    {S, "{\"type\":\"array\"}", {"[]", "[1,[2],{}]"}, {"[,]", "{}"}},
    {S,
     "{\"prefixItems\":[{\"const\":1},{\"const\":2}],\"items\":{\"const\":3}}",
     {"[]", "[1]", "[1,2]", "[1,2,3,3]"},
     {"[2]", "[1,3]", "[1,2,4]"}},
    {S,
     "{\"prefixItems\":[{\"const\":1},{\"const\":2}],\"items\":false,\"minItems\":2}",
     {"[1,2]"},
     {"[]", "[1]", "[1,2,3]"}},
    {S, "{\"type\":\"array\",\"items\":{\"type\":\"null\"},\"maxItems\":0}", {"[]"}, {"[null]"}},
    {S,
     "{\"anyOf\":[{\"type\":\"integer\"},{\"type\":\"string\",\"maxLength\":1}]}",
     {"1", "\"a\""},
     {"\"ab\"", "null"}},
    {S,
     "{\"oneOf\":[{\"properties\":{\"k\":{\"const\":\"a\"}},\"required\":[\"k\"]},{\"properties\":{\"k\":{"
     "\"const\":\"b\"}},\"required\":[\"k\"]}]}",
     {"{\"k\":\"a\"}", "{\"k\": \"b\"}"},
     {"{\"k\":\"c\"}", "{}"}},
    {S,
     "{\"allOf\":[{\"$ref\":\"#/$defs/x\"}],\"description\":\"d\",\"$defs\":{\"x\":{\"type\":\"null\"}}}",
     {"null"},
     {"1"}},
    {S,
     "{\"type\":\"object\",\"properties\":{\"v\":{\"const\":1},\"next\":{\"anyOf\":[{\"$ref\":\"#\"},{"
     "\"type\":\"null\"}]}},\"required\":[\"v\",\"next\"]}",
     {"{\"v\":1,\"next\":null}", "{\"v\":1,\"next\":{\"v\":1,\"next\":{\"v\":1,\"next\":null}}}"},
     {"{\"v\":1}", "{\"v\":1,\"next\":{}}"}},
    {S, "{\"$ref\":\"#/$defs/a~1b\",\"$defs\":{\"a/b\":{\"type\":\"null\"}}}", {"null"}, {"1"}},
    {S, "true", {"1", "{}", "\"\""}, {"x"}},
    {S, "{\"anyOf\":[false,{\"type\":\"null\"}]}", {"null"}, {"1"}},
    {GM_JSON_OBJECT, "", {"{}", "{\"a\": [1, 2.5e3, {\"b\": null}]}"}, {"[]", "1", "{\"a\"}", "{} "}},
    {GM_CHOICE, "[\"yes\",\"no\",\"no way\"]", {"yes", "no", "no way"}, {"y", "no ", "yesno"}},
    {R, "(foo|ba[rz]){2,3}\\d{2}", {"foobar12", "bazbazfoo00"}, {"foo12", "foofoofoofoo12", "foobar1"}},
    {R, "^a*b+?c??$", {"b", "aabbc"}, {"a", "c"}},
    {R, "a.c|[^a-y]|\\u00e9|\\x41", {"a-c", "z", "\xc3\xa9", "A"}, {"a\nc", "b"}},
    {R, "[\\w-]+\\s\\S", {"a-b x", "_\t\xc3\xa9"}, {"a b ", "\xc3\xa9 x"}},
    {R, "(?:a(?P<n>b|)c){2}", {"acabc"}, {"ac", "abcab"}},
    {R, "x{3}y{0,2}z{1,}{", {"xxxyz{", "xxxzz{"}, {"xxyz{", "xxxyyyz{", "xxx{"}},
    {R, "", {""}, {"a"}},
    {R, "(a{0,3}){2,5}b", {"b", "aaab", "aaaaaaaaaaaaaaab"}, {"aaaaaaaaaaaaaaaab"}},
    {R, "(ab?){2,2000}", {"aa", "abab"}, {"a", "aab b"}},
};

static void test_tables(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(TABLE) / sizeof(TABLE[0]); i++) {
        const table_row *row = &TABLE[i];
        gm_machine *machine = rig_machine(row->kind, row->source);
        for (uint32_t k = 0; k < TEXTS_MAX && row->yes[k] != NULL; k++) {
            CM_ASSERT_MSG(rig_accepts(machine, row->yes[k]), "%s refuses %s", row->source, row->yes[k]);
        }
        for (uint32_t k = 0; k < TEXTS_MAX && row->no[k] != NULL; k++) {
            CM_ASSERT_MSG(!rig_accepts(machine, row->no[k]), "%s accepts %s", row->source, row->no[k]);
        }
        gm_machine_release(machine);
    }
}

/* ---- tools: ^ is the marker ---- */

#define BLOCK(calls_)            "\n\n<^tool_calls>\n" calls_ "\n</^tool_calls>"
#define CALL(name_, parameters_) "<^invoke name=\"" name_ "\">\n" parameters_ "\n</^invoke>"
#define TEXT(key_, value_)       "<^parameter name=\"" key_ "\" string=\"true\">" value_ "</^parameter>"
#define JSON(key_, value_)       "<^parameter name=\"" key_ "\" string=\"false\">" value_ "</^parameter>"

static const char TOOLS[] = "{\"tools\":[{\"name\":\"get\",\"parameters\":{\"type\":\"object\","
                            "\"properties\":{\"city\":{\"type\":\"string\"},\"n\":{\"type\":"
                            "\"integer\"},\"u\":{\"anyOf\":[{\"enum\":[\"C\",\"F\"]},{\"type\":\"null\"}]}},"
                            "\"required\":[\"city\"]}},{\"name\":\"now\"},{\"name\":"
                            "\"any\",\"parameters\":{\"type\":\"object\"}}],\"calls_max\":2}";

static void test_tools(void **state)
{
    static const char *const yes[] = {
        BLOCK(CALL("get", TEXT("city", "Oslo <b>\n"))),
        BLOCK(CALL("get", TEXT("city", "</parameter>") "\n" JSON("n", "7"))),
        BLOCK(CALL("get", TEXT("city", "") "\n" TEXT("u", "C"))),
        BLOCK(CALL("get", TEXT("city", "") "\n" JSON("u", "null"))),
        BLOCK(CALL("now", "")),
        BLOCK(CALL("now", "") "\n" CALL("now", "")),
        BLOCK(CALL("any", TEXT("x", "1") "\n" JSON("y", "{\"a\": 1}"))),
        BLOCK(CALL("any", "")),
    };
    static const char *const no[] = {
        "",
        "hello",
        BLOCK(""),
        BLOCK(CALL("get", "")),
        BLOCK(CALL("get", JSON("city", "\"x\""))),
        BLOCK(CALL("get", TEXT("city", "") "\n" TEXT("n", "7"))),
        BLOCK(CALL("get", TEXT("city", "") "\n" TEXT("u", "K"))),
        BLOCK(CALL("get", JSON("n", "7") "\n" TEXT("city", ""))),
        BLOCK(CALL("gone", "")),
        BLOCK(CALL("now", TEXT("x", ""))),
        BLOCK(CALL("now", "") "\n" CALL("now", "") "\n" CALL("now", "")),
        "\n\n<tool_calls>\n" CALL("now", "") "\n</^tool_calls>",
    };
    (void)state;
    gm_machine *machine = rig_machine(GM_TOOLS, TOOLS);
    for (size_t i = 0; i < sizeof(yes) / sizeof(yes[0]); i++) {
        CM_ASSERT_MSG(rig_accepts(machine, yes[i]), "refuses %s", yes[i]);
    }
    for (size_t i = 0; i < sizeof(no) / sizeof(no[0]); i++) {
        CM_ASSERT_MSG(!rig_accepts(machine, no[i]), "accepts %s", no[i]);
    }
    gm_machine_release(machine);
    machine = rig_machine(GM_TOOLS, "{\"text\":true,\"tools\":[{\"name\":\"now\"}]}");
    assert_true(rig_accepts(machine, "hello\n\n<b>"));
    assert_true(rig_accepts(machine, ""));
    assert_true(rig_accepts(machine, "I look" BLOCK(CALL("now", ""))));
    assert_false(rig_accepts(machine, BLOCK(CALL("now", "")) "more"));
    gm_machine_release(machine);
}

/* ---- refusals ---- */

typedef struct refusal {
    gm_kind kind;
    const char *source, *field, *text;
} refusal;

static const refusal REFUSALS[] = {
    {S, "{", "", "not JSON"},
    {S, "{\"type\":\"object\",\"type\":\"object\"}", "", "not JSON"},
    {S, "3", "", "a schema must be"},
    {S, "{\"properties\":{\"a\":{\"not\":{}}}}", "/properties/a", "not is not supported"},
    {S, "{\"items\":{\"uniqueItems\":true}}", "/items", "uniqueItems"},
    {S, "{\"anyOf\":[{},{\"minLenght\":1}]}", "/anyOf/1", "minLenght is no keyword"},
    {S, "{\"type\":\"strnig\"}", "", "type must be"},
    {S, "{\"type\":[\"null\",3]}", "", "type must be"},
    {S, "{\"$ref\":\"#/$defs/x\"}", "", "names nothing"},
    {S, "{\"$ref\":\"http://x/y\"}", "", "names nothing"},
    {S, "{\"$ref\":\"#\"}", "", "no text can satisfy"},
    {S,
     "{\"anyOf\":[{\"$ref\":\"#/$defs/a\"}],\"$defs\":{\"a\":{\"anyOf\":[{\"type\":\"null\"},{\"$ref\":\"#/"
     "$defs/a\"}]}}}",
     "/$defs/a", "leads back to itself"},
    {S, "{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#\"}},\"required\":[\"a\"]}", "",
     "no text can satisfy"},
    {S, "false", "", "no text can satisfy"},
    {S, "{\"type\":\"integer\",\"minimum\":3,\"maximum\":2}", "", "no text can satisfy"},
    {S, "{\"type\":\"string\",\"minLength\":3,\"maxLength\":2}", "", "no text can satisfy"},
    {S, "{\"oneOf\":[{\"type\":\"integer\"},{\"type\":\"number\"}]}", "", "exclude each other"},
    {S, "{\"allOf\":[{},{}]}", "", "allOf"},
    {S, "{\"$ref\":\"#/$defs/a\",\"minimum\":1,\"$defs\":{\"a\":{}}}", "", "minimum beside $ref"},
    {S, "{\"enum\":[1,2],\"minimum\":2}", "", "minimum beside enum"},
    {S, "{\"type\":\"object\",\"anyOf\":[{}]}", "", "narrower"},
    {S, "{\"pattern\":\"a\",\"maxLength\":3}", "", "only one of pattern"},
    {S, "{\"format\":\"iban\"}", "", "format iban"},
    {S, "{\"pattern\":\"(?=a)\"}", "", "look-around"},
    {S, "{\"pattern\":\"a^b\"}", "", "^ and $"},
    {S, "{\"type\":\"number\",\"multipleOf\":0.1}", "", "multipleOf"},
    {S, "{\"type\":\"integer\",\"multipleOf\":7,\"maximum\":1e9}", "", "multipleOf 7"},
    {S, "{\"minimum\":\"1\"}", "", "must be numbers"},
    {S, "{\"required\":[\"a\"],\"additionalProperties\":false}", "", "required names a"},
    {S, "{\"required\":[1]}", "", "list of names"},
    {S, "{\"items\":[{}]}", "", "prefixItems"},
    {S, "{\"minItems\":-1}", "", "minItems must be"},
    {S, "{\"minItems\":3,\"maxItems\":2}", "", "minItems not above"},
    {S, "{\"enum\":[]}", "", "enum must be"},
    {S, "{\"anyOf\":[]}", "", "anyOf must be"},
    {GM_CHOICE, "[]", "", "at least one"},
    {GM_CHOICE, "[\"a\",1]", "", "choice 1"},
    {GM_CHOICE, "[\"\"]", "", "choice 0"},
    {R, "a)", "", "without its ("},
    {R, "(a", "", "without its )"},
    {R, "[a", "", "without its ]"},
    {R, "*a", "", "nothing to repeat"},
    {R, "a**", "", "repetition of a repetition"},
    {R, "(a)\\1", "", "not supported"},
    {R, "\\bword", "", "not supported"},
    {R, "\\p{L}", "", "not supported"},
    {R, "(?i)a", "", "flags"},
    {R, "[z-a]", "", "range"},
    {R, "a{3,2}", "", "out of order"},
    {R, "\\", "", "backslash"},
    {R, "\xff", "", "UTF-8"},
    {R, "[^\\s\\S]", "", "no text can satisfy"},
    {GM_TOOLS, "{}", "/tools", "1 to 128 tools"},
    {GM_TOOLS, "{\"tools\":[{}]}", "/tools/0/parameters", "name"},
    {GM_TOOLS, "{\"tools\":[{\"name\":\"a\",\"parameters\":{\"type\":\"string\"}}]}", "/tools/0/parameters",
     "schema of an object"},
    {GM_TOOLS, "{\"tools\":[{\"name\":\"a\",\"parameters\":{\"properties\":{\"x\":{\"not\":{}}}}}]}",
     "/tools/0/parameters/properties/x", "not is not"},
};

static void test_refusals(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(REFUSALS) / sizeof(REFUSALS[0]); i++) {
        const refusal *row = &REFUSALS[i];
        gm_grammar *grammar;
        cm_error err = {0};
        cm_status status = gm_compile(row->kind, row->source, strlen(row->source), &grammar, &err);
        CM_ASSERT_MSG(status != CM_OK, "%s compiles", row->source);
        CM_ASSERT_MSG(strstr(err.text, row->text) != NULL && strcmp(err.field, row->field) == 0,
                      "%s: \"%s\" at \"%s\"", row->source, err.text, err.field);
    }
}

static char *repeated(const char *first, const char *unit, uint32_t n, const char *last)
{
    cm_bytes text;
    cm_bytes_init(&text, 0);
    cm_bytes_append_text(&text, first);
    for (uint32_t i = 0; i < n; i++) {
        cm_bytes_append_text(&text, unit);
    }
    cm_bytes_append_text(&text, last);
    return (char *)text.data;
}

static void test_bounds(void **state)
{
    char *sources[] = {
        repeated("{\"enum\":[", "\"12345678901234567890\",", 20000, "1]}"),
        repeated("", "(", 100, ""),
        repeated("", "[^a]", 60000, ""),
        repeated("", "{\"items\":", 300, "{}"),
    };
    gm_grammar *grammar;
    cm_error err = {0};
    (void)state;
    assert_int_equal(gm_compile(GM_JSON_SCHEMA, sources[0], strlen(sources[0]), &grammar, &err),
                     CM_E_TOO_LONG);
    assert_int_equal(gm_compile(GM_REGEX, sources[1], strlen(sources[1]), &grammar, &err), CM_E_TOO_LONG);
    assert_non_null(strstr(err.text, "64 groups"));
    assert_int_equal(gm_compile(GM_REGEX, sources[2], strlen(sources[2]), &grammar, &err), CM_E_TOO_LONG);
    assert_int_equal(gm_compile(GM_JSON_SCHEMA, sources[3], strlen(sources[3]), &grammar, &err),
                     CM_E_INVALID);
    for (size_t i = 0; i < 4; i++) {
        cm_free(sources[i]);
    }
    /* what must nest more deeply than a machine goes is refused, what only may is not */
    char *deep = repeated("", "{\"type\":\"array\",\"minItems\":1,\"items\":", 250, "{\"type\":\"null\"}");
    char *whole = repeated(deep, "}", 250, "");
    assert_int_equal(gm_compile(GM_JSON_SCHEMA, whole, strlen(whole), &grammar, &err), CM_E_TOO_LONG);
    assert_non_null(strstr(err.text, "nests too deeply"));
    cm_free(deep);
    cm_free(whole);
}

/* ---- nesting: refused before there is no way back ---- */

static void test_depth(void **state)
{
    (void)state;
    gm_machine *machine = rig_machine(GM_JSON_SCHEMA, "{\"type\":\"array\",\"items\":{\"$ref\":\"#\"}}");
    gm_state at = gm_begin(machine, false), next;
    uint32_t depth = 0;
    while ((next = gm_advance(machine, at, '[')) != GM_DEAD) {
        gm_state_release(machine, at);
        at = next;
        depth++;
    }
    assert_in_range(depth, 60, GM_DEPTH_MAX);
    for (; depth > 0; depth--) {
        next = gm_advance(machine, at, ']');
        assert_int_not_equal(next, GM_DEAD);
        gm_state_release(machine, at);
        at = next;
    }
    assert_true(gm_is_complete(machine, at));
    gm_state_release(machine, at);
    gm_machine_release(machine);
}

/* ---- masks ---- */

static bool bit(const uint32_t *bits, uint32_t id)
{
    return (bits[id / 32] >> id % 32 & 1) != 0;
}

/* Byte by byte, without the tree: the reference. */
static bool allowed_by_bytes(gm_machine *machine, gm_state at, uint32_t id)
{
    size_t n = 0;
    const uint8_t *bytes = rig_bytes(NULL, id, &n);
    if (bytes == NULL) {
        gm_state next = gm_advance(machine, at, id);
        gm_state_release(machine, next);
        return next != GM_DEAD;
    }
    gm_state_hold(machine, at);
    for (size_t i = 0; i < n && at != GM_DEAD; i++) {
        gm_state next = gm_advance(machine, at, bytes[i]);
        gm_state_release(machine, at);
        at = next;
    }
    gm_state_release(machine, at);
    return at != GM_DEAD;
}

/* exactly: as many as the bytes allow; else at most, since very ambiguous grammars are cut short. */
static uint32_t check_mask(gm_machine *machine, gm_state at, const char *source, bool exactly, uint32_t *bits)
{
    uint32_t n = 0;
    gm_mask(machine, at, bits);
    for (uint32_t id = 0; id < rig_n_id(); id++) {
        bool by_bytes = allowed_by_bytes(machine, at, id);
        CM_ASSERT_MSG(bit(bits, id) ? by_bytes : !by_bytes || !exactly, "%s: token %u", source, id);
        n += bit(bits, id);
    }
    CM_ASSERT_MSG(bit(bits, RIG_EOS) == gm_is_complete(machine, at), "%s: end of sequence", source);
    CM_ASSERT_MSG(!bit(bits, RIG_USER) && !bit(bits, RIG_THINK_END), "%s: control tokens", source);
    CM_ASSERT_MSG(n > 0, "%s: a dead end", source);
    return n;
}

/* Most of the time anything; later whatever ends things. */
static uint32_t choose(const uint32_t *bits, uint32_t n, uint64_t seed, uint64_t step)
{
    static const char ends[] = "\"}]";
    bool closing = step > 60;
    if (closing && bit(bits, RIG_EOS)) {
        return RIG_EOS;
    }
    for (uint32_t i = 0; closing && i < 3 && cm_rng_uniform(seed, step, 1) < 0.7; i++) {
        if (bit(bits, (uint8_t)ends[i])) {
            return (uint8_t)ends[i];
        }
    }
    uint32_t left = (uint32_t)(cm_rng_uniform(seed, step, 0) * n), id = 0;
    for (;; id++) {
        if (bit(bits, id) && left-- == 0) {
            return id;
        }
    }
}

/* false: the grammar goes on as long as one likes, and this walk did. */
static bool walk_to_the_end(gm_machine *machine, const char *source, uint64_t seed, uint64_t n_step,
                            bool exactly)
{
    uint32_t bits[32];
    gm_state at = gm_begin(machine, false);
    CM_ASSERT(gm_vocab_words(rig_n_id()) <= 32);
    for (uint64_t step = 0; at != GM_DONE && step < n_step; step++) {
        uint32_t n;
        if (step < 200) {
            n = check_mask(machine, at, source, exactly, bits);
        } else {
            gm_mask(machine, at, bits);
            n = 0;
            for (uint32_t id = 0; id < rig_n_id(); id++) {
                n += bit(bits, id);
            }
        }
        CM_ASSERT_MSG(n > 0, "%s: a dead end", source);
        gm_state next = gm_advance(machine, at, choose(bits, n, seed, step));
        CM_ASSERT_MSG(next != GM_DEAD, "%s: the mask lied", source);
        gm_state_release(machine, at);
        at = next;
    }
    gm_state_release(machine, at);
    return at == GM_DONE;
}

static bool walk_random(gm_kind kind, char *(*make)(uint64_t seed), uint64_t seed, uint64_t n_step)
{
    bool ended = true;
    char *source = make(seed);
    gm_grammar *grammar;
    cm_error err = {0};
    cm_status status = gm_compile(kind, source, strlen(source), &grammar, &err);
    if (status != CM_OK) {
        CM_ASSERT_MSG(strstr(err.text, "no text can satisfy") != NULL, "%s: %s at %s", source, err.text,
                      err.field);
    } else {
        gm_machine *machine = gm_machine_create(grammar, rig_vocab());
        ended = walk_to_the_end(machine, source, seed, n_step, kind == GM_JSON_SCHEMA);
        gm_machine_release(machine);
    }
    cm_free(source);
    return ended;
}

static void test_random_schemas(void **state)
{
    (void)state;
    for (uint64_t seed = 1; seed <= 150; seed++) {
        CM_ASSERT_MSG(walk_random(GM_JSON_SCHEMA, rig_random_schema, seed, 20000), "seed %llu: no end",
                      (unsigned long long)seed);
    }
}

static void test_random_regexes(void **state)
{
    uint32_t n_ended = 0;
    (void)state;
    for (uint64_t seed = 1; seed <= 150; seed++) {
        n_ended += walk_random(GM_REGEX, rig_random_regex, seed, 300);
    }
    assert_in_range(n_ended, 75, 150);
}

/* The mask of a long count far from its ends is remembered once, and right near them. */
static void test_counts(void **state)
{
    uint32_t bits[32];
    gm_machine_stats stats;
    (void)state;
    gm_machine *machine = rig_machine(GM_REGEX, "x[a-z]{40,400}y");
    gm_state at = rig_run(machine, "x");
    for (uint32_t i = 0; i <= 400; i++) {
        check_mask(machine, at, "counts", true, bits);
        assert_true(bit(bits, 'a') == (i < 400));
        assert_true(bit(bits, 'y')); /* of [a-z], or the end */
        gm_state next = gm_advance(machine, at, i < 400 ? 'a' : 'y');
        gm_state_release(machine, at);
        at = next;
    }
    assert_true(gm_is_complete(machine, at));
    gm_state_release(machine, at);
    gm_machine_stats_get(machine, &stats);
    assert_int_equal(stats.n_mask, 401);
    gm_machine_release(machine);
}

/* A regular expression with exponentially many states: bounded, and no dead end. */
static void test_ambiguous(void **state)
{
    static const char *const sources[] = {"(.*a.{0,300}){3}", "(a|b|ab|ba|aa){0,1000}(a|b|aa){0,1000}",
                                          "((a?){0,500}b?){0,500}x"};
    uint32_t bits[32];
    (void)state;
    for (size_t i = 0; i < 3; i++) {
        gm_machine *machine = rig_machine(GM_REGEX, sources[i]);
        gm_state at = gm_begin(machine, false);
        for (uint64_t step = 0; step < 60; step++) {
            static const char text[] = "ababaabba";
            gm_mask(machine, at, bits);
            uint32_t id = (uint8_t)text[step % 9];
            CM_ASSERT_MSG(bit(bits, id), "%s: %c at %llu", sources[i], (int)id, (unsigned long long)step);
            gm_state next = gm_advance(machine, at, id);
            assert_int_not_equal(next, GM_DEAD);
            gm_state_release(machine, at);
            at = next;
        }
        gm_state_release(machine, at);
        gm_machine_release(machine);
    }
}

/* ---- states ---- */

/* What was asked before changes nothing, also when most of it was forgotten. */
static void test_history(void **state)
{
    static const char source[] = "(.*a.{0,30}){2}z";
    uint32_t bits[2][32];
    (void)state;
    gm_machine *used = rig_machine(GM_REGEX, source), *fresh = rig_machine(GM_REGEX, source);
    for (uint64_t run = 0; run < 40; run++) { /* some ten thousands of states */
        gm_state at = gm_begin(used, false);
        for (uint64_t i = 0; i < 400; i++) {
            uint32_t id = (uint32_t)(cm_rng_uniform(run, i, 0) * 3) + 'a';
            gm_state next = gm_advance(used, at, id);
            gm_state_release(used, at);
            at = next;
        }
        gm_mask(used, at, bits[0]);
        gm_state_release(used, at);
    }
    gm_state a = gm_begin(used, false), b = gm_begin(fresh, false);
    for (uint64_t i = 0; i < 100; i++) {
        gm_mask(used, a, bits[0]);
        gm_mask(fresh, b, bits[1]);
        assert_memory_equal(bits[0], bits[1], sizeof(bits[0][0]) * gm_vocab_words(rig_n_id()));
        uint32_t id = (uint32_t)(cm_rng_uniform(99, i, 0) * 3) + 'a';
        gm_state next_a = gm_advance(used, a, id), next_b = gm_advance(fresh, b, id);
        gm_state_release(used, a);
        gm_state_release(fresh, b);
        a = next_a;
        b = next_b;
    }
    gm_state_release(used, a);
    gm_state_release(fresh, b);
    gm_machine_release(used);
    gm_machine_release(fresh);
}

static void test_roll_back(void **state)
{
    (void)state;
    gm_machine *machine = rig_machine(GM_CHOICE, "[\"abc\",\"abd\"]");
    gm_state ab = rig_run(machine, "ab"), wrong = gm_advance(machine, ab, 'd');
    assert_true(gm_is_complete(machine, wrong));
    gm_state_release(machine, wrong);
    gm_state right = gm_advance(machine, ab, 'c');
    assert_true(gm_is_complete(machine, right));
    gm_state done = gm_advance(machine, right, RIG_EOS);
    assert_int_equal(done, GM_DONE);
    assert_int_equal(gm_advance(machine, ab, RIG_EOS), GM_DEAD);
    assert_int_equal(gm_advance(machine, done, RIG_EOS), GM_DONE);
    assert_int_equal(gm_advance(machine, done, 'a'), GM_DEAD);
    gm_state_release(machine, ab);
    gm_state_release(machine, right);
    gm_machine_release(machine);
}

static void test_thinking(void **state)
{
    uint32_t bits[32];
    (void)state;
    gm_machine *machine = rig_machine(GM_CHOICE, "[\"a\"]");
    gm_state at = gm_begin(machine, true);
    gm_mask(machine, at, bits);
    assert_true(bit(bits, 'z') && bit(bits, RIG_THINK_END) && bit(bits, RIG_PIECES));
    assert_false(bit(bits, RIG_EOS) || bit(bits, RIG_DSML) || bit(bits, RIG_USER));
    assert_int_equal(gm_advance(machine, at, 'z'), GM_THINK);
    assert_int_equal(gm_advance(machine, at, RIG_EOS), GM_DEAD);
    at = gm_advance(machine, at, RIG_THINK_END);
    gm_mask(machine, at, bits);
    assert_true(bit(bits, 'a'));
    assert_false(bit(bits, 'z') || bit(bits, RIG_THINK_END) || bit(bits, RIG_EOS));
    gm_state_release(machine, at);
    gm_machine_release(machine);
}

static const uint8_t *bytes_without_a_byte(void *ctx, uint32_t id, size_t *n_out)
{
    return id == 'q' ? NULL : rig_bytes(ctx, id, n_out);
}

static void test_vocabulary_without_a_byte(void **state)
{
    gm_vocab *vocab;
    cm_error err = {0};
    gm_vocab_source source = {.n_id = rig_n_id(), .bytes = bytes_without_a_byte, .eos = RIG_EOS};
    (void)state;
    assert_int_equal(gm_vocab_create(&source, &vocab, &err), CM_E_UNSUPPORTED);
    assert_non_null(strstr(err.text, "0x71"));
}

static int free_vocab(void **state)
{
    (void)state;
    gm_vocab_destroy(rig_vocab());
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tables),
        cmocka_unit_test(test_tools),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_bounds),
        cmocka_unit_test(test_depth),
        cmocka_unit_test(test_random_schemas),
        cmocka_unit_test(test_random_regexes),
        cmocka_unit_test(test_counts),
        cmocka_unit_test(test_ambiguous),
        cmocka_unit_test(test_history),
        cmocka_unit_test(test_roll_back),
        cmocka_unit_test(test_thinking),
        cmocka_unit_test(test_vocabulary_without_a_byte),
    };
    return cmocka_run_group_tests(tests, NULL, free_vocab);
}
