/* Regions of the backend's segment: named for a tag and lent until they are released, or posted ahead, where writes
 * land without a question.  See queue_core.h for the contract. */
#include "queue_internal.h"

#include <stdlib.h>
#include <string.h>

struct uq_segment *uq_find_segment(const struct uq *q, uint32_t number)
{
	for (unsigned i = 0; number && i < UQ_SEGMENTS_MAX; i++)
		if (q->segments[i].number == number)
			return (struct uq_segment *)&q->segments[i];
	return NULL;
}

void uq_region_take(struct uq *q, struct uq_tag *t, uint64_t buffer, uint64_t bytes)
{
	t->own_segment = q->own_segment;
	t->own_buffer = buffer;
	t->own_bytes = bytes;
	uq_find_segment(q, q->own_segment)->data_tags++;
	if (t->op == WIRE_WRITE)
		blocks_set(&q->occupied, buffer, bytes);
}

uint8_t *uq_region_address(const struct uq *q, const struct uq_tag *t)
{
	return uq_find_segment(q, t->own_segment)->base + t->own_buffer;
}

bool uq_region_orphaned(const struct uq *q, const struct uq_tag *t)
{
	return !uq_find_segment(q, t->own_segment)->live;
}

void uq_region_back(struct uq *q, struct uq_tag *t, bool tell)
{
	struct uq_segment *s = uq_find_segment(q, t->own_segment);
	struct wire_descriptor *d;

	s->data_tags--;
	if (s->live && t->op == WIRE_WRITE)
		blocks_clear(&q->occupied, t->own_buffer, t->own_bytes);
	if (tell && s->live && q->link == UQ_LINK_UP) {
		d = uq_put(q, t, WIRE_RELEASE);
		if (d) {
			d->segment = t->own_segment;
			d->buffer = t->own_buffer;
		}
	}
	t->own_segment = 0;
}

bool uq_region_occupied(const struct uq *q, uint64_t start, uint64_t length)
{
	return blocks_any(&q->occupied, start, length);
}

bool uq_regions_begin(struct uq *q, uint64_t segment_bytes) { return blocks_open(&q->occupied, segment_bytes); }

void uq_regions_end(struct uq *q)
{
	blocks_close(&q->occupied);
	uq_posts_forget(q);
}

int uq_judge_region(const struct uq *q, const struct wire_descriptor *d, uint64_t length)
{
	const struct uq_segment *s = uq_find_segment(q, q->own_segment);

	if (!s || d->segment != q->own_segment)
		return UQ_V_SEGMENT;
	if (d->buffer > s->bytes || length > s->bytes - d->buffer)
		return UQ_V_RANGE;
	return d->buffer % q->config.block_bytes ? UQ_V_ALIGNMENT : UQ_V_NONE;
}

bool uq_posts_allocate(struct uq *q)
{
	if (!q->config.place_in_backend)
		return true;
	for (unsigned c = 0; c < q->config.classes; c++) {
		q->posts[c].starts = calloc(q->config.depth, sizeof(uint64_t));
		if (!q->posts[c].starts)
			return false;
	}
	return true;
}

void uq_posts_free(struct uq *q)
{
	for (unsigned c = 0; c < q->config.classes; c++)
		free(q->posts[c].starts);
}

void uq_posts_forget(struct uq *q)
{
	for (unsigned c = 0; c < q->config.classes; c++)
		q->posts[c].count = 0;
}

/* Keep what a POST says, or the violation that it is. */
int uq_post_add(struct uq *q, const struct wire_descriptor *d)
{
	unsigned c = 0;
	int wrong;

	while (c < q->config.classes && q->config.class[c].buffer_bytes != d->length)
		c++;
	if (!q->config.place_in_backend || c == q->config.classes || q->posts[c].count == q->config.depth)
		return UQ_V_POST;
	wrong = uq_judge_region(q, d, d->length);
	if (wrong)
		return wrong;
	if (uq_region_occupied(q, d->buffer, d->length))
		return UQ_V_LENT;
	blocks_set(&q->occupied, d->buffer, d->length);
	q->posts[c].starts[q->posts[c].count++] = d->buffer;
	q->config.stats->posts++;
	return UQ_V_NONE;
}

/* The smallest that holds `length` bytes; false if none does. */
bool uq_post_take(struct uq *q, uint64_t length, uint64_t *buffer, uint64_t *bytes)
{
	for (unsigned c = uq_class_for(q, length); c < q->config.classes; c++) {
		struct uq_posts *p = &q->posts[c];

		if (!p->count)
			continue;
		*buffer = p->starts[--p->count];
		*bytes = q->config.class[c].buffer_bytes;
		q->config.stats->posts_used++;
		return true;
	}
	return false;
}
