/* KServe's REST twin: what there is, inference with tensors in JSON, and Triton's generate. Each request is
 * turned into one form, {"model", "id", "stream", "inputs": {name: elements}}, which is what another gateway
 * gets that tells it again. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"
#include "gateway/http_private.h"
#include "gateway/json_text.h"
#include "gateway/kserve.h"
#include "gateway/surface.h"

/* ---- what there is ---- */

void gw_kserve_http_server(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)http;
    (void)rest;
    json_t *reply =
        json_pack("{s:s, s:s, s:[s]}", "name", "baleen", "version", BALEEN_VERSION, "extensions", "generate");
    gw_reply_json(req, 200, reply);
    json_decref(reply);
}

void gw_kserve_http_live(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)http;
    (void)rest;
    gw_reply(req, 200, "application/json", "{}", 2);
}

void gw_kserve_http_ready(gw_http *http, struct evhttp_request *req, const char *rest)
{
    (void)rest;
    const char *reason = gw_ready_reason(http->gateway);
    json_t *reply = reason == NULL ? json_object() : json_pack("{s:s}", "error", reason);
    gw_reply_json(req, reason == NULL ? 200 : 503, reply);
    json_decref(reply);
}

static json_t *tensor_json(const char *name, gw_kserve_type type, int64_t n)
{
    return json_pack("{s:s, s:s, s:[I]}", "name", name, "datatype", gw_kserve_type_name(type), "shape",
                     (json_int_t)n);
}

static void reply_metadata(gw_http *http, struct evhttp_request *req)
{
    gw_info info;
    json_t *inputs = json_array();
    gw_gateway_info(http->gateway, &info);
    for (int i = 0; i < GW_KSERVE_INPUTS; i++) {
        const gw_kserve_tensor *of = &gw_kserve_inputs[i];
        json_array_append_new(inputs, tensor_json(of->name, of->type, of->n));
    }
    json_t *reply = json_pack("{s:s, s:[s], s:s, s:o, s:[o]}", "name", info.model, "versions",
                              GW_KSERVE_VERSION, "platform", GW_KSERVE_PLATFORM, "inputs", inputs, "outputs",
                              tensor_json(GW_KSERVE_OUTPUT, GW_KSERVE_BYTES, 1));
    gw_reply_json(req, 200, reply);
    json_decref(reply);
}

/* ---- paths: MODEL[/versions/V][/ACTION] ---- */

typedef struct kserve_path {
    char *whole;                          /* owned: the others point into it */
    const char *model, *version, *action; /* "" when absent */
} kserve_path;

static void path_split(const char *rest, kserve_path *path_out)
{
    kserve_path p = {.whole = cm_strdup(rest), .version = "", .action = ""};
    char *at = strchr(p.whole, '/');
    p.model = p.whole;
    if (at != NULL && strncmp(at, "/versions/", 10) == 0) {
        *at = 0;
        p.version = at + 10;
        at = strchr(at + 10, '/');
    }
    if (at != NULL) {
        *at = 0;
        p.action = at + 1;
    }
    gw_http_percent_decode(p.whole); /* up to the end of the model's name */
    *path_out = p;
}

static void reply_no_action(struct evhttp_request *req, const kserve_path *path)
{
    gw_error error;
    gw_error_set(&error, GW_CAUSE_NO_ROUTE, NULL, "a model has nothing at /%.100s", path->action);
    gw_reply_error(req, &error);
}

void gw_kserve_http_model(gw_http *http, struct evhttp_request *req, const char *rest)
{
    kserve_path path;
    gw_error error;
    path_split(rest, &path);
    if (gw_kserve_check_model(http->gateway, path.model, path.version, &error) != CM_OK) {
        gw_reply_error(req, &error);
    } else if (path.action[0] == 0) {
        reply_metadata(http, req);
    } else if (strcmp(path.action, "ready") == 0) {
        gw_kserve_http_ready(http, req, "");
    } else {
        reply_no_action(req, &path);
    }
    cm_free(path.whole);
}

/* ---- requests: generate ---- */

static cm_status put_list(gw_kserve_request *tensors, gw_kserve_name name, json_t *list, gw_error *error)
{
    int64_t n = (int64_t)json_array_size(list);
    return gw_kserve_put(tensors, name, &n, 1, list, error);
}

static int append_json(const char *text, size_t n, void *out)
{
    cm_bytes_append(out, text, n);
    return 0;
}

/* A value of JSON's own kind as a tensor: a list as its elements, but for those that hold JSON as text. */
static cm_status put_value(gw_kserve_request *tensors, gw_kserve_name name, json_t *value, gw_error *error)
{
    bool holds_json = name == GW_KSERVE_MESSAGES || name == GW_KSERVE_SAMPLING;
    if (json_is_array(value) && !holds_json) {
        return put_list(tensors, name, json_incref(value), error);
    }
    if (holds_json && !json_is_string(value)) {
        cm_bytes text;
        json_t *list = json_array();
        cm_bytes_init(&text, 0);
        json_dump_callback(value, append_json, &text, JSON_COMPACT | JSON_ENCODE_ANY);
        json_array_append_new(list, json_stringn(cm_bytes_text(&text), text.len));
        cm_bytes_fini(&text);
        return put_list(tensors, name, list, error);
    }
    return put_list(tensors, name, json_pack("[O]", value), error);
}

static bool is_input(const char *key, gw_kserve_name *name_out)
{
    for (int i = 0; i < GW_KSERVE_INPUTS; i++) {
        if (strcmp(gw_kserve_inputs[i].name, key) == 0) {
            *name_out = (gw_kserve_name)i;
            return true;
        }
    }
    return false;
}

/* Triton's habit: what is no input is a sampling parameter. */
static cm_status read_parameters(const json_t *parameters, gw_kserve_request *tensors, gw_error *error)
{
    json_t *sampling = json_object(), *value;
    const char *key;
    gw_kserve_name name;
    cm_status status = CM_OK;
    json_object_foreach((json_t *)(uintptr_t)parameters, key, value)
    {
        if (!is_input(key, &name)) {
            json_object_set(sampling, key, value);
        } else if (status == CM_OK) {
            status = put_value(tensors, name, value, error);
        }
    }
    if (status == CM_OK && json_object_size(sampling) > 0) {
        status = put_value(tensors, GW_KSERVE_SAMPLING, sampling, error);
    }
    json_decref(sampling);
    return status;
}

static cm_status read_generate(const json_t *body, gw_kserve_request *tensors, gw_error *error)
{
    const json_t *parameters = json_object_get(body, "parameters");
    json_t *value;
    const char *key;
    gw_kserve_name name;
    json_object_foreach((json_t *)(uintptr_t)body, key, value)
    {
        if (is_input(key, &name) && !json_is_null(value)) {
            CM_TRY(put_value(tensors, name, value, error));
        }
    }
    if (parameters != NULL && !json_is_object(parameters)) {
        gw_error_set(error, GW_CAUSE_INVALID, "parameters", "parameters must be an object");
        return CM_E_INVALID;
    }
    return read_parameters(parameters, tensors, error);
}

/* ---- requests: infer ---- */

/* Elements row by row, however the lists are nested. */
static void flatten(json_t *value, json_t *list)
{
    size_t i;
    json_t *inner;
    if (!json_is_array(value)) {
        json_array_append(list, value);
        return;
    }
    json_array_foreach(value, i, inner)
    {
        flatten(inner, list);
    }
}

typedef struct binary {
    const uint8_t *at; /* the tensors behind the JSON */
    size_t n_bytes;
} binary;

/* With a size, a tensor's elements stand behind the JSON, in raw form and in the order of the inputs. */
static cm_status read_data(const json_t *input, gw_kserve_name name, binary *rest, json_t **data_out,
                           gw_error *error)
{
    const json_t *size = json_object_get(json_object_get(input, "parameters"), "binary_data_size");
    json_int_t n = json_is_integer(size) ? json_integer_value(size) : -1;
    if (size == NULL) {
        *data_out = json_array();
        flatten(json_object_get(input, "data"), *data_out);
        return CM_OK;
    }
    if (n < 0 || (uint64_t)n > rest->n_bytes) {
        gw_error_set(error, GW_CAUSE_INVALID, gw_kserve_inputs[name].name,
                     "%s has a binary_data_size beyond the end of the request", gw_kserve_inputs[name].name);
        return CM_E_INVALID;
    }
    const uint8_t *raw = rest->at;
    rest->at += n;
    rest->n_bytes -= (size_t)n;
    return gw_kserve_from_raw(name, raw, (size_t)n, data_out, error);
}

enum { DIMS_MAX = 8 };

static cm_status read_shape(const json_t *input, const char *name, int64_t shape[DIMS_MAX], gw_error *error)
{
    const json_t *list = json_object_get(input, "shape");
    bool good = json_is_array(list) && json_array_size(list) <= DIMS_MAX;
    for (size_t i = 0; good && i < json_array_size(list); i++) {
        good = json_is_integer(json_array_get(list, i));
        shape[i] = json_integer_value(json_array_get(list, i));
    }
    if (!good) {
        gw_error_set(error, GW_CAUSE_INVALID, name, "%s must have a shape: a list of at most %d integers",
                     name, DIMS_MAX);
        return CM_E_INVALID;
    }
    return CM_OK;
}

static cm_status read_input(const json_t *input, binary *rest, gw_kserve_request *tensors, gw_error *error)
{
    const char *given = json_string_value(json_object_get(input, "name"));
    int64_t shape[DIMS_MAX];
    gw_kserve_name name;
    json_t *data;
    CM_TRY(gw_kserve_find(given, json_string_value(json_object_get(input, "datatype")), &name, error));
    CM_TRY(read_shape(input, given, shape, error));
    CM_TRY(read_data(input, name, rest, &data, error));
    return gw_kserve_put(tensors, name, shape, json_array_size(json_object_get(input, "shape")), data, error);
}

static cm_status read_infer(const json_t *body, binary rest, gw_kserve_request *tensors, gw_error *error)
{
    const json_t *inputs = json_object_get(body, "inputs"), *outputs = json_object_get(body, "outputs");
    for (size_t i = 0; i < json_array_size(inputs); i++) {
        CM_TRY(read_input(json_array_get(inputs, i), &rest, tensors, error));
    }
    for (size_t i = 0; i < json_array_size(outputs); i++) {
        const char *name = json_string_value(json_object_get(json_array_get(outputs, i), "name"));
        if (name == NULL || strcmp(name, GW_KSERVE_OUTPUT) != 0) {
            gw_error_set(error, GW_CAUSE_INVALID, "outputs",
                         "the model has the output " GW_KSERVE_OUTPUT " only");
            return CM_E_INVALID;
        }
    }
    return CM_OK;
}

static cm_status read_length(const char *text, size_t most, size_t *n_out, gw_error *error)
{
    char *end;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (errno != 0 || end == text || *end != 0 || text[0] == '-' || n > most) {
        gw_error_set(error, GW_CAUSE_INVALID, "Inference-Header-Content-Length",
                     "Inference-Header-Content-Length must be a number of bytes within the request");
        return CM_E_INVALID;
    }
    *n_out = (size_t)n;
    return CM_OK;
}

/* Leaves the JSON as the body. Clients pack it and the tensors as one: its length is that of what they hold.
 */
static cm_status split_body(gw_http *http, struct evhttp_request *req, const char *length, cm_bytes *copy_out,
                            binary *binary_out, gw_error *error)
{
    struct evbuffer *input = evhttp_request_get_input_buffer(req);
    size_t n_json;
    CM_TRY(gw_request_unpack(http, req, error));
    size_t n = evbuffer_get_length(input);
    CM_TRY(read_length(length, n, &n_json, error));
    cm_bytes_append(copy_out, evbuffer_pullup(input, -1), n);
    evbuffer_drain(input, n);
    evbuffer_add(input, cm_bytes_text(copy_out), n_json);
    *binary_out = (binary){.at = (const uint8_t *)cm_bytes_text(copy_out) + n_json, .n_bytes = n - n_json};
    return CM_OK;
}

/* The JSON before binary tensors, whose length a header tells; binary_out points into copy_out. NULL: an
 * error was answered. */
static json_t *request_json(gw_http *http, struct evhttp_request *req, cm_bytes *copy_out, binary *binary_out)
{
    const char *length =
        evhttp_find_header(evhttp_request_get_input_headers(req), "Inference-Header-Content-Length");
    gw_error error;
    *binary_out = (binary){0};
    if (length != NULL && split_body(http, req, length, copy_out, binary_out, &error) != CM_OK) {
        gw_reply_error(req, &error);
        return NULL;
    }
    return gw_request_json(http, req);
}

/* ---- to a stream ---- */

/* What was read, in the one form. */
static json_t *make_given(const kserve_path *path, const json_t *body, const gw_kserve_request *tensors,
                          bool streams)
{
    const char *id = json_string_value(json_object_get(body, "id"));
    json_t *inputs = json_object();
    for (int i = 0; i < GW_KSERVE_INPUTS; i++) {
        if (tensors->data[i] != NULL) {
            json_object_set(inputs, gw_kserve_inputs[i].name, tensors->data[i]);
        }
    }
    json_t *given = json_pack("{s:b, s:o}", "stream", streams, "inputs", inputs);
    json_object_set_new(given, "model", json_string(path->model));
    if (id != NULL) {
        json_object_set(given, "id", json_object_get(body, "id"));
    }
    return given;
}

static cm_status given_ask(const json_t *given, gw_kserve_ask *ask_out, gw_error *error_out)
{
    gw_kserve_request tensors = {0};
    const json_t *inputs = json_object_get(given, "inputs");
    for (int i = 0; i < GW_KSERVE_INPUTS; i++) {
        tensors.data[i] = json_incref(json_object_get(inputs, gw_kserve_inputs[i].name));
    }
    cm_status status =
        gw_kserve_make_ask(&tensors, json_string_value(json_object_get(given, "model")), ask_out, error_out);
    gw_kserve_request_fini(&tensors);
    return status;
}

/* Answers in events are asked for by the path; then they come piece by piece unless the input says otherwise.
 */
static cm_status choose_stream(gw_kserve_request *tensors, bool streams, gw_error *error)
{
    if (streams && tensors->data[GW_KSERVE_STREAM] == NULL) {
        tensors->data[GW_KSERVE_STREAM] = json_pack("[b]", 1);
    }
    if (!streams && json_is_true(json_array_get(tensors->data[GW_KSERVE_STREAM], 0))) {
        gw_error_set(error, GW_CAUSE_INVALID, "stream", "stream needs generate_stream");
        return CM_E_INVALID;
    }
    return CM_OK;
}

typedef struct kserve_action {
    const char *name;
    bool infer, streams;
} kserve_action;

static cm_status read_request(const kserve_action *action, const json_t *body, binary rest,
                              gw_kserve_request *tensors, gw_error *error)
{
    CM_TRY(action->infer ? read_infer(body, rest, tensors, error) : read_generate(body, tensors, error));
    return choose_stream(tensors, action->streams, error);
}

static const gw_surface *surface_of(const kserve_action *action, const gw_kserve_request *tensors)
{
    bool chat = tensors->data[GW_KSERVE_MESSAGES] != NULL;
    return action->infer ? (chat ? &gw_surface_kserve_infer_chat : &gw_surface_kserve_infer)
                         : (chat ? &gw_surface_kserve_generate_chat : &gw_surface_kserve_generate);
}

static void begin(gw_http *http, struct evhttp_request *req, const kserve_path *path,
                  const kserve_action *action)
{
    gw_kserve_request tensors = {0};
    gw_error error;
    cm_bytes copy;
    binary rest;
    cm_bytes_init(&copy, 0);
    json_t *body = request_json(http, req, &copy, &rest);
    if (body == NULL) {
        gw_http_count_refused();
    } else if (read_request(action, body, rest, &tensors, &error) == CM_OK) {
        json_t *given = make_given(path, body, &tensors, action->streams);
        gw_http_generate_given(http, req, surface_of(action, &tensors), given);
        json_decref(given);
    } else {
        gw_http_count_refused();
        gw_reply_error(req, &error);
    }
    gw_kserve_request_fini(&tensors);
    json_decref(body);
    cm_bytes_fini(&copy);
}

void gw_kserve_http_ask(gw_http *http, struct evhttp_request *req, const char *rest)
{
    static const kserve_action actions[] = {
        {"infer", true, false}, {"generate", false, false}, {"generate_stream", false, true}};
    const kserve_action *action = NULL;
    kserve_path path;
    gw_error error;
    path_split(rest, &path);
    for (size_t i = 0; i < sizeof(actions) / sizeof(actions[0]); i++) {
        action = strcmp(actions[i].name, path.action) == 0 ? &actions[i] : action;
    }
    if (action == NULL) {
        reply_no_action(req, &path);
    } else if (evhttp_find_header(evhttp_request_get_input_headers(req), "Last-Event-ID") != NULL) {
        gw_http_resume(http, req, NULL);
    } else if (gw_kserve_check_model(http->gateway, path.model, path.version, &error) != CM_OK) {
        gw_http_count_refused();
        gw_reply_error(req, &error);
    } else {
        begin(http, req, &path, action);
    }
    cm_free(path.whole);
}

/* ---- answers ---- */

typedef struct kserve_writer {
    bool infer;  /* the answer is a tensor */
    bool stream; /* it comes piece by piece */
    char *id;    /* NULL: none was given */
    char *model;
    cm_bytes text, out;
    gw_emit_fn emit;
    void *ctx;
} kserve_writer;

static kserve_writer *writer_create(const json_t *given, gw_emit_fn emit, void *ctx, bool infer)
{
    kserve_writer *w = cm_alloc(sizeof(*w));
    gw_kserve_ask ask;
    gw_error error;
    const char *id = json_string_value(json_object_get(given, "id"));
    cm_status status = given_ask(given, &ask, &error);
    CM_ASSERT(status == CM_OK); /* it was when the body was made */
    *w = (kserve_writer){.infer = infer,
                         .stream = ask.stream,
                         .id = id != NULL ? cm_strdup(id) : NULL,
                         .emit = emit,
                         .ctx = ctx};
    cm_bytes_init(&w->text, 0);
    cm_bytes_init(&w->out, 0);
    if (ask.echo) {
        const json_t *prompt = json_object_get(ask.body, "prompt");
        cm_bytes_append(&w->text, json_string_value(prompt), json_string_length(prompt));
    }
    gw_kserve_ask_fini(&ask);
    return w;
}

static void *generate_create(const json_t *given, const char *fingerprint, gw_emit_fn emit, void *ctx)
{
    (void)fingerprint;
    return writer_create(given, emit, ctx, false);
}

static void *infer_create(const json_t *given, const char *fingerprint, gw_emit_fn emit, void *ctx)
{
    (void)fingerprint;
    return writer_create(given, emit, ctx, true);
}

static void writer_destroy(void *writer)
{
    kserve_writer *w = writer;
    cm_bytes_fini(&w->text);
    cm_bytes_fini(&w->out);
    cm_free(w->id);
    cm_free(w->model);
    cm_free(w);
}

static void *writer_choice(void *writer, uint32_t choice)
{
    CM_ASSERT(choice == 0);
    return writer;
}

static void emit_text(kserve_writer *w, const char *text, size_t n_bytes, bool last)
{
    cm_bytes_clear(&w->out);
    cm_bytes_append_text(&w->out, "{");
    if (w->id != NULL) {
        cm_bytes_append_text(&w->out, "\"id\":");
        gw_json_string(&w->out, w->id, strlen(w->id));
        cm_bytes_append_text(&w->out, ",");
    }
    cm_bytes_append_text(&w->out, "\"model_name\":");
    gw_json_string(&w->out, w->model, strlen(w->model));
    cm_bytes_append_text(&w->out, ",\"model_version\":\"" GW_KSERVE_VERSION "\",");
    cm_bytes_append_text(&w->out, w->infer ? "\"outputs\":[{\"name\":\"" GW_KSERVE_OUTPUT
                                             "\",\"datatype\":\"BYTES\",\"shape\":[1],\"data\":["
                                           : "\"" GW_KSERVE_OUTPUT "\":");
    gw_json_string(&w->out, text, n_bytes);
    cm_bytes_append_text(&w->out, w->infer ? "]}]" : "");
    if (!w->infer) {
        cm_bytes_printf(&w->out, ",\"triton_final_response\":%s", last ? "true" : "false");
    }
    cm_bytes_append_text(&w->out, "}");
    w->emit(w->ctx, 0, cm_bytes_text(&w->out), w->out.len, last);
}

static void writer_started(void *ctx, const gw_start *start)
{
    kserve_writer *w = ctx;
    w->model = cm_strdup(start->model);
}

static void writer_piece(void *ctx, const md_piece *piece)
{
    kserve_writer *w = ctx;
    if (piece->kind != MD_PIECE_CONTENT) {
        return;
    }
    if (w->stream) {
        emit_text(w, piece->text, piece->n_bytes, false);
    } else {
        cm_bytes_append(&w->text, piece->text, piece->n_bytes);
    }
}

static void writer_finished(void *ctx, const gw_finish *finish)
{
    kserve_writer *w = ctx;
    (void)finish;
    emit_text(w, cm_bytes_text(&w->text), w->text.len, true);
}

static const gw_stream_events *writer_events(void)
{
    static const gw_stream_events events = {
        .started = writer_started,
        .piece = writer_piece,
        .finished = writer_finished,
    };
    return &events;
}

/* ---- the surfaces ---- */

static cm_status kserve_body(const json_t *given, json_t **body_out, gw_error *error_out)
{
    gw_kserve_ask ask;
    CM_TRY(given_ask(given, &ask, error_out));
    json_object_set(ask.body, "stream", json_object_get(given, "stream"));
    *body_out = ask.body;
    return CM_OK;
}

void gw_kserve_http_error(const gw_error *error, const char *request_id, cm_bytes *out)
{
    (void)request_id;
    cm_bytes_append_text(out, "{\"error\":");
    gw_json_string(out, error->message, strlen(error->message));
    cm_bytes_append_text(out, "}");
}

static const gw_surface_field FIELDS[] = {{"prompt", "text_input", false}, {NULL, NULL, false}};

#define KSERVE_SURFACE(name_, kind_, create_)                                                                \
    {                                                                                                        \
        .name = (name_), .kind = (kind_), .fields = FIELDS, .body = kserve_body,                             \
        .error = gw_kserve_http_error, .no_done = true,                                                      \
        .writer = {.create = (create_),                                                                      \
                   .destroy = writer_destroy,                                                                \
                   .choice = writer_choice,                                                                  \
                   .events = writer_events},                                                                 \
    }

const gw_surface gw_surface_kserve_infer = KSERVE_SURFACE("http infer", GW_ASK_COMPLETE, infer_create);
const gw_surface gw_surface_kserve_infer_chat = KSERVE_SURFACE("http infer chat", GW_ASK_CHAT, infer_create);
const gw_surface gw_surface_kserve_generate =
    KSERVE_SURFACE("http generate", GW_ASK_COMPLETE, generate_create);
const gw_surface gw_surface_kserve_generate_chat =
    KSERVE_SURFACE("http generate chat", GW_ASK_CHAT, generate_create);
