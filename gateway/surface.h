/* The interfaces over HTTP that generate: what is different between them. A surface turns a client's body
 * into a chat or completion body and a stream's events into its own objects; admission, limits, disconnects
 * and coming back are written once, in http_generate.c. Thread: the loop's. */
#pragma once
#include "gateway/stream.h"

/* A field that has another name, or another place, in a chat body. */
typedef struct gw_surface_field {
    const char *chat, *own;
    bool is_copied; /* its value means the same; else somebody else turns it around */
} gw_surface_field;

/* How a writer is spoken to. A writer tells the objects of one request always the same, however its tokens
 * come and wherever it is told: a client that comes back counts them. */
typedef struct gw_writer_ops {
    /* given: the client's body, borrowed for the call. Objects are handed to emit as in gateway/stream.h;
     * those of named events begin with {"type":"NAME". */
    void *(*create)(const json_t *given, const char *fingerprint, gw_emit_fn emit, void *ctx);
    void (*destroy)(void *writer);
    /* ctx of the events of one of the answers. */
    void *(*choice)(void *writer, uint32_t choice);
    const gw_stream_events *(*events)(void);
    /* Before started, when that takes long: tells the objects that need no more than this, which started then
     * leaves out; at most once. NULL: there are none. */
    void (*begin)(void *writer, const char *request_id, const char *model, int64_t created_s);
    /* The object of an event that says nothing new; NULL: a comment is enough to keep a connection alive.
     * Not before begin or started. */
    void (*keep_alive)(const void *writer, cm_bytes *out);
    /* The last object of a stream that fails after its status was sent, and begin or started came, if there
     * is a begin; NULL: that of error. */
    void (*failure)(const void *writer, const gw_error *error, cm_bytes *out);
} gw_writer_ops;

typedef struct gw_surface {
    const char *name;               /* by which another gateway finds it */
    gw_ask_kind kind;               /* what its bodies become */
    const char *id_prefix;          /* of its requests; NULL: that of the kind */
    bool named_events;              /* an event has its object's type as name; no [DONE] at the end */
    bool no_done;                   /* no [DONE] at the end */
    const gw_surface_field *fields; /* up to one without a name; NULL: none */
    /* A new reference; what it cannot tell, gw_stream_open checks. NULL: the client's own body. */
    cm_status (*body)(const json_t *given, json_t **body_out, gw_error *error_out);
    void (*error)(const gw_error *error, const char *request_id, cm_bytes *out);
    gw_writer_ops writer;
} gw_surface;

extern const gw_surface gw_surface_chat, gw_surface_complete, gw_surface_messages, gw_surface_responses;
extern const gw_surface gw_surface_kserve_infer, gw_surface_kserve_infer_chat, gw_surface_kserve_generate,
    gw_surface_kserve_generate_chat;
const gw_surface *gw_surface_find(const char *name); /* NULL: there is none */

/* To a chat body, fields that are copied; null is no value. */
void gw_surface_copy(const gw_surface_field *fields, const json_t *given, json_t *body);
/* An error about a field of the chat body, in the client's own words. */
void gw_surface_own_words(const gw_surface *surface, gw_error *error);
