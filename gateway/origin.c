/* What a request is known by, and what another gateway needs to tell its streams again. */
#include <openssl/evp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/assert.h"
#include "common/base/clock.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "gateway/gateway_private.h"
#include "proto/messages.h"

struct gw_origin {
    uint32_t refs;
    char *id;                  /* towards clients */
    uint8_t key[GW_KEY_BYTES]; /* towards routers: hash of it and of whose it is, since gw_origin_bind */
    uint64_t birth, seed;
    uint64_t term; /* when the client came; later than whoever had the streams before */
    int64_t created_s;
    char *resume; /* JSON; NULL: it cannot be told by another gateway */
    size_t n_resume;
};

static char *make_id(gw_ask_kind kind)
{
    char text[48];
    snprintf(text, sizeof(text), "%s-%016llx%016llx", kind == GW_ASK_CHAT ? "chatcmpl" : "cmpl",
             (unsigned long long)cm_random_u64(), (unsigned long long)cm_random_u64());
    return cm_strdup(text);
}

void gw_origin_hash(const gw_tenant *tenant, const char *id, uint8_t key_out[GW_KEY_BYTES])
{
    uint8_t hash[EVP_MAX_MD_SIZE];
    cm_bytes text;
    cm_bytes_init(&text, 0);
    cm_bytes_printf(&text, "%s/%s", tenant != NULL ? gw_tenant_name(tenant) : "", id);
    int done = EVP_Digest(text.data, text.len, hash, NULL, EVP_sha256(), NULL);
    CM_ASSERT(done == 1);
    memcpy(key_out, hash, GW_KEY_BYTES);
    cm_bytes_fini(&text);
}

void gw_origin_bind(gw_origin *origin, const gw_tenant *tenant)
{
    gw_origin_hash(tenant, origin->id, origin->key);
}

/* Numbers as text: JSON's integers end at 63 bits. */
static void pack_resume(gw_origin *origin, const char *surface, const json_t *body, const json_t *options)
{
    char seed[20], birth[20];
    snprintf(seed, sizeof(seed), "%016llx", (unsigned long long)origin->seed);
    snprintf(birth, sizeof(birth), "%016llx", (unsigned long long)origin->birth);
    json_t *all = json_pack("{s:s, s:s, s:I, s:s, s:s, s:O}", "surface", surface, "id", origin->id, "created",
                            (json_int_t)origin->created_s, "seed", seed, "birth", birth, "body", body);
    if (options != NULL) {
        json_object_set(all, "options", (json_t *)(uintptr_t)options);
    }
    origin->n_resume = json_dumpb(all, NULL, 0, JSON_COMPACT);
    if (origin->n_resume <= PR_RESUME_BYTES_MAX) {
        origin->resume = cm_alloc(origin->n_resume);
        json_dumpb(all, origin->resume, origin->n_resume, JSON_COMPACT);
    }
    json_decref(all);
}

gw_origin *gw_origin_create(gw_ask_kind kind, const char *id, const char *surface, const json_t *body,
                            const json_t *options)
{
    gw_origin *origin = cm_alloc(sizeof(*origin));
    *origin = (gw_origin){.refs = 1,
                          .id = id != NULL ? cm_strdup(id) : make_id(kind),
                          .birth = cm_random_u64(),
                          .seed = cm_random_u64(),
                          .term = cm_wall_us(),
                          .created_s = (int64_t)(cm_wall_us() / 1000000u)};
    if (surface != NULL) {
        pack_resume(origin, surface, body, options);
    }
    return origin;
}

static bool read_hex(const json_t *all, const char *name, uint64_t *out)
{
    const char *text = json_string_value(json_object_get(all, name));
    char *end = NULL;
    *out = text != NULL ? strtoull(text, &end, 16) : 0;
    return text != NULL && end != text && *end == 0;
}

gw_origin *gw_origin_read(const json_t *all, uint64_t after_term)
{
    const char *id = json_string_value(json_object_get(all, "id"));
    const char *surface = json_string_value(json_object_get(all, "surface"));
    const json_t *created = json_object_get(all, "created"), *body = json_object_get(all, "body");
    uint64_t seed, birth, now_us = cm_wall_us();
    if (id == NULL || surface == NULL || !json_is_integer(created) || !json_is_object(body) ||
        !read_hex(all, "seed", &seed) || !read_hex(all, "birth", &birth)) {
        return NULL;
    }
    gw_origin *origin = cm_alloc(sizeof(*origin));
    *origin = (gw_origin){.refs = 1,
                          .id = cm_strdup(id),
                          .birth = birth,
                          .seed = seed,
                          .term = now_us > after_term ? now_us : after_term + 1,
                          .created_s = json_integer_value(created)};
    pack_resume(origin, surface, body, json_object_get(all, "options"));
    return origin;
}

uint64_t gw_origin_birth(const gw_origin *origin)
{
    return origin->birth;
}

gw_origin *gw_origin_hold(gw_origin *origin)
{
    origin->refs++;
    return origin;
}

void gw_origin_release(gw_origin *origin)
{
    if (origin != NULL && --origin->refs == 0) {
        cm_free(origin->id);
        cm_free(origin->resume);
        cm_free(origin);
    }
}

const char *gw_origin_id(const gw_origin *origin)
{
    return origin->id;
}

void gw_origin_key(const gw_origin *origin, uint32_t choice, Baleen__Engine__V1__SeqKey *key_out)
{
    baleen__engine__v1__seq_key__init(key_out);
    key_out->id = (ProtobufCBinaryData){.len = GW_KEY_BYTES, .data = (uint8_t *)(uintptr_t)origin->key};
    key_out->choice = choice;
    key_out->birth = origin->birth;
}

bool gw_origin_resume(const gw_origin *origin, ProtobufCBinaryData *resume_out)
{
    *resume_out = (ProtobufCBinaryData){.len = origin->n_resume, .data = (uint8_t *)origin->resume};
    return origin->resume != NULL;
}

uint64_t gw_origin_seed(const gw_origin *origin)
{
    return origin->seed;
}

int64_t gw_origin_created_s(const gw_origin *origin)
{
    return origin->created_s;
}

uint64_t gw_origin_term(const gw_origin *origin)
{
    return origin->term;
}
