/* The archive of a tokenizer's files. What is in it the integration tests read with a real reader. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "gateway/tokenizer_files.h"
#include "tests/support/temp_folder.h"

static void same_bytes(void **state)
{
    (void)state;
    char hash[2][GW_SHA256_HEX];
    cm_bytes zip[2];
    cm_error err;
    struct stat file;
    assert_int_equal(stat(BALEEN_NANO "/tokenizer.json", &file), 0);
    for (int i = 0; i < 2; i++) {
        cm_bytes_init(&zip[i], 0);
        assert_int_equal(gw_tokenizer_zip(BALEEN_NANO, &zip[i], hash[i], &err), CM_OK);
    }
    assert_int_equal(zip[0].len, zip[1].len);
    assert_memory_equal(zip[0].data, zip[1].data, zip[0].len);
    assert_string_equal(hash[0], hash[1]);
    assert_int_equal(strspn(hash[0], "0123456789abcdef"), 64);
    assert_memory_equal(zip[0].data, "PK\3\4", 4);
    assert_true(zip[0].len > (size_t)file.st_size); /* stored as it is */
    cm_bytes_fini(&zip[0]);
    cm_bytes_fini(&zip[1]);
}

/* Files may be missing; one that is there must be readable. */
static void unreadable(void **state)
{
    (void)state;
    char dir[T_FOLDER_MAX], path[T_FOLDER_MAX + 16], hash[GW_SHA256_HEX];
    cm_bytes zip;
    cm_error err;
    t_folder_make(dir, "tokenizer_files");
    cm_bytes_init(&zip, 0);
    assert_int_equal(gw_tokenizer_zip(dir, &zip, hash, &err), CM_OK);
    cm_bytes_clear(&zip);
    snprintf(path, sizeof(path), "%s/config.json", dir);
    assert_int_equal(mkdir(path, 0700), 0);
    assert_int_equal(gw_tokenizer_zip(dir, &zip, hash, &err), CM_E_IO);
    assert_non_null(strstr(err.text, "config.json"));
    cm_bytes_fini(&zip);
    t_folder_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(same_bytes), cmocka_unit_test(unreadable)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
