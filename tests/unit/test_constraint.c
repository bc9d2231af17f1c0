/* What bodies demand of answers: kind and source of the grammar, refusals, and that what tools give compiles.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

#include "gateway/constraint.h"

#define TOOL(name_, more_) "{\"type\":\"function\",\"function\":{\"name\":\"" name_ "\"" more_ "}}"
#define PLAIN              TOOL("f", ",\"parameters\":{\"type\":\"object\",\"properties\":{\"x\":{\"type\":\"integer\"}}}")
#define STRICT                                                                                               \
    TOOL("s",                                                                                                \
         ",\"strict\":true,\"parameters\":{\"type\":\"object\",\"properties\":{\"y\":{\"type\":\"null\"}}}")
#define PLAIN_GRAMMAR                                                                                        \
    "{\"name\":\"f\",\"parameters\":{\"type\":\"object\",\"properties\":{\"x\":{\"type\":\"integer\"}}}}"
#define FREE_GRAMMAR "{\"name\":\"f\",\"parameters\":{\"type\":\"object\"}}"
#define STRICT_GRAMMAR                                                                                       \
    "{\"name\":\"s\",\"parameters\":{\"type\":\"object\",\"properties\":{\"y\":{\"type\":\"null\"}}}}"
#define FORMAT                                                                                               \
    "\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"schema\":{\"type\":\"null\"}}}"

typedef struct demand {
    const char *body;
    bool tools;
    uint32_t kind; /* 0: none */
    const char *source;
} demand;

static const demand DEMANDS[] = {
    {"{}", false, 0, ""},
    {"{\"response_format\":{\"type\":\"text\"},\"guided_json\":null}", false, 0, ""},
    {"{" FORMAT "}", false, GM_JSON_SCHEMA, "{\"type\":\"null\"}"},
    {"{\"guided_json\":{\"b\":1,\"a\":0.1,\"minimum\":1.5}}", false, GM_JSON_SCHEMA,
     "{\"b\":1,\"a\":0.10000000000000001,\"minimum\":1.5}"},
    {"{\"guided_json\":\" {}\"}", false, GM_JSON_SCHEMA, " {}"},
    {"{\"response_format\":{\"type\":\"json_object\"}}", false, GM_JSON_OBJECT, ""},
    {"{\"structured_outputs\":{\"regex\":\"a\\\"b\"}}", false, GM_REGEX, "a\"b"},
    {"{\"guided_choice\":[\"a\",\"b\"]}", false, GM_CHOICE, "[\"a\",\"b\"]"},
    {"{\"tools\":[" PLAIN "]}", true, 0, ""},
    {"{\"tools\":[" PLAIN "],\"tool_choice\":\"auto\"}", true, 0, ""},
    {"{\"tools\":[" PLAIN "," STRICT "]}", true, GM_TOOLS,
     "{\"tools\":[" FREE_GRAMMAR "," STRICT_GRAMMAR "],\"text\":true}"},
    {"{\"tools\":[" PLAIN "," STRICT "],\"tool_choice\":\"required\"}", true, GM_TOOLS,
     "{\"tools\":[" PLAIN_GRAMMAR "," STRICT_GRAMMAR "]}"},
    {"{\"tools\":[" PLAIN "],\"tool_choice\":\"required\",\"parallel_tool_calls\":false}", true, GM_TOOLS,
     "{\"tools\":[" PLAIN_GRAMMAR "],\"calls_max\":1}"},
    {"{\"tools\":[" PLAIN "," STRICT
     "],\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"s\"}}}",
     true, GM_TOOLS, "{\"tools\":[" STRICT_GRAMMAR "],\"calls_max\":1}"},
    {"{\"tools\":[" PLAIN "]," FORMAT "}", true, GM_TOOLS,
     "{\"tools\":[" FREE_GRAMMAR "],\"schema\":{\"type\":\"null\"}}"},
    {"{\"tools\":[" PLAIN "],\"tool_choice\":\"required\"," FORMAT "}", true, GM_TOOLS,
     "{\"tools\":[" PLAIN_GRAMMAR "]}"},
    {"{\"tools\":[" PLAIN "],\"tool_choice\":\"none\"," FORMAT "}", false, GM_JSON_SCHEMA,
     "{\"type\":\"null\"}"},
};

static void test_demands(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(DEMANDS) / sizeof(DEMANDS[0]); i++) {
        gw_constraint c, copy;
        gw_error error;
        json_t *body = json_loads(DEMANDS[i].body, 0, NULL);
        assert_non_null(body);
        if (gw_constraint_read(body, DEMANDS[i].tools, &c, &error) != CM_OK) {
            fail_msg("%s: %s", DEMANDS[i].body, error.message);
        }
        if ((uint32_t)c.kind != DEMANDS[i].kind ||
            strcmp(c.source != NULL ? c.source : "", DEMANDS[i].source) != 0) {
            fail_msg("%s: kind %d of %s", DEMANDS[i].body, (int)c.kind, c.source);
        }
        gw_constraint_copy(&c, &copy);
        gw_constraint_free(&c);
        bool compiles = strstr(DEMANDS[i].source, "\"b\":1") == NULL;
        assert_int_equal(gw_constraint_check(&copy, &error) == CM_OK, compiles);
        gw_constraint_free(&copy);
        json_decref(body);
    }
}

static const struct {
    const char *body, *param, *text;
} REFUSALS[] = {
    {"{\"tools\":[" PLAIN "],\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"g\"}}}",
     "tool_choice", "does not have"},
    {"{\"tools\":[" PLAIN "],\"tool_choice\":{\"type\":\"function\"}}", "tool_choice", "names a function"},
    {"{\"tools\":[" PLAIN "],\"guided_regex\":\"a\"}", "guided_regex", "together with tools"},
    {"{\"tools\":[" PLAIN "],\"guided_json\":\"{\"}", "guided_json", "JSON schema"},
};

static void test_refusals(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof(REFUSALS) / sizeof(REFUSALS[0]); i++) {
        gw_constraint c;
        gw_error error;
        json_t *body = json_loads(REFUSALS[i].body, 0, NULL);
        assert_int_not_equal(gw_constraint_read(body, true, &c, &error), CM_OK);
        if (strcmp(error.param, REFUSALS[i].param) != 0 || strstr(error.message, REFUSALS[i].text) == NULL) {
            fail_msg("%s: %s: %s", REFUSALS[i].body, error.param, error.message);
        }
        json_decref(body);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_demands), cmocka_unit_test(test_refusals)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
