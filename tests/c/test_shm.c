/*
 * The shm wire against a peer from hell: it speaks the protocol well enough to
 * be taken up, and then writes into the rings and the socket what it likes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "../../kvxfer/softdev/context.h"
#include "../../kvxfer/softdev/frame.h"
#include "../../kvxfer/softdev/qp.h"
#include "../../kvxfer/softdev/wire_shm.h"
#include "harness.h"

#define REGION_MAGIC 0x5246564bu

static const uint32_t QPN = 0x123456, PSN = 77;

/* What a connection of ours to the victim's QP consists of. */
struct villain {
	struct end end; /* the victim */
	int fd, ring_fd;
	struct shm_page *page;
	uint8_t *requests;
	struct shm_end out;
};

struct region {
	uint32_t magic, slot;
	uint64_t offset, length;
};

static int call(const union ibv_gid *gid)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char *at = address.sun_path + 1;
	int i, fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	at += sprintf(at, "kvxfer-");
	for (i = 0; i < 16; i++)
		at += sprintf(at, "%02x", gid->raw[i]);
	CHECK(!connect(fd, (struct sockaddr *)&address,
		       (socklen_t)(at - (char *)&address)));
	return fd;
}

static void send_packet(int fd, const void *data, size_t size, int passed)
{
	struct iovec iov = { (void *)data, size };

	CHECK(soft_local_send(fd, &iov, 1, passed) == (ssize_t)size ||
	      errno == EPIPE || errno == ECONNRESET);
}

static void say_hello(struct villain *v, int ring_fd)
{
	uint8_t raw[FRAME_HEADER_BYTES + FRAME_HELLO_BYTES];
	struct frame_header header = { .type = FRAME_HELLO,
				       .payload_len = FRAME_HELLO_BYTES };
	struct frame_hello hello = { .src_qpn = QPN,
				     .dst_qpn = v->end.qp->qp_num,
				     .psn = PSN,
				     .wires = 1u << WIRE_SHM };

	memcpy(hello.src_gid, v->end.gid.raw, 16);
	memcpy(hello.dst_gid, v->end.gid.raw, 16);
	memset(hello.nonce, 7, sizeof(hello.nonce));
	if (v->page) {
		memcpy(v->page->nonce, hello.nonce, sizeof(hello.nonce));
		atomic_store(&v->page->life, 0x0707070707070707u);
	}
	frame_put_header(raw, &header);
	frame_put_hello(raw + FRAME_HEADER_BYTES, &hello);
	send_packet(v->fd, raw, sizeof(raw), ring_fd);
}

/* What the victim answers: enum frame_answer, or 0 when it hangs up. */
static uint32_t answer(struct villain *v)
{
	uint8_t raw[FRAME_HEADER_BYTES];
	struct frame_header header;

	if (recv(v->fd, raw, sizeof(raw), 0) != sizeof(raw))
		return 0;
	CHECK(!frame_get_header(raw, &header));
	CHECK(header.type == FRAME_WELCOME);
	return header.arg;
}

static void begin(struct villain *v)
{
	static const struct options options = { 0 };
	struct card us = { .qpn = QPN, .psn = PSN };
	uint8_t *memory;

	memset(v, 0, sizeof(*v));
	open_end(&v->end, &options);
	us.gid = v->end.gid;
	connect_end(&v->end, &us, &options);
	CHECK(!post_recv(&v->end, 1, 0, 64));
	v->fd = call(&v->end.gid);
	v->ring_fd = memfd_create("hell", MFD_ALLOW_SEALING);
	CHECK(!ftruncate(v->ring_fd, SHM_TOTAL_BYTES));
	memory = mmap(NULL, SHM_TOTAL_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED,
		      v->ring_fd, 0);
	CHECK(memory != MAP_FAILED);
	v->page = (struct shm_page *)memory;
	v->requests = memory + SHM_PAGE_BYTES;
	v->out = (struct shm_end){
		.pipe = &v->page->requests,
		.bytes = v->requests,
	};
}

static void finish(struct villain *v)
{
	munmap(v->page, SHM_TOTAL_BYTES);
	close(v->ring_fd);
	close(v->fd);
	close_end(&v->end);
	no_objects_left();
}

static void seal(int fd)
{
	CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK));
}

/* The victim hangs up, and no byte of its memory has changed. */
static void expect_hang_up(struct villain *v)
{
	char byte;
	size_t i;

	send_packet(v->fd, "", 1, -1); /* in case that it sleeps */
	while (recv(v->fd, &byte, 1, 0) > 0)
		;
	for (i = 0; i < v->end.size; i++)
		CHECK(v->end.buffer[i] == 0);
	finish(v);
}

/* Memory that can be taken away, that is too short, or that is none. */
static void bad_rings(void)
{
	struct villain v;
	int fd;

	begin(&v); /* not sealed */
	say_hello(&v, v.ring_fd);
	CHECK(answer(&v) == ANSWER_REFUSED);
	finish(&v);

	begin(&v);
	fd = memfd_create("short", MFD_ALLOW_SEALING);
	CHECK(!ftruncate(fd, SHM_TOTAL_BYTES - 1));
	seal(fd);
	say_hello(&v, fd);
	CHECK(answer(&v) == ANSWER_REFUSED);
	close(fd);
	finish(&v);

	begin(&v);
	say_hello(&v, v.fd);
	CHECK(answer(&v) == ANSWER_REFUSED);
	finish(&v);

	begin(&v);
	say_hello(&v, -1);
	CHECK(answer(&v) == ANSWER_REFUSED);
	finish(&v);
}

static void come_up(struct villain *v)
{
	begin(v);
	seal(v->ring_fd);
	say_hello(v, v->ring_fd);
	CHECK(answer(v) == ANSWER_OK);
}

static void put(struct villain *v, const void *data, size_t size)
{
	struct iovec from = { (void *)data, size }, spans[2];
	int n = shm_spans(&v->out, size, spans);

	CHECK(soft_copy(spans, n, &from, 1) == size);
	shm_put(&v->out, size);
}

/* One WRITE of len bytes whose source is named so. */
static void put_write(struct villain *v, uint64_t laddr, uint32_t len)
{
	uint8_t raw[FRAME_HEADER_BYTES + FRAME_DESC_BYTES];
	struct frame_header header = { .type = FRAME_REQUEST, .n_desc = 1 };
	struct frame_desc desc = { .raddr = (uintptr_t)v->end.buffer,
				   .laddr = laddr,
				   .rkey = v->end.mr->rkey,
				   .len = len,
				   .op = OP_WRITE,
				   .flags = DESC_START | DESC_END |
					    DESC_FETCH };

	frame_put_header(raw, &header);
	frame_put_desc(raw + FRAME_HEADER_BYTES, &desc);
	put(v, raw, sizeof(raw));
}

/* --- acknowledgements ------------------------------------------------------ */

/* Put n frames at once, each a WRITE of len bytes, and count what they are answered
 * with. */
static unsigned int answers_to(uint32_t n, uint32_t len, uint16_t flags)
{
	const size_t size = FRAME_HEADER_BYTES + FRAME_DESC_BYTES;
	struct region region = { REGION_MAGIC, 0, 0, 1 << 20 };
	struct frame_header header = { .type = FRAME_REQUEST,
				       .flags = flags,
				       .n_desc = 1 };
	uint8_t *raw = malloc(n * size), *answers;
	unsigned int found = 0;
	struct frame_desc desc;
	struct villain v;
	int fd;

	come_up(&v);
	fd = sealed_memory(1 << 20);
	send_packet(v.fd, &region, sizeof(region), fd);
	atomic_fetch_add(&v.page->told, 1);
	close(fd);
	desc = (struct frame_desc){ .raddr = (uintptr_t)v.end.buffer,
				    .rkey = v.end.mr->rkey,
				    .len = len,
				    .op = OP_WRITE,
				    .flags = DESC_START | DESC_END };
	if (len)
		desc.flags |= DESC_FETCH;
	for (header.seq = 0; header.seq < n; header.seq++) {
		frame_put_header(raw + header.seq * size, &header);
		frame_put_desc(raw + header.seq * size + FRAME_HEADER_BYTES,
			       &desc);
	}
	put(&v, raw, n * size);
	send_packet(v.fd, "", 1, -1);
	answers = v.requests + SHM_RING_BYTES;
	for (header.seq = 0; header.seq < n; found++) {
		while (atomic_load(&v.page->answers.head) <
		       (found + 1) * FRAME_HEADER_BYTES)
			CHECK(v.page);
		CHECK(!frame_get_header(answers + found * FRAME_HEADER_BYTES,
					&header));
		CHECK(header.type == FRAME_ACK);
	}
	free(raw);
	finish(&v);
	return found;
}

/* In the middle of a stream only who wants to hear of it is told, unless much was
 * written since. */
static void few_acknowledgements(void)
{
	const uint32_t n = 40;
	unsigned int found, least = n;
	int i;

	/* A thread without a processor for a while says that it is alive. */
	for (i = 0; i < 20; i++) {
		found = answers_to(n, 0, 0);
		least = found < least ? found : least;
	}
	CHECK(least == 1);
	CHECK(answers_to(n, 0, REQUEST_ACK) >= n / 4);
	CHECK(answers_to(n, 1 << 20, 0) >= n / 4);
}

/* Who has used up most of his send queue says that he wants to hear. */
static void full_queues_want_to_hear(void)
{
	const int n = 1024;
	struct ibv_wc *wc = calloc((size_t)n, sizeof(*wc));
	struct soft_context *theirs;
	struct frame_header header;
	struct ibv_send_wr wr;
	struct soft_shm *shm;
	struct ibv_sge sge;
	uint64_t at, begin;
	bool not_asked = false;
	struct end a, b;
	struct card to;
	int i;

	make_pair(&a, &b,
		  &(struct options){ .send_wr = 1024, .sig_all = true });
	to = card_of(&b);
	wr = write_wr(&a, &to, &sge, 0, 0, 8);
	CHECK(!post_one(&a, &wr)); /* the wire is up behind it */
	reap(&a, wc, 1);
	theirs = to_context(b.context);
	soft_lock(theirs); /* nothing is executed meanwhile */
	shm = to_qp(a.qp)->out->shm;
	begin = at = atomic_load(&shm->page->requests.head);
	for (i = 0; i < n; i++)
		CHECK(!post_one(&a, &wr));
	CHECK(begin + n * (FRAME_HEADER_BYTES + FRAME_DESC_BYTES) <
	      SHM_RING_BYTES); /* so that nothing lies across its end */
	soft_lock(to_context(a.context));
	while (soft_unsent(to_qp(a.qp))) {
		soft_unlock(to_context(a.context));
		sched_yield();
		soft_lock(to_context(a.context));
	}
	for (i = 0; i < n; i += (int)header.n_desc) {
		CHECK(!frame_get_header(shm->out.bytes + at, &header));
		CHECK(header.type == FRAME_REQUEST && header.n_desc > 0);
		not_asked |= header.flags == 0;
		if (i + (int)header.n_desc > n / 4 * 3 + 64)
			CHECK(header.flags == REQUEST_ACK);
		at += FRAME_HEADER_BYTES + header.n_desc * FRAME_DESC_BYTES;
	}
	soft_unlock(to_context(a.context));
	soft_unlock(theirs);
	CHECK(not_asked);
	reap(&a, wc, n);
	for (i = 0; i < n; i++)
		CHECK(wc[i].status == IBV_WC_SUCCESS);
	free(wc);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

static void bad_positions(void)
{
	static const uint64_t heads[] = { SHM_RING_BYTES + 1, UINT64_MAX / 2,
					  1ull << 63 };
	struct villain v;
	size_t i;

	for (i = 0; i < sizeof(heads) / sizeof(heads[0]); i++) {
		come_up(&v);
		atomic_store(&v.page->requests.head, heads[i]);
		expect_hang_up(&v);
		come_up(&v);
		/* The answers' side: found when there is something to say. */
		atomic_store(&v.page->answers.tail, heads[i]);
		put_write(&v, 0, 0);
		expect_hang_up(&v);
	}
}

static void noise(void)
{
	uint8_t bytes[8192];
	struct villain v;
	int i;

	for (i = 0; i < 20; i++) {
		come_up(&v);
		fill_random(bytes, sizeof(bytes));
		put(&v, bytes, sizeof(bytes));
		expect_hang_up(&v);
	}
}

/* Packets that are no regions, or regions that are not to be had. */
static void bad_packets(void)
{
	struct region good = { REGION_MAGIC, 0, 0, 4096 }, bad;
	struct villain v;
	int fd;

	come_up(&v);
	send_packet(v.fd, "what?", 5, -1);
	expect_hang_up(&v);

	come_up(&v);
	bad = good;
	bad.slot = SHM_MAX_REGIONS;
	send_packet(v.fd, &bad, sizeof(bad), v.ring_fd);
	expect_hang_up(&v);

	come_up(&v);
	bad = good;
	bad.length = UINT64_MAX;
	send_packet(v.fd, &bad, sizeof(bad), v.ring_fd);
	expect_hang_up(&v);

	come_up(&v);
	bad = good;
	bad.offset = UINT64_MAX - 100;
	send_packet(v.fd, &bad, sizeof(bad), v.ring_fd);
	expect_hang_up(&v);

	come_up(&v);
	fd = memfd_create("open", MFD_ALLOW_SEALING); /* may be cut short */
	CHECK(!ftruncate(fd, 4096));
	send_packet(v.fd, &good, sizeof(good), fd);
	close(fd);
	expect_hang_up(&v);

	come_up(&v);
	send_packet(v.fd, &good, sizeof(good), -1);
	expect_hang_up(&v);
}

/* Sources outside of what was shared; and one inside, so that the test tests. */
static void bad_sources(void)
{
	static const uint64_t names[] = {
		1ull << SHM_SLOT_SHIFT, /* no such region */
		(uint64_t)SHM_MAX_REGIONS << SHM_SLOT_SHIFT,
		8193,	   /* behind its end */
		8192 - 99, /* across it */
		(1ull << SHM_SLOT_SHIFT) - 1,
	};
	struct region region = { REGION_MAGIC, 0, 0, 8192 };
	struct frame_header header;
	uint8_t raw[FRAME_HEADER_BYTES], *answers;
	struct villain v;
	size_t i;
	int fd;

	for (i = 0; i <= sizeof(names) / sizeof(names[0]); i++) {
		come_up(&v);
		fd = sealed_memory(8192);
		CHECK(pwrite(fd, "x", 1, 8192 - 100) == 1);
		send_packet(v.fd, &region, sizeof(region), fd);
		atomic_fetch_add(&v.page->told, 1);
		close(fd);
		put_write(&v, i ? names[i - 1] : 8192 - 100, 100);
		send_packet(v.fd, "", 1, -1);
		while (atomic_load(&v.page->answers.head) < sizeof(raw))
			CHECK(v.page);
		answers = v.requests + SHM_RING_BYTES;
		memcpy(raw, answers, sizeof(raw));
		CHECK(!frame_get_header(raw, &header));
		CHECK(header.type == (i ? FRAME_NAK : FRAME_ACK));
		CHECK(v.end.buffer[0] == (i ? 0 : 'x'));
		CHECK(v.end.buffer[1] == 0);
		finish(&v);
	}
}

/* A life that has ended: what is still in the ring is not executed. */
static void dead_man(void)
{
	struct villain v;

	come_up(&v);
	atomic_store(&v.page->life, 0);
	put_write(&v, 0, 0);
	expect_hang_up(&v);
}

/* The next region takes the place of the last one, whose bytes are never sent
 * for its own, however late the news comes to the responder. */
static void replaced_regions(void)
{
	struct end a, b;
	struct card to;
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_mr *mr;
	struct ibv_wc wc;
	uint8_t *memory;
	int i, fd;

	make_pair(&a, &b, NULL);
	to = card_of(&b);
	for (i = 0; i < 300; i++) {
		fd = sealed_memory(4096);
		memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED,
			      fd, 0);
		CHECK(memory != MAP_FAILED);
		memset(memory, 1 + i % 200, 4096);
		mr = verbs.reg_mr_fd(a.pd, fd, 0, memory, 4096, 0);
		CHECK(mr);
		wr = write_wr(&a, &to, &sge, 0, 0, 4096);
		sge.addr = (uintptr_t)memory;
		sge.lkey = mr->lkey;
		CHECK(!post_one(&a, &wr));
		reap(&a, &wc, 1);
		CHECK(wc.status == IBV_WC_SUCCESS);
		CHECK(!memcmp(b.buffer, memory, 4096));
		CHECK(!verbs.dereg_mr(mr));
		munmap(memory, 4096);
		close(fd);
	}
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

int main(void)
{
	const char *wire = getenv("KVXFER_SOFT_WIRE");

	if (!wire || strcmp(wire, "shm")) {
		puts("shm: this wire has no rings");
		return 0;
	}
	bad_rings();
	few_acknowledgements();
	full_queues_want_to_hear();
	bad_positions();
	noise();
	bad_packets();
	bad_sources();
	dead_man();
	replaced_regions();
	puts("shm: ok");
	return 0;
}
