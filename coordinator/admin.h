/* The admin service: operators' questions and wishes as unary calls. A wish goes into the machine with a
 * ticket; its call stays open until the machine's answer. Thread: the loop's. */
#pragma once
#include "common/proc/rpc_server.h"
#include "coordinator/co_core.h"

#define CO_ADMIN_PATH "/baleen.control.v1.Admin/"

typedef struct co_admin co_admin;

typedef struct co_admin_options {
    co_core *const *core;                       /* NULL while this coordinator is not the active one */
    const co_peer *self;                        /* the coordinator's own row */
    const char *active, *why;                   /* meanwhile: who is, "" = not known; what to say */
    uint32_t calls_max;                         /* wishes open at once */
    void (*wish)(void *ctx, const co_in *wish); /* into the machine; may answer before it returns */
    void *ctx;
} co_admin_options;

co_admin *co_admin_create(const co_admin_options *options);
void co_admin_destroy(co_admin *admin); /* after its last call was closed */
/* A request of the service arrived. */
void co_admin_message(co_admin *admin, pc_call *call, const uint8_t *data, size_t n_bytes);
void co_admin_closed(co_admin *admin, pc_call *call);
/* CO_OUT_ANSWER of the machine. */
void co_admin_answer(co_admin *admin, const co_out *out);
/* Ends all open calls: nobody will answer them any more. New ones may come. */
void co_admin_stop(co_admin *admin);
