/* Regions of the own segment: named, waited for, given back, posted ahead. */
#include <errno.h>

#include "engine_internal.h"

#define POSTS_AT_ONCE 64u

static void region_named(struct engine *e, struct storage_request *r)
{
	if (r->d.kind == WIRE_PLACE) {
		r->state = NAMED;
		engine_name_in(e, engine_answer(e, &r->d, WIRE_PLACED, 0), r);
	} else {
		r->state = ANSWERED;
		engine_count_start(e, r);
		engine_answer_done(e, r, full_result(r));
	}
	e->count.lent++;
}

static void region_refused(struct engine *e, struct storage_request *r, int32_t problem)
{
	r->state = IDLE;
	if (r->d.kind == WIRE_PLACE)
		engine_answer(e, &r->d, WIRE_REJECT, problem);
	else
		engine_answer_done(e, r, problem);
}

/* False: the request must wait. */
static bool name_region(struct engine *e, struct storage_request *r)
{
	r->region_bytes = r->d.length;
	int named = e->storage->slots ? slots_name(e->storage->slots, r) : e->storage->ops->name(e->storage, r);
	if (named > 0)
		region_named(e, r);
	else if (named < 0)
		region_refused(e, r, named);
	return named;
}

static void wait_for_region(struct engine *e, struct storage_request *r)
{
	r->state = WAITING;
	e->count.waited++;
	fifo_push(&e->waiting, r->index);
}

static void name_for_all_waiting(struct engine *e)
{
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

void engine_name_for_waiting(struct engine *e)
{
	e->came_back = false;
	if (!e->storage->slots)
		name_for_all_waiting(e);
	/* Strictly in their order of arrival, so that a request that needs a large slot is not overtaken for ever. */
	while (e->storage->slots && e->waiting.count && name_region(e, &e->requests[fifo_first(&e->waiting)]))
		fifo_pop(&e->waiting);
}

int engine_wants_regions(const struct engine *e) { return e->waiting.count > 0; }

void engine_give_back(struct engine *e, struct storage_request *r)
{
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

static void stop_waiting(struct engine *e, const struct storage_request *r)
{
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

void engine_abandon(struct engine *e, struct storage_request *r)
{
	if (r->state == WAITING)
		stop_waiting(e, r);
	engine_give_back(e, r);
}

void engine_ask_for_region(struct engine *e, struct storage_request *r, int32_t problem)
{
	if (!problem && !e->storage->slots && !e->storage->ops->name)
		problem = -EOPNOTSUPP;
	if (problem)
		region_refused(e, r, problem);
	else if ((e->storage->slots && e->waiting.count) || !name_region(e, r))
		wait_for_region(e, r);
}

uint64_t engine_claim(struct engine *e, const struct wire_descriptor *d)
{
	if (!e->storage->slots || d->segment != e->setup.own_segment)
		return 0;
	return slots_claim(e->storage->slots, d->queue, d->epoch, d->buffer);
}

void engine_forget_posts(struct engine *e, uint32_t queue, uint32_t epoch)
{
	if (e->storage->slots)
		slots_unpost(e->storage->slots, queue, epoch);
	e->came_back = e->posts_due = true;
}

static void post(struct engine *e, uint32_t queue)
{
	uint64_t regions[POSTS_AT_ONCE], bytes;
	uint32_t count;
	struct wire_descriptor d = { .device = e->setup.device,
				     .queue = (uint16_t)queue,
				     .epoch = e->queues[queue].worker_epoch };
	while ((count = slots_post(e->storage->slots, queue, d.epoch, &bytes, regions, POSTS_AT_ONCE))) {
		for (uint32_t i = 0; i < count; i++) {
			struct wire_descriptor *said = engine_answer(e, &d, WIRE_POST, 0);
			said->length = bytes;
			said->segment = e->setup.own_segment;
			said->buffer = regions[i];
		}
		e->count.posted += count;
	}
}

void engine_post_to_all(struct engine *e)
{
	e->posts_due = false;
	for (uint32_t queue = 0; e->storage->slots && queue < e->setup.queues; queue++)
		if (e->queues[queue].is_welcome)
			post(e, queue);
}
