#include "common/model/names_private.h"

#include <string.h>
#include <xxhash.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

uint64_t md_name_hash(const char *name)
{
    return XXH3_64bits(name, strlen(name));
}

void md_names_init(md_names *names, uint32_t n_max)
{
    *names = (md_names){.n_max = n_max};
    cm_map_init(&names->map, n_max != 0 ? n_max : 1);
    names->nodes = cm_alloc(sizeof(md_name_node) * n_max);
}

void md_names_fini(md_names *names)
{
    cm_map_fini(&names->map);
    cm_free(names->nodes);
    *names = (md_names){0};
}

static md_name_node *names_find(const md_names *names, uint64_t hash, const char *name,
                                md_name_node **last_out)
{
    md_name_node *last = NULL;
    for (md_name_node *node = cm_map_get(&names->map, hash); node != NULL; node = node->next) {
        if (strcmp(node->name, name) == 0) {
            return node;
        }
        last = node;
    }
    *last_out = last;
    return NULL;
}

bool md_names_put(md_names *names, uint64_t hash, const char *name, void *value)
{
    md_name_node *last;
    if (names_find(names, hash, name, &last) != NULL) {
        return false;
    }
    CM_ASSERT(names->n < names->n_max && value != NULL);
    md_name_node *node = &names->nodes[names->n++];
    *node = (md_name_node){.name = name, .value = value};
    if (last != NULL) {
        last->next = node;
    } else {
        cm_status status = cm_map_put(&names->map, hash, node);
        CM_ASSERT(status == CM_OK);
    }
    return true;
}

void *md_names_get(const md_names *names, uint64_t hash, const char *name)
{
    md_name_node *last;
    md_name_node *node = names_find(names, hash, name, &last);
    return node != NULL ? node->value : NULL;
}
