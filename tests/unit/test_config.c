/* Options: where values come from, who wins, what is refused, what is printed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#include "common/base/config.h"
#include "common/base/log.h"
#include "tests/support/temp_folder.h"

typedef struct t_config {
    char *data_address, *mode;
    bool verbose, strict;
    uint64_t n_row, lease_ms, memory_bytes;
} t_config;

static const cm_cfg_field t_fields[] = {
    {"data_address", "", "where rows arrive", CM_CFG_STRING(t_config, data_address)},
    {"mode", "auto", "how it is done", CM_CFG_CHOICE(t_config, mode, "auto|fast|safe")},
    {"verbose", "off", "say more", CM_CFG_BOOL(t_config, verbose)},
    {"strict", "on", "say no more often", CM_CFG_BOOL(t_config, strict)},
    {"n_row", "64", "rows of a step", CM_CFG_UINT(t_config, n_row, 1, 4096)},
    {"lease_ms", "3s", "how long a lease lasts", CM_CFG_MS(t_config, lease_ms, 100, 600000)},
    {"memory", "1g", "memory it may take", CM_CFG_BYTES(t_config, memory_bytes, 4096, 1ull << 40)},
};
static const cm_cfg_table t_table = {"baleen-test", "tests options", "[DIR]", t_fields,
                                     sizeof(t_fields) / sizeof(t_fields[0])};

/* cm_cfg_load of up to seven words after the program's name. */
static cm_status t_load(t_config *config, const char *const words[7], const char **operand_out, cm_error *err)
{
    char *argv[9] = {(char *)(uintptr_t) "baleen-test"};
    int argc = 1;
    const char *operands[1] = {NULL};
    size_t n_operands = 0;
    cm_cfg_outcome outcome;
    while (argc <= 7 && words[argc - 1] != NULL) {
        argv[argc] = (char *)(uintptr_t)words[argc - 1];
        argc++;
    }
    cm_status status = cm_cfg_load(&t_table, config, argc, argv, operands, 1, &n_operands, &outcome, err);
    if (status == CM_OK) {
        assert_int_equal(outcome, CM_CFG_RUN);
        assert_int_equal(n_operands, operands[0] != NULL);
        *operand_out = operands[0];
    }
    return status;
}

static char g_folder[T_FOLDER_MAX];

static int make_folder(void **state)
{
    (void)state;
    t_folder_make(g_folder, "config");
    return 0;
}

static int remove_folder(void **state)
{
    (void)state;
    t_folder_remove(g_folder);
    return 0;
}

/* A file with that text; it and its name are good until the next call. */
static const char *t_file(const char *text)
{
    static char path[T_FOLDER_MAX + 16];
    snprintf(path, sizeof(path), "%s/config", g_folder);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, strlen(text), file), strlen(text));
    assert_int_equal(fclose(file), 0);
    return path;
}

static void test_defaults(void **state)
{
    (void)state;
    t_config config;
    cm_cfg_defaults(&t_table, &config);
    assert_string_equal(config.data_address, "");
    assert_string_equal(config.mode, "auto");
    assert_false(config.verbose);
    assert_true(config.strict);
    assert_int_equal(config.n_row, 64);
    assert_int_equal(config.lease_ms, 3000);
    assert_int_equal(config.memory_bytes, 1u << 30);
    cm_cfg_free(&t_table, &config);
}

/* default < file < environment < flags; the last of two flags wins. */
static void test_who_wins(void **state)
{
    (void)state;
    t_config config;
    cm_error err;
    const char *operand,
        *path = t_file("# comment\n\n  n_row = 2 \nmode=fast\nlease_ms = 250\ndata-address = a b\n");
    const char *const words[7] = {"--n-row", "4", "--config", path, "--n-row=5", "dir"};
    setenv("BALEEN_N_ROW", "3", 1);
    setenv("BALEEN_MODE", "safe", 1);
    cm_status status = t_load(&config, words, &operand, &err);
    unsetenv("BALEEN_N_ROW");
    unsetenv("BALEEN_MODE");
    assert_int_equal(status, CM_OK);
    assert_int_equal(config.n_row, 5);
    assert_string_equal(config.mode, "safe");
    assert_int_equal(config.lease_ms, 250);
    assert_string_equal(config.data_address, "a b");
    assert_true(config.strict);
    assert_string_equal(operand, "dir");
    cm_cfg_free(&t_table, &config);
}

static void test_words(void **state)
{
    (void)state;
    static const struct {
        const char *words[7], *operand;
        bool verbose, strict;
        uint64_t lease_ms, memory_bytes;
    } rows[] = {
        {{"--verbose"}, NULL, true, true, 3000, 1 << 30},
        {{"--verbose", "dir"}, "dir", true, true, 3000, 1 << 30}, /* a bare flag takes no value */
        {{"--strict=no", "--verbose=1"}, NULL, true, false, 3000, 1 << 30},
        {{"--lease-ms", "2m", "--memory=64K"}, NULL, false, true, 120000, 65536},
        {{"--lease_ms", "101ms", "--memory=16m"}, NULL, false, true, 101, 16 << 20},
        {{"--", "--verbose"}, "--verbose", false, true, 3000, 1 << 30},
        {{"-"}, "-", false, true, 3000, 1 << 30},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        t_config config;
        cm_error err;
        const char *operand;
        if (t_load(&config, rows[i].words, &operand, &err) != CM_OK) {
            fail_msg("row %zu: %s", i, err.text);
        }
        assert_int_equal(config.verbose, rows[i].verbose);
        assert_int_equal(config.strict, rows[i].strict);
        assert_int_equal(config.lease_ms, rows[i].lease_ms);
        assert_int_equal(config.memory_bytes, rows[i].memory_bytes);
        assert_true((operand == NULL) == (rows[i].operand == NULL));
        if (operand != NULL) {
            assert_string_equal(operand, rows[i].operand);
        }
        cm_cfg_free(&t_table, &config);
    }
}

static void test_refused(void **state)
{
    (void)state;
    static const struct {
        const char *words[7], *said;
    } rows[] = {
        {{"--n-rows", "4"}, "unknown option '--n-rows'"},
        {{"-n"}, "unknown option '-n'"},
        {{"--n-row"}, "needs a value"},
        {{"--n-row", "0"}, "outside 1..4096"},
        {{"--n-row", "4097"}, "outside 1..4096"},
        {{"--n-row", "-1"}, "not a number"},
        {{"--n-row", ""}, "not a number"},
        {{"--n-row", "4x"}, "unknown unit 'x'"},
        {{"--n-row", "99999999999999999999"}, "not a number"},
        {{"--lease-ms", "1h"}, "unknown unit 'h'"},
        {{"--lease-ms", "11m"}, "outside"},
        {{"--memory", "1kb"}, "unknown unit 'kb'"},
        {{"--memory", "99999999999999999g"}, "outside"},
        {{"--mode", "slow"}, "none of auto|fast|safe"},
        {{"--mode", "aut"}, "none of auto|fast|safe"},
        {{"--mode", ""}, "none of auto|fast|safe"},
        {{"--verbose=maybe"}, "neither on nor off"},
        {{"a", "b"}, "unexpected word 'b'"},
        {{"--config", "/nonexistent/file"}, "/nonexistent/file"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        t_config config;
        cm_error err;
        const char *operand;
        assert_int_equal(t_load(&config, rows[i].words, &operand, &err), CM_E_CONFIG);
        if (strstr(err.text, rows[i].said) == NULL) {
            fail_msg("row %zu: '%s' does not say '%s'", i, err.text, rows[i].said);
        }
    }
}

static void test_file_refused(void **state)
{
    (void)state;
    static const struct {
        const char *text, *said;
    } rows[] = {
        {"n_row = 3\nn_rows = 4\n", "line 2"},
        {"n_row 3\n", "no '='"},
        {"mode = slow\n", "none of"},
        {"n_row =\n", "not a number"},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        t_config config;
        cm_error err;
        const char *operand, *path = t_file(rows[i].text);
        const char *const words[7] = {"--config", path};
        assert_int_equal(t_load(&config, words, &operand, &err), CM_E_CONFIG);
        assert_non_null(strstr(err.text, rows[i].said));
        assert_non_null(strstr(err.text, path));
    }
}

static void t_count_warnings(void *ctx, cm_log_level level, const char *text)
{
    if (strstr(text, "BALEEN_N_ROWS") != NULL) { /* whatever else stands in this environment is not ours */
        *(int *)ctx += level == CM_LOG_WARN ? 1 : 100;
    }
}

static void test_environment(void **state)
{
    (void)state;
    t_config config;
    cm_error err;
    const char *operand, *const words[7] = {NULL};
    int n = 0;
    setenv("BALEEN_N_ROWS", "3", 1); /* nobody's option: a warning */
    cm_log_handler(t_count_warnings, &n);
    cm_status status = t_load(&config, words, &operand, &err);
    cm_log_handler(NULL, NULL);
    unsetenv("BALEEN_N_ROWS");
    assert_int_equal(status, CM_OK);
    assert_int_equal(n, 1);
    cm_cfg_free(&t_table, &config);
    setenv("BALEEN_N_ROW", "many", 1); /* an option, and wrong: an error */
    status = t_load(&config, words, &operand, &err);
    assert_string_equal(cm_env_get("BALEEN_N_ROW"), "many");
    unsetenv("BALEEN_N_ROW");
    assert_null(cm_env_get("BALEEN_N_ROW"));
    assert_int_equal(status, CM_E_CONFIG);
    assert_string_equal(err.field, "n_row");
}

static void test_set(void **state)
{
    (void)state;
    t_config config;
    cm_error err;
    cm_cfg_defaults(&t_table, &config);
    assert_int_equal(cm_cfg_set(&t_table, &config, "mode", "fast", &err), CM_OK);
    assert_string_equal(config.mode, "fast");
    assert_int_equal(cm_cfg_set(&t_table, &config, "mode", "odd", &err), CM_E_CONFIG);
    assert_string_equal(config.mode, "fast"); /* as it was */
    assert_int_equal(cm_cfg_set(&t_table, &config, "modes", "fast", &err), CM_E_CONFIG);
    cm_cfg_free(&t_table, &config);
    assert_null(config.mode);
}

/* What is printed can be fed back and says the same. */
static void test_print_round_trip(void **state)
{
    (void)state;
    t_config config, again;
    cm_error err;
    char *text = NULL, *second = NULL;
    size_t n;
    cm_cfg_defaults(&t_table, &config);
    static const char *const values[][2] = {{"data_address", "tcp 10.0.0.1"},
                                            {"mode", "safe"},
                                            {"verbose", "on"},
                                            {"strict", "off"},
                                            {"n_row", "17"},
                                            {"lease_ms", "1234"},
                                            {"memory", "5g"}};
    for (size_t i = 0; i < t_table.n_fields; i++) {
        assert_int_equal(cm_cfg_set(&t_table, &config, values[i][0], values[i][1], &err), CM_OK);
    }
    FILE *to = open_memstream(&text, &n);
    cm_cfg_print(&t_table, &config, to);
    fclose(to);
    const char *operand, *path = t_file(text);
    const char *const words[7] = {"--config", path};
    assert_int_equal(t_load(&again, words, &operand, &err), CM_OK);
    to = open_memstream(&second, &n);
    cm_cfg_print(&t_table, &again, to);
    fclose(to);
    assert_string_equal(text, second);
    assert_string_equal(again.data_address, "tcp 10.0.0.1");
    assert_int_equal(again.memory_bytes, 5ull << 30);
    free(text);
    free(second);
    cm_cfg_free(&t_table, &config);
    cm_cfg_free(&t_table, &again);
}

static void test_help(void **state)
{
    (void)state;
    char *text = NULL;
    size_t n;
    FILE *to = open_memstream(&text, &n);
    cm_cfg_print_help(&t_table, to);
    fclose(to);
    assert_non_null(strstr(text, "usage: baleen-test [options] [DIR]"));
    assert_non_null(strstr(text, "--data-address TEXT"));
    assert_non_null(strstr(text, "--mode auto|fast|safe"));
    assert_non_null(strstr(text, "(default 3s)"));
    for (size_t i = 0; i < t_table.n_fields; i++) {
        assert_non_null(strstr(text, t_fields[i].doc));
    }
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),     cmocka_unit_test(test_who_wins),
        cmocka_unit_test(test_words),        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_file_refused), cmocka_unit_test(test_environment),
        cmocka_unit_test(test_set),          cmocka_unit_test(test_print_round_trip),
        cmocka_unit_test(test_help),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
