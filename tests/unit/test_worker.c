/* A worker's engine at its links: answers are the oracle's bits in the order asked, and every old, foreign,
 * broken or misdirected frame is refused with its reason while the others go on, also while it computes. */
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/clock.h"
#include "common/base/failpoint.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/base/stats.h"
#include "proto/frames.h"
#include "proto/messages.h"
#include "worker/engine.h"

enum {
    ROUTER_ID = 7,
    WORKER_ID = 3,
    ROWS = 4,
    ROWS_MANY = 150,  /* of each expert: computed in three slices */
    ROWS_LONG = 1000, /* answered in more than one message */
    NARROW_BYTES = 64 * 2 * 160,
    ROWS_NARROW = 100,
    WAIT_MS = 30000,
    HELD = 8,
    BURST = 80,
};

typedef struct fixture {
    md_checkpoint *checkpoint;
    const md_geometry *g;
    wk_engine *engine;
    pthread_t thread;
    pc_epoch *epoch;
    net *n;
    net_peer *peer;
    char address[NET_ADDRESS_BYTES];
    uint8_t *payload;
    pr_dispatch header;
} fixture;

static void *run(void *arg)
{
    wk_engine_run(arg);
    return NULL;
}

static pc_epoch *make_epoch(const md_geometry *g, uint64_t number, uint64_t cluster)
{
    static const uint32_t members[2] = {WORKER_ID, WORKER_ID + 1};
    static const uint64_t capacity[2] = {UINT64_MAX, UINT64_MAX};
    cm_error err;
    pc_epoch *epoch = cm_alloc(sizeof(*epoch));
    epoch->refs = 1;
    epoch->number = number;
    epoch->cluster = cluster;
    assert_int_equal(
        pr_placement_plan(g->n_layer, g->n_expert, members, 2, capacity, NULL, &epoch->placement, &err),
        CM_OK);
    return epoch;
}

/* The next event of a kind; anything else fails the test. */
static net_event await(fixture *f, net_event_kind kind)
{
    net_event event;
    uint64_t give_up = cm_now_ms() + WAIT_MS;
    for (;;) {
        while (net_poll(f->n, &event, 1) == 1) {
            if (event.kind == kind) {
                return event;
            }
            if (event.kind != NET_EV_SENT) {
                fail_msg("event %d while waiting for %d: %s", event.kind, kind, cm_status_text(event.status));
            }
        }
        if (cm_now_ms() > give_up) {
            fail_msg("no event %d", kind);
        }
        if (net_arm(f->n)) {
            struct pollfd fd = {.fd = net_fd(f->n), .events = POLLIN};
            poll(&fd, 1, 100);
        }
    }
}

/* The worker tells its cluster once its thread runs: before that it refuses us. */
static void link_up(fixture *f)
{
    cm_error err;
    for (f->peer = NULL; f->peer == NULL;) {
        net_event event;
        assert_int_equal(net_connect(f->n, f->address, &f->peer, &err), CM_OK);
        do {
            while (net_poll(f->n, &event, 1) == 0) {
                struct pollfd fd = {.fd = net_fd(f->n), .events = POLLIN};
                if (net_arm(f->n)) {
                    poll(&fd, 1, 100);
                }
            }
        } while (event.kind == NET_EV_SENT); /* of the link before */
        f->peer = event.kind == NET_EV_UP ? f->peer : NULL;
    }
}

static int setup_with(void **state, const char *backend, uint32_t message_bytes_max, uint32_t row_max)
{
    fixture *f = cm_alloc(sizeof(*f));
    cm_error err = {0};
    net_options options;
    if (md_checkpoint_open(BALEEN_TEST_DATA "/model/tiny-odd/ckpt", &f->checkpoint, NULL, NULL, &err) !=
        CM_OK) {
        fail_msg("%s", err.text);
    }
    f->g = md_checkpoint_geometry(f->checkpoint);
    net_options_defaults(&options);
    options.backend = backend;
    options.message_bytes_max = message_bytes_max;
    options.silence_ms = 60000;
    wk_engine_options engine = {.checkpoint = f->checkpoint,
                                .device = {.backend = "cpu", .isa = "auto", .n_threads = 3},
                                .rows = options,
                                .address = "t_worker",
                                .row_max = row_max,
                                .frame_max = strcmp(backend, "local") == 0 ? 4 : 16,
                                .router_max = 2,
                                .window_max_us = 100,
                                .answer_ms = 2 * WAIT_MS};
    assert_int_equal(wk_engine_create(&engine, &f->engine, f->address, &err), CM_OK);
    f->epoch = make_epoch(f->g, 5, 77);
    assert_int_equal(wk_shard_load(wk_engine_shard(f->engine), f->epoch->placement, 0, &err), CM_OK);
    wk_engine_commit(f->engine, f->epoch, WORKER_ID);
    pthread_create(&f->thread, NULL, run, f->engine);

    options.receives_max = HELD;
    assert_int_equal(net_open(&options, &f->n, &err), CM_OK);
    net_set_identity(f->n, &(net_identity){77, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER, ROUTER_ID});
    link_up(f);
    *state = f;
    return 0;
}

static int setup(void **state)
{
    return setup_with(state, "local", 1 << 20, 64);
}

static int setup_shm(void **state)
{
    return setup_with(state, "shm", 1 << 20, 64);
}

/* Messages of as many results as the device computes in a slice, and of fewer than a frame may ask for. */
static int setup_narrow(void **state)
{
    return setup_with(state, "shm", NARROW_BYTES, 256);
}

static int teardown(void **state)
{
    fixture *f = *state;
    net_close(f->n);
    wk_engine_stop(f->engine);
    pthread_join(f->thread, NULL);
    wk_engine_destroy(f->engine);
    pc_epoch_release(f->epoch);
    md_checkpoint_close(f->checkpoint);
    cm_free(f->payload);
    cm_free(f);
    assert_int_equal(cm_stat_get(CM_STAT_ledger_frames), 0);
    return 0;
}

/* Rows, each to the first two experts of the layer that rank 0 owns. */
static void make_large_frame(fixture *f, uint32_t layer, uint32_t n_row)
{
    uint32_t d = f->g->d, n_block = kn_blocks(d, KN_ACT_BLOCK), owned[2], n = 0;
    for (uint32_t e = 0; e < f->g->n_expert && n < 2; e++) {
        if (pr_placement_owns(f->epoch->placement, layer, e, 0)) {
            owned[n++] = e;
        }
    }
    f->header = (pr_dispatch){.head = {.version = PR_FRAME_VERSION,
                                       .dtype = PR_DTYPE_E4M3,
                                       .router = ROUTER_ID,
                                       .cluster = 77,
                                       .epoch = 5,
                                       .step = 1,
                                       .layer = layer,
                                       .exchange = 11},
                              .d = d,
                              .n_row = n_row,
                              .n_slot = 2 * n_row,
                              .row_blocks = n_block};
    cm_free(f->payload);
    f->payload = cm_alloc(pr_dispatch_bytes(2 * n_row, n_row, d, n_block));
    for (uint32_t i = 0; i < 2 * n_row; i++) {
        ((pr_slot *)f->payload)[i] = (pr_slot){i % n_row, owned[i / n_row], 0.25f + (float)i};
    }
    for (uint32_t i = 0; i < n_row * d; i++) {
        uint8_t code = (uint8_t)cm_rng_at(3, i, layer).word[0];
        f->payload[pr_dispatch_codes_at(2 * n_row) + i] = (code & 0x7f) == 0x7f ? 0 : code;
    }
    memset(f->payload + pr_dispatch_scales_at(2 * n_row, n_row, d), 120, n_row * n_block);
}

static void make_frame(fixture *f, uint32_t layer)
{
    make_large_frame(f, layer, ROWS);
}

static cm_status try_send(fixture *f, uint16_t type, uint32_t header_bytes, uint64_t cut)
{
    net_message message = {
        .type = type,
        .header = &f->header,
        .header_bytes = header_bytes,
        .iov = {{f->payload,
                 pr_dispatch_bytes(f->header.n_slot, f->header.n_row, f->g->d, f->header.row_blocks) - cut}},
        .n_iov = 1,
        .deadline_ms = 10000};
    return net_send(f->peer, &message);
}

static void send_frame(fixture *f, uint16_t type, uint32_t header_bytes, uint64_t cut)
{
    assert_int_equal(try_send(f, type, header_bytes, cut), CM_OK);
}

/* A matrix as it stands in the checkpoint: the worker's own may be in its device's order. */
static kn_matrix stored_matrix(const fixture *f, uint32_t layer, uint32_t expert, const char *name)
{
    char block[MD_BLOCK_NAME_MAX];
    md_block_name(f->g, layer, block);
    const md_tensor *weight =
        md_checkpoint_tensor(f->checkpoint, "%sffn.experts.%u.%s.weight", block, expert, name);
    const md_tensor *scale =
        md_checkpoint_tensor(f->checkpoint, "%sffn.experts.%u.%s.scale", block, expert, name);
    bool fp4 = weight->dtype == MD_I8;
    return (kn_matrix){.data = {(uintptr_t)weight->data},
                       .scale = {(uintptr_t)scale->data},
                       .n_out = (uint32_t)weight->dim[0],
                       .n_in = (uint32_t)weight->dim[1] * (fp4 ? 2 : 1),
                       .dtype = fp4 ? KN_E2M1 : KN_E4M3,
                       .scale_dtype = scale->dtype == MD_F32 ? KN_F32 : KN_E8M0};
}

/* A combine frame against the oracle, one slot at a time. */
static void check_answer(fixture *f, const net_event *event)
{
    uint32_t d = f->g->d, layer = f->header.head.layer, n_row = f->header.n_row;
    assert_int_equal(event->type, PR_MSG_COMBINE);
    const pr_combine *combine = event->header;
    assert_int_equal(combine->n_slot, 2 * n_row);
    assert_int_equal(combine->head.exchange, f->header.head.exchange);
    assert_int_equal(combine->head.layer, layer);
    assert_int_equal(event->payload_bytes, 2ull * 2 * n_row * d);

    kn_device *device;
    kn_stream *stream;
    kn_ptr codes, scales, y;
    cm_error err;
    kn_limits limits = {.n_row = n_row,
                        .n_in = d > f->g->inner ? d : f->g->inner,
                        .n_inner = f->g->inner,
                        .n_head = 1,
                        .head_dim = 64,
                        .n_key = 1,
                        .n_expert = f->g->n_expert};
    assert_int_equal(
        kn_device_open(&(kn_device_options){.backend = "ref", .isa = "auto", .n_threads = 1}, &device, &err),
        CM_OK);
    assert_int_equal(kn_stream_open(device, &limits, &stream), CM_OK);
    assert_int_equal(kn_mem_alloc(device, n_row * d, &codes), CM_OK);
    assert_int_equal(kn_mem_alloc(device, n_row * f->header.row_blocks, &scales), CM_OK);
    assert_int_equal(kn_mem_alloc(device, 2 * d, &y), CM_OK);
    kn_copy_to_device(stream, codes, f->payload + pr_dispatch_codes_at(2 * n_row), n_row * d);
    kn_copy_to_device(stream, scales, f->payload + pr_dispatch_scales_at(2 * n_row, n_row, d),
                      n_row * f->header.row_blocks);
    for (uint32_t i = 0; i < 2 * n_row; i++) {
        const pr_slot *slot = (const pr_slot *)f->payload + i;
        kn_expert_item item = {slot->row, 0, slot->weight};
        kn_expert expert = {stored_matrix(f, layer, slot->expert, "w1"),
                            stored_matrix(f, layer, slot->expert, "w3"),
                            stored_matrix(f, layer, slot->expert, "w2")};
        kn_expert_group group = {&expert, 0, 1};
        kn_moe(device)->experts(stream, &group, 1, &item, (kn_q8){codes, scales}, f->g->swiglu_limit, y);
        assert_int_equal(kn_stream_sync(stream), CM_OK);
        assert_memory_equal((const uint16_t *)event->payload + (size_t)i * d, kn_mem_host(device, y), 2 * d);
    }
    kn_mem_free(device, codes);
    kn_mem_free(device, scales);
    kn_mem_free(device, y);
    kn_stream_close(stream);
    kn_device_close(device);
}

static void expect_answer(fixture *f)
{
    net_event event = await(f, NET_EV_MESSAGE);
    check_answer(f, &event);
    net_release(f->n, &event);
}

static void test_answers(void **state)
{
    fixture *f = *state;
    for (uint32_t layer = 0; layer < f->g->n_layer; layer++) {
        make_frame(f, layer);
        send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
        expect_answer(f);
    }
}

/* Experts that were let go and are wanted again are there again, whether their copies have been freed in
 * between by the compute thread or not. */
static void test_comes_back(void **state)
{
    fixture *f = *state;
    wk_shard *shard = wk_engine_shard(f->engine);
    uint32_t n = wk_shard_count(shard);
    cm_error err;
    for (int i = 0; i < 20; i++) {
        wk_shard_keep(shard, NULL, NULL, 0);
        assert_int_equal(wk_shard_count(shard), 0);
        wk_engine_retire(f->engine, 0); /* wakes the compute thread, which may release */
        if (i % 2 == 1) {
            wk_shard_release(shard); /* surely */
        }
        assert_int_equal(wk_shard_load(shard, f->epoch->placement, 0, &err), CM_OK);
        assert_int_equal(wk_shard_count(shard), n);
    }
    test_answers(state);
}

/* Several threads at one load: the first that goes wrong is its error, and what they lay out is what one
 * would. */
static void test_load_together(void **state)
{
    fixture *f = *state;
    kn_device *device;
    wk_shard *shard;
    cm_error err = {0};
    const wk_shard *other = wk_engine_shard(f->engine);
    assert_int_equal(kn_device_open(&(kn_device_options){.isa = "auto", .n_threads = 1}, &device, &err),
                     CM_OK);
    assert_int_equal(wk_shard_create(f->checkpoint, device, 4, &shard), CM_OK);
    assert_int_equal(cm_failpoints_arm("worker_load_fails:10000", 1, &err), CM_OK);
    assert_int_equal(wk_shard_load(shard, f->epoch->placement, 0, &err), CM_E_IO);
    assert_non_null(strstr(err.text, "failpoint"));
    assert_int_equal(wk_shard_count(shard), 0);
    assert_int_equal(cm_failpoints_arm("worker_load_fails:0", 1, &err), CM_OK);
    assert_int_equal(wk_shard_load(shard, f->epoch->placement, 0, &err), CM_OK);
    assert_int_equal(wk_shard_count(shard), wk_shard_count(other));
    for (uint32_t layer = 0; layer < f->g->n_layer; layer++) {
        for (uint32_t e = 0; e < f->g->n_expert; e++) {
            const kn_expert *mine = wk_shard_expert(shard, layer, e),
                            *theirs = wk_shard_expert(other, layer, e);
            assert_int_equal(mine == NULL, theirs == NULL);
            if (mine != NULL) {
                kn_matrix stored = mine->w2;
                stored.prepared = false;
                uint64_t n = kn_prepared_bytes(device, &stored);
                assert_memory_equal(kn_mem_host(device, mine->w2.data), kn_mem_host(device, theirs->w2.data),
                                    n);
            }
        }
    }
    wk_shard_destroy(shard);
    kn_device_close(device);
}

static void expect_refusal(fixture *f, cm_status status)
{
    net_event event = await(f, NET_EV_MESSAGE);
    assert_int_equal(event.type, PR_MSG_REFUSE);
    assert_int_equal(((const pr_refuse *)event.header)->status, status);
    assert_int_equal(((const pr_refuse *)event.header)->epoch, 5);
    net_release(f->n, &event);
}

static void test_refusals(void **state)
{
    fixture *f = *state;
    int64_t before = cm_stat_get(CM_STAT_frames_refused);
    make_frame(f, 0);
    f->header.head.epoch = 4; /* old */
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
    expect_refusal(f, CM_E_STALE);
    f->header.head.epoch = 6; /* not ours yet */
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
    expect_refusal(f, CM_E_STALE);
    make_frame(f, 0);
    f->header.head.cluster = 78; /* foreign */
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
    expect_refusal(f, CM_E_STALE);
    make_frame(f, 0);
    f->header.head.version = PR_FRAME_VERSION + 1;
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
    expect_refusal(f, CM_E_PROTOCOL);
    make_frame(f, 0);
    f->header.head.router = ROUTER_ID + 1; /* in another's name */
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
    expect_refusal(f, CM_E_PROTOCOL);
    make_frame(f, 0);
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 64); /* cut */
    expect_refusal(f, CM_E_PROTOCOL);
    send_frame(f, PR_MSG_COMBINE, sizeof(f->header), 0); /* not for a worker */
    expect_refusal(f, CM_E_PROTOCOL);
    for (uint32_t e = 0; e < f->g->n_expert; e++) {
        pr_slot *last = (pr_slot *)f->payload + f->header.n_slot - 1;
        if (!pr_placement_owns(f->epoch->placement, 0, e, 0) && e > last->expert) {
            last->expert = e; /* somebody else's */
            break;
        }
    }
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
    expect_refusal(f, CM_E_NO_OWNER);
    assert_int_equal(cm_stat_get(CM_STAT_frames_refused) - before, 8);
    test_answers(state); /* nothing else was disturbed */
}

/* A long answer comes in pieces, in order, and is the same. */
static void expect_pieces(fixture *f)
{
    uint32_t n_slot = f->header.n_slot, n_got = 0, n_piece = 0;
    uint64_t row_bytes = 2ull * f->g->d;
    uint8_t *rows = cm_alloc(n_slot * row_bytes);
    pr_combine whole = {0};
    while (n_got < n_slot) {
        net_event event = await(f, NET_EV_MESSAGE);
        assert_int_equal(event.type, PR_MSG_COMBINE);
        const pr_combine *piece = event.header;
        assert_int_equal(piece->slot0, n_got);
        assert_true(piece->n_slot > 0 && piece->n_slot <= n_slot - n_got);
        assert_int_equal(event.payload_bytes, piece->n_slot * row_bytes);
        memcpy(rows + n_got * row_bytes, event.payload, event.payload_bytes);
        whole = *piece;
        n_got += piece->n_slot;
        n_piece++;
        net_release(f->n, &event);
    }
    assert_true(n_piece > 1);
    whole.slot0 = 0;
    whole.n_slot = n_slot;
    net_event all = {
        .type = PR_MSG_COMBINE, .header = &whole, .payload = rows, .payload_bytes = n_slot * row_bytes};
    check_answer(f, &all);
    cm_free(rows);
}

static void test_answer_in_pieces(void **state)
{
    fixture *f = *state;
    make_large_frame(f, 0, ROWS_LONG);
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
    expect_pieces(f);
}

/* All slots of one expert, two of a row: three slices of the device, of which two make a message. */
static void make_one_expert(fixture *f, uint32_t layer)
{
    make_large_frame(f, layer, 70);
    pr_slot *slots = (pr_slot *)f->payload;
    for (uint32_t i = 0; i < f->header.n_slot; i++) {
        slots[i] = (pr_slot){i / 2, slots[0].expert, 0.25f + (float)i};
    }
}

/* Each slice has room in the link. */
static void test_slices_in_place(void **state)
{
    fixture *f = *state;
    for (uint32_t layer = 0; layer < f->g->n_layer; layer++) {
        make_one_expert(f, layer);
        send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
        expect_pieces(f);
    }
}

/* Frames whose answers are longer than a message of the worker's may be: a router with a larger limit. */
static void test_answer_beyond_a_message(void **state)
{
    fixture *f = *state;
    assert_true(2ull * 2 * ROWS_NARROW * f->g->d > NARROW_BYTES);
    for (uint32_t layer = 0; layer < f->g->n_layer; layer++) {
        make_large_frame(f, layer, ROWS_NARROW);
        send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
        expect_pieces(f);
    }
}

/* Frames of several routers in one group, each of its own rows: each gets its own results, in its own order.
 */
static void test_two_routers(void **state)
{
    fixture *f = *state;
    fixture other = *f;
    net_options options;
    cm_error err = {0};
    net_options_defaults(&options);
    options.backend = "shm";
    options.message_bytes_max = 1 << 20;
    options.silence_ms = 60000;
    assert_int_equal(net_open(&options, &other.n, &err), CM_OK);
    net_set_identity(other.n, &(net_identity){77, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER, ROUTER_ID});
    link_up(&other);
    other.payload = NULL;
    for (uint32_t i = 0; i < 20; i++) {
        make_large_frame(f, i % f->g->n_layer, 20 + i);
        make_large_frame(&other, i % f->g->n_layer, 3);
        send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
        send_frame(&other, PR_MSG_DISPATCH, sizeof(other.header), 0);
        expect_answer(f);
        expect_answer(&other);
    }
    net_close(other.n);
    cm_free(other.payload);
}

/* Begins the frame, which is not computed beyond its first slice while the failpoint is armed. */
static void begin_frame(fixture *f)
{
    cm_error err;
    assert_int_equal(cm_failpoints_arm("worker_compute_stalls", 0, &err), CM_OK);
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
    for (int i = 0; i < 3; i++) { /* whatever is answered after the first of these is answered in between */
        f->header.head.epoch = 4;
        send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
        expect_refusal(f, CM_E_STALE);
    }
    f->header.head.epoch = 5;
}

static void begin_large(fixture *f)
{
    make_large_frame(f, 0, ROWS_MANY);
    begin_frame(f);
}

static int disarm(void)
{
    cm_error err;
    return cm_failpoints_arm("worker_compute_stalls:0", 0, &err);
}

/* A worker in the middle of a large group hears and answers: its routers have no reason to call it silent. */
static void test_breathes(void **state)
{
    fixture *f = *state;
    begin_large(f);
    assert_int_equal(disarm(), CM_OK);
    expect_answer(f);
    test_answers(state);
}

/* An answer that is held takes more than three quarters of the link's area: there is no room for another
 * message of the largest size. */
static uint32_t fill_link(fixture *f, net_event held[HELD])
{
    uint32_t n_held = 0, n_got = 0;
    make_large_frame(f, 0, ROWS_NARROW);
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
    for (; n_got < f->header.n_slot; n_held++) {
        assert_true(n_held < HELD - 1);
        held[n_held] = await(f, NET_EV_MESSAGE);
        n_got += ((const pr_combine *)held[n_held].header)->n_slot;
    }
    return n_held;
}

static void release_all(fixture *f, net_event *held, uint32_t n_held)
{
    for (uint32_t i = 0; i < n_held; i++) {
        net_release(f->n, &held[i]);
    }
}

/* Results of two groups wait for room, each in a place of its own. */
static void test_results_are_kept(void **state)
{
    fixture *f = *state;
    fixture second = *f;
    net_event held[HELD];
    uint32_t n_held = fill_link(f, held);
    int64_t n_before = cm_stat_get(CM_STAT_worker_batches);
    second.payload = NULL;
    make_large_frame(f, 0, ROWS_NARROW);
    make_large_frame(&second, 1, ROWS_NARROW);
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
    send_frame(&second, PR_MSG_DISPATCH, sizeof(second.header), 0);
    for (uint64_t give_up = cm_now_ms() + WAIT_MS; cm_stat_get(CM_STAT_worker_batches) < n_before + 2;) {
        assert_true(cm_now_ms() < give_up);
        sched_yield();
    }
    release_all(f, held, n_held);
    expect_pieces(f);
    expect_pieces(&second);
    cm_free(second.payload);
}

/* The link has no room for the first slice of an expert's rows, and has it for the next: results that were
 * kept are not overtaken. */
static void test_room_comes_late(void **state)
{
    fixture *f = *state;
    net_event held[HELD];
    uint32_t n_held = fill_link(f, held);
    make_one_expert(f, 0);
    begin_frame(f);
    release_all(f, held, n_held);
    assert_int_equal(disarm(), CM_OK);
    expect_pieces(f);
}

static void expect_stale(fixture *f)
{
    f->header.head.epoch = 4;
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
    expect_refusal(f, CM_E_STALE);
}

/* A link that ends in the middle takes its answer with it; whoever has its memory next does not get it. */
static void lose_link(fixture *f)
{
    net_disconnect(f->peer);
    for (int i = 0; i < 3; i++) { /* one after the other: one of them has the place of the one that ended */
        link_up(f);
        expect_stale(f);
        expect_stale(f);
    }
    assert_int_equal(disarm(), CM_OK);
}

static void test_link_lost_computing(void **state)
{
    begin_large(*state);
    lose_link(*state);
    test_answers(state);
}

/* The rows that are computed and the place for their results were memory of that link. */
static void test_link_lost_in_place(void **state)
{
    cm_error err;
    assert_int_equal(cm_failpoints_arm("worker_compute_stalls", 0, &err), CM_OK);
    make_one_expert(*state, 0);
    send_frame(*state, PR_MSG_DISPATCH, sizeof(pr_dispatch), 0);
    net_event first = await(*state, NET_EV_MESSAGE); /* of three pieces */
    assert_int_equal(first.type, PR_MSG_COMBINE);
    net_release(((fixture *)*state)->n, &first);
    lose_link(*state);
    test_answers(state);
}

static int teardown_armed(void **state)
{
    return disarm() | teardown(state);
}

/* A router that takes in nothing for a while gets a reply to every frame when it does: refusals and answers
 * for which its link had no room are kept. */
static void test_no_room(void **state)
{
    fixture *f = *state;
    uint32_t n_held = 0, n_combine = 0;
    net_event held[HELD], event;
    bool replied[BURST] = {0};
    make_frame(f, 0);
    for (uint32_t i = 0; i < BURST;) {
        bool good = i >= BURST / 2 && i < BURST / 2 + 4; /* when no more refusals can leave */
        f->header.head.exchange = i;
        f->header.head.epoch = good ? 5 : 4;
        cm_status sent = try_send(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
        assert_true(sent == CM_OK || sent == CM_AGAIN);
        if (sent == CM_OK) {
            i++;
        } else if (net_poll(f->n, &event, 1) == 1 && event.kind == NET_EV_MESSAGE) {
            assert_true(n_held < HELD); /* more are not handed out */
            held[n_held++] = event;
        }
    }
    for (uint32_t i = 0; i < BURST; i++) {
        event = i < n_held ? held[i] : await(f, NET_EV_MESSAGE);
        const pr_frame_head *head = event.header; /* of either kind of reply */
        assert_true(head->exchange < BURST && !replied[head->exchange]);
        replied[head->exchange] = true;
        n_combine += event.type == PR_MSG_COMBINE;
        net_release(f->n, &event);
    }
    assert_int_equal(n_combine, 4);
}

static void test_epochs(void **state)
{
    fixture *f = *state;
    pc_epoch *newer = make_epoch(f->g, 6, 77);
    wk_engine_commit(f->engine, newer, WORKER_ID);
    make_frame(f, 0);
    f->header.head.epoch = 6;
    for (bool known = false; !known;) { /* the engine takes it up at its next turn */
        send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
        net_event event = await(f, NET_EV_MESSAGE);
        known = event.type == PR_MSG_COMBINE;
        net_release(f->n, &event);
    }
    f->header.head.epoch = 5; /* still served: a router may not have heard yet */
    send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
    net_event event = await(f, NET_EV_MESSAGE);
    assert_int_equal(event.type, PR_MSG_COMBINE);
    net_release(f->n, &event);
    wk_engine_retire(f->engine, 6);
    for (bool stale = false; !stale;) {
        send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
        event = await(f, NET_EV_MESSAGE);
        stale = event.type == PR_MSG_REFUSE;
        net_release(f->n, &event);
    }
    pc_epoch_release(newer);
}

/* A router that is stopped with long answers on their way costs another one nothing. */
static void test_stopped_router(void **state)
{
    fixture *f = *state;
    enum { ANSWERS = 10 }; /* of 640 KB; a link has room for 4 MB */
    fixture stopped = *f;
    net_options options;
    cm_error err = {0};
    net_options_defaults(&options);
    options.backend = "shm";
    options.message_bytes_max = 1 << 20;
    options.silence_ms = 60000;
    assert_int_equal(net_open(&options, &stopped.n, &err), CM_OK);
    net_set_identity(stopped.n, &(net_identity){77, BALEEN__CONTROL__V1__ROLE__ROLE_ROUTER, ROUTER_ID});
    link_up(&stopped);
    stopped.payload = NULL;
    make_large_frame(&stopped, 0, ROWS_LONG);
    int64_t n_batch = cm_stat_get(CM_STAT_worker_batches);
    for (int64_t i = 0; i < ANSWERS; i++) { /* each computed by itself, and never looked at again */
        stopped.header.head.exchange = (uint32_t)i;
        send_frame(&stopped, PR_MSG_DISPATCH, sizeof(stopped.header), 0);
        uint64_t give_up = cm_now_ms() + WAIT_MS;
        while (cm_stat_get(CM_STAT_worker_batches) < n_batch + i + 1) {
            assert_true(cm_now_ms() < give_up);
            sched_yield();
        }
    }
    for (uint32_t layer = 0; layer < f->g->n_layer; layer++) {
        make_frame(f, layer);
        send_frame(f, PR_MSG_DISPATCH, sizeof(f->header), 0);
        expect_answer(f);
    }
    net_close(stopped.n);
    cm_free(stopped.payload);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_stopped_router, setup_shm, teardown),
        cmocka_unit_test_setup_teardown(test_answers, setup, teardown),
        cmocka_unit_test_setup_teardown(test_answers, setup_shm, teardown), /* built in place */
        cmocka_unit_test_setup_teardown(test_answer_in_pieces, setup, teardown),
        cmocka_unit_test_setup_teardown(test_answer_in_pieces, setup_shm, teardown),
        cmocka_unit_test_setup_teardown(test_answer_beyond_a_message, setup_narrow, teardown),
        cmocka_unit_test_setup_teardown(test_slices_in_place, setup_narrow, teardown),
        cmocka_unit_test_setup_teardown(test_results_are_kept, setup_narrow, teardown),
        cmocka_unit_test_setup_teardown(test_link_lost_in_place, setup_narrow, teardown_armed),
        cmocka_unit_test_setup_teardown(test_room_comes_late, setup_narrow, teardown_armed),
        cmocka_unit_test_setup_teardown(test_two_routers, setup_shm, teardown),
        cmocka_unit_test_setup_teardown(test_comes_back, setup, teardown),
        cmocka_unit_test_setup_teardown(test_load_together, setup, teardown_armed),
        cmocka_unit_test_setup_teardown(test_refusals, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_room, setup, teardown),
        cmocka_unit_test_setup_teardown(test_epochs, setup, teardown),
        cmocka_unit_test_setup_teardown(test_breathes, setup, teardown_armed),
        cmocka_unit_test_setup_teardown(test_link_lost_computing, setup, teardown_armed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
