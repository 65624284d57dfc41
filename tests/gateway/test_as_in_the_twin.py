"""Features are filled the same way live and in the twin: what one decides on, the other does too."""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest

from autopoiesis.arms.allocation import SHARDS, Cell
from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.features import FIRST_FLEET, FUNCTIONS, Fleet, Replica, Request
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.arms.prefix import BLOCK_TOKENS
from autopoiesis.arms.seeds import seed_arms
from autopoiesis.gateway.flight import Flight
from autopoiesis.gateway.serving import ServingArm
from autopoiesis.gateway.state import Addresses, GatewayState, Shed
from autopoiesis.replicas.fleet import Member
from autopoiesis.twin.latency import profile
from autopoiesis.twin.outcome import Outcome, Status
from autopoiesis.twin.python_policy import PythonPolicy
from autopoiesis.twin.simulation import ReplicaSpec, SimCell, Simulation
from autopoiesis.twin.trace import Trace

SOURCES = {arm.name: arm.source for arm in seed_arms()}
PROFILE = profile("h100-llama-3-8b-tp1-bf16")
SPEEDS = (1.0, 1.0, 0.5, 1.5)
SCRAPE_S = 0.5
HAND_OVER = 1
"""The scrape at which another arm takes over, where one does."""
ALL = tuple(range(SHARDS))
NAMES = [*(f"request.{n}" for n in Request._fields), *(f"replica.{n}" for n in Replica._fields),
         *(f"fleet.{n}" for n in Fleet._fields)]  # fmt: skip
AVERAGED = (
    "replica.ttft_ewma_s",
    "replica.tpot_ewma_s",
    "replica.decoding_tokens",
    "request.predicted_output_tokens",
)
"""Features that depend, a little, on the order in which the requests of one step end; live there is none."""
Row = tuple[float, ...]


def busy_trace(requests: int = 400) -> Trace:
    """A trace that fills four replicas, with sessions, shared prefixes, and a length of its own per request."""
    rng = np.random.default_rng(4)
    session = rng.integers(1, 120, requests)
    input_tokens = 600 + rng.permutation(4 * requests)[:requests]
    blocks = input_tokens // BLOCK_TOKENS
    return Trace(
        arrival_s=np.cumsum(rng.exponential(0.0025, requests)),
        input_tokens=input_tokens,
        output_tokens=rng.integers(1, 60, requests),
        max_output_tokens=rng.integers(40, 400, requests),
        session=session,
        priority=rng.choice([-1.0, 0.0, 1.0], requests),
        block_start=np.concatenate([[0], np.cumsum(blocks)]),
        blocks=np.concatenate(
            [s * 1000 + np.arange(n) for s, n in zip(session, blocks, strict=True)]
        ),
        block_tokens=BLOCK_TOKENS,
        name="busy",
    )


def as_seen(request: Request, replica: Replica, fleet: Fleet) -> Row:
    return (
        *(getattr(request, name) for name in Request._fields),
        *(getattr(replica, name) for name in Replica._fields),
        *(getattr(fleet, name) for name in Fleet._fields),
    )


@dataclass
class Twin:
    """A seed in the twin: what it saw of the last replica at each request's last decision."""

    source: str
    trace: Trace
    then: str = ""
    """Source of the policy that takes over at the scrape `HAND_OVER`, if any."""
    rows: dict[float, Row] = field(default_factory=dict)
    draws: deque[float] = field(default_factory=deque)
    reports: list[np.ndarray] = field(default_factory=list)

    def policy(self, source: str) -> PythonPolicy:
        names = {"floor": math.floor, "clip": lambda x, low, high: min(max(x, low), high)}
        exec(source, names)
        functions = {name: names[name] for name in FUNCTIONS if name in names}
        decide = functions["score"]

        def score(request: Request, replica: Replica, fleet: Fleet) -> float:
            if replica.position == len(SPEEDS) - 1.0:
                self.rows[request.input_tokens] = as_seen(request, replica, fleet)
                self.draws.append(fleet.draw)
            return decide(request, replica, fleet)

        return PythonPolicy(**{**functions, "score": score})

    def serve(self) -> Outcome:
        specs = [ReplicaSpec(f"r{i}", PROFILE, speed) for i, speed in enumerate(SPEEDS)]
        simulation = Simulation(self.trace, specs, Objective(), 7, SCRAPE_S)
        everything = tuple(range(len(specs)))
        simulation.allocate([SimCell(self.policy(self.source), everything, ALL)])
        while np.any(simulation.outcome().status == Status.PENDING):
            simulation.advance(len(self.reports) * SCRAPE_S)
            self.reports.append(simulation.reports())
            if self.then and len(self.reports) == HAND_OVER + 1:
                simulation.allocate([SimCell(self.policy(self.then), everything, ALL)])
        assert simulation.preemptions == 0
        return simulation.outcome()


class Live(GatewayState):
    """The gateway's state, which also notes what the arm saw of the last replica."""

    def __init__(self, draws: deque[float], twin_trace: Trace) -> None:
        self.now_s = 0.0
        self.rows: dict[float, Row] = {}
        self.sent: dict[int, int] = {}
        baseline = compile_policy(verify(SOURCES["least-requests"]))
        draw = type("Draws", (), {"random": lambda _: draws.popleft() if draws else 0.5})()
        super().__init__(Objective(), ("baseline", baseline), draw, lambda: self.now_s)
        self.set_members(
            [
                Member(f"r{i}", f"127.0.0.1:{i + 1}", "p", speed, kv_tokens=PROFILE.kv_tokens)
                for i, speed in enumerate(SPEEDS)
            ]
        )
        self.flights = [flight(twin_trace, i) for i in range(len(twin_trace))]

    def _place(
        self, arm: ServingArm, flight: Flight, stage: int, must_wait: bool = False
    ) -> Addresses | None:
        addresses = super()._place(arm, flight, stage, must_wait)
        if addresses is not None:
            self.rows[flight.input_tokens] = tuple(
                arm.registers[: FIRST_FLEET + len(Fleet._fields)]
            )
            self.sent[int(flight.key)] = len(self.sent)
        return addresses


def flight(trace: Trace, i: int) -> Flight:
    return Flight(
        key=str(i), request_id=str(i), path="/v1/completions", model="m", stream=True, characters=1,
        input_tokens=float(trace.input_tokens[i]), max_output_tokens=float(trace.max_output_tokens[i]),
        priority_class=float(trace.priority[i]), session=int(trace.session[i]), shard=0,
        arrived_s=float(trace.arrival_s[i]), arrived_unix_s=0.0, blocks=trace.blocks_of(i),
    )  # fmt: skip


def course(outcome: Outcome, reports: int) -> list[tuple[float, int, int]]:
    """When something happens, in the twin's order: (time, what, which).

    Scrape 0, arrival 1, end of a step 2, another arm 3.
    """
    ends = {
        (float(t), int(r))
        for times in (outcome.first_token_s, outcome.finished_s)
        for t, r in zip(times, outcome.replica, strict=True)
        if not math.isnan(t)
    }
    return sorted(
        [
            *((k * SCRAPE_S, 0, k) for k in range(reports)),
            *((float(t), 1, i) for i, t in enumerate(outcome.arrival_s)),
            *((t, 2, r) for t, r in ends),
            (HAND_OVER * SCRAPE_S, 3, 0),
        ]
    )


def step_events(outcome: Outcome, live: Live, at_s: float, r: int) -> Iterator[tuple[int, bool]]:
    """What a step of a replica brings, in the order in which it runs its requests: (request, is it the last token)."""
    here = np.flatnonzero(
        (outcome.replica == r) & ((outcome.first_token_s == at_s) | (outcome.finished_s == at_s))
    )
    for i in sorted(here.tolist(), key=lambda i: live.sent[i]):
        if outcome.first_token_s[i] == at_s:
            yield i, False
        if outcome.finished_s[i] == at_s:
            yield i, True


def serve_live(twin: Twin, outcome: Outcome, draws: deque[float]) -> Live:
    """Let the gateway's state go through what happened in the twin."""
    live = Live(draws, twin.trace)
    arm = compile_policy(verify(twin.source))
    everything = ("r0", "r1", "r2", "r3")
    live.allocate(0, [Cell("arm", everything, ALL)], {"arm": arm})
    for at_s, what, which in course(outcome, len(twin.reports)):
        live.now_s = at_s
        if what == 0:
            for r in range(len(SPEEDS)):
                live.membership.report(f"r{r}", *twin.reports[which][r])
            continue
        if what == 1:
            try:
                live.decide(live.flights[which])
            except Shed:
                assert outcome.status[which] == Status.SHED
            continue
        if what == 3:
            if twin.then:
                then = {"then": compile_policy(verify(twin.then))}
                live.allocate(1, [Cell("then", everything, ALL)], then, ["arm", "then"])
                live.release()
            continue
        for i, last in step_events(outcome, live, at_s, which):
            if last:
                tokens = int(outcome.output_tokens[i])
                tpot_s = float(outcome.tpot_s[i]) if tokens > 1 else 0.0
                live.accounts.finish(live.flights[i], which, tpot_s, float(tokens), failed=False)
            else:
                live.accounts.first_token(live.flights[i], which)
                assert live.flights[i].replica == which
        live.release()
    return live


@pytest.mark.parametrize(
    ("name", "then"),
    [
        *((name, "") for name in SOURCES),
        ("deadline-slack", "least-tokens"),
        ("shortest-prompt-first", "shed-when-saturated"),
    ],
)
def test_every_seed_sees_and_decides_the_same_live_and_in_the_twin(name: str, then: str) -> None:
    twin = Twin(SOURCES[name], busy_trace(), SOURCES.get(then, ""))
    outcome = twin.serve()
    holds = "def ceiling" in twin.source
    live = serve_live(twin, outcome, deque() if holds else twin.draws)
    served = np.flatnonzero(outcome.status == Status.COMPLETED)
    assert len(served) > 100
    assert len(live.rows) == len(served)
    if holds:
        assert np.count_nonzero(outcome.dispatched_s[served] > outcome.arrival_s[served]) > 20
    for i in served.tolist():
        tokens = float(outcome.input_tokens[i])
        there = dict(zip(NAMES, twin.rows[tokens], strict=True))
        here = dict(zip(NAMES, live.rows[tokens], strict=True))
        if holds:  # decisions on held requests draw at other times
            here["fleet.draw"] = there["fleet.draw"]
        for feature in AVERAGED:
            assert here[feature] == pytest.approx(there[feature], rel=0.01)
        exact = set(NAMES) - set(AVERAGED)
        assert {n: here[n] for n in exact} == {n: there[n] for n in exact}, f"request {i}"
    assert not live.faults.untold


def test_the_trace_gives_every_feature_something_to_say() -> None:
    seen = []
    for name in ("session-affinity", "shortest-prompt-first"):
        twin = Twin(SOURCES[name], busy_trace())
        twin.serve()
        seen += twin.rows.values()
    varied = {
        name
        for name, values in zip(NAMES, zip(*seen, strict=True), strict=True)
        if len(set(values)) > 1
    }
    constant = {"replica.error_rate", "replica.speed", "replica.draining", "replica.position", "fleet.replicas",
                "fleet.slo_ttft_s", "fleet.slo_tpot_s"}  # fmt: skip
    assert varied == set(NAMES) - constant
