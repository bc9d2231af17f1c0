#include "common/proc/addresses.h"

#include <string.h>

static bool address_is_plain(const char *text, size_t n)
{
    size_t n_port = 0;
    while (n_port < n && text[n - 1 - n_port] >= '0' && text[n - 1 - n_port] <= '9') {
        n_port++;
    }
    bool has_host = n_port > 0 && n_port <= 5 && n >= n_port + 2 && text[n - 1 - n_port] == ':';
    for (size_t i = 0; i < n; i++) {
        if (text[i] <= ' ' || text[i] > '~' || text[i] == '/') {
            return false;
        }
    }
    return has_host && n < PC_ADDRESS_BYTES;
}

cm_status pc_addresses_parse(const char *name, const char *list, pc_addresses *addresses_out, cm_error *err)
{
    pc_addresses addresses = {0};
    for (const char *at = list;; at++) {
        size_t n = strcspn(at, ",");
        if (!address_is_plain(at, n)) {
            return cm_error_set(err, CM_E_CONFIG, name, "%s: '%.*s' in '%.200s' is not HOST:PORT", name,
                                n < PC_ADDRESS_BYTES ? (int)n : PC_ADDRESS_BYTES, at, list);
        }
        if (addresses.n == PC_ADDRESSES_MAX) {
            return cm_error_set(err, CM_E_CONFIG, name, "%s: '%.200s' has more than %d addresses", name, list,
                                (int)PC_ADDRESSES_MAX);
        }
        memcpy(addresses.text[addresses.n++], at, n);
        at += n;
        if (*at == 0) {
            break;
        }
    }
    *addresses_out = addresses;
    return CM_OK;
}
