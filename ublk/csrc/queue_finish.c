#include "queue_finish.h"

#include "queue_region.h"
#include "queue_stock.h"
#include "queue_tag.h"

void uq_count_duration(struct uq *q, enum uq_latency which, uint64_t since_ns)
{
	uq_histogram_add(&q->config.latencies->of[which], since_ns, q->now_ns);
}

/* A read must name an address even to fail; with need_get_data off the commit also lends the next request's buffer.
 * With zero_copy there is none, and the driver refuses an address. */
static const uint8_t *commit_address(const struct uq *q, const struct uq_tag *t)
{
	if (q->config.zero_copy)
		return NULL;
	if (t->op == WIRE_READ && t->memory)
		return t->memory;
	if (t->op == WIRE_READ && t->own_segment)
		return uq_region_address(q, t);
	if (t->slot != UQ_BUFFER_NONE && (t->op == WIRE_READ || !q->config.need_get_data))
		return uq_slot_address(q, t->slot);
	if (t->op != WIRE_READ)
		return NULL;
	return q->config.zeros ? q->config.zeros : q->config.scratch;
}

static enum uq_latency latency_of(const struct uq_tag *t)
{
	return t->op == WIRE_READ ? UQ_LATENCY_READ : t->op == WIRE_WRITE ? UQ_LATENCY_WRITE : UQ_LATENCY_OTHER;
}

static void count_result(struct uq *q, const struct uq_tag *t)
{
	struct uq_stats *s = q->config.stats;

	if (t->op >= UQ_OPS)
		return;
	s->requests[t->op]++;
	uq_count_duration(q, latency_of(t), t->arrived_ns);
	if (t->result < 0) {
		s->errors++;
		s->failed[t->op]++;
		return;
	}
	s->bytes[t->op] += t->op == WIRE_READ || t->op == WIRE_WRITE ? (uint64_t)t->result : t->length;
	if (t->in_place) {
		s->zero_copies++;
		s->zero_copy_bytes += (uint64_t)t->result;
	} else if (t->op == WIRE_READ) {
		s->kernel_read_bytes += (uint64_t)t->result;
	}
}

void uq_finish(struct uq *q, struct uq_tag *t, int result)
{
	if (!uq_move(q, t, UQ_EV_FINISH))
		return;
	t->result = result;
	count_result(q, t);
	uq_command(q, t, UQ_CMD_COMMIT, result, commit_address(q, t));
}
