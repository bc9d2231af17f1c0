/* Grammars that constrain what a model may say: a JSON object, a JSON schema, a regular expression, a list of
 * choices, calls of tools. Compiled from text into one machine over bytes and control tokens: states with
 * edges, grouped into rules that call each other (which is how JSON nests), every repetition counted. Edges
 * from which no end can be reached are cut off at compile time, so whatever prefix the machine has let
 * through can be completed. PCRE2 matches texts; it cannot say which bytes may follow a prefix, so regular
 * expressions are compiled here too.
 *
 * What the source may be, by kind:
 *   json_object  nothing: any JSON object
 *   json_schema  a JSON schema (schema.c says which keywords; every other one is refused by its path, none is
 *                ignored in silence but annotations)
 *   regex        the whole text must match (regex.c says which syntax)
 *   choice       a JSON list of strings: the text is one of them
 *   tools        a JSON object: "tools", a list of {"name", "parameters": a schema, or absent: none}; the
 * text is a block of calls of them as in encoding section 8.1, of at most "calls_max" calls. With "text":
 * true the answer may also be free text, or begin with it; with "schema" it may also be JSON of that schema
 *
 * JSON comes with at most one space after a comma or colon, or a line break and at most 32 spaces where
 * pretty printing has them; members in the order of the schema; numbers of at most 15 digits, which every
 * reader reads exactly, unless the schema's own bounds have more.
 *
 * A compiled grammar does not change. Thread: any. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/status.h"

typedef enum gm_kind {
    GM_JSON_OBJECT = 1, /* numbers of the wire format */
    GM_JSON_SCHEMA = 2,
    GM_REGEX = 3,
    GM_CHOICE = 4,
    GM_TOOLS = 5,
} gm_kind;

enum {
    GM_SOURCE_BYTES_MAX = 256 << 10,
    GM_EDGES_MAX = 400000, /* of a compiled grammar */
    GM_DEPTH_MAX = 200,    /* calls inside calls while text is matched; JSON may nest about 60 deep */
};

typedef struct gm_grammar gm_grammar;

/* CM_E_INVALID, CM_E_UNSUPPORTED, CM_E_TOO_LONG: err->text says what, err->field where ("/properties/a/not",
 * "" of a source that has no places). */
CM_MUST_CHECK cm_status gm_compile(gm_kind kind, const char *source, size_t n_source,
                                   gm_grammar **grammar_out, cm_error *err);
void gm_grammar_destroy(gm_grammar *grammar);
bool gm_kind_is_known(uint32_t kind);
size_t gm_grammar_bytes(const gm_grammar *grammar); /* of memory */
