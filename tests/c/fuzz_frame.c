/*
 * The frame parser against anything.
 *
 * With clang: -fsanitize=fuzzer -DLIBFUZZER finds its own inputs. Without: the
 * main below mutates good frames for as many rounds as its argument says.
 * Besides not crashing, whatever is accepted must be true: lengths that add up,
 * ranges that do not wrap, messages that begin and end.
 */
#define _GNU_SOURCE
#include <string.h>

#include "../../kvxfer/softdev/frame.h"
#include "harness.h"

static void believe(const struct frame_header *header,
		    const struct frame_desc *desc, bool fetch,
		    const struct frame_message *before,
		    const struct frame_message *after)
{
	uint64_t sum = 0;
	bool open = before->open;
	uint32_t i;

	for (i = 0; i < header->n_desc; i++) {
		CHECK(desc[i].op >= OP_WRITE && desc[i].op <= OP_COMPARE_SWAP);
		CHECK(desc[i].raddr + desc[i].len >= desc[i].raddr);
		CHECK(desc[i].laddr + desc[i].len >= desc[i].laddr);
		CHECK(desc[i].len <= FRAME_MAX_MESSAGE);
		CHECK(open != !!(desc[i].flags & DESC_START));
		if (desc[i].flags & DESC_START) {
			CHECK(desc[i].total >= desc[i].len);
			CHECK(desc[i].total <= FRAME_MAX_MESSAGE);
		}
		/* The field of immediate data holds one thing at most. */
		CHECK(!(desc[i].flags & DESC_INV) ||
		      (desc[i].op == OP_SEND && desc[i].flags & DESC_END &&
		       !(desc[i].flags & DESC_IMM)));
		open = !(desc[i].flags & DESC_END);
		CHECK(fetch || !(desc[i].flags & DESC_FETCH));
		if (!frame_fetches(desc[i].op) && !(desc[i].flags & DESC_FETCH))
			sum += desc[i].len;
	}
	CHECK(open == after->open);
	CHECK(header->payload_len == sum);
	CHECK(header->payload_len <= FRAME_MAX_PAYLOAD);
	CHECK(after->remaining <= FRAME_MAX_MESSAGE);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	static struct frame_desc desc[FRAME_MAX_DESC];
	struct frame_message message = { 0 }, before;
	struct frame_header header;
	struct frame_hello hello;
	bool fetch = size & 1;
	size_t table;

	while (size >= FRAME_HEADER_BYTES) {
		if (frame_get_header(data, &header))
			break;
		data += FRAME_HEADER_BYTES;
		size -= FRAME_HEADER_BYTES;
		CHECK(header.n_desc <= FRAME_MAX_DESC);
		CHECK(header.payload_len <= FRAME_MAX_PAYLOAD);
		table = (size_t)header.n_desc * FRAME_DESC_BYTES;
		if (header.type == FRAME_HELLO && size >= FRAME_HELLO_BYTES)
			frame_get_hello(data, &hello);
		if (header.type == FRAME_REQUEST) {
			if (size < table)
				break;
			before = message;
			if (frame_get_table(data, &header, fetch, &message,
					    desc))
				break;
			believe(&header, desc, fetch, &before, &message);
		}
		if (size < table + header.payload_len)
			break;
		data += table + header.payload_len;
		size -= table + header.payload_len;
	}
	return 0;
}

#ifndef LIBFUZZER

static uint64_t state;

static uint32_t random_below(uint32_t n)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (uint32_t)(state >> 16) % n;
}

/* Numbers that sit on an edge. */
static uint32_t edge(void)
{
	static const uint32_t edges[] = { 0,
					  1,
					  2,
					  31,
					  32,
					  511,
					  512,
					  513,
					  FRAME_MAX_PAYLOAD,
					  FRAME_MAX_PAYLOAD + 1,
					  FRAME_MAX_MESSAGE,
					  FRAME_MAX_MESSAGE + 1,
					  0x7fffffff,
					  0x80000000,
					  0xffffffff };

	return edges[random_below(sizeof(edges) / sizeof(edges[0]))];
}

/* A WR of some descriptors, mostly well made. */
static uint32_t make_wr(struct frame_desc *desc, uint32_t room, bool fetch,
			uint64_t *sum)
{
	static const uint16_t ops[] = {
		OP_WRITE, OP_WRITE,	OP_SEND,
		OP_READ,  OP_FETCH_ADD, OP_COMPARE_SWAP
	};
	uint16_t op = ops[random_below(6)];
	uint32_t n = frame_fetches(op) ? 1 : 1 + random_below(3), i, total = 0;
	uint64_t at = op == OP_SEND ? 0 : random_below(1u << 30);

	if (n > room)
		n = room;
	for (i = 0; i < n; i++) {
		desc[i] = (struct frame_desc){ .op = op,
					       .len = random_below(300) };
		total += desc[i].len;
	}
	for (i = 0; i < n; i++) {
		desc[i].raddr = at;
		desc[i].rkey = op == OP_SEND ? 0 : 77;
		desc[i].total = total;
		desc[i].flags = (uint16_t)((i == 0 ? DESC_START : 0) |
					   (i == n - 1 ? DESC_END : 0));
		if (op != OP_SEND)
			at += desc[i].len;
		if (fetch && !frame_fetches(op) && random_below(2))
			desc[i].flags |= DESC_FETCH;
		else if (!frame_fetches(op))
			*sum += desc[i].len;
	}
	return n;
}

static size_t make_frame(uint8_t *out, bool fetch)
{
	static struct frame_desc desc[FRAME_MAX_DESC];
	struct frame_header header = { .type = FRAME_REQUEST };
	uint32_t want = 1 + random_below(6), i;
	uint64_t sum = 0;

	while (header.n_desc < want)
		header.n_desc += make_wr(desc + header.n_desc,
					 FRAME_MAX_DESC - header.n_desc, fetch,
					 &sum);
	header.payload_len = (uint32_t)sum;
	switch (random_below(12)) {
	case 0:
		header.type = (uint8_t)random_below(9);
		break;
	case 1:
		header.n_desc = edge();
		break;
	case 2:
		header.payload_len = edge();
		break;
	case 3:
		desc[random_below(header.n_desc)].len = edge();
		break;
	case 4:
		desc[random_below(header.n_desc)].raddr = UINT64_MAX -
							  random_below(1000);
		break;
	case 5:
		desc[random_below(header.n_desc)].flags = (uint16_t)
			random_below(65);
		break;
	}
	frame_put_header(out, &header);
	out += FRAME_HEADER_BYTES;
	for (i = 0; i < header.n_desc && i < FRAME_MAX_DESC; i++)
		frame_put_desc(out + i * FRAME_DESC_BYTES, &desc[i]);
	return FRAME_HEADER_BYTES + i * FRAME_DESC_BYTES + sum;
}

int main(int argc, char **argv)
{
	static uint8_t work[1u << 20];
	unsigned long rounds = argc > 1 ? strtoul(argv[1], NULL, 10) : 300000;
	unsigned long round;
	size_t size;
	uint8_t *exact;
	uint32_t i, n;

	for (round = 1; round <= rounds; round++) {
		state = round * 0x9e3779b97f4a7c15u;
		size = make_frame(work, round & 1);
		if (size % 2 != (round & 1)) /* the parity says: fetch */
			size++;
		n = random_below(4) == 0 ? random_below(6) : 0;
		for (i = 0; i < n; i++)
			work[random_below((uint32_t)size)] ^=
				(uint8_t)(1u << random_below(8));
		if (random_below(8) == 0)
			size -= random_below((uint32_t)size) & ~1u;
		/* Exactly as long as said, so that a byte too far is seen. */
		exact = malloc(size ? size : 1);
		memcpy(exact, work, size);
		LLVMFuzzerTestOneInput(exact, size);
		free(exact);
	}
	printf("fuzz: %lu frames: ok\n", rounds);
	return 0;
}
#endif
