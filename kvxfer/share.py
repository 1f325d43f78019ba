"""The sidecar's side of a shared cache: hands its memory and news to local processes.

A process that attaches gets the descriptors of the cache's memory and is told what
lands; it may offer blocks for requests. When it goes, however it goes, what it has
offered and is not done is fenced, and the cache, the server and its connections stay.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import logging
import os
import socket
import stat
import time
from pathlib import Path

from kvxfer import Arrival, Failure, KVCache, Server, Ticket
from kvxfer import shared_messages as messages
from kvxfer.errors import (
    AddressInUseError,
    ControlError,
    KVXferError,
    ProtocolError,
    UsageError,
)

__all__ = ["Share"]

_log = logging.getLogger("kvxfer.share")

# News kept while no process is attached.
_MAX_PARKED = 65536
# What a process that does not read may cost, before it is let go.
_MAX_UNREAD_BYTES = 64 << 20
# After a connection that could not be taken: seconds to the next attempt, and
# between two warnings.
_REFUSED_PAUSE = 0.1
_LOG_INTERVAL = 10.0


class Share:
    """Shares the cache of a server with processes of this host.

    Use as an asynchronous context. Whoever owns the server hands on what it hears by
    :meth:`tell`.

    Args:
      server: Open, on ``cache``.
      cache: In memory of its own: ``KVCache.allocate``.
      path: Of a Unix socket, with or without ``unix:`` in front. Who may write to it
        may attach.
      mode: Its permissions.

    Attributes:
      refused: How often a connection could not be taken, for want of descriptors or
        memory; it waits, and is tried again.
    """

    def __init__(
        self, server: Server, cache: KVCache, path: str, mode: int = 0o600
    ) -> None:
        self.path = messages.socket_path(path)
        self.refused = 0
        self._next_log = 0.0
        self._server = server
        self._mode = mode
        self._files, self._layout = _describe(cache)
        self._groups = {group.name: group.layers for group in cache.groups}
        self._sessions: set[_Session] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._parked: collections.deque[messages.News] = collections.deque(
            maxlen=_MAX_PARKED
        )
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Share:
        self._socket = _listen(self.path, self._mode)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    @property
    def attached(self) -> int:
        """How many processes are attached."""
        return len(self._sessions)

    async def close(self) -> None:
        """Let all processes go and fence what they have offered. Twice is fine."""
        listening, self._socket = self._socket, None
        if listening is None:
            return
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        assert self._accepting is not None
        tasks = {self._accepting, *self._tasks}
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        listening.close()

    def tell(self, news: Arrival | Failure) -> None:
        """Hand on what the server has said; kept while no process is attached."""
        message: messages.News
        if isinstance(news, Arrival):
            message = messages.Landed(
                news.peer,
                news.request_id,
                news.layer,
                news.block_ids.tolist(),
                news.group,
                news.bytes,
            )
        else:
            message = messages.GaveUp(
                news.peer, news.request_id, list(news.layers), news.reason
            )
        if not self._sessions:
            self._parked.append(message)
        for session in list(self._sessions):
            session.send(message)

    async def _accept(self) -> None:
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._socket)
            except OSError as error:
                self._log_refused(error)
                # It still waits: the next attempt would fail like this one.
                await asyncio.sleep(_REFUSED_PAUSE)
                continue
            task = loop.create_task(self._attend(connection))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _log_refused(self, error: OSError) -> None:
        self.refused += 1
        now = time.monotonic()
        if now >= self._next_log:
            self._next_log = now + _LOG_INTERVAL
            out = error.errno in (errno.EMFILE, errno.ENFILE)
            _log.warning(
                "a process at %s could not be taken, and waits: %s%s",
                self.path,
                error.strerror or error,
                "; raise ulimit -n" if out else "",
            )

    async def _attend(self, connection: socket.socket) -> None:
        """Serve one process until it has gone."""
        frame = messages.encode(self._layout)
        try:
            socket.send_fds(connection, [frame[:4]], self._files)
            reader, writer = await asyncio.open_unix_connection(sock=connection)
        except OSError as error:
            _log.warning("a process could not be attached: %s", error)
            connection.close()
            return
        writer.write(frame[4:])
        session = _Session(self._server, self._groups, writer)
        _log.info("a process is attached to %s", self.path)
        while self._parked:
            session.send(self._parked.popleft())
        self._sessions.add(session)
        try:
            await session.listen(reader)
        except (OSError, EOFError):
            _log.info("a process has left %s", self.path)
        except ProtocolError as error:
            _log.warning("a process at %s is let go: %s", self.path, error)
        finally:
            self._sessions.discard(session)
            await session.close()


class _Session:
    """One attached process, and what it has offered."""

    def __init__(
        self,
        server: Server,
        groups: dict[str, tuple[int, ...]],
        writer: asyncio.StreamWriter,
    ) -> None:
        self._server = server
        self._groups = groups
        self._writer = writer
        self._offered: dict[str, tuple[Ticket, asyncio.Task[None]]] = {}
        self._aborting: set[asyncio.Task[None]] = set()

    def send(self, message: messages.News) -> None:
        """Say something; a process that does not listen is let go."""
        transport = self._writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > _MAX_UNREAD_BYTES:
            _log.warning("a process reads nothing of what it is told, and is let go")
            transport.abort()
            return
        self._writer.write(messages.encode(message))

    async def listen(self, reader: asyncio.StreamReader) -> None:
        """Take commands until the end."""
        while True:
            head = await reader.readexactly(4)
            body = await reader.readexactly(messages.length_of(head))
            command = messages.decode(body, messages.Command)
            if isinstance(command, messages.Offer):
                self._offer(command)
            elif isinstance(command, messages.Abort):
                task = asyncio.get_running_loop().create_task(self._abort(command))
                self._aborting.add(task)
                task.add_done_callback(self._aborting.discard)

    def _offer(self, command: messages.Offer) -> None:
        try:
            ticket = self._server.offer(
                command.peers,
                command.request_id,
                command.blocks,
                first_block=command.first_block,
                sources=command.sources,
                lease=command.lease,
                checksum=command.checksum,
            )
        except KVXferError as error:
            self.send(messages.Answer(command.number, str(error)))
            return
        layers = sorted({i for name in command.blocks for i in self._groups[name]})
        task = asyncio.get_running_loop().create_task(self._follow(ticket, layers))
        self._offered[ticket.request_id] = (ticket, task)
        self.send(messages.Answer(command.number, ""))

    async def _follow(self, ticket: Ticket, layers: list[int]) -> None:
        """Tell how far a request is, until it is over."""
        try:
            for layer in layers:
                await ticket.wait_layer(layer)
                self.send(_news(ticket))
            await ticket.wait()
        except KVXferError as error:
            _log.debug("%r: %s", ticket, error)
        finally:
            if self._offered.get(ticket.request_id, (None,))[0] is ticket:
                del self._offered[ticket.request_id]
            self.send(_news(ticket))

    async def _abort(self, command: messages.Abort) -> None:
        found = self._offered.get(command.request_id)
        problem = ""
        if found is not None:
            try:
                await found[0].abort(command.reason)
            except KVXferError as error:
                problem = str(error)
        self.send(messages.Answer(command.number, problem))

    async def close(self) -> None:
        """Fence what is not over, then end the connection, whatever fails."""
        try:
            await self._fence()
        finally:
            self._writer.transport.abort()

    async def _fence(self) -> None:
        offered = list(self._offered.values())
        tasks = {task for _, task in offered} | self._aborting
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for ticket, _ in offered:
            try:
                await ticket.abort("the process that offered it has gone")
            except Exception:  # noqa: BLE001 - the others have to be fenced, too
                _log.exception("%r could not be given up", ticket)


def _news(ticket: Ticket) -> messages.TicketNews:
    error = ticket.error
    return messages.TicketNews(
        ticket.request_id,
        ticket.state.value,
        list(ticket.layers_done),
        "" if error is None else str(error),
        ticket.aux,
    )


def _describe(cache: KVCache) -> tuple[list[int], messages.Layout]:
    """Return the files that a cache is in, and what of it is where in them."""
    regions = cache.regions
    if any(region.fd < 0 for region in regions):
        raise UsageError(
            "this cache cannot be shared: its memory is not a file",
            hint="Make it with KVCache.allocate, on Linux.",
        )
    files = list(dict.fromkeys(region.fd for region in regions))
    if len(files) > messages.MAX_FILES:
        raise UsageError(
            f"{len(files)} pieces of memory are too many to be shared, at most "
            f"{messages.MAX_FILES}"
        )
    groups = []
    for group in cache.groups:
        places = []
        for plane in group.planes:
            for layer, place in plane.layers.items():
                region = regions[cache.region_index(place)]
                places.append(
                    messages.PlaceInfo(
                        plane.name,
                        layer,
                        files.index(region.fd),
                        region.offset + place.base - region.addr,
                        place.n_blocks,
                        place.block_bytes,
                        place.block_stride,
                        place.dtype,
                    )
                )
        groups.append(messages.GroupInfo(group.name, places))
    sizes = [os.fstat(fd).st_size for fd in files]
    return files, messages.Layout(messages.VERSION, sizes, groups)


def _listen(path: str, mode: int) -> socket.socket:
    """Listen on a Unix socket that only who ``mode`` permits may write to.

    Raises:
      AddressInUseError: Somebody listens there.
      ControlError: It cannot be made.
    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        # Nobody may come before the permissions are what they should be.
        before = os.umask(0o777 & ~mode)
        try:
            listening.bind(path)
        finally:
            os.umask(before)
        listening.listen(64)
        listening.setblocking(False)
    except KVXferError:
        listening.close()
        raise
    except OSError as error:
        listening.close()
        raise ControlError(
            f"cannot share by {path}: {error.strerror or error}",
            hint="The path of a Unix socket has at most 107 bytes, in a directory that "
            "this user may write to.",
        ) from error
    except BaseException:
        listening.close()
        raise
    return listening


def _clear(path: str) -> None:
    """Remove what a sidecar that was killed has left, and nothing else."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ControlError(f"cannot share by {path}: a file is there that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            Path(path).unlink(missing_ok=True)
            return
        except OSError:
            pass  # somebody is there, and busy
    raise AddressInUseError(
        f"cannot share by {path}: a process shares its cache there already",
        hint="Stop it, or choose another path.",
    )
