/* A fake cluster around the coordinator's machine: members that answer, a log that remembers, and a check of
 * everything the machine says against what it has promised. Assertions fail the running test. */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "coordinator/co_core.h"

enum {
    FAKE_PEERS = 48,
    FAKE_MAIL = 64,
    FAKE_STORES = 64,
    FAKE_IDS = 4096,
    FAKE_ASKS = 256, /* later ones are not kept */
    FAKE_LAYERS = 3,
    FAKE_EXPERTS = 8,
    FAKE_EXPERT_BYTES = 10
};

typedef struct fake_mail {
    co_out_kind kind;
    uint64_t number;
} fake_mail;

typedef struct fake_peer {
    bool used, alive, finished; /* finished: left or refused for good, never comes back */
    bool hung;                  /* lives but says nothing */
    bool given, welcomed;       /* in this session: a Welcome was sent, was read */
    uint32_t given_id;          /* of the last Welcome sent */
    bool fails_prepare, leaving;
    bool told_drain; /* may finish; a router or gateway does when it reads that */
    Baleen__Control__V1__Role role;
    uint64_t incarnation, cluster, session; /* session 0: none */
    uint64_t capacity;                      /* experts */
    const char *fingerprint, *net;
    uint32_t id;
    uint32_t n_layer; /* as it says in its hello */
    uint32_t protocol;
    uint64_t epoch, prepared; /* in force; last one prepared */
    uint64_t open_prepare;    /* sent to it, neither aborted nor committed; 0 = none */
    uint64_t holds_prepared;  /* likewise, as it has read */
    fake_mail mail[FAKE_MAIL];
    uint32_t n_mail;
    char refused[420]; /* last refusal */
    bool refused_final;
} fake_peer;

typedef struct fake_store {
    uint64_t ticket, number;
    uint32_t next_id;
    co_drains drains;
    co_epoch *epoch;
} fake_store;

typedef struct fake_cluster {
    co_core *core;
    co_core_options options;
    uint64_t now_ms, next_session, next_incarnation;
    fake_peer peers[FAKE_PEERS];
    fake_store stores[FAKE_STORES]; /* asked for, not yet done */
    uint32_t n_stores;
    bool store_fails;
    /* the log */
    uint64_t cluster, next_number;
    uint32_t next_id;
    co_drains drains;
    co_epoch *epoch;
    /* what was seen */
    uint32_t id_max;
    uint64_t id_owner[FAKE_IDS]; /* incarnation that an id was given to */
    uint64_t number_max;         /* highest ever in force */
    uint32_t n_prepares, n_aborts, n_commits, n_retires, n_warnings;
    uint32_t n_changes; /* epochs that came into force */
    /* answers to operators, by ticket */
    uint32_t n_tickets;
    struct {
        bool given;
        cm_status status;
        char text[420];
    } answers[FAKE_ASKS];
} fake_cluster;

void fake_init(fake_cluster *f, uint32_t workers_min);
/* n workers, one router, one gateway, at rest in one epoch. */
void fake_start(fake_cluster *f, uint32_t n_workers);
void fake_fini(fake_cluster *f);
/* The n-th process of a role; NULL when there are fewer. */
fake_peer *fake_nth(fake_cluster *f, Baleen__Control__V1__Role role, uint32_t nth);

/* What an abort must not change: the epoch in force, and epoch and state of the first processes. */
typedef struct fake_snapshot {
    uint64_t number, epoch_of[5];
    co_member_state state_of[5];
    cm_bytes packed;
} fake_snapshot;
fake_snapshot fake_snapshot_take(fake_cluster *f);
void fake_snapshot_compare(fake_snapshot *a, fake_snapshot *b); /* and frees both */

/* A load: one expert of each layer has most of the rows. */
extern const uint32_t fake_skewed[FAKE_LAYERS * FAKE_EXPERTS];

/* A new process; it says hello with the next fake_hello or fake_settle. */
fake_peer *fake_spawn(fake_cluster *f, Baleen__Control__V1__Role role);
void fake_hello(fake_cluster *f, fake_peer *p);
void fake_disconnect(fake_cluster *f, fake_peer *p); /* the process lives on */
void fake_kill(fake_cluster *f, fake_peer *p);       /* session closed, process gone */
void fake_leave(fake_cluster *f, fake_peer *p);
/* An operator's wish; the ticket. */
uint32_t fake_drain(fake_cluster *f, uint32_t id);
uint32_t fake_rebalance(fake_cluster *f, uint32_t n_moves);
/* A router tells the rows of every (layer, expert). */
void fake_load(fake_cluster *f, fake_peer *router, const uint32_t load[FAKE_LAYERS * FAKE_EXPERTS]);
/* One thing happens: the oldest write is done, or else the first that has mail reads one. false: nothing is
 * left. */
bool fake_move(fake_cluster *f);
void fake_report(fake_cluster *f, fake_peer *from, uint32_t about_id, cm_status status);

/* One message of the coordinator is read and answered; false: no mail. */
bool fake_read(fake_cluster *f, fake_peer *p);
/* The oldest write of the log is done; false: none waits. */
bool fake_write(fake_cluster *f);
/* All that live and are connected heartbeat, then time passes. */
void fake_pass(fake_cluster *f, uint64_t ms);
/* The coordinator's process dies and starts again; what was not written is lost. */
void fake_restart(fake_cluster *f);

/* Mail, writes and hellos until nothing moves; no time passes. */
void fake_settle(fake_cluster *f);
/* Writes and reads by workers only, until a peer's oldest mail is of that kind. */
bool fake_settle_until(fake_cluster *f, fake_peer *p, co_out_kind kind);
/* The epoch in force has exactly the living peers, all of them have it, nothing is open. */
void fake_check_whole(fake_cluster *f);
co_member_state fake_state(const fake_cluster *f, const fake_peer *p);
