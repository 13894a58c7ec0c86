/* The wire's descriptor and numbers in C, for both ends; bufpool/wire/descriptors.py has the same in Python.
 * tests/unit/test_engine_native.py and test_abi.py compare the two, as each end was built. */
#ifndef UBLKPOOL_WIRE_H
#define UBLKPOOL_WIRE_H

#include <stddef.h>
#include <stdint.h>

enum {
	WIRE_REQUEST = 1,
	WIRE_PLACE = 2,
	WIRE_DATA = 3,
	WIRE_RELEASE = 4,
	WIRE_WELCOME = 5,
	WIRE_FENCE = 6,
	WIRE_PLACED = 16,
	WIRE_REJECT = 17,
	WIRE_DONE = 18,
	WIRE_HELLO = 19,
	WIRE_FENCED = 20,
	WIRE_POST = 21,
};
enum { WIRE_READ = 0, WIRE_WRITE = 1, WIRE_FLUSH = 2, WIRE_DISCARD = 3, WIRE_WRITE_ZEROES = 5 };
enum { WIRE_FUA = 1, WIRE_NOUNMAP = 2, WIRE_REGION = 4, WIRE_REPLAY = 8 };
enum { WIRE_FRAME_DESCRIPTORS_MAX = 4096, WIRE_CLIENT_SLICES_MAX = 16 };
enum { WIRE_SEGMENT_NONE = 0, WIRE_SEGMENT_POOL = 1 };
/* The first slice of the client area; backends' own segments count up from 2 and never get there. */
#define WIRE_SEGMENT_CLIENTS 0xfffffff0u

struct wire_descriptor {
	uint8_t kind, op;
	uint16_t flags;
	uint32_t device;
	uint16_t queue, tag;
	uint32_t epoch;
	uint64_t sequence, offset, length;
	int32_t result;
	uint32_t segment;
	uint64_t buffer, reserved;
};
_Static_assert(sizeof(struct wire_descriptor) == 64, "descriptor");
_Static_assert(offsetof(struct wire_descriptor, epoch) == 12, "descriptor");
_Static_assert(offsetof(struct wire_descriptor, result) == 40, "descriptor");
_Static_assert(offsetof(struct wire_descriptor, buffer) == 48, "descriptor");
#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire is little-endian"
#endif

#endif
