#include "proto/messages.h"

const char *pr_message_name(uint16_t id)
{
    switch (id) {
#define PR_MESSAGE(number, name, type, direction, handler)                                                   \
    case number:                                                                                             \
        return #name;
#define PR_FRAME(number, name, type, direction, handler)                                                     \
    case number:                                                                                             \
        return #name;
#include "proto/messages.def"
#undef PR_MESSAGE
#undef PR_FRAME
    default:
        return "unknown";
    }
}

const char *pr_role_name(uint32_t role)
{
    static const char *const names[] = {"none", "coordinator", "gateway", "router", "worker"};
    return role < sizeof(names) / sizeof(names[0]) ? names[role] : "none";
}
