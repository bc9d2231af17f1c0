/* The header of a safetensors file from memory, apart from files and mappings, and what a fingerprint needs.
 * Thread: any. */
#pragma once
#include <stdbool.h>

#include "common/model/safetensors.h"

typedef struct md_header_row {
    md_tensor tensor; /* .data and .file are NULL until a file is behind it */
    uint64_t begin;   /* offset in the data part */
} md_header_row;

typedef struct md_header {
    md_header_row *rows; /* owned; by ascending begin */
    uint32_t n;
    char *names; /* owned; what tensor.name points into */
} md_header;

/* text: the n_bytes of JSON after the 8-byte length; file_bytes: size of the whole file, at least 8 +
 * n_bytes. The rows cover the file_bytes - 8 - n_bytes bytes of data exactly. file_name: for sentences, and
 * err->field where no tensor is to blame. CM_E_CORRUPT, CM_E_MEMORY. */
CM_MUST_CHECK cm_status md_safetensors_parse_header(const char *text, size_t n_bytes, uint64_t file_bytes,
                                                    const char *file_name, md_header *header_out,
                                                    cm_error *err);
void md_header_fini(md_header *header); /* also on a zeroed struct */

/* Size of the data part. */
uint64_t md_safetensors_data_bytes(const md_safetensors *file);
/* Copies n_bytes of the data part from offset at, past the mapping: a touched page of a mapping may read
 * megabytes ahead, and its read errors are signals. CM_E_IO. The range inside the data is the caller's duty.
 */
CM_MUST_CHECK cm_status md_safetensors_read(const md_safetensors *file, uint64_t at, void *out,
                                            size_t n_bytes, cm_error *err);

/* Where the data of a tensor begins in its file. */
uint64_t md_tensor_offset(const md_tensor *tensor);
/* Whether the system lets us see what of the file is in the page cache (mincore tells that only to those who
 * might change the file). */
bool md_safetensors_tells_cache(const md_safetensors *file);
/* Whether the file can be read past the page cache, as far as is known; opens it so. Thread: any. */
bool md_safetensors_direct(md_safetensors *file);
/* Reads so: begin, n_bytes and out are multiples of 4096; what is beyond the end of the file is left as it
 * is. CM_E_UNSUPPORTED when that turns out not to work here: md_safetensors_direct says no from then on.
 * CM_E_IO. Thread: any. */
CM_MUST_CHECK cm_status md_safetensors_read_direct(md_safetensors *file, uint64_t begin, void *out,
                                                   uint64_t n_bytes, cm_error *err);
