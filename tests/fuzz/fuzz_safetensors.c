/* Input: the size of the data part (4 bytes, little-endian), then the JSON of a header. */
#include "common/model/safetensors_private.h"
#include "tests/fuzz/fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    md_header header;
    cm_error err = {0};
    if (size < 4) {
        return 0;
    }
    uint64_t n_data = data[0] | (uint64_t)data[1] << 8 | (uint64_t)data[2] << 16 | (uint64_t)data[3] << 24,
             at = 0;
    size_t n_text = size - 4;
    if (md_safetensors_parse_header((const char *)data + 4, n_text, 8 + n_text + n_data, "input", &header,
                                    &err) != CM_OK) {
        CM_ASSERT(err.text[0] != '\0');
        return 0;
    }
    for (uint32_t i = 0; i < header.n; i++) {
        CM_ASSERT(header.rows[i].begin == at && header.rows[i].tensor.name != NULL);
        at += header.rows[i].tensor.n_bytes;
    }
    CM_ASSERT(at == n_data);
    md_header_fini(&header);
    return 0;
}
