#include "common/base/bytes.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

void cm_bytes_init(cm_bytes *bytes, size_t max)
{
    *bytes = (cm_bytes){.max = max};
}

void cm_bytes_fini(cm_bytes *bytes)
{
    cm_free(bytes->data);
    *bytes = (cm_bytes){.max = bytes->max};
}

void cm_bytes_clear(cm_bytes *bytes)
{
    bytes->len = 0;
    bytes->overflow = false;
    if (bytes->data != NULL) {
        bytes->data[0] = 0;
    }
}

static bool bytes_reserve(cm_bytes *bytes, size_t n)
{
    if (bytes->max != 0 && n > bytes->max - bytes->len) {
        bytes->overflow = true;
        return false;
    }
    if (bytes->cap - bytes->len < n + 1 || bytes->data == NULL) {
        size_t cap = bytes->cap != 0 ? bytes->cap : 64;
        while (cap < bytes->len + n + 1) {
            cap *= 2;
        }
        bytes->data = cm_realloc(bytes->data, cap);
        bytes->cap = cap;
    }
    return true;
}

void cm_bytes_append(cm_bytes *bytes, const void *data, size_t n)
{
    if (bytes_reserve(bytes, n)) {
        if (n > 0) {
            memcpy(bytes->data + bytes->len, data, n);
        }
        bytes->len += n;
        bytes->data[bytes->len] = 0;
    }
}

void cm_bytes_append_text(cm_bytes *bytes, const char *text)
{
    cm_bytes_append(bytes, text, strlen(text));
}

void cm_bytes_printf(cm_bytes *bytes, const char *fmt, ...)
{
    va_list args, again;
    char text[256]; /* most are this short: written once */
    va_start(args, fmt);
    va_copy(again, args);
    int n = vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    CM_ASSERT(n >= 0);
    if ((size_t)n < sizeof(text)) {
        cm_bytes_append(bytes, text, (size_t)n);
    } else if (bytes_reserve(bytes, (size_t)n)) {
        vsnprintf((char *)bytes->data + bytes->len, (size_t)n + 1, fmt, again);
        bytes->len += (size_t)n;
    }
    va_end(again);
}

void cm_bytes_consume(cm_bytes *bytes, size_t n)
{
    CM_ASSERT(n <= bytes->len);
    if (n > 0) {
        bytes->len -= n;
        memmove(bytes->data, bytes->data + n, bytes->len + 1);
    }
}

const char *cm_bytes_text(const cm_bytes *bytes)
{
    return bytes->data != NULL ? (const char *)bytes->data : "";
}
