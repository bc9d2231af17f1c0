/* Placement: even, stable, within capacity; and the message that carries it. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "common/base/mem.h"
#include "common/base/rng.h"
#include "proto/pack.h"
#include "proto/placement.h"

enum { LAYERS = 5, EXPERTS = 16, PAIRS = LAYERS * EXPERTS, RANKS_MAX = 24 };

static uint64_t g_seed;
static const uint64_t roomy[RANKS_MAX] = {PAIRS, PAIRS, PAIRS, PAIRS, PAIRS, PAIRS, PAIRS, PAIRS,
                                          PAIRS, PAIRS, PAIRS, PAIRS, PAIRS, PAIRS, PAIRS, PAIRS,
                                          PAIRS, PAIRS, PAIRS, PAIRS, PAIRS, PAIRS, PAIRS, PAIRS};

static pr_placement *plan(const uint32_t *members, uint32_t n, const uint64_t *capacity,
                          const pr_placement *before)
{
    pr_placement *p = NULL;
    cm_error err = {0};
    assert_int_equal(pr_placement_plan(LAYERS, EXPERTS, members, n, capacity, before, &p, &err), CM_OK);
    assert_int_equal(p->n_rank, n);
    assert_memory_equal(p->rank_member, members, sizeof(uint32_t) * n);
    for (uint32_t l = 0; l < LAYERS; l++) {
        for (uint32_t e = 0; e < EXPERTS; e++) {
            uint32_t n_owner;
            const uint16_t *owners = pr_placement_owners(p, l, e, &n_owner);
            assert_int_equal(n_owner, 1);
            assert_true(owners[0] < n);
            assert_true(pr_placement_owns(p, l, e, owners[0]));
        }
    }
    uint32_t sum = 0;
    for (uint32_t r = 0; r < n; r++) {
        uint32_t count = pr_placement_count(p, r);
        assert_true(count <= capacity[r]);
        sum += count;
    }
    assert_int_equal(sum, PAIRS);
    return p;
}

static uint32_t owner_member(const pr_placement *p, uint32_t pair)
{
    return p->rank_member[p->owner[p->first[pair]]];
}

static uint32_t moved(const pr_placement *before, const pr_placement *after)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < PAIRS; i++) {
        n += owner_member(before, i) != owner_member(after, i);
    }
    return n;
}

static uint32_t layer_count(const pr_placement *p, uint32_t layer, uint32_t member)
{
    uint32_t n = 0;
    for (uint32_t e = 0; e < EXPERTS; e++) {
        n += owner_member(p, layer * EXPERTS + e) == member;
    }
    return n;
}

static void even_over_ranks_and_layers(void **state)
{
    (void)state;
    for (uint32_t n = 1; n <= RANKS_MAX; n++) {
        uint32_t members[RANKS_MAX], low = PAIRS, high = 0;
        for (uint32_t r = 0; r < n; r++) {
            members[r] = 10 + 3 * r;
        }
        pr_placement *p = plan(members, n, roomy, NULL);
        for (uint32_t r = 0; r < n; r++) {
            uint32_t count = pr_placement_count(p, r);
            low = count < low ? count : low;
            high = count > high ? count : high;
            for (uint32_t l = 0; l < LAYERS; l++) { /* a step's work is per layer */
                uint32_t in_layer = layer_count(p, l, members[r]);
                assert_true(in_layer == EXPERTS / n || in_layer == EXPERTS / n + 1);
            }
            assert_int_equal(pr_placement_rank_of(p, members[r]), r);
        }
        assert_true(high - low <= 1);
        assert_int_equal(pr_placement_rank_of(p, 9), n);
        pr_placement_free(p);
    }
}

static void capacity_is_kept(void **state)
{
    (void)state;
    const uint32_t members[] = {1, 2, 3};
    const uint64_t tight[] = {7, 50, 23}, small[] = {7, 50, 22}, none[] = {0, PAIRS, 0};
    pr_placement *p = plan(members, 3, tight, NULL);
    assert_int_equal(pr_placement_count(p, 0), 7);
    assert_int_equal(pr_placement_count(p, 1), 50);
    pr_placement_free(p);
    p = plan(members, 3, none, NULL);
    assert_int_equal(pr_placement_count(p, 1), PAIRS);
    pr_placement_free(p);

    cm_error err = {0};
    p = NULL;
    assert_int_equal(pr_placement_plan(LAYERS, EXPERTS, members, 3, small, NULL, &p, &err), CM_E_CAPACITY);
    assert_null(p);
    assert_non_null(strstr(err.text, "79"));
    assert_non_null(strstr(err.text, "80"));
    assert_int_equal(pr_placement_plan(LAYERS, EXPERTS, members, 0, small, NULL, &p, &err), CM_E_CAPACITY);
}

static void same_ranks_move_nothing(void **state)
{
    (void)state;
    const uint32_t members[] = {4, 5, 9};
    pr_placement *before = plan(members, 3, roomy, NULL);
    pr_placement *after = plan(members, 3, roomy, before);
    assert_int_equal(moved(before, after), 0);
    pr_placement_free(before);
    pr_placement_free(after);
}

static void only_what_must_moves(void **state)
{
    (void)state;
    for (uint32_t n = 1; n < 12; n++) {
        uint32_t members[RANKS_MAX];
        for (uint32_t r = 0; r <= n; r++) {
            members[r] = r + 1;
        }
        pr_placement *before = plan(members, n, roomy, NULL);

        /* a worker joins: it gets its share; a layer's remainder may turn on besides, one expert per layer
         * and rank */
        pr_placement *joined = plan(members, n + 1, roomy, before);
        uint32_t gained = 0;
        for (uint32_t r = 0; r <= n; r++) {
            for (uint32_t l = 0; l < LAYERS; l++) {
                uint32_t had = layer_count(before, l, members[r]), has = layer_count(joined, l, members[r]);
                gained += has > had ? has - had : 0;
                assert_true(r == n || has <= had + 1);
            }
        }
        assert_int_equal(moved(before, joined),
                         gained); /* nothing changes hands between two that keep their number */
        assert_true(gained >= pr_placement_count(joined, n));

        /* and leaves again: its experts move, and no more than the turning remainder besides */
        pr_placement *left = plan(members, n, roomy, joined);
        gained = 0;
        for (uint32_t r = 0; r < n; r++) {
            for (uint32_t l = 0; l < LAYERS; l++) {
                uint32_t had = layer_count(joined, l, members[r]), has = layer_count(left, l, members[r]);
                gained += has > had ? has - had : 0;
            }
        }
        assert_int_equal(moved(joined, left), gained);
        pr_placement_free(before);
        pr_placement_free(joined);
        pr_placement_free(left);
    }
}

/* Skewed counts and second copies, as rebalancing leaves them, on four ranks. */
static pr_placement *skewed(const uint32_t *members)
{
    uint16_t owners[PAIRS][2];
    uint8_t n_owner[PAIRS];
    for (uint32_t i = 0; i < PAIRS; i++) {
        uint32_t e = i % EXPERTS;
        owners[i][0] = e == 0 ? 0 : (uint16_t)(1 + e % 3); /* rank 0 has one hot expert a layer */
        owners[i][1] = (uint16_t)((owners[i][0] + 1) % 4);
        n_owner[i] = e < 2 ? 2 : 1;
    }
    return pr_placement_build(LAYERS, EXPERTS, members, 4, owners[0], n_owner, 2);
}

static bool member_owns(const pr_placement *p, uint32_t pair, uint32_t member)
{
    uint32_t rank = pr_placement_rank_of(p, member);
    return rank < p->n_rank && pr_placement_owns(p, pair / EXPERTS, pair % EXPERTS, rank);
}

/* Who goes leaves gaps; all else stays, copies and skew with it. */
static void a_death_moves_only_orphans(void **state)
{
    (void)state;
    const uint32_t members[] = {3, 5, 8, 9};
    for (uint32_t gone = 0; gone < 4; gone++) {
        uint32_t left[3], n = 0;
        for (uint32_t r = 0; r < 4; r++) {
            if (r != gone) {
                left[n++] = members[r];
            }
        }
        pr_placement *before = skewed(members), *after = NULL;
        assert_int_equal(pr_placement_plan(LAYERS, EXPERTS, left, 3, roomy, before, &after, NULL), CM_OK);
        for (uint32_t i = 0; i < PAIRS; i++) {
            uint32_t had = 0, has = after->first[i + 1] - after->first[i];
            for (uint32_t k = 0; k < 3; k++) {
                if (member_owns(before, i, left[k])) {
                    assert_true(member_owns(after, i, left[k]));
                    had++;
                }
            }
            assert_int_equal(has, had > 0 ? had : 1);
        }
        pr_placement_free(before);
        pr_placement_free(after);
    }
}

/* Where memory is short second copies give way, and where it is shorter still everything is spread anew. */
static void copies_give_way_to_orphans(void **state)
{
    (void)state;
    const uint32_t members[] = {3, 5, 8, 9}, left[] = {5, 8, 9};
    pr_placement *before = skewed(members), *after = NULL;
    uint64_t capacity[3] = {0}, sum = 0;
    for (uint32_t r = 0; r < 3; r++) {
        capacity[r] = pr_placement_count(before, r + 1);
        sum += capacity[r];
    }
    assert_true(sum > PAIRS); /* with their copies they are full */
    assert_int_equal(pr_placement_plan(LAYERS, EXPERTS, left, 3, capacity, before, &after, NULL), CM_OK);
    for (uint32_t i = 0; i < PAIRS; i++) {
        assert_true(after->first[i + 1] > after->first[i]);
    }
    for (uint32_t r = 0; r < 3; r++) {
        assert_true(pr_placement_count(after, r) <= capacity[r]);
    }
    pr_placement_free(after);
    pr_placement_free(before);
}

/* A newcomer makes the counts even; a copy that is there and has room stays one. */
static void copies_outlive_a_join(void **state)
{
    (void)state;
    const uint32_t members[] = {3, 5, 8, 9}, joined[] = {3, 5, 8, 9, 12};
    pr_placement *before = skewed(members), *after = NULL;
    assert_int_equal(pr_placement_plan(LAYERS, EXPERTS, joined, 5, roomy, before, &after, NULL), CM_OK);
    uint32_t n_copies = 0;
    for (uint32_t i = 0; i < PAIRS; i++) {
        uint32_t n;
        const uint16_t *owners = pr_placement_owners(after, i / EXPERTS, i % EXPERTS, &n);
        for (uint32_t k = 1; k < n; k++) {
            assert_true(member_owns(before, i, after->rank_member[owners[k]]));
            n_copies++;
        }
    }
    assert_true(n_copies >= LAYERS * 2 / 2 && pr_placement_count(after, 4) == LAYERS * (EXPERTS / 5) + 1);
    pr_placement_free(after);
    pr_placement_free(before);
}

/* Each rank knows beforehand exactly what the plan without another rank will give it. */
static void heirs_are_who_takes_over(void **state)
{
    (void)state;
    const uint32_t members[] = {3, 5, 8, 9};
    uint64_t tight[4];
    pr_placement *places[] = {plan(members, 4, roomy, NULL), skewed(members)};
    for (uint32_t k = 0; k < 4; k++) {
        const pr_placement *p = places[k % 2];
        for (uint32_t r = 0; r < 4; r++) {
            tight[r] = pr_placement_count(p, r) + (r == 1 ? 2 : 12);
        }
        const uint64_t *capacity = k < 2 ? roomy : tight;
        uint8_t takes[4][PAIRS];
        uint32_t n_gains[4] = {0}, n_takes[4] = {0};
        for (uint32_t r = 0; r < 4; r++) {
            pr_placement_heirs(p, capacity, r, takes[r]);
        }
        for (uint32_t gone = 0; gone < 4; gone++) {
            uint32_t left[3], n = 0;
            uint64_t room[3];
            for (uint32_t r = 0; r < 4; r++) {
                if (r != gone) {
                    room[n] = capacity[r];
                    left[n++] = members[r];
                }
            }
            pr_placement *after = NULL;
            assert_int_equal(pr_placement_plan(LAYERS, EXPERTS, left, 3, room, p, &after, NULL), CM_OK);
            for (uint32_t i = 0; i < PAIRS; i++) {
                for (uint32_t r = 0; r < 4; r++) {
                    if (r != gone && member_owns(after, i, members[r]) && !member_owns(p, i, members[r])) {
                        assert_int_equal(takes[r][i], 1);
                        n_gains[r]++;
                    }
                }
            }
            pr_placement_free(after);
        }
        for (uint32_t r = 0; r < 4; r++) {
            for (uint32_t i = 0; i < PAIRS; i++) {
                n_takes[r] += takes[r][i];
                assert_true(takes[r][i] == 0 || !member_owns(p, i, members[r]));
            }
            assert_true(n_takes[r] <= n_gains[r] && (n_gains[r] == 0) == (n_takes[r] == 0));
        }
    }
    pr_placement_free(places[0]);
    pr_placement_free(places[1]);
    /* who is alone, or whose loss the others cannot bear, has no heirs */
    uint8_t takes[PAIRS];
    const uint64_t full[2] = {PAIRS / 2, PAIRS / 2};
    pr_placement *two = plan(members, 2, full, NULL), *one = plan(members, 1, roomy, NULL);
    for (uint32_t k = 0; k < 2; k++) {
        memset(takes, 7, sizeof(takes));
        pr_placement_heirs(k == 0 ? two : one, k == 0 ? full : roomy, 0, takes);
        for (uint32_t i = 0; i < PAIRS; i++) {
            assert_int_equal(takes[i], 0);
        }
    }
    pr_placement_free(two);
    pr_placement_free(one);
}

static void random_changes(void **state)
{
    (void)state;
    uint64_t at = 0;
    pr_placement *before = NULL;
    for (uint32_t round = 0; round < 500; round++) {
        uint32_t members[RANKS_MAX], n = 0;
        uint64_t capacity[RANKS_MAX], sum = 0;
        for (uint32_t id = 1; id <= RANKS_MAX; id++) {
            if (cm_rng_at(g_seed, at++, 0).word[0] % 3 == 0) {
                capacity[n] = cm_rng_at(g_seed, at++, 0).word[0] % 30;
                sum += capacity[n];
                members[n++] = id;
            }
        }
        if (sum < PAIRS) {
            pr_placement *p = NULL;
            assert_int_equal(pr_placement_plan(LAYERS, EXPERTS, members, n, capacity, before, &p, NULL),
                             CM_E_CAPACITY);
            continue;
        }
        pr_placement *p = plan(members, n, capacity, before);
        pr_placement_free(before);
        before = p;
    }
    assert_non_null(before);
    pr_placement_free(before);
}

/* ---- the message ---- */

/* While an epoch changes a worker has what it had and what it gets: together not more than it can hold. */
static void both_epochs_fit(void **state)
{
    (void)state;
    uint32_t n_loads = 0;
    for (uint32_t round = 0; round < 2000; round++) {
        uint32_t members[] = {1, 2, 3, 4, 5};
        uint64_t capacity[5], sum = 0;
        for (uint32_t r = 0; r < 5; r++) { /* unequal, and nearly full without the fifth */
            capacity[r] = PAIRS / 6 + cm_rng_at(g_seed, round, r).word[0] % (PAIRS / 4);
            sum += r < 4 ? capacity[r] : 0;
        }
        if (sum < PAIRS) {
            continue;
        }
        pr_placement *before = plan(members, 4, capacity, NULL);
        pr_placement *after = plan(members, 5, capacity, before);
        for (uint32_t r = 0; r < 4; r++) {
            uint32_t n = pr_placement_count(before, r);
            for (uint32_t i = 0; i < PAIRS; i++) {
                bool loads = pr_placement_owns(after, i / EXPERTS, i % EXPERTS, r) &&
                             !pr_placement_owns(before, i / EXPERTS, i % EXPERTS, r);
                n += loads;
                n_loads += loads;
            }
            assert_true(n <= capacity[r]);
        }
        pr_placement_free(before);
        pr_placement_free(after);
    }
    printf("  %u experts went to workers that had others\n", n_loads);
}

static void message_round_trip(void **state)
{
    (void)state;
    const uint32_t members[] = {7, 8, 300};
    pr_placement *p = plan(members, 3, roomy, NULL), *clone = pr_placement_clone(p), *back = NULL;
    Baleen__Control__V1__Placement message, *read = NULL;
    cm_bytes packed;
    cm_arena arena;
    pr_placement_pack(p, &message);
    cm_bytes_init(&packed, 0);
    pr_pack(&message.base, &packed);
    cm_arena_init(&arena, "test", 1 << 12, 1 << 20);
    assert_int_equal(pr_unpack(&baleen__control__v1__placement__descriptor, packed.data, packed.len, &arena,
                               (ProtobufCMessage **)&read),
                     CM_OK);
    assert_int_equal(pr_placement_unpack(read, &back, NULL), CM_OK);
    pr_placement_message_free(&message);
    pr_placement_free(p);
    assert_int_equal(back->n_layer, LAYERS);
    assert_int_equal(back->n_expert, EXPERTS);
    assert_int_equal(back->n_rank, 3);
    assert_memory_equal(back->rank_member, members, sizeof(members));
    assert_memory_equal(back->first, clone->first, sizeof(uint32_t) * (PAIRS + 1));
    assert_memory_equal(back->owner, clone->owner, sizeof(uint16_t) * PAIRS);
    pr_placement_free(back);
    pr_placement_free(clone);
    cm_bytes_fini(&packed);
    cm_arena_fini(&arena);
}

/* Of a model without experts: the one placement without pairs and ranks. */
static void nothing_round_trips(void **state)
{
    (void)state;
    pr_placement *p = pr_placement_none(), *clone = pr_placement_clone(p), *back = NULL;
    Baleen__Control__V1__Placement message;
    pr_placement_pack(clone, &message);
    message.rank_member = NULL; /* as it comes from the wire */
    assert_int_equal(pr_placement_unpack(&message, &back, NULL), CM_OK);
    assert_int_equal(back->n_layer + back->n_expert + back->n_rank + back->first[0], 0);
    pr_placement_free(back);
    message.n_expert = 1;
    assert_int_equal(pr_placement_unpack(&message, &back, NULL), CM_E_PROTOCOL);
    pr_placement_message_free(&message);
    pr_placement_free(clone);
    pr_placement_free(p);
}

/* One good message of 1 layer, 2 experts, 2 ranks; the second expert with two owners. Each case breaks one
 * thing. */
static void malformed_messages_are_refused(void **state)
{
    (void)state;
    for (uint32_t i = 0; i < 14; i++) {
        uint32_t rank_member[2] = {5, 6}, first[3] = {0, 1, 3}, owner[3] = {1, 0, 1};
        Baleen__Control__V1__Placement message = BALEEN__CONTROL__V1__PLACEMENT__INIT;
        message.n_layer = 1;
        message.n_expert = 2;
        message.rank_member = rank_member;
        message.n_rank_member = 2;
        message.first = first;
        message.n_first = 3;
        message.owner = owner;
        message.n_owner = 3;
        switch (i) {
        case 0:
            break; /* good */
        case 1:
            message.n_layer = 0;
            break;
        case 2:
            message.n_expert = 3;
            break;
        case 3:
            message.n_layer = message.n_expert = UINT32_MAX; /* no overflow */
            break;
        case 4:
            message.n_first = 2;
            break;
        case 5:
            message.n_first = 0;
            break;
        case 6:
            first[0] = 1;
            break;
        case 7:
            first[1] = 4; /* goes down after it */
            break;
        case 8:
            first[2] = 2; /* does not cover all owners */
            break;
        case 9:
            first[2] = 4;
            break;
        case 10:
            owner[2] = 2; /* no such rank */
            break;
        case 11:
            owner[1] = 65536; /* would be 0 in 16 bits */
            break;
        case 12:
            message.n_rank_member = 0;
            break;
        case 13:
            message.n_rank_member = PR_RANK_MAX + 1;
            break;
        }
        pr_placement *p = NULL;
        cm_error err = {0};
        cm_status status = pr_placement_unpack(&message, &p, &err);
        if (status != (i == 0 ? CM_OK : CM_E_PROTOCOL)) {
            fail_msg("case %u: %s", i, cm_status_name(status));
        }
        assert_true(i == 0 || (p == NULL && err.text[0] != 0));
        pr_placement_free(p);
    }
}

int main(int argc, char **argv)
{
    g_seed = argc > 1 ? strtoull(argv[1], NULL, 0) : cm_random_u64();
    printf("seed %llu\n", (unsigned long long)g_seed);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(even_over_ranks_and_layers),
        cmocka_unit_test(capacity_is_kept),
        cmocka_unit_test(same_ranks_move_nothing),
        cmocka_unit_test(only_what_must_moves),
        cmocka_unit_test(a_death_moves_only_orphans),
        cmocka_unit_test(copies_give_way_to_orphans),
        cmocka_unit_test(copies_outlive_a_join),
        cmocka_unit_test(heirs_are_who_takes_over),
        cmocka_unit_test(random_changes),
        cmocka_unit_test(both_epochs_fit),
        cmocka_unit_test(message_round_trip),
        cmocka_unit_test(nothing_round_trips),
        cmocka_unit_test(malformed_messages_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
