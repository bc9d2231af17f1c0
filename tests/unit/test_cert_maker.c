/* Certificates as OpenSSL's own verification sees them. */
#include <fcntl.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "tests/support/temp_folder.h"
#include "tools/baleen/cert_maker.h"

enum { DAY_S = 86400 };

static char g_dir[T_FOLDER_MAX];

static const char *path_of(const char *name)
{
    static char path[600];
    snprintf(path, sizeof(path), "%s/%s", g_dir, name);
    return path;
}

static X509 *read_cert(const char *name)
{
    FILE *file = fopen(path_of(name), "r");
    assert_non_null(file);
    X509 *cert = PEM_read_X509(file, NULL, NULL, NULL);
    fclose(file);
    assert_non_null(cert);
    return cert;
}

/* The error of a verification as a server (or client) does it; X509_V_OK when all is well. */
static int verify(const char *name, int purpose)
{
    X509 *ca = read_cert("ca.crt"), *cert = read_cert(name);
    X509_STORE *store = X509_STORE_new();
    X509_STORE_CTX *ctx = X509_STORE_CTX_new();
    assert_int_equal(X509_STORE_add_cert(store, ca), 1);
    assert_int_equal(X509_STORE_CTX_init(ctx, store, cert, NULL), 1);
    assert_int_equal(X509_STORE_CTX_set_purpose(ctx, purpose), 1);
    (void)X509_verify_cert(ctx);
    int error = X509_STORE_CTX_get_error(ctx);
    X509_STORE_CTX_free(ctx);
    X509_STORE_free(store);
    X509_free(cert);
    X509_free(ca);
    return error;
}

static cert_authority *make_all(void)
{
    cm_error err = {0};
    cert_authority *authority;
    assert_int_equal(cert_authority_create(10 * DAY_S, &authority, &err), CM_OK);
    assert_int_equal(cert_authority_save(authority, g_dir, &err), CM_OK);
    for (uint32_t i = 0; i < CERT_ROLES; i++) {
        cert_request request = {cert_roles[i], "localhost,127.0.0.1,host-a.example,::1", -CERT_CLOCK_SKEW_S,
                                DAY_S};
        assert_int_equal(cert_make(authority, g_dir, &request, &err), CM_OK);
    }
    return authority;
}

static void test_roles(void **state)
{
    (void)state;
    cert_authority_destroy(make_all());
    for (uint32_t i = 0; i < CERT_ROLES; i++) {
        char name[64], common_name[64] = "";
        snprintf(name, sizeof(name), "%s.crt", cert_roles[i]);
        X509 *cert = read_cert(name);
        X509_NAME_get_text_by_NID(X509_get_subject_name(cert), NID_commonName, common_name,
                                  sizeof(common_name));
        assert_string_equal(common_name, cert_roles[i]);
        assert_int_equal(EVP_PKEY_get_bits(X509_get0_pubkey(cert)), 256);
        assert_int_equal(X509_check_host(cert, "host-a.example", 0, 0, NULL), 1);
        assert_int_equal(X509_check_ip_asc(cert, "127.0.0.1", 0), 1);
        assert_int_equal(X509_check_ip_asc(cert, "::1", 0), 1);
        assert_int_equal(X509_check_ip_asc(cert, "127.0.0.2", 0), 0);
        X509_free(cert);
        assert_int_equal(verify(name, X509_PURPOSE_SSL_CLIENT), X509_V_OK);
        /* nobody but the coordinator may stand as a server */
        assert_int_equal(verify(name, X509_PURPOSE_SSL_SERVER),
                         i == 0 ? X509_V_OK : X509_V_ERR_INVALID_PURPOSE);
    }
}

static void test_files(void **state)
{
    (void)state;
    cert_authority_destroy(make_all());
    for (uint32_t i = 0; i <= CERT_ROLES; i++) {
        char name[64];
        struct stat info;
        const char *role = i < CERT_ROLES ? cert_roles[i] : "ca";
        snprintf(name, sizeof(name), "%s.key", role);
        assert_int_equal(stat(path_of(name), &info), 0);
        assert_int_equal(info.st_mode & 0777, 0600);
        FILE *file = fopen(path_of(name), "r");
        EVP_PKEY *key = PEM_read_PrivateKey(file, NULL, NULL, NULL);
        fclose(file);
        snprintf(name, sizeof(name), "%s.crt", role);
        assert_int_equal(stat(path_of(name), &info), 0);
        assert_int_equal(info.st_mode & 0777, 0600);
        X509 *cert = read_cert(name);
        assert_int_equal(X509_check_private_key(cert, key), 1);
        X509_free(cert);
        EVP_PKEY_free(key);
    }
}

static void test_times_and_authorities(void **state)
{
    (void)state;
    cm_error err = {0};
    cert_authority *authority = make_all(), *other, *again;
    cert_request request = {"worker", "localhost", -2 * DAY_S, -DAY_S};
    assert_int_equal(cert_make(authority, g_dir, &request, &err), CM_OK);
    assert_int_equal(verify("worker.crt", X509_PURPOSE_SSL_CLIENT), X509_V_ERR_CERT_HAS_EXPIRED);
    request.from_s = DAY_S;
    request.until_s = 2 * DAY_S;
    assert_int_equal(cert_make(authority, g_dir, &request, &err), CM_OK);
    assert_int_equal(verify("worker.crt", X509_PURPOSE_SSL_CLIENT), X509_V_ERR_CERT_NOT_YET_VALID);
    request.from_s = -DAY_S;
    assert_int_equal(cert_authority_create(10 * DAY_S, &other, &err), CM_OK);
    assert_int_equal(cert_make(other, g_dir, &request, &err), CM_OK);
    assert_int_equal(verify("worker.crt", X509_PURPOSE_SSL_CLIENT),
                     X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY);
    /* what was saved is the same authority */
    assert_int_equal(cert_authority_load(g_dir, &again, &err), CM_OK);
    assert_int_equal(cert_make(again, g_dir, &request, &err), CM_OK);
    assert_int_equal(verify("worker.crt", X509_PURPOSE_SSL_CLIENT), X509_V_OK);
    cert_authority_destroy(authority);
    cert_authority_destroy(other);
    cert_authority_destroy(again);
}

static void test_bad_input(void **state)
{
    (void)state;
    cm_error err = {0};
    cert_authority *authority = make_all(), *none;
    static const char *const hosts[] = {"", "two words", "a,,b", "IP:1.2.3.4", ".x"};
    for (uint32_t i = 0; i < sizeof(hosts) / sizeof(hosts[0]); i++) {
        cert_request request = {"worker", hosts[i], 0, DAY_S};
        assert_int_equal(cert_make(authority, g_dir, &request, &err), CM_E_INVALID);
    }
    cert_request request = {"worker", "localhost", 0, DAY_S};
    assert_int_equal(cert_make(authority, "/proc/none", &request, &err), CM_E_IO);
    assert_non_null(strstr(err.text, "/proc/none"));
    assert_int_equal(cert_authority_load("/proc/none", &none, &err), CM_E_IO);
    FILE *file = fopen(path_of("ca.key"), "w");
    fputs("no key\n", file);
    fclose(file);
    assert_int_equal(cert_authority_load(g_dir, &none, &err), CM_E_CORRUPT);
    cert_authority_destroy(authority);
}

static int make_dir(void **state)
{
    (void)state;
    t_folder_make(g_dir, "cert_maker");
    return 0;
}

static int remove_dir(void **state)
{
    (void)state;
    t_folder_remove(g_dir);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_roles),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_times_and_authorities),
        cmocka_unit_test(test_bad_input),
    };
    return cmocka_run_group_tests(tests, make_dir, remove_dir);
}
