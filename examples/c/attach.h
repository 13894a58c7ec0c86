/* The attach socket: learn about a device, attach to it, map its memory.  Every error ends the program with one line.
 */
#ifndef EXAMPLE_ATTACH_H
#define EXAMPLE_ATTACH_H

#include <stdbool.h>
#include <stdint.h>

#include "ublkpool.h"

enum { SOCKET_PATH_BYTES = 128, PATH_BYTES = 4096, TOKEN_TEXT_BYTES = 2 * UBLKPOOL_TOKEN_BYTES + 1 };

/* Prints the line and exits with status 1. */
_Noreturn void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The device before the attach. */
struct described {
	uint64_t size_bytes; /* 0: it takes the backend's */
	uint64_t max_io_bytes;
	bool places_in_backend, read_only;
	bool has_identities; /* the daemon knows `identity` and `may_create` */
	bool may_create;
};

/* What the backend says of itself. */
struct properties {
	uint64_t size_bytes;
	uint32_t logical_block_bytes;
	bool read_only;
	const char *identity, *store;
	int segment_fd; /* -1: none */
	uint64_t segment_bytes;
};

struct segment {
	uint32_t number;
	uint64_t bytes;
	uint8_t *memory;
};

struct queue_address {
	char endpoint[SOCKET_PATH_BYTES]; /* for ZeroMQ */
	char ring[108];                   /* a unix socket, as long as sun_path; empty: this daemon offers no rings */
};

struct attached {
	int connection;
	uint32_t device, queues, depth, epoch, own_segment;
	uint64_t size_bytes, max_io_bytes;
	uint8_t token[UBLKPOOL_TOKEN_BYTES];
	char token_text[TOKEN_TEXT_BYTES];
	struct queue_address *addresses;
	struct segment segments[UBLKPOOL_SEGMENTS_MAX];
	unsigned segment_count;
};

void describe_device(const char *run_dir, const char *device, struct described *described);

void attach_to_device(const char *run_dir, const char *device, const char *kind, const struct properties *properties,
		      struct attached *attached);

/* What the daemon says on the attach connection. */
enum said { SAID_NOTHING, SAID_LIVE, SAID_DETACH, SAID_GONE };
enum said hear_daemon(const struct attached *attached);

/* Receives one packet of JSON, with at most `files_max` descriptors.  The number of bytes; 0: the connection has ended;
 * -1: nothing has come (or the connection was reset, errno ECONNRESET). */
long receive_packet(int connection, char *packet, unsigned room, int *files, unsigned files_max, unsigned *file_count);

/* Maps a descriptor, shared and writable, and closes it.  The file must have that many bytes, and be sealed against
 * shrinking: an access beyond its end would be a SIGBUS. */
uint8_t *map_file(int file, uint64_t bytes);

#endif
