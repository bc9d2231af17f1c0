/* A list of addresses as a person writes it, "HOST:PORT,HOST:PORT", and the order in which the coordinators
 * of such a list are tried. Pure. Thread: any, one object at a time. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"

#define PC_ADDRESS_FORM "HOST:PORT or [IPV6]:PORT"
enum { PC_ADDRESSES_MAX = 8, PC_ADDRESS_BYTES = 128 };

typedef struct pc_addresses {
    uint32_t n; /* at least 1 */
    char text[PC_ADDRESSES_MAX][PC_ADDRESS_BYTES];
} pc_addresses;

/* "HOST:PORT"; an IPv6 address as host is in brackets, which host_out leaves out. false: it is no address. */
bool pc_address_split(const char *address, char host_out[PC_ADDRESS_BYTES], uint16_t *port_out);

/* name: of the option, for err. CM_E_CONFIG: empty, too many, or one of them is no HOST:PORT. */
CM_MUST_CHECK cm_status pc_addresses_parse(const char *name, const char *list, pc_addresses *addresses_out,
                                           cm_error *err);

/* One of the coordinators is active, the others stand by and may know which. A round tries each of them once
 * and the one that a standby names; who tries waits between rounds. */
typedef struct pc_tour {
    pc_addresses list;
    uint32_t i, tried;           /* next of the list; in this round, a bit for each */
    char at[PC_ADDRESS_BYTES];   /* the one to try now, or that we talk to */
    char hint[PC_ADDRESS_BYTES]; /* where a standby sent us in this round; "" */
    bool hint_taken;             /* in this round */
} pc_tour;

void pc_tour_init(pc_tour *tour, const pc_addresses *list); /* at the first one */
/* A standby names the active one. */
void pc_tour_hint(pc_tour *tour, const char *address);
/* The one at which we are could not be had: goes to the next. False: the round is over, wait before it. */
bool pc_tour_next(pc_tour *tour);
/* The one at which we were active is lost: goes to another one first. A machine that went silent takes long
 * to refuse us, and if all that was lost is our connection, a standby sends us back at once. */
void pc_tour_lost(pc_tour *tour);
