/* See queue_ring.h. */
#include "queue_ring.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "io_command.h"
#include "queue_clock.h"
#include "queue_inside.h"
#include "spin.h"

#define WATCH_DATA (1ull << 32)
#define BELL_IN_DATA (1ull << 33)
#define BELL_OUT_DATA (1ull << 34)
#define NO_DATA (1ull << 35)
#define TIMER_DATA (1ull << 36)
#define ROUND_MASK 0xffffffu
/* /dev/ublkcN among the ring's registered files. */
#define CHAR_FILE 0
/* After this many doorbell writes the backend must have drained its eventfd at least once, see ring_bell(). */
#define BELLS_UNHEARD_MAX 256u

struct uq_ring {
	struct io_uring ring;
	struct uq *q;
	unsigned depth, queued;
	uint16_t queue;
	int watch_fd[UQ_WATCHES_MAX];
	uint32_t watch_round[UQ_WATCHES_MAX];
	unsigned watches_due; /* a bit for each watch to be armed */
	int ready;
	struct uq_port *port;
	int bell_in, bell_out;
	uint32_t port_round;
	bool bell_armed, bell_due, bell_tested;
	unsigned bells_untested;
	const struct engine_calls *calls;
	struct engine *engine;    /* in this process, in the place of a backend */
	unsigned engine_requests; /* how many it may have, so that the ring has an entry for each */
	/* While requests are in flight the wait is for the backend's answers, otherwise for the kernel's requests. */
	struct spin for_answers, for_requests;
	struct uq_clock clock; /* the core's deadlines are measured on it */
	struct __kernel_timespec timer;
	uint64_t now_ns, now_ms; /* the system's clock, read once a turn */
	uint64_t serving_ms;     /* this worker's at that time */
	uint64_t timer_ms;       /* when the armed timer ends, 0 for none */
};

/* Since the last read the ring meant to wait for `waited_ms`. */
static void read_time(struct uq_ring *r, unsigned waited_ms)
{
	struct timespec t;
	uint64_t now_ms;

	/* Deadlines would do with the coarse clock; histograms and limits would not: it ticks every 1 to 10 ms. */
	clock_gettime(CLOCK_MONOTONIC, &t);
	r->now_ns = (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
	uq_set_real_time(r->q, r->now_ns);
	now_ms = (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
	if (now_ms == r->now_ms)
		return;
	r->now_ms = now_ms;
	r->serving_ms = uq_clock_read(&r->clock, now_ms, waited_ms);
	uq_set_time(r->q, r->serving_ms);
}

/* Requests that wait for the device's limits pass. */
static void pass_limited(struct uq_ring *r)
{
	if (uq_limit_is_used(r->q))
		uq_limit_tick(r->q, r->now_ns);
}

static int begin(struct uq_ring *r, int char_fd)
{
	/* DEFER rather than COOP_TASKRUN: 4 % fewer instructions for a request by itself (bench/README.md), and never
	 * in the middle of something else.  Of many the kernel runs twenty at a time, see harvest_all(). */
	struct io_uring_params p = { .flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
					      IORING_SETUP_CQSIZE | IORING_SETUP_TASKRUN_FLAG,
				     .cq_entries = 2 * (r->depth + UQ_WATCHES_MAX) + r->engine_requests + 1 };
	/* A doorbell rung, one armed, one removed, a timer. */
	int e = io_uring_queue_init_params(r->depth + r->engine_requests + UQ_WATCHES_MAX + 4, &r->ring, &p);

	if (e)
		return e;
	/* Saves a file look-up at each enter (where the kernel and liburing support it) and one at each command. */
	io_uring_register_ring_fd(&r->ring);
	e = io_uring_register_files(&r->ring, &char_fd, 1);
	if (!e && uq_is_zero_copy(r->q))
		e = io_uring_register_buffers_sparse(&r->ring, r->depth); /* a tag's pages, until its commit */
	if (e)
		io_uring_queue_exit(&r->ring);
	return e;
}

int uq_ring_new(struct uq *q, int char_fd, unsigned depth, unsigned spin_us, unsigned engine_requests,
		struct uq_ring **out)
{
	struct uq_ring *r = calloc(1, sizeof *r);
	int e;

	if (!r)
		return -ENOMEM;
	r->q = q;
	r->depth = depth;
	r->engine_requests = engine_requests;
	r->queue = (uint16_t)uq_queue_number(q);
	spin_begin(&r->for_answers, spin_us * 1000ull);
	spin_begin(&r->for_requests, spin_us * 1000ull);
	for (unsigned i = 0; i < UQ_WATCHES_MAX; i++)
		r->watch_fd[i] = -1;
	e = begin(r, char_fd);
	if (e) {
		free(r);
		return e;
	}
	read_time(r, 0);
	uq_tick(q, r->serving_ms);
	*out = r;
	return 0;
}

void uq_ring_free(struct uq_ring *r)
{
	if (!r)
		return;
	io_uring_queue_exit(&r->ring);
	free(r);
}

int uq_ring_watch(struct uq_ring *r, unsigned index, int fd)
{
	if (index >= UQ_WATCHES_MAX)
		return -EINVAL;
	/* The round tells a poll that is still armed for the old descriptor apart. */
	r->watch_round[index]++;
	r->watch_fd[index] = fd;
	if (fd < 0)
		r->watches_due &= ~(1u << index);
	else
		r->watches_due |= 1u << index;
	return 0;
}

static uint64_t port_data(const struct uq_ring *r, uint64_t kind) { return kind | (r->port_round & ROUND_MASK); }

static struct io_uring_sqe *next_sqe(struct uq_ring *r)
{
	struct io_uring_sqe *s = io_uring_get_sqe(&r->ring);

	if (s)
		memset(s, 0, sizeof *s);
	return s;
}

static void write_command(struct uq_ring *r, struct io_uring_sqe *s, const struct uq_command *c)
{
	uq_prepare_io_command(
		s, CHAR_FILE, uq_io_opcode(c->op),
		(struct uq_io_command){ .queue = r->queue, .tag = c->tag, .result = c->result, .address = c->address });
	s->flags |= IOSQE_FIXED_FILE;
	if (uq_is_zero_copy(r->q))
		s->addr = uq_auto_buffer(c->tag);
}

static void arm_watches(struct uq_ring *r)
{
	for (unsigned i = 0; r->watches_due >> i; i++) {
		struct io_uring_sqe *s = r->watches_due >> i & 1 ? next_sqe(r) : NULL;

		if (!s)
			continue;
		io_uring_prep_poll_add(s, r->watch_fd[i], POLLIN);
		s->user_data = WATCH_DATA | (uint64_t)i << 24 | (r->watch_round[i] & 0xffffff);
		r->watches_due &= ~(1u << i);
	}
}

static void disarm_bell(struct uq_ring *r)
{
	struct io_uring_sqe *s = r->bell_armed ? next_sqe(r) : NULL;

	r->bell_armed = false;
	if (!s)
		return;
	io_uring_prep_poll_remove(s, port_data(r, BELL_IN_DATA));
	s->user_data = NO_DATA;
}

void uq_ring_use_port(struct uq_ring *r, struct uq_port *port, int bell_in, int bell_out)
{
	disarm_bell(r);
	/* The armed poll holds the doorbell's file; its user_data has the round that ends here. */
	io_uring_submit(&r->ring);
	r->port_round++;
	r->port = port;
	r->bell_in = bell_in;
	r->bell_out = bell_out;
	r->bell_due = r->bell_tested = false;
	r->bells_untested = 0;
	uq_output_hold(r->q, port != NULL);
}

int uq_ring_use_engine(struct uq_ring *r, const struct engine_calls *calls, struct engine *engine)
{
	int e = calls->use_ring(engine, &r->ring);

	if (e)
		return e;
	r->calls = calls;
	r->engine = engine;
	uq_output_hold(r->q, true);
	uq_inside_begin(r->q, calls, engine);
	return 0;
}

/* Edge-triggered and never read: each write to the eventfd is a completion, and its count has room for 2^64. */
static void arm_bell(struct uq_ring *r)
{
	struct io_uring_sqe *s = r->port && !r->bell_armed ? next_sqe(r) : NULL;

	if (!s)
		return;
	io_uring_prep_poll_multishot(s, r->bell_in, POLLIN);
	s->user_data = port_data(r, BELL_IN_DATA);
	r->bell_armed = true;
}

/*
 * The backend shares the eventfd and can make a write to it block.  So io_uring writes, and a blocked write stays in
 * the kernel.  To bound their number, one write in BELLS_UNHEARD_MAX reports its completion; if it has not completed
 * when the next one is due, the link is cut.
 */
static void ring_bell(struct uq_ring *r)
{
	static const uint64_t one = 1;
	struct io_uring_sqe *s;

	if (r->bells_untested >= BELLS_UNHEARD_MAX && r->bell_tested) {
		uq_link_cut(r->q, UQ_V_DEAF);
		return;
	}
	s = next_sqe(r);
	if (!s)
		return;
	io_uring_prep_write(s, r->bell_out, &one, sizeof one, 0);
	s->user_data = port_data(r, BELL_OUT_DATA);
	if (r->bells_untested < BELLS_UNHEARD_MAX) {
		s->flags |= IOSQE_CQE_SKIP_SUCCESS;
	} else {
		r->bell_tested = true;
		r->bells_untested = 0;
	}
	r->bells_untested++;
	r->bell_due = false;
	uq_stats_of(r->q)->bells++;
}

/* The engine's entries share the next enter with the queue's commands, for which there is always room. */
static void exchange_inside(struct uq_ring *r)
{
	uq_inside_turn(r->q, r->calls, r->engine);
	while (r->calls->prepare(r->engine) && io_uring_submit(&r->ring) > 0)
		;
}

static void exchange(struct uq_ring *r)
{
	if (r->engine && !uq_inside_is_idle(r->q))
		exchange_inside(r);
	if (!r->port)
		return;
	r->bell_due |= uq_port_turn(r->port, r->q);
	if (r->bell_due)
		ring_bell(r);
}

/* Commands stay in the queue until io_uring_enter has consumed them, which is when a read's buffer becomes free. */
static unsigned write_commands(struct uq_ring *r)
{
	const struct uq_command *c;
	unsigned written = r->queued;

	for (; (c = uq_command_at(r->q, written)); written++) {
		struct io_uring_sqe *s = next_sqe(r);

		if (!s)
			break;
		write_command(r, s, c);
	}
	r->queued = written;
	return written;
}

static struct __kernel_timespec span(unsigned ms)
{
	return (struct __kernel_timespec){ .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000ll };
}

/* Many waits share one timer: starting and stopping a timer costs more than the core's work for a request. */
static bool timer_ends_within(struct uq_ring *r, unsigned wait_ms)
{
	struct io_uring_sqe *s = r->timer_ms ? NULL : next_sqe(r);

	if (s) {
		r->timer = span(wait_ms);
		r->timer_ms = r->now_ms + wait_ms;
		io_uring_prep_timeout(s, &r->timer, 0, 0);
		s->user_data = TIMER_DATA;
	}
	return r->timer_ms && r->timer_ms <= r->now_ms + wait_ms;
}

static int submit(struct uq_ring *r, unsigned wait_ms)
{
	struct io_uring_cqe *cqe;
	int e;

	uq_stats_of(r->q)->enters++;
	if (!wait_ms) {
		e = io_uring_submit_and_get_events(&r->ring);
	} else if (wait_ms == UQ_FOREVER_MS || timer_ends_within(r, wait_ms)) {
		e = io_uring_submit_and_wait(&r->ring, 1);
	} else {
		struct __kernel_timespec ts = span(wait_ms);

		e = io_uring_submit_and_wait_timeout(&r->ring, &cqe, 1, &ts, NULL);
	}
	return e == -ETIME || e == -EINTR || e == -EAGAIN || e == -EBUSY ? 0 : e;
}

static void taken(struct uq_ring *r)
{
	/* Unless the kernel stopped half way, the submission queue is empty again; else no buffer is freed yet. */
	if (r->queued && !io_uring_sq_ready(&r->ring)) {
		uq_commands_taken(r->q, r->queued);
		r->queued = 0;
	}
}

static void watched(struct uq_ring *r, uint64_t data, int res)
{
	unsigned i = data >> 24 & 0xff;

	if (i >= UQ_WATCHES_MAX || (r->watch_round[i] & 0xffffff) != (data & 0xffffff))
		return;
	r->watches_due |= 1u << i;
	if (res >= 0)
		r->ready |= 1 << (UQ_WATCH_SHIFT + i);
}

static void belled(struct uq_ring *r, const struct io_uring_cqe *cqe)
{
	if ((cqe->user_data & ROUND_MASK) != (r->port_round & ROUND_MASK))
		return;
	if (cqe->user_data & BELL_OUT_DATA)
		r->bell_tested = false;
	else if (!(cqe->flags & IORING_CQE_F_MORE))
		r->bell_armed = false;
}

static void other_completion(struct uq_ring *r, const struct io_uring_cqe *cqe)
{
	if (cqe->user_data & ENGINE_USER_DATA)
		r->calls->complete(r->engine, cqe->user_data, cqe->res);
	else if (cqe->user_data & WATCH_DATA)
		watched(r, cqe->user_data, cqe->res);
	else if (cqe->user_data & (BELL_IN_DATA | BELL_OUT_DATA))
		belled(r, cqe);
	else if (cqe->user_data & TIMER_DATA)
		r->timer_ms = 0;
}

static unsigned harvest(struct uq_ring *r)
{
	struct io_uring_cqe *cqe;
	unsigned head, count = 0;

	io_uring_for_each_cqe(&r->ring, head, cqe) {
		if (cqe->user_data < WATCH_DATA)
			uq_complete(r->q, (unsigned)cqe->user_data, cqe->res);
		else
			other_completion(r, cqe);
		count++;
	}
	io_uring_cq_advance(&r->ring, count);
	return count;
}

/* Whether the kernel holds completions that only an enter posts. */
static bool wants_enter(const struct uq_ring *r)
{
	return IO_URING_READ_ONCE(*r->ring.sq.kflags) & (IORING_SQ_TASKRUN | IORING_SQ_CQ_OVERFLOW);
}

static bool has_news(const void *ring)
{
	const struct uq_ring *r = ring;

	return io_uring_cq_ready(&r->ring) || wants_enter(r) || (r->port && uq_port_has_news(r->port, r->q));
}

/* Reaps every completion before the queue replies, so that replies share one doorbell or frame. */
static void harvest_all(struct uq_ring *r)
{
	unsigned count = harvest(r);

	while (count < r->depth && wants_enter(r)) {
		unsigned more;

		uq_stats_of(r->q)->enters++;
		io_uring_get_events(&r->ring);
		more = harvest(r);
		if (!more)
			return;
		count += more;
	}
}

/* Polls for news before a sleep; true if some came.  Entries are submitted first, since answers may result from them.
 */
static bool look(struct uq_ring *r)
{
	struct spin *s = uq_in_flight(r->q) ? &r->for_answers : &r->for_requests;
	uint64_t budget_ns = spin_budget_ns(s);

	if (!budget_ns)
		return false;
	if (io_uring_sq_ready(&r->ring) && submit(r, 0) < 0)
		return true; /* the next submission fails the same way and is reported */
	taken(r);
	return spin_look(s, budget_ns, has_news, r);
}

/* Submits, and waits for `wait_ms` at most.  A ring that polls and has nothing to submit reaps without an enter. */
static int step(struct uq_ring *r, unsigned wait_ms)
{
	int e = 0;

	if (wait_ms || !r->for_answers.most_ns || io_uring_sq_ready(&r->ring) || wants_enter(r))
		e = submit(r, wait_ms);
	if (e < 0)
		return e;
	/* Completions are stamped with the end of the enter: the wait in it may have been long, or a pause of this
	 * process.  The backend's answers, which are read next, are stamped with the same time. */
	read_time(r, wait_ms);
	if (wait_ms)
		pass_limited(r);
	taken(r);
	uq_stats_of(r->q)->turns++;
	harvest_all(r);
	return 0;
}

static unsigned left_ms(const struct uq_ring *r, unsigned timeout_ms, uint64_t deadline)
{
	if (timeout_ms == UQ_FOREVER_MS)
		return timeout_ms;
	return r->now_ms < deadline ? (unsigned)(deadline - r->now_ms) : 0;
}

/* While nothing is under way or due the ring sleeps without a timer until something comes. */
static unsigned sleep_ms(const struct uq_ring *r, unsigned left)
{
	return uq_limit_wait_ms(r->q, uq_wait_ms(r->q, left));
}

int uq_ring_run(struct uq_ring *r, unsigned timeout_ms)
{
	struct uq_stats *s = uq_stats_of(r->q);
	uint64_t deadline, judged_ms = UINT64_MAX; /* the owner may have changed what deadlines depend on */

	read_time(r, 0);
	deadline = r->now_ms + timeout_ms;
	for (;;) {
		unsigned attention, left = left_ms(r, timeout_ms, deadline);
		bool waits;
		int e;

		pass_limited(r);
		/* The backend's answers are read before its deadlines are judged, once in a millisecond. */
		exchange(r);
		if (r->serving_ms != judged_ms)
			uq_tick(r->q, judged_ms = r->serving_ms);
		write_commands(r);
		arm_watches(r);
		arm_bell(r);
		attention = uq_attention(r->q);
		waits = !attention && !r->ready && left && !uq_commit_is_awaited(r->q) && !look(r) &&
			(!r->port || uq_port_doze(r->port, r->q));
		e = step(r, waits ? sleep_ms(r, left) : 0);
		if (r->port && waits)
			uq_port_wake(r->port);
		if (e < 0)
			return e;
		attention = uq_attention(r->q);
		if (attention || r->ready || !left) {
			int bits = (int)attention | r->ready;

			r->ready = 0;
			s->wakeups++;
			return bits;
		}
	}
}
