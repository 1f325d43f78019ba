"""A process that uses the cache of a sidecar: its memory, arrivals, and requests.

Everything here blocks, may be called from any thread, and works without an event
loop: one thread reads what the sidecar says.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import queue
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from kvxfer import shared_messages as messages
from kvxfer.errors import (
    BrokenPeerError,
    ClosedResourceError,
    ControlError,
    KVXferError,
    ProtocolError,
    UsageError,
)
from kvxfer.layout import Group, Plane, PlaneLayer
from kvxfer.memory import address_range
from kvxfer.regions import Span
from kvxfer.shared_messages import GaveUp, Landed, TicketNews
from kvxfer.shared_ticket import SharedTicket

__all__ = ["Attachment", "SharedTicket"]


class Attachment:
    """The connection of a process to a sidecar; made by :meth:`open`.

    It ends with :meth:`close`, or with either process. What this process has offered
    and is not done is fenced then: nothing of it lands any more.

    Attributes:
      path: Of the sidecar's socket.
      timeout: Seconds that the sidecar has for an answer. One that takes longer counts
        as gone, and what it says later is not heard.
      groups: What its cache is.
      spans: The memory, by group, plane and layer.
    """

    def __init__(self, path: str, connection: socket.socket, timeout: float) -> None:
        self.path = path
        self.timeout = timeout
        self.groups: list[Group] = []
        self.spans: dict[tuple[str, str, int], Span] = {}
        self._socket = connection
        self._sending = threading.Lock()
        self._arrivals: queue.SimpleQueue[Landed | GaveUp | None] = queue.SimpleQueue()
        self._tickets: dict[str, SharedTicket] = {}
        self._answers: dict[int, queue.SimpleQueue[str]] = {}
        self._number = 0
        self._state = "open"
        self._why = "is gone"
        self._ending = threading.Lock()
        self._reader = threading.Thread(
            target=self._read, name="kvxfer-share", daemon=True
        )

    @classmethod
    def open(cls, path: str, timeout: float) -> Attachment:
        """Connect to a sidecar and map its memory.

        Args:
          path: Of its socket, with or without ``unix:`` in front.
          timeout: Seconds, for this and for each answer later.

        Raises:
          ControlError: Nobody is there, or the permissions of the path do not let
            this process in.
          ProtocolError: What is there is no sidecar of this release.
          UsageError: ``path`` is no path.
        """
        path = messages.socket_path(path)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self = cls(path, connection, timeout)
        try:
            connection.settimeout(timeout)
            connection.connect(path)
            self._take_memory()
            connection.settimeout(None)
        except OSError as error:
            connection.close()
            raise ControlError(
                f"cannot attach to {path}: {error.strerror or error}",
                hint="Is kvxfer serve --share running there, and may this user write "
                "to the path?",
            ) from error
        except BaseException:
            connection.close()
            raise
        self._reader.start()
        return self

    def _take_memory(self) -> None:
        fds = array.array("i")
        space = socket.CMSG_SPACE(messages.MAX_FILES * fds.itemsize)
        head, ancillary, _, _ = self._socket.recvmsg(
            4, space, socket.MSG_CMSG_CLOEXEC | socket.MSG_WAITALL
        )
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        try:
            layout = self._message(head)
            if not isinstance(layout, messages.Layout):
                raise ProtocolError("the sidecar does not say what its memory is")
            if layout.version != messages.VERSION:
                raise ProtocolError(
                    f"the sidecar speaks version {layout.version} of the protocol, "
                    f"this process {messages.VERSION}",
                    hint="Run one release of kvxfer on both sides.",
                )
            if len(fds) != len(layout.sizes):
                raise ProtocolError(
                    f"{len(fds)} descriptors came, not {len(layout.sizes)}"
                )
            files = [_map(fd, size) for fd, size in zip(fds, layout.sizes, strict=True)]
        finally:
            for fd in fds:
                os.close(fd)
        for info in layout.groups:
            self._add_group(info, files)

    def _add_group(self, info: messages.GroupInfo, files: list[Span]) -> None:
        planes: dict[str, dict[int, PlaneLayer]] = {}
        for place in info.places:
            if not 0 <= place.file < len(files):
                raise ProtocolError(f"there is no file {place.file}")
            span = files[place.file]
            assert span.allocation is not None
            found = PlaneLayer(
                span.allocation[0] + place.offset,
                place.n_blocks,
                place.block_bytes,
                place.block_stride,
                place.dtype,
            )
            if place.offset < 0 or found.end > span.allocation[1]:
                raise ProtocolError(f"{found} is outside the memory that came")
            planes.setdefault(place.plane, {})[place.layer] = found
            self.spans[info.name, place.plane, place.layer] = span
        self.groups.append(
            Group(info.name, tuple(Plane(name, of) for name, of in planes.items()))
        )

    # -- what comes ------------------------------------------------------------------

    def _exactly(self, n: int) -> bytes:
        found = bytearray()
        while len(found) < n:
            some = self._socket.recv(min(1 << 20, n - len(found)))
            if not some:
                raise ConnectionResetError("the sidecar is gone")
            found += some
        return bytes(found)

    def _message(self, head: bytes) -> object:
        head += self._exactly(4 - len(head))
        body = self._exactly(messages.length_of(head))
        return messages.decode(body, messages.News)

    def _read(self) -> None:
        """Take what the sidecar says until one of the two ends it."""
        try:
            while True:
                self._take(self._message(b""))
        except (OSError, KVXferError):
            self._end("broken")
        finally:
            self._arrivals.put(None)
            for ticket in list(self._tickets.values()):
                ticket._lose(f"the sidecar {self._why}")
            for answer in list(self._answers.values()):
                answer.put("")  # none: the state says why

    def _end(self, state: str, why: str = "is gone") -> None:
        """Say how the connection ends, if it has not, and wake all that wait for it."""
        with self._ending:
            if self._state != "open":
                return
            self._state, self._why = state, why
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _gone(self) -> BrokenPeerError:
        return BrokenPeerError(
            f"the sidecar at {self.path} {self._why}",
            hint="Attach again when it runs again; what was offered is fenced then.",
        )

    def _take(self, message: object) -> None:
        if isinstance(message, (Landed, GaveUp)):
            self._arrivals.put(message)
        elif isinstance(message, TicketNews):
            ticket = self._tickets.get(message.request_id)
            if ticket is not None:
                ticket._take(message)
                if ticket.is_over:
                    del self._tickets[message.request_id]
        elif isinstance(message, messages.Answer):
            answer = self._answers.get(message.number)
            if answer is not None:
                answer.put(message.error)

    def arrivals(self) -> Iterator[Landed | GaveUp]:
        """Yield what has landed, or was given up, until :meth:`close`.

        What came while no process was attached comes first. Each goes to one caller.

        Raises:
          BrokenPeerError: The sidecar is gone.
        """
        while True:
            found = self._arrivals.get()
            if found is None:
                self._arrivals.put(None)  # for others who wait
                if self._state == "broken":
                    raise self._gone()
                return
            yield found

    # -- what goes -------------------------------------------------------------------

    def offer(
        self,
        peer: str | Iterable[str],
        request_id: str,
        blocks: Mapping[str, Iterable[int]],
        *,
        first_block: int = 0,
        sources: int | None = None,
        lease: float | None = None,
        checksum: bool = False,
    ) -> SharedTicket:
        """Offer blocks for a request, as ``Server.offer`` does.

        Raises:
          UsageError: The sidecar does not take it; its words.
          BrokenPeerError: The sidecar is gone, or does not answer for
            :attr:`timeout` seconds. It fences what it has heard of when it runs again.
        """
        if request_id in self._tickets:
            raise UsageError(f"request {request_id!r} is offered already")
        ticket = SharedTicket(request_id, lambda why: self._abort(request_id, why))
        self._tickets[request_id] = ticket
        peers = [peer] if isinstance(peer, str) else list(peer)
        ids = {group: [int(i) for i in of] for group, of in blocks.items()}
        try:
            self._command(
                lambda number: messages.Offer(
                    number,
                    request_id,
                    peers,
                    ids,
                    first_block,
                    sources,
                    lease,
                    checksum,
                )
            )
        except BaseException:
            self._tickets.pop(request_id, None)
            raise
        return ticket

    def _abort(self, request_id: str, reason: str) -> None:
        """Give a request up, and wait for its fence, however long that takes."""
        self._command(
            lambda number: messages.Abort(number, request_id, reason),
            # What is not offered has no fence to wait for.
            lambda number: messages.Abort(number, "", ""),
        )

    def _command(
        self,
        make: Callable[[int], messages.Command],
        ask: Callable[[int], messages.Command] | None = None,
    ) -> None:
        """Send a command and wait for the answer.

        Args:
          make: Makes the command, of its number.
          ask: Makes one that is answered at once: the answer to the other may take any
            time, as long as this one is answered.
        """
        answer: queue.SimpleQueue[str] = queue.SimpleQueue()
        with self._sending:
            self._number += 1
            number = self._number
            frame = messages.encode(make(number))
            self._answers[number] = answer
            if self._state == "open":
                self._send(frame)
        try:
            while self._state == "open":
                try:
                    error = answer.get(timeout=self.timeout)
                except queue.Empty:
                    if ask is None:
                        self._end("broken", self._silence)
                    else:
                        self._command(ask)
                    continue
                if error:
                    raise UsageError(error)
                break
        finally:
            del self._answers[number]
        if self._state == "broken":
            raise self._gone()
        if self._state == "closed":
            raise ClosedResourceError(f"the attachment to {self.path} is closed")

    @property
    def _silence(self) -> str:
        return f"does not answer for {self.timeout:g} s"

    def _send(self, frame: bytes) -> None:
        """Send, unless the sidecar reads nothing for too long: then it counts as gone.

        The socket has no timeout, which would be the reader's, too.
        """
        left = memoryview(frame)
        deadline = time.monotonic() + self.timeout
        room = select.poll()
        room.register(self._socket, select.POLLOUT)
        try:
            while left and self._state == "open":
                try:
                    left = left[self._socket.send(left, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    seconds = deadline - time.monotonic()
                    if seconds <= 0 or not room.poll(seconds * 1000):
                        self._end("broken", self._silence)
        except OSError:
            self._end("broken")

    def close(self) -> None:
        """End the connection; the memory stays mapped while it is used. Twice is fine.

        What was offered and is not over is fenced by the sidecar. Calls of other
        threads end with ClosedResourceError.
        """
        # Before the lock: who has it may wait for a sidecar that reads nothing.
        self._end("closed")
        if threading.current_thread() is not self._reader:
            self._reader.join()
        with self._sending:
            self._socket.close()


def _map(fd: int, size: int) -> Span:
    """Map a file that came; the span owns the mapping, and a descriptor of it."""
    if size < 1 or os.fstat(fd).st_size < size:
        raise ProtocolError(f"a file of {os.fstat(fd).st_size} bytes, not {size}")
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    owner = np.frombuffer(memory, dtype=np.uint8)
    return Span(address_range(owner), True, owner)
