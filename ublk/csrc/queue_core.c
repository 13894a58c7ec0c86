/* Making, starting and freeing a queue, and what it wants of its owner.  See queue_types.h for the order of files. */
#include "queue_types.h"

#include <stdlib.h>

#include "queue_check.h"
#include "queue_limit.h"
#include "queue_link.h"
#include "queue_region.h"
#include "queue_stock.h"
#include "queue_tag.h"

/* The backend has no request, and none that waits has its data in the backend's memory. */
static bool is_quiet(const struct uq *q)
{
	for (unsigned i = 0; i < q->config.depth; i++) {
		const struct uq_tag *t = &q->tags[i];
		bool is_in_its_memory = (t->own_segment && t->own_segment == q->own_segment) || t->memory;

		if (t->state == UQ_PLACING || t->state == UQ_SERVING || is_in_its_memory)
			return false;
	}
	return !q->flush_sequence;
}

unsigned uq_attention(struct uq *q)
{
	uq_link_settle(q);
	if (q->held && !q->quiet && is_quiet(q)) {
		q->quiet = true;
		q->attention |= UQ_ATT_QUIET;
	}
	return q->attention | (q->output_count && !q->output_held ? UQ_ATT_OUTPUT : 0) |
	       (uq_stock_wanting(q) ? UQ_ATT_STOCK : 0);
}

void uq_attention_clear(struct uq *q, unsigned bits) { q->attention &= ~bits; }

int uq_commit_is_awaited(struct uq *q)
{
	unsigned commits = 0, regions = 0;

	if (!uq_stock_short(q) && !q->regions)
		return 0;
	for (unsigned i = 0; i < q->commands_count; i++) {
		const struct uq_command *c = &q->commands[(q->commands_first + i) & q->commands_mask];

		commits += c->op == UQ_CMD_COMMIT;
		regions += c->op == UQ_CMD_COMMIT && q->tags[c->tag].own_segment;
	}
	/* The backend may hold its requests until it has a region back. */
	return commits && (uq_stock_short(q) || (regions && q->config.stats->in_flight > commits));
}

static bool usable(const struct uq_config *c)
{
	return c->depth && c->depth <= 4096 && c->classes && c->classes <= UQ_CLASSES_MAX && c->block_bytes >= 512 &&
	       c->descriptors && c->pool && c->slots && c->scratch && c->stats && c->latencies &&
	       c->class[c->classes - 1].buffer_bytes >= c->max_io_bytes &&
	       (c->need_get_data ? !c->zero_copy : !c->place_in_backend && !c->zeros);
}

static bool allocate(struct uq *q)
{
	unsigned depth = q->config.depth, room = 1, sizes = q->config.place_in_backend ? q->config.classes : 0;

	while (room < depth)
		room *= 2;
	q->commands_mask = room - 1;
	/* A write that the driver sends again releases a posted region each time. */
	q->output_max = (4 + sizes) * depth + 16;
	q->tags = calloc(depth, sizeof *q->tags);
	q->commands = calloc(room, sizeof *q->commands);
	q->output = calloc(q->output_max + 1, sizeof *q->output);
	q->replay = calloc(depth, sizeof *q->replay);
	return q->tags && q->commands && q->output && q->replay && uq_stock_allocate(q) && uq_regions_allocate(q);
}

/* Counters go on over a recovery; the broker has taken back what an earlier worker held. */
static void reset_gauges(struct uq_stats *s)
{
	s->in_flight = s->buffers_held = s->buffers_lent = s->buffers_waiting = s->tags_gone = s->limit_waiting = 0;
	s->returned_total = s->lent_total;
}

struct uq *uq_new(const struct uq_config *config)
{
	struct uq *q = usable(config) ? calloc(1, sizeof *q) : NULL;

	if (!q)
		return NULL;
	q->config = *config;
	if (!q->config.limits)
		q->config.limits = &q->no_limits;
	if (!allocate(q)) {
		uq_free(q);
		return NULL;
	}
	for (unsigned i = 0; i < config->depth; i++)
		q->tags[i] = (struct uq_tag){ .slot = UQ_BUFFER_NONE, .next_waiter = UQ_NO_TAG };
	uq_limit_begin(q);
	reset_gauges(config->stats);
	uq_check_begin(q);
	return q;
}

int uq_start(struct uq *q)
{
	unsigned class = uq_class_for(q, q->config.max_io_bytes);
	bool lends = !q->config.need_get_data && !q->config.zero_copy;

	if (lends && q->stock[class].count < q->config.depth)
		return -1;
	for (unsigned i = 0; i < q->config.depth; i++) {
		struct uq_tag *t = &q->tags[i];

		t->class = (uint8_t)class;
		if (lends && !uq_stock_lend(q, t))
			return -1;
		uq_command(q, t, UQ_CMD_FETCH, 0, t->slot == UQ_BUFFER_NONE ? NULL : uq_slot_address(q, t->slot));
	}
	return 0;
}

void uq_free(struct uq *q)
{
	if (!q)
		return;
	uq_stock_free(q);
	uq_regions_free(q);
	free(q->tags);
	free(q->commands);
	free(q->output);
	free(q->replay);
	free(q);
}
