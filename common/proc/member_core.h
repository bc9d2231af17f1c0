/* A member's session with the coordinator as a pure machine: when to connect and with which name, when to
 * beat, which epoch may still be prepared or committed, what is said again after a lost session. No I/O, no
 * clock: its owner opens and ends sessions, carries words and acts on what it hears. Used by member.c and by
 * the simulator. Thread: one at a time.
 *
 * After every call that takes the machine the owner takes what comes out, in order, until nothing is left;
 * acting on it may call the machine again. */
#pragma once
#include "common/base/bytes.h"
#include "common/base/log.h"
#include "common/base/stats.h"
#include "common/net/net.h"
#include "common/proc/addresses.h"
#include "common/proc/member.h"
#include "proto/control.pb-c.h"

typedef struct pc_mcore pc_mcore;

/* What it tells of itself. Strings are kept; addresses NULL when none. */
typedef struct pc_mself {
    const pc_addresses *coordinators; /* one of which is active; borrowed for the create */
    uint32_t role;                    /* Baleen__Control__V1__Role */
    uint64_t incarnation;
    uint32_t pid;
    const char *host, *data_address, *http_address, *grpc_address, *net, *fingerprint;
    uint64_t expert_bytes_max; /* workers */
    uint32_t n_layer, n_expert;
    uint64_t expert_bytes;
} pc_mself;

typedef enum pc_mout_kind {
    PC_MOUT_OPEN,      /* begin a session with the coordinator at text; pc_mcore_closed tells its end */
    PC_MOUT_HELLO,     /* these are words of the session: pc_mcore_word packs them */
    PC_MOUT_HEARTBEAT, /* epoch */
    PC_MOUT_PREPARED,  /* epoch, status, text */
    PC_MOUT_COMMITTED, /* epoch */
    PC_MOUT_REPORT,    /* member_id, status */
    PC_MOUT_LEAVING,
    PC_MOUT_CANCEL,  /* end the session; pc_mcore_closed follows */
    PC_MOUT_WELCOME, /* these are news: pc_member_events says what they mean */
    PC_MOUT_KEY,     /* epoch, key */
    PC_MOUT_PREPARE, /* value: given, as with commit; the owner releases it */
    PC_MOUT_ABORT,   /* epoch */
    PC_MOUT_COMMIT,  /* value */
    PC_MOUT_RETIRE,  /* epoch */
    PC_MOUT_DRAIN,
    PC_MOUT_REFUSED, /* status, text */
    PC_MOUT_NOTE,    /* level, text: for the log */
} pc_mout_kind;

typedef struct pc_mout {
    pc_mout_kind kind;
    uint64_t epoch;
    uint32_t member_id;
    cm_status status;
    cm_log_level level;
    pc_epoch *value;
    uint8_t key[NET_KEY_BYTES];
    char text[416];
} pc_mout;

pc_mcore *pc_mcore_create(const pc_mself *self, uint64_t now_ms);
void pc_mcore_destroy(pc_mcore *core);
/* The next thing to do; false: nothing is left. */
bool pc_mcore_next(pc_mcore *core, pc_mout *out);
/* Time has passed. */
void pc_mcore_tick(pc_mcore *core, uint64_t now_ms);
uint64_t pc_mcore_wake_ms(const pc_mcore *core); /* when time alone changes something; UINT64_MAX = never */

/* A word of the coordinator; borrowed for the call. Counters (ClusterStats) are its owner's to take. */
void pc_mcore_hear(pc_mcore *core, uint64_t now_ms, const Baleen__Control__V1__CoordinatorMessage *message);
/* orderly: the coordinator ended it without complaint; to who wants to leave it is the last one. True: the
 * first one without an answer since there was one, worth finding out more. */
bool pc_mcore_closed(pc_mcore *core, uint64_t now_ms, bool orderly, const char *why);

/* text: NULL when there is nothing to say. */
void pc_mcore_prepared(pc_mcore *core, uint64_t epoch, cm_status status, const char *text);
void pc_mcore_committed(pc_mcore *core, uint64_t epoch);
/* CM_OK: the link that was lost is up again. */
void pc_mcore_report(pc_mcore *core, uint32_t member_id, cm_status status);
void pc_mcore_leave(pc_mcore *core);

bool pc_mcore_connected(const pc_mcore *core); /* welcomed in this session */
/* Words of a session are of no interest any more. */
bool pc_mcore_deaf(const pc_mcore *core);
uint32_t pc_mcore_id(const pc_mcore *core); /* 0 before the first welcome */
uint64_t pc_mcore_cluster(const pc_mcore *core);
uint64_t pc_mcore_epoch(const pc_mcore *core); /* in force here; 0 = none */

/* One of the words above as a message, appended to packed. stats: of a heartbeat. */
void pc_mcore_word(const pc_mcore *core, const pc_mout *out, const cm_stat_value *stats, uint32_t n_stats,
                   cm_bytes *packed);
