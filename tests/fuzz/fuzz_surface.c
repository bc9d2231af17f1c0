/* Input: which surface, and how its answer ends (1 byte), then a client's body; what the body's text field
 * "input" or "system" says is what the model says. */
#include <string.h>

#include "common/model/chat.h"
#include "gateway/anthropic_body.h"
#include "gateway/request.h"
#include "gateway/responses_body.h"
#include "tests/fuzz/fuzz.h"

enum { VOCAB = 1000, RESPONSES = 1, CUT = 2 };

static void check_object(void *ctx, uint32_t choice, const char *json, size_t n_bytes, bool last)
{
    uint32_t *n_last = ctx;
    json_t *object = json_loadb(json, n_bytes, JSON_ALLOW_NUL, NULL);
    CM_ASSERT(choice == 0 && *n_last == 0 && json_is_object(object));
    *n_last += last;
    json_decref(object);
}

typedef struct teller {
    const gw_surface *surface;
    void *writer;
} teller;

static void tell_piece(void *ctx, const md_piece *piece)
{
    teller *t = ctx;
    t->surface->writer.events()->piece(t->surface->writer.choice(t->writer, 0), piece);
}

/* The model says text; every object of the answer is JSON and the last of them one. */
static void answer(const gw_surface *surface, const json_t *given, const char *text, bool cut)
{
    uint32_t n_last = 0;
    cm_bytes beat;
    teller t = {surface, surface->writer.create(given, "fp_0", check_object, &n_last)};
    md_parser_options options = {.start_in_reasoning = true, .tools = true};
    md_parser *parser = md_parser_create(&options);
    gw_start start = {.request_id = "r1", .model = "m"};
    void *ctx = surface->writer.choice(t.writer, 0);
    surface->writer.events()->started(ctx, &start);
    md_parser_push_text(parser, text, strlen(text), tell_piece, &t);
    cm_bytes_init(&beat, 0);
    surface->writer.keep_alive(t.writer, &beat);
    md_parser_finish(parser, tell_piece, &t);
    gw_finish finish = {.reason = cut ? GW_REASON_LENGTH : GW_REASON_STOP, .stop_id = -1, .parser = parser};
    surface->writer.events()->finished(ctx, &finish);
    CM_ASSERT(n_last == 1);
    cm_bytes_fini(&beat);
    md_parser_destroy(parser);
    surface->writer.destroy(t.writer);
}

/* The chat body is one for everybody behind: it is refused with a sentence or taken. */
static void check_body(const json_t *body)
{
    gw_request request;
    gw_error error = {0};
    md_chat_options options;
    json_t *messages;
    cm_error err = {0};
    if (gw_request_parse(GW_ASK_CHAT, body, VOCAB, &request, &error) == CM_OK) {
        gw_request_free(&request);
    } else {
        CM_ASSERT(error.message[0] != '\0');
    }
    if (md_chat_from_request(body, MD_PROFILE_G, &messages, &options, &err) == CM_OK) {
        json_decref(messages);
    } else {
        CM_ASSERT(err.text[0] != '\0');
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    json_t *given = size > 0 ? json_loadb((const char *)data + 1, size - 1, JSON_ALLOW_NUL, NULL) : NULL;
    json_t *body;
    gw_error error = {0};
    if (!json_is_object(given)) {
        json_decref(given);
        return 0;
    }
    bool responses = (data[0] & RESPONSES) != 0;
    const gw_surface *surface = responses ? &gw_surface_responses : &gw_surface_messages;
    if ((responses ? gw_responses_body : gw_anthropic_count_body)(given, &body, &error) == CM_OK) {
        const char *text = json_string_value(json_object_get(given, responses ? "input" : "system"));
        check_body(body);
        answer(surface, given, text != NULL ? text : "", (data[0] & CUT) != 0);
        json_decref(body);
    } else {
        CM_ASSERT(error.message[0] != '\0' && error.cause < GW_CAUSE_COUNT);
        gw_surface_own_words(surface, &error);
    }
    json_decref(given);
    return 0;
}
