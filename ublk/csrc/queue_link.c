/* The link to the backend: its descriptors are judged here, and what they say is done by queue_request.c.
 * See queue_types.h for the order of files, queue_core.h for the public contract. */
#include "queue_link.h"

#include <errno.h>
#include <string.h>

#include "queue_check.h"
#include "queue_region.h"
#include "queue_request.h"
#include "queue_tag.h"
#include "queue_waiting.h"

#define ERRNO_MAX 4095
/* An honest backend may answer an earlier worker's requests late: at most a depth for each worker, and few workers die
 * in a row.  The regions that it posted to them may come as late, a depth of each size. */
#define STALE_PER_TAG 8u
#define STALE_MORE 64u

static void end_flush(struct uq *q, int result)
{
	if (!q->flush_sequence)
		return;
	q->flush_sequence = 0;
	q->flush_result = result;
	q->attention |= UQ_ATT_FLUSHED;
}

void uq_link_cut(struct uq *q, int violation)
{
	if (!uq_link_talks(q))
		return;
	q->link = UQ_LINK_CUT;
	q->violation = violation;
	uq_output_clear(q);
	uq_posts_forget(q);
	end_flush(q, -ENOTCONN);
	q->config.stats->violations += violation != UQ_V_NONE;
	q->attention |= UQ_ATT_CUT;
}

static void violate(struct uq *q, int violation, const struct wire_descriptor *d)
{
	if (d)
		q->culprit = *d;
	else
		memset(&q->culprit, 0, sizeof q->culprit);
	uq_link_cut(q, violation);
}

/* Stale answers are dropped and counted; a backend that sends too many costs the worker time and is cut off. */
static void stale(struct uq *q, const struct wire_descriptor *d)
{
	unsigned sizes = q->config.place_in_backend ? q->config.classes : 0;

	q->config.stats->stale_answers++;
	if (++q->stale > STALE_PER_TAG * (1 + sizes) * q->config.depth + STALE_MORE)
		violate(q, UQ_V_FLOOD, d);
}

static void answer_placed(struct uq *q, struct uq_tag *t, const struct wire_descriptor *d)
{
	int wrong = uq_region_judge(q, d, t->length);

	if (!wrong && uq_region_occupied(q, d->buffer, t->length))
		wrong = UQ_V_LENT;
	if (wrong) {
		uq_request_fail(q, t, -EIO);
		violate(q, wrong, d);
		return;
	}
	uq_request_placed(q, t, d->buffer);
}

static void answer_reject(struct uq *q, struct uq_tag *t, const struct wire_descriptor *d)
{
	bool is_errno = d->result < 0 && d->result >= -ERRNO_MAX;

	uq_request_fail(q, t, is_errno ? d->result : -EIO);
	if (!is_errno)
		violate(q, UQ_V_RESULT, d);
}

static int judge_result(const struct uq *q, const struct uq_tag *t, int32_t result)
{
	bool moves = t->op == WIRE_READ || t->op == WIRE_WRITE;

	if (result < -ERRNO_MAX)
		return UQ_V_RESULT;
	if (result > 0 && (!moves || (uint64_t)result > t->length || (uint32_t)result % q->config.block_bytes))
		return UQ_V_RESULT;
	return UQ_V_NONE;
}

static int judge_done(const struct uq *q, const struct uq_tag *t, const struct wire_descriptor *d)
{
	int wrong = judge_result(q, t, d->result);

	if (wrong || d->result <= 0)
		return wrong;
	/* The kernel copies nothing out for a request in place, so no region may answer one. */
	if (t->op == WIRE_READ && d->flags & WIRE_REGION)
		return q->config.need_get_data && !t->in_place ? uq_region_judge(q, d, t->length) : UQ_V_REGION;
	return t->op == WIRE_READ && t->slot == UQ_BUFFER_NONE && !t->in_place ? UQ_V_REGION : UQ_V_NONE;
}

static void answer_done(struct uq *q, struct uq_tag *t, const struct wire_descriptor *d)
{
	int wrong = judge_done(q, t, d);

	if (wrong) {
		t->must_fail = true;
		violate(q, wrong, d);
		return;
	}
	uq_request_done(q, t, d->result, t->op == WIRE_READ && d->result > 0 && d->flags & WIRE_REGION, d->buffer);
}

static int judge_ended(const struct uq *q, const struct engine_result *said)
{
	const struct uq_tag *t = said->tag < q->config.depth ? &q->tags[said->tag] : NULL;

	/* No result of an earlier request can be on its way: the engine began with this worker. */
	if (!t || said->sequence != t->sequence)
		return UQ_V_IDENTITY;
	return t->state == UQ_SERVING ? judge_result(q, t, said->result) : UQ_V_UNEXPECTED;
}

void uq_link_ended(struct uq *q, const struct engine_result *said)
{
	int wrong = judge_ended(q, said);

	if (wrong)
		violate(q, wrong,
			&(struct wire_descriptor){ .kind = WIRE_DONE,
						   .device = q->config.device,
						   .queue = q->config.queue,
						   .tag = said->tag,
						   .epoch = q->config.epoch,
						   .sequence = said->sequence,
						   .result = said->result });
	else
		uq_request_done(q, &q->tags[said->tag], said->result, false, 0);
	uq_check(q);
}

static void link_up(struct uq *q)
{
	q->link = UQ_LINK_UP;
	q->attention |= UQ_ATT_LINK;
	uq_requests_resume(q);
}

static void hello(struct uq *q, const struct wire_descriptor *d)
{
	bool is_second = q->link != UQ_LINK_EXPECTED;

	/* A HELLO to a worker that died at once may still lie in the transport and come before the one to this worker.
	 */
	if (is_second && d->epoch < q->config.epoch)
		stale(q, d);
	else if (is_second)
		violate(q, UQ_V_UNEXPECTED, d);
	if (is_second)
		return;
	uq_put_link(q, WIRE_WELCOME);
	if (q->fence) {
		q->link = UQ_LINK_FENCING;
		uq_put_link(q, WIRE_FENCE);
	} else {
		link_up(q);
	}
}

static void fenced(struct uq *q, const struct wire_descriptor *d)
{
	if (q->link == UQ_LINK_FENCING && d->epoch == q->config.epoch)
		link_up(q);
	else if (d->epoch < q->config.epoch) /* of a worker that died before its fence was confirmed */
		stale(q, d);
	else
		violate(q, UQ_V_UNEXPECTED, d);
}

/* A backend posts to this epoch from its HELLO on, so also before its fence is confirmed. */
static void posted(struct uq *q, const struct wire_descriptor *d)
{
	bool is_linked = q->link == UQ_LINK_UP || q->link == UQ_LINK_FENCING;
	int wrong = is_linked ? UQ_V_NONE : UQ_V_UNEXPECTED;

	if (d->epoch < q->config.epoch) {
		stale(q, d);
		return;
	}
	if (!wrong)
		wrong = uq_post_add(q, d);
	if (wrong)
		violate(q, wrong, d);
}

static bool is_ours(const struct uq *q, const struct wire_descriptor *d)
{
	return d->device == q->config.device && d->queue == q->config.queue && d->tag < q->config.depth &&
	       d->epoch <= q->config.epoch;
}

static bool is_stale(const struct uq *q, const struct wire_descriptor *d)
{
	return d->epoch < q->config.epoch || (d->epoch == q->config.epoch && d->sequence < q->tags[d->tag].sequence);
}

static void answer(struct uq *q, const struct wire_descriptor *d)
{
	struct uq_tag *t = &q->tags[d->tag];

	if (d->epoch != q->config.epoch || d->sequence != t->sequence)
		violate(q, UQ_V_IDENTITY, d);
	else if (t->state == UQ_PLACING && d->kind == WIRE_PLACED)
		answer_placed(q, t, d);
	else if (t->state == UQ_PLACING && d->kind == WIRE_REJECT)
		answer_reject(q, t, d);
	else if (t->state == UQ_SERVING && d->kind == WIRE_DONE)
		answer_done(q, t, d);
	else
		violate(q, UQ_V_UNEXPECTED, d);
}

/* Of an earlier HELLO's link it cannot be: that link's end has ended the flush. */
static bool is_own_flush(const struct uq *q, const struct wire_descriptor *d)
{
	return q->flush_sequence && d->kind == WIRE_DONE && d->tag == UQ_FLUSH_TAG && d->epoch == q->config.epoch &&
	       d->sequence == q->flush_sequence;
}

static void flushed(struct uq *q, const struct wire_descriptor *d)
{
	if (d->result > 0 || d->result < -ERRNO_MAX) {
		violate(q, UQ_V_RESULT, d);
		return;
	}
	end_flush(q, d->result);
	/* A request of the flush's tag may have come since the queue is held no more. */
	uq_requests_resume(q);
}

int uq_flush(struct uq *q)
{
	struct wire_descriptor *d;

	if (!q->held || !q->quiet || q->flush_sequence || q->link != UQ_LINK_UP)
		return -ENOTCONN;
	d = uq_put(q, &q->tags[UQ_FLUSH_TAG], WIRE_REQUEST);
	d->op = WIRE_FLUSH;
	d->flags = 0;
	d->offset = d->length = 0;
	d->sequence = q->flush_sequence = ++q->sequence;
	q->flush_since_ms = q->now_ms;
	q->flush_overdue = false;
	return 0;
}

int uq_flush_result(const struct uq *q) { return q->flush_result; }

static void receive(struct uq *q, const struct wire_descriptor *d)
{
	bool known = d->kind == WIRE_PLACED || d->kind == WIRE_REJECT || d->kind == WIRE_DONE;

	if (!is_ours(q, d))
		violate(q, UQ_V_IDENTITY, d);
	else if (d->kind == WIRE_HELLO)
		hello(q, d);
	else if (d->kind == WIRE_FENCED)
		fenced(q, d);
	else if (d->kind == WIRE_POST)
		posted(q, d);
	else if (!known)
		violate(q, UQ_V_KIND, d);
	else if (is_own_flush(q, d))
		flushed(q, d);
	else if (is_stale(q, d)) /* perhaps an answer to an earlier worker, before any HELLO */
		stale(q, d);
	else if (q->link != UQ_LINK_UP)
		violate(q, UQ_V_UNEXPECTED, d);
	else
		answer(q, d);
}

void uq_input(struct uq *q, const void *frame, size_t bytes)
{
	const char *at = frame;
	struct wire_descriptor d;

	if (!uq_link_talks(q))
		return;
	if (!bytes || bytes % sizeof d || bytes / sizeof d > WIRE_FRAME_DESCRIPTORS_MAX) {
		violate(q, UQ_V_FRAME, NULL);
		return;
	}
	for (; bytes && q->link != UQ_LINK_CUT; bytes -= sizeof d, at += sizeof d) {
		/* Copied before it is judged: the sender may still write to the memory that the frame lies in. */
		memcpy(&d, at, sizeof d);
		q->config.stats->descriptors_in++;
		receive(q, &d);
		uq_link_settle(q);
		uq_check(q);
	}
}

int uq_link_expect(struct uq *q, uint32_t segment, uint8_t *base, uint64_t bytes, int reads_own, int fence)
{
	int e = q->link == UQ_LINK_NONE ? uq_regions_begin(q, segment, base, bytes) : -EBUSY;

	if (e)
		return e;
	q->reads_own = reads_own && segment;
	q->fence = fence;
	q->link = UQ_LINK_EXPECTED;
	q->expected_ms = q->now_ms;
	q->stale = 0;
	q->giving_up = q->is_absent = q->absence_gave_up = false;
	q->violation = UQ_V_NONE;
	memset(&q->culprit, 0, sizeof q->culprit);
	return 0;
}

void uq_link_hung_up(struct uq *q)
{
	if (q->link != UQ_LINK_UP && q->link != UQ_LINK_FENCING)
		return;
	q->config.stats->hangups++;
	uq_link_cut(q, UQ_V_NONE);
}

void uq_link_lost(struct uq *q)
{
	if (q->link == UQ_LINK_NONE)
		return;
	q->link = UQ_LINK_NONE;
	q->reads_own = false;
	end_flush(q, -ENOTCONN);
	uq_output_clear(q);
	uq_regions_end(q);
	for (unsigned i = 0; i < q->config.depth; i++)
		uq_request_lost(q, &q->tags[i]);
	if (q->giving_up)
		uq_give_up(q);
	uq_check(q);
}

int uq_link_state(const struct uq *q) { return q->link; }

int uq_violation(const struct uq *q, struct wire_descriptor *culprit)
{
	*culprit = q->culprit;
	return q->violation;
}
