/* What queue_core.c, queue_stock.c, queue_link.c, queue_region.c and queue_time.c share and nobody else sees. */
#ifndef UQ_QUEUE_INTERNAL_H
#define UQ_QUEUE_INTERNAL_H

#include "queue_core.h"

#include "blocks.h"

#include <stdbool.h>

#define UQ_NO_TAG 0xffffu

struct uq_tag {
	uint64_t sequence, offset, length, arrived_ms;
	uint64_t own_buffer;   /* in own_segment */
	uint64_t client_buffer; /* in slice `slice` of the client area, if `in_place` */
	uint64_t own_bytes;    /* of the region, which may be more than the request's */
	uint32_t own_segment;  /* region that a backend named, 0 for none */
	uint32_t slice;
	uint32_t slot;         /* pool buffer, UQ_BUFFER_NONE for none */
	int32_t result;
	uint16_t flags;
	uint16_t next_waiter;
	uint8_t state, op, class;
	bool in_place;         /* the client's own buffer is the request's: nothing is ever copied */
	bool copied;           /* a write's data is in its buffer */
	bool given;            /* a backend has seen it */
	bool doomed;           /* fails as soon as nobody touches its buffer */
	bool overdue;
};

struct uq_stock {
	uint32_t *slots;
	unsigned count, held, pending, waiting, owed;
	unsigned least, idle; /* the fewest in `count` since the last look; since the one before */
	uint16_t first_waiter, last_waiter;
};

/* What is posted of one class: offsets in the backend's segment. */
struct uq_posts {
	uint64_t *starts;
	unsigned count;
};

struct uq_segment {
	uint8_t *base;
	uint64_t bytes;
	uint32_t number;
	unsigned data_tags; /* writes whose only copy of the data lies here, and reads not yet taken by the kernel */
	bool live;
};

struct uq {
	struct uq_config config;
	struct uq_tag *tags;
	struct uq_stock stock[UQ_CLASSES_MAX];
	unsigned stock_changed, stock_wanting; /* a bit for each class: look at it anew; it is to be leased or returned */
	struct uq_segment segments[UQ_SEGMENTS_MAX];
	struct uq_command *commands;
	unsigned commands_first, commands_count, commands_mask;
	struct wire_descriptor *output;
	unsigned output_first, output_count, output_max;
	struct uq_posts posts[UQ_CLASSES_MAX];
	struct blocks occupied; /* of the attached backend's segment: lent to a write's tag, or posted */
	uint16_t *replay; /* room to sort the tags that wait */
	uint64_t sequence, now_ms, scanned_ms, stock_looked_ms, expected_ms, absent_since_ms;
	unsigned attention, gone;
	uint32_t own_segment; /* the attached backend's, 0 for none */
	uint8_t link;
	unsigned stale; /* answers of this backend's that were dropped */
	bool reads_own, fence, giving_up;
	bool is_absent; /* since absent_since_ms */
	bool output_held;
	int violation, fault, fault_detail;
	unsigned fault_tag;
	struct wire_descriptor culprit;
};

/* queue_core.c */
bool uq_move(struct uq *q, struct uq_tag *t, enum uq_event event);
void uq_fail_now(struct uq *q, unsigned fault, unsigned tag, int detail);
void uq_finish(struct uq *q, struct uq_tag *t, int result);
void uq_fail(struct uq *q, struct uq_tag *t, int error);
void uq_get_data(struct uq *q, struct uq_tag *t, uint8_t *address);
void uq_ready(struct uq *q, struct uq_tag *t);
static inline unsigned uq_index(const struct uq *q, const struct uq_tag *t) { return (unsigned)(t - q->tags); }

/* queue_stock.c */
unsigned uq_class_for(const struct uq *q, uint64_t bytes);
void uq_need_buffer(struct uq *q, struct uq_tag *t);
void uq_stop_waiting(struct uq *q, struct uq_tag *t);
void uq_slot_back(struct uq *q, struct uq_tag *t);
bool uq_stock_short(const struct uq *q);
bool uq_stock_wanting(struct uq *q);
void uq_stock_look(struct uq *q);
uint32_t uq_stock_pop(struct uq *q, struct uq_stock *s);
static inline void uq_stock_touch(struct uq *q, const struct uq_stock *s) { q->stock_changed |= 1u << (s - q->stock); }
uint8_t *uq_slot_address(const struct uq *q, uint32_t slot);
uint64_t uq_slot_offset(const struct uq *q, uint32_t slot);

/* queue_link.c */
void uq_hand_over(struct uq *q, struct uq_tag *t);
void uq_ask_place(struct uq *q, struct uq_tag *t);
struct wire_descriptor *uq_put(struct uq *q, struct uq_tag *t, uint8_t kind);

/* queue_region.c */
struct uq_segment *uq_find_segment(const struct uq *q, uint32_t number);
void uq_region_take(struct uq *q, struct uq_tag *t, uint64_t buffer, uint64_t bytes);
void uq_region_back(struct uq *q, struct uq_tag *t, bool tell);
uint8_t *uq_region_address(const struct uq *q, const struct uq_tag *t);
bool uq_region_orphaned(const struct uq *q, const struct uq_tag *t);
int uq_judge_region(const struct uq *q, const struct wire_descriptor *d, uint64_t length);
bool uq_region_occupied(const struct uq *q, uint64_t start, uint64_t length);
bool uq_regions_begin(struct uq *q, uint64_t segment_bytes);
void uq_regions_end(struct uq *q);
bool uq_posts_allocate(struct uq *q);
void uq_posts_free(struct uq *q);
void uq_posts_forget(struct uq *q);
int uq_post_add(struct uq *q, const struct wire_descriptor *d);
bool uq_post_take(struct uq *q, uint64_t length, uint64_t *buffer, uint64_t *bytes);

#endif
