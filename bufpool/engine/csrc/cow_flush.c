/* Flushes of the copy-on-write storage: data, then the durable copy of the map.  The first of the requests that wait
 * for one does it for all. */
#include "cow_storage.h"

enum cow_next cow_flush_join(struct cow_storage *c, const struct storage_request *r)
{
	fifo_push(&c->flushes, r->index);
	c->is_news = true;
	return AWAY;
}

enum cow_next cow_flush_over(struct cow_storage *c, int32_t error)
{
	cow_map_round_over(c->map, error);
	while (c->flushing.count) {
		struct storage_request *r = engine_request(c->base.engine, fifo_pop(&c->flushing));
		engine_finish(c->base.engine, r, error ? error : full_result(r));
	}
	c->is_news = true;
	return AWAY;
}

static enum cow_next flush_next_pages(struct cow_storage *c, struct cow_work *w)
{
	uint64_t count = cow_map_pages(c->map, &w->page, c->map->pages, COW_ROUND, COW_ROUND);
	if (!count)
		return cow_next_io(w, COW_FLUSH_END, COW_IO_SYNC, (struct cow_piece){ 0 });
	struct cow_piece piece = cow_map_page_piece(c->map, w->page, count, true);
	w->page += count;
	return cow_next_io(w, COW_FLUSH_MAP, COW_IO_WRITE, piece);
}

static enum cow_next flush_data_synced(struct cow_storage *c, struct cow_work *w)
{
	w->page = 0;
	if (!cow_map_pages(c->map, &w->page, c->map->pages, COW_ROUND, COW_ROUND))
		return cow_flush_over(c, 0);
	return flush_next_pages(c, w);
}

struct storage_request *cow_flush_begin(struct cow_storage *c)
{
	if (c->flushing.count || !c->flushes.count)
		return NULL;
	while (c->flushes.count)
		fifo_push(&c->flushing, fifo_pop(&c->flushes));
	struct storage_request *r = engine_request(c->base.engine, fifo_first(&c->flushing));
	cow_map_round(c->map);
	cow_next_io(cow_work_of(c, r), COW_FLUSH_DATA, COW_IO_SYNC, (struct cow_piece){ 0 });
	return r;
}

enum cow_next cow_flush_stepped(struct cow_storage *c, struct cow_work *w)
{
	switch (w->step) {
	case COW_FLUSH_DATA:
		return flush_data_synced(c, w);
	case COW_FLUSH_MAP:
		return flush_next_pages(c, w);
	default: /* COW_FLUSH_END */
		return cow_flush_over(c, 0);
	}
}
