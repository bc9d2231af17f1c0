/* GRPCInferenceService: what there is and whether it is ready. */
#include "gateway/grpc_private.h"
#include "gateway/kserve.h"

static bool is_ready(const gw_grpc *grpc)
{
    gw_info info;
    gw_gateway_info(grpc->gateway, &info);
    return info.ready && !info.draining && !grpc->draining;
}

void gw_kserve_live(gw_grpc_call *call, const ProtobufCMessage *message)
{
    Inference__ServerLiveResponse response = INFERENCE__SERVER_LIVE_RESPONSE__INIT;
    (void)message;
    response.has_live = response.live = true;
    gw_grpc_answer(call, &response.base);
}

void gw_kserve_ready(gw_grpc_call *call, const ProtobufCMessage *message)
{
    Inference__ServerReadyResponse response = INFERENCE__SERVER_READY_RESPONSE__INIT;
    (void)message;
    response.has_ready = true;
    response.ready = is_ready(call->grpc);
    gw_grpc_answer(call, &response.base);
}

void gw_kserve_model_ready(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Inference__ModelReadyRequest *request = (const Inference__ModelReadyRequest *)message;
    Inference__ModelReadyResponse response = INFERENCE__MODEL_READY_RESPONSE__INIT;
    gw_error unknown;
    cm_status status = gw_kserve_check_model(call->grpc->gateway, request->name, request->version, &unknown);
    response.has_ready = true;
    response.ready = status == CM_OK && is_ready(call->grpc);
    gw_grpc_answer(call, &response.base);
}

void gw_kserve_server_metadata(gw_grpc_call *call, const ProtobufCMessage *message)
{
    static char *const extensions[] = {"model_configuration", "model_repository"};
    Inference__ServerMetadataResponse response = INFERENCE__SERVER_METADATA_RESPONSE__INIT;
    (void)message;
    response.name = "baleen";
    response.version = BALEEN_VERSION;
    response.n_extensions = sizeof(extensions) / sizeof(extensions[0]);
    response.extensions = (char **)(uintptr_t)extensions;
    gw_grpc_answer(call, &response.base);
}

/* false: the call has failed. */
static bool knows_model(gw_grpc_call *call, const char *name, const char *version)
{
    static const char *const names[][2] = {{"model", "name"}, {"model_version", "version"}};
    gw_error error;
    if (gw_kserve_check_model(call->grpc->gateway, name, version, &error) == CM_OK) {
        return true;
    }
    gw_grpc_rename_field(&error, names, sizeof(names) / sizeof(names[0]));
    gw_grpc_fail(call, &error);
    return false;
}

void gw_kserve_model_metadata(gw_grpc_call *call, const ProtobufCMessage *message)
{
    typedef Inference__ModelMetadataResponse__TensorMetadata tensor;
    static int64_t one[] = {1};
    static char *const versions[] = {GW_KSERVE_VERSION};
    const Inference__ModelMetadataRequest *request = (const Inference__ModelMetadataRequest *)message;
    Inference__ModelMetadataResponse response = INFERENCE__MODEL_METADATA_RESPONSE__INIT;
    tensor inputs[GW_KSERVE_INPUTS], output, *input_list[GW_KSERVE_INPUTS], *output_list[] = {&output};
    int64_t shapes[GW_KSERVE_INPUTS];
    gw_info info;
    if (!knows_model(call, request->name, request->version)) {
        return;
    }
    for (int i = 0; i < GW_KSERVE_INPUTS; i++) {
        const gw_kserve_tensor *of = &gw_kserve_inputs[i];
        inference__model_metadata_response__tensor_metadata__init(&inputs[i]);
        inputs[i].name = (char *)(uintptr_t)of->name;
        inputs[i].datatype = (char *)(uintptr_t)gw_kserve_type_name(of->type);
        shapes[i] = of->n;
        inputs[i].n_shape = 1;
        inputs[i].shape = &shapes[i];
        input_list[i] = &inputs[i];
    }
    inference__model_metadata_response__tensor_metadata__init(&output);
    output.name = GW_KSERVE_OUTPUT;
    output.datatype = "BYTES";
    output.n_shape = 1;
    output.shape = one;
    gw_gateway_info(call->grpc->gateway, &info);
    response.name = (char *)(uintptr_t)info.model;
    response.n_versions = 1;
    response.versions = (char **)(uintptr_t)versions;
    response.platform = GW_KSERVE_PLATFORM;
    response.n_inputs = GW_KSERVE_INPUTS;
    response.inputs = input_list;
    response.n_outputs = 1;
    response.outputs = output_list;
    gw_grpc_answer(call, &response.base);
}

static Inference__DataType data_type(gw_kserve_type type)
{
    switch (type) {
    case GW_KSERVE_BYTES:
        return INFERENCE__DATA_TYPE__TYPE_STRING;
    case GW_KSERVE_BOOL:
        return INFERENCE__DATA_TYPE__TYPE_BOOL;
    case GW_KSERVE_INT32:
        return INFERENCE__DATA_TYPE__TYPE_INT32;
    }
    return INFERENCE__DATA_TYPE__TYPE_INVALID;
}

/* Which of the three prompts a request has is its own choice: no input must be there. */
static void fill_input(Inference__ModelInput *input, const gw_kserve_tensor *of, int64_t *dims)
{
    inference__model_input__init(input);
    *dims = of->n;
    input->name = (char *)(uintptr_t)of->name;
    input->has_data_type = true;
    input->data_type = data_type(of->type);
    input->n_dims = 1;
    input->dims = dims;
    input->has_optional = input->optional = true;
}

void gw_kserve_model_config(gw_grpc_call *call, const ProtobufCMessage *message)
{
    static int64_t one[] = {1};
    const Inference__ModelConfigRequest *request = (const Inference__ModelConfigRequest *)message;
    Inference__ModelConfigResponse response = INFERENCE__MODEL_CONFIG_RESPONSE__INIT;
    Inference__ModelConfig config = INFERENCE__MODEL_CONFIG__INIT;
    Inference__ModelInput inputs[GW_KSERVE_INPUTS], *input_list[GW_KSERVE_INPUTS];
    Inference__ModelOutput output = INFERENCE__MODEL_OUTPUT__INIT, *output_list[] = {&output};
    Inference__ModelTransactionPolicy policy = INFERENCE__MODEL_TRANSACTION_POLICY__INIT;
    int64_t dims[GW_KSERVE_INPUTS];
    gw_info info;
    if (!knows_model(call, request->name, request->version)) {
        return;
    }
    for (int i = 0; i < GW_KSERVE_INPUTS; i++) {
        fill_input(&inputs[i], &gw_kserve_inputs[i], &dims[i]);
        input_list[i] = &inputs[i];
    }
    output.name = GW_KSERVE_OUTPUT;
    output.has_data_type = true;
    output.data_type = data_type(GW_KSERVE_BYTES);
    output.n_dims = 1;
    output.dims = one;
    gw_gateway_info(call->grpc->gateway, &info);
    config.name = (char *)(uintptr_t)info.model;
    config.platform = config.backend = GW_KSERVE_PLATFORM;
    config.has_max_batch_size = true;
    config.n_input = GW_KSERVE_INPUTS;
    config.input = input_list;
    config.n_output = 1;
    config.output = output_list;
    policy.has_decoupled = policy.decoupled = true;
    config.model_transaction_policy = &policy;
    response.config = &config;
    gw_grpc_answer(call, &response.base);
}

void gw_kserve_index(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Inference__RepositoryIndexRequest *request = (const Inference__RepositoryIndexRequest *)message;
    Inference__RepositoryIndexResponse response = INFERENCE__REPOSITORY_INDEX_RESPONSE__INIT;
    Inference__RepositoryIndexResponse__ModelIndex model =
        INFERENCE__REPOSITORY_INDEX_RESPONSE__MODEL_INDEX__INIT;
    Inference__RepositoryIndexResponse__ModelIndex *models[] = {&model};
    gw_info info;
    bool ready = is_ready(call->grpc);
    gw_gateway_info(call->grpc->gateway, &info);
    model.name = (char *)(uintptr_t)info.model;
    model.version = GW_KSERVE_VERSION;
    model.state = ready ? "READY" : "UNAVAILABLE";
    response.n_models = ready || !request->ready;
    response.models = models;
    gw_grpc_answer(call, &response.base);
}
