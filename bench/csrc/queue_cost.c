/*
 * Drives the queue core as a ring and a backend would, for counting its instructions: `queue_cost CASE BATCH ROUNDS`.
 *
 * Everything that is counted is called from rounds(), nothing else calls it.  Makes no system call while it counts, and
 * does the same each time.
 */
#include "queue_core.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEPTH = 128, IO_BYTES = 4096, SECTORS = IO_BYTES / 512, WARM_UP_ROUNDS = 8, DEVICE = 7, EPOCH = 1, SEGMENT = 1 };

static const struct kind {
	const char *name;
	uint8_t op, need_get_data, place_in_backend, reads_own;
} kinds[] = {
	{ "write-pool", UQ_WRITE, 1, 0, 0 },
	{ "write-backend", UQ_WRITE, 1, 1, 0 },
	{ "write-lent", UQ_WRITE, 0, 0, 0 },
	{ "read-pool", UQ_READ, 1, 0, 0 },
	{ "read-own", UQ_READ, 1, 0, 1 },
	{ "flush", UQ_FLUSH, 1, 0, 0 },
	{ "discard", UQ_DISCARD, 1, 0, 0 },
};

static struct uq_iod descriptors[DEPTH];
static struct uq_slot slots[DEPTH];
static struct uq_stats stats;
static uint8_t pool[DEPTH * IO_BYTES] __attribute__((aligned(4096)));
static uint8_t own[DEPTH * IO_BYTES] __attribute__((aligned(4096)));
static uint8_t scratch[IO_BYTES] __attribute__((aligned(4096)));
static struct uq_command commands[DEPTH];
static struct uq_descriptor answers[2 * DEPTH];

static void fail(const char *what)
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
		descriptors[tag] = (struct uq_iod){ .op_flags = k->op, .sectors = SECTORS, .start_sector = tag * SECTORS };
		uq_complete(q, tag, k->op == UQ_WRITE && k->need_get_data ? 1 : 0);
	}
}

static struct uq_descriptor answer(const struct kind *k, const struct uq_descriptor *d)
{
	struct uq_descriptor a = *d;

	if (d->kind == UQ_PLACE) {
		a.kind = UQ_PLACED;
		a.segment = SEGMENT;
		a.buffer = (uint64_t)d->tag * IO_BYTES;
		return a;
	}
	a.kind = UQ_DONE;
	a.flags = 0;
	a.result = d->op == UQ_READ || d->op == UQ_WRITE ? IO_BYTES : 0;
	if (k->reads_own) {
		a.flags = UQ_REGION;
		a.segment = SEGMENT;
		a.buffer = (uint64_t)d->tag * IO_BYTES;
	}
	return a;
}

/* One frame each way; what is only told, such as RELEASE, has no answer. */
static void exchange(struct uq *q, const struct kind *k)
{
	const struct uq_descriptor *first;
	unsigned count = uq_output(q, &first), answered = 0;

	for (unsigned i = 0; i < count; i++)
		if (first[i].kind == UQ_REQUEST || first[i].kind == UQ_PLACE || first[i].kind == UQ_DATA)
			answers[answered++] = answer(k, &first[i]);
	uq_output_sent(q, count);
	if (answered)
		uq_input(q, answers, answered * sizeof answers[0]);
}

/* The data has been copied: the second completion of a write with need_get_data. */
static void copied(struct uq *q)
{
	unsigned count = take_commands(q);

	for (unsigned i = 0; i < count; i++)
		if (commands[i].op == UQ_CMD_GET_DATA)
			uq_complete(q, commands[i].tag, 0);
}

__attribute__((noinline)) void rounds(struct uq *q, const struct kind *k, unsigned batch, unsigned count)
{
	for (unsigned i = 0; i < count; i++) {
		uq_tick(q, 1);
		arrive(q, k, batch);
		if (k->place_in_backend)
			exchange(q, k);
		copied(q);
		exchange(q, k);
		take_commands(q);
	}
}

static struct uq *make(const struct kind *k)
{
	struct uq_config config = {
		.device = DEVICE, .epoch = EPOCH, .max_io_bytes = IO_BYTES, .block_bytes = 512, .depth = DEPTH,
		.need_get_data = k->need_get_data, .place_in_backend = k->place_in_backend, .classes = 1,
		.class = { { .buffer_bytes = IO_BYTES, .count = DEPTH, .reserve = 1, .batch = DEPTH, .most = DEPTH } },
		.descriptors = descriptors, .pool = pool, .slots = slots, .scratch = scratch, .stats = &stats,
	};
	struct uq_descriptor hello = { .kind = UQ_HELLO, .device = DEVICE, .epoch = EPOCH };
	const struct uq_descriptor *first;
	uint32_t all[DEPTH];
	struct uq *q = uq_new(&config);

	for (uint32_t i = 0; i < DEPTH; i++)
		all[i] = i;
	if (!q || uq_stock_add(q, 0, all, DEPTH) || uq_start(q))
		fail("the core does not accept its config");
	take_commands(q);
	if (uq_link_expect(q, SEGMENT, own, sizeof own, k->reads_own, 0))
		fail("the core expects no backend");
	uq_input(q, &hello, sizeof hello);
	uq_output_sent(q, uq_output(q, &first));
	return q;
}

int main(int argc, char **argv)
{
	unsigned batch = argc == 4 ? (unsigned)atoi(argv[2]) : 0, count = argc == 4 ? (unsigned)atoi(argv[3]) : 0;

	for (size_t i = 0; i < sizeof kinds / sizeof kinds[0] && batch && batch <= DEPTH && count; i++) {
		struct uq *q;
		uint64_t expected = (uint64_t)batch * (count + WARM_UP_ROUNDS);

		if (strcmp(kinds[i].name, argv[1]))
			continue;
		q = make(&kinds[i]);
		for (unsigned warm = 0; warm < WARM_UP_ROUNDS; warm++)
			rounds(q, &kinds[i], batch, 1);
		rounds(q, &kinds[i], batch, count);
		if (stats.requests[kinds[i].op] != expected || stats.errors || stats.violations || uq_in_flight(q))
			fail("not every request was served");
		uq_free(q);
		return 0;
	}
	fail("usage: queue_cost CASE BATCH ROUNDS");
}
