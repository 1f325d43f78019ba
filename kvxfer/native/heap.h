/*
 * A binary heap of pointers ordered by (key, order), smallest first.
 *
 * It holds the operations that still have something to post: which one goes
 * next is decided here, without the GIL. The caller locks.
 */
#ifndef KVX_HEAP_H
#define KVX_HEAP_H

#include <stdint.h>
#include <stdlib.h>

struct kvx_heap_item {
	uint64_t key;
	uint64_t order; /* among equal keys: first come, first served */
	void *value;
};

struct kvx_heap {
	struct kvx_heap_item *items;
	size_t n;
	size_t capacity;
};

static inline int kvx_heap_before(const struct kvx_heap_item *a,
				  const struct kvx_heap_item *b)
{
	return a->key < b->key || (a->key == b->key && a->order < b->order);
}

static inline void kvx_heap_swap(struct kvx_heap *heap, size_t a, size_t b)
{
	struct kvx_heap_item item = heap->items[a];

	heap->items[a] = heap->items[b];
	heap->items[b] = item;
}

static inline void kvx_heap_up(struct kvx_heap *heap, size_t i)
{
	while (i > 0 &&
	       kvx_heap_before(&heap->items[i], &heap->items[(i - 1) / 2])) {
		kvx_heap_swap(heap, i, (i - 1) / 2);
		i = (i - 1) / 2;
	}
}

static inline void kvx_heap_down(struct kvx_heap *heap, size_t i)
{
	for (;;) {
		size_t first = i;

		for (size_t child = 2 * i + 1;
		     child <= 2 * i + 2 && child < heap->n; child++)
			if (kvx_heap_before(&heap->items[child],
					    &heap->items[first]))
				first = child;
		if (first == i)
			return;
		kvx_heap_swap(heap, i, first);
		i = first;
	}
}

/* Make room for `more` further items. Returns 0 or -1 (no memory). */
static inline int kvx_heap_reserve(struct kvx_heap *heap, size_t more)
{
	size_t capacity = heap->capacity ? heap->capacity : 16;
	struct kvx_heap_item *items;

	while (capacity < heap->n + more)
		capacity *= 2;
	if (capacity == heap->capacity)
		return 0;
	items = realloc(heap->items, capacity * sizeof(*items));
	if (!items)
		return -1;
	heap->items = items;
	heap->capacity = capacity;
	return 0;
}

/* Room must have been reserved. */
static inline void kvx_heap_push(struct kvx_heap *heap, uint64_t key,
				 uint64_t order, void *value)
{
	heap->items[heap->n] = (struct kvx_heap_item){ key, order, value };
	kvx_heap_up(heap, heap->n++);
}

static inline void *kvx_heap_top(const struct kvx_heap *heap)
{
	return heap->n ? heap->items[0].value : NULL;
}

static inline void kvx_heap_remove_at(struct kvx_heap *heap, size_t i)
{
	heap->items[i] = heap->items[--heap->n];
	if (i < heap->n) {
		kvx_heap_down(heap, i);
		kvx_heap_up(heap, i);
	}
}

static inline void kvx_heap_pop(struct kvx_heap *heap)
{
	kvx_heap_remove_at(heap, 0);
}

/* Take `value` out wherever it is; linear, for the rare cancellation. */
static inline void kvx_heap_remove(struct kvx_heap *heap, const void *value)
{
	for (size_t i = 0; i < heap->n; i++) {
		if (heap->items[i].value == value) {
			kvx_heap_remove_at(heap, i);
			return;
		}
	}
}

static inline void kvx_heap_free(struct kvx_heap *heap)
{
	free(heap->items);
	heap->items = NULL;
	heap->n = heap->capacity = 0;
}

#endif
