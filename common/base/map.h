/* A hash map from 64-bit keys to pointers with a fixed number of entries: open addressing, nothing allocated
 * after init. Pointers are kept, not owned. Thread: one at a time. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"

typedef struct cm_map_entry {
    uint64_t key;
    void *value; /* NULL = free slot */
} cm_map_entry;

typedef struct cm_map {
    cm_map_entry *slots;
    uint32_t n_slots; /* power of two, at least twice n_max */
    uint32_t n_max, n_used;
} cm_map;

void cm_map_init(cm_map *map, uint32_t n_max);
void cm_map_fini(cm_map *map);
void *cm_map_get(const cm_map *map, uint64_t key); /* NULL when absent */
/* value is not NULL. CM_E_EXISTS, CM_AGAIN when full. */
CM_MUST_CHECK cm_status cm_map_put(cm_map *map, uint64_t key, void *value);
void *cm_map_remove(cm_map *map, uint64_t key); /* the value, NULL when absent */
/* Walks all entries in no useful order: start with *at = 0; false at the end. No put or remove meanwhile. */
bool cm_map_next(const cm_map *map, uint32_t *at, uint64_t *key_out, void **value_out);
