/* VllmEngine's calls that answer at once, and the tokenizer's files. */
#include "common/base/clock.h"
#include "gateway/grpc_vllm.h"

enum { TOKENIZER_CHUNK_BYTES = 256 << 10 };

void gw_vllm_unsupported(gw_grpc_call *call, const ProtobufCMessage *message)
{
    gw_error error;
    (void)message;
    gw_error_set(&error, GW_CAUSE_UNSUPPORTED, NULL, "%s is not implemented by this server",
                 call->method->path + 1);
    gw_grpc_fail(call, &error);
}

void gw_vllm_health_check(gw_grpc_call *call, const ProtobufCMessage *message)
{
    Vllm__Grpc__Engine__HealthCheckResponse response = VLLM__GRPC__ENGINE__HEALTH_CHECK_RESPONSE__INIT;
    gw_info info;
    (void)message;
    gw_gateway_info(call->grpc->gateway, &info);
    response.has_healthy = true;
    response.healthy = info.ready && !info.draining && !call->grpc->draining;
    response.message = response.healthy ? "ready" : info.ready ? "shutting down" : "not ready";
    gw_grpc_answer(call, &response.base);
}

void gw_vllm_abort(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Vllm__Grpc__Engine__AbortRequest *request = (const Vllm__Grpc__Engine__AbortRequest *)message;
    Vllm__Grpc__Engine__AbortResponse response = VLLM__GRPC__ENGINE__ABORT_RESPONSE__INIT;
    uint32_t aborted;
    gw_error error;
    if (gw_grpc_abort_ids(call, request->request_ids, request->n_request_ids, &aborted, &error) == CM_OK) {
        gw_grpc_answer(call, &response.base);
    } else {
        gw_grpc_fail(call, &error);
    }
}

void gw_vllm_model_info(gw_grpc_call *call, const ProtobufCMessage *message)
{
    Vllm__Grpc__Engine__GetModelInfoResponse response = VLLM__GRPC__ENGINE__GET_MODEL_INFO_RESPONSE__INIT;
    gw_info info;
    (void)message;
    gw_gateway_info(call->grpc->gateway, &info);
    int32_t eos = (int32_t)info.eos_id;
    response.model_path = response.served_model_name = (char *)(uintptr_t)info.model;
    response.has_is_generation = response.has_supports_vision = true;
    response.is_generation = true;
    response.has_max_context_length = response.has_vocab_size = true;
    response.max_context_length = info.context;
    response.vocab_size = info.vocab;
    response.n_eos_token_ids = 1;
    response.eos_token_ids = &eos;
    response.has_bos_token_id = response.has_max_req_input_len = true;
    response.bos_token_id = (int32_t)info.bos_id;
    response.max_req_input_len = (int32_t)info.context - 1; /* one token must fit behind it */
    gw_grpc_answer(call, &response.base);
}

void gw_vllm_server_info(gw_grpc_call *call, const ProtobufCMessage *message)
{
    Vllm__Grpc__Engine__GetServerInfoResponse response = VLLM__GRPC__ENGINE__GET_SERVER_INFO_RESPONSE__INIT;
    gw_info info;
    (void)message;
    gw_gateway_info(call->grpc->gateway, &info);
    response.has_active_requests = response.has_is_paused = response.has_data_parallel_size = true;
    response.active_requests = info.running + info.waiting;
    response.data_parallel_size = 1;
    response.has_last_receive_timestamp = response.has_uptime_seconds = true;
    response.last_receive_timestamp = (double)call->grpc->vllm_received_us * 1e-6;
    response.uptime_seconds = info.uptime_s;
    response.server_type = "baleen";
    gw_grpc_answer(call, &response.base);
}

void gw_vllm_loads(gw_grpc_call *call, const ProtobufCMessage *message)
{
    const Vllm__Grpc__Engine__GetLoadsRequest *request = (const Vllm__Grpc__Engine__GetLoadsRequest *)message;
    Vllm__Grpc__Engine__GetLoadsResponse response = VLLM__GRPC__ENGINE__GET_LOADS_RESPONSE__INIT;
    Vllm__Grpc__Engine__SchedulerLoad load = VLLM__GRPC__ENGINE__SCHEDULER_LOAD__INIT, *loads[] = {&load};
    gw_info info;
    char now[32];
    gw_gateway_info(call->grpc->gateway, &info);
    cm_wall_format(cm_wall_us(), now, sizeof(now));
    response.timestamp = now;
    response.version = BALEEN_VERSION;
    response.has_dp_rank_count = true;
    response.dp_rank_count = 1;
    response.n_loads = !request->has_dp_rank || request->dp_rank == 0;
    response.loads = loads;
    load.has_dp_rank = load.has_num_running_reqs = load.has_num_waiting_reqs = load.has_num_total_reqs = true;
    load.num_running_reqs = (int32_t)info.running;
    load.num_waiting_reqs = (int32_t)info.waiting;
    load.num_total_reqs = (int32_t)(info.running + info.waiting);
    load.has_token_usage = true;
    load.token_usage = info.kv_used;
    gw_grpc_answer(call, &response.base);
}

/* ---- GetTokenizer: piece by piece, as the client takes them ---- */

void gw_vllm_tokenizer_sent(gw_grpc_call *call)
{
    Smg__Grpc__Common__GetTokenizerChunk chunk = SMG__GRPC__COMMON__GET_TOKENIZER_CHUNK__INIT;
    gw_archive archive;
    gw_gateway_tokenizer_files(call->grpc->gateway, &archive);
    size_t left = archive.n_bytes - call->files.sent;
    size_t n = left < TOKENIZER_CHUNK_BYTES ? left : TOKENIZER_CHUNK_BYTES;
    chunk.has_data = true;
    chunk.data.data = (uint8_t *)(uintptr_t)archive.data + call->files.sent;
    chunk.data.len = n;
    chunk.sha256 = n == left ? (char *)(uintptr_t)archive.sha256 : NULL;
    call->files.sent += n;
    gw_grpc_send(call, &chunk.base);
    if (n == left) {
        gw_grpc_finish(call);
    }
}

void gw_vllm_tokenizer(gw_grpc_call *call, const ProtobufCMessage *message)
{
    (void)message;
    gw_vllm_tokenizer_sent(call);
}
