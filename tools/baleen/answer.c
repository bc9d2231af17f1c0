#include "tools/baleen/answer.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "proto/pack.h"

enum { ANSWER_ARENA_CHUNK_BYTES = 64 << 10, ANSWER_ARENA_BYTES_MAX = 64 << 20, ANSWER_BYTES_MAX = 64 << 20 };

typedef struct answer_run {
    answer *answer;
    pc_loop *loop;
    pc_stream *stream;
    cm_arena arena; /* of one event */
    bool dim;       /* stderr is in the dimmed state */
    bool finished, closed;
    uint64_t asked_ms, first_ms, last_ms;
    Baleen__V1__FinishReason reason;
    uint32_t n_tokens, n_reasoning;
    cm_status status;
    cm_error *err;
} answer_run;

void answer_init(answer *self)
{
    *self = (answer){.cancelled = false};
    cm_bytes_init(&self->content, ANSWER_BYTES_MAX);
    cm_bytes_init(&self->reasoning, ANSWER_BYTES_MAX);
}

void answer_fini(answer *self)
{
    cm_bytes_fini(&self->content);
    cm_bytes_fini(&self->reasoning);
}

/* ---- showing ---- */

static void show_thinking(answer_run *run, const char *text)
{
    if (!run->dim && isatty(STDERR_FILENO)) {
        fputs("\033[2m", stderr);
        run->dim = true;
    }
    fputs(text, stderr);
    fflush(stderr);
    cm_bytes_append_text(&run->answer->reasoning, text);
}

static void end_thinking(answer_run *run)
{
    if (run->dim) {
        fputs("\033[0m", stderr);
        run->dim = false;
    }
    if (run->answer->reasoning.len > 0 && run->answer->content.len == 0) {
        fputs("\n\n", stderr);
    }
    fflush(stderr);
}

static void show_content(answer_run *run, const char *text)
{
    if (run->answer->content.len == 0) {
        end_thinking(run);
    }
    fputs(text, stdout);
    fflush(stdout);
    cm_bytes_append_text(&run->answer->content, text);
}

/* We offer no tools, but a model may try. */
static void show_tool_call(answer_run *run, const Baleen__V1__ToolCallDelta *call)
{
    end_thinking(run);
    if (call->name != NULL) {
        fprintf(stderr, "\n[calls tool %s] ", call->name);
    }
    if (call->arguments != NULL) {
        fputs(call->arguments, stderr);
    }
}

static void show_numbers(const answer_run *run)
{
    double first_s = (double)(run->first_ms - run->asked_ms) / 1e3,
           rest_s = (double)(run->last_ms - run->first_ms) / 1e3;
    fprintf(stderr, "[%u tokens", run->n_tokens);
    if (run->n_reasoning > 0) {
        fprintf(stderr, ", %u of them thinking", run->n_reasoning);
    }
    if (run->first_ms != 0) {
        fprintf(stderr, "; first after %.2f s", first_s);
    }
    if (run->n_tokens > 1 && rest_s > 0) {
        fprintf(stderr, ", then %.1f tok/s", (double)(run->n_tokens - 1) / rest_s);
    }
    if (run->reason == BALEEN__V1__FINISH_REASON__FINISH_LENGTH) {
        fputs("; cut off: no tokens left (--max-tokens, or the end of the context)", stderr);
    } else if (run->reason == BALEEN__V1__FINISH_REASON__FINISH_CAPACITY) {
        fputs("; cut off: the cluster lacks capacity", stderr);
    }
    fputs("]\n", stderr);
}

/* ---- events of the stream ---- */

static void take_delta(answer_run *run, const Baleen__V1__ChatDelta *delta)
{
    run->last_ms = cm_now_ms();
    run->first_ms = run->first_ms == 0 ? run->last_ms : run->first_ms;
    switch (delta->piece_case) {
    case BALEEN__V1__CHAT_DELTA__PIECE_REASONING:
        show_thinking(run, delta->reasoning);
        break;
    case BALEEN__V1__CHAT_DELTA__PIECE_CONTENT:
        show_content(run, delta->content);
        break;
    case BALEEN__V1__CHAT_DELTA__PIECE_TOOL_CALL:
        show_tool_call(run, delta->tool_call);
        break;
    default:
        break; /* token ids without text */
    }
}

static void answer_message(void *ctx, const uint8_t *data, size_t n_bytes)
{
    answer_run *run = ctx;
    Baleen__V1__ChatEvent *event;
    cm_arena_reset(&run->arena);
    cm_status status = pr_unpack(&baleen__v1__chat_event__descriptor, data, n_bytes, &run->arena,
                                 (ProtobufCMessage **)&event);
    if (status != CM_OK) {
        run->status =
            cm_error_set(run->err, CM_E_PROTOCOL, NULL, "the server sent something that is no chat event");
        pc_stream_cancel(run->stream);
        return;
    }
    if (event->event_case == BALEEN__V1__CHAT_EVENT__EVENT_DELTA) {
        take_delta(run, event->delta);
    } else if (event->event_case == BALEEN__V1__CHAT_EVENT__EVENT_FINISH) {
        run->finished = true;
        run->reason = event->finish->reason;
        run->n_tokens = event->finish->usage->completion_tokens;
        run->n_reasoning = event->finish->usage->reasoning_tokens;
    }
}

static void answer_closed(void *ctx, pc_code code, const char *text)
{
    answer_run *run = ctx;
    run->closed = true;
    if (run->status != CM_OK) {
        /* we broke it off ourselves */
    } else if (run->answer->cancelled) {
        run->status = cm_error_set(run->err, CM_E_CANCELLED, NULL, "cancelled");
    } else if (code != PC_CODE_OK) {
        run->status =
            cm_error_set(run->err, code == PC_CODE_UNAVAILABLE ? CM_E_UNAVAILABLE : CM_E_REFUSED, NULL,
                         "%s%s", code == PC_CODE_UNAVAILABLE ? "the gateway is unavailable: " : "",
                         text[0] != '\0' ? text : "it ended the call without a reason");
    } else if (!run->finished) {
        run->status = cm_error_set(run->err, CM_E_PROTOCOL, NULL, "the answer ended without its last event");
    }
    pc_loop_stop(run->loop);
}

static void answer_interrupted(evutil_socket_t number, short what, void *arg)
{
    answer_run *run = arg;
    (void)number;
    (void)what;
    run->answer->cancelled = true;
    if (!run->closed) {
        pc_stream_cancel(run->stream);
    }
}

static cm_status answer_stream(answer_run *run, pc_channel *channel, const Baleen__V1__ChatRequest *request)
{
    static const pc_stream_events events = {.message = answer_message, .closed = answer_closed};
    cm_bytes packed;
    cm_bytes_init(&packed, 0);
    pr_pack(&request->base, &packed);
    run->asked_ms = cm_now_ms();
    run->stream = pc_stream_open(channel, "/baleen.v1.Inference/Chat", &events, run, 0);
    cm_status status = pc_stream_send(run->stream, packed.data, packed.len);
    CM_ASSERT_MSG(status == CM_OK, "first message of a call: %s", cm_status_name(status));
    pc_stream_half_close(run->stream);
    while (!run->closed) {
        pc_loop_run(run->loop);
    }
    cm_bytes_fini(&packed);
    return run->status;
}

cm_status answer_ask(answer *self, pc_loop *loop, pc_channel *channel, const Baleen__V1__ChatRequest *request,
                     cm_error *err)
{
    answer_run run = {.answer = self, .loop = loop, .err = err, .status = CM_OK};
    /* only during an answer: at the prompt Ctrl-C ends us, as a person expects */
    struct event *interrupt = evsignal_new(pc_loop_base(loop), SIGINT, answer_interrupted, &run);
    CM_ASSERT(interrupt != NULL && evsignal_add(interrupt, NULL) == 0);
    cm_arena_init(&run.arena, "chat event", ANSWER_ARENA_CHUNK_BYTES, ANSWER_ARENA_BYTES_MAX);
    cm_status status = answer_stream(&run, channel, request);
    event_free(interrupt);
    end_thinking(&run);
    if (self->content.len > 0) {
        putchar('\n');
        fflush(stdout);
    }
    if (status == CM_OK) {
        show_numbers(&run);
    }
    cm_arena_fini(&run.arena);
    return status;
}
