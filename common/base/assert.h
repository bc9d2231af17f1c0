/* Assertions are for our own bugs only and stay on in release: they print the expression, the place, a
 * sentence with the values, and the last log lines of this process, then abort. What a peer, a client, a
 * file, a device or the clock can cause is an error, never an assertion. */
#pragma once
#include "common/base/status.h"

_Noreturn void cm_assert_fail(const char *file, int line, const char *expr, const char *fmt, ...)
    CM_PRINTF(4, 5);

#define CM_ASSERT(expr)                                                                                      \
    do {                                                                                                     \
        if (__builtin_expect(!(expr), 0)) {                                                                  \
            cm_assert_fail(__FILE__, __LINE__, #expr, " ");                                                  \
        }                                                                                                    \
    } while (0)
/* With values: CM_ASSERT_MSG(n <= max, "n %u max %u", n, max) */
#define CM_ASSERT_MSG(expr, ...)                                                                             \
    do {                                                                                                     \
        if (__builtin_expect(!(expr), 0)) {                                                                  \
            cm_assert_fail(__FILE__, __LINE__, #expr, __VA_ARGS__);                                          \
        }                                                                                                    \
    } while (0)
/* For innermost loops: debug builds only. */
#ifdef CM_DEBUG
#define CM_DASSERT(expr) CM_ASSERT(expr)
#else
#define CM_DASSERT(expr) ((void)0)
#endif
