#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "fileio.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

_Static_assert(sizeof(struct fileio_descriptor) == 64, "a descriptor is 64 bytes");
_Static_assert(offsetof(struct fileio_descriptor, epoch) == 12, "layout");
_Static_assert(offsetof(struct fileio_descriptor, result) == 40, "layout");
_Static_assert(offsetof(struct fileio_descriptor, buffer) == 48, "layout");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire is little-endian");

#define NO_SLOT UINT32_MAX
#define RING_ENTRIES_MAX 4096u
#define ZEROES_BYTES (1u << 20)
#define SECTOR_BYTES 512u

/* ANSWERED: a placed write's slot stays lent until RELEASE, since the worker may still take the data from it. */
enum state { IDLE, WAITING, PLACED, RUNNING, ANSWERED };
enum step { MOVE, PUNCH, ZERO_RANGE, ZERO_WRITE, SYNC };

struct request {
    struct fileio_descriptor d;
    uint64_t moved;
    uint32_t slot;
    uint8_t state, step;
};

struct answers {
    struct fileio_descriptor *items;
    uint32_t count, capacity;
};

struct queue {
    uint32_t epoch, running, running_old;
    bool fenced;
    struct fileio_descriptor fence;
    struct answers answers;
};

/* First in, first out; as large as everything that could wait. */
struct fifo {
    uint32_t *items;
    uint32_t head, count, capacity;
};

struct fileio_engine {
    struct fileio_setup setup;
    struct io_uring ring;
    int event_file;
    bool ring_open, no_punch, no_zero_range, out_of_memory;
    struct queue *queues;
    struct request *requests;
    struct fifo runnable;
    struct fifo waiting;
    uint32_t *free_slots;
    uint32_t slots, slots_free;
    uint8_t *zeroes;
    struct fileio_statistics count;
};

static void fifo_push(struct fifo *fifo, uint32_t item) {
    fifo->items[(fifo->head + fifo->count++) % fifo->capacity] = item;
}

static uint32_t fifo_pop(struct fifo *fifo) {
    uint32_t item = fifo->items[fifo->head];
    fifo->head = (fifo->head + 1) % fifo->capacity;
    fifo->count--;
    return item;
}

static struct fileio_descriptor *answer_slot(struct fileio_engine *e, struct answers *out) {
    static struct fileio_descriptor nowhere;
    if (out->count == out->capacity) {
        struct fileio_descriptor *more = realloc(out->items, sizeof *more * out->capacity * 2);
        if (!more) {
            e->out_of_memory = true;
            return &nowhere;
        }
        out->items = more;
        out->capacity *= 2;
    }
    return &out->items[out->count++];
}

static void answer(struct fileio_engine *e, const struct fileio_descriptor *to, uint8_t kind, int32_t result) {
    struct fileio_descriptor *d = answer_slot(e, &e->queues[to->queue].answers);
    *d = *to;
    d->kind = kind;
    d->flags = 0;
    d->result = result;
    d->segment = 0;
    d->buffer = 0;
    d->reserved = 0;
}

static void answer_region(struct fileio_engine *e, const struct request *r) {
    answer(e, &r->d, FILEIO_PLACED, 0);
    struct answers *out = &e->queues[r->d.queue].answers;
    out->items[out->count - 1].segment = e->setup.own_segment;
    out->items[out->count - 1].buffer = r->slot * e->setup.slot_bytes;
}

static uint32_t index_of(const struct fileio_engine *e, const struct fileio_descriptor *d) {
    return d->queue * e->setup.depth + d->tag;
}

static void lend(struct fileio_engine *e, struct request *r) {
    r->slot = e->free_slots[--e->slots_free];
    r->state = PLACED;
    answer_region(e, r);
}

static void lend_to_waiting(struct fileio_engine *e) {
    while (e->slots_free && e->waiting.count)
        lend(e, &e->requests[fifo_pop(&e->waiting)]);
}

static void give_back(struct fileio_engine *e, struct request *r) {
    if (r->slot != NO_SLOT) {
        e->free_slots[e->slots_free++] = r->slot;
        r->slot = NO_SLOT;
    }
    r->state = IDLE;
}

static void stop_waiting(struct fileio_engine *e, uint32_t index) {
    struct fifo *w = &e->waiting;
    uint32_t count = w->count;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t item = fifo_pop(w);
        if (item != index)
            fifo_push(w, item);
    }
}

static void abandon(struct fileio_engine *e, uint32_t index) {
    struct request *r = &e->requests[index];
    if (r->state == WAITING)
        stop_waiting(e, index);
    give_back(e, r);
}

static void finish_fence(struct fileio_engine *e, struct queue *q) {
    if (q->fenced && q->running_old == 0) {
        q->fenced = false;
        e->count.fenced++;
        answer(e, &q->fence, FILEIO_FENCED, 0);
    }
}

static void count_result(struct fileio_engine *e, const struct request *r, int32_t result) {
    e->count.answered++;
    if (result < 0)
        e->count.failed++;
    else if (r->d.op == FILEIO_READ)
        e->count.bytes_read += r->d.length;
    else if (r->d.op == FILEIO_WRITE)
        e->count.bytes_written += r->d.length;
}

static void finish(struct fileio_engine *e, struct request *r, int32_t result) {
    struct queue *q = &e->queues[r->d.queue];
    q->running--;
    if (r->d.epoch < q->epoch) {
        q->running_old--;
        e->count.dropped++;
    } else {
        count_result(e, r, result);
        answer(e, &r->d, FILEIO_DONE, result);
    }
    if (r->slot != NO_SLOT && r->d.epoch >= q->epoch) {
        r->state = ANSWERED;
    } else {
        give_back(e, r);
        lend_to_waiting(e);
    }
    finish_fence(e, q);
}

static int32_t full_result(const struct request *r) {
    return r->d.op == FILEIO_READ || r->d.op == FILEIO_WRITE ? (int32_t)r->d.length : 0;
}

static uint8_t *memory_of(const struct fileio_engine *e, const struct request *r) {
    if (r->slot != NO_SLOT)
        return e->setup.own + r->slot * e->setup.slot_bytes;
    return e->setup.pool + r->d.buffer;
}

static uint32_t piece(uint64_t left, uint32_t limit) { return left < limit ? (uint32_t)left : limit; }

static void prepare_move(struct fileio_engine *e, struct request *r, struct io_uring_sqe *sqe) {
    uint8_t *memory = memory_of(e, r) + r->moved;
    uint32_t bytes = (uint32_t)(r->d.length - r->moved);
    if (r->d.op == FILEIO_READ) {
        io_uring_prep_read(sqe, e->setup.file, memory, bytes, r->d.offset + r->moved);
        return;
    }
    io_uring_prep_write(sqe, e->setup.file, memory, bytes, r->d.offset + r->moved);
    if (r->d.flags & FILEIO_FUA)
        sqe->rw_flags = RWF_DSYNC;
}

static void prepare(struct fileio_engine *e, struct request *r, struct io_uring_sqe *sqe) {
    const struct fileio_descriptor *d = &r->d;
    int file = e->setup.file;
    switch (r->step) {
    case MOVE: prepare_move(e, r, sqe); break;
    case PUNCH:
        io_uring_prep_fallocate(sqe, file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)d->offset,
                                (off_t)d->length);
        break;
    case ZERO_RANGE:
        io_uring_prep_fallocate(sqe, file, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)d->offset,
                                (off_t)d->length);
        break;
    case ZERO_WRITE:
        io_uring_prep_write(sqe, file, e->zeroes, piece(d->length - r->moved, ZEROES_BYTES), d->offset + r->moved);
        break;
    case SYNC: io_uring_prep_fsync(sqe, file, IORING_FSYNC_DATASYNC); break;
    }
    io_uring_sqe_set_data64(sqe, (uint64_t)(r - e->requests));
}

static void fill_ring(struct fileio_engine *e) {
    while (e->runnable.count) {
        struct io_uring_sqe *sqe = io_uring_get_sqe(&e->ring);
        if (!sqe)
            return;
        prepare(e, &e->requests[fifo_pop(&e->runnable)], sqe);
    }
}

static void run(struct fileio_engine *e, struct request *r, uint8_t step) {
    r->step = step;
    fifo_push(&e->runnable, (uint32_t)(r - e->requests));
}

static bool is_unsupported(int32_t result) {
    return result == -EOPNOTSUPP || result == -ENOSYS || result == -ENODEV;
}

static int32_t discard_block_device(struct fileio_engine *e, struct request *r) {
    uint64_t range[2] = {r->d.offset, r->d.length};
    return ioctl(e->setup.file, BLKDISCARD, range) ? -errno : 0;
}

static void punch_unsupported(struct fileio_engine *e, struct request *r) {
    e->no_punch = true;
    e->count.fallbacks++;
    if (r->d.op == FILEIO_WRITE_ZEROES)
        run(e, r, e->no_zero_range ? ZERO_WRITE : ZERO_RANGE);
    else
        finish(e, r, e->setup.mode & FILEIO_MODE_BLOCK_DEVICE ? discard_block_device(e, r) : -EOPNOTSUPP);
}

static void zero_range_unsupported(struct fileio_engine *e, struct request *r) {
    e->no_zero_range = true;
    e->count.fallbacks++;
    run(e, r, ZERO_WRITE);
}

static void failed(struct fileio_engine *e, struct request *r, int32_t result) {
    if (result == -EINTR || result == -EAGAIN)
        run(e, r, r->step);
    else if (r->step == PUNCH && is_unsupported(result))
        punch_unsupported(e, r);
    else if (r->step == ZERO_RANGE && is_unsupported(result))
        zero_range_unsupported(e, r);
    else
        finish(e, r, result);
}

/* The end of the file: what lies behind it reads as zeros, like every hole. */
static void read_ended(struct fileio_engine *e, struct request *r) {
    memset(memory_of(e, r) + r->moved, 0, r->d.length - r->moved);
    finish(e, r, full_result(r));
}

static void all_moved(struct fileio_engine *e, struct request *r) {
    if (r->d.op == FILEIO_WRITE_ZEROES && r->d.flags & FILEIO_FUA && r->step != SYNC)
        run(e, r, SYNC);
    else
        finish(e, r, full_result(r));
}

static void moved(struct fileio_engine *e, struct request *r, uint32_t bytes) {
    r->moved += bytes;
    /* O_DIRECT stops at the end of a file at any byte and could not go on from there. */
    if (r->d.op == FILEIO_READ && (bytes == 0 || r->moved % SECTOR_BYTES))
        read_ended(e, r);
    else if (bytes == 0)
        finish(e, r, -EIO);
    else if (r->moved < r->d.length) {
        e->count.continued++;
        run(e, r, r->step);
    } else
        all_moved(e, r);
}

static void complete(struct fileio_engine *e, struct request *r, int32_t result) {
    if (result < 0)
        failed(e, r, result);
    else if (r->step == MOVE || r->step == ZERO_WRITE)
        moved(e, r, (uint32_t)result);
    else
        all_moved(e, r);
}

static void reap(struct fileio_engine *e) {
    struct io_uring_cqe *cqe;
    unsigned head, seen = 0;
    io_uring_for_each_cqe(&e->ring, head, cqe) {
        complete(e, &e->requests[io_uring_cqe_get_data64(cqe)], cqe->res);
        seen++;
    }
    io_uring_cq_advance(&e->ring, seen);
}

static bool fits(uint64_t offset, uint64_t length, uint64_t limit) {
    return offset <= limit && length <= limit - offset;
}

static int32_t objection(const struct fileio_engine *e, const struct fileio_descriptor *d) {
    bool moves = d->op == FILEIO_READ || d->op == FILEIO_WRITE;
    if (d->op > FILEIO_WRITE_ZEROES || d->op == 4)
        return -EOPNOTSUPP;
    if (d->op != FILEIO_FLUSH && !fits(d->offset, d->length, e->setup.size_bytes))
        return -EINVAL;
    if (moves && (d->length == 0 || d->length > INT32_MAX))
        return -EINVAL;
    if (e->setup.mode & FILEIO_MODE_READ_ONLY && d->op != FILEIO_READ && d->op != FILEIO_FLUSH)
        return -EPERM;
    return 0;
}

static int32_t buffer_objection(const struct fileio_engine *e, const struct fileio_descriptor *d) {
    if (d->op != FILEIO_READ && d->op != FILEIO_WRITE)
        return 0;
    bool inside = d->segment == FILEIO_SEGMENT_POOL && fits(d->buffer, d->length, e->setup.pool_bytes);
    return inside ? 0 : -EFAULT;
}

static uint8_t first_step(const struct fileio_engine *e, const struct fileio_descriptor *d) {
    switch (d->op) {
    case FILEIO_FLUSH: return SYNC;
    case FILEIO_DISCARD: return PUNCH;
    case FILEIO_WRITE_ZEROES:
        if (!(d->flags & FILEIO_NOUNMAP) && !e->no_punch)
            return PUNCH;
        return e->no_zero_range ? ZERO_WRITE : ZERO_RANGE;
    default: return MOVE;
    }
}

static void start(struct fileio_engine *e, struct request *r, int32_t problem) {
    r->state = RUNNING;
    r->moved = 0;
    e->queues[r->d.queue].running++;
    e->count.requests++;
    if (r->d.flags & FILEIO_REPLAY)
        e->count.replayed++;
    if (problem)
        finish(e, r, problem);
    else if (e->setup.mode & FILEIO_MODE_NOTHING)
        finish(e, r, full_result(r));
    else
        run(e, r, first_step(e, &r->d));
}

static void take_request(struct fileio_engine *e, struct request *r, const struct fileio_descriptor *d) {
    r->d = *d;
    int32_t problem = objection(e, d);
    start(e, r, problem ? problem : buffer_objection(e, d));
}

static void take_place(struct fileio_engine *e, struct request *r, const struct fileio_descriptor *d) {
    r->d = *d;
    int32_t problem = objection(e, d);
    if (!problem && d->length > e->setup.slot_bytes)
        problem = -EINVAL;
    if (!problem && e->slots == 0)
        problem = -EOPNOTSUPP;
    if (problem) {
        answer(e, d, FILEIO_REJECT, problem);
    } else if (e->slots_free) {
        lend(e, r);
    } else {
        r->state = WAITING;
        fifo_push(&e->waiting, index_of(e, d));
    }
}

/* It names or wants a slot and nothing of it is running. */
static bool may_let_go(const struct request *r) {
    return r->state == PLACED || r->state == WAITING || r->state == ANSWERED;
}

static bool is_same(const struct request *r, const struct fileio_descriptor *d) {
    return r->d.epoch == d->epoch && r->d.sequence == d->sequence;
}

static void take_data(struct fileio_engine *e, struct request *r, const struct fileio_descriptor *d) {
    if (r->state != PLACED || !is_same(r, d) || d->length > r->d.length) {
        e->count.dropped++;
        return;
    }
    r->d.length = d->length;
    r->d.flags |= d->flags;
    start(e, r, d->length ? 0 : -EINVAL);
}

static void take_release(struct fileio_engine *e, struct request *r, const struct fileio_descriptor *d) {
    if (may_let_go(r) && is_same(r, d)) {
        abandon(e, index_of(e, d));
        lend_to_waiting(e);
    }
}

static void take_fence(struct fileio_engine *e, const struct fileio_descriptor *d) {
    struct queue *q = &e->queues[d->queue];
    if (d->epoch > q->epoch) {
        q->epoch = d->epoch;
        q->running_old = q->running;
    }
    for (uint32_t tag = 0; tag < e->setup.depth; tag++) {
        uint32_t index = d->queue * e->setup.depth + tag;
        struct request *r = &e->requests[index];
        if (may_let_go(r) && r->d.epoch < q->epoch)
            abandon(e, index);
    }
    q->fence = *d;
    q->fenced = true;
    lend_to_waiting(e);
    finish_fence(e, q);
}

static int take(struct fileio_engine *e, const struct fileio_descriptor *d) {
    if (d->queue >= e->setup.queues || d->device != e->setup.device)
        return -EPROTO;
    if (d->kind == FILEIO_WELCOME)
        return 0;
    if (d->kind == FILEIO_FENCE) {
        take_fence(e, d);
        return 0;
    }
    if (d->tag >= e->setup.depth || d->kind < FILEIO_REQUEST || d->kind > FILEIO_RELEASE)
        return -EPROTO;
    struct request *r = &e->requests[index_of(e, d)];
    if (d->epoch < e->queues[d->queue].epoch) {
        e->count.dropped++;
        return 0;
    }
    if (d->kind == FILEIO_DATA || d->kind == FILEIO_RELEASE) {
        (d->kind == FILEIO_DATA ? take_data : take_release)(e, r, d);
        return 0;
    }
    if (r->state == RUNNING)
        return -EPROTO;
    abandon(e, index_of(e, d));
    (d->kind == FILEIO_REQUEST ? take_request : take_place)(e, r, d);
    return 0;
}

int fileio_take(struct fileio_engine *e, const void *frame, size_t frame_bytes) {
    struct fileio_descriptor d;
    if (frame_bytes == 0 || frame_bytes % sizeof d)
        return -EPROTO;
    for (size_t at = 0; at < frame_bytes; at += sizeof d) {
        memcpy(&d, (const uint8_t *)frame + at, sizeof d);
        int error = take(e, &d);
        if (error)
            return error;
    }
    return 0;
}

static int submit(struct fileio_engine *e) {
    int result;
    do {
        fill_ring(e);
        result = io_uring_submit(&e->ring);
        if (result == -EBUSY || result == -EAGAIN) {
            io_uring_get_events(&e->ring);
            reap(e);
        }
    } while (result == -EINTR || result == -EBUSY || result == -EAGAIN);
    return result < 0 ? result : 0;
}

static void quiet(const struct fileio_engine *e) {
    uint64_t events;
    if (read(e->event_file, &events, sizeof events) < 0)
        return;
}

int fileio_turn(struct fileio_engine *e) {
    if (e->setup.mode & FILEIO_MODE_NOTHING)
        return e->out_of_memory ? -ENOMEM : 0;
    int error = submit(e);
    /* After submitting: what completed inline is reaped now and need not wake anybody.  Before asking for events: with
     * DEFER_TASKRUN the file is signalled when a completion can be asked for, not when it lies in the ring. */
    quiet(e);
    io_uring_get_events(&e->ring);
    reap(e);
    /* What moved only in part goes on now; its completion makes the event file readable. */
    if (!error && e->runnable.count)
        error = submit(e);
    return e->out_of_memory ? -ENOMEM : error;
}

uint32_t fileio_answers(struct fileio_engine *e, uint32_t queue, const struct fileio_descriptor **answers) {
    struct answers *out = &e->queues[queue].answers;
    uint32_t count = out->count;
    *answers = out->items;
    out->count = 0;
    return count;
}

int fileio_file(const struct fileio_engine *e) { return e->event_file; }

void fileio_count(const struct fileio_engine *e, struct fileio_statistics *statistics) {
    *statistics = e->count;
    for (uint32_t queue = 0; queue < e->setup.queues; queue++)
        statistics->running += e->queues[queue].running;
    statistics->waiting = e->waiting.count;
    statistics->slots_lent = e->slots - e->slots_free;
}

static int open_ring(struct fileio_engine *e) {
    static const unsigned modes[] = {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN,
                                     IORING_SETUP_COOP_TASKRUN, 0};
    unsigned entries = e->setup.queues * e->setup.depth;
    if (entries > RING_ENTRIES_MAX)
        entries = RING_ENTRIES_MAX;
    int error = -EINVAL;
    for (size_t i = 0; error == -EINVAL && i < sizeof modes / sizeof *modes; i++)
        error = io_uring_queue_init(entries, &e->ring, modes[i]);
    e->ring_open = error == 0;
    /* The ring's own file can be polled too, but with DEFER_TASKRUN a poll that began early misses the wake-up. */
    return error ? error : io_uring_register_eventfd(&e->ring, e->event_file);
}

static bool open_fifo(struct fifo *fifo, uint32_t capacity) {
    fifo->capacity = capacity;
    fifo->items = calloc(capacity, sizeof *fifo->items);
    return fifo->items;
}

static bool open_queues(struct fileio_engine *e) {
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

static bool open_slots(struct fileio_engine *e) {
    e->slots = e->setup.slot_bytes ? (uint32_t)(e->setup.own_bytes / e->setup.slot_bytes) : 0;
    e->slots_free = e->slots;
    e->free_slots = calloc(e->slots + 1, sizeof *e->free_slots);
    for (uint32_t i = 0; e->free_slots && i < e->slots; i++)
        e->free_slots[i] = e->slots - 1 - i;
    return e->free_slots;
}

static bool open_memory(struct fileio_engine *e) {
    uint32_t requests = e->setup.queues * e->setup.depth;
    e->requests = calloc(requests, sizeof *e->requests);
    for (uint32_t i = 0; e->requests && i < requests; i++)
        e->requests[i].slot = NO_SLOT;
    e->zeroes = mmap(NULL, ZEROES_BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (e->zeroes == MAP_FAILED)
        e->zeroes = NULL;
    return e->requests && e->zeroes && open_queues(e) && open_slots(e) && open_fifo(&e->runnable, requests) &&
           open_fifo(&e->waiting, requests);
}

struct fileio_engine *fileio_open(const struct fileio_setup *setup, int *error) {
    struct fileio_engine *e = calloc(1, sizeof *e);
    *error = -ENOMEM;
    if (!e)
        return NULL;
    e->setup = *setup;
    e->event_file = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (e->event_file < 0)
        *error = -errno;
    else if (open_memory(e)) {
        *error = setup->mode & FILEIO_MODE_NOTHING ? 0 : open_ring(e);
        if (*error == 0)
            return e;
    }
    fileio_close(e);
    return NULL;
}

void fileio_close(struct fileio_engine *e) {
    if (e->ring_open)
        io_uring_queue_exit(&e->ring);
    if (e->event_file >= 0)
        close(e->event_file);
    for (uint32_t i = 0; e->queues && i < e->setup.queues; i++)
        free(e->queues[i].answers.items);
    if (e->zeroes)
        munmap(e->zeroes, ZEROES_BYTES);
    free(e->queues);
    free(e->requests);
    free(e->free_slots);
    free(e->runnable.items);
    free(e->waiting.items);
    free(e);
}

#define STATX_DIOALIGN_BIT 0x2000u

int fileio_direct_alignment(int file, uint32_t *memory_bytes, uint32_t *offset_bytes) {
    /* glibc's struct statx may be older than these fields: 32-bit words 38 and 39 of the kernel's 256 bytes. */
    uint32_t words[64] = {0};
    if (syscall(SYS_statx, file, "", AT_EMPTY_PATH, STATX_DIOALIGN_BIT, words))
        return -errno;
    bool known = words[0] & STATX_DIOALIGN_BIT;
    *memory_bytes = known ? words[38] : 0;
    *offset_bytes = known ? words[39] : 0;
    return 0;
}

int fileio_block_device(int file, uint64_t *size_bytes, uint32_t *logical_bytes, uint32_t *physical_bytes) {
    int logical = 0;
    unsigned physical = 0;
    if (ioctl(file, BLKGETSIZE64, size_bytes) || ioctl(file, BLKSSZGET, &logical) || ioctl(file, BLKPBSZGET, &physical))
        return -errno;
    *logical_bytes = (uint32_t)logical;
    *physical_bytes = physical;
    return 0;
}
