/* Clients: each has one request, asks until it has its whole answer, and compares every token with the
 * answer computed alone. A client whose gateway died, whose connection ended, or that was told why it failed,
 * comes back to any gateway for the rest; when nobody knows its stream any more it asks from the beginning.
 */
#include <string.h>

#include "tests/sim/sim.h"

enum { CLIENT_RETRY_MS = 200 };

static void client_ask(sim *s, void *arg, uint64_t tag);

static void client_ask_later(sim *s, sim_request *r)
{
    r->state = SIM_ASKING;
    r->gateway = NULL;
    sim_at(s, s->now_us + sim_between(s, SIM_TIMES, 50, CLIENT_RETRY_MS) * SIM_MS, client_ask, r, 0);
}

/* A gateway that answers the door. */
static sim_proc *client_gateway(sim *s)
{
    sim_proc *found[SIM_HOSTS_MAX];
    uint32_t n = 0;
    for (uint32_t host = 0; host < s->n_host; host++) {
        sim_proc *proc = s->hosts[host].proc;
        if (s->hosts[host].role == SIM_GATEWAY && proc != NULL && proc->alive &&
            s->now_us >= proc->paused_until_us) {
            found[n++] = proc;
        }
    }
    return n > 0 ? found[sim_below(s, SIM_TIMES, n)] : NULL;
}

static void client_give_up(sim *s, sim_request *r, uint64_t *count, const char *why)
{
    sim_trace(s, NULL, "request %u: %s", r->id, why);
    r->state = SIM_GONE;
    (*count)++;
}

/* From the beginning: sometimes under the same id, which the gateways then know from two requests. */
static cm_status client_begin(sim *s, sim_proc *gateway, sim_request *r)
{
    r->n_got = 0;
    if (r->n_try > 1 && sim_below(s, SIM_TIMES, 2) == 0) {
        uint64_t words[2] = {sim_draw(s, SIM_TIMES), sim_draw(s, SIM_TIMES)};
        memcpy(r->key, words, sizeof(r->key));
    }
    return sim_gateway_open(s, gateway, r);
}

static void client_ask(sim *s, void *arg, uint64_t tag)
{
    sim_request *r = arg;
    (void)tag;
    if (r->state != SIM_ASKING) {
        return;
    }
    if (s->now_us >= r->deadline_us) {
        client_give_up(s, r, &s->counts.expired, "its deadline passed");
        return;
    }
    sim_proc *gateway = client_gateway(s);
    r->n_try++;
    if (gateway == NULL) {
        client_ask_later(s, r);
        return;
    }
    bool resumes = r->n_got > 0 && r->streamed;
    sim_trace(s, gateway, "is asked for request %u, %u of %u tokens there", r->id, r->n_got, r->n_want);
    r->state = SIM_OPEN;
    r->gateway = gateway;
    r->visit++;
    if (resumes) {
        sim_gateway_resume(s, gateway, r);
    } else if (client_begin(s, gateway, r) != CM_OK) {
        client_ask_later(s, r);
    }
    sim_go(s, gateway);
}

static void client_cancel(sim *s, void *arg, uint64_t tag)
{
    sim_request *r = arg;
    sim_proc *gateway = r->gateway;
    if (r->state == SIM_OPEN && sim_put_off(s, gateway, client_cancel, arg, tag)) {
        return;
    }
    if (r->state == SIM_OPEN) {
        sim_gateway_leave(s, gateway, r, false);
        client_give_up(s, r, &s->counts.cancelled, "its client goes away");
        sim_go(s, gateway);
    } else if (r->state == SIM_ASKING) {
        client_give_up(s, r, &s->counts.cancelled, "its client goes away");
    }
}

/* Its connection ends; unnoticed: for the client only. */
static void client_drop(sim *s, void *arg, uint64_t unnoticed)
{
    sim_request *r = arg;
    sim_proc *gateway = r->gateway;
    if (r->state != SIM_OPEN || (unnoticed == 0 && sim_put_off(s, gateway, client_drop, arg, unnoticed))) {
        return;
    }
    sim_trace(s, gateway, "request %u: its client's connection ends%s", r->id,
              unnoticed != 0 ? ", unnoticed" : "");
    if (unnoticed == 0) {
        sim_gateway_leave(s, gateway, r, r->resumable);
    }
    client_ask_later(s, r);
    if (unnoticed == 0) {
        sim_go(s, gateway);
    }
}

/* ---- answers ---- */

void sim_client_tokens(sim *s, sim_request *r, uint64_t offset, const uint32_t *ids, uint32_t n)
{
    if (offset != r->n_got) {
        sim_fail(s, "request %u got tokens at offset %llu after %u", r->id, (unsigned long long)offset,
                 r->n_got);
    }
    for (uint32_t i = 0; i < n; i++) {
        if (r->n_got >= r->n_want || ids[i] != r->want[r->n_got]) {
            sim_fail(s, "request %u: token %u is %u, undisturbed it is %d", r->id, r->n_got, ids[i],
                     r->n_got < r->n_want ? (int)r->want[r->n_got] : -1);
        }
        r->got[r->n_got++] = ids[i];
        s->counts.tokens++;
    }
    sim_trace(s, NULL, "request %u has %u of %u tokens", r->id, r->n_got, r->n_want);
}

void sim_client_end(sim *s, sim_request *r, rt_seq_end end)
{
    if (r->n_got != r->n_want || end != r->want_end) {
        sim_fail(s, "request %u ended (%d) after %u tokens, undisturbed (%d) after %u", r->id, (int)end,
                 r->n_got, (int)r->want_end, r->n_want);
    }
    r->state = SIM_DONE;
    s->counts.done++;
    sim_trace(s, NULL, "request %u is done", r->id);
}

void sim_client_failed(sim *s, sim_request *r, cm_status status, const char *text)
{
    sim_trace(s, NULL, "request %u is told: %s: %s", r->id, cm_status_text(status), text);
    if (status == CM_E_DEADLINE && r->deadline_us != SIM_NEVER) {
        if (s->now_us + SIM_MS < r->deadline_us) { /* a millisecond: what is left is rounded down */
            sim_fail(s, "request %u was told of its deadline too early", r->id);
        }
        client_give_up(s, r, &s->counts.expired, "its deadline passed");
        return;
    }
    if (status == CM_E_NOT_FOUND) {
        r->n_got = 0; /* the old answer is worth nothing any more */
    } else if (status != CM_E_UNAVAILABLE && status != CM_E_CAPACITY && status != CM_E_CANCELLED &&
               status != CM_E_REFUSED) {
        sim_fail(s, "request %u failed: %s: %s", r->id, cm_status_name(status), text);
    }
    s->counts.told_busy += status == CM_E_CAPACITY;
    s->counts.told_unavailable += status != CM_E_CAPACITY;
    client_ask_later(s, r);
}

void sim_client_lost(sim *s, sim_request *r)
{
    if (r->state == SIM_OPEN) {
        client_ask_later(s, r);
    }
}

bool sim_clients_finished(const sim *s)
{
    for (uint32_t i = 0; i < s->shape.n_request; i++) {
        if (s->requests[i].state == SIM_ASKING || s->requests[i].state == SIM_OPEN) {
            return false;
        }
    }
    return true;
}

/* ---- what is asked ---- */

static void request_draw(sim *s, sim_request *r, uint32_t id)
{
    rt_sampler *sampler = &r->sampler;
    r->id = id;
    r->n_prompt = sim_between(s, SIM_WORK, 1, 24);
    for (uint32_t i = 0; i < r->n_prompt; i++) {
        r->prompt[i] = sim_below(s, SIM_WORK, SIM_VOCAB);
    }
    if (id > 0 && sim_below(s, SIM_WORK, 2) == 0) { /* it begins as an earlier one does, or is the same */
        const sim_request *like = &s->requests[sim_below(s, SIM_WORK, id)];
        memcpy(r->prompt, like->prompt,
               sizeof(uint32_t) * (like->n_prompt < r->n_prompt ? like->n_prompt : r->n_prompt));
    }
    sampler->seed = sim_draw(s, SIM_WORK);
    sampler->top_p = 1;
    sampler->tokens_max = sim_between(s, SIM_WORK, 1, SIM_CONTEXT - 28);
    sampler->tokens_min = sim_below(s, SIM_WORK, 4);
    if (sampler->tokens_min > sampler->tokens_max) {
        sampler->tokens_min = sampler->tokens_max;
    }
    sampler->n_stop = sim_below(s, SIM_WORK, SIM_STOPS_MAX + 1);
    for (uint32_t i = 0; i < sampler->n_stop; i++) {
        sampler->stop[i] = (sim_below(s, SIM_WORK, SIM_VOCAB / SIM_STOPS_MAX) * SIM_STOPS_MAX) + i;
    }
    sim_model_answer(&s->shape, r->prompt, r->n_prompt, sampler, r->want, &r->n_want, &r->want_end);
    if (sim_below(s, SIM_WORK, 4) == 0 && r->n_want > 1) { /* a stop string, which routers do not know */
        r->finish_at = sim_between(s, SIM_WORK, 1, r->n_want - 1);
        r->n_want = r->finish_at;
        r->want_end = RT_END_STOP;
    }
    uint64_t words[2] = {sim_draw(s, SIM_WORK), sim_draw(s, SIM_WORK)};
    memcpy(r->key, words, sizeof(r->key));
    r->streamed = sim_below(s, SIM_WORK, 5) > 0;
    r->resumable = r->streamed && sim_below(s, SIM_WORK, 2) == 0;
    r->start_us = s->now_us + sim_below(s, SIM_WORK, (uint32_t)(s->shape.storm_us / SIM_MS)) * SIM_MS;
    r->cancel_us = r->deadline_us = SIM_NEVER;
    if (sim_strikes(s, SIM_FAULT_client_cancels)) {
        r->cancel_us = r->start_us + sim_below(s, SIM_WORK, 3000000);
    }
    if (sim_strikes(s, SIM_FAULT_client_deadline)) {
        r->deadline_us = r->start_us + sim_between(s, SIM_WORK, 1, 4000) * SIM_MS;
    }
}

static void request_draw_drop(sim *s, sim_request *r, sim_fault fault)
{
    if (sim_strikes(s, fault)) {
        uint64_t at_us = r->start_us + sim_between(s, SIM_WORK, 1, 2000000);
        sim_at(s, at_us, client_drop, r, fault == SIM_FAULT_client_vanishes);
    }
}

void sim_clients_start(sim *s)
{
    s->requests = cm_alloc(sizeof(sim_request) * s->shape.n_request);
    for (uint32_t i = 0; i < s->shape.n_request; i++) {
        sim_request *r = &s->requests[i];
        request_draw(s, r, i);
        sim_at(s, r->start_us, client_ask, r, 0);
        if (r->cancel_us != SIM_NEVER) {
            sim_at(s, r->cancel_us, client_cancel, r, 0);
        }
        request_draw_drop(s, r, SIM_FAULT_client_drops);
        request_draw_drop(s, r, SIM_FAULT_client_vanishes);
    }
}
