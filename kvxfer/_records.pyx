# cython: language_level=3, embedsignature=True, cdivision=True
"""The records that announce what has landed: decoding and checking.

The layout is ``native/notify.h``. The engine has checked a record's place, length and
sequence; what it says is checked here, before anyone acts on it. Compiled since it is
done for each write that a peer makes.
"""

from cpython.buffer cimport (
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy

from kvxfer._core cimport (
    kvx_notify_length,
    kvx_notify_limit,
    kvx_notify_record,
)

import numpy as np

from kvxfer.errors import LayoutError, ProtocolError
from kvxfer.notify import Record

cdef object _empty = np.empty
cdef object _INT64 = np.dtype(np.int64)


def max_ids(uint64_t ring_bytes, uint64_t request_bytes):
    """Return how many block ids a record holds that a ring of this length takes."""
    return max(0, <int64_t>(
        kvx_notify_limit(ring_bytes) - kvx_notify_length(request_bytes, 0)) // 4)


cdef class _Place:
    """What records about one layer of one group are checked against."""

    cdef:
        str group
        uint64_t limit          # block ids in every plane that is written
        uint64_t block_bytes    # written for one block


cdef class RecordReader:
    """Decodes the records of one peer and checks them against the cache here.

    Args:
      groups: Of the cache, in the order that both sides have agreed on.
      shards: The parts of blocks that this peer writes; none: whole blocks.
    """

    cdef:
        tuple _groups
        tuple _shards
        dict _places    # by layer and group in one number

    def __init__(self, tuple groups, tuple shards=()):
        self._groups = groups
        self._shards = shards
        self._places = {}

    def read(self, bytes record not None):
        """Decode a record.

        Raises:
          ProtocolError: It names a group, layer or block that is not there, or its
            sizes disagree.
        """
        cdef:
            const char *start = PyBytes_AS_STRING(record)
            uint64_t length = PyBytes_GET_SIZE(record)
            kvx_notify_record header
            _Place place
        if length < sizeof(header):
            raise ProtocolError(f"a notify record of {length} bytes")
        memcpy(&header, start, sizeof(header))
        if (header.length != length
                or kvx_notify_length(header.request_bytes, header.n_ids) != length):
            raise ProtocolError("the sizes in a notify record disagree")
        key = <uint64_t>header.layer << 16 | header.group
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = self._find(header.group, header.layer)
        ids = _take_ids(start + length - 4 * <uint64_t>header.n_ids, header.n_ids,
                        place.limit)
        if ids is None:
            raise ProtocolError(
                f"a notify record names blocks that are not in [0, {place.limit})"
            )
        if header.n_bytes != header.n_ids * place.block_bytes:
            raise ProtocolError(
                f"a notify record claims {header.n_bytes} bytes in {header.n_ids} "
                "blocks"
            )
        return Record(
            place.group,
            header.layer,
            ids,
            None if header.request_bytes == 0
            else _request_of(start + sizeof(header), header.request_bytes),
            header.n_bytes,
            header.sequence,
            header.generation,
            header.total,
            header.digest,
        )

    cdef _Place _find(self, uint32_t group_index, uint32_t layer):
        """Look up a place for the first time; the cache does not change."""
        cdef _Place found
        try:
            group = self._groups[group_index]
            rows = dict(group.rows(layer))
        except (IndexError, LayoutError):
            raise ProtocolError(
                f"a notify record names group {group_index}, layer {layer}, which are "
                "not here"
            ) from None
        parts = [s for s in self._shards if s.group == group.name and s.plane in rows]
        written = {s.plane for s in parts} if self._shards else set(rows)
        found = _Place.__new__(_Place)
        found.group = group.name
        found.limit = min([rows[plane].n_blocks for plane in written], default=0)
        if self._shards:
            found.block_bytes = sum([s.length for s in parts])
        else:
            found.block_bytes = sum([place.block_bytes for place in rows.values()])
        return found


cdef object _take_ids(const char *start, uint32_t n, uint64_t limit):
    """Make an array of the ids; None if there is none, or one is out of range."""
    cdef:
        Py_buffer view
        const uint32_t *ids = <const uint32_t *>start    # aligned: a header before
        int64_t *to
        uint32_t i
        uint32_t highest = 0
    if n == 0:
        return None
    result = _empty(n, _INT64)
    PyObject_GetBuffer(result, &view, PyBUF_WRITABLE)
    to = <int64_t *>view.buf
    for i in range(n):
        to[i] = ids[i]
        highest = max(highest, ids[i])
    PyBuffer_Release(&view)
    return result if highest < limit else None


cdef str _request_of(const char *start, uint32_t length):
    try:
        return start[:length].decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError("a request id in a notify record is not UTF-8") from None
