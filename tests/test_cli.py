"""The command line: what it prints, what it exits with, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvxfer import Client, __version__
from kvxfer.command import CacheShape
from tests.commands import Process, start
from tests.endpoints import QUICK, SOON, until

pytestmark = pytest.mark.usefixtures("commands")

SHAPE = CacheShape(layers=2, blocks=64, block_bytes=512)
GEOMETRY = ["--layers", "2", "--blocks", "64", "--block-bytes", "512"]


class Command:
    """A running command, its output line by line."""

    def __init__(self, process: Process) -> None:
        self.process = process

    async def line(self) -> str:
        """Wait for the next line on stdout."""
        line = await asyncio.wait_for(self.process.stdout.readline(), SOON)
        return line.decode().rstrip("\n")

    async def event(self) -> dict[str, Any]:
        """Wait for the next line, which is JSON."""
        found: dict[str, Any] = json.loads(await self.line())
        return found

    async def warned(self, text: str) -> None:
        """Wait for a line on stderr that contains ``text``."""
        line = b"-"
        while line and text.encode() not in line:
            line = await asyncio.wait_for(self.process.stderr.readline(), SOON)
        assert line, f"it ended without saying {text!r}"

    async def end(self, number: int | None = None) -> tuple[int, str, str]:
        """Send a signal, wait for the end; return exit code, stdout and stderr."""
        if number is not None:
            self.process.send_signal(number)
        out, err = await asyncio.wait_for(self.process.communicate(), SOON)
        assert self.process.returncode is not None
        assert "Traceback" not in err.decode(), err.decode()
        return self.process.returncode, out.decode(), err.decode()


@contextlib.asynccontextmanager
async def running(*arguments: str) -> AsyncIterator[Command]:
    """Run ``python -m`` with these arguments; the test uses the fixture commands."""
    async with start(*arguments) as process:
        yield Command(process)


async def result_of(*arguments: str) -> tuple[int, str, str]:
    """Run a command to its end."""
    async with running(*arguments) as command:
        return await command.end()


@contextlib.asynccontextmanager
async def serving(*arguments: str) -> AsyncIterator[tuple[Command, str]]:
    """Run a small endpoint that speaks JSON; give it and where it listens."""
    async with running(
        "kvxfer.serve", "--json", *GEOMETRY, "--port", "0", *arguments
    ) as command:
        ready = await command.event()
        assert ready["event"] == "ready"
        yield command, ready["endpoint"]


# -- the two sides ------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "ipc"])
async def test_an_endpoint_and_a_push(number: int, host: str, tmp_path: Path) -> None:
    if host == "ipc":
        host = f"ipc://{tmp_path}/control"
    async with serving("--host", host, "--verify") as (serve, endpoint):
        assert host in endpoint
        push = ["kvxfer", "push", endpoint, "--json", *GEOMETRY]
        code, out, err = await result_of(
            *push, "--request-blocks", "40", "--request-id", "r1"
        )
        assert (code, err) == (0, "")
        written = [json.loads(line) for line in out.splitlines()]
        assert [event["layer"] for event in written] == [0, 1]
        for event in written:
            assert event["blocks"] == 40
            assert event["bytes"] == 2 * 40 * 512
            assert event["seconds"] > 0
            assert (event["device"], event["wire"]) == ("soft0", "shm")
        for layer in (0, 1):
            event = await serve.event()
            assert event.pop("peer")
            assert event == {
                "event": "arrival",
                "request_id": "r1",
                "group": "main",
                "layer": layer,
                "blocks": 40,
                "bytes": 2 * 40 * 512,
                "verified": True,
                "wrong_blocks": [],
            }
        code, out, err = await serve.end(number)
        assert (code, err) == (0, "")
        assert json.loads(out) == {"event": "closed", "wrong_blocks": 0}


async def test_what_people_read() -> None:
    async with running(
        "kvxfer", "serve", *GEOMETRY, "--port", "0", "--verify"
    ) as serve:
        ready = await serve.line()
        assert ready.startswith("ready on 127.0.0.1:")
        assert ready.endswith("device soft0: 2 layers x 64 blocks x 512 bytes (k, v)")
        endpoint = ready.split()[2].rstrip(",")
        code, out, _ = await result_of(
            "kvxfer", "push", endpoint, *GEOMETRY, "--request-blocks", "64"
        )
        assert code == 0
        assert out.startswith("layer 0: 64 blocks, 65536 bytes, ")
        assert "request push layer 0, 64 blocks, 65536 bytes, verified" in (
            await serve.line()
        )
        code, out, _ = await serve.end(signal.SIGTERM)
        assert code == 0 and out.endswith("closed\n")


async def test_verify_sees_a_wrong_byte() -> None:
    async with serving("--verify") as (serve, endpoint):
        host, port = endpoint.split(":")
        with SHAPE.allocate() as cache:
            async with Client(cache, **QUICK) as client:
                peer = await client.connect(host, int(port))
                await client.write_cache(peer, [3, 4], [9, 5], 1)
        event = await serve.event()
        assert (event["layer"], event["verified"]) == (1, False)
        assert event["wrong_blocks"] == [5, 9]
        code, out, _ = await serve.end(signal.SIGTERM)
        assert (code, json.loads(out)["wrong_blocks"]) == (1, 2)


async def test_a_config_file_serves_both_sides(tmp_path: Path) -> None:
    config = tmp_path / "kvxfer.toml"
    config.write_text(
        '[kvxfer]\nport = 0\nsq_depth = 64\nsoft_wire = "tcp"\n'
        '[cache]\nlayers = 3\nblocks = 10\nblock_bytes = 96\nplanes = ["a", "b", "c"]\n'
    )
    arguments = ["--config", str(config), "--json"]
    async with running(
        "kvxfer.serve", *arguments, "--verify", "--blocks", "12"
    ) as serve:
        ready = await serve.event()
        code, out, err = await result_of(
            "kvxfer", "push", ready["endpoint"], *arguments, "--request-blocks", "10"
        )
        assert (code, err) == (0, "")
        events = [json.loads(line) for line in out.splitlines()]
        assert [(e["bytes"], e["wire"]) for e in events] == [(3 * 10 * 96, "tcp")] * 3
        assert all([(await serve.event())["verified"] for _ in range(3)])
        assert (await serve.end(signal.SIGINT))[0] == 0


async def test_the_demo() -> None:
    code, out, err = await result_of(
        "kvxfer", "demo", *GEOMETRY, "--request-blocks", "33"
    )
    assert (code, err) == (0, "")
    assert out.count("yes") == 2
    assert "67,584" in out  # all bytes: 2 layers, 2 planes, 33 blocks, 512 bytes
    assert "software device" in out


async def test_a_demo_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVXFER_REQUIRE_RDMA", "1")
    code, _, err = await result_of("kvxfer", "demo", *GEOMETRY)
    assert code == 1
    assert "the endpoint did not start" in err


async def test_an_address_of_another_host() -> None:
    code, out, err = await result_of(
        "kvxfer", "serve", "--host", "192.0.2.1", *GEOMETRY
    )
    assert (code, out) == (1, "")
    assert "192.0.2.1" in err and "see the option host" in err


# -- what goes wrong ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--port", "99999"], "option port = 99999"),
        (["serve", "--port", "x"], "not a valid integer"),
        (["serve", "--layers", "0"], "'--layers'"),
        (["serve", "--planes", "k,k", *GEOMETRY], "a plane name occurs twice"),
        (["serve", "--device", "what is this"], "option device"),
        (["serve", "--config", "/no/such/file"], "does not exist"),
        (["serve", "--no-such-option"], "No such option"),
        (["push", "nonsense"], "is not HOST:PORT"),
        (["push", "host:99999"], "with a port of 0 to 65535"),
        (["serve", "--share", "tcp:here", *GEOMETRY], "write unix:PATH"),
        (["serve", "--share", "unix:", *GEOMETRY], "write unix:PATH"),
        (["push"], "Missing argument"),
        (["push", "h:1", "--request-blocks", "65", *GEOMETRY], "--request-blocks"),
        (["fly"], "No such command"),
    ],
)
async def test_wrong_options(arguments: list[str], message: str) -> None:
    code, out, err = await result_of("kvxfer", *arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[kvxfer]\nport = 'x'\n", "option port"),
        ("[kvxfer]\nprot = 1\n", "Did you mean port"),
        ("[cache]\nlayer = 1\n", "[cache] has no 'layer'"),
        ("[cache]\nlayers = 'many'\n", "layers"),
        ("[cache\n", "kvxfer.toml"),
    ],
)
async def test_wrong_config_files(text: str, message: str, tmp_path: Path) -> None:
    config = tmp_path / "kvxfer.toml"
    config.write_text(text)
    code, _, err = await result_of("kvxfer.serve", "--config", str(config))
    assert code == 2
    assert message in err


async def test_a_wrong_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVXFER_SQ_DEPTH", "deep")
    code, _, err = await result_of("kvxfer.serve", *GEOMETRY)
    assert code == 2
    assert "from environment KVXFER_SQ_DEPTH" in err


async def test_a_port_in_use() -> None:
    async with serving() as (serve, endpoint):
        port = endpoint.split(":")[1]
        code, _, err = await result_of("kvxfer.serve", *GEOMETRY, "--port", port)
        assert code == 1
        assert port in err and "in use" in err
        assert (await serve.end(signal.SIGTERM))[0] == 0


async def test_caches_that_do_not_fit() -> None:
    async with serving() as (serve, endpoint):
        code, out, err = await result_of(
            "kvxfer", "push", endpoint, "--layers", "2", "--blocks", "400"
        )
        assert (code, out) == (1, "")
        assert "512" in err and "32768" in err
        assert (await serve.end(signal.SIGTERM))[0] == 0


async def test_nobody_to_push_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVXFER_CONNECT_TIMEOUT", "0.2")
    code, _, err = await result_of(
        "kvxfer", "push", "127.0.0.1:1", *GEOMETRY, "--request-blocks", "4"
    )
    assert code == 1
    assert "127.0.0.1:1" in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_push_that_is_interrupted(number: int) -> None:
    async with running(
        *("kvxfer", "push", "127.0.0.1:1", *GEOMETRY, "--request-blocks", "4"), "-v"
    ) as push:
        await push.warned("no NIC in use")
        code, _, _ = await push.end(number)
        assert code == 130


async def test_an_endpoint_under_fire_ends_cleanly() -> None:
    """SIGTERM while a client writes: exit code 0, and the client learns it."""
    async with serving() as (serve, endpoint):
        host, port = endpoint.split(":")
        with SHAPE.allocate() as cache:
            async with Client(cache, **QUICK) as client:
                peer = await client.connect(host, int(port))

                async def write() -> None:
                    while peer.connected:
                        await client.write_cache(peer, range(64), range(64))

                writers = [asyncio.ensure_future(write()) for _ in range(4)]
                await serve.event()
                code, _, err = await serve.end(signal.SIGTERM)
                assert (code, err) == (0, "")
                await asyncio.wait_for(
                    asyncio.gather(*writers, return_exceptions=True), SOON
                )


async def test_a_second_signal_ends_the_grace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first one waits for a write that does not end, and would for an hour."""
    monkeypatch.setenv("KVXFER_SOFT_FAULT", "act=port_down@t=0us")
    async with serving("--grace", "3600") as (serve, endpoint):
        monkeypatch.delenv("KVXFER_SOFT_FAULT")
        host, port = endpoint.split(":")
        with SHAPE.allocate() as cache:
            async with Client(cache, **QUICK, ib_timeout=20) as client:
                peer = await client.connect(host, int(port))
                write = asyncio.ensure_future(client.write_cache(peer, [1], [2]))
                serve.process.send_signal(signal.SIGTERM)
                await until(lambda: peer.draining)
                assert not write.done()
                assert serve.process.returncode is None
                code, _, _ = await serve.end(signal.SIGTERM)
                assert code == 0
                await asyncio.wait_for(
                    asyncio.gather(write, return_exceptions=True), SOON
                )


# -- help ---------------------------------------------------------------------------


async def test_help_and_version() -> None:
    code, out, _ = await result_of("kvxfer", "--version")
    assert (code, out.strip()) == (0, f"kvxfer, version {__version__}")
    code, out, _ = await result_of("kvxfer", "-h")
    assert code == 0
    for name in ("demo", "kvbench", "push", "serve"):
        assert f"  {name} " in out


def test_the_default_geometry_is_that_of_llama() -> None:
    shape = CacheShape()
    assert (shape.layers, shape.planes, shape.dtype) == (32, ("k", "v"), "bf16")
    assert shape.block_bytes == 16 * 8 * 128 * 2


async def test_keys_from_the_command_line_to_a_verified_push(tmp_path: Path) -> None:
    for name in ("decode", "prefill", "stranger"):
        code, _, _ = await result_of(
            "kvxfer", "keys", "generate", name, "--dir", str(tmp_path)
        )
        assert code == 0
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (tmp_path / "prefill.key").rename(allowed / "prefill.key")
    serving = [
        *("--secret-key-file", str(tmp_path / "decode.key_secret")),
        *("--client-keys-dir", str(allowed)),
    ]
    async with running(
        *("kvxfer", "serve", "--port", "0", "--json", "--verify"), *serving, *GEOMETRY
    ) as serve:
        port = (await serve.event())["port"]

        async def push(name: str) -> tuple[int, str, str]:
            return await result_of(
                *("kvxfer", "push", f"127.0.0.1:{port}", "--request-blocks", "8"),
                *("--secret-key-file", str(tmp_path / f"{name}.key_secret")),
                *("--server-public-key", str(tmp_path / "decode.key")),
                *GEOMETRY,
            )

        assert (await push("prefill"))[0] == 0
        code, _, err = await push("stranger")
        assert code == 1 and "does not let this side's key in" in err
        events = [await serve.event() for _ in range(2)]
        assert all(event["verified"] for event in events)
    code, _, err = await result_of("kvxfer", "serve", *serving[:2], *GEOMETRY)
    assert code == 2 and "client_keys_dir is not set" in err


@pytest.mark.parametrize(
    "command", ["bench", "config", "demo", "devices", "doctor", "keys", "push", "serve"]
)
def test_a_command_imports_what_it_needs(command: str) -> None:
    """By itself: the others are forked from a process that has imported them all."""
    run = subprocess.run(
        [sys.executable, "-m", "kvxfer", command, "--help"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "--help" in run.stdout and run.stderr == ""
