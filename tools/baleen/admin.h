/* Asking a coordinator's admin service, for the verbs of operators. Thread: main. */
#pragma once
#include "common/base/bytes.h"
#include "common/base/config.h"
#include "common/base/mem.h"
#include "common/proc/addresses.h"
#include "common/proc/tls.h"
#include "proto/control.pb-c.h"

/* The options that say which cluster is meant; a verb's own struct holds one. */
typedef struct admin_target {
    char *run, *coordinator;
    pc_tls_config tls;
} admin_target;

#define ADMIN_TARGET_FIELDS(type_, member_)                                                                  \
    {"run", "", "run folder of a baleen up", CM_CFG_STRING(type_, member_.run)},                             \
        {"coordinator", "", "host:port of the coordinator, or of several with commas, in place of --run",    \
         CM_CFG_STRING(type_, member_.coordinator)},                                                         \
        PC_TLS_FIELDS(type_, member_.tls)

typedef struct admin_service {
    char address[PC_ADDRESS_BYTES];
    pc_tls *tls; /* NULL: plain */
} admin_service;

/* The active coordinator: of the list, or the one that a standby names; with --run the TLS that its cluster
 * needs unless that was given. CM_E_CONFIG: neither option given, or what pc_tls_open says; else err has what
 * a standby says, if there is one. */
CM_MUST_CHECK cm_status admin_find(const admin_target *target, admin_service *service_out, cm_error *err);
void admin_close(admin_service *service);
/* One call of the service; reply is appended. err: the coordinator's sentence. */
CM_MUST_CHECK cm_status admin_ask(const admin_service *service, const char *method,
                                  const ProtobufCMessage *request, uint64_t timeout_ms, cm_bytes *reply,
                                  cm_error *err);

/* What the coordinator knows, with placement and load if experts; the answer lives in the arena. */
CM_MUST_CHECK cm_status admin_status(const admin_service *service, bool experts, cm_arena *arena,
                                     Baleen__Control__V1__StatusReply **reply_out, cm_error *err);
/* Members, epoch, placement and load as a table on stdout. */
void admin_print_table(const Baleen__Control__V1__StatusReply *reply);
