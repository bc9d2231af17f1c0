#include "tests/unit/gateway_rig.h"

#include <arpa/inet.h>
#include <event2/buffer.h>
#include <event2/event.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/queue.h>

#include <cmocka.h>

#include "common/base/log.h"
#include "common/base/mem.h"
#include "common/base/stats.h"
#include "proto/messages.h"
#include "proto/pack.h"

enum { WATCHDOG_MS = 60000 };

rig R;

/* ---- loop ---- */

static void hook(void *arg)
{
    (void)arg;
    if (R.done != NULL && R.done(R.done_arg)) {
        pc_loop_stop(R.loop);
    }
}

static void watchdog(void *arg)
{
    (void)arg;
    fprintf(stderr, "the awaited state did not come\n");
    cm_log_dump(2);
    abort();
}

void rig_until(bool (*done)(void *), void *arg)
{
    pc_timer *timer = pc_timer_create(R.loop, watchdog, NULL);
    pc_timer_set(timer, WATCHDOG_MS);
    R.done = done;
    R.done_arg = arg;
    pc_loop_run(R.loop);
    R.done = NULL;
    pc_timer_destroy(timer);
}

/* ---- the coordinator ---- */

static void coordinator_say(Baleen__Control__V1__CoordinatorMessage *word)
{
    cm_bytes packed;
    cm_bytes_init(&packed, 0);
    pr_pack(&word->base, &packed);
    assert_int_equal(pc_call_send(R.session, packed.data, packed.len), CM_OK);
    cm_bytes_fini(&packed);
}

static uint8_t g_key[NET_KEY_BYTES] = {1, 2, 3}; /* of the links */

static void say_welcome(void)
{
    Baleen__Control__V1__FrameKey key = BALEEN__CONTROL__V1__FRAME_KEY__INIT;
    key.epoch = 1;
    key.key = (ProtobufCBinaryData){sizeof(g_key), g_key};
    Baleen__Control__V1__Welcome welcome = BALEEN__CONTROL__V1__WELCOME__INIT;
    Baleen__Control__V1__CoordinatorMessage word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    welcome.member_id = RIG_GATEWAY;
    welcome.cluster = RIG_CLUSTER;
    welcome.heartbeat_ms = 1000;
    welcome.lease_ms = 5000;
    welcome.frame_key = &key;
    word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_WELCOME;
    word.welcome = &welcome;
    coordinator_say(&word);
}

void rig_commit(uint64_t number, bool router, bool placement)
{
    uint32_t rank_member[] = {RIG_WORKER}, first[] = {0, 1}, owner[] = {0};
    Baleen__Control__V1__Placement place = BALEEN__CONTROL__V1__PLACEMENT__INIT;
    place.n_layer = place.n_expert = 1;
    place.rank_member = rank_member;
    place.first = first;
    place.owner = owner;
    place.n_rank_member = place.n_owner = 1;
    place.n_first = 2;
    enum { N_MEMBERS = 4 };
    Baleen__Control__V1__Member members[N_MEMBERS], *list[N_MEMBERS];
    for (uint32_t i = 0; i < N_MEMBERS; i++) {
        baleen__control__v1__member__init(&members[i]);
        list[i] = &members[i];
    }
    members[0].id = RIG_WORKER;
    members[0].role = BALEEN__CONTROL__V1__ROLE__ROLE_WORKER;
    members[1].id = RIG_ROUTER;
    members[1].role = BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER;
    members[1].incarnation = 9;
    members[1].data_address = (char[]){"rig-router"};
    members[1].has_draining = true;
    members[1].draining = R.drains;
    members[2].id = RIG_GATEWAY;
    members[3].id = RIG_GATEWAY + 1;
    members[2].role = members[3].role = BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY;
    Baleen__Control__V1__Epoch epoch = BALEEN__CONTROL__V1__EPOCH__INIT;
    epoch.number = number;
    epoch.cluster = RIG_CLUSTER;
    epoch.members = list;
    epoch.n_members = router ? R.two_gateways ? 4 : 3 : 1;
    epoch.placement = placement ? &place : NULL;
    Baleen__Control__V1__Commit commit = BALEEN__CONTROL__V1__COMMIT__INIT;
    commit.epoch = &epoch;
    Baleen__Control__V1__CoordinatorMessage word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_COMMIT;
    word.commit = &commit;
    coordinator_say(&word);
}

void rig_cluster_stats(void)
{
    Baleen__Control__V1__StatValue steps = BALEEN__CONTROL__V1__STAT_VALUE__INIT;
    steps.stat = CM_STAT_steps;
    steps.value = 4321;
    Baleen__Control__V1__StatValue *values[] = {&steps};
    Baleen__Control__V1__MemberStats member = BALEEN__CONTROL__V1__MEMBER_STATS__INIT;
    member.member_id = RIG_ROUTER;
    member.role = BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER;
    member.state = (char[]){"leaving"};
    member.has_epoch = true;
    member.epoch = 1;
    member.stats = values;
    member.n_stats = 1;
    Baleen__Control__V1__MemberStats *members[] = {&member};
    Baleen__Control__V1__ClusterStats stats = BALEEN__CONTROL__V1__CLUSTER_STATS__INIT;
    stats.members = members;
    stats.n_members = 1;
    stats.has_changing = stats.changing = true;
    Baleen__Control__V1__CoordinatorMessage word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_CLUSTER_STATS;
    word.cluster_stats = &stats;
    coordinator_say(&word);
}

static void say_load(void)
{
    uint8_t level = 25;
    Baleen__Control__V1__ClusterLoad load = BALEEN__CONTROL__V1__CLUSTER_LOAD__INIT;
    Baleen__Control__V1__CoordinatorMessage word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    load.n_layer = load.n_expert = 1;
    load.level = (ProtobufCBinaryData){1, &level};
    word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_CLUSTER_LOAD;
    word.cluster_load = &load;
    coordinator_say(&word);
}

static void session_message(pc_call *call, const uint8_t *data, size_t n_bytes)
{
    Baleen__Control__V1__MemberMessage *word;
    R.session = call;
    assert_int_equal(pr_unpack(&baleen__control__v1__member_message__descriptor, data, n_bytes, &R.arena,
                               (ProtobufCMessage **)&word),
                     CM_OK);
    if (word->word_case == BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HELLO) {
        assert_int_equal(word->hello->self->role, BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY);
        say_welcome();
    } else if (word->word_case == BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_COMMITTED) {
        R.epoch_committed = word->committed->epoch;
    } else if (word->word_case == BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_PEER_REPORT) {
        R.n_reports++;
    } else if (word->word_case == BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_LOAD_WISH) {
        R.n_load_wishes++;
        say_load();
    }
    cm_arena_reset(&R.arena);
}

static void session_closed(pc_call *call, bool cancelled)
{
    (void)cancelled;
    R.session = R.session == call ? NULL : R.session;
}

static void coordinator_start(void)
{
    static const pc_method method = {.path = "/baleen.control.v1.Control/Session",
                                     .message = session_message,
                                     .closed = session_closed,
                                     .client_streams = true};
    const pc_rpc_options options = {
        .address = "127.0.0.1:0", .request_bytes_max = 1 << 20, .calls_max = 4, .queue_bytes_max = 1 << 20};
    cm_status status = pc_rpc_server_create(R.loop, &options, &method, 1, &R.server, R.coordinator, NULL);
    assert_int_equal(status, CM_OK);
}

/* ---- the router ---- */

typedef struct router_frame {
    STAILQ_ENTRY(router_frame) link;
    uint16_t type;
    cm_bytes bytes;
} router_frame;

/* Frames that wait for a place on the link. */
static STAILQ_HEAD(, router_frame) waiting = STAILQ_HEAD_INITIALIZER(waiting);

static void frame_free(router_frame *frame)
{
    cm_bytes_fini(&frame->bytes);
    cm_free(frame);
}

static void router_flush(void)
{
    router_frame *frame;
    while ((frame = STAILQ_FIRST(&waiting)) != NULL) {
        net_message message = {.type = frame->type,
                               .iov = {{frame->bytes.data, frame->bytes.len}},
                               .n_iov = 1,
                               .deadline_ms = WATCHDOG_MS,
                               .cookie = frame};
        if (R.peer != NULL && net_send(R.peer, &message) != CM_OK) {
            return;
        }
        STAILQ_REMOVE_HEAD(&waiting, link);
        if (R.peer == NULL) {
            frame_free(frame);
        }
    }
    pc_netpump_kick(R.pump);
}

static void router_send(uint16_t type, const ProtobufCMessage *message)
{
    router_frame *frame = cm_alloc(sizeof(*frame));
    frame->type = type;
    cm_bytes_init(&frame->bytes, 0);
    pr_pack(message, &frame->bytes);
    STAILQ_INSERT_TAIL(&waiting, frame, link);
    router_flush();
}

static void put_logprobs(Baleen__Engine__V1__SeqTokens *seq)
{
    static Baleen__Engine__V1__TokenLogprobs of, *list[RIG_REPLY_MAX];
    static uint32_t id[20];
    static float top[20];
    baleen__engine__v1__token_logprobs__init(&of);
    of.token = -0.5f;
    of.n_top_id = of.n_top = R.sampler.top_logprobs;
    of.top_id = id;
    of.top = top;
    for (uint32_t i = 0; i < of.n_top; i++) {
        id[i] = i;
        top[i] = i + 1 < of.n_top ? -1.0f - (float)i : -INFINITY;
    }
    for (size_t i = 0; i < seq->n_id; i++) {
        list[i] = &of;
    }
    seq->logprobs = list;
    seq->n_logprobs = seq->n_id;
}

static void router_say(uint64_t stream, uint64_t offset, const uint32_t *ids, uint32_t n,
                       Baleen__Engine__V1__SeqEnd end)
{
    Baleen__Engine__V1__SeqTokens seq = BALEEN__ENGINE__V1__SEQ_TOKENS__INIT;
    seq.stream = stream;
    seq.id = (uint32_t *)(uintptr_t)ids;
    seq.n_id = n;
    seq.has_offset = true;
    seq.offset = offset;
    seq.has_end = true;
    seq.end = end;
    seq.has_stop_id = end == BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP;
    seq.stop_id = md_tokenizer_control(rig_tokenizer(), MD_CTL_EOS);
    seq.has_status = end == BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED;
    seq.status = R.refuse_status;
    if (stream == R.stream && R.sampler.has_top_logprobs) {
        put_logprobs(&seq);
    }
    Baleen__Engine__V1__SeqTokens *list[] = {&seq};
    Baleen__Engine__V1__StepTokens step = BALEEN__ENGINE__V1__STEP_TOKENS__INIT;
    step.seq = list;
    step.n_seq = 1;
    router_send(PR_MSG_STEP_TOKENS, &step.base);
}

void rig_tokens(uint64_t offset, const uint32_t *ids, uint32_t n, Baleen__Engine__V1__SeqEnd end)
{
    router_say(R.stream, offset, ids, n, end);
}

/* Tokens of a flood: a few frames in flight at a time. */
static void router_flood(void)
{
    uint32_t ids[16];
    for (uint32_t i = 0; i < 16; i++) {
        ids[i] = R.reply[0];
    }
    if (R.mode == RIG_FLOOD && R.stream != R.cancelled && R.sent + 16 <= R.sampler.tokens_max) {
        router_say(R.stream, R.sent, ids, 16, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
        R.sent += 16;
    }
}

static void router_answer(void)
{
    if (R.mode == RIG_ECHO) {
        R.n_reply = RIG_REPLY_MAX;
        for (uint32_t i = 0; i < R.n_reply; i++) {
            R.reply[i] = R.prompt.id[R.prompt.n - 1];
        }
    }
    uint32_t n_emitted = (uint32_t)R.emitted.n;
    router_say(R.stream, n_emitted, NULL, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    uint32_t n = R.n_reply < R.sampler.tokens_max ? R.n_reply : R.sampler.tokens_max;
    for (uint32_t i = n_emitted; i < n; i++) {
        bool last = i + 1 == R.sampler.tokens_max;
        router_say(R.stream, i, &R.reply[i], 1,
                   last ? BALEEN__ENGINE__V1__SEQ_END__SEQ_LENGTH
                        : BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    }
    if (n < R.sampler.tokens_max) {
        router_say(R.stream, n, NULL, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP);
    }
}

static void router_open(const Baleen__Engine__V1__SeqOpen *open)
{
    bool probe = open->n_prompt == 1 && open->sampler->tokens_max == 1 && open->sampler->temperature <= 0;
    R.probe = probe ? open->stream : R.probe;
    R.n_probes += probe;
    if (probe && R.probe_waits) {
        return;
    }
    if (probe) {
        uint32_t id = md_tokenizer_control(rig_tokenizer(), MD_CTL_BOS);
        router_say(open->stream, 0, &id, R.probe_fails ? 0 : 1,
                   R.probe_fails ? BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED
                                 : BALEEN__ENGINE__V1__SEQ_END__SEQ_LENGTH);
        return;
    }
    R.stream = open->stream;
    R.sent = 0;
    R.prompt.n = 0;
    for (size_t i = 0; i < open->n_prompt; i++) {
        md_ids_push(&R.prompt, open->prompt[i]);
    }
    R.birth = open->key->birth;
    memcpy(R.key, open->key->id.data, sizeof(R.key));
    snprintf(R.traceparent, sizeof(R.traceparent), "%s", open->traceparent != NULL ? open->traceparent : "");
    R.term = open->term;
    R.emitted.n = 0;
    for (size_t i = 0; i < open->n_emitted; i++) {
        md_ids_push(&R.emitted, open->emitted[i]);
    }
    snprintf(R.resume, sizeof(R.resume), "%.*s", (int)open->resume.len, (const char *)open->resume.data);
    R.sampler = *open->sampler;
    R.n_stop_id = (uint32_t)open->sampler->n_stop_id;
    memcpy(R.stop_id, open->sampler->stop_id, R.n_stop_id * sizeof(uint32_t));
    R.n_bias = (uint32_t)open->sampler->n_bias;
    for (uint32_t i = 0; i < R.n_bias; i++) {
        R.bias_id[i] = open->sampler->bias_id[i];
        R.bias[i] = open->sampler->bias[i];
    }
    if (R.n_opens < RIG_OPENED_MAX) {
        R.opened[R.n_opens].stream = open->stream;
        R.opened[R.n_opens].seed = open->sampler->seed;
    }
    R.n_opens++;
    if (R.mode == RIG_ANSWER || R.mode == RIG_ECHO) {
        router_answer();
    } else if (R.mode == RIG_REFUSE) {
        router_say(R.stream, 0, NULL, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED);
    } else if (R.mode != RIG_MUTE) {
        router_say(R.stream, 0, NULL, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
    }
}

static void router_resume(const Baleen__Engine__V1__SeqResume *resume)
{
    R.n_resumes++;
    R.resume_from = resume->from;
    R.resumed[resume->key->choice % 4] = resume->stream;
    R.birth = resume->key->birth;
    R.term = resume->term;
    if (R.keeps) {
        R.stream = resume->stream;
        router_say(R.stream, resume->from, NULL, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
        return;
    }
    cm_status status = R.refuse_status;
    R.refuse_status = CM_E_NOT_FOUND;
    router_say(resume->stream, resume->from, NULL, 0, BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED);
    R.refuse_status = status;
}

static void router_find(const Baleen__Engine__V1__SeqFind *find)
{
    Baleen__Engine__V1__SeqFound found = BALEEN__ENGINE__V1__SEQ_FOUND__INIT;
    Baleen__Engine__V1__SeqKey keys[4], *list[4];
    R.n_finds++;
    bool same = R.n_opens == 0 || memcmp(find->id.data, R.key, sizeof(R.key)) == 0;
    uint32_t n = same ? R.n_found : 0;
    for (uint32_t i = 0; i < n; i++) {
        baleen__engine__v1__seq_key__init(&keys[i]);
        keys[i].id = find->id;
        keys[i].choice = i;
        keys[i].birth = R.birth;
        list[i] = &keys[i];
    }
    found.ask = find->ask;
    found.key = list;
    found.n_key = n;
    found.has_resume = n > 0;
    found.resume = (ProtobufCBinaryData){.len = strlen(R.resume), .data = (uint8_t *)R.resume};
    found.has_term = true;
    found.term = R.term;
    router_send(PR_MSG_SEQ_FOUND, &found.base);
}

static void router_message(const net_event *event)
{
    ProtobufCMessage *message;
    if (event->type == PR_MSG_SEQ_OPEN) {
        assert_int_equal(pr_unpack(&baleen__engine__v1__seq_open__descriptor, event->payload,
                                   event->payload_bytes, &R.arena, &message),
                         CM_OK);
        router_open((const Baleen__Engine__V1__SeqOpen *)message);
    } else if (event->type == PR_MSG_SEQ_RESUME) {
        assert_int_equal(pr_unpack(&baleen__engine__v1__seq_resume__descriptor, event->payload,
                                   event->payload_bytes, &R.arena, &message),
                         CM_OK);
        router_resume((const Baleen__Engine__V1__SeqResume *)message);
    } else if (event->type == PR_MSG_SEQ_FIND) {
        assert_int_equal(pr_unpack(&baleen__engine__v1__seq_find__descriptor, event->payload,
                                   event->payload_bytes, &R.arena, &message),
                         CM_OK);
        router_find((const Baleen__Engine__V1__SeqFind *)message);
    } else if (event->type == PR_MSG_SEQ_DETACH) {
        R.n_detached++;
    } else if (event->type == PR_MSG_PREFIX_FORGET) {
        R.n_forgets++;
    } else {
        assert_int_equal(event->type, PR_MSG_SEQ_CANCEL);
        assert_int_equal(pr_unpack(&baleen__engine__v1__seq_cancel__descriptor, event->payload,
                                   event->payload_bytes, &R.arena, &message),
                         CM_OK);
        const Baleen__Engine__V1__SeqCancel *cancel = (const Baleen__Engine__V1__SeqCancel *)message;
        R.n_cancels += (uint32_t)(cancel->n_stream + cancel->n_finished);
        R.n_copies += (uint32_t)cancel->n_copy;
        R.cancelled = cancel->n_stream > 0     ? cancel->stream[cancel->n_stream - 1]
                      : cancel->n_finished > 0 ? cancel->finished[cancel->n_finished - 1]
                                               : R.cancelled;
    }
    cm_arena_reset(&R.arena);
}

static void router_event(void *ctx, const net_event *event)
{
    router_frame *frame = event->cookie;
    (void)ctx;
    switch (event->kind) {
    case NET_EV_UP:
        R.peer = event->peer;
        R.n_links++;
        assert_int_equal(net_peer_identity(event->peer)->member, RIG_GATEWAY);
        break;
    case NET_EV_DOWN:
        R.peer = NULL;
        break;
    case NET_EV_MESSAGE:
        router_message(event);
        net_release(R.net, event);
        break;
    case NET_EV_SENT:
        frame_free(frame);
        router_flush();
        if (event->status == CM_OK) {
            router_flood();
        }
        break;
    }
}

void rig_cut(void)
{
    net_disconnect(R.peer);
    R.peer = NULL;
    pc_netpump_kick(R.pump);
}

static void router_start(void)
{
    net_options options;
    char bound[NET_ADDRESS_BYTES];
    const net_identity identity = {RIG_CLUSTER, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER, RIG_ROUTER};
    net_options_defaults(&options);
    options.backend = "local";
    options.keyed = true;
    assert_int_equal(net_open(&options, &R.net, NULL), CM_OK);
    net_key_add(R.net, RIG_CLUSTER, 1, g_key);
    net_set_identity(R.net, &identity);
    assert_int_equal(net_listen(R.net, "rig-router", bound, NULL), CM_OK);
    R.pump = pc_netpump_create(R.loop, R.net, router_event, NULL);
}

const md_tokenizer *rig_tokenizer(void)
{
    return gw_gateway_tokenizer(R.gateway);
}

static void reply_text(const char *text, size_t n, md_text_kind kind)
{
    md_ids ids;
    md_ids_init(&ids);
    md_tokenizer_encode(rig_tokenizer(), text, n, kind, &ids);
    assert_in_range(R.n_reply + ids.n, 0, RIG_REPLY_MAX - 1);
    for (size_t i = 0; i < ids.n; i++) {
        R.reply[R.n_reply++] = ids.id[i];
    }
    md_ids_fini(&ids);
}

void rig_reply(const char *text)
{
    const char *bar = strchr(text, '|');
    R.n_reply = 0;
    if (bar != NULL) {
        reply_text(text, (size_t)(bar - text), MD_TEXT_PLAIN);
        R.reply[R.n_reply++] = md_tokenizer_control(rig_tokenizer(), MD_CTL_THINK_END);
        text = bar + 1;
    }
    reply_text(text, strlen(text), MD_TEXT_PLAIN);
}

void rig_reply_control(const char *text)
{
    R.n_reply = 0;
    reply_text(text, strlen(text), MD_TEXT_CONTROL);
}

/* ---- the gateway ---- */

static void left(void *ctx, cm_status status)
{
    (void)ctx;
    R.left = status;
}

void rig_begin(void)
{
    memset(&R, 0, sizeof(R));
    R.left = CM_AGAIN;
    cm_log_setup(&(cm_log_options){.level = CM_LOG_ERROR, .fd = 2});
    assert_int_equal(pc_loop_create(&R.loop), CM_OK);
    pc_loop_before_sleep(R.loop, hook, NULL);
    cm_arena_init(&R.arena, "rig", 64 * 1024, 16 * 1024 * 1024);
    md_ids_init(&R.prompt);
    md_ids_init(&R.emitted);
    coordinator_start();
    router_start();
    cm_cfg_defaults(&gw_config_table, &R.config);
    rig_set("coordinator", R.coordinator);
    rig_set("model", BALEEN_NANO);
    rig_set("net", "local");
    rig_set("grpc", "");
    rig_set("model_aliases", "other,third");
}

void rig_set(const char *option, const char *value)
{
    cm_error err = {0};
    if (cm_cfg_set(&gw_config_table, &R.config, option, value, &err) != CM_OK) {
        fail_msg("%s: %s", option, err.text);
    }
}

static bool has_session(void *arg)
{
    (void)arg;
    return R.session != NULL;
}

void rig_gateway(void)
{
    cm_error err = {0};
    cm_status status = gw_gateway_create(R.loop, &R.config, left, NULL, &R.gateway, &err);
    if (status != CM_OK) {
        fail_msg("%s: %s", err.field, err.text);
    }
    rig_until(has_session, NULL);
}

static bool is_ready(void *arg)
{
    gw_info info;
    (void)arg;
    gw_gateway_info(R.gateway, &info);
    return info.ready;
}

void rig_serve(void)
{
    rig_commit(1, true, true);
    rig_until(is_ready, NULL);
}

static void router_stop(void)
{
    /* frames that were on their way come back before the net may go */
    while (net_in_flight(R.net) > 0) {
        net_event events[16];
        uint32_t n = net_poll(R.net, events, 16);
        for (uint32_t i = 0; i < n; i++) {
            R.mode = RIG_MUTE;
            router_event(NULL, &events[i]);
        }
    }
    pc_netpump_destroy(R.pump);
    net_close(R.net);
    R.net = NULL;
}

void rig_probe_say(bool token)
{
    uint32_t id = md_tokenizer_control(rig_tokenizer(), MD_CTL_BOS);
    R.refuse_status = CM_E_CAPACITY;
    router_say(R.probe, 0, &id, token ? 1 : 0,
               token ? BALEEN__ENGINE__V1__SEQ_END__SEQ_LENGTH : BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED);
}

void rig_deaf(void)
{
    rig_cut();
    router_stop();
}

void rig_end(void)
{
    gw_gateway_destroy(R.gateway);
    if (R.net != NULL) {
        router_stop();
    }
    pc_rpc_server_destroy(R.server);
    pc_loop_destroy(R.loop);
    cm_cfg_free(&gw_config_table, &R.config);
    md_ids_fini(&R.prompt);
    md_ids_fini(&R.emitted);
    cm_arena_fini(&R.arena);
}

/* ---- the client ---- */

static void client_read(struct bufferevent *bev, void *arg)
{
    rig_client *client = arg;
    struct evbuffer *input = bufferevent_get_input(bev);
    size_t n = evbuffer_get_length(input);
    cm_bytes_append(&client->in, evbuffer_pullup(input, -1), n);
    evbuffer_drain(input, n);
}

static void client_event(struct bufferevent *bev, short what, void *arg)
{
    rig_client *client = arg;
    if ((what & (BEV_EVENT_EOF | BEV_EVENT_ERROR)) != 0) {
        client_read(bev, arg);
        client->closed = true;
    }
}

rig_client *rig_open_raw(const char *bytes)
{
    rig_client *client = cm_alloc(sizeof(*client));
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    to.sin_port = htons((uint16_t)atoi(strrchr(gw_gateway_http(R.gateway), ':') + 1));
    cm_bytes_init(&client->in, 0);
    client->bev = bufferevent_socket_new(pc_loop_base(R.loop), -1, BEV_OPT_CLOSE_ON_FREE);
    bufferevent_setcb(client->bev, client_read, NULL, client_event, client);
    bufferevent_enable(client->bev, EV_READ | EV_WRITE);
    bufferevent_write(client->bev, bytes, strlen(bytes));
    assert_int_equal(bufferevent_socket_connect(client->bev, (struct sockaddr *)&to, sizeof(to)), 0);
    return client;
}

rig_client *rig_open(const char *method, const char *path, const char *headers, const char *body)
{
    cm_bytes text;
    cm_bytes_init(&text, 0);
    cm_bytes_printf(&text, "%s %s HTTP/1.1\r\nHost: x\r\n%s", method, path, headers);
    if (body != NULL) {
        cm_bytes_printf(&text, "Content-Type: application/json\r\nContent-Length: %zu\r\n", strlen(body));
    }
    cm_bytes_printf(&text, "\r\n%s", body != NULL ? body : "");
    rig_client *client = rig_open_raw(cm_bytes_text(&text));
    cm_bytes_fini(&text);
    return client;
}

void rig_close(rig_client *client)
{
    bufferevent_free(client->bev);
    cm_bytes_fini(&client->in);
    cm_free(client);
}

static bool client_closed(void *arg)
{
    return ((rig_client *)arg)->closed;
}

void rig_wait_closed(rig_client *client)
{
    rig_until(client_closed, client);
}

typedef struct awaited {
    rig_client *client;
    const char *text;
} awaited;

static bool has_text(void *arg)
{
    awaited *a = arg;
    return strstr(cm_bytes_text(&a->client->in), a->text) != NULL;
}

void rig_wait_text(rig_client *client, const char *text)
{
    awaited a = {client, text};
    rig_until(has_text, &a);
}

int rig_status(const rig_client *client)
{
    const char *text = cm_bytes_text(&client->in);
    return strncmp(text, "HTTP/1.1 ", 9) == 0 ? atoi(text + 9) : 0;
}

bool rig_header_is(const rig_client *client, const char *name, const char *value)
{
    const char *at = cm_bytes_text(&client->in);
    const char *end = strstr(at, "\r\n\r\n");
    size_t n = strlen(name);
    while (at != NULL && end != NULL && (at = strstr(at, "\r\n")) != NULL && at < end) {
        at += 2;
        if (strncasecmp(at, name, n) == 0 && at[n] == ':') {
            const char *found = at + n + 1 + strspn(at + n + 1, " ");
            return value == NULL ||
                   (strncmp(found, value, strlen(value)) == 0 && found[strlen(value)] == '\r');
        }
    }
    return false;
}

void rig_body(const rig_client *client, cm_bytes *out)
{
    const char *at = strstr(cm_bytes_text(&client->in), "\r\n\r\n");
    assert_non_null(at);
    at += 4;
    if (!rig_header_is(client, "Transfer-Encoding", "chunked")) {
        cm_bytes_append_text(out, at);
        return;
    }
    for (;;) {
        char *end;
        size_t n = strtoul(at, &end, 16);
        if (end == at || n == 0 || strlen(end) < n + 2) {
            return;
        }
        cm_bytes_append(out, end + 2, n);
        at = end + 2 + n + 2;
    }
}

json_t *rig_ask(const char *method, const char *path, const char *body, int *status_out)
{
    rig_client *client = rig_open(method, path, "Connection: close\r\n", body);
    rig_wait_closed(client);
    *status_out = rig_status(client);
    cm_bytes text;
    cm_bytes_init(&text, 0);
    rig_body(client, &text);
    json_t *value = json_loadb(cm_bytes_text(&text), text.len, JSON_ALLOW_NUL, NULL);
    cm_bytes_fini(&text);
    rig_close(client);
    return value;
}

/* ---- what most tests begin with ---- */

int rig_setup(void **state)
{
    (void)state;
    rig_begin();
    return 0;
}

int rig_teardown(void **state)
{
    (void)state;
    rig_end();
    return 0;
}

void rig_ready(void)
{
    rig_gateway();
    rig_serve();
}

const json_t *rig_at(const json_t *value, const char *path)
{
    char part[64];
    while (*path != 0 && value != NULL) {
        size_t n = strcspn(path, ".");
        snprintf(part, sizeof(part), "%.*s", (int)n, path);
        value =
            json_is_array(value) ? json_array_get(value, (size_t)atoi(part)) : json_object_get(value, part);
        path += n + (path[n] == '.');
    }
    return value;
}

const char *rig_text_at(const json_t *value, const char *path)
{
    const char *text = json_string_value(rig_at(value, path));
    return text != NULL ? text : "(none)";
}

int64_t rig_int_at(const json_t *value, const char *path)
{
    const json_t *found = rig_at(value, path);
    return json_is_integer(found) ? json_integer_value(found) : -1;
}

static bool opened(void *arg)
{
    return R.n_opens >= *(uint32_t *)arg;
}

void rig_wait_opens(uint32_t n)
{
    rig_until(opened, &n);
}

static bool cancelled(void *arg)
{
    return R.n_cancels >= *(uint32_t *)arg;
}

void rig_wait_cancels(uint32_t n)
{
    rig_until(cancelled, &n);
}
