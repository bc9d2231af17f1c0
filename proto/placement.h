/* Placement as a value: which ranks own which (layer, expert) in one epoch. A rank is a position in the
 * epoch's list of workers; messages use member ids, arrays use ranks. Immutable once built; shared by
 * pointer, freed by its owner. Thread: any (read-only). */
#pragma once
#include <stdbool.h>
#include <stdint.h>

#include "common/base/status.h"
#include "proto/control.pb-c.h"

enum {
    PR_RANK_MAX = 1024,
    PR_COPIES_MAX = 8, /* owners of one expert in the placements we make; messages may have more */
};

typedef struct pr_placement {
    uint32_t n_layer, n_expert, n_rank;
    uint32_t *rank_member; /* [n_rank] member id */
    uint32_t *first;       /* [n_layer * n_expert + 1] into owner */
    uint16_t *owner;       /* ranks */
} pr_placement;

/* All owners of (layer, expert); *n_out may be 0. */
static inline const uint16_t *pr_placement_owners(const pr_placement *p, uint32_t layer, uint32_t expert,
                                                  uint32_t *n_out)
{
    uint32_t i = layer * p->n_expert + expert;
    *n_out = p->first[i + 1] - p->first[i];
    return p->owner + p->first[i];
}
bool pr_placement_owns(const pr_placement *p, uint32_t layer, uint32_t expert, uint32_t rank);
/* Rank of a member id; n_rank when it is none. */
uint32_t pr_placement_rank_of(const pr_placement *p, uint32_t member_id);
uint32_t pr_placement_count(const pr_placement *p, uint32_t rank); /* (layer, expert) pairs of a rank */

/* Gives every expert an owner. before (may be NULL): the placement in force.
 * When all ranks had their part in before, every copy stays that can, and only experts whose owners are all
 * gone get new ones: in each layer the ranks with the fewest copies take them. So a death moves as little as
 * can be. Else (the first placement, a newcomer) experts are spread evenly: every layer over all ranks, the
 * remainder turning from layer to layer, so that totals differ by at most one per rank as far as capacity
 * lets them; an expert stays with an owner that is still there unless that demands a move, and further copies
 * stay where there is room. Until the epoch before is retired a rank holds what it had and what it gets: both
 * together are kept within its capacity, at the cost of evenness, as long as there is a way (equal ranks that
 * come and go one by one never exceed it). capacity[r]: (layer, expert) pairs rank r can hold. CM_E_CAPACITY
 * when the sum is too small (err says by how much). A pure function: whoever knows its arguments knows who
 * would take over what. */
CM_MUST_CHECK cm_status pr_placement_plan(uint32_t n_layer, uint32_t n_expert, const uint32_t *rank_member,
                                          uint32_t n_rank, const uint64_t *capacity,
                                          const pr_placement *before, pr_placement **placement_out,
                                          cm_error *err);
/* What `rank` would have to load if one other rank went, whichever: takes_out[layer * n_expert + expert] is 1
 * for those, else 0. Other owners of its own experts are no heirs. */
void pr_placement_heirs(const pr_placement *p, const uint64_t *capacity, uint32_t rank, uint8_t *takes_out);
/* From lists of owners: those of pair i (layer * n_expert + expert) are owners[i * stride ..], n_owner[i] of
 * them. */
pr_placement *pr_placement_build(uint32_t n_layer, uint32_t n_expert, const uint32_t *rank_member,
                                 uint32_t n_rank, const uint16_t *owners, const uint8_t *n_owner,
                                 uint32_t stride);
/* Of a model without experts: no layers, no ranks. */
pr_placement *pr_placement_none(void);
pr_placement *pr_placement_clone(const pr_placement *p);
void pr_placement_free(pr_placement *p); /* NULL is fine */

/* To and from the message. unpack checks every number (CM_E_PROTOCOL). The message borrows p's arrays where
 * types allow and owns the rest until pr_placement_message_free. */
void pr_placement_pack(const pr_placement *p, Baleen__Control__V1__Placement *message);
void pr_placement_message_free(Baleen__Control__V1__Placement *message);
CM_MUST_CHECK cm_status pr_placement_unpack(const Baleen__Control__V1__Placement *message,
                                            pr_placement **placement_out, cm_error *err);
