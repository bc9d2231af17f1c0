/* The log as a file: DIR/coordinator.db (SQLite, WAL, every write synced before it counts), readable by its
 * owner only. One process at a time: the file is locked while open. Used by store_sqlite.c. Thread: one at a
 * time. */
#pragma once
#include "coordinator/store.h"

typedef struct co_sqlite co_sqlite;

/* folder: made if absent (its parent must be there); "" = in memory, gone at close. The epoch in past_out is
 * the caller's to release. CM_E_EXISTS: another coordinator has it open; CM_E_CORRUPT: not our file, or
 * damaged; CM_E_IO. err names folder and remedy. */
CM_MUST_CHECK cm_status co_sqlite_open(const char *folder, co_sqlite **sqlite_out, co_store_past *past_out,
                                       cm_error *err);
void co_sqlite_close(co_sqlite *sqlite); /* NULL is fine */
/* All of it or nothing, on disk when it returns CM_OK. epoch may be NULL. */
CM_MUST_CHECK cm_status co_sqlite_write(co_sqlite *sqlite, uint32_t next_member_id, uint64_t next_number,
                                        const co_drains *drains, const co_epoch *epoch, cm_error *err);
