/* The interfaces on the gateway's gRPC port as protoc describes them: a packed FileDescriptorSet with all
 * imports, made at build time. Thread: any. */
#pragma once
#include <stddef.h>
#include <stdint.h>

extern const uint8_t pr_services[];
extern const size_t pr_services_bytes;
