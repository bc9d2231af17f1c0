/* Prompts to ids, off the loop: a chat body or a completion's prompt goes to a job thread, the ids come back
 * as a loop event; the answer's constraint is compiled there too, to see that it can be. Thread: the loop's.
 */
#pragma once
#include "common/base/jobs.h"
#include "common/model/chat.h"
#include "common/proc/loop.h"
#include "gateway/request.h"

typedef struct gw_encoder {
    pc_loop *loop;
    cm_jobs *jobs;
    const md_tokenizer *tokenizer;
    md_profile profile;
    bool strict_replay; /* while thinking: refuse calls in the history without their reasoning_content */
    bool json_word;     /* refuse json_object when no message says json */
} gw_encoder;

typedef struct gw_encoded {
    cm_status status; /* CM_OK, or error says what the client did wrong */
    gw_error error;
    md_ids ids;     /* to be taken, or freed with the rest when the callback returns */
    bool thinking;  /* the prompt ended in <think> */
    bool continues; /* chat: a prefix of the assistant's is continued */
} gw_encoded;
typedef void (*gw_encoded_fn)(void *ctx, gw_encoded *encoded);

typedef struct gw_encode gw_encode;
/* The prompt of request is taken over, whatever comes of it; body (chat) is borrowed for the call.
 * CM_E_CAPACITY: too many wait. */
CM_MUST_CHECK cm_status gw_encode_begin(const gw_encoder *encoder, gw_request *request, const json_t *body,
                                        gw_encoded_fn fn, void *ctx, gw_encode **encode_out);
/* fn will not be called. */
void gw_encode_forget(gw_encode *encode);

/* The same for a chat body at once, on the caller's thread; ids_out and text_out (may be NULL) are appended
 * to. */
CM_MUST_CHECK cm_status gw_encode_chat(const gw_encoder *encoder, const json_t *body, md_ids *ids_out,
                                       cm_bytes *text_out, bool *continues_out, gw_error *error_out);
