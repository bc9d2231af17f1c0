#include "common/model/parser.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/model/json_private.h"

typedef enum parser_state {
    STATE_REASONING,
    STATE_CONTENT,
    STATE_PLAIN,    /* raw completion */
    STATE_CALLS,    /* in the block, between calls */
    STATE_NAME,     /* of a call */
    STATE_ARGS,     /* in a call, between parameters */
    STATE_KEY,      /* of a parameter */
    STATE_FLAG,     /* behind the key, looking for string= */
    STATE_STRING,   /* a value that is a string */
    STATE_RAW,      /* a value that is JSON */
    STATE_OBJECT,   /* a JSON object in place of parameters */
    STATE_FINISHED, /* behind the block */
} parser_state;

struct md_parser {
    md_parser_options options;
    char **stop; /* owned copies, none empty */
    size_t n_stop;
    const char *stop_match;

    parser_state state;
    bool leading; /* newlines are dropped: nothing has come in this state yet */
    bool final;   /* nothing follows: what may still become a marker will not */
    md_detok detok;
    cm_bytes text;  /* decoded, complete UTF-8; consumed up to head */
    cm_bytes marks; /* one byte per byte of text: 1 if a control id may have spelled it */
    size_t head;
    size_t n_blank; /* blanks known to stand at head (see blank_run) */

    cm_bytes name;
    uint32_t n_calls, n_params; /* n_params: of the open call */
    cm_bytes *args;             /* [n_calls] md_parser_call_args */
    uint32_t cap_args;
    size_t raw_at; /* where the open raw value begins in args */

    cm_bytes piece; /* to be delivered */
    md_piece_kind piece_kind;
    md_piece_fn fn;
    void *ctx;
};

/* ---- markers ---- */

/* In bytes [control, control + n_control) only control ids count; a marker without such bytes is plain text.
 */
typedef struct marker {
    const char *text;
    uint8_t n, control, n_control;
} marker;

#define MARKER(text_, control_, n_control_)                                                                  \
    {                                                                                                        \
        text_, sizeof(text_) - 1, control_, n_control_                                                       \
    }
#define DSML   "｜DSML｜"
#define N_DSML (sizeof(DSML) - 1)
static const marker THINK = MARKER("<think>", 0, 7), THINK_END = MARKER("</think>", 0, 8);
static const marker BLOCK = MARKER("<" DSML, 1, N_DSML), CLOSE = MARKER("</" DSML, 2, N_DSML);
static const marker BLOCK_END = MARKER("</" DSML "tool_calls>", 2, N_DSML);
static const marker BLOCK_END_41 = MARKER("</" DSML " calls>", 2, N_DSML); /* as V4.1 spells it */
static const marker INVOKE = MARKER("invoke name=\"", 0, 0), PARAMETER = MARKER("parameter name=\"", 0, 0);
static const marker IS_STRING = MARKER("true\">", 0, 0), IS_RAW = MARKER("false\">", 0, 0);

typedef enum match { MATCH_NO, MATCH_PART, MATCH_FULL } match;

static size_t pending(const md_parser *parser)
{
    return parser->text.len - parser->head;
}

static const char *front(const md_parser *parser)
{
    return cm_bytes_text(&parser->text) + parser->head;
}

static match match_text(const md_parser *parser, size_t skip, const char *text, size_t n)
{
    size_t have = pending(parser) - skip, shorter = have < n ? have : n;
    if (memcmp(front(parser) + skip, text, shorter) != 0) {
        return MATCH_NO;
    }
    return shorter == n ? MATCH_FULL : parser->final ? MATCH_NO : MATCH_PART;
}

/* A marker behind the first skip bytes. A spelling that ordinary tokens make is seen to be none when it is
 * complete. */
static match match_marker(const md_parser *parser, size_t skip, const marker *wanted)
{
    match found = match_text(parser, skip, wanted->text, wanted->n);
    if (found == MATCH_FULL && wanted->n_control > 0) {
        const uint8_t *marks = parser->marks.data + parser->head + skip + wanted->control;
        return memchr(marks, 0, wanted->n_control) == NULL ? MATCH_FULL : MATCH_NO;
    }
    return found;
}

/* Newlines (or any white space, inside an object) at the front. Counted once however often it is asked. */
static size_t blank_run(md_parser *parser, const char *blanks)
{
    const char *text = front(parser);
    size_t n = pending(parser);
    while (parser->n_blank < n && text[parser->n_blank] != 0 &&
           strchr(blanks, text[parser->n_blank]) != NULL) {
        parser->n_blank++;
    }
    return parser->n_blank;
}

static void consume(md_parser *parser, size_t n)
{
    parser->head += n;
    parser->n_blank = n < parser->n_blank ? parser->n_blank - n : 0;
}

/* ---- pieces ---- */

static void deliver(md_parser *parser)
{
    if (parser->piece.len > 0 || parser->piece_kind == MD_PIECE_CALL) {
        md_piece piece = {.kind = parser->piece_kind,
                          .call = parser->n_calls > 0 ? parser->n_calls - 1 : 0,
                          .text = cm_bytes_text(&parser->piece),
                          .n_bytes = parser->piece.len};
        parser->fn(parser->ctx, &piece);
    }
    cm_bytes_clear(&parser->piece);
    parser->piece_kind = MD_PIECE_CONTENT;
}

static void emit(md_parser *parser, md_piece_kind kind, const char *text, size_t n)
{
    if (kind != parser->piece_kind) {
        deliver(parser);
        parser->piece_kind = kind;
    }
    cm_bytes_append(&parser->piece, text, n);
}

static void emit_args(md_parser *parser, const char *text, size_t n)
{
    emit(parser, MD_PIECE_ARGS, text, n);
    cm_bytes_append(&parser->args[parser->n_calls - 1], text, n);
}

/* n bytes from the front as text of the present state. */
static void take_text(md_parser *parser, size_t n)
{
    emit(parser, parser->state == STATE_REASONING ? MD_PIECE_REASONING : MD_PIECE_CONTENT, front(parser), n);
    parser->leading = false;
    consume(parser, n);
}

static void take_escaped(md_parser *parser)
{
    cm_bytes escaped;
    cm_bytes_init(&escaped, 0);
    md_json_escape(front(parser), 1, &escaped);
    emit_args(parser, cm_bytes_text(&escaped), escaped.len);
    cm_bytes_fini(&escaped);
    consume(parser, 1);
}

static void enter(md_parser *parser, parser_state state, size_t n)
{
    parser->state = state;
    parser->leading = true;
    consume(parser, n);
}

/* ---- calls ---- */

static void begin_call(md_parser *parser)
{
    deliver(parser); /* pieces take their call's number from n_calls */
    if (parser->n_calls == parser->cap_args) {
        parser->cap_args = parser->cap_args != 0 ? parser->cap_args * 2 : 4;
        parser->args = cm_realloc(parser->args, sizeof(cm_bytes) * parser->cap_args);
    }
    cm_bytes_init(&parser->args[parser->n_calls++], 0);
    parser->n_params = 0;
    emit(parser, MD_PIECE_CALL, cm_bytes_text(&parser->name), parser->name.len);
    deliver(parser);
    cm_bytes_clear(&parser->name);
}

static void end_call(md_parser *parser)
{
    emit_args(parser, parser->n_params == 0 ? "{}" : "}", parser->n_params == 0 ? 2 : 1);
}

/* In the whole arguments a raw value that is no JSON becomes a string: else they would not parse at all. */
static void settle_raw(md_parser *parser)
{
    cm_bytes *args = &parser->args[parser->n_calls - 1], escaped;
    const char *value = cm_bytes_text(args) + parser->raw_at;
    size_t n = args->len - parser->raw_at;
    json_t *parsed = md_json_read(value, n);
    if (parsed == NULL) {
        cm_bytes_init(&escaped, 0);
        md_json_escape(value, n, &escaped);
        args->len = parser->raw_at;
        cm_bytes_printf(args, "\"%s\"", cm_bytes_text(&escaped));
        cm_bytes_fini(&escaped);
    }
    json_decref(parsed);
}

/* ---- one step per state ----
 * Each looks at the front, consumes something and returns true, or returns false to wait for more. */

static bool step_reasoning(md_parser *parser)
{
    size_t n = blank_run(parser, "\n");
    if (parser->leading && n > 0) {
        consume(parser, n);
        return true;
    }
    match end = match_marker(parser, n, &THINK_END);
    match block = parser->options.tools ? match_marker(parser, n, &BLOCK) : MATCH_NO;
    if (end == MATCH_FULL) {
        enter(parser, STATE_CONTENT, n + THINK_END.n);
    } else if (block == MATCH_FULL) {
        enter(parser, STATE_CALLS, n + BLOCK.n);
    } else if (end == MATCH_PART || block == MATCH_PART) {
        return false;
    } else {
        take_text(parser, n > 0 ? n : 1);
    }
    return true;
}

/* A stop string at the front; the shortest where several are complete, because alone it was complete before.
 */
static match match_stop(const md_parser *parser, const char **stop_out)
{
    match best = MATCH_NO;
    for (size_t i = 0; i < parser->n_stop; i++) {
        match found = match_text(parser, 0, parser->stop[i], strlen(parser->stop[i]));
        if (found == MATCH_FULL && (best != MATCH_FULL || strlen(parser->stop[i]) < strlen(*stop_out))) {
            *stop_out = parser->stop[i];
        }
        best = found > best ? found : best;
    }
    return best;
}

static void stop_here(md_parser *parser, const char *stop)
{
    if (parser->options.include_stop) {
        take_text(parser, strlen(stop));
    }
    parser->stop_match = stop;
    parser->state = STATE_FINISHED;
}

static bool step_plain(md_parser *parser)
{
    const char *stop;
    match found = match_stop(parser, &stop);
    if (found == MATCH_FULL) {
        stop_here(parser, stop);
    } else if (found == MATCH_NO) {
        take_text(parser, 1);
    }
    return found != MATCH_PART;
}

static bool step_content(md_parser *parser)
{
    if (parser->leading && front(parser)[0] == '\n') {
        consume(parser, 1);
        return true;
    }
    const char *stop;
    match stopped = match_stop(parser, &stop);
    match think = match_marker(parser, 0, &THINK), end = match_marker(parser, 0, &THINK_END);
    size_t n = parser->options.tools ? blank_run(parser, "\n") : 0;
    match block = parser->options.tools ? match_marker(parser, n, &BLOCK) : MATCH_NO;
    size_t n_marker = think == MATCH_FULL   ? THINK.n
                      : end == MATCH_FULL   ? THINK_END.n
                      : block == MATCH_FULL ? n + BLOCK.n
                                            : SIZE_MAX;
    /* whichever is complete first, so that it does not depend on how the text was cut */
    if (stopped == MATCH_FULL && strlen(stop) <= n_marker) {
        stop_here(parser, stop);
    } else if (think == MATCH_FULL) {
        enter(parser, STATE_REASONING, THINK.n);
    } else if (end == MATCH_FULL) {
        consume(parser, THINK_END.n);
    } else if (block == MATCH_FULL) {
        enter(parser, STATE_CALLS, n + BLOCK.n);
    } else if (stopped == MATCH_PART || think == MATCH_PART || end == MATCH_PART || block == MATCH_PART) {
        return false;
    } else {
        take_text(parser, 1);
    }
    return true;
}

static bool step_calls(md_parser *parser)
{
    match invoke = match_marker(parser, 0, &INVOKE);
    match end = match_marker(parser, 0, &BLOCK_END), end_41 = match_marker(parser, 0, &BLOCK_END_41);
    if (invoke == MATCH_FULL) {
        enter(parser, STATE_NAME, INVOKE.n);
    } else if (end == MATCH_FULL || end_41 == MATCH_FULL) {
        enter(parser, STATE_FINISHED, pending(parser));
    } else if (invoke == MATCH_PART || end == MATCH_PART || end_41 == MATCH_PART) {
        return false;
    } else {
        consume(parser, 1);
    }
    return true;
}

static bool step_name(md_parser *parser)
{
    if (front(parser)[0] == '"') {
        begin_call(parser);
        enter(parser, STATE_ARGS, 1);
    } else {
        cm_bytes_append(&parser->name, front(parser), 1);
        consume(parser, 1);
    }
    return true;
}

static bool step_args(md_parser *parser)
{
    match parameter = match_marker(parser, 0, &PARAMETER), close = match_marker(parser, 0, &CLOSE);
    match invoke = match_marker(parser, 0, &INVOKE);
    if (parameter == MATCH_FULL) {
        emit_args(parser, parser->n_params == 0 ? "{\"" : ", \"", parser->n_params == 0 ? 2 : 3);
        parser->n_params++;
        enter(parser, STATE_KEY, PARAMETER.n);
    } else if (close == MATCH_FULL) {
        end_call(parser);
        enter(parser, STATE_CALLS, CLOSE.n);
    } else if (invoke == MATCH_FULL) {
        end_call(parser); /* its closing tag is missing */
        enter(parser, STATE_NAME, INVOKE.n);
    } else if (parameter == MATCH_PART || close == MATCH_PART || invoke == MATCH_PART) {
        return false;
    } else if (parser->n_params == 0 && front(parser)[0] == '{') {
        enter(parser, STATE_OBJECT, 0);
    } else {
        consume(parser, 1);
    }
    return true;
}

static bool step_key(md_parser *parser)
{
    if (front(parser)[0] == '"') {
        emit_args(parser, "\": ", 3);
        enter(parser, STATE_FLAG, 1);
    } else {
        take_escaped(parser);
    }
    return true;
}

static bool step_flag(md_parser *parser)
{
    match string = match_marker(parser, 0, &IS_STRING), raw = match_marker(parser, 0, &IS_RAW);
    if (string == MATCH_FULL) {
        emit_args(parser, "\"", 1);
        enter(parser, STATE_STRING, IS_STRING.n);
    } else if (raw == MATCH_FULL) {
        parser->raw_at = parser->args[parser->n_calls - 1].len;
        enter(parser, STATE_RAW, IS_RAW.n);
    } else if (string == MATCH_PART || raw == MATCH_PART) {
        return false;
    } else {
        consume(parser, 1);
    }
    return true;
}

static bool step_value(md_parser *parser)
{
    match close = match_marker(parser, 0, &CLOSE);
    if (close == MATCH_PART) {
        return false;
    }
    if (close == MATCH_FULL) {
        if (parser->state == STATE_STRING) {
            emit_args(parser, "\"", 1);
        } else {
            settle_raw(parser);
        }
        enter(parser, STATE_ARGS, CLOSE.n);
    } else if (parser->state == STATE_STRING) {
        take_escaped(parser);
    } else {
        emit_args(parser, front(parser), 1);
        consume(parser, 1);
    }
    return true;
}

/* White space in front of the closing tag is the tag's, not the object's. */
static bool step_object(md_parser *parser)
{
    size_t n = blank_run(parser, " \n\r\t");
    match close = match_marker(parser, n, &CLOSE);
    if (close == MATCH_FULL) {
        enter(parser, STATE_CALLS, n + CLOSE.n);
    } else if (close == MATCH_NO) {
        emit_args(parser, front(parser), n > 0 ? n : 1);
        consume(parser, n > 0 ? n : 1);
    }
    return close != MATCH_PART;
}

static bool step(md_parser *parser)
{
    switch (parser->state) {
    case STATE_REASONING:
        return step_reasoning(parser);
    case STATE_CONTENT:
        return step_content(parser);
    case STATE_PLAIN:
        return step_plain(parser);
    case STATE_CALLS:
        return step_calls(parser);
    case STATE_NAME:
        return step_name(parser);
    case STATE_ARGS:
        return step_args(parser);
    case STATE_KEY:
        return step_key(parser);
    case STATE_FLAG:
        return step_flag(parser);
    case STATE_STRING:
    case STATE_RAW:
        return step_value(parser);
    case STATE_OBJECT:
        return step_object(parser);
    case STATE_FINISHED:
        break;
    }
    consume(parser, pending(parser));
    return true;
}

static void parser_run(md_parser *parser, md_piece_fn fn, void *ctx)
{
    parser->fn = fn;
    parser->ctx = ctx;
    while (pending(parser) > 0 && step(parser)) {
    }
    deliver(parser);
    cm_bytes_consume(&parser->text, parser->head);
    cm_bytes_consume(&parser->marks, parser->head);
    parser->head = 0;
}

/* ---- public ---- */

md_parser *md_parser_create(const md_parser_options *options)
{
    md_parser *parser = cm_alloc(sizeof(*parser));
    parser->options = *options;
    parser->stop = cm_alloc(sizeof(char *) * options->n_stop);
    for (size_t i = 0; i < options->n_stop; i++) {
        if (options->stop[i][0] != 0) {
            parser->stop[parser->n_stop++] = cm_strdup(options->stop[i]);
        }
    }
    parser->state = options->plain                ? STATE_PLAIN
                    : options->start_in_reasoning ? STATE_REASONING
                                                  : STATE_CONTENT;
    parser->leading = parser->state == STATE_REASONING || !options->continues_prefix;
    parser->piece_kind = MD_PIECE_CONTENT;
    md_detok_init(&parser->detok, true);
    return parser;
}

void md_parser_destroy(md_parser *parser)
{
    if (parser == NULL) {
        return;
    }
    for (size_t i = 0; i < parser->n_stop; i++) {
        cm_free(parser->stop[i]);
    }
    for (uint32_t i = 0; i < parser->n_calls; i++) {
        cm_bytes_fini(&parser->args[i]);
    }
    cm_free(parser->stop);
    cm_free(parser->args);
    cm_bytes_fini(&parser->text);
    cm_bytes_fini(&parser->marks);
    cm_bytes_fini(&parser->name);
    cm_bytes_fini(&parser->piece);
    cm_free(parser);
}

/* Marks for text that has come since there were as many marks: the last n_control bytes count as control. */
static void mark_new(md_parser *parser, size_t n_control)
{
    static const uint8_t no = 0, yes = 1;
    while (parser->marks.len < parser->text.len) {
        bool control = parser->text.len - parser->marks.len <= n_control;
        cm_bytes_append(&parser->marks, control ? &yes : &no, 1);
    }
}

bool md_parser_push_id(md_parser *parser, const md_tokenizer *tokenizer, uint32_t id, md_piece_fn fn,
                       void *ctx)
{
    size_t n_control = 0;
    if (parser->stop_match != NULL) {
        return true;
    }
    md_detok_push(&parser->detok, tokenizer, id, &parser->text);
    if (md_tokenizer_is_added(tokenizer, id)) {
        /* a control token is whole characters: nothing of it is held back, at most a U+FFFD comes before it
         */
        (void)md_tokenizer_bytes(tokenizer, id, &n_control);
    }
    mark_new(parser, n_control);
    parser_run(parser, fn, ctx);
    return parser->stop_match != NULL;
}

bool md_parser_push_text(md_parser *parser, const char *text, size_t n_bytes, md_piece_fn fn, void *ctx)
{
    if (parser->stop_match != NULL) {
        return true;
    }
    md_detok_push_bytes(&parser->detok, (const uint8_t *)text, n_bytes, &parser->text);
    mark_new(parser, SIZE_MAX);
    parser_run(parser, fn, ctx);
    return parser->stop_match != NULL;
}

void md_parser_finish(md_parser *parser, md_piece_fn fn, void *ctx)
{
    if (parser->stop_match != NULL) {
        return;
    }
    md_detok_flush(&parser->detok, &parser->text);
    mark_new(parser, 0);
    bool text =
        parser->state == STATE_REASONING || parser->state == STATE_CONTENT || parser->state == STATE_PLAIN;
    parser->final = text; /* in a call, what is held back is the start of a tag that never came: it goes */
    parser_run(parser, fn, ctx);
}

uint32_t md_parser_calls(const md_parser *parser)
{
    return parser->n_calls;
}

const char *md_parser_call_args(const md_parser *parser, uint32_t call, size_t *n_bytes_out)
{
    CM_ASSERT(call < parser->n_calls);
    *n_bytes_out = parser->args[call].len;
    return cm_bytes_text(&parser->args[call]);
}

const char *md_parser_stop_match(const md_parser *parser)
{
    return parser->stop_match;
}

bool md_parser_in_reasoning(const md_parser *parser)
{
    return parser->state == STATE_REASONING;
}
