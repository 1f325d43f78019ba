"""``kvxfer bench``: what a transfer costs, beside the machine's limits and others.

The command starts pairs of processes, one pair for a *contender* in a *round*. Each
pair moves the same blocks, checks them, and says how long it took; nothing of one
pair is left when the next begins. ``workload`` says which blocks, ``side`` is what all
pairs have in common, ``runner`` starts them in turn, ``report`` and ``plots`` say what
came out.

``side``, ``workload`` and ``peers`` also run in the Python of another engine, where
kvxfer's extensions cannot: they need numpy and nothing else.
"""
