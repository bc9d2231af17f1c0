/* Clients' TLS of the gateway with what goes wrong: plain HTTP to it, authorities that are not the client's,
 * an expired certificate, keys that do not fit; and requests that take too long, with TLS and without. */
#include <event2/buffer.h>
#include <event2/bufferevent_ssl.h>
#include <arpa/inet.h>
#include <netinet/in.h>
#include <openssl/ssl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include <cmocka.h>

#include "common/base/log.h"
#include "common/base/stats.h"
#include "common/proc/serve_tls.h"
#include "tests/support/temp_folder.h"
#include "tests/unit/gateway_rig.h"
#include "tools/baleen/cert_maker.h"

enum { DAY_S = 86400 };

static char g_folder[T_FOLDER_MAX], g_ours[T_FOLDER_MAX + 8], g_theirs[T_FOLDER_MAX + 8];
static cert_authority *g_authority;
static cm_bytes g_log;

static const char *path_of(const char *folder, const char *file)
{
    static char path[4][T_FOLDER_MAX + 64];
    static uint32_t i;
    char *out = path[i++ % 4];
    snprintf(out, sizeof(path[0]), "%s/%s", folder, file);
    return out;
}

static void take_line(void *ctx, cm_log_level level, const char *text)
{
    (void)ctx;
    if (level <= CM_LOG_INFO) {
        cm_bytes_append_text(&g_log, text);
        cm_bytes_append_text(&g_log, "\n");
    }
}

static void make_pair(const cert_authority *authority, const char *folder, int64_t from_s, int64_t until_s)
{
    const cert_request request = {
        .role = "coordinator", .hosts = "127.0.0.1", .from_s = from_s, .until_s = until_s};
    assert_int_equal(cert_make(authority, folder, &request, NULL), CM_OK);
}

static int begin(void **state)
{
    cert_authority *other;
    t_folder_make(g_folder, "tls");
    snprintf(g_ours, sizeof(g_ours), "%s/ours", g_folder);
    snprintf(g_theirs, sizeof(g_theirs), "%s/theirs", g_folder);
    assert_int_equal(mkdir(g_ours, 0700), 0);
    assert_int_equal(mkdir(g_theirs, 0700), 0);
    assert_int_equal(cert_authority_create(10 * DAY_S, &g_authority, NULL), CM_OK);
    assert_int_equal(cert_authority_create(10 * DAY_S, &other, NULL), CM_OK);
    assert_int_equal(cert_authority_save(g_authority, g_ours, NULL), CM_OK);
    assert_int_equal(cert_authority_save(other, g_theirs, NULL), CM_OK);
    make_pair(g_authority, g_ours, -DAY_S, DAY_S);
    make_pair(other, g_theirs, -DAY_S, DAY_S);
    cert_authority_destroy(other);
    cm_bytes_init(&g_log, 0);
    cm_log_handler(take_line, NULL);
    int rc = rig_setup(state);
    rig_set("serve_cert", path_of(g_ours, "coordinator.crt"));
    rig_set("serve_key", path_of(g_ours, "coordinator.key"));
    return rc;
}

static int finish(void **state)
{
    int failed = rig_teardown(state);
    cm_log_handler(NULL, NULL);
    cm_bytes_fini(&g_log);
    cert_authority_destroy(g_authority);
    t_folder_remove(g_folder);
    return failed;
}

/* ---- a client with TLS ---- */

typedef struct tls_client {
    SSL_CTX *ctx;
    struct bufferevent *bev;
    cm_bytes in;
    bool connected, closed;
    long verified; /* X509_V_OK or why the server's certificate was refused */
} tls_client;

static void tls_read(struct bufferevent *bev, void *arg)
{
    tls_client *c = arg;
    struct evbuffer *input = bufferevent_get_input(bev);
    size_t n = evbuffer_get_length(input);
    cm_bytes_append(&c->in, evbuffer_pullup(input, -1), n);
    evbuffer_drain(input, n);
}

static void tls_event(struct bufferevent *bev, short what, void *arg)
{
    tls_client *c = arg;
    c->connected = c->connected || (what & BEV_EVENT_CONNECTED) != 0;
    if ((what & (BEV_EVENT_EOF | BEV_EVENT_ERROR)) != 0) {
        c->verified = SSL_get_verify_result(bufferevent_openssl_get_ssl(bev));
        c->closed = true;
    }
}

static void tls_open(tls_client *c, const char *authority, int version_max, const char *text)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    *c = (tls_client){.ctx = SSL_CTX_new(TLS_client_method())};
    to.sin_port = htons((uint16_t)atoi(strrchr(gw_gateway_http(R.gateway), ':') + 1));
    assert_int_equal(SSL_CTX_load_verify_file(c->ctx, path_of(authority, "ca.crt")), 1);
    SSL_CTX_set_verify(c->ctx, SSL_VERIFY_PEER, NULL);
    assert_int_equal(SSL_CTX_set_max_proto_version(c->ctx, version_max), 1);
    SSL_CTX_set_security_level(c->ctx, 0); /* so that old versions are offered at all */
    cm_bytes_init(&c->in, 0);
    c->bev = bufferevent_openssl_socket_new(pc_loop_base(R.loop), -1, SSL_new(c->ctx),
                                            BUFFEREVENT_SSL_CONNECTING, BEV_OPT_CLOSE_ON_FREE);
    bufferevent_openssl_set_allow_dirty_shutdown(c->bev, 1);
    bufferevent_setcb(c->bev, tls_read, NULL, tls_event, c);
    bufferevent_enable(c->bev, EV_READ | EV_WRITE);
    bufferevent_write(c->bev, text, strlen(text));
    assert_int_equal(bufferevent_socket_connect(c->bev, (struct sockaddr *)&to, sizeof(to)), 0);
}

static void tls_close(tls_client *c)
{
    bufferevent_free(c->bev);
    SSL_CTX_free(c->ctx);
    cm_bytes_fini(&c->in);
}

static bool tls_is_closed(void *arg)
{
    return ((tls_client *)arg)->closed;
}

#define GET "GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"

static void expect_served(void)
{
    tls_client c;
    tls_open(&c, g_ours, TLS1_3_VERSION, GET);
    rig_until(tls_is_closed, &c);
    assert_true(c.connected);
    assert_non_null(strstr(cm_bytes_text(&c.in), "HTTP/1.1 200 OK"));
    tls_close(&c);
}

static void expect_no_handshake(const char *authority, int version_max, long why)
{
    tls_client c;
    tls_open(&c, authority, version_max, GET);
    rig_until(tls_is_closed, &c);
    assert_false(c.connected);
    assert_int_equal(c.verified, why);
    assert_int_equal(c.in.len, 0);
    tls_close(&c);
}

/* ---- what goes wrong ---- */

static void plain_to_tls(void **state)
{
    (void)state;
    rig_ready();
    expect_served();
    rig_client *plain = rig_open_raw(GET);
    rig_wait_closed(plain);
    assert_null(strstr(cm_bytes_text(&plain->in), "HTTP/1.1")); /* nothing is told in the clear */
    rig_close(plain);
    rig_client *noise = rig_open_raw("\x16\x03\x01\x02 this is no hello of anybody");
    rig_close(noise);
    expect_served();
}

static void who_does_not_trust_it(void **state)
{
    (void)state;
    rig_ready();
    expect_no_handshake(g_theirs, TLS1_3_VERSION, X509_V_ERR_UNABLE_TO_GET_ISSUER_CERT_LOCALLY);
    expect_no_handshake(g_ours, TLS1_1_VERSION, X509_V_OK); /* too old: it is the server that refuses */
    expect_served();
}

static void expired(void **state)
{
    (void)state;
    rig_ready();
    expect_served();
    assert_null(strstr(cm_bytes_text(&g_log), "expired"));
    make_pair(g_authority, g_ours, -2 * DAY_S, -DAY_S);
    for (int i = 0; i < 2; i++) {
        expect_no_handshake(g_ours, TLS1_3_VERSION, X509_V_ERR_CERT_HAS_EXPIRED);
    }
    const char *said = strstr(cm_bytes_text(&g_log), "coordinator.crt is expired");
    assert_non_null(said); /* an operator hears of it, once */
    assert_null(strstr(said + strlen("coordinator.crt is expired"), "is expired"));
    make_pair(g_authority, g_ours, -DAY_S, DAY_S);
    expect_served();
}

static void write_text(const char *path, const char *text)
{
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

/* At the start they are refused, later the last good ones stay in force. */
static void pairs_that_do_not_fit(void **state)
{
    (void)state;
    static const struct {
        bool theirs;
        const char *cert, *key, *said;
    } pairs[] = {
        {true, "coordinator.crt", "coordinator.key", "is not the key of"},
        {false, "none.crt", "coordinator.key", "none.crt"},
        {false, "coordinator.crt", "none.key", "none.key"},
        {false, "coordinator.key", "coordinator.key", "has no certificate in PEM form"},
        {false, "coordinator.crt", "coordinator.crt", "has no key without a password in PEM form"},
    };
    for (size_t i = 0; i < sizeof(pairs) / sizeof(pairs[0]); i++) {
        pc_serve_tls *tls;
        cm_error err = {0};
        assert_true(pc_serve_tls_open(path_of(g_ours, pairs[i].cert),
                                      path_of(pairs[i].theirs ? g_theirs : g_ours, pairs[i].key), &tls,
                                      &err) != CM_OK);
        if (strstr(err.text, pairs[i].said) == NULL) {
            fail_msg("%s", err.text);
        }
    }
    rig_ready();
    expect_served();
    write_text(path_of(g_ours, "coordinator.key"), "no key");
    expect_served();
    write_text(path_of(g_ours, "coordinator.crt"), "");
    expect_served();
    assert_non_null(strstr(cm_bytes_text(&g_log), "stays in force"));
}

/* ---- requests that take too long ---- */

typedef struct drip {
    struct bufferevent *bev;
    const bool *closed;
    pc_timer *timer;
} drip;

static void drip_byte(void *arg)
{
    drip *d = arg;
    if (!*d->closed) {
        bufferevent_write(d->bev, "a", 1);
        pc_timer_set(d->timer, 5);
    }
}

static void expect_too_slow(struct bufferevent *bev, const bool *closed, bool (*is_closed)(void *), void *arg)
{
    int64_t before = cm_stat_get(CM_STAT_requests_too_slow);
    drip d = {.bev = bev, .closed = closed};
    d.timer = pc_timer_create(R.loop, drip_byte, &d);
    pc_timer_set(d.timer, 0);
    rig_until(is_closed, arg);
    pc_timer_destroy(d.timer);
    assert_int_equal(cm_stat_get(CM_STAT_requests_too_slow), before + 1);
}

static bool plain_is_closed(void *arg)
{
    return ((rig_client *)arg)->closed;
}

#define HEADER "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-Drip: "
#define BODY   "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"

/* Never silent for as long as the limit, never complete. */
static void drips(void **state)
{
    (void)state;
    static const char *const starts[] = {HEADER, BODY};
    rig_set("http_timeout_ms", "100");
    rig_ready();
    for (size_t i = 0; i < 2; i++) {
        tls_client c;
        tls_open(&c, g_ours, TLS1_3_VERSION, starts[i]);
        expect_too_slow(c.bev, &c.closed, tls_is_closed, &c);
        tls_close(&c);
    }
    expect_served();
}

static void plain_drips(void **state)
{
    (void)state;
    static const char *const starts[] = {HEADER, BODY};
    rig_set("serve_cert", "");
    rig_set("serve_key", "");
    rig_set("http_timeout_ms", "100");
    rig_ready();
    for (size_t i = 0; i < 2; i++) {
        rig_client *client = rig_open_raw(starts[i]);
        expect_too_slow(client->bev, &client->closed, plain_is_closed, client);
        rig_close(client);
    }
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
#define TEST(fn) cmocka_unit_test_setup_teardown(fn, begin, finish)
    const struct CMUnitTest tests[] = {
        TEST(plain_to_tls), TEST(who_does_not_trust_it), TEST(expired), TEST(pairs_that_do_not_fit),
        TEST(drips),        TEST(plain_drips),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
