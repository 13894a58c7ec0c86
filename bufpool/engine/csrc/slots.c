#include "slots.h"

#include <errno.h>
#include <stdlib.h>

/* How many slots a smaller size gets: two for each tag, one posted and one placed; but all smaller sizes together at
 * most half of what is left of the segment beside one slot of the largest size. */
static uint32_t small_count(const struct engine_setup *setup, uint32_t smaller_sizes, uint64_t bytes,
			    uint64_t largest_bytes)
{
	uint64_t spare = setup->own_bytes > largest_bytes ? setup->own_bytes - largest_bytes : 0;
	uint64_t most = spare / 2 / smaller_sizes / bytes, useful = 2ull * setup->queues * setup->depth;
	return (uint32_t)(most < useful ? most : useful);
}

static bool size_open(struct slots *slots, struct slot_size *size, const struct engine_setup *setup)
{
	uint32_t share = size->count / 2 / setup->queues;
	size->posted_max = !setup->post_sizes ? 0 : share < setup->depth ? share : setup->depth;
	size->free = calloc(size->count + 1, sizeof *size->free);
	for (; size->free && size->count_free < size->count; size->count_free++)
		size->free[size->count_free] = size->first + size->count - 1 - size->count_free;
	return size->free;
}

int slots_open(struct slots *slots, const struct engine_setup *setup)
{
	uint64_t base = 0, largest = setup->post_sizes ? setup->post_bytes[setup->post_sizes - 1] : slots->slot_bytes;
	uint32_t count = 0, sizes = setup->post_sizes ? setup->post_sizes : 1;
	bool done = true;
	slots->queues = setup->queues;
	slots->sizes = sizes;
	for (uint32_t i = 0; i < sizes; i++) {
		struct slot_size *size = &slots->size[i];
		bool is_last = i + 1 == sizes;
		size->bytes = is_last ? largest : setup->post_bytes[i];
		size->base = base;
		size->first = count;
		size->count = is_last ? (uint32_t)((setup->own_bytes - base) / largest)
				      : small_count(setup, sizes - 1, size->bytes, largest);
		base += size->count * size->bytes;
		count += size->count;
		done = size_open(slots, size, setup) && done;
	}
	slots->posts = calloc(count + 1, sizeof *slots->posts);
	slots->posted = calloc((size_t)setup->queues * sizes, sizeof *slots->posted);
	return done && slots->posts && slots->posted ? 0 : -ENOMEM;
}

void slots_close(struct slots *slots)
{
	for (uint32_t i = 0; i < slots->sizes; i++)
		free(slots->size[i].free);
	free(slots->posts);
	free(slots->posted);
}

static uint64_t region_of(const struct slot_size *size, uint32_t slot)
{
	return size->base + (slot - size->first) * size->bytes;
}

/* The size of the slot that begins at `region`, and the slot's number; NULL: no slot begins there. */
static struct slot_size *size_of(struct slots *slots, uint64_t region, uint32_t *slot)
{
	for (uint32_t i = 0; i < slots->sizes; i++) {
		struct slot_size *size = &slots->size[i];
		uint64_t at = region - size->base;
		if (region < size->base || at >= size->count * size->bytes || at % size->bytes)
			continue;
		*slot = size->first + (uint32_t)(at / size->bytes);
		return size;
	}
	return NULL;
}

int slots_name(struct slots *slots, struct storage_request *r)
{
	const struct slot_size *largest = &slots->size[slots->sizes - 1];
	if (slots->asked)
		return slots->asked->ops->name(slots->asked, r);
	if (r->d.length > largest->bytes)
		return -EINVAL;
	if (!largest->count)
		return -EOPNOTSUPP;
	for (uint32_t i = 0; i < slots->sizes; i++) {
		struct slot_size *size = &slots->size[i];
		if (r->d.length > size->bytes || !size->count_free)
			continue;
		r->region = region_of(size, size->free[--size->count_free]);
		return 1;
	}
	return 0;
}

void slots_give_back(struct slots *slots, uint64_t region)
{
	uint32_t slot;
	struct slot_size *size = size_of(slots, region, &slot);
	if (!size) {
		const struct storage_request not_a_slot = { .region = region };
		slots->asked->ops->give_back(slots->asked, &not_a_slot);
		return;
	}
	size->free[size->count_free++] = slot;
}

static uint32_t *posted_of(struct slots *slots, uint32_t queue, const struct slot_size *size)
{
	return &slots->posted[queue * slots->sizes + (uint32_t)(size - slots->size)];
}

static bool is_due(struct slots *slots, uint32_t queue, const struct slot_size *size)
{
	return size->count_free && *posted_of(slots, queue, size) * 2 <= size->posted_max && size->posted_max;
}

static uint32_t post_size(struct slots *slots, struct slot_size *size, struct slot_post post, uint64_t *regions,
			  uint32_t most)
{
	uint32_t *posted = posted_of(slots, post.queue, size), count = 0;
	for (; count < most && size->count_free && *posted < size->posted_max; ++*posted, count++) {
		uint32_t slot = size->free[--size->count_free];
		slots->posts[slot] = post;
		regions[count] = region_of(size, slot);
	}
	return count;
}

uint32_t slots_post(struct slots *slots, uint32_t queue, uint32_t epoch, uint64_t *bytes, uint64_t *regions,
		    uint32_t most)
{
	for (uint32_t i = 0; i < slots->sizes; i++) {
		struct slot_size *size = &slots->size[i];
		if (!is_due(slots, queue, size))
			continue;
		*bytes = size->bytes;
		return post_size(slots, size, (struct slot_post){ .epoch = epoch, .queue = queue, .is_posted = true },
				 regions, most);
	}
	return 0;
}

static void unpost(struct slots *slots, const struct slot_size *size, uint32_t slot)
{
	slots->posts[slot].is_posted = false;
	--*posted_of(slots, slots->posts[slot].queue, size);
}

uint64_t slots_claim(struct slots *slots, uint32_t queue, uint32_t epoch, uint64_t region)
{
	uint32_t slot;
	const struct slot_size *size = size_of(slots, region, &slot);
	const struct slot_post *post = size ? &slots->posts[slot] : NULL;
	if (!post || !post->is_posted || post->queue != queue || post->epoch != epoch)
		return 0;
	unpost(slots, size, slot);
	return size->bytes;
}

static void unpost_size(struct slots *slots, struct slot_size *size, uint32_t queue, uint32_t epoch)
{
	for (uint32_t slot = size->first; slot < size->first + size->count; slot++) {
		const struct slot_post *post = &slots->posts[slot];
		if (!post->is_posted || post->queue != queue || post->epoch >= epoch)
			continue;
		unpost(slots, size, slot);
		size->free[size->count_free++] = slot;
	}
}

void slots_unpost(struct slots *slots, uint32_t queue, uint32_t epoch)
{
	for (uint32_t i = 0; i < slots->sizes; i++)
		unpost_size(slots, &slots->size[i], queue, epoch);
}
