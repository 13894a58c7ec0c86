/* A storage whose caller does the work: requests go out in columns, and the results come back in one more.
 *
 * Owns the requests that wait to be handed out, and the batch that the caller has.  The caller executes a batch and
 * writes the results into it; a request that is not done yet is marked in `later` and finished by calls_finish().
 * Fences, regions and posts are the engine's.  Of Python the storage knows only two functions that name and take back
 * regions, which `_engine_build.py` declares.
 */
#ifndef UBLKPOOL_CALLS_H
#define UBLKPOOL_CALLS_H

#include <stdbool.h>
#include <stdint.h>

#include "engine.h"

/* The way of a run, which its requests share: the operation, and above CALLS_AREA_SHIFT the area of the data. */
enum { CALLS_READ = 0, CALLS_WRITE = 1, CALLS_WRITE_FUA = 2, CALLS_NO_DATA = 3 };
enum { CALLS_AREA_SHIFT = 2, CALLS_POOL = 0, CALLS_OWN = 1, CALLS_CLIENTS = 2 }; /* + n: slice n */

/* The numbers at the head of a batch, and those of a run: neighbours in the batch with the same way. */
enum { CALLS_COUNT, CALLS_RUNS, CALLS_MOVES, CALLS_OVERLONG, CALLS_HEAD }; /* CALLS_MOVES: reads and writes */
enum { CALLS_RUN_WAY, CALLS_RUN_FIRST, CALLS_RUN_END, CALLS_RUN };

/* The caller's memory: columns for as many requests as there are tags.  Reads come first, then writes, then requests
 * without data, each kind in its order of arrival. */
struct calls_batch {
	uint32_t *head; /* CALLS_HEAD numbers; CALLS_OVERLONG: results that were larger than their request, ever */
	uint32_t *run;  /* CALLS_RUN numbers for each run */
	uint64_t *offset, *length;
	uint64_t *start, *end; /* of the data, in the area that the run's way names */
	uint32_t *index;       /* identifies the request in calls_finish */
	uint16_t *flags;
	uint8_t *op;
	int32_t *result; /* all bytes moved, unless the backend writes another result */
	uint8_t *later;  /* 1: not done yet, see calls_finish */
};

struct calls_places {
	uint64_t slots_bytes; /* the first bytes of the own segment, divided into slots for writes; 0: no slots */
	uint64_t slot_bytes;  /* of one slot, if no size can be posted */
	int asks; /* a write without a posted slot asks the handle (calls_place, calls_released) for its place */
	uint64_t post_max_bytes; /* with `asks`: the largest write that posted slots hold */
	int in_order;            /* the batch keeps the order of arrival instead of having reads first */
};

struct storage *storage_calls_new(void *handle, const struct calls_batch *batch, const struct calls_places *places);
/* Finishes a request that was marked as later. */
void calls_finish(struct storage *storage, uint32_t index, int32_t result);
/* Whether a fence came after a request that was marked as later, so that its result is dropped.  Any thread may ask,
 * until calls_finish(). */
bool calls_is_old(const struct storage *storage, uint32_t index);
/* Copies between `memory` and the data of the batch's reads and writes: request i at at[i], or at its offset on the
 * device if `at` is NULL.  Requests with an error and those for later are left out.  Returns 0, or 1 + the index of a
 * request that lies outside the `bytes` of `memory`, after which nothing was copied. */
uint32_t calls_copy(const struct storage *storage, uint8_t *memory, uint64_t bytes, const uint64_t *at);

#endif
