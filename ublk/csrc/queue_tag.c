/* A tag's transitions, commands for the kernel, descriptors for the backend.  See queue_types.h for the order of files.
 */
#include "queue_tag.h"

#include <string.h>

/* Next state plus one, so that what is not named is illegal. */
#define TO(state) ((state) + 1)
static const uint8_t transitions[UQ_STATES][UQ_EVENTS] = {
	[UQ_KERNEL] = {
		[UQ_EV_NEEDS_BUFFER] = TO(UQ_WAIT_BUFFER),
		[UQ_EV_NEEDS_PLACE] = TO(UQ_WAIT_PLACE),
		[UQ_EV_READY] = TO(UQ_WAIT_LINK),
		[UQ_EV_THROW_AWAY] = TO(UQ_COPYING),
		[UQ_EV_IN_PLACE] = TO(UQ_COPYING),
		[UQ_EV_FAIL_UNCOPIED] = TO(UQ_FAILING),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING),
		[UQ_EV_ABORTED] = TO(UQ_GONE),
		[UQ_EV_LIMITED] = TO(UQ_WAIT_LIMIT),
	},
	[UQ_WAIT_BUFFER] = {
		[UQ_EV_BUFFER_TO_COPY] = TO(UQ_COPYING),
		[UQ_EV_BUFFER_TO_SERVE] = TO(UQ_WAIT_LINK),
		[UQ_EV_FAIL_UNCOPIED] = TO(UQ_FAILING),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING),
	},
	[UQ_WAIT_PLACE] = {
		[UQ_EV_ASK] = TO(UQ_PLACING),
		[UQ_EV_POSTED] = TO(UQ_COPYING),
		[UQ_EV_FAIL_UNCOPIED] = TO(UQ_FAILING),
	},
	[UQ_PLACING] = {
		[UQ_EV_PLACED] = TO(UQ_COPYING),
		[UQ_EV_LINK_LOST] = TO(UQ_WAIT_PLACE),
		[UQ_EV_FAIL_UNCOPIED] = TO(UQ_FAILING),
	},
	[UQ_COPYING] = {
		[UQ_EV_COPIED] = TO(UQ_WAIT_LINK),
		[UQ_EV_RESCUE] = TO(UQ_WAIT_BUFFER),
		[UQ_EV_REQUEUED] = TO(UQ_KERNEL),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING),
		[UQ_EV_ABORTED] = TO(UQ_GONE),
	},
	[UQ_WAIT_LINK] = {
		[UQ_EV_HAND_OVER] = TO(UQ_SERVING),
		[UQ_EV_NEEDS_BUFFER] = TO(UQ_WAIT_BUFFER),
		[UQ_EV_RESCUE] = TO(UQ_WAIT_BUFFER),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING),
	},
	[UQ_SERVING] = {
		[UQ_EV_LINK_LOST] = TO(UQ_WAIT_LINK),
		[UQ_EV_RESCUE] = TO(UQ_WAIT_BUFFER),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING),
	},
	[UQ_FAILING] = {
		[UQ_EV_REQUEUED] = TO(UQ_KERNEL),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING),
		[UQ_EV_ABORTED] = TO(UQ_GONE),
	},
	[UQ_COMMITTING] = { [UQ_EV_TAKEN] = TO(UQ_KERNEL) },
	[UQ_GONE] = { 0 },
	[UQ_WAIT_LIMIT] = {
		[UQ_EV_NEEDS_BUFFER] = TO(UQ_WAIT_BUFFER),
		[UQ_EV_NEEDS_PLACE] = TO(UQ_WAIT_PLACE),
		[UQ_EV_READY] = TO(UQ_WAIT_LINK),
		[UQ_EV_THROW_AWAY] = TO(UQ_COPYING),
		[UQ_EV_IN_PLACE] = TO(UQ_COPYING),
		[UQ_EV_FAIL_UNCOPIED] = TO(UQ_FAILING),
		[UQ_EV_FINISH] = TO(UQ_COMMITTING),
	},
};

int uq_next_state(unsigned state, unsigned event)
{
	uint8_t next = state < UQ_STATES && event < UQ_EVENTS ? transitions[state][event] : 0;

	return (int)(next ? next - 1u : UQ_ILLEGAL);
}

void uq_fail_now(struct uq *q, unsigned fault, unsigned tag, int detail)
{
	if (!q->fault) {
		q->fault = (int)fault;
		q->fault_tag = tag;
		q->fault_detail = detail;
	}
	q->attention |= UQ_ATT_FAULT;
}

bool uq_move(struct uq *q, struct uq_tag *t, enum uq_event event)
{
	uint8_t next = transitions[t->state][event];

	if (!next) {
		uq_fail_now(q, UQ_F_TRANSITION, uq_index(q, t), t->state << 8 | (int)event);
		return false;
	}
	t->state = next - 1;
	return true;
}

void uq_command(struct uq *q, struct uq_tag *t, uint8_t op, int result, const uint8_t *address)
{
	unsigned at = (q->commands_first + q->commands_count) & q->commands_mask;

	if (q->commands_count > q->commands_mask) {
		uq_fail_now(q, UQ_F_OVERFLOW, uq_index(q, t), op);
		return;
	}
	q->commands_count++;
	q->commands[at] = (struct uq_command){
		.tag = (uint16_t)uq_index(q, t),
		.op = op,
		.result = result,
		.address = (uintptr_t)address,
	};
}

const struct uq_command *uq_command_pop(struct uq *q)
{
	const struct uq_command *first = &q->commands[q->commands_first];

	if (!q->commands_count)
		return NULL;
	q->commands_first = (q->commands_first + 1) & q->commands_mask;
	q->commands_count--;
	return first;
}

const struct uq_command *uq_command_at(const struct uq *q, unsigned place)
{
	return place < q->commands_count ? &q->commands[(q->commands_first + place) & q->commands_mask] : NULL;
}

unsigned uq_commands(struct uq *q, struct uq_command *out, unsigned max)
{
	unsigned count = q->commands_count < max ? q->commands_count : max;

	for (unsigned i = 0; i < count; i++)
		out[i] = *uq_command_at(q, i);
	return count;
}

static struct wire_descriptor *next_output(struct uq *q)
{
	if (q->output_first + q->output_count == q->output_max && q->output_first) {
		memmove(q->output, q->output + q->output_first, q->output_count * sizeof *q->output);
		q->output_first = 0;
	}
	/* Unsent are at most a RELEASE and the descriptor after it for each tag, unless the backend answers requests
	 * that have not been sent. */
	if (q->output_first + q->output_count == q->output_max) {
		q->output_overflowed = true;
		return &q->output[q->output_max];
	}
	return &q->output[q->output_first + q->output_count++];
}

struct wire_descriptor *uq_put(struct uq *q, const struct uq_tag *t, uint8_t kind)
{
	struct wire_descriptor *d = next_output(q);

	*d = (struct wire_descriptor){
		.kind = kind,
		.op = t->op,
		.flags = t->flags,
		.device = q->config.device,
		.queue = q->config.queue,
		.tag = (uint16_t)uq_index(q, t),
		.epoch = q->config.epoch,
		.sequence = t->sequence,
		.offset = t->offset,
		.length = t->length,
	};
	return d;
}

void uq_put_link(struct uq *q, uint8_t kind)
{
	*next_output(q) = (struct wire_descriptor){
		.kind = kind, .device = q->config.device, .queue = q->config.queue, .epoch = q->config.epoch
	};
}

void uq_output_clear(struct uq *q)
{
	q->output_first = q->output_count = 0;
	q->output_overflowed = false;
}

unsigned uq_output(struct uq *q, const struct wire_descriptor **first)
{
	*first = q->output + q->output_first;
	return q->output_overflowed ? 0 : q->output_count;
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

int uq_fault(const struct uq *q, unsigned *tag, int *detail)
{
	*tag = q->fault_tag;
	*detail = q->fault_detail;
	return q->fault;
}

unsigned uq_in_flight(const struct uq *q) { return (unsigned)q->config.stats->in_flight; }

int uq_tag_state(const struct uq *q, unsigned tag) { return tag < q->config.depth ? q->tags[tag].state : -1; }

unsigned uq_queue_number(const struct uq *q) { return q->config.queue; }

int uq_is_zero_copy(const struct uq *q) { return q->config.zero_copy; }

struct uq_stats *uq_stats_of(struct uq *q) { return q->config.stats; }
