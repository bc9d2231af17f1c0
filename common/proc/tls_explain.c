/* Why a TLS channel does not come up. gRPC says "Socket closed" when the other side refuses our certificate,
 * and "verify failed" for all that may be wrong with theirs: one handshake of our own tells what it was. */
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <string.h>

#include "common/base/clock.h"
#include "common/base/mem.h"
#include "common/proc/addresses.h"
#include "common/proc/rpc_private.h"

enum { EXPLAIN_S = 2, EXPLAIN_NAP_MS = 10 };

typedef struct explain_try {
    SSL_CTX *ctx;
    BIO *bio; /* a connection with TLS over it */
    SSL *ssl;
    char host[PC_ADDRESS_BYTES];
} explain_try;

/* ---- one handshake ---- */

static bool try_use_files(SSL_CTX *ctx, const pc_tls_texts *texts)
{
    BIO *cert_bio = BIO_new_mem_buf(texts->cert, -1), *key_bio = BIO_new_mem_buf(texts->key, -1);
    X509_STORE *authorities = pc_tls_authorities(texts->ca);
    X509 *cert = PEM_read_bio_X509(cert_bio, NULL, NULL, NULL);
    EVP_PKEY *key = PEM_read_bio_PrivateKey(key_bio, NULL, NULL, NULL);
    bool ok = authorities != NULL && cert != NULL && key != NULL;
    if (ok) {
        SSL_CTX_set1_cert_store(ctx, authorities);
        ok = SSL_CTX_use_certificate(ctx, cert) == 1 && SSL_CTX_use_PrivateKey(ctx, key) == 1;
    }
    X509_STORE_free(authorities);
    X509_free(cert);
    EVP_PKEY_free(key);
    BIO_free(cert_bio);
    BIO_free(key_bio);
    return ok;
}

static bool try_begin(explain_try *t, const pc_tls_texts *texts, const char *address)
{
    uint16_t port;
    *t = (explain_try){.ctx = SSL_CTX_new(TLS_client_method())};
    bool can = pc_address_split(address, t->host, &port) && t->ctx != NULL;
    if (!can || !try_use_files(t->ctx, texts)) {
        return false;
    }
    SSL_CTX_set_verify(t->ctx, SSL_VERIFY_PEER, NULL);
    SSL_CTX_set_alpn_protos(t->ctx, (const unsigned char *)"\x02h2", 3);
    t->bio = BIO_new_ssl_connect(t->ctx);
    if (t->bio == NULL || BIO_get_ssl(t->bio, &t->ssl) != 1) {
        return false;
    }
    X509_VERIFY_PARAM *param = SSL_get0_param(t->ssl);
    if (X509_VERIFY_PARAM_set1_ip_asc(param, t->host) != 1) {
        X509_VERIFY_PARAM_set1_host(param, t->host, 0);
    }
    BIO_set_conn_hostname(t->bio, address);
    BIO_set_nbio(t->bio, 1);
    ERR_clear_error();
    return true;
}

static void try_end(explain_try *t)
{
    BIO_free_all(t->bio);
    SSL_CTX_free(t->ctx);
    ERR_clear_error();
}

/* With TLS 1.3 a server judges our certificate after our side is done: its verdict is what comes first, else
 * HTTP/2. */
static bool try_hears_them(explain_try *t)
{
    char byte;
    uint64_t until_ms = cm_now_ms() + EXPLAIN_S * 1000;
    while (cm_now_ms() < until_ms) {
        if (BIO_read(t->bio, &byte, 1) == 1) {
            return true;
        }
        if (!BIO_should_retry(t->bio)) {
            return false;
        }
        (void)BIO_wait(t->bio, (time_t)(cm_wall_us() / 1000000u) + 1, EXPLAIN_NAP_MS);
    }
    return true; /* silence is no refusal */
}

/* ---- in words ---- */

static void say_theirs(const explain_try *t, const char *address, long error, char *out, size_t cap)
{
    const char *what = X509_verify_cert_error_string(error);
    switch (error) {
    case X509_V_ERR_CERT_HAS_EXPIRED:
        snprintf(out, cap, "the certificate of %s is expired: renew it there with 'baleen certs --renew'",
                 address);
        return;
    case X509_V_ERR_HOSTNAME_MISMATCH:
    case X509_V_ERR_IP_ADDRESS_MISMATCH:
        snprintf(out, cap,
                 "the certificate of %s does not name %s: make it with 'baleen certs --hosts %s,..'", address,
                 t->host, t->host);
        return;
    case X509_V_ERR_INVALID_PURPOSE:
        snprintf(out, cap,
                 "%s shows a certificate of another role than coordinator: give it coordinator.crt and .key",
                 address);
        return;
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_SELF_SIGNED_CERT_IN_CHAIN:
        snprintf(out, cap,
                 "the certificate of %s was signed by an authority that is not ours: all members need "
                 "certificates of one "
                 "'baleen certs'",
                 address);
        return;
    default:
        snprintf(out, cap, "the certificate of %s does not hold: %s", address, what);
        return;
    }
}

/* The connection ended. gRPC's server closes without a word when it does not like our certificate, after our
 * side of the handshake is done; whoever has no TLS answers the first message with something else. */
static void say_ended(const pc_tls *tls, bool shook_hands, const char *address, char *out, size_t cap)
{
    if (shook_hands) {
        snprintf(out, cap,
                 "%s refuses our certificate %s although it is good here: it has another authority (all "
                 "members need "
                 "certificates of one 'baleen certs'), or the clocks differ",
                 address, pc_tls_cert_path(tls));
    } else {
        snprintf(out, cap, "%s does not speak TLS: is it plain, or no coordinator?", address);
    }
}

static bool explain_try_it(pc_tls *tls, explain_try *t, const char *address, char *out, size_t cap)
{
    bool shook_hands = BIO_do_connect_retry(t->bio, EXPLAIN_S, EXPLAIN_NAP_MS) == 1;
    bool good = shook_hands && try_hears_them(t);
    long theirs = SSL_get_verify_result(t->ssl);
    if (theirs != X509_V_OK) {
        say_theirs(t, address, theirs, out, cap);
    } else if (!good && ERR_GET_LIB(ERR_peek_error()) == ERR_LIB_SSL) {
        say_ended(tls, shook_hands, address, out, cap);
    } else {
        return false;
    }
    return true;
}

bool pc_tls_explain(pc_tls *tls, const char *address, char *out, size_t cap)
{
    explain_try t = {0};
    pc_tls_texts texts;
    cm_error err = {0};
    bool found = true;
    if (pc_tls_copy(tls, &texts, &err) != CM_OK) {
        snprintf(out, cap, "%s", err.text);
    } else {
        found = try_begin(&t, &texts, address) && explain_try_it(tls, &t, address, out, cap);
    }
    try_end(&t);
    pc_tls_texts_free(&texts);
    return found;
}
