#include "tests/unit/grpc_rig.h"

#include <string.h>

#include "proto/pack.h"

rig g;

static void hook(void *arg)
{
    (void)arg;
    if (g.done != NULL && g.done()) {
        pc_loop_stop(g.loop);
    }
}

void until(bool (*done)(void))
{
    g.done = done;
    pc_loop_run(g.loop);
    g.done = NULL;
}

bool c_is_closed(void)
{
    return g.c.closed;
}

bool other_is_closed(void)
{
    return g.other.closed;
}

bool both_are_closed(void)
{
    return g.c.closed && g.other.closed;
}

bool c_has_one(void)
{
    return g.c.n_messages == 1;
}

int rig_set_up(void **state)
{
    (void)state;
    memset(&g, 0, sizeof(g));
    assert_int_equal(pc_loop_create(&g.loop), CM_OK);
    pc_loop_before_sleep(g.loop, hook, NULL);
    fake_init(&g.gateway, g.loop);
    assert_int_equal(gw_grpc_create(&g.gateway, g.loop, "127.0.0.1:0", NULL, &g.grpc, g.address, NULL),
                     CM_OK);
    g.channel = pc_channel_create(g.loop, g.address);
    cm_arena_init(&g.arena, "test", 64 << 10, 64 << 20);
    return 0;
}

int rig_tear_down(void **state)
{
    (void)state;
    pc_channel_destroy(g.channel);
    if (g.grpc != NULL) {
        gw_grpc_destroy(g.grpc);
    }
    fake_fini(&g.gateway);
    pc_loop_destroy(g.loop);
    client_fini(&g.c);
    client_fini(&g.other);
    plain_fini(&g.p);
    cm_arena_fini(&g.arena);
    return 0;
}

void *message(const client *c, uint32_t i, const ProtobufCMessageDescriptor *type)
{
    ProtobufCMessage *out;
    assert_true(i < c->n_messages && i < CLIENT_MESSAGES);
    assert_int_equal(pr_unpack(type, cm_bytes_text(&c->messages[i]), c->messages[i].len, &g.arena, &out),
                     CM_OK);
    assert_int_equal(out->n_unknown_fields, 0);
    return out;
}

void ask(const char *path, const void *request)
{
    client_fini(&g.c);
    client_ask(&g.c, g.channel, path, request, 0);
}

void ask_and_wait(const char *path, const void *request)
{
    ask(path, request);
    until(c_is_closed);
}

void expect_refused_bytes(const char *path, const void *data, size_t n_bytes, pc_code code, const char *field)
{
    plain_fini(&g.p);
    plain_run(&g.p, g.loop, g.address, path, data, n_bytes);
    assert_int_equal(g.p.code, code);
    assert_int_equal(g.p.n_messages, 0);
    assert_true(g.p.text[0] != 0);
    Google__Rpc__BadRequest *bad = plain_detail(&g.p, &google__rpc__bad_request__descriptor, &g.arena);
    if (field[0] == 0) {
        assert_null(bad);
        return;
    }
    assert_non_null(bad);
    assert_int_equal(bad->n_field_violations, 1);
    assert_string_equal(bad->field_violations[0]->field, field);
    assert_string_equal(bad->field_violations[0]->description, g.p.text);
}

void expect_refused(const char *path, const void *request, pc_code code, const char *field)
{
    cm_bytes packed;
    cm_bytes_init(&packed, 0);
    pr_pack(request, &packed);
    expect_refused_bytes(path, cm_bytes_text(&packed), packed.len, code, field);
    cm_bytes_fini(&packed);
}

void simple_init(simple_chat *chat)
{
    baleen__v1__chat_request__init(&chat->request);
    baleen__v1__message__init(&chat->message);
    baleen__v1__sampling__init(&chat->sampling);
    baleen__v1__routing__init(&chat->routing);
    chat->message.role = BALEEN__V1__ROLE__ROLE_USER;
    chat->message.content = "hello";
    chat->messages[0] = &chat->message;
    chat->request.n_messages = 1;
    chat->request.messages = chat->messages;
    chat->request.sampling = &chat->sampling;
    chat->request.routing = &chat->routing;
}

void script_short(gw_stream *stream)
{
    fake_started(stream);
    fake_text(stream, "hi");
    fake_flush(stream);
    fake_finish(stream, GW_REASON_STOP, NULL, -1);
}

void script_start_only(gw_stream *stream)
{
    fake_started(stream);
}
