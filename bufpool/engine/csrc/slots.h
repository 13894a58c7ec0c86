/* Slots of the own segment, in a few sizes, for storages that only need somewhere for a write to land.
 *
 * Owns which slot is free, and which is posted to which queue: lent ahead, so that a write may land there without a
 * question.  At most half of the slots of a size are posted, so that a write which has to ask never waits for one that
 * lies with a queue that is idle.
 */
#ifndef UBLKPOOL_SLOTS_H
#define UBLKPOOL_SLOTS_H

#include "storage.h"

struct slot_size {
	uint64_t bytes, base;              /* the first lies at `base` in the segment */
	uint32_t first, count, posted_max; /* posted_max: to one queue */
	uint32_t *free, count_free;
};

struct slot_post {
	uint32_t epoch, queue;
	bool is_posted;
};

struct slots {
	uint64_t slot_bytes; /* of the only size, if nothing can be posted */
	uint32_t sizes, queues;
	struct slot_size size[ENGINE_POST_SIZES_MAX];
	struct slot_post *posts; /* by slot */
	uint32_t *posted;        /* how many, by queue and size */
	/* The storage that names places beside the slots (storage_ops.name, give_back) for requests without a posted
	 * slot; NULL: no storage does. */
	struct storage *asked;
};

/* 0 or -ENOMEM. */
int slots_open(struct slots *slots, const struct engine_setup *setup);
void slots_close(struct slots *slots);
/* As storage_ops.name and give_back: the smallest that fits and is free. */
int slots_name(struct slots *slots, struct storage_request *r);
void slots_give_back(struct slots *slots, uint64_t region);
/* What is to be posted to a queue now, of one size; how many regions of *bytes there are in `regions`, 0 if it has
 * enough.  Many at once, when half are used: the words about them travel together and wake nobody for each. */
uint32_t slots_post(struct slots *slots, uint32_t queue, uint32_t epoch, uint64_t *bytes, uint64_t *regions,
		    uint32_t most);
/* A region that is posted to this queue in this epoch is posted no longer, but not free: its bytes, or 0. */
uint64_t slots_claim(struct slots *slots, uint32_t queue, uint32_t epoch, uint64_t region);
/* What is posted to a queue in an epoch before this one is free. */
void slots_unpost(struct slots *slots, uint32_t queue, uint32_t epoch);

#endif
