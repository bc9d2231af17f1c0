#include "common/model/input_private.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/base/mem.h"

const char *md_file_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash != NULL ? slash + 1 : path;
}

char *md_path_join(const char *dir, const char *name)
{
    size_t n_bytes = strlen(dir) + strlen(name) + 2;
    char *path = cm_alloc(n_bytes);
    snprintf(path, n_bytes, "%s/%s", dir, name);
    return path;
}

static cm_status file_fill(int fd, const char *path, size_t n_bytes, cm_bytes *bytes, cm_error *err)
{
    char piece[16384];
    while (bytes->len < n_bytes) {
        ssize_t n = read(fd, piece, sizeof piece);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return cm_error_set(err, CM_E_IO, md_file_name(path), "cannot read %s: %s", path,
                                strerror(errno));
        }
        if (n == 0) {
            return cm_error_set(err, CM_E_IO, md_file_name(path), "%s became shorter while it was read",
                                path);
        }
        cm_bytes_append(bytes, piece, (size_t)n);
    }
    return CM_OK;
}

static cm_status file_read(const char *path, size_t max_bytes, cm_bytes *bytes, cm_error *err)
{
    const char *field = md_file_name(path);
    struct stat info;
    cm_status status;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return cm_error_set(err, CM_E_IO, field, "cannot open %s: %s", path, strerror(errno));
    }
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
        status = cm_error_set(err, CM_E_IO, field, "%s is not a regular file", path);
    } else if ((uint64_t)info.st_size > max_bytes) {
        status = cm_error_set(err, CM_E_CORRUPT, field, "%s has %lld bytes, at most %zu make sense", path,
                              (long long)info.st_size, max_bytes);
    } else {
        status = file_fill(fd, path, (size_t)info.st_size, bytes, err);
    }
    close(fd);
    return status;
}

cm_status md_file_read(const char *dir, const char *name, size_t max_bytes, cm_bytes *bytes_out,
                       cm_error *err)
{
    cm_bytes bytes;
    cm_bytes_init(&bytes, 0);
    char *path = md_path_join(dir, name);
    cm_status status = file_read(path, max_bytes, &bytes, err);
    cm_free(path);
    if (status != CM_OK) {
        cm_bytes_fini(&bytes);
        return status;
    }
    *bytes_out = bytes;
    return CM_OK;
}

cm_status md_json_object(const char *text, size_t n_bytes, const char *field, json_t **object_out,
                         cm_error *err)
{
    json_error_t cause;
    json_t *value = json_loadb(text, n_bytes, JSON_REJECT_DUPLICATES, &cause);
    if (value == NULL) {
        /* jansson leaves the text empty when an allocation inside a container fails; one that fails inside
         * its lexer it calls bad JSON, which nobody can tell apart */
        if (json_error_code(&cause) == json_error_out_of_memory || cause.text[0] == '\0') {
            return cm_error_set(err, CM_E_MEMORY, field, "out of memory while reading the JSON of %s", field);
        }
        return cm_error_set(err, CM_E_CORRUPT, field, "%s is not valid JSON: line %d: %s", field, cause.line,
                            cause.text);
    }
    if (!json_is_object(value)) {
        cm_status status = cm_error_set(err, CM_E_CORRUPT, field, "%s must hold a JSON object, not %s", field,
                                        md_json_kind(value));
        json_decref(value);
        return status;
    }
    *object_out = value;
    return CM_OK;
}

const char *md_json_kind(const json_t *value)
{
    if (value == NULL) {
        return "nothing";
    }
    switch (json_typeof(value)) {
    case JSON_OBJECT:
        return "an object";
    case JSON_ARRAY:
        return "a list";
    case JSON_STRING:
        return "a string";
    case JSON_INTEGER:
        return "a whole number";
    case JSON_REAL:
        return "a number with a fraction";
    case JSON_TRUE:
        return "true";
    case JSON_FALSE:
        return "false";
    case JSON_NULL:
        break;
    }
    return "null";
}
