/* The requests of all queues, whatever transport they come over.
 *
 * A transport calls serve() for each descriptor that has arrived, and sends what it finds in the queue's outbox.
 * Everything is executed at once, on one thread, so nothing is ever executing when a FENCE is read. */
#ifndef EXAMPLE_SERVICE_H
#define EXAMPLE_SERVICE_H

#include <stdbool.h>
#include <stdint.h>

#include "attach.h"
#include "disk.h"

/* The answers of a queue that are not sent yet, oldest first. */
struct outbox {
	struct wire_descriptor *at;
	unsigned count, room;
};

/* What this tag's write has of the own segment. */
enum region_state { REGION_NONE, REGION_WAITS, REGION_LENT };
struct region {
	enum region_state state;
	struct wire_descriptor place; /* the PLACE that asked for it */
	uint64_t offset;
	uint64_t turn; /* while it waits: those that came first are served first */
};

struct queue {
	struct outbox out;
	uint32_t fenced;        /* requests of an epoch below this one are not executed */
	struct region *regions; /* one for each tag */
};

struct service {
	const struct disk *disk;
	struct attached attached;
	uint32_t epoch; /* that a HELLO carries: of the attach, or of the latest FENCE */
	uint8_t *own;
	uint64_t slot_bytes, *free_slots;
	unsigned free_count;
	uint64_t turns;
	struct queue *queues;
	int signals;   /* a descriptor that is readable after SIGTERM or SIGINT */
	bool orphaned; /* the daemon is gone: serve on while there are workers */
};

/* RUN_DIR DEVICE FILE [SIZE_BYTES]: opens the disk and attaches. */
void service_open(struct service *service, const char *kind, int argument_count, char **arguments);

/* Executes a descriptor of this queue's worker.  One that breaks the protocol ends the program. */
void serve(struct service *service, uint32_t queue, const struct wire_descriptor *descriptor);

/* What opens a queue's link, to each worker anew. */
struct wire_descriptor hello(const struct service *service, uint32_t queue);

void outbox_sent(struct outbox *out, unsigned count);

/* Whether the program is to end now: after a signal, a detach, or the end of the daemon and all workers. */
bool service_ends(struct service *service, bool signal_came, bool daemon_speaks, unsigned linked, int *status);

#endif
