#include "coordinator/launcher.h"

#include <stdlib.h>
#include <string.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "proto/pack.h"

struct co_launcher {
    pc_call *call; /* NULL: none */
    char *host;
    uint32_t *pids; /* of the workers it runs */
    uint32_t n_pids;
};

co_launcher *co_launcher_create(void)
{
    return cm_alloc(sizeof(co_launcher));
}

static void launcher_forget(co_launcher *launcher)
{
    cm_free(launcher->host);
    cm_free(launcher->pids);
    *launcher = (co_launcher){0};
}

void co_launcher_destroy(co_launcher *launcher)
{
    if (launcher != NULL) {
        launcher_forget(launcher);
        cm_free(launcher);
    }
}

void co_launcher_take(co_launcher *launcher, pc_call *call, const Baleen__Control__V1__LauncherState *state)
{
    if (launcher->call != NULL && launcher->call != call) {
        pc_call_finish(launcher->call, PC_CODE_ABORTED, "another launcher has come", NULL, 0, 0);
    }
    launcher_forget(launcher);
    launcher->call = call;
    launcher->host = cm_strdup(state->host);
    launcher->n_pids = (uint32_t)state->n_worker_pid;
    launcher->pids = cm_alloc(sizeof(uint32_t) * launcher->n_pids);
    for (uint32_t i = 0; i < launcher->n_pids; i++) {
        launcher->pids[i] = state->worker_pid[i];
    }
}

void co_launcher_closed(co_launcher *launcher, const pc_call *call)
{
    if (launcher->call == call) {
        launcher_forget(launcher);
    }
}

static bool launcher_runs(const co_launcher *launcher, const co_peer *worker)
{
    if (worker->host == NULL || strcmp(worker->host, launcher->host) != 0) {
        return false;
    }
    for (uint32_t i = 0; i < launcher->n_pids; i++) {
        if (launcher->pids[i] == worker->pid) {
            return true;
        }
    }
    return false;
}

static int by_bytes(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Who goes is the launcher's choice, so the smallest must be able to do it. */
static cm_status scale_check_room(const co_core *core, uint64_t *bytes, uint32_t n_now, uint32_t n_workers,
                                  cm_error *err)
{
    uint64_t need = co_core_expert_bytes(core), room = 0;
    if (n_workers >= n_now) {
        return CM_OK;
    }
    qsort(bytes, n_now, sizeof(bytes[0]), by_bytes);
    for (uint32_t i = 0; i < n_workers; i++) {
        room += bytes[i] < need ? bytes[i] : need;
    }
    if (room >= need) {
        return CM_OK;
    }
    return cm_error_set(err, CM_E_CAPACITY, "workers",
                        "%u workers may hold %llu MB of experts, the model has %llu MB: keep more workers",
                        n_workers, (unsigned long long)(room >> 20), (unsigned long long)(need >> 20));
}

cm_status co_launcher_scale(co_launcher *launcher, const co_core *core, uint32_t n_workers, cm_error *err)
{
    if (launcher->call == NULL) {
        return cm_error_set(
            err, CM_E_UNAVAILABLE, "workers",
            "these workers were not started by baleen up: start more as the others were started "
            "(baleen-worker --coordinator ..), or take some away with baleen drain ID");
    }
    uint32_t n_now = 0, n_others = 0;
    uint64_t *bytes = cm_alloc(sizeof(uint64_t) * co_core_n_members(core));
    for (uint32_t i = 0; i < co_core_n_members(core); i++) {
        co_member_view view;
        co_core_member(core, i, &view);
        if (view.self->role == CO_ROLE_WORKER && view.session != 0 && view.state != CO_MEMBER_LEAVING) {
            bytes[n_now++] = view.self->expert_bytes_max;
            n_others += !launcher_runs(launcher, view.self);
        }
    }
    cm_status status = scale_check_room(core, bytes, n_now, n_workers, err);
    cm_free(bytes);
    CM_TRY(status);
    if (n_workers < n_others) {
        return cm_error_set(err, CM_E_CAPACITY, "workers",
                            "%u workers were not started by baleen up: take them away with baleen drain ID",
                            n_others);
    }
    Baleen__Control__V1__LaunchOrder order = BALEEN__CONTROL__V1__LAUNCH_ORDER__INIT;
    cm_bytes packed;
    order.n_workers = n_workers - n_others;
    cm_bytes_init(&packed, 0);
    pr_pack(&order.base, &packed);
    status = pc_call_send(launcher->call, packed.data, packed.len);
    cm_bytes_fini(&packed);
    return status;
}

void co_launcher_stop(co_launcher *launcher)
{
    if (launcher->call != NULL) {
        pc_call_finish(launcher->call, PC_CODE_UNAVAILABLE, "this coordinator is not the active one any more",
                       NULL, 0, 0);
    }
}
