/* What a scheduler can take: ids of the vocabulary, a sampler of numbers, not more tokens than fit. Pure;
 * used by rt_sched_open. Thread: any. */
#pragma once
#include "router/sched/sched_core.h"

/* CM_E_INVALID (err names the field), CM_E_TOO_LONG: as rt_sched_open says. */
CM_MUST_CHECK cm_status rt_request_check(const rt_sched_limits *limits, const rt_seq_request *request,
                                         cm_error *err);
