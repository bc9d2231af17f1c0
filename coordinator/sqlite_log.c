#include "coordinator/sqlite_log.h"

#include <errno.h>
#include <sqlite3.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/mem.h"
#include "common/base/rng.h"

enum {
    STORE_APPLICATION_ID = 0x42414c4e, /* "BALN" in the file's header */
    STORE_VERSION = 1,
    STORE_EPOCHS_MAX = 1000, /* older ones are of no use to anybody */
};

struct co_sqlite {
    sqlite3 *db;
    sqlite3_stmt *set_meta, *set_drains, *add_epoch, *trim_epochs;
    char name[400]; /* of the file, for sentences */
};

static cm_status store_fail(const co_sqlite *store, int code, const char *doing, cm_error *err)
{
    const char *name = store->name;
    switch (code & 0xff) {
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
        return cm_error_set(
            err, CM_E_EXISTS, "store",
            "another coordinator has %s open: stop it, or give this one a folder of its own (--store)", name);
    case SQLITE_NOTADB:
    case SQLITE_CORRUPT:
        return cm_error_set(err, CM_E_CORRUPT, "store",
                            "%s is damaged or no coordinator's log: move it away to start a new cluster",
                            name);
    default:
        return cm_error_set(err, CM_E_IO, "store", "%s: %s: %s", name, doing,
                            store->db != NULL ? sqlite3_errmsg(store->db) : sqlite3_errstr(code));
    }
}

static cm_status store_exec(co_sqlite *store, const char *sql, cm_error *err)
{
    int code = sqlite3_exec(store->db, sql, NULL, NULL, NULL);
    return code == SQLITE_OK ? CM_OK : store_fail(store, code, sql, err);
}

static cm_status store_prepare(co_sqlite *store, const char *sql, sqlite3_stmt **statement_out, cm_error *err)
{
    int code = sqlite3_prepare_v3(store->db, sql, -1, SQLITE_PREPARE_PERSISTENT, statement_out, NULL);
    return code == SQLITE_OK ? CM_OK : store_fail(store, code, sql, err);
}

/* First column of the first row as a number; found_out false when there is no row. */
static cm_status store_number(co_sqlite *store, const char *sql, bool *found_out, int64_t *value_out,
                              cm_error *err)
{
    sqlite3_stmt *statement = NULL;
    CM_TRY(store_prepare(store, sql, &statement, err));
    int code = sqlite3_step(statement);
    *found_out = code == SQLITE_ROW;
    if (code == SQLITE_ROW) {
        *value_out = sqlite3_column_int64(statement, 0);
    }
    sqlite3_finalize(statement);
    return code == SQLITE_ROW || code == SQLITE_DONE ? CM_OK : store_fail(store, code, sql, err);
}

/* ---- opening ---- */

static cm_status store_check_file(co_sqlite *store, cm_error *err)
{
    bool found;
    int64_t id = 0, version = 0, n_tables = 0;
    CM_TRY(store_number(store, "PRAGMA application_id", &found, &id, err));
    CM_TRY(store_number(store, "PRAGMA user_version", &found, &version, err));
    CM_TRY(store_number(store, "SELECT count(*) FROM sqlite_schema", &found, &n_tables, err));
    if (n_tables == 0 && id == 0) {
        return CM_OK; /* new */
    }
    if (id != STORE_APPLICATION_ID) {
        return store_fail(store, SQLITE_NOTADB, "", err);
    }
    if (version != STORE_VERSION) {
        return cm_error_set(err, CM_E_UNSUPPORTED, "store",
                            "%s is of version %lld, this program writes %d: use its release", store->name,
                            (long long)version, (int)STORE_VERSION);
    }
    sqlite3_stmt *statement = NULL;
    CM_TRY(store_prepare(store, "PRAGMA quick_check(1)", &statement, err));
    int code = sqlite3_step(statement);
    bool good = code == SQLITE_ROW && strcmp((const char *)sqlite3_column_text(statement, 0), "ok") == 0;
    sqlite3_finalize(statement);
    return good ? CM_OK : store_fail(store, SQLITE_CORRUPT, "", err);
}

static cm_status store_run(co_sqlite *store, sqlite3_stmt *statement, cm_error *err)
{
    int code = sqlite3_step(statement);
    sqlite3_reset(statement);
    sqlite3_clear_bindings(statement);
    return code == SQLITE_DONE ? CM_OK : store_fail(store, code, "cannot write", err);
}

/* Bound: the text of a statement may end up in a sentence. */
static cm_status store_draw_secret(co_sqlite *store, cm_error *err)
{
    uint8_t secret[CO_SECRET_BYTES];
    sqlite3_stmt *statement = NULL;
    CM_TRY(store_prepare(store, "INSERT OR IGNORE INTO meta VALUES('secret', ?1)", &statement, err));
    cm_random_bytes(secret, sizeof(secret));
    sqlite3_bind_blob(statement, 1, secret, sizeof(secret), SQLITE_STATIC);
    cm_status status = store_run(store, statement, err);
    sqlite3_finalize(statement);
    explicit_bzero(secret, sizeof(secret));
    return status;
}

static cm_status store_make_tables(co_sqlite *store, cm_error *err)
{
    char sql[640];
    uint64_t cluster;
    do {
        cluster = cm_random_u64();
    } while (cluster == 0);
    snprintf(sql, sizeof(sql),
             "CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;"
             "CREATE TABLE IF NOT EXISTS epochs(number INTEGER PRIMARY KEY, time_us INTEGER NOT NULL,"
             " members INTEGER NOT NULL, epoch BLOB NOT NULL);"
             "INSERT OR IGNORE INTO meta VALUES('cluster', %lld), ('next_member_id', 1), ('next_number', 1);"
             "PRAGMA application_id = %d; PRAGMA user_version = %d;",
             (long long)cluster, (int)STORE_APPLICATION_ID, (int)STORE_VERSION);
    CM_TRY(store_exec(store, sql, err));
    return store_draw_secret(store, err);
}

static cm_status store_read_meta(co_sqlite *store, const char *name, uint64_t max, uint64_t *value_out,
                                 cm_error *err)
{
    char sql[96];
    bool found = false;
    int64_t value = 0;
    snprintf(sql, sizeof(sql), "SELECT value FROM meta WHERE name = '%s'", name);
    CM_TRY(store_number(store, sql, &found, &value, err));
    if (!found || value == 0 || (uint64_t)value > max) {
        return store_fail(store, SQLITE_CORRUPT, "", err);
    }
    *value_out = (uint64_t)value;
    return CM_OK;
}

static cm_status store_read_secret(co_sqlite *store, uint8_t secret_out[CO_SECRET_BYTES], cm_error *err)
{
    sqlite3_stmt *statement = NULL;
    CM_TRY(store_prepare(store, "SELECT value FROM meta WHERE name = 'secret'", &statement, err));
    bool good = sqlite3_step(statement) == SQLITE_ROW && sqlite3_column_type(statement, 0) == SQLITE_BLOB &&
                sqlite3_column_bytes(statement, 0) == CO_SECRET_BYTES;
    if (good) {
        memcpy(secret_out, sqlite3_column_blob(statement, 0), CO_SECRET_BYTES);
    }
    sqlite3_finalize(statement);
    return good ? CM_OK : store_fail(store, SQLITE_CORRUPT, "", err);
}

/* Absent in a log of a release that forgot them. */
static cm_status store_read_drains(co_sqlite *store, co_drains *drains_out, cm_error *err)
{
    sqlite3_stmt *statement = NULL;
    co_drains drains = {0};
    bool good = true;
    CM_TRY(store_prepare(store, "SELECT value FROM meta WHERE name = 'drains'", &statement, err));
    if (sqlite3_step(statement) == SQLITE_ROW) {
        size_t n_bytes = (size_t)sqlite3_column_bytes(statement, 0);
        good = n_bytes <= sizeof(drains.id) && n_bytes % sizeof(drains.id[0]) == 0;
        if (good && n_bytes > 0) {
            memcpy(drains.id, sqlite3_column_blob(statement, 0), n_bytes);
            drains.n = (uint32_t)(n_bytes / sizeof(drains.id[0]));
        }
    }
    sqlite3_finalize(statement);
    *drains_out = drains;
    return good ? CM_OK : store_fail(store, SQLITE_CORRUPT, "", err);
}

static cm_status store_read_epoch(co_sqlite *store, co_epoch **epoch_out, cm_error *err)
{
    const char *sql = "SELECT epoch FROM epochs ORDER BY number DESC LIMIT 1";
    sqlite3_stmt *statement = NULL;
    CM_TRY(store_prepare(store, sql, &statement, err));
    cm_status status = CM_OK;
    int code = sqlite3_step(statement);
    if (code == SQLITE_ROW) {
        const void *data = sqlite3_column_blob(statement, 0);
        cm_error why = {0};
        status = co_epoch_unpack(data, (size_t)sqlite3_column_bytes(statement, 0), epoch_out, &why);
        if (status != CM_OK) {
            status = cm_error_set(err, CM_E_CORRUPT, "store",
                                  "%s is damaged (%.160s): move it away to start a new cluster", store->name,
                                  why.text);
        }
    } else if (code != SQLITE_DONE) {
        status = store_fail(store, code, sql, err);
    }
    sqlite3_finalize(statement);
    return status;
}

static cm_status store_read(co_sqlite *store, co_store_past *past_out, cm_error *err)
{
    uint64_t cluster, id, number;
    uint8_t secret[CO_SECRET_BYTES];
    co_epoch *epoch = NULL;
    co_drains drains;
    CM_TRY(store_read_meta(store, "cluster", UINT64_MAX, &cluster, err));
    CM_TRY(store_read_meta(store, "next_member_id", UINT32_MAX, &id, err));
    CM_TRY(store_read_meta(store, "next_number", INT64_MAX, &number, err));
    CM_TRY(store_read_secret(store, secret, err));
    CM_TRY(store_read_drains(store, &drains, err));
    CM_TRY(store_read_epoch(store, &epoch, err));
    if (epoch != NULL && epoch->number >= number) {
        co_epoch_release(epoch);
        return store_fail(store, SQLITE_CORRUPT, "", err);
    }
    *past_out = (co_store_past){.cluster = cluster,
                                .next_member_id = (uint32_t)id,
                                .next_number = number,
                                .drains = drains,
                                .epoch = epoch};
    memcpy(past_out->secret, secret, sizeof(secret));
    explicit_bzero(secret, sizeof(secret));
    return CM_OK;
}

/* It holds a secret. What SQLite adds beside it gets the same mode; an older release left others. */
static cm_status store_make_private(const co_sqlite *store, cm_error *err)
{
    static const char *const suffixes[] = {"", "-wal", "-shm"};
    for (size_t i = 0; i < sizeof(suffixes) / sizeof(suffixes[0]); i++) {
        char path[sizeof(store->name) + 8];
        snprintf(path, sizeof(path), "%s%s", store->name, suffixes[i]);
        if (chmod(path, 0600) != 0 && errno != ENOENT) {
            return cm_error_set(err, CM_E_IO, "store", "cannot keep others from reading %s: %s", path,
                                strerror(errno));
        }
    }
    return CM_OK;
}

static cm_status store_set_up(co_sqlite *store, co_store_past *past_out, cm_error *err)
{
    /* Exclusive before WAL: the lock is taken with the first access and kept until close. */
    CM_TRY(store_exec(
        store, "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;",
        err));
    CM_TRY(store_exec(store, "BEGIN EXCLUSIVE; COMMIT;", err));
    CM_TRY(store_check_file(store, err));
    CM_TRY(store_exec(store, "BEGIN EXCLUSIVE", err));
    CM_TRY(store_make_tables(store, err));
    CM_TRY(store_exec(store, "COMMIT", err));
    CM_TRY(store_prepare(store, "UPDATE meta SET value = ?2 WHERE name = ?1", &store->set_meta, err));
    CM_TRY(store_prepare(store, "INSERT OR REPLACE INTO meta VALUES('drains', ?1)", &store->set_drains, err));
    CM_TRY(store_prepare(store, "INSERT INTO epochs VALUES(?1, ?2, ?3, ?4)", &store->add_epoch, err));
    CM_TRY(store_prepare(store, "DELETE FROM epochs WHERE number <= ?1", &store->trim_epochs, err));
    return store_read(store, past_out, err);
}

cm_status co_sqlite_open(const char *folder, co_sqlite **store_out, co_store_past *past_out, cm_error *err)
{
    co_sqlite *store = cm_alloc(sizeof(*store));
    bool in_memory = folder[0] == 0;
    cm_status status;
    if (!in_memory && mkdir(folder, 0777) != 0 && errno != EEXIST) {
        status =
            cm_error_set(err, CM_E_IO, "store", "cannot make the folder %s: %s", folder, strerror(errno));
        goto err_close;
    }
    int n = snprintf(store->name, sizeof(store->name), "%s", in_memory ? ":memory:" : folder);
    if (!in_memory && n >= 0 && (size_t)n < sizeof(store->name)) {
        n += snprintf(store->name + n, sizeof(store->name) - (size_t)n, "/coordinator.db");
    }
    if (n < 0 || (size_t)n >= sizeof(store->name)) {
        status = cm_error_set(err, CM_E_TOO_LONG, "store", "the folder's name has more than %zu bytes",
                              sizeof(store->name));
        goto err_close;
    }
    int code = sqlite3_open_v2(store->name, &store->db, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE, NULL);
    status = code == SQLITE_OK ? CM_OK : store_fail(store, code, "cannot open", err);
    if (status == CM_OK && !in_memory) {
        status = store_make_private(store, err);
    }
    if (status == CM_OK) {
        status = store_set_up(store, past_out, err);
    }
    if (status != CM_OK) {
        goto err_close;
    }
    *store_out = store;
    return CM_OK;

err_close:
    co_sqlite_close(store);
    return status;
}

void co_sqlite_close(co_sqlite *store)
{
    if (store == NULL) {
        return;
    }
    sqlite3_finalize(store->set_meta);
    sqlite3_finalize(store->set_drains);
    sqlite3_finalize(store->add_epoch);
    sqlite3_finalize(store->trim_epochs);
    sqlite3_close(store->db);
    cm_free(store);
}

/* ---- writing ---- */

static cm_status store_set_meta(co_sqlite *store, const char *name, uint64_t value, cm_error *err)
{
    sqlite3_bind_text(store->set_meta, 1, name, -1, SQLITE_STATIC);
    sqlite3_bind_int64(store->set_meta, 2, (int64_t)value);
    return store_run(store, store->set_meta, err);
}

static cm_status store_set_drains(co_sqlite *store, const co_drains *drains, cm_error *err)
{
    sqlite3_bind_blob64(store->set_drains, 1, drains->id, sizeof(drains->id[0]) * drains->n, SQLITE_STATIC);
    return store_run(store, store->set_drains, err);
}

static cm_status store_add_epoch(co_sqlite *store, const co_epoch *epoch, cm_error *err)
{
    sqlite3_bind_int64(store->add_epoch, 1, (int64_t)epoch->number);
    sqlite3_bind_int64(store->add_epoch, 2, (int64_t)cm_wall_us());
    sqlite3_bind_int64(store->add_epoch, 3, (int64_t)epoch->message->n_members);
    sqlite3_bind_blob64(store->add_epoch, 4, epoch->packed.data, epoch->packed.len, SQLITE_STATIC);
    CM_TRY(store_run(store, store->add_epoch, err));
    sqlite3_bind_int64(store->trim_epochs, 1, (int64_t)epoch->number - STORE_EPOCHS_MAX);
    return store_run(store, store->trim_epochs, err);
}

static cm_status store_write_rows(co_sqlite *store, uint32_t next_member_id, uint64_t next_number,
                                  const co_drains *drains, const co_epoch *epoch, cm_error *err)
{
    CM_TRY(store_set_meta(store, "next_member_id", next_member_id, err));
    CM_TRY(store_set_meta(store, "next_number", next_number, err));
    CM_TRY(store_set_drains(store, drains, err));
    return epoch != NULL ? store_add_epoch(store, epoch, err) : CM_OK;
}

cm_status co_sqlite_write(co_sqlite *store, uint32_t next_member_id, uint64_t next_number,
                          const co_drains *drains, const co_epoch *epoch, cm_error *err)
{
    CM_TRY(store_exec(store, "BEGIN IMMEDIATE", err));
    cm_status status = store_write_rows(store, next_member_id, next_number, drains, epoch, err);
    if (status == CM_OK) {
        status = store_exec(store, "COMMIT", err);
    }
    if (status != CM_OK) {
        sqlite3_exec(store->db, "ROLLBACK", NULL, NULL, NULL); /* the first error counts */
    }
    return status;
}
