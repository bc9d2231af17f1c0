#include "tests/golden/fixture.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <setjmp.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "tests/golden/error_table.h"

struct fx_file {
    json_t *header;
    fx_tensor *tensors;
    size_t n_tensor;
};

static uint8_t *read_whole(const char *path, size_t *n_bytes_out)
{
    FILE *in = fopen(path, "rb");
    uint8_t *bytes;
    long size;
    if (in == NULL) {
        fail_msg("cannot open %s", path);
    }
    fseek(in, 0, SEEK_END);
    size = ftell(in);
    fseek(in, 0, SEEK_SET);
    bytes = cm_alloc((size_t)size + 1);
    if (fread(bytes, 1, (size_t)size, in) != (size_t)size) {
        fail_msg("cannot read %s", path);
    }
    fclose(in);
    *n_bytes_out = (size_t)size;
    return bytes;
}

static void read_tensor(fx_tensor *t, const char *name, const json_t *entry, const uint8_t *data,
                        size_t n_bytes)
{
    const json_t *shape = json_object_get(entry, "shape"), *range = json_object_get(entry, "data_offsets");
    uint64_t begin = (uint64_t)json_integer_value(json_array_get(range, 0));
    uint64_t end = (uint64_t)json_integer_value(json_array_get(range, 1));
    void *copy;
    assert_true(begin <= end && end <= n_bytes);
    *t = (fx_tensor){.name = name,
                     .dtype = json_string_value(json_object_get(entry, "dtype")),
                     .n_dim = (uint32_t)json_array_size(shape),
                     .n_item = 1,
                     .n_bytes = end - begin};
    assert_true(t->n_dim <= 4);
    for (uint32_t i = 0; i < t->n_dim; i++) {
        t->dim[i] = (uint64_t)json_integer_value(json_array_get(shape, i));
        t->n_item *= t->dim[i];
    }
    copy = cm_alloc_aligned(t->n_bytes + 1);
    memcpy(copy, data + begin, t->n_bytes);
    t->data = copy;
}

fx_file *fx_open(const char *path)
{
    size_t n_bytes;
    uint8_t *bytes = read_whole(path, &n_bytes);
    fx_file *file = cm_alloc(sizeof(*file));
    uint64_t header_bytes;
    const char *name;
    json_t *entry;
    assert_true(n_bytes >= 8);
    memcpy(&header_bytes, bytes, 8);
    assert_true(header_bytes <= n_bytes - 8);
    file->header = json_loadb((const char *)bytes + 8, header_bytes, 0, NULL);
    if (file->header == NULL) {
        fail_msg("the header of %s is not JSON", path);
    }
    file->tensors = cm_alloc(json_object_size(file->header) * sizeof(*file->tensors));
    json_object_foreach(file->header, name, entry)
    {
        if (strcmp(name, "__metadata__") != 0) {
            read_tensor(&file->tensors[file->n_tensor++], name, entry, bytes + 8 + header_bytes,
                        n_bytes - 8 - header_bytes);
        }
    }
    cm_free(bytes);
    return file;
}

void fx_close(fx_file *file)
{
    for (size_t i = 0; i < file->n_tensor; i++) {
        cm_free((void *)(uintptr_t)file->tensors[i].data);
    }
    cm_free(file->tensors);
    json_decref(file->header);
    cm_free(file);
}

size_t fx_count(const fx_file *file)
{
    return file->n_tensor;
}

const fx_tensor *fx_at(const fx_file *file, size_t i)
{
    return &file->tensors[i];
}

const fx_tensor *fx_find(const fx_file *file, const char *name)
{
    for (size_t i = 0; i < file->n_tensor; i++) {
        if (strcmp(file->tensors[i].name, name) == 0) {
            return &file->tensors[i];
        }
    }
    return NULL;
}

const fx_tensor *fx_get(const fx_file *file, const char *fmt, ...)
{
    const fx_tensor *t;
    char name[256];
    va_list args;
    va_start(args, fmt);
    vsnprintf(name, sizeof(name), fmt, args);
    va_end(args);
    t = fx_find(file, name);
    if (t == NULL) {
        fail_msg("no tensor %s", name);
    }
    return t;
}

json_t *fx_json(const char *path)
{
    json_error_t error;
    size_t n_bytes;
    char *text = (char *)read_whole(path, &n_bytes), *at = text;
    /* the fixtures write infinite margins as Python does; JSON has no word for them */
    for (size_t left = n_bytes; (at = memmem(at, left, "Infinity", 8)) != NULL;
         left = n_bytes - (size_t)(at - text)) {
        memcpy(at, "   1e308", 8);
    }
    json_t *json = json_loadb(text, n_bytes, 0, &error);
    cm_free(text);
    if (json == NULL) {
        fail_msg("%s line %d: %s", path, error.line, error.text);
    }
    return json;
}

/* ---- comparison ---- */

fx_bound fx_bound_read(const json_t *output, const char *numeric_class)
{
    const json_t *limits = json_object_get(output, numeric_class);
    const char *compare = json_string_value(json_object_get(output, "compare"));
    fx_bound bound = {.exact = compare != NULL && strcmp(compare, "exact") == 0};
    if (!bound.exact) {
        assert_non_null(limits);
        bound.max_abs = json_number_value(json_object_get(limits, "max_abs"));
        bound.rel_rms = json_number_value(json_object_get(limits, "rel_rms"));
        bound.max_rel = json_number_value(json_object_get(output, "max_rel"));
        bound.rel_floor = json_number_value(json_object_get(output, "rel_floor"));
    }
    return bound;
}

static double value_at(const char *dtype, const void *data, uint64_t i)
{
    if (strcmp(dtype, "F32") == 0) {
        return ((const float *)data)[i];
    }
    if (strcmp(dtype, "BF16") == 0) {
        uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
        float value;
        memcpy(&value, &bits, sizeof(value));
        return value;
    }
    if (strcmp(dtype, "I64") == 0) {
        return (double)((const int64_t *)data)[i];
    }
    assert_string_equal(dtype, "U8");
    return ((const uint8_t *)data)[i];
}

/* How many items differ, and the first of them. */
static uint64_t count_unequal(const fx_tensor *golden, const void *got, uint64_t *first_out)
{
    uint64_t item_bytes = golden->n_item > 0 ? golden->n_bytes / golden->n_item : 0, n = 0;
    for (uint64_t i = 0; i < golden->n_item; i++) {
        double want = value_at(golden->dtype, golden->data, i), have = value_at(golden->dtype, got, i);
        bool same = memcmp((const uint8_t *)golden->data + i * item_bytes,
                           (const uint8_t *)got + i * item_bytes, item_bytes) == 0;
        if (!same && !(isnan(want) && isnan(have))) {
            *first_out = n == 0 ? i : *first_out;
            n++;
        }
    }
    return n;
}

static void compare_exact(const char *group, const char *what, const fx_tensor *golden, const void *got)
{
    uint64_t first = 0, n = count_unequal(golden, got, &first);
    error_table_note(group, what, "exact", (double)n, 0);
    if (n > 0) {
        fail_msg("%s/%s: item %llu is %.9g, golden %.9g; %llu of %llu differ", group, what,
                 (unsigned long long)first, value_at(golden->dtype, got, first),
                 value_at(golden->dtype, golden->data, first), (unsigned long long)n,
                 (unsigned long long)golden->n_item);
    }
}

/* Differences between an output and its golden values. */
typedef struct fx_off {
    double max_abs, rel_rms, max_rel; /* max_rel: of the items from the bound's floor on */
    uint64_t at, at_rel;              /* items with max_abs and max_rel */
} fx_off;

static fx_off measure(const fx_tensor *golden, const void *got, const fx_bound *bound)
{
    fx_off off = {0};
    double sum = 0, sum_golden = 0;
    for (uint64_t i = 0; i < golden->n_item; i++) {
        double want = value_at(golden->dtype, golden->data, i), have = value_at(golden->dtype, got, i);
        double d = fabs(want - have);
        if (!(d <= off.max_abs) && !isnan(off.max_abs)) { /* a NaN stays */
            off.max_abs = d;
            off.at = i;
        }
        sum += d * d;
        sum_golden += want * want;
        if (bound->max_rel > 0 && fabs(want) >= bound->rel_floor && !(d <= off.max_rel * fabs(want))) {
            off.max_rel = d / fabs(want);
            off.at_rel = i;
        }
    }
    off.rel_rms = sum == 0 ? 0 : sqrt(sum / sum_golden);
    return off;
}

void fx_compare(const char *group, const char *what, const fx_tensor *golden, const void *got,
                const fx_bound *bound)
{
    if (bound->exact) {
        compare_exact(group, what, golden, got);
        return;
    }
    fx_off off = measure(golden, got, bound);
    error_table_note(group, what, "max_abs", off.max_abs, bound->max_abs);
    error_table_note(group, what, "rel_rms", off.rel_rms, bound->rel_rms);
    if (bound->max_rel > 0) {
        error_table_note(group, what, "max_rel", off.max_rel, bound->max_rel);
        if (!(off.max_rel <= bound->max_rel)) {
            fail_msg("%s/%s: item %llu is %.9g, golden %.9g, relative error above %g", group, what,
                     (unsigned long long)off.at_rel, value_at(golden->dtype, got, off.at_rel),
                     value_at(golden->dtype, golden->data, off.at_rel), bound->max_rel);
        }
    }
    if (!(off.max_abs <= bound->max_abs) || !(off.rel_rms <= bound->rel_rms)) {
        fail_msg("%s/%s: worst item %llu is %.9g, golden %.9g (off %g, bound %g); relative rms %g, bound %g",
                 group, what, (unsigned long long)off.at, value_at(golden->dtype, got, off.at),
                 value_at(golden->dtype, golden->data, off.at), off.max_abs, bound->max_abs, off.rel_rms,
                 bound->rel_rms);
    }
}
