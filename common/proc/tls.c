#include "common/proc/tls.h"

#include <arpa/inet.h>
#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "common/base/bytes.h"
#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/proc/addresses.h"
#include "common/proc/rpc_private.h"

enum { TLS_FILE_BYTES_MAX = 1 << 20, TLS_FILES = 3 };

struct pc_tls {
    char *ca_path, *cert_path, *key_path;
    const char *role;
    pthread_mutex_t lock; /* protects the rest: a server's handshakes run on gRPC's threads */
    pc_tls_texts files;   /* the last good ones */
    bool served;          /* a server has these files already */
};

/* ---- files ---- */

void pc_tls_texts_free(pc_tls_texts *files)
{
    if (files->key != NULL) {
        OPENSSL_cleanse(files->key, strlen(files->key));
    }
    cm_free(files->ca);
    cm_free(files->cert);
    cm_free(files->key);
    *files = (pc_tls_texts){0};
}

cm_status pc_tls_file_read(const char *path, char **text_out, cm_error *err)
{
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return cm_error_set(err, CM_E_CONFIG, path,
                            "cannot read %s: %s; 'baleen certs DIR' makes the files for all roles", path,
                            strerror(errno));
    }
    char *text = cm_alloc(TLS_FILE_BYTES_MAX + 1);
    size_t n = fread(text, 1, TLS_FILE_BYTES_MAX, file);
    bool ok = ferror(file) == 0;
    fclose(file);
    if (!ok) {
        cm_free(text);
        return cm_error_set(err, CM_E_CONFIG, path, "cannot read %s: %s", path, strerror(errno));
    }
    text[n] = '\0';
    *text_out = cm_strdup(text);
    OPENSSL_cleanse(text, n);
    cm_free(text);
    return CM_OK;
}

/* ---- whether they are what they should be ---- */

typedef struct tls_parsed {
    X509_STORE *authorities; /* NULL: none could be read */
    X509 *cert;
    EVP_PKEY *key;
} tls_parsed;

/* All of the text: while an authority is replaced there are two. */
X509_STORE *pc_tls_authorities(const char *text)
{
    X509_STORE *store = X509_STORE_new();
    BIO *bio = BIO_new_mem_buf(text, -1);
    X509 *cert;
    bool any = false;
    while ((cert = PEM_read_bio_X509(bio, NULL, NULL, NULL)) != NULL) {
        any = X509_STORE_add_cert(store, cert) == 1 || any;
        X509_free(cert);
    }
    BIO_free(bio);
    ERR_clear_error(); /* the end of the text is told as one */
    if (!any) {
        X509_STORE_free(store);
        return NULL;
    }
    return store;
}

static X509 *parse_cert(const char *text)
{
    BIO *bio = BIO_new_mem_buf(text, -1);
    X509 *cert = PEM_read_bio_X509(bio, NULL, NULL, NULL);
    BIO_free(bio);
    return cert;
}

static EVP_PKEY *parse_key(const char *text)
{
    BIO *bio = BIO_new_mem_buf(text, -1);
    EVP_PKEY *key =
        PEM_read_bio_PrivateKey(bio, NULL, NULL, (void *)(uintptr_t) ""); /* no question on the terminal */
    BIO_free(bio);
    return key;
}

static void parsed_free(tls_parsed *parsed)
{
    X509_STORE_free(parsed->authorities);
    X509_free(parsed->cert);
    EVP_PKEY_free(parsed->key);
    ERR_clear_error();
}

static void describe_time(const ASN1_TIME *time, char out[64])
{
    BIO *bio = BIO_new(BIO_s_mem());
    ASN1_TIME_print(bio, time);
    int n = BIO_read(bio, out, 63);
    out[n > 0 ? n : 0] = '\0';
    BIO_free(bio);
}

/* As the other side will look at it. X509_V_OK or the first error. */
static int verify_error(const pc_tls *tls, const tls_parsed *parsed)
{
    X509_STORE_CTX *ctx = X509_STORE_CTX_new();
    int error = X509_V_ERR_OUT_OF_MEM;
    bool serves = strcmp(tls->role, "coordinator") == 0;
    if (X509_STORE_CTX_init(ctx, parsed->authorities, parsed->cert, NULL) == 1 &&
        X509_STORE_CTX_set_purpose(ctx, serves ? X509_PURPOSE_SSL_SERVER : X509_PURPOSE_SSL_CLIENT) == 1) {
        (void)X509_verify_cert(ctx);
        error = X509_STORE_CTX_get_error(ctx);
    }
    X509_STORE_CTX_free(ctx);
    return error;
}

static cm_status check_chain(const pc_tls *tls, const tls_parsed *parsed, cm_error *err)
{
    char until[64];
    int error = verify_error(tls, parsed);
    switch (error) {
    case X509_V_OK:
        return CM_OK;
    case X509_V_ERR_CERT_HAS_EXPIRED:
        describe_time(X509_get0_notAfter(parsed->cert), until);
        return cm_error_set(err, CM_E_CONFIG, tls->cert_path,
                            "%s is expired or its authority is, it ended on %s: renew it with "
                            "'baleen certs --renew DIR'",
                            tls->cert_path, until);
    case X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY:
    case X509_V_ERR_UNABLE_TO_VERIFY_LEAF_SIGNATURE:
    case X509_V_ERR_CERT_SIGNATURE_FAILURE:
        return cm_error_set(err, CM_E_CONFIG, tls->cert_path,
                            "%s was not signed by the authority in %s: all members need "
                            "certificates of one 'baleen certs'",
                            tls->cert_path, tls->ca_path);
    default:
        return cm_error_set(err, CM_E_CONFIG, tls->cert_path, "%s does not hold against %s: %s",
                            tls->cert_path, tls->ca_path, X509_verify_cert_error_string(error));
    }
}

static cm_status check_parsed(const pc_tls *tls, const tls_parsed *parsed, cm_error *err)
{
    char name[128] = "nobody";
    if (parsed->authorities == NULL || parsed->cert == NULL || parsed->key == NULL) {
        const char *path = parsed->authorities == NULL ? tls->ca_path
                           : parsed->cert == NULL      ? tls->cert_path
                                                       : tls->key_path;
        return cm_error_set(err, CM_E_CONFIG, path, "%s has no %s in PEM form", path,
                            path == tls->key_path ? "key without a password" : "certificate");
    }
    if (X509_check_private_key(parsed->cert, parsed->key) != 1) {
        return cm_error_set(err, CM_E_CONFIG, tls->key_path, "%s is not the key of %s", tls->key_path,
                            tls->cert_path);
    }
    X509_NAME_get_text_by_NID(X509_get_subject_name(parsed->cert), NID_commonName, name, sizeof(name));
    if (strcmp(name, tls->role) != 0) {
        return cm_error_set(err, CM_E_CONFIG, tls->cert_path,
                            "%s is the certificate of %s, this needs the one of role %s: give "
                            "%s.crt and %s.key of 'baleen certs'",
                            tls->cert_path, name, tls->role, tls->role, tls->role);
    }
    return check_chain(tls, parsed, err);
}

/* until_out: when the certificate ends, for people. */
static cm_status files_check(const pc_tls *tls, const pc_tls_texts *files, char until_out[64], cm_error *err)
{
    tls_parsed parsed = {pc_tls_authorities(files->ca), parse_cert(files->cert), parse_key(files->key)};
    cm_status status = check_parsed(tls, &parsed, err);
    if (status == CM_OK) {
        describe_time(X509_get0_notAfter(parsed.cert), until_out);
    }
    parsed_free(&parsed);
    return status;
}

static bool files_equal(const pc_tls_texts *a, const pc_tls_texts *b)
{
    return a->ca != NULL && strcmp(a->ca, b->ca) == 0 && strcmp(a->cert, b->cert) == 0 &&
           strcmp(a->key, b->key) == 0;
}

/* What is on disk now, if it is good; under the lock. */
static cm_status tls_read(pc_tls *tls, cm_error *err)
{
    pc_tls_texts files = {0};
    cm_status status = pc_tls_file_read(tls->ca_path, &files.ca, err);
    if (status == CM_OK) {
        status = pc_tls_file_read(tls->cert_path, &files.cert, err);
    }
    if (status == CM_OK) {
        status = pc_tls_file_read(tls->key_path, &files.key, err);
    }
    if (status == CM_OK && !files_equal(&tls->files, &files)) {
        char until[64];
        status = files_check(tls, &files, until, err);
        if (status == CM_OK) {
            cm_info("control channel: mutual TLS as %s, certificate %s valid until %s", tls->role,
                    tls->cert_path, until);
            pc_tls_texts before = tls->files;
            tls->files = files;
            tls->served = false;
            files = before;
        }
    }
    pc_tls_texts_free(&files);
    return status;
}

static void tls_refresh(pc_tls *tls)
{
    cm_error err = {0};
    if (tls_read(tls, &err) != CM_OK) {
        cm_warn("the certificates read before stay in force: %s", err.text);
    }
}

/* ---- open and close ---- */

static bool address_is_loopback(const char *address, size_t n_bytes)
{
    char text[PC_ADDRESS_BYTES], host[PC_ADDRESS_BYTES];
    uint16_t port;
    struct in_addr ipv4;
    struct in6_addr ipv6;
    snprintf(text, sizeof(text), "%.*s", n_bytes < sizeof(text) ? (int)n_bytes : 0, address);
    if (!pc_address_split(text, host, &port)) {
        return false;
    }
    if (inet_pton(AF_INET, host, &ipv4) == 1) {
        return ntohl(ipv4.s_addr) >> 24 == 127;
    }
    return strcmp(host, "localhost") == 0 ||
           (inet_pton(AF_INET6, host, &ipv6) == 1 && IN6_IS_ADDR_LOOPBACK(&ipv6));
}

static bool list_is_loopback(const char *list)
{
    for (;;) {
        size_t n_bytes = strcspn(list, ",");
        if (!address_is_loopback(list, n_bytes)) {
            return false;
        }
        if (list[n_bytes] == '\0') {
            return true;
        }
        list += n_bytes + 1;
    }
}

static cm_status tls_refuse_plain(const char *address, cm_error *err)
{
    return cm_error_set(err, CM_E_CONFIG, "control_security",
                        "%s is not on this machine's loopback, and without TLS whoever reaches it can join "
                        "or give orders: make "
                        "certificates with 'baleen certs DIR --hosts HOST' and give --tls-ca, --tls-cert and "
                        "--tls-key, or say "
                        "--control-security plain on purpose",
                        address);
}

static cm_status tls_go_plain(const pc_tls_config *config, const char *address, cm_error *err)
{
    bool loopback = list_is_loopback(address);
    if (!loopback && strcmp(config->control_security, "plain") != 0) {
        return tls_refuse_plain(address, err);
    }
    cm_log_line(loopback ? CM_LOG_INFO : CM_LOG_WARN,
                "control channel of %s: plain, neither authenticated nor encrypted", address);
    return CM_OK;
}

cm_status pc_tls_open(const pc_tls_config *config, const char *address, const char *role, pc_tls **tls_out,
                      cm_error *err)
{
    const char *paths[TLS_FILES] = {config->tls_ca, config->tls_cert, config->tls_key};
    uint32_t n_given = 0;
    for (uint32_t i = 0; i < TLS_FILES; i++) {
        n_given += paths[i][0] != '\0';
    }
    if (strcmp(config->control_security, "plain") == 0 && n_given > 0) {
        return cm_error_set(err, CM_E_CONFIG, "control_security",
                            "--control-security plain has no use for certificates: leave out "
                            "either it or --tls-ca, --tls-cert and --tls-key");
    }
    if (n_given == 0 && strcmp(config->control_security, "tls") != 0) {
        *tls_out = NULL;
        return tls_go_plain(config, address, err);
    }
    if (n_given < TLS_FILES) {
        return cm_error_set(err, CM_E_CONFIG, "tls_ca",
                            "TLS needs --tls-ca, --tls-cert and --tls-key, all three; 'baleen certs DIR' "
                            "makes the files");
    }
    pc_tls *tls = cm_alloc(sizeof(*tls));
    *tls = (pc_tls){.ca_path = cm_strdup(paths[0]),
                    .cert_path = cm_strdup(paths[1]),
                    .key_path = cm_strdup(paths[2]),
                    .role = role};
    pthread_mutex_init(&tls->lock, NULL);
    cm_status status = tls_read(tls, err);
    if (status != CM_OK) {
        pc_tls_close(tls);
        return status;
    }
    *tls_out = tls;
    return CM_OK;
}

void pc_tls_close(pc_tls *tls)
{
    if (tls == NULL) {
        return;
    }
    pc_tls_texts_free(&tls->files);
    pthread_mutex_destroy(&tls->lock);
    cm_free(tls->ca_path);
    cm_free(tls->cert_path);
    cm_free(tls->key_path);
    cm_free(tls);
}

/* ---- for gRPC ---- */

cm_status pc_tls_copy(pc_tls *tls, pc_tls_texts *texts_out, cm_error *err)
{
    char until[64];
    pthread_mutex_lock(&tls->lock);
    *texts_out =
        (pc_tls_texts){cm_strdup(tls->files.ca), cm_strdup(tls->files.cert), cm_strdup(tls->files.key)};
    pthread_mutex_unlock(&tls->lock);
    return files_check(tls, texts_out, until, err);
}

const char *pc_tls_cert_path(const pc_tls *tls)
{
    return tls->cert_path;
}

grpc_channel_credentials *pc_tls_client_credentials(pc_tls *tls)
{
    if (tls == NULL) {
        return grpc_insecure_credentials_create();
    }
    pthread_mutex_lock(&tls->lock);
    tls_refresh(tls);
    grpc_ssl_pem_key_cert_pair pair = {.private_key = tls->files.key, .cert_chain = tls->files.cert};
    grpc_channel_credentials *credentials = grpc_ssl_credentials_create(tls->files.ca, &pair, NULL, NULL);
    pthread_mutex_unlock(&tls->lock);
    return credentials;
}

/* Asked by gRPC before each handshake. */
static grpc_ssl_certificate_config_reload_status tls_serve(void *user_data,
                                                           grpc_ssl_server_certificate_config **config)
{
    pc_tls *tls = user_data;
    grpc_ssl_certificate_config_reload_status answer = GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    pthread_mutex_lock(&tls->lock);
    tls_refresh(tls);
    if (!tls->served) {
        grpc_ssl_pem_key_cert_pair pair = {.private_key = tls->files.key, .cert_chain = tls->files.cert};
        *config = grpc_ssl_server_certificate_config_create(tls->files.ca, &pair, 1);
        tls->served = true;
        answer = GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
    }
    pthread_mutex_unlock(&tls->lock);
    return answer;
}

grpc_server_credentials *pc_tls_server_credentials(pc_tls *tls)
{
    if (tls == NULL) {
        return grpc_insecure_server_credentials_create();
    }
    tls->served = false;
    return grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(
            GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY, tls_serve, tls));
}
