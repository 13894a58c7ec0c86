/* JSON packets of at most 64 KiB: what the attach socket needs and no more.
 *
 * json_parse() judges a whole text; after that a value is a piece of it, and nothing is allocated. */
#ifndef EXAMPLE_JSON_H
#define EXAMPLE_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A value in a text that json_parse() has accepted; it lives as long as the text. */
struct json {
	const char *at, *end;
};

/* Whether the text is one JSON value and nothing else, nested at most JSON_DEPTH_MAX deep. */
bool json_parse(const char *text, size_t bytes, struct json *value);

/* The member of an object; false if `object` is none or has no such member. */
bool json_member(struct json object, const char *name, struct json *value);

/* The next element of an array: begin with `element` all zero.  False at the end, and for anything but an array. */
bool json_next(struct json array, struct json *element);

/* A string, decoded, with a 0 at its end; false if it is none, has a 0 inside, or does not fit `room`. */
bool json_text(struct json value, char *to, size_t room);

/* An integer from 0 to `most`. */
bool json_number(struct json value, uint64_t most, uint64_t *to);

bool json_is_true(struct json value);

/* A text of JSON that is being written into a buffer; `overflowed` if that was too small. */
struct json_out {
	char *at;
	size_t room, used;
	bool overflowed;
};

void json_write(struct json_out *out, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A string with its quotes; what is not printable ASCII becomes a question mark. */
void json_write_text(struct json_out *out, const char *text);

#endif
