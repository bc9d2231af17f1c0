#include "tools/baleen/launcher.h"

#include <unistd.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/proc/rpc_client.h"
#include "proto/control.pb-c.h"
#include "proto/pack.h"

enum { LAUNCHER_RETRY_MS = 500, LAUNCHER_PIDS_MAX = 1024, LAUNCHER_ARENA_BYTES = 4096 };

struct launcher {
    launcher_events events;
    pc_channel *channel;
    pc_stream *stream; /* NULL between two */
    pc_timer *retry;
    uint32_t pids[LAUNCHER_PIDS_MAX];
};

static void launcher_say(launcher *self)
{
    char host[256] = "";
    cm_bytes packed;
    Baleen__Control__V1__LauncherState state = BALEEN__CONTROL__V1__LAUNCHER_STATE__INIT;
    gethostname(host, sizeof(host) - 1);
    state.host = host;
    state.worker_pid = self->pids;
    state.n_worker_pid = self->events.pids(self->events.ctx, self->pids, LAUNCHER_PIDS_MAX);
    cm_bytes_init(&packed, 0);
    pr_pack(&state.base, &packed);
    if (pc_stream_send(self->stream, packed.data, packed.len) != CM_OK) {
        pc_stream_cancel(self->stream); /* closed follows, and another try */
    }
    cm_bytes_fini(&packed);
}

static void launcher_message(void *ctx, const uint8_t *data, size_t n_bytes)
{
    launcher *self = ctx;
    cm_arena arena;
    Baleen__Control__V1__LaunchOrder *order;
    cm_arena_init(&arena, "order", LAUNCHER_ARENA_BYTES, LAUNCHER_ARENA_BYTES);
    if (pr_unpack(&baleen__control__v1__launch_order__descriptor, data, n_bytes, &arena,
                  (ProtobufCMessage **)&order) == CM_OK) {
        self->events.order(self->events.ctx, order->n_workers);
    }
    cm_arena_fini(&arena);
}

static void launcher_closed(void *ctx, pc_code code, const char *text)
{
    launcher *self = ctx;
    (void)code;
    (void)text;
    self->stream = NULL;
    pc_timer_set(self->retry, LAUNCHER_RETRY_MS);
}

static void launcher_connect(void *arg)
{
    static const pc_stream_events events = {.message = launcher_message, .closed = launcher_closed};
    launcher *self = arg;
    self->stream = pc_stream_open(self->channel, "/baleen.control.v1.Admin/Launch", &events, self, 0);
    launcher_say(self);
}

launcher *launcher_create(pc_loop *loop, const char *address, pc_tls *tls, const launcher_events *events)
{
    launcher *self = cm_alloc(sizeof(*self));
    self->events = *events;
    self->channel = pc_channel_create_tls(loop, address, tls);
    self->retry = pc_timer_create(loop, launcher_connect, self);
    launcher_connect(self);
    return self;
}

void launcher_changed(launcher *self)
{
    if (self != NULL && self->stream != NULL) {
        launcher_say(self);
    }
}

void launcher_destroy(launcher *self)
{
    if (self != NULL) {
        pc_channel_destroy(self->channel);
        pc_timer_destroy(self->retry);
        cm_free(self);
    }
}
