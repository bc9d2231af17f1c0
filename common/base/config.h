/* Options of a process, defined once. A table of cm_cfg_field rows describes a struct; from the table come
 * the flags (--name value, --name=value), the environment (BALEEN_NAME), the file (name = value, # comments),
 * bounds,
 * --help, --print-config and the tables in the docs. Later sources win: default, file, environment, flags.
 * An unknown flag or key is an error; a BALEEN_ variable that no table of this process knows is a warning.
 * Thread: start-up only. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "common/base/status.h"

typedef enum cm_cfg_type {
    CM_CFG_TYPE_STRING, /* char *; owned by the struct, "" when empty */
    CM_CFG_TYPE_BOOL,   /* bool; on, off, true, false, 1, 0, yes, no; a bare flag means on */
    CM_CFG_TYPE_UINT,   /* uint64_t within [min, max] */
    CM_CFG_TYPE_MS,     /* uint64_t milliseconds; accepts 250, 250ms, 3s, 2m */
    CM_CFG_TYPE_BYTES,  /* uint64_t bytes; accepts 4096, 64k, 16m, 2g (powers of 1024) */
    CM_CFG_TYPE_CHOICE, /* char *; one of a list "a|b|c" */
} cm_cfg_type;

typedef struct cm_cfg_field {
    const char *name;          /* lower case with underscores: data_address; flag --data-address */
    const char *default_value; /* as a user would write it */
    const char *doc;           /* one sentence fragment; unit and meaning */
    cm_cfg_type type;
    size_t offset;
    uint64_t min, max;   /* UINT, MS, BYTES */
    const char *choices; /* CHOICE */
} cm_cfg_field;

#define CM_CFG_STRING(type_, member_)            CM_CFG_TYPE_STRING, offsetof(type_, member_), 0, 0, NULL
#define CM_CFG_BOOL(type_, member_)              CM_CFG_TYPE_BOOL, offsetof(type_, member_), 0, 1, NULL
#define CM_CFG_UINT(type_, member_, min_, max_)  CM_CFG_TYPE_UINT, offsetof(type_, member_), min_, max_, NULL
#define CM_CFG_MS(type_, member_, min_, max_)    CM_CFG_TYPE_MS, offsetof(type_, member_), min_, max_, NULL
#define CM_CFG_BYTES(type_, member_, min_, max_) CM_CFG_TYPE_BYTES, offsetof(type_, member_), min_, max_, NULL
#define CM_CFG_CHOICE(type_, member_, choices_)  CM_CFG_TYPE_CHOICE, offsetof(type_, member_), 0, 0, choices_

typedef struct cm_cfg_table {
    const char *program;  /* "baleen-router" */
    const char *summary;  /* a line for --help */
    const char *operands; /* what follows the options, "" if nothing may; e.g. "DIR" or "[PROMPT]" */
    const cm_cfg_field *fields;
    size_t n_fields;
} cm_cfg_table;

typedef enum cm_cfg_outcome {
    CM_CFG_RUN,  /* go on */
    CM_CFG_EXIT, /* --help, --version or --print-config was answered on stdout: exit 0 */
} cm_cfg_outcome;

/* Fills the struct at config from defaults, the file named by --config FILE, the environment and
 * argv[1..argc-1]. Words that are no options are left in operands_out (borrowed from argv), at most
 * operands_max of them; more, or any where table->operands is "", is an error. *outcome_out says whether to
 * go on. err names option and reason. */
CM_MUST_CHECK cm_status cm_cfg_load(const cm_cfg_table *table, void *config, int argc, char **argv,
                                    const char **operands_out, size_t operands_max, size_t *n_operands_out,
                                    cm_cfg_outcome *outcome_out, cm_error *err);
/* Defaults only: for engines built inside another process and for tests. */
void cm_cfg_defaults(const cm_cfg_table *table, void *config);
/* Sets one option from text, checked as on the command line. */
CM_MUST_CHECK cm_status cm_cfg_set(const cm_cfg_table *table, void *config, const char *name,
                                   const char *value, cm_error *err);
void cm_cfg_free(const cm_cfg_table *table, void *config);

void cm_cfg_print_help(const cm_cfg_table *table, FILE *to);
/* In the file format, every option with its doc as a comment: may be fed back by --config. */
void cm_cfg_print(const cm_cfg_table *table, const void *config, FILE *to);

/* The environment outside the table: the only getenv. NULL when unset. */
const char *cm_env_get(const char *name);
/* For libraries that read their settings from the environment alone: sets it unless the user did. At start
 * only, before threads that may read the environment. */
void cm_env_default(const char *name, const char *value);
