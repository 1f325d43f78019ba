/* Copying between lists of ranges. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef __x86_64__
#include <emmintrin.h>
#endif

#include "wire_shm.h"

#define LINE 64
/* How far ahead the beginnings of the next ranges are asked for: enough for the
 * memory to answer, few enough not to push out what is still to be copied. */
#define AHEAD 4
#define AHEAD_BYTES 512
/* Ranges of this size and more go around the cache: nobody on this CPU reads
 * them soon, and the lines need not be fetched before they are written. What goes
 * through a ring is read by the peer at once, and shorter pieces of it stay. */
#define STREAM_BYTES (2u << 10)
#define STREAM_RING_BYTES (16u << 10)

static void prefetch(const struct iovec *to, const struct iovec *from)
{
	size_t bytes = from->iov_len < AHEAD_BYTES ? from->iov_len :
						     AHEAD_BYTES;
	size_t i;

	for (i = 0; i < bytes; i += LINE)
		__builtin_prefetch((const char *)from->iov_base + i, 0, 0);
	bytes = to->iov_len < AHEAD_BYTES ? to->iov_len : AHEAD_BYTES;
	for (i = 0; i < bytes; i += LINE)
		__builtin_prefetch((const char *)to->iov_base + i, 1, 0);
}

static void ask_for_lines(const struct iovec *range, bool to_write)
{
	size_t i;

	for (i = 0; i < range->iov_len; i += LINE)
		if (to_write)
			__builtin_prefetch((char *)range->iov_base + i, 1, 2);
		else
			__builtin_prefetch((char *)range->iov_base + i, 0, 2);
}

size_t soft_ask_for(const struct iovec *ranges, int n, size_t bytes,
		    bool to_write)
{
	size_t done = 0;
	int i;

	for (i = 0; i < n && done < bytes; i++) {
		done += ranges[i].iov_len;
		if (ranges[i].iov_len < SOFT_SHORT_BYTES)
			ask_for_lines(&ranges[i], to_write);
	}
	return done;
}

#ifdef __x86_64__
static void copy_streaming(uint8_t *to, const uint8_t *from, size_t n)
{
	size_t head = -(uintptr_t)to & (LINE - 1), i;
	__m128i a, b, c, d;

	memcpy(to, from, head);
	to += head;
	from += head;
	n -= head;
	for (i = 0; i + LINE <= n; i += LINE) {
		__builtin_prefetch(from + i + 8 * LINE, 0, 0);
		a = _mm_loadu_si128((const __m128i *)(from + i));
		b = _mm_loadu_si128((const __m128i *)(from + i + 16));
		c = _mm_loadu_si128((const __m128i *)(from + i + 32));
		d = _mm_loadu_si128((const __m128i *)(from + i + 48));
		_mm_stream_si128((__m128i *)(to + i), a);
		_mm_stream_si128((__m128i *)(to + i + 16), b);
		_mm_stream_si128((__m128i *)(to + i + 32), c);
		_mm_stream_si128((__m128i *)(to + i + 48), d);
	}
	memcpy(to + i, from + i, n - i);
}
#endif

static void copy_range(uint8_t *to, const uint8_t *from, size_t n, size_t least)
{
#ifdef __x86_64__
	if (n >= least) {
		copy_streaming(to, from, n);
		return;
	}
#endif
	(void)least;
	memcpy(to, from, n);
}

static void ask_for(const struct soft_pairs *pairs, uint32_t i)
{
	if (i < pairs->n)
		prefetch(&pairs->to[i], &pairs->from[i]);
}

void soft_copy_pairs(void *job, uint32_t first, uint32_t end, bool down)
{
	const struct soft_pairs *pairs = job;
	uint32_t n = end - first, i, at;

	/* Elsewhere whoever copies these has asked for them with those before. */
	if (down ? end == pairs->n : first == 0)
		for (i = 0; i < AHEAD; i++)
			ask_for(pairs, down ? end - 1 - i : i);
	for (i = 0; i < n; i++) {
		at = down ? end - 1 - i : first + i;
		ask_for(pairs, down ? at - AHEAD : at + AHEAD);
		copy_range(pairs->to[at].iov_base, pairs->from[at].iov_base,
			   pairs->to[at].iov_len, STREAM_BYTES);
	}
#ifdef __x86_64__
	/* Whoever learns that the bytes are there must find them. */
	_mm_sfence();
#endif
}

size_t soft_copy(const struct iovec *to, int n_to, const struct iovec *from,
		 int n_from)
{
	size_t to_off = 0, from_off = 0, done = 0, part;
	int i = 0, j = 0;

	while (i < n_to && j < n_from) {
		if (i + AHEAD < n_to && j + AHEAD < n_from)
			prefetch(&to[i + AHEAD], &from[j + AHEAD]);
		part = to[i].iov_len - to_off;
		if (part > from[j].iov_len - from_off)
			part = from[j].iov_len - from_off;
		copy_range((uint8_t *)to[i].iov_base + to_off,
			   (const uint8_t *)from[j].iov_base + from_off, part,
			   STREAM_RING_BYTES);
		done += part;
		to_off += part;
		from_off += part;
		if (to_off == to[i].iov_len) {
			i++;
			to_off = 0;
		}
		if (from_off == from[j].iov_len) {
			j++;
			from_off = 0;
		}
	}
#ifdef __x86_64__
	/* Whoever learns that the bytes are there must find them. */
	_mm_sfence();
#endif
	return done;
}

ssize_t soft_copy_guarded(const struct iovec *to, int n_to,
			  const struct iovec *from, int n_from)
{
	/* The kernel notices what is not mapped and says so. */
	ssize_t done = process_vm_readv(getpid(), to, (unsigned long)n_to, from,
					(unsigned long)n_from, 0);

	/* Forbidden by a filter: then there is no guard to be had. */
	if (done < 0 && (errno == EPERM || errno == ENOSYS))
		return (ssize_t)soft_copy(to, n_to, from, n_from);
	return done;
}
