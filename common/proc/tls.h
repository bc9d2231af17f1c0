/* How the control channel is secured: mutual TLS by three files, or plain. The files are read again for every
 * connection (as a client) and every handshake (as a server), so a renewed certificate needs no restart; what
 * cannot be read or does not fit together leaves the last good ones in force. Thread: open and close on the
 * loop's; the channels and the server that use one come from any. */
#pragma once
#include "common/base/config.h"

typedef struct pc_tls_config {
    char *control_security, *tls_ca, *tls_cert, *tls_key;
} pc_tls_config;

/* Rows for the option table of whoever speaks to the coordinator; member_ is a pc_tls_config inside its
 * config struct. */
#define PC_TLS_FIELDS(type_, member_)                                                                        \
    {"control_security", "auto",                                                                             \
     "of the coordinator's channel; tls: mutual TLS; plain: neither authenticated nor encrypted; auto: tls " \
     "when tls_ca is given, else plain, on loopback only",                                                   \
     CM_CFG_CHOICE(type_, member_.control_security, "auto|tls|plain")},                                      \
        {"tls_ca", "", "certificate of the cluster's authority, PEM; baleen certs makes all three",          \
         CM_CFG_STRING(type_, member_.tls_ca)},                                                              \
        {"tls_cert", "", "our certificate, PEM", CM_CFG_STRING(type_, member_.tls_cert)},                    \
    {                                                                                                        \
        "tls_key", "", "our key, PEM", CM_CFG_STRING(type_, member_.tls_key)                                 \
    }

typedef struct pc_tls pc_tls;

/* address: where the coordinator listens or is reached; of several with commas, all. role: whose certificate
 * ours has to be ("router"); kept. tls_out NULL: plain. Which of the two is logged. CM_E_CONFIG, and what to
 * do: plain beyond loopback, a file that cannot be read, files that do not belong together, a certificate
 * that is expired or another role's. */
CM_MUST_CHECK cm_status pc_tls_open(const pc_tls_config *config, const char *address, const char *role,
                                    pc_tls **tls_out, cm_error *err);
/* After a channel to address did not come up: tries a handshake and says what is wrong with whose certificate
 * and what to do. false: nothing is (nobody may be there). Takes up to a few seconds; any thread. */
bool pc_tls_explain(pc_tls *tls, const char *address, char *out, size_t cap);
void pc_tls_close(pc_tls *tls); /* NULL is fine; after what uses it */
