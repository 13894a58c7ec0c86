/* Slots of the own segment, in a few sizes, for storages that keep a write's data elsewhere afterwards.
 *
 * Owns the free slots, and the posted ones, which a queue holds ahead so that a write lands there without asking.  At
 * most half of a size's slots are posted, so that a write that asks never waits for a slot that an idle queue holds.
 */
#ifndef UBLKPOOL_SLOTS_H
#define UBLKPOOL_SLOTS_H

#include "storage.h"

struct slot_size {
	uint64_t bytes, base;              /* `base`: offset of the first slot in the segment */
	uint32_t first, count, posted_max; /* posted_max: the most that one queue holds */
	uint32_t *free, count_free;
};

struct slot_post {
	uint32_t epoch, queue;
	bool is_posted;
};

struct slots {
	uint64_t slot_bytes; /* of the only size, if no size can be posted */
	uint32_t sizes, queues;
	struct slot_size size[ENGINE_POST_SIZES_MAX];
	struct slot_post *posts; /* by slot */
	uint32_t *posted;        /* how many slots are posted, by queue and size */
	/* The storage that names places beside the slots (storage_ops.name, give_back) for requests without a posted
	 * slot; NULL: no storage does. */
	struct storage *asked;
};

/* 0 or -ENOMEM. */
int slots_open(struct slots *slots, const struct engine_setup *setup);
void slots_close(struct slots *slots);
/* As storage_ops.name and give_back; a request gets the smallest free slot that holds it. */
int slots_name(struct slots *slots, struct storage_request *r);
void slots_give_back(struct slots *slots, uint64_t region);
/* Posts slots of one size to a queue: `regions` gets up to `most` offsets, *bytes the size.  Returns how many, 0 if the
 * queue holds enough.  Slots are posted once half of a queue's are used, so that their descriptors travel together and
 * share one wake-up. */
uint32_t slots_post(struct slots *slots, uint32_t queue, uint32_t epoch, uint64_t *bytes, uint64_t *regions,
		    uint32_t most);
/* Ends the post of a region without freeing the slot.  Returns its bytes, or 0 if the region is not posted to this
 * queue in this epoch. */
uint64_t slots_claim(struct slots *slots, uint32_t queue, uint32_t epoch, uint64_t region);
/* Frees the slots that were posted to a queue before this epoch. */
void slots_unpost(struct slots *slots, uint32_t queue, uint32_t epoch);

#endif
