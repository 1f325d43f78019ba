"""Programs that use kvxfer the way an application does.

A package so that ``python -m examples.NAME`` finds the one in this directory
and never a stray ``examples`` that some other distribution installed.
"""
