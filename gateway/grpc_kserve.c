/* GRPCInferenceService: ModelInfer, one request to one response, and ModelStreamInfer, any number of requests
 * to any number of responses each. */
#include <string.h>

#include "gateway/grpc_private.h"
#include "gateway/kserve.h"

typedef Inference__ModelInferRequest infer_request;

struct gw_grpc_infer {
    LIST_ENTRY(gw_grpc_infer) link;
    gw_grpc_call *call;
    gw_stream *stream; /* NULL: it has ended */
    char *id;
    bool raw;         /* answered in raw form */
    bool empty_final; /* the last response may be without outputs */
    gw_kserve_ask ask;
    cm_bytes text; /* not sent */
};

static bool is_streaming(const gw_grpc_call *call)
{
    return call->method->client_streams;
}

/* ---- responses ---- */

typedef struct infer_parts {
    Inference__ModelInferResponse response;
    Inference__ModelInferResponse__InferOutputTensor output, *outputs[1];
    Inference__InferTensorContents contents;
    Inference__ModelInferResponse__ParametersEntry final, *parameters[1];
    Inference__InferParameter is_final;
    ProtobufCBinaryData data;
    int64_t shape[1];
} infer_parts;

/* The parts that every response has. */
static void response_init(infer_parts *parts, const gw_info *info, const char *id, bool last)
{
    inference__model_infer_response__init(&parts->response);
    inference__model_infer_response__parameters_entry__init(&parts->final);
    inference__infer_parameter__init(&parts->is_final);
    parts->response.model_name = (char *)(uintptr_t)info->model;
    parts->response.model_version = GW_KSERVE_VERSION;
    parts->response.id = (char *)(uintptr_t)id;
    parts->is_final.parameter_choice_case = INFERENCE__INFER_PARAMETER__PARAMETER_CHOICE_BOOL_PARAM;
    parts->is_final.bool_param = last;
    parts->final.key = "triton_final_response";
    parts->final.value = &parts->is_final;
    parts->parameters[0] = &parts->final;
    parts->response.n_parameters = 1;
    parts->response.parameters = parts->parameters;
}

/* raw: room for the text behind its length; NULL: it goes into contents. */
static void put_text(infer_parts *parts, const cm_bytes *text, cm_bytes *raw)
{
    inference__model_infer_response__infer_output_tensor__init(&parts->output);
    parts->output.name = GW_KSERVE_OUTPUT;
    parts->output.datatype = "BYTES";
    parts->shape[0] = 1;
    parts->output.n_shape = 1;
    parts->output.shape = parts->shape;
    parts->outputs[0] = &parts->output;
    parts->response.n_outputs = 1;
    parts->response.outputs = parts->outputs;
    if (raw != NULL) {
        const uint8_t n[4] = {(uint8_t)text->len, (uint8_t)(text->len >> 8), (uint8_t)(text->len >> 16),
                              (uint8_t)(text->len >> 24)};
        cm_bytes_append(raw, n, 4);
        cm_bytes_append(raw, text->data, text->len);
        parts->data = (ProtobufCBinaryData){.data = raw->data, .len = raw->len};
        parts->response.n_raw_output_contents = 1;
        parts->response.raw_output_contents = &parts->data;
    } else {
        inference__infer_tensor_contents__init(&parts->contents);
        parts->data = (ProtobufCBinaryData){.data = text->data, .len = text->len};
        parts->contents.n_bytes_contents = 1;
        parts->contents.bytes_contents = &parts->data;
        parts->output.contents = &parts->contents;
    }
}

/* whole: a request's only response. */
static void send_response(gw_grpc_call *call, const infer_parts *parts, bool whole)
{
    void (*send)(gw_grpc_call *, const ProtobufCMessage *) = whole ? gw_grpc_send_whole : gw_grpc_send;
    if (is_streaming(call)) {
        Inference__ModelStreamInferResponse streamed = INFERENCE__MODEL_STREAM_INFER_RESPONSE__INIT;
        streamed.infer_response = (Inference__ModelInferResponse *)(uintptr_t)&parts->response;
        send(call, &streamed.base);
    } else {
        send(call, &parts->response.base);
    }
}

/* What has gathered; outputs: false: nothing has, and nothing is said. */
static void send_gathered(gw_grpc_infer *infer, bool outputs, bool last)
{
    infer_parts parts;
    gw_info info;
    cm_bytes raw;
    cm_bytes_init(&raw, 0);
    gw_gateway_info(infer->call->grpc->gateway, &info);
    response_init(&parts, &info, infer->id, last);
    if (outputs) {
        put_text(&parts, &infer->text, infer->raw ? &raw : NULL);
    }
    send_response(infer->call, &parts, !infer->ask.stream);
    cm_bytes_fini(&raw);
    cm_bytes_clear(&infer->text);
}

/* Of one request of a stream, which stays open. */
static void send_error(gw_grpc_call *call, const char *id, const gw_error *error)
{
    infer_parts parts;
    Inference__ModelStreamInferResponse streamed = INFERENCE__MODEL_STREAM_INFER_RESPONSE__INIT;
    gw_error e = *error;
    gw_info info;
    gw_gateway_info(call->grpc->gateway, &info);
    gw_grpc_clean(e.message, sizeof(e.message));
    response_init(&parts, &info, id, true);
    streamed.error_message = e.message;
    streamed.infer_response = &parts.response;
    gw_grpc_send(call, &streamed.base);
}

static void fail_request(gw_grpc_call *call, const char *id, const gw_error *error)
{
    if (is_streaming(call)) {
        send_error(call, id, error);
    } else {
        gw_grpc_fail(call, error);
    }
}

/* ---- a request's end ---- */

static void infer_free(gw_grpc_infer *infer)
{
    LIST_REMOVE(infer, link);
    gw_kserve_ask_fini(&infer->ask);
    cm_bytes_fini(&infer->text);
    cm_free(infer->id);
    cm_free(infer);
}

/* Ends a stream of requests that waits for nothing more. */
static void settle(gw_grpc_call *call)
{
    if (!LIST_EMPTY(&call->kserve.infers)) {
        return;
    }
    if (!is_streaming(call) || call->kserve.half_closed) {
        gw_grpc_finish(call);
    } else if (call->grpc->draining) {
        gw_error error;
        gw_error_set(&error, GW_CAUSE_UNAVAILABLE, NULL, "this gateway is shutting down; please try again");
        gw_grpc_fail(call, &error);
    }
}

/* ---- the streams' events ---- */

static void infer_started(void *ctx, const gw_start *start)
{
    gw_grpc_infer *infer = ctx;
    (void)start;
    if (infer->ask.echo) {
        const json_t *prompt = json_object_get(infer->ask.body, "prompt");
        cm_bytes_append(&infer->text, json_string_value(prompt), json_string_length(prompt));
    }
}

static void infer_piece(void *ctx, const md_piece *piece)
{
    gw_grpc_infer *infer = ctx;
    if (piece->kind == MD_PIECE_CONTENT) {
        cm_bytes_append(&infer->text, piece->text, piece->n_bytes);
    }
}

static void infer_tokens(void *ctx, uint64_t offset, const uint32_t *ids, uint32_t n)
{
    (void)ctx; /* they were not asked for */
    (void)offset;
    (void)ids;
    (void)n;
}

static void infer_logprobs(void *ctx, const gw_logprobs *logprobs)
{
    (void)ctx; /* nor these */
    (void)logprobs;
}

static void infer_flush(void *ctx)
{
    gw_grpc_infer *infer = ctx;
    if (infer->ask.stream && infer->text.len > 0) {
        send_gathered(infer, true, false);
    }
}

static void infer_finished(void *ctx, const gw_finish *finish)
{
    gw_grpc_infer *infer = ctx;
    gw_grpc_call *call = infer->call;
    (void)finish;
    infer->stream = NULL;
    send_gathered(infer, !infer->ask.stream || !infer->empty_final || infer->text.len > 0, true);
    infer_free(infer);
    settle(call);
}

static void infer_failed(void *ctx, const gw_error *error)
{
    gw_grpc_infer *infer = ctx;
    gw_grpc_call *call = infer->call;
    infer->stream = NULL;
    fail_request(call, infer->id, error);
    infer_free(infer);
    settle(call);
}

/* ---- a request ---- */

static json_t *contents_list(gw_kserve_type type, const Inference__InferTensorContents *c, bool *is_text)
{
    json_t *list = json_array();
    for (size_t i = 0; c != NULL && type == GW_KSERVE_BYTES && i < c->n_bytes_contents; i++) {
        const ProtobufCBinaryData *b = &c->bytes_contents[i];
        *is_text =
            json_array_append_new(list, json_stringn(b->len > 0 ? (const char *)b->data : "", b->len)) == 0 &&
            *is_text;
    }
    for (size_t i = 0; c != NULL && type == GW_KSERVE_BOOL && i < c->n_bool_contents; i++) {
        json_array_append_new(list, json_boolean(c->bool_contents[i]));
    }
    for (size_t i = 0; c != NULL && type == GW_KSERVE_INT32 && i < c->n_int_contents; i++) {
        json_array_append_new(list, json_integer(c->int_contents[i]));
    }
    return list;
}

static cm_status read_input(const infer_request *request, size_t i, gw_kserve_request *tensors,
                            gw_error *error)
{
    const Inference__ModelInferRequest__InferInputTensor *input = request->inputs[i];
    gw_kserve_name name;
    json_t *data;
    bool is_text = true;
    CM_TRY(gw_kserve_find(input->name, input->datatype, &name, error));
    if (request->n_raw_input_contents > 0) {
        const ProtobufCBinaryData *raw = &request->raw_input_contents[i];
        CM_TRY(gw_kserve_from_raw(name, raw->data, raw->len, &data, error));
    } else {
        data = contents_list(gw_kserve_inputs[name].type, input->contents, &is_text);
    }
    if (!is_text) {
        json_decref(data);
        gw_error_set(error, GW_CAUSE_INVALID, input->name, "%s must be UTF-8 text", input->name);
        return CM_E_INVALID;
    }
    return gw_kserve_put(tensors, name, input->shape, input->n_shape, data, error);
}

static cm_status read_tensors(const infer_request *request, gw_kserve_request *tensors, gw_error *error)
{
    if (request->n_raw_input_contents > 0 && request->n_raw_input_contents != request->n_inputs) {
        gw_error_set(error, GW_CAUSE_INVALID, "raw_input_contents",
                     "raw_input_contents has %zu entries, there are %zu inputs",
                     request->n_raw_input_contents, request->n_inputs);
        return CM_E_INVALID;
    }
    for (size_t i = 0; i < request->n_inputs; i++) {
        CM_TRY(read_input(request, i, tensors, error));
    }
    for (size_t i = 0; i < request->n_outputs; i++) {
        const char *name = request->outputs[i]->name;
        if (name == NULL || strcmp(name, GW_KSERVE_OUTPUT) != 0) {
            gw_error_set(error, GW_CAUSE_INVALID, "outputs",
                         "the model has the output " GW_KSERVE_OUTPUT " only");
            return CM_E_INVALID;
        }
    }
    return CM_OK;
}

cm_status gw_kserve_read_grpc(const infer_request *request, gw_kserve_ask *ask_out, gw_error *error_out)
{
    gw_kserve_request tensors = {0};
    cm_status status = read_tensors(request, &tensors, error_out);
    if (status == CM_OK) {
        status = gw_kserve_make_ask(&tensors, request->model_name, ask_out, error_out);
    }
    gw_kserve_request_fini(&tensors);
    return status;
}

static bool wants_empty_final(const infer_request *request)
{
    for (size_t i = 0; i < request->n_parameters; i++) {
        const Inference__ModelInferRequest__ParametersEntry *entry = request->parameters[i];
        if (entry->key != NULL && strcmp(entry->key, "triton_enable_empty_final_response") == 0) {
            return entry->value != NULL &&
                   entry->value->parameter_choice_case ==
                       INFERENCE__INFER_PARAMETER__PARAMETER_CHOICE_BOOL_PARAM &&
                   entry->value->bool_param;
        }
    }
    return false;
}

/* Elements that a typed tensor would become. */
static size_t count_elements(gw_kserve_type type, const Inference__InferTensorContents *c)
{
    if (c == NULL) {
        return 0;
    }
    return type == GW_KSERVE_BYTES   ? c->n_bytes_contents
           : type == GW_KSERVE_INT32 ? c->n_int_contents
                                     : c->n_bool_contents;
}

/* Before any of it becomes JSON: only the ids may be many. */
static cm_status check_sizes(const gw_grpc_call *call, const infer_request *request, gw_error *error)
{
    for (size_t i = 0; i < request->n_inputs; i++) {
        const Inference__ModelInferRequest__InferInputTensor *input = request->inputs[i];
        gw_kserve_name name;
        CM_TRY(gw_kserve_find(input->name, input->datatype, &name, error));
        size_t n = count_elements(gw_kserve_inputs[name].type, input->contents);
        if (name == GW_KSERVE_IDS) {
            size_t n_raw = i < request->n_raw_input_contents ? request->raw_input_contents[i].len / 4 : 0;
            CM_TRY(gw_grpc_check_prompt(call, n > n_raw ? n : n_raw, error));
        } else if (n > (size_t)gw_kserve_inputs[name].n) {
            gw_error_set(error, GW_CAUSE_INVALID, input->name, "%s has %zu elements, not one", input->name,
                         n);
            return CM_E_INVALID;
        }
    }
    return CM_OK;
}

static cm_status infer_open(gw_grpc_infer *infer, const infer_request *request, gw_error *error)
{
    static const gw_stream_events events = {
        .started = infer_started,
        .piece = infer_piece,
        .tokens = infer_tokens,
        .logprobs = infer_logprobs,
        .flush = infer_flush,
        .finished = infer_finished,
        .failed = infer_failed,
    };
    gw_grpc_call *call = infer->call;
    CM_TRY(gw_kserve_check_model(call->grpc->gateway, request->model_name, request->model_version, error));
    CM_TRY(check_sizes(call, request, error));
    CM_TRY(gw_kserve_read_grpc(request, &infer->ask, error));
    if (infer->ask.stream && !is_streaming(call)) {
        gw_error_set(error, GW_CAUSE_INVALID, "stream", "stream needs ModelStreamInfer");
        return CM_E_INVALID;
    }
    gw_ask ask = {.kind = infer->ask.kind,
                  .body = infer->ask.body,
                  .origin = gw_origin_create(infer->ask.kind, NULL, NULL, infer->ask.body, NULL),
                  .skip_special = true};
    cm_status status = gw_grpc_open_stream(call, &ask, &events, infer, &infer->stream, error);
    gw_origin_release(ask.origin);
    return status;
}

/* Of both methods. */
void gw_kserve_infer(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const infer_request *request = (const infer_request *)message;
    gw_grpc_infer *infer = cm_alloc(sizeof(*infer));
    gw_error error;
    infer->call = call;
    infer->id = cm_strdup(request->id != NULL ? request->id : "");
    infer->raw = request->n_raw_input_contents > 0;
    infer->empty_final = wants_empty_final(request);
    cm_bytes_init(&infer->text, 0);
    LIST_INSERT_HEAD(&call->kserve.infers, infer, link);
    if (infer_open(infer, request, &error) != CM_OK) {
        fail_request(call, infer->id, &error);
        infer_free(infer);
    }
}

void gw_kserve_half_closed(gw_grpc_call *call)
{
    call->kserve.half_closed = true;
    settle(call);
}

void gw_kserve_drain(gw_grpc_call *call)
{
    settle(call);
}

void gw_kserve_end_streams(gw_grpc_call *call, void (*end)(gw_stream *stream))
{
    gw_grpc_infer *infer;
    LIST_FOREACH (infer, &call->kserve.infers, link) {
        gw_stream *stream = infer->stream;
        infer->stream = NULL;
        if (stream != NULL) {
            end(stream);
        }
    }
}

void gw_kserve_fini(gw_grpc_call *call)
{
    while (!LIST_EMPTY(&call->kserve.infers)) {
        infer_free(LIST_FIRST(&call->kserve.infers));
    }
}
