/* The private types of the queue core: a tag, a stock of pool buffers, regions, and the queue that has them.
 *
 * The core's files call in one direction only, from a line of this list to the lines above it:
 *
 *     queue_latency.c                   histograms of durations
 *     queue_tag.c                       a tag's transitions; commands and descriptors on their way out
 *     queue_check.c                     the invariants, asserted in the checked build
 *     queue_stock.c  queue_region.c     containers of pool buffers and of regions, which call only upwards in this list
 *     queue_limit.c                     the device's limits, and the tags that wait for them
 *     queue_descriptor.c                what the driver's descriptor says
 *     queue_finish.c                    a request's end: its result is counted and committed
 *     queue_run.c                       a request that this process answers itself
 *     queue_request.c                   a request's road, from its arrival to the return of its buffer
 *     queue_waiting.c                   the requests that wait for a backend go on, are held back, or fail
 *     queue_link.c                      the backend's descriptors, judged; the link's states
 *     queue_time.c                      deadlines
 *     queue_core.c                      makes, starts and frees a queue; the queue's attention
 *     queue_port.c                      the rings that a backend shares
 *     queue_inside.c                    an engine in this process
 *     queue_clock.c                     the time in which the worker runs
 *     queue_ring.c                      io_uring
 *
 * tests/unit/test_queue_layers.py checks this order in the undefined symbols of each object file.
 */
#ifndef UQ_QUEUE_TYPES_H
#define UQ_QUEUE_TYPES_H

#include "queue_core.h"

#include "blocks.h"
#include "engine_calls.h"

#include <stdbool.h>

#define UQ_NO_TAG 0xffffu
/* The tag that uq_flush() uses while no request does. */
#define UQ_FLUSH_TAG 0u

struct uq_tag {
	uint64_t sequence, offset, length, arrived_ms;
	uint64_t arrived_ns;
	uint64_t waits_ns;      /* since when it waits for a buffer, if it does */
	uint64_t handed_ns;     /* when a backend first got it */
	uint64_t own_buffer;    /* offset in own_segment, bytes */
	uint64_t client_buffer; /* offset in slice `slice` of the client area, if `in_place` */
	uint64_t own_bytes;     /* of the region, which may be larger than the request */
	uint64_t limited_since; /* on the clock of the limits */
	const uint8_t *memory;  /* of an engine in this process that runs the request, see queue_run.c; else NULL */
	uint32_t own_segment;   /* the segment of the region that a backend named, 0 for none */
	uint32_t slice;
	uint32_t slot; /* pool buffer, UQ_BUFFER_NONE for none */
	int32_t result;
	uint16_t flags;
	uint16_t next_waiter;
	uint8_t state, op, class;
	bool in_place; /* the client's own memory is the request's: the kernel copies nothing */
	bool copied;   /* a write's data is in its buffer */
	bool sent_to_backend;
	bool must_fail; /* fails as soon as neither kernel nor backend touches its buffer */
	bool overdue;
	bool waits; /* for a buffer, since waits_ns */
};

struct uq_stock {
	uint32_t *slots;
	unsigned count, held, pending, waiting;
	unsigned recalled;           /* buffers that the broker has asked back for other queues */
	unsigned low_water;          /* lowest `count` since the last look */
	unsigned previous_low_water; /* the same at the last look */
	uint16_t first_waiter, last_waiter;
};

/* The regions that the backend has posted in one size: offsets in its segment. */
struct uq_posts {
	uint64_t *starts;
	unsigned count;
};

/* The limits as this queue has read them, and its tags that wait for them; times in the ticks of queue_limit.c. */
struct uq_limit {
	bool is_set;
	bool doubted; /* a shared word made no sense at the last look */
	uint16_t first, last;
	unsigned paid; /* the tags at the head of the list that have been charged, and pass at `passes` */
	uint64_t generation, per_s[UQ_LIMITS], burst, batch;
	uint64_t now, passes;
};

struct uq_segment {
	uint8_t *base;
	uint64_t bytes;
	uint32_t number;
	unsigned data_tags; /* writes whose only copy of the data lies here, and reads not yet taken by the kernel */
	bool live;
};

struct uq {
	struct uq_config config;
	struct uq_tag *tags;
	struct uq_stock stock[UQ_CLASSES_MAX];
	/* A bit for each class: to look at; to lease or return; whose buffers a tag or the broker waits for. */
	unsigned stock_changed, stock_wanting, stock_short;
	struct uq_segment segments[UQ_SEGMENTS_MAX];
	struct uq_command *commands;
	unsigned commands_first, commands_count, commands_mask;
	struct wire_descriptor *output;
	unsigned output_first, output_count, output_max;
	struct uq_posts posts[UQ_CLASSES_MAX];
	struct blocks occupied; /* of the attached backend's segment: lent to a write's tag, or posted */
	uint16_t *replay;       /* room to sort the tags that wait */
	uint64_t now_ns;        /* of the histograms */
	uint64_t sequence, now_ms, scanned_ms, stock_looked_ms, expected_ms, absent_since_ms;
	unsigned attention, gone;
	uint32_t own_segment;             /* the attached backend's, 0 for none */
	unsigned regions;                 /* tags with a region, of whichever segment */
	const struct engine_calls *calls; /* of an engine in this process, see queue_run.c; NULL without one */
	struct engine *engine;
	bool runs, begins; /* the engine runs requests within a call; takes them without descriptors */
	struct uq_limit limit;
	struct uq_limits no_limits; /* of a queue that was given none */
	uint8_t link;
	unsigned stale; /* answers of this backend that were dropped */
	bool reads_own, fence, giving_up;
	bool is_absent;       /* since absent_since_ms */
	bool absence_gave_up; /* `giving_up` is due to that absence, and not to uq_give_up()'s caller */
	bool held;            /* requests wait, except those whose data lies in the backend's memory already */
	bool quiet;           /* while `held`: UQ_ATT_QUIET was raised */
	bool flush_overdue;
	int flush_result;
	uint64_t flush_sequence, flush_since_ms; /* of the FLUSH of uq_flush() that the backend has; 0: none */
	bool output_held;
	bool output_overflowed; /* a descriptor found no room: no more is sent, and the link must be cut */
	int violation, fault, fault_detail;
	unsigned fault_tag;
	struct wire_descriptor culprit;
#ifdef UQ_CHECKED
	uint64_t without_duration[UQ_LATENCY_OTHER + 1]; /* requests of a worker that counted no durations */
#endif
};

static inline bool uq_has_link(const struct uq *q) { return q->link == UQ_LINK_UP; }
static inline bool uq_has_data(const struct uq_tag *t) { return t->op == WIRE_READ || t->op == WIRE_WRITE; }
static inline unsigned uq_index(const struct uq *q, const struct uq_tag *t) { return (unsigned)(t - q->tags); }

#endif
