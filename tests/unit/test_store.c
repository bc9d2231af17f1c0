/* The coordinator's log: what was written is there after a restart, one coordinator at a time, damage is
 * named. */
#include <setjmp.h>
#include <sqlite3.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "coordinator/sqlite_log.h"
#include "tests/support/temp_folder.h"

enum { EPOCHS_KEPT = 1000 };

static char g_folder[T_FOLDER_MAX];
static co_drains g_drains; /* of the next writes */

static int make_folder(void **state)
{
    (void)state;
    t_folder_make(g_folder, "store");
    return 0;
}

static const char *file(const char *suffix)
{
    static char name[T_FOLDER_MAX + 24];
    snprintf(name, sizeof(name), "%s/coordinator.db%s", g_folder, suffix);
    return name;
}

static int remove_folder(void **state)
{
    (void)state;
    t_folder_remove(g_folder);
    return 0;
}

static co_epoch *epoch_of(uint64_t number)
{
    co_peer worker = BALEEN__CONTROL__V1__MEMBER__INIT, *members[] = {&worker};
    uint32_t rank_member[] = {3}, first[] = {0, 1, 2};
    uint16_t owner[] = {0, 0};
    pr_placement placement = {
        .n_layer = 1, .n_expert = 2, .n_rank = 1, .rank_member = rank_member, .first = first, .owner = owner};
    worker.id = 3;
    worker.role = CO_ROLE_WORKER;
    worker.incarnation = 99;
    return co_epoch_create(number, 5, members, 1, &placement);
}

static co_sqlite *open_good(const char *folder, co_store_past *past_out)
{
    co_sqlite *store = NULL;
    cm_error err = {0};
    cm_status status = co_sqlite_open(folder, &store, past_out, &err);
    if (status != CM_OK) {
        fail_msg("%s", err.text);
    }
    return store;
}

static void expect_refusal(const char *folder, cm_status expected, const char *needle)
{
    co_sqlite *store = NULL;
    co_store_past past;
    cm_error err = {0};
    assert_int_equal(co_sqlite_open(folder, &store, &past, &err), expected);
    assert_null(store);
    if (strstr(err.text, needle) == NULL || strstr(err.text, folder) == NULL) {
        fail_msg("'%s' does not say '%s' and '%s'", err.text, needle, folder);
    }
}

static void write_good(co_sqlite *store, uint32_t id, uint64_t number, const co_epoch *epoch)
{
    cm_error err = {0};
    if (co_sqlite_write(store, id, number, &g_drains, epoch, &err) != CM_OK) {
        fail_msg("%s", err.text);
    }
}

static void restart_continues(void **state)
{
    (void)state;
    co_store_past past;
    co_sqlite *store = open_good(g_folder, &past);
    uint64_t cluster = past.cluster;
    uint8_t secret[CO_SECRET_BYTES];
    memcpy(secret, past.secret, sizeof(secret));
    assert_true(cluster != 0);
    assert_int_equal(past.next_member_id, 1);
    assert_int_equal(past.next_number, 1);
    assert_int_equal(past.drains.n, 0);
    assert_null(past.epoch);

    co_epoch *epoch = epoch_of(6);
    write_good(store, 4, 1, NULL);
    g_drains = (co_drains){.n = 3, .id = {1, 2, 3}};
    write_good(store, 4, 7, epoch);
    co_drains_remove(&g_drains, 2);
    write_good(store, 5, 8, NULL);
    co_sqlite_close(store);

    store = open_good(g_folder, &past);
    assert_int_equal(past.cluster, cluster);
    assert_memory_equal(past.secret, secret, sizeof(secret));
    assert_int_equal(past.next_member_id, 5);
    assert_int_equal(past.next_number, 8);
    assert_int_equal(past.drains.n, 2);
    assert_int_equal(past.drains.id[0], 1);
    assert_int_equal(past.drains.id[1], 3);
    g_drains.n = 0;
    assert_non_null(past.epoch);
    assert_int_equal(past.epoch->packed.len, epoch->packed.len);
    assert_memory_equal(past.epoch->packed.data, epoch->packed.data, epoch->packed.len);
    assert_int_equal(past.epoch->number, 6);
    assert_int_equal(co_epoch_find(past.epoch, 3)->incarnation, 99);
    assert_int_equal(past.epoch->placement->rank_member[0], 3);
    co_epoch_release(past.epoch);
    co_epoch_release(epoch);
    co_sqlite_close(store);
}

static void change(const char *sql)
{
    sqlite3 *db;
    assert_int_equal(sqlite3_open(file(""), &db), SQLITE_OK);
    assert_int_equal(sqlite3_exec(db, sql, NULL, NULL, NULL), SQLITE_OK);
    sqlite3_close(db);
}

static void assert_private(const char *suffix)
{
    struct stat status;
    assert_int_equal(stat(file(suffix), &status), 0);
    assert_int_equal(status.st_mode & 0777, 0600);
}

/* As releases before had it: no secret, and a file that everybody may read. */
static void an_old_log_gets_a_secret(void **state)
{
    (void)state;
    static const uint8_t zeros[CO_SECRET_BYTES];
    co_store_past old, past;
    co_sqlite_close(open_good(g_folder, &old));
    change("DELETE FROM meta WHERE name = 'secret'");
    assert_int_equal(chmod(file(""), 0644), 0);
    co_sqlite *store = open_good(g_folder, &past);
    assert_private("");
    assert_private("-wal");
    co_sqlite_close(store);
    assert_int_equal(past.cluster, old.cluster);
    assert_memory_not_equal(past.secret, zeros, sizeof(zeros));
    assert_memory_not_equal(past.secret, old.secret, sizeof(zeros));
    old = past;
    co_sqlite_close(open_good(g_folder, &past));
    assert_memory_equal(past.secret, old.secret, sizeof(zeros));
    change("UPDATE meta SET value = x'0102' WHERE name = 'secret'");
    expect_refusal(g_folder, CM_E_CORRUPT, "move it away");
}

static void a_failed_write_leaves_nothing(void **state)
{
    (void)state;
    co_store_past past;
    cm_error err = {0};
    co_sqlite *store = open_good(g_folder, &past);
    co_epoch *epoch = epoch_of(3);
    write_good(store, 2, 4, epoch);
    assert_int_equal(co_sqlite_write(store, 20, 40, &g_drains, epoch, &err),
                     CM_E_IO); /* its number is taken */
    co_sqlite_close(store);
    store = open_good(g_folder, &past);
    assert_int_equal(past.next_member_id, 2);
    assert_int_equal(past.next_number, 4);
    co_epoch_release(past.epoch);
    co_epoch_release(epoch);
    co_sqlite_close(store);
}

static void old_epochs_are_trimmed(void **state)
{
    (void)state;
    co_store_past past;
    co_sqlite *store = open_good("", &past); /* in memory: fast */
    for (uint64_t number = 1; number <= EPOCHS_KEPT + 5; number++) {
        co_epoch *epoch = epoch_of(number);
        write_good(store, 4, number + 1, epoch);
        co_epoch_release(epoch);
    }
    co_epoch *early = epoch_of(5), *kept = epoch_of(6);
    write_good(store, 4, EPOCHS_KEPT + 6, early); /* its place is free again */
    assert_int_equal(co_sqlite_write(store, 4, EPOCHS_KEPT + 6, &g_drains, kept, NULL), CM_E_IO);
    co_epoch_release(early);
    co_epoch_release(kept);
    co_sqlite_close(store);
}

static void in_memory_is_forgotten(void **state)
{
    (void)state;
    co_store_past first, second;
    co_sqlite *a = open_good("", &first), *b = open_good("", &second);
    assert_true(first.cluster != second.cluster);
    assert_memory_not_equal(first.secret, second.secret, sizeof(first.secret));
    co_sqlite_close(a);
    co_sqlite_close(b);
}

static void second_opener_is_refused(void **state)
{
    (void)state;
    co_store_past past;
    co_sqlite *store = open_good(g_folder, &past);
    expect_refusal(g_folder, CM_E_EXISTS, "another coordinator has");
    write_good(store, 2, 2, NULL);
    expect_refusal(g_folder, CM_E_EXISTS, "stop it");
    co_sqlite_close(store);
    co_sqlite_close(open_good(g_folder, &past));
}

static void overwrite(long offset, const char *bytes, size_t n)
{
    FILE *to = fopen(file(""), offset == 0 ? "w" : "r+");
    assert_non_null(to);
    fseek(to, offset, SEEK_SET);
    fwrite(bytes, 1, n, to);
    fclose(to);
}

static void damage_is_named(void **state)
{
    (void)state;
    static const char text[] =
        "this is a shopping list, and a long one: the header of a database has one hundred bytes "
        "and this has more than that";
    overwrite(0, text, sizeof(text));
    expect_refusal(g_folder, CM_E_CORRUPT, "move it away");
    unlink(file(""));

    co_store_past past;
    co_epoch *epoch = epoch_of(1);
    co_sqlite *store = open_good(g_folder, &past);
    write_good(store, 2, 2, epoch);
    co_sqlite_close(store);
    co_epoch_release(epoch);
    char noise[3000];
    memset(noise, 0xa5, sizeof(noise));
    overwrite(4096, noise, sizeof(noise)); /* the first page after the header's */
    expect_refusal(g_folder, CM_E_CORRUPT, "move it away");
}

/* A leaf of old epochs that nothing would read: found all the same, before it spreads. */
static void hidden_damage_is_named(void **state)
{
    (void)state;
    enum { PAGE = 4096, FIRST_LEAF = 3 }; /* after the header's page, meta and the root of epochs */
    co_store_past past;
    co_sqlite *store = open_good(g_folder, &past);
    for (uint64_t number = 1; number <= 200; number++) {
        co_epoch *epoch = epoch_of(number);
        write_good(store, 4, number + 1, epoch);
        co_epoch_release(epoch);
    }
    co_sqlite_close(store);
    char noise[PAGE];
    memset(noise, 0xa5, sizeof(noise));
    overwrite(FIRST_LEAF * PAGE, noise, sizeof(noise));
    expect_refusal(g_folder, CM_E_CORRUPT, "move it away");
}

static void no_such_parent(void **state)
{
    (void)state;
    expect_refusal("/nonexistent/baleen", CM_E_IO, "cannot make the folder");
}

static void broken_epochs_are_refused(void **state)
{
    (void)state;
    co_epoch *epoch = epoch_of(1), *read = NULL;
    for (size_t n = 0; n < epoch->packed.len; n++) { /* every truncation */
        cm_error err = {0};
        assert_int_equal(co_epoch_unpack(epoch->packed.data, n, &read, &err), CM_E_CORRUPT);
        assert_true(err.text[0] != 0);
    }
    cm_bytes packed;
    cm_bytes_init(&packed, 0);
    cm_error err = {0};
    co_epoch *other = epoch_of(2);
    size_t at = 0;
    cm_bytes_append(&packed, other->packed.data, other->packed.len);
    while (packed.data[at] != 0x1a) { /* field 3: the member; its first field is the id */
        at++;
    }
    assert_int_equal(packed.data[at + 3], 3);
    packed.data[at + 3] = 4;
    assert_int_equal(co_epoch_unpack(packed.data, packed.len, &read, &err), CM_E_CORRUPT);
    assert_non_null(strstr(err.text, "no worker"));
    cm_bytes_fini(&packed);
    co_epoch_release(epoch);
    co_epoch_release(other);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(restart_continues, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(an_old_log_gets_a_secret, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(a_failed_write_leaves_nothing, make_folder, remove_folder),
        cmocka_unit_test(old_epochs_are_trimmed),
        cmocka_unit_test(in_memory_is_forgotten),
        cmocka_unit_test_setup_teardown(second_opener_is_refused, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(damage_is_named, make_folder, remove_folder),
        cmocka_unit_test_setup_teardown(hidden_damage_is_named, make_folder, remove_folder),
        cmocka_unit_test(no_such_parent),
        cmocka_unit_test(broken_epochs_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
