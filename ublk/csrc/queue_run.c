/*
 * An engine whose storage needs no I/O does without descriptors and without buffers of the pool: it names the memory in
 * which a read's data lies, or into which the driver copies a write's data, and with that copy the write is done.
 *
 * Requests of one queue that overlap need no order among them: the driver copies only in the io_uring_enter of this
 * queue's task, one request at a time.
 *
 * What comes while the queue has no link, or is held, takes the road of any other request (queue_request.c), by
 * descriptors.
 */
#include "queue_run.h"

#include "queue_finish.h"
#include "queue_tag.h"

void uq_run_begin(struct uq *q, const struct engine_calls *calls, struct engine *engine)
{
	/* Without NEED_GET_DATA the driver copies a write before it announces it. */
	if (!q->config.need_get_data)
		return;
	q->calls = calls;
	q->engine = engine;
}

int uq_run(struct uq *q, struct uq_tag *t)
{
	uint8_t *memory = NULL;
	int32_t result = q->calls->run(q->engine, t->op, t->offset, t->length, &memory);

	uq_count_duration(q, UQ_LATENCY_BACKEND, q->now_ns);
	if (result < 0)
		return result;
	if (t->op == WIRE_READ || t->op == WIRE_WRITE)
		t->memory = memory ? memory : q->config.scratch;
	if (t->op != WIRE_WRITE)
		uq_finish(q, t, result);
	else if (uq_move(q, t, UQ_EV_IN_PLACE))
		uq_command(q, t, UQ_CMD_GET_DATA, 0, t->memory);
	return 0;
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
