/* Completion to reasoning, content and tool calls, as it comes (encoding section 8.2): an incremental byte
 * machine that holds back only what may still become a marker or a stop string; at every split the pieces
 * join to the same result. Fed with token ids, only control ids make markers; fed with text, every spelling
 * does. Thread: one at a time. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/status.h"
#include "common/model/tokenizer.h"

typedef struct md_parser md_parser;

typedef enum md_piece_kind {
    MD_PIECE_REASONING,
    MD_PIECE_CONTENT,
    MD_PIECE_CALL,
    MD_PIECE_ARGS
} md_piece_kind;
/* Neighbouring pieces of one kind (and call) from one push are joined; text never splits a UTF-8 character.
 */
typedef struct md_piece {
    md_piece_kind kind;
    uint32_t call;    /* CALL, ARGS: index from 0 */
    const char *text; /* CALL: the name; borrowed until the callback returns */
    size_t n_bytes;
} md_piece;
typedef void (*md_piece_fn)(void *ctx, const md_piece *piece);

typedef struct md_parser_options {
    bool start_in_reasoning; /* the prompt ended in <think> */
    bool tools;              /* tool calls may be parsed */
    bool continues_prefix;   /* content continues a prefix: no leading newline is dropped */
    bool plain;              /* raw completion: no markers at all, content only; stop strings still count */
    const char *const *stop; /* stop strings, UTF-8, copied; empty ones ignored */
    size_t n_stop;
    bool include_stop; /* keep the matched stop string in the content */
} md_parser_options;

md_parser *md_parser_create(const md_parser_options *options);
void md_parser_destroy(md_parser *parser);

/* Each returns true once a stop string has matched: nothing more is parsed after it. */
bool md_parser_push_id(md_parser *parser, const md_tokenizer *tokenizer, uint32_t id, md_piece_fn fn,
                       void *ctx);
bool md_parser_push_text(md_parser *parser, const char *text, size_t n_bytes, md_piece_fn fn, void *ctx);
/* The end: EOS, length or stop. Held-back text leaves; a call that was cut off is not closed. */
void md_parser_finish(md_parser *parser, md_piece_fn fn, void *ctx);

uint32_t md_parser_calls(const md_parser *parser); /* tool calls begun */
/* Arguments of one call so far, for a reply in one piece: what ARGS pieces joined to, but a value that was
 * flagged as JSON and is none is a JSON string here. Borrowed until the next push. */
const char *md_parser_call_args(const md_parser *parser, uint32_t call, size_t *n_bytes_out);
const char *md_parser_stop_match(const md_parser *parser); /* the stop string that matched, NULL if none */
bool md_parser_in_reasoning(const md_parser *parser);      /* the next byte would be reasoning */
