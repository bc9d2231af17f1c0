/* What a client of the Responses surface asks for, as a chat body, and the tools it has as they are shown to
 * the model: every kind becomes a function. Thread: any. */
#pragma once
#include "gateway/surface.h"

extern const gw_surface_field gw_responses_fields[];

/* A new reference; CM_E_INVALID or CM_E_UNSUPPORTED with error_out in the client's own words. */
CM_MUST_CHECK cm_status gw_responses_body(const json_t *given, json_t **body_out, gw_error *error_out);

/* A tool of the client's, found by the name that the model was shown. Borrowed from the body's tools. */
typedef struct gw_responses_tool {
    const char *name;       /* the client's */
    const char *name_space; /* NULL: none */
    bool is_custom;         /* takes text, not an object */
} gw_responses_tool;
/* false: the model named something that it was not given. */
bool gw_responses_find_tool(const json_t *tools, const char *shown, gw_responses_tool *tool_out);

/* Whether "include" asks for it: "reasoning.encrypted_content", "message.output_text.logprobs". */
bool gw_responses_includes(const json_t *given, const char *what);

/* Reasoning that the client is to bring back without looking into it. */
void gw_responses_seal(const cm_bytes *reasoning, cm_bytes *out);
