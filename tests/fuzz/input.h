/* A fuzzer's input, read as a sequence of numbers; zeros follow its end. */
#ifndef FUZZ_INPUT_H
#define FUZZ_INPUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wire.h"

/* Ends the run as a finding. */
#define MUST(condition)                                                                            \
	do {                                                                                       \
		if (!(condition)) {                                                                \
			fprintf(stderr, "%s:%d: must hold: %s\n", __FILE__, __LINE__, #condition); \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

struct input {
	const uint8_t *at;
	size_t left;
};

static inline uint64_t input_number(struct input *in, size_t bytes)
{
	uint64_t number = 0;
	size_t count = bytes < in->left ? bytes : in->left;

	memcpy(&number, in->at, count);
	in->at += count;
	in->left -= count;
	return number;
}

static inline uint8_t input_byte(struct input *in) { return (uint8_t)input_number(in, 1); }

static inline bool input_bit(struct input *in) { return input_byte(in) & 1; }

/* A number below `limit`. */
static inline unsigned input_below(struct input *in, unsigned limit) { return input_byte(in) % limit; }

/* A value near `old`, an extreme value, or any value. */
static inline uint64_t input_value(struct input *in, uint64_t old, unsigned bytes)
{
	static const uint64_t corners[] = { 0, 1, UINT64_MAX, 1ull << 63, INT64_MAX, 1ull << 31, INT32_MAX, 4096 };

	switch (input_below(in, 4)) {
	case 0:
		return old + (uint64_t)(int8_t)input_byte(in);
	case 1:
		return old + ((uint64_t)(int8_t)input_byte(in) << 9);
	case 2:
		return corners[input_below(in, sizeof corners / sizeof *corners)];
	default:
		return input_number(in, bytes);
	}
}

/* Changes one field of a descriptor. */
static inline void input_spoil_field(struct input *in, struct wire_descriptor *d)
{
	static const struct {
		uint8_t at, bytes;
	} fields[] = {
		{ offsetof(struct wire_descriptor, kind), 1 },   { offsetof(struct wire_descriptor, op), 1 },
		{ offsetof(struct wire_descriptor, flags), 2 },  { offsetof(struct wire_descriptor, device), 4 },
		{ offsetof(struct wire_descriptor, queue), 2 },  { offsetof(struct wire_descriptor, tag), 2 },
		{ offsetof(struct wire_descriptor, epoch), 4 },  { offsetof(struct wire_descriptor, sequence), 8 },
		{ offsetof(struct wire_descriptor, offset), 8 }, { offsetof(struct wire_descriptor, length), 8 },
		{ offsetof(struct wire_descriptor, result), 4 }, { offsetof(struct wire_descriptor, segment), 4 },
		{ offsetof(struct wire_descriptor, buffer), 8 }, { offsetof(struct wire_descriptor, reserved), 8 },
	};
	unsigned field = input_below(in, sizeof fields / sizeof *fields);
	uint8_t *at = (uint8_t *)d + fields[field].at;
	uint64_t value = 0;

	memcpy(&value, at, fields[field].bytes);
	value = input_value(in, value, fields[field].bytes);
	memcpy(at, &value, fields[field].bytes);
}

/* Changes up to three fields. */
static inline void input_spoil(struct input *in, struct wire_descriptor *d)
{
	for (unsigned changes = input_below(in, 4); changes; changes--)
		input_spoil_field(in, d);
}

#endif
