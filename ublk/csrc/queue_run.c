/*
 * An engine in this process gets requests without descriptors.
 *
 * One whose storage needs no I/O runs a request within the call, and without a buffer of the pool: it names the memory
 * in which a read's data lies, or into which the driver copies a write's data, and with that copy the write is done.
 * Requests of one queue that overlap need no order among them: the driver copies only in the io_uring_enter of this
 * queue's task, one request at a time.  What comes while the queue has no link, or is held, takes the road of any other
 * request (queue_request.c), by descriptors.
 *
 * Any other takes a request at the end of that road, in place of a descriptor, and finishes it later.
 */
#include "queue_run.h"

#include "queue_finish.h"
#include "queue_stock.h"
#include "queue_tag.h"

void uq_run_begin(struct uq *q, const struct engine_calls *calls, struct engine *engine)
{
	q->calls = calls;
	q->engine = engine;
	/* Without NEED_GET_DATA the driver copies a write before it announces it. */
	q->runs = calls->can_run(engine) && q->config.need_get_data;
	q->begins = !q->runs && calls->can_begin(engine);
}

int uq_run(struct uq *q, struct uq_tag *t)
{
	uint8_t *memory = NULL;
	int32_t result = q->calls->run(q->engine, t->op, t->offset, t->length, &memory);

	uq_count_duration(q, UQ_LATENCY_BACKEND, q->now_ns);
	if (result < 0)
		return result;
	if (uq_has_data(t))
		t->memory = memory ? memory : q->config.scratch;
	if (t->op != WIRE_WRITE)
		uq_finish(q, t, result);
	else if (uq_move(q, t, UQ_EV_IN_PLACE))
		uq_command(q, t, UQ_CMD_GET_DATA, 0, t->memory);
	return 0;
}

bool uq_begin(struct uq *q, const struct uq_tag *t)
{
	bool in_buffer = uq_has_data(t) && !q->config.zero_copy;

	/* Only the engine knows the address of other memory. */
	if (in_buffer && (t->in_place || t->slot == UQ_BUFFER_NONE))
		return false;

	const struct engine_request request = {
		.sequence = t->sequence,
		.offset = t->offset,
		.length = t->length,
		.memory = in_buffer ? uq_slot_address(q, t->slot) : NULL,
		.tag = (uint16_t)uq_index(q, t),
		.flags = t->flags,
		.op = t->op,
	};

	q->calls->begin(q->engine, &request);
	return true;
}

void uq_answer_alone(struct uq *q, struct uq_tag *t)
{
	if (t->op == WIRE_READ)
		uq_finish(q, t, (int)t->length);
	else if (t->op != WIRE_WRITE)
		uq_finish(q, t, 0);
	else if (uq_move(q, t, UQ_EV_THROW_AWAY))
		uq_command(q, t, UQ_CMD_GET_DATA, 0, q->config.scratch);
}
