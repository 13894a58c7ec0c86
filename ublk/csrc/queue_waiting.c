#include "queue_waiting.h"

#include <errno.h>
#include <stdlib.h>

#include "queue_check.h"
#include "queue_request.h"

static bool waits_for_link(const struct uq_tag *t) { return t->state == UQ_WAIT_LINK || t->state == UQ_WAIT_PLACE; }

static int compare_sequence(const void *a, const void *b, void *context)
{
	const struct uq *q = context;
	uint64_t x = q->tags[*(const uint16_t *)a].sequence, y = q->tags[*(const uint16_t *)b].sequence;

	return x < y ? -1 : x > y;
}

void uq_requests_resume(struct uq *q)
{
	unsigned count = 0;

	for (unsigned i = 0; i < q->config.depth; i++)
		if (waits_for_link(&q->tags[i]))
			q->replay[count++] = (uint16_t)i;
	qsort_r(q->replay, count, sizeof *q->replay, compare_sequence, q);
	for (unsigned i = 0; i < count; i++)
		uq_request_resume(q, &q->tags[q->replay[i]]);
}

/* No backend has it, but one is to have it. */
static bool is_unsent(const struct uq_tag *t)
{
	return waits_for_link(t) || t->state == UQ_WAIT_BUFFER || t->state == UQ_COPYING;
}

void uq_hold(struct uq *q, int on)
{
	if (on) {
		q->held = true;
		q->quiet = false;
		if (q->absence_gave_up)
			q->giving_up = q->absence_gave_up = false;
	} else if (q->held) {
		q->held = q->is_absent = false;
		q->attention &= ~(unsigned)UQ_ATT_QUIET;
		for (unsigned i = 0; i < q->config.depth; i++) {
			struct uq_tag *t = &q->tags[i];

			/* A write that must fail keeps the reason for which it does. */
			if (is_unsent(t) && !t->must_fail) {
				t->arrived_ms = q->now_ms;
				t->overdue = false;
			}
		}
		if (uq_has_link(q))
			uq_requests_resume(q);
	}
	uq_check(q);
}

void uq_give_up(struct uq *q)
{
	uq_hold(q, 0);
	q->giving_up = true;
	q->absence_gave_up = false;
	for (unsigned i = 0; i < q->config.depth; i++) {
		struct uq_tag *t = &q->tags[i];
		bool waits = waits_for_link(t) || t->state == UQ_WAIT_BUFFER;

		if (waits && !uq_has_link(q))
			uq_request_fail(q, t, -EIO);
	}
	/* Without a backend they fail. */
	uq_requests_pass(q);
	uq_check(q);
}
