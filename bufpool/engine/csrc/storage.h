/* The interface between the engine and a storage. */
#ifndef UBLKPOOL_STORAGE_H
#define UBLKPOOL_STORAGE_H

#include <stdbool.h>

#include "engine.h"

#define NO_REGION UINT64_MAX

struct storage_request {
	struct wire_descriptor d;
	uint64_t region;       /* in the own segment, NO_REGION for none */
	uint64_t region_bytes; /* the requested length; the data may be shorter */
	uint8_t *memory;       /* the data of a read or a write; NULL: it is in the tag's fixed buffer */
	uint32_t index;        /* below queues * depth; no other unfinished request has it */
	uint8_t state;         /* enum state, the engine's */
	bool is_begun; /* by engine_begin(): it came without a descriptor and has a result in place of an answer */
};

struct storage_ops {
	/* Allocates; `engine` is set already.  Returns 0 or a negative errno. */
	int (*open)(struct storage *s, const struct engine_setup *setup);
	/* Starts a request and calls engine_finish() once, now or later.  The engine has checked offset, length and
	 * memory. */
	void (*start)(struct storage *s, struct storage_request *r);
	/* See engine_run(), whose arguments have been checked.  NULL: the storage cannot. */
	void (*run)(struct storage *s, uint8_t op, uint64_t offset, uint64_t length, uint8_t **memory);
	/* Names the region where a write shall land or a read's data lies.  Returns 1 and sets r->region; 0 for not
	 * now, and the engine asks again when a region was given back; or a negative errno.  This function and the next
	 * two are NULL in a storage with slots. */
	int (*name)(struct storage *s, struct storage_request *r);
	/* Takes r->region back, which no request uses any more. */
	void (*give_back)(struct storage *s, const struct storage_request *r);
	/* Forgets that the request waits for a region; the engine asks again for those that still wait.  NULL: the
	 * storage keeps no note of waiting requests. */
	void (*forget)(struct storage *s, const struct storage_request *r);
	/* See engine_resize().  NULL: the storage does not know its size. */
	void (*resize)(struct storage *s, uint64_t size_bytes);
	/* See engine_use_ring() and the functions below it.  All NULL: the storage needs no io_uring. */
	int (*use_ring)(struct storage *s, struct io_uring *ring);
	uint32_t (*prepare)(struct storage *s);
	void (*complete)(struct storage *s, uint32_t index, int32_t result);
	int (*turn)(struct storage *s);
	/* Called before answers are sent; after engine_fail() none are.  NULL: nothing is to be checked. */
	void (*before_answers)(struct storage *s);
	/* See engine_hand_out() and engine_collect().  Both NULL: the storage does its work itself. */
	uint32_t (*hand_out)(struct storage *s);
	void (*collect)(struct storage *s);
	void (*close)(struct storage *s);
};

/* The first member of every storage. */
struct storage {
	const struct storage_ops *ops;
	struct engine *engine;
	struct engine_statistics *count;
	int event_file;           /* the engine's */
	bool takes_fixed_buffers; /* see engine_setup */
	bool names_reads;         /* whether a read without a buffer gets a region */
	struct slots *slots;      /* regions are slots of these; NULL: the storage names its regions */
};

/* Ends a request.  `result`: the full length for reads and writes, 0 for other operations, or a negative errno.  The
 * storage must not touch the request's memory afterwards. */
void engine_finish(struct engine *engine, struct storage_request *request, int32_t result);
/* Ends the engine's use with `error`, a negative errno: no request is answered any more.  The storage still finishes
 * the requests that run. */
void engine_fail(struct engine *engine, int error);
/* Whether a fence came after the request was sent, so that its result is dropped. */
bool engine_is_old(const struct engine *engine, const struct storage_request *request);
/* The request with this index, which is also in the user_data of the storage's ring entries. */
struct storage_request *engine_request(struct engine *engine, uint32_t index);

static inline int32_t full_result_of(uint8_t op, uint64_t length)
{
	return op == WIRE_READ || op == WIRE_WRITE ? (int32_t)length : 0;
}

static inline int32_t full_result(const struct storage_request *r) { return full_result_of(r->d.op, r->d.length); }

#endif
