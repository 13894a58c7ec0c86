/* A request's road, from its arrival to the return of its buffer. */
#ifndef UQ_QUEUE_REQUEST_H
#define UQ_QUEUE_REQUEST_H

#include "queue_types.h"

/* The backend has named this region for the write: the kernel copies there. */
void uq_request_placed(struct uq *q, struct uq_tag *t, uint64_t buffer);
/* The backend has answered; with `named` the data of a read lies in the region at `buffer`. */
void uq_request_done(struct uq *q, struct uq_tag *t, int result, bool named, uint64_t buffer);
/* Requests whose turn under the limits has come go on, in the order of their arrival. */
void uq_requests_pass(struct uq *q);
/* Ends the request with an error, as soon as the driver takes one. */
void uq_request_fail(struct uq *q, struct uq_tag *t, int error);
/* The backend that had the request, or its region, is dead. */
void uq_request_lost(struct uq *q, struct uq_tag *t);
/* A request that waits for a backend goes to the one whose link has come up. */
void uq_request_resume(struct uq *q, struct uq_tag *t);

#endif
