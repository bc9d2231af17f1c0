/* Names to pointers by 64-bit hash: two names with one hash are told apart by their text. Names and values
 * are kept, not owned. Thread: any for lookups, one at a time while filling. */
#pragma once
#include <stdbool.h>

#include "common/base/map.h"

typedef struct md_name_node {
    const char *name;
    void *value;
    struct md_name_node *next; /* same hash, another name */
} md_name_node;

typedef struct md_names {
    cm_map map; /* hash -> first md_name_node */
    md_name_node *nodes;
    uint32_t n_max, n;
} md_names;

uint64_t md_name_hash(const char *name);
void md_names_init(md_names *names, uint32_t n_max);
void md_names_fini(md_names *names); /* also after no init, on a zeroed struct */
/* hash is md_name_hash(name); value is not NULL. false when the name is there already. More than n_max: our
 * bug. */
bool md_names_put(md_names *names, uint64_t hash, const char *name, void *value);
void *md_names_get(const md_names *names, uint64_t hash, const char *name); /* NULL when absent */
