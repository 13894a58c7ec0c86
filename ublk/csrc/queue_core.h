/*
 * The queue's state machine: what happens to each tag from the kernel's completion to the commit.
 *
 * Owns the tags, the stock of pool buffers and the outgoing commands and descriptors of one hardware queue.  Makes no
 * system call, reads no clock, allocates nothing per request: the ring (queue_ring.c) or a test's fake driver feeds
 * completions in and takes commands out, a transport feeds answers in and takes descriptors out.
 *
 * Used by one task.  `workers/tag_state.py` holds the transition table in Python; a test compares the two.
 */
#ifndef UQ_QUEUE_CORE_H
#define UQ_QUEUE_CORE_H

#include <stddef.h>
#include <stdint.h>

#include "queue_latency.h"
#include "wire.h"

enum {
	UQ_CLASSES_MAX = 8,
	UQ_SEGMENTS_MAX = 8,
	UQ_STATS_BYTES = 4096,
	UQ_LATENCIES_AT = 816,
	UQ_BUFFER_NONE = 0xffffffffu,
};

/* Operations of the wire: their numbers are below this. */
enum { UQ_OPS = 6 };

/* struct ublksrv_io_desc (include/uapi/linux/ublk_cmd.h). */
struct uq_iod {
	uint32_t op_flags, sectors;
	uint64_t start_sector, address;
};
_Static_assert(sizeof(struct uq_iod) == 24, "ublksrv_io_desc");

enum uq_state {
	UQ_KERNEL,      /* fetched: the kernel may complete it with a request */
	UQ_WAIT_BUFFER, /* needs a pool buffer and the stock has none */
	UQ_WAIT_PLACE,  /* a write that waits for a backend to name its region */
	UQ_PLACING,     /* PLACE sent */
	UQ_COPYING,     /* NEED_GET_DATA sent: the kernel copies into the buffer */
	UQ_WAIT_LINK,   /* ready, and no backend is linked */
	UQ_SERVING,     /* the backend has it */
	UQ_FAILING,     /* NEED_GET_DATA sent into scratch: the only way to fail a write that waits for its data */
	UQ_COMMITTING,  /* commit written, not yet taken by the kernel */
	UQ_GONE,        /* the kernel took the tag away */
	UQ_WAIT_LIMIT,  /* waits until the device's limits let it pass; has no buffer, and its deadline has not begun */
	UQ_STATES,
};

enum uq_event {
	UQ_EV_NEEDS_BUFFER,
	UQ_EV_NEEDS_PLACE,
	UQ_EV_READY,
	UQ_EV_BUFFER_TO_COPY,
	UQ_EV_BUFFER_TO_SERVE,
	UQ_EV_ASK,
	UQ_EV_PLACED,
	UQ_EV_FAIL_UNCOPIED,
	UQ_EV_COPIED,
	UQ_EV_RESCUE,
	UQ_EV_REQUEUED,
	UQ_EV_HAND_OVER,
	UQ_EV_LINK_LOST,
	UQ_EV_FINISH,
	UQ_EV_TAKEN,
	UQ_EV_ABORTED,
	UQ_EV_POSTED,
	UQ_EV_THROW_AWAY,
	UQ_EV_IN_PLACE,
	UQ_EV_LIMITED,
	UQ_EVENTS,
};
#define UQ_ILLEGAL 0xff

enum uq_link { UQ_LINK_NONE, UQ_LINK_EXPECTED, UQ_LINK_UP, UQ_LINK_CUT, UQ_LINK_FENCING };

/* What uq_attention() asks of the owner, as bits. */
enum uq_attention {
	UQ_ATT_OUTPUT = 1,    /* descriptors wait to be sent */
	UQ_ATT_STOCK = 2,     /* buffers should be leased or returned */
	UQ_ATT_CUT = 4,       /* the backend broke the protocol: see uq_violation() */
	UQ_ATT_GONE = 8,      /* every tag is gone: the device stopped */
	UQ_ATT_FAULT = 16,    /* our own error: see uq_fault() */
	UQ_ATT_SILENT = 32,   /* a request is past its deadline */
	UQ_ATT_LINK = 64,     /* the link came up */
	UQ_ATT_ABSENT = 128,  /* no backend for absent_ms: requests fail until the next is expected */
	UQ_ATT_QUIET = 256,   /* after uq_hold(): the backend has no request and no region in use */
	UQ_ATT_FLUSHED = 512, /* see uq_flush_result() */
};

enum uq_violation {
	UQ_V_NONE,
	UQ_V_FRAME,
	UQ_V_KIND,
	UQ_V_IDENTITY,
	UQ_V_UNEXPECTED,
	UQ_V_RESULT,
	UQ_V_SEGMENT,
	UQ_V_RANGE,
	UQ_V_ALIGNMENT,
	UQ_V_LENT,
	UQ_V_REGION,
	UQ_V_SILENT,
	UQ_V_FLOOD,
	UQ_V_MUTE,
	UQ_V_RING,
	UQ_V_DEAF,
	UQ_V_POST,
	UQ_V_ENGINE, /* the engine in the worker itself has ended */
	UQ_VIOLATIONS,
};

enum uq_fault { UQ_F_NONE, UQ_F_TRANSITION, UQ_F_OVERFLOW, UQ_F_COMPLETION, UQ_F_GRANT, UQ_F_INVARIANT, UQ_FAULTS };

/* A queue's counters, in the control segment; `read_statistics` in ublk/queue.py reads it by these names. */
struct uq_stats {
	uint64_t requests[UQ_OPS], bytes[UQ_OPS];
	uint64_t errors, in_flight, in_flight_max, buffers_held, buffers_lent, buffers_waiting, buffers_waited;
	uint64_t kernel_write_bytes, kernel_read_bytes, own_copy_bytes;
	uint64_t requeues, short_copies, replays, rescues, violations, stale_answers, timeouts, unsupported;
	uint64_t lent_total, returned_total; /* pool buffers, tag by tag */
	uint64_t turns, enters, commits, descriptors_in, descriptors_out, wakeups;
	uint64_t hangups, strangers;
	uint64_t bells;                        /* rung for the backend */
	uint64_t tags_gone;                    /* tags that the kernel took away from this worker */
	uint64_t posts, posts_used;            /* regions that backends posted, and writes that landed in one */
	uint64_t zero_copies, zero_copy_bytes; /* reads and writes whose data lay in the client area all the time */
	uint64_t limit_waiting, limited, limited_ns; /* requests that wait for the limits; that did, and for how long */
	uint64_t failed[UQ_OPS];                     /* the part of `requests` that was answered with an error */
	uint64_t oldest_ms;                          /* the age of the oldest request when deadlines were last judged */
};
_Static_assert(sizeof(struct uq_stats) <= UQ_LATENCIES_AT, "room before the histograms");

/* A queue's statistics block.  The histograms have their place at its end, whatever counters a later version adds. */
struct uq_block {
	union {
		struct uq_stats stats;
		uint8_t room[UQ_LATENCIES_AT];
	};
	struct uq_latencies latencies;
};
_Static_assert(sizeof(struct uq_block) == UQ_STATS_BYTES, "statistics block");

/* A slot's header in the control segment, see bufpool/pool/arena.py. */
struct uq_slot {
	uint32_t owner, epoch, tag, sequence;
};

/* What a device's limits count. */
enum { UQ_LIMIT_IOS, UQ_LIMIT_BYTES, UQ_LIMITS };

/* The limits of a device in its control segment, see bufpool/pool/control.py: the daemon writes the first part, and
 * raises `generation` after each change; the workers of all queues share the words of the second. */
struct uq_limits {
	uint64_t generation;
	uint64_t per_s[UQ_LIMITS]; /* 0: no limit */
	uint64_t burst_ns;
	uint64_t unused[4];
	uint64_t paid_until[UQ_LIMITS]; /* see queue_limit.c */
};

struct uq_class {
	uint64_t base_offset;
	uint32_t buffer_bytes, count, first_slot, reserve;
	uint32_t batch; /* buffers asked for at a time */
	uint32_t most;  /* buffers that the broker can ever give to one queue: all but the other queues' reserves */
};

enum uq_command_op { UQ_CMD_FETCH, UQ_CMD_GET_DATA, UQ_CMD_COMMIT };
struct uq_command {
	uint16_t tag;
	uint8_t op;
	int32_t result;
	uint64_t address;
};

struct uq_config {
	uint32_t device, epoch, max_io_bytes, block_bytes;
	uint16_t queue, depth;
	uint16_t queues; /* of the device */
	uint8_t need_get_data, place_in_backend, fail_on_timeout;
	/* The driver registers the pages of each read and write in the io_uring that fetched the tag, under the tag's
	 * number (UBLK_F_AUTO_BUF_REG): a request has no buffer, and nothing is copied.  Excludes need_get_data. */
	uint8_t zero_copy;
	uint32_t timeout_ms;       /* 0: none */
	uint32_t hello_timeout_ms; /* how long a backend may be expected before it has said HELLO; 0: for ever */
	uint32_t absent_ms;        /* without a backend for so long, waiting requests fail; 0: they wait */
	uint32_t classes;
	struct uq_class class[UQ_CLASSES_MAX];
	const struct uq_iod *descriptors;
	uint8_t *pool;
	struct uq_slot *slots; /* headers of all slots of the pool */
	uint8_t *scratch;      /* max_io_bytes, private */
	/* max_io_bytes of zeros, which reads return on a queue that answers by itself, without a backend; else NULL. */
	const uint8_t *zeros;
	uint64_t slice_bytes;     /* of the client area, whose slices are registered with the driver by their numbers */
	uint16_t slices;          /* a bit for each registered slice */
	struct uq_limits *limits; /* NULL: none, ever */
	struct uq_stats *stats;
	struct uq_latencies *latencies;
};

struct uq;

/* Returns NULL if memory is short or the config is not usable. */
struct uq *uq_new(const struct uq_config *config);
void uq_free(struct uq *q);

/* Fetch every tag; with need_get_data and zero_copy off each takes a buffer for good.  Returns 0, or -1 if the stock is
 * too small. */
int uq_start(struct uq *q);

/* The kernel completed `tag`'s command with `res`. */
void uq_complete(struct uq *q, unsigned tag, int res);

/* Copies up to `max` commands out; uq_commands_taken() says how many of them io_uring_enter has consumed. */
unsigned uq_commands(struct uq *q, struct uq_command *out, unsigned max);
void uq_commands_taken(struct uq *q, unsigned count);
/* The command with this place among those that are not taken; NULL: there are fewer. */
const struct uq_command *uq_command_at(const struct uq *q, unsigned place);
/* Whether a commit among them frees a buffer or a region that a tag, the broker or the backend waits for.  It is free
 * when io_uring_enter returns, so the worker must not sleep in that enter. */
int uq_commit_is_awaited(struct uq *q);

/* Descriptors for the backend: a view, and how many of them were sent. */
unsigned uq_output(struct uq *q, const struct wire_descriptor **first);
void uq_output_sent(struct uq *q, unsigned count);
/* With `hold` waiting descriptors raise no UQ_ATT_OUTPUT: the transport is full and reports by itself when it is not.
 */
void uq_output_hold(struct uq *q, int hold);

/* The backend sent this frame.  A frame that breaks the protocol cuts the link. */
void uq_input(struct uq *q, const void *frame, size_t bytes);

/* The supervisor says which backend to expect: its own segment (number 0 for none) and how it answers reads.
 * With `fence` the backend served an earlier epoch, and gets no request before it has confirmed a FENCE.
 * Returns 0, -EBUSY while too many segments of dead backends still hold data, or -ENOMEM. */
int uq_link_expect(struct uq *q, uint32_t segment, uint8_t *base, uint64_t bytes, int reads_own, int fence);
/* Stop talking to the backend; what it holds stays with it until uq_link_lost(). */
void uq_link_cut(struct uq *q, int violation);
/* The backend's connection ended while it served.  Descriptors may be lost, so the link is cut, without a violation:
 * the backend may just be dead. */
void uq_link_hung_up(struct uq *q);
/* Copy the contents of the tags' buffers to other memory of the pool's layout.  uq_map_over then moves that memory to
 * the pool's address, which the driver's commands name.  No copy of the driver's can run meanwhile: it copies only in
 * the io_uring_enter of this queue's task (IORING_SETUP_DEFER_TASKRUN). */
void uq_pool_copy(const struct uq *q, uint8_t *to);
/* The backend is dead or has let go of everything: its requests wait for the next one. */
void uq_link_lost(struct uq *q);
int uq_link_state(const struct uq *q);
/* A dead backend's segment that holds no data any more and can be unmapped: its number, or 0. */
uint32_t uq_segment_idle(struct uq *q, uint8_t **base, uint64_t *bytes);
/* Whether there is a dead backend's segment, idle or not. */
int uq_segment_is_left(const struct uq *q);

/* Buffers.  uq_stock_want() < 0: return that many of the class (uq_stock_take), > 0: lease that many. */
int uq_stock_want(const struct uq *q, unsigned class);
void uq_stock_asked(struct uq *q, unsigned class, unsigned count);
int uq_stock_add(struct uq *q, unsigned class, const uint32_t *slots, unsigned count);
/* Without a broker: every buffer of the classes is this queue's from now on, and stays. */
void uq_stock_own(struct uq *q);
unsigned uq_stock_take(struct uq *q, unsigned class, uint32_t *slots, unsigned max);
/* Other queues wait: this one returns `count` buffers in all, before its own tags get any, but never out of its
 * reserve. */
void uq_stock_recall(struct uq *q, unsigned class, unsigned count);
/* Set the number of buffers on order: the broker's count, or 0 when the broker has restarted and lost the orders. */
void uq_stock_on_order(struct uq *q, unsigned class, unsigned count);
unsigned uq_stock_held(const struct uq *q, unsigned class, uint32_t *slots, unsigned max);

/* Set the clock, in milliseconds, without judging deadlines: later arrivals are stamped with it.  Called after a wait.
 */
void uq_set_time(struct uq *q, uint64_t now_ms);
/* Set the clock of the histograms, in nanoseconds: the system's, on which a pause of the process counts too, because
 * the client waits during the pause. */
void uq_set_real_time(struct uq *q, uint64_t now_ns);
/* Set the clock, in milliseconds, and judge deadlines: of requests, of a HELLO, of a backend's absence.  The owner
 * feeds the backend's descriptors first, so that an answer that has arrived is in time, and takes the time from
 * uq_clock_read(), in which a pause of its own process does not count. */
void uq_tick(struct uq *q, uint64_t now_ms);
/* How long the owner may sleep before the next uq_tick(): `most_ms`, unless a deadline counts, idle buffers may go
 * back, descriptors wait for room, or a region goes back to the backend with the commands that the owner is about to
 * submit. */
unsigned uq_wait_ms(const struct uq *q, unsigned most_ms);
/* Requests that would wait for a backend fail with EIO until the next backend is expected: the device is going. */
void uq_give_up(struct uq *q);
/* With `on`, requests that arrive wait, for as long as it takes: neither their deadline nor that of the backend's
 * absence passes.  What the backend has is finished; then UQ_ATT_QUIET says so, once for each call.  Without `on` they
 * go on in order of arrival, and their deadlines begin anew.  uq_give_up() ends it as well. */
void uq_hold(struct uq *q, int on);
/* Send the linked backend of a held and quiet queue a FLUSH of the queue's own; UQ_ATT_FLUSHED announces its result, a
 * negative errno or 0: -ENOTCONN if the backend is lost before it answers.  Returns 0 or -ENOTCONN. */
int uq_flush(struct uq *q);
int uq_flush_result(const struct uq *q);
/* Replace these deadlines of uq_config.  They hold for the requests that have arrived, too, from their arrival on; what
 * fails for want of a backend waits again until the next uq_tick() has judged the backend's absence anew. */
void uq_set_deadlines(struct uq *q, uint32_t timeout_ms, int fail_on_timeout, uint32_t absent_ms);

/* Whether limits are set, or have changed: then the owner calls uq_limit_tick() after each wait, and its next wait is
 * to end after uq_limit_wait_ms(), which is `most_ms` at most. */
int uq_limit_is_used(const struct uq *q);
/* Set the clock of the limits, in nanoseconds: one clock for all workers of a machine, which goes on while a worker is
 * stopped.  Requests whose time has come pass. */
void uq_limit_tick(struct uq *q, uint64_t now_ns);
unsigned uq_limit_wait_ms(const struct uq *q, unsigned most_ms);

unsigned uq_attention(struct uq *q);
void uq_attention_clear(struct uq *q, unsigned bits);
int uq_violation(const struct uq *q, struct wire_descriptor *culprit);
int uq_fault(const struct uq *q, unsigned *tag, int *detail);
unsigned uq_in_flight(const struct uq *q);
int uq_tag_state(const struct uq *q, unsigned tag);
unsigned uq_queue_number(const struct uq *q);
int uq_is_zero_copy(const struct uq *q);
struct uq_stats *uq_stats_of(struct uq *q);

/* The transition table, for the test that compares it with Python's. */
int uq_next_state(unsigned state, unsigned event);

#endif
