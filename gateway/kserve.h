/* KServe's Open Inference Protocol v2 as the one model speaks it, for gRPC and REST alike: what tensors it
 * takes and gives, and a request's tensors as the OpenAI body that gw_stream_open wants. Thread: any. */
#pragma once
#include "gateway/stream.h"
#include "proto/kserve.pb-c.h"

#define GW_KSERVE_VERSION  "1" /* of the model */
#define GW_KSERVE_OUTPUT   "text_output"
#define GW_KSERVE_PLATFORM "baleen"

typedef enum gw_kserve_name {
    GW_KSERVE_TEXT,
    GW_KSERVE_IDS,
    GW_KSERVE_MESSAGES,
    GW_KSERVE_STREAM,
    GW_KSERVE_SAMPLING,
    GW_KSERVE_EXCLUDE,
    GW_KSERVE_INPUTS
} gw_kserve_name;
typedef enum gw_kserve_type { GW_KSERVE_BYTES, GW_KSERVE_BOOL, GW_KSERVE_INT32 } gw_kserve_type;
typedef struct gw_kserve_tensor {
    const char *name;
    gw_kserve_type type;
    int64_t n; /* elements; -1: any number */
} gw_kserve_tensor;
extern const gw_kserve_tensor gw_kserve_inputs[GW_KSERVE_INPUTS]; /* by gw_kserve_name */
const char *gw_kserve_type_name(gw_kserve_type type);             /* "BYTES" */

/* "" and NULL are the served model, of its only version. GW_CAUSE_MODEL_NOT_FOUND else. */
CM_MUST_CHECK cm_status gw_kserve_check_model(const gw_gateway *gateway, const char *name,
                                              const char *version, gw_error *error_out);

/* ---- tensors of a request ---- */
typedef struct gw_kserve_request {
    json_t *data[GW_KSERVE_INPUTS]; /* a list of elements each; NULL: not given */
} gw_kserve_request;                /* zeros are an empty one */
void gw_kserve_request_fini(gw_kserve_request *request);

/* Which of the inputs it is. CM_E_INVALID: none, or it has another datatype. */
CM_MUST_CHECK cm_status gw_kserve_find(const char *name, const char *datatype, gw_kserve_name *name_out,
                                       gw_error *error_out);
/* The elements of a tensor in raw form: booleans in a byte, integers in four, little-endian, BYTES each
 * behind its length in four bytes. *data_out: a new list. CM_E_INVALID: cut, no text, or more elements than
 * the tensor has. */
CM_MUST_CHECK cm_status gw_kserve_from_raw(gw_kserve_name name, const uint8_t *raw, size_t n_bytes,
                                           json_t **data_out, gw_error *error_out);
/* data: a list of strings, booleans or integers as the type wants them; given, whatever comes of it. */
CM_MUST_CHECK cm_status gw_kserve_put(gw_kserve_request *request, gw_kserve_name name, const int64_t *shape,
                                      size_t n_dim, json_t *data, gw_error *error_out);

/* ---- what is asked ---- */
typedef struct gw_kserve_ask {
    gw_ask_kind kind;
    json_t *body; /* owned: for gw_ask */
    bool stream;
    bool echo; /* the body's prompt comes before the answer's text */
} gw_kserve_ask;
CM_MUST_CHECK cm_status gw_kserve_make_ask(const gw_kserve_request *request, const char *model,
                                           gw_kserve_ask *ask_out, gw_error *error_out);
void gw_kserve_ask_fini(gw_kserve_ask *ask);
/* ModelInfer's request, whole. Its model is not looked at. */
CM_MUST_CHECK cm_status gw_kserve_read_grpc(const Inference__ModelInferRequest *request,
                                            gw_kserve_ask *ask_out, gw_error *error_out);
/* A field of the body to the tensor or parameter it came from. */
void gw_kserve_name_field(gw_error *error);
