"""``kvxfer doctor``: what it finds on machines that are made up, here, and afar."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from kvxfer import KVCache, Server, cuda
from kvxfer.doctor import checks, cli, cma, fabric, network, transfer
from kvxfer.doctor.machine import Machine
from kvxfer.doctor.report import Finding, Level, ok, problem, verdict, warning
from kvxfer.errors import RetryExceededError
from kvxfer.options import Options
from kvxfer.testing import set_faults
from tests.cuda_stand_in import StandIn
from tests.endpoints import SOON
from tests.machines import MACHINES, UNREADABLE, make
from tests.machines import Machine as MachineMade


@pytest.fixture(scope="module")
def report(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., dict[str, Finding]]:
    """Give the findings on a machine that is made up, by their checks."""
    roots: dict[str, Path] = {}

    def run(name: str, **options: object) -> dict[str, Finding]:
        if name not in roots:
            roots[name] = make(name, tmp_path_factory.mktemp(name) / "machine").root
        root = roots[name]
        settings = Options(sysfs=str(root / "sys"), **options)  # type: ignore[arg-type]
        return {f.check: f for f in cli.look(Machine(root), settings)}

    return run


Report = Callable[..., dict[str, Finding]]


def run(*arguments: str, **environ: str) -> tuple[int, str, str]:
    result = CliRunner(env=environ).invoke(cli.main, arguments)
    return result.exit_code, result.stdout, result.stderr


def test_a_healthy_server_has_no_problem(report: Report) -> None:
    found = report("dgx", gpu_index=2)
    assert not [f for f in found.values() if f.level is Level.PROBLEM]
    assert found["device mlx5_2"].level is Level.OK
    assert "PIX from the GPU" in found["device mlx5_2"].found
    assert found["MTU mlx5_2"] == ok("MTU mlx5_2", "rdma2 has 9000 bytes")
    assert found["GPU memory"].found == (
        "8 of NVIDIA; way: dmabuf, if CUDA's driver gives it out; nvidia_peermem is "
        "loaded"
    )
    assert found["rdma-core"].found == "libibverbs 1.14.44.0"


@pytest.mark.parametrize(
    ("machine", "check", "level", "words"),
    [
        ("bare", "rdma-core", Level.NOTE, "libibverbs.so.1 is not installed"),
        ("bare", "firewall", Level.NOTE, "nf_tables"),
        ("bare", "device soft0", Level.OK, "this machine has no RDMA device"),
        ("bonded", "processors", Level.WARNING, "powersave"),
        ("container", "device files", Level.PROBLEM, "/dev/infiniband/uverbs0"),
        ("container", "memlock", Level.PROBLEM, "65536 bytes"),
        (
            "container",
            "container",
            Level.WARNING,
            "Docker, 64.0 GiB of memory, 0.5 CPUs",
        ),
        ("container", "device mlx5_5", Level.WARNING, "another network namespace"),
        ("dual_port", "device mlx4_0", Level.WARNING, "DOWN (Polling)"),
        ("dual_port", "memlock", Level.PROBLEM, "8388608 bytes"),
        ("dual_port", "MTU mlx4_0:2", Level.WARNING, "ens2 has 1500 bytes"),
        ("holes", "huge pages", Level.WARNING, "transparent: never"),
        ("infiniband", "providers", Level.PROBLEM, "none for mlx5"),
        ("infiniband", "same host", Level.WARNING, "ptrace_scope is 3"),
        ("infiniband", "device mlx5_1", Level.WARNING, "INIT"),
        ("legacy", "providers", Level.PROBLEM, "none for mlx5"),
        (
            "legacy",
            "container",
            Level.WARNING,
            "Docker, 32.0 GiB of memory, 0.5 CPUs, 4096 processes",
        ),
        ("virtual", "GPU memory", Level.PROBLEM, "kernel 5.4"),
        ("virtual", "IOMMU", Level.WARNING, "not in pass-through"),
        ("virtual", "clock", Level.WARNING, "hpet"),
    ],
)
def test_what_is_wrong_is_found(
    report: Report, machine: str, check: str, level: Level, words: str
) -> None:
    finding = report(machine)[check]
    assert (finding.level, words in finding.found) == (level, True), finding
    if level in (Level.WARNING, Level.PROBLEM):
        assert finding.meaning and finding.remedy


def container(root: Path, *files: str) -> Finding:
    """What is said of a machine that has these files, as ``path=text``."""
    for file in files:
        name, _, text = file.partition("=")
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    (finding,) = checks.container(Machine(root), Options())
    return finding


def test_limits_of_both_versions_of_control_groups(tmp_path: Path) -> None:
    old = "sys/fs/cgroup/memory/memory.limit_in_bytes"
    # Nobody says so in a word: it is the largest multiple of a page.
    found = container(
        tmp_path / "none",
        f"{old}={(1 << 63) - 4096}",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us=-1",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us=100000",
        "sys/fs/cgroup/pids/pids.max=max",
    )
    assert found == ok("container", "none, and no limits of a control group")
    found = container(
        tmp_path / "some",
        f"{old}={8 << 30}",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us=250000",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us=100000",
        "sys/fs/cgroup/pids/pids.max=100",
    )
    assert found.found == "none, 8.0 GiB of memory, 2.5 CPUs, 100 processes"
    # Where both are mounted the newer one is in force.
    found = container(
        tmp_path / "both", f"{old}={8 << 30}", f"sys/fs/cgroup/memory.max={4 << 30}"
    )
    assert found.found == "none, 4.0 GiB of memory"


def test_limits_that_cannot_be_read_are_unknown(tmp_path: Path) -> None:
    found = container(tmp_path / "m", ".dockerenv=")
    assert found.level is Level.NOTE
    assert "Docker; limits are not known" in found.found


@pytest.mark.parametrize(
    ("scope", "may_trace", "failed", "level", "words"),
    [
        ("", False, "", Level.OK, "CMA works; bytes of a child were copied"),
        ("1", False, "", Level.OK, "CMA works between peers that agree"),
        ("0", False, None, Level.OK, "CMA is permitted; not tried"),
        ("2", True, "", Level.OK, "CAP_SYS_PTRACE lifts that: CMA works"),
        ("2", False, "Operation not permitted", Level.WARNING, "ptrace_scope is 2"),
        ("3", True, None, Level.WARNING, "ptrace_scope is 3"),
        # As in a container whose seccomp profile forbids the call.
        ("0", False, "Operation not permitted", Level.WARNING, "Operation not permi"),
        ("", True, "Function not implemented", Level.WARNING, "Function not implem"),
    ],
)
def test_copies_between_processes(
    scope: str, may_trace: bool, failed: str | None, level: Level, words: str
) -> None:
    found = checks.copies(scope, may_trace, failed)
    assert (found.level, words in found.found) == (level, True), found


def test_a_copy_out_of_a_child_is_tried() -> None:
    if Machine().text("/proc/sys/kernel/yama/ptrace_scope") in ("2", "3"):
        pytest.skip("this machine permits no copies: ptrace_scope")
    mine = ctypes.create_string_buffer(b"sixteen bytes ok", 16)
    assert cma.copy(os.getpid(), ctypes.addressof(mine), 16) == b"sixteen bytes ok"
    for pid, addr, code in (
        (os.getpid(), 16, errno.EFAULT),
        (1 << 30, ctypes.addressof(mine), errno.ESRCH),
    ):
        with pytest.raises(OSError) as caught:
            cma.copy(pid, addr, 16)
        assert caught.value.errno == code
    assert cma.attempt() == ""


def test_a_child_that_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    assert cma.attempt() == "No such file or directory"


def test_packet_filters_that_cannot_be_seen(tmp_path: Path) -> None:
    root = make("dgx", tmp_path / "m").root
    seen = cli.look(Machine(root), _options(str(root)))
    (found,) = [f for f in seen if f.check == "firewall"]
    assert found.level is Level.OK
    assert "no packet filter is seen here" in found.found
    (root / "proc/net/ip_tables_names").symlink_to(UNREADABLE)
    (found,) = network.firewall(Machine(root), _options(str(root)))
    assert found.level is Level.NOTE
    assert "cannot be seen without root" in found.found
    assert "4791" in found.meaning


def test_the_ports_that_packets_need(tmp_path: Path) -> None:
    """The software device's wire listens on a port that the kernel chooses."""
    root = make("bare", tmp_path / "m").root
    (root / "proc/sys/net/ipv4").mkdir(parents=True)
    (root / "proc/sys/net/ipv4/ip_local_port_range").write_text("40000\t41000\n")
    (found,) = network.firewall(Machine(root), Options(port=7001))
    assert "TCP port 7001" in found.meaning and "4791" not in found.meaning
    assert "net.ipv4.ip_local_port_range (40000-41000)" in found.meaning
    (found,) = network.firewall(Machine(root), Options(require_rdma=True))
    assert "ip_local_port_range" not in found.meaning


def control_port(host: str, port: int = 0) -> Finding:
    *_, found = network.firewall(Machine(), Options(host=host, port=port))
    return found


def test_who_has_the_control_port(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "already" in control_port("127.0.0.1", port).found
    found = control_port("name..with.an.empty.label", port)
    assert (found.level, "is not known" in found.found) == (Level.WARNING, True)
    # Documentation addresses are nobody's.
    assert "no interface of this host" in control_port("192.0.2.7", port).found
    assert control_port("*", free_port()).level is Level.OK


def test_a_control_port_that_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert control_port(f"ipc://{path}") == ok("control port", f"ipc://{path} is free")
    for bad, words in (
        (f"{tmp_path}/none/s", "there is no directory"),
        (f"{tmp_path}/{'x' * 120}", "a socket's path has 107"),
        (__file__, "a file is there that is no socket"),
    ):
        found = control_port(f"ipc://{bad}")
        assert (found.level, words in found.found) == (Level.WARNING, True), found
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        assert "is there" in control_port(f"ipc://{path}").found


def test_a_gpu_that_is_named_and_is_not_here(report: Report) -> None:
    found = report("dgx", gpu_index=77)["GPU"]
    assert found.level is Level.NOTE
    assert found.found == "GPU 77 is not here: there are 8"
    found = report("dgx", gpu_pci="0000:1b:00.0")["GPU"]
    assert found.level is Level.WARNING
    assert "GPU 0000:1b:00.0 is not here: there are 0000:18:06.0, " in found.found
    assert "GPU" not in report("dgx", gpu_index=7)
    assert "GPU" not in report("bare", gpu_index=7)


def test_a_copy_that_is_none_is_said(tmp_path: Path) -> None:
    code, out, _ = run("--root", str(tmp_path))
    assert code == 0
    (line,) = [text for text in out.splitlines() if text.startswith("warning  root")]
    assert line.endswith(f"{tmp_path} has no sys and no proc")
    (tmp_path / "sys").mkdir()
    assert f"{tmp_path} has no proc" in run("--root", str(tmp_path))[1]


@pytest.mark.parametrize(
    ("driver", "provider"),
    [
        ("mlx5_core", "mlx5"),
        ("mlx5_core.sf", "mlx5"),
        ("bnxt_en", "bnxt_re"),
        ("ice", "irdma"),
        ("", ""),
    ],
)
def test_the_provider_by_the_driver_of_the_kernel(
    driver: str, provider: str, tmp_path: Path
) -> None:
    """A device that rdma-core has given a name by its place."""
    machine = MachineMade(tmp_path / "m")
    nic = machine.pci("pci0000:00", "0000:01:00.0")
    machine.port(machine.device("rocep1s0f0", nic, driver=driver))
    machine.host(providers=("siw",))
    *_, found = fabric.libraries(Machine(machine.root), Options())
    assert found.check == "providers"
    assert found.found == (f"none for {provider}" if provider else "siw")


@pytest.mark.parametrize(
    ("asked", "kernel", "peer", "wanted"),
    [
        ("gives", (6, 1), "nvidia_peermem", ("dmabuf", "CUDA's driver gives it out")),
        ("gives", (5, 4), "nvidia_peermem", ("nvidia-peermem", "kernel 5.4 has no")),
        ("gives", (5, 4), "", ("none", "kernel 5.4 has no dmabuf")),
        ("refuses", (6, 1), "nv_peer_mem", ("nvidia-peermem", "no dmabuf of GPU 0, 1")),
        ("refuses", (6, 1), "", ("none", "no dmabuf of GPU 0, 1")),
        ("is not there", (6, 1), "nvidia_peermem", ("nvidia-peermem", "not there")),
        ("is not there", (6, 1), "", ("none", "is not there")),
        ("", (6, 1), "", ("dmabuf", "if CUDA's driver")),
    ],
)
def test_the_way_that_a_cache_on_a_gpu_would_take(
    asked: str, kernel: tuple[int, int], peer: str, wanted: tuple[str, str]
) -> None:
    """The same that registration takes, and why it is not dmabuf."""
    driver = StandIn()
    driver.dmabuf = asked == "gives"
    given = cuda.Cuda(driver) if asked in ("gives", "refuses") else asked
    way, why = fabric.registered_by(given, (0, 1), kernel, peer)
    driver.close()
    assert (way, wanted[1] in why) == (wanted[0], True), why


def test_remedies_fit_what_is_wrong(report: Report) -> None:
    assert "--device=/dev/infiniband" in report("container")["device files"].remedy
    assert "CNI" in report("container")["device mlx5_5"].remedy
    assert "opensm" in report("infiniband")["device mlx5_1"].remedy
    assert "ulimit -l unlimited" in report("dual_port")["memlock"].remedy


def test_options_that_leave_nothing_are_a_problem(report: Report) -> None:
    finding = report("bare", require_rdma=True)["choice"]
    assert finding.level is Level.PROBLEM
    assert "require_rdma is set" in finding.found
    assert "mlx5_7" in report("holes", device="mlx5_7")["choice"].found


@pytest.mark.parametrize("machine", MACHINES)
def test_exit_code_and_json_agree(machine: str, tmp_path: Path) -> None:
    root = str(make(machine, tmp_path / "m").root)
    code, out, _ = run("--root", root, "--json")
    levels = [json.loads(line)["level"] for line in out.splitlines()]
    assert code == int("problem" in levels)
    code, out, _ = run("--root", root, "--quiet")
    assert code == int("problem" in levels)
    assert not [line for line in out.splitlines() if line.startswith("ok ")]
    assert out.splitlines()[-1] == verdict(
        cli.look(Machine(Path(root)), _options(root))
    )


def _options(root: str) -> Options:
    return Options(sysfs=f"{root}/sys")


def test_the_verdict_counts() -> None:
    bad, poor = problem("a", "b", "c", "d"), warning("a", "b", "c", "d")
    assert verdict([ok("a", "b")]) == "nothing to complain of"
    assert verdict([bad, poor, poor]) == "1 problem, 2 warnings"
    assert verdict([poor]) == "no problems, 1 warning"


def test_a_terminal_gets_a_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [ok("a", "is well"), problem("b", "is not", "which matters", "type this")]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    cli.show(found, machine=False, skip_ok=False)
    text = capsys.readouterr().out
    assert "\u2502" in text or "|" in text
    for words in ("is well", "is not", "which matters", "-> type this", "1 problem"):
        assert words in text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False)
    cli.show(found, machine=False, skip_ok=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["PROBLEM", "b", "is", "not"]
    assert lines[-1] == "1 problem, no warnings"


def test_wrong_use() -> None:
    for arguments in (
        ("--peer", "host"),
        ("--peer", "a:1", "--listen", "b:2"),
        ("--listen", "127.0.0.1:99999"),
        ("--device", "a b"),
    ):
        code, _, err = run(*arguments)
        assert code == 2, arguments
        assert "Traceback" not in err


@pytest.mark.parametrize("device", ["soft", "null"])
def test_options_that_contradict_each_other_are_a_finding(device: str) -> None:
    for extra in ((), ("--no-transfer",)):
        code, out, _ = run("--json", "--device", device, "--require-rdma", *extra)
        rows = [json.loads(line) for line in out.splitlines()]
        (row,) = [row for row in rows if "device names the" in row["found"]]
        assert (code, row["level"]) == (1, "problem")
        assert "kvxfer config" in row["remedy"]
        # The others have looked all the same.
        assert {"memlock", "clock", "GPU memory"} <= {row["check"] for row in rows}


def test_a_check_that_fails_is_a_finding(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(machine: Machine, options: Options) -> Iterator[Finding]:
        yield ok("first", "is told")
        raise ValueError("not what the kernel writes")

    monkeypatch.setattr(checks, "CHECKS", (stumble, stumble, checks.clock))
    found = report("bare")
    assert found["first"].level is Level.OK
    assert found["stumble"].level is Level.PROBLEM
    assert found["stumble"].found == "ValueError: not what the kernel writes"
    assert found["clock"].level is Level.OK


# -- this machine -----------------------------------------------------------------


async def test_every_byte_is_compared_on_this_machine() -> None:
    for finding in await cli.transfers(Machine(), Options(device="soft")):
        assert finding.level is Level.OK, finding
        assert "128 blocks written and compared" in finding.found


async def test_the_interface_that_is_named_is_not_listened_on() -> None:
    """A server would, but here nobody else is to connect."""
    names = [name for _, name in socket.if_nameindex()]
    for name in names:
        options = Options(device="soft", socket_ifname=name)
        (finding,) = await cli.transfers(Machine(), options)
        assert finding.level is Level.OK, finding


async def test_a_device_that_corrupts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = transfer.fill
    # The source is filled for another seed than is looked for.
    monkeypatch.setattr(transfer, "fill", lambda cache, seed: real(cache, seed + 1))
    (finding,) = await cli.transfers(Machine(), Options(device="soft"))
    assert finding.level is Level.PROBLEM
    assert "128 of 128 blocks are wrong" in finding.found


async def test_a_device_that_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVXFER_SOFT_FAULT", "nth=5,act=status:REM_OP_ERR,on=target")
    (finding,) = await cli.transfers(Machine(), Options(device="soft"))
    assert finding.level is Level.PROBLEM
    assert "RemoteOperationError" in finding.found


def test_the_command_on_this_machine() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvxfer", "doctor", "--json", "--device", "soft"],
        stdout=PIPE,
        timeout=120,
        check=False,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == int(any(row["level"] == "problem" for row in rows))
    checks = [row["check"] for row in rows]
    for check in ("kvxfer", "memlock", "clock", "device soft0", "write soft0"):
        assert check in checks


def test_it_works_without_the_extensions(tmp_path: Path) -> None:
    """As far as it can: what reads, reads, and the first line says what is missing."""
    blocked = "\n".join(
        f"sys.modules['kvxfer.{name}'] = None" for name in ("_verbs", "_engine")
    )
    program = (
        f"import sys\n{blocked}\nfrom kvxfer.doctor.cli import main\nmain(['--json'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=PIPE, timeout=60, check=False
    )
    assert done.returncode == 1
    rows = {row["check"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert rows["kvxfer"]["level"] == "problem"
    assert "memlock" in rows and "clock" in rows
    for side in ("--peer", "--listen"):
        program = program.replace("['--json']", f"['--json', '{side}', 'localhost:1']")
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=PIPE,
            stderr=PIPE,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (1, b"")
        (row,) = map(json.loads, done.stdout.splitlines())
        assert (row["check"], row["level"]) == ("kvxfer", "problem")


# -- the way to another host ------------------------------------------------------


@contextlib.asynccontextmanager
async def listening(device: str = "soft") -> AsyncIterator[int]:
    """Run the other side in a process of its own; give its port."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvxfer", "doctor", "--listen", "127.0.0.1:0"),
        *("--device", device),
        stdout=PIPE,
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), SOON)
        yield int(line.rpartition(b":")[2])
    finally:
        process.send_signal(signal.SIGINT)
        await asyncio.wait_for(process.communicate(), SOON)
    assert process.returncode == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


SOFT = Options(device="soft", ib_timeout=14, ping_timeout=2)


async def test_the_whole_path(caplog: pytest.LogCaptureFixture) -> None:
    async with listening() as port:
        for _ in range(2):
            found = await transfer.probe("127.0.0.1", port, SOFT)
            # That it ends is how the verdict comes.
            assert not caplog.records
            assert [f.check for f in found] == [
                *("control", "negotiation", "packets", "data path", "verified")
            ]
            assert not [f for f in found if f.level is not Level.OK], found
    assert "128 blocks compared at the other side" in found[-1].found


async def test_nobody_listens() -> None:
    (found,) = await transfer.probe("127.0.0.1", free_port(), SOFT)
    assert (found.check, found.level) == ("control", Level.PROBLEM)
    assert "refused" in found.found
    assert "kvxfer doctor --listen" in found.remedy


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b"])
async def test_a_host_that_is_not_known(host: str) -> None:
    (found,) = await transfer.probe(host, 7, SOFT)
    assert (found.check, found.level) == ("control", Level.PROBLEM)
    assert "the name is not known" in found.found
    assert f"getent hosts {host}" in found.remedy


def test_to_listen_where_nobody_is() -> None:
    code, _, err = run("--listen", "a..b:7", "--device", "soft")
    assert code == 1
    assert "'a..b' does not resolve" in err


async def test_options_that_contradict_each_other_are_no_negotiation() -> None:
    async with listening() as port:
        options = Options(device="soft", require_rdma=True)
        found = await transfer.probe("127.0.0.1", port, options)
    assert [f.check for f in found] == ["control", "choice"]
    assert "kvxfer config" in found[-1].remedy


async def test_what_breaks_later_is_no_negotiation() -> None:
    """The other side refuses the bytes: the connection was made."""
    async with transfer.Listener(
        Options(device="soft", port=0), lambda line: None
    ) as listener:
        set_faults(listener._server, "act=status:REM_OP_ERR,on=target")
        port = int(listener.endpoint.rpartition(":")[2])
        found = await transfer.probe("127.0.0.1", port, SOFT)
    assert [f.check for f in found] == ["control", "negotiation", "data path"]
    assert (found[1].level, found[2].level) == (Level.OK, Level.PROBLEM)
    assert "RemoteOperationError" in found[2].found


async def test_an_endpoint_with_a_cache_of_its_own_is_left_alone() -> None:
    with KVCache.allocate(n_blocks=2, block_bytes=64, n_layers=1) as cache:
        cache.view(0, "k")[:] = 7
        async with Server(cache, port=0, device="soft") as server:
            found = await transfer.probe("127.0.0.1", server.port, SOFT)
        assert (found[-1].check, found[-1].level) == ("negotiation", Level.NOTE)
        assert (cache.view(0, "k") == 7).all()


@pytest.mark.parametrize(("n_through", "passed"), [(1, 256), (3, 1024), (5, 4096)])
async def test_long_packets_that_are_swallowed(
    n_through: int, passed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short ones come through, and then one does not: an MTU black hole."""
    # A write is three WRs: its bytes, the record, the immediate.
    monkeypatch.setenv("KVXFER_SOFT_FAULT", f"act=drop,nth={3 * n_through + 1}")
    said: list[str] = []
    async with transfer.Listener(
        Options(device="soft", port=0), said.append
    ) as listener:
        port = int(listener.endpoint.rpartition(":")[2])
        found = await transfer.probe("127.0.0.1", port, SOFT)
    assert (found[-1].check, found[-1].level) == ("packets", Level.PROBLEM)
    assert f"of {passed} bytes come through" in found[-1].found
    assert "black hole" in found[-1].meaning
    assert f"KVXFER_PATH_MTU={passed}" in found[-1].remedy


async def test_packets_that_do_not_come_through() -> None:
    """The control connection works, and of the data nothing is acknowledged."""
    said: list[str] = []
    async with transfer.Listener(
        Options(device="soft", port=0), said.append
    ) as listener:
        set_faults(listener._server, "act=port_down@t=0us")
        port = int(listener.endpoint.rpartition(":")[2])
        found = await transfer.probe("127.0.0.1", port, SOFT)
    assert (found[-1].check, found[-1].level) == ("data path", Level.PROBLEM)
    assert "TCP port of its own" in found[-1].meaning
    assert "net.ipv4.ip_local_port_range" in found[-1].remedy
    assert "4791" not in found[-1].meaning


def test_packets_of_a_nic_that_do_not_come_through() -> None:
    error = RetryExceededError("nobody answers")
    found = transfer.swallowed("mlx5_0 by GID 3", "rdma", 0, error)
    assert (found.check, found.level) == ("data path", Level.PROBLEM)
    assert "4791" in found.meaning and "MTU" in found.meaning
