/*
 * The memory that two processes of one host share for one connection: a page of
 * words that both look at, and a stream of bytes each way.
 *
 * The initiator makes it, as a memfd that can neither shrink nor grow, and the
 * responder maps the same one. Neither trusts what the other writes there: an
 * end keeps its own position privately, checks the other's against the size of
 * the ring, and copies bytes out before it looks at them.
 *
 * Pure: no I/O, so that a test can be the peer from hell.
 */
#ifndef KVX_SOFT_SHM_RING_H
#define KVX_SOFT_SHM_RING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "frame.h"

#define SHM_RING_BYTES (512u << 10) /* of each direction; a power of two */
#define SHM_PAGE_BYTES 4096u
#define SHM_TOTAL_BYTES (SHM_PAGE_BYTES + 2 * SHM_RING_BYTES)

/*
 * One direction. Positions count bytes since the beginning and never wrap.
 *
 *   head         stored by the producer after the bytes; whoever loads it sees
 *                them
 *   tail         stored by the consumer after it has copied them
 *   data_wanted  enum shm_wish of a consumer that is about to sleep, room_wanted
 *                of a producer; whoever takes it back owes the sleeper a packet
 *
 * All four are sequentially consistent: one side stores its position and then
 * looks at the wish, the other stores its wish and then looks at the position,
 * and one of the two must see what the other stored.
 */
struct shm_pipe {
	_Alignas(64) _Atomic uint64_t head;
	_Alignas(64) _Atomic uint64_t tail;
	_Alignas(64) _Atomic uint32_t data_wanted;
	_Alignas(64) _Atomic uint32_t room_wanted;
};

struct shm_page {
	uint8_t nonce[FRAME_NONCE_BYTES]; /* what the hello says as well */
	/* The initiator stores 0 when the QP leaves RTS: what the responder
	 * executes or copies after that counts no more. */
	_Alignas(64) _Atomic uint64_t life;
	/* Packets that the initiator has sent about its regions: whoever sees a
	 * descriptor sees this as well, and reads them before he believes that
	 * he knows the region. */
	_Atomic uint64_t told;
	struct shm_pipe requests, answers;
};

_Static_assert(sizeof(struct shm_page) <= SHM_PAGE_BYTES, "layout of the page");

/* One end of one direction. Used by one thread at a time. */
struct shm_end {
	struct shm_pipe *pipe;
	uint8_t *bytes;
	uint64_t own; /* our position: the shared copy is for the peer */
#ifdef __SANITIZE_THREAD__
	uint64_t *words; /* shm_meet() */
#endif
};

/*
 * The thread sanitizer takes an address for a place. Where both ends are in one
 * process, which then has the page at two addresses, it does not see that what
 * one of them stores is what the other loads; so it is told, by two words that
 * both ends find by the same number. Which of the directions' two positions is
 * meant: 0 for head, 1 for tail.
 */
#ifdef __SANITIZE_THREAD__
#define SHM_WORDS 4096u /* a power of two; two rings seldom share one */
extern uint64_t shm_words[SHM_WORDS][2];
void __tsan_acquire(void *addr);
void __tsan_release(void *addr);

static inline void shm_meet(struct shm_end *end, uint64_t number)
{
	end->words = shm_words[number & (SHM_WORDS - 1)];
}

static inline void shm_told(const struct shm_end *end, int which)
{
	if (end->words)
		__tsan_release(&end->words[which]);
}

static inline void shm_heard(const struct shm_end *end, int which)
{
	if (end->words)
		__tsan_acquire(&end->words[which]);
}
#else
static inline void shm_meet(struct shm_end *end, uint64_t number)
{
	(void)end;
	(void)number;
}

static inline void shm_told(const struct shm_end *end, int which)
{
	(void)end;
	(void)which;
}

static inline void shm_heard(const struct shm_end *end, int which)
{
	(void)end;
	(void)which;
}
#endif

/* Bytes that the consumer may take, or -1: the peer's position is impossible. */
static inline int64_t shm_data(const struct shm_end *end)
{
	uint64_t head = atomic_load(&end->pipe->head);

	if (head != end->own)
		shm_heard(end, 0);
	return head - end->own > SHM_RING_BYTES ? -1 :
						  (int64_t)(head - end->own);
}

/* Bytes that the producer may put, or -1 as above: the consumer is done with
 * the room. */
static inline int64_t shm_room(const struct shm_end *end)
{
	uint64_t tail = atomic_load(&end->pipe->tail);

	shm_heard(end, 1);
	return end->own - tail > SHM_RING_BYTES ?
		       -1 :
		       (int64_t)(SHM_RING_BYTES - (end->own - tail));
}

/* The next n bytes (at most the ring) as one or two ranges; returns how many. */
static inline int shm_spans(const struct shm_end *end, uint64_t n,
			    struct iovec spans[2])
{
	uint64_t at = end->own & (SHM_RING_BYTES - 1);
	uint64_t first = SHM_RING_BYTES - at < n ? SHM_RING_BYTES - at : n;

	spans[0] = (struct iovec){ end->bytes + at, first };
	spans[1] = (struct iovec){ end->bytes, n - first };
	return n > first ? 2 : 1;
}

/* From little to much, but for the last, which an older peer takes for much: it
 * wakes too often then, and not too seldom. */
enum shm_wish {
	SHM_NOTHING = 0, /* awake: it will look */
	SHM_AWAITED,	 /* for what completes aloud, and for news */
	SHM_ANYTHING,
	SHM_NEWS, /* for more than an acknowledgement: the least of all */
};

static inline int shm_rank(uint32_t wish)
{
	switch (wish) {
	case SHM_NOTHING:
		return 0;
	case SHM_NEWS:
		return 1;
	case SHM_AWAITED:
		return 2;
	default:
		return 3;
	}
}

/* Take a sleeper's wish back. True: it sleeps, or is about to, and must be told
 * of what only a wish of at least that much is meant for. */
static inline bool shm_wanted(_Atomic uint32_t *wish, enum shm_wish least)
{
	return shm_rank(atomic_load(wish)) >= shm_rank(least) &&
	       atomic_exchange(wish, SHM_NOTHING);
}

/* About to sleep: after this, look once more. */
static inline void shm_want(_Atomic uint32_t *wish, enum shm_wish what)
{
	atomic_store(wish, what);
}

/* n bytes have been put. Whether the consumer has to be told: data_wanted. */
static inline void shm_put(struct shm_end *end, uint64_t n)
{
	end->own += n;
	shm_told(end, 0);
	atomic_store(&end->pipe->head, end->own);
}

/* n bytes have been taken. True: the producer sleeps. */
static inline bool shm_take(struct shm_end *end, uint64_t n)
{
	end->own += n;
	shm_told(end, 1);
	atomic_store(&end->pipe->tail, end->own);
	return shm_wanted(&end->pipe->room_wanted, SHM_NEWS);
}

#endif
