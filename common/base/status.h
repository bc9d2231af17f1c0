/* What an operation came to. Every function that can fail returns a cm_status; what the caller does about a
 * failure depends on its scope (what was lost), rarely on the exact code.
 * Thread: any. Owns nothing. */
#pragma once
#include <stddef.h>

#define CM_MUST_CHECK         __attribute__((warn_unused_result))
#define CM_PRINTF(fmt_, arg_) __attribute__((format(printf, fmt_, arg_)))

/* name, number, text. The hundreds of the number are the scope: 0 request, 100 peer, 200 process. */
#define CM_STATUS_TABLE(X)                                                                                   \
    X(CM_E_INVALID, -1, "invalid input")                                                                     \
    X(CM_E_NOT_FOUND, -2, "not found")                                                                       \
    X(CM_E_EXISTS, -3, "already exists")                                                                     \
    X(CM_E_TOO_LONG, -4, "too long")                                                                         \
    X(CM_E_DEADLINE, -5, "deadline passed")                                                                  \
    X(CM_E_CANCELLED, -6, "cancelled")                                                                       \
    X(CM_E_CAPACITY, -7, "no capacity")                                                                      \
    X(CM_E_UNSUPPORTED, -8, "unsupported")                                                                   \
    X(CM_E_UNAVAILABLE, -9, "unavailable")                                                                   \
    X(CM_E_UNREACHABLE, -101, "peer unreachable")                                                            \
    X(CM_E_RESET, -102, "peer connection lost")                                                              \
    X(CM_E_SILENT, -103, "peer silent")                                                                      \
    X(CM_E_STALE, -104, "stale epoch")                                                                       \
    X(CM_E_NO_OWNER, -105, "expert without a live owner")                                                    \
    X(CM_E_PROTOCOL, -106, "peer broke the protocol")                                                        \
    X(CM_E_REFUSED, -107, "peer refused")                                                                    \
    X(CM_E_MEMORY, -201, "out of memory")                                                                    \
    X(CM_E_DEVICE, -202, "device error")                                                                     \
    X(CM_E_CORRUPT, -203, "corrupt model or file")                                                           \
    X(CM_E_IO, -204, "input/output error")                                                                   \
    X(CM_E_CONFIG, -205, "bad configuration")

typedef enum cm_status {
    CM_OK = 0,
    CM_AGAIN = 1, /* not finished: call again; never an error */
#define CM_X(name, number, text) name = (number),
    CM_STATUS_TABLE(CM_X)
#undef CM_X
} cm_status;

typedef enum cm_scope {
    CM_SCOPE_NONE,    /* CM_OK, CM_AGAIN */
    CM_SCOPE_REQUEST, /* drop this request, nothing else */
    CM_SCOPE_PEER,    /* drop the link to that peer; requests on it are retried or failed */
    CM_SCOPE_PROCESS, /* this process cannot go on with its job */
} cm_scope;

cm_scope cm_status_scope(cm_status status);
const char *cm_status_name(cm_status status); /* "CM_E_STALE" */
const char *cm_status_text(cm_status status); /* "stale epoch" */

/* A sentence for a person beside the code: what, where, what to do. Used where the cause is input (a file, a
 * client, a flag) and the reader is not the log. A cm_error may be NULL wherever one is accepted. */
typedef struct cm_error {
    cm_status status;
    char
        field[96]; /* what it is about: a JSON field, an option, a tensor; "" when nothing smaller than all */
    char text[416]; /* the sentence, without a final full stop */
} cm_error;

/* Fills *err (if not NULL) and returns status, so that `return cm_error_set(...)` reads well. field may be
 * NULL. */
cm_status cm_error_set(cm_error *err, cm_status status, const char *field, const char *fmt, ...)
    CM_PRINTF(4, 5);

#define CM_TRY(expr)                                                                                         \
    do {                                                                                                     \
        cm_status try_status_ = (expr);                                                                      \
        if (try_status_ != CM_OK) {                                                                          \
            return try_status_;                                                                              \
        }                                                                                                    \
    } while (0)
