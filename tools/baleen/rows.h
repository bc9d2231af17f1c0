/* Rows of JSON lines to their answers: text and ids, requests and prompts, completions and results, in the
 * form of the model's test vectors. The command's filters and the golden tests read rows through here. A row
 * is any JSON value; one that lacks something is CM_E_INVALID with err->field = its key. Answers are new
 * references. Thread: any. */
#pragma once
#include <jansson.h>

#include "common/base/bytes.h"
#include "common/model/chat.h"
#include "common/model/parser.h"

/* ---- text and ids ---- */

/* The bytes of {"text"} or {"hex"}, appended. */
CM_MUST_CHECK cm_status row_bytes(const json_t *row, cm_bytes *bytes_out, cm_error *err);
/* {"text"} or {"hex"} to {"ids"}. */
CM_MUST_CHECK cm_status row_tokenize(const md_tokenizer *tokenizer, const json_t *row, md_text_kind kind,
                                     json_t **answer_out, cm_error *err);
/* {"ids"} to {"pieces", "text"}: pieces[k] is the text that leaves after ids[k], one more is the flush at the
 * end. */
CM_MUST_CHECK cm_status row_detokenize(const md_tokenizer *tokenizer, const json_t *row, bool skip_special,
                                       json_t **answer_out, cm_error *err);
json_t *row_ids(const md_ids *ids);

/* ---- requests and prompts ---- */

/* {"level": "encoder", "messages", "mode", "effort", "drop_thinking"} or {"level": "request", "endpoint",
 * "body"}, each with an optional "profile" (absent: profile), to messages and options; not for the endpoint
 * completions, which has no messages. *messages_out is a new reference. */
CM_MUST_CHECK cm_status row_messages(const json_t *row, md_profile profile, json_t **messages_out,
                                     md_chat_options *options_out, cm_error *err);
/* The same, and completions, to {"prompt", "ids"}. reference: as in md_chat_options. */
CM_MUST_CHECK cm_status row_encode(const md_tokenizer *tokenizer, const json_t *row, md_profile profile,
                                   bool reference, json_t **answer_out, cm_error *err);

/* ---- completions and results ---- */

/* What pieces add up to. Zeroed is empty. */
typedef struct row_call {
    cm_bytes name, args;
} row_call;
typedef struct row_result {
    cm_bytes reasoning, content;
    row_call *calls; /* owned */
    uint32_t n_calls;
} row_result;
void row_result_fini(row_result *result);
void row_collect(void *result, const md_piece *piece); /* an md_piece_fn */

/* A parser with the options of {"start", "tools", "prefix", "stop"}; all but "start" may be absent. */
CM_MUST_CHECK cm_status row_parser(const json_t *row, md_parser **parser_out, cm_error *err);
/* Why the completion of {"engine"} ended. */
const char *row_finish_reason(const json_t *row, const md_parser *parser);
/* The above and "text" to {"reasoning_content", "content", "tool_calls", "finish_reason"} and, where one
 * matched, "stop". A call has "name", "arguments" and, where the streamed pieces joined to something else,
 * "stream_arguments". The text is given to the parser cut behind first_bytes, then after every step_bytes
 * (both at least 1). */
CM_MUST_CHECK cm_status row_parse(const json_t *row, size_t first_bytes, size_t step_bytes,
                                  json_t **answer_out, cm_error *err);
