"""What the commands share: geometry options, errors, signals, output."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from kvxfer import KVCache, logs
from kvxfer.errors import ControlError, KVXferError, OptionError, UsageError
from kvxfer.options import Options, remarks
from kvxfer.sizes import format_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    # Absent where mypy runs on a newer Python.
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")

_PAGE_BYTES = 4096
_CACHE_KEYS = {
    "layers": int,
    "blocks": int,
    "block_bytes": int,
    "planes": str,
    "dtype": str,
}

EXIT_FAILED = 1
"""The command was understood and did not succeed."""
EXIT_USAGE = 2
"""Wrong use, as click has it."""


@dataclass(frozen=True)
class CacheShape:
    """The cache of a command. The defaults are one node of Llama-3.1-8B.

    16 tokens a block, 8 KV heads of 128, bfloat16: 32 KiB a plane.

    Attributes:
      sizes: Instead of ``block_bytes``: blocks of each of these sizes. Several are a
        group each, named by :func:`format_size`, all of as many bytes as ``blocks`` of
        the largest.
    """

    layers: int = 32
    blocks: int = 512
    block_bytes: int = 32768
    planes: tuple[str, ...] = ("k", "v")
    dtype: str = "bf16"
    sizes: tuple[int, ...] = ()

    @property
    def groups(self) -> dict[str, tuple[int, int]]:
        """Bytes of a block and number of blocks of each group, by its name."""
        if len(self.sizes) < 2:
            (size,) = self.sizes or (self.block_bytes,)
            return {"main": (size, self.blocks)}
        each = self.blocks * max(self.sizes)
        return {format_size(size): (size, each // size) for size in self.sizes}

    def allocate(self) -> KVCache:
        """Make the cache; its memory is taken as it is touched.

        Raises:
          UsageError: The shape is none, or the machine has not so much memory.
        """
        of_a_plane = sum(size * n_blocks for size, n_blocks in self.groups.values())
        n_bytes = self.layers * of_a_plane * len(self.planes)
        available = available_bytes()
        if n_bytes > available:
            raise UsageError(
                f"{self} take {n_bytes} bytes, and {available} are available: "
                "fewer --blocks or --layers"
            )
        caches = {
            name: KVCache.allocate(
                n_layers=self.layers,
                n_blocks=n_blocks,
                block_bytes=size,
                planes=self.planes,
                dtype=self.dtype,
            )
            for name, (size, n_blocks) in self.groups.items()
        }
        return KVCache.grouped(caches)

    def __str__(self) -> str:
        sizes = ", ".join(
            f"{n_blocks} blocks x {size} bytes"
            for size, n_blocks in self.groups.values()
        )
        return f"{self.layers} layers x {sizes} ({', '.join(self.planes)})"


def available_bytes() -> int:
    """Return how much memory may be taken without pushing others out."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return sys.maxsize


async def fill_in(cache: KVCache, stop: asyncio.Event) -> bool:
    """Touch all of a cache, as an engine has before use; false if stopped."""

    def touch(layer: int) -> None:
        for group in cache.groups:
            for plane in group.planes:
                cache.view(layer, plane.name, group.name).reshape(-1)[::_PAGE_BYTES] = 0

    for layer in cache.layers:
        if stop.is_set():
            return False
        await asyncio.to_thread(touch, layer)
    return not stop.is_set()


def _read_config(
    context: click.Context, parameter: click.Parameter, path: Path | None
) -> Path | None:
    """Take the defaults of the geometry options from the file's table [cache]."""
    if path is None:
        return None
    try:
        table = tomllib.loads(path.read_text()).get("cache", {})
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"{path}: {error}") from error
    if not isinstance(table, dict):
        raise click.BadParameter(f"{path}: cache is {table!r}, not a table [cache]")
    if isinstance(table.get("planes"), list):
        table["planes"] = ",".join(map(str, table["planes"]))
    for name, value in table.items():
        if name not in _CACHE_KEYS:
            raise click.BadParameter(f"{path}: [cache] has no {name!r}")
        if type(value) is not _CACHE_KEYS[name]:
            raise click.BadParameter(
                f"{path}: [cache] {name} is {value!r}, not of type "
                f"{_CACHE_KEYS[name].__name__}"
            )
    context.default_map = {**(context.default_map or {}), **table}
    return path


def geometry_options(command: _F) -> _F:
    """Add --config and the options that make a :class:`CacheShape`."""
    default = CacheShape()

    @functools.wraps(command)
    def wrapper(
        layers: int,
        blocks: int,
        block_bytes: int,
        planes: str,
        dtype: str,
        **kwargs: Any,
    ) -> Any:
        names = tuple(name.strip() for name in planes.split(","))
        shape = CacheShape(layers, blocks, block_bytes, names, dtype)
        return command(shape=shape, **kwargs)

    positive = click.IntRange(min=1)
    for option in (
        click.option(
            "--dtype",
            envvar="KVXFER_CACHE_DTYPE",
            show_envvar=True,
            default=default.dtype,
            show_default=True,
            help="Tag of the element type; both sides must agree.",
        ),
        click.option(
            "--planes",
            envvar="KVXFER_CACHE_PLANES",
            show_envvar=True,
            default=",".join(default.planes),
            show_default=True,
            help="Names of the planes, by commas.",
        ),
        click.option(
            "--block-bytes",
            envvar="KVXFER_CACHE_BLOCK_BYTES",
            show_envvar=True,
            type=positive,
            default=default.block_bytes,
            show_default=True,
            help="Bytes of a block in one plane of one layer.",
        ),
        click.option(
            "--blocks",
            envvar="KVXFER_CACHE_BLOCKS",
            show_envvar=True,
            type=positive,
            default=default.blocks,
            show_default=True,
            help="Blocks of the cache.",
        ),
        click.option(
            "--layers",
            envvar="KVXFER_CACHE_LAYERS",
            show_envvar=True,
            type=positive,
            default=default.layers,
            show_default=True,
            help="Layers of the cache.",
        ),
        click.option(
            "--config",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            is_eager=True,
            callback=_read_config,
            help="TOML file: [kvxfer] for options, [cache] for the geometry.",
        ),
    ):
        wrapper = option(wrapper)
    return wrapper  # type: ignore[return-value]


def reading(
    parse: Callable[[str], _T],
) -> Callable[[click.Context, click.Parameter, str | None], _T | None]:
    """Return a callback for click; what ``parse`` refuses is wrong use."""

    def read(
        context: click.Context, parameter: click.Parameter, text: str | None
    ) -> _T | None:
        try:
            return None if text is None else parse(text)
        except UsageError as error:
            raise click.BadParameter(str(error)) from error

    return read


def check_address(
    context: click.Context, parameter: click.Parameter, address: str | None
) -> str | None:
    """Refuse what is no address of an endpoint; for click."""
    if address is None or address.startswith("ipc://"):
        return address
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise click.BadParameter(
            f"{address!r} is not HOST:PORT or ipc://PATH, with a port of 0 to 65535"
        )
    return address


def load_options(config: Path | None, **overrides: Any) -> Options:
    """Collect the options; what is wrong with them is wrong use."""
    try:
        return Options.load(config=config, **overrides)
    except OptionError as error:
        raise click.UsageError(str(error)) from error


def run(main: Callable[[asyncio.Event], Coroutine[Any, Any, int]]) -> None:
    """Run an asynchronous command and exit with what it returns.

    ``main`` is given an event that SIGINT and SIGTERM set. An error of kvxfer
    becomes a line on stderr and exit code 1, or 2 where it is the user's.
    """

    async def guarded() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        return await main(stop)

    try:
        code = asyncio.run(guarded())
    except KVXferError as error:
        click.echo(f"kvxfer: {error}", err=True)
        wrong_use = isinstance(error, UsageError) and not isinstance(
            error, ControlError
        )
        code = EXIT_USAGE if wrong_use else EXIT_FAILED
    sys.exit(code)


async def until(stop: asyncio.Event, work: Coroutine[Any, Any, Any]) -> bool:
    """Run ``work`` until it ends or ``stop`` is set; return whether it ended."""
    task = asyncio.ensure_future(work)
    waiter = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, waiter}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiter.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
    if task.cancelled():
        return False
    task.result()
    return True


def say(machine: bool, text: str, **event: object) -> None:
    """Print one line: ``text`` for people, ``event`` as JSON for machines."""
    click.echo(json.dumps(event) if machine else text)
    sys.stdout.flush()


def show_table(
    headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = ""
) -> None:
    """Print a table: with lines and colours on a terminal, in columns elsewhere."""
    if sys.stdout.isatty():
        drawn = Table(*headers, title=title or None, title_justify="left")
        for row in rows:
            drawn.add_row(*map(escape, row))
        Console().print(drawn)
        return
    if title:
        click.echo(title)
    lines = [list(headers), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        click.echo("  ".join(cells).rstrip())


def log(options: Options, *, verbose: bool = False) -> None:
    """Set up the log of a command; say what of the environment does nothing."""
    try:
        configured = logs.configure(options, verbose=verbose)
    except OptionError as error:
        raise click.UsageError(str(error)) from error
    click.get_current_context().call_on_close(configured.close)
    for remark in remarks():
        logging.getLogger("kvxfer.options").warning(remark)
