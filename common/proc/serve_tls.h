/* TLS of a server towards its clients: a certificate (chain) and its key, no certificate of theirs. The files
 * are looked at again for every connection, so a renewed certificate needs no restart; what cannot be read or
 * does not fit together leaves the last good pair in force. Thread: any. */
#pragma once
#include "common/base/status.h"

typedef struct pc_serve_tls pc_serve_tls;

/* CM_E_CONFIG: err says which file is wrong, and how. */
CM_MUST_CHECK cm_status pc_serve_tls_open(const char *cert_path, const char *key_path, pc_serve_tls **tls_out,
                                          cm_error *err);
void pc_serve_tls_close(pc_serve_tls *tls); /* NULL is fine; after what uses it */
/* An SSL object for one connection, the caller's to free. */
struct ssl_st *pc_serve_tls_accept(pc_serve_tls *tls);
