#include "tools/bench/synthetic.h"

#include <errno.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "common/base/assert.h"
#include "common/base/bytes.h"
#include "common/base/mem.h"
#include "common/base/rng.h"
#include "common/model/checkpoint.h"
#include "common/model/tokenizer.h"
#include "kernels/kn_math.h"
#include "tools/baleen/cli.h"

enum {
    SYNTH_NORMALS = 1 << 16, /* drawn from by 16 random bits */
    SYNTH_FP8_BLOCK = 128,
    SYNTH_FP4_BLOCK = 32,
    SYNTH_ROWS = 4096,
    SYNTH_WIDTHS = 4,
    SYNTH_PIECE = 1 << 16, /* values made at a time where no block asks for more */
    SYNTH_FIRST_BYTE = 2,  /* id of byte 0; begin and end of a sequence are before it */
    SYNTH_FIRST_CONTROL = SYNTH_FIRST_BYTE + 256,
};

/* Rows of E2M1 of one width, made once: a matrix takes them in random order. There are billions of such
 * values in a checkpoint, and quantizing each would take minutes. */
typedef struct synth_rows {
    uint64_t n_in;
    uint8_t *codes, *scales; /* [SYNTH_ROWS][n_in / 2], [SYNTH_ROWS][blocks] */
} synth_rows;

typedef struct synth {
    const char *dir;
    md_geometry geometry;
    uint64_t seed, n_drawn; /* blocks of random words so far */
    cm_rng_block words;
    uint32_t n_left; /* 16-bit pieces of words not used yet */
    float *normals;  /* [SYNTH_NORMALS] */
    md_expect *list; /* [n_list], in the order of the files */
    uint32_t n_list, cap;
    cm_bytes scales; /* of the quantized matrix before, until its own tensor comes */
    float *values;   /* room for the piece under way */
    uint64_t values_max;
    synth_rows rows[SYNTH_WIDTHS];
    FILE *file;
    const char *wrong; /* what could not be written; NULL: all went well */
} synth;

/* ---- random values ---- */

static uint32_t draw_16(synth *s)
{
    if (s->n_left == 0) {
        s->words = cm_rng_at(s->seed, s->n_drawn++, 0);
        s->n_left = 8;
    }
    s->n_left--;
    return s->words.word[s->n_left / 2] >> 16 * (s->n_left % 2) & 0xffff;
}

static float draw_normal(synth *s, float std)
{
    return std * s->normals[draw_16(s)];
}

/* Box and Muller's, once for all: a draw is a look-up then. */
static void fill_normals(synth *s)
{
    s->normals = cm_alloc(sizeof(float) * SYNTH_NORMALS);
    for (uint32_t i = 0; i < SYNTH_NORMALS; i += 2) {
        double radius = sqrt(-2 * log(1 - cm_rng_uniform(s->seed, i, 1)));
        double angle = 6.283185307179586 * cm_rng_uniform(s->seed, i, 2);
        s->normals[i] = (float)(radius * cos(angle));
        s->normals[i + 1] = (float)(radius * sin(angle));
    }
}

/* ---- tensors ---- */

static void put(synth *s, const void *data, size_t n_bytes)
{
    if (s->wrong == NULL && fwrite(data, 1, n_bytes, s->file) != n_bytes) {
        s->wrong = strerror(errno);
    }
}

/* Room for n values, filled with normal ones. */
static float *draw_values(synth *s, uint64_t n, float mean, float std)
{
    if (n > s->values_max) {
        s->values = cm_realloc(s->values, sizeof(float) * n);
        s->values_max = n;
    }
    for (uint64_t i = 0; i < n; i++) {
        s->values[i] = mean + draw_normal(s, std);
    }
    return s->values;
}

static float block_amax(const float *values, uint64_t stride, uint64_t n_row, uint64_t n_col)
{
    float amax = 0;
    for (uint64_t r = 0; r < n_row; r++) {
        for (uint64_t c = 0; c < n_col; c++) {
            float a = fabsf(values[r * stride + c]);
            amax = a > amax ? a : amax;
        }
    }
    return amax;
}

static void keep_scale(synth *s, int32_t exponent)
{
    uint8_t byte = (uint8_t)(exponent + 127);
    cm_bytes_append(&s->scales, &byte, 1);
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* E4M3 with one scale per 128 x 128: a band of 128 rows at a time, in place of its floats. */
static void put_fp8(synth *s, const md_expect *t)
{
    uint64_t n_in = t->dim[1];
    for (uint64_t row = 0; row < t->dim[0]; row += SYNTH_FP8_BLOCK) {
        uint64_t n_row = least(SYNTH_FP8_BLOCK, t->dim[0] - row);
        float *values = draw_values(s, n_row * n_in, 0, 1 / sqrtf((float)n_in));
        for (uint64_t col = 0; col < n_in; col += SYNTH_FP8_BLOCK) {
            uint64_t n_col = least(SYNTH_FP8_BLOCK, n_in - col);
            int32_t exponent = kn_scale_exponent_fp8(block_amax(values + col, n_in, n_row, n_col));
            for (uint64_t i = 0; i < n_row * n_col; i++) {
                values[i / n_col * n_in + col + i % n_col] *= kn_exp2i(-exponent);
            }
            keep_scale(s, exponent);
        }
        uint8_t *codes = (uint8_t *)values; /* a code is never ahead of its float */
        for (uint64_t i = 0; i < n_row * n_in; i++) {
            uint8_t code = kn_e4m3_encode(values[i]);
            codes[i] = code;
        }
        put(s, codes, n_row * n_in);
    }
}

static uint64_t fp4_blocks(uint64_t n_in)
{
    return (n_in + SYNTH_FP4_BLOCK - 1) / SYNTH_FP4_BLOCK;
}

/* Two codes a byte, low nibble first, one scale per 32 inputs of a row. */
static void make_fp4_row(synth *s, uint64_t n_in, uint8_t *codes, uint8_t *scales)
{
    float *values = draw_values(s, n_in, 0, 1 / sqrtf((float)n_in));
    for (uint64_t col = 0; col < n_in; col += SYNTH_FP4_BLOCK) {
        uint64_t n = least(SYNTH_FP4_BLOCK, n_in - col);
        int32_t exponent = kn_scale_exponent_fp4(block_amax(values + col, n_in, 1, n));
        float scale = kn_exp2i(-exponent);
        for (uint64_t i = col; i < col + n; i += 2) {
            uint8_t low = kn_e2m1_encode(values[i] * scale), high = kn_e2m1_encode(values[i + 1] * scale);
            codes[i / 2] = (uint8_t)(low | high << 4);
        }
        scales[col / SYNTH_FP4_BLOCK] = (uint8_t)(exponent + 127);
    }
}

static const synth_rows *fp4_rows(synth *s, uint64_t n_in)
{
    uint32_t i = 0;
    while (i < SYNTH_WIDTHS && s->rows[i].codes != NULL && s->rows[i].n_in != n_in) {
        i++;
    }
    CM_ASSERT(i < SYNTH_WIDTHS); /* experts have two */
    synth_rows *rows = &s->rows[i];
    if (rows->codes == NULL) {
        *rows = (synth_rows){.n_in = n_in,
                             .codes = cm_alloc(SYNTH_ROWS * n_in / 2),
                             .scales = cm_alloc(SYNTH_ROWS * fp4_blocks(n_in))};
        for (uint64_t r = 0; r < SYNTH_ROWS; r++) {
            make_fp4_row(s, n_in, rows->codes + r * n_in / 2, rows->scales + r * fp4_blocks(n_in));
        }
    }
    return rows;
}

static void put_fp4(synth *s, const md_expect *t)
{
    uint64_t n_in = 2 * t->dim[1], n_block = fp4_blocks(n_in);
    const synth_rows *rows = fp4_rows(s, n_in);
    for (uint64_t row = 0; row < t->dim[0]; row++) {
        uint64_t r = draw_16(s) % SYNTH_ROWS;
        put(s, rows->codes + r * n_in / 2, n_in / 2);
        cm_bytes_append(&s->scales, rows->scales + r * n_block, n_block);
    }
}

typedef struct synth_kind {
    const char *suffix;
    float mean, std; /* std 0: 1 / sqrt(inputs) */
} synth_kind;

static synth_kind kind_of(const char *name)
{
    static const synth_kind kinds[] = {
        {"norm.weight", 1, 0.1f}, {"embed.weight", 0, 1}, {"_base", 0, 0.5f},      {"_scale", 0, 0.3f},
        {"_sink", 0, 0.5f},       {".ape", 0, 0.5f},      {"gate.bias", 0, 0.05f}, {"", 0, 0}};
    size_t i = 0, n = strlen(name);
    for (;; i++) { /* the last one's suffix ends every name */
        size_t m = strlen(kinds[i].suffix);
        if (n >= m && strcmp(name + n - m, kinds[i].suffix) == 0) {
            return kinds[i];
        }
    }
}

/* BF16 and F32, piece by piece. */
static void put_floats(synth *s, const md_expect *t)
{
    synth_kind kind = kind_of(t->name);
    float std = kind.std != 0 ? kind.std : 1 / sqrtf((float)t->dim[t->n_dim - 1]);
    uint64_t n = t->dim[0] * (t->n_dim > 1 ? t->dim[1] : 1);
    for (uint64_t at = 0; at < n; at += SYNTH_PIECE) {
        uint64_t n_piece = least(SYNTH_PIECE, n - at);
        float *values = draw_values(s, n_piece, kind.mean, std);
        uint16_t *halves = (uint16_t *)(void *)values;
        for (uint64_t i = 0; t->dtype == MD_BF16 && i < n_piece; i++) {
            uint16_t half = kn_bf16_encode(values[i]);
            memcpy(&halves[i], &half, sizeof(half));
        }
        put(s, values, n_piece * md_dtype_bytes(t->dtype));
    }
}

/* For each token of the vocabulary so many experts, none twice. */
static void put_choices(synth *s, const md_expect *t)
{
    int64_t chosen[64];
    CM_ASSERT(t->dim[1] <= 64 && t->dim[1] <= s->geometry.n_expert);
    for (uint64_t row = 0; row < t->dim[0]; row++) {
        for (uint64_t n = 0; n < t->dim[1];) {
            uint64_t same = 0;
            chosen[n] = draw_16(s) % s->geometry.n_expert;
            while (chosen[same] != chosen[n]) {
                same++;
            }
            n += same == n;
        }
        put(s, chosen, sizeof(int64_t) * t->dim[1]);
    }
}

static void put_tensor(synth *s, const md_expect *t)
{
    switch (t->dtype) {
    case MD_F8_E4M3:
        put_fp8(s, t);
        break;
    case MD_I8:
        put_fp4(s, t);
        break;
    case MD_F8_E8M0:
        CM_ASSERT_MSG(s->scales.len == t->dim[0] * t->dim[1], "%s: %zu scales", t->name, s->scales.len);
        put(s, s->scales.data, s->scales.len);
        cm_bytes_clear(&s->scales);
        break;
    case MD_I64:
        put_choices(s, t);
        break;
    default:
        put_floats(s, t);
    }
}

/* ---- files ---- */

static bool list_one(void *ctx, const md_expect *expect)
{
    synth *s = ctx;
    if (s->n_list == s->cap) {
        s->cap = s->cap == 0 ? 1024 : 2 * s->cap;
        s->list = cm_realloc(s->list, sizeof(*s->list) * s->cap);
    }
    s->list[s->n_list++] = *expect;
    return true;
}

/* What of a name its file shares: "layers.3.", "mtp.0.", "embed." or nothing. */
static size_t group_length(const char *name)
{
    const char *end = name;
    if (strncmp(name, "layers.", 7) == 0 || strncmp(name, "mtp.", 4) == 0) {
        end = strchr(strchr(name, '.') + 1, '.') + 1;
    } else if (strncmp(name, "embed.", 6) == 0) {
        end = name + 6;
    }
    return (size_t)(end - name);
}

/* The first row of the list after i that belongs to another file. */
static uint32_t group_end(const synth *s, uint32_t i)
{
    size_t n = group_length(s->list[i].name);
    uint32_t end = i + 1;
    while (end < s->n_list && group_length(s->list[end].name) == n &&
           memcmp(s->list[end].name, s->list[i].name, n) == 0) {
        end++;
    }
    return end;
}

static uint64_t tensor_bytes(const md_expect *t)
{
    return t->dim[0] * (t->n_dim > 1 ? t->dim[1] : 1) * md_dtype_bytes(t->dtype);
}

static void put_header(synth *s, uint32_t begin, uint32_t end)
{
    cm_bytes text;
    uint64_t at = 0;
    cm_bytes_init(&text, 0);
    for (uint32_t i = begin; i < end; i++) {
        const md_expect *t = &s->list[i];
        cm_bytes_printf(&text, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%llu", i == begin ? "{" : ",", t->name,
                        md_dtype_name(t->dtype), (unsigned long long)t->dim[0]);
        if (t->n_dim > 1) {
            cm_bytes_printf(&text, ",%llu", (unsigned long long)t->dim[1]);
        }
        cm_bytes_printf(&text, "],\"data_offsets\":[%llu,%llu]}", (unsigned long long)at,
                        (unsigned long long)(at + tensor_bytes(t)));
        at += tensor_bytes(t);
    }
    cm_bytes_append_text(&text, "}");
    while (text.len % 64 != 0) {
        cm_bytes_append_text(&text, " "); /* so that tensors begin at even addresses */
    }
    uint64_t n = text.len;
    put(s, &n, sizeof(n));
    put(s, text.data, text.len);
    cm_bytes_fini(&text);
}

static cm_status open_file(synth *s, const char *name, cm_error *err)
{
    cm_bytes path;
    cm_bytes_init(&path, 0);
    cm_bytes_printf(&path, "%s/%s", s->dir, name);
    s->file = fopen(cm_bytes_text(&path), "we");
    cm_bytes_fini(&path);
    return s->file != NULL ? CM_OK
                           : cm_error_set(err, CM_E_IO, "DIR", "%s/%s: %s", s->dir, name, strerror(errno));
}

static cm_status close_file(synth *s, const char *name, cm_error *err)
{
    if (fclose(s->file) != 0 && s->wrong == NULL) {
        s->wrong = strerror(errno);
    }
    return s->wrong == NULL ? CM_OK : cm_error_set(err, CM_E_IO, "DIR", "%s/%s: %s", s->dir, name, s->wrong);
}

static cm_status write_text(synth *s, const char *name, const cm_bytes *text, cm_error *err)
{
    CM_TRY(open_file(s, name, err));
    put(s, text->data, text->len);
    return close_file(s, name, err);
}

static cm_status write_shards(synth *s, cm_bytes *index, cm_error *err)
{
    uint32_t n_file = 0, i_file = 0;
    uint64_t n_bytes = 0;
    for (uint32_t i = 0; i < s->n_list; i = group_end(s, i)) {
        n_file++;
    }
    cm_bytes_append_text(index, "{\"weight_map\":{");
    for (uint32_t begin = 0; begin < s->n_list; begin = group_end(s, begin)) {
        char name[64];
        snprintf(name, sizeof(name), "model-%05u-of-%05u.safetensors", ++i_file, n_file);
        cli_progress("%s", name);
        CM_TRY(open_file(s, name, err));
        put_header(s, begin, group_end(s, begin));
        for (uint32_t i = begin; i < group_end(s, begin); i++) {
            put_tensor(s, &s->list[i]);
            n_bytes += tensor_bytes(&s->list[i]);
            cm_bytes_printf(index, "%s\n\"%s\":\"%s\"", i == 0 ? "" : ",", s->list[i].name, name);
        }
        CM_TRY(close_file(s, name, err));
    }
    cli_progress_clear();
    cm_bytes_printf(index, "},\n\"metadata\":{\"total_size\":%llu}}\n", (unsigned long long)n_bytes);
    return CM_OK;
}

/* ---- tokenizer ---- */

static void put_symbol(cm_bytes *text, uint32_t code_point)
{
    uint8_t utf8[2] = {(uint8_t)(0xC0 | code_point >> 6), (uint8_t)(0x80 | (code_point & 0x3F))};
    uint8_t one = (uint8_t)code_point;
    if (code_point == '"' || code_point == '\\') {
        cm_bytes_append_text(text, "\\");
    }
    cm_bytes_append(text, code_point < 0x80 ? &one : utf8, code_point < 0x80 ? 1 : 2);
}

/* A token for every byte in the spelling of byte-level BPE: printable Latin-1 stands for itself, the others
 * in order for U+0100 on. */
static void put_bytes(cm_bytes *text)
{
    uint32_t next = 0x100;
    for (uint32_t b = 0; b < 256; b++) {
        bool itself = (b >= 0x21 && b <= 0x7E) || (b >= 0xA1 && b != 0xAD);
        cm_bytes_append_text(text, b == 0 ? "\"" : ",\"");
        put_symbol(text, itself ? b : next++);
        cm_bytes_printf(text, "\":%u", SYNTH_FIRST_BYTE + b);
    }
}

/* Every byte is a token, and what the chat encoding needs. Ids after those have no text. */
static cm_status write_tokenizer(synth *s, cm_error *err)
{
    cm_bytes text;
    cm_bytes_init(&text, 0);
    cm_bytes_append_text(&text,
                         "{\"version\":\"1.0\",\"truncation\":null,\"padding\":null,\"normalizer\":null,"
                         "\"post_processor\":null,\n\"added_tokens\":[");
    uint32_t next = SYNTH_FIRST_CONTROL;
    for (uint32_t i = 0; i < MD_CTL_COUNT; i++) {
        uint32_t id = i == MD_CTL_BOS ? s->geometry.bos_id : i == MD_CTL_EOS ? s->geometry.eos_id : next++;
        cm_bytes_printf(&text, "%s{\"id\":%u,\"content\":\"%s\",\"special\":%s}", i == 0 ? "" : ",\n", id,
                        md_control_text((md_control)i),
                        i == MD_CTL_BOS || i == MD_CTL_EOS ? "true" : "false");
    }
    cm_bytes_append_text(&text,
                         "],\n\"pre_tokenizer\":{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":"
                         "\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}]},\n\"decoder\":"
                         "{\"type\":\"ByteLevel\"},\n\"model\":{\"type\":\"BPE\",\"merges\":[],\"vocab\":{");
    put_bytes(&text);
    cm_bytes_append_text(&text, "}}}\n");
    cm_status status = write_text(s, "tokenizer.json", &text, err);
    cm_bytes_fini(&text);
    return status;
}

/* ---- all ---- */

static cm_status check_geometry(const synth *s, cm_error *err)
{
    const md_geometry *g = &s->geometry;
    if (g->vocab < SYNTH_FIRST_CONTROL + MD_CTL_COUNT || g->bos_id >= SYNTH_FIRST_BYTE ||
        g->eos_id >= SYNTH_FIRST_BYTE) {
        return cm_error_set(err, CM_E_INVALID, "vocab_size",
                            "config.json: the tokenizer of bytes that goes with it needs a vocab_size of at "
                            "least %u, and bos_token_id and eos_token_id below %u",
                            SYNTH_FIRST_CONTROL + MD_CTL_COUNT, SYNTH_FIRST_BYTE);
    }
    return CM_OK;
}

static cm_status synth_write(synth *s, const char *config, cm_error *err)
{
    cm_bytes index;
    if (mkdir(s->dir, 0755) != 0) {
        return cm_error_set(err, CM_E_IO, "DIR", "%s: %s; name a folder that is not there yet", s->dir,
                            strerror(errno));
    }
    cm_bytes_init(&index, 0);
    md_expect_each(&s->geometry, list_one, s);
    cm_status status = write_shards(s, &index, err);
    if (status == CM_OK) {
        status = write_text(s, "model.safetensors.index.json", &index, err);
    }
    cm_bytes_fini(&index);
    CM_TRY(status);
    CM_TRY(write_tokenizer(s, err));
    cm_bytes text;
    cm_bytes_init(&text, 0);
    cm_bytes_append_text(&text, config);
    status =
        write_text(s, "config.json", &text, err); /* last: without it nobody takes the folder for a model */
    cm_bytes_fini(&text);
    return status;
}

cm_status synthetic_write(const char *config, const char *dir, uint64_t seed, cm_error *err)
{
    synth s = {.dir = dir, .seed = seed};
    CM_TRY(md_geometry_parse(config, strlen(config), &s.geometry, err));
    CM_TRY(check_geometry(&s, err));
    cm_bytes_init(&s.scales, 0);
    fill_normals(&s);
    cm_status status = synth_write(&s, config, err);
    cm_bytes_fini(&s.scales);
    cm_free(s.normals);
    cm_free(s.values);
    cm_free(s.list);
    for (uint32_t i = 0; i < SYNTH_WIDTHS; i++) {
        cm_free(s.rows[i].codes);
        cm_free(s.rows[i].scales);
    }
    return status;
}

cm_status synthetic_config(const char *model, cm_bytes *text_out, cm_error *err)
{
    md_geometry g;
    CM_TRY(md_geometry_load(model, &g, err)); /* whose sentences name the file */
    cm_bytes_init(text_out, 0);
    cm_bytes_printf(text_out, "%s/config.json", model);
    json_t *config = json_load_file(cm_bytes_text(text_out), 0, NULL);
    cm_bytes_clear(text_out);
    cli_append_json(text_out, config, JSON_INDENT(1));
    json_decref(config);
    return CM_OK;
}
