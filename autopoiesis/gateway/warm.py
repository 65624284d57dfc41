"""Compile the decision kernels before the first request needs them."""

import numpy as np

from autopoiesis.arms.allocation import SHARDS, Cell
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.state import GatewayState
from autopoiesis.replicas.fleet import Member
from autopoiesis.replicas.kv_events import News

_POLICY = """
def score(request, replica, fleet):
    return replica.in_flight
def admit(request, fleet):
    return 1.0
def priority(request, fleet):
    return request.input_tokens
def ceiling(request, replica, fleet):
    return 1.0
"""


def warm_up() -> None:
    """Take a few decisions of every kind; the first time on a machine this compiles for a while."""
    policy = verify(_POLICY)
    program = compile_policy(policy)
    state = GatewayState(Objective(), (policy.id, program), np.random.default_rng(0), lambda: 1.0)
    state.set_members(
        [Member(name=f"r{i}", address=f"127.0.0.1:{i + 1}", profile="") for i in range(2)]
    )
    cell = Cell(policy.id, ("r0", "r1"), tuple(range(SHARDS)))
    state.allocate(0, [cell], {policy.id: program})
    state.membership.report("r0", 1.0, 0.0, 0.5)
    state.membership.cache_changed("r0", News(cleared=True))
    state.membership.set_kv_tokens("r0", 1024)
    state.membership.cache_changed("r0", News(evicted_tokens=1))
    flights = [_flight(i) for i in range(4)]
    for flight in flights:
        state.decide(flight)
    state.accounts.first_token(flights[0], -1)
    for flight in flights[:2]:
        state.accounts.finish(flight, -1, 0.1, 10.0, failed=False)
    state.release()


def _flight(number: int) -> Flight:
    return Flight(
        key=str(number),
        request_id=str(number),
        path="",
        model="",
        stream=True,
        characters=100,
        input_tokens=25.0,
        max_output_tokens=100.0,
        priority_class=0.0,
        session=number,
        shard=number,
        arrived_s=0.0,
        arrived_unix_s=0.0,
        blocks=np.arange(3, dtype=np.int64),
    )
