/* Time: deadlines of requests, and how long a backend may be mute or away.  See queue_core.h for the contract. */
#include "queue_internal.h"

#include <errno.h>

/* Looking at every tag costs more than a turn; a deadline may be noticed this much late. */
#define SCAN_MS 100
/* So long a buffer must have been of no use before it goes back. */
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
		uq_fail(q, t, -ETIMEDOUT);
		break;
	case UQ_PLACING:
	case UQ_SERVING:
		t->doomed = true;
		uq_link_cut(q, UQ_V_SILENT);
		break;
	default:
		t->doomed = true;
	}
}

static bool pending(const struct uq_tag *t)
{
	return t->state != UQ_KERNEL && t->state != UQ_GONE && t->state != UQ_COMMITTING;
}

static bool is_mute(const struct uq *q)
{
	uint32_t most = q->config.hello_timeout_ms;

	return most && q->link == UQ_LINK_EXPECTED && q->now_ms - q->expected_ms >= most;
}

/* One that was cut off is as good as gone; one that is expected or fencing is there, and io_timeout is for it. */
static void watch_absence(struct uq *q)
{
	if (!q->config.absent_ms || q->giving_up || (q->link != UQ_LINK_NONE && q->link != UQ_LINK_CUT))
		return;
	if (!q->is_absent) {
		q->is_absent = true;
		q->absent_since_ms = q->now_ms;
	} else if (q->now_ms - q->absent_since_ms >= q->config.absent_ms) {
		q->attention |= UQ_ATT_ABSENT;
		uq_give_up(q);
	}
}

void uq_tick(struct uq *q, uint64_t now_ms)
{
	q->now_ms = now_ms;
	if (is_mute(q))
		uq_link_cut(q, UQ_V_MUTE);
	watch_absence(q);
	if (now_ms - q->stock_looked_ms >= STOCK_IDLE_MS) {
		q->stock_looked_ms = now_ms;
		uq_stock_look(q);
	}
	if (!q->config.timeout_ms || !q->config.stats->in_flight || now_ms - q->scanned_ms < SCAN_MS)
		return;
	q->scanned_ms = now_ms;
	for (unsigned i = 0; i < q->config.depth; i++) {
		struct uq_tag *t = &q->tags[i];

		if (pending(t) && now_ms - t->arrived_ms >= q->config.timeout_ms)
			overdue(q, t);
	}
}

void uq_give_up(struct uq *q)
{
	q->giving_up = true;
	for (unsigned i = 0; i < q->config.depth; i++) {
		struct uq_tag *t = &q->tags[i];
		bool waits = t->state == UQ_WAIT_PLACE || t->state == UQ_WAIT_LINK || t->state == UQ_WAIT_BUFFER;

		if (waits && q->link != UQ_LINK_UP)
			uq_fail(q, t, -EIO);
	}
}
