#include "gateway/surface.h"

#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"

/* ---- chat and text completions: the gateway's own terms ---- */

static void *chat_create(const json_t *given, const char *fingerprint, gw_emit_fn emit, void *ctx)
{
    return gw_openai_create(GW_ASK_CHAT, given, fingerprint, emit, ctx);
}

static void *complete_create(const json_t *given, const char *fingerprint, gw_emit_fn emit, void *ctx)
{
    return gw_openai_create(GW_ASK_COMPLETE, given, fingerprint, emit, ctx);
}

static void openai_destroy(void *writer)
{
    gw_openai_destroy(writer);
}

static void *openai_choice(void *writer, uint32_t choice)
{
    return gw_openai_choice_of(writer, choice);
}

static void openai_error(const gw_error *error, const char *request_id, cm_bytes *out)
{
    (void)request_id;
    gw_openai_error(error, out);
}

const gw_surface gw_surface_chat = {
    .name = "http chat",
    .kind = GW_ASK_CHAT,
    .error = openai_error,
    .writer = {.create = chat_create,
               .destroy = openai_destroy,
               .choice = openai_choice,
               .events = gw_openai_events},
};

const gw_surface gw_surface_complete = {
    .name = "http completion",
    .kind = GW_ASK_COMPLETE,
    .error = openai_error,
    .writer = {.create = complete_create,
               .destroy = openai_destroy,
               .choice = openai_choice,
               .events = gw_openai_events},
};

const gw_surface *gw_surface_find(const char *name)
{
    static const gw_surface *const all[] = {&gw_surface_chat,
                                            &gw_surface_complete,
                                            &gw_surface_messages,
                                            &gw_surface_responses,
                                            &gw_surface_kserve_infer,
                                            &gw_surface_kserve_infer_chat,
                                            &gw_surface_kserve_generate,
                                            &gw_surface_kserve_generate_chat};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        if (strcmp(all[i]->name, name) == 0) {
            return all[i];
        }
    }
    return NULL;
}

/* ---- fields ---- */

void gw_surface_copy(const gw_surface_field *fields, const json_t *given, json_t *body)
{
    for (const gw_surface_field *f = fields; f->chat != NULL; f++) {
        json_t *value = f->is_copied ? json_object_get(given, f->own) : NULL;
        if (value != NULL && !json_is_null(value)) {
            json_object_set(body, f->chat, value);
        }
    }
}

/* text's first `from` becomes `to`; what does not fit is cut off. */
static void replace(char *text, size_t n_text, const char *from, const char *to)
{
    char whole[sizeof(((gw_error *)0)->message) + 128];
    char *at = strstr(text, from);
    if (at != NULL) {
        int before = (int)(at - text);
        snprintf(whole, sizeof(whole), "%.*s%s%s", before, text, to, at + strlen(from));
        snprintf(text, n_text, "%.*s", (int)n_text - 1, whole);
    }
}

void gw_surface_own_words(const gw_surface *surface, gw_error *error)
{
    for (const gw_surface_field *f = surface->fields; f != NULL && f->chat != NULL; f++) {
        size_t n = strlen(f->chat);
        bool about = strncmp(error->param, f->chat, n) == 0 && strchr(".[", error->param[n]) != NULL;
        if (about && strcmp(f->chat, f->own) != 0) {
            replace(error->message, sizeof(error->message), f->chat, f->own);
            replace(error->param, sizeof(error->param), f->chat, f->own);
            return;
        }
    }
}
