/*
 * What a backend of ublkpool in C needs: include this one.  docs/PROTOCOL.md says how it is used, examples/c has two
 * backends that do.
 *
 * The descriptors are in wire.h, the rings in shared_ring.h; workers and the Python SDK are built from the same two
 * files.  Here is the rest: the numbers of the JSON packets on the attach socket.  C11, little-endian machines; no
 * library, and no function that makes a system call.
 */
#ifndef UBLKPOOL_H
#define UBLKPOOL_H

#include "shared_ring.h"
#include "wire.h"

#define UBLKPOOL_RUN_DIR "/run/ublkpool"
#define UBLKPOOL_ATTACH_SOCKET "attach.sock"

enum {
	UBLKPOOL_PROTOCOL_VERSION = 1,
	UBLKPOOL_PACKET_BYTES_MAX = 65536, /* of a packet on the attach socket, either way */
	UBLKPOOL_TOKEN_BYTES = 16,
	UBLKPOOL_SEGMENTS_MAX = 1 + WIRE_CLIENT_SLICES_MAX, /* descriptors that come with `attached` */
	UBLKPOOL_RING_FILES = 3,                            /* descriptors that come with `ring_open` */
};

#endif
