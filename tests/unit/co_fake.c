#include "tests/unit/co_fake.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "proto/messages.h"

#define FOR_PEERS(f, p) for (fake_peer *p = (f)->peers; p < (f)->peers + FAKE_PEERS; p++)

static fake_peer *fake_by_session(fake_cluster *f, uint64_t session)
{
    FOR_PEERS(f, p)
    {
        if (p->used && p->session == session) {
            return p;
        }
    }
    return NULL;
}

/* ---- what must hold always ---- */

static bool is_in(const fake_peer *p, const co_epoch *epoch)
{
    return p->used && p->session != 0 && p->given && co_epoch_find(epoch, p->given_id) != NULL;
}

/* Who of the role is in the epoch and connected has it in force. */
static bool all_switched(fake_cluster *f, const co_epoch *epoch, Baleen__Control__V1__Role role)
{
    FOR_PEERS(f, p)
    {
        if (p->role == role && is_in(p, epoch) && p->epoch < epoch->number) {
            return false;
        }
    }
    return true;
}

static void check_epoch(const co_epoch *epoch)
{
    const pr_placement *place = epoch->placement;
    assert_non_null(place);
    if (place->n_layer == 0) { /* of routers without experts */
        assert_int_equal(place->n_expert + place->n_rank, 0);
        return;
    }
    assert_int_equal(place->n_layer, FAKE_LAYERS);
    assert_int_equal(place->n_expert, FAKE_EXPERTS);
    for (uint32_t l = 0; l < place->n_layer; l++) {
        for (uint32_t e = 0; e < place->n_expert; e++) {
            uint32_t n;
            pr_placement_owners(place, l, e, &n);
            assert_true(n >= 1);
        }
    }
    for (uint32_t r = 0; r < place->n_rank; r++) {
        const co_peer *worker = co_epoch_find(epoch, place->rank_member[r]);
        assert_non_null(worker);
        assert_int_equal(worker->role, CO_ROLE_WORKER);
        assert_true(pr_placement_count(place, r) <= worker->expert_bytes_max / FAKE_EXPERT_BYTES);
    }
    assert_int_equal(place->n_rank, co_epoch_count(epoch, CO_ROLE_WORKER));
}

static void check_state(fake_cluster *f)
{
    const co_epoch *epoch = co_core_epoch(f->core);
    if (epoch != NULL && epoch->number != f->number_max) {
        assert_true(epoch->number > f->number_max);
        f->number_max = epoch->number;
        f->n_changes++;
        check_epoch(epoch);
        assert_non_null(f->epoch); /* in the log before it is in force */
        assert_int_equal(f->epoch->number, epoch->number);
    }
    uint64_t open = 0;
    FOR_PEERS(f, p)
    {
        if (p->used && p->session != 0 && p->given && p->open_prepare != 0) {
            assert_true(open == 0 || open == p->open_prepare); /* one change in flight */
            open = p->open_prepare;
        }
    }
    uint32_t last_id = 0;
    assert_true(co_core_n_members(f->core) <= f->options.members_max);
    for (uint32_t i = 0; i < co_core_n_members(f->core); i++) {
        co_member_view view;
        co_core_member(f->core, i, &view);
        assert_true(view.self->id > last_id);
        last_id = view.self->id;
    }
}

/* Nobody who may still hold an epoch with it counts on the one that goes. */
static void check_drain(fake_cluster *f, const fake_peer *p)
{
    const co_epoch *epoch = co_core_epoch(f->core);
    const co_peer *self = epoch != NULL ? co_epoch_find(epoch, p->given_id) : NULL;
    char change[256];
    if (p->role == CO_ROLE_WORKER) {
        if (self == NULL && epoch != NULL) {
            assert_true(all_switched(f, epoch, CO_ROLE_ROUTER));
        }
    } else if (p->role == CO_ROLE_ROUTER && self != NULL && !co_core_change(f->core, change)) {
        FOR_PEERS(f, g)
        {
            bool holds = g->role == CO_ROLE_GATEWAY && is_in(g, epoch) && g->epoch != 0;
            assert_true(!holds || (self->draining && g->epoch == epoch->number));
        }
    }
}

static void check_word(fake_cluster *f, fake_peer *p, const co_out *out)
{
    const co_epoch *epoch = co_core_epoch(f->core);
    switch (out->kind) {
    case CO_OUT_WELCOME:
        assert_true(out->member_id < f->next_id); /* the log knows that it is given away */
        p->given = true;
        assert_true(out->member_id < FAKE_IDS);
        if (out->member_id > f->id_max) {
            f->id_max = out->member_id;
            f->id_owner[f->id_max] = p->incarnation;
        }
        assert_int_equal(f->id_owner[out->member_id], p->incarnation);
        if (out->member_id != p->given_id) {
            p->given_id = out->member_id;
            p->open_prepare = 0; /* a new id is a new start */
        }
        break;
    case CO_OUT_PREPARE:
        f->n_prepares++;
        assert_int_equal(p->role, CO_ROLE_WORKER);
        assert_true(out->epoch->number > f->number_max);
        assert_true(out->epoch->number < f->next_number); /* the number is spent in the log */
        assert_true(p->open_prepare == 0 || p->open_prepare == out->epoch->number);
        p->open_prepare = out->epoch->number;
        break;
    case CO_OUT_ABORT:
        f->n_aborts++;
        assert_true(p->open_prepare == out->number || p->open_prepare == 0 ||
                    p->holds_prepared == out->number);
        p->open_prepare = p->open_prepare != out->number ? p->open_prepare : 0;
        break;
    case CO_OUT_COMMIT:
        f->n_commits++;
        assert_ptr_equal(out->epoch, epoch);
        assert_true(is_in(p, epoch));
        if (p->role == CO_ROLE_WORKER) {
            assert_true(p->prepared == epoch->number || p->epoch == epoch->number);
        } else {
            assert_true(all_switched(f, epoch, CO_ROLE_WORKER));
        }
        p->open_prepare = 0;
        break;
    case CO_OUT_RETIRE:
        f->n_retires++;
        assert_int_equal(p->role, CO_ROLE_WORKER);
        assert_int_equal(out->number, epoch->number);
        assert_true(all_switched(f, epoch, CO_ROLE_WORKER));
        break;
    case CO_OUT_DRAIN:
        check_drain(f, p);
        p->told_drain = p->leaving = true;
        break;
    default:
        break;
    }
}

/* ---- the outbox ---- */

static void take_word(fake_cluster *f, const co_out *out)
{
    fake_peer *p = fake_by_session(f, out->session);
    if (p == NULL) {
        return; /* it closed the session itself */
    }
    check_word(f, p, out);
    if (out->kind == CO_OUT_REFUSED || out->kind == CO_OUT_CLOSE) {
        snprintf(p->refused, sizeof(p->refused), "%s", out->text);
        p->refused_final = out->kind == CO_OUT_REFUSED && out->final;
        p->finished = p->refused_final || (p->leaving && out->status == CM_OK);
        p->session = 0;
        p->n_mail = 0;
        return;
    }
    assert_true(p->n_mail < FAKE_MAIL);
    uint64_t number = out->kind == CO_OUT_WELCOME ? out->member_id : out->number;
    p->mail[p->n_mail++] = (fake_mail){out->kind, out->epoch != NULL ? out->epoch->number : number};
}

static void take_answer(fake_cluster *f, const co_out *out)
{
    assert_true(out->ticket != 0 && out->ticket <= f->n_tickets);
    if (out->ticket < FAKE_ASKS) {
        assert_false(f->answers[out->ticket].given); /* once */
        f->answers[out->ticket].given = true;
        f->answers[out->ticket].status = out->status;
        snprintf(f->answers[out->ticket].text, sizeof(f->answers[0].text), "%s", out->text);
    }
}

static void fake_step(fake_cluster *f, const co_in *in)
{
    co_core_step(f->core, f->now_ms, in, in != NULL ? 1 : 0);
    uint32_t n;
    const co_out *outs = co_core_outbox(f->core, &n);
    for (uint32_t i = 0; i < n; i++) {
        if (outs[i].kind == CO_OUT_NOTE) {
            f->n_warnings += outs[i].level <= CM_LOG_WARN;
        } else if (outs[i].kind == CO_OUT_ANSWER) {
            take_answer(f, &outs[i]);
        } else if (outs[i].kind == CO_OUT_STORE) {
            assert_true(f->n_stores < FAKE_STORES);
            co_epoch *epoch = outs[i].epoch != NULL ? co_epoch_hold(outs[i].epoch) : NULL;
            f->stores[f->n_stores++] =
                (fake_store){outs[i].ticket, outs[i].number, outs[i].member_id, *outs[i].drains, epoch};
        } else {
            take_word(f, &outs[i]);
        }
    }
    check_state(f);
}

static void fake_say(fake_cluster *f, fake_peer *p, Baleen__Control__V1__MemberMessage *word)
{
    if (p->session != 0) { /* heartbeats to a session that was just closed go nowhere */
        fake_step(f, &(co_in){.kind = CO_IN_WORD, .session = p->session, .word = word});
    }
}

/* ---- life ---- */

void fake_init(fake_cluster *f, uint32_t workers_min)
{
    memset(f, 0, sizeof(*f));
    f->options = (co_core_options){.workers_min = workers_min,
                                   .members_max = 32,
                                   .lease_ms = 3000,
                                   .grace_ms = 300,
                                   .cut_ms = 10000,
                                   .moves_max = 4,
                                   .fingerprint = ""};
    f->cluster = 77;
    f->next_id = 1;
    f->next_number = 1;
    f->now_ms = 1000;
    co_core_past past = {.cluster = 77, .next_member_id = 1, .next_number = 1};
    f->core = co_core_create(&f->options, &past, f->now_ms);
}

static void fake_forget_writes(fake_cluster *f)
{
    for (uint32_t i = 0; i < f->n_stores; i++) {
        co_epoch_release(f->stores[i].epoch);
    }
    f->n_stores = 0;
}

void fake_fini(fake_cluster *f)
{
    fake_forget_writes(f);
    co_core_destroy(f->core);
    co_epoch_release(f->epoch);
}

void fake_restart(fake_cluster *f)
{
    fake_forget_writes(f);
    co_core_destroy(f->core);
    co_core_past past = {.cluster = f->cluster,
                         .next_member_id = f->next_id,
                         .next_number = f->next_number,
                         .drains = f->drains,
                         .epoch = f->epoch};
    f->core = co_core_create(&f->options, &past, f->now_ms);
    FOR_PEERS(f, p)
    {
        p->session = 0;
        p->n_mail = 0;
        p->open_prepare = 0; /* this one knows nothing of it: the member says so (holds_prepared) */
        p->finished |= p->leaving;
    }
}

fake_peer *fake_spawn(fake_cluster *f, Baleen__Control__V1__Role role)
{
    FOR_PEERS(f, p)
    {
        if (!p->used || ((!p->alive || p->finished) && p->session == 0)) {
            *p = (fake_peer){.used = true,
                             .alive = true,
                             .role = role,
                             .incarnation = ++f->next_incarnation,
                             .capacity = 100,
                             .fingerprint = "abc",
                             .net = "ucx",
                             .n_layer = FAKE_LAYERS,
                             .protocol = PR_CONTROL_VERSION};
            return p;
        }
    }
    return NULL;
}

void fake_hello(fake_cluster *f, fake_peer *p)
{
    Baleen__Control__V1__MemberMessage word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    Baleen__Control__V1__Hello hello = BALEEN__CONTROL__V1__HELLO__INIT;
    Baleen__Control__V1__Member self = BALEEN__CONTROL__V1__MEMBER__INIT;
    char address[] = "tcp:127.0.0.1:7000";
    self.id = p->id;
    self.role = p->role;
    self.incarnation = p->incarnation;
    self.data_address = address;
    self.net = (char *)(uintptr_t)p->net;
    self.has_expert_bytes_max = true;
    self.expert_bytes_max = p->capacity * FAKE_EXPERT_BYTES;
    hello.protocol = p->protocol;
    hello.self = &self;
    hello.fingerprint = (char *)(uintptr_t)p->fingerprint;
    hello.has_cluster = hello.has_epoch = hello.has_prepared = true;
    hello.cluster = p->cluster;
    hello.epoch = p->epoch;
    hello.prepared = p->holds_prepared;
    if (p->role != CO_ROLE_GATEWAY && p->n_layer != 0) {
        hello.n_layer = p->n_layer;
        hello.n_expert = FAKE_EXPERTS;
        hello.expert_bytes = FAKE_EXPERT_BYTES;
    }
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HELLO;
    word.hello = &hello;
    p->session = ++f->next_session;
    p->given = p->welcomed = false;
    p->n_mail = 0;
    fake_say(f, p, &word);
}

void fake_disconnect(fake_cluster *f, fake_peer *p)
{
    uint64_t session = p->session;
    p->session = 0;
    p->n_mail = 0;
    p->finished |= p->leaving;
    if (session != 0) {
        fake_step(f, &(co_in){.kind = CO_IN_CLOSED, .session = session});
    }
}

void fake_kill(fake_cluster *f, fake_peer *p)
{
    p->alive = false;
    fake_disconnect(f, p);
}

void fake_leave(fake_cluster *f, fake_peer *p)
{
    Baleen__Control__V1__MemberMessage word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    Baleen__Control__V1__Leaving leaving = BALEEN__CONTROL__V1__LEAVING__INIT;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_LEAVING;
    word.leaving = &leaving;
    p->leaving = true;
    fake_say(f, p, &word);
}

uint32_t fake_drain(fake_cluster *f, uint32_t id)
{
    fake_step(f, &(co_in){.kind = CO_IN_DRAIN, .ticket = ++f->n_tickets, .member_id = id});
    return f->n_tickets;
}

uint32_t fake_rebalance(fake_cluster *f, uint32_t n_moves)
{
    fake_step(f, &(co_in){.kind = CO_IN_REBALANCE, .ticket = ++f->n_tickets, .n_moves = n_moves});
    return f->n_tickets;
}

void fake_load(fake_cluster *f, fake_peer *router, const uint32_t load[FAKE_LAYERS * FAKE_EXPERTS])
{
    Baleen__Control__V1__MemberMessage word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    Baleen__Control__V1__ExpertLoad message = BALEEN__CONTROL__V1__EXPERT_LOAD__INIT;
    uint32_t count[FAKE_LAYERS * FAKE_EXPERTS];
    memcpy(count, load, sizeof(count));
    message.n_layer = FAKE_LAYERS;
    message.n_expert = FAKE_EXPERTS;
    message.count = count;
    message.n_count = FAKE_LAYERS * FAKE_EXPERTS;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_EXPERT_LOAD;
    word.expert_load = &message;
    fake_say(f, router, &word);
}

bool fake_move(fake_cluster *f)
{
    if (fake_write(f)) {
        return true;
    }
    FOR_PEERS(f, p)
    {
        if (p->used && fake_read(f, p)) {
            return true;
        }
    }
    return false;
}

void fake_report(fake_cluster *f, fake_peer *from, uint32_t about_id, cm_status status)
{
    Baleen__Control__V1__MemberMessage word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    Baleen__Control__V1__PeerReport report = BALEEN__CONTROL__V1__PEER_REPORT__INIT;
    report.member_id = about_id;
    report.status = status;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_PEER_REPORT;
    word.peer_report = &report;
    fake_say(f, from, &word);
}

static void fake_answer_prepare(fake_cluster *f, fake_peer *p, uint64_t number)
{
    Baleen__Control__V1__MemberMessage word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    Baleen__Control__V1__Prepared prepared = BALEEN__CONTROL__V1__PREPARED__INIT;
    char text[] = "disk on fire";
    prepared.epoch = number;
    prepared.status = p->fails_prepare ? CM_E_IO : CM_OK;
    prepared.text = p->fails_prepare ? text : NULL;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_PREPARED;
    word.prepared = &prepared;
    if (p->fails_prepare) {
        p->open_prepare = 0;
    } else {
        p->prepared = number;
    }
    fake_say(f, p, &word);
}

static void fake_answer_commit(fake_cluster *f, fake_peer *p, uint64_t number)
{
    Baleen__Control__V1__MemberMessage word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    Baleen__Control__V1__Committed committed = BALEEN__CONTROL__V1__COMMITTED__INIT;
    committed.epoch = number;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_COMMITTED;
    word.committed = &committed;
    assert_true(number >= p->epoch);
    p->epoch = number;
    fake_say(f, p, &word);
}

bool fake_read(fake_cluster *f, fake_peer *p)
{
    if (!p->alive || p->hung || p->n_mail == 0) {
        return false;
    }
    fake_mail mail = p->mail[0];
    memmove(p->mail, p->mail + 1, sizeof(p->mail[0]) * --p->n_mail);
    switch (mail.kind) {
    case CO_OUT_WELCOME:
        p->welcomed = true;
        p->id = (uint32_t)mail.number;
        if (p->cluster != f->cluster) {
            p->cluster = f->cluster;
            p->epoch = p->holds_prepared = 0;
        }
        break;
    case CO_OUT_PREPARE:
        p->holds_prepared = mail.number;
        fake_answer_prepare(f, p, mail.number);
        break;
    case CO_OUT_ABORT:
        p->holds_prepared = p->holds_prepared != mail.number ? p->holds_prepared : 0;
        break;
    case CO_OUT_COMMIT:
        p->holds_prepared = p->holds_prepared > mail.number ? p->holds_prepared : 0;
        fake_answer_commit(f, p, mail.number);
        break;
    case CO_OUT_DRAIN:
        fake_disconnect(f, p); /* a worker's session is ended by the machine */
        break;
    default:
        break;
    }
    return true;
}

bool fake_write(fake_cluster *f)
{
    if (f->n_stores == 0) {
        return false;
    }
    fake_store store = f->stores[0];
    memmove(f->stores, f->stores + 1, sizeof(f->stores[0]) * --f->n_stores);
    cm_status status = f->store_fails ? CM_E_IO : CM_OK;
    if (status == CM_OK) {
        assert_true(store.next_id >= f->next_id && store.number >= f->next_number);
        f->next_id = store.next_id;
        f->next_number = store.number;
        f->drains = store.drains;
        if (store.epoch != NULL) {
            co_epoch_release(f->epoch);
            f->epoch = co_epoch_hold(store.epoch);
        }
    }
    fake_step(f,
              &(co_in){.kind = CO_IN_STORED, .ticket = store.ticket, .status = status, .text = "disk full"});
    co_epoch_release(store.epoch);
    return true;
}

void fake_pass(fake_cluster *f, uint64_t ms)
{
    while (ms > 0) {
        uint64_t part = ms < 500 ? ms : 500;
        ms -= part;
        f->now_ms += part;
        fake_step(f, NULL);
        FOR_PEERS(f, p)
        {
            if (p->used && p->alive && !p->hung && p->session != 0 && p->welcomed) {
                Baleen__Control__V1__MemberMessage word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
                Baleen__Control__V1__Heartbeat heartbeat = BALEEN__CONTROL__V1__HEARTBEAT__INIT;
                word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_HEARTBEAT;
                word.heartbeat = &heartbeat;
                fake_say(f, p, &word);
            }
        }
    }
}

/* ---- until nothing moves ---- */

void fake_settle(fake_cluster *f)
{
    bool moved = true, tried[FAKE_PEERS] = {false}; /* who is refused for now comes again in the next call */
    for (uint32_t turns = 0; moved; turns++) {
        assert_true(turns < 10000);
        moved = fake_write(f);
        FOR_PEERS(f, p)
        {
            bool may = p->used && p->alive && !p->hung && !p->finished && !p->fails_prepare;
            if (may && p->session == 0 && !tried[p - f->peers]) {
                fake_hello(f, p);
                moved = tried[p - f->peers] = true;
            }
            moved |= p->used && fake_read(f, p);
        }
    }
}

bool fake_settle_until(fake_cluster *f, fake_peer *until, co_out_kind kind)
{
    for (uint32_t turns = 0; turns < 1000; turns++) {
        while (until->n_mail > 0) {
            if (until->mail[0].kind == kind) {
                return true;
            }
            fake_read(f, until);
        }
        bool moved = false;
        FOR_PEERS(f, p)
        {
            moved = moved || (p->used && p != until && fake_read(f, p));
        }
        if (!moved && !fake_write(f)) {
            return false;
        }
    }
    return false;
}

void fake_check_whole(fake_cluster *f)
{
    const co_epoch *epoch = co_core_epoch(f->core);
    char change[256];
    assert_non_null(epoch);
    if (co_core_change(f->core, change)) {
        fail_msg("not at rest: %s", change);
    }
    size_t n = 0;
    FOR_PEERS(f, p)
    {
        if (p->used && p->alive && !p->finished) {
            n++;
            assert_true(p->session != 0);
            assert_non_null(co_epoch_find(epoch, p->id));
            assert_int_equal(p->epoch, epoch->number);
            assert_int_equal(p->open_prepare, 0);
            assert_int_equal(p->holds_prepared, 0);
            assert_int_equal(fake_state(f, p), CO_MEMBER_READY);
        }
    }
    assert_int_equal(n, epoch->message->n_members);
    assert_int_equal(n, co_core_n_members(f->core));
}

co_member_state fake_state(const fake_cluster *f, const fake_peer *p)
{
    for (uint32_t i = 0; i < co_core_n_members(f->core); i++) {
        co_member_view view;
        co_core_member(f->core, i, &view);
        if (view.self->id == p->id) {
            return view.state;
        }
    }
    fail_msg("member %u is not known", p->id);
    return CO_MEMBER_JOINING;
}

/* ---- what several tests begin with ---- */

const uint32_t fake_skewed[FAKE_LAYERS * FAKE_EXPERTS] = {900, 10, 10, 10, 10, 10, 10,  10, 10, 900, 10, 10,
                                                          10,  10, 10, 10, 10, 10, 900, 10, 10, 10,  10, 10};

void fake_start(fake_cluster *f, uint32_t n_workers)
{
    fake_init(f, n_workers);
    for (uint32_t i = 0; i < n_workers; i++) {
        fake_spawn(f, CO_ROLE_WORKER);
    }
    fake_spawn(f, CO_ROLE_ROUTER);
    fake_spawn(f, CO_ROLE_GATEWAY);
    fake_settle(f);
    fake_check_whole(f);
    f->n_changes = 0;
}

fake_peer *fake_nth(fake_cluster *f, Baleen__Control__V1__Role role, uint32_t nth)
{
    for (uint32_t i = 0; i < FAKE_PEERS; i++) {
        if (f->peers[i].used && f->peers[i].role == role && nth-- == 0) {
            return &f->peers[i];
        }
    }
    return NULL;
}

fake_snapshot fake_snapshot_take(fake_cluster *f)
{
    const co_epoch *epoch = co_core_epoch(f->core);
    fake_snapshot s = {.number = epoch->number};
    cm_bytes_init(&s.packed, 0);
    cm_bytes_append(&s.packed, epoch->packed.data, epoch->packed.len);
    for (uint32_t i = 0; i < 4; i++) {
        s.epoch_of[i] = f->peers[i].epoch;
        s.state_of[i] = fake_state(f, &f->peers[i]);
    }
    return s;
}

void fake_snapshot_compare(fake_snapshot *a, fake_snapshot *b)
{
    assert_int_equal(a->number, b->number);
    assert_int_equal(a->packed.len, b->packed.len);
    assert_memory_equal(a->packed.data, b->packed.data, a->packed.len);
    assert_memory_equal(a->epoch_of, b->epoch_of, sizeof(a->epoch_of));
    assert_memory_equal(a->state_of, b->state_of, sizeof(a->state_of));
    cm_bytes_fini(&a->packed);
    cm_bytes_fini(&b->packed);
}
