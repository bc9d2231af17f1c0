/* What the verbs share: options to exit codes, sentences and progress on stderr. Thread: main. */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "common/base/bytes.h"
#include "common/base/config.h"
#include "common/proc/tls.h"

enum { CLI_OK = 0, CLI_FAILED = 1, CLI_USAGE = 2 };

/* Loads the options. Returns the exit code to end with, or -1 to go on; then
 * config is to be freed with cm_cfg_free. operands as for cm_cfg_load; n_operands_out may be NULL. */
int cli_begin(const cm_cfg_table *table, void *config, int argc, char **argv, const char **operands_out,
              size_t operands_max, size_t *n_operands_out);
/* Prints "PROGRAM: sentence" and returns code. */
int cli_complain(const cm_cfg_table *table, int code, const char *fmt, ...) CM_PRINTF(3, 4);
/* The same from an error. CM_E_CONFIG makes it a usage error. */
int cli_fail(const cm_cfg_table *table, const cm_error *err);

/* For verbs that speak to a coordinator. The first is pc_tls_open with the admin's files of a `baleen certs`
 * folder; the second fills err after a call to address that failed with status and inner. */
CM_MUST_CHECK cm_status cli_open_certs(const char *dir, pc_tls **tls_out, cm_error *err);
void cli_explain_channel(const char *address, pc_tls *tls, cm_status status, const cm_error *inner,
                         cm_error *err);

/* A number from an option's text, for the options that are no whole numbers. */
CM_MUST_CHECK cm_status cli_parse_double(const char *option, const char *text, double min, double max,
                                         double *value_out, cm_error *err);

/* One line on stderr that the next one replaces; nothing when stderr is no terminal. */
void cli_progress(const char *fmt, ...) CM_PRINTF(1, 2);
void cli_progress_clear(void);
/* Appends a value in JSON's compact or indented form (flags of jansson). */
void cli_append_json(cm_bytes *text, const json_t *value, size_t flags);
/* "1.5 GB", powers of 1000. */
void cli_format_bytes(uint64_t n_bytes, char out[32]);
