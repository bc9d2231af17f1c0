#include "tests/unit/schedule_case.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/rng.h"
#include "router/engine/kv.h"

const char *const t_model_names[T_MODELS] = {"tiny-pro", "tiny-flash", "tiny-base", "tiny-odd", "nano"};

enum { FRAME_SMALL = 16 << 10, FRAME_MIDDLE = 64 << 10, FRAME_LARGE = 4 << 20, STEPS_MAX = 150 };

uint32_t t_below(t_rng *rng, uint32_t n)
{
    return cm_rng_at(rng->key, rng->n++, 0).word[0] % n;
}

uint32_t t_between(t_rng *rng, uint32_t low, uint32_t high)
{
    return low + t_below(rng, high - low + 1);
}

static uint32_t u32_max(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

/* Small numbers as often as large ones. */
static uint32_t draw_log(t_rng *rng, uint32_t low, uint32_t high)
{
    uint32_t top = low;
    while (top < high && t_below(rng, 8) != 0) {
        top = top * 2 < high ? top * 2 : high;
    }
    return t_between(rng, low, top);
}

uint32_t t_pages(uint32_t n_token)
{
    return rt_kv_seq_pages(n_token);
}

uint32_t t_seq_pages(const t_seq *seq)
{
    return t_pages(seq->n_prompt + seq->sampler.tokens_max);
}

/* ---- sequences ---- */

static void draw_sampler(t_rng *rng, uint32_t tokens_max, rt_sampler *sampler_out)
{
    *sampler_out = (rt_sampler){.seed = t_below(rng, UINT32_MAX), .top_p = 1, .tokens_max = tokens_max};
    if (t_below(rng, 3) != 0) {
        sampler_out->temperature = 0.25f * (float)t_between(rng, 1, 6);
        sampler_out->top_p = t_below(rng, 2) == 0 ? 1 : 0.1f * (float)t_between(rng, 3, 9);
    }
}

static void draw_prompt(t_rng *rng, const md_geometry *g, uint32_t first, uint32_t n, t_seq *seq)
{
    seq->n_prompt = n;
    for (uint32_t i = 0; i < n; i++) {
        seq->prompt[i] = t_below(rng, g->vocab);
    }
    seq->prompt[0] = first % g->vocab;
}

/* Sequences that grow into a page beyond those the scheduler saved for them, so that the youngest loses its
 * pages: a prompt just short of a page's end and more than a page of answer. */
static void draw_growing(t_rng *rng, t_case *c, uint32_t first)
{
    c->n_seq = t_below(rng, 4) != 0 ? 2 : 3;
    for (uint32_t i = 0; i < c->n_seq; i++) {
        uint32_t shortage = t_below(rng, 12);
        draw_prompt(rng, &c->geometry, first + i, 128 * t_between(rng, 1, 2) - shortage, &c->seqs[i]);
        draw_sampler(rng, 130 + shortage + t_below(rng, 12), &c->seqs[i].sampler);
        c->seqs[i].arrival = t_below(rng, 3);
    }
}

static void draw_plain(t_rng *rng, t_case *c, uint32_t first)
{
    c->n_seq = t_between(rng, 1, T_SEQ_MAX);
    for (uint32_t i = 0; i < c->n_seq; i++) {
        draw_prompt(rng, &c->geometry, first + i, draw_log(rng, 8, T_PROMPT_MAX), &c->seqs[i]);
        draw_sampler(rng, t_between(rng, 1, 16), &c->seqs[i].sampler);
        c->seqs[i].arrival = t_below(rng, 12);
    }
}

/* Begins as another does, by about a page or more; n_same: the other's tokens. */
static void draw_like(t_rng *rng, t_case *c, uint32_t i, uint32_t n_same)
{
    t_seq *seq = &c->seqs[i];
    const t_seq *like = &c->seqs[i > 0 ? t_below(rng, i) : 0];
    uint32_t way = t_below(rng, 4), n_tail = t_between(rng, 1, 60),
             n_turn = like->n_prompt + like->sampler.tokens_max;
    n_same = i == 0 ? 0 : way == 0 || like->n_prompt < n_same ? like->n_prompt : n_same;
    if (i > 0 && way >= 2 && like->after == 0 && n_turn + n_tail <= T_PROMPT_MAX) {
        seq->after = 1 + (uint32_t)(like - c->seqs);
        seq->n_prompt = n_turn + n_tail;
        n_same = like->n_prompt;
    } else if (i > 0 && way == 0) {
        seq->n_prompt = n_same;
    } else {
        seq->n_prompt = i == 0 ? t_between(rng, 130, 300) : n_same + n_tail;
    }
    seq->n_prompt = seq->n_prompt < T_PROMPT_MAX ? seq->n_prompt : T_PROMPT_MAX;
    for (uint32_t k = 0; k < seq->n_prompt; k++) {
        seq->prompt[k] = k < n_same ? like->prompt[k] : t_below(rng, c->geometry.vocab);
    }
}

/* Sequences that begin alike, one after another and at once; from a stream of dice of its own, so that
 * a seed without them draws what it drew before there were any. */
static void draw_alike(t_rng *rng, t_case *c)
{
    c->n_seq = t_between(rng, 3, T_SEQ_MAX);
    c->state_max = t_between(rng, 1, 6);
    for (uint32_t i = 0; i < c->n_seq; i++) {
        c->seqs[i].after = 0;
        draw_like(rng, c, i, t_between(rng, 100, 300));
        draw_sampler(rng, t_below(rng, 3) == 0 ? t_between(rng, 100, 150) : t_between(rng, 1, 16),
                     &c->seqs[i].sampler);
        c->seqs[i].arrival = t_below(rng, 3) * 25 * (i > 0) + t_below(rng, 5);
    }
}

static void draw_extras(t_rng *rng, t_case *c, uint32_t first)
{
    c->n_all = c->n_seq + t_below(rng, T_EXTRA_MAX + 1);
    for (uint32_t i = c->n_seq; i < c->n_all; i++) {
        t_seq *seq = &c->seqs[i];
        draw_prompt(rng, &c->geometry, first + i, t_between(rng, 1, 200), seq);
        draw_sampler(rng, t_between(rng, 1, 50), &seq->sampler);
        seq->arrival = t_below(rng, 12);
        seq->cancel = seq->arrival + t_below(rng, 16);
        seq->cancel_flying = t_below(rng, 2) == 0;
    }
}

/* ---- limits ---- */

/* The longest sequence must fit alone; all of them together need not. */
static void draw_limits(t_rng *rng, t_case *c, bool growing)
{
    uint32_t most = 0, sum = 0, longest = 0, rows = 0;
    for (uint32_t i = 0; i < c->n_all; i++) {
        most = u32_max(most, t_seq_pages(&c->seqs[i]));
        longest = u32_max(longest, c->seqs[i].n_prompt);
        sum += i < c->n_seq ? t_seq_pages(&c->seqs[i]) : 0;
        rows += c->seqs[i].n_prompt;
    }
    if (growing) { /* the first two are let in together, on one page less each than they come to need */
        uint32_t low = u32_max(most, t_seq_pages(&c->seqs[0]) + t_seq_pages(&c->seqs[1]) - 2);
        c->page_max = t_between(rng, low, u32_max(low, sum - 1));
        c->slot_max = c->n_all;
    } else {
        c->page_max = t_between(rng, most, u32_max(most, sum) + 2);
        c->slot_max = t_between(rng, 1, c->n_all + 1);
    }
    c->row_max = draw_log(rng, growing ? 16 : 4, longest + 40);
    c->chunk_max =
        draw_log(rng, 1, growing ? c->row_max / 2 : c->row_max); /* rows are left for the second meanwhile */
    c->chunk_max = u32_max(c->chunk_max, rows / STEPS_MAX + 1);  /* not one row a step for thousands */
}

static void draw_speculation(t_rng *rng, t_case *c)
{
    if (c->geometry.drafter == MD_DRAFTER_MTP && t_below(rng, 4) != 0) {
        c->draft_max = t_between(rng, 1, RT_DRAFT_MAX);
        c->hint = t_below(rng, 5);
    }
}

/* Behind all that was drawn before there were any, so that a seed draws the same as then. */
static void draw_constraints(t_rng *rng, t_case *c)
{
    for (uint32_t i = 0; i < c->n_all && c->geometry.vocab >= T_CONSTRAINT_VOCAB; i++) {
        if (t_below(rng, 2) == 0) {
            c->seqs[i].constraint = t_between(rng, 1, T_CONSTRAINTS);
            c->seqs[i].thinking = t_below(rng, 8) == 0;
        }
    }
}

/* Likewise. */
static void draw_micro_batches(t_rng *rng, t_case *c)
{
    c->micro_batches = t_below(rng, 3) != 0 ? 2 : 1;
    c->cut_anywhere = t_below(rng, 2) == 0;
    c->epoch_late = c->micro_batches == 2 && t_below(rng, 2) == 0;
}

/* ---- the cluster ---- */

static void draw_device(t_rng *rng, t_device *device_out)
{
    uint32_t n_isa = 0;
    while (kn_cpu_isa_at(n_isa) != NULL) {
        n_isa++;
    }
    /* the first and slowest path in every sixth place, the others alike */
    uint32_t isa = n_isa == 1 || t_below(rng, 6) == 0 ? 0 : t_between(rng, 1, n_isa - 1);
    *device_out =
        (t_device){.isa = kn_cpu_isa_at(isa), .n_threads = t_below(rng, 4) == 0 ? t_between(rng, 2, 3) : 1};
}

static void draw_cluster(t_rng *rng, t_case *c)
{
    static const uint64_t frames[] = {FRAME_SMALL, FRAME_MIDDLE, FRAME_LARGE};
    static const uint32_t windows_us[] = {16, 16, 200, 1000};
    c->n_worker = t_between(rng, 1, T_WORKER_MAX);
    c->transport = t_below(rng, 2) == 0 ? "local" : "ucx";
    c->frame_bytes = frames[t_below(rng, 3)];
    c->frame_max = t_below(rng, 2) == 0 ? 3 : 8;
    c->window_us = windows_us[t_below(rng, 4)];
    draw_device(rng, &c->router);
    for (uint32_t i = 0; i < T_WORKER_MAX; i++) {
        draw_device(rng, &c->workers[i]);
    }
}

static void draw_epoch(t_rng *rng, t_case *c)
{
    uint32_t turns = 0;
    for (uint32_t i = 0; i < c->n_seq; i++) {
        const t_seq *seq = &c->seqs[i];
        turns = u32_max(turns, seq->arrival + seq->n_prompt / c->chunk_max + seq->sampler.tokens_max);
    }
    if (t_below(rng, 3) != 0) {
        c->epoch_turn = 1 + t_below(rng, turns);
        c->epoch_layer = t_below(rng, c->geometry.n_layer);
        c->router_first = t_below(rng, 2) == 0;
        c->retire = t_below(rng, 2) == 0;
    }
}

static void case_load_geometry(t_case *c)
{
    cm_error err = {0};
    if (strcmp(t_model_names[c->model], "nano") == 0) {
        snprintf(c->path, sizeof(c->path), "%s", BALEEN_NANO);
    } else {
        snprintf(c->path, sizeof(c->path), "%s/model/%s/ckpt", BALEEN_TEST_DATA, t_model_names[c->model]);
    }
    if (md_geometry_load(c->path, &c->geometry, &err) != CM_OK) {
        fail_msg("%s: %s", c->path, err.text);
    }
}

void t_case_draw(uint64_t seed, t_case *c)
{
    static const uint32_t models[8] = {0, 1, 4, 2, 0, 1, 4, 3}; /* twice those that can speculate */
    t_rng rng = {seed, 0};
    t_rng alike = {~seed, 0};
    bool growing = t_below(&rng, 8) == 0;
    memset(c, 0, sizeof(*c));
    c->seed = seed;
    c->model = models[seed % 8];
    case_load_geometry(c);
    uint32_t first = t_below(&rng, c->geometry.vocab);
    if (growing) {
        draw_growing(&rng, c, first);
    } else {
        draw_plain(&rng, c, first);
    }
    if (growing) {
        c->state_max = t_below(&alike, 5);
    } else if (t_below(&alike, 3) == 0) {
        draw_alike(&alike, c);
    }
    draw_extras(&rng, c, first);
    draw_limits(&rng, c, growing);
    c->page_max += c->state_max > 0 && !growing ? t_below(&alike, 8) : 0;
    c->state_max = c->state_max < c->page_max ? c->state_max : c->page_max;
    draw_cluster(&rng, c);
    draw_epoch(&rng, c);
    draw_speculation(&rng, c);
    draw_constraints(&rng, c);
    draw_micro_batches(&rng, c);
}

void t_case_undisturbed(const t_case *c, t_case *out)
{
    uint32_t longest = 1, pages = 1;
    *out = *c;
    for (uint32_t i = 0; i < c->n_seq; i++) {
        longest = u32_max(longest, c->seqs[i].n_prompt);
        pages = u32_max(pages, t_seq_pages(&c->seqs[i]));
    }
    out->n_all = c->n_seq;
    out->slot_max = c->n_seq;
    out->row_max = out->chunk_max = longest;
    out->page_max = pages * c->n_seq;
    out->n_worker = 1;
    out->transport = "local";
    out->frame_bytes = FRAME_LARGE;
    out->frame_max = 8;
    out->window_us = 200;
    uint32_t last = 0;
    while (kn_cpu_isa_at(last + 1) != NULL) {
        last++;
    }
    out->router = out->workers[0] =
        (t_device){.isa = kn_cpu_isa_at(c->seed % 4 == 0 ? 0 : last), .n_threads = 1};
    out->whole = true;
    out->draft_max = 0;
    out->state_max = 0;
    out->epoch_turn = 0;
    out->micro_batches = 1;
}

void t_case_print(const t_case *c)
{
    print_message(
        "seed %llu: %s, %u sequences and %u cancelled, rows %u, chunk %u, pages %u, states %u, slots %u, up "
        "to %u guesses, %u micro-batches%s, %u "
        "workers over %s, frames "
        "%llu bytes, router %s x%u",
        (unsigned long long)c->seed, t_model_names[c->model], c->n_seq, c->n_all - c->n_seq, c->row_max,
        c->chunk_max, c->page_max, c->state_max, c->slot_max, c->draft_max, c->micro_batches,
        c->cut_anywhere ? " cut anywhere" : "", c->n_worker, c->transport, (unsigned long long)c->frame_bytes,
        c->router.isa, c->router.n_threads);
    for (uint32_t i = 0; i < c->n_worker; i++) {
        print_message(", %s x%u", c->workers[i].isa, c->workers[i].n_threads);
    }
    if (c->epoch_turn != 0) {
        print_message(", placement changes in turn %u layer %u", c->epoch_turn, c->epoch_layer);
    }
    print_message("\n");
}
