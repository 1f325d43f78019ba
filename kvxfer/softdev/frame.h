/*
 * What travels between two software devices: layout, encoding, decoding.
 *
 * Pure: bytes in, a checked struct or an error out. No I/O, no allocation, no
 * state but what the caller hands in, so that a fuzzer reaches all of it.
 * Everything on the wire is little-endian at fixed offsets.
 *
 * A connection carries one QP's requests one way and the answers to them the
 * other way:
 *
 *   initiator -> responder   HELLO, then REQUEST frames
 *   responder -> initiator   WELCOME, then ACK, NAK, READ_RESP, BUSY frames
 *
 * A REQUEST is a header, n_desc descriptors and the payload, back to back, of
 * those WRITE and SEND descriptors that are not marked FETCH. A WR is one or
 * more descriptors, the first marked START and the last END, and may span
 * frames.
 */
#ifndef KVX_SOFT_FRAME_H
#define KVX_SOFT_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FRAME_MAGIC 0x5846564bu /* "KVFX" */
#define FRAME_VERSION 1

#define FRAME_HEADER_BYTES 32u
#define FRAME_DESC_BYTES 32u
#define FRAME_HELLO_BYTES 192u
#define FRAME_MAX_DESC 1023u /* with a nonce, what process_vm_readv takes */
#define FRAME_ATOMIC_BYTES 8u
#define FRAME_MAX_PAYLOAD (4u << 20)
#define FRAME_MAX_MESSAGE (1u << 30)
#define FRAME_NONCE_BYTES 16u
#define FRAME_TOKEN_BYTES 32u
#define FRAME_TABLE_BYTES (FRAME_MAX_DESC * FRAME_DESC_BYTES)

enum frame_type {
	FRAME_HELLO = 1, /* n_desc 0, payload = struct frame_hello */
	FRAME_WELCOME,	 /* arg = enum frame_answer, seq = wire or pid */
	FRAME_REQUEST,	 /* seq = WR of the first descriptor */
	FRAME_ACK,	 /* seq = first WR that is not done yet */
	FRAME_NAK, /* seq = failed WR, arg = ibv_wc_status, flags = vendor */
	FRAME_READ_RESP, /* seq = WR, payload = its next bytes */
	FRAME_BUSY,	 /* no receive: seq as in ACK, arg = wait in us */
};

/* What the responder says to a HELLO. */
enum frame_answer {
	ANSWER_OK = 1,	  /* seq = enum frame_wire */
	ANSWER_NOT_READY, /* no such QP in the right state: come back later */
	ANSWER_REFUSED,	  /* wrong token, or no wire in common */
	ANSWER_TRACE_ME,  /* cma needs a prctl(PR_SET_PTRACER, seq) first */
};

enum frame_wire { WIRE_NONE = 0, WIRE_TCP = 1, WIRE_CMA = 2, WIRE_SHM = 3 };

/* FRAME_WELCOME flags: the errno for which the responder cannot read the
 * initiator's memory although both are on one host, or 0. */

/* FRAME_REQUEST flags; older responders do not look at them. */
#define REQUEST_ACK 1u /* wants an acknowledgement soon, as BTH's AckReq */

/* FRAME_READ_RESP flags */
#define RESP_END 1u /* these are the last bytes of the READ */

enum frame_op {
	OP_WRITE = 1,
	OP_SEND = 2,
	OP_READ = 3,
	OP_FETCH_ADD = 4,
	OP_COMPARE_SWAP = 5,
};

static inline bool frame_is_atomic(uint16_t op)
{
	return op == OP_FETCH_ADD || op == OP_COMPARE_SWAP;
}

/* Brings bytes back and carries none: READs and atomics. */
static inline bool frame_fetches(uint16_t op)
{
	return op == OP_READ || frame_is_atomic(op);
}

/* struct frame_desc flags */
#define DESC_START 1u	  /* first descriptor of its WR */
#define DESC_END 2u	  /* last descriptor of its WR */
#define DESC_IMM 4u	  /* imm is valid on the END descriptor */
#define DESC_SOLICITED 8u /* on END: the receive completion is solicited */
#define DESC_FETCH 16u	  /* bytes are to be had at laddr, none follow */
#define DESC_SIGNALED 32u /* on END: somebody waits for the acknowledgement */
#define DESC_INV 64u	  /* on END of a SEND: imm is the rkey to invalidate */
#define DESC_FLAGS 127u

enum frame_error {
	FRAME_OK = 0,
	FRAME_BAD_MAGIC,
	FRAME_BAD_VERSION,
	FRAME_BAD_CHECKSUM,
	FRAME_BAD_TYPE,
	FRAME_BAD_COUNT,
	FRAME_BAD_LENGTH,
	FRAME_BAD_OP,
	FRAME_BAD_FLAGS,
	FRAME_BAD_RANGE,
	FRAME_BAD_ORDER,
};

struct frame_header {
	uint8_t type;
	uint16_t flags;
	uint32_t n_desc;
	uint32_t payload_len; /* bytes after header and descriptors */
	uint32_t arg;
	uint64_t seq;
};

struct frame_desc {
	uint64_t raddr; /* in the responder's memory; 0 for SEND */
	uint64_t
		laddr; /* FETCH: in the initiator's memory, as the wire has it */
	uint32_t rkey;
	uint32_t len;
	uint16_t op;
	uint16_t flags;
	uint32_t imm;	  /* END with IMM or INV: as the application gave it */
	uint32_t total;	  /* START: bytes of the whole WR; decoded, see below */
	uint64_t operand; /* atomic: what to add or to put there */
	uint64_t compare; /* COMPARE_SWAP: with what */
};

/*
 * On the wire a descriptor has one 32-bit field for imm and total: total on a
 * START that is not END, imm on END. A WR of one descriptor has total = len.
 *
 * An atomic is one descriptor and its length is always FRAME_ATOMIC_BYTES, so
 * that operand goes into the place of laddr and compare into those of len and
 * imm.
 */

/* The WR that a REQUEST stream is in the middle of. */
struct frame_message {
	bool open;
	uint16_t op;
	uint32_t rkey;
	uint64_t next_raddr;
	uint64_t remaining;
};

struct frame_hello {
	uint32_t src_qpn, dst_qpn;
	uint32_t psn;
	uint32_t wires; /* bit mask of 1 << enum frame_wire */
	uint8_t src_gid[16], dst_gid[16];
	uint8_t token[FRAME_TOKEN_BYTES];
	uint32_t rnr_retry;
	uint32_t pid;
	uint64_t pid_ns;     /* inode of /proc/self/ns/pid */
	uint64_t first_seq;  /* of the next WR */
	uint64_t nonce_addr; /* where the initiator keeps the nonce */
	uint8_t nonce[FRAME_NONCE_BYTES];
};

void frame_put_header(uint8_t out[FRAME_HEADER_BYTES],
		      const struct frame_header *header);
enum frame_error frame_get_header(const uint8_t in[FRAME_HEADER_BYTES],
				  struct frame_header *header);

void frame_put_desc(uint8_t out[FRAME_DESC_BYTES],
		    const struct frame_desc *desc);

/* The same for a WRITE that is one descriptor; flags: those of desc.flags that it
 * has beside START and END. */
void frame_put_write(uint8_t out[FRAME_DESC_BYTES], uint64_t raddr,
		     uint64_t laddr, uint32_t rkey, uint32_t len,
		     uint16_t flags);

/*
 * Decode and check the descriptor table of a REQUEST.
 *
 * in: header->n_desc * FRAME_DESC_BYTES bytes. fetch: whether descriptors may be
 * marked FETCH; on the tcp wire nothing can be fetched. message: where the stream
 * was; updated only on FRAME_OK. desc: room for FRAME_MAX_DESC.
 */
enum frame_error frame_get_table(const uint8_t *in,
				 const struct frame_header *header, bool fetch,
				 struct frame_message *message,
				 struct frame_desc *desc);

void frame_put_hello(uint8_t out[FRAME_HELLO_BYTES],
		     const struct frame_hello *hello);
void frame_get_hello(const uint8_t in[FRAME_HELLO_BYTES],
		     struct frame_hello *hello);

#endif
