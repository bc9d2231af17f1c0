/* JSON text as the prompt needs it: Python's way of writing, and numbers that jansson cannot hold. Thread:
 * any. */
#pragma once
#include <jansson.h>
#include <stddef.h>

#include "common/base/bytes.h"

/* Escaped as inside a JSON string, without the quotes: \" \\ \n \r \t \b \f and \u00xx below 0x20, all else
 * raw. */
void md_json_escape(const char *text, size_t n, cm_bytes *out);

/* Any JSON value, NULL if it is none. Integers beyond 64 bits are kept: md_json_dumps writes them as they
 * were. Strings of the result are to be read with md_json_string only. */
json_t *md_json_read(const char *text, size_t n);
/* Text of a string that md_json_read gave; NULL when the value is no string (or such an integer). */
const char *md_json_string(const json_t *value, size_t *n_out);
/* json_dumps of a value that md_json_read gave. */
void md_json_dumps_read(const json_t *value, cm_bytes *out);
