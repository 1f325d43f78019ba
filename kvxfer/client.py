"""The initiating side: writes blocks of the local cache into peers' blocks."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Coroutine, Iterable
from types import TracebackType
from typing import Any, cast, overload

from kvxfer._engine import RingArrival
from kvxfer._transfer import Transfer
from kvxfer.adapter import Adapter, finish
from kvxfer.arguments import request_bytes, request_name, seconds_of
from kvxfer.backoff import Backoffs
from kvxfer.blocks import engine_ids
from kvxfer.cache import KVCache
from kvxfer.counters import Counters
from kvxfer.curve import CurveKeys, client_keys
from kvxfer.errors import (
    BrokenPeerError,
    ClosedResourceError,
    ConnectTimeoutError,
    InternalError,
    LayoutError,
    RefusedError,
    UsageError,
)
from kvxfer.host import DeviceState, Host
from kvxfer.options import Options
from kvxfer.peer import Peer, PeerState, WriteResult
from kvxfer.request import Request
from kvxfer.scheduler import Plan
from kvxfer.sharding import MAX_SHARDS, Shard
from kvxfer.stream_statistics import ClientStatistics
from kvxfer.streams import Streams
from kvxfer.verbs_types import Access

# What a connection attempt takes to clean up after its own deadline.
_CONNECT_GRACE = 1.0


@dataclasses.dataclass
class _Attempt:
    """A connection being made, and how many tasks wait for it."""

    task: asyncio.Task[Peer]
    shards: tuple[Shard, ...]
    waiters: int = 0


class Client:
    """Writes blocks of one cache to any number of servers, from one event loop.

    Use as ``async with Client(cache) as client``, or call :meth:`open` and
    :meth:`close`. Different tasks may connect and write at the same time.

    Args:
      cache: Its blocks are the source. It cannot be closed while this is open.
      options: Defaults for everything; ``None`` loads them from environment and
        config file.
      **overrides: Single options that take precedence, by name.

    Raises:
      OptionError: An option is unknown or out of range.
    """

    def __init__(
        self, cache: KVCache, options: Options | None = None, **overrides: Any
    ) -> None:
        self.options = (
            Options.load(**overrides)
            if options is None
            else dataclasses.replace(options, **overrides)
        )
        self._host = Host(cache, Access(0), self.options)
        self._peers: dict[str, Peer] = {}
        self._streams: Streams | None = None
        self._connecting: dict[str, _Attempt] = {}
        self._attempts: set[asyncio.Task[Peer]] = set()
        self._backoffs = Backoffs()
        self._opening: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._state = "new"

    @overload
    def open(self) -> Coroutine[Any, Any, None]: ...

    @overload
    def open(
        self,
        request_id: str,
        *,
        deadline: float | None = None,
        priority: int = 0,
        lease: float | None = None,
    ) -> Request: ...

    def open(
        self,
        request_id: str | None = None,
        *,
        deadline: float | None = None,
        priority: int = 0,
        lease: float | None = None,
    ) -> Request | Coroutine[Any, Any, None]:
        """Open the client (without arguments, to be awaited), or a request.

        ``async with`` is the usual way to open a client. A request may be opened from
        any thread, before or after it is offered, and lives until it is done, fails
        or is aborted.

        Args:
          request_id: As the decode side offers it; up to 256 bytes of UTF-8.
          deadline: Seconds from now until it must be done: an earlier one goes first,
            and past it the request fails. None: no deadline, a fair share.
          priority: Among requests with the same deadline, or none, the higher goes
            first.
          lease: Seconds that the request may wait for its offer; with the offer its
            lease takes over. None takes ``request_lease``.

        Returns:
          The request; without arguments what is to be awaited.

        Raises:
          UsageError: Such a request is open already.
          ClosedResourceError: The client is not open.
        """
        if request_id is None:
            return self._open_once()
        options = self.options
        return self._streams_now().open(
            request_name(request_id),
            deadline=seconds_of(deadline, math.inf, "deadline"),
            priority=priority,
            lease=seconds_of(lease, options.request_lease, "lease"),
        )

    async def _open_once(self) -> None:
        """Open the devices and register the cache.

        Raises:
          DeviceUnavailableError: No device as the options want it.
          VerbsError: The cache cannot be registered. Nothing is left open.
        """
        if self._state != "new":
            raise UsageError(f"a client is opened once; this one is {self._state}")
        self._state = "opening"
        self._opening = asyncio.get_running_loop().create_task(self._open())
        try:
            await finish(self._opening)
        except BaseException:
            if self._state == "open":  # cancelled, but it went on
                await self.close()
            raise

    async def _open(self) -> None:
        try:
            await self._host.open(
                None, self._on_arrival, self._on_failed, self._on_broken
            )
            streams = Streams(self._host)
            try:
                await streams.open_listener()
            except BaseException:
                await streams.close()
                await self._host.close()
                raise
        except BaseException:
            self._state = "new"
            raise
        self._streams = streams
        self._state = "open"

    async def __aenter__(self) -> Client:
        await self.open()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.close()

    def _ensure_open(self) -> None:
        if self._state != "open":
            raise ClosedResourceError(f"the client is {self._state}, not open")
        self._host.check("client")

    @property
    def memory(self) -> dict[str, str]:
        """How the cache is registered, by the name of the device.

        ``host`` memory; on GPUs ``dmabuf``, or ``peermem`` where that failed.
        """
        return self._host.memory

    # -- what it has done ------------------------------------------------------

    @property
    def counters(self) -> Counters:
        """What this client has done so far; readable from any thread."""
        return self._host.counters

    def device_states(self) -> list[DeviceState]:
        """Describe the open devices; from any thread."""
        return self._host.device_states()

    def connection_states(self) -> dict[str, int]:
        """Count the connections by state; from any thread."""
        streamed = self._streams.remotes.peers() if self._streams is not None else []
        states = [p.state.value for p in (*list(self._peers.values()), *streamed)]
        found = {state.value: states.count(state.value) for state in PeerState}
        found["connecting"] += len(self._connecting)
        return found

    # -- peers -----------------------------------------------------------------

    async def connect(
        self,
        host: str,
        port: int | None = None,
        *,
        timeout: float | None = None,
        shards: Iterable[Shard] = (),
        server_key: str | None = None,
    ) -> Peer:
        """Connect to a server, or return the connection that there is already.

        Args:
          host: Address or name, or ``ipc://path``.
          port: Port of the control connection; ``None`` takes the option's.
          timeout: Seconds; ``None`` takes the option ``connect_timeout``.
          shards: Which part of each block goes where, if the two sides split a layer
            differently: from :func:`kvxfer.sharding.plan`. Planes that none names are
            not written. None at all: whole blocks of all planes.
          server_key: This server's public key, its file or its 40 characters;
            ``None`` takes the option ``server_public_key``.

        Returns:
          The peer, ready to be written to: both sides' QPs are in RTS.

        Raises:
          ConnectTimeoutError: Nobody answered in time.
          GeometryMismatchError: The caches do not fit; both sides' figures.
          UsageError: There is a connection with other shards.
          DeviceUnavailableError: No device that both sides can use.
          RefusedError, VersionMismatchError, ProtocolError: What answers there
            does not want, or cannot be, spoken to.
          AuthenticationError: It does not know this side's key, or only one side
            has keys.
          OptionError: This side's keys are not as they must be.
          ClosedResourceError: The client is not open.

        Cancellation:
          Nothing of the attempt is left, unless another task waits for it too.
        """
        self._ensure_open()
        address = self._address(host, port)
        wanted = _shards(shards)
        peer = self._peers.get(address)
        if peer is not None and peer.connected:
            _same_shards(address, peer.shards, wanted)
            if peer.draining:
                raise RefusedError(
                    f"{address} is about to leave: {peer.draining}", code="closing"
                )
            return peer
        seconds = self._timeout(timeout, "connect_timeout")
        attempt = self._connecting.get(address)
        if attempt is None:
            keys = client_keys(self.options, server_key)
            task = self._connect(address, wanted, seconds, keys)
            attempt = _Attempt(asyncio.get_running_loop().create_task(task), wanted)
            self._connecting[address] = attempt
            self._attempts.add(attempt.task)
            attempt.task.add_done_callback(self._attempts.discard)
        _same_shards(address, attempt.shards, wanted)
        attempt.waiters += 1
        try:
            # The attempt has a deadline of its own; this one is the caller's.
            await asyncio.wait({attempt.task}, timeout=seconds + _CONNECT_GRACE)
            in_time = attempt.task.done()
        finally:
            attempt.waiters -= 1
            if attempt.waiters == 0:
                # Whoever cancels the last one waits until nothing is left of it.
                if self._connecting.get(address) is attempt:
                    del self._connecting[address]
                attempt.task.cancel()
                await asyncio.wait({attempt.task})
        if not in_time and (attempt.waiters or attempt.task.cancelled()):
            raise ConnectTimeoutError(
                f"{address}: not connected within {seconds:g} s",
                hint="An earlier connection to it may still be closing.",
            )
        if attempt.task.cancelled():
            raise ClosedResourceError("the client was closed while it connected")
        return attempt.task.result()

    def _address(self, host: str, port: int | None) -> str:
        if not isinstance(host, str):
            raise UsageError(f"host is {host!r}, not a text")
        if host.startswith("ipc://"):
            return host
        if ":" in host and not host.startswith("["):
            host = f"[{host}]"
        return f"{host}:{self.options.port if port is None else port}"

    async def _connect(
        self,
        address: str,
        shards: tuple[Shard, ...],
        timeout: float,
        keys: CurveKeys | None,
    ) -> Peer:
        counters = self._host.counters
        old = self._peers.get(address)
        if old is not None:
            await old.close()
        loop = asyncio.get_running_loop()
        start = loop.time()
        deadline = start + timeout
        refusal: RefusedError | None = None
        while True:
            # Whoever tries again at once, in a loop of their own, waits here.
            pause = self._backoffs.wait(address, loop.time())
            await asyncio.sleep(min(pause, max(0.0, deadline - loop.time())))
            peer = Peer(self._host, address, shards, keys)
            try:
                await peer.connect(max(0.001, deadline - loop.time()))
            except BaseException as error:
                counters.connects["failed"] += 1
                await peer.close()
                pause = self._backoffs.failed(address, loop.time())
                if isinstance(error, RefusedError) and error.code == "busy":
                    refusal = error
                    if loop.time() + pause < deadline:
                        continue
                if refusal is not None and isinstance(error, ConnectTimeoutError):
                    # What was said before says more than that time was up.
                    raise refusal from error
                raise
            self._backoffs.worked(address)
            counters.connects["new" if old is None else "again"] += 1
            counters.stages["connect"].observe(loop.time() - start)
            self._peers[address] = peer
            return peer

    def is_connected(self, host: str, port: int | None = None) -> bool:
        """Say whether writes to a server are possible, as far as is known here.

        A dead peer is noticed after the option ``ping_timeout`` at the latest, or
        at once by a write.
        """
        peer = self._peers.get(self._address(host, port))
        return peer is not None and peer.connected

    # -- requests --------------------------------------------------------------

    @property
    def listening(self) -> str | None:
        """Where this client is invited, ``host:port`` or ``ipc://path``, or None.

        Decode sides give it to ``Server.offer``; see the option ``listen``.
        """
        return self._streams_now().remotes.endpoint

    def request(
        self,
        peer: Peer,
        request_id: str,
        remote_block_ids: object,
        *,
        first_block: int = 0,
        deadline: float | None = None,
        priority: int = 0,
        lease: float | None = None,
    ) -> Request:
        """Open a request whose remote blocks are known here, without an offer.

        May be called from any thread. What is written arrives at the server by
        ``arrivals()``, and the request is done when all of it is acknowledged.

        Args:
          peer: What :meth:`connect` returned.
          remote_block_ids: One a position, or such lists by group.
          first_block: The position in the request of the first of them.

        The other arguments and exceptions are those of :meth:`open`.

        Raises:
          LayoutError: The peer has no such blocks, or one is named twice.
        """
        if not isinstance(peer, Peer):
            raise UsageError(f"peer is {peer!r}, not what connect() returned")
        if peer.host is not self._host:
            raise UsageError(f"{peer!r} is a peer of another client")
        return self._streams_now().direct(
            peer,
            request_name(request_id),
            remote_block_ids,
            first_block=first_block,
            deadline=seconds_of(deadline, math.inf, "deadline"),
            priority=priority,
            lease=seconds_of(lease, self.options.request_lease, "lease"),
        )

    def finished(self) -> list[Request]:
        """Take the requests that have ended, well or badly, since the last call.

        May be called from any thread. The last 4096 are kept.
        """
        return list(self._streams_now().finished())

    def statistics(self) -> ClientStatistics:
        """Say what the requests of this client do, and what they wait for.

        May be called from any thread.
        """
        return self._streams_now().statistics()

    def _streams_now(self) -> Streams:
        if self._streams is None:
            raise ClosedResourceError(f"the client is {self._state}, not open")
        return self._streams

    # -- writing ---------------------------------------------------------------

    async def write_cache(
        self,
        peer: Peer,
        local_block_ids: object,
        remote_block_ids: object,
        layer_idx: int | Iterable[int] | None = None,
        *,
        request_id: str | None = None,
        group: str | None = None,
        timeout: float | None = None,
    ) -> WriteResult:
        """Copy local blocks into a peer's blocks, pair by pair.

        Block ``local_block_ids[i]`` lands in ``remote_block_ids[i]``, in every
        plane of every layer asked for. Returning means that the peer's device has
        acknowledged every byte, and that the peer is being told.

        Args:
          peer: What :meth:`connect` returned.
          local_block_ids: Integers: a list, a range or an integer array. May repeat.
          remote_block_ids: As many, no two the same.
          layer_idx: One layer, several, or ``None`` for all that both sides hold.
            All go out together.
          request_id: Reaches the peer with the arrival; up to 256 bytes of UTF-8.
          group: Whose block ids these are; may be left out if the cache has one.
          timeout: Seconds; ``None`` takes the option ``write_timeout``. Past it the
            call still waits until the device is done with the local blocks: at most
            the options ``drain_timeout``, twice, and ``fence_timeout``.

        Raises:
          LayoutError: An id or layer is out of range, a remote id is named twice,
            or the lengths differ. Nothing was written.
          WriteTimeoutError: Not all was written in time. What was is undefined.
          CompletionError: A WR failed: its status says why. The connection is gone.
          BrokenPeerError: The connection broke under it, or was broken before.
          ClosedResourceError: The client or the peer is closed.
          NotQuiescentError: The device may still read the local blocks.

          Except with the last one the device is done with the local blocks, and
          they may be reused at once. ``fenced`` of the exception says whether
          nothing can land in the remote blocks any more either.

        Cancellation:
          Posts nothing further and waits until what was posted has completed, so
          the local blocks may be reused at once. The remote blocks are undefined.
        """
        begun = self._begin_write(
            peer,
            local_block_ids,
            remote_block_ids,
            layer_idx,
            request_id=request_id,
            group=group,
            timeout=timeout,
        )
        if isinstance(begun, WriteResult):
            if peer.scheduler.turns.owed:
                await asyncio.sleep(0)
            return begun
        # As Peer.finish() does, without a coroutine of its own.
        try:
            await begun
        except asyncio.CancelledError as error:
            return await peer.finish(begun, error)
        except BaseException:
            peer.unbound(begun)
            raise
        if begun.is_done:
            return peer.written(begun)
        return await peer.finish(begun)

    def _begin_write(
        self,
        peer: Peer,
        local_block_ids: object,
        remote_block_ids: object,
        layer_idx: int | Iterable[int] | None,
        *,
        request_id: str | None,
        group: str | None,
        timeout: float | None,
    ) -> WriteResult | Transfer:
        """Begin a write: what it came to, or what is to be given to a wait at once.

        See ``Peer.await_``.
        """
        if not isinstance(peer, Peer):
            raise UsageError(f"peer is {peer!r}, not what connect() returned")
        quick = peer.quick if peer.host is self._host else None
        if quick is not None and timeout is None and self._state == "open":
            ended = quick.write(
                local_block_ids, remote_block_ids, layer_idx, group, request_id
            )
            if isinstance(ended, WriteResult):
                return ended
            if ended is not None:
                request = b"" if request_id is None else request_id.encode()
                transfer: Transfer = ended
                peer.await_(transfer, request, self.options.write_timeout)
                return transfer
        self._ensure_open()
        if peer.host is not self._host:
            raise UsageError(f"{peer!r} is a peer of another client")
        options = self.options
        seconds = (
            options.write_timeout
            if timeout is None
            else seconds_of(timeout, options.write_timeout, "timeout")
        )
        request = b"" if request_id is None else request_bytes(request_id)
        local_ids = engine_ids(local_block_ids, "local_block_ids")
        remote_ids = engine_ids(remote_block_ids, "remote_block_ids")
        plan = self._plan(peer, group, layer_idx)
        begun = peer.begin(plan, local_ids, remote_ids, request)
        if isinstance(begun, Transfer):
            peer.await_(begun, request, seconds)
        return begun

    def _plan(
        self, peer: Peer, group: str | None, layer_idx: int | Iterable[int] | None
    ) -> Plan:
        """Look up what a write is of; what is asked for again is kept."""
        # By type, since True is no layer and equals 1.
        known = layer_idx is None or type(layer_idx) is int
        if known and (group is None or type(group) is str):
            plan = peer.plans.get((group, layer_idx))  # type: ignore[arg-type]
            if plan is not None:
                return plan
        plan = peer.plan(self._group(group), _layers(layer_idx))
        if known:
            peer.plans[group, layer_idx] = plan  # type: ignore[index]
        return plan

    def _group(self, group: str | None) -> str:
        names = [g.name for g in self._host.cache.groups]
        if group is None:
            if len(names) > 1:
                raise LayoutError(
                    f"the cache has the groups {', '.join(names)}: say which"
                )
            return names[0]
        if group not in names:
            raise LayoutError(f"no group {group!r}; the cache has {', '.join(names)}")
        return group

    def _timeout(self, timeout: float | None, option: str) -> float:
        if timeout is None:
            return cast(float, getattr(self.options, option))
        return seconds_of(timeout, getattr(self.options, option), "timeout")

    # -- the end ---------------------------------------------------------------

    async def close(self, *, grace: float = 0.0) -> None:
        """Close all connections, then the devices. Twice is fine.

        With ``grace`` nothing new may begin, and this waits up to so many seconds
        until no write is in flight; then it closes.

        Writes in flight end with BrokenPeerError, connects with
        ClosedResourceError. When this returns no thread, task, file descriptor or
        QP is left.

        Raises:
          ClosedResourceError: In a forked child, where there is nothing to close.
          UsageError: In another event loop. Nothing was closed.

        Cancellation:
          Ends the grace; raised when all is closed.
        """
        if self._state == "opening" and self._opening is not None:
            await asyncio.wait({self._opening})
        try:
            if self._state == "open" and grace > 0:
                self._host.check("client")
                self._state = "draining"
                await self._drain(grace)
        finally:
            await self._close_now()

    async def _drain(self, grace: float) -> None:
        assert self._streams is not None
        peers = [*self._peers.values(), *self._streams.remotes.peers()]
        waiting = {asyncio.ensure_future(peer.wait_idle()) for peer in peers}
        if not waiting:
            return
        try:
            await asyncio.wait(waiting, timeout=grace)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)

    async def _close_now(self) -> None:
        if self._state in ("open", "draining"):
            self._host.check("client")
            self._state = "closing"
            self._closing = asyncio.get_running_loop().create_task(self._close())
        if self._closing is None:
            self._state = "closed"
        else:
            await finish(self._closing)

    async def _close(self) -> None:
        attempts = list(self._attempts)
        for task in attempts:
            task.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)
        assert self._streams is not None
        await self._streams.close()
        results = await asyncio.gather(
            *(peer.close() for peer in self._peers.values()), return_exceptions=True
        )
        self._peers.clear()
        try:
            await self._host.close()
        finally:
            self._state = "closed"
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _on_arrival(self, adapter: Adapter, arrival: RingArrival) -> None:
        raise InternalError("a client posts no receives")

    def _on_failed(self, adapter: Adapter, slot: int) -> None:
        streamed = self._streams.remotes.peers() if self._streams is not None else []
        for peer in (*self._peers.values(), *streamed):
            if peer.uses(adapter, slot):
                peer.break_("a WR failed")

    def _on_broken(self, adapter: Adapter, qp_num: int | None, why: str) -> None:
        streamed = self._streams.remotes.peers() if self._streams is not None else []
        for peer in (*self._peers.values(), *streamed):
            if peer.is_on(adapter, qp_num):
                # What its writes end with says more, where it comes at all.
                error = BrokenPeerError(
                    f"the connection to {peer.address} broke: {why}"
                )
                peer.break_(why, error, patient=qp_num is not None)


def _shards(shards: Iterable[Shard]) -> tuple[Shard, ...]:
    """Check what was given as shards."""
    found = tuple(shards)
    if not all(isinstance(shard, Shard) for shard in found):
        raise UsageError(f"shards are {found!r}, not kvxfer.sharding.Shard")
    if len(found) > MAX_SHARDS:
        raise UsageError(f"{len(found)} shards are more than {MAX_SHARDS}")
    return found


def _same_shards(
    address: str, have: tuple[Shard, ...], wanted: tuple[Shard, ...]
) -> None:
    if have != wanted:
        raise UsageError(
            f"there is a connection to {address} with other shards",
            hint="Close it first, or connect by another client.",
        )


def _layers(layer_idx: int | Iterable[int] | None) -> list[int] | None:
    """Check the layers asked for; None stays None."""
    if layer_idx is None:
        return None
    layers = list(layer_idx) if isinstance(layer_idx, Iterable) else [layer_idx]
    if any(
        isinstance(layer, bool) or not hasattr(layer, "__index__") for layer in layers
    ):
        raise LayoutError(f"layer_idx {layer_idx!r} is not one or several integers")
    layers = [layer.__index__() for layer in layers]
    if len(set(layers)) != len(layers):
        raise LayoutError(f"layer_idx names a layer twice: {layers}")
    return layers
