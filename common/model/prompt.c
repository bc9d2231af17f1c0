#include "common/model/prompt_private.h"

#include <string.h>

void md_prompt_init(md_prompt *prompt, const md_tokenizer *tokenizer, bool reference, md_ids *ids)
{
    *prompt = (md_prompt){.tokenizer = tokenizer, .reference = reference, .ids = ids};
    cm_bytes_init(&prompt->text, 0);
}

void md_prompt_fini(md_prompt *prompt)
{
    cm_bytes_fini(&prompt->text);
}

static void prompt_flush(md_prompt *prompt)
{
    md_tokenizer_encode(prompt->tokenizer, cm_bytes_text(&prompt->text) + prompt->done,
                        prompt->text.len - prompt->done, prompt->reference ? MD_TEXT_CONTROL : MD_TEXT_PLAIN,
                        prompt->ids);
    prompt->done = prompt->text.len;
}

void md_prompt_control(md_prompt *prompt, md_control control)
{
    if (!prompt->reference) {
        prompt_flush(prompt);
        md_ids_push(prompt->ids, md_tokenizer_control(prompt->tokenizer, control));
    }
    cm_bytes_append_text(&prompt->text, md_control_text(control));
    if (!prompt->reference) {
        prompt->done = prompt->text.len;
    }
}

void md_prompt_text(md_prompt *prompt, const char *text, size_t n)
{
    cm_bytes_append(&prompt->text, text, n);
}

/* The control whose spelling text begins with; MD_CTL_COUNT if none. No spelling is the start of another. */
static md_control control_at(const char *text)
{
    for (md_control control = 0; control < MD_CTL_COUNT; control++) {
        const char *spelling = md_control_text(control);
        if (strncmp(text, spelling, strlen(spelling)) == 0) {
            return control;
        }
    }
    return MD_CTL_COUNT;
}

void md_prompt_template(md_prompt *prompt, const char *text)
{
    while (*text != 0) {
        md_control control = control_at(text);
        if (control != MD_CTL_COUNT) {
            md_prompt_control(prompt, control);
            text += strlen(md_control_text(control));
        } else {
            md_prompt_text(prompt, text++, 1);
        }
    }
}

void md_prompt_finish(md_prompt *prompt, cm_bytes *text_out)
{
    prompt_flush(prompt);
    if (text_out != NULL) {
        cm_bytes_append(text_out, prompt->text.data, prompt->text.len);
    }
}
