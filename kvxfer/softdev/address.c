/* Addresses and GIDs. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <string.h>

#include "context.h"

/*
 * A GID: fd 'k', 4 or 6, 0, the listener's port (network order), the IPv4
 * address or a hash of the IPv6 one, 48 random bits. fd.. is the prefix of
 * locally assigned IPv6, so no real RoCE GID looks like it; the random bits
 * tell one life of a process from the next one at the same port.
 */
enum {
	GID_PREFIX = 0,
	GID_MARK = 1,
	GID_FAMILY = 2,
	GID_PORT = 4,
	GID_ADDRESS = 6,
	GID_INCARNATION = 10,
};

int soft_parse_address(const char *text, struct sockaddr_storage *address)
{
	struct addrinfo hints = { .ai_flags = AI_NUMERICHOST,
				  .ai_socktype = SOCK_STREAM };
	struct addrinfo *found;

	if (getaddrinfo(text, NULL, &hints, &found))
		return EINVAL;
	memset(address, 0, sizeof(*address));
	memcpy(address, found->ai_addr, found->ai_addrlen);
	freeaddrinfo(found);
	return 0;
}

socklen_t soft_address_len(const struct sockaddr_storage *address)
{
	return address->ss_family == AF_INET6 ? sizeof(struct sockaddr_in6) :
						sizeof(struct sockaddr_in);
}

static uint32_t hash_v6(const struct in6_addr *address)
{
	uint32_t hash = 2166136261u;
	size_t i;

	for (i = 0; i < sizeof(address->s6_addr); i++)
		hash = (hash ^ address->s6_addr[i]) * 16777619u;
	return hash;
}

void soft_make_gid(const struct sockaddr_storage *bound, union ibv_gid *gid)
{
	const struct sockaddr_in *v4 = (const struct sockaddr_in *)bound;
	const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)bound;
	bool is_v6 = bound->ss_family == AF_INET6;
	in_port_t port = is_v6 ? v6->sin6_port : v4->sin_port;
	uint32_t address = is_v6 ? hash_v6(&v6->sin6_addr) :
				   v4->sin_addr.s_addr;

	memset(gid, 0, sizeof(*gid));
	gid->raw[GID_PREFIX] = 0xfd;
	gid->raw[GID_MARK] = 'k';
	gid->raw[GID_FAMILY] = is_v6 ? 6 : 4;
	memcpy(gid->raw + GID_PORT, &port, sizeof(port));
	memcpy(gid->raw + GID_ADDRESS, &address, sizeof(address));
	soft_random(gid->raw + GID_INCARNATION, sizeof(*gid) - GID_INCARNATION);
}

bool soft_gid_is_ours(const union ibv_gid *gid)
{
	return gid->raw[GID_PREFIX] == 0xfd && gid->raw[GID_MARK] == 'k' &&
	       (gid->raw[GID_FAMILY] == 4 || gid->raw[GID_FAMILY] == 6);
}

static int from_gid_v6(const struct soft_context *ctx, uint32_t hash,
		       struct sockaddr_in6 *v6)
{
	const struct sockaddr_in6 *own =
		(const struct sockaddr_in6 *)&ctx->bound;

	v6->sin6_family = AF_INET6;
	v6->sin6_addr = in6addr_loopback;
	if (hash == hash_v6(&in6addr_any) || hash == hash_v6(&in6addr_loopback))
		return 0;
	if (ctx->bound.ss_family == AF_INET6 &&
	    hash == hash_v6(&own->sin6_addr)) {
		*v6 = *own;
		return 0;
	}
	return EHOSTUNREACH; /* the hash cannot be turned back: needs a hint */
}

/* "Any" is where to listen, not where to call: take the loopback for it. */
static void replace_any(struct sockaddr_storage *address)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)address;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)address;

	if (address->ss_family == AF_INET && v4->sin_addr.s_addr == INADDR_ANY)
		v4->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (address->ss_family == AF_INET6 &&
	    IN6_IS_ADDR_UNSPECIFIED(&v6->sin6_addr))
		v6->sin6_addr = in6addr_loopback;
}

int soft_resolve(const struct soft_context *ctx, const union ibv_gid *gid,
		 const char *hint, struct sockaddr_storage *address)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)address;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)address;
	uint32_t in_gid;
	in_port_t port;
	int err = 0;

	memcpy(&port, gid->raw + GID_PORT, sizeof(port));
	memcpy(&in_gid, gid->raw + GID_ADDRESS, sizeof(in_gid));
	memset(address, 0, sizeof(*address));
	if (*hint) {
		err = soft_parse_address(hint, address);
	} else if (gid->raw[GID_FAMILY] == 4) {
		v4->sin_family = AF_INET;
		v4->sin_addr.s_addr = in_gid;
	} else {
		err = from_gid_v6(ctx, in_gid, v6);
	}
	if (err)
		return EHOSTUNREACH;
	replace_any(address);
	if (address->ss_family == AF_INET6)
		v6->sin6_port = port;
	else
		v4->sin_port = port;
	return 0;
}
