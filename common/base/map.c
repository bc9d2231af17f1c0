#include "common/base/map.h"

#include "common/base/assert.h"
#include "common/base/mem.h"

static uint32_t map_home(const cm_map *map, uint64_t key)
{
    key ^= key >> 31;
    key *= 0x9E3779B97F4A7C15u;
    key ^= key >> 29;
    return (uint32_t)key & (map->n_slots - 1);
}

static uint32_t map_find(const cm_map *map, uint64_t key)
{
    uint32_t i = map_home(map, key);
    while (map->slots[i].value != NULL && map->slots[i].key != key) {
        i = (i + 1) & (map->n_slots - 1);
    }
    return i;
}

void cm_map_init(cm_map *map, uint32_t n_max)
{
    uint32_t n_slots = 8;
    CM_ASSERT(n_max > 0 && n_max < 1u << 30);
    while (n_slots < n_max * 2) {
        n_slots *= 2;
    }
    *map = (cm_map){.n_slots = n_slots, .n_max = n_max};
    map->slots = cm_alloc(sizeof(cm_map_entry) * n_slots);
}

void cm_map_fini(cm_map *map)
{
    cm_free(map->slots);
    *map = (cm_map){0};
}

void *cm_map_get(const cm_map *map, uint64_t key)
{
    return map->slots[map_find(map, key)].value;
}

cm_status cm_map_put(cm_map *map, uint64_t key, void *value)
{
    CM_ASSERT(value != NULL);
    uint32_t i = map_find(map, key);
    if (map->slots[i].value != NULL) {
        return CM_E_EXISTS;
    }
    if (map->n_used == map->n_max) {
        return CM_AGAIN;
    }
    map->slots[i] = (cm_map_entry){key, value};
    map->n_used++;
    return CM_OK;
}

void *cm_map_remove(cm_map *map, uint64_t key)
{
    uint32_t i = map_find(map, key);
    void *value = map->slots[i].value;
    if (value == NULL) {
        return NULL;
    }
    /* close the gap: move up every follower whose home is not between the hole and itself */
    uint32_t hole = i, mask = map->n_slots - 1;
    for (uint32_t j = (i + 1) & mask; map->slots[j].value != NULL; j = (j + 1) & mask) {
        uint32_t home = map_home(map, map->slots[j].key);
        if (((j - home) & mask) >= ((j - hole) & mask)) {
            map->slots[hole] = map->slots[j];
            hole = j;
        }
    }
    map->slots[hole] = (cm_map_entry){0, NULL};
    map->n_used--;
    return value;
}

bool cm_map_next(const cm_map *map, uint32_t *at, uint64_t *key_out, void **value_out)
{
    while (*at < map->n_slots) {
        const cm_map_entry *entry = &map->slots[(*at)++];
        if (entry->value != NULL) {
            *key_out = entry->key;
            *value_out = entry->value;
            return true;
        }
    }
    return false;
}
