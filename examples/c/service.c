#include "service.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

enum { OWN_BYTES = 16 << 20, PAGE = 4096 };

static void *allocate(size_t count, size_t bytes)
{
	void *memory = calloc(count ? count : 1, bytes);

	if (!memory)
		fail("no memory");
	return memory;
}

/* Memory that the kernel copies writes into: sealed, since the worker must not meet its end, and allocated, since a
 * missing page would stall the device. */
static void make_own_segment(struct properties *properties, uint64_t slot_bytes)
{
	int file = memfd_create("example-backend", MFD_CLOEXEC | MFD_ALLOW_SEALING), error;

	properties->segment_bytes = slot_bytes > OWN_BYTES ? slot_bytes : OWN_BYTES;
	error = file < 0 ? errno : posix_fallocate(file, 0, (off_t)properties->segment_bytes);
	if (error)
		fail("no memory for a segment: %s", strerror(error));
	if (fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL))
		fail("sealing the segment: %s", strerror(errno));
	properties->segment_fd = file;
}

static void make_slots(struct service *service, uint64_t segment_bytes)
{
	uint64_t count = segment_bytes / service->slot_bytes;

	service->free_slots = allocate(count, sizeof *service->free_slots);
	for (uint64_t i = 0; i < count; i++)
		service->free_slots[service->free_count++] = i * service->slot_bytes;
}

static void open_queues(struct service *service)
{
	service->queues = allocate(service->attached.queues, sizeof *service->queues);
	for (uint32_t i = 0; i < service->attached.queues; i++)
		service->queues[i].regions = allocate(service->attached.depth, sizeof(struct region));
}

/* Signals wake the loop as a descriptor, so that none arrives just before it sleeps. */
static void take_signals(struct service *service)
{
	sigset_t signals;

	sigemptyset(&signals);
	sigaddset(&signals, SIGTERM);
	sigaddset(&signals, SIGINT);
	if (sigprocmask(SIG_BLOCK, &signals, NULL))
		fail("sigprocmask: %s", strerror(errno));
	service->signals = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
	if (service->signals < 0)
		fail("signalfd: %s", strerror(errno));
}

static uint64_t size_argument(const char *text)
{
	char *end;
	uint64_t bytes;

	errno = 0;
	bytes = strtoull(text, &end, 10);
	if (errno || *end || end == text || bytes > INT64_MAX || bytes % DISK_BLOCK_BYTES) {
		fprintf(stderr, "SIZE_BYTES must be a multiple of %d, not %s\n", DISK_BLOCK_BYTES, text);
		exit(2);
	}
	return bytes;
}

void service_open(struct service *service, const char *kind, int argument_count, char **arguments)
{
	static struct disk disk;
	struct properties properties = { .logical_block_bytes = DISK_BLOCK_BYTES, .segment_fd = -1 };
	struct described described;
	uint64_t size_bytes;

	if (argument_count < 4 || argument_count > 5) {
		fprintf(stderr, "usage: %s RUN_DIR DEVICE FILE [SIZE_BYTES]\n", arguments[0]);
		exit(2);
	}
	size_bytes = argument_count > 4 ? size_argument(arguments[4]) : 0;
	memset(service, 0, sizeof *service);
	take_signals(service);
	describe_device(arguments[1], arguments[2], &described);
	disk_open(&disk, arguments[3], size_bytes, &described);
	service->disk = &disk;
	service->slot_bytes = (described.max_io_bytes + PAGE - 1) & ~(uint64_t)(PAGE - 1);
	if (described.places_in_backend)
		make_own_segment(&properties, service->slot_bytes);
	properties.size_bytes = disk.bytes;
	properties.read_only = disk.read_only;
	properties.identity = described.has_identities ? disk.identity : NULL;
	properties.store = arguments[3];
	attach_to_device(arguments[1], arguments[2], kind, &properties, &service->attached);
	service->epoch = service->attached.epoch;
	open_queues(service);
	if (properties.segment_fd >= 0) {
		service->own = map_file(properties.segment_fd, properties.segment_bytes);
		make_slots(service, properties.segment_bytes);
	}
	/* The memory of this process must not wait for its own device; without the privilege it goes on. */
	prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
}

struct wire_descriptor hello(const struct service *service, uint32_t queue)
{
	return (struct wire_descriptor){
		.kind = WIRE_HELLO,
		.device = service->attached.device,
		.queue = (uint16_t)queue,
		.epoch = service->epoch,
	};
}

/* An answer repeats what identifies its request. */
static struct wire_descriptor *answer(struct service *service, const struct wire_descriptor *to, uint8_t kind,
				      int32_t result)
{
	struct outbox *out = &service->queues[to->queue].out;
	struct wire_descriptor *added;

	if (out->count == out->room) {
		struct wire_descriptor *more;

		out->room = out->room ? 2 * out->room : 64;
		more = realloc(out->at, out->room * sizeof *out->at);
		if (!more)
			fail("no memory");
		out->at = more;
	}
	added = &out->at[out->count++];
	*added = *to;
	added->kind = kind;
	added->flags = 0;
	added->result = result;
	added->segment = WIRE_SEGMENT_NONE;
	added->buffer = added->reserved = 0;
	return added;
}

void outbox_sent(struct outbox *out, unsigned count)
{
	out->count -= count;
	if (out->count)
		memmove(out->at, out->at + count, out->count * sizeof *out->at);
}

/* The memory that a request names; NULL if there is no such memory. */
static uint8_t *memory_of(const struct service *service, const struct wire_descriptor *d)
{
	for (unsigned i = 0; i < service->attached.segment_count; i++) {
		const struct segment *each = &service->attached.segments[i];

		if (each->number == d->segment)
			return d->buffer <= each->bytes && d->length <= each->bytes - d->buffer
				       ? each->memory + d->buffer
				       : NULL;
	}
	return NULL;
}

static int32_t execute(const struct service *service, const struct wire_descriptor *d)
{
	bool moves = d->op == WIRE_READ || d->op == WIRE_WRITE, fua = d->flags & WIRE_FUA;
	uint8_t *memory = moves ? memory_of(service, d) : NULL;

	if (moves && (!memory || d->length > service->attached.max_io_bytes))
		fail("queue %u: a request names memory that there is not", d->queue);
	switch (d->op) {
	case WIRE_READ:
		return disk_read(service->disk, memory, d->offset, d->length);
	case WIRE_WRITE:
		return disk_write(service->disk, memory, d->offset, d->length, fua);
	case WIRE_FLUSH:
		return disk_flush(service->disk);
	case WIRE_DISCARD:
		return disk_discard(service->disk, d->offset, d->length);
	case WIRE_WRITE_ZEROES:
		return disk_zero(service->disk, d->offset, d->length, !(d->flags & WIRE_NOUNMAP), fua);
	default:
		return -EOPNOTSUPP;
	}
}

static void lend(struct service *service, struct region *region)
{
	struct wire_descriptor *placed = answer(service, &region->place, WIRE_PLACED, 0);

	region->state = REGION_LENT;
	region->offset = service->free_slots[--service->free_count];
	placed->segment = service->attached.own_segment;
	placed->buffer = region->offset;
}

/* The write that has waited longest for a slot. */
static struct region *first_that_waits(struct service *service)
{
	struct region *first = NULL;

	for (uint32_t q = 0; q < service->attached.queues; q++) {
		for (uint32_t tag = 0; tag < service->attached.depth; tag++) {
			struct region *each = &service->queues[q].regions[tag];

			if (each->state == REGION_WAITS && (!first || each->turn < first->turn))
				first = each;
		}
	}
	return first;
}

static void take_back(struct service *service, struct region *region)
{
	bool was_lent = region->state == REGION_LENT;
	struct region *next;

	region->state = REGION_NONE;
	if (!was_lent)
		return;
	service->free_slots[service->free_count++] = region->offset;
	next = first_that_waits(service);
	if (next)
		lend(service, next);
}

static void place(struct service *service, struct region *region, const struct wire_descriptor *d)
{
	if (region->state != REGION_NONE || d->length > service->slot_bytes)
		fail("queue %u: a PLACE that cannot be", d->queue);
	if (!service->own) {
		answer(service, d, WIRE_REJECT, -EOPNOTSUPP);
		return;
	}
	region->state = REGION_WAITS;
	region->place = *d;
	region->turn = service->turns++;
	if (service->free_count)
		lend(service, region);
}

static void store_placed(struct service *service, const struct region *region, const struct wire_descriptor *d)
{
	if (region->state != REGION_LENT || region->place.sequence != d->sequence || d->length > service->slot_bytes)
		fail("queue %u: data for a region that is not lent", d->queue);
	answer(service, d, WIRE_DONE,
	       disk_write(service->disk, service->own + region->offset, d->offset, d->length, d->flags & WIRE_FUA));
}

static void release(struct service *service, struct region *region, const struct wire_descriptor *d)
{
	if (region->place.sequence == d->sequence)
		take_back(service, region);
}

/* Nothing executes between two descriptors, so what a dead worker's writes had is free at once. */
static void fence(struct service *service, uint32_t queue, const struct wire_descriptor *d)
{
	struct queue *q = &service->queues[queue];

	q->fenced = d->epoch;
	if (d->epoch > service->epoch)
		service->epoch = d->epoch;
	for (uint32_t tag = 0; tag < service->attached.depth; tag++)
		if (q->regions[tag].state == REGION_WAITS && q->regions[tag].place.epoch < d->epoch)
			take_back(service, &q->regions[tag]);
	for (uint32_t tag = 0; tag < service->attached.depth; tag++)
		if (q->regions[tag].state == REGION_LENT && q->regions[tag].place.epoch < d->epoch)
			take_back(service, &q->regions[tag]);
	answer(service, d, WIRE_FENCED, 0);
}

void serve(struct service *service, uint32_t queue, const struct wire_descriptor *d)
{
	struct region *region;

	if (d->device != service->attached.device || d->queue != queue || d->tag >= service->attached.depth)
		fail("queue %u: a descriptor for another", queue);
	region = &service->queues[queue].regions[d->tag];
	if (d->kind == WIRE_FENCE)
		fence(service, queue, d);
	else if (d->kind == WIRE_WELCOME || d->epoch < service->queues[queue].fenced)
		return;
	else if (d->kind == WIRE_REQUEST)
		answer(service, d, WIRE_DONE, execute(service, d));
	else if (d->kind == WIRE_PLACE)
		place(service, region, d);
	else if (d->kind == WIRE_DATA)
		store_placed(service, region, d);
	else if (d->kind == WIRE_RELEASE)
		release(service, region, d);
	else
		fail("queue %u: a descriptor of kind %u", queue, d->kind);
}

bool service_ends(struct service *service, bool signal_came, bool daemon_speaks, unsigned linked, int *status)
{
	enum said said = daemon_speaks ? hear_daemon(&service->attached) : SAID_NOTHING;

	*status = 0;
	if (signal_came || said == SAID_DETACH)
		return true;
	if (said == SAID_GONE)
		service->orphaned = true;
	*status = 1;
	return service->orphaned && !linked;
}
