#include "json.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { JSON_DEPTH_MAX = 16 };

static const char *skip_value(const char *at, const char *end, unsigned depth);

static const char *skip_space(const char *at, const char *end)
{
	while (at < end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r'))
		at++;
	return at;
}

static int hex_digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* Four hexadecimal digits; -1 if they are none. */
static int32_t hex_four(const char *at, const char *end)
{
	int32_t value = 0;

	if (end - at < 4)
		return -1;
	for (int i = 0; i < 4; i++) {
		int digit = hex_digit(at[i]);
		if (digit < 0)
			return -1;
		value = value * 16 + digit;
	}
	return value;
}

/* Each skip_...() returns what comes after the thing at `at`, NULL if there is no such thing. */
static const char *skip_text(const char *at, const char *end)
{
	if (at == end || *at != '"')
		return NULL;
	for (at++; at < end && *at != '"'; at++) {
		if ((unsigned char)*at < 0x20)
			return NULL;
		if (*at != '\\')
			continue;
		if (++at == end)
			return NULL;
		if (*at == 'u' && hex_four(at + 1, end) < 0)
			return NULL;
		if (!*at || !strchr("\"\\/bfnrtu", *at))
			return NULL;
	}
	return at < end ? at + 1 : NULL;
}

static const char *skip_digits(const char *at, const char *end)
{
	const char *first = at;

	while (at < end && *at >= '0' && *at <= '9')
		at++;
	return at > first ? at : NULL;
}

static const char *skip_number(const char *at, const char *end)
{
	const char *first;

	if (at < end && *at == '-')
		at++;
	first = at;
	at = skip_digits(at, end);
	if (!at || (*first == '0' && at > first + 1))
		return NULL;
	if (at < end && *at == '.')
		at = skip_digits(at + 1, end);
	if (at && at < end && (*at == 'e' || *at == 'E')) {
		at++;
		if (at < end && (*at == '+' || *at == '-'))
			at++;
		at = skip_digits(at, end);
	}
	return at;
}

static const char *skip_word(const char *at, const char *end, const char *word)
{
	size_t length = strlen(word);

	return (size_t)(end - at) >= length && !memcmp(at, word, length) ? at + length : NULL;
}

static const char *skip_member(const char *at, const char *end, unsigned depth)
{
	at = skip_text(at, end);
	at = at ? skip_space(at, end) : NULL;
	if (!at || at == end || *at != ':')
		return NULL;
	return skip_value(skip_space(at + 1, end), end, depth);
}

/* An array or an object, from its bracket on. */
static const char *skip_nest(const char *at, const char *end, unsigned depth)
{
	bool is_object = *at == '{';
	char close = is_object ? '}' : ']';

	at = skip_space(at + 1, end);
	if (at < end && *at == close)
		return at + 1;
	for (;;) {
		at = is_object ? skip_member(at, end, depth) : skip_value(at, end, depth);
		at = at ? skip_space(at, end) : NULL;
		if (!at || at == end || (*at != ',' && *at != close))
			return NULL;
		if (*at == close)
			return at + 1;
		at = skip_space(at + 1, end);
	}
}

static const char *skip_value(const char *at, const char *end, unsigned depth)
{
	if (at == end || depth == JSON_DEPTH_MAX)
		return NULL;
	switch (*at) {
	case '{':
	case '[':
		return skip_nest(at, end, depth + 1);
	case '"':
		return skip_text(at, end);
	case 't':
		return skip_word(at, end, "true");
	case 'f':
		return skip_word(at, end, "false");
	case 'n':
		return skip_word(at, end, "null");
	default:
		return skip_number(at, end);
	}
}

bool json_parse(const char *text, size_t bytes, struct json *value)
{
	const char *end = text + bytes;

	value->at = skip_space(text, end);
	value->end = skip_value(value->at, end, 0);
	return value->end && skip_space(value->end, end) == end;
}

/* For the parts of a text that json_parse() has accepted: there is always such a thing. */
static const char *after(const char *skipped, const char *end) { return skipped ? skipped : end; }

bool json_member(struct json object, const char *name, struct json *value)
{
	char found[64];
	const char *at;

	if (object.at == object.end || *object.at != '{')
		return false;
	at = skip_space(object.at + 1, object.end);
	while (at < object.end && *at == '"') {
		struct json key = { at, after(skip_text(at, object.end), object.end) };

		at = skip_space(skip_space(key.end, object.end) + 1, object.end); /* the colon */
		*value = (struct json){ at, after(skip_value(at, object.end, 0), object.end) };
		if (json_text(key, found, sizeof found) && !strcmp(found, name))
			return true;
		at = skip_space(skip_space(value->end, object.end) + 1, object.end); /* the comma or the brace */
	}
	return false;
}

bool json_next(struct json array, struct json *element)
{
	const char *at;

	if (array.at == array.end || *array.at != '[')
		return false;
	at = skip_space(element->end ? element->end : array.at, array.end);
	if (*at == ']')
		return false;
	at = skip_space(at + 1, array.end); /* the comma or the bracket */
	if (*at == ']')
		return false;
	*element = (struct json){ at, after(skip_value(at, array.end, 0), array.end) };
	return true;
}

/* A character after a backslash, but for `u`. */
static char unescaped(char c)
{
	static const char from[] = "bfnrt", to[] = "\b\f\n\r\t";
	const char *found = strchr(from, c);

	if (found)
		c = to[found - from];
	return c;
}

/* UTF-8; the number of bytes. */
static size_t encode(uint32_t c, uint8_t *to)
{
	if (c < 0x80) {
		to[0] = (uint8_t)c;
		return 1;
	}
	if (c < 0x800) {
		to[0] = (uint8_t)(0xc0 | c >> 6);
		to[1] = (uint8_t)(0x80 | (c & 0x3f));
		return 2;
	}
	if (c < 0x10000) {
		to[0] = (uint8_t)(0xe0 | c >> 12);
		to[1] = (uint8_t)(0x80 | (c >> 6 & 0x3f));
		to[2] = (uint8_t)(0x80 | (c & 0x3f));
		return 3;
	}
	to[0] = (uint8_t)(0xf0 | c >> 18);
	to[1] = (uint8_t)(0x80 | (c >> 12 & 0x3f));
	to[2] = (uint8_t)(0x80 | (c >> 6 & 0x3f));
	to[3] = (uint8_t)(0x80 | (c & 0x3f));
	return 4;
}

/* The four digits at *at, with those of the second half of a pair; moves *at to the last digit. */
static uint32_t code_point(const char **at, const char *end)
{
	uint32_t first = (uint32_t)hex_four(*at, end);
	int32_t second;

	*at += 3;
	if (first < 0xd800 || first > 0xdbff || end - *at < 7 || (*at)[1] != '\\' || (*at)[2] != 'u')
		return first;
	second = hex_four(*at + 3, end);
	if (second < 0xdc00 || second > 0xdfff)
		return first;
	*at += 6;
	return 0x10000 + ((first - 0xd800) << 10) + ((uint32_t)second - 0xdc00);
}

/* The character at *at, decoded; moves *at to its last byte.  The number of bytes. */
static size_t decode(const char **at, const char *end, char *to)
{
	*to = **at;
	if (**at != '\\')
		return 1;
	*to = unescaped(*++*at);
	if (**at != 'u')
		return 1;
	++*at;
	return encode(code_point(at, end), (uint8_t *)to);
}

bool json_text(struct json value, char *to, size_t room)
{
	size_t used = 0;

	if (value.at == value.end || *value.at != '"')
		return false;
	for (const char *at = value.at + 1; at < value.end - 1; at++) {
		char piece[4];
		size_t bytes = decode(&at, value.end - 1, piece);

		if (used + bytes >= room)
			return false;
		memcpy(to + used, piece, bytes);
		used += bytes;
	}
	to[used] = 0;
	return strlen(to) == used;
}

bool json_number(struct json value, uint64_t most, uint64_t *to)
{
	uint64_t number = 0;

	if (value.at == value.end)
		return false;
	for (const char *at = value.at; at < value.end; at++) {
		uint64_t digit = (uint64_t)((unsigned char)*at - '0');
		if (digit > 9 || number > (UINT64_MAX - digit) / 10)
			return false;
		number = number * 10 + digit;
	}
	*to = number;
	return number <= most;
}

bool json_is_true(struct json value) { return value.end - value.at == 4 && *value.at == 't'; }

void json_write(struct json_out *out, const char *format, ...)
{
	size_t left = out->room - out->used;
	va_list arguments;
	int length;

	va_start(arguments, format);
	length = vsnprintf(out->at + out->used, left, format, arguments);
	va_end(arguments);
	if (length < 0 || (size_t)length >= left)
		out->overflowed = true;
	else
		out->used += (size_t)length;
}

void json_write_text(struct json_out *out, const char *text)
{
	json_write(out, "\"");
	for (; *text; text++) {
		bool is_plain = *text >= 0x20 && *text < 0x7f;
		json_write(out, *text == '"' || *text == '\\' ? "\\%c" : "%c", is_plain ? *text : '?');
	}
	json_write(out, "\"");
}
