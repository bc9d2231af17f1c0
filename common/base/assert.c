#include "common/base/assert.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/base/log.h"

void cm_assert_fail(const char *file, int line, const char *expr, const char *fmt, ...)
{
    char values[256], text[768];
    va_list args;
    va_start(args, fmt);
    vsnprintf(values, sizeof(values), fmt, args);
    va_end(args);
    int n = snprintf(text, sizeof(text),
                     "baleen bug: assertion failed: %s at %s:%d %s\nlast events of this process:\n", expr,
                     file, line, values);
    ssize_t written = write(2, text, n > 0 ? strnlen(text, sizeof(text)) : 0);
    (void)written;
    cm_log_dump(2);
    abort();
}
