/*
 * A disk in a file, over rings in shared memory and eventfds.  It needs no library at all.
 *
 *     ring_disk RUN_DIR DEVICE FILE [SIZE_BYTES]
 *     ring_disk /run/ublkpool vol0 /var/lib/vol0.disk
 *
 * Each queue has a connection to its worker, over which it gets its rings.  The connection's end is the worker's: the
 * program connects again, at growing intervals, and sends HELLO to the successor.
 */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "json.h"
#include "service.h"

enum { RETRY_MS = 10, RETRY_MAX_MS = 200, LOOK_AGAIN_MS = 1, SETTLE_MS = 1000, ENTRIES_AT_ONCE = 64 };
_Static_assert(SR_ENTRY_BYTES == sizeof(struct wire_descriptor), "an entry is a descriptor");

struct link {
	int connection;        /* -1: none */
	int bell, worker_bell; /* -1: connected, and the rings have not come yet */
	uint8_t *memory;
	uint64_t memory_bytes;
	struct sr_end in, out;
	int64_t due_ms, delay_ms; /* when to connect again, and how long to wait after that */
};

struct links {
	unsigned count;
	struct link *at;
	struct pollfd *polled; /* the signals, the daemon, then for each queue its connection and its doorbell */
};

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void ask_for_rings(const struct service *service, struct link *link, uint32_t queue)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char packet[256];
	int length = snprintf(packet, sizeof packet, "{\"type\":\"ring\",\"v\":%d,\"token\":\"%s\"}",
			      UBLKPOOL_PROTOCOL_VERSION, service->attached.token_text);

	snprintf(address.sun_path, sizeof address.sun_path, "%s", service->attached.addresses[queue].ring);
	link->connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (link->connection < 0)
		fail("socket: %s", strerror(errno));
	if (!connect(link->connection, (struct sockaddr *)&address, sizeof address) &&
	    send(link->connection, packet, (size_t)length, MSG_NOSIGNAL) == length)
		return;
	/* No worker listens, its backlog is full, or it has just died. */
	close(link->connection);
	link->connection = -1;
	link->due_ms = now_ms() + link->delay_ms;
	link->delay_ms = 2 * link->delay_ms < RETRY_MAX_MS ? 2 * link->delay_ms : RETRY_MAX_MS;
}

static void end_link(struct service *service, struct link *link, uint32_t queue)
{
	struct outbox *out = &service->queues[queue].out;

	close(link->connection);
	link->connection = -1;
	link->due_ms = now_ms() + link->delay_ms;
	if (link->bell < 0)
		return;
	munmap(link->memory, link->memory_bytes);
	close(link->bell);
	close(link->worker_bell);
	link->bell = link->worker_bell = -1;
	outbox_sent(out, out->count); /* they answer a dead worker */
}

static void wake_worker(const struct link *link)
{
	const uint64_t one = 1;

	/* It can only fail if the worker's count is full: then it has been rung. */
	if (write(link->worker_bell, &one, sizeof one) < 0)
		return;
}

/* Sends what the ring has room for; the rest stays in the outbox. */
static void send_answers(struct service *service, struct link *link, uint32_t queue)
{
	struct outbox *out = &service->queues[queue].out;
	int64_t room;

	if (!out->count || link->bell < 0)
		return;
	room = sr_room(&link->out, out->count);
	if (room < 0)
		fail("queue %u: its worker stored an impossible index", queue);
	sr_write(&link->out, out->at, (uint32_t)room);
	outbox_sent(out, (unsigned)room);
	if (sr_publish(&link->out, 0))
		wake_worker(link);
}

static void open_rings(struct service *service, struct link *link, uint32_t queue, struct json answer,
		       const int files[UBLKPOOL_RING_FILES])
{
	struct wire_descriptor first = hello(service, queue);
	struct json value;
	uint64_t entries;

	if (!json_member(answer, "entries", &value) || !json_number(value, SR_ENTRIES_MAX, &entries) || !entries ||
	    entries & (entries - 1))
		fail("queue %u: impossible rings", queue);
	link->memory_bytes = sr_pair_bytes((uint32_t)entries);
	link->memory = map_file(files[0], link->memory_bytes);
	link->bell = files[1];
	link->worker_bell = files[2];
	link->in = sr_end_to_backend(link->memory, (uint32_t)entries, 0);
	link->out = sr_end_to_worker(link->memory, (uint32_t)entries, 1);
	link->delay_ms = RETRY_MS;
	if (sr_room(&link->out, 1) != 1)
		fail("queue %u: new rings have no room", queue);
	sr_write(&link->out, &first, 1);
	if (sr_publish(&link->out, 0))
		wake_worker(link);
}

/* Something has come on the connection: the rings, or its end. */
static void hear_worker(struct service *service, struct link *link, uint32_t queue)
{
	char packet[256];
	int files[UBLKPOOL_RING_FILES];
	unsigned file_count = 0;
	struct json answer;
	long bytes = receive_packet(link->connection, packet, sizeof packet, files, UBLKPOOL_RING_FILES, &file_count);

	if (bytes < 0 && errno == EAGAIN)
		return;
	if (bytes <= 0 || link->bell >= 0) {
		end_link(service, link, queue);
		return;
	}
	if (file_count != UBLKPOOL_RING_FILES || !json_parse(packet, (size_t)bytes, &answer))
		fail("queue %u: its worker's answer makes no sense", queue);
	open_rings(service, link, queue, answer, files);
}

/* An entry can change at any time: it is copied before it is judged. */
static void take_entries(struct service *service, struct link *link, uint32_t queue)
{
	for (unsigned i = 0; i < ENTRIES_AT_ONCE && link->bell >= 0; i++) {
		struct wire_descriptor d;
		const uint8_t *at;
		int64_t waiting = sr_waiting(&link->in);

		if (waiting < 0)
			fail("queue %u: its worker stored an impossible index", queue);
		if (!waiting)
			return;
		sr_peek(&link->in, (uint32_t)waiting, &at);
		memcpy(&d, at, sizeof d);
		sr_consumed(&link->in, 1);
		serve(service, queue, &d);
	}
}

/* Whether all queues may sleep; a RELEASE may wait unless a write waits for its region. */
static bool doze(const struct service *service, struct links *links)
{
	bool may_sleep = true;

	for (unsigned i = 0; i < links->count; i++)
		if (links->at[i].bell >= 0 &&
		    !sr_doze(&links->at[i].in, service->own ? SR_WAKE_FOR_ALL : SR_WAKE_FOR_WORK))
			may_sleep = false;
	return may_sleep;
}

static int earlier(int timeout_ms, int64_t until_ms)
{
	int64_t left = until_ms < 0 ? 0 : until_ms;

	return timeout_ms < 0 || left < timeout_ms ? (int)left : timeout_ms;
}

static int until_next(const struct service *service, const struct links *links)
{
	int64_t now = now_ms();
	int timeout_ms = -1;

	for (unsigned i = 0; i < links->count; i++) {
		const struct link *link = &links->at[i];

		if (link->connection < 0)
			timeout_ms = earlier(timeout_ms, link->due_ms - now);
		/* No doorbell tells that the worker has made room. */
		if (link->bell >= 0 && service->queues[i].out.count)
			timeout_ms = earlier(timeout_ms, LOOK_AGAIN_MS);
	}
	return timeout_ms;
}

static void wait_for_news(const struct service *service, struct links *links)
{
	struct pollfd *polled = links->polled;
	bool may_sleep = doze(service, links);

	/* The end of the daemon's connection would be reported for ever. */
	polled[0] = (struct pollfd){ service->signals, POLLIN, 0 };
	polled[1] = (struct pollfd){ service->orphaned ? -1 : service->attached.connection, POLLIN, 0 };
	for (unsigned i = 0; i < links->count; i++) {
		polled[2 * i + 2] = (struct pollfd){ links->at[i].connection, POLLIN, 0 };
		polled[2 * i + 3] = (struct pollfd){ links->at[i].bell, POLLIN, 0 };
	}
	if (poll(polled, 2 * (nfds_t)links->count + 2, may_sleep ? until_next(service, links) : 0) < 0 &&
	    errno != EINTR)
		fail("poll: %s", strerror(errno));
	for (unsigned i = 0; i < links->count; i++)
		if (links->at[i].bell >= 0)
			sr_wake(&links->at[i].in);
}

static void quiet_bell(const struct link *link)
{
	uint64_t count;

	/* It fails if another turn has read it: then it is quiet. */
	if (read(link->bell, &count, sizeof count) < 0)
		return;
}

static unsigned linked(const struct links *links)
{
	unsigned count = 0;

	for (unsigned i = 0; i < links->count; i++)
		count += links->at[i].bell >= 0;
	return count;
}

/* One turn; whether the program is to end. */
static bool turn(struct service *service, struct links *links, int *status)
{
	int64_t now = now_ms();

	for (uint32_t i = 0; i < links->count; i++)
		if (links->at[i].connection < 0 && links->at[i].due_ms <= now)
			ask_for_rings(service, &links->at[i], i);
	wait_for_news(service, links);
	for (uint32_t i = 0; i < links->count; i++) {
		struct link *link = &links->at[i];

		if (links->polled[2 * i + 3].revents)
			quiet_bell(link);
		take_entries(service, link, i);
		/* Last: what the worker wrote before its end is read, answered and, with the link, forgotten. */
		if (links->polled[2 * i + 2].revents)
			hear_worker(service, link, i);
	}
	for (uint32_t i = 0; i < links->count; i++)
		send_answers(service, &links->at[i], i);
	return service_ends(service, links->polled[0].revents, links->polled[1].revents, linked(links), status);
}

static void open_links(const struct service *service, struct links *links)
{
	links->count = service->attached.queues;
	links->at = calloc(links->count + 1, sizeof *links->at);
	links->polled = calloc(2 * (size_t)links->count + 2, sizeof *links->polled);
	if (!links->at || !links->polled)
		fail("no memory");
	for (unsigned i = 0; i < links->count; i++) {
		if (!*service->attached.addresses[i].ring)
			fail("this daemon offers no rings");
		links->at[i].connection = links->at[i].bell = links->at[i].worker_bell = -1;
		links->at[i].delay_ms = RETRY_MS;
	}
}

static bool has_answers(const struct service *service, const struct links *links)
{
	for (unsigned i = 0; i < links->count; i++)
		if (links->at[i].bell >= 0 && service->queues[i].out.count)
			return true;
	return false;
}

/* The last answers may find a ring full; a worker that reads nothing any more gets them no more. */
static void settle(struct service *service, struct links *links)
{
	int64_t end_ms = now_ms() + SETTLE_MS;

	while (has_answers(service, links) && now_ms() < end_ms) {
		poll(NULL, 0, LOOK_AGAIN_MS);
		for (uint32_t i = 0; i < links->count; i++)
			send_answers(service, &links->at[i], i);
	}
}

int main(int argument_count, char **arguments)
{
	static struct service service;
	static struct links links;
	int status;

	service_open(&service, "ring_disk", argument_count, arguments);
	open_links(&service, &links);
	while (!turn(&service, &links, &status))
		;
	settle(&service, &links);
	return status;
}
