#include "worker/worker.h"

static const cm_cfg_field g_fields[] = {
    {"coordinator", "",
     "host:port of the coordinator; of all, with commas, where several stand by for one another; mpi: of the "
     "coordinator in the same mpirun line",
     CM_CFG_STRING(wk_config, coordinator)},
    {"address", "127.0.0.1:0", "host:port to listen on for rows; routers must reach it; port 0 = any",
     CM_CFG_STRING(wk_config, address)},
    {"model", "", "folder of the checkpoint", CM_CFG_STRING(wk_config, model)},
    {"device", "cpu", "where experts are computed", CM_CFG_CHOICE(wk_config, device, "cpu|ref")},
    {"cpu_isa", "auto", "force a CPU path: portable, avx2, avx512", CM_CFG_STRING(wk_config, cpu_isa)},
    {"threads", "1", "compute threads", CM_CFG_UINT(wk_config, threads, 1, 1024)},
    {"numa_node", "any",
     "number of the NUMA node whose cores and memory to keep to, as one worker does for each node; any: all "
     "that "
     "the process may use",
     CM_CFG_STRING(wk_config, numa_node)},
    {"net", "ucx", "data plane", CM_CFG_CHOICE(wk_config, net, "ucx|shm|mpi|local")},
    {"rows_max", "8192", "rows (one per chosen expert) computed together",
     CM_CFG_UINT(wk_config, rows_max, 16, 1u << 20)},
    {"routers_max", "64", "routers linked at once", CM_CFG_UINT(wk_config, routers_max, 1, 4096)},
    {"window_us", "200",
     "longest wait, in microseconds, for rows of the same layer from a router whose pace is not known; one "
     "whose is, is waited for while that saves time; 0: nobody is waited for",
     CM_CFG_UINT(wk_config, window_us, 0, 1000000)},
    {"answer_ms", "10000", "an answer that cannot leave for so long costs the link",
     CM_CFG_MS(wk_config, answer_ms, 100, 600000)},
    {"silence_ms", "5000", "a router unheard for so long is gone",
     CM_CFG_MS(wk_config, silence_ms, 100, 600000)},
    {"frame_bytes", "4m", "largest frame; the same on routers",
     CM_CFG_BYTES(wk_config, frame_bytes, 65536, 1u << 30)},
    {"expert_bytes_max", "0",
     "memory for experts; while an epoch changes those of both are held, within it unless no other placement "
     "is possible; 0 = three quarters of the machine's",
     CM_CFG_BYTES(wk_config, expert_bytes_max, 0, UINT64_MAX)},
    {"warm_bytes_s", "256m",
     "bytes a second to read ahead of what the loss of another worker would give us, as far as "
     "expert_bytes_max "
     "goes; 0 = nothing",
     CM_CFG_BYTES(wk_config, warm_bytes_s, 0, UINT64_MAX)},
    {"drain_ms", "10m", "how long to serve on, when asked to stop, until the others have loaded our experts",
     CM_CFG_MS(wk_config, drain_ms, 0, 86400000)},
    PC_PROCESS_FIELDS(wk_config, process),
};

const cm_cfg_table wk_config_table = {
    .program = "baleen-worker",
    .summary = "holds a shard of the routed experts and computes rows that routers send",
    .operands = "",
    .fields = g_fields,
    .n_fields = sizeof(g_fields) / sizeof(g_fields[0]),
};
