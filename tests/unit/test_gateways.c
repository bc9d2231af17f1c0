/* A router's links to gateways: every open is answered once and in order, a refusal says why and takes no
 * other word with it, and a gateway that goes away leaves nothing behind, whatever it has said. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/proc/loop.h"
#include "proto/control.pb-c.h"
#include "proto/engine.pb-c.h"
#include "proto/messages.h"
#include "proto/pack.h"
#include "router/gateways.h"

enum { OPENS = 3000, CLUSTER = 5, NANO_VOCAB = 4096 };

typedef struct fixture {
    pc_loop *loop;
    rt_sched *sched;
    rt_gateways *gateways;
    rt_constraints *constraints;
    net *n; /* the gateway's side */
    pc_netpump *pump;
    net_peer *peer;
    bool up, down;
    bool any_answer; /* whatever comes is fine */
    uint32_t n_answers, n_refused, n_sending, n_words;
    int32_t last_status; /* of any answer */
    char last_text[256];
    cm_arena arena;
} fixture;

static void nothing(void *arg)
{
    (void)arg;
}

static void flush(void *arg)
{
    rt_gateways_flush(((fixture *)arg)->gateways, 1);
}

static void on_answers(fixture *f, const net_event *event)
{
    Baleen__Engine__V1__StepTokens *step;
    cm_arena_reset(&f->arena);
    if (f->any_answer && event->type != PR_MSG_STEP_TOKENS) {
        f->n_answers++;
        return;
    }
    assert_int_equal(pr_unpack(&baleen__engine__v1__step_tokens__descriptor, event->payload,
                               event->payload_bytes, &f->arena, (ProtobufCMessage **)&step),
                     CM_OK);
    if (f->any_answer) {
        const Baleen__Engine__V1__SeqTokens *last = step->seq[step->n_seq - 1];
        f->n_answers++;
        f->n_words += (uint32_t)step->n_seq;
        f->last_status = last->has_status ? last->status : CM_OK;
        snprintf(f->last_text, sizeof(f->last_text), "%s", last->text != NULL ? last->text : "");
        return;
    }
    for (size_t i = 0; i < step->n_seq; i++) {
        const Baleen__Engine__V1__SeqTokens *seq = step->seq[i];
        assert_int_equal(seq->stream, ++f->n_answers); /* in order, none twice, none lost */
        bool bad = seq->stream % 3 == 0;
        assert_int_equal(seq->end, bad ? BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED
                                       : BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON);
        if (bad) {
            f->n_refused++;
            assert_int_equal(seq->status, CM_E_INVALID);
            assert_non_null(strstr(seq->text, "1000")); /* the id that is none of the vocabulary's */
        }
    }
}

static void on_event(void *ctx, const net_event *event)
{
    fixture *f = ctx;
    switch (event->kind) {
    case NET_EV_UP:
        f->up = true;
        break;
    case NET_EV_DOWN:
        f->down = true;
        break;
    case NET_EV_SENT:
        f->n_sending--;
        cm_bytes_fini(event->cookie);
        cm_free(event->cookie);
        break;
    case NET_EV_MESSAGE:
        on_answers(f, event);
        net_release(f->n, event);
        break;
    }
    pc_loop_stop(f->loop); /* let the test look */
}

static int setup(void **state)
{
    static const rt_sched_limits limits = {.slot_max = 4,
                                           .queue_max = 4096,
                                           .row_max = 64,
                                           .chunk_max = 64,
                                           .page_max = 64,
                                           .page_tokens = 128,
                                           .context = 1024,
                                           .vocab = 100};
    fixture *f = cm_alloc(sizeof(*f));
    cm_error err = {0};
    char bound[NET_ADDRESS_BYTES];
    net *server;
    net_options options;
    net_options_defaults(&options);
    options.backend = "local";
    options.message_bytes_max = 1 << 20;
    options.sends_max = 4;
    assert_int_equal(pc_loop_create(&f->loop), CM_OK);
    assert_int_equal(net_open(&options, &server, &err), CM_OK);
    assert_int_equal(net_listen(server, "t_gateways", bound, &err), CM_OK);
    f->sched = rt_sched_create(&limits);
    rt_gateways_options gateways = {
        .gateway_max = 2,
        .keep = {.live_max = 4 + 4096, .ended_max = 16, .bytes_max = 1 << 17, .grace_ms = 300},
        .constraints = f->constraints = rt_constraints_create(f->loop, BALEEN_NANO, NANO_VOCAB)};
    f->gateways = rt_gateways_create(f->loop, server, f->sched, &gateways, nothing, f);
    rt_gateways_identify(f->gateways, &(net_identity){CLUSTER, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER, 1});
    pc_loop_before_sleep(f->loop, flush, f);
    assert_int_equal(net_open(&options, &f->n, &err), CM_OK);
    net_set_identity(f->n, &(net_identity){CLUSTER, BALEEN__CONTROL__V1__ROLE__ROLE_GATEWAY, 2});
    f->pump = pc_netpump_create(f->loop, f->n, on_event, f);
    cm_arena_init(&f->arena, "answers", 1 << 16, 1 << 24);
    assert_int_equal(net_connect(f->n, bound, &f->peer, &err), CM_OK);
    pc_netpump_kick(f->pump);
    while (!f->up) {
        pc_loop_run(f->loop);
    }
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    fixture *f = *state;
    pc_netpump_destroy(f->pump);
    net_close(f->n);
    rt_gateways_destroy(f->gateways);
    rt_sched_destroy(f->sched);
    rt_constraints_destroy(f->constraints);
    pc_loop_destroy(f->loop);
    cm_arena_fini(&f->arena);
    cm_free(f);
    return 0;
}

static cm_status open_one(fixture *f, uint64_t stream)
{
    uint32_t prompt[2] = {1, stream % 3 == 0 ? 1000 : 2};
    Baleen__Engine__V1__SamplerParams sampler = BALEEN__ENGINE__V1__SAMPLER_PARAMS__INIT;
    Baleen__Engine__V1__SeqOpen open = BALEEN__ENGINE__V1__SEQ_OPEN__INIT;
    sampler.tokens_max = 4;
    open.stream = stream;
    open.prompt = prompt;
    open.n_prompt = 2;
    open.sampler = &sampler;
    cm_bytes *packed = cm_alloc(sizeof(*packed));
    pr_pack(&open.base, packed);
    net_message message = {.type = PR_MSG_SEQ_OPEN,
                           .iov = {{packed->data, packed->len}},
                           .n_iov = 1,
                           .deadline_ms = 30000,
                           .cookie = packed};
    cm_status status = net_send(f->peer, &message);
    f->n_sending += status == CM_OK;
    if (status != CM_OK) {
        cm_bytes_fini(packed);
        cm_free(packed);
    }
    return status;
}

static uint32_t open_all(fixture *f)
{
    uint32_t n_opened = 0;
    while (n_opened < OPENS) {
        cm_status status = open_one(f, n_opened + 1);
        if (status == CM_OK) {
            n_opened++;
            continue;
        }
        assert_int_equal(status, CM_AGAIN); /* both ways only four messages may be on their way */
        pc_netpump_kick(f->pump);
        pc_loop_run(f->loop);
    }
    return n_opened;
}

static void test_every_open_is_answered(void **state)
{
    fixture *f = *state;
    open_all(f);
    pc_netpump_kick(f->pump);
    while (f->n_answers < OPENS || f->n_sending > 0) {
        pc_loop_run(f->loop);
    }
    assert_int_equal(f->n_refused, OPENS / 3);
    rt_sched_ledger ledger;
    rt_sched_ledger_get(f->sched, &ledger);
    assert_int_equal(ledger.n_seq, OPENS - OPENS / 3);
}

static bool empty(fixture *f)
{
    rt_sched_ledger ledger;
    rt_sched_ledger_get(f->sched, &ledger);
    return ledger.n_seq == 0;
}

static void stop(void *arg)
{
    pc_loop_stop(((fixture *)arg)->loop);
}

static void test_a_lost_gateway_leaves_nothing(void **state)
{
    fixture *f = *state;
    open_all(f);
    assert_false(empty(f));
    net_disconnect(f->peer);
    pc_timer *tick = pc_timer_create(f->loop, stop, f);
    while (!empty(f) || f->n_sending > 0) {
        pc_timer_set(tick, 1);
        pc_netpump_kick(f->pump);
        pc_loop_run(f->loop);
    }
    pc_timer_destroy(tick);
}

/* ---- random words of a gateway, its link cut again and again ---- */

enum { WORDS = 20000, IN_FLIGHT_MAX = 3 };

static uint32_t below(uint32_t n)
{
    static uint64_t counter;
    return cm_rng_at(7, counter++, 0).word[0] % n;
}

/* false: no place on the link. */
static bool send_message(fixture *f, uint16_t type, const ProtobufCMessage *message)
{
    cm_bytes *packed = cm_alloc(sizeof(*packed));
    pr_pack(message, packed);
    net_message out = {.type = type,
                       .iov = {{packed->data, packed->len}},
                       .n_iov = 1,
                       .deadline_ms = 30000,
                       .cookie = packed};
    if (net_send(f->peer, &out) == CM_OK) {
        f->n_sending++;
        pc_netpump_kick(f->pump);
        return true;
    }
    cm_bytes_fini(packed);
    cm_free(packed);
    return false;
}

static Baleen__Engine__V1__SeqKey key_of(uint8_t id[16], uint64_t n)
{
    Baleen__Engine__V1__SeqKey key = BALEEN__ENGINE__V1__SEQ_KEY__INIT;
    memset(id, 0, 16);
    memcpy(id, &n, sizeof(n));
    key.id = (ProtobufCBinaryData){.len = below(40) == 0 ? 5 : 16, .data = id}; /* some are none */
    key.birth = 1;
    return key;
}

/* Good ones, of which some are known by now, one that does not compile, one of no known kind. */
static void draw_constraint(Baleen__Engine__V1__Constraint *constraint, Baleen__Engine__V1__SeqOpen *open)
{
    static const char *const sources[] = {"a+", "a{3}b*", "[0-9]{4,}", "(a", "x"};
    uint32_t i = below(5);
    constraint->kind = i == 4 ? 99 : GM_REGEX;
    constraint->source =
        (ProtobufCBinaryData){.len = strlen(sources[i]), .data = (uint8_t *)(uintptr_t)sources[i]};
    open->constraint = below(3) == 0 ? constraint : NULL;
}

static void say_open(fixture *f, uint64_t stream)
{
    Baleen__Engine__V1__Constraint constraint = BALEEN__ENGINE__V1__CONSTRAINT__INIT;
    static uint8_t resume[3000];
    uint8_t id[16];
    uint32_t prompt[2] = {1, below(10) == 0 ? 1000 : 2};
    Baleen__Engine__V1__SeqKey key = key_of(id, below(300));
    Baleen__Engine__V1__SamplerParams sampler = BALEEN__ENGINE__V1__SAMPLER_PARAMS__INIT;
    Baleen__Engine__V1__SeqOpen open = BALEEN__ENGINE__V1__SEQ_OPEN__INIT;
    sampler.tokens_max = 4;
    open.stream = stream;
    open.prompt = prompt;
    open.n_prompt = 2;
    open.sampler = &sampler;
    open.key = below(5) > 0 ? &key : NULL;
    draw_constraint(&constraint, &open);
    open.has_resume = below(2) == 0;
    open.resume = (ProtobufCBinaryData){.len = below(sizeof(resume)), .data = resume};
    (void)send_message(f, PR_MSG_SEQ_OPEN, &open.base);
}

static void say_cancel(fixture *f, uint64_t stream)
{
    uint8_t id[16];
    uint64_t finished = below(300);
    Baleen__Engine__V1__SeqKey key = key_of(id, below(300)), *keys[] = {&key};
    Baleen__Engine__V1__SeqCancel cancel = BALEEN__ENGINE__V1__SEQ_CANCEL__INIT;
    cancel.stream = &stream;
    cancel.n_stream = 1;
    cancel.finished = &finished;
    cancel.n_finished = below(2);
    cancel.copy = keys;
    cancel.n_copy = below(2);
    (void)send_message(f, PR_MSG_SEQ_CANCEL, &cancel.base);
}

static void say_other(fixture *f, uint64_t stream)
{
    uint8_t id[16];
    Baleen__Engine__V1__SeqKey key = key_of(id, below(300));
    Baleen__Engine__V1__SeqResume resume = BALEEN__ENGINE__V1__SEQ_RESUME__INIT;
    Baleen__Engine__V1__SeqFind find = BALEEN__ENGINE__V1__SEQ_FIND__INIT;
    Baleen__Engine__V1__SeqDetach detach = BALEEN__ENGINE__V1__SEQ_DETACH__INIT;
    resume.stream = stream;
    resume.key = &key;
    resume.from = below(3);
    resume.term = below(5);
    find.ask = stream;
    find.id = key.id;
    detach.stream = &stream;
    detach.n_stream = 1;
    switch (below(3)) {
    case 0:
        (void)send_message(f, PR_MSG_SEQ_RESUME, &resume.base);
        break;
    case 1:
        (void)send_message(f, PR_MSG_SEQ_FIND, &find.base);
        break;
    default:
        (void)send_message(f, PR_MSG_SEQ_DETACH, &detach.base);
    }
}

static void link_again(fixture *f)
{
    cm_error err = {0};
    net_disconnect(f->peer);
    f->up = false;
    assert_int_equal(net_connect(f->n, "t_gateways", &f->peer, &err), CM_OK);
    pc_netpump_kick(f->pump);
    while (!f->up) {
        pc_loop_run(f->loop);
    }
}

static bool all_is_dropped(fixture *f)
{
    rt_keep_ledger kept;
    rt_gateways_ledger(f->gateways, &kept);
    return empty(f) && kept.n_live == 0 && kept.n_orphan == 0 && kept.n_ended == 0 && kept.n_bytes == 0;
}

static void test_nothing_is_left_of_random_words(void **state)
{
    fixture *f = *state;
    f->any_answer = true;
    for (uint32_t i = 0; i < WORDS; i++) {
        uint32_t what = below(100);
        uint64_t stream = below(300);
        if (what < 45) {
            say_open(f, stream);
        } else if (what < 75) {
            say_cancel(f, stream);
        } else if (what < 99) {
            say_other(f, stream);
        } else {
            link_again(f);
        }
        while (f->n_sending > IN_FLIGHT_MAX) {
            pc_loop_run(f->loop);
        }
    }
    assert_true(f->n_answers > WORDS / 10);
    net_disconnect(f->peer);
    pc_timer *tick = pc_timer_create(f->loop, stop, f);
    while (!all_is_dropped(f) || f->n_sending > 0 || !rt_gateways_all_told(f->gateways)) {
        pc_timer_set(tick, 1);
        pc_netpump_kick(f->pump);
        pc_loop_run(f->loop);
    }
    pc_timer_destroy(tick);
    assert_int_equal(net_in_flight(f->n), 0);
}

/* ---- constraints ---- */

static void open_constrained(fixture *f, uint64_t stream, uint32_t kind, const char *source)
{
    uint32_t prompt[2] = {1, 2};
    Baleen__Engine__V1__SamplerParams sampler = BALEEN__ENGINE__V1__SAMPLER_PARAMS__INIT;
    Baleen__Engine__V1__SeqOpen open = BALEEN__ENGINE__V1__SEQ_OPEN__INIT;
    Baleen__Engine__V1__Constraint constraint = BALEEN__ENGINE__V1__CONSTRAINT__INIT;
    sampler.tokens_max = 4;
    constraint.kind = kind;
    constraint.source = (ProtobufCBinaryData){.len = strlen(source), .data = (uint8_t *)(uintptr_t)source};
    open.stream = stream;
    open.prompt = prompt;
    open.n_prompt = 2;
    open.sampler = &sampler;
    open.constraint = &constraint;
    assert_true(send_message(f, PR_MSG_SEQ_OPEN, &open.base));
}

static void answer_to(fixture *f, uint64_t stream, uint32_t kind, const char *source)
{
    uint32_t n = f->n_words;
    open_constrained(f, stream, kind, source);
    while (f->n_words == n) {
        pc_loop_run(f->loop);
    }
    assert_int_equal(f->n_words, n + 1);
}

static void test_constraints(void **state)
{
    fixture *f = *state;
    f->any_answer = true;
    /* cancelled while the vocabulary is read and it is compiled: no word about it; the word about the next
     * one says that all is done */
    uint64_t stream = 5;
    Baleen__Engine__V1__SeqCancel cancel = BALEEN__ENGINE__V1__SEQ_CANCEL__INIT;
    cancel.stream = &stream;
    cancel.n_stream = 1;
    open_constrained(f, stream, GM_REGEX, "never seen");
    assert_true(send_message(f, PR_MSG_SEQ_CANCEL, &cancel.base));
    answer_to(f, 6, GM_REGEX, "nor this");
    assert_int_equal(f->last_status, CM_OK);
    answer_to(f, 1, GM_REGEX, "a+");
    assert_int_equal(f->last_status, CM_OK);
    answer_to(f, 2, GM_REGEX, "a+"); /* known */
    assert_int_equal(f->last_status, CM_OK);
    answer_to(f, 2, GM_REGEX, "a+");
    assert_int_equal(f->last_status, CM_E_EXISTS);
    answer_to(f, 3, GM_REGEX, "(a");
    assert_int_equal(f->last_status, CM_E_INVALID);
    assert_non_null(strstr(f->last_text, "without its )"));
    answer_to(f, 4, 99, "a");
    assert_int_equal(f->last_status, CM_E_INVALID);
    rt_sched_ledger ledger;
    rt_sched_ledger_get(f->sched, &ledger);
    assert_int_equal(ledger.n_seq, 3);
}

/* One that is no salt would let sequences share what they must not. */
static void test_salt(void **state)
{
    fixture *f = *state;
    uint32_t prompt[2] = {1, 2};
    uint8_t salt[RT_SALT_BYTES + 1] = {1};
    Baleen__Engine__V1__SamplerParams sampler = BALEEN__ENGINE__V1__SAMPLER_PARAMS__INIT;
    Baleen__Engine__V1__SeqOpen open = BALEEN__ENGINE__V1__SEQ_OPEN__INIT;
    f->any_answer = true;
    sampler.tokens_max = 4;
    open.prompt = prompt;
    open.n_prompt = 2;
    open.sampler = &sampler;
    open.has_salt = true;
    for (uint32_t n = RT_SALT_BYTES - 1; n <= RT_SALT_BYTES + 1; n++) {
        uint32_t n_words = f->n_words;
        open.stream = n;
        open.salt = (ProtobufCBinaryData){.len = n, .data = salt};
        assert_true(send_message(f, PR_MSG_SEQ_OPEN, &open.base));
        while (f->n_words == n_words) {
            pc_loop_run(f->loop);
        }
        assert_int_equal(f->last_status, n == RT_SALT_BYTES ? CM_OK : CM_E_INVALID);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_every_open_is_answered, setup, teardown),
        cmocka_unit_test_setup_teardown(test_a_lost_gateway_leaves_nothing, setup, teardown),
        cmocka_unit_test_setup_teardown(test_constraints, setup, teardown),
        cmocka_unit_test_setup_teardown(test_salt, setup, teardown),
        cmocka_unit_test_setup_teardown(test_nothing_is_left_of_random_words, setup, teardown),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
