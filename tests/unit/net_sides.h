/* For tests of the transport: objects ("sides") that poll, sleep and check what they receive.
 * Waiting is always for a state, asleep on the objects' descriptors; WAIT_MS only ends a test that would
 * hang. Thread: one, but for the log. */
#pragma once
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "common/base/clock.h"
#include "common/net/net.h"

enum { WAIT_MS = 30000, SOURCE_BYTES = 2 << 20, SIDES_MAX = 3, HELD_MAX = 64, DEADLINE_MS = 20000 };

typedef struct backend_case {
    const char *name;
    const char *listen;
    const char *nobody; /* an address where nobody listens; NULL: made by closing a listener */
    const char *unreadable[4];
    bool keyed;            /* sides begin with key 1 */
    bool listens_anywhere; /* whatever the address says */
    bool copies;           /* a payload is the sender's again at once, whatever its size */
} backend_case;

extern const backend_case g_ucx, g_local, g_mpi, g_ucx_keyed, g_local_keyed, g_shm, g_shm_keyed;
extern uint8_t *g_source; /* payloads are pieces of it, so that a receiver can check any of them */

typedef struct side {
    net *n;
    net_peer *peer; /* the newest that came up, NULL once down */
    bool frozen;    /* not polled */
    bool hold;      /* messages are kept in held */
    net_event held[HELD_MAX];
    uint32_t n_held;
    uint32_t n_up, n_down, n_sent, n_failed, n_messages, n_after_down;
    cm_status down_status, failed_status;
    uint32_t n_checked; /* messages whose content was compared */
} side;

typedef struct net_test {
    const backend_case *backend;
    side sides[SIDES_MAX];
    uint32_t n_sides;
    char address[NET_ADDRESS_BYTES];
} net_test;

/* Once per program, before any test; log lines are kept instead of printed. */
void sides_init(void);
void sides_fini(void);
int sides_setup(void **state); /* before each test */
bool log_has(const char *text);

const net_ops *table_of(const char *name);
net_options small_options(const backend_case *backend);
side *side_open(net_test *t, const net_options *options, uint64_t cluster, uint32_t role);
side *side_open_ops(net_test *t, const net_ops *ops, const net_options *options, uint64_t cluster,
                    uint32_t role);
void side_give_key(side *s, uint8_t number); /* generation number, 32 times that byte; cluster 7 */
void side_listen(net_test *t, side *s);      /* leaves the address in t */
net_peer *side_connect(net_test *t, side *s);
void side_close(side *s);
void side_event(side *s, const net_event *event); /* what side_poll does with each event */
uint32_t side_poll(side *s);
void side_release(side *s); /* what is held */
/* One of them, whose content must still be what it was; the last one takes its place. */
void side_release_one(side *s, uint32_t i);
/* Side 0 listens, side 1 connects; returns with the link up on both. */
net_test pair_open(const backend_case *backend, const net_options *listener, const net_options *connector);
/* Nothing may be on its way once all sides have come to rest. */
void pair_close(net_test *t);
/* A message that says what it should contain: g_source[offset, offset + n_bytes) in n_iov pieces. */
cm_status send_piece(side *s, uint32_t index, uint64_t offset, uint64_t n_bytes, uint32_t n_iov,
                     uint32_t deadline_ms);

/* The same in one piece, built where the receiver reads if there is room. */
cm_status send_built(side *s, uint32_t index, uint64_t offset, uint64_t n_bytes);

/* Polls everyone once; when nobody had anything, sleeps until something comes or a timer is due. */
void turn(net_test *t);
#define WAIT(t_, cond_)                                                                                      \
    do {                                                                                                     \
        uint64_t until_ = cm_now_ms() + WAIT_MS;                                                             \
        while (!(cond_)) {                                                                                   \
            if (cm_now_ms() > until_) {                                                                      \
                fail_msg("waited in vain for %s", #cond_);                                                   \
            }                                                                                                \
            turn(t_);                                                                                        \
        }                                                                                                    \
    } while (0)

#define ONE(backend_, test_)                                                                                 \
    {                                                                                                        \
#backend_ " " #test_, test_, sides_setup, NULL, (void *)(uintptr_t)&g_##backend_                     \
    }
#define BOTH(test_) ONE(ucx, test_), ONE(local, test_)
