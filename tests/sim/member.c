/* A member's session over a simulated link: the machine's words packed and unpacked as in production. */
#include <string.h>

#include "proto/pack.h"
#include "tests/sim/sim.h"

void sim_member_init(sim *s, sim_proc *proc, sim_member *member, uint32_t role, bool has_data,
                     void (*news)(sim *s, sim_proc *proc, const pc_mout *out))
{
    const pc_addresses coordinators = {.n = s->shape.n_coordinator, .text = {"c0", "c1"}};
    bool worker = role == BALEEN__CONTROL__V1__ROLE__ROLE_WORKER;
    pc_mself self = {.coordinators = &coordinators,
                     .role = role,
                     .incarnation = sim_mix(s->seed, 1000 + proc->id),
                     .pid = proc->id,
                     .host = "sim",
                     .data_address = has_data ? proc->name : NULL,
                     .fingerprint = "0123456789abcdef0123456789abcdef",
                     .expert_bytes_max = worker ? s->shape.experts_max * 10ull : 0,
                     .n_layer = s->shape.n_layer,
                     .n_expert = s->shape.n_expert,
                     .expert_bytes = 10};
    member->news = news;
    cm_arena_init(&member->arena, "sim member", 16 << 10, 4 << 20);
    cm_bytes_init(&member->packed, 0);
    member->core = pc_mcore_create(&self, sim_ms(s));
}

void sim_member_fini(sim_member *member)
{
    pc_mcore_destroy(member->core);
    cm_arena_fini(&member->arena);
    cm_bytes_fini(&member->packed);
}

static void member_say(sim *s, sim_proc *proc, sim_member *member, const pc_mout *out)
{
    if (out->kind != PC_MOUT_HEARTBEAT) {
        static const char *const names[] = {"open",      "hello",  "heartbeat", "prepared",
                                            "committed", "report", "leaving"};
        sim_trace(s, proc, "says %s %llu %s", names[out->kind], (unsigned long long)out->epoch,
                  cm_status_text(out->status));
    }
    cm_bytes_clear(&member->packed);
    pc_mcore_word(member->core, out, NULL, 0, &member->packed);
    cm_status status = CM_E_RESET;
    if (member->end != NULL) {
        status = sim_send(s, member->end, 0, NULL, 0, member->packed.data, member->packed.len, NULL);
    }
    if (status != CM_OK) {
        sim_trace(s, proc, "could not say it: %s", cm_status_text(status));
    }
}

/* The end of a session is told apart from what brought it. */
static void member_closed(sim *s, void *arg, uint64_t tag)
{
    sim_proc *proc = arg;
    (void)tag;
    if (proc->alive && !sim_put_off(s, proc, member_closed, arg, tag)) {
        proc->ops->down(s, proc, NULL, CM_E_CANCELLED);
        sim_go(s, proc);
    }
}

static void member_cancel(sim *s, sim_proc *proc, sim_member *member)
{
    if (member->end != NULL) {
        sim_disconnect(s, member->end);
        member->end = NULL;
        sim_at(s, s->now_us, member_closed, proc, 0);
    }
}

void sim_member_act(sim *s, sim_proc *proc, sim_member *member)
{
    pc_mout out;
    while (pc_mcore_next(member->core, &out)) {
        switch (out.kind) {
        case PC_MOUT_OPEN:
            member->end = sim_connect(s, proc, SIM_CONTROL, out.text, NULL);
            break;
        case PC_MOUT_HELLO:
        case PC_MOUT_HEARTBEAT:
        case PC_MOUT_PREPARED:
        case PC_MOUT_COMMITTED:
        case PC_MOUT_REPORT:
        case PC_MOUT_LEAVING:
            member_say(s, proc, member, &out);
            break;
        case PC_MOUT_CANCEL:
            member_cancel(s, proc, member);
            break;
        case PC_MOUT_NOTE:
            sim_trace(s, proc, "notes: %s", out.text);
            break;
        default:
            member->news(s, proc, &out);
        }
        pc_epoch_release(out.value);
    }
}

bool sim_member_message(sim *s, sim_proc *proc, sim_member *member, sim_end *end, const sim_message *message)
{
    ProtobufCMessage *word;
    if (sim_end_class(end) != SIM_CONTROL) {
        return false;
    }
    if (end != member->end || pc_mcore_deaf(member->core)) {
        return true;
    }
    cm_arena_reset(&member->arena);
    if (pr_unpack(&baleen__control__v1__coordinator_message__descriptor, message->data, message->n_bytes,
                  &member->arena, &word) != CM_OK) {
        sim_fail(s, "%s cannot read a word of the coordinator", proc->name);
    }
    pc_mcore_hear(member->core, sim_ms(s), (const Baleen__Control__V1__CoordinatorMessage *)word);
    sim_member_act(s, proc, member);
    return true;
}

bool sim_member_down(sim *s, sim_proc *proc, sim_member *member, sim_end *end, cm_status status)
{
    if (end != NULL && end != member->end) {
        return false;
    }
    if (end != NULL || member->end == NULL) {
        member->end = NULL;
        pc_mcore_closed(member->core, sim_ms(s), status == CM_OK, "link lost");
        sim_member_act(s, proc, member);
    }
    return true;
}

uint64_t sim_member_pump(sim *s, sim_proc *proc, sim_member *member)
{
    pc_mcore_tick(member->core, sim_ms(s));
    sim_member_act(s, proc, member);
    uint64_t wake_ms = pc_mcore_wake_ms(member->core);
    return wake_ms == UINT64_MAX ? SIM_NEVER : wake_ms * SIM_MS;
}
