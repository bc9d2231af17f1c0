#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/log.h"
#include "common/net/net_shm_private.h"

enum { SHM_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL };

static shm_segment *segment_map(int fd, uint64_t area_bytes)
{
    void *at =
        mmap(NULL, SHM_AREA_AT + area_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    return at != MAP_FAILED ? at : NULL;
}

static void segment_unmap(shm_segment *segment, uint64_t area_bytes)
{
    if (segment != NULL) {
        munmap(segment, SHM_AREA_AT + area_bytes);
    }
}

/* ---- the sender ---- */

cm_status shm_tx_open(shm_tx *tx, uint64_t message_bytes_max, int *fd_out)
{
    *tx = (shm_tx){.area_bytes = SHM_AREA_MESSAGES * ((message_bytes_max + 4095) / 4096 * 4096)};
    int fd = memfd_create("baleen rows", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0 || ftruncate(fd, (off_t)(SHM_AREA_AT + tx->area_bytes)) != 0 ||
        fcntl(fd, F_ADD_SEALS, SHM_SEALS) != 0 || (tx->segment = segment_map(fd, tx->area_bytes)) == NULL) {
        cm_warn("no shared memory of %llu bytes for a link: %s",
                (unsigned long long)(SHM_AREA_AT + tx->area_bytes), strerror(errno));
        if (fd >= 0) {
            close(fd);
        }
        return CM_E_MEMORY;
    }
    *fd_out = fd;
    return CM_OK;
}

void shm_tx_close(shm_tx *tx)
{
    segment_unmap(tx->segment, tx->area_bytes);
    *tx = (shm_tx){0};
}

static void tx_reclaim(shm_tx *tx)
{
    while (tx->n_free < tx->n_sent) {
        uint32_t i = tx->n_free % SHM_SLOTS;
        if (atomic_load(&tx->segment->slots[i].full) != 0) { /* in one order with sender_waits */
            break;
        }
        tx->n_free++;
    }
    if (tx->n_free == tx->n_sent) {
        tx->head = 0; /* where the caches still are */
    }
}

static bool tx_is_free(const shm_tx *tx, uint64_t at, uint64_t n_bytes)
{
    if (n_bytes > tx->area_bytes || at > tx->area_bytes - n_bytes) {
        return false;
    }
    for (uint64_t n = tx->n_free; n < tx->n_sent; n++) {
        uint32_t i = n % SHM_SLOTS;
        if (at < tx->at[i] + tx->span[i] && tx->at[i] < at + n_bytes) {
            return false;
        }
    }
    return true;
}

static uint64_t tx_top(const shm_tx *tx)
{
    uint64_t top = 0;
    for (uint64_t n = tx->n_free; n < tx->n_sent; n++) {
        uint32_t i = n % SHM_SLOTS;
        top = tx->at[i] + tx->span[i] > top ? tx->at[i] + tx->span[i] : top;
    }
    return top;
}

/* Where n_bytes, whole lines, lie in one piece: behind the newest, from the start again if that is free and
 * they would leave what is warm, else behind all, and at last from the start of a small area. */
static bool tx_find(const shm_tx *tx, uint64_t n_bytes, uint64_t *at_out)
{
    bool leaves = tx->head + n_bytes > SHM_WARM_BYTES;
    if (tx->n_sent - tx->n_free == SHM_SLOTS) {
        return false;
    }
    *at_out = 0;
    if (leaves && tx_is_free(tx, 0, n_bytes)) {
        return true;
    }
    *at_out = tx->head;
    if (tx_is_free(tx, tx->head, n_bytes)) {
        return true;
    }
    *at_out = tx_top(tx);
    if (tx_is_free(tx, *at_out, n_bytes)) {
        return true;
    }
    *at_out = 0;
    return tx_is_free(tx, 0, n_bytes);
}

static uint64_t whole_lines(uint64_t n_bytes)
{
    return (n_bytes + SHM_LINE - 1) / SHM_LINE * SHM_LINE;
}

uint8_t *shm_tx_room(shm_tx *tx, uint64_t n_bytes)
{
    tx_reclaim(tx);
    tx->room_bytes = tx_find(tx, whole_lines(n_bytes), &tx->room_at) ? n_bytes : 0;
    return tx->room_bytes > 0 ? shm_area(tx->segment) + tx->room_at : NULL;
}

/* The payload is where it is to be, and nothing has changed since that was said. */
static bool tx_is_built(const shm_tx *tx, const net_message *message)
{
    const uint8_t *data = message->n_iov == 1 ? message->iov[0].data : NULL, *area = shm_area(tx->segment);
    bool built =
        tx->room_bytes > 0 && data == area + tx->room_at && message->iov[0].n_bytes <= tx->room_bytes;
    CM_ASSERT_MSG(built || data < area || data >= area + tx->area_bytes, "a room was used that is no more");
    return built;
}

/* The payload's place; it is there on return. */
static bool tx_place(shm_tx *tx, const net_message *message, uint64_t payload_bytes, uint64_t *at_out)
{
    uint64_t n_bytes = whole_lines(payload_bytes);
    *at_out = tx->room_at;
    if (!tx_is_built(tx, message)) {
        tx_reclaim(tx); /* or a message could lie where a room was said to be */
        if (!tx_find(tx, n_bytes, at_out)) {
            return false;
        }
        uint8_t *to = shm_area(tx->segment) + *at_out;
        for (uint32_t i = 0; i < message->n_iov; i++) {
            if (message->iov[i].n_bytes > 0) {
                memcpy(to, message->iov[i].data, message->iov[i].n_bytes);
                to += message->iov[i].n_bytes;
            }
        }
    }
    tx->room_bytes = 0;
    tx->at[tx->n_sent % SHM_SLOTS] = *at_out;
    tx->span[tx->n_sent % SHM_SLOTS] = n_bytes;
    tx->head = *at_out + n_bytes;
    return true;
}

static void slot_fill(shm_slot *slot, const net_message *message)
{
    slot->type = message->type;
    slot->header_bytes = (uint16_t)message->header_bytes;
    slot->cpu = (uint32_t)sched_getcpu();
    if (message->header_bytes > 0) {
        memcpy(slot->header, message->header, message->header_bytes);
    }
}

static cm_status tx_put_note(shm_tx *tx, const net_message *message)
{
    shm_slot *slot = &tx->segment->notes[tx->n_notes % SHM_NOTES];
    if (atomic_load_explicit(&slot->full, memory_order_acquire) != 0) {
        return CM_AGAIN;
    }
    slot_fill(slot, message);
    slot->at = slot->payload_bytes = 0;
    slot->n_before = tx->n_sent;
    atomic_store(&slot->full, shm_number(tx->n_notes++));
    return CM_OK;
}

cm_status shm_tx_put(shm_tx *tx, const net_message *message, uint64_t payload_bytes)
{
    uint64_t at;
    if (message->type >= NET_TYPE_INTERNAL) {
        return tx_put_note(tx, message);
    }
    if (!tx_place(tx, message, payload_bytes, &at)) {
        return CM_AGAIN;
    }
    shm_slot *slot = &tx->segment->slots[tx->n_sent % SHM_SLOTS];
    slot_fill(slot, message);
    slot->at = at;
    slot->payload_bytes = payload_bytes;
    slot->n_before = tx->n_notes;
    atomic_store(&slot->full,
                 shm_number(tx->n_sent++)); /* in one order with receiver_sleeps, which is looked at next */
    return CM_OK;
}

/* ---- the receiver ---- */

cm_status shm_rx_open(shm_rx *rx, int fd, uint64_t area_bytes)
{
    struct stat info;
    int seals = fcntl(fd, F_GET_SEALS);
    if (area_bytes % 4096 != 0 || area_bytes > UINT64_MAX / 4 || fstat(fd, &info) != 0 || info.st_size < 0 ||
        (uint64_t)info.st_size != SHM_AREA_AT + area_bytes || seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
        return CM_E_PROTOCOL;
    }
    *rx = (shm_rx){.segment = segment_map(fd, area_bytes), .area_bytes = area_bytes};
    return rx->segment != NULL ? CM_OK : CM_E_MEMORY;
}

void shm_rx_close(shm_rx *rx)
{
    CM_ASSERT(rx->n_held == 0);
    segment_unmap(rx->segment, rx->area_bytes);
    *rx = (shm_rx){0};
}

shm_slot *shm_rx_next(const shm_rx *rx, bool internal)
{
    if (rx->segment == NULL) {
        return NULL;
    }
    uint64_t n = internal ? rx->n_notes : rx->n_taken;
    shm_slot *slot = internal ? &rx->segment->notes[n % SHM_NOTES] : &rx->segment->slots[n % SHM_SLOTS];
    return atomic_load(&slot->full) == shm_number(n) ? slot : NULL;
}
