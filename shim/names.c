/*
 * The software device under the names of other NICs, for tests of the choice
 * between several:
 *
 *   KVXFER_SHIM_DEVICES="mlx5_0:infiniband mlx5_1"
 *
 * Each is an adapter of its own. Those that say InfiniBand only say so.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shim.h"

#define MAX_NAMES 16
#define LID 17

static struct ibv_device named[MAX_NAMES];
static bool is_infiniband[MAX_NAMES];
static int n_named;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void read_names(void)
{
	const char *text = getenv("KVXFER_SHIM_DEVICES");
	struct ibv_device **list;
	char *copy, *name, *rest;

	if (!text || !*text)
		return;
	list = shim_soft.get_device_list(NULL);
	copy = strdup(text);
	if (!list || !copy)
		abort();
	for (name = strtok_r(copy, " ", &rest); name && n_named < MAX_NAMES;
	     name = strtok_r(NULL, " ", &rest)) {
		char *layer = strchr(name, ':');

		if (layer)
			*layer++ = '\0';
		named[n_named] = *list[0];
		snprintf(named[n_named].name, sizeof(named[0].name), "%s",
			 name);
		is_infiniband[n_named++] = layer &&
					   !strcmp(layer, "infiniband");
	}
	free(copy);
	shim_soft.free_device_list(list);
}

struct ibv_device **shim_get_device_list(int *num_devices)
{
	struct ibv_device **list;
	int i;

	pthread_once(&once, read_names);
	if (!n_named)
		return shim_soft.get_device_list(num_devices);
	list = calloc((size_t)n_named + 1, sizeof(struct ibv_device *));
	if (!list)
		return NULL;
	for (i = 0; i < n_named; i++)
		list[i] = &named[i];
	if (num_devices)
		*num_devices = n_named;
	return list;
}

void shim_rename_port(const struct ibv_context *context,
		      struct ibv_port_attr *attr)
{
	int i;

	for (i = 0; i < n_named; i++)
		if (context->device == &named[i] && is_infiniband[i]) {
			attr->link_layer = IBV_LINK_LAYER_INFINIBAND;
			attr->lid = LID;
		}
}
