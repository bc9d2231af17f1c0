#include "coordinator/co_config.h"

#include "proto/placement.h"

static const cm_cfg_field co_config_fields[] = {
    {"address", "127.0.0.1:0",
     "host:port to listen on for members and for the admin service; port 0 = any free one",
     CM_CFG_STRING(co_config, address)},
    {"store", "",
     "folder of the epoch log, or etcd://HOST:PORT[,HOST:PORT]/PREFIX, where several coordinators may wait "
     "for "
     "one another; empty = in memory, a restart begins a new cluster",
     CM_CFG_STRING(co_config, store)},
    {"claim_ms", "3000",
     "etcd: how long the claim of the active coordinator outlives it; rounded up to seconds, etcd itself "
     "allows no less than 1.5 of its election timeouts",
     CM_CFG_MS(co_config, claim_ms, 1000, 60000)},
    {"workers_min", "1", "workers the first placement of the experts waits for",
     CM_CFG_UINT(co_config, workers_min, 1, PR_RANK_MAX)},
    {"members_max", "64", "members of all roles together",
     CM_CFG_UINT(co_config, members_max, 1, PR_RANK_MAX)},
    {"heartbeat_ms", "1000", "how often members say that they live",
     CM_CFG_MS(co_config, heartbeat_ms, 10, 60000)},
    {"lease_ms", "3000", "how long a process stays a member without a heartbeat; at least three heartbeats",
     CM_CFG_MS(co_config, lease_ms, 100, 600000)},
    {"grace_ms", "300", "how long a member whose session was lost may take to come back",
     CM_CFG_MS(co_config, grace_ms, 0, 60000)},
    {"cut_ms", "10s",
     "how long a router and a worker that both live may be unable to reach one another before one of them is "
     "left out; 0 = for ever",
     CM_CFG_MS(co_config, cut_ms, 0, 3600000)},
    {"rebalance_ms", "0", "how often experts are moved by their load; 0 = only when asked (baleen rebalance)",
     CM_CFG_MS(co_config, rebalance_ms, 0, 86400000)},
    {"rebalance_moves", "16", "experts that workers load for one round of it",
     CM_CFG_UINT(co_config, rebalance_moves, 1, 1u << 20)},
    {"fingerprint", "", "of the checkpoint all members must have; empty = the first worker's or router's",
     CM_CFG_STRING(co_config, fingerprint)},
    {"mpi", "off",
     "started by mpirun: tell the other processes of its line, whose --coordinator is mpi, where we are",
     CM_CFG_BOOL(co_config, mpi)},
    PC_PROCESS_FIELDS(co_config, process),
};

const cm_cfg_table co_config_table = {
    .program = "baleen-coordinator",
    .summary = "keeps the list of a cluster's members and decides which worker holds which experts",
    .operands = "",
    .fields = co_config_fields,
    .n_fields = sizeof(co_config_fields) / sizeof(co_config_fields[0]),
};
