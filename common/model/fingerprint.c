#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "common/model/checkpoint_private.h"
#include "common/model/safetensors_private.h"

enum {
    SAMPLES = 16,        /* per shard, evenly spaced from its first byte to its last */
    SAMPLE_BYTES = 4096, /* each */
};

/* Lengths go in front of what varies, so that no two lists of pieces run together to the same bytes. */
static void print_u64(XXH3_state_t *state, uint64_t value)
{
    uint8_t bytes[8];
    for (int i = 0; i < 8; i++) {
        bytes[i] = (uint8_t)(value >> (8 * i));
    }
    XXH3_128bits_update(state, bytes, sizeof bytes);
}

static void print_piece(XXH3_state_t *state, const void *data, uint64_t n_bytes)
{
    print_u64(state, n_bytes);
    XXH3_128bits_update(state, data, (size_t)n_bytes);
}

static cm_status print_sample(XXH3_state_t *state, const md_safetensors *file, uint64_t at, size_t n_bytes,
                              cm_error *err)
{
    uint8_t sample[SAMPLE_BYTES];
    CM_TRY(md_safetensors_read(file, at, sample, n_bytes, err));
    XXH3_128bits_update(state, sample, n_bytes);
    return CM_OK;
}

/* Where sample i of n_bytes begins: the first at 0, the last at the end. A short shard's samples overlap, so
 * that it is covered whole. */
static uint64_t sample_at(uint64_t n_bytes, uint64_t i)
{
    return (n_bytes - SAMPLE_BYTES) * i / (SAMPLES - 1);
}

static cm_status print_data(XXH3_state_t *state, const md_safetensors *file, cm_error *err)
{
    uint64_t n_bytes = md_safetensors_data_bytes(file);
    print_u64(state, n_bytes);
    if (n_bytes <= SAMPLE_BYTES) {
        return print_sample(state, file, 0, (size_t)n_bytes, err);
    }
    for (uint64_t i = 0; i < SAMPLES; i++) {
        CM_TRY(print_sample(state, file, sample_at(n_bytes, i), SAMPLE_BYTES, err));
    }
    return CM_OK;
}

static cm_status print_shard(XXH3_state_t *state, const md_shard *shard, cm_error *err)
{
    size_t n_header;
    const char *header = md_safetensors_header(shard->file, &n_header);
    print_piece(state, shard->name, strlen(shard->name));
    print_piece(state, header, n_header);
    return print_data(state, shard->file, err);
}

cm_status md_checkpoint_fingerprint(const md_checkpoint *checkpoint, char out[33], cm_error *err)
{
    static const char hex[] = "0123456789abcdef";
    XXH3_state_t *state = XXH3_createState();
    if (state == NULL) {
        return cm_error_set(err, CM_E_MEMORY, NULL, "out of memory for a fingerprint");
    }
    XXH3_128bits_reset(state);
    print_piece(state, checkpoint->config.data, checkpoint->config.len);
    cm_status status = CM_OK;
    for (uint32_t i = 0; i < checkpoint->n_shards && status == CM_OK; i++) {
        status = print_shard(state, &checkpoint->shards[i], err);
    }
    XXH128_canonical_t digest;
    XXH128_canonicalFromHash(&digest, XXH3_128bits_digest(state));
    XXH3_freeState(state);
    if (status != CM_OK) {
        return status;
    }
    for (size_t i = 0; i < sizeof digest.digest; i++) {
        out[2 * i] = hex[digest.digest[i] >> 4];
        out[2 * i + 1] = hex[digest.digest[i] & 15];
    }
    out[32] = '\0';
    return CM_OK;
}

void md_scripted_fingerprint(const char *name, char out[33])
{
    snprintf(out, 33, "scripted%016llx", (unsigned long long)XXH3_64bits(name, strlen(name)));
}
