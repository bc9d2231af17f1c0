/* Options of a coordinator. Thread: start-up only. */
#pragma once
#include "common/base/config.h"
#include "common/proc/process.h"

typedef struct co_config {
    char *address, *store, *fingerprint;
    uint64_t workers_min, members_max;
    uint64_t heartbeat_ms, lease_ms, grace_ms, cut_ms, claim_ms, rebalance_ms, rebalance_moves;
    bool mpi;
    pc_process_config process;
} co_config;

extern const cm_cfg_table co_config_table;
