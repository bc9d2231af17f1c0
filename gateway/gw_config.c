#include "gateway/gw_config.h"

static const cm_cfg_field FIELDS[] = {
    {"http", "127.0.0.1:0", "address of the HTTP server; port 0 takes a free one", CM_CFG_STRING(gw_config, http)},
    {"grpc", "127.0.0.1:0", "address of the gRPC server; port 0 takes a free one", CM_CFG_STRING(gw_config, grpc)},
    {"coordinator", "", "address of the coordinator, host:port", CM_CFG_STRING(gw_config, coordinator)},
    {"model", "", "folder with the model's config.json and tokenizer.json", CM_CFG_STRING(gw_config, model)},
    {"model_name", "", "name clients ask for; empty = the name of the model's folder",
     CM_CFG_STRING(gw_config, model_name)},
    {"model_aliases", "", "other names clients may ask for, separated by commas",
     CM_CFG_STRING(gw_config, model_aliases)},
    {"net", "ucx", "transport to the routers", CM_CFG_CHOICE(gw_config, net, "ucx|local")},
    {"streams_max", "1024", "requests generating or waiting at once; more are refused",
     CM_CFG_UINT(gw_config, streams_max, 1, 65536)},
    {"encode_threads", "2", "threads that turn prompts into token ids", CM_CFG_UINT(gw_config, encode_threads, 1, 64)},
    {"request_bytes_max", "32m", "longest request body", CM_CFG_BYTES(gw_config, request_bytes_max, 1024, 1u << 30)},
    {"slow_reader_bytes", "1m", "answer bytes kept for a client that does not read; more ends its request",
     CM_CFG_BYTES(gw_config, slow_reader_bytes, 1024, 1u << 30)},
    {"connections_max", "4096", "HTTP connections at once; more wait to be accepted",
     CM_CFG_UINT(gw_config, connections_max, 1, 65536)},
    {"http_timeout_ms", "60s", "time for a client to send a whole request, or to take any of an answer",
     CM_CFG_MS(gw_config, http_timeout_ms, 100, 3600000)},
    {"keep_alive_ms", "15s", "silence on an answer after which a keep-alive is written",
     CM_CFG_MS(gw_config, keep_alive_ms, 10, 600000)},
    {"drain_ms", "30s", "time for running requests to finish before the process ends",
     CM_CFG_MS(gw_config, drain_ms, 0, 3600000)},
    PC_PROCESS_FIELDS(gw_config, process),
};

const cm_cfg_table gw_config_table = {
    .program = "baleen-gateway",
    .summary = "serves the HTTP and gRPC interfaces and hands requests to routers",
    .operands = "",
    .fields = FIELDS,
    .n_fields = sizeof(FIELDS) / sizeof(FIELDS[0]),
};
