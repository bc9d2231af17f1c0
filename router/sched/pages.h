/* A fixed set of numbered things, handed out one by one: KV pages and state slots. A free stack, so that what
 * was used last is used next; every number is held by one owner or none. Memory: taken at init. Thread: the
 * owner's. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

typedef struct rt_pages {
    const char *name; /* kept; shown when an assertion fails */
    uint32_t n_max, n_free;
    uint32_t *free_stack; /* [n_max]; the first n_free are free */
    uint8_t *in_use;      /* [n_max] */
} rt_pages;

void rt_pages_init(rt_pages *pages, const char *name, uint32_t n_max);
/* All must have come back. */
void rt_pages_fini(rt_pages *pages);
/* false: none is left. */
bool rt_pages_take(rt_pages *pages, uint32_t *page_out);
/* Asserts on strangers and double puts. */
void rt_pages_put(rt_pages *pages, uint32_t page);
