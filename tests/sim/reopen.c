#include "tests/sim/gateway.h"

enum { REOPEN_PATIENCE_MS = 5000 };

void sim_reopen_place(sim *s, sim_gateway *g, sim_gw_stream *stream)
{
    stream->router = sim_gateway_pick(g);
    if (stream->router != NULL) {
        stream->number = ++g->next_number;
        stream->router->n_open++;
        sim_gateway_send_open(s, g, stream);
    } else if (stream->homeless_us == 0) {
        stream->homeless_us = s->now_us;
    }
    if (stream->router != NULL) {
        stream->homeless_us = 0;
    }
}

void sim_reopen_lost(sim *s, sim_gateway *g, sim_gw_stream *stream)
{
    sim_gateway_leave_router(s, g, stream, false);
    s->counts.reopened++;
    sim_reopen_place(s, g, stream);
}

void sim_reopen_refused(sim *s, sim_gateway *g, sim_gw_stream *stream)
{
    sim_gateway_leave_router(s, g, stream, true);
    s->counts.reopened++;
    sim_reopen_place(s, g, stream);
}

uint64_t sim_reopen_tick(sim *s, sim_gateway *g)
{
    uint64_t next_us = SIM_NEVER;
    sim_gw_stream *stream, *after;
    for (stream = TAILQ_FIRST(&g->streams); stream != NULL; stream = after) {
        after = TAILQ_NEXT(stream, link);
        if (stream->router == NULL) {
            sim_reopen_place(s, g, stream);
        }
        uint64_t until_us = stream->homeless_us + REOPEN_PATIENCE_MS * SIM_MS;
        if (stream->router != NULL) {
            continue;
        }
        if (s->now_us >= until_us) {
            sim_gateway_fail(s, g, stream, CM_E_UNAVAILABLE, "no router is connected");
        } else if (until_us < next_us) {
            next_us = until_us;
        }
    }
    return next_us;
}
