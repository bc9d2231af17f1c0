/* Strings between protobuf-c and us. Its strings end at a NUL, those on the wire need not: what we send is
 * written with its length, and what we get is held against the packed request before anybody believes the
 * unpacked one. */
#include <jansson.h>
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"
#include "gateway/grpc_private.h"

enum { FIELDS_MAX = 32 };

/* ---- out ---- */

static void put_varint(cm_bytes *out, uint64_t value)
{
    for (; value >= 0x80; value >>= 7) {
        uint8_t low = (uint8_t)(value | 0x80);
        cm_bytes_append(out, &low, 1);
    }
    uint8_t high = (uint8_t)value;
    cm_bytes_append(out, &high, 1);
}

/* A field that protobuf-c does not know it packs as it is: number, length and bytes are those of the string.
 * Where the field is required, the empty string packed for it comes first and the last one counts. */
void gw_grpc_put_text(gw_grpc *grpc, ProtobufCMessage *message, const char *field, const void *text,
                      size_t n_bytes)
{
    const ProtobufCFieldDescriptor *known =
        protobuf_c_message_descriptor_get_field_by_name(message->descriptor, field);
    CM_ASSERT_MSG(known != NULL && known->type == PROTOBUF_C_TYPE_STRING, "%s.%s", message->descriptor->name,
                  field);
    cm_bytes_clear(&grpc->text);
    put_varint(&grpc->text, n_bytes);
    cm_bytes_append(&grpc->text, text, n_bytes);
    grpc->text_field = (ProtobufCMessageUnknownField){.tag = known->id,
                                                      .wire_type = PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED,
                                                      .len = grpc->text.len,
                                                      .data = grpc->text.data};
    message->n_unknown_fields = 1;
    message->unknown_fields = &grpc->text_field;
}

/* ---- in ---- */

typedef struct wire {
    const uint8_t *at, *end;
} wire;

typedef struct wire_field {
    uint32_t number;
    const uint8_t *data; /* NULL unless its length is given */
    size_t n_bytes;
} wire_field;

static bool take_varint(wire *w, uint64_t *value_out)
{
    uint64_t value = 0;
    for (unsigned shift = 0; shift < 64 && w->at < w->end; shift += 7) {
        uint8_t byte = *w->at++;
        value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) {
            *value_out = value;
            return true;
        }
    }
    return false;
}

static bool take_bytes(wire *w, uint64_t n)
{
    if (n > (uint64_t)(w->end - w->at)) {
        return false;
    }
    w->at += n;
    return true;
}

static bool take_field(wire *w, wire_field *field_out)
{
    uint64_t key, value;
    if (!take_varint(w, &key)) {
        return false;
    }
    *field_out = (wire_field){.number = (uint32_t)(key >> 3)};
    switch ((ProtobufCWireType)(key & 7)) {
    case PROTOBUF_C_WIRE_TYPE_VARINT:
        return take_varint(w, &value);
    case PROTOBUF_C_WIRE_TYPE_64BIT:
        return take_bytes(w, 8);
    case PROTOBUF_C_WIRE_TYPE_32BIT:
        return take_bytes(w, 4);
    case PROTOBUF_C_WIRE_TYPE_LENGTH_PREFIXED:
        if (!take_varint(w, &value)) {
            return false;
        }
        field_out->data = w->at;
        field_out->n_bytes = (size_t)value;
        return take_bytes(w, value);
    default:
        return false;
    }
}

static cm_status check_string(const wire_field *field, const char *path, gw_error *error_out)
{
    if (memchr(field->data, 0, field->n_bytes) != NULL) {
        gw_error_set(error_out, GW_CAUSE_INVALID, path, "%s must not contain U+0000", path);
        return CM_E_INVALID;
    }
    json_t *text = json_stringn((const char *)field->data, field->n_bytes);
    if (text == NULL) {
        gw_error_set(error_out, GW_CAUSE_INVALID, path, "%s is not UTF-8", path);
        return CM_E_INVALID;
    }
    json_decref(text);
    return CM_OK;
}

static cm_status check_message(const ProtobufCMessageDescriptor *descriptor, wire w, const char *path,
                               gw_error *error_out);

static cm_status check_field(const ProtobufCFieldDescriptor *known, const wire_field *field, uint32_t index,
                             const char *path, gw_error *error_out)
{
    char child[96];
    if (known->label == PROTOBUF_C_LABEL_REPEATED) {
        snprintf(child, sizeof(child), "%s%s%s[%u]", path, path[0] != 0 ? "." : "", known->name, index);
    } else {
        snprintf(child, sizeof(child), "%s%s%s", path, path[0] != 0 ? "." : "", known->name);
    }
    if (known->type == PROTOBUF_C_TYPE_STRING) {
        return check_string(field, child, error_out);
    }
    wire inner = {field->data, field->data + field->n_bytes};
    return check_message(known->descriptor, inner, child, error_out);
}

static cm_status check_message(const ProtobufCMessageDescriptor *descriptor, wire w, const char *path,
                               gw_error *error_out)
{
    uint32_t n_seen[FIELDS_MAX] = {0};
    wire_field field;
    CM_ASSERT(descriptor->n_fields <= FIELDS_MAX);
    while (w.at < w.end) {
        if (!take_field(&w, &field)) {
            gw_error_set(error_out, GW_CAUSE_INVALID, path, "the request is not well-formed");
            return CM_E_INVALID;
        }
        const ProtobufCFieldDescriptor *known =
            protobuf_c_message_descriptor_get_field(descriptor, field.number);
        if (known == NULL || field.data == NULL ||
            (known->type != PROTOBUF_C_TYPE_STRING && known->type != PROTOBUF_C_TYPE_MESSAGE)) {
            continue;
        }
        CM_TRY(check_field(known, &field, n_seen[known - descriptor->fields]++, path, error_out));
    }
    return CM_OK;
}

cm_status gw_grpc_check_strings(const ProtobufCMessageDescriptor *descriptor, const uint8_t *data,
                                size_t n_bytes, gw_error *error_out)
{
    return check_message(descriptor, (wire){data, data + n_bytes}, "", error_out);
}
