/*
 * Whether ranges that are to be written overlap. WRITEs of one QP land in order:
 * where two of them go to the same place, the later one counts. So only what is
 * known to go to different places may be copied in any order. (Nobody may look for
 * bytes before a completion has told of them.)
 *
 * A place is an address. Memory that a process has mapped at two is two places.
 *
 * Pure: no I/O, no locks.
 */
#ifndef KVX_SOFT_DISJOINT_H
#define KVX_SOFT_DISJOINT_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#define DISJOINT_SLOTS 2048u /* a power of two */

/* Memory for the check; zero before the first. */
struct soft_marks {
	uint64_t slots[DISJOINT_SLOTS];
	uint32_t round; /* whose marks count; others are as good as none */
};

/* True: no two of the n ranges, of which none is empty, share a byte. False: some do,
 * or it would take too long to know, as with many ranges of few bytes or of sizes that
 * do not fit. */
bool soft_are_disjoint(struct soft_marks *marks, const struct iovec *ranges,
		       uint32_t n);

#endif
