#include "common/model/safetensors.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/failpoint.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/model/input_private.h"
#include "common/model/names_private.h"
#include "common/model/safetensors_private.h"

/* The format's own bound; a length beyond it is not a header. */
enum { HEADER_BYTES_MAX = 100 * 1000 * 1000 };
enum { DIRECT_UNKNOWN = -2, DIRECT_SECTOR = 4096 };

struct md_safetensors {
    char *path;
    int fd;
    bool tells_cache;
    _Atomic int direct_fd;     /* DIRECT_UNKNOWN before anybody asked, -1: the file system refused */
    _Atomic bool direct_fails; /* opened so, and still it does not work */
    uint8_t *map;              /* the whole file; NULL before it is mapped */
    uint64_t map_bytes;
    size_t header_bytes; /* of JSON, after the 8-byte length */
    md_header header;
    md_names names; /* name -> md_tensor */
};

static cm_status file_map(md_safetensors *file, cm_error *err)
{
    const char *field = md_file_name(file->path);
    struct stat info;
    file->fd = open(file->path, O_RDONLY | O_CLOEXEC);
    if (file->fd < 0) {
        return cm_error_set(err, CM_E_IO, field, "cannot open %s: %s", file->path, strerror(errno));
    }
    if (fstat(file->fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        return cm_error_set(err, CM_E_IO, field, "%s is not a regular file", file->path);
    }
    if (info.st_size < 8) {
        return cm_error_set(err, CM_E_CORRUPT, field,
                            "%s has %lld bytes, too short for a header: it is truncated", file->path,
                            (long long)info.st_size);
    }
    void *map = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, file->fd, 0);
    if (map == MAP_FAILED) {
        return cm_error_set(err, CM_E_IO, field, "cannot map %s: %s", file->path, strerror(errno));
    }
    file->tells_cache =
        info.st_uid == geteuid() || geteuid() == 0 || faccessat(AT_FDCWD, file->path, W_OK, AT_EACCESS) == 0;
    file->map = map;
    file->map_bytes = (uint64_t)info.st_size;
    return CM_OK;
}

static cm_status file_read_header(md_safetensors *file, cm_error *err)
{
    const char *field = md_file_name(file->path);
    uint64_t n = 0;
    for (int i = 0; i < 8; i++) {
        n |= (uint64_t)file->map[i] << (8 * i);
    }
    if (n > HEADER_BYTES_MAX || n > file->map_bytes - 8) {
        return cm_error_set(err, CM_E_CORRUPT, field,
                            "%s: the header claims %" PRIu64 " bytes, the file has %" PRIu64
                            ": it is truncated or no safetensors file",
                            file->path, n, file->map_bytes);
    }
    file->header_bytes = (size_t)n;
    CM_TRY(md_safetensors_parse_header((const char *)file->map + 8, file->header_bytes, file->map_bytes,
                                       field, &file->header, err));
    md_names_init(&file->names, file->header.n);
    const uint8_t *data = file->map + 8 + n;
    for (uint32_t i = 0; i < file->header.n; i++) {
        md_tensor *tensor = &file->header.rows[i].tensor;
        tensor->data = data + file->header.rows[i].begin;
        tensor->file = file;
        bool is_new = md_names_put(&file->names, md_name_hash(tensor->name), tensor->name, tensor);
        CM_ASSERT(is_new); /* the JSON reader refuses duplicate keys */
    }
    return CM_OK;
}

cm_status md_safetensors_open(const char *path, md_safetensors **file_out, cm_error *err)
{
    md_safetensors *file = cm_alloc(sizeof *file);
    file->direct_fd = DIRECT_UNKNOWN;
    file->path = cm_strdup(path);
    cm_status status = file_map(file, err);
    if (status != CM_OK) {
        goto err_close;
    }
    status = file_read_header(file, err);
    if (status != CM_OK) {
        goto err_close;
    }
    *file_out = file;
    return CM_OK;

err_close:
    md_safetensors_close(file);
    return status;
}

void md_safetensors_close(md_safetensors *file)
{
    if (file == NULL) {
        return;
    }
    if (file->map != NULL) {
        munmap(file->map, (size_t)file->map_bytes);
    }
    if (file->fd >= 0) {
        close(file->fd);
    }
    if (file->direct_fd >= 0) {
        close(file->direct_fd);
    }
    md_names_fini(&file->names);
    md_header_fini(&file->header);
    cm_free(file->path);
    cm_free(file);
}

uint32_t md_safetensors_count(const md_safetensors *file)
{
    return file->header.n;
}

const md_tensor *md_safetensors_at(const md_safetensors *file, uint32_t i)
{
    CM_ASSERT(i < file->header.n);
    return &file->header.rows[i].tensor;
}

const md_tensor *md_safetensors_find(const md_safetensors *file, const char *name)
{
    return md_names_get(&file->names, md_name_hash(name), name);
}

const char *md_safetensors_path(const md_safetensors *file)
{
    return file->path;
}

const char *md_safetensors_header(const md_safetensors *file, size_t *n_bytes_out)
{
    *n_bytes_out = file->header_bytes;
    return (const char *)file->map + 8;
}

uint64_t md_safetensors_data_bytes(const md_safetensors *file)
{
    return file->map_bytes - 8 - file->header_bytes;
}

cm_status md_safetensors_read(const md_safetensors *file, uint64_t at, void *out, size_t n_bytes,
                              cm_error *err)
{
    uint64_t n_data = md_safetensors_data_bytes(file);
    CM_ASSERT(n_bytes <= n_data && at <= n_data - n_bytes);
    size_t n_read = 0;
    while (n_read < n_bytes) {
        ssize_t n = pread(file->fd, (uint8_t *)out + n_read, n_bytes - n_read,
                          (off_t)(8 + file->header_bytes + at + n_read));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return cm_error_set(err, CM_E_IO, md_file_name(file->path), "cannot read %s: %s", file->path,
                                n == 0 ? "it became shorter" : strerror(errno));
        }
        n_read += (size_t)n;
    }
    return CM_OK;
}

/* ---- past the page cache ---- */

uint64_t md_tensor_offset(const md_tensor *tensor)
{
    return (uint64_t)((const uint8_t *)tensor->data - tensor->file->map);
}

bool md_safetensors_tells_cache(const md_safetensors *file)
{
    return file->tells_cache;
}

bool md_safetensors_direct(md_safetensors *file)
{
    int fd = atomic_load(&file->direct_fd);
    if (fd == DIRECT_UNKNOWN) {
        int mine = open(file->path, O_RDONLY | O_CLOEXEC | O_DIRECT);
        if (!atomic_compare_exchange_strong(&file->direct_fd, &fd, mine)) {
            if (mine >= 0) {
                close(mine); /* another thread was first */
            }
        } else {
            fd = mine;
            if (mine < 0) {
                cm_debug("%s is read through the page cache: O_DIRECT: %s", file->path, strerror(errno));
            }
        }
    }
    return fd >= 0 && !atomic_load(&file->direct_fails);
}

cm_status md_safetensors_read_direct(md_safetensors *file, uint64_t begin, void *out, uint64_t n_bytes,
                                     cm_error *err)
{
    uint64_t n_read = 0, n_there = begin < file->map_bytes ? file->map_bytes - begin : 0;
    n_there = n_there < n_bytes ? n_there : n_bytes;
    CM_ASSERT(begin % DIRECT_SECTOR == 0 && n_bytes % DIRECT_SECTOR == 0);
    while (n_read < n_there) {
        ssize_t n = pread(atomic_load(&file->direct_fd), (uint8_t *)out + n_read, n_bytes - n_read,
                          (off_t)(begin + n_read));
        if (cm_failpoint_fires(CM_FAILPOINT_load_direct_refused)) {
            errno = EINVAL;
            n = -1;
        }
        if (n < 0 && errno == EINTR) {
            continue;
        }
        bool ends = n >= 0 && n_read + (uint64_t)n >= n_there;
        if ((n < 0 && (errno == EINVAL || errno == EOPNOTSUPP)) || (n > 0 && !ends && n < DIRECT_SECTOR)) {
            if (!atomic_exchange(&file->direct_fails, true)) {
                cm_debug("%s is read through the page cache: O_DIRECT does not work on it", file->path);
            }
            return CM_E_UNSUPPORTED;
        }
        if (n <= 0) {
            return cm_error_set(err, CM_E_IO, md_file_name(file->path), "cannot read %s: %s", file->path,
                                n == 0 ? "it became shorter" : strerror(errno));
        }
        n_read += ends ? (uint64_t)n : (uint64_t)n / DIRECT_SECTOR * DIRECT_SECTOR;
    }
    return CM_OK;
}
