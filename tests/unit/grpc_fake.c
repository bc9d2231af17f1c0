#include "tests/unit/grpc_fake.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"

void fake_init(gw_gateway *gateway, pc_loop *loop)
{
    cm_error err;
    *gateway = (gw_gateway){.loop = loop,
                            .info = {.model = "nano",
                                     .fingerprint = "fp_0123456789abcdef",
                                     .context = 4096,
                                     .bos_id = 0,
                                     .eos_id = 1,
                                     .profile = 'P',
                                     .ready = true,
                                     .epoch = 7,
                                     .running = 2,
                                     .waiting = 3,
                                     .kv_used = 0.25,
                                     .uptime_s = 12.5,
                                     .choices_max = 4}};
    assert_int_equal(md_tokenizer_open(BALEEN_NANO "/tokenizer.json", 0, &gateway->tokenizer, &err), CM_OK);
    gateway->info.vocab = md_tokenizer_vocab(gateway->tokenizer);
}

void fake_fini(gw_gateway *gateway)
{
    assert_int_equal(gateway->n_live, 0);
    for (uint32_t i = 0; i < gateway->n_streams; i++) {
        json_decref(gateway->streams[i].body);
    }
    md_tokenizer_close(gateway->tokenizer);
}

/* ---- streams ---- */

static void run_script(void *arg)
{
    gw_stream *stream = arg;
    if (!stream->over && stream->gateway->script != NULL) {
        stream->gateway->script(stream);
    }
}

static gw_stream *find(gw_gateway *gateway, const char *id)
{
    for (uint32_t i = 0; i < gateway->n_streams; i++) {
        if (!gateway->streams[i].over && strcmp(gateway->streams[i].id, id) == 0) {
            return &gateway->streams[i];
        }
    }
    return NULL;
}

struct gw_origin {
    uint32_t refs;
    char *id;
};

gw_origin *gw_origin_create(gw_ask_kind kind, const char *id, const char *surface, const json_t *body,
                            const json_t *options)
{
    gw_origin *origin = cm_alloc(sizeof(*origin));
    (void)kind;
    (void)surface;
    (void)body;
    (void)options;
    *origin = (gw_origin){.refs = 1, .id = cm_strdup(id != NULL ? id : "made-by-gateway")};
    return origin;
}

void gw_origin_release(gw_origin *origin)
{
    if (origin != NULL && --origin->refs == 0) {
        cm_free(origin->id);
        cm_free(origin);
    }
}

gw_origin *gw_origin_hold(gw_origin *origin)
{
    origin->refs++;
    return origin;
}

const char *gw_origin_id(const gw_origin *origin)
{
    return origin->id;
}

/* The one stream that may be found is gateway->found's. */
struct gw_seek {
    gw_gateway *gateway;
    char id[160];
    gw_seek_fn fn;
    void *ctx;
    pc_task task;
};

static void seek_tell(void *arg)
{
    gw_seek *seek = arg;
    gw_error error;
    static const uint64_t routers[] = {9, 10, 11, 12};
    const fake_found *has = &seek->gateway->found;
    uint32_t n = (uint32_t)json_integer_value(json_object_get(has->body, "n"));
    if (has->id == NULL || strcmp(has->id, seek->id) != 0) {
        gw_error_set(&error, GW_CAUSE_NO_STREAM, NULL, "the stream is unknown");
        seek->fn(seek->ctx, NULL, &error);
    } else {
        gw_found found = {.origin = gw_origin_create(GW_ASK_CHAT, seek->id, NULL, NULL, NULL),
                          .surface = has->surface,
                          .body = has->body,
                          .options = has->options,
                          .router = routers,
                          .n_router = n > 1 ? n : 1};
        seek->fn(seek->ctx, &found, NULL);
        gw_origin_release(found.origin);
    }
    cm_free(seek);
}

gw_seek *gw_seek_begin(gw_gateway *gateway, const gw_tenant *tenant, const char *id, gw_seek_fn fn, void *ctx)
{
    (void)tenant;
    gw_seek *seek = cm_alloc(sizeof(*seek));
    *seek = (gw_seek){.gateway = gateway, .fn = fn, .ctx = ctx, .task = {.fn = seek_tell, .arg = seek}};
    snprintf(seek->id, sizeof(seek->id), "%s", id);
    pc_loop_post(gateway->loop, &seek->task);
    return seek;
}

void gw_seek_cancel(gw_seek *seek)
{
    pc_loop_unpost(seek->gateway->loop, &seek->task);
    cm_free(seek);
}

cm_status gw_stream_open(gw_gateway *gateway, const gw_ask *ask, const gw_stream_events *events, void *ctx,
                         gw_stream **stream_out, gw_error *error_out)
{
    if (gateway->refuses) {
        *error_out = gateway->refusal;
        return CM_E_INVALID;
    }
    CM_TRY(gw_model_check(gateway, json_string_value(json_object_get(ask->body, "model")), error_out));
    if (json_integer_value(json_object_get(ask->body, "n")) > ask->choices_max) {
        gw_error_set(error_out, GW_CAUSE_UNSUPPORTED, "n", "too many");
        return CM_E_UNSUPPORTED;
    }
    if (gateway->refuses_choice != 0 && ask->choice == gateway->refuses_choice) {
        *error_out = gateway->refusal;
        return CM_E_INVALID;
    }
    if (ask->choice == 0 && find(gateway, ask->origin->id) != NULL &&
        strcmp(ask->origin->id, "made-by-gateway") != 0) {
        gw_error_set(error_out, GW_CAUSE_EXISTS, "request_id", "a request with this id is running");
        return CM_E_EXISTS;
    }
    assert_true(gateway->n_streams < FAKE_STREAMS);
    gw_stream *stream = &gateway->streams[gateway->n_streams++];
    *stream = (gw_stream){.gateway = gateway,
                          .kind = ask->kind,
                          .body = json_deep_copy(ask->body),
                          .deadline_ms = ask->deadline_ms,
                          .router = ask->router,
                          .want_ids = ask->want_ids,
                          .skip_special = ask->skip_special,
                          .choice = ask->choice,
                          .events = *events,
                          .ctx = ctx,
                          .task = {.fn = run_script, .arg = stream}};
    snprintf(stream->id, sizeof(stream->id), "%s", ask->origin->id);
    gateway->n_live++;
    pc_loop_post(gateway->loop, &stream->task);
    *stream_out = stream;
    return CM_OK;
}

static void end(gw_stream *stream)
{
    assert_false(stream->over);
    stream->over = true;
    stream->gateway->n_live--;
}

void gw_stream_cancel(gw_stream *stream)
{
    end(stream);
    stream->cancelled = true;
}

void gw_stream_detach(gw_stream *stream)
{
    end(stream);
    stream->detached = true;
}

bool gw_stream_is_ending(const gw_stream *stream)
{
    return stream->ending;
}

const char *gw_stream_id(const gw_stream *stream)
{
    return stream->id;
}

bool gw_stream_abort(gw_gateway *gateway, const gw_tenant *tenant, const char *request_id)
{
    (void)tenant;
    gw_stream *stream = find(gateway, request_id);
    if (stream != NULL) {
        fake_fail(stream, GW_CAUSE_ABORTED, "", 0);
    }
    return stream != NULL;
}

uint32_t gw_stream_abort_all(gw_gateway *gateway, const gw_tenant *tenant)
{
    (void)tenant;
    uint32_t n = 0;
    for (uint32_t i = 0; i < gateway->n_streams; i++) {
        if (!gateway->streams[i].over) {
            fake_fail(&gateway->streams[i], GW_CAUSE_ABORTED, "", 0);
            n++;
        }
    }
    return n;
}

/* ---- events ---- */

void fake_started(gw_stream *stream)
{
    gw_start start = {.request_id = stream->id,
                      .model = "nano",
                      .created_s = 1777472403,
                      .prompt_tokens = 11,
                      .cached_tokens = 4,
                      .thinking = true};
    if (!stream->over) {
        stream->events.started(stream->ctx, &start);
    }
}

void fake_token(gw_stream *stream, uint64_t offset, uint32_t id)
{
    if (!stream->over) {
        stream->events.tokens(stream->ctx, offset, &id, 1);
    }
}

void fake_logprobs(gw_stream *stream, uint32_t id, float logprob, uint32_t n_top)
{
    gw_logprob top[2] = {
        {.id = id + 1, .logprob = logprob / 2, .bytes = (const uint8_t *)"\xff", .n_bytes = 1},
        {.id = id + 2, .logprob = -9999}};
    gw_logprobs logprobs = {
        .token = {.id = id, .logprob = logprob, .bytes = (const uint8_t *)"abc", .n_bytes = 3},
        .top = top,
        .n_top = n_top};
    if (!stream->over) {
        stream->events.logprobs(stream->ctx, &logprobs);
    }
}

void fake_piece(gw_stream *stream, md_piece_kind kind, uint32_t call, const char *text, size_t n_bytes)
{
    md_piece piece = {.kind = kind, .call = call, .text = text, .n_bytes = n_bytes};
    if (!stream->over) {
        stream->events.piece(stream->ctx, &piece);
    }
}

void fake_text(gw_stream *stream, const char *text)
{
    fake_piece(stream, MD_PIECE_CONTENT, 0, text, strlen(text));
}

void fake_flush(gw_stream *stream)
{
    if (!stream->over) {
        stream->events.flush(stream->ctx);
    }
}

void fake_finish(gw_stream *stream, gw_reason reason, const char *stop_string, int64_t stop_id)
{
    gw_finish finish = {.reason = reason,
                        .stop_string = stop_string,
                        .stop_id = stop_id,
                        .usage = {.prompt_tokens = 11,
                                  .cached_tokens = 4,
                                  .completion_tokens = 6,
                                  .reasoning_tokens = 2,
                                  .queue_ms = 1.5,
                                  .first_token_ms = 2.5,
                                  .total_ms = 3.5}};
    if (!stream->over) {
        end(stream);
        stream->events.finished(stream->ctx, &finish);
    }
}

void fake_fail(gw_stream *stream, gw_cause cause, const char *param, uint32_t retry_ms)
{
    gw_error error;
    gw_error_set(&error, cause, param, "it failed on purpose");
    error.retry_ms = retry_ms;
    if (!stream->over) {
        end(stream);
        stream->events.failed(stream->ctx, &error);
    }
}

/* ---- what surfaces ask besides ---- */

void gw_gateway_info(const gw_gateway *gateway, gw_info *info_out)
{
    *info_out = gateway->info;
}

/* With a key, that one alone is good; it is nobody's in particular. */
cm_status gw_gateway_identify(const gw_gateway *gateway, const char *authorization, const char *api_key,
                              gw_tenant **tenant_out, gw_error *error_out)
{
    const char *given = api_key != NULL ? api_key : authorization;
    if (gateway->key != NULL && (given == NULL || strcmp(given, gateway->key) != 0)) {
        gw_error_set(error_out, GW_CAUSE_UNAUTHENTICATED, NULL, "not your key");
        return CM_E_INVALID;
    }
    *tenant_out = NULL;
    return CM_OK;
}

const md_tokenizer *gw_gateway_tokenizer(const gw_gateway *gateway)
{
    return gateway->tokenizer;
}

void gw_gateway_tokenizer_files(const gw_gateway *gateway, gw_archive *archive_out)
{
    *archive_out = gateway->archive;
}

/* The ids of the first message's content as it is; a message of a tool is refused. */
cm_status gw_chat_ids(gw_gateway *gateway, const json_t *body, md_ids *ids_out, cm_bytes *text_out,
                      gw_error *error_out)
{
    const json_t *first = json_array_get(json_object_get(body, "messages"), 0);
    const char *text = json_string_value(json_object_get(first, "content"));
    assert_null(json_object_get(body, "temperature"));
    if (strcmp(json_string_value(json_object_get(first, "role")), "tool") == 0) {
        gw_error_set(error_out, GW_CAUSE_INVALID, "messages[0].role", "refused on purpose");
        return CM_E_INVALID;
    }
    md_tokenizer_encode(gateway->tokenizer, text, strlen(text), MD_TEXT_PLAIN, ids_out);
    cm_bytes_append_text(text_out, text);
    return CM_OK;
}

cm_status gw_model_check(const gw_gateway *gateway, const char *name, gw_error *error_out)
{
    if (name == NULL || strcmp(name, gateway->info.model) == 0) {
        return CM_OK;
    }
    gw_error_set(error_out, GW_CAUSE_MODEL_NOT_FOUND, "model", "there is no model %s here", name);
    return CM_E_NOT_FOUND;
}

/* ---- a writer of simple objects: start, one per piece, finish and usage; or all text in one ---- */

struct gw_openai_choice {
    gw_openai *writer;
    uint32_t index;
};

struct gw_openai {
    gw_openai_choice choices[8];
    uint32_t n_choice, n_finished;
    bool stream;
    gw_emit_fn emit;
    void *ctx;
    cm_bytes text;
};

gw_openai *gw_openai_create(gw_ask_kind kind, const json_t *body, const char *fingerprint, gw_emit_fn emit,
                            void *ctx)
{
    gw_openai *writer = cm_alloc(sizeof(*writer));
    assert_int_equal(kind, GW_ASK_CHAT);
    assert_string_equal(fingerprint, "fp_0123456789abcdef");
    writer->stream = json_is_true(json_object_get(body, "stream"));
    writer->emit = emit;
    writer->ctx = ctx;
    writer->n_choice = (uint32_t)json_integer_value(json_object_get(body, "n"));
    writer->n_choice = writer->n_choice == 0 ? 1 : writer->n_choice;
    for (uint32_t i = 0; i < 8; i++) {
        writer->choices[i] = (gw_openai_choice){writer, i};
    }
    cm_bytes_init(&writer->text, 0);
    return writer;
}

void gw_openai_destroy(gw_openai *writer)
{
    cm_bytes_fini(&writer->text);
    cm_free(writer);
}

uint32_t gw_openai_choices(const gw_openai *writer)
{
    return writer->n_choice;
}

gw_openai_choice *gw_openai_choice_of(gw_openai *writer, uint32_t choice)
{
    assert_true(choice < writer->n_choice);
    return &writer->choices[choice];
}

static void writer_emit(gw_openai *writer, const char *text, bool last)
{
    writer->emit(writer->ctx, 0, text, strlen(text), last);
}

static void writer_started(void *ctx, const gw_start *start)
{
    gw_openai *writer = ((gw_openai_choice *)ctx)->writer;
    assert_non_null(start->request_id);
    if (writer->stream) {
        writer_emit(writer, "{\"start\":1}", false);
    }
}

static void writer_piece(void *ctx, const md_piece *piece)
{
    const gw_openai_choice *choice = ctx;
    gw_openai *writer = choice->writer;
    if (writer->n_choice > 1) {
        cm_bytes_printf(&writer->text, "%u", choice->index);
    }
    cm_bytes_append(&writer->text, piece->text, piece->n_bytes);
    if (writer->stream) {
        writer_emit(writer, cm_bytes_text(&writer->text), false);
        cm_bytes_clear(&writer->text);
    }
}

static void writer_tokens(void *ctx, uint64_t offset, const uint32_t *ids, uint32_t n)
{
    (void)ctx;
    (void)offset;
    (void)ids;
    (void)n;
}

static void writer_logprobs(void *ctx, const gw_logprobs *logprobs)
{
    (void)ctx;
    (void)logprobs;
}

static void writer_flush(void *ctx)
{
    (void)ctx;
}

static void writer_finished(void *ctx, const gw_finish *finish)
{
    gw_openai *writer = ((gw_openai_choice *)ctx)->writer;
    assert_int_equal(finish->usage.prompt_tokens, 11);
    if (++writer->n_finished < writer->n_choice) {
        return;
    }
    if (writer->stream) {
        writer_emit(writer, "{\"finish\":1}", false);
        writer_emit(writer, "{\"usage\":1}", true);
    } else {
        writer_emit(writer, cm_bytes_text(&writer->text), true);
    }
}

static void writer_failed(void *ctx, const gw_error *error)
{
    (void)ctx;
    (void)error;
}

const gw_stream_events *gw_openai_events(void)
{
    static const gw_stream_events events = {.started = writer_started,
                                            .piece = writer_piece,
                                            .tokens = writer_tokens,
                                            .logprobs = writer_logprobs,
                                            .flush = writer_flush,
                                            .finished = writer_finished,
                                            .failed = writer_failed};
    return &events;
}
