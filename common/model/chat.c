#include "common/model/chat.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "common/base/mem.h"
#include "common/model/chat_private.h"

static const char EFFORT_A[] = "Reasoning Effort: Absolute maximum with no shortcuts permitted.\nYou MUST be "
                               "very thorough in your thinking and "
                               "comprehensively decompose the problem to resolve the root cause, rigorously "
                               "stress-testing your logic against all "
                               "potential paths, edge cases, and adversarial scenarios.\nExplicitly write "
                               "out your entire deliberation process, "
                               "documenting every intermediate step, considered alternative, and rejected "
                               "hypothesis to ensure absolutely no "
                               "assumption is left unchecked.\n\n";
static const char EFFORT_B[] =
    "Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.\nYou MUST reason with "
    "the utmost "
    "depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem into its most "
    "fundamental components, trace every causal chain to its root, and resolve the underlying cause rather "
    "than any "
    "surface symptom.\nDo not stop reasoning until you have independently verified the solution from "
    "multiple angles "
    "and are certain that no assumption remains unchecked and no error remains undiscovered.\n\n";

/* ---- profile and effort ---- */

md_profile md_profile_detect(const char *dir)
{
    char path[4096], line[4096];
    snprintf(path, sizeof(path), "%s/encoding/encoding_dsv4.py", dir);
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        return MD_PROFILE_G;
    }
    bool general = false, preview = false;
    while (fgets(line, sizeof(line), file) != NULL) {
        general |= strstr(line, "Reasoning Effort: Beyond maximum") != NULL ||
                   strstr(line, "REASONING_EFFORT_PROMPTS") != NULL;
        preview |= strstr(line, "REASONING_EFFORT_MAX") != NULL;
    }
    fclose(file);
    return preview && !general ? MD_PROFILE_P : MD_PROFILE_G;
}

cm_status md_effort_map(md_profile profile, const char *word, bool *thinking_io, md_effort *effort_out)
{
    static const struct {
        const char *word;
        md_effort effort[2]; /* of profiles G and P */
    } known[] = {
        {"minimal", {MD_EFFORT_LOW, MD_EFFORT_HIGH}}, {"low", {MD_EFFORT_LOW, MD_EFFORT_HIGH}},
        {"medium", {MD_EFFORT_HIGH, MD_EFFORT_HIGH}}, {"high", {MD_EFFORT_HIGH, MD_EFFORT_HIGH}},
        {"xhigh", {MD_EFFORT_HIGH, MD_EFFORT_MAX}},   {"max", {MD_EFFORT_MAX, MD_EFFORT_MAX}},
        {"ultra", {MD_EFFORT_MAX, MD_EFFORT_MAX}},
    };
    if (word != NULL && strcmp(word, "none") == 0) {
        *thinking_io = false;
        *effort_out = MD_EFFORT_NONE;
        return CM_OK;
    }
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (strcmp(word != NULL ? word : "high", known[i].word) == 0) {
            *effort_out = known[i].effort[profile];
            return CM_OK;
        }
    }
    return CM_E_INVALID;
}

static const char *effort_prefix(const md_chat_options *options)
{
    if (!options->thinking) {
        return "";
    }
    if (options->profile == MD_PROFILE_P) {
        return options->effort == MD_EFFORT_MAX ? EFFORT_A : "";
    }
    return options->effort == MD_EFFORT_MAX ? EFFORT_B : options->effort == MD_EFFORT_HIGH ? EFFORT_A : "";
}

/* ---- turns: messages after merging (4.1) ---- */

typedef struct block {
    const json_t *message; /* role user or tool */
    size_t order;          /* of a tool result, by the calls it answers */
    size_t index;          /* keeps the sort stable */
} block;

typedef struct turn {
    md_role role;
    const json_t *message; /* a user turn: its first message */
    block *blocks;         /* user turns: [n_blocks] */
    size_t n_blocks;
    const char *task; /* NULL = none */
} turn;

typedef struct conversation {
    turn *turns;
    size_t n_turns;
    block *blocks; /* [n_messages] */
    bool drop;     /* reasoning before the last query goes */
    ptrdiff_t last_query;
    const md_chat_options *options;
} conversation;

static const char *string_or_empty(const json_t *object, const char *key)
{
    const char *text = json_string_value(json_object_get(object, key));
    return text != NULL ? text : "";
}

/* User messages and tool results that follow one another are one user turn; a text does not join a turn with
 * a task. */
static void merge_messages(conversation *talk, const json_t *messages)
{
    size_t i, n_blocks = 0;
    json_t *message;
    json_array_foreach(messages, i, message)
    {
        md_role role = md_message_role(message);
        turn *last = talk->n_turns > 0 ? &talk->turns[talk->n_turns - 1] : NULL;
        bool block_of_user = role == MD_ROLE_USER || role == MD_ROLE_TOOL;
        bool joins = block_of_user && last != NULL && last->role == MD_ROLE_USER &&
                     (role == MD_ROLE_TOOL || last->task == NULL);
        if (!joins) {
            bool has_task = role == MD_ROLE_USER || role == MD_ROLE_DEVELOPER;
            last = &talk->turns[talk->n_turns++];
            *last = (turn){.role = block_of_user ? MD_ROLE_USER : role,
                           .message = message,
                           .blocks = talk->blocks + n_blocks,
                           .task = has_task ? json_string_value(json_object_get(message, "task")) : NULL};
        }
        if (block_of_user) {
            talk->blocks[n_blocks++] = (block){.message = message};
            last->n_blocks++;
        }
    }
}

/* Call id -> place among the calls of one assistant message. */
static json_t *index_calls(const json_t *tool_calls)
{
    json_t *places = json_object();
    size_t i;
    json_t *call;
    json_array_foreach(tool_calls, i, call)
    {
        const char *id = string_or_empty(call, "id");
        if (id[0] == 0) {
            id = string_or_empty(json_object_get(call, "function"), "id");
        }
        if (id[0] != 0) {
            json_object_set_new(places, id, json_integer((json_int_t)i));
        }
    }
    return places;
}

static int compare_blocks(const void *a, const void *b)
{
    const block *left = a, *right = b;
    if (left->order != right->order) {
        return left->order < right->order ? -1 : 1;
    }
    return (left->index > right->index) - (left->index < right->index);
}

/* Tool results take the order of the calls; texts keep their places among them. results: room for all blocks.
 */
static void sort_results(turn *user, const json_t *places, block *results)
{
    size_t n_results = 0;
    for (size_t i = 0; i < user->n_blocks; i++) {
        const json_t *message = user->blocks[i].message;
        if (md_message_role(message) == MD_ROLE_TOOL) {
            const json_t *place = json_object_get(places, string_or_empty(message, "tool_call_id"));
            results[n_results] =
                (block){.message = message, .order = (size_t)json_integer_value(place), .index = n_results};
            n_results++;
        }
    }
    if (n_results < 2) {
        return;
    }
    qsort(results, n_results, sizeof(block), compare_blocks);
    for (size_t i = 0, next = 0; i < user->n_blocks; i++) {
        if (md_message_role(user->blocks[i].message) == MD_ROLE_TOOL) {
            user->blocks[i] = results[next++];
        }
    }
}

static void sort_all_results(conversation *talk, size_t n_messages)
{
    block *results = cm_alloc(sizeof(block) * n_messages);
    json_t *places = NULL;
    for (size_t i = 0; i < talk->n_turns; i++) {
        turn *at = &talk->turns[i];
        const json_t *calls = json_object_get(at->message, "tool_calls");
        if (at->role == MD_ROLE_ASSISTANT && json_array_size(calls) > 0) {
            json_decref(places);
            places = index_calls(calls);
        } else if (at->role == MD_ROLE_USER && places != NULL) {
            sort_results(at, places, results);
        }
    }
    json_decref(places);
    cm_free(results);
}

static bool is_query(const turn *at)
{
    return at->role == MD_ROLE_USER || at->role == MD_ROLE_DEVELOPER;
}

static void find_last_query(conversation *talk)
{
    talk->last_query = -1;
    for (size_t i = 0; i < talk->n_turns; i++) {
        talk->last_query = is_query(&talk->turns[i]) ? (ptrdiff_t)i : talk->last_query;
    }
}

/* Where reasoning is dropped, developer turns before the last query go too. */
static void drop_old_turns(conversation *talk)
{
    for (size_t i = 0; i < talk->n_turns; i++) {
        talk->drop &= json_array_size(json_object_get(talk->turns[i].message, "tools")) == 0;
    }
    find_last_query(talk);
    if (talk->drop && talk->options->thinking) {
        size_t kept = 0;
        for (size_t i = 0; i < talk->n_turns; i++) {
            if (talk->turns[i].role != MD_ROLE_DEVELOPER || (ptrdiff_t)i >= talk->last_query) {
                talk->turns[kept++] = talk->turns[i];
            }
        }
        talk->n_turns = kept;
        find_last_query(talk);
    }
}

/* ---- rendering (4.2) ---- */

static void write_system(md_prompt *prompt, const json_t *message)
{
    md_content_write(prompt, json_object_get(message, "content"));
    const json_t *tools = json_object_get(message, "tools");
    const json_t *schema = json_object_get(message, "response_format");
    if (json_array_size(tools) > 0) {
        md_prompt_template(prompt, "\n\n");
        md_tools_write(prompt, tools);
    }
    if (schema != NULL && !json_is_null(schema)) {
        md_prompt_template(prompt, "\n\n");
        md_response_format_write(prompt, schema);
    }
}

static void write_user(md_prompt *prompt, const turn *user)
{
    for (size_t i = 0; i < user->n_blocks; i++) {
        const json_t *message = user->blocks[i].message;
        bool result = md_message_role(message) == MD_ROLE_TOOL;
        md_prompt_template(prompt, i > 0 ? "\n\n" : "");
        md_prompt_template(prompt, result ? "<tool_result>" : "");
        md_content_write(prompt, json_object_get(message, "content"));
        md_prompt_template(prompt, result ? "</tool_result>" : "");
    }
}

static void write_assistant(md_prompt *prompt, const conversation *talk, size_t i)
{
    const json_t *message = talk->turns[i].message;
    bool after_task = i > 0 && talk->turns[i - 1].task != NULL;
    if (talk->options->thinking && !after_task && (!talk->drop || (ptrdiff_t)i > talk->last_query)) {
        md_content_write(prompt, json_object_get(message, "reasoning_content"));
        md_prompt_control(prompt, MD_CTL_THINK_END);
    }
    md_content_write(prompt, json_object_get(message, "content"));
    md_tool_calls_write(prompt, json_object_get(message, "tool_calls"));
    if (!json_is_true(json_object_get(message, "wo_eos"))) {
        md_prompt_control(prompt, MD_CTL_EOS);
    }
}

static void write_turn(md_prompt *prompt, const conversation *talk, size_t i)
{
    const turn *at = &talk->turns[i];
    switch (at->role) {
    case MD_ROLE_DEVELOPER:
        md_prompt_control(prompt, MD_CTL_USER);
        write_system(prompt, at->message);
        break;
    case MD_ROLE_USER:
        md_prompt_control(prompt, MD_CTL_USER);
        write_user(prompt, at);
        break;
    case MD_ROLE_REMINDER:
        md_prompt_control(prompt, MD_CTL_REMINDER);
        md_content_write(prompt, json_object_get(at->message, "content"));
        break;
    case MD_ROLE_ASSISTANT:
        write_assistant(prompt, talk, i);
        break;
    default:
        write_system(prompt, at->message);
        break;
    }
}

/* What opens the assistant's turn after turn i. */
static void write_transition(md_prompt *prompt, const conversation *talk, size_t i)
{
    const turn *at = &talk->turns[i];
    if (i + 1 < talk->n_turns) {
        md_role next = talk->turns[i + 1].role;
        if (next != MD_ROLE_ASSISTANT && next != MD_ROLE_REMINDER) {
            return;
        }
    }
    bool thinking = talk->options->thinking;
    md_control task = at->task != NULL ? md_task_control(at->task) : MD_CTL_COUNT;
    if (task == MD_CTL_ACTION) {
        md_prompt_control(prompt, MD_CTL_ASSISTANT);
        md_prompt_control(prompt, thinking ? MD_CTL_THINK : MD_CTL_THINK_END);
        md_prompt_control(prompt, MD_CTL_ACTION);
    } else if (task != MD_CTL_COUNT) {
        md_prompt_control(prompt, task);
    } else if (is_query(at)) {
        bool think = thinking && (!talk->drop || (ptrdiff_t)i >= talk->last_query);
        md_prompt_control(prompt, MD_CTL_ASSISTANT);
        md_prompt_control(prompt, think ? MD_CTL_THINK : MD_CTL_THINK_END);
    }
}

cm_status md_chat_encode(const md_tokenizer *tokenizer, const json_t *messages,
                         const md_chat_options *options, md_ids *ids_out, cm_bytes *text_out, cm_error *err)
{
    CM_TRY(md_messages_check(messages, false, err));
    size_t n_messages = json_array_size(messages);
    conversation talk = {.options = options, .drop = options->drop_thinking};
    talk.turns = cm_alloc(sizeof(turn) * n_messages);
    talk.blocks = cm_alloc(sizeof(block) * n_messages);
    merge_messages(&talk, messages);
    sort_all_results(&talk, n_messages);
    drop_old_turns(&talk);

    md_prompt prompt;
    md_prompt_init(&prompt, tokenizer, options->reference, ids_out);
    md_prompt_control(&prompt, MD_CTL_BOS);
    md_prompt_template(&prompt, effort_prefix(options));
    for (size_t i = 0; i < talk.n_turns; i++) {
        write_turn(&prompt, &talk, i);
        write_transition(&prompt, &talk, i);
    }
    md_prompt_finish(&prompt, text_out);
    md_prompt_fini(&prompt);
    cm_free(talk.blocks);
    cm_free(talk.turns);
    return CM_OK;
}

/* ---- prompts without messages (9) ---- */

void md_fim_encode(const md_tokenizer *tokenizer, const char *prefix, size_t n_prefix, const char *suffix,
                   size_t n_suffix, md_ids *ids_out, cm_bytes *text_out)
{
    md_prompt prompt;
    md_prompt_init(&prompt, tokenizer, false, ids_out);
    md_prompt_control(&prompt, MD_CTL_BOS);
    md_prompt_control(&prompt, MD_CTL_FIM_BEGIN);
    md_prompt_text(&prompt, prefix, n_prefix);
    md_prompt_control(&prompt, MD_CTL_FIM_HOLE);
    md_prompt_text(&prompt, suffix, n_suffix);
    md_prompt_control(&prompt, MD_CTL_FIM_END);
    md_prompt_finish(&prompt, text_out);
    md_prompt_fini(&prompt);
}

void md_raw_encode(const md_tokenizer *tokenizer, const char *text, size_t n_bytes, md_ids *ids_out)
{
    const char *bos = md_control_text(MD_CTL_BOS);
    size_t n_bos = strlen(bos);
    if (n_bytes < n_bos || memcmp(text, bos, n_bos) != 0) {
        md_ids_push(ids_out, md_tokenizer_control(tokenizer, MD_CTL_BOS));
    }
    md_tokenizer_encode(tokenizer, text, n_bytes, MD_TEXT_CONTROL, ids_out);
}
