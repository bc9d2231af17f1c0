#include <string.h>

#include "common/net/net_private.h"

static const net_ops *const g_tables[] = {&net_ucx_ops, &net_local_ops};

const net_ops *net_ops_find(const char *name)
{
    for (size_t i = 0; i < sizeof(g_tables) / sizeof(g_tables[0]); i++) {
        if (strcmp(g_tables[i]->name, name) == 0) {
            return g_tables[i];
        }
    }
    return NULL;
}
