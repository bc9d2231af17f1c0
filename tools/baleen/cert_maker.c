#include "tools/baleen/cert_maker.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <openssl/err.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/base/mem.h"

enum { CERT_SERIAL_BYTES = 16 };

const char *const cert_roles[CERT_ROLES] = {"coordinator", "router", "worker", "gateway", "admin"};

struct cert_authority {
    EVP_PKEY *key;
    X509 *cert;
};

/* OpenSSL has no memory left or a bug of ours met it: nothing a caller can mend. */
static cm_status cert_fail(cm_error *err, const char *what)
{
    char text[200] = "no reason given";
    unsigned long code = ERR_get_error();
    if (code != 0) {
        ERR_error_string_n(code, text, sizeof(text));
    }
    return cm_error_set(err, CM_E_DEVICE, NULL, "OpenSSL: %s: %s", what, text);
}

/* ---- files ---- */

static void path_of(char out[512], const char *dir, const char *name, const char *suffix)
{
    snprintf(out, 512, "%s/%s.%s", dir, name, suffix);
}

/* Beside the old file, then in its place: whoever reads meets one of the two. Exactly one of cert and key. */
static cm_status write_pem(const char *path, X509 *cert, EVP_PKEY *key, cm_error *err)
{
    char temporary[540];
    snprintf(temporary, sizeof(temporary), "%s.%ld", path, (long)getpid());
    int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    FILE *file = fd >= 0 ? fdopen(fd, "w") : NULL;
    if (file == NULL) {
        return cm_error_set(err, CM_E_IO, path, "cannot write %s: %s", temporary, strerror(errno));
    }
    int ok = cert != NULL ? PEM_write_X509(file, cert)
                          : PEM_write_PKCS8PrivateKey(file, key, NULL, NULL, 0, NULL, NULL);
    ok = fclose(file) == 0 && ok;
    if (!ok || rename(temporary, path) != 0) {
        int code = errno;
        unlink(temporary);
        return cm_error_set(err, CM_E_IO, path, "cannot write %s: %s", path, strerror(code));
    }
    return CM_OK;
}

/* The key first: a certificate without its key would pass for complete. */
static cm_status write_pair(const char *dir, const char *name, X509 *cert, EVP_PKEY *key, cm_error *err)
{
    char path[512];
    path_of(path, dir, name, "key");
    CM_TRY(write_pem(path, NULL, key, err));
    path_of(path, dir, name, "crt");
    return write_pem(path, cert, NULL, err);
}

static FILE *open_pem(const char *dir, const char *suffix, char path[512], cm_error *err)
{
    path_of(path, dir, "ca", suffix);
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        cm_error_set(err, CM_E_IO, path, "cannot read %s: %s", path, strerror(errno));
    }
    return file;
}

/* ---- a certificate ---- */

static bool add_extension(X509 *cert, X509 *issuer, int nid, const char *value)
{
    X509V3_CTX ctx;
    X509V3_set_ctx(&ctx, issuer, cert, NULL, NULL, 0);
    X509_EXTENSION *extension = X509V3_EXT_conf_nid(NULL, &ctx, nid, value);
    bool ok = extension != NULL && X509_add_ext(cert, extension, -1) == 1;
    X509_EXTENSION_free(extension);
    return ok;
}

static bool set_serial(X509 *cert)
{
    unsigned char bytes[CERT_SERIAL_BYTES];
    if (RAND_bytes(bytes, sizeof(bytes)) != 1) {
        return false;
    }
    bytes[0] &= 0x7f; /* positive */
    BIGNUM *number = BN_bin2bn(bytes, sizeof(bytes), NULL);
    bool ok = number != NULL && BN_to_ASN1_INTEGER(number, X509_get_serialNumber(cert)) != NULL;
    BN_free(number);
    return ok;
}

static bool set_subject(X509 *cert, const char *common_name)
{
    X509_NAME *name = X509_get_subject_name(cert);
    return X509_NAME_add_entry_by_txt(name, "O", MBSTRING_ASC, (const unsigned char *)"Baleen", -1, -1, 0) ==
               1 &&
           X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC, (const unsigned char *)common_name, -1, -1,
                                      0) == 1;
}

/* A key and what every certificate has; the caller adds its extensions, then signs. */
static cm_status cert_begin(const char *common_name, int64_t from_s, int64_t until_s, EVP_PKEY **key_out,
                            X509 **cert_out, cm_error *err)
{
    EVP_PKEY *key = EVP_EC_gen("P-256");
    X509 *cert = X509_new();
    if (key == NULL || cert == NULL || X509_set_version(cert, X509_VERSION_3) != 1 || !set_serial(cert) ||
        !set_subject(cert, common_name) || X509_gmtime_adj(X509_getm_notBefore(cert), (long)from_s) == NULL ||
        X509_gmtime_adj(X509_getm_notAfter(cert), (long)until_s) == NULL || X509_set_pubkey(cert, key) != 1) {
        EVP_PKEY_free(key);
        X509_free(cert);
        return cert_fail(err, "a new certificate");
    }
    *key_out = key;
    *cert_out = cert;
    return CM_OK;
}

/* ---- the authority ---- */

cm_status cert_authority_create(int64_t valid_s, cert_authority **authority_out, cm_error *err)
{
    char name[64];
    uint32_t number;
    EVP_PKEY *key;
    X509 *cert;
    if (RAND_bytes((unsigned char *)&number, sizeof(number)) != 1) {
        return cert_fail(err, "randomness");
    }
    /* a name of its own: two clusters' authorities are told apart by more than their keys */
    snprintf(name, sizeof(name), "Baleen cluster authority %08x", number);
    CM_TRY(cert_begin(name, -CERT_CLOCK_SKEW_S, valid_s, &key, &cert, err));
    if (X509_set_issuer_name(cert, X509_get_subject_name(cert)) != 1 ||
        !add_extension(cert, cert, NID_basic_constraints, "critical,CA:TRUE,pathlen:0") ||
        !add_extension(cert, cert, NID_key_usage, "critical,keyCertSign,cRLSign") ||
        !add_extension(cert, cert, NID_subject_key_identifier, "hash") ||
        X509_sign(cert, key, EVP_sha256()) == 0) {
        EVP_PKEY_free(key);
        X509_free(cert);
        return cert_fail(err, "the authority's certificate");
    }
    cert_authority *authority = cm_alloc(sizeof(*authority));
    *authority = (cert_authority){key, cert};
    *authority_out = authority;
    return CM_OK;
}

cm_status cert_authority_load(const char *dir, cert_authority **authority_out, cm_error *err)
{
    char path[512];
    FILE *file = open_pem(dir, "crt", path, err);
    if (file == NULL) {
        return CM_E_IO;
    }
    X509 *cert = PEM_read_X509(file, NULL, NULL, NULL);
    fclose(file);
    file = open_pem(dir, "key", path, err);
    if (file == NULL) {
        X509_free(cert);
        return CM_E_IO;
    }
    EVP_PKEY *key = PEM_read_PrivateKey(file, NULL, NULL, NULL);
    fclose(file);
    if (cert == NULL || key == NULL || X509_check_private_key(cert, key) != 1) {
        X509_free(cert);
        EVP_PKEY_free(key);
        return cm_error_set(err, CM_E_CORRUPT, dir, "%s/ca.crt and ca.key are no certificate with its key",
                            dir);
    }
    cert_authority *authority = cm_alloc(sizeof(*authority));
    *authority = (cert_authority){key, cert};
    *authority_out = authority;
    return CM_OK;
}

cm_status cert_authority_save(const cert_authority *authority, const char *dir, cm_error *err)
{
    return write_pair(dir, "ca", authority->cert, authority->key, err);
}

void cert_authority_destroy(cert_authority *authority)
{
    EVP_PKEY_free(authority->key);
    X509_free(authority->cert);
    cm_free(authority);
}

/* ---- a role's certificate ---- */

static bool host_is_name(const char *host)
{
    size_t n = strlen(host);
    return n > 0 && n < 254 &&
           strspn(host, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._*") == n &&
           host[0] != '.';
}

/* "DNS:localhost,IP:127.0.0.1", as OpenSSL reads it. */
static cm_status names_of(const char *hosts, cm_bytes *out, cm_error *err)
{
    while (*hosts != '\0') {
        char host[256];
        unsigned char address[16];
        size_t n = strcspn(hosts, ",");
        snprintf(host, sizeof(host), "%.*s", n < 255 ? (int)n : 255, hosts);
        bool is_address = inet_pton(AF_INET, host, address) == 1 || inet_pton(AF_INET6, host, address) == 1;
        if (!is_address && !host_is_name(host)) {
            return cm_error_set(
                err, CM_E_INVALID, "hosts",
                "'%s' is neither a host name nor an address; give them as --hosts name,10.0.0.1", host);
        }
        cm_bytes_printf(out, "%s%s:%s", out->len > 0 ? "," : "", is_address ? "IP" : "DNS", host);
        hosts += n + (hosts[n] == ',');
    }
    return out->len > 0 ? CM_OK : cm_error_set(err, CM_E_INVALID, "hosts", "no host is given");
}

static bool add_role_extensions(X509 *cert, X509 *issuer, const char *role, const char *names)
{
    bool serves = strcmp(role, cert_roles[0]) == 0;
    return add_extension(cert, issuer, NID_basic_constraints, "critical,CA:FALSE") &&
           add_extension(cert, issuer, NID_key_usage, "critical,digitalSignature") &&
           add_extension(cert, issuer, NID_ext_key_usage, serves ? "serverAuth,clientAuth" : "clientAuth") &&
           add_extension(cert, issuer, NID_subject_key_identifier, "hash") &&
           add_extension(cert, issuer, NID_authority_key_identifier, "keyid:always") &&
           add_extension(cert, issuer, NID_subject_alt_name, names);
}

cm_status cert_make(const cert_authority *authority, const char *dir, const cert_request *request,
                    cm_error *err)
{
    EVP_PKEY *key = NULL;
    X509 *cert = NULL;
    cm_bytes names;
    cm_bytes_init(&names, 0);
    cm_status status = names_of(request->hosts, &names, err);
    if (status != CM_OK) {
        goto out_names;
    }
    status = cert_begin(request->role, request->from_s, request->until_s, &key, &cert, err);
    if (status != CM_OK) {
        goto out_names;
    }
    if (X509_set_issuer_name(cert, X509_get_subject_name(authority->cert)) != 1 ||
        !add_role_extensions(cert, authority->cert, request->role, cm_bytes_text(&names)) ||
        X509_sign(cert, authority->key, EVP_sha256()) == 0) {
        status = cert_fail(err, request->role);
    } else {
        status = write_pair(dir, request->role, cert, key, err);
    }
    EVP_PKEY_free(key);
    X509_free(cert);
out_names:
    cm_bytes_fini(&names);
    return status;
}
