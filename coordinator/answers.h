/* What the coordinator says, as packed messages. Appends to out. Thread: the loop's. */
#pragma once
#include "common/base/bytes.h"
#include "coordinator/co_core.h"
#include "coordinator/frame_key.h"

/* The word for a member that an entry of the outbox asks for; false for entries that say nothing. key: goes
 * out with Welcome and Commit; NULL: none. */
bool co_answer_word(const co_out *out, uint64_t cluster, uint32_t heartbeat_ms, uint32_t lease_ms,
                    const co_frame_key *key, cm_bytes *packed_out);
/* For a member that came to a coordinator which is not the active one; active: where to go, "" = not known.
 */
void co_answer_send_on(const char *active, const char *why, cm_bytes *packed_out);
/* All members' last counters. */
void co_answer_cluster_stats(const co_core *core, cm_bytes *packed_out);
/* The experts' recent load in one byte each (23 KB for 61 x 384). false: none was heard of yet. */
bool co_answer_cluster_load(const co_core *core, cm_bytes *packed_out);
/* self: the coordinator's own row. experts: with placement and load. */
void co_answer_status(const co_core *core, const co_peer *self, uint64_t now_ms, bool experts,
                      cm_bytes *packed_out);
/* Of one that is not active and knows nothing of the cluster but who is. */
void co_answer_status_standby(const co_peer *self, const char *active, const char *why, cm_bytes *packed_out);
