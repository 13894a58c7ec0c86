/* What the engine asks of a storage, and what a storage tells the engine. */
#ifndef UBLKPOOL_STORAGE_H
#define UBLKPOOL_STORAGE_H

#include <stdbool.h>

#include "engine.h"

#define NO_REGION UINT64_MAX

struct storage_request {
	struct wire_descriptor d;
	uint64_t region;       /* in the own segment, NO_REGION for none */
	uint64_t region_bytes; /* what was asked for; the data may be less */
	uint8_t *memory;       /* a read's or a write's data */
	uint32_t index;        /* below queues * depth, this request's alone until it is finished */
	uint8_t state;         /* the engine's */
};

struct storage_ops {
	/* The engine is there: allocate.  0 or a negative errno. */
	int (*open)(struct storage *s, const struct engine_setup *setup);
	/* Start it, and call engine_finish() once, now or later.  Offset, length and memory have been judged. */
	void (*start)(struct storage *s, struct storage_request *r);
	/* Name the region where a write shall land or a read's data lies: 1 and r->region, 0 for not now, or a negative
	 * errno.  Who got 0 is asked again when something was given back.  NULL, like the next two: see storage.slots.
	 */
	int (*name)(struct storage *s, struct storage_request *r);
	/* No request has r->region any more. */
	void (*give_back)(struct storage *s, const struct storage_request *r);
	/* It waits no longer.  Those that do will be asked again.  NULL: it keeps no note of who waits. */
	void (*forget)(struct storage *s, const struct storage_request *r);
	/* See engine_use_ring() and what follows it.  NULL, all of them: it needs no io_uring. */
	int (*use_ring)(struct storage *s, struct io_uring *ring);
	uint32_t (*prepare)(struct storage *s);
	void (*complete)(struct storage *s, uint32_t index, int32_t result);
	int (*turn)(struct storage *s);
	/* See engine_hand_out() and engine_collect().  NULL, both: it does its work itself. */
	uint32_t (*hand_out)(struct storage *s);
	void (*collect)(struct storage *s);
	void (*close)(struct storage *s);
};

/* The first member of every storage. */
struct storage {
	const struct storage_ops *ops;
	struct engine *engine;
	struct engine_statistics *count;
	int event_file;      /* the engine's */
	bool names_reads;    /* a read that brings no buffer gets a region */
	struct slots *slots; /* its regions are these, whatever lands there; NULL: it names its own */
};

/* Full length for reads and writes, 0 for the rest, or a negative errno.  The request's memory is not touched again. */
void engine_finish(struct engine *engine, struct storage_request *request, int32_t result);
/* It can serve no longer: `error`, a negative errno, ends the engine's use, and no
 * request is answered any more.  Those that run are still finished. */
void engine_fail(struct engine *engine, int error);
/* A fence came after the request was sent: its result is not wanted any more. */
bool engine_is_old(const struct engine *engine, const struct storage_request *request);
/* By index, as the storage's entries in the ring are named. */
struct storage_request *engine_request(struct engine *engine, uint32_t index);

static inline int32_t full_result(const struct storage_request *r)
{
	return r->d.op == WIRE_READ || r->d.op == WIRE_WRITE ? (int32_t)r->d.length : 0;
}

#endif
