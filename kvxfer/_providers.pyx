# cython: language_level=3, embedsignature=True
"""Where verbs come from: one table of functions for each provider.

The software device's C is linked into this module and into no other: its state is
there once. The others reach it by the table, as they reach libibverbs.
"""

import sys

from libc.errno cimport errno
from libc.stdint cimport uint64_t
from libc.string cimport memset

from kvxfer._ibverbs cimport *
from kvxfer._softdev cimport (
    kvx_get_soft_counts,
    kvx_soft_counts,
    kvx_soft_take_violations,
)

from kvxfer._handles import open_handles
from kvxfer.errors import DeviceUnavailableError, UsageError, verbs_error
from kvxfer.verbs_types import DeviceInfo

cdef kvx_verbs_table _soft_table
cdef kvx_verbs_table _null_table
cdef kvx_verbs_table _ibverbs_table
kvx_load_softdev(&_soft_table)
kvx_load_nulldev(&_null_table)

_ibverbs_path = False     # what the last was filled from; False: not yet


cdef kvx_verbs_table *table_of(str provider, str path) except NULL:
    """Return the table of a provider, loading libibverbs at the first need."""
    global _ibverbs_path
    cdef:
        char message[256]
        bytes encoded
        const char *c_path = NULL
        int err

    if provider == "soft":
        return &_soft_table
    if provider == "null":
        return &_null_table
    if provider != "libibverbs":
        raise UsageError(
            f"provider {provider!r} is none of 'soft', 'null' and 'libibverbs'")
    if _ibverbs_path is not False:
        if path is not None and path != _ibverbs_path:
            raise UsageError(
                f"libibverbs was loaded from {_ibverbs_path or 'libibverbs.so.1'}; "
                f"a process cannot load {path} as well"
            )
        return &_ibverbs_table
    if path is not None:
        encoded = path.encode()
        c_path = encoded
    with nogil:
        err = kvx_load_libibverbs(c_path, &_ibverbs_table, message, sizeof(message))
    if err:
        raise DeviceUnavailableError(
            f"cannot load libibverbs: {message.decode(errors='replace')}; install "
            "rdma-core (Debian: libibverbs1 ibverbs-providers, RHEL: libibverbs) "
            "or use the software device"
        )
    _ibverbs_path = path
    return &_ibverbs_table


def list_devices(provider, *, path=None):
    """List the devices of a provider: ``"soft"``, ``"null"`` or ``"libibverbs"``.

    Raises:
      DeviceUnavailableError: libibverbs or its kernel part cannot be used.
    """
    cdef:
        kvx_verbs_table *table = table_of(provider, path)
        ibv_device **devices
        int n = 0
        int i
        int err = 0

    with nogil:
        devices = table.get_device_list(&n)
        if devices is NULL:
            err = errno
    if devices is NULL:
        raise DeviceUnavailableError(
            f"no RDMA devices can be listed: {verbs_error(err, 'ibv_get_device_list')}"
        )
    try:
        return [
            DeviceInfo(
                table.get_device_name(devices[i]).decode(),
                provider,
                int.from_bytes(
                    (<uint64_t>table.get_device_guid(devices[i])).to_bytes(
                        8, sys.byteorder),
                    "big",
                ),
            )
            for i in range(n)
        ]
    finally:
        table.free_device_list(devices)


def live_objects():
    """Return how many native objects of each kind are alive in this process.

    Handles that Python owns are counted under their class name, objects and
    threads of the software device as ``soft.<kind>``.
    """
    cdef kvx_soft_counts counts
    memset(&counts, 0, sizeof(counts))
    kvx_get_soft_counts(&counts)
    result = open_handles()
    soft = {
        "contexts": counts.contexts,
        "pds": counts.pds,
        "mrs": counts.mrs,
        "cqs": counts.cqs,
        "channels": counts.channels,
        "qps": counts.qps,
        "connections": counts.connections,
        "threads": counts.threads,
    }
    result.update({f"soft.{name}": number for name, number in soft.items() if number})
    return result


def take_violations():
    """Return what strict mode of the software device has seen since the last call."""
    cdef char text[8192]
    kvx_soft_take_violations(text, sizeof(text))
    return text.decode().splitlines()
