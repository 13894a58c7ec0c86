#include "ring_loop.h"

#include <errno.h>
#include <liburing.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#include "spin.h"

/* user_data below ENGINE_USER_DATA: the kind of entry, and for a bell its round and queue. */
#define LOOP_WATCHED (1ull << 62)
#define LOOP_BELL (1ull << 61)
#define LOOP_OTHER (1ull << 60)
#define LOOP_ROUND_SHIFT 16
#define LOOP_ENTRIES_MAX 4096u
#define LOOP_ENTRIES_MORE 16u

struct loop_bell {
	int ours, workers;
	uint32_t round;
	bool armed, due;
};

struct ring_loop {
	struct io_uring ring;
	struct ports *ports;
	struct engine *engine;
	uint32_t queues, wrong, unsent, handed_out;
	int watched;
	bool watch_armed, is_ready, hears, is_short; /* is_short: a submission entry was lacking */
	struct ring_loop_statistics count;
	struct spin spin;
	struct loop_bell bell[];
};

static uint64_t bell_data(const struct ring_loop *l, uint32_t queue)
{
	return LOOP_BELL | (uint64_t)l->bell[queue].round << LOOP_ROUND_SHIFT | queue;
}

static int loop_open_ring(struct io_uring *ring, uint32_t entries)
{
	static const unsigned modes[] = { IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN |
						  IORING_SETUP_TASKRUN_FLAG,
					  IORING_SETUP_COOP_TASKRUN | IORING_SETUP_TASKRUN_FLAG, 0 };
	int error = -EINVAL;
	if (entries > LOOP_ENTRIES_MAX)
		entries = LOOP_ENTRIES_MAX;
	for (size_t i = 0; error == -EINVAL && i < sizeof modes / sizeof *modes; i++)
		error = io_uring_queue_init(entries, ring, modes[i]);
	if (!error)
		io_uring_register_ring_fd(ring);
	return error;
}

struct ring_loop *ring_loop_new(struct ports *ports, struct engine *engine, uint32_t queues, uint32_t depth,
				int watched, int *error)
{
	struct ring_loop *l = calloc(1, sizeof *l + queues * sizeof *l->bell);
	*error = -ENOMEM;
	if (!l)
		return NULL;
	l->ports = ports;
	l->engine = engine;
	l->queues = queues;
	l->watched = watched;
	for (uint32_t i = 0; i < queues; i++)
		l->bell[i] = (struct loop_bell){ .ours = -1, .workers = -1 };
	*error = loop_open_ring(&l->ring, queues * (depth + 2) + LOOP_ENTRIES_MORE);
	if (*error) {
		free(l);
		return NULL;
	}
	*error = engine_use_ring(engine, &l->ring);
	if (*error == 0)
		return l;
	ring_loop_free(l);
	return NULL;
}

void ring_loop_free(struct ring_loop *l)
{
	io_uring_queue_exit(&l->ring);
	free(l);
}

/* Submits a full submission queue first. */
static struct io_uring_sqe *loop_entry(struct ring_loop *l)
{
	struct io_uring_sqe *sqe = io_uring_get_sqe(&l->ring);
	if (!sqe)
		l->is_short = true;
	return sqe;
}

static void disarm(struct ring_loop *l, uint32_t queue)
{
	struct io_uring_sqe *sqe = l->bell[queue].armed ? loop_entry(l) : NULL;
	l->bell[queue].armed = false;
	if (sqe) {
		io_uring_prep_poll_remove(sqe, bell_data(l, queue));
		sqe->user_data = LOOP_OTHER;
	}
}

void ring_loop_bells(struct ring_loop *l, uint32_t queue, int ours, int workers)
{
	/* Entries name descriptors by number: they must be with the kernel before a number can mean something else. */
	io_uring_submit(&l->ring);
	disarm(l, queue);
	io_uring_submit(&l->ring);
	l->bell[queue] = (struct loop_bell){ .ours = ours, .workers = workers, .round = l->bell[queue].round + 1 };
}

static void arm_watched(struct ring_loop *l)
{
	struct io_uring_sqe *sqe = l->watch_armed ? NULL : loop_entry(l);
	if (!sqe)
		return;
	/* One shot, armed anew after each look: it completes at once if the descriptor is still readable. */
	io_uring_prep_poll_add(sqe, l->watched, POLLIN);
	sqe->user_data = LOOP_WATCHED;
	l->watch_armed = true;
}

/* Edge-triggered and never read: each write to the eventfd is a completion, and its count has room for 2^64. */
static void arm_bell(struct ring_loop *l, uint32_t queue)
{
	struct loop_bell *b = &l->bell[queue];
	struct io_uring_sqe *sqe = b->armed || b->ours < 0 ? NULL : loop_entry(l);
	if (!sqe)
		return;
	io_uring_prep_poll_multishot(sqe, b->ours, POLLIN);
	sqe->user_data = bell_data(l, queue);
	b->armed = true;
}

static void ring_due_bell(struct ring_loop *l, uint32_t queue)
{
	static const uint64_t one = 1;
	struct loop_bell *b = &l->bell[queue];
	struct io_uring_sqe *sqe = b->due && b->workers >= 0 ? loop_entry(l) : NULL;
	if (!sqe)
		return;
	io_uring_prep_write(sqe, b->workers, &one, sizeof one, 0);
	sqe->flags |= IOSQE_CQE_SKIP_SUCCESS;
	sqe->user_data = LOOP_OTHER;
	b->due = false;
	l->count.bells++;
}

static void loop_completed(struct ring_loop *l, const struct io_uring_cqe *cqe)
{
	uint64_t data = cqe->user_data;
	uint32_t queue = data & 0xffff;
	if (data & ENGINE_USER_DATA) {
		engine_complete(l->engine, data, cqe->res);
	} else if (data & LOOP_WATCHED) {
		l->watch_armed = false;
		l->is_ready = true;
	} else if (data & LOOP_BELL && data == bell_data(l, queue) && !(cqe->flags & IORING_CQE_F_MORE)) {
		l->bell[queue].armed = false;
	}
}

static void loop_reap(struct ring_loop *l)
{
	struct io_uring_cqe *cqe;
	unsigned head, seen = 0;
	io_uring_for_each_cqe(&l->ring, head, cqe) {
		loop_completed(l, cqe);
		seen++;
	}
	io_uring_cq_advance(&l->ring, seen);
}

/* At most a ring's worth, so that the other queues and the answers get their turn. */
static int loop_take(struct ring_loop *l, uint32_t queue)
{
	const struct wire_descriptor *at;
	int32_t left = ports_size(l->ports, queue);
	while (left > 0) {
		int32_t count = ports_peek(l->ports, queue, (const void **)&at);
		if (count < 0)
			return count;
		if (count == 0)
			return 0;
		int error = engine_take(l->engine, at, (uint32_t)count);
		if (error)
			return error;
		ports_consumed(l->ports, queue, (uint32_t)count);
		left -= count;
	}
	return 0;
}

static int loop_send(struct ring_loop *l, uint32_t queue)
{
	const struct wire_descriptor *answers;
	uint32_t count = engine_answers(l->engine, queue, &answers);
	int bell = 0;
	if (!count)
		return 0;
	int32_t written = ports_write(l->ports, queue, answers, count, &bell);
	if (written < 0)
		return written;
	engine_answers_sent(l->engine, queue, (uint32_t)written);
	l->bell[queue].due |= bell;
	l->unsent += count - (uint32_t)written;
	return 0;
}

static int exchange(struct ring_loop *l)
{
	/* Takes from all queues before answering any: a region that one queue gives back may be wanted on another. */
	for (uint32_t i = 0; i < l->queues && l->hears; i++) {
		l->wrong = i;
		int error = loop_take(l, i);
		if (error)
			return error;
	}
	/* Before sending: requests that this drops are answered in the same turn. */
	l->handed_out = engine_hand_out(l->engine);
	for (uint32_t i = 0; i < l->queues; i++) {
		l->wrong = i;
		int error = loop_send(l, i);
		if (error)
			return error;
	}
	return 0;
}

/* The part of a turn that makes no system call. */
static int loop_turn(struct ring_loop *l)
{
	l->count.turns++;
	l->is_short = false;
	l->unsent = 0;
	loop_reap(l);
	int error = exchange(l);
	for (uint32_t i = 0; i < l->queues; i++) {
		ring_due_bell(l, i);
		arm_bell(l, i);
	}
	arm_watched(l);
	l->is_short |= engine_prepare(l->engine) > 0;
	return error ? error : engine_error(l->engine);
}

static bool is_idle(const struct ring_loop *l)
{
	struct engine_statistics statistics;
	engine_count(l->engine, &statistics);
	return statistics.running == 0;
}

/* Submits, and waits for one completion, `wait_ms` at most; -1: for ever, 0: not at all. */
static int loop_enter(struct ring_loop *l, int wait_ms)
{
	struct __kernel_timespec limit = { .tv_sec = wait_ms / 1000, .tv_nsec = wait_ms % 1000 * 1000000ll };
	struct io_uring_cqe *cqe;
	int result;
	l->count.calls += wait_ms != 0 || io_uring_sq_ready(&l->ring) > 0;
	if (wait_ms > 0)
		result = io_uring_submit_and_wait_timeout(&l->ring, &cqe, 1, &limit, NULL);
	else
		result = io_uring_submit_and_wait(&l->ring, wait_ms < 0);
	/* -EBUSY, -EAGAIN: completions must be reaped first, which the next turn does. */
	return result < 0 && result != -ETIME && result != -EBUSY && result != -EAGAIN ? result : 0;
}

static int64_t loop_now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static int shorter(int wait_ms, int limit_ms) { return wait_ms < 0 || wait_ms > limit_ms ? limit_ms : wait_ms; }

static bool has_news(const void *loop)
{
	const struct ring_loop *l = loop;
	/* Completions that the kernel posts only in io_uring_enter count, too. */
	return io_uring_cq_ready(&l->ring) || IO_URING_READ_ONCE(*l->ring.sq.kflags) & IORING_SQ_TASKRUN ||
	       ports_have_news(l->ports);
}

/* Polls for work before a sleep; true if some came.  The turn's entries are submitted first, since answers may result.
 */
static bool look(struct ring_loop *l)
{
	uint64_t budget_ns = spin_budget_ns(&l->spin);
	if (!budget_ns)
		return false;
	/* The caller's next enter fails the same way and reports it. */
	if (io_uring_sq_ready(&l->ring) && loop_enter(l, 0) < 0)
		return true;
	return spin_look(&l->spin, budget_ns, has_news, l);
}

static int how_long(struct ring_loop *l, int left_ms)
{
	if (l->is_short || l->is_ready)
		return 0;
	if (l->hears && (look(l) || !ports_doze(l->ports, engine_wants_regions(l->engine))))
		return 0;
	return l->unsent ? shorter(left_ms, PORTS_LOOK_AGAIN_MS) : left_ms;
}

/* Before the caller works: submits the doorbells, and fetches completions, which a loop that never waits would not see.
 * Makes no system call if neither is due. */
static int loop_hand_out(struct ring_loop *l)
{
	int error = loop_enter(l, 0);
	return error ? error : RING_LOOP_CALLS | (l->is_ready ? RING_LOOP_WATCHED : 0);
}

int ring_loop_run(struct ring_loop *l, int timeout_ms, int hears)
{
	int64_t deadline_ms = timeout_ms < 0 ? 0 : loop_now_ms() + timeout_ms;
	l->hears = hears;
	l->is_ready = false;
	engine_collect(l->engine);
	for (;;) {
		int64_t left_ms = timeout_ms < 0 ? -1 : deadline_ms - loop_now_ms();
		bool is_over = timeout_ms >= 0 && left_ms <= 0;
		int error = loop_turn(l);
		if (error)
			return error;
		if (l->handed_out)
			return loop_hand_out(l);
		is_over |= !hears && is_idle(l);
		error = loop_enter(l, is_over ? 0 : how_long(l, (int)left_ms));
		ports_wake(l->ports);
		if (error || l->is_ready || is_over)
			return error ? error : l->is_ready ? RING_LOOP_WATCHED : 0;
	}
}

void ring_loop_spin(struct ring_loop *l, uint32_t most_us) { spin_begin(&l->spin, most_us * 1000ull); }

uint32_t ring_loop_wrong(const struct ring_loop *l) { return l->wrong; }

int ring_loop_settle(struct ring_loop *l, int timeout_ms)
{
	int64_t deadline_ms = loop_now_ms() + timeout_ms;
	int error = 0;
	l->hears = false;
	do {
		error = loop_turn(l);
		if (!error)
			error = loop_enter(l, l->unsent ? PORTS_LOOK_AGAIN_MS : 0);
	} while (!error && l->unsent && loop_now_ms() < deadline_ms);
	return error ? error : (int)l->unsent;
}

void ring_loop_count(const struct ring_loop *l, struct ring_loop_statistics *statistics) { *statistics = l->count; }
