/* Packing and unpacking protobuf messages with our memory rules: unpacking takes everything from an arena, so
 * one reset frees all of it. Thread: any, one arena at a time. */
#pragma once
#include <protobuf-c/protobuf-c.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/base/status.h"

/* Appends the packed message to out. */
void pr_pack(const ProtobufCMessage *message, cm_bytes *out);
/* message_out lives in the arena until its reset. CM_E_INVALID: not that message; CM_E_TOO_LONG: the arena is
 * full. Cast: pr_unpack(&baleen__v1__chat_request__descriptor, ..., (ProtobufCMessage **)&request) */
CM_MUST_CHECK cm_status pr_unpack(const ProtobufCMessageDescriptor *descriptor, const void *data,
                                  size_t n_bytes, cm_arena *arena, ProtobufCMessage **message_out);
