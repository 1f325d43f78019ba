"""Logging for programs: where records go, and the facts that they carry.

The library only makes records, on loggers beneath ``kvxfer``; it configures nothing
when it is imported. A program that has no logging of its own calls
:func:`configure`, as the commands do.

Records about a connection carry ``peer``, ``qpn``, ``gid`` and ``request`` as
attributes, where they are known, for formatters and filters of your own.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from kvxfer.errors import OptionError
from kvxfer.options import Options

FIELDS = ("peer", "qpn", "gid", "request")
"""Attributes that a record may have beyond those of the standard library."""

_ROOT = "kvxfer"
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter  # takes no parameter before Python 3.11


class Bound(_Adapter):
    """A logger whose records carry facts; ``extra`` of a call adds to them."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        """Put the facts into a record's attributes."""
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs


def bind(logger: logging.Logger, **facts: object) -> Bound:
    """Return a logger whose records carry some of :data:`FIELDS`.

    What is None or empty is left out.
    """
    return Bound(logger, {name: fact for name, fact in facts.items() if fact})


class Formatter(logging.Formatter):
    """Puts the facts of a record in front of its message."""

    def __init__(self) -> None:
        super().__init__(_FORMAT)

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Put a record into a line."""
        facts = _facts(record.__dict__)
        line = super().formatMessage(record)
        return f"{line} [{facts}]" if facts else line


def _facts(attributes: Mapping[str, Any]) -> str:
    return " ".join(
        f"{name}={attributes[name]:#x}"
        if isinstance(attributes[name], int)
        else f"{name}={attributes[name]}"
        for name in FIELDS
        if attributes.get(name)
    )


class Logging:
    """The handlers that :func:`configure` has added, until they are closed."""

    def __init__(self, handlers: list[logging.Handler], level: int) -> None:
        logger = logging.getLogger(_ROOT)
        self._handlers = handlers
        self._before = (logger.level, logger.propagate)
        logger.setLevel(level)
        # A program's own handlers would print everything once more.
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)

    def close(self) -> None:
        """Take the handlers away again and close the files. Twice is fine."""
        logger = logging.getLogger(_ROOT)
        if self._handlers:
            logger.setLevel(self._before[0])
            logger.propagate = self._before[1]
        while self._handlers:
            handler = self._handlers.pop()
            logger.removeHandler(handler)
            handler.close()

    def __enter__(self) -> Logging:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


_current: Logging | None = None


def configure(
    options: Options, *, verbose: bool = False, stream: TextIO | None = None
) -> Logging:
    """Send what kvxfer logs to standard error and to the files of the options.

    Standard error has warnings and errors; with ``debug`` everything, unless
    ``debug_file`` takes it. ``debug_file`` has what is of note, and with ``debug``
    everything. ``error_file`` has warnings and errors. In the names ``%h`` is the
    host and ``%p`` the process; a file that is there is overwritten. A second call
    takes the place of the first.

    Args:
      verbose: Everything to standard error, whatever the options say.
      stream: Instead of standard error.

    Raises:
      OptionError: A file cannot be written. Nothing has changed.
    """
    global _current
    handlers: list[logging.Handler] = []
    try:
        to_file = options.debug_file is not None
        quiet = not verbose and (to_file or not options.debug)
        level = logging.WARNING if quiet else logging.DEBUG
        _add(handlers, logging.StreamHandler(stream or sys.stderr), level)
        if options.debug_file is not None:
            level = logging.DEBUG if options.debug or verbose else logging.INFO
            _add(handlers, _file(options.debug_file, "debug_file"), level)
        if options.error_file is not None:
            _add(handlers, _file(options.error_file, "error_file"), logging.WARNING)
    except OptionError:
        for handler in handlers:
            handler.close()
        raise
    if _current is not None:
        _current.close()
    _current = Logging(handlers, min(handler.level for handler in handlers))
    return _current


def _add(handlers: list[logging.Handler], handler: logging.Handler, level: int) -> None:
    handler.setLevel(level)
    handler.setFormatter(Formatter())
    handlers.append(handler)


def expand(name: str) -> Path:
    """Put host and process into the name of a file."""
    for sign, value in (("%h", socket.gethostname()), ("%p", str(os.getpid()))):
        name = name.replace(sign, value)
    return Path(name)


def _file(name: str, option: str) -> logging.Handler:
    path = expand(name)
    try:
        return logging.FileHandler(path, mode="w", encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f"option {option} = {name!r}: cannot write {path}: {error.strerror}"
        ) from error
