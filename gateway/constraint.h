/* What a request says its answer must be, as a grammar for the router: response_format (OpenAI),
 * structured_outputs and guided_json, guided_regex, guided_choice (vLLM), and tool calls that are demanded or
 * strict. A value that owns its source. Thread: any. */
#pragma once
#include <jansson.h>

#include "common/grammar/grammar.h"
#include "gateway/stream.h"

typedef struct gw_constraint {
    gm_kind kind; /* 0: there is none */
    char *source; /* [n_source] owned; NULL: empty */
    size_t n_source;
    const char *param; /* the field that it came from, for errors; a literal */
} gw_constraint;

/* Reads the body's fields; none of them, or one that demands nothing, makes none. Two that both demand are
 * refused, but for a response_format beside tools that may be called: then either comes. tools: calls may
 * come (the body has tools and tool_choice is not none). CM_E_INVALID, CM_E_UNSUPPORTED with error_out
 * filled. */
CM_MUST_CHECK cm_status gw_constraint_read(const json_t *body, bool tools, gw_constraint *constraint_out,
                                           gw_error *error_out);
/* The part of it that tools and tool_choice demand: calls of the named tool or of any (named, required), at
 * most one unless they may be parallel; with auto, when a tool is strict, free text that may end in calls
 * (format is a schema: or JSON of it instead), whose arguments are those of a strict tool's schema and
 * anything else's. */
CM_MUST_CHECK cm_status gw_constraint_for_tools(const json_t *body, const json_t *format,
                                                gw_constraint *constraint_out, gw_error *error_out);
void gw_constraint_copy(const gw_constraint *constraint, gw_constraint *copy_out);
void gw_constraint_free(gw_constraint *constraint);
/* Compiles it, to see whether it can be; the router does it again. May take milliseconds. */
CM_MUST_CHECK cm_status gw_constraint_check(const gw_constraint *constraint, gw_error *error_out);
