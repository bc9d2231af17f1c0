/* A prompt being put together: control ids and text in turn. Neighbouring texts are joined before they are
 * tokenized, so that ids do not depend on where one message part ends and the next begins. Thread: one at a
 * time. */
#pragma once
#include "common/base/bytes.h"
#include "common/model/tokenizer.h"

typedef struct md_prompt {
    const md_tokenizer *tokenizer;
    md_ids *ids;    /* appended to */
    cm_bytes text;  /* the whole prompt so far */
    size_t done;    /* bytes of text whose ids are out */
    bool reference; /* control spellings in any text act */
} md_prompt;

void md_prompt_init(md_prompt *prompt, const md_tokenizer *tokenizer, bool reference, md_ids *ids);
void md_prompt_fini(md_prompt *prompt);
void md_prompt_control(md_prompt *prompt, md_control control);
/* Caller text: never a control id but in reference mode. */
void md_prompt_text(md_prompt *prompt, const char *text, size_t n);
/* Text of ours: protocol spellings in it are control ids. */
void md_prompt_template(md_prompt *prompt, const char *text);
/* The last ids; appends the text to text_out unless NULL. */
void md_prompt_finish(md_prompt *prompt, cm_bytes *text_out);
