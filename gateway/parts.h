/* An answer as a row of parts: reasoning, text, tool calls, in the order in which they came. For the surfaces
 * whose objects are made of such parts. Thread: the loop's. */
#pragma once
#include "common/base/bytes.h"
#include "common/model/parser.h"

typedef struct gw_part {
    md_piece_kind kind; /* REASONING, CONTENT or CALL */
    uint32_t call;      /* CALL: its index */
    cm_bytes name;      /* CALL */
    cm_bytes text;      /* so far; of a call its arguments */
} gw_part;

typedef struct gw_parts {
    gw_part *part; /* [n] owned */
    uint32_t n;
} gw_parts;

/* Adds a piece. true: it began a part, the last one now. */
bool gw_parts_add(gw_parts *parts, const md_piece *piece);
/* The answer is complete: arguments as the parser knows them (what was flagged as JSON and is none is a
 * string). parser may be NULL. */
void gw_parts_mend(gw_parts *parts, const md_parser *parser);
void gw_parts_fini(gw_parts *parts);

enum { GW_PART_ID_BYTES = 48 };
/* prefix and 24 hex digits that follow from request_id and n alone: whoever tells a request again gives its
 * parts the same ids. */
void gw_part_id(const char *prefix, const char *request_id, uint64_t n, char id_out[GW_PART_ID_BYTES]);
