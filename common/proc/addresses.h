/* A list of addresses as a person writes it: "HOST:PORT,HOST:PORT". Thread: any, one list at a time. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"

enum { PC_ADDRESSES_MAX = 8, PC_ADDRESS_BYTES = 128 };

typedef struct pc_addresses {
    uint32_t n; /* at least 1 */
    char text[PC_ADDRESSES_MAX][PC_ADDRESS_BYTES];
} pc_addresses;

/* name: of the option, for err. CM_E_CONFIG: empty, too many, or one of them is no HOST:PORT. */
CM_MUST_CHECK cm_status pc_addresses_parse(const char *name, const char *list, pc_addresses *addresses_out,
                                           cm_error *err);
