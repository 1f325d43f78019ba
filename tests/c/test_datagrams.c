/* UD queue pairs: what arrives, what is lost without a word, what fails. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "../../kvxfer/softdev/datagram.h"
#include "../../kvxfer/softdev/qp.h"
#include "harness.h"

#define QKEY 0x1234u
#define GRH 40
#define PAYLOAD 1000
#define DEPTH 16
#define THREADS 2
#define POSTS 500

static const struct options standard;

static struct ibv_qp *new_ud_qp(const struct end *end, uint32_t qkey)
{
	struct ibv_qp_init_attr init = {
		.qp_type = IBV_QPT_UD,
		.send_cq = end->cq,
		.recv_cq = end->cq,
		.cap = { .max_send_wr = DEPTH,
			 .max_recv_wr = DEPTH,
			 .max_send_sge = 2,
			 .max_recv_sge = 2,
			 .max_inline_data = 64 },
	};
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_INIT,
				    .port_num = 1,
				    .qkey = qkey };
	struct ibv_qp *qp = verbs.create_qp(end->pd, &init);

	CHECK(qp && qp->qp_type == IBV_QPT_UD);
	CHECK(!verbs.modify_qp(qp, &attr,
			       IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT |
				       IBV_QP_QKEY));
	return qp;
}

static void move_qp(struct ibv_qp *qp, enum ibv_qp_state state)
{
	struct ibv_qp_attr attr = { .qp_state = state, .sq_psn = 5 };

	CHECK(!verbs.modify_qp(qp, &attr,
			       state == IBV_QPS_RTS ?
				       IBV_QP_STATE | IBV_QP_SQ_PSN :
				       IBV_QP_STATE));
}

static void to_send(struct ibv_qp *qp)
{
	move_qp(qp, IBV_QPS_RTR);
	move_qp(qp, IBV_QPS_RTS);
}

/* An adapter with a UD QP that can send. */
static void open_ud(struct end *end)
{
	open_end(end, &standard);
	CHECK(!verbs.destroy_qp(end->qp));
	end->qp = new_ud_qp(end, QKEY);
	to_send(end->qp);
}

static struct ibv_ah *ah_to(const struct end *from, const union ibv_gid *gid)
{
	struct ibv_ah_attr attr = { .is_global = 1, .port_num = 1 };
	struct ibv_ah *ah;

	attr.grh.dgid = *gid;
	ah = soft_create_ah(from->pd, &attr);
	CHECK(ah && ah->pd == from->pd);
	return ah;
}

/* From the beginning of the buffer. */
static struct ibv_send_wr datagram(const struct end *from, struct ibv_sge *sge,
				   struct ibv_ah *ah, uint32_t qpn,
				   uint32_t length)
{
	struct ibv_send_wr wr = { .wr_id = 3,
				  .opcode = IBV_WR_SEND,
				  .send_flags = IBV_SEND_SIGNALED,
				  .sg_list = sge,
				  .num_sge = 1 };

	*sge = (struct ibv_sge){ (uintptr_t)from->buffer, length,
				 from->mr->lkey };
	wr.wr.ud.ah = ah;
	wr.wr.ud.remote_qpn = qpn;
	wr.wr.ud.remote_qkey = QKEY;
	return wr;
}

/* It is complete when the call returns. */
static void send_well(struct end *from, struct ibv_send_wr wr)
{
	struct ibv_wc wc;

	CHECK(!post_one(from, &wr));
	CHECK(ibv_poll_cq(from->cq, 1, &wc) == 1);
	CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_SEND);
	CHECK(wc.wr_id == 3);
}

static struct ibv_wc arrival(struct end *end)
{
	struct ibv_wc wc;

	reap(end, &wc, 1);
	return wc;
}

static void arrives(void)
{
	struct ibv_sge sge, two[2];
	struct ibv_send_wr wr;
	struct ibv_grh *grh;
	struct ibv_ah *ah, *back;
	struct ibv_wc wc;
	struct end a, b;
	int i;

	open_ud(&a);
	open_ud(&b);
	ah = ah_to(&a, &b.gid);
	fill_random(a.buffer, 2 * PAYLOAD);
	CHECK(!post_recv(&b, 9, 0, GRH + PAYLOAD));
	wr = datagram(&a, &sge, ah, b.qp->qp_num, PAYLOAD);
	two[0] = (struct ibv_sge){ sge.addr + PAYLOAD, 100, sge.lkey };
	two[1] = (struct ibv_sge){ sge.addr, PAYLOAD - 100, sge.lkey };
	wr.sg_list = two;
	wr.num_sge = 2;
	wr.opcode = IBV_WR_SEND_WITH_IMM;
	wr.imm_data = 0x01020304;
	send_well(&a, wr);
	wc = arrival(&b);
	CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_RECV);
	CHECK(wc.wr_id == 9 && wc.byte_len == GRH + PAYLOAD);
	CHECK(wc.qp_num == b.qp->qp_num && wc.src_qp == a.qp->qp_num);
	CHECK(wc.wc_flags == (IBV_WC_GRH | IBV_WC_WITH_IMM));
	CHECK(wc.imm_data == 0x01020304);
	grh = (struct ibv_grh *)b.buffer;
	CHECK(!memcmp(&grh->sgid, &a.gid, sizeof(a.gid)));
	CHECK(!memcmp(&grh->dgid, &b.gid, sizeof(b.gid)));
	CHECK(!memcmp(b.buffer + GRH, a.buffer + PAYLOAD, 100));
	CHECK(!memcmp(b.buffer + GRH + 100, a.buffer, PAYLOAD - 100));

	/* Back to where it came from, round and round the queue. */
	back = ah_to(&b, &grh->sgid);
	for (i = 0; i < 10 * DEPTH; i++) {
		CHECK(!post_recv(&a, 1, 4096, GRH + 64));
		wr = datagram(&b, &sge, back, wc.src_qp, 64);
		wr.send_flags |= IBV_SEND_INLINE;
		b.buffer[0] = (uint8_t)i;
		send_well(&b, wr);
		CHECK(arrival(&a).byte_len == GRH + 64);
		CHECK(a.buffer[4096 + GRH] == (uint8_t)i);
	}
	/* Nothing and the most; the high bit means the QP's own Q_Key. */
	CHECK(!post_recv(&b, 1, 0, GRH));
	wr = datagram(&a, &sge, ah, b.qp->qp_num, 0);
	wr.wr.ud.remote_qkey = 0x80000000u;
	send_well(&a, wr);
	CHECK(arrival(&b).byte_len == GRH);
	CHECK(!post_recv(&b, 1, 0, GRH + DATAGRAM_BYTES));
	send_well(&a, datagram(&a, &sge, ah, b.qp->qp_num, DATAGRAM_BYTES));
	CHECK(arrival(&b).byte_len == GRH + DATAGRAM_BYTES);
	CHECK(verbs.dealloc_pd(a.pd) == EBUSY);
	CHECK(!soft_destroy_ah(ah) && !soft_destroy_ah(back));
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

/* UDP keeps the order on one host: when the last one is there, the ones before it
 * have been dropped. */
static void lost(void)
{
	union ibv_gid former;
	struct ibv_qp *starved, *unready, *good;
	struct ibv_ah *ah, *nowhere;
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;
	struct end a, b;

	open_ud(&a);
	open_ud(&b);
	ah = ah_to(&a, &b.gid);
	former = b.gid;
	former.raw[15] ^= 1; /* of an adapter that was at the same place */
	nowhere = ah_to(&a, &former);
	starved = new_ud_qp(&b, QKEY);
	to_send(starved);
	unready = new_ud_qp(&b, QKEY);
	good = b.qp;
	b.qp = unready;
	CHECK(!post_recv(&b, 7, 0, GRH + PAYLOAD));
	b.qp = good;
	CHECK(!post_recv(&b, 9, 0, GRH + PAYLOAD));

	send_well(&a, datagram(&a, &sge, ah, starved->qp_num, 10));
	send_well(&a, datagram(&a, &sge, ah, unready->qp_num, 11));
	send_well(&a, datagram(&a, &sge, ah, b.qp->qp_num ^ 1, 12));
	send_well(&a, datagram(&a, &sge, nowhere, b.qp->qp_num, 13));
	wr = datagram(&a, &sge, ah, b.qp->qp_num, 14);
	wr.wr.ud.remote_qkey ^= 1;
	send_well(&a, wr);
	send_well(&a, datagram(&a, &sge, ah, b.qp->qp_num, 15));
	wc = arrival(&b);
	CHECK(wc.wr_id == 9 && wc.byte_len == GRH + 15);
	/* What was dropped does not come when there is a receive at last. */
	CHECK(!verbs.destroy_qp(b.qp));
	b.qp = starved;
	CHECK(!post_recv(&b, 8, 0, GRH + PAYLOAD));
	send_well(&a, datagram(&a, &sge, ah, starved->qp_num, 16));
	wc = arrival(&b);
	CHECK(wc.wr_id == 8 && wc.byte_len == GRH + 16);
	quiet(&b, 5);
	CHECK(!verbs.destroy_qp(unready));
	CHECK(!soft_destroy_ah(ah) && !soft_destroy_ah(nowhere));
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

/* One list, two places; each WR goes where it says. */
static void to_two(void)
{
	struct ibv_send_wr wrs[2], *bad;
	struct ibv_ah *to_b, *to_c;
	struct ibv_sge sges[2];
	struct ibv_wc wc[2];
	struct end a, b, c;

	open_ud(&a);
	open_ud(&b);
	open_ud(&c);
	to_b = ah_to(&a, &b.gid);
	to_c = ah_to(&a, &c.gid);
	CHECK(!post_recv(&b, 1, 0, GRH + PAYLOAD));
	CHECK(!post_recv(&c, 2, 0, GRH + PAYLOAD));
	wrs[0] = datagram(&a, &sges[0], to_b, b.qp->qp_num, 20);
	wrs[1] = datagram(&a, &sges[1], to_c, c.qp->qp_num, 21);
	wrs[0].next = &wrs[1];
	CHECK(!ibv_post_send(a.qp, wrs, &bad));
	CHECK(ibv_poll_cq(a.cq, 2, wc) == 2);
	CHECK(arrival(&b).byte_len == GRH + 20);
	CHECK(arrival(&c).byte_len == GRH + 21);
	CHECK(!soft_destroy_ah(to_b) && !soft_destroy_ah(to_c));
	close_end(&a);
	close_end(&b);
	close_end(&c);
	no_objects_left();
}

static void send_fails(uint32_t length, uint32_t lkey_xor,
		       enum ibv_wc_status status, uint32_t vendor_err)
{
	struct ibv_send_wr wr;
	struct ibv_ah *ah;
	struct ibv_sge sge;
	struct ibv_wc wc;
	struct end a;

	open_ud(&a);
	ah = ah_to(&a, &a.gid);
	CHECK(!post_recv(&a, 9, 0, 64));
	wr = datagram(&a, &sge, ah, a.qp->qp_num, length);
	sge.lkey ^= lkey_xor;
	CHECK(!post_one(&a, &wr));
	wc = arrival(&a);
	CHECK(wc.status == status && wc.vendor_err == vendor_err);
	CHECK(arrival(&a).status == IBV_WC_WR_FLUSH_ERR);
	CHECK(!soft_destroy_ah(ah));
	close_end(&a);
	no_objects_left();
}

static void receive_fails(uint32_t lkey_xor, enum ibv_wc_status status,
			  uint32_t vendor_err)
{
	struct ibv_recv_wr recv = { .wr_id = 9, .num_sge = 1 }, *bad;
	struct ibv_sge sge, place;
	struct ibv_ah *ah;
	struct ibv_wc wc;
	struct end a, b;

	open_ud(&a);
	open_ud(&b);
	ah = ah_to(&a, &b.gid);
	/* Long enough but for its key, or a byte short. */
	place = (struct ibv_sge){ (uintptr_t)b.buffer,
				  GRH + PAYLOAD - (lkey_xor ? 0 : 1),
				  b.mr->lkey ^ lkey_xor };
	recv.sg_list = &place;
	CHECK(!ibv_post_recv(b.qp, &recv, &bad));
	send_well(&a, datagram(&a, &sge, ah, b.qp->qp_num, PAYLOAD));
	wc = arrival(&b);
	CHECK(wc.wr_id == 9 && wc.status == status &&
	      wc.vendor_err == vendor_err);
	CHECK(!soft_destroy_ah(ah));
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

static void refused(void)
{
	struct ibv_qp_attr attr = { .qp_state = IBV_QPS_RTS };
	struct ibv_ah_attr ah_attr = { .port_num = 1 };
	struct ibv_send_wr wr;
	struct ibv_ah *ah;
	struct ibv_sge sge;
	struct end a;

	open_ud(&a);
	ah = ah_to(&a, &a.gid);
	CHECK(!soft_create_ah(a.pd, &ah_attr) && errno == EINVAL);
	ah_attr.is_global = 1;
	CHECK(!soft_create_ah(a.pd, &ah_attr) && errno == EHOSTUNREACH);
	wr = datagram(&a, &sge, NULL, a.qp->qp_num, 8);
	CHECK(post_one(&a, &wr) == EINVAL);
	wr.wr.ud.ah = ah;
	wr.opcode = IBV_WR_RDMA_WRITE;
	CHECK(post_one(&a, &wr) == EINVAL);
	CHECK(verbs.modify_qp(a.qp, &attr, IBV_QP_STATE | IBV_QP_TIMEOUT) ==
	      EINVAL); /* an attribute of RC */
	move_qp(a.qp, IBV_QPS_RESET);
	wr.opcode = IBV_WR_SEND;
	CHECK(post_one(&a, &wr) == EINVAL);
	CHECK(!soft_destroy_ah(ah));
	close_end(&a);
	no_objects_left();
}

struct poster {
	struct end *end;
	struct ibv_ah *ah;
};

static void *post_many(void *arg)
{
	struct poster *poster = arg;
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;
	int i, err, n;

	for (i = 0; i < POSTS; i++) {
		wr = datagram(poster->end, &sge, poster->ah, 77, 64);
		do {
			err = post_one(poster->end, &wr);
			/* One for a slot, of whichever thread it was. */
			n = ibv_poll_cq(poster->end->cq, 1, &wc);
			CHECK((!err || err == ENOMEM) && n >= 0);
			CHECK(!n || wc.status == IBV_WC_SUCCESS);
		} while (err);
	}
	return NULL;
}

/* Two threads post to one QP, to nobody; each WR completes once. */
static void by_threads(void)
{
	struct ibv_wc wc[DEPTH];
	pthread_t threads[THREADS];
	struct poster poster;
	struct end a;
	int i;

	open_ud(&a);
	poster = (struct poster){ &a, ah_to(&a, &a.gid) };
	for (i = 0; i < THREADS; i++)
		CHECK(!pthread_create(&threads[i], NULL, post_many, &poster));
	for (i = 0; i < THREADS; i++)
		CHECK(!pthread_join(threads[i], NULL));
	CHECK(ibv_poll_cq(a.cq, DEPTH, wc) >= 0);
	CHECK(atomic_load(&to_qp(a.qp)->sq.tail) == THREADS * POSTS);
	CHECK(!soft_destroy_ah(poster.ah));
	close_end(&a);
	no_objects_left();
}

int main(void)
{
	arrives();
	to_two();
	lost();
	send_fails(DATAGRAM_BYTES + 1, 0, IBV_WC_LOC_LEN_ERR,
		   KVX_SOFT_TOO_LONG);
	send_fails(64, 1, IBV_WC_LOC_PROT_ERR, KVX_SOFT_NO_LKEY);
	receive_fails(0, IBV_WC_LOC_LEN_ERR, KVX_SOFT_TOO_LONG);
	receive_fails(1, IBV_WC_LOC_PROT_ERR, KVX_SOFT_NO_LKEY);
	refused();
	by_threads();
	puts("datagrams: ok");
	return 0;
}
