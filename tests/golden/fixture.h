/* Golden data for tests: safetensors files read whole, JSON files, and comparison with a tolerance. Anything
 * wrong with a file fails the running test. Thread: one. */
#pragma once
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct fx_file fx_file;

typedef struct fx_tensor {
    const char *name;
    const char *dtype; /* as in the file: "F32", "BF16", "I64", "U8", "I8", "F8_E4M3", "F8_E8M0" */
    uint32_t n_dim;
    uint64_t dim[4];
    uint64_t n_item, n_bytes;
    const void *data; /* a copy aligned to 64 bytes; lives until fx_close */
} fx_tensor;

fx_file *fx_open(const char *path);
void fx_close(fx_file *file);
size_t fx_count(const fx_file *file);
const fx_tensor *fx_at(const fx_file *file, size_t i);
const fx_tensor *fx_find(const fx_file *file, const char *name); /* NULL when absent */
/* By a name put together as printf does; must be there. */
const fx_tensor *fx_get(const fx_file *file, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* returned: json_decref. */
json_t *fx_json(const char *path);

/* How an output is to be compared: "exact" (equal bits, NaN equals any NaN) or within both bounds. */
typedef struct fx_bound {
    bool exact;
    double max_abs, rel_rms; /* rms(difference) / rms(golden) */
    double max_rel,
        rel_floor; /* max_rel 0: none; else for elements whose golden magnitude is at least rel_floor */
} fx_bound;

/* From an output's description in an index file, class "D" or "F". */
fx_bound fx_bound_read(const json_t *output, const char *numeric_class);
/* got [n_item] in the tensor's own dtype (F32, BF16, U8 or I64). The errors go to the error table; fails the
 * test with group, what, the place and values. */
void fx_compare(const char *group, const char *what, const fx_tensor *golden, const void *got,
                const fx_bound *bound);
