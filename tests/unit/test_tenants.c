/* The key file and who is found by it, taken up again when it changes; traceparents; the counters' text. */
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
#include "gateway/key_file.h"
#include "gateway/telemetry.h"
#include "gateway/tenants.h"
#include "gateway/visit.h"
#include "tests/support/temp_folder.h"

#define SALT "00112233445566778899aabbccddeeff"
#define HASH "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

/* The hash of a key by SALT, for files. */
static const char *hash_of(const char *key)
{
    static char text[2 * GW_KEY_HASH_BYTES + 1];
    uint8_t salt[16], hash[GW_KEY_HASH_BYTES];
    assert_int_equal(gw_hex_read(SALT, salt, sizeof(salt)), sizeof(salt));
    gw_key_hash(salt, sizeof(salt), key, hash);
    gw_hex_write(hash, sizeof(hash), text);
    return text;
}

/* ---- the file ---- */

/* RFC 4231, test case 2: key "Jefe", data "what do ya want for nothing?". */
static void hash_is_hmac(void **state)
{
    (void)state;
    uint8_t hash[GW_KEY_HASH_BYTES];
    char text[2 * GW_KEY_HASH_BYTES + 1];
    gw_key_hash((const uint8_t *)"Jefe", 4, "what do ya want for nothing?", hash);
    gw_hex_write(hash, sizeof(hash), text);
    assert_string_equal(text, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

static void files_that_are_none(void **state)
{
    (void)state;
    static const struct {
        const char *text, *said;
    } files[] = {
        {"", "line 1"},
        {"{\"salt\":\"" SALT "\",\n\"tenants\":[}", "line 2"},
        {"[]", "the file must be an object"},
        {"{\"tenants\":[]}", "the file needs a salt"},
        {"{\"salt\":\"0011\",\"tenants\":[]}", "the file needs a salt"},
        {"{\"salt\":\"" SALT "\"}", "the file needs tenants"},
        {"{\"salt\":\"" SALT "\",\"tenants\":[],\"tenant\":1}", "'tenant', which is not known"},
        {"{\"salt\":\"" SALT "\",\"tenants\":[7]}", "tenants[0] must be an object"},
        {"{\"salt\":\"" SALT "\",\"tenants\":[{\"keys\":[]}]}", "tenants[0] needs a name"},
        {"{\"salt\":\"" SALT "\",\"tenants\":[{\"name\":\"a b\",\"keys\":[]}]}", "tenants[0] needs a name"},
        {"{\"salt\":\"" SALT "\",\"tenants\":[{\"name\":\"a\"}]}", "tenants[0] needs keys"},
        {"{\"salt\":\"" SALT "\",\"tenants\":[{\"name\":\"a\",\"keys\":[]},{\"name\":\"a\",\"keys\":[]}]}",
         "tenants[1] has the name of another"},
        {"{\"salt\":\"" SALT "\",\"tenants\":[{\"name\":\"a\",\"keys\":[],\"wieght\":2}]}",
         "tenants[0] has 'wieght'"},
        {"{\"salt\":\"" SALT "\",\"tenants\":[{\"name\":\"a\",\"keys\":[],\"weight\":0}]}",
         "tenants[0].weight must be a whole number from 1 to 1000"},
        {"{\"salt\":\"" SALT "\",\"tenants\":[{\"name\":\"a\",\"keys\":[],\"tokens_per_minute\":-1}]}",
         "tenants[0].tokens_per_minute must be"},
        {"{\"salt\":\"" SALT "\",\"tenants\":[{\"name\":\"a\",\"keys\":[],\"operator\":1}]}", "operator"},
        {"{\"salt\":\"" SALT "\",\"tenants\":[{\"name\":\"a\",\"keys\":[{\"hash\":\"00\"}]}]}",
         "tenants[0].keys[0] needs a hash"},
        {"{\"salt\":\"" SALT "\",\"tenants\":[{\"name\":\"a\",\"keys\":[{\"hash\":\"" HASH "\"}]},"
         "{\"name\":\"b\",\"keys\":[{\"hash\":\"" HASH "\"}]}]}",
         "has a key that is in the file twice"},
    };
    for (size_t i = 0; i < sizeof(files) / sizeof(files[0]); i++) {
        gw_key_file file;
        cm_error err = {0};
        assert_int_equal(gw_key_file_read(files[i].text, strlen(files[i].text), &file, &err), CM_E_CONFIG);
        if (strstr(err.text, files[i].said) == NULL) {
            fail_msg("file %zu: %s", i, err.text);
        }
    }
}

static void file_that_is_one(void **state)
{
    (void)state;
    gw_key_file file;
    cm_error err = {0};
    char text[1024];
    int n = snprintf(
        text, sizeof(text),
        "{\"salt\":\"%s\",\"tenants\":[{\"name\":\"a\",\"weight\":3,\"running_max\":4,\"queue_max\":0,"
        "\"requests_per_minute\":5,\"tokens_per_minute\":6,\"operator\":true,\"keys\":["
        "{\"name\":\"x\",\"hash\":\"%s\"}]},{\"name\":\"b.-_9\",\"keys\":[]}]}",
        SALT, hash_of("secret"));
    assert_int_equal(gw_key_file_read(text, (size_t)n, &file, &err), CM_OK);
    const gw_key_tenant *a = gw_key_file_find(&file, "secret");
    assert_non_null(a);
    assert_string_equal(a->name, "a");
    assert_int_equal(a->limits.weight, 3);
    assert_int_equal(a->limits.running_max, 4);
    assert_int_equal(a->limits.queue_max, 0);
    assert_int_equal(a->limits.requests_per_minute, 5);
    assert_int_equal(a->limits.tokens_per_minute, 6);
    assert_true(a->is_operator);
    assert_false(file.tenants[1].is_operator);
    assert_int_equal(file.tenants[1].limits.weight, 1);
    assert_null(gw_key_file_find(&file, "secre"));
    assert_null(gw_key_file_find(&file, ""));
    assert_null(gw_key_file_find(&file, hash_of("secret"))); /* the hash opens nothing */
    gw_key_file_free(&file);
}

/* ---- taken up again ---- */

typedef struct world {
    pc_loop *loop;
    gw_turns turns;
    gw_tenants *tenants;
    char folder[T_FOLDER_MAX], path[T_FOLDER_MAX + 16];
    char said[512]; /* the last line of the log */
} world;
static world W;

static void take_line(void *ctx, cm_log_level level, const char *text)
{
    (void)ctx;
    (void)level;
    snprintf(W.said, sizeof(W.said), "%s", text);
}

static void write_file(const char *format, ...)
{
    va_list args;
    char temporary[T_FOLDER_MAX + 32];
    snprintf(temporary, sizeof(temporary), "%s.new", W.path);
    FILE *file = fopen(temporary, "w");
    assert_non_null(file);
    va_start(args, format);
    vfprintf(file, format, args);
    va_end(args);
    fclose(file);
    assert_int_equal(rename(temporary, W.path), 0);
}

static int begin(void **state)
{
    (void)state;
    t_folder_make(W.folder, "tenants");
    snprintf(W.path, sizeof(W.path), "%s/keys.json", W.folder);
    assert_int_equal(pc_loop_create(&W.loop), CM_OK);
    gw_turns_init(&W.turns, 100);
    cm_log_handler(take_line, NULL);
    return 0;
}

static int finish(void **state)
{
    (void)state;
    cm_log_handler(NULL, NULL);
    gw_tenants_destroy(W.tenants);
    W.tenants = NULL;
    gw_turns_fini(&W.turns);
    pc_loop_destroy(W.loop);
    t_folder_remove(W.folder);
    return 0;
}

static void give_up(void *arg)
{
    (void)arg;
    fail_msg("the awaited line did not come; the last one: %s", W.said);
}

static const char *g_awaited;

static void line_came(void *arg)
{
    (void)arg;
    if (strstr(W.said, g_awaited) != NULL) {
        pc_loop_stop(W.loop);
    }
}

static void run_until_said(const char *text)
{
    pc_timer *watchdog = pc_timer_create(W.loop, give_up, NULL);
    pc_timer_set(watchdog, 60000);
    W.said[0] = 0;
    g_awaited = text;
    pc_loop_run(W.loop);
    pc_timer_destroy(watchdog);
}

static const char *whose(const char *authorization, const char *key)
{
    gw_tenant *tenant;
    gw_error error;
    if (gw_tenants_identify(W.tenants, authorization, key, &tenant, &error) != CM_OK) {
        assert_int_equal(error.cause, GW_CAUSE_UNAUTHENTICATED);
        assert_null(strstr(error.message, "key-of")); /* never told back */
        return "nobody";
    }
    return gw_tenant_name(tenant);
}

static void keys_change(void **state)
{
    (void)state;
    cm_error err = {0};
    gw_tenant_state a;
    pc_loop_before_sleep(W.loop, line_came, NULL);
    write_file("{\"salt\":\"%s\",\"tenants\":[{\"name\":\"a\",\"keys\":[{\"hash\":\"%s\"}]}]}", SALT,
               hash_of("key-of-a"));
    assert_int_equal(gw_tenants_create(W.loop, W.path, &W.turns, &W.tenants, &err), CM_OK);
    assert_true(gw_tenants_has_file(W.tenants));
    assert_string_equal(whose("Bearer key-of-a", NULL), "a");
    assert_string_equal(whose("bearer   key-of-a", NULL), "a");
    assert_string_equal(whose(NULL, "key-of-a"), "a");
    assert_string_equal(whose("Bearer key-of-b", "key-of-a"), "a");
    assert_string_equal(whose("key-of-a", NULL), "nobody");
    assert_string_equal(whose("Basic key-of-a", NULL), "nobody");
    assert_string_equal(whose("Bearer key-of-b", NULL), "nobody");
    assert_string_equal(whose("Bearer ", NULL), "nobody");
    assert_string_equal(whose(NULL, NULL), "nobody");

    gw_tenant *before = gw_turns_find_tenant(&W.turns, "a");
    write_file("{\"salt\":\"%s\",\"tenants\":[{\"name\":\"b\",\"keys\":[{\"hash\":\"%s\"}]},"
               "{\"name\":\"a\",\"weight\":7,\"operator\":true,\"keys\":[]}]}",
               SALT, hash_of("key-of-b"));
    run_until_said("2 tenants, 1 keys");
    assert_string_equal(whose("Bearer key-of-b", NULL), "b");
    assert_string_equal(whose("Bearer key-of-a", NULL), "nobody"); /* taken out */
    assert_ptr_equal(gw_turns_find_tenant(&W.turns, "a"), before);
    gw_tenant_get(before, &a);
    assert_int_equal(a.limits.weight, 7);
    assert_true(gw_tenants_is_operator(W.tenants, before));
    assert_false(gw_tenants_is_operator(W.tenants, gw_turns_find_tenant(&W.turns, "b")));
    assert_int_equal(W.turns.weights, 8);

    write_file("{\"salt\":\"%s\",\n \"tenants\":[{\"name\":\"b\"", SALT);
    run_until_said("the keys read before stay in force");
    assert_non_null(strstr(W.said, W.path));
    assert_non_null(strstr(W.said, "line 2"));
    assert_string_equal(whose("Bearer key-of-b", NULL), "b");

    unlink(W.path);
    run_until_said("cannot read");
    assert_string_equal(whose("Bearer key-of-b", NULL), "b");

    write_file("{\"salt\":\"%s\",\"tenants\":[{\"name\":\"b\",\"keys\":[{\"hash\":\"%s\"}]}]}", SALT,
               hash_of("key-of-b"));
    run_until_said("1 tenants, 1 keys");
    gw_tenant_get(before, &a);
    assert_false(a.in_force);
    assert_int_equal(W.turns.weights, 1);
}

static void no_file(void **state)
{
    (void)state;
    cm_error err = {0};
    assert_int_equal(gw_tenants_create(W.loop, "", &W.turns, &W.tenants, &err), CM_OK);
    assert_string_equal(whose(NULL, NULL), "default");
    assert_string_equal(whose("Bearer anything", NULL), "default");
    assert_true(gw_tenants_is_operator(W.tenants, gw_turns_find_tenant(&W.turns, "default")));
}

static void bad_file_at_start(void **state)
{
    (void)state;
    cm_error err = {0};
    write_file("{}");
    assert_int_equal(gw_tenants_create(W.loop, W.path, &W.turns, &W.tenants, &err), CM_E_CONFIG);
    assert_string_equal(err.field, "key_file");
    assert_non_null(strstr(err.text, "needs a salt"));
}

/* ---- traces ---- */

static void traceparents(void **state)
{
    (void)state;
#define ID     "4bf92f3577b34da6a3ce929d0e0e4736"
#define PARENT "00f067aa0ba902b7"
    static const char *const good[] = {"00-" ID "-" PARENT "-01", "00-" ID "-" PARENT "-00",
                                       "cc-" ID "-" PARENT "-01", "cc-" ID "-" PARENT "-01-what-will-be"};
    static const char *const bad[] = {"",
                                      "00",
                                      "00-" ID "-" PARENT,
                                      "00-" ID "-" PARENT "-0",
                                      "00-" ID "-" PARENT "-01-more",
                                      "00-" ID "-" PARENT "-01x",
                                      "cc-" ID "-" PARENT "-01x",
                                      "ff-" ID "-" PARENT "-01",
                                      "00-4BF92F3577B34DA6A3CE929D0E0E4736-" PARENT "-01",
                                      "00-00000000000000000000000000000000-" PARENT "-01",
                                      "00-" ID "-0000000000000000-01",
                                      "00_" ID "-" PARENT "-01",
                                      "00-" ID "-" PARENT "-0g"};
    assert_false(gw_traceparent_is_valid(NULL));
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        assert_true(gw_traceparent_is_valid(good[i]));
        gw_visit *visit = gw_visit_begin("/", NULL, good[i]);
        assert_memory_equal(visit->traceparent, "00-" ID "-" PARENT "-0", 54);
        assert_int_equal(strlen(visit->traceparent), 55);
        gw_visit_release(visit);
    }
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        if (gw_traceparent_is_valid(bad[i])) {
            fail_msg("'%s' was taken", bad[i]);
        }
        gw_visit *visit = gw_visit_begin("/", "bad\nid", bad[i]);
        assert_true(gw_traceparent_is_valid(visit->traceparent)); /* one of our own */
        assert_null(strchr(visit->id, '\n'));
        gw_visit_release(visit);
    }
}

/* ---- counters ---- */

/* More tenants than labels: the rest are one line, and nothing is lost. */
static void bounded_labels(void **state)
{
    (void)state;
    gw_telemetry *telemetry = gw_telemetry_create();
    gw_tenant_limits limits;
    gw_telemetry_now now = {.model = "a\"b\\c"};
    cm_bytes out;
    gw_tenant_limits_defaults(&limits);
    for (uint32_t i = 0; i < GW_TELEMETRY_TENANTS_MAX + 20; i++) {
        char name[16];
        snprintf(name, sizeof(name), "t%u", i);
        gw_telemetry_used(telemetry, gw_turns_add_tenant(&W.turns, name, &limits), GW_USED_REQUESTS, i + 1);
    }
    cm_bytes_init(&out, 0);
    gw_telemetry_render(telemetry, &W.turns, &now, &out);
    const char *text = cm_bytes_text(&out);
    assert_non_null(strstr(text, "baleen_tenant_requests_total{tenant=\"t99\"} 100\n"));
    assert_null(strstr(text, "tenant=\"t100\""));
    assert_non_null(strstr(text, "baleen_tenant_requests_total{tenant=\"(others)\"} 2210\n"));
    assert_non_null(
        strstr(text, "sglang:num_requests_total{model_name=\"a\\\"b\\\\c\",engine_type=\"unified\"} 7260\n"));
    cm_bytes_fini(&out);
    gw_telemetry_destroy(telemetry);
}

int main(void)
{
#define TEST(fn) cmocka_unit_test_setup_teardown(fn, begin, finish)
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hash_is_hmac),
        cmocka_unit_test(files_that_are_none),
        cmocka_unit_test(file_that_is_one),
        TEST(keys_change),
        TEST(no_file),
        TEST(bad_file_at_start),
        cmocka_unit_test(traceparents),
        TEST(bounded_labels),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
