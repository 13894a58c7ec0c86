/* A disk in the own segment.  The region named for a write or a read is the disk's own blocks, so that placed data
 * never moves.  No byte is lent twice at once: a request waits if it overlaps a lent region, or a region that an
 * earlier request waits for. */
#include <errno.h>
#include <string.h>

#include "blocks.h"
#include "storage.h"

struct memory_storage {
	struct storage base;
	uint8_t *disk;
	struct blocks lent, claimed; /* claimed: a request waits for these blocks */
};

static struct memory_storage *memory_of(struct storage *s) { return (struct memory_storage *)s; }

static int memory_open(struct storage *s, const struct engine_setup *setup)
{
	struct memory_storage *m = memory_of(s);
	if (setup->own_bytes < setup->size_bytes)
		return -EINVAL;
	m->disk = setup->own;
	return blocks_open(&m->lent, setup->own_bytes) && blocks_open(&m->claimed, setup->own_bytes) ? 0 : -ENOMEM;
}

static void memory_start(struct storage *s, struct storage_request *r)
{
	uint8_t *disk = memory_of(s)->disk;

	/* The offset of a FLUSH has no meaning and was not checked. */
	switch (r->d.op) {
	case WIRE_READ:
		memcpy(r->memory, disk + r->d.offset, r->d.length);
		break;
	case WIRE_WRITE:
		if (r->region == NO_REGION)
			memcpy(disk + r->d.offset, r->memory, r->d.length);
		break;
	case WIRE_DISCARD:
	case WIRE_WRITE_ZEROES:
		memset(disk + r->d.offset, 0, r->d.length);
		break;
	default: /* WIRE_FLUSH */
		break;
	}
	engine_finish(s->engine, r, full_result(r));
}

/* A write's data is copied to where it stays, a read's from there. */
static void memory_run(struct storage *s, uint8_t op, uint64_t offset, uint64_t length, uint8_t **memory)
{
	*memory = memory_of(s)->disk + offset;
	if (op == WIRE_DISCARD || op == WIRE_WRITE_ZEROES)
		memset(*memory, 0, length);
}

static int memory_name(struct storage *s, struct storage_request *r)
{
	struct memory_storage *m = memory_of(s);
	if (blocks_any(&m->lent, r->d.offset, r->d.length) || blocks_any(&m->claimed, r->d.offset, r->d.length)) {
		blocks_set(&m->claimed, r->d.offset, r->d.length);
		return 0;
	}
	blocks_set(&m->lent, r->d.offset, r->d.length);
	r->region = r->d.offset;
	return 1;
}

static void memory_give_back(struct storage *s, const struct storage_request *r)
{
	blocks_clear(&memory_of(s)->lent, r->region, r->region_bytes);
}

static void memory_forget(struct storage *s, const struct storage_request *r)
{
	blocks_clear(&memory_of(s)->claimed, r->d.offset, r->d.length);
}

static void memory_close(struct storage *s)
{
	blocks_close(&memory_of(s)->lent);
	blocks_close(&memory_of(s)->claimed);
	free(s);
}

static const struct storage_ops memory_ops = {
	.open = memory_open,
	.start = memory_start,
	.run = memory_run,
	.name = memory_name,
	.give_back = memory_give_back,
	.forget = memory_forget,
	.close = memory_close,
};

struct storage *storage_memory_new(int names_reads)
{
	struct memory_storage *m = calloc(1, sizeof *m);
	if (!m)
		return NULL;
	m->base.ops = &memory_ops;
	m->base.names_reads = names_reads;
	return &m->base;
}
