#include "common/proc/addresses.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool port_of(const char *digits, uint16_t *port_out)
{
    size_t n = strspn(digits, "0123456789");
    unsigned long port = strtoul(digits, NULL, 10);
    *port_out = (uint16_t)port;
    return n > 0 && n <= 5 && digits[n] == 0 && port <= UINT16_MAX;
}

/* What brackets hold has colons, as no other host may. */
static bool host_is_plain(const char *host, bool bracketed)
{
    for (const char *at = host; *at != 0; at++) {
        if (*at <= ' ' || *at > '~' || strchr("/[]", *at) != NULL) {
            return false;
        }
    }
    return host[0] != 0 && (strchr(host, ':') != NULL) == bracketed;
}

bool pc_address_split(const char *address, char host_out[PC_ADDRESS_BYTES], uint16_t *port_out)
{
    const char *colon = strrchr(address, ':');
    size_t n = colon != NULL ? (size_t)(colon - address) : 0;
    bool bracketed = n >= 2 && address[0] == '[' && address[n - 1] == ']';
    if (n == 0 || n >= PC_ADDRESS_BYTES) {
        return false;
    }
    snprintf(host_out, PC_ADDRESS_BYTES, "%.*s", (int)(bracketed ? n - 2 : n), address + bracketed);
    return host_is_plain(host_out, bracketed) && port_of(colon + 1, port_out);
}

static bool address_take(const char *text, size_t n, char out[PC_ADDRESS_BYTES])
{
    char host[PC_ADDRESS_BYTES];
    uint16_t port;
    if (n >= PC_ADDRESS_BYTES) {
        return false;
    }
    snprintf(out, PC_ADDRESS_BYTES, "%.*s", (int)n, text);
    return pc_address_split(out, host, &port);
}

cm_status pc_addresses_parse(const char *name, const char *list, pc_addresses *addresses_out, cm_error *err)
{
    pc_addresses addresses = {0};
    for (const char *at = list;; at++) {
        size_t n = strcspn(at, ",");
        char address[PC_ADDRESS_BYTES];
        if (!address_take(at, n, address)) {
            return cm_error_set(err, CM_E_CONFIG, name, "%s: '%.*s' in '%.200s' is not " PC_ADDRESS_FORM,
                                name, n < PC_ADDRESS_BYTES ? (int)n : PC_ADDRESS_BYTES, at, list);
        }
        if (addresses.n == PC_ADDRESSES_MAX) {
            return cm_error_set(err, CM_E_CONFIG, name, "%s: '%.200s' has more than %d addresses", name, list,
                                (int)PC_ADDRESSES_MAX);
        }
        memcpy(addresses.text[addresses.n++], address, n + 1);
        at += n;
        if (*at == 0) {
            break;
        }
    }
    *addresses_out = addresses;
    return CM_OK;
}

/* ---- tour ---- */

/* In the list; its length when it is not in it. */
static uint32_t tour_index(const pc_tour *tour, const char *address)
{
    uint32_t i = 0;
    while (i < tour->list.n && strcmp(tour->list.text[i], address) != 0) {
        i++;
    }
    return i;
}

static void tour_go(pc_tour *tour, const char *address)
{
    snprintf(tour->at, sizeof(tour->at), "%s", address);
}

static void tour_begin_round(pc_tour *tour)
{
    tour->tried = 0;
    tour->hint[0] = 0;
    tour->hint_taken = false;
    tour_go(tour, tour->list.text[tour->i]);
}

void pc_tour_init(pc_tour *tour, const pc_addresses *list)
{
    *tour = (pc_tour){.list = *list};
    tour_begin_round(tour);
}

void pc_tour_hint(pc_tour *tour, const char *address)
{
    if (strlen(address) < sizeof(tour->hint)) {
        snprintf(tour->hint, sizeof(tour->hint), "%s", address);
    }
}

bool pc_tour_next(pc_tour *tour)
{
    tour->tried |= 1u << tour_index(tour, tour->at);
    uint32_t hint = tour_index(tour, tour->hint);
    bool hint_is_new = hint == tour->list.n || (tour->tried & 1u << hint) == 0;
    if (tour->hint[0] != 0 && !tour->hint_taken && hint_is_new) {
        tour->hint_taken = true;
        tour_go(tour, tour->hint);
        return true;
    }
    for (uint32_t n = 0; n < tour->list.n; n++) {
        if ((tour->tried & 1u << tour->i) == 0) {
            tour_go(tour, tour->list.text[tour->i]);
            return true;
        }
        tour->i = (tour->i + 1) % tour->list.n;
    }
    tour_begin_round(tour);
    return false;
}

void pc_tour_lost(pc_tour *tour)
{
    tour->i = (tour_index(tour, tour->at) + 1) % tour->list.n;
    tour_begin_round(tour);
}
