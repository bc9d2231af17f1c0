/* Guessing the next tokens with the MTP block (model section 7): after the step's tokens are known the block
 * runs over all rows of the step, each with the token that follows it, which also fills its ring; then one
 * row a sequence for every further guess, fed with the streams and the guess before. A guess is drawn as its
 * token will be (same seed, same position), so that it is often the same also at a temperature. Guesses
 * change how many tokens a step gives, never which: the trunk draws every token itself. */
#include "router/engine/engine_private.h"

#include "common/base/assert.h"

static kn_ptr draft_streams(const rt_engine *e, uint64_t row)
{
    return kn_at(e->buf.x, 2 * row * e->geometry->hc * e->geometry->d);
}

/* The token after each row: the prompt's, a right guess, or the one just drawn. Rows of wrong guesses have
 * none; what they enter into the ring is overwritten by the next step. */
static void draft_next_tokens(rt_engine *e, const rt_step_result *results)
{
    const rt_step *step = e->step;
    for (uint32_t i = 0, i_sample = 0; i < step->n_seg; i++) {
        const rt_step_seg *seg = &step->segs[i];
        uint32_t *next = e->host.ids + e->host.segs[i].row0;
        for (uint32_t k = 0; k + 1 < seg->n_row; k++) {
            next[k] = seg->tokens[k + 1];
        }
        next[seg->n_row - 1] = seg->sample ? 0 : seg->tokens[seg->n_row];
        if (seg->sample) {
            const rt_step_result *result = &results[i_sample++];
            next[seg->n_row - seg->n_draft + result->n_token - 2] = result->tokens[result->n_token - 1];
        }
    }
}

/* X[j] = e_proj(enorm(embed(token))) + h_proj(hnorm(X[j])), in place over the batch's rows. normed: X is
 * hnorm-ed already. */
static void draft_input(rt_engine *e, bool normed)
{
    const md_geometry *g = e->geometry;
    const rt_mtp *w = &e->weights.mtp;
    rt_buffers *b = &e->buf;
    uint32_t n = e->host.n_row;
    e->dense->embed(e->stream, &e->weights.embed, b->ids, n, 1, b->in);
    e->dense->rmsnorm(e->stream, b->in, w->enorm, n, g->d, g->norm_eps, b->in);
    e->dense->quant_act(e->stream, b->in, n, g->d, b->q8);
    e->dense->linear_q8(e->stream, b->q8, &w->e_proj, n, b->out);
    if (!normed) {
        e->dense->rmsnorm(e->stream, b->x, w->hnorm, n * g->hc, g->d, g->norm_eps, b->x);
    }
    for (uint32_t j = 0; j < g->hc;
         j++) { /* n of the n * hc stream rows at a time: as many as buffers hold */
        kn_ptr part = kn_at(b->x, 2ull * j * n * g->d);
        e->dense->quant_act(e->stream, part, n, g->d, b->q8);
        e->dense->linear_q8(e->stream, b->q8, &w->h_proj, n, part);
    }
    e->dense->add_streams(e->stream, b->out, n, g->hc, g->d, b->x);
}

/* The segments that are guessed for, one row each: from[i] is the row of the batch before that holds the
 * streams of segment i's newest token. Its head goes to buf.last, its normed streams to row i. */
static void draft_gather(rt_engine *e, const uint32_t *from, uint32_t n)
{
    const md_geometry *g = e->geometry;
    const rt_mtp *w = &e->weights.mtp;
    for (uint32_t i = 0; i < n; i++) {
        CM_ASSERT(from[i] >= i); /* no row is overwritten before it was read */
        kn_ptr x = draft_streams(e, from[i]);
        e->dense->hc_head(e->stream, &w->hc_head, x, 1, kn_at(e->buf.last, 2ull * i * g->d));
        e->dense->rmsnorm(e->stream, x, w->hnorm, g->hc, g->d, g->norm_eps, draft_streams(e, i));
    }
}

/* Guess number k of every segment that is guessed for, from the logits in host_logits. */
static void draft_draw(rt_engine *e, uint32_t k, rt_step_result *results)
{
    const rt_step *step = e->step;
    uint32_t n = 0;
    for (uint32_t i = 0, i_sample = 0; i < step->n_seg; i++) {
        const rt_step_seg *seg = &step->segs[i];
        rt_step_result *result = seg->sample ? &results[i_sample++] : NULL;
        if (result == NULL || seg->draft_want == 0) {
            continue;
        }
        /* penalties would need the guesses in the log; without them a guess is only a little worse */
        uint32_t first = seg->pos0 + seg->n_row - seg->n_draft + result->n_token + k;
        e->guess_sampler = *seg->sampler;
        e->guess_sampler.repetition_penalty = 1;
        e->guess_sampler.frequency_penalty = e->guess_sampler.presence_penalty = 0;
        rt_step_seg guess = {.pos0 = first, .sampler = &e->guess_sampler};
        if (seg->stop_wait > result->n_token + k) {
            guess.stop_wait = 1;
        }
        uint32_t token = rt_sample(e->scratch, e->host_logits + (size_t)n * e->geometry->vocab, &guess, 0);
        if (k < seg->draft_want) {
            result->drafts[k] = token;
            result->n_draft = k + 1;
        }
        e->host.ids[n++] = token;
    }
    if (e->tap != NULL) {
        e->tap(e->tap_ctx, k, RT_TAP_DRAFT_LOGITS, step, 0, e->host_logits, 4ull * e->geometry->vocab, n);
    }
}

/* Who is guessed for: their newest rows into host_last; the largest number of guesses wanted. */
static uint32_t draft_wanted(rt_engine *e, const rt_step_result *results, uint32_t *n_out)
{
    const rt_step *step = e->step;
    uint32_t most = 0, n = 0;
    for (uint32_t i = 0, i_sample = 0; i < step->n_seg; i++) {
        const rt_step_seg *seg = &step->segs[i];
        if (!seg->sample) {
            continue;
        }
        const rt_step_result *result = &results[i_sample++];
        if (seg->draft_want > 0) {
            CM_ASSERT_MSG(seg->draft_want <= e->draft_max, "%u guesses wanted, %u at most", seg->draft_want,
                          e->draft_max);
            e->host_last[n++] = e->host.segs[i].row0 + seg->n_row - seg->n_draft + result->n_token - 2;
            most = seg->draft_want > most ? seg->draft_want : most;
        }
    }
    *n_out = n;
    return most;
}

/* One row a segment from now on, at the position after its newest row. */
static void draft_shrink_batch(rt_engine *e, uint32_t n)
{
    for (uint32_t i = 0, at = 0; i < n; i++) {
        uint32_t row = e->host_last[i];
        while (row >= e->host.segs[at].row0 + e->host.segs[at].n_row) {
            at++;
        }
        kn_ptr slot = e->host.segs[at].slot;
        uint32_t pos = e->host.segs[at].pos0 + row - e->host.segs[at].row0;
        CM_ASSERT(at >= i);
        e->host.segs[i] = (kn_seg){.row0 = i, .n_row = 1, .pos0 = pos, .slot = slot};
        e->host.pos[i] = pos;
        e->host_last[i] = i;
    }
}

static cm_status draft_next_pass(rt_engine *e, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        e->host.pos[i] = ++e->host.segs[i].pos0;
    }
    e->host.n_seg = e->host.n_row = n;
    e->host.n_page = 0;
    rt_place_rows(e, 1); /* a single layer: nothing to overlap it with */
    draft_input(e, true);
    return rt_blocks(e, e->geometry->n_layer, e->geometry->n_layer + 1);
}

cm_status rt_draft(rt_engine *e, rt_step_result *results)
{
    uint32_t n, most;
    draft_next_tokens(e, results);
    kn_copy_to_device(e->stream, e->buf.ids, e->host.ids, 4ull * e->host.n_row);
    draft_input(e, false);
    CM_TRY(rt_blocks(e, e->geometry->n_layer, e->geometry->n_layer + 1));
    most = draft_wanted(e, results, &n);
    for (uint32_t k = 0; k < most; k++) {
        if (k == 1) {
            draft_shrink_batch(e, n);
        }
        if (k > 0) {
            CM_TRY(draft_next_pass(e, n));
        }
        draft_gather(e, e->host_last, n);
        CM_TRY(rt_logits(e, e->weights.mtp.norm, n));
        draft_draw(e, k, results);
    }
    return CM_OK;
}
