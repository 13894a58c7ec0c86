/* The end of a request: its result is counted, and the commit goes to the driver. */
#ifndef UQ_QUEUE_FINISH_H
#define UQ_QUEUE_FINISH_H

#include "queue_types.h"

void uq_count_duration(struct uq *q, enum uq_latency which, uint64_t since_ns);
void uq_finish(struct uq *q, struct uq_tag *t, int result);

#endif
