/* Streams without a surface: what gRPC and HTTP both stand on. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/rng.h"
#include "common/base/stats.h"
#include "tests/unit/gateway_rig.h"

enum { BURST = 100 };

/* The one tenant there is where no keys are. */
static gw_tenant *nobody(void)
{
    gw_tenant *tenant;
    gw_error error;
    assert_int_equal(gw_gateway_identify(R.gateway, NULL, NULL, &tenant, &error), CM_OK);
    return tenant;
}

/* What one stream told. */
typedef struct told {
    gw_stream *stream;
    uint32_t n_started, n_finished, n_failed, n_flush, n_ids, n_pieces;
    uint32_t id[RIG_REPLY_MAX];
    cm_bytes text;
    gw_error error;
    gw_finish finish;
    bool cancel_in_piece;
} told;

static void on_started(void *ctx, const gw_start *start)
{
    told *t = ctx;
    assert_int_equal(t->n_ids + t->n_pieces + t->n_failed, 0);
    assert_string_equal(start->request_id, gw_stream_id(t->stream));
    t->n_started++;
}

static void on_piece(void *ctx, const md_piece *piece)
{
    told *t = ctx;
    assert_int_equal(t->n_started, 1);
    t->n_pieces++;
    cm_bytes_append(&t->text, piece->text, piece->n_bytes);
    if (t->cancel_in_piece) {
        gw_stream_cancel(t->stream);
        t->stream = NULL;
    }
}

static void on_tokens(void *ctx, uint64_t offset, const uint32_t *ids, uint32_t n)
{
    told *t = ctx;
    assert_int_equal(offset, t->n_ids);
    for (uint32_t i = 0; i < n; i++) {
        t->id[t->n_ids++] = ids[i];
    }
}

static void on_flush(void *ctx)
{
    ((told *)ctx)->n_flush++;
}

static void on_finished(void *ctx, const gw_finish *finish)
{
    told *t = ctx;
    t->finish = *finish;
    t->n_finished++;
    t->stream = NULL;
}

static void on_failed(void *ctx, const gw_error *error)
{
    told *t = ctx;
    t->error = *error;
    t->n_failed++;
    t->stream = NULL;
}

static const gw_stream_events EVENTS = {.started = on_started,
                                        .piece = on_piece,
                                        .tokens = on_tokens,
                                        .flush = on_flush,
                                        .finished = on_finished,
                                        .failed = on_failed};

static cm_status ask(told *t, const char *id, uint64_t deadline_ms, const char *body_text, gw_error *error)
{
    json_t *body = json_loads(body_text, 0, NULL);
    assert_non_null(body);
    gw_ask a = {.kind = GW_ASK_COMPLETE,
                .body = body,
                .origin = id != NULL ? gw_origin_create(GW_ASK_COMPLETE, id, NULL, body, NULL) : NULL,
                .deadline_ms = deadline_ms,
                .want_ids = true,
                .skip_special = true};
    memset(t, 0, sizeof(*t));
    cm_status status = gw_stream_open(R.gateway, &a, &EVENTS, t, &t->stream, error);
    gw_origin_release(a.origin);
    json_decref(body);
    assert_int_equal(t->n_started + t->n_failed, 0); /* never from inside the call */
    return status;
}

static bool is_over(void *arg)
{
    return ((told *)arg)->stream == NULL;
}

static bool has_opened(void *arg)
{
    (void)arg;
    return R.n_opens > 0;
}

static bool has_cancelled(void *arg)
{
    (void)arg;
    return R.n_cancels > 0;
}

static int setup(void **state)
{
    (void)state;
    rig_begin();
    rig_gateway();
    rig_serve();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    assert_int_equal(cm_stat_get(CM_STAT_ledger_streams), 0);
    rig_end();
    return 0;
}

static void ids_and_text(void **state)
{
    (void)state;
    told t;
    gw_error error;
    rig_reply("one two");
    assert_int_equal(ask(&t, "id-1", UINT64_MAX, "{\"prompt\":\"a\"}", &error), CM_OK);
    rig_until(is_over, &t);
    assert_int_equal(t.n_started, 1);
    assert_int_equal(t.n_finished, 1);
    assert_int_equal(t.n_ids, R.n_reply);
    assert_memory_equal(t.id, R.reply, R.n_reply * sizeof(uint32_t));
    assert_string_equal(cm_bytes_text(&t.text), "one two");
    assert_int_equal(t.n_flush, R.n_reply); /* one a frame */
    assert_int_equal(t.finish.reason, GW_REASON_STOP);
    assert_int_equal(t.finish.stop_id, -1); /* the end of sequence is nobody's stop id */
    assert_int_equal(t.finish.usage.completion_tokens, R.n_reply);
    cm_bytes_fini(&t.text);
}

/* More at once than the link takes: each gets its own answer. */
static void burst(void **state)
{
    (void)state;
    static told t[BURST];
    gw_error error;
    R.mode = RIG_ECHO;
    for (uint32_t i = 0; i < BURST; i++) {
        char body[64];
        snprintf(body, sizeof(body), "{\"prompt\":[7,%u],\"max_tokens\":%u}", 100 + i, 1 + i % 5);
        assert_int_equal(ask(&t[i], NULL, UINT64_MAX, body, &error), CM_OK);
    }
    for (uint32_t i = 0; i < BURST; i++) {
        rig_until(is_over, &t[i]);
        assert_int_equal(t[i].n_finished, 1);
        assert_int_equal(t[i].n_ids, 1 + i % 5);
        assert_int_equal(t[i].id[0], 100 + i);
        cm_bytes_fini(&t[i].text);
    }
    assert_int_equal(R.n_opens, BURST);
}

static void deadline(void **state)
{
    (void)state;
    told t;
    gw_error error;
    R.mode = RIG_MUTE;
    int64_t aborted = cm_stat_get(CM_STAT_requests_aborted);
    assert_int_equal(ask(&t, NULL, 300, "{\"prompt\":\"a\"}", &error), CM_OK);
    rig_until(is_over, &t);
    assert_int_equal(t.n_failed, 1);
    assert_int_equal(t.n_started, 0);
    assert_int_equal(t.error.cause, GW_CAUSE_DEADLINE);
    assert_int_equal(cm_stat_get(CM_STAT_requests_aborted), aborted + 1);
    rig_until(has_cancelled, NULL);
    assert_int_equal(ask(&t, NULL, 0, "{\"prompt\":\"a\"}", &error), CM_OK); /* passed when it came */
    rig_until(is_over, &t);
    assert_int_equal(t.error.cause, GW_CAUSE_DEADLINE);
}

static void same_id_and_abort(void **state)
{
    (void)state;
    told t, again;
    gw_error error;
    R.mode = RIG_HOLD;
    assert_int_equal(ask(&t, "mine", UINT64_MAX, "{\"prompt\":\"a\"}", &error), CM_OK);
    assert_int_equal(ask(&again, "mine", UINT64_MAX, "{\"prompt\":\"a\"}", &error), CM_E_EXISTS);
    assert_int_equal(error.cause, GW_CAUSE_EXISTS);
    rig_until(has_opened, NULL);
    assert_false(gw_stream_abort(R.gateway, nobody(), "other"));
    assert_true(gw_stream_abort(R.gateway, nobody(), "mine"));
    assert_int_equal(t.error.cause, GW_CAUSE_ABORTED);
    assert_false(gw_stream_abort(R.gateway, nobody(), "mine"));
    rig_until(has_cancelled, NULL);
    assert_int_equal(ask(&t, "mine", UINT64_MAX, "{\"prompt\":\"a\"}", &error), CM_OK); /* free again */
    assert_int_equal(gw_stream_abort_all(R.gateway, nobody()), 1);
    assert_int_equal(t.n_failed, 1);
}

/* A surface may cancel from inside an event; nothing is told after it. */
static void cancel_inside(void **state)
{
    (void)state;
    told t;
    gw_error error;
    rig_reply("one two three");
    assert_int_equal(ask(&t, NULL, UINT64_MAX, "{\"prompt\":\"a\"}", &error), CM_OK);
    t.cancel_in_piece = true;
    rig_until(is_over, &t);
    rig_until(has_cancelled, NULL);
    assert_int_equal(t.n_pieces, 1);
    assert_int_equal(t.n_finished + t.n_failed, 0);
    cm_bytes_fini(&t.text);
}

/* A log that an earlier gateway finished where the stop string matched, and one that matches none. */
static void finished_before(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 2; i++) {
        told t;
        gw_error error;
        R.mode = RIG_HOLD;
        R.n_opens = 0;
        rig_reply("one two three");
        assert_int_equal(
            ask(&t, NULL, UINT64_MAX,
                i == 0 ? "{\"prompt\":\"a\",\"stop\":\" two\"}" : "{\"prompt\":\"a\",\"stop\":\"four\"}",
                &error),
            CM_OK);
        rig_until(has_opened, NULL);
        rig_tokens(0, R.reply, R.n_reply, BALEEN__ENGINE__V1__SEQ_END__SEQ_FINISHED);
        rig_until(is_over, &t);
        if (i == 0) {
            assert_int_equal(t.n_finished, 1);
            assert_int_equal(t.finish.reason, GW_REASON_STOP);
            assert_string_equal(cm_bytes_text(&t.text), "one");
        } else {
            assert_int_equal(t.n_failed, 1);
            assert_int_equal(t.error.cause, GW_CAUSE_INTERNAL);
        }
        cm_bytes_fini(&t.text);
    }
}

static void special_tokens(void **state)
{
    (void)state;
    told t;
    gw_error error;
    rig_reply("ab");
    R.reply[R.n_reply++] = md_tokenizer_control(rig_tokenizer(), MD_CTL_BOS);
    assert_int_equal(ask(&t, NULL, UINT64_MAX, "{\"prompt\":\"a\"}", &error), CM_OK);
    rig_until(is_over, &t);
    assert_string_equal(cm_bytes_text(&t.text), "ab");
    assert_int_equal(t.n_ids, R.n_reply); /* the id is told all the same */
    cm_bytes_fini(&t.text);
    assert_int_equal(ask(&t, NULL, UINT64_MAX, "{\"prompt\":\"a\",\"skip_special_tokens\":false}", &error),
                     CM_OK);
    rig_until(is_over, &t);
    assert_non_null(strstr(cm_bytes_text(&t.text), md_control_text(MD_CTL_BOS)));
    cm_bytes_fini(&t.text);
}

static bool in_epoch_2(void *arg)
{
    (void)arg;
    return R.epoch_committed == 2;
}

static bool in_epoch_3(void *arg)
{
    (void)arg;
    return R.epoch_committed == 3;
}

static bool has_resumed(void *arg)
{
    (void)arg;
    return R.n_resumes == 1;
}

static bool link_is_down(void *arg)
{
    (void)arg;
    return R.peer == NULL;
}

/* A router that leaves the epoch gets no more streams, and finishes those it has before its link is ended. */
static void router_leaves(void **state)
{
    (void)state;
    told t, more;
    gw_error error;
    R.mode = RIG_HOLD;
    rig_reply("one two");
    assert_int_equal(ask(&t, NULL, UINT64_MAX, "{\"prompt\":\"a\"}", &error), CM_OK);
    rig_until(has_opened, NULL);
    rig_commit(2, false, true);
    rig_until(in_epoch_2, NULL);
    gw_info info;
    gw_gateway_info(R.gateway, &info);
    assert_false(info.ready);
    assert_int_equal(info.epoch, 2);
    assert_int_equal(ask(&more, NULL, UINT64_MAX, "{\"prompt\":\"a\"}", &error), CM_E_UNAVAILABLE);
    rig_tokens(0, R.reply, R.n_reply, BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP);
    rig_until(is_over, &t);
    assert_int_equal(t.n_finished, 1);
    assert_string_equal(cm_bytes_text(&t.text), "one two");
    cm_bytes_fini(&t.text);
    rig_until(link_is_down, NULL);
    assert_int_equal(R.n_reports, 0); /* nobody was lost */
}

/* One that drains gets no more streams, and one whose link breaks meanwhile goes on there: it has it. */
static void router_drains(void **state)
{
    (void)state;
    told t, more;
    gw_error error;
    R.mode = RIG_HOLD;
    R.keeps = true;
    rig_reply("one two");
    assert_int_equal(ask(&t, NULL, UINT64_MAX, "{\"prompt\":\"a\"}", &error), CM_OK);
    rig_until(has_opened, NULL);
    R.drains = true;
    rig_commit(2, true, true);
    rig_until(in_epoch_2, NULL);
    assert_int_equal(ask(&more, NULL, UINT64_MAX, "{\"prompt\":\"a\"}", &error), CM_E_UNAVAILABLE);
    rig_cut();
    rig_until(has_resumed, NULL);
    rig_tokens(0, R.reply, R.n_reply, BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP);
    rig_until(is_over, &t);
    assert_int_equal(t.n_finished, 1);
    assert_int_equal(R.n_opens, 1);
    cm_bytes_fini(&t.text);
    R.drains = false; /* it was given up */
    rig_commit(3, true, true);
    rig_until(in_epoch_3, NULL);
    R.mode = RIG_ANSWER;
    assert_int_equal(ask(&more, NULL, UINT64_MAX, "{\"prompt\":\"a\"}", &error), CM_OK);
    rig_until(is_over, &more);
    assert_int_equal(more.n_finished, 1);
    cm_bytes_fini(&more.text);
}

/* ---- streams that end anywhere: nothing of them is left ---- */

enum { TURNS = 4000, LIVE_MAX = 32 };

static uint32_t below(uint32_t n)
{
    static uint64_t counter;
    return cm_rng_at(11, counter++, 0).word[0] % n;
}

static void turn(void)
{
    int status;
    json_decref(rig_ask("GET", "/health", NULL, &status)); /* the loop has seen what was on its way */
}

static void open_or_not(told *t)
{
    gw_error error;
    static const rig_mode modes[] = {RIG_HOLD, RIG_HOLD, RIG_MUTE, RIG_ANSWER, RIG_REFUSE};
    R.mode = modes[below(5)];
    R.refuse_status = below(2) == 0 ? CM_E_CAPACITY : CM_E_NO_OWNER;
    R.keeps = below(2) == 0;
    (void)ask(t, NULL, below(4) == 0 ? 1 + below(30) : UINT64_MAX, "{\"prompt\":\"a\"}", &error);
}

static void end_or_not(told *t)
{
    if (below(3) == 0) {
        gw_stream_detach(t->stream);
    } else {
        gw_stream_cancel(t->stream);
    }
    t->stream = NULL;
}

static bool none_waits(void *arg)
{
    (void)arg;
    return cm_stat_get(CM_STAT_ledger_streams) == 0;
}

static void random_ends(void **state)
{
    (void)state;
    static told live[LIVE_MAX];
    memset(live, 0, sizeof(live));
    rig_reply("one two");
    uint32_t n_lost = 0, n_ended = 0;
    for (uint32_t i = 0; i < TURNS; i++) {
        told *t = &live[below(LIVE_MAX)];
        if (t->stream == NULL) {
            cm_bytes_fini(&t->text);
            open_or_not(t);
        } else if (below(2) == 0) {
            end_or_not(t);
            n_ended++;
        }
        if (below(3) == 0) {
            turn();
        }
        if (below(60) == 0 && R.peer != NULL) {
            rig_cut();
            n_lost++;
        }
    }
    assert_true(n_lost > 20 && n_ended > 500);
    for (uint32_t i = 0; i < LIVE_MAX; i++) {
        if (live[i].stream != NULL) {
            end_or_not(&live[i]);
        }
        cm_bytes_fini(&live[i].text);
    }
    rig_until(none_waits, NULL);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(ids_and_text),  TEST(burst),           TEST(deadline),       TEST(same_id_and_abort),
        TEST(cancel_inside), TEST(finished_before), TEST(special_tokens), TEST(router_leaves),
        TEST(router_drains), TEST(random_ends),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
