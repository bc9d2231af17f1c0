# The gRPC surface.
set(GW_GRPC_SOURCES grpc.c grpc_body.c grpc_chat.c grpc_error.c grpc_generate.c grpc_health.c grpc_json.c grpc_small.c
                    grpc_text.c)
