/* A storage that answers at once and keeps no data. */
#include <stdlib.h>

#include "slots.h"

struct null_storage {
	struct storage base;
	struct slots slots;
};

static int null_open(struct storage *s, const struct engine_setup *setup) { return slots_open(s->slots, setup); }

static void null_start(struct storage *s, struct storage_request *r) { engine_finish(s->engine, r, full_result(r)); }

static void null_run(struct storage *s, uint8_t op, uint64_t offset, uint64_t length, uint8_t **memory)
{
	*memory = NULL;
}

static void null_close(struct storage *s)
{
	slots_close(s->slots);
	free(s);
}

static const struct storage_ops null_ops = {
	.open = null_open, .start = null_start, .run = null_run, .close = null_close
};

struct storage *storage_null_new(uint64_t slot_bytes)
{
	struct null_storage *s = calloc(1, sizeof *s);
	if (!s)
		return NULL;
	s->base.ops = &null_ops;
	s->base.slots = &s->slots;
	s->slots.slot_bytes = slot_bytes;
	return &s->base;
}
