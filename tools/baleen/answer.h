/* One streamed answer of baleen.v1.Inference/Chat, shown while it comes: the answer on stdout, thinking
 * (dimmed on a terminal) and the closing line on stderr. Ctrl-C cancels it. Thread: main. */
#pragma once
#include <stdbool.h>

#include "common/base/bytes.h"
#include "common/proc/rpc_client.h"
#include "proto/baleen_v1.pb-c.h"

typedef struct answer {
    cm_bytes content, reasoning; /* as received */
    bool cancelled;              /* by the person */
} answer;
void answer_init(answer *self);
void answer_fini(answer *self);

/* Runs the loop until the answer is over. CM_E_CANCELLED: by the person; otherwise the server's status with
 * its text. */
CM_MUST_CHECK cm_status answer_ask(answer *self, pc_loop *loop, pc_channel *channel,
                                   const Baleen__V1__ChatRequest *request, cm_error *err);
