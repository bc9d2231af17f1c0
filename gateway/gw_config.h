/* Options of a gateway. Thread: start-up only. */
#pragma once
#include "common/proc/process.h"

typedef struct gw_config {
    char *http, *grpc;            /* listening addresses, "host:port" */
    char *coordinator;            /* "host:port" */
    char *model;                  /* folder */
    char *model_name;             /* "": the folder's name */
    char *model_aliases;          /* "a,b" */
    char *net;                    /* back-end towards the routers */
    char *serve_cert, *serve_key; /* files; "": plain */
    char *key_file;               /* "": none */
    bool metrics_open;
    uint64_t running_max, queue_ms;
    uint64_t streams_max, choices_max, encode_threads;
    uint64_t request_bytes_max, slow_reader_bytes;
    uint64_t connections_max, connections_per_address_max, http_timeout_ms, keep_alive_ms;
    uint64_t drain_ms, reopen_ms;
    char *scripted_model;   /* "": the routers compute */
    char *invalid_status;   /* "400" or "422" */
    char *reasoning_replay; /* "lenient" or "strict" */
    bool json_word;
    pc_process_config process;
} gw_config;

extern const cm_cfg_table gw_config_table;
