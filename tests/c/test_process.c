/* Two processes: death of either, forks, tokens, strangers at the door. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "harness.h"

static const struct options options = { .size = 4u << 20,
					.any_retry = true,
					.timeout = 16,
					.retry_cnt = 3,
					.rnr_retry = 6 };

/* A target in a process of its own, and our end of the connection to it. */
struct peer {
	pid_t pid;
	int to, from; /* pipes */
	struct end end;
	struct card card;
};

/* What else the target does once it is connected. */
enum part { JUST_SIT, FORK_A_CHILD, DIE_OF_THE_SECOND };

static void put(int fd, const void *data, size_t size)
{
	CHECK(write(fd, data, size) == (ssize_t)size);
}

static void get(int fd, void *data, size_t size)
{
	CHECK(read(fd, data, size) == (ssize_t)size);
}

static void target(int in, int out, enum part part)
{
	struct card mine, theirs;
	struct end end;
	pid_t child = 0;
	size_t at;
	char byte;

	open_end(&end, &options);
	mine = card_of(&end);
	put(out, &mine, sizeof(mine));
	get(in, &theirs, sizeof(theirs));
	connect_end(&end, &theirs, &options);
	put(out, "r", 1);
	get(in, &byte, 1); /* the first contact is made */
	if (part == FORK_A_CHILD) {
		child = fork();
		if (child == 0) {
			CHECK(to_state(&end, IBV_QPS_ERR) == ENODEV);
			CHECK(verbs.close_device(end.context) == ENODEV);
			alarm(30); /* outlives its parent, but not for ever */
			pause();
		}
	}
	if (part == DIE_OF_THE_SECOND)
		CHECK(!verbs.set_faults(end.context,
					"nth=2,act=partial_then_die", &at));
	put(out, &child, sizeof(child));
	if (read(in, &byte, 1) == 1)
		close_end(&end);
	_exit(0);
}

static pid_t start(struct peer *peer, enum part part)
{
	struct card mine;
	struct ibv_sge sge;
	struct ibv_send_wr wr;
	struct ibv_wc wc;
	int down[2], up[2];
	char byte;
	pid_t child;

	CHECK(!pipe(down) && !pipe(up));
	peer->pid = fork();
	CHECK(peer->pid >= 0);
	if (peer->pid == 0) {
		close(down[1]);
		close(up[0]);
		target(down[0], up[1], part);
	}
	close(down[0]);
	close(up[1]);
	peer->to = down[1];
	peer->from = up[0];
	open_end(&peer->end, &options);
	get(peer->from, &peer->card, sizeof(peer->card));
	mine = card_of(&peer->end);
	put(peer->to, &mine, sizeof(mine));
	connect_end(&peer->end, &peer->card, &options);
	get(peer->from, &byte, 1);
	wr = write_wr(&peer->end, &peer->card, &sge, 0, 0, 8);
	CHECK(!post_one(&peer->end, &wr));
	reap(&peer->end, &wc, 1);
	CHECK(wc.status == IBV_WC_SUCCESS);
	put(peer->to, "x", 1);
	get(peer->from, &child, sizeof(child));
	return child;
}

static void finish(struct peer *peer)
{
	close(peer->to);
	close(peer->from);
	waitpid(peer->pid, NULL, 0);
	close_end(&peer->end);
	no_objects_left();
}

static void post_many(struct peer *peer, int n)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	int i;

	for (i = 0; i < n; i++) {
		wr = write_wr(&peer->end, &peer->card, &sge, 0, 0, 1u << 20);
		wr.wr_id = (uint64_t)i;
		CHECK(!post_one(&peer->end, &wr));
	}
}

/* Some succeed, then one fails with the status, then all are flushed. */
static void expect_break(struct peer *peer, int n, enum ibv_wc_status status,
			 uint64_t within_ms)
{
	struct ibv_wc wc[64];
	uint64_t begin = now_ms();
	int i = 0;

	reap(&peer->end, wc, n);
	CHECK(now_ms() - begin < within_ms);
	while (i < n && wc[i].status == IBV_WC_SUCCESS)
		i++;
	CHECK(i < n && wc[i].status == status);
	while (++i < n)
		CHECK(wc[i].status == IBV_WC_WR_FLUSH_ERR);
}

static void nap_us(long us)
{
	struct timespec time = { .tv_nsec = us * 1000 };

	nanosleep(&time, NULL);
}

static void killed_target(void)
{
	struct peer peer;
	int i;

	for (i = 0; i < 15; i++) {
		start(&peer, JUST_SIT);
		post_many(&peer, 64);
		nap_us(i * 300);
		kill(peer.pid, SIGKILL);
		nap_us(1000);
		post_many(&peer, 0);
		waitpid(peer.pid, NULL, 0);
		{
			struct ibv_wc wc[65];
			int n = 64;

			reap(&peer.end, wc, n);
			if (wc[n - 1].status == IBV_WC_SUCCESS) {
				post_many(&peer, 2);
				expect_break(&peer, 2, IBV_WC_RETRY_EXC_ERR,
					     1500);
			} else {
				CHECK(wc[n - 1].status == IBV_WC_WR_FLUSH_ERR ||
				      wc[n - 1].status == IBV_WC_RETRY_EXC_ERR);
			}
		}
		finish(&peer);
	}
}

/* The target's child must not keep its dead parent's sockets alive. */
static void killed_parent(void)
{
	struct peer peer;
	pid_t child = start(&peer, FORK_A_CHILD);

	CHECK(child > 0);
	kill(peer.pid, SIGKILL);
	waitpid(peer.pid, NULL, 0);
	CHECK(!kill(child, 0));
	post_many(&peer, 2);
	/* Well below the retry time of 1 s: it is told, it need not guess. */
	expect_break(&peer, 2, IBV_WC_RETRY_EXC_ERR, 700);
	kill(child, SIGKILL);
	finish(&peer);
}

static void stopped_target(void)
{
	struct peer peer;
	int status;

	start(&peer, JUST_SIT);
	kill(peer.pid, SIGSTOP);
	/* Its threads run on until one of them has taken the signal. */
	CHECK(waitpid(peer.pid, &status, WUNTRACED) == peer.pid);
	CHECK(WIFSTOPPED(status));
	post_many(&peer, 3);
	expect_break(&peer, 3, IBV_WC_RETRY_EXC_ERR, 3000);
	kill(peer.pid, SIGCONT);
	kill(peer.pid, SIGKILL);
	finish(&peer);
}

/* A WR that has no bytes, between two that have, all in one frame. */
static void dead_of_nothing(enum ibv_wr_opcode opcode)
{
	struct ibv_send_wr wrs[3], *bad;
	struct ibv_sge sges[3];
	struct peer peer;
	int status, i;

	start(&peer, DIE_OF_THE_SECOND);
	for (i = 0; i < 3; i++) {
		wrs[i] = write_wr(&peer.end, &peer.card, &sges[i], 0, 0, 8);
		wrs[i].next = i < 2 ? &wrs[i + 1] : NULL;
		wrs[i].wr_id = (uint64_t)i;
	}
	wrs[1].num_sge = 0;
	wrs[1].opcode = opcode;
	CHECK(!ibv_post_send(peer.end.qp, wrs, &bad));
	expect_break(&peer, 3, IBV_WC_RETRY_EXC_ERR, 1500);
	CHECK(waitpid(peer.pid, &status, 0) == peer.pid);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	finish(&peer);
}

/* A child may fork again, and open an adapter of its own. */
static void grandchild(void)
{
	struct end own;
	pid_t child;
	int status;

	open_end(&own, &options);
	child = fork();
	if (child == 0)
		_exit(8);
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 8);
	close_end(&own);
}

/* We are the ones that fork; our traffic goes on, the child's calls fail. */
static void forking_initiator(void)
{
	struct ibv_wc wc[8];
	struct peer peer;
	int status, i;
	pid_t child;

	start(&peer, JUST_SIT);
	for (i = 0; i < 4; i++) {
		post_many(&peer, 8);
		child = fork();
		if (child == 0) {
			struct ibv_sge sge;
			struct ibv_send_wr wr = write_wr(&peer.end, &peer.card,
							 &sge, 0, 0, 8);

			CHECK(post_one(&peer.end, &wr) == ENODEV);
			CHECK(ibv_poll_cq(peer.end.cq, 8, wc) < 0);
			CHECK(verbs.destroy_qp(peer.end.qp) == ENODEV);
			grandchild();
			_exit(7);
		}
		CHECK(waitpid(child, &status, 0) == child);
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 7);
		reap(&peer.end, wc, 8);
		CHECK(wc[7].status == IBV_WC_SUCCESS);
	}
	put(peer.to, "x", 1);
	finish(&peer);
}

static uint16_t port_of(const struct end *end)
{
	return (uint16_t)(end->gid.raw[4] << 8 | end->gid.raw[5]);
}

static int knock(const struct end *end)
{
	struct sockaddr_in address = { .sin_family = AF_INET,
				       .sin_port = htons(port_of(end)) };
	int fd = socket(AF_INET, SOCK_STREAM, 0);

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	CHECK(!connect(fd, (struct sockaddr *)&address, sizeof(address)));
	return fd;
}

static void strangers(void)
{
	uint8_t noise[4096];
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;
	struct end a, b;
	struct card to;
	int silent[40], i, fd;

	make_pair(&a, &b, NULL);
	to = card_of(&b);
	for (i = 0; i < 40; i++)
		silent[i] = knock(&b);
	for (i = 0; i < 40; i++) {
		fd = knock(&b);
		fill_random(noise, sizeof(noise));
		if (i % 2)
			memcpy(noise, "KVFX\1\1", 6);
		(void)!send(fd, noise, (size_t)i * 100 + 1, MSG_NOSIGNAL);
		close(fd);
	}
	wr = write_wr(&a, &to, &sge, 0, 0, 8);
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	CHECK(wc.status == IBV_WC_SUCCESS);
	for (i = 0; i < 40; i++)
		close(silent[i]);
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

static void tokens(const char *address, bool good)
{
	struct options at = options;
	struct kvx_peer_hint hint_a = { .address = "" },
			     hint_b = { .address = "" };
	struct card card_a, card_b;
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;
	struct end a, b;

	at.address = address;
	open_end(&a, &at);
	open_end(&b, &at);
	card_a = card_of(&a);
	card_b = card_of(&b);
	strcpy(hint_a.address,
	       strcmp(address, "0.0.0.0") ? address : "127.0.0.1");
	hint_b.local_token[31] = 9;
	hint_a.remote_token[31] = good ? 9 : 8;
	CHECK(!verbs.bind_peer(a.qp, &hint_a));
	CHECK(!verbs.bind_peer(b.qp, &hint_b));
	connect_end(&a, &card_b, &at);
	connect_end(&b, &card_a, &at);
	fill_random(a.buffer, 8);
	wr = write_wr(&a, &card_b, &sge, 0, 0, 8);
	CHECK(!post_one(&a, &wr));
	reap(&a, &wc, 1);
	if (good) {
		CHECK(wc.status == IBV_WC_SUCCESS);
		CHECK(!memcmp(a.buffer, b.buffer, 8));
	} else {
		CHECK(wc.status == IBV_WC_RETRY_EXC_ERR);
		CHECK(wc.vendor_err == KVX_SOFT_REFUSED && !b.buffer[0]);
	}
	close_end(&a);
	close_end(&b);
	no_objects_left();
}

int main(void)
{
	signal(SIGPIPE, SIG_IGN);
	tokens("127.0.0.1", true);
	tokens("127.0.0.1", false);
	tokens("0.0.0.0", true);
	tokens("::1", true);
	tokens("::", true);
	strangers();
	killed_target();
	killed_parent();
	stopped_target();
	dead_of_nothing(IBV_WR_RDMA_WRITE);
	dead_of_nothing(IBV_WR_RDMA_WRITE_WITH_IMM);
	dead_of_nothing(IBV_WR_SEND);
	forking_initiator();
	puts("process: ok");
	return 0;
}
