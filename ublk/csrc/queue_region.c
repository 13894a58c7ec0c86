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

static void lend(struct uq *q, struct uq_tag *t)
{
	t->lent_index = (uint16_t)q->lent_count;
	q->lent[q->lent_count++] = (uint16_t)uq_index(q, t);
}

static void unlend(struct uq *q, struct uq_tag *t)
{
	uint16_t last;

	if (t->lent_index == UQ_NO_TAG)
		return;
	last = q->lent[--q->lent_count];
	q->lent[t->lent_index] = last;
	q->tags[last].lent_index = t->lent_index;
	t->lent_index = UQ_NO_TAG;
}

void uq_region_take(struct uq *q, struct uq_tag *t, uint64_t buffer, uint64_t bytes)
{
	t->own_segment = q->own_segment;
	t->own_buffer = buffer;
	t->own_bytes = bytes;
	uq_find_segment(q, q->own_segment)->data_tags++;
	if (t->op == UQ_WRITE)
		lend(q, t);
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
	struct uq_descriptor *d;

	unlend(q, t);
	s->data_tags--;
	if (tell && s->live && q->link == UQ_LINK_UP) {
		d = uq_put(q, t, UQ_RELEASE);
		if (d) {
			d->segment = t->own_segment;
			d->buffer = t->own_buffer;
		}
	}
	t->own_segment = 0;
}

bool uq_overlaps_lent(const struct uq *q, uint64_t start, uint64_t length)
{
	for (unsigned i = 0; i < q->lent_count; i++) {
		const struct uq_tag *other = &q->tags[q->lent[i]];

		if (other->own_segment == q->own_segment && start < other->own_buffer + other->own_bytes &&
		    other->own_buffer < start + length)
			return true;
	}
	return false;
}

int uq_judge_region(const struct uq *q, const struct uq_descriptor *d, uint64_t length)
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

/* The first that begins at `start` or behind it. */
static unsigned find(const struct uq_posts *p, uint64_t start)
{
	unsigned low = 0, high = p->count;

	while (low < high) {
		unsigned middle = (low + high) / 2;

		if (p->starts[middle] < start)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

bool uq_overlaps_posted(const struct uq *q, uint64_t start, uint64_t length)
{
	for (unsigned c = 0; c < q->config.classes; c++) {
		const struct uq_posts *p = &q->posts[c];
		unsigned at = find(p, start);

		if (at < p->count && p->starts[at] < start + length)
			return true;
		if (at && start < p->starts[at - 1] + q->config.class[c].buffer_bytes)
			return true;
	}
	return false;
}

static void insert(struct uq_posts *p, uint64_t start)
{
	unsigned at = find(p, start);

	memmove(p->starts + at + 1, p->starts + at, (p->count - at) * sizeof *p->starts);
	p->starts[at] = start;
	p->count++;
}

/* Keep what a POST says, or the violation that it is. */
int uq_post_add(struct uq *q, const struct uq_descriptor *d)
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
	if (uq_overlaps_lent(q, d->buffer, d->length) || uq_overlaps_posted(q, d->buffer, d->length))
		return UQ_V_LENT;
	insert(&q->posts[c], d->buffer);
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
