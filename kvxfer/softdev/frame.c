/* Encode and decode frames: frame.h says what they mean. */
#include "frame.h"

#include <endian.h>
#include <string.h>

/* Offsets of the header's fields. */
enum {
	H_MAGIC = 0,
	H_VERSION = 4,
	H_TYPE = 5,
	H_FLAGS = 6,
	H_N_DESC = 8,
	H_PAYLOAD = 12,
	H_SEQ = 16,
	H_ARG = 24,
	H_CHECKSUM = 28,
};

/* Offsets of a descriptor's fields. */
enum {
	D_RADDR = 0,
	D_LADDR = 8,
	D_RKEY = 16,
	D_LEN = 20,
	D_OP = 24,
	D_FLAGS = 26,
	D_IMM = 28,
};

/* Offsets of the hello's fields. */
enum {
	L_SRC_QPN = 0,
	L_DST_QPN = 4,
	L_PSN = 8,
	L_WIRES = 12,
	L_SRC_GID = 16,
	L_DST_GID = 32,
	L_TOKEN = 48,
	L_RNR_RETRY = 80,
	L_PID = 84,
	L_PID_NS = 88,
	L_FIRST_SEQ = 96,
	L_NONCE_ADDR = 104,
	L_NONCE = 112,
	L_END = 128, /* the rest is zero: room for a later version */
};

_Static_assert(H_CHECKSUM + 4 == FRAME_HEADER_BYTES, "header layout");
_Static_assert(D_IMM + 4 == FRAME_DESC_BYTES, "descriptor layout");
_Static_assert(L_END <= FRAME_HELLO_BYTES, "hello layout");

static void put16(uint8_t *out, uint16_t value)
{
	value = htole16(value);
	memcpy(out, &value, sizeof(value));
}

static void put32(uint8_t *out, uint32_t value)
{
	value = htole32(value);
	memcpy(out, &value, sizeof(value));
}

static void put64(uint8_t *out, uint64_t value)
{
	value = htole64(value);
	memcpy(out, &value, sizeof(value));
}

static uint16_t get16(const uint8_t *in)
{
	uint16_t value;

	memcpy(&value, in, sizeof(value));
	return le16toh(value);
}

static uint32_t get32(const uint8_t *in)
{
	uint32_t value;

	memcpy(&value, in, sizeof(value));
	return le32toh(value);
}

static uint64_t get64(const uint8_t *in)
{
	uint64_t value;

	memcpy(&value, in, sizeof(value));
	return le64toh(value);
}

/*
 * TCP's own checksum guards against noise; this one is against a stream that
 * has lost its place, so a multiplicative hash does as well as a CRC would.
 */
static uint32_t checksum(const uint8_t *in)
{
	uint64_t hash = 0x9e3779b97f4a7c15u;
	size_t at;

	for (at = 0; at < H_CHECKSUM; at += 4) {
		hash = (hash ^ get32(in + at)) * 0xff51afd7ed558ccdu;
		hash ^= hash >> 32;
	}
	return (uint32_t)hash;
}

void frame_put_header(uint8_t out[FRAME_HEADER_BYTES],
		      const struct frame_header *header)
{
	put32(out + H_MAGIC, FRAME_MAGIC);
	out[H_VERSION] = FRAME_VERSION;
	out[H_TYPE] = header->type;
	put16(out + H_FLAGS, header->flags);
	put32(out + H_N_DESC, header->n_desc);
	put32(out + H_PAYLOAD, header->payload_len);
	put64(out + H_SEQ, header->seq);
	put32(out + H_ARG, header->arg);
	put32(out + H_CHECKSUM, checksum(out));
}

static enum frame_error check_counts(const struct frame_header *header)
{
	bool is_request = header->type == FRAME_REQUEST;

	if (is_request != (header->n_desc > 0) ||
	    header->n_desc > FRAME_MAX_DESC)
		return FRAME_BAD_COUNT;
	if (header->payload_len > FRAME_MAX_PAYLOAD)
		return FRAME_BAD_LENGTH;

	switch (header->type) {
	case FRAME_HELLO:
		if (header->payload_len != FRAME_HELLO_BYTES)
			return FRAME_BAD_LENGTH;
		break;
	case FRAME_READ_RESP:
		/* An empty one would never end a READ of some length. */
		if (header->flags & ~RESP_END)
			return FRAME_BAD_FLAGS;
		if (header->payload_len == 0 && !(header->flags & RESP_END))
			return FRAME_BAD_LENGTH;
		break;
	case FRAME_REQUEST:
		break;
	case FRAME_WELCOME:
	case FRAME_ACK:
	case FRAME_NAK:
	case FRAME_BUSY:
		if (header->payload_len)
			return FRAME_BAD_LENGTH;
		break;
	default:
		return FRAME_BAD_TYPE;
	}
	return FRAME_OK;
}

enum frame_error frame_get_header(const uint8_t in[FRAME_HEADER_BYTES],
				  struct frame_header *header)
{
	if (get32(in + H_MAGIC) != FRAME_MAGIC)
		return FRAME_BAD_MAGIC;
	if (in[H_VERSION] != FRAME_VERSION)
		return FRAME_BAD_VERSION;
	if (get32(in + H_CHECKSUM) != checksum(in))
		return FRAME_BAD_CHECKSUM;

	header->type = in[H_TYPE];
	header->flags = get16(in + H_FLAGS);
	header->n_desc = get32(in + H_N_DESC);
	header->payload_len = get32(in + H_PAYLOAD);
	header->seq = get64(in + H_SEQ);
	header->arg = get32(in + H_ARG);
	return check_counts(header);
}

void frame_put_desc(uint8_t out[FRAME_DESC_BYTES],
		    const struct frame_desc *desc)
{
	bool head_only = (desc->flags & (DESC_START | DESC_END)) == DESC_START;

	put64(out + D_RADDR, desc->raddr);
	put32(out + D_RKEY, desc->rkey);
	put16(out + D_OP, desc->op);
	put16(out + D_FLAGS, desc->flags);
	if (frame_is_atomic(desc->op)) {
		put64(out + D_LADDR, desc->operand);
		put32(out + D_LEN, (uint32_t)desc->compare);
		put32(out + D_IMM, (uint32_t)(desc->compare >> 32));
		return;
	}
	put64(out + D_LADDR, desc->laddr);
	put32(out + D_LEN, desc->len);
	put32(out + D_IMM, head_only ? desc->total : desc->imm);
}

void frame_put_write(uint8_t out[FRAME_DESC_BYTES], uint64_t raddr,
		     uint64_t laddr, uint32_t rkey, uint32_t len,
		     uint16_t flags)
{
	put64(out + D_RADDR, raddr);
	put64(out + D_LADDR, laddr);
	put32(out + D_RKEY, rkey);
	put32(out + D_LEN, len);
	put16(out + D_OP, OP_WRITE);
	put16(out + D_FLAGS, flags | DESC_START | DESC_END);
	put32(out + D_IMM, 0);
}

static void get_atomic(const uint8_t *in, struct frame_desc *desc)
{
	desc->operand = get64(in + D_LADDR);
	desc->compare = get32(in + D_LEN) | (uint64_t)get32(in + D_IMM) << 32;
	desc->laddr = 0;
	desc->imm = 0;
	desc->len = desc->total = FRAME_ATOMIC_BYTES;
}

static void get_desc(const uint8_t *in, struct frame_desc *desc)
{
	uint32_t field = get32(in + D_IMM);

	desc->raddr = get64(in + D_RADDR);
	desc->laddr = get64(in + D_LADDR);
	desc->rkey = get32(in + D_RKEY);
	desc->len = get32(in + D_LEN);
	desc->op = get16(in + D_OP);
	desc->flags = get16(in + D_FLAGS);
	desc->imm = desc->flags & DESC_END ? field : 0;
	desc->total = 0;
	if (desc->flags & DESC_START)
		desc->total = desc->flags & DESC_END ? desc->len : field;
	desc->operand = desc->compare = 0;
	if (frame_is_atomic(desc->op))
		get_atomic(in, desc);
}

/* What a descriptor may be by itself. */
static enum frame_error check_desc(const struct frame_desc *desc)
{
	if (desc->flags & ~DESC_FLAGS)
		return FRAME_BAD_FLAGS;
	if ((desc->flags &
	     (DESC_IMM | DESC_SOLICITED | DESC_SIGNALED | DESC_INV)) &&
	    !(desc->flags & DESC_END))
		return FRAME_BAD_FLAGS;
	if (desc->flags & DESC_INV &&
	    (desc->op != OP_SEND || desc->flags & DESC_IMM))
		return FRAME_BAD_FLAGS;
	if (desc->len > FRAME_MAX_MESSAGE || desc->total > FRAME_MAX_MESSAGE)
		return FRAME_BAD_LENGTH;
	if (desc->raddr > UINT64_MAX - FRAME_MAX_MESSAGE ||
	    desc->laddr > UINT64_MAX - FRAME_MAX_MESSAGE)
		return FRAME_BAD_RANGE;

	switch (desc->op) {
	case OP_WRITE:
		return FRAME_OK;
	case OP_SEND:
		return desc->raddr || desc->rkey ? FRAME_BAD_RANGE : FRAME_OK;
	case OP_READ:
	case OP_FETCH_ADD:
	case OP_COMPARE_SWAP:
		if ((desc->flags & ~(DESC_SOLICITED | DESC_SIGNALED)) !=
		    (DESC_START | DESC_END))
			return FRAME_BAD_FLAGS;
		return FRAME_OK;
	default:
		return FRAME_BAD_OP;
	}
}

/* A WR of one descriptor, and nothing wrong with it; most are that. */
static bool is_good_write(const struct frame_desc *desc)
{
	const uint16_t whole = DESC_START | DESC_END | DESC_FETCH;

	return desc->op == OP_WRITE && (desc->flags & whole) == whole &&
	       !(desc->flags & ~(DESC_FLAGS & ~DESC_INV)) &&
	       desc->len <= FRAME_MAX_MESSAGE &&
	       desc->raddr <= UINT64_MAX - FRAME_MAX_MESSAGE &&
	       desc->laddr <= UINT64_MAX - FRAME_MAX_MESSAGE;
}

/* What it may be after what came before it. */
static enum frame_error follow(struct frame_message *message,
			       const struct frame_desc *desc)
{
	if (desc->flags & DESC_START) {
		if (message->open)
			return FRAME_BAD_ORDER;
		message->open = true;
		message->op = desc->op;
		message->rkey = desc->rkey;
		message->next_raddr = desc->raddr;
		message->remaining = desc->total;
	}
	if (!message->open || message->op != desc->op ||
	    message->rkey != desc->rkey)
		return FRAME_BAD_ORDER;
	if (desc->op == OP_WRITE && desc->raddr != message->next_raddr)
		return FRAME_BAD_ORDER;
	if (desc->len > message->remaining)
		return FRAME_BAD_LENGTH;

	message->next_raddr += desc->len;
	message->remaining -= desc->len;
	if (desc->flags & DESC_END) {
		if (message->remaining)
			return FRAME_BAD_LENGTH;
		message->open = false;
	}
	return FRAME_OK;
}

enum frame_error frame_get_table(const uint8_t *in,
				 const struct frame_header *header, bool fetch,
				 struct frame_message *message,
				 struct frame_desc *desc)
{
	struct frame_message after = *message;
	enum frame_error error;
	uint64_t sum = 0;
	uint32_t i;

	if (header->n_desc == 0 || header->n_desc > FRAME_MAX_DESC)
		return FRAME_BAD_COUNT;
	for (i = 0; i < header->n_desc; i++) {
		get_desc(in + (size_t)i * FRAME_DESC_BYTES, &desc[i]);
		if (fetch && !after.open && is_good_write(&desc[i]))
			continue;
		error = check_desc(&desc[i]);
		if (!error && desc[i].flags & DESC_FETCH && !fetch)
			error = FRAME_BAD_FLAGS;
		if (!error)
			error = follow(&after, &desc[i]);
		if (error)
			return error;
		if (!frame_fetches(desc[i].op) && !(desc[i].flags & DESC_FETCH))
			sum += desc[i].len;
	}
	if (header->payload_len != sum)
		return FRAME_BAD_LENGTH;

	*message = after;
	return FRAME_OK;
}

void frame_put_hello(uint8_t out[FRAME_HELLO_BYTES],
		     const struct frame_hello *hello)
{
	memset(out, 0, FRAME_HELLO_BYTES);
	put32(out + L_SRC_QPN, hello->src_qpn);
	put32(out + L_DST_QPN, hello->dst_qpn);
	put32(out + L_PSN, hello->psn);
	put32(out + L_WIRES, hello->wires);
	memcpy(out + L_SRC_GID, hello->src_gid, sizeof(hello->src_gid));
	memcpy(out + L_DST_GID, hello->dst_gid, sizeof(hello->dst_gid));
	memcpy(out + L_TOKEN, hello->token, sizeof(hello->token));
	put32(out + L_RNR_RETRY, hello->rnr_retry);
	put32(out + L_PID, hello->pid);
	put64(out + L_PID_NS, hello->pid_ns);
	put64(out + L_FIRST_SEQ, hello->first_seq);
	put64(out + L_NONCE_ADDR, hello->nonce_addr);
	memcpy(out + L_NONCE, hello->nonce, sizeof(hello->nonce));
}

void frame_get_hello(const uint8_t in[FRAME_HELLO_BYTES],
		     struct frame_hello *hello)
{
	hello->src_qpn = get32(in + L_SRC_QPN);
	hello->dst_qpn = get32(in + L_DST_QPN);
	hello->psn = get32(in + L_PSN);
	hello->wires = get32(in + L_WIRES);
	memcpy(hello->src_gid, in + L_SRC_GID, sizeof(hello->src_gid));
	memcpy(hello->dst_gid, in + L_DST_GID, sizeof(hello->dst_gid));
	memcpy(hello->token, in + L_TOKEN, sizeof(hello->token));
	hello->rnr_retry = get32(in + L_RNR_RETRY);
	hello->pid = get32(in + L_PID);
	hello->pid_ns = get64(in + L_PID_NS);
	hello->first_seq = get64(in + L_FIRST_SEQ);
	hello->nonce_addr = get64(in + L_NONCE_ADDR);
	memcpy(hello->nonce, in + L_NONCE, sizeof(hello->nonce));
}
