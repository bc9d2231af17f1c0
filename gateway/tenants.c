#include "gateway/tenants.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <sys/stat.h>

#include "common/base/log.h"
#include "common/base/mem.h"
#include "gateway/key_file.h"

enum { LOOK_MS = 500, FILE_BYTES_MAX = 32 << 20 };

/* Which file we have looked at; not what is in it. */
typedef struct file_mark {
    dev_t device;
    ino_t inode;
    off_t size;
    struct timespec changed;
} file_mark;

struct gw_tenants {
    char *path; /* "": no file */
    gw_turns *turns;
    pc_timer *timer;
    file_mark mark;
    gw_key_file file; /* in force */
    gw_tenant *alone; /* without a file */
};

/* ---- the file ---- */

static bool mark_equal(const file_mark *a, const file_mark *b)
{
    return a->device == b->device && a->inode == b->inode && a->size == b->size &&
           a->changed.tv_sec == b->changed.tv_sec && a->changed.tv_nsec == b->changed.tv_nsec;
}

/* Zeros: it is not there. */
static file_mark mark_of(const char *path)
{
    struct stat s;
    if (stat(path, &s) != 0) {
        return (file_mark){0};
    }
    return (file_mark){.device = s.st_dev, .inode = s.st_ino, .size = s.st_size, .changed = s.st_mtim};
}

static cm_status load(const char *path, gw_key_file *out, cm_error *err)
{
    FILE *file = fopen(path, "re");
    if (file == NULL) {
        return cm_error_set(err, CM_E_CONFIG, "key_file", "cannot read %s: %s; 'baleen keys' makes one", path,
                            strerror(errno));
    }
    char *text = cm_alloc(FILE_BYTES_MAX);
    size_t n = fread(text, 1, FILE_BYTES_MAX, file);
    int cause = ferror(file) != 0 ? errno : 0;
    fclose(file);
    cm_error inner = {0};
    cm_status status = cause != 0 ? cm_error_set(&inner, CM_E_CONFIG, NULL, "%s", strerror(cause))
                       : n == FILE_BYTES_MAX
                           ? cm_error_set(&inner, CM_E_CONFIG, NULL, "more than 32 MiB are no key file")
                           : gw_key_file_read(text, n, out, &inner);
    cm_free(text);
    if (status != CM_OK) {
        return cm_error_set(err, CM_E_CONFIG, "key_file", "%s: %s", path, inner.text);
    }
    return CM_OK;
}

static const gw_key_tenant *find_in_file(const gw_tenants *tenants, const char *name)
{
    for (uint32_t i = 0; i < tenants->file.n_tenant; i++) {
        if (strcmp(tenants->file.tenants[i].name, name) == 0) {
            return &tenants->file.tenants[i];
        }
    }
    return NULL;
}

/* The machine's tenants as the file has them. */
static void put_in_force(gw_tenants *tenants)
{
    gw_tenant *tenant = NULL;
    gw_tenant_state state;
    while ((tenant = gw_turns_next_tenant(tenants->turns, tenant)) != NULL) {
        gw_tenant_get(tenant, &state);
        const gw_key_tenant *now = find_in_file(tenants, state.name);
        gw_tenant_change(tenants->turns, tenant, now != NULL, now != NULL ? &now->limits : &state.limits);
    }
    for (uint32_t i = 0; i < tenants->file.n_tenant; i++) {
        const gw_key_tenant *of = &tenants->file.tenants[i];
        if (gw_turns_find_tenant(tenants->turns, of->name) == NULL) {
            (void)gw_turns_add_tenant(tenants->turns, of->name, &of->limits);
        }
    }
}

/* The mark is taken first: what changes while it is read is looked at again. */
static cm_status take_file(gw_tenants *tenants, cm_error *err)
{
    gw_key_file file;
    tenants->mark = mark_of(tenants->path);
    CM_TRY(load(tenants->path, &file, err));
    gw_key_file_free(&tenants->file);
    tenants->file = file;
    put_in_force(tenants);
    cm_info("key file %s: %u tenants, %u keys", tenants->path, file.n_tenant, file.n_key);
    return CM_OK;
}

static void look(void *arg)
{
    gw_tenants *tenants = arg;
    cm_error err = {0};
    file_mark now = mark_of(tenants->path);
    if (!mark_equal(&now, &tenants->mark) && take_file(tenants, &err) != CM_OK) {
        cm_error_log("%s; the keys read before stay in force", err.text);
    }
    pc_timer_set(tenants->timer, LOOK_MS);
}

cm_status gw_tenants_create(pc_loop *loop, const char *path, gw_turns *turns, gw_tenants **tenants_out,
                            cm_error *err)
{
    gw_tenants *tenants = cm_alloc(sizeof(*tenants));
    cm_status status = CM_OK;
    tenants->path = cm_strdup(path);
    tenants->turns = turns;
    tenants->timer = pc_timer_create(loop, look, tenants);
    if (path[0] == 0) {
        gw_tenant_limits limits;
        gw_tenant_limits_defaults(&limits);
        limits.queue_max = UINT32_MAX; /* there is nobody to protect from it */
        tenants->alone = gw_turns_add_tenant(turns, "default", &limits);
    } else {
        status = take_file(tenants, err);
        pc_timer_set(tenants->timer, LOOK_MS);
    }
    if (status != CM_OK) {
        gw_tenants_destroy(tenants);
        return status;
    }
    *tenants_out = tenants;
    return CM_OK;
}

void gw_tenants_destroy(gw_tenants *tenants)
{
    if (tenants == NULL) {
        return;
    }
    pc_timer_destroy(tenants->timer);
    gw_key_file_free(&tenants->file);
    cm_free(tenants->path);
    cm_free(tenants);
}

/* ---- who asks ---- */

bool gw_tenants_has_file(const gw_tenants *tenants)
{
    return tenants->path[0] != 0;
}

bool gw_tenants_is_operator(const gw_tenants *tenants, const gw_tenant *tenant)
{
    const gw_key_tenant *of = find_in_file(tenants, gw_tenant_name(tenant));
    return !gw_tenants_has_file(tenants) || (of != NULL && of->is_operator);
}

static const char *bearer(const char *authorization)
{
    if (authorization == NULL || strncasecmp(authorization, "Bearer ", 7) != 0) {
        return NULL;
    }
    return authorization + 7 + strspn(authorization + 7, " ");
}

cm_status gw_tenants_identify(const gw_tenants *tenants, const char *authorization, const char *key,
                              gw_tenant **tenant_out, gw_error *error_out)
{
    if (!gw_tenants_has_file(tenants)) {
        *tenant_out = tenants->alone;
        return CM_OK;
    }
    const char *given = key != NULL && key[0] != 0 ? key : bearer(authorization);
    if (given == NULL || given[0] == 0) {
        gw_error_set(error_out, GW_CAUSE_UNAUTHENTICATED, NULL,
                     "an API key is needed: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'");
        return CM_E_INVALID;
    }
    const gw_key_tenant *found = gw_key_file_find(&tenants->file, given);
    if (found == NULL) {
        gw_error_set(error_out, GW_CAUSE_UNAUTHENTICATED, NULL, "the API key is not valid here");
        return CM_E_INVALID;
    }
    *tenant_out = gw_turns_find_tenant(tenants->turns, found->name);
    return CM_OK;
}
