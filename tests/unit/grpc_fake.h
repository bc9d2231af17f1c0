/* The gateway behind gateway/stream.h as a script of the test: what was asked is kept, events come when the
 * test says so, never from inside gw_stream_open. Thread: the loop's. */
#pragma once
#include "gateway/stream.h"

enum { FAKE_STREAMS = 8 };

struct gw_stream {
    gw_gateway *gateway;
    gw_ask_kind kind;
    json_t *body; /* a copy */
    char id[160];
    uint64_t deadline_ms;
    bool want_ids, skip_special;
    uint32_t choice;
    gw_stream_events events;
    void *ctx;
    pc_task task;
    uint64_t router; /* that it goes on at */
    bool over, cancelled, detached, ending;
};

/* What a seek finds; choice i of the body's n is at router 9 + i. */
typedef struct fake_found {
    const char *id, *surface; /* id NULL: nothing */
    const json_t *body, *options;
} fake_found;

struct gw_gateway {
    pc_loop *loop;
    fake_found found;
    gw_info info;
    const char *key; /* that is asked for; NULL: none is */
    md_tokenizer *tokenizer;
    gw_archive archive;                /* of its files; the test's */
    void (*script)(gw_stream *stream); /* runs as an event after a stream was opened; may be NULL */
    bool refuses;                      /* the next streams with this error */
    uint32_t refuses_choice;           /* > 0: that answer of a request, with refusal */
    gw_error refusal;
    gw_stream streams[FAKE_STREAMS];
    uint32_t n_streams, n_live;
};

void fake_init(gw_gateway *gateway, pc_loop *loop);
void fake_fini(gw_gateway *gateway); /* asserts that no stream lives */

/* Each is left out once the stream is over. */
void fake_started(gw_stream *stream);
void fake_token(gw_stream *stream, uint64_t offset, uint32_t id);
/* With up to two alternatives: id + 1 of a byte that is no text, and id + 2 without bytes. */
void fake_logprobs(gw_stream *stream, uint32_t id, float logprob, uint32_t n_top);
void fake_piece(gw_stream *stream, md_piece_kind kind, uint32_t call, const char *text, size_t n_bytes);
void fake_text(gw_stream *stream, const char *text); /* a piece of content */
void fake_flush(gw_stream *stream);
void fake_finish(gw_stream *stream, gw_reason reason, const char *stop_string, int64_t stop_id);
void fake_fail(gw_stream *stream, gw_cause cause, const char *param, uint32_t retry_ms);
