/* A router's process: session, scheduler, layers through the exchange's machine, KV pages. The step is the
 * engine's: attention through the pages, gate, experts, the next layer, at the end a token. */
#include <string.h>

#include "common/base/assert.h"
#include "proto/messages.h"
#include "proto/pack.h"
#include "tests/sim/router.h"

enum { ROUTER_DOORS_MS = 100, ROUTER_DRAIN_MS = 6000 };
/* ---- a step ---- */

static uint64_t *router_kv(sim *s, sim_router *r, const rt_step_seg *seg, uint32_t position, uint32_t layer)
{
    uint32_t per_page = s->shape.page_tokens;
    if (position / per_page >= seg->n_page || seg->pages[position / per_page] >= s->shape.page_max) {
        sim_fail(s, "position %u has no page", position);
    }
    size_t row = (size_t)seg->pages[position / per_page] * per_page + position % per_page;
    return &r->kv[row * s->shape.n_layer + layer];
}

static void pass_begin_flight(sim *s, sim_router *r, uint32_t flight, uint32_t row0, uint32_t n_row)
{
    sim_pass *p = &r->pass;
    uint32_t slot0 = row0 * s->shape.topk;
    rt_xcore_begin(r->exchange, flight,
                   &(rt_xcore_layer){.step = p->step.number,
                                     .layer = p->layer,
                                     .n_row = n_row,
                                     .experts = p->experts + slot0,
                                     .weights = p->weights + slot0,
                                     .codes = p->codes + (size_t)row0 * SIM_D,
                                     .scales = p->scales + row0,
                                     .results = p->results + (size_t)slot0 * SIM_D});
    p->n_flying++;
}

/* In one flight or two, cut anywhere: by the step and the layer, so that no other draw is moved by it. */
static void pass_fly(sim *s, sim_router *r)
{
    uint32_t n_row = r->pass.step.n_row, cut = n_row,
             what = (uint32_t)r->pass.step.number * 31 + r->pass.layer * 7;
    if (n_row > 1 && what % 3 != 0) {
        cut = 1 + what % (n_row - 1);
        pass_begin_flight(s, r, 1, cut, n_row - cut);
    }
    pass_begin_flight(s, r, 0, 0, cut);
}

/* Attention and gate of all rows; then their experts are asked. */
static void pass_begin_layer(sim *s, sim_router *r)
{
    sim_pass *p = &r->pass;
    uint32_t row = 0, topk = s->shape.topk;
    for (uint32_t i = 0; i < p->step.n_seg; i++) {
        const rt_step_seg *seg = &p->step.segs[i];
        for (uint32_t k = 0; k < seg->n_row; k++, row++) {
            uint32_t position = seg->pos0 + k;
            uint64_t before = position > 0 ? *router_kv(s, r, seg, position - 1, p->layer) : 0;
            sim_expert_choice choice;
            p->hidden[row] =
                sim_model_attend(p->hidden[row], before, p->layer, router_kv(s, r, seg, position, p->layer));
            sim_model_row(p->hidden[row], p->codes + (size_t)row * SIM_D, p->scales + row);
            sim_model_gate(&s->shape, p->hidden[row], p->layer, &choice);
            for (uint32_t e = 0; e < topk; e++) {
                r->load[p->layer * s->shape.n_expert + (uint32_t)choice.expert[e]]++;
            }
            memcpy(p->experts + (size_t)row * topk, choice.expert, sizeof(int32_t) * topk);
            memcpy(p->weights + (size_t)row * topk, choice.weight, sizeof(float) * topk);
        }
    }
    memset(p->results, 0, sizeof(uint16_t) * p->step.n_row * topk * SIM_D);
    p->exchanging = true;
    s->counts.exchanges++;
    pass_fly(s, r);
}

/* What was kept is what the pages say. */
static void pass_load(sim *s, sim_router *r)
{
    const rt_step *step = &r->pass.step;
    for (uint32_t i = 0; i < step->n_load; i++) {
        const rt_step_state *load = &step->loads[i];
        const rt_step_seg *seg = &step->segs[load->seg];
        uint64_t kv = *router_kv(s, r, seg, load->pos - 1, s->shape.n_layer - 1);
        if (load->state >= s->shape.state_max || load->pos != seg->pos0 || r->states[load->state] != kv) {
            sim_fail(s, "state %u is not that of position %u", load->state, load->pos);
        }
        if (r->written[load->state] != r->n_forgets) {
            sim_fail(s, "state %u was to be forgotten", load->state);
        }
    }
    s->counts.gone_on += step->n_load;
}

static void pass_save(sim *s, sim_router *r)
{
    const rt_step *step = &r->pass.step;
    for (uint32_t i = 0; i < step->n_save; i++) {
        const rt_step_state *to = &step->saves[i];
        r->states[to->state] = *router_kv(s, r, &step->segs[to->seg], to->pos - 1, s->shape.n_layer - 1);
        r->written[to->state] = r->n_forgets;
    }
}

static void pass_begin(sim *s, sim_router *r)
{
    sim_pass *p = &r->pass;
    uint32_t row = 0;
    pass_load(s, r);
    for (uint32_t i = 0; i < p->step.n_seg; i++) {
        for (uint32_t k = 0; k < p->step.segs[i].n_row; k++) {
            p->hidden[row++] = sim_model_embed(p->step.segs[i].tokens[k]);
        }
    }
    p->busy = true;
    p->layer = 0;
    p->exchanging = false;
    p->compute_until_us = s->now_us + sim_between(s, SIM_TIMES, 20, 400);
    s->counts.steps++;
}

/* Tokens as an engine draws them: one after another while the guess before was right; then guesses, seldom
 * right ones, of what follows. first: the segment's row in the step. */
static void pass_draw(sim *s, const sim_pass *p, const rt_step_seg *seg, uint32_t first, rt_step_result *out)
{
    const uint32_t *guesses = seg->tokens + seg->n_row - seg->n_draft;
    *out = (rt_step_result){.n_draft = seg->draft_want};
    do {
        uint32_t i = out->n_token++, row = seg->n_row - seg->n_draft - 1 + i;
        out->tokens[i] = sim_model_token(p->hidden[first + row], seg->sampler->seed, seg->pos0 + row + 1,
                                         seg->sampler, seg->stop_wait <= i);
    } while (out->n_token <= seg->n_draft && guesses[out->n_token - 1] == out->tokens[out->n_token - 1]);
    for (uint32_t i = 0; i < out->n_draft; i++) {
        out->drafts[i] = sim_below(s, SIM_TIMES, SIM_VOCAB);
    }
}

static void pass_end(sim *s, sim_router *r)
{
    sim_pass *p = &r->pass;
    uint32_t row = 0, n = 0;
    for (uint32_t i = 0; i < p->step.n_seg; i++) {
        const rt_step_seg *seg = &p->step.segs[i];
        if (seg->sample) {
            pass_draw(s, p, seg, row, &p->tokens[n++]);
        }
        row += seg->n_row;
    }
    p->busy = false;
    pass_save(s, r);
    rt_sched_complete(r->sched, sim_ms(s), 0, p->tokens, sim_gateways_word, r);
}

static void pass_layer_done(sim *s, sim_proc *proc, cm_status status, uint32_t expert)
{
    sim_router *r = proc->state;
    sim_pass *p = &r->pass;
    p->n_flying--;
    if (status == CM_OK && p->n_flying > 0) {
        return;
    }
    p->exchanging = false;
    if (status != CM_OK) {
        rt_xcore_drop(r->exchange, 0);
        rt_xcore_drop(r->exchange, 1);
        p->n_flying = 0;
        sim_trace(s, proc, "step %llu failed: layer %u expert %u: %s", (unsigned long long)p->step.number,
                  p->layer, expert, cm_status_text(status));
        p->busy = false;
        rt_sched_fail_step(r->sched, sim_ms(s), CM_E_UNAVAILABLE, "experts are not available",
                           sim_gateways_word, r);
        return;
    }
    for (uint32_t row = 0; row < p->step.n_row; row++) {
        p->hidden[row] = sim_model_combine(p->hidden[row], p->results + (size_t)row * s->shape.topk * SIM_D,
                                           s->shape.topk);
    }
    p->compute_until_us = s->now_us + sim_between(s, SIM_TIMES, 20, 400);
    if (++p->layer == s->shape.n_layer) {
        pass_end(s, r);
    }
}

/* ---- the exchange's wishes ---- */

static void router_chores(sim *s, sim_proc *proc)
{
    sim_router *r = proc->state;
    rt_xact act;
    while (rt_xcore_chore(r->exchange, sim_ms(s), &act)) {
        if (act.kind == RT_XACT_DISCONNECT) {
            sim_disconnect(s, act.handle);
        } else if (act.kind == RT_XACT_REPORT) {
            rt_xlink link = rt_xcore_link(r->exchange, act.rank);
            sim_trace(s, proc, "lost worker %u: %s", link.member_id, cm_status_text(act.status));
            pc_mcore_report(r->member.core, link.member_id, act.status);
            sim_member_act(s, proc, &r->member);
        } else if (act.kind == RT_XACT_CONNECT) {
            rt_xlink link = rt_xcore_link(r->exchange, act.rank);
            net_identity self = {rt_xcore_epoch(r->exchange)->cluster, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER,
                                 rt_xcore_self(r->exchange)};
            rt_xcore_connecting(r->exchange, sim_ms(s), act.rank,
                                sim_connect(s, proc, SIM_ROWS, link.address, &self));
        }
    }
}

static void router_send(sim *s, sim_proc *proc, const rt_xact *act)
{
    sim_router *r = proc->state;
    pr_dispatch header;
    uint8_t *payload = r->staging + act->staged_at;
    rt_xcore_pack(r->exchange, act->flight, act->part, &header, payload);
    cm_status status =
        sim_send(s, act->handle, PR_MSG_DISPATCH, &header, sizeof(header), payload,
                 rt_xcore_payload_bytes(r->exchange, act->flight, act->part),
                 (void *)(uintptr_t)(act->flight + 1)); /* which flight's memory it stands in */
    sim_trace(s, proc, "asks exchange %u of step %llu layer %u epoch %llu: %u slots of rank %u: %s",
              header.head.exchange, (unsigned long long)header.head.step, header.head.layer,
              (unsigned long long)header.head.epoch, header.n_slot, act->rank, cm_status_text(status));
    r->asked[header.head.exchange % SIM_ASKED_MAX] = (sim_asked){.end = act->handle, .head = header.head};
    rt_xcore_sent(r->exchange, status);
}

/* As far as the layer goes now; when it wants to be asked again. */
static uint64_t router_exchange(sim *s, sim_proc *proc)
{
    sim_router *r = proc->state;
    for (;;) {
        rt_xact act = rt_xcore_next(r->exchange, sim_ms(s));
        if (act.kind == RT_XACT_SEND) {
            router_send(s, proc, &act);
        } else if (act.kind == RT_XACT_WAIT) {
            return act.until_ms == UINT64_MAX ? SIM_NEVER : act.until_ms * SIM_MS;
        } else if (act.kind == RT_XACT_DONE) {
            pass_layer_done(s, proc, act.status, act.expert);
            return s->now_us;
        }
    }
}

static void router_rest(sim *s, sim_proc *proc)
{
    sim_router *r = proc->state;
    const pc_epoch *epoch = rt_xcore_epoch(r->exchange);
    r->resting = true;
    for (uint32_t rank = 0; rank < rt_xcore_n_link(r->exchange); rank++) {
        rt_xlink link = rt_xcore_link(r->exchange, rank);
        pr_idle header = {{.version = PR_FRAME_VERSION,
                           .router = rt_xcore_self(r->exchange),
                           .cluster = epoch->cluster,
                           .epoch = epoch->number,
                           .step = r->pass.step.number}};
        if (link.up) {
            cm_status status = sim_send(s, link.handle, PR_MSG_IDLE, &header, sizeof(header), NULL, 0, NULL);
            (void)status; /* a full queue means it is no news */
        }
    }
    (void)proc;
}

/* Begins or goes on with a step; when it wants to be woken. */
static uint64_t router_step(sim *s, sim_proc *proc)
{
    sim_router *r = proc->state;
    sim_pass *p = &r->pass;
    if (!p->busy && rt_sched_next(r->sched, sim_ms(s), &p->step)) {
        r->resting = false;
        pass_begin(s, r);
    }
    if (!p->busy) {
        if (!r->resting) {
            router_rest(s, proc);
        }
        uint64_t deadline_ms = rt_sched_next_deadline(r->sched);
        return deadline_ms == UINT64_MAX ? SIM_NEVER : deadline_ms * SIM_MS;
    }
    if (!p->exchanging) {
        if (s->now_us < p->compute_until_us) {
            return p->compute_until_us;
        }
        pass_begin_layer(s, r);
    }
    return router_exchange(s, proc);
}

static void router_tell_load(sim *s, sim_router *r)
{
    Baleen__Control__V1__ExpertLoad load = BALEEN__CONTROL__V1__EXPERT_LOAD__INIT;
    Baleen__Control__V1__MemberMessage word = BALEEN__CONTROL__V1__MEMBER_MESSAGE__INIT;
    if (s->now_us < r->load_at_us || !pc_mcore_connected(r->member.core) || r->member.end == NULL) {
        return;
    }
    r->load_at_us = s->now_us + s->shape.heartbeat_ms * SIM_MS;
    load.n_layer = s->shape.n_layer;
    load.n_expert = s->shape.n_expert;
    load.n_count = (size_t)s->shape.n_layer * s->shape.n_expert;
    load.count = r->load;
    word.word_case = BALEEN__CONTROL__V1__MEMBER_MESSAGE__WORD_EXPERT_LOAD;
    word.expert_load = &load;
    cm_bytes_clear(&r->packed);
    pr_pack(&word.base, &r->packed);
    if (sim_send(s, r->member.end, 0, NULL, 0, r->packed.data, r->packed.len, NULL) == CM_OK) {
        memset(r->load, 0, sizeof(r->load));
    }
}

/* ---- the process ---- */

static void router_finish(sim *s, void *arg, uint64_t tag)
{
    sim_proc *proc = arg;
    (void)tag;
    if (proc->alive) {
        sim_kill(s, proc, false);
    }
}

/* It asks to go; the coordinator lets gateways know first. */
static void router_leave(sim *s, sim_proc *proc)
{
    sim_router *r = proc->state;
    if (!r->leaving) {
        sim_trace(s, proc, "wants to leave");
        r->leaving = true;
        r->leave_until_us = s->now_us + ROUTER_DRAIN_MS * SIM_MS;
        pc_mcore_leave(r->member.core);
    }
}

/* No gateway chooses us any more; what one opened before is on its way. */
static void router_close_doors(sim *s, void *arg, uint64_t tag)
{
    sim_proc *proc = arg;
    if (proc->alive && !sim_put_off(s, proc, router_close_doors, arg, tag)) {
        sim_router *r = proc->state;
        r->draining = true;
        rt_sched_drain(r->sched);
        sim_go(s, proc);
    }
}

static void router_end_when_idle(sim *s, sim_proc *proc)
{
    sim_router *r = proc->state;
    rt_sched_ledger ledger;
    rt_sched_ledger_get(r->sched, &ledger);
    bool alone = r->leaving && !pc_mcore_connected(r->member.core);
    bool idle = ledger.n_seq == 0 && !r->pass.busy && sim_gateways_all_told(r);
    if (((r->draining || alone) && idle) || (r->leaving && s->now_us >= r->leave_until_us)) {
        sim_at(s, s->now_us, router_finish, proc, 0);
    }
}

static void router_news(sim *s, sim_proc *proc, const pc_mout *out)
{
    sim_router *r = proc->state;
    if (out->kind == PC_MOUT_COMMIT) {
        sim_check_followed(s, proc, out->value, &r->followed);
        rt_xcore_offer(r->exchange, out->value, pc_mcore_id(r->member.core));
        pc_mcore_committed(r->member.core, out->value->number);
    } else if (out->kind == PC_MOUT_PREPARE) {
        pc_mcore_prepared(r->member.core, out->value->number, CM_OK, NULL);
    } else if (out->kind == PC_MOUT_DRAIN) {
        s->hosts[proc->host].leaving = true;
        router_leave(s, proc);
        sim_at(s, s->now_us + ROUTER_DOORS_MS * SIM_MS, router_close_doors, proc, 0);
    } else if (out->kind == PC_MOUT_REFUSED) {
        sim_at(s, s->now_us, router_finish, proc, 0);
    }
}

static void router_up(sim *s, sim_proc *proc, sim_end *end)
{
    sim_router *r = proc->state;
    if (end->side == 0) {
        rt_xcore_up(r->exchange, end);
        return;
    }
    sim_gw_link *link = sim_gateways_find(r, NULL);
    if (link == NULL) {
        sim_disconnect(s, end);
        return;
    }
    link->end = end;
    rt_keep_owner_init(r->keep, &link->owner);
    TAILQ_INIT(&link->found);
}

static void router_down(sim *s, sim_proc *proc, sim_end *end, cm_status status)
{
    sim_router *r = proc->state;
    if (sim_member_down(s, proc, &r->member, end, status)) {
        return;
    }
    if (end->side == 0) {
        rt_xcore_down(r->exchange, sim_ms(s), end, status);
        return;
    }
    sim_gw_link *link = sim_gateways_find(r, end);
    if (link != NULL) {
        sim_gateways_lose(r, sim_ms(s), link);
    }
}

static void router_answer(sim *s, sim_proc *proc, sim_end *end, const sim_message *m)
{
    sim_router *r = proc->state;
    cm_error err = {0};
    cm_status status =
        m->type == PR_MSG_COMBINE
            ? rt_xcore_combine(r->exchange, end, m->header, m->header_bytes, m->data, m->n_bytes, &err)
            : rt_xcore_refuse(r->exchange, end, m->header, m->header_bytes, &err);
    const pr_frame_head *head = (const pr_frame_head *)m->header;
    if (status == CM_OK) {
        sim_check_answer(s, proc, r->asked, end, head, r->pass.step.number, r->pass.layer,
                         rt_xcore_epoch(r->exchange)->number);
    }
    sim_trace(s, proc, "%s exchange %u: %s", m->type == PR_MSG_COMBINE ? "answer to" : "refusal of",
              head->exchange, status == CM_OK ? "taken" : err.text);
}

static void router_message(sim *s, sim_proc *proc, sim_end *end, const sim_message *m)
{
    sim_router *r = proc->state;
    sim_gw_link *link = sim_gateways_find(r, end);
    if (sim_member_message(s, proc, &r->member, end, m)) {
        return;
    }
    if (m->type == PR_MSG_COMBINE || m->type == PR_MSG_REFUSE) {
        router_answer(s, proc, end, m);
    } else if (link != NULL) {
        sim_gateways_heard(s, r, link, m);
    }
}

static void router_sent(sim *s, sim_proc *proc, void *cookie)
{
    sim_router *r = proc->state;
    (void)s;
    rt_xcore_left(r->exchange, (uint32_t)(uintptr_t)cookie - 1);
}

static void router_check(sim *s, const sim_proc *proc)
{
    const sim_router *r = proc->state;
    rt_sched_ledger ledger;
    rt_keep_ledger kept;
    rt_sched_ledger_get(r->sched, &ledger);
    rt_keep_ledger_get(r->keep, &kept);
    if (ledger.n_slot > s->shape.slot_max || ledger.n_page + ledger.n_page_kept > s->shape.page_max ||
        ledger.n_state + ledger.n_state_writing > s->shape.state_max ||
        ledger.n_waiting > s->shape.queue_max + s->shape.slot_max) {
        sim_fail(s, "%s holds %u slots, %u pages, %u waiting", proc->name, ledger.n_slot, ledger.n_page,
                 ledger.n_waiting);
    }
    uint64_t n_log = kept.n_live; /* that may be over the bound: running or not told yet */
    for (uint32_t i = 0; i < SIM_ROUTER_GATEWAYS; i++) {
        n_log += r->gateways[i].end != NULL ? r->gateways[i].owner.n_untold : 0;
    }
    uint64_t logs_max = n_log * SIM_CONTEXT * sizeof(uint32_t);
    if (kept.n_ended > s->shape.kept_max || kept.n_bytes > s->shape.kept_bytes + logs_max ||
        kept.n_live > ledger.n_seq || (kept.n_live < ledger.n_seq && !r->pass.busy)) {
        sim_fail(s, "%s keeps %u running ones of %u, %u ended ones, %llu bytes", proc->name, kept.n_live,
                 ledger.n_seq, kept.n_ended, (unsigned long long)kept.n_bytes);
    }
}

static uint64_t router_pump(sim *s, sim_proc *proc)
{
    sim_router *r = proc->state;
    uint64_t wake_us = sim_member_pump(s, proc, &r->member);
    router_chores(s, proc);
    uint64_t step_us = router_step(s, proc), chore_ms = rt_xcore_chore_ms(r->exchange);
    rt_sched_words(r->sched, sim_gateways_word, r);
    sim_check_kept(s, proc, r->keep, r->watched);
    rt_keep_expire(r->keep, sim_ms(s));
    sim_gateways_flush(s, r);
    router_tell_load(s, r);
    router_check(s, proc);
    sim_check_kept(s, proc, r->keep, r->watched);
    router_end_when_idle(s, proc);
    uint64_t due_ms = rt_keep_due(r->keep);
    wake_us = step_us < wake_us ? step_us : wake_us;
    wake_us = due_ms != UINT64_MAX && due_ms * SIM_MS < wake_us ? due_ms * SIM_MS : wake_us;
    wake_us = r->leaving && r->leave_until_us < wake_us ? r->leave_until_us : wake_us;
    return chore_ms != UINT64_MAX && chore_ms * SIM_MS < wake_us ? chore_ms * SIM_MS : wake_us;
}

static net_identity router_identity(const sim_proc *proc)
{
    const sim_router *r = proc->state;
    return (net_identity){pc_mcore_cluster(r->member.core), BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER,
                          pc_mcore_id(r->member.core)};
}

static void router_no_word(void *ctx, const rt_word *word)
{
    (void)ctx;
    (void)word;
}

static void router_end(sim *s, sim_proc *proc)
{
    sim_router *r = proc->state;
    sim_pass *p = &r->pass;
    rt_sched_ledger ledger;
    rt_sched_ledger_get(r->sched, &ledger);
    s->counts.preempted += ledger.n_preempted;
    s->counts.hit_tokens += ledger.n_hit_token;
    s->counts.retries += rt_xcore_n_retries(r->exchange);
    if (p->busy) {
        rt_sched_fail_step(r->sched, sim_ms(s), CM_E_CANCELLED, NULL, router_no_word, NULL);
    }
    for (uint32_t i = 0; i < SIM_ROUTER_GATEWAYS; i++) {
        if (r->gateways[i].end != NULL) {
            sim_gateways_lose(r, sim_ms(s), &r->gateways[i]);
        }
    }
    rt_keep_destroy(r->keep);
    rt_sched_destroy(r->sched);
    rt_xcore_destroy(r->exchange);
    sim_member_fini(&r->member);
    cm_arena_fini(&r->arena);
    cm_bytes_fini(&r->packed);
    cm_free(r->staging);
    cm_free(r->kv);
    cm_free(r->states);
    cm_free(r->written);
    cm_free(p->hidden);
    cm_free(p->codes);
    cm_free(p->scales);
    cm_free(p->experts);
    cm_free(p->weights);
    cm_free(p->results);
    cm_free(p->tokens);
    cm_free(r);
}

static const sim_ops router_ops = {.up = router_up,
                                   .down = router_down,
                                   .message = router_message,
                                   .sent = router_sent,
                                   .pump = router_pump,
                                   .identity = router_identity,
                                   .end = router_end};

static void pass_init(const sim_shape *shape, sim_pass *p)
{
    size_t n = shape->row_max, n_slot = n * shape->topk;
    p->hidden = cm_alloc(sizeof(uint64_t) * n);
    p->codes = cm_alloc(n * SIM_D);
    p->scales = cm_alloc(n);
    p->experts = cm_alloc(sizeof(int32_t) * n_slot);
    p->weights = cm_alloc(sizeof(float) * n_slot);
    p->results = cm_alloc(sizeof(uint16_t) * n_slot * SIM_D);
    p->tokens = cm_alloc(sizeof(rt_step_result) * shape->slot_max);
}

void sim_router_start(sim *s, sim_proc *proc)
{
    const sim_shape *shape = &s->shape;
    sim_router *r = cm_alloc(sizeof(*r));
    proc->ops = &router_ops;
    proc->state = r;
    r->sched = rt_sched_create(&(rt_sched_limits){.slot_max = shape->slot_max,
                                                  .queue_max = shape->queue_max,
                                                  .row_max = shape->row_max,
                                                  .chunk_max = shape->chunk_max,
                                                  .page_max = shape->page_max,
                                                  .page_tokens = shape->page_tokens,
                                                  .context = SIM_CONTEXT,
                                                  .vocab = SIM_VOCAB,
                                                  .draft_max = shape->draft_max,
                                                  .state_max = shape->state_max,
                                                  .draft_always = true});
    r->world = s;
    r->proc = proc;
    r->keep = rt_keep_create(&(rt_keep_limits){.live_max = shape->slot_max + shape->queue_max,
                                               .ended_max = shape->kept_max,
                                               .bytes_max = shape->kept_bytes,
                                               .grace_ms = shape->keep_ms},
                             r->sched);
    r->exchange = rt_xcore_create(&(rt_xcore_options){.limits = {.row_max = shape->row_max,
                                                                 .topk = shape->topk,
                                                                 .d = SIM_D,
                                                                 .frame_bytes_max = shape->frame_bytes},
                                                      .answer_ms = (uint32_t)shape->answer_ms,
                                                      .wait_ms = (uint32_t)shape->wait_ms});
    r->staging = cm_alloc_aligned(rt_xcore_staging_bytes(r->exchange));
    r->states = cm_alloc(sizeof(uint64_t) * shape->state_max);
    r->written = cm_alloc(sizeof(uint64_t) * shape->state_max);
    r->kv = cm_alloc(sizeof(uint64_t) * shape->page_max * shape->page_tokens * shape->n_layer);
    pass_init(shape, &r->pass);
    r->resting = true;
    cm_arena_init(&r->arena, "sim open", 16 << 10, 4 << 20);
    cm_bytes_init(&r->packed, 0);
    sim_member_init(s, proc, &r->member, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER, true, router_news);
    sim_member_act(s, proc, &r->member);
}

void sim_router_leave(sim *s, sim_proc *proc)
{
    router_leave(s, proc);
    sim_member_act(s, proc, &((sim_router *)proc->state)->member);
    sim_go(s, proc);
}

void sim_router_ledger(const sim_proc *proc, char *text, size_t cap)
{
    const sim_router *r = proc->state;
    rt_sched_ledger ledger;
    rt_sched_ledger_get(r->sched, &ledger);
    text[0] = 0;
    rt_keep_ledger kept;
    rt_keep_ledger_get(r->keep, &kept);
    if (ledger.n_seq + ledger.n_slot + ledger.n_page + ledger.n_state_writing + rt_xcore_n_open(r->exchange) >
        0) {
        snprintf(text, cap, "%u sequences, %u slots, %u pages, %u frames", ledger.n_seq, ledger.n_slot,
                 ledger.n_page, rt_xcore_n_open(r->exchange));
    } else if (kept.n_live + kept.n_orphan + kept.n_ended + kept.n_bytes > 0) {
        snprintf(text, cap, "%u running, %u nobody's, %u ended sequences, %llu bytes are kept", kept.n_live,
                 kept.n_orphan, kept.n_ended, (unsigned long long)kept.n_bytes);
    }
}
