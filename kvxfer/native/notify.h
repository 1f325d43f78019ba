/*
 * The notification that travels behind the data of one operation.
 *
 * The initiator writes one record into the target's notify ring and then posts
 * a zero-byte WRITE_WITH_IMM on each QP that it used. Records start at
 * multiples of KVX_NOTIFY_ALIGN and never wrap: one that does not fit before
 * the end of the ring starts at its beginning, and the gap counts as used. The
 * immediate value is the record's offset in units of KVX_NOTIFY_ALIGN, so the
 * target finds the record without looking at memory that may still change.
 *
 * All fields are little-endian (both architectures that kvxfer supports are).
 */
#ifndef KVX_NOTIFY_H
#define KVX_NOTIFY_H

#include <stdint.h>
#include <string.h>

#define KVX_NOTIFY_ALIGN 64u
#define KVX_NOTIFY_MAGIC 0x314e564bu /* "KVN1" */
#define KVX_NOTIFY_MAX_REQUEST 256u

struct kvx_notify_record {
	uint32_t magic;
	uint32_t length;   /* header, request id, ids: unpadded */
	uint64_t sequence; /* of the operation on this connection, from 0 */
	uint64_t n_bytes;  /* data bytes that went before */
	uint32_t layer;
	uint32_t n_ids;
	uint16_t group;
	uint16_t n_qps; /* how many QPs carried data and an immediate */
	uint16_t request_bytes;
	uint16_t flags;	     /* 0 */
	uint64_t digest;     /* of the layer, with `total` alone; 0: none */
	uint64_t generation; /* of the offer that it fulfils; 0: none */
	uint64_t
		total; /* records of its layer under that offer; 0: more come */
	/* request id, padded to 8 bytes; then n_ids block ids, uint32 each */
};

_Static_assert(sizeof(struct kvx_notify_record) == 64, "record header");

static inline uint64_t kvx_pad(uint64_t length, uint64_t to)
{
	return (length + to - 1) & ~(to - 1);
}

static inline uint64_t kvx_notify_length(uint64_t request_bytes, uint64_t n_ids)
{
	return sizeof(struct kvx_notify_record) + kvx_pad(request_bytes, 8) +
	       4 * n_ids;
}

/*
 * The longest record of a ring. Whatever the ring's state, a record has to fit
 * once everything before it is consumed: besides its own length there is the gap
 * before it, which is shorter than the record, and the credit that the target
 * has not given back yet, since it does so in portions of a quarter.
 */
static inline uint64_t kvx_notify_limit(uint64_t ring_bytes)
{
	return ring_bytes / 4;
}

/*
 * Where a record of `length` bytes goes whose ring has been filled up to the
 * running position `head`: *start is the position of its first byte; returned
 * is the position behind it.
 */
static inline uint64_t kvx_notify_place(uint64_t head, uint64_t length,
					uint64_t ring_bytes, uint64_t *start)
{
	uint64_t padded = kvx_pad(length, KVX_NOTIFY_ALIGN);
	uint64_t offset = head % ring_bytes;

	if (offset + padded > ring_bytes)
		head += ring_bytes - offset;
	*start = head;
	return head + padded;
}

#endif
