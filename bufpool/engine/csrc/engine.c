#include <errno.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "engine_internal.h"

static uint32_t index_of(const struct engine *e, const struct wire_descriptor *d)
{
	return d->queue * e->setup.depth + d->tag;
}

static bool wants_region(const struct engine *e, const struct wire_descriptor *d)
{
	return d->kind == WIRE_PLACE ||
	       (d->op == WIRE_READ && d->segment == WIRE_SEGMENT_NONE && e->storage->names_reads);
}

static void finish_fence(struct engine *e, struct queue *q)
{
	if (q->fenced && q->running_old == 0) {
		q->fenced = false;
		e->count.fenced++;
		engine_answer(e, &q->fence, WIRE_FENCED, 0);
	}
}

void engine_finish(struct engine *e, struct storage_request *r, int32_t result)
{
	struct queue *q = &e->queues[r->d.queue];
	bool is_old = engine_is_old(e, r);
	q->running--;
	if (is_old) {
		q->running_old--;
		e->count.dropped++;
		engine_give_back(e, r);
	} else {
		if (e->error)
			e->count.dropped++;
		else
			(r->is_begun ? engine_add_result : engine_answer_done)(e, r, result);
		/* Without an answer, too: the region may hold the only copy of a write's data. */
		r->state = r->region != NO_REGION ? ANSWERED : IDLE;
	}
	finish_fence(e, q);
}

static bool fits(uint64_t offset, uint64_t length, uint64_t limit)
{
	return offset <= limit && length <= limit - offset;
}

int32_t engine_objection(const struct engine *e, uint8_t op, uint64_t offset, uint64_t length)
{
	bool moves = op == WIRE_READ || op == WIRE_WRITE;
	if (op > WIRE_WRITE_ZEROES || op == 4)
		return -EOPNOTSUPP;
	if (op != WIRE_FLUSH && !fits(offset, length, e->setup.size_bytes))
		return -EINVAL;
	if (moves && (length == 0 || length > INT32_MAX))
		return -EINVAL;
	if (e->setup.read_only && op != WIRE_READ && op != WIRE_FLUSH)
		return -EPERM;
	return 0;
}

static int32_t objection(const struct engine *e, const struct wire_descriptor *d)
{
	if (d->kind != WIRE_REQUEST && d->op != WIRE_WRITE)
		return -EOPNOTSUPP;
	return engine_objection(e, d->op, d->offset, d->length);
}

static int32_t find_memory(const struct engine *e, struct storage_request *r)
{
	const struct wire_descriptor *d = &r->d;
	if (d->op != WIRE_READ && d->op != WIRE_WRITE)
		return 0;
	if (r->region != NO_REGION)
		r->memory = e->setup.own + r->region;
	else if (d->segment == WIRE_SEGMENT_NONE && e->setup.fixed_buffers)
		r->memory = NULL;
	else if (d->segment == WIRE_SEGMENT_POOL && fits(d->buffer, d->length, e->setup.pool_bytes))
		r->memory = e->setup.pool + d->buffer;
	else if (d->segment >= WIRE_SEGMENT_CLIENTS && fits(d->buffer, d->length, e->setup.slice_bytes) &&
		 e->setup.slices[d->segment - WIRE_SEGMENT_CLIENTS])
		r->memory = e->setup.slices[d->segment - WIRE_SEGMENT_CLIENTS] + d->buffer;
	else
		return -EFAULT;
	return 0;
}

static void start(struct engine *e, struct storage_request *r, int32_t problem)
{
	r->state = RUNNING;
	e->queues[r->d.queue].running++;
	engine_count_start(e, r);
	if (!problem)
		problem = find_memory(e, r);
	if (problem)
		engine_finish(e, r, problem);
	else
		e->storage->ops->start(e->storage, r);
}

static void take_request(struct engine *e, struct storage_request *r, const struct wire_descriptor *d)
{
	r->d = *d;
	r->is_begun = false;
	int32_t problem = objection(e, d);
	(wants_region(e, d) ? engine_ask_for_region : start)(e, r, problem);
}

static bool is_same(const struct storage_request *r, const struct wire_descriptor *d)
{
	return r->d.epoch == d->epoch && r->d.sequence == d->sequence;
}

static void take_posted(struct engine *e, struct storage_request *r, const struct wire_descriptor *d)
{
	uint64_t bytes = engine_claim(e, d);
	if (!bytes) {
		e->count.dropped++;
		return;
	}
	engine_abandon(e, r);
	r->d = *d;
	r->region = d->buffer;
	r->region_bytes = bytes;
	e->count.lent++;
	e->count.unasked++;
	e->posts_due = true;
	start(e, r, d->length > bytes ? -EINVAL : objection(e, d));
}

static void take_placed(struct engine *e, struct storage_request *r, const struct wire_descriptor *d)
{
	if (d->length > r->d.length) {
		e->count.dropped++;
		return;
	}
	r->d.length = d->length;
	r->d.flags |= d->flags;
	start(e, r, d->length ? 0 : -EINVAL);
}

static int take_data(struct engine *e, struct storage_request *r, const struct wire_descriptor *d)
{
	if (r->state == NAMED && is_same(r, d))
		take_placed(e, r, d);
	else if (r->state == RUNNING)
		return -EPROTO;
	else
		take_posted(e, r, d);
	return 0;
}

static void take_release(struct engine *e, struct storage_request *r, const struct wire_descriptor *d)
{
	if (may_let_go(r) && is_same(r, d)) {
		engine_abandon(e, r);
	} else if (engine_claim(e, d)) {
		slots_give_back(e->storage->slots, d->buffer);
		e->came_back = e->posts_due = true;
	}
}

static void take_welcome(struct engine *e, const struct wire_descriptor *d)
{
	struct queue *q = &e->queues[d->queue];
	q->worker_epoch = d->epoch;
	q->is_welcome = true;
	engine_forget_posts(e, d->queue, d->epoch);
}

static void take_fence(struct engine *e, const struct wire_descriptor *d)
{
	struct queue *q = &e->queues[d->queue];
	if (d->epoch > q->epoch) {
		/* Threads of the author's read it (calls_is_old). */
		__atomic_store_n(&q->epoch, d->epoch, __ATOMIC_RELAXED);
		q->running_old = q->running;
	}
	for (uint32_t tag = 0; tag < e->setup.depth; tag++) {
		struct storage_request *r = &e->requests[d->queue * e->setup.depth + tag];
		if (may_let_go(r) && r->d.epoch < q->epoch)
			engine_abandon(e, r);
	}
	engine_forget_posts(e, d->queue, d->epoch);
	q->fence = *d;
	q->fenced = true;
	finish_fence(e, q);
}

/* A descriptor that concerns one request. */
static int take_own(struct engine *e, const struct wire_descriptor *d)
{
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
		engine_abandon(e, r);
		/* Waiting requests get the region that this tag had before the tag's next request asks for one. */
		if (e->came_back)
			engine_name_for_waiting(e);
		take_request(e, r, d);
	}
	return 0;
}

static int take(struct engine *e, const struct wire_descriptor *d)
{
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

int engine_take(struct engine *e, const struct wire_descriptor *descriptors, uint32_t count)
{
	const uint8_t *at = (const uint8_t *)descriptors;
	int error = 0;
	for (; count && !error; count--, at += sizeof *descriptors) {
		struct wire_descriptor d;
		memcpy(&d, at, sizeof d);
		error = take(e, &d);
		if (e->came_back)
			engine_name_for_waiting(e);
	}
	if (e->posts_due)
		engine_post_to_all(e);
	return error;
}

struct storage_request *engine_request(struct engine *e, uint32_t index) { return &e->requests[index]; }

int engine_file(const struct engine *e) { return e->event_file; }

int engine_error(const struct engine *e) { return e->error; }

void engine_resize(struct engine *e, uint64_t size_bytes)
{
	e->setup.size_bytes = size_bytes;
	if (e->storage->ops->resize)
		e->storage->ops->resize(e->storage, size_bytes);
}

void engine_fail(struct engine *e, int error)
{
	if (!e->error)
		e->error = error;
}

int engine_turn(struct engine *e)
{
	int error = e->storage->ops->turn ? e->storage->ops->turn(e->storage) : 0;
	if (e->came_back)
		engine_name_for_waiting(e);
	return error ? error : engine_error(e);
}

int engine_use_ring(struct engine *e, struct io_uring *ring)
{
	return e->storage->ops->use_ring ? e->storage->ops->use_ring(e->storage, ring) : 0;
}

uint32_t engine_prepare(struct engine *e)
{
	return e->storage->ops->prepare ? e->storage->ops->prepare(e->storage) : 0;
}

void engine_complete(struct engine *e, uint64_t user_data, int32_t result)
{
	e->storage->ops->complete(e->storage, (uint32_t)user_data, result);
	if (e->came_back)
		engine_name_for_waiting(e);
}

/* Regions may have been given back while the caller's work was collected or handed out. */
static void settle(struct engine *e)
{
	if (e->came_back)
		engine_name_for_waiting(e);
	if (e->posts_due)
		engine_post_to_all(e);
}

uint32_t engine_hand_out(struct engine *e)
{
	uint32_t count = e->storage->ops->hand_out ? e->storage->ops->hand_out(e->storage) : 0;
	settle(e);
	return count;
}

void engine_collect(struct engine *e)
{
	if (e->storage->ops->collect)
		e->storage->ops->collect(e->storage);
	settle(e);
}

void engine_ask_again(struct engine *e)
{
	e->came_back = true;
	settle(e);
}

bool engine_is_old(const struct engine *e, const struct storage_request *r)
{
	return r->d.epoch < __atomic_load_n(&e->queues[r->d.queue].epoch, __ATOMIC_RELAXED);
}

void engine_count(const struct engine *e, struct engine_statistics *statistics)
{
	*statistics = e->count;
	for (uint32_t queue = 0; queue < e->setup.queues; queue++)
		statistics->running += e->queues[queue].running;
	statistics->waiting = e->waiting.count;
}

uint32_t engine_running(const struct engine *e, struct wire_descriptor *out, uint32_t most)
{
	uint32_t count = 0;
	for (uint32_t i = 0; i < e->setup.queues * e->setup.depth; i++) {
		if (e->requests[i].state != RUNNING)
			continue;
		if (count < most)
			out[count] = e->requests[i].d;
		count++;
	}
	return count;
}

static bool open_queues(struct engine *e)
{
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

static bool open_memory(struct engine *e)
{
	uint32_t requests = e->setup.queues * e->setup.depth;
	e->requests = calloc(requests, sizeof *e->requests);
	for (uint32_t i = 0; e->requests && i < requests; i++)
		e->requests[i] = (struct storage_request){ .region = NO_REGION, .index = i };
	return e->requests && open_queues(e) && engine_open_results(e) && fifo_open(&e->waiting, requests);
}

static int open_storage(struct engine *e)
{
	struct storage *s = e->storage;
	s->engine = e;
	s->count = &e->count;
	s->event_file = e->event_file;
	if (e->setup.fixed_buffers && (!s->takes_fixed_buffers || e->setup.queues != 1))
		return -EOPNOTSUPP;
	int error = s->ops->open(s, &e->setup);
	return error ? error : engine_use_ring(e, NULL);
}

struct engine *engine_open(const struct engine_setup *setup, struct storage *storage, int *error)
{
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

void engine_close(struct engine *e)
{
	e->storage->ops->close(e->storage);
	if (e->event_file >= 0)
		close(e->event_file);
	for (uint32_t i = 0; e->queues && i < e->setup.queues; i++)
		free(e->queues[i].answers.items);
	free(e->queues);
	free(e->requests);
	free(e->waiting.items);
	free(e->results.items);
	free(e);
}
