/* Files that somebody else may be reading: whole or as they were. Thread: any. */
#pragma once
#include <stddef.h>

#include "common/base/status.h"

/* Writes DIR/NAME beside its place, to disk, then puts it there in one step; a reader sees the old file or
 * the new one. CM_E_IO; nothing is left behind then. */
CM_MUST_CHECK cm_status replace_file(const char *dir, const char *name, const void *data, size_t n_bytes,
                                     cm_error *err);
