"""The state machines without sockets: every state meets every message."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from kvxfer import wire
from kvxfer.errors import InternalError, UsageError
from kvxfer.protocol import (
    AcceptWanted,
    Action,
    CloseCause,
    Closed,
    ConfirmWanted,
    CreditReceived,
    DialerProtocol,
    DialerState,
    Established,
    FailedReceived,
    FenceConfirmed,
    FenceState,
    FenceWanted,
    ListenerConnection,
    ListenerState,
    OfferParts,
    OfferWanted,
    RequestReceived,
    Send,
    Timing,
)
from tests import control_messages as make

TIMING = Timing(ping_interval=1.0, ping_timeout=5.0, handshake_timeout=10.0)
ID = make.CONN_ID


def make_listener(**changes: Any) -> ListenerConnection:
    fields: dict[str, Any] = {
        "incarnation": b"l" * 16,
        "timing": TIMING,
        "features": 0b011,
        **changes,
    }
    return ListenerConnection(ID, **fields)


def parts(role: wire.Role = "target", **changes: Any) -> OfferParts:
    fields: dict[str, Any] = {
        "geometry": make.geometry(),
        "device": make.device("soft9"),
        "dialer_device": "soft0",
        "endpoint": make.endpoint(role),
        **changes,
    }
    return OfferParts(**fields)


def dialer_in(state: DialerState, role: wire.Role = "initiator") -> DialerProtocol:
    """Walk a dialer to ``state``, at time 0."""
    dialer = DialerProtocol(make.hello(role), TIMING)
    steps: list[Callable[[], list[Action]]] = [
        lambda: dialer.start(0.0),
        lambda: dialer.receive(make.offer(_other(role)), 0.0),
        lambda: dialer.accept(make.accept(role)),
        lambda: dialer.receive(wire.Ready(conn_id=ID), 0.0),
    ]
    if state is DialerState.CLOSED:
        steps[1:] = [lambda: dialer.close("over")]
    for step in steps:
        if dialer.state is not state:
            step()
    assert dialer.state is state
    return dialer


def listener_in(state: ListenerState, role: wire.Role = "target") -> ListenerConnection:
    """Walk a listener to ``state``, at time 0."""
    listener = make_listener()
    steps: list[Callable[[], list[Action]]] = [
        lambda: listener.receive(make.hello(_other(role)), 0.0),
        lambda: listener.offer(parts(role)),
        lambda: listener.receive(make.accept(_other(role)), 0.0),
        lambda: listener.confirm(0.0),
    ]
    if state is ListenerState.CLOSED:
        steps = [lambda: listener.close("over")]
    for step in steps:
        if listener.state is not state:
            step()
    assert listener.state is state
    return listener


def _other(role: wire.Role) -> wire.Role:
    return "target" if role == "initiator" else "initiator"


def sent(actions: list[Action]) -> list[wire.Message]:
    return [action.message for action in actions if isinstance(action, Send)]


def kinds(actions: list[Action]) -> list[type]:
    return [type(action) for action in actions]


def end_of(actions: list[Action]) -> CloseCause:
    assert isinstance(actions[-1], Closed)
    return actions[-1].reason.cause


@pytest.mark.parametrize("role", ["initiator", "target"])
def test_a_handshake_either_way(role: wire.Role) -> None:
    dialer = DialerProtocol(make.hello(role), TIMING)
    listener = make_listener()
    (hello,) = sent(dialer.start(0.0))
    (wanted,) = listener.receive(hello, 0.1)
    assert isinstance(wanted, OfferWanted) and listener.role == _other(role)
    (offer,) = sent(listener.offer(parts(_other(role))))
    (asked,) = dialer.receive(offer, 0.2)
    assert isinstance(asked, AcceptWanted)
    (accept,) = sent(dialer.accept(make.accept(role)))
    (confirm,) = listener.receive(accept, 0.3)
    assert isinstance(confirm, ConfirmWanted)
    ready = listener.confirm(0.4)
    assert kinds(ready) == [Send, Established]
    assert kinds(dialer.receive(sent(ready)[0], 0.5)) == [Established]
    assert dialer.is_established and listener.is_established
    assert dialer.conn_id == listener.conn_id == ID
    assert dialer.version == listener.version == 1
    assert dialer.features == listener.features == 0b010


# What each state takes; everything else of the other side is a violation.
ESTABLISHED = {"Ping", "Pong", "Fence", "Fenced", "Failed", "Credit", "Bye"}
DIALER_TAKES: dict[DialerState, set[str]] = {
    DialerState.HELLO_SENT: {"Offer", "Refuse"},
    DialerState.ACCEPTING: {"Refuse", "Bye"},
    DialerState.ACCEPT_SENT: {"Ready", "Refuse", "Bye"},
    DialerState.ESTABLISHED: ESTABLISHED | {"Refuse"},
}
LISTENER_TAKES: dict[ListenerState, set[str]] = {
    ListenerState.NEW: {"Hello"},
    ListenerState.OFFERING: {"Bye"},
    ListenerState.OFFERED: {"Accept", "Bye"},
    ListenerState.CONFIRMING: {"Bye"},
    ListenerState.ESTABLISHED: ESTABLISHED,
}
MESSAGES = make.one_of_each()


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("state", DIALER_TAKES)
def test_dialer_state_by_message(state: DialerState, message: wire.Message) -> None:
    dialer = dialer_in(state)
    actions = dialer.receive(message, 1.0)
    takes = DIALER_TAKES[state]
    if state is DialerState.ESTABLISHED:
        takes |= {type(m).__name__ for m in make.requests_from_target()}
    if type(message).__name__ in takes:
        reason = dialer.reason
        assert reason is None or reason.cause is not CloseCause.PROTOCOL
    elif dialer.conn_id is None and state is DialerState.HELLO_SENT:
        # It has no connection yet: what names one is foreign, the rest is wrong.
        foreign = hasattr(message, "conn_id")
        assert dialer.is_closed is not foreign and dialer.ignored == int(foreign)
    else:
        assert end_of(actions) is CloseCause.PROTOCOL and dialer.is_closed
        assert [type(m) for m in sent(actions)] == [wire.Bye]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("state", LISTENER_TAKES)
def test_listener_state_by_message(state: ListenerState, message: wire.Message) -> None:
    listener = listener_in(state)
    if isinstance(message, wire.Credit):
        listener = listener_in(state, "initiator")
    actions = listener.receive(message, 1.0)
    takes = LISTENER_TAKES[state]
    if state is ListenerState.ESTABLISHED:
        takes |= {type(m).__name__ for m in make.requests_from_initiator()}
    if type(message).__name__ in takes:
        reason = listener.reason
        assert reason is None or reason.cause is not CloseCause.PROTOCOL
        return
    assert end_of(actions) is CloseCause.PROTOCOL and listener.is_closed
    early = state in (ListenerState.NEW, ListenerState.OFFERING)
    assert [type(m) for m in sent(actions)] == [wire.Refuse if early else wire.Bye]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_after_the_end_everything_is_ignored(message: wire.Message) -> None:
    for core in (dialer_in(DialerState.CLOSED), listener_in(ListenerState.CLOSED)):
        assert core.receive(message, 1.0) == []
        assert core.ignored == 1 and core.is_closed
        assert core.tick(1e9) == [] and core.deadline == math.inf
        assert core.close("again") == core.lost("again") == core.violation("x") == []
        assert core.request_fence("x") == core.fenced() == []
        assert core.send_failed(b"", [0], "") == []


def test_late_delegates_change_nothing() -> None:
    dialer, listener = dialer_in(DialerState.CLOSED), listener_in(ListenerState.CLOSED)
    assert dialer.accept(make.accept()) == []
    assert listener.offer(parts()) == listener.confirm(1.0) == []
    assert listener.refuse(wire.Refuse(code="x")) == []


def test_every_illegal_move_is_refused() -> None:
    for core_state in DialerState:
        for target in DialerState:
            core = (
                dialer_in(core_state)
                if core_state is not DialerState.IDLE
                else (DialerProtocol(make.hello(), TIMING))
            )
            _try_move(core, target)
    for listener_state in ListenerState:
        for listener_target in ListenerState:
            _try_move(listener_in(listener_state), listener_target)


def _try_move(core: Any, target: Any) -> None:
    names = [state.name for state in type(core.state)]
    here, there = names.index(core.state.name), names.index(target.name)
    legal = core.state.name != "CLOSED" and (
        target.name == "CLOSED" or there == here + 1
    )
    if legal:
        core._set_state(target)
        assert core.state is target
        return
    before = core.state
    with pytest.raises(InternalError):
        core._set_state(target)
    assert core.state is before


def test_calls_out_of_turn_are_our_bug() -> None:
    with pytest.raises(InternalError):
        dialer_in(DialerState.HELLO_SENT).accept(make.accept())
    with pytest.raises(InternalError):
        dialer_in(DialerState.HELLO_SENT).start(0.0)
    with pytest.raises(InternalError):
        listener_in(ListenerState.OFFERED).offer(parts())
    with pytest.raises(InternalError):
        listener_in(ListenerState.OFFERED).confirm(0.0)
    with pytest.raises(InternalError):
        dialer_in(DialerState.ESTABLISHED).fenced()
    with pytest.raises(InternalError):
        dialer_in(DialerState.ESTABLISHED).send_credit(1, 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"nonce": b"x" * 16},
        {"version": 2},
        {"features": 0b1000},
        {"dialer_device": "mlx5_7"},
        {"endpoint": make.endpoint("initiator")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_offer_that_answers_nothing_we_said(changes: dict[str, Any]) -> None:
    dialer = dialer_in(DialerState.HELLO_SENT)
    actions = dialer.receive(make.offer(**changes), 1.0)
    assert end_of(actions) is CloseCause.PROTOCOL
    assert sent(actions) == [wire.Bye(conn_id=ID, reason=str(dialer.reason))]


def test_an_initiator_brings_no_windows() -> None:
    dialer = dialer_in(DialerState.HELLO_SENT, "target")
    assert end_of(dialer.receive(make.offer("target"), 1.0)) is CloseCause.PROTOCOL
    listener = listener_in(ListenerState.OFFERED)
    actions = listener.receive(make.accept("target"), 1.0)
    assert end_of(actions) is CloseCause.PROTOCOL


def test_both_sides_bring_the_same_number_of_qps() -> None:
    two = wire.Endpoint(qps=[make.qp(1), make.qp(2)])
    listener = listener_in(ListenerState.OFFERED)
    actions = listener.receive(make.accept(endpoint=two), 1.0)
    assert end_of(actions) is CloseCause.PROTOCOL
    dialer = dialer_in(DialerState.ACCEPTING)
    with pytest.raises(UsageError, match="number of QPs"):
        dialer.accept(make.accept(endpoint=two))
    assert dialer.state is DialerState.ACCEPTING


def test_our_own_ends_are_checked() -> None:
    dialer = dialer_in(DialerState.ACCEPTING)
    with pytest.raises(UsageError, match="another connection"):
        dialer.accept(make.accept(conn_id=1))
    with pytest.raises(UsageError, match="windows"):
        dialer.accept(make.accept("target"))
    listener = listener_in(ListenerState.OFFERING)
    with pytest.raises(UsageError, match="no device"):
        listener.offer(parts(dialer_device="mlx5_7"))
    with pytest.raises(UsageError, match="without windows"):
        listener.offer(parts(endpoint=make.endpoint("initiator")))
    assert listener.state is ListenerState.OFFERING


def test_versions_and_features_are_negotiated() -> None:
    listener = make_listener(versions=(1, 4), features=0b0111)
    listener.receive(make.hello(versions=(2, 3), features=0b1101), 0.0)
    assert (listener.version, listener.features) == (3, 0b0101)
    (offer,) = sent(listener.offer(parts()))
    assert isinstance(offer, wire.Offer)
    assert (offer.version, offer.features) == (3, 0b0101)
    actions = make_listener().receive(make.hello(versions=(2, 3)), 0.0)
    (refuse,) = sent(actions)
    assert isinstance(refuse, wire.Refuse) and refuse.code == "version"
    assert end_of(actions) is CloseCause.REFUSED


def test_another_connections_messages_are_ignored_and_counted() -> None:
    for core in (
        dialer_in(DialerState.ESTABLISHED),
        listener_in(ListenerState.ESTABLISHED),
    ):
        for message in MESSAGES:
            if hasattr(message, "conn_id") and not isinstance(message, wire.Offer):
                foreign = msgspec.structs.replace(message, conn_id=1)
                assert core.receive(foreign, 1.0) == []
        assert core.ignored == 16 and core.is_established


def test_foreign_messages_are_no_sign_of_life() -> None:
    listener = listener_in(ListenerState.ESTABLISHED)
    before = listener.deadline
    listener.receive(wire.Fenced(conn_id=1), 0.5)
    assert listener.deadline == before


@pytest.mark.parametrize(
    "state", [s for s in LISTENER_TAKES if s is not ListenerState.NEW]
)
def test_a_new_incarnation_ends_the_old_one(state: ListenerState) -> None:
    listener = listener_in(state)
    actions = listener.receive(make.hello(incarnation=b"2" * 16), 1.0)
    assert end_of(actions) is CloseCause.SUPERSEDED and sent(actions) == []
    assert listener.was_superseded


# -- time ------------------------------------------------------------------


@pytest.mark.parametrize(
    "state", [DialerState.HELLO_SENT, DialerState.ACCEPTING, DialerState.ACCEPT_SENT]
)
def test_the_dialers_deadline(state: DialerState) -> None:
    dialer = dialer_in(state)
    assert dialer.deadline == 10.0
    assert dialer.tick(9.9) == []
    assert end_of(dialer.tick(10.0)) is CloseCause.TIMEOUT


@pytest.mark.parametrize(
    "state", [ListenerState.OFFERING, ListenerState.OFFERED, ListenerState.CONFIRMING]
)
def test_the_listeners_deadline(state: ListenerState) -> None:
    listener = listener_in(state)
    assert listener.deadline == 10.0
    assert listener.tick(9.9) == []
    actions = listener.tick(10.0)
    assert end_of(actions) is CloseCause.TIMEOUT
    assert [type(m) for m in sent(actions)] == [wire.Refuse]


@pytest.mark.parametrize(("late", "expected_pings"), [(0.0, 4), (0.3, 3), (1.0, 2)])
def test_silence_is_asked_about_and_then_believed(
    late: float, expected_pings: int
) -> None:
    """In time, or later by as much as the loop is."""
    listener = listener_in(ListenerState.ESTABLISHED)
    pings = 0
    actions: list[Action] = []
    while not listener.is_closed:
        now = listener.deadline + late
        actions = listener.tick(now)
        pings += sum(isinstance(m, wire.Ping) for m in sent(actions))
    assert 5.0 <= now <= 5.0 + late and pings == expected_pings
    assert end_of(actions) is CloseCause.DEAD
    assert [type(m) for m in sent(actions)] == [wire.Bye]


def test_a_living_pair_costs_one_ping_a_second() -> None:
    dialer = dialer_in(DialerState.ESTABLISHED)
    listener = listener_in(ListenerState.ESTABLISHED)
    pings = 0
    now = 0.0
    while now < 100.0:
        now = min(dialer.deadline, listener.deadline)
        for core, other in ((dialer, listener), (listener, dialer)):
            for message in sent(core.tick(now)):
                pings += isinstance(message, wire.Ping)
                for reply in sent(other.receive(message, now)):
                    core.receive(reply, now)
    assert dialer.is_established and listener.is_established
    assert 99 <= pings <= 101


def test_any_message_is_a_sign_of_life() -> None:
    dialer = dialer_in(DialerState.ESTABLISHED)
    for now in (0.9, 1.8, 2.7):
        dialer.receive(
            wire.Credit(conn_id=ID, consumed_bytes=1, consumed_records=1), now
        )
        assert dialer.tick(now) == []
    assert dialer.deadline == 3.7


def test_a_timer_that_comes_late_proves_nothing() -> None:
    dialer = dialer_in(DialerState.ESTABLISHED)
    # Stopped for a minute: ask first, and only then believe the silence.
    assert sent(dialer.tick(60.0)) == [wire.Ping(seq=1)]
    assert dialer.deadline == 61.0
    heard = dialer_in(DialerState.ESTABLISHED)
    heard.tick(60.0)
    heard.receive(wire.Pong(seq=1), 60.5)
    assert sent(heard.tick(heard.deadline)) == [wire.Ping(seq=2)]
    assert end_of(dialer.tick(61.0)) is CloseCause.DEAD


@pytest.mark.parametrize(
    "times", [(0, 5, 10), (1, 1, 10), (1, math.inf, 10), (1, 5, math.nan), (-1, 5, 1)]
)
def test_times_that_make_no_sense(times: tuple[float, float, float]) -> None:
    with pytest.raises(UsageError):
        Timing(
            ping_interval=times[0], ping_timeout=times[1], handshake_timeout=times[2]
        )


# -- established -----------------------------------------------------------


def test_fences_in_both_directions() -> None:
    dialer = dialer_in(DialerState.ESTABLISHED)
    listener = listener_in(ListenerState.ESTABLISHED)
    (ask,) = sent(dialer.request_fence("a write failed"))
    assert dialer.request_fence("again") == []
    assert listener.receive(ask, 1.0) == [FenceWanted("a write failed")]
    assert listener.receive(ask, 1.0) == []  # under way
    (done,) = sent(listener.fenced())
    assert listener.receive(ask, 1.0) == [Send(done)]  # it may have been lost
    assert dialer.receive(done, 1.0) == [FenceConfirmed()]
    assert dialer.receive(done, 1.0) == [] and dialer.ignored == 1
    assert dialer.fence_out is listener.fence_in is FenceState.DONE
    assert dialer.fence_in is listener.fence_out is FenceState.OPEN
    (back,) = sent(listener.request_fence("you too"))
    assert dialer.receive(back, 1.0) == [FenceWanted("you too")]
    assert listener.receive(sent(dialer.fenced())[0], 1.0) == [FenceConfirmed()]


def test_credit_grows_and_comes_from_the_target() -> None:
    target = listener_in(ListenerState.ESTABLISHED)
    initiator = dialer_in(DialerState.ESTABLISHED)
    for figures in ((10, 1), (10, 1), (20, 3)):
        (credit,) = sent(target.send_credit(*figures))
        assert initiator.receive(credit, 1.0) == [CreditReceived(*figures)]
    backwards = wire.Credit(conn_id=ID, consumed_bytes=30, consumed_records=2)
    assert end_of(initiator.receive(backwards, 1.0)) is CloseCause.PROTOCOL
    assert end_of(target.receive(backwards, 1.0)) is CloseCause.PROTOCOL


def test_failures_are_told_either_way() -> None:
    for one, other in (
        (dialer_in(DialerState.ESTABLISHED), listener_in(ListenerState.ESTABLISHED)),
        (listener_in(ListenerState.ESTABLISHED), dialer_in(DialerState.ESTABLISHED)),
    ):
        (message,) = sent(one.send_failed(b"r", [1, 2], "x"))
        assert isinstance(message, wire.Failed)
        assert other.receive(message, 1.0) == [FailedReceived(message)]


def test_nothing_is_sent_before_the_connection_stands() -> None:
    for core in (
        dialer_in(DialerState.ACCEPT_SENT),
        listener_in(ListenerState.CONFIRMING),
    ):
        assert core.request_fence("x") == core.send_failed(b"", [0], "") == []
    assert listener_in(ListenerState.CONFIRMING).send_credit(1, 1) == []


@pytest.mark.parametrize("state", [s for s in ListenerState if s.name != "CLOSED"])
def test_closing_says_goodbye(state: ListenerState) -> None:
    listener = listener_in(state)
    actions = listener.close("maintenance")
    assert end_of(actions) is CloseCause.LOCAL
    (message,) = sent(actions)
    early = state in (ListenerState.NEW, ListenerState.OFFERING)
    if early:
        assert message == wire.Refuse(code="closing", message="maintenance")
    else:
        assert message == wire.Bye(conn_id=ID, reason="maintenance")


def test_a_lost_link_gets_no_farewell() -> None:
    actions = dialer_in(DialerState.ESTABLISHED).lost("reset")
    assert end_of(actions) is CloseCause.LOST and sent(actions) == []


def test_a_listener_that_forgot_us_ends_the_connection() -> None:
    dialer = dialer_in(DialerState.ESTABLISHED)
    refuse = wire.Refuse(code="unknown-connection", message="no such connection")
    assert end_of(dialer.receive(refuse, 1.0)) is CloseCause.LOST


@pytest.mark.parametrize("knows", [True, False])
def test_requests_go_one_way_and_under_their_feature(knows: bool) -> None:
    for core, legal, illegal in (
        (
            dialer_in(DialerState.ESTABLISHED),
            make.requests_from_target(),
            make.requests_from_initiator(),
        ),
        (
            listener_in(ListenerState.ESTABLISHED),
            make.requests_from_initiator(),
            make.requests_from_target(),
        ),
    ):
        core.features = wire.FEATURE_REQUESTS if knows else 0
        if knows:
            for message in legal:
                assert core.receive(message, 1.0) == [RequestReceived(message)]
                assert core.send_request(message) == [Send(message)]
        else:
            with pytest.raises(UsageError, match="knows no requests"):
                core.send_request(legal[0])
        wrong = illegal[0] if knows else legal[0]
        *_, closed = core.receive(wrong, 1.0)
        assert isinstance(closed, Closed)
        assert closed.reason.cause is CloseCause.PROTOCOL
        assert core.send_request(legal[0]) == []
