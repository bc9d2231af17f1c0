/* Ids and names of everything that travels on net links; from messages.def. Thread: any. */
#pragma once
#include <stdint.h>

typedef enum pr_message {
#define PR_MESSAGE(id, name, type, direction, handler) PR_MSG_##name = (id),
#define PR_FRAME(id, name, type, direction, handler)   PR_MSG_##name = (id),
#include "proto/messages.def"
#undef PR_MESSAGE
#undef PR_FRAME
} pr_message;

const char *pr_message_name(uint16_t id); /* "DISPATCH"; "unknown" */

/* "worker"; "none". Also what a certificate of the role says. role: Role of the control messages. */
const char *pr_role_name(uint32_t role);

enum { PR_CONTROL_VERSION = 1 };
enum { PR_PAGE_TOKENS = 128 };          /* routers keep computed prompts in pages of so many tokens */
enum { PR_RESUME_BYTES_MAX = 4 << 20 }; /* of SeqOpen.resume; a longer request is opened without */
