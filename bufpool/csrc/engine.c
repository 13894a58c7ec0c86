#include "engine.h"

#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "fifo.h"
#include "slots.h"
#include "storage.h"

_Static_assert(sizeof(struct wire_descriptor) == 64, "a descriptor is 64 bytes");
_Static_assert(offsetof(struct wire_descriptor, epoch) == 12, "layout");
_Static_assert(offsetof(struct wire_descriptor, result) == 40, "layout");
_Static_assert(offsetof(struct wire_descriptor, buffer) == 48, "layout");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire is little-endian");

#define POSTS_AT_ONCE 64u

/* NAMED: the data of its write is still to come.  ANSWERED: a region stays lent until RELEASE, since the worker may
 * still take the data from it. */
enum state { IDLE, WAITING, NAMED, RUNNING, ANSWERED };

struct answers {
    struct wire_descriptor *items;
    uint32_t first, count, capacity;
};

struct queue {
    uint32_t epoch, running, running_old, worker_epoch;
    bool fenced, is_welcome;
    struct wire_descriptor fence;
    struct answers answers;
};

struct engine {
    struct engine_setup setup;
    struct storage *storage;
    int event_file;
    bool out_of_memory, came_back, posts_due;
    struct queue *queues;
    struct storage_request *requests;
    struct fifo waiting;
    struct engine_statistics count;
};

/* Room for one more at the end; NULL if there is no memory. */
static struct wire_descriptor *answer_slot(struct answers *out) {
    if (out->first + out->count < out->capacity)
        return &out->items[out->first + out->count++];
    if (out->first) {
        memmove(out->items, out->items + out->first, sizeof *out->items * out->count);
        out->first = 0;
    } else {
        struct wire_descriptor *more = realloc(out->items, sizeof *more * out->capacity * 2);
        if (!more)
            return NULL;
        out->items = more;
        out->capacity *= 2;
    }
    return &out->items[out->count++];
}

static struct wire_descriptor *answer(struct engine *e, const struct wire_descriptor *to, uint8_t kind,
                                      int32_t result) {
    static struct wire_descriptor nowhere;
    struct wire_descriptor *d = answer_slot(&e->queues[to->queue].answers);
    if (!d) {
        e->out_of_memory = true;
        return &nowhere;
    }
    *d = *to;
    d->kind = kind;
    d->flags = 0;
    d->result = result;
    d->segment = WIRE_SEGMENT_NONE;
    d->buffer = 0;
    d->reserved = 0;
    return d;
}

static void name_in(const struct engine *e, struct wire_descriptor *d, const struct storage_request *r) {
    d->segment = e->setup.own_segment;
    d->buffer = r->region;
}

static uint32_t index_of(const struct engine *e, const struct wire_descriptor *d) {
    return d->queue * e->setup.depth + d->tag;
}

static bool wants_region(const struct engine *e, const struct wire_descriptor *d) {
    return d->kind == WIRE_PLACE || (d->op == WIRE_READ && d->segment == WIRE_SEGMENT_NONE && e->storage->names_reads);
}

static void count_start(struct engine *e, const struct storage_request *r) {
    e->count.requests++;
    if (r->d.flags & WIRE_REPLAY)
        e->count.replayed++;
}

static void answer_done(struct engine *e, const struct storage_request *r, int32_t result) {
    struct wire_descriptor *d = answer(e, &r->d, WIRE_DONE, result);
    e->count.answered++;
    if (result < 0) {
        e->count.failed++;
    } else if (r->d.op == WIRE_READ) {
        e->count.bytes_read += r->d.length;
        if (r->region != NO_REGION) {
            d->flags = WIRE_REGION;
            name_in(e, d, r);
        }
    } else if (r->d.op == WIRE_WRITE) {
        e->count.bytes_written += r->d.length;
    }
}

static void region_named(struct engine *e, struct storage_request *r) {
    if (r->d.kind == WIRE_PLACE) {
        r->state = NAMED;
        name_in(e, answer(e, &r->d, WIRE_PLACED, 0), r);
    } else {
        r->state = ANSWERED;
        count_start(e, r);
        answer_done(e, r, full_result(r));
    }
    e->count.lent++;
}

static void region_refused(struct engine *e, struct storage_request *r, int32_t problem) {
    r->state = IDLE;
    if (r->d.kind == WIRE_PLACE)
        answer(e, &r->d, WIRE_REJECT, problem);
    else
        answer_done(e, r, problem);
}

/* False: not now. */
static bool name_region(struct engine *e, struct storage_request *r) {
    r->region_bytes = r->d.length;
    int named = e->storage->slots ? slots_name(e->storage->slots, r) : e->storage->ops->name(e->storage, r);
    if (named > 0)
        region_named(e, r);
    else if (named < 0)
        region_refused(e, r, named);
    return named;
}

static void wait_for_region(struct engine *e, struct storage_request *r) {
    r->state = WAITING;
    e->count.waited++;
    fifo_push(&e->waiting, r->index);
}

static void name_for_all_waiting(struct engine *e) {
    uint32_t count = e->waiting.count;
    for (uint32_t i = 0; e->storage->ops->forget && i < count; i++) {
        uint32_t index = fifo_pop(&e->waiting);
        e->storage->ops->forget(e->storage, &e->requests[index]);
        fifo_push(&e->waiting, index);
    }
    for (uint32_t i = 0; i < count; i++) {
        struct storage_request *r = &e->requests[fifo_pop(&e->waiting)];
        if (!name_region(e, r))
            fifo_push(&e->waiting, r->index);
    }
}

/* Something came back: those who wait are asked again, in the order in which they came. */
static void name_for_waiting(struct engine *e) {
    e->came_back = false;
    if (!e->storage->slots)
        name_for_all_waiting(e);
    /* Whatever fits one fits another: nobody is asked for while somebody waits. */
    while (e->storage->slots && e->waiting.count && name_region(e, &e->requests[fifo_first(&e->waiting)]))
        fifo_pop(&e->waiting);
}

static void give_back(struct engine *e, struct storage_request *r) {
    r->state = IDLE;
    if (r->region == NO_REGION)
        return;
    if (e->storage->slots)
        slots_give_back(e->storage->slots, r->region);
    else
        e->storage->ops->give_back(e->storage, r);
    r->region = NO_REGION;
    e->count.lent--;
    e->came_back = e->posts_due = true;
}

static void stop_waiting(struct engine *e, const struct storage_request *r) {
    uint32_t count = e->waiting.count;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t index = fifo_pop(&e->waiting);
        if (index != r->index)
            fifo_push(&e->waiting, index);
    }
    if (e->storage->ops->forget)
        e->storage->ops->forget(e->storage, r);
    e->came_back = true;
}

static void abandon(struct engine *e, struct storage_request *r) {
    if (r->state == WAITING)
        stop_waiting(e, r);
    give_back(e, r);
}

static void finish_fence(struct engine *e, struct queue *q) {
    if (q->fenced && q->running_old == 0) {
        q->fenced = false;
        e->count.fenced++;
        answer(e, &q->fence, WIRE_FENCED, 0);
    }
}

void engine_finish(struct engine *e, struct storage_request *r, int32_t result) {
    struct queue *q = &e->queues[r->d.queue];
    bool is_old = r->d.epoch < q->epoch;
    q->running--;
    if (is_old) {
        q->running_old--;
        e->count.dropped++;
        give_back(e, r);
    } else {
        answer_done(e, r, result);
        r->state = r->region != NO_REGION ? ANSWERED : IDLE;
    }
    finish_fence(e, q);
}

static bool fits(uint64_t offset, uint64_t length, uint64_t limit) {
    return offset <= limit && length <= limit - offset;
}

static int32_t objection(const struct engine *e, const struct wire_descriptor *d) {
    bool moves = d->op == WIRE_READ || d->op == WIRE_WRITE;
    if (d->op > WIRE_WRITE_ZEROES || d->op == 4 || (d->kind != WIRE_REQUEST && d->op != WIRE_WRITE))
        return -EOPNOTSUPP;
    if (d->op != WIRE_FLUSH && !fits(d->offset, d->length, e->setup.size_bytes))
        return -EINVAL;
    if (moves && (d->length == 0 || d->length > INT32_MAX))
        return -EINVAL;
    if (e->setup.read_only && d->op != WIRE_READ && d->op != WIRE_FLUSH)
        return -EPERM;
    return 0;
}

static int32_t find_memory(const struct engine *e, struct storage_request *r) {
    const struct wire_descriptor *d = &r->d;
    if (d->op != WIRE_READ && d->op != WIRE_WRITE)
        return 0;
    if (r->region != NO_REGION)
        r->memory = e->setup.own + r->region;
    else if (d->segment == WIRE_SEGMENT_POOL && fits(d->buffer, d->length, e->setup.pool_bytes))
        r->memory = e->setup.pool + d->buffer;
    else
        return -EFAULT;
    return 0;
}

static void start(struct engine *e, struct storage_request *r, int32_t problem) {
    r->state = RUNNING;
    e->queues[r->d.queue].running++;
    count_start(e, r);
    if (!problem)
        problem = find_memory(e, r);
    if (problem)
        engine_finish(e, r, problem);
    else
        e->storage->ops->start(e->storage, r);
}

static void ask_for_region(struct engine *e, struct storage_request *r, int32_t problem) {
    if (!problem && !e->storage->slots && !e->storage->ops->name)
        problem = -EOPNOTSUPP;
    if (problem)
        region_refused(e, r, problem);
    else if ((e->storage->slots && e->waiting.count) || !name_region(e, r))
        wait_for_region(e, r);
}

static void take_request(struct engine *e, struct storage_request *r, const struct wire_descriptor *d) {
    r->d = *d;
    int32_t problem = objection(e, d);
    (wants_region(e, d) ? ask_for_region : start)(e, r, problem);
}

/* It names or wants a region and nothing of it is running. */
static bool may_let_go(const struct storage_request *r) {
    return r->state == NAMED || r->state == WAITING || r->state == ANSWERED;
}

static bool is_same(const struct storage_request *r, const struct wire_descriptor *d) {
    return r->d.epoch == d->epoch && r->d.sequence == d->sequence;
}

/* A region that was posted is used, or comes back unused: its bytes, 0 if it is not. */
static uint64_t claim(struct engine *e, const struct wire_descriptor *d) {
    if (!e->storage->slots || d->segment != e->setup.own_segment)
        return 0;
    return slots_claim(e->storage->slots, d->queue, d->epoch, d->buffer);
}

static void take_posted(struct engine *e, struct storage_request *r, const struct wire_descriptor *d) {
    uint64_t bytes = claim(e, d);
    if (!bytes) {
        e->count.dropped++;
        return;
    }
    abandon(e, r);
    r->d = *d;
    r->region = d->buffer;
    r->region_bytes = bytes;
    e->count.lent++;
    e->count.unasked++;
    e->posts_due = true;
    start(e, r, d->length > bytes ? -EINVAL : objection(e, d));
}

static void take_placed(struct engine *e, struct storage_request *r, const struct wire_descriptor *d) {
    if (d->length > r->d.length) {
        e->count.dropped++;
        return;
    }
    r->d.length = d->length;
    r->d.flags |= d->flags;
    start(e, r, d->length ? 0 : -EINVAL);
}

static int take_data(struct engine *e, struct storage_request *r, const struct wire_descriptor *d) {
    if (r->state == NAMED && is_same(r, d))
        take_placed(e, r, d);
    else if (r->state == RUNNING)
        return -EPROTO;
    else
        take_posted(e, r, d);
    return 0;
}

static void take_release(struct engine *e, struct storage_request *r, const struct wire_descriptor *d) {
    if (may_let_go(r) && is_same(r, d)) {
        abandon(e, r);
    } else if (claim(e, d)) {
        slots_give_back(e->storage->slots, d->buffer);
        e->came_back = e->posts_due = true;
    }
}

/* What a dead worker was posted is nobody's now. */
static void forget_posts(struct engine *e, uint32_t queue, uint32_t epoch) {
    if (e->storage->slots)
        slots_unpost(e->storage->slots, queue, epoch);
    e->came_back = e->posts_due = true;
}

static void take_welcome(struct engine *e, const struct wire_descriptor *d) {
    struct queue *q = &e->queues[d->queue];
    q->worker_epoch = d->epoch;
    q->is_welcome = true;
    forget_posts(e, d->queue, d->epoch);
}

static void post(struct engine *e, uint32_t queue) {
    uint64_t regions[POSTS_AT_ONCE], bytes;
    uint32_t count;
    struct wire_descriptor d = {.device = e->setup.device, .queue = (uint16_t)queue,
                                .epoch = e->queues[queue].worker_epoch};
    while ((count = slots_post(e->storage->slots, queue, d.epoch, &bytes, regions, POSTS_AT_ONCE))) {
        for (uint32_t i = 0; i < count; i++) {
            struct wire_descriptor *said = answer(e, &d, WIRE_POST, 0);
            said->length = bytes;
            said->segment = e->setup.own_segment;
            said->buffer = regions[i];
        }
        e->count.posted += count;
    }
}

/* After those who wait were asked again: they go before those who might come. */
static void post_to_all(struct engine *e) {
    e->posts_due = false;
    for (uint32_t queue = 0; e->storage->slots && queue < e->setup.queues; queue++)
        if (e->queues[queue].is_welcome)
            post(e, queue);
}

static void take_fence(struct engine *e, const struct wire_descriptor *d) {
    struct queue *q = &e->queues[d->queue];
    if (d->epoch > q->epoch) {
        q->epoch = d->epoch;
        q->running_old = q->running;
    }
    for (uint32_t tag = 0; tag < e->setup.depth; tag++) {
        struct storage_request *r = &e->requests[d->queue * e->setup.depth + tag];
        if (may_let_go(r) && r->d.epoch < q->epoch)
            abandon(e, r);
    }
    forget_posts(e, d->queue, d->epoch);
    q->fence = *d;
    q->fenced = true;
    finish_fence(e, q);
}

/* About one request. */
static int take_own(struct engine *e, const struct wire_descriptor *d) {
    struct storage_request *r = &e->requests[index_of(e, d)];
    if (d->epoch < e->queues[d->queue].epoch) {
        e->count.dropped++;
    } else if (d->kind == WIRE_DATA) {
        return take_data(e, r, d);
    } else if (d->kind == WIRE_RELEASE) {
        take_release(e, r, d);
    } else if (r->state == RUNNING) {
        return -EPROTO;
    } else {
        abandon(e, r);
        /* Nobody who waits for what this one had is overtaken by it. */
        if (e->came_back)
            name_for_waiting(e);
        take_request(e, r, d);
    }
    return 0;
}

static int take(struct engine *e, const struct wire_descriptor *d) {
    if (d->queue >= e->setup.queues || d->device != e->setup.device)
        return -EPROTO;
    if (d->kind == WIRE_WELCOME || d->kind == WIRE_FENCE) {
        (d->kind == WIRE_WELCOME ? take_welcome : take_fence)(e, d);
        return 0;
    }
    if (d->tag >= e->setup.depth || d->kind < WIRE_REQUEST || d->kind > WIRE_RELEASE)
        return -EPROTO;
    return take_own(e, d);
}

int engine_take(struct engine *e, const struct wire_descriptor *descriptors, uint32_t count) {
    const uint8_t *at = (const uint8_t *)descriptors;
    int error = 0;
    for (; count && !error; count--, at += sizeof *descriptors) {
        struct wire_descriptor d;
        memcpy(&d, at, sizeof d);
        error = take(e, &d);
        if (e->came_back)
            name_for_waiting(e);
    }
    if (e->posts_due)
        post_to_all(e);
    return error;
}

uint32_t engine_answers(struct engine *e, uint32_t queue, const struct wire_descriptor **answers) {
    const struct answers *out = &e->queues[queue].answers;
    *answers = out->items + out->first;
    return out->count;
}

void engine_answers_sent(struct engine *e, uint32_t queue, uint32_t count) {
    struct answers *out = &e->queues[queue].answers;
    out->count -= count;
    out->first = out->count ? out->first + count : 0;
}

struct storage_request *engine_request(struct engine *e, uint32_t index) { return &e->requests[index]; }

int engine_file(const struct engine *e) { return e->event_file; }

int engine_error(const struct engine *e) { return e->out_of_memory ? -ENOMEM : 0; }

int engine_turn(struct engine *e) {
    int error = e->storage->ops->turn ? e->storage->ops->turn(e->storage) : 0;
    if (e->came_back)
        name_for_waiting(e);
    return error ? error : engine_error(e);
}

int engine_use_ring(struct engine *e, struct io_uring *ring) {
    return e->storage->ops->use_ring ? e->storage->ops->use_ring(e->storage, ring) : 0;
}

uint32_t engine_prepare(struct engine *e) {
    return e->storage->ops->prepare ? e->storage->ops->prepare(e->storage) : 0;
}

void engine_complete(struct engine *e, uint64_t user_data, int32_t result) {
    e->storage->ops->complete(e->storage, (uint32_t)user_data, result);
    if (e->came_back)
        name_for_waiting(e);
}

void engine_count(const struct engine *e, struct engine_statistics *statistics) {
    *statistics = e->count;
    for (uint32_t queue = 0; queue < e->setup.queues; queue++)
        statistics->running += e->queues[queue].running;
    statistics->waiting = e->waiting.count;
}

static bool open_queues(struct engine *e) {
    e->queues = calloc(e->setup.queues, sizeof *e->queues);
    for (uint32_t i = 0; e->queues && i < e->setup.queues; i++) {
        struct answers *out = &e->queues[i].answers;
        e->queues[i].epoch = e->setup.epoch;
        out->capacity = e->setup.depth + 1;
        out->items = calloc(out->capacity, sizeof *out->items);
        if (!out->items)
            return false;
    }
    return e->queues;
}

static bool open_memory(struct engine *e) {
    uint32_t requests = e->setup.queues * e->setup.depth;
    e->requests = calloc(requests, sizeof *e->requests);
    for (uint32_t i = 0; e->requests && i < requests; i++)
        e->requests[i] = (struct storage_request){.region = NO_REGION, .index = i};
    return e->requests && open_queues(e) && fifo_open(&e->waiting, requests);
}

static int open_storage(struct engine *e) {
    struct storage *s = e->storage;
    s->engine = e;
    s->count = &e->count;
    s->event_file = e->event_file;
    int error = s->ops->open(s, &e->setup);
    return error ? error : engine_use_ring(e, NULL);
}

struct engine *engine_open(const struct engine_setup *setup, struct storage *storage, int *error) {
    struct engine *e = storage ? calloc(1, sizeof *e) : NULL;
    *error = -ENOMEM;
    if (!e) {
        if (storage)
            storage->ops->close(storage);
        return NULL;
    }
    e->setup = *setup;
    e->storage = storage;
    e->event_file = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (e->event_file < 0)
        *error = -errno;
    else if (open_memory(e))
        *error = open_storage(e);
    if (*error == 0)
        return e;
    engine_close(e);
    return NULL;
}

void engine_close(struct engine *e) {
    e->storage->ops->close(e->storage);
    if (e->event_file >= 0)
        close(e->event_file);
    for (uint32_t i = 0; e->queues && i < e->setup.queues; i++)
        free(e->queues[i].answers.items);
    free(e->queues);
    free(e->requests);
    free(e->waiting.items);
    free(e);
}
