/* Do ranges overlap? disjoint.h has the idea. */
#include <string.h>

#include "disjoint.h"

#define MAX_UNITS (DISJOINT_SLOTS / 2) /* so that a free slot is never far */
#define MIN_UNIT 256u
#define ROUND_BITS 24 /* of a slot; the rest is the number of a unit */
#define MAX_SPAN (1ull << (63 - ROUND_BITS)) /* in units */

/*
 * All ranges are made of units of one size, which are numbered from the lowest on;
 * a unit that is met twice is an overlap. Blocks of one size in one region are such
 * units themselves, and runs of them are several.
 */
struct units {
	uint64_t base; /* where some range begins */
	uint64_t end;  /* where all are over */
	uint64_t size;
	int shift; /* size is 1 << shift; -1: it is no power of two */
};

static uint64_t gcd(uint64_t a, uint64_t b)
{
	uint64_t rest;

	while (b) {
		rest = a % b;
		a = b;
		b = rest;
	}
	return a;
}

static void set_size(struct units *units, uint64_t size)
{
	units->size = size;
	units->shift = size & (size - 1) ? -1 : __builtin_ctzll(size);
}

static bool fits(const struct units *units, uint64_t bytes)
{
	return units->shift < 0 ? bytes % units->size == 0 :
				  !(bytes & (units->size - 1));
}

static uint64_t count(const struct units *units, uint64_t bytes)
{
	return units->shift < 0 ? bytes / units->size : bytes >> units->shift;
}

/* Find the largest unit. False: it is too small, or there are too many. */
static bool find_units(struct units *units, const struct iovec *ranges,
		       uint32_t n)
{
	uint64_t low = UINT64_MAX, high = 0, bytes = 0, from, length;
	uint32_t i;

	units->base = (uintptr_t)ranges[0].iov_base;
	set_size(units, ranges[0].iov_len);
	for (i = 0; i < n; i++) {
		length = ranges[i].iov_len;
		from = (uintptr_t)ranges[i].iov_base;
		bytes += length;
		low = from < low ? from : low;
		high = from + length > high ? from + length : high;
		from = from > units->base ? from - units->base :
					    units->base - from;
		if (!fits(units, length) || !fits(units, from))
			set_size(units, gcd(gcd(units->size, length), from));
		if (units->size < MIN_UNIT)
			return false;
	}
	units->base = low;
	units->end = high;
	return count(units, bytes) <= MAX_UNITS &&
	       count(units, high - low) < MAX_SPAN;
}

/* Mark one unit. False: it was marked before. */
static bool mark(struct soft_marks *marks, uint64_t unit)
{
	uint64_t word = unit << ROUND_BITS | marks->round;
	uint64_t at = unit * 0x9e3779b97f4a7c15u >> 40;

	for (;; at++) {
		at &= DISJOINT_SLOTS - 1;
		if (marks->slots[at] == word)
			return false;
		if ((marks->slots[at] & ((1u << ROUND_BITS) - 1)) !=
		    marks->round)
			break;
	}
	marks->slots[at] = word;
	return true;
}

static void begin_round(struct soft_marks *marks)
{
	marks->round = (marks->round + 1) & ((1u << ROUND_BITS) - 1);
	if (marks->round == 0) {
		memset(marks->slots, 0, sizeof(marks->slots));
		marks->round = 1;
	}
}

/* Behind the blocks of a message often comes what announces them: of another size,
 * and in memory of its own. It needs no mark then, and no unit. */
static bool ends_apart(struct units *units, const struct iovec *ranges,
		       uint32_t n)
{
	const struct iovec *last = &ranges[n - 1];
	uint64_t from = (uintptr_t)last->iov_base;

	return last->iov_len != ranges[0].iov_len &&
	       find_units(units, ranges, n - 1) &&
	       (from >= units->end || from + last->iov_len <= units->base);
}

bool soft_are_disjoint(struct soft_marks *marks, const struct iovec *ranges,
		       uint32_t n)
{
	struct units units;
	uint64_t unit, end;
	uint32_t i;

	if (n < 2)
		return true;
	if (ends_apart(&units, ranges, n))
		n--;
	else if (!find_units(&units, ranges, n))
		return false;
	begin_round(marks);
	for (i = 0; i < n; i++) {
		unit = count(&units,
			     (uintptr_t)ranges[i].iov_base - units.base);
		end = unit + count(&units, ranges[i].iov_len);
		for (; unit < end; unit++)
			if (!mark(marks, unit))
				return false;
	}
	return true;
}
