/* Deadlines: of requests, of a backend's HELLO, of a backend's absence; and the period after which idle buffers go
 * back. See queue_types.h for the order of files, queue_core.h for the public contract. */
#include "queue_types.h"

#include <errno.h>

#include "queue_check.h"
#include "queue_limit.h"
#include "queue_link.h"
#include "queue_request.h"
#include "queue_stock.h"

/* Looking at every tag costs more than a turn; a deadline may be noticed this much late. */
#define SCAN_MS 100
/* A pool buffer idle for this long is returned to the broker. */
#define STOCK_IDLE_MS 200
/* A queue that waits for a point in time looks at the clock this often. */
#define TICK_MS 500
/* The driver takes a COMMIT in the call in which the worker falls asleep, so a region of the backend's goes back when
 * the worker wakes.  A request of another queue may wait for that region, and wakes only its own worker. */
#define REGION_MS 10

/* A backend that holds a request past its deadline is cut off: only its death makes the buffer safe to reuse. */
static void overdue(struct uq *q, struct uq_tag *t)
{
	if (!t->overdue) {
		t->overdue = true;
		q->config.stats->timeouts++;
		q->attention |= UQ_ATT_SILENT;
	}
	if (!q->config.fail_on_timeout)
		return;
	switch (t->state) {
	case UQ_WAIT_BUFFER:
	case UQ_WAIT_PLACE:
	case UQ_WAIT_LINK:
		uq_request_fail(q, t, -ETIMEDOUT);
		break;
	case UQ_PLACING:
	case UQ_SERVING:
		t->must_fail = true;
		uq_link_cut(q, UQ_V_SILENT);
		break;
	default:
		t->must_fail = true;
	}
}

static bool pending(const struct uq_tag *t)
{
	return t->state != UQ_KERNEL && t->state != UQ_GONE && t->state != UQ_COMMITTING && t->state != UQ_WAIT_LIMIT;
}

/* In a held queue only what the backend has can be late. */
static bool is_kept(const struct uq *q, const struct uq_tag *t)
{
	return q->held && t->state != UQ_PLACING && t->state != UQ_SERVING;
}

static void watch_flush(struct uq *q)
{
	uint32_t most = q->config.timeout_ms;

	if (!q->flush_sequence || !most || q->now_ms - q->flush_since_ms < most)
		return;
	if (!q->flush_overdue) {
		q->flush_overdue = true;
		q->config.stats->timeouts++;
		q->attention |= UQ_ATT_SILENT;
	}
	if (q->config.fail_on_timeout)
		uq_link_cut(q, UQ_V_SILENT);
}

static bool is_mute(const struct uq *q)
{
	uint32_t most = q->config.hello_timeout_ms;

	return most && q->link == UQ_LINK_EXPECTED && q->now_ms - q->expected_ms >= most;
}

/* A backend that was cut off counts as absent; for one that is expected or fencing io_timeout holds. */
static void watch_absence(struct uq *q)
{
	if (!q->config.absent_ms || q->giving_up || q->held || uq_link_talks(q))
		return;
	if (!q->is_absent) {
		q->is_absent = true;
		q->absent_since_ms = q->now_ms;
	} else if (q->now_ms - q->absent_since_ms >= q->config.absent_ms) {
		q->attention |= UQ_ATT_ABSENT;
		uq_give_up(q);
		q->absence_gave_up = true;
	}
}

void uq_set_deadlines(struct uq *q, uint32_t timeout_ms, int fail_on_timeout, uint32_t absent_ms)
{
	q->config.timeout_ms = timeout_ms;
	q->config.fail_on_timeout = fail_on_timeout != 0;
	q->config.absent_ms = absent_ms;
	if (q->absence_gave_up)
		q->giving_up = q->absence_gave_up = false;
	for (unsigned i = 0; i < q->config.depth; i++) {
		struct uq_tag *t = &q->tags[i];

		/* A request that is within the new deadline is reported again when that has passed. */
		if (!timeout_ms || q->now_ms - t->arrived_ms < timeout_ms)
			t->overdue = false;
	}
}

void uq_limit_tick(struct uq *q, uint64_t now_ns)
{
	uq_limit_time(q, now_ns);
	uq_requests_pass(q);
	uq_check(q);
}

void uq_set_time(struct uq *q, uint64_t now_ms) { q->now_ms = now_ms; }

void uq_set_real_time(struct uq *q, uint64_t now_ns) { q->now_ns = now_ns; }

/* Judges each request's deadline, and notes how old the oldest one is. */
static void scan(struct uq *q)
{
	uint64_t oldest_ms = 0;

	for (unsigned i = 0; i < q->config.depth; i++) {
		struct uq_tag *t = &q->tags[i];
		uint64_t age_ms = q->now_ms - t->arrived_ms;

		if (!pending(t))
			continue;
		if (age_ms > oldest_ms)
			oldest_ms = age_ms;
		if (!is_kept(q, t) && age_ms >= q->config.timeout_ms)
			overdue(q, t);
	}
	q->config.stats->oldest_ms = oldest_ms;
}

static bool may_return_buffers(const struct uq *q)
{
	for (unsigned c = 0; c < q->config.classes; c++)
		if (uq_stock_may_return(q, c))
			return true;
	return false;
}

/* Whether there is something to do although nothing comes: a deadline, buffers that have been idle, or descriptors for
 * which the backend's ring had no room. */
static bool has_due(const struct uq *q)
{
	bool awaits_backend = q->config.absent_ms && !q->giving_up && !q->held && !uq_link_talks(q);
	bool awaits_hello = q->config.hello_timeout_ms && q->link == UQ_LINK_EXPECTED;

	return q->config.stats->in_flight || q->output_count || awaits_backend || awaits_hello || q->flush_sequence ||
	       may_return_buffers(q);
}

static bool owes_region(const struct uq *q)
{
	for (unsigned i = 0; q->regions && i < q->commands_count; i++) {
		const struct uq_command *c = &q->commands[(q->commands_first + i) & q->commands_mask];

		if (c->op == UQ_CMD_COMMIT && q->tags[c->tag].own_segment)
			return true;
	}
	return false;
}

static unsigned least(unsigned a, unsigned b) { return a < b ? a : b; }

unsigned uq_wait_ms(const struct uq *q, unsigned most_ms)
{
	if (owes_region(q))
		return least(most_ms, REGION_MS);
	return has_due(q) ? least(most_ms, TICK_MS) : most_ms;
}

void uq_tick(struct uq *q, uint64_t now_ms)
{
	q->now_ms = now_ms;
	if (is_mute(q))
		uq_link_cut(q, UQ_V_MUTE);
	watch_absence(q);
	watch_flush(q);
	if (now_ms - q->stock_looked_ms >= STOCK_IDLE_MS) {
		q->stock_looked_ms = now_ms;
		uq_stock_look(q);
	}
	if (!q->config.timeout_ms || !q->config.stats->in_flight || now_ms - q->scanned_ms < SCAN_MS)
		return;
	q->scanned_ms = now_ms;
	scan(q);
}
