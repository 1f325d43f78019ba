/* Faults on purpose under the sanitizers: plans, and what they do to a pair. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "../../kvxfer/softdev/fault.h"
#include "harness.h"

#define N_WRS 48
#define WR_BYTES 3000

static const struct options hasty = { .any_retry = true, .timeout = 10 };

static uint64_t drawn = 1;

static uint32_t draw(uint32_t below)
{
	drawn = drawn * 6364136223846793005u + 1442695040888963407u;
	return (uint32_t)(drawn >> 33) % below;
}

/* Texts that are nearly plans: read without harm, and refused at a place. */
static void parser(int rounds)
{
	static const char *const parts[] = {
		"act=",	    "drop",	  "delay",
		"status:",  "rem_access", "us=",
		"5",	    "..",	  "99999999999999999999",
		"t=",	    "ms",	  "nth=",
		"0.5",	    "rate=",	  ",",
		";",	    "@",	  "seed=",
		"qp=*",	    "on=target",  " ",
		"ack_lost", "enomem",	  "post=",
		"\n",	    "=",	  "\xff",
		"_",	    "times=",	  "gid_change",
	};
	struct fault_rule rules[FAULT_MAX_RULES];
	char text[512];
	uint64_t seed;
	uint32_t n, i;
	size_t at;

	while (rounds--) {
		*text = '\0';
		for (i = draw(20); i; i--)
			strcat(text,
			       parts[draw(sizeof(parts) / sizeof(*parts))]);
		if (fault_parse(text, rules, &n, &seed, &at)) {
			CHECK(at <= strlen(text));
			continue;
		}
		for (i = 0; i < n; i++)
			CHECK(rules[i].act > FAULT_NONE &&
			      rules[i].act < FAULT_N_ACTS && rules[i].times &&
			      rules[i].max_us >= rules[i].min_us);
	}
}

static void set(struct end *end, const char *plan)
{
	size_t at;

	CHECK(!verbs.set_faults(end->context, plan, &at));
}

/* Post until refused; how many were taken. */
static int post_all(struct end *a, const struct card *to)
{
	struct ibv_send_wr wr, *bad;
	struct ibv_sge sge;
	int i;

	for (i = 0; i < N_WRS; i++) {
		wr = write_wr(a, to, &sge, (size_t)i * WR_BYTES,
			      (size_t)i * WR_BYTES, WR_BYTES);
		wr.wr_id = (uint64_t)i;
		wr.send_flags = IBV_SEND_SIGNALED;
		if (i % 8 == 7)
			wr.opcode = IBV_WR_RDMA_WRITE_WITH_IMM;
		if (i % 8 == 5)
			wr.send_flags |= IBV_SEND_SOLICITED;
		if (ibv_post_send(a->qp, &wr, &bad))
			break;
	}
	return i;
}

/* Take what comes until the queue is lost; how many WRs succeeded. */
static int collect(struct end *a, int n)
{
	uint64_t deadline = now_ms() + 20000;
	int done = 0, good = 0, got;
	struct ibv_wc wc;

	while (done < n) {
		got = ibv_poll_cq(a->cq, 1, &wc);
		if (got < 0)
			break; /* a completion was lost, and the CQ says so */
		if (!got) {
			CHECK(now_ms() < deadline);
			CHECK(!ibv_req_notify_cq(a->cq, 0));
			got = ibv_poll_cq(a->cq, 1, &wc);
			if (!got)
				await(a, 1000);
			if (got <= 0)
				continue;
		}
		CHECK(wc.wr_id == (uint64_t)done);
		/* None succeeds behind one that failed. */
		CHECK(wc.status != IBV_WC_SUCCESS || good == done);
		good += wc.status == IBV_WC_SUCCESS;
		done++;
	}
	return good;
}

static void run(const char *initiator, const char *target)
{
	struct end a, b;
	struct card to;
	int i, n;

	make_pair(&a, &b, &hasty);
	to = card_of(&b);
	fill_random(a.buffer, a.size);
	for (i = 0; i < 16; i++)
		CHECK(!post_recv(&b, 70, 0, 0));
	set(&a, initiator);
	set(&b, target);
	n = collect(&a, post_all(&a, &to));
	/* The end of the target's QP: what was acknowledged is in place. */
	CHECK(!to_state(&b, IBV_QPS_ERR));
	CHECK(!memcmp(a.buffer, b.buffer, (size_t)n * WR_BYTES));
	for (i = N_WRS * WR_BYTES; (size_t)i < b.size; i++)
		CHECK(!b.buffer[i]);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

static void plans(int rounds)
{
	static const char *const initiators[] = {
		"",
		"rate=.02,act=status:general",
		"nth=%u,act=ack_lost",
		"nth=%u,act=drop",
		"rate=.1,act=delay,us=1..3000",
		"nth=%u,act=late_write,us=1000",
		"nth=%u,act=cq_overflow",
		"act=enomem@post=%u",
		"nth=%u,act=qp_fatal",
		"nth=%u,act=device_fatal",
		"nth=%u,act=gid_change",
		"nth=%u,act=port_down;act=port_up@t=20ms",
		"act=gid_change@t=1ms",
		"rate=.4,act=dup",
		"act=slow_post,us=1..50",
		"nth=%u,act=ack_lost;rate=.5,act=dup",
		"nth=%u,act=drop;rate=.5,act=dup;rate=.1,act=delay,us=1..500",
	};
	static const char *const targets[] = {
		"",
		"nth=%u,act=status:rem_op",
		"rate=.02,act=status:rem_access",
		"act=posted_write_delay,us=500..4000",
		"act=reorder_bytes",
		"rate=.5,act=reorder_bytes;rate=.5,act=posted_write_delay,us="
		"900",
		"nth=%u,act=qp_fatal,on=target",
		"nth=%u,act=gid_change,on=target",
		"nth=%u,act=port_down,on=target;act=port_up@t=20ms",
		"nth=%u,act=device_fatal,on=target",
	};
	char initiator[128], target[128];
	size_t i = 0, j = 0;

	while (rounds--) {
		snprintf(initiator, sizeof(initiator), initiators[i],
			 1 + draw(N_WRS));
		snprintf(target, sizeof(target), targets[j], 1 + draw(N_WRS));
		run(initiator, target);
		i = (i + 1) % (sizeof(initiators) / sizeof(*initiators));
		j = (j + 1) % (sizeof(targets) / sizeof(*targets));
	}
}

int main(void)
{
	parser(100000);
	plans(170); /* each with each */
	puts("faults: ok");
	return 0;
}
