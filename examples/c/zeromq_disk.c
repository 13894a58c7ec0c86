/*
 * A disk in a file, over ZeroMQ.  Beside libzmq it needs nothing but recvmsg(2) and mmap(2).
 *
 *     zeromq_disk RUN_DIR DEVICE FILE [SIZE_BYTES]
 *     zeromq_disk /run/ublkpool vol0 /var/lib/vol0.disk
 *
 * One DEALER for each queue, and a monitor that tells when a worker comes and goes: ZeroMQ connects again by itself,
 * but each new worker waits for a HELLO.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

#include "service.h"

enum { LINGER_MS = 1000, RETRY_MS = 10, RETRY_MAX_MS = 200, FRAMES_AT_ONCE = 64, DESCRIPTOR_BYTES = 64 };

struct link {
	void *dealer, *monitor;
	bool has_worker;
	unsigned workers; /* so far */
};

struct links {
	void *context;
	unsigned count;
	struct link *at;
	zmq_pollitem_t *items; /* the signals, the daemon, then for each queue its dealer and its monitor */
};

static void set(void *socket, int option, int value)
{
	if (zmq_setsockopt(socket, option, &value, sizeof value))
		fail("zmq_setsockopt %d: %s", option, zmq_strerror(errno));
}

static void send_frame(const struct link *link, const struct wire_descriptor *at, unsigned count)
{
	if (zmq_send(link->dealer, at, count * sizeof *at, ZMQ_DONTWAIT) < 0)
		fail("zmq_send: %s", zmq_strerror(errno));
}

static void greet(const struct service *service, const struct link *link, uint32_t queue)
{
	struct wire_descriptor first = hello(service, queue);

	send_frame(link, &first, 1);
}

static void open_link(const struct service *service, void *context, struct link *link, uint32_t queue)
{
	char monitor[64];

	snprintf(monitor, sizeof monitor, "inproc://monitor-%u", queue);
	link->dealer = zmq_socket(context, ZMQ_DEALER);
	link->monitor = zmq_socket(context, ZMQ_PAIR);
	if (!link->dealer || !link->monitor)
		fail("zmq_socket: %s", zmq_strerror(errno));
	if (zmq_setsockopt(link->dealer, ZMQ_ROUTING_ID, service->attached.token, UBLKPOOL_TOKEN_BYTES))
		fail("ZMQ_ROUTING_ID: %s", zmq_strerror(errno));
	set(link->dealer, ZMQ_LINGER, LINGER_MS);
	set(link->dealer, ZMQ_RECONNECT_IVL, RETRY_MS);
	set(link->dealer, ZMQ_RECONNECT_IVL_MAX, RETRY_MAX_MS);
	/* The queue's depth bounds what is in flight; at a limit here ZeroMQ would drop or refuse some of it. */
	set(link->dealer, ZMQ_SNDHWM, 0);
	set(link->dealer, ZMQ_RCVHWM, 0);
	/* Before it connects: the first connection must be seen, so that the second is known to be a new worker's. */
	if (zmq_socket_monitor(link->dealer, monitor, ZMQ_EVENT_HANDSHAKE_SUCCEEDED | ZMQ_EVENT_DISCONNECTED) ||
	    zmq_connect(link->monitor, monitor) ||
	    zmq_connect(link->dealer, service->attached.addresses[queue].endpoint))
		fail("queue %u: %s", queue, zmq_strerror(errno));
	greet(service, link, queue);
}

static void open_links(const struct service *service, struct links *links)
{
	links->count = service->attached.queues;
	links->context = zmq_ctx_new();
	links->at = calloc(links->count + 1, sizeof *links->at);
	links->items = calloc(2 * (size_t)links->count + 2, sizeof *links->items);
	if (!links->context || !links->at || !links->items)
		fail("no memory");
	links->items[0] = (zmq_pollitem_t){ NULL, service->signals, ZMQ_POLLIN, 0 };
	links->items[1] = (zmq_pollitem_t){ NULL, service->attached.connection, ZMQ_POLLIN, 0 };
	for (uint32_t i = 0; i < links->count; i++) {
		struct link *link = &links->at[i];

		open_link(service, links->context, link, i);
		links->items[2 * i + 2] = (zmq_pollitem_t){ link->dealer, 0, ZMQ_POLLIN, 0 };
		links->items[2 * i + 3] = (zmq_pollitem_t){ link->monitor, 0, ZMQ_POLLIN, 0 };
	}
}

/* An event has two frames: its number in the first 16 bits of one, then the address. */
static void link_changed(const struct service *service, struct link *link, uint32_t queue)
{
	uint8_t event[64];
	uint16_t number;

	while (zmq_recv(link->monitor, event, sizeof event, ZMQ_DONTWAIT) >= 0) {
		memcpy(&number, event, sizeof number);
		if (zmq_recv(link->monitor, event, sizeof event, 0) < 0)
			fail("zmq_recv: %s", zmq_strerror(errno));
		link->has_worker = number == ZMQ_EVENT_HANDSHAKE_SUCCEEDED;
		if (link->has_worker && ++link->workers > 1)
			greet(service, link, queue);
	}
}

static void take_frame(struct service *service, zmq_msg_t *frame, uint32_t queue)
{
	const uint8_t *at = zmq_msg_data(frame);
	size_t bytes = zmq_msg_size(frame);

	if (!bytes || bytes % DESCRIPTOR_BYTES || bytes > (size_t)DESCRIPTOR_BYTES * WIRE_FRAME_DESCRIPTORS_MAX)
		fail("queue %u: a frame of %zu bytes", queue, bytes);
	for (; bytes; bytes -= DESCRIPTOR_BYTES, at += DESCRIPTOR_BYTES) {
		struct wire_descriptor d;

		memcpy(&d, at, sizeof d);
		serve(service, queue, &d);
	}
}

static void take_frames(struct service *service, const struct link *link, uint32_t queue)
{
	for (unsigned i = 0; i < FRAMES_AT_ONCE; i++) {
		zmq_msg_t frame;

		zmq_msg_init(&frame);
		if (zmq_msg_recv(&frame, link->dealer, ZMQ_DONTWAIT) < 0) {
			if (errno != EAGAIN)
				fail("zmq_msg_recv: %s", zmq_strerror(errno));
			zmq_msg_close(&frame);
			return;
		}
		take_frame(service, &frame, queue);
		zmq_msg_close(&frame);
	}
}

static void send_answers(struct service *service, const struct links *links)
{
	for (uint32_t i = 0; i < links->count; i++) {
		struct outbox *out = &service->queues[i].out;

		while (out->count) {
			unsigned count =
				out->count < WIRE_FRAME_DESCRIPTORS_MAX ? out->count : WIRE_FRAME_DESCRIPTORS_MAX;
			send_frame(&links->at[i], out->at, count);
			outbox_sent(out, count);
		}
	}
}

static unsigned linked(const struct links *links)
{
	unsigned count = 0;

	for (unsigned i = 0; i < links->count; i++)
		count += links->at[i].has_worker;
	return count;
}

/* One turn; whether the program is to end. */
static bool turn(struct service *service, struct links *links, int *status)
{
	zmq_pollitem_t *items = links->items;

	/* The end of the daemon's connection would be reported for ever. */
	items[1].events = service->orphaned ? 0 : ZMQ_POLLIN;
	if (zmq_poll(items, 2 * (int)links->count + 2, -1) < 0 && errno != EINTR)
		fail("zmq_poll: %s", zmq_strerror(errno));
	for (uint32_t i = 0; i < links->count; i++) {
		if (items[2 * i + 3].revents)
			link_changed(service, &links->at[i], i);
		if (items[2 * i + 2].revents)
			take_frames(service, &links->at[i], i);
	}
	send_answers(service, links);
	return service_ends(service, items[0].revents, items[1].revents, linked(links), status);
}

static void close_links(struct links *links)
{
	for (unsigned i = 0; i < links->count; i++) {
		zmq_socket_monitor(links->at[i].dealer, NULL, 0);
		zmq_close(links->at[i].monitor);
		zmq_close(links->at[i].dealer);
	}
	/* Waits, LINGER_MS at most, until the last answers are on their way. */
	zmq_ctx_term(links->context);
}

int main(int argument_count, char **arguments)
{
	static struct service service;
	static struct links links;
	int status;

	service_open(&service, "zeromq_disk", argument_count, arguments);
	open_links(&service, &links);
	while (!turn(&service, &links, &status))
		;
	close_links(&links);
	return status;
}
