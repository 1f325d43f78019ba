"""Whether this process may open as many files as a connection takes.

What runs out of descriptors in the middle of a connection is ZMQ's thread or the
device's: neither can say so to whoever waits, and a message that cannot be taken
looks like a peer that is silent. So it is asked before.
"""

from __future__ import annotations

import errno
import os
import resource

__all__ = ["REMEDY", "shortage"]

#: What to do about it.
REMEDY = "Raise `ulimit -n`, or close peers that are not needed."
#: A link and its queues, its monitor, and a device's connection with its memory files
#: are about half of it; the rest is for what the process opens meanwhile.
_WANTED = 16


def shortage() -> str:
    """Say that there are not descriptors enough for one more connection, or nothing."""
    taken: list[int] = []
    try:
        taken.append(os.open(os.devnull, os.O_RDONLY))
        while len(taken) < _WANTED:
            taken.append(os.dup(taken[0]))
    except OSError as error:
        if error.errno == errno.ENFILE:
            return "the system is out of file descriptors (fs.file-max)"
        if error.errno != errno.EMFILE:
            return ""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return (
            f"of {limit} file descriptors (ulimit -n) fewer than the {_WANTED} are "
            "left that one more connection may take"
        )
    finally:
        for fd in taken:
            os.close(fd)
    return ""
