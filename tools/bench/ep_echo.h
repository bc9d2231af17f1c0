/* A CPU device whose experts are an echo: y[out] is the row's codes, twice. Everything else of it is the CPU
 * device's. */
#pragma once
#include "kernels/kn.h"

CM_MUST_CHECK cm_status ep_echo_open(uint32_t d, kn_device **device_out, cm_error *err);
