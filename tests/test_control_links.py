"""Which link of a listener is gone, where ZMQ has only its descriptor to say so."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import socket
import struct
import termios
import time
from collections.abc import Callable
from typing import Any

import zmq

from kvxfer import wire
from kvxfer.control import ControlServer
from tests import control_messages as make
from tests.endpoints import SOON, until
from tests.test_control import Listener, dialed, make_server

#: What a dialer of ZMTP 3.1 says before its first message (rfc.zeromq.org/spec/37).
_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NULL".ljust(52, b"\0")
_READY = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
OPENING = _GREETING + b"\x04" + bytes([len(_READY)]) + _READY
#: Of a TCP socket: how much of what was sent is not acknowledged.
SIOCOUTQ = termios.TIOCOUTQ


def framed(message: wire.Message) -> bytes:
    """Put a message into a frame of ZMTP."""
    body = wire.encode(message)
    return b"\x02" + struct.pack(">Q", len(body)) + body


def dial(server: ControlServer) -> socket.socket:
    """Open a link and send a Hello by it. No thread does anything here."""
    link = socket.create_connection(("127.0.0.1", server.port), SOON)
    link.sendall(OPENING)
    # What comes before the answer has come is taken for a part of the opening.
    answer = b""
    while b"READY" not in answer:
        answer += link.recv(4096)
    link.sendall(framed(make.hello(nonce=wire.new_nonce())))
    return link


def queued(fd: int, request: int) -> int:
    """Ask for the length of a queue of a socket."""
    return int(struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0])


def is_open(fd: int) -> bool:
    """Say whether a descriptor of this process is open."""
    return os.path.lexists(f"/proc/self/fd/{fd}")


def hold_until(condition: Callable[[], object]) -> None:
    """Wait without letting the loop run: ZMQ's threads go on."""
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0001)


async def test_a_descriptor_that_has_a_new_owner() -> None:
    """While the loop is busy a link ends, and the next one has its descriptor."""
    listener = Listener()
    # These links answer no heartbeats.
    patience: dict[str, Any] = {
        "ping_interval": SOON,
        "ping_timeout": 3 * SOON,
        "connect_timeout": SOON,
    }
    async with make_server(listener, **patience) as server:
        with contextlib.ExitStack() as stack:
            other = stack.enter_context(dial(server))
            await until(lambda: len(listener.conn_ids) == 1)
            other.sendall(framed(make.accept(conn_id=listener.conn_ids[0])))
            await until(lambda: "established" in listener.calls)
            # With no descriptor free below, one that is freed is the next to be used.
            top = 0
            while top < other.fileno() + 100:
                top = os.open(os.devnull, os.O_RDONLY)
                stack.callback(os.close, top)
            first = stack.enter_context(dial(server))
            await until(lambda: len(listener.conn_ids) == 2)
            (fd,) = {number for number in server._doors._by_fd if number > top}

            # A message wakes the reader of messages first. Then there is the end of a
            # link for the watcher of links, and behind both a Hello of its successor.
            router = server._router
            assert router is not None
            other.sendall(framed(wire.Pong(seq=1)))
            hold_until(lambda: select.select([router.FD], [], [], 0)[0])
            first.close()
            hold_until(lambda: not is_open(fd))
            second = stack.enter_context(dial(server))
            hold_until(lambda: is_open(fd) and not queued(second.fileno(), SIOCOUTQ))
            hold_until(lambda: not queued(fd, termios.FIONREAD))

            await until(lambda: len(listener.conn_ids) == 3)
            assert fd in server._doors._by_fd
            await until(lambda: server.statistics().links == 3)
            await until(lambda: listener.reasons)
            assert set(listener.reasons) == {listener.conn_ids[1]}
            assert server.statistics().pending == 1
            assert server.statistics().links_open == 2


async def test_what_was_said_before_the_end_is_heard_before_it() -> None:
    """The end is told by ZMQ's monitor as well, past the messages."""
    listener = Listener()
    async with (
        make_server(listener) as server,
        dialed(server) as (client, dialer),
    ):
        await listener.wait_for(lambda: "established" in listener.calls)
        (conn_id,) = listener.conn_ids
        dealer = client._dealer
        assert dealer is not None

        def has_come() -> bool:
            events = dealer.get(zmq.EVENTS)
            assert isinstance(events, int)
            return bool(events & zmq.POLLIN)

        def end() -> None:
            server.drop(conn_id, "that is all")
            hold_until(has_come)
            client._lost()

        # It has come, and the loop has not been told: its descriptor's edge is used
        # up. The next word of this side has it look again, in its next turn.
        word = wire.Announced(conn_id=conn_id, generation=5, complete=True)
        assert server.send_request(conn_id, word)
        hold_until(has_come)
        assert client.send_request(make.requests_from_initiator()[2])
        asyncio.get_running_loop().call_later(0, end)
        await dialer.wait_for(lambda: "closed" in dialer.calls)
        assert [call for call in dialer.calls if call != "accept"] == [
            "request",
            "closed",
        ]
