#include <string.h>

#include "common/net/net_mpi.h"
#include "common/net/net_private.h"

static const net_ops *const g_tables[] = {&net_ucx_ops, &net_shm_ops, &net_local_ops};

cm_status net_ops_find(const char *name, const net_ops **ops_out, cm_error *err)
{
    for (size_t i = 0; i < sizeof(g_tables) / sizeof(g_tables[0]); i++) {
        if (strcmp(g_tables[i]->name, name) == 0) {
            *ops_out = g_tables[i];
            return CM_OK;
        }
    }
    if (strcmp(name, "mpi") != 0) {
        return cm_error_set(err, CM_E_CONFIG, "backend", "no transport '%s'", name);
    }
    const net_mpi_module *module = net_mpi_load(err);
    if (module == NULL) {
        return CM_E_DEVICE;
    }
    *ops_out = module->ops;
    return CM_OK;
}
