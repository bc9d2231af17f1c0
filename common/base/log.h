/* One line per event. error: cannot go on as asked; warn: odd, going on; info: few per process life; debug:
 * per object; trace: per message (compiled out unless CM_DEBUG). Lower case, no final full stop, numbers in
 * the text. Role, id and epoch are put in front by the logger. The last 64 lines of every level are kept for
 * cm_assert. Thread: any; one line is one write. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"

typedef enum cm_log_level { CM_LOG_ERROR, CM_LOG_WARN, CM_LOG_INFO, CM_LOG_DEBUG, CM_LOG_TRACE } cm_log_level;

typedef struct cm_log_options {
    cm_log_level level; /* lines above it are only remembered, not written */
    bool json;          /* one JSON object a line in place of text */
    int fd;             /* borrowed; 2 by default */
} cm_log_options;

void cm_log_setup(const cm_log_options *options);
/* role "router", id 0..; shown in front of every line from now on. role is kept (a literal). */
void cm_log_identity(const char *role, int id);
void cm_log_epoch(uint64_t epoch);
/* "error".."trace"; CM_E_CONFIG if unknown. */
CM_MUST_CHECK cm_status cm_log_level_parse(const char *text, cm_log_level *level_out);

/* A test's handler gets every line instead of the fd; NULL gives them back. */
typedef void (*cm_log_handler_fn)(void *ctx, cm_log_level level, const char *text);
void cm_log_handler(cm_log_handler_fn fn, void *ctx);

void cm_log_line(cm_log_level level, const char *fmt, ...) CM_PRINTF(2, 3);
/* Writes the remembered lines to fd, oldest first; async-signal-safe enough for a dying process. */
void cm_log_dump(int fd);

#define cm_error_log(...) cm_log_line(CM_LOG_ERROR, __VA_ARGS__)
#define cm_warn(...)      cm_log_line(CM_LOG_WARN, __VA_ARGS__)
#define cm_info(...)      cm_log_line(CM_LOG_INFO, __VA_ARGS__)
#define cm_debug(...)     cm_log_line(CM_LOG_DEBUG, __VA_ARGS__)
#ifdef CM_DEBUG
#define cm_trace(...) cm_log_line(CM_LOG_TRACE, __VA_ARGS__)
#else
#define cm_trace(...) ((void)0)
#endif
