#include "common/base/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/clock.h"

enum { LOG_LINE_BYTES = 1024, LOG_RING_LINES = 64 };

static struct {
    pthread_mutex_t lock; /* protects ring, ring_next, handler and the order of written lines */
    cm_log_options options;
    const char *role;
    int id;
    _Atomic uint64_t epoch;
    cm_log_handler_fn handler;
    void *handler_ctx;
    char ring[LOG_RING_LINES][LOG_LINE_BYTES];
    unsigned ring_next;
} g_log = {.lock = PTHREAD_MUTEX_INITIALIZER, .options = {.level = CM_LOG_INFO, .fd = 2}, .id = -1};

static const char *const g_level_names[] = {"error", "warn", "info", "debug", "trace"};

void cm_log_setup(const cm_log_options *options)
{
    g_log.options = *options;
}

void cm_log_identity(const char *role, int id)
{
    g_log.role = role;
    g_log.id = id;
}

void cm_log_epoch(uint64_t epoch)
{
    atomic_store(&g_log.epoch, epoch);
}

cm_status cm_log_level_parse(const char *text, cm_log_level *level_out)
{
    for (unsigned i = 0; i < sizeof(g_level_names) / sizeof(g_level_names[0]); i++) {
        if (strcmp(text, g_level_names[i]) == 0) {
            *level_out = (cm_log_level)i;
            return CM_OK;
        }
    }
    return CM_E_CONFIG;
}

void cm_log_handler(cm_log_handler_fn fn, void *ctx)
{
    pthread_mutex_lock(&g_log.lock);
    g_log.handler = fn;
    g_log.handler_ctx = ctx;
    pthread_mutex_unlock(&g_log.lock);
}

static size_t log_escape_json(char *out, size_t cap, const char *text)
{
    size_t n = 0;
    for (; *text != '\0' && n + 8 < cap; text++) {
        unsigned char c = (unsigned char)*text;
        if (c == '"' || c == '\\') {
            out[n++] = '\\';
            out[n++] = (char)c;
        } else if (c < 0x20) {
            n += (size_t)snprintf(out + n, cap - n, "\\u%04x", c);
        } else {
            out[n++] = (char)c;
        }
    }
    out[n] = '\0';
    return n;
}

static size_t log_format(char *line, size_t cap, cm_log_level level, const char *text)
{
    char when[40], who[48] = "";
    uint64_t epoch = atomic_load(&g_log.epoch);
    cm_wall_format(cm_wall_us(), when, sizeof(when));
    int n;
    if (g_log.options.json) {
        char escaped[LOG_LINE_BYTES - 192]; /* the rest of the object always fits after it */
        log_escape_json(escaped, sizeof(escaped), text);
        n = snprintf(
            line, cap,
            "{\"time\":\"%s\",\"level\":\"%s\",\"role\":\"%s\",\"id\":%d,\"epoch\":%llu,\"text\":\"%s\"}\n",
            when, g_level_names[level], g_log.role != NULL ? g_log.role : "", g_log.id,
            (unsigned long long)epoch, escaped);
    } else {
        if (g_log.role != NULL && g_log.id >= 0) {
            snprintf(who, sizeof(who), "%s %d epoch %llu: ", g_log.role, g_log.id, (unsigned long long)epoch);
        } else if (g_log.role != NULL) {
            snprintf(who, sizeof(who), "%s: ", g_log.role);
        }
        n = snprintf(line, cap, "%s %-5s %s%s\n", when, g_level_names[level], who, text);
    }
    if (n < 0) {
        return 0;
    }
    if ((size_t)n >= cap) {
        line[cap - 2] = '\n';
        return cap - 1;
    }
    return (size_t)n;
}

void cm_log_line(cm_log_level level, const char *fmt, ...)
{
    char text[LOG_LINE_BYTES - 160], line[LOG_LINE_BYTES];
    int saved_errno = errno;
    va_list args;
    va_start(args, fmt);
    vsnprintf(text, sizeof(text), fmt, args);
    va_end(args);
    size_t n = log_format(line, sizeof(line), level, text);

    pthread_mutex_lock(&g_log.lock);
    memcpy(g_log.ring[g_log.ring_next++ % LOG_RING_LINES], line, n + 1);
    if (g_log.handler != NULL) {
        g_log.handler(g_log.handler_ctx, level, text);
    } else if (level <= g_log.options.level) {
        ssize_t written = write(g_log.options.fd, line, n);
        (void)written; /* nowhere left to report it */
    }
    pthread_mutex_unlock(&g_log.lock);
    errno = saved_errno;
}

void cm_log_dump(int fd)
{
    /* no lock: the dying thread may hold it */
    unsigned next = g_log.ring_next;
    for (unsigned i = 0; i < LOG_RING_LINES; i++) {
        const char *line = g_log.ring[(next + i) % LOG_RING_LINES];
        if (line[0] != '\0') {
            ssize_t written = write(fd, line, strnlen(line, LOG_LINE_BYTES));
            (void)written;
        }
    }
}
