/* A growable byte buffer with a bound, for text and messages put together piece by piece. Always followed by
 * a NUL that is not counted. Thread: one at a time. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/status.h"

typedef struct cm_bytes {
    uint8_t *data;   /* owned; NULL until the first byte */
    size_t len, cap; /* bytes */
    size_t max;      /* len never exceeds it; 0 = no bound of its own */
    bool overflow;   /* an append was refused because of max; sticky until clear */
} cm_bytes;

void cm_bytes_init(cm_bytes *bytes, size_t max);
void cm_bytes_fini(cm_bytes *bytes);
void cm_bytes_clear(cm_bytes *bytes); /* keeps the memory */
void cm_bytes_append(cm_bytes *bytes, const void *data, size_t n);
void cm_bytes_append_text(cm_bytes *bytes, const char *text);
void cm_bytes_printf(cm_bytes *bytes, const char *fmt, ...) CM_PRINTF(2, 3);
/* Drops the first n bytes. */
void cm_bytes_consume(cm_bytes *bytes, size_t n);
const char *cm_bytes_text(const cm_bytes *bytes); /* "" when empty */
