/* What comes from a checkpoint's folder as text: whole files and JSON, with every failure a sentence.
 * Thread: any. */
#pragma once
#include <jansson.h>

#include "common/base/bytes.h"
#include "common/base/status.h"

/* Reads the regular file DIR/NAME whole into bytes (initialised here; the caller frees it on success).
 * CM_E_IO, or CM_E_CORRUPT above max_bytes; err->field = name. */
CM_MUST_CHECK cm_status md_file_read(const char *dir, const char *name, size_t max_bytes, cm_bytes *bytes_out,
                                     cm_error *err);
/* DIR/NAME; the caller frees it with cm_free. */
char *md_path_join(const char *dir, const char *name);
/* The part of a path after the last slash; borrowed. */
const char *md_file_name(const char *path);

/* One JSON object, without duplicate keys. The caller drops the reference. field: what err is about (a file).
 * CM_E_CORRUPT with line and cause, CM_E_MEMORY. */
CM_MUST_CHECK cm_status md_json_object(const char *text, size_t n_bytes, const char *field,
                                       json_t **object_out, cm_error *err);
/* "a string", "a whole number", ...; "nothing" for NULL. */
const char *md_json_kind(const json_t *value);
