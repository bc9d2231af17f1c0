/* Server reflection, v1 and v1alpha: which services there are and the descriptors of their files. The
 * messages of both versions are the same to the byte. */
#include <stdio.h>
#include <string.h>

#include "gateway/grpc_private.h"
#include "proto/descriptor.pb-c.h"
#include "proto/services.h"

enum { ARENA_CHUNK_BYTES = 64 << 10, ARENA_BYTES_MAX = 4 << 20 };

typedef Grpc__Reflection__V1__ServerReflectionRequest reflection_request;
typedef Grpc__Reflection__V1__ServerReflectionResponse reflection_response;

typedef struct reflection_file {
    ProtobufCBinaryData packed; /* as protoc wrote it */
    const Baleen__Descriptor__V1__File *names;
} reflection_file;

struct gw_reflection {
    cm_arena arena; /* holds everything */
    reflection_file *files;
    size_t n_files;
};

static ProtobufCMessage *unpack(cm_arena *arena, const ProtobufCMessageDescriptor *type, const uint8_t *data,
                                size_t n_bytes)
{
    ProtobufCMessage *message;
    cm_status status = pr_unpack(type, data, n_bytes, arena, &message);
    CM_ASSERT_MSG(status == CM_OK, "%s in the descriptors of this program", type->name);
    return message;
}

gw_reflection *gw_reflection_create(void)
{
    gw_reflection *reflection = cm_alloc(sizeof(*reflection));
    cm_arena *arena = &reflection->arena;
    cm_arena_init(arena, "reflection", ARENA_CHUNK_BYTES, ARENA_BYTES_MAX);
    const Baleen__Descriptor__V1__FileSet *set = (const Baleen__Descriptor__V1__FileSet *)unpack(
        arena, &baleen__descriptor__v1__file_set__descriptor, pr_services, pr_services_bytes);
    reflection->n_files = set->n_file;
    reflection->files = cm_arena_take(arena, sizeof(*reflection->files) * set->n_file);
    for (size_t i = 0; i < set->n_file; i++) {
        reflection->files[i].packed = set->file[i];
        reflection->files[i].names = (const Baleen__Descriptor__V1__File *)unpack(
            arena, &baleen__descriptor__v1__file__descriptor, set->file[i].data, set->file[i].len);
    }
    return reflection;
}

void gw_reflection_destroy(gw_reflection *reflection)
{
    cm_arena_fini(&reflection->arena);
    cm_free(reflection);
}

/* ---- which file has a symbol ---- */

/* What follows scope's name and its dot in symbol; symbol itself for an empty scope; NULL when it is not
 * inside. */
static const char *inside(const char *scope, const char *symbol)
{
    size_t n = scope != NULL ? strlen(scope) : 0;
    if (n == 0) {
        return symbol;
    }
    return strncmp(symbol, scope, n) == 0 && symbol[n] == '.' ? symbol + n + 1 : NULL;
}

static bool has_name(Baleen__Descriptor__V1__Named *const *list, size_t n, const char *symbol)
{
    for (size_t i = 0; i < n; i++) {
        if (strcmp(list[i]->name, symbol) == 0) {
            return true;
        }
    }
    return false;
}

static bool enums_have(Baleen__Descriptor__V1__Enum *const *list, size_t n, const char *symbol)
{
    for (size_t i = 0; i < n; i++) {
        if (strcmp(list[i]->name, symbol) == 0 || has_name(list[i]->value, list[i]->n_value, symbol)) {
            return true;
        }
    }
    return false;
}

static bool message_has(const Baleen__Descriptor__V1__Message *message, const char *symbol)
{
    const char *rest = inside(message->name, symbol);
    if (rest == NULL) {
        return strcmp(message->name, symbol) == 0;
    }
    for (size_t i = 0; i < message->n_nested_type; i++) {
        if (message_has(message->nested_type[i], rest)) {
            return true;
        }
    }
    return has_name(message->field, message->n_field, rest) ||
           has_name(message->oneof_decl, message->n_oneof_decl, rest) ||
           enums_have(message->enum_type, message->n_enum_type, rest);
}

static bool service_has(const Baleen__Descriptor__V1__Service *service, const char *symbol)
{
    const char *rest = inside(service->name, symbol);
    return rest != NULL ? has_name(service->method, service->n_method, rest)
                        : strcmp(service->name, symbol) == 0;
}

static bool file_has(const Baleen__Descriptor__V1__File *file, const char *symbol)
{
    const char *rest = inside(file->package, symbol);
    if (rest == NULL) {
        return false;
    }
    for (size_t i = 0; i < file->n_message_type; i++) {
        if (message_has(file->message_type[i], rest)) {
            return true;
        }
    }
    for (size_t i = 0; i < file->n_service; i++) {
        if (service_has(file->service[i], rest)) {
            return true;
        }
    }
    return enums_have(file->enum_type, file->n_enum_type, rest);
}

static const reflection_file *find_symbol(const gw_reflection *reflection, const char *symbol)
{
    for (size_t i = 0; i < reflection->n_files; i++) {
        if (file_has(reflection->files[i].names, symbol)) {
            return &reflection->files[i];
        }
    }
    return NULL;
}

static const reflection_file *find_name(const gw_reflection *reflection, const char *name)
{
    for (size_t i = 0; i < reflection->n_files; i++) {
        if (strcmp(reflection->files[i].names->name, name) == 0) {
            return &reflection->files[i];
        }
    }
    return NULL;
}

/* ---- answers ---- */

static void send_not_found(gw_grpc_call *call, reflection_response *response, const char *what,
                           const char *name)
{
    char text[512];
    Grpc__Reflection__V1__ErrorResponse error = GRPC__REFLECTION__V1__ERROR_RESPONSE__INIT;
    error.has_error_code = true;
    error.error_code = PC_CODE_NOT_FOUND;
    snprintf(text, sizeof(text), "there is no %s%s here", what, name);
    error.error_message = text;
    response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    response->error_response = &error;
    gw_grpc_send(call, &response->base);
}

/* The file alone: clients ask for its imports by name when they lack them. */
static void send_file(gw_grpc_call *call, reflection_response *response, const reflection_file *file,
                      const char *what, const char *name)
{
    Grpc__Reflection__V1__FileDescriptorResponse files = GRPC__REFLECTION__V1__FILE_DESCRIPTOR_RESPONSE__INIT;
    if (file == NULL) {
        char shown[256];
        /* a client's name may be long, and must not be cut inside a character */
        bool short_enough = strlen(name) < sizeof(shown);
        snprintf(shown, sizeof(shown), "%s", short_enough ? name : "with such a long name");
        send_not_found(call, response, what, shown);
        return;
    }
    ProtobufCBinaryData packed = file->packed;
    files.n_file_descriptor_proto = 1;
    files.file_descriptor_proto = &packed;
    response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    response->file_descriptor_response = &files;
    gw_grpc_send(call, &response->base);
}

enum { SERVICES_MAX = 16 };

static void send_services(gw_grpc_call *call, reflection_response *response)
{
    const gw_reflection *reflection = call->grpc->reflection;
    Grpc__Reflection__V1__ListServiceResponse list = GRPC__REFLECTION__V1__LIST_SERVICE_RESPONSE__INIT;
    Grpc__Reflection__V1__ServiceResponse services[SERVICES_MAX], *pointers[SERVICES_MAX];
    char names[SERVICES_MAX][128];
    for (size_t i = 0; i < reflection->n_files; i++) {
        const Baleen__Descriptor__V1__File *file = reflection->files[i].names;
        for (size_t k = 0; k < file->n_service; k++) {
            size_t n = list.n_service++;
            CM_ASSERT(n < SERVICES_MAX);
            snprintf(names[n], sizeof(names[n]), "%s.%s", file->package, file->service[k]->name);
            grpc__reflection__v1__service_response__init(&services[n]);
            services[n].name = names[n];
            pointers[n] = &services[n];
        }
    }
    list.service = pointers;
    response->message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
    response->list_services_response = &list;
    gw_grpc_send(call, &response->base);
}

void gw_grpc_reflect(gw_grpc_call *call, const ProtobufCMessage *message)
{
    reflection_request *request = (reflection_request *)(uintptr_t)message; /* told back, not changed */
    reflection_response response = GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__INIT;
    const gw_reflection *reflection = call->grpc->reflection;
    gw_error error;
    response.valid_host = request->host;
    response.original_request = request;
    switch (request->message_request_case) {
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME:
        send_file(call, &response, find_name(reflection, request->file_by_filename), "file ",
                  request->file_by_filename);
        return;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL:
        send_file(call, &response, find_symbol(reflection, request->file_containing_symbol), "symbol ",
                  request->file_containing_symbol);
        return;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES:
        send_services(call, &response);
        return;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_EXTENSION:
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_ALL_EXTENSION_NUMBERS_OF_TYPE:
        send_not_found(call, &response, "extension", "");
        return;
    default:
        gw_error_set(&error, GW_CAUSE_INVALID, "message_request", "message_request is missing");
        gw_grpc_fail(call, &error);
        return;
    }
}

void gw_grpc_reflect_drain(gw_grpc_call *call)
{
    gw_error error;
    gw_error_set(&error, GW_CAUSE_UNAVAILABLE, NULL, "this gateway is shutting down");
    gw_grpc_fail(call, &error);
}
