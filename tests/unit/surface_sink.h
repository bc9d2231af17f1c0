/* A surface's writer between a test that gives it a stream's events and a list of the objects it tells.
 * Failures are cmocka's. */
#pragma once
#include "gateway/surface.h"

enum { SINK_OBJECTS_MAX = 64 };

typedef struct sink {
    const gw_surface *surface;
    void *writer;
    cm_bytes object[SINK_OBJECTS_MAX]; /* ids of parts: their hex digits are "#0", "#1", ... by the part */
    uint32_t n;
    bool last; /* the newest was said to be the last */
} sink;

void sink_open(sink *s, const gw_surface *surface, const char *given);
void sink_close(sink *s);
/* Request "r1" of model "m", created at 5, a prompt of 4 tokens of which 1 is cached. */
void sink_start(sink *s);
void sink_piece(sink *s, md_piece_kind kind, uint32_t call, const char *text);
/* Of one token: the text's bytes, this logarithm, and one likelier token, "z" of -0.5. */
void sink_logprobs(sink *s, md_piece_kind kind, const char *text, float logprob);
/* 3 tokens of which 2 are reasoning. stop, parser: NULL for none. */
void sink_finish(sink *s, gw_reason reason, const char *stop, const md_parser *parser);

/* These objects and no more, the last of them said to be it; each is JSON, and each of a surface with named
 * events begins with its type. Forgets them. */
void sink_expect(sink *s, const char *const *objects, uint32_t n);
#define SINK_EXPECT(s, ...)                                                                                  \
    do {                                                                                                     \
        const char *const objects_[] = {__VA_ARGS__};                                                        \
        sink_expect(s, objects_, sizeof(objects_) / sizeof(objects_[0]));                                    \
    } while (0)
/* The same of one text; frees it. */
void sink_expect_text(cm_bytes *text, const char *wanted);
