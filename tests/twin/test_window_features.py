"""What slow functions see of a window is the same from the twin's outcome and from the gateway's records."""

import math

import numpy as np
import pytest

from autopoiesis.arms.compiler import compile_policy
from autopoiesis.arms.language import verify
from autopoiesis.arms.objective import Objective
from autopoiesis.telemetry.records import OpenRequest, RequestRecord
from autopoiesis.telemetry.records import Status as Ending
from autopoiesis.twin.latency import profile
from autopoiesis.twin.outcome import Outcome, Status
from autopoiesis.twin.recorded import observed
from autopoiesis.twin.simulation import ReplicaSpec, SimCell, Simulation
from autopoiesis.twin.speed import conversations
from autopoiesis.twin.window_features import HOPELESS, Beside, window_features

PROGRAM = compile_policy(
    verify(
        "def score(request, replica, fleet):\n    return replica.in_flight\n"
        "def admit(request, fleet):\n    return 1 if fleet.in_flight < 120 else 0\n"
    )
)
"""It sheds and never holds: of a request under way the gateway does not tell how long it was held."""
OBJECTIVE = Objective(0.5, 0.03)
ORIGIN_S = 1_790_000_000.0
WINDOW_S = 5.0
ENDINGS = {
    Status.COMPLETED: Ending.COMPLETED,
    Status.SHED: Ending.SHED,
    Status.FAILED: Ending.FAILED,
}


def served(until_s: float) -> tuple[Outcome, list[np.ndarray]]:
    """Serve in the twin up to a time; what became of it, and what the replicas reported on the way."""
    specs = [ReplicaSpec(f"r{i}", profile("h100-llama-3-8b-tp1-bf16"), 0.4) for i in range(2)]
    simulation = Simulation(conversations(900, 5, 45.0), specs, OBJECTIVE, 3)
    simulation.allocate([SimCell(PROGRAM, (0, 1), tuple(range(64)))])
    reports = []
    for at_s in np.arange(0.5, until_s + 0.1, 0.5):
        simulation.advance(float(at_s))
        reports.append(simulation.reports())
    return simulation.outcome(), reports


def as_live(outcome: Outcome, now_s: float) -> Outcome:
    """Return what the gateway's records and open requests tell of the same requests."""
    records, under_way = [], []
    for i in np.flatnonzero(outcome.arrival_s < now_s):
        o = outcome.select(np.array([i]))
        arrived_s, sent_s = float(o.arrival_s[0]), float(o.dispatched_s[0])
        first_s = None if math.isnan(o.first_token_s[0]) else float(o.first_token_s[0])
        if o.status[0] == Status.PENDING:
            under_way.append(
                OpenRequest(
                    arrived_s + ORIGIN_S, 0, int(o.input_tokens[0]), 4096,
                    replica="" if math.isnan(sent_s) else f"r{o.replica[0]}",
                    first_token_s=None if first_s is None else first_s + ORIGIN_S,
                )
            )  # fmt: skip
            continue
        completed = o.status[0] == Status.COMPLETED
        records.append(
            RequestRecord(
                id=str(i), arrived_s=arrived_s + ORIGIN_S, path="/", model="m", status=ENDINGS[Status(o.status[0])],
                http_status=200, arm_id="a", window=0, shard=0, session=0,
                replica=f"r{o.replica[0]}" if o.replica[0] >= 0 else "", attempts=1, stream=True,
                input_tokens=int(o.input_tokens[0]), output_tokens=int(o.output_tokens[0]) if completed else 0,
                max_output_tokens=4096, cached_tokens=0, usage_counted=True, priority_class=0.0,
                held_s=0.0 if math.isnan(sent_s) else sent_s - arrived_s, decision_s=0.0,
                ttft_s=None if first_s is None else first_s - arrived_s,
                e2e_s=float(o.finished_s[0]) - arrived_s if completed else 0.0,
            )
        )  # fmt: skip
    return observed(records, under_way, ["r0", "r1"])[1]


def test_live_and_simulated_windows_are_described_alike() -> None:
    before_there = before_here = None
    names = set()
    for k in range(1, 4):
        now_s = k * WINDOW_S
        outcome, reports = served(now_s)
        beside = Beside(reports[-10:], 20.0, 2, True, 0.1, k, 5.0 * k)
        there = window_features(
            outcome, (now_s - WINDOW_S, now_s), OBJECTIVE, ("m",), beside, before_there
        )
        span = now_s - WINDOW_S + ORIGIN_S, now_s + ORIGIN_S
        here = window_features(
            as_live(outcome, now_s), span, OBJECTIVE, ("m",), beside, before_here
        )
        for name, value in there._asdict().items():
            told = getattr(here, name)
            if isinstance(value, tuple):
                assert np.allclose(_flat(value), _flat(told), rtol=1e-5)
            else:
                assert told == pytest.approx(value, rel=1e-5, abs=1e-6), (k, name)
            if not isinstance(value, tuple) and value:
                names.add(name)
        before_there, before_here = there, here
    assert {
        "shed",
        "unfinished",
        "in_flight_mean",
        "kv_usage_max",
        "completed",
        "utility",
    } <= names
    assert len(before_there.arrival_rates_rps) == 3


def _flat(values: tuple) -> list[float]:
    found: list[float] = []
    for value in values:
        found += (
            _flat(value)
            if isinstance(value, tuple)
            else [value]
            if not isinstance(value, str)
            else []
        )
    return found


def test_a_window_without_requests_has_zeros() -> None:
    outcome, _ = served(0.5)
    nothing = window_features(
        outcome.select(slice(0, 0)), (0.0, 10.0), OBJECTIVE, ("m",), Beside([], 20.0)
    )
    assert nothing.requests == nothing.completed == nothing.unfinished == 0
    assert (
        nothing.ttft_p99_s == nothing.utility == nothing.kv_usage_mean == nothing.utilisation == 0.0
    )
    assert nothing.arrival_rate_change == nothing.arrival_burstiness == 1.0
    assert nothing.arrival_rates_rps == (0.0,)


def test_traffic_for_a_fleet_that_serves_nothing_is_hopeless() -> None:
    outcome, _ = served(1.0)
    told = window_features(outcome, (0.0, 1.0), OBJECTIVE, ("a", "b"), Beside([], 0.0))
    assert told.utilisation == HOPELESS
    assert [demand.model for demand in told.demand] == ["a", "b"]
