#include "gateway/parts.h"

#include <stdio.h>
#include <string.h>
#include <xxhash.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

static gw_part *begin_part(gw_parts *parts, const md_piece *piece)
{
    parts->part = cm_realloc(parts->part, (parts->n + 1) * sizeof(*parts->part));
    gw_part *part = &parts->part[parts->n++];
    *part = (gw_part){.kind = piece->kind, .call = piece->call};
    cm_bytes_init(&part->name, 0);
    cm_bytes_init(&part->text, 0);
    return part;
}

bool gw_parts_add(gw_parts *parts, const md_piece *piece)
{
    gw_part *last = parts->n > 0 ? &parts->part[parts->n - 1] : NULL;
    if (piece->kind == MD_PIECE_ARGS) {
        CM_ASSERT(last != NULL && last->kind == MD_PIECE_CALL);
        cm_bytes_append(&last->text, piece->text, piece->n_bytes);
        return false;
    }
    bool begins = last == NULL || piece->kind == MD_PIECE_CALL || last->kind != piece->kind;
    gw_part *part = begins ? begin_part(parts, piece) : last;
    cm_bytes_append(piece->kind == MD_PIECE_CALL ? &part->name : &part->text, piece->text, piece->n_bytes);
    return begins;
}

void gw_parts_mend(gw_parts *parts, const md_parser *parser)
{
    for (uint32_t i = 0; i < parts->n && parser != NULL; i++) {
        gw_part *part = &parts->part[i];
        if (part->kind == MD_PIECE_CALL) {
            size_t n;
            const char *arguments = md_parser_call_args(parser, part->call, &n);
            cm_bytes_clear(&part->text);
            cm_bytes_append(&part->text, arguments, n);
        }
    }
}

void gw_parts_fini(gw_parts *parts)
{
    for (uint32_t i = 0; i < parts->n; i++) {
        cm_bytes_fini(&parts->part[i].name);
        cm_bytes_fini(&parts->part[i].text);
    }
    cm_free(parts->part);
}

void gw_part_id(const char *prefix, const char *request_id, uint64_t n, char id_out[GW_PART_ID_BYTES])
{
    XXH128_hash_t hash = XXH3_128bits_withSeed(request_id, strlen(request_id), n);
    snprintf(id_out, GW_PART_ID_BYTES, "%s%016llx%08x", prefix, (unsigned long long)hash.low64,
             (unsigned)(hash.high64 & UINT32_MAX));
}
