/* JSON written by hand where objects are many and small. Thread: any. */
#pragma once
#include <stddef.h>

#include "common/base/bytes.h"

/* A quoted JSON string; bytes that are no UTF-8 become U+FFFD, so that what we send is always JSON. */
void gw_json_string(cm_bytes *out, const char *text, size_t n_bytes);
