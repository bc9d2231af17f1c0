/* A real gateway between three scripts on one loop: a coordinator (gRPC), a router (net's local back-end) and
 * an HTTP client that sees every byte. Failures are cmocka's. */
#pragma once
#include <event2/bufferevent.h>
#include <jansson.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/model/tokenizer.h"
#include "common/net/net.h"
#include "common/proc/rpc_server.h"
#include "gateway/gateway.h"
#include "proto/control.pb-c.h"
#include "proto/engine.pb-c.h"

enum {
    RIG_CLUSTER = 77,
    RIG_GATEWAY = 5,
    RIG_ROUTER = 2,
    RIG_WORKER = 3,
    RIG_REPLY_MAX = 256,
    RIG_OPENED_MAX = 8
};

/* What the router does with a sequence. */
typedef enum rig_mode {
    RIG_ANSWER, /* accepts, gives the reply one id a frame, stops */
    RIG_HOLD,   /* accepts and waits for the test */
    RIG_MUTE,   /* says nothing */
    RIG_REFUSE, /* fails it with refuse_status */
    RIG_ECHO,   /* the prompt's last id, as often as may be */
    RIG_FLOOD,  /* accepts and gives tokens until it is cancelled */
} rig_mode;

typedef struct rig {
    pc_loop *loop;
    gw_config config;
    gw_gateway *gateway;
    cm_status left; /* what the gateway's leave was told; CM_AGAIN: nothing */
    bool drained;
    bool (*done)(void *); /* what the loop runs for */
    void *done_arg;

    /* coordinator */
    pc_rpc_server *server;
    char coordinator[128];
    pc_call *session;
    cm_arena arena;
    uint64_t epoch_committed; /* by the gateway */
    uint32_t n_reports;       /* of lost peers */
    uint32_t n_load_wishes;   /* each is answered: level 25 for the one expert there is */

    /* router */
    net *net;
    pc_netpump *pump;
    net_peer *peer; /* the gateway's link; NULL when down */
    uint32_t n_links;
    rig_mode mode;
    bool probe_fails, probe_waits; /* waits: for rig_probe_say */
    uint64_t probe;                /* the newest one's stream */
    cm_status refuse_status;
    uint32_t reply[RIG_REPLY_MAX], n_reply;
    uint32_t n_opens, n_cancels, n_probes; /* opens without probes */
    uint64_t stream, cancelled;            /* the newest ones */
    uint32_t sent;                         /* tokens of the newest stream */
    md_ids prompt, emitted;                /* of the newest SeqOpen */
    uint32_t n_resumes;                    /* SeqResumes */
    uint64_t resume_from;                  /* of the newest one */
    bool drains;                           /* the router, as of the next epoch */
    bool two_gateways;                     /* another one is in the next epoch, besides ours */
    bool keeps;       /* a SeqResume finds the sequence, else nothing; tokens are the test's to give */
    uint32_t n_found; /* choices that a SeqFind finds, of the newest SeqOpen's request */
    uint32_t n_finds;
    uint8_t key[16];      /* of the newest SeqOpen: a SeqFind for another finds nothing */
    char traceparent[64]; /* likewise */
    uint64_t resumed[4];  /* by choice: what it is called since it was resumed */
    uint64_t birth, term; /* of the newest SeqOpen or SeqResume */
    uint32_t n_copies, n_detached;
    uint32_t n_forgets;                        /* PrefixForgets */
    char resume[32768];                        /* of the newest SeqOpen */
    Baleen__Engine__V1__SamplerParams sampler; /* likewise; without its list */
    uint32_t n_stop_id, stop_id[8];
    uint32_t n_bias, bias_id[8];
    float bias[8];
    struct {
        uint64_t stream, seed;
    } opened[RIG_OPENED_MAX]; /* the first ones */
} rig;
extern rig R;

/* One test: rig_begin (config may be changed before rig_gateway), rig_gateway, rig_serve, ..., rig_end. */
void rig_begin(void);
void rig_set(const char *option, const char *value);
void rig_gateway(void);
void rig_end(void);
/* Commits an epoch: with or without the router and the placement. */
void rig_commit(uint64_t number, bool router, bool placement);
/* Commits epoch 1 with everything and waits until the gateway is ready. */
void rig_serve(void);
/* Runs the loop until done says so; fails after a long while. */
void rig_until(bool (*done)(void *), void *arg);
void rig_cluster_stats(void);

/* ids of text, for replies; </think> where text has "|". */
void rig_reply(const char *text);
/* The same, control spellings in it are control ids. */
void rig_reply_control(const char *text);
const md_tokenizer *rig_tokenizer(void);
/* A frame about the newest stream. Log-probabilities, when asked for: -0.5 for an id; its likely tokens are
 * 0, 1, ... with -1, -2, ..., the last with -INFINITY. */
void rig_tokens(uint64_t offset, const uint32_t *ids, uint32_t n, Baleen__Engine__V1__SeqEnd end);
/* What the newest probe waits for: its token, or that there is no room for it. */
void rig_probe_say(bool token);
/* Ends the gateway's link. */
void rig_cut(void);
/* The same, and nothing listens there from now on. */
void rig_deaf(void);

typedef struct rig_client {
    struct bufferevent *bev;
    cm_bytes in; /* everything the server sent */
    bool closed; /* by the server */
} rig_client;
/* Sends the request bytes; body may be NULL. headers: lines with CRLF. */
rig_client *rig_open(const char *method, const char *path, const char *headers, const char *body);
rig_client *rig_open_raw(const char *bytes);
void rig_close(rig_client *client);
void rig_wait_closed(rig_client *client);
/* Until what was received contains text. */
void rig_wait_text(rig_client *client, const char *text);
int rig_status(const rig_client *client);
bool rig_header_is(const rig_client *client, const char *name, const char *value); /* value NULL: is there */
void rig_body(const rig_client *client, cm_bytes *out);                            /* chunks taken apart */

/* A whole request: *status_out and the body as JSON (NULL when it is none). */
json_t *rig_ask(const char *method, const char *path, const char *body, int *status_out);

/* ---- what most tests begin with ---- */

#define USER(text)  "\"messages\":[{\"role\":\"user\",\"content\":\"" text "\"}]"
#define CHAT        "/v1/chat/completions"
#define NO_THINKING "\"thinking\":{\"type\":\"disabled\"}"

int rig_setup(void **state); /* of a cmocka test */
int rig_teardown(void **state);
void rig_ready(void); /* a gateway that serves */
/* A value deep in an object: keys and indexes separated by dots. NULL when there is none. */
const json_t *rig_at(const json_t *value, const char *path);
const char *rig_text_at(const json_t *value, const char *path); /* "(none)" */
int64_t rig_int_at(const json_t *value, const char *path);      /* -1 */
void rig_wait_opens(uint32_t n); /* so many sequences were opened at the router, or more */
void rig_wait_cancels(uint32_t n);
