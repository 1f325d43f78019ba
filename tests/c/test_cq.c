/* CQs that change their size: what is in them stays, in its order. And their events. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>

#include "../../kvxfer/softdev/cq.h"
#include "harness.h"

#define WRITES 20000
#define BURST 32

static void post(struct end *from, const struct card *to, uint64_t wr_id)
{
	struct ibv_sge sge;
	struct ibv_send_wr wr = write_wr(from, to, &sge, 0, 0, 8);

	wr.wr_id = wr_id;
	CHECK(!post_one(from, &wr));
}

static void in_order(struct end *end, uint64_t first, int n)
{
	struct ibv_wc wc;
	int i;

	for (i = 0; i < n; i++) {
		reap(end, &wc, 1);
		CHECK(wc.status == IBV_WC_SUCCESS &&
		      wc.wr_id == first + (uint64_t)i);
	}
}

/* Wait until n entries are in the CQ, and leave them there. */
static void filled(struct end *end, uint64_t n)
{
	uint64_t deadline = now_ms() + 20000;

	while (atomic_load(&to_cq(end->cq)->ready) != n) {
		CHECK(now_ms() < deadline);
		soft_poll_cq(end->cq, 0, NULL); /* shm: answers come so, too */
	}
}

static void sizes(void)
{
	static const struct options options = { .cqe = 4 };
	struct end a, b;
	struct card to;
	uint64_t i;

	make_pair(&a, &b, &options);
	to = card_of(&b);
	CHECK(a.cq->cqe == 7);
	CHECK(soft_resize_cq(a.cq, 0) == EINVAL);
	CHECK(soft_resize_cq(a.cq, -1) == EINVAL);
	CHECK(soft_resize_cq(a.cq, SOFT_MAX_CQE + 1) == EINVAL);
	CHECK(a.cq->cqe == 7);
	CHECK(!soft_resize_cq(a.cq, 1) && a.cq->cqe == 1);
	CHECK(!soft_resize_cq(a.cq, 6) && a.cq->cqe == 7);

	/* The ring goes round before, so that its seam moves. */
	for (i = 0; i < 5; i++)
		post(&a, &to, i);
	in_order(&a, 0, 5);
	for (i = 5; i < 11; i++)
		post(&a, &to, i);
	filled(&a, 6);
	CHECK(soft_resize_cq(a.cq, 5) == EINVAL && a.cq->cqe == 7);
	CHECK(!soft_resize_cq(a.cq, 6));
	CHECK(!soft_resize_cq(a.cq, 100) && a.cq->cqe == 127);
	for (i = 11; i < 100; i++)
		post(&a, &to, i);
	in_order(&a, 5, 93);
	filled(&a, 2);
	CHECK(soft_resize_cq(a.cq, 1) == EINVAL);
	CHECK(!soft_resize_cq(a.cq, 2) && a.cq->cqe == 3);
	in_order(&a, 98, 2);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

/* The new size is what holds: one entry more is one too many. */
static void overrun_at_the_new_size(void)
{
	struct ibv_async_event event;
	struct end a, b;
	struct ibv_wc wc;
	struct card to;
	uint64_t i;

	make_pair(&a, &b, NULL);
	to = card_of(&b);
	CHECK(!soft_resize_cq(a.cq, 3) && a.cq->cqe == 3);
	for (i = 0; i < 4; i++)
		post(&a, &to, i);
	CHECK(!verbs.get_async_event(a.context, &event));
	CHECK(event.event_type == IBV_EVENT_CQ_ERR);
	verbs.ack_async_event(&event);
	in_order(&a, 0, 3);
	CHECK(ibv_poll_cq(a.cq, 1, &wc) == -1 && errno == EOVERFLOW);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

struct resizer {
	struct ibv_cq *cq;
	atomic_bool stop;
	int changes;
};

static void *resize(void *arg)
{
	struct resizer *resizer = arg;
	int cqe = BURST, err;

	while (!atomic_load(&resizer->stop)) {
		err = soft_resize_cq(resizer->cq, cqe);
		CHECK(!err);
		cqe = cqe == BURST ? 1000 : BURST;
		resizer->changes++;
	}
	return NULL;
}

/* Beside the device's thread, which stores, and one that polls. */
static void while_it_is_used(void)
{
	struct resizer resizer = { 0 };
	struct end a, b;
	struct card to;
	pthread_t thread;
	uint64_t i, j;

	make_pair(&a, &b, NULL);
	to = card_of(&b);
	resizer.cq = a.cq;
	CHECK(!pthread_create(&thread, NULL, resize, &resizer));
	for (i = 0; i < WRITES; i += BURST) {
		for (j = i; j < i + BURST; j++)
			post(&a, &to, j);
		in_order(&a, i, BURST);
	}
	atomic_store(&resizer.stop, true);
	CHECK(!pthread_join(thread, NULL) && resizer.changes);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

/* An event is there before its fd says so. Whoever takes it without having waited leaves
 * nothing behind that would wake him once more, for no event. */
static void taken_before_it_is_told(void)
{
	struct options options = { 0 };
	struct pollfd look = { .events = POLLIN };
	struct card to;
	struct ibv_cq *cq;
	void *context;
	struct ibv_wc wc;
	struct end a, b;
	uint64_t i;

	make_pair(&a, &b, &options);
	to = card_of(&b);
	look.fd = a.channel->fd;
	CHECK(!fcntl(look.fd, F_SETFL, O_NONBLOCK));
	for (i = 0; i < 20000; i++) {
		CHECK(!a.cq->context->ops.req_notify_cq(a.cq, 0));
		post(&a, &to, i);
		if (i % 8 == 0) /* the usual way */
			CHECK(poll(&look, 1, 10000) == 1);
		while (verbs.get_cq_event(a.channel, &cq, &context))
			CHECK(errno == EAGAIN);
		CHECK(cq == a.cq);
		CHECK(poll(&look, 1, 0) == 0);
		verbs.ack_cq_events(a.cq, 1);
		while (a.cq->context->ops.poll_cq(a.cq, 1, &wc) == 0)
			;
		CHECK(wc.wr_id == i && wc.status == IBV_WC_SUCCESS);
		CHECK(poll(&look, 1, 0) == 0);
	}
	close_end(&b);
	close_end(&a);
}

int main(void)
{
	sizes();
	overrun_at_the_new_size();
	while_it_is_used();
	taken_before_it_is_told();
	puts("cq: ok");
	return 0;
}
