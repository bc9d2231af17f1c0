/* The log on a thread of its own: a disk that hangs must not stop heartbeats from being heard. Writes are
 * done in order, their results come back on the loop. Thread: the loop's. */
#pragma once
#include "common/proc/loop.h"
#include "coordinator/store.h"

typedef struct co_writer co_writer;
typedef void (*co_writer_fn)(void *ctx, uint64_t ticket, cm_status status, const char *text);

/* store is given. */
co_writer *co_writer_create(pc_loop *loop, co_store *store, uint32_t n_queued_max, co_writer_fn fn,
                            void *ctx);
/* Waits for the write that runs and for those queued; fn is not called any more. */
void co_writer_destroy(co_writer *writer);
/* epoch (may be NULL) is held until the result is back. CM_E_CAPACITY: n_queued_max writes wait. */
CM_MUST_CHECK cm_status co_writer_submit(co_writer *writer, uint64_t ticket, uint32_t next_member_id,
                                         uint64_t next_number, co_epoch *epoch);
