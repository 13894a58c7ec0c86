/*
 * Drives the queue core as io_uring and a backend would, for counting its instructions:
 * `queue_cost CASE frames|rings|inside BATCH ROUNDS`.  Inside, the engine is the native one and counts as well.
 *
 * What is counted is what it calls in the core.  Makes no system call while it counts, and does the same each time.
 */
#include "engine.h"
#include "queue_core.h"
#include "queue_inside.h"
#include "queue_port.h"
#include "shared_ring.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEPTH = 4096, IO_BYTES = 4096, SECTORS = IO_BYTES / 512, DEVICE = 7, EPOCH = 1, SEGMENT = 1 };

static const struct kind {
	const char *name;
	uint8_t op, need_get_data, place_in_backend, reads_own, posts, alone;
} kinds[] = {
	{ "write-alone", WIRE_WRITE, 1, 0, 0, 0, 1 },  { "read-alone", WIRE_READ, 1, 0, 0, 0, 1 },
	{ "write-pool", WIRE_WRITE, 1, 0, 0, 0, 0 },   { "write-backend", WIRE_WRITE, 1, 1, 0, 0, 0 },
	{ "write-posted", WIRE_WRITE, 1, 1, 0, 1, 0 }, { "write-lent", WIRE_WRITE, 0, 0, 0, 0, 0 },
	{ "read-pool", WIRE_READ, 1, 0, 0, 0, 0 },     { "read-own", WIRE_READ, 1, 0, 1, 0, 0 },
	{ "flush", WIRE_FLUSH, 1, 0, 0, 0, 0 },        { "discard", WIRE_DISCARD, 1, 0, 0, 0, 0 },
};

static struct uq_iod descriptors[DEPTH];
static struct uq_slot slots[DEPTH];
static struct uq_block block;
static const struct uq_stats *const stats = &block.stats;
static uint8_t pool[DEPTH * IO_BYTES] __attribute__((aligned(4096)));
static uint8_t own[DEPTH * IO_BYTES] __attribute__((aligned(4096)));
static uint8_t scratch[IO_BYTES] __attribute__((aligned(4096)));
static const uint8_t zeros[IO_BYTES] __attribute__((aligned(4096)));
static struct uq_command commands[DEPTH];
static struct wire_descriptor requests[2 * DEPTH], answers[2 * DEPTH];

/* A queue, and what leads to its backend: frames, the two ends of rings, or an engine in this process. */
struct link {
	struct uq *q;
	struct uq_port *port;  /* NULL for frames */
	struct sr_end in, out; /* the backend's */
	struct engine *engine; /* NULL for a backend in its own process */
};

static _Noreturn void fail(const char *what)
{
	fprintf(stderr, "queue_cost: %s\n", what);
	exit(1);
}

static unsigned take_commands(struct uq *q)
{
	unsigned count = uq_commands(q, commands, DEPTH);

	uq_commands_taken(q, count);
	return count;
}

static void arrive(struct uq *q, const struct kind *k, unsigned batch)
{
	for (unsigned tag = 0; tag < batch; tag++) {
		descriptors[tag] = (struct uq_iod){ .op_flags = k->op,
						    .sectors = SECTORS,
						    .start_sector = (uint64_t)tag * SECTORS };
		uq_complete(q, tag, k->op == WIRE_WRITE && k->need_get_data ? 1 : 0);
	}
}

static struct wire_descriptor post(uint64_t buffer)
{
	return (struct wire_descriptor){ .kind = WIRE_POST,
					 .device = DEVICE,
					 .epoch = EPOCH,
					 .segment = SEGMENT,
					 .buffer = buffer,
					 .length = IO_BYTES };
}

static struct wire_descriptor answer(const struct kind *k, const struct wire_descriptor *d)
{
	struct wire_descriptor a = *d;

	if (d->kind == WIRE_RELEASE)
		return post(d->buffer);
	if (d->kind == WIRE_PLACE) {
		a.kind = WIRE_PLACED;
		a.segment = SEGMENT;
		a.buffer = (uint64_t)d->tag * IO_BYTES;
		return a;
	}
	a.kind = WIRE_DONE;
	a.flags = 0;
	a.result = d->op == WIRE_READ || d->op == WIRE_WRITE ? IO_BYTES : 0;
	if (k->reads_own) {
		a.flags = WIRE_REGION;
		a.segment = SEGMENT;
		a.buffer = (uint64_t)d->tag * IO_BYTES;
	}
	return a;
}

/* What the backend is sent. */
static unsigned receive(struct link *l)
{
	const struct wire_descriptor *first;
	const uint8_t *at;
	unsigned count = 0;

	if (!l->port) {
		count = uq_output(l->q, &first);
		memcpy(requests, first, count * sizeof *first);
		uq_output_sent(l->q, count);
		return count;
	}
	uq_port_turn(l->port, l->q);
	for (int64_t waiting = sr_waiting(&l->in); waiting > 0; waiting = sr_waiting(&l->in)) {
		uint32_t piece = sr_peek(&l->in, (uint32_t)waiting, &at);

		memcpy(requests + count, at, piece * sizeof requests[0]);
		sr_consumed(&l->in, piece);
		count += piece;
	}
	return count;
}

static void send(struct link *l, unsigned count)
{
	if (!l->port) {
		uq_input(l->q, answers, count * sizeof answers[0]);
		return;
	}
	if (sr_room(&l->out, count) != count)
		fail("the ring is full");
	sr_write(&l->out, answers, count);
	sr_publish(&l->out, 0);
	uq_port_turn(l->port, l->q);
}

/* What is only told has no answer, but a region that is back can be posted again. */
static bool has_answer(const struct kind *k, unsigned kind)
{
	return kind == WIRE_REQUEST || kind == WIRE_PLACE || kind == WIRE_DATA || (kind == WIRE_RELEASE && k->posts);
}

/* One way and back. */
static void exchange(struct link *l, const struct kind *k)
{
	unsigned count, answered = 0;

	if (l->engine) {
		uq_inside_turn(l->q, engine_calls(), l->engine);
		return;
	}
	count = receive(l);
	for (unsigned i = 0; i < count; i++)
		if (has_answer(k, requests[i].kind))
			answers[answered++] = answer(k, &requests[i]);
	if (answered)
		send(l, answered);
}

/* The data has been copied: the second completion of a write with need_get_data. */
static void copied(struct uq *q)
{
	unsigned count = take_commands(q);

	for (unsigned i = 0; i < count; i++)
		if (commands[i].op == UQ_CMD_GET_DATA)
			uq_complete(q, commands[i].tag, 0);
}

static void rounds(struct link *l, const struct kind *k, unsigned batch, unsigned count)
{
	for (unsigned i = 0; i < count; i++) {
		uq_tick(l->q, 1);
		arrive(l->q, k, batch);
		if (k->place_in_backend && !k->posts)
			exchange(l, k);
		copied(l->q);
		if (!k->alone)
			exchange(l, k);
		take_commands(l->q);
	}
}

static struct uq *make(const struct kind *k)
{
	struct uq_config config = {
		.device = DEVICE,
		.epoch = EPOCH,
		.max_io_bytes = IO_BYTES,
		.block_bytes = 512,
		.depth = DEPTH,
		.need_get_data = k->need_get_data,
		.place_in_backend = k->place_in_backend,
		.classes = 1,
		.class = { { .buffer_bytes = IO_BYTES, .count = DEPTH, .reserve = 1, .batch = DEPTH, .most = DEPTH } },
		.descriptors = descriptors,
		.pool = pool,
		.slots = slots,
		.scratch = scratch,
		.stats = &block.stats,
		.latencies = &block.latencies,
		.zeros = k->alone ? zeros : NULL,
	};
	uint32_t all[DEPTH];
	struct uq *q = uq_new(&config);

	for (uint32_t i = 0; i < DEPTH; i++)
		all[i] = i;
	if (!q || uq_stock_add(q, 0, all, DEPTH) || uq_start(q))
		fail("the core does not accept its config");
	take_commands(q);
	if (!k->alone && uq_link_expect(q, SEGMENT, own, sizeof own, k->reads_own, 0))
		fail("the core expects no backend");
	return q;
}

/* The null engine, and for what lies in its own memory the memory disk, as the workers open them. */
static void attach_engine(struct link *l, const struct kind *k)
{
	bool is_disk = k->place_in_backend || k->reads_own;
	struct engine_setup setup = {
		.device = DEVICE,
		.epoch = EPOCH,
		.queues = 1,
		.depth = DEPTH,
		.size_bytes = sizeof own,
		.pool = pool,
		.pool_bytes = sizeof pool,
		.own = is_disk ? own : NULL,
		.own_bytes = is_disk ? sizeof own : 0,
		.own_segment = is_disk ? SEGMENT : 0,
	};
	int error;

	l->engine =
		engine_open(&setup, is_disk ? storage_memory_new(k->reads_own) : storage_null_new(IO_BYTES), &error);
	if (!l->engine)
		fail("the engine does not open");
	uq_inside_begin(l->q, engine_calls(), l->engine);
	answers[0] = (struct wire_descriptor){ .kind = WIRE_HELLO, .device = DEVICE, .epoch = EPOCH };
	uq_input(l->q, answers, sizeof answers[0]);
	exchange(l, k);
}

static void attach(struct link *l, const struct kind *k, bool rings)
{
	uint32_t entries = uq_port_entries(DEPTH);
	uint8_t *memory = rings ? aligned_alloc(4096, uq_port_bytes(entries)) : NULL;

	if (memory)
		l->port = uq_port_new(memset(memory, 0, uq_port_bytes(entries)), entries);
	if (rings && !l->port)
		fail("no memory for the rings");
	if (rings) {
		l->in = sr_end_to_backend(memory, entries, 0);
		l->out = sr_end_to_worker(memory, entries, 1);
	}
	answers[0] = (struct wire_descriptor){ .kind = WIRE_HELLO, .device = DEVICE, .epoch = EPOCH };
	send(l, 1);
	receive(l);
	for (unsigned i = 0; i < DEPTH && k->posts; i++)
		answers[i] = post((uint64_t)i * IO_BYTES);
	if (k->posts)
		send(l, DEPTH);
}

int main(int argc, char **argv)
{
	unsigned batch = argc == 5 ? (unsigned)atoi(argv[3]) : 0, count = argc == 5 ? (unsigned)atoi(argv[4]) : 0;
	bool rings = argc == 5 && !strcmp(argv[2], "rings");

	for (size_t i = 0; i < sizeof kinds / sizeof kinds[0] && batch && batch <= DEPTH && count; i++) {
		struct link l = { 0 };

		if (strcmp(kinds[i].name, argv[1]))
			continue;
		l.q = make(&kinds[i]);
		if (argc == 5 && !strcmp(argv[2], "inside"))
			attach_engine(&l, &kinds[i]);
		else if (!kinds[i].alone)
			attach(&l, &kinds[i], rings);
		rounds(&l, &kinds[i], batch, count);
		if (stats->requests[kinds[i].op] != (uint64_t)batch * count || stats->errors || stats->violations ||
		    uq_in_flight(l.q) || stats->posts_used != (kinds[i].posts ? stats->requests[kinds[i].op] : 0))
			fail("not every request was served");
		return 0;
	}
	fail("usage: queue_cost CASE frames|rings|inside BATCH ROUNDS");
}
