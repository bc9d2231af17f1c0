/* The Responses surface: events to exact objects, bodies to chat bodies. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "gateway/responses_body.h"
#include "tests/unit/surface_sink.h"

#define ECHO_OF(instructions, tools)                                                                         \
    "\"object\":\"response\",\"background\":false,\"instructions\":" instructions                            \
    ",\"max_output_tokens\":null,\"max_tool_calls\":null,\"metadata\":{},\"parallel_tool_calls\":true,"      \
    "\"previous_response_id\":null,\"prompt_cache_key\":null,\"reasoning\":{\"effort\":null,\"summary\":"    \
    "null},\"safety_identifier\":null,\"service_tier\":\"default\",\"store\":false,\"temperature\":1.0,"     \
    "\"text\":{\"format\":{\"type\":\"text\"}},\"tool_choice\":\"auto\",\"tools\":[" tools                   \
    "],\"top_logprobs\":0,\"top_p\":1.0,\"truncation\":\"disabled\",\"user\":null"
#define ECHO ECHO_OF("null", "")
#define USAGE                                                                                                \
    "{\"input_tokens\":4,\"input_tokens_details\":{\"cached_tokens\":1},\"output_tokens\":3,"                \
    "\"output_tokens_details\":{\"reasoning_tokens\":2},\"total_tokens\":7}"
#define RESPONSE_OF(status, output, usage, error, details, echo)                                             \
    "{\"id\":\"r1\",\"created_at\":5,\"status\":\"" status "\",\"model\":\"m\",\"output\":[" output          \
    "],\"usage\":" usage ",\"error\":" error ",\"incomplete_details\":" details "," echo "}"
#define BEGUN(echo)             RESPONSE_OF("in_progress", "", "null", "null", "null", echo)
#define COMPLETED(output, echo) RESPONSE_OF("completed", output, USAGE, "null", "null", echo)
#define EVENT(type, n, rest)    "{\"type\":\"response." type "\",\"sequence_number\":" n "," rest "}"
#define ADDED(n, index, item)   EVENT("output_item.added", n, "\"output_index\":" index ",\"item\":" item)
#define DONE(n, index, item)    EVENT("output_item.done", n, "\"output_index\":" index ",\"item\":" item)
#define ABOUT(type, n, id, index, rest)                                                                      \
    EVENT(type, n, "\"item_id\":\"" id "\",\"output_index\":" index "," rest)
#define TEXT(type, n, id, index, rest) ABOUT(type, n, id, index, "\"content_index\":0," rest)
#define REASONING_PART(text)           "{\"type\":\"reasoning_text\",\"text\":\"" text "\"}"
#define REASONING(index, status, content)                                                                    \
    "{\"id\":\"rs_#" index "\",\"type\":\"reasoning\",\"status\":\"" status "\",\"summary\":[],"             \
    "\"content\":[" content "]}"
#define TEXT_PART(text) "{\"type\":\"output_text\",\"text\":\"" text "\",\"annotations\":[],\"logprobs\":[]}"
#define MESSAGE(index, status, content)                                                                      \
    "{\"id\":\"msg_#" index "\",\"type\":\"message\",\"status\":\"" status "\",\"role\":\"assistant\","      \
    "\"content\":[" content "]}"
#define CALL_OF(index, status, name, more, arguments)                                                        \
    "{\"id\":\"fc_#" index "\",\"type\":\"function_call\",\"status\":\"" status                              \
    "\",\"call_id\":\"call_#" index "\",\"name\":\"" name "\"," more "\"arguments\":\"" arguments "\"}"
#define CALL(index, status, name, arguments) CALL_OF(index, status, name, "", arguments)
#define CUSTOM(index, status, name, input)                                                                   \
    "{\"id\":\"ctc_#" index "\",\"type\":\"custom_tool_call\",\"status\":\"" status                          \
    "\",\"call_id\":\"call_#" index "\",\"name\":\"" name "\",\"input\":\"" input "\"}"

/* The two events that every answer begins with. */
#define HEAD(echo)                                                                                           \
    EVENT("created", "0", "\"response\":" BEGUN(echo)), EVENT("in_progress", "1", "\"response\":" BEGUN(echo))

/* ---- events ---- */

static void reasoning_then_text(void **state)
{
    (void)state;
    sink s;
    sink_open(&s, &gw_surface_responses, "{\"stream\":true}");
    sink_start(&s);
    sink_piece(&s, MD_PIECE_REASONING, 0, "h\"");
    sink_piece(&s, MD_PIECE_REASONING, 0, "m");
    sink_piece(&s, MD_PIECE_CONTENT, 0, "a\n");
    sink_piece(&s, MD_PIECE_CONTENT, 0, "b");
    sink_finish(&s, GW_REASON_STOP, NULL, NULL);
#define R_DONE REASONING("0", "completed", REASONING_PART("h\\\"m"))
#define M_DONE MESSAGE("1", "completed", TEXT_PART("a\\nb"))
    SINK_EXPECT(&s, HEAD(ECHO), ADDED("2", "0", REASONING("0", "in_progress", "")),
                TEXT("content_part.added", "3", "rs_#0", "0", "\"part\":" REASONING_PART("")),
                TEXT("reasoning_text.delta", "4", "rs_#0", "0", "\"delta\":\"h\\\"\""),
                TEXT("reasoning_text.delta", "5", "rs_#0", "0", "\"delta\":\"m\""),
                TEXT("reasoning_text.done", "6", "rs_#0", "0", "\"text\":\"h\\\"m\""),
                TEXT("content_part.done", "7", "rs_#0", "0", "\"part\":" REASONING_PART("h\\\"m")),
                DONE("8", "0", R_DONE), ADDED("9", "1", MESSAGE("1", "in_progress", "")),
                TEXT("content_part.added", "10", "msg_#1", "1", "\"part\":" TEXT_PART("")),
                TEXT("output_text.delta", "11", "msg_#1", "1", "\"delta\":\"a\\n\",\"logprobs\":[]"),
                TEXT("output_text.delta", "12", "msg_#1", "1", "\"delta\":\"b\",\"logprobs\":[]"),
                TEXT("output_text.done", "13", "msg_#1", "1", "\"text\":\"a\\nb\",\"logprobs\":[]"),
                TEXT("content_part.done", "14", "msg_#1", "1", "\"part\":" TEXT_PART("a\\nb")),
                DONE("15", "1", M_DONE),
                EVENT("completed", "16", "\"response\":" COMPLETED(R_DONE "," M_DONE, ECHO)));
    sink_close(&s);
}

static void parallel_calls(void **state)
{
    (void)state;
    sink s;
    sink_open(&s, &gw_surface_responses, "{\"stream\":true}");
    sink_start(&s);
    sink_piece(&s, MD_PIECE_CALL, 0, "f");
    sink_piece(&s, MD_PIECE_ARGS, 0, "{\"a\": ");
    sink_piece(&s, MD_PIECE_ARGS, 0, "1}");
    sink_piece(&s, MD_PIECE_CALL, 1, "g");
    sink_piece(&s, MD_PIECE_ARGS, 1, "{}");
    sink_finish(&s, GW_REASON_TOOL_CALLS, NULL, NULL);
#define F_DONE CALL("0", "completed", "f", "{\\\"a\\\": 1}")
#define G_DONE CALL("1", "completed", "g", "{}")
    SINK_EXPECT(
        &s, HEAD(ECHO), ADDED("2", "0", CALL("0", "in_progress", "f", "")),
        ABOUT("function_call_arguments.delta", "3", "fc_#0", "0", "\"delta\":\"{\\\"a\\\": \""),
        ABOUT("function_call_arguments.delta", "4", "fc_#0", "0", "\"delta\":\"1}\""),
        ABOUT("function_call_arguments.done", "5", "fc_#0", "0",
              "\"name\":\"f\",\"arguments\":\"{\\\"a\\\": 1}\""),
        DONE("6", "0", F_DONE), ADDED("7", "1", CALL("1", "in_progress", "g", "")),
        ABOUT("function_call_arguments.delta", "8", "fc_#1", "1", "\"delta\":\"{}\""),
        ABOUT("function_call_arguments.done", "9", "fc_#1", "1", "\"name\":\"g\",\"arguments\":\"{}\""),
        DONE("10", "1", G_DONE),
        EVENT("completed", "11", "\"response\":" COMPLETED(F_DONE "," G_DONE, ECHO)));
    sink_close(&s);
}

/* A tool that takes text gets the text; one of a group its own name. */
static void custom_and_grouped_tools(void **state)
{
    (void)state;
#define TOOLS                                                                                                \
    "{\"type\":\"custom\",\"name\":\"patch\"},"                                                              \
    "{\"type\":\"namespace\",\"name\":\"mail\",\"tools\":[{\"type\":\"function\",\"name\":\"send\"}]}"
    sink s;
    sink_open(&s, &gw_surface_responses, "{\"stream\":true,\"tools\":[" TOOLS "]}");
    sink_start(&s);
    sink_piece(&s, MD_PIECE_CALL, 0, "patch");
    sink_piece(&s, MD_PIECE_ARGS, 0, "{\"input\": \"*** ");
    sink_piece(&s, MD_PIECE_ARGS, 0, "Begin\\n\"}");
    sink_piece(&s, MD_PIECE_CALL, 1, "mail__send");
    sink_piece(&s, MD_PIECE_ARGS, 1, "{}");
    sink_finish(&s, GW_REASON_TOOL_CALLS, NULL, NULL);
#define GROUPED_ECHO ECHO_OF("null", TOOLS)
#define P_DONE       CUSTOM("0", "completed", "patch", "*** Begin\\n")
#define S_DONE       CALL_OF("1", "completed", "send", "\"namespace\":\"mail\",", "{}")
    SINK_EXPECT(
        &s, HEAD(GROUPED_ECHO), ADDED("2", "0", CUSTOM("0", "in_progress", "patch", "")),
        ABOUT("custom_tool_call_input.delta", "3", "ctc_#0", "0", "\"delta\":\"*** Begin\\n\""),
        ABOUT("custom_tool_call_input.done", "4", "ctc_#0", "0", "\"input\":\"*** Begin\\n\""),
        DONE("5", "0", P_DONE),
        ADDED("6", "1", CALL_OF("1", "in_progress", "send", "\"namespace\":\"mail\",", "")),
        ABOUT("function_call_arguments.delta", "7", "fc_#1", "1", "\"delta\":\"{}\""),
        ABOUT("function_call_arguments.done", "8", "fc_#1", "1", "\"name\":\"send\",\"arguments\":\"{}\""),
        DONE("9", "1", S_DONE),
        EVENT("completed", "10", "\"response\":" COMPLETED(P_DONE "," S_DONE, GROUPED_ECHO)));
    sink_close(&s);
}

/* Cut off: the last item is as unfinished as the response. */
static void length(void **state)
{
    (void)state;
    sink s;
    sink_open(&s, &gw_surface_responses, "{\"stream\":true}");
    sink_start(&s);
    sink_piece(&s, MD_PIECE_CONTENT, 0, "a");
    sink_finish(&s, GW_REASON_LENGTH, NULL, NULL);
#define CUT MESSAGE("0", "incomplete", TEXT_PART("a"))
    SINK_EXPECT(&s, HEAD(ECHO), ADDED("2", "0", MESSAGE("0", "in_progress", "")),
                TEXT("content_part.added", "3", "msg_#0", "0", "\"part\":" TEXT_PART("")),
                TEXT("output_text.delta", "4", "msg_#0", "0", "\"delta\":\"a\",\"logprobs\":[]"),
                TEXT("output_text.done", "5", "msg_#0", "0", "\"text\":\"a\",\"logprobs\":[]"),
                TEXT("content_part.done", "6", "msg_#0", "0", "\"part\":" TEXT_PART("a")),
                DONE("7", "0", CUT),
                EVENT("incomplete", "8",
                      "\"response\":" RESPONSE_OF("incomplete", CUT, USAGE, "null",
                                                  "{\"reason\":\"max_output_tokens\"}", ECHO)));
    sink_close(&s);
}

/* Told early, the two first events are not told again. */
static void begins_before_it_starts(void **state)
{
    (void)state;
    sink s;
    sink_open(&s, &gw_surface_responses, "{\"stream\":true}");
    s.surface->writer.begin(s.writer, "r1", "m", 5);
    assert_int_equal(s.n, 2);
    sink_start(&s);
    sink_finish(&s, GW_REASON_STOP, NULL, NULL);
    SINK_EXPECT(&s, HEAD(ECHO), EVENT("completed", "2", "\"response\":" COMPLETED("", ECHO)));
    sink_close(&s);
}

/* A heartbeat takes no number; a failure tells what there was. */
static void heartbeat_and_failure(void **state)
{
    (void)state;
    sink s;
    cm_bytes out;
    gw_error error;
    sink_open(&s, &gw_surface_responses, "{\"stream\":true}");
    sink_start(&s);
    cm_bytes_init(&out, 0);
    s.surface->writer.keep_alive(s.writer, &out);
    sink_expect_text(&out, EVENT("in_progress", "1", "\"response\":" BEGUN(ECHO)));
    sink_piece(&s, MD_PIECE_CALL, 0, "f");
    sink_piece(&s, MD_PIECE_CONTENT, 0, "a");
    assert_string_equal(cm_bytes_text(&s.object[2]), ADDED("2", "0", CALL("0", "in_progress", "f", "")));
    uint32_t n = s.n;
    gw_error_set(&error, GW_CAUSE_CAPACITY, NULL, "try again in 1s");
    cm_bytes_init(&out, 0);
    s.surface->writer.failure(s.writer, &error, &out);
    assert_int_equal(n, 8);
    sink_expect_text(
        &out,
        EVENT("failed", "8",
              "\"response\":" RESPONSE_OF(
                  "failed", CALL("0", "completed", "f", "") "," MESSAGE("1", "incomplete", TEXT_PART("a")),
                  "null", "{\"code\":\"rate_limit_exceeded\",\"message\":\"try again in 1s\"}", "null",
                  ECHO)));
    sink_close(&s);
}

static void whole(void **state)
{
    (void)state;
    sink s;
    sink_open(&s, &gw_surface_responses,
              "{\"instructions\":\"i\",\"include\":[\"reasoning.encrypted_content\"]}");
    sink_start(&s);
    sink_piece(&s, MD_PIECE_REASONING, 0, "r");
    sink_piece(&s, MD_PIECE_REASONING, 0, "2");
    sink_piece(&s, MD_PIECE_CONTENT, 0, "c");
    sink_piece(&s, MD_PIECE_CALL, 0, "f");
    sink_piece(&s, MD_PIECE_ARGS, 0, "{}");
    sink_finish(&s, GW_REASON_TOOL_CALLS, NULL, NULL);
    SINK_EXPECT(
        &s, COMPLETED("{\"id\":\"rs_#0\",\"type\":\"reasoning\",\"status\":\"completed\",\"summary\":[],"
                      "\"content\":[" REASONING_PART("r2") "],\"encrypted_content\":\"bl1.cjI=\"}," MESSAGE(
                          "1", "completed", TEXT_PART("c")) "," CALL("2", "completed", "f", "{}"),
                      ECHO_OF("\"i\"", "")));
    cm_bytes out;
    gw_error error;
    gw_error_set(&error, GW_CAUSE_INTERNAL, NULL, "no");
    cm_bytes_init(&out, 0);
    s.surface->writer.failure(s.writer, &error, &out);
    sink_expect_text(&out, "{\"error\":{\"message\":\"no\",\"type\":\"server_error\",\"param\":null,\"code\":"
                           "\"internal_error\"}}");
    sink_close(&s);
}

/* What a token's object is; its text is one byte. */
#define TOKEN(text, byte, logprob)                                                                           \
    "{\"token\":\"" text "\",\"logprob\":" logprob ",\"bytes\":[" byte "],\"top_logprobs\":[{\"token\":"     \
    "\"z\",\"logprob\":-0.5,\"bytes\":[122]}]}"
#define PART_WITH(text, logprobs)                                                                            \
    "{\"type\":\"output_text\",\"text\":\"" text "\",\"annotations\":[],\"logprobs\":[" logprobs "]}"

/* An answer of two messages around a call, of which one comes in two steps and a token's text late; what is
 * no text of theirs, reasoning and the markup of the call, is left out. */
static void tell_with_logprobs(sink *s)
{
    sink_start(s);
    sink_logprobs(s, MD_PIECE_REASONING, "r", -9);
    sink_piece(s, MD_PIECE_REASONING, 0, "r");
    sink_logprobs(s, MD_PIECE_CONTENT, "a", -1);
    sink_piece(s, MD_PIECE_CONTENT, 0, "a");
    sink_logprobs(s, MD_PIECE_CONTENT, "b", -2);
    sink_logprobs(s, MD_PIECE_CONTENT, "c", -3);
    sink_piece(s, MD_PIECE_CONTENT, 0, "bc");
    sink_logprobs(s, MD_PIECE_CONTENT, "<", -8);
    sink_piece(s, MD_PIECE_CALL, 0, "f");
    sink_logprobs(s, MD_PIECE_CONTENT, "{", -7);
    sink_piece(s, MD_PIECE_ARGS, 0, "{}");
    sink_logprobs(s, MD_PIECE_CONTENT, "d", -4);
    sink_piece(s, MD_PIECE_CONTENT, 0, "d");
    sink_finish(s, GW_REASON_STOP, NULL, NULL);
}

#define T_A TOKEN("a", "97", "-1")
#define T_B TOKEN("b", "98", "-2")
#define T_C TOKEN("c", "99", "-3")
#define T_D TOKEN("d", "100", "-4")

static void logprobs_streamed(void **state)
{
    (void)state;
    sink s;
    sink_open(&s, &gw_surface_responses, "{\"stream\":true}");
    tell_with_logprobs(&s);
#define R_OF     REASONING("0", "completed", REASONING_PART("r"))
#define ABC      PART_WITH("abc", T_A "," T_B "," T_C)
#define ABC_DONE MESSAGE("1", "completed", ABC)
#define F_OF     CALL("2", "completed", "f", "{}")
#define D_DONE   MESSAGE("3", "completed", PART_WITH("d", T_D))
    SINK_EXPECT(
        &s, HEAD(ECHO), ADDED("2", "0", REASONING("0", "in_progress", "")),
        TEXT("content_part.added", "3", "rs_#0", "0", "\"part\":" REASONING_PART("")),
        TEXT("reasoning_text.delta", "4", "rs_#0", "0", "\"delta\":\"r\""),
        TEXT("reasoning_text.done", "5", "rs_#0", "0", "\"text\":\"r\""),
        TEXT("content_part.done", "6", "rs_#0", "0", "\"part\":" REASONING_PART("r")), DONE("7", "0", R_OF),
        ADDED("8", "1", MESSAGE("1", "in_progress", "")),
        TEXT("content_part.added", "9", "msg_#1", "1", "\"part\":" TEXT_PART("")),
        TEXT("output_text.delta", "10", "msg_#1", "1", "\"delta\":\"a\",\"logprobs\":[" T_A "]"),
        TEXT("output_text.delta", "11", "msg_#1", "1", "\"delta\":\"bc\",\"logprobs\":[" T_B "," T_C "]"),
        TEXT("output_text.done", "12", "msg_#1", "1",
             "\"text\":\"abc\",\"logprobs\":[" T_A "," T_B "," T_C "]"),
        TEXT("content_part.done", "13", "msg_#1", "1", "\"part\":" ABC), DONE("14", "1", ABC_DONE),
        ADDED("15", "2", CALL("2", "in_progress", "f", "")),
        ABOUT("function_call_arguments.delta", "16", "fc_#2", "2", "\"delta\":\"{}\""),
        ABOUT("function_call_arguments.done", "17", "fc_#2", "2", "\"name\":\"f\",\"arguments\":\"{}\""),
        DONE("18", "2", F_OF), ADDED("19", "3", MESSAGE("3", "in_progress", "")),
        TEXT("content_part.added", "20", "msg_#3", "3", "\"part\":" TEXT_PART("")),
        TEXT("output_text.delta", "21", "msg_#3", "3", "\"delta\":\"d\",\"logprobs\":[" T_D "]"),
        TEXT("output_text.done", "22", "msg_#3", "3", "\"text\":\"d\",\"logprobs\":[" T_D "]"),
        TEXT("content_part.done", "23", "msg_#3", "3", "\"part\":" PART_WITH("d", T_D)),
        DONE("24", "3", D_DONE),
        EVENT("completed", "25", "\"response\":" COMPLETED(R_OF "," ABC_DONE "," F_OF "," D_DONE, ECHO)));
    sink_close(&s);
}

static void logprobs_whole(void **state)
{
    (void)state;
    sink s;
    sink_open(&s, &gw_surface_responses, "{}");
    tell_with_logprobs(&s);
    SINK_EXPECT(&s, COMPLETED(R_OF "," ABC_DONE "," F_OF "," D_DONE, ECHO));
    sink_close(&s);
}

/* ---- bodies ---- */

#define INPUT "\"input\":\"x\""
#define X     "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]"

static void bodies(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"{\"model\":\"nano\"," INPUT "}", "{\"model\":\"nano\"," X "}"},
        {"{" INPUT ",\"instructions\":\"i\",\"max_output_tokens\":7,\"temperature\":0,\"top_p\":0.5,"
         "\"parallel_tool_calls\":false,\"tool_choice\":\"auto\",\"store\":false,\"include\":[],"
         "\"prompt_cache_key\":\"k\",\"text\":{\"verbosity\":\"low\"},\"reasoning\":{\"effort\":\"low\","
         "\"summary\":\"auto\"},\"truncation\":\"auto\"}",
         "{\"messages\":[{\"role\":\"system\",\"content\":\"i\"},{\"role\":\"user\",\"content\":\"x\"}],"
         "\"max_tokens\":7,\"temperature\":0,\"top_p\":0.5,\"parallel_tool_calls\":false,\"tool_choice\":"
         "\"auto\","
         "\"prompt_cache_key\":\"k\",\"reasoning_effort\":\"low\"}"},
        {"{" INPUT ",\"reasoning\":null,\"tools\":null,\"previous_response_id\":null,\"background\":false}",
         "{" X ",\"tools\":[]}"},
        {"{" INPUT
         ",\"text\":{\"format\":{\"type\":\"json_schema\",\"name\":\"n\",\"strict\":true,\"schema\":{}}}}",
         "{\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"n\",\"strict\":true,"
         "\"schema\":{}}}}"},
        {"{" INPUT ",\"text\":{\"format\":{\"type\":\"json_object\"}}}",
         "{\"response_format\":{\"type\":\"json_object\"}}"},
        {"{" INPUT ",\"tools\":[{\"type\":\"function\",\"name\":\"f\",\"strict\":false,\"parameters\":{}},"
         "{\"type\":\"web_search\"},{\"type\":\"custom\",\"name\":\"p\",\"description\":\"d\",\"format\":"
         "{\"type\":\"grammar\",\"syntax\":\"lark\",\"definition\":\"start: x\"}},{\"type\":\"namespace\","
         "\"name\":\"n\",\"tools\":[{\"type\":\"function\",\"name\":\"g\"}]}]}",
         "{\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\",\"strict\":false,\"parameters\":{}}"
         "},"
         "{\"type\":\"function\",\"function\":{\"name\":\"p\",\"description\":\"d\\n\\nThe input must match "
         "this "
         "lark grammar:\\nstart: x\",\"parameters\":{\"type\":\"object\",\"properties\":{\"input\":{\"type\":"
         "\"string\"}},\"required\":[\"input\"]}}},{\"type\":\"function\",\"function\":{\"name\":\"n__g\"}}]"
         "}"},
        {"{" INPUT ",\"tool_choice\":{\"type\":\"custom\",\"name\":\"p\"}}",
         "{\"tool_choice\":{\"type\":\"function\",\"function\":{\"name\":\"p\"}}}"},
        {"{" INPUT ",\"tool_choice\":{\"type\":\"allowed_tools\",\"mode\":\"required\",\"tools\":[]}}",
         "{\"tool_choice\":\"required\"}"},
        /* a turn as it comes back: reasoning sealed, calls of three kinds and their outputs */
        {"{\"input\":[{\"role\":\"developer\",\"content\":[{\"type\":\"input_text\",\"text\":\"d\"}]},"
         "{\"type\":\"message\",\"role\":\"user\",\"content\":\"q\"},"
         "{\"type\":\"reasoning\",\"id\":\"rs_1\",\"summary\":[],\"encrypted_content\":\"bl1.cjI=\"},"
         "{\"type\":\"function_call\",\"call_id\":\"1\",\"name\":\"g\",\"namespace\":\"n\",\"arguments\":\"{}"
         "\"},"
         "{\"type\":\"custom_tool_call\",\"call_id\":\"2\",\"name\":\"p\",\"input\":\"a\\nb\"},"
         "{\"type\":\"web_search_call\",\"status\":\"completed\"},"
         "{\"type\":\"function_call_output\",\"call_id\":\"1\",\"output\":\"o\"},"
         "{\"type\":\"custom_tool_call_output\",\"call_id\":\"2\",\"output\":[{\"type\":\"input_text\","
         "\"text\":"
         "\"p\"}]}]}",
         "{\"messages\":[{\"role\":\"developer\",\"content\":[{\"type\":\"text\",\"text\":\"d\"}]},"
         "{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\",\"reasoning_content\":\"r2\","
         "\"tool_calls\":[{\"type\":\"function\",\"id\":\"1\",\"function\":{\"name\":\"n__g\",\"arguments\":"
         "\"{}\"}},"
         "{\"type\":\"function\",\"id\":\"2\",\"function\":{\"name\":\"p\",\"arguments\":\"{\\\"input\\\": "
         "\\\"a\\\\nb\\\"}\"}}]},{\"role\":\"tool\",\"tool_call_id\":\"1\",\"content\":\"o\"},"
         "{\"role\":\"tool\",\"tool_call_id\":\"2\",\"content\":[{\"type\":\"text\",\"text\":\"p\"}]}]}"},
        /* a turn that was cut off while it thought */
        {"{\"input\":[{\"role\":\"user\",\"content\":\"q\"},{\"type\":\"reasoning\",\"content\":[{\"type\":"
         "\"reasoning_text\",\"text\":\"old\"}]},"
         "{\"role\":\"user\",\"content\":\"r\"},{\"type\":\"reasoning\",\"content\":[{\"type\":\"reasoning_"
         "text\",\"text\":\"new\"}]},"
         "{\"role\":\"assistant\",\"content\":\"a\"},{\"role\":\"user\",\"content\":\"s\"}]}",
         "{\"messages\":[{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"user\",\"content\":\"r\"},"
         "{\"role\":\"assistant\",\"content\":\"a\",\"reasoning_content\":\"new\"},{\"role\":\"user\","
         "\"content\":\"s\"}]}"},
        {"{" INPUT ",\"include\":[\"message.output_text.logprobs\"],\"top_logprobs\":3}",
         "{\"logprobs\":true,\"top_logprobs\":3}"},
        {"{" INPUT ",\"include\":[\"x\",\"message.output_text.logprobs\"],\"top_logprobs\":null}",
         "{\"logprobs\":true,\"top_logprobs\":null}"},
        /* sealed by somebody else: nothing to show */
        {"{\"input\":[{\"role\":\"user\",\"content\":\"q\"},{\"type\":\"reasoning\",\"summary\":[],"
         "\"encrypted_content\":\"gAAAA\"},{\"role\":\"assistant\",\"content\":\"a\"},{\"role\":\"user\","
         "\"content\":\"b\"}]}",
         "{\"messages\":[{\"role\":\"user\",\"content\":\"q\"},{\"role\":\"assistant\",\"content\":\"a\"},"
         "{\"role\":\"user\",\"content\":\"b\"}]}"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        json_t *given = json_loads(cases[i][0], 0, NULL), *wanted = json_loads(cases[i][1], 0, NULL);
        json_t *before = json_deep_copy(given), *body, *value;
        const char *name;
        gw_error error = {0};
        assert_non_null(given);
        assert_non_null(wanted);
        if (gw_responses_body(given, &body, &error) != CM_OK) {
            fail_msg("%s: %s", cases[i][0], error.message);
        }
        json_object_foreach(wanted, name, value)
        {
            if (!json_equal(json_object_get(body, name), value)) {
                char *got = json_dumps(json_object_get(body, name), JSON_ENCODE_ANY);
                fail_msg("%s: %s is %s", cases[i][0], name, got);
            }
        }
        assert_true(json_equal(given, before)); /* it is told again from this */
        json_decref(before);
        json_decref(body);
        json_decref(wanted);
        json_decref(given);
    }
}

static void bodies_refused(void **state)
{
    (void)state;
    static const struct {
        const char *given;
        gw_cause cause;
        const char *param;
    } cases[] = {
        {"{}", GW_CAUSE_INVALID, "input"},
        {"{\"input\":5}", GW_CAUSE_INVALID, "input"},
        {"{\"input\":[]}", GW_CAUSE_INVALID, "input"},
        {"{\"input\":[5]}", GW_CAUSE_INVALID, "input[0]"},
        {"{\"input\":[{\"role\":\"user\",\"content\":5}]}", GW_CAUSE_INVALID, "input[0].content"},
        {"{\"input\":[{\"role\":\"user\",\"content\":[{\"type\":\"input_text\"}]}]}", GW_CAUSE_INVALID,
         "input[0].content[0]"},
        {"{\"input\":[{\"role\":\"wizard\",\"content\":\"x\"}]}", GW_CAUSE_INVALID, "input[0].role"},
        {"{\"input\":[{\"type\":\"function_call_output\",\"output\":5}]}", GW_CAUSE_INVALID,
         "input[0].output"},
        /* where the client put it: instructions and what is left out do not count */
        {"{\"instructions\":\"i\",\"input\":[{\"type\":\"web_search_call\"},{\"type\":\"item_reference\","
         "\"id\":\"x\"}]}",
         GW_CAUSE_INVALID, "input[1]"},
        {"{\"instructions\":\"i\",\"input\":[{\"type\":\"web_search_call\"},{\"role\":\"user\",\"content\":[{"
         "\"type\":\"input_image\"}]}]}",
         GW_CAUSE_INVALID, "input[1].content[0]"},
        {"{\"instructions\":\"i\",\"input\":[{\"type\":\"web_search_call\"},{\"type\":\"function_call\"}]}",
         GW_CAUSE_INVALID, "input[1]"},
        {"{\"instructions\":\"i\",\"input\":[{\"type\":\"web_search_call\"},{\"type\":\"function_call\","
         "\"name\":\"f\",\"arguments\":5}]}",
         GW_CAUSE_INVALID, "input[1]"},
        {"{" INPUT ",\"instructions\":5}", GW_CAUSE_INVALID, "instructions"},
        {"{" INPUT ",\"previous_response_id\":\"resp_1\"}", GW_CAUSE_UNSUPPORTED, "previous_response_id"},
        {"{" INPUT ",\"conversation\":\"c\"}", GW_CAUSE_UNSUPPORTED, "conversation"},
        {"{" INPUT ",\"prompt\":{\"id\":\"p\"}}", GW_CAUSE_UNSUPPORTED, "prompt"},
        {"{" INPUT ",\"background\":true}", GW_CAUSE_UNSUPPORTED, "background"},
        {"{" INPUT ",\"include\":\"message.output_text.logprobs\"}", GW_CAUSE_INVALID, "include"},
        {"{" INPUT ",\"top_logprobs\":21}", GW_CAUSE_INVALID, "top_logprobs"},
        {"{" INPUT ",\"top_logprobs\":-1}", GW_CAUSE_INVALID, "top_logprobs"},
        {"{" INPUT ",\"top_logprobs\":\"3\"}", GW_CAUSE_INVALID, "top_logprobs"},
        {"{" INPUT ",\"tools\":{}}", GW_CAUSE_INVALID, "tools"},
        {"{" INPUT ",\"tools\":[{\"type\":\"function\"}]}", GW_CAUSE_INVALID, "tools[0]"},
        {"{" INPUT ",\"tools\":[{\"type\":\"file_search\"}]}", GW_CAUSE_UNSUPPORTED, "tools[0]"},
        {"{" INPUT ",\"tools\":[{\"type\":\"namespace\"}]}", GW_CAUSE_INVALID, "tools[0]"},
        {"{" INPUT ",\"tool_choice\":{\"type\":\"mcp\"}}", GW_CAUSE_INVALID, "tool_choice"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        json_t *given = json_loads(cases[i].given, 0, NULL), *body;
        gw_error error = {0};
        assert_non_null(given);
        assert_int_not_equal(gw_responses_body(given, &body, &error), CM_OK);
        if (error.cause != cases[i].cause || strcmp(error.param, cases[i].param) != 0) {
            fail_msg("%s: about '%s': %s", cases[i].given, error.param, error.message);
        }
        assert_non_null(strstr(error.message, cases[i].param));
        json_decref(given);
    }
}

/* Any text comes back as it went, whatever its length; what is no seal of ours stays shut. */
static void seals(void **state)
{
    (void)state;
    static const char *const texts[] = {"a", "ab", "abc", "abcd", "\xe4\xbd\xa0\n\"", "=="};
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        cm_bytes plain, sealed;
        gw_error error;
        json_t *body;
        cm_bytes_init(&plain, 0);
        cm_bytes_init(&sealed, 0);
        cm_bytes_append_text(&plain, texts[i]);
        gw_responses_seal(&plain, &sealed);
        json_t *given = json_pack("{s:[{s:s, s:s}, {s:s, s:[], s:s}, {s:s, s:s}]}", "input", "role", "user",
                                  "content", "q", "type", "reasoning", "summary", "encrypted_content",
                                  cm_bytes_text(&sealed), "role", "assistant", "content", "a");
        assert_int_equal(gw_responses_body(given, &body, &error), CM_OK);
        const json_t *answer = json_array_get(json_object_get(body, "messages"), 1);
        assert_string_equal(json_string_value(json_object_get(answer, "reasoning_content")), texts[i]);
        json_decref(body);
        json_decref(given);
        cm_bytes_fini(&plain);
        cm_bytes_fini(&sealed);
    }
    static const char *const broken[] = {"bl1.", "bl1.=", "bl1.====", "bl1.!!!!", "bl1.abc", "bl1./w==", "x"};
    for (size_t i = 0; i < sizeof(broken) / sizeof(broken[0]); i++) {
        gw_error error;
        json_t *body;
        json_t *given = json_pack("{s:[{s:s, s:s}, {s:s, s:s}, {s:s, s:s}]}", "input", "role", "user",
                                  "content", "q", "type", "reasoning", "encrypted_content", broken[i], "role",
                                  "assistant", "content", "a");
        assert_int_equal(gw_responses_body(given, &body, &error), CM_OK);
        const json_t *answer = json_array_get(json_object_get(body, "messages"), 1);
        assert_null(json_object_get(answer, "reasoning_content"));
        json_decref(body);
        json_decref(given);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reasoning_then_text),
        cmocka_unit_test(parallel_calls),
        cmocka_unit_test(custom_and_grouped_tools),
        cmocka_unit_test(length),
        cmocka_unit_test(heartbeat_and_failure),
        cmocka_unit_test(begins_before_it_starts),
        cmocka_unit_test(whole),
        cmocka_unit_test(logprobs_streamed),
        cmocka_unit_test(logprobs_whole),
        cmocka_unit_test(bodies),
        cmocka_unit_test(bodies_refused),
        cmocka_unit_test(seals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
