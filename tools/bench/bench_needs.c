#include "tools/bench/bench_needs.h"

#include <errno.h>
#include <string.h>
#include <sys/statvfs.h>

#include "common/base/mem.h"
#include "tools/baleen/beside.h"

enum { SMALL_MB = 600 /* random weights for bench-s */ };

static cm_status find_once(const char *name, char **dir, cm_error *err)
{
    return *dir != NULL ? CM_OK : beside_model(name, dir, err);
}

static cm_status check_room(const char *room, uint32_t disk_mb, cm_error *err)
{
    struct statvfs info;
    if (statvfs(room, &info) != 0) {
        return cm_error_set(err, CM_E_IO, NULL, "%s: %s", room, strerror(errno));
    }
    uint64_t free_mb = (uint64_t)info.f_bavail * info.f_frsize >> 20;
    return free_mb >= disk_mb
               ? CM_OK
               : cm_error_set(err, CM_E_CAPACITY, NULL,
                              "%u MB have to go to %s, where %llu are free; TMPDIR may name another folder",
                              disk_mb, room, (unsigned long long)free_mb);
}

cm_status bench_needs_check(uint32_t needs, uint32_t disk_mb, const bench_config *config, const char *room,
                            bench_models *models, cm_error *err)
{
    if (needs & BENCH_SERVERS) {
        CM_TRY(beside_servers(err));
    }
    if (config->model[0] == '\0' && (needs & BENCH_NANO)) {
        CM_TRY(find_once("nano", &models->nano, err));
    }
    if (config->model[0] == '\0' && (needs & BENCH_SMALL)) {
        CM_TRY(find_once("bench-s", &models->shape, err));
        disk_mb += SMALL_MB;
    }
    return check_room(room, disk_mb, err);
}

void bench_models_free(bench_models *models)
{
    cm_free(models->nano);
    cm_free(models->shape);
}
