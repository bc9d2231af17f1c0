/* Inside the shm back-end: what lies in the memory that two processes share, and the objects around it.
 *
 * A link is a Unix socket and two segments of memory, one for each direction, made by its sender and mapped
 * by its receiver. The sender writes a message's payload where the receiver will read it, fills a slot and
 * marks it full; that is all. A receiver that sleeps, or a sender that waits for room, has said so in the
 * segment, and its bell (an event descriptor) is rung; the end of the socket tells that a process died. Slots
 * are taken and given back in order; payloads lie in the segment's area one behind the other, from its start
 * again as soon as that is free, so that few pages are ever touched and caches hold them.
 *
 * Trust: header and slot are copied once before they are checked; a payload is read where it lies, and its
 * sender could change it after it was checked. That is no way in for anybody: the kernel lets processes of
 * our own user alone come so far (peer_is_ours), which may write any of our memory as it is. It also means
 * that a fault of such a process while it sends is a fault here: no worse than with rows that were wrong
 * before.
 *
 * Who sleeps is always woken, on CPUs that reorder too: each side writes its own word (full, or that it
 * sleeps or waits) and then reads the other's, all four sequentially consistent, so that one of the two sees
 * the other. A weaker load in one of these places is a sleep beside a message. */
#pragma once
#include <stdalign.h>
#include <stdatomic.h>

#include "common/net/net_private.h"

enum {
    SHM_MAGIC = 0x4d485342, /* "BSHM" */
    SHM_VERSION = 2,
    SHM_SLOTS = 512,       /* messages sent and not yet released; a power of two */
    SHM_NOTES = 16,        /* the layer's own, the same */
    SHM_AREA_MESSAGES = 4, /* of the largest size that the area has room for */
    SHM_LINE = 64,
    SHM_WARM_BYTES = 2 << 20, /* of the area: payloads go no farther while its start is free */
};

typedef struct shm_slot {
    alignas(
        SHM_LINE) _Atomic uint32_t full; /* shm_number of the message: the receiver's, until it writes 0 */
    uint16_t type, header_bytes;
    uint32_t cpu;               /* where the sender ran */
    uint64_t at, payload_bytes; /* in the area */
    uint64_t n_before;          /* a message: of the layer's own sent before it; one of those: messages */
    uint8_t header[NET_WIRE_HEADER_MAX];
} shm_slot;
_Static_assert(sizeof(shm_slot) == 384, "shared between processes");

typedef struct shm_segment {
    _Atomic uint32_t ended; /* the sender ended the link in order */
    alignas(SHM_LINE) _Atomic uint32_t receiver_sleeps;
    alignas(SHM_LINE) _Atomic uint32_t sender_waits;
    shm_slot notes[SHM_NOTES];
    shm_slot slots[SHM_SLOTS];
} shm_segment;

enum { SHM_AREA_AT = (sizeof(shm_segment) + 4095) / 4096 * 4096 };

/* The only thing on the socket, from both sides, with the descriptors of segment and bell. */
typedef struct shm_greeting {
    uint32_t magic, version;
    uint64_t area_bytes;
} shm_greeting;
_Static_assert(sizeof(shm_greeting) == 16, "shm_greeting is a wire struct");

/* The sender's side of a segment; its own words about what lies there, for the other may write anything. */
typedef struct shm_tx {
    shm_segment *segment;                    /* NULL: none yet */
    uint64_t area_bytes, head;               /* head: behind the newest payload */
    uint64_t at[SHM_SLOTS], span[SHM_SLOTS]; /* what each slot holds of the area */
    uint64_t n_sent, n_free;                 /* slots ever filled, and ever found empty again */
    uint64_t n_notes;                        /* ever sent */
    uint64_t room_at, room_bytes;            /* given out by shm_tx_room since the last message; 0: none */
} shm_tx;

/* The receiver's side; lives on until all that was handed out of it is released. */
typedef struct shm_rx {
    shm_segment *segment; /* NULL: none yet */
    uint64_t area_bytes;
    uint64_t n_taken, n_notes;
    uint32_t n_held; /* handed out and not released */
} shm_rx;

/* Of the n-th message; never 0. */
static inline uint32_t shm_number(uint64_t n)
{
    return (uint32_t)(n % INT32_MAX) + 1;
}

/* net_shm_segment.c */
static inline uint8_t *shm_area(shm_segment *segment)
{
    return (uint8_t *)segment + SHM_AREA_AT;
}
/* A new segment; fd_out is to be given to the receiver and closed. */
CM_MUST_CHECK cm_status shm_tx_open(shm_tx *tx, uint64_t message_bytes_max, int *fd_out);
void shm_tx_close(shm_tx *tx);
/* Where the next message's payload may be built, n_bytes of it; NULL: no room. */
uint8_t *shm_tx_room(shm_tx *tx, uint64_t n_bytes);
/* Hands a message over; its payload is copied unless it was built in place. CM_AGAIN: no room. */
CM_MUST_CHECK cm_status shm_tx_put(shm_tx *tx, const net_message *message, uint64_t payload_bytes);
/* Maps what a peer gave; it is checked that it cannot shrink under us. */
CM_MUST_CHECK cm_status shm_rx_open(shm_rx *rx, int fd, uint64_t area_bytes);
void shm_rx_close(shm_rx *rx);
/* The next message if there is one, NULL if not; internal: of the layer's own. */
shm_slot *shm_rx_next(const shm_rx *rx, bool internal);
