"""RDMACommunicator: the class that FastDeploy's prefill and decode nodes make."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from typing import Any

from kvxfer import cuda
from kvxfer.blocking import Client, Peer
from kvxfer.cache import KVCache
from kvxfer.errors import (
    DeviceUnavailableError,
    GeometryMismatchError,
    KVXferError,
)
from kvxfer.fastdeploy.arguments import Arguments, bind
from kvxfer.fastdeploy.listener import Listener, listen
from kvxfer.fastdeploy.settings import Settings
from kvxfer.fastdeploy.status import CONNECTED, ERROR, INVALID, ConnectStatus
from kvxfer.sharding import Shard

__all__ = ["RDMACommunicator"]

_log = logging.getLogger("kvxfer.fastdeploy")

_NOT_ASKED = (
    "this process uses CUDA, and without the package cuda-bindings nobody can say "
    "whether the cache is on a GPU: it is taken for host memory. On a GPU that means: "
    "no dma-buf, so nvidia-peermem has to be loaded; no flush by itself, so "
    "KVCACHE_GDRCOPY_FLUSH_ENABLE has to be set where the GPU needs it; and the "
    "software device fails at the first connect instead of refusing it here. Remedy: "
    "pip install 'kvxfer[cuda]'"
)


class RDMACommunicator:
    """The KV cache of one GPU, to be written from (prefill) or into (decode).

    The arguments are FastDeploy's, by position or by name, in the order of any of its
    releases: splitwise_role, gpu_idx, port, key_cache_ptrs, value_cache_ptrs,
    block_number, block_bytes, key_scale_ptrs, value_scale_ptrs, scale_block_bytes,
    prefill_tp_size, prefill_tp_idx; also prefill_tp_size and prefill_tp_idx in the
    eighth and ninth place. The environment is read here.

    With the role ``"decode"`` it listens on ``port`` when the constructor returns,
    until :meth:`close`, or until it is collected or the interpreter exits. All methods
    may be called from any thread; they block, and do not hold the GIL meanwhile.

    Raises:
      TypeError: The arguments are not of the kinds that they should be.
      RuntimeError: No layers, lists of different lengths, a null pointer, a size that
        is not positive, a variable of the environment with a value that cannot be, a
        NIC that is not there, a port that is taken. The original logs the last four
        and goes on, or crashes.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._arguments = bind(args, kwargs)
        # With the shards that were asked for, by address and port.
        self._peers: dict[tuple[str, int], tuple[Peer, tuple[Shard, ...]]] = {}
        try:
            self._settings = Settings.read(self._arguments.gpu_idx)
            self._ends = _Ends(_cache(self._arguments), self._settings)
            if self._arguments.role == "decode":
                self._ends.listen(self._port(self._arguments.port))
        except (KVXferError, OSError, ValueError) as error:
            raise RuntimeError(f"RDMACommunicator: {error}") from error
        finalizer = weakref.finalize(self, _Ends.close_in_background, self._ends)
        finalizer.atexit = False

    def connect(
        self, dst_ip: str, dst_port: str | int, dst_tp_size: int = 0
    ) -> ConnectStatus:
        """Connect to a decode node; returns at once if this is connected.

        Args:
          dst_ip: Its address or name, IPv4 or IPv6.
          dst_port: Its port.
          dst_tp_size: Its number of tensor-parallel ranks; 0: as many as here.

        Returns:
          0 once connected, which is the only code that is true; 2 if that failed, and
          the log has the reason; 4 if an argument cannot be. Never raises.
        """
        try:
            target = self._target(dst_ip, dst_port)
            shards = self._shards(dst_tp_size)
        except (TypeError, ValueError) as error:
            _log.error("connect to %r port %r: %s", dst_ip, dst_port, error)
            return INVALID
        found = self._peers.get(target)
        if found is not None and found[0].connected and found[1] == shards:
            return CONNECTED
        try:
            self._peers[target] = (self._dial(target, shards), shards)
        except Exception as error:  # noqa: BLE001 - callers test the code
            _log.error("connect to %s port %d: %s", *target, error)
            return ERROR
        return CONNECTED

    def is_connected(self, dst_ip: str, dst_port: str | int) -> bool:
        """Say whether a decode node can be written to, as far as is known here.

        False once a write has failed, the node is gone, or it has been silent for the
        option ``ping_timeout``; ``connect`` then makes a new connection.
        """
        try:
            found = self._peers.get(self._target(dst_ip, dst_port))
        except (TypeError, ValueError):
            return False
        return found is not None and found[0].connected

    def write_cache(
        self,
        dst_ip: str | None = None,
        dst_port: str | int | None = None,
        local_block_ids: object = None,
        remote_block_ids: object = None,
        layer_idx: int | None = None,
        *,
        ip: str | None = None,
        port: str | int | None = None,
    ) -> int:
        """Write blocks of one layer, all its planes, and wait until they are there.

        Args:
          dst_ip: As it was given to ``connect``; also called ``ip``.
          dst_port: Likewise; also called ``port``.
          local_block_ids: Blocks to read: a list, an array, any buffer of integers.
          remote_block_ids: Blocks to write, as many, no two the same.
          layer_idx: The layer, from 0.

        Returns:
          0 when every byte is in the node's blocks, or there are none to write; -1
          otherwise, and the log has the reason. Never raises.
        """
        dst_ip = ip if dst_ip is None else dst_ip
        dst_port = port if dst_port is None else dst_port
        try:
            return self._write(
                dst_ip, dst_port, local_block_ids, remote_block_ids, layer_idx
            )
        except Exception as error:  # noqa: BLE001 - callers test the code
            where = (layer_idx, dst_ip, dst_port)
            _log.error("write of layer %r to %r port %r: %s", *where, error)
            return -1

    def _write(
        self,
        dst_ip: str | None,
        dst_port: str | int | None,
        local_ids: Any,
        remote_ids: Any,
        layer_idx: int | None,
    ) -> int:
        for name, ids in (
            ("local_block_ids", local_ids),
            ("remote_block_ids", remote_ids),
        ):
            if not hasattr(ids, "__len__"):
                kind = type(ids).__name__
                raise TypeError(f"{name} is a {kind}, not a list or an array")
        if len(local_ids) == 0 and len(remote_ids) == 0:
            return 0
        if layer_idx is None:
            raise ValueError("layer_idx is missing")
        found = self._peers.get(self._target(dst_ip, dst_port))
        if found is None:
            raise ValueError("not connected")
        self._ends.client().write_cache(found[0], local_ids, remote_ids, layer_idx)
        return 0

    def close(self) -> None:
        """Close the connections and stop to listen. Twice is fine.

        The original has no such method, and nothing has to call it.
        """
        self._ends.close()

    # -- what the arguments mean -----------------------------------------------------

    def _target(self, host: object, port: object) -> tuple[str, int]:
        if not isinstance(host, str) or not host.strip("[] "):
            raise ValueError(f"{host!r} is no address")
        return host.strip("[] "), self._port(port)

    def _port(self, port: object) -> int:
        # One variable for both ends, as in the original.
        text = str(self._settings.port or port).strip()
        if not text.isascii() or not text.isdecimal() or int(text) > 0xFFFF:
            raise ValueError(f"{text!r} is no port")
        return int(text)

    def _shards(self, dst_tp_size: object) -> tuple[Shard, ...]:
        """Say which part of each block is this rank's; none where all of it is."""
        own = self._arguments
        size, index = own.prefill_tp_size, own.prefill_tp_idx
        if not hasattr(dst_tp_size, "__index__") or int(dst_tp_size) < 0:
            raise ValueError(f"dst_tp_size is {dst_tp_size!r}")
        if dst_tp_size in (0, size):
            return ()
        if not 0 <= index < size:
            raise ValueError(f"prefill_tp_idx is {index} of {size}")
        return tuple(
            Shard(name, 0, length * index, length, length, length * size)
            for name, length in own.sizes.items()
        )

    def _dial(self, target: tuple[str, int], shards: tuple[Shard, ...]) -> Peer:
        client = self._ends.client()
        if shards and self._arguments.is_key_only:
            # A latent is the same on all ranks, and so are the sizes of its blocks.
            try:
                return client.connect(*target)
            except GeometryMismatchError as error:
                _log.debug("not a latent that all ranks hold: %s", error)
        return client.connect(*target, shards=shards)


def _cache(arguments: Arguments) -> KVCache:
    return KVCache.from_pointers(
        arguments.planes,
        n_blocks=arguments.block_number,
        block_bytes=arguments.sizes,
        host_memory=not _on_gpu(arguments),
    )


def _on_gpu(arguments: Arguments) -> bool:
    """Ask CUDA, where there is one, about the addresses.

    Others, of Kunlun XPUs for one, are registered as they are.
    """
    try:
        driver = cuda.load()
    except DeviceUnavailableError as error:
        if isinstance(error.__cause__, ImportError) and cuda.driver_is_mapped():
            _log.warning(_NOT_ASKED)
        else:
            _log.debug("not asked whether the cache is on a GPU: %s", error)
        return False
    pointers = [at for of in arguments.planes.values() for at in of]
    return any(driver.gpu_of(at) is not None for at in pointers)


class _Ends:
    """What a communicator has open; outlives it for the time of the close."""

    def __init__(self, cache: KVCache, settings: Settings) -> None:
        self._cache = cache
        self._settings = settings
        self._lock = threading.Lock()
        self._listener: Listener | None = None
        self._client: Client | None = None
        self._closed = False
        self._pid = os.getpid()

    def listen(self, port: int) -> None:
        """Listen, or take part in what listens there for the same memory."""
        self._listener = listen(self._cache, self._settings, port)
        self._cache = self._listener.cache

    def client(self) -> Client:
        """Give the client, opened with the first call.

        Raises:
          KVXferError: It cannot be opened; the next call tries again.
        """
        client = self._client
        if client is not None:
            return client
        with self._lock:
            if self._closed:
                raise RuntimeError("the communicator is closed")
            if self._client is None:
                client = Client(self._cache, self._settings.options)
                client.open()
                self._client = client
            return self._client

    def close(self) -> None:
        """Close what is open. Twice is fine."""
        with self._lock:
            again, self._closed = self._closed, True
        try:
            if self._client is not None:
                self._client.close()
        finally:
            if not again and self._listener is not None:
                self._listener.release()
        if self._listener is None:
            self._cache.close()

    def close_in_background(self) -> None:
        """Close without waiting: garbage is collected in any thread."""
        if self._pid == os.getpid() and (self._client or self._listener):
            threading.Thread(target=self.close, name="kvxfer-close").start()
