from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from autopoiesis.arms.allocation import SHARDS, Cell
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.machine import Program
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.held import Queue
from autopoiesis.gateway.state import GatewayState, Shed
from autopoiesis.replicas.fleet import Member

LEAST = next(arm for arm in seed_arms() if arm.name == "least-requests")
ALL_SHARDS = tuple(range(SHARDS))
ONE_EACH = """
def score(request, replica, fleet):
    return replica.in_flight
def priority(request, fleet):
    return request.input_tokens
def ceiling(request, replica, fleet):
    return 1
"""


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def program(source: str) -> Program:
    return compile_policy(verify(source))


def members(count: int) -> list[Member]:
    return [Member(name=f"r{i}", address=f"127.0.0.1:{i + 1}", profile="p") for i in range(count)]


def make(count: int = 3, clock: Clock | None = None) -> GatewayState:
    state = GatewayState(
        Objective(), (LEAST.id, program(LEAST.source)), np.random.default_rng(0), clock or Clock()
    )
    state.set_members(members(count))
    return state


def serve(state: GatewayState, source: str, replicas: Sequence[str], arm_id: str = "arm"):
    state.allocate(1, [Cell(arm_id, tuple(replicas), ALL_SHARDS)], {arm_id: program(source)})


def flight(
    number: int = 0, tokens: float = 100.0, shard: int = 0, stream: bool = True, **fields: object
) -> Flight:
    return Flight(
        key=str(number), request_id=str(number), path="/v1/chat/completions", model="m", stream=stream, characters=400,
        input_tokens=tokens, max_output_tokens=50.0, priority_class=0.0, session=0, shard=shard, arrived_s=100.0,
        arrived_unix_s=0.0, **fields,
    )  # fmt: skip


def test_without_an_allocation_the_baseline_serves_everything():
    state = make()
    flights = [flight(i) for i in range(6)]
    for one in flights:
        addresses = state.decide(one)
        assert addresses
        assert len(set(addresses)) == 3
    assert {f.arm_id for f in flights} == {LEAST.id}
    assert Counter(f.replica for f in flights) == {0: 2, 1: 2, 2: 2}


def test_each_shard_is_served_by_its_arm_on_its_replicas():
    state = make(4)
    low, high = ALL_SHARDS[:32], ALL_SHARDS[32:]
    cells = [Cell("one", ("r0", "r1"), low), Cell("two", ("r2", "r3"), high)]
    state.allocate(7, cells, {"one": program(LEAST.source), "two": program(LEAST.source)})
    for shard in ALL_SHARDS:
        one = flight(shard, shard=shard)
        addresses = state.decide(one)
        assert addresses
        own = {"127.0.0.1:1", "127.0.0.1:2"} if shard < 32 else {"127.0.0.1:3", "127.0.0.1:4"}
        assert set(addresses[:2]) == own
        assert len(addresses) == 4  # the others stand behind as a last resort
        assert (one.arm_id, one.window) == ("one" if shard < 32 else "two", 7)


def test_an_arm_without_a_program_is_replaced_and_counted():
    state = make()
    state.allocate(1, [Cell("lost", ("r0",), ALL_SHARDS)], {})
    one = flight()
    assert state.decide(one)
    assert one.arm_id == LEAST.id
    assert [arm for arm, _ in state.faults.untold] == ["lost"]


def test_a_cell_whose_replicas_are_gone_uses_any_healthy_one():
    state = make()
    serve(state, LEAST.source, ["r0"])
    assert state.membership.set_healthy("r0", False)
    assert not state.membership.set_healthy("r0", False)
    assert (state.decide(flight(1)) or ("",))[0] in {"127.0.0.1:2", "127.0.0.1:3"}
    state.membership.set_healthy("r0", True)
    assert (state.decide(flight(2)) or ("",))[0] == "127.0.0.1:1"


def test_without_any_replica_envoy_is_left_to_answer():
    assert make(0).decide(flight()) == ()


def test_when_all_replicas_are_down_they_are_tried_all_the_same():
    state = make()
    for i in range(3):
        state.membership.set_healthy(f"r{i}", False)
    assert len(state.decide(flight()) or ()) == 3


def test_a_policy_may_shed():
    state = make()
    serve(state, LEAST.source + "\ndef admit(request, fleet):\n    return 0\n", ["r0"])
    with pytest.raises(Shed):
        state.decide(flight())


def test_held_requests_leave_by_urgency_as_replicas_become_free():
    clock = Clock()
    state = make(2, clock)
    serve(state, ONE_EACH, ["r0", "r1"])
    running = [flight(i) for i in range(2)]
    assert all(state.decide(f) for f in running)
    waiting = [flight(10 + i, tokens) for i, tokens in enumerate((300.0, 100.0, 200.0))]
    assert [state.decide(f) for f in waiting] == [None] * 3
    assert len(state.held) == 3
    assert state.release() == []
    clock.now_s += 2.0
    state.accounts.finish(running[0], -1, 0.0, 10.0, failed=False)
    assert [f.input_tokens for f, _ in state.release()] == [100.0]
    assert waiting[1].held_s == pytest.approx(2.0)
    state.accounts.finish(running[1], -1, 0.0, 10.0, failed=False)
    state.accounts.finish(waiting[1], -1, 0.0, 10.0, failed=False)
    assert [f.input_tokens for f, _ in state.release()] == [200.0, 300.0]
    assert not len(state.held)


def test_a_full_queue_sheds():
    state = make(1)
    serve(state, ONE_EACH, ["r0"])
    state.decide(flight(0))
    for i in range(1024):
        assert state.decide(flight(1 + i)) is None
    with pytest.raises(Shed, match="waiting"):
        state.decide(flight(9999))


def test_what_an_arm_holds_leaves_by_its_rules_where_another_takes_its_place():
    state = make(2)
    serve(state, ONE_EACH, ["r0"])
    running = flight(0)
    state.decide(running)
    waiting = [flight(1 + i, tokens) for i, tokens in enumerate((300.0, 100.0, 200.0))]
    assert [state.decide(one) for one in waiting] == [None] * 3
    cells = [Cell("other", ("r0",), ALL_SHARDS)]
    for window in (2, 3):  # the second time it is a guest already
        state.allocate(window, cells, {"other": program(LEAST.source)}, ["arm", "other"])
        assert state.release() == []
    fresh = flight(9)
    assert state.decide(fresh)
    assert (fresh.arm_id, fresh.window) == ("other", 3)
    for one in (running, fresh):
        state.accounts.finish(one, -1, 0.0, 10.0, failed=False)
    ((next_, addresses),) = state.release()
    assert (next_.input_tokens, next_.arm_id, next_.window) == (100.0, "arm", 1)
    assert addresses[0] == "127.0.0.1:1"
    state.drop_held(waiting[0])  # its client went away
    state.accounts.finish(next_, -1, 0.0, 10.0, failed=False)
    assert [one.input_tokens for one, _ in state.release()] == [200.0]
    assert not len(state.held)


def test_a_guest_that_fails_is_replaced_on_the_replicas_that_serve_now():
    state = make(2)
    serve(state, ONE_EACH, ["r0"])
    state.decide(flight(0))
    waiting = [flight(1 + i) for i in range(5)]
    assert [state.decide(one) for one in waiting] == [None] * 5
    cells = [Cell("other", ("r1",), ALL_SHARDS)]
    state._arms[Queue("arm", "arm")] = replace(
        state._arms[Queue("arm", "arm")], program=program(ONE_EACH)._replace(code=None)
    )
    state.allocate(2, cells, {"other": program(LEAST.source)}, ["arm", "other"])
    released = state.release()
    assert {one for one, _ in released} == set(waiting)
    assert {one.arm_id for one, _ in released} == {LEAST.id}
    assert {addresses[0] for _, addresses in released} == {"127.0.0.1:2"}


def test_an_arm_that_stands_no_more_hands_over_what_it_holds():
    state = make(2)
    serve(state, ONE_EACH, ["r0"])
    state.decide(flight(0))
    held = flight(1)
    assert state.decide(held) is None
    serve(state, LEAST.source, ["r0", "r1"], arm_id="other")
    assert [(f, f.arm_id) for f, _ in state.release()] == [(held, "other")]


def test_a_retry_moves_the_account_to_the_replica_that_answered():
    state = make(2)
    one = flight()
    state.decide(one)
    other = 1 - one.replica
    state.accounts.first_token(one, other)
    assert (
        state.membership.in_flight(f"r{other}"),
        state.membership.in_flight(f"r{1 - other}"),
    ) == (1, 0)
    state.accounts.finish(one, other, 0.01, 5.0, failed=False)
    assert state.membership.in_flight(f"r{other}") == 0


def test_plain_answers_are_taken_to_have_started_when_they_usually_do():
    clock = Clock()
    state = make(1, clock)
    plain = flight(stream=False)
    state.decide(plain)
    state.accounts.assume_first_tokens()
    assert not plain.answered
    clock.now_s += Objective().slo_ttft_s + 0.1
    state.accounts.assume_first_tokens()
    assert plain.answered
    assert plain.ttft_s is None


def test_members_come_and_go():
    state = make(2)
    one = flight()
    state.decide(one)
    gone = state.membership.name_of(one.replica)
    state.set_members([m for m in members(3) if m.name != gone])
    assert state.membership.name_of(one.replica) == ""
    state.accounts.finish(one, -1, 0.0, 1.0, failed=False)
    assert {state.membership.in_flight(f"r{i}") for i in range(3)} == {0}
    assert "127.0.0.1:3" in (state.decide(flight(1)) or ())
