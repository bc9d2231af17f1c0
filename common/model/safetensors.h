/* One safetensors file, mapped read-only. The header is checked in full: size, JSON, dtypes, shapes against
 * byte ranges, ranges without gap or overlap and inside the file. Thread: after open any (read-only). */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "common/base/status.h"

typedef enum md_dtype {
    MD_F32,
    MD_BF16,
    MD_F8_E4M3,
    MD_F8_E8M0,
    MD_I8,
    MD_U8,
    MD_I64,
    MD_DTYPE_COUNT
} md_dtype;
enum { MD_DIMS_MAX = 4 };

const char *md_dtype_name(md_dtype dtype); /* "F8_E4M3" */
uint32_t md_dtype_bytes(md_dtype dtype);

typedef struct md_safetensors md_safetensors;

typedef struct md_tensor {
    const char *name; /* borrowed from the file object */
    md_dtype dtype;
    uint32_t n_dim;
    uint64_t dim[MD_DIMS_MAX];
    const void *data; /* in the mapping; aligned to at least 1 byte only */
    uint64_t n_bytes;
    md_safetensors *file; /* borrowed; it holds the tensor */
} md_tensor;

CM_MUST_CHECK cm_status md_safetensors_open(const char *path, md_safetensors **file_out, cm_error *err);
void md_safetensors_close(md_safetensors *file);
uint32_t md_safetensors_count(const md_safetensors *file);
const md_tensor *md_safetensors_at(const md_safetensors *file, uint32_t i); /* in file order */
const md_tensor *md_safetensors_find(const md_safetensors *file,
                                     const char *name); /* NULL when absent; by hash */
const char *md_safetensors_path(const md_safetensors *file);
/* The raw header text, for fingerprints. */
const char *md_safetensors_header(const md_safetensors *file, size_t *n_bytes_out);
