/* See queue_port.h. */
#include "queue_port.h"

#include <stdlib.h>

#include "queue_link.h"
#include "shared_ring.h"

_Static_assert(SR_ENTRY_BYTES == sizeof(struct wire_descriptor), "an entry is a descriptor");

/* HELLO, WELCOME, FENCE, FENCED and some of an earlier life. */
#define ENTRIES_MORE 16u

struct uq_port {
	struct sr_end in, out;
};

uint32_t uq_port_entries(unsigned depth)
{
	uint32_t entries = 64;

	/* Towards the backend a RELEASE and what follows it for each tag, towards the worker an answer. */
	while (entries < 2 * depth + ENTRIES_MORE)
		entries *= 2;
	return entries;
}

uint64_t uq_port_bytes(uint32_t entries) { return sr_pair_bytes(entries); }

struct uq_port *uq_port_new(uint8_t *memory, uint32_t entries)
{
	struct uq_port *p = calloc(1, sizeof *p);

	if (!p)
		return NULL;
	sr_begin(memory, entries);
	p->in = sr_end_to_worker(memory, entries, 0);
	p->out = sr_end_to_backend(memory, entries, 1);
	return p;
}

void uq_port_free(struct uq_port *p) { free(p); }

/* Descriptors that arrive meanwhile are read in the next turn, after the queue's own work. */
static void receive(struct uq_port *p, struct uq *q)
{
	int64_t waiting = sr_waiting(&p->in);

	if (waiting < 0)
		uq_link_cut(q, UQ_V_RING);
	while (waiting > 0 && uq_link_talks(q)) {
		const uint8_t *at;
		int64_t most = waiting < WIRE_FRAME_DESCRIPTORS_MAX ? waiting : WIRE_FRAME_DESCRIPTORS_MAX;
		uint32_t count = sr_peek(&p->in, (uint32_t)most, &at);

		uq_input(q, at, (size_t)count * sizeof(struct wire_descriptor));
		sr_consumed(&p->in, count);
		waiting -= count;
	}
}

/* A RELEASE alone wakes the backend only if it asked for that. */
static bool can_wait(const struct wire_descriptor *d, unsigned count)
{
	while (count && d[count - 1].kind == WIRE_RELEASE)
		count--;
	return !count;
}

static int send(struct uq_port *p, struct uq *q)
{
	const struct wire_descriptor *first;
	unsigned count = uq_output(q, &first);
	int64_t room;
	bool waits;

	if (!count)
		return 0;
	room = sr_room(&p->out, count);
	if (room < 0)
		uq_link_cut(q, UQ_V_RING);
	if (room <= 0)
		return 0;
	waits = can_wait(first, (unsigned)room);
	sr_write(&p->out, first, (uint32_t)room);
	uq_output_sent(q, (unsigned)room);
	return sr_publish(&p->out, waits);
}

int uq_port_turn(struct uq_port *p, struct uq *q)
{
	if (uq_link_talks(q))
		receive(p, q);
	return uq_link_talks(q) ? send(p, q) : 0;
}

int uq_port_has_news(const struct uq_port *p, const struct uq *q) { return uq_link_talks(q) && sr_has_news(&p->in); }

/* While the link is down, ring contents must not keep the worker awake. */
int uq_port_doze(struct uq_port *p, const struct uq *q)
{
	return !uq_link_talks(q) || sr_doze(&p->in, SR_WAKE_FOR_ALL);
}

void uq_port_wake(struct uq_port *p) { sr_wake(&p->in); }
