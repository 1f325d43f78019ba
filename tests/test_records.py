"""What a notify record may say: the compiled reader against one written to be read."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvxfer._records import RecordReader, max_ids
from kvxfer.errors import ProtocolError
from kvxfer.layout import Group, Plane, PlaneLayer
from kvxfer.sharding import Shard

# Of native/notify.h: magic, length, sequence, n_bytes, layer, n_ids, group, n_qps,
# request_bytes, flags, digest, generation, total.
HEADER = struct.Struct("<IIQQIIHHHHQQQ")
MAGIC = 0x314E564B


def group(name: str, layers: list[int], n_blocks: int, sizes: list[int]) -> Group:
    """Make a group of planes with so many bytes a block."""
    planes = []
    for i, size in enumerate(sizes):
        place = PlaneLayer(1 << 20, n_blocks, size, size, "u8")
        planes.append(Plane(f"p{i}", dict.fromkeys(layers, place)))
    return Group(name, tuple(planes))


GROUPS = (group("full", [0, 2], 96, [64, 64]), group("window", [1], 8, [32]))


def record(
    ids: list[int],
    layer: int = 0,
    group_index: int = 0,
    request: bytes = b"",
    n_bytes: int | None = None,
    **fields: int,
) -> bytes:
    """Make a record; by default its bytes are those of its blocks."""
    padded = request + bytes(-len(request) % 8)
    tail = padded + struct.pack(f"<{len(ids)}I", *ids)
    if n_bytes is None:
        n_bytes = len(ids) * (32 if group_index == 1 else 128)
    return (
        HEADER.pack(
            MAGIC,
            fields.get("length", HEADER.size + len(tail)),
            fields.get("sequence", 7),
            n_bytes,
            layer,
            fields.get("n_ids", len(ids)),
            group_index,
            1,
            fields.get("request_bytes", len(request)),
            0,
            fields.get("digest", 0),
            fields.get("generation", 0),
            fields.get("total", 0),
        )
        + tail
    )


def plainly(data: bytes) -> tuple[Any, ...] | None:
    """Read a record as its layout says; None if it is to be refused."""
    if len(data) < HEADER.size:
        return None
    header = HEADER.unpack_from(data)
    _, length, sequence, n_bytes, layer, n_ids, place, _, n_request = header[:9]
    begin = HEADER.size + -(-n_request // 8) * 8
    if length != len(data) or begin + 4 * n_ids != length or n_ids == 0:
        return None
    if place >= len(GROUPS) or layer not in GROUPS[place].layers:
        return None
    rows = [plane for _, plane in GROUPS[place].rows(layer)]
    ids = struct.unpack_from(f"<{n_ids}I", data, begin)
    if max(ids) >= min(row.n_blocks for row in rows):
        return None
    if n_bytes != n_ids * sum(row.block_bytes for row in rows):
        return None
    try:
        request = data[HEADER.size : HEADER.size + n_request].decode()
    except UnicodeDecodeError:
        return None
    name = GROUPS[place].name
    return (name, layer, list(ids), request or None, n_bytes, sequence, *header[-3:])


def check(reader: RecordReader, data: bytes) -> None:
    """Read a record both ways."""
    expected = plainly(data)
    if expected is None:
        with pytest.raises(ProtocolError):
            reader.read(data)
        return
    found = reader.read(data)
    assert (
        found.group,
        found.layer,
        found.block_ids.tolist(),
        found.request_id,
        found.n_bytes,
        found.sequence,
        found.digest,
        found.generation,
        found.total,
    ) == expected
    assert found.block_ids.dtype == "int64"
    found.block_ids.sort()  # the receiver's own


def test_a_record_is_read() -> None:
    reader = RecordReader(GROUPS)
    full = {"digest": 2**64 - 1, "generation": 2**63, "total": 3, "sequence": 2**40}
    data = record([95, 0, 95], 2, request="é-1".encode(), **full)
    for _ in range(2):  # the second time its place is known
        check(reader, data)
    found = reader.read(data)
    assert (found.group, found.layer, found.request_id) == ("full", 2, "é-1")
    assert (found.digest, found.generation, found.total) == (2**64 - 1, 2**63, 3)
    assert reader.read(record([7], 1, 1)).group == "window"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "record of 0 bytes"),
        (record([1])[:63], "record of 63 bytes"),
        (record([1]) + bytes(4), "sizes in a notify record disagree"),
        (record([1])[:-4], "sizes in a notify record disagree"),
        (record([1], n_ids=2), "sizes in a notify record disagree"),
        (record([1], n_ids=2**32 - 1), "sizes in a notify record disagree"),
        (record([1, 2], request_bytes=1), "sizes in a notify record disagree"),
        (record([1], layer=1), "group 0, layer 1, which are not here"),
        (record([1], layer=2**32 - 1), "layer 4294967295, which are not here"),
        (record([1], group_index=2), "group 2, layer 0, which are not here"),
        (record([]), r"not in \[0, 96\)"),
        (record([1, 96]), r"not in \[0, 96\)"),
        (record([2**32 - 1]), r"not in \[0, 96\)"),
        (record([8], 1, 1), r"not in \[0, 8\)"),
        (record([1], n_bytes=129), "claims 129 bytes in 1 blocks"),
        (record([1], n_bytes=2**64 - 1), "claims 18446744073709551615 bytes"),
        (record([1], request=b"\xff"), "is not UTF-8"),
    ],
    ids=lambda value: str(len(value)),
)
def test_what_breaks_a_rule_is_refused(data: bytes, words: str) -> None:
    reader = RecordReader(GROUPS)
    with pytest.raises(ProtocolError, match=words):
        reader.read(data)
    check(reader, data)
    check(reader, record([1, 2]))  # and the next is read


@given(
    st.lists(st.integers(0, 100), max_size=20),
    st.integers(0, 3),
    st.integers(0, 2),
    st.binary(max_size=20),
    st.integers(-2, 2),
    st.dictionaries(
        st.sampled_from(["length", "n_ids", "request_bytes"]), st.integers(0, 300)
    ),
    st.integers(0, 200),
)
def test_any_record_is_read_or_refused(
    ids: list[int],
    layer: int,
    group_index: int,
    request: bytes,
    more: int,
    lies: dict[str, int],
    cut: int,
) -> None:
    n_bytes = max(0, len(ids) * (32 if group_index == 1 else 128) + more // 2)
    data = record(ids, layer, group_index, request, n_bytes, **lies)
    reader = RecordReader(GROUPS)
    check(reader, data)
    check(reader, data[:cut])


def test_shards_are_what_a_writer_of_parts_writes() -> None:
    shards = (Shard("p1", 0, 16, 8, 8, 64, "full"),)
    reader = RecordReader(GROUPS, shards)
    assert reader.read(record([3], n_bytes=8)).n_bytes == 8
    with pytest.raises(ProtocolError, match="claims 128 bytes"):
        reader.read(record([3]))
    # Of the other group it may write nothing.
    with pytest.raises(ProtocolError, match=r"not in \[0, 0\)"):
        reader.read(record([3], 1, 1, n_bytes=0))


@pytest.mark.parametrize("request_bytes", [0, 1, 8, 255, 256])
def test_as_many_ids_as_a_record_holds(request_bytes: int) -> None:
    limit = max_ids(1 << 16, request_bytes)
    longest = (1 << 16) // 4
    padded = -(-request_bytes // 8) * 8
    assert HEADER.size + padded + 4 * limit <= longest
    assert HEADER.size + padded + 4 * (limit + 1) > longest
    assert max_ids(64, request_bytes) == 0
