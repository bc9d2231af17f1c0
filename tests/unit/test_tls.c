/* The control channel's TLS: what a configuration is worth, who is let in, and what a person reads when not.
 */
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <grpc/support/time.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/proc/rpc_client.h"
#include "common/proc/rpc_server.h"
#include "tests/support/temp_folder.h"
#include "tools/baleen/cert_maker.h"

enum { DAY_S = 86400, CALL_MS = 20000 };

/* ours/: all roles of one authority, and expired.crt; theirs/: another authority. */
static char g_root[T_FOLDER_MAX];

static struct {
    pc_loop *loop;
    pc_tls *tls;
    pc_rpc_server *server;
    char address[128];
    uint32_t n_calls; /* that a handler saw */
    char role[64];    /* of the last one */
} g;

/* ---- files ---- */

static void path_of(char out[256], const char *folder, const char *file)
{
    snprintf(out, 256, "%s/%s/%s", g_root, folder, file);
}

static char *text_of(const char *folder, const char *file)
{
    char path[256];
    path_of(path, folder, file);
    FILE *in = fopen(path, "r");
    assert_non_null(in);
    char *text = cm_alloc(8192);
    text[fread(text, 1, 8191, in)] = '\0';
    fclose(in);
    return text;
}

static void write_text(const char *folder, const char *file, const char *text)
{
    char path[256];
    path_of(path, folder, file);
    FILE *out = fopen(path, "w");
    assert_non_null(out);
    fputs(text, out);
    fclose(out);
}

static void make_role(const cert_authority *authority, const char *folder, const char *role,
                      const char *hosts, int64_t until_s)
{
    char dir[256];
    cm_error err = {0};
    path_of(dir, folder, "");
    cert_request request = {role, hosts, -10 * DAY_S, until_s};
    assert_int_equal(cert_make(authority, dir, &request, &err), CM_OK);
}

static cert_authority *make_folder(const char *folder)
{
    char dir[256], command[300];
    cm_error err = {0};
    cert_authority *authority;
    path_of(dir, folder, "");
    snprintf(command, sizeof(command), "mkdir -p %s", dir);
    assert_int_equal(system(command), 0);
    assert_int_equal(cert_authority_create(20 * DAY_S, &authority, &err), CM_OK);
    assert_int_equal(cert_authority_save(authority, dir, &err), CM_OK);
    for (uint32_t i = 0; i < CERT_ROLES; i++) {
        make_role(authority, folder, cert_roles[i], "localhost,127.0.0.1", DAY_S);
    }
    return authority;
}

/* ---- configurations ---- */

typedef struct files {
    char security[16], ca[256], cert[256], key[256];
} files;

static files files_of(const char *folder, const char *role)
{
    files f = {"auto", "", "", ""};
    char name[64];
    path_of(f.ca, folder, "ca.crt");
    snprintf(name, sizeof(name), "%s.crt", role);
    path_of(f.cert, folder, name);
    snprintf(name, sizeof(name), "%s.key", role);
    path_of(f.key, folder, name);
    return f;
}

static cm_status open_files(files *f, const char *address, const char *role, pc_tls **tls_out, cm_error *err)
{
    pc_tls_config config = {f->security, f->ca, f->cert, f->key};
    return pc_tls_open(&config, address, role, tls_out, err);
}

static void assert_refused(files *f, const char *address, const char *role, const char *words)
{
    cm_error err = {0};
    pc_tls *tls = NULL;
    assert_int_equal(open_files(f, address, role, &tls, &err), CM_E_CONFIG);
    assert_null(tls);
    if (strstr(err.text, words) == NULL) {
        fail_msg("'%s' does not say '%s'", err.text, words);
    }
}

static bool g_log_plain;

static void log_watch(void *ctx, cm_log_level level, const char *text)
{
    (void)ctx;
    (void)level;
    g_log_plain |= strstr(text, "plain, neither authenticated nor encrypted") != NULL;
}

static void test_plain(void **state)
{
    (void)state;
    static const char *const near[] = {"127.0.0.1:0", "localhost:7", "127.9.9.9:1", "[::1]:80",
                                       "[0:0::1]:80"};
    static const char *const far[] = {"10.0.0.1:7000", "0.0.0.0:7000",   "host-a:7000", "1270.0.0.1:3",
                                      "[::]:7000",     "[fd00::1]:7000", "::1"};
    files none = {"auto", "", "", ""};
    cm_error err = {0};
    pc_tls *tls;
    for (size_t i = 0; i < sizeof(near) / sizeof(near[0]); i++) {
        g_log_plain = false;
        cm_log_handler(log_watch, NULL);
        cm_status status = open_files(&none, near[i], "worker", &tls, &err);
        cm_log_handler(NULL, NULL);
        assert_int_equal(status, CM_OK);
        assert_null(tls);
        assert_true(g_log_plain);
    }
    for (size_t i = 0; i < sizeof(far) / sizeof(far[0]); i++) {
        assert_refused(&none, far[i], "worker", "baleen certs");
        assert_refused(&none, far[i], "worker", "--control-security plain");
    }
    snprintf(none.security, sizeof(none.security), "plain");
    assert_int_equal(open_files(&none, "10.0.0.1:7000", "worker", &tls, &err), CM_OK);
    assert_null(tls);
    snprintf(none.security, sizeof(none.security), "tls");
    assert_refused(&none, "127.0.0.1:0", "worker", "all three");
}

static void test_bad_files(void **state)
{
    (void)state;
    files f = files_of("ours", "worker");
    snprintf(f.security, sizeof(f.security), "plain");
    assert_refused(&f, "127.0.0.1:0", "worker", "no use for certificates");
    f = files_of("ours", "worker");
    f.key[0] = '\0';
    assert_refused(&f, "127.0.0.1:0", "worker", "all three");
    f = files_of("ours", "nobody");
    assert_refused(&f, "127.0.0.1:0", "worker", "cannot read");
    f = files_of("ours", "worker");
    assert_refused(&f, "127.0.0.1:0", "router", "give router.crt");
    path_of(f.key, "ours", "router.key");
    assert_refused(&f, "127.0.0.1:0", "worker", "is not the key of");
    path_of(f.key, "ours", "worker.crt");
    assert_refused(&f, "127.0.0.1:0", "worker", "has no key");
    f = files_of("ours", "worker");
    path_of(f.cert, "ours", "worker.key");
    assert_refused(&f, "127.0.0.1:0", "worker", "has no certificate");
    f = files_of("theirs", "worker");
    path_of(f.ca, "ours", "ca.crt");
    assert_refused(&f, "127.0.0.1:0", "worker", "was not signed by the authority");
    f = files_of("expired", "worker");
    assert_refused(&f, "127.0.0.1:0", "worker", "baleen certs --renew");
}

/* ---- calls ---- */

static void any_message(pc_call *call, const uint8_t *data, size_t n_bytes)
{
    g.n_calls++;
    snprintf(g.role, sizeof(g.role), "%s", pc_call_role(call) != NULL ? pc_call_role(call) : "plain");
    assert_int_equal(pc_call_send(call, data, n_bytes), CM_OK);
    pc_call_finish(call, PC_CODE_OK, NULL, NULL, 0, 0);
}

static void any_closed(pc_call *call, bool cancelled)
{
    (void)call;
    (void)cancelled;
}

static const pc_method g_methods[] = {
    {.path = "/t.Any/Call", .message = any_message, .closed = any_closed},
    {.path = "/t.Admin/Call", .message = any_message, .closed = any_closed, .role = "admin"},
};

static void server_start(files *f)
{
    cm_error err = {0};
    assert_int_equal(open_files(f, "127.0.0.1:0", "coordinator", &g.tls, &err), CM_OK);
    pc_rpc_options options = {.address = "127.0.0.1:0",
                              .request_bytes_max = 1000,
                              .calls_max = 8,
                              .queue_bytes_max = 10000,
                              .tls = g.tls};
    assert_int_equal(pc_rpc_server_create(g.loop, &options, g_methods, 2, &g.server, g.address, &err), CM_OK);
    g.n_calls = 0;
}

static void server_stop(void)
{
    pc_rpc_server_destroy(g.server);
    pc_tls_close(g.tls);
}

static cm_status call_with(pc_tls *tls, const char *address, const char *path, cm_error *err)
{
    cm_bytes reply;
    cm_bytes_init(&reply, 0);
    pc_channel *channel = pc_channel_create_tls(g.loop, address, tls);
    cm_status status = pc_unary_wait(channel, path, "word", 4, CALL_MS, &reply, err);
    assert_true(status != CM_OK || strcmp(cm_bytes_text(&reply), "word") == 0);
    pc_channel_destroy(channel);
    cm_bytes_fini(&reply);
    return status;
}

static cm_status call_as(const char *folder, const char *role, const char *path, cm_error *err)
{
    pc_tls *tls;
    files f = files_of(folder, role);
    assert_int_equal(open_files(&f, g.address, role, &tls, err), CM_OK);
    cm_status status = call_with(tls, g.address, path, err);
    pc_tls_close(tls);
    return status;
}

static void test_good(void **state)
{
    (void)state;
    files f = files_of("ours", "coordinator");
    cm_error err = {0};
    server_start(&f);
    for (uint32_t i = 1; i < CERT_ROLES; i++) {
        assert_int_equal(call_as("ours", cert_roles[i], "/t.Any/Call", &err), CM_OK);
        assert_string_equal(g.role, cert_roles[i]);
        assert_int_equal(g.n_calls, i);
    }
    server_stop();
}

static void test_admin_only(void **state)
{
    (void)state;
    files f = files_of("ours", "coordinator");
    cm_error err = {0};
    server_start(&f);
    assert_int_equal(call_as("ours", "worker", "/t.Admin/Call", &err), CM_E_REFUSED);
    assert_non_null(strstr(err.text, "role admin, yours is of role worker"));
    assert_int_equal(g.n_calls, 0);
    assert_int_equal(call_as("ours", "admin", "/t.Admin/Call", &err), CM_OK);
    assert_int_equal(g.n_calls, 1);
    server_stop();
}

/* ---- strangers: gRPC clients with what pc_tls would not open ---- */

typedef struct stranger {
    grpc_channel_credentials *credentials;
    grpc_status_code code;
} stranger;

static void *stranger_main(void *arg)
{
    stranger *s = arg;
    grpc_channel *channel = grpc_channel_create(g.address, s->credentials, NULL);
    grpc_completion_queue *cq = grpc_completion_queue_create_for_pluck(NULL);
    gpr_timespec deadline =
        gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis(CALL_MS, GPR_TIMESPAN));
    grpc_call *call =
        grpc_channel_create_call(channel, NULL, GRPC_PROPAGATE_DEFAULTS, cq,
                                 grpc_slice_from_static_string("/t.Any/Call"), NULL, deadline, NULL);
    grpc_metadata_array trailers;
    grpc_slice text;
    grpc_metadata_array_init(&trailers);
    grpc_op ops[2] = {{.op = GRPC_OP_SEND_INITIAL_METADATA}, {.op = GRPC_OP_RECV_STATUS_ON_CLIENT}};
    ops[1].data.recv_status_on_client.trailing_metadata = &trailers;
    ops[1].data.recv_status_on_client.status = &s->code;
    ops[1].data.recv_status_on_client.status_details = &text;
    assert_int_equal(grpc_call_start_batch(call, ops, 2, s, NULL), GRPC_CALL_OK);
    grpc_completion_queue_pluck(cq, s, gpr_inf_future(GPR_CLOCK_MONOTONIC), NULL);
    grpc_slice_unref(text);
    grpc_metadata_array_destroy(&trailers);
    grpc_call_unref(call);
    grpc_completion_queue_shutdown(cq);
    grpc_completion_queue_destroy(cq);
    grpc_channel_destroy(channel);
    pc_loop_stop(g.loop);
    return NULL;
}

/* UNAVAILABLE, and no handler heard of it. */
static void assert_stranger_refused(grpc_channel_credentials *credentials)
{
    pthread_t thread;
    stranger s = {.credentials = credentials};
    g.n_calls = 0;
    assert_int_equal(pthread_create(&thread, NULL, stranger_main, &s), 0);
    pc_loop_run(g.loop);
    pthread_join(thread, NULL);
    assert_int_equal(s.code, GRPC_STATUS_UNAVAILABLE);
    assert_int_equal(g.n_calls, 0);
    grpc_channel_credentials_release(credentials);
}

/* Trusts our server; shows cert NULL: none. */
static grpc_channel_credentials *credentials_of(const char *folder, const char *role)
{
    char name[64];
    char *ca = text_of("ours", "ca.crt"), *cert = NULL, *key = NULL;
    if (role != NULL) {
        snprintf(name, sizeof(name), "%s.crt", role);
        cert = text_of(folder, name);
        snprintf(name, sizeof(name), "%s.key", role);
        key = text_of(folder, name);
    }
    grpc_ssl_pem_key_cert_pair pair = {.private_key = key, .cert_chain = cert};
    grpc_channel_credentials *credentials =
        grpc_ssl_credentials_create(ca, role != NULL ? &pair : NULL, NULL, NULL);
    cm_free(ca);
    cm_free(cert);
    cm_free(key);
    return credentials;
}

static void test_strangers(void **state)
{
    (void)state;
    files f = files_of("ours", "coordinator");
    server_start(&f);
    assert_stranger_refused(credentials_of(NULL, NULL));
    assert_stranger_refused(credentials_of("theirs", "worker"));
    assert_stranger_refused(credentials_of("expired", "worker"));
    assert_stranger_refused(grpc_insecure_credentials_create());
    cm_error err = {0};
    assert_int_equal(call_as("ours", "worker", "/t.Any/Call", &err),
                     CM_OK); /* and they have spoiled nothing */
    server_stop();
}

/* ---- what a person reads ---- */

typedef struct question {
    pc_tls *tls;
    const char *address;
    char text[400];
    bool found;
} question;

static void *question_main(void *arg)
{
    question *q = arg;
    q->found = pc_tls_explain(q->tls, q->address, q->text, sizeof(q->text));
    pc_loop_stop(g.loop);
    return NULL;
}

static void assert_explained(pc_tls *tls, const char *address, const char *words)
{
    pthread_t thread;
    question q = {.tls = tls, .address = address};
    assert_int_equal(pthread_create(&thread, NULL, question_main, &q), 0);
    pc_loop_run(g.loop);
    pthread_join(thread, NULL);
    assert_int_equal(q.found, words != NULL);
    if (words != NULL && (strstr(q.text, words) == NULL || strstr(q.text, address) == NULL)) {
        fail_msg("'%s' does not say '%s' of %s", q.text, words, address);
    }
}

static void test_explain(void **state)
{
    (void)state;
    cm_error err = {0};
    pc_tls *ours, *theirs, *both;
    files f = files_of("ours", "coordinator");
    server_start(&f);
    f = files_of("ours", "worker");
    assert_int_equal(open_files(&f, g.address, "worker", &ours, &err), CM_OK);
    assert_explained(ours, g.address, NULL);
    /* a server of another authority; ours does not know it either */
    f = files_of("theirs", "worker");
    assert_int_equal(open_files(&f, g.address, "worker", &theirs, &err), CM_OK);
    assert_int_equal(call_with(theirs, g.address, "/t.Any/Call", &err), CM_E_UNAVAILABLE);
    assert_explained(theirs, g.address, "an authority that is not ours");
    /* we trust both authorities, the server does not */
    char *ca = text_of("ours", "ca.crt"), *more = text_of("theirs", "ca.crt"), *two = cm_alloc(20000);
    snprintf(two, 20000, "%s%s", ca, more);
    write_text("theirs", "both.crt", two);
    path_of(f.ca, "theirs", "both.crt");
    assert_int_equal(open_files(&f, g.address, "worker", &both, &err), CM_OK);
    assert_int_equal(call_with(both, g.address, "/t.Any/Call", &err), CM_E_UNAVAILABLE);
    assert_explained(both, g.address, "refuses our certificate");
    server_stop();
    cm_free(ca);
    cm_free(more);
    cm_free(two);

    pc_rpc_options options = {
        .address = "127.0.0.1:0", .request_bytes_max = 1000, .calls_max = 8, .queue_bytes_max = 10000};
    assert_int_equal(pc_rpc_server_create(g.loop, &options, g_methods, 2, &g.server, g.address, &err), CM_OK);
    assert_int_equal(call_with(ours, g.address, "/t.Any/Call", &err), CM_E_UNAVAILABLE);
    assert_explained(ours, g.address, "does not speak TLS");
    pc_rpc_server_destroy(g.server);
    assert_explained(ours, g.address, NULL); /* nobody there: not TLS's affair */
    pc_tls_close(ours);
    pc_tls_close(theirs);
    pc_tls_close(both);
}

static void test_wrong_name(void **state)
{
    (void)state;
    cm_error err = {0};
    pc_tls *tls;
    cert_authority *authority = make_folder("named");
    make_role(authority, "named", "coordinator", "host-a.example,10.1.2.3", DAY_S);
    files f = files_of("named", "coordinator");
    server_start(&f);
    f = files_of("named", "worker");
    assert_int_equal(open_files(&f, g.address, "worker", &tls, &err), CM_OK);
    assert_int_equal(call_with(tls, g.address, "/t.Any/Call", &err), CM_E_UNAVAILABLE);
    assert_explained(tls, g.address, "does not name 127.0.0.1");
    assert_int_equal(g.n_calls, 0);
    pc_tls_close(tls);
    server_stop();
    cert_authority_destroy(authority);
}

/* A whole new authority on disk: the next handshake is under it, on both sides, without a restart. */
static void test_rotation(void **state)
{
    (void)state;
    cm_error err = {0};
    pc_tls *tls;
    cert_authority_destroy(make_folder("turning"));
    files f = files_of("turning", "coordinator");
    server_start(&f);
    f = files_of("turning", "worker");
    assert_int_equal(open_files(&f, g.address, "worker", &tls, &err), CM_OK);
    assert_int_equal(call_with(tls, g.address, "/t.Any/Call", &err), CM_OK);
    cert_authority_destroy(make_folder("turning"));
    assert_int_equal(call_with(tls, g.address, "/t.Any/Call", &err), CM_OK);
    assert_int_equal(call_as("turning", "router", "/t.Any/Call", &err), CM_OK); /* knows the new one alone */
    /* half a renewal: the last good files stay */
    write_text("turning", "coordinator.key", "not yet\n");
    write_text("turning", "worker.crt", "not yet\n");
    assert_int_equal(call_with(tls, g.address, "/t.Any/Call", &err), CM_OK);
    pc_tls_close(tls);
    server_stop();
}

/* ---- all ---- */

static int setup(void **state)
{
    (void)state;
    t_folder_make(g_root, "tls");
    if (pc_loop_create(&g.loop) != CM_OK) {
        return -1;
    }
    cert_authority_destroy(make_folder("ours"));
    cert_authority_destroy(make_folder("theirs"));
    /* signed by ours, ended a day ago */
    char dir[256], command[600];
    cm_error err = {0};
    cert_authority *authority;
    path_of(dir, "ours", "");
    snprintf(command, sizeof(command), "cp -r %s/ours %s/expired", g_root, g_root);
    if (system(command) != 0 || cert_authority_load(dir, &authority, &err) != CM_OK) {
        return -1;
    }
    make_role(authority, "expired", "worker", "localhost", -DAY_S);
    cert_authority_destroy(authority);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    pc_loop_destroy(g.loop);
    t_folder_remove(g_root);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_plain),      cmocka_unit_test(test_bad_files), cmocka_unit_test(test_good),
        cmocka_unit_test(test_admin_only), cmocka_unit_test(test_strangers), cmocka_unit_test(test_explain),
        cmocka_unit_test(test_wrong_name), cmocka_unit_test(test_rotation),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
