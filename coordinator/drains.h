/* The members that an operator wants to leave and that have not left yet: in the log, so that a coordinator
 * that was started again goes on with it. A value. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

enum { CO_DRAINS_MAX = 64 };

typedef struct co_drains {
    uint32_t n;
    uint32_t id[CO_DRAINS_MAX];
} co_drains;

static inline bool co_drains_has(const co_drains *drains, uint32_t id)
{
    uint32_t i = 0;
    while (i < drains->n && drains->id[i] != id) {
        i++;
    }
    return i < drains->n;
}

static inline void co_drains_remove(co_drains *drains, uint32_t id)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < drains->n; i++) {
        if (drains->id[i] != id) {
            drains->id[n++] = drains->id[i];
        }
    }
    drains->n = n;
}
