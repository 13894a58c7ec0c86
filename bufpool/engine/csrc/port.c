#include "port.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#include "shared_ring.h"
#include "wire.h"

_Static_assert(SR_ENTRY_BYTES == sizeof(struct wire_descriptor), "an entry is a descriptor");

#define POLL_EVENTS 16

struct port {
	struct sr_end in, out;
	bool open;
	int ours, workers; /* doorbells */
	/* What found no room, oldest first from `later_first` on. */
	uint8_t *later;
	uint32_t later_first, later_count, later_capacity;
};

struct ports {
	uint32_t queues, epoch, later_max;
	bool deaf;
	struct ports_statistics count;
	struct port port[];
};

struct ports *ports_new(uint32_t queues, uint32_t epoch, uint32_t later_max)
{
	struct ports *p = calloc(1, sizeof *p + queues * sizeof *p->port);
	if (p) {
		p->queues = queues;
		p->epoch = epoch;
		p->later_max = later_max;
	}
	return p;
}

void ports_free(struct ports *p)
{
	for (uint32_t i = 0; i < p->queues; i++)
		free(p->port[i].later);
	free(p);
}

uint64_t ports_memory_bytes(uint32_t entries)
{
	bool is_power = entries && (entries & (entries - 1)) == 0;
	return is_power && entries <= SR_ENTRIES_MAX ? sr_pair_bytes(entries) : 0;
}

void ports_open(struct ports *p, uint32_t queue, uint8_t *memory, uint32_t entries, int ours, int workers)
{
	struct port *port = &p->port[queue];
	port->in = sr_end_to_backend(memory, entries, 0);
	port->out = sr_end_to_worker(memory, entries, 1);
	port->ours = ours;
	port->workers = workers;
	port->open = true;
}

void ports_end(struct ports *p, uint32_t queue)
{
	struct port *port = &p->port[queue];
	p->count.dropped += port->later_count;
	port->later_first = port->later_count = 0;
	port->open = false;
}

uint32_t ports_epoch(const struct ports *p) { return p->epoch; }

/* How many queues something waits on, or -EPROTO; queues[0] is the one whose index makes no sense. */
static int32_t waiting_queues(struct ports *p, uint32_t *queues)
{
	int32_t count = 0;
	for (uint32_t i = 0; i < p->queues && !p->deaf; i++) {
		int64_t waiting = p->port[i].open ? sr_waiting(&p->port[i].in) : 0;
		if (waiting < 0) {
			queues[0] = i;
			return -EPROTO;
		}
		if (waiting)
			queues[count++] = i;
	}
	return count;
}

/* So that the HELLO to a worker's successor carries the epoch that the last one brought. */
static void note_epochs(struct ports *p, const uint8_t *entries, uint32_t count)
{
	for (uint32_t i = 0; i < count; i++) {
		const uint8_t *entry = entries + (size_t)i * SR_ENTRY_BYTES;
		uint32_t epoch;
		if (entry[offsetof(struct wire_descriptor, kind)] != WIRE_FENCE)
			continue;
		memcpy(&epoch, entry + offsetof(struct wire_descriptor, epoch), sizeof epoch);
		if (epoch > p->epoch)
			p->epoch = epoch;
	}
}

int32_t ports_peek(struct ports *p, uint32_t queue, const void **at)
{
	struct port *port = &p->port[queue];
	int64_t waiting = port->open ? sr_waiting(&port->in) : 0;
	if (waiting < 0)
		return -EPROTO;
	return waiting ? (int32_t)sr_peek(&port->in, (uint32_t)waiting, (const uint8_t **)at) : 0;
}

void ports_consumed(struct ports *p, uint32_t queue, uint32_t count)
{
	struct sr_end *in = &p->port[queue].in;
	note_epochs(p, sr_entry(in, in->mine), count);
	sr_consumed(in, count);
	p->count.descriptors_in += count;
}

int32_t ports_size(const struct ports *p, uint32_t queue)
{
	return p->port[queue].open ? (int32_t)p->port[queue].in.size : 0;
}

int32_t ports_take(struct ports *p, uint32_t queue, void *to, uint32_t most)
{
	uint32_t taken = 0;
	const void *at;
	while (taken < most) {
		int32_t count = ports_peek(p, queue, &at);
		if (count < 0)
			return count;
		if (!count)
			break;
		if ((uint32_t)count > most - taken)
			count = (int32_t)(most - taken);
		memcpy((uint8_t *)to + (size_t)taken * SR_ENTRY_BYTES, at, (size_t)count * SR_ENTRY_BYTES);
		ports_consumed(p, queue, (uint32_t)count);
		taken += (uint32_t)count;
	}
	return (int32_t)taken;
}

static int keep(struct ports *p, struct port *port, const uint8_t *from, uint32_t count)
{
	if (count > p->later_max - port->later_count)
		return -ENOBUFS;
	if (port->later_first) {
		memmove(port->later, port->later + (size_t)port->later_first * SR_ENTRY_BYTES,
			(size_t)port->later_count * SR_ENTRY_BYTES);
		port->later_first = 0;
	}
	if (port->later_count + count > port->later_capacity) {
		uint32_t capacity = 2 * (port->later_count + count);
		uint8_t *more = realloc(port->later, (size_t)capacity * SR_ENTRY_BYTES);
		if (!more)
			return -ENOMEM;
		port->later = more;
		port->later_capacity = capacity;
	}
	memcpy(port->later + (size_t)port->later_count * SR_ENTRY_BYTES, from, (size_t)count * SR_ENTRY_BYTES);
	port->later_count += count;
	p->count.deferred += count;
	return 0;
}

/* Writes what there is room for, does not publish: how many, or -EPROTO. */
static int64_t write_some(struct ports *p, struct port *port, const uint8_t *from, uint32_t count)
{
	int64_t room = sr_room(&port->out, count);
	if (room < 0)
		return -EPROTO;
	sr_write(&port->out, from, (uint32_t)room);
	p->count.descriptors_out += (uint64_t)room;
	return room;
}

/* 1 if something was written, 0, -EPROTO. */
static int write_later(struct ports *p, struct port *port)
{
	if (!port->later_count)
		return 0;
	const uint8_t *from = port->later + (size_t)port->later_first * SR_ENTRY_BYTES;
	int64_t written = write_some(p, port, from, port->later_count);
	if (written < 0)
		return -EPROTO;
	port->later_first += (uint32_t)written;
	port->later_count -= (uint32_t)written;
	return written > 0;
}

static void ring_worker(const struct port *port)
{
	const uint64_t one = 1;
	/* It can only fail if the worker's count is full: then it has been rung. */
	if (write(port->workers, &one, sizeof one) < 0)
		return;
}

int32_t ports_write(struct ports *p, uint32_t queue, const void *from, uint32_t count, int *bell)
{
	struct port *port = &p->port[queue];
	*bell = 0;
	if (!port->open) {
		p->count.dropped += count;
		return (int32_t)count;
	}
	int64_t written = write_later(p, port);
	if (written < 0)
		return (int32_t)written;
	written = port->later_count ? 0 : write_some(p, port, from, count);
	if (written >= 0)
		*bell = sr_publish(&port->out, 0);
	return (int32_t)written;
}

int ports_send(struct ports *p, uint32_t queue, const void *from, uint32_t count)
{
	int bell;
	int32_t written = ports_write(p, queue, from, count, &bell);
	if (written < 0)
		return written;
	const uint8_t *rest = (const uint8_t *)from + (size_t)written * SR_ENTRY_BYTES;
	if (bell)
		ring_worker(&p->port[queue]);
	return (uint32_t)written < count ? keep(p, &p->port[queue], rest, count - (uint32_t)written) : 0;
}

/* Try again what found no room.  0, or -EPROTO and in *wrong the queue whose index makes no sense. */
static int push(struct ports *p, uint32_t *wrong)
{
	for (uint32_t i = 0; i < p->queues; i++) {
		struct port *port = &p->port[i];
		int written = port->open ? write_later(p, port) : 0;
		if (written < 0) {
			*wrong = i;
			return written;
		}
		if (written && sr_publish(&port->out, 0))
			ring_worker(port);
	}
	return 0;
}

uint64_t ports_deferred(const struct ports *p)
{
	uint64_t count = 0;
	for (uint32_t i = 0; i < p->queues; i++)
		count += p->port[i].later_count;
	return count;
}

int ports_have_news(const struct ports *p)
{
	for (uint32_t i = 0; i < p->queues && !p->deaf; i++)
		if (p->port[i].open && sr_has_news(&p->port[i].in))
			return 1;
	return 0;
}

int ports_doze(struct ports *p, int wants_regions)
{
	enum sr_sleep sleep = wants_regions ? SR_WAKE_FOR_ALL : SR_WAKE_FOR_WORK;
	if (p->deaf)
		return 1;
	for (uint32_t i = 0; i < p->queues; i++)
		if (p->port[i].open && !sr_doze(&p->port[i].in, sleep))
			return 0;
	return 1;
}

void ports_wake(struct ports *p)
{
	for (uint32_t i = 0; i < p->queues; i++)
		if (p->port[i].open)
			sr_wake(&p->port[i].in);
}

void ports_count(const struct ports *p, struct ports_statistics *statistics) { *statistics = p->count; }

static bool is_bell(const struct ports *p, int file)
{
	for (uint32_t i = 0; i < p->queues; i++)
		if (p->port[i].open && p->port[i].ours == file)
			return true;
	return false;
}

/* What is ready, without doorbells of ours: how many, or a negative errno. */
static int32_t wait_for_files(struct ports *p, int epoll, int timeout_ms, int32_t *files, int32_t most)
{
	struct epoll_event events[POLL_EVENTS];
	int32_t found = 0;
	int count =
		epoll_wait(epoll, events, most < POLL_EVENTS ? most : POLL_EVENTS, ports_doze(p, 1) ? timeout_ms : 0);
	ports_wake(p);
	if (count < 0)
		return errno == EINTR ? 0 : -errno;
	for (int i = 0; i < count; i++)
		if (!is_bell(p, events[i].data.fd))
			files[found++] = events[i].data.fd;
	return found;
}

int32_t ports_poll(struct ports *p, int epoll, int timeout_ms, int32_t *files, int32_t most, uint32_t *queues,
		   uint32_t *waiting)
{
	if (ports_deferred(p)) {
		int error = push(p, queues);
		if (error)
			return error;
		if (timeout_ms < 0 || timeout_ms > PORTS_LOOK_AGAIN_MS)
			timeout_ms = PORTS_LOOK_AGAIN_MS;
	}
	int32_t found = wait_for_files(p, epoll, timeout_ms, files, most);
	int32_t count = waiting_queues(p, queues);
	*waiting = count < 0 ? 0 : (uint32_t)count;
	return count < 0 ? count : found;
}

void ports_settle(struct ports *p, int timeout_ms)
{
	uint32_t wrong;
	while (ports_deferred(p) && timeout_ms > 0 && push(p, &wrong) == 0) {
		poll(NULL, 0, PORTS_LOOK_AGAIN_MS);
		timeout_ms -= PORTS_LOOK_AGAIN_MS;
	}
}

void ports_deafen(struct ports *p) { p->deaf = true; }
