/* The coordinator's log: DIR/coordinator.db (SQLite, WAL, every write synced before it counts). Holds the
 * cluster's id, the next free member id and epoch number, and the last epochs. One process at a time: the
 * file is locked while open. Thread: one at a time. */
#pragma once
#include "common/base/bytes.h"
#include "coordinator/epoch.h"

typedef struct co_store co_store;

typedef struct co_store_past {
    uint64_t cluster;        /* drawn when the log was made */
    uint32_t next_member_id; /* 1 in a new log */
    uint64_t next_number;    /* 1 in a new log */
    co_epoch *epoch;         /* the last one, NULL if none; the caller releases it */
} co_store_past;

/* folder: made if absent (its parent must be there); "" = in memory, gone at close. CM_E_EXISTS: another
 * coordinator has it open; CM_E_CORRUPT: not our file, or damaged; CM_E_IO. err names folder and remedy. */
CM_MUST_CHECK cm_status co_store_open(const char *folder, co_store **store_out, co_store_past *past_out,
                                      cm_error *err);
void co_store_close(co_store *store); /* NULL is fine */
/* All of it or nothing, on disk when it returns CM_OK. epoch may be NULL. */
CM_MUST_CHECK cm_status co_store_write(co_store *store, uint32_t next_member_id, uint64_t next_number,
                                       const co_epoch *epoch, cm_error *err);
