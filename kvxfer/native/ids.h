/*
 * Block ids on their way in: copied once, checked as they are copied.
 *
 * The engine keeps ids as 32 bits: no cache has more blocks, and the records
 * that announce them have as many. What is checked is the copy, so whoever
 * owns the array may change it meanwhile.
 */
#ifndef KVX_IDS_H
#define KVX_IDS_H

#include <stddef.h>
#include <stdint.h>

/*
 * Copy n ids, each to be in [0, limit), limit <= 2^32. Returns n, or the
 * position of the first that is not. No branch on the way, so that compilers
 * can make vectors of it.
 */
static inline uint32_t kvx_take_ids64(uint32_t *restrict to,
				      const int64_t *restrict ids, uint32_t n,
				      uint64_t limit)
{
	const uint64_t last = limit - 1;
	uint64_t bad = 0;

	for (uint32_t i = 0; i < n; i++) {
		const uint64_t id = (uint64_t)ids[i];

		to[i] = (uint32_t)id;
		/* Its top bit: set if the id is negative, or above the last. */
		bad |= id | (last - id);
	}
	if (!(bad >> 63))
		return n;
	for (uint32_t i = 0; i < n; i++)
		if ((uint64_t)ids[i] >= limit)
			return i;
	return 0; /* changed under our eyes: refuse it */
}

static inline uint32_t kvx_take_ids32(uint32_t *restrict to,
				      const int32_t *restrict ids, uint32_t n,
				      uint64_t limit)
{
	const uint64_t last = limit - 1;
	uint64_t bad = 0;

	for (uint32_t i = 0; i < n; i++) {
		const uint64_t id = (uint64_t)(int64_t)ids[i];

		to[i] = (uint32_t)id;
		bad |= id | (last - id);
	}
	if (!(bad >> 63))
		return n;
	for (uint32_t i = 0; i < n; i++)
		if ((uint64_t)(int64_t)ids[i] >= limit)
			return i;
	return 0;
}

/*
 * Returns n, or the position of the first id that came before. `seen` has a bit
 * for each possible id and is all zero before and after.
 *
 * The word that is being looked at stays in a register, since the ids of a run
 * would wait for each other in memory.
 */
static inline uint32_t kvx_find_duplicate(uint64_t *seen, const uint32_t *ids,
					  uint32_t n)
{
	uint32_t at = n ? ids[0] >> 6 : 0;
	uint64_t word = n ? seen[at] : 0;
	uint32_t found = n;

	for (uint32_t i = 0; i < n; i++) {
		const uint32_t place = ids[i] >> 6;
		const uint64_t bit = (uint64_t)1 << (ids[i] & 63);

		if (place != at) {
			seen[at] = word;
			at = place;
			word = seen[at];
		}
		if (word & bit) {
			found = i;
			break;
		}
		word |= bit;
	}
	if (n)
		seen[at] = 0;
	for (uint32_t i = 0; i < found; i++)
		seen[ids[i] >> 6] = 0;
	return found;
}

#endif
