#include "common/proc/serve_tls.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/proc/rpc_private.h"

struct pc_serve_tls {
    char *cert_path, *key_path;
    pthread_mutex_t lock; /* protects the rest: gRPC's handshakes run on its threads */
    pc_tls_texts files;   /* in force; ca is NULL */
    SSL_CTX *ctx;         /* with those */
    bool served;          /* gRPC has these files already */
    bool told_expired;    /* an operator was told so of these */
};

/* ---- whether they are what they should be ---- */

static cm_status put_chain(const pc_serve_tls *tls, const char *text, SSL_CTX *ctx, cm_error *err)
{
    BIO *bio = BIO_new_mem_buf(text, -1);
    X509 *cert = PEM_read_bio_X509(bio, NULL, NULL, NULL);
    bool ok = cert != NULL && SSL_CTX_use_certificate(ctx, cert) == 1;
    X509_free(cert);
    while (ok && (cert = PEM_read_bio_X509(bio, NULL, NULL, NULL)) != NULL) {
        ok = SSL_CTX_add_extra_chain_cert(ctx, cert) == 1; /* takes it over */
    }
    BIO_free(bio);
    ERR_clear_error(); /* the end of the text is told as one */
    if (!ok) {
        return cm_error_set(err, CM_E_CONFIG, tls->cert_path, "%s has no certificate in PEM form",
                            tls->cert_path);
    }
    return CM_OK;
}

static cm_status put_key(const pc_serve_tls *tls, const char *text, SSL_CTX *ctx, cm_error *err)
{
    BIO *bio = BIO_new_mem_buf(text, -1);
    EVP_PKEY *key =
        PEM_read_bio_PrivateKey(bio, NULL, NULL, (void *)(uintptr_t) ""); /* no question on the terminal */
    BIO_free(bio);
    cm_status status = CM_OK;
    if (key == NULL) {
        status = cm_error_set(err, CM_E_CONFIG, tls->key_path, "%s has no key without a password in PEM form",
                              tls->key_path);
    } else if (SSL_CTX_use_PrivateKey(ctx, key) != 1 || SSL_CTX_check_private_key(ctx) != 1) {
        status = cm_error_set(err, CM_E_CONFIG, tls->key_path, "%s is not the key of %s", tls->key_path,
                              tls->cert_path);
    }
    EVP_PKEY_free(key);
    ERR_clear_error();
    return status;
}

static cm_status ctx_make(const pc_serve_tls *tls, const pc_tls_texts *files, SSL_CTX **ctx_out,
                          cm_error *err)
{
    SSL_CTX *ctx = SSL_CTX_new(TLS_server_method());
    CM_ASSERT(ctx != NULL && SSL_CTX_set_min_proto_version(ctx, TLS1_2_VERSION) == 1);
    cm_status status = put_chain(tls, files->cert, ctx, err);
    if (status == CM_OK) {
        status = put_key(tls, files->key, ctx, err);
    }
    if (status != CM_OK) {
        SSL_CTX_free(ctx);
        return status;
    }
    *ctx_out = ctx;
    return CM_OK;
}

/* ---- files ---- */

/* What is on disk now, if it is good; under the lock. */
static cm_status files_take(pc_serve_tls *tls, cm_error *err)
{
    pc_tls_texts files = {0};
    SSL_CTX *ctx;
    cm_status status = pc_tls_file_read(tls->cert_path, &files.cert, err);
    if (status == CM_OK) {
        status = pc_tls_file_read(tls->key_path, &files.key, err);
    }
    bool same = status == CM_OK && tls->files.cert != NULL && strcmp(tls->files.cert, files.cert) == 0 &&
                strcmp(tls->files.key, files.key) == 0;
    if (status == CM_OK && !same) {
        status = ctx_make(tls, &files, &ctx, err);
    }
    if (status == CM_OK && !same) {
        pc_tls_texts before = tls->files;
        SSL_CTX_free(tls->ctx);
        tls->ctx = ctx;
        tls->files = files;
        tls->served = tls->told_expired = false;
        files = before;
        cm_info("clients' TLS: certificate %s", tls->cert_path);
    }
    pc_tls_texts_free(&files);
    return status;
}

/* It is served all the same: there is no better one, and not everybody looks. */
static void files_check_age(pc_serve_tls *tls)
{
    const X509 *cert = SSL_CTX_get0_certificate(tls->ctx);
    if (!tls->told_expired && X509_cmp_current_time(X509_get0_notAfter(cert)) < 0) {
        tls->told_expired = true;
        cm_warn("the certificate %s is expired: clients refuse it until it is replaced", tls->cert_path);
    }
}

static void files_refresh(pc_serve_tls *tls)
{
    cm_error err = {0};
    if (files_take(tls, &err) != CM_OK) {
        cm_warn("the certificate read before stays in force: %s", err.text);
    }
    files_check_age(tls);
}

/* ---- for servers ---- */

cm_status pc_serve_tls_open(const char *cert_path, const char *key_path, pc_serve_tls **tls_out,
                            cm_error *err)
{
    pc_serve_tls *tls = cm_alloc(sizeof(*tls));
    tls->cert_path = cm_strdup(cert_path);
    tls->key_path = cm_strdup(key_path);
    pthread_mutex_init(&tls->lock, NULL);
    cm_status status = files_take(tls, err);
    if (status != CM_OK) {
        pc_serve_tls_close(tls);
        return status;
    }
    files_check_age(tls);
    *tls_out = tls;
    return CM_OK;
}

void pc_serve_tls_close(pc_serve_tls *tls)
{
    if (tls == NULL) {
        return;
    }
    SSL_CTX_free(tls->ctx);
    pc_tls_texts_free(&tls->files);
    pthread_mutex_destroy(&tls->lock);
    cm_free(tls->cert_path);
    cm_free(tls->key_path);
    cm_free(tls);
}

SSL *pc_serve_tls_accept(pc_serve_tls *tls)
{
    pthread_mutex_lock(&tls->lock);
    files_refresh(tls);
    SSL *ssl = SSL_new(tls->ctx);
    pthread_mutex_unlock(&tls->lock);
    CM_ASSERT(ssl != NULL);
    return ssl;
}

/* Asked by gRPC before each handshake. */
static grpc_ssl_certificate_config_reload_status serve(void *user_data,
                                                       grpc_ssl_server_certificate_config **config)
{
    pc_serve_tls *tls = user_data;
    grpc_ssl_certificate_config_reload_status answer = GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    pthread_mutex_lock(&tls->lock);
    files_refresh(tls);
    if (!tls->served) {
        grpc_ssl_pem_key_cert_pair pair = {.private_key = tls->files.key, .cert_chain = tls->files.cert};
        /* it insists on an authority of clients, though none of them is asked for a certificate */
        *config = grpc_ssl_server_certificate_config_create(tls->files.cert, &pair, 1);
        tls->served = true;
        answer = GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
    }
    pthread_mutex_unlock(&tls->lock);
    return answer;
}

grpc_server_credentials *pc_serve_tls_credentials(pc_serve_tls *tls)
{
    tls->served = false;
    return grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(
            GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE, serve, tls));
}
