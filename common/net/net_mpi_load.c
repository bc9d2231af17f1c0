#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/net/net_mpi.h"

/* Beside the program that runs. */
static bool module_path(char path_out[PATH_MAX])
{
    static const char file[] = "baleen-mpi.so";
    ssize_t n = readlink("/proc/self/exe", path_out, PATH_MAX - sizeof(file));
    char *slash = n > 0 ? memrchr(path_out, '/', (size_t)n) : NULL;
    if (slash == NULL) {
        return false;
    }
    memcpy(slash + 1, file, sizeof(file));
    return true;
}

const net_mpi_module *net_mpi_load(cm_error *err)
{
    static const net_mpi_module *loaded; /* start-up: one thread */
    char path[PATH_MAX];
    if (loaded != NULL) {
        return loaded;
    }
    if (!module_path(path)) {
        (void)cm_error_set(err, CM_E_DEVICE, "net", "this program's own folder cannot be found");
        return NULL;
    }
    /* global: Open MPI loads components of its own that look for its symbols; never closed: it ends at exit
     */
    void *handle = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    const net_mpi_module *module = handle != NULL ? dlsym(handle, "baleen_mpi_module") : NULL;
    if (module == NULL) {
        (void)cm_error_set(err, CM_E_DEVICE, "net",
                           "no MPI here: %s (built only where Open MPI's headers are; libopenmpi-dev)",
                           dlerror());
        return NULL;
    }
    CM_ASSERT_MSG(module->version == NET_PROTOCOL, "%s is of another build", path);
    loaded = module;
    return loaded;
}
