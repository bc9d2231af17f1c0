#include "router/script.h"

#include <math.h>
#include <signal.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/base/failpoint.h"
#include "common/base/mem.h"
#include "common/model/geometry.h"
#include "common/model/tokenizer.h"
#include "router/engine/kv.h"

static const char RESULT_BEGIN[] = "<tool_result>", RESULT_END[] = "</tool_result>";

/* What was made of the prompt that a slot's sequence has, so that it is made once and not for each token.
 * Only the prompt's tail decides: from its last <User> on, or all of it. */
typedef struct slot_script {
    md_ids tail, script;
    uint32_t n_prompt; /* 0: nothing yet */
} slot_script;

struct rt_script {
    md_geometry geometry;
    md_tokenizer *tokenizer;
    rt_sched_limits limits;
    slot_script *slots; /* [slot_max] */
    uint32_t blank;     /* said where the script wants to stop and may not yet */
    cm_bytes text;      /* scratch */
};

static uint32_t control(const rt_script *s, md_control name)
{
    return md_tokenizer_control(s->tokenizer, name);
}

/* ---- from a prompt to its script ---- */

static bool ends_turn(const rt_script *s, uint32_t id)
{
    static const md_control ends[] = {MD_CTL_EOS,      MD_CTL_ASSISTANT, MD_CTL_REMINDER, MD_CTL_ACTION,
                                      MD_CTL_QUERY,    MD_CTL_AUTHORITY, MD_CTL_DOMAIN,   MD_CTL_TITLE,
                                      MD_CTL_READ_URL, MD_CTL_FIM_HOLE};
    for (size_t i = 0; i < sizeof(ends) / sizeof(ends[0]); i++) {
        if (id == control(s, ends[i])) {
            return true;
        }
    }
    return false;
}

/* From the last <User> on; everything when there is none. */
static uint32_t tail_begin(const rt_script *s, const uint32_t *prompt, uint32_t n_prompt)
{
    uint32_t user = control(s, MD_CTL_USER), begin = n_prompt - 1;
    while (begin > 0 && prompt[begin] != user) {
        begin--;
    }
    return begin;
}

static void append_turn(rt_script *s, const md_ids *tail)
{
    size_t at = 0;
    if (tail->id[0] == control(s, MD_CTL_USER)) {
        at++;
    } else {
        at += tail->id[0] == control(s, MD_CTL_BOS);
        at += at < tail->n && tail->id[at] == control(s, MD_CTL_FIM_BEGIN);
    }
    for (; at < tail->n && !ends_turn(s, tail->id[at]); at++) {
        size_t n;
        const uint8_t *bytes = md_tokenizer_bytes(s->tokenizer, tail->id[at], &n);
        if (bytes != NULL) {
            cm_bytes_append(&s->text, bytes, n);
        }
    }
}

/* Where needle begins last; NULL: nowhere. */
static const char *find_last(const char *text, size_t n, const char *needle)
{
    size_t n_needle = strlen(needle);
    for (size_t at = n; at >= n_needle; at--) {
        if (memcmp(text + at - n_needle, needle, n_needle) == 0) {
            return text + at - n_needle;
        }
    }
    return NULL;
}

/* The last message of a turn: a tool result's inside, or what the user wrote after the results. */
static void cut_last_message(const char **text, size_t *n)
{
    const size_t n_end = sizeof(RESULT_END) - 1;
    const char *end = *text + *n, *found = NULL;
    if (*n >= n_end && memcmp(end - n_end, RESULT_END, n_end) == 0) {
        end -= n_end;
        found = find_last(*text, (size_t)(end - *text), RESULT_BEGIN);
        found = found != NULL ? found + sizeof(RESULT_BEGIN) - 1 : NULL;
        end = found != NULL ? end : *text + *n;
    } else {
        found = find_last(*text, *n, "</tool_result>\n\n");
        found = found != NULL ? found + n_end + 2 : NULL;
    }
    *text = found != NULL ? found : *text;
    *n = (size_t)(end - *text);
}

static void learn(rt_script *s, slot_script *slot, const uint32_t *prompt, uint32_t n_prompt)
{
    slot->n_prompt = n_prompt;
    slot->tail.n = slot->script.n = 0;
    for (uint32_t i = tail_begin(s, prompt, n_prompt); i < n_prompt; i++) {
        md_ids_push(&slot->tail, prompt[i]);
    }
    cm_bytes_clear(&s->text);
    append_turn(s, &slot->tail);
    const char *text = cm_bytes_text(&s->text);
    size_t n_text = s->text.len;
    cut_last_message(&text, &n_text);
    if (strncmp(text, "poison", 6) == 0 && cm_failpoint_fires(CM_FAILPOINT_router_script_ends_it)) {
        raise(SIGKILL);
    }
    md_tokenizer_encode(s->tokenizer, text, n_text, MD_TEXT_CONTROL, &slot->script);
}

static const md_ids *script_of(rt_script *s, const rt_step_seg *seg)
{
    CM_ASSERT_MSG(seg->slot < s->limits.slot_max && seg->n_prompt > 0, "slot %u of %u, prompt of %u ids",
                  seg->slot, s->limits.slot_max, seg->n_prompt);
    slot_script *slot = &s->slots[seg->slot];
    if (slot->n_prompt != seg->n_prompt || memcmp(seg->log + seg->n_prompt - slot->tail.n, slot->tail.id,
                                                  sizeof(uint32_t) * slot->tail.n) != 0) {
        learn(s, slot, seg->log, seg->n_prompt);
    }
    return &slot->script;
}

/* ---- the step ---- */

static bool is_stop(const rt_sampler *sampler, uint32_t id)
{
    for (uint32_t i = 0; i < sampler->n_stop; i++) {
        if (sampler->stop[i] == id) {
            return true;
        }
    }
    return false;
}

static uint32_t next_token(rt_script *s, const rt_step_seg *seg)
{
    const md_ids *script = script_of(s, seg);
    uint32_t n_said = seg->pos0 + seg->n_row - seg->n_prompt;
    uint32_t token = n_said < script->n ? script->id[n_said] : control(s, MD_CTL_EOS);
    if (seg->stop_wait > 0 && is_stop(seg->sampler, token)) {
        for (token = s->blank; is_stop(seg->sampler, token); token = (token + 1) % s->limits.vocab) {
        }
    }
    return token;
}

/* Certain; of what is impossible the lowest ids. */
static void write_logprobs(uint32_t token, uint32_t n_top, rt_logprobs *out)
{
    out->token = 0;
    out->n_top = n_top;
    for (uint32_t i = 0, id = 0; i < n_top; i++) {
        out->top[i] = i == 0 ? 0 : -INFINITY;
        if (i > 0) {
            id += id == token;
            out->top_id[i] = id++;
        } else {
            out->top_id[i] = token;
        }
    }
}

cm_status rt_script_step(rt_script *s, const rt_step *step, rt_step_result *results_out)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < step->n_seg; i++) {
        const rt_step_seg *seg = &step->segs[i];
        if (!seg->sample) {
            continue;
        }
        uint32_t token = next_token(s, seg);
        results_out[n++] = (rt_step_result){.n_token = 1, .tokens = {token}};
        if (seg->logprobs != NULL) {
            write_logprobs(token, seg->sampler->n_top, seg->logprobs);
        }
    }
    return CM_OK;
}

/* ---- life ---- */

static cm_status open_tokenizer(rt_script *s, const char *dir, cm_error *err)
{
    cm_bytes path;
    cm_bytes_init(&path, 0);
    cm_bytes_printf(&path, "%s/tokenizer.json", dir);
    cm_status status = md_tokenizer_open(cm_bytes_text(&path), s->geometry.vocab, &s->tokenizer, err);
    cm_bytes_fini(&path);
    return status;
}

cm_status rt_script_create(const rt_script_options *options, rt_script **script_out, cm_error *err)
{
    rt_kv_sizes sizes;
    md_ids blank;
    rt_script *s = cm_alloc(sizeof(*s));
    cm_bytes_init(&s->text, 0);
    *script_out = NULL;
    s->limits = (rt_sched_limits){
        .slot_max = options->slot_max, .row_max = options->row_max, .page_tokens = KN_PAGE_TOKENS};
    cm_status status = md_geometry_load(options->dir, &s->geometry, err);
    if (status == CM_OK) {
        rt_kv_sizes_get(&s->geometry, 0, &sizes);
        rt_kv_budget budget = {.kv_bytes = options->kv_bytes,
                               .prefix_bytes = options->prefix_bytes,
                               .slot_max = options->slot_max};
        status = rt_kv_count(&s->geometry, &sizes, &budget, &s->limits.page_max, &s->limits.state_max, err);
    }
    if (status == CM_OK) {
        status = open_tokenizer(s, options->dir, err);
    }
    if (status != CM_OK) {
        rt_script_destroy(s);
        return status;
    }
    s->limits.context = s->geometry.context;
    s->limits.vocab = s->geometry.vocab;
    md_ids_init(&blank);
    md_tokenizer_encode(s->tokenizer, " ", 1, MD_TEXT_PLAIN, &blank);
    s->blank = blank.id[0];
    md_ids_fini(&blank);
    s->slots = cm_alloc(sizeof(*s->slots) * options->slot_max);
    *script_out = s;
    return CM_OK;
}

void rt_script_destroy(rt_script *s)
{
    if (s == NULL) {
        return;
    }
    for (uint32_t i = 0; s->slots != NULL && i < s->limits.slot_max; i++) {
        md_ids_fini(&s->slots[i].tail);
        md_ids_fini(&s->slots[i].script);
    }
    cm_free(s->slots);
    cm_bytes_fini(&s->text);
    if (s->tokenizer != NULL) {
        md_tokenizer_close(s->tokenizer);
    }
    cm_free(s);
}

void rt_script_sched_limits(const rt_script *s, rt_sched_limits *limits_out)
{
    *limits_out = s->limits;
}
