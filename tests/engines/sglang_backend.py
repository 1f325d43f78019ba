"""A transfer backend for SGLang's interface over :mod:`kvxfer.blocking`.

A prefill engine's address in the bootstrap server is where its client listens, and a
request's id is its bootstrap room. Chunks map themselves by the number of pages that
were sent before; pages of a prefix that the decode engine has are skipped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from kvxfer import KVCache, Request, RequestState, Ticket, TicketState, blocking
from kvxfer.errors import KVXferError
from tests.engines.sglang_interface import (
    BaseKVManager,
    BaseKVReceiver,
    BaseKVSender,
    KVArgs,
    KVPoll,
    Mode,
)

__all__ = ["Bootstrap", "KvxferManager", "KvxferReceiver", "KvxferSender"]

#: Stands in for the bootstrap server: the prefill engines' addresses, by their ranks.
Bootstrap = dict[int, str]


class KvxferManager(BaseKVManager):
    """A client or a server over an engine's buffers."""

    def __init__(
        self, args: KVArgs, mode: Mode, server_args: Mapping[str, Any]
    ) -> None:
        self.args = args
        self.bootstrap: Bootstrap = server_args["bootstrap"]
        self.cache = _cache_of(args)
        self._rank = int(server_args.get("rank", 0))
        options = server_args["options"]
        self.client: blocking.Client | None = None
        self.server: blocking.Server | None = None
        if mode is Mode.PREFILL:
            self.client = blocking.Client(self.cache, **options)
            self.client.open()
        else:
            self.server = blocking.Server(self.cache, **options)
            self.server.open()

    def register_to_bootstrap(self) -> None:
        if self.client is not None:
            assert self.client.listening is not None
            self.bootstrap[self._rank] = self.client.listening

    def aux(self, index: int) -> list[ctypes.Array[ctypes.c_char]]:
        """The auxiliary items of a request, where they lie."""
        return [
            (ctypes.c_char * size).from_address(address + index * size)
            for address, size in zip(
                self.args.aux_data_ptrs, self.args.aux_item_lens, strict=True
            )
        ]

    def close(self) -> None:
        for endpoint in (self.client, self.server):
            if endpoint is not None:
                endpoint.close()
        self.cache.close()


def _cache_of(args: KVArgs) -> KVCache:
    n_layers = len(args.kv_data_ptrs) // 2
    (page_bytes,) = set(args.kv_item_lens)
    return KVCache.from_pointers(
        {
            "k": dict(enumerate(args.kv_data_ptrs[:n_layers])),
            "v": dict(enumerate(args.kv_data_ptrs[n_layers:])),
        },
        n_blocks=min(args.kv_data_lens) // page_bytes,
        block_bytes={"k": page_bytes, "v": page_bytes},
    )


class KvxferSender(BaseKVSender):
    """A request that is written."""

    def __init__(self, mgr: KvxferManager, bootstrap_room: int) -> None:
        assert mgr.client is not None
        self._mgr = mgr
        self._request: Request = mgr.client.open(str(bootstrap_room))
        self._n_pages = -1
        self._n_sent = 0
        self._aux_index = 0

    def init(self, num_kv_indices: int, aux_index: int) -> None:
        self._n_pages = num_kv_indices
        self._aux_index = aux_index

    def send(self, kv_indices: Sequence[int]) -> None:
        is_last = self._n_sent + len(kv_indices) == self._n_pages
        self._request.ready(
            None, kv_indices, first_block=self._n_sent, final=is_last, group="main"
        )
        self._n_sent += len(kv_indices)
        if is_last:
            self._request.finish(
                b"".join(x.raw for x in self._mgr.aux(self._aux_index))
            )

    def poll(self) -> KVPoll:
        state = self._request.state
        if state is RequestState.DONE:
            return KVPoll.SUCCESS
        if state in (RequestState.FAILED, RequestState.ABORTED):
            return KVPoll.FAILED
        if state is RequestState.OPEN:
            return KVPoll.BOOTSTRAPPING
        if self._n_sent < self._n_pages and state is RequestState.STREAMING:
            return KVPoll.WAITING_FOR_INPUT
        return KVPoll.TRANSFERRING  # also while it ends badly: pages are in use

    def get_transfer_metric(self) -> dict[str, float]:
        metrics = self._request.metrics
        return {"bytes": float(metrics.bytes), "seconds": metrics.seconds}

    def failure_exception(self) -> None:
        _raise(self._request.error)

    def abort(self) -> None:
        self._request.abort("given up by the prefill engine")

    def clear(self) -> None:
        self._request.abort()


class KvxferReceiver(BaseKVReceiver):
    """A request that is written to."""

    def __init__(
        self, mgr: KvxferManager, bootstrap_addr: str, bootstrap_room: int
    ) -> None:
        self._mgr = mgr
        self._room = str(bootstrap_room)
        self._remote = ""
        self._ticket: Ticket | None = None
        self._aux_index = 0
        self._aux_taken = False

    def init(self, prefill_dp_rank: int) -> None:
        self._remote = self._mgr.bootstrap[prefill_dp_rank]

    def send_metadata(
        self, kv_indices: Sequence[int], aux_index: int, decode_prefix_len: int
    ) -> None:
        assert self._mgr.server is not None
        self._aux_index = aux_index
        self._ticket = self._mgr.server.offer(
            self._remote,
            self._room,
            {"main": kv_indices},
            first_block=decode_prefix_len // self._mgr.args.page_size,
        )

    def poll(self) -> KVPoll:
        if self._ticket is None:
            return KVPoll.WAITING_FOR_INPUT if self._remote else KVPoll.BOOTSTRAPPING
        state = self._ticket.state
        if state is TicketState.DONE:
            self._take_aux()
            return KVPoll.SUCCESS
        if state in (TicketState.FAILED, TicketState.ABORTED):
            return KVPoll.FAILED
        return KVPoll.TRANSFERRING  # also while it ends badly: bytes may land

    @property
    def n_bytes(self) -> int:
        """How much has come."""
        return self._ticket.bytes_done if self._ticket is not None else 0

    def _take_aux(self) -> None:
        if self._aux_taken:
            return
        assert self._ticket is not None
        aux, at = self._ticket.aux, 0
        for item in self._mgr.aux(self._aux_index):
            item.raw = aux[at : at + len(item)]
            at += len(item)
        self._aux_taken = True

    def failure_exception(self) -> None:
        _raise(self._ticket.error if self._ticket is not None else None)

    def abort(self) -> None:
        if self._ticket is not None:
            self._ticket.abort("given up by the decode engine")

    def clear(self) -> None:
        self.abort()


def _raise(error: KVXferError | None) -> None:
    raise error if error is not None else RuntimeError("it has not failed")
