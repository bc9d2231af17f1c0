/* Input: options (1 byte), where to cut (2 bytes), stop strings (a length byte and the bytes each), then a
 * completion. In one piece, in two, and byte by byte it comes to the same. */
#include <string.h>

#include "common/base/mem.h"
#include "tests/fuzz/fuzz.h"
#include "tools/baleen/rows.h"

enum { STOPS_MAX = 3, STOP_BYTES_MAX = 15 };

typedef struct fuzz_input {
    md_parser_options options;
    char stop[STOPS_MAX][STOP_BYTES_MAX + 1];
    const char *stops[STOPS_MAX];
    const char *text;
    size_t n_text, cut;
} fuzz_input;

static bool input_read(const uint8_t *data, size_t size, fuzz_input *input)
{
    size_t at = 3;
    *input = (fuzz_input){0};
    if (size < at) {
        return false;
    }
    input->options = (md_parser_options){.start_in_reasoning = (data[0] & 1) != 0,
                                         .tools = (data[0] & 2) != 0,
                                         .continues_prefix = (data[0] & 4) != 0,
                                         .plain = (data[0] & 8) != 0,
                                         .include_stop = (data[0] & 16) != 0,
                                         .stop = input->stops,
                                         .n_stop = (size_t)data[0] >> 6};
    for (size_t i = 0; i < input->options.n_stop; i++) {
        size_t n = at < size ? data[at++] & STOP_BYTES_MAX : 0;
        n = n < size - at ? n : size - at;
        for (size_t k = 0; k < n; k++) {
            input->stop[i][k] = (char)(data[at + k] & 0x7f); /* a stop string is UTF-8 */
        }
        input->stops[i] = input->stop[i];
        at += n;
    }
    input->text = (const char *)data + at;
    input->n_text = size - at;
    input->cut = input->n_text > 0 ? (data[1] | (size_t)data[2] << 8) % input->n_text : 0;
    return true;
}

static void collect(void *ctx, const md_piece *piece)
{
    json_t *text = json_stringn(piece->text, piece->n_bytes);
    CM_ASSERT(text != NULL); /* complete UTF-8 */
    json_decref(text);
    row_collect(ctx, piece);
}

/* What a parser and its pieces came to, in bytes that compare. */
typedef struct fuzz_outcome {
    row_result result;
    md_parser *parser;
} fuzz_outcome;

static fuzz_outcome parse(const fuzz_input *input, size_t first, size_t step)
{
    fuzz_outcome outcome = {.parser = md_parser_create(&input->options)};
    for (size_t at = 0, n = first; at < input->n_text; at += n, n = step) {
        n = n < input->n_text - at ? n : input->n_text - at;
        bool stopped = md_parser_push_text(outcome.parser, input->text + at, n, collect, &outcome.result);
        CM_ASSERT(stopped == (md_parser_stop_match(outcome.parser) != NULL));
    }
    md_parser_finish(outcome.parser, collect, &outcome.result);
    CM_ASSERT(outcome.result.n_calls == md_parser_calls(outcome.parser));
    return outcome;
}

static void outcome_fini(fuzz_outcome *outcome)
{
    row_result_fini(&outcome->result);
    md_parser_destroy(outcome->parser);
}

static bool same_bytes(const cm_bytes *a, const cm_bytes *b)
{
    return a->len == b->len && memcmp(cm_bytes_text(a), cm_bytes_text(b), a->len) == 0;
}

static void check_same(const fuzz_outcome *a, const fuzz_outcome *b)
{
    const char *stop_a = md_parser_stop_match(a->parser), *stop_b = md_parser_stop_match(b->parser);
    CM_ASSERT(same_bytes(&a->result.reasoning, &b->result.reasoning));
    CM_ASSERT(same_bytes(&a->result.content, &b->result.content));
    CM_ASSERT(a->result.n_calls == b->result.n_calls);
    CM_ASSERT((stop_a == NULL) == (stop_b == NULL) && (stop_a == NULL || strcmp(stop_a, stop_b) == 0));
    for (uint32_t i = 0; i < a->result.n_calls; i++) {
        size_t n_a, n_b;
        const char *args_a = md_parser_call_args(a->parser, i, &n_a),
                   *args_b = md_parser_call_args(b->parser, i, &n_b);
        CM_ASSERT(same_bytes(&a->result.calls[i].name, &b->result.calls[i].name));
        CM_ASSERT(same_bytes(&a->result.calls[i].args, &b->result.calls[i].args));
        CM_ASSERT(n_a == n_b && memcmp(args_a, args_b, n_a) == 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_input input;
    if (!input_read(data, size, &input)) {
        return 0;
    }
    fuzz_outcome whole = parse(&input, SIZE_MAX, 1), cut = parse(&input, input.cut + 1, SIZE_MAX),
                 bytes = parse(&input, 1, 1);
    check_same(&whole, &cut);
    check_same(&whole, &bytes);
    outcome_fini(&whole);
    outcome_fini(&cut);
    outcome_fini(&bytes);
    return 0;
}
