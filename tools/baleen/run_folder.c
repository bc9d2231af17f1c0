#include "tools/baleen/run_folder.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/base/bytes.h"
#include "common/base/config.h"
#include "common/base/mem.h"
#include "tools/baleen/replace.h"

static void folder_file(const char *dir, const char *name, cm_bytes *path_out)
{
    cm_bytes_init(path_out, 0);
    cm_bytes_printf(path_out, "%s/%s", dir, name);
}

static void folder_unpublish(const char *dir)
{
    cm_bytes path;
    folder_file(dir, "cluster.json", &path);
    unlink(cm_bytes_text(&path));
    cm_bytes_fini(&path);
}

/* The parsed cluster.json; NULL when there is none that can be read. */
static json_t *folder_read(const char *dir)
{
    cm_bytes path;
    folder_file(dir, "cluster.json", &path);
    json_t *cluster = json_load_file(cm_bytes_text(&path), 0, NULL);
    cm_bytes_fini(&path);
    return cluster;
}

static cm_status folder_make(const char *dir, char **path_out, cm_error *err)
{
    if (dir[0] != '\0') {
        if (mkdir(dir, 0777) != 0 && errno != EEXIST) {
            return cm_error_set(err, CM_E_IO, "run", "run folder %s: %s", dir, strerror(errno));
        }
        *path_out = cm_strdup(dir);
        return CM_OK;
    }
    const char *temp = cm_env_get("TMPDIR");
    cm_bytes path;
    folder_file(temp != NULL && temp[0] != '\0' ? temp : "/tmp", "baleen-XXXXXX", &path);
    char *made = mkdtemp((char *)path.data);
    cm_status status = CM_OK;
    if (made == NULL) {
        status =
            cm_error_set(err, CM_E_IO, "run", "run folder %s: %s", cm_bytes_text(&path), strerror(errno));
    } else {
        *path_out = cm_strdup(made);
    }
    cm_bytes_fini(&path);
    return status;
}

static cm_status folder_occupied(const char *dir, cm_error *err)
{
    json_t *cluster = folder_read(dir);
    long long pid = (long long)json_integer_value(json_object_get(cluster, "pid"));
    json_decref(cluster);
    if (pid > 0) {
        return cm_error_set(
            err, CM_E_EXISTS, "run",
            "in %s a cluster is running (baleen up, process %lld): stop it or give another --run", dir, pid);
    }
    return cm_error_set(err, CM_E_EXISTS, "run",
                        "in %s a cluster is starting or ending: wait for it or give another --run", dir);
}

cm_status run_folder_open(const char *dir, run_folder *folder_out, cm_error *err)
{
    run_folder folder;
    CM_TRY(folder_make(dir, &folder.path, err));
    cm_status status = CM_OK;
    folder.lock = open(folder.path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder.lock < 0) {
        status = cm_error_set(err, CM_E_IO, "run", "run folder %s: %s", folder.path, strerror(errno));
        goto err_path;
    }
    if (flock(folder.lock, LOCK_EX | LOCK_NB) != 0) {
        status = errno == EWOULDBLOCK
                     ? folder_occupied(folder.path, err)
                     : cm_error_set(err, CM_E_IO, "run", "lock of %s: %s", folder.path, strerror(errno));
        goto err_close;
    }
    folder_unpublish(folder.path); /* of one that was killed */
    *folder_out = folder;
    return CM_OK;

err_close:
    close(folder.lock);
err_path:
    cm_free(folder.path);
    return status;
}

void run_folder_close(run_folder *folder)
{
    folder_unpublish(folder->path);
    close(folder->lock);
    cm_free(folder->path);
}

cm_status run_folder_publish(const run_folder *folder, const char *json, cm_error *err)
{
    return replace_file(folder->path, "cluster.json", json, strlen(json), err);
}

cm_status run_folder_empty(const run_folder *folder, const char *name, char **path_out, cm_error *err)
{
    cm_bytes path;
    folder_file(folder->path, name, &path);
    DIR *dir = NULL;
    if (mkdir(cm_bytes_text(&path), 0777) == 0 || errno == EEXIST) {
        dir = opendir(cm_bytes_text(&path));
    }
    cm_status status = CM_OK;
    if (dir == NULL) {
        status = cm_error_set(err, CM_E_IO, "run", "%s: %s", cm_bytes_text(&path), strerror(errno));
    } else {
        for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
            unlinkat(dirfd(dir), entry->d_name, 0); /* "." and ".." are no files and stay */
        }
        closedir(dir);
        *path_out = cm_strdup(cm_bytes_text(&path));
    }
    cm_bytes_fini(&path);
    return status;
}

static cm_status address_take(const json_t *cluster, const char *dir, const char *key, char out[128],
                              cm_error *err)
{
    const char *address = json_string_value(json_object_get(cluster, key));
    if (address == NULL || strlen(address) >= 128) {
        return cm_error_set(err, CM_E_CORRUPT, key, "%s/cluster.json has no \"%s\"", dir, key);
    }
    snprintf(out, 128, "%s", address);
    return CM_OK;
}

cm_status run_folder_addresses(const char *dir, run_addresses *addresses_out, cm_error *err)
{
    run_addresses addresses;
    json_t *cluster = folder_read(dir);
    if (cluster == NULL) {
        return cm_error_set(err, CM_E_NOT_FOUND, "run",
                            "no cluster is running in %s (it has no cluster.json)", dir);
    }
    long long pid = (long long)json_integer_value(json_object_get(cluster, "pid"));
    cm_status status = CM_OK;
    if (pid > 0 && kill((pid_t)pid, 0) != 0 && errno == ESRCH) {
        status =
            cm_error_set(err, CM_E_NOT_FOUND, "run",
                         "no cluster is running in %s any more (baleen up, process %lld, is gone)", dir, pid);
    }
    if (status == CM_OK) {
        status = address_take(cluster, dir, "http", addresses.http, err);
    }
    if (status == CM_OK) {
        status = address_take(cluster, dir, "grpc", addresses.grpc, err);
    }
    if (status == CM_OK) {
        status = address_take(cluster, dir, "coordinator", addresses.coordinator, err);
    }
    const char *tls = json_string_value(json_object_get(cluster, "tls"));
    snprintf(addresses.tls, sizeof(addresses.tls), "%s", tls != NULL ? tls : "");
    json_decref(cluster);
    if (status == CM_OK) {
        *addresses_out = addresses;
    }
    return status;
}
