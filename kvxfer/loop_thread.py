"""One thread with an event loop, for all of a process that has none of its own.

The thread starts with the first endpoint that is opened and ends with the last one
that is closed, or when the interpreter exits: then what is still open is closed. A
forked child inherits nothing: it has no such thread until it opens something itself.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Generic, Protocol, TypeVar

from kvxfer.errors import ClosedResourceError, UsageError

__all__ = ["Closable", "Expired", "LoopThread", "entered"]

_log = logging.getLogger("kvxfer.loop_thread")

_T = TypeVar("_T")

# How long an exiting interpreter waits for calls of other threads to end.
_EXIT_SECONDS = 10.0


class Closable(Protocol):
    """What lives on the loop until it is closed."""

    async def close(self) -> None:
        """Close; twice is fine."""


class Expired(Exception):
    """The time given to a call is over, and the call has been cancelled."""


class _Call(Generic[_T]):
    """A coroutine on the loop and the thread that waits for it."""

    def __init__(
        self, make: Callable[[], _T | Coroutine[Any, Any, _T]], timeout: float | None
    ) -> None:
        self._make = make
        self._timeout = timeout
        self._expired = False
        self._ended = False
        self._started = False
        self._given_up = False
        self._begun = False
        self._task: asyncio.Task[_T] | None = None
        self._at_once: list[_T] = []
        self._error: Exception | None = None
        # Held until the coroutine has ended; cheaper than an Event.
        self._running = threading.Lock()
        self._running.acquire()

    def start(self) -> None:
        """Start the coroutine, if there is something to wait for; in the loop.

        A second time nothing is started, nor once the caller has given up.
        """
        if self._started:
            return
        self._started = True
        if self._given_up:
            self._end()
            return
        loop = asyncio.get_running_loop()
        try:
            made = self._make()
        except Exception as error:  # noqa: BLE001 - it is raised in the caller
            self._error = error
            self._end()
            return
        if not isinstance(made, Coroutine):
            self._at_once.append(made)
            self._end()
            return
        self._task = loop.create_task(self._run(made))
        self._task.add_done_callback(self._end)
        if self._timeout is not None:
            timer = loop.call_later(self._timeout, self._expire)
            self._task.add_done_callback(lambda _: timer.cancel())

    async def _run(self, made: Coroutine[Any, Any, _T]) -> _T:
        self._begun = True
        return await made

    def _end(self, _: asyncio.Task[_T] | None = None) -> None:
        self._ended = True
        self._running.release()

    def _expire(self) -> None:
        self._expired = True
        self.cancel()

    def cancel(self) -> None:
        """Cancel the coroutine; in the loop."""
        self._given_up = True
        if self._task is None:
            return
        if self._begun:
            self._task.cancel()
        else:
            # One that never began could not see to what it stands for.
            asyncio.get_running_loop().call_soon(self.cancel)

    def wait(self, loop: asyncio.AbstractEventLoop) -> _T:
        """Run the coroutine and return its result; in the calling thread."""
        interrupt: BaseException | None = None
        asked = False
        while True:
            try:
                if not asked:
                    # In here, since it may be busy with memory before the next line.
                    loop.call_soon_threadsafe(self.start)
                    asked = True
                self._running.acquire()
                break
            except BaseException as error:  # noqa: BLE001 - raised when it is over
                # A signal's handler raised. The coroutine is asked to end, and until
                # it has, the device may still be busy with the caller's memory.
                interrupt = error
                if self._ended:  # perhaps between the two lines above
                    break
                loop.call_soon_threadsafe(self.cancel)
        if interrupt is not None:
            if self._task is not None and not self._task.cancelled():
                self._task.exception()  # looked at, so that nobody complains
            raise interrupt
        if self._error is not None:
            raise self._error
        if self._task is None:
            return self._at_once[0]
        try:
            return self._task.result()
        except asyncio.CancelledError:
            if self._expired:
                raise Expired from None
            raise ClosedResourceError("closed while it waited") from None


class LoopThread:
    """The thread, its loop, and what is open on it. Made by :func:`entered`."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._endpoints: set[Closable] = set()
        self._calls = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._run, name="kvxfer-loop", daemon=True
        )
        self._thread.start()

    def _run(self) -> None:
        loop = self._loop
        try:
            loop.run_forever()
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            loop.close()

    def run(
        self,
        make: Callable[[], Coroutine[Any, Any, _T]],
        timeout: float | None = None,
    ) -> _T:
        """Run a coroutine on the loop and wait for it, without the GIL.

        To be called inside :func:`entered`. An exception that a signal's handler
        raises meanwhile, as on Ctrl-C, cancels the coroutine, and is raised when that
        has ended.

        Raises:
          Expired: It took longer than ``timeout`` seconds, and was cancelled.
          UsageError: Called in the loop's own thread, which would wait for itself.
        """
        return self._wait_for(_Call[_T](make, timeout))

    def run_begun(
        self, begin: Callable[[], _T | Coroutine[Any, Any, _T]], _kind: type[_T]
    ) -> _T:
        """The same where there may be nothing to wait for.

        Args:
          begin: Called in the loop: returns the result, or a coroutine, which is run.
        """
        return self._wait_for(_Call[_T](begin, None))

    def _wait_for(self, call: _Call[_T]) -> _T:
        if threading.current_thread() is self._thread:
            raise UsageError(
                "a blocking call inside a callback would wait for itself for ever"
            )
        return call.wait(self._loop)

    def close_later(self, endpoint: Closable) -> None:
        """Close an endpoint that nobody can close any more; does not wait."""

        async def close() -> None:
            try:
                await endpoint.close()
            except Exception:  # noqa: BLE001 - nobody is there to catch it
                _log.exception("closing what was left open failed")
            finally:
                self.disown(endpoint)

        with _lock:
            if endpoint not in self._endpoints:
                return
        self._loop.call_soon_threadsafe(lambda: self._loop.create_task(close()))

    def adopt(self, endpoint: Closable) -> None:
        """Go on while ``endpoint`` is open."""
        with _lock:
            self._endpoints.add(endpoint)

    def disown(self, endpoint: Closable) -> None:
        """``endpoint`` is closed; end if it was the last. Twice is fine."""
        with _lock:
            self._endpoints.discard(endpoint)
            idle = self._leave_if_idle()
        if idle:
            self._stop()

    def _enter(self) -> bool:
        """Begin a call; false if the thread has ended. Under the lock."""
        if _state.current is not self:
            return False
        self._calls += 1
        return True

    def _exit(self) -> None:
        """End a call, and the thread if nothing needs it any more."""
        with _lock:
            self._calls -= 1
            idle = self._leave_if_idle()
        if idle:
            self._stop()

    def _leave_if_idle(self) -> bool:
        if self._endpoints or self._calls or _state.current is not self:
            return False
        _state.current = None
        return True

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def close_all(self) -> None:
        """Close what is open and wait for the end; the interpreter exits."""

        async def close() -> None:
            with _lock:
                endpoints = list(self._endpoints)
            closing = (endpoint.close() for endpoint in endpoints)
            for result in await asyncio.gather(*closing, return_exceptions=True):
                if isinstance(result, BaseException):
                    _log.error("closing at exit failed", exc_info=result)
            for endpoint in endpoints:
                self.disown(endpoint)

        try:
            with entered(self):
                self.run(close)
        except ClosedResourceError:
            return
        # Calls of other threads end now, the last of them with the thread.
        self._thread.join(_EXIT_SECONDS)


class _State:
    """What the process has of this; a forked child begins anew."""

    def __init__(self) -> None:
        self.current: LoopThread | None = None
        self.at_exit = False
        self.of_parents: list[LoopThread] = []

    def start(self) -> LoopThread:
        """Give the thread, begun if none runs. Under the lock."""
        if not self.at_exit:
            # Ahead of concurrent.futures, which closing still needs, and which ends
            # with the main thread: plain atexit functions run too late.
            register = getattr(threading, "_register_atexit", atexit.register)
            try:
                register(_at_exit)
            except RuntimeError as error:
                raise ClosedResourceError("the interpreter exits") from error
            self.at_exit = True
        if self.current is None:
            self.current = LoopThread()
        return self.current

    def forget(self) -> None:
        """In a forked child: the thread is the parent's, and so are its files."""
        if self.current is not None:
            # Never collected: to close the loop here would unregister the
            # descriptors of the parent's, with which it shares the kernel's set.
            self.of_parents.append(self.current)
        self.current = None


_state = _State()
_lock = threading.Lock()


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()  # another thread may have held it
    _state.forget()


os.register_at_fork(after_in_child=_in_child)


def _at_exit() -> None:
    if _state.current is not None:
        _state.current.close_all()


@contextlib.contextmanager
def entered(thread: LoopThread | None = None) -> Iterator[LoopThread]:
    """Give the loop's thread, which goes on at least until the end of the context.

    Args:
      thread: What an earlier call gave; ``None`` starts one if none runs.

    Raises:
      ClosedResourceError: That thread has ended, or is that of a parent process.
    """
    if thread is not None and thread.pid != os.getpid():
        raise ClosedResourceError(
            f"this belongs to process {thread.pid}; a forked child must make its own"
        )
    with _lock:
        if thread is None:
            thread = _state.start()
        if not thread._enter():
            raise ClosedResourceError("closed, or the interpreter exits")
    try:
        yield thread
    finally:
        thread._exit()
