"""A cache in a sidecar, and processes that attach to it, crash and come back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import sys
import tempfile
import textwrap
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvxfer import Client, KVCache, RequestState, Server, Ticket, TicketState
from kvxfer import shared_messages as messages
from kvxfer.attached import Attachment
from kvxfer.errors import (
    AddressInUseError,
    BrokenPeerError,
    ClosedResourceError,
    ControlError,
    InternalError,
    KVXferError,
    UsageError,
)
from kvxfer.share import Share
from tests.children import freeze
from tests.endpoints import SOON, Arena, arena, noise, until
from tests.patience import patient
from tests.streaming import HASTY
from tests.test_cli import running

pytestmark = pytest.mark.usefixtures("commands")

SHAPE: dict[str, Any] = {"n_blocks": 16, "block_bytes": 256, "n_layers": 3}
OURS, THEIRS = [3, 1, 9], [5, 2, 7]


@dataclass(eq=False)
class Sidecar:
    """A server, its cache, and the path by which it is shared."""

    server: Server
    share: Share
    cache: KVCache
    path: str

    async def attach(self) -> tuple[KVCache, Attachment]:
        """Attach this process."""
        cache = await asyncio.to_thread(KVCache.attach, self.path)
        assert cache.attachment is not None
        return cache, cache.attachment


@contextlib.asynccontextmanager
async def sidecar(path: Path) -> AsyncIterator[Sidecar]:
    """Give a sidecar of this process."""
    with KVCache.allocate(**SHAPE) as cache:
        async with (
            Server(cache, port=0, host="127.0.0.1", **HASTY) as server,
            Share(server, cache, f"unix:{path}") as share,
        ):

            async def follow() -> None:
                async for arrival in server.arrivals():
                    share.tell(arrival)

            following = asyncio.ensure_future(follow())
            yield Sidecar(server, share, cache, str(path))
        await following


@pytest.fixture
def source() -> Iterator[Arena]:
    with arena(
        n_blocks=16, layers=3, planes={"k": (256, 256), "v": (256, 256)}, seed=1
    ) as made:
        yield made


def blocks(cache: KVCache, ids: list[int]) -> list[bytes]:
    """Return the bytes of some blocks, all layers and planes."""
    return [
        cache.view(layer, plane)[ids].tobytes()
        for layer in cache.layers
        for plane in ("k", "v")
    ]


async def take(attachment: Attachment, n: int) -> list[Any]:
    """Wait for so much news."""
    news = attachment.arrivals()
    return [
        await asyncio.wait_for(asyncio.to_thread(next, news), SOON) for _ in range(n)
    ]


async def test_memory_and_arrivals(tmp_path: Path, source: Arena) -> None:
    """Written into the sidecar's cache, read in the mapping of the other process."""
    async with (
        sidecar(tmp_path / "s") as beside,
        Client(source.cache, **HASTY) as client,
    ):
        cache, attachment = await beside.attach()
        assert beside.share.attached == 1
        assert cache.describe() == beside.cache.describe()
        peer = await client.connect("127.0.0.1", beside.server.port)
        await client.write_cache(peer, OURS, THEIRS, request_id="r")
        found = await take(attachment, 3)
        assert sorted(news.layer for news in found) == [0, 1, 2]
        assert {(n.request_id, *n.block_ids) for n in found} == {("r", *THEIRS)}
        assert blocks(cache, THEIRS) == blocks(source.cache, OURS)
        # It is one memory, and the engine writes into it as well.
        cache.view(1, "v")[4] = 99
        assert (beside.cache.view(1, "v")[4] == 99).all()
        cache.close()
        await until(lambda: beside.share.attached == 0)
        with pytest.raises(ClosedResourceError):
            attachment.offer("127.0.0.1:1", "x", {"main": [1]})


async def test_arrivals_wait_for_an_engine_that_is_away(
    tmp_path: Path, source: Arena
) -> None:
    async with (
        sidecar(tmp_path / "s") as beside,
        Client(source.cache, **HASTY) as client,
    ):
        peer = await client.connect("127.0.0.1", beside.server.port)
        for i in range(3):
            await client.write_cache(peer, [i], [i], 0, request_id=str(i))
        await until(lambda: len(beside.share._parked) == 3)
        cache, attachment = await beside.attach()
        assert [n.request_id for n in await take(attachment, 3)] == ["0", "1", "2"]
        cache.close()
        # Another one gets what comes from now on, and sees what was written.
        cache, attachment = await beside.attach()
        await client.write_cache(peer, [5], [6], 0, request_id="3")
        assert [n.request_id for n in await take(attachment, 1)] == ["3"]
        assert bytes(cache.view(0, "k")[1]) == bytes(source.cache.view(0, "k")[1])
        cache.close()


async def test_an_engine_offers_requests(tmp_path: Path, source: Arena) -> None:
    async with (
        sidecar(tmp_path / "s") as beside,
        Client(source.cache, **HASTY, listen="127.0.0.1:0") as client,
    ):
        cache, attachment = await beside.attach()
        assert client.listening is not None
        ticket = await asyncio.to_thread(
            attachment.offer, client.listening, "r", {"main": THEIRS}, checksum=True
        )
        request = client.open("r")
        request.ready(0, OURS, final=True)
        await asyncio.to_thread(ticket.join_layer, 0, SOON)
        assert not ticket.is_over
        for layer in (1, 2):
            request.ready(layer, OURS)
        request.finish(aux=b"first token")
        await asyncio.to_thread(ticket.join, SOON)
        assert (ticket.state, ticket.aux) == ("done", b"first token")
        assert ticket.layers_done == (0, 1, 2)
        assert blocks(cache, THEIRS) == blocks(source.cache, OURS)
        cache.close()


async def test_an_offer_that_is_refused_and_one_that_is_given_up(
    tmp_path: Path,
) -> None:
    async with sidecar(tmp_path / "s") as beside:
        cache, attachment = await beside.attach()
        offer = attachment.offer
        for bad in ({"main": [99]}, {"other": [1]}):
            with pytest.raises(UsageError):
                await asyncio.to_thread(offer, "127.0.0.1:1", "bad", bad)
        ticket = await asyncio.to_thread(offer, "127.0.0.1:1", "r", {"main": [1]})
        with pytest.raises(UsageError, match="offered already"):
            await asyncio.to_thread(offer, "127.0.0.1:1", "r", {"main": [2]})
        with pytest.raises(TimeoutError):
            ticket.join(0.01)
        await asyncio.to_thread(ticket.abort, "not needed")
        await until(lambda: ticket.is_over)
        assert (ticket.state, "not needed" in ticket.error) == ("aborted", True)
        with pytest.raises(BrokenPeerError, match="aborted"):
            ticket.join(SOON)
        cache.close()


def over(ticket: Ticket, request_id: str) -> bool:
    """Say whether it is this request's, and was given up."""
    return (ticket.request_id, ticket.state) == (request_id, TicketState.ABORTED)


ENGINE = """
    import sys
    from kvxfer import KVCache
    cache = KVCache.attach(sys.argv[1])
    ticket = cache.attachment.offer(sys.argv[2], "r", {"main": [5, 2, 7]})
    ticket.join_layer(0, 20)
    print("streaming", flush=True)
    sys.stdin.read()
"""


async def test_a_crashed_engine_leaves_the_sidecar_and_its_requests_are_fenced(
    tmp_path: Path, source: Arena
) -> None:
    async with (
        sidecar(tmp_path / "s") as beside,
        Client(source.cache, **HASTY, listen="127.0.0.1:0") as client,
    ):
        assert client.listening is not None
        engine = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", textwrap.dedent(ENGINE)),
            *(beside.path, client.listening),
            stdin=PIPE,
            stdout=PIPE,
        )
        request = client.open("r")
        request.ready(0, OURS, final=True)
        assert engine.stdout is not None
        line = await asyncio.wait_for(engine.stdout.readline(), SOON)
        assert line == b"streaming\n"
        engine.send_signal(signal.SIGKILL)
        await asyncio.wait_for(engine.communicate(), SOON)
        await until(lambda: request.error is not None)
        assert request.state is RequestState.ABORTED
        assert "has gone" in str(request.error)
        await until(lambda: [t for t in beside.server.finished() if over(t, "r")])
        await until(lambda: beside.share.attached == 0)
        # Nothing of it lands any more, and the blocks are free for the next engine.
        before = blocks(beside.cache, list(range(16)))
        with contextlib.suppress(KVXferError):
            request.ready(1, OURS)
        cache, attachment = await beside.attach()
        assert blocks(cache, list(range(16))) == before
        again = await asyncio.to_thread(
            attachment.offer, client.listening, "r2", {"main": THEIRS}
        )
        other = client.open("r2")
        other.ready(None, OURS)
        other.finish()
        await asyncio.to_thread(again.join, SOON)
        assert blocks(cache, THEIRS) == blocks(source.cache, OURS)
        cache.close()


# -- who may, and what is in the way ------------------------------------------------


async def test_access_is_by_the_permissions_of_the_path(source: Arena) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can try to be somebody else")
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o711)
        async with sidecar(Path(directory) / "s") as beside:
            assert os.stat(beside.path).st_mode & 0o777 == 0o600
            os.seteuid(65534)
            try:
                with pytest.raises(ControlError, match="Permission denied"):
                    KVCache.attach(beside.path)
            finally:
                os.seteuid(0)
            assert beside.share.attached == 0


async def test_a_path_is_taken_from_nobody(tmp_path: Path) -> None:
    path = tmp_path / "s"
    async with sidecar(path) as beside:
        with pytest.raises(AddressInUseError):
            async with Share(beside.server, beside.cache, str(path)):
                pass
        cache, _ = await beside.attach()
        cache.close()
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ControlError, match="no socket"):
            async with Share(beside.server, beside.cache, f"{tmp_path}/file"):
                pass
        assert (tmp_path / "file").read_text() == "mine"
        long = Share(beside.server, beside.cache, f"{tmp_path}/{'x' * 120}")
        with pytest.raises(ControlError, match="107 bytes"):
            await long.__aenter__()
    assert not path.exists()
    # What a sidecar that was killed has left is no obstacle.
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with sidecar(path) as beside:
        cache, _ = await beside.attach()
        cache.close()


async def test_memory_that_is_no_file_is_not_shared(source: Arena) -> None:
    async with Server(source.cache, port=0, **HASTY) as server:
        with pytest.raises(UsageError, match=r"KVCache\.allocate"):
            Share(server, source.cache, "/nowhere")


async def test_nobody_is_there(tmp_path: Path) -> None:
    with pytest.raises(ControlError, match="serve --share"):
        KVCache.attach(tmp_path / "s")
    for text in ("", "unix:", "tcp:127.0.0.1:7777", "ipc://s"):
        with pytest.raises(UsageError, match="write unix:PATH"):
            KVCache.attach(text)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen(1)
        with pytest.raises(ControlError, match="cannot attach"):
            KVCache.attach(tmp_path / "s", timeout=0.1)


@pytest.mark.parametrize(
    "garbage", [b"\xff" * 8, b"\0\0\0\3abc", messages.encode(messages.Answer(1, ""))]
)
async def test_a_process_that_makes_no_sense_is_let_go(
    garbage: bytes, tmp_path: Path
) -> None:
    """And nobody else is."""
    async with sidecar(tmp_path / "s") as beside:
        cache, attachment = await beside.attach()
        reader, writer = await asyncio.open_unix_connection(beside.path)
        await asyncio.wait_for(reader.readexactly(4), SOON)
        writer.write(garbage)
        await until(lambda: beside.share.attached == 1 and reader.at_eof)
        await asyncio.wait_for(reader.read(), SOON)
        writer.close()
        ticket = await asyncio.to_thread(
            attachment.offer, "127.0.0.1:1", "r", {"main": [1]}
        )
        assert ticket.state == "offered"
        cache.close()


async def test_a_process_that_does_not_read_is_let_go(
    tmp_path: Path, source: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvxfer.share._MAX_UNREAD_BYTES", 1 << 12)
    async with (
        sidecar(tmp_path / "s") as beside,
        Client(source.cache, **HASTY) as client,
    ):
        deaf = socket.socket(socket.AF_UNIX)
        with deaf:
            deaf.setblocking(False)
            deaf.connect(beside.path)
            await until(lambda: beside.share.attached == 1)
            peer = await client.connect("127.0.0.1", beside.server.port)
            name = "x" * 200
            while beside.share.attached:
                await client.write_cache(peer, [1], [2], request_id=name)
        assert peer.connected


# -- what goes wrong in the sidecar ---------------------------------------------------


@contextlib.contextmanager
def out_of_descriptors() -> Iterator[None]:
    """Let this process open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_sidecar_without_descriptors_lets_in_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so once, and not at each attempt."""
    async with sidecar(tmp_path / "s") as beside:
        with socket.socket(socket.AF_UNIX) as engine:
            engine.setblocking(False)
            with out_of_descriptors():
                engine.connect(beside.path)
                await until(lambda: beside.share.refused >= 3)
                assert beside.share.attached == 0
            await until(lambda: beside.share.attached == 1)
        cache, _ = await beside.attach()
        cache.close()
    said = [r.getMessage() for r in caplog.records if "not be taken" in r.getMessage()]
    assert len(said) == 1
    assert "Too many open files" in said[0] and "ulimit -n" in said[0]


async def test_a_fence_that_fails_leaves_out_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an engine that has gone everything is fenced, and its connection ended."""
    real = Ticket.abort

    def abort(self: Ticket, reason: str = "") -> Any:
        if self.request_id == "first":
            raise InternalError("no way to say so")
        return real(self, reason)

    monkeypatch.setattr(Ticket, "abort", abort)
    async with sidecar(tmp_path / "s") as beside:
        cache, attachment = await beside.attach()
        tickets = {
            name: await asyncio.to_thread(
                attachment.offer, "127.0.0.1:1", name, {"main": [block]}
            )
            for block, name in enumerate(("first", "second"))
        }
        with pytest.raises(UsageError, match="no way to say so"):
            await asyncio.to_thread(tickets["first"].abort)
        cache.close()
        await until(lambda: [t for t in beside.server.finished() if over(t, "second")])
        await until(lambda: not beside.share._tasks)


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[tuple[int, KVCache, Attachment]]:
    """Give a sidecar that is a process: its pid, and an attachment to it."""
    async with running(
        *("kvxfer.serve", "--json", "--port", "0", "--share", f"unix:{path}"),
        *("--layers", "2", "--blocks", "64", "--block-bytes", "512"),
    ) as serve:
        await serve.event()
        cache = await asyncio.to_thread(KVCache.attach, path)
        assert cache.attachment is not None
        try:
            yield serve.process.pid, cache, cache.attachment
        finally:
            cache.close()


async def test_a_frozen_sidecar_counts_as_gone(tmp_path: Path) -> None:
    """Within the time that was given to attach; thawed, it serves who comes again."""
    nobody, blocks = "127.0.0.1:1", {"main": [1]}
    async with serving(tmp_path / "s") as (pid, cache, attachment):
        pending = await asyncio.to_thread(attachment.offer, nobody, "r", blocks)
        await freeze(pid)
        attachment.timeout = 0.2
        with pytest.raises(BrokenPeerError, match="does not answer for 0") as caught:
            await asyncio.wait_for(
                asyncio.to_thread(attachment.offer, nobody, "x", {"main": [2]}), SOON
            )
        assert "Attach again" in caught.value.hint
        # All that waits for it is told.
        with pytest.raises(BrokenPeerError, match="does not answer"):
            await take(attachment, 1)
        with pytest.raises(BrokenPeerError, match="does not answer"):
            pending.join(SOON)
        with pytest.raises(BrokenPeerError, match="does not answer"):
            pending.join_layer(0, SOON)
        with pytest.raises(BrokenPeerError, match="does not answer"):
            pending.abort()
        # Nobody has fenced it: what a writer has begun may still land.
        assert pending.state == "lost" and not pending.is_over
        cache.close()
        os.kill(pid, signal.SIGCONT)
        with await asyncio.to_thread(KVCache.attach, tmp_path / "s") as again:
            assert again.attachment is not None
            deadline = asyncio.get_running_loop().time() + SOON
            while True:  # until the fence, they are offered
                try:
                    await asyncio.to_thread(again.attachment.offer, nobody, "r", blocks)
                    break
                except UsageError:
                    assert asyncio.get_running_loop().time() < deadline


async def test_an_abort_that_a_frozen_sidecar_does_not_hear(tmp_path: Path) -> None:
    async with serving(tmp_path / "s") as (pid, _, attachment):
        ticket = await asyncio.to_thread(
            attachment.offer, "127.0.0.1:1", "r", {"main": [1]}
        )
        await freeze(pid)
        attachment.timeout = 0.1
        with pytest.raises(BrokenPeerError, match="does not answer"):
            await asyncio.wait_for(asyncio.to_thread(ticket.abort), SOON)


async def test_a_fence_may_take_longer_than_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sidecar that answers something else is not taken for gone."""
    real = Ticket.abort
    may_end = asyncio.Event()

    async def slow(ticket: Ticket, reason: str) -> None:
        await may_end.wait()
        await real(ticket, reason)

    monkeypatch.setattr(Ticket, "abort", slow)
    async with sidecar(tmp_path / "s") as beside:
        cache, attachment = await beside.attach()
        ticket = await asyncio.to_thread(
            attachment.offer, "127.0.0.1:1", "r", {"main": [1]}
        )
        attachment.timeout = patient(1.5)
        aborting = asyncio.ensure_future(asyncio.to_thread(ticket.abort))
        await until(lambda: attachment._number == 3)  # the offer, the abort, a question
        may_end.set()
        await asyncio.wait_for(aborting, SOON)
        await until(lambda: ticket.is_over)
        assert ticket.state == "aborted"
        cache.close()


async def test_a_close_does_not_wait_for_a_frozen_sidecar(tmp_path: Path) -> None:
    """Not even while another thread says more than the socket holds."""
    async with serving(tmp_path / "s") as (pid, cache, attachment):
        await freeze(pid)
        attachment.timeout = 10 * SOON
        many = {"main": list(range(1 << 20))}
        offering = asyncio.ensure_future(
            asyncio.to_thread(attachment.offer, "127.0.0.1:1", "r", many)
        )
        await until(lambda: attachment._answers)
        await asyncio.wait_for(asyncio.to_thread(cache.close), SOON)
        with pytest.raises(ClosedResourceError):
            await asyncio.wait_for(offering, SOON)


async def test_serve_shares_its_cache_and_its_end_is_noticed(tmp_path: Path) -> None:
    geometry = ["--layers", "2", "--blocks", "64", "--block-bytes", "512"]
    path = tmp_path / "s"
    async with running(
        *("kvxfer.serve", "--json", *geometry, "--port", "0"),
        *("--share", f"unix:{path}", "--share-mode", "660"),
    ) as serve:
        ready = await serve.event()
        assert ready["share"] == str(path)
        assert os.stat(path).st_mode & 0o777 == 0o660
        cache = await asyncio.to_thread(KVCache.attach, f"unix:{path}")
        assert cache.attachment is not None
        with KVCache.allocate(
            n_layers=2, n_blocks=64, block_bytes=512, dtype="bf16"
        ) as ours:
            data = noise(512, 7)
            ours.view(1, "k")[3] = data
            async with Client(ours, **HASTY) as client:
                host, _, port = ready["endpoint"].rpartition(":")
                peer = await client.connect(host, int(port))
                await client.write_cache(peer, [3], [9], 1)
                (news,) = await take(cache.attachment, 1)
                assert (news.layer, news.block_ids) == (1, [9])
                assert np.array_equal(cache.view(1, "k")[9], data)
        serve.process.kill()
        with pytest.raises(BrokenPeerError, match="is gone"):
            await take(cache.attachment, 1)
        with pytest.raises(BrokenPeerError):
            cache.attachment.offer("127.0.0.1:1", "r", {"main": [1]})
        cache.close()
        await serve.end()
    code, _, err = await _result("kvxfer.serve", "--share-mode", "9")
    assert code == 2 and "octal" in err


async def _result(*arguments: str) -> tuple[int, str, str]:
    async with running(*arguments) as command:
        return await command.end()
