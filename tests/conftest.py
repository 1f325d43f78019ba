"""Options, and the check after every test that nothing of it is left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

# Some libraries start threads of their own when they are first imported; here,
# before the first test, they are nobody's leak.
import numpy as np  # noqa: F401
import pytest

from tests import nics, patience
from tests.children import Nursery
from tests.commands import shared
from tests.leaks import leaked_since, pending_tasks, take_census
from tests.machines import make
from tests.turns import turn


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvxfer")
    group.addoption(
        "--run-slow",
        action="store_true",
        help="run the tests marked slow too (scripts/check does)",
    )
    group.addoption(
        "--rdma-device",
        metavar="NAME",
        help="run the contract suite on this device of libibverbs as well",
    )
    group.addoption(
        "--gid-index",
        type=int,
        default=None,
        metavar="N",
        help="GID index to use on --rdma-device (default: the library's choice)",
    )


def pytest_report_header() -> list[str]:
    if patience.FACTOR == 1:
        return []
    return [f"deadlines: {patience.FACTOR:g} times longer (KVXFER_TEST_PATIENCE)"]


@pytest.hookimpl(hookwrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector from what collection makes: it is no garbage.

    Thousands of items with their marks and parameters are nearly all that there is,
    and whoever calls ``gc.collect()`` later would go through them for nothing.
    """
    gc.disable()
    yield
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    absent = []
    if not config.getoption("--run-slow"):
        absent.append(("slow", "slow: runs with --run-slow, as scripts/check does"))
    if not config.getoption("--rdma-device"):
        absent.append(("rdma", "no RDMA device was named: --rdma-device NAME"))
    for name, reason in absent:
        skip = pytest.mark.skip(reason=reason)
        for item in items:
            if item.get_closest_marker(name) is not None:
                item.add_marker(skip)
    for item in items:
        _watch_tasks(item)


def _watch_tasks(item: pytest.Item) -> None:
    """Have a coroutine test fail for tasks that outlive its fixtures."""
    function = getattr(item, "function", None)
    # hypothesis puts a plain function around the coroutine function.
    hypothesis = getattr(function, "hypothesis", None)
    function = getattr(hypothesis, "inner_test", function)
    names: list[str] = getattr(item, "fixturenames", [])
    if inspect.iscoroutinefunction(function) and "no_leaks" in names:
        names.insert(names.index("no_leaks") + 1, "no_leaked_tasks")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Keep what disturbs a device apart from what others do with it meanwhile."""
    if item.get_closest_marker("rdma") is None:
        yield
        return
    with turn(alone=item.get_closest_marker("alone") is not None):
        yield


_exit_status = 0


def pytest_sessionfinish(exitstatus: int) -> None:
    global _exit_status
    _exit_status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Exit although a test that failed left a thread that nobody will end.

    The interpreter would wait for it for ever, and the verdict with it.
    """
    left = [t for t in threading.enumerate() if not t.daemon]
    left.remove(threading.main_thread())
    if left and _exit_status != 0:
        names = ", ".join(thread.name for thread in left)
        print(f"exiting without waiting for threads: {names}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_status)


@pytest.fixture(scope="session")
def rdma_device(pytestconfig: pytest.Config) -> str | None:
    """The device named by --rdma-device, or None."""
    name: str | None = pytestconfig.getoption("--rdma-device")
    return name


@pytest.fixture(scope="session")
def gid_index(pytestconfig: pytest.Config) -> int | None:
    """The GID index given by --gid-index, or None."""
    index: int | None = pytestconfig.getoption("--gid-index")
    return index


@pytest.fixture
def nic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a NIC, as far as its files tell; none that can be opened."""
    monkeypatch.setenv("KVXFER_SYSFS", str(make("bonded", tmp_path / "machine").sys))


@pytest.fixture(scope="session")
def shim() -> Path:
    """The software device as a libibverbs."""
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    return nics.build()


@pytest.fixture
def network(shim: Path, tmp_path: Path) -> nics.Network:
    """The network of machines whose NICs are the software device."""
    return nics.Network(shim, tmp_path / "network")


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Where children come from."""
    with contextlib.closing(Nursery()) as found:
        yield found


@pytest.fixture(scope="session")
def commands() -> Iterator[None]:
    """Where the commands that tests.test_cli runs are forked from."""
    with shared():
        yield


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves descriptors, threads, processes or objects behind.

    It is set up before the other fixtures of the test, its event loop among
    them, so it looks after they are torn down. Mark a test ``leaky("why")`` to
    leave it out.
    """
    if request.node.get_closest_marker("leaky") is not None:
        yield
        return
    before = take_census()
    yield
    leaks = leaked_since(before)
    if leaks:
        pytest.fail(
            "the test left behind:\n  " + "\n  ".join(sorted(leaks)), pytrace=False
        )


@pytest.fixture
async def no_leaked_tasks() -> AsyncIterator[None]:
    """Fail a coroutine test that leaves tasks running on its loop."""
    yield
    # Tasks that were cancelled or just finished get their last turn.
    for _ in range(10):
        if not pending_tasks(asyncio.get_running_loop()):
            return
        await asyncio.sleep(0)
    tasks = pending_tasks(asyncio.get_running_loop())
    if tasks:
        pytest.fail("the test left running:\n  " + "\n  ".join(tasks), pytrace=False)
