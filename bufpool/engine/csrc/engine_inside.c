/* Requests that come without descriptors, from the worker in whose process the engine is: run within the call, or begun
 * here and finished by the storage later. */
#include <errno.h>
#include <stdlib.h>

#include "engine_internal.h"

int engine_can_run(const struct engine *e) { return e->storage->ops->run != NULL; }

int32_t engine_run(struct engine *e, uint8_t op, uint64_t offset, uint64_t length, uint8_t **memory)
{
	int32_t problem = engine_objection(e, op, offset, length), result = full_result_of(op, length);
	if (!problem)
		e->storage->ops->run(e->storage, op, offset, length, memory);
	e->count.requests++;
	engine_count_end(e, op, length, problem ? problem : result);
	return problem ? problem : result;
}

int engine_can_begin(const struct engine *e) { return e->setup.queues == 1; }

bool engine_open_results(struct engine *e)
{
	if (engine_can_begin(e))
		e->results.items = calloc(2 * (size_t)e->setup.depth, sizeof *e->results.items);
	return e->results.items || !engine_can_begin(e);
}

static bool lacks_memory(const struct engine *e, const struct engine_request *from)
{
	return (from->op == WIRE_READ || from->op == WIRE_WRITE) && !from->memory && !e->setup.fixed_buffers;
}

static void fill(const struct engine *e, struct storage_request *r, const struct engine_request *from)
{
	r->d = (struct wire_descriptor){
		.kind = WIRE_REQUEST,
		.op = from->op,
		.flags = from->flags,
		.device = e->setup.device,
		.tag = from->tag,
		.epoch = e->queues->epoch,
		.sequence = from->sequence,
		.offset = from->offset,
		.length = from->length,
		.segment = from->memory ? WIRE_SEGMENT_POOL : WIRE_SEGMENT_NONE,
	};
	r->memory = from->memory;
	r->state = RUNNING;
	r->is_begun = true;
}

void engine_begin(struct engine *e, const struct engine_request *from)
{
	struct storage_request *r = from->tag < e->setup.depth ? &e->requests[from->tag] : NULL;
	/* A tag's earlier request would lose its answer; one with a region would lose that. */
	if (!r || r->state != IDLE) {
		engine_fail(e, -EPROTO);
		return;
	}
	int32_t problem = engine_objection(e, from->op, from->offset, from->length);
	fill(e, r, from);
	e->queues->running++;
	e->count.requests++;
	if (!problem && lacks_memory(e, from))
		problem = -EFAULT;
	if (problem)
		engine_finish(e, r, problem);
	else
		e->storage->ops->start(e->storage, r);
}

void engine_add_result(struct engine *e, const struct storage_request *r, int32_t result)
{
	struct results *out = &e->results;
	/* A tag gets no second request before its first one's result was returned. */
	if (out->count == e->setup.depth) {
		engine_fail(e, -EPROTO);
		return;
	}
	engine_count_end(e, r->d.op, r->d.length, result);
	out->items[out->half + out->count++] =
		(struct engine_result){ .sequence = r->d.sequence, .result = result, .tag = r->d.tag };
}

uint32_t engine_results(struct engine *e, const struct engine_result **results)
{
	struct results *out = &e->results;
	uint32_t count = out->count;
	if (!count)
		return 0;
	if (e->storage->ops->before_answers)
		e->storage->ops->before_answers(e->storage);
	*results = out->items + out->half;
	out->half = e->setup.depth - out->half;
	out->count = 0;
	return e->error ? 0 : count;
}

const struct engine_calls *engine_calls(void)
{
	static const struct engine_calls calls = {
		.take = engine_take,
		.answers = engine_answers,
		.answers_sent = engine_answers_sent,
		.use_ring = engine_use_ring,
		.prepare = engine_prepare,
		.complete = engine_complete,
		.error = engine_error,
		.can_run = engine_can_run,
		.run = engine_run,
		.can_begin = engine_can_begin,
		.begin = engine_begin,
		.results = engine_results,
	};
	return &calls;
}
