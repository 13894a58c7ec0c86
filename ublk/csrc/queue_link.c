/* The link to the backend: descriptors out, answers in and judged. */
#include "queue_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define ERRNO_MAX 4095
/* An honest backend answers late what workers before this one had asked: at most a depth for each of their lives, of
 * which there are few in a row.  What it posted to them may come as late: a depth of each size. */
#define STALE_PER_TAG 8u
#define STALE_MORE 64u

struct wire_descriptor *uq_put(struct uq *q, struct uq_tag *t, uint8_t kind)
{
	struct wire_descriptor *d;

	if (q->output_first + q->output_count == q->output_max && q->output_first) {
		memmove(q->output, q->output + q->output_first, q->output_count * sizeof *q->output);
		q->output_first = 0;
	}
	/* Unsent can be a RELEASE and what follows it, for each tag; more only if answers come to what was not sent. */
	if (q->output_first + q->output_count == q->output_max) {
		uq_link_cut(q, UQ_V_UNEXPECTED);
		return NULL;
	}
	d = &q->output[q->output_first + q->output_count++];
	*d = (struct wire_descriptor){
		.kind = kind, .op = t->op, .flags = t->flags, .device = q->config.device, .queue = q->config.queue,
		.tag = (uint16_t)uq_index(q, t), .epoch = q->config.epoch, .sequence = t->sequence,
		.offset = t->offset, .length = t->length };
	return d;
}

static void name_buffer(struct uq *q, struct uq_tag *t, struct wire_descriptor *d)
{
	if (t->op != WIRE_READ && t->op != WIRE_WRITE)
		return;
	if (t->in_place) {
		d->segment = WIRE_SEGMENT_CLIENTS + t->slice;
		d->buffer = t->client_buffer;
	} else if (t->own_segment) {
		d->segment = t->own_segment;
		d->buffer = t->own_buffer;
	} else if (t->slot != UQ_BUFFER_NONE) {
		d->segment = 1;
		d->buffer = uq_slot_offset(q, t->slot);
	}
}

void uq_hand_over(struct uq *q, struct uq_tag *t)
{
	bool lacks_buffer = t->op == WIRE_READ && t->slot == UQ_BUFFER_NONE && !t->in_place && !q->reads_own;
	struct wire_descriptor *d;

	if (lacks_buffer) {
		uq_need_buffer(q, t);
		return;
	}
	if (!uq_move(q, t, UQ_EV_HAND_OVER))
		return;
	d = uq_put(q, t, t->own_segment ? WIRE_DATA : WIRE_REQUEST);
	if (!d)
		return;
	name_buffer(q, t, d);
	if (t->given) {
		d->flags |= WIRE_REPLAY;
		q->config.stats->replays++;
	}
	t->given = true;
}

static void copy_to_region(struct uq *q, struct uq_tag *t, enum uq_event event, uint64_t buffer, uint64_t bytes)
{
	if (!uq_move(q, t, event))
		return;
	uq_region_take(q, t, buffer, bytes);
	uq_get_data(q, t, uq_region_address(q, t));
}

/* Without a question if something is posted that fits. */
void uq_ask_place(struct uq *q, struct uq_tag *t)
{
	uint64_t buffer, bytes;

	if (uq_post_take(q, t->length, &buffer, &bytes))
		copy_to_region(q, t, UQ_EV_POSTED, buffer, bytes);
	else if (uq_move(q, t, UQ_EV_ASK))
		uq_put(q, t, WIRE_PLACE);
}

unsigned uq_output(struct uq *q, const struct wire_descriptor **first)
{
	*first = q->output + q->output_first;
	return q->output_count;
}

void uq_output_sent(struct uq *q, unsigned count)
{
	if (count > q->output_count)
		count = q->output_count;
	q->config.stats->descriptors_out += count;
	q->output_first += count;
	q->output_count -= count;
	if (!q->output_count)
		q->output_first = 0;
}

void uq_output_hold(struct uq *q, int hold) { q->output_held = hold; }

static void violate(struct uq *q, int violation, const struct wire_descriptor *d)
{
	if (d)
		q->culprit = *d;
	else
		memset(&q->culprit, 0, sizeof q->culprit);
	uq_link_cut(q, violation);
}

/* Dropped and counted, but not without end: judging them costs the worker its time. */
static void stale(struct uq *q, const struct wire_descriptor *d)
{
	unsigned sizes = q->config.place_in_backend ? q->config.classes : 0;

	q->config.stats->stale_answers++;
	if (++q->stale > STALE_PER_TAG * (1 + sizes) * q->config.depth + STALE_MORE)
		violate(q, UQ_V_FLOOD, d);
}

static void answer_placed(struct uq *q, struct uq_tag *t, const struct wire_descriptor *d)
{
	int wrong = uq_judge_region(q, d, t->length);

	if (!wrong && uq_region_occupied(q, d->buffer, t->length))
		wrong = UQ_V_LENT;
	if (wrong) {
		uq_fail(q, t, -EIO);
		violate(q, wrong, d);
		return;
	}
	copy_to_region(q, t, UQ_EV_PLACED, d->buffer, t->length);
}

static void answer_reject(struct uq *q, struct uq_tag *t, const struct wire_descriptor *d)
{
	bool is_errno = d->result < 0 && d->result >= -ERRNO_MAX;

	uq_fail(q, t, is_errno ? d->result : -EIO);
	if (!is_errno)
		violate(q, UQ_V_RESULT, d);
}

static int judge_done(const struct uq *q, const struct uq_tag *t, const struct wire_descriptor *d)
{
	bool moves = t->op == WIRE_READ || t->op == WIRE_WRITE;

	if (d->result < -ERRNO_MAX)
		return UQ_V_RESULT;
	if (d->result <= 0)
		return UQ_V_NONE;
	if (!moves || (uint64_t)d->result > t->length || (uint32_t)d->result % q->config.block_bytes)
		return UQ_V_RESULT;
	if (t->op == WIRE_READ && d->flags & WIRE_REGION) /* of one in place the kernel would copy nothing */
		return q->config.need_get_data && !t->in_place ? uq_judge_region(q, d, t->length) : UQ_V_REGION;
	return t->op == WIRE_READ && t->slot == UQ_BUFFER_NONE && !t->in_place ? UQ_V_REGION : UQ_V_NONE;
}

static void answer_done(struct uq *q, struct uq_tag *t, const struct wire_descriptor *d)
{
	/* Moving no byte of a read would make the kernel send it again, for ever; and 7.x tells the client that a write
	 * was done whole, whatever its commit says; so it does of what lies in place (__ublk_complete_rq). */
	uint64_t needed = t->op == WIRE_WRITE || t->in_place ? t->length : t->op == WIRE_READ;
	int wrong = judge_done(q, t, d);

	if (wrong) {
		t->doomed = true;
		violate(q, wrong, d);
		return;
	}
	/* Only now: the data of a DONE that is never read is taken from the region, see lose_serving(). */
	if (t->op == WIRE_WRITE && t->own_segment)
		uq_region_back(q, t, true);
	if (t->op == WIRE_READ && d->result > 0 && d->flags & WIRE_REGION)
		uq_region_take(q, t, d->buffer, t->length);
	uq_finish(q, t, d->result >= 0 && (uint64_t)d->result < needed ? -EIO : d->result);
}

static int compare_sequence(const void *a, const void *b, void *context)
{
	const struct uq *q = context;
	uint64_t x = q->tags[*(const uint16_t *)a].sequence, y = q->tags[*(const uint16_t *)b].sequence;

	return x < y ? -1 : x > y;
}

static bool waits_for_link(const struct uq_tag *t) { return t->state == UQ_WAIT_LINK || t->state == UQ_WAIT_PLACE; }

/* What no backend has answered goes to this one, in the order in which it came. */
static void hand_over_waiting(struct uq *q)
{
	unsigned count = 0;

	for (unsigned i = 0; i < q->config.depth; i++)
		if (waits_for_link(&q->tags[i]))
			q->replay[count++] = (uint16_t)i;
	qsort_r(q->replay, count, sizeof *q->replay, compare_sequence, q);
	for (unsigned i = 0; i < count; i++) {
		struct uq_tag *t = &q->tags[q->replay[i]];

		if (t->state == UQ_WAIT_LINK)
			uq_ready(q, t);
		else if (t->state == UQ_WAIT_PLACE)
			uq_ask_place(q, t);
	}
}

/* A descriptor about the link, of no request. */
static void say(struct uq *q, uint8_t kind)
{
	struct wire_descriptor *d = uq_put(q, &q->tags[0], kind);

	if (d)
		*d = (struct wire_descriptor){ .kind = kind, .device = q->config.device, .queue = q->config.queue,
					     .epoch = q->config.epoch };
}

static void link_up(struct uq *q)
{
	q->link = UQ_LINK_UP;
	q->attention |= UQ_ATT_LINK;
	hand_over_waiting(q);
}

static void hello(struct uq *q, const struct wire_descriptor *d)
{
	bool is_second = q->link != UQ_LINK_EXPECTED;

	/* Said to a worker that died at once, it may still lie in the transport and come before the one meant for us. */
	if (is_second && d->epoch < q->config.epoch)
		stale(q, d);
	else if (is_second)
		violate(q, UQ_V_UNEXPECTED, d);
	if (is_second)
		return;
	say(q, WIRE_WELCOME);
	if (q->fence) {
		q->link = UQ_LINK_FENCING;
		say(q, WIRE_FENCE);
	} else {
		link_up(q);
	}
}

static void fenced(struct uq *q, const struct wire_descriptor *d)
{
	if (q->link == UQ_LINK_FENCING && d->epoch == q->config.epoch)
		link_up(q);
	else if (d->epoch < q->config.epoch) /* the fence of a worker that died before it was confirmed */
		stale(q, d);
	else
		violate(q, UQ_V_UNEXPECTED, d);
}

/* While it is fenced too: it posts to this epoch from its first word on. */
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
	else if (is_stale(q, d)) /* perhaps sent to the worker before this one, before any HELLO */
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

	if (q->link == UQ_LINK_NONE || q->link == UQ_LINK_CUT)
		return;
	if (!bytes || bytes % sizeof d || bytes / sizeof d > 4096) {
		violate(q, UQ_V_FRAME, NULL);
		return;
	}
	/* Copied before it is judged: a frame may lie in memory that its sender can still write. */
	for (; bytes && q->link != UQ_LINK_CUT; bytes -= sizeof d, at += sizeof d) {
		memcpy(&d, at, sizeof d);
		q->config.stats->descriptors_in++;
		receive(q, &d);
	}
}

int uq_link_expect(struct uq *q, uint32_t segment, uint8_t *base, uint64_t bytes, int reads_own, int fence)
{
	struct uq_segment *s = NULL;

	for (unsigned i = 0; segment && !s && i < UQ_SEGMENTS_MAX; i++)
		if (!q->segments[i].number)
			s = &q->segments[i];
	if (q->link != UQ_LINK_NONE || (segment && !s))
		return -EBUSY;
	if (segment && !uq_regions_begin(q, bytes))
		return -ENOMEM;
	if (segment)
		*s = (struct uq_segment){ .base = base, .bytes = bytes, .number = segment, .live = true };
	q->own_segment = segment;
	q->reads_own = reads_own && segment;
	q->fence = fence;
	q->link = UQ_LINK_EXPECTED;
	q->expected_ms = q->now_ms;
	q->stale = 0;
	q->giving_up = q->is_absent = false;
	q->violation = UQ_V_NONE;
	memset(&q->culprit, 0, sizeof q->culprit);
	return 0;
}

void uq_link_cut(struct uq *q, int violation)
{
	if (q->link == UQ_LINK_NONE || q->link == UQ_LINK_CUT)
		return;
	q->link = UQ_LINK_CUT;
	q->violation = violation;
	q->output_first = q->output_count = 0;
	uq_posts_forget(q);
	q->config.stats->violations += violation != UQ_V_NONE;
	q->attention |= UQ_ATT_CUT;
}

void uq_link_hung_up(struct uq *q)
{
	if (q->link != UQ_LINK_UP && q->link != UQ_LINK_FENCING)
		return;
	q->config.stats->hangups++;
	uq_link_cut(q, UQ_V_NONE);
}

void uq_pool_damaged(struct uq *q)
{
	for (unsigned i = 0; i < q->config.depth; i++) {
		struct uq_tag *t = &q->tags[i];
		bool has_data = t->slot != UQ_BUFFER_NONE && t->op == WIRE_WRITE && !t->in_place;

		if (has_data && t->state == UQ_WAIT_LINK)
			uq_fail(q, t, -EIO);
		else if (has_data && (t->state == UQ_SERVING || t->state == UQ_COPYING))
			t->doomed = true;
	}
	uq_link_cut(q, UQ_V_POOL);
}

static void lose_serving(struct uq *q, struct uq_tag *t)
{
	if (t->doomed)
		uq_finish(q, t, -EIO);
	else if (t->own_segment) {
		if (uq_move(q, t, UQ_EV_RESCUE))
			uq_need_buffer(q, t);
	} else if (uq_move(q, t, UQ_EV_LINK_LOST)) {
		uq_ready(q, t);
	}
}

static void lose(struct uq *q, struct uq_tag *t)
{
	if (t->state == UQ_SERVING) {
		lose_serving(q, t);
	} else if (t->state == UQ_WAIT_LINK && t->own_segment) {
		if (uq_move(q, t, UQ_EV_RESCUE))
			uq_need_buffer(q, t);
	} else if (t->state == UQ_PLACING) {
		if (t->doomed || q->giving_up)
			uq_fail(q, t, -EIO);
		else
			uq_move(q, t, UQ_EV_LINK_LOST);
	}
}

void uq_link_lost(struct uq *q)
{
	struct uq_segment *s = uq_find_segment(q, q->own_segment);

	if (q->link == UQ_LINK_NONE)
		return;
	q->link = UQ_LINK_NONE;
	q->output_first = q->output_count = 0;
	uq_regions_end(q);
	if (s)
		s->live = false;
	q->own_segment = 0;
	q->reads_own = false;
	for (unsigned i = 0; i < q->config.depth; i++)
		lose(q, &q->tags[i]);
	if (q->giving_up)
		uq_give_up(q);
}

int uq_link_state(const struct uq *q) { return q->link; }

uint32_t uq_segment_idle(struct uq *q, uint8_t **base, uint64_t *bytes)
{
	for (unsigned i = 0; i < UQ_SEGMENTS_MAX; i++) {
		struct uq_segment *s = &q->segments[i];
		uint32_t number = s->number;

		if (number && !s->live && !s->data_tags) {
			*base = s->base;
			*bytes = s->bytes;
			s->number = 0;
			return number;
		}
	}
	return 0;
}

int uq_violation(const struct uq *q, struct wire_descriptor *culprit)
{
	*culprit = q->culprit;
	return q->violation;
}
