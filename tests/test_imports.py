"""Who may import whom: the house stands on its lower floors, never the reverse.

Modules are read, not imported, so this holds without the extensions, and sees
imports inside functions too.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kvxfer"

# Anyone may use these; they use nothing but each other.
GROUND = {"_version", "errors", "options", "verbs_types"}

# A module may import those named here and whatever those may import.
MAY_IMPORT: dict[str, set[str]] = {
    "_version": set(),
    "errors": set(),
    "options": set(),
    "verbs_types": set(),
    # Arithmetic and messages.
    "blocks": set(),
    "layout": {"blocks"},
    "regions": {"layout"},
    "memory": {"regions"},
    "sharding": {"layout"},
    "tensors": {"layout"},
    "shared_messages": set(),
    "shared_ticket": {"shared_messages"},
    "attached": {"memory", "shared_messages", "shared_ticket"},
    "cache": {"attached", "reach", "tensors"},
    "wire_parts": set(),
    "wire": {"layout", "wire_parts"},
    "protocol_base": {"wire"},
    "protocol": {"protocol_base"},
    # The control plane.
    "backoff": set(),
    "rates": set(),
    "curve": set(),
    "auth": {"curve"},
    "heartbeat": set(),
    "descriptors": set(),
    "control_io": {"auth", "descriptors", "heartbeat", "wire"},
    "control_link": {"control_io", "protocol", "rates"},
    "control_client": {"control_link"},
    "control_watch": {"control_link"},
    "control_strangers": {"control_link"},
    "control_delegate": {"protocol"},
    "control_server": {"control_delegate", "control_strangers", "control_watch"},
    "control_invite": {"control_io", "rates"},
    "control": {"control_client", "control_invite", "control_server"},
    # Requests as state machines: no input or output.
    "positions": {"blocks"},
    "requests": set(),
    "policy": set(),
    "outbound": {"positions", "requests"},
    "inbound": {"notify", "positions", "requests"},
    "_counters": set(),
    "counters": {"_counters", "requests"},
    "logs": set(),
    "interfaces": set(),
    # Devices: what there is, and what is chosen.
    "gids": set(),
    "topology": set(),
    "sysfs": {"gids", "topology"},
    "reach": {"sysfs"},
    "inventory": {"_verbs", "sysfs"},
    "agreement": {"sysfs", "wire"},
    # The data path.
    "_ibverbs": set(),
    "_softdev": set(),
    "_handles": set(),
    "_providers": {"_handles", "_ibverbs", "_softdev"},
    "_structs": {"_ibverbs"},
    "_device": {"_providers", "_structs"},
    "_memory": {"_device"},
    "_verbs": {"_memory"},
    "_core": {"_ibverbs"},
    "_post": {"_core"},
    "_progress": {"_post", "_verbs"},
    "_driver": {"_progress"},
    "_queues": {"_progress"},
    "_waiter": set(),
    "_submission": {"_driver"},
    "_transfer": {"_engine", "_waiter"},
    "_engine": {"_queues", "_submission"},
    "completions": {"_transfer"},
    "_quick": {"_counters", "_transfer", "blocks"},
    "scheduler": {"_quick", "cache", "completions"},
    "cuda": set(),
    "registration": {"_verbs", "cuda", "regions"},
    "devices": {"inventory"},
    "ports": {"devices"},
    "soft_wire": {"cache"},
    "adapter": {"agreement", "ports", "registration", "scheduler", "soft_wire"},
    # The public face.
    "notify": set(),
    "_records": {"_core", "notify", "sharding"},
    "route": {"regions", "sharding", "wire"},
    "link": {
        "_records",
        "adapter",
        "control",
        "interfaces",
        "logs",
        "route",
        "soft_wire",
    },
    "flusher": {"link"},
    "host": {"adapter", "counters", "route", "soft_wire"},
    "peer": {"host", "link"},
    # Requests at work.
    "arguments": set(),
    "handover": set(),
    "waiting": set(),
    "digest": {"layout"},
    "events": {"control"},
    "stream_statistics": {"requests"},
    "request": {"events", "outbound", "policy", "stream_statistics", "waiting"},
    "remotes": {"peer", "request"},
    "dispatch": {"digest", "policy", "remotes"},
    "streams": {"dispatch", "handover"},
    "taken": {"cache", "positions", "wire"},
    "ticket": {"inbound", "waiting"},
    "writers": {"control", "host", "ticket"},
    "offers": {"digest", "handover", "taken", "writers"},
    "connections": {"flusher", "offers"},
    "inbox": {"_waiter", "blocks", "counters"},
    "client": {"arguments", "backoff", "peer", "streams"},
    "server": {"arguments", "connections", "inbox", "offers"},
    "__init__": {"client", "server"},
    "loop_thread": set(),
    "blocking": {"__init__", "loop_thread"},
    "fastdeploy": {"blocking", "cuda", "devices", "interfaces", "logs"},
    "testing": {"__init__"},
    # Programs: the public names and nothing behind them.
    "sizes": set(),
    "pattern": {"blocks"},
    "metrics": {"__init__"},
    "command": {"__init__", "logs", "sizes"},
    "share": {"__init__", "shared_messages"},
    "serve": {"command", "metrics", "pattern", "share"},
    "push": {"command", "pattern"},
    "demo": {"push", "serve"},
    "config_cli": {"command"},
    "devices_cli": {"command", "devices"},
    # What only reads works without the extensions.
    "doctor": {"_engine", "cuda", "devices"},
    "doctor/transfer": {"__init__", "doctor", "pattern"},
    "doctor/cli": {"command", "doctor", "doctor/transfer"},
    "bench": {"command", "pattern"},
    # These run in the Python of another engine as well, without our extensions.
    "bench/side": {"bench"},
    "bench/pair": {"bench"},
    "bench/peers": {"bench"},
    "bench/workload": {"sizes"},
    "bench/_limits": {"_verbs"},
    # What the public API does not show: the path without asyncio.
    "bench/ends": {"bench", "devices", "link"},
    "bench/direct": {"bench"},
    "kvbench": set(),
    # Loaded where a plan is measured on kvxfer itself, and nowhere else.
    "kvbench/transferengine": {"__init__", "kvbench", "pattern"},
    "keys": {"curve"},
    "cli": {"bench", "config_cli", "demo", "devices_cli", "doctor/cli", "keys"}
    | {"kvbench", "push", "serve"},
    "__main__": {"cli"},
}

# Outside the package: what a module may not touch, whatever the reason.
IO = {"asyncio", "io", "mmap", "multiprocessing", "os", "pathlib", "random", "select"}
IO |= {"selectors", "signal", "socket", "subprocess", "threading", "time", "zmq"}
NOT_FOR: dict[str, set[str]] = {
    "errors": {"asyncio", "msgspec", "numpy", "zmq"},
    "blocks": IO | {"msgspec"},
    "layout": IO | {"msgspec"},
    "sharding": IO | {"msgspec"},
    "wire": IO | {"numpy", "pickle"},
    "wire_parts": IO | {"numpy", "pickle"},
    "protocol_base": IO | {"numpy", "pickle"},
    "protocol": IO | {"numpy", "pickle"},
    "positions": IO | {"msgspec"},
    "requests": IO | {"msgspec"},
    "policy": IO | {"msgspec", "numpy"},
    "outbound": IO | {"msgspec"},
    "inbound": IO | {"msgspec"},
    "_handles": {"asyncio", "msgspec", "zmq"},
    "_providers": {"asyncio", "msgspec", "zmq"},
    "_structs": {"asyncio", "msgspec", "zmq"},
    "_device": {"asyncio", "msgspec", "zmq"},
    "_memory": {"asyncio", "msgspec", "zmq"},
    "_verbs": {"asyncio", "msgspec", "zmq"},
    "_core": {"asyncio", "msgspec", "zmq"},
    "_post": {"asyncio", "msgspec", "zmq"},
    "_progress": {"asyncio", "msgspec", "zmq"},
    "_driver": {"asyncio", "msgspec", "zmq"},
    "_queues": {"asyncio", "msgspec", "zmq"},
    "_submission": {"asyncio", "msgspec", "zmq"},
    "_engine": {"asyncio", "msgspec", "zmq"},
    "_records": {"asyncio", "zmq"},
    "_counters": {"asyncio", "msgspec", "zmq"},
    "_quick": {"msgspec", "zmq"},
    "_waiter": {"msgspec", "zmq"},
    "_transfer": {"msgspec", "zmq"},
    "completions": {"zmq"},
    "scheduler": {"zmq"},
    "client": {"zmq"},
    "server": {"zmq"},
    "gids": IO | {"msgspec"},
    "topology": IO | {"msgspec"},
    "agreement": IO | {"numpy"},
    "bench": {"torch", "zmq"},
    "bench/side": {"asyncio", "click", "msgspec", "rich", "zmq"},
    "bench/pair": {"asyncio", "click", "msgspec", "rich", "zmq"},
    "bench/peers": {"asyncio", "click", "msgspec", "rich", "zmq"},
    "bench/_limits": {"asyncio", "msgspec", "zmq"},
    "bench/workload": IO | {"click", "msgspec", "rich"},
    "kvbench": {"asyncio", "msgspec", "numpy", "torch", "zmq"},
}
CORE = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".pyi", ".pyx")]
CORE += PACKAGE.rglob("*.pxd")

CIMPORT = re.compile(
    r"^\s*(?:from\s+([\w.]+)\s+c?import\s+\(?([\w., ]*)|c?import\s+([\w., ]+))", re.M
)


def module_of(path: Path) -> str:
    """The name in the table: the module's own, or else its sub-package's."""
    own = path.relative_to(PACKAGE).as_posix().partition(".")[0]
    if own in MAY_IMPORT:
        return own
    return path.relative_to(PACKAGE).parts[0].split(".")[0]


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Every dotted name that ``path`` imports, ``from a import b`` as a.b too."""
    return frozenset(_imports_of(path))


def _imports_of(path: Path) -> Iterator[str]:
    text = path.read_text()
    if path.suffix in (".pyx", ".pxd"):
        for module, names, plain in CIMPORT.findall(text):
            for name in (names or plain).split(","):
                words = name.split()
                if words:
                    yield f"{module}.{words[0]}" if module else words[0]
        return
    package = ("kvxfer", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) + 1 - node.level]) if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def inside(path: Path) -> set[str]:
    """The modules of the package that ``path`` imports, as the table names them."""
    names = [name.split(".") for name in imports_of(path)]
    inner = [parts[1:] for parts in names if parts[0] == "kvxfer"]
    # What is no module is a name that kvxfer/__init__.py gives out.
    return {rest[0] if rest and exists(rest[0]) else "__init__" for rest in inner}


@cache
def exists(module: str) -> bool:
    return any(PACKAGE.glob(f"{module}.*")) or (PACKAGE / module).is_dir()


@cache
def reachable(module: str) -> frozenset[str]:
    direct = MAY_IMPORT[module]
    return frozenset(direct | GROUND).union(*(reachable(name) for name in direct))


def ids(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", CORE, ids=ids)
def test_a_module_imports_only_what_lies_below_it(path: Path) -> None:
    module = module_of(path)
    assert module in MAY_IMPORT, f"give {module} its place in MAY_IMPORT"
    above = inside(path) - reachable(module) - {module}
    assert not above, f"{ids(path)} may not import {sorted(above)}"


@pytest.mark.parametrize("path", CORE, ids=ids)
def test_a_module_touches_nothing_it_must_not_know(path: Path) -> None:
    banned = NOT_FOR.get(module_of(path), set())
    used = {name.split(".")[0] for name in imports_of(path)}
    assert not used & banned


def test_only_completions_watches_descriptors_in_the_loop() -> None:
    watchers = {
        ids(path)
        for path in CORE
        if path.suffix == ".py"
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Attribute) and node.attr in ("add_reader", "add_writer")
    }
    assert watchers <= {"completions.py"}


def test_no_peer_bytes_are_unpickled() -> None:
    for path in CORE:
        used = {name.split(".")[0] for name in imports_of(path)}
        assert not used & {"dill", "marshal", "pickle", "shelve"}, ids(path)


def test_c_sources_know_no_python() -> None:
    for source in [*PACKAGE.rglob("*.c"), *PACKAGE.rglob("*.h")]:
        if source.parent.name in ("native", "softdev"):
            assert not re.search(r"#\s*include\s*[<\"]Python\.h", source.read_text())


def test_the_table_is_no_circle() -> None:
    for module in MAY_IMPORT:
        assert module not in reachable(module) or module in GROUND


def test_the_standard_library_is_not_shadowed() -> None:
    assert not {module_of(path) for path in CORE} & set(sys.stdlib_module_names) - {
        "__main__"
    }
