/*
 * The network between NICs that the software device stands for.
 *
 * It is a directory, KVXFER_SHIM_NETWORK. Each QP has a symbolic link there for
 * every address that its port is reached by,
 *
 *   v2-00000000000000000000ffff0a040007-00c0de   RoCE v2, the GID, the QP number
 *   v1-...                                       RoCE v1
 *   ib-0011-00c0de                               InfiniBand, the LID
 *
 * which leads to the device's own GID. So a path that no network would carry,
 * from another type of GID or to a GID of another namespace, ends nowhere here
 * as well. The file "paths" has a line for each path that a QP was given:
 *
 *   mlx5_0 port 2 gid 3: v2-... to v2-...
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "shim.h"

#define ADDRESS_BYTES 40
#define GID_DIGITS 32

static void write_gid(char text[GID_DIGITS + 1], const union ibv_gid *gid)
{
	size_t i;

	for (i = 0; i < sizeof(gid->raw); i++)
		sprintf(text + 2 * i, "%02x", gid->raw[i]);
}

static int read_gid(const char *text, union ibv_gid *gid)
{
	size_t i;

	for (i = 0; i < sizeof(gid->raw); i++)
		if (sscanf(text + 2 * i, "%2hhx", &gid->raw[i]) != 1)
			return EINVAL;
	return 0;
}

static void roce_address(char address[ADDRESS_BYTES], enum ibv_gid_type type,
			 const union ibv_gid *gid)
{
	char text[GID_DIGITS + 1];

	write_gid(text, gid);
	snprintf(address, ADDRESS_BYTES, "v%d-%s",
		 type == IBV_GID_TYPE_ROCE_V2 ? 2 : 1, text);
}

static void ib_address(char address[ADDRESS_BYTES], uint16_t lid)
{
	snprintf(address, ADDRESS_BYTES, "ib-%04x", lid);
}

static void path_of(char path[PATH_MAX], const char *address, uint32_t qpn)
{
	snprintf(path, PATH_MAX, "%s/%s-%06x", getenv("KVXFER_SHIM_NETWORK"),
		 address, qpn);
}

/* --- being reached -------------------------------------------------------- */

static int set_link(const char *address, uint32_t qpn, const char *target)
{
	char path[PATH_MAX];

	path_of(path, address, qpn);
	if (!target) {
		unlink(path);
		return 0;
	}
	/* INIT may be set twice. */
	return symlink(target, path) && errno != EEXIST ? errno : 0;
}

/* Make the links of a QP on a port, or remove them where target is NULL. */
static int set_links(const struct ibv_qp *qp, const struct shim_port *port,
		     const char *target)
{
	char address[ADDRESS_BYTES];
	int i, err = 0;

	if (port->link_layer == IBV_LINK_LAYER_INFINIBAND) {
		ib_address(address, port->lid);
		return set_link(address, qp->qp_num, target);
	}
	for (i = 0; i < port->n_gids && !err; i++) {
		if (shim_gid_is_empty(&port->gids[i].gid) ||
		    !port->gids[i].in_force)
			continue;
		roce_address(address, port->gids[i].type, &port->gids[i].gid);
		err = set_link(address, qp->qp_num, target);
	}
	return err;
}

static int join(struct ibv_qp *qp, const struct shim_port *port)
{
	char target[GID_DIGITS + 1];
	union ibv_gid own;
	int err = shim_soft.query_gid(qp->context, 1, 0, &own);

	if (err)
		return err;
	write_gid(target, &own);
	return set_links(qp, port, target);
}

void shim_leave_network(struct ibv_qp *qp)
{
	/* 0 in RESET: no port then. */
	const struct shim_port *port = shim_port(qp->context,
						 to_qp(qp)->attr.port_num);

	if (port)
		set_links(qp, port, NULL);
}

/* --- reaching others ------------------------------------------------------ */

static int note(const struct ibv_qp *qp, const struct ibv_ah_attr *ah,
		const char *from, const char *to)
{
	char path[PATH_MAX], line[256];
	int file, length, err = 0;

	snprintf(path, sizeof(path), "%s/paths", getenv("KVXFER_SHIM_NETWORK"));
	length = snprintf(line, sizeof(line), "%s port %u gid %u: %s to %s\n",
			  qp->context->device->name, ah->port_num,
			  ah->grh.sgid_index, from, to);
	file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (file < 0)
		return errno;
	if (write(file, line, (size_t)length) != length)
		err = EIO;
	close(file);
	return err;
}

/* The addresses of both ends, or why no packet would leave. */
static int route(const struct shim_port *port, const struct ibv_ah_attr *ah,
		 char from[ADDRESS_BYTES], char to[ADDRESS_BYTES])
{
	const struct shim_gid *own = NULL;

	if (port->state != IBV_PORT_ACTIVE)
		return ENETDOWN;
	if (ah->is_global) {
		if (ah->grh.sgid_index >= port->n_gids)
			return EINVAL;
		own = &port->gids[ah->grh.sgid_index];
		if (shim_gid_is_empty(&own->gid))
			return ENODATA;
	}
	if (port->link_layer == IBV_LINK_LAYER_INFINIBAND) {
		ib_address(from, port->lid);
		ib_address(to, ah->dlid);
		return 0;
	}
	if (!own)
		return EINVAL;
	/* Most NICs let the packets vanish; a device for tests says so. */
	if (!own->in_force)
		return EADDRNOTAVAIL;
	roce_address(from, own->type, &own->gid);
	roce_address(to, own->type, &ah->grh.dgid);
	return 0;
}

/* Turn the path that a NIC is given into the one that the device takes. */
static int find_peer(const struct ibv_qp *qp, const struct ibv_qp_attr *given,
		     struct ibv_ah_attr *ah)
{
	const struct ibv_ah_attr *asked = &given->ah_attr;
	const struct shim_port *port = shim_port(qp->context, asked->port_num);
	char from[ADDRESS_BYTES], to[ADDRESS_BYTES], path[PATH_MAX];
	char target[GID_DIGITS + 1] = "";
	int err;

	if (!port ||
	    asked->port_num != to_qp((struct ibv_qp *)qp)->attr.port_num)
		return EINVAL;
	err = route(port, asked, from, to);
	if (err)
		return err;
	path_of(path, to, given->dest_qp_num);
	if (readlink(path, target, GID_DIGITS) != GID_DIGITS)
		return EHOSTUNREACH;
	*ah = (struct ibv_ah_attr){ .is_global = 1, .port_num = 1 };
	err = read_gid(target, &ah->grh.dgid);
	return err ? err : note(qp, asked, from, to);
}

int shim_modify_qp(struct ibv_qp *qp, struct ibv_qp_attr *attr, int mask)
{
	const struct shim_port *port = shim_port(qp->context, attr->port_num);
	struct ibv_qp_attr inner = *attr;
	int err = 0;

	if (!shim_is_nic(qp->context))
		return shim_soft.modify_qp(qp, attr, mask);
	if (mask & IBV_QP_PORT) {
		if (!port)
			return EINVAL;
		inner.port_num = 1;
	}
	if (mask & IBV_QP_STATE && attr->qp_state == IBV_QPS_RESET)
		shim_leave_network(qp);
	if (mask & IBV_QP_AV)
		err = find_peer(qp, attr, &inner.ah_attr);
	if (!err)
		err = shim_soft.modify_qp(qp, &inner, mask);
	if (err)
		return err;
	/* What it is asked for later is what it was given here. */
	if (mask & IBV_QP_AV)
		to_qp(qp)->attr.ah_attr = attr->ah_attr;
	if (mask & IBV_QP_PORT) {
		shim_leave_network(qp);
		to_qp(qp)->attr.port_num = attr->port_num;
		err = join(qp, port);
	}
	return err;
}
