/* Makes the certificates of a cluster: an authority of its own, and one certificate and key for each role,
 * signed by it. EC P-256, OpenSSL 3. A certificate's subject is O=Baleen, CN=role; only the coordinator's may
 * be used by a server. Files are PEM, mode 0600, NAME.crt and NAME.key. Used by `baleen certs` and by tests.
 * Thread: any. */
#pragma once
#include <stdint.h>

#include "common/base/status.h"

enum { CERT_ROLES = 5, CERT_CLOCK_SKEW_S = 300 };
extern const char *const cert_roles[CERT_ROLES]; /* "coordinator", "router", "worker", "gateway", "admin" */

typedef struct cert_authority cert_authority;

/* A fresh key and a certificate that signs itself; in memory only. valid_s: from now on. */
CM_MUST_CHECK cm_status cert_authority_create(int64_t valid_s, cert_authority **authority_out, cm_error *err);
/* DIR/ca.crt and DIR/ca.key. CM_E_CORRUPT: not what cert_authority_save wrote. */
CM_MUST_CHECK cm_status cert_authority_load(const char *dir, cert_authority **authority_out, cm_error *err);
CM_MUST_CHECK cm_status cert_authority_save(const cert_authority *authority, const char *dir, cm_error *err);
void cert_authority_destroy(cert_authority *authority);

typedef struct cert_request {
    const char *role;
    const char
        *hosts; /* names and addresses, comma separated; of the coordinator, for the others of no weight */
    int64_t from_s, until_s; /* relative to now */
} cert_request;
/* DIR/ROLE.crt and DIR/ROLE.key, each replaced as a whole. CM_E_INVALID: a host that is neither name nor
 * address. */
CM_MUST_CHECK cm_status cert_make(const cert_authority *authority, const char *dir,
                                  const cert_request *request, cm_error *err);
