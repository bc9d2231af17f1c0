/* What the four servers' mains share: common options, logging, signals, telling the launcher that we are
 * ready. Thread: the loop's. */
#pragma once
#include "common/base/config.h"
#include "common/proc/loop.h"
#include "common/proc/tls.h"

typedef struct pc_process_config {
    char *log_level, *log_format, *failpoints;
    uint64_t ready_fd, seed;
    pc_tls_config tls;
} pc_process_config;

/* Rows for a process' own option table; member_ is a pc_process_config inside its config struct. */
#define PC_PROCESS_FIELDS(type_, member_)                                                                    \
    {"log_level", "info", "error, warn, info, debug: least severe lines written to stderr",                  \
     CM_CFG_CHOICE(type_, member_.log_level, "error|warn|info|debug")},                                      \
        PC_TLS_FIELDS(type_, member_.tls),                                                                   \
        {"log_format", "text", "form of a log line", CM_CFG_CHOICE(type_, member_.log_format, "text|json")}, \
        {"failpoints", "", "tests only: name:odds,.. of failpoints to arm",                                  \
         CM_CFG_STRING(type_, member_.failpoints)},                                                          \
        {"seed", "0", "tests only: seed of armed failpoints",                                                \
         CM_CFG_UINT(type_, member_.seed, 0, UINT64_MAX)},                                                   \
    {                                                                                                        \
        "ready_fd", "0",                                                                                     \
            "launchers only: descriptor that gets one JSON line with our addresses when we listen; 0 = "     \
            "none",                                                                                          \
            CM_CFG_UINT(type_, member_.ready_fd, 0, 65535)                                                   \
    }

/* Loads the configuration, sets up logging and failpoints. Returns the exit code the process should end with
 * (config is freed then), or -1 to go on. */
int pc_process_begin(const cm_cfg_table *table, void *config, const pc_process_config *common, int argc,
                     char **argv, const char *role);
/* Under mpirun, --coordinator mpi: the option gets the address of the coordinator in the same line; otherwise
 * nothing is done. Blocks until all processes of the line have come to here. */
CM_MUST_CHECK cm_status pc_process_find_coordinator(const cm_cfg_table *table, void *config,
                                                    const char *coordinator, cm_error *err);
/* The same for the coordinator, which tells its own. */
CM_MUST_CHECK cm_status pc_process_tell_address(const char *address, cm_error *err);
/* Writes {"pid":..,KEY:VALUE,..} to ready_fd and closes it. pairs: key, value, key, value, NULL. */
void pc_process_ready(const pc_process_config *common, const char *const *pairs);
/* SIGTERM and SIGINT call fn once (begin the drain); a second signal ends the process at once with code 130.
 * SIGPIPE is ignored. */
void pc_process_on_terminate(pc_loop *loop, pc_fn fn, void *arg);
