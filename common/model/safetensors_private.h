/* The header of a safetensors file from memory, apart from files and mappings, and what a fingerprint needs.
 * Thread: any. */
#pragma once
#include "common/model/safetensors.h"

typedef struct md_header_row {
    md_tensor tensor; /* .data is NULL until a file is behind it */
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
