/* Parts of the chat encoding that chat.c, chat_tools.c, chat_check.c and chat_request.c share. Thread: any.
 */
#pragma once
#include <jansson.h>

#include "common/model/chat.h"
#include "common/model/prompt_private.h"

typedef enum md_role {
    MD_ROLE_SYSTEM,
    MD_ROLE_USER,
    MD_ROLE_DEVELOPER,
    MD_ROLE_ASSISTANT,
    MD_ROLE_TOOL,
    MD_ROLE_REMINDER,
    MD_ROLE_COUNT
} md_role;

/* MD_ROLE_COUNT when the message has no role we know. */
md_role md_message_role(const json_t *message);
/* The token of a task; MD_CTL_COUNT for an unknown one. */
md_control md_task_control(const char *task);

/* Roles, types and values of all messages, so that nobody after it has to doubt them. request: messages of an
 * API request, where a developer is another name of the system. CM_E_INVALID with err->field like
 * "messages[2].content". */
CM_MUST_CHECK cm_status md_messages_check(const json_t *messages, bool request, cm_error *err);

/* A string, or the texts of its parts joined with "\n\n"; nothing for null. A part that is no text becomes
 * "[Unsupported TYPE]". */
void md_content_write(md_prompt *prompt, const json_t *content);

void md_tools_write(md_prompt *prompt, const json_t *tools);            /* section 6.1 */
void md_tool_calls_write(md_prompt *prompt, const json_t *tool_calls);  /* section 6.2 */
void md_response_format_write(md_prompt *prompt, const json_t *schema); /* section 7 */
