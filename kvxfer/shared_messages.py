"""What a sidecar and the processes attached to it say to each other: frames, messages.

A frame is four bytes of length, most significant first, and a message in msgpack. With
the first four bytes of a connection come the descriptors of the cache's memory. Both
ends are of one release: they are processes of one host, started together.
"""

from __future__ import annotations

import re
import struct
from typing import TypeVar

import msgspec

from kvxfer.errors import ProtocolError, UsageError

__all__ = [
    "MAX_FILES",
    "MAX_FRAME",
    "VERSION",
    "Abort",
    "Answer",
    "Command",
    "GaveUp",
    "GroupInfo",
    "Landed",
    "Layout",
    "News",
    "Offer",
    "PlaceInfo",
    "TicketNews",
    "decode",
    "encode",
    "length_of",
    "socket_path",
]

VERSION = 1
MAX_FRAME = 64 << 20
#: As many descriptors as one message takes along.
MAX_FILES = 253

_LENGTH = struct.Struct(">I")
_T = TypeVar("_T")


def socket_path(text: str) -> str:
    """Return the path of ``unix:PATH`` or ``PATH``.

    Raises:
      UsageError: There is none in it.
    """
    path = text.removeprefix("unix:")
    # "tcp:..." would be a file's name, and nobody means that by it.
    if not path or "\0" in path or re.match(r"[A-Za-z]+:", path):
        raise UsageError(f"{text!r} is no path of a Unix socket: write unix:PATH")
    return path


class PlaceInfo(msgspec.Struct, frozen=True, array_like=True):
    """One layer of one plane: where in which file, and its blocks."""

    plane: str
    layer: int
    file: int
    offset: int
    n_blocks: int
    block_bytes: int
    block_stride: int
    dtype: str


class GroupInfo(msgspec.Struct, frozen=True, array_like=True):
    """A group of the cache."""

    name: str
    places: list[PlaceInfo]


class Layout(msgspec.Struct, frozen=True, tag="layout"):
    """The first message: what the memory is that came with it."""

    version: int
    sizes: list[int]
    """Bytes of each file, from its beginning."""
    groups: list[GroupInfo]


class Landed(msgspec.Struct, frozen=True, tag="landed"):
    """Blocks of one layer that are in place."""

    peer: str
    request_id: str | None
    layer: int
    block_ids: list[int]
    group: str
    bytes: int


class GaveUp(msgspec.Struct, frozen=True, tag="gave_up"):
    """A writer will not bring these layers."""

    peer: str
    request_id: str | None
    layers: list[int]
    reason: str


class TicketNews(msgspec.Struct, frozen=True, tag="ticket"):
    """How far an offered request is."""

    request_id: str
    state: str
    layers_done: list[int]
    error: str
    aux: bytes


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """A command has been carried out, or why not."""

    number: int
    error: str


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    """Offer blocks for a request, as ``Server.offer`` does."""

    number: int
    request_id: str
    peers: list[str]
    blocks: dict[str, list[int]]
    first_block: int
    sources: int | None
    lease: float | None
    checksum: bool


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Give an offered request up; answered when no byte of it can land."""

    number: int
    request_id: str
    reason: str


News = Layout | Landed | GaveUp | TicketNews | Answer
Command = Offer | Abort

_encoder = msgspec.msgpack.Encoder()
_decoders: dict[object, msgspec.msgpack.Decoder[object]] = {
    kind: msgspec.msgpack.Decoder(kind) for kind in (News, Command)
}


def encode(message: News | Command) -> bytes:
    """Make a frame."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def length_of(head: bytes) -> int:
    """Return how long the message is that follows these four bytes.

    Raises:
      ProtocolError: Longer than any may be.
    """
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME:
        raise ProtocolError(f"a message of {length} bytes, at most {MAX_FRAME}")
    return int(length)


def decode(body: bytes, of: object) -> object:
    """Decode a message of the kind ``News`` or ``Command``.

    Raises:
      ProtocolError: It is none.
    """
    try:
        return _decoders[of].decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProtocolError(f"not a message of a shared cache: {error}") from error
