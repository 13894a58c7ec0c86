/* Regions of backends' segments: lent to a tag until they are released, or posted ahead for writes to land in. */
#ifndef UQ_QUEUE_REGION_H
#define UQ_QUEUE_REGION_H

#include "queue_types.h"

/* Makes a segment the attached backend's; number 0: the backend has none.  Returns 0, -ENOMEM, or -EBUSY if too many
 * segments of dead backends still hold data. */
int uq_regions_begin(struct uq *q, uint32_t segment, uint8_t *base, uint64_t bytes);
/* Ends the segment of a dead backend; its memory stays readable while a tag's data lies in it. */
void uq_regions_end(struct uq *q);
bool uq_regions_allocate(struct uq *q);
void uq_regions_free(struct uq *q);

/* UQ_V_NONE if the region that the descriptor names holds `length` bytes, otherwise the violation. */
int uq_region_judge(const struct uq *q, const struct wire_descriptor *d, uint64_t length);
bool uq_region_occupied(const struct uq *q, uint64_t start, uint64_t length);
void uq_region_take(struct uq *q, struct uq_tag *t, uint64_t buffer, uint64_t bytes);
uint8_t *uq_region_address(const struct uq *q, const struct uq_tag *t);
/* Whether the backend that named the tag's region is dead. */
bool uq_region_orphaned(const struct uq *q, const struct uq_tag *t);
/* Takes the region from the tag. */
void uq_region_return(struct uq *q, struct uq_tag *t);

/* Keeps the region that a POST names.  Returns UQ_V_NONE or the violation. */
int uq_post_add(struct uq *q, const struct wire_descriptor *d);
/* Takes the smallest posted region that holds `length` bytes; false: no posted region does. */
bool uq_post_take(struct uq *q, uint64_t length, uint64_t *buffer, uint64_t *bytes);
void uq_posts_forget(struct uq *q);

#endif
