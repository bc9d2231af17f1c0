#include "tools/baleen/beside.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"

cm_status beside_programs(char **dir_out, cm_error *err)
{
    char path[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 1);
    if (n <= 0) {
        return cm_error_set(err, CM_E_IO, NULL, "/proc/self/exe: %s", strerror(errno));
    }
    path[n] = '\0';
    *strrchr(path, '/') = '\0';
    *dir_out = cm_strdup(path);
    return CM_OK;
}

/* Whether dir/below/name is there; its real path without what follows the last slash goes to folder_out. */
static bool is_there(const char *dir, const char *below, const char *name, char folder_out[PATH_MAX])
{
    cm_bytes path;
    cm_bytes_init(&path, 0);
    cm_bytes_printf(&path, "%s%s%s", dir, below, name);
    bool there = realpath(cm_bytes_text(&path), folder_out) != NULL;
    cm_bytes_fini(&path);
    if (there) {
        *strrchr(folder_out, '/') = '\0';
    }
    return there;
}

cm_status beside_model(const char *name, char **dir_out, cm_error *err)
{
    char *bin, folder[PATH_MAX];
    cm_bytes config;
    CM_TRY(beside_programs(&bin, err));
    cm_bytes_init(&config, 0);
    cm_bytes_printf(&config, "%s/config.json", name);
    cm_status status = CM_OK;
    if (is_there(bin, "/../share/baleen/models/", cm_bytes_text(&config), folder)) {
        *dir_out = cm_strdup(folder);
    } else {
        status = cm_error_set(err, CM_E_NOT_FOUND, "model",
                              "no model %s in %s/../share/baleen/models; give a folder with --model DIR",
                              name, bin);
    }
    cm_bytes_fini(&config);
    cm_free(bin);
    return status;
}

cm_status beside_servers(cm_error *err)
{
    static const char *const names[] = {"coordinator", "router", "worker", "gateway"};
    char *bin, folder[PATH_MAX];
    CM_TRY(beside_programs(&bin, err));
    cm_status status = CM_OK;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]) && status == CM_OK; i++) {
        if (!is_there(bin, "/baleen-", names[i], folder)) {
            status = cm_error_set(err, CM_E_NOT_FOUND, NULL, "no program baleen-%s in %s", names[i], bin);
        }
    }
    cm_free(bin);
    return status;
}
