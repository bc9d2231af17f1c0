/* Keys for the members' data plane: one for each epoch, derived from a secret of the cluster (HKDF-SHA256).
 * Members learn the keys of the epochs they are in, from which neither the secret nor another epoch's key
 * follows. The secret is drawn with the cluster's log and kept there, so that a coordinator that was started
 * again or took over derives the same keys; it is never logged or shown. Thread: any. */
#pragma once
#include <stdint.h>

#include "common/net/net.h"

enum { CO_SECRET_BYTES = 32 };

typedef struct co_frame_key {
    uint64_t epoch;
    uint8_t bytes[NET_KEY_BYTES];
} co_frame_key;

void co_frame_key_derive(const uint8_t secret[CO_SECRET_BYTES], uint64_t cluster, uint64_t epoch,
                         co_frame_key *key_out);
