#include "calls.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "engine_internal.h"

struct calls {
	struct storage base;
	struct slots slots;
	void *handle;
	struct fifo reads, writes, others;
	struct engine_setup setup;
	struct calls_places places;
	struct calls_batch batch;
	bool is_out; /* the caller has the batch */
};

/* The backend's functions for regions, in Python (bufpool/sdk/calls.py): cffi defines them and takes the GIL. */
int64_t calls_place(void *handle, int is_write, uint64_t offset, uint64_t length, uint32_t flags);
void calls_released(void *handle, uint64_t region);

static struct calls *calls_of(struct storage *s) { return (struct calls *)s; }

static int calls_open_slots(struct calls *c, const struct engine_setup *setup)
{
	struct engine_setup part = *setup;
	part.own_bytes = c->places.slots_bytes;
	/* A backend that names no places needs a slot for the largest write. */
	while (c->places.asks && part.post_sizes && part.post_bytes[part.post_sizes - 1] > c->places.post_max_bytes)
		part.post_sizes--;
	return slots_open(&c->slots, &part);
}

static int calls_open(struct storage *s, const struct engine_setup *setup)
{
	struct calls *c = calls_of(s);
	uint32_t most = setup->queues * setup->depth;
	c->setup = *setup;
	if (!fifo_open(&c->reads, most) || !fifo_open(&c->writes, most) || !fifo_open(&c->others, most))
		return -ENOMEM;
	return s->slots ? calls_open_slots(c, setup) : 0;
}

static void calls_close(struct storage *s)
{
	struct calls *c = calls_of(s);
	free(c->reads.items);
	free(c->writes.items);
	free(c->others.items);
	if (s->slots)
		slots_close(s->slots);
	free(c);
}

static void calls_start(struct storage *s, struct storage_request *r)
{
	struct calls *c = calls_of(s);
	if (c->places.in_order)
		fifo_push(&c->others, r->index);
	else
		fifo_push(r->d.op == WIRE_READ ? &c->reads : r->d.op == WIRE_WRITE ? &c->writes : &c->others, r->index);
}

static uint32_t area_of(const struct storage_request *r)
{
	if (r->region != NO_REGION)
		return CALLS_OWN;
	return r->d.segment >= WIRE_SEGMENT_CLIENTS ? CALLS_CLIENTS + (r->d.segment - WIRE_SEGMENT_CLIENTS)
						    : CALLS_POOL;
}

static uint32_t way_of(const struct storage_request *r)
{
	uint32_t area = area_of(r) << CALLS_AREA_SHIFT;
	if (r->d.op == WIRE_READ)
		return CALLS_READ | area;
	if (r->d.op == WIRE_WRITE)
		return (r->d.flags & WIRE_FUA ? CALLS_WRITE_FUA : CALLS_WRITE) | area;
	return CALLS_NO_DATA;
}

static const uint8_t *area_memory(const struct calls *c, uint32_t area)
{
	if (area == CALLS_POOL)
		return c->setup.pool;
	return area == CALLS_OWN ? c->setup.own : c->setup.slices[area - CALLS_CLIENTS];
}

static void add_to_run(const struct calls_batch *b, uint32_t way)
{
	uint32_t at = b->head[CALLS_COUNT], runs = b->head[CALLS_RUNS];
	uint32_t *last = runs ? b->run + (size_t)(runs - 1) * CALLS_RUN : NULL;
	if (!last || last[CALLS_RUN_WAY] != way) {
		last = b->run + (size_t)runs * CALLS_RUN;
		b->head[CALLS_RUNS]++;
		last[CALLS_RUN_WAY] = way;
		last[CALLS_RUN_FIRST] = at;
	}
	last[CALLS_RUN_END] = at + 1;
}

static void add_call(struct calls *c, const struct storage_request *r)
{
	const struct calls_batch *b = &c->batch;
	uint32_t i = b->head[CALLS_COUNT], way = way_of(r);
	const uint8_t *memory = area_memory(c, way >> CALLS_AREA_SHIFT);
	add_to_run(b, way);
	b->offset[i] = r->d.offset;
	b->length[i] = r->d.length;
	b->start[i] = way == CALLS_NO_DATA ? 0 : (uint64_t)(r->memory - memory);
	b->end[i] = way == CALLS_NO_DATA ? 0 : b->start[i] + r->d.length;
	b->index[i] = r->index;
	b->flags[i] = r->d.flags;
	b->op[i] = r->d.op;
	b->result[i] = full_result(r);
	b->later[i] = 0;
	b->head[CALLS_COUNT]++;
}

static void hand_out_all(struct calls *c, struct fifo *from)
{
	struct engine *e = c->base.engine;
	while (from->count) {
		struct storage_request *r = engine_request(e, fifo_pop(from));
		/* A fence came after the request, which is dropped before it begins. */
		if (engine_is_old(e, r))
			engine_finish(e, r, 0);
		else
			add_call(c, r);
	}
}

static uint32_t calls_hand_out(struct storage *s)
{
	struct calls *c = calls_of(s);
	uint32_t *head = c->batch.head;
	head[CALLS_COUNT] = head[CALLS_RUNS] = 0;
	hand_out_all(c, &c->reads);
	hand_out_all(c, &c->writes);
	head[CALLS_MOVES] = head[CALLS_COUNT];
	hand_out_all(c, &c->others);
	c->is_out = head[CALLS_COUNT] > 0;
	return head[CALLS_COUNT];
}

static void finish(struct calls *c, struct storage_request *r, int32_t result)
{
	if (result > full_result(r)) {
		c->batch.head[CALLS_OVERLONG]++;
		result = -EIO;
	}
	engine_finish(c->base.engine, r, result);
}

static void calls_collect(struct storage *s)
{
	struct calls *c = calls_of(s);
	const struct calls_batch *b = &c->batch;
	for (uint32_t i = 0; c->is_out && i < b->head[CALLS_COUNT]; i++)
		if (!b->later[i])
			finish(c, engine_request(s->engine, b->index[i]), b->result[i]);
	c->is_out = false;
}

void calls_finish(struct storage *s, uint32_t index, int32_t result)
{
	finish(calls_of(s), engine_request(s->engine, index), result);
}

bool calls_is_old(const struct storage *s, uint32_t index)
{
	return engine_is_old(s->engine, engine_request(s->engine, index));
}

static int calls_name(struct storage *s, struct storage_request *r)
{
	int64_t region =
		calls_place(calls_of(s)->handle, r->d.kind == WIRE_PLACE, r->d.offset, r->d.length, r->d.flags);
	if (region >= 0)
		r->region = (uint64_t)region;
	/* -1: not now; a refusal is -1 - errno, so that no errno reads as -1. */
	return region >= 0 ? 1 : region == -1 ? 0 : (int)(region + 1);
}

static void calls_give_back(struct storage *s, const struct storage_request *r)
{
	calls_released(calls_of(s)->handle, r->region);
}

uint32_t calls_copy(const struct storage *s, uint8_t *memory, uint64_t bytes, const uint64_t *at)
{
	const struct calls *c = (const struct calls *)s;
	const struct calls_batch *b = &c->batch;
	at = at ? at : b->offset;
	for (uint32_t i = 0; i < b->head[CALLS_MOVES]; i++)
		if (at[i] > bytes || b->length[i] > bytes - at[i])
			return i + 1;
	for (uint32_t i = 0; i < b->head[CALLS_MOVES]; i++) {
		uint8_t *data = engine_request(s->engine, b->index[i])->memory;
		if (b->result[i] < 0 || b->later[i])
			continue;
		if (b->op[i] == WIRE_READ)
			memcpy(data, memory + at[i], b->length[i]);
		else
			memcpy(memory + at[i], data, b->length[i]);
	}
	return 0;
}

static const struct storage_ops calls_ops = {
	.open = calls_open,
	.start = calls_start,
	.name = calls_name,
	.give_back = calls_give_back,
	.hand_out = calls_hand_out,
	.collect = calls_collect,
	.close = calls_close,
};

struct storage *storage_calls_new(void *handle, const struct calls_batch *batch, const struct calls_places *places)
{
	struct calls *c = calloc(1, sizeof *c);
	if (!c)
		return NULL;
	c->base.ops = &calls_ops;
	c->places = *places;
	c->base.names_reads = !places->slots_bytes;
	c->base.slots = places->slots_bytes ? &c->slots : NULL;
	c->slots.slot_bytes = places->slot_bytes;
	c->slots.asked = places->asks ? &c->base : NULL;
	c->handle = handle;
	c->batch = *batch;
	return &c->base;
}
