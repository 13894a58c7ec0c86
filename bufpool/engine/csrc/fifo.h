/* A first-in-first-out queue of indices, opened with room for all that can wait, so that a push cannot fail. */
#ifndef UBLKPOOL_FIFO_H
#define UBLKPOOL_FIFO_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

struct fifo {
	uint32_t *items;
	uint32_t head, count, capacity;
};

static inline bool fifo_open(struct fifo *fifo, uint32_t capacity)
{
	fifo->capacity = capacity;
	fifo->items = calloc(capacity, sizeof *fifo->items);
	return fifo->items;
}

static inline void fifo_push(struct fifo *fifo, uint32_t item)
{
	uint32_t at = fifo->head + fifo->count++;
	fifo->items[at < fifo->capacity ? at : at - fifo->capacity] = item;
}

static inline uint32_t fifo_first(const struct fifo *fifo) { return fifo->items[fifo->head]; }

static inline uint32_t fifo_pop(struct fifo *fifo)
{
	uint32_t item = fifo->items[fifo->head];
	fifo->head = fifo->head + 1 < fifo->capacity ? fifo->head + 1 : 0;
	fifo->count--;
	return item;
}

#endif
