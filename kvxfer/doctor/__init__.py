"""``kvxfer doctor``: looks at a machine as an expert would.

``checks`` and ``fabric`` read what the machine says of itself, on this machine or on
a copy of another one's ``/sys``, ``/proc`` and ``/dev``; ``transfer`` moves bytes and
compares them, here and to another host. A check is a function that yields findings.
"""
