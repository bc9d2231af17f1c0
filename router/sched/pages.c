#include "router/sched/pages.h"

#include "common/base/assert.h"
#include "common/base/mem.h"

void rt_pages_init(rt_pages *pages, const char *name, uint32_t n_max)
{
    *pages = (rt_pages){.name = name, .n_max = n_max, .n_free = n_max};
    pages->free_stack = cm_alloc(sizeof(uint32_t) * n_max);
    pages->in_use = cm_alloc(n_max);
    for (uint32_t i = 0; i < n_max; i++) {
        pages->free_stack[i] = n_max - 1 - i; /* 0 is handed out first */
    }
}

void rt_pages_fini(rt_pages *pages)
{
    CM_ASSERT_MSG(pages->n_free == pages->n_max, "%s: %u of %u did not come back", pages->name,
                  pages->n_max - pages->n_free, pages->n_max);
    cm_free(pages->free_stack);
    cm_free(pages->in_use);
    *pages = (rt_pages){0};
}

bool rt_pages_take(rt_pages *pages, uint32_t *page_out)
{
    if (pages->n_free == 0) {
        return false;
    }
    uint32_t page = pages->free_stack[--pages->n_free];
    CM_ASSERT_MSG(!pages->in_use[page], "%s: %u is free and in use", pages->name, page);
    pages->in_use[page] = 1;
    *page_out = page;
    return true;
}

void rt_pages_put(rt_pages *pages, uint32_t page)
{
    CM_ASSERT_MSG(page < pages->n_max, "%s: %u of %u given back", pages->name, page, pages->n_max);
    CM_ASSERT_MSG(pages->in_use[page], "%s: %u given back twice", pages->name, page);
    pages->in_use[page] = 0;
    pages->free_stack[pages->n_free++] = page;
}
