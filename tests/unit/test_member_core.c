/* A member's session by itself: when it connects, which epochs it hands on, what it says again. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/proc/member_core.h"
#include "proto/messages.h"
#include "proto/pack.h"

typedef Baleen__Control__V1__CoordinatorMessage coordinator_word;

enum { CLUSTER = 77, BEAT_MS = 500 };

static pc_mcore *make_role(uint32_t role, uint64_t now)
{
    static const pc_addresses coordinators = {.n = 1, .text = {"h:1"}};
    pc_mself self = {.coordinators = &coordinators,
                     .role = role,
                     .incarnation = 5,
                     .host = "h",
                     .data_address = "d",
                     .fingerprint = "f",
                     .n_layer = 1,
                     .n_expert = 1,
                     .expert_bytes = 1};
    return pc_mcore_create(&self, now);
}

static pc_mcore *make(uint64_t now)
{
    return make_role(BALEEN__CONTROL__V1__ROLE__ROLE_WORKER, now);
}

/* Takes what comes out; all kinds seen, as bits; the last epoch value named. */
static uint32_t take(pc_mcore *core, uint64_t *epoch_out)
{
    pc_mout out;
    uint32_t kinds = 0;
    while (pc_mcore_next(core, &out)) {
        kinds |= 1u << out.kind;
        if (epoch_out != NULL && (out.value != NULL || out.epoch != 0)) {
            *epoch_out = out.value != NULL ? out.value->number : out.epoch;
        }
        pc_epoch_release(out.value);
    }
    return kinds;
}

static bool has(uint32_t kinds, pc_mout_kind kind)
{
    return (kinds >> kind & 1) != 0;
}

static void welcome(pc_mcore *core, uint64_t now, uint32_t id, uint64_t cluster)
{
    Baleen__Control__V1__Welcome message = BALEEN__CONTROL__V1__WELCOME__INIT;
    coordinator_word word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    message.member_id = id;
    message.cluster = cluster;
    message.heartbeat_ms = BEAT_MS;
    message.lease_ms = 3 * BEAT_MS;
    word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_WELCOME;
    word.welcome = &message;
    pc_mcore_hear(core, now, &word);
}

static void hear_epoch(pc_mcore *core, bool commit, uint64_t number, uint64_t cluster)
{
    Baleen__Control__V1__Epoch epoch = BALEEN__CONTROL__V1__EPOCH__INIT;
    Baleen__Control__V1__Prepare prepare = BALEEN__CONTROL__V1__PREPARE__INIT;
    Baleen__Control__V1__Commit committed = BALEEN__CONTROL__V1__COMMIT__INIT;
    coordinator_word word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    epoch.number = number;
    epoch.cluster = cluster;
    prepare.epoch = committed.epoch = &epoch;
    if (commit) {
        word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_COMMIT;
        word.commit = &committed;
    } else {
        word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_PREPARE;
        word.prepare = &prepare;
    }
    pc_mcore_hear(core, 0, &word);
}

static void test_tries_again_ever_later(void **state)
{
    pc_mcore *core = make(1000);
    uint64_t now = 1000, wait = 0;
    (void)state;
    assert_true(has(take(core, NULL), PC_MOUT_OPEN));
    for (uint32_t i = 0; i < 8; i++) {
        pc_mcore_closed(core, now, false, "gone");
        uint64_t at = pc_mcore_wake_ms(core);
        assert_true(at - now >= wait && at - now <= 2000);
        wait = at - now;
        pc_mcore_tick(core, at - 1);
        assert_false(has(take(core, NULL), PC_MOUT_OPEN));
        pc_mcore_tick(core, at);
        assert_true(has(take(core, NULL), PC_MOUT_OPEN));
        now = at;
    }
    assert_int_equal(wait, 2000);
    welcome(core, now, 3, CLUSTER); /* it was there: the next loss is tried soon again */
    take(core, NULL);
    pc_mcore_closed(core, now, false, "gone");
    assert_int_equal(pc_mcore_wake_ms(core), now + 100);
    pc_mcore_destroy(core);
}

static void test_beats(void **state)
{
    pc_mcore *core = make(0);
    (void)state;
    take(core, NULL);
    assert_int_equal(pc_mcore_wake_ms(core), UINT64_MAX); /* a session is being made */
    welcome(core, 10, 3, CLUSTER);
    uint32_t kinds = take(core, NULL);
    assert_true(has(kinds, PC_MOUT_HEARTBEAT) && has(kinds, PC_MOUT_WELCOME));
    assert_int_equal(pc_mcore_wake_ms(core), 10 + BEAT_MS);
    pc_mcore_tick(core, 10 + BEAT_MS);
    assert_true(has(take(core, NULL), PC_MOUT_HEARTBEAT));
    pc_mcore_destroy(core);
}

static void test_epochs_only_go_up(void **state)
{
    pc_mcore *core = make(0);
    uint64_t epoch = 0;
    (void)state;
    take(core, NULL);
    hear_epoch(core, true, 4, CLUSTER); /* before the welcome: not heard */
    assert_false(has(take(core, NULL), PC_MOUT_COMMIT));
    welcome(core, 0, 3, CLUSTER);
    take(core, NULL);
    hear_epoch(core, false, 4, CLUSTER + 1); /* another cluster's: refused by name */
    assert_true(has(take(core, &epoch), PC_MOUT_PREPARED));
    hear_epoch(core, true, 4, CLUSTER);
    assert_true(has(take(core, &epoch), PC_MOUT_COMMIT));
    assert_int_equal(epoch, 4);
    hear_epoch(core, true, 4, CLUSTER); /* not in force yet: nothing to say, nothing to do */
    assert_int_equal(take(core, NULL), 0);
    pc_mcore_committed(core, 4);
    assert_true(has(take(core, &epoch), PC_MOUT_COMMITTED));
    hear_epoch(core, true, 4, CLUSTER); /* asked again, as after a lost session */
    uint32_t kinds = take(core, &epoch);
    assert_true(has(kinds, PC_MOUT_COMMITTED) && !has(kinds, PC_MOUT_COMMIT));
    hear_epoch(core, true, 3, CLUSTER);
    assert_false(has(take(core, NULL), PC_MOUT_COMMIT));
    hear_epoch(core, false, 3, CLUSTER);
    assert_false(has(take(core, NULL), PC_MOUT_PREPARE));
    pc_mcore_closed(core, 0, false, "gone");
    pc_mcore_tick(core, 1000);
    take(core, NULL);
    welcome(core, 1000, 9, CLUSTER + 1); /* another cluster counts from the start */
    take(core, NULL);
    assert_int_equal(pc_mcore_epoch(core), 0);
    hear_epoch(core, true, 1, CLUSTER + 1);
    assert_true(has(take(core, NULL), PC_MOUT_COMMIT));
    pc_mcore_destroy(core);
}

static void test_an_end_is_an_end(void **state)
{
    pc_mcore *core = make(0);
    (void)state;
    take(core, NULL);
    welcome(core, 0, 3, CLUSTER);
    take(core, NULL);
    pc_mcore_leave(core);
    assert_true(has(take(core, NULL), PC_MOUT_LEAVING));
    assert_false(pc_mcore_deaf(core));       /* until the session is over it hears */
    pc_mcore_closed(core, 5, false, "gone"); /* that was no answer: the next one hears it too */
    assert_false(pc_mcore_deaf(core));
    pc_mcore_tick(core, 1000);
    assert_true(has(take(core, NULL), PC_MOUT_OPEN));
    welcome(core, 1000, 3, CLUSTER);
    assert_true(has(take(core, NULL), PC_MOUT_LEAVING));
    pc_mcore_closed(core, 1005, true, "go");
    assert_true(pc_mcore_deaf(core));
    pc_mcore_tick(core, 1000000);
    pc_mcore_prepared(core, 4, CM_OK, NULL);
    pc_mcore_report(core, 8, CM_E_RESET);
    assert_int_equal(take(core, NULL), 0);
    assert_int_equal(pc_mcore_wake_ms(core), UINT64_MAX);
    pc_mcore_destroy(core);
}

/* What was lost while nobody could be told is told to the next coordinator, unless it is over by then. */
static void test_losses_are_kept(void **state)
{
    pc_mcore *core = make(0);
    pc_mout out;
    uint32_t n = 0;
    (void)state;
    take(core, NULL);
    welcome(core, 0, 3, CLUSTER);
    pc_mcore_closed(core, 5, false, "gone");
    take(core, NULL);
    pc_mcore_report(core, 7, CM_E_RESET);
    pc_mcore_report(core, 8, CM_E_RESET);
    pc_mcore_report(core, 8, CM_E_SILENT);
    pc_mcore_report(core, 7, CM_OK);
    pc_mcore_report(core, 9, CM_OK);
    pc_mcore_tick(core, 1000);
    welcome(core, 1000, 3, CLUSTER);
    while (pc_mcore_next(core, &out)) {
        if (out.kind == PC_MOUT_REPORT) {
            assert_int_equal(out.member_id, 8);
            assert_int_equal(out.status, CM_E_RESET);
            n++;
        }
    }
    assert_int_equal(n, 1);
    pc_mcore_destroy(core);
}

static void test_hello_says_what_it_was(void **state)
{
    pc_mcore *core = make(0);
    cm_arena arena;
    cm_bytes packed;
    ProtobufCMessage *message;
    (void)state;
    cm_arena_init(&arena, "t", 4096, 65536);
    cm_bytes_init(&packed, 0);
    take(core, NULL);
    welcome(core, 0, 3, CLUSTER);
    hear_epoch(core, true, 6, CLUSTER);
    pc_mcore_committed(core, 6);
    take(core, NULL);
    pc_mcore_word(core, &(pc_mout){.kind = PC_MOUT_HELLO}, NULL, 0, &packed);
    assert_int_equal(pr_unpack(&baleen__control__v1__member_message__descriptor, packed.data, packed.len,
                               &arena, &message),
                     CM_OK);
    const Baleen__Control__V1__Hello *hello = ((Baleen__Control__V1__MemberMessage *)message)->hello;
    assert_int_equal(hello->self->id, 3);
    assert_int_equal(hello->self->incarnation, 5);
    assert_int_equal(hello->cluster, CLUSTER);
    assert_int_equal(hello->epoch, 6);
    assert_int_equal(hello->prepared, 0);
    assert_int_equal(hello->protocol, PR_CONTROL_VERSION);
    cm_bytes_fini(&packed);
    cm_arena_fini(&arena);
    pc_mcore_destroy(core);
}

static uint64_t hello_prepared(pc_mcore *core)
{
    cm_arena arena;
    cm_bytes packed;
    ProtobufCMessage *message;
    cm_arena_init(&arena, "t", 4096, 65536);
    cm_bytes_init(&packed, 0);
    pc_mcore_word(core, &(pc_mout){.kind = PC_MOUT_HELLO}, NULL, 0, &packed);
    assert_int_equal(pr_unpack(&baleen__control__v1__member_message__descriptor, packed.data, packed.len,
                               &arena, &message),
                     CM_OK);
    uint64_t prepared = ((Baleen__Control__V1__MemberMessage *)message)->hello->prepared;
    cm_bytes_fini(&packed);
    cm_arena_fini(&arena);
    return prepared;
}

static void hear_abort(pc_mcore *core, uint64_t number)
{
    Baleen__Control__V1__Abort abort = BALEEN__CONTROL__V1__ABORT__INIT;
    coordinator_word word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    abort.epoch = number;
    word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_ABORT;
    word.abort = &abort;
    pc_mcore_hear(core, 0, &word);
}

/* What was prepared for a coordinator that is gone is held until somebody says what becomes of it. */
static void test_hello_says_what_is_prepared(void **state)
{
    pc_mcore *core = make(0);
    (void)state;
    take(core, NULL);
    welcome(core, 0, 3, CLUSTER);
    hear_epoch(core, false, 6, CLUSTER);
    take(core, NULL);
    assert_int_equal(hello_prepared(core), 6);
    hear_epoch(core, true, 6, CLUSTER);
    take(core, NULL);
    assert_int_equal(hello_prepared(core), 0);
    hear_epoch(core, false, 7, CLUSTER);
    hear_abort(core, 7);
    take(core, NULL);
    assert_int_equal(hello_prepared(core), 0);
    hear_epoch(core, false, 8, CLUSTER);
    take(core, NULL);
    pc_mcore_closed(core, 5, false, "gone");
    take(core, NULL);
    assert_int_equal(hello_prepared(core), 8);
    welcome(core, 10, 1, CLUSTER + 1); /* nobody of that one will commit it */
    assert_true(has(take(core, NULL), PC_MOUT_ABORT));
    assert_int_equal(hello_prepared(core), 0);
    pc_mcore_destroy(core);
}

static void hear_commit_with_key(pc_mcore *core, uint64_t number, uint8_t first, size_t n_bytes)
{
    uint8_t bytes[NET_KEY_BYTES + 1] = {first};
    Baleen__Control__V1__FrameKey key = BALEEN__CONTROL__V1__FRAME_KEY__INIT;
    Baleen__Control__V1__Epoch epoch = BALEEN__CONTROL__V1__EPOCH__INIT;
    Baleen__Control__V1__Commit commit = BALEEN__CONTROL__V1__COMMIT__INIT;
    coordinator_word word = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__INIT;
    epoch.number = key.epoch = number;
    epoch.cluster = CLUSTER;
    key.key = (ProtobufCBinaryData){n_bytes, bytes};
    commit.epoch = &epoch;
    commit.frame_key = &key;
    word.word_case = BALEEN__CONTROL__V1__COORDINATOR_MESSAGE__WORD_COMMIT;
    word.commit = &commit;
    pc_mcore_hear(core, 0, &word);
}

static void expect_out(pc_mcore *core, pc_mout_kind kind, uint64_t epoch, pc_mout *out)
{
    assert_true(pc_mcore_next(core, out));
    assert_int_equal(out->kind, kind);
    assert_int_equal(out->value != NULL ? out->value->number : out->epoch, epoch);
    pc_epoch_release(out->value);
}

/* The key is there before links of the epoch need it; who is not told when others are through retires by
 * itself what was before. */
static void test_keys_come_before_their_epoch(void **state)
{
    pc_mout out;
    pc_mcore *core = make_role(BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER, 0);
    (void)state;
    take(core, NULL);
    welcome(core, 0, 3, CLUSTER);
    take(core, NULL);
    hear_commit_with_key(core, 4, 44, NET_KEY_BYTES);
    expect_out(core, PC_MOUT_KEY, 4, &out);
    assert_int_equal(out.key[0], 44);
    expect_out(core, PC_MOUT_COMMIT, 4, &out);
    assert_int_equal(take(core, NULL), 0);
    pc_mcore_committed(core, 4);
    take(core, NULL);
    hear_commit_with_key(core, 5, 55, NET_KEY_BYTES);
    expect_out(core, PC_MOUT_KEY, 5, &out);
    expect_out(core, PC_MOUT_COMMIT, 5, &out);
    expect_out(core, PC_MOUT_RETIRE, 4, &out);
    pc_mcore_committed(core, 5);
    take(core, NULL);
    hear_commit_with_key(core, 6, 66, NET_KEY_BYTES + 1);
    assert_false(has(take(core, NULL), PC_MOUT_KEY));
    pc_mcore_destroy(core);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tries_again_ever_later),
        cmocka_unit_test(test_beats),
        cmocka_unit_test(test_epochs_only_go_up),
        cmocka_unit_test(test_an_end_is_an_end),
        cmocka_unit_test(test_losses_are_kept),
        cmocka_unit_test(test_hello_says_what_it_was),
        cmocka_unit_test(test_hello_says_what_is_prepared),
        cmocka_unit_test(test_keys_come_before_their_epoch),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
