#include "gateway/stream_core.h"

#include "common/base/assert.h"

void gw_core_init(gw_core *core, md_ids *prompt, uint32_t tokens_max, uint32_t vocab, bool logprobs)
{
    CM_ASSERT(tokens_max >= 1);
    *core = (gw_core){.state = GW_CORE_OPENING,
                      .vocab = vocab,
                      .tokens_max = tokens_max,
                      .logprobs = logprobs,
                      .prompt = *prompt};
    md_ids_init(prompt);
    md_ids_init(&core->emitted);
}

void gw_core_fini(gw_core *core)
{
    md_ids_fini(&core->prompt);
    md_ids_fini(&core->emitted);
}

/* How many of the frame's ids the log has: told before, and the same. */
static cm_status check_known(const gw_core *core, const Baleen__Engine__V1__SeqTokens *frame,
                             uint32_t *n_known_out, cm_error *err)
{
    uint64_t offset = frame->has_offset ? frame->offset : 0;
    size_t n_log = core->emitted.n;
    *n_known_out = 0;
    /* a stop without a token of its own has its place too: it must not come before the tokens it stops */
    bool stops = frame->end == BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP && frame->has_offset;
    if (frame->n_id == 0 && !stops) {
        return CM_OK;
    }
    if (offset > n_log) {
        return cm_error_set(err, CM_E_PROTOCOL, "offset", "tokens at offset %llu, %zu are known",
                            (unsigned long long)offset, n_log);
    }
    size_t n_known = frame->n_id < n_log - offset ? frame->n_id : n_log - (size_t)offset;
    for (size_t i = 0; i < n_known; i++) {
        if (frame->id[i] != core->emitted.id[offset + i]) {
            return cm_error_set(err, CM_E_PROTOCOL, "id", "token %llu is %u, it was %u before",
                                (unsigned long long)offset + i, frame->id[i], core->emitted.id[offset + i]);
        }
    }
    *n_known_out = (uint32_t)n_known;
    return CM_OK;
}

static cm_status check_ids(const gw_core *core, const Baleen__Engine__V1__SeqTokens *frame, uint32_t n_known,
                           cm_error *err)
{
    if (frame->n_id - n_known > core->tokens_max - core->emitted.n) {
        return cm_error_set(err, CM_E_PROTOCOL, "id", "%zu tokens after %zu, %u were asked for",
                            frame->n_id - n_known, core->emitted.n, core->tokens_max);
    }
    for (size_t i = 0; i < frame->n_id; i++) {
        if (frame->id[i] >= core->vocab) {
            return cm_error_set(err, CM_E_PROTOCOL, "id", "token id %u, the vocabulary has %u", frame->id[i],
                                core->vocab);
        }
    }
    return CM_OK;
}

static cm_status check_logprobs(const gw_core *core, const Baleen__Engine__V1__SeqTokens *frame,
                                cm_error *err)
{
    if (frame->n_logprobs != (core->logprobs ? frame->n_id : 0)) {
        return cm_error_set(err, CM_E_PROTOCOL, "logprobs", "%zu log-probabilities for %zu tokens",
                            frame->n_logprobs, frame->n_id);
    }
    for (size_t i = 0; i < frame->n_logprobs; i++) {
        const Baleen__Engine__V1__TokenLogprobs *of = frame->logprobs[i];
        if (of->n_top != of->n_top_id || of->n_top > GW_CORE_TOP_MAX) {
            return cm_error_set(err, CM_E_PROTOCOL, "logprobs", "%zu likely tokens, %zu log-probabilities",
                                of->n_top_id, of->n_top);
        }
        for (size_t k = 0; k < of->n_top_id; k++) {
            if (of->top_id[k] >= core->vocab) {
                return cm_error_set(err, CM_E_PROTOCOL, "logprobs", "token id %u, the vocabulary has %u",
                                    of->top_id[k], core->vocab);
            }
        }
    }
    return CM_OK;
}

static cm_status check_end(const gw_core *core, const Baleen__Engine__V1__SeqTokens *frame, uint32_t n_known,
                           cm_error *err)
{
    size_t n_log = core->emitted.n + frame->n_id - n_known;
    switch (frame->end) {
    case BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON:
    case BALEEN__ENGINE__V1__SEQ_END__SEQ_STOP:
    case BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED:
    case BALEEN__ENGINE__V1__SEQ_END__SEQ_FINISHED: /* the log's reader knows where it has enough */
        return CM_OK;
    case BALEEN__ENGINE__V1__SEQ_END__SEQ_LENGTH:
        if (n_log == core->tokens_max) {
            return CM_OK;
        }
        return cm_error_set(err, CM_E_PROTOCOL, "end", "ended for length after %zu of %u tokens", n_log,
                            core->tokens_max);
    default:
        return cm_error_set(err, CM_E_PROTOCOL, "end", "unknown end %d", (int)frame->end);
    }
}

cm_status gw_core_take(gw_core *core, const Baleen__Engine__V1__SeqTokens *frame, gw_core_news *news_out,
                       cm_error *err)
{
    if (core->state == GW_CORE_ENDED) {
        return cm_error_set(err, CM_E_PROTOCOL, NULL, "a frame after the end");
    }
    uint32_t n_known;
    CM_TRY(check_known(core, frame, &n_known, err));
    CM_TRY(check_ids(core, frame, n_known, err));
    CM_TRY(check_logprobs(core, frame, err));
    CM_TRY(check_end(core, frame, n_known, err));

    bool failed = frame->end == BALEEN__ENGINE__V1__SEQ_END__SEQ_FAILED;
    gw_core_news news = {.accepted = !core->started && !failed,
                         .offset = core->emitted.n,
                         .n_id = (uint32_t)frame->n_id - n_known,
                         .n_known = n_known,
                         .end = frame->end};
    core->started = core->started || !failed;
    for (size_t i = n_known; i < frame->n_id; i++) {
        md_ids_push(&core->emitted, frame->id[i]);
    }
    news.id = news.n_id > 0 ? core->emitted.id + news.offset : NULL;
    core->state = frame->end == BALEEN__ENGINE__V1__SEQ_END__SEQ_GOING_ON ? GW_CORE_RUNNING : GW_CORE_ENDED;
    *news_out = news;
    return CM_OK;
}

void gw_core_reopen(gw_core *core)
{
    core->state = core->started ? GW_CORE_RUNNING : GW_CORE_OPENING;
}
