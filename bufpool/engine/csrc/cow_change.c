/* What a change of blocks goes through in the copy-on-write storage, see storage_cow.c. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "cow_storage.h"

static void change_end(struct cow_storage *c, const struct storage_request *r)
{
	struct cow_work *w = cow_work_of(c, r);
	uint64_t first = cow_first_block(r);
	blocks_clear(&c->busy, first * BLOCK_BYTES, (cow_end_block(r) - first) * BLOCK_BYTES);
	cow_map_reserving(c->map, first, cow_end_block(r), false);
	if (w->bounce)
		c->bounce[c->bounces_free++] = w->bounce;
	if (w->before != w->kept)
		free(w->before);
	w->bounce = NULL;
	w->before = NULL;
	c->is_news = true;
}

static enum cow_next change_over(struct cow_storage *c, struct storage_request *r, int32_t error)
{
	change_end(c, r);
	if (!error && r->d.flags & WIRE_FUA && !cow_work_of(c, r)->is_dsync)
		return cow_flush_join(c, r);
	engine_finish(c->base.engine, r, error ? error : full_result(r));
	return AWAY;
}

static bool keep_before(struct cow_work *w, const struct cow_piece *words)
{
	w->before = words->bytes <= sizeof w->kept ? w->kept : malloc(words->bytes);
	if (w->before)
		memcpy(w->before, words->memory, words->bytes);
	return w->before;
}

/* The blocks that the request covers as a whole, which may be none. */
static void whole_blocks(const struct storage_request *r, uint64_t *first, uint64_t *end)
{
	*first = (r->d.offset + COW_BLOCK_BYTES - 1) / COW_BLOCK_BYTES;
	*end = cow_end(r) / COW_BLOCK_BYTES;
	if (*end < *first)
		*end = *first;
}

static bool change_states(const struct cow_storage *c, const struct storage_request *r)
{
	const struct cow_work *w = cow_work_of(c, r);
	uint64_t first = cow_first_block(r), end = cow_end_block(r), whole_first, whole_end;
	if (r->d.op == WIRE_WRITE)
		return cow_map_set(c->map, first, end, COW_DATA);
	whole_blocks(r, &whole_first, &whole_end);
	bool changed = cow_map_set(c->map, whole_first, whole_end, COW_ZERO);
	if (w->is_copied[0])
		changed |= cow_map_set(c->map, first, first + 1, COW_DATA);
	if (w->is_copied[1])
		changed |= cow_map_set(c->map, end - 1, end, COW_DATA);
	return changed;
}

/* The data is in the file. */
static enum cow_next change_map(struct cow_storage *c, struct storage_request *r)
{
	struct cow_work *w = cow_work_of(c, r);
	struct cow_piece words = cow_map_live(c->map, cow_first_block(r), cow_end_block(r));
	if (!keep_before(w, &words))
		return change_over(c, r, -ENOMEM);
	if (!change_states(c, r))
		return change_over(c, r, 0);
	return cow_next_io(w, COW_MAP, COW_IO_WRITE, words);
}

/* The live copy lacks the new states, or has them by the write of another change of the same words: both it and the map
 * get the old ones, so that a change that failed does not show after the process's death. */
static enum cow_next map_failed(struct cow_storage *c, struct storage_request *r, int32_t error)
{
	struct cow_work *w = cow_work_of(c, r);
	uint64_t first = cow_first_block(r), end = cow_end_block(r);
	cow_map_revert(c->map, first, end, w->before);
	w->error = error;
	return cow_next_io(w, COW_MAP_BACK, COW_IO_WRITE, cow_map_live(c->map, first, end));
}

/* Copies a block whose state is not COW_DATA, changed in part, into the overlay. */
static enum cow_next copy_block(struct cow_storage *c, const struct storage_request *r, uint64_t block)
{
	struct cow_work *w = cow_work_of(c, r);
	uint64_t at = block * COW_BLOCK_BYTES, base_bytes = c->map->layout.base_bytes;
	memset(w->bounce, 0, COW_BLOCK_BYTES);
	w->is_copied[block != cow_first_block(r)] = true;
	bool is_base = cow_state_of(c, block) == COW_BASE && at < base_bytes;
	uint64_t bytes = is_base ? cow_lower(COW_BLOCK_BYTES, base_bytes - at) : 0;
	return cow_next_io(w, COW_COPY_READ, COW_IO_BASE, (struct cow_piece){ w->bounce, at, bytes });
}

/* The block's old content is in the bounce buffer. */
static enum cow_next copy_change(struct cow_storage *c, const struct storage_request *r)
{
	struct cow_work *w = cow_work_of(c, r);
	uint64_t at = r->d.offset + w->done, from = at % COW_BLOCK_BYTES;
	uint64_t bytes = cow_lower(COW_BLOCK_BYTES - from, r->d.length - w->done);
	if (r->d.op == WIRE_WRITE)
		memcpy(w->bounce + from, r->memory + w->done, bytes);
	else
		memset(w->bounce + from, 0, bytes);
	w->done += bytes;
	return cow_next_io(w, COW_COPY_WRITE, COW_IO_WRITE,
			   (struct cow_piece){ w->bounce, c->map->layout.data_at + at - from, COW_BLOCK_BYTES });
}

/* How many bytes from `at` on go straight to the overlay: whole blocks, and blocks that are there already. */
static uint64_t direct_bytes(const struct cow_storage *c, const struct storage_request *r, uint64_t at)
{
	uint64_t block = at / COW_BLOCK_BYTES, whole_first, whole_end, to = at;
	whole_blocks(r, &whole_first, &whole_end);
	for (; to < cow_end(r); block++) {
		bool is_whole = block >= whole_first && block < whole_end;
		if (!is_whole && cow_state_of(c, block) != COW_DATA)
			break;
		to = is_whole ? whole_end * COW_BLOCK_BYTES : cow_lower((block + 1) * COW_BLOCK_BYTES, cow_end(r));
		block = is_whole ? whole_end - 1 : block;
	}
	return to - at;
}

static enum cow_next write_data(struct cow_storage *c, struct storage_request *r)
{
	struct cow_work *w = cow_work_of(c, r);
	uint64_t at = r->d.offset + w->done;
	if (w->done == r->d.length)
		return change_map(c, r);
	uint64_t bytes = direct_bytes(c, r, at);
	if (!bytes)
		return copy_block(c, r, at / COW_BLOCK_BYTES);
	return cow_next_io(w, COW_WRITE, COW_IO_WRITE,
			   (struct cow_piece){ r->memory + w->done, c->map->layout.data_at + at, bytes });
}

static bool has_data(const struct cow_storage *c, uint64_t first, uint64_t end)
{
	int state;
	for (uint64_t run; first < end; first += run) {
		run = cow_map_run(c->map, first, end, &state);
		if (state == COW_DATA)
			return true;
	}
	return false;
}

/* A DISCARD also gives back what an interrupted change has left in blocks of the base. */
static bool is_punched(const struct cow_storage *c, const struct storage_request *r, uint64_t first, uint64_t end)
{
	return r->d.op == WIRE_DISCARD || (!(r->d.flags & WIRE_NOUNMAP) && has_data(c, first, end));
}

/* WRITE_ZEROES of part of a block, whose state is not COW_ZERO. */
static enum cow_next zero_part(struct cow_storage *c, const struct storage_request *r, uint64_t at, uint64_t bytes)
{
	if (cow_state_of(c, at / COW_BLOCK_BYTES) != COW_DATA)
		return copy_block(c, r, at / COW_BLOCK_BYTES);
	return cow_next_io(cow_work_of(c, r), COW_WRITE, COW_IO_WRITE,
			   (struct cow_piece){ c->zeroes, c->map->layout.data_at + at, bytes });
}

static enum cow_next clear_data(struct cow_storage *c, struct storage_request *r)
{
	struct cow_work *w = cow_work_of(c, r);
	uint64_t whole_first, whole_end;
	whole_blocks(r, &whole_first, &whole_end);
	while (w->done < r->d.length) {
		uint64_t at = r->d.offset + w->done, block = at / COW_BLOCK_BYTES;
		bool is_whole = block >= whole_first && block < whole_end;
		uint64_t to =
			is_whole ? whole_end * COW_BLOCK_BYTES : cow_lower((block + 1) * COW_BLOCK_BYTES, cow_end(r));
		if (is_whole && is_punched(c, r, whole_first, whole_end))
			return cow_next_io(w, COW_PUNCH, COW_IO_PUNCH,
					   (struct cow_piece){ NULL, c->map->layout.data_at + at, to - at });
		if (!is_whole && r->d.op == WIRE_WRITE_ZEROES && cow_state_of(c, block) != COW_ZERO)
			return zero_part(c, r, at, to - at);
		w->done += to - at;
	}
	return change_map(c, r);
}

static enum cow_next change_data(struct cow_storage *c, struct storage_request *r)
{
	return (r->d.op == WIRE_WRITE ? write_data : clear_data)(c, r);
}

/* The pages of the map that the change needs get their room in the file first, so that a full file system refuses the
 * request before anything has changed. */
static enum cow_next reserve(struct cow_storage *c, struct storage_request *r)
{
	struct cow_work *w = cow_work_of(c, r);
	uint64_t end = (cow_end_block(r) - 1) / COW_PAGE_BLOCKS + 1;
	uint64_t count = cow_map_pages(c->map, &w->page, end, COW_RESERVED, 0);
	if (!count) {
		c->is_news |= cow_map_reserving(c->map, cow_first_block(r), cow_end_block(r), false);
		return change_data(c, r);
	}
	return cow_next_io(w, COW_RESERVE_LIVE, COW_IO_WRITE, cow_map_page_piece(c->map, w->page, count, false));
}

static uint64_t pages_to_reserve(const struct cow_storage *c, const struct storage_request *r, uint64_t page)
{
	return cow_map_pages(c->map, &page, (cow_end_block(r) - 1) / COW_PAGE_BLOCKS + 1, COW_RESERVED, 0);
}

static enum cow_next reserve_durable(const struct cow_storage *c, const struct storage_request *r)
{
	struct cow_work *w = cow_work_of(c, r);
	uint64_t count = pages_to_reserve(c, r, w->page);
	return cow_next_io(w, COW_RESERVE_DURABLE, COW_IO_WRITE, cow_map_page_piece(c->map, w->page, count, true));
}

static enum cow_next reserved(struct cow_storage *c, struct storage_request *r)
{
	struct cow_work *w = cow_work_of(c, r);
	cow_map_reserved(c->map, w->page, pages_to_reserve(c, r, w->page));
	return reserve(c, r);
}

static bool overlaps(const struct storage_request *one, const struct storage_request *other)
{
	return cow_first_block(one) < cow_end_block(other) && cow_first_block(other) < cow_end_block(one);
}

static bool is_aligned(const struct storage_request *r) { return (r->d.offset | r->d.length) % COW_BLOCK_BYTES == 0; }

bool cow_change_may_begin(const struct cow_storage *c, const struct storage_request *r, uint32_t earlier)
{
	uint64_t first = cow_first_block(r);
	if (blocks_any(&c->busy, first * BLOCK_BYTES, (cow_end_block(r) - first) * BLOCK_BYTES) ||
	    cow_map_is_reserving(c->map, first, cow_end_block(r)))
		return false;
	for (uint32_t i = 0; i < earlier; i++)
		if (overlaps(r, engine_request(c->base.engine, c->waiting[i])))
			return false;
	return is_aligned(r) || c->bounces_free;
}

enum cow_next cow_change_begin(struct cow_storage *c, struct storage_request *r)
{
	struct cow_work *w = cow_work_of(c, r);
	uint64_t first = cow_first_block(r), end = cow_end_block(r);
	int state;
	blocks_set(&c->busy, first * BLOCK_BYTES, (end - first) * BLOCK_BYTES);
	cow_map_reserving(c->map, first, end, true);
	w->bounce = is_aligned(r) ? NULL : c->bounce[--c->bounces_free];
	w->page = first / COW_PAGE_BLOCKS;
	/* In place of durable blocks that are in the overlay already, the data alone must become durable. */
	w->is_dsync = r->d.op == WIRE_WRITE && r->d.flags & WIRE_FUA && cow_map_is_durable(c->map, first, end) &&
		      cow_map_run(c->map, first, end, &state) == end - first && state == COW_DATA;
	return reserve(c, r);
}

enum cow_next cow_change_stepped(struct cow_storage *c, struct storage_request *r)
{
	switch (cow_work_of(c, r)->step) {
	case COW_RESERVE_LIVE:
		return reserve_durable(c, r);
	case COW_RESERVE_DURABLE:
		return reserved(c, r);
	case COW_COPY_READ:
		return copy_change(c, r);
	case COW_MAP:
		return change_over(c, r, 0);
	case COW_MAP_BACK:
		return change_over(c, r, cow_work_of(c, r)->error);
	default: /* COW_COPY_WRITE, COW_WRITE, COW_PUNCH */
		return change_data(c, r);
	}
}

enum cow_next cow_change_failed(struct cow_storage *c, struct storage_request *r, int32_t error)
{
	const struct cow_work *w = cow_work_of(c, r);
	if (w->step == COW_MAP)
		return map_failed(c, r, error);
	return change_over(c, r, w->step == COW_MAP_BACK ? w->error : error);
}
