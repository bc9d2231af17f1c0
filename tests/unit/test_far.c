/* The last positions a model has, 1,048,573 to 1,048,575: rotation tables, compressed rows, the indexer over
 * 262,144 rows and attention, each against arithmetic of its own in long double, and every path of the cpu
 * back-end against the oracle bit for bit. Pages are few and stand in the page list many times: a sequence of
 * that length without its memory. Usage: t_far [seed] */
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "kernels/kn_math.h"
#include "tests/golden/kernel_rig.h"

enum {
    CONTEXT = 1 << 20,
    N = 3, /* rows of the step, the last of the context */
    POS0 = CONTEXT - N,
    DIM = 512,
    ROPE = 64,
    HALF = ROPE / 2,
    HEADS = 2,
    WINDOW = 128,
    INDEX_DIM = 128,
    INDEX_HEADS = 2,
    TOPK = 64,
    PAGES = CONTEXT / KN_PAGE_TOKENS,
    PAGES_HELD = 13, /* really there; the last one only once in the list */
};

static uint64_t seed = 20240711;

static const kn_limits LIMITS = {.n_row = 16,
                                 .n_in = 2048,
                                 .n_inner = 64,
                                 .n_head = HEADS,
                                 .head_dim = DIM,
                                 .n_key = WINDOW + PAGES,
                                 .n_index_row = CONTEXT / 4,
                                 .n_expert = 16};

static float random_value(uint64_t key, uint64_t i)
{
    return ((float)cm_rng_at(seed, i, key).word[0] / 2147483648.0f - 1.0f) * 2.0f;
}

static kn_ptr random_bf16(rig *r, uint64_t key, uint64_t n)
{
    kn_ptr p = rig_new(r, 2 * n);
    uint16_t *x = kn_mem_host(r->device, p);
    for (uint64_t i = 0; i < n; i++) {
        x[i] = kn_bf16_encode(random_value(key, i));
    }
    return p;
}

static kn_ptr random_f32(rig *r, uint64_t key, uint64_t n)
{
    kn_ptr p = rig_new(r, 4 * n);
    float *x = kn_mem_host(r->device, p);
    for (uint64_t i = 0; i < n; i++) {
        x[i] = random_value(key, i);
    }
    return p;
}

/* ---- rotation tables, from the definition (model 1.2, 3.4) ---- */

/* The frequency is a float32 result of float32 steps; its power is taken in long double. */
static float far_inv_freq(double theta, bool yarn, double factor, double original, int i)
{
    const long double pi = 3.14159265358979323846264338327950288L;
    float inv = 1.0f / (float)powl((long double)theta, 2.0L * i / ROPE);
    if (!yarn) {
        return inv;
    }
    long double rotations[2] = {32, 1}, at[2];
    for (int k = 0; k < 2; k++) {
        at[k] = ROPE * logl((long double)original / (rotations[k] * 2 * pi)) / (2 * logl((long double)theta));
    }
    float low = (float)fmaxl(floorl(at[0]), 0), high = (float)fminl(ceill(at[1]), ROPE - 1);
    float ramp = ((float)i - low) / (high - low);
    float smooth = 1.0f - fminf(fmaxf(ramp, 0.0f), 1.0f);
    return (inv / (float)factor) * (1.0f - smooth) + inv * smooth;
}

typedef struct far_table {
    const char *name;
    double theta;
    bool yarn;
    double factor, original;
} far_table;

static const far_table tables[] = {{"window", 10000, false, 1, 1},
                                   {"compress of Pro and Flash", 160000, true, 16, 65536},
                                   {"compress of nano", 160000, true, 16, 1024},
                                   {"compress of the golden models", 160000, true, 4, 512}};

static void far_angles(const far_table *t, uint32_t pos, long double cos_out[HALF], long double sin_out[HALF])
{
    for (int i = 0; i < HALF; i++) {
        /* one float32 product is part of the model: near a million it rounds by 0.03 */
        float angle = (float)pos * far_inv_freq(t->theta, t->yarn, t->factor, t->original, i);
        cos_out[i] = cosl((long double)angle);
        sin_out[i] = sinl((long double)angle);
    }
}

static void check_table(rig *r, const far_table *t)
{
    static const uint32_t first[] = {0,     1,     127,    128,    4095,   16383,
                                     65535, 65536, 131072, 524287, 524288, 1000003};
    enum { FIRST = sizeof first / sizeof first[0], ALL = FIRST + 200 };
    uint32_t pos[ALL];
    float inv_freq[HALF], *cs = cm_alloc(sizeof(float) * ALL * ROPE);
    kn_rope_inv_freq(t->theta, ROPE, t->factor, t->original, 32, 1, t->yarn, inv_freq);
    for (uint32_t i = 0; i < ALL; i++) {
        pos[i] = i < FIRST         ? first[i]
                 : i < FIRST + 100 ? CONTEXT - 100 + (i - FIRST)
                                   : cm_rng_at(seed, i, 1).word[0] % CONTEXT;
    }
    kn_ptr out = rig_new(r, sizeof(float) * ALL * ROPE);
    kn_attention(r->device)->rope_table(r->stream, rig_up(r, inv_freq, sizeof inv_freq), HALF,
                                        rig_up(r, pos, sizeof pos), ALL, out);
    rig_down(r, cs, out, sizeof(float) * ALL * ROPE);
    for (uint32_t i = 0; i < ALL; i++) {
        long double c[HALF], s[HALF];
        far_angles(t, pos[i], c, s);
        for (int k = 0; k < HALF; k++) {
            /* half a unit in the last place of a float below 1, and a hair for the double before it */
            long double off_cos = fabsl(c[k] - (long double)cs[(i * HALF + (uint32_t)k) * 2]),
                        off_sin = fabsl(s[k] - (long double)cs[(i * HALF + (uint32_t)k) * 2 + 1]);
            if (!(off_cos <= 0x1.01p-25L && off_sin <= 0x1.01p-25L)) {
                fail_msg("%s %s, %s, position %u, pair %d: off by %Lg and %Lg", kn_device_name(r->device),
                         kn_device_isa(r->device), t->name, pos[i], k, off_cos, off_sin);
            }
        }
    }
    cm_free(cs);
    rig_reset(r);
}

static void test_tables(void **state)
{
    (void)state;
    for (int path = -1; path < 0 || kn_cpu_isa_at((uint32_t)path) != NULL; path++) {
        rig r;
        rig_open(&r, path < 0 ? "ref" : "cpu", path < 0 ? NULL : kn_cpu_isa_at((uint32_t)path), 1, &LIMITS);
        for (size_t t = 0; t < sizeof tables / sizeof tables[0]; t++) {
            check_table(&r, &tables[t]);
        }
        rig_close(&r);
    }
}

/* ---- one layer at the last positions ---- */

typedef struct far_layer {
    kn_attn a;
    kn_compress main, index;
    kn_batch b;
    uint64_t slot_bytes, pool_bytes, main_width, index_width;
    uint32_t *list; /* [PAGES] */
    kn_ptr slot, inv_freq, kv_main, score_main, kv_index, score_index;
    kn_ptr pos, q, kv, rows, iq, iq_rows, iw, picks, o;
} far_layer;

/* Rows of random values, as the operations store them. */
static void fill_rows(rig *r, kn_ptr to, uint64_t key, uint32_t n, bool index)
{
    const kn_attn_ops *ops = kn_attention(r->device);
    kn_ptr x = random_bf16(r, key, (uint64_t)n * (index ? INDEX_DIM : DIM));
    if (index) {
        ops->index_pack(r->stream, x, n, 1, INDEX_DIM, to);
    } else {
        ops->kv_pack(r->stream, x, n, DIM, ROPE, to);
    }
}

static void layer_pages(rig *r, far_layer *l)
{
    kn_kv_layout *kv = &l->a.layout;
    uint32_t per_page = KN_PAGE_TOKENS / kv->ratio;
    l->b.page_bytes = (kv->page_index + (uint64_t)per_page * kv->index_bytes + 63) / 64 * 64;
    l->pool_bytes = PAGES_HELD * l->b.page_bytes;
    l->b.page_pool = rig_new(r, l->pool_bytes);
    for (uint32_t i = 0; i < PAGES_HELD; i++) {
        kn_ptr page = kn_at(l->b.page_pool, i * l->b.page_bytes);
        fill_rows(r, kn_at(page, kv->page_rows), 100 + i, per_page, false);
        fill_rows(r, kn_at(page, kv->page_index), 200 + i, per_page, true);
    }
    l->list = cm_alloc(sizeof(uint32_t) * PAGES);
    for (uint32_t i = 0; i < PAGES; i++) {
        l->list[i] = i == PAGES - 1 ? PAGES_HELD - 1 : cm_rng_at(seed, i, 2).word[0] % (PAGES_HELD - 1);
    }
    l->b.pages = rig_up(r, l->list, sizeof(uint32_t) * PAGES);
}

static kn_compress compress_of(rig *r, const far_layer *l, bool index)
{
    const kn_kv_layout *kv = &l->a.layout;
    uint32_t dim = index ? INDEX_DIM : DIM;
    return (kn_compress){
        .ape = random_f32(r, 3 + index, (uint64_t)kv->ratio * kn_compress_width(kv->ratio, dim)),
        .norm = random_bf16(r, 5 + index, dim),
        .inv_freq = l->inv_freq,
        .ratio = kv->ratio,
        .dim = dim,
        .rope = ROPE,
        .span = kn_compress_span(kv->ratio, 0),
        .eps = 1e-6f,
        .index = index,
        .page_rows = index ? kv->page_index : kv->page_rows,
        .slot_state = index ? kv->slot_index : kv->slot_main,
        .row_bytes = index ? kv->index_bytes : kv->row_bytes};
}

static void layer_slot(rig *r, far_layer *l)
{
    kn_kv_layout *kv = &l->a.layout;
    uint64_t main = kn_compress_state_bytes(kv->ratio, DIM, 0),
             index = kn_compress_state_bytes(kv->ratio, INDEX_DIM, 0);
    kv->ring = WINDOW;
    kv->slot_main = (uint64_t)WINDOW * kv->row_bytes;
    kv->slot_index = kv->slot_main + main;
    l->slot_bytes = kv->slot_index + index;
    l->slot = rig_new(r, l->slot_bytes);
    fill_rows(r, l->slot, 7, WINDOW, false);
    memcpy(kn_mem_host(r->device, kn_at(l->slot, kv->slot_main)),
           kn_mem_host(r->device, random_f32(r, 8, main / 4)), main);
    memcpy(kn_mem_host(r->device, kn_at(l->slot, kv->slot_index)),
           kn_mem_host(r->device, random_f32(r, 9, index / 4)), index);
}

static void layer_inputs(rig *r, far_layer *l)
{
    l->pos = rig_new(r, sizeof(uint32_t) * N);
    for (uint32_t i = 0; i < N; i++) {
        ((uint32_t *)kn_mem_host(r->device, l->pos))[i] = POS0 + i;
    }
    l->q = random_bf16(r, 10, (uint64_t)N * HEADS * DIM);
    l->kv = random_bf16(r, 11, (uint64_t)N * DIM);
    l->iq = random_bf16(r, 12, (uint64_t)N * INDEX_HEADS * INDEX_DIM);
    l->iw = random_bf16(r, 13, N * INDEX_HEADS);
    l->kv_main = random_f32(r, 14, N * l->main_width);
    l->score_main = random_f32(r, 15, N * l->main_width);
    l->kv_index = random_f32(r, 16, N * l->index_width);
    l->score_index = random_f32(r, 17, N * l->index_width);
    l->rows = rig_new(r, (uint64_t)N * l->a.layout.row_bytes);
    l->iq_rows = rig_new(r, (uint64_t)N * INDEX_HEADS * kn_index_row_bytes(INDEX_DIM));
    l->picks = rig_new(r, sizeof(int32_t) * N * TOPK);
    l->o = rig_new(r, 2ull * N * HEADS * DIM);
}

static far_layer layer_open(rig *r, uint32_t ratio)
{
    far_layer l = {.main_width = kn_compress_width(ratio, DIM),
                   .index_width = kn_compress_width(ratio, INDEX_DIM)};
    float inv_freq[HALF];
    kn_rope_inv_freq(160000, ROPE, 16, 65536, 32, 1, true, inv_freq);
    l.inv_freq = rig_up(r, inv_freq, sizeof inv_freq);
    l.a = (kn_attn){.layout = {.ratio = ratio,
                               .row_bytes = kn_kv_row_bytes(DIM, ROPE),
                               .index_bytes = kn_index_row_bytes(INDEX_DIM)},
                    .sink = random_f32(r, 18, HEADS),
                    .n_head = HEADS,
                    .dim = DIM,
                    .rope = ROPE,
                    .window = WINDOW,
                    .topk = TOPK};
    l.a.layout.page_index = (uint64_t)KN_PAGE_TOKENS / ratio * l.a.layout.row_bytes;
    layer_pages(r, &l);
    layer_slot(r, &l);
    l.main = compress_of(r, &l, false);
    l.index = compress_of(r, &l, true);
    layer_inputs(r, &l);
    return l;
}

/* Rows at .. at + n - 1 as a step of their own, in the order of a step. */
static void layer_step(rig *r, far_layer *l, uint32_t at, uint32_t n)
{
    const kn_attn_ops *ops = kn_attention(r->device);
    kn_stream *s = r->stream;
    uint64_t row = HEADS * DIM * 2, iq_row = INDEX_HEADS * kn_index_row_bytes(INDEX_DIM);
    kn_seg seg = {.n_row = n, .pos0 = POS0 + at, .slot = l->slot};
    kn_ptr cs = rig_new(r, sizeof(float) * n * ROPE), q = kn_at(l->q, at * row),
           kv = kn_at(l->kv, at * 2ull * DIM), rows = kn_at(l->rows, (uint64_t)at * l->a.layout.row_bytes),
           iq = kn_at(l->iq, at * 2ull * INDEX_HEADS * INDEX_DIM), iq_rows = kn_at(l->iq_rows, at * iq_row),
           picks = kn_at(l->picks, at * 4ull * TOPK);
    kn_ptr state[4] = {
        kn_at(l->kv_main, at * 4 * l->main_width), kn_at(l->score_main, at * 4 * l->main_width),
        kn_at(l->kv_index, at * 4 * l->index_width), kn_at(l->score_index, at * 4 * l->index_width)};
    bool picked = l->a.layout.ratio == 4;
    l->b.n_seg = 1;
    l->b.n_row = n;
    l->b.segs = rig_up(r, &seg, sizeof seg);
    l->b.pos = kn_at(l->pos, at * sizeof(uint32_t));
    ops->rope_table(s, l->inv_freq, HALF, l->b.pos, n, cs);
    ops->rope(s, q, n, HEADS, DIM, HALF, cs, false);
    ops->rope(s, kv, n, 1, DIM, HALF, cs, false);
    ops->kv_pack(s, kv, n, DIM, ROPE, rows);
    ops->compress(s, &l->b, &l->main, state[0], state[1]);
    if (picked) {
        ops->rope(s, iq, n, INDEX_HEADS, INDEX_DIM, HALF, cs, false);
        ops->index_pack(s, iq, n, INDEX_HEADS, INDEX_DIM, iq_rows);
        ops->compress(s, &l->b, &l->index, state[2], state[3]);
        ops->index_topk(s, &l->b, &l->a.layout, INDEX_HEADS, INDEX_DIM, TOPK, iq_rows,
                        kn_at(l->iw, at * 2ull * INDEX_HEADS), picks);
    }
    ops->attention(s, &l->b, &l->a, q, rows, picked ? picks : (kn_ptr){0}, kn_at(l->o, at * row));
    ops->raw_commit(s, &l->b, &l->a, rows);
    ops->compress_commit(s, &l->b, &l->main, state[0], state[1]);
    if (picked) {
        ops->compress_commit(s, &l->b, &l->index, state[2], state[3]);
    }
    assert_int_equal(kn_stream_sync(s), CM_OK);
}

static void *host(rig *r, kn_ptr at)
{
    return kn_mem_host(r->device, at);
}

/* ---- what it must be, in long double ---- */

static const uint8_t *stored_row(rig *r, const far_layer *l, uint64_t area, uint32_t row_bytes, uint32_t j)
{
    uint32_t per_page = KN_PAGE_TOKENS / l->a.layout.ratio;
    const uint8_t *pool = host(r, l->b.page_pool);
    return pool + l->list[j / per_page] * l->b.page_bytes + area + (uint64_t)(j % per_page) * row_bytes;
}

static long double kv_value(const uint8_t *row, uint32_t i)
{
    uint16_t bits;
    if (i < DIM - ROPE) {
        return (long double)kn_e4m3_decode(row[i]) *
               (long double)kn_e8m0_decode(row[DIM + ROPE + i / KN_KV_BLOCK]);
    }
    memcpy(&bits, row + (DIM - ROPE) + 2 * (i - (DIM - ROPE)), 2);
    return (long double)kn_bf16_decode(bits);
}

static bool is_near(long double got, long double want, long double relative, long double absolute)
{
    return fabsl(got - want) <= relative * fabsl(want) + absolute;
}

/* The stored row of position p, raw: in the window before the step, in rows of the step. */
static const uint8_t *raw_row(const uint8_t *window, const uint8_t *rows, const far_layer *l, uint32_t p)
{
    return p >= POS0 ? rows + (uint64_t)(p - POS0) * l->a.layout.row_bytes
                     : window + (uint64_t)(p % WINDOW) * l->a.layout.row_bytes;
}

/* window: the raw window as it was before the step. */
static void check_attention(rig *r, const far_layer *l, const uint8_t *window, uint32_t i_row, uint32_t head)
{
    uint32_t p = POS0 + i_row, ratio = l->a.layout.ratio, n = 0, visible = (p + 1) / ratio;
    const uint16_t *q = (const uint16_t *)host(r, l->q) + ((uint64_t)i_row * HEADS + head) * DIM,
                   *o = (const uint16_t *)host(r, l->o) + ((uint64_t)i_row * HEADS + head) * DIM;
    const int32_t *picks = (const int32_t *)host(r, l->picks) + (uint64_t)i_row * TOPK;
    const uint8_t **keys = cm_alloc(sizeof(*keys) * (WINDOW + PAGES));
    long double *weight = cm_alloc(sizeof(long double) * (WINDOW + PAGES)), den = 0;
    long double sink = (long double)((const float *)host(r, l->a.sink))[head], top = sink;
    for (uint32_t at = p + 1 - WINDOW; at <= p; at++) {
        keys[n++] = raw_row(window, host(r, l->rows), l, at);
    }
    for (uint32_t j = 0; j < (ratio == 4 ? TOPK : visible); j++) {
        keys[n++] = stored_row(r, l, 0, l->a.layout.row_bytes, ratio == 4 ? (uint32_t)picks[j] : j);
    }
    for (uint32_t k = 0; k < n; k++) {
        for (uint32_t i = 0; i < DIM; i++) {
            weight[k] += (long double)kn_bf16_decode(q[i]) * kv_value(keys[k], i);
        }
        weight[k] /= sqrtl(DIM);
        top = fmaxl(top, weight[k]);
    }
    den = expl(sink - top);
    for (uint32_t k = 0; k < n; k++) {
        weight[k] = expl(weight[k] - top);
        den += weight[k];
    }
    for (uint32_t i = 0; i < DIM; i++) {
        long double sum = 0;
        for (uint32_t k = 0; k < n; k++) {
            sum += weight[k] * kv_value(keys[k], i);
        }
        if (!is_near((long double)kn_bf16_decode(o[i]), sum / den, 0x1p-8L, 1e-6L)) {
            fail_msg("ratio %u position %u head %u dim %u: %g, must be %Lg", ratio, p, head, i,
                     (double)kn_bf16_decode(o[i]), sum / den);
        }
    }
    cm_free(keys);
    cm_free(weight);
}

/* One value of the row that ends at the last position, before its norm. kv, score: of the whole window or
 * two, from the state before the step and the step's rows; score with ape. */
static long double far_pooled(const far_layer *l, const float *state, const float *kv, const float *score,
                              uint32_t i)
{
    uint32_t ratio = l->a.layout.ratio, span = kn_compress_span(ratio, 0), n_term = span;
    uint64_t width = l->main_width;
    long double value[KN_PAGE_TOKENS], weight[KN_PAGE_TOKENS], top = -INFINITY, sum = 0, den = 0;
    for (uint32_t t = 0; t < n_term; t++) {
        uint32_t p = CONTEXT - n_term + t;
        uint64_t column = ratio == 4 && t >= 4 ? DIM + i : i;
        if (p >= POS0) {
            value[t] = (long double)kv[(p - POS0) * width + column];
            weight[t] = (long double)score[(p - POS0) * width + column];
        } else {
            value[t] = (long double)state[p % span * width + column];
            weight[t] = (long double)state[(span + p % span) * width + column];
        }
        top = fmaxl(top, weight[t]);
    }
    for (uint32_t t = 0; t < n_term; t++) {
        den += expl(weight[t] - top);
        sum += expl(weight[t] - top) * value[t];
    }
    return sum / den;
}

/* state: of the main compressor before the step. */
static void check_compressed(rig *r, const far_layer *l, const float *state)
{
    uint32_t ratio = l->a.layout.ratio, last = CONTEXT / ratio - 1;
    const uint8_t *got = stored_row(r, l, 0, l->a.layout.row_bytes, last);
    const uint16_t *norm = host(r, l->main.norm);
    long double row[DIM], squares = 0, c[HALF], s[HALF];
    for (uint32_t i = 0; i < DIM; i++) {
        row[i] = far_pooled(l, state, host(r, l->kv_main), host(r, l->score_main), i);
        squares += row[i] * row[i];
    }
    for (uint32_t i = 0; i < DIM; i++) {
        row[i] = row[i] / sqrtl(squares / DIM + 1e-6L) * (long double)kn_bf16_decode(norm[i]);
    }
    far_angles(&tables[1], ratio * last, c, s); /* the first token of its window */
    for (uint32_t i = 0; i < HALF; i++) {
        long double a = row[DIM - ROPE + 2 * i], b = row[DIM - ROPE + 2 * i + 1];
        row[DIM - ROPE + 2 * i] = a * c[i] - b * s[i];
        row[DIM - ROPE + 2 * i + 1] = a * s[i] + b * c[i];
    }
    for (uint32_t i = 0; i < DIM; i++) { /* bf16 on the way; E4M3 has four bits where there is no rope */
        bool rope = i >= DIM - ROPE;
        if (!is_near(kv_value(got, i), row[i], rope ? 0x1p-6L : 0x1p-4L + 0x1p-7L, rope ? 0x1p-6L : 0.02L)) {
            fail_msg("ratio %u, last row, dim %u: %Lg, must be %Lg", ratio, i, kv_value(got, i), row[i]);
        }
    }
}

static float far_score(const uint8_t *q, const uint16_t *w, const uint8_t *key)
{
    uint32_t row_bytes = kn_index_row_bytes(INDEX_DIM);
    float factor = (float)(1.0L / sqrtl(INDEX_DIM * INDEX_HEADS));
    long double sum = 0;
    for (uint32_t h = 0; h < INDEX_HEADS; h++) {
        const uint8_t *row = q + (uint64_t)h * row_bytes;
        long double dot = 0;
        for (uint32_t i = 0; i < INDEX_DIM; i++) {
            long double scale = (long double)kn_e8m0_decode(row[INDEX_DIM / 2 + i / KN_FP4_BLOCK]) *
                                (long double)kn_e8m0_decode(key[INDEX_DIM / 2 + i / KN_FP4_BLOCK]);
            dot += (long double)kn_e2m1_decode(row[i / 2] >> i % 2 * 4 & 15) *
                   (long double)kn_e2m1_decode(key[i / 2] >> i % 2 * 4 & 15) * scale;
        }
        sum += (dot > 0 ? dot : 0) * (long double)(kn_bf16_decode(w[h]) * factor);
    }
    return (float)sum;
}

/* Rows that hold the same page have the same score: only those of the PAGES_HELD pages are computed. */
static void check_picks(rig *r, const far_layer *l, const int32_t *picks, const uint8_t *iq_row,
                        const uint16_t *w, uint32_t p)
{
    enum { PER_PAGE = KN_PAGE_TOKENS / 4 };
    uint32_t visible = (p + 1) / 4, n_better = 0;
    float score[PAGES_HELD * PER_PAGE];
    for (uint32_t i = 0; i < PAGES_HELD * PER_PAGE; i++) {
        const uint8_t *pool = host(r, l->b.page_pool);
        score[i] = far_score(iq_row, w,
                             pool + i / PER_PAGE * l->b.page_bytes + l->a.layout.page_index +
                                 (uint64_t)(i % PER_PAGE) * l->a.layout.index_bytes);
    }
#define SCORE_OF(j) score[l->list[(j) / PER_PAGE] * PER_PAGE + (j) % PER_PAGE]
    uint32_t worst = (uint32_t)picks[0];
    for (uint32_t k = 0; k < TOPK; k++) {
        uint32_t j = (uint32_t)picks[k];
        assert_true(j < visible && (k == 0 || picks[k] > picks[k - 1]));
        worst = SCORE_OF(j) < SCORE_OF(worst) || (SCORE_OF(j) == SCORE_OF(worst) && j > worst) ? j : worst;
    }
    for (uint32_t j = 0; j < visible; j++) { /* exactly the picks stand before or at the worst of them */
        n_better += SCORE_OF(j) > SCORE_OF(worst) || (SCORE_OF(j) == SCORE_OF(worst) && j <= worst);
    }
#undef SCORE_OF
    if (n_better != TOPK) {
        fail_msg("position %u: %u rows are at least as good as the worst pick, must be %d", p, n_better,
                 TOPK);
    }
}

/* The row that the last position completes is seen by it and by no position before: all queries are that row.
 */
static void check_visible(rig *r, far_layer *l)
{
    uint32_t row_bytes = kn_index_row_bytes(INDEX_DIM), last = CONTEXT / 4 - 1;
    const uint8_t *key = stored_row(r, l, l->a.layout.page_index, row_bytes, last);
    kn_ptr rows = rig_new(r, (uint64_t)N * INDEX_HEADS * row_bytes), w = rig_new(r, 2ull * N * INDEX_HEADS);
    int32_t picks[N * TOPK];
    for (uint32_t i = 0; i < N * INDEX_HEADS; i++) {
        memcpy((uint8_t *)host(r, rows) + (uint64_t)i * row_bytes, key, row_bytes);
        ((uint16_t *)host(r, w))[i] = kn_bf16_encode(1);
    }
    kn_seg seg = {.n_row = N, .pos0 = POS0, .slot = l->slot};
    l->b.segs = rig_up(r, &seg, sizeof seg);
    l->b.n_row = N;
    kn_attention(r->device)->index_topk(r->stream, &l->b, &l->a.layout, INDEX_HEADS, INDEX_DIM, TOPK, rows, w,
                                        l->picks);
    rig_down(r, picks, l->picks, sizeof picks);
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(picks[i * TOPK + TOPK - 1] == (int32_t)last, i == N - 1);
        check_picks(r, l, picks + i * TOPK, host(r, rows), host(r, w), POS0 + i);
    }
}

static void check_against_definition(rig *r, uint32_t ratio)
{
    far_layer l = layer_open(r, ratio);
    uint64_t n_window = (uint64_t)WINDOW * l.a.layout.row_bytes,
             n_state = kn_compress_state_bytes(ratio, DIM, 0),
             iq_row = (uint64_t)INDEX_HEADS * kn_index_row_bytes(INDEX_DIM);
    uint8_t *window = cm_alloc(n_window);
    float *state = cm_alloc(n_state);
    rig_down(r, window, l.slot, n_window);
    rig_down(r, state, kn_at(l.slot, l.a.layout.slot_main), n_state);
    layer_step(r, &l, 0, N);
    check_compressed(r, &l, state);
    for (uint32_t i = 0; i < N; i++) {
        check_attention(r, &l, window, i, i % HEADS);
        if (ratio == 4) {
            check_picks(r, &l, (const int32_t *)host(r, l.picks) + i * TOPK,
                        (const uint8_t *)host(r, l.iq_rows) + i * iq_row,
                        (const uint16_t *)host(r, l.iw) + i * INDEX_HEADS, POS0 + i);
        }
    }
    if (ratio == 4) {
        check_visible(r, &l);
    }
    cm_free(window);
    cm_free(state);
    cm_free(l.list);
}

static void test_definition(void **state)
{
    rig r;
    (void)state;
    rig_open(&r, "ref", NULL, 1, &LIMITS);
    check_against_definition(&r, 4);
    rig_reset(&r);
    check_against_definition(&r, 128);
    rig_close(&r);
}

/* ---- ref against every path ---- */

static void keep(rig *r, cm_bytes *out, kn_ptr at, uint64_t n)
{
    cm_bytes_append(out, host(r, at), n);
}

static void run_layer(const char *backend, const char *isa, uint32_t n_threads, uint32_t ratio,
                      uint32_t chunk, cm_bytes *out)
{
    rig r;
    rig_open(&r, backend, isa, n_threads, &LIMITS);
    far_layer l = layer_open(&r, ratio);
    for (uint32_t at = 0; at < N; at += chunk) {
        layer_step(&r, &l, at, N - at < chunk ? N - at : chunk);
    }
    cm_bytes_init(out, 0);
    keep(&r, out, l.q, 2ull * N * HEADS * DIM);
    keep(&r, out, l.rows, (uint64_t)N * l.a.layout.row_bytes);
    keep(&r, out, l.picks, 4ull * N * TOPK);
    keep(&r, out, l.o, 2ull * N * HEADS * DIM);
    keep(&r, out, l.slot, l.slot_bytes);
    keep(&r, out, l.b.page_pool, l.pool_bytes);
    cm_free(l.list);
    rig_close(&r);
}

static void test_paths(void **state)
{
    static const uint32_t ratios[] = {4, 128};
    (void)state;
    for (size_t k = 0; k < 2; k++) {
        cm_bytes want, got;
        run_layer("ref", NULL, 1, ratios[k], N, &want);
        for (uint32_t i = 0; kn_cpu_isa_at(i) != NULL; i++) {
            for (uint32_t chunk = 1; chunk <= N; chunk += 2) {
                run_layer("cpu", kn_cpu_isa_at(i), chunk, ratios[k], chunk, &got);
                assert_int_equal(got.len, want.len);
                if (memcmp(got.data, want.data, want.len) != 0) {
                    fail_msg("ratio %u, %s in chunks of %u: other bits than ref", ratios[k], kn_cpu_isa_at(i),
                             chunk);
                }
                cm_bytes_fini(&got);
            }
        }
        cm_bytes_fini(&want);
    }
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_tables),
        cmocka_unit_test(test_definition),
        cmocka_unit_test(test_paths),
    };
    if (argc > 1) {
        seed = strtoull(argv[1], NULL, 0);
    }
    print_message("seed %llu\n", (unsigned long long)seed);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
