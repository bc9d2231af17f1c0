#include "router/keep_core.h"

#include <string.h>

#include "common/base/assert.h"
#include "common/base/mem.h"

enum { KEEP_OWNER = 1, KEEP_IDS_MIN = 64 }; /* the one owner that the scheduler knows */

struct rt_keep {
    rt_keep_limits limits;
    rt_sched *sched;
    cm_map by_number;            /* of those that run */
    cm_map by_id;                /* hash of an id -> first of the keyed ones with that hash */
    rt_kept_list orphans, ended; /* by time_link */
    uint64_t n_numbers;
    rt_keep_ledger ledger;
};

rt_keep *rt_keep_create(const rt_keep_limits *limits, rt_sched *sched)
{
    rt_keep *keep = cm_alloc(sizeof(*keep));
    keep->limits = *limits;
    keep->sched = sched;
    cm_map_init(&keep->by_number, limits->live_max);
    cm_map_init(&keep->by_id, 2 * limits->live_max + limits->ended_max + 1);
    TAILQ_INIT(&keep->orphans);
    TAILQ_INIT(&keep->ended);
    return keep;
}

void rt_keep_owner_init(const rt_keep *keep, rt_keep_owner *owner)
{
    *owner = (rt_keep_owner){0};
    TAILQ_INIT(&owner->kept);
    TAILQ_INIT(&owner->untold);
    cm_map_init(&owner->by_stream, keep->limits.live_max);
}

/* ---- keys: the map knows a hash of the id, the rest is compared ---- */

static uint64_t id_hash(const uint8_t id[RT_KEEP_ID_BYTES])
{
    uint64_t hash;
    memcpy(&hash, id, sizeof(hash)); /* it is a hash already */
    return hash;
}

static bool key_equal(const rt_keep_key *a, const rt_keep_key *b)
{
    return memcmp(a->id, b->id, RT_KEEP_ID_BYTES) == 0 && a->choice == b->choice && a->birth == b->birth;
}

static rt_kept *keys_first(const rt_keep *keep, const uint8_t id[RT_KEEP_ID_BYTES])
{
    return cm_map_get(&keep->by_id, id_hash(id));
}

static rt_kept *keys_find(const rt_keep *keep, const rt_keep_key *key)
{
    rt_kept *kept = keys_first(keep, key->id);
    while (kept != NULL && !key_equal(&kept->key, key)) {
        kept = kept->same_hash;
    }
    return kept;
}

static void keys_put_first(rt_keep *keep, rt_kept *kept)
{
    cm_status status = cm_map_put(&keep->by_id, id_hash(kept->key.id), kept);
    CM_ASSERT_MSG(status == CM_OK, "%s", cm_status_name(status));
}

/* The newest comes first. false: no room, which takes a link that is told nothing for very long. */
static bool keys_add(rt_keep *keep, rt_kept *kept)
{
    rt_kept *first = cm_map_remove(&keep->by_id, id_hash(kept->key.id));
    if (cm_map_put(&keep->by_id, id_hash(kept->key.id), kept) != CM_OK) {
        return false;
    }
    kept->same_hash = first;
    kept->keyed = true;
    return true;
}

static void keys_remove(rt_keep *keep, rt_kept *kept)
{
    rt_kept *first = keys_first(keep, kept->key.id), *at = first;
    if (first == kept) {
        cm_map_remove(&keep->by_id, id_hash(kept->key.id));
        if (kept->same_hash != NULL) {
            keys_put_first(keep, kept->same_hash);
        }
    } else {
        while (at->same_hash != kept) {
            at = at->same_hash;
        }
        at->same_hash = kept->same_hash;
    }
    kept->same_hash = NULL;
    kept->keyed = false;
}

/* ---- whose it is, and how long ---- */

static void untold_add(rt_kept *kept)
{
    if (kept->owner != NULL && !kept->untold) {
        kept->untold = true;
        TAILQ_INSERT_TAIL(&kept->owner->untold, kept, untold_link);
        kept->owner->n_untold++;
    }
}

static void untold_remove(rt_kept *kept)
{
    if (kept->untold) {
        kept->untold = false;
        TAILQ_REMOVE(&kept->owner->untold, kept, untold_link);
        kept->owner->n_untold--;
    }
}

static void owner_give(rt_kept *kept, rt_keep_owner *owner, uint64_t stream)
{
    kept->owner = owner;
    kept->stream = stream;
    TAILQ_INSERT_TAIL(&owner->kept, kept, owner_link);
}

static void owner_take(rt_kept *kept)
{
    untold_remove(kept);
    TAILQ_REMOVE(&kept->owner->kept, kept, owner_link);
    if (kept->live) {
        cm_map_remove(&kept->owner->by_stream, kept->stream);
    }
    kept->owner = NULL;
}

/* Nobody's and keyed: it waits for its time or its new owner. */
static void time_add(rt_keep *keep, uint64_t now_ms, rt_kept *kept)
{
    CM_ASSERT(kept->owner == NULL && kept->keyed);
    kept->drop_ms = now_ms + keep->limits.grace_ms;
    if (kept->live) {
        TAILQ_INSERT_TAIL(&keep->orphans, kept, time_link);
        keep->ledger.n_orphan++;
    } else {
        TAILQ_INSERT_TAIL(&keep->ended, kept, time_link);
        keep->ledger.n_ended++;
    }
}

static void time_remove(rt_keep *keep, rt_kept *kept)
{
    if (kept->live) {
        TAILQ_REMOVE(&keep->orphans, kept, time_link);
        keep->ledger.n_orphan--;
    } else {
        TAILQ_REMOVE(&keep->ended, kept, time_link);
        keep->ledger.n_ended--;
    }
}

static void kept_count_bytes(rt_keep *keep, rt_kept *kept, uint64_t n_bytes)
{
    keep->ledger.n_bytes += n_bytes;
    kept->bytes += n_bytes;
}

/* It runs no more. */
static void kept_end(rt_keep *keep, rt_kept *kept)
{
    cm_map_remove(&keep->by_number, kept->number);
    if (kept->owner != NULL) {
        cm_map_remove(&kept->owner->by_stream, kept->stream);
    }
    kept->live = false;
    keep->ledger.n_live--;
}

/* From whatever state it is in to nothing. */
static void kept_drop(rt_keep *keep, rt_kept *kept)
{
    if (kept->owner != NULL) {
        owner_take(kept);
    } else if (kept->keyed) {
        time_remove(keep, kept);
    }
    if (kept->live) {
        rt_sched_cancel(keep->sched, (rt_seq_key){KEEP_OWNER, kept->number});
        kept_end(keep, kept);
    }
    if (kept->keyed) {
        keys_remove(keep, kept);
    }
    keep->ledger.n_bytes -= kept->bytes;
    cm_free(kept->ids);
    cm_free(kept->token_logprob);
    cm_free(kept->top);
    cm_free(kept->top_id);
    cm_free(kept->resume);
    cm_free(kept->text);
    cm_free(kept);
}

static bool may_be_resumed(const rt_kept *kept)
{
    return kept->keyed && kept->end != RT_END_FAILED;
}

/* Its owner is gone, or was told all of it. */
static void kept_leave(rt_keep *keep, uint64_t now_ms, rt_kept *kept)
{
    if (!may_be_resumed(kept)) {
        kept_drop(keep, kept);
        return;
    }
    owner_take(kept);
    time_add(keep, now_ms, kept);
}

static bool over_bounds(const rt_keep *keep, uint64_t n_more)
{
    return keep->ledger.n_ended > keep->limits.ended_max ||
           keep->ledger.n_bytes + n_more > keep->limits.bytes_max;
}

/* Room for n_more bytes, if the oldest ended ones can make it. */
static bool make_room(rt_keep *keep, uint64_t n_more)
{
    while (over_bounds(keep, n_more) && !TAILQ_EMPTY(&keep->ended)) {
        kept_drop(keep, TAILQ_FIRST(&keep->ended));
    }
    return !over_bounds(keep, n_more);
}

void rt_keep_owner_lost(rt_keep *keep, uint64_t now_ms, rt_keep_owner *owner)
{
    while (!TAILQ_EMPTY(&owner->kept)) {
        kept_leave(keep, now_ms, TAILQ_FIRST(&owner->kept));
    }
    (void)make_room(keep, 0);
    cm_map_fini(&owner->by_stream);
}

void rt_keep_destroy(rt_keep *keep)
{
    while (!TAILQ_EMPTY(&keep->orphans)) {
        kept_drop(keep, TAILQ_FIRST(&keep->orphans));
    }
    while (!TAILQ_EMPTY(&keep->ended)) {
        kept_drop(keep, TAILQ_FIRST(&keep->ended));
    }
    CM_ASSERT(keep->ledger.n_live == 0 && keep->ledger.n_bytes == 0);
    cm_map_fini(&keep->by_number);
    cm_map_fini(&keep->by_id);
    cm_free(keep);
}

/* ---- logs ---- */

static void log_grow(rt_keep *keep, rt_kept *kept)
{
    uint32_t cap = kept->cap > 0 ? 2 * kept->cap : KEEP_IDS_MIN;
    size_t n_token = sizeof(uint32_t), n_top = kept->n_top;
    kept->ids = cm_realloc(kept->ids, sizeof(uint32_t) * cap);
    if (kept->logprobs) {
        kept->token_logprob = cm_realloc(kept->token_logprob, sizeof(float) * cap);
        kept->top = cm_realloc(kept->top, sizeof(float) * cap * n_top);
        kept->top_id = cm_realloc(kept->top_id, sizeof(uint32_t) * cap * n_top);
        n_token += sizeof(float) + (sizeof(float) + sizeof(uint32_t)) * n_top;
    }
    kept_count_bytes(keep, kept, (cap - kept->cap) * n_token);
    kept->cap = cap;
}

/* logprobs: NULL when it has none. */
static void log_push(rt_keep *keep, rt_kept *kept, uint32_t id, const rt_logprobs *logprobs)
{
    if (kept->n_id == kept->cap) {
        log_grow(keep, kept);
    }
    if (logprobs != NULL) {
        size_t at = (size_t)kept->n_id * kept->n_top;
        CM_ASSERT_MSG(kept->logprobs && logprobs->n_top <= kept->n_top, "%u likely tokens", logprobs->n_top);
        kept->n_top_told = logprobs->n_top;
        kept->token_logprob[kept->n_id] = logprobs->token;
        memcpy(kept->top + at, logprobs->top, sizeof(float) * logprobs->n_top);
        memcpy(kept->top_id + at, logprobs->top_id, sizeof(uint32_t) * logprobs->n_top);
    }
    kept->ids[kept->n_id++] = id;
}

/* ---- what gateways say ---- */

static rt_kept *kept_make(rt_keep *keep, rt_keep_owner *owner, uint64_t stream)
{
    rt_kept *kept = cm_alloc(sizeof(*kept));
    kept->number = ++keep->n_numbers;
    owner_give(kept, owner, stream);
    return kept;
}

void rt_keep_refuse(rt_keep *keep, rt_keep_owner *owner, uint64_t stream, cm_status status, const char *text)
{
    rt_kept *kept = kept_make(keep, owner, stream);
    kept->end = RT_END_FAILED;
    kept->status = status;
    kept->text = text != NULL ? cm_strdup(text) : NULL;
    untold_add(kept);
}

static const char TAKEN_OVER[] = "the stream was resumed elsewhere";

static cm_status open_check(rt_keep *keep, rt_keep_owner *owner, const rt_seq_request *request,
                            const rt_keep_offer *offer, cm_error *err)
{
    const rt_kept *known = offer->key != NULL ? keys_find(keep, offer->key) : NULL;
    if (known != NULL && known->term > offer->term) {
        return cm_error_set(err, CM_E_CANCELLED, NULL, "%s", TAKEN_OVER);
    }
    if (known != NULL || cm_map_get(&owner->by_stream, request->key.stream) != NULL) {
        return cm_error_set(err, CM_E_EXISTS, "stream", "stream %llu of this gateway is here already",
                            (unsigned long long)request->key.stream);
    }
    return CM_OK;
}

static void kept_begin(rt_keep *keep, rt_kept *kept, const rt_seq_request *request)
{
    cm_status status = cm_map_put(&keep->by_number, kept->number, kept);
    CM_ASSERT_MSG(status == CM_OK, "%s", cm_status_name(status)); /* as many as the scheduler lets in */
    status = cm_map_put(&kept->owner->by_stream, kept->stream, kept);
    CM_ASSERT_MSG(status == CM_OK, "%s", cm_status_name(status));
    kept->live = true;
    keep->ledger.n_live++;
    kept->logprobs = request->sampler.logprobs;
    kept->n_top = request->sampler.n_top;
    kept->n_first = request->n_emitted;
    for (uint32_t i = 0; i < request->n_emitted; i++) {
        log_push(keep, kept, request->emitted[i], NULL);
    }
    kept->n_told = request->n_emitted;
    untold_add(kept);
}

void rt_keep_open(rt_keep *keep, uint64_t now_ms, rt_keep_owner *owner, const rt_seq_request *request,
                  const rt_keep_offer *offer)
{
    cm_error err = {0};
    rt_seq_request inner = *request;
    uint64_t stream = request->key.stream;
    cm_status status = open_check(keep, owner, request, offer, &err);
    inner.key = (rt_seq_key){KEEP_OWNER, keep->n_numbers + 1};
    if (status == CM_OK) {
        status = rt_sched_open(keep->sched, now_ms, &inner, &err);
    }
    if (status != CM_OK) {
        rt_constraint_destroy(request->constraint);
        rt_keep_refuse(keep, owner, stream, status, err.text);
        return;
    }
    rt_kept *kept = kept_make(keep, owner, stream);
    kept_begin(keep, kept, request);
    if (offer->key == NULL) {
        return;
    }
    kept->key = *offer->key;
    kept->term = offer->term;
    if (keys_add(keep, kept) && offer->n_resume > 0 && make_room(keep, offer->n_resume)) {
        kept->resume = cm_alloc(offer->n_resume);
        kept->n_resume = offer->n_resume;
        memcpy(kept->resume, offer->resume, offer->n_resume);
        kept_count_bytes(keep, kept, offer->n_resume);
    }
}

/* Who had it before hears that it is his no more. */
static void kept_take_over(rt_keep *keep, rt_kept *kept)
{
    rt_keep_owner *owner = kept->owner;
    if (owner == NULL) {
        time_remove(keep, kept);
        return;
    }
    owner_take(kept);
    rt_keep_refuse(keep, owner, kept->stream, CM_E_CANCELLED, TAKEN_OVER);
}

void rt_keep_resume(rt_keep *keep, rt_keep_owner *owner, uint64_t stream, const rt_keep_offer *offer,
                    uint64_t from)
{
    rt_kept *kept = keys_find(keep, offer->key);
    bool known = kept != NULL && may_be_resumed(kept);
    if (!known || cm_map_get(&owner->by_stream, stream) != NULL || from > UINT32_MAX ||
        (kept->logprobs && from < kept->n_first)) {
        rt_keep_refuse(keep, owner, stream, CM_E_NOT_FOUND, "the stream is not here, or not any more");
        return;
    }
    if (kept->term > offer->term) {
        rt_keep_refuse(keep, owner, stream, CM_E_CANCELLED, TAKEN_OVER);
        return;
    }
    kept->term = offer->term;
    kept_take_over(keep, kept);
    owner_give(kept, owner, stream);
    if (kept->live) {
        cm_status status = cm_map_put(&owner->by_stream, stream, kept);
        CM_ASSERT_MSG(status == CM_OK, "%s", cm_status_name(status));
    }
    kept->n_told = (uint32_t)from;
    untold_add(kept);
}

void rt_keep_finish(rt_keep *keep, uint64_t now_ms, rt_keep_owner *owner, uint64_t stream)
{
    rt_kept *kept = cm_map_get(&owner->by_stream, stream);
    if (kept == NULL) {
        return;
    }
    rt_sched_cancel(keep->sched, (rt_seq_key){KEEP_OWNER, kept->number});
    kept_end(keep, kept);
    kept->finished = true;
    kept_leave(keep, now_ms, kept);
    (void)make_room(keep, 0);
}

void rt_keep_cancel(rt_keep *keep, rt_keep_owner *owner, uint64_t stream)
{
    rt_kept *kept = cm_map_get(&owner->by_stream, stream);
    if (kept == NULL) { /* ended, perhaps not told yet: nothing is heard of it after a cancel */
        TAILQ_FOREACH (kept, &owner->kept, owner_link) {
            if (kept->stream == stream) {
                break;
            }
        }
    }
    if (kept != NULL) {
        kept_drop(keep, kept);
    }
}

void rt_keep_cancel_copy(rt_keep *keep, const rt_keep_key *key)
{
    rt_kept *kept = keys_find(keep, key);
    if (kept != NULL && kept->owner == NULL) {
        kept_drop(keep, kept);
    }
}

void rt_keep_detach(rt_keep *keep, uint64_t now_ms, rt_keep_owner *owner, uint64_t stream)
{
    rt_kept *kept = cm_map_get(&owner->by_stream, stream);
    if (kept != NULL) {
        kept_leave(keep, now_ms, kept);
    }
}

uint32_t rt_keep_find(const rt_keep *keep, const uint8_t id[RT_KEEP_ID_BYTES], const rt_kept **kept_out,
                      uint32_t n_max)
{
    uint32_t n = 0;
    for (const rt_kept *kept = keys_first(keep, id); kept != NULL && n < n_max; kept = kept->same_hash) {
        bool same = memcmp(kept->key.id, id, RT_KEEP_ID_BYTES) == 0 &&
                    (n == 0 || kept->key.birth == kept_out[0]->key.birth);
        if (same && may_be_resumed(kept)) {
            kept_out[n++] = kept;
        }
    }
    return n;
}

/* ---- what the scheduler says ---- */

void rt_keep_word(rt_keep *keep, uint64_t now_ms, const rt_word *word)
{
    rt_kept *kept = cm_map_get(&keep->by_number, word->key.stream);
    CM_ASSERT_MSG(kept != NULL && word->offset == kept->n_id, "a word about number %llu at %llu",
                  (unsigned long long)word->key.stream, (unsigned long long)word->offset);
    kept->n_cached = word->n_cached;
    if (word->has_token) {
        log_push(keep, kept, word->token, word->logprobs);
    }
    untold_add(kept);
    if (word->end == RT_GOING_ON) {
        return;
    }
    bool nobodys = kept->owner == NULL;
    if (nobodys) {
        time_remove(keep, kept);
    }
    kept_end(keep, kept);
    kept->end = word->end;
    kept->stop_id = word->stop_id;
    kept->status = word->status;
    kept->text = word->text != NULL ? cm_strdup(word->text) : NULL;
    if (nobodys) {
        time_add(keep, now_ms, kept);
        if (kept->end == RT_END_FAILED) {
            kept_drop(keep, kept);
        }
        (void)make_room(keep, 0);
    }
}

/* ---- telling ---- */

void rt_keep_told(rt_keep *keep, uint64_t now_ms, rt_kept *kept, uint32_t n)
{
    kept->n_told += n;
    if (kept->n_told < kept->n_id) {
        return;
    }
    untold_remove(kept);
    if (!kept->live) {
        kept_leave(keep, now_ms, kept);
        (void)make_room(keep, 0);
    }
}

/* ---- time ---- */

void rt_keep_expire(rt_keep *keep, uint64_t now_ms)
{
    rt_kept *kept;
    while ((kept = TAILQ_FIRST(&keep->orphans)) != NULL && now_ms >= kept->drop_ms) {
        kept_drop(keep, kept);
    }
    while ((kept = TAILQ_FIRST(&keep->ended)) != NULL && now_ms >= kept->drop_ms) {
        kept_drop(keep, kept);
    }
}

uint64_t rt_keep_due(const rt_keep *keep)
{
    const rt_kept *orphan = TAILQ_FIRST(&keep->orphans), *ended = TAILQ_FIRST(&keep->ended);
    uint64_t due_ms = orphan != NULL ? orphan->drop_ms : UINT64_MAX;
    return ended != NULL && ended->drop_ms < due_ms ? ended->drop_ms : due_ms;
}

void rt_keep_ledger_get(const rt_keep *keep, rt_keep_ledger *ledger_out)
{
    *ledger_out = keep->ledger;
}
