#include "tests/unit/schedule_trace.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "common/base/mem.h"

enum { POINTS = RT_TAP_LOGITS + 1, POSITIONS = T_PROMPT_MAX + T_TOKENS_MAX };

static const char *const g_point_names[POINTS] = {"STREAMS_IN",  "ATTN_IN",     "PICKS",   "ATTN_OUT",
                                                  "STREAMS_MID", "FFN_IN",      "EXPERTS", "ROUTE",
                                                  "FFN_OUT",     "STREAMS_OUT", "LOGITS"};

struct t_trace {
    const t_case *c;
    uint64_t *hashes; /* [n_seq][POSITIONS][n_layer + 1][POINTS] */
    uint64_t n_compared, step;
    bool comparing, found;
    uint32_t seq, pos, layer;
    rt_tap_point point;
};

t_trace *t_trace_create(const t_case *c)
{
    t_trace *trace = cm_alloc(sizeof(*trace));
    trace->c = c;
    trace->hashes = cm_alloc(sizeof(uint64_t) * c->n_seq * POSITIONS * (c->geometry.n_layer + 1) * POINTS);
    return trace;
}

void t_trace_destroy(t_trace *trace)
{
    cm_free(trace->hashes);
    cm_free(trace);
}

void t_trace_compare(t_trace *trace)
{
    trace->comparing = true;
}

void t_trace_row(t_trace *trace, uint32_t seq, uint32_t pos, uint32_t layer, rt_tap_point point,
                 uint64_t step, uint64_t hash)
{
    uint64_t *known =
        &trace->hashes[(((uint64_t)seq * POSITIONS + pos) * (trace->c->geometry.n_layer + 1) + layer) *
                           POINTS +
                       point];
    if (!trace->comparing) {
        *known = hash;
        return;
    }
    trace->n_compared++;
    if (*known != hash && !trace->found) {
        trace->found = true;
        trace->seq = seq;
        trace->pos = pos;
        trace->layer = layer;
        trace->point = point;
        trace->step = step;
    }
}

void t_trace_print(const t_trace *trace)
{
    if (!trace->found) {
        print_message("  the same schedule again gave the same %llu rows: it depends on time\n",
                      (unsigned long long)trace->n_compared);
        return;
    }
    print_message("  first different row: layer %u (ratio %u), point %s, position %u of sequence %u (prompt "
                  "of %u), step %llu\n",
                  trace->layer,
                  trace->layer < trace->c->geometry.n_layer ? trace->c->geometry.ratio[trace->layer] : 0,
                  g_point_names[trace->point], trace->pos, trace->seq, trace->c->seqs[trace->seq].n_prompt,
                  (unsigned long long)trace->step);
}
