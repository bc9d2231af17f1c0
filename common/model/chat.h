/* Chat messages to prompt ids (encoding sections 4 to 7 and 9). Template text carries control tokens; caller
 * text never does: it is encoded as MD_TEXT_PLAIN, so a spelled control token stays characters. Messages are
 * jansson objects of the shape in encoding section 4 (role, content, reasoning_content, tool_calls, tools,
 * response_format, task, wo_eos, tool_call_id), already checked for types by the caller's surface. Thread:
 * any; a call owns nothing after it returns. */
#pragma once
#include <jansson.h>
#include <stdbool.h>

#include "common/base/bytes.h"
#include "common/base/status.h"
#include "common/model/tokenizer.h"

typedef enum md_profile { MD_PROFILE_G, MD_PROFILE_P } md_profile; /* encoding section 1 */
typedef enum md_effort { MD_EFFORT_NONE, MD_EFFORT_LOW, MD_EFFORT_HIGH, MD_EFFORT_MAX } md_effort;

typedef struct md_chat_options {
    md_profile profile;
    bool thinking;      /* mode thinking, else chat */
    md_effort effort;   /* after mapping; NONE = no prefix */
    bool drop_thinking; /* default true */
    bool
        reference; /* byte-for-byte reference behaviour: control spellings in caller text act (default off) */
} md_chat_options;

/* G unless DIR/encoding/encoding_dsv4.py says P. */
md_profile md_profile_detect(const char *dir);
/* "minimal" .. "ultra", "none" -> mode and effort of a profile (encoding 5.1). CM_E_INVALID for other words.
 * word NULL = absent. thinking_io is switched off by "none". */
CM_MUST_CHECK cm_status md_effort_map(md_profile profile, const char *word, bool *thinking_io,
                                      md_effort *effort_out);

/* Appends the prompt's ids; text_out (may be NULL) gets the prompt as one text. messages is not changed.
 * CM_E_INVALID with err->field like "messages[2].role". */
CM_MUST_CHECK cm_status md_chat_encode(const md_tokenizer *tokenizer, const json_t *messages,
                                       const md_chat_options *options, md_ids *ids_out, cm_bytes *text_out,
                                       cm_error *err);

/* Fill-in-the-middle prompt (encoding section 9). */
void md_fim_encode(const md_tokenizer *tokenizer, const char *prefix, size_t n_prefix, const char *suffix,
                   size_t n_suffix, md_ids *ids_out, cm_bytes *text_out);
/* Raw prompt: BOS unless it is there, control spellings act. */
void md_raw_encode(const md_tokenizer *tokenizer, const char *text, size_t n_bytes, md_ids *ids_out);

/* Python json.dumps(v, ensure_ascii=False) exactly (encoding 6.3); number spellings of the source text are
 * kept where the parser kept them (JSON_DECODE_INT etc. are the caller's). */
void md_json_dumps(const json_t *value, cm_bytes *out);

/* A request body's effect on the prompt: messages of an OpenAI chat request (tools, tool_choice,
 * response_format, thinking, reasoning_effort, chat_template_kwargs, prefix) to the encoder's messages and
 * options (encoding 5, 6, 7, 9 and the choices of golden/encoding/README). *messages_out is a new reference.
 */
CM_MUST_CHECK cm_status md_chat_from_request(const json_t *body, md_profile profile, json_t **messages_out,
                                             md_chat_options *options_out, cm_error *err);

/* The body of a request on another interface to the body of a chat request for md_chat_from_request: only
 * what the prompt depends on (messages, system or instructions, tools, thinking, effort, format). *body_out
 * is a new reference; it shares values with body. CM_E_INVALID with err->field. */
typedef enum md_surface { MD_SURFACE_ANTHROPIC, MD_SURFACE_RESPONSES } md_surface;
CM_MUST_CHECK cm_status md_chat_body_convert(md_surface surface, const json_t *body, json_t **body_out,
                                             cm_error *err);
