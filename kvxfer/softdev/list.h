/* A doubly linked list through the objects that it holds. */
#ifndef KVX_SOFT_LIST_H
#define KVX_SOFT_LIST_H

#include <stdbool.h>
#include <stddef.h>

/* A head or a link. Linked to itself: an empty list, or an object on none. */
struct soft_list {
	struct soft_list *next, *prev;
};

static inline void list_init(struct soft_list *list)
{
	list->next = list->prev = list;
}

static inline bool list_empty(const struct soft_list *list)
{
	return list->next == list;
}

static inline void list_append(struct soft_list *list, struct soft_list *link)
{
	link->prev = list->prev;
	link->next = list;
	list->prev->next = link;
	list->prev = link;
}

/* Harmless on a link that is on no list. */
static inline void list_remove(struct soft_list *link)
{
	link->prev->next = link->next;
	link->next->prev = link->prev;
	list_init(link);
}

static inline struct soft_list *list_pop(struct soft_list *list)
{
	struct soft_list *first = list->next;

	if (first == list)
		return NULL;
	list_remove(first);
	return first;
}

/* The object whose member, a link for one, is at ptr. */
#define soft_of(ptr, type, member) \
	((type *)((char *)(ptr) - offsetof(type, member)))

#endif
