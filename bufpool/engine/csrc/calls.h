/* A storage whose work somebody else does: requests out in columns, results back in one more.
 *
 * Owns what waits to be handed out and the batch that is.  Its caller does a batch and leaves the results in it; who is
 * not done yet is marked there and finished by itself.  Everything else, fences, regions, posts, is the engine's.
 * Knows nothing of Python but two questions about regions, which `_engine_build.py` names.
 */
#ifndef UBLKPOOL_CALLS_H
#define UBLKPOOL_CALLS_H

#include <stdbool.h>
#include <stdint.h>

#include "engine.h"

/* What a run has in common: its operation, and where the data lies. */
enum { CALLS_READ = 0, CALLS_WRITE = 1, CALLS_WRITE_FUA = 2, CALLS_NO_DATA = 3 };
enum { CALLS_AREA_SHIFT = 2, CALLS_POOL = 0, CALLS_OWN = 1, CALLS_CLIENTS = 2 }; /* and the slices after the first */

/* What there is of a batch.  Runs are neighbours that are the same call. */
enum { CALLS_COUNT, CALLS_RUNS, CALLS_MOVES, CALLS_OVERLONG, CALLS_HEAD }; /* moves: reads and writes, of count */
enum { CALLS_RUN_WAY, CALLS_RUN_FIRST, CALLS_RUN_END, CALLS_RUN };

/* The caller's memory, columns for as many requests as there are tags.  Reads come first, then writes, then what has no
 * data, each as it came. */
struct calls_batch {
	uint32_t *head; /* CALLS_HEAD numbers; CALLS_OVERLONG: results that were larger than their request, ever */
	uint32_t *run;  /* CALLS_RUN numbers for each run */
	uint64_t *offset, *length;
	uint64_t *start, *end; /* of the data, in the area that its run's way names */
	uint32_t *index;       /* names it in calls_finish */
	uint16_t *flags;
	uint8_t *op;
	int32_t *result; /* all bytes moved, unless the backend writes another result */
	uint8_t *later;  /* 1: not done yet, see calls_finish */
};

struct calls_places {
	uint64_t slots_bytes; /* of the own segment, from its beginning, are slots for writes to land in; 0: none */
	uint64_t slot_bytes;  /* of one, if nothing can be posted */
	int asks;             /* who has no posted slot asks the handle (calls_place, calls_released), not for a slot */
	uint64_t post_max_bytes; /* then slots are posted for writes of up to so many bytes */
	int in_order;            /* the batch keeps the order of arrival instead of having reads first */
};

struct storage *storage_calls_new(void *handle, const struct calls_batch *batch, const struct calls_places *places);
/* One that was marked as later is done. */
void calls_finish(struct storage *storage, uint32_t index, int32_t result);
/* Whether a fence has overtaken one that was marked as later: its result is dropped.  For any thread, until
 * calls_finish. */
bool calls_is_old(const struct storage *storage, uint32_t index);
/* Copy between the data of the reads and writes of the batch and `memory`, each at at[i], NULL: at its offset on the
 * device.  Those with an error and those for later are left out.  0, or 1 + the index of one that lies outside: then
 * nothing is copied. */
uint32_t calls_copy(const struct storage *storage, uint8_t *memory, uint64_t bytes, const uint64_t *at);

#endif
