#include "tools/baleen/replace.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/bytes.h"

static bool file_write(const char *path, const void *data, size_t n_bytes)
{
    FILE *file = fopen(path, "we");
    if (file == NULL) {
        return false;
    }
    bool ok = fwrite(data, 1, n_bytes, file) == n_bytes && fflush(file) == 0 && fsync(fileno(file)) == 0;
    return fclose(file) == 0 && ok;
}

/* The name in the folder is on disk only after this. */
static void folder_sync(const char *dir)
{
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        (void)fsync(fd); /* some file systems cannot; the file itself is whole */
        close(fd);
    }
}

cm_status replace_file(const char *dir, const char *name, const void *data, size_t n_bytes, cm_error *err)
{
    cm_bytes path, fresh;
    cm_status status = CM_OK;
    cm_bytes_init(&path, 0);
    cm_bytes_init(&fresh, 0);
    cm_bytes_printf(&path, "%s/%s", dir, name);
    cm_bytes_printf(&fresh, "%s/%s.new", dir, name);
    if (!file_write(cm_bytes_text(&fresh), data, n_bytes) ||
        rename(cm_bytes_text(&fresh), cm_bytes_text(&path)) != 0) {
        status =
            cm_error_set(err, CM_E_IO, name, "cannot write %s: %s", cm_bytes_text(&path), strerror(errno));
        unlink(cm_bytes_text(&fresh));
    } else {
        folder_sync(dir);
    }
    cm_bytes_fini(&fresh);
    cm_bytes_fini(&path);
    return status;
}
