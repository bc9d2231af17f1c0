/* The cluster in one process: the real machines of all four processes on a virtual clock, over simulated
 * links, disks and loads, with one seed for everything that is drawn. Equal seeds give equal runs.
 *
 *   world     clock, queue of events by (time, number), random streams, trace, verdict
 *   wire      links between processes: loss, delay, order, cuts
 *   member    a member's session with its coordinator
 *   coordinator, worker, router + gateways, gateway + streams + seek
 *             one process each, a shell around its machines
 *   etcd      what the coordinators' real store stands on
 *   model     what a token is: a hash of all that came before, through experts that hash their rows
 *   client    requests and what they got
 *   faults    what goes wrong and when; the end of it
 *   check     what must hold, seen from outside
 *
 * Time is in microseconds. Thread: one. Nothing is freed before a run ends but messages. */
#pragma once
#include <setjmp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/queue.h>

#include "common/base/mem.h"
#include "common/net/net.h"
#include "common/proc/member_core.h"
#include "proto/frames.h"
#include "router/sched/sched_core.h"

typedef struct sim sim;
typedef struct sim_proc sim_proc;
typedef struct sim_link sim_link;
typedef struct sim_end sim_end;
typedef struct sim_request sim_request;
typedef void (*sim_fn)(sim *s, void *arg, uint64_t tag);

#define SIM_MS    1000ull
#define SIM_NEVER UINT64_MAX

enum {
    SIM_HOSTS_MAX = 24,
    SIM_LAYERS_MAX = 3,
    SIM_EXPERTS_MAX = 12,
    SIM_TOPK_MAX = 3,
    SIM_D = 32, /* values of a row */
    SIM_VOCAB = 61,
    SIM_CONTEXT = 64,
    SIM_REQUESTS_MAX = 40,
    SIM_ID_BYTES = 16,
    SIM_BLOB_BYTES = 64, /* what another gateway needs to go on with a stream */
    SIM_STOPS_MAX = 3,
    SIM_EPOCHS_MAX = 1024,
    SIM_CLUSTERS_MAX = 64,
};

typedef enum sim_fault {
#define SIM_FAULT(name, text) SIM_FAULT_##name,
#include "tests/sim/faults.def"
#undef SIM_FAULT
    SIM_FAULT_COUNT
} sim_fault;
extern const char *const sim_fault_names[SIM_FAULT_COUNT];
extern bool sim_fault_off[SIM_FAULT_COUNT]; /* by wish, whatever a seed draws */

/* Streams of random numbers: what is asked does not depend on what goes wrong. */
typedef enum sim_stream { SIM_SHAPE, SIM_WORK, SIM_WIRE, SIM_FAULTS, SIM_TIMES, SIM_STREAM_COUNT } sim_stream;

typedef enum sim_role { SIM_COORDINATOR, SIM_GATEWAY, SIM_ROUTER, SIM_WORKER } sim_role;

/* ---- shape of a run, drawn ---- */
typedef struct sim_shape {
    uint32_t n_coordinator, n_gateway, n_router, n_worker; /* at the start */
    bool etcd;         /* the log is there; else on a disk, and there is one coordinator */
    uint64_t claim_ms; /* of the active coordinator */
    uint32_t n_layer, n_expert, topk;
    uint32_t experts_max; /* one worker can hold */
    uint32_t workers_min;
    uint32_t n_request;
    uint64_t storm_us;     /* how long faults come */
    uint32_t disk_ms;      /* a write of the log takes at most, when nothing is wrong */
    uint64_t rebalance_ms; /* 0: only when asked */
    uint32_t moves_max;
    uint64_t heartbeat_ms, lease_ms, grace_ms, silence_ms, answer_ms, wait_ms;
    uint32_t row_max, chunk_max, slot_max, draft_max, queue_max, page_max, page_tokens, state_max;
    uint32_t frame_max, window_us, sends_max;
    uint64_t frame_bytes;
    uint64_t reopen_ms, rebind_ms, leave_ms; /* gateways, of streams without a router */
    uint32_t opens_max;
    uint64_t keep_ms, kept_bytes;   /* routers, of what gateways left */
    uint32_t kept_max, tell_max;    /* tokens of one StepTokens */
    uint32_t odds[SIM_FAULT_COUNT]; /* 0: off; of 10000 per message or, for what comes by time, weight */
} sim_shape;

typedef struct sim_counts {
    uint64_t faults[SIM_FAULT_COUNT];
    uint64_t events, messages, tokens, steps, exchanges, retries, epochs, aborts;
    uint64_t reopened, rebound, copies;   /* streams: at another router, at the same one, left behind */
    uint64_t resumed, not_found;          /* by clients that came back */
    uint64_t takeovers;                   /* and first times that a coordinator was active */
    uint64_t wishes, wishes_done;         /* of operators */
    uint64_t told_busy, told_unavailable; /* clients, by name */
    uint64_t healing_ms;                  /* from the healing to the last request's end */
    uint64_t forgets;                     /* at routers */
    uint64_t gone_on, hit_tokens; /* sequences from where others had been; tokens not computed for it */
    uint64_t frames_refused, preempted, done, cancelled, expired, virtual_ms;
} sim_counts;

/* ---- processes ---- */

typedef struct sim_message {
    uint16_t type;
    _Alignas(8) uint8_t header[NET_HEADER_MAX];
    uint32_t header_bytes;
    uint8_t *data; /* a copy; 64-byte aligned */
    size_t n_bytes;
} sim_message;

typedef struct sim_ops {
    void (*up)(sim *s, sim_proc *proc, sim_end *end);
    void (*down)(sim *s, sim_proc *proc, sim_end *end, cm_status status);
    void (*message)(sim *s, sim_proc *proc, sim_end *end, const sim_message *message);
    void (*sent)(sim *s, sim_proc *proc, void *cookie);
    /* After every input and when woken: does what there is to do, says when it wants to be woken. */
    uint64_t (*pump)(sim *s, sim_proc *proc);
    net_identity (*identity)(const sim_proc *proc); /* to greet those who connect */
    void (*end)(sim *s, sim_proc *proc);            /* frees the state, whatever it is in */
} sim_ops;

struct sim_proc {
    uint32_t id, host; /* id: never used twice in a run */
    sim_role role;
    bool alive, dark; /* dark: the host lost power, nothing answers for it */
    uint64_t paused_until_us, slow_until_us, wake_us;
    const sim_ops *ops;
    void *state;
    sim *world;
    char name[16]; /* also its address */
};

typedef struct sim_host {
    sim_role role;
    sim_proc *proc;                       /* newest; NULL: never started */
    bool leaving;                         /* drained: not to be started again */
    bool core;                            /* healed: to be counted on */
    uint64_t start_us;                    /* a start is due */
    uint64_t ahead_us;                    /* its wall clock */
    uint64_t cut_until_us[SIM_HOSTS_MAX]; /* messages to that host wait */
    uint64_t store_cut_until_us;          /* it does not reach etcd, nor etcd it */
} sim_host;

/* ---- the world ---- */

typedef struct sim_event {
    uint64_t at_us, number;
    sim_fn fn;
    void *arg;
    uint64_t tag;
} sim_event;

typedef struct sim_cluster_record sim_cluster_record;

struct sim {
    uint64_t seed;
    bool trace;
    uint64_t now_us, next_event;
    sim_event *heap;
    uint32_t n_event, cap_event;
    uint64_t random[SIM_STREAM_COUNT];
    uint64_t digest; /* of everything traced */
    sim_shape shape;
    sim_counts counts;
    bool healed;
    uint64_t healed_us;
    uint32_t healed_coordinator; /* the host of one that others reach */

    sim_host hosts[SIM_HOSTS_MAX];
    uint32_t n_host;
    sim_proc **procs; /* all there ever were */
    uint32_t n_proc, cap_proc;
    TAILQ_HEAD(, sim_link) links;

    struct { /* what the coordinator's disk holds */
        uint64_t cluster, next_number;
        uint32_t next_member_id;
        uint8_t *epoch; /* packed; NULL: none */
        size_t n_bytes;
    } disk;
    sim_request *requests;                          /* [n_request] */
    sim_cluster_record *clusters[SIM_CLUSTERS_MAX]; /* what was ever in force */
    uint32_t n_cluster;

    jmp_buf stop;
    char verdict[512]; /* "": all is well */
};

/* world.c */
void sim_run(sim *s, uint64_t seed, bool trace); /* verdict says how it went */
void sim_fini(sim *s);                           /* after a good run */
uint64_t sim_draw(sim *s, sim_stream stream);
uint32_t sim_below(sim *s, sim_stream stream, uint32_t n);
uint32_t sim_between(sim *s, sim_stream stream, uint32_t low, uint32_t high); /* both included */
void sim_at(sim *s, uint64_t at_us, sim_fn fn, void *arg, uint64_t tag);
static inline uint64_t sim_ms(const sim *s);
_Noreturn void sim_fail(sim *s, const char *fmt, ...) CM_PRINTF(2, 3);
void sim_trace(sim *s, const sim_proc *proc, const char *fmt, ...) CM_PRINTF(3, 4);
/* One draw of a fault point that is met; counts it when it strikes. Never after the healing. */
bool sim_strikes(sim *s, sim_fault fault);

sim_proc *sim_start(sim *s, uint32_t host); /* a new process on a host */
void sim_kill(sim *s, sim_proc *proc, bool dark);
void sim_go(sim *s, sim_proc *proc); /* pumps it and sets its alarm */
sim_proc *sim_proc_named(sim *s, const char *name);
/* The process stands still: fn is put off until it goes on; true when so. */
bool sim_put_off(sim *s, const sim_proc *proc, sim_fn fn, void *arg, uint64_t tag);

static inline uint64_t sim_ms(const sim *s)
{
    return s->now_us / 1000;
}

/* ---- wire.c ---- */

/* rows: frames may be lost, come twice or late, as nothing in the machines relies on better. The others keep
 * what their transports promise: in order and once, or the link breaks. */
typedef enum sim_class { SIM_ROWS, SIM_TOKENS, SIM_CONTROL } sim_class;

struct sim_end {
    sim_link *link;
    uint32_t side; /* 0: it connected */
    sim_proc *proc;
    bool up, closed;
    uint64_t heard_us;
    net_identity peer; /* once up */
    uint32_t n_out;    /* messages not yet delivered */
    void *user;
    uint64_t number; /* never used twice */
};

/* A link begins; up or down follows. A control link takes messages at once. */
sim_end *sim_connect(sim *s, sim_proc *from, sim_class class, const char *address,
                     const net_identity *identity);
/* No event of it follows but sent. */
void sim_disconnect(sim *s, sim_end *end);
/* header is copied; data is kept until sent(cookie), which comes exactly once (cookie NULL: no event, data is
 * copied). CM_AGAIN: the link is full; CM_E_RESET: it is down. */
CM_MUST_CHECK cm_status sim_send(sim *s, sim_end *end, uint16_t type, const void *header,
                                 uint32_t header_bytes, const void *data, size_t n_bytes, void *cookie);
void sim_break_links(sim *s, sim_proc *proc, bool silently); /* it died */
void sim_break_one(sim *s);                                  /* some link, by chance */
sim_class sim_end_class(const sim_end *end);
void sim_wire_fini(sim *s);

/* ---- member.c ---- */

typedef struct sim_member {
    pc_mcore *core;
    sim_end *end; /* NULL: no session */
    void (*news)(sim *s, sim_proc *proc, const pc_mout *out);
    cm_arena arena;
    cm_bytes packed;
} sim_member;
void sim_member_init(sim *s, sim_proc *proc, sim_member *member, uint32_t role, bool has_data,
                     void (*news)(sim *s, sim_proc *proc, const pc_mout *out));
void sim_member_fini(sim_member *member);
void sim_member_act(sim *s, sim_proc *proc, sim_member *member);
bool sim_member_message(sim *s, sim_proc *proc, sim_member *member, sim_end *end,
                        const sim_message *message); /* false: not its session */
bool sim_member_down(sim *s, sim_proc *proc, sim_member *member, sim_end *end, cm_status status);
uint64_t sim_member_pump(sim *s, sim_proc *proc, sim_member *member);

/* ---- the processes ---- */
void sim_coordinator_start(sim *s, sim_proc *proc);
void sim_coordinator_stop(sim_proc *proc); /* it is asked to end */
bool sim_coordinator_is_active(const sim_proc *proc);
/* An operator's: drain some worker or router, or move experts. */
void sim_coordinator_wish(sim *s, sim_proc *proc, bool drain);
/* It waits for that process to go. */
bool sim_coordinator_lets_go(const sim_proc *coordinator, const sim_proc *proc);
bool sim_coordinator_has(const sim_proc *coordinator, const sim_proc *proc); /* as a member */
bool sim_change_is_over(const sim *s); /* there is an active one, and it rests */
/* Of an active one. */
bool sim_coordinator_rests(const sim_proc *proc, char *why, size_t cap);
void sim_worker_start(sim *s, sim_proc *proc);
void sim_worker_leave(sim *s, sim_proc *proc);
bool sim_worker_holds(const sim_proc *proc, uint32_t layer, uint32_t expert);
bool sim_worker_is(const sim_proc *proc, uint64_t cluster, uint32_t id); /* that is its name */
void sim_router_start(sim *s, sim_proc *proc);
void sim_router_leave(sim *s, sim_proc *proc);
void sim_gateway_start(sim *s, sim_proc *proc);
void sim_gateway_forget(sim *s, sim_proc *proc); /* tells its routers to forget what ended sequences left */
/* What they still hold, in words, "" when nothing. */
void sim_worker_ledger(const sim_proc *proc, char *text, size_t cap);
void sim_router_ledger(const sim_proc *proc, char *text, size_t cap);
void sim_gateway_ledger(const sim_proc *proc, char *text, size_t cap);

/* A client's calls on its gateway. Its answers: sim_client_*, for the visit that the request is on. */
CM_MUST_CHECK cm_status sim_gateway_open(sim *s, sim_proc *proc, sim_request *request);
void sim_gateway_resume(sim *s, sim_proc *proc, sim_request *request); /* goes on behind what it has */
/* comes_back: it is to be kept for the client. */
void sim_gateway_leave(sim *s, sim_proc *proc, const sim_request *request, bool comes_back);

/* ---- model.c ---- */

typedef struct sim_expert_choice {
    int32_t expert[SIM_TOPK_MAX];
    float weight[SIM_TOPK_MAX];
} sim_expert_choice;
uint64_t sim_mix(uint64_t a, uint64_t b);
uint64_t sim_model_embed(uint32_t token);
/* kv_before: of the position before in this layer, 0 at the start. */
uint64_t sim_model_attend(uint64_t hidden, uint64_t kv_before, uint32_t layer, uint64_t *kv_out);
void sim_model_row(uint64_t hidden, uint8_t codes_out[SIM_D], uint8_t *scale_out);
void sim_model_gate(const sim_shape *shape, uint64_t hidden, uint32_t layer, sim_expert_choice *out);
void sim_model_expert(uint32_t layer, uint32_t expert, float weight, const uint8_t codes[SIM_D],
                      uint8_t scale, uint16_t out[SIM_D]);
uint64_t sim_model_combine(uint64_t hidden, const uint16_t *results, uint32_t topk);
uint32_t sim_model_token(uint64_t hidden, uint64_t seed, uint32_t position, const rt_sampler *sampler,
                         bool stop_allowed);
/* The whole answer, computed alone. */
void sim_model_answer(const sim_shape *shape, const uint32_t *prompt, uint32_t n_prompt,
                      const rt_sampler *sampler, uint32_t *tokens_out, uint32_t *n_out, rt_seq_end *end_out);

/* ---- client.c ---- */

typedef enum sim_request_state {
    SIM_ASKING, /* not begun, or between two tries */
    SIM_OPEN,   /* at a gateway */
    SIM_DONE,
    SIM_GONE, /* by the client's wish: cancelled, or its deadline passed */
} sim_request_state;

struct sim_request {
    uint32_t id;
    sim_request_state state;
    uint32_t prompt[SIM_CONTEXT], n_prompt;
    rt_sampler sampler;
    uint32_t want[SIM_CONTEXT], n_want; /* the undisturbed run */
    rt_seq_end want_end;
    uint32_t got[SIM_CONTEXT], n_got;
    uint64_t start_us, cancel_us, deadline_us; /* SIM_NEVER: none */
    bool streamed;                             /* can be resumed at any gateway */
    bool resumable;                            /* its gateway keeps it when its connection ends */
    uint32_t finish_at; /* the client has all it wants with so many tokens; 0: when the router says so */
    uint8_t key[SIM_ID_BYTES];
    uint32_t n_try;
    uint64_t visit;    /* counts the gateways it went to */
    sim_proc *gateway; /* while SIM_OPEN */
};

void sim_clients_start(sim *s);
void sim_client_tokens(sim *s, sim_request *r, uint64_t offset, const uint32_t *ids, uint32_t n);
void sim_client_end(sim *s, sim_request *r, rt_seq_end end);
void sim_client_failed(sim *s, sim_request *r, cm_status status, const char *text); /* told by name */
void sim_client_lost(sim *s, sim_request *r);                                       /* its gateway died */
bool sim_clients_finished(const sim *s);

/* ---- faults.c ---- */
void sim_shape_draw(sim *s);
void sim_faults_start(sim *s);
void sim_heal(sim *s);
void sim_host_ended(sim *s, uint32_t host);
sim_proc *sim_active_coordinator(const sim *s); /* that runs; NULL: none */

/* ---- check.c ---- */
void sim_check_stored(sim *s, uint64_t cluster, uint64_t number, const void *packed, size_t n_bytes,
                      const pr_placement *p);
/* It decides: nobody else does. */
void sim_check_active(sim *s, const sim_proc *coordinator);
/* The coordinator tells somebody that an epoch is in force. */
void sim_check_commit(sim *s, uint64_t cluster, uint64_t number, const void *packed, size_t n_bytes,
                      const pr_placement *p);

/* A member follows an epoch; last is its memory of the one before. */
typedef struct sim_followed {
    uint64_t cluster, number;
} sim_followed;
void sim_check_followed(sim *s, const sim_proc *proc, const pc_epoch *epoch, sim_followed *last);

/* A worker takes a frame. ids: all that it ever had. */
void sim_check_frame(sim *s, const sim_proc *worker, const uint32_t *ids, uint32_t n_id,
                     const sim_followed *retired, const pr_frame_head *head, uint32_t expert);

/* What a router has asked for, and whether it was answered: every answer counts once, for what is computed.
 */
enum { SIM_ASKED_MAX = 256 };
typedef struct sim_asked {
    const sim_end *end;
    pr_frame_head head;
    bool answered;
} sim_asked;
void sim_check_answer(sim *s, const sim_proc *router, sim_asked asked[SIM_ASKED_MAX], const sim_end *end,
                      const pr_frame_head *head, uint64_t step, uint32_t layer, uint64_t epoch);

/* What a router keeps of the requests: nothing goes before its time but for a reason. */
typedef struct rt_keep rt_keep;
typedef struct sim_watched {
    uint8_t key[SIM_ID_BYTES];
    uint64_t number;   /* of the newest generation; 0: none */
    uint64_t newest;   /* that there ever was */
    bool owned, live;  /* when it was seen last */
    uint64_t since_ms; /* nobody's and like that */
    bool excused;
} sim_watched;
void sim_check_kept(sim *s, const sim_proc *router, const rt_keep *keep,
                    sim_watched watched[SIM_REQUESTS_MAX]);
/* That one runs no more. */
void sim_check_kept_ended(const sim *s, sim_watched watched[SIM_REQUESTS_MAX], uint64_t number);
/* That one was cancelled or has failed. */
void sim_check_kept_excuse(sim_watched watched[SIM_REQUESTS_MAX], uint64_t number);

void sim_check_rest(sim *s); /* after everything has come to rest */
void sim_check_fini(sim *s);
