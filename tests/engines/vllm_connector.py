"""A connector for vLLM's interface over :mod:`kvxfer.blocking`, layer by layer.

The prefill engine has a client that listens, the decode engine a server. A request's
``kv_transfer_params`` say which side this is: ``do_remote_decode`` at the prefill
engine; ``do_remote_prefill`` and ``remote``, where the client listens, at the decode
engine. The id must be the same on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvxfer import KVCache, RequestState, TicketState, blocking
from kvxfer import Request as Sending
from kvxfer import Ticket as Receiving
from tests.engines.vllm_interface import (
    ConnectorMetadata,
    KVConnectorBase,
    Request,
    Role,
    SchedulerOutput,
)

__all__ = ["KvxferConnector"]

PREEMPTED = "preempted by the prefill engine"


@dataclass(frozen=True)
class Load:
    """Blocks to be offered: those of a request from a position on."""

    request_id: str
    remote: str
    first_block: int
    block_ids: list[int]


@dataclass(frozen=True)
class Save:
    """Blocks that a step computes something of."""

    request_id: str
    first_block: int
    block_ids: list[int]
    is_last: bool


class KvxferConnector(KVConnectorBase):
    """One of the two halves of one engine."""

    def __init__(self, config: Mapping[str, Any], role: Role) -> None:
        super().__init__(config, role)
        self._block_tokens = int(config["block_tokens"])
        self._options: Mapping[str, Any] = config["options"]
        # Scheduler.
        self._loads: list[Load] = []
        self._computed: dict[str, int] = {}
        # Worker.
        self._client: blocking.Client | None = None
        self._server: blocking.Server | None = None
        self._sending: dict[str, Sending] = {}
        self._receiving: dict[str, Receiving] = {}
        self._loading: dict[str, Load] = {}
        self._failed_blocks: set[int] = set()
        self.n_bytes_sent: dict[str, int] = {}
        self.failed: set[str] = set()
        """Requests that were not sent to their end."""

    # -- scheduler -----------------------------------------------------------------

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int, bool]:
        if not request.kv_transfer_params.get("do_remote_prefill"):
            return 0, False
        # What the engine has computed before is a whole number of blocks.
        self._computed[request.request_id] = num_computed_tokens
        return request.n_prompt_tokens - num_computed_tokens, True

    def update_state_after_alloc(
        self, request: Request, block_ids: list[int], num_external_tokens: int
    ) -> None:
        if not num_external_tokens:
            return
        first = self._computed.pop(request.request_id) // self._block_tokens
        remote = str(request.kv_transfer_params["remote"])
        self._loads.append(Load(request.request_id, remote, first, block_ids[first:]))

    def build_connector_meta(self, output: SchedulerOutput) -> ConnectorMetadata:
        saves = []
        for step in output.scheduled:
            if not step.request.kv_transfer_params.get("do_remote_decode"):
                continue
            stop = step.n_computed + step.n_tokens
            first_block = step.n_computed // self._block_tokens
            # The last one may be partly filled: it goes out again with the next step.
            stop_block = -(-stop // self._block_tokens)
            saves.append(
                Save(
                    step.request.request_id,
                    first_block,
                    list(step.block_ids[first_block:stop_block]),
                    stop == step.request.n_prompt_tokens,
                )
            )
        loads, self._loads = self._loads, []
        return ConnectorMetadata({"loads": list(loads), "saves": list(saves)})

    def request_finished(self, request: Request, block_ids: list[int]) -> bool:
        # Until get_finished() names it, the device may read or write the blocks.
        return bool(
            request.kv_transfer_params.get("do_remote_decode")
            or request.kv_transfer_params.get("do_remote_prefill")
        )

    # -- worker --------------------------------------------------------------------

    def register_kv_caches(self, caches: KVCache) -> None:
        if self.config["prefill"]:
            self._client = blocking.Client(caches, **self._options)
            self._client.open()
        else:
            self._server = blocking.Server(caches, **self._options)
            self._server.open()

    @property
    def listening(self) -> str:
        """Where decode engines send their offers."""
        assert self._client is not None and self._client.listening is not None
        return self._client.listening

    def handle_preemptions(self, preempted: frozenset[str]) -> None:
        # Blocks must not change before a request is over: after a broken connection
        # even what was acknowledged is read again. So it ends here, with nothing in
        # flight, and begins anew in other blocks; the decode side offers again.
        for request_id in preempted & self._sending.keys():
            request = self._sending[request_id]
            request.abort(PREEMPTED)
            if PREEMPTED in str(request.error):
                del self._sending[request_id]
            # else the other side had given it up: get_finished() says so

    def start_load_kv(self) -> None:
        for load in self.metadata.items.get("loads", []):
            self._offer(load)

    def _offer(self, load: Load) -> None:
        assert self._server is not None
        self._loading[load.request_id] = load
        self._receiving[load.request_id] = self._server.offer(
            load.remote,
            load.request_id,
            {"main": load.block_ids},
            first_block=load.first_block,
        )

    def wait_for_layer_load(self, layer: int) -> None:
        """Nothing to do: a request is scheduled when all of it has been received."""

    def save_kv_layer(self, layer: int, event: Any) -> None:
        for save in self.metadata.items.get("saves", []):
            assert self._client is not None
            request = self._sending.get(save.request_id)
            if request is None:
                # A decode side may give up what is begun anew here: then the lease
                # alone tells, since its new life was never offered anything.
                request = self._client.open(
                    save.request_id, lease=self.config["patience"] / 2
                )
                self._sending[save.request_id] = request
            request.ready(
                layer,
                save.block_ids,
                first_block=save.first_block,
                final=save.is_last,
                event=event,
            )

    def wait_for_save(self) -> None:
        for save in self.metadata.items.get("saves", []):
            if save.is_last:
                self._sending[save.request_id].finish()

    def get_finished(self, finished: frozenset[str]) -> tuple[set[str], set[str]]:
        """See the base class. ``finished``: what the engine has given up, too."""
        for request_id in finished:
            ends = (self._sending.get(request_id), self._receiving.get(request_id))
            for end in ends:
                if end is not None:
                    end.abort("given up by the engine")
        sent, received = set(), set()
        for request in self._client.finished() if self._client else ():
            if self._sending.get(request.request_id) is request:
                del self._sending[request.request_id]
                sent.add(request.request_id)
                self.n_bytes_sent[request.request_id] = request.metrics.bytes
                if request.error is not None:
                    self.failed.add(request.request_id)
        for ticket in self._server.finished() if self._server else ():
            del self._receiving[ticket.request_id]
            load = self._loading.pop(ticket.request_id)
            if PREEMPTED in str(ticket.error) and ticket.request_id not in finished:
                self._offer(load)  # the other engine begins it anew
                continue
            received.add(ticket.request_id)
            if ticket.state is not TicketState.DONE:
                self._failed_blocks.update(load.block_ids)
        return sent, received

    def is_streaming(self, request_id: str) -> bool:
        """Whether a request has got its offer."""
        request = self._sending.get(request_id)
        return request is not None and request.state is RequestState.STREAMING

    def bytes_received(self, request_id: str) -> int:
        """How much of a request has come."""
        return self._receiving[request_id].bytes_done

    def get_block_ids_with_load_errors(self) -> set[int]:
        found, self._failed_blocks = self._failed_blocks, set()
        return found

    def shutdown(self) -> None:
        for endpoint in (self._client, self._server):
            if endpoint is not None:
                endpoint.close()
