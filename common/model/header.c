#include <inttypes.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "common/model/input_private.h"
#include "common/model/safetensors_private.h"

static const struct {
    const char *name;
    uint32_t n_bytes;
} dtypes[MD_DTYPE_COUNT] = {
    [MD_F32] = {"F32", 4},         [MD_BF16] = {"BF16", 2}, [MD_F8_E4M3] = {"F8_E4M3", 1},
    [MD_F8_E8M0] = {"F8_E8M0", 1}, [MD_I8] = {"I8", 1},     [MD_U8] = {"U8", 1},
    [MD_I64] = {"I64", 8},
};

const char *md_dtype_name(md_dtype dtype)
{
    return dtypes[dtype].name;
}

uint32_t md_dtype_bytes(md_dtype dtype)
{
    return dtypes[dtype].n_bytes;
}

/* ---- one row ---- */

typedef struct row_reader {
    const char *file_name, *name;
    const json_t *value; /* the tensor's object */
    uint64_t data_bytes; /* of the file */
    cm_error *err;
} row_reader;

static cm_status row_dtype(const row_reader *r, md_dtype *dtype_out)
{
    const json_t *word = json_object_get(r->value, "dtype");
    if (!json_is_string(word)) {
        return cm_error_set(r->err, CM_E_CORRUPT, r->name, "%s: tensor %.96s: dtype must be a string, not %s",
                            r->file_name, r->name, md_json_kind(word));
    }
    for (int i = 0; i < MD_DTYPE_COUNT; i++) {
        if (strcmp(json_string_value(word), dtypes[i].name) == 0) {
            *dtype_out = (md_dtype)i;
            return CM_OK;
        }
    }
    return cm_error_set(r->err, CM_E_CORRUPT, r->name, "%s: tensor %.96s: unknown dtype %.40s", r->file_name,
                        r->name, json_string_value(word));
}

/* Also the number of bytes that the shape asks for. */
static cm_status row_shape(const row_reader *r, md_tensor *tensor)
{
    const json_t *shape = json_object_get(r->value, "shape");
    if (!json_is_array(shape) || json_array_size(shape) > MD_DIMS_MAX) {
        return cm_error_set(r->err, CM_E_CORRUPT, r->name,
                            "%s: tensor %.96s: shape must be a list of at most %d sizes", r->file_name,
                            r->name, MD_DIMS_MAX);
    }
    tensor->n_dim = (uint32_t)json_array_size(shape);
    tensor->n_bytes = md_dtype_bytes(tensor->dtype);
    for (uint32_t i = 0; i < tensor->n_dim; i++) {
        const json_t *size = json_array_get(shape, i);
        if (!json_is_integer(size) || json_integer_value(size) < 0) {
            return cm_error_set(r->err, CM_E_CORRUPT, r->name,
                                "%s: tensor %.96s: shape entry %u is not a size", r->file_name, r->name, i);
        }
        tensor->dim[i] = (uint64_t)json_integer_value(size);
        if (__builtin_mul_overflow(tensor->n_bytes, tensor->dim[i], &tensor->n_bytes)) {
            return cm_error_set(r->err, CM_E_CORRUPT, r->name,
                                "%s: tensor %.96s: shape overflows: its bytes do not fit in 64 bits",
                                r->file_name, r->name);
        }
    }
    return CM_OK;
}

static cm_status row_range(const row_reader *r, md_header_row *row)
{
    const json_t *range = json_object_get(r->value, "data_offsets");
    const json_t *begin = json_array_get(range, 0), *end = json_array_get(range, 1);
    if (json_array_size(range) != 2 || !json_is_integer(begin) || !json_is_integer(end) ||
        json_integer_value(begin) < 0 || json_integer_value(end) < json_integer_value(begin)) {
        return cm_error_set(r->err, CM_E_CORRUPT, r->name,
                            "%s: tensor %.96s: data_offsets must be two ascending offsets", r->file_name,
                            r->name);
    }
    row->begin = (uint64_t)json_integer_value(begin);
    uint64_t stop = (uint64_t)json_integer_value(end);
    if (stop > r->data_bytes) {
        return cm_error_set(r->err, CM_E_CORRUPT, r->name,
                            "%s: tensor %.96s ends at byte %" PRIu64
                            " of the data by its data_offsets, but the file holds only %" PRIu64
                            ": it is truncated",
                            r->file_name, r->name, stop, r->data_bytes);
    }
    if (stop - row->begin != row->tensor.n_bytes) {
        return cm_error_set(r->err, CM_E_CORRUPT, r->name,
                            "%s: tensor %.96s: data_offsets hold %" PRIu64
                            " bytes, dtype and shape need %" PRIu64,
                            r->file_name, r->name, stop - row->begin, row->tensor.n_bytes);
    }
    return CM_OK;
}

static cm_status row_read(const row_reader *r, md_header_row *row)
{
    const char *key;
    json_t *value;
    if (!json_is_object(r->value)) {
        return cm_error_set(r->err, CM_E_CORRUPT, r->name, "%s: tensor %.96s must be an object, not %s",
                            r->file_name, r->name, md_json_kind(r->value));
    }
    json_object_foreach((json_t *)(uintptr_t)r->value, key, value)
    {
        if (strcmp(key, "dtype") != 0 && strcmp(key, "shape") != 0 && strcmp(key, "data_offsets") != 0) {
            return cm_error_set(r->err, CM_E_CORRUPT, r->name, "%s: tensor %.96s: unknown key \"%.40s\"",
                                r->file_name, r->name, key);
        }
    }
    CM_TRY(row_dtype(r, &row->tensor.dtype));
    CM_TRY(row_shape(r, &row->tensor));
    return row_range(r, row);
}

/* ---- all rows ---- */

static int row_compare(const void *a, const void *b)
{
    const md_header_row *x = a, *y = b;
    if (x->begin != y->begin) {
        return x->begin < y->begin ? -1 : 1;
    }
    if (x->tensor.n_bytes != y->tensor.n_bytes) { /* empty ones first: they overlap nobody */
        return x->tensor.n_bytes < y->tensor.n_bytes ? -1 : 1;
    }
    return strcmp(x->tensor.name, y->tensor.name);
}

/* After the gap before row first: a tensor that was meant to be there lies on another one. */
static void cover_find_overlap(const md_header *header, uint32_t first, char text[256])
{
    text[0] = '\0';
    for (uint32_t i = first + 1; i < header->n; i++) {
        const md_header_row *row = &header->rows[i], *before = row - 1;
        if (row->begin < before->begin + before->tensor.n_bytes) {
            snprintf(text, 256, "; further on %.96s and %.96s overlap", before->tensor.name,
                     row->tensor.name);
            return;
        }
    }
}

static cm_status cover_wrong(const md_header *header, uint32_t i, uint64_t at, const char *file_name,
                             cm_error *err)
{
    const md_header_row *row = &header->rows[i];
    bool overlaps = row->begin < at;
    char more[256] = "";
    if (!overlaps) {
        cover_find_overlap(header, i, more);
    }
    return cm_error_set(err, CM_E_CORRUPT, row->tensor.name,
                        "%s: tensor %.96s begins at byte %" PRIu64 " by its data_offsets, which %s %" PRIu64
                        ", where %.96s ends%s",
                        file_name, row->tensor.name, row->begin,
                        overlaps ? "overlaps: it is before" : "leaves a gap: it is after", at,
                        i > 0 ? header->rows[i - 1].tensor.name : "the header", more);
}

static cm_status header_check_cover(const md_header *header, uint64_t data_bytes, const char *file_name,
                                    cm_error *err)
{
    uint64_t at = 0;
    for (uint32_t i = 0; i < header->n; i++) {
        if (header->rows[i].begin != at) {
            return cover_wrong(header, i, at, file_name, err);
        }
        at += header->rows[i].tensor.n_bytes;
    }
    if (at != data_bytes) {
        return cm_error_set(
            err, CM_E_CORRUPT, file_name,
            "%s: %" PRIu64 " bytes after the last tensor, %.96s, belong to none", file_name, data_bytes - at,
            header->n > 0 ? header->rows[header->n - 1].tensor.name : "of which there is none");
    }
    return CM_OK;
}

/* A map from strings to strings; nothing in it is read. */
static cm_status header_check_metadata(const json_t *metadata, const char *file_name, cm_error *err)
{
    const char *key;
    json_t *value;
    if (metadata == NULL) {
        return CM_OK;
    }
    if (!json_is_object(metadata)) {
        return cm_error_set(err, CM_E_CORRUPT, file_name, "%s: __metadata__ must be an object, not %s",
                            file_name, md_json_kind(metadata));
    }
    json_object_foreach((json_t *)(uintptr_t)metadata, key, value)
    {
        if (!json_is_string(value)) {
            return cm_error_set(err, CM_E_CORRUPT, file_name,
                                "%s: __metadata__: %.40s must be a string, not %s", file_name, key,
                                md_json_kind(value));
        }
    }
    return CM_OK;
}

/* Room for every entry of root, its "__metadata__" too if it has one. */
static cm_status header_reserve(json_t *root, md_header *header)
{
    size_t n_text = 0;
    const char *name;
    json_t *value;
    json_object_foreach(root, name, value)
    {
        n_text += strlen(name) + 1;
    }
    header->rows = cm_try_alloc(json_object_size(root) * sizeof header->rows[0]);
    header->names = cm_try_alloc(n_text);
    return header->rows != NULL && header->names != NULL ? CM_OK : CM_E_MEMORY;
}

static cm_status header_read(json_t *root, uint64_t data_bytes, const char *file_name, md_header *header,
                             cm_error *err)
{
    row_reader reader = {.file_name = file_name, .data_bytes = data_bytes, .err = err};
    if (header_reserve(root, header) != CM_OK) {
        return cm_error_set(err, CM_E_MEMORY, file_name, "%s: out of memory for %zu tensors", file_name,
                            json_object_size(root));
    }
    CM_TRY(header_check_metadata(json_object_get(root, "__metadata__"), file_name, err));
    char *name_at = header->names;
    const char *name;
    json_t *value;
    json_object_foreach(root, name, value)
    {
        if (strcmp(name, "__metadata__") == 0) {
            continue;
        }
        md_header_row *row = &header->rows[header->n];
        reader.name = name;
        reader.value = value;
        CM_TRY(row_read(&reader, row));
        size_t name_bytes = strlen(name) + 1;
        row->tensor.name = memcpy(name_at, name, name_bytes);
        name_at += name_bytes;
        header->n++;
    }
    qsort(header->rows, header->n, sizeof header->rows[0], row_compare);
    return header_check_cover(header, data_bytes, file_name, err);
}

cm_status md_safetensors_parse_header(const char *text, size_t n_bytes, uint64_t file_bytes,
                                      const char *file_name, md_header *header_out, cm_error *err)
{
    CM_ASSERT(file_bytes >= 8 && n_bytes <= file_bytes - 8);
    md_header header = {0};
    json_t *root;
    CM_TRY(md_json_object(text, n_bytes, file_name, &root, err));
    cm_status status = header_read(root, file_bytes - 8 - n_bytes, file_name, &header, err);
    json_decref(root);
    if (status != CM_OK) {
        md_header_fini(&header);
        return status;
    }
    *header_out = header;
    return CM_OK;
}

void md_header_fini(md_header *header)
{
    cm_free(header->rows);
    cm_free(header->names);
    *header = (md_header){0};
}
