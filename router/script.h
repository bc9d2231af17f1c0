/* A model for tests, in place of the engine: what it says is a text that the client sends. Nothing is
 * computed, nothing is asked of workers, no weights are needed; everything else of a router is what it always
 * is (scheduler, pages, deadlines, kept sequences).
 *
 * The script is the text of the last user or tool message, tokenized anew with control spellings recognised,
 * so that malformed output can be had from any surface; then end of sequence. In ids: what lies between the
 * last <User> (none: the beginning, or <fim_begin>) and the next <Assistant>, reminder, task, <fim_hole> or
 * end of sequence (none: the end); of that, what follows the last "</tool_result>" and a blank line, or, when
 * it ends in "</tool_result>", the inside of that result. User messages without an answer between them are
 * one turn of the prompt, and so one script. A raw prompt is its own script.
 *
 * The script is said as it is: while thinking, all of it is reasoning unless it has a "</think>". The token
 * at a position follows from prompt and position alone, whatever the sampler and the drawn tokens before it:
 * a resumed or reopened sequence goes on exactly. Its probability is 1. A stop id that may not be drawn yet
 * is replaced by a blank; behind the script there is end of sequence for ever (ignore_eos). Thread: one at a
 * time. */
#pragma once
#include "common/base/status.h"
#include "router/sched/sched_core.h"

typedef struct rt_script rt_script;

typedef struct rt_script_options {
    const char *dir; /* with config.json and tokenizer.json; borrowed */
    uint32_t row_max, slot_max;
    uint64_t kv_bytes, prefix_bytes; /* pages and kept states are counted as for the model of dir; there is no
                                        memory behind them */
} rt_script_options;

CM_MUST_CHECK cm_status rt_script_create(const rt_script_options *options, rt_script **script_out,
                                         cm_error *err);
void rt_script_destroy(rt_script *script); /* NULL is fine */
/* As rt_engine_sched_limits. */
void rt_script_sched_limits(const rt_script *script, rt_sched_limits *limits_out);
/* As rt_engine_step; never fails. */
CM_MUST_CHECK cm_status rt_script_step(rt_script *script, const rt_step *step, rt_step_result *results_out);
