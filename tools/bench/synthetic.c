#include "tools/bench/synthetic.h"

#include <errno.h>
#include <jansson.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/model/checkpoint.h"
#include "kernels/kn_math.h"
#include "tools/baleen/cli.h"

enum {
    SYNTHETIC_SEED = 11,
    POOL_VALUES = 1 << 21, /* random values of each kind; tensors are pieces of them */
    PATH_BYTES = 512,
};

/* One kind of values. */
typedef struct pool {
    uint8_t *bytes; /* twice the same values, so that every start has POOL_VALUES of them */
    uint32_t item;
} pool;

typedef enum pool_kind {
    POOL_CODES,
    POOL_PAIRS,
    POOL_SCALES,
    POOL_BF16,
    POOL_NORM,
    POOL_F32,
    POOL_N
} pool_kind;

typedef struct writer {
    FILE *file;
    json_t *header, *map; /* while the header is made */
    uint64_t n_bytes;     /* of tensors so far */
    uint64_t n_tensor;
    pool pools[POOL_N];
    bool failed;
} writer;

static const char SHARD[] = "model-00001-of-00001.safetensors";
static const char *const FILES[] = {"config.json", "model.safetensors.index.json", SHARD};

/* ---- values ---- */

/* About normal. */
static double normal(uint64_t key, uint64_t i)
{
    cm_rng_block b = cm_rng_at(SYNTHETIC_SEED, i, key);
    double sum = 0;
    for (int k = 0; k < 4; k++) {
        sum += (double)b.word[k] / 2147483648.0 - 1;
    }
    return sum;
}

static void put_value(pool_kind kind, uint64_t i, uint8_t *out)
{
    uint32_t bits = cm_rng_at(SYNTHETIC_SEED, i, 100).word[0];
    uint16_t half =
        kn_bf16_encode((float)(kind == POOL_NORM ? 1 + 0.1 * normal(kind, i) : 0.02 * normal(kind, i)));
    float single = (float)(0.02 * normal(kind, i));
    switch (kind) {
    case POOL_CODES:
        *out = kn_e4m3_encode((float)(130 * normal(kind, i)));
        break;
    case POOL_PAIRS:
        *out = (uint8_t)bits;
        break;
    case POOL_SCALES:
        *out = (uint8_t)(112 + bits % 3);
        break;
    case POOL_F32:
        memcpy(out, &single, sizeof(single));
        break;
    default:
        memcpy(out, &half, sizeof(half));
        break;
    }
}

static void pools_fill(pool pools[POOL_N])
{
    static const uint32_t item[POOL_N] = {1, 1, 1, 2, 2, 4};
    for (pool_kind kind = 0; kind < POOL_N; kind++) {
        uint64_t n_bytes = (uint64_t)POOL_VALUES * item[kind];
        pools[kind] = (pool){.bytes = cm_alloc(2 * n_bytes), .item = item[kind]};
        for (uint64_t i = 0; i < POOL_VALUES; i++) {
            put_value(kind, i, pools[kind].bytes + i * item[kind]);
        }
        memcpy(pools[kind].bytes + n_bytes, pools[kind].bytes, n_bytes);
    }
}

static const pool *pool_of(const writer *w, const md_expect *t)
{
    bool norm = strstr(t->name, "norm") != NULL;
    return &w->pools[t->dtype == MD_F8_E4M3   ? POOL_CODES
                     : t->dtype == MD_I8      ? POOL_PAIRS
                     : t->dtype == MD_F8_E8M0 ? POOL_SCALES
                     : t->dtype == MD_F32     ? POOL_F32
                     : norm                   ? POOL_NORM
                                              : POOL_BF16];
}

/* ---- the shard ---- */

static uint64_t tensor_bytes(const md_expect *t)
{
    uint64_t n = md_dtype_bytes(t->dtype);
    for (uint32_t i = 0; i < t->n_dim; i++) {
        n *= t->dim[i];
    }
    return n;
}

static bool describe(void *ctx, const md_expect *t)
{
    writer *w = ctx;
    uint64_t n = tensor_bytes(t);
    json_t *shape = json_array();
    for (uint32_t i = 0; i < t->n_dim; i++) {
        json_array_append_new(shape, json_integer((json_int_t)t->dim[i]));
    }
    json_object_set_new(w->header, t->name,
                        json_pack("{s:s, s:o, s:[I, I]}", "dtype", md_dtype_name(t->dtype), "shape", shape,
                                  "data_offsets", (json_int_t)w->n_bytes, (json_int_t)(w->n_bytes + n)));
    json_object_set_new(w->map, t->name, json_string(SHARD));
    w->n_bytes += n;
    return true;
}

static bool write_tensor(void *ctx, const md_expect *t)
{
    writer *w = ctx;
    const pool *from = pool_of(w, t);
    uint64_t left = tensor_bytes(t);
    for (uint64_t piece = 0; left > 0 && !w->failed; piece++) {
        uint64_t start = cm_rng_at(SYNTHETIC_SEED, piece, 200 + w->n_tensor).word[0] % POOL_VALUES;
        uint64_t n = (uint64_t)POOL_VALUES * from->item < left ? (uint64_t)POOL_VALUES * from->item : left;
        w->failed = fwrite(from->bytes + start * from->item, 1, n, w->file) != n;
        left -= n;
    }
    w->n_tensor++;
    return !w->failed;
}

static cm_status complain(const char *path, cm_error *err)
{
    return cm_error_set(err, CM_E_IO, path, "%s: %s", path, strerror(errno));
}

static cm_status write_shard(writer *w, const char *path, const md_geometry *g, cm_error *err)
{
    cm_bytes text;
    uint64_t padded;
    w->file = fopen(path, "wbe");
    if (w->file == NULL) {
        return complain(path, err);
    }
    cm_bytes_init(&text, 0);
    cli_append_json(&text, w->header, JSON_COMPACT);
    padded = (text.len + 7) / 8 * 8;
    w->failed = fwrite(&padded, sizeof(padded), 1, w->file) != 1 ||
                fprintf(w->file, "%s%*s", cm_bytes_text(&text), (int)(padded - text.len), "") != (int)padded;
    cm_bytes_fini(&text);
    md_expect_each(g, write_tensor, w);
    if (fclose(w->file) != 0 || w->failed) {
        return complain(path, err);
    }
    return CM_OK;
}

/* ---- the folder ---- */

static void path_in(const char *dir, const char *name, char out[PATH_BYTES])
{
    snprintf(out, PATH_BYTES, "%s/%s", dir, name);
}

static cm_status write_text(const char *dir, const char *name, const char *text, cm_error *err)
{
    char path[PATH_BYTES];
    FILE *file;
    path_in(dir, name, path);
    file = fopen(path, "we");
    if (file == NULL || fputs(text, file) < 0 || fclose(file) != 0) {
        return complain(path, err);
    }
    return CM_OK;
}

static cm_status write_all(writer *w, const char *dir, const char *config, const md_geometry *g,
                           cm_error *err)
{
    char path[PATH_BYTES];
    json_t *index;
    cm_bytes text;
    cm_status status;
    md_expect_each(g, describe, w);
    index =
        json_pack("{s:{s:I}, s:O}", "metadata", "total_size", (json_int_t)w->n_bytes, "weight_map", w->map);
    cm_bytes_init(&text, 0);
    cli_append_json(&text, index, JSON_COMPACT);
    json_decref(index);
    path_in(dir, SHARD, path);
    status = write_text(dir, FILES[0], config, err);
    if (status == CM_OK) {
        status = write_text(dir, FILES[1], cm_bytes_text(&text), err);
    }
    if (status == CM_OK) {
        status = write_shard(w, path, g, err);
    }
    cm_bytes_fini(&text);
    return status;
}

cm_status synthetic_write(const char *dir, const char *config, cm_error *err)
{
    md_geometry g;
    writer w = {0};
    cm_status status;
    CM_TRY(md_geometry_parse(config, strlen(config), &g, err));
    if (mkdir(dir, 0700) != 0) {
        return complain(dir, err);
    }
    w.header = json_object();
    w.map = json_object();
    pools_fill(w.pools);
    status = write_all(&w, dir, config, &g, err);
    for (pool_kind kind = 0; kind < POOL_N; kind++) {
        cm_free(w.pools[kind].bytes);
    }
    json_decref(w.header);
    json_decref(w.map);
    if (status != CM_OK) {
        synthetic_remove(dir);
    }
    return status;
}

void synthetic_remove(const char *dir)
{
    for (size_t i = 0; i < sizeof(FILES) / sizeof(FILES[0]); i++) {
        char path[PATH_BYTES];
        path_in(dir, FILES[i], path);
        (void)unlink(path);
    }
    (void)rmdir(dir);
}
