/* What balancers and tools of SGLang and vLLM ask of a server, over HTTP and by their names. */
#include "gateway/http_private.h"

void gw_http_model_info(gw_http *http, struct evhttp_request *req, const char *rest)
{
    gw_info info;
    (void)rest;
    gw_gateway_info(http->gateway, &info);
    json_t *reply = json_pack("{s:s, s:s, s:s, s:b, s:I, s:I, s:n}", "model_path", info.model,
                              "tokenizer_path", info.model, "served_model_name", info.model, "is_generation",
                              1, "max_context_length", (json_int_t)info.context, "vocab_size",
                              (json_int_t)info.vocab, "preferred_sampling_params");
    gw_reply_json(req, 200, reply);
    json_decref(reply);
}

/* Over all routers, as one: which of them computes what is not the client's to choose. */
static json_t *load_of(const gw_info *info)
{
    return json_pack("{s:i, s:I, s:I, s:I, s:f}", "dp_rank", 0, "num_running_reqs", (json_int_t)info->running,
                     "num_waiting_reqs", (json_int_t)info->waiting, "num_reqs",
                     (json_int_t)info->running + info->waiting, "token_usage", info->kv_used);
}

void gw_http_server_info(gw_http *http, struct evhttp_request *req, const char *rest)
{
    gw_info info;
    (void)rest;
    gw_gateway_info(http->gateway, &info);
    const char *state = info.draining ? "draining" : info.ready ? "ready" : "starting";
    json_t *reply = json_pack("{s:s, s:s, s:s, s:s, s:s, s:f, s:I, s:i, s:[o]}", "server_type", "baleen",
                              "version", BALEEN_VERSION, "model_path", info.model, "served_model_name",
                              info.model, "status", state, "uptime_seconds", info.uptime_s, "epoch",
                              (json_int_t)info.epoch, "dp_size", 1, "internal_states", load_of(&info));
    gw_reply_json(req, 200, reply);
    json_decref(reply);
}

/* A list of ranks. */
void gw_http_get_load(gw_http *http, struct evhttp_request *req, const char *rest)
{
    gw_info info;
    (void)rest;
    gw_gateway_info(http->gateway, &info);
    json_t *reply = json_pack("[o]", load_of(&info));
    gw_reply_json(req, 200, reply);
    json_decref(reply);
}

void gw_http_loads(gw_http *http, struct evhttp_request *req, const char *rest)
{
    gw_info info;
    (void)rest;
    gw_gateway_info(http->gateway, &info);
    json_t *reply = json_pack("{s:s, s:i, s:[o]}", "version", BALEEN_VERSION, "dp_rank_count", 1, "loads",
                              load_of(&info));
    gw_reply_json(req, 200, reply);
    json_decref(reply);
}
