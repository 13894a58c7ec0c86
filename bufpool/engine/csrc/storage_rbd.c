/* An image in a Ceph cluster: librbd moves data straight between its messages and the pool or the own segment.
 *
 * librbd answers on threads of its own.  Each puts the request on a stack, and the one that finds it empty rings: many
 * answers share one wake-up.  The bell is an eventfd that the caller's io_uring reads, or with the engine's own loop
 * the engine's: an eventfd that is signalled from the wake-up of another is not reliable.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "storage_rbd.h"

#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "slots.h"

#define BELL_INDEX UINT32_MAX
#define THICK_PROVISION 1 /* RBD_WRITE_ZEROES_FLAG_THICK_PROVISION */

struct rbd_storage;

struct rbd_work {
	struct rbd_storage *storage;
	struct rbd_work *next; /* on the stack */
	uint8_t *copy;         /* of data that its client may change under librbd's checksum */
	int64_t result;
	uint32_t index;
	bool is_flush; /* the flush that makes a request with FUA durable */
};

struct rbd_storage {
	struct storage base;
	struct slots slots;
	struct rbd_calls calls;
	struct rbd_work *work;     /* by the request's index */
	struct rbd_work *answered; /* the stack; librbd's threads push */
	struct io_uring *ring;
	uint32_t in_flight, pushing; /* pushing: threads of librbd that still use this struct */
	int ring_bell, own_bell, bell;
	bool listens, is_over; /* is_over: nothing is sent to the cluster any more */
};

/* What the ring reads from the bell; it outlives a ring that is closed while it reads. */
static uint64_t rung;

static struct rbd_storage *rbd_of(struct storage *s) { return (struct rbd_storage *)s; }

/* Called by a thread of librbd's. */
static void rbd_done(void *completion, void *arg)
{
	static const uint64_t one = 1;
	struct rbd_work *w = arg;
	struct rbd_storage *s = w->storage;
	__atomic_add_fetch(&s->pushing, 1, __ATOMIC_ACQ_REL);
	w->result = s->calls.get_return_value(completion);
	s->calls.release(completion);
	struct rbd_work *first = __atomic_load_n(&s->answered, __ATOMIC_RELAXED);
	do
		w->next = first;
	while (!__atomic_compare_exchange_n(&s->answered, &first, w, true, __ATOMIC_RELEASE, __ATOMIC_RELAXED));
	/* Cannot fail: the count has room for 2^64. */
	if (!first && write(s->bell, &one, sizeof one) < 0)
		abort();
	__atomic_sub_fetch(&s->pushing, 1, __ATOMIC_RELEASE);
}

static int rbd_call(const struct rbd_storage *s, const struct storage_request *r, const struct rbd_work *w,
		    void *completion)
{
	const struct rbd_calls *call = &s->calls;
	const struct wire_descriptor *d = &r->d;
	if (w->is_flush)
		return call->flush(call->image, completion);
	switch (d->op) {
	case WIRE_READ:
		return call->read(call->image, d->offset, d->length, (char *)r->memory, completion);
	case WIRE_WRITE:
		return call->write(call->image, d->offset, d->length, (const char *)(w->copy ? w->copy : r->memory),
				   completion);
	case WIRE_DISCARD:
		return call->discard(call->image, d->offset, d->length, completion);
	case WIRE_WRITE_ZEROES:
		return call->write_zeroes(call->image, d->offset, d->length, completion,
					  d->flags & WIRE_NOUNMAP ? THICK_PROVISION : 0, 0);
	default: /* WIRE_FLUSH */
		return call->flush(call->image, completion);
	}
}

static void rbd_finish(struct rbd_storage *s, struct rbd_work *w, int32_t result)
{
	free(w->copy);
	w->copy = NULL;
	engine_finish(s->base.engine, engine_request(s->base.engine, w->index), result);
}

static void rbd_issue(struct rbd_storage *s, struct rbd_work *w)
{
	void *completion;
	int error = s->is_over ? -ESHUTDOWN : s->calls.create_completion(w, rbd_done, &completion);
	if (!error) {
		s->in_flight++;
		error = rbd_call(s, engine_request(s->base.engine, w->index), w, completion);
		if (!error)
			return;
		s->in_flight--;
		s->calls.release(completion);
	}
	rbd_finish(s, w, error);
}

/* The pool's and the own segment's data stay as they are until the answer; a client may write to its own memory. */
static bool is_changeable(const struct storage_request *r)
{
	return r->d.op == WIRE_WRITE && r->region == NO_REGION && r->d.segment >= WIRE_SEGMENT_CLIENTS;
}

static void rbd_start(struct storage *base, struct storage_request *r)
{
	struct rbd_storage *s = rbd_of(base);
	struct rbd_work *w = &s->work[r->index];
	w->is_flush = false;
	if (is_changeable(r)) {
		w->copy = malloc(r->d.length);
		if (!w->copy) {
			rbd_finish(s, w, -ENOMEM);
			return;
		}
		memcpy(w->copy, r->memory, r->d.length);
	}
	rbd_issue(s, w);
}

static void rbd_end(struct rbd_storage *s, int error)
{
	s->is_over = true;
	engine_fail(s->base.engine, error);
}

/* Errors after which no request is answered any more: a successor executes them, if one may follow. */
static void rbd_judge(struct rbd_storage *s, int64_t result)
{
	if (result == -ESHUTDOWN || result == -EROFS)
		rbd_end(s, (int)result);
	else if (result == -EINVAL)
		/* librbd says so of a request beyond the image's end, and the engine has compared it with the device's.
		 */
		rbd_end(s, -ENODATA);
}

static void rbd_hear(struct rbd_storage *s, struct rbd_work *w)
{
	const struct storage_request *r = engine_request(s->base.engine, w->index);
	s->in_flight--;
	if (w->result < 0) {
		rbd_judge(s, w->result);
		rbd_finish(s, w, (int32_t)w->result);
	} else if (r->d.op == WIRE_READ && (uint64_t)w->result < r->d.length) {
		rbd_end(s, -ENODATA);
		rbd_finish(s, w, -EIO);
	} else if (r->d.flags & WIRE_FUA && r->d.op != WIRE_READ && !w->is_flush) {
		w->is_flush = true;
		rbd_issue(s, w);
	} else {
		rbd_finish(s, w, full_result(r));
	}
}

static void rbd_hear_all(struct rbd_storage *s)
{
	struct rbd_work *w = __atomic_exchange_n(&s->answered, NULL, __ATOMIC_ACQUIRE);
	while (w) {
		struct rbd_work *next = w->next;
		rbd_hear(s, w);
		w = next;
	}
}

static int rbd_use_ring(struct storage *base, struct io_uring *ring)
{
	struct rbd_storage *s = rbd_of(base);
	s->ring = ring;
	s->bell = ring ? s->ring_bell : s->own_bell;
	s->listens = false;
	return 0;
}

static uint32_t rbd_prepare(struct storage *base)
{
	struct rbd_storage *s = rbd_of(base);
	struct io_uring_sqe *sqe = s->listens || !s->ring ? NULL : io_uring_get_sqe(s->ring);
	if (sqe) {
		io_uring_prep_read(sqe, s->ring_bell, &rung, sizeof rung, (uint64_t)-1);
		io_uring_sqe_set_data64(sqe, ENGINE_USER_DATA | BELL_INDEX);
		s->listens = true;
	}
	return s->ring && !s->listens;
}

static void rbd_complete(struct storage *base, uint32_t index, int32_t result)
{
	(void)index;
	(void)result;
	rbd_of(base)->listens = false;
	rbd_hear_all(rbd_of(base));
}

static int rbd_turn(struct storage *base)
{
	uint64_t events;
	/* Before the stack is taken: a thread that finds it empty afterwards rings again. */
	if (read(base->event_file, &events, sizeof events) < 0 && errno != EAGAIN)
		return -errno;
	rbd_hear_all(rbd_of(base));
	return 0;
}

static int rbd_open(struct storage *base, const struct engine_setup *setup)
{
	struct rbd_storage *s = rbd_of(base);
	uint32_t requests = setup->queues * setup->depth;
	s->work = calloc(requests, sizeof *s->work);
	if (!s->work)
		return -ENOMEM;
	for (uint32_t i = 0; i < requests; i++)
		s->work[i] = (struct rbd_work){ .storage = s, .index = i };
	/* io_uring waits for a read only if the file is not non-blocking. */
	s->ring_bell = eventfd(0, EFD_CLOEXEC);
	/* A descriptor of its own: threads of librbd's may ring after the engine has closed its own. */
	s->own_bell = fcntl(base->event_file, F_DUPFD_CLOEXEC, 0);
	if (s->ring_bell < 0 || s->own_bell < 0)
		return -errno;
	return slots_open(&s->slots, setup);
}

static void rbd_close(struct storage *base)
{
	struct rbd_storage *s = rbd_of(base);
	slots_close(&s->slots);
	/* What librbd still answers it writes to the storage's memory. */
	if (s->in_flight)
		return;
	while (__atomic_load_n(&s->pushing, __ATOMIC_ACQUIRE))
		sched_yield();
	for (int i = 0; i < 2; i++) {
		int file = i ? s->ring_bell : s->own_bell;
		if (file >= 0)
			close(file);
	}
	free(s->work);
	free(s);
}

static const struct storage_ops rbd_ops = {
	.open = rbd_open,
	.start = rbd_start,
	.use_ring = rbd_use_ring,
	.prepare = rbd_prepare,
	.complete = rbd_complete,
	.turn = rbd_turn,
	.close = rbd_close,
};

struct storage *storage_rbd_new(const struct rbd_calls *calls, uint64_t slot_bytes)
{
	struct rbd_storage *s = calloc(1, sizeof *s);
	if (!s)
		return NULL;
	s->base.ops = &rbd_ops;
	s->base.slots = &s->slots;
	s->slots.slot_bytes = slot_bytes;
	s->calls = *calls;
	s->ring_bell = s->own_bell = s->bell = -1;
	return &s->base;
}
