/*
 * The software device as the NICs of another machine, for tests of the choice
 * between devices, ports and GIDs:
 *
 *   KVXFER_SHIM_SYSFS=DIR    its /sys, as python -m tests.machines makes them
 *   KVXFER_SHIM_NETWORK=DIR  what its packets leave by, see network.c
 *
 * Each NIC is an adapter of its own. What its verbs say of ports and GIDs is
 * read from the same files as kvxfer reads, so the two cannot disagree.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "shim.h"

#define MAX_NICS 32
#define MAX_PORTS 4
#define MAX_GIDS 1024
#define MAX_STATE 7 /* of the enums of port states, logical and physical */

struct nic {
	struct ibv_device device;
	uint32_t n_ports;
	struct shim_port ports[MAX_PORTS];
};

static struct nic nics[MAX_NICS];
static int n_nics;
static int load_error; /* errno */
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* --- the files ------------------------------------------------------------ */

static const char *sysfs;

__attribute__((format(printf, 2, 3))) static void path_of(char path[PATH_MAX],
							  const char *format,
							  ...)
{
	char rest[PATH_MAX / 2];
	va_list args;

	va_start(args, format);
	vsnprintf(rest, sizeof(rest), format, args);
	va_end(args);
	snprintf(path, PATH_MAX, "%.2000s/class/%s", sysfs, rest);
}

/* The first line; false where it cannot be read. */
static bool read_line(const char *path, char line[64])
{
	FILE *file = fopen(path, "re");
	bool found = file && fgets(line, 64, file);

	if (file)
		fclose(file);
	if (found)
		line[strcspn(line, "\n")] = '\0';
	return found;
}

static int refuse(const char *path, const char *line, const char *wanted)
{
	fprintf(stderr, "libkvxsoft: KVXFER_SHIM_SYSFS: %s: '%s' is not %s\n",
		path, line, wanted);
	return EINVAL;
}

/* A file that must be there. */
static int demand(const char *path, char line[64], const char *wanted)
{
	return read_line(path, line) ? 0 : refuse(path, "", wanted);
}

static int read_number(const char *path, int base, unsigned long limit,
		       const char *wanted, unsigned long *number)
{
	char line[64], *end;
	int err = demand(path, line, wanted);

	if (err)
		return err;
	*number = strtoul(line, &end, base);
	/* Behind the number of a state comes its name. */
	if (end == line || (*end && *end != ':') || *number > limit)
		return refuse(path, line, wanted);
	return 0;
}

/* --- ports and GIDs ------------------------------------------------------- */

bool shim_gid_is_empty(const union ibv_gid *gid)
{
	static const union ibv_gid empty;

	return !memcmp(gid, &empty, sizeof(empty));
}

static bool in_force(const char *port, int index)
{
	char path[PATH_MAX], netdev[64], state[64];

	path_of(path, "%s/gid_attrs/ndevs/%d", port, index);
	if (!read_line(path, netdev))
		return false;
	path_of(path, "net/%s/operstate", netdev);
	return read_line(path, state) &&
	       (!strcmp(state, "up") || !strcmp(state, "unknown"));
}

static int read_gid(const char *port, int index, struct shim_gid *gid)
{
	char path[PATH_MAX], line[64];

	path_of(path, "%s/gids/%d", port, index);
	if (demand(path, line, "a GID"))
		return EINVAL;
	if (inet_pton(AF_INET6, line, &gid->gid) != 1)
		return refuse(path, line, "a GID");
	if (shim_gid_is_empty(&gid->gid))
		return 0;
	path_of(path, "%s/gid_attrs/types/%d", port, index);
	if (demand(path, line, "IB/RoCE v1 or RoCE v2"))
		return EINVAL;
	if (!strcmp(line, "RoCE v2"))
		gid->type = IBV_GID_TYPE_ROCE_V2;
	else if (!strcmp(line, "IB/RoCE v1"))
		gid->type = IBV_GID_TYPE_ROCE_V1;
	else
		return refuse(path, line, "IB/RoCE v1 or RoCE v2");
	gid->in_force = in_force(port, index);
	return 0;
}

static int read_table(const char *place, struct shim_port *port)
{
	char path[PATH_MAX];
	int i, err = 0;

	for (i = 0; i < MAX_GIDS; i++) {
		path_of(path, "%s/gids/%d", place, i);
		if (access(path, F_OK))
			break;
	}
	port->n_gids = i;
	port->gids = calloc((size_t)i + 1, sizeof(*port->gids));
	if (!port->gids)
		return ENOMEM;
	for (i = 0; !err && i < port->n_gids; i++)
		err = read_gid(place, i, &port->gids[i]);
	/* There a GID is the port's own: its netdev is IPoIB's, if it has any. */
	for (i = 0;
	     port->link_layer == IBV_LINK_LAYER_INFINIBAND && i < port->n_gids;
	     i++) {
		port->gids[i].type = IBV_GID_TYPE_IB;
		port->gids[i].in_force = true;
	}
	return err;
}

static int read_port(const char *place, struct shim_port *port)
{
	char path[PATH_MAX], line[64];
	unsigned long state, phys_state, lid;
	int err;

	path_of(path, "%s/state", place);
	err = read_number(path, 10, IBV_PORT_ACTIVE_DEFER,
			  "a state such as '4: ACTIVE'", &state);
	path_of(path, "%s/phys_state", place);
	if (!err)
		err = read_number(path, 10, MAX_STATE,
				  "a state such as '5: LinkUp'", &phys_state);
	path_of(path, "%s/lid", place);
	if (!err)
		err = read_number(path, 16, UINT16_MAX, "a LID such as 0x11",
				  &lid);
	path_of(path, "%s/link_layer", place);
	if (!err)
		err = demand(path, line, "Ethernet or InfiniBand");
	if (err)
		return err;
	if (!strcmp(line, "Ethernet"))
		port->link_layer = IBV_LINK_LAYER_ETHERNET;
	else if (!strcmp(line, "InfiniBand"))
		port->link_layer = IBV_LINK_LAYER_INFINIBAND;
	else
		return refuse(path, line, "Ethernet or InfiniBand");
	port->state = (enum ibv_port_state)state;
	port->phys_state = (uint8_t)phys_state;
	port->lid = (uint16_t)lid;
	return read_table(place, port);
}

/* --- the machine ---------------------------------------------------------- */

static int read_nic(const char *name, struct nic *nic)
{
	char path[PATH_MAX], place[512];
	int err = 0;

	path_of(path, "infiniband");
	if (strlen(name) >= sizeof(nic->device.name))
		return refuse(path, name, "a name of at most 63 bytes");
	strcpy(nic->device.name, name);
	for (nic->n_ports = 0; !err && nic->n_ports < MAX_PORTS;
	     nic->n_ports++) {
		snprintf(place, sizeof(place), "infiniband/%s/ports/%u", name,
			 nic->n_ports + 1);
		path_of(path, "%s", place);
		if (access(path, F_OK))
			break;
		err = read_port(place, &nic->ports[nic->n_ports]);
	}
	if (!err && !nic->n_ports)
		err = refuse(path, "", "a directory: the NIC has no ports");
	return err;
}

static int is_a_name(const struct dirent *entry)
{
	return *entry->d_name != '.';
}

static int read_machine(void)
{
	struct ibv_device **list = shim_soft.get_device_list(NULL);
	struct dirent **names;
	char path[PATH_MAX];
	int i, n, err = 0;

	if (!list)
		return ENOMEM;
	path_of(path, "infiniband");
	n = scandir(path, &names, is_a_name, versionsort);
	if (n <= 0 || n > MAX_NICS)
		err = refuse(path, "", "a directory of 1 to 32 NICs");
	for (i = 0; i < n; i++) {
		if (!err) {
			nics[i].device = *list[0];
			err = read_nic(names[i]->d_name, &nics[i]);
		}
		free(names[i]);
	}
	if (n >= 0)
		free(names);
	shim_soft.free_device_list(list);
	if (!err)
		n_nics = n;
	return err;
}

static void load(void)
{
	const char *network = getenv("KVXFER_SHIM_NETWORK");
	struct stat found;

	sysfs = getenv("KVXFER_SHIM_SYSFS");
	if (!sysfs || !*sysfs)
		return;
	if (!network || stat(network, &found) || !S_ISDIR(found.st_mode)) {
		fprintf(stderr,
			"libkvxsoft: KVXFER_SHIM_NETWORK is '%s', not a "
			"directory: KVXFER_SHIM_SYSFS needs one\n",
			network ? network : "");
		load_error = EINVAL;
		return;
	}
	load_error = read_machine();
}

struct ibv_device **shim_get_device_list(int *num_devices)
{
	struct ibv_device **list;
	int i;

	pthread_once(&once, load);
	if (load_error) {
		errno = load_error;
		return NULL;
	}
	if (!n_nics)
		return shim_soft.get_device_list(num_devices);
	list = calloc((size_t)n_nics + 1, sizeof(struct ibv_device *));
	if (!list)
		return NULL;
	for (i = 0; i < n_nics; i++)
		list[i] = &nics[i].device;
	if (num_devices)
		*num_devices = n_nics;
	return list;
}

static const struct nic *nic_of(const struct ibv_context *context)
{
	int i;

	for (i = 0; i < n_nics; i++)
		if (context->device == &nics[i].device)
			return &nics[i];
	return NULL;
}

bool shim_is_nic(const struct ibv_context *context)
{
	return nic_of(context);
}

const struct shim_port *shim_port(const struct ibv_context *context,
				  uint32_t port_num)
{
	const struct nic *nic = nic_of(context);

	return nic && port_num >= 1 && port_num <= nic->n_ports ?
		       &nic->ports[port_num - 1] :
		       NULL;
}

/* --- queries -------------------------------------------------------------- */

int shim_query_device(struct ibv_context *context, struct ibv_device_attr *attr)
{
	const struct nic *nic = nic_of(context);
	int err = shim_soft.query_device(context, attr);

	if (!err && nic)
		attr->phys_port_cnt = (uint8_t)nic->n_ports;
	return err;
}

int shim_query_port(struct ibv_context *context, uint8_t port_num,
		    struct ibv_port_attr *attr)
{
	const struct shim_port *port = shim_port(context, port_num);
	int err;

	if (!shim_is_nic(context))
		return shim_soft.query_port(context, port_num, attr);
	if (!port)
		return EINVAL;
	err = shim_soft.query_port(context, 1, attr);
	if (err)
		return err;
	attr->gid_tbl_len = port->n_gids;
	attr->link_layer = port->link_layer;
	attr->lid = port->lid;
	/* A fault plan may have taken the device's own port down. */
	if (attr->state == IBV_PORT_ACTIVE) {
		attr->state = port->state;
		attr->phys_state = port->phys_state;
	}
	return 0;
}

int shim_query_gid(struct ibv_context *context, uint32_t port_num,
		   uint32_t index, struct ibv_gid_entry *entry)
{
	const struct shim_port *port = shim_port(context, port_num);

	*entry = (struct ibv_gid_entry){ .gid_index = index,
					 .port_num = port_num,
					 .gid_type = IBV_GID_TYPE_ROCE_V2 };
	if (!shim_is_nic(context))
		return port_num > UINT8_MAX ?
			       EINVAL :
			       shim_soft.query_gid(context, (uint8_t)port_num,
						   (int)index, &entry->gid);
	if (!port || index >= (uint32_t)port->n_gids)
		return EINVAL;
	if (shim_gid_is_empty(&port->gids[index].gid))
		return ENODATA;
	entry->gid = port->gids[index].gid;
	entry->gid_type = port->gids[index].type;
	return 0;
}

int shim_query_pkey(struct ibv_context *context, uint8_t port_num, int index,
		    __be16 *pkey)
{
	/* Every port has the default alone. */
	if (shim_port(context, port_num))
		port_num = 1;
	else if (shim_is_nic(context))
		return EINVAL;
	return shim_soft.query_pkey(context, port_num, index, pkey);
}
