#include "gateway/tokenizer_files.h"

#include <archive.h>
#include <archive_entry.h>
#include <errno.h>
#include <openssl/evp.h>
#include <stdio.h>
#include <string.h>

#include "common/base/assert.h"

enum { READ_BYTES = 64 << 10, DATE_S = 315532800 }; /* of every entry: the first one that a zip can say */

static la_ssize_t append(struct archive *archive, void *out, const void *data, size_t n_bytes)
{
    (void)archive;
    cm_bytes_append(out, data, n_bytes);
    return (la_ssize_t)n_bytes;
}

static void add_entry(struct archive *archive, const char *name, const cm_bytes *content)
{
    struct archive_entry *entry = archive_entry_new();
    archive_entry_set_pathname(entry, name);
    archive_entry_set_filetype(entry, AE_IFREG);
    archive_entry_set_perm(entry, 0644);
    archive_entry_set_mtime(entry, DATE_S, 0);
    archive_entry_set_size(entry, (la_int64_t)content->len);
    int rc = archive_write_header(archive, entry);
    CM_ASSERT_MSG(rc == ARCHIVE_OK, "%s", archive_error_string(archive));
    la_ssize_t n = archive_write_data(archive, cm_bytes_text(content), content->len);
    CM_ASSERT_MSG(n == (la_ssize_t)content->len, "%s", archive_error_string(archive));
    archive_entry_free(entry);
}

/* A file that does not exist is left out. */
static cm_status add_file(struct archive *archive, const char *dir, const char *name, cm_error *err)
{
    cm_bytes path, content;
    char block[READ_BYTES];
    cm_status status = CM_OK;
    cm_bytes_init(&path, 0);
    cm_bytes_init(&content, 0);
    cm_bytes_printf(&path, "%s/%s", dir, name);
    FILE *file = fopen(cm_bytes_text(&path), "rbe");
    if (file != NULL) {
        for (size_t n; (n = fread(block, 1, sizeof(block), file)) > 0;) {
            cm_bytes_append(&content, block, n);
        }
        bool failed = ferror(file) != 0;
        fclose(file);
        if (failed) {
            status = cm_error_set(err, CM_E_IO, "model", "cannot read %s: %s", cm_bytes_text(&path),
                                  strerror(errno));
        } else {
            add_entry(archive, name, &content);
        }
    } else if (errno != ENOENT) {
        status =
            cm_error_set(err, CM_E_IO, "model", "cannot open %s: %s", cm_bytes_text(&path), strerror(errno));
    }
    cm_bytes_fini(&content);
    cm_bytes_fini(&path);
    return status;
}

static void write_hash(const cm_bytes *data, char out[GW_SHA256_HEX])
{
    unsigned char hash[EVP_MAX_MD_SIZE];
    unsigned n = 0;
    int ok = EVP_Digest(data->data, data->len, hash, &n, EVP_sha256(), NULL);
    CM_ASSERT(ok == 1 && 2 * n + 1 == GW_SHA256_HEX);
    for (unsigned i = 0; i < n; i++) {
        snprintf(out + (size_t)2 * i, 3, "%02x", hash[i]);
    }
}

/* Stored, not compressed: it is asked for seldom and must be there at once. */
static struct archive *zip_begin(cm_bytes *out)
{
    struct archive *archive = archive_write_new();
    CM_ASSERT(archive != NULL);
    int rc = archive_write_set_format_zip(archive);
    CM_ASSERT(rc == ARCHIVE_OK);
    rc = archive_write_zip_set_compression_store(archive);
    CM_ASSERT(rc == ARCHIVE_OK);
    archive_write_set_bytes_in_last_block(archive, 1); /* nothing behind its end */
    rc = archive_write_open(archive, out, NULL, append, NULL);
    CM_ASSERT(rc == ARCHIVE_OK);
    return archive;
}

cm_status gw_tokenizer_zip(const char *dir, cm_bytes *zip_out, char sha256_out[GW_SHA256_HEX], cm_error *err)
{
    static const char *const names[] = {"tokenizer.json",          "tokenizer_config.json",
                                        "special_tokens_map.json", "added_tokens.json",
                                        "chat_template.jinja",     "config.json"};
    struct archive *archive = zip_begin(zip_out);
    cm_status status = CM_OK;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]) && status == CM_OK; i++) {
        status = add_file(archive, dir, names[i], err);
    }
    archive_write_free(archive);
    if (status == CM_OK) {
        write_hash(zip_out, sha256_out);
    }
    return status;
}
