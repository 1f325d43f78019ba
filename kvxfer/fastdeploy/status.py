"""What ``connect`` returns."""

from __future__ import annotations

__all__ = ["CONNECTED", "ERROR", "INVALID", "ConnectStatus"]


class ConnectStatus(int):
    """A code of FastDeploy's, 0 for success, that is true only for success.

    FastDeploy tests ``ret == 0``; its documentation writes ``if comm.connect(...)``.
    Both work.
    """

    __slots__ = ()

    def __bool__(self) -> bool:
        return int(self) == 0


CONNECTED = ConnectStatus(0)
#: Refused, unreachable, or not permitted by this side's device: the log says why.
ERROR = ConnectStatus(2)
#: An argument is no address, port or number of ranks.
INVALID = ConnectStatus(4)
