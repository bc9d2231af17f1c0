/* Many streamed HTTP requests at once, as clients make them: what `baleen bench serve.stream` and serve.model
 * load a gateway with: one of this machine, started for the run at an IPv4 address. Answers are counted and
 * thrown away. Thread: the loop's. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/bytes.h"
#include "common/base/status.h"
#include "common/proc/loop.h"

typedef struct stream_load stream_load;

typedef struct stream_load_options {
    pc_loop *loop;
    const char *address;                                       /* "IPv4:port" of the gateway */
    uint32_t n;                                                /* requests */
    void (*write_body)(void *ctx, uint32_t i, cm_bytes *body); /* of the i-th; called within begin */
    void *ctx;
} stream_load_options;

typedef struct stream_load_counts {
    uint32_t n_talking; /* something of the answer has come, and it goes on */
    uint32_t n_done;    /* closed by the gateway after [DONE] */
    uint32_t n_failed;  /* lost, or answered otherwise */
    uint64_t n_bytes;   /* read by all of them, heads included */
} stream_load_counts;

/* Connects all and asks. CM_E_IO, CM_E_INVALID (address). */
CM_MUST_CHECK cm_status stream_load_begin(const stream_load_options *options, stream_load **load_out,
                                          cm_error *err);
stream_load_counts stream_load_get(const stream_load *load);
/* Closes one that talks, as a client that goes away; false: none does. */
bool stream_load_drop(stream_load *load);
void stream_load_end(stream_load *load); /* closes what is left; NULL is fine */
