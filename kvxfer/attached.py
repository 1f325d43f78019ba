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
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping

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
from kvxfer.memory import Span, address_range
from kvxfer.shared_messages import GaveUp, Landed, TicketNews

__all__ = ["Attachment", "SharedTicket"]

_OVER = ("done", "aborted", "failed")


class SharedTicket:
    """A request that this process has offered through the sidecar.

    All attributes may be read from any thread, without waiting.

    Attributes:
      request_id: As it was offered.
      state: As of ``Ticket``: offered, arriving, ending, done, aborted, failed.
      layers_done: The layers that are in place.
      error: Why it ended badly; empty while it goes on, and when all went well.
      aux: What the writer gave to ``finish``.
    """

    def __init__(self, attachment: Attachment, request_id: str) -> None:
        self.request_id = request_id
        self.state = "offered"
        self.layers_done: tuple[int, ...] = ()
        self.error = ""
        self.aux = b""
        self._attachment = attachment
        self._changed = threading.Condition()

    def __repr__(self) -> str:
        return f"<SharedTicket {self.request_id!r}, {self.state}>"

    @property
    def is_over(self) -> bool:
        """Whether no byte of it can land any more."""
        return self.state in _OVER

    def _take(self, news: TicketNews) -> None:
        with self._changed:
            self.state = news.state
            self.layers_done = tuple(news.layers_done)
            self.error = news.error
            self.aux = news.aux
            self._changed.notify_all()

    def _lose(self) -> None:
        with self._changed:
            if not self.is_over:
                self.state, self.error = "failed", "the sidecar is gone"
            self._changed.notify_all()

    def join_layer(self, layer: int, timeout: float | None = None) -> None:
        """Wait until a layer is in place.

        Raises:
          BrokenPeerError: The request ended before.
          TimeoutError: It is not there after so many seconds.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: layer in self.layers_done or self.is_over, timeout
            )
        if layer in self.layers_done:
            return
        if not self.is_over:
            raise TimeoutError(f"layer {layer} is not there after {timeout:g} s")
        raise self._failure()

    def join(self, timeout: float | None = None) -> None:
        """Wait until all is in place.

        Raises:
          BrokenPeerError: The request ended badly.
          TimeoutError: It goes on after so many seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self.is_over, timeout)
        if not self.is_over:
            raise TimeoutError(f"{self!r} goes on after {timeout:g} s")
        if self.state != "done":
            raise self._failure()

    def abort(self, reason: str = "") -> None:
        """Give it up; returns when no byte of it can land any more.

        Raises:
          BrokenPeerError: The sidecar is gone.
        """
        self._attachment._command(
            lambda number: messages.Abort(number, self.request_id, reason)
        )

    def _failure(self) -> BrokenPeerError:
        return BrokenPeerError(
            f"request {self.request_id!r} {self.state}: "
            f"{self.error or 'no writer holds that layer'}"
        )


class Attachment:
    """The connection of a process to a sidecar; made by :meth:`open`.

    It ends with :meth:`close`, or with either process. What this process has offered
    and is not done is fenced then: nothing of it lands any more.
    """

    def __init__(self, path: str, connection: socket.socket) -> None:
        self.path = path
        self.groups: list[Group] = []
        self.spans: dict[tuple[str, str, int], Span] = {}
        self._socket = connection
        self._sending = threading.Lock()
        self._arrivals: queue.SimpleQueue[Landed | GaveUp | None] = queue.SimpleQueue()
        self._tickets: dict[str, SharedTicket] = {}
        self._answers: dict[int, queue.SimpleQueue[str]] = {}
        self._number = 0
        self._state = "open"
        self._reader = threading.Thread(
            target=self._read, name="kvxfer-share", daemon=True
        )

    @classmethod
    def open(cls, path: str, timeout: float) -> Attachment:
        """Connect to a sidecar and map its memory.

        Args:
          path: Of its socket, with or without ``unix:`` in front.
          timeout: Seconds.

        Raises:
          ControlError: Nobody is there, or the permissions of the path do not let
            this process in.
          ProtocolError: What is there is no sidecar of this release.
        """
        path = path.removeprefix("unix:")
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self = cls(path, connection)
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
            if self._state == "open":
                self._state = "broken"
        finally:
            self._arrivals.put(None)
            for ticket in list(self._tickets.values()):
                ticket._lose()
            for answer in list(self._answers.values()):
                answer.put("the sidecar is gone")

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
                    raise BrokenPeerError(f"the sidecar at {self.path} is gone")
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
          BrokenPeerError: The sidecar is gone.
        """
        if request_id in self._tickets:
            raise UsageError(f"request {request_id!r} is offered already")
        ticket = self._tickets[request_id] = SharedTicket(self, request_id)
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

    def _command(self, make: object) -> None:
        """Send a command and wait for the answer."""
        assert callable(make)
        answer: queue.SimpleQueue[str] = queue.SimpleQueue()
        with self._sending:
            if self._state == "closed":
                raise ClosedResourceError(f"the attachment to {self.path} is closed")
            self._number += 1
            number = self._number
            self._answers[number] = answer
            if self._state == "broken":
                answer.put("the sidecar is gone")
            else:
                with contextlib.suppress(OSError):  # the reader hears of it, too
                    self._socket.sendall(messages.encode(make(number)))
        error = answer.get()
        del self._answers[number]
        if self._state == "broken":
            raise BrokenPeerError(f"the sidecar at {self.path} is gone")
        if self._state == "closed":
            raise ClosedResourceError(f"the attachment to {self.path} is closed")
        if error:
            raise UsageError(error)

    def close(self) -> None:
        """End the connection; the memory stays mapped while it is used. Twice is fine.

        What was offered and is not over is fenced by the sidecar.
        """
        with self._sending:
            if self._state != "broken":
                self._state = "closed"
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._socket.close()


def _map(fd: int, size: int) -> Span:
    """Map a file that came; the span owns the mapping, and a descriptor of it."""
    if size < 1 or os.fstat(fd).st_size < size:
        raise ProtocolError(f"a file of {os.fstat(fd).st_size} bytes, not {size}")
    memory = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    owner = np.frombuffer(memory, dtype=np.uint8)
    return Span(address_range(owner), True, owner)
