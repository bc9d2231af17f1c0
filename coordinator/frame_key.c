#include "coordinator/frame_key.h"

#include <openssl/core_names.h>
#include <openssl/kdf.h>
#include <openssl/params.h>

#include "common/base/assert.h"

void co_frame_key_derive(const uint8_t secret[CO_SECRET_BYTES], uint64_t cluster, uint64_t epoch,
                         co_frame_key *key_out)
{
    struct {
        char label[16];
        uint64_t cluster, epoch;
    } context = {"baleen epoch key", cluster, epoch}; /* the label has no NUL */
    EVP_KDF *kdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
    EVP_KDF_CTX *ctx = EVP_KDF_CTX_new(kdf);
    OSSL_PARAM params[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, (char[]){"SHA256"}, 0),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)(uintptr_t)secret, CO_SECRET_BYTES),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, &context, sizeof(context)),
        OSSL_PARAM_construct_end(),
    };
    key_out->epoch = epoch;
    CM_ASSERT(ctx != NULL && EVP_KDF_derive(ctx, key_out->bytes, sizeof(key_out->bytes), params) == 1);
    EVP_KDF_CTX_free(ctx);
    EVP_KDF_free(kdf);
}
