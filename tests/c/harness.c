#define _GNU_SOURCE
#include "harness.h"

#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

struct kvx_verbs_table verbs;

uint64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000 + (uint64_t)now.tv_nsec / 1000000;
}

void fill_random(uint8_t *at, size_t size)
{
	static uint64_t state = 88172645463325252u;
	size_t i;

	for (i = 0; i < size; i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		at[i] = (uint8_t)state;
	}
}

static int given(int value, int standard)
{
	return value == -1 ? 0 : value ? value : standard;
}

static bool on_shm(void)
{
	const char *wire = getenv("KVXFER_SOFT_WIRE");

	return wire && !strcmp(wire, "shm");
}

int sealed_memory(size_t size)
{
	int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	CHECK(fd >= 0 && !ftruncate(fd, (off_t)size));
	CHECK(!fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW));
	return fd;
}

uint8_t *map_aligned(int fd, size_t size)
{
	int flags = fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
	const size_t huge = 2u << 20;
	uint8_t *all = mmap(NULL, size + huge, PROT_NONE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	uint8_t *at = (uint8_t *)(((uintptr_t)all + huge - 1) & -huge);

	CHECK(all != MAP_FAILED);
	CHECK(mmap(at, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd,
		   0) == at);
	munmap(all, (size_t)(at - all));
	munmap(at + size, (size_t)(all + huge - at));
	return at;
}

static void map_buffer(struct end *end, bool shared)
{
	end->fd = shared ? sealed_memory(end->size) : -1;
	end->buffer = map_aligned(end->fd, end->size);
}

void open_end(struct end *end, const struct options *options)
{
	struct ibv_qp_init_attr init = { .qp_type = IBV_QPT_RC };
	struct ibv_device **list;

	if (!verbs.name)
		kvx_load_softdev(&verbs);
	memset(end, 0, sizeof(*end));
	list = verbs.get_device_list(NULL);
	end->context = verbs.open_device(list[0], options->address, NULL);
	verbs.free_device_list(list);
	CHECK(end->context);
	CHECK(!verbs.query_gid(end->context, 1, 0, &end->gid));
	end->pd = verbs.alloc_pd(end->context);
	end->channel = verbs.create_comp_channel(end->context);
	end->cq = verbs.create_cq(end->context,
				  options->cqe ? (int)options->cqe : 4096, end,
				  end->channel, 0);
	CHECK(end->pd && end->channel && end->cq);
	end->size = options->size ? options->size : 1 << 20;
	map_buffer(end, !options->plain && on_shm());
	end->mr = verbs.reg_mr_fd(
		end->pd, end->fd, 0, end->buffer, end->size,
		(unsigned int)given(options->mr_access, ALL_ACCESS));
	CHECK(end->mr);
	init.send_cq = init.recv_cq = end->cq;
	init.cap.max_send_wr = options->send_wr ? options->send_wr : 1024;
	init.cap.max_recv_wr = options->recv_wr ? options->recv_wr : 512;
	init.cap.max_send_sge = init.cap.max_recv_sge = 8;
	init.cap.max_inline_data = 64;
	init.sq_sig_all = options->sig_all;
	end->qp = verbs.create_qp(end->pd, &init);
	CHECK(end->qp);
	end->psn = end->qp->qp_num ^ 0x5a5a5a;
}

void close_end(struct end *end)
{
	CHECK(!verbs.destroy_qp(end->qp));
	CHECK(!verbs.dereg_mr(end->mr));
	CHECK(!verbs.destroy_cq(end->cq));
	CHECK(!verbs.destroy_comp_channel(end->channel));
	CHECK(!verbs.dealloc_pd(end->pd));
	CHECK(!verbs.close_device(end->context));
	munmap(end->buffer, end->size);
	if (end->fd >= 0)
		close(end->fd);
}

struct card card_of(const struct end *end)
{
	return (struct card){ .gid = end->gid,
			      .qpn = end->qp->qp_num,
			      .psn = end->psn,
			      .rkey = end->mr->rkey,
			      .addr = (uintptr_t)end->buffer };
}

int to_init(struct end *end, const struct options *options)
{
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_INIT, .port_num = 1 };

	attr.qp_access_flags = (unsigned int)given(options->qp_access,
						   ALL_ACCESS);
	return verbs.modify_qp(end->qp, &attr,
			       IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT |
				       IBV_QP_ACCESS_FLAGS);
}

int to_rtr(struct end *end, const struct card *peer,
	   const struct options *options)
{
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = IBV_MTU_4096,
		.dest_qp_num = peer->qpn,
		.rq_psn = peer->psn & 0xffffff,
		.max_dest_rd_atomic = options->rd_atomic ? options->rd_atomic :
							   16,
		.min_rnr_timer = 12,
		.ah_attr = { .is_global = 1, .port_num = 1 },
	};

	attr.ah_attr.grh.dgid = peer->gid;
	attr.ah_attr.grh.hop_limit = 64;
	return verbs.modify_qp(end->qp, &attr,
			       IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU |
				       IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
				       IBV_QP_MAX_DEST_RD_ATOMIC |
				       IBV_QP_MIN_RNR_TIMER);
}

int to_rts(struct end *end, const struct options *options)
{
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_RTS,
		.timeout = options->any_retry ? options->timeout : 18,
		.retry_cnt = options->any_retry ? options->retry_cnt : 6,
		.rnr_retry = options->any_retry ? options->rnr_retry : 6,
		.sq_psn = end->psn & 0xffffff,
		.max_rd_atomic = options->rd_atomic ? options->rd_atomic : 16,
	};

	return verbs.modify_qp(end->qp, &attr,
			       IBV_QP_STATE | IBV_QP_TIMEOUT |
				       IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
				       IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
}

int to_state(struct end *end, enum ibv_qp_state state)
{
	struct ibv_qp_attr attr = { .qp_state = state };

	return verbs.modify_qp(end->qp, &attr, IBV_QP_STATE);
}

void connect_end(struct end *end, const struct card *peer,
		 const struct options *options)
{
	CHECK(!to_init(end, options));
	CHECK(!to_rtr(end, peer, options));
	CHECK(!to_rts(end, options));
}

void make_pair(struct end *a, struct end *b, const struct options *options)
{
	static const struct options standard;
	struct card card_a, card_b;

	if (!options)
		options = &standard;
	open_end(a, options);
	open_end(b, options);
	card_a = card_of(a);
	card_b = card_of(b);
	connect_end(a, &card_b, options);
	connect_end(b, &card_a, options);
}

struct ibv_send_wr write_wr(const struct end *from, const struct card *to,
			    struct ibv_sge *sge, size_t from_off, size_t to_off,
			    uint32_t length)
{
	struct ibv_send_wr wr = { .opcode = IBV_WR_RDMA_WRITE,
				  .send_flags = IBV_SEND_SIGNALED,
				  .sg_list = sge,
				  .num_sge = 1 };

	sge->addr = (uintptr_t)from->buffer + from_off;
	sge->length = length;
	sge->lkey = from->mr->lkey;
	wr.wr.rdma.remote_addr = to->addr + to_off;
	wr.wr.rdma.rkey = to->rkey;
	return wr;
}

int post_one(struct end *end, struct ibv_send_wr *wr)
{
	struct ibv_send_wr *bad;

	return ibv_post_send(end->qp, wr, &bad);
}

int post_recv(struct end *end, uint64_t wr_id, size_t off, uint32_t length)
{
	struct ibv_sge sge = { (uintptr_t)end->buffer + off, length,
			       end->mr->lkey };
	struct ibv_recv_wr wr = { .wr_id = wr_id,
				  .sg_list = &sge,
				  .num_sge = length ? 1 : 0 };
	struct ibv_recv_wr *bad;

	return ibv_post_recv(end->qp, &wr, &bad);
}

void await(struct end *end, int ms)
{
	struct pollfd look = { .fd = end->channel->fd, .events = POLLIN };
	struct ibv_cq *cq;
	void *context;

	if (poll(&look, 1, ms) == 1) {
		CHECK(!verbs.get_cq_event(end->channel, &cq, &context));
		CHECK(cq == end->cq && context == end);
		verbs.ack_cq_events(cq, 1);
	}
}

void reap(struct end *end, struct ibv_wc *wc, int n)
{
	uint64_t deadline = now_ms() + 20000;
	int got = 0, some;

	while (got < n) {
		some = ibv_poll_cq(end->cq, n - got, wc + got);
		CHECK(some >= 0);
		got += some;
		if (some)
			continue;
		CHECK(now_ms() < deadline);
		CHECK(!ibv_req_notify_cq(end->cq, 0));
		some = ibv_poll_cq(end->cq, n - got, wc + got);
		CHECK(some >= 0);
		got += some;
		if (!some)
			await(end, 1000);
	}
}

void quiet(struct end *end, int ms)
{
	struct ibv_wc wc;

	CHECK(!ibv_req_notify_cq(end->cq, 0));
	CHECK(ibv_poll_cq(end->cq, 1, &wc) == 0);
	await(end, ms);
	CHECK(ibv_poll_cq(end->cq, 1, &wc) == 0);
}

void no_objects_left(void)
{
	struct kvx_soft_counts counts;

	kvx_soft_counts(&counts);
	CHECK(!counts.contexts && !counts.pds && !counts.mrs && !counts.cqs &&
	      !counts.channels && !counts.qps && !counts.connections &&
	      !counts.threads);
}
