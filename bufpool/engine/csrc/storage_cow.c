/* A copy-on-write disk: an overlay has what was written, a read-only base everything else.
 *
 * docs/COW.md describes the overlay.  A change of blocks goes: room for their part of the map, the data, the map in
 * memory, its live copy in the file, the answer.  Changes of the same block of 4 KiB run one after the other, so that
 * the copy of a block from the base never overwrites what another request has put there.  A flush syncs the data of all
 * answered changes, then writes what the durable copy of the map lacks, and syncs that; flushes that come meanwhile
 * share the next one.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include "cow_storage.h"

/* The engine ends without answering, and the worker replays the requests to a backend that finds the whole store. */
static void cow_was_cut(struct cow_storage *c)
{
	c->is_cut = true;
	engine_fail(c->base.engine, -ENODATA);
}

static bool cow_is_overlay_short(const struct cow_storage *c)
{
	return store_file_is_short(&c->file, c->map->layout.data_at + c->map->layout.size_bytes);
}

/* Before the first write of a turn: a write beyond the end of a truncated overlay would hide the loss. */
static void cow_measure(struct cow_storage *c)
{
	if (!c->was_measured && cow_is_overlay_short(c))
		cow_was_cut(c);
	c->was_measured = true;
}

static void cow_before_answers(struct storage *s)
{
	struct cow_storage *c = cow_of(s);
	if (c->was_changed && !c->is_cut && cow_is_overlay_short(c))
		cow_was_cut(c);
	c->was_changed = false;
}

/* A base may end inside a sector, whose rest is zeros: decided now, since the block may be written meanwhile, and a
 * sector must not be old in one part and new in another. */
static enum cow_next cow_read_base(struct cow_storage *c, struct storage_request *r, uint64_t at, uint64_t bytes)
{
	struct cow_work *w = cow_work_of(c, r);
	uint64_t kept = cow_lower(bytes, c->map->layout.base_bytes - at);
	w->zeroed = cow_lower(bytes - kept, (COW_SECTOR_BYTES - (at + kept) % COW_SECTOR_BYTES) % COW_SECTOR_BYTES);
	memset(r->memory + w->done + kept, 0, w->zeroed);
	return cow_next_io(w, COW_READ, COW_IO_BASE, (struct cow_piece){ r->memory + w->done, at, kept });
}

static enum cow_next cow_read_next(struct cow_storage *c, struct storage_request *r)
{
	struct cow_work *w = cow_work_of(c, r);
	const struct cow_layout *layout = &c->map->layout;
	while (w->done < r->d.length) {
		uint64_t at = r->d.offset + w->done, block = at / COW_BLOCK_BYTES;
		int state;
		uint64_t run = cow_map_run(c->map, block, cow_end_block(r), &state);
		uint64_t bytes = cow_lower((block + run) * COW_BLOCK_BYTES, cow_end(r)) - at;
		uint8_t *to = r->memory + w->done;
		if (state == COW_DATA)
			return cow_next_io(w, COW_READ, COW_IO_READ,
					   (struct cow_piece){ to, layout->data_at + at, bytes });
		if (state == COW_BASE && at < layout->base_bytes)
			return cow_read_base(c, r, at, bytes);
		memset(to, 0, bytes);
		w->done += bytes;
	}
	engine_finish(c->base.engine, r, full_result(r));
	return AWAY;
}

static bool cow_is_flush(const struct cow_work *w) { return w->step >= COW_FLUSH_DATA; }

static enum cow_next cow_stepped(struct cow_storage *c, struct storage_request *r)
{
	struct cow_work *w = cow_work_of(c, r);
	if (w->step == COW_READ) {
		w->done += w->zeroed;
		w->zeroed = 0;
		return cow_read_next(c, r);
	}
	return cow_is_flush(w) ? cow_flush_stepped(c, w) : cow_change_stepped(c, r);
}

static enum cow_next cow_failed(struct cow_storage *c, struct storage_request *r, int32_t error)
{
	struct cow_work *w = cow_work_of(c, r);
	if (w->step != COW_READ)
		return cow_is_flush(w) ? cow_flush_over(c, error) : cow_change_failed(c, r, error);
	engine_finish(c->base.engine, r, error);
	return AWAY;
}

static bool cow_moves(const struct cow_work *w) { return w->kind != COW_IO_PUNCH && w->kind != COW_IO_SYNC; }

static bool cow_is_unsupported(int32_t result)
{
	return result == -EOPNOTSUPP || result == -ENOSYS || result == -ENODEV;
}

/* The progress of the request itself, where the I/O's is that. */
static void cow_count_done(struct cow_work *w, uint64_t bytes)
{
	if (w->step == COW_READ || w->step == COW_WRITE || w->step == COW_PUNCH)
		w->done += bytes;
}

static enum cow_next cow_moved(struct cow_storage *c, struct storage_request *r, uint32_t bytes)
{
	struct cow_work *w = cow_work_of(c, r);
	if (bytes == 0 && w->io.bytes) {
		if (w->kind != COW_IO_WRITE)
			cow_was_cut(c);
		return cow_failed(c, r, -EIO);
	}
	cow_count_done(w, bytes);
	w->io.memory = (uint8_t *)w->io.memory + bytes;
	w->io.at += bytes;
	w->io.bytes -= bytes;
	c->base.count->continued += w->io.bytes != 0;
	return w->io.bytes ? NEXT : cow_stepped(c, r);
}

static enum cow_next cow_heard(struct cow_storage *c, struct storage_request *r, int32_t result)
{
	struct cow_work *w = cow_work_of(c, r);
	c->was_changed |= w->kind == COW_IO_WRITE || w->kind == COW_IO_PUNCH;
	if (c->is_cut)
		return cow_failed(c, r, -ENODATA);
	if (result == -EINTR || result == -EAGAIN)
		return NEXT;
	if (w->kind == COW_IO_PUNCH && cow_is_unsupported(result)) {
		/* The state alone makes the blocks read as zeros. */
		c->base.count->fallbacks++;
		result = 0;
	}
	if (result < 0)
		return cow_failed(c, r, result);
	if (cow_moves(w))
		return cow_moved(c, r, (uint32_t)result);
	cow_count_done(w, w->io.bytes);
	return cow_stepped(c, r);
}

static const struct store_file *cow_file_of(const struct cow_storage *c, const struct cow_work *w)
{
	return w->kind == COW_IO_BASE ? &c->base_file : &c->file;
}

static bool cow_is_dsync(const struct cow_work *w) { return w->is_dsync && w->step == COW_WRITE; }

/* As in storage_file.c: I/O in memory never waits, but io_uring would pass each to a kernel thread. */
static bool cow_is_at_once(const struct cow_storage *c, const struct cow_work *w)
{
	if (!w->io.bytes && cow_moves(w))
		return true;
	return cow_file_of(c, w)->is_memory && w->kind != COW_IO_PUNCH && w->io.bytes <= STORE_AT_ONCE_BYTES_MAX;
}

static int32_t cow_at_once(struct cow_storage *c, const struct cow_work *w)
{
	struct iovec data = { w->io.memory, w->io.bytes };
	int file = cow_file_of(c, w)->file;
	if (!w->io.bytes)
		return 0;
	if (w->kind == COW_IO_WRITE && !c->is_cut)
		cow_measure(c);
	if (c->is_cut)
		return -ENODATA;
	ssize_t count = w->kind == COW_IO_WRITE
				? pwritev2(file, &data, 1, (off_t)w->io.at, cow_is_dsync(w) ? RWF_DSYNC : 0)
				: preadv2(file, &data, 1, (off_t)w->io.at, 0);
	return count < 0 ? -errno : (int32_t)count;
}

static void cow_run(struct cow_storage *c, struct storage_request *r, enum cow_next next)
{
	struct cow_work *w = cow_work_of(c, r);
	while (next == NEXT && cow_is_at_once(c, w))
		next = cow_heard(c, r, cow_at_once(c, w));
	if (next == AWAY)
		return;
	c->writes_runnable += w->kind == COW_IO_WRITE;
	fifo_push(&c->runnable, r->index);
}

/* The changes that may begin, now that others have ended. */
static void cow_begin_waiting(struct cow_storage *c)
{
	uint32_t kept = 0;
	for (uint32_t i = 0; i < c->waits; i++) {
		struct storage_request *r = engine_request(c->base.engine, c->waiting[i]);
		if (c->is_cut)
			engine_finish(c->base.engine, r, -ENODATA);
		else if (cow_change_may_begin(c, r, kept))
			cow_run(c, r, cow_change_begin(c, r));
		else
			c->waiting[kept++] = c->waiting[i];
	}
	c->waits = kept;
}

static void cow_settle(struct cow_storage *c)
{
	while (c->is_news) {
		c->is_news = false;
		cow_begin_waiting(c);
		struct storage_request *r = cow_flush_begin(c);
		if (r)
			cow_run(c, r, c->is_cut ? cow_flush_over(c, -ENODATA) : NEXT);
	}
}

static void cow_start(struct storage *s, struct storage_request *r)
{
	struct cow_storage *c = cow_of(s);
	struct cow_work *w = cow_work_of(c, r);
	w->done = w->zeroed = 0;
	w->is_copied[0] = w->is_copied[1] = w->is_dsync = false;
	if (cow_is_change(r) && r->d.length == 0)
		engine_finish(s->engine, r, 0);
	else if (cow_is_change(r) && !cow_change_may_begin(c, r, c->waits))
		c->waiting[c->waits++] = r->index;
	else if (cow_is_change(r))
		cow_run(c, r, cow_change_begin(c, r));
	else
		cow_run(c, r, r->d.op == WIRE_FLUSH ? cow_flush_join(c, r) : cow_read_next(c, r));
	cow_settle(c);
}

static void cow_complete(struct storage *s, uint32_t index, int32_t result)
{
	struct cow_storage *c = cow_of(s);
	struct storage_request *r = engine_request(s->engine, index);
	cow_run(c, r, cow_heard(c, r, result));
	cow_settle(c);
}

static void cow_prepare_one(const struct cow_storage *c, uint32_t index, struct io_uring_sqe *sqe)
{
	const struct cow_work *w = &c->work[index];
	int file = cow_file_of(c, w)->file;
	uint32_t bytes = (uint32_t)cow_lower(w->io.bytes, STORE_IO_BYTES_MAX);
	switch (w->kind) {
	case COW_IO_BASE:
	case COW_IO_READ:
		io_uring_prep_read(sqe, file, w->io.memory, bytes, w->io.at);
		break;
	case COW_IO_WRITE:
		io_uring_prep_write(sqe, file, w->io.memory, bytes, w->io.at);
		if (cow_is_dsync(w))
			sqe->rw_flags = RWF_DSYNC;
		break;
	case COW_IO_PUNCH:
		io_uring_prep_fallocate(sqe, file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)w->io.at,
					(off_t)w->io.bytes);
		break;
	default: /* COW_IO_SYNC */
		io_uring_prep_fsync(sqe, file, IORING_FSYNC_DATASYNC);
	}
	io_uring_sqe_set_data64(sqe, ENGINE_USER_DATA | index);
}

static uint32_t cow_next_runnable(struct cow_storage *c)
{
	uint32_t index = fifo_pop(&c->runnable);
	c->writes_runnable -= c->work[index].kind == COW_IO_WRITE;
	return index;
}

static void cow_drop_runnable(struct cow_storage *c)
{
	while (c->runnable.count)
		cow_complete(&c->base, cow_next_runnable(c), -ENODATA);
}

static uint32_t cow_prepare(struct storage *s)
{
	struct cow_storage *c = cow_of(s);
	if (c->writes_runnable)
		cow_measure(c);
	c->was_measured = false;
	if (c->is_cut)
		cow_drop_runnable(c);
	while (c->runnable.count) {
		struct io_uring_sqe *sqe = io_uring_get_sqe(c->ring);
		if (!sqe)
			break;
		cow_prepare_one(c, cow_next_runnable(c), sqe);
	}
	return c->runnable.count;
}

static int cow_use_ring(struct storage *s, struct io_uring *ring)
{
	struct cow_storage *c = cow_of(s);
	own_ring_close(&c->own);
	c->ring = ring ? ring : &c->own.ring;
	return ring ? 0 : own_ring_open(&c->own, c->requests, s->event_file);
}

static int cow_turn(struct storage *s) { return own_ring_turn(&cow_of(s)->own, s); }

static void *cow_pages(uint64_t bytes, int access)
{
	void *at = mmap(NULL, bytes, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	return at == MAP_FAILED ? NULL : at;
}

static bool cow_open_memory(struct cow_storage *c)
{
	c->zeroes = cow_pages(COW_BLOCK_BYTES, PROT_READ);
	c->bounces = cow_pages((size_t)BOUNCES_MAX * COW_BLOCK_BYTES, PROT_READ | PROT_WRITE);
	for (; c->bounces && c->bounces_free < BOUNCES_MAX; c->bounces_free++)
		c->bounce[c->bounces_free] = c->bounces + (size_t)c->bounces_free * COW_BLOCK_BYTES;
	c->work = calloc(c->requests, sizeof *c->work);
	c->waiting = calloc(c->requests, sizeof *c->waiting);
	return c->zeroes && c->bounces && c->work && c->waiting && fifo_open(&c->runnable, c->requests) &&
	       fifo_open(&c->flushing, c->requests) && fifo_open(&c->flushes, c->requests) &&
	       blocks_open(&c->busy, c->map->layout.capacity_bytes / COW_BLOCK_BYTES * BLOCK_BYTES);
}

static int cow_open(struct storage *s, const struct engine_setup *setup)
{
	struct cow_storage *c = cow_of(s);
	c->requests = setup->queues * setup->depth;
	return cow_open_memory(c) ? slots_open(&c->slots, setup) : -ENOMEM;
}

static void cow_resize(struct storage *s, uint64_t size_bytes) { cow_of(s)->map->layout.size_bytes = size_bytes; }

static void cow_close(struct storage *s)
{
	struct cow_storage *c = cow_of(s);
	own_ring_close(&c->own);
	if (c->zeroes)
		munmap(c->zeroes, COW_BLOCK_BYTES);
	if (c->bounces)
		munmap(c->bounces, (size_t)BOUNCES_MAX * COW_BLOCK_BYTES);
	slots_close(&c->slots);
	blocks_close(&c->busy);
	free(c->runnable.items);
	free(c->flushing.items);
	free(c->flushes.items);
	free(c->waiting);
	free(c->work);
	free(c);
}

static const struct storage_ops cow_ops = {
	.open = cow_open,
	.start = cow_start,
	.resize = cow_resize,
	.use_ring = cow_use_ring,
	.prepare = cow_prepare,
	.complete = cow_complete,
	.before_answers = cow_before_answers,
	.turn = cow_turn,
	.close = cow_close,
};

struct storage *storage_cow_new(int base, int overlay, struct cow_map *map, uint64_t slot_bytes)
{
	struct cow_storage *c = calloc(1, sizeof *c);
	if (!c)
		return NULL;
	c->base.ops = &cow_ops;
	c->base.slots = &c->slots;
	c->slots.slot_bytes = slot_bytes;
	c->map = map;
	c->base_file = store_file_of(base);
	c->file = store_file_of(overlay);
	return &c->base;
}
