#include "router/engine/micro_core.h"
#include "router/router.h"
#include "router/sched/sched_core.h"

static const cm_cfg_field g_fields[] = {
    {"coordinator", "",
     "host:port of the coordinator; of all, with commas, where several stand by for one another; mpi: of the "
     "coordinator in the same mpirun line",
     CM_CFG_STRING(rt_config, coordinator)},
    {"address", "127.0.0.1:0", "host:port to listen on for gateways; port 0 = any",
     CM_CFG_STRING(rt_config, address)},
    {"model", "", "folder of the checkpoint", CM_CFG_STRING(rt_config, model)},
    {"scripted_model", "",
     "tests only: a name; instead of the model, answer with the text of the last user or tool message, "
     "control spellings recognised; of the checkpoint only config.json and tokenizer.json are read, no "
     "worker is needed, gateways need the same option",
     CM_CFG_STRING(rt_config, scripted_model)},
    {"device", "cpu", "where the dense path is computed", CM_CFG_CHOICE(rt_config, device, "cpu|ref")},
    {"cpu_isa", "auto", "force a CPU path: portable, avx2, avx512", CM_CFG_STRING(rt_config, cpu_isa)},
    {"threads", "1", "compute threads", CM_CFG_UINT(rt_config, threads, 1, 1024)},
    {"numa_node", "any",
     "number of the NUMA node whose cores and memory to keep to, as one router does for each node; any: all "
     "that "
     "the process may use",
     CM_CFG_STRING(rt_config, numa_node)},
    {"net", "ucx", "data plane", CM_CFG_CHOICE(rt_config, net, "ucx|shm|mpi|local")},
    {"rows_max", "1024", "token rows of one step, at most; sets what buffers take",
     CM_CFG_UINT(rt_config, rows_max, 1, 65536)},
    {"chunk_max", "1024",
     "prompt rows of one sequence in one step, at most; half of all prompt rows while other prompts wait",
     CM_CFG_UINT(rt_config, chunk_max, 1, 65536)},
    {"step_ms", "500",
     "about how long a step may take that computes prompts, while which running sequences wait for their "
     "next "
     "token; the number of rows follows from it, from 32 on; 0 = as many rows as there may be",
     CM_CFG_MS(rt_config, step_ms, 0, 600000)},
    {"sequences_max", "64", "sequences generating at once", CM_CFG_UINT(rt_config, sequences_max, 1, 65536)},
    {"queue_max", "256", "sequences waiting; more are refused",
     CM_CFG_UINT(rt_config, queue_max, 1, 1u << 20)},
    {"drafts_max", "2",
     "tokens guessed ahead by the checkpoint's MTP block, checked in one step; fewer or none while that does "
     "not pay; 0 = never",
     CM_CFG_UINT(rt_config, drafts_max, 0, RT_DRAFT_MAX)},
    {"micro_batches", "0",
     "parts of a step, 1 or 2: while the rows of one are with the workers, the other is computed; 0 = what "
     "turns out to be faster",
     CM_CFG_UINT(rt_config, micro_batches, 0, RT_MICRO_MAX)},
    {"kv_bytes", "1g", "memory for KV pages, those of running sequences and those kept to be used again",
     CM_CFG_BYTES(rt_config, kv_bytes, 1, UINT64_MAX)},
    {"prefix_bytes", "128m",
     "memory for what sequences leave at a page's end besides pages (5.8 MB of the largest model, each "
     "time), so "
     "that prompts which begin alike are not computed again; 0 = every prompt from its beginning",
     CM_CFG_BYTES(rt_config, prefix_bytes, 0, UINT64_MAX)},
    {"answer_ms", "10000",
     "a worker that has not answered a frame by then is dropped and asked again elsewhere",
     CM_CFG_MS(rt_config, answer_ms, 100, 600000)},
    {"wait_ms", "30000",
     "how long a step waits for experts that have no live owner before its sequences fail",
     CM_CFG_MS(rt_config, wait_ms, 100, 3600000)},
    {"silence_ms", "5000", "a worker or gateway unheard for so long is gone",
     CM_CFG_MS(rt_config, silence_ms, 100, 600000)},
    {"frame_bytes", "4m", "largest frame; the same on workers",
     CM_CFG_BYTES(rt_config, frame_bytes, 65536, 1u << 30)},
    {"gateways_max", "64", "gateways linked at once", CM_CFG_UINT(rt_config, gateways_max, 1, 4096)},
    {"gateway_grace_ms", "30s",
     "how long sequences go on without their gateway, and ended ones are kept, for clients that resume them",
     CM_CFG_MS(rt_config, gateway_grace_ms, 0, 3600000)},
    {"kept_max", "4096", "ended sequences kept so; the oldest go first",
     CM_CFG_UINT(rt_config, kept_max, 0, 1u << 20)},
    {"kept_bytes", "256m", "memory for what is kept so", CM_CFG_BYTES(rt_config, kept_bytes, 0, UINT64_MAX)},
    {"drain_ms", "30000", "how long running sequences may take to finish when asked to stop",
     CM_CFG_MS(rt_config, drain_ms, 0, 3600000)},
    PC_PROCESS_FIELDS(rt_config, process),
};

const cm_cfg_table rt_config_table = {
    .program = "baleen-router",
    .summary = "runs sequences: scheduler, KV cache, dense path, and dispatch of rows to expert workers",
    .operands = "",
    .fields = g_fields,
    .n_fields = sizeof(g_fields) / sizeof(g_fields[0]),
};
