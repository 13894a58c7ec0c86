/*
 * Fuzzes a backend's native engine with a worker's descriptors: in frames (-DRINGS=0), or in rings whose indices and
 * entries the worker can write as well (-DRINGS=1, through port.c and ring_loop.c).
 *
 * The input is a program: descriptors that follow up on the engine's answers or not, the author's work, answers taken.
 * Each area that a descriptor can name is an allocation of its own, so a wrong address is AddressSanitizer's to find.
 * An input ends with the first descriptor that the engine calls nonsense, as the worker's connection does.
 */
#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "calls.h"
#include "engine.h"
#include "input.h"
#include "port.h"
#include "ring_loop.h"
#include "shared_ring.h"

#ifndef RINGS
#define RINGS 0
#endif

enum { DEVICE = 7, QUEUES = 2, DEPTH = 4, TAGS = QUEUES * DEPTH, EPOCH = 2, OWN_SEGMENT = 2, SLICE = 3 };
enum { DISK_BYTES = 64 << 10, POOL_BYTES = 16 << 10, SLICE_BYTES = 8 << 10, OWN_BYTES = DISK_BYTES };
enum { IO_BYTES = 4096, SMALL_BYTES = 1024, BLOCK = 512, ENTRIES = 8, STEPS_MAX = 400, FRAME_MAX = 6, KEPT = 16 };
enum { WAIT_MS_MAX = 2000 };
enum kind { NULL_STORAGE, MEMORY_STORAGE, CALLS_STORAGE, FILE_STORAGE, KINDS };

struct rig {
	struct input in;
	struct engine *engine;
	struct storage *storage;
	struct engine_setup setup;
	enum kind kind;
	bool is_over; /* the engine has refused a descriptor or an index */
	/* The engine's last answers. */
	struct wire_descriptor kept[KEPT];
	unsigned keeps;
	uint64_t sequence;
	int file;
	/* The batch of a storage whose caller does the work (calls.h). */
	struct calls_batch batch;
	uint32_t out, late[TAGS], lates;
	uint8_t *disk;
	/* With rings only. */
	struct ports *ports;
	struct ring_loop *loop;
	uint8_t *ring_memory[QUEUES];
	struct sr_end to_backend[QUEUES], from_backend[QUEUES];
	int bells[QUEUES][2];
	bool head_is_poked[QUEUES];
};

static struct rig *running; /* the rig of calls_place() and calls_released() */
static int watched = -1;

static uint8_t *memory(size_t bytes)
{
	uint8_t *at = malloc(bytes);

	MUST(at);
	memset(at, 0, bytes);
	return at;
}

int64_t calls_place(void *handle, int is_write, uint64_t offset, uint64_t length, uint32_t flags);
void calls_released(void *handle, uint64_t region);

/* The backend names a region of the segment's second half, since the first half may be slots; answers not now (-1); or
 * refuses. */
int64_t calls_place(void *handle, int is_write, uint64_t offset, uint64_t length, uint32_t flags)
{
	struct input *in = &running->in;
	uint8_t way = input_byte(in);

	MUST(handle == running && length <= INT32_MAX && offset <= DISK_BYTES && length <= DISK_BYTES - offset);
	if (way < 32)
		return -1;
	if (way < 48 || length > OWN_BYTES / 2)
		return -EIO - 1;
	return (int64_t)(OWN_BYTES / 2 + way % ((OWN_BYTES / 2 - length) / BLOCK + 1) * BLOCK);
}

void calls_released(void *handle, uint64_t region) { MUST(handle == running && region <= OWN_BYTES); }

static void new_batch(struct calls_batch *b)
{
	*b = (struct calls_batch){ .head = calloc(CALLS_HEAD, sizeof *b->head),
				   .run = calloc((size_t)TAGS * CALLS_RUN, sizeof *b->run),
				   .offset = calloc(TAGS, sizeof *b->offset),
				   .length = calloc(TAGS, sizeof *b->length),
				   .start = calloc(TAGS, sizeof *b->start),
				   .end = calloc(TAGS, sizeof *b->end),
				   .index = calloc(TAGS, sizeof *b->index),
				   .flags = calloc(TAGS, sizeof *b->flags),
				   .op = calloc(TAGS, sizeof *b->op),
				   .result = calloc(TAGS, sizeof *b->result),
				   .later = calloc(TAGS, sizeof *b->later) };
}

static void free_batch(struct calls_batch *b)
{
	free(b->head);
	free(b->run);
	free(b->offset);
	free(b->length);
	free(b->start);
	free(b->end);
	free(b->index);
	free(b->flags);
	free(b->op);
	free(b->result);
	free(b->later);
}

static struct storage *new_storage(struct rig *r)
{
	uint8_t shape = input_byte(&r->in);
	struct calls_places places = { .slots_bytes = shape & 1 ? OWN_BYTES / 2 : 0,
				       .slot_bytes = IO_BYTES,
				       .asks = shape >> 1 & 1,
				       .post_max_bytes = shape & 4 ? SMALL_BYTES : IO_BYTES };

	switch (r->kind) {
	case NULL_STORAGE:
		return storage_null_new(IO_BYTES);
	case MEMORY_STORAGE:
		return storage_memory_new(shape & 1);
	case CALLS_STORAGE:
		new_batch(&r->batch);
		r->disk = memory(DISK_BYTES);
		return storage_calls_new(r, &r->batch, &places);
	default:
		r->file = memfd_create("fuzz", MFD_CLOEXEC);
		MUST(r->file >= 0 && ftruncate(r->file, DISK_BYTES - (shape & 1) * BLOCK) == 0);
		return storage_file_new(r->file, 0, IO_BYTES);
	}
}

static void open_engine(struct rig *r)
{
	uint8_t shape = input_byte(&r->in);
	int error;

	/* A file is rare, since its io_uring costs more than the rest of an input.  It is never behind rings, since a
	 * loop that has refused an index does not reap the kernel's completions. */
	r->kind = !RINGS && shape % 16 == 15 ? FILE_STORAGE : (enum kind)(shape % 3);
	r->setup = (struct engine_setup){ .device = DEVICE,
					  .epoch = EPOCH,
					  .queues = QUEUES,
					  .depth = DEPTH,
					  .read_only = shape >> 4 == 0,
					  .size_bytes = DISK_BYTES,
					  .pool = memory(POOL_BYTES),
					  .pool_bytes = POOL_BYTES,
					  .slice_bytes = SLICE_BYTES,
					  .own = memory(OWN_BYTES),
					  .own_bytes = OWN_BYTES,
					  .own_segment = OWN_SEGMENT,
					  .post_sizes = shape & 32 ? 2 : 0,
					  .post_bytes = { SMALL_BYTES, IO_BYTES } };
	r->setup.slices[SLICE] = memory(SLICE_BYTES);
	r->storage = new_storage(r);
	r->engine = engine_open(&r->setup, r->storage, &error);
	MUST(r->engine);
}

static void keep(struct rig *r, const struct wire_descriptor *d) { r->kept[r->keeps++ % KEPT] = *d; }

static void check_answer(const struct wire_descriptor *d)
{
	MUST(d->device == DEVICE && d->queue < QUEUES);
	MUST(d->kind == WIRE_PLACED || d->kind == WIRE_REJECT || d->kind == WIRE_DONE || d->kind == WIRE_FENCED ||
	     d->kind == WIRE_POST);
	if (d->segment == OWN_SEGMENT && d->kind != WIRE_FENCED)
		MUST(d->buffer <= OWN_BYTES && d->length <= OWN_BYTES - d->buffer);
}

static void take_answers(struct rig *r, uint32_t queue)
{
	const struct wire_descriptor *answers;
	uint32_t count = engine_answers(r->engine, queue, &answers);

	for (uint32_t i = 0; i < count; i++) {
		check_answer(&answers[i]);
		keep(r, &answers[i]);
	}
	engine_answers_sent(r->engine, queue, count);
}

static struct wire_descriptor fresh(struct rig *r)
{
	static const uint8_t kinds[] = { WIRE_REQUEST, WIRE_REQUEST, WIRE_PLACE, WIRE_WELCOME, WIRE_FENCE };
	static const uint8_t ops[] = { WIRE_READ, WIRE_WRITE, WIRE_WRITE, WIRE_FLUSH, WIRE_DISCARD, WIRE_WRITE_ZEROES };
	static const uint32_t segments[] = { WIRE_SEGMENT_NONE, WIRE_SEGMENT_POOL, WIRE_SEGMENT_CLIENTS + SLICE };
	struct wire_descriptor d = { .kind = kinds[input_below(&r->in, sizeof kinds)],
				     .op = ops[input_below(&r->in, sizeof ops)],
				     .device = DEVICE };

	d.queue = (uint16_t)input_below(&r->in, QUEUES);
	d.tag = (uint16_t)input_below(&r->in, DEPTH);
	d.epoch = EPOCH + input_below(&r->in, 8) / 7;
	d.sequence = ++r->sequence;
	d.length = (1 + input_below(&r->in, IO_BYTES / BLOCK)) * (uint64_t)BLOCK;
	d.offset = input_below(&r->in, DISK_BYTES / BLOCK) * (uint64_t)BLOCK;
	d.segment = segments[input_below(&r->in, 3)];
	d.buffer = input_below(&r->in, 8) * (uint64_t)BLOCK;
	d.flags = input_byte(&r->in) & (WIRE_FUA | WIRE_NOUNMAP | WIRE_REPLAY);
	return d;
}

/* A worker's next descriptor about an answer: DATA for its region, or RELEASE. */
static struct wire_descriptor follow_up(struct rig *r)
{
	struct wire_descriptor d = r->kept[input_below(&r->in, KEPT)];
	bool releases = input_bit(&r->in);

	if (d.kind == WIRE_POST) {
		d.tag = (uint16_t)input_below(&r->in, DEPTH);
		d.sequence = ++r->sequence;
		d.offset = input_below(&r->in, DISK_BYTES / BLOCK) * (uint64_t)BLOCK;
		d.op = WIRE_WRITE;
	}
	d.kind = releases ? WIRE_RELEASE : WIRE_DATA;
	return d;
}

static struct wire_descriptor word(struct rig *r)
{
	struct wire_descriptor d;
	uint8_t way = input_byte(&r->in);

	if (way < 8) {
		for (size_t i = 0; i < sizeof d; i += 8)
			((uint64_t *)&d)[i / 8] = input_number(&r->in, 8);
		return d;
	}
	d = way & 1 ? fresh(r) : follow_up(r);
	if (way >= 128)
		input_spoil(&r->in, &d);
	return d;
}

static void say_in_ring(struct rig *r, const struct wire_descriptor *words, unsigned count)
{
	struct sr_end *end = &r->to_backend[input_below(&r->in, QUEUES)];
	int64_t room = sr_room(end, count);

	if (room <= 0)
		return;
	sr_write(end, words, (uint32_t)room);
	sr_publish(end, input_bit(&r->in));
}

static void say(struct rig *r)
{
	struct wire_descriptor words[FRAME_MAX];
	unsigned count = 1 + input_below(&r->in, FRAME_MAX);
	int error;

	for (unsigned i = 0; i < count; i++)
		words[i] = word(r);
	if (RINGS) {
		say_in_ring(r, words, count);
		return;
	}
	error = engine_take(r->engine, words, count);
	MUST(error == 0 || error == -EPROTO);
	r->is_over = error;
}

/* The worker can write anywhere in the rings' memory. */
static void poke(struct rig *r)
{
	uint32_t queue = input_below(&r->in, QUEUES);
	uint8_t *at = r->ring_memory[queue];
	bool to_worker = input_bit(&r->in);
	struct sr_shared *s = (struct sr_shared *)(at + (to_worker ? SR_CONTROL_BYTES / 2 : 0));
	_Atomic uint32_t *words[] = { &s->tail, &s->head, &s->sleeping };
	_Atomic uint32_t *one = words[input_below(&r->in, 3)];

	if (input_below(&r->in, 4) == 0) {
		uint64_t bytes = ports_memory_bytes(ENTRIES) - SR_CONTROL_BYTES;

		at[SR_CONTROL_BYTES + input_number(&r->in, 4) % bytes] = input_byte(&r->in);
	} else {
		atomic_store(one, (uint32_t)input_value(&r->in, atomic_load(one), 4));
		r->head_is_poked[queue] |= !to_worker && one == &s->head;
	}
}

/* Whether a tail is further from the backend's own index than the ring's length. */
static bool has_impossible_tail(const struct rig *r)
{
	for (uint32_t q = 0; q < QUEUES; q++) {
		const struct sr_shared *s = (const struct sr_shared *)r->ring_memory[q];

		if (!r->head_is_poked[q] && atomic_load(&s->tail) - atomic_load(&s->head) > ENTRIES)
			return true;
	}
	return false;
}

/* The worker reads the backend's descriptors. */
static void hear_ring(struct rig *r, uint32_t queue)
{
	struct sr_end *end = &r->from_backend[queue];
	int64_t waiting = sr_waiting(end);

	while (waiting > 0) {
		const uint8_t *at;
		uint32_t count = sr_peek(end, (uint32_t)waiting, &at);

		for (uint32_t i = 0; i < count; i++) {
			struct wire_descriptor d;

			memcpy(&d, at + (size_t)i * sizeof d, sizeof d);
			keep(r, &d);
		}
		sr_consumed(end, count);
		waiting -= count;
	}
}

/* The caller executes the batch: some requests succeed, some fail, some are left for later. */
static void do_batch(struct rig *r)
{
	for (uint32_t i = 0; i < r->out; i++) {
		uint8_t way = input_byte(&r->in);

		r->batch.later[i] = way < 16;
		if (way < 16)
			r->late[r->lates++] = r->batch.index[i];
		else if (way < 32)
			r->batch.result[i] = -EIO;
		else if (way < 40)
			r->batch.result[i] = (int32_t)input_number(&r->in, 4);
	}
	MUST(calls_copy(r->storage, r->disk, DISK_BYTES, NULL) == 0);
	r->out = 0;
}

static void finish_late(struct rig *r)
{
	while (r->lates)
		calls_finish(r->storage, r->late[--r->lates], 0);
}

static void work(struct rig *r)
{
	if (r->out)
		do_batch(r);
	engine_collect(r->engine);
	if (r->lates && input_bit(&r->in))
		finish_late(r);
	if (!RINGS)
		r->out = engine_hand_out(r->engine);
}

/* The backend's loop: the native one, or ports and engine one after the other as Python's loop calls them. */
static void turn_rings(struct rig *r)
{
	bool impossible = has_impossible_tail(r);
	int bits;

	if (r->kind == CALLS_STORAGE)
		work(r);
	bits = ring_loop_run(r->loop, 0, 1);
	MUST(bits >= 0 || bits == -EPROTO);
	MUST(!impossible || bits == -EPROTO);
	if (bits < 0)
		r->is_over = true;
	else if (bits & RING_LOOP_CALLS)
		r->out = r->batch.head[CALLS_COUNT];
}

static void step(struct rig *r)
{
	unsigned way = input_below(&r->in, 8);

	if (way < 4) {
		say(r);
	} else if (way == 4 && RINGS) {
		poke(r);
	} else if (way == 5) {
		uint32_t queue = input_below(&r->in, QUEUES);

		if (RINGS)
			hear_ring(r, queue);
		else
			take_answers(r, queue);
	} else if (RINGS) {
		turn_rings(r);
	} else if (r->kind == CALLS_STORAGE) {
		work(r);
	} else {
		int error = engine_turn(r->engine);

		MUST(error == 0 || (error == -ENODATA && r->kind == FILE_STORAGE));
		r->is_over = error;
	}
}

static void open_rings(struct rig *r)
{
	int error;

	if (watched < 0)
		watched = eventfd(0, EFD_CLOEXEC);
	r->ports = ports_new(QUEUES, EPOCH, 4 * ENTRIES);
	MUST(r->ports);
	r->loop = ring_loop_new(r->ports, r->engine, QUEUES, DEPTH, watched, &error);
	MUST(r->loop);
	for (uint32_t q = 0; q < QUEUES; q++) {
		uint64_t bytes = ports_memory_bytes(ENTRIES);

		r->ring_memory[q] = aligned_alloc(SR_LINE_BYTES, bytes);
		MUST(r->ring_memory[q]);
		memset(r->ring_memory[q], 0, bytes);
		sr_begin(r->ring_memory[q], ENTRIES);
		r->to_backend[q] = sr_end_to_backend(r->ring_memory[q], ENTRIES, 1);
		r->from_backend[q] = sr_end_to_worker(r->ring_memory[q], ENTRIES, 0);
		for (unsigned i = 0; i < 2; i++)
			r->bells[q][i] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
		ports_open(r->ports, q, r->ring_memory[q], ENTRIES, r->bells[q][0], r->bells[q][1]);
		ring_loop_bells(r->loop, q, r->bells[q][0], r->bells[q][1]);
	}
}

static void close_rings(struct rig *r)
{
	for (uint32_t q = 0; q < QUEUES; q++) {
		ring_loop_bells(r->loop, q, -1, -1);
		ports_end(r->ports, q);
		close(r->bells[q][0]);
		close(r->bells[q][1]);
	}
	ring_loop_free(r->loop);
	ports_free(r->ports);
	for (uint32_t q = 0; q < QUEUES; q++)
		free(r->ring_memory[q]);
}

/* Each request that has begun must end, whatever was sent; only then may its memory be freed. */
static void await_end(struct rig *r)
{
	struct engine_statistics count = { 0 };

	r->in.left = 0;
	for (int waited = 0; waited < WAIT_MS_MAX; waited++) {
		if (r->kind == CALLS_STORAGE) {
			if (r->out)
				do_batch(r);
			engine_collect(r->engine);
			finish_late(r);
			r->out = engine_hand_out(r->engine);
		} else if (RINGS) {
			ring_loop_run(r->loop, 1, 0);
		} else {
			struct pollfd completes = { .fd = engine_file(r->engine), .events = POLLIN };

			engine_turn(r->engine);
			poll(&completes, 1, r->kind == FILE_STORAGE);
		}
		count = (struct engine_statistics){ 0 };
		engine_count(r->engine, &count);
		if (!count.running)
			return;
	}
	MUST(!count.running);
}

static void end(struct rig *r)
{
	await_end(r);
	if (RINGS)
		close_rings(r);
	engine_close(r->engine);
	if (r->file >= 0)
		close(r->file);
	free_batch(&r->batch);
	free(r->disk);
	free(r->setup.pool);
	free(r->setup.own);
	free(r->setup.slices[SLICE]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct rig r = { .in = { data, size }, .file = -1 };

	running = &r;
	open_engine(&r);
	if (RINGS)
		open_rings(&r);
	for (unsigned steps = 0; r.in.left && !r.is_over && steps < STEPS_MAX; steps++)
		step(&r);
	end(&r);
	return 0;
}
