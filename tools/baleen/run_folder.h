/* The folder of one `baleen up`: logs, and cluster.json while the cluster serves. A lock on the folder says
 * whether its cluster lives, so that a crash needs no cleaning up. Thread: main. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"

typedef struct run_folder {
    char *path; /* owned */
    int lock;   /* descriptor of the folder, held while the cluster lives */
} run_folder;

/* dir "" makes a fresh folder below $TMPDIR or /tmp; any other is made if it is not there. CM_E_EXISTS: a
 * cluster lives in it. */
CM_MUST_CHECK cm_status run_folder_open(const char *dir, run_folder *folder_out, cm_error *err);
/* Removes cluster.json; the logs stay. */
void run_folder_close(run_folder *folder);
/* Replaces cluster.json as a whole. */
CM_MUST_CHECK cm_status run_folder_publish(const run_folder *folder, const char *json, cm_error *err);

/* A folder of that name in it, made or emptied of its files. path_out is the caller's to free. */
CM_MUST_CHECK cm_status run_folder_empty(const run_folder *folder, const char *name, char **path_out,
                                         cm_error *err);

/* What clients want from cluster.json. */
typedef struct run_addresses {
    char http[128], grpc[128], coordinator[128];
    char tls[512]; /* folder of the cluster's certificates; "" = plain */
} run_addresses;
/* CM_E_NOT_FOUND: no cluster lives there. */
CM_MUST_CHECK cm_status run_folder_addresses(const char *dir, run_addresses *addresses_out, cm_error *err);
