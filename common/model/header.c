#include <inttypes.h>
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
                            " of the data, but the file holds only %" PRIu64 ": it is truncated",
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
    if (!json_is_object(r->value)) {
        return cm_error_set(r->err, CM_E_CORRUPT, r->name, "%s: tensor %.96s must be an object, not %s",
                            r->file_name, r->name, md_json_kind(r->value));
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

static cm_status header_check_cover(const md_header *header, uint64_t data_bytes, const char *file_name,
                                    cm_error *err)
{
    uint64_t at = 0;
    for (uint32_t i = 0; i < header->n; i++) {
        const md_header_row *row = &header->rows[i];
        if (row->begin != at) {
            return cm_error_set(err, CM_E_CORRUPT, row->tensor.name,
                                "%s: tensor %.96s begins at byte %" PRIu64 ", which %s %" PRIu64
                                ", where %.96s ends",
                                file_name, row->tensor.name, row->begin,
                                row->begin < at ? "overlaps: it is before" : "leaves a gap: it is after", at,
                                i > 0 ? header->rows[i - 1].tensor.name : "the header");
        }
        at += row->tensor.n_bytes;
    }
    if (at != data_bytes) {
        return cm_error_set(err, CM_E_CORRUPT, file_name,
                            "%s: %" PRIu64 " bytes after the last tensor belong to none", file_name,
                            data_bytes - at);
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
