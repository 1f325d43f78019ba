"""The order of what goes to devices, against a model that sorts everything."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from kvxfer.policy import Admission, Flow, Window

PEER = Window(100, 20)
DEVICE = Window(150, 30)


@dataclass(eq=False)
class Request:
    """A request of the model, beside the flow that it stands for."""

    flow: Flow[Any]
    deadline: float
    priority: int
    peer: str
    served: int = 0
    order: int = -1
    waiting: list[Any] = field(default_factory=list)


class AdmissionMachine(RuleBasedStateMachine):
    """Pushes, pops and ends at random; the model looks at everything each time."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.policy: Admission[Any] = Admission(PEER, DEVICE)
        self.known: list[Request] = []
        self.flying: list[Any] = []
        self.clock = 0

    @rule(
        target=requests,
        deadline=st.sampled_from([1.0, 2.0, math.inf]),
        priority=st.integers(0, 1),
        peer=st.sampled_from(["a", "b"]),
    )
    def open(self, deadline: float, priority: int, peer: str) -> Request:
        request = Request(Flow(deadline, priority), deadline, priority, peer)
        self.known.append(request)
        return request

    @rule(
        request=requests,
        layer=st.integers(0, 3),
        n_bytes=st.integers(1, 120),
        n_wrs=st.integers(1, 25),
    )
    def push(self, request: Request, layer: int, n_bytes: int, n_wrs: int) -> None:
        self.clock += 1
        item = (self.clock, request, layer, n_bytes, n_wrs)
        if not request.waiting:
            rivals = [
                r.served
                for r in self.known
                if r.waiting
                and (r.deadline, r.priority) == (request.deadline, request.priority)
            ]
            request.served = max(request.served, min(rivals, default=0))
            request.order = self.clock
        request.waiting.append(item)
        self.policy.push(
            request.flow,
            item,
            peer=request.peer,
            device="nic",
            layer=layer,
            n_bytes=n_bytes,
            n_wrs=n_wrs,
        )

    def fits(self, item: Any, on: list[Any], window: Window) -> bool:
        if not on:
            return True
        n_bytes: int = sum(i[3] for i in on) + item[3]
        n_wrs: int = sum(i[4] for i in on) + item[4]
        return n_bytes <= window.n_bytes and n_wrs <= window.n_wrs

    def expected(self) -> Any:
        """What has to go next, by looking at everything that waits."""
        best: Any = None
        for request in self.known:
            if not request.waiting:
                continue
            head = min(request.waiting, key=lambda item: (item[2], item[0]))
            peer = [i for i in self.flying if i[1].peer == request.peer]
            if not self.fits(head, peer, PEER):
                continue
            if not self.fits(head, self.flying, DEVICE):
                continue
            key = (request.deadline, -request.priority, request.served, request.order)
            if best is None or key < best[0]:
                best = (key, head)
        return best[1] if best is not None else None

    @rule()
    def pop(self) -> None:
        wanted = self.expected()
        assert self.policy.pop() == wanted
        if wanted is not None:
            request = wanted[1]
            request.waiting.remove(wanted)
            request.served += wanted[3]
            self.flying.append(wanted)

    @rule(data=st.data())
    def done(self, data: st.DataObject) -> None:
        if self.flying:
            item = data.draw(st.sampled_from(self.flying))
            self.flying.remove(item)
            self.policy.done(item)

    @rule(request=requests)
    def remove(self, request: Request) -> None:
        request.waiting.clear()
        self.policy.remove(request.flow)

    @invariant()
    def counts(self) -> None:
        assert self.policy.waiting == sum(len(r.waiting) for r in self.known)
        loads = self.policy.peers
        for peer in "ab":
            flying = [i for i in self.flying if i[1].peer == peer]
            if not flying:
                assert peer not in loads
                continue
            assert loads[peer].n_bytes == sum(i[3] for i in flying)
            assert loads[peer].n_wrs == sum(i[4] for i in flying)


AdmissionMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)
TestAdmission = AdmissionMachine.TestCase


def test_a_large_request_does_not_starve_a_small_one() -> None:
    policy: Admission[str] = Admission(Window(10, 100), Window(10, 100))
    large: Flow[str] = Flow()
    small: Flow[str] = Flow()
    push: dict[str, Any] = {"peer": "p", "device": "d", "n_bytes": 10, "n_wrs": 1}
    for i in range(100):
        policy.push(large, f"large{i}", layer=i, **push)
    assert policy.pop() == "large0"
    policy.push(small, "small", layer=50, **push)
    policy.done("large0")
    taken = []
    for _ in range(2):
        item = policy.pop()
        assert item is not None
        policy.done(item)
        taken.append(item)
    assert "small" in taken


def test_what_is_larger_than_a_window_goes_alone() -> None:
    policy: Admission[str] = Admission(Window(10, 2), Window(10, 2))
    flow: Flow[str] = Flow()
    push: dict[str, Any] = {"peer": "p", "device": "d", "layer": 0}
    policy.push(flow, "huge", n_bytes=1000, n_wrs=50, **push)
    policy.push(flow, "tiny", n_bytes=1, n_wrs=1, **push)
    assert policy.pop() == "huge"
    assert policy.pop() is None
    assert policy.blocked(flow)
    policy.done("huge")
    assert policy.pop() == "tiny"
