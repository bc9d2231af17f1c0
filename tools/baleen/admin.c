#include "tools/baleen/admin.h"

#include <stdio.h>
#include <string.h>

#include "common/proc/rpc_client.h"
#include "proto/pack.h"
#include "tools/baleen/cli.h"
#include "tools/baleen/run_folder.h"

enum { ADMIN_STATUS_MS = 10000, ADMIN_ARENA_CHUNK_BYTES = 64 << 10, ADMIN_ARENA_BYTES_MAX = 256 << 20 };

cm_status admin_ask(const admin_service *service, const char *method, const ProtobufCMessage *request,
                    uint64_t timeout_ms, cm_bytes *reply, cm_error *err)
{
    pc_loop *loop;
    cm_bytes packed;
    cm_error inner = {0};
    char path[64];
    if (pc_loop_create(&loop) != CM_OK) {
        return cm_error_set(err, CM_E_IO, NULL, "no event loop");
    }
    cm_bytes_init(&packed, 0);
    pr_pack(request, &packed);
    snprintf(path, sizeof(path), "/baleen.control.v1.Admin/%s", method);
    pc_channel *channel = pc_channel_create_tls(loop, service->address, service->tls);
    cm_status status = pc_unary_wait(channel, path, packed.data, packed.len, timeout_ms, reply, &inner);
    if (status != CM_OK) {
        cli_explain_channel(service->address, service->tls, status, &inner, err);
    }
    pc_channel_destroy(channel);
    pc_loop_destroy(loop);
    cm_bytes_fini(&packed);
    return status;
}

cm_status admin_status(const admin_service *service, bool experts, cm_arena *arena,
                       Baleen__Control__V1__StatusReply **reply_out, cm_error *err)
{
    cm_bytes packed;
    Baleen__Control__V1__StatusRequest request = BALEEN__CONTROL__V1__STATUS_REQUEST__INIT;
    request.has_experts = request.experts = experts;
    cm_bytes_init(&packed, 0);
    cm_status status = admin_ask(service, "Status", &request.base, ADMIN_STATUS_MS, &packed, err);
    if (status == CM_OK && pr_unpack(&baleen__control__v1__status_reply__descriptor, packed.data, packed.len,
                                     arena, (ProtobufCMessage **)reply_out) != CM_OK) {
        status = cm_error_set(err, CM_E_PROTOCOL, NULL,
                              "the answer of %s is no status: not a coordinator, or of another version",
                              service->address);
    }
    cm_bytes_fini(&packed);
    return status;
}

/* ---- which one ---- */

static cm_status admin_list(const admin_target *target, run_addresses *run_out, pc_addresses *out,
                            cm_error *err)
{
    *run_out = (run_addresses){.tls = ""};
    if (target->coordinator[0] != '\0') {
        return pc_addresses_parse("coordinator", target->coordinator, out, err);
    }
    if (target->run[0] == '\0') {
        return cm_error_set(
            err, CM_E_CONFIG, "run",
            "which cluster? give --run DIR (the run folder of baleen up) or --coordinator HOST:PORT");
    }
    CM_TRY(run_folder_addresses(target->run, run_out, err));
    return pc_addresses_parse("coordinator", run_out->coordinator, out, err);
}

static cm_status admin_open_tls(const admin_target *target, const run_addresses *run, pc_tls **tls_out,
                                cm_error *err)
{
    if (run->tls[0] != '\0' && target->tls.tls_ca[0] == '\0') {
        return cli_open_certs(run->tls, tls_out, err);
    }
    return pc_tls_open(&target->tls, run->coordinator[0] != '\0' ? run->coordinator : target->coordinator,
                       "admin", tls_out, err);
}

static cm_status admin_find_in(const pc_addresses *list, cm_arena *arena, admin_service *service,
                               cm_error *err)
{
    char named[PC_ADDRESS_BYTES] = "";
    cm_status status = CM_E_UNAVAILABLE;
    bool standby = false;
    for (uint32_t i = 0; i <= list->n; i++) {
        Baleen__Control__V1__StatusReply *reply;
        cm_error why = {0};
        snprintf(service->address, PC_ADDRESS_BYTES, "%s", i < list->n ? list->text[i] : named);
        if (service->address[0] == '\0') {
            continue;
        }
        cm_arena_reset(arena);
        cm_status asked = admin_status(service, false, arena, &reply, &why);
        if (asked == CM_OK && !reply->standby) {
            return CM_OK;
        }
        if (asked != CM_OK && !standby) {
            *err = why;
            status = asked;
        } else if (asked == CM_OK) {
            standby = true;
            snprintf(named, sizeof(named), "%s", reply->active != NULL ? reply->active : "");
            status = cm_error_set(err, CM_E_UNAVAILABLE, NULL, "%s is no active coordinator: %.300s",
                                  service->address, reply->change != NULL ? reply->change : "");
        }
    }
    return status;
}

cm_status admin_find(const admin_target *target, admin_service *service_out, cm_error *err)
{
    pc_addresses list;
    run_addresses run;
    cm_arena arena;
    CM_TRY(admin_list(target, &run, &list, err));
    CM_TRY(admin_open_tls(target, &run, &service_out->tls, err));
    cm_arena_init(&arena, "status", ADMIN_ARENA_CHUNK_BYTES, ADMIN_ARENA_BYTES_MAX);
    cm_status status = admin_find_in(&list, &arena, service_out, err);
    cm_arena_fini(&arena);
    if (status != CM_OK) {
        admin_close(service_out);
    }
    return status;
}

void admin_close(admin_service *service)
{
    pc_tls_close(service->tls);
}
