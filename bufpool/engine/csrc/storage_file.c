/* A regular file or a block device: io_uring moves data straight between the file and the pool, the own segment or the
 * client's pages. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>

#include "fifo.h"
#include "own_ring.h"
#include "slots.h"
#include "store_file.h"

#define ZEROES_BYTES (1u << 20)
#define SECTOR_BYTES 512u

/* Linux 6.12; older headers lack it. */
#ifndef BLOCK_URING_CMD_DISCARD
#define BLOCK_URING_CMD_DISCARD _IO(0x12, 0)
#endif

enum step { MOVE, PUNCH, DISCARD, ZERO_RANGE, ZERO_WRITE, SYNC };

/* A request's progress, by its index. */
struct work {
	uint64_t moved;
	uint8_t step;
};

struct file_storage {
	struct storage base;
	struct slots slots;
	struct own_ring own;
	struct io_uring *ring;
	struct work *work;
	struct fifo runnable;
	uint8_t *zeroes;
	uint64_t size_bytes; /* the device's */
	uint32_t requests, writes_runnable;
	struct store_file store;
	bool is_block_device, no_punch, no_discard, no_zero_range;
	bool was_measured; /* in this turn */
	bool was_changed;  /* since the file was measured after a change */
	bool is_cut;       /* shorter than the device: no request is started any more */
};

static struct file_storage *file_of(struct storage *s) { return (struct file_storage *)s; }

static struct work *work_of(const struct file_storage *f, const struct storage_request *r)
{
	return &f->work[r->index];
}

static void run(struct file_storage *f, const struct storage_request *r, uint8_t step)
{
	work_of(f, r)->step = step;
	f->writes_runnable += r->d.op != WIRE_READ;
	fifo_push(&f->runnable, r->index);
}

/* Whether the store is shorter than the device; false if the kernel does not say. */
static bool is_short(const struct file_storage *f)
{
	uint64_t bytes;
	if (f->is_block_device)
		return ioctl(f->store.file, BLKGETSIZE64, &bytes) == 0 && bytes < f->size_bytes;
	return store_file_is_short(&f->store, f->size_bytes);
}

/* The engine ends without answering, and the worker replays the requests to a backend that finds the whole file. */
static void file_was_cut(struct file_storage *f)
{
	f->is_cut = true;
	engine_fail(f->base.engine, -ENODATA);
}

/* Called before the first write of a turn.  A write beyond the end of a truncated file would grow it again, with a hole
 * in place of the lost data, and the size would no longer show the loss.  A block device does not grow: there the write
 * fails. */
static void measure(struct file_storage *f)
{
	if (!f->was_measured && !f->is_block_device && is_short(f))
		file_was_cut(f);
	f->was_measured = true;
}

/* After the file was changed, before that is answered: it may have been cut after `measure`, and a write then grew it
 * again.  Its size tells, unless that write ended where the device does. */
static void file_before_answers(struct storage *s)
{
	struct file_storage *f = file_of(s);
	if (f->was_changed && !f->is_cut && !f->is_block_device && is_short(f))
		file_was_cut(f);
	f->was_changed = false;
}

static uint32_t piece(uint64_t left, uint32_t limit) { return left < limit ? (uint32_t)left : limit; }

/* The kernel keeps the pages until the entry has completed, also if this process ends before. */
static void prepare_fixed(struct file_storage *f, const struct storage_request *r, struct io_uring_sqe *sqe)
{
	uint64_t moved = work_of(f, r)->moved;
	int op = r->d.op == WIRE_READ ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED;
	io_uring_prep_rw(op, sqe, f->store.file, NULL, (uint32_t)(r->d.length - moved), r->d.offset + moved);
	sqe->addr = moved; /* in a buffer that the kernel registered, an offset */
	sqe->buf_index = r->d.tag;
}

static void prepare_move(struct file_storage *f, const struct storage_request *r, struct io_uring_sqe *sqe)
{
	uint64_t moved = work_of(f, r)->moved;
	uint32_t bytes = (uint32_t)(r->d.length - moved);
	if (!r->memory)
		prepare_fixed(f, r, sqe);
	else if (r->d.op == WIRE_READ)
		io_uring_prep_read(sqe, f->store.file, r->memory + moved, bytes, r->d.offset + moved);
	else
		io_uring_prep_write(sqe, f->store.file, r->memory + moved, bytes, r->d.offset + moved);
	if (r->d.op == WIRE_WRITE && r->d.flags & WIRE_FUA)
		sqe->rw_flags = RWF_DSYNC;
}

static void prepare_discard(const struct file_storage *f, const struct wire_descriptor *d, struct io_uring_sqe *sqe)
{
	io_uring_prep_rw(IORING_OP_URING_CMD, sqe, f->store.file, NULL, 0, 0);
	sqe->cmd_op = BLOCK_URING_CMD_DISCARD;
	sqe->addr = d->offset;
	sqe->addr3 = d->length;
}

static void prepare_one(struct file_storage *f, const struct storage_request *r, struct io_uring_sqe *sqe)
{
	const struct wire_descriptor *d = &r->d;
	const struct work *work = work_of(f, r);
	switch (work->step) {
	case MOVE:
		prepare_move(f, r, sqe);
		break;
	case PUNCH:
		io_uring_prep_fallocate(sqe, f->store.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
					(off_t)d->offset, (off_t)d->length);
		break;
	case DISCARD:
		prepare_discard(f, d, sqe);
		break;
	case ZERO_RANGE:
		io_uring_prep_fallocate(sqe, f->store.file, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
					(off_t)d->offset, (off_t)d->length);
		break;
	case ZERO_WRITE:
		io_uring_prep_write(sqe, f->store.file, f->zeroes, piece(d->length - work->moved, ZEROES_BYTES),
				    d->offset + work->moved);
		break;
	default: /* SYNC */
		io_uring_prep_fsync(sqe, f->store.file, IORING_FSYNC_DATASYNC);
	}
	io_uring_sqe_set_data64(sqe, ENGINE_USER_DATA | r->index);
}

static struct storage_request *next_runnable(struct file_storage *f)
{
	struct storage_request *r = engine_request(f->base.engine, fifo_pop(&f->runnable));
	f->writes_runnable -= r->d.op != WIRE_READ;
	return r;
}

static void drop_runnable(struct file_storage *f)
{
	while (f->runnable.count)
		engine_finish(f->base.engine, next_runnable(f), -ENODATA);
}

static uint32_t file_prepare(struct storage *s)
{
	struct file_storage *f = file_of(s);
	if (f->writes_runnable)
		measure(f);
	f->was_measured = false;
	if (f->is_cut)
		drop_runnable(f);
	while (f->runnable.count) {
		struct io_uring_sqe *sqe = io_uring_get_sqe(f->ring);
		if (!sqe)
			break;
		prepare_one(f, next_runnable(f), sqe);
	}
	return f->runnable.count;
}

static bool is_unsupported(int32_t result) { return result == -EOPNOTSUPP || result == -ENOSYS || result == -ENODEV; }

static void give_up(struct file_storage *f, struct storage_request *r, int32_t result)
{
	if (is_short(f))
		file_was_cut(f);
	engine_finish(f->base.engine, r, result);
}

/* BLKDISCARD, for a block device that cannot punch on a kernel without the command for that.  It may wait for the
 * disk, and this thread with it. */
static void finish_discard(struct file_storage *f, struct storage_request *r)
{
	uint64_t range[2] = { r->d.offset, r->d.length };
	if (!f->is_block_device)
		engine_finish(f->base.engine, r, -EOPNOTSUPP);
	else if (ioctl(f->store.file, BLKDISCARD, range))
		give_up(f, r, -errno);
	else
		engine_finish(f->base.engine, r, 0);
}

static void punch_unsupported(struct file_storage *f, struct storage_request *r)
{
	f->no_punch = true;
	f->base.count->fallbacks++;
	if (r->d.op == WIRE_WRITE_ZEROES)
		run(f, r, f->no_zero_range ? ZERO_WRITE : ZERO_RANGE);
	else if (f->is_block_device && !f->no_discard)
		run(f, r, DISCARD);
	else
		finish_discard(f, r);
}

static void discard_unsupported(struct file_storage *f, struct storage_request *r)
{
	f->no_discard = true;
	f->base.count->fallbacks++;
	finish_discard(f, r);
}

static void zero_range_unsupported(struct file_storage *f, struct storage_request *r)
{
	f->no_zero_range = true;
	f->base.count->fallbacks++;
	run(f, r, ZERO_WRITE);
}

static void failed(struct file_storage *f, struct storage_request *r, int32_t result)
{
	uint8_t step = work_of(f, r)->step;
	if (result == -EINTR || result == -EAGAIN)
		run(f, r, step);
	else if (step == PUNCH && is_unsupported(result))
		punch_unsupported(f, r);
	else if (step == DISCARD && is_unsupported(result))
		discard_unsupported(f, r);
	else if (step == ZERO_RANGE && is_unsupported(result))
		zero_range_unsupported(f, r);
	else
		give_up(f, r, result);
}

static void all_moved(struct file_storage *f, struct storage_request *r)
{
	if (r->d.op == WIRE_WRITE_ZEROES && r->d.flags & WIRE_FUA && work_of(f, r)->step != SYNC)
		run(f, r, SYNC);
	else
		engine_finish(f->base.engine, r, full_result(r));
}

static void ended(struct file_storage *f, struct storage_request *r)
{
	if (r->d.op == WIRE_READ || is_short(f))
		file_was_cut(f);
	engine_finish(f->base.engine, r, -EIO);
}

static void moved(struct file_storage *f, struct storage_request *r, uint32_t bytes)
{
	struct work *work = work_of(f, r);
	work->moved += bytes;
	/* A read reaches the end only in a truncated file.  O_DIRECT stops there at any byte and cannot go on. */
	if (bytes == 0 || (r->d.op == WIRE_READ && work->moved % SECTOR_BYTES && is_short(f)))
		ended(f, r);
	else if (work->moved < r->d.length) {
		f->base.count->continued++;
		run(f, r, work->step);
	} else
		all_moved(f, r);
}

static void file_complete(struct storage *s, uint32_t index, int32_t result)
{
	struct file_storage *f = file_of(s);
	struct storage_request *r = engine_request(s->engine, index);
	uint8_t step = work_of(f, r)->step;
	f->was_changed |= r->d.op != WIRE_READ;
	if (f->is_cut)
		engine_finish(s->engine, r, result);
	else if (result < 0)
		failed(f, r, result);
	else if (step == MOVE || step == ZERO_WRITE)
		moved(f, r, (uint32_t)result);
	else
		all_moved(f, r);
}

static uint8_t first_step(const struct file_storage *f, const struct wire_descriptor *d)
{
	switch (d->op) {
	case WIRE_FLUSH:
		return SYNC;
	case WIRE_DISCARD:
		return PUNCH;
	case WIRE_WRITE_ZEROES:
		if (!(d->flags & WIRE_NOUNMAP) && !f->no_punch)
			return PUNCH;
		return f->no_zero_range ? ZERO_WRITE : ZERO_RANGE;
	default:
		return MOVE;
	}
}

static int32_t move_at_once(const struct file_storage *f, const struct storage_request *r)
{
	struct iovec data = { r->memory, r->d.length };
	ssize_t moved = r->d.op == WIRE_READ ? preadv2(f->store.file, &data, 1, (off_t)r->d.offset, 0)
					     : pwritev2(f->store.file, &data, 1, (off_t)r->d.offset,
							r->d.flags & WIRE_FUA ? RWF_DSYNC : 0);
	return moved < 0 ? -errno : (int32_t)moved;
}

static void file_start(struct storage *s, struct storage_request *r)
{
	struct file_storage *f = file_of(s);
	struct work *work = work_of(f, r);
	work->moved = 0;
	work->step = first_step(f, &r->d);
	if (!f->store.is_memory || !r->memory || work->step != MOVE || r->d.length > STORE_AT_ONCE_BYTES_MAX) {
		run(f, r, work->step);
		return;
	}
	if (r->d.op == WIRE_WRITE)
		measure(f);
	file_complete(s, r->index, f->is_cut ? -ENODATA : move_at_once(f, r));
}

static int file_use_ring(struct storage *s, struct io_uring *ring)
{
	struct file_storage *f = file_of(s);
	own_ring_close(&f->own);
	f->ring = ring ? ring : &f->own.ring;
	return ring ? 0 : own_ring_open(&f->own, f->requests, s->event_file);
}

static int file_turn(struct storage *s) { return own_ring_turn(&file_of(s)->own, s); }

static int file_open(struct storage *s, const struct engine_setup *setup)
{
	struct file_storage *f = file_of(s);
	f->requests = setup->queues * setup->depth;
	f->size_bytes = setup->size_bytes;
	f->work = calloc(f->requests, sizeof *f->work);
	f->zeroes = mmap(NULL, ZEROES_BYTES, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (f->zeroes == MAP_FAILED)
		f->zeroes = NULL;
	return f->work && f->zeroes && fifo_open(&f->runnable, f->requests) ? slots_open(&f->slots, setup) : -ENOMEM;
}

static void file_resize(struct storage *s, uint64_t size_bytes) { file_of(s)->size_bytes = size_bytes; }

static void file_close(struct storage *s)
{
	struct file_storage *f = file_of(s);
	own_ring_close(&f->own);
	if (f->zeroes)
		munmap(f->zeroes, ZEROES_BYTES);
	slots_close(&f->slots);
	free(f->runnable.items);
	free(f->work);
	free(f);
}

static const struct storage_ops file_ops = {
	.open = file_open,
	.start = file_start,
	.resize = file_resize,
	.use_ring = file_use_ring,
	.prepare = file_prepare,
	.complete = file_complete,
	.before_answers = file_before_answers,
	.turn = file_turn,
	.close = file_close,
};

struct storage *storage_file_new(int file, int is_block_device, uint64_t slot_bytes)
{
	struct file_storage *f = calloc(1, sizeof *f);
	if (!f)
		return NULL;
	f->base.ops = &file_ops;
	f->base.slots = &f->slots;
	f->base.takes_fixed_buffers = true;
	f->slots.slot_bytes = slot_bytes;
	/* The file system of a block device's node says nothing of the device. */
	f->store = is_block_device ? (struct store_file){ .file = file } : store_file_of(file);
	f->is_block_device = is_block_device;
	return &f->base;
}
