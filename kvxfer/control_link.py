"""One control connection at work: protocol core, timer, worker, delegate calls.

A :class:`Link` turns what the core asks for into sends and calls of its owner. The
calls that may take long run one after another in the link's own task, so a slow
one delays neither its own pings nor anybody else. How many can be waiting is
bounded by the protocol: an offer, a confirmation, a fence, the end.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Protocol

from kvxfer import wire
from kvxfer.errors import (
    ClosedResourceError,
    ConnectTimeoutError,
    ControlError,
    DeviceUnavailableError,
    GeometryMismatchError,
    KVXferError,
    ProtocolError,
    RefusedError,
    UsageError,
    VersionMismatchError,
)
from kvxfer.options import Options
from kvxfer.protocol import (
    Action,
    CloseCause,
    Closed,
    CloseReason,
    CreditReceived,
    DrainedReceived,
    DrainReceived,
    Established,
    FailedReceived,
    FenceConfirmed,
    RequestReceived,
    Send,
    Timing,
)
from kvxfer.protocol_base import Connection
from kvxfer.rates import Bucket

__all__ = [
    "CLOSE_GRACE",
    "FRAMES_A_TURN",
    "Link",
    "LinkOwner",
    "end_error",
    "lost_text",
    "refuse_of",
    "run_closing",
    "timing",
]

#: Frames read before the loop gets a turn: one peer's flood must not keep it from
#: everybody else.
FRAMES_A_TURN = 16
#: Seconds that a close waits for a delegate's call before it cancels it.
CLOSE_GRACE = 5.0

_log = logging.getLogger("kvxfer.control")

_NEWS = (
    Established,
    FailedReceived,
    CreditReceived,
    RequestReceived,
    DrainReceived,
    DrainedReceived,
)

_REFUSALS: dict[wire.RefuseCode, type[KVXferError]] = {
    wire.RefuseCode.VERSION: VersionMismatchError,
    wire.RefuseCode.GEOMETRY: GeometryMismatchError,
    wire.RefuseCode.DEVICE: DeviceUnavailableError,
    wire.RefuseCode.PROTOCOL: ProtocolError,
    wire.RefuseCode.TIMEOUT: ConnectTimeoutError,
}


def refuse_of(exc: BaseException) -> wire.Refuse:
    """Say an exception to the peer; what is not ours stays in our log."""
    if not isinstance(exc, KVXferError):
        return wire.Refuse(
            code=wire.RefuseCode.INTERNAL.value,
            message="the listener failed; its log says why",
        )
    code = next(
        (code.value for code, kind in _REFUSALS.items() if isinstance(exc, kind)),
        getattr(exc, "code", "") or wire.RefuseCode.REFUSED.value,
    )
    text = str(exc)
    if exc.hint and text.endswith(exc.hint):
        text = text[: -len(exc.hint)].rstrip(" .")
    return wire.Refuse(code=code, message=text[:8192], detail=exc.hint[:8192])


def _refusal_error(where: str, refuse: wire.Refuse) -> KVXferError:
    text = f"{where} refused: {wire.printable(refuse.message, 8192)}"
    hint = wire.printable(refuse.detail)
    for code, kind in _REFUSALS.items():
        if refuse.code == code.value:
            return kind(text, hint=hint)
    return RefusedError(text, code=wire.printable(refuse.code), hint=hint)


def end_error(where: str, reason: CloseReason, note: str = "") -> KVXferError:
    """Make the exception for a handshake that ended so; the caller raises it.

    Args:
      where: The address dialed.
      reason: Why it ended.
      note: What the link was last seen doing, for a timeout.
    """
    if reason.refuse is not None:
        return _refusal_error(where, reason.refuse)
    text = f"{where}: {reason.text}"
    if reason.cause is CloseCause.TIMEOUT:
        return ConnectTimeoutError(
            f"{text}; {note}" if note else text,
            hint="Is a kvxfer server running there, is the port right, and does a "
            "firewall let it through?",
        )
    if reason.cause is CloseCause.PROTOCOL:
        return ProtocolError(
            text, hint="What listens there may not be a kvxfer server."
        )
    if reason.cause is CloseCause.LOCAL:
        return ClosedResourceError(text)
    return ControlError(text, hint="The listener's log may say more.")


def timing(options: Options, handshake_timeout: float) -> Timing:
    """Take a connection's deadlines out of the options."""
    return Timing(
        # Whether the process lives is ZMQ's to find out; here it is the loop.
        ping_interval=options.loop_timeout / 4,
        ping_timeout=options.loop_timeout,
        handshake_timeout=handshake_timeout,
    )


def lost_text(options: Options) -> str:
    """Say that a link is gone; ZMQ does not tell which of the two it was."""
    return (
        "the link broke: the peer's process ended, or nothing of it was heard for "
        f"{options.ping_timeout:g} s"
    )


class LinkOwner(Protocol):
    """What a link needs of the client or the server it belongs to."""

    def link_send(self, link: Link, frame: bytes) -> str:
        """Send without waiting; return why it was not possible, or nothing."""

    async def link_job(self, link: Link, job: Action) -> None:
        """Do the work that the core asked for; in the link's own task."""

    def link_event(self, link: Link, event: Action) -> None:
        """Take news at once: Closed, and what is in ``_NEWS``."""

    async def link_over(self, link: Link, reason: CloseReason) -> None:
        """Release what ``link_job`` made; the last call, exactly one."""


class Link:
    """Drives one core. Not for use from outside its event loop.

    Attributes:
      core: The protocol's state machine.
      owned: Set by the owner's job once there is something to release.
      peer_address: Where the peer is, as text.
      client: At a listener, whose connection it counts as: a key's name, or the
        address.
      inbox: At a listener, how much the peer may say.
    """

    def __init__(
        self, core: Connection, owner: LinkOwner, peer_address: str, client: str = ""
    ) -> None:
        self.core = core
        self.client = client
        self.owned = False
        self.inbox: Bucket | None = None
        self.peer_address = peer_address
        self.failure: BaseException | None = None
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._jobs: asyncio.Queue[Action] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._fence: asyncio.Future[bool] | None = None
        self._in_job = False
        self.worker = self._loop.create_task(self._work())

    # -- in ----------------------------------------------------------------

    def feed(self, frame: bytes | memoryview) -> None:
        """Take one frame of the peer, whatever it holds."""
        try:
            message = wire.decode(bytes(frame))
        except (ProtocolError, VersionMismatchError) as exc:
            self.apply(self.core.violation(str(exc)))
            return
        self.receive(message)

    def receive(self, message: wire.Message) -> None:
        """Take one decoded message of the peer."""
        self.apply(self.core.receive(message, self._loop.time()))

    def apply(self, actions: list[Action]) -> None:
        """Carry out what the core returned."""
        for action in actions:
            if isinstance(action, Send):
                self._send(action.message)
            elif isinstance(action, FenceConfirmed):
                self._settle_fence(True)
            elif isinstance(action, Closed):
                self._settle_fence(False)
                self._call_now(action)
                self._jobs.put_nowait(action)
            elif isinstance(action, _NEWS):
                self._call_now(action)
            else:
                self._jobs.put_nowait(action)
        self._arm()

    def _send(self, message: wire.Message) -> None:
        frame = wire.encode(message, version=self.core.version)
        problem = self._owner.link_send(self, frame)
        if problem:
            # Nothing to do when the core is closed already: this was the farewell.
            self.apply(self.core.lost(problem))

    def _call_now(self, event: Action) -> None:
        try:
            self._owner.link_event(self, event)
        except Exception as exc:  # noqa: BLE001 - it ends this connection alone
            _log.exception("control: a callback failed on %s", type(event).__name__)
            self.fail(exc)

    def fail(self, exc: BaseException) -> None:
        """End the connection since this side's own code failed."""
        if self.failure is None:
            self.failure = exc
        text = f"failed: {refuse_of(exc).message}"
        self.apply(self.core.close(text, cause=CloseCause.FAILED))

    # -- time --------------------------------------------------------------

    def _arm(self) -> None:
        due = self.core.deadline
        if math.isinf(due):
            self._disarm()
        elif self._timer is None or due < self._timer_at:
            # A timer that is too early only looks again; moving it with every
            # message would cost more.
            self._disarm()
            self._timer_at = due
            self._timer = self._loop.call_at(due, self._on_timer)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        self._timer_at = math.inf

    def _on_timer(self) -> None:
        self._disarm()
        self.apply(self.core.tick(self._loop.time()))

    # -- out ---------------------------------------------------------------

    async def fence(self, reason: str, timeout: float) -> bool:
        """Ask for a fence; true once the peer confirmed it, within ``timeout`` s.

        Cancellation:
          Ends the wait; the peer fences nevertheless.
        """
        if not self.core.is_established:
            return False
        if self._fence is None:
            self._fence = self._loop.create_future()
        future = self._fence
        self.apply(self.core.request_fence(reason))
        await asyncio.wait({future}, timeout=timeout)
        return future.done() and future.result()

    def _settle_fence(self, confirmed: bool) -> None:
        if self._fence is not None and not self._fence.done():
            self._fence.set_result(confirmed)

    def send_failed(self, request_id: bytes, layers: list[int], reason: str) -> bool:
        """Tell the peer what will not come; false if it cannot be told any more.

        Raises:
          UsageError: An argument is beyond the protocol's limits.
        """
        return self._tell(self.core.send_failed(request_id, layers, reason))

    def send_drained(self) -> bool:
        """Say that nothing is under way any more; false if the peer is gone."""
        return self._tell(self.core.drained())

    def send_credit(self, consumed_bytes: int, consumed_records: int) -> bool:
        """Give credit; false if the connection is over.

        Raises:
          UsageError: An argument is beyond the protocol's limits.
        """
        return self._tell(self.core.send_credit(consumed_bytes, consumed_records))

    def send_request(self, message: wire.RequestMessage) -> bool:
        """Say something about a request; false if the connection is over.

        Raises:
          UsageError: It is beyond the protocol's limits, or the peer's release knows
            no requests.
        """
        return self._tell(self.core.send_request(message))

    def _tell(self, actions: list[Action]) -> bool:
        try:
            self.apply(actions)
        except ProtocolError as exc:
            raise UsageError(str(exc)) from exc
        return bool(actions) and not self.core.is_closed

    # -- the worker --------------------------------------------------------

    async def _work(self) -> None:
        try:
            await self._do_jobs()
        finally:
            if not self.core.is_closed:
                self.apply(self.core.close("cancelled", cause=CloseCause.FAILED))
            await self._finish()

    async def _do_jobs(self) -> None:
        while True:
            job = await self._jobs.get()
            if isinstance(job, Closed):
                return
            if self.core.is_closed:
                continue
            self._in_job = True
            try:
                await self._owner.link_job(self, job)
            except Exception as exc:  # noqa: BLE001 - it ends this connection alone
                if not isinstance(exc, KVXferError):
                    _log.exception("control: %s failed", type(job).__name__)
                self.fail(exc)
            finally:
                self._in_job = False

    async def _finish(self) -> None:
        reason = self.core.reason
        assert reason is not None
        try:
            await self._owner.link_over(self, reason)
        except Exception:  # noqa: BLE001 - nobody is left to tell
            _log.exception("control: releasing a connection failed")

    def cancel_job(self) -> None:
        """Cancel the delegate's call that is running, but never the release."""
        if self._in_job:
            self.worker.cancel()

    async def wait_over(self, grace: float = CLOSE_GRACE) -> None:
        """Wait for the worker, which has its end queued; press it after ``grace`` s.

        A delegate call that takes longer is cancelled; so is then the release, if
        it takes as long again.
        """
        for _ in range(3):
            if await _settled(self.worker, grace):
                return
            self.worker.cancel()
        _log.error("control: a delegate call swallows its cancellation")


async def _settled(task: asyncio.Task[None], timeout: float) -> bool:
    done, _ = await asyncio.wait({task}, timeout=timeout)
    return bool(done)


async def run_closing(
    make: Callable[[], asyncio.Task[None]], hurry: Callable[[], None]
) -> None:
    """Wait for a close that goes on even if the waiting is cancelled.

    The first cancellation calls ``hurry`` and still waits, which is short then;
    the close itself is never cancelled.
    """
    task = make()
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        hurry()
        await asyncio.wait({task})
        raise
