/* See queue_inside.h. */
#include "queue_inside.h"

#include <stdbool.h>
#include <string.h>

#include "queue_link.h"
#include "queue_run.h"

/* Descriptors that travel at once. */
#define BATCH_MAX 64u
#define ENGINE_QUEUE 0u

static unsigned copy_for(uint16_t queue, struct wire_descriptor *to, const struct wire_descriptor *from, unsigned count)
{
	unsigned taken = count < BATCH_MAX ? count : BATCH_MAX;

	memcpy(to, from, taken * sizeof *to);
	for (unsigned i = 0; i < taken; i++)
		to[i].queue = queue;
	return taken;
}

/* Whether there was anything. */
static bool hand_over(struct uq *q, const struct engine_calls *calls, struct engine *engine)
{
	struct wire_descriptor batch[BATCH_MAX];
	const struct wire_descriptor *first;
	unsigned count = uq_output(q, &first);

	if (!count)
		return false;
	count = copy_for(ENGINE_QUEUE, batch, first, count);
	uq_output_sent(q, count);
	if (calls->take(engine, batch, count))
		uq_link_cut(q, UQ_V_ENGINE);
	return true;
}

static bool take_back(struct uq *q, const struct engine_calls *calls, struct engine *engine)
{
	struct wire_descriptor batch[BATCH_MAX];
	const struct wire_descriptor *first;
	unsigned count = calls->answers(engine, ENGINE_QUEUE, &first);

	if (!count)
		return false;
	count = copy_for((uint16_t)uq_queue_number(q), batch, first, count);
	calls->answers_sent(engine, ENGINE_QUEUE, count);
	uq_input(q, batch, count * sizeof *batch);
	return true;
}

/* What has become of the requests that the engine was given without a descriptor. */
static bool take_results(struct uq *q, const struct engine_calls *calls, struct engine *engine)
{
	const struct engine_result *first;
	unsigned count = calls->results(engine, &first);

	for (unsigned i = 0; i < count && uq_link_talks(q); i++)
		uq_link_ended(q, first + i);
	return count;
}

void uq_inside_begin(struct uq *q, const struct engine_calls *calls, struct engine *engine)
{
	uq_run_begin(q, calls, engine);
}

int uq_inside_is_idle(const struct uq *q) { return uq_runs(q) && !q->output_count; }

void uq_inside_turn(struct uq *q, const struct engine_calls *calls, struct engine *engine)
{
	bool moved = true;

	while (moved && uq_link_talks(q)) {
		moved = hand_over(q, calls, engine);
		moved |= take_back(q, calls, engine);
		if (uq_begins(q))
			moved |= take_results(q, calls, engine);
		if (calls->error(engine))
			uq_link_cut(q, UQ_V_ENGINE);
	}
}
