/* Row frames: every field that a receiver relies on is checked, one wrong field at a time. */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "proto/frames.h"
#include "proto/messages.h"

enum { D = 160, ROWS = 3, SLOTS = 5, LAYERS = 4, EXPERTS = 13 };

typedef struct frame {
    pr_dispatch header;
    uint32_t header_bytes;
    uint8_t payload[8192];
    uint64_t payload_bytes;
} frame;

static void make(frame *f)
{
    static const uint32_t rows[SLOTS] = {0, 0, 1, 2, 2};
    memset(f, 0, sizeof(*f));
    f->header = (pr_dispatch){.head = {.version = PR_FRAME_VERSION, .dtype = PR_DTYPE_E4M3, .layer = 1},
                              .d = D,
                              .n_row = ROWS,
                              .n_slot = SLOTS,
                              .row_blocks = 2};
    f->header_bytes = sizeof(f->header);
    f->payload_bytes = pr_dispatch_bytes(SLOTS, ROWS, D, 2);
    for (uint32_t i = 0; i < SLOTS; i++) {
        ((pr_slot *)f->payload)[i] = (pr_slot){rows[i], i, 0.5f};
    }
}

static cm_status check(const frame *f, cm_error *err)
{
    return pr_dispatch_check(&f->header, f->header_bytes, f->payload, f->payload_bytes, D, LAYERS, EXPERTS,
                             err);
}

static void expect(const frame *f, const char *field)
{
    cm_error err = {0};
    assert_int_equal(check(f, &err), CM_E_PROTOCOL);
    assert_string_equal(err.field, field);
}

static void test_dispatch(void **state)
{
    frame f;
    cm_error err;
    make(&f);
    assert_int_equal(check(&f, &err), CM_OK);
    f.header_bytes--;
    expect(&f, "header");
    make(&f);
    f.header.head.version++;
    expect(&f, "version");
    make(&f);
    f.header.head.dtype = PR_DTYPE_BF16;
    expect(&f, "dtype");
    make(&f);
    f.header.d++;
    expect(&f, "d");
    make(&f);
    f.header.row_blocks = 1;
    expect(&f, "d");
    make(&f);
    f.header.head.layer = LAYERS;
    expect(&f, "layer");
    make(&f);
    f.header.flight = PR_FLIGHTS_MAX;
    expect(&f, "flight");
    make(&f);
    f.header.n_row = UINT32_MAX;
    expect(&f, "n_row");
    make(&f);
    f.header.n_slot = 0;
    expect(&f, "n_row");
    make(&f);
    f.header.n_row = 9; /* sizes that add up, but rows that no slot asks for */
    f.header.n_slot = 1;
    f.payload_bytes = pr_dispatch_bytes(1, 9, D, 2);
    expect(&f, "n_row");
    make(&f);
    f.payload_bytes -= 64;
    expect(&f, "n_row");
    make(&f);
    ((pr_slot *)f.payload)[4].row = ROWS;
    expect(&f, "row");
    make(&f);
    ((pr_slot *)f.payload)[1].expert = 3;
    expect(&f, "row"); /* out of order */
    make(&f);
    ((pr_slot *)f.payload)[1].expert = 0;
    ((pr_slot *)f.payload)[0].row = 1;
    expect(&f, "row");
    make(&f);
    ((pr_slot *)f.payload)[2].expert = EXPERTS;
    expect(&f, "expert");
    make(&f);
    ((pr_slot *)f.payload)[0].weight = NAN;
    expect(&f, "weight");
    (void)state;
}

static void test_combine(void **state)
{
    cm_error err;
    pr_combine header = {
        .head = {.version = PR_FRAME_VERSION, .dtype = PR_DTYPE_BF16}, .d = D, .n_slot = SLOTS};
    assert_int_equal(pr_combine_check(&header, sizeof(header), 2ull * SLOTS * D, D, &err), CM_OK);
    assert_int_equal(pr_combine_check(&header, sizeof(header), 2ull * SLOTS * D - 2, D, &err), CM_E_PROTOCOL);
    assert_int_equal(pr_combine_check(&header, sizeof(header) + 8, 2ull * SLOTS * D, D, &err), CM_E_PROTOCOL);
    header.n_slot = 0x80000000u; /* times 2 d would not fit 32 bits */
    assert_int_equal(pr_combine_check(&header, sizeof(header), 0, D, &err), CM_E_PROTOCOL);
    (void)state;
}

static void test_names(void **state)
{
    assert_string_equal(pr_message_name(PR_MSG_DISPATCH), "DISPATCH");
    assert_string_equal(pr_message_name(999), "unknown");
    (void)state;
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_dispatch), cmocka_unit_test(test_combine),
                                       cmocka_unit_test(test_names)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
