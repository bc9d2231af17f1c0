/* The token log: what a router may say about a stream, and what is refused. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

#include "gateway/stream_core.h"

enum { VOCAB = 100, TOKENS_MAX = 5 };

static void begin(gw_core *core)
{
    md_ids prompt;
    md_ids_init(&prompt);
    md_ids_push(&prompt, 7);
    md_ids_push(&prompt, 8);
    gw_core_init(core, &prompt, TOKENS_MAX, VOCAB, false);
    assert_int_equal(prompt.n, 0); /* taken over */
    assert_int_equal(core->prompt.n, 2);
}

static cm_status take(gw_core *core, uint64_t offset, uint32_t n, uint32_t first,
                      Baleen__Engine__V1__SeqEnd end, gw_core_news *news)
{
    uint32_t ids[16];
    for (uint32_t i = 0; i < n; i++) {
        ids[i] = first + i;
    }
    Baleen__Engine__V1__SeqTokens frame = BALEEN__ENGINE__V1__SEQ_TOKENS__INIT;
    frame.id = ids;
    frame.n_id = n;
    frame.end = end;
    frame.has_offset = true;
    frame.offset = offset;
    cm_error err = {0};
    cm_status status = gw_core_take(core, &frame, news, &err);
    assert_true(status == CM_OK || err.text[0] != 0);
    return status;
}

#define GOING_ON BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON
#define STOP     BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP
#define LENGTH   BALEEN__ENGINE__V1__SEQ_END__SEQ_LENGTH
#define FAILED   BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED

/* Log-probabilities: with every id when asked for, never else, and none of an id that there is not. */
static void log_probabilities(void **state)
{
    (void)state;
    static const struct {
        bool asked;
        uint32_t n_logprobs, n_top_id, n_top, last_id;
        cm_status status;
    } rows[] = {
        {true, 2, 2, 2, 99, CM_OK},          {true, 2, 0, 0, 0, CM_OK},
        {true, 1, 2, 2, 9, CM_E_PROTOCOL},   {true, 0, 2, 2, 9, CM_E_PROTOCOL},
        {true, 2, 2, 1, 9, CM_E_PROTOCOL},   {true, 2, 21, 21, 9, CM_E_PROTOCOL},
        {true, 2, 2, 2, 100, CM_E_PROTOCOL}, {false, 2, 2, 2, 9, CM_E_PROTOCOL},
        {false, 0, 0, 0, 0, CM_OK},
    };
    for (size_t i = 0; i < sizeof(rows) / sizeof(rows[0]); i++) {
        uint32_t ids[] = {4, 5}, top_id[21] = {0};
        float top[21] = {0};
        gw_core core;
        gw_core_news news;
        cm_error err = {0};
        begin(&core);
        core.logprobs = rows[i].asked;
        Baleen__Engine__V1__TokenLogprobs of = BALEEN__ENGINE__V1__TOKEN_LOGPROBS__INIT, *list[] = {&of, &of};
        of.top_id = top_id;
        of.top = top;
        of.n_top_id = rows[i].n_top_id;
        of.n_top = rows[i].n_top;
        top_id[rows[i].n_top_id > 0 ? rows[i].n_top_id - 1 : 0] = rows[i].last_id;
        Baleen__Engine__V1__SeqTokens frame = BALEEN__ENGINE__V1__SEQ_TOKENS__INIT;
        frame.id = ids;
        frame.n_id = 2;
        frame.logprobs = list;
        frame.n_logprobs = rows[i].n_logprobs;
        assert_int_equal(gw_core_take(&core, &frame, &news, &err), rows[i].status);
        assert_int_equal(core.emitted.n, rows[i].status == CM_OK ? 2 : 0);
        gw_core_fini(&core);
    }
}

static void whole_life(void **state)
{
    (void)state;
    gw_core core;
    gw_core_news news;
    begin(&core);
    assert_int_equal(take(&core, 0, 0, 0, GOING_ON, &news), CM_OK);
    assert_true(news.accepted && news.n_id == 0);
    assert_int_equal(core.state, GW_CORE_RUNNING);
    assert_int_equal(take(&core, 0, 2, 10, GOING_ON, &news), CM_OK);
    assert_false(news.accepted);
    assert_int_equal(news.offset, 0);
    assert_int_equal(take(&core, 2, 1, 12, STOP, &news), CM_OK);
    assert_int_equal(news.offset, 2);
    assert_int_equal(news.id[0], 12);
    assert_int_equal(core.state, GW_CORE_ENDED);
    assert_int_equal(core.emitted.n, 3);
    assert_int_equal(core.emitted.id[1], 11);
    gw_core_fini(&core);
}

/* A stop that came before the tokens it stops would cut the text. */
static void stop_has_its_place(void **state)
{
    (void)state;
    gw_core core;
    gw_core_news news;
    begin(&core);
    assert_int_equal(take(&core, 0, 1, 10, GOING_ON, &news), CM_OK);
    assert_int_equal(take(&core, 3, 0, 0, STOP, &news), CM_E_PROTOCOL);
    assert_int_equal(core.state, GW_CORE_RUNNING);
    assert_int_equal(take(&core, 1, 2, 11, GOING_ON, &news), CM_OK);
    assert_int_equal(take(&core, 3, 0, 0, STOP, &news), CM_OK);
    assert_int_equal(core.state, GW_CORE_ENDED);
    gw_core_fini(&core);
}

/* Whoever finished it knew where the client had enough; a router's own end for length must be one. */
static void finished_before_its_length(void **state)
{
    (void)state;
    gw_core core;
    gw_core_news news;
    begin(&core);
    assert_int_equal(take(&core, 0, 3, 10, LENGTH, &news), CM_E_PROTOCOL);
    assert_int_equal(take(&core, 0, 3, 10, BALEEN__ENGINE__V1__SEQ_END__SEQ_FINISHED, &news), CM_OK);
    assert_int_equal(news.n_id, 3);
    assert_int_equal(core.state, GW_CORE_ENDED);
    gw_core_fini(&core);
}

static void accepted_with_tokens(void **state)
{
    (void)state;
    gw_core core;
    gw_core_news news;
    begin(&core);
    assert_int_equal(take(&core, 0, TOKENS_MAX, 1, LENGTH, &news), CM_OK);
    assert_true(news.accepted && news.n_id == TOKENS_MAX);
    gw_core_fini(&core);
}

static void failed_is_not_accepted(void **state)
{
    (void)state;
    gw_core core;
    gw_core_news news;
    begin(&core);
    assert_int_equal(take(&core, 0, 0, 0, FAILED, &news), CM_OK);
    assert_false(news.accepted);
    assert_int_equal(core.state, GW_CORE_ENDED);
    gw_core_fini(&core);
}

/* Each is refused and changes nothing. */
static void refused(void **state)
{
    (void)state;
    static const struct {
        uint64_t offset;
        uint32_t n, first;
        int end;
    } frames[] = {
        {0, 1, 1, GOING_ON},          /* told before */
        {1, 1, 1, GOING_ON},          /* half told before */
        {3, 1, 1, GOING_ON},          /* one is missing */
        {UINT64_MAX, 1, 1, GOING_ON}, /* nonsense */
        {2, 4, 1, GOING_ON},          /* more than asked for */
        {2, 1, VOCAB, GOING_ON},      /* no token */
        {2, 2, VOCAB - 1, GOING_ON},  /* its second is none */
        {2, 1, 1, LENGTH},            /* too early */
        {2, 0, 0, 9},                 /* an end we do not know */
    };
    gw_core core;
    gw_core_news news;
    begin(&core);
    assert_int_equal(take(&core, 0, 2, 10, GOING_ON, &news), CM_OK);
    for (size_t i = 0; i < sizeof(frames) / sizeof(frames[0]); i++) {
        assert_int_equal(take(&core, frames[i].offset, frames[i].n, frames[i].first,
                              (Baleen__Engine__V1__SeqEnd)frames[i].end, &news),
                         CM_E_PROTOCOL);
        assert_int_equal(core.emitted.n, 2);
        assert_int_equal(core.state, GW_CORE_RUNNING);
    }
    assert_int_equal(take(&core, 2, 3, 12, LENGTH, &news), CM_OK);
    assert_int_equal(take(&core, 5, 0, 0, GOING_ON, &news), CM_E_PROTOCOL); /* after the end */
    assert_int_equal(take(&core, 5, 0, 0, STOP, &news), CM_E_PROTOCOL);
    gw_core_fini(&core);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(log_probabilities),
        cmocka_unit_test(whole_life),
        cmocka_unit_test(stop_has_its_place),
        cmocka_unit_test(finished_before_its_length),
        cmocka_unit_test(accepted_with_tokens),
        cmocka_unit_test(failed_is_not_accepted),
        cmocka_unit_test(refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
