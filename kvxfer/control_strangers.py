"""What comes without a connection: how much of it is read, and what is answered.

Whoever reaches the port can send it, so it must cost little, and cost nobody else: a
Hello is always read, and has a rate of its own.
"""

from __future__ import annotations

from kvxfer import wire
from kvxfer.control_link import refuse_of
from kvxfer.errors import ProtocolError, VersionMismatchError
from kvxfer.rates import Buckets

__all__ = ["Strangers"]

# How a Hello begins, behind the header and the size of the map.
_HELLO = b"\xa4type\xa5hello"
_HEAD_BYTES = 32


class Strangers:
    """Answers who has no connection, at most so often in a second.

    Args:
      rate: For each client: garbage that is read and answered, and likewise messages
        of connections that are not there.

    Attributes:
      garbage: Frames that were no valid message, those that were not read among them.
      strangers: Messages of connections that are not there.
    """

    def __init__(self, rate: float) -> None:
        self.garbage = self.strangers = 0
        self._nonsense = Buckets(rate)
        self._words = Buckets(rate)

    def reads(self, client: str, head: memoryview, now: float) -> bool:
        """Whether to read a frame: not if ``client`` has sent garbage too often.

        Args:
          client: By key, or address.
          head: The frame; only its beginning is looked at.
          now: Of the loop's clock, in seconds.
        """
        if self._nonsense.has(client, now) or _HELLO in bytes(head[:_HEAD_BYTES]):
            return True
        self.garbage += 1
        return False

    def nonsense(
        self, client: str, error: ProtocolError | VersionMismatchError, now: float
    ) -> wire.Refuse | None:
        """Count a frame that was no message; return what to answer, if anything."""
        self.garbage += 1
        may_answer = self._nonsense.take(client, now)
        if may_answer and isinstance(error, VersionMismatchError):
            return refuse_of(error)
        return None

    def says(
        self, client: str, message: wire.Message, now: float
    ) -> wire.Refuse | None:
        """Count a message of a connection that is not there; return the answer."""
        self.strangers += 1
        if not self._words.take(client, now):
            return None  # Not even an answer: it would help to flood.
        if isinstance(message, (wire.Bye, wire.Refuse)):
            return None
        # A peer of our past life, or one taken for dead: let it know at once.
        text = "no such connection: the listener restarted or has dropped it"
        code = wire.RefuseCode.UNKNOWN_CONNECTION.value
        return wire.Refuse(code=code, message=text)
