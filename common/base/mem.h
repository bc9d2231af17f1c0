/* Memory by lifetime: process (cm_alloc at start), object (cm_pool), step or request (cm_arena, reset at the
 * end). malloc is called in mem.c only. After start the step path does not allocate: cm_mem_guard_begin makes
 * any cm_alloc on this thread an assertion failure. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "common/base/status.h"

/* Zeroed; ends the process when memory is out (start-up, fixed sizes). n_bytes 0 gives a pointer all the
 * same. */
void *cm_alloc(size_t n_bytes);
/* Aligned to 64 bytes, zeroed, same failure rule; free with cm_free. */
void *cm_alloc_aligned(size_t n_bytes);
/* For sizes that come from outside: NULL when memory is out. */
void *cm_try_alloc(size_t n_bytes);
/* Keeps the old contents, grows zeroed or not at all as cm_alloc; p may be NULL. */
void *cm_realloc(void *p, size_t n_bytes);
char *cm_strdup(const char *text);
void cm_free(void *p);

/* Large blocks that are read again and again, zeroed, beginning at a page of the large kind: out of the pool
 * of huge pages that an operator has set aside (vm.nr_hugepages) while it lasts, else with a wish for
 * transparent ones, which the machine may not grant. NULL when memory is out. Freed with the same size. */
void *cm_huge_alloc(size_t n_bytes);
void cm_huge_free(void *p, size_t n_bytes); /* NULL is fine */

/* As memcpy, for a large block that caches will not hold until it is read: where the machine can, lines are
 * written without being read before. */
void cm_copy_past_caches(void *to, const void *from, size_t n_bytes);

/* What this process has in memory, and how much of its own is in huge pages; zeros where the system does not
 * tell. Walks all of its pages: for a line in the log. */
typedef struct cm_mem_resident {
    uint64_t own_bytes, huge_bytes, file_bytes;
} cm_mem_resident;
cm_mem_resident cm_mem_resident_now(void);

/* Per thread, nestable; what is shown when the guard trips. */
void cm_mem_guard_begin(const char *what);
void cm_mem_guard_end(void);
/* For what may allocate although it happens inside (a change of membership): pause returns what resume wants
 * back. */
int cm_mem_guard_pause(void);
void cm_mem_guard_resume(int depth);

/* ---- arena: bump allocation, freed all at once ----
 * Thread: one at a time. */
typedef struct cm_arena_chunk cm_arena_chunk;
typedef struct cm_arena {
    const char *name;      /* kept */
    size_t chunk_bytes;    /* size of each chunk but oversized ones */
    size_t max_bytes;      /* sum of chunks never exceeds it */
    size_t total_bytes;    /* in chunks now */
    size_t used_bytes;     /* handed out since the last reset */
    size_t peak_bytes;     /* most ever handed out between resets */
    cm_arena_chunk *first; /* kept over resets */
    cm_arena_chunk *at;    /* being filled */
} cm_arena;

/* The first chunk is taken at once, so an arena whose chunk_bytes == max_bytes never allocates again. */
void cm_arena_init(cm_arena *arena, const char *name, size_t chunk_bytes, size_t max_bytes);
void cm_arena_fini(cm_arena *arena);
/* Zeroed, 64-byte aligned; NULL when max_bytes would be passed. */
void *cm_arena_alloc(cm_arena *arena, size_t n_bytes);
/* As above for fixed sizes planned at start: running out is our bug. */
void *cm_arena_take(cm_arena *arena, size_t n_bytes);
char *cm_arena_strdup(cm_arena *arena, const char *text); /* NULL when full */
/* Forgets everything; keeps the first chunk, frees the others. */
void cm_arena_reset(cm_arena *arena);

/* ---- pool: a fixed number of objects of one type ----
 * Thread: one at a time (the owner's). Objects come zeroed. */
typedef struct cm_pool {
    const char *name; /* kept; shown in the leak list */
    size_t object_bytes;
    uint32_t n_max, n_used, n_peak;
    uint8_t *objects;
    uint32_t *free_stack;
    uint8_t *in_use;
} cm_pool;

void cm_pool_init(cm_pool *pool, const char *name, size_t object_bytes, uint32_t n_max);
/* Logs every object not returned (name, index, first bytes) and returns how many there were. */
uint32_t cm_pool_fini(cm_pool *pool);
CM_MUST_CHECK cm_status cm_pool_get(cm_pool *pool, void **object_out); /* CM_AGAIN when all are in use */
void cm_pool_put(cm_pool *pool, void *object); /* asserts on strangers and double puts */
uint32_t cm_pool_index(const cm_pool *pool, const void *object);
void *cm_pool_at(const cm_pool *pool, uint32_t index); /* NULL when not in use */
