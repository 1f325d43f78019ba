"""Let strangers' programs judge the software device, and say what they found.

    python -m tests.shim.judges SHIM PYVERBS_TESTS [--write]

Each judge runs unmodified with the shim preloaded, once over each wire. The
table of verdicts is the one in docs/judged-by-others.md: ``--write`` puts it
there, otherwise a difference is a failure, like that of a judge.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.shim.pyverbs_required import read_required

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "judged-by-others.md"
REQUIRED = ROOT / "tests" / "pyverbs_required.txt"
TABLE = re.compile(r"(?<=<!-- verdicts -->\n).*?(?=<!-- end of verdicts -->)", re.S)
WIRES = ("tcp", "cma", "shm")
PATIENCE = 60.0
"""Seconds for one program; they take one to ten."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """A program, alone or as server and client, and what it must print."""

    command: str
    shows: str
    prints: str
    """A regular expression that the (client's) output must match."""
    never: str = r"(?!)"
    pair: bool = True


PERFTEST = r"-+\n #bytes.*\n {size} +{n} +\d"


def perftest(command: str, shows: str, size: int, n: int, qps: int = 1) -> Judge:
    printed = PERFTEST.format(size=size, n=n * qps)
    return Judge(f"{command} -s {size} -n {n}", shows, printed)


def pingpong(options: str, shows: str, n: int) -> Judge:
    return Judge(
        f"ibv_rc_pingpong -g 0 -c -n {n} {options}".strip(),
        shows,
        rf"{n} iters in",
        never="invalid data",
    )


PROGRAMS = (
    Judge(
        "ibv_devices", "the list of devices", r"soft0\s+6b76736f66743000", pair=False
    ),
    Judge(
        "ibv_devinfo -v -d soft0",
        "device, port and GID queries",
        r"node_guid:\s+6b76:736f:6674:3000[\s\S]*PORT_ACTIVE[\s\S]*GID\[ *0\]:\s+fd6b:",
        pair=False,
    ),
    pingpong("", "SEND, RECV, polling; it checks the bytes", 100),
    pingpong("-e", "the same, sleeping on completion events", 1000),
    pingpong("-e -N", "the same through `ibv_wr_*`", 1000),
    pingpong("-e -s 3000000 -r 20", "messages of 3 MB", 40),
    perftest("ib_write_bw -F", "RDMA WRITE", 65536, 1000),
    perftest(
        "ib_write_bw -F -q 4 -l 16 -Q 16",
        "several QPs, lists of WRs, unsignaled WRs",
        4096,
        2048,
        qps=4,
    ),
    perftest("ib_write_bw -F -b", "both ways at once", 65536, 500),
    perftest("ib_write_bw -F -t 4 -Q 4", "a send queue of 4", 1024, 1000),
    perftest("ib_write_lat -F", "WRITEs seen by polling memory", 8, 500),
    perftest("ib_write_lat -F -I 64", "inline data", 64, 500),
    perftest("ib_read_bw -F -q 4 -Q 16", "RDMA READ, several QPs", 16384, 1024, 4),
    perftest("ib_read_bw -F -o 2 -l 8", "READs above the negotiated limit", 4096, 1000),
    perftest("ib_atomic_bw -F -q 2", "atomics", 8, 500, qps=2),
    perftest("ib_send_bw -F -e", "SEND with completion events", 4096, 1000),
)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def listens(port: int) -> bool:
    """Whether somebody listens there; connecting would use the server up."""
    found = f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(found) and fields[3] == "0A":
                return True
    return False


def wait_until(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a program ended; the exit status is None where it had to be killed."""

    status: int | None
    output: str


def finish(process: subprocess.Popen[str]) -> Ended:
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        return Ended(None, output)
    return Ended(process.returncode, output)


class Court:
    """Runs judges and keeps their verdicts: by row, then by wire."""

    def __init__(self, shim: Path) -> None:
        self.shim = shim.resolve()
        self.rows: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
        self.failed = False

    def environment(self, wire: str) -> dict[str, str]:
        return {**os.environ, "KVXFER_SOFT_WIRE": wire, "LC_ALL": "C.UTF-8"}

    def start(self, command: list[str], wire: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            env={**self.environment(wire), "LD_PRELOAD": str(self.shim)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def record(self, row: tuple[str, str], wire: str, trouble: str) -> None:
        self.rows[row][wire] = "FAILED" if trouble else "ok"
        say(f"{wire}: {row[0]}: {self.rows[row][wire]}")
        if trouble:
            self.failed = True
            say(trouble)

    def hear(self, judge: Judge, wire: str) -> None:
        """Run a program, or its server and its client."""
        command = judge.command.split()
        ends = []
        if judge.pair:
            port = free_port()
            command += ["-p", str(port)]
            server = self.start(command, wire)
            wait_until(lambda: listens(port) or server.poll() is not None)
            ends.append(finish(self.start([*command, "127.0.0.1"], wire)))
            if ends[0].status != 0:
                server.kill()  # it waits for a client that is not to come
            ends.append(finish(server))
        else:
            ends.append(finish(self.start(command, wire)))
        good = (
            all(end.status == 0 for end in ends)
            and re.search(judge.prints, ends[0].output)
            and not any(re.search(judge.never, end.output) for end in ends)
        )
        trouble = "\n".join(f"exit {end.status}:\n{end.output}" for end in ends)
        self.record((f"`{judge.command}`", judge.shows), wire, "" if good else trouble)

    def hear_pyverbs(self, tests: Path, wire: str) -> None:
        """Run rdma-core's tests; what is required must pass, nothing may fail."""
        script = str(ROOT / "tests" / "shim" / "pyverbs_results.py")
        process = self.start(
            ["/usr/bin/python3", script, str(tests), "soft0", "0"], wire
        )
        ended = finish(process)
        verdicts = dict(verdicts_in(ended.output))
        required, _ = read_required(REQUIRED.read_text())
        modules: dict[str, list[str]] = {module_of(name): [] for name in verdicts}
        for name in required:
            modules.setdefault(module_of(name), []).append(name)
        for module, names in modules.items():
            wanting = [name for name in names if verdicts.get(name) != "ok"]
            wanting += [
                name
                for name, verdict in verdicts.items()
                if verdict == "fail" and module_of(name) == module
            ]
            if not names and not wanting:
                continue
            row = (f"pyverbs `{module}.py`", f"required tests: {len(names)}")
            trouble = "\n".join([*wanting, ended.output]) if wanting else ""
            self.record(row, wire, trouble)

    def hear_contract(self, wire: str) -> None:
        """Run our own contract suite through the shim, as if it were a NIC's."""
        suite = "tests/test_device_contract.py::TestHardware"
        options = ["-q", "--rdma-device", "soft0", "--gid-index", "0"]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, suite],
            env={**self.environment(wire), "KVXFER_IBVERBS_PATH": str(self.shim)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        ended = finish(process)
        row = ("kvxfer's contract suite", "the device as a libibverbs of its own")
        self.record(row, wire, "" if ended.status == 0 else ended.output)

    def table(self) -> str:
        lines = [
            f"| judge | what it shows | {' | '.join(WIRES)} |",
            "| --- " * (2 + len(WIRES)) + "|",
        ]
        lines += [
            f"| {judge} | {shows} | {' | '.join(found[wire] for wire in WIRES)} |"
            for (judge, shows), found in self.rows.items()
        ]
        return "\n".join(lines) + "\n"


def module_of(test: str) -> str:
    return test.split(".")[1]


def verdicts_in(output: str) -> Iterator[tuple[str, str]]:
    """The test's name and verdict, from each line that is one."""
    for line in output.splitlines():
        verdict, _, rest = line.partition("\t")
        if verdict in ("ok", "skip", "fail") and rest:
            yield rest.split("\t")[0], verdict


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("shim", type=Path)
    parser.add_argument("pyverbs_tests", type=Path)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()

    court = Court(arguments.shim)
    for wire in WIRES:
        for judge in PROGRAMS:
            court.hear(judge, wire)
        court.hear_pyverbs(arguments.pyverbs_tests, wire)
        court.hear_contract(wire)

    text = PAGE.read_text()
    said = TABLE.sub(lambda _: court.table(), text)
    if arguments.write:
        PAGE.write_text(said)
    elif said != text:
        say(f"{PAGE.name} shows another table; scripts/test-shim --write updates it")
        court.failed = True
    return 1 if court.failed else 0


if __name__ == "__main__":
    sys.exit(main())
