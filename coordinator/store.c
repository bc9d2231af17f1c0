#include "coordinator/store.h"

#include <string.h>

static const co_store_ops *const g_stores[] = {&co_store_sqlite_ops, &co_store_etcd_ops};

cm_status co_store_open(pc_loop *loop, const co_store_options *options, const co_store_events *events,
                        void *ctx, co_store **store_out, cm_error *err)
{
    const char *mark = strstr(options->url, "://");
    size_t n_scheme = mark != NULL ? (size_t)(mark - options->url) : 0;
    for (size_t i = 0; i < sizeof(g_stores) / sizeof(g_stores[0]); i++) {
        const char *scheme = g_stores[i]->scheme;
        if (strlen(scheme) == n_scheme && strncmp(scheme, options->url, n_scheme) == 0) {
            return g_stores[i]->open(loop, options, events, ctx, store_out, err);
        }
    }
    return cm_error_set(err, CM_E_CONFIG, "store",
                        "'%.200s' is no store: give a folder, or etcd://HOST:PORT[,HOST:PORT]/PREFIX",
                        options->url);
}

bool co_store_is_active(const co_store *store)
{
    return store->ops->is_active(store);
}

cm_status co_store_write(co_store *store, uint64_t ticket, uint32_t next_member_id, uint64_t next_number,
                         const co_drains *drains, co_epoch *epoch)
{
    return store->ops->write(store, ticket, next_member_id, next_number, drains, epoch);
}

void co_store_stop(co_store *store, pc_fn done, void *arg)
{
    store->ops->stop(store, done, arg);
}

void co_store_close(co_store *store)
{
    if (store != NULL) {
        store->ops->close(store);
    }
}
