/* One field of a good document made wrong. Input: which document (1 byte), which field (2 bytes,
 * little-endian), what is done to it (1 byte: another value, removed, renamed, a second key beside it), and
 * the value as JSON or the key as text. What is refused is refused with the field named; what is accepted is
 * on the closed lists of tests/unit/field_rules.h, or the closed list of tensors changes with it. */
#include <jansson.h>
#include <string.h>
#include <xxhash.h>

#include "common/base/mem.h"
#include "common/model/checkpoint.h"
#include "common/model/safetensors_private.h"
#include "tests/fuzz/fuzz.h"
#include "tests/unit/field_rules.h"

enum { DOCUMENTS = 3, FIELDS_MAX = 256, TENSORS = 8 };
enum { HOW_VALUE, HOW_REMOVE, HOW_RENAME, HOW_ADD, HOWS };

typedef struct fuzz_place {
    size_t parent; /* place of the object or list it is in, 0: the root */
    char key[96];  /* "" for an entry of a list */
    size_t i;
    char path[160];
} fuzz_place;

typedef struct fuzz_document {
    json_t *good;
    fuzz_place places[FIELDS_MAX]; /* [0] is the root */
    size_t n_place;
    md_geometry geometry; /* of a config */
    uint64_t list;        /* digest of its closed list */
    md_header header;     /* of a header */
    uint64_t data_bytes;
} fuzz_document;

static fuzz_document documents[DOCUMENTS]; /* two configs and a header */

static json_t *place_get(const fuzz_document *d, json_t *root, size_t place)
{
    if (place == 0) {
        return root;
    }
    const fuzz_place *p = &d->places[place];
    json_t *parent = place_get(d, root, p->parent);
    return json_is_array(parent) ? json_array_get(parent, p->i) : json_object_get(parent, p->key);
}

static void place_add(fuzz_document *d, size_t parent, const char *key, size_t i)
{
    CM_ASSERT(d->n_place < FIELDS_MAX);
    fuzz_place *p = &d->places[d->n_place++];
    const char *above = d->places[parent].path;
    p->parent = parent;
    p->i = i;
    snprintf(p->key, sizeof p->key, "%s", key != NULL ? key : "");
    if (key != NULL) {
        snprintf(p->path, sizeof p->path, "%s%s%.90s", above, above[0] != '\0' ? "." : "", key);
    } else {
        snprintf(p->path, sizeof p->path, "%.140s[%zu]", above, i);
    }
}

/* All places, parents before what is in them. */
static void places_find(fuzz_document *d)
{
    d->n_place = 1;
    for (size_t at = 0; at < d->n_place; at++) {
        json_t *value = place_get(d, d->good, at), *member;
        const char *key;
        size_t i;
        json_object_foreach(value, key, member)
        {
            place_add(d, at, key, 0);
        }
        json_array_foreach(value, i, member)
        {
            place_add(d, at, NULL, i);
        }
    }
}

static bool list_add(void *ctx, const md_expect *expect)
{
    uint64_t *digest = ctx;
    uint64_t row[MD_DIMS_MAX + 3] = {*digest, (uint64_t)expect->dtype, expect->n_dim};
    memcpy(row + 3, expect->dim, sizeof expect->dim);
    *digest = XXH3_64bits_withSeed(expect->name, strlen(expect->name), XXH3_64bits(row, sizeof row));
    return true;
}

static uint64_t list_digest(const md_geometry *geometry)
{
    uint64_t digest = 0;
    md_expect_each(geometry, list_add, &digest);
    return digest;
}

static cm_status config_read(const json_t *root, md_geometry *out, cm_error *err)
{
    char *text = json_dumps(root, JSON_COMPACT);
    cm_status status = md_geometry_parse(text, strlen(text), out, err);
    cm_free(text);
    return status;
}

static cm_status header_read(const fuzz_document *d, const json_t *root, md_header *out, cm_error *err)
{
    char *text = json_dumps(root, JSON_COMPACT);
    size_t n = strlen(text);
    cm_status status = md_safetensors_parse_header(text, n, 8 + n + d->data_bytes, "shard", out, err);
    cm_free(text);
    return status;
}

static void config_load(fuzz_document *d, const char *path)
{
    d->good = json_load_file(path, 0, NULL);
    CM_ASSERT(d->good != NULL && config_read(d->good, &d->geometry, NULL) == CM_OK);
    d->list = list_digest(&d->geometry);
    places_find(d);
}

/* The first tensors of a shard. */
static void header_load(fuzz_document *d, const char *path)
{
    md_safetensors *file;
    cm_status status = md_safetensors_open(path, &file, NULL);
    CM_ASSERT(status == CM_OK);
    d->good = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    for (uint32_t i = 0; i < TENSORS; i++) {
        const md_tensor *t = md_safetensors_at(file, i);
        json_t *shape = json_array();
        for (uint32_t k = 0; k < t->n_dim; k++) {
            json_array_append_new(shape, json_integer((json_int_t)t->dim[k]));
        }
        json_int_t begin = (json_int_t)d->data_bytes;
        d->data_bytes += t->n_bytes;
        json_object_set_new(d->good, t->name,
                            json_pack("{s:s,s:o,s:[I,I]}", "dtype", md_dtype_name(t->dtype), "shape", shape,
                                      "data_offsets", begin, (json_int_t)d->data_bytes));
    }
    md_safetensors_close(file);
    status = header_read(d, d->good, &d->header, NULL);
    CM_ASSERT(status == CM_OK);
    places_find(d);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    json_set_alloc_funcs(cm_try_alloc, cm_free);
    config_load(&documents[0], BALEEN_TEST_DATA "/model/tiny-flash/ckpt/config.json");
    config_load(&documents[1], BALEEN_NANO "/config.json");
    header_load(&documents[2], BALEEN_TEST_DATA "/model/tiny-flash/ckpt/model-00004-of-00008.safetensors");
    return 0;
}

/* ---- the edit ---- */

typedef struct fuzz_edit {
    fuzz_document *document;
    const fuzz_place *place;
    int how;
    json_t *value; /* owned; the new value */
    char text[64]; /* the new key */
} fuzz_edit;

/* False when the input makes no change of one field. */
static bool edit_read(const uint8_t *data, size_t size, fuzz_edit *e)
{
    if (size < 4) {
        return false;
    }
    e->document = &documents[data[0] % DOCUMENTS];
    e->place = &e->document->places[1 + (data[1] | (size_t)data[2] << 8) % (e->document->n_place - 1)];
    e->how = data[3] % HOWS;
    e->value = json_loadb((const char *)data + 4, size - 4, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES, NULL);
    snprintf(e->text, sizeof e->text, "%.*s", (int)(size - 4 < 63 ? size - 4 : 63), (const char *)data + 4);
    return e->how != HOW_VALUE || e->value != NULL;
}

static bool edit_apply(const fuzz_edit *e, json_t *root)
{
    json_t *parent = place_get(e->document, root, e->place->parent), *before;
    bool in_list = json_is_array(parent);
    before = in_list ? json_array_get(parent, e->place->i) : json_object_get(parent, e->place->key);
    switch (e->how) {
    case HOW_VALUE:
        return !json_equal(e->value, before) &&
               (in_list ? json_array_set(parent, e->place->i, e->value) == 0
                        : json_object_set(parent, e->place->key, e->value) == 0);
    case HOW_REMOVE:
        return (in_list ? json_array_remove(parent, e->place->i) : json_object_del(parent, e->place->key)) ==
               0;
    case HOW_RENAME:
        return !in_list && json_object_get(parent, e->text) == NULL &&
               json_object_set(parent, e->text, before) == 0 && json_object_del(parent, e->place->key) == 0;
    default:
        return !in_list && json_object_get(parent, e->text) == NULL &&
               json_object_set(parent, e->text, before) == 0;
    }
}

/* ---- what must hold ---- */

static void config_check(const fuzz_edit *e, json_t *root)
{
    const char *path = e->place->path;
    md_geometry geometry;
    cm_error err = {0};
    bool drafter = e->how >= HOW_RENAME && strncmp(e->text, "dspark_", 7) == 0;
    if (config_read(root, &geometry, &err) != CM_OK) {
        CM_ASSERT_MSG(field_is_named(path, err.text) || (drafter && strstr(err.text, "dspark_") != NULL),
                      "%s: %s", path, err.text);
        return;
    }
    bool same = memcmp(&geometry, &e->document->geometry, sizeof geometry) == 0;
    bool gone = e->how == HOW_REMOVE || e->how == HOW_RENAME;
    if (e->how == HOW_ADD || (gone && field_may_be_absent(path)) || field_is_unread(path)) {
        CM_ASSERT_MSG(same, "%s: a harmless edit had an effect", path);
    } else if (same) { /* 1e4 for 10000 */
        const fuzz_place *p = e->place;
        const json_t *was = place_get(e->document, e->document->good, (size_t)(p - e->document->places));
        CM_ASSERT_MSG(e->how == HOW_VALUE && json_is_number(e->value), "%s: ignored", path);
        CM_ASSERT_MSG((float)json_number_value(e->value) == (float)json_number_value(was), "%s: ignored",
                      path);
    } else {
        CM_ASSERT_MSG(e->how == HOW_VALUE &&
                          (field_is_free(path) || list_digest(&geometry) != e->document->list),
                      "%s: no tensor shows it", path);
    }
}

static bool row_same(const md_header_row *a, const md_header_row *b)
{
    return a->begin == b->begin && a->tensor.dtype == b->tensor.dtype && a->tensor.n_dim == b->tensor.n_dim &&
           memcmp(a->tensor.dim, b->tensor.dim, sizeof a->tensor.dim) == 0 &&
           strcmp(a->tensor.name, b->tensor.name) == 0;
}

/* The name of the tensor that the field belongs to; "" for the metadata. */
static const char *header_tensor(const fuzz_edit *e)
{
    const fuzz_place *p = e->place;
    while (p->parent != 0) {
        p = &e->document->places[p->parent];
    }
    return strcmp(p->key, "__metadata__") == 0 ? "" : p->key;
}

static void header_check(const fuzz_edit *e, json_t *root)
{
    const md_header *good = &e->document->header;
    const char *tensor = header_tensor(e);
    md_header header;
    cm_error err = {0};
    uint32_t n_other = 0;
    if (header_read(e->document, root, &header, &err) != CM_OK) {
        bool entry_lost = e->place->parent == 0 && e->how != HOW_VALUE;
        CM_ASSERT_MSG(entry_lost || strstr(err.text, tensor) != NULL, "%s: %s", e->place->path, err.text);
        return;
    }
    CM_ASSERT(header.n == good->n);
    for (uint32_t i = 0; i < good->n; i++) {
        bool ours = strcmp(good->rows[i].tensor.name, tensor) == 0;
        bool same = row_same(&header.rows[i], &good->rows[i]);
        CM_ASSERT_MSG(same || ours, "%s: changed %s", e->place->path, good->rows[i].tensor.name);
        CM_ASSERT(header.rows[i].begin == good->rows[i].begin);
        n_other += !same;
    }
    CM_ASSERT_MSG(n_other == (tensor[0] != '\0'), "%s: ignored", e->place->path);
    md_header_fini(&header);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    fuzz_edit e = {0};
    if (edit_read(data, size, &e)) {
        json_t *root = json_deep_copy(e.document->good);
        if (edit_apply(&e, root)) {
            if (e.document->header.n > 0) {
                header_check(&e, root);
            } else {
                config_check(&e, root);
            }
        }
        json_decref(root);
    }
    json_decref(e.value);
    return 0;
}
