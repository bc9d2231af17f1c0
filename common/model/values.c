/* Values that no intact checkpoint has, each of which would otherwise become fluent nonsense. */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "common/model/checkpoint.h"

/* Elements of one row: the last dimension. */
static uint64_t values_row(const md_tensor *tensor, uint64_t i)
{
    uint64_t n_in = tensor->n_dim > 0 ? tensor->dim[tensor->n_dim - 1] : 1;
    return i / n_in;
}

/* E8M0 255 is NaN; 0 is 2^-127 and allowed. */
static cm_status values_e8m0(const md_tensor *tensor, cm_error *err)
{
    const uint8_t *data = tensor->data;
    const uint8_t *bad = memchr(data, 255, (size_t)tensor->n_bytes);
    if (bad == NULL) {
        return CM_OK;
    }
    return cm_error_set(err, CM_E_CORRUPT, tensor->name,
                        "tensor %.96s row %" PRIu64 ": scale byte 255 is NaN", tensor->name,
                        values_row(tensor, (uint64_t)(bad - data)));
}

/* Whether one of the eight bytes has all its low seven bits set: 0x7F and 0xFF are E4M3's NaN codes. Adding 1
 * to each byte's low seven bits carries into bit 7 for exactly those, and never into the next byte. */
static bool values_e4m3_word_has_nan(uint64_t word)
{
    const uint64_t low = 0x7F7F7F7F7F7F7F7Fu, one = 0x0101010101010101u;
    return (((word & low) + one) & ~low) != 0;
}

static cm_status values_e4m3(const md_tensor *tensor, cm_error *err)
{
    const uint8_t *data = tensor->data;
    uint64_t i = 0, word;
    for (; i + sizeof word <= tensor->n_bytes; i += sizeof word) {
        memcpy(&word, data + i, sizeof word); /* data has no alignment */
        if (values_e4m3_word_has_nan(word)) {
            break;
        }
    }
    for (; i < tensor->n_bytes; i++) {
        if ((data[i] & 0x7F) == 0x7F) {
            return cm_error_set(err, CM_E_CORRUPT, tensor->name,
                                "tensor %.96s row %" PRIu64 ": E4M3 code 0x%02X is NaN", tensor->name,
                                values_row(tensor, i), data[i]);
        }
    }
    return CM_OK;
}

static cm_status values_float_scale(const md_tensor *tensor, cm_error *err)
{
    const uint8_t *data = tensor->data;
    for (uint64_t i = 0; i < tensor->n_bytes / sizeof(float); i++) {
        float value;
        memcpy(&value, data + i * sizeof value, sizeof value);
        if (!isfinite(value)) {
            return cm_error_set(err, CM_E_CORRUPT, tensor->name,
                                "tensor %.96s row %" PRIu64 ": scale %g is not finite", tensor->name,
                                values_row(tensor, i), (double)value);
        }
    }
    return CM_OK;
}

/* tid2eid [vocab][topk]: a repeated expert would count twice in a plain sum and once in the reference. */
static cm_status values_expert_row(const md_tensor *tensor, const md_geometry *geometry, uint64_t row,
                                   cm_error *err)
{
    uint64_t n = tensor->dim[1];
    const uint8_t *data = (const uint8_t *)tensor->data + row * n * sizeof(int64_t);
    for (uint64_t i = 0; i < n; i++) {
        int64_t expert, other;
        memcpy(&expert, data + i * sizeof expert, sizeof expert);
        if (expert < 0 || expert >= (int64_t)geometry->n_expert) {
            return cm_error_set(err, CM_E_CORRUPT, tensor->name,
                                "tensor %.96s row %" PRIu64 ": expert %" PRId64
                                " is out of range, there are %u",
                                tensor->name, row, expert, geometry->n_expert);
        }
        for (uint64_t j = 0; j < i; j++) {
            memcpy(&other, data + j * sizeof other, sizeof other);
            if (other == expert) {
                return cm_error_set(err, CM_E_CORRUPT, tensor->name,
                                    "tensor %.96s row %" PRIu64 ": expert %" PRId64 " is repeated",
                                    tensor->name, row, expert);
            }
        }
    }
    return CM_OK;
}

static cm_status values_experts(const md_tensor *tensor, const md_geometry *geometry, cm_error *err)
{
    for (uint64_t row = 0; row < tensor->dim[0]; row++) {
        CM_TRY(values_expert_row(tensor, geometry, row, err));
    }
    return CM_OK;
}

static bool values_is_named(const md_tensor *tensor, const char *end)
{
    size_t n = strlen(tensor->name), n_end = strlen(end);
    return n >= n_end && strcmp(tensor->name + n - n_end, end) == 0;
}

cm_status md_tensor_check_values(const md_tensor *tensor, const md_geometry *geometry, cm_error *err)
{
    switch (tensor->dtype) {
    case MD_F8_E8M0:
        return values_e8m0(tensor, err);
    case MD_F8_E4M3:
        return values_e4m3(tensor, err);
    case MD_F32:
        return values_is_named(tensor, ".scale") ? values_float_scale(tensor, err) : CM_OK;
    case MD_I64:
        return values_is_named(tensor, ".tid2eid") ? values_experts(tensor, geometry, err) : CM_OK;
    default:
        return CM_OK; /* every code of the others is a value */
    }
}
