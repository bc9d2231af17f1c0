/* The masks of a step: made on a thread of their own while the forward pass runs, since they depend on the
 * tokens before it only. Thread: the engine's. */
#pragma once
#include "router/engine/constraint.h"

typedef struct rt_masks rt_masks;
/* row_max: rows of a step that give tokens. */
rt_masks *rt_masks_create(uint32_t row_max, uint32_t vocab);
void rt_masks_destroy(rt_masks *masks);
/* Sets masks of each seg that has a constraint and gives a token; they are there after rt_masks_wait, and
 * stay until the next begin. step stays as it is until then. Every begin is waited for. */
void rt_masks_begin(rt_masks *masks, const rt_step *step);
void rt_masks_wait(rt_masks *masks);
