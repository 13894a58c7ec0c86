#include "attach.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "json.h"

enum { QUEUES_MAX = 4096, DEPTH_MAX = 4096, ANSWER_TIMEOUT_S = 60, LONGEST_BYTES = 1 << 30 };

void fail(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vfprintf(stderr, format, arguments);
	va_end(arguments);
	fputc('\n', stderr);
	exit(1);
}

static int connect_to_daemon(const char *run_dir)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	struct timeval timeout = { .tv_sec = ANSWER_TIMEOUT_S };
	int connection = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	int length = snprintf(address.sun_path, sizeof address.sun_path, "%s/" UBLKPOOL_ATTACH_SOCKET, run_dir);

	if (length < 0 || (size_t)length >= sizeof address.sun_path)
		fail("%s: too long for a unix socket", run_dir);
	if (connection < 0 || connect(connection, (struct sockaddr *)&address, sizeof address))
		fail("no daemon listens at %s: %s", address.sun_path, strerror(errno));
	if (setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout))
		fail("SO_RCVTIMEO: %s", strerror(errno));
	return connection;
}

/* A daemon that refuses before it has read the question closes the connection: its answer is there all the same. */
static void send_packet(int connection, const struct json_out *packet, int file)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = { .bytes = { 0 } };
	struct iovec text = { packet->at, packet->used };
	struct msghdr message = { .msg_iov = &text, .msg_iovlen = 1 };

	if (packet->overflowed)
		fail("the attach packet is longer than %d bytes", UBLKPOOL_PACKET_BYTES_MAX);
	if (file >= 0) {
		struct cmsghdr *rights;

		message.msg_control = control.bytes;
		message.msg_controllen = sizeof control.bytes;
		rights = CMSG_FIRSTHDR(&message);
		rights->cmsg_level = SOL_SOCKET;
		rights->cmsg_type = SCM_RIGHTS;
		rights->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(rights), &file, sizeof file);
	}
	if (sendmsg(connection, &message, MSG_NOSIGNAL) < 0 && errno != EPIPE && errno != ECONNRESET)
		fail("sending to the daemon: %s", strerror(errno));
}

static void take_files(struct msghdr *message, int *files, unsigned files_max, unsigned *count)
{
	for (struct cmsghdr *each = CMSG_FIRSTHDR(message); each; each = CMSG_NXTHDR(message, each)) {
		size_t bytes = each->cmsg_len - CMSG_LEN(0);

		if (each->cmsg_level != SOL_SOCKET || each->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t at = 0; at + sizeof(int) <= bytes && *count < files_max; at += sizeof(int))
			memcpy(&files[(*count)++], CMSG_DATA(each) + at, sizeof(int));
	}
}

long receive_packet(int connection, char *packet, unsigned room, int *files, unsigned files_max, unsigned *file_count)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int) * UBLKPOOL_SEGMENTS_MAX)];
	} control;
	struct iovec text = { packet, room };
	struct msghdr message = { .msg_iov = &text, .msg_iovlen = 1 };
	long bytes;

	message.msg_control = control.bytes;
	message.msg_controllen = CMSG_SPACE(sizeof(int) * files_max);
	*file_count = 0;
	bytes = recvmsg(connection, &message, MSG_CMSG_CLOEXEC);
	if (bytes < 0)
		return -1;
	take_files(&message, files, files_max, file_count);
	if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
		fail("a packet or its descriptors were cut: are there free file descriptors?");
	return bytes;
}

uint8_t *map_file(int file, uint64_t bytes)
{
	struct stat about;
	int seals = fcntl(file, F_GET_SEALS);
	void *memory;

	if (seals < 0 || !(seals & F_SEAL_SHRINK) || fstat(file, &about) || (uint64_t)about.st_size < bytes)
		fail("a segment of %llu bytes was announced and did not come", (unsigned long long)bytes);
	memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, file, 0);
	if (memory == MAP_FAILED)
		fail("mmap of %llu bytes: %s", (unsigned long long)bytes, strerror(errno));
	close(file);
	return memory;
}

static struct json member(struct json object, const char *name)
{
	struct json value;

	if (!json_member(object, name, &value))
		fail("the daemon's answer has no %s", name);
	return value;
}

static uint64_t number(struct json object, const char *name, uint64_t most)
{
	uint64_t value;

	if (!json_number(member(object, name), most, &value))
		fail("the daemon's answer has an impossible %s", name);
	return value;
}

static bool is_text(struct json object, const char *name, const char *expected)
{
	char found[64];

	return json_text(member(object, name), found, sizeof found) && !strcmp(found, expected);
}

/* The answer to a question, which must be of this type. */
static struct json ask(int connection, const struct json_out *question, int file, const char *type, char *packet,
		       int *files, unsigned *file_count)
{
	char reason[1024] = "no reason";
	struct json answer;
	long bytes;

	send_packet(connection, question, file);
	bytes = receive_packet(connection, packet, UBLKPOOL_PACKET_BYTES_MAX, files, UBLKPOOL_SEGMENTS_MAX, file_count);
	/* The kernel says first that the daemon left the question unread; the answer comes after that. */
	if (bytes < 0 && errno == ECONNRESET)
		bytes = receive_packet(connection, packet, UBLKPOOL_PACKET_BYTES_MAX, files, UBLKPOOL_SEGMENTS_MAX,
				       file_count);
	if (bytes <= 0)
		fail("the daemon did not answer: %s", bytes ? strerror(errno) : "it closed the connection");
	if (!json_parse(packet, (size_t)bytes, &answer))
		fail("the daemon's answer is no JSON");
	if (is_text(answer, "type", "refused")) {
		json_text(member(answer, "reason"), reason, sizeof reason);
		fail("refused: %s", reason);
	}
	if (!is_text(answer, "type", type) || number(answer, "v", UINT32_MAX) != UBLKPOOL_PROTOCOL_VERSION)
		fail("the daemon's answer is not %s of version %d", type, UBLKPOOL_PROTOCOL_VERSION);
	return answer;
}

void describe_device(const char *run_dir, const char *device, struct described *described)
{
	static char packet[UBLKPOOL_PACKET_BYTES_MAX];
	struct json_out question = { packet, sizeof packet, 0, false };
	int connection = connect_to_daemon(run_dir), files[UBLKPOOL_SEGMENTS_MAX];
	unsigned file_count;
	struct json answer, may_create;

	json_write(&question, "{\"type\":\"describe\",\"v\":%d,\"device\":", UBLKPOOL_PROTOCOL_VERSION);
	json_write_text(&question, device);
	json_write(&question, "}");
	answer = ask(connection, &question, -1, "described", packet, files, &file_count);
	described->size_bytes = number(answer, "size_bytes", INT64_MAX);
	described->max_io_bytes = number(answer, "max_io_bytes", LONGEST_BYTES);
	described->places_in_backend = is_text(answer, "placement", "backend");
	described->read_only = json_is_true(member(answer, "read_only"));
	described->has_identities = json_member(answer, "may_create", &may_create) && *may_create.at != 'n';
	described->may_create = !described->has_identities || json_is_true(may_create);
	close(connection);
}

static void write_attach(struct json_out *out, const char *device, const char *kind,
			 const struct properties *properties)
{
	json_write(out, "{\"type\":\"attach\",\"v\":%d,\"device\":", UBLKPOOL_PROTOCOL_VERSION);
	json_write_text(out, device);
	json_write(out, ",\"kind\":");
	json_write_text(out, kind);
	json_write(out, ",\"size_bytes\":%llu", (unsigned long long)properties->size_bytes);
	json_write(out, ",\"logical_block_bytes\":%u", properties->logical_block_bytes);
	json_write(out, ",\"volatile_cache\":true,\"read_only\":%s", properties->read_only ? "true" : "false");
	if (!properties->read_only)
		json_write(out,
			   ",\"discard_granularity_bytes\":%u,\"discard_max_bytes\":%u,"
			   "\"write_zeroes_max_bytes\":%u",
			   properties->logical_block_bytes, LONGEST_BYTES, LONGEST_BYTES);
	if (properties->segment_fd >= 0)
		json_write(out, ",\"placement\":\"any\",\"segment_bytes\":%llu",
			   (unsigned long long)properties->segment_bytes);
	if (properties->identity) {
		json_write(out, ",\"identity\":{\"value\":");
		json_write_text(out, properties->identity);
		json_write(out, ",\"store\":");
		json_write_text(out, properties->store);
		json_write(out, "}");
	}
	json_write(out, "}");
}

static void read_addresses(struct json answer, struct attached *attached)
{
	struct json endpoint = { 0 }, ring = { 0 }, endpoints = member(answer, "endpoints"), rings = endpoints;
	bool has_rings = json_member(answer, "rings", &rings);

	attached->addresses = calloc(attached->queues, sizeof *attached->addresses);
	if (!attached->addresses)
		fail("no memory");
	for (uint32_t i = 0; i < attached->queues; i++) {
		struct queue_address *address = &attached->addresses[i];

		if (!json_next(endpoints, &endpoint) ||
		    !json_text(endpoint, address->endpoint, sizeof address->endpoint))
			fail("queue %u has no endpoint", i);
		if (has_rings && json_next(rings, &ring) && !json_text(ring, address->ring, sizeof address->ring))
			fail("queue %u has no path for its rings", i);
	}
}

static void map_segments(struct json answer, struct attached *attached, const int *files, unsigned file_count)
{
	struct json each = { 0 }, segments = member(answer, "segments");

	while (json_next(segments, &each)) {
		struct segment *segment = &attached->segments[attached->segment_count];

		if (attached->segment_count == file_count)
			fail("the daemon sent fewer descriptors than segments");
		segment->number = (uint32_t)number(each, "number", UINT32_MAX);
		segment->bytes = number(each, "size_bytes", INT64_MAX);
		segment->memory = map_file(files[attached->segment_count++], segment->bytes);
	}
	if (attached->segment_count != file_count)
		fail("the daemon sent more descriptors than segments");
}

static void read_token(struct json answer, struct attached *attached)
{
	bool is_hex = json_text(member(answer, "token"), attached->token_text, sizeof attached->token_text);

	for (unsigned i = 0; is_hex && i < UBLKPOOL_TOKEN_BYTES; i++) {
		unsigned byte;

		is_hex = sscanf(attached->token_text + 2 * (size_t)i, "%2x", &byte) == 1;
		attached->token[i] = (uint8_t)byte;
	}
	if (!is_hex)
		fail("the daemon's token is not %d bytes in hexadecimal", UBLKPOOL_TOKEN_BYTES);
}

void attach_to_device(const char *run_dir, const char *device, const char *kind, const struct properties *properties,
		      struct attached *attached)
{
	static char packet[UBLKPOOL_PACKET_BYTES_MAX];
	struct json_out question = { packet, sizeof packet, 0, false };
	int files[UBLKPOOL_SEGMENTS_MAX];
	unsigned file_count;
	struct json answer;

	attached->connection = connect_to_daemon(run_dir);
	attached->segment_count = 0;
	write_attach(&question, device, kind, properties);
	answer = ask(attached->connection, &question, properties->segment_fd, "attached", packet, files, &file_count);
	attached->device = (uint32_t)number(answer, "device_number", UINT32_MAX);
	attached->queues = (uint32_t)number(answer, "queues", QUEUES_MAX);
	attached->depth = (uint32_t)number(answer, "depth", DEPTH_MAX);
	attached->epoch = (uint32_t)number(answer, "epoch", UINT32_MAX);
	attached->own_segment = (uint32_t)number(answer, "own_segment", UINT32_MAX);
	attached->size_bytes = number(answer, "size_bytes", INT64_MAX);
	attached->max_io_bytes = number(answer, "max_io_bytes", LONGEST_BYTES);
	read_token(answer, attached);
	read_addresses(answer, attached);
	map_segments(answer, attached, files, file_count);
	if (fcntl(attached->connection, F_SETFL, O_NONBLOCK))
		fail("O_NONBLOCK: %s", strerror(errno));
}

enum said hear_daemon(const struct attached *attached)
{
	static char packet[UBLKPOOL_PACKET_BYTES_MAX];
	unsigned file_count;
	struct json message;
	long bytes = receive_packet(attached->connection, packet, sizeof packet, NULL, 0, &file_count);

	if (bytes == 0 || (bytes < 0 && errno == ECONNRESET))
		return SAID_GONE;
	if (bytes < 0 || !json_parse(packet, (size_t)bytes, &message))
		return SAID_NOTHING;
	if (is_text(message, "type", "detach"))
		return SAID_DETACH;
	return is_text(message, "type", "live") ? SAID_LIVE : SAID_NOTHING;
}
