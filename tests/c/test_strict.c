/* Strict mode: events that nobody acknowledges, a device closed too early. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <string.h>
#include <time.h>

#include "harness.h"

/* Wait until something with these words was seen. */
static void expect_violation(const char *words)
{
	const struct timespec nap = { .tv_nsec = 1000000 };
	uint64_t deadline = now_ms() + 20000;
	char text[1024] = "";

	while (!kvx_soft_take_violations(text, sizeof(text))) {
		CHECK(now_ms() < deadline);
		nanosleep(&nap, NULL);
	}
	CHECK(strstr(text, words));
}

static void expect_none(void)
{
	char text[1024];

	CHECK(!kvx_soft_take_violations(text, sizeof(text)));
}

static void *destroy(void *arg)
{
	struct end *end = arg;

	CHECK(!verbs.destroy_qp(end->qp));
	return NULL;
}

/* It waits for ever, as destroy_qp does; a late acknowledgement lets it go on. */
static void unacknowledged(struct end *a, struct end *b)
{
	struct card to = card_of(b);
	struct ibv_async_event event;
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;
	pthread_t thread;

	wr = write_wr(a, &to, &sge, 0, 0, 8);
	wr.wr.rdma.rkey ^= 1;
	CHECK(!post_one(a, &wr));
	reap(a, &wc, 1);
	CHECK(!verbs.get_async_event(b->context, &event));
	CHECK(event.event_type == IBV_EVENT_QP_ACCESS_ERR);
	expect_none();
	CHECK(!pthread_create(&thread, NULL, destroy, b));
	expect_violation("a QP is destroyed with 1 events unacknowledged");
	verbs.ack_async_event(&event);
	CHECK(!pthread_join(thread, NULL));
}

int main(void)
{
	struct ibv_qp_init_attr init = { .qp_type = IBV_QPT_RC };
	struct end a, b;

	CHECK(!setenv("KVXFER_SOFT_STRICT", "report", 1));
	make_pair(&a, &b, NULL);
	CHECK(verbs.close_device(a.context) == EBUSY);
	expect_violation("closed with 3 of its PDs, CQs and channels alive");
	unacknowledged(&a, &b);
	init.send_cq = init.recv_cq = b.cq;
	init.cap.max_send_wr = init.cap.max_recv_wr = 4;
	b.qp = verbs.create_qp(b.pd, &init);
	CHECK(b.qp);
	close_end(&a);
	close_end(&b);
	expect_none();
	no_objects_left();
	puts("strict: ok");
	return 0;
}
