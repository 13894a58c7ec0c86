/* Each queue's answers until they are sent. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine_internal.h"

/* A free place at the end of the answers; NULL: out of memory. */
static struct wire_descriptor *answer_slot(struct answers *out)
{
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

struct wire_descriptor *engine_answer(struct engine *e, const struct wire_descriptor *to, uint8_t kind, int32_t result)
{
	static struct wire_descriptor nowhere;
	struct wire_descriptor *d = answer_slot(&e->queues[to->queue].answers);
	if (!d) {
		engine_fail(e, -ENOMEM);
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

void engine_name_in(const struct engine *e, struct wire_descriptor *d, const struct storage_request *r)
{
	d->segment = e->setup.own_segment;
	d->buffer = r->region;
}

void engine_count_start(struct engine *e, const struct storage_request *r)
{
	e->count.requests++;
	if (r->d.flags & WIRE_REPLAY)
		e->count.replayed++;
}

void engine_answer_done(struct engine *e, const struct storage_request *r, int32_t result)
{
	struct wire_descriptor *d = engine_answer(e, &r->d, WIRE_DONE, result);
	engine_count_end(e, r->d.op, r->d.length, result);
	if (result >= 0 && r->d.op == WIRE_READ && r->region != NO_REGION) {
		d->flags = WIRE_REGION;
		engine_name_in(e, d, r);
	}
}

void engine_count_end(struct engine *e, uint8_t op, uint64_t length, int32_t result)
{
	e->count.answered++;
	if (result < 0)
		e->count.failed++;
	else if (op == WIRE_READ)
		e->count.bytes_read += length;
	else if (op == WIRE_WRITE)
		e->count.bytes_written += length;
}

uint32_t engine_answers(struct engine *e, uint32_t queue, const struct wire_descriptor **answers)
{
	const struct answers *out = &e->queues[queue].answers;
	*answers = out->items + out->first;
	if (out->count && e->storage->ops->before_answers)
		e->storage->ops->before_answers(e->storage);
	return e->error ? 0 : out->count;
}

void engine_answers_sent(struct engine *e, uint32_t queue, uint32_t count)
{
	struct answers *out = &e->queues[queue].answers;
	out->count -= count;
	out->first = out->count ? out->first + count : 0;
}
