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
