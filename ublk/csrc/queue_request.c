/*
 * A request's road, in the order in which a request takes it:
 *
 *     arrive > admit > route > a region (ask_place) or a pool buffer (need_buffer) > get_data > copied > ready
 *     > hand_over > uq_request_done > uq_finish > commit_taken > let_go
 *
 * A request whose data is there when it arrives enters at `ready`.  Every request leaves by `uq_finish`, one that
 * fails too. See queue_types.h for the order of files, queue_core.h for the public contract.
 */
#include "queue_request.h"

#include <errno.h>
#include <string.h>

#include "queue_check.h"
#include "queue_descriptor.h"
#include "queue_finish.h"
#include "queue_limit.h"
#include "queue_region.h"
#include "queue_run.h"
#include "queue_stock.h"
#include "queue_tag.h"

/* The result of a completion: the driver asks for a buffer (UBLK_IO_RES_NEED_GET_DATA). */
#define RES_NEED_GET_DATA 1

static void admit(struct uq *q, struct uq_tag *t);
static void route(struct uq *q, struct uq_tag *t);
static void route_write(struct uq *q, struct uq_tag *t);
static void ask_place(struct uq *q, struct uq_tag *t);
static void need_buffer(struct uq *q, struct uq_tag *t);
static void got_buffer(struct uq *q, struct uq_tag *t);
static void get_data(struct uq *q, struct uq_tag *t, uint8_t *address);
static void ready(struct uq *q, struct uq_tag *t);
static void hand_over(struct uq *q, struct uq_tag *t);
static void let_go(struct uq *q, struct uq_tag *t);
static void release_region(struct uq *q, struct uq_tag *t);

static bool waits_for_data(const struct uq *q, const struct uq_tag *t)
{
	return t->op == WIRE_WRITE && q->config.need_get_data && !t->copied;
}

/* A wait for a buffer goes on over the death of the backend that was to name a region. */
static void begin_wait(struct uq *q, struct uq_tag *t)
{
	if (!t->waits)
		t->waits_ns = q->now_ns;
	t->waits = true;
}

static void end_wait(struct uq *q, struct uq_tag *t)
{
	if (t->waits)
		uq_count_duration(q, UQ_LATENCY_BUFFER_WAIT, t->waits_ns);
	t->waits = false;
}

/* A held queue lets pass what it takes to free the backend's memory.  The tag of the queue's own FLUSH is in use. */
static bool may_pass(const struct uq *q, const struct uq_tag *t)
{
	return uq_has_link(q) && (!q->held || t->own_segment) && !(q->flush_sequence && uq_index(q, t) == UQ_FLUSH_TAG);
}

/* Requests that have no backend fail instead of waiting for one. */
static bool gives_up(const struct uq *q) { return q->giving_up && !uq_has_link(q); }

static void begin(struct uq *q, struct uq_tag *t)
{
	struct uq_stats *s = q->config.stats;

	t->sequence = ++q->sequence;
	t->arrived_ms = q->now_ms;
	t->arrived_ns = q->now_ns;
	t->copied = t->sent_to_backend = t->must_fail = t->overdue = t->waits = false;
	if (++s->in_flight > s->in_flight_max)
		s->in_flight_max = s->in_flight;
}

static void arrive(struct uq *q, struct uq_tag *t, int res)
{
	bool usable = uq_descriptor_read(q, t);
	bool asks = res == RES_NEED_GET_DATA;

	begin(q, t);
	/* The driver asks for a buffer exactly for the writes of a device with need_get_data; a write that comes
	 * without the question there was copied to address 0. */
	if (asks != (t->op == WIRE_WRITE && q->config.need_get_data)) {
		uq_fail_now(q, UQ_F_COMPLETION, uq_index(q, t), res);
	} else if (!usable) {
		q->config.stats->unsupported++;
		uq_request_fail(q, t, t->op == WIRE_READ || t->op == WIRE_WRITE ? -EINVAL : -EOPNOTSUPP);
	} else if (!uq_limit_holds(q, t->op)) {
		admit(q, t);
	} else if (uq_move(q, t, UQ_EV_LIMITED)) {
		uq_limit_enqueue(q, t);
		uq_requests_pass(q);
	}
}

static void admit(struct uq *q, struct uq_tag *t)
{
	int error = 0;

	if (q->config.zeros)
		uq_answer_alone(q, t);
	else if (uq_runs(q) && may_pass(q, t))
		error = uq_run(q, t);
	else
		route(q, t);
	if (error)
		uq_request_fail(q, t, error);
}

/* The time in which a request waits for the limits does not count against its deadline. */
void uq_requests_pass(struct uq *q)
{
	struct uq_tag *t;

	while ((t = uq_limit_next(q))) {
		t->arrived_ms = q->now_ms;
		admit(q, t);
	}
}

static void route(struct uq *q, struct uq_tag *t)
{
	bool needs_buffer =
		t->op == WIRE_READ && !t->in_place && q->config.need_get_data && may_pass(q, t) && !q->reads_own;

	if (waits_for_data(q, t)) {
		route_write(q, t);
		return;
	}
	if (t->op == WIRE_WRITE) {
		t->copied = true;
		q->config.stats->kernel_write_bytes += t->in_place ? 0 : t->length;
	}
	if (needs_buffer)
		need_buffer(q, t);
	else if (uq_move(q, t, UQ_EV_READY))
		ready(q, t);
}

static void route_write(struct uq *q, struct uq_tag *t)
{
	if (gives_up(q)) {
		uq_request_fail(q, t, -EIO);
	} else if (t->in_place) {
		/* The driver wants the command, ignores its address and copies nothing (ublk_start_io). */
		if (uq_move(q, t, UQ_EV_IN_PLACE))
			get_data(q, t, q->config.scratch);
	} else if (q->config.place_in_backend) {
		if (!uq_move(q, t, UQ_EV_NEEDS_PLACE))
			return;
		if (may_pass(q, t))
			ask_place(q, t);
		else
			begin_wait(q, t);
	} else {
		need_buffer(q, t);
	}
}

static void copy_to_region(struct uq *q, struct uq_tag *t, enum uq_event event, uint64_t buffer, uint64_t bytes)
{
	if (!uq_move(q, t, event))
		return;
	end_wait(q, t);
	uq_region_take(q, t, buffer, bytes);
	get_data(q, t, uq_region_address(q, t));
}

/* A posted region that fits saves the question. */
static void ask_place(struct uq *q, struct uq_tag *t)
{
	uint64_t buffer, bytes;

	if (uq_post_take(q, t->length, &buffer, &bytes))
		copy_to_region(q, t, UQ_EV_POSTED, buffer, bytes);
	else if (uq_move(q, t, UQ_EV_ASK)) {
		begin_wait(q, t);
		uq_put(q, t, WIRE_PLACE);
	}
}

void uq_request_placed(struct uq *q, struct uq_tag *t, uint64_t buffer)
{
	copy_to_region(q, t, UQ_EV_PLACED, buffer, t->length);
}

/* Tags get buffers in the order of arrival: one that comes later never overtakes one that waits for the same class. */
static void need_buffer(struct uq *q, struct uq_tag *t)
{
	t->class = (uint8_t)uq_class_for(q, t->length);
	if (t->state != UQ_WAIT_BUFFER && !uq_move(q, t, UQ_EV_NEEDS_BUFFER))
		return;
	if (uq_stock_lend(q, t)) {
		got_buffer(q, t);
	} else {
		begin_wait(q, t);
		uq_stock_enqueue(q, t);
	}
}

/* The backend that named the region is dead, so nothing writes there any more: the data moves to the pool. */
static void rescue(struct uq *q, struct uq_tag *t)
{
	memcpy(uq_slot_address(q, t->slot), uq_region_address(q, t), t->length);
	q->config.stats->own_copy_bytes += t->length;
	q->config.stats->rescues++;
	uq_region_return(q, t);
}

static void got_buffer(struct uq *q, struct uq_tag *t)
{
	if (t->op == WIRE_WRITE && !t->copied) {
		if (uq_move(q, t, UQ_EV_BUFFER_TO_COPY))
			get_data(q, t, uq_slot_address(q, t->slot));
		return;
	}
	if (t->own_segment)
		rescue(q, t);
	if (uq_move(q, t, UQ_EV_BUFFER_TO_SERVE))
		ready(q, t);
}

static void serve_waiters(struct uq *q, unsigned class)
{
	struct uq_tag *t;

	while ((t = uq_stock_serve(q, class))) {
		end_wait(q, t);
		got_buffer(q, t);
	}
}

int uq_stock_add(struct uq *q, unsigned class, const uint32_t *slots, unsigned count)
{
	if (!uq_stock_fill(q, class, slots, count))
		return -1;
	serve_waiters(q, class);
	uq_check(q);
	return 0;
}

static void get_data(struct uq *q, struct uq_tag *t, uint8_t *address)
{
	uq_command(q, t, UQ_CMD_GET_DATA, 0, address);
}

/* The error of a request that must fail; the driver passes either on to the client (errno_to_blk_status). */
static int why_failed(const struct uq *q, const struct uq_tag *t)
{
	return q->config.fail_on_timeout && t->overdue ? -ETIMEDOUT : -EIO;
}

static void copied(struct uq *q, struct uq_tag *t)
{
	uint64_t length = uq_descriptor_length(q, t);

	/* 6.12 would send the rest of a write that is committed short; 7.3 reports it to the client as done whole. */
	if (length < t->length) {
		q->config.stats->short_copies++;
		t->must_fail = true;
	}
	q->config.stats->kernel_write_bytes += t->in_place ? 0 : length;
	t->copied = true;
	if (t->must_fail) {
		uq_finish(q, t, why_failed(q, t));
	} else if (q->config.zeros || t->memory) {
		uq_finish(q, t, (int)t->length);
	} else if (t->own_segment && uq_region_orphaned(q, t)) {
		if (uq_move(q, t, UQ_EV_RESCUE))
			need_buffer(q, t);
	} else if (uq_move(q, t, UQ_EV_COPIED)) {
		ready(q, t);
	}
}

/* The request has its buffer and its data, if any: it goes to the backend, or waits for one. */
static void ready(struct uq *q, struct uq_tag *t)
{
	if (t->must_fail || gives_up(q))
		uq_request_fail(q, t, why_failed(q, t));
	else if (may_pass(q, t))
		hand_over(q, t);
}

static void name_buffer(struct uq *q, struct uq_tag *t, struct wire_descriptor *d)
{
	/* With zero_copy the tag names the pages. */
	if (!uq_has_data(t) || q->config.zero_copy)
		return;
	if (t->in_place) {
		d->segment = WIRE_SEGMENT_CLIENTS + t->slice;
		d->buffer = t->client_buffer;
	} else if (t->own_segment) {
		d->segment = t->own_segment;
		d->buffer = t->own_buffer;
	} else if (t->slot != UQ_BUFFER_NONE) {
		d->segment = WIRE_SEGMENT_POOL;
		d->buffer = uq_slot_offset(q, t->slot);
	}
}

static void send(struct uq *q, struct uq_tag *t)
{
	struct wire_descriptor *d = uq_put(q, t, t->own_segment ? WIRE_DATA : WIRE_REQUEST);

	name_buffer(q, t, d);
	if (t->sent_to_backend) {
		d->flags |= WIRE_REPLAY;
		q->config.stats->replays++;
	}
}

static void hand_over(struct uq *q, struct uq_tag *t)
{
	bool lacks_buffer = t->op == WIRE_READ && t->slot == UQ_BUFFER_NONE && !t->in_place && !q->reads_own;

	if (lacks_buffer) {
		need_buffer(q, t);
		return;
	}
	if (!uq_move(q, t, UQ_EV_HAND_OVER))
		return;
	if (!t->sent_to_backend)
		t->handed_ns = q->now_ns;
	if (!uq_begins(q) || !uq_begin(q, t))
		send(q, t);
	t->sent_to_backend = true;
}

void uq_request_resume(struct uq *q, struct uq_tag *t)
{
	if (t->state == UQ_WAIT_LINK)
		ready(q, t);
	else if (t->state == UQ_WAIT_PLACE && may_pass(q, t))
		ask_place(q, t);
}

void uq_request_done(struct uq *q, struct uq_tag *t, int result, bool named, uint64_t buffer)
{
	/* The kernel sends a read again, for ever, if its commit moved no byte.  7.x completes a write, or any request
	 * in a client's registered buffer or with zero_copy, as done whole whatever its commit says
	 * (__ublk_complete_rq): a read committed short would show the client what its pages held before. */
	uint64_t needed = t->op == WIRE_WRITE || t->in_place ? t->length : t->op == WIRE_READ;

	uq_count_duration(q, UQ_LATENCY_BACKEND, t->handed_ns);
	/* Only after the answer was judged: the data of an unanswered write is rescued from its region. */
	if (t->op == WIRE_WRITE && t->own_segment)
		release_region(q, t);
	if (named)
		uq_region_take(q, t, buffer, t->length);
	uq_finish(q, t, result >= 0 && (uint64_t)result < needed ? -EIO : result);
}

/* The driver takes no commit of a write that waits for its data: the kernel copies it into scratch first. */
static void fail_uncopied(struct uq *q, struct uq_tag *t, int error)
{
	if (!uq_move(q, t, UQ_EV_FAIL_UNCOPIED))
		return;
	t->result = error;
	get_data(q, t, q->config.scratch);
}

void uq_request_fail(struct uq *q, struct uq_tag *t, int error)
{
	if (t->state == UQ_WAIT_BUFFER)
		uq_stock_forget(q, t);
	end_wait(q, t);
	if (waits_for_data(q, t))
		fail_uncopied(q, t, error);
	else
		uq_finish(q, t, error);
}

static void lose_serving(struct uq *q, struct uq_tag *t)
{
	if (t->must_fail) {
		uq_finish(q, t, why_failed(q, t));
	} else if (t->own_segment) {
		if (uq_move(q, t, UQ_EV_RESCUE))
			need_buffer(q, t);
	} else if (uq_move(q, t, UQ_EV_LINK_LOST)) {
		ready(q, t);
	}
}

void uq_request_lost(struct uq *q, struct uq_tag *t)
{
	if (t->state == UQ_SERVING) {
		lose_serving(q, t);
	} else if (t->state == UQ_WAIT_LINK && t->own_segment) {
		if (uq_move(q, t, UQ_EV_RESCUE))
			need_buffer(q, t);
	} else if (t->state == UQ_PLACING) {
		if (t->must_fail || q->giving_up)
			uq_request_fail(q, t, why_failed(q, t));
		else
			uq_move(q, t, UQ_EV_LINK_LOST);
	}
}

static void commit_taken(struct uq *q, struct uq_tag *t)
{
	q->config.stats->commits++;
	if (uq_move(q, t, UQ_EV_TAKEN))
		let_go(q, t);
}

void uq_commands_taken(struct uq *q, unsigned count)
{
	const struct uq_command *c;

	while (count-- && (c = uq_command_pop(q)))
		if (c->op == UQ_CMD_COMMIT)
			commit_taken(q, &q->tags[c->tag]);
	uq_check(q);
}

static void release_region(struct uq *q, struct uq_tag *t)
{
	if (uq_has_link(q) && !uq_region_orphaned(q, t)) {
		struct wire_descriptor *d = uq_put(q, t, WIRE_RELEASE);

		d->segment = t->own_segment;
		d->buffer = t->own_buffer;
	}
	uq_region_return(q, t);
}

/* Neither kernel nor backend uses the buffer any more: it goes back, and to the tag that has waited longest for one. */
static void let_go(struct uq *q, struct uq_tag *t)
{
	if (t->own_segment)
		release_region(q, t);
	if (q->config.need_get_data && t->slot != UQ_BUFFER_NONE) {
		uq_stock_return(q, t);
		serve_waiters(q, t->class);
	}
	t->memory = NULL;
	q->config.stats->in_flight--;
}

static void aborted(struct uq *q, struct uq_tag *t, int res)
{
	bool busy = t->state != UQ_KERNEL;

	if (!uq_move(q, t, UQ_EV_ABORTED))
		return;
	if (busy)
		let_go(q, t);
	if (res != -ENODEV && res != -ECANCELED)
		uq_fail_now(q, UQ_F_COMPLETION, uq_index(q, t), res);
	q->config.stats->tags_gone++;
	if (++q->gone == q->config.depth)
		q->attention |= UQ_ATT_GONE;
}

/* The driver could copy nothing and sends the write again, as a new request and perhaps on another tag: with an I/O
 * scheduler a requeued request gives its tag up. */
static void requeued(struct uq *q, struct uq_tag *t, int res)
{
	q->config.stats->requeues++;
	if (!uq_move(q, t, UQ_EV_REQUEUED))
		return;
	let_go(q, t);
	arrive(q, t, res);
}

/* The kernel copies for writes only: result 0 with another operation is the tag's next request. */
static bool was_copied(const struct uq *q, const struct uq_tag *t, int res)
{
	return res != RES_NEED_GET_DATA && uq_descriptor_is_write(q, t);
}

void uq_complete(struct uq *q, unsigned tag, int res)
{
	struct uq_tag *t = &q->tags[tag];

	if (tag >= q->config.depth)
		uq_fail_now(q, UQ_F_COMPLETION, tag, res);
	else if (res < 0)
		aborted(q, t, res);
	else if (t->state == UQ_KERNEL)
		arrive(q, t, res);
	else if (t->state != UQ_COPYING && t->state != UQ_FAILING)
		uq_fail_now(q, UQ_F_COMPLETION, tag, t->state << 8 | res);
	else if (!was_copied(q, t, res))
		requeued(q, t, res);
	else if (t->state == UQ_COPYING)
		copied(q, t);
	else
		uq_finish(q, t, t->result);
	uq_check(q);
}
