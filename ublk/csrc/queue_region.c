/* Regions of backends' segments.  See queue_types.h for the order of files. */
#include "queue_region.h"

#include <errno.h>
#include <stdlib.h>

#include "queue_stock.h"

static struct uq_segment *find_segment(const struct uq *q, uint32_t number)
{
	for (unsigned i = 0; number && i < UQ_SEGMENTS_MAX; i++)
		if (q->segments[i].number == number)
			return (struct uq_segment *)&q->segments[i];
	return NULL;
}

static struct uq_segment *free_segment(struct uq *q)
{
	for (unsigned i = 0; i < UQ_SEGMENTS_MAX; i++)
		if (!q->segments[i].number)
			return &q->segments[i];
	return NULL;
}

int uq_regions_begin(struct uq *q, uint32_t segment, uint8_t *base, uint64_t bytes)
{
	struct uq_segment *s = segment ? free_segment(q) : NULL;

	q->own_segment = 0;
	if (!segment)
		return 0;
	if (!s)
		return -EBUSY;
	if (!blocks_open(&q->occupied, bytes))
		return -ENOMEM;
	*s = (struct uq_segment){ .base = base, .bytes = bytes, .number = segment, .live = true };
	q->own_segment = segment;
	return 0;
}

void uq_regions_end(struct uq *q)
{
	struct uq_segment *s = find_segment(q, q->own_segment);

	if (s)
		s->live = false;
	q->own_segment = 0;
	blocks_close(&q->occupied);
	uq_posts_forget(q);
}

int uq_region_judge(const struct uq *q, const struct wire_descriptor *d, uint64_t length)
{
	const struct uq_segment *s = find_segment(q, q->own_segment);

	if (!s || d->segment != q->own_segment)
		return UQ_V_SEGMENT;
	if (d->buffer > s->bytes || length > s->bytes - d->buffer)
		return UQ_V_RANGE;
	return d->buffer % q->config.block_bytes ? UQ_V_ALIGNMENT : UQ_V_NONE;
}

bool uq_region_occupied(const struct uq *q, uint64_t start, uint64_t length)
{
	return blocks_any(&q->occupied, start, length);
}

void uq_region_take(struct uq *q, struct uq_tag *t, uint64_t buffer, uint64_t bytes)
{
	t->own_segment = q->own_segment;
	t->own_buffer = buffer;
	t->own_bytes = bytes;
	find_segment(q, q->own_segment)->data_tags++;
	q->regions++;
	if (t->op == WIRE_WRITE)
		blocks_set(&q->occupied, buffer, bytes);
}

uint8_t *uq_region_address(const struct uq *q, const struct uq_tag *t)
{
	return find_segment(q, t->own_segment)->base + t->own_buffer;
}

bool uq_region_orphaned(const struct uq *q, const struct uq_tag *t) { return !find_segment(q, t->own_segment)->live; }

void uq_region_return(struct uq *q, struct uq_tag *t)
{
	struct uq_segment *s = find_segment(q, t->own_segment);

	s->data_tags--;
	q->regions--;
	if (s->live && t->op == WIRE_WRITE)
		blocks_clear(&q->occupied, t->own_buffer, t->own_bytes);
	t->own_segment = 0;
}

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

int uq_segment_is_left(const struct uq *q)
{
	for (unsigned i = 0; i < UQ_SEGMENTS_MAX; i++)
		if (q->segments[i].number && !q->segments[i].live)
			return 1;
	return 0;
}

bool uq_regions_allocate(struct uq *q)
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

void uq_regions_free(struct uq *q)
{
	for (unsigned c = 0; c < q->config.classes; c++)
		free(q->posts[c].starts);
	blocks_close(&q->occupied);
}

void uq_posts_forget(struct uq *q)
{
	for (unsigned c = 0; c < q->config.classes; c++)
		q->posts[c].count = 0;
}

int uq_post_add(struct uq *q, const struct wire_descriptor *d)
{
	unsigned c = 0;
	int wrong;

	while (c < q->config.classes && q->config.class[c].buffer_bytes != d->length)
		c++;
	if (!q->config.place_in_backend || c == q->config.classes || q->posts[c].count == q->config.depth)
		return UQ_V_POST;
	wrong = uq_region_judge(q, d, d->length);
	if (wrong)
		return wrong;
	if (uq_region_occupied(q, d->buffer, d->length))
		return UQ_V_LENT;
	blocks_set(&q->occupied, d->buffer, d->length);
	q->posts[c].starts[q->posts[c].count++] = d->buffer;
	q->config.stats->posts++;
	return UQ_V_NONE;
}

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
